"""The reports: measures against their closed form, and whole reports on small trained runs."""

import json
import math
import shutil
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers_lam import forked, run
from torch import nn

import common
import distill
import evaluate
import lam
from data.windows import collate

CPU = common.Process(0, 1, torch.device("cpu"), torch.float32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- measures ----------------------------------------------------------------------------------------------------------


def test_psnr_in_closed_form():
    black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    bright = torch.stack([black[0] + 255, black[1] + 16])
    assert lam.psnr(black, bright).tolist() == pytest.approx([0, 20 * math.log10(255 / 16)], abs=1e-4)


def test_ssim_in_closed_form():
    """Of two flat images a and b only the term of luminance is left; an image and itself give 1."""
    a, b = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8), torch.full((2, 3, 32, 32), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert evaluate.ssim(a, b).tolist() == pytest.approx([(2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)] * 2)
    noise = (random(2, 3, 32, 32) * 50 + 128).clamp(0, 255).to(torch.uint8)
    assert evaluate.ssim(noise, noise).tolist() == pytest.approx([1, 1])
    assert evaluate.ssim(noise, noise.flip(-1)).max() < 0.1


def test_action_scores_count_valid_entries_of_moving_dimensions():
    target, mask = torch.zeros(50, 3, 44), torch.zeros(50, 3, 44, dtype=torch.bool)
    target[..., 7:9], mask[..., 7:10] = random(50, 3, 2), True
    target[..., 9] = 0.5  # a dimension that never moves has no say
    perfect = target.clone()
    perfect[..., 9] = 0
    assert evaluate.action_scores(perfect, target, mask) == pytest.approx({"r2": 1, "mse": 0})
    mean = target.mean((0, 1)).expand_as(target)
    variance = target[..., 7:9].var((0, 1), correction=0).mean().item()
    assert evaluate.action_scores(mean, target, mask) == pytest.approx({"r2": 0, "mse": variance}, abs=1e-5)
    spoilt, fewer = perfect.clone(), mask.clone()
    spoilt[:10] = 100  # invalid entries have none either
    fewer[:10] = False
    assert evaluate.action_scores(spoilt, target, fewer) == pytest.approx({"r2": 1, "mse": 0})
    assert math.isnan(evaluate.action_scores(target, target, mask & False)["mse"])
    table = evaluate.action_table(spoilt, target, fewer, target[10:].mean((0, 1)).expand(3, 44))
    assert list(table) == ["mean", "right_x", "right_y"] and table["right_x"]["r2"] == pytest.approx(1)


def test_ridge_is_the_textbook_solution_on_valid_rows():
    x, at, y = random(40, 6).double(), random(9, 6, seed=1).double(), random(40, 3, seed=2).double()
    mask = torch.ones(40, 3, dtype=torch.bool)
    mask[25:, 1] = mask[:, 2] = False
    out = evaluate.ridge(x @ x.T, at @ x.T, y, mask, 0.5)
    for column, rows in ((0, 40), (1, 25)):
        known, mean = x[:rows], y[:rows, column].mean()
        w = torch.linalg.solve(known.T @ known + 0.5 * torch.eye(6), known.T @ (y[:rows, column] - mean))
        torch.testing.assert_close(out[:, column], at @ w + mean)
    assert (out[:, 2] == 0).all()  # never valid: nothing to say


def windows(n: int, features: torch.Tensor, action: torch.Tensor, episodes: int, first: int = 0) -> dict:
    target, mask = torch.zeros(n, 3, 44), torch.zeros(n, 3, 44, dtype=torch.bool)
    target[..., 7:9], mask[..., 7:9] = action.view(n, 3, 2), True
    return {"x": features, "action": target, "mask": mask, "episode": first + torch.arange(n) % episodes}


def probed(seen: dict, held_out: dict) -> dict:
    predicted = evaluate.probes(seen, held_out, {"x": "x"})
    return evaluate.score(predicted, held_out, evaluate.resampled(held_out["episode"], 0, 10))[0]["x"]


def test_probe_finds_what_is_there_and_nothing_else():
    features, weights = random(500, 30), random(30, 6, seed=1)
    linear = features @ weights
    seen, held_out = (windows(len(i), features[i], linear[i], 20) for i in torch.arange(500).split(400))
    assert probed(seen, held_out)["r2"] > 0.999
    # Nothing to be found, and enough features to fit any noise: a strength chosen on what was fitted would do so.
    noise = [d | {"x": random(len(d["x"]), 300, seed=2 + i)} for i, d in enumerate((seen, held_out))]
    assert abs(probed(*noise)["r2"]) < 0.1
    # What the held-out actions are must not matter to what is predicted of them.
    other = held_out | {"action": held_out["action"] * -3}
    torch.testing.assert_close(evaluate.probe(seen, held_out, "x"), evaluate.probe(seen, other, "x"))


def test_probe_that_knows_the_episode_alone_scores_nothing(monkeypatch):
    """Features that name the episode, actions that are one for each episode: with windows of one episode on both sides,
    R2 would be near 1. The strength must be chosen by other episodes, too: else it would be the least."""
    names, actions = random(60, 40), random(60, 6, seed=1)
    episode = torch.arange(600) % 60
    features, action = names[episode] + 0.1 * random(600, 40, seed=2), actions[episode]
    first, last = episode < 40, episode >= 40
    seen = windows(400, features[first], action[first], 40)
    apart = windows(200, features[last], action[last], 20, first=40)
    assert -0.3 < probed(seen, apart)["r2"] < 0.1
    same = windows(200, features[first][:200], action[first][:200], 40)
    monkeypatch.setattr(evaluate, "STRENGTHS", (1e-4,))
    assert probed(seen, same)["r2"] > 0.8
    assert probed(seen, apart)["r2"] < -0.3


def test_intervals_count_episodes_not_windows():
    """A mean over 40 windows of 10 episodes that agree within each: as uncertain as a mean of 10 numbers, which the
    textbook's interval knows, and of a difference only what differs."""
    values = random(10).repeat_interleave(4).double()
    counts = evaluate.resampled(torch.arange(10).repeat_interleave(4) + 7, seed=0, times=4000)
    assert (counts[0] == 1).all() and (counts.sum(1) == 40).all()
    assert (counts.view(-1, 10, 4) == counts[:, ::4, None]).all()  # an episode's windows come together
    assert counts[1:].std(0).min() > 0.9  # each episode is drawn 0, 1, 2, ... times
    mean = lambda x: counts @ x / counts.sum(1)
    got = evaluate.interval(mean(values))
    half = 1.96 * values.std(correction=0).item() / 10**0.5
    assert got["value"] == pytest.approx(values.mean().item())
    assert got["high"] - got["low"] == pytest.approx(2 * half, rel=0.1)
    constant = evaluate.interval(mean(values + 0.5) - mean(values))
    assert constant == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


def test_scores_of_resampled_windows_are_scores_of_those_windows():
    """A draw's R2 is that of the windows it consists of, some of them twice; a pair's difference is within draws."""
    seen = windows(60, random(60, 5), random(60, 6, seed=1), 6)
    action, mask = seen["action"], seen["mask"].clone()
    mask[::7, 2] = False
    predicted = {"a": action + 0.3 * random(60, 3, 44, seed=2), "b": action + 0.6 * random(60, 3, 44, seed=3)}
    counts = evaluate.resampled(seen["episode"], seed=1, times=20)
    held_out = seen | {"mask": mask}
    table, gains = evaluate.score(predicted, held_out, counts, [("a", "b"), ("a", "absent")])
    draws = []
    for row in counts:
        which = torch.arange(60).repeat_interleave(row.long())
        r2 = [evaluate.action_scores(p[which], action[which], mask[which])["r2"] for p in predicted.values()]
        draws.append([r2[0], r2[0] - r2[1]])
    draws = np.array(draws)
    assert table["a"]["r2"] == pytest.approx(draws[0, 0])
    assert [table["a"]["r2_low"], table["a"]["r2_high"]] == pytest.approx(np.quantile(draws[1:, 0], (0.025, 0.975)))
    assert list(gains) == ["R2: a - b"] and gains["R2: a - b"]["value"] == pytest.approx(draws[0, 1])
    assert gains["R2: a - b"]["low"] == pytest.approx(np.quantile(draws[1:, 1], 0.025))


class Text:
    """Data sets of which there is nothing but text: episodes of (instruction, phases)."""

    def __init__(self, *episodes: tuple[str, list[str]], listed: tuple[str, ...] = ()):
        self.episodes, self.tasks = episodes, {}
        self.subtasks = dict(enumerate({*listed, *(text for _, phases in episodes for text in phases)}))
        self.readers, self.chosen = [self], [np.arange(len(episodes))]

    def episode(self, i: int) -> dict:
        return {"task": self.episodes[i][0], "subtask": self.episodes[i][1]}


def test_text_only_by_hand():
    """Frequencies given the instruction, the last frame left out, and what was never seen is not impossible."""
    data = Text(("push", ["a", "a", "b", "c"]), ("push", ["a", "c"]), ("lift", ["b", "b"]), listed=("d",))
    asked = [("push", "a"), ("push", "b"), ("lift", "b"), ("lift", "d"), ("pull", "b")]
    a, b, d = 4 / 9, 3 / 9, 1 / 9  # of 5 frames a has 3 and b 2; and one more for each of the four texts
    expected = [(3 + a) / 5, (1 + b) / 5, (1 + b) / 2, d / 2, b]
    got = evaluate.text_only(data, *map(list, zip(*asked, strict=True)))
    assert got.exp().reciprocal().tolist() == pytest.approx(expected)
    every = evaluate.text_only(data, ["push"] * 4, ["a", "b", "c", "d"])
    assert every.neg().exp().sum().item() == pytest.approx(1)  # they are the probabilities of all that can be said


def test_partners_are_of_another_episode():
    episode = torch.tensor([4, 4, 1, 7, 4, 1, 7, 9, 1, 4])
    other = evaluate.partners(episode)
    assert sorted(other.tolist()) == list(range(10)) and (episode[other] != episode).all()


# -- whole reports -----------------------------------------------------------------------------------------------------

SHORT = ("--samples", 8, "--probe-samples", 24, "--frames", 4, "--sampling-steps", 2)


@pytest.fixture(scope="module")
def report(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "evaluate"
    run("evaluate.py", "--tiny", "--lam", world / "lam", "--student", world / "distill", "--policy",
        world / "finetune", "--out", out, *SHORT, "--trials", 1, "--seconds", 1)  # fmt: skip
    return out, json.loads((out / "report.json").read_text())


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    return [value] if isinstance(value, int | float) else []


def test_a_whole_report(report):
    out, parts = report
    assert {"lam", "student", "sim"} <= set(parts)
    for part in ("lam", "student", "sim"):
        assert {"checkpoint", "commit", "seed", "seconds"} <= set(parts[part])
    assert all(math.isfinite(v) for v in numbers(parts))
    n = parts["lam"]
    assert set(n["frames"]) == {"copied", "sampled", "codec"} and n["frames"]["codec"]["ssim"] == pytest.approx(1)
    assert set(n["probes"]) == {"mean", "pixels", "encoder", "z_sce", "z_mot", "decoder"}
    tampered = {"zeroed", "shuffled", "z_mot_zeroed", "z_sce_zeroed", "z_mot_shuffled", "z_sce_shuffled"}
    assert set(n["split"]) == {"as_is"} | tampered and set(n["transfer"]) == {"z", "z_mot"}
    assert {"mean", "right_x", "right_y", "right_gripper"} == set(n["actions"]) and n["held_out"] is True
    assert set(n["gains"]) == {"R2: decoder - pixels", "R2: z_mot - pixels", "R2: z_mot - z_sce",
                               "PSNR: sampled - copied"}  # fmt: skip
    n = parts["student"]
    assert set(n["probes"]) == {"mean", "pixels", "undistilled", "zhat"} and len(n["sentences"]) == 4
    assert set(n["gains"]) == {"R2: zhat - undistilled", "R2: zhat - pixels", "cosine: true - shuffled",
                               "perplexity: student - text only"}  # fmt: skip
    for part in ("lam", "student"):
        assert all(gain["low"] <= gain["high"] for gain in parts[part]["gains"].values())
    assert parts["sim"]["pick_cup"]["trials"] == len(json.loads((out / "sim.json").read_text())) == 1
    picture = iio.imread(out.parent / "report.png")
    assert picture.shape[0] > 1000 and picture.std() > 20


def test_one_report_keeps_the_others(report, world):
    """The same seed gives the same numbers; a report on another checkpoint does not overwrite the first."""
    out, before = report
    command = ("evaluate.py", "lam", "--tiny", "--out", out, *SHORT)
    plain = lambda part: {k: v for k, v in part.items() if k != "seconds"}
    forked(*command, "--lam", world / "lam")
    after = json.loads((out / "report.json").read_text())
    assert plain(after["lam"]) == plain(before["lam"]) and after["earlier"] == []
    assert after["student"] == before["student"] and after["sim"] == before["sim"]
    assert (out.parent / "report_lam.png").exists()
    _, text = forked(*command, "--lam", world / "lam/checkpoints/step_00000004")
    other = json.loads((out / "report.json").read_text())
    assert "kept under `earlier`" in text and other["lam"]["checkpoint"]["step"] == 4
    assert [plain(part) for part in other["earlier"]] == [{"part": "lam"} | plain(before["lam"])]


def test_the_undistilled_student_is_the_one_that_training_began_with(world, monkeypatch):
    """Its held-out numbers are those of step 0 of the log; the trained one's those of the last step."""
    build, built = distill.build, []
    monkeypatch.setattr(distill, "build", lambda *args: built.append(build(*args)) or built[-1])
    args = replace(evaluate.TINY, lam=str(world / "lam"), student=str(world / "distill"), samples=8, probe_samples=8)
    out = evaluate.report_student(args, CPU)
    student, trained, _ = distill.load_student(world / "distill")
    teacher, teacher_args, _ = lam.load_lam(world / "lam")
    windows = distill.make_windows(trained, teacher_args, student.image_size, "val")
    log = common.read_metrics(world / "distill")
    for model, row in ((built[1], log[0]), (student, log[-1])):
        got = distill.validate(model, teacher.eval(), windows, trained, CPU)
        assert got == pytest.approx({k: v for k, v in row.items() if k != "step"}, rel=1e-4)
    more = distill.validate(student, teacher, windows, replace(trained, val_samples=8), CPU)
    same = ("mse", "kl", "mse_mean", "cosine", "perplexity")
    assert {k: out[k] for k in same} == pytest.approx({k: more[f"val_{k}"] for k in same}, rel=1e-4)


def test_another_teacher_and_blank_subtasks(world, tmp_path, monkeypatch):
    """A student is judged beside the teacher that it learned from alone; where a data set names no subtask, the true
    text is the instruction, as in training."""
    original = evaluate.batches
    blank = lambda *args: (batch | {"subtask": [""] * len(batch["subtask"])} for batch in original(*args))
    monkeypatch.setattr(evaluate, "batches", blank)
    args = replace(evaluate.TINY, lam=str(world / "lam"), student=str(world / "distill"), samples=8, probe_samples=8)
    told = evaluate.report_student(args, CPU)["sentences"]
    assert len(told) == 4 and all(s["true"] == s["instruction"] for s in told)
    shutil.copytree(world / "lam", tmp_path / "lam")
    path = common.checkpoints(tmp_path / "lam")[-1] / "meta.json"
    common.write_json(path, common.read_json(path) | {"time": 0.0})
    with pytest.raises(common.InputError, match="is now at step 8 of .*: distil again, or give its --lam"):
        evaluate.report_student(replace(args, lam=str(tmp_path / "lam")), CPU)


def test_results_say_how_to_repeat_them(report, world, tmp_path):
    """The file has the report and what made it; one for all reports at once is refused before any work."""
    words = ("--tiny", "--lam", world / "lam", "--student", world / "distill", "--out", tmp_path / "evaluate")
    file = tmp_path / "results/student.json"
    forked("evaluate.py", "student", *words, *SHORT, f"--results={file}")
    there = json.loads(file.read_text())
    assert {"commands", "seed", "hardware", "evaluated_at_commit", "trained_at_commit"} < set(there)
    assert there["training_args"]["lr"] == distill.TINY.lr and there["training_seconds"] >= 0
    assert "/" not in there["commands"][0] and f"--results={file.name}" in there["commands"][0]
    assert f"--lam {(world / 'lam').name} " in there["commands"][0]
    assert "evaluate.py student" in there["commands"][0] and there["student"]["probes"]["zhat"]
    _, text = forked("evaluate.py", *words, "--results", file, code=2)
    assert "--results" in text and "one report" in text


def arguments(world, **changes) -> evaluate.Args:
    args = replace(evaluate.TINY, lam=str(world / "lam"), samples=16, probe_samples=60, frames=4, sampling_steps=2)
    return replace(args, **changes)


def test_no_episode_is_both_fitted_and_scored(world):
    _, trained, _ = lam.load_lam(world / "lam")
    drawn = lambda split: evaluate.batches(lam.make_windows(trained, split), 60, 8, CPU, "", set())
    episodes = [set(evaluate.columns(drawn(split))["episode"].tolist()) for split in ("train", "val")]
    assert len(episodes[0]) == 6 and len(episodes[1]) == 2 and not episodes[0] & episodes[1]


class Oracle(nn.Module):
    """A latent action model in which all is as it should be: Z_mot carries the actions, Z_sce the future frame, and
    each is read by its own stream. `batch` is what it looks the answers up in."""

    def __init__(self, real: lam.LAM):
        super().__init__()
        self.encoder, self.decoder, self.batch = real.encoder, real.decoder, {}

    def encode(self, video, instructions):
        future = lam.PixelCodec().encode(video[:, -1]).flatten(2).transpose(1, 2)
        return future, self.batch["action"] + 0.05

    def decode(self, noisy, current, s, z):
        future = z[0].transpose(1, 2).reshape(noisy.shape) + 0.01  # wrong by a grey level
        actions = z[1].clone()
        actions[..., common.GRIPPERS] = 20 * actions[..., common.GRIPPERS] - 10
        return (noisy - future) / s[:, None, None, None], actions


def test_the_report_sees_a_perfect_split(world, monkeypatch):
    model, trained, meta = lam.load_lam(world / "lam")
    oracle, original = Oracle(model), evaluate.batches

    def shown(*args):
        for batch in original(*args):
            oracle.batch = batch
            yield batch

    monkeypatch.setattr(evaluate, "batches", shown)
    monkeypatch.setattr(lam, "load_lam", lambda path: (oracle, trained, meta))
    out, _ = evaluate.report_lam(arguments(world), CPU)
    assert out["frames"]["sampled"]["psnr"] > 45 and out["frames"]["sampled"]["mse"] < out["frames"]["copied"]["mse"]
    assert out["actions"]["mean"]["r2"] > 0.95 and out["actions"]["right_gripper"]["accuracy"] == 1
    assert out["probes"]["z_mot"]["r2"] > 0.9 and out["probes"]["z_mot"]["r2"] > out["probes"]["z_sce"]["r2"]
    for how in ("zeroed", "shuffled"):
        motion, scene = out["split"][f"z_mot_{how}"], out["split"][f"z_sce_{how}"]
        assert motion["action_mse_ratio"] > 10 and motion["frame_mse_ratio"] == motion["frame_loss_ratio"] == 1
        assert scene["action_mse_ratio"] == 1 and scene["frame_loss"] > 0.01 and scene["psnr"] < 30
        both = out["split"][how]
        assert both["action_mse"] == motion["action_mse"] and both["frame_loss"] == scene["frame_loss"]
    # Its latent actions transfer: the source's actions, not those of the scene's clip.
    assert out["transfer"]["z"]["r2_source"] > 0.9 > 0.3 > out["transfer"]["z"]["r2_scene"]
    # Its Z_sce is the source's picture, though, and that shows as well.
    assert out["transfer"]["z"]["psnr_source"] > 45 > 40 > out["transfer"]["z"]["psnr_scene"]


def test_a_motion_stream_that_does_not_read_z_mot_shows(world, monkeypatch):
    model, *loaded = lam.load_lam(world / "lam")
    args = arguments(world, samples=8, probe_samples=8)
    assert evaluate.report_lam(args, CPU)[0]["split"]["z_mot_zeroed"]["action_mse_ratio"] != 1
    for layer in model.decoder.motion:
        nn.init.zeros_(layer.latent.out.weight)
        nn.init.zeros_(layer.latent.out.bias)
    monkeypatch.setattr(lam, "load_lam", lambda path: (model, *loaded))
    blind, _ = evaluate.report_lam(args, CPU)
    assert blind["split"]["z_mot_zeroed"]["action_mse_ratio"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("uad, dla", [(False, True), (True, False), (False, False)])
def test_ablated_models_report_what_they_have(world, monkeypatch, tmp_path, uad, dla):
    _, trained, meta = lam.load_lam(world / "lam")
    trained = replace(trained, uad=uad, dla=dla)
    torch.manual_seed(0)
    model = lam.build(trained)
    monkeypatch.setattr(lam, "load_lam", lambda path: (model, trained, meta))
    out, pictures = evaluate.report_lam(arguments(world, samples=8, probe_samples=8, frames=2), CPU)
    assert all(math.isfinite(v) for v in numbers(out))
    assert ("actions" in out) == ("decoder" in out["probes"]) == ("action_mse" in out["split"]["as_is"]) == uad
    assert ("z" not in out["probes"]) == ("z_mot" in out["transfer"]) == ("z_mot_zeroed" in out["split"]) == dla
    evaluate.draw(tmp_path / "report.png", pictures, {"lam": str(world / "lam")}, [], {"lam": out})
    assert iio.imread(tmp_path / "report.png").std() > 20


# -- the same in the training log --------------------------------------------------------------------------------------


class Stub:
    """Answers like a LAM whose Z_mot carries the actions and whose Z_sce the frame."""

    def __init__(self, future: torch.Tensor, action: torch.Tensor):
        self.future, self.action = future, action

    def __call__(self, video, instructions, noisy, current, s, zero=""):
        assert (s == 1).all()
        future = self.future + (2 if zero == "scene" else 0.5)
        return noisy - future, self.action + (3 if zero == "motion" else 1)


def test_health_in_closed_form():
    video = torch.zeros(4, 3, 3, 16, 16, dtype=torch.uint8)
    video[:, 1:] = 40
    action, mask = torch.zeros(4, 2, 44), torch.zeros(4, 2, 44, dtype=torch.bool)
    mask[:3, :, 7:14], action[..., 13] = True, 1
    batch = {"video": video, "instruction": ["x"] * 4, "action": action, "action_mask": mask, "index": torch.arange(4)}
    codec = lam.PixelCodec()
    current, future = codec.encode(video[:, 0]), codec.encode(video[:, -1])
    health = lambda: lam.health(Stub(future, action - 0.5), codec, batch, current, future, lam.TINY)
    batch["counted"] = torch.tensor([True, True, True, False])
    assert health()[3].item() == pytest.approx(3 * 0.25)  # one that does not count is left out
    batch["counted"] = torch.ones(4, dtype=torch.bool)
    h = dict(zip(lam.HEALTH, health().tolist(), strict=True))
    assert h["frame"] == pytest.approx(4 * 0.25) and h["frame_zero_sce"] == pytest.approx(4 * 4)
    assert h["frame_zero_mot"] == h["frame"] and h["motion_zero_sce"] == h["motion"]
    assert h["motion"] == pytest.approx(36 * 0.25) and h["motion_zero_mot"] == pytest.approx(36 * 6.25)
    assert h["right"] == 6
    assert h["psnr"] / 4 == pytest.approx(20 * math.log10(255 / 64), abs=0.01)  # half a unit of latents is 64 levels
    assert h["psnr_copy"] / 4 == pytest.approx(20 * math.log10(255 / 40))


def test_a_call_without_a_set_of_tokens_is_decoding_with_zeros(world):
    model, trained, _ = lam.load_lam(world / "lam")
    batch = collate([lam.make_windows(trained, "val")[i] for i in range(2)])
    current = lam.PixelCodec().encode(batch["video"][:, 0])
    noisy, s = random(*current.shape), torch.tensor([1.0, 0.5])
    with torch.no_grad():
        z_sce, z_mot = model.encode(batch["video"], batch["instruction"])
        for zero, z in {"scene": (z_sce * 0, z_mot), "motion": (z_sce, z_mot * 0), "": (z_sce, z_mot)}.items():
            expected = model.decode(noisy, current, s, z)
            got = model(batch["video"], batch["instruction"], noisy, current, s, zero=zero)
            torch.testing.assert_close(got, expected)


def test_the_log_carries_the_health(world):
    last = common.read_metrics(world / "lam")[-1]
    keys = ("psnr", "psnr_copy", "r2", "frame_zero_sce", "frame_zero_mot", "motion_zero_sce", "motion_zero_mot")
    assert all(np.isfinite(last[f"val_{key}"]) for key in keys)


@pytest.mark.parametrize(
    "words, says",
    [
        (("sim", "--tasks", "fold_laundry", "--policy", "expert"), "pick_cup"),
        (("lam", "--lam", "nowhere/lam"), "python lam.py"),
        (("--samples", "2"), "--samples"),
        (("--probe-samples", "2"), "--probe-samples"),
        (("sim", "--policy", "nowhere"), "python finetune.py"),
    ],
)
def test_bad_input(words, says, tmp_path):
    code, text = forked("evaluate.py", *words, "--tiny", "--out", tmp_path / "evaluate", code=None)
    assert code == 2 and "error:" in text and says in text and "Traceback" not in text
