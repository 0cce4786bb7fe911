"""Mappings: LeRobot data sets made by others, read in place. The sets are written here as their converters lay them
out, without video; golden values for gripper signs, rotations and scales."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from scipy.spatial.transform import Rotation

import common
from common import ARM_ACTION, ARM_STATE, InputError
from data import stats
from data.lerobot import LeRobotReader

MAPPINGS = sorted(p.stem for p in (ROOT / "data/mappings").glob("*.json"))


def write_foreign(root: Path, columns: dict[str, np.ndarray], images: list[str], fps: float = 10) -> Path:
    """One episode in LeRobot's format v2.1."""
    n = len(next(iter(columns.values())))
    features = {k: {"dtype": "float32", "shape": list(v.shape[1:]), "names": None} for k, v in columns.items()}
    features |= {k: {"dtype": "video", "shape": [64, 64, 3], "names": None} for k in images}
    info = {
        "codebase_version": "v2.1", "fps": fps, "chunks_size": 1000, "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "stack the cups"}))
    (root / "meta/episodes.jsonl").write_text(
        json.dumps({"episode_index": 0, "tasks": ["stack the cups"], "length": n})
    )
    table = {
        k: pa.FixedSizeListArray.from_arrays(pa.array(v.ravel(), pa.float32()), v.shape[1]) for k, v in columns.items()
    }
    table |= {"episode_index": pa.array([0] * n), "task_index": pa.array([0] * n)}
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(table), root / "data/chunk-000/episode_000000.parquet")
    return root


def read(tmp_path: Path, mapping: str, columns: dict[str, np.ndarray]) -> tuple[LeRobotReader, dict, dict]:
    """The reader, and the episode's actions and states by the names that they have."""
    images = json.loads((ROOT / f"data/mappings/{mapping}.json").read_text())["images"].values()
    reader = LeRobotReader(f"{write_foreign(tmp_path / 'set', columns, list(images))}@{mapping}")
    episode = reader.episode(0)
    assert episode["task"] == "stack the cups"
    action = {n: episode["action"][: episode["steps"], common.ACTION_NAMES.index(n)] for n in reader.action_names}
    return reader, action, {n: episode["state"][:, common.STATE_NAMES.index(n)] for n in reader.state_names}


def euler(columns: dict, names=("roll", "pitch", "yaw")) -> Rotation:
    return Rotation.from_euler("xyz", np.stack([columns[f"right_{n}"] for n in names], 1))


def quaternion(columns: dict) -> Rotation:
    return Rotation.from_quat(np.stack([columns[f"right_q{c}"] for c in "xyzw"], 1))


@pytest.mark.parametrize("name", MAPPINGS)
def test_every_mapping_reads_its_layout(tmp_path, name):
    """Seven action and eight state columns, grippers somewhere in 0 .. 1, quaternions of length 1."""
    mapping = json.loads((ROOT / f"data/mappings/{name}.json").read_text())
    widths: dict[str, int] = {"action": 7, "observation.state": 8}
    entries = [e for kind in ("state", "action", "target") for e in mapping.get(kind, {}).values()]
    for entry in entries:
        widths[entry["column"]] = max(widths.get(entry["column"], 1), entry["index"] + 1)
    columns = {k: np.full((6, w), 0.03) for k, w in widths.items()}
    for kind in ("state", "target"):
        for side_name, entry in mapping.get(kind, {}).items():
            if side_name.endswith("_qw"):
                columns[entry["column"]][:, entry["index"]] = 1
    reader, action, state = read(tmp_path, name, columns)
    assert "primary" in reader.cameras and mapping["about"]
    assert set(action) <= set(ARM_ACTION) and set(state) <= set(ARM_STATE)
    assert {"right_x", "right_y"} <= set(action)
    assert "right_qw" not in state or {"right_x", "right_y", "right_z"} <= set(state)
    assert stats.statistics(reader, 2)["action.stride2"]["count"] == [
        5 if {"action", "target"} & set(mapping) else 4
    ]


def test_droid(tmp_path):
    """Absolute Euler angles of a tool that points down, at roll = +-pi; the gripper closes with 1."""
    n = 4
    here = np.tile([0.4, 0.1, 0.3, np.pi - 0.01, 0.02, 0.5], (n, 1))
    goal = here + [0.01, 0, -0.02, 0, 0, 0.1]
    goal[:, 3] = -np.pi + 0.02  # 0.03 rad on, across the jump
    closed = np.linspace(0, 1, n)[:, None]
    columns = {"observation.state.cartesian_position": here, "observation.state.gripper_position": closed}
    columns |= {"action.cartesian_position": goal, "action.gripper_position": 1 - closed}
    _, action, state = read(tmp_path, "droid", columns)
    np.testing.assert_allclose([action["right_x"][0], action["right_z"][0]], [0.01, -0.02], atol=1e-6)
    turn = Rotation.from_euler("xyz", goal[:, 3:]) * Rotation.from_euler("xyz", here[:, 3:]).inv()
    assert (euler(action) * turn.inv()).magnitude().max() < 1e-5 and turn.magnitude().max() < 0.2
    assert (quaternion(state) * Rotation.from_euler("xyz", here[:, 3:]).inv()).magnitude().max() < 1e-5
    np.testing.assert_allclose(state["right_gripper"], 1 - closed[:, 0], atol=1e-6)
    np.testing.assert_allclose(action["right_gripper"], closed[:, 0], atol=1e-6)


@pytest.mark.parametrize("name, opened", [("libero_openvla", 1.0), ("libero_lerobot", -1.0)])
def test_libero(tmp_path, name, opened):
    state = np.tile([0.1, 0.2, 0.9, 3.0, 0.1, -0.2, 0.04, -0.04], (3, 1))
    command = np.tile([1.0, 0, -0.5, 0.4, 0.8, -0.2, opened], (3, 1))
    state[2, 6:] = 0
    command[1, 6] = {1.0: 0.0, -1.0: 1.0}[opened]
    _, action, pose = read(tmp_path, name, {"observation.state": state, "action": command})
    np.testing.assert_allclose([action["right_x"][0], action["right_z"][0]], [0.05, -0.025], atol=1e-7)
    np.testing.assert_allclose(euler(action).as_rotvec(), [[0.2, 0.4, -0.1]] * 3, atol=1e-6)
    assert action["right_gripper"].tolist() == [1, 0, 1] and pose["right_gripper"].tolist() == pytest.approx([1, 1, 0])
    np.testing.assert_allclose(quaternion(pose).as_rotvec(), state[:, 3:6], atol=1e-6)


def test_open_x_embodiment(tmp_path):
    """As openx2lerobot lays them out: 7 standardised action columns, 8 state columns."""
    rng = np.random.default_rng(0)
    command = np.concatenate([rng.normal(size=(4, 6)) * 0.05, rng.integers(0, 2, (4, 1))], 1)
    turn = Rotation.from_rotvec(np.cumsum(rng.normal(size=(4, 3)) * 0.1, 0))
    position, opening = np.cumsum(rng.normal(size=(4, 3)) * 0.01, 0), np.array([0.0, 0.3, 0.8, 1.0])
    pad, grip = np.zeros((4, 1)), opening[:, None]
    fractal = np.concatenate([position, turn.as_quat(), 1 - grip], 1)
    bridge = np.concatenate([position, turn.as_euler("xyz"), pad, grip], 1)
    bc_z = np.concatenate([position, turn.as_rotvec(), pad, 1 - grip], 1)
    for name, state in (("fractal20220817_data", fractal), ("bridge_dataset", bridge), ("bc_z", bc_z)):
        _, action, pose = read(tmp_path / name, name, {"observation.state": state, "action": command})
        assert (quaternion(pose) * turn.inv()).magnitude().max() < 1e-5, name
        np.testing.assert_allclose(pose["right_gripper"], opening, atol=1e-6, err_msg=name)
        if name == "fractal20220817_data":
            np.testing.assert_allclose(np.stack(list(action.values()), 1), command, atol=1e-6)
        else:  # the measured change of pose: a difference of Euler angles or of rotation vectors is no rotation
            np.testing.assert_allclose(action["right_x"], np.diff(position[:, 0]), atol=1e-6)
            assert (euler(action) * (turn[1:] * turn[:-1].inv()).inv()).magnitude().max() < 1e-5
            np.testing.assert_allclose(action["right_gripper"], opening[1:], atol=1e-6)
    _, action, pose = read(tmp_path / "kuka", "kuka", {"observation.state": fractal, "action": command})
    assert not pose and tuple(action) == ARM_ACTION and (action["right_gripper"] == command[:, 6]).all()
    _, action, _ = read(tmp_path / "table", "language_table", {"observation.state": fractal, "action": command})
    assert set(action) == {"right_x", "right_y"}


def test_rotations_need_all_three_names(tmp_path):
    root = write_foreign(tmp_path / "set", {"pose": np.zeros((3, 6))}, ["eye"])
    mapping = {"images": {"primary": "eye"}, "state": {f"right_{n}": {"column": "pose", "index": i}
               for i, n in enumerate(["x", "y", "z", "roll", "pitch"])}}  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(mapping))
    with pytest.raises(InputError, match=r"unknown names \['right_roll', 'right_pitch'\]"):
        LeRobotReader(f"{root}@{tmp_path / 'm.json'}")
