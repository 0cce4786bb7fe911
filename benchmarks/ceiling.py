"""What demonstrations alone can teach: a small network that need not see, because it is told where everything is.

    python benchmarks/ceiling.py                                # 10 demonstrations of each task, 2 minutes of a core
    python benchmarks/ceiling.py --demonstrations 100 --noise 0.005

Of each task an MLP of its own learns the expert's next command from the poses of the tool and of every thing; of
pick_cup, the cup that is asked for comes first. It meets the placements of seed 0, as whoever tunes. So it says what
the demonstrations are worth by themselves, without anything learned before: a policy that must find things first has a
harder time, and one that brings movements along from elsewhere an easier one. `noise` stands for eyes that err: each
thing is told that much beside where it is, anew each tick."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import InputError
from franka import TASKS, SimFranka, demonstrate, run_trial

WIDTH = 256  # of the two hidden layers
SPREAD = 0.1  # added to each feature's standard deviation: what hardly varies in demonstrations must not explode


@dataclass
class Args:
    demonstrations: int = 10
    """Of each task, the first of seed 1."""
    disturb: float = 2.5
    """How hard they are disturbed: see `franka.Disturbance`."""
    tilt: float = 0.0
    """How hard disturbances tilt the tool, beside."""
    noise: float = 0.0
    """Standard deviation (m) of each coordinate of each thing, while learning and while acting."""
    steps: int = 2000
    """AdamW's steps, of 256 samples."""
    trials: int = 20
    """Of each task, of seed 0."""
    seed: int = 0
    """Seed of the weights, the samples and the noise."""
    json: str = ""
    """Write the table to this file, too."""


class Told:
    """A policy (the interface of franka.ChunkPolicy) that is told where everything is."""

    name, phase = "told", ""

    def __init__(self, robot: SimFranka, args: Args):
        self.robot, self.args, self.rng = robot, args, np.random.default_rng(args.seed)
        bodies = [robot.model.body(i) for i in range(1, robot.model.nbody)]
        root = lambda body: robot.model.body(body.rootid[0]).name
        self.bodies = [b.name for b in bodies if root(b) != "base" and not root(b).startswith("distractor")]

    def features(self) -> np.ndarray:
        """In units of about a decimetre: (n,)."""
        robot, first = self.robot, getattr(self.robot.task, "target", "")
        (here, turned), told = robot.pose(), []
        for name in sorted(self.bodies, key=lambda name: name != first):
            position, facing = robot.where(name)
            position = position + self.rng.normal(0, self.args.noise, 3)
            told += [8 * (position - here), 5 * position, facing.as_matrix()[:, :2].ravel()]
        told += [5 * here, Rotation.from_quat(turned).as_matrix()[:, :2].ravel(), [robot.opening()]]
        return np.concatenate(told).astype(np.float32)

    def learn(self, seen: np.ndarray, done: np.ndarray) -> float:
        """From features (N, n) and actions (N, 7). Returns the last step's loss."""
        torch.manual_seed(self.args.seed)
        self.inputs, self.outputs = ((x.mean(0), x.std(0)) for x in (seen, done[:, :6]))
        self.net = nn.Sequential(nn.Linear(seen.shape[1], WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(),
                                 nn.Linear(WIDTH, 7))  # fmt: skip
        optimizer = torch.optim.AdamW(self.net.parameters(), 1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.args.steps)
        x, moves = self.scaled(seen), torch.from_numpy((done[:, :6] - self.outputs[0]) / (self.outputs[1] + 1e-6))
        for _ in range(self.args.steps):
            some = torch.randint(len(x), (256,))
            found = self.net(x[some])
            loss = F.mse_loss(found[:, :6], moves[some])
            loss = loss + F.binary_cross_entropy_with_logits(found[:, 6], torch.from_numpy(done[some, 6]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss.item()

    def scaled(self, features: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((features - self.inputs[0]) / (self.inputs[1] + SPREAD))

    def reset(self, robot: SimFranka) -> None: ...

    @torch.no_grad()
    def act(self, observation, instruction: str) -> np.ndarray:
        found = self.net(self.scaled(self.features())).numpy()
        return np.append(found[:6] * self.outputs[1] + self.outputs[0], found[6] > 0)


def collect(told: Told, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, n) and actions (N, 7) of the demonstrations."""
    robot, seen, done = told.robot, [], []
    observe = robot.observe

    def look():  # `demonstrate` looks once after a reset, and once after each tick
        seen.append(told.features())
        return observe()

    for trial in range(3 * args.demonstrations):  # as the recorder: what fails does not count
        start = len(seen)
        robot.observe = look
        episode, _ = demonstrate(robot, trial, 1, args.disturb, args.tilt)
        robot.observe = observe
        del seen[start + (len(episode["action"]) if episode else 0) :]
        done += [episode["action"]] if episode else []
        if len(done) == args.demonstrations:
            break
    else:
        raise InputError(f"{robot.task.name}: {len(done)} of {3 * args.demonstrations} attempts succeed with --disturb "
                         f"{args.disturb:g} --tilt {args.tilt:g}: choose less")  # fmt: skip
    return np.stack(seen), np.concatenate(done).astype(np.float32)


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    common.at_least(args, demonstrations=1, disturb=0, tilt=0, noise=0, steps=1, trials=1, seed=0)
    rows = []
    print(f"{'task':12s} {'ticks':>6s} {'loss':>6s} {'successes':>9s}")
    for task in TASKS:
        robot = SimFranka(task, 0)
        told = Told(robot, args)
        seen, done = collect(told, args)
        loss = told.learn(seen, done)
        entries = [run_trial(told, robot, k, 0) for k in tqdm(range(args.trials), task, leave=False, disable=None)]
        why = Counter(entry["reason"] for entry in entries if not entry["success"])
        row = {"task": task, "ticks": len(seen), "loss": round(loss, 4), "trials": args.trials,
               "successes": sum(entry["success"] for entry in entries)}  # fmt: skip
        rows.append(row)
        most = why.most_common(1)[0][0] if why else ""
        print(f"{task:12s} {len(seen):6d} {loss:6.3f} {row['successes']:5d}/{args.trials:<3d}  {most}")
    share = sum(row["successes"] for row in rows) / (len(rows) * args.trials)
    print(f"mean: {share:.0%}")
    if args.json:
        common.write_json(Path(args.json), rows)


if __name__ == "__main__":
    common.run_main(main, resumes=False)
