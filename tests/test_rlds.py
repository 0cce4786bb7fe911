"""The RLDS converter: the format against its owners' decoder, every row of the table on a synthetic data set with its
golden values, the Bridge recording, damaged files, damaged episodes, interruption."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy.spatial.transform import Rotation

import common
from common import STATE_NAMES
from data import rlds, stats
from data.convert import BrokenSource
from data.lerobot import LeRobotReader, LeRobotWriter
from data.windows import View, Windows

# -- the format, written by its specification ---------------------------------------------------------------------


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def encode(features: dict, packed: bool = True) -> bytes:
    """A tf.train.Example, written by the specification of protocol buffers: an encoder apart from the parser."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            kind, body = 1, b"".join(field(1, v) for v in values)
        elif isinstance(values[0], float):
            raw = [struct.pack("<f", v) for v in values]
            kind, body = 2, field(1, b"".join(raw)) if packed else b"".join(b"\x0d" + r for r in raw)
        else:
            raw = [varint(v) for v in values]
            kind, body = 3, field(1, b"".join(raw)) if packed else b"".join(b"\x08" + r for r in raw)
        entries += field(1, field(1, name.encode()) + field(2, field(kind, body)))
    return field(1, entries)


def crc32c_slowly(data: bytes) -> int:
    """Bit by bit, from the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """A record of a tfrecord file. (The checksum of the data is the tested one: its test is by itself.)"""
    head = struct.pack("<Q", len(data))
    return head + struct.pack("<I", rlds.masked_crc32c(head)) + data + struct.pack("<I", rlds.masked_crc32c(data))


def test_crc32c():
    unmask = lambda v: (lambda r: (r >> 17 | r << 15) & 0xFFFFFFFF)((v - 0xA282EAD8) & 0xFFFFFFFF)
    assert unmask(rlds.masked_crc32c(b"123456789")) == 0xE3069283  # the check value of CRC-32C
    assert unmask(rlds.masked_crc32c(bytes(32))) == 0x8A9136AA  # RFC 3720, B.4
    rng = np.random.default_rng(0)
    for size in (4, 5, 255, 256, 257, 512, 1000, 5000):
        data = rng.integers(0, 256, size, np.uint8).tobytes()
        assert unmask(rlds.masked_crc32c(data)) == crc32c_slowly(data), size


FEATURES = {"a": [0.5, -2.25, 3.0], "b": [1, -5, 2**62, -(2**63)], "c": [b"", b"xyz", bytes(300)], "d/é": [7]}


@pytest.mark.parametrize("packed", [True, False])
def test_examples_packed_and_unpacked(tmp_path, packed):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(frame(encode(FEATURES, packed)) * 2)
    read = [rlds.read_episode(path, k, 2) for k in range(2)]
    assert read[0].keys() == read[1].keys() == FEATURES.keys()
    assert read[1]["a"].dtype == np.float32 and read[1]["a"].tolist() == FEATURES["a"]
    assert read[1]["b"].tolist() == FEATURES["b"] and read[1]["c"] == FEATURES["c"]


def test_damaged_records_name_file_and_record(tmp_path):
    path, good = tmp_path / "x.tfrecord", frame(encode(FEATURES))
    huge = struct.pack("<Q", 1 << 60)
    for damage, text in (
        (good + good[:-20], "record 1 of .*x.tfrecord is cut short"),
        (good + good[:5], "record 1 of .*x.tfrecord is damaged: no valid header"),
        (good + good[:60] + bytes([good[60] ^ 4]) + good[61:], "record 1 of .*x.tfrecord is damaged: the checksum"),
        (good + bytes([good[0] ^ 1]) + good[1:], "record 1 of .*x.tfrecord is damaged: no valid header"),
        (good + huge + struct.pack("<I", rlds.masked_crc32c(huge)) + good, "record 1 of .* is cut short"),
    ):
        path.write_bytes(damage)
        with pytest.raises(BrokenSource, match=text):
            for k in range(9):
                rlds.read_record(path, k, 9)
    for garbage in (b"\xff\xff\xff\xff no message", field(1, field(1, b"\x08\x05")), field(1, b"\x08\x05")):
        path.write_bytes(frame(garbage))
        with pytest.raises(BrokenSource, match="record 0 of .* is no tf.train.Example"):
            rlds.read_episode(path, 0, 1)
    path.write_bytes(good * 2)
    assert rlds.read_record(path, 1, 2) == good[12:-4]
    with pytest.raises(BrokenSource, match="x.tfrecord holds more episodes than 1"):
        rlds.read_record(path, 0, 1)
    for number in (2, 5):
        with pytest.raises(BrokenSource, match="x.tfrecord ends after 2 episodes, where dataset_info.json has 9"):
            rlds.read_record(path, number, 9)


# -- every row of the table: a data set to the letter of the facts, and what must come of it ----------------------

STEPS, SIZE = 5, (24, 32)
MOVE = np.array([[0.01, -0.02, 0.03], [0.0, 0.05, -0.01], [0.02, 0.0, 0.0], [-0.03, 0.01, 0.02], [0.0, 0.0, -0.04]])
TURN = np.array([[0.1, -0.2, 0.3], [0.0, 0.0, 0.5], [-0.4, 0.1, 0.0], [0.2, 0.2, -0.2], [3.0, -0.1, 0.05]])
PLACE = np.linspace([0.3, -0.1, 0.2], [0.4, 0.1, 0.1], STEPS)
L, O = "language_instruction", "observation/natural_language_instruction"  # noqa: E741
TASK = "put the café's cup on the shelf"


def quaternion(euler: np.ndarray) -> np.ndarray:
    """xyzw of Rz(yaw) Ry(pitch) Rx(roll), by the textbook's formula (n, 4)."""
    (r, p, y), c, s = euler.T / 2, np.cos, np.sin
    return np.stack([
        s(r) * c(p) * c(y) - c(r) * s(p) * s(y), c(r) * s(p) * c(y) + s(r) * c(p) * s(y),
        c(r) * c(p) * s(y) - s(r) * s(p) * c(y), c(r) * c(p) * c(y) + s(r) * s(p) * s(y),
    ], 1)  # fmt: skip


def half_angle(rotvec: np.ndarray) -> np.ndarray:
    """xyzw of axis times angle (n, 3)."""
    angle = np.linalg.norm(rotvec, axis=1, keepdims=True)
    return np.concatenate([rotvec / angle * np.sin(angle / 2), np.cos(angle / 2)], 1)


def rodrigues(rotvec: np.ndarray) -> np.ndarray:
    """The matrix of axis times angle."""
    angle = np.linalg.norm(rotvec)
    x, y, z = rotvec / angle
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def angles(m: np.ndarray) -> list[float]:
    """Roll, pitch, yaw of Rz Ry Rx."""
    return [np.arctan2(m[2, 1], m[2, 2]), -np.arcsin(m[2, 0]), np.arctan2(m[1, 0], m[0, 0])]


def cat(*parts) -> np.ndarray:
    return np.concatenate([np.reshape(p, (STEPS, -1)) for p in parts], 1).astype(float)


def vectors(**grip) -> dict:
    return {"action/world_vector": MOVE, "action/rotation_delta": TURN} | {f"action/{k}": v for k, v in grip.items()}


def rel(*g: float) -> dict:
    return vectors(gripper_closedness_action=np.array(g)[:, None])


def flat(*g: float) -> dict:
    return {"action": cat(MOVE, TURN, g)}


STATE7, QUAT7 = cat(PLACE, TURN, [1.2, 0.5, 0, 0, 1]), cat(PLACE, quaternion(TURN))
WILL_CLOSE, OPENED = (0, 1, 0.05, -1, 0), [1, 0, 0, 1, 1]  # relative: +1 closes, -1 opens, small keeps; open before
NOISY, CLIPPED = (-1, -0.2, 0.25, 1, 1.3), [0, 0, 0.25, 1, 1]  # to be clipped
HALF, INVERTED = (0, 1, 0.25, 0.5, 1), [1, 0, 0.75, 0.5, 0]  # 1 - g
AS_IS = (0, 1, 0.25, 0.5, 1)
SPUN = np.linspace([2.0, 0.1, 0.2], [2.2, -0.1, 0.3], STEPS)  # axis times angle: the tool points down,
BENT = SPUN + np.linspace([0.2, 0.1, 0.0], [-0.1, 0.3, 0.1], STEPS)  # and what is to be added to it
BOOLS = np.array([True, False, False, True, True])
INSTRUCTION = np.zeros((STEPS, 64), int)
INSTRUCTION[:, : len(TASK)] = [ord(c) for c in TASK]
INSTRUCTION[:, len(TASK) + 1] = ord("!")  # what comes after the NUL does not count

# name: (features per step, expected gripper, and what differs from the defaults: image, wrist, lang, turn, move, state)
# `state` maps unified names to what is expected; a set that is not mentioned as having one must have none.
POSE = {"xyz": PLACE, "quat": quaternion(TURN)}
GOLD: dict[str, tuple[dict, list, dict]] = {
    "fractal20220817_data": (
        rel(*WILL_CLOSE) | {"observation/base_pose_tool_reached": QUAT7, "observation/gripper_closed": cat(HALF)},
        OPENED, {"lang": O, "state": POSE | {"gripper": INVERTED}},
    ),
    "kuka": (
        rel(0, -1, 0.05, 1, 0)
        | {"observation/clip_function_input/base_pose_tool_reached": ("zlib", QUAT7),
           "observation/gripper_closed": ("zlib", cat(HALF))},
        [0, 1, 1, 0, 0], {"lang": O, "state": POSE | {"gripper": INVERTED}},
    ),
    "bridge_dataset": (
        flat(0.97, 0.5, 0.02, 0.3, 0.99) | {"observation/state": STATE7}, [1, 0, 0, 1, 1],
        {"image": "image_0", "state": POSE | {"gripper": [1, 0.5, 0, 0, 1]}, "first": 1},
    ),
    "bridge": (
        vectors(open_gripper=BOOLS) | {"observation/state": STATE7}, [1, 0, 0, 1, 1],
        {"lang": O, "state": POSE | {"gripper": [1, 0.5, 0, 0, 1]}},
    ),
    "taco_play": (
        {"action/rel_actions_world": cat(MOVE, TURN, NOISY), "observation/robot_obs": np.zeros((STEPS, 15))}, CLIPPED,
        {"lang": O, "image": "rgb_static", "wrist": "rgb_gripper"},
    ),
    "jaco_play": (
        {"action/world_vector": MOVE, "action/gripper_closedness_action": cat([0, 0, 0, 0, 0]),
         "observation/end_effector_cartesian_pos": QUAT7},
        [1, 1, 1, 1, 1], {"lang": O, "wrist": "image_wrist", "turn": 0 * TURN, "state": {"xyz": PLACE}},
    ),
    "berkeley_cable_routing": (vectors(), [0] * 5, {"lang": O, "wrist": "wrist45_image"}),
    "roboturk": (
        vectors(gripper_closedness_action=cat(NOISY)), [1, 1, 0.75, 0, 0], {"lang": O, "image": "front_rgb"},
    ),
    "viola": (
        vectors(gripper_closedness_action=np.array(NOISY)), [1, 1, 0.75, 0, 0],
        {"lang": O, "image": "agentview_rgb", "wrist": "eye_in_hand_rgb"},
    ),
    "berkeley_autolab_ur5": (
        vectors(gripper_closedness_action=np.array([0.0, 0, -1, 0, 1]))
        | {"observation/robot_state": cat(np.ones((5, 6)), QUAT7, np.ones((5, 2)))},
        [0, 0, 1, 1, 0], {"lang": O, "wrist": "hand_image", "state": POSE},
    ),
    "toto": (vectors(open_gripper=BOOLS), [1, 0, 0, 1, 1], {"lang": O}),
    "language_table": (
        {"action": MOVE[:, :2], "observation/instruction": INSTRUCTION,
         "observation/effector_translation": PLACE[:, :2]},
        [1] * 5,
        {"lang": "", "image": "rgb", "turn": 0 * TURN, "move": MOVE * [1, 1, 0], "state": {"xy": PLACE[:, :2]}},
    ),
    "stanford_hydra_dataset_converted_externally_to_rlds": (
        flat(*HALF) | {"observation/state": cat(PLACE, np.ones((5, 4)), TURN, np.ones((5, 17)))}, INVERTED,
        {"wrist": "wrist_image", "state": POSE},
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": (
        {"action": cat(np.ones((5, 7)), MOVE, TURN, NOISY, [0, 0, 0, 0, 1]),
         "observation/state": cat(np.ones((5, 7)), PLACE, TURN)},
        CLIPPED, {"state": POSE},
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": (
        {"action": cat(MOVE, quaternion(TURN), NOISY), "observation/state": cat(QUAT7, np.ones((5, 28)))},
        [1, 1, 0.75, 0, 0], {"wrist": "wrist_image", "state": POSE},
    ),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": ({"action": cat(MOVE, TURN, AS_IS, [0] * 5)}, list(AS_IS), {}),
    "dlr_edan_shared_control_converted_externally_to_rlds": (
        flat(*HALF) | {"observation/state": cat(PLACE, np.tile([0.5, 0, 0], (5, 1)), AS_IS)}, INVERTED,
        {"state": {"xyz": PLACE, "quat": np.tile([0, 0, np.sin(0.25), np.cos(0.25)], (5, 1))}},  # zxy: yaw comes first
    ),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": (
        {"action": cat(MOVE, quaternion(TURN), AS_IS)}, list(AS_IS), {"wrist": "wrist_image"},
    ),
    "berkeley_fanuc_manipulation": (
        {"action": cat(MOVE, TURN), "observation/state": cat(np.ones((5, 6)), HALF, np.ones((5, 6))),
         "observation/end_effector_state": QUAT7},
        INVERTED, {"wrist": "wrist_image", "state": {"xyz": PLACE}},
    ),
    "cmu_stretch": ({"action": cat(MOVE, TURN, AS_IS, [0] * 5)}, list(AS_IS), {}),
    "bc_z": (  # ten waypoints, of which the first counts
        {"action/future/xyz_residual": cat(MOVE, np.ones((5, 27))),
         "action/future/axis_angle_residual": cat(BENT - SPUN, np.ones((5, 27))),
         "action/future/target_close": cat([0, 1, 1, 0, 0], np.ones((5, 9))).astype(int),
         "observation/present/xyz": PLACE, "observation/present/axis_angle": SPUN,
         "observation/present/sensed_close": cat(HALF)},
        [1, 0, 0, 1, 1],
        {"lang": O, "turn": np.array([angles(rodrigues(b) @ rodrigues(a).T) for a, b in zip(SPUN, BENT, strict=True)]),
         "size": (25, 33), "state": {"xyz": PLACE, "quat": half_angle(SPUN), "gripper": INVERTED}},
    ),
    "fmb_dataset": (flat(*AS_IS), list(AS_IS), {"image": "image_side_1", "wrist": "image_wrist_1"}),
    "dobbe": (flat(*AS_IS), list(AS_IS), {"image": "wrist_image"}),
    "droid": (
        {"action_dict/cartesian_velocity": cat(MOVE, TURN), "action_dict/gripper_position": cat(HALF),
         "observation/cartesian_position": cat(PLACE, TURN), "observation/gripper_position": cat(HALF),
         "language_instruction_2": [b"second"] * 5},
        INVERTED,
        {"image": "exterior_image_1_left", "wrist": "wrist_image_left", "move": MOVE * 0.075, "turn": TURN * 0.15,
         "state": POSE | {"gripper": INVERTED}},
    ),
}  # fmt: skip
for _name in ("austin_buds_dataset", "austin_sailor_dataset", "austin_sirius_dataset"):
    GOLD[f"{_name}_converted_externally_to_rlds"] = (flat(*NOISY), [1, 1, 0.75, 0, 0], {"wrist": "wrist_image"})
GOLD["utaustin_mutex"] = GOLD["austin_buds_dataset_converted_externally_to_rlds"]
QUADRANTS = {"top left": (200, 30, 30), "top right": (30, 200, 30), "low left": (30, 30, 200), "low right": (180,) * 3}


def quadrants(size: tuple[int, int], blink: int) -> np.ndarray:
    """A picture that knows where is up and left, and which of the frames it is."""
    image = np.zeros((*size, 3), np.uint8)
    h, w = size[0] // 2, size[1] // 2
    quarters = image[:h, :w], image[:h, w:], image[h:, :w], image[h:, w:]
    for quarter, colour in zip(quarters, QUADRANTS.values(), strict=True):
        quarter[:] = colour
    image[h - 3 : h + 3] = 60 * (blink % 4)
    return image


def jpeg(image: np.ndarray, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


def make(name: str) -> dict:
    """The features per step of a synthetic episode: numbers (steps, ...), texts and pictures as lists of bytes."""
    features, _, other = GOLD[name]
    size, lang = other.get("size", SIZE), other.get("lang", L)
    steps = {"is_first": np.arange(STEPS) == 0, "is_last": np.arange(STEPS) == STEPS - 1}
    steps |= {k: v for k, v in features.items()}
    if lang:
        steps[lang] = [TASK.encode()] * STEPS
    for k, key in enumerate((other.get("image", "image"), other.get("wrist"))):
        if key:
            pictures = [jpeg(quadrants(size, t + k), ("JPEG", "PNG")[k]) for t in range(STEPS)]
            steps[f"observation/{key}"] = ("image", size, pictures)
    return steps


def describe(steps: dict) -> dict:
    """features.json, as TFDS writes it."""

    def node(kind: str, **content) -> dict:
        return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}", **content}

    def table(children: dict) -> dict:
        return node("features_dict.FeaturesDict", featuresDict={"features": children})

    def leaf(value) -> dict:
        form, value = (value[0], value[1:]) if isinstance(value, tuple) else ("none", (value,))
        if form == "image":
            encoding = "jpeg" if value[1][0][:2] == b"\xff\xd8" else "png"
            shape = {"dimensions": [str(n) for n in (*value[0], 3)]}
            return node("image_feature.Image", image={"shape": shape, "dtype": "uint8", "encodingFormat": encoding})
        if form == "ragged":
            inner = {"feature": leaf(np.zeros(1, np.asarray(value[0][0]).dtype)), "length": "-1"}
            return node("sequence_feature.Sequence", sequence=inner)
        (array,) = value
        if isinstance(array, list):
            return node("text_feature.Text", text={})
        shape = {"dimensions": [str(n) for n in array.shape[1:]]} if array.ndim > 1 else {}
        dtype = {"f": "float32", "i": "int64", "b": "bool"}[array.dtype.kind]
        return node("tensor_feature.Tensor", tensor={"shape": shape, "dtype": dtype, "encoding": form})

    groups: dict = {}
    for name, value in steps.items():  # only the first level is a dictionary: "present/xyz" is one name
        top, _, rest = name.partition("/")
        groups.setdefault(top, {})[rest] = leaf(value)
    tree = table({top: group.get("") or table(group) for top, group in groups.items()})
    return table({"steps": node("dataset_feature.Dataset", sequence={"feature": tree, "length": "-1"})})


def serialize(steps: dict) -> bytes:
    """The record of an episode."""
    out = {}
    for name, value in steps.items():
        name, value = f"steps/{name}", value if isinstance(value, tuple) else ("none", value)
        if value[0] == "ragged":
            out[f"{name}/ragged_row_lengths_0"] = [len(row) for row in value[1]]
            out[f"{name}/ragged_flat_values"] = np.concatenate(value[1]).tolist()
        elif value[0] == "zlib":
            out[name] = [zlib.compress(row.astype("<f4").tobytes()) for row in value[1]]
        elif isinstance(value[-1], list):
            out[name] = value[-1]
        else:
            array = value[1]
            out[name] = array.astype(int if array.dtype == bool else array.dtype).ravel().tolist()
    return encode(out)


def write(root: Path, name: str, episodes: list[dict], shards: int = 1, split: str = "train") -> Path:
    """A TFDS data set: the episodes shared out to the shards in order."""
    root.mkdir(parents=True)
    shares = np.array_split(np.arange(len(episodes)), shards)
    for k, share in enumerate(shares):
        data = b"".join(frame(serialize(episodes[i])) for i in share)
        (root / f"{name}-{split}.tfrecord-{k:05d}-of-{shards:05d}").write_bytes(data)
    info = {"name": name, "fileFormat": "tfrecord", "version": "0.1.0"}
    info["splits"] = [{"name": split, "shardLengths": [str(len(s)) for s in shares]}]  # old: without filepathTemplate
    (root / "dataset_info.json").write_text(json.dumps(info))
    (root / "features.json").write_text(json.dumps(describe(episodes[0])))
    return root


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*argv, workers: int = 1) -> tuple[int, str, str]:
        """The command in this process: its exit code (0 or 2), the last line on stderr, and stdout."""
        monkeypatch.setattr(sys, "argv", ["rlds", *map(str, argv), "--workers", str(workers)])
        code = 0
        try:
            common.run_main(rlds.main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, (err.splitlines() or [""])[-1], out

    return run


def test_the_table_is_table_6():
    """26 data sets of Open X-Embodiment and DROID, and Bridge's older copy."""
    assert GOLD.keys() == rlds.SOURCES.keys() and len(rlds.SOURCES) == 26 + 1 + 1
    rates = {"fractal20220817_data": 3, "taco_play": 15, "toto": 30, "viola": 20, "dobbe": 3.75, "droid": 15}
    rates |= {"ucsd_kitchen_dataset_converted_externally_to_rlds": 2, "bridge_dataset": 5, "bc_z": 10}
    assert {k: rlds.SOURCES[k].hz for k in rates} == rates
    blanked = {"kuka", "berkeley_cable_routing", "roboturk", "viola", "toto", "utaustin_mutex"}
    names = ("stanford_hydra", "austin_buds", "nyu_franka_play", "austin_sailor", "austin_sirius")
    blanked |= {f"{n}_dataset_converted_externally_to_rlds" for n in names}
    assert {k for k, s in rlds.SOURCES.items() if not s.informative} == blanked


@pytest.mark.parametrize("name", GOLD)
def test_golden_values_of_each_row(name, tmp_path, run):
    steps, (_, grip, other) = make(name), GOLD[name]
    write(tmp_path / "in", name, [steps])
    code, error, _ = run(tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0, error
    reader, first = LeRobotReader(tmp_path / "out"), other.get("first", 0)
    episode = reader.episode(0)
    assert episode["task"] == TASK and reader.fps == rlds.SOURCES[name].hz and len(episode["action"]) == STEPS - first
    expected = cat(other.get("move", MOVE), other.get("turn", TURN), np.array(grip, float))[first:]
    np.testing.assert_allclose(episode["action"][:, 7:14], expected, atol=1e-5)
    assert np.flatnonzero(episode["action_mask"]).tolist() == list(range(7, 14))
    want = {}
    for key, values in other.get("state", {}).items():
        names = {"xyz": "xyz", "xy": "xy", "quat": ("qx", "qy", "qz", "qw"), "gripper": ("gripper",)}[key]
        want |= {f"right_{n}": np.reshape(values, (STEPS, -1))[first:, i] for i, n in enumerate(names)}
    assert {n for n, m in zip(STATE_NAMES, episode["state_mask"], strict=True) if m} == want.keys()
    state = {n: episode["state"][:, STATE_NAMES.index(n)] for n in want}
    if turn := [n for n in want if "_q" in n]:  # one of the two quaternions of a rotation
        want |= dict(zip(turn, common.canonical(np.stack([want[n] for n in turn], 1)).T, strict=True))
    for key in want:
        np.testing.assert_allclose(state[key], want[key], atol=1e-5, err_msg=key)
    h, w = (n // 2 * 2 for n in other.get("size", SIZE))
    assert set(reader.cameras) == {"primary"} | ({"wrist"} if other.get("wrist") else set())
    for camera in reader.cameras:
        clip = reader.frames(0, camera, range(STEPS - first)).astype(int)
        assert clip.shape == (STEPS - first, h, w, 3)
        corners = clip[:, 2:5, 2:5], clip[:, 2:5, -5:-2], clip[:, -5:-2, 2:5], clip[:, -5:-2, -5:-2]
        for seen, (where, colour) in zip(corners, QUADRANTS.items(), strict=True):
            assert np.abs(seen.mean((0, 1, 2)) - colour).max() < 30, (camera, where)
        stripe = clip[:, h // 2 - 1 : h // 2 + 1].mean((1, 2, 3))
        which = ("primary", "wrist").index(camera)
        np.testing.assert_allclose(stripe, [60 * ((t + which) % 4) for t in range(first, STEPS)], atol=12)


@pytest.mark.parametrize("name", ["kuka", "language_table", "bc_z", "droid"])
def test_synthetic_files_are_what_tfds_reads(name, tmp_path):
    """The owners' decoder sees in our synthetic files what we put in, so a golden value means what it says."""
    tfds = pytest.importorskip("tensorflow_datasets")
    root, steps = tmp_path / "in", make(name)
    write(root, name, [steps])
    features = tfds.features.FeaturesDict.from_config(str(root))
    record = rlds.read_record(next(root.glob("*.tfrecord*")), 0, 1)
    read = list(features.deserialize_example_np(record)["steps"])
    ours, known = rlds.parse_example(record), rlds.read_features(root)
    for key, value in steps.items():
        top, _, rest = key.partition("/")
        theirs = [step[top][rest] if rest else step[top] for step in read]
        if isinstance(value, tuple) and value[0] == "image":
            even = np.stack(theirs)[:, : value[1][0] // 2 * 2, : value[1][1] // 2 * 2]
            np.testing.assert_array_equal([rlds.picture(b, value[1]) for b in value[2]], even)
        elif isinstance(value, list):
            assert theirs == value
        else:
            numbers = rlds.values(ours, rlds.Part(key), known, STEPS)
            np.testing.assert_array_equal(numbers, np.stack(theirs).reshape(STEPS, -1).astype(float))


def test_gripper_rules():
    g = np.array([1, 0.97, 0.6, 0.3, 0.01, 0.5, 0.7, 0.99, 0.6])  # Octo: in-between values take the later decided one
    assert rlds.open_gripper(g, "binarise").tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1]
    relative = lambda *g: rlds.open_gripper(np.array(g, float), "relative").tolist()
    assert relative(0, 0.1, 0, 1, 0) == [1, 1, 1, 0, 0] and relative(0, -0.5, 0.11, -0.1) == [0, 1, 0, 0]
    assert relative(0, 0.1, -0.1) == [1, 1, 1] and relative(1, 1, -1) == [0, 0, 1]
    for rule in ("open", "invert"):
        with pytest.raises(ValueError, match="gripper from .* not from 0"):
            rlds.open_gripper(np.array([-1.0, 1.0]), rule)


def test_rotations_at_the_poles():
    """The two angles of a quaternion that pitches by 90 degrees are not unique, the rotation is."""
    for euler in ([0.3, np.pi / 2, 0.1], [np.pi, 0, np.pi], [-np.pi, -np.pi / 2, 0]):
        q = quaternion(np.array([euler]))
        back = Rotation.from_euler("xyz", rlds.rotation(q, "quat").as_euler("xyz"))
        assert (back * Rotation.from_quat(q).inv()).magnitude().max() < 1e-6
    with pytest.raises(ValueError, match="length is off by 1"):
        rlds.rotation(np.zeros((1, 4)), "quat")


# -- what is wrong with an episode leaves it out ------------------------------------------------------------------


def short(steps: dict, n: int) -> dict:
    """The first n steps."""
    return {k: (*v[:-1], v[-1][:n]) if isinstance(v, tuple) else v[:n] for k, v in steps.items()}


def test_damaged_episodes_are_named_and_left_out(tmp_path, run):
    name, good = "fractal20220817_data", make("fractal20220817_data")
    image = ("image", SIZE, good["observation/image"][2])
    broken = [b"", *image[2][1:]], [image[2][0][:200], *image[2][1:]], [jpeg(quadrants((32, 32), 0)), *image[2][1:]]
    nan, inf, closed, quat = MOVE.copy(), cat([0, 0, np.inf, 0, 0]), cat([0, 0, 2, 0, 0]), QUAT7.copy()
    nan[3, 1], quat[2, 3:] = np.nan, 0
    bad = [
        ({O: [b""] * STEPS}, "no instruction"), ({O: [b"\xff\xfe"] * STEPS}, "utf-8"),
        ({"action/world_vector": nan}, "steps/action/world_vector has NaN or infinity"),
        ({"action/gripper_closedness_action": inf}, "gripper_closedness_action has NaN or infinity"),
        ({"observation/gripper_closed": closed}, "gripper from -1 to 1, not from 0"),
        ({"observation/base_pose_tool_reached": quat}, "quaternion's length is off by 1"),
        ({"action/world_vector": MOVE[:4]}, "steps/action/world_vector is 12 values, not 5 steps of 3"),
        ({"observation/image": ("image", SIZE, broken[0])}, "a picture of 0 bytes does not decode"),
        ({"observation/image": ("image", SIZE, broken[1])}, "200 bytes does not decode: .*[Tt]runcated"),
        ({"observation/image": ("image", SIZE, broken[2])}, "32 x 32, not 24 x 32"),
        ({"observation/image": ("image", SIZE, image[2][:3])}, "pictures {'primary': 3} for 5 steps"),
        ({"action/world_vector": ("ragged", list(MOVE[:4]) + [MOVE[4, :2]])}, "ragged: 2 to 3 values a step"),
    ]  # fmt: skip
    episodes = [good, *(good | change for change, _ in bad), short(good, 1), good]
    write(tmp_path / "in", name, episodes, shards=3)
    code, error, out = run(tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0, error
    assert LeRobotReader(tmp_path / "out").lengths.tolist() == [5, 5]
    left_out = json.loads((tmp_path / "out/meta/skipped.json").read_text())
    shards = [f"{name}: {name}-train.tfrecord-0000{k}-of-00003 record" for k in range(3)]
    assert list(left_out) == [f"{shards[k // 5]} {k % 5}" for k in range(1, len(episodes) - 1)]
    for (_, text), why in zip([*bad, ({}, "1 steps: too short")], left_out.values(), strict=True):
        assert re.search(text, why), why
    assert f"left out {len(left_out)}, listed in" in out and f"left out {shards[0]} 1: no instruction" in out
    # Nothing but bad episodes: an error, not an empty data set.
    write(tmp_path / "bad", name, episodes[1:-1])
    code, error, _ = run(tmp_path / "bad", "--out", tmp_path / "none")
    assert code == 2 and "none of 13 episodes" in error and "no instruction" in error


def test_ragged_and_compressed_features(tmp_path, run):
    """Ragged rows of one length are columns; ragged code points are a text; a zlib bomb or a stub is left out."""
    rows = make("language_table")
    codes = ("ragged", [np.array([ord(c) for c in TASK]), *[np.array([63])] * 4])
    ragged = rows | {"action": ("ragged", list(MOVE[:, :2])), "observation/instruction": codes}
    write(tmp_path / "in", "language_table", [ragged])
    assert run(tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    episode = LeRobotReader(tmp_path / "out").episode(0)
    assert episode["task"] == TASK
    np.testing.assert_allclose(episode["action"][:, 7:9], MOVE[:, :2], atol=1e-6)
    surrogate = INSTRUCTION.copy()
    surrogate[:, 0] = 0xD800
    kuka = make("kuka")
    stub = [zlib.compress(b"12"), *[zlib.compress(b"0000")] * 4]
    bomb = [zlib.compress(bytes(1 << 24)), *stub[1:]]
    for name, changed, text in (
        ("language_table", rows | {"observation/instruction": surrogate}, "surrogates not allowed"),
        ("language_table", rows | {"observation/instruction": INSTRUCTION - 1}, "chr"),
        ("kuka", kuka | {"observation/gripper_closed": stub}, "buffer size|is .* values, not 5"),
        ("kuka", kuka | {"observation/gripper_closed": bomb}, "buffer size|is .* values, not 5"),
        ("kuka", kuka | {"observation/gripper_closed": [b"raw!"] * 5}, "zlib"),
    ):
        root = tmp_path / text[:4] / str(len(list(tmp_path.iterdir())))
        write(root, name, [make(name), changed])
        assert run(root, "--out", root / "out")[0] == 0
        (why,) = json.loads((root / "out/meta/skipped.json").read_text()).values()
        assert re.search(text, why), why
    with pytest.raises(ValueError, match="OBJECT"):  # nothing pickled is executed
        rlds._tensor(b"cos\nsystem\n(S'id'\ntR.", rlds.Feature((3,), "object", "bytes"))


def test_a_second_instruction_stands_in_for_an_empty_first(tmp_path, run):
    write(tmp_path / "in", "r2d2_faceblur", [make("droid") | {L: [b""] * STEPS}])
    code, error, _ = run(tmp_path / "in", "--out", tmp_path / "out")
    assert code == 2 and "'r2d2_faceblur'; known are" in error and "--row" in error
    assert run(tmp_path / "in", "--out", tmp_path / "out", "--row", "droid")[0] == 0
    assert LeRobotReader(tmp_path / "out").episode(0)["task"] == "second"


# -- what is wrong with a file stops the conversion ---------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_damaged_files_are_refused(tmp_path, run):
    name, good = "roboturk", make("roboturk")
    root = write(tmp_path / "in", name, [good] * 25, shards=5)
    shard = root / f"{name}-train.tfrecord-00003-of-00005"
    whole = shard.read_bytes()
    shard.unlink()
    code, error, _ = run(root, "--out", tmp_path / "out")
    assert code == 2 and "1 of 5 files are missing in" in error and shard.name in error
    assert not (tmp_path / "out").exists()
    shard.write_bytes(whole[: len(whole) // 2])
    code, error, _ = run(root, "--out", tmp_path / "out", workers=2)
    assert code == 2 and f"record 2 of {shard} is cut short" in error and "keeps 17 episodes, --resume" in error
    shard.write_bytes(whole[:-200] + bytes([whole[-200] ^ 16]) + whole[-199:])
    code, error, _ = run(root, "--out", tmp_path / "out", "--resume")
    assert code == 2 and f"record 4 of {shard} is damaged: the checksum" in error and "keeps 19 episodes" in error
    shard.write_bytes(whole)
    assert run(root, "--out", tmp_path / "out", "--resume")[0] == 0
    assert LeRobotReader(tmp_path / "out").num_episodes == 25
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]  # nothing is written elsewhere


def test_foreign_and_hostile_metadata(tmp_path, run):
    name = "roboturk"
    root = write(tmp_path / "in", name, [make(name)])
    info, features = (json.loads((root / f"{k}.json").read_text()) for k in ("dataset_info", "features"))
    inner = lambda f: f["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]

    def narrow(f):
        inner(f)["action"]["featuresDict"]["features"]["world_vector"]["tensor"]["shape"]["dimensions"] = ["2"]

    def flat_image(f):
        inner(f)["observation"]["featuresDict"]["features"]["front_rgb"]["image"]["shape"]["dimensions"] = ["24", "32"]

    for which, change, text in (
        ("dataset_info", lambda i: i.update(name="my_robot"), "'my_robot'; known are .*add a row"),
        ("dataset_info", lambda i: i.update(name=["x"]), "known are"),
        ("dataset_info", lambda i: i["splits"][0].update(filepathTemplate="../../etc/{DATASET}"), "outside its folder"),
        ("dataset_info", lambda i: i["splits"][0].update(filepathTemplate="{DATASET.__class__}"), "files are missing"),
        ("dataset_info", lambda i: i["splits"][0].update(filepathTemplate="{SECRET}"), "is not TFDS's"),
        ("dataset_info", lambda i: i["splits"][0].update(shardLengths=["many"]), "is not TFDS's"),
        ("dataset_info", lambda i: i["splits"][0].update(shardLengths=["-1"]), "is not TFDS's"),
        ("dataset_info", lambda i: i.pop("splits"), "is not TFDS's"),
        ("dataset_info", lambda i: i.update(fileFormat="array_record"), "download the data set as tfrecord"),
        ("features", lambda f: inner(f).pop("action"), r"features.json lacks \['action/gripper_closedness_action'"),
        ("features", narrow, r"action/world_vector is \(2,\).*needs 3 columns"),
        ("features", flat_image, "are not .height, width, 3."),
        ("features", lambda f: f["featuresDict"]["features"].pop("steps"), "has no `steps`"),
        ("features", lambda f: f.pop("featuresDict"), "is not TFDS's"),
    ):
        for key, value in (("dataset_info", info), ("features", features)):
            (root / f"{key}.json").write_text(json.dumps(value))
        rewrite(root / f"{which}.json", change)
        code, error, _ = run(root, "--out", tmp_path / "out")
        assert code == 2 and re.search(text, error), error
        assert not (tmp_path / "out").exists()
    (root / "features.json").write_text("[]")
    assert "no JSON object" in run(root, "--out", tmp_path / "out")[1]
    (root / "features.json").write_text(json.dumps(features))
    assert "no split 'test'" in run(root, "--out", tmp_path / "out", "--split", "test")[1]
    assert "cannot read" in run(tmp_path, "--out", tmp_path / "out")[1]
    assert "--limit -1" in run(root, "--out", tmp_path / "out", "--limit", "-1")[1]
    assert "roboturk has ['primary']" in run(root, "--out", tmp_path / "out", "--cameras", "wrist")[1]


# -- interruption and processes -----------------------------------------------------------------------------------


def same_set(a: Path, b: Path) -> None:
    """Two data sets hold the same episodes in the same files, up to the codec's bytes."""
    a, b = LeRobotReader(a), LeRobotReader(b)
    assert a.stats == b.stats and a.info == b.info and a.tasks == b.tasks
    assert [r["length"] for r in a.episodes] == [r["length"] for r in b.episodes]
    for i in range(a.num_episodes):
        np.testing.assert_array_equal(a.episode(i)["action"], b.episode(i)["action"])
        np.testing.assert_array_equal(a.episode(i)["state"], b.episode(i)["state"])
        assert np.abs(a.frames(i, "primary", [1]).astype(int) - b.frames(i, "primary", [1])).mean() < 6


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """45 small episodes in 4 shards, each recognisable by its first command; every seventh has no instruction."""
    root, good = tmp_path_factory.mktemp("many") / "in", make("roboturk")
    episodes = []
    for k in range(45):
        change = {"action/world_vector": MOVE + k} | ({O: [b""] * STEPS} if k % 7 == 3 else {})
        episodes.append(good | change)
    return write(root, "roboturk", episodes, shards=4)


WHOLE = [k for k in range(45) if k % 7 != 3]


small_files = partial(LeRobotWriter, episodes_per_file=10)


@pytest.fixture(scope="module")
def undisturbed(many) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlds, "LeRobotWriter", small_files)
        patch.setattr(sys, "argv", ["rlds", str(many), "--out", str(many.parent / "one"), "--workers", "1"])
        rlds.main()
    return many.parent / "one"


def commands(root: Path) -> list[int]:
    reader = LeRobotReader(root)
    return [round(float(reader.episode(i)["action"][0, 7] - MOVE[0, 0])) for i in range(reader.num_episodes)]


def test_processes_do_not_change_the_result(many, undisturbed, tmp_path, run, monkeypatch):
    monkeypatch.setattr(rlds, "LeRobotWriter", small_files)
    assert commands(undisturbed) == WHOLE
    # A set without any state is read, described and drawn from like others.
    assert stats.statistics(LeRobotReader(undisturbed), 2).keys() == {"action", "action.stride2"}
    window = Windows([undisturbed], {"frames": View("primary", 4, 32)}, actions=3, hz=10, seed=0)[0]
    assert window["action_mask"].any() and not window["state_mask"].any()
    assert run(many, "--out", tmp_path / "three", workers=3)[0] == 0
    same_set(tmp_path / "three", undisturbed)
    files = lambda root: {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert files(tmp_path / "three") == files(undisturbed) and len(list(undisturbed.rglob("*.mp4"))) == 4


@pytest.mark.parametrize("dies_at", [0, 1, 2, 5, 9])
def test_a_kill_at_any_file_loses_no_episode_and_repeats_none(many, undisturbed, tmp_path, run, monkeypatch, dies_at):
    """The parent dies at some rename in the middle of writing a file; what is left is whole, and goes on."""
    monkeypatch.setattr(rlds, "LeRobotWriter", small_files)
    real, calls, me = os.replace, [], os.getpid()

    class Killed(BaseException):
        pass

    def dying(a, b):
        calls.append(b)
        if os.getpid() == me and len(calls) > 10 + dies_at:
            raise Killed
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            run(many, "--out", tmp_path / "out")
    assert commands(tmp_path / "out") == WHOLE[: len(commands(tmp_path / "out"))]
    code, error, _ = run(many, "--out", tmp_path / "out")
    assert code == 2 and "--resume" in error
    assert run(many, "--out", tmp_path / "out", "--resume", workers=2)[0] == 0
    assert commands(tmp_path / "out") == WHOLE
    same_set(tmp_path / "out", undisturbed)
    for name in ("sources.jsonl", "skipped.json"):
        assert (tmp_path / "out/meta" / name).read_bytes() == (undisturbed / "meta" / name).read_bytes()


def test_limit_then_the_rest(many, undisturbed, tmp_path, run):
    assert run(many, "--out", tmp_path / "out", "--limit", 12)[0] == 0
    assert commands(tmp_path / "out") == WHOLE[:12]
    assert run(many, "--out", tmp_path / "out", "--resume", "--limit", 12)[0] == 0  # nothing left to do
    assert run(many, "--out", tmp_path / "out", "--resume")[0] == 0
    assert commands(tmp_path / "out") == WHOLE
    write(tmp_path / "other", "viola", [make("viola")])
    shutil.copy(many / "features.json", tmp_path / "other")
    code, error, _ = run(tmp_path / "other", "--row", "roboturk", "--out", tmp_path / "out", "--resume")
    assert code == 2 and f"{tmp_path / 'other'}" in error and "choose another --out" in error
    code, error, _ = run(many, "--split", "train", "--out", tmp_path / "out", "--resume")
    assert code == 2 and "'split': ('all', 'train')" in error
    shutil.copytree(undisturbed, tmp_path / "foreign")
    (tmp_path / "foreign/meta/sources.jsonl").unlink()
    code, error, _ = run(many, "--out", tmp_path / "foreign", "--resume")
    assert code == 2 and f"names the sources of 0 of {len(WHOLE)} episodes" in error


REAL = rlds.load


def load_that_stalls(path, *job):
    """All but the first shard's episodes wait for a file named "go"."""
    while "-00000-" not in path.name and not Path(os.environ["GO"]).exists():
        time.sleep(0.05)
    return REAL(path, *job)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_leave_a_whole_set_and_no_processes(many, tmp_path, kind):
    """A real process with real workers, stopped in the middle of 45 episodes."""
    script = "import sys, common, test_rlds; from data import rlds; rlds.load = test_rlds.load_that_stalls\n"
    script += "rlds.LeRobotWriter = test_rlds.small_files\n"
    # A suite that a shell put into the background passes on that Ctrl-C is ignored.
    script += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += f"sys.argv = ['rlds', {str(many)!r}, '--out', {str(tmp_path / 'out')!r}, '--workers', '2']\n"
    script += "common.run_main(rlds.main)"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GO": str(tmp_path / "go")}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=env, stderr=subprocess.PIPE,
                               start_new_session=True)  # fmt: skip
    wait_for(lambda: (tmp_path / "out/meta/info.json").exists() or process.poll())
    os.killpg(process.pid, kind) if kind == signal.SIGINT else process.send_signal(kind)
    if kind == signal.SIGINT:  # the episodes in work end
        (tmp_path / "go").touch()
    error = process.communicate(timeout=100)[1].decode()
    if kind == signal.SIGINT:
        assert process.returncode == 130 and "with --resume to continue" in error and "Traceback" not in error, error

    def gone() -> bool:  # the workers, which are of the same session
        try:
            os.killpg(process.pid, 0)
            return False
        except ProcessLookupError:
            return True

    wait_for(gone)
    assert commands(tmp_path / "out") == WHOLE[:10]


def wait_for(condition) -> None:
    until = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.05)


# -- the recording ------------------------------------------------------------------------------------------------


def test_parser_agrees_with_tensorflow_datasets(bridge):
    """Every feature of every real episode, against the decoder of the format's owners."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.builder_from_directory(str(bridge)).info.features
    for path, count in rlds.shards(bridge, "train"):
        for record in (rlds.read_record(path, k, count) for k in range(count)):
            ours, theirs = rlds.parse_example(record), list(features.deserialize_example_np(record)["steps"])
            for name in ("action", "language_embedding", "reward", "is_first"):
                np.testing.assert_array_equal(ours[f"steps/{name}"], np.stack([s[name] for s in theirs]).ravel())
            seen = {k: np.stack([s["observation"][k] for s in theirs]) for k in ("state", "image_0")}
            np.testing.assert_array_equal(ours["steps/observation/state"], seen["state"].ravel())
            assert ours["steps/language_instruction"] == [s["language_instruction"] for s in theirs]
            pictures = [np.array(Image.open(io.BytesIO(b))) for b in ours["steps/observation/image_0"]]
            np.testing.assert_array_equal(pictures, seen["image_0"])


@pytest.fixture(scope="module")
def converted(bridge, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rlds") / "bridge"
    command = [sys.executable, "-m", "data.rlds", str(bridge), "--out", str(out), "--split", "train", "--cameras"]
    subprocess.run([*command, "primary", "secondary"], cwd=ROOT, check=True)
    return out


def test_bridge_converted(bridge, converted):
    """The real robot: the right columns, signs and rotation order, checked on the motion itself."""
    reader = LeRobotReader(converted)
    raw = [rlds.read_episode(path, k, n) for path, n in rlds.shards(bridge, "train") for k in range(n)]
    assert (reader.num_episodes, reader.fps, reader.lengths.tolist()) == (25, 5, [9] * 25)
    assert set(reader.cameras) == {"primary", "secondary"}
    ours, theirs, alike, alike_turn, plain, drift = [], [], [], [], [], []
    for i, example in enumerate(raw):
        episode = reader.episode(i)
        state, action = episode["state"][:, 8:16], episode["action"][:, 7:14]
        pose = example["steps/observation/state"].reshape(-1, 7)[1:]
        np.testing.assert_array_equal(state[:, :3], pose[:, :3])
        np.testing.assert_allclose(Rotation.from_quat(state[:, 3:7]).as_euler("xyz"), pose[:, 3:6], atol=1e-4)
        np.testing.assert_allclose(state[:, 7], np.clip(pose[:, 6], 0, 1))
        command = example["steps/action"].reshape(-1, 7)
        assert np.abs(command[0, :6]).max() < 1e-6  # the placeholder that is dropped
        np.testing.assert_array_equal(action[:, :6], command[1:, :6])
        assert set(action[:, 6]) <= {0, 1} and episode["task"] == example["steps/language_instruction"][0].decode()
        decided = (command[1:, 6] > 0.95) | (command[1:, 6] < 0.05)
        np.testing.assert_array_equal(action[decided, 6], command[1:][decided, 6] > 0.5)
        # Commands against what came of them one step later, converted and as recorded.
        position, _ = common.apply_action(state[:-1, :3], state[:-1, 3:7], action[:-1, :6])
        ours.append(position - state[1:, :3])
        theirs.append(pose[:-1, :3] + command[1:-1, :3] - pose[1:, :3])
        # The commands alone, integrated from the first pose over all nine steps.
        drift.append(np.abs(state[0, :3] + np.cumsum(action[:-1, :3], 0) - state[1:, :3]).max())
        moved = common.relative_action(state[:-1, :3], state[:-1, 3:7], state[1:, :3], state[1:, 3:7])
        alike += [(action[:-1, :3], moved[:, :3])]
        alike_turn += [(action[:-1, 3:6], moved[:, 3:6])]
        plain += [(action[:-1, 3:6], (np.diff(pose[:, 3:6], axis=0) + np.pi) % (2 * np.pi) - np.pi)]
    correlation = lambda pairs: np.corrcoef(*(np.concatenate(p).ravel() for p in zip(*pairs, strict=True)))[0, 1]
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    step = np.linalg.norm(ours, axis=1)
    print(f"pose + action to next pose: median {1e3 * np.median(step):.1f} mm, max {1e3 * max(step):.1f} mm; an axis: "
          f"median {1e3 * np.median(np.abs(ours)):.1f} mm, q95 {1e3 * np.quantile(np.abs(ours), 0.95):.1f} mm; "
          f"over 8 steps: median {1e3 * np.median(drift):.1f} mm, max {1e3 * max(drift):.1f} mm")  # fmt: skip
    print(f"correlation with the motion: translation {correlation(alike):.3f}, rotation {correlation(alike_turn):.3f}, "
          f"differences of Euler angles {correlation(plain):.3f}")  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # exactly as far off as the recording itself
    assert np.median(step) < 0.005 and np.quantile(np.abs(ours), 0.95) < 0.008 and max(step) < 0.02
    assert correlation(alike) > 0.85 and correlation(alike_turn) > correlation(plain) + 0.02
    first = np.array(Image.open(io.BytesIO(raw[7]["steps/observation/image_0"][3])))
    assert np.abs(reader.frames(7, "primary", [2])[0].astype(int) - first).mean() < 6  # step 3 is frame 2, upright
    sample = Windows([converted], {"frames": View("primary", 4, 64)}, 3, 10, 0)[0]
    assert sample["frames"].shape == (4, 3, 64, 64)


@pytest.mark.slow
def test_conversion_speed(tmp_path):
    """Frames a second of one core at 256 px: JPEG in, h264 out (libx264 veryfast, crf 20, a key frame every 8)."""
    rng = np.random.default_rng(0)
    noise = np.asarray(Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).resize((300, 300), Image.BICUBIC))
    clip = [jpeg(noise[t % 40 : t % 40 + 256, :256]) for t in range(60)]
    steps = {k: np.tile(v, (12,) + (1,) * (np.ndim(v) - 1)) for k, v in make("roboturk").items()
             if isinstance(v, np.ndarray)}  # fmt: skip
    steps |= {O: [TASK.encode()] * 60, "observation/front_rgb": ("image", (256, 256), clip)}
    root = write(tmp_path / "in", "roboturk", [steps] * 60)
    source, features = rlds.SOURCES["roboturk"], rlds.read_features(root)
    size, ((path, count),) = {"primary": (256, 256)}, rlds.shards(root, "all")
    start, used = time.perf_counter(), time.process_time()
    with LeRobotWriter(tmp_path / "out", 10, "x", state_names=(), cameras=size) as writer:
        for k in range(count):
            writer.add_episode(**rlds.load(path, k, count, source, features, size).data)
    wall, used = time.perf_counter() - start, time.process_time() - used
    print(f"{60 * count / wall:.0f} frames a second, {60 * count / used:.0f} a second of one core")
    assert 60 * count / used > 300
