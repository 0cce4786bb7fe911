"""data/play.py: bodies, families, predicates, determinism, the recorder. CPU only, no download."""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import common
from common import ACTION_NAMES, ARMS, STATE_NAMES
from data import play
from data.bodies import BODIES
from data.families import FAMILIES
from data.lerobot import LeRobotReader
from data.play import CORPORA, Args
from data.scenes import Scene
from data.windows import View, Windows
from franka import EXPERTS, OPEN, Oven, Task, hold

PAIRS = [(body, name) for name, family in FAMILIES.items() for body in family.bodies]
EACH = [(family.bodies[k % len(family.bodies)], name) for k, (name, family) in enumerate(FAMILIES.items())]


def succeed(body: str, family: str, size: int = 0) -> dict:
    """The first success."""
    for attempt in range(10):
        episode, _ = play.play(body, family, (7, attempt), size)
        if episode is not None:
            return episode
    raise AssertionError(f"{family} by {body} failed ten times")


@pytest.fixture(scope="module")
def episodes():
    """An episode of each family, without pictures; the bodies take turns."""
    return {(body, family): succeed(body, family) for body, family in EACH}


# ---- What is in an episode ----


def test_there_are_many_families_bodies_and_paraphrases():
    assert len(FAMILIES) >= 8 and set(BODIES) == {"fr3", "sixaxis", "gripper", "hands"}
    for name, family in FAMILIES.items():
        texts = {family.opens, family.shuts} if name == "drawer" else {family.texts}
        assert all(len(set(t)) >= 3 for t in texts), name
    for body in BODIES:
        assert sum(body in family.bodies for family in FAMILIES.values()) >= 8


def test_no_text_speaks_of_the_tasks_objects(episodes):
    files = (Path(play.__file__).with_name(f"{name}.py") for name in ("play", "bodies", "scenes", "families"))
    source = "".join(path.read_text().split('"""', 2)[2] for path in files)
    said = " ".join(re.findall(r'"([^"]*)"', source.replace(", ".join(f'"{w}"' for w in play.HELD_OUT), "")))
    said += " ".join(text for e in episodes.values() for text in (e["task"], *e["subtasks"]))
    assert not {w for w in play.HELD_OUT if re.search(rf"\b{w}s?\b", said)}


def test_episodes_have_the_columns_of_their_body(episodes):
    for (body, family), e in episodes.items():
        n = len(e["action"])
        wide = (44, 46) if body == "hands" else (7, 8)
        assert (e["action"].shape, e["state"].shape) == ((n, wide[0]), (n, wide[1])), family
        assert 10 < n < play.LIMIT and len(e["subtasks"]) == n and len(set(e["subtasks"])) >= 3
        assert np.isfinite(e["action"]).all() and np.isfinite(e["state"]).all()


def test_actions_lead_to_the_next_pose(episodes):
    """As in the five tasks' demonstrations: the tool arrives at its target by the end of the tick."""
    for (body, family), e in episodes.items():
        for _, a, s in ARMS if body == "hands" else [("right", 0, 0)]:
            p, q, action = e["state"][:, s : s + 3], e["state"][:, s + 3 : s + 7], e["action"][:-1, a : a + 6]
            goal, facing = common.apply_action(p[:-1], q[:-1], action)
            error = np.linalg.norm(goal - p[1:], axis=1)
            turn = (Rotation.from_quat(facing) * Rotation.from_quat(q[1:]).inv()).magnitude()
            # The rest are disturbances, and fingers that press on something that yields or does not.
            assert np.median(error) < 2e-3 and np.mean(error < 5e-3) > 0.6, (body, family)
            assert np.median(turn) < 0.02, (body, family)
        if body == "hands":
            assert np.abs(e["state"][:-1, 16:] + e["action"][:-1, 14:] - e["state"][1:, 16:]).max() < 1e-6


def test_gripper_one_opens_zero_closes(episodes):
    for (body, family), e in episodes.items():
        if family in ("lift", "place_on", "place_in", "stack", "wipe", "turn", "pour"):
            held = 0 if body == "hands" and np.ptp(e["action"][:, 6]) else 6 if body != "hands" else 13
            command = e["action"][:, 6 if held == 0 else held]
            opening = e["state"][:, 7 if len(e["state"][0]) == 8 or held == 0 else 15]
            first = int(np.argmin(command))
            assert command[0] == 1 and command[first] == 0 and opening[first] > opening[first + 4] + 0.1, (body, family)


def test_hands_use_all_columns_by_name():
    e = succeed("hands", "carry")
    assert CORPORA["hands"].action_names == ACTION_NAMES and CORPORA["hands"].state_names == STATE_NAMES
    moved = np.ptp(e["state"], 0)
    assert (moved[[STATE_NAMES.index(f"{s}_{n}") for s in ("left", "right") for n in ("z", "gripper")]] > 0.02).all()
    assert (moved[16:].reshape(10, 3).max(1) > 0.05).all()  # every fingertip
    tips = e["state"][:, 16:].reshape(-1, 2, 5, 3)
    for side, (_, _, s) in enumerate(ARMS):  # and each hangs on its own hand
        away = np.linalg.norm(tips[:, side] - e["state"][:, None, s : s + 3], axis=-1)
        assert away.max() < 0.1
    assert np.ptp(e["camera"], 0).max() > 1e-3  # the head moves


def test_scenes_vary_and_contain_the_tasks_cameras():
    eyes, tables, things, movers, homes = [], [], [], [], []
    for k in range(160):
        scene = Scene("fr3", FAMILIES["lift"], np.random.default_rng(k))
        eyes.append(scene.camera_pose()[:3])
        tables.append(scene.model.geom("table").rgba[:3])
        things.append(scene.family.thing.words)
        movers.append(len(scene.movers))
        homes.append(scene.home)
    near = [np.linalg.norm(np.array(eyes) - camera, axis=1) < 0.01 for camera, _ in (Task.camera, Oven.camera)]
    for home, least, most in ((True, 0.9, 1.0), (False, 0.1, 0.8)):
        at = np.array(homes) == home
        assert least <= (near[0] | near[1])[at].mean() <= most and all((n & at).any() for n in near)
        spread = np.std(np.array(tables)[at], 0)
        assert (spread.max() < 0.03 if home else spread.min() > 0.1) and (max(np.array(movers)[at]) > 0) != home
    assert 0.85 < np.mean(homes) < 0.95 and len(set(things)) > 20
    assert not any(Scene("gripper", FAMILIES["lift"], np.random.default_rng(k)).home for k in range(5))


def test_things_that_move_by_themselves_move_and_touch_nothing():
    for k in itertools.count():
        scene = Scene("gripper", FAMILIES["lift"], np.random.default_rng(k))
        if scene.movers:
            break
    before = scene.data.mocap_pos.copy(), scene.data.mocap_quat.copy()
    for _ in range(5):
        scene.step({"right": scene.idle(scene.actor)})
    after = scene.data.mocap_pos, scene.data.mocap_quat
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(before, after, strict=True))
    geoms = np.isin(scene.model.geom_bodyid, np.flatnonzero(scene.model.body_mocapid >= 0))
    assert geoms.any() and not (scene.model.geom_contype[geoms] | scene.model.geom_conaffinity[geoms]).any()


# ---- Determinism and success ----


def test_harder_disturbances_push_further():
    """What is recorded leads to the next pose where nothing disturbs, and is off by centimetres at strength 3."""
    away = {}
    for strength in (0, 3):
        episode, _, _ = play.make("gripper", 0, 0, 32, strength)
        state, action = episode["state"], episode["action"]
        position, _ = common.apply_action(state[:-1, :3], state[:-1, 3:7], action[:-1, :6])
        away[strength] = np.linalg.norm(position - state[1:, :3], axis=1).max()
    assert away[0] < 0.01 and away[3] > 0.02


@pytest.mark.parametrize("body", BODIES)
def test_an_episode_is_a_function_of_its_numbers(body):
    cameras = CORPORA[body].cameras
    first = next(filter(None, (play.play(body, "push", (3, k), 32, cameras)[0] for k in range(10))))
    play.play(body, "lift", (4,), 32, cameras)  # what was played before does not matter
    again = next(filter(None, (play.play(body, "push", (3, k), 32, cameras)[0] for k in range(10))))
    assert first["task"] == again["task"] and np.array_equal(first["action"], again["action"])
    for camera in cameras:
        assert np.array_equal(first["frames"][camera], again["frames"][camera])
        assert np.std(first["frames"][camera]) > 10 and len(first["frames"][camera]) == len(first["action"])


@pytest.mark.parametrize("body, family", EACH)
def test_predicates_fail_when_nothing_is_done_or_half(body, family, monkeypatch):
    """The same scene succeeds with its expert; standing still fails, and so does stopping after 40 % of the ticks."""
    entropy, whole = next(
        (k, e) for k in range(10) for e in [play.play(body, family, (7, k), 0)[0]] if e is not None
    )
    expert = FAMILIES[family].expert
    part = int(0.4 * len(whole["action"]))
    for sabotage in (
        lambda self, s: hold(s.actor, OPEN, "stand still", 30),
        lambda self, s: itertools.islice(expert(self, s), part),
    ):
        monkeypatch.setattr(FAMILIES[family], "expert", sabotage)
        episode, reason = play.play(body, family, (7, entropy), 0)
        assert episode is None and reason


def test_moving_something_else_is_no_success(monkeypatch):
    for k in range(20):
        scene = Scene("fr3", FAMILIES["lift"], np.random.default_rng(np.random.SeedSequence((7, k))))
        if scene.bystanders and play.play("fr3", "lift", (7, k), 0)[0] is not None:
            break
    finish = FAMILIES["lift"].watch

    def shove(self, s):
        s.before[min(s.bystanders)] = np.array([9.0, 9.0, 9.0])

    monkeypatch.setattr(FAMILIES["lift"], "watch", shove)
    assert play.play("fr3", "lift", (7, k), 0) == (None, "something else was moved")
    monkeypatch.setattr(FAMILIES["lift"], "watch", finish)


@pytest.mark.slow
@pytest.mark.parametrize("body, family", PAIRS)
def test_most_attempts_succeed(body, family):
    results = [play.play(body, family, (11, k), 0)[1] for k in range(20)]
    assert sum(not r for r in results) >= 10, results


# ---- The recorder ----


def test_data_sets_share_the_episodes_and_a_larger_corpus_begins_alike():
    assert play.order(50) == play.order(200)[:50]
    assert set(play.order(len(CORPORA))) == {(name, 0) for name in CORPORA}
    jobs = play.order(1000)
    assert len(set(jobs)) == 1000
    for name, corpus in CORPORA.items():
        numbers = [n for c, n in jobs if c == name]
        assert numbers == list(range(len(numbers))) and abs(len(numbers) - 1000 * corpus.share) < 2
        seen = {play.behaviour(name, n) for n in range(200)}
        assert seen == {(b, f) for b, f in PAIRS if b in corpus.bodies}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten episodes: six at first, by one worker; then two workers go on."""
    out = tmp_path_factory.mktemp("play") / "corpus"
    play.record(Args(episodes=6, image_size=32, disturb=2, workers=1, out=str(out)))
    play.record(Args(episodes=10, image_size=32, disturb=2, workers=2, out=str(out), resume=True))
    return out


def test_recording_resumes_and_does_not_depend_on_workers(corpus):
    for name, numbers in itertools.groupby(sorted(play.order(10)), lambda job: job[0]):
        reader = LeRobotReader(corpus / name)
        numbers = [n for _, n in numbers]
        assert reader.num_episodes == len(numbers) and reader.fps == 10
        for n in numbers:
            want, _, _ = play.make(name, n, 0, 32, disturb=2)
            have = reader.episode(n)
            action = common.scatter(want["action"], CORPORA[name].action_names, ACTION_NAMES)
            assert np.array_equal(have["action"], action) and have["task"] == want["task"]
            assert have["subtask"] == want["subtasks"]
    assert not list(corpus.rglob("*.partial"))


def test_training_reads_all_data_sets_together(corpus):
    sources = sorted(str(path) for path in corpus.glob("*"))
    assert [Path(s).name for s in sources] == sorted(CORPORA)
    windows = Windows(sources, {"video": View("primary", 4, 32)}, 3, 10, seed=0)
    used = dict.fromkeys(CORPORA, 0)
    for i in range(40):
        sample = windows[i]
        name = Path(sources[sample["dataset"]]).name
        mask = sample["action_mask"].any(0).sum().item()
        assert mask in ((0,) if name == "video" else (44, 0) if name == "hands" else (7, 0))
        used[name] = max(used[name], mask)
        assert sample["video"].shape == (4, 3, 32, 32) and sample["action"].isfinite().all()
    assert used == {"fr3": 7, "sixaxis": 7, "gripper": 7, "hands": 44, "video": 0}


def test_what_does_not_fit_is_refused_and_nothing_is_lost(corpus, tmp_path, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    cases = (
        (f"--episodes 12 --image-size 32 --disturb 2 --out {corpus}", "add --resume"),
        (f"--episodes 12 --image-size 32 --disturb 2 --seed 4 --resume --out {corpus}", "choose another --out"),
        (f"--episodes 12 --image-size 34 --disturb 2 --resume --out {corpus}", "choose another --out"),
        (f"--episodes 12 --image-size 32 --resume --out {corpus}", "choose another --out"),
        (f"--image-size 33 --out {tmp_path / 'x'}", "must be even"),
        (f"--episodes 0 --out {tmp_path / 'x'}", "--episodes 0"),
        (f"--sheet {tmp_path / 'x.jpg'}", "ends in .png"),
    )
    for flags, message in cases:
        monkeypatch.setattr(sys, "argv", ["play", *flags.split()])
        with pytest.raises(SystemExit) as stop:
            common.run_main(play.main)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
    assert before == {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert not list(tmp_path.iterdir())
    assert json.loads((corpus / "fr3/meta/play.json").read_text()) == {
        "experts": EXPERTS, "seed": 0, "image_size": 32, "disturb": 2}  # fmt: skip


@pytest.mark.parametrize("body", ["fr3", "hands"])
def test_nobody_waits_with_open_fingers(body):
    """Fingers open until they stand, those of a hand that keeps some of them half closed, too."""
    episode = next(e for n in range(9) for e, _ in [play.play(body, "place_on", (n,), 32, ("primary",))] if e)
    waits = [episode["subtasks"].count(phase) for phase in ("open the fingers", *{
        phase for phase in episode["subtasks"] if phase.startswith("grip ")})]  # fmt: skip
    assert len(waits) == 2 and all(1 < n < 9 for n in waits)
