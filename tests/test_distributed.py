"""Several ranks: one torchrun and two as two nodes give one rank's numbers, runs go on with other numbers of ranks, and
whatever one rank meets (damaged data, a loss that is not finite) all of them answer in the same way."""

import json
import math
import os
import shutil
import socket
import subprocess
from dataclasses import replace

import pytest
import torch
from helpers_lam import (
    ROOT,
    command,
    environment,
    forked,
    forked_ranks,
    make_data,
    metrics,
    refused,
    rewind,
    run,
    stage_command,  # fmt: skip
    weights,
)

import common
import distill
import lam
from data import stills
from data.lerobot import LeRobotReader, LeRobotWriter

ONE, TWO = ("--batch", 4), ("--batch", 1, "--accumulate", 2)  # a global batch of 4 on one rank and on two


def losses(lines: list[dict]) -> dict[tuple, dict]:
    """The lines of a log, by step and kind (training, validation); without the learning rate."""
    return {(line["step"], "grad_norm" in line): {k: v for k, v in line.items() if k != "lr"} for line in lines}


def same_losses(one: list[dict], two: list[dict], rtol: float = 1e-5) -> None:
    """The second run logged the numbers of the first, to `rtol`, wherever both have a line of the same step."""
    one, two = losses(one), losses(two)
    assert len(one.keys() & two.keys()) >= min(len(one), len(two)) - 2
    worst = 0.0
    for line in one.keys() & two.keys():
        a, b = one[line], two[line]
        assert a.keys() == b.keys()
        for key in a:
            error = abs(a[key] - b[key]) / max(abs(a[key]), 1e-3)
            worst = max(worst, error)
            assert error <= rtol, (line, key, a[key], b[key])
    print("largest relative difference", worst)


@pytest.fixture(scope="module")
def rough(tmp_path_factory):
    """What a corpus is like: a data set of eight episodes, two of them damaged, and the same pictures without actions
    (one component of a quaternion is known of the state, and no action follows from it)."""
    root = tmp_path_factory.mktemp("rough")
    data = make_data(root / "data", per_file=2)
    video = data / "videos/observation.images.primary/chunk-000/file-001.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    (root / "free.json").write_text(json.dumps({
        "images": {"primary": "observation.images.primary", "wrist": "observation.images.wrist"},
        "state": {"right_qw": {"column": "observation.state", "index": 6}},
        "stats": {"observation.state": {"q01": [1.0], "q99": [1.0]}},
    }))  # fmt: skip
    return root


def rough_lam(rough, out, *more):
    """Ten steps of lam.py on it, saved after the fifth and the tenth."""
    words = stage_command("lam", rough, out, "--steps", 10, "--save-every", 5, "--lr", 1e-4, "--max-bad", 1, *more)
    at = words.index("--data") + 2
    return [*words[:at], f"{rough}/data@{rough}/free.json", *words[at:], "--freeze-vision", "--checkpointing"]


@pytest.fixture(scope="module")
def one(rough):
    forked(*rough_lam(rough, rough / "one", *ONE))
    return metrics(rough / "one")


@pytest.fixture(scope="module")
def two(rough):
    """The same run on two ranks, sharded."""
    run(*rough_lam(rough, rough / "two", *TWO), ranks=2)
    return metrics(rough / "two")


# -- the same numbers --------------------------------------------------------------------------------------------------


def test_the_ranks_hold_unequal_shares(rough, one):
    """What makes the comparisons below sharp: valid actions are spread unevenly over ranks and micro-steps, samples
    without any are among them, and so is damage."""
    sources = (rough / "data", f"{rough}/data@{rough}/free.json")
    windows = lam.make_windows(replace(lam.TINY, data=sources, frames=3, val_every=4, preload=False), "train")
    valid = torch.stack([windows.draw(i, pictures=False)["action_mask"].sum() for i in range(40)])
    by_rank = valid.view(10, 2, 2).sum(1)  # (step, rank), summed over micro-steps
    assert (by_rank[:, 0] != by_rank[:, 1]).sum() >= 5
    assert 5 < (valid == 0).sum() < 35
    assert one[-2]["bad"] > one[1]["bad"] >= 0 and all(line.get("skipped", 0) == 0 for line in one)


def test_one_torchrun_equals_one_rank(one, two):
    same_losses(one, two)


def test_two_nodes_equal_one_rank(rough, one):
    """Two agents that meet on this machine, each with a rank of its own; the model whole on either (HSDP)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    words = command(*rough_lam(rough, rough / "nodes", *TWO, "--replicas", 2))
    meet = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", at, "--rdzv-id", "test", "--local-addr", "127.0.0.1"]  # fmt: skip
    nodes = [
        subprocess.Popen([words[0], *meet, *words[1:]], cwd=ROOT, env=environment(), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]  # fmt: skip
    try:
        texts = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], texts
    same_losses(one, metrics(rough / "nodes"))


@pytest.mark.parametrize("stage,replicas", [("distill", 1), ("finetune", 1), ("finetune", 2)])
def test_the_later_stages_on_two_ranks(stage, replicas, world, tmp_path):
    more = ["--steps", 4, "--lr", 1e-4]
    forked(*stage_command(stage, world, tmp_path / "one", *more))
    more += [*TWO, "--replicas", replicas, "--checkpointing"]
    forked_ranks(*stage_command(stage, world, tmp_path / "two", *more))
    same_losses(metrics(tmp_path / "one"), metrics(tmp_path / "two"))


def test_what_a_student_said_on_two_ranks(world, tmp_path):
    """It stays as it is, each rank remembers all of it, and a sample loses the same of it on whichever rank it is."""
    more = ["--steps", 4, "--lr", 1e-4, "--student-lr", 0, "--remember", "--prefix-dropout"]
    forked(*stage_command("finetune", world, tmp_path / "one", *more, 0.5))
    forked_ranks(*stage_command("finetune", world, tmp_path / "two", *more, 0.5, *TWO))
    same_losses(metrics(tmp_path / "one"), metrics(tmp_path / "two"))
    forked(*stage_command("finetune", world, tmp_path / "all", *more, 0))
    with pytest.raises(AssertionError):
        same_losses(metrics(tmp_path / "one"), metrics(tmp_path / "all"))


def test_muon_on_two_ranks(rough, tmp_path):
    """Muon works on whole matrices, which no rank has, and may round them to bfloat16: to 1e-3. A run goes on from two
    ranks on one."""
    more = ["--steps", 4, "--save-every", 2, "--muon", 1e-3]
    forked(*rough_lam(rough, tmp_path / "one", *ONE, *more))
    forked_ranks(*rough_lam(rough, tmp_path / "two", *TWO, *more))
    same_losses(metrics(tmp_path / "one"), metrics(tmp_path / "two"), rtol=1e-3)
    rewind(tmp_path / "two", tmp_path / "on", 2)
    forked(*rough_lam(rough, tmp_path / "on", *ONE, *more, "--resume"))
    same_losses(metrics(tmp_path / "two"), metrics(tmp_path / "on"), rtol=1e-3)
    adam = rough_lam(rough, tmp_path / "adam", *ONE, "--steps", 4, "--save-every", 2)
    forked(*adam)
    with pytest.raises(AssertionError):
        same_losses(metrics(tmp_path / "one"), metrics(tmp_path / "adam"), rtol=1e-3)


def test_a_student_of_its_own_rate_on_two_ranks(world, tmp_path):
    """As above, with several groups of parameters in each optimizer."""
    more = ["--steps", 4, "--save-every", 2, "--lr", 1e-3, "--muon", 1e-3, "--student-lr", 0.1]
    forked(*stage_command("finetune", world, tmp_path / "one", *more))
    forked_ranks(*stage_command("finetune", world, tmp_path / "two", *more, *TWO))
    same_losses(metrics(tmp_path / "one"), metrics(tmp_path / "two"), rtol=1e-3)
    rewind(tmp_path / "two", tmp_path / "on", 2)
    forked(*stage_command("finetune", world, tmp_path / "on", *more, "--resume"))
    same_losses(metrics(tmp_path / "two"), metrics(tmp_path / "on"), rtol=1e-3)
    forked(*stage_command("finetune", world, tmp_path / "alike", *more[:-2]))
    with pytest.raises(AssertionError):
        same_losses(metrics(tmp_path / "one"), metrics(tmp_path / "alike"), rtol=1e-3)


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_stills_on_two_ranks(stage, world, tmp_path):
    """Two ranks are asked about the stills that one is asked about in twice as many micro-steps, with eyes that stay as
    they are. The stills are drawn here: a forked process has no threads to draw with."""
    drawn = {(seed, n): stills.stills(seed, n, 64) for seed in (distill.STILLS,) for n in range(16)}

    def before():
        stills.stills = lambda seed, number, size: drawn[seed, number]

    more = ["--steps", 4, "--lr", 1e-3, "--stills", 1, "--vision-lr", 0, "--batch", 1]
    forked(*stage_command(stage, world, tmp_path / "one", *more, "--accumulate", 4), before=before)
    forked_ranks(*stage_command(stage, world, tmp_path / "two", *more, "--accumulate", 2), before=before)
    assert metrics(tmp_path / "one")[1]["text"] > 2
    same_losses(metrics(tmp_path / "one"), metrics(tmp_path / "two"), rtol=1e-4)


def in_bfloat16():
    here = common.here
    common.here = lambda: replace(here(), dtype=torch.bfloat16)


@pytest.mark.parametrize("stage,part", [("distill", "mse"), ("finetune", "ee")])
def test_the_later_stages_in_bfloat16(stage, part, world, tmp_path):
    """Sharded in bfloat16 the losses stay near those of one rank in float32."""
    forked(*stage_command(stage, world, tmp_path / "one", "--steps", 2, "--lr", 1e-4))
    forked_ranks(*stage_command(stage, world, tmp_path / "two", "--steps", 2, "--lr", 1e-4, *TWO), before=in_bfloat16)
    same_losses(*([line for line in metrics(tmp_path / run) if part in line] for run in ("one", "two")), rtol=0.05)


def test_bfloat16_under_sharding(rough, one, tmp_path):
    """Matrix products in bfloat16, weights and optimizer in float32: the losses stay near those in float32."""
    forked_ranks(*rough_lam(rough, tmp_path, *TWO, "--steps", 2), before=in_bfloat16)
    same_losses([line for line in one if "frame" in line], [r for r in metrics(tmp_path) if "frame" in r], rtol=0.05)
    found = common.find_checkpoint(tmp_path, "lam")
    for name in ("model", "optimizer"):
        tensors = common.read_tensors(found / f"{name}.safetensors")
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_resume_on_as_many_ranks_is_bit_exact(rough, two, tmp_path):
    rewind(rough / "two", tmp_path / "run", 5)
    forked_ranks(*rough_lam(rough, tmp_path / "run", *TWO, "--resume"))
    assert metrics(tmp_path / "run") == two
    assert weights(tmp_path / "run", 10) == weights(rough / "two", 10)


def test_resume_from_two_ranks_to_one_and_back(rough, two, tmp_path):
    """After step 5 on one rank, after step 8 again on two: the same samples, and the same numbers to rounding."""
    rewind(rough / "two", tmp_path / "one", 5)
    refused(rough_lam(rough, tmp_path / "one", "--batch", 3, "--resume"), "global batch of 4", "product 4")
    forked(*rough_lam(rough, tmp_path / "one", *ONE, "--save-every", 4, "--resume"))
    same_losses(two, metrics(tmp_path / "one"))
    rewind(tmp_path / "one", tmp_path / "two", 8)
    forked_ranks(*rough_lam(rough, tmp_path / "two", "--batch", 2, "--replicas", 2, "--resume"))
    same_losses(two, metrics(tmp_path / "two"))


# -- trouble on one rank -----------------------------------------------------------------------------------------------


def spoil(first: int, last: int, change):
    """Arranges that on rank 1 the loss of micro-steps `first` to `last` is changed."""
    loss, calls = lam.lam_loss, []

    def spoiled(*args):
        value, parts = loss(*args)
        calls.append(1)
        if os.environ["RANK"] == "1" and first <= len(calls) <= last:
            return change(value), {k: change(v) for k, v in parts.items()}
        return value, parts

    lam.lam_loss = spoiled


def test_all_ranks_skip_a_step_that_is_not_finite_on_one(world, tmp_path):
    words = stage_command("lam", world, tmp_path / "run", *TWO, "--steps", 4)
    # In the second of two micro-steps of the second step, an infinite loss whose gradient is finite.
    text = forked_ranks(*words, before=lambda: spoil(4, 4, lambda x: x + math.inf))
    assert [line["skipped"] for line in metrics(tmp_path / "run") if "skipped" in line] == [0, 1, 1, 1]
    assert text.count("step skipped") == 1
    for name, tensor in common.read_tensors(tmp_path / "run/checkpoints/step_00000004/model.safetensors").items():
        assert torch.isfinite(tensor).all(), name


def test_five_in_a_row_stop_all_ranks(world, tmp_path):
    words = stage_command("lam", world, tmp_path / "run", *TWO, "--save-every", 1)
    text = forked_ranks(*words, before=lambda: spoil(3, 100, lambda x: x * math.nan), code=2)
    assert "5 steps in a row" in text and "--resume" in text and "Traceback" not in text
    assert common.load_meta(common.checkpoints(tmp_path / "run")[-1])["tally"]["skipped"] == 4


@pytest.mark.parametrize("more,says", [(("--max-bad", 0), "--max-bad 0 allows"), (("--replicas", 3), "--replicas 3")])
def test_bad_input_stops_all_ranks(rough, tmp_path, more, says):
    text = forked_ranks(*rough_lam(rough, tmp_path, *TWO, *more), code=2)
    assert text.count("error: ") == 2 and says in text and "Traceback" not in text


def test_damage_is_named_and_counted_by_a_run(rough, one, tmp_path):
    """With worker processes as without, and the count survives a resume."""
    rewind(rough / "one", tmp_path / "run", 5)
    _, text = forked(*rough_lam(rough, tmp_path / "run", *ONE, "--workers", 2, "--no-preload", "--resume"))
    assert metrics(tmp_path / "run") == one
    assert "file-001.mp4" in text and "another window is drawn" in text


def test_a_long_instruction_is_refused_at_the_start(rough, tmp_path):
    shutil.copytree(rough / "data", tmp_path / "data")
    with LeRobotWriter(tmp_path / "data", cameras={"primary": (64, 64), "wrist": (64, 64)}, resume=True) as more:
        reader = LeRobotReader(rough / "data")
        episode, frames = reader.episode(0), {c: reader.frames(0, c, range(14)) for c in ("primary", "wrist")}
        more.add_episode(frames, episode["action"][:, 7:14], episode["state"][:, 8:16], "push it " * 3000)
    words = rough_lam(rough, tmp_path / "run", *ONE)
    words[words.index("--data") + 1] = tmp_path / "data"
    refused(words, "24000 letters", "--frames")
    assert not common.read_metrics(tmp_path / "run")
