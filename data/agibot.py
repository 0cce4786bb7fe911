"""AgiBot-World alpha to LeRobot: a wheeled robot with two arms, whose episodes carry the text of each phase.

    python -m data.agibot datasets/agibot --out runs/data/agibot
    python lam.py --tiny --data runs/data/agibot --out runs/agibot/lam

    SOURCE/task_info/task_<task>.json        a list of {episode_id, task_name, label_info: {action_config: [
                                             {start_frame, end_frame, action_text}, ...]}, ...}
    SOURCE/observations/<task>/<episode>/videos/{head,hand_left,hand_right}_color.mp4     640 x 480, 30 Hz
    SOURCE/proprio_stats/<task>/<episode>/proprio_stats.h5
        state/end/position (T, 2, 3) metres, state/end/orientation (T, 2, 4) xyzw; left, right
        state/effector/position (T, 2), about 35 (open) to 120 (closed), whatever its documentation calls it
        action/effector/position, 0 (open) to 1 (closed), and action/effector/index: see `gripper_commands`

Conventions (common): the recorded commands of the arms have gaps, so action[t] is the measured change of pose from t to
t+1, and the last frame, which has none, is left out. The gripper is the commanded one where there is a command.
Episodes with dexterous hands have no gripper and are left out. Only what was downloaded is converted.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tyro

from common import ACTION_NAMES, STATE_NAMES, InputError, read_json, relative_action, run_main
from data.convert import ConvertArgs, Episode, convert, fitted, numbers, open_hdf5, transcode
from data.lerobot import LeRobotWriter

HZ = 30.0
CAMERAS = {"primary": "head", "wrist": "hand_right", "wrist_left": "hand_left"}  # a single arm is the right one
ARMS_ACTION, ARMS_STATE = ACTION_NAMES[:14], STATE_NAMES[:16]
# Measured gripper readings: users of the data saw some 35 with open and 118 with closed fingers, the opposite of
# "open range in mm" (OpenDriveLab/AgiBot-World, issue 133).
OPEN, CLOSED = 35.0, 120.0


@dataclass
class Args(ConvertArgs):
    out: str = "runs/data/agibot"
    """folder of the LeRobot data set to write"""


# --------------------------------------------------------------------------------------------------------------------
# One episode
# --------------------------------------------------------------------------------------------------------------------


def gripper_commands(file: h5py.File, measured: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Commands (T, 2), 1 = open, and notes. `measured` (T, 2), 1 = open, fills in where nothing was commanded:

    as many commands as states    taken as they are
    none                          the opening that was measured one step later
    fewer                         `index` tells their frames (the effector's, or the joints' where that is lost);
                                  between them, what was measured
    more, or without an index     InputError: which frame a command belongs to cannot be known"""
    name, steps = "action/effector/position", len(measured)
    if name not in file or not len(file[name]):
        return np.concatenate([measured[1:], measured[-1:]]), ["no gripper commands: the measured opening was used"]
    closed = numbers(file, name, None, 2)
    if closed.min() < -0.05 or closed.max() > 1.05:
        raise InputError(f"{name} runs from {closed.min():.3g} to {closed.max():.3g}, expected 0 (open) to 1 (closed)")
    opening = 1 - np.clip(closed, 0, 1)
    if len(opening) == steps:
        return opening, []
    if len(opening) > steps:
        raise InputError(f"{len(opening)} gripper commands for {steps} states")
    for key in ("action/effector/index", "action/joint/index"):
        if key in file and len(file[key]):
            index = numbers(file, key, len(opening)).astype(np.int64)
            if index[0] < 0 or index[-1] >= steps or (np.diff(index) <= 0).any():
                raise InputError(f"{key} is no rising list of frames below {steps}")
            filled = measured.copy()
            filled[index] = opening
            return filled, ["fewer gripper commands than states: the measured opening fills the gaps"]
    raise InputError(f"{len(opening)} gripper commands for {steps} states, and no index that tells their frames")


def phases(config: list[dict], steps: int, task: str) -> list[str]:
    """The text of the phase that each of the steps belongs to; the instruction where none does."""
    out = [task] * steps
    for phase in config:
        text = str(phase.get("action_text") or "").strip()
        start, end = (min(max(int(phase[k]), 0), steps) for k in ("start_frame", "end_frame"))
        out[start:end] = [text or task] * max(0, end - start)
    return out


def load(root: Path, task_id: str, entry: dict, size: tuple[int, int]) -> Episode:
    """One episode. Raises InputError naming what is missing or broken."""
    place = f"{task_id}/{entry['episode_id']}"
    task = str(entry.get("task_name") or "").strip()
    if not task:
        raise InputError("no instruction: `task_name` is empty")
    with open_hdf5(root / "proprio_stats" / place / "proprio_stats.h5") as file:
        position = numbers(file, "state/end/position", None, 2, 3)
        steps = len(position)
        if steps < 3:
            raise InputError(f"{steps} states: need at least 3")
        quaternion = numbers(file, "state/end/orientation", steps, 2, 4)
        if (np.abs(np.linalg.norm(quaternion, axis=-1) - 1) > 0.05).any():
            raise InputError("state/end/orientation has quaternions without length 1")
        effector = file.get("state/effector/position")
        if isinstance(effector, h5py.Dataset) and effector.shape == (steps, 12):
            raise InputError("dexterous hands: no gripper")
        measured = 1 - np.clip((numbers(file, "state/effector/position", steps, 2) - OPEN) / (CLOSED - OPEN), 0, 1)
        opening, notes = gripper_commands(file, measured)
    quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    motion = relative_action(position[:-1], quaternion[:-1], position[1:], quaternion[1:])  # (T-1, 2, 6)
    action = np.concatenate([motion, opening[:-1, :, None]], -1).reshape(-1, 14)
    state = np.concatenate([position, quaternion, measured[..., None]], -1).reshape(-1, 16)
    try:
        subtasks = phases((entry.get("label_info") or {}).get("action_config") or [], steps - 1, task)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"label_info.action_config is broken: {error!r}") from None
    videos = root / "observations" / place / "videos"
    clips = {c: transcode(videos / f"{v}_color.mp4", steps, size, HZ, drop_last=1) for c, v in CAMERAS.items()}
    data: dict[str, Any] = {"frames": clips, "action": action, "state": state[:-1], "task": task, "subtasks": subtasks}
    return Episode(data, notes)


# --------------------------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------------------------


def find_jobs(root: Path, size: tuple[int, int]) -> tuple[dict[str, tuple], int]:
    """The episodes that were downloaded, and how many others task_info lists. Raises InputError for a task_info that is
    none, or whose ids are not numbers: they become parts of paths."""
    jobs, absent = {}, 0
    files = {m[1]: p for p in root.glob("task_info/*.json") if (m := re.fullmatch(r"task_([0-9]+)\.json", p.name))}
    if not files:
        raise InputError(f"no task_info/task_<number>.json in {root}: give the folder that holds task_info, "
                         "observations and proprio_stats")  # fmt: skip
    for task_id, path in sorted(files.items(), key=lambda f: int(f[0])):
        entries = read_json(path)
        ids = [
            e.get("episode_id") if isinstance(e, dict) else None
            for e in (entries if isinstance(entries, list) else [0])
        ]
        if not all(re.fullmatch("[0-9]+", str(i)) for i in ids):
            raise InputError(f"{path}: expected a list of episodes with a number as `episode_id`, got {ids[:3]}")
        for entry in sorted(entries, key=lambda e: int(e["episode_id"])):
            key = f"{task_id}/{entry['episode_id']}"
            if any((root / kind / key).is_dir() for kind in ("observations", "proprio_stats")):
                jobs[key] = (root, task_id, entry, size)
            else:
                absent += 1
    return jobs, absent


def main() -> None:
    args = tyro.cli(Args, prog="python -m data.agibot", description=__doc__)
    size = fitted(480, 640)
    jobs, absent = find_jobs(Path(args.source), size)
    print(f"{args.source}: {len(jobs)} episodes; task_info lists {absent} more, which were not downloaded")
    cameras = {camera: size for camera in CAMERAS}
    writer = LeRobotWriter(args.out, HZ, "agibot", ARMS_ACTION, ARMS_STATE, cameras, args.resume)
    convert(jobs, load, writer, args)
    print(f"next: python lam.py --tiny --data {args.out} --out runs/agibot/lam")


if __name__ == "__main__":
    run_main(main)
