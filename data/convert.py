"""What converters share: the loop over episodes, scaled video, and careful reading of HDF5.

    jobs  {key: arguments}      one episode each, in the order in which they will be written
      | load(*arguments), in `workers` processes, a few episodes ahead
      v
    Episode, or why not          `LeRobotWriter.add_episode`, in this process; its videos arrive encoded

    OUT/meta/sources.jsonl      the key of each episode written, line by line: where it came from, and what `--resume`
                                leaves out. Files that were added to the source since then are converted, too
    OUT/meta/conversion.json    the source and the options: `--resume` goes on with the same, and refuses others
OUT/meta/skipped.json       the episodes that were refused, and why: tried again by `--resume`

A line is written before its episode, and lines without an episode are dropped: whenever the process dies, an episode is
in the data set and known, or neither. A source that is itself damaged (`BrokenSource`) stops the conversion there.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import av
import h5py
import numpy as np
import tyro
from tqdm import tqdm

from common import InputError, at_least, read_json, write_json
from data.lerobot import Clip, LeRobotWriter

SIZE = 448  # longer side of a converted picture in pixels: what the full run's encoder sees (our choice)


@dataclass
class ConvertArgs:
    """The arguments that every converter has."""

    source: Annotated[str, tyro.conf.Positional]
    """folder of the data set as it was downloaded and unpacked"""
    out: str
    """folder of the LeRobot data set to write"""
    limit: int = 0
    """stop when the data set has this many episodes; 0: convert all (our choice)"""
    workers: int = os.cpu_count() or 1
    """processes that read, scale and encode; 0: this one alone (our choice: one for each core)"""
    resume: bool = False
    """go on after the last episode that --out holds, from the same source and with the same options"""


class BrokenSource(InputError):
    """A file of many episodes is damaged or incomplete: `load` raises it to stop the conversion, where an InputError
    only leaves out the episode."""


@dataclass
class Episode:
    """What `load` returns: the arguments of `LeRobotWriter.add_episode`, and what was odd about the source."""

    data: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def convert(jobs: dict[str, tuple], load: Callable[..., Episode], writer: LeRobotWriter, args: ConvertArgs) -> None:
    """Converts the episodes that are not yet there and prints what became of all. Refused are episodes for which `load`
    or the writer raises InputError, and files that cannot be read. Raises InputError when none was converted, and where
    a source is broken: what came before it is kept."""
    at_least(args, limit=0, workers=0)
    meta, before, done = writer.root / "meta", writer.num_episodes, sources(writer)
    meta.mkdir(parents=True, exist_ok=True)
    claim(writer, args)
    partial = meta / "sources.jsonl.partial"
    partial.write_text("".join(json.dumps(key) + "\n" for key in done))
    os.replace(partial, meta / "sources.jsonl")
    known, notes, skipped = set(done), Counter(), {}
    todo = {key: job for key, job in jobs.items() if key not in known}
    # All metadata are written again for each file: some 400 files at most, however large the source (our choice).
    writer.episodes_per_file = max(writer.episodes_per_file, len(jobs) // 400)
    bar = tqdm(total=len(done) + len(todo), initial=len(done), desc=writer.root.name, unit="episode", mininterval=1)
    full = lambda: args.limit and writer.num_episodes >= args.limit
    results = _ahead({} if full() else todo, load, args.workers)
    try:
        with bar, writer, (meta / "sources.jsonl").open("a") as lines:
            for key, result in results:
                if isinstance(result, Episode):
                    end = lines.tell()
                    lines.write(json.dumps(key) + "\n")
                    lines.flush()
                    try:
                        writer.add_episode(**result.data)
                        notes.update(result.notes)
                    except InputError as error:
                        lines.seek(end)
                        lines.truncate()
                        result = str(error)
                if isinstance(result, str):
                    skipped[key] = result
                    if len(skipped) <= 10:
                        bar.write(f"left out {key}: {result}")
                bar.update()
                if full():
                    break
    except BrokenSource as error:
        raise InputError(f"{error}; {writer.root} keeps {writer.num_episodes} episodes, --resume goes on") from None
    finally:
        results.close()
        write_json(meta / "skipped.json", skipped)
    some = f"; the first, {next(iter(skipped.items()))}" if skipped else ""
    if not writer.num_episodes:
        raise InputError(f"none of {len(jobs)} episodes of {args.source} could be converted{some}")
    print(
        f"{writer.root}: {writer.num_episodes} episodes ({writer.num_episodes - before} new), "
        f"{writer.episodes[-1]['dataset_to_index']} steps at {writer.fps:g} Hz; left out {len(skipped)}"
        + (f", listed in {meta / 'skipped.json'}" if skipped else "")
        + "".join(f"\n  {n} episodes: {note}" for note, n in notes.most_common())
    )


def claim(writer: LeRobotWriter, args: ConvertArgs) -> None:
    """Notes where a data set comes from and with which options. Raises InputError where it has episodes of another
    source, whose names may be the same, or that other options made."""
    path = writer.root / "meta/conversion.json"
    told = {k: v for k, v in vars(args).items() if k not in ("out", "limit", "workers", "resume")}
    now = json.loads(json.dumps(told | {"source": str(Path(args.source).resolve())}))
    if writer.num_episodes:
        then = read_json(path)
        if then != now:
            then = then if isinstance(then, dict) else {}
            changed = {k: (then.get(k), now.get(k)) for k in then | now if then.get(k) != now.get(k)}
            raise InputError(f"{writer.root} was converted from another source or with other options, (then, now) "
                             f"{changed}: choose another --out, or correct {path} if it only moved")  # fmt: skip
    write_json(path, now)


def sources(writer: LeRobotWriter) -> list[str]:
    """The keys of the episodes that a data set has; lines past them belong to episodes that a kill lost. Raises
    InputError where keys are lacking."""
    path = writer.root / "meta/sources.jsonl"
    lines = path.read_text().splitlines()[: writer.num_episodes] if path.exists() else []
    if len(lines) < writer.num_episodes:
        raise InputError(
            f"{path} names the sources of {len(lines)} of {writer.num_episodes} episodes: choose another --out"
        )
    return [json.loads(line) for line in lines]


def _ahead(jobs: dict[str, tuple], load: Callable[..., Episode], workers: int) -> Iterator[tuple[str, Episode | str]]:
    """(key, episode or the reason why not), in the order of the jobs, while workers are at the next few."""
    if not workers:
        yield from ((key, _attempt(load, job)) for key, job in jobs.items())
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker)
    waiting, todo = deque(), iter(jobs.items())
    try:
        while True:
            while len(waiting) < 2 * workers and (job := next(todo, None)):
                waiting.append((job[0], pool.submit(_attempt, load, job[1])))
            if not waiting:
                return
            key, future = waiting.popleft()
            yield key, future.result()
    except BrokenProcessPool:
        raise InputError(
            f"a worker died at {key} or soon after (out of memory?): fewer --workers, and --resume"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which first saves what it has

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # it was killed: nobody waits for this worker

    threading.Thread(target=follow, daemon=True).start()


def _attempt(load: Callable[..., Episode], job: tuple) -> Episode | str:
    try:
        return load(*job)
    except BrokenSource:
        raise
    except InputError as error:
        return str(error)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, av.error.FFmpegError) as error:  # h5py and PyAV
        return f"cannot be read: {type(error).__name__}: {error}"


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def open_hdf5(path: Path) -> h5py.File:
    """Without a lock, which read-only and network disks refuse."""
    if not path.is_file():
        raise InputError(f"{path.name} is absent")
    return h5py.File(path, "r", locking=False)


def text(attributes: h5py.AttributeManager, key: str) -> str:
    """An attribute as text, without white space around it; "" where it is absent."""
    value = attributes.get(key, "")
    return (value.decode() if isinstance(value, bytes) else str(value)).strip()


def check_inside(file: h5py.Group, name: str) -> None:
    """Raises InputError where a file points to data outside itself, which no recording does."""
    if file[name].file.filename != file.file.filename or file[name].external or file[name].is_virtual:
        raise InputError(f"{name} points to data in another file")


def numbers(file: h5py.Group, name: str, *shape: int | None) -> np.ndarray:
    """A data set of numbers as float64, of the given shape (None: any length). Raises InputError where it is absent, of
    another shape, not finite, outside the file, or larger than any recording: a few bytes can stand for terabytes."""
    node = file.get(name)
    if not isinstance(node, h5py.Dataset) or node.dtype.kind not in "fiu":
        raise InputError(f"no numbers at {name}")
    check_inside(file, name)
    if len(node.shape) != len(shape) or any(w not in (None, n) for w, n in zip(shape, node.shape, strict=True)):
        raise InputError(f"{name} has the shape {node.shape}, expected {tuple('T' if w is None else w for w in shape)}")
    if node.size > 1 << 27:  # 1 GiB as float64 (our choice)
        raise InputError(f"{name} has {node.size} values, more than an episode can")
    values = node[()].astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{name} has NaN or infinite values")
    return values


def fitted(height: int, width: int) -> tuple[int, int]:
    """(height, width) scaled down so that the longer side has SIZE pixels; even numbers, for h264."""
    scale = min(1.0, SIZE / max(height, width))
    return 2 * round(height * scale / 2), 2 * round(width * scale / 2)


def transcode(path: Path, frames: int, size: tuple[int, int], fps: float, drop_last: int = 0) -> Clip:
    """The first `frames` frames of a video, less `drop_last`, scaled to (height, width). Raises InputError where the
    video is absent, shorter, of another shape, or of another rate than the poses that belong to it."""
    if not path.is_file():
        raise InputError(f"{path.name} is absent")
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise InputError(f"{path.name} holds no video")
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # the workers are the parallelism
        rate = float(stream.average_rate or 0)
        if abs(rate - fps) > 0.02 * fps:
            raise InputError(f"{path.name} runs at {rate:.4g} Hz, expected {fps:g}")
        if abs(stream.width / stream.height - size[1] / size[0]) > 0.02:
            raise InputError(
                f"{path.name} has {stream.width} x {stream.height} pixels, another shape than {size[::-1]}"
            )
        seen, small = 0, av.video.reformatter.VideoReformatter()  # one for all: a frame's own would make tables anew

        def scaled() -> Iterator[np.ndarray]:
            nonlocal seen
            for frame in container.decode(stream):
                seen += 1
                if seen <= frames - drop_last:
                    # To RGB by the source's own colour space, and without it: our videos have another.
                    yield small.reformat(frame, *size[::-1], "rgb24", interpolation="AREA", threads=1).to_ndarray()
                if seen == frames:
                    return

        clip = Clip.encode(scaled(), size, fps)
    if seen < frames:
        raise InputError(f"{path.name} is cut short: {seen} of {frames} frames")
    return clip
