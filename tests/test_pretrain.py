"""Still scenes and what is learned from them before stage 1."""

import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

import common
import pretrain
from common import InputError
from data import stills
from data.scenes import Scene
from franka import INSTRUCTIONS

TINY = replace(pretrain.TINY, scenes=1, steps=4, sight=0.5, val_scenes=1, save_every=1, log_every=1)


def test_a_scene_is_a_function_of_its_seed_and_number():
    one, same, other = (stills.stills(0, n, 48) for n in (3, 3, 4))
    assert all(np.array_equal(a.image, b.image) and a.things == b.things for a, b in zip(one, same, strict=True))
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(one, other, strict=True))
    assert len(one) == stills.PER_SCENE and len({still.image.tobytes() for still in one}) == stills.PER_SCENE


def test_boxes_are_where_the_camera_sees_the_things():
    """A thing's centre, projected by hand, lies in its box unless something hides it."""
    inside = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scene = Scene("gripper", stills.Nothing, rng)
        eyes = stills._eyes_of(scene, ("primary", "wrist"), 96)
        words, owner = stills._owners(scene)
        stills._arrange(scene, rng)
        still = stills.look(scene, eyes, words, owner)[0]
        assert still.image.shape == (96, 96, 3)
        camera = scene.data.camera("primary")
        turned = Rotation.from_matrix(camera.xmat.reshape(3, 3))
        half = np.tan(np.radians(scene.model.camera("primary").fovy[0]) / 2)
        boxes = dict(still.things)
        for thing in scene.things.values():
            x, y, z = turned.inv().apply(scene.where(thing.name)[0] - camera.xpos)
            u, v = (1 + x / -z / half) / 2, (1 - y / -z / half) / 2
            if thing.words in boxes:
                top, left, bottom, right = boxes[thing.words]
                assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
                inside.append(top <= v <= bottom and left <= u <= right)
    assert len(inside) > 12 and np.mean(inside) > 0.85


def test_what_the_instructions_speak_of_is_named():
    rng = np.random.default_rng(0)
    said = [part for n in range(40) for still in stills.stills(0, n, 48) for k in ("detect", "describe")
            for part in stills.ask(still, rng, k)]  # fmt: skip
    words = {word for text in said for word in text.split()}
    assert {"red", "blue", "cup", "block", "slot", "oven", "pot", "brush", "sauce", "gripper"} <= words
    asked = [name for text in said if text.startswith("detect") for name in text[7:].split(" ; ")]
    assert 0.1 < np.mean([name in stills.NOUNS[:-2] for name in asked]) < 0.5  # "oven", not "grey oven"


def test_household_things_stand_on_the_table_apart_or_out_of_sight():
    kinds, sauces = set(), 0
    for k in range(40):
        rng = np.random.default_rng(k)
        scene = Scene("gripper", stills.Nothing, rng)
        stills._arrange(scene, rng)
        words, owner = stills._owners(scene)
        sauces += sum(name.endswith("sauce") for name in words)
        things = scene.family.household
        for name, thing in things.items():
            kinds.add(thing.words.split()[1])
            geoms = scene.model.geom_bodyid == scene.model.body(name).id
            assert {words[n].split()[1] for n in owner[geoms]} <= {thing.words.split()[1], "sauce"}
            low = (scene.data.geom_xpos - scene.model.geom_rbound[:, None])[geoms, 2].min()
            assert low < -0.5 or abs(scene.where(name)[0][2] - thing.half) < 1e-6
        placed = [(scene.where(n)[0], t.radius) for n, t in (things | scene.things).items()]
        seen = [(at, r) for at, r in placed if at[2] > -0.5]
        for i, (at, r) in enumerate(seen):
            assert all(np.linalg.norm((at - other)[:2]) > r + q for other, q in seen[:i])
    assert kinds == set(stills.HOUSEHOLD) and sauces > 3


def test_an_answer_gives_the_places_that_were_asked_for():
    things = [("red cube", (0.5, 0.25, 0.75, 0.5)), ("gripper", (0.0, 0.125, 0.25, 1.0))]
    of_cube, of_gripper = "0512><loc0256><loc0768><loc0512>", "0000><loc0128><loc0256><loc1016>"
    expected = {"red cube": of_cube, "cube": of_cube, "gripper": of_gripper}
    still = stills.Still(np.zeros((8, 8, 3), np.uint8), things, np.full((8, 8), -1, np.int8))
    assert stills.ask(still, np.random.default_rng(0), "describe") == (
        "describe",
        "gripper <loc0000><loc0128><loc0256><loc1016> ; red cube <loc0512><loc0256><loc0768><loc0512>",
    )
    question, answer = stills.ask(still, np.random.default_rng(1), "detect")
    asked = question.removeprefix("detect ").split(" ; ")
    assert [part.split(" <")[0] for part in answer.split(" ; ")] == asked
    assert all(part.split(" <", 1)[1] == "loc" + dict(expected)[part.split(" <")[0]] for part in answer.split(" ; "))
    two = stills.Still(still.image, [*things, ("blue cube", (0.0, 0.0, 0.5, 0.5))], still.owner)
    names = {n for k in range(40) for n in stills.ask(two, np.random.default_rng(k), "detect")[0][7:].split(" ; ")}
    assert names == {"red cube", "blue cube", "gripper"}  # which cube, only the colour says


def test_a_sentence_is_answered_by_what_it_speaks_of():
    """In its order, by the name it has there, never a body; the five tasks' verbs are not used; all kinds come."""
    kinds, spoken = set(), 0
    for n in range(20):
        for k, still in enumerate(stills.stills(0, n, 48)):
            question, answer = stills.ask(still, np.random.default_rng([n, k]), "refer")
            kinds.add(stills.kind_of_question(np.random.default_rng([n, k]), 0.4))
            boxes = {name: box for name, box in still.things if not name.endswith(("gripper", "hand"))}
            if not boxes:
                continue
            verb, spoken = question.split()[1], spoken + 1
            assert verb not in {text.split()[0] for text in INSTRUCTIONS.values()}
            parts = [part.split(" <") for part in answer.split(" ; ")]
            assert f"detect {verb}" in question and question.count(" the ") >= len(parts) in (1, 2)
            at = -1
            for name, place in parts:
                at = question.index(f"the {name}", at + 1)
                full = next(words for words in boxes if name in (words, words.split()[-1]))
                assert f"<{place}" == "".join(map(common.loc, boxes[full]))
    assert kinds == set(stills.KINDS) and spoken > 60


@pytest.mark.parametrize("source", ["paligemma-tiny", "internvl-tiny"])
def test_only_the_answer_is_to_be_said(source):
    model, tokenizer = common.load_vlm(source)
    asked = [("describe", "red cube <loc0512>"), ("detect gripper", "nothing")]
    batch = pretrain.encode(tokenizer, model.config, asked)
    for row, answer in enumerate(("red cube <loc0512>", "nothing")):
        said = batch["labels"][row][batch["labels"][row] != -100]
        assert torch.equal(said, batch["input_ids"][row][batch["labels"][row] != -100])
        written = tokenizer.decode(said, skip_special_tokens=False).replace(" ", "")
        assert written.startswith(answer.replace(" ", ""))
        image = (batch["input_ids"][row] == model.config.image_token_id).sum()
        assert image == (64 if source == "paligemma-tiny" else model.config.image_seq_length)
        assert batch["attention_mask"][row].sum() >= image + len(said)


@pytest.mark.parametrize("source", ["paligemma-tiny", "internvl-tiny"])
def test_a_name_is_the_same_words_asked_and_answered(source):
    """Token by token, also the first one of an answer."""
    model, tokenizer = common.load_vlm(source)
    row = {k: v[0] for k, v in pretrain.encode(tokenizer, model.config, [("detect red cube", "red cube")]).items()}
    red, cube = row["labels"][row["labels"] != -100][:2]
    question = row["input_ids"][row["labels"] == -100]
    assert tokenizer.decode([red, cube]) == " red cube" and (question == red).sum() == (question == cube).sum() == 1


def test_patches_are_labelled_with_what_they_show():
    owner = np.full((8, 8), -1, np.int8)
    owner[4:, 2:6] = 0  # the lower middle: halves of the lower two of four squares
    still = stills.Still(np.zeros((8, 8, 3), np.uint8), [("red puck", (0.5, 0.25, 1.0, 0.75))], owner)
    none = pretrain.CLASSES - 1
    labels = pretrain.label_patches(still, 2)
    assert np.array_equal(labels[:2, :2], [none, none])
    thing = [list(pretrain.COLOURS).index("red"), stills.NOUNS.index("puck")]
    assert np.array_equal(labels[2], [*thing, -0.5, 0.0, 0.5, 1.0])  # squares from the lower left one's centre
    assert np.array_equal(labels[3], [*thing, -0.5, -1.0, 0.5, 0.0])
    hand = stills.Still(still.image, [("left hand", (0.5, 0.25, 1.0, 0.75))], owner)
    assert np.array_equal(pretrain.label_patches(hand, 2)[2, :2], [none[0], stills.NOUNS.index("hand")])

    truth = torch.from_numpy(labels)[None]
    one_hot = [torch.nn.functional.one_hot(truth[..., k].long(), n) * 50.0 for k, n in enumerate(pretrain.CLASSES)]
    right = torch.cat([*one_hot, truth[..., 2:]], -1)
    assert pretrain.patch_loss(right, truth) < 1e-6
    moved = right.clone()
    moved[:, :2, -4:] += 3.0  # a box where there is nothing
    assert pretrain.patch_loss(moved, truth) < 1e-6
    moved[:, 2:, -4:] += 0.5
    assert pretrain.patch_loss(moved, truth) == pytest.approx(0.5 - 0.1, rel=1e-4)  # smooth L1: |d| - beta / 2


def test_the_two_parts_have_a_schedule_each(tmp_path):
    pretrain.train(replace(TINY, steps=8, warmup=0, save_every=8, out=str(tmp_path / "run")), common.setup(0))
    rates = [row["lr"] for row in common.read_metrics(tmp_path / "run") if "lr" in row]
    assert rates[:4] == rates[4:] == sorted(rates[:4], reverse=True) and rates[0] == TINY.lr > rates[3] == TINY.min_lr


def test_the_loss_is_least_for_the_blurred_place():
    """At the blurred target itself the loss of places is its entropy, anywhere else it is larger."""
    places, first = common.PLACES, 7
    grid = torch.arange(places)
    blurred = torch.softmax(-0.5 * ((grid - 40.0) / pretrain.BLUR) ** 2, -1)
    entropy = -(blurred * blurred.clamp(min=1e-30).log()).sum()

    def loss(of_places):
        logits = torch.full((1, 3, places + 20), -1e4)
        logits[0, 0, first : first + places], logits[0, 1, 3] = of_places, 0.0
        model = SimpleNamespace(config=SimpleNamespace(model_type="paligemma"), lm_head=torch.nn.Identity(),
                                model=lambda **_: SimpleNamespace(last_hidden_state=logits))  # fmt: skip
        batch = {"input_ids": torch.zeros(1, 3), "labels": torch.tensor([[-100, first + 40, 3]])}
        return pretrain.answer_loss(model, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), batch, first)

    words, least, expected, true = loss(blurred.clamp(min=1e-30).log())
    assert words < 1e-4 and true.item() == 40
    torch.testing.assert_close(least, entropy)
    torch.testing.assert_close(expected, torch.tensor([40.0]))
    assert loss(blurred.roll(2).clamp(min=1e-30).log())[1] > entropy + 0.5


def test_resumes_bit_for_bit_and_leaves_a_folder_that_loads(tmp_path, monkeypatch):
    """While the vision encoder learns alone, between, and after."""
    monkeypatch.setattr(common, "save_checkpoint", partial(common.save_checkpoint, keep=9))

    def train(out, resume=False):
        pretrain.train(replace(TINY, out=str(tmp_path / out), resume=resume), common.setup(0))
        return load_file(tmp_path / out / "checkpoints/step_00000004/model.safetensors")

    whole = train("whole")
    for at in (1, 2, 3):
        cut = shutil.copytree(tmp_path / "whole", tmp_path / f"cut{at}")
        for later in common.checkpoints(cut)[at:]:
            shutil.rmtree(later)
        again = train(f"cut{at}", resume=True)
        assert all(torch.equal(whole[k], again[k]) for k in whole), at
    model, tokenizer = common.load_vlm(str(tmp_path / "cut1/hf"))
    assert tokenizer.decode(tokenizer("<loc0512>", add_special_tokens=False).input_ids) == "<loc0512>"
    own = dict(model.named_parameters())
    assert own and all(torch.equal(own[k], whole[f"vlm.{k}"]) for k in own)


def test_first_only_the_vision_encoder_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "save_checkpoint", partial(common.save_checkpoint, keep=9))
    pretrain.train(replace(TINY, out=str(tmp_path / "run")), common.setup(0))
    one, two, four = (load_file(path / "model.safetensors") for path in common.checkpoints(tmp_path / "run")
                      if path.name[-1] in "124")  # fmt: skip
    seeing = {k for k in one if ".vision_tower." in k or k.startswith("patches")}
    assert {k for k in one if not torch.equal(one[k], two[k])} == seeing
    late = {k for k in one if not torch.equal(two[k], four[k])}
    assert len(late) > len(seeing) + 20 and any("language_model.layers.0" in k for k in late)


def test_scenes_come_again_with_other_questions():
    model, tokenizer = common.load_vlm("paligemma-tiny")
    args = replace(TINY, scenes=2, pool=4)
    made = [pretrain.draw(0, step, args, 64, tokenizer, model.config) for step in range(4)]
    images, batches = zip(*made, strict=True)
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[3])
    assert not torch.equal(images[0], images[1])
    asked = [batch["input_ids"].tolist() for batch in batches]
    assert asked[0] != asked[2]
    fresh = [pretrain.draw(0, step, replace(args, pool=0), 64, tokenizer, model.config)[0] for step in (0, 2)]
    assert torch.equal(fresh[0], images[0]) and not torch.equal(fresh[1], images[0])


def test_learns_where_a_scene_of_things_is():
    """Overfits one scene: its boxes come out to a few pixels."""
    torch.manual_seed(0)
    model, tokenizer = common.load_vlm("internvl-tiny")
    first = tokenizer.convert_tokens_to_ids("<loc0000>")
    images, batch = pretrain.draw(0, 1, replace(TINY, scenes=1), 64, tokenizer, model.config, "describe")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(120):
        words, places, expected, true = pretrain.answer_loss(model, images, batch, first)
        optimizer.zero_grad()
        (words + places).backward()
        optimizer.step()
    assert (expected - true).abs().mean() < 4 < true.float().std()


def test_wrong_models_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--tiny", "--model", "google/paligemma-3b-pt-224"])
    with pytest.raises(InputError, match="choose one of"):
        pretrain.main()
