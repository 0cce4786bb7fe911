"""data.look: the picture of an episode and the tables of a data set."""

import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_episode, write_set
from PIL import Image
from scipy.spatial.transform import Rotation

from common import ACTION_NAMES, ARM_STATE, STATE_NAMES, InputError, relative_action
from data import look, stats
from data.lerobot import LeRobotReader


@pytest.fixture
def run_look(monkeypatch, tmp_path, capsys):
    def run(source, *words) -> tuple[str, np.ndarray]:
        path = tmp_path / "look.png"
        monkeypatch.setattr(sys, "argv", ["look", str(source), "--out", str(path), *words])
        look.main()
        return capsys.readouterr().out, np.asarray(Image.open(path).convert("RGB"))

    return run


def test_spans():
    assert look.spans(list("aabccc")) == [("a", 0, 2), ("b", 2, 3), ("c", 3, 6)]
    assert look.spans(["a"]) == [("a", 0, 1)]


def test_panels_hold_every_column_once():
    for actions, states in ((ACTION_NAMES, STATE_NAMES), (ACTION_NAMES[7:14], STATE_NAMES[8:16]), ((), ()), ("", "")):
        drawn = [line for _, _, lines in look.panels(actions, states) for line in lines]
        assert sorted(drawn) == sorted([("action", n) for n in actions] + [("state", n) for n in states])


def test_tables_and_picture(dataset, episodes, run_look):
    out, picture = run_look(dataset, "--episode", "1")
    assert picture.shape[1] > 1000 and picture.std() > 30
    assert "10 episodes of 18 to 27 steps" in out and "camera wrist: 32 x 32, h264" in out
    assert "2 instructions, 2 subtasks" in out and "5 x close the oven" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("action right_roll"))
    values = np.concatenate([e["action"][:, 3] for e in episodes])
    low, high = np.quantile(values, [0.01, 0.99])
    want = [values.min(), low, values.mean(), values.std(), high, values.max()]
    np.testing.assert_allclose([float(v) for v in row[3:]], want, atol=6e-5)
    assert row[2] == "rad" and "state right_qx" in out
    # The strips show the episode from left to right: it brightens by three levels a frame.
    left, right = picture[100:120, 120:160, 2].mean(), picture[100:120, 1200:1240, 2].mean()
    assert right > left + 30


def follower(sign: float, open_is: float) -> dict:
    """An arm that does in a step what it was told, or the opposite of it; likewise its gripper."""
    episode = make_episode(0, n=60)
    p, q = episode["state"][:, :3], episode["state"][:, 3:7]
    episode["action"][:-1, :6] = sign * relative_action(p[:-1], q[:-1], p[1:], q[1:])
    episode["action"][:, 6] = np.arange(60) // 10 % 2
    episode["state"][1:, 7] = np.abs(1 - open_is - episode["action"][:-1, 6])
    return episode


def test_a_wrong_sign_is_seen(tmp_path, run_look):
    out, _ = run_look(write_set(tmp_path / "right", [follower(1, 1)], fps=5))
    assert "look at this" not in out and "x 1.00, y 1.00, z 1.00" in out
    assert "measured 1.00 when commanded open, 0.00 when commanded closed" in out
    out, _ = run_look(write_set(tmp_path / "wrong", [follower(-1, 0)], fps=5))
    assert "x -1.00" in out and "<- look at this" in out
    assert "measured 0.00 when commanded open, 1.00 when commanded closed" in out
    assert "the quaternion changes its sign" not in out  # its tool points down, half a turn from upright, and wobbles
    turning = make_episode(0, n=60)
    turn = Rotation.from_euler("z", np.linspace(0, -np.pi, 60)[:, None]) * Rotation.from_euler("x", np.pi)
    turning["state"][:, 3:7] = turn.as_quat()
    out, _ = run_look(write_set(tmp_path / "turning", [turning], fps=5))
    assert "the quaternion changes its sign in 1.7% of the steps" in out


def test_hands_and_video_without_actions(tmp_path, run_look):
    hands = make_episode(0)
    columns = {"action": [n for n in ACTION_NAMES if "gripper" not in n], "state": STATE_NAMES[:7] + STATE_NAMES[16:]}
    hands["action"], hands["state"] = np.full((24, 42), 0.01), np.tile([*[0.1] * 3, 0, 0, 0, 1, *[0.2] * 30], (24, 1))
    names = {"action_names": columns["action"], "state_names": columns["state"]}
    out, tall = run_look(write_set(tmp_path / "hands", [hands], **names))
    assert "action left_thumb_x" in out and "gripper" not in out
    video = make_episode(0) | {"action": np.zeros((24, 0)), "state": np.zeros((24, 0))}
    out, short = run_look(write_set(tmp_path / "video", [video], action_names=(), state_names=()))
    assert "video alone" in out and len(short) < len(tall) - 500


def test_an_absent_video_is_named_and_the_rest_is_drawn(dataset, tmp_path, run_look):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (copy / "videos/observation.images.wrist/chunk-000/file-000.mp4").unlink()
    (copy / "meta/stats.json").unlink()
    out, picture = run_look(copy)
    assert "camera wrist: no readable video for episode 0" in out and "note: video " in out and picture.std() > 20
    assert f"python -m data.stats {copy}" in out


def shortened(dataset, folder, lengths: dict[int, int]):
    """A copy some of whose episodes have lost their end."""
    copy = shutil.copytree(dataset, folder)
    path = copy / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows = [r | {"length": lengths.get(r["episode_index"], r["length"])} for r in rows]
    pq.write_table(pa.Table.from_pylist(rows), path)
    for path in (copy / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        numbers = (table[column].to_pylist() for column in ("episode_index", "frame_index"))
        kept = [t < lengths.get(e, 999) for e, t in zip(*numbers, strict=True)]
        pq.write_table(table.filter(pa.array(kept)), path)
    return copy


def test_episodes_of_one_frame_and_of_two(dataset, tmp_path, run_look):
    copy = shortened(dataset, tmp_path / "short", {0: 1, 1: 2})
    for i, steps in enumerate((1, 2)):
        out, picture = run_look(copy, "--episode", str(i))
        assert "10 episodes of 1 to 27 steps" in out and picture.std() > 20, steps
    copy = shortened(dataset, tmp_path / "shorter", dict.fromkeys(range(10), 1))
    out, _ = run_look(copy)
    assert "10 episodes of 1 to 1 steps" in out and "action right_x" in out
    # Where the action is the change of the state, an episode of one frame has none.
    (tmp_path / "m.json").write_text(json.dumps({
        "images": {"primary": "observation.images.primary"},
        "state": {n: {"column": "observation.state", "index": k} for k, n in enumerate(ARM_STATE)},
    }))  # fmt: skip
    out, _ = run_look(f"{copy}@{tmp_path / 'm.json'}")
    assert "state right_x" in out and "action right_x" not in out


def spoiled(dataset, folder, episodes):
    """A copy with a NaN in some episodes."""
    copy = shutil.copytree(dataset, folder)
    for path in (copy / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        values = np.array(table["action"].to_pylist(), np.float32)
        values[np.isin(table["episode_index"].to_numpy(), episodes), 2] = np.nan
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 7)
        pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    return copy


def test_a_damaged_episode_is_left_out_by_name(dataset, episodes, tmp_path, run_look, monkeypatch, capsys):
    copy = spoiled(dataset, tmp_path / "nan", [0, 3])
    out, _ = run_look(copy)
    assert "statistics of 8 of 10 episodes" in out
    assert "note: NaN or infinite action in episode 0" in out.replace(f"{copy}: ", "") and "in episode 3" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("action right_z"))
    sound = np.concatenate([e["action"][:, 2] for i, e in enumerate(episodes) if i not in (0, 3)])
    np.testing.assert_allclose(float(row[5]), sound.mean(), atol=6e-5)
    with pytest.raises(InputError, match="NaN or infinite action in episode 3"):
        run_look(copy, "--episode", "3")
    monkeypatch.setattr(sys, "argv", ["stats", str(copy)])
    stats.main()
    shown = capsys.readouterr()
    assert "in episode 0" in shown.err and "in episode 3" in shown.err and "8 of 10 episodes" in shown.out
    stored = json.loads((copy / "meta/stats.json").read_text())["action"]
    assert stored["count"] == [sum(len(e["action"]) for i, e in enumerate(episodes) if i not in (0, 3))]
    copy = spoiled(dataset, tmp_path / "all", range(10))
    before = (copy / "meta/stats.json").read_bytes()
    with pytest.raises(InputError, match="none of 10 episodes .* NaN"):
        monkeypatch.setattr(sys, "argv", ["stats", str(copy)])
        stats.main()
    with pytest.raises(InputError, match="none of 10 episodes .* NaN"):
        run_look(copy)
    assert (copy / "meta/stats.json").read_bytes() == before


@pytest.mark.parametrize("name, command", [
    ("features.json", "data.rlds .*/raw "), ("1.0.0/features.json", "data.rlds .*/raw/1.0.0 "),
    ("x-train.tfrecord-00000-of-00001", "python -m data.rlds"),
    ("part/task/0.hdf5", "data.libero"),
])  # fmt: skip
def test_what_is_no_lerobot_set_says_how_to_convert_it(tmp_path, run_look, name, command):
    path = tmp_path / "raw" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=f"{command}.*"):
        run_look(tmp_path / "raw")


def test_bad_input(dataset, run_look, monkeypatch, tmp_path):
    for words, text in ((["--episode", "10"], "episodes 0 to 9"), (["--sample", "-1"], "give 1 or more")):
        with pytest.raises(InputError, match=text):
            run_look(dataset, *words)
    monkeypatch.setattr(sys, "argv", ["look", str(dataset), "--out", "x.jpg"])
    with pytest.raises(InputError, match="ends in .png"):
        look.main()
    (tmp_path / "x.png").mkdir()
    monkeypatch.setattr(sys, "argv", ["look", str(dataset), "--out", str(tmp_path / "x.png")])
    with pytest.raises(InputError, match="give a file"):
        look.main()


def test_both_recordings(sim_pick_place, run_look):
    out, _ = run_look(sim_pick_place, "--episode", "2")
    assert "camera base: 640 x 480, av1" in out and "LeRobot v2.1" in out and "note: video" not in out
    assert LeRobotReader(sim_pick_place).num_episodes == 4
