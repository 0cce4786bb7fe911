"""Properties of the unified spaces, the normaliser and its statistics, on inputs that hypothesis makes up."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import common
from common import ACTION_NAMES, ARM_ACTION, STATE_NAMES, InputError, Normalizer
from data.quantiles import Statistics

number = st.floats(-2, 2, width=32)
# Angles with their traps: the poles of pitch, half turns, and both sides of each.
right = np.pi / 2
traps = [0, right, -right, right - 1e-7, 1e-7 - right, np.pi, -np.pi]
angle = st.one_of(st.floats(-np.pi, np.pi), st.sampled_from(traps))
pose = st.tuples(st.tuples(number, number, number), st.tuples(angle, angle, angle))


def poses_of(drawn: list) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p for p, _ in drawn]), Rotation.from_euler("xyz", [e for _, e in drawn]).as_quat(canonical=True)


def angle_between(a: np.ndarray, b: np.ndarray) -> float:
    return (Rotation.from_quat(a) * Rotation.from_quat(b).inv()).magnitude().max()


# -- names ------------------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from([ACTION_NAMES, STATE_NAMES]))
@settings(max_examples=50, deadline=None)
def test_unify_and_back(data, all_names):
    """Any columns in any order find their places, leave the others at zero, and come back."""
    names = data.draw(st.lists(st.sampled_from(all_names), unique=True))
    values = np.array(data.draw(st.lists(st.lists(number, min_size=len(names), max_size=len(names)), min_size=1)))
    unified = common.scatter(values, names, all_names)
    assert unified.shape == (len(values), len(all_names))
    np.testing.assert_array_equal(common.gather(unified, names, all_names), values)
    others = [i for i, n in enumerate(all_names) if n not in names]
    assert (unified[:, others] == 0).all()
    np.testing.assert_array_equal(common.scatter(common.gather(unified, names, all_names), names, all_names), unified)


# -- rotations --------------------------------------------------------------------------------------------------------


@given(pose, pose)
@settings(max_examples=150, deadline=None)
def test_a_change_of_pose_survives_the_poles(one, two):
    """Euler angles are not unique at a pitch of 90 degrees, and a half turn has two quaternions: what they *do* must
    come out right there too, without a warning."""
    position, quaternion = poses_of([one, two])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        action = common.relative_action(position[:1], quaternion[:1], position[1:], quaternion[1:])
        there, turn = common.apply_action(position[:1], quaternion[:1], action)
    np.testing.assert_allclose(there, position[1:], atol=1e-5)
    assert angle_between(turn, quaternion[1:]) < 1e-5
    np.testing.assert_array_equal(common.canonical(turn), turn)
    assert np.abs(action[0, 3:]).max() <= np.pi + 1e-5 and abs(action[0, 4]) <= right + 1e-5


@given(st.lists(st.sampled_from([-1.0, -0.5, -1e-9, -0.0, 0.0, 1e-9, 0.5, 1.0]), min_size=4, max_size=4).filter(any))
@example([-0.5, 0.5, 1.0, 0.0])
def test_a_rotation_has_one_quaternion(q):
    """q and -q are one rotation and get one name, also half a turn from where the rule starts."""
    q = np.array(q) / np.linalg.norm(q)
    out = common.canonical(np.stack([q, -q]))
    np.testing.assert_array_equal(out[0], out[1])
    assert np.array_equal(out[0], q) or np.array_equal(out[0], -q)


UPRIGHT, ABOUT_X, ABOUT_Y = Rotation.identity(), *(Rotation.from_quat(row) for row in np.eye(4)[:2])
POSTURES = [(UPRIGHT, 69), (ABOUT_X, 85), (Rotation.from_euler("z", 45, True) * ABOUT_X, 105), (ABOUT_Y, 53),
            (Rotation.from_euler("z", -45, True) * ABOUT_X, 53)]  # fmt: skip
POSTURES += [(turn, 9) for turn in Rotation.create_group("O")]  # along the axes, all 24


@given(st.sampled_from(POSTURES), st.lists(st.tuples(angle, angle, st.floats(0, 1)), min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_a_quaternion_keeps_its_sign_about_common_postures(posture, drawn):
    """Within so many degrees about any axis: a tool that points down is half a turn from upright for most robots, and
    its quaternion may not jump when it wobbles."""
    turn, degrees = posture
    a, b, size = np.array(drawn).T
    axis = np.stack([np.cos(a) * np.cos(b), np.sin(a) * np.cos(b), np.sin(b)], 1)
    out = common.canonical((Rotation.from_rotvec(axis * size[:, None] * degrees, degrees=True) * turn).as_quat())
    assert (out @ common.canonical(turn.as_quat()) > 0).all()


def random_episode(poses: list, fingers: bool, with_state: bool) -> dict:
    """Two arms that follow commands badly: each pose is where it is, whatever was commanded before."""
    rng = np.random.default_rng(len(poses))
    action, state = np.zeros((len(poses), 44)), np.zeros((len(poses), 46))
    position, quaternion = poses_of(poses)
    for a, s in ((0, 0), (7, 8)):
        state[:, s : s + 3], state[:, s + 3 : s + 7] = position, quaternion
        action[:, a : a + 6] = rng.normal(size=(len(poses), 6))
        action[:, a + 6] = rng.integers(0, 2, len(poses))
    action[:, 14:], state[:, 16:] = rng.normal(size=(2, len(poses), 30))
    mask = np.full(46, with_state)
    mask[16:] &= fingers
    return {"action": action.astype(np.float32), "state": state, "state_mask": mask, "steps": len(poses)}


@given(st.lists(pose, min_size=4, max_size=7), st.integers(1, 4), st.booleans())
@settings(max_examples=80, deadline=None)
def test_strided_actions_lead_to_the_last_target(poses, stride, fingers):
    """Where the poses are known: from the pose measured at the start to the target commanded stride - 1 steps later."""
    episode = random_episode(poses, fingers, with_state=True)
    starts = np.arange(len(poses) - stride + 1)
    out, last = common.strided_actions(episode, starts, stride), starts + stride - 1
    state, action = episode["state"], episode["action"]
    for a, s in ((0, 0), (7, 8)):
        goal, turn = common.apply_action(state[last, s : s + 3], state[last, s + 3 : s + 7], action[last, a : a + 6])
        there, turned = common.apply_action(state[starts, s : s + 3], state[starts, s + 3 : s + 7], out[:, a : a + 6])
        np.testing.assert_allclose(there, goal, atol=1e-5)
        assert angle_between(turned, turn) < 1e-5
        np.testing.assert_array_equal(out[:, a + 6], action[last, a + 6])
    tips = state[last, 16:] + action[last, 14:] - state[starts, 16:]
    sums = np.stack([action[t : t + stride, 14:].sum(0) for t in starts])
    np.testing.assert_allclose(out[:, 14:], tips if fingers else sums, atol=1e-5)


@given(st.lists(pose, min_size=4, max_size=7), st.integers(2, 4))
@settings(max_examples=80, deadline=None)
def test_strided_actions_without_a_state_are_the_product_of_transforms(poses, stride):
    """4 x 4 matrices, multiplied by numpy: the later rotation from the left, translations in the base frame."""
    episode = random_episode(poses, False, with_state=False)
    out = common.strided_actions(episode, np.array([1]) if len(poses) > stride else np.array([0]), stride)[0]
    first = 1 if len(poses) > stride else 0
    for a in (0, 7):
        steps = episode["action"][first : first + stride, a : a + 6].astype(float)
        product = np.eye(3)
        for step in steps:
            product = Rotation.from_euler("xyz", step[3:]).as_matrix() @ product
        np.testing.assert_allclose(out[a : a + 3], steps[:, :3].sum(0), atol=1e-5)
        np.testing.assert_allclose(Rotation.from_euler("xyz", out[a + 3 : a + 6]).as_matrix(), product, atol=1e-5)


# -- normaliser and statistics ----------------------------------------------------------------------------------------

columns = st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 50)), min_size=7, max_size=7)


@given(columns, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_quantile_normalisation_round_trip(ranges, seed):
    """Also for a dimension that never moves: it is not divided by zero, and comes back."""
    low = np.array([a for a, _ in ranges])
    high = low + np.array([w for _, w in ranges])
    norm = Normalizer.from_stats({"q01": low.tolist(), "q99": high.tolist()}, ARM_ACTION, ACTION_NAMES, "here")
    ends = torch.from_numpy(common.scatter(np.stack([low, high]), ARM_ACTION, ACTION_NAMES)).float()
    unit = norm.normalize(ends)[:, 7:13].numpy()
    wide = (high - low)[:6] > 0.05
    np.testing.assert_allclose(unit[:, wide], np.array([-1, 1])[:, None].repeat(wide.sum(), 1), atol=2e-3)
    assert np.abs(unit).max() <= 1 + 2e-3
    x = torch.randn(20, 44, generator=torch.Generator().manual_seed(seed)) * 10
    torch.testing.assert_close(norm.unnormalize(norm.normalize(x)), x, atol=1e-4, rtol=1e-4)
    assert torch.equal(norm.normalize(x)[:, [6, 13]], x[:, [6, 13]])  # grippers pass untouched


def numpys(values: np.ndarray) -> dict[str, np.ndarray]:
    return {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0),
            "q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0)}  # fmt: skip


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_statistics_in_parts_and_shards_are_numpys(sizes, seed, masked):
    """Exactly, while few: however the rows are cut, in which shard they are, and whatever a mask leaves out."""
    rng = np.random.default_rng(seed)
    shards, rows, masks = [Statistics(3), Statistics(3)], [], []
    for i, n in enumerate([*sizes, 1]):
        rows.append(rng.normal(size=(n, 3)).astype(np.float32) * [1, 100, 1e-3] + [0, 50, 0])
        masks.append(rng.random((n, 3)) < 0.7 if masked and i < len(sizes) else np.ones((n, 3), bool))
        shards[i % 2].add(rows[-1].astype(np.float32), masks[-1] if masked else None)
    shards[0].merge(shards[1])
    values, mask = np.concatenate(rows).astype(np.float32).astype(float), np.concatenate(masks)
    out = shards[0].result()
    for d in range(3):
        for key, want in numpys(values[mask[:, d], d]).items():
            np.testing.assert_allclose(out[key][d], want, rtol=1e-6, atol=1e-9, err_msg=key)
    np.testing.assert_array_equal(shards[0].count, mask.sum(0))


@pytest.mark.parametrize("kind", ["normal", "walk", "rising", "two values"])
@pytest.mark.parametrize("shards", [1, 5])
def test_streaming_quantiles_keep_their_bound_and_their_memory(kind, shards, monkeypatch):
    monkeypatch.setattr(Statistics, "KEEP", 256)
    rng, n = np.random.default_rng(0), 100_000
    values = {
        "normal": rng.normal(size=n), "walk": np.cumsum(rng.normal(size=n)), "rising": np.arange(n) / n,
        "two values": (rng.random(n) < 0.3).astype(float),
    }[kind].astype(np.float32)  # fmt: skip
    total = Statistics(1)
    for part in np.array_split(values, shards):
        shard = Statistics(1)
        for chunk in np.array_split(part, 50):
            shard.add(chunk[:, None])
        total.merge(shard)
    levels = total.levels[0]
    assert all(len(level) < 2 * 256 for level in levels) and 8 <= len(levels) <= 10
    assert sum(len(v) << h for h, v in enumerate(levels)) == n == total.count[0]  # nothing is lost or counted twice
    for q in (0.01, 0.5, 0.99):
        got = total.quantile(q)[0]
        below, upto = (values < got).mean(), (values <= got).mean()
        assert below - len(levels) / 512 <= q <= upto + len(levels) / 512
        assert below - 0.004 <= q <= upto + 0.004  # in practice
    out = total.result()
    np.testing.assert_allclose([out["mean"][0], out["std"][0]], [values.mean(dtype=float), values.std(dtype=float)])
    assert (out["min"][0], out["max"][0]) == (values.min(), values.max())


def test_statistics_of_nothing_are_refused():
    total = Statistics(2)
    total.add(np.ones((4, 2)), np.array([[True, False]] * 4))
    with pytest.raises(InputError, match=r"no values for columns \[1\] of 2"):
        total.result()
