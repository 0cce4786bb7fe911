"""finetune.py: the loss by hand, the expert against joint attention, what is trained, the policy in physical units."""

import math
import shutil
from dataclasses import replace

import helpers_policy as h
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import distill
import finetune
from common import ACTION_NAMES, GRIPPERS, STATE_NAMES, InputError
from data.lerobot import DamagedEpisode, LeRobotReader
from data.windows import augment, collate
from finetune import Read

TEXTS = ["close the oven", "put the building block into the corresponding slot, slowly", "go"]


@pytest.fixture(scope="module", autouse=True)
def micro():
    yield from h.micro_models()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return h.make_data(tmp_path_factory.mktemp("finetune") / "data")


@pytest.fixture(scope="module")
def model(micro):
    torch.manual_seed(0)
    return finetune.VLA(h.make_student(), "tiny", chunk=4, cameras=2).eval()


def inputs(b: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    state = torch.randn(b, 46, generator=torch.Generator().manual_seed(seed))
    return h.pictures(b, k=2, seed=seed), state, TEXTS[:b]


def run_args(data, out, **changes) -> finetune.Args:
    changes = dict(init="paligemma-micro", latents=(3, 2), chunk=4, execute=2, batch=4, steps=4, save_every=2,
                   log_every=1, warmup=1, val_every=4, val_samples=6) | changes  # fmt: skip
    sources = data if isinstance(data, tuple) else (data,)
    return replace(finetune.TINY, data=tuple(map(str, sources)), out=str(out), **changes)


def test_the_beginnings_are_for_training(data):
    """--starts reaches the windows that are learned from, and not those that measure."""
    args = run_args(data, "", starts=0.7)
    assert [finetune.make_windows(args, 32, split).starts for split in ("train", "val")] == [0.7, 0]


# -- loss --------------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """Two steps; the right arm's x and gripper are valid at the first, the gripper alone at the second."""
    actions, target = torch.zeros(1, 2, 44), torch.zeros(1, 2, 44)
    mask = torch.zeros(1, 2, 44, dtype=torch.bool)
    x, gripper = ACTION_NAMES.index("right_x"), ACTION_NAMES.index("right_gripper")
    mask[0, 0, x] = mask[0, :, gripper] = True
    actions[0, 0, x], target[0, 0, x] = 0.5, -1.0
    actions[0, :, gripper], target[0, :, gripper] = torch.tensor([math.log(3), -math.log(3)]), torch.tensor([1.0, 1.0])
    actions[0, 1, x + 1] = actions[0, 0, 3] = 100.0  # masked: must not count
    loss, parts = finetune.policy_loss(actions, target, mask, torch.tensor([1.0, 2.0]))
    assert parts["ee"].item() == pytest.approx(2.25)
    assert parts["gripper"].item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)  # p(open) = 3/4 and 1/4
    assert loss.item() == pytest.approx(2.25 + math.log(16 / 3) / 2)
    assert finetune.policy_loss(actions, target, mask, torch.tensor([2.0, 4.0]))[0].item() == pytest.approx(loss / 2)


def test_validation_in_closed_form(monkeypatch):
    """Two windows of one step: the right hand is off by 3 and 4 normalised units, of 2 mm and 1 mm, in the first and
    by nothing in the second; two of three grippers are right. Of a third window nothing is valid."""
    x, gripper = ACTION_NAMES.index("right_x"), ACTION_NAMES.index("right_gripper")
    target, mask = torch.zeros(3, 1, 44), torch.zeros(3, 1, 44, dtype=torch.bool)
    mask[:2, :, x : x + 3] = mask[:2, :, gripper] = mask[0, :, GRIPPERS[0]] = True
    target[:, :, gripper] = 1
    actions = target.clone()
    actions[..., GRIPPERS[0]] = -1
    actions[0, 0, x : x + 2] = torch.tensor([3.0, 4.0])
    actions[:, 0, gripper] = torch.tensor([2.0, -2.0, -2.0])
    actions[2] = 50
    scale = torch.ones(44)
    scale[x : x + 2] = torch.tensor([0.002, 0.001])
    norm = type("Norm", (), {"scale": scale})
    windows = type("AllWindows", (), {"action_norms": [norm]})
    model = type("Model", (), {"eval": lambda self: self, "train": lambda self: self,
                               "__call__": lambda self, images, state, texts: actions[state.long()]})()  # fmt: skip
    batches = [{"action": target[i], "action_mask": mask[i], "state": i, "instruction": [],
                "primary": torch.zeros(1, 1)} for i in torch.arange(3).split(2)]  # fmt: skip
    monkeypatch.setattr(finetune, "held_out_batches", lambda *_: batches)
    mean = torch.ones(1, 44)
    out = finetune.validate(model, windows, mean, run_args("", "", cameras=("primary",)), h.process())
    assert out == pytest.approx({"val_ee": 25 / 6, "val_ee_mean": 1, "val_gripper_accuracy": 2 / 3,
                                 "val_millimetres": math.hypot(6, 4) / 2})  # fmt: skip


# -- model -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def joint_reference(m: finetune.VLA, images, state, instructions) -> torch.Tensor:
    """The same mathematics written differently: student and expert side by side in one attention per layer, over one
    sequence [prefix | state | queries], with one mask."""
    from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

    student, gemma, expert = m.student, m.student.vlm.language_model, m.expert
    x, group, valid, positions = student.prefix(images, instructions)
    y = torch.cat([m.state_in(state)[:, None], m.queries.expand(len(state), -1, -1)], 1)
    n, k = x.shape[1], y.shape[1]
    mask = torch.zeros(len(state), 1, n + k, n + k, dtype=torch.bool)
    mask[:, :, :n, :n] = distill.attention_mask(group, valid)
    mask[:, :, n:, :n] = valid[:, None, None, :]
    mask[:, :, n:, n:] = True
    positions = torch.cat([positions, valid.sum(1, keepdim=True) + torch.arange(k)], 1)
    cos, sin = gemma.rotary_emb(x, position_ids=positions)
    for a, b in zip(gemma.layers, expert.layers, strict=True):
        parts = []
        for layer, tokens in ((a, x), (b, y)):
            normed, attention = layer.input_layernorm(tokens), layer.self_attn
            split = lambda t: t.unflatten(-1, (-1, 32)).transpose(1, 2)
            parts.append([split(p(normed)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)])  # noqa: B023
        q, key, value = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        q, key = apply_rotary_pos_emb(q, key, cos, sin)
        key, value = (t.expand(-1, q.shape[1], -1, -1) for t in (key, value))
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        out = [out[:, :n], out[:, n:]]
        for i, (layer, tokens) in enumerate(((a, x), (b, y))):
            tokens = tokens + layer.self_attn.o_proj(out[i])
            out[i] = tokens + layer.mlp(layer.post_attention_layernorm(tokens))
        x, y = out
    return m.action_out(expert.norm(y)[:, 1:])


@torch.no_grad()
def test_expert_equals_joint_attention(model):
    """The expert on the student's cache is the block-wise attention of pi0, also with padding in the batch; and the
    training mode gives the same as inference."""
    images, state, instructions = inputs()
    out = model(images, state, instructions)
    assert out.shape == (3, 4, 44)
    torch.testing.assert_close(out, joint_reference(model, images, state, instructions), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.train()(images, state, instructions), out, atol=1e-6, rtol=0)
    model.eval()


@torch.no_grad()
def test_a_batch_equals_singles(model):
    images, state, instructions = inputs()
    out = model(images, state, instructions)
    for i in range(3):
        single = model(images[i : i + 1], state[i : i + 1], instructions[i : i + 1])
        torch.testing.assert_close(out[i], single[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_everything_is_read(model):
    """Each view, the state, the instruction and the latent queries change the actions."""
    images, state, instructions = inputs(1)
    out = model(images, state, instructions)
    swapped = images.flip(1)
    one = images.clone()
    one[:, 1] = 0
    for changed in ((swapped, state, instructions), (one, state, instructions), (images, state + 0.5, instructions),
                    (images, state, TEXTS[1:2])):  # fmt: skip
        assert (model(*changed) - out).abs().max() > 1e-4
    kept = model.student.queries.clone()
    model.student.queries.mul_(-1)
    assert (model(images, state, instructions) - out).abs().max() > 1e-4
    model.student.queries.copy_(kept)


def test_trained_are_those_with_a_gradient(micro):
    """freeze_unread leaves out exactly what gets no gradient, and the rest learns within two steps."""
    model = finetune.VLA(h.make_student(), "tiny", chunk=4, cameras=2).train()
    images, state, instructions = inputs()
    target, mask = torch.rand(3, 4, 44), torch.ones(3, 4, 44, dtype=torch.bool)
    counts = torch.tensor([504.0, 24.0])
    loss = lambda: finetune.policy_loss(model(images, state, instructions), target, mask, counts)[0]
    loss().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    model.zero_grad(set_to_none=True)
    model.freeze_unread()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == without and any("mlp" in n for n in frozen) and "student.head.weight" in frozen
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    grads: dict[str, float] = {}
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        for n, p in model.named_parameters():
            grads[n] = grads.get(n, 0) + (0 if p.grad is None else p.grad.abs().sum().item())
        optimizer.step()
    assert {n for n, g in grads.items() if g == 0} == frozen
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in frozen)
    still = {n for n, p in model.named_parameters() if torch.equal(before[n], p)} - frozen
    assert all("k_proj.bias" in n for n in still), still  # softmax does not feel them: rounding only


def test_a_student_that_is_asked_learns_to_answer(data, tmp_path, micro):
    """Beside the actions, and in its last layer, too, which the expert does not read; without --lambda-r it changes
    nothing that the expert reads. A run goes on bit for bit. One that stays as it is cannot be asked."""
    costs, model = {}, lambda run, step: common.read_tensors(run / f"checkpoints/step_{step:08d}/model.safetensors")
    for stills in (0, 1):
        torch.manual_seed(0)
        args = run_args(data, tmp_path / str(stills), stills=stills, steps=24, save_every=12, lr=1e-2, lambda_r=1.0)
        finetune.train(args, h.process())
        policy = finetune.load_policy(tmp_path / str(stills), compile=False)
        with torch.no_grad():
            quiz = distill.still_questions(replace(args, stills=2), 900, policy.model.student)
            logits, words = policy.model.answer(*quiz)
        costs[stills] = (distill.nats(logits, words).sum() / (words >= 0).sum()).item()
        logged = [line for line in h.log(tmp_path / str(stills)) if "grad_norm" in line]
        assert all(("text" in line) == bool(stills) for line in logged)
        last = "student.vlm.language_model.layers.2.mlp.down_proj.weight"
        assert torch.equal(*(model(tmp_path / str(stills), k)[last] for k in (12, 24))) == (not stills)
    assert costs[1] < 0.6 * costs[0]
    shutil.copytree(tmp_path / "1", tmp_path / "on")
    shutil.rmtree(tmp_path / "on/checkpoints/step_00000024")
    finetune.train(replace(args, out=str(tmp_path / "on"), resume=True), h.process())
    assert all(torch.equal(p, model(tmp_path / "on", 24)[name]) for name, p in model(tmp_path / "1", 24).items())
    for stills in (0, 1):
        torch.manual_seed(0)
        finetune.train(run_args(data, tmp_path / f"mute{stills}", stills=stills, lambda_r=0.0), h.process())
    mute = [model(tmp_path / f"mute{stills}", 4) for stills in (0, 1)]
    changed = {name for name, p in mute[0].items() if not torch.allclose(p, mute[1][name], rtol=1e-5, atol=1e-6)}
    unread = (".layers.2.", "language_model.norm.", "k_proj.bias")  # decay alone; and what is but rounding
    assert not {name for name in changed if not any(part in name for part in unread)}
    with pytest.raises(InputError, match="--stills 1 asks, .* --student-lr 0 .* it learns nothing of it"):
        finetune.check(replace(args, student_lr=0.0))


def test_checkpointing_changes_no_gradient(micro):
    """And it recomputes: fewer tensors are kept for the backward pass."""
    images, state, instructions = inputs()
    grads, kept = [], []
    for checkpointing in (False, True):
        model = finetune.VLA(h.make_student(), "tiny", 4, 2, checkpointing).train()
        torch.manual_seed(0)
        for p in model.expert.parameters():
            torch.nn.init.normal_(p, std=0.05)
        for p in (*model.state_in.parameters(), *model.action_out.parameters(), model.queries):
            torch.nn.init.normal_(p, std=0.05)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            out = model(images, state, instructions)
        out.square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        kept.append(sum(sizes))
    assert grads[0].keys() == grads[1].keys() and kept[1] < kept[0] / 2
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_students_of_every_origin_make_the_same_policy(tmp_path, micro):
    """A distilled student (one distilled with recomputed activations at that), PaliGemma's own folder, and random
    weights: the same tensors, the same ones trained, so that Table 4 compares nothing but what was learned before."""
    vlm, tokenizer = common.load_vlm("paligemma-micro")
    vlm.save_pretrained(tmp_path / "paligemma")
    tokenizer.save_pretrained(tmp_path / "paligemma")
    run = h.save_student(tmp_path / "distilled", h.make_student(latent_dim=64, seed=5), checkpointing=True)
    shapes, models = [], []
    for init in (str(run), str(tmp_path / "paligemma"), "paligemma-micro"):
        model = finetune.build(run_args("", "", init=init)).train()
        model.freeze_unread()
        shapes.append({n: (p.shape, p.requires_grad) for n, p in model.named_parameters()})
        out = model(*inputs(1))  # in training mode, where recomputed layers would leave no cache behind
        assert torch.isfinite(out).all()
        models.append(model)
    assert shapes[0] == shapes[1] == shapes[2]
    distilled, folder, _ = models
    assert torch.equal(distilled.student.queries, distill.load_student(run)[0].queries)
    assert torch.equal(folder.student.vlm.get_input_embeddings().weight, vlm.get_input_embeddings().weight)


# -- data --------------------------------------------------------------------------------------------------------------


def test_views_follow_the_cameras(data):
    for cameras in (("primary", "wrist"), ("wrist", "primary"), ("wrist",)):
        args = run_args(data, "", cameras=cameras)
        windows = finetune.make_windows(args, 32, "train")
        batch = collate([windows[0]])
        images = finetune.views(batch, args)
        assert images.shape == (1, len(cameras), 3, 32, 32)
        for k, camera in enumerate(cameras):
            assert torch.equal(images[:, k], batch[camera][:, 0])
        assert len(cameras) == 1 or not torch.equal(images[:, 0], images[:, 1])


def changed_copy(data, root, file: str, change):
    """A copy of a data set with one of its JSON files in meta/ changed."""
    shutil.copytree(data, root)
    value = common.json.loads((root / f"meta/{file}.json").read_text())
    change(value)
    common.write_json(root / f"meta/{file}.json", value)
    return root


def wider(stats: dict) -> None:
    """Twice the range in x, and y moved up."""
    for key in ("q01", "q99"):
        stats["action"][key][0] *= 2
        stats["action"][key][1] += 1


def test_several_data_sets_share_a_normaliser(data, tmp_path):
    """Its range holds that of each; a physical action is one normalised action, whichever data set it is in; and it is
    the policy's."""
    other = changed_copy(data, tmp_path / "other", "stats", wider)
    args = run_args((data, other), tmp_path / "run", steps=1, save_every=1)
    windows = finetune.make_windows(args, 32, "train")
    (norm, same), alone = windows.action_norms, finetune.make_windows(run_args(data, ""), 32, "train").action_norms[0]
    x, y = 7, 8
    assert norm is same and norm.scale[13] == 1 and norm.centre[13] == 0
    torch.testing.assert_close(norm.scale[9:], alone.scale[9:])
    assert norm.scale[x] > 1.5 * alone.scale[x] and norm.scale[y] == pytest.approx(alone.scale[y] + 0.5)
    assert norm.centre[y] == pytest.approx(alone.centre[y] + 0.5)
    one, two = (windows.window(d, 3) for d in range(2))
    assert torch.equal(one["action"], two["action"]) and torch.equal(one["state"], two["state"])
    action = LeRobotReader(data).episode(int(windows.chosen[0][0]))["action"][3]
    np.testing.assert_allclose(norm.unnormalize(one["action"][0]), action, atol=1e-6)
    assert {windows.choose(i) for i in range(8)} == {0, 1}
    finetune.train(args, h.process())
    trained = finetune.load_policy(tmp_path / "run").model.action_norm
    assert torch.equal(trained.scale, norm.scale) and torch.equal(trained.centre, norm.centre)


def test_the_sizes_of_the_pictures(data, tmp_path, normed):
    """Of each data set, with the colours first or last or not told at all; a checkpoint without: the model's own."""
    others = [h.make_data(tmp_path / "other", episodes=4, size=(64, 96))]
    wrist = lambda info: info["features"]["observation.images.wrist"]
    others.append(changed_copy(data, tmp_path / "first", "info", lambda info: wrist(info).update(shape=[3, 32, 40])))
    others.append(changed_copy(data, tmp_path / "untold", "info", lambda info: wrist(info).pop("shape")))
    windows = finetune.make_windows(run_args((data, *others), "", preload=False), 32, "train")
    assert finetune.picture_sizes(windows) == {
        "primary": [[48, 64], [64, 96]], "wrist": [[48, 64], [64, 96], [32, 40]]}  # fmt: skip
    assert policy_of(normed).pictures == {"primary": [[32, 32]], "wrist": [[32, 32]]}


def test_data_sets_of_other_columns_are_refused(data, tmp_path):
    rename = lambda info: info["features"]["action"]["names"].__setitem__(5, "left_yaw")
    other = changed_copy(data, tmp_path / "other", "info", rename)
    args = run_args((data, other), tmp_path / "run")
    with pytest.raises(InputError, match=r"differ in their action_names \['left_yaw', 'right_yaw'\]"):
        finetune.train(args, h.process())


def test_one_data_set_or_several_on_the_command_line():
    parse = lambda *words: common.parse_args(finetune.Args, {"tiny": finetune.TINY}, "", words).data
    assert parse("--tiny", "--data", "a", "--steps", "3") == ("a",) and parse("--data", "a", "b") == ("a", "b")
    assert parse("--tiny") == ("data/tiny",)


def test_state_noise():
    state, mask, index = torch.rand(500, 46), torch.arange(46) < 8, torch.arange(500)
    added = finetune.noisy(state, mask, 0.2, index, seed=0) - state
    assert (added[:, 8:] == 0).all() and added[:, :8].std() == pytest.approx(0.2, rel=0.05)
    assert added[:, :8].mean().abs() < 0.01 and torch.equal(added, finetune.noisy(state, mask, 0.2, index, 0) - state)
    assert torch.allclose(finetune.noisy(state[7:9], mask, 0.2, index[7:9], 0) - state[7:9], added[7:9])


def test_state_noise_reaches_the_model(monkeypatch, tmp_path):
    """Training sees other states with it, the same without it, and validation never."""
    seen = []
    write = finetune.VLA.write

    def spy(model, read, state):
        seen.append((model.training, state.clone()))
        return write(model, read, state)

    monkeypatch.setattr(finetune.VLA, "write", spy)
    runs = {}
    for sigma in (0.0, 0.3):
        seen.clear()
        args = replace(finetune.TINY, init="paligemma-tiny", out=str(tmp_path / str(sigma)), steps=1, warmup=0,
                       save_every=1, val_samples=4, state_noise=sigma)  # fmt: skip
        finetune.train(args, h.process())
        runs[sigma] = [(training, state) for training, state in seen]
    pairs = list(zip(runs[0.0], runs[0.3], strict=True))
    assert {training for (training, _), _ in pairs} == {True, False}
    assert all(torch.equal(a, b) != training for (training, a), (_, b) in pairs)


def test_prefix_dropout(model):
    """A share of what is valid, of each sample's own, is hidden from the expert: nothing of it reaches the actions."""
    images, state = h.pictures(4, k=2), torch.rand(4, 46)
    read = model.read(images, ["lift the cup"] * 2 + ["lift the cup and the red pot"] * 2)
    index = torch.arange(4)
    less = finetune.partly(read, 0.4, index, seed=0)
    assert not (less.valid & ~read.valid).any() and less.layers is read.layers
    assert torch.equal(less.valid[2:3], finetune.partly(Read(read.layers, read.valid[2:3], read.last), 0.4, index[2:3],
                                                        seed=0).valid)  # fmt: skip
    assert not torch.equal(less.valid[0], less.valid[1])
    assert not torch.equal(less.valid, finetune.partly(read, 0.4, index, seed=1).valid)
    alone = model.read(images[:1], ["lift the cup"])  # not padded
    mine = finetune.partly(alone, 0.4, index[:1], seed=0).valid
    assert alone.valid.shape[1] < read.valid.shape[1] and torch.equal(mine[alone.valid], less.valid[:1][read.valid[:1]])
    many = Read([], torch.ones(50, 400, dtype=torch.bool), torch.zeros(50))
    assert finetune.partly(many, 0.4, torch.arange(50), 0).valid.float().mean() == pytest.approx(0.6, abs=0.02)
    with torch.no_grad():
        other = [tuple(torch.where(less.valid[:, None, :, None], x, 9.0) for x in pair) for pair in read.layers]
        assert torch.allclose(model.write(less._replace(layers=other), state), model.write(less, state), atol=1e-5)
        assert (model.write(read, state) - model.write(less, state)).abs().max() > 1e-4


def test_the_memory_of_a_student(data, tmp_path, monkeypatch):
    """It gives back what the student says of each window's own pictures and instruction, whatever the instructions'
    lengths and whichever the data set. Of an episode that is damaged it says nothing finite."""
    args = run_args((data, h.make_data(tmp_path / "other", length=11)), "")
    model = finetune.build(args).eval()
    windows = finetune.make_windows(args, model.student.image_size, "train")
    whole = windows.window

    def damaged(d, k, *rest):
        if d == 1 and k < windows.ends[1][0]:
            raise DamagedEpisode("the first of the second data set")
        return whole(d, k, *rest)

    monkeypatch.setattr(windows, "window", damaged)
    memory = finetune.Memory(model, windows, args, h.process())
    last = [int(ends[-1]) - 1 for ends in windows.ends]
    batch = collate([whole(d, k) for d, k in ((0, 0), (1, last[1]), (0, last[0]), (0, 5), (1, 0))])
    state = batch["state"][:1].expand(5, -1)  # so that only what was read differs
    with torch.no_grad():
        told = model.write(memory(batch), state)
        seen = model(finetune.views(batch, args), state, batch["instruction"])
    assert torch.allclose(told[:4], seen[:4], atol=1e-3) and not told[4].isfinite().any()
    apart = torch.cdist(seen[:4].flatten(1), seen[:4].flatten(1), p=math.inf) + torch.eye(4)
    assert apart.min() > 2e-3
    monkeypatch.setattr(finetune.os, "sysconf", lambda name: 100)
    with pytest.raises(InputError, match=r"--remember: .* 55 windows takes .* GB, this machine has .*--no-remember"):
        finetune.Memory(model, windows, args, h.process())


def test_what_the_expert_sees_in_training(data, tmp_path, monkeypatch):
    """With --remember a step costs no reading, unless the student or the pictures change. With --prefix-dropout the
    expert sees less in training, and all in validation."""
    read, write, log = finetune.VLA.read, finetune.VLA.write, []

    def reads(model, *given):
        log.append("read" if torch.is_grad_enabled() else "look")
        return read(model, *given)

    def writes(model, given, state):
        log.append((torch.is_grad_enabled(), given.valid.float().mean().item()))
        return write(model, given, state)

    monkeypatch.setattr(finetune.VLA, "read", reads)
    monkeypatch.setattr(finetune.VLA, "write", writes)
    still = {"remember": True, "student_lr": 0.0, "prefix_dropout": 0.5}
    for changes, count in (({}, 0), ({"remember": False}, 4), ({"student_lr": 0.1}, 4), ({"augment": True}, 4)):
        log.clear()
        finetune.train(run_args(data, tmp_path / f"{changes}", **still | changes), h.process())
        assert log.count("read") == count, changes
        of = {training: [x[1] for x in log if x[0] is training] for training in (True, False)}
        assert len(of[True]) == 4 and max(of[True]) < 0.8 * min(of[False]), changes


def test_training_from_memory(data, tmp_path):
    """Learns what it learns without, but for half precision; goes on bit for bit."""
    same = dict(student_lr=0.0, prefix_dropout=0.3, lr=1e-3, warmup=0)
    for name, remember in (("read", False), ("told", True)):
        torch.manual_seed(0)
        finetune.train(run_args(data, tmp_path / name, remember=remember, **same), h.process())
    at = "checkpoints/step_00000004"
    read, told = (common.read_tensors(tmp_path / name / at / "model.safetensors") for name in ("read", "told"))
    torch.manual_seed(0)
    fresh = finetune.build(run_args(data, "", **same)).state_dict()
    for name in (n for n in read if n.startswith("expert.") and n.endswith("proj.weight")):
        assert (told[name] - read[name]).norm() < 0.1 * (read[name] - fresh[name]).norm(), name
    last = tmp_path / "told" / at
    whole = (last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()
    shutil.rmtree(last)
    finetune.train(run_args(data, tmp_path / "told", remember=True, resume=True, **same), h.process())
    assert ((last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()) == whole


def test_augment():
    """Depends on (seed, sample) alone, moves by at most 6 %, shifts brightness by at most 10 % and contrast by 20 %."""
    images, index = h.pictures(4, k=2), torch.tensor([3, 7, 11, 3])
    out = augment(images, index, seed=0)
    assert out.dtype == torch.uint8 and out.shape == images.shape and not torch.equal(out, images)
    assert torch.equal(out, augment(images, index, seed=0))
    assert torch.equal(out[1:2], augment(images[1:2], index[1:2], seed=0))
    assert not torch.equal(out, augment(images, index, seed=1))
    assert not torch.equal(out[:, 0], augment(images[:, :1], index + 1, seed=0)[:, 0])

    size, n = 50, 64
    flat = torch.full((n, 1, 3, size, size), 128, dtype=torch.uint8)
    change = augment(flat, torch.arange(n), 0).float() - 128  # a flat image has no contrast
    assert change.amax((1, 2, 3, 4)).equal(change.amin((1, 2, 3, 4)))
    assert change.abs().max() <= 26 and change.min() < -15 and change.max() > 15

    dot = torch.full((n, 1, 3, size, size), 100, dtype=torch.uint8)
    dot[..., 25, 25] = 200
    moved = augment(dot, torch.arange(n), 0).float()
    at = moved[:, 0, 0].flatten(1).argmax(1)
    shifts = torch.stack([at // size - 25, at % size - 25])
    assert shifts.min() == -3 and shifts.max() == 3  # 6 % of 50
    gain = (moved.amax((1, 2, 3, 4)) - moved.amin((1, 2, 3, 4))) / 100
    assert 0.79 <= gain.min() < 0.85 and 1.15 < gain.max() <= 1.21

    for axis, ramp in ((3, torch.arange(size)[:, None]), (4, torch.arange(size)[None])):  # edges are repeated, no more
        ramp = (60 + 2 * ramp.expand(n, 1, 3, size, size)).to(torch.uint8)
        flat = (augment(ramp, torch.arange(n), 0).float().diff(dim=axis) == 0).movedim(axis, 1).flatten(2)
        repeated = flat[:, :, 0].sum(1)
        assert torch.equal(repeated, shifts[axis - 3].abs()) and (flat == flat[:, :, :1]).all()


def test_augmented_pictures_are_for_training_alone(data, tmp_path, monkeypatch):
    """What `augment` makes, of the samples' own numbers, is what the model learns from; validation sees no such."""
    drawn, seen, read = [], [], finetune.VLA.read
    made = torch.full((1,), 77, dtype=torch.uint8)
    monkeypatch.setattr(finetune, "augment", lambda x, index, seed: drawn.append((index, seed)) or made.expand_as(x))
    monkeypatch.setattr(finetune.VLA, "read", lambda self, images, *rest: (
        seen.append((self.training, bool((images == 77).all()))) or read(self, images, *rest)))  # fmt: skip
    for shifted in (True, False):
        seen.clear()
        args = run_args(data, tmp_path / str(shifted), augment=shifted, steps=2, seed=5)
        finetune.train(args, h.process())
        assert {training for training, _ in seen} == {True, False}
        assert all(shown == (training and shifted) for training, shown in seen)
    assert [(index.tolist(), seed) for index, seed in drawn] == [([0, 1, 2, 3], 5), ([4, 5, 6, 7], 5)]


# -- the policy --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overfitted(data, tmp_path_factory):
    """A run of this stage that knows its data set by heart, wrist view first."""
    out = tmp_path_factory.mktemp("finetune") / "run"
    args = run_args(data, out, cameras=("wrist", "primary"), steps=250, save_every=250, log_every=250, batch=16,
                    lr=3e-3, min_lr=1e-5, warmup=20, val_every=0)  # fmt: skip
    finetune.train(args, h.process())
    return out


def recorded(data, i: int, times: list[int]) -> tuple[dict, np.ndarray, list[str], np.ndarray]:
    """What a robot would have seen at these times of episode i, and the actions recorded from there on."""
    reader = LeRobotReader(data)
    episode = reader.episode(i)
    images = {camera: reader.frames(i, camera, times) for camera in reader.cameras}
    actions = np.stack([episode["action"][t : t + 4] for t in times])
    return images, episode["state"][times], [episode["task"]] * len(times), actions


def test_policy_gives_back_the_recorded_actions(data, overfitted):
    """The loop of conventions closed without a robot: raw frames and raw states from the reader go in, and metres,
    radians and grippers as recorded come out. The dimensions' ranges differ sixtyfold, so a wrong normaliser, mask,
    camera order, image size or gripper sign fails."""
    policy = finetune.load_policy(overfitted)
    assert (policy.cameras, policy.chunk, policy.execute, policy.hz) == (("wrist", "primary"), 4, 2, 10.0)
    scale = np.array([0.02, 0.01, 0.005, 0.1, 0.3, 0.05])  # amplitudes in the data
    for i in range(4):
        images, state, instruction, actions = recorded(data, i, [0, 2, 4])
        out = policy.act(images, state, instruction)
        assert out.shape == (3, 4, 44) and out.dtype == np.float32
        error = np.abs(out - actions)[..., 7:13] / scale
        assert error.mean() < 0.1 and error.max() < 0.5, (i, error.mean(), error.max())
        assert (np.abs(out - actions)[..., 13] < 0.2).all()  # probabilities of being open
        absent = [n not in common.ARM_ACTION for n in ACTION_NAMES]
        assert not out[..., absent].any()
        # The order of the dictionary does not matter, what the views show does.
        flipped = {c: images[c] for c in reversed(images)}
        assert np.array_equal(policy.act(flipped, state, instruction), out)
        crossed = {"primary": images["wrist"], "wrist": images["primary"]}
        assert np.abs(policy.act(crossed, state, instruction) - out)[..., 7:13].max() > 0.002
        # A quaternion and its negative are one rotation; absent columns do not count; a batch is its samples.
        other = state.copy()
        other[:, 11:15] *= -1
        other[:, :8] = 7.0
        np.testing.assert_allclose(policy.act(images, other, instruction), out, atol=1e-6)
        alone = policy.act({c: v[1:2] for c, v in images.items()}, state[1:2], instruction[1:2])
        np.testing.assert_allclose(alone[0], out[1], atol=1e-5)


def test_a_policy_is_handed_on(data, overfitted, tmp_path, capsys):
    """In bfloat16 and without the optimizer it acts as before, to a hundredth of what there is to do."""
    out = tmp_path / "policies/mine"
    out.parent.mkdir()
    finetune.export(str(overfitted), str(out))
    assert "MB, from" in capsys.readouterr().out
    found = common.find_checkpoint(overfitted, "finetune")
    assert {p.name for p in out.iterdir()} == {p.name for p in found.iterdir()} - {"optimizer.safetensors"}
    assert (out / "model.safetensors").stat().st_size < 0.55 * (found / "model.safetensors").stat().st_size
    images, state, instruction, _ = recorded(data, 0, [0, 2, 4])
    ours, theirs = (finetune.load_policy(path).act(images, state, instruction) for path in (out, overfitted))
    scale = np.abs(theirs).max((0, 1)).clip(1e-6)
    assert 0 < np.abs((ours - theirs) / scale).max() < 0.1
    with pytest.raises(InputError, match="exists: give another --out"):
        finetune.export(str(overfitted), str(out))
    with pytest.raises(InputError, match="no finetune checkpoint at"):
        finetune.export(str(tmp_path / "none"), str(tmp_path / "other"))
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        finetune.export(str(out), str(tmp_path / "other"))
    assert not list(tmp_path.glob("other*"))


def test_act_sees_what_training_saw(data, overfitted):
    """The tensors that reach the model are those of the training stream, to the last bit."""
    policy, args = finetune.load_policy(overfitted), run_args(data, "", cameras=("wrist", "primary"), val_every=0)
    windows = finetune.make_windows(args, policy.model.student.image_size, "train")
    seen = []
    policy.model.register_forward_pre_hook(lambda module, given: seen.append(given))
    for k in (0, 3, 9):
        sample = collate([windows.window(0, k)])
        i, t = (0, k) if k < windows.ends[0][0] else (1, int(k - windows.ends[0][0]))
        images, state, instruction, _ = recorded(data, i, [t])
        policy.act(images, state, instruction)
        assert torch.equal(seen[-1][0], finetune.views(sample, args))
        assert torch.equal(seen[-1][1], sample["state"])
        expected = policy.model.student.prompts(sample["instruction"], 2)
        assert all(torch.equal(x, y) for x, y in zip(seen[-1][2], expected, strict=True))


def sixteen(size: tuple[int, int] = (32, 32)) -> tuple[dict, np.ndarray, list[str]]:
    """A batch for act() of 16 samples that differ in everything, instructions of 1 to 40 words among them."""
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (16, *size, 3), np.uint8) for c in ("primary", "wrist")}
    state = rng.normal(size=(16, 46)).astype(np.float32)
    for _, _, s in common.ARMS:
        q = state[:, s + 3 : s + 7]
        state[:, s + 3 : s + 7] = common.canonical(q / np.linalg.norm(q, axis=1, keepdims=True))
        state[:, s + 7] = rng.uniform(0, 1, 16)
    return images, state, [" ".join(["push"] + ["the red cup"] * (k % 14)) for k in range(16)]


def policy_of(model: finetune.VLA, dtype: torch.dtype = torch.float32, **options) -> finetune.Policy:
    args = run_args("", "")
    return finetune.Policy(model, args, replace(h.process(), dtype=dtype), "a policy", **options)


@pytest.fixture
def normed(micro):
    """A model whose normalisers and masks are not the identity."""
    torch.manual_seed(1)
    model = finetune.VLA(h.make_student(), "tiny", chunk=4, cameras=2)
    for norm in (model.action_norm, model.state_norm):
        norm.centre.normal_()
        norm.scale.uniform_(0.5, 2)
    model.state_mask[:8] = model.action_mask[:7] = False
    return model


def test_a_batch_of_16_equals_16_calls_equals_training(normed):
    """Instructions of mixed lengths; the training forward in training mode, with gradients, undone by hand."""
    images, state, instructions = sixteen()
    pixels = torch.stack([torch.from_numpy(images[c]).movedim(-1, 1) for c in ("primary", "wrist")], 1)
    x = torch.from_numpy(state)
    x = torch.cat([torch.zeros(16, 8), ((x - normed.state_norm.centre) / normed.state_norm.scale)[:, 8:]], 1)
    out = normed.train()(pixels, x, instructions).detach()
    expected = out * normed.action_norm.scale + normed.action_norm.centre
    expected[..., 13] = 1 / (1 + (-out[..., 13]).exp())
    expected[..., :7] = 0
    policy = policy_of(normed)
    batch = policy.act(images, state, instructions)
    np.testing.assert_allclose(batch, expected.numpy(), atol=1e-5)
    assert np.abs(batch - batch[:1]).max(axis=(1, 2))[1:].min() > 0.01  # each sample has an answer of its own
    for i in range(16):
        one = policy.act({c: v[i : i + 1] for c, v in images.items()}, state[i : i + 1], instructions[i : i + 1])
        np.testing.assert_allclose(one[0], batch[i], atol=2e-5)


@torch.no_grad()
def test_padded_instructions_change_nothing(model):
    images, state, instructions = inputs()
    out = model(images, state, instructions)
    for multiple in (1, 16, 64):
        ids, valid = model.student.prompts(instructions, 2, multiple)
        assert ids.shape == valid.shape and ids.shape[1] % multiple == 0
        torch.testing.assert_close(model(images, state, (ids, valid)), out, atol=2e-6, rtol=0)
    ids[~valid] = 7  # what stands there is never read
    torch.testing.assert_close(model(images, state, (ids, valid)), out, atol=2e-6, rtol=0)


def test_a_policy_in_bfloat16(normed):
    """As on a GPU: weights in bfloat16, normalisers and rotary frequencies not; actions within 1.5 % of their range."""
    images, state, instructions = sixteen()
    exact = policy_of(normed).act(images, state, instructions)
    kept = {n: b.clone() for n, b in normed.named_buffers()}
    out = policy_of(normed, torch.bfloat16).act(images, state, instructions)
    assert {p.dtype for p in normed.parameters()} == {torch.bfloat16} and out.dtype == np.float32
    assert all(torch.equal(b, kept[n]) and b.dtype == kept[n].dtype for n, b in normed.named_buffers())
    error = np.abs(out - exact).max() / (exact.max() - exact.min())
    assert 0 < error < 0.015, error


def test_nothing_comes_from_the_host(normed):
    """A CUDA graph replays kernels alone: between its inputs and the actions there may be no tensor of the host, no
    copy from it and no value that Python looks at. Tensors of the meta device stand in for those of a GPU."""
    policy = policy_of(normed, torch.bfloat16)
    images, state, instructions = sixteen()
    given = [torch.zeros(16, 2, 3, 32, 32, dtype=torch.uint8), torch.zeros(16, 46),
             *normed.student.prompts(instructions, 2, 16)]  # fmt: skip
    given = [x.to("meta") for x in given]
    normed.to("meta")
    policy.grippers = policy.grippers.to("meta")
    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            devices.update(x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
            return out

    with Watch():
        actions, _ = policy.predict(*given)
    assert actions.shape == (16, 4, 44) and devices == {"meta"}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_policy(normed, backend, monkeypatch):
    """One graph without breaks, the same actions; other words of about the same length do not compile again."""
    monkeypatch.setattr("einops._backends._type2backend", {})  # as in a fresh process
    torch.compiler.reset()
    if backend == "eager":  # traced and guarded alike, but without minutes of generating code
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile(f, backend="eager", **options))
    images, state, instructions = sixteen()
    plain, compiled = policy_of(normed), policy_of(normed, compile=True)
    first = compiled.act(images, state, instructions)
    np.testing.assert_allclose(first, plain.act(images, state, instructions), atol=1e-5)
    texts = [text.replace("red", "blue") for text in instructions]
    with torch.compiler.set_stance("fail_on_recompile"):
        np.testing.assert_allclose(compiled.act(images, state, texts), plain.act(images, state, texts), atol=1e-5)


def test_ten_batch_sizes_compile_ten_graphs(normed, monkeypatch):
    """Torch's own limit is eight, and a policy that meets a ninth batch size must not die of it."""
    torch.compiler.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile(f, backend="eager", **options))
    # The bounds of what is compiled are the same around a small function.
    monkeypatch.setattr(finetune.Policy, "predict", lambda self, pixels, state, ids, valid: (state + 1, ids.sum() > 0))
    policy = policy_of(normed, compile=True)
    for b in range(1, 11):
        actions, _ = policy.predict(None, torch.zeros(b, 46), torch.ones(b, 16), None)
        assert actions.shape == (b, 46)


def test_half_turns_have_one_name(normed):
    """A gripper that points straight down is a half turn: w = 0, where the sign of the quaternion is decided by x."""
    images, state, instructions = sixteen()
    state[:, 11:15] = 0, -0.6, 0.8, 0
    turned = state.copy()
    turned[:, 11:15] *= -1
    policy = policy_of(normed)
    assert np.array_equal(policy.act(images, state, instructions), policy.act(images, turned, instructions))


@pytest.mark.parametrize("cameras", [("primary",), ("side", "primary"), ("primary", "wrist", "side")])
def test_one_to_three_views(cameras, tmp_path):
    """Trained for a step and asked, where the data no longer are: all that the policy needs is in its checkpoint."""
    root = h.make_data(tmp_path / "data", cameras=("primary", "wrist", "side"))
    args = run_args(root, tmp_path / "run", cameras=cameras, steps=1)
    finetune.train(args, h.process())
    images, state, instruction, _ = recorded(root, 0, [0, 1])
    root.rename(tmp_path / "gone")
    policy = finetune.load_policy(tmp_path / "run")
    own = {c: images[c] for c in cameras}
    out = policy.act(own, state, instruction)
    assert out.shape == (2, 4, 44) and policy.cameras == cameras
    assert policy.pictures == {camera: [[48, 64]] for camera in cameras}  # as recorded, not as resized
    for camera in cameras:  # every view counts
        changed = own | {camera: 255 - own[camera]}
        assert np.abs(policy.act(changed, state, instruction) - out).max() > 1e-6
    for wrong in (images | {"fourth": images["side"]}, {"primary": images["primary"], "top": images["side"]}):
        with pytest.raises(InputError, match="was trained with the views"):
            policy.act(wrong, state, instruction)
    scale = policy.model.action_norm.scale[7:13]
    assert scale[0] > 2 * scale[2] and not torch.allclose(scale, torch.ones(6))  # the data's, from the checkpoint


def test_act_refuses(data, overfitted):
    policy = finetune.load_policy(overfitted)
    images, state, instruction, _ = recorded(data, 0, [0, 1])
    nan = state.copy()
    nan[1, STATE_NAMES.index("right_z")] = np.nan
    blind = {"primary": images["primary"]}

    def changed(name: str, value: float) -> np.ndarray:
        out = state.copy()
        out[1, STATE_NAMES.index(name)] = value
        return out

    turned = lambda factor: state * np.where([n[-2] == "q" for n in STATE_NAMES], factor, 1)
    cases = [
        (blind, state, instruction, r"trained with the views \['primary', 'wrist'\], it got \['primary'\]"),
        (images | {"left": images["wrist"]}, state, instruction, r"it got \['left', 'primary', 'wrist'\]"),
        (images, state[:, :8], instruction, r"state must be \(2, 46\).* got \(2, 8\)"),
        (images, state[:1], instruction, r"state must be \(2, 46\).* got \(1, 46\)"),
        (images, nan, instruction, r"NaN, infinite or absurdly large state: \['right_z'\]"),
        (images, changed("right_x", 1e38), instruction, r"absurdly large state: \['right_x'\]; look at the robot"),
        (images, changed("right_gripper", 80), instruction, "the right gripper runs from .* to 80, and must from"),
        (images, changed("right_qw", 5), instruction, "the right quaternion without length 1: give what .* reads"),
        (images, turned(0), instruction, "right quaternion without length 1"),
        (images, [state[0], state[1][:8]], instruction, r"state must be numbers \(2, 46\)"),
        (images, None, instruction, r"state must be \(2, 46\).* got \(\)"),
        ([*images.values()], state, instruction, r"was trained with the views .*, it got list"),
        (images | {"wrist": None}, state, instruction, r"view wrist must be uint8 \(2, H, W, 3\).* got NoneType"),
        (images | {"wrist": images["wrist"].tolist()}, state, instruction, "view wrist .* got list"),
        (images, state, None, "one instruction a sample.* got None"),
        (images, state, np.array(instruction[0]), "one instruction a sample"),
        (images, state, [1, 2], r"one instruction a sample.* got \[1, 2\]"),
        (images, state, [instruction[0], " "], "none may be empty"),
        (images, state, instruction[0], "one instruction a sample"),
        (images, state, [instruction[0], "move " * 5000], "the model takes 4096"),
        (images, state, [instruction[0], None], "none may be empty"),
        (images, state[:0], [], "one instruction a sample"),
        (images, state[0], instruction[:1], r"state must be \(1, 46\).* got \(46,\)"),
        (images | {"wrist": images["wrist"][0]}, state, instruction, r"view wrist must be uint8 \(2, H, W, 3\)"),
        (images | {"wrist": images["wrist"][:1]}, state, instruction, r"one a sample: got uint8 \(1, 48, 64, 3\)"),
        (images | {"wrist": images["wrist"] * np.float32("nan")}, state, instruction, "must be uint8.* got float32"),
        (images | {"primary": images["primary"][..., :1]}, state, instruction, r"got uint8 \(2, 48, 64, 1\)"),
    ]
    for pictures, numbers, text, message in cases:
        with pytest.raises(InputError, match=message):
            policy.act(pictures, numbers, text)
    as_array = policy.act(images, state, np.array(instruction))
    assert np.array_equal(as_array, policy.act(images, state.tolist(), instruction))
    noisy = turned(1.02)  # as training took them: grippers a little out of range, quaternions a little off
    noisy[:, STATE_NAMES.index("right_gripper")] = 1.04
    clipped = noisy.copy()
    clipped[:, STATE_NAMES.index("right_gripper")] = 1
    assert np.array_equal(policy.act(images, noisy, instruction), policy.act(images, clipped, instruction))


def test_act_never_returns_what_is_not_finite(data, overfitted):
    """Also where a mask or the grippers' sigmoid would hide it."""
    policy = finetune.load_policy(overfitted)
    images, state, instruction, _ = recorded(data, 0, [0])
    m, masked = policy.model, ACTION_NAMES.index("left_x")
    for poisoned in (m.student.vlm.language_model.layers[0].mlp.up_proj.weight[0], m.queries[1],
                     m.action_norm.scale[7:8], m.action_out.bias[13:14], m.action_out.bias[masked : masked + 1]):
        for value in (math.nan, math.inf):
            kept = poisoned.clone()
            poisoned.fill_(value)
            with pytest.raises(InputError, match="non-finite action"):
                policy.act(images, state, instruction)
            poisoned.copy_(kept)
    assert np.isfinite(policy.act(images, state, instruction)).all()


# -- runs and errors ---------------------------------------------------------------------------------------------------


def test_resume_is_exact(data, tmp_path):
    """Also with augmentation and accumulation; and not on data that have changed since."""
    shutil.copytree(data, tmp_path / "data")
    args = run_args(tmp_path / "data", tmp_path / "run", augment=True, accumulate=2, batch=2)
    finetune.train(args, h.process())
    last = tmp_path / "run/checkpoints/step_00000004"
    before = h.log(tmp_path / "run")
    whole = (last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()
    shutil.rmtree(last)
    finetune.train(replace(args, resume=True), h.process())
    assert ((last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()) == whole
    assert h.log(tmp_path / "run") == before
    stats = common.json.loads((tmp_path / "data/meta/stats.json").read_text())
    stats["action"]["q99"][0] *= 2
    common.write_json(tmp_path / "data/meta/stats.json", stats)
    with pytest.raises(InputError, match="other statistics than when"):
        finetune.train(replace(args, resume=True), h.process())


def test_a_policy_says_where_it_comes_from(data, tmp_path):
    """Step, time and commit of the run that it began with, also when it was resumed after that run had gone; and how
    many latents it really has."""
    run = h.save_student(tmp_path / "student", h.make_student())
    began = common.load_meta(common.find_checkpoint(run, "distill"))
    args = run_args(data, tmp_path / "run", init=str(run), latents=(7, 7), steps=2, save_every=1)
    finetune.train(args, h.process())
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000002")
    finetune.train(replace(args, resume=True), h.process())
    meta = common.load_meta(common.find_checkpoint(tmp_path / "run", "finetune"))
    assert meta["init"] == {k: began[k] for k in ("stage", "step", "time", "commit")} and meta["init"]["time"] > 0
    assert meta["args"]["latents"] == meta["tokens"] == [3, 2]
    assert finetune.origin(args.out)["stage"] == "finetune" and finetune.origin("paligemma-micro") is None


def test_init_from_a_policy(data, overfitted, tmp_path):
    """All its weights go on, and the normalisation is that of the new data; a policy of another shape is refused."""
    other = changed_copy(data, tmp_path / "other", "stats", wider)
    like = dict(init=str(overfitted), cameras=("wrist", "primary"))
    still = dict(lr=0.0, min_lr=0.0, weight_decay=0.0, steps=1, save_every=1)
    finetune.train(run_args(other, tmp_path / "run", **like, **still), h.process())
    old, new = (finetune.load_policy(run).model for run in (overfitted, tmp_path / "run"))
    assert all(torch.equal(p, q) for p, q in zip(old.parameters(), new.parameters(), strict=True))
    assert new.action_norm.scale[7] == 2 * old.action_norm.scale[7]
    assert torch.equal(new.state_norm.scale, old.state_norm.scale)
    cases = [
        ({"chunk": 3, "execute": 2}, "'chunk': 4.*'chunk': 3.*the same --expert, --chunk and --cameras"),
        ({"cameras": ("primary", "wrist")}, r"\['wrist', 'primary'\].*\['primary', 'wrist'\]"),
        ({"expert": "small"}, "'expert': 'tiny'.*'expert': 'small'.*or add --new-expert"),
    ]
    for odd, says in cases:
        with pytest.raises(InputError, match=says):
            finetune.build(run_args("", "", **like | odd))


def test_the_expert_of_a_policy(data, overfitted, tmp_path):
    """It goes on beside another student, as pi0.5's does, and nobody needs the policy that it came from any more."""
    shutil.copytree(overfitted, tmp_path / "policy")
    like = dict(init="paligemma-micro", expert=str(tmp_path / "policy"), cameras=("wrist", "primary"), seed=7)
    still = dict(lr=0.0, min_lr=0.0, weight_decay=0.0, steps=2, save_every=1)
    finetune.train(run_args(data, tmp_path / "run", **like, **still), h.process())
    began = finetune.origin(str(tmp_path / "policy"))
    with pytest.raises(InputError, match="--expert .*policy writes 4 actions at once: give --chunk 4"):
        finetune.build(run_args("", "", **like | {"chunk": 3}))
    shutil.rmtree(tmp_path / "policy")
    shutil.rmtree(common.checkpoints(tmp_path / "run")[-1])
    finetune.train(run_args(data, tmp_path / "run", **like, **still, resume=True), h.process())
    old, new = (dict(finetune.load_policy(run).model.named_parameters()) for run in (overfitted, tmp_path / "run"))
    same = {name for name, p in old.items() if torch.equal(p, new[name])}
    assert {name for name in old if not name.startswith("student.")} <= same
    assert not any(name.startswith("student.") and name.endswith("proj.weight") for name in same)
    meta = common.load_meta(common.find_checkpoint(tmp_path / "run", "finetune"))
    assert meta["expert"] == began and meta["init"] is None and meta["args"]["expert"] == "tiny"
    with pytest.raises(InputError, match="with an expert of its own, .* give --expert tiny, or add --new-expert"):
        finetune.build(run_args("", "", **like | {"init": str(overfitted), "expert": str(overfitted)}))
    run = h.save_student(tmp_path / "student", h.make_student())
    with pytest.raises(InputError, match="unknown --expert '.*', a run of stage 'distill': give one of finetune.py"):
        finetune.build(run_args("", "", **like | {"expert": str(run)}))


def test_a_policys_student_with_a_new_expert(overfitted, data, tmp_path):
    """Of the policy only the student stays; the rest is as beside any student, its shape and the new data's norms."""
    run = tmp_path / "run"
    asked = run_args(data, run, init=str(overfitted), new_expert=True, chunk=3, steps=1, save_every=1, student_lr=0.0)
    finetune.train(asked, h.process())
    old, new = (finetune.load_policy(path) for path in (overfitted, run))
    theirs, ours = (dict(p.model.named_parameters()) for p in (old, new))
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items() if name.startswith("student."))
    moved = [n for n, p in ours.items() if n.startswith("expert.") and p.ndim > 1 and not torch.equal(p, theirs[n])]
    assert moved and len(moved) == sum(n.startswith("expert.") and p.ndim > 1 for n, p in ours.items())
    assert (new.chunk, old.chunk) == (3, 4)
    with pytest.raises(InputError, match="--new-expert takes the student of a policy, and --init .* is none"):
        finetune.build(run_args("", "", init="paligemma-tiny", new_expert=True))


@pytest.mark.parametrize("flag,still", [("student_lr", "student."), ("vision_lr", "student.vlm.vision_tower.")])
def test_what_stands_still(flag, still, data, tmp_path, monkeypatch):
    """At a share of 0 of the learning rates, while all else learns; no gradients of its are computed. At a share of a
    tenth its first step is a tenth as long."""
    make, trained, start, build = common.Optimizers, [], {}, finetune.build
    monkeypatch.setattr(common, "Optimizers", lambda model, *rest: make(trained.append(model) or model, *rest))

    def watched(*args):
        model = build(*args)
        start.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return model

    monkeypatch.setattr(finetune, "build", watched)
    moved = {}
    for share in (0.0, 0.1, 1.0):
        torch.manual_seed(0)
        run = tmp_path / str(share)
        finetune.train(run_args(data, run, steps=1, save_every=1, muon=1e-2, clip=1e9, **{flag: share}), h.process())
        new = common.read_tensors(run / "checkpoints/step_00000001/model.safetensors")
        moved[share] = {name: (new[name] - p).norm().item() for name, p in start.items()}
    for name, whole in moved[1.0].items():
        share = 0.1 if name.startswith(still) else 1.0
        assert moved[0.1][name] == pytest.approx(share * whole, rel=0.02, abs=1e-5), name
        assert moved[0.0][name] == (0 if share < 1 else pytest.approx(whole, rel=1e-3)), name
    assert all(n.startswith(still) for n in start if moved[1.0][n] > 1e-4 and not moved[0.0][n])
    assert not any(n.startswith(still) for n, p in trained[0].named_parameters() if p.requires_grad)


def test_wrong_checkpoints(tmp_path):
    run = h.save_student(tmp_path / "student", h.make_student())
    with pytest.raises(InputError, match="checkpoint of 'distill', not of 'finetune'"):
        finetune.load_policy(run)
    with pytest.raises(InputError, match="run `python finetune.py --small` first"):
        finetune.load_policy(tmp_path / "runs/small/finetune")
    with pytest.raises(InputError, match="run `python distill.py --tiny` first"):
        finetune.build(run_args("", "", init=str(tmp_path / "runs/tiny/distill")))


def test_bad_arguments(data, tmp_path):
    cases = [
        ({"execute": 5}, "--execute 5 must lie between 1 and --chunk 4"),
        ({"refer": 1.5}, "--refer 1.5: a share is at most 1"),
        ({"student_lr": 0.0}, "paligemma-micro is random weights, .* give --student-lr 1 --prefix-dropout 0, or a"),
        ({"prefix_dropout": 1.0}, "--prefix-dropout 1: a share below 1, or the expert sees nothing"),
        ({"cameras": ()}, "one to three different views"),
        ({"cameras": ("wrist", "wrist")}, "one to three different views"),
        ({"cameras": ("primary", "side")}, r"no camera 'side', it has \['primary', 'wrist'\]"),
        ({"expert": "2b"}, "unknown --expert '2b': choose one of"),
        ({"init": "paligemma-smal"}, r"no size: give one of .*'paligemma-small'.*distill.py.*hub name \(owner/model\)"),
        ({"init": "internvl-micro"}, "the student is PaliGemma, not 'internvl'"),
        ({"episodes": 3}, "has 2 episodes of '.*', fewer than 3: lower --episodes"),
    ]
    for k, (changes, message) in enumerate(cases):
        args = run_args(data, tmp_path / str(k), **changes)
        with pytest.raises(InputError, match=message):
            finetune.check(args)
            finetune.train(args, h.process())
    assert (finetune.Args().val_every, finetune.SMALL.val_every) == (0, 0)  # --episodes 10 learns from 10


def test_a_policy_never_claims_another_rate(data, tmp_path):
    """Data of 10 Hz cannot train a policy that says 20: a robot would move at twice the speed."""
    with pytest.raises(common.InputError, match="add --hz 10"):
        finetune.train(run_args(data, tmp_path / "run", hz=20.0), h.process())


def test_videos_teach_no_policy(data, tmp_path):
    """All losses would be zero, to the end of the run."""
    write = {"images": {"primary": "observation.images.primary", "wrist": "observation.images.wrist"},
             "state": {"right_qw": {"column": "observation.state", "index": 6}},
             "stats": {"observation.state": {"q01": [1.0], "q99": [1.0]}}}  # fmt: skip
    common.write_json(tmp_path / "free.json", write)
    with pytest.raises(InputError, match="has no actions, and of videos alone a policy learns nothing"):
        finetune.train(run_args(f"{data}@{tmp_path / 'free.json'}", tmp_path / "run"), h.process())


@pytest.mark.parametrize("key", ["student_config", "tokens", "args"])
def test_incomplete_metadata(overfitted, tmp_path, key):
    shutil.copytree(overfitted, tmp_path / "run")
    path = common.checkpoints(tmp_path / "run")[-1] / "meta.json"
    meta = common.read_json(path)
    common.write_json(path, {k: v for k, v in meta.items() if k != key})
    with pytest.raises(InputError, match=f"is damaged .no {key} in meta.json.: delete it"):
        finetune.load_policy(tmp_path / "run")


def test_gripper_columns():
    """What Policy turns into probabilities are the two gripper columns and no other."""
    assert [ACTION_NAMES[i] for i in GRIPPERS] == ["left_gripper", "right_gripper"]
