"""RLDS to LeRobot: reads TFDS tfrecords, Open X-Embodiment's format, without TensorFlow.

    python -m data.rlds datasets/bridge_dataset/1.0.0 --out runs/data/bridge
    python lam.py --tiny --data runs/data/bridge --out runs/bridge/lam

    SOURCE_DIR/dataset_info.json        splits, shards and how many episodes each holds
    SOURCE_DIR/features.json            the tree of features: shapes, types, encodings
    SOURCE_DIR/*.tfrecord-00000-of-...  one tf.train.Example per episode; "steps/..." features are flat over the steps
        record    = u64 length | u32 masked crc32c(length) | data | u32 masked crc32c(data)      (little-endian)
        Example   = features (1) { map<name, Feature> (1) };  Feature = bytes (1) | floats (2) | int64s (3)

Reads SOURCE_DIR, writes a LeRobot v3.0 data set with the unified names of `common`. What differs between data sets is
the table SOURCES below; a data set that is not in it is refused, because a guessed gripper sign or rotation is worse
than none. `--resume` goes on after the last episode that was written whole; nothing is converted twice.

Conventions (common): action[t] = commanded target at t relative to the pose measured at t, base frame, rotation as the
extrinsic xyz Euler angles of R_target R^T; gripper 1 = open, absolute; state quaternions xyzw.
"""

import io
import itertools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from common import ARM_ACTION, ARM_STATE, InputError, LeRobotWriter, run_main, write_json

# --------------------------------------------------------------------------------------------------------------------
# Constants: what each data set means
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """How to read one data set of Open X-Embodiment. Feature names are relative to "steps/"."""

    robot: str
    hz: float
    cameras: dict[str, str]
    """Our camera name -> image feature."""
    text: str
    """The instruction."""
    state: str
    """The measured pose: columns 0-2 position in metres, 3-5 extrinsic xyz Euler angles, 6 gripper, 1 = open."""
    action: str
    """The command: columns 0-2 translation in metres, 3-5 extrinsic xyz Euler angles of R_target R^T, 6 gripper."""
    gripper: Literal["binarise", "invert"]
    """binarise: above 0.95 open, below 0.05 closed, in between the next decided value; invert: 1 - clip(g, 0, 1)."""
    drop_first: bool = False
    """The first step's action is a placeholder."""


SOURCES = {
    # Keys and gripper rule: Octo's oxe_dataset_configs.py and oxe_standardization_transforms.py at 241fb35. Rotation:
    # read off the recordings. The commands follow the measured change of pose at t best (correlation of the three
    # angles 0.95, 0.81, 0.90) as R2 R1^T in the base frame, and worse as a difference of Euler angles (0.93, 0.72,
    # 0.88). They are commands: pose + action is a median 4 mm from the next measured pose, at most 19 mm.
    "bridge_dataset": Source(
        robot="widowx", hz=5, cameras={"primary": "observation/image_0"}, text="language_instruction",
        state="observation/state", action="action", gripper="binarise", drop_first=True,
    ),
}  # fmt: skip


@dataclass
class Args:
    source: Annotated[str, tyro.conf.Positional]
    """folder of the RLDS data set: the one that holds features.json and the tfrecords"""
    out: str = "runs/data/rlds"
    """folder of the LeRobot data set to write"""
    limit: int = 0
    """convert this many episodes; 0: all (our choice)"""
    split: str = "all"
    """train, val, another split of dataset_info.json, or all of them (our choice)"""
    resume: bool = False
    """go on after the last episode that --out holds"""


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


def records(path: Path) -> Iterator[bytes]:
    """The records of a tfrecord file. Raises InputError naming file and record when the file is cut short or a checksum
    does not fit."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror}; download the data set again") from None
    with file:
        for number in itertools.count():
            wrong, head = f"record {number} of {path}", file.read(12)
            if not head:
                return
            if len(head) < 12 or masked_crc32c(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise InputError(f"{wrong} is damaged: no valid header; download the file again")
            (length,) = struct.unpack("<Q", head[:8])
            body = file.read(length + 4)
            if len(body) < length + 4:
                raise InputError(f"{wrong} is cut short: {len(body)} of {length + 4} bytes; download the file again")
            if masked_crc32c(body[:-4]) != struct.unpack("<I", body[-4:])[0]:
                raise InputError(f"{wrong} is damaged: the checksum of its {length} bytes differs; download it again")
            yield body[:-4]


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
            name = bytes(pair[1]).decode()
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


def feature_shapes(root: Path) -> dict[str, tuple[int, ...]]:
    """Shape per step of every feature under "steps", by its name there: (7,) for an action, () for a text."""

    def walk(node: dict, prefix: str) -> dict[str, tuple[int, ...]]:
        if "featuresDict" in node:
            children = node["featuresDict"]["features"].items()
            return {k: v for name, child in children for k, v in walk(child, f"{prefix}{name}/").items()}
        kind = node.get("image") or node.get("tensor") or {}
        return {prefix.rstrip("/"): tuple(int(d) for d in kind.get("shape", {}).get("dimensions", []))}

    tree = _json(root / "features.json")["featuresDict"]["features"]
    if "sequence" not in tree.get("steps", {}):
        raise InputError(f"{root}/features.json has no `steps`, only {sorted(tree)}: this is no RLDS data set")
    return walk(tree["steps"]["sequence"]["feature"], "")


def shards(root: Path, split: str) -> list[tuple[Path, int]]:
    """The tfrecord files of a split (or of all), in order, and how many episodes each holds."""
    info = _json(root / "dataset_info.json")
    known = [s["name"] for s in info["splits"]]
    if split not in (*known, "all"):
        raise InputError(f"no split {split!r} in {root}: it has {known} (or --split all)")
    files = []
    for s in info["splits"]:
        lengths = [int(n) for n in s["shardLengths"]]
        template = s.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        for k, n in enumerate(lengths if split in (s["name"], "all") else []):
            parts = {"DATASET": info["name"], "SPLIT": s["name"], "FILEFORMAT": info.get("fileFormat", "tfrecord")}
            name = template.format(**parts, SHARD_INDEX=k, SHARD_X_OF_Y=f"{k:05d}-of-{len(lengths):05d}")
            files.append((root / name, n))
    return files


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"cannot read {path}: {error}; give the folder with features.json and the tfrecords, as in "
            "`python -m data.rlds datasets/bridge_dataset/1.0.0 --out runs/data/bridge`"
        ) from None


def episodes(root: Path, split: str) -> Iterator[tuple[str, dict]]:
    """("record N of FILE", features) of each episode. Raises InputError for damaged and incomplete files."""
    for path, length in shards(root, split):
        number = -1
        for number, record in enumerate(records(path)):
            try:
                yield f"record {number} of {path}", parse_example(record)
            except (ValueError, KeyError, IndexError) as error:
                raise InputError(f"record {number} of {path} is no tf.train.Example: {error}") from None
        if number + 1 != length:
            raise InputError(f"{path} holds {number + 1} episodes, dataset_info.json says {length}: download it again")


# --------------------------------------------------------------------------------------------------------------------
# One episode
# --------------------------------------------------------------------------------------------------------------------


def open_gripper(values: np.ndarray, rule: str) -> np.ndarray:
    """Gripper commands (n,) as 1 = open, 0 = closed, by a rule of `Source.gripper`."""
    if rule == "invert":
        return 1 - np.clip(values, 0, 1)
    decided, out = np.where(values > 0.95, 1.0, np.where(values < 0.05, 0.0, np.nan)), np.empty(len(values))
    later = 1.0 if values[-1] >= 0.5 else 0.0  # an end without decision: the nearer of the two
    for t in range(len(values) - 1, -1, -1):
        later = later if np.isnan(decided[t]) else decided[t]
        out[t] = later
    return out


def instruction(example: dict, source: Source) -> str:
    texts = example.get(f"steps/{source.text}") or [b""]
    return texts[0].decode().strip()


def convert(example: dict, source: Source, shapes: dict[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """An episode as `LeRobotWriter.add_episode` takes it: frames, action (n, 7), state (n, 8), task.

    Raises InputError, naming the record, when a feature is missing or does not fit."""

    def numbers(name: str) -> np.ndarray:
        width, flat = shapes[name][0], example.get(f"steps/{name}")
        if not isinstance(flat, np.ndarray) or len(flat) % width or len(flat) < 2 * width:
            have = "absent" if flat is None else f"{len(flat)} values, not several steps of {width}"
            raise InputError(f"{where}: steps/{name} is {have}; the file does not fit its features.json")
        return flat.reshape(-1, width).astype(np.float64)

    raw, command = numbers(source.state), numbers(source.action)
    n, first = len(raw), int(source.drop_first)
    images = {camera: example.get(f"steps/{key}") or [] for camera, key in source.cameras.items()}
    counts = {"state": n, "action": len(command), **{k: len(v) for k, v in images.items()}}
    if len(set(counts.values())) > 1:
        raise InputError(f"{where}: steps differ between features: {counts}")
    quaternion = Rotation.from_euler("xyz", raw[:, 3:6]).as_quat(canonical=True)
    action = np.concatenate([command[:, :6], open_gripper(command[:, 6], source.gripper)[:, None]], 1)
    state = np.concatenate([raw[:, :3], quaternion, np.clip(raw[:, 6:7], 0, 1)], 1)
    decode = lambda data: np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    try:
        frames = {camera: np.stack([decode(data) for data in files[first:]]) for camera, files in images.items()}
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: an image cannot be decoded: {error}") from None
    return {
        "frames": frames, "action": action[first:].astype(np.float32), "state": state[first:].astype(np.float32),
        "task": instruction(example, source),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = tyro.cli(Args, prog="python -m data.rlds", description=__doc__)
    root, name = Path(args.source), _json(Path(args.source) / "dataset_info.json").get("name")
    if name not in SOURCES:
        raise InputError(f"{root} is the data set {name!r}; known are {sorted(SOURCES)}: add a row to data/rlds.py")
    source, shapes = SOURCES[name], feature_shapes(root)
    keys = [source.state, source.action, source.text, *source.cameras.values()]
    if set(keys) - set(shapes):
        raise InputError(f"{root}/features.json lacks {sorted(set(keys) - set(shapes))}; it has {sorted(shapes)}")
    cameras = {camera: (shapes[key][0], shapes[key][1]) for camera, key in source.cameras.items()}
    total = sum(n for _, n in shards(root, args.split))
    seen = silent = 0
    with LeRobotWriter(args.out, source.hz, source.robot, ARM_ACTION, ARM_STATE, cameras, args.resume) as writer:
        origin = {"name": name, "split": args.split}
        note = Path(args.out) / "meta/rlds.json"
        if note.exists() and _json(note) != origin:
            raise InputError(f"{args.out} was begun from {_json(note)}, not from {origin}: choose another --out")
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, origin)
        done = writer.num_episodes
        for where, example in tqdm(episodes(root, args.split), name, total, unit="episode", mininterval=1):
            if args.limit and seen - silent >= args.limit:
                break
            seen += 1
            # Parsed but not decoded: which episodes came before is counted anew, so that there is nothing to go stale.
            if not instruction(example, source):
                silent += 1
            elif seen - silent > done:
                writer.add_episode(**convert(example, source, shapes, where))
    if not writer.num_episodes:
        raise InputError(f"{root}: none of {seen} episodes has an instruction; nothing was written")
    print(
        f"{args.out}: {writer.num_episodes} episodes ({writer.num_episodes - done} new), "
        f"{writer.episodes[-1]['dataset_to_index']} steps at {source.hz:g} Hz, cameras {cameras}; left out {silent} "
        f"episodes without an instruction\nnext: python lam.py --tiny --data {args.out} --out runs/{name}/lam"
    )


if __name__ == "__main__":
    run_main(main)
