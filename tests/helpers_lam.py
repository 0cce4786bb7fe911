"""Shared by test_lam.py and test_train.py: a small synthetic data set, and running a stage as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import common

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("push the red square", "move the red square onto the blue square, slowly and without touching anything")


def make_data(root: Path, episodes: int = 8, length: int = 14, size: int = 64) -> Path:
    """A red square that moves to a blue one and lets go, seen by two cameras; the actions are its motion."""
    rng = np.random.default_rng(0)
    with common.LeRobotWriter(root, cameras={"primary": (size, size), "wrist": (size, size)}) as writer:
        for e in range(episodes):
            n = length + e % 3
            position, goal = rng.uniform(12, size - 12, 2), rng.uniform(12, size - 12, 2)
            frames = np.full((n, size, size, 3), 60, np.uint8)
            action, state = np.zeros((n, 7), np.float32), np.zeros((n, 8), np.float32)
            action[:, 6] = state[:, 7] = np.arange(n) < 2 * n // 3
            state[:, 6] = 1  # no rotation
            for t in range(n):
                step = np.clip(goal - position, -4, 4)
                for (x, y), half, colour in ((goal, 4, (50, 50, 200)), (position, 6, (200, 50, 50))):
                    frames[t, int(y) - half : int(y) + half, int(x) - half : int(x) + half] = colour
                action[t, :2], state[t, :2] = step / 100, position / 100
                position = position + step
            subtasks = ["move to the square" if t < 2 * n // 3 else "let go of it" for t in range(n)]
            writer.add_episode({"primary": frames, "wrist": frames[:, ::-1].copy()}, action, state, TASKS[e % 2], subtasks)
    return root


def command(*args: object, ranks: int = 1) -> list[str]:
    """The command line of a script of this repository, under torchrun for several ranks."""
    words = [str(a) for a in args]
    if ranks > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]
    return [sys.executable, *words]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def run(*args: object, ranks: int = 1, code: int | None = 0, timeout: float = 240) -> subprocess.CompletedProcess:
    """Runs a script and checks its exit code (None: any)."""
    done = subprocess.run(
        command(*args, ranks=ranks), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert code is None or done.returncode == code, f"exit {done.returncode}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def metrics(run_folder: Path) -> list[dict]:
    """The log of a run without what may differ between two equal runs: times."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "wait")} for line in lines]
