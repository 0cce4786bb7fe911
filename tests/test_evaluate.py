"""The reports: measures against their closed form, and whole reports on small trained runs."""

import json
import math
from dataclasses import replace

import imageio.v3 as iio
import pytest
import torch
from helpers_lam import forked

import common
import evaluate
import lam


def test_psnr_in_closed_form():
    black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert evaluate.psnr(black, black + 255) == pytest.approx(0, abs=1e-4)
    assert evaluate.psnr(black, black + 16) == pytest.approx(20 * math.log10(255 / 16), abs=1e-4)


def test_r2_counts_valid_entries_of_moving_dimensions():
    target = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(target, dtype=torch.bool)
    assert evaluate.r2(target, target, mask) == pytest.approx(1)
    mean = target.mean((0, 1)).expand_as(target)
    assert evaluate.r2(mean, target, mask) == pytest.approx(0, abs=1e-5)
    still = torch.cat([target, torch.full((50, 3, 1), 0.5)], 2)  # a dimension that never moves has no say
    wrong = torch.cat([target, torch.zeros(50, 3, 1)], 2)
    assert evaluate.r2(wrong, still, torch.ones_like(still, dtype=torch.bool)) == pytest.approx(1)
    spoilt = target.clone()
    spoilt[:10] = 100  # invalid entries have none either
    mask[:10] = False
    assert evaluate.r2(spoilt, target, mask) == pytest.approx(1)


def test_probe_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 20, generator=generator)
    target = (features @ torch.randn(20, 6, generator=generator)).view(200, 3, 2)
    mask = torch.ones_like(target, dtype=torch.bool)
    assert evaluate.probe(features, target, mask) > 0.8
    assert evaluate.probe(torch.randn(200, 20, generator=generator), target, mask) < 0.2


@pytest.fixture(scope="module")
def report(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "evaluate"
    forked("evaluate.py", "--tiny", "--lam", world / "lam", "--student", world / "distill", "--policy",
           world / "finetune", "--out", out, "--samples", 8, "--frames", 4, "--sampling-steps", 2, "--trials", 1,
           "--seconds", 1)  # fmt: skip
    return out, json.loads((out / "report.json").read_text())


def test_a_whole_report(report):
    out, numbers = report
    assert {"lam", "student", "sim", "commit", "seed"} <= set(numbers)
    assert all(math.isfinite(v) for part in ("lam", "student") for v in numbers[part].values() if isinstance(v, float))
    assert len(numbers["student"]["sentences"]) == 4
    assert numbers["sim"]["pick_cup"]["trials"] == len(json.loads((out / "sim.json").read_text())) == 1
    picture = iio.imread(out.parent / "report.png")
    assert picture.shape[0] > 1000 and picture.std() > 20


def test_one_report_keeps_the_others(report, world):
    out, before = report
    forked("evaluate.py", "lam", "--tiny", "--lam", world / "lam", "--out", out, "--samples", 8, "--frames", 4,
           "--sampling-steps", 2)  # fmt: skip
    after = json.loads((out / "report.json").read_text())
    assert after["lam"] == before["lam"]  # the same seed gives the same numbers
    assert after["student"] == before["student"] and after["sim"] == before["sim"]
    assert (out.parent / "report_lam.png").exists()


def test_tampering_with_z_changes_what_it_should(world):
    """A model whose motion stream does not see Z_mot must show it: the report is not blind."""
    process = common.Process(0, 1, torch.device("cpu"), torch.float32)
    args = replace(evaluate.TINY, lam=str(world / "lam"), samples=8, frames=4, sampling_steps=2)
    numbers, _ = evaluate.report_lam(args, process)
    assert numbers["action_mse_z_mot_zeroed"] != numbers["action_mse_as_is"]
    model, _, _ = lam.load_lam(world / "lam")
    for layer in model.decoder.motion:
        torch.nn.init.zeros_(layer.latent.out.weight)
        torch.nn.init.zeros_(layer.latent.out.bias)
    with pytest.MonkeyPatch.context() as patch:
        loaded = lam.load_lam(world / "lam")
        patch.setattr(lam, "load_lam", lambda path: (model, *loaded[1:]))
        blind, _ = evaluate.report_lam(args, process)
    # What is left is the way through the scene stream, which reads Z_sce alone.
    assert blind["action_mse_z_mot_zeroed"] == pytest.approx(blind["action_mse_as_is"], rel=1e-5)


@pytest.mark.parametrize(
    "words, says",
    [
        (("sim", "--tasks", "fold_laundry", "--policy", "expert"), "pick_cup"),
        (("lam", "--lam", "nowhere/lam"), "python lam.py"),
        (("--samples", "2"), "--samples"),
        (("sim", "--policy", "nowhere"), "python finetune.py"),
    ],
)
def test_bad_input(words, says, tmp_path):
    code, text = forked("evaluate.py", *words, "--tiny", "--out", tmp_path / "evaluate", code=None)
    assert code == 2 and "error:" in text and says in text and "Traceback" not in text
