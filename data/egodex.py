"""EgoDex to LeRobot: first-person video of two hands, with the pose of every joint (Sec. 6.1; 11.1 % of Table 6).

    python -m data.egodex datasets/egodex --out runs/data/egodex
    python lam.py --tiny --data runs/data/egodex --out runs/egodex/lam

    SOURCE/<part>/<task>/<i>.hdf5    transforms/<joint> (N, 4, 4) in metres, in a world frame of the recording's own;
                                     confidences/<joint> (N,), absent in some files; the instruction in the attributes
    SOURCE/<part>/<task>/<i>.mp4     1920 x 1080 at 30 Hz; pose i belongs to frame i

        T_world,joint(t)  --in the camera's frame at t = 0-->  48 numbers a frame (`describe`, the paper's description)
        48 numbers        --`unify`-->                         action (N-1, 42), state (N-1, 44)

The frame. "The camera frame of the window's first frame" is only known when a window is drawn, so the file holds one
frame throughout the episode, that of its first camera, and beside it the camera's pose at each step
(`observation.camera`). `data.windows` turns actions and states into the camera's frame at the start of the window
(`common.seen_from`), and the statistics are of these.

Conventions (common): action[t] is the change of pose from t to t+1, as nobody gave a command, so the last frame has
none and is left out. Rotations are taken relative first and told as Euler angles after. A hand has no gripper: those
two columns are absent, and masked. The axes of a wrist are ARKit's own (our choice).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tyro
from scipy.spatial.transform import Rotation

from common import ACTION_NAMES, STATE_NAMES, InputError, relative_action, run_main
from data.convert import ConvertArgs, Episode, convert, fitted, numbers, open_hdf5, text, transcode
from data.lerobot import LeRobotWriter

HZ = 30.0
TIPS = ("Thumb", "IndexFinger", "MiddleFinger", "RingFinger", "LittleFinger")
JOINTS = tuple(f"{s}{j}" for s in ("left", "right") for j in ("Hand", *(f"{tip}Tip" for tip in TIPS)))  # 12
HAND_ACTION = tuple(n for n in ACTION_NAMES if not n.endswith("gripper"))  # 42
HAND_STATE = tuple(n for n in STATE_NAMES if not n.endswith("gripper"))  # 44


@dataclass
class Args(ConvertArgs):
    out: str = "runs/data/egodex"
    """folder of the LeRobot data set to write"""
    min_confidence: float = 0.0
    """leave out an episode in which the mean confidence of a wrist or fingertip is lower; files without confidences
    pass, and are counted (our choice: neither EgoDex nor the paper names a threshold)"""


# --------------------------------------------------------------------------------------------------------------------
# Geometry
# --------------------------------------------------------------------------------------------------------------------


def to_6d(rotation: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) as their first two *columns* (..., 6). (Rows would be those of the transpose.)"""
    return np.concatenate([rotation[..., :, 0], rotation[..., :, 1]], -1)


def from_6d(six: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) by Gram-Schmidt from any two independent vectors (..., 6)."""
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    x = unit(six[..., :3])
    y = unit(six[..., 3:] - (x * six[..., 3:]).sum(-1, keepdims=True) * x)
    return np.stack([x, y, np.cross(x, y)], -1)


def describe(joints: dict[str, np.ndarray], frame: np.ndarray) -> np.ndarray:
    """The paper's 48 numbers per time step (N, 48), in the frame whose pose in the world is `frame` (4, 4):
    left wrist xyz, its rotation in 6D, thumb to little fingertip xyz; then the same of the right hand."""
    to_frame, parts = np.linalg.inv(frame), []
    for name in JOINTS:
        pose = to_frame @ joints[name]
        parts += [pose[:, :3, 3], to_6d(pose[:, :3, :3])] if name.endswith("Hand") else [pose[:, :3, 3]]
    return np.concatenate(parts, 1)


def unify(description: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 48 numbers (N, 48) in the unified spaces: actions (N-1, 42) in the order of HAND_ACTION, the change from each
    time step to the next, and the states (N, 44) in the order of HAND_STATE."""
    hands = description.reshape(len(description), 2, 24)
    position, tips = hands[..., :3], hands[..., 9:].reshape(len(hands), 30)
    quaternion = Rotation.from_matrix(from_6d(hands[..., 3:9]).reshape(-1, 3, 3)).as_quat()
    quaternion = quaternion.reshape(len(hands), 2, 4)
    motion = relative_action(position[:-1], quaternion[:-1], position[1:], quaternion[1:])  # (N-1, 2, 6)
    action = np.concatenate([motion.reshape(-1, 12), tips[1:] - tips[:-1]], 1)
    return action, np.concatenate([np.concatenate([position, quaternion], -1).reshape(-1, 14), tips], 1)


# --------------------------------------------------------------------------------------------------------------------
# One episode
# --------------------------------------------------------------------------------------------------------------------


def instruction(attributes: h5py.AttributeManager) -> tuple[str, list[str]]:
    """The instruction, and a note where it comes from the attribute of older files. A reversible task was recorded both
    ways, and `which_llm_description` says which of the two texts belongs to this recording."""
    key = "llm_description"
    if text(attributes, "llm_type") == "reversible" and text(attributes, "which_llm_description") == "2":
        key = "llm_description2"
    if text(attributes, key):
        return text(attributes, key), []
    if key == "llm_description" and text(attributes, "description"):
        return text(attributes, "description"), ["instruction from the old attribute `description`"]
    raise InputError(f"no instruction: the attributes are {sorted(attributes)}")


def load(path: Path, size: tuple[int, int], min_confidence: float) -> Episode:
    """One recording. Raises InputError naming what is missing, broken or below the threshold."""
    with open_hdf5(path) as file:
        task, notes = instruction(file.attrs)
        camera = numbers(file, "transforms/camera", None, 4, 4)
        joints = {name: numbers(file, f"transforms/{name}", len(camera), 4, 4) for name in JOINTS}
        if "confidences" not in file:
            notes.append("no confidences: all joints trusted")
        else:
            sure = {name: numbers(file, f"confidences/{name}", len(camera)).mean() for name in JOINTS}
            least = min(sure, key=sure.get)
            if sure[least] < min_confidence:
                raise InputError(f"mean confidence {sure[least]:.2f} of {least}, below {min_confidence:g}")
    if len(camera) < 3:
        raise InputError(f"{len(camera)} frames: need at least 3")
    for name, poses in (joints | {"camera": camera}).items():
        turn = poses[:, :3, :3]
        if np.abs(turn @ turn.mT - np.eye(3)).max() > 0.01 or (np.linalg.det(turn) < 0).any():
            raise InputError(f"transforms/{name} is no rigid motion")
    action, state = unify(describe(joints, camera[0]))
    seen = np.linalg.inv(camera[0]) @ camera[:-1]
    poses = np.concatenate([seen[:, :3, 3], Rotation.from_matrix(seen[:, :3, :3]).as_quat()], 1)
    clip = transcode(path.with_suffix(".mp4"), len(camera), size, HZ, drop_last=1)
    data: dict[str, Any] = {"frames": {"primary": clip}, "action": action, "state": state[:-1]}
    return Episode(data | {"task": task, "camera": poses}, notes)


# --------------------------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = tyro.cli(Args, prog="python -m data.egodex", description=__doc__)
    if not 0 <= args.min_confidence <= 1:
        raise InputError(f"--min-confidence {args.min_confidence:g}: give a number from 0 to 1")
    root, size = Path(args.source), fitted(1080, 1920)
    files = sorted(root.rglob("*.hdf5"))
    if not files:
        raise InputError(f"no .hdf5 files under {root}: give the folder into which EgoDex's archives were unpacked")
    jobs = {f.relative_to(root).as_posix(): (f, size, args.min_confidence) for f in files}
    cameras = {"primary": size}
    writer = LeRobotWriter(args.out, HZ, "hands", HAND_ACTION, HAND_STATE, cameras, args.resume, moving_camera=True)
    convert(jobs, load, writer, args)
    print(f"next: python lam.py --tiny --data {args.out} --out runs/egodex/lam")


if __name__ == "__main__":
    run_main(main)
