"""What must never differ between LatBot's stages.

Process setup, the command line, the paper's unified action and state spaces (Sec. 6.1), the quantile normaliser
(Sec. 6.3), image preprocessing, prompt templates (Sec. 6.2), construction of the vision-language models, checkpoints,
the learning-rate schedule and the metrics log. Data sets are read and written by `data.lerobot`, and `data.windows`
makes training samples of them.

Admission test for this file: would a bug in it otherwise have to be fixed twice? There is no loss, no stage's block,
no training loop and no environment here.

Conventions, once and for all:
- Translation in metres, rotation in radians, in the robot's base frame. Gripper: 1 = open, 0 = closed.
- `action[t]` is the target commanded at t relative to the pose measured at t: dp = p_target - p, and the extrinsic xyz
  Euler angles of dR = R_target R^T (a rotation of its own, never a difference of Euler angles).
- Quaternions are xyzw, of the two of a rotation the one that `canonical` chooses.
- Every random draw is a function of (seed, sample number) and of nothing else: not of the rank, the number of workers,
  or how often the run was interrupted. This is what makes resuming bit-exact.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
    """Raises InputError for a numeric argument, or one of several, that is below its bound, infinite or NaN."""
    for name, low in least.items():
        value = getattr(args, name)
        for v in value if isinstance(value, tuple) else (value,):
            if v is not None and not low <= v < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {v}: must be at least {low:g} and finite")


def check_training(args: Any) -> None:
    """Raises InputError for a value that no learning stage can work with."""
    at_least(args, steps=1, batch=1, accumulate=1, save_every=1, log_every=1, val_samples=1)
    at_least(args, workers=0, warmup=0, seed=0, val_every=0, lr=0, min_lr=0, weight_decay=0, betas=0, max_bad=0)
    at_least(args, muon=0)
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
        tqdm.write(f"error: {text}", file=sys.stderr)  # on a line of its own, where a bar is open
        sys.exit(2)
    except KeyboardInterrupt:
        more = " with --resume to continue" if resumes else " again"
        tqdm.write(f"interrupted; run the same command{more}", file=sys.stderr)
        sys.exit(130)
    except (NotADirectoryError, FileExistsError, FileNotFoundError, PermissionError) as error:
        print(f"error: {error.filename}: {error.strerror}; choose another --out", file=sys.stderr)
        sys.exit(2)


def wilson(successes: float, trials: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate, 95 % by default. Returns (low, high) in [0, 1]."""
    if trials == 0:
        return 0.0, 1.0
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # p is inside, whatever rounding does


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


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def choose_attention(process: Process) -> None:
    """Fused attention for the whole process, but on a CPU in bfloat16, where its backward pass is slow."""
    slow = process.device.type == "cpu" and process.dtype == torch.bfloat16
    torch.backends.cuda.enable_flash_sdp(not slow)  # the switch is also the CPU's


def setup(seed: int, replicas: int = 1, cpu_bf16: bool = False) -> Process:
    """Joins torchrun's process group if there is one, picks the device and seeds the weights' initialisation.

    Every rank gets the same seed, so that all build the same initial model. Matrix products are in bfloat16 on a GPU,
    and with `cpu_bf16` on CPUs that have instructions for it; attention is that of `choose_attention`. Raises
    InputError where the ranks cannot be divided into so many replicas."""
    process = here()
    if cpu_bf16 and process.device.type == "cpu" and cpu_has_bf16():
        process = dataclasses.replace(process, dtype=torch.bfloat16)
    choose_attention(process)
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


class Muon(torch.optim.Muon):
    """PyTorch's Muon, its updates scaled to AdamW's size. Only the precision of its products is our own: PyTorch's are
    in bfloat16, which takes three to four times as long as float32 on a CPU that has no instructions for it."""

    def __init__(self, params: list[dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                mean = self.state[p]["momentum_buffer"]
                mean.lerp_(p.grad, 1 - momentum)
                fast = p.device.type != "cpu" or cpu_has_bf16()
                update = p.grad.lerp(mean, momentum).to(torch.bfloat16 if fast else torch.float32)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"]),
                       alpha=-lr * 0.2 * max(p.shape) ** 0.5)  # fmt: skip


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix of any shape with its singular values moved near 1, by the iteration of Newton and Schulz (Jordan et
    al., 2024): x <- a x + b (x x') x + c (x x')^2 x."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Optimizers(list):
    """AdamW; or Muon (Jordan et al., 2024; its updates scaled to AdamW's size) for the matrices of the layers, and
    AdamW for the rest: a list that is stepped and saved as one. Only parameters that are trained at the time are in it.

    args: lr and betas of AdamW, `muon`, Muon's learning rate, or 0 for none, and the weight_decay of both. shares:
    parameters whose names begin with a key learn at its share of both rates, all others at 1. Raises InputError where
    Muon's learning rate could not follow AdamW's."""

    def __init__(self, model: nn.Module, args: Any, shares: dict[str, float] | None = None):
        if args.muon and not args.lr:
            raise InputError(f"--muon {args.muon:g} follows the schedule of --lr, which is 0: give --lr, too")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        layers = [f"{name}.weight" for name, part in model.named_modules()
                  if isinstance(part, nn.Linear) and re.search(r"\.\d+\.", name)]  # fmt: skip
        matrices = {name: trained.pop(name) for name in layers if args.muon and name in trained}
        decay, self.ratios = args.weight_decay, (1.0, args.muon / args.lr if args.muon else 0.0)
        of = lambda name: next((share for start, share in (shares or {}).items() if name.startswith(start)), 1.0)
        self.shares, groups = [], []
        for parameters, lr in ((trained, args.lr), (matrices, args.muon)):
            self.shares.append(sorted({of(name) for name in parameters}, key=lambda share: share != 1))  # 1 first
            groups.append([{"params": [p for n, p in parameters.items() if of(n) == share], "lr": lr * share}
                           for share in self.shares[-1]])  # fmt: skip
        super().__init__([torch.optim.AdamW(groups[0], args.lr, args.betas, weight_decay=decay)])
        if matrices:
            self.append(Muon(groups[1], args.muon, decay))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self for group in optimizer.param_groups]

    def rate(self, lr: float) -> None:
        """Sets AdamW's learning rate, and Muon's in proportion."""
        for optimizer, ratio, shares in zip(self, self.ratios, self.shares, strict=False):
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = lr * ratio * share

    def step(self) -> None:
        for optimizer in self:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self:
            optimizer.zero_grad(set_to_none)


class Updates:
    """An optimizer's steps, with the gradient's global norm clipped. A step whose loss or gradient is not finite on any
    rank is skipped on all, counted in tally["skipped"], and leaves parameters and moments as they are.

    Raises InputError when `patience` steps in a row were skipped (5, our choice)."""

    patience = 5

    def __init__(
        self, optimizer: torch.optim.Optimizer | Optimizers, clip: float, process: Process, tally: dict[str, int]
    ):
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

SIDES, _FINGERS = ("left", "right"), ("thumb", "index", "middle", "ring", "little")
_TIPS = tuple(f"{s}_{finger}_{axis}" for s in SIDES for finger in _FINGERS for axis in "xyz")
ACTION_NAMES = (*(f"{s}_{n}" for s in SIDES for n in ("x", "y", "z", "roll", "pitch", "yaw", "gripper")), *_TIPS)  # 44
STATE_NAMES = (*(f"{s}_{n}" for s in SIDES for n in ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper")), *_TIPS)  # 46
ARM_ACTION = ACTION_NAMES[7:14]  # a single arm is the right arm (our choice)
ARM_STATE = STATE_NAMES[8:16]
GRIPPERS = tuple(ACTION_NAMES.index(f"{s}_gripper") for s in SIDES)  # columns 6 and 13
MOTION = tuple(i for i in range(len(ACTION_NAMES)) if i not in GRIPPERS)  # the 42 columns with a squared error
ARMS = (("left", 0, 0), ("right", 7, 8))  # side, its first column in the actions, its first column in the states


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


# Half a turn from this posture a quaternion changes its sign. Any rule has such a place; the usual one, w >= 0, has it
# where many robots' tools point down (half a turn from the base's axes, so that w wobbles about 0) and noise would pick
# the sign. From here it is at least 69 degrees from upright, 86 and 54 from half a turn about x and y, and 9 from any
# posture along the axes (our choice; `tests/test_spaces.py` counts).
POSTURE = np.array([6, 4, 1, 5])  # xyzw; its length does not matter


def canonical(quaternion: np.ndarray) -> np.ndarray:
    """Of the two quaternions (..., 4) xyzw of a rotation the one nearer to POSTURE. Exactly half a turn from there the
    first component that is not 0 is positive: without this rule two names for one pose would remain."""
    q = np.asarray(quaternion)
    side, first = (q @ POSTURE)[..., None], np.take_along_axis(q, (q != 0).argmax(-1)[..., None], -1)
    return np.where(np.where(side == 0, first, side) < 0, -q, q)


def conform(unified: np.ndarray, names: Sequence[str], all_names: Sequence[str], what: str) -> np.ndarray:
    """Unified values (n, len(all_names)) with grippers clipped to [0, 1] and quaternions canonical, of those named.

    Raises InputError, which begins with `what`, its {} filled in, for a gripper that leaves [0, 1] by more than noise,
    and for quaternions without length 1."""
    out = np.array(unified)
    for side, a, s in ARMS:
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
    """The pose (position (..., 3), quaternion xyzw (..., 4)) reached by the six numbers (..., 6)."""
    action = np.asarray(action, np.float64)
    turn = Rotation.from_euler("xyz", action[..., 3:6].reshape(-1, 3))
    quat = (turn * Rotation.from_quat(np.reshape(quaternion, (-1, 4)))).as_quat()
    return np.asarray(position) + action[..., :3], canonical(quat).reshape(*action.shape[:-1], 4)


def compose_actions(actions: np.ndarray) -> np.ndarray:
    """One unified action (..., 44) with the effect of several (..., S, 44): translations add, rotations multiply (the
    later one from the left), the last gripper command holds."""
    actions = np.asarray(actions, np.float64)
    out = actions.sum(-2)
    for _, a, _ in ARMS:
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
    for _, a, s in ARMS:
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
    for _, a, s in ARMS:
        action[:, a : a + 3] = turn.apply(action[:, a : a + 3])
        spin = turn * Rotation.from_euler("xyz", action[:, a + 3 : a + 6]) * turn.inv()
        action[:, a + 3 : a + 6] = spin.as_euler("xyz", suppress_warnings=True)
        if state[:, s + 3 : s + 7].any():
            state[:, s : s + 3] = turn.apply(state[:, s : s + 3] - camera[:, :3])
            state[:, s + 3 : s + 7] = canonical((turn * Rotation.from_quat(state[:, s + 3 : s + 7])).as_quat())
    for values, first, origin in ((action, 14, 0.0), (state, 16, camera[:, None, :3])):
        tips = values[:, first:].reshape(-1, 10, 3)
        if tips.any():
            values[:, first:] = np.einsum("nij,nfj->nfi", turn.as_matrix(), tips - origin).reshape(-1, 30)
    return action, state


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
        try:
            quantiles = np.array([stats["q01"], stats["q99"]], np.float64)
        except (TypeError, ValueError):  # no numbers, or not equally many
            quantiles = np.empty((2, 0))
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
PLACES = 128  # that an image is divided into, from edge to edge


def loc(share: float) -> str:
    """PaliGemma's token for a place between an image's edges, 0 to 1; of its 1,024 every eighth. (our choice)"""
    return f"<loc{8 * min(PLACES - 1, int(PLACES * share)):04d}>"


_WORDS = """pick up the red cup pick up the blue cup put the block into the slot close the oven
dip the brush in the sauce put the pot in the oven move above reach for grasp close the gripper around lift release open
the gripper lower carry push pull slide turn stack place on top of beside left right front back plate bowl drawer towel
carrot spoon eggplant basket green yellow orange purple white black box ball handle door lid table arm hand robot then
user assistant over under near to with and of from towards align insert hold press stir
detect describe gripper left hand nothing ; cube brick bar tower cross puck can egg ball pink brown turquoise grey tray
platform podium shelf dish coaster lift raise take grab set down mug cabinet"""


def make_tokenizer():
    """A small byte-pair tokenizer with the special tokens of InternVL and PaliGemma, for models that start from
    random weights: made from the words above in milliseconds, needs no download, and spells out any other text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL + tuple(loc(i / PLACES) for i in range(PLACES))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=1, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator([*_WORDS.split(), _WORDS.replace("\n", " ")] * 2, trainer)
    # What the template says in every prompt is a token each: spelled out, it was half of the encoder's tokens.
    said = f"{LAM_QUESTION}[CP_SCE]{LAM_ANSWER}".replace("{sent}", "[CP_SCE]").replace("[CP_MOT]", "[CP_SCE]")
    core.add_tokens([part for part in said.split("[CP_SCE]") if len(part) > 1])
    core.add_tokens([f"Frame{f}: " for f in range(1, 17)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=list(special[4:]),
    )  # fmt: skip


def vlm_size(vision: tuple[int, ...], text: tuple[int, ...]) -> dict[str, dict[str, int]]:
    width, layers, heads, mlp = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    seen = dict(zip((width, layers, heads, mlp, "image_size", "patch_size"), vision, strict=True))
    read = dict(zip((width, layers, heads, "num_key_value_heads", mlp), text, strict=True))
    return {"vision": seen, "text": read | {"head_dim": 32}}


# Sizes of models that start from random weights. Widths are chosen so that a step takes a fraction of a second on two
# cores (tiny) or a second or two (small); layers, heads and tokens keep the full models' proportions (our choice).
VLM_SIZES: dict[str, dict[str, Any]] = {
    # vision: width, layers, heads, MLP, image and patch in pixels   text: width, layers, heads, key-value heads, MLP
    "internvl-tiny": vlm_size(vision=(64, 2, 2, 128, 64, 8), text=(128, 2, 4, 2, 256)),
    "internvl-small": vlm_size(vision=(128, 3, 4, 384, 96, 12), text=(192, 3, 6, 3, 576)),
    "paligemma-tiny": vlm_size(vision=(96, 2, 4, 192, 64, 8), text=(128, 3, 4, 1, 256)),
    "paligemma-small": vlm_size(vision=(192, 4, 4, 512, 96, 12), text=(256, 4, 8, 1, 768)),
}

# Pixel statistics each family was pretrained with.
PIXELS = {"internvl": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "paligemma": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}

# pi0.5 as lerobot publishes it (lerobot/pi05_base): PaliGemma, whose tokenizer goes with it, and an action expert.
PI05 = vlm_size(vision=(1152, 27, 16, 4304, 224, 14), text=(2048, 18, 8, 1, 16384))
PI05["text"] |= {"head_dim": 256, "vocab_size": 257152, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
PI05["expert"] = {"hidden_size": 1024, "intermediate_size": 4096, "action_dim": 32}
PI05_TOKENIZER = "google/paligemma-3b-pt-224"
PI05_PART = "paligemma_with_expert."  # what the names of both halves begin with, after an optional "model."


def paligemma_config(vision: dict[str, Any], text: dict[str, Any], image_token: int):
    """PaliGemma's configuration from those of its halves, as in VLM_SIZES; `text` names the vocabulary, too."""
    import transformers as tf

    return tf.PaliGemmaConfig(
        vision_config=vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text | {"model_type": "gemma"}, image_token_index=image_token,
        vocab_size=text["vocab_size"], projection_dim=text["hidden_size"], hidden_size=text["hidden_size"],
    )  # fmt: skip


def sinusoids(side: int, width: int) -> Tensor:
    """Sines and cosines (side ** 2, width) of the row and of the column of side x side patches, with wavelengths from
    2 side patches down to a quarter of side."""
    pace = torch.pi / side * 2 ** (3 * torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([f(x.reshape(-1, 1) * pace) for x in (row, column) for f in (torch.sin, torch.cos)], 1)


def know_neighbours(model: nn.Module) -> None:
    """Gives PaliGemma's position embeddings, where they are to be learned, a start that knows which patches are
    neighbours: its own is random and small (our choice)."""
    if model.config.model_type == "paligemma":
        positions, vision = model.model.vision_tower.embeddings.position_embedding.weight, model.config.vision_config
        positions.data.copy_(0.5 * sinusoids(vision.image_size // vision.patch_size, vision.hidden_size))


def load_vlm(source: str, config: dict | None = None, tokenizer_dir: Path | None = None):
    """A vision-language model and its tokenizer: `(model, tokenizer)`.

    source: a size of VLM_SIZES ("internvl-tiny": random weights, our tokenizer), or a local folder or hub name in
    Hugging Face's layout (InternVL or PaliGemma, pretrained weights in one safetensors file or in shards), or in
    lerobot's of pi0.5 (see `load_pi05`). With `config` and `tokenizer_dir`, both from a checkpoint of ours, the same
    architecture is built without weights, to be filled by the caller.

    Raises InputError when the source is neither, of another family, damaged, or not a perfect fit."""
    import transformers as tf

    tf.logging.set_verbosity_error()
    classes = {"internvl": tf.InternVLForConditionalGeneration, "paligemma": tf.PaliGemmaForConditionalGeneration}
    if config is not None:
        kind = classes[config["model_type"]]
        model = kind._from_config(kind.config_class.from_dict(config), dtype=torch.float32)
        know_neighbours(model)
        try:
            return model, tf.AutoTokenizer.from_pretrained(tokenizer_dir)
        except LOADING_ERRORS as error:
            why = str(error).splitlines()[0]
            raise InputError(f"{tokenizer_dir}: no tokenizer ({why}): delete it, the one before it is used") from None
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
            # Qwen3's rotary base of a million is made for 40,000 positions; this one tells apart a few hundred.
            text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
            made = tf.InternVLConfig(
                vision_config=vision, text_config=text | {"model_type": "qwen3"}, image_token_id=ids("<IMG_CONTEXT>"),
                image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2 // 4,
            )  # fmt: skip
        else:
            made = paligemma_config(vision, text, ids("<image>"))
        model = classes[family]._from_config(made, dtype=torch.float32)
        if family == "internvl":
            # The class leaves position embeddings at zero for pretrained weights to fill: trained from there, the
            # encoder takes long to tell places apart. Born at the scale of its patch embeddings instead (our choice).
            torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.2)
        know_neighbours(model)
        return model, tokenizer
    try:
        if is_pi05(source):
            return load_pi05(source)
        family = tf.AutoConfig.from_pretrained(source).model_type
        if family not in classes:
            raise InputError(f"{source} is a {family!r} model; this stage needs one of {sorted([*classes, 'pi05'])}")
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

    folder, stem = Path(source), (Path(subfolder) / name).as_posix()
    if not folder.is_dir():
        wanted = [stem + end for end in (".safetensors", ".safetensors.index.json", "-*.safetensors")]
        folder = Path(snapshot_download(source, allow_patterns=wanted))
    index = folder / f"{stem}.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {f"{name}.safetensors"}
    return {k: v for file in sorted(files) for k, v in load_file(folder / subfolder / file).items()}


def is_pi05(source: str) -> bool:
    """Whether a folder or hub name holds pi0.5 as lerobot writes it. Raises OSError where it has no config.json."""
    from transformers.utils import cached_file

    found = cached_file(source, "config.json")
    if found is None:  # a folder, but without it
        raise OSError(f"no config.json in {source}")
    return json.loads(Path(found).read_text()).get("type") == "pi05"


def pi05_rest() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of pi0.5 that are not its VLM's.

    The action expert is a Gemma without words, but with the head that its class has (nothing reads it). Its norms are
    adaptive: `dense` maps an embedding of the flow's time to a scale, a shift and a gate. The flow-matching heads map
    actions in and out (action_*_proj), and embed the time (time_mlp_*)."""
    text, (w, m, a) = PI05["text"], (PI05["expert"][k] for k in ("hidden_size", "intermediate_size", "action_dim"))
    q, kv = (text[f"num_{k}_heads"] * text["head_dim"] for k in ("attention", "key_value"))
    linear = lambda name, o, i: {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
    shapes = linear("action_in_proj", w, a) | linear("action_out_proj", a, w)
    shapes |= linear("time_mlp_in", w, w) | linear("time_mlp_out", w, w)
    expert = f"{PI05_PART}gemma_expert"
    shapes |= {f"{expert}.lm_head.weight": (text["vocab_size"], w)} | linear(f"{expert}.model.norm.dense", 3 * w, w)
    for i in range(text["num_hidden_layers"]):
        layer = f"{expert}.model.layers.{i}"
        inner = {"self_attn.q": (q, w), "self_attn.k": (kv, w), "self_attn.v": (kv, w), "self_attn.o": (w, q),
                 "mlp.gate": (m, w), "mlp.up": (m, w), "mlp.down": (w, m)}  # fmt: skip
        shapes |= {f"{layer}.{k}_proj.weight": shape for k, shape in inner.items()}
        shapes |= linear(f"{layer}.input_layernorm.dense", 3 * w, w)
        shapes |= linear(f"{layer}.post_attention_layernorm.dense", 3 * w, w)
    return shapes


def pi05_tensors(source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of pi0.5: its VLM's, as PaliGemmaForConditionalGeneration calls them, and those of `pi05_rest`.

    The published file has no embedding: the language head is the same matrix. Raises InputError naming every tensor of
    the rest that is absent, unknown or of another shape (the VLM's are checked where they are loaded), and where
    embedding and head are two different matrices."""
    tensors = {k.removeprefix("model."): v for k, v in published_tensors(source, "", "model").items()}
    prefix = f"{PI05_PART}paligemma."
    vlm = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
    words, head = "model.language_model.embed_tokens.weight", "lm_head.weight"
    if words in vlm and head in vlm and not torch.equal(vlm[words], vlm[head]):
        raise InputError(f"{source}: {prefix}{words} and {prefix}{head} differ, where pi0.5 has one matrix for both")
    expected, there = pi05_rest(), {k: tuple(v.shape) for k, v in tensors.items()}
    both = expected.keys() & there.keys()
    missing, extra = sorted(expected.keys() - there.keys()), sorted(there.keys() - expected.keys())
    _check_fit(source, missing, extra, {k: (there[k], expected[k]) for k in sorted(both) if there[k] != expected[k]})
    return vlm, tensors


def load_pi05(source: str):
    """pi0.5's VLM and its tokenizer, from a folder or hub name in lerobot's layout (lerobot/pi05_base: 812 tensors,
    3,616,757,520 parameters). `model.left_over` holds what is not the VLM's: {name: tensor}.

    lerobot ships no tokenizer with it: PaliGemma's is looked for in the folder, then on the hub (or in its cache).
    Raises InputError naming tensors that are absent, too many or of another shape, and where there is no tokenizer."""
    import transformers as tf

    vlm, rest = pi05_tensors(source)
    config = paligemma_config(PI05["vision"], PI05["text"], image_token=PI05["text"]["vocab_size"])
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = tf.PaliGemmaForConditionalGeneration.from_pretrained(None, config=config, state_dict=vlm, **options)
    check_loading(report, source)
    model.left_over = rest
    beside = (Path(source) / "tokenizer.json").exists()
    try:  # not AutoTokenizer: it wants a config.json of transformers' beside
        tokenizer = tf.PreTrainedTokenizerFast.from_pretrained(source if beside else PI05_TOKENIZER)
    except LOADING_ERRORS as error:
        raise InputError(
            f"{source} comes without a tokenizer, and that of {PI05_TOKENIZER} cannot be read "
            f"({str(error).splitlines()[0]}): accept the licence there, `hf auth login`, then `hf download "
            f"{PI05_TOKENIZER} tokenizer.json tokenizer_config.json`, or put these two beside the weights"
        ) from None
    ids = {k: getattr(tokenizer, f"{k}_token_id") for k in ("pad", "bos", "eos")}
    if ids != (expected := {k: PI05["text"][f"{k}_token_id"] for k in ids}):
        raise InputError(f"the tokenizer in {source} has the special tokens {ids}, pi0.5's {expected}: remove its "
                         f"files, or put those of {PI05_TOKENIZER} there")  # fmt: skip
    return model, tokenizer


def report_loading(model: nn.Module, sources: dict[str, nn.Module | list[tuple[str, Tensor]]]) -> str:
    """What of each pretrained source is in `model`, what of it is left over, and what in `model` is new (random, or
    zero by design): number of tensors, parameters, and the names. Several ranks print it once.

    sources: {where it came from: what was there, as a model or as named tensors, of which `model` took over some}"""

    def tell(named: list[tuple[str, Tensor]]) -> str:
        groups = list(dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in named))  # encoder.head, not its parts
        names = f" ({', '.join(groups)})" if 0 < len(groups) <= 12 else ""
        return f"{len(named)} tensors, {sum(p.numel() for _, p in named) / 1e6:.1f} M parameters{names}"

    own, known, lines = {id(p) for p in model.parameters()}, set(), []
    for source, loaded in sources.items():
        named = list(loaded.named_parameters() if isinstance(loaded, nn.Module) else loaded)  # a tied tensor once
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
    # Channel by channel, with plain numbers: a tensor made of them would be copied to a GPU in every call.
    channels = zip((images.float() / 255).unbind(-3), *PIXELS[family], strict=True)
    return torch.stack([(x - mean) / std for x, mean, std in channels], -3).to(dtype)


# --------------------------------------------------------------------------------------------------------------------
# Run folders and checkpoints
#
# runs/<preset>/<stage>/
#   args.json, metrics.jsonl
#   checkpoints/step_00000060/     written beside and renamed: it is whole, or it is not there
#     model.safetensors            every parameter and buffer, by name
#     optimizer.safetensors        AdamW's (and Muon's) moments, by parameter name
#     meta.json                    stage, step, args, sizes, git commit
#     tokenizer.json, ...          the tokenizer's own files
# --------------------------------------------------------------------------------------------------------------------


PROGRAMS = "*.py", "*.toml", "data"  # where any of these differs from a commit, its name gets a +


def git_commit() -> str:
    """This repository's commit, with a + when its programs differ from it; "unknown" outside a repository. Results and
    texts may differ: a queue writes them as it goes."""
    run = lambda *a: subprocess.run(["git", *a], cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    try:
        head = run("rev-parse", "--short=12", "HEAD").strip()
        differs = run("status", "--porcelain", "-uno", "--", *PROGRAMS).strip()
        return head + "+" * bool(differs) if head else "unknown"
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
    same: the run then goes on with the same samples, and to rounding with the same numbers. Not so with --stills, of
    which each rank and micro-step has its own. A folder without a checkpoint or a line of log holds nothing that could
    be lost, and is taken over."""
    run, kept, now = Path(out), None, json.loads(json.dumps(dataclasses.asdict(args), default=str))
    now["world"] = process.world
    found = checkpoints(run)
    if found or read_metrics(run):
        if not resume:
            at = found[-1].name if found else "no checkpoint yet"
            raise InputError(f"{run} already holds a run ({at}): add --resume to continue it, or choose another --out")
        spread = () if now.get("stills") else ("batch", "accumulate", "world")  # whose product is the global batch
        free = {"resume", "out", "workers", "log_every", "save_every", "preload", "max_bad", "replicas", *spread}
        then = read_json(run / "args.json")
        if not isinstance(then, dict):
            raise InputError(f"{run / 'args.json'} is damaged (no object): restore it, or choose another --out")
        defaults = json.loads(json.dumps(dataclasses.asdict(type(args)()), default=str))
        then = {"world": 1} | defaults | then  # an option that came later: the run did what its default does
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
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers | None, meta: dict,
    tokenizer: Any, process: Process, keep: int = 2,
) -> None:  # fmt: skip
    """Writes a checkpoint, whole or not at all, and removes all but the newest `keep`. A step that is already there is
    left as it is: a resumed run is bit-exact, so it would write the same. Then frees what memory it can.

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
    release_memory()
    process.barrier()


def release_memory() -> None:
    """Gives the system back what the C library keeps of freed memory; only glibc can. Batches of many lengths leave
    holes in its heap: two hours of `distill.py --small` on a CPU grew from 10 to 14 GB without this."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # other systems, other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside and renames: a reader never sees half a file, and several may write the same one. An innermost
    list or table takes one line."""
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")
    flat = lambda m: m[1] + re.sub(r"\n\s*", " ", m[2]) + m[3]  # a line break is never inside a JSON string
    text = re.sub(r"([\[{])\n\s*([^\[\]{}]*?)\n\s*([\]}])", flat, json.dumps(value, indent=1))
    partial.write_text(text + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """A JSON file of a run. Raises InputError for one that is absent or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): restore it, or choose another --out") from None


def load_meta(checkpoint: Path, *needed: str) -> dict[str, Any]:
    """A checkpoint's metadata. Raises InputError for a damaged file, and one that lacks what is `needed`."""
    try:
        meta = json.loads((checkpoint / "meta.json").read_text())
        if not isinstance(meta, dict) or (absent := {"stage", "step", *needed} - set(meta)):
            raise ValueError(f"no {' and '.join(sorted(absent)) if isinstance(meta, dict) else 'object'} in meta.json")
        return meta
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint} is damaged ({error}): delete it, and the one before it is used") from None


def load_args(args_type: type, meta: dict[str, Any]) -> Any:
    """The arguments that a checkpoint was trained with. Raises InputError when today's stage has other fields."""
    try:
        return args_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["args"].items()})
    except TypeError as error:
        raise InputError(f"the checkpoint is of commit {meta.get('commit')}, whose {meta.get('stage')}.py had other "
                         f"arguments ({error}): check that commit out, or train again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file of a run. Raises InputError for one that is absent or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({error}): delete its folder, and the one before it is used") from None


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Fills an unsharded model, strictly. Raises InputError naming what is missing, left over or of another shape."""
    load_tensors(model, read_tensors(checkpoint / "model.safetensors"), str(checkpoint))


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copies tensors into the model's parameters and buffers of the same names, strictly (see `load_weights`)."""
    own = model.state_dict()
    both = [k for k in own if k in tensors]
    missing, extra = [k for k in own if k not in tensors], [k for k in tensors if k not in own]
    shapes = {k: (tuple(tensors[k].shape), tuple(own[k].shape)) for k in both if tensors[k].shape != own[k].shape}
    _check_fit(source, missing, extra, shapes)
    model.load_state_dict(tensors)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers, checkpoint: Path) -> None:
    """Restores the moments by parameter name, into a sharded or an unsharded model. Raises InputError where there are
    none."""
    from torch.distributed.checkpoint import state_dict as sd

    if not (checkpoint / "optimizer.safetensors").exists():
        raise InputError(f"{checkpoint} has no optimizer.safetensors: what reproduce.py has finished keeps none, and "
                         f"cannot be trained further; choose another --out")  # fmt: skip
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(checkpoint / "optimizer.safetensors").items():
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
    """The logged lines of a run; one that a kill cut short, or that is none of ours, is left out."""
    path, rows = Path(run) / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
