"""EgoDex, AgiBot and LIBERO: files written here to the letter of their formats, defects included, and converted."""

import json
import os
import sys
import time
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import common
from common import ACTION_NAMES, ARM_ACTION, STATE_NAMES, InputError, gather
from data import agibot, convert, egodex, libero
from data.lerobot import Clip, LeRobotReader, LeRobotWriter
from data.windows import View, Windows


def write_video(path: Path, n: int, fps: float = 30, size: tuple[int, int] = (36, 64), bright=lambda k: 4 * k) -> None:
    """Frame k is grey of brightness bright(k), with a white left upper corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.stack([np.full((*size, 3), bright(k), np.uint8) for k in range(n)])
    images[:, : size[0] // 3, : size[1] // 3] = 255
    path.write_bytes(Clip.encode(images, size, fps).data)


def run(module, *arguments: object, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    module.main()


def skipped(out: Path) -> dict[str, str]:
    return json.loads((out / "meta/skipped.json").read_text())


def pose(position, rotation: Rotation) -> np.ndarray:
    """Poses (n, 4, 4)."""
    out = np.tile(np.eye(4), (len(position), 1, 1))
    out[:, :3, 3], out[:, :3, :3] = position, rotation.as_matrix()
    return out


# -- EgoDex -------------------------------------------------------------------------------------------------------


def make_joints(n: int, seed: int) -> dict[str, np.ndarray]:
    """Random walks of the camera and of the twelve joints, in a world frame turned and moved at random."""
    rng = np.random.default_rng(seed)
    world = pose(rng.normal(size=(1, 3)), Rotation.random(1, random_state=seed))
    walk = lambda scale: np.cumsum(rng.normal(size=(n, 3)) * scale, 0)
    spin = lambda: Rotation.from_rotvec(walk(0.05)) * Rotation.random(random_state=rng.integers(1 << 30))
    return {name: world @ pose(walk(0.01) + rng.normal(size=3) * 0.2, spin()) for name in ("camera", *egodex.JOINTS)}


def write_egodex(path: Path, joints: dict[str, np.ndarray], confidence: float | None = 0.9, frames=None, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(joints["camera"])
    with h5py.File(path, "w") as file:
        file["camera/intrinsic"] = np.eye(3)
        for name, poses in joints.items():
            file[f"transforms/{name}"] = poses.astype(np.float32)
            if confidence is not None:
                file[f"confidences/{name}"] = np.full(n, confidence, np.float32)
        file.attrs.update(attributes or {"llm_description": "fold the towel"})
    write_video(path.with_suffix(".mp4"), n if frames is None else frames)
    return path


def test_six_numbers_are_columns():
    quarter = Rotation.from_euler("z", 90, degrees=True).as_matrix()  # x goes to y, y to -x
    np.testing.assert_allclose(egodex.to_6d(quarter), [0, 1, 0, -1, 0, 0], atol=1e-15)
    np.testing.assert_allclose(egodex.from_6d(np.array([0, 2.0, 0, -3, 5, 0])), quarter, atol=1e-15)


ANGLE = st.one_of(
    st.floats(-np.pi, np.pi), st.sampled_from([0, np.pi / 2, -np.pi / 2, np.pi, -np.pi, np.pi / 2 - 1e-9])
)


@settings(max_examples=200, deadline=None)
@given(ANGLE, ANGLE, ANGLE, st.floats(0.1, 10), st.floats(-3, 3))
@pytest.mark.filterwarnings("ignore:Gimbal lock")
def test_six_numbers_to_matrix_to_euler_and_back(roll, pitch, yaw, stretch, shear):
    """Also at the poles, pitch = +-90 degrees, where roll and yaw are one; and from vectors that are neither unit nor
    perpendicular."""
    matrix = Rotation.from_euler("xyz", [roll, pitch, yaw]).as_matrix()
    six = egodex.to_6d(matrix)
    rough = np.concatenate([stretch * six[:3], six[3:] + shear * six[:3]])
    np.testing.assert_allclose(egodex.from_6d(rough), matrix, atol=1e-12)
    euler = Rotation.from_matrix(egodex.from_6d(six)).as_euler("xyz")
    assert abs(euler[1]) <= np.pi / 2 + 1e-12
    np.testing.assert_allclose(Rotation.from_euler("xyz", euler).as_matrix(), matrix, atol=1e-7)


def test_description_and_unified_spaces_in_closed_form():
    """A camera that looks along the world's y, one metre up; the left hand moves 1 cm a frame along the world's z and
    turns about it, the right one rests. In the camera's frame (x right, y up, z back) the world's z is y."""
    n, step = 5, 0.2
    look = Rotation.from_euler("x", 90, degrees=True)  # the camera's z axis is the world's -y, its y axis the world's z
    joints = {name: pose(np.tile([0.1, 1.0, 1.0], (n, 1)), Rotation.identity(n)) for name in egodex.JOINTS}
    up = np.outer(np.arange(n), [0, 0, 0.01])
    joints["leftHand"] = pose(up + [-0.1, 2.0, 0.5], Rotation.from_rotvec(np.outer(step * np.arange(n), [0, 0, 1])))
    joints["leftThumbTip"] = pose(up + [-0.1, 2.0, 0.6], Rotation.identity(n))
    camera = pose(np.tile([0, 0, 1.0], (n, 1)), Rotation.concatenate([look] * n))
    described = egodex.describe(joints, camera[0])
    assert described.shape == (n, 48)
    np.testing.assert_allclose(described[0, :3], [-0.1, -0.5, -2.0], atol=1e-12)  # left, half a metre down, 2 m ahead
    np.testing.assert_allclose(described[0, 3:9], [1, 0, 0, 0, 0, -1], atol=1e-12)  # the columns of look^T
    np.testing.assert_allclose(described[0, 9:12], [-0.1, -0.4, -2.0], atol=1e-12)
    np.testing.assert_allclose(described[0, 24:27], [0.1, 0, -1.0], atol=1e-12)
    action, state = egodex.unify(described)
    assert action.shape == (n - 1, 42) and state.shape == (n, 44)
    named = dict(zip(egodex.HAND_ACTION, action.T, strict=True))
    expected = {"left_y": 0.01, "left_pitch": step, "left_thumb_y": 0.01}
    for name, values in named.items():
        np.testing.assert_allclose(values, expected.get(name, 0.0), atol=1e-7, err_msg=name)
    left = dict(zip(egodex.HAND_STATE, state.T, strict=True))
    turn = look.inv() * Rotation.from_rotvec(np.outer(step * np.arange(n), [0, 0, 1]))
    quaternion = np.stack([left[f"left_q{c}"] for c in "xyzw"], 1)
    np.testing.assert_allclose(common.canonical(quaternion), common.canonical(turn.as_quat()), atol=1e-12)


def test_a_window_is_told_in_the_frame_of_its_first_camera(tmp_path, monkeypatch):
    """Sec. 6.1, with a moving camera: whatever the start and the stride, the actions of a window lead from the first
    pose to the later ones, all seen from the camera at the window's start."""
    joints = make_joints(20, seed=3)
    write_egodex(tmp_path / "in/part1/fold/0.hdf5", joints)
    run(egodex, tmp_path / "in", "--out", tmp_path / "out", "--workers", 0, monkeypatch=monkeypatch)
    for hz, stride, t in ((30, 1, 7), (10, 3, 4)):
        windows = Windows([tmp_path / "out"], {}, actions=4, hz=hz, seed=0)
        sample, norm = windows.window(0, t), windows.action_norms[0]
        assert sample["action_mask"].sum(1).tolist() == [42] * 4 and sample["state_mask"].sum() == 44
        assert not sample["action_mask"][:, list(common.GRIPPERS)].any()
        action = norm.unnormalize(sample["action"]).numpy()
        state = windows.state_norms[0].unnormalize(sample["state"]).numpy()
        seen = {name: np.linalg.inv(joints["camera"][t]) @ poses for name, poses in joints.items()}
        for a, s, name in ((0, 0, "leftHand"), (7, 8, "rightHand")):
            turn = Rotation.from_quat(state[s + 3 : s + 7])
            np.testing.assert_allclose(state[s : s + 3], seen[name][t, :3, 3], atol=1e-5)
            np.testing.assert_allclose(turn.as_matrix(), seen[name][t, :3, :3], atol=1e-5)
            there = state[s : s + 3].astype(np.float64)
            for k in range(4):
                there += action[k, a : a + 3]
                turn = Rotation.from_euler("xyz", action[k, a + 3 : a + 6]) * turn
                goal = seen[name][t + (k + 1) * stride]
                np.testing.assert_allclose(there, goal[:3, 3], atol=1e-5)
                np.testing.assert_allclose(turn.as_matrix(), goal[:3, :3], atol=1e-4)
        tips = seen["rightLittleFingerTip"][:, :3, 3]
        np.testing.assert_allclose(state[43:46], tips[t], atol=1e-5)
        np.testing.assert_allclose(action[0, 41:44], tips[t + stride] - tips[t], atol=1e-5)


def test_a_resting_hand_before_a_moving_camera_rests(tmp_path, monkeypatch):
    """The camera's own motion is not the hand's."""
    joints = make_joints(12, seed=1)
    for name in egodex.JOINTS:
        joints[name][:] = joints[name][0]
    write_egodex(tmp_path / "in/0.hdf5", joints)
    run(egodex, tmp_path / "in", "--out", tmp_path / "out", "--workers", 0, monkeypatch=monkeypatch)
    windows = Windows([tmp_path / "out"], {}, actions=3, hz=10, seed=0)
    action = windows.action_norms[0].unnormalize(windows.window(0, 2)["action"])
    assert np.abs(action).max() < 1e-5
    reader = LeRobotReader(tmp_path / "out")
    assert np.abs(np.diff(reader.episode(0)["camera"][:, :3], axis=0)).max() > 0.005
    assert max(map(abs, reader.stats["action"]["max"])) < 1e-5  # statistics of what windows draw
    low, high = (np.array(reader.stats["observation.state"][k]) for k in ("min", "max"))
    assert (high - low)[:3].max() > 0.005  # seen from a camera that moves, a resting hand has many positions


def test_egodex_frames_texts_and_defects(tmp_path, monkeypatch, capsys):
    source, joints = tmp_path / "in", make_joints(10, seed=0)
    write = lambda name, joints=joints, **options: write_egodex(source / f"part1/t/{name}.hdf5", joints, **options)
    write(
        "00_plain", which_llm_description="1", llm_type="reversible", llm_description="open", llm_description2="close"
    )
    write("01_back", which_llm_description="2", llm_type="reversible", llm_description="open", llm_description2="close")
    write("02_other", which_llm_description="2", llm_type="neither", llm_description="open", llm_description2="close")
    write("03_old", confidence=None, description="old words")
    write("04_silent", llm_type="reversible")
    write("05_unsure", confidence=0.1)
    write("06_short_video", frames=9)
    write("07_no_video").with_suffix(".mp4").unlink()
    write("08_nan", joints | {"rightHand": joints["rightHand"] * np.nan})
    write("09_no_joint", {k: v for k, v in joints.items() if k != "leftThumbTip"})
    write("10_lengths", joints | {"leftHand": joints["leftHand"][:5]})
    write("11_scaled", joints | {"leftHand": joints["leftHand"] * 2})
    write("12_two_frames", {k: v[:2] for k, v in joints.items()})
    path = write("13_truncated")
    path.write_bytes(path.read_bytes()[:3000])
    write_video(write("14_slow").with_suffix(".mp4"), 10, fps=15)
    write_video(write("15_portrait").with_suffix(".mp4"), 10, size=(64, 36))
    write("16_bad_video").with_suffix(".mp4").write_bytes(b"no video")
    path = write("17_elsewhere")
    with h5py.File(path, "a") as file:
        del file["transforms/leftHand"]
        file["transforms/leftHand"] = h5py.ExternalLink(str(source / "part1/t/00_plain.hdf5"), "transforms/leftHand")
    out = tmp_path / "out"
    run(egodex, source, "--out", out, "--workers", 2, "--min-confidence", 0.5, monkeypatch=monkeypatch)
    reader = LeRobotReader(out)
    assert [reader.episode(i)["task"] for i in range(4)] == ["open", "close", "open", "old words"]
    assert reader.num_episodes == 4 and reader.lengths.tolist() == [9] * 4  # the last frame has no action
    images = reader.frames(0, "primary", range(9))
    assert images.shape == (9, 252, 448, 3)
    np.testing.assert_allclose(images[:, 200, 300].mean(1), 4 * np.arange(9), atol=3)  # pose i belongs to frame i
    assert images[:, 20, 30].min() > 230  # the corner is where it was
    reasons = skipped(out)
    for number, words in (
        ("04", "no instruction"), ("05", "mean confidence 0.10"), ("06", "cut short: 9 of 10 frames"),
        ("07", "mp4 is absent"), ("08", "transforms/rightHand has NaN"), ("09", "no numbers at transforms/leftThumb"),
        ("10", "shape"), ("11", "transforms/leftHand is no rigid motion"), ("12", "2 frames: need at least 3"),
        ("13", "cannot be read"), ("14", "runs at 15 Hz"), ("15", "another shape"), ("16", "cannot be read"),
        ("17", "in another file"),
    ):  # fmt: skip
        (reason,) = [r for key, r in reasons.items() if key.startswith(f"part1/t/{number}_")]
        assert words in reason, (number, reason)
    assert len(reasons) == 14
    text = capsys.readouterr().out
    assert "4 episodes (4 new), 36 steps at 30 Hz; left out 14" in text
    assert "1 episodes: no confidences" in text and "1 episodes: instruction from the old attribute" in text


def test_colours_of_a_source_with_another_colour_space(tmp_path):
    """Full-size recordings are BT.709, small videos BT.601 by default: a pure green must not come out lighter."""
    path = tmp_path / "green.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.colorspace = 128, 72, "yuv420p", 1
        for _ in range(3):
            rgb = np.zeros((72, 128, 3), np.uint8)
            rgb[..., 1] = 200
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = convert.transcode(path, 3, (72, 128), 30)
    (tmp_path / "out.mp4").write_bytes(clip.data)
    with av.open(str(tmp_path / "out.mp4")) as container:
        rgb = next(container.decode(video=0)).to_ndarray(format="rgb24")
    np.testing.assert_allclose(rgb[36, 64], [0, 200, 0], atol=6)


# -- AgiBot -------------------------------------------------------------------------------------------------------

PHASES = [
    {"start_frame": 0, "end_frame": 4, "action_text": "Reach for the bottle.", "skill": "Reach"},
    {"start_frame": 6, "end_frame": 99, "action_text": "Lift it.", "skill": "Lift"},
]


def write_agibot(
    root: Path, episode: object, n: int = 10, task: int = 327, config=PHASES, task_name="Pour water", **change
):
    """`change`: data sets of the h5 file in place of the usual ones; None leaves one out."""
    rng = np.random.default_rng(n)
    quaternion = Rotation.from_rotvec(rng.normal(size=(2 * n, 3))).as_quat().reshape(n, 2, 4)
    sets = {
        "state/end/position": np.cumsum(rng.normal(size=(n, 2, 3)) * 0.01, 0), "state/end/orientation": quaternion,
        "state/effector/position": np.tile([35.0, 120.0], (n, 1)), "state/joint/current_value": np.zeros((n, 14)),
        "action/effector/position": np.tile([0.0, 1.0], (n, 1)), "action/effector/index": np.arange(n),
        "action/joint/index": np.arange(n), "action/end/index": np.zeros(0, int), "timestamp": np.arange(n),
    }  # fmt: skip
    path = root / f"proprio_stats/{task}/{episode}/proprio_stats.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for name, values in (sets | change).items():
            if values is not None:
                file[name] = values
    for camera in ("head", "hand_left", "hand_right"):
        video = root / f"observations/{task}/{episode}/videos/{camera}_color.mp4"
        write_video(video, n, size=(48, 64))
    info = root / f"task_info/task_{task}.json"
    info.parent.mkdir(exist_ok=True)
    entries = json.loads(info.read_text()) if info.exists() else []
    entry = {"episode_id": episode, "task_id": task, "task_name": task_name, "label_info": {"action_config": config}}
    info.write_text(json.dumps([*entries, entry]))
    return sets | change


def test_agibot(tmp_path, monkeypatch, capsys):
    """Golden values: gripper signs, whole poses, phases, cameras."""
    source, out = tmp_path / "in", tmp_path / "out"
    sets = write_agibot(source, 648642)
    (source / "observations/327/648642/videos/head_color.mp4").unlink()
    write_video(
        source / "observations/327/648642/videos/head_color.mp4", 10, size=(48, 64), bright=lambda k: 100 + 4 * k
    )
    run(agibot, source, "--out", out, "--workers", 0, monkeypatch=monkeypatch)
    reader = LeRobotReader(out)
    assert reader.cameras == ("primary", "wrist", "wrist_left") and reader.fps == 30 and reader.lengths.tolist() == [9]
    episode = reader.episode(0)
    assert episode["action_mask"].sum() == 14 and episode["state_mask"].sum() == 16
    assert (episode["action"][:, 6] == 1).all() and (episode["action"][:, 13] == 0).all()  # commanded: 0 open, 1 closed
    assert (episode["state"][:, 7] == 1).all() and (episode["state"][:, 15] == 0).all()  # measured: 35 open, 120 closed
    for side, a, s in ((0, 0, 0), (1, 7, 8)):
        position, quaternion = sets["state/end/position"][:, side], sets["state/end/orientation"][:, side]
        here = episode["state"][:, s : s + 3], episode["state"][:, s + 3 : s + 7]
        reached = common.apply_action(*here, episode["action"][:, a : a + 6])
        np.testing.assert_allclose(reached[0], position[1:], atol=1e-6)
        error = Rotation.from_quat(reached[1]) * Rotation.from_quat(quaternion[1:]).inv()
        assert error.magnitude().max() < 1e-5
    assert episode["task"] == "Pour water"
    assert episode["subtask"] == ["Reach for the bottle."] * 4 + ["Pour water"] * 2 + ["Lift it."] * 3
    np.testing.assert_allclose(reader.frames(0, "primary", [8])[0, 300, 400].mean(), 132, atol=3)
    np.testing.assert_allclose(reader.frames(0, "wrist", [8])[0, 300, 400].mean(), 32, atol=3)
    assert reader.frames(0, "primary", [0]).shape == (1, 336, 448, 3)
    assert "lam.py" in capsys.readouterr().out
    Windows([out], {"frames": View("primary", 2, 32)}, 2, 10, 0).window(0, 1)  # statistics for 10 Hz are there


def test_agibot_gripper_commands(tmp_path, monkeypatch):
    """The defects of the commands: none, some with an index, some whose index was lost, too many, of another scale."""
    source, out, nothing = tmp_path / "in", tmp_path / "out", np.zeros(0, int)
    measured = np.tile([35.0, 120.0], (10, 1))
    measured[5:] = [120.0, 35.0]
    some = {"action/effector/position": np.tile([1.0, 0.0], (3, 1)), "state/effector/position": measured}
    write = lambda episode, **change: write_agibot(source, episode, **change)
    write(1, **some | {"action/effector/position": np.zeros((0, 2)), "action/effector/index": nothing})
    write(2, **some | {"action/effector/index": np.array([1, 2, 6])})
    write(3, **some | {"action/effector/index": nothing, "action/joint/index": np.array([0, 7, 8])})
    write(4, **some | {"action/effector/index": nothing, "action/joint/index": nothing})
    write(5, **some | {"action/effector/index": np.array([1, 2, 10])})
    write(6, **{"action/effector/position": np.zeros((11, 2))})
    write(7, **{"action/effector/position": np.full((10, 2), 118.0)})
    write(8, **{"action/effector/position": None, "state/effector/position": measured})
    write(9, **some | {"action/effector/index": np.array([1, 6, 2])})
    run(agibot, source, "--out", out, "--workers", 0, monkeypatch=monkeypatch)
    reader = LeRobotReader(out)
    left = [reader.episode(i)["action"][:, 6].tolist() for i in range(reader.num_episodes)]
    assert left[0] == left[3] == [1, 1, 1, 1, 0, 0, 0, 0, 0]  # the opening measured one step later
    assert left[1] == [1, 0, 0, 1, 1, 0, 0, 0, 0]
    assert left[2] == [0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert reader.num_episodes == 4
    reasons = skipped(out)
    for number, words in (
        (4, "no index"),
        (5, "no rising list"),
        (6, "11 gripper commands for 10"),
        (7, "expected 0 (o"),
        (9, "no rising list"),
    ):
        assert words in reasons[f"327/{number}"]


def test_agibot_defects(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    write = lambda episode, **change: write_agibot(source, episode, **change)
    write(1, config=[])
    write(2, **{"state/effector/position": np.zeros((10, 12))})
    write(3, **{"state/end/orientation": np.zeros((10, 2, 4))})
    write(4, **{"state/end/position": np.full((10, 2, 3), np.nan)})
    write(5, task_name="")
    write(6, config=[{"action_text": "no frames"}])
    write(7)
    (source / "proprio_stats/327/7/proprio_stats.h5").unlink()
    write(8)
    (source / "observations/327/8/videos/hand_left_color.mp4").unlink()
    info = source / "task_info/task_327.json"
    entries = json.loads(info.read_text())
    info.write_text(json.dumps([*entries, {"episode_id": 99}]))
    run(agibot, source, "--out", out, "--workers", 0, monkeypatch=monkeypatch)
    assert "8 episodes; task_info lists 1 more" in capsys.readouterr().out
    assert LeRobotReader(out).episode(0)["subtask"] == ["Pour water"] * 9
    reasons = skipped(out)
    for number, words in (
        (2, "dexterous"), (3, "without length 1"), (4, "NaN"), (5, "no instruction"), (6, "action_config is broken"),
        (7, "proprio_stats.h5 is absent"), (8, "hand_left_color.mp4 is absent"),
    ):  # fmt: skip
        assert words in reasons[f"327/{number}"]
    for episode in ("../../../etc", True, None, {}):
        info.write_text(json.dumps([{"episode_id": episode}]))
        with pytest.raises(InputError, match="a number as `episode_id`"):
            agibot.find_jobs(source, (2, 2))
    info.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        agibot.find_jobs(source, (2, 2))
    with pytest.raises(InputError, match="no task_info"):
        agibot.find_jobs(tmp_path, (2, 2))


# -- LIBERO -------------------------------------------------------------------------------------------------------


def write_libero(path: Path, demos: list[int], n: int = 8, release: bool = True, size: int = 16, **change) -> dict:
    """Demo i is i steps longer. Pictures: white in the left upper corner as stored, brightness tells the frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if release:
            data.attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
            data.attrs["macros_image_convention"] = change.get("convention", "opengl")
            data.attrs["env_args"] = "{}"
        for demo in demos:
            steps, rng = n + demo, np.random.default_rng(demo)
            images = (
                np.full((steps, size, size, 3), 10, np.uint8)
                + 8 * np.arange(steps, dtype=np.uint8)[:, None, None, None]
            )
            images[:, : size // 4, : size // 4] = 255
            actions = np.concatenate([rng.uniform(-1, 1, (steps, 6)), rng.choice([-1.0, 1.0], (steps, 1))], 1)
            sets = {
                "actions": actions, "states": np.zeros((steps, 92)), "obs/agentview_rgb": images,
                "obs/eye_in_hand_rgb": images, "obs/ee_pos": rng.normal(size=(steps, 3)),
                "obs/ee_ori": rng.normal(size=(steps, 3)), "obs/gripper_states": np.tile([0.04, -0.04], (steps, 1)),
            } | {k: v for k, v in change.items() if "convention" != k}  # fmt: skip
            for name, values in sets.items():
                data[f"demo_{demo}/{name}"] = values
    return sets


@pytest.mark.parametrize("release", [True, False])
def test_libero(tmp_path, monkeypatch, release):
    """Golden values: scales, axis-angle, gripper sign, orientation of the picture, and which action belongs to it."""
    source, out = tmp_path / "in", tmp_path / "out"
    raw = np.zeros((8, 7))
    raw[:, :6] = [1.0, -0.5, 2.0, 0.4, 0.8, -0.2]  # the controller clips the 2
    raw[:, 0] = np.linspace(0.1, 0.8, 8)  # tells the steps apart
    raw[:, 6] = [-1, -1, -1, 1, 1, 1, -1, -1]
    sets = write_libero(source / "s/KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", [0], release=release, actions=raw)
    run(libero, source, "--out", out, "--workers", 0, monkeypatch=monkeypatch)
    reader = LeRobotReader(out)
    lag = int(release)
    assert reader.fps == 20 and reader.lengths.tolist() == [8 - lag]
    episode = reader.episode(0)
    assert episode["task"] == ("open the drawer" if release else "turn on the stove")
    action = gather(episode["action"], ARM_ACTION, ACTION_NAMES)
    np.testing.assert_allclose(action[:, 0], 0.05 * raw[lag:, 0], atol=1e-7)  # the release: pictures after the action
    np.testing.assert_allclose(action[:, 1:3], [[-0.025, 0.05]] * (8 - lag), atol=1e-7)
    turn = Rotation.from_euler("xyz", action[0, 3:6])
    np.testing.assert_allclose(turn.as_rotvec(), [0.2, 0.4, -0.1], atol=1e-6)
    assert action[:, 6].tolist() == [1, 1, 1, 0, 0, 0, 1, 1][lag:]
    state = episode["state"][:, 8:16]
    np.testing.assert_allclose(state[:, :3], sets["obs/ee_pos"][: 8 - lag], atol=1e-6)
    quaternion = common.canonical(Rotation.from_rotvec(sets["obs/ee_ori"][: 8 - lag]).as_quat())
    np.testing.assert_allclose(state[:, 3:7], quaternion, atol=1e-6)
    assert (state[:, 7] == 1).all()  # fingers 80 mm apart
    for camera in ("primary", "wrist"):
        images = reader.frames(0, camera, range(8 - lag)).astype(float)
        assert images[:, -2, -2].min() > 220 and images[:, 1, 1].max() < 100  # turned by 180 degrees
        assert images[:, -2, 1].max() < 100 and images[:, 1, -2].max() < 100
        np.testing.assert_allclose(images[:, 4, 4].mean(1), 10 + 8 * np.arange(8 - lag), atol=4)


def test_libero_leaves_out_what_commands_nothing(tmp_path, monkeypatch):
    raw = np.zeros((10, 7))
    raw[:, 6] = [-1, -1, -1, -1, 1, 1, 1, 1, -1, -1]
    raw[[2, 6], 0] = 0.5
    write_libero(tmp_path / "in/a_demo.hdf5", [0], n=10, actions=raw)
    run(libero, tmp_path / "in", "--out", tmp_path / "out", "--workers", 0, monkeypatch=monkeypatch)
    episode = LeRobotReader(tmp_path / "out").episode(0)
    assert episode["action"][:, 7].tolist() == pytest.approx([0.025, 0, 0.025, 0])  # two moves, two gripper commands
    assert episode["action"][:, 13].tolist() == [1, 0, 0, 1]
    arguments = [tmp_path / "in", "--out", tmp_path / "all", "--workers", 0, "--keep-noops"]
    run(libero, *arguments, monkeypatch=monkeypatch)
    assert LeRobotReader(tmp_path / "all").lengths.tolist() == [9]


def test_a_few_bytes_that_stand_for_terabytes(tmp_path):
    with h5py.File(tmp_path / "bomb.hdf5", "w") as file:
        file.create_dataset("x", (10**10, 7), "f8", chunks=(1000, 7))
        with pytest.raises(InputError, match="x has 70000000000 values, more than an episode can"):
            convert.numbers(file, "x", None, 7)


@pytest.mark.parametrize("value", ["nan", "-0.1", "1.5"])
def test_a_confidence_is_a_share(tmp_path, monkeypatch, value):
    with pytest.raises(InputError, match="--min-confidence .*from 0 to 1"):
        run(egodex, tmp_path, "--out", tmp_path / "out", "--min-confidence", value, monkeypatch=monkeypatch)


def test_libero_refuses(tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out"
    write_libero(source / "a_demo.hdf5", [0])
    write_libero(source / "b_demo.hdf5", [0], convention="opencv")
    write_libero(source / "c_demo.hdf5", [0], actions=np.full((8, 7), 3.0))
    write_libero(source / "d_demo.hdf5", [0], actions=np.zeros((8, 7)))
    write_libero(source / "e_demo.hdf5", [0], **{"obs/eye_in_hand_rgb": np.zeros((7, 16, 16, 3), np.uint8)})
    write_libero(source / "f_demo.hdf5", [0], **{"obs/ee_pos": np.full((8, 3), np.nan)})
    with h5py.File(source / "f_demo.hdf5", "a") as file:
        file["data"].attrs["problem_info"] = "{}"
    write_libero(source / "g_demo.hdf5", [0], **{"obs/ee_pos": np.full((8, 3), np.nan)})
    run(libero, source, "--out", out, "--workers", 0, monkeypatch=monkeypatch)
    reasons = skipped(out)
    for name, words in (
        ("b", "convention 'opencv'"), ("c", "gripper commands up to 3"), ("d", "0 steps that command something"),
        ("e", "obs/eye_in_hand_rgb"), ("f", "no language_instruction"), ("g", "ee_pos has NaN"),
    ):  # fmt: skip
        assert words in reasons[f"{name}_demo.hdf5/demo_0"]
    assert LeRobotReader(out).num_episodes == 1
    (source / "h_demo.hdf5").write_bytes(b"pickle")
    with pytest.raises(InputError, match="h_demo.hdf5 is no file of LIBERO demonstrations"):
        libero.find_jobs(source, False)
    with pytest.raises(InputError, match="no .hdf5 files"):
        libero.find_jobs(tmp_path / "nowhere", False)
    with h5py.File(source / "h_demo.hdf5", "w") as file:
        file["data"] = 3
    with pytest.raises(InputError, match="h_demo.hdf5 is no file of LIBERO demonstrations"):
        libero.find_jobs(source, False)
    (source / "h_demo.hdf5").unlink()
    (source / "a_demo.hdf5").unlink()
    with pytest.raises(InputError, match="none of 6 episodes .* could be converted; the first, .*opencv"):
        run(libero, source, "--out", tmp_path / "none", "--workers", 0, monkeypatch=monkeypatch)


# -- the loop: parallel, resumed, killed --------------------------------------------------------------------------


def make_writer(out: Path, resume: bool = False) -> LeRobotWriter:
    cameras = {"primary": (16, 16), "wrist": (16, 16)}
    return LeRobotWriter(out, 20, "panda", cameras=cameras, resume=resume, episodes_per_file=2)


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> dict[str, tuple]:
    source = tmp_path_factory.mktemp("libero")
    write_libero(source / "b_demo.hdf5", [0, 2, 10])
    write_libero(source / "c_demo.hdf5", [1, 3])
    write_libero(source / "d_demo.hdf5", [0, 1], actions=np.zeros((8, 7)))  # refused
    write_libero(source / "e_demo.hdf5", [4])
    return libero.find_jobs(source, False)[0]


def arguments(**options) -> convert.ConvertArgs:
    return convert.ConvertArgs(source="there", out="x", **{"workers": 0} | options)


def contents(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, demos) -> Path:
    out = tmp_path_factory.mktemp("whole") / "set"
    convert.convert(demos, libero.load, make_writer(out), arguments())
    return out


def test_order_and_provenance(whole, demos):
    lines = [json.loads(line) for line in (whole / "meta/sources.jsonl").read_text().splitlines()]
    assert lines == [key for key in demos if not key.startswith("d_")]
    assert lines[:3] == ["b_demo.hdf5/demo_0", "b_demo.hdf5/demo_2", "b_demo.hdf5/demo_10"]  # not 0, 10, 2
    assert LeRobotReader(whole).lengths.tolist() == [7, 9, 17, 8, 10, 11]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_files(tmp_path, demos, whole, workers):
    convert.convert(demos, libero.load, make_writer(tmp_path / "set"), arguments(workers=workers))
    assert contents(tmp_path / "set") == contents(whole)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("dies_at", range(1, 8))
def test_killed_and_resumed(tmp_path, demos, whole, dies_at, monkeypatch):
    """The process dies while it loads the n-th episode, without a chance to save. Resumed, it does nothing again that
    is in the data set, and the result is that of an undisturbed run."""
    loaded = []

    def load(*job):
        loaded.append(job[:2])
        if len(loaded) == dies_at:
            raise Killed
        return libero.load(*job)

    with monkeypatch.context() as patch:
        patch.setattr(LeRobotWriter, "__exit__", lambda *_: None)
        with pytest.raises(Killed):
            convert.convert(demos, load, make_writer(tmp_path), arguments())
    saved = LeRobotReader(tmp_path).num_episodes if (tmp_path / "meta/info.json").exists() else 0
    assert saved >= dies_at // 2 * 2 - 2 - 2 * (dies_at > 6)
    before = [(j[0], j[1]) for j in list(demos.values())[:saved]]
    loaded.clear()
    dies_at = 0
    convert.convert(demos, load, make_writer(tmp_path, resume=True), arguments(resume=True))
    assert not set(before) & set(loaded)
    assert (tmp_path / "meta/sources.jsonl").read_bytes() == (whole / "meta/sources.jsonl").read_bytes()
    ours, theirs = LeRobotReader(tmp_path), LeRobotReader(whole)
    assert ours.lengths.tolist() == theirs.lengths.tolist() and ours.stats == theirs.stats
    for i in range(ours.num_episodes):
        np.testing.assert_array_equal(ours.episode(i)["action"], theirs.episode(i)["action"])
        np.testing.assert_array_equal(ours.frames(i, "wrist", [0, 6]), theirs.frames(i, "wrist", [0, 6]))


def test_interrupted_with_ctrl_c_keeps_what_it_has(tmp_path, demos, whole):
    def load(*job):
        if job[0].name == "c_demo.hdf5":
            raise KeyboardInterrupt
        return libero.load(*job)

    with pytest.raises(KeyboardInterrupt):
        convert.convert(demos, load, make_writer(tmp_path), arguments())
    assert LeRobotReader(tmp_path).num_episodes == 3  # two in a full file, one in another
    convert.convert(demos, libero.load, make_writer(tmp_path, resume=True), arguments(resume=True))
    assert LeRobotReader(tmp_path).lengths.tolist() == LeRobotReader(whole).lengths.tolist()


def test_resume_finds_what_is_new_and_what_was_repaired(tmp_path, demos, capsys):
    """Files that came later are converted wherever they sort; refused ones are tried again; nothing twice."""
    later = dict(list(demos.items())[2:])
    convert.convert(later, libero.load, make_writer(tmp_path / "x"), arguments())
    convert.convert(demos, libero.load, make_writer(tmp_path / "x", resume=True), arguments(resume=True))
    lines = [json.loads(line) for line in (tmp_path / "x/meta/sources.jsonl").read_text().splitlines()]
    assert lines[4:] == list(demos)[:2] and len(lines) == 6
    convert.convert(demos, libero.load, make_writer(tmp_path / "x", resume=True), arguments(resume=True))
    assert "6 episodes (0 new)" in capsys.readouterr().out and LeRobotReader(tmp_path / "x").num_episodes == 6
    (tmp_path / "x/meta/sources.jsonl").unlink()
    with pytest.raises(InputError, match="names the sources of 0 of 6 episodes"):
        convert.convert(demos, libero.load, make_writer(tmp_path / "x", resume=True), arguments(resume=True))


@pytest.mark.parametrize("options, text", [
    ({"source": "elsewhere"}, "source.*elsewhere"), ({"keep_noops": True}, "keep_noops.*True"),
])  # fmt: skip
def test_resume_with_another_source_or_other_options_is_refused(tmp_path, demos, options, text):
    """Their demonstrations have the same names, and would pass for done."""
    given = lambda **kw: libero.Args(**{"source": "there", "out": "x", "workers": 0} | kw)
    convert.convert(demos, libero.load, make_writer(tmp_path / "x"), given(limit=2))
    before = contents(tmp_path / "x")
    with pytest.raises(InputError, match=f"{text}.*: choose another --out"):
        convert.convert(demos, libero.load, make_writer(tmp_path / "x", resume=True), given(resume=True, **options))
    assert contents(tmp_path / "x") == before
    same = given(source=os.path.abspath("there"), limit=4, workers=2, resume=True, out="y")
    convert.convert(demos, libero.load, make_writer(tmp_path / "x", resume=True), same)
    assert LeRobotReader(tmp_path / "x").num_episodes == 4
    (tmp_path / "x/meta/conversion.json").unlink()
    with pytest.raises(InputError, match="choose another --out"):
        convert.convert(demos, libero.load, make_writer(tmp_path / "x", resume=True), same)


def test_an_output_without_episodes_is_free(tmp_path, demos):
    """What a first attempt with a wrong option left behind."""
    bad = {key: job for key, job in demos.items() if key.startswith("d_")}
    with pytest.raises(InputError, match="none of 2 episodes"):
        convert.convert(bad, libero.load, make_writer(tmp_path / "x"), arguments())
    other = convert.ConvertArgs(source="elsewhere", out="x", workers=0)
    convert.convert(demos, libero.load, make_writer(tmp_path / "x", resume=True), other)


def test_what_the_writer_refuses_is_left_out(tmp_path, demos):
    def load(*job):
        episode = libero.load(*job)
        if job[0].name == "c_demo.hdf5":
            episode.data["action"][0] = np.nan
        return episode

    convert.convert(demos, load, make_writer(tmp_path), arguments())
    lines = [json.loads(line) for line in (tmp_path / "meta/sources.jsonl").read_text().splitlines()]
    assert lines == [key for key in demos if key[0] in "be"] and LeRobotReader(tmp_path).num_episodes == len(lines)
    assert "NaN" in skipped(tmp_path)["c_demo.hdf5/demo_1"]


def test_limit(tmp_path, demos):
    convert.convert(demos, libero.load, make_writer(tmp_path), arguments(limit=2, workers=2))
    assert LeRobotReader(tmp_path).num_episodes == 2
    convert.convert(demos, libero.load, make_writer(tmp_path, resume=True), arguments(limit=2, resume=True))
    assert LeRobotReader(tmp_path).num_episodes == 2
    with pytest.raises(InputError, match="--workers -1"):
        convert.convert(demos, libero.load, make_writer(tmp_path, resume=True), arguments(workers=-1))


def _die(*_):
    os._exit(9)


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path, demos):
    with pytest.raises(InputError, match="a worker died at b_demo.hdf5/demo_0 or soon after .*--resume"):
        convert.convert(demos, _die, make_writer(tmp_path), arguments(workers=2))


def test_workers_end_with_a_killed_parent(tmp_path):
    """Workers of a process that was killed do not stay behind."""
    pids = tmp_path / "pids"

    def load(k):
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        raise InputError("no")

    if (child := os.fork()) == 0:
        globals()["_load"] = load
        for _ in convert._ahead({str(k): (k,) for k in range(1000)}, _call, 2):
            pass
        os._exit(0)
    while not (pids.exists() and len(set(pids.read_text().split())) == 2):
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    alive = lambda pid: Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
    deadline = time.time() + 10
    while any(alive(p) for p in set(pids.read_text().split())) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(alive(p) for p in set(pids.read_text().split()))


def _call(*job):
    return globals()["_load"](*job)


def test_writes_nothing_outside_its_folder(tmp_path, monkeypatch):
    """Names in the source never become names of what is written."""
    source = tmp_path / "in"
    for k, name in enumerate(("..%2f..", "a b\n'\"$(x)", "-rf", "part{0}")):
        write_egodex(source / name / "0.hdf5", make_joints(5, k))
    before = contents(source)
    run(egodex, source, "--out", tmp_path / "out/set", "--workers", 0, monkeypatch=monkeypatch)
    assert contents(source) == before and sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert LeRobotReader(tmp_path / "out/set").num_episodes == 4
    lines = (tmp_path / "out/set/meta/sources.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[1]) == "..%2f../0.hdf5"


def test_layout_of_a_moving_camera(tmp_path, monkeypatch):
    write_egodex(tmp_path / "in/0.hdf5", make_joints(6, 0))
    run(egodex, tmp_path / "in", "--out", tmp_path / "out", "--workers", 0, monkeypatch=monkeypatch)
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["features"]["observation.camera"]["shape"] == [7]
    assert info["features"]["action"]["names"] == list(egodex.HAND_ACTION)
    assert info["features"]["observation.state"]["names"] == list(egodex.HAND_STATE)
    table = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    first = np.array(table["observation.camera"][0].as_py())
    np.testing.assert_allclose(first, [0, 0, 0, 0, 0, 0, 1], atol=1e-6)  # the frame is that of the first camera
    with pytest.raises(InputError, match="moving camera"):
        LeRobotWriter(tmp_path / "out", 30, "hands", egodex.HAND_ACTION, egodex.HAND_STATE,
                             {"primary": (252, 448)}, resume=True)  # fmt: skip
    assert len(STATE_NAMES) - len(egodex.HAND_STATE) == 2
