"""Shared by test_lam.py and test_train.py: a small synthetic data set, and running a stage as a user does."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from data.lerobot import LeRobotWriter

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("push the red square", "move the red square onto the blue square, slowly and without touching anything")


STAGES = ("lam", "distill", "finetune")
PREVIOUS = {"lam": None, "distill": ("--lam", "lam"), "finetune": ("--init", "distill")}
# Small enough for a step to take a tenth of a second on one core.
COMMON = ("--tiny", "--val-every", 4, "--val-samples", 4, "--log-every", 1, "--warmup", 2)


def make_data(root: Path, episodes: int = 8, length: int = 14, size: int = 64, per_file: int = 50) -> Path:
    """A red square that moves to a blue one and lets go, seen by two cameras; the actions are its motion."""
    rng = np.random.default_rng(0)
    cameras = {"primary": (size, size), "wrist": (size, size)}
    with LeRobotWriter(root, cameras=cameras, episodes_per_file=per_file) as writer:
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
            views = {"primary": frames, "wrist": frames[:, ::-1].copy()}
            writer.add_episode(views, action, state, TASKS[e % 2], subtasks)
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
    assert code is None or done.returncode == code, f"exit {done.returncode}: {done.stderr[-4999:]}"
    return done


def start(*args: object, before: Callable[[], None] | None = None, env: dict[str, str] | None = None, log=None) -> int:
    """Starts `python SCRIPT ARGS` as a process of its own, forked from this one: what it imports is here already, which
    saves some seconds. `before` runs in it first. Returns its process id; its output goes to the file `log`.
    Not for scripts that render, use `run`: a fork of a process with a GL context hangs in it."""
    module = importlib.import_module(Path(str(args[0])).stem)
    if pid := os.fork():
        return pid
    code = 1
    try:
        out = log.fileno() if log else os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(k, "w", buffering=1, closefd=False) for k in (1, 2))
        os.chdir(ROOT)
        os.environ |= {"TOKENIZERS_PARALLELISM": "false"} | (env or {})
        torch.set_num_threads(1)
        signal.alarm(300)  # whatever hangs is ended, and fails its test
        # tqdm's own lock is shared with all forks: one that was killed while it held it would stop all later ones.
        tqdm.set_lock(threading.RLock())
        sys.argv = [str(a) for a in args]
        if before:
            before()
        common.run_main(module.main)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def forked(*args: object, before: Callable[[], None] | None = None, code: int | None = 0) -> tuple[int, str]:
    """Runs a script in a forked process to its end: (exit code, negative for a signal; all that it printed)."""
    with tempfile.TemporaryFile("w+") as log:
        status = os.waitstatus_to_exitcode(os.waitpid(start(*args, before=before, log=log), 0)[1])
        log.seek(0)
        text = log.read()
    assert code is None or status == code, f"exit {status}: {text[-4000:]}"
    return status, text


def forked_ranks(*args: object, ranks: int = 2, before: Callable[[], None] | None = None, code: int = 0) -> str:
    """The same script as several ranks, as torchrun would start them. Returns all that they printed."""
    env = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 10_000)}
    with tempfile.TemporaryFile("w+") as log:
        each = [env | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
        pids = [start(*args, env=e, before=before, log=log) for e in each]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        log.seek(0)
        text = log.read()
    assert codes == [code] * ranks, f"exit {codes}: {text[-4000:]}"
    return text


def metrics(run_folder: Path) -> list[dict]:
    """The log of a run without what may differ between two equal runs: times."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "wait")} for line in lines]


def weights(run_folder: Path, step: int = 8) -> bytes:
    return (run_folder / f"checkpoints/step_{step:08d}/model.safetensors").read_bytes()


def rewind(source: Path, target: Path, step: int = 4, **changes) -> None:
    """A copy of a run as a kill after the checkpoint of `step` left it: some lines of the log are already past it."""
    shutil.copytree(source, target)
    for found in common.checkpoints(target):
        if int(found.name[5:]) > step:
            shutil.rmtree(found)
    args = json.loads((target / "args.json").read_text()) | {"out": str(target)} | changes
    common.write_json(target / "args.json", args)


def refused(words: list[object], *says: str) -> None:
    """The command ends with one line `error: ...` that says so, exit code 2, and no traceback."""
    _, text = forked(*words, code=2)
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(w in lines[0] for w in says), text


def stage_command(stage: str, world: Path, out: Path, *more: object) -> list[object]:
    words: list[object] = [f"{stage}.py", *COMMON, "--data", world / "data", "--out", out]
    if PREVIOUS[stage]:
        words += [PREVIOUS[stage][0], world / PREVIOUS[stage][1]]
    if stage == "lam":
        words += ["--frames", 3]
    if "--batch" not in more:
        words += ["--batch", 4]
    if "--steps" not in more:
        words += ["--steps", 8]
    return [*words, "--save-every", 4, *more]
