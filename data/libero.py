"""LIBERO's demonstrations (HDF5) to LeRobot: a simulated Panda, two cameras, 20 Hz.

    python -m data.libero datasets/libero/libero_spatial --out runs/data/libero_spatial
    python finetune.py --data runs/data/libero_spatial

    SOURCE/**/*_demo.hdf5
        data                 attributes problem_info (JSON with language_instruction), macros_image_convention, ...
        data/demo_<i>        actions (T, 7) in [-1, 1]
        data/demo_<i>/obs    agentview_rgb, eye_in_hand_rgb (T, H, W, 3), ee_pos (T, 3), ee_ori (T, 3) axis-angle,
                             gripper_states (T, 2)

Both kinds of files are read: the release, and its re-rendering by OpenVLA's script, which has no attributes.
- Pictures are stored upside down (OpenGL's convention) and come out turned by 180 degrees, as everybody trains and
  evaluates. A file that states another convention is refused.
- The controller (OSC_POSE) takes 1 as 0.05 m or 0.5 rad, clips beyond, and turns about the axis of the three numbers.
- Gripper: -1 (open) and +1 (closed) become 1 and 0. The measured opening is the fingers' distance over 80 mm.
- When? The release recorded pictures and poses *after* each action, so what is commanded at observation t is action
  t + 1, and the last observation has none; the re-rendering recorded them before. (A pair of the same t teaches a
  policy to name the action that it just made.)
- Steps that command nothing (all six below 1e-4, the gripper as before) are left out, as OpenVLA does: a policy learns
  to stand still from them. Failures cannot be told apart in these files; the re-rendering has dropped them.
- Positions are in LIBERO's world frame, whose axes are those of the robot's base (our choice: so are the copies in
  LeRobot's format, and the simulator's own observations).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tyro
from scipy.spatial.transform import Rotation

from common import ARM_ACTION, ARM_STATE, InputError, run_main
from data.convert import ConvertArgs, Episode, check_inside, convert, numbers, open_hdf5, text
from data.lerobot import Clip, LeRobotWriter

HZ = 20.0
CAMERAS = {"primary": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
METRES, RADIANS, OPEN_WIDTH = 0.05, 0.5, 0.08


@dataclass
class Args(ConvertArgs):
    out: str = "runs/data/libero"
    """folder of the LeRobot data set to write"""
    keep_noops: bool = False
    """keep the steps that command nothing"""


# --------------------------------------------------------------------------------------------------------------------
# One demonstration
# --------------------------------------------------------------------------------------------------------------------


def instruction(data: h5py.Group, name: str) -> tuple[str, list[str]]:
    """The instruction from the attributes, or from the file's name, as in
    KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5."""
    if "problem_info" in data.attrs:
        info = json.loads(data.attrs["problem_info"])
        words = info.get("language_instruction") if isinstance(info, dict) else None
        if isinstance(words, str) and words.strip():
            return words.strip(), []
        raise InputError("problem_info has no language_instruction")
    words = re.sub(r"^([A-Z_]+SCENE\d+_)?(.*?)(_demo)?\.hdf5$", r"\2", name)
    return words.replace("_", " "), ["no attributes: instruction from the file's name, observations before actions"]


def unify_actions(raw: np.ndarray) -> np.ndarray:
    """The controller's numbers (T, 7) as unified actions (T, 7): metres, Euler angles of the rotation that it makes,
    gripper 1 = open."""
    raw = np.clip(raw, -1, 1)
    turn = Rotation.from_rotvec(RADIANS * raw[:, 3:6])
    return np.concatenate([METRES * raw[:, :3], turn.as_euler("xyz"), 1 - np.clip(raw[:, 6:], 0, 1)], 1)


def acting(raw: np.ndarray) -> np.ndarray:
    """Which steps (T,) command something: a motion, or another gripper than the last step that was kept."""
    keep, last = np.zeros(len(raw), bool), None
    for t, action in enumerate(raw):
        keep[t] = np.abs(action[:6]).max() >= 1e-4 or (last is not None and action[6] != last)
        last = action[6] if keep[t] or last is None else last
    return keep


def pictures(obs: h5py.Group, name: str, steps: int, size: tuple[int, int]) -> h5py.Dataset:
    node = obs.get(name)
    if not isinstance(node, h5py.Dataset) or node.dtype != np.uint8 or node.shape != (steps, *size, 3):
        raise InputError(f"obs/{name} is {node}, expected uint8 {(steps, *size, 3)}")
    check_inside(obs, name)
    return node


def load(path: Path, demo: str, size: tuple[int, int], keep_noops: bool) -> Episode:
    """One demonstration. Raises InputError naming what is missing or broken."""
    with open_hdf5(path) as file:
        data = file["data"]
        task, notes = instruction(data, path.name)
        convention = text(data.attrs, "macros_image_convention")
        if convention not in ("", "opengl"):
            raise InputError(f"pictures in the convention {convention!r}; only opengl's are known to lie upside down")
        raw = numbers(data[demo], "actions", None, 7)
        obs, steps = data[demo]["obs"], len(raw)
        if np.abs(raw[:, 6]).max() > 1.001:
            raise InputError(f"gripper commands up to {np.abs(raw[:, 6]).max():.3g}, expected -1 (open) to 1 (closed)")
        position, axis = numbers(obs, "ee_pos", steps, 3), numbers(obs, "ee_ori", steps, 3)
        fingers = numbers(obs, "gripper_states", steps, 2)
        lag = int(convention != "")  # the release: observations after the action
        now = np.arange(steps - lag)
        if not keep_noops:
            now = now[acting(raw[lag:])]
            if len(now) < steps - lag:
                notes.append("steps that command nothing were left out")
        if len(now) < 2:
            raise InputError(f"{len(now)} steps that command something: need at least 2")
        quaternion = Rotation.from_rotvec(axis).as_quat()
        width = np.clip((fingers[:, :1] - fingers[:, 1:]) / OPEN_WIDTH, 0, 1)
        state = np.concatenate([position, quaternion, width], 1)
        nodes = {camera: pictures(obs, name, steps, size) for camera, name in CAMERAS.items()}
        upright = lambda node: (np.ascontiguousarray(node[t][::-1, ::-1]) for t in now)
        frames = {camera: Clip.encode(upright(node), size, HZ) for camera, node in nodes.items()}
    episode: dict[str, Any] = {"frames": frames, "action": unify_actions(raw)[now + lag], "state": state[now]}
    return Episode(episode | {"task": task}, notes)


# --------------------------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------------------------


def find_jobs(root: Path, keep_noops: bool) -> tuple[dict[str, tuple], tuple[int, int]]:
    """The demonstrations of all files, and the size of their pictures. Raises InputError where there are none, or where
    a file is no LIBERO file: leaving out a whole task must not go unnoticed."""
    found: dict[str, tuple] = {}
    size = None
    for path in sorted([root] if root.is_file() else root.rglob("*.hdf5")):
        try:
            with open_hdf5(path) as file:
                demos = [name for name in file["data"] if re.fullmatch(r"demo_\d+", name)]
                size = size or file["data"][demos[0]]["obs/agentview_rgb"].shape[1:3]
        except (OSError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise InputError(
                f"{path} is no file of LIBERO demonstrations ({error}): move it away, or download it again"
            ) from None
        name = path.name if root.is_file() else path.relative_to(root).as_posix()
        for demo in sorted(demos, key=lambda d: int(d.removeprefix("demo_"))):
            found[f"{name}/{demo}"] = (path, demo)
    if size is None:
        raise InputError(f"no .hdf5 files at {root}: give the folder of a suite of LIBERO's demonstrations")
    return {key: (*job, size, keep_noops) for key, job in found.items()}, size


def main() -> None:
    args = tyro.cli(Args, prog="python -m data.libero", description=__doc__)
    jobs, size = find_jobs(Path(args.source), args.keep_noops)
    writer = LeRobotWriter(args.out, HZ, "panda", ARM_ACTION, ARM_STATE, {c: size for c in CAMERAS}, args.resume)
    convert(jobs, load, writer, args)
    print(f"next: python finetune.py --data {args.out}")


if __name__ == "__main__":
    run_main(main)
