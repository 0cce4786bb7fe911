"""common.py: names and poses, the normaliser, the command line, checkpoints and run folders, the VLMs, the log."""

import ctypes
import dataclasses
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import common
from common import ACTION_NAMES, ARM_ACTION, ARM_STATE, STATE_NAMES, InputError, Normalizer
from data.quantiles import quantile_stats

floats = st.floats(-1, 1, width=32)
angles = st.tuples(*[st.floats(-1.25, 1.25, width=32)] * 3)


# -- names --------------------------------------------------------------------------------------------------------


def test_names_are_the_papers():
    assert len(ACTION_NAMES) == len(set(ACTION_NAMES)) == 44 and len(STATE_NAMES) == len(set(STATE_NAMES)) == 46
    assert ACTION_NAMES[:7] == tuple(f"left_{n}" for n in ("x", "y", "z", "roll", "pitch", "yaw", "gripper"))
    assert ACTION_NAMES[14] == "left_thumb_x" and ACTION_NAMES[-1] == "right_little_z"
    assert [ACTION_NAMES[g] for g in common.GRIPPERS] == ["left_gripper", "right_gripper"]
    assert len(common.MOTION) == 42 and not set(common.MOTION) & set(common.GRIPPERS)
    assert ARM_ACTION[0] == "right_x" and ARM_STATE[3:7] == ("right_qx", "right_qy", "right_qz", "right_qw")


def test_scatter_and_gather():
    values = np.arange(14, dtype=np.float32).reshape(2, 7)
    out = common.scatter(values, ARM_ACTION, ACTION_NAMES)
    assert out.shape == (2, 44) and out.dtype == np.float32 and out.sum() == values.sum()
    assert (out[:, 7:14] == values).all() and (common.gather(out, ARM_ACTION, ACTION_NAMES) == values).all()
    with pytest.raises(InputError, match="unknown dimension names.*joint_1"):
        common.scatter(values[:, :1], ["joint_1"], ACTION_NAMES)
    with pytest.raises(InputError, match="7 values for 8 names"):
        common.scatter(values, ARM_STATE, STATE_NAMES)


# -- poses --------------------------------------------------------------------------------------------------------

down = Rotation.from_euler("x", np.pi).as_quat()  # a tool that points at the table


def test_relative_action_golden_values():
    """A quarter turn about the base's z axis is yaw +pi/2, however the tool is held; translation is the base's too."""
    turned = (Rotation.from_euler("z", np.pi / 2) * Rotation.from_quat(down)).as_quat()
    action = common.relative_action([0.4, 0, 0.3], down, [0.5, -0.1, 0.3], turned)
    np.testing.assert_allclose(action, [0.1, -0.1, 0, 0, 0, math.pi / 2], atol=1e-6)
    assert action.dtype == np.float32


def test_order_of_rotations_is_extrinsic_xyz():
    """(roll, pitch, yaw) = (90, 0, 90) degrees: first about x, then about the base's z. The tool's z axis goes to -y
    and from there to +x. The other order would leave it at -y."""
    _, quaternion = common.apply_action(np.zeros(3), [0, 0, 0, 1], [0, 0, 0, np.pi / 2, 0, np.pi / 2])
    np.testing.assert_allclose(Rotation.from_quat(quaternion).apply([0, 0, 1]), [1, 0, 0], atol=1e-7)


def test_rotation_is_no_difference_of_angles():
    """A tool pointing down sits at roll +-pi, where differences of angles jump by 2 pi."""
    one, two = (Rotation.from_euler("xyz", [a, 0, 0.5]).as_quat() for a in (np.pi - 0.01, -np.pi + 0.01))
    np.testing.assert_allclose(np.linalg.norm(common.relative_action(*[np.zeros(3), one] * 1, np.zeros(3), two)), 0.02,
                               atol=1e-6)  # fmt: skip


@given(st.lists(st.tuples(st.tuples(floats, floats, floats), angles), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None)
def test_apply_inverts_relative(poses):
    position, quaternion = np.array([p for p, _ in poses]), Rotation.from_euler("xyz", [e for _, e in poses]).as_quat()
    action = common.relative_action(position[:-1], quaternion[:-1], position[1:], quaternion[1:])
    position2, quaternion2 = common.apply_action(position[:-1], quaternion[:-1], action)
    np.testing.assert_allclose(position2, position[1:], atol=1e-5)
    away = Rotation.from_quat(quaternion2) * Rotation.from_quat(quaternion[1:]).inv()
    assert away.magnitude().max() < 1e-3 and np.array_equal(quaternion2, common.canonical(quaternion2))


@given(st.lists(st.tuples(st.tuples(floats, floats, floats), angles), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_composition_is_the_product(steps):
    """One composed action moves a pose where the single ones, applied in turn, move it."""
    actions = np.zeros((len(steps), 44))
    actions[:, 7:10], actions[:, 10:13] = [p for p, _ in steps], [e for _, e in steps]
    actions[:, 13] = np.arange(len(steps)) % 2
    actions[:, 20] = 0.5
    position, quaternion = np.array([0.4, 0.1, 0.3]), down
    for action in actions:
        position, quaternion = common.apply_action(position, quaternion, action[7:13])
    composed = common.compose_actions(actions)
    there, turn = common.apply_action(np.array([0.4, 0.1, 0.3]), down, composed[7:13])
    np.testing.assert_allclose(there, position, atol=1e-5)
    assert (Rotation.from_quat(turn) * Rotation.from_quat(quaternion).inv()).magnitude() < 2e-3
    assert composed[13] == actions[-1, 13] and composed[20] == pytest.approx(0.5 * len(steps))
    np.testing.assert_array_equal(common.compose_actions(np.stack([actions, actions])), np.stack([composed, composed]))


# -- normaliser ---------------------------------------------------------------------------------------------------


def stats_of(low, high):
    return {"q01": list(low), "q99": list(high)}


def test_normalizer_maps_quantiles_to_one_and_back():
    low, high = np.array([-0.1, -0.2, 0.0, 0.5, 0, 0, 0]), np.array([0.1, 0.4, 0.3, 0.5, 0, 0, 1])
    norm = Normalizer.from_stats(stats_of(low, high), ARM_ACTION, ACTION_NAMES, "here")
    unit = norm.normalize(torch.from_numpy(common.scatter(np.stack([low, high]), ARM_ACTION, ACTION_NAMES)).float())
    np.testing.assert_allclose(unit[:, 7:10], [[-1] * 3, [1] * 3], atol=1e-6)
    assert unit[0, 10] == 0  # a constant dimension: its value is the centre, and noise around it is not blown up
    assert norm.scale[10] == pytest.approx(common.MIN_RANGE / 2)
    assert unit[:, 13].tolist() == [0, 1]  # the gripper passes untouched
    assert (unit[:, :7] == 0).all() and (norm.scale > 0).all()
    values = torch.randn(50, 44)
    torch.testing.assert_close(norm.unnormalize(norm.normalize(values)), values, atol=1e-5, rtol=1e-5)
    assert set(norm.state_dict()) == {"centre", "scale"}  # it travels in checkpoints


def test_normalizer_refuses_missing_statistics():
    for stats in ({}, None, {"mean": [0] * 7}):
        with pytest.raises(InputError, match="no q01/q99 statistics in here: run `python -m data.stats here`"):
            Normalizer.from_stats(stats, ARM_ACTION, ACTION_NAMES, "here")
    with pytest.raises(InputError, match="3 numbers .* for 7 columns"):
        Normalizer.from_stats(stats_of([0] * 3, [1] * 3), ARM_ACTION, ACTION_NAMES, "here")
    with pytest.raises(InputError, match="NaN: 1"):
        Normalizer.from_stats(stats_of([math.nan] + [0] * 6, [1] * 7), ARM_ACTION, ACTION_NAMES, "here")


def test_quantile_stats():
    stats = quantile_stats(np.arange(101, dtype=np.float32)[:, None])
    assert (stats["q01"], stats["q99"], stats["min"], stats["max"]) == ([1], [99], [0], [100])
    assert stats["count"] == [101] and stats["mean"] == [50]


# -- images -------------------------------------------------------------------------------------------------------


def test_prepare_images_keeps_aspect_and_orientation():
    image = np.zeros((2, 48, 96, 3), np.uint8)
    image[:, :24, :, 0] = 255  # the upper half is red
    out = common.prepare_images(image, 32)
    assert out.shape == (2, 3, 32, 32) and out.dtype == torch.uint8
    assert (out[:, :, :8] == 0).all() and (out[:, :, 24:] == 0).all()  # black borders above and below
    assert (out[:, 0, 8:15] == 255).all() and (out[:, 0, 17:24] == 0).all()  # red above, not below
    assert (common.prepare_images(image[:, :48, :48], 48) == torch.from_numpy(image[:, :48, :48]).movedim(-1, 1)).all()
    for wrong in (image.astype(np.float32), image[..., :1]):
        with pytest.raises(InputError, match="uint8"):
            common.prepare_images(wrong, 32)


# -- command line -------------------------------------------------------------------------------------------------


@dataclass
class Args:
    steps: int = 65_000
    """optimizer steps (Sec. 6.3)"""
    lr: float = 1e-4
    """peak learning rate (Sec. 6.3)"""
    data: tuple[str, ...] = ()
    out: str = "runs/full/lam"
    resume: bool = False


PRESETS = {"tiny": Args(steps=60, data=("data/tiny",)), "small": Args(steps=600)}


@pytest.mark.parametrize("argv", [["--tiny", "--lr", "0.5"], ["--lr", "0.5", "--tiny"]])
def test_presets_in_either_order(argv):
    args = common.parse_args(Args, PRESETS, "text", argv)
    assert (args.steps, args.lr, args.data) == (60, 0.5, ("data/tiny",))


def test_flags_win_over_presets():
    assert common.parse_args(Args, PRESETS, "text", []).steps == 65_000
    assert common.parse_args(Args, PRESETS, "text", ["--steps", "7", "--small"]).steps == 7
    with pytest.raises(InputError, match="one preset"):
        common.parse_args(Args, PRESETS, "text", ["--tiny", "--small"])


def test_help_shows_presets_and_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse_args(Args, PRESETS, "What the stage does.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "What the stage does." in text
    assert "--tiny: steps=60, data=('data/tiny',)" in text and "--small: steps=600" in text
    assert "optimizer steps (Sec. 6.3)" in text


def test_run_main_turns_user_errors_into_one_line(capsys):
    def wrong():
        raise InputError("no data at x: give --data")

    def worker():
        raise InputError("Caught InputError in worker 0.\nOriginal Traceback (most recent call last):\n  File x\n"
                         "common.InputError: video x is absent: copy it")  # fmt: skip

    def interrupt():
        raise KeyboardInterrupt

    for main, code, text in ((wrong, 2, "error: no data at x: give --data\n"), (interrupt, 130, "--resume"),
                             (worker, 2, "error: video x is absent: copy it\n")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            common.run_main(main)
        assert stop.value.code == code and text in capsys.readouterr().err


def test_wilson_golden_values():
    low, high = common.wilson(8, 10)
    assert (round(low, 2), round(high, 2)) == (0.49, 0.94)
    assert common.wilson(0, 10)[0] == 0 and common.wilson(10, 10)[1] == 1 and common.wilson(0, 0) == (0, 1)
    assert all(common.wilson(n, n)[1] == 1 and common.wilson(0, n)[0] == 0 for n in range(1, 400))  # not 1 - 1e-16


def test_learning_rate_endpoints():
    rate = lambda step: common.learning_rate(step, steps=1000, peak=1e-4, floor=2.5e-6, warmup=100)
    assert rate(0) == pytest.approx(1e-6) and rate(99) == pytest.approx(1e-4) and rate(100) == pytest.approx(1e-4)
    assert rate(999) == pytest.approx(2.5e-6) and rate(5000) == pytest.approx(2.5e-6)
    assert all(rate(s) >= rate(s + 1) for s in range(100, 999))


def test_noise_belongs_to_samples():
    cpu = torch.device("cpu")
    whole = common.noise((3, 2), torch.tensor([5, 6, 7]), 0, cpu)
    assert torch.equal(whole[1:], common.noise((3, 2), torch.tensor([6, 7]), 0, cpu))
    assert not torch.equal(whole, common.noise((3, 2), torch.tensor([5, 6, 7]), 1, cpu))
    assert not torch.equal(whole, common.noise((3, 2), torch.tensor([5, 6, 7]), 0, cpu, purpose=1))
    many = common.noise((4000,), torch.tensor([5]), 0, cpu)
    assert abs(many.mean()) < 0.1 and abs(many.std() - 1) < 0.1


def test_import_has_no_side_effects():
    code = (
        "import os, sys, torch, numpy as np; sys.argv = ['x', '--nonsense']; before = dict(os.environ);"
        "state = torch.get_rng_state(); import common; assert dict(os.environ) == before;"
        "assert torch.equal(state, torch.get_rng_state()); assert not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -- checkpoints --------------------------------------------------------------------------------------------------


def make_model(seed: int = 0, width: int = 6):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.GELU(), torch.nn.Linear(width, 2))
    model.register_buffer("centre", torch.randn(3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def train(model, optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        x = common.noise((4,), torch.arange(8) + 8 * step, 0, torch.device("cpu"))
        loss = (model(x) - x[:, :2] ** 2).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def tokenizer():
    return common.make_tokenizer()


def save(run, step, model, optimizer, process, tokenizer, stage="lam", **options):
    common.save_checkpoint(run, step, model, optimizer, {"stage": stage}, tokenizer, process, **options)


def make_layers(seed: int = 0, shares=None):
    """Two layers in a list, whose matrices are Muon's, what is before and behind them, and a layer that is frozen."""
    torch.manual_seed(seed)
    layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in range(3))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(*layers), torch.nn.Linear(4, 2))
    model[1][2].requires_grad_(False)
    args = SimpleNamespace(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, muon=4e-2)
    return model, common.Optimizers(model, args, shares)


def make_shares(seed: int = 0):
    """The same, and what is in the middle learns slowly."""
    return make_layers(seed, {"1.": 0.1})


def test_muon_has_the_matrices_of_the_layers():
    model, optimizer = make_layers()
    names = {p: name for name, p in model.named_parameters()}
    adam, muon = ([names[p] for group in part.param_groups for p in group["params"]] for part in optimizer)
    assert muon == ["1.0.0.weight", "1.1.0.weight"]
    assert set(adam) == set(names.values()) - {*muon, "1.2.0.weight", "1.2.0.bias"}
    optimizer.rate(1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 4e-3])
    before = [p.clone() for p in model.parameters()]
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    moved = {name for (name, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)}
    assert moved == {*names.values()} - {"1.2.0.weight", "1.2.0.bias"}
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(InputError, match="--muon 0.04 follows the schedule of --lr"):
        common.Optimizers(model, SimpleNamespace(lr=0.0, muon=4e-2))
    plain = SimpleNamespace(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, muon=0.0)
    assert [type(part) for part in common.Optimizers(model, plain)] == [torch.optim.AdamW]


@pytest.mark.parametrize("fast", [True, False])
def test_muon_is_that_of_pytorch_in_either_precision(fast, monkeypatch):
    """Bit for bit in bfloat16; in float32, on CPUs without instructions for that, as far as bfloat16 rounds."""
    monkeypatch.setattr(common, "cpu_has_bf16", lambda: fast)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((24, 8), (8, 24), (16, 16))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    mine = common.Muon([{"params": ours, "lr": 0.1}], 0.1, 0.1)
    reference = torch.optim.Muon(theirs, 0.1, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        mine.step(), reference.step()
    for p, q, old in zip(ours, theirs, start, strict=True):
        assert (p - old).abs().mean() > 0.02
        torch.testing.assert_close(p, q, **({"rtol": 0, "atol": 0} if fast else {"rtol": 0.05, "atol": 0.01}))
    assert fast or any(not torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_part_learns_at_a_share_of_the_rates():
    model, optimizer = make_shares()
    names = {p: name for name, p in model.named_parameters()}
    fast = dict.fromkeys(["0.weight", "0.bias", "2.weight", "2.bias"], 1.0)
    slow = {"1.0.0.bias": 0.1, "1.1.0.bias": 0.1, "1.0.0.weight": 0.4, "1.1.0.weight": 0.4}
    for lr in (1e-2, 1e-3):  # from birth, and as the schedule says
        rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates == pytest.approx({name: lr * share for name, share in (fast | slow).items()})
        assert optimizer.param_groups[0]["lr"] == lr  # what a message tells
        optimizer.rate(1e-3)


@pytest.mark.parametrize("make_model", [make_model, make_layers, make_shares])
def test_resuming_is_bit_exact(make_model, tmp_path, process, tokenizer):
    model, optimizer = make_model()
    train(model, optimizer, 0, 3)
    save(tmp_path, 3, model, optimizer, process, tokenizer)
    train(model, optimizer, 3, 6)
    other, optimizer2 = make_model(seed=1)
    found = common.find_checkpoint(tmp_path, "lam")
    common.load_weights(other, found)
    common.load_optimizer(other, optimizer2, found)
    train(other, optimizer2, 3, 6)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_step_that_is_not_finite_changes_nothing(process):
    """Parameters and moments stay, bit for bit, whether loss or gradient is at fault; the fifth in a row stops."""
    model, optimizer = make_model()
    train(model, optimizer, 0, 2)
    tally = {"skipped": 0}
    update = common.Updates(optimizer, 1.0, process, tally)

    def state():
        return [t.clone() for t in model.parameters()] + [
            v.clone() for s in optimizer.state.values() for v in s.values()
        ]

    def step(times: float, add: float) -> None:
        loss = model(torch.ones(4, 4)).square().sum() * times + add
        loss.backward()
        update(loss.detach())

    before = state()
    step(math.nan, 0)
    step(1, math.inf)  # an infinite loss whose gradient is finite
    step(math.inf, 0)
    assert tally["skipped"] == 3 and all(map(torch.equal, before, state()))
    assert all(p.grad is None for p in model.parameters())
    step(1, 0)
    assert tally["skipped"] == 3 and not any(map(torch.equal, before, state()))
    with pytest.raises(InputError, match="5 steps in a row .*--lr.*--resume"):
        for _ in range(5):
            step(math.nan, 0)
    assert tally["skipped"] == 8


def test_the_gradient_is_clipped_to_its_global_norm(process):
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    update = common.Updates(torch.optim.SGD(model.parameters(), lr=1.0), 0.5, process, {"skipped": 0})
    loss = model(torch.tensor([[0.0, 3.0, 4.0]])).sum()
    loss.backward()
    assert update(loss.detach()) == pytest.approx(5)  # before clipping
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.0, -0.3, -0.4]]))


def test_ranks_may_change_where_the_global_batch_does_not(tmp_path, process, tokenizer):
    @dataclasses.dataclass
    class Batched(Args):
        batch: int = 8
        accumulate: int = 1

    out, two = str(tmp_path / "run"), dataclasses.replace(process, world=2)
    two.barrier, two.gather = lambda: None, lambda values: values
    common.open_run(out, Batched(), two, resume=False)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n')
    for args, ranks in ((Batched(), two), (Batched(batch=16), process), (Batched(batch=4, accumulate=4), process)):
        common.open_run(out, args, ranks, resume=True)
    with pytest.raises(InputError, match="global batch of 16 .*one of 8: choose .* with product 16"):
        common.open_run(out, Batched(), process, resume=True)
    @dataclasses.dataclass
    class Asked(Batched):  # each micro-step and rank has stills of its own
        stills: int = 1

    common.open_run(str(tmp_path / "asked"), Asked(), two, resume=False)
    (tmp_path / "asked/metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(InputError, match=r"other arguments .*'batch': \(8, 16\), 'world': \(2, 1\)"):
        common.open_run(str(tmp_path / "asked"), Asked(batch=16), process, resume=True)
    two.gather = lambda values: [*values, "None"]  # the other rank sees no checkpoint
    model, optimizer = make_model()
    save(tmp_path / "run", 5, model, optimizer, process, tokenizer)
    with pytest.raises(InputError, match="different checkpoints .*all nodes must share --out"):
        common.open_run(out, Batched(), two, resume=True)
    three = dataclasses.replace(two, world=3)
    with pytest.raises(InputError, match="one of 24: choose ranks that divide 16"):
        common.open_run(out, Batched(), three, resume=True)


def test_checkpoint_contents_and_keep(tmp_path, process, tokenizer):
    model, optimizer = make_model()
    train(model, optimizer, 0, 1)
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer, process, tokenizer)
    assert [p.name for p in common.checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    meta = common.load_meta(common.checkpoints(tmp_path)[-1])
    assert meta["step"] == 3 and meta["stage"] == "lam" and "commit" in meta
    names = {p.name for p in common.checkpoints(tmp_path)[-1].iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "meta.json", "tokenizer.json"} <= names
    assert not [n for n in names if n.endswith((".pt", ".pkl", ".bin"))]  # nothing pickled


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["save_file", "write_json", "os.replace", "shutil.rmtree"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_inside_a_save_leaves_the_older_checkpoint(tmp_path, process, tokenizer, monkeypatch, where, keep):
    """Dies at every call of every file operation in turn; whatever is left, a whole checkpoint is found and loads."""
    for dies_at in range(5):
        run = tmp_path / f"{where}{dies_at}"
        model, optimizer = make_model()
        train(model, optimizer, 0, 1)
        save(run, 1, model, optimizer, process, tokenizer, keep=keep)
        save(run, 2, model, optimizer, process, tokenizer, keep=keep)
        owner, name = (getattr(common, where.split(".")[0]), where.split(".")[1]) if "." in where else (common, where)
        real, calls = getattr(owner, name), []

        def dying(*args, real=real, calls=calls, dies_at=dies_at, **kwargs):
            calls.append(args)
            if len(calls) > dies_at:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            try:
                save(run, 3, model, optimizer, process, tokenizer, keep=keep)
            except Killed:
                pass
        found = common.find_checkpoint(run, "lam")
        assert found.name in ("step_00000002", "step_00000003")
        other, optimizer2 = make_model(seed=1)
        common.load_weights(other, found)
        common.load_optimizer(other, optimizer2, found)
        (run / "args.json").write_text(json.dumps(dataclasses.asdict(Args())))
        _, kept = common.open_run(str(run), Args(resume=True), process, resume=True)
        assert kept == found and not list(run.glob("checkpoints/*.partial"))  # what a kill left is cleared away
        save(run, 3, model, optimizer, process, tokenizer, keep=keep)
        assert common.find_checkpoint(run, "lam").name == "step_00000003"


def test_half_written_folders_are_ignored(tmp_path, process, tokenizer):
    model, optimizer = make_model()
    save(tmp_path, 1, model, optimizer, process, tokenizer)
    for name in ("step_00000002.partial", "step_00000003"):  # the second without its meta.json, which is written last
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"\0" * 10)
    assert common.find_checkpoint(tmp_path, "lam").name == "step_00000001"


def test_wrong_checkpoints_are_refused(tmp_path, process, tokenizer):
    with pytest.raises(InputError, match="no lam checkpoint at .*: run `python lam.py --tiny` first"):
        common.find_checkpoint(tmp_path / "tiny/lam", "lam")
    with pytest.raises(InputError, match="holds no finished checkpoint: run `python lam.py --resume` first"):
        common.find_checkpoint(tmp_path, "lam")
    model, optimizer = make_model()
    save(tmp_path, 1, model, optimizer, process, tokenizer)
    with pytest.raises(InputError, match="is a checkpoint of 'lam', not of 'distill'"):
        common.find_checkpoint(tmp_path, "distill")
    found = common.find_checkpoint(tmp_path, "lam")
    with pytest.raises(InputError, match=r"4 of another shape.*'0.weight': \(\(6, 4\), \(8, 4\)\)|3 of another shape"):
        common.load_weights(make_model(width=8)[0], found)
    deeper = torch.nn.Sequential(*make_model()[0], torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"2 tensors missing \['3.weight', '3.bias'\], 1 left over \['centre'\]"):
        common.load_weights(deeper, found)


def test_a_run_without_its_arguments_is_not_taken_over(tmp_path, process, tokenizer):
    model, optimizer = make_model()
    train(model, optimizer, 0, 1)
    save(tmp_path, 1, model, optimizer, process, tokenizer)
    with pytest.raises(InputError, match="already holds a run"):
        common.open_run(str(tmp_path), Args(), process, resume=False)
    with pytest.raises(InputError, match="args.json is damaged"):
        common.open_run(str(tmp_path), Args(), process, resume=True)


def test_what_was_made_small_cannot_be_trained_further(tmp_path, process, tokenizer):
    model, optimizer = make_layers()
    save(tmp_path, 1, model, optimizer, process, tokenizer)
    found = common.find_checkpoint(tmp_path, "lam")
    (found / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match="has no optimizer.*choose another --out"):
        common.load_optimizer(model, optimizer, found)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "meta.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, process, tokenizer, name):
    model, optimizer = make_model()
    train(model, optimizer, 0, 1)
    save(tmp_path, 1, model, optimizer, process, tokenizer)
    found = common.checkpoints(tmp_path)[0]
    (found / name).write_bytes((found / name).read_bytes()[:20])
    with pytest.raises(InputError, match="damaged.*delete"):
        common.find_checkpoint(tmp_path, "lam")
        common.load_weights(model, found)
        common.load_optimizer(model, optimizer, found)


def test_arguments_of_another_commit_are_refused():
    with pytest.raises(InputError, match="abc.*train again"):
        common.load_args(Args, {"args": {"lr": 1.0, "gone": 2}, "commit": "abc", "stage": "lam"})


def test_open_run_refuses_and_resumes(tmp_path, process, tokenizer):
    out = str(tmp_path / "run")
    run, kept = common.open_run(out, Args(out=out), process, resume=False)
    assert kept is None and (run / "args.json").exists()
    assert common.open_run(out, Args(out=out, lr=0.5), process, resume=False)[1] is None  # nothing was lost: taken over
    assert '"lr": 0.5' in (run / "args.json").read_text()
    common.open_run(out, Args(out=out), process, resume=False)
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    with pytest.raises(InputError, match="no checkpoint yet.*--resume"):
        common.open_run(out, Args(out=out), process, resume=False)
    model, optimizer = make_model()
    save(run, 5, model, optimizer, process, tokenizer)
    with pytest.raises(InputError, match="step_00000005.*--resume.*another --out"):
        common.open_run(out, Args(out=out), process, resume=False)
    _, kept = common.open_run(out, Args(out=out, resume=True), process, resume=True)
    assert kept == common.checkpoints(run)[-1]
    for changed in (Args(steps=7), Args(data=("other",)), Args(lr=1.0)):
        with pytest.raises(InputError, match="other arguments"):
            common.open_run(out, changed, process, resume=True)
    # Of an option that came after the run, the default is what the run did.
    then = json.loads((run / "args.json").read_text())
    del then["lr"]
    common.write_json(run / "args.json", then)
    assert common.open_run(out, Args(out=out), process, resume=True)[1] == kept
    with pytest.raises(InputError, match="other arguments.*lr"):
        common.open_run(out, Args(lr=1.0), process, resume=True)
    assert common.open_run(str(tmp_path / "new"), Args(), process, resume=True)[1] is None  # nothing there yet: a start


def test_metrics_log_drops_what_is_past_the_checkpoint(tmp_path, process, capsys):
    log = common.MetricsLog(tmp_path, 0, 10, process, "lam")
    for step in range(1, 6):
        log.write(step, {"loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line that a kill cut short
    assert len(common.read_metrics(tmp_path)) == 5
    log = common.MetricsLog(tmp_path, 3, 10, process, "lam")
    log.write(4, {"loss": 9.0})
    log.close()
    rows = common.read_metrics(tmp_path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 9.0
    common.MetricsLog(tmp_path / "none", 0, 1, common.Process(1, 2, process.device, process.dtype), "x").write(1, {})
    assert not (tmp_path / "none").exists()


# -- tokenizer and models -----------------------------------------------------------------------------------------


def test_tokenizer_is_deterministic_and_spells_everything(tokenizer, tmp_path):
    code = "import common; print(common.make_tokenizer().backend_tokenizer.to_str())"
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert there.stdout.strip() == tokenizer.backend_tokenizer.to_str()  # another process, another hash seed
    for text in ("pick up the red cup", "Ä völlig neues Wort, 3.14!\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(tokenizer("pick up the red cup").input_ids) <= 6
    for token in common.SPECIAL:
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1, token
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(common.LAM_QUESTION + common.LAM_ANSWER).input_ids == tokenizer(
        common.LAM_QUESTION + common.LAM_ANSWER
    ).input_ids  # fmt: skip


@pytest.mark.parametrize("size", ["internvl-tiny", "paligemma-tiny"])
def test_vlm_round_trip_through_a_folder(size, tmp_path):
    """Random model -> save_pretrained -> loaded as a pretrained one: the same weights under the same names."""
    torch.manual_seed(0)
    model, tokenizer = common.load_vlm(size)
    assert model.config.model_type == size.split("-")[0]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer2 = common.load_vlm(str(tmp_path))
    own = again.state_dict()
    assert model.state_dict().keys() == own.keys()
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())
    assert tokenizer2("open the oven").input_ids == tokenizer("open the oven").input_ids
    empty, _ = common.load_vlm(size, config=model.config.to_dict(), tokenizer_dir=tmp_path)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in own.items()}


def test_vlm_checkpoint_with_tied_weights(tmp_path, process):
    model, tokenizer = common.load_vlm("paligemma-tiny")
    common.save_checkpoint(tmp_path, 1, model, None, {"stage": "distill"}, tokenizer, process)
    other, _ = common.load_vlm("paligemma-tiny")
    common.load_weights(other, common.find_checkpoint(tmp_path, "distill"))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_vlm_of_another_family_or_nowhere(tmp_path):
    from transformers import Qwen3Config

    Qwen3Config(hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'qwen3' model; this stage needs one of"):
        common.load_vlm(str(tmp_path))
    with pytest.raises(InputError, match="no vision-language model at .*nowhere.*internvl-tiny"):
        common.load_vlm(str(tmp_path / "nowhere"))


def test_vlm_with_weights_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer = common.load_vlm("internvl-tiny")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(k for k in weights if "q_proj" in k)
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="1 tensors missing .*q_proj"):
        common.load_vlm(str(tmp_path))


def test_normalize_pixels():
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(common.normalize_pixels(white, "paligemma", torch.float32), torch.ones(1, 3, 2, 2))
    assert common.normalize_pixels(white, "internvl", torch.float32)[0, 0, 0, 0] == pytest.approx((1 - 0.485) / 0.229)


def test_setup_seeds_every_rank_alike(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    process = common.setup(3)
    first = torch.randn(2)
    common.setup(3)
    assert torch.equal(first, torch.randn(2)) and process.world == 1 and process.main
    assert torch.equal(process.sum(torch.ones(2)), torch.ones(2))


def test_a_commit_has_a_plus_where_programs_differ(tmp_path, monkeypatch):
    """Results and texts may differ: a queue commits them later."""
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    git = lambda *a: subprocess.run(["git", *a], cwd=tmp_path, check=True)
    git("init", "-q")
    programs = ["common.py", "data/schema.py", "data/mappings/a.json", "pyproject.toml"]
    files = {tmp_path / name: name in programs for name in [*programs, "results/small/a.json", "README.md"]}
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "commit", "-qm", "all")
    head = common.git_commit()
    assert len(head) == 12 and "+" not in head
    for path, plus in files.items():
        path.write_text("2")
        assert common.git_commit() == head + "+" * plus
        path.write_text("1")


def test_setup_for_bfloat16_leaves_nothing_for_float32(monkeypatch):
    """On a CPU with bfloat16 the fused attention is off; whoever sets up for float32 afterwards has it again."""
    monkeypatch.setattr(common, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cpu_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        assert common.setup(0, cpu_bf16=cpu_bf16).dtype == dtype
        assert torch.backends.cuda.flash_sdp_enabled() == (dtype == torch.float32)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"stage": "lam"}', "\xff"])
def test_damaged_metadata_are_named(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is damaged .*delete it, and the one before it is used"):
        common.load_meta(tmp_path)
    if text in ("{", "\xff"):
        with pytest.raises(InputError, match="is damaged .*choose another --out"):
            common.read_json(tmp_path / "meta.json")


def test_lines_of_a_log_that_are_none_are_left_out(tmp_path):
    lines = (b'{"step": 1, "a": 2}', b"3", b'{"a": 1}', b"\xff\xfe", b'{"step": 2, "a": 3}', b'{"step": 3')
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [row["a"] for row in common.read_metrics(tmp_path)] == [2, 3]


def test_a_checkpoint_without_its_tokenizer_is_named(tmp_path):
    vlm, tokenizer = common.load_vlm("internvl-tiny")
    tokenizer.save_pretrained(tmp_path)
    assert len(common.load_vlm("", vlm.config.to_dict(), tmp_path)[1]) == len(tokenizer)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no tokenizer"):
        common.load_vlm("", vlm.config.to_dict(), tmp_path)


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_numbers_out_of_range_are_refused(value):
    with pytest.raises(InputError, match="--lr .* must be at least 0 and finite"):
        common.at_least(SimpleNamespace(lr=value), lr=0)


GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not GLIBC, reason="only glibc gives memory back")
def test_memory_in_holes_is_given_back(tmp_path, process, tokenizer):
    """What is free between blocks still in use counts for the process until a checkpoint is saved."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    blocks = [torch.ones(8_000) for _ in range(10_000)]  # 320 MB, in blocks too small to be mapped each by itself
    kept = blocks[::50]
    before = resident()
    del blocks
    assert before - resident() < 100
    common.save_checkpoint(tmp_path, 1, torch.nn.Linear(2, 2), None, {"stage": "lam"}, tokenizer, process)
    assert before - resident() > 200 and len(kept) == 200


def test_several_write_the_same_json(tmp_path):
    """As machines that share a queue do: nobody takes away what another is about to rename."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: common.write_json(tmp_path / "x.json", {"i": i}), range(400)))
    assert common.read_json(tmp_path / "x.json")["i"] in range(400)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
