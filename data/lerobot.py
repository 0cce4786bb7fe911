"""LeRobot data sets: writer (v3.0) and reader (v2.1 and v3.0).

    <data set>/meta/info.json, stats.json, tasks.parquet, episodes/...     format, columns, statistics, list of episodes
    <data set>/data/chunk-000/file-000.parquet                             numbers, one row a frame
    <data set>/videos/<camera>/chunk-000/file-000.mp4                      pictures, h264

Reader and writer speak of the unified spaces of `common`: columns by name, in metres and radians. What other programs
wrote under other names is read through a mapping (`data/mappings`), see `LeRobotReader`.
"""

import io
import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.spatial.transform import Rotation
from torch import Tensor
from tqdm import tqdm

from common import (
    ACTION_NAMES,
    ARM_ACTION,
    ARM_STATE,
    ARMS,
    SIDES,
    STATE_NAMES,
    InputError,
    Normalizer,
    conform,
    gather,
    prepare_images,
    relative_action,
    scatter,
    write_json,
)
from data import schema
from data.quantiles import ACTION, RATES, STATE, DatasetStatistics, action_key, stride_for

_IMAGE = "observation.images."
_CAMERA = "observation.camera"  # where the camera moves: its pose, 7 numbers, in the frame of action and state
_CHUNK = "chunk-{chunk_index:03d}/file-{file_index:03d}"


class DamagedEpisode(InputError):
    """One episode cannot be read; the others may well be. Training passes over it and counts it (`Windows.draw`)."""


# --------------------------------------------------------------------------------------------------------------------
# Writer
# --------------------------------------------------------------------------------------------------------------------


def _write_parquet(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, partial := path.with_name(path.name + ".partial"))
    os.replace(partial, path)


def _text_table(texts: dict[str, int], index: str) -> pa.Table:
    """LeRobot's tables of texts are pandas frames whose row labels are the texts; this metadata tells pandas so."""
    column = lambda name, field, kind, numpy: {
        "name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy, "metadata": None,
    }  # fmt: skip
    label = "__index_level_0__"
    frame = {
        "index_columns": [label], "column_indexes": [column(None, None, "unicode", "object")],
        "pandas_version": "2.2.0",
        "columns": [column(index, index, "int64", "int64"), column(None, label, "unicode", "object")],
    }  # fmt: skip
    table = pa.table({index: pa.array(texts.values(), pa.int64()), label: pa.array(texts, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(frame)})


def _h264(container: av.container.OutputContainer, size: tuple[int, int], fps: float) -> av.VideoStream:
    """A key frame every 8 frames, so that reading any window costs a seek and a short decode."""
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    # x264's look-ahead is not reproducible when two encoders run in one process: the same frames, other bytes.
    stream.options = {"crf": "20", "preset": "veryfast", "g": "8", "bf": "0"}
    stream.options |= {"x264-params": "mbtree=0:rc-lookahead=0"}
    stream.codec_context.thread_count = 1
    return stream


@dataclass(frozen=True)
class Clip:
    """One camera's frames of an episode, encoded as the writer would: what a converter's worker process hands over.
    Megabytes become kilobytes, and the writer has only to append them."""

    data: bytes
    shape: tuple[int, ...]  # (n, H, W, 3)

    @classmethod
    def encode(cls, frames: Iterable[np.ndarray], size: tuple[int, int], fps: float) -> "Clip":
        """frames: uint8 (H, W, 3), one after another; size: (height, width)."""
        buffer, n, to_yuv = io.BytesIO(), 0, av.video.reformatter.VideoReformatter()
        with av.open(buffer, "w", format="mp4") as container:
            stream = _h264(container, size, fps)
            for image in frames:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame = to_yuv.reformat(frame, format="yuv420p", threads=1)  # by itself it would start some
                container.mux(stream.encode(frame))
                n += 1
            container.mux(stream.encode())
        return cls(buffer.getvalue(), (n, *size, 3))


class _Video:
    """An h264 file that grows clip by clip, under another name until it is closed."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial, self.size, self.fps = path, path.with_name(path.name + ".partial"), size, fps
        self.container = av.open(str(self.partial), "w", format="mp4")
        self.stream, self.frames = None, 0

    def add(self, clip: np.ndarray | Clip) -> None:
        # Encoded here and now, or by a worker: the file comes out the same.
        data = (clip if isinstance(clip, Clip) else Clip.encode(clip, self.size, self.fps)).data
        with av.open(io.BytesIO(data)) as part:
            if self.stream is None:
                self.stream = self.container.add_stream_from_template(part.streams.video[0])
            for packet in part.demux(video=0):
                if packet.size:
                    packet.stream, packet.time_base = self.stream, 1 / Fraction(self.fps).limit_denominator(1001)
                    packet.pts = packet.dts = self.frames
                    packet.duration, self.frames = 1, self.frames + 1
                    self.container.mux(packet)

    def close(self, keep: bool = True) -> None:
        self.container.close()
        os.replace(self.partial, self.path) if keep else self.partial.unlink(missing_ok=True)


class LeRobotWriter:
    """Writes a LeRobot v3.0 data set, episode by episode, as a context manager.

    Every `episodes_per_file` episodes, and at the end, what has come so far is a complete, valid data set on disk: a
    kill loses at most the episodes since then, and `resume=True` goes on after them.

    cameras: name -> (height, width), even numbers; action_names and state_names: columns by their unified names. With
    no action_names the change of the state is the action; with neither it is video alone, without actions.
    moving_camera: episodes carry the primary camera's pose, and readers tell actions and states in its frame.

    meta/stats.json gets the statistics of states, and of actions as they are and composed to lower rates (RATES); of
    actions made from states only `python -m data.stats` knows them."""

    def __init__(
        self, root: Path | str, fps: float = 10, robot_type: str = "fr3", action_names: Sequence[str] = ARM_ACTION,
        state_names: Sequence[str] = ARM_STATE, cameras: dict[str, tuple[int, int]] | None = None,
        resume: bool = False, episodes_per_file: int = 50, moving_camera: bool = False,
    ):  # fmt: skip
        self.root, self.fps, self.robot_type, self.moving_camera = Path(root), fps, robot_type, moving_camera
        self.action_names, self.state_names = tuple(action_names), tuple(state_names)
        scatter(np.zeros(len(self.action_names)), self.action_names, ACTION_NAMES)  # refuses unknown names
        scatter(np.zeros(len(self.state_names)), self.state_names, STATE_NAMES)
        self.cameras, self.episodes_per_file = dict(cameras or {}), episodes_per_file
        if any(h % 2 or w % 2 for h, w in self.cameras.values()):
            raise InputError(f"cameras {self.cameras}: height and width must be even (h264 halves the colours)")
        self.tasks: dict[str, int] = {}
        self.subtasks: dict[str, int] = {}
        self.episodes: list[dict] = []
        self.statistics = DatasetStatistics(self.action_names, self.state_names, [stride_for(fps, hz) for hz in RATES])
        self.pending: list[tuple] = []
        self.videos: dict[str, _Video] = {}
        self.file = 0
        if (self.root / "meta/info.json").exists():
            if not resume:
                raise InputError(f"{self.root} holds a data set: add --resume to extend it, or choose another --out")
            self._continue()
        elif self.root.exists() and (there := sorted(p.name for p in self.root.iterdir())):
            # What a recorder leaves that died before its first flush is taken over, and nothing else.
            if not resume or not set(there) <= {"meta", "data", "videos"}:
                raise InputError(f"{self.root} is not empty ({', '.join(there[:4])}) and holds no data set: choose "
                                 f"another --out, or --resume if a recorder died in it")  # fmt: skip

    @property
    def num_episodes(self) -> int:
        return len(self.episodes) + len(self.pending)

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, kind, value, trace) -> None:
        if self.pending:
            self.flush()
        while self.videos:  # frames of an episode that was interrupted, and of no other
            self.videos.popitem()[1].close(keep=False)

    def _continue(self) -> None:
        old = LeRobotReader(self.root)
        here = (self.action_names, self.state_names, self.cameras, float(self.fps), self.moving_camera, "v3.0")
        names = tuple(tuple(old.mapping.get(kind) or ()) for kind in ("action", "state"))
        features = old.info["features"]
        sizes = {name: tuple(features[key].get("shape", ())[:2]) for name, key in old.mapping["images"].items()}
        there = (*names, sizes, float(old.fps), _CAMERA in features, old.info["codebase_version"])
        if here != there:
            raise InputError(f"{self.root} holds columns, cameras, fps, moving camera and format {there}, not {here}: "
                             f"choose another --out")  # fmt: skip
        self.tasks, self.subtasks = ({t: i for i, t in texts.items()} for texts in (old.tasks, old.subtasks))
        self.episodes = old.episodes
        self.file = self.episodes[-1]["data/chunk_index"] * 1000 + self.episodes[-1]["data/file_index"] + 1
        for i in tqdm(range(old.num_episodes), "statistics so far", unit="episode", mininterval=1, leave=False):
            self.statistics.add(old.episode(i))
        if old.info.get("total_episodes") != len(self.episodes):
            self._write_meta()  # the kill fell between the list of episodes and the rest of the metadata

    def add_episode(
        self, frames: dict[str, np.ndarray | Clip], action: np.ndarray, state: np.ndarray, task: str,
        subtasks: Sequence[str] | None = None, camera: np.ndarray | None = None, task_name: str = "",
    ) -> None:  # fmt: skip
        """One episode of n steps: frames[camera] uint8 (n, H, W, 3) or a `Clip` of them, action (n, A), state (n, S),
        the instruction, optionally the text of the present phase at each step, with `moving_camera` the camera's pose
        (n, 7), and what its task is called where that has several instructions. Raises InputError where shapes or
        values do not fit."""
        n, action, state = len(action), np.asarray(action, np.float32), np.asarray(state, np.float32)
        want = (n, len(self.action_names)), (n, len(self.state_names))
        if n < 2 or (action.shape, state.shape) != want:
            raise InputError(f"episode with action {action.shape} and state {state.shape}: need {want}, n >= 2")
        if not (np.isfinite(action).all() and np.isfinite(state).all()):
            raise InputError("episode with NaN or infinite actions or states")
        if not task.strip():
            raise InputError("episode without an instruction")
        if subtasks is not None and len(subtasks) != n:
            raise InputError(f"{len(subtasks)} subtask texts for {n} steps")
        pose = None if camera is None else np.asarray(camera, np.float32)
        if (camera is None) == self.moving_camera or camera is not None and np.shape(camera) != (n, 7):
            raise InputError(f"camera poses {np.shape(camera)} for {n} steps, moving_camera={self.moving_camera}")
        for name, size in self.cameras.items():
            clip = frames.get(name, np.empty(0))
            if getattr(clip, "dtype", np.uint8) != np.uint8 or clip.shape != (n, *size, 3):
                raise InputError(f"camera {name}: frames {clip.shape}, expected uint8 {(n, *size, 3)}")
        spaces = (action, self.action_names, ACTION_NAMES), (state, self.state_names, STATE_NAMES)
        action, state = (gather(conform(scatter(*s), *s[1:], "episode whose {}"), *s[1:]) for s in spaces)
        for name, size in self.cameras.items():
            if name not in self.videos:
                self.videos[name] = _Video(self._file(f"videos/{_IMAGE}{name}", "mp4"), size, self.fps)
            self.videos[name].add(frames[name])
        texts = list(subtasks) if subtasks is not None else [task] * n
        self.pending.append((action, state, task, texts, pose, task_name or task))
        if len(self.pending) >= self.episodes_per_file:
            self.flush()

    def _file(self, folder: str, suffix: str) -> Path:
        part = _CHUNK.format(chunk_index=self.file // 1000, file_index=self.file % 1000)
        return self.root / f"{folder}/{part}.{suffix}"

    def flush(self) -> None:
        """Writes the pending episodes as one new data file, one video per camera, and then the metadata."""
        file = {"chunk_index": self.file // 1000, "file_index": self.file % 1000}
        first = start = self.episodes[-1]["dataset_to_index"] if self.episodes else 0
        whole: dict[str, list] = {"frame_index": [], "episode_index": [], "task_index": [], "subtask_index": []}
        for action, state, task, subtasks, camera, task_name in self.pending:
            n, e = len(action), len(self.episodes)
            whole["frame_index"] += range(n)
            whole["episode_index"] += [e] * n
            whole["task_index"] += [self.tasks.setdefault(task, len(self.tasks))] * n
            whole["subtask_index"] += [self.subtasks.setdefault(s, len(self.subtasks)) for s in subtasks]
            row = {"episode_index": e, "tasks": [task], "task_name": task_name, "length": n}
            row |= {"dataset_from_index": start, "dataset_to_index": start + n}
            row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
            row |= {f"data/{k}": v for k, v in file.items()}
            clock = {"from_timestamp": (start - first) / self.fps, "to_timestamp": (start - first + n) / self.fps}
            for name in self.cameras:
                row |= {f"videos/{_IMAGE}{name}/{k}": v for k, v in (file | clock).items()}
            start += n
            self.episodes.append(row)
            unified = {"action": scatter(action, self.action_names, ACTION_NAMES), "steps": n}
            unified |= {"state": scatter(state, self.state_names, STATE_NAMES)}
            self.statistics.add(unified | {"state_mask": np.isin(STATE_NAMES, self.state_names), "camera": camera})
        while self.videos:
            self.videos.popitem()[1].close()
        lists = {}
        for k, (key, names) in enumerate(((ACTION, self.action_names), (STATE, self.state_names))):
            if names:
                values = np.concatenate([p[k] for p in self.pending])
                lists[key] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), len(names))
        if self.moving_camera:
            poses = np.concatenate([p[4] for p in self.pending])
            lists[_CAMERA] = pa.FixedSizeListArray.from_arrays(pa.array(poses.ravel()), 7)
        seconds = np.array(whole["frame_index"]) / self.fps
        whole["index"] = range(first, start)
        integers = {k: pa.array(v, pa.int64()) for k, v in whole.items()}
        table = pa.table({**lists, "timestamp": pa.array(seconds, pa.float32()), **integers})
        _write_parquet(self._file("data", "parquet"), table)
        self.pending, self.file = [], self.file + 1
        self._write_meta()

    def _write_meta(self) -> None:
        meta = self.root / "meta"
        _write_parquet(meta / "tasks.parquet", _text_table(self.tasks, "task_index"))
        _write_parquet(meta / "subtasks.parquet", _text_table(self.subtasks, "subtask_index"))
        _write_parquet(meta / "episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(self.episodes))
        write_json(meta / "stats.json", self.statistics.result())
        features: dict[str, dict] = {
            key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
            for key, names in ((ACTION, self.action_names), (STATE, self.state_names))
            if names
        }
        if self.moving_camera:
            features[_CAMERA] = {"dtype": "float32", "shape": [7], "names": ["x", "y", "z", "qx", "qy", "qz", "qw"]}
        for key in ("timestamp", "frame_index", "episode_index", "index", "task_index", "subtask_index"):
            features[key] = {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
        for name, (h, w) in self.cameras.items():
            info = {"video.height": h, "video.width": w, "video.channels": 3, "video.fps": self.fps, "has_audio": False}
            info |= {"video.codec": "h264", "video.pix_fmt": "yuv420p", "video.is_depth_map": False}
            names = ["height", "width", "channels"]
            features[_IMAGE + name] = {"dtype": "video", "shape": [h, w, 3], "names": names, "info": info}
        write_json(meta / "info.json", {  # last: a data set exists from here on
            "codebase_version": "v3.0", "robot_type": self.robot_type, "fps": self.fps,
            "total_episodes": len(self.episodes), "total_frames": self.episodes[-1]["dataset_to_index"],
            "total_tasks": len(self.tasks), "chunks_size": 1000, "splits": {"train": f"0:{len(self.episodes)}"},
            "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
            "data_path": f"data/{_CHUNK}.parquet", "video_path": f"videos/{{video_key}}/{_CHUNK}.mp4",
            "action_free": not (self.action_names or self.state_names), "features": features,
        })  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Reader
# --------------------------------------------------------------------------------------------------------------------


def _rotations(columns: dict[str, np.ndarray], all_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns (n,) by name, with rotations told as `all_names` tells them: a mapping may also name Euler angles (state:
    roll, pitch, yaw, extrinsic xyz) and rotation vectors (rx, ry, rz), where a side has all three."""
    columns, euler = dict(columns), partial(Rotation.from_euler, "xyz")
    own = ("qx", "qy", "qz", "qw") if all_names is STATE_NAMES else ("roll", "pitch", "yaw")
    for side in SIDES:
        for told, read in ((("roll", "pitch", "yaw"), euler), (("rx", "ry", "rz"), Rotation.from_rotvec)):
            names = [f"{side}_{n}" for n in told]
            if names[0] not in all_names and all(n in columns for n in names):
                turn = read(np.stack([columns.pop(n) for n in names], 1))
                values = turn.as_quat() if all_names is STATE_NAMES else turn.as_euler("xyz")
                columns |= {f"{side}_{n}": v for n, v in zip(own, values.T, strict=True)}
    return columns


def _other_format(root: Path) -> str:
    """What to type where a folder holds no LeRobot data set."""
    first = lambda *patterns: next((path.parent for p in patterns for path in root.glob(p)), None)
    if rlds := first("features.json", "*/features.json", "*.tfrecord*"):
        return f"this is RLDS, convert it with `python -m data.rlds {rlds} --out runs/data/{root.resolve().name}`"
    if first("task_info", "*.hdf5", "*/*.hdf5", "*/*/*.hdf5"):
        return "convert it with `python -m` data.libero, data.egodex or data.agibot, whichever made it"
    return f"record one with `python franka.py --record 100 --task all --out {root}`, or give another --data"


class LeRobotReader:
    """Reads a LeRobot data set, v3.0 or v2.1, into the unified spaces.

    A data set whose columns carry our names needs nothing else. One made by others is described by a mapping, a JSON
    file (see `data/mappings/`), given as `PATH@MAPPING`: where `images`, `state` and `action` (relative) or `target`
    (absolute commanded pose, by the state's names) are found, each as {"column", "index", and optionally "scale" and
    "offset"}, and the `stats` that `python -m data.stats` puts there. A mapping with neither action nor target gives
    the change of the state's pose from t to t+1 as the action; one with "state": {} and "action": {} says that there is
    only video, whose windows have every action masked. Rotations may also be Euler angles or rotation vectors, named
    right_roll, right_pitch, right_yaw or right_rx, right_ry, right_rz (state, target; the latter also action).

    Raises InputError for a missing path, column, camera or statistics, and DamagedEpisode for an episode whose video is
    absent, broken, cut short or of another resolution than info.json says, or whose numbers are incomplete or NaN."""

    def __init__(self, source: Path | str):
        path, _, mapping = str(source).partition("@")
        self.source, self.root = str(source), Path(path)
        if not (self.root / "meta/info.json").exists():
            raise InputError(f"no LeRobot data set at {self.root} (no meta/info.json): {_other_format(self.root)}")
        self.info = self._json(self.root / "meta/info.json", {})
        version = self.info.get("codebase_version", "?")
        if version not in ("v2.0", "v2.1", "v3.0"):
            raise InputError(f"{self.root}: LeRobot format {version} is not supported (v2.1 and v3.0 are)")
        schema.check(self.info, schema.info(version), f"{self.root}/meta/info.json")
        self.v3, self.fps = version == "v3.0", float(self.info["fps"])
        self.mapping, self.mapping_path = self._load_mapping(mapping)
        self._check_columns()
        self._load_meta()
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()
        self._videos: OrderedDict[str, av.container.InputContainer] = OrderedDict()
        self._pid = os.getpid()
        self._cache: dict[tuple[int, str, int], Tensor] = {}

    # -- metadata -------------------------------------------------------------------------------------------------

    def _json(self, path: Path, wanted: Any, lines: bool = False) -> Any:
        """The content of a JSON file, or of one with a value in each line, by its schema."""
        try:
            text = path.read_text()
            value = [json.loads(row) for row in text.splitlines() if row.strip()] if lines else json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"cannot read {path} of {self.source}: {error}; copy the file again") from None
        schema.check(value, wanted, str(path))
        return value

    def _load_mapping(self, name: str) -> tuple[dict, Path | None]:
        features = self.info["features"]
        if name:
            folder = Path(__file__).parent / "mappings"
            path = next((p for p in (Path(name), folder / f"{name}.json") if p.is_file()), None)
            if path is None:
                known = sorted(p.stem for p in folder.glob("*.json"))
                raise InputError(f"no mapping {name!r}: give a JSON file or one of {known} after {self.root}@")
            return self._json(path, schema.MAPPING), path
        named: dict[str, Any] = {"images": {k.removeprefix(_IMAGE): k for k in features if k.startswith(_IMAGE)}}
        for key, kind in ((STATE, "state"), (ACTION, "action")):
            feature, where = features.get(key, {}), f"{self.root}/meta/info.json: {key}"
            names = feature.get("names") or []
            names = names.get("motors", list(names)) if isinstance(names, dict) else names
            schema.check(names, [schema.TEXT], f"{where}.names")
            schema.check_unique(names, "names", where)
            width = math.prod(feature["shape"]) if "shape" in feature else "?"
            if names and len(names) != width:
                raise InputError(f"{where} has {len(names)} names for {width} columns: correct names or shape")
            named[kind] = {n: {"column": key, "index": i} for i, n in enumerate(names)}
        schema.check(named, schema.MAPPING, f"{self.root}/meta/info.json")
        return named, None

    def _check_columns(self) -> None:
        m, features = self.mapping, self.info["features"]
        hint = "columns must carry the unified names, or a mapping must name them: --data PATH@MAPPING (data/mappings)"
        if self.mapping_path:
            hint = f"{self.mapping_path} must name some of the columns {sorted(features)}"
        video_only = self.info.get("action_free") or (self.mapping_path and m.get("state") == m.get("action") == {})
        if not (m.get("state") or m.get("action") or video_only):
            raise InputError(f"{self.source}: neither `{STATE}` nor `{ACTION}` with names in meta/info.json; {hint}")
        own = {}
        for kind, names in (("state", STATE_NAMES), ("action", ACTION_NAMES), ("target", STATE_NAMES)):
            own[kind] = tuple(_rotations({n: np.zeros(1) for n in m.get(kind) or {}}, names))
            unknown = [n for n in own[kind] if n not in names]
            absent = sorted({c["column"] for c in (m.get(kind) or {}).values()} - set(features))
            if unknown or absent:
                raise InputError(f"{self.source}: {kind} has unknown names {unknown}, absent columns {absent}; {hint}")
        absent = [k for k in m.get("images", {}).values() if k not in features]
        if absent or not m.get("images"):
            raise InputError(f"{self.source}: no camera columns {absent or [_IMAGE + '*']} in meta/info.json; {hint}")
        self.cameras, self.state_names = tuple(m["images"]), own["state"]
        self.action_names = own["action"] or tuple(self._names_from_poses(own["target"]))

    def _names_from_poses(self, target: Sequence[str]) -> list[str]:
        """Where actions are made from poses: translations and fingertips that both ends know, rotations whose whole
        quaternion they know, and the gripper, which is absolute, where the later end knows it."""
        later = set(target or self.state_names)
        both = later & set(self.state_names)
        turns = {s for s in SIDES if all(f"{s}_q{c}" in both for c in "xyzw")}
        known = lambda n: n.split("_")[0] in turns if n.endswith(("roll", "pitch", "yaw")) else n in both
        return [n for n in ACTION_NAMES if (n in later if n.endswith("gripper") else known(n))]

    def _load_meta(self) -> None:
        meta, cameras = self.root / "meta", self.mapping["images"].values()
        listed = schema.episodes(self.info["codebase_version"], cameras)
        if self.v3:
            files = sorted((meta / "episodes").rglob("*.parquet"))
            if not files or not (meta / "tasks.parquet").exists():
                raise InputError(f"{self.source}: meta/episodes or meta/tasks.parquet is absent: copy it again")
            rows, where = [row for f in files for row in self._parquet(f).to_pylist()], meta / "episodes"
            schema.check(rows, listed, str(where))
            self.tasks, self.subtasks = (self._texts(meta / f"{kind}s.parquet", kind) for kind in ("task", "subtask"))
        else:
            rows, where = self._json(meta / "episodes.jsonl", listed, lines=True), meta / "episodes.jsonl"
            self.tasks, self.subtasks = self._texts(meta / "tasks.jsonl", "task"), {}
        schema.check_unique((row["episode_index"] for row in rows), "episode", str(where))
        self.episodes = sorted(rows, key=lambda r: r["episode_index"])
        self.num_episodes = len(self.episodes)
        if not self.num_episodes:
            raise InputError(f"{self.source} holds no episodes")
        self.lengths = np.array([r["length"] for r in self.episodes])
        # What episodes are demonstrations of: the task's name, or where it has none the instruction.
        self.task_names = [r.get("task_name") or (r.get("tasks") or [""])[0] for r in self.episodes]
        # A mapped data set's own statistics describe its own columns, so only the mapping's will do.
        path = meta / "stats.json"
        own = self._json(path, schema.STATS) if path.exists() and not self.mapping_path else {}
        self.stats = self.mapping.get("stats", {}) if self.mapping_path else own

    def _parquet(self, path: Path) -> pa.Table:
        try:
            return pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"cannot read {path} of {self.source}: {error}; copy the file again") from None

    def _texts(self, path: Path, kind: str) -> dict[int, str]:
        """The texts of tasks or subtasks by their numbers."""
        wanted, index = schema.texts(kind), f"{kind}_index"
        if self.v3 and not path.exists():
            return {}
        if self.v3:  # the text stands in pandas' column of row labels, under whatever name
            table = self._parquet(path)
            label = next((c for c in (kind, *table.column_names) if c in table.column_names and c != index), kind)
            rows = [row | {kind: row[label]} if label in row else row for row in table.to_pylist()]
            schema.check(rows, wanted, str(path))
        else:
            rows = self._json(path, wanted, lines=True)
        schema.check_unique((row[index] for row in rows), index, str(path))
        return {row[index]: row[kind] for row in rows}

    def normalizers(self, stride: int = 1) -> tuple[Normalizer, Normalizer]:
        """The action's and the state's normaliser. Composed actions (stride > 1) have statistics of their own.

        Raises InputError, naming the command that computes them, when the statistics are missing."""
        none = {"q01": [], "q99": []}  # of video without actions
        action = self.stats.get(action_key(stride)) if self.action_names else none
        state = self.stats.get(STATE) if self.state_names else none
        hint = self.source if stride == 1 else f"{self.source} --stride {stride}"
        return (
            Normalizer.from_stats(action, self.action_names, ACTION_NAMES, hint),
            Normalizer.from_stats(state, self.state_names, STATE_NAMES, self.source),
        )

    # -- numbers --------------------------------------------------------------------------------------------------

    def _table(self, i: int) -> pa.Table:
        row = self.episodes[i]
        path = self._path("data_path", **self._place(row, "data"))
        if str(path) not in self._tables:
            wanted = {c["column"] for k in ("state", "action", "target") for c in (self.mapping.get(k) or {}).values()}
            try:
                names = pq.read_schema(path).names
                wanted |= {"episode_index", "task_index"}
                wanted |= {_CAMERA} & set(self.info["features"])
                lacking = sorted(wanted - set(names))
                if lacking:
                    raise InputError(f"{path} lacks the columns {lacking}: convert the data set again")
                wanted |= {"subtask_index", "timestamp"} & set(names)
                self._tables[str(path)] = pq.read_table(path, columns=sorted(wanted))
            except (OSError, pa.ArrowException) as error:
                raise DamagedEpisode(f"cannot read {path} of {self.source}: {error}; copy the file again") from None
            while len(self._tables) > 16:
                self._tables.popitem(last=False)
        self._tables.move_to_end(str(path))
        table = self._tables[str(path)]
        index = table["episode_index"]
        rows = np.flatnonzero(index.to_numpy() == row["episode_index"]) if not pa.types.is_nested(index.type) else []
        if len(rows) != row["length"]:
            raise DamagedEpisode(
                f"{path} holds {len(rows)} of the {row['length']} steps of episode {row['episode_index']} of "
                f"{self.source}: copy the data set again"
            )
        return table.take(rows)

    def _place(self, row: dict, key: str) -> dict[str, int]:
        """What fills in the path of an episode's data or video."""
        if self.v3:
            return {k: row[f"{key}/{k}"] for k in ("chunk_index", "file_index")}
        e = row["episode_index"]
        return {"episode_chunk": e // self.info.get("chunks_size", 1000), "episode_index": e}

    def _array(self, table: pa.Table, name: str, i: int) -> np.ndarray:
        """A column of numbers or of lists of numbers as float64 (n, width); a null becomes NaN."""
        array = table[name].combine_chunks()
        try:
            if array.null_count and hasattr(array.type, "value_type"):
                raise ValueError("a row is missing")
            flat = array.flatten() if hasattr(array.type, "value_type") else array
            return flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(table), -1)
        except (ValueError, TypeError, pa.ArrowException):
            why = "has rows that are no numbers, or of unequal length"
            raise DamagedEpisode(f"{self.source}: {name} in episode {i} {why}: leave it out") from None

    def _check_clock(self, table: pa.Table, i: int) -> None:
        """Raises DamagedEpisode where the table's timestamps tell another rate than meta/info.json. Real clocks jitter
        (then the mean step is right) and pause (then the median is): both must be off by 5 % (our choice). One that
        stands still says nothing."""
        if "timestamp" in table.column_names and pa.types.is_floating(table["timestamp"].type) and len(table) > 1:
            steps = np.diff(self._array(table, "timestamp", i)[:, 0])
            step = np.median(steps)
            if step > 0 and all(abs(s * self.fps - 1) > 0.05 for s in (step, steps.mean())):
                raise DamagedEpisode(f"{self.source}: the timestamps of episode {i} run at {1 / step:.4g} Hz, fps in "
                                     f"meta/info.json is {self.fps:g}: correct it")  # fmt: skip

    def _columns(self, i: int, table: pa.Table, kind: str, all_names: Sequence[str]) -> np.ndarray:
        """Mapped columns of episode i, values[:, index] * scale + offset, in unified places (n, len(all_names))."""
        mapping = self.mapping.get(kind) or {}
        arrays = {}
        for name in sorted({c["column"] for c in mapping.values()}):
            arrays[name] = self._array(table, name, i)
            shape = self.info["features"][name].get("shape")
            if shape and math.prod(shape) != arrays[name].shape[1]:
                raise InputError(f"{self.source}: {name} has {arrays[name].shape[1]} dimensions, meta/info.json says "
                                 f"{shape}: copy or convert the data set again")  # fmt: skip
        short = sorted({c["column"] for c in mapping.values() if c["index"] >= arrays[c["column"]].shape[1]})
        if short:
            raise InputError(f"{self.source}: columns {short} have fewer dimensions than names")
        read = lambda c: arrays[c["column"]][:, c["index"]] * c.get("scale", 1.0) + c.get("offset", 0.0)
        values = _rotations({name: read(c) for name, c in mapping.items()}, all_names)
        flat = np.stack(list(values.values()), 1) if values else np.zeros((len(table), 0))
        out = scatter(flat, tuple(values), all_names)
        if not np.isfinite(out).all():
            raise DamagedEpisode(f"{self.source}: NaN or infinite {kind} in episode {i}: leave it out")
        return conform(out, tuple(values), all_names, f"{self.source}: {{}} ({kind})")

    def episode(self, i: int) -> dict[str, Any]:
        """Episode i: action (n, 44), action_mask (44,), state (n, 46), state_mask (46,) in physical units, steps (how
        many of the n have an action), task (str) and subtask (n texts; the instruction where the data set has none),
        and camera (n, 7), its pose in the frame of action and state where it moves, else None: see `seen_from`."""
        table = self._table(i)
        self._check_clock(table, i)
        n = steps = len(table)
        state = self._columns(i, table, "state", STATE_NAMES)
        if self.mapping.get("action"):
            action = self._columns(i, table, "action", ACTION_NAMES)
        elif self.mapping.get("target"):
            action = self._change(state, self._columns(i, table, "target", STATE_NAMES))
        else:
            action, steps = self._change(state, np.concatenate([state[1:], state[-1:]])), n - 1
        task = self._text("task", table["task_index"][0].as_py(), i)
        subtask = [task] * n
        if self.subtasks and "subtask_index" in table.column_names:
            subtask = [self._text("subtask", k, i) for k in table["subtask_index"].to_pylist()]
        return {
            "action": action.astype(np.float32), "action_mask": np.isin(ACTION_NAMES, self.action_names),
            "state": state.astype(np.float32), "state_mask": np.isin(STATE_NAMES, self.state_names),
            "steps": steps, "task": task, "subtask": subtask,
            "camera": self._poses(table, i) if _CAMERA in table.column_names else None,
        }  # fmt: skip

    def _text(self, kind: str, number: Any, i: int) -> str:
        texts = self.tasks if kind == "task" else self.subtasks
        if not isinstance(number, int) or number not in texts:
            raise DamagedEpisode(f"{self.source}: episode {i} has the {kind} {number} of {len(texts)}: leave it out")
        return texts[number]

    def _poses(self, table: pa.Table, i: int) -> np.ndarray:
        """The moving camera's poses (n, 7)."""
        poses = self._array(table, _CAMERA, i)
        turns = np.abs(np.linalg.norm(poses[:, 3:], axis=1) - 1) < 0.05
        if poses.shape[1] != 7 or not (np.isfinite(poses).all() and turns.all()):
            raise DamagedEpisode(f"{self.source}: {_CAMERA} in episode {i} is no list of poses: leave it out")
        return poses

    def _change(self, state: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The unified actions (n, 44) that lead from states to target states, both (n, 46)."""
        action = np.zeros((len(state), len(ACTION_NAMES)))
        for side, a, s in ARMS:
            action[:, a : a + 3] = target[:, s : s + 3] - state[:, s : s + 3]
            if f"{side}_roll" in self.action_names:
                goal = target[:, s : s + 3], target[:, s + 3 : s + 7]
                action[:, a : a + 6] = relative_action(state[:, s : s + 3], state[:, s + 3 : s + 7], *goal)
            action[:, a + 6] = target[:, s + 7]
        action[:, 14:] = target[:, 16:] - state[:, 16:]
        return np.where(np.isin(ACTION_NAMES, self.action_names), action, 0.0)

    # -- pictures -------------------------------------------------------------------------------------------------

    def video_path(self, i: int, camera: str) -> tuple[Path, float]:
        """The file that holds episode i as seen by a camera, and the time in it at which the episode starts."""
        if camera not in self.mapping["images"]:
            raise InputError(f"{self.source} has no camera {camera!r}, it has {list(self.cameras)}: choose one of them")
        key, row = self.mapping["images"][camera], self.episodes[i]
        place = self._place(row, f"videos/{key}")
        start = row[f"videos/{key}/from_timestamp"] if self.v3 else 0.0
        return self._path("video_path", video_key=key, **place), start

    def _path(self, template: str, **place: Any) -> Path:
        """A file of the data set, as a template of info.json names it."""
        return self.root / self.info[template].format(**place)

    def frames(self, i: int, camera: str, indices: Sequence[int]) -> np.ndarray:
        """Frames of episode i, in the order asked for: uint8 (len(indices), H, W, 3)."""
        assert len(indices) and 0 <= min(indices) and max(indices) < self.lengths[i], (i, indices)
        path, start = self.video_path(i, camera)
        numbers = [round(start * self.fps + k) for k in indices]  # frame numbers in the file
        missing, found = set(numbers), {}
        feature = self.info["features"][self.mapping["images"][camera]]
        listed = dict(zip(map(str, feature.get("names") or ()), feature.get("shape") or (), strict=False))
        to_rgb = av.video.reformatter.VideoReformatter()  # one for all: a frame's own would make its tables anew
        try:
            container = self._open(path)
            stream = container.streams.video[0]
            base = float(stream.time_base)
            rate, n = float(stream.average_rate or self.fps), int(self.lengths[i])
            # Pictures are found by the rate: they may drift from their steps by one in an episode, or by 0.2 %, as much
            # as 29.97 told as 30 (our choice).
            if abs(rate - self.fps) > self.fps * np.clip(1 / n, 0.002, 0.02):
                raise DamagedEpisode(f"video {path} runs at {rate:.4g} Hz (episode {i} of {self.source}), fps in "
                                     f"meta/info.json is {self.fps:g}: correct it, or convert it again")  # fmt: skip
            # A quarter frame past the wanted one, against rounding; from the start where a file's index misleads.
            for second in ((min(numbers) + 0.25) / self.fps, 0.0):
                container.seek(int(second / base), stream=stream, backward=True)
                for frame in container.decode(stream):
                    # A decoder makes something up where a picture is broken, and hands it on to those that follow.
                    if frame.is_corrupt or frame.pts is None:
                        raise OSError("a picture is broken")
                    number = round(frame.pts * base * self.fps)
                    h, w = frame.height, frame.width
                    if (h, w) != (listed.get("height", h), listed.get("width", w)):
                        raise DamagedEpisode(
                            f"video {path} has {h} x {w} pixels (episode {i} of {self.source}), meta/info.json says "
                            f"{listed['height']} x {listed['width']}: convert it again"
                        )
                    if number in missing:
                        found[number] = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
                        missing.discard(number)
                    if not missing or number > max(missing):
                        break
                if not missing:
                    return np.stack([found[k] for k in numbers])
        except (av.error.FFmpegError, OSError, IndexError) as error:
            if str(path) in self._videos:
                self._videos.pop(str(path)).close()  # whatever state it is in, the next episode starts from a new one
            raise DamagedEpisode(
                f"cannot read video {path} (episode {i} of {self.source}): {error}; copy the file again"
            ) from None
        raise DamagedEpisode(
            f"video {path} is cut short: it lacks frames of episode {i} of {self.source}; copy the file again"
        )

    def pictures(self, i: int, camera: str, indices: Sequence[int], size: int) -> Tensor:
        """The same frames, prepared: uint8 (len(indices), 3, size, size)."""
        if (i, camera, size) in self._cache:
            return self._cache[i, camera, size][list(indices)]
        return prepare_images(self.frames(i, camera, indices), size)

    def _open(self, path: Path) -> av.container.InputContainer:
        if self._pid != os.getpid():  # forked: a worker must not share its parent's file positions
            self._videos, self._pid = OrderedDict(), os.getpid()
        key = str(path)
        if key not in self._videos:
            if not path.is_file():
                raise DamagedEpisode(
                    f"video {path} is absent, listed by {self.source}: copy it, or choose another camera"
                )
            self._videos[key] = av.open(key, metadata_errors="ignore")
            context = self._videos[key].streams.video[0].codec_context
            if context is None:
                raise OSError("its codec is unknown")
            context.thread_type, context.thread_count = "NONE", 1  # the DataLoader's workers are the parallelism
            while len(self._videos) > 8:
                self._videos.popitem(last=False)[1].close()
        self._videos.move_to_end(key)
        return self._videos[key]

    def close(self) -> None:
        """Closes the open videos."""
        while self._videos:
            self._videos.popitem()[1].close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_videos": OrderedDict(), "_tables": OrderedDict()}  # for workers that are not forked

    def preload(self, camera: str, size: int, episodes: Sequence[int]) -> None:
        """Decodes all frames of `episodes` once into memory, scaled to `size`: for data sets that fit. A damaged one is
        left to whoever asks for its frames."""
        for i in tqdm(episodes, desc=f"decoding {self.root.name}", unit="episode", mininterval=1, leave=False):
            try:
                self._cache[i, camera, size] = self.pictures(i, camera, range(int(self.lengths[i])), size)
            except DamagedEpisode:
                pass
