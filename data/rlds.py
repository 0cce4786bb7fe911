"""RLDS to LeRobot: reads TFDS tfrecords, Open X-Embodiment's format, without TensorFlow.

    python -m data.rlds datasets/bridge_dataset/1.0.0 --out runs/data/bridge
    python -m data.rlds datasets/droid/1.0.1 --row droid --out runs/data/droid --workers 32
    python lam.py --tiny --data runs/data/bridge --out runs/bridge/lam

    SOURCE_DIR/dataset_info.json        splits, shards and how many episodes each holds
    SOURCE_DIR/features.json            the tree of features: shapes, types, encodings
    SOURCE_DIR/*.tfrecord-00000-of-...  one tf.train.Example per episode; "steps/..." features are flat over the steps
        record    = u64 length | u32 masked crc32c(length) | data | u32 masked crc32c(data)      (little-endian)
        Example   = features (1) { map<name, Feature> (1) };  Feature = bytes (1) | floats (2) | int64s (3)

Reads SOURCE_DIR, writes a LeRobot v3.0 data set with the unified names of `common` into --out, and nothing elsewhere.
What differs between data sets is the table SOURCES: the 26 sets of Open X-Embodiment in the paper's Table 6, DROID, and
the older copy of Bridge. A set without a row is refused: a guessed gripper sign or rotation is worse than none.

What is wrong with a file stops the conversion: a missing shard, a record that is cut short or fails its checksum,
another number of episodes than dataset_info.json says. What came before is kept; `--resume` goes on once the file is
whole. What is wrong with an episode leaves it out, by name and reason, in meta/skipped.json of --out: no instruction,
fewer than two steps, NaN or infinity, features of different lengths or ragged where columns must be, a picture that
does not decode or has another size, a gripper outside [0, 1], a quaternion without length 1.

Conventions (common): action[t] = commanded target at t relative to the pose measured at t, base frame, rotation as the
extrinsic xyz Euler angles of R_target R^T; gripper 1 = open, absolute; state quaternions xyzw. Pictures are stored as
they come, none is turned or mirrored; an odd last row or column is cut off, because h264 needs even sizes.
"""

import io
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from PIL import Image
from scipy.spatial.transform import Rotation

from common import ARM_ACTION, ARM_STATE, InputError, run_main
from data.convert import BrokenSource, ConvertArgs, Episode, convert
from data.lerobot import Clip, LeRobotWriter

# --------------------------------------------------------------------------------------------------------------------
# Constants: what each data set means
# --------------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Columns start:stop of a feature, all of them by default, times `scale`. `kind` says what they are:

    rotations   "xyz", "zxy": extrinsic Euler angles in this order; "quat": xyzw; "rotvec": axis times angle;
                "rotvec sum": to be added to the measured "rotvec", which gives the target's
    grippers    "open": 1 = open, as it is; "clip": the same, clipped to [0, 1]; "invert": 1 - g; "clip invert";
                "binarise": above 0.95 open, below 0.05 closed, in between the next decided value;
                "relative": above 0.1 closes, below -0.1 opens, else keeps; it starts as the first change implies"""

    feature: str
    start: int | None = None
    stop: int | None = None
    kind: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Source:
    """How to read one data set. Names of features are relative to "steps/"."""

    robot: str
    hz: float
    cameras: dict[str, str]
    """Our camera name -> image feature."""
    text: tuple[str, ...]
    """The instruction: the first of these that is not empty. Bytes, or code points up to a NUL."""
    move: Part
    """The command: translation, base frame. Axes that it lacks are never commanded: zero."""
    turn: Part | None
    """The command: rotation. None: never commanded, zero."""
    grip: Part | float
    """The command: gripper; a number for robots without one, or that never move it."""
    position: Part | None = None
    """The measured position in metres; x and y alone are possible."""
    rotation: Part | None = None
    """The measured rotation."""
    opening: Part | None = None
    """The measured gripper."""
    drop_first: bool = False
    """The first step's action is a placeholder."""
    informative: bool = True
    """False: Octo blanks the instruction as uninformative. It is kept, as OpenVLA does (our choice)."""


def _cameras(primary: str, wrist: str = "", secondary: str = "") -> dict[str, str]:
    names = {"primary": primary, "secondary": secondary, "wrist": wrist}
    return {camera: f"observation/{name}" for camera, name in names.items() if name}


LANGUAGE, NATURAL = ("language_instruction",), ("observation/natural_language_instruction",)
VECTORS = {"move": Part("action/world_vector"), "turn": Part("action/rotation_delta", kind="xyz")}
FLAT = {"move": Part("action", 0, 3), "turn": Part("action", 3, 6, "xyz")}
FLAT_QUAT = {"move": Part("action", 0, 3), "turn": Part("action", 3, 7, "quat")}
CLOSEDNESS = "action/gripper_closedness_action"

# Sources. Image keys, encodings and gripper rules: Octo's oxe_dataset_configs.py and oxe_standardization_transforms.py
# at 241fb35; droid, fmb_dataset and dobbe: OpenVLA's transforms.py. Rates: any4lerobot's openx2lerobot at 6937315.
# Documented widths, frames and state columns: the TFDS catalogue, "catalogue" below.
#
# Only Bridge has been checked on recordings. What is not certain:
# - Units. The catalogue says "delta" without a unit; a comment names the sets whose commands look like a controller's
#   scaled inputs rather than metres and radians. Quantiles per set absorb a scale, but not the mixture of both units
#   when strided actions are composed through measured poses: those sets are given without a pose.
# - Rotations of kind "xyz" are passed on as they are stored. That they are Euler angles of R_target R^T, and not
#   differences of Euler angles or another order, is documented for few sets.
# - A pose or a gripper is left out where its layout, order or sign is not documented.
SOURCES = {
    # Displacements "in base-relative frame" (catalogue). Quaternion as xyzw: usual for this set, not documented.
    "fractal20220817_data": Source(
        "google_robot", 3, _cameras("image"), NATURAL, **VECTORS, grip=Part(CLOSEDNESS, kind="relative"),
        position=Part("observation/base_pose_tool_reached", 0, 3),
        rotation=Part("observation/base_pose_tool_reached", 3, 7, "quat"),
        opening=Part("observation/gripper_closed", kind="invert"),
    ),
    # The state is zlib-compressed bytes. Quaternion as for fractal.
    "kuka": Source(
        "kuka_iiwa", 10, _cameras("image"), NATURAL, **VECTORS, grip=Part(CLOSEDNESS, kind="relative"),
        position=Part("observation/clip_function_input/base_pose_tool_reached", 0, 3),
        rotation=Part("observation/clip_function_input/base_pose_tool_reached", 3, 7, "quat"),
        opening=Part("observation/gripper_closed", kind="invert"), informative=False,
    ),
    # BridgeData V2's own release. Rotation read off the recordings: the commands follow the measured change of pose
    # best (correlation of the three angles 0.95, 0.81, 0.90) as R2 R1^T in the base frame, and worse as a difference of
    # Euler angles (0.93, 0.72, 0.88). They are commands: pose + action is a median 4 mm from the next measured pose, at
    # most 19 mm. Octo and OpenVLA put the measured change in their place; we keep the commands (our choice).
    "bridge_dataset": Source(
        "widowx", 5, _cameras("image_0", secondary="image_1"), LANGUAGE, **FLAT,
        grip=Part("action", 6, 7, "binarise"), position=Part("observation/state", 0, 3),
        rotation=Part("observation/state", 3, 6, "xyz"), opening=Part("observation/state", 6, 7, "clip"),
        drop_first=True,
    ),
    # Open X-Embodiment's older copy of Bridge. OpenVLA drops its first step too, Octo does not; it is kept here.
    "bridge": Source(
        "widowx", 5, _cameras("image"), NATURAL, **VECTORS, grip=Part("action/open_gripper", kind="open"),
        position=Part("observation/state", 0, 3), rotation=Part("observation/state", 3, 6, "xyz"),
        opening=Part("observation/state", 6, 7, "clip"),
    ),
    # The catalogue contradicts itself on the gripper ("open_gripper (-1 is open gripper, 1 is close)") and names the
    # angles yaw, pitch, roll: the sign and the order are Octo's. Controller units, as far as known.
    "taco_play": Source(
        "franka", 15, _cameras("rgb_static", "rgb_gripper"), NATURAL, move=Part("action/rel_actions_world", 0, 3),
        turn=Part("action/rel_actions_world", 3, 6, "xyz"), grip=Part("action/rel_actions_world", 6, 7, "clip"),
    ),
    # The rotation is never commanded. The pose's last four columns are undocumented; Octo: three angles, a gripper.
    "jaco_play": Source(
        "jaco2", 10, _cameras("image", "image_wrist"), NATURAL, move=Part("action/world_vector"), turn=None,
        grip=Part(CLOSEDNESS, kind="relative"), position=Part("observation/end_effector_cartesian_pos", 0, 3),
    ),
    # No gripper command: 0, as in Octo. Velocities (catalogue), their scale unknown. Octo reads robot_state as joints,
    # its authors' script wrote a pose.
    "berkeley_cable_routing": Source(
        "franka", 10, _cameras("image", "wrist45_image", "top_image"), NATURAL, **VECTORS, grip=0.0, informative=False,
    ),
    "roboturk": Source(
        "sawyer", 10, _cameras("front_rgb"), NATURAL, **VECTORS, grip=Part(CLOSEDNESS, kind="clip invert"),
        informative=False,
    ),
    # Controller units, as far as known.
    "viola": Source(
        "franka", 20, _cameras("agentview_rgb", "eye_in_hand_rgb"), NATURAL, **VECTORS,
        grip=Part(CLOSEDNESS, kind="clip invert"), informative=False,
    ),
    # Quaternion as xyzw: not documented.
    "berkeley_autolab_ur5": Source(
        "ur5", 5, _cameras("image", "hand_image"), NATURAL, **VECTORS, grip=Part(CLOSEDNESS, kind="relative"),
        position=Part("observation/robot_state", 6, 9), rotation=Part("observation/robot_state", 9, 13, "quat"),
    ),
    # Its rotation may follow another convention: look at its q01 and q99.
    "toto": Source(
        "franka", 30, _cameras("image"), NATURAL, **VECTORS, grip=Part("action/open_gripper", kind="open"),
        informative=False,
    ),
    # Pushes in the plane, without a gripper: 1. Its axes may differ from the base frame's.
    "language_table": Source(
        "xarm", 10, _cameras("rgb"), ("observation/instruction",), move=Part("action", 0, 2), turn=None, grip=1.0,
        position=Part("observation/effector_translation", 0, 2),
    ),
    "stanford_hydra_dataset_converted_externally_to_rlds": Source(
        "franka", 10, _cameras("image", "wrist_image"), LANGUAGE, **FLAT, grip=Part("action", 6, 7, "invert"),
        position=Part("observation/state", 0, 3), rotation=Part("observation/state", 7, 10, "xyz"), informative=False,
    ),
    # Controller units, as far as known.
    "austin_buds_dataset_converted_externally_to_rlds": Source(
        "franka", 20, _cameras("image", "wrist_image"), LANGUAGE, **FLAT, grip=Part("action", 6, 7, "clip invert"),
        informative=False,
    ),
    # Seven joint velocities, dxyz, drpy, gripper, terminate (catalogue).
    "nyu_franka_play_dataset_converted_externally_to_rlds": Source(
        "franka", 3, _cameras("image", secondary="image_additional_view"), LANGUAGE, move=Part("action", -8, -5),
        turn=Part("action", -5, -2, "xyz"), grip=Part("action", -2, -1, "clip"),
        position=Part("observation/state", -6, -3), rotation=Part("observation/state", -3, None, "xyz"),
        informative=False,
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": Source(
        "franka", 10, _cameras("image", "wrist_image"), LANGUAGE, **FLAT_QUAT, grip=Part("action", 7, 8, "clip invert"),
        position=Part("observation/state", 0, 3), rotation=Part("observation/state", 3, 7, "quat"),
    ),
    # "End-effector position and orientation" (catalogue): deltas, as Octo reads it, or targets? Look at q01 and q99.
    "ucsd_kitchen_dataset_converted_externally_to_rlds": Source(
        "xarm", 2, _cameras("image"), LANGUAGE, **FLAT, grip=Part("action", 6, 7, "open"),
    ),
    # Controller units, as far as known. The same for sirius.
    "austin_sailor_dataset_converted_externally_to_rlds": Source(
        "franka", 20, _cameras("image", "wrist_image"), LANGUAGE, **FLAT, grip=Part("action", 6, 7, "clip invert"),
        informative=False,
    ),
    "austin_sirius_dataset_converted_externally_to_rlds": Source(
        "franka", 20, _cameras("image", "wrist_image"), LANGUAGE, **FLAT, grip=Part("action", 6, 7, "clip invert"),
        informative=False,
    ),
    # The catalogue has no delta here, and angles "calculated with scipy as_euler("zxy")": the action is read as Octo
    # does, unverified; the state as documented.
    "dlr_edan_shared_control_converted_externally_to_rlds": Source(
        "edan", 5, _cameras("image"), LANGUAGE, **FLAT, grip=Part("action", 6, 7, "invert"),
        position=Part("observation/state", 0, 3), rotation=Part("observation/state", 3, 6, "zxy"),
    ),
    # "End-effector position, quaternion" (catalogue): deltas, as Octo reads it, or targets? Look at q01 and q99.
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": Source(
        "franka", 20, _cameras("image", "wrist_image"), LANGUAGE, **FLAT_QUAT, grip=Part("action", 7, 8, "open"),
    ),
    # Controller units, as far as known.
    "utaustin_mutex": Source(
        "franka", 20, _cameras("image", "wrist_image"), LANGUAGE, **FLAT, grip=Part("action", 6, 7, "clip invert"),
        informative=False,
    ),
    # No gripper command: the measured one, inverted as Octo does. The catalogue calls it "gripper open status", which
    # would be the other sign. The order of the pose's quaternion is not documented.
    "berkeley_fanuc_manipulation": Source(
        "fanuc", 10, _cameras("image", "wrist_image"), LANGUAGE, **FLAT, grip=Part("observation/state", 6, 7, "invert"),
        position=Part("observation/end_effector_state", 0, 3),
    ),
    # "ee pos, ee rot" (catalogue): deltas, as Octo reads it, or targets? Look at q01 and q99.
    "cmu_stretch": Source(
        "stretch", 10, _cameras("image"), LANGUAGE, **FLAT, grip=Part("action", 6, 7, "open"),
    ),
    # The first of ten waypoints. The residual is "a 3D delta to add to the current axis angle" (catalogue); Octo takes
    # it for Euler angles. Version 0.1.0; OpenVLA finds later ones broken.
    "bc_z": Source(
        "google_robot", 10, _cameras("image"), NATURAL, move=Part("action/future/xyz_residual", 0, 3),
        turn=Part("action/future/axis_angle_residual", 0, 3, "rotvec sum"),
        grip=Part("action/future/target_close", 0, 1, "invert"), position=Part("observation/present/xyz"),
        rotation=Part("observation/present/axis_angle", kind="rotvec"),
        opening=Part("observation/present/sensed_close", kind="invert"),
    ),
    # Gripper unchanged, so its sign is the set's own. Angles may be differences, with jumps at +-pi. Versions differ in
    # the pose: Euler angles or a quaternion.
    "fmb_dataset": Source(
        "franka", 10, _cameras("image_side_1", "image_wrist_1", "image_side_2"), LANGUAGE, **FLAT,
        grip=Part("action", 6, 7, "open"),
    ),
    # A hand-held gripper with one camera, at the wrist; OpenVLA calls it primary. Gripper as stored; sign unverified.
    "dobbe": Source(
        "stretch", 3.75, _cameras("wrist_image"), LANGUAGE, **FLAT, grip=Part("action", 6, 7, "open"),
    ),
    # The action feature itself is joint velocities. cartesian_velocity is the change of pose, with R_target R^T, over
    # the most that one step allows, 0.075 m and 0.15 rad (droid/robot_ik/robot_ik_solver.py): scaled back here. Where
    # dataset_info.json has another name (r2d2_faceblur, as far as known), give --row droid.
    "droid": Source(
        "franka", 15, _cameras("exterior_image_1_left", "wrist_image_left", "exterior_image_2_left"),
        ("language_instruction", "language_instruction_2", "language_instruction_3"),
        move=Part("action_dict/cartesian_velocity", 0, 3, scale=0.075),
        turn=Part("action_dict/cartesian_velocity", 3, 6, "xyz", scale=0.15),
        grip=Part("action_dict/gripper_position", kind="invert"),
        position=Part("observation/cartesian_position", 0, 3),
        rotation=Part("observation/cartesian_position", 3, 6, "xyz"),
        opening=Part("observation/gripper_position", kind="invert"),
    ),
}  # fmt: skip


@dataclass
class Args(ConvertArgs):
    out: str = "runs/data/rlds"
    """folder of the LeRobot data set to write"""
    row: str = ""
    """row of the table to read it by, where the set's own name in dataset_info.json is another"""
    split: str = "all"
    """train, val, another split of dataset_info.json, or all of them (our choice)"""
    cameras: tuple[str, ...] = ("primary", "wrist")
    """which to convert, of those that the row has; some have a `secondary` (our choice)"""


# --------------------------------------------------------------------------------------------------------------------
# tfrecord: framing and checksums
# --------------------------------------------------------------------------------------------------------------------

_LANE = 256  # bytes per lane: long enough for few rounds of joining, short enough for wide numpy operations


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """CRC-32C's byte table, and the linear map "append _LANE zero bytes" as one table per byte of the register."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    bits = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]  # (4, 256)
    zeros = table[bits & 255] ^ (bits >> 8)  # one zero byte
    for _ in range(_LANE.bit_length() - 1):
        zeros = _apply(zeros, zeros)  # done twice: twice as many
    return table, zeros


def _apply(zeros: np.ndarray, crc: np.ndarray) -> np.ndarray:
    return zeros[0][crc & 255] ^ zeros[1][(crc >> 8) & 255] ^ zeros[2][(crc >> 16) & 255] ^ zeros[3][crc >> 24]


_TABLE, _ZEROS = _tables()


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum, vectorised: a checksum is linear, so 256-byte lanes are computed side by side and joined in
    pairs. Some 100 MB/s; a byte-by-byte loop in Python would be the slowest part of the conversion."""
    lanes = max(1, -(-len(data) // _LANE))
    lanes = 1 << (lanes - 1).bit_length()
    padded = np.zeros(lanes * _LANE, np.uint8)  # zeros in front of the data leave a register of zero at zero
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start : start + 4] ^= 0xFF  # the register's initial ones, moved into the data
    crc = np.zeros(lanes, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(lanes, _LANE).T):
        crc = _TABLE[(crc ^ column) & 255] ^ (crc >> 8)
    zeros = _ZEROS
    while len(crc) > 1:
        crc, zeros = _apply(zeros, crc[0::2]) ^ crc[1::2], _apply(zeros, zeros)
    value = int(crc[0]) ^ 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_record(path: Path, number: int, count: int) -> bytes:
    """Record `number` of a tfrecord file that holds `count`. Raises BrokenSource, naming file and record, for a file
    with another number of records, one that is cut short, and a checksum that does not fit."""
    wrong, lacking = f"record {number} of {path}", f"where dataset_info.json has {count}: download both again"
    try:
        file = path.open("rb")
    except OSError as error:
        raise BrokenSource(f"cannot open {path}: {error.strerror}; download the data set again") from None
    with file:
        end = os.fstat(file.fileno()).st_size
        for before in range(number + 1):  # those before are stepped over: each has its own turn to be checked
            head = file.read(12)
            if not head:
                raise BrokenSource(f"{path} ends after {before} episodes, {lacking}")
            length = int.from_bytes(head[:8], "little")
            if before < number:
                file.seek(min(file.tell() + length + 4, end))
        if len(head) < 12 or masked_crc32c(head[:8]) != struct.unpack("<I", head[8:])[0]:
            raise BrokenSource(f"{wrong} is damaged: no valid header; download the file again")
        left = end - file.tell()
        if left < length + 4:
            raise BrokenSource(f"{wrong} is cut short: {left} of {length + 4} bytes; download the file again")
        if number == count - 1 and left > length + 4:
            raise BrokenSource(f"{path} holds more episodes than {count}, {lacking}")
        body = file.read(length + 4)
    if masked_crc32c(body[:-4]) != struct.unpack("<I", body[-4:])[0]:
        raise BrokenSource(f"{wrong} is damaged: the checksum of its {length} bytes differs; download it again")
    return body[:-4]


# --------------------------------------------------------------------------------------------------------------------
# tf.train.Example: protocol buffers by hand
# --------------------------------------------------------------------------------------------------------------------


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: an int for varints, a memoryview for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            size, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _varint(data, at)
            if wire not in (1, 2, 5) or at + size > len(data):
                raise ValueError(f"wire type {wire}, {size} bytes at {at} of {len(data)}")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def parse_example(data: bytes) -> dict[str, np.ndarray | list[bytes]]:
    """The features of a serialized tf.train.Example by name: float32 or int64 arrays, or lists of bytes. Numbers may be
    packed (one field with all) or not (a field each). Raises ValueError where it is no Example."""
    out: dict[str, np.ndarray | list[bytes]] = {}
    for _, features in _fields(memoryview(data)):
        for _, entry in _fields(features):
            pair = dict(_fields(entry))
            name = memoryview(pair[1]).tobytes().decode()
            for kind, values in _fields(pair.get(2, memoryview(b""))):
                if kind == 1:
                    out[name] = [bytes(v) for _, v in _fields(values)]
                elif kind == 2:
                    out[name] = np.frombuffer(b"".join(v for _, v in _fields(values)), "<f4")
                else:
                    numbers: list[int] = []
                    for _, v in _fields(values):
                        at = 0
                        while not isinstance(v, int) and at < len(v):
                            number, at = _varint(v, at)
                            numbers.append(_signed(number))
                        if isinstance(v, int):
                            numbers.append(_signed(v))
                    out[name] = np.array(numbers, np.int64)
    return out


# --------------------------------------------------------------------------------------------------------------------
# The data set: features.json, dataset_info.json, episodes
# --------------------------------------------------------------------------------------------------------------------


class Feature(NamedTuple):
    """What features.json says of one feature, per step: (7,) for an action, () for a text; -1 is a ragged dimension."""

    shape: tuple[int, ...]
    dtype: str
    encoding: str
    """"none", or "bytes" and "zlib" for tensors that are stored as bytes."""


def read_features(root: Path) -> dict[str, Feature]:
    """The features under "steps", by their names there."""

    def walk(node: dict, prefix: str, lead: tuple[int, ...]) -> dict[str, Feature]:
        if "featuresDict" in node:
            children = node["featuresDict"]["features"].items()
            return {k: v for name, child in children for k, v in walk(child, f"{prefix}{name}/", lead).items()}
        if "sequence" in node:
            return walk(node["sequence"]["feature"], prefix, (*lead, int(node["sequence"].get("length", -1))))
        kind = node.get("image") or node.get("tensor") or {}
        shape = tuple(int(d) for d in kind.get("shape", {}).get("dimensions", []))
        feature = Feature((*lead, *shape), kind.get("dtype", "string"), kind.get("encoding", "none"))
        return {prefix.rstrip("/"): feature}

    try:
        tree = _json(root / "features.json")["featuresDict"]["features"]
        if "sequence" not in tree.get("steps", {}):
            raise InputError(f"{root}/features.json has no `steps`, only {sorted(tree)}: this is no RLDS data set")
        return walk(tree["steps"]["sequence"]["feature"], "", ())
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{root}/features.json is not TFDS's ({error!r}): download it again") from None


def shards(root: Path, split: str) -> list[tuple[Path, int]]:
    """The tfrecord files of a split (or of all), in order, and how many episodes each holds. Raises InputError for an
    unknown split, for missing files, and for names that lead out of the folder."""
    info, files = _json(root / "dataset_info.json"), []
    try:
        known = [s["name"] for s in info["splits"]]
        if split not in (*known, "all"):
            raise InputError(f"no split {split!r} in {root}: it has {known} (or --split all)")
        if (kind := info.get("fileFormat") or "tfrecord") != "tfrecord":
            raise InputError(f"{root} holds {kind} files: download the data set as tfrecord")
        for s in info["splits"]:
            lengths = [int(n) for n in s["shardLengths"]]
            if min(lengths, default=0) < 0:
                raise ValueError(f"shardLengths {min(lengths)}")
            template = s.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
            for k, n in enumerate(lengths if split in (s["name"], "all") else []):
                parts = {"DATASET": info["name"], "SPLIT": s["name"], "FILEFORMAT": "tfrecord"}
                parts["SHARD_X_OF_Y"] = f"{k:05d}-of-{len(lengths):05d}"
                name = re.sub(r"{(\w+)}", lambda m, parts=parts: parts[m[1]], template)
                if Path(name).name != name:
                    raise InputError(f"{root}/dataset_info.json names a file outside its folder: {name!r}")
                files.append((root / name, n))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{root}/dataset_info.json is not TFDS's ({error!r}): download it again") from None
    if missing := [path.name for path, n in files if n and not path.exists()]:
        some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        raise InputError(f"{len(missing)} of {len(files)} files are missing in {root}: {some}; download them again")
    return files


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
        error: object = "no JSON object"
    except (OSError, ValueError) as e:
        error = e
    raise InputError(
        f"cannot read {path}: {error}; give the folder with features.json and the tfrecords, as in "
        "`python -m data.rlds datasets/bridge_dataset/1.0.0 --out runs/data/bridge`"
    )


def read_episode(path: Path, number: int, count: int) -> dict[str, np.ndarray | list[bytes]]:
    """The features of episode `number` of a file that holds `count`. Raises BrokenSource where they cannot be read."""
    try:
        return parse_example(read_record(path, number, count))
    except BrokenSource:
        raise
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BrokenSource(f"record {number} of {path} is no tf.train.Example: {error}") from None


# --------------------------------------------------------------------------------------------------------------------
# One episode
# --------------------------------------------------------------------------------------------------------------------


def state_names(source: Source) -> tuple[str, ...]:
    """Which columns of the state a data set has, by their unified names."""
    axes = 0 if source.position is None else (source.position.stop or 3) - (source.position.start or 0)
    return (*ARM_STATE[:axes], *ARM_STATE[3 : 7 if source.rotation else 3], *ARM_STATE[7 : 8 if source.opening else 7])


def check_row(source: Source, features: dict[str, Feature], root: Path) -> dict[str, tuple[int, int]]:
    """Height and width of each camera. Raises InputError where features.json lacks what the row needs."""
    turns = {"quat": 4}
    parts = [(source.move, 3), (source.position, 3), (source.grip, 1), (source.opening, 1)]
    parts += [(p, turns.get(p.kind, 3)) for p in (source.turn, source.rotation) if p]
    parts = [(p, width) for p, width in parts if isinstance(p, Part)]
    keys = [source.text[0], *source.cameras.values(), *(p.feature for p, _ in parts)]
    if absent := sorted(set(keys) - set(features)):
        raise InputError(f"{root}/features.json lacks {absent}; it has {sorted(features)}: another version of the set?")
    for part, width in parts:
        shape = features[part.feature].shape
        if min(shape, default=1) < 0:
            continue  # ragged: each episode is looked at
        if part.start is not None and part.stop is not None:
            width = part.stop - part.start
        have = len(range(math.prod(shape))[part.start : part.stop])
        if have != width:
            raise InputError(f"{root}/features.json: {part.feature} is {shape}, and {part} needs {width} columns of it")
    sizes = {camera: features[key].shape for camera, key in source.cameras.items()}
    if wrong := {c: s for c, s in sizes.items() if len(s) != 3 or s[2] != 3 or min(s) < 2}:
        raise InputError(f"{root}/features.json: cameras {wrong} are not (height, width, 3)")
    return {camera: (h, w) for camera, (h, w, _) in sizes.items()}


def values(example: dict, part: Part, features: dict[str, Feature], steps: int) -> np.ndarray:
    """The columns of a part, (steps, k). Raises ValueError where the episode does not have them."""
    name, feature = f"steps/{part.feature}", features[part.feature]
    flat, width = example.get(name), math.prod(feature.shape)
    if f"{name}/ragged_flat_values" in example:
        flat, lengths = example[f"{name}/ragged_flat_values"], example[f"{name}/ragged_row_lengths_0"]
        if len(set(lengths)) != 1:
            raise ValueError(f"{name} is ragged: {min(lengths)} to {max(lengths)} values a step")
        width = len(flat) // steps
    if isinstance(flat, list):
        flat = np.concatenate([_tensor(data, feature) for data in flat])
    if flat is None or not width or len(flat) != steps * width:
        have = "absent" if flat is None else f"{len(flat)} values"
        raise ValueError(f"{name} is {have}, not {steps} steps of {width}")
    out = flat.reshape(steps, width)[:, part.start : part.stop].astype(np.float64) * part.scale
    if not np.isfinite(out).all():
        raise ValueError(f"{name} has NaN or infinity")
    return out


def _tensor(data: bytes, feature: Feature) -> np.ndarray:
    """A tensor that is stored as bytes: "zlib" and "bytes" in features.json."""
    dtype = np.dtype(feature.dtype).newbyteorder("<")
    size = math.prod(feature.shape) * dtype.itemsize
    try:  # no more than is needed: a few bytes can unfold to gigabytes
        raw = data if feature.encoding == "bytes" else zlib.decompressobj().decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"zlib: {error}") from None
    return np.frombuffer(raw, dtype)


def instruction(example: dict, source: Source, steps: int) -> str:
    """The text of the first step. Numbers are code points, padded with NUL."""
    for name in source.text:
        texts = example.get(f"steps/{name}", example.get(f"steps/{name}/ragged_flat_values"))
        if isinstance(texts, np.ndarray):
            lengths = example.get(f"steps/{name}/ragged_row_lengths_0", [len(texts) // steps])
            text = "".join(map(chr, texts[: lengths[0]])).split("\0")[0]
            text.encode()  # refuses half of a surrogate pair
        else:
            text = texts[0].decode() if texts else ""
        if text.strip():
            return text.strip()
    return ""


def open_gripper(g: np.ndarray, rule: str) -> np.ndarray:
    """Gripper values (n,) as 1 = open, 0 = closed, by a rule of `Part.kind`. Raises ValueError outside [0, 1]."""
    if rule == "relative":
        change = np.where(g < -0.1, 1.0, np.where(g > 0.1, 0.0, np.nan))
        changes = change[~np.isnan(change)]
        return _hold(change, 1 - changes[0] if len(changes) else 1.0)  # closing at first means: it was open
    if rule == "binarise":
        decided = np.where(g > 0.95, 1.0, np.where(g < 0.05, 0.0, np.nan))
        return _hold(decided[::-1], float(g[-1] >= 0.5))[::-1]  # an end without decision: the nearer of the two
    if "clip" in rule:
        g = np.clip(g, 0, 1)
    g = 1 - g if "invert" in rule else g
    if g.min() < -0.05 or g.max() > 1.05:  # what LeRobotReader takes
        raise ValueError(f"gripper from {g.min():.3g} to {g.max():.3g}, not from 0 (closed) to 1 (open)")
    return g


def _hold(decided: np.ndarray, before: float) -> np.ndarray:
    """Fills each NaN with the last value before it."""
    out = np.empty(len(decided))
    for t, value in enumerate(decided):
        before = out[t] = before if np.isnan(value) else value
    return out


def rotation(columns: np.ndarray, kind: str) -> Rotation:
    """Rotations from columns (n, 3 or 4) of a kind of `Part`. Raises ValueError for a quaternion without length 1."""
    if kind == "rotvec":
        return Rotation.from_rotvec(columns)
    if kind == "quat":
        if (off := np.abs(np.linalg.norm(columns, axis=1) - 1).max()) > 0.05:
            raise ValueError(f"a quaternion's length is off by {off:.3g}")
        return Rotation.from_quat(columns)
    return Rotation.from_euler(kind, columns)


def even(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // 2 * 2, size[1] // 2 * 2


def picture(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """A JPEG or PNG as uint8 (H, W, 3), its odd last row and column cut off. Raises ValueError."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        if (image.height, image.width) != size:
            raise ValueError(f"{image.height} x {image.width}, not {size[0]} x {size[1]} as in features.json")
        height, width = even(size)
        return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:height, :width])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL: a bad PNG is bad syntax
        raise ValueError(f"a picture of {len(data)} bytes does not decode: {error}") from None


def load(
    path: Path, number: int, count: int, source: Source, features: dict[str, Feature], sizes: dict[str, tuple[int, int]]
) -> Episode:
    """Episode `number` of a file that holds `count`. Raises InputError with the reason to leave it out, and
    BrokenSource for a damaged file."""
    example = read_episode(path, number, count)
    n, first = len(example.get("steps/is_first", ())), int(source.drop_first)
    columns = lambda part: values(example, part, features, n)
    try:
        if n - first < 2:
            raise ValueError(f"{n} steps{', the first one a placeholder' * first}: too short")
        if not (task := instruction(example, source, n)):
            raise ValueError("no instruction")
        action, state = np.zeros((n, 7)), []
        move = columns(source.move)
        action[:, : move.shape[1]] = move
        if source.turn and source.turn.kind == "xyz":
            action[:, 3:6] = columns(source.turn)
        elif source.turn and source.turn.kind == "rotvec sum":
            now = columns(source.rotation)
            turn = Rotation.from_rotvec(now + columns(source.turn)) * Rotation.from_rotvec(now).inv()
            action[:, 3:6] = turn.as_euler("xyz")
        elif source.turn:
            action[:, 3:6] = rotation(columns(source.turn), source.turn.kind).as_euler("xyz")
        grip = source.grip
        action[:, 6] = open_gripper(columns(grip)[:, 0], grip.kind) if isinstance(grip, Part) else grip
        if source.position:
            state.append(columns(source.position))
        if source.rotation:
            state.append(rotation(columns(source.rotation), source.rotation.kind).as_quat())
        if source.opening:
            state.append(open_gripper(columns(source.opening)[:, 0], source.opening.kind)[:, None])
        files = {camera: example.get(f"steps/{key}", ()) for camera, key in source.cameras.items()}
        if wrong := {camera: len(f) for camera, f in files.items() if len(f) != n}:
            raise ValueError(f"pictures {wrong} for {n} steps")
        frames = {}
        for camera, size in sizes.items():
            images = (picture(data, size) for data in files[camera][first:])
            frames[camera] = Clip.encode(images, even(size), source.hz)
    except (ValueError, KeyError, IndexError, TypeError) as error:  # the last three: not of the type in features.json
        raise InputError(str(error) if isinstance(error, ValueError) else repr(error)) from None
    state = np.concatenate(state, 1) if state else np.zeros((n, 0))
    return Episode({"frames": frames, "action": action[first:], "state": state[first:], "task": task})


# --------------------------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = tyro.cli(Args, prog="python -m data.rlds", description=__doc__)
    root = Path(args.source)
    name = str(_json(root / "dataset_info.json").get("name"))
    if (row := args.row or name) not in SOURCES:
        raise InputError(f"{root} is the data set {name!r}; known are {sorted(SOURCES)}: give the one that it is as "
                         f"--row, or add a row to data/rlds.py")  # fmt: skip
    source, features, files = SOURCES[row], read_features(root), shards(root, args.split)
    source = replace(source, cameras={k: v for k, v in source.cameras.items() if k in args.cameras})
    if not source.cameras:
        raise InputError(f"--cameras {args.cameras}: {row} has {list(SOURCES[row].cameras)}")
    sizes = check_row(source, features, root)
    jobs = {
        f"{row}: {path.name} record {k}": (path, k, count, source, features, sizes)
        for path, count in files
        for k in range(count)
    }
    cameras = {camera: even(size) for camera, size in sizes.items()}
    names = ARM_ACTION, state_names(source)
    writer = LeRobotWriter(args.out, source.hz, source.robot, *names, cameras, args.resume)
    convert(jobs, load, writer, replace(args, row=row))
    vague = "" if source.informative else "Octo finds this set's instructions uninformative and blanks them\n"
    print(f"{vague}next: python lam.py --tiny --data {args.out} --out runs/{row}/lam")


if __name__ == "__main__":
    run_main(main)
