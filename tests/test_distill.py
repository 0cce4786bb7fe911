"""distill.py: the losses by hand, who sees whom, the student against Hugging Face's PaliGemma, checkpoints, resume."""

import math
import shutil
from dataclasses import replace

import helpers_policy as h
import pytest
import torch
import torch.nn.functional as F

import common
import distill
import lam
from common import InputError

SHORT, LONG = "close the oven", "put the building block into the corresponding slot, and then move back to the table"


@pytest.fixture(scope="module", autouse=True)
def micro():
    yield from h.micro_models()


@pytest.fixture(scope="module")
def student(micro):
    return h.make_student()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return h.make_data(tmp_path_factory.mktemp("distill") / "data")


@pytest.fixture(scope="module")
def teacher_run(micro, tmp_path_factory):
    run = tmp_path_factory.mktemp("distill") / "lam"
    h.save_lam(run)
    return run


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_alignment_loss_by_hand():
    """Eq. 4: softmax of (0, ln 3) is (1/4, 3/4), of (0, 0) is (1/2, 1/2)."""
    hat = torch.tensor([[[0.0, math.log(3)], [1.0, 1.0]]])
    z = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    loss, parts = distill.alignment_loss(hat, z)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)  # the student first; the other way it is 0.1438
    assert parts["kl"].item() == pytest.approx(kl / 2, abs=1e-6)  # two tokens, the second agrees
    assert parts["mse"].item() == pytest.approx(math.log(3) ** 2 / 4, abs=1e-6)
    assert loss.item() == pytest.approx(kl / 2 + math.log(3) ** 2 / 4, abs=1e-6)
    assert distill.alignment_loss(z, hat)[1]["kl"].item() == pytest.approx(0.5 * 0.1438410, abs=1e-6)


def test_distill_loss_by_hand():
    """Eq. 5 and 6: probabilities 1/2 and 1/4 for the two words there are; the third place is padding."""
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]]).log()
    words = torch.tensor([[0, 2, -100]])
    z = torch.zeros(1, 2, 4)
    loss, parts = distill.distill_loss(z, z, logits, words, torch.tensor(2.0), lambda_r=0.5)
    text = (math.log(2) + math.log(4)) / 2
    assert parts["text"].item() == pytest.approx(text, abs=1e-6)
    assert loss.item() == pytest.approx(0.5 * text, abs=1e-6)
    halves, _ = distill.distill_loss(z, z, logits, words, torch.tensor(4.0), lambda_r=2.0)  # of four words in all
    assert halves.item() == pytest.approx(text, abs=1e-6)
    assert distill.Args().lambda_r == 0.5


# -- mask --------------------------------------------------------------------------------------------------------------


def test_mask_rows():
    """The example of attention_mask's docstring, and a column of padding."""
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 1] = False
    mask = distill.attention_mask(group, valid)
    assert mask.shape == (2, 1, 6, 6)
    expected = [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0],
                [1, 1, 0, 0, 1, 1]]  # fmt: skip
    assert mask[0, 0].int().tolist() == expected
    assert mask[1, 0].int().tolist() == [[row[0], 0, *row[2:]] for row in expected]
    written = [" ".join(map(str, row)) for row in expected]
    assert all(f"[{row}]" in distill.attention_mask.__doc__.replace("[[", "[").replace("]]", "]") for row in written)


@torch.no_grad()
def test_who_sees_whom(student):
    """The text changes no latent, the latents change no logit; image and instruction change both."""
    images, texts = h.pictures(2), ["move to the cup", "lift it"]
    z, logits, _ = student(images, [SHORT, LONG], texts)
    other, _, _ = student(images, [SHORT, LONG], ["open the gripper", "lower the hand onto the table"])
    close(z, other)
    close(z, student(images, [SHORT, LONG]))
    kept = student.queries.clone()
    student.queries.add_(torch.randn_like(student.queries))
    z2, logits2, _ = student(images, [SHORT, LONG], texts)
    student.queries.copy_(kept)
    close(logits, logits2)
    assert (z - z2).abs().max() > 0.1
    for changed in ((h.pictures(2, seed=1), [SHORT, LONG]), (images, [LONG, SHORT])):
        z3, logits3, _ = student(*changed, texts)
        assert ((z - z3).abs().amax((1, 2)) > 1e-3).all() and ((logits - logits3).abs().amax((1, 2)) > 1e-3).all()
    # A word sees no later one.
    _, logits4, words4 = student(images, [SHORT, LONG], ["move to the oven", "lift up"])
    same = (words4[0] == student(images, [SHORT, LONG], texts)[2][0]).int().cumprod(0).sum()  # words in common
    assert same >= 2
    close(logits4[0, : same + 1], logits[0, : same + 1])
    assert (logits4[0, same + 1] - logits[0, same + 1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_batch_equals_singles(student):
    """Instructions and texts of unequal lengths, and two views: padding changes nothing."""
    images, instructions = h.pictures(3, k=2), [SHORT, LONG, "go"]
    texts = ["lift", "move the block above the slot", "a"]
    z, logits, words = student(images, instructions, texts)
    for i in range(3):
        z1, logits1, words1 = student(images[i : i + 1], instructions[i : i + 1], texts[i : i + 1])
        n = words1.shape[1]
        close(z[i], z1[0])
        close(logits[i, :n], logits1[0])
        assert words[i, :n].tolist() == words1[0].tolist() and (words[i, n:] == -100).all()
        assert words1[0, -1] == student.tokenizer.eos_token_id


@torch.no_grad()
def test_equals_hugging_face(micro):
    """The same weights in PaliGemmaForConditionalGeneration, called as its processor would: prefix-LM."""
    torch.manual_seed(1)
    theirs, tokenizer = common.load_vlm("paligemma-micro")
    ours = distill.Student(theirs.eval(), tokenizer, (3, 2), 48).eval()
    assert theirs.lm_head.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    encode = lambda s: tokenizer(s, add_special_tokens=False).input_ids
    for seed, (instruction, text) in enumerate([(SHORT, "lift the red cup"), (LONG, "open the gripper")]):
        images = h.pictures(1, seed=seed)
        prefix = [theirs.config.image_token_id] * 16 + encode("<bos>" + instruction + "\n")
        suffix = encode(text + "<eos>")
        ids = torch.tensor([prefix + suffix])
        out = theirs(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images[:, 0].float() / 127.5 - 1,
            token_type_ids=torch.tensor([[0] * len(prefix) + [1] * len(suffix)]),
        ).logits  # fmt: skip
        _, logits, words = ours(images, [instruction], [text])
        assert words[0].tolist() == suffix
        close(logits, out[:, len(prefix) - 1 : -1], 1e-4)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_gradients(student, teacher_run):
    """They reach everything in the student and nothing in the teacher."""
    teacher, _, _ = lam.load_lam(teacher_run)
    teacher.requires_grad_(False)
    video = h.pictures(2, k=3)
    z = torch.cat(teacher.encoder(video, [SHORT, LONG]), 1)
    norms = []
    for checkpointing in (False, True):
        student.zero_grad(set_to_none=True)
        if checkpointing:
            student.vlm.activation_checkpointing_enable()
        hat, logits, words = student.train()(video[:, :1], [SHORT, LONG], ["lift", "open the gripper"])
        distill.distill_loss(hat, z, logits, words, (words >= 0).sum(), 0.5)[0].backward()
        without = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == [] and all(p.grad is None for p in teacher.parameters())
        norms.append(torch.stack([p.grad.norm() for p in student.parameters()]).norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    student.vlm.activation_checkpointing_disable()
    student.zero_grad(set_to_none=True)
    student.eval()


@pytest.fixture(scope="module")
def overfitted(micro):
    """A student trained on one batch of four: (student, images, instructions, texts, losses)."""
    student = h.make_student(seed=2)
    images, instructions = h.pictures(4, seed=3), [SHORT, LONG, SHORT, "go"]
    texts = ["lift the red cup", "move to the slot", "open the gripper", "push the door"]
    z = F.layer_norm(torch.randn(4, 5, 48, generator=torch.Generator().manual_seed(0)), (48,))
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    losses, halfway = [], None
    for step in range(60):
        hat, logits, words = student(images, instructions, texts)
        loss, parts = distill.distill_loss(hat, z, logits, words, (words >= 0).sum(), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append({"loss": loss.item()} | {k: v.item() for k, v in parts.items()})
        if step == 10:
            halfway = {k: v.clone() for k, v in student.state_dict().items()}
    return student, images, instructions, texts, losses, halfway


def test_overfits_one_batch(overfitted):
    """Every part of the loss falls below a tenth of its start, and the student writes what it was taught."""
    student, images, instructions, texts, losses, _ = overfitted
    for part in ("mse", "kl", "text", "loss"):
        assert losses[-1][part] < 0.1 * losses[0][part], (part, losses[0], losses[-1])
    assert student.describe(images, instructions) == texts


@torch.no_grad()
def test_describe_is_the_teacher_forced_argmax(overfitted):
    """Greedy writing with a cache gives the words that the training pass finds most likely, also for a student that is
    still wrong, and for unequal instructions."""
    trained, images, instructions, texts, _, halfway = overfitted
    student = h.make_student()
    student.load_state_dict(halfway)
    for model, pixels in ((student, images), (trained, h.pictures(4, seed=9))):
        seen, head = [], model.logits
        model.logits = lambda hidden: seen.append(head(hidden)) or seen[-1]  # noqa: B023
        written = model.describe(pixels, instructions, limit=6)
        del model.logits
        _, logits, words = model(pixels, instructions, written)
        for i in range(4):
            n = min(6, int((words[i] >= 0).sum()))  # six words at most, end of sentence included
            assert logits[i, :n].argmax(-1).tolist() == words[i, :n].tolist(), (i, written)
            close(torch.cat(seen, 1)[i, :n], logits[i, :n], 1e-4)
    assert model.describe(pixels, instructions, limit=6) == [
        model.describe(pixels[i : i + 1], instructions[i : i + 1], limit=6)[0] for i in range(4)
    ]


def test_the_head_starts_as_the_identity():
    student = h.make_student(latent_dim=64)
    assert torch.equal(student.head.weight, torch.eye(64)) and not student.head.bias.any()


# -- checkpoints, runs, errors -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_checkpoint_round_trip(student, tmp_path):
    h.save_student(tmp_path / "run", student)
    again, args, meta = distill.load_student(tmp_path / "run")
    assert (again.tokens, args.student, meta["step"]) == ((3, 2), "paligemma-micro", 1)
    images = h.pictures(2)
    for a, b in zip(student(images, [SHORT, LONG], ["a", "b c"]), again.eval()(images, [SHORT, LONG], ["a", "b c"]),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_wrong_checkpoints(teacher_run, student, tmp_path):
    with pytest.raises(InputError, match="checkpoint of 'lam', not of 'distill'"):
        distill.load_student(teacher_run)
    with pytest.raises(InputError, match="run `python distill.py --tiny` first"):
        distill.load_student(tmp_path / "runs/tiny/distill")
    run = h.save_student(tmp_path / "run", student)
    meta = common.load_meta(run / "checkpoints/step_00000001")
    common.write_json(run / "checkpoints/step_00000001/meta.json", meta | {"tokens": [3, 3]})
    with pytest.raises(InputError, match=r"queries.*\(5, 64\), \(6, 64\)"):
        distill.load_student(run)


def test_bad_input(student):
    with pytest.raises(InputError, match="an instruction of 25000 letters .* the model takes 4096"):
        student(h.pictures(1), ["move " * 5000])
    with pytest.raises(InputError, match="PaliGemma, not 'internvl'"):
        distill.Student(*common.load_vlm("internvl-micro"), (3, 2), 48)


def run_args(data, teacher_run, out, **changes) -> distill.Args:
    return replace(
        distill.TINY, data=(str(data),), lam=str(teacher_run), out=str(out), student="paligemma-micro", batch=4,
        steps=4, save_every=2, log_every=1, val_every=4, val_samples=6, warmup=1, **changes,
    )  # fmt: skip


def test_resume_is_exact(data, teacher_run, tmp_path, capsys):
    """A run that lost its last checkpoint and was resumed equals one that was never interrupted. And what may not be
    resumed: another teacher, other data."""
    args = run_args(data, teacher_run, tmp_path / "run", accumulate=2)
    distill.train(args, h.process())
    assert "subtask written" in capsys.readouterr().out
    run, before = tmp_path / "run", h.log(tmp_path / "run")
    last = run / "checkpoints/step_00000004"
    whole = (last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()
    assert [row["step"] for row in before] == [0, 1, 2, 2, 3, 4, 4] and before[-1]["val_mse"] < before[0]["val_mse"]
    shutil.rmtree(last)
    distill.train(replace(args, resume=True), h.process())
    assert ((last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()) == whole
    assert h.log(run) == before

    with pytest.raises(InputError, match="--resume"):
        distill.train(args, h.process())
    shutil.copytree(teacher_run, tmp_path / "lam")
    moved = replace(args, lam=str(tmp_path / "lam"), out=str(tmp_path / "moved"))
    shutil.copytree(run, tmp_path / "moved")
    common.write_json(tmp_path / "moved/args.json", common.json.loads((run / "args.json").read_text()) | {
        "lam": moved.lam, "out": moved.out})  # fmt: skip
    shutil.rmtree(tmp_path / "lam")
    h.save_lam(tmp_path / "lam", replace(h.LAM_ARGS, motion_tokens=3))
    with pytest.raises(InputError, match=r"has \[3, 2\] scene and motion tokens of width 48, the teacher .* \[3, 3\]"):
        distill.train(replace(moved, resume=True), h.process())


def test_no_teacher_leaves_no_run_behind(data, tmp_path):
    """The order of commands that everybody gets wrong once: it must not cost a --resume later."""
    with pytest.raises(InputError, match="no lam checkpoint .* run `python lam.py"):
        distill.train(run_args(data, tmp_path / "absent", tmp_path / "run"), h.process())
    assert not (tmp_path / "run").exists()
