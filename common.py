"""What must never differ between LatBot's stages.

Process setup, the command line, the paper's unified action and state spaces (Sec. 6.1), the quantile normaliser
(Sec. 6.3), image preprocessing, prompt templates (Sec. 6.2), the LeRobot reader and writer, the training stream,
construction of the vision-language models, checkpoints, the learning-rate schedule and the metrics log.

Admission test for this file: would a bug in it otherwise have to be fixed twice? There is no loss, no stage's block,
no training loop and no environment here.

Conventions, once and for all:
- Translation in metres, rotation in radians, in the robot's base frame. Gripper: 1 = open, 0 = closed.
- `action[t]` is the target commanded at t relative to the pose measured at t: dp = p_target - p, and the extrinsic xyz
  Euler angles of dR = R_target R^T (a rotation of its own, never a difference of Euler angles).
- Quaternions are xyzw with w >= 0.
- Every random draw is a function of (seed, sample number) and of nothing else: not of the rank, the number of workers,
  or how often the run was interrupted. This is what makes resuming bit-exact.
"""

import dataclasses
import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------------------------
# Command line and errors
# --------------------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Something the user can put right: the message says what, with which values, and what to type next."""


def parse_args(args_type: type, presets: dict[str, Any], description: str, argv: Sequence[str] | None = None):
    """Parses a stage's command line: `--tiny` or `--small` picks the defaults, every other flag overrides them,
    in either order. `--help` lists what each preset changes; `--tiny --help` shows the preset's own defaults."""
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = [a for a in argv if a.startswith("--") and a[2:] in presets]
    if len(set(chosen)) > 1:
        raise InputError(f"choose one preset, not {' and '.join(chosen)}")
    base = args_type()
    lines = [description.strip(), "", "Presets (first or anywhere on the command line; other flags win over them):"]
    for name, preset in presets.items():
        values = [(f.name, getattr(preset, f.name), getattr(base, f.name)) for f in dataclasses.fields(args_type)]
        lines.append(f"  --{name}: " + ", ".join(f"{k}={v}" for k, v, paper in values if v != paper))
    default = presets[chosen[0][2:]] if chosen else base
    rest = [a for a in argv if a not in chosen]
    return tyro.cli(args_type, default=default, args=rest, description="\n".join(lines))


def at_least(args: Any, **least: float) -> None:
    """Raises InputError for a numeric argument, or one of several, that is below its bound or NaN."""
    for name, low in least.items():
        value = getattr(args, name)
        for v in value if isinstance(value, tuple) else (value,):
            if v is not None and not v >= low:
                raise InputError(f"--{name.replace('_', '-')} {v}: must be at least {low:g}")


def check_training(args: Any) -> None:
    """Raises InputError for a value that no learning stage can work with."""
    at_least(args, steps=1, batch=1, accumulate=1, save_every=1, log_every=1, val_samples=1)
    at_least(args, workers=0, warmup=0, seed=0, val_every=0, lr=0, min_lr=0, weight_decay=0, betas=0)
    if not all(b < 1 for b in args.betas) or not 0 < args.clip < math.inf:
        raise InputError(f"--betas {args.betas} must be below 1, and --clip {args.clip} positive")


def run_main(main: Callable[[], None], resumes: bool = True) -> None:
    """Runs a script's main(): user errors become one line and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        # A DataLoader worker's error arrives wrapped in its traceback: the message is the last line.
        text = str(error)
        if "Original Traceback" in text:
            text = text.strip().splitlines()[-1].split("InputError: ", 1)[-1]
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        more = " with --resume to continue" if resumes else " again"
        print(f"interrupted; run the same command{more}", file=sys.stderr)
        sys.exit(130)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        print(f"error: {error.filename}: {error.strerror}; choose another --out", file=sys.stderr)
        sys.exit(2)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate, 95 % by default. Returns (low, high) in [0, 1]."""
    if trials == 0:
        return 0.0, 1.0
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


# --------------------------------------------------------------------------------------------------------------------
# Processes: the same code on one CPU and under torchrun
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Process:
    """This process among all: `rank` of `world`, its `device`, and the dtype of matrix products."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks (a collective: every rank must call it)."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def here() -> Process:
    """This process by itself, without seeding anything: float32 on a CPU, bfloat16 on a GPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    return Process(0, 1, device, torch.bfloat16 if cuda else torch.float32)


def setup(seed: int) -> Process:
    """Joins torchrun's process group if there is one, picks the device and seeds the weights' initialisation.

    Every rank gets the same seed, so that all build the same initial model."""
    process = here()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = process.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(process.device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    torch.manual_seed(seed)
    np.random.seed(seed)
    return dataclasses.replace(process, rank=rank, world=world)


def teardown(process: Process) -> None:
    """Leaves the process group. Call it after the sharded model and its optimizer are gone (`del`, gc), or gloo may
    abort at exit."""
    if process.world > 1:
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def noise(shape: Sequence[int], index: Tensor, seed: int, device: torch.device, purpose: int = 0) -> Tensor:
    """Normal random numbers that belong to samples, not to processes: row i depends on (seed, index[i], purpose) alone.

    Returns (B, *shape)."""
    rows = []
    for i in index.tolist():
        state = int(np.random.SeedSequence([seed, i, purpose]).generate_state(1, np.uint64)[0])
        rows.append(torch.randn(tuple(shape), generator=torch.Generator().manual_seed(state % 2**63)))
    return torch.stack(rows).to(device)


# --------------------------------------------------------------------------------------------------------------------
# The unified spaces (Sec. 6.1), by name
# --------------------------------------------------------------------------------------------------------------------

_SIDES, _FINGERS = ("left", "right"), ("thumb", "index", "middle", "ring", "little")
_TIPS = tuple(f"{s}_{finger}_{axis}" for s in _SIDES for finger in _FINGERS for axis in "xyz")
ACTION_NAMES = (*(f"{s}_{n}" for s in _SIDES for n in ("x", "y", "z", "roll", "pitch", "yaw", "gripper")), *_TIPS)  # 44
STATE_NAMES = (*(f"{s}_{n}" for s in _SIDES for n in ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper")), *_TIPS)  # 46
ARM_ACTION = ACTION_NAMES[7:14]  # a single arm is the right arm (our choice)
ARM_STATE = STATE_NAMES[8:16]
GRIPPERS = tuple(ACTION_NAMES.index(f"{s}_gripper") for s in _SIDES)  # columns 6 and 13
MOTION = tuple(i for i in range(len(ACTION_NAMES)) if i not in GRIPPERS)  # the 42 columns with a squared error
_ARMS = (("left", 0, 0), ("right", 7, 8))  # side, its first column in the actions, its first column in the states


def scatter(values: np.ndarray, names: Sequence[str], all_names: Sequence[str]) -> np.ndarray:
    """Places named columns (..., len(names)) into the unified vector (..., len(all_names)); the others are zero.

    Raises InputError for a name that the unified space does not have."""
    values, unknown = np.asarray(values), [n for n in names if n not in all_names]
    if unknown:
        raise InputError(f"unknown dimension names {unknown}; the unified space has {list(all_names)}")
    if values.shape[-1] != len(names):
        raise InputError(f"{values.shape[-1]} values for {len(names)} names {list(names)}")
    out = np.zeros((*values.shape[:-1], len(all_names)), values.dtype)
    out[..., [all_names.index(n) for n in names]] = values
    return out


def gather(unified: np.ndarray, names: Sequence[str], all_names: Sequence[str]) -> np.ndarray:
    """The inverse of `scatter`: (..., len(all_names)) -> (..., len(names))."""
    return np.asarray(unified)[..., [all_names.index(n) for n in names]]


def relative_action(position: np.ndarray, quaternion: np.ndarray, position2: np.ndarray, quaternion2: np.ndarray):
    """The six numbers (..., 6) that lead from one pose to another: dp, and Euler xyz of R2 R1^T (base frame)."""
    one, two = (Rotation.from_quat(np.reshape(q, (-1, 4))) for q in (quaternion, quaternion2))
    euler = (two * one.inv()).as_euler("xyz").reshape(*np.shape(position)[:-1], 3)
    return np.concatenate([np.asarray(position2) - np.asarray(position), euler], -1).astype(np.float32)


def apply_action(position: np.ndarray, quaternion: np.ndarray, action: np.ndarray):
    """The pose (position (..., 3), quaternion xyzw (..., 4) with w >= 0) reached by the six numbers (..., 6)."""
    action = np.asarray(action, np.float64)
    turn = Rotation.from_euler("xyz", action[..., 3:6].reshape(-1, 3))
    quat = (turn * Rotation.from_quat(np.reshape(quaternion, (-1, 4)))).as_quat(canonical=True)
    return np.asarray(position) + action[..., :3], quat.reshape(*action.shape[:-1], 4)


def compose_actions(actions: np.ndarray) -> np.ndarray:
    """One unified action (..., 44) with the effect of several (..., S, 44): translations add, rotations multiply (the
    later one from the left), the last gripper command holds."""
    actions = np.asarray(actions, np.float64)
    out = actions.sum(-2)
    for _, a, _ in _ARMS:
        euler = actions[..., a + 3 : a + 6]
        turn = Rotation.from_euler("xyz", euler[..., 0, :].reshape(-1, 3))
        for k in range(1, actions.shape[-2]):
            turn = Rotation.from_euler("xyz", euler[..., k, :].reshape(-1, 3)) * turn
        out[..., a + 3 : a + 6] = turn.as_euler("xyz").reshape(*out.shape[:-1], 3)
        out[..., a + 6] = actions[..., -1, a + 6]
    return out.astype(np.float32)


def strided_actions(episode: dict[str, Any], starts: np.ndarray, stride: int) -> np.ndarray:
    """The actions (len(starts), 44) that lead from the pose measured at each start to the target commanded stride - 1
    steps later. `episode` as `LeRobotReader.episode` returns it.

    Commands are relative to the pose measured when they were given, so where the state is known the composition goes
    through it: a plain product of the commands would count the controller's lag once per step."""
    if stride == 1 or not len(starts):
        return episode["action"][starts]
    out = compose_actions(np.stack([episode["action"][starts + k] for k in range(stride)], 1))
    here, there, last = episode["state"][starts], episode["state"][starts + stride - 1], starts + stride - 1
    for _, a, s in _ARMS:
        if episode["state_mask"][s : s + 7].all():
            goal = apply_action(there[:, s : s + 3], there[:, s + 3 : s + 7], episode["action"][last, a : a + 6])
            out[:, a : a + 6] = relative_action(here[:, s : s + 3], here[:, s + 3 : s + 7], *goal)
    tips = episode["state_mask"][16:]
    out[:, 14:][:, tips] = (there[:, 16:] + episode["action"][last, 14:] - here[:, 16:])[:, tips]
    return out


# --------------------------------------------------------------------------------------------------------------------
# Quantile normalisation (Sec. 6.3: "following pi0.5, quantile normalization for action and state")
# --------------------------------------------------------------------------------------------------------------------

# (our choice) A dimension that moves less than this (2 mm, 2 mrad) is sensor noise: it is not blown up to [-1, 1].
# Components of a quaternion get 0.1: a tool that always points down must not make a tilt of some degrees enormous.
MIN_RANGE, MIN_QUATERNION_RANGE = 2e-3, 0.1


class Normalizer(nn.Module):
    """Maps q01..q99 of each dimension to [-1, 1]; grippers pass untouched. Its numbers are buffers, so they travel in
    the checkpoint of whatever model owns it. Nothing is clipped: the map is a bijection."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("centre", torch.zeros(len(self.names)))
        self.register_buffer("scale", torch.ones(len(self.names)))

    @classmethod
    def from_stats(cls, stats: dict, columns: Sequence[str], names: Sequence[str], source: str) -> "Normalizer":
        """`stats` holds lists "q01" and "q99" over `columns`. Raises InputError when they are missing or do not fit."""
        if not stats or "q01" not in stats or "q99" not in stats:
            raise InputError(f"no q01/q99 statistics in {source}: run `python -m data.stats {source}`")
        quantiles = np.array([stats["q01"], stats["q99"]], np.float64)
        if quantiles.shape != (2, len(columns)) or not np.isfinite(quantiles).all():
            raise InputError(
                f"statistics in {source} are {quantiles.shape[-1]} numbers (NaN: {int(np.isnan(quantiles).sum())}) for "
                f"{len(columns)} columns: run `python -m data.stats {source}`"
            )
        self = cls(names)
        for name, low, high in zip(columns, *quantiles, strict=True):
            if not name.endswith("gripper"):
                self.centre[self.names.index(name)] = (low + high) / 2
                least = MIN_QUATERNION_RANGE if name.split("_")[1][0] == "q" else MIN_RANGE
                self.scale[self.names.index(name)] = max(high - low, least) / 2
        return self

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.centre) / self.scale

    def unnormalize(self, x: Tensor) -> Tensor:
        return x * self.scale + self.centre


def quantile_stats(values: np.ndarray) -> dict[str, list[float]]:
    """LeRobot's statistics of (N, D) values: min, max, mean, std, count and the quantiles 1 and 99 %."""
    values = np.asarray(values, np.float64)
    out = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    out |= {"q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0)}
    return {k: v.tolist() for k, v in out.items()} | {"count": [len(values)]}


# --------------------------------------------------------------------------------------------------------------------
# Images: one preprocessing for training, evaluation and the robot
# --------------------------------------------------------------------------------------------------------------------


def prepare_images(images: np.ndarray, size: int) -> Tensor:
    """uint8 (..., H, W, 3) -> uint8 (..., 3, size, size): bilinear with antialiasing, aspect kept, black borders.

    Raises InputError for anything but uint8 RGB."""
    if images.dtype != np.uint8 or images.shape[-1] != 3:
        raise InputError(f"images must be uint8 (..., H, W, 3), got {images.dtype} {images.shape}")
    x = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3)
    lead, (h, w) = x.shape[:-3], x.shape[-2:]
    if (h, w) == (size, size):
        return x.contiguous()
    scale = size / max(h, w)
    nh, nw = max(1, round(h * scale)), max(1, round(w * scale))
    x = F.interpolate(x.reshape(-1, 3, h, w), (nh, nw), mode="bilinear", antialias=True)
    top, left = (size - nh) // 2, (size - nw) // 2
    return F.pad(x, (left, size - nw - left, top, size - nh - top)).reshape(*lead, 3, size, size)


# --------------------------------------------------------------------------------------------------------------------
# LeRobot data sets: writer (v3.0) and reader (v2.1 and v3.0)
# --------------------------------------------------------------------------------------------------------------------

_ACTION, _STATE, _IMAGE = "action", "observation.state", "observation.images."
_CHUNK = "chunk-{chunk_index:03d}/file-{file_index:03d}"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside and renames: a reader never sees half a file. An innermost list or table takes one line."""
    partial = path.with_name(path.name + ".partial")
    flat = lambda m: m[1] + re.sub(r"\n\s*", " ", m[2]) + m[3]  # a line break is never inside a JSON string
    text = re.sub(r"([\[{])\n\s*([^\[\]{}]*?)\n\s*([\]}])", flat, json.dumps(value, indent=1))
    partial.write_text(text + "\n")
    os.replace(partial, path)


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


class _Video:
    """An h264 file that grows clip by clip, under another name until it is closed. A key frame every 8 frames, so that
    reading any window costs a seek and a short decode."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.container = av.open(str(self.partial), "w", format="mp4")
        self.stream = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        self.stream.height, self.stream.width = size
        self.stream.pix_fmt = "yuv420p"
        # x264's look-ahead is not reproducible when two encoders run in one process: the same frames, other bytes.
        self.stream.options = {"crf": "20", "preset": "veryfast", "g": "8", "bf": "0"}
        self.stream.options |= {"x264-params": "mbtree=0:rc-lookahead=0"}
        self.stream.codec_context.thread_count = 1

    def add(self, clip: np.ndarray) -> None:
        for image in clip:
            self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))

    def close(self, keep: bool = True) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()
        os.replace(self.partial, self.path) if keep else self.partial.unlink(missing_ok=True)


class LeRobotWriter:
    """Writes a LeRobot v3.0 data set, episode by episode, as a context manager.

    Every `episodes_per_file` episodes, and at the end, what has come so far is a complete, valid data set on disk: a
    kill loses at most the episodes since then, and `resume=True` goes on after them.

    cameras: name -> (height, width), even numbers; action_names and state_names: columns by their unified names."""

    def __init__(
        self, root: Path | str, fps: float = 10, robot_type: str = "fr3", action_names: Sequence[str] = ARM_ACTION,
        state_names: Sequence[str] = ARM_STATE, cameras: dict[str, tuple[int, int]] | None = None,
        resume: bool = False, episodes_per_file: int = 50,
    ):  # fmt: skip
        self.root, self.fps, self.robot_type = Path(root), fps, robot_type
        self.action_names, self.state_names = tuple(action_names), tuple(state_names)
        scatter(np.zeros(len(self.action_names)), self.action_names, ACTION_NAMES)  # refuses unknown names
        scatter(np.zeros(len(self.state_names)), self.state_names, STATE_NAMES)
        self.cameras, self.episodes_per_file = dict(cameras or {}), episodes_per_file
        if any(h % 2 or w % 2 for h, w in self.cameras.values()):
            raise InputError(f"cameras {self.cameras}: height and width must be even (h264 halves the colours)")
        self.tasks: dict[str, int] = {}
        self.subtasks: dict[str, int] = {}
        self.episodes: list[dict] = []
        self.names = {k: v for k, v in ((_ACTION, self.action_names), (_STATE, self.state_names)) if v}
        self.values: dict[str, list[np.ndarray]] = {k: [] for k in self.names}  # of all episodes, for the statistics
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
        here = (self.action_names, self.state_names, self.cameras, float(self.fps))
        sizes = {name: tuple(old.info["features"][key]["shape"][:2]) for name, key in old.mapping["images"].items()}
        there = (old.action_names, old.state_names, sizes, float(old.fps))
        if here != there:
            raise InputError(f"{self.root} holds columns, cameras and fps {there}, not {here}: choose another --out")
        self.tasks = {t: i for i, t in enumerate(old.tasks)}
        self.subtasks = {t: i for i, t in enumerate(old.subtasks)}
        self.episodes = old.episodes
        self.file = self.episodes[-1]["data/chunk_index"] * 1000 + self.episodes[-1]["data/file_index"] + 1
        for path in sorted((self.root / "data").rglob("*.parquet"))[: self.file]:  # a later one is an orphan of a kill
            table = pq.read_table(path, columns=list(self.values))
            for key, names in self.names.items():
                self.values[key].append(LeRobotReader._array(table[key]).astype(np.float32).reshape(-1, len(names)))
        if old.info["total_episodes"] != len(self.episodes):
            self._write_meta()  # the kill fell between the list of episodes and the rest of the metadata

    def add_episode(
        self, frames: dict[str, np.ndarray], action: np.ndarray, state: np.ndarray, task: str,
        subtasks: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """One episode of n steps: frames[camera] uint8 (n, H, W, 3), action (n, A), state (n, S), the instruction, and
        optionally the text of the present phase at each step. Raises InputError where shapes or values do not fit."""
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
        for name, size in self.cameras.items():
            clip = frames.get(name, np.empty(0))
            if clip.dtype != np.uint8 or clip.shape != (n, *size, 3):
                raise InputError(f"camera {name}: {clip.dtype} {clip.shape}, expected uint8 {(n, *size, 3)}")
        for name, size in self.cameras.items():
            if name not in self.videos:
                self.videos[name] = _Video(self._file(f"videos/{_IMAGE}{name}", "mp4"), size, self.fps)
            self.videos[name].add(frames[name])
        self.pending.append((action, state, task, list(subtasks) if subtasks is not None else [task] * n))
        if len(self.pending) >= self.episodes_per_file:
            self.flush()

    def add_part(self, part: Path, rows: list[tuple]) -> None:
        """Takes over what a writer in another process has written to `part`, as one file: its videos are moved, and
        `rows` is what its `pending` held before it was closed."""
        for name in self.cameras:
            video = self._file(f"videos/{_IMAGE}{name}", "mp4")
            video.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / video.parent.parent.relative_to(self.root) / "chunk-000/file-000.mp4", video)
        self.pending = rows
        self.flush()

    def _file(self, folder: str, suffix: str) -> Path:
        part = _CHUNK.format(chunk_index=self.file // 1000, file_index=self.file % 1000)
        return self.root / f"{folder}/{part}.{suffix}"

    def flush(self) -> None:
        """Writes the pending episodes as one new data file, one video per camera, and then the metadata."""
        file = {"chunk_index": self.file // 1000, "file_index": self.file % 1000}
        first = start = self.episodes[-1]["dataset_to_index"] if self.episodes else 0
        whole: dict[str, list] = {"frame_index": [], "episode_index": [], "task_index": [], "subtask_index": []}
        for action, _, task, subtasks in self.pending:
            n, e = len(action), len(self.episodes)
            whole["frame_index"] += range(n)
            whole["episode_index"] += [e] * n
            whole["task_index"] += [self.tasks.setdefault(task, len(self.tasks))] * n
            whole["subtask_index"] += [self.subtasks.setdefault(s, len(self.subtasks)) for s in subtasks]
            row = {"episode_index": e, "tasks": [task], "length": n}
            row |= {"dataset_from_index": start, "dataset_to_index": start + n}
            row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
            row |= {f"data/{k}": v for k, v in file.items()}
            clock = {"from_timestamp": (start - first) / self.fps, "to_timestamp": (start - first + n) / self.fps}
            for name in self.cameras:
                row |= {f"videos/{_IMAGE}{name}/{k}": v for k, v in (file | clock).items()}
            start += n
            self.episodes.append(row)
        while self.videos:
            self.videos.popitem()[1].close()
        lists = {}
        for key in self.names:
            values = np.concatenate([p[key == _STATE] for p in self.pending])
            self.values[key].append(values)
            lists[key] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
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
        write_json(meta / "stats.json", {k: quantile_stats(np.concatenate(v)) for k, v in self.values.items()})
        features: dict[str, dict] = {
            key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
            for key, names in self.names.items()
        }
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
            "features": features,
        })  # fmt: skip


class LeRobotReader:
    """Reads a LeRobot data set, v3.0 or v2.1, into the unified spaces.

    A data set whose columns carry our names needs nothing else. One made by others is described by a mapping, a JSON
    file (see `data/mappings/`), given as `PATH@MAPPING`: where `images`, `state` and `action` (relative) or `target`
    (absolute commanded pose, by the state's names) are found, each as {"column", "index", and optionally "scale" and
    "offset"}, and the `stats` that `python -m data.stats` puts there. A mapping with neither action nor target gives
    the change of the state's pose from t to t+1 as the action.

    Raises InputError for a missing path, column, camera or statistics, and for a video that is absent or cut short."""

    def __init__(self, source: Path | str):
        path, _, mapping = str(source).partition("@")
        self.source, self.root = str(source), Path(path)
        if not (self.root / "meta/info.json").exists():
            raise InputError(
                f"no LeRobot data set at {self.root} (no meta/info.json): record one with "
                f"`python franka.py --record 100 --task all --out {self.root}`, or give another --data"
            )
        self.info = self._json(self.root / "meta/info.json")
        version = self.info.get("codebase_version", "?")
        if version not in ("v2.0", "v2.1", "v3.0"):
            raise InputError(f"{self.root}: LeRobot format {version} is not supported (v2.1 and v3.0 are)")
        if lacking := sorted({"fps", "features", "data_path", "video_path"} - set(self.info)):
            raise InputError(f"{self.root}/meta/info.json lacks {lacking}: copy the data set again")
        self.v3, self.fps = version == "v3.0", float(self.info["fps"])
        self.mapping, self.mapping_path = self._load_mapping(mapping)
        self._check_columns()
        self._load_meta()
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()
        self._videos: OrderedDict[str, av.container.InputContainer] = OrderedDict()
        self._pid = os.getpid()
        self._cache: dict[tuple[int, str, int], Tensor] = {}

    # -- metadata -------------------------------------------------------------------------------------------------

    def _json(self, path: Path, lines: bool = False) -> Any:
        try:
            text = path.read_text()
            return [json.loads(row) for row in text.splitlines() if row.strip()] if lines else json.loads(text)
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"cannot read {path} of {self.source}: {error}; copy the file again") from None

    def _load_mapping(self, name: str) -> tuple[dict, Path | None]:
        features = self.info["features"]
        if name:
            folder = Path(__file__).parent / "data/mappings"
            path = next((p for p in (Path(name), folder / f"{name}.json") if p.is_file()), None)
            if path is None:
                known = sorted(p.stem for p in folder.glob("*.json"))
                raise InputError(f"no mapping {name!r}: give a JSON file or one of {known} after {self.root}@")
            mapping = self._json(path)
            if not isinstance(mapping, dict):
                raise InputError(f"{path} is no mapping: a JSON object like data/mappings/sim_pick_place.json is one")
            return mapping, path
        named: dict[str, Any] = {"images": {k.removeprefix(_IMAGE): k for k in features if k.startswith(_IMAGE)}}
        for key, kind in ((_STATE, "state"), (_ACTION, "action")):
            names = (features.get(key) or {}).get("names")
            names = names.get("motors", names) if isinstance(names, dict) else names
            named[kind] = {n: {"column": key, "index": i} for i, n in enumerate(names or [])}
        return named, None

    def _check_columns(self) -> None:
        m, features = self.mapping, self.info["features"]
        hint = "columns must carry the unified names, or a mapping must name them: --data PATH@MAPPING (data/mappings)"
        if self.mapping_path:
            hint = f"{self.mapping_path} must name some of the columns {sorted(features)}"
        if not m.get("state") and not m.get("action"):
            raise InputError(f"{self.source}: neither `{_STATE}` nor `{_ACTION}` with names in meta/info.json; {hint}")
        for kind, names in (("state", STATE_NAMES), ("action", ACTION_NAMES), ("target", STATE_NAMES)):
            unknown = [n for n in m.get(kind) or {} if n not in names]
            absent = sorted({c["column"] for c in (m.get(kind) or {}).values()} - set(features))
            if unknown or absent:
                raise InputError(f"{self.source}: {kind} has unknown names {unknown}, absent columns {absent}; {hint}")
        absent = [k for k in m.get("images", {}).values() if k not in features]
        if absent or not m.get("images"):
            raise InputError(f"{self.source}: no camera columns {absent or [_IMAGE + '*']} in meta/info.json; {hint}")
        self.cameras, self.state_names = tuple(m["images"]), tuple(m.get("state") or {})
        self.action_names = tuple(m.get("action") or self._names_from_poses())

    def _names_from_poses(self) -> list[str]:
        """Where actions are made from poses: translations and fingertips that both ends know, rotations whose whole
        quaternion they know, and the gripper, which is absolute, where the later end knows it."""
        later = set(self.mapping.get("target") or self.state_names)
        both = later & set(self.state_names)
        turns = {s for s in _SIDES if all(f"{s}_q{c}" in both for c in "xyzw")}
        known = lambda n: n.split("_")[0] in turns if n.endswith(("roll", "pitch", "yaw")) else n in both
        return [n for n in ACTION_NAMES if (n in later if n.endswith("gripper") else known(n))]

    def _load_meta(self) -> None:
        meta = self.root / "meta"
        if self.v3:
            files = sorted((meta / "episodes").rglob("*.parquet"))
            if not files or not (meta / "tasks.parquet").exists():
                raise InputError(f"{self.source}: meta/episodes or meta/tasks.parquet is absent: copy it again")
            rows = [row for f in files for row in self._parquet(f).to_pylist()]
            self.tasks, self.subtasks = (self._texts(meta / f"{k}s.parquet", f"{k}_index") for k in ("task", "subtask"))
        else:
            rows, tasks = (self._json(meta / f"{k}.jsonl", lines=True) for k in ("episodes", "tasks"))
            self.tasks, self.subtasks = [t["task"] for t in sorted(tasks, key=lambda t: t["task_index"])], []
        self.episodes = sorted(rows, key=lambda r: r["episode_index"])
        self.num_episodes = len(self.episodes)
        if not self.num_episodes:
            raise InputError(f"{self.source} holds no episodes")
        self.lengths = np.array([r["length"] for r in self.episodes])
        # A mapped data set's own statistics describe its own columns, so only the mapping's will do.
        path = meta / "stats.json"
        self.stats = self.mapping.get("stats", {}) if self.mapping_path else self._json(path) if path.exists() else {}

    def _parquet(self, path: Path) -> pa.Table:
        try:
            return pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"cannot read {path} of {self.source}: {error}; copy the file again") from None

    def _texts(self, path: Path, index: str) -> list[str]:
        if not path.exists():
            return []
        table = self._parquet(path).to_pydict()
        text = next(v for k, v in table.items() if k != index)
        return [t for _, t in sorted(zip(table[index], text, strict=True))]

    def normalizers(self, stride: int = 1) -> tuple[Normalizer, Normalizer]:
        """The action's and the state's normaliser. Composed actions (stride > 1) have statistics of their own.

        Raises InputError, naming the command that computes them, when the statistics are missing."""
        action = self.stats.get(_ACTION if stride == 1 else f"{_ACTION}.stride{stride}")
        state = self.stats.get(_STATE) if self.state_names else {"q01": [], "q99": []}
        hint = self.source if stride == 1 else f"{self.source} --stride {stride}"
        return (
            Normalizer.from_stats(action, self.action_names, ACTION_NAMES, hint),
            Normalizer.from_stats(state, self.state_names, STATE_NAMES, self.source),
        )

    # -- numbers --------------------------------------------------------------------------------------------------

    def _table(self, i: int) -> pa.Table:
        row = self.episodes[i]
        path = self.root / self.info["data_path"].format(**self._place(row, "data"))
        if str(path) not in self._tables:
            wanted = {c["column"] for k in ("state", "action", "target") for c in (self.mapping.get(k) or {}).values()}
            try:
                names = pq.read_schema(path).names
                wanted |= {"episode_index", "task_index"}
                lacking = sorted(wanted - set(names))
                if lacking:
                    raise InputError(f"{path} lacks the columns {lacking}: convert the data set again")
                wanted |= {"subtask_index"} & set(names)
                self._tables[str(path)] = pq.read_table(path, columns=sorted(wanted))
            except (OSError, pa.ArrowInvalid) as error:
                raise InputError(f"cannot read {path} of {self.source}: {error}; copy the file again") from None
            while len(self._tables) > 16:
                self._tables.popitem(last=False)
        self._tables.move_to_end(str(path))
        table = self._tables[str(path)]
        rows = np.flatnonzero(table["episode_index"].to_numpy() == row["episode_index"])
        if len(rows) != row["length"]:
            raise InputError(
                f"{path} holds {len(rows)} of the {row['length']} steps of episode {row['episode_index']} of "
                f"{self.source}: copy the data set again"
            )
        return table.slice(rows[0], len(rows))

    def _place(self, row: dict, key: str) -> dict[str, int]:
        """What fills in the path of an episode's data or video."""
        if self.v3:
            return {k: row[f"{key}/{k}"] for k in ("chunk_index", "file_index")}
        e = row["episode_index"]
        return {"episode_chunk": e // self.info.get("chunks_size", 1000), "episode_index": e}

    @staticmethod
    def _array(column: pa.ChunkedArray) -> np.ndarray:
        """A column of numbers or of lists of numbers as float64 (n, width); a null becomes NaN."""
        array = column.combine_chunks()
        flat = array.flatten() if hasattr(array.type, "value_type") else array
        return flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(column), -1)

    def _columns(self, table: pa.Table, kind: str, all_names: Sequence[str]) -> np.ndarray:
        """Mapped columns, values[:, index] * scale + offset, in unified places (n, len(all_names))."""
        mapping = self.mapping.get(kind) or {}
        arrays = {name: self._array(table[name]) for name in {c["column"] for c in mapping.values()}}
        short = sorted({c["column"] for c in mapping.values() if c["index"] >= arrays[c["column"]].shape[1]})
        if short:
            raise InputError(f"{self.source}: columns {short} have fewer dimensions than names")
        values = [
            arrays[c["column"]][:, c["index"]] * c.get("scale", 1.0) + c.get("offset", 0.0) for c in mapping.values()
        ]
        out = scatter(np.stack(values, 1) if values else np.zeros((len(table), 0)), tuple(mapping), all_names)
        if not np.isfinite(out).all():
            raise InputError(f"{self.source}: NaN or infinite {kind} in an episode of {len(table)} steps: leave it out")
        for side, a, s in _ARMS:
            gripper = out[:, s + 7 if all_names is STATE_NAMES else a + 6]
            if gripper.min() < -0.05 or gripper.max() > 1.05:
                raise InputError(
                    f"{self.source}: {side} gripper ({kind}) runs from {gripper.min():.3g} to {gripper.max():.3g}, and "
                    "must from 0 (closed) to 1 (open): give scale and offset in a mapping"
                )
            np.clip(gripper, 0, 1, out=gripper)
            if all_names is STATE_NAMES and f"{side}_qw" in mapping:
                q = out[:, s + 3 : s + 7]
                if (np.abs(np.linalg.norm(q, axis=1) - 1) > 0.05).any():
                    raise InputError(f"{self.source}: {side} quaternion ({kind}) without length 1: map xyzw by name")
                q *= np.where(q[:, 3:] < 0, -1.0, 1.0)  # a quaternion and its negative are the same rotation
        return out

    def episode(self, i: int) -> dict[str, Any]:
        """Episode i: action (n, 44), action_mask (44,), state (n, 46), state_mask (46,) in physical units, steps (how
        many of the n have an action), task (str) and subtask (n texts; the instruction where the data set has none)."""
        table = self._table(i)
        n = steps = len(table)
        state = self._columns(table, "state", STATE_NAMES)
        if self.mapping.get("action"):
            action = self._columns(table, "action", ACTION_NAMES)
        elif self.mapping.get("target"):
            action = self._change(state, self._columns(table, "target", STATE_NAMES))
        else:
            action, steps = self._change(state, np.concatenate([state[1:], state[-1:]])), n - 1
        task = self.tasks[table["task_index"][0].as_py()]
        subtask = [task] * n
        if self.subtasks and "subtask_index" in table.column_names:
            subtask = [self.subtasks[k] for k in table["subtask_index"].to_pylist()]
        return {
            "action": action.astype(np.float32), "action_mask": np.isin(ACTION_NAMES, self.action_names),
            "state": state.astype(np.float32), "state_mask": np.isin(STATE_NAMES, self.state_names),
            "steps": steps, "task": task, "subtask": subtask,
        }  # fmt: skip

    def _change(self, state: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The unified actions (n, 44) that lead from states to target states, both (n, 46)."""
        action = np.zeros((len(state), len(ACTION_NAMES)))
        for side, a, s in _ARMS:
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
        return self.root / self.info["video_path"].format(video_key=key, **place), start

    def frames(self, i: int, camera: str, indices: Sequence[int]) -> np.ndarray:
        """Frames of episode i, in the order asked for: uint8 (len(indices), H, W, 3)."""
        assert len(indices) and 0 <= min(indices) and max(indices) < self.lengths[i], (i, indices)
        path, start = self.video_path(i, camera)
        numbers = [round(start * self.fps + k) for k in indices]  # frame numbers in the file
        missing, found = set(numbers), {}
        try:
            container = self._open(path)
            stream = container.streams.video[0]
            # A quarter frame past the wanted one, against rounding; from the start where a file's index misleads.
            for second in ((min(numbers) + 0.25) / self.fps, 0.0):
                container.seek(int(second / stream.time_base), stream=stream, backward=True)
                for frame in container.decode(stream):
                    number = round(float(frame.pts * stream.time_base) * self.fps)
                    if number in missing:
                        found[number] = frame.to_ndarray(format="rgb24")
                        missing.discard(number)
                    if not missing or number > max(missing):
                        break
                if not missing:
                    return np.stack([found[k] for k in numbers])
        except (av.error.FFmpegError, OSError, IndexError) as error:
            raise InputError(f"cannot read video {path} (episode {i}): {error}; copy the file again") from None
        raise InputError(
            f"video {path} is cut short: it has no frame at {min(missing) / self.fps:.2f} s, which episode {i} of "
            f"{self.source} needs; copy the file again"
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
                raise InputError(f"video {path} is absent, listed by {self.source}: copy it, or choose another camera")
            self._videos[key] = av.open(key)
            context = self._videos[key].streams.video[0].codec_context
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
        """Decodes all frames of `episodes` once into memory, scaled to `size`: for data sets that fit."""
        for i in tqdm(episodes, desc=f"decoding {self.root.name}", unit="episode", mininterval=1, leave=False):
            self._cache[i, camera, size] = self.pictures(i, camera, range(int(self.lengths[i])), size)


# --------------------------------------------------------------------------------------------------------------------
# Windows and the training stream
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What a stage wants to see: `frames` consecutive frames of a camera, starting now, at `size` pixels square."""

    camera: str
    frames: int
    size: int


class Windows(torch.utils.data.Dataset):
    """Training samples of one or several data sets, addressed by their number in an endless stream.

        episode   . . . t . . . . . . . . . . .      a window starts at any t but the last
        frames          V_t  V_t+s  V_t+2s ...       s = fps / hz, at least 1
        actions         A_t  A_t+s ...               each the composition of s actions
        past the end    the last frame repeats, action_mask = False

    Sample i draws from a generator seeded with (seed, i): first the data set by weight, then a frame uniformly. So the
    stream does not depend on ranks or workers, and continues anywhere. A sample holds
        <view>        uint8 (frames, 3, size, size) for each view
        action        float32 (actions, 44), normalised; grippers 0 .. 1
        action_mask   bool (actions, 44)
        state         float32 (46,), normalised;  state_mask  bool (46,)
        instruction, subtask   str (the phase at t);   index, dataset, window   int

    split: "train", "val" (one episode in `val_every`) or "all". `episodes` > 0 takes only the first so many."""

    def __init__(
        self, sources: Sequence[str | Path], views: dict[str, View], actions: int, hz: float, seed: int,
        weights: Sequence[float] = (), split: str = "all", val_every: int = 10, episodes: int = 0,
        preload: bool = False,
    ):  # fmt: skip
        if not sources:
            raise InputError("no data: give at least one data set with --data PATH")
        if weights and (len(weights) != len(sources) or min(weights) < 0 or sum(weights) <= 0):
            raise InputError(f"--weights {list(weights)} for {len(sources)} --data sets: give each one, not all zero")
        self.readers = [LeRobotReader(s) for s in sources]
        self.views, self.actions, self.seed = views, actions, seed
        self.strides = [max(1, round(r.fps / hz)) for r in self.readers]
        norms = [r.normalizers(s) for r, s in zip(self.readers, self.strides, strict=True)]
        self.action_norms, self.state_norms = [n[0] for n in norms], [n[1] for n in norms]
        self.chosen, self.ends = [], []
        for reader in self.readers:
            for camera in sorted({v.camera for v in views.values()} - set(reader.cameras)):
                raise InputError(f"{reader.source} has no camera {camera!r}, it has {list(reader.cameras)}")
            if episodes > reader.num_episodes:
                raise InputError(f"{reader.source} has {reader.num_episodes} episodes, fewer than {episodes}")
            ids = np.arange(episodes or reader.num_episodes)
            held_out = np.isin(ids, _held_out(reader.num_episodes, val_every))
            ids = {"train": ids[~held_out], "val": ids[held_out], "all": ids}[split]
            if not len(ids):
                raise InputError(
                    f"{reader.source}: {reader.num_episodes} episodes leave none for the {split} split "
                    f"(one in {val_every} is held out): give more episodes or --val-every 0"
                )
            self.chosen.append(ids)
            self.ends.append(np.cumsum(np.maximum(reader.lengths[ids] - 1, 1)))
        self.weights = np.array(weights or [e[-1] for e in self.ends], np.float64)  # default: every frame counts alike
        self.weights /= self.weights.sum()
        self._episodes: OrderedDict[tuple[int, int], dict] = OrderedDict()
        if preload:
            for reader, ids in zip(self.readers, self.chosen, strict=True):
                for camera, size in sorted({(v.camera, v.size) for v in views.values()}):
                    reader.preload(camera, size, ids.tolist())

    def __len__(self) -> int:
        """Windows in one pass; the stream itself is endless."""
        return int(sum(e[-1] for e in self.ends))

    def statistics(self) -> dict[str, dict]:
        """The statistics in use, by data set: they go into the checkpoint's metadata."""
        return {r.source: r.stats for r in self.readers}

    def summary(self) -> str:
        rows = [
            f"  {r.source}: {len(ids)} episodes, {e[-1]} windows, {r.fps:g} Hz, stride {s}, weight {w:.3f}"
            for r, ids, e, s, w in zip(self.readers, self.chosen, self.ends, self.strides, self.weights, strict=True)
        ]
        return "\n".join(["data:", *rows])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(index)

    def draw(self, index: int, pictures: bool = True) -> dict[str, Any]:
        """Sample `index` of the stream, on request without its pictures."""
        rng = np.random.default_rng([self.seed, index])
        d = int(rng.choice(len(self.readers), p=self.weights))
        return self.window(d, int(rng.integers(self.ends[d][-1])), pictures) | {"index": index}

    def window(self, d: int, k: int, pictures: bool = True) -> dict[str, Any]:
        """The k-th window of data set d, on request without its pictures, which are the slow part."""
        reader, stride = self.readers[d], self.strides[d]
        at = int(np.searchsorted(self.ends[d], k, side="right"))
        i, t = int(self.chosen[d][at]), int(k - (self.ends[d][at - 1] if at else 0))
        if (d, i) not in self._episodes:
            self._episodes[d, i] = reader.episode(i)
            while len(self._episodes) > 1000:
                self._episodes.popitem(last=False)
        ep, n = self._episodes[d, i], int(reader.lengths[i])
        action = np.zeros((self.actions, len(ACTION_NAMES)), np.float32)
        starts = t + stride * np.arange(self.actions)
        inside = starts + stride <= ep["steps"]
        action[inside] = strided_actions(ep, starts[inside], stride)
        mask = torch.from_numpy(inside[:, None] & ep["action_mask"])
        state, state_mask = torch.from_numpy(ep["state"][t]), torch.from_numpy(ep["state_mask"])
        sample: dict[str, Any] = {
            "action": torch.where(mask, self.action_norms[d].normalize(torch.from_numpy(action)), 0.0),
            "action_mask": mask, "state_mask": state_mask,
            "state": torch.where(state_mask, self.state_norms[d].normalize(state), 0.0),
            "instruction": ep["task"], "subtask": ep["subtask"][t], "dataset": d, "window": k,
        }  # fmt: skip
        for name, view in self.views.items() if pictures else ():
            wanted = [min(t + f * stride, n - 1) for f in range(view.frames)]
            unique = sorted(set(wanted))
            images = reader.pictures(i, view.camera, unique, view.size)
            sample[name] = images[[unique.index(f) for f in wanted]]
        return sample


def _held_out(episodes: int, every: int) -> list[int]:
    """One episode in each run of `every`, a place further each time: of tasks recorded in turn, each has its turn."""
    starts = range(0, episodes - every + 1, every) if every else ()
    return [b + (b // every) % every for b in starts]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors, collects texts in lists, numbers in int64 tensors."""
    batch: dict[str, Any] = {}
    for key, value in samples[0].items():
        column = [s[key] for s in samples]
        if isinstance(value, Tensor):
            batch[key] = torch.stack(column)
        else:
            batch[key] = column if isinstance(value, str) else torch.tensor(column)
    return batch


def stream(
    windows: Windows, batch: int, start: int, process: Process, accumulate: int, workers: int
) -> Iterator[list[dict]]:
    """Endless training steps from step `start` on: each a list of `accumulate` micro-batches of `batch` samples for
    this rank. Step s takes samples s * (world * accumulate * batch) onwards, whoever computes them."""

    def numbers() -> Iterator[list[int]]:
        k = start * accumulate
        while True:
            first = (k * process.world + process.rank) * batch
            yield list(range(first, first + batch))
            k += 1

    for reader in windows.readers:
        reader.close()  # before the workers are forked
    loader = torch.utils.data.DataLoader(
        windows, batch_sampler=numbers(), collate_fn=collate, num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=process.device.type == "cuda",
        generator=torch.Generator(),  # its own, so that making a loader leaves the global random numbers alone
    )  # fmt: skip
    batches = iter(loader)
    while True:
        yield [to_device(next(batches), process.device) for _ in range(accumulate)]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


# --------------------------------------------------------------------------------------------------------------------
# Prompts, tokenizer, vision-language models
# --------------------------------------------------------------------------------------------------------------------

# The paper's template, word for word (Sec. 6.2): its question and its answer. [CP_SCE] and [CP_MOT] each stand for as
# many positions as there are scene and motion tokens.
LAM_QUESTION = (
    "Given the instruction “{sent}” and the video frames, reason about what happens within this time span. Explain how "
    "the overall scene changes, and identify the temporal dependencies between consecutive frames. Highlight the "
    "actions, interactions, and transitions that drive the scene’s evolution. "
)
LAM_ANSWER = "Answer: Scene evolution description: [CP_SCE]. Action dynamics description: [CP_MOT]."
# The student's prompt is PaliGemma's own: image tokens, <bos>, the text, a line break (Sec. 3.3; pi0.5).
STUDENT_PROMPT = "{sent}\n"

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>",
           "<|im_end|>", "[CP_SCE]", "[CP_MOT]")  # fmt: skip
_WORDS = """pick up the red cup pick up the blue cup put the block into the slot close the oven
dip the brush in the sauce put the pot in the oven move above reach for grasp close the gripper around lift release open
the gripper lower carry push pull slide turn stack place on top of beside left right front back plate bowl drawer towel
carrot spoon eggplant basket green yellow orange purple white black box ball handle door lid table arm hand robot then
user assistant Frame1: Frame2: Frame16: over under near to with and of from towards align insert hold press stir"""


def make_tokenizer():
    """A small byte-pair tokenizer with the special tokens of InternVL and PaliGemma, for models that start from
    random weights: made from the words above in milliseconds, needs no download, and spells out any other text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=1, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator([LAM_QUESTION, LAM_ANSWER, _WORDS.replace("\n", " ")] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
    )  # fmt: skip


def _size(vision: tuple[int, ...], text: tuple[int, ...]) -> dict[str, dict[str, int]]:
    width, layers, heads, mlp = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    seen = dict(zip((width, layers, heads, mlp, "image_size"), vision, strict=True))
    read = dict(zip((width, layers, heads, "num_key_value_heads", mlp), text, strict=True))
    return {"vision": seen | {"patch_size": 8}, "text": read | {"head_dim": 32}}


# Sizes of models that start from random weights. Widths are chosen so that a step takes a fraction of a second on two
# cores (tiny) or a second or two (small); layers, heads and tokens keep the full models' proportions (our choice).
VLM_SIZES: dict[str, dict[str, Any]] = {
    # vision: width, layers, heads, MLP, image in pixels        text: width, layers, heads, key-value heads, MLP
    "internvl-tiny": _size(vision=(64, 2, 2, 128, 64), text=(128, 2, 4, 2, 256)),
    "internvl-small": _size(vision=(192, 4, 4, 512, 96), text=(256, 4, 8, 4, 768)),
    "paligemma-tiny": _size(vision=(96, 2, 4, 192, 64), text=(128, 3, 4, 1, 256)),
    "paligemma-small": _size(vision=(192, 4, 4, 512, 96), text=(256, 4, 8, 1, 768)),
}

# Pixel statistics each family was pretrained with.
PIXELS = {"internvl": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "paligemma": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


def load_vlm(source: str, config: dict | None = None, tokenizer_dir: Path | None = None):
    """A vision-language model and its tokenizer: `(model, tokenizer)`.

    source: a size of VLM_SIZES ("internvl-tiny": random weights, our tokenizer), or a local folder or hub name in
    Hugging Face's layout (InternVL or PaliGemma, pretrained weights). With `config` and `tokenizer_dir`, both from a
    checkpoint of ours, the same architecture is built without weights, to be filled by the caller.

    Raises InputError when the source is neither, or of another family."""
    import transformers as tf

    tf.logging.set_verbosity_error()
    classes = {"internvl": tf.InternVLForConditionalGeneration, "paligemma": tf.PaliGemmaForConditionalGeneration}
    if config is not None:
        kind = classes[config["model_type"]]
        model = kind._from_config(kind.config_class.from_dict(config), dtype=torch.float32)
        return model, tf.AutoTokenizer.from_pretrained(tokenizer_dir)
    if source in VLM_SIZES:
        family, size, tokenizer = source.split("-")[0], VLM_SIZES[source], make_tokenizer()
        ids = tokenizer.convert_tokens_to_ids
        vision, text = dict(size["vision"]), dict(size["text"])
        # The classes' standard deviation of 0.02 suits widths around 2,000; 1 / sqrt(width) gives narrow layers the
        # same start, and without it they hardly learn in the few steps that these sizes are for (our choice).
        vision |= {"initializer_range": vision["hidden_size"] ** -0.5}
        text |= {"initializer_range": text["hidden_size"] ** -0.5}
        vision |= {"layer_scale_init_value": 1.0} if family == "internvl" else {}
        text |= {"vocab_size": len(tokenizer), **{f"{k}_token_id": ids(f"<{k}>") for k in ("pad", "bos", "eos")}}
        text |= {"max_position_embeddings": 4096, "attn_implementation": "sdpa"}
        if family == "internvl":
            made = tf.InternVLConfig(
                vision_config=vision, text_config=text | {"model_type": "qwen3"}, image_token_id=ids("<IMG_CONTEXT>"),
                image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2 // 4,
            )  # fmt: skip
        else:
            made = tf.PaliGemmaConfig(
                vision_config=vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
                text_config=text | {"model_type": "gemma"}, image_token_index=ids("<image>"),
                vocab_size=len(tokenizer), projection_dim=text["hidden_size"], hidden_size=text["hidden_size"],
            )  # fmt: skip
        model = classes[family]._from_config(made, dtype=torch.float32)
        if family == "internvl":
            # The class leaves position embeddings at zero for pretrained weights to fill: trained from there, the
            # encoder takes long to tell places apart. Born at the scale of its patch embeddings instead (our choice).
            torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.2)
        return model, tokenizer
    try:
        family = tf.AutoConfig.from_pretrained(source).model_type
        if family not in classes:
            raise InputError(f"{source} is a {family!r} model; this stage needs one of {sorted(classes)}")
        model, report = classes[family].from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        wrong = {k: sorted(map(str, v))[:5] for k, v in report.items() if v and k.endswith("_keys")}
        if wrong:
            raise InputError(f"{source} does not fit the {family} architecture: {wrong}; download it again")
        return model, tf.AutoTokenizer.from_pretrained(source)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"no vision-language model at {source!r}: give a local folder, a reachable hub name, or a size "
            f"of {sorted(VLM_SIZES)} ({str(error).splitlines()[0]})"
        ) from None


def normalize_pixels(images: Tensor, family: str, dtype: torch.dtype) -> Tensor:
    """uint8 (..., 3, H, W) -> the pixel values that the family's vision encoder was trained on."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in PIXELS[family])
    return ((images.float() / 255 - mean) / std).to(dtype)


# --------------------------------------------------------------------------------------------------------------------
# Run folders and checkpoints
#
# runs/<preset>/<stage>/
#   args.json, metrics.jsonl
#   checkpoints/step_00000060/     written beside and renamed: it is whole, or it is not there
#     model.safetensors            every parameter and buffer, by name
#     optimizer.safetensors        AdamW's moments, by parameter name
#     meta.json                    stage, step, args, sizes, git commit
#     tokenizer.json, ...          the tokenizer's own files
# --------------------------------------------------------------------------------------------------------------------


def git_commit() -> str:
    """This repository's commit, with a + when files differ from it; "unknown" outside a repository."""
    run = lambda *a: subprocess.run(["git", *a], cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    try:
        head = run("rev-parse", "--short=12", "HEAD").strip()
        return head + ("+" if run("status", "--porcelain", "-uno").strip() else "") if head else "unknown"
    except OSError:  # no git on this machine
        return "unknown"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(p for p in found if re.fullmatch(r"step_\d{8}", p.name) and (p / "meta.json").exists())


def open_run(out: str, args: Any, process: Process, resume: bool) -> tuple[Path, Path | None]:
    """Prepares a run folder. Returns it and the checkpoint to resume from, or None.

    Raises InputError when the folder already holds a run and --resume was not given, or when the run that is there had
    other arguments: bit-exact resuming would be a lie. A folder without a checkpoint or a line of log holds nothing
    that could be lost, and is taken over."""
    run, kept, now = Path(out), None, json.loads(json.dumps(dataclasses.asdict(args), default=str))
    found = checkpoints(run)
    if found or read_metrics(run):
        if not resume:
            at = found[-1].name if found else "no checkpoint yet"
            raise InputError(f"{run} already holds a run ({at}): add --resume to continue it, or choose another --out")
        free = {"resume", "out", "workers", "log_every", "save_every", "preload"}
        then = read_json(run / "args.json")
        changed = {k: (then.get(k), v) for k, v in now.items() if k not in free and then.get(k) != v}
        if changed:
            raise InputError(f"{run} was started with other arguments (then, now): {changed}; choose another --out")
        kept = found[-1] if found else None
    process.barrier()  # nobody writes before everybody has looked
    if process.main:
        run.mkdir(parents=True, exist_ok=True)
        for partial in run.glob("checkpoints/*.partial"):
            shutil.rmtree(partial)  # a save that a kill interrupted
        if kept is None:
            write_json(run / "args.json", now)
    process.barrier()
    return run, kept


def find_checkpoint(path: str | Path, stage: str) -> Path:
    """The newest checkpoint of a run folder, or the checkpoint folder itself, of the given stage.

    Raises InputError when there is none, or when it belongs to another stage."""
    path = Path(path)
    command = f"`python {stage}.py{next((f' --{p}' for p in ('tiny', 'small') if p in path.parts), '')}"
    if not path.exists():
        raise InputError(f"no {stage} checkpoint at {path}: run {command}` first, or give another path")
    found = path if (path / "meta.json").exists() else next(reversed(checkpoints(path)), None)
    if found is None:
        raise InputError(f"{path} holds no finished checkpoint: run {command} --resume` first")
    there = load_meta(found).get("stage")
    if there != stage:
        raise InputError(f"{found} is a checkpoint of {there!r}, not of {stage!r}: give the folder of a {command}` run")
    return found


def save_checkpoint(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, meta: dict, tokenizer: Any,
    process: Process, keep: int = 2,
) -> None:  # fmt: skip
    """Writes a checkpoint, whole or not at all, and removes all but the newest `keep`. A step that is already there is
    left as it is: a resumed run is bit-exact, so it would write the same. Every rank must call it: sharded tensors are
    gathered on rank 0's CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=process.world > 1 or process.device.type == "cuda")
    weights = get_model_state_dict(model, options=options)
    # Only rank 0 gets the gathered state; the others get an empty dictionary.
    moments = get_optimizer_state_dict(model, optimizer, options=options).get("state", {}) if optimizer else {}
    final = run / f"checkpoints/step_{step:08d}"
    if process.main and not final.exists():
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tokenizer.save_pretrained(partial)
        flat = {f"{name}|{k}": v for name, state in moments.items() for k, v in state.items()}
        for name, tensors in (("model", weights), ("optimizer", flat)):
            # Cloned, because safetensors refuses tied weights, which share their memory.
            copies = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
            save_file(copies, partial / f"{name}.safetensors")
        write_json(partial / "meta.json", meta | {"step": step, "commit": git_commit(), "time": time.time()})
        os.replace(partial, final)
        for old in checkpoints(run)[:-keep]:
            # Renamed before it is emptied, so that a kill in between leaves no half checkpoint under a valid name.
            doomed = old.with_name(old.name + ".partial")
            os.replace(old, doomed)
            shutil.rmtree(doomed)
    process.barrier()


def read_json(path: Path) -> Any:
    """A JSON file of a run. Raises InputError for a damaged one."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it, or choose another --out") from None


def load_meta(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's metadata. Raises InputError for a damaged file."""
    try:
        return json.loads((checkpoint / "meta.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{checkpoint} is damaged ({error}): delete it, and the one before it is used") from None


def load_args(args_type: type, meta: dict[str, Any]) -> Any:
    """The arguments that a checkpoint was trained with. Raises InputError when today's stage has other fields."""
    try:
        return args_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["args"].items()})
    except TypeError as error:
        raise InputError(f"the checkpoint is of commit {meta.get('commit')}, whose {meta.get('stage')}.py had other "
                         f"arguments ({error}): check that commit out, or train again") from None


def check_resume(checkpoint: Path, windows: Windows) -> None:
    """Raises InputError when the data sets are no longer those that a checkpoint was trained on."""
    then, now = load_meta(checkpoint)["statistics"], json.loads(json.dumps(windows.statistics()))
    if changed := [source for source in now if then.get(source) != now[source]]:
        raise InputError(f"the data at {changed} have other statistics than when {checkpoint} was trained: put back "
                         f"the data set that it saw, or choose another --out")


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({error}): delete its folder, and the one before it is used") from None


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Fills an unsharded model, strictly. Raises InputError naming what is missing, left over or of another shape."""
    load_tensors(model, _load_tensors(checkpoint / "model.safetensors"), str(checkpoint))


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copies tensors into the model's parameters and buffers of the same names, strictly (see `load_weights`)."""
    own = model.state_dict()
    both = [k for k in own if k in tensors]
    missing, extra = [k for k in own if k not in tensors], [k for k in tensors if k not in own]
    shapes = {k: (tuple(tensors[k].shape), tuple(own[k].shape)) for k in both if tensors[k].shape != own[k].shape}
    if missing or extra or shapes:
        some = {k: shapes[k] for k in list(shapes)[:5]}
        raise InputError(
            f"{source} does not fit this model: {len(missing)} tensors missing {missing[:5]}, {len(extra)} left over "
            f"{extra[:5]}, {len(shapes)} of another shape (there, here) {some}; use a checkpoint of this size and stage"
        )
    model.load_state_dict(tensors)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Restores AdamW's moments by parameter name, into a sharded or an unsharded model."""
    from torch.distributed.checkpoint import state_dict as sd

    options = sd.StateDictOptions(full_state_dict=True)
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in _load_tensors(checkpoint / "optimizer.safetensors").items():
        name, _, moment = key.rpartition("|")
        state.setdefault(name, {})[moment] = value
    groups = sd.get_optimizer_state_dict(model, optimizer, options=options)["param_groups"]
    sd.set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)


# --------------------------------------------------------------------------------------------------------------------
# Schedule and log
# --------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, floor: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to `floor` at the last step (Sec. 6.3)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class MetricsLog:
    """One JSON line a logged step in <run>/metrics.jsonl, and the same on the terminal. Ranks other than 0 write
    nothing. On resuming, lines past the checkpoint are dropped: they are about to be computed again."""

    def __init__(self, run: Path, start: int, steps: int, process: Process, desc: str):
        self.file = None
        if process.main:
            path = run / "metrics.jsonl"
            kept = [json.dumps(row) + "\n" for row in read_metrics(run) if start and row["step"] <= start]
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(kept))
            os.replace(partial, path)
            self.file = path.open("a")
        self.time = {"seconds": 0.0, "wait": 0.0}  # of the logged steps: how long, and how much of it without data
        self.bar = tqdm(total=steps, initial=start, desc=desc, unit="step", mininterval=1, disable=not process.main)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.file is None:
            return
        for key in self.time:
            self.time[key] += values.get(key, 0.0)
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        tqdm.write(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
            if self.time["seconds"]:
                print(f"waiting for data: {self.time['wait'] / self.time['seconds']:.1%} of the time")


def read_metrics(run: Path | str) -> list[dict[str, float]]:
    """The logged lines of a run; one that a kill cut short is left out."""
    path, rows = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return rows
