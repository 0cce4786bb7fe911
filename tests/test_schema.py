"""Metadata of a data set that are not what LeRobot's format says: one clear InputError at the door, never a traceback,
and never data that were read wrongly."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_episode
from test_data import mapping_of, rewrite, write_v21

from common import ARM_ACTION, InputError
from data.lerobot import DamagedEpisode, LeRobotReader, _Video

KEY = "observation.images.primary"


@pytest.fixture(scope="module")
def original(dataset, tmp_path_factory) -> Path:
    return Path(shutil.copytree(dataset, tmp_path_factory.mktemp("v3") / "set"))


@pytest.fixture
def v3(original):
    """The set, whose metadata a test may change: they are put back."""
    kept = {p: p.read_bytes() for folder in ("meta", "data") for p in (original / folder).rglob("*.*")}
    yield original
    for path, data in kept.items():
        path.write_bytes(data)


def refused(source, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        reader = LeRobotReader(source)
        reader.normalizers()
        reader.episode(0)
        reader.frames(0, reader.cameras[0], [0])
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def names(info, change):
    info["features"]["action"]["names"] = change(list(ARM_ACTION))


@pytest.mark.parametrize("change, text", [
    (lambda i: names(i, lambda n: [*n[:-1], n[0]]), "action: names right_x twice"),
    (lambda i: names(i, lambda n: n[:-1]), r"action .* 6 names for 7 columns"),
    (lambda i: names(i, lambda n: [*n, "left_x"]), r"action .* 8 names for 7 columns"),
    (lambda i: names(i, lambda n: [*n[:-1], 7]), r"action.names"),
    (lambda i: names(i, lambda n: "right_x"), r"action.names"),
    (lambda i: names(i, lambda n: {"motors": "right_x"}), r"action.names"),
    (lambda i: i["features"]["action"].pop("shape"), r"action .* 7 names for \? columns"),
    (lambda i: i["features"]["action"].update(shape="7"), r"action.shape is '7'"),
    (lambda i: i["features"]["action"].update(shape=[7.5]), r"action.shape\[0\] is 7.5"),
    (lambda i: i["features"].update(action=[1]), r"features.action is \[1\]"),
    (lambda i: i.update(features=[1, 2]), r"features is \[1, 2\]"),
    (lambda i: i.update(fps=0), r"fps is 0, .* number above 0"),
    (lambda i: i.update(fps="10"), r"fps is '10'"),
    (lambda i: i.update(fps=True), "fps is True"),
    (lambda i: i.update(fps=float("nan")), "fps is nan"),
    (lambda i: i.update(fps=-10), "fps is -10"),
    (lambda i: i.update(fps=10**400), "fps is 1000"),
    (lambda i: i.pop("fps"), "lacks fps"),
    (lambda i: i.update(codebase_version=["v3.0"]), "format .*v3.0.* is not supported"),
    *((lambda i, k=k, p=p: i.update({k: p}), f"{k} is .*, and must be a path") for k, p in itertools.product(
        ("data_path", "video_path"),
        ("../{chunk_index}/x.mp4", "/tmp/x.mp4", "{nothing}.mp4", "{x:99999d}", "{chunk_index:99999d}.mp4",
         "{chunk_index.__class__}", "{chunk_index!r}", "{chunk_index:{file_index}}", "{}", "{", "a\0b", None, 3, []),
    )),
    *((lambda i, k=k: i["features"].update({f"observation.images.{k}": {}}), "images.* name of a column") for k in (
        "a/../../../x", "\0",
    )),
    (lambda i: i.update(data_path="{video_key}.parquet"), "data_path is .*chunk_index"),
])  # fmt: skip
def test_info(v3, change, text):
    rewrite(v3 / "meta/info.json", change)
    refused(v3, text)


@pytest.mark.parametrize("text", ["[1, 2]", "7", "null", '"x"', "\x00\xff", "[" * 100_000, "{"])
@pytest.mark.parametrize("name", ["info", "stats"])
def test_files_that_hold_something_else(v3, name, text):
    (v3 / f"meta/{name}.json").write_bytes(text.encode("latin-1"))
    refused(v3, f"{name}.json")


@pytest.mark.parametrize("value", [
    [0.0] * 6, [[0.0]] * 7, ["x"] * 7, [None] * 7, 3, None, {"a": 1}, [0.0] * 6 + [[1, 2]], [float("nan")] * 7,
])  # fmt: skip
def test_statistics_that_do_not_fit(v3, value):
    rewrite(v3 / "meta/stats.json", lambda s: s["action"].update(q01=value))
    refused(v3, f"statistics in {v3}.* run `python -m data.stats")
    rewrite(v3 / "meta/stats.json", lambda s: s.update(action=value))
    refused(v3, "stats.json: action is|no q01/q99 statistics" if isinstance(value, dict) else "stats.json: action is")


@pytest.mark.parametrize("change, text", [
    (lambda r: r.pop("length"), "lacks length"),
    (lambda r: r.update(length=-1), r"\[0\].length is -1"),
    (lambda r: r.update(length=0), r"\[0\].length is 0"),
    (lambda r: r.update(length=None), r"\[0\].length is None"),
    (lambda r: r.update(tasks="close the oven"), r"tasks is 'close"),
    (lambda r: r.update(episode_index=1), "episode 1 twice"),
    (lambda r: r.pop("data/file_index"), "lacks data/file_index"),
    (lambda r: r.update({"data/file_index": -1}), "data/file_index is -1"),
    (lambda r: r.pop(f"videos/{KEY}/from_timestamp"), "lacks videos/.*/from_timestamp"),
    (lambda r: r.update({f"videos/{KEY}/from_timestamp": float("nan")}), "from_timestamp is nan"),
    (lambda r: r.pop(f"videos/{KEY}/chunk_index"), "lacks videos/.*/chunk_index"),
])  # fmt: skip
def test_list_of_episodes(v3, change, text):
    path = v3 / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    kept = dict(rows[0])
    change(rows[0])
    kinds = {k for k in kept if type(kept[k]) is not type(rows[0].get(k)) and rows[0].get(k) is not None}
    for row in rows[1:]:  # a column has one type, and either all rows have it or none
        for key in kept.keys() - rows[0].keys():
            row.pop(key)
        for key in kinds:
            row[key] = rows[0][key]
    pq.write_table(pa.Table.from_pylist(rows), path)
    refused(v3, text)


def replaced(path: Path, name: str, values) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), path)


@pytest.mark.parametrize("name, values, text", [
    ("subtask_index", [99] * 18, "episode 0 has the subtask 99 of 2"),
    ("subtask_index", [-1] * 18, "episode 0 has the subtask -1 of 2"),
    ("subtask_index", [None] + [0] * 17, "episode 0 has the subtask None of 2"),
    ("task_index", [-1] * 18, "episode 0 has the task -1 of 2"),
    ("task_index", [[0]] * 18, "episode 0 has the task .0. of 2"),
    ("task_index", ["0"] * 18, "episode 0 has the task 0 of 2"),
    ("episode_index", ["0"] * 18, "holds 0 of the 18 steps of episode 0"),
    ("episode_index", [[0]] * 18, "holds 0 of the 18 steps of episode 0"),
    ("episode_index", [None] + [0] * 17, "holds 17 of the 18 steps of episode 0"),
])  # fmt: skip
def test_table_of_an_episode(v3, name, values, text):
    path = v3 / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 18), path)
    replaced(path, name, values)
    with pytest.raises(DamagedEpisode, match=text):
        LeRobotReader(v3).episode(0)


def test_a_table_with_a_column_twice(v3):
    path = v3 / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("action", table["action"]), path)
    with pytest.raises(InputError, match="file-000.parquet"):
        LeRobotReader(v3).episode(0)


def test_poses_of_a_moving_camera(v3):
    """Seven finite numbers with a quaternion, or the episode is damaged."""
    path = v3 / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    rewrite(v3 / "meta/info.json", lambda i: i["features"].update({"observation.camera": {"shape": [7]}}))
    good = [0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 1.0]
    for row, fine in ((good, True), (good[:6], False), ([float("nan"), *good[1:]], False), ([*good[:6], 2.0], False)):
        pq.write_table(table.append_column("observation.camera", pa.array([row] * len(table))), path)
        if fine:
            assert LeRobotReader(v3).episode(0)["camera"].shape == (18, 7)
        else:
            with pytest.raises(DamagedEpisode, match="observation.camera in episode 0 is no list of poses"):
                LeRobotReader(v3).episode(0)


def test_rows_of_an_episode_need_not_lie_together(v3, episodes):
    path = v3 / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(0, 9), table.slice(18), table.slice(9, 9)]), path)
    np.testing.assert_array_equal(LeRobotReader(v3).episode(0)["action"][:, 7:14], episodes[0]["action"])


def test_texts_are_found_by_their_number(v3):
    """Sets that others have filtered have gaps in the list of tasks."""
    path = v3 / "meta/tasks.parquet"
    pq.write_table(pa.table({"task_index": [7, 0], "__index_level_0__": ["wave", "pick up the red cup"]}), path)
    data = v3 / "data/chunk-000/file-000.parquet"
    table = pq.read_table(data)
    replaced(data, "task_index", np.where(np.array(table["task_index"]) == 1, 7, 0))
    reader = LeRobotReader(v3)
    assert [reader.episode(i)["task"] for i in (0, 1)] == ["pick up the red cup", "wave"]
    pq.write_table(pa.table({"kind": ["x", "y"], "task_index": [7, 0], "task": ["wave", "lift"]}), path)
    assert LeRobotReader(v3).tasks == {7: "wave", 0: "lift"}
    for columns, text in (
        ({"task_index": [0, 0], "t": ["a", "b"]}, "task_index 0 twice"), ({"i": [0], "t": ["a"]}, "lacks task_index"),
        ({"task_index": [0]}, "lacks task$|lacks task;"), ({"task_index": [0], "t": [5]}, "task is 5"),
    ):  # fmt: skip
        pq.write_table(pa.table(columns), path)
        refused(v3, text)


# -- v2.1 and mappings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign_original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("v21") / "set"
    return write_v21(root, [make_episode(k, n=12 + k) for k in range(2)], {"pos": {}, "quat": {}, "grip": {}})


@pytest.fixture
def v21(foreign_original):
    kept = {p: p.read_bytes() for p in (foreign_original / "meta").glob("*")}
    yield foreign_original
    for path, data in kept.items():
        path.write_bytes(data)


def mapped(root: Path, folder: Path, mapping) -> str:
    (folder / "m.json").write_text(json.dumps(mapping))
    return f"{root}@{folder / 'm.json'}"


@pytest.mark.parametrize("name, change, text", [
    ("info", lambda i: i.update(chunks_size=0), "chunks_size is 0"),
    ("info", lambda i: i.update(chunks_size="x"), "chunks_size is 'x'"),
    ("info", lambda i: i.update(data_path="{chunk_index}"), "data_path is .*episode_chunk"),
    ("episodes", lambda r: r.update(episode_index="0"), r"\[0\].episode_index is '0'"),
    ("episodes", lambda r: r.update(length=None), r"\[0\].length is None"),
    ("episodes", lambda r: r.update(length=-3), r"\[0\].length is -3"),
    ("episodes", lambda r: r.update(length=True), r"\[0\].length is True"),
    ("episodes", lambda r: r.pop("length"), "lacks length"),
    ("tasks", lambda r: r.pop("task_index"), "lacks task_index"),
    ("tasks", lambda r: r.update(task_index="x"), "task_index is 'x'"),
    ("tasks", lambda r: r.update(task=None), "task is None"),
])  # fmt: skip
def test_v21(v21, tmp_path, name, change, text):
    path = next((v21 / "meta").glob(f"{name}.json*"))
    first, _, rest = path.read_text().partition("\n") if name != "info" else (path.read_text(), "", "")
    value = json.loads(first)
    change(value)
    path.write_text(f"{json.dumps(value)}\n{rest}")
    refused(mapped(v21, tmp_path, mapping_of() | {"stats": {}}), text)
    if name != "info":
        path.write_text("[1]\n")
        refused(mapped(v21, tmp_path, mapping_of()), r"jsonl: \[0\] is \[1\]")


@pytest.mark.parametrize("change, text", [
    (lambda m: m["state"]["right_x"].pop("index"), "state.right_x lacks index"),
    (lambda m: m["state"]["right_x"].pop("column"), "state.right_x lacks column"),
    (lambda m: m["state"]["right_x"].update(index=-1), "right_x.index is -1"),
    (lambda m: m["state"]["right_x"].update(index="0"), "right_x.index is '0'"),
    (lambda m: m["state"]["right_x"].update(index=0.0), "right_x.index is 0.0"),
    (lambda m: m["state"]["right_x"].update(column=["pos"]), r"right_x.column is \['pos'\]"),
    (lambda m: m["state"]["right_x"].update(scale="2"), "right_x.scale is '2'"),
    (lambda m: m["state"]["right_x"].update(offset=None), "right_x.offset is None"),
    (lambda m: m["state"]["right_x"].update(scale=float("inf")), "right_x.scale is inf"),
    (lambda m: m["state"]["right_x"].update(scal=2), r"state.right_x has the unknown \['scal'\]"),
    (lambda m: m.update(acton={}), r"has the unknown \['acton'\]"),
    (lambda m: m.update(state=[1]), r"state is \[1\]"),
    (lambda m: m["state"].update(right_x="pos"), "state.right_x is 'pos'"),
    (lambda m: m.update(images=["observation.images.cam"]), "images is "),
    (lambda m: m.update(images={"primary": 3}), "images.primary is 3"),
    (lambda m: m.pop("images"), "lacks images"),
    (lambda m: m.update(stats=[]), r"stats is \[\]"),
    (lambda m: m.update(stats={"action": 3}), "stats.action is 3"),
])  # fmt: skip
def test_mappings(v21, tmp_path, change, text):
    mapping = mapping_of()
    change(mapping)
    refused(mapped(v21, tmp_path, mapping), text)


# -- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [5, 9, 11, 12, 20, 30])
@pytest.mark.parametrize("timestamps", [True, False])
def test_a_wrong_rate_is_never_read(v3, fps, timestamps):
    """Pictures and steps are found by the rate: a wrong one gives those of other times. The table's clock gives it
    away, and without one the video's."""
    if not timestamps:
        for path in (v3 / "data").rglob("*.parquet"):
            pq.write_table(pq.read_table(path).drop_columns(["timestamp"]), path)
    rewrite(v3 / "meta/info.json", lambda i: i.update(fps=fps))
    reader = LeRobotReader(v3)
    for i in (0, 1, 9):
        with pytest.raises(DamagedEpisode, match=f" run.* at 10 Hz.*meta/info.json is {fps}: correct it"):
            reader.episode(i)
            assert not timestamps
            reader.frames(i, "primary", [0])


def test_irregular_clocks_are_read(v3, episodes):
    """Real ones jitter, pause, start anywhere, or were rounded away."""
    rng, path = np.random.default_rng(0), v3 / "data/chunk-000/file-000.parquet"
    rows = len(pq.read_table(path))
    even = np.arange(rows) / 10
    for clock in (
        even + rng.uniform(-0.03, 0.03, rows), even + 3.7, np.where(np.arange(rows) > 8, even + 2, even), even * 1.03,
        np.zeros(rows), np.full(rows, np.nan), (1.7e9 + even).astype(np.float32), np.array(["noon"] * rows),
    ):  # fmt: skip
        replaced(path, "timestamp", clock)
        reader = LeRobotReader(v3)
        np.testing.assert_array_equal(reader.episode(0)["action"][:, 7:14], episodes[0]["action"])
        reader.frames(0, "primary", range(18))


@pytest.mark.parametrize("told, rate, fine", [(30, 29.97, True), (29.97, 30, True), (30, 25, False)])
def test_nominal_rates(v21, tmp_path, told, rate, fine):
    """A rate is often told as a round number. Pictures of a long episode may not drift from their steps for that."""
    rewrite(v21 / "meta/info.json", lambda i: i.update(fps=told))
    path = v21 / "videos/chunk-000/observation.images.cam/episode_000000.mp4"
    kept = path.read_bytes()
    video = _Video(path, (32, 32), rate)
    video.add(make_episode(0, n=12)["frames"]["primary"])
    video.close()
    reader = LeRobotReader(mapped(v21, tmp_path, mapping_of()))
    if fine:
        brightness = reader.frames(0, "primary", range(12))[..., 2].astype(float).mean((1, 2))
        np.testing.assert_allclose(brightness, 3 * np.arange(12), atol=4)
    else:
        with pytest.raises(DamagedEpisode, match="episode_000000.mp4 runs at 25 Hz.* 30"):
            reader.frames(0, "primary", [0])
    path.write_bytes(kept)
