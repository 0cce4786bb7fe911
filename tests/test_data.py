"""The data path: LeRobot writer and reader, windows and the stream, mappings and statistics."""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Alone, make_episode, write_set
from scipy.spatial.transform import Rotation

import common
from common import ACTION_NAMES, ARM_ACTION, ARM_STATE, STATE_NAMES, InputError
from data import stats
from data.lerobot import DamagedEpisode, LeRobotReader, LeRobotWriter, _Video
from data.quantiles import quantile_stats
from data.windows import View, Windows, _held_out, held_out_batches, stream

VIEWS = {"frames": View("primary", 4, 32)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def rewrite(path: Path, change) -> None:
    """Changes a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


# -- writer and reader --------------------------------------------------------------------------------------------


def test_round_trip(dataset, episodes):
    reader = LeRobotReader(dataset)
    assert (reader.num_episodes, reader.fps, reader.cameras) == (10, 10, ("primary", "wrist"))
    assert reader.lengths.tolist() == [len(e["action"]) for e in episodes]
    for i, made in enumerate(episodes):
        episode = reader.episode(i)
        np.testing.assert_array_equal(common.gather(episode["action"], ARM_ACTION, ACTION_NAMES), made["action"])
        np.testing.assert_array_equal(common.gather(episode["state"], ARM_STATE, STATE_NAMES), made["state"])
        assert episode["action_mask"].sum() == 7 and episode["action_mask"][7:14].all()
        assert episode["state_mask"].sum() == 8 and episode["state_mask"][8:16].all()
        assert (episode["task"], episode["subtask"]) == (made["task"], made["subtasks"])
        for camera, clip in made["frames"].items():
            read = reader.frames(i, camera, range(len(clip)))
            assert read.shape == clip.shape and read.dtype == np.uint8
            error = np.abs(read.astype(int) - clip)
            assert error.mean() < 3 and np.abs(error.mean((1, 2, 3)) - 0).max() < 4  # codec error, and no frame shifted


def test_random_access_equals_sequential_decoding(dataset):
    reader, rng = LeRobotReader(dataset), np.random.default_rng(0)
    for _ in range(40):
        i = int(rng.integers(10))
        n = int(reader.lengths[i])
        whole = LeRobotReader(dataset).frames(i, "wrist", range(n))
        some = rng.integers(0, n, 5)
        np.testing.assert_array_equal(reader.frames(i, "wrist", some), whole[some])


@pytest.mark.parametrize("fps", [3.75, 5, 15, 29.97])
def test_odd_rates_keep_their_frames(tmp_path, fps):
    made = [make_episode(k, n=40) for k in range(3)]
    reader = LeRobotReader(write_set(tmp_path / "set", made, fps=fps))
    for i in range(3):
        brightness = reader.frames(i, "primary", [39, 0, 17])[..., 2].astype(float).mean((1, 2))
        np.testing.assert_allclose(brightness, np.clip(3 * np.array([39, 0, 17]), 0, 255), atol=4)


def test_layout_is_lerobots(dataset):
    """The files and columns that LeRobot's own loader and viewers read."""
    info = json.loads((dataset / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["splits"] == {"train": "0:10"}
    assert (info["total_episodes"], info["total_tasks"]) == (10, 2)
    assert info["features"]["action"] == {"dtype": "float32", "shape": [7], "names": list(ARM_ACTION)}
    assert info["features"]["observation.images.wrist"]["shape"] == [32, 32, 3]
    tasks = pq.read_table(dataset / "meta/tasks.parquet")
    assert set(tasks.column_names) == {"task_index", "__index_level_0__"}
    pandas = json.loads(tasks.schema.metadata[b"pandas"])
    assert pandas["index_columns"] == ["__index_level_0__"]  # without it pandas would number the rows instead
    rows = pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [r["data/file_index"] for r in rows] == [0] * 4 + [1] * 4 + [2] * 2
    key = "videos/observation.images.primary"
    assert rows[4][f"{key}/from_timestamp"] == 0 and rows[5][f"{key}/from_timestamp"] == pytest.approx(2.2)
    assert rows[5]["dataset_from_index"] == rows[4]["dataset_to_index"]
    table = pq.read_table(dataset / "data/chunk-000/file-001.parquet")
    assert pa.types.is_fixed_size_list(table.schema.field("action").type)
    assert table["index"][0].as_py() == rows[4]["dataset_from_index"]
    numbers = json.loads((dataset / "meta/stats.json").read_text())
    assert {"q01", "q99", "mean", "std", "min", "max", "count"} <= numbers["action"].keys()


def test_writer_refuses(tmp_path, dataset, episodes):
    cameras = {"primary": (32, 32), "wrist": (32, 32)}
    with pytest.raises(InputError, match="holds a data set: add --resume"):
        LeRobotWriter(dataset, cameras=cameras)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        LeRobotWriter(tmp_path / "full", cameras=cameras)
    with pytest.raises(InputError, match="fps.*choose another --out"):
        LeRobotWriter(dataset, fps=5, cameras=cameras, resume=True)
    with pytest.raises(InputError, match="even"):
        LeRobotWriter(tmp_path / "odd", cameras={"primary": (33, 32)})
    with pytest.raises(InputError, match="unknown dimension names"):
        LeRobotWriter(tmp_path / "odd", action_names=["elbow"])
    good = episodes[0]
    nan = good["action"].copy()
    nan[3, 0] = np.nan
    with LeRobotWriter(tmp_path / "new", cameras=cameras) as writer:
        for wrong, text in (
            ({"action": nan}, "NaN"), ({"state": good["state"][:, :7]}, "need"), ({"task": " "}, "instruction"),
            ({"subtasks": ["a"]}, "1 subtask texts"), ({"frames": {"primary": good["frames"]["primary"]}}, "wrist"),
            ({"action": good["action"][:1], "state": good["state"][:1]}, "n >= 2"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=text):
                writer.add_episode(**good | wrong)
        assert writer.num_episodes == 0
    assert not (tmp_path / "new/meta/info.json").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("dies_at", range(12))
def test_a_kill_inside_a_flush_loses_nothing_written(tmp_path, episodes, dies_at, monkeypatch):
    """The recorder dies at every rename of its second flush in turn. What is left is a whole data set; resuming gives
    the same data set as an undisturbed run."""
    cameras = {"primary": (32, 32), "wrist": (32, 32)}
    make = lambda resume: LeRobotWriter(tmp_path, cameras=cameras, resume=resume, episodes_per_file=3)
    writer = make(False)
    for episode in episodes[:5]:
        writer.add_episode(**episode)
    real, calls = os.replace, []

    def dying(*paths):
        calls.append(paths)
        if len(calls) > dies_at:
            raise Killed
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        try:
            writer.add_episode(**episodes[5])
        except Killed:
            pass
    assert len(calls) >= 8 or dies_at < 8  # 2 videos, data, tasks, subtasks, episodes, stats, info
    del writer  # a dead process has no open files
    left = LeRobotReader(tmp_path)
    assert left.num_episodes in (3, 6)
    np.testing.assert_array_equal(left.episode(left.num_episodes - 1)["action"][:, 7:14],
                                  episodes[left.num_episodes - 1]["action"])  # fmt: skip
    with make(True) as writer:
        assert writer.num_episodes == left.num_episodes
        for episode in episodes[writer.num_episodes : 7]:
            writer.add_episode(**episode)
    whole = write_set(tmp_path / "undisturbed", episodes[:7], per_file=3)
    a, b = LeRobotReader(tmp_path), LeRobotReader(whole)
    assert a.stats == b.stats and a.info == b.info and a.tasks == b.tasks and a.subtasks == b.subtasks
    assert a.episodes == b.episodes
    for i in range(7):
        np.testing.assert_array_equal(a.episode(i)["state"], b.episode(i)["state"])
        np.testing.assert_array_equal(a.frames(i, "wrist", [0, 9]), b.frames(i, "wrist", [0, 9]))


def test_resume_that_adds_nothing_repairs_the_metadata(copy):
    rewrite(copy / "meta/info.json", lambda info: info.update(total_episodes=8))
    (copy / "meta/stats.json").unlink()
    with LeRobotWriter(copy, cameras={"primary": (32, 32), "wrist": (32, 32)}, resume=True):
        pass
    reader = LeRobotReader(copy)
    assert reader.info["total_episodes"] == 10 and "q01" in reader.stats["action"]


def test_memory_does_not_grow_with_pending_frames(tmp_path, episodes):
    """Pictures are encoded when they come: fifty pending episodes of a large camera would be gigabytes."""
    with LeRobotWriter(tmp_path / "x", cameras={"primary": (32, 32), "wrist": (32, 32)}) as writer:
        writer.add_episode(**episodes[0])
        assert not any(isinstance(part, dict) for part in writer.pending[0])


# -- bad input ----------------------------------------------------------------------------------------------------


def test_missing_path(tmp_path):
    with pytest.raises(InputError, match="no LeRobot data set at .*nowhere.*python franka.py --record"):
        LeRobotReader(tmp_path / "nowhere")


def test_missing_columns_and_unknown_names(copy):
    info = copy / "meta/info.json"
    original = info.read_text()
    rewrite(info, lambda i: [i["features"].pop(k) for k in ("action", "observation.state")])
    with pytest.raises(InputError, match="neither `observation.state` nor `action`.*@MAPPING"):
        LeRobotReader(copy)
    info.write_text(original)
    rewrite(info, lambda i: i["features"]["action"].update(names=["joint_0", *ARM_ACTION[1:]]))
    with pytest.raises(InputError, match=r"action has unknown names \['joint_0'\].*mapping"):
        LeRobotReader(copy)
    info.write_text(original)
    rewrite(info, lambda i: i.update(codebase_version="v1.6"))
    with pytest.raises(InputError, match="format v1.6 is not supported"):
        LeRobotReader(copy)
    info.write_text(original)
    rewrite(info, lambda i: [i["features"].pop(k) for k in list(i["features"]) if "images" in k])
    with pytest.raises(InputError, match="no camera columns"):
        LeRobotReader(copy)
    info.write_text(original[: len(original) // 2])
    with pytest.raises(InputError, match="cannot read .*info.json"):
        LeRobotReader(copy)


def test_table_without_a_listed_column(copy):
    path = copy / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["action"]), path)
    with pytest.raises(InputError, match=r"lacks the columns \['action'\]"):
        LeRobotReader(copy).episode(0)
    path.unlink()
    with pytest.raises(InputError, match="cannot read .*file-000.parquet"):
        LeRobotReader(copy).episode(0)


def test_table_with_missing_rows_nan_or_a_foreign_gripper(copy):
    path = copy / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 10), path)
    with pytest.raises(InputError, match="holds 10 of the 18 steps of episode 0"):
        LeRobotReader(copy).episode(0)
    for column, value, text in ((0, np.nan, "NaN or infinite action"), (6, -1.0, "gripper .* from -1 to 1.*scale")):
        values = np.array(table["action"].to_pylist(), np.float32)
        values[3, column], values[4, 6] = value, 1
        changed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 7)
        pq.write_table(table.set_column(table.column_names.index("action"), "action", changed), path)
        with pytest.raises(InputError, match=text):
            LeRobotReader(copy).episode(0)


@pytest.mark.parametrize("how", ["wider", "ragged", "null", "text"])
def test_columns_of_another_shape(copy, how):
    path = min((copy / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    rows = table["action"].to_pylist()
    if how == "wider":
        rows = [[*row, 0.0] for row in rows]
    else:
        rows[3] = {"ragged": rows[3][:-1], "null": None, "text": ["x"] * 7}[how]
        rows = [[str(x) for x in row] for row in rows] if how == "text" else rows
    at = table.column_names.index("action")
    pq.write_table(table.set_column(at, "action", pa.array(rows)), path)
    error, text = (InputError, "8 dimensions") if how == "wider" else (DamagedEpisode, "action in episode 0 has rows")
    with pytest.raises(error, match=text):
        LeRobotReader(copy).episode(0)


def test_missing_statistics(copy):
    (copy / "meta/stats.json").unlink()
    with pytest.raises(InputError, match=f"no q01/q99 statistics in {copy}: run `python -m data.stats {copy}`"):
        Windows([copy], VIEWS, 3, 10, 0)
    reader = LeRobotReader(copy)
    (copy / "meta/stats.json").write_text(json.dumps(stats.statistics(reader)))
    Windows([copy], VIEWS, 3, 10, 0)


def test_absent_and_cut_short_videos(copy):
    path = copy / "videos/observation.images.primary/chunk-000/file-000.mp4"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"cannot read video {path}"):
        LeRobotReader(copy).frames(0, "primary", [0])
    path.unlink()
    with pytest.raises(InputError, match=f"video {path} is absent"):
        LeRobotReader(copy).frames(0, "primary", [0])
    with pytest.raises(InputError, match="no camera 'front', it has"):
        LeRobotReader(copy).frames(0, "front", [0])
    # A video that was closed properly, but too early.
    video = _Video(path, (32, 32), 10)
    video.add(make_episode(0, n=10)["frames"]["primary"])
    video.close()
    reader = LeRobotReader(copy)
    assert reader.frames(0, "primary", [9]).shape == (1, 32, 32, 3)
    with pytest.raises(InputError, match=f"cut short: it lacks frames of episode 0 of {copy}"):
        reader.frames(0, "primary", range(18))
    path.write_bytes(b"")
    with pytest.raises(InputError, match="cannot read video"):
        LeRobotReader(copy).frames(0, "primary", [0])


def test_errors_leave_a_worker_as_one_line(copy, process, capsys):
    (copy / "videos/observation.images.primary/chunk-000/file-000.mp4").unlink()

    def main():
        next(stream(Windows([copy], VIEWS, 3, 10, 0, episodes=2), 4, 0, process, 1, workers=1))  # of two tasks: 0 to 3

    with pytest.raises(SystemExit) as stop:
        common.run_main(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: 100 draws in a row") and error.count("\n") == 1
    assert "is absent" in error


def test_windows_refuse(dataset, tmp_path):
    make = lambda **kw: Windows(**{"sources": [dataset], "views": VIEWS, "actions": 3, "hz": 10, "seed": 0} | kw)
    for options, text in (
        ({"sources": []}, "no data"), ({"weights": [1, 2]}, "--weights"), ({"weights": [0.0]}, "--weights"),
        ({"views": {"x": View("front", 1, 32)}}, "no camera 'front'"), ({"hz": 3}, "--stride 3"),
        ({"views": {"x": View("front", 1, 32, optional=True)}}, r"no data set has a camera \['front'\], they have"),
        ({"episodes": 6}, "5 episodes of '.*', fewer than 6"), ({"starts": 1.5}, "--starts 1.5 is a share"),
        ({"split": "val", "val_every": 20}, "leave none for the val split"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=text):
            make(**options)


def test_a_broken_picture_is_never_made_up(copy, episodes):
    """Bytes overwritten anywhere in a video: its frames come out as they were, or the episode counts as damaged."""
    path = copy / "videos/observation.images.primary/chunk-000/file-000.mp4"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    wanted = [LeRobotReader(copy).frames(i, "primary", range(18 + i)) for i in range(4)]
    damaged = 0
    for trial in range(12):
        broken, n = bytearray(whole), (1, 5, 50, 200)[trial % 4]
        at = rng.integers(len(whole) - n)
        broken[at : at + n] = rng.bytes(n)
        path.write_bytes(broken)
        reader = LeRobotReader(copy)
        for i, want in enumerate(wanted):
            try:
                got = reader.frames(i, "primary", range(18 + i))
                assert np.abs(got.astype(int) - want).mean((1, 2, 3)).max() < 3, (trial, i)
            except DamagedEpisode as error:
                assert str(path) in str(error) and f"episode {i} of {copy}" in str(error)
                damaged += 1
    assert 6 < damaged < 36


def test_frames_of_another_resolution_than_listed(copy):
    rewrite(copy / "meta/info.json", lambda i: i["features"]["observation.images.primary"].update(shape=[32, 48, 3]))
    with pytest.raises(DamagedEpisode, match="has 32 x 32 pixels .*says 32 x 48"):
        LeRobotReader(copy).frames(0, "primary", [0])


def test_windows_past_the_end_are_counted_and_must_not_be_all(dataset):
    windows = Windows([dataset], {"video": View("primary", 5, 48)}, 4, 5, 0)  # strides of 2 at 10 Hz
    assert windows.strides == [2]
    lengths = windows.readers[0].lengths
    past = np.mean([t + 2 * 4 > n - 1 for n in lengths for t in range(n - 1)])
    assert f"{len(windows)} windows, {100 * past:.0f} % of them past an episode's end" in windows.summary()
    longest = int(lengths.max())
    Windows([dataset], {"video": View("primary", longest, 48)}, longest - 1, 10, 0)
    with pytest.raises(InputError, match=f"longest episode has {longest} frames, .*lower --frames or raise --hz"):
        Windows([dataset], {"video": View("primary", longest + 1, 48)}, longest, 10, 0)


def test_episodes_of_one_frame_are_left_out(copy):
    path = copy / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([r | {"length": 1} if r["episode_index"] < 2 else r for r in rows]), path)
    windows = Windows([copy], VIEWS, 3, 10, 0)
    assert windows.chosen[0].tolist() == list(range(2, 10)) and len(windows) == sum(17 + i for i in range(2, 10))
    assert "8 episodes" in windows.summary() and "2 of one frame left out" in windows.summary()
    pq.write_table(pa.Table.from_pylist([r | {"length": 1} for r in rows]), path)
    with pytest.raises(InputError, match="10 of them of one frame, leave none"):
        Windows([copy], VIEWS, 3, 10, 0)


# -- damaged episodes ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(copy) -> Path:
    """The first file's video is cut short, so episodes 0 to 3 cannot be decoded; episode 4 has a NaN."""
    path = copy / "videos/observation.images.primary/chunk-000/file-000.mp4"
    path.write_bytes(path.read_bytes()[:1000])
    path = copy / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    values = np.array(table["action"].to_pylist(), np.float32)
    values[5, 0] = np.nan
    changed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 7)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", changed), path)
    return copy


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("workers,world", [(0, 1), (2, 2)])
def test_damaged_episodes_are_drawn_around(dataset, damaged, process, workers, world, preload):
    """Samples that miss the damage are those of the intact set; the others are windows of sound episodes, named and
    counted, and the same for any number of ranks and workers."""
    whole, plain = (Windows([d], VIEWS, 3, 10, 7) for d in (dataset, damaged))
    first_sound = whole.ends[0][4]  # of the windows, in order of episodes
    tally, indices = {"bad": 0}, []
    for rank in range(world):
        windows = Windows([damaged], VIEWS, 3, 10, 7, preload=preload)
        here = Alone(rank, world, process.device, process.dtype)
        for batch in next(stream(windows, 8 // world, 0, here, 2, workers, tally, max_bad=1)):
            for row, index in enumerate(batch["index"].tolist()):
                indices.append(index)
                intended, got = whole[index], {k: v[row] for k, v in batch.items()}
                assert got["window"] >= first_sound
                assert same(plain[index], got)
                if intended["window"] >= first_sound:
                    assert same(intended, got) and not got["damaged"]
                else:
                    assert all("file-000.mp4" in s or "in episode 4" in s for s in got["damaged"].split("\n"))
    assert sorted(indices) == list(range(16))
    assert tally["bad"] == sum(len(plain[i]["damaged"].splitlines()) for i in range(16)) > 3


def test_too_much_damage_stops_the_run(damaged, process, capsys):
    """About half of all draws fail: ten are few enough of the first 1000 samples, eleven are not; each damage is
    reported once. A resumed run goes on counting."""
    make = lambda **kw: stream(Windows([damaged], VIEWS, 3, 10, 7), 2, kw.pop("start", 0), process, 1, 0, **kw)
    tally = {"bad": 0}
    with pytest.raises(InputError, match=r"1\d of \d+ samples fell on damaged.*--max-bad 0.01.*--resume"):
        for _ in make(tally=tally):
            assert tally["bad"] <= 10
    report = capsys.readouterr().err.splitlines()
    assert 2 <= len(report) <= 5 and len(set(report)) == len(report) and str(damaged) in report[0]
    with pytest.raises(InputError, match="of . samples .*--max-bad 0 allows"):
        list(itertools.islice(make(max_bad=0), 20))
    with pytest.raises(InputError, match="1. of . samples|1. of 1. samples"):
        list(itertools.islice(make(start=1, tally={"bad": 10}), 5))


def test_held_out_batches_are_dealt_to_the_ranks(dataset, process):
    """Seven windows to one, two and three ranks: every one counted once, and equally many batches of equal sizes."""
    windows = Windows([dataset], VIEWS, 3, 10, 0)
    for world in (1, 2, 3):
        shapes, counted = set(), []
        for rank in range(world):
            here = Alone(rank, world, process.device, process.dtype)
            batches = list(held_out_batches(windows, 7, 2, here))
            shapes.add(tuple(len(b["index"]) for b in batches))
            for b in batches:
                counted += b["index"][b["counted"]].tolist()
                assert not b["action_mask"][~b["counted"]].any()
                for index, mask in zip(b["index"][b["counted"]].tolist(), b["action_mask"][b["counted"]], strict=True):
                    assert torch.equal(mask, windows[index]["action_mask"])
        assert len(shapes) == 1 and counted == list(range(7)), (shapes, counted)


# -- windows and the stream ---------------------------------------------------------------------------------------


def test_mask_at_the_end_of_an_episode(dataset, episodes):
    """Eighteen steps, a window at t = 15: actions 15, 16, 17, then nothing; the last frame repeats."""
    windows = Windows([dataset], {"frames": View("primary", 6, 32)}, actions=5, hz=10, seed=0)
    sample = windows.window(0, 15)
    assert sample["action_mask"].any(1).tolist() == [True, True, True, False, False]
    assert sample["action_mask"][0].sum() == 7 and (sample["action"][~sample["action_mask"]] == 0).all()
    assert all(torch.equal(sample["frames"][k], sample["frames"][2]) for k in (3, 4, 5))
    action = windows.action_norms[0].unnormalize(sample["action"])[:3, 7:14]
    np.testing.assert_allclose(action, episodes[0]["action"][15:], atol=1e-6)
    state = windows.state_norms[0].unnormalize(sample["state"])[8:16]
    np.testing.assert_allclose(state, episodes[0]["state"][15], atol=1e-6)
    assert sample["subtask"] == "lift the cup" and sample["instruction"] == "pick up the red cup"
    assert windows.window(0, 16)["action_mask"].any(1).sum() == 2
    assert windows.window(0, 17)["subtask"] == "reach for the cup"  # of episode 1: none starts at the last step
    assert len(windows) == sum(len(e["action"]) - 1 for e in episodes)


def test_stride_composes_through_the_measured_poses(tmp_path):
    """30 fps read at 10 Hz: each action leads from the pose at t to the target commanded at t + 2, whatever the lag."""
    made = [make_episode(k, n=31) for k in range(2)]
    root = write_set(tmp_path / "set", made, fps=30)
    rewrite(root / "meta/stats.json", lambda s: s.update(stats.statistics(LeRobotReader(root), 3)))
    windows = Windows([root], {"frames": View("primary", 4, 32)}, actions=3, hz=10, seed=0)
    assert windows.strides == [3]
    sample, state, action = windows.window(0, 4), made[0]["state"], made[0]["action"]
    for k, t in enumerate((4, 7, 10)):
        goal = common.apply_action(state[t + 2, :3], state[t + 2, 3:7], action[t + 2, :6])
        here = common.apply_action(state[t, :3], state[t, 3:7],
                                   windows.action_norms[0].unnormalize(sample["action"])[k, 7:13].numpy())  # fmt: skip
        np.testing.assert_allclose(here[0], goal[0], atol=1e-5)
        assert (Rotation.from_quat(here[1]) * Rotation.from_quat(goal[1]).inv()).magnitude() < 1e-3
        assert sample["action"][k, 13] == action[t + 2, 6]
    frames = LeRobotReader(root).frames(0, "primary", [4, 7, 10, 13])
    assert torch.equal(sample["frames"], torch.from_numpy(frames).movedim(-1, 1))
    assert windows.window(0, 24)["action_mask"].any(1).tolist() == [True, True, False]  # 24-26, 27-29, 30-32


def test_stride_without_a_state_is_the_product(dataset):
    episode = LeRobotReader(dataset).episode(0) | {"state_mask": np.zeros(46, bool)}
    out = common.strided_actions(episode, np.array([2, 5]), 3)
    np.testing.assert_allclose(out[1], common.compose_actions(episode["action"][5:8]), atol=1e-6)


def test_preloaded_samples_are_the_same(dataset):
    views = {"a": View("primary", 3, 24), "b": View("wrist", 1, 16), "c": View("primary", 1, 16)}
    lazy, eager = (Windows([dataset], views, 2, 10, 0, preload=p) for p in (False, True))
    assert all(same(lazy[i], eager[i]) for i in range(20))


def test_each_task_recorded_in_turn_is_held_out():
    held_out = _held_out(75, 15)
    assert sorted(i % 5 for i in held_out) == [0, 1, 2, 3, 4]
    assert _held_out(14, 15) == [] and _held_out(30, 0) == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_samples_depend_on_nothing_but_seed_and_number(dataset, workers, world, process):
    """Four samples a step, on one rank or on two, with or without workers, from the start or resumed at step 3."""
    wanted = Windows([dataset], VIEWS, 3, 10, seed=7)
    for start in (0, 3):
        for rank in range(world):
            here = Alone(rank, world, process.device, process.dtype)
            steps = stream(Windows([dataset], VIEWS, 3, 10, seed=7), 2 // world, start, here, 2, workers)
            for step in range(start, start + 2):
                for part, batch in enumerate(next(steps)):
                    first = step * 4 + part * 2 + rank * (2 // world)
                    assert batch["index"].tolist() == list(range(first, first + 2 // world))
                    for row, number in enumerate(batch["index"].tolist()):
                        for key, value in wanted[number].items():
                            got = batch[key][row]
                            assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, key
            del steps


def test_a_stream_leaves_the_global_random_numbers_alone(dataset, process):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(stream(Windows([dataset], VIEWS, 3, 10, 0), 2, 0, process, 1, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_open_videos_survive_a_fork(dataset, process):
    """A parent that has read, then forks workers, which read the same files."""
    windows = Windows([dataset], VIEWS, 3, 10, 0)
    wanted = [windows[i] for i in range(8)]
    loader = torch.utils.data.DataLoader(windows, sampler=range(8), batch_size=None, num_workers=2)
    for sample, want in zip(loader, wanted, strict=True):
        assert torch.equal(sample["frames"], want["frames"])
    assert same(windows[3], wanted[3])


def test_weights_and_splits(dataset, tmp_path):
    other = write_set(tmp_path / "other", [make_episode(20, n=10)])
    drawn = Windows([dataset, other], {}, 1, 10, 0, weights=[1, 3])
    assert np.mean([drawn[i]["dataset"] for i in range(2000)]) == pytest.approx(0.75, abs=0.04)
    by_frames = Windows([dataset, other], {}, 1, 10, 0)
    np.testing.assert_allclose(by_frames.weights, np.array([215, 9]) / 224)
    assert "weight 0.960" in by_frames.summary()
    train, val = (Windows([dataset], {}, 1, 10, 0, split=s, val_every=5) for s in ("train", "val"))
    assert len(val.chosen[0]) == 2 and sorted([*train.chosen[0], *val.chosen[0]]) == list(range(10))
    assert Windows([dataset], {}, 1, 10, 0, episodes=3).chosen[0].tolist() == [0, 1, 2, 3, 4, 5]  # of two tasks


def test_so_many_episodes_of_each_task(tmp_path, episodes):
    """A task may have several instructions; without a name each instruction is one. Fewer are a part of more, in
    whatever order tasks were recorded."""
    names = ["cup", "oven", "cup", "cup", "oven", "cup", "oven", "cup", "oven", "oven"]
    named = [e | {"task_name": name} for e, name in zip(episodes, names, strict=True)]
    data = write_set(tmp_path / "set", named)
    with LeRobotWriter(data, cameras={c: (32, 32) for c in ("primary", "wrist")}, resume=True) as writer:
        writer.add_episode(**named[0] | {"task": "pick up the blue cup"})
    chosen = lambda n: Windows([data], {}, 1, 10, 0, episodes=n).chosen[0].tolist()
    assert chosen(1) == [0, 1] and chosen(3) == [0, 1, 2, 3, 4, 6] and chosen(5) == list(range(10))
    assert chosen(0) == list(range(11))
    with pytest.raises(InputError, match="5 episodes of 'oven', fewer than 6"):
        chosen(6)


def test_a_share_of_the_windows_begins_with_its_episode(dataset):
    """All episodes alike in that share, whatever their length, and without it the stream is the one of before."""

    def starts(**kw) -> np.ndarray:
        windows = Windows([dataset], {}, 1, 10, 0, **kw)
        drawn = np.array([windows.draw(i, pictures=False)["window"] for i in range(2000)])
        at = np.searchsorted(windows.ends[0], drawn, side="right")
        return np.stack([at, drawn - np.concatenate([[0], windows.ends[0]])[at]], 1)

    windows = Windows([dataset], {}, 1, 10, 0)
    assert [windows.draw(i, False)["window"] for i in range(50)] == [
        np.random.default_rng([0, i, 0]).integers(windows.ends[0][-1]) for i in range(50)]
    usual, half, all_ = ((starts(starts=s)[:, 1] < 4).mean() for s in (0.0, 0.5, 1.0))
    assert all_ == 1 and abs(half - (1 + usual) / 2) < 0.05
    at = starts(starts=1.0)
    assert set(at[:, 1]) == {0, 1, 2, 3} and (np.abs(np.bincount(at[:, 0]) / 200 - 1) < 0.35).all()


# -- v2.1, mappings, statistics -----------------------------------------------------------------------------------


def write_v21(root: Path, made: list[dict], names: dict[str, dict]) -> Path:
    """A LeRobot v2.1 data set, as others write them: a file an episode, plain lists, columns of their own."""
    (root / "meta").mkdir(parents=True)
    features = {k: {"dtype": "float64", "shape": [{"pos": 3, "quat": 4}.get(k, 1)]} | v for k, v in names.items()}
    features["observation.images.cam"] = {"dtype": "video", "shape": [32, 32, 3]}
    info = {"codebase_version": "v2.1", "fps": 10, "chunks_size": 1000, "features": features,
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))
    rows, tasks = [], {}
    for i, e in enumerate(made):
        n = len(e["state"])
        task = tasks.setdefault(e["task"], len(tasks))
        rows.append({"episode_index": i, "tasks": [e["task"]], "length": n})
        state = np.roll(e["state"], 0, 1)
        wxyz = -state[:, [6, 3, 4, 5]]  # the other sign, and the other order
        columns = {"pos": state[:, :3].tolist(), "quat": wxyz.tolist(), "grip": (1 - 2 * state[:, 7]).tolist()}
        columns |= {"task_index": [task] * n, "episode_index": [i] * n, "index": list(range(n))}
        path = root / f"data/chunk-000/episode_{i:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        video = _Video(root / f"videos/chunk-000/observation.images.cam/episode_{i:06d}.mp4", (32, 32), 10)
        video.add(e["frames"]["primary"])
        video.close()
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = [json.dumps({"task_index": k, "task": t}) + "\n" for t, k in tasks.items()]
    (root / "meta/tasks.jsonl").write_text("".join(lines))
    return root


def mapping_of() -> dict:
    at = lambda column, index, **kw: {"column": column, "index": index, **kw}
    state = {f"right_{c}": at("pos", k) for k, c in enumerate("xyz")}
    state |= {f"right_q{c}": at("quat", k) for c, k in (("x", 1), ("y", 2), ("z", 3), ("w", 0))}
    state |= {"right_gripper": at("grip", 0, scale=-0.5, offset=0.5)}
    return {"images": {"primary": "observation.images.cam"}, "state": state}


@pytest.fixture
def foreign(tmp_path) -> tuple[str, list[dict], Path]:
    made = [make_episode(k, n=12 + k) for k in range(3)]
    root = write_v21(tmp_path / "v21", made, {"pos": {}, "quat": {}, "grip": {}})
    path = tmp_path / "map.json"
    path.write_text(json.dumps(mapping_of()))
    return f"{root}@{path}", made, path


def test_v21_through_a_mapping_with_actions_from_poses(foreign):
    """Other names, wxyz, another sign of the gripper, no actions: the change of pose takes their place."""
    source, made, _ = foreign
    reader = LeRobotReader(source)
    assert reader.action_names == ARM_ACTION and reader.state_names == tuple(mapping_of()["state"])
    for i, e in enumerate(made):
        episode, n = reader.episode(i), len(e["state"])
        np.testing.assert_allclose(common.gather(episode["state"], ARM_STATE, STATE_NAMES), e["state"], atol=1e-6)
        assert episode["steps"] == n - 1 and episode["task"] == e["task"] and episode["subtask"] == [e["task"]] * n
        assert not episode["action_mask"][14:].any()  # an arm has no fingertips
        s, action = e["state"], episode["action"][:-1, 7:13]
        position, quaternion = common.apply_action(s[:-1, :3], s[:-1, 3:7], action)
        np.testing.assert_allclose(position, s[1:, :3], atol=1e-5)
        np.testing.assert_allclose(np.abs((quaternion * s[1:, 3:7]).sum(1)), 1, atol=1e-5)
        np.testing.assert_allclose(episode["action"][:-1, 13], s[1:, 7], atol=1e-6)
        brightness = reader.frames(i, "primary", [11, 2])[..., 2].astype(float).mean((1, 2))
        np.testing.assert_allclose(brightness, [33, 6], atol=4)


def test_statistics_of_a_mapped_set_go_into_the_mapping(foreign, monkeypatch):
    source, made, path = foreign
    with pytest.raises(InputError, match="no q01/q99 statistics in .*@.*map.json: run `python -m data.stats"):
        Windows([source], VIEWS, 3, 10, 0)
    monkeypatch.setattr(sys, "argv", ["stats", source, "--stride", "2"])
    stats.main()
    numbers = json.loads(path.read_text())["stats"]
    assert set(numbers) == {"action", "observation.state", "action.stride2", "action.stride4"}
    assert numbers["action"]["count"] == [sum(len(e["state"]) - 1 for e in made)]
    sample = Windows([source], VIEWS, 20, 10, 0).window(0, 0)
    assert sample["action_mask"].any(1).sum() == 11  # twelve poses, eleven changes
    Windows([source], VIEWS, 3, 5, 0)
    with pytest.raises(InputError, match="--stride 3"):
        Windows([source], VIEWS, 3, 3.3, 0)


def test_a_mapping_never_borrows_the_sets_own_statistics(foreign):
    """They describe other columns: switched statistics are worse than none."""
    source, _, _ = foreign
    root = Path(source.partition("@")[0])
    (root / "meta/stats.json").write_text(json.dumps({"action": {"q01": [0] * 7, "q99": [1] * 7}}))
    assert LeRobotReader(source).stats == {}


def test_wrong_mappings(foreign, tmp_path):
    source, _, path = foreign
    root = source.partition("@")[0]
    with pytest.raises(InputError, match="no mapping 'nonsense'.*sim_pick_place"):
        LeRobotReader(f"{root}@nonsense")
    for change, text in (
        (lambda m: m["state"].update(right_x={"column": "gone", "index": 0}), r"absent columns \['gone'\]"),
        (lambda m: m["state"].update(elbow={"column": "pos", "index": 0}), r"unknown names \['elbow'\]"),
        (lambda m: m["images"].update(primary="gone"), r"no camera columns \['gone'\]"),
    ):
        mapping = mapping_of()
        change(mapping)
        path.write_text(json.dumps(mapping))
        with pytest.raises(InputError, match=text):
            LeRobotReader(source)
    for change, text in (
        (lambda m: m["state"].update(right_x={"column": "pos", "index": 3}), r"\['pos'\] have fewer dimensions"),
        (lambda m: m["state"]["right_gripper"].pop("scale"), "right gripper .state. runs from"),
        (lambda m: m["state"].update(right_qw={"column": "quat", "index": 1}), "quaternion .* length 1"),
    ):
        mapping = mapping_of()
        change(mapping)
        path.write_text(json.dumps(mapping))
        with pytest.raises(InputError, match=text):
            LeRobotReader(source).episode(0)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot read .*map.json"):
        LeRobotReader(source)


def test_names_of_actions_from_poses(foreign):
    """A position without a rotation gives a translation alone; fingertips come by their own names."""
    source, _, path = foreign
    mapping = mapping_of()
    mapping["state"] = {k: v for k, v in mapping["state"].items() if k[6:] in "xyz"}
    mapping["state"]["left_thumb_x"] = {"column": "grip", "index": 0}
    path.write_text(json.dumps(mapping))
    reader = LeRobotReader(source)
    assert reader.action_names == ("right_x", "right_y", "right_z", "left_thumb_x")
    episode = reader.episode(0)
    np.testing.assert_allclose(episode["action"][:-1, 7:10], np.diff(episode["state"][:, 8:11], axis=0), atol=1e-6)
    assert (episode["action"][:, 10:14] == 0).all() and np.abs(episode["action"][:-1, 14]).max() > 0


def test_v21_with_missing_files(foreign):
    source, _, _ = foreign
    (Path(source.partition("@")[0]) / "meta/tasks.jsonl").unlink()
    with pytest.raises(InputError, match="cannot read .*tasks.jsonl"):
        LeRobotReader(source)


def test_sim_recording_is_read_as_it_is(sim_pick_place):
    """InternVLA-M1's simulated Franka: commanded poses, wxyz, gripper +1 = close, 30 fps, AV1."""
    reader = LeRobotReader(sim_pick_place)
    assert reader.lengths.tolist() == [412, 411, 398, 446] and reader.action_names == ARM_ACTION
    for i in range(4):
        episode = reader.episode(i)
        raw = pq.read_table(reader.root / f"data/chunk-000/episode_{i:06d}.parquet").to_pydict()
        state, action = episode["state"][:, 8:16], episode["action"][:, 7:14]
        position, quaternion = common.apply_action(state[:, :3], state[:, 3:7], action[:, :6])
        np.testing.assert_allclose(position, raw["action.eef_position"], atol=1e-5)
        target = Rotation.from_quat(np.array(raw["action.eef_quaternion"])[:, [1, 2, 3, 0]])
        assert (Rotation.from_quat(quaternion) * target.inv()).magnitude().max() < 1e-3
        np.testing.assert_array_equal(action[:, 6], np.ravel(raw["action.gripper_close"]) < 0)  # -1 opens
        # Commanded open at the start and the end, closed around the object in between; the fingers follow.
        assert (action[0, 6], action[-1, 6]) == (1, 1) and set(action[:, 6]) == {0, 1}
        assert state[action[:, 6] == 1, 7].mean() > 0.9 > 0.6 > state[action[:, 6] == 0, 7].mean()
        # The arm is where it was told to be a frame or two ago: 3 mm on average at 30 fps.
        assert np.linalg.norm(state[2:, :3] - position[:-2], axis=1).mean() < 0.006
        assert episode["task"].startswith("Move the ")


def test_sim_recording_pictures_and_windows(sim_pick_place):
    reader = LeRobotReader(sim_pick_place)
    assert reader.frames(3, "primary", [0, 300]).shape == (2, 480, 640, 3)
    np.testing.assert_array_equal(reader.frames(0, "primary", [200]), reader.frames(0, "primary", range(195, 203))[5:6])
    with pytest.raises(InputError, match="video.base_view/episode_000000.mp4 is absent.*choose another camera"):
        reader.frames(0, "base", [0])
    assert reader.frames(2, "base", [0]).shape == (1, 480, 640, 3)  # the one episode whose file is there
    windows = Windows([sim_pick_place], {"frames": View("primary", 4, 64)}, actions=3, hz=10, seed=0)
    sample = windows[0]
    assert windows.strides == [3] and sample["frames"].shape == (4, 3, 64, 64)
    assert (sample["frames"][:, :, :8] == 0).all()  # 4:3 keeps its aspect: black above and below
    assert sample["action"][sample["action_mask"]].abs().max() < 5
    fresh = stats.statistics(reader, 3)
    for key, value in fresh.items():
        for name in ("q01", "q99"):
            np.testing.assert_allclose(value[name], reader.stats[key][name], atol=1e-5, err_msg=f"stale {key}")


def test_stats_command_on_a_native_set(copy, capsys, monkeypatch):
    (copy / "meta/stats.json").unlink()
    monkeypatch.setattr(sys, "argv", ["stats", str(copy), "--stride", "2"])
    stats.main()
    numbers = json.loads((copy / "meta/stats.json").read_text())
    assert set(numbers) == {"action", "observation.state", "action.stride2", "action.stride4"}
    assert "q01" in capsys.readouterr().out
    original = json.loads((LeRobotReader(copy).root / "meta/stats.json").read_text())
    np.testing.assert_allclose(original["action"]["q99"], quantile_stats(np.concatenate(
        [LeRobotReader(copy).episode(i)["action"][:, 7:14] for i in range(10)]))["q99"])  # fmt: skip
    Windows([copy], VIEWS, 3, 5, 0)


# -- files on disk ------------------------------------------------------------------------------------------------


def test_videos_decode_everywhere(dataset):
    """h264, 4:2:0: what browsers and LeRobot's viewers play; a key frame at least every 8."""
    with av.open(str(dataset / "videos/observation.images.primary/chunk-000/file-000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        keys = [k for k, f in enumerate(container.decode(stream)) if f.key_frame]
    assert max(np.diff(keys)) <= 8


@pytest.mark.parametrize("name", ["tasks.parquet", "subtasks.parquet", "episodes/chunk-000/file-000.parquet"])
def test_metadata_cut_short_is_named(tmp_path, name):
    root = tmp_path / "data"
    shutil.copytree(Path(common.__file__).parent / "data/tiny", root)
    path = root / "meta" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot read.*copy the file again"):
        LeRobotReader(root)


def test_a_recording_never_goes_into_a_folder_of_something_else(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="checkpoints.*another --out"):
        LeRobotWriter(tmp_path / "run", cameras={"primary": (32, 32)}, resume=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoints"]
