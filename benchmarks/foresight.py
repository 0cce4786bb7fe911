"""What a student foresees, or what a policy would do, on demonstrations that it has never seen: task by task.

    python benchmarks/foresight.py                                              # the student's, two minutes of a core
    python benchmarks/foresight.py --start 1 --student runs/small/distill --data runs/data/play/fr3
    python benchmarks/foresight.py --policy runs/small/finetune

Windows are drawn from the last --episodes of each task, which a policy of few demonstrations has not seen; of data that
the student learned from, from what it held out for validation. With --start 1 they are the first of their episodes:
nothing moves yet, and where to go is known from what is seen and said alone; later the hand itself is on its way. The
hand is the right one.

Of a student (a run of distill.py), beside its teacher, which sees what happens:

    error       mean squared difference of Zhat to the teacher's Z
    of mean     the same of the mean Z of this row: who foresees what task it is, and nothing more
    r           correlation of where the hand goes within the window with where the teacher's action decoder reads from
                Zhat that it goes, both less their means in this row
    r teacher   the same, read from the teacher's own Z: what can be had at most

Of a policy (a run of finetune.py):

    mm, of      mean distance between the first command of a chunk and the demonstration's; mean length of the latter
    r           as above, of where the chunk leads
    gripper     share in which the gripper is to be open or closed as it was

Trials judge policies; this says what one sees before any. First commands tell them apart badly: the network of
ceiling.py is 8 mm off and succeeds twice as often as policies that are 6 mm off (results/LOG.md, 2026-11-23).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import distill
import finetune
import lam
from benchmarks import plan
from common import ACTION_NAMES, InputError, Process
from data import mixture
from data.windows import Windows, collate, to_device

# Shapes: B windows of a batch, N of a row, T actions of a window.

HAND = [ACTION_NAMES.index(f"right_{axis}") for axis in "xyz"]
GRIPPER = ACTION_NAMES.index("right_gripper")
FEWEST = 5  # windows of a task that has a row of its own


@dataclass
class Args:
    student: str = "runs/small/reproduce/student_latbot"
    """A run of distill.py."""
    policy: str = ""
    """A run of finetune.py, instead."""
    data: str = "runs/small/reproduce/demos"
    """A LeRobot data set of a robot."""
    lam: str = ""
    """The teacher; the one that the student's run names if not given."""
    episodes: int = 20
    """Of each task, the last so many that there are."""
    start: int = 0
    """Only windows that begin within so many frames from an episode's first; 0: all."""
    samples: int = 320
    """Windows, of all tasks together."""
    seed: int = 0
    """Seed of the windows."""
    json: str = ""
    """Write the table to this file, too."""


def batches(windows: Windows, args: Args, process: Process, size: int = 16) -> Iterator[dict[str, Any]]:
    """The windows that --episodes, --start and --samples choose. Raises InputError for data without actions."""
    reader, chosen, ends = windows.readers[0], windows.chosen[0], windows.ends[0]
    if not reader.action_names:
        raise InputError(f"--data {args.data} has no actions: choose a data set of a robot")
    names = np.array(reader.task_names)[chosen]
    last = np.isin(chosen, np.concatenate([chosen[names == name][-args.episodes :] for name in np.unique(names)]))
    long = reader.lengths[chosen] - 1
    spans = [np.arange(end - n, end)[: args.start or None] for end, n in zip(ends[last], long[last], strict=True)]
    some = np.random.default_rng(args.seed).permutation(np.concatenate(spans))[: args.samples]
    for k in range(0, len(some), size):
        samples = [windows.window(0, int(number)) | {"index": int(number)} for number in some[k : k + size]]
        yield to_device(collate(samples), process.device)


def metres(windows: Windows, action: Tensor) -> Tensor:
    """The right hand's translations (B, T, 3) in normalised actions (B, T, 44)."""
    return windows.action_norms[0].unnormalize(action.float())[..., HAND]


def table(tasks: list[str], columns: list[Tensor], row: Any) -> list[dict[str, Any]]:
    """`row` of all windows and of each task's, from columns (windows, ...)."""
    groups = {"all": range(len(tasks))} | {t: [i for i, s in enumerate(tasks) if s == t] for t in sorted({*tasks})}
    return [{"task": name, "windows": len(some), **row(*(c[list(some)] for c in columns))}
            for name, some in groups.items() if len(some) >= FEWEST or name == "all"]  # fmt: skip


def correlation(a: Tensor, b: Tensor) -> float:
    """Of vectors (N, 3), each less its mean."""
    return F.cosine_similarity((a - a.mean(0)).flatten(), (b - b.mean(0)).flatten(), dim=0).item()


@torch.no_grad()
def of_student(args: Args, process: Process) -> list[dict[str, Any]]:
    student, of, _ = distill.load_student(args.student)
    teacher, teacher_args, _ = lam.load_lam(args.lam or of.lam)
    if not teacher_args.uad:
        raise InputError(f"{args.lam or of.lam} decodes no actions (--no-uad), and from these it is read where the "
                         f"hand goes: give --student one whose teacher does")
    codec = lam.load_codec(teacher_args.decoder, teacher.decoder.config.in_channels, process)
    student, teacher, scene = student.to(process.device), teacher.to(process.device), teacher_args.scene_tokens
    learned = args.data in mixture.expand(of.data, of.weights)[0]
    of = replace(of, data=(args.data,), weights=(), val_every=of.val_every if learned else 0, preload=False)
    windows = distill.make_windows(of, teacher_args, student.image_size, "val")
    tasks, found = [], []
    for batch in batches(windows, args, process):
        with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
            told, current = distill.foresee(student.eval(), teacher.eval(), batch), codec.encode(batch["video"][:, 0])
            read = [lam.decode_actions(teacher, current, teacher.sets(z[:, :scene], z[:, scene:]), batch["index"],
                                       args.seed) for z in (told["hat"], told["z"])]  # fmt: skip
        inside, tasks = batch["action_mask"][..., HAND], tasks + batch["instruction"]
        goes = [(metres(windows, a) * inside).sum(1) for a in (batch["action"], *read)]
        found.append([told["hat"], told["z"], *goes])

    def row(hat: Tensor, z: Tensor, went: Tensor, read: Tensor, best: Tensor) -> dict[str, float]:
        return {"error": F.mse_loss(hat, z).item(), "of mean": F.mse_loss(z.mean(0).expand_as(z), z).item(),
                "r": correlation(read, went), "r teacher": correlation(best, went)}  # fmt: skip

    return table(tasks, [torch.cat(c).cpu() for c in zip(*found, strict=True)], row)


@torch.no_grad()
def of_policy(args: Args, process: Process) -> list[dict[str, Any]]:
    model = finetune.load_policy(args.policy, compile=False).model.to(process.device)
    of = common.load_args(finetune.Args, common.load_meta(common.find_checkpoint(args.policy, "finetune"), "args"))
    of = replace(of, data=(args.data,), episodes=0, val_every=0, preload=False)
    windows = finetune.make_windows(of, model.student.image_size, "all")
    tasks, found = [], []
    for batch in batches(windows, args, process):
        state = windows.state_norms[0].unnormalize(batch["state"])  # the policy has a normaliser of its own
        state = torch.where(model.state_mask, model.state_norm.normalize(state), 0.0)
        with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
            out = model(finetune.views(batch, of), state, batch["instruction"]).float()
        inside, tasks = batch["action_mask"][..., HAND], tasks + batch["instruction"]
        said, did = model.action_norm.unnormalize(out)[..., HAND] * inside, metres(windows, batch["action"]) * inside
        right = (out[:, 0, GRIPPER] > 0) == (batch["action"][:, 0, GRIPPER] > 0.5)
        found.append([said[:, 0], did[:, 0], said.sum(1), did.sum(1), right])

    def row(said: Tensor, did: Tensor, leads: Tensor, led: Tensor, right: Tensor) -> dict[str, float]:
        return {"mm": 1e3 * (said - did).norm(dim=1).mean().item(), "of": 1e3 * did.norm(dim=1).mean().item(),
                "r": correlation(leads, led), "gripper": right.double().mean().item()}  # fmt: skip

    return table(tasks, [torch.cat(c).cpu() for c in zip(*found, strict=True)], row)


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    common.at_least(args, episodes=1, start=0, samples=1, seed=0)
    plan.claim(args.json)
    process = common.setup(args.seed, cpu_bf16=True)
    rows = (of_policy if args.policy else of_student)(args, process)
    print(f"{'task':50s}" + "".join(f"{name:>10s}" for name in list(rows[0])[1:]))
    for row in rows:
        numbers = (f"{v:10d}" if isinstance(v, int) else f"{v:10.2f}" for v in list(row.values())[1:])
        print(f"{row['task'][:49]:50s}" + "".join(numbers))
    if args.json:
        common.write_json(Path(args.json), rows)


if __name__ == "__main__":
    common.run_main(main, resumes=False)
