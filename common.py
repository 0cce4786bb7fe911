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
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
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


class DamagedEpisode(InputError):
    """One episode cannot be read; the others may well be. Training passes over it and counts it (`Windows.draw`)."""


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
    at_least(args, workers=0, warmup=0, seed=0, val_every=0, lr=0, min_lr=0, weight_decay=0, betas=0, max_bad=0)
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
    """This process among all: `rank` of `world`, its `device`, the dtype of matrix products, and how many copies of a
    sharded model there are (see `sharding`)."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    replicas: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks (a collective: every rank must call it)."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def cat(self, values: Tensor) -> Tensor:
        """The ranks' tensors of one shape (B, ...) behind one another: (world * B, ...). Also a collective."""
        if self.world == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def gather(self, values: list) -> list:
        """The ranks' lists behind one another, on every rank: a collective without tensors."""
        parts: list = [values] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def here() -> Process:
    """This process by itself, without seeding anything: float32 on a CPU, bfloat16 on a GPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    return Process(0, 1, device, torch.bfloat16 if cuda else torch.float32)


def setup(seed: int, replicas: int = 1, cpu_bf16: bool = False) -> Process:
    """Joins torchrun's process group if there is one, picks the device and seeds the weights' initialisation.

    Every rank gets the same seed, so that all build the same initial model. Matrix products are in bfloat16 on a GPU,
    and with `cpu_bf16` on CPUs that have instructions for it. Raises InputError where the ranks cannot be divided into
    so many replicas."""
    process = here()
    if cpu_bf16 and process.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        process = dataclasses.replace(process, dtype=torch.bfloat16)
        torch.backends.cuda.enable_flash_sdp(False)  # also the CPU's: its backward pass is slow in bfloat16
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if replicas < 1 or world % replicas:
        raise InputError(f"--replicas {replicas} does not divide {world} processes: give the number of nodes, or 1, "
                         f"and start with `torchrun --nnodes NODES --nproc-per-node GPUS`")  # fmt: skip
    cuda = process.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(process.device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    torch.manual_seed(seed)
    np.random.seed(seed)
    return dataclasses.replace(process, rank=rank, world=world, replicas=replicas)


def teardown(process: Process) -> None:
    """Leaves the process group. Call it after the sharded model and its optimizer are gone (`del`, gc), or gloo may
    abort at exit."""
    if process.world > 1:
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def sharding(process: Process) -> dict[str, Any]:
    """How `fully_shard` treats every module of a stage.

    One replica: every parameter is spread over all ranks (FSDP). Several: over world / replicas neighbouring ranks, and
    the replicas average their gradients (HSDP); with one replica a node, parameters travel inside the nodes and only
    gradients between them. Master weights and optimizer are float32, matrix products in `process.dtype`, gradients
    summed in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    shape, names = (process.replicas, process.world // process.replicas), ("replicate", "shard")
    if process.replicas == 1:
        shape, names = shape[1:], names[1:]
    mesh = init_device_mesh(process.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=process.dtype, reduce_dtype=torch.float32)
    return {"mesh": mesh, "mp_policy": policy}


class Updates:
    """An optimizer's steps, with the gradient's global norm clipped. A step whose loss or gradient is not finite on any
    rank is skipped on all, counted in tally["skipped"], and leaves parameters and moments as they are.

    Raises InputError when `patience` steps in a row were skipped (5, our choice)."""

    patience = 5

    def __init__(self, optimizer: torch.optim.Optimizer, clip: float, process: Process, tally: dict[str, int]):
        self.optimizer, self.clip, self.process, self.tally, self.in_a_row = optimizer, clip, process, tally, 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, loss: Tensor) -> float:
        """Ends a step whose gradients are there: `loss` is this rank's. Returns the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss = self.process.sum(loss) / self.process.world  # what is not finite on one rank is not in the sum either
        if torch.isfinite(loss + norm):
            self.optimizer.step()
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.tally["skipped"] += 1
            if self.process.main:
                tqdm.write(f"step skipped: loss {loss.item():.4g}, gradient norm {norm.item():.4g}")
        self.optimizer.zero_grad(set_to_none=True)
        if self.in_a_row == self.patience:
            raise InputError(
                f"{self.patience} steps in a row with a loss or gradient that is not finite: train anew with a lower "
                f"--lr (now {self.optimizer.param_groups[0]['lr']:.3g}) and another --out; if it was the hardware, add "
                f"--resume to go on from the last checkpoint"
            )
        return norm.item()


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


def canonical(quaternion: np.ndarray) -> np.ndarray:
    """Of the two quaternions (..., 4) xyzw of a rotation the one whose w is positive. Where w is 0, a half turn, the
    first of x, y, z that is not 0 is positive: without this rule two names for one pose would remain."""
    q = np.asarray(quaternion)
    wxyz = q[..., [3, 0, 1, 2]]
    first = np.take_along_axis(wxyz, (wxyz != 0).argmax(-1)[..., None], -1)
    return np.where(first < 0, -q, q)


def conform(unified: np.ndarray, names: Sequence[str], all_names: Sequence[str], what: str) -> np.ndarray:
    """Unified values (n, len(all_names)) with grippers clipped to [0, 1] and quaternions canonical, of those named.

    Raises InputError, which begins with `what`, its {} filled in, for a gripper that leaves [0, 1] by more than noise,
    and for quaternions without length 1."""
    out = np.array(unified)
    for side, a, s in _ARMS:
        gripper = out[:, s + 7 if all_names is STATE_NAMES else a + 6]
        if gripper.min() < -0.05 or gripper.max() > 1.05:
            raise InputError(
                f"{what.format(side + ' gripper')} runs from {gripper.min():.3g} to {gripper.max():.3g}, and must from "
                "0 (closed) to 1 (open): give scale and offset in a mapping"
            )
        np.clip(gripper, 0, 1, out=gripper)
        if all_names is STATE_NAMES and f"{side}_qw" in names:
            q = out[:, s + 3 : s + 7]
            if (np.abs(np.linalg.norm(q, axis=1) - 1) > 0.05).any():
                raise InputError(f"{what.format(side + ' quaternion')} without length 1: map xyzw by name")
            q[:] = canonical(q)
    return out


def relative_action(position: np.ndarray, quaternion: np.ndarray, position2: np.ndarray, quaternion2: np.ndarray):
    """The six numbers (..., 6) that lead from one pose to another: dp, and Euler xyz of R2 R1^T (base frame)."""
    one, two = (Rotation.from_quat(np.reshape(q, (-1, 4))) for q in (quaternion, quaternion2))
    # At a pitch of +-90 degrees roll and yaw turn about one axis: scipy gives it all to roll, the rotation is right.
    euler = (two * one.inv()).as_euler("xyz", suppress_warnings=True).reshape(*np.shape(position)[:-1], 3)
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
        out[..., a + 3 : a + 6] = turn.as_euler("xyz", suppress_warnings=True).reshape(*out.shape[:-1], 3)
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


def seen_from(camera: np.ndarray, action: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same actions (N, 44) and states (N, 46) in the frames of cameras (N, 7), position and quaternion xyzw: what a
    hand does is told as the camera sees it (Sec. 6.1). A rotation R becomes C^T R C. Absent hands stay zero."""
    action, state, turn = action.copy(), state.copy(), Rotation.from_quat(camera[:, 3:]).inv()
    for _, a, s in _ARMS:
        action[:, a : a + 3] = turn.apply(action[:, a : a + 3])
        spin = turn * Rotation.from_euler("xyz", action[:, a + 3 : a + 6]) * turn.inv()
        action[:, a + 3 : a + 6] = spin.as_euler("xyz", suppress_warnings=True)
        if state[:, s + 3 : s + 7].any():
            state[:, s : s + 3] = turn.apply(state[:, s : s + 3] - camera[:, :3])
            state[:, s + 3 : s + 7] = (turn * Rotation.from_quat(state[:, s + 3 : s + 7])).as_quat(canonical=True)
    for values, first, origin in ((action, 14, 0.0), (state, 16, camera[:, None, :3])):
        tips = values[:, first:].reshape(-1, 10, 3)
        if tips.any():
            values[:, first:] = np.einsum("nij,nfj->nfi", turn.as_matrix(), tips - origin).reshape(-1, 30)
    return action, state


# --------------------------------------------------------------------------------------------------------------------
# Quantile normalisation (Sec. 6.3: "following pi0.5, quantile normalization for action and state")
# --------------------------------------------------------------------------------------------------------------------

_ACTION, _STATE = "action", "observation.state"  # LeRobot's columns, and the keys of their statistics

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


def stride_for(fps: float, hz: float) -> int:
    """How many frames of a data set a step of a window at `hz` spans; 1 for slower data, which keep their own rate."""
    return max(1, round(fps / hz))


RATES = (10.0, 5.0)  # Hz of the full run's and of --small's windows: a written data set has statistics for both


class Statistics:
    """LeRobot's statistics of rows (N, width) that come in parts and need not fit in memory: min, max, mean, std, count
    and the quantiles 1 and 99 %, of each column by itself.

    Quantiles are exact up to 2 KEEP rows. From then on 2 KEEP values are sorted and every other one is dropped, the
    rest counting twice; their like is thinned again to count four times, and so on (Munro and Paterson's selection with
    limited storage). N rows take log2(N / KEEP) levels, each of which displaces a rank by at most N / (2 KEEP); as the
    lower and the upper of a pair are dropped by turns, it is far less in practice."""

    KEEP = 1 << 14

    def __init__(self, width: int):
        self.width = width
        self.count, self.mean, self.moment = np.zeros(width, np.int64), np.zeros(width), np.zeros(width)
        self.low, self.high = np.full(width, np.inf), np.full(width, -np.inf)
        self.levels: list[list[np.ndarray]] = [[] for _ in range(width)]  # [column][h]: values that count 2**h times
        self.thinned: list[list[int]] = [[] for _ in range(width)]  # how often, for the turns

    def add(self, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Takes in rows (N, width); of those, with a mask (N, width), only the entries that are True."""
        values = np.asarray(values)
        for d in range(self.width):
            column = values[:, d] if mask is None else values[mask[:, d], d]
            if len(column):
                wide = column.astype(np.float64)
                mean = wide.mean()
                self._moments(d, len(wide), mean, ((wide - mean) ** 2).sum(), wide.min(), wide.max())
                self._push(d, 0, column.astype(np.float32))

    def merge(self, other: "Statistics") -> None:
        """Takes in the rows of another one, say those of another shard."""
        for d in range(self.width):
            if other.count[d]:
                self._moments(d, other.count[d], other.mean[d], other.moment[d], other.low[d], other.high[d])
            for h, values in enumerate(other.levels[d]):
                self._push(d, h, values)

    def _moments(self, d: int, n: int, mean: float, moment: float, low: float, high: float) -> None:
        """Mean and sum of squared deviations of a union (Chan et al.)."""
        total, away = self.count[d] + n, mean - self.mean[d]
        self.moment[d] += moment + away * away * self.count[d] * n / total
        self.mean[d] += away * n / total
        self.count[d] = total
        self.low[d], self.high[d] = min(self.low[d], low), max(self.high[d], high)

    def _push(self, d: int, h: int, values: np.ndarray) -> None:
        levels, thinned = self.levels[d], self.thinned[d]
        if len(levels) == h:
            levels.append(np.empty(0, np.float32))
            thinned.append(0)
        levels[h] = np.concatenate([levels[h], values])
        while len(levels[h]) >= 2 * self.KEEP:
            block, levels[h] = np.sort(levels[h][: 2 * self.KEEP]), levels[h][2 * self.KEEP :]
            thinned[h] += 1
            self._push(d, h + 1, block[thinned[h] % 2 :: 2])

    def quantile(self, q: float) -> np.ndarray:
        """The quantile q of each column (width,), interpolated as numpy does."""
        out = np.empty(self.width)
        for d, levels in enumerate(self.levels):
            weights = np.repeat(2 ** np.arange(len(levels)), [len(v) for v in levels])
            values = np.concatenate(levels).astype(np.float64)
            order = np.argsort(values, kind="stable")
            values, weights = values[order], weights[order]
            ranks = np.cumsum(weights) - (weights + 1) / 2  # of the middle of the rows that a value stands for
            out[d] = np.interp(q * (self.count[d] - 1), ranks, values)
        return out

    def result(self) -> dict[str, list]:
        """min, max, mean, std, q01 and q99 per column, and count. Raises InputError for a column without rows."""
        if not self.count.all():
            raise InputError(f"no values for columns {np.flatnonzero(self.count == 0).tolist()} of {self.width}")
        out = {"min": self.low, "max": self.high, "mean": self.mean, "std": np.sqrt(self.moment / self.count)}
        out |= {"q01": self.quantile(0.01), "q99": self.quantile(0.99)}
        return {k: v.tolist() for k, v in out.items()} | {"count": [int(self.count.max())]}


def quantile_stats(values: np.ndarray) -> dict[str, list]:
    """The statistics of rows (N, D) that are all there."""
    total = Statistics(np.shape(values)[1])
    total.add(values)
    return total.result()


class DatasetStatistics:
    """The statistics of a data set, episode by episode, by the keys of its meta/stats.json: `observation.state`,
    `action`, and `action.stride<N>` for actions composed over N steps, which windows at a lower rate consist of. Every
    frame counts once: all windows that `Windows` can draw start somewhere, and each start has one action."""

    def __init__(self, action_names: Sequence[str], state_names: Sequence[str], strides: Sequence[int]):
        self.action_names, self.state_names, self.strides = action_names, state_names, sorted({1, *strides})
        self.totals = {action_key(n): Statistics(len(action_names)) for n in self.strides if action_names}
        self.totals |= {_STATE: Statistics(len(state_names))} if state_names else {}

    def add(self, episode: dict[str, Any]) -> None:
        """Takes in an episode as `LeRobotReader.episode` returns it, as seen from its camera where that moves."""
        camera, state = episode.get("camera"), episode["state"]
        if self.state_names:
            seen = state if camera is None else seen_from(camera, episode["action"], state)[1]
            self.totals[_STATE].add(gather(seen, self.state_names, STATE_NAMES))
        for n in self.strides if self.action_names else ():
            starts = np.arange(max(0, episode["steps"] - n + 1))
            actions = strided_actions(episode, starts, n)
            if camera is not None:
                actions = seen_from(camera[starts], actions, state[starts])[0]
            self.totals[action_key(n)].add(gather(actions, self.action_names, ACTION_NAMES))

    def merge(self, other: "DatasetStatistics") -> None:
        for key, total in self.totals.items():
            total.merge(other.totals[key])

    def result(self) -> dict[str, dict]:
        """By key; a stride that is longer than every episode has none."""
        return {key: total.result() for key, total in self.totals.items() if total.count.all()}


def action_key(stride: int) -> str:
    """The name of the statistics of actions composed over `stride` steps."""
    return _ACTION if stride == 1 else f"{_ACTION}.stride{stride}"


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

_IMAGE = "observation.images."
_CAMERA = "observation.camera"  # where the camera moves: its pose, 7 numbers, in the frame of action and state
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

    meta/stats.json gets the statistics of actions as they are and composed to 10 and 5 Hz (RATES)."""

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
        here = (self.action_names, self.state_names, self.cameras, float(self.fps), self.moving_camera)
        names = tuple(tuple(old.mapping.get(kind) or ()) for kind in ("action", "state"))
        sizes = {name: tuple(old.info["features"][key]["shape"][:2]) for name, key in old.mapping["images"].items()}
        there = (*names, sizes, float(old.fps), _CAMERA in old.info["features"])
        if here != there:
            raise InputError(f"{self.root} holds columns, cameras, fps and moving camera {there}, not {here}: choose "
                             f"another --out")  # fmt: skip
        self.tasks = {t: i for i, t in enumerate(old.tasks)}
        self.subtasks = {t: i for i, t in enumerate(old.subtasks)}
        self.episodes = old.episodes
        self.file = self.episodes[-1]["data/chunk_index"] * 1000 + self.episodes[-1]["data/file_index"] + 1
        for i in tqdm(range(old.num_episodes), "statistics so far", unit="episode", mininterval=1, leave=False):
            self.statistics.add(old.episode(i))
        if old.info["total_episodes"] != len(self.episodes):
            self._write_meta()  # the kill fell between the list of episodes and the rest of the metadata

    def add_episode(
        self, frames: dict[str, np.ndarray | Clip], action: np.ndarray, state: np.ndarray, task: str,
        subtasks: Sequence[str] | None = None, camera: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """One episode of n steps: frames[camera] uint8 (n, H, W, 3) or a `Clip` of them, action (n, A), state (n, S),
        the instruction, optionally the text of the present phase at each step, and with `moving_camera` the camera's
        pose (n, 7). Raises InputError where shapes or values do not fit."""
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
        self.pending.append((action, state, task, list(subtasks) if subtasks is not None else [task] * n, pose))
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
        for action, state, task, subtasks, camera in self.pending:
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
            unified = {"action": scatter(action, self.action_names, ACTION_NAMES), "steps": n}
            unified |= {"state": scatter(state, self.state_names, STATE_NAMES)}
            self.statistics.add(unified | {"state_mask": np.isin(STATE_NAMES, self.state_names), "camera": camera})
        while self.videos:
            self.videos.popitem()[1].close()
        lists = {}
        for k, (key, names) in enumerate(((_ACTION, self.action_names), (_STATE, self.state_names))):
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
            for key, names in ((_ACTION, self.action_names), (_STATE, self.state_names))
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


def _rotations(columns: dict[str, np.ndarray], all_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns (n,) by name, with rotations told as `all_names` tells them: a mapping may also name Euler angles (state:
    roll, pitch, yaw, extrinsic xyz) and rotation vectors (rx, ry, rz), where a side has all three."""
    columns, euler = dict(columns), partial(Rotation.from_euler, "xyz")
    own = ("qx", "qy", "qz", "qw") if all_names is STATE_NAMES else ("roll", "pitch", "yaw")
    for side in _SIDES:
        for told, read in ((("roll", "pitch", "yaw"), euler), (("rx", "ry", "rz"), Rotation.from_rotvec)):
            names = [f"{side}_{n}" for n in told]
            if names[0] not in all_names and all(n in columns for n in names):
                turn = read(np.stack([columns.pop(n) for n in names], 1))
                values = turn.as_quat() if all_names is STATE_NAMES else turn.as_euler("xyz")
                columns |= {f"{side}_{n}": v for n, v in zip(own, values.T, strict=True)}
    return columns


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
        video_only = self.info.get("action_free") or (self.mapping_path and m.get("state") == m.get("action") == {})
        if not (m.get("state") or m.get("action") or video_only):
            raise InputError(f"{self.source}: neither `{_STATE}` nor `{_ACTION}` with names in meta/info.json; {hint}")
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
        none = {"q01": [], "q99": []}  # of video without actions
        action = self.stats.get(action_key(stride)) if self.action_names else none
        state = self.stats.get(_STATE) if self.state_names else none
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
                wanted |= {_CAMERA} & set(self.info["features"])
                lacking = sorted(wanted - set(names))
                if lacking:
                    raise InputError(f"{path} lacks the columns {lacking}: convert the data set again")
                wanted |= {"subtask_index"} & set(names)
                self._tables[str(path)] = pq.read_table(path, columns=sorted(wanted))
            except (OSError, pa.ArrowInvalid) as error:
                raise DamagedEpisode(f"cannot read {path} of {self.source}: {error}; copy the file again") from None
            while len(self._tables) > 16:
                self._tables.popitem(last=False)
        self._tables.move_to_end(str(path))
        table = self._tables[str(path)]
        rows = np.flatnonzero(table["episode_index"].to_numpy() == row["episode_index"])
        if len(rows) != row["length"]:
            raise DamagedEpisode(
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

    def _columns(self, i: int, table: pa.Table, kind: str, all_names: Sequence[str]) -> np.ndarray:
        """Mapped columns of episode i, values[:, index] * scale + offset, in unified places (n, len(all_names))."""
        mapping = self.mapping.get(kind) or {}
        arrays = {name: self._array(table[name]) for name in {c["column"] for c in mapping.values()}}
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
        n = steps = len(table)
        state = self._columns(i, table, "state", STATE_NAMES)
        if self.mapping.get("action"):
            action = self._columns(i, table, "action", ACTION_NAMES)
        elif self.mapping.get("target"):
            action = self._change(state, self._columns(i, table, "target", STATE_NAMES))
        else:
            action, steps = self._change(state, np.concatenate([state[1:], state[-1:]])), n - 1
        if (number := table["task_index"][0].as_py()) not in range(len(self.tasks)):
            raise DamagedEpisode(f"{self.source}: episode {i} has task {number} of {len(self.tasks)}: leave it out")
        task = self.tasks[number]
        subtask = [task] * n
        if self.subtasks and "subtask_index" in table.column_names:
            subtask = [self.subtasks[k] for k in table["subtask_index"].to_pylist()]
        return {
            "action": action.astype(np.float32), "action_mask": np.isin(ACTION_NAMES, self.action_names),
            "state": state.astype(np.float32), "state_mask": np.isin(STATE_NAMES, self.state_names),
            "steps": steps, "task": task, "subtask": subtask,
            "camera": self._array(table[_CAMERA]) if _CAMERA in table.column_names else None,
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
        feature = self.info["features"][self.mapping["images"][camera]]
        listed = dict(zip(feature.get("names") or (), feature.get("shape") or (), strict=False))
        to_rgb = av.video.reformatter.VideoReformatter()  # one for all: a frame's own would make its tables anew
        try:
            container = self._open(path)
            stream = container.streams.video[0]
            base = float(stream.time_base)
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

    Sample i is a function of (seed, i): the data set by weight (see `choose`), then one of its frames, uniformly. So
    the stream does not depend on ranks or workers, and continues anywhere. An episode of one frame, in which nothing
    can happen, is left out; a damaged one is drawn around (see `draw`). A sample holds
        <view>        uint8 (frames, 3, size, size) for each view
        action        float32 (actions, 44), normalised; grippers 0 .. 1
        action_mask   bool (actions, 44)
        state         float32 (46,), normalised;  state_mask  bool (46,)
        instruction, subtask   str (the phase at t);   index, dataset, window   int
        damaged       str: what was passed over to find this window, a line each

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
        self.strides = [stride_for(r.fps, hz) for r in self.readers]
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
            ids = ids[reader.lengths[ids] > 1]
            if not len(ids):
                raise InputError(
                    f"{reader.source}: {reader.num_episodes} episodes, {(reader.lengths < 2).sum()} of them of one "
                    f"frame, leave none for the {split} split (one in {val_every} is held out): give more episodes or "
                    f"--val-every 0"
                )
            self.chosen.append(ids)
            self.ends.append(np.cumsum(reader.lengths[ids] - 1))
        self.weights = np.array(weights or [e[-1] for e in self.ends], np.float64)  # default: every frame counts alike
        self.weights /= self.weights.sum()
        self.reported: set[str] = set()  # damage that a message has named
        self.bounds = np.cumsum(self.weights)[:-1]  # of each data set's share of [0, 1)
        self.phase = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
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
        short = [int((r.lengths < 2).sum()) for r in self.readers]
        rows = [
            f"  {r.source}: {len(ids)} episodes, {r.lengths[ids].sum() / r.fps / 3600:.3g} hours, {e[-1]} windows, "
            f"{r.fps:g} Hz, stride {s}, weight {w:.3f}"
            + ("" if r.action_names else ", video without actions")
            + (f"; {n} of one frame left out" if n else "")
            for r, ids, e, s, w, n in zip(
                self.readers, self.chosen, self.ends, self.strides, self.weights, short, strict=True
            )
        ]
        return "\n".join(["data:", *rows])

    def longest_instruction(self) -> str:
        """The instruction with the most letters, to see at the start whether a model's context has room for it."""
        return max((task for reader in self.readers for task in reader.tasks), key=len, default="")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(index)

    def draw(self, index: int, pictures: bool = True) -> dict[str, Any]:
        """Sample `index` of the stream, on request without its pictures. Where it falls on a damaged episode, another
        window of the same data set is drawn, as (seed, index, attempt) decides. InputError after 100 attempts."""
        d, damaged = self.choose(index), []
        while len(damaged) < 100:
            rng = np.random.default_rng([self.seed, index, len(damaged)])
            try:
                sample = self.window(d, int(rng.integers(self.ends[d][-1])), pictures)
                return sample | {"index": index, "damaged": "\n".join(damaged)}
            except DamagedEpisode as error:
                damaged.append(" ".join(str(error).split()))
        raise InputError(f"100 draws in a row fell on damaged episodes, the last: {damaged[-1]}")

    def choose(self, index: int) -> int:
        """The data set of sample `index`: steps of the golden ratio through [0, 1), from a place that the seed gives.
        Any run of n samples holds each data set weight * n times to within two or three, where independent draws would
        be off by sqrt(n). As integers modulo 2^64, so that it is exact for any index."""
        at = (index * 0x9E3779B97F4A7C15 + self.phase) % 2**64 / 2**64
        return int(np.searchsorted(self.bounds, at, side="right"))

    def window(self, d: int, k: int, pictures: bool = True) -> dict[str, Any]:
        """The k-th window of data set d, on request without its pictures, which are the slow part. Raises
        DamagedEpisode."""
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
        state = ep["state"][t]
        if ep["camera"] is not None:  # the frame of all actions of a window is that of its first frame's camera
            once = lambda row: np.repeat(row[None], self.actions, 0)
            action, states = seen_from(once(ep["camera"][t]), action, once(state))
            state = states[0]
        mask = torch.from_numpy(inside[:, None] & ep["action_mask"])
        state, state_mask = torch.from_numpy(state), torch.from_numpy(ep["state_mask"])
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
            sample[name] = images if unique == wanted else images[[unique.index(f) for f in wanted]]
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
    windows: Windows, batch: int, start: int, process: Process, accumulate: int, workers: int,
    tally: dict[str, int] | None = None, max_bad: float = 0.01,
) -> Iterator[list[dict]]:  # fmt: skip
    """Endless training steps from step `start` on: each a list of `accumulate` micro-batches of `batch` samples for
    this rank. Step s takes samples s * (world * accumulate * batch) onwards, whoever computes them. A collective: every
    rank must draw its step.

    What the global batch passed over is counted in tally["bad"], and each kind of damage reported once. Raises
    InputError on all ranks when that is more than a share `max_bad` of all samples since step 0, or of the first 1000
    (our choice: else one early find would stop a run)."""
    tally = {"bad": 0} if tally is None else tally

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
    batches, drawn = iter(loader), start * accumulate * process.world * batch
    while True:
        step = [to_device(next(batches), process.device) for _ in range(accumulate)]
        drawn += accumulate * process.world * batch
        damaged = _report(windows, step, process)
        tally["bad"] += len(damaged)
        if damaged and tally["bad"] > max_bad * max(drawn, 1000):
            raise InputError(
                f"{tally['bad']} of {drawn} samples fell on damaged episodes, which is more than --max-bad {max_bad:g} "
                f"allows (of 1000 at least); the last: {damaged[-1]}; mend the data, or add --resume and a larger "
                f"--max-bad"
            )
        yield step


def _report(windows: Windows, batches: list[dict], process: Process) -> list[str]:
    """What all ranks passed over to draw these batches; each kind of damage is printed once. A collective."""
    damaged = process.gather([line for b in batches for text in b["damaged"] for line in text.splitlines()])
    for line in dict.fromkeys(damaged):
        if process.main and line not in windows.reported:
            tqdm.write(f"damaged, another window is drawn: {line}", file=sys.stderr)
    windows.reported |= set(damaged)
    return damaged


def held_out_batches(windows: Windows, samples: int, batch: int, process: Process) -> Iterator[dict]:
    """The first `samples` windows of a stream, dealt to the ranks in order, in batches of at most `batch`.

    A sharded model's forward pass is a collective, so that all ranks get equally many batches of the same sizes: where
    windows run out the last one repeats. It is not counted: `counted` bool (B,), and no valid action."""
    share = math.ceil(samples / process.world)
    for first in range(0, share, batch):
        rows = process.rank * share + np.arange(first, min(first + batch, share))
        out = collate([windows[min(i, samples - 1)] for i in rows.tolist()])
        out["counted"] = torch.from_numpy(rows < samples)
        out["action_mask"] = out["action_mask"] & out["counted"][:, None, None]
        _report(windows, [out], process)
        yield to_device(out, process.device)


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
    seen = dict(zip((width, layers, heads, mlp, "image_size", "patch_size"), vision, strict=True))
    read = dict(zip((width, layers, heads, "num_key_value_heads", mlp), text, strict=True))
    return {"vision": seen, "text": read | {"head_dim": 32}}


# Sizes of models that start from random weights. Widths are chosen so that a step takes a fraction of a second on two
# cores (tiny) or a second or two (small); layers, heads and tokens keep the full models' proportions (our choice).
VLM_SIZES: dict[str, dict[str, Any]] = {
    # vision: width, layers, heads, MLP, image and patch in pixels   text: width, layers, heads, key-value heads, MLP
    "internvl-tiny": _size(vision=(64, 2, 2, 128, 64, 8), text=(128, 2, 4, 2, 256)),
    "internvl-small": _size(vision=(128, 3, 4, 384, 96, 12), text=(192, 3, 6, 3, 576)),
    "paligemma-tiny": _size(vision=(96, 2, 4, 192, 64, 8), text=(128, 3, 4, 1, 256)),
    "paligemma-small": _size(vision=(192, 4, 4, 512, 96, 8), text=(256, 4, 8, 1, 768)),
}

# Pixel statistics each family was pretrained with.
PIXELS = {"internvl": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "paligemma": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


def load_vlm(source: str, config: dict | None = None, tokenizer_dir: Path | None = None):
    """A vision-language model and its tokenizer: `(model, tokenizer)`.

    source: a size of VLM_SIZES ("internvl-tiny": random weights, our tokenizer), or a local folder or hub name in
    Hugging Face's layout (InternVL or PaliGemma, pretrained weights in one safetensors file or in shards). With
    `config` and `tokenizer_dir`, both from a checkpoint of ours, the same architecture is built without weights, to be
    filled by the caller.

    Raises InputError when the source is neither, of another family, damaged, or not a perfect fit."""
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
        options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = classes[family].from_pretrained(source, **options)
        check_loading(report, source)
        return model, tf.AutoTokenizer.from_pretrained(source)
    except InputError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(
            f"no vision-language model at {source!r}: give a local folder, a reachable hub name, or a size "
            f"of {sorted(VLM_SIZES)} ({str(error).splitlines()[0]})"
        ) from None


# What Hugging Face's libraries raise for weights that are absent (a shard, too), unreachable or damaged.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def check_loading(report: dict[str, Any], source: str) -> None:
    """Raises InputError naming the tensors by which published weights differ from what their config.json describes.

    report: what transformers' `from_pretrained` returns with `output_loading_info`; by itself it only warns, and a run
    would start from half a model."""
    missing, extra = (sorted(report.get(f"{k}_keys") or ()) for k in ("missing", "unexpected"))
    shapes = {k: (tuple(there), tuple(here)) for k, there, here in sorted(report.get("mismatched_keys") or ())}
    _check_fit(source, missing, extra, shapes)


def _check_fit(source: str, missing: list[str], extra: list[str], shapes: dict[str, tuple]) -> None:
    if missing or extra or shapes:
        some = {k: shapes[k] for k in list(shapes)[:5]}
        raise InputError(
            f"{source} does not fit this model: {len(missing)} tensors missing {missing[:5]}, {len(extra)} left over "
            f"{extra[:5]}, {len(shapes)} of another shape (there, here) {some}; use a checkpoint of this size and stage"
        )


def published_tensors(source: str, subfolder: str, name: str = "diffusion_pytorch_model") -> dict[str, Tensor]:
    """All tensors of published weights: NAME.safetensors, or the shards that NAME.safetensors.index.json lists, from a
    local folder or a hub repository (also its cache, without a connection).

    diffusers' own loader believes the index: a tensor that a shard lacks would stay random."""
    from huggingface_hub import snapshot_download

    folder = Path(source)
    if not folder.is_dir():
        wanted = [f"{subfolder}/{name}{end}" for end in (".safetensors", ".safetensors.index.json", "-*.safetensors")]
        folder = Path(snapshot_download(source, allow_patterns=wanted))
    folder = folder / subfolder
    index = folder / f"{name}.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {f"{name}.safetensors"}
    return {k: v for file in sorted(files) for k, v in load_file(folder / file).items()}


def report_loading(model: nn.Module, sources: dict[str, nn.Module]) -> str:
    """What of each pretrained source is in `model`, what of it is left over, and what in `model` is new (random, or
    zero by design): number of tensors, parameters, and the names. Several ranks print it once.

    sources: {where it came from: the model as it was loaded, whose parameters `model` took over}"""

    def tell(named: list[tuple[str, Tensor]]) -> str:
        groups = list(dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in named))  # encoder.head, not its parts
        names = f" ({', '.join(groups)})" if 0 < len(groups) <= 12 else ""
        return f"{len(named)} tensors, {sum(p.numel() for _, p in named) / 1e6:.1f} M parameters{names}"

    own, known, lines = {id(p) for p in model.parameters()}, set(), []
    for source, loaded in sources.items():
        named = list(loaded.named_parameters())  # a tied tensor once
        taken, left = [x for x in named if id(x[1]) in own], [x for x in named if id(x[1]) not in own]
        known |= {id(p) for _, p in named}
        size = f"{len(taken)} tensors, {sum(p.numel() for _, p in taken) / 1e6:.1f} M parameters"
        lines.append(f"{source}: loaded {size}; left over {tell(left)}")
    lines.append(f"new: {tell([x for x in model.named_parameters() if id(x[1]) not in known])}")
    text = "\n".join(lines)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text)
    return text


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
    other arguments: bit-exact resuming would be a lie. The number of ranks may change where the global batch stays the
    same: the run then goes on with the same samples, and to rounding with the same numbers. A folder without a
    checkpoint or a line of log holds nothing that could be lost, and is taken over."""
    run, kept, now = Path(out), None, json.loads(json.dumps(dataclasses.asdict(args), default=str))
    now["world"] = process.world
    found = checkpoints(run)
    if found or read_metrics(run):
        if not resume:
            at = found[-1].name if found else "no checkpoint yet"
            raise InputError(f"{run} already holds a run ({at}): add --resume to continue it, or choose another --out")
        spread = ("batch", "accumulate", "world")  # whose product is the global batch
        free = {"resume", "out", "workers", "log_every", "save_every", "preload", "max_bad", "replicas", *spread}
        then = {"world": 1} | read_json(run / "args.json")
        before, after = (math.prod(a.get(k, 1) for k in spread) for a in (then, now))
        if before != after:
            each, rest = divmod(before, process.world)
            fit = f"--batch and --accumulate with product {each}" if not rest else f"ranks that divide {before}"
            raise InputError(f"{run} has a global batch of {before} windows (batch x accumulate x ranks), this command "
                             f"one of {after}: choose {fit}")  # fmt: skip
        changed = {k: (then.get(k), v) for k, v in now.items() if k not in free and then.get(k) != v}
        if changed:
            raise InputError(f"{run} was started with other arguments (then, now): {changed}; choose another --out")
        kept = found[-1] if found else None
    if len(seen := set(process.gather([str(kept)]))) > 1:  # nobody writes before everybody has looked
        raise InputError(f"the ranks find different checkpoints in {run} ({sorted(seen)}): all nodes must share --out")
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
    left as it is: a resumed run is bit-exact, so it would write the same.

    Every rank must call it: sharded tensors are gathered one at a time and moved to the host memory of rank 0, which
    needs room for the weights (4 bytes a parameter), and after them for the moments (8 bytes)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    offload = process.world > 1 or process.device.type == "cuda"
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    final = run / f"checkpoints/step_{step:08d}"
    partial, writes = final.with_name(final.name + ".partial"), process.main and not final.exists()
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tokenizer.save_pretrained(partial)

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        if writes:
            # On a CPU these are the model's own: cloned, because safetensors refuses tied weights, which share memory.
            tensors = tensors if offload else {k: v.detach().clone() for k, v in tensors.items()}
            save_file({k: v.contiguous() for k, v in tensors.items()}, partial / f"{name}.safetensors")

    # Only rank 0 gets the gathered state; the others get an empty dictionary.
    write("model", get_model_state_dict(model, options=options))
    moments = get_optimizer_state_dict(model, optimizer, options=options).get("state", {}) if optimizer else {}
    write("optimizer", {f"{name}|{k}": v for name, state in moments.items() for k, v in state.items()})
    if writes:
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
    if changed := [source for source in then | now if then.get(source) != now.get(source)]:
        raise InputError(f"the data at {changed} have other statistics than when {checkpoint} was trained, or were not "
                         f"there, or no longer are: put back the data that it saw, or choose another --out")


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
    _check_fit(source, missing, extra, shapes)
    model.load_state_dict(tensors)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Restores AdamW's moments by parameter name, into a sharded or an unsharded model."""
    from torch.distributed.checkpoint import state_dict as sd

    state: dict[str, dict[str, Tensor]] = {}
    for key, value in _load_tensors(checkpoint / "optimizer.safetensors").items():
        name, _, moment = key.rpartition("|")
        state.setdefault(name, {})[moment] = value
    groups = sd.get_optimizer_state_dict(model, optimizer)["param_groups"]  # without options: nothing is gathered
    options = sd.StateDictOptions(full_state_dict=True)
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
