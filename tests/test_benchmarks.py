"""benchmarks/policy_latency.py and train_step.py: like is compared with like, and the limits are those of the model;
localise.py: distances are of what was asked for; foresight.py: nothing but what was not seen is asked about."""

import json
import math
from dataclasses import replace

import helpers_policy as h
import numpy as np
import pytest
import torch

import common
import distill
import finetune
import lam
from benchmarks import ceiling, foresight, localise, measure, policy_latency, train_step
from common import InputError
from data.stills import stills
from franka import SimFranka, run_trial


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_like_is_compared_with_like():
    """At the full size, without memory: the same VLM, experts of the same layers; published sizes."""
    process = replace(h.process(), device=torch.device("meta"))
    ours, pi0 = policy_latency.make_models("full", policy_latency.Args(), process)
    vlm = pi0.model.vlm
    assert size(ours.student.vlm) == size(vlm) == pytest.approx(2.92e9, rel=0.005)
    assert size(ours.expert) == pytest.approx(size(pi0.model.dit.layers), rel=0.001) == pytest.approx(311e6, rel=0.005)
    assert (pi0.config.chunk_size, pi0.config.max_action_dim, pi0.config.max_state_dim) == (16, 44, 46)
    # What a chunk reads: not the embeddings; ours not what is behind the last layer's keys and values.
    read = policy_latency.read_bytes(ours, pi0, 10, replace(process, dtype=torch.bfloat16))
    last = vlm.language_model.layers[-1]
    behind = sum(map(size, (last.mlp, last.post_attention_layernorm, last.self_attn.q_proj, last.self_attn.o_proj)))
    behind += size(vlm.language_model.norm) + size(ours.student.head)
    embedding = vlm.language_model.embed_tokens.weight.numel()
    assert read["ours"] == 2 * (size(ours) - embedding - behind)
    once, often = size(vlm) - embedding, size(pi0) - size(vlm) - pi0.model.dit.embed_tokens.weight.numel()
    assert read["pi0"] == 2 * (once + 10 * often)


def test_policy_latency(monkeypatch, capsys, tmp_path):
    args = policy_latency.Args()
    ours, pi0 = policy_latency.make_models("tiny", args, h.process())
    made = policy_latency.calls("tiny", ours, pi0, 3, 2, args, h.process())
    chunks = [torch.as_tensor(call()) for call in made.values()]
    assert list(made) == ["ours", "pi0"] and all(c.shape == (2, 16, 44) and c.isfinite().all() for c in chunks)

    out = tmp_path / "t.json"
    command = ["policy_latency", "--sizes", "tiny", "--views", "1", "2", "--batches", "2", "--repeats", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--denoise", "2", "--json", str(out)])
    monkeypatch.setattr(measure, "bandwidth", lambda process: 1e9)
    monkeypatch.setattr(measure, "matmul_peak", lambda process: 1e9)
    policy_latency.main()
    rows = json.loads(out.read_text())
    assert [(r["views"], r["model"]) for r in rows] == [(1, "ours"), (1, "pi0"), (2, "ours"), (2, "pi0")]
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(rows)
    for r in rows:
        assert r["min_ms"] <= r["ms"] and r["weights_ms"] == pytest.approx(r["bytes"] / 1e6)
        assert r["flops_ms"] == pytest.approx(r["flops"] / 1e6)
        assert r["times_limit"] == pytest.approx(r["ms"] / max(r["weights_ms"], r["flops_ms"]))
    # Two views of 64 tokens: the second adds 2 samples x 64 tokens x 2 FLOPs for each weight that sees them, at least.
    seeing = size(ours.student.vlm.vision_tower) + size(ours.student.vlm.language_model.layers[:-1])
    assert rows[2]["flops"] - rows[0]["flops"] > 2 * 2 * 64 * seeing
    assert all(r["pi0_ratio"] == 1 for r in rows if r["model"] == "pi0")

    for words, message in ((["--views", "4"], "one to 3 views"), (["--repeats", "0"], "must be at least 1")):
        monkeypatch.setattr("sys.argv", ["policy_latency", *words])
        with pytest.raises(InputError, match=message):
            policy_latency.main()


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_train_step(stage, monkeypatch, capsys, tmp_path):
    out = tmp_path / "t.json"
    monkeypatch.setattr("sys.argv", ["train_step", "--stages", stage, "--sizes", "tiny", "--batch", "2", "--steps",
                                     "2", "--json", str(out)])  # fmt: skip
    train_step.main()
    plain, recomputing = json.loads(out.read_text())
    assert plain["gflop"] == recomputing["gflop"] > 0.5  # the model's own, not what is recomputed
    assert recomputing["memory"] < plain["memory"] and plain["samples"] == pytest.approx(2 / plain["seconds"])
    assert (plain["frozen"] > 0) == (stage == "distill") and stage in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_the_full_size_needs_a_gpu(monkeypatch):
    for module in (policy_latency, train_step):
        monkeypatch.setattr("sys.argv", ["", "--sizes", "full"])
        with pytest.raises(InputError, match="needs a GPU"):
            module.main()


def test_mfu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    gpu = common.Process(0, 1, torch.device("cuda"), torch.bfloat16)
    assert measure.mfu(989e12 / 4, 0.5, gpu) == pytest.approx(0.5) and measure.mfu(1.0, 1.0, h.process()) is None


def test_a_pixel_is_where_its_line_of_sight_meets_the_plane():
    for still in stills(0, 1, 48):
        eye, axes, half = still.view
        for point in ((0.5, -0.1), (0.45, 0.2)):
            right, up, back = axes.T @ (np.array([*point, localise.HEIGHT]) - eye)
            if back > -0.01:  # behind the wrist camera
                continue
            centre = np.array([1 - up / -back / half, 1 + right / -back / half]) / 2
            np.testing.assert_allclose(localise.on_table(still, centre), point, atol=1e-9)


def test_localise(monkeypatch, capsys, tmp_path):
    """The distances are of the thing that the name says: a model that knows all finds all, whatever the order."""
    asked, size = {}, 64
    monkeypatch.setattr(localise, "detect", lambda model, tokenizer, images, names, process: np.array(
        [asked[image.numpy().tobytes(), name] for image, name in zip(images, names, strict=True)]))  # fmt: skip

    def remember(find, args):
        found = find(args, size)
        for still, name, box in (thing for things in found.values() for thing in things):
            asked[still.image.transpose(2, 0, 1).tobytes(), name] = np.array(box) + (0, 1 / size, 0, 1 / size)
        return found

    for name, find in (("of_stills", localise.of_stills), ("of_tasks", localise.of_tasks)):
        monkeypatch.setattr(localise, name, lambda args, _, find=find: remember(find, args))
    monkeypatch.setattr(common, "setup", lambda *_, **__: h.process())  # it changes torch for all tests after this one
    out = tmp_path / "l.json"
    monkeypatch.setattr("sys.argv", ["localise", "--vlm", "paligemma-tiny", "--scenes", "3", "--trials", "2",
                                     "--json", str(out)])  # fmt: skip
    localise.main()
    rows = {(r["where"], r["camera"]): r for r in json.loads(out.read_text())}
    seen = {where.split(": ")[1] for where, _ in rows if ":" in where}
    assert seen == set(localise.NAMES.values()) and ("stills at home", "primary") in rows
    assert all(r["things"] > 0 and r["pixels"] == pytest.approx(1.0) and r["near"] == 1 for r in rows.values())
    assert 0.3 < rows["pick_cup: red cup", "primary"]["cm"] < 2  # at 64 px one is about 0.8 cm across
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_detect_takes_the_places_that_the_model_says():
    """Each place is asked for after those before it, and is the expected one of its distribution."""
    model, tokenizer = common.load_vlm("paligemma-tiny")
    first, sizes = tokenizer.convert_tokens_to_ids(common.loc(0.0)), []

    def forward(pixel_values, input_ids, **_):
        said = [tokenizer.decode(row[row >= 0]) for row in input_ids]
        sizes.append([text.count("<loc") for text in said])
        logits = torch.full((*input_ids.shape, len(tokenizer)), -50.0)
        for row, text in enumerate(said):
            at = (input_ids[row] == tokenizer.eos_token_id).nonzero()[0, 0] - 1  # of what comes instead of the end
            logits[row, at, first + 10 * (text.count("<loc") + 1) + row + torch.arange(2)] = 9.0
        return type("Output", (), {"last_hidden_state": logits})

    model.model.forward, model.lm_head = forward, torch.nn.Identity()
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    boxes = localise.detect(model, tokenizer, images, ["red cup", "oven"], h.process())
    want = (np.array([[10, 20, 30, 40], [11, 21, 31, 41]]) + 0.5 + 0.5) / common.PLACES
    np.testing.assert_allclose(boxes, want, atol=1e-5)
    assert sizes == [[k, k] for k in range(4)]


def test_the_ceiling_is_reached_by_who_is_told_all():
    args = ceiling.Args(demonstrations=4, disturb=1.0, steps=600)
    robot = SimFranka("close_oven", 0)
    told = ceiling.Told(robot, args)
    seen, done = ceiling.collect(told, args)
    assert len(seen) == len(done) > 60 and done.shape[1] == 7
    assert told.learn(seen, done) < 0.1
    assert sum(run_trial(told, robot, k, 0)["success"] for k in range(4)) >= 3
    # The cup that is asked for comes first, beside the tool: above it, nothing but height is left.
    robot = SimFranka("pick_cup", 0)
    told = ceiling.Told(robot, args)
    for trial in range(4):
        robot.reset(trial, 0)
        beside = told.features()[:3] / 8
        assert np.allclose(beside, robot.where(robot.task.target)[0] - robot.pose()[0], atol=1e-6)


def test_a_student_finds_what_its_model_finds(monkeypatch):
    """Asked through the tied head of a student that was not distilled yet."""
    model, tokenizer = common.load_vlm("paligemma-tiny")
    student = distill.Student(model, tokenizer, (2, 2), 8)
    monkeypatch.setattr(localise, "load_student", lambda source: (student, None, None))
    monkeypatch.setattr(common, "checkpoints", lambda run: [run])
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    want, got = (localise.detect(*m, images, ["red cup", "oven"], h.process())
                 for m in ((model, tokenizer), localise.load("a/run")))  # fmt: skip
    np.testing.assert_array_equal(want, got)


@pytest.fixture(scope="module")
def foreseeing(tmp_path_factory):
    """A data set of two tasks, four episodes of 9 and 10 frames each; a teacher and a student, untrained."""
    folder = tmp_path_factory.mktemp("foresight")
    for _ in h.micro_models():
        h.make_data(folder / "data", episodes=8, length=9)
        h.save_lam(folder / "lam")
        h.save_student(folder / "student", h.make_student(), lam=str(folder / "lam"), more_cameras=())
        yield folder


def asked_about(monkeypatch) -> list[dict]:
    """The batches that foresight.py draws, from here on."""
    drawn, draw = [], foresight.batches

    def batches(*args):
        for batch in draw(*args):
            drawn.append(batch)
            yield batch

    monkeypatch.setattr(foresight, "batches", batches)
    return drawn


def test_what_a_student_foresees(foreseeing, monkeypatch, capsys):
    """Where Z is read as what happens and Zhat as its contrary; and the windows are those that were asked for."""
    drawn = asked_about(monkeypatch)
    signs = iter([-1, 1] * 9)
    monkeypatch.setattr(lam, "decode_actions", lambda model, current, z, index, seed: next(signs) * drawn[-1]["action"])
    flags = ["--student", foreseeing / "student", "--data", foreseeing / "data", "--episodes", 2]
    monkeypatch.setattr("sys.argv", ["foresight", *map(str, flags), "--json", str(foreseeing / "t.json")])
    foresight.main()
    rows = json.loads((foreseeing / "t.json").read_text())
    assert [row["task"] for row in rows] == ["all", *sorted(h.TASKS)]
    assert [row["windows"] for row in rows] == [34, 18, 16]  # of episodes of 10 and of 9 frames
    for row in rows:
        assert row["r"] == pytest.approx(-1) and row["r teacher"] == pytest.approx(1)
        assert row["error"] > row["of mean"] > 0  # the student is not even centred
    drawn.clear()
    signs = iter([-1, 1] * 9)
    monkeypatch.setattr("sys.argv", ["foresight", *map(str, flags), "--start", "1"])
    foresight.main()
    assert sorted(int(k) for batch in drawn for k in batch["index"]) == [34, 42, 51, 59]
    assert "all" in capsys.readouterr().out


def test_what_students_of_the_ablations_foresee(foreseeing, monkeypatch):
    """Without DLA both streams read all tokens, as the teacher's own; without UAD nobody says where the hand goes."""
    drawn, read, decode = asked_about(monkeypatch), [], lam.decode_actions
    monkeypatch.setattr(lam, "decode_actions", lambda *of: read.append(of) or decode(*of))
    asked = foresight.Args(student=str(foreseeing / "student"), data=str(foreseeing / "data"), episodes=1)
    for parts in ({"dla": False}, {"uad": False}):
        name = foreseeing / f"without_{min(parts)}"
        h.save_lam(name, replace(h.LAM_ARGS, **parts))
        asked.lam = str(name)
        if "dla" in parts:
            rows = foresight.of_student(asked, h.process())
            assert rows[0]["windows"] == 17 and all(math.isfinite(row["r"]) for row in rows)
            (model, _, z, *_), batch = read[-1], drawn[-1]
            own = model.encode(batch["video"], batch["instruction"])
            assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(z, own, strict=True))
            assert torch.equal(*z) and z[0].shape[1] == h.LAM_ARGS.scene_tokens + h.LAM_ARGS.motion_tokens
    with pytest.raises(InputError, match="without_uad decodes no actions"):
        foresight.of_student(asked, h.process())


def test_what_a_policy_would_do(foreseeing, monkeypatch):
    """One that does as the demonstrations do, in its own units, is off by nothing; one that does a tenth more, by a
    tenth."""
    torch.manual_seed(0)
    model = finetune.VLA(h.make_student(), "tiny", 4, 2)
    scale = model.action_norm.scale
    scale.copy_(torch.linspace(0.3, 2, len(scale)))
    drawn, seen = asked_about(monkeypatch), []
    args = replace(finetune.TINY, data=(str(foreseeing / "data"),), chunk=4, cameras=("primary", "wrist"))
    windows = finetune.make_windows(replace(args, val_every=0), 32, "all")

    def forward(images, state, instructions, more=1.0):
        seen.append(state)
        return model.action_norm.normalize(windows.action_norms[0].unnormalize(drawn[-1]["action"]) * more)

    monkeypatch.setattr(finetune, "load_policy", lambda *_, **__: type("Policy", (), {"model": model}))
    monkeypatch.setattr(common, "find_checkpoint", lambda *_: None)
    monkeypatch.setattr(common, "load_meta", lambda *_: None)
    monkeypatch.setattr(common, "load_args", lambda *_: args)
    asked = foresight.Args(policy="a", data=str(foreseeing / "data"))
    model.forward = forward
    for row in foresight.of_policy(asked, h.process()):
        assert row["mm"] == pytest.approx(0, abs=1e-3) and row["r"] == pytest.approx(1) and row["of"] > 5
    # States, too, are in the policy's units: here those of metres and shares.
    reader = windows.readers[0]
    true = torch.stack([torch.from_numpy(reader.episode(0)["state"][t]) for t in range(3)])
    nearest = torch.cdist(true.float(), torch.cat(seen).float()).min(1).values
    assert nearest.max() < 1e-3
    model.forward = lambda *of: forward(*of, more=1.1)
    for row in foresight.of_policy(asked, h.process()):
        assert row["mm"] == pytest.approx(row["of"] / 10, rel=1e-3) and row["r"] == pytest.approx(1)


def test_foresight_of_videos(foreseeing):
    windows = finetune.make_windows(replace(finetune.TINY, data=(str(foreseeing / "data"),), val_every=0), 32, "all")
    windows.readers[0].action_names = ()
    with pytest.raises(InputError, match="has no actions"):
        next(foresight.batches(windows, foresight.Args(), h.process()))
