"""What the metadata of a LeRobot data set must look like, checked once at the door, so that the code behind it need not
ask. `data.lerobot.LeRobotReader` is the door.

A schema mirrors the JSON that it describes:
    Is(what, test)           a value that passes the test
    [schema]                 a list of such
    {...: schema}            an object, with any names, of such
    {"name": schema, ...}    an object with these; others are ignored, but not in a `Closed` one, where a name that
                             nobody reads is a slip of the pen
    Maybe(schema)            under a name that may be absent
"""

import re
import reprlib
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from common import InputError


@dataclass(frozen=True)
class Is:
    what: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    schema: Any


class Closed(dict):
    pass


def check(value: Any, schema: Any, where: str) -> None:
    """Raises InputError, which begins with `where`, for the first thing that is otherwise than the schema says."""
    if wrong := fault(value, schema):
        raise InputError(f"{where}: {wrong}; correct the file, or copy it again")


def fault(value: Any, schema: Any, at: str = "") -> str | None:
    """What is wrong with a value, in words, or None; `at` is its place in the file."""
    if isinstance(schema, Is):
        return None if schema.test(value) else f"{at or 'it'} is {reprlib.repr(value)}, and must be {schema.what}"
    kind, word = (list, "a list") if isinstance(schema, list) else (dict, "an object")
    if not isinstance(value, kind):
        return f"{at or 'it'} is {reprlib.repr(value)}, and must be {word}"
    if kind is list:
        parts: Iterable = ((v, schema[0], f"{at}[{i}]") for i, v in enumerate(value))
    elif ... in schema:
        parts = ((v, schema[...], f"{at}.{k}".lstrip(".")) for k, v in value.items())
    else:
        lacking = [k for k, s in schema.items() if k not in value and not isinstance(s, Maybe)]
        unknown = sorted(set(value) - set(schema)) if isinstance(schema, Closed) else []
        if lacking or unknown:
            return f"{at or 'it'} " + (f"lacks {', '.join(lacking)}" if lacking else f"has the unknown {unknown}")
        inner = ((k, s.schema if isinstance(s, Maybe) else s) for k, s in schema.items() if k in value)
        parts = ((value[k], s, f"{at}.{k}".lstrip(".")) for k, s in inner)
    return next((wrong for part in parts if (wrong := fault(*part))), None)


def check_unique(values: Iterable, what: str, where: str) -> None:
    if twice := [v for v, n in Counter(values).items() if n > 1]:
        raise InputError(f"{where}: {what} {', '.join(map(str, twice[:3]))} twice; correct the file, or copy it again")


# --------------------------------------------------------------------------------------------------------------------
# What there is
# --------------------------------------------------------------------------------------------------------------------


def _integer(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**53


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # neither NaN, nor larger than a float


INDEX = Is("a whole number, 0 or more", lambda v: _integer(v, 0))
COUNT = Is("a whole number, 1 or more", lambda v: _integer(v, 1))
NUMBER = Is("a number", _number)
RATE = Is("a number above 0", lambda v: _number(v) and v > 0)
SECONDS = Is("a number, 0 or more", lambda v: _number(v) and v >= 0)
TEXT = Is("a text", lambda v: isinstance(v, str))
OBJECT = {...: Is("", lambda v: True)}


def _inside(path: str) -> bool:
    """Whether a relative path stays below where it starts."""
    return "\0" not in path and not path.startswith("/") and ".." not in PurePosixPath(path).parts


def _template(*fields: str) -> Is:
    """A path with places for these fields and for nothing else: format() could be made to look inside objects, or to
    fill the memory with blanks."""

    def test(value: Any) -> bool:
        try:
            parts = list(string.Formatter().parse(value))
        except (TypeError, ValueError):
            return False
        plain = (name is None or name in fields and not how and re.fullmatch("(0?[0-9]?d)?", spec or "")
                 for _, name, spec, how in parts)  # fmt: skip
        return _inside(value) and all(plain)

    return Is(f"a path within the data set, with {', '.join(fields)}", test)


_TEXTS = Is("null or a list of texts", lambda v: v is None or isinstance(v, list) and {*map(type, v)} <= {str})
_LISTED = Is("null, a list or an object", lambda v: v is None or isinstance(v, list | dict))
FEATURE = {"shape": Maybe([INDEX]), "names": Maybe(_LISTED)}


def info(version: str) -> dict:
    """meta/info.json."""
    where = ("chunk_index", "file_index") if version == "v3.0" else ("episode_chunk", "episode_index")
    paths = {"data_path": _template(*where), "video_path": _template("video_key", *where)}
    return {"fps": RATE, "features": {...: FEATURE}, "chunks_size": Maybe(COUNT)} | paths


def episodes(version: str, cameras: Iterable[str]) -> list:
    """The rows of meta/episodes; `cameras` are the columns in use."""
    row = {"episode_index": INDEX, "length": COUNT, "tasks": Maybe(_TEXTS), "task_name": Maybe(TEXT)}
    if version == "v3.0":
        for part in ("data", *(f"videos/{camera}" for camera in cameras)):
            row |= {f"{part}/{k}": INDEX for k in ("chunk_index", "file_index")}
        row |= {f"videos/{camera}/from_timestamp": SECONDS for camera in cameras}
    return [row]


def texts(kind: str) -> list:
    """The rows of meta/tasks and meta/subtasks."""
    return [{f"{kind}_index": INDEX, kind: TEXT}]


STATS = {...: OBJECT}

_CAMERA = Is("the name of a column", lambda v: isinstance(v, str) and _inside(v))  # a part of the videos' paths
_COLUMN = Closed(column=TEXT, index=INDEX, scale=Maybe(NUMBER), offset=Maybe(NUMBER))
MAPPING = Closed(
    about=Maybe(TEXT), images={...: _CAMERA}, stats=Maybe(STATS),
    **{kind: Maybe({...: _COLUMN}) for kind in ("state", "action", "target")},
)  # fmt: skip
