"""Every command in the README and in the scripts' docstrings has flags that exist, and paths that agree."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

import common

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("lam", "distill", "finetune", "evaluate", "franka")


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
