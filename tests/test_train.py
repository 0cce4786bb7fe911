"""The training stages as a user runs them: they learn, a kill at any moment loses nothing that was saved, wrong
commands are refused, and importing them does nothing. For several ranks see test_distributed.py."""

import ast
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_lam import ROOT, STAGES, environment, forked, metrics, refused, rewind, stage_command, start, weights

import common

# -- learning ----------------------------------------------------------------------------------------------------------

FALLS = {"lam": "motion", "distill": "mse", "finetune": "ee"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_falls(stage, world):
    lines = metrics(world / stage)
    print(stage, lines[0], lines[-1])
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert lines[0].keys() == lines[-1].keys()  # the same numbers before and after
    key = f"val_{FALLS[stage]}"
    assert lines[-1][key] < 0.95 * lines[0][key]
    assert all(value == value for line in lines for value in line.values())  # no NaN


@pytest.mark.parametrize("stage", STAGES)
def test_run_folder(stage, world):
    """What each stage leaves behind: two checkpoints, each whole, with what the next stage needs inside."""
    found = common.checkpoints(world / stage)
    assert [p.name for p in found] == ["step_00000004", "step_00000008"]
    names = {"model.safetensors", "optimizer.safetensors", "meta.json", "tokenizer.json"}
    assert names <= {p.name for p in found[-1].iterdir()}
    assert not list((world / stage).rglob("*.partial")) and not list((world / stage).rglob("*.p*kl*"))
    meta = common.load_meta(found[-1])
    assert meta["stage"] == stage and meta["step"] == 8 and meta["args"]["batch"] == 4 and meta["commit"]
    assert any("q01" in s["action"] for s in meta["statistics"].values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_gets_what_the_command_line_says(stage, world, tmp_path):
    """AdamW's options, the schedule's learning rate at every step, and gradients clipped to --clip."""
    seen = tmp_path / "seen.jsonl"

    def record():
        class Recorder(torch.optim.AdamW):
            def step(self, *args, **kwargs):
                (group,) = self.param_groups
                norm = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm().item()
                row = {"norm": norm, **{k: group[k] for k in ("lr", "betas", "weight_decay")}}
                with seen.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                return super().step(*args, **kwargs)

        torch.optim.AdamW = Recorder

    options = ("--lr", 3e-3, "--min-lr", 1e-3, "--betas", 0.7, 0.8, "--weight-decay", 0.05, "--clip", 0.01)
    forked(*stage_command(stage, world, tmp_path / "run", "--steps", 4, *options), before=record)
    rows = [json.loads(line) for line in seen.read_text().splitlines()]
    assert [r["lr"] for r in rows] == [common.learning_rate(i, 4, 3e-3, 1e-3, 2) for i in range(4)]
    assert all(r["betas"] == [0.7, 0.8] and r["weight_decay"] == 0.05 for r in rows)
    assert all(abs(r["norm"] - 0.01) < 1e-4 for r in rows)  # these first gradients are all larger


# -- kills -------------------------------------------------------------------------------------------------------------

def killer(moment: str):
    """Arranges that this process kills itself at a moment of the save of step 8."""
    replace, write_json, save_file = os.replace, common.write_json, common.save_file

    def die_if(now: str, path: object) -> None:
        if now == moment and "step_00000008" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    def save(tensors, path):
        save_file(tensors, path)
        if path.name == "model.safetensors":
            die_if("model written", path)
        elif moment == "optimizer half written" and "step_00000008" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die_if(moment, path)

    def write(path, value):
        die_if("before meta", path)
        write_json(path, value)

    def rename(a, b):
        die_if("before rename", b if str(b).endswith("8") else "")
        replace(a, b)
        die_if("after rename", b if str(b).endswith("8") else "")

    common.save_file, common.write_json, os.replace = save, write, rename


MOMENTS = ("model written", "optimizer half written", "before meta", "before rename", "after rename")


@pytest.mark.parametrize(
    "stage,moment", [("lam", m) for m in MOMENTS] + [("distill", "model written"), ("finetune", "before rename")]
)
def test_killed_in_a_save(stage, moment, world, tmp_path):
    """SIGKILL inside the second save: --resume goes on from the first, and ends where the uninterrupted run ended."""
    out = tmp_path / stage
    words = stage_command(stage, world, out)
    forked(*words, before=lambda: killer(moment), code=-signal.SIGKILL)
    last = 8 if moment == "after rename" else 4
    assert common.find_checkpoint(out, stage).name == f"step_{last:08d}"
    forked(*words, "--resume")
    assert metrics(out) == metrics(world / stage)
    assert weights(out) == weights(world / stage)
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("stage,lines", [("lam", 3), ("lam", 8), ("distill", 7), ("finetune", 2), ("finetune", 6)])
def test_killed_while_training(stage, lines, world, tmp_path):
    """SIGKILL from outside, somewhere after so many lines of the log: before the first save (5 lines) and after it."""
    out = tmp_path / stage
    words = stage_command(stage, world, out)
    pid, log, deadline = start(*words), out / "metrics.jsonl", time.time() + 120
    while time.time() < deadline and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    forked(*words, "--resume")
    assert metrics(out) == metrics(world / stage)
    assert weights(out) == weights(world / stage)


# -- wrong commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_never_overwritten(stage, world):
    out = world / stage
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}
    refused(stage_command(stage, world, out), "already holds a run", "--resume", "--out")
    refused(stage_command(stage, world, out, "--resume", "--lr", 0.5), "lr", "0.5", "--out")
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_resumes_to_nothing(stage, world):
    before = weights(world / stage), metrics(world / stage)
    forked(*stage_command(stage, world, world / stage, "--resume"))
    assert before == (weights(world / stage), metrics(world / stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_path_can_be_put_right(stage, world, tmp_path):
    """A command that failed before it computed anything is no run: the corrected one may use the same folder."""
    words = stage_command(stage, world, tmp_path / stage)
    refused([tmp_path / "nowhere" if w == world / "data" else w for w in words], "nowhere", "--data")
    assert not (tmp_path / stage / "checkpoints").exists()
    forked(*words, "--steps", 1)


@pytest.mark.parametrize("stage,flag,other", [("distill", "--lam", "finetune"), ("finetune", "--init", "lam")])
def test_a_checkpoint_of_another_stage_is_refused(stage, flag, other, world, tmp_path):
    refused(stage_command(stage, world, tmp_path / stage, flag, world / other), other)


def test_a_teacher_that_moved_on_is_refused(world, tmp_path):
    """Resuming with another teacher than the one it learned from would not be the same run."""
    shutil.copytree(world / "lam", tmp_path / "lam")
    rewind(world / "distill", tmp_path / "distill", lam=str(tmp_path / "lam"))
    words = [str(w) for w in stage_command("distill", world, tmp_path / "distill", "--resume")]
    words[words.index("--lam") + 1] = str(tmp_path / "lam")
    path = common.checkpoints(tmp_path / "lam")[-1] / "meta.json"
    common.write_json(path, json.loads(path.read_text()) | {"time": 0.0})
    refused(words, "learned from another checkpoint", "--out")


@pytest.mark.parametrize("words", [("--steps", 0), ("--batch", 0), ("--accumulate", 0), ("--workers", -1),
                                   ("--log-every", 0), ("--lr", "nan"), ("--betas", 2, 3), ("--clip", 0), ("--hz", -5)])
def test_impossible_numbers_are_refused(words, world, tmp_path):  # fmt: skip
    out = tmp_path / "run"
    refused(["lam.py", "--tiny", "--out", out, "--data", world / "data", *words], words[0])
    assert not out.exists()


def test_an_output_folder_that_cannot_be_is_named(world, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(["lam.py", "--tiny", "--data", world / "data", "--out", tmp_path / "file/run"], "file", "--out")


def test_a_missing_teacher_names_the_command(world, tmp_path):
    refused(stage_command("distill", world, tmp_path / "out", "--lam", tmp_path / "tiny/lam"), "python lam.py --tiny")


# -- help, imports -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_fields_and_presets(stage):
    _, text = forked(f"{stage}.py", "--help")
    steps = importlib.import_module(stage).TINY.steps
    for word in ("--tiny", "--small", "--resume", "--lr", "(our choice)", "(Sec. 6.3)", f"steps={steps}"):
        assert word in text, word
    assert "Traceback" not in text


IMPORT = """
import os, sys
import numpy as np, torch
torch.manual_seed(7); np.random.seed(7)
for name in sys.argv[1].split(","):
    environment, argv, files = dict(os.environ), list(sys.argv), set(os.listdir("."))
    seed, state, threads = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    __import__(name)
    assert sys.argv == argv, name
    assert dict(os.environ) == environment, (name, set(os.environ.items()) ^ set(environment.items()))
    assert torch.equal(torch.get_rng_state(), seed) and (np.random.get_state()[1] == state).all(), name
    assert not torch.distributed.is_initialized() and torch.get_num_threads() == threads, name
    assert set(os.listdir(".")) == files, name
print("clean")
"""


def test_importing_does_nothing(tmp_path):
    """No flags read, no seed set, no process group, no environment variable, no file, nothing printed."""
    names = ",".join(sorted(modules()))
    words = [sys.executable, "-c", IMPORT, names, "--no-such-flag"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "clean\n"


DATA = {"common", "data.lerobot", "data.windows"}
ALLOWED = {
    "common": set(), "data.schema": {"common"}, "data.quantiles": {"common"},
    "data.lerobot": {"common", "data.schema", "data.quantiles"},
    "data.windows": {"common", "data.quantiles", "data.lerobot"},
    "lam": DATA | {"data.mixture"}, "distill": DATA | {"data.mixture", "data.stills", "lam"},
    "finetune": DATA | {"lam", "distill"},
    "evaluate": DATA | {"lam", "distill", "finetune", "franka"}, "franka": {"common", "data.lerobot"},
    "pretrain": {"common", "data.scenes", "data.stills"}, "reproduce": {"common", "franka"},
    "report": {"common", "franka", "reproduce"},
}  # fmt: skip


def modules() -> dict[str, Path]:
    """All of this repository, by the names under which they are imported."""
    files = (*ROOT.glob("*.py"), *ROOT.glob("data/[a-z]*.py"))
    return {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in files}


def imported(path: Path, anywhere: bool = True) -> set[str]:
    """The names of this repository's modules that a file imports (`anywhere`: also inside functions)."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found & modules().keys()


def test_imports_go_one_way():
    """common <- data.schema, data.quantiles <- data.lerobot <- data.windows <- lam <- distill <- finetune <- evaluate;
    franka needs common and data.lerobot, and a policy only where it runs one; distill needs still scenes, and with them
    the robot, only where it asks about them; reproduce needs the experts' version, report the rate of films; what else
    is in data needs no stage."""
    for name, path in modules().items():
        assert name in ALLOWED or name.startswith("data."), f"an unexpected script {path.name}"
        allowed = ALLOWED.get(name, {"common", "franka", *(m for m in modules() if m.startswith("data."))})
        assert imported(path, anywhere=name != "franka") <= allowed, path.name
    assert imported(ROOT / "franka.py") <= ALLOWED["franka"] | {"finetune"}
