"""Every command in the README and in the scripts' docstrings has flags that exist, and paths that agree."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tyro

import common
from data.windows import View, Windows

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("pretrain", "lam", "distill", "finetune", "evaluate", "franka")


def commands() -> list[str]:
    found = []
    for path in (ROOT / "README.md", *(ROOT / f"{s}.py" for s in SCRIPTS), *(ROOT / "data").glob("[a-z]*.py")):
        text = path.read_text()
        if path.suffix == ".py":
            text = text.split('"""')[1]
        for line in re.findall(r"^\s*((?:python|torchrun) .*)$", text, re.MULTILINE):
            for part in line.split("&&"):
                found.append(re.split(r"  +|#", part.strip())[0].strip())
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_a_command_parses(line):
    words = shlex.split(line)
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, w in enumerate(words) if w.endswith(".py")) :]]
    if words[1] == "-m":
        module = importlib.import_module(words[2])
        if hasattr(module, "TINY"):
            common.parse_args(module.Args, {"tiny": module.TINY, "small": module.SMALL}, "", words[3:])
        else:
            tyro.cli(module.Args, args=words[3:])
        return
    name = Path(words[1]).stem
    if name not in SCRIPTS:
        assert (ROOT / words[1]).exists()
        return
    module = importlib.import_module(name)
    common.parse_args(module.Args, {"tiny": module.TINY, "small": module.SMALL}, "", words[2:])


def test_the_readme_is_finished():
    text = (ROOT / "README.md").read_text()
    assert "{{" not in text
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^([a-z_./]+)  +", text.split("## The files")[1].split("```")[1], re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_the_example_of_an_own_robot_runs(tmp_path, monkeypatch):
    """The README's code, on a folder as it describes it; the data that it writes train after `data.stats`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source = next(b for b in blocks if "poses.csv" in b)
    rng = np.random.default_rng(0)
    for episode in range(3):
        folder = tmp_path / f"mine/{episode}"
        (folder / "front").mkdir(parents=True)
        poses = np.tile([0.4, 0, 0.3, 0, 0, 0, 1, 1.0], (12, 1))
        poses[:, :3] += rng.normal(0, 0.01, (12, 3)).cumsum(0)
        np.savetxt(folder / "poses.csv", poses, delimiter=",")
        (folder / "task.txt").write_text("pick up the red cup")
        for t in range(12):
            iio.imwrite(folder / f"front/{t:03d}.png", np.full((64, 64, 3), 20 * t, np.uint8))
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {})
    monkeypatch.setattr(sys, "argv", ["stats", "runs/data/robot"])
    importlib.import_module("data.stats").main()
    windows = Windows(["runs/data/robot"], {"video": View("primary", 3, 64)}, 2, 10, 0)
    sample = windows.draw(0)
    episode, t = np.searchsorted(windows.ends[0], sample["window"], side="right"), sample["window"] % 11
    poses = np.loadtxt(f"mine/{episode}/poses.csv", delimiter=",")
    moved = windows.action_norms[0].unnormalize(sample["action"])[0, 7:10].numpy()
    np.testing.assert_allclose(moved, poses[t + 1, :3] - poses[t, :3], atol=1e-5)
