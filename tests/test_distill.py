"""distill.py: the losses by hand, who sees whom, the student against Hugging Face's PaliGemma, checkpoints, resume."""

import json
import math
import shutil
import sys
from dataclasses import replace

import helpers_policy as h
import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from helpers_lam import forked_ranks

import common
import distill
import finetune
import lam
import pretrain
from common import InputError
from data.stills import SENTENCES
from data.windows import collate

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


def test_another_sample():
    """Nobody gets their own; who gets whose follows from seed and numbers, not from the order in the batch."""
    index = torch.arange(100, 116)
    partner = distill.another(index, seed=0)
    assert sorted(partner.tolist()) == list(range(16)) and (partner != torch.arange(16)).all()
    given = lambda index, seed: dict(zip(index.tolist(), index[distill.another(index, seed)].tolist(), strict=True))
    assert given(index.flip(0), 0) == given(index, 0)
    assert given(index, 1) != given(index, 0)
    assert given(index + 16, 0) != {k + 16: v + 16 for k, v in given(index, 0).items()}
    assert distill.another(index[:2], 0).tolist() == [1, 0]


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
    nothing, logits2, _ = student(images, [SHORT, LONG], texts, latents=False)
    close(logits, logits2)
    assert nothing.shape == (2, 0, z.shape[2])
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
    """The same weights in PaliGemmaForConditionalGeneration, with all that belongs to it: its processor's pixels and
    prompts, scaled embeddings, prefix-LM with padding between texts of unequal lengths, its own loss."""
    torch.manual_seed(1)
    theirs, tokenizer = common.load_vlm("paligemma-micro")
    ours = distill.Student(theirs.eval(), tokenizer, (3, 2), 48).eval()
    assert theirs.lm_head.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    pictures = transformers.SiglipImageProcessorPil(do_resize=False)
    pictures.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(pictures, common.make_tokenizer())
    images, instructions = h.pictures(3), [SHORT, LONG, "go"]
    texts = ["lift the red cup", "go", "open the gripper, and then lift it slowly"]
    given = processor(
        images=[image for image in rearrange(images, "b 1 c h w -> b h w c").numpy()], text=instructions, suffix=texts,
        return_tensors="pt", padding="longest",
    )  # fmt: skip
    assert (given.attention_mask == 0).any(1).sum() == 2 and (given.token_type_ids == 1).any(1).all()
    out = theirs(**given)
    _, logits, words = ours(images, instructions, texts)
    for i in range(3):
        at = (given.labels[i] >= 0).nonzero()[:, 0]  # the suffix, each word predicted by the position before it
        n = len(at)
        assert words[i, :n].tolist() == given.labels[i, at].tolist() and (words[i, n:] == -100).all()
        close(logits[i, :n], out.logits[i, at - 1], 1e-4)
    z = torch.zeros(3, 5, 48)
    _, parts = distill.distill_loss(z, z, logits, words, (words >= 0).sum(), 0.5)
    assert parts["text"].item() == pytest.approx(out.loss.item(), rel=1e-5)


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


def test_recomputing_ends_with_distillation(tmp_path):
    """Fine-tuning reads keys and values, which layers that recompute do not return, wherever its student came from."""
    recomputes = lambda module: [n for n, m in module.named_modules() if getattr(m, "gradient_checkpointing", False)]
    student = distill.assemble(*common.load_vlm("paligemma-micro"), (3, 2), 48, checkpointing=True)
    assert {n.split(".")[1] for n in recomputes(student)} >= {"vision_tower", "language_model"}
    assert recomputes(finetune.VLA(student, "tiny", 4, 1)) == []
    assert recomputes(distill.assemble(*common.load_vlm("paligemma-micro"), (3, 2), 48, checkpointing=False)) == []


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


# -- the teacher, sharded ----------------------------------------------------------------------------------------------


def compare_teachers(run) -> None:
    """In one of two ranks: what the teacher answers whole, sharded, and after a step of the student beside it."""
    process = common.setup(0)
    teacher, student = lam.load_lam(run)[0], h.make_student()
    teacher.decoder = None
    teacher.eval().requires_grad_(False)
    video = h.pictures(2, k=3, seed=process.rank)  # each rank its own
    texts = [SHORT, LONG][:: 1 - 2 * process.rank]
    answer = lambda model: torch.cat(model.encoder(video, texts), 1)
    with torch.no_grad():
        whole = answer(teacher)
        distill.shard(student, teacher, process)
        sharded = answer(teacher)
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in teacher.parameters())
    optimizer = torch.optim.AdamW(student.parameters(), 0.1)
    hat, logits, words = student.train()(video[:, :1], texts, ["lift", "open the gripper"])
    distill.distill_loss(hat, sharded, logits, words, (words >= 0).sum(), 0.5)[0].backward()
    optimizer.step()
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad is not None for p in student.parameters())
    with torch.no_grad():
        again = answer(teacher)
    assert torch.equal(whole, sharded) and torch.equal(whole, again) and whole.std() > 0.5
    del teacher, student, optimizer
    print("the teacher's answers are equal")
    common.teardown(process)
    sys.exit(0)


def test_a_sharded_teacher_says_the_same(teacher_run):
    text = forked_ranks("distill.py", before=lambda: compare_teachers(teacher_run))
    assert text.count("the teacher's answers are equal") == 2


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
    with pytest.raises(InputError, match="a subtask text of 25000 letters .* the model takes 4096 .* 'move move"):
        student(h.pictures(1), [SHORT], ["move " * 5000])
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
    assert capsys.readouterr().out.count("subtask written") == 2 * 4  # at each validation
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


def test_a_still_is_asked_as_where_the_student_began(micro):
    """The answers cost the student what they cost the model that pretrain.py trained, in its words."""
    vlm, tokenizer = common.load_vlm("paligemma-micro")
    student = distill.Student(vlm, tokenizer, (3, 2), 48).eval()
    images, asked, answers = distill.still_questions(replace(distill.TINY, stills=1), 3, student)
    assert images.shape == (6, 1, 3, 32, 32) and {q.split()[0] for q in asked} == {"detect", "describe"}
    batch = pretrain.encode(tokenizer, vlm.config, [(q, a[1:]) for q, a in zip(asked, answers, strict=True)])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        hidden = vlm.model(pixel_values=common.normalize_pixels(images[:, 0], "paligemma", torch.float32), **batch,
                           use_cache=False).last_hidden_state[:, :-1]  # fmt: skip
        there = F.cross_entropy(vlm.lm_head(hidden).flatten(0, 1), labels.flatten(), reduction="none")
        here = distill.nats(*student(images, asked, answers)[1:])
    close(here.sum(1), there.view_as(labels).sum(1), 1e-3)
    again, other = (distill.still_questions(replace(distill.TINY, stills=1), k, student) for k in (3, 4))
    assert torch.equal(images, again[0]) and answers == again[2] and not torch.equal(images, other[0])
    asked = [q for k in range(12) for q in distill.still_questions(replace(distill.TINY, stills=1), k, student)[1]]
    sentences = {s.split()[0] for s in SENTENCES}
    assert 0.25 < np.mean([q.split()[-1 if q == "describe" else 1] in sentences for q in asked]) < 0.55
    names = distill.still_questions(replace(distill.TINY, stills=4, refer=0), 3, student)[1]
    assert not any(q.split()[-1 if q == "describe" else 1] in sentences for q in names)


def test_the_beginnings_are_for_training(data, teacher_run):
    """--starts reaches the windows that are learned from, and not those that measure."""
    args, teacher_args = run_args(data, teacher_run, "", starts=0.7), lam.load_lam(teacher_run)[1]
    assert [distill.make_windows(args, teacher_args, 32, split).starts for split in ("train", "val")] == [0.7, 0]


def test_what_is_asked_is_learned(data, teacher_run, tmp_path):
    """L_r is a mean over the words of phases and answers alike, and both are learned; unasked, answers are not. Without
    its weight they change nothing, and where they could not, --stills is refused."""
    costs = {}
    for stills in (0, 1):
        torch.manual_seed(0)
        args = replace(run_args(data, teacher_run, tmp_path / str(stills), stills=stills), steps=24, lr=1e-2)
        distill.train(args, h.process())
        student = distill.load_student(tmp_path / str(stills))[0].eval()
        with torch.no_grad():
            _, logits, words = student(*distill.still_questions(replace(args, stills=2), 900, student))
        costs[stills] = (distill.nats(logits, words).sum() / (words >= 0).sum()).item()
    assert costs[1] < 0.6 * costs[0] and h.log(tmp_path / "1")[-1]["val_perplexity"] < 3
    for change in ({"lambda_r": 0.0}, {"vlm_lr": 0.0}):
        with pytest.raises(InputError, match="--stills 1 asks, .* it learns nothing of it"):
            distill.check(replace(args, **change))
    with pytest.raises(InputError, match="--refer 1.5: a share is at most 1"):
        distill.check(replace(args, refer=1.5))
    made = []
    for stills in (0, 1):
        torch.manual_seed(0)
        mute = run_args(data, teacher_run, tmp_path / f"mute{stills}", stills=stills, lambda_r=0.0)
        distill.train(mute, h.process())
        made.append(common.read_tensors(tmp_path / f"mute{stills}/checkpoints/step_00000004/model.safetensors"))
    assert all(torch.equal(made[0][name], p) for name, p in made[1].items())

    torch.manual_seed(0)
    teacher_args = lam.load_lam(teacher_run)[1]
    student = distill.build(args, (3, 2), 48)
    windows = distill.make_windows(args, teacher_args, 32, "train")
    batch = collate([windows[i] for i in range(4)])
    texts = [student(batch["first"], batch["instruction"], distill.phases(batch))[1:],
             student(*distill.still_questions(args, 0, student))[1:]]  # fmt: skip
    mean = sum(distill.nats(*t).sum() for t in texts) / sum((words >= 0).sum() for _, words in texts)
    logged = next(line for line in h.log(tmp_path / "1") if line["step"] == 1)
    assert logged["text"] == pytest.approx(mean.item(), rel=1e-4)


def test_the_model_may_learn_more_slowly_than_the_queries(data, teacher_run, tmp_path):
    """At a share of 0 of the rates, Muon's and AdamW's, the pretrained part stays as it is."""
    distill.train(run_args(data, teacher_run, tmp_path / "run", muon=1e-2, vlm_lr=0.0), h.process())
    earlier, later = (common.read_tensors(tmp_path / f"run/checkpoints/step_0000000{step}/model.safetensors")
                      for step in (2, 4))  # fmt: skip
    for name, p in earlier.items():
        assert torch.equal(p, later[name]) == name.startswith("vlm."), name


def test_the_eyes_may_learn_more_slowly_than_the_rest(data, teacher_run, tmp_path, monkeypatch):
    """At a share of 0 the vision encoder stays as it is, at a tenth it learns that much in the first step, and the rest
    learns as ever."""
    moved, start, build = {}, {}, distill.build

    def watched(*args):
        student = build(*args)
        start.update({name: p.detach().clone() for name, p in student.named_parameters()})
        return student

    monkeypatch.setattr(distill, "build", watched)
    for share in (0.0, 0.1, 1.0):
        torch.manual_seed(0)
        args = run_args(data, teacher_run, tmp_path / str(share), muon=1e-2, vision_lr=share, clip=1e9)
        distill.train(replace(args, steps=1, save_every=1), h.process())
        later = common.read_tensors(tmp_path / str(share) / "checkpoints/step_00000001/model.safetensors")
        moved[share] = {name: (later[name] - p).norm().item() for name, p in start.items()}
    for name, whole in moved[1.0].items():
        share = 0.1 if name.startswith("vlm.vision_tower.") else 1.0
        assert moved[0.1][name] == pytest.approx(share * whole, rel=0.02, abs=1e-5), name
        assert moved[0.0][name] == (0 if share < 1 else pytest.approx(whole, rel=1e-3)), name
        assert whole > 1e-4 or name.endswith("k_proj.bias"), name  # softmax does not see what is added to all keys


def test_shuffle(data, teacher_run, tmp_path, monkeypatch):
    """The student is taught Z of the whole clip and the subtask's text, or with --shuffle other samples' Z and its own
    text; validation is as ever."""
    teacher, teacher_args, _ = lam.load_lam(teacher_run)
    loss, taught, written, logs = distill.distill_loss, [], [], []

    def watched(hat, z, logits, words, *rest):
        taught.append(z)
        written.append(words)
        return loss(hat, z, logits, words, *rest)

    monkeypatch.setattr(distill, "distill_loss", watched)
    for shuffle in (False, True):
        args = run_args(data, teacher_run, tmp_path / str(shuffle), shuffle=shuffle)
        torch.manual_seed(0)
        distill.train(replace(args, steps=2), h.process())
        logs.append(h.log(tmp_path / str(shuffle)))
    student, args, _ = distill.load_student(tmp_path / "True")
    windows = distill.make_windows(args, teacher_args, student.image_size, "train")
    for step in range(2):
        batch = collate([windows[i] for i in range(4 * step, 4 * step + 4)])
        with torch.no_grad():
            z = torch.cat(teacher.eval().encoder(batch["video"], batch["instruction"]), 1)
        close(taught[step], z)
        ids, valid = student.ids(batch["subtask"], end=student.tokenizer.eos_token)
        assert all(torch.equal(words, ids.masked_fill(~valid, -100)) for words in (written[step], written[2 + step]))
        close(taught[2 + step], z[distill.another(batch["index"], args.seed)])
        own = batch["window"] == batch["window"][distill.another(batch["index"], args.seed)]  # drawn twice
        assert ((taught[2 + step] - z).abs().amax((1, 2)) > 0.01).equal(~own) and own.sum() < 3
    plain, shuffled = logs
    assert plain[0] == shuffled[0] and plain[1]["text"] == shuffled[1]["text"] and plain[1]["mse"] != shuffled[1]["mse"]
    held_out = distill.make_windows(args, teacher_args, student.image_size, "val")
    now = distill.validate(student.eval(), teacher, held_out, args, h.process())
    assert now == pytest.approx({k: v for k, v in shuffled[-1].items() if k != "step"}, rel=1e-5)
    with pytest.raises(InputError, match="--batch 1 must be 2 or more"):
        distill.check(replace(args, batch=1))


def test_no_teacher_leaves_no_run_behind(data, tmp_path):
    """The order of commands that everybody gets wrong once: it must not cost a --resume later."""
    with pytest.raises(InputError, match="no lam checkpoint .* run `python lam.py"):
        distill.train(run_args(data, tmp_path / "absent", tmp_path / "run"), h.process())
    assert not (tmp_path / "run").exists()


def rewrite_texts(data, out, kind: str, change) -> None:
    """A copy of a data set with other instructions or subtasks."""
    shutil.copytree(data, out)
    path = out / f"meta/{kind}s.parquet"
    table = pyarrow.parquet.read_table(path).to_pydict()
    column = next(k for k in table if k != f"{kind}_index")
    table[column] = change(table[column])
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def test_texts_are_checked_at_the_start(data, teacher_run, tmp_path):
    """An empty instruction, and a text that is too long, of an instruction or of a phase; no step is taken."""
    cases = [("task", lambda t: ["", *t[1:]], "instruction 0 of its 2 is empty"),
             ("task", lambda t: [t[0], "push it " * 3000], "an instruction of 24000 letters"),
             ("subtask", lambda t: [t[0], "push it " * 3000], "a subtask text of 24000 letters")]  # fmt: skip
    for i, (kind, change, message) in enumerate(cases):
        rewrite_texts(data, tmp_path / f"data{i}", kind, change)
        with pytest.raises(InputError, match=message):
            distill.train(run_args(tmp_path / f"data{i}", teacher_run, tmp_path / f"run{i}"), h.process())
        assert not common.read_metrics(tmp_path / f"run{i}")


class Told:
    """A student and a teacher in one: what they answer stands in the batch."""

    def __init__(self):
        self.eval = self.train = self.encoder = lambda *given: (given[0][:, :1], given[0][:, 1:]) if given else self

    def __call__(self, first, instructions, texts, seen):
        logits = torch.zeros(len(first), 2, 4)
        logits[:, :, 3] = torch.tensor([9.0 if i == "drop" else 0.0 for i in instructions])[:, None]
        return first, logits, torch.tensor([[0, -100] if t == "short" else [0, 1] for t in texts])


def test_validation_in_closed_form(monkeypatch):
    """Zhat is twice Z, so that each has cosine 1 with its own; the text is uniform over four words, five times. What
    fills up the last batch is not counted."""
    z = torch.tensor([[1.0, 0], [0, 1], [0, -1], [7, 7]])[:, None].expand(-1, 2, -1)
    batches = [
        {"video": z[i], "first": 2 * z[i], "instruction": [("", "drop")[k == 3] for k in i.tolist()],
         "subtask": [("short", "a longer text")[k > 0] for k in i.tolist()], "counted": i < 3}
        for i in torch.arange(4).split(2)
    ]  # fmt: skip
    monkeypatch.setattr(distill, "held_out_batches", lambda *_: batches)
    out = distill.validate(Told(), Told(), None, replace(distill.TINY, val_samples=3), h.process())
    kl = (F.softmax(2 * z[:3], -1) * (F.log_softmax(2 * z[:3], -1) - F.log_softmax(z[:3], -1))).sum(-1).mean()
    assert out == pytest.approx({
        "val_mse": 1 / 2, "val_kl": kl.item(), "val_mse_mean": (4 / 9 + 10 / 9 + 10 / 9) / 6,
        "val_cosine": 1, "val_cosine_shuffled": -1 / 3, "val_perplexity": 4,
    })  # fmt: skip


@torch.no_grad()
def test_a_view_that_is_absent_changes_nothing(student):
    """Whatever its pixels are, and as if it were not there; one that is there is looked at."""
    images, other = h.pictures(2, 2), h.pictures(2, 2, seed=5)
    blank = torch.stack([images[:, 0], other[:, 1]], 1)
    seen = torch.tensor([[True, False], [True, True]])
    for call in (student, lambda *given, seen=None: student(*given, ["lift it", "go"], seen)[1]):
        with_both, changed = (call(x, [SHORT, LONG], seen=seen) for x in (images, blank))
        alone = call(images[:, :1], [SHORT, LONG])
        close(with_both[0], changed[0])
        close(with_both[0, : alone.shape[1]], alone[0])
        assert (with_both[1] - changed[1]).abs().max() > 1e-3
    kept = [student.describe(x, [SHORT, LONG], 4, seen)[0] for x in (images, blank)]
    assert kept[0] == kept[1] == student.describe(images[:, :1], [SHORT, LONG], 4)[0]


def test_more_cameras_where_there_are(data, teacher_run, tmp_path):
    """Of two data sets one lacks the wrist camera: there the student is told so, and it learns from both."""
    alone = h.make_data(tmp_path / "alone", cameras=("primary",))
    args = replace(run_args(data, teacher_run, tmp_path / "run"), data=(str(data), str(alone)), more_cameras=("wrist",))
    _, teacher_args, _ = lam.load_lam(args.lam)
    windows = distill.make_windows(args, teacher_args, 32, "all")
    batch = collate([windows[i] for i in range(16)])
    images, seen = distill.first_frames(batch)
    assert images.shape == (16, 2, 3, 32, 32) and seen.tolist() == [[True, d == 0] for d in batch["dataset"].tolist()]
    assert images[~seen].eq(0).all() and images[seen].flatten(1).any(1).all() and 0 < seen[:, 1].sum() < 16
    distill.train(replace(args, preload=True), h.process())
    assert math.isfinite(h.log(tmp_path / "run")[-1]["val_cosine"])
    with pytest.raises(InputError, match=r"no data set has a camera \['wrst'\]"):
        distill.make_windows(replace(args, more_cameras=("wrst",)), teacher_args, 32, "all")


def test_an_empty_subtask_is_the_instruction():
    batch = {"subtask": ["lift it", " ", ""], "instruction": [SHORT, LONG, "go"]}
    assert distill.phases(batch) == ["lift it", LONG, "go"]


def test_the_teachers_statistics(data, tmp_path, capsys):
    """The same data set with other statistics is refused; one that the teacher never saw is named. What differs in its
    last digits, as simulated on another machine, is the same."""
    h.save_lam(tmp_path / "lam")
    distill.train(run_args(data, tmp_path / "lam", tmp_path / "a"), h.process())
    assert f"it has not seen ['{data}']" in capsys.readouterr().out
    found = common.find_checkpoint(tmp_path / "lam", "lam")
    statistics = common.load_meta(tmp_path / "a/checkpoints/step_00000004")["statistics"]
    common.write_json(found / "meta.json", common.load_meta(found) | {"statistics": statistics})
    distill.train(run_args(data, tmp_path / "lam", tmp_path / "b"), h.process())
    assert "it has not seen" not in capsys.readouterr().out
    statistics[str(data)]["action"]["q99"][0] *= 1.001
    statistics[str(data)]["timestamp"] = {"min": [0.0], "max": [2.0]}  # as others' data sets have it, without quantiles
    common.write_json(found / "meta.json", common.load_meta(found) | {"statistics": statistics})
    distill.train(run_args(data, tmp_path / "lam", tmp_path / "other_machine"), h.process())
    for share, same in ((0.04, True), (0.06, False)):  # on either side of a twentieth of the range
        then = {"action": {"q01": [0.0, -1.0], "q99": [1.0, 3.0]}}
        for q, column, width in (("q01", 0, 1.0), ("q99", 1, 4.0)):
            now = json.loads(json.dumps(then))
            now["action"][q][column] -= share * width
            assert distill.alike(then, now) is same
    statistics[str(data)]["action"]["q99"][0] += 0.1
    common.write_json(found / "meta.json", common.load_meta(found) | {"statistics": statistics})
    with pytest.raises(InputError, match="the data at .* have other statistics than when the teacher .* learned"):
        distill.train(run_args(data, tmp_path / "lam", tmp_path / "c"), h.process())


@pytest.mark.parametrize("stage", [distill, finetune])
def test_bfloat16_on_a_cpu(stage, monkeypatch):
    """--small asks for it, --tiny and the paper's run do not, and the process is set up accordingly."""
    asked = []
    monkeypatch.setattr(common, "setup", lambda *args: asked.append(args) or sys.exit(0))
    for words in (["--small"], ["--tiny"], ["--tiny", "--cpu-bf16"]):
        monkeypatch.setattr("sys.argv", ["x", *words])
        with pytest.raises(SystemExit):
            stage.main()
    assert asked == [(0, 1, True), (0, 1, False), (0, 1, True)] and not stage.Args().cpu_bf16
