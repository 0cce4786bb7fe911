"""The mixture of Table 6: weights, sampling, resuming, sources without actions, and what is said about them."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import Alone, make_episode, write_set

from common import ARM_ACTION, InputError
from data import mixture, rlds, stats
from data.lerobot import LeRobotReader, LeRobotWriter
from data.mixture import TABLE6, expand, present, report, summary
from data.quantiles import RATES, action_key
from data.windows import View, Windows, check_resume, collate, stream

WEIGHTS = np.array([row.percent for row in TABLE6]) / 107.95


def link(folder, source, names) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).symlink_to(source)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A data set small enough to stand for any."""
    return write_set(tmp_path_factory.mktemp("small") / "set", [make_episode(k, n=6) for k in range(2)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
    """A folder with all 29 sources."""
    folder = tmp_path_factory.mktemp("mix") / "pretrain"
    link(folder, small, [row.name for row in TABLE6])
    return folder


def windows_of(*data, weights=(), seed=0, **options) -> Windows:
    sources, weights = expand([str(d) for d in data], weights)
    return Windows(sources, {}, 2, 10, seed, weights, **options)


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_the_papers():
    assert len(TABLE6) == 29 == len({row.name for row in TABLE6}) == len({row.title for row in TABLE6})
    assert sum(row.percent for row in TABLE6) == pytest.approx(107.95)
    of = {row.title: row.percent for row in TABLE6}
    golden = {"Fractal": 12.8, "Kuka": 12.8, "Bridge": 11.8, "EgoDex": 11.1, "Berkeley Fanuc Manipulation": 7.8,
              "FMB Dataset": 7.1, "AgiBoT-alpha": 6.3, "DROID": 0.05, "UCSD Kitchen Dataset": 0.05}  # fmt: skip
    assert {k: of[k] for k in golden} == golden


def test_the_converter_knows_the_tables_names_and_rates():
    rows = {row.name: row for row in TABLE6 if row.converter == "data.rlds"}
    for name in rows.keys() & rlds.SOURCES.keys():
        assert rlds.SOURCES[name].hz == rows[name].hz, name
    assert "bridge_dataset" in rlds.SOURCES and len(rows) == 27


def test_the_default_of_both_stages():
    import distill
    import lam

    assert lam.Args().data == distill.Args().data == (mixture.FOLDER,)


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_frequencies_over_100_000_draws(whole, seed):
    """Within 1 % of each weight; of the three that are 0.05 % of the mixture, 46 draws, within two draws."""
    windows = windows_of(whole, seed=seed)
    np.testing.assert_allclose(windows.weights, WEIGHTS)
    drawn = np.bincount([windows.choose(i) for i in range(100_000)], minlength=29)
    for count, weight, row in zip(drawn, WEIGHTS, TABLE6, strict=True):
        assert abs(count - weight * 100_000) < max(0.01 * weight * 100_000, 2), row.title
    late = np.bincount([windows.choose(10**12 + i) for i in range(10_000)], minlength=29)
    assert np.abs(late / 10_000 - WEIGHTS).max() < 0.001  # and far into the stream
    assert [windows.draw(i, pictures=False)["dataset"] for i in range(50)] == [windows.choose(i) for i in range(50)]


def test_the_set_says_nothing_about_the_window(whole):
    """Which set a sample is from and which of its frames it shows are independent."""
    windows = windows_of(whole)
    samples = [windows.draw(i, pictures=False) for i in range(3000)]
    first = [s["window"] for s in samples if s["dataset"] == 0]
    assert set(Counter(first)) == set(range(10)) and max(Counter(first).values()) < 2 * len(first) / 10


def test_every_batch_is_the_mixture(whole):
    """Each 512 samples hold each source as often as its weight says, to within three: also on two ranks."""
    windows = windows_of(whole)
    for step in (0, 7, 12_345):
        drawn = np.bincount([windows.choose(step * 512 + i) for i in range(512)], minlength=29)
        assert np.abs(drawn - WEIGHTS * 512).max() < 3


def samples_of(folder, process, start, steps, workers, world=1):
    """(dataset, window, instruction) of each sample of steps start .. start + steps, in the order of their numbers."""
    out = {}
    for rank in range(world):
        here = Alone(rank, world, process.device, process.dtype)
        data = stream(windows_of(folder, seed=3), 8 // world, start, here, 1, workers)
        for _ in range(steps):
            for batch in next(data):
                rows = zip(batch["dataset"].tolist(), batch["window"].tolist(), batch["instruction"], strict=True)
                out |= dict(zip(batch["index"].tolist(), rows, strict=True))
    return [out[i] for i in range(start * 8, (start + steps) * 8)]


def test_the_stream_goes_on_where_it_stopped(whole, process):
    """Interrupted after three steps, with other numbers of workers and of ranks before and after."""
    wanted = samples_of(whole, process, 0, 6, workers=0)
    assert len({d for d, _, _ in wanted}) > 8
    assert samples_of(whole, process, 0, 3, workers=2) == wanted[:24]
    assert samples_of(whole, process, 3, 3, workers=0) == samples_of(whole, process, 3, 3, 0, world=2) == wanted[24:]


# -- what is there ----------------------------------------------------------------------------------------------------


@pytest.fixture
def some(tmp_path, small):
    """Three of the sources, one of which needs a mapping, and a data set that is not in Table 6."""
    link(tmp_path / "pretrain", small, ["bridge_dataset", "kuka", "mine"])
    mapped = write_set(tmp_path / "pretrain/droid", [make_episode(5, n=8)], fps=15)
    info = json.loads((mapped / "meta/info.json").read_text())
    for key in ("action", "observation.state"):
        info["features"][key]["names"] = None
    (mapped / "meta/info.json").write_text(json.dumps(info))
    columns = {n: {"column": "action", "index": i} for i, n in enumerate(ARM_ACTION)}
    mapping = {"images": {"primary": "observation.images.primary"}, "state": {}, "action": columns}
    path = mapped.with_name("droid.json")
    path.write_text(json.dumps(mapping))
    mapping["stats"] = stats.statistics(LeRobotReader(f"{mapped}@{path}"), 2)
    path.write_text(json.dumps(mapping))
    return tmp_path / "pretrain"


def test_missing_sources_leave_their_share_to_the_others(some):
    windows = windows_of(some)
    assert [r.root.name for r in windows.readers] == ["kuka", "bridge_dataset", "droid"]
    np.testing.assert_allclose(windows.weights, np.array([12.8, 11.8, 0.05]) / 24.65)
    text = summary([str(some)], windows)
    assert "3 of 29 sources of Table 6, 24.65 of the paper's 107.95 %" in text
    assert "Fractal 12.8 %" in text and "left out, not in Table 6: mine" in text and "Kuka 12.8" not in text
    assert "kuka has 10 Hz" not in text and "bridge_dataset has 10 Hz, and 5 Hz were expected" in text
    assert "2 episodes, 0.000333 hours" in text and "weight 0.519" in text


def test_the_list(some, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mixture", str(some)])
    mixture.main()
    out = capsys.readouterr().out
    assert f"python -m data.rlds PATH_OF_FRACTAL20220817 --out {some}/fractal20220817_data" in out
    assert "python -m data.egodex PATH_OF_EGODEX" in out and "< 0.1 %   0.20%" in out
    monkeypatch.setattr(sys, "argv", ["mixture", str(some / "nowhere")])
    mixture.main()
    assert "107.95" in capsys.readouterr().out


def test_a_mixture_beside_other_data(some, small):
    """The folder's data sets share its weight as Table 6 has it."""
    sources, weights = expand([str(some), str(small)], [3, 1])
    assert sources[-1] == str(small) and len(sources) == 4 and sum(weights) == pytest.approx(4)
    np.testing.assert_allclose(weights, [3 * 12.8 / 24.65, 3 * 11.8 / 24.65, 3 * 0.05 / 24.65, 1])
    assert expand([str(small), str(small)], []) == ([str(small)] * 2, [])  # no mixture: as it was given


def test_bad_input(some, small, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="needs a --weights for each"):
        expand([str(some), str(small)])
    with pytest.raises(InputError, match="needs a --weights for each"):
        expand([str(some)], [1, 2])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is no data set .* `python -m data.mixture .*empty`"):
        expand([str(tmp_path / "empty")])
    monkeypatch.chdir(tmp_path)  # the default, where nobody has put data yet
    with pytest.raises(InputError, match="python -m data.mixture datasets/pretrain"):
        expand([mixture.FOLDER])
    with pytest.raises(InputError, match="no LeRobot data set at nowhere"):
        windows_of("nowhere")


def test_a_run_does_not_resume_on_another_mixture(some, tmp_path):
    then = windows_of(some)
    (tmp_path / "meta.json").write_text(json.dumps({"stage": "lam", "step": 1, "statistics": then.statistics()}))
    check_resume(tmp_path, windows_of(some))
    (some / "kuka").unlink()
    with pytest.raises(InputError, match="kuka.*or no longer are"):
        check_resume(tmp_path, windows_of(some))


# -- sources without actions -------------------------------------------------------------------------------------------


@pytest.fixture
def video_only(tmp_path):
    made = [make_episode(k, n=9) for k in range(2)]
    for episode in made:
        episode["action"], episode["state"] = (np.zeros((9, 0), np.float32) for _ in "as")
    return write_set(tmp_path / "pretrain/egodex", made, action_names=(), state_names=())


def test_a_source_without_actions(video_only, small):
    link(video_only.parent, small, ["kuka"])
    sources, weights = expand([str(video_only.parent)])
    windows = Windows(sources, {"video": View("primary", 3, 32)}, 2, 5, 0, weights)
    assert "video without actions" in windows.summary() and windows.weights[1] == pytest.approx(11.1 / 23.9)
    batch = collate([windows[i] for i in range(16)])
    free = batch["dataset"] == 1
    assert free.any() and not free.all()
    assert not batch["action_mask"][free].any() and not batch["state_mask"][free].any()
    assert batch["action_mask"][~free].any() and torch.isfinite(batch["action"]).all()
    assert (batch["action"][free] == 0).all() and batch["video"][free].float().std() > 0
    reader = LeRobotReader(video_only)
    assert (reader.action_names, reader.state_names, reader.stats) == ((), (), {})
    with LeRobotWriter(video_only, cameras={k: (32, 32) for k in ("primary", "wrist")}, action_names=(),
                       state_names=(), resume=True) as writer:  # fmt: skip
        assert writer.num_episodes == 2


def test_video_alone_has_to_be_said(video_only, tmp_path, monkeypatch):
    """Columns that nobody named are a mistake, not a video."""
    info = video_only / "meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"action_free": False}))
    with pytest.raises(InputError, match="neither `observation.state` nor `action`"):
        LeRobotReader(video_only)
    path = tmp_path / "video.json"
    path.write_text(json.dumps({"images": {"primary": "observation.images.primary"}, "state": {}, "action": {}}))
    source = f"{video_only}@{path}"
    assert not windows_of(source)[0]["action_mask"].any()
    monkeypatch.setattr(sys, "argv", ["stats", source])
    with pytest.raises(InputError, match="video alone"):
        stats.main()


def test_a_rate_without_actions_still_gives_windows_at_any_stride(video_only):
    assert windows_of(video_only).strides == [1]
    sources, weights = expand([str(video_only)])
    assert Windows(sources, {}, 2, 3, 0, weights).strides == [3]  # no statistics are needed


# -- statistics that come with the data --------------------------------------------------------------------------------


RATES_OF = [(10, {1, 2, 4}), (30, {1, 3, 6, 12}), (5, {1, 2}), (15, {1, 2, 3, 6})]


@pytest.mark.parametrize(("fps", "strides"), RATES_OF)
def test_written_data_have_the_statistics_of_all_rates(tmp_path, fps, strides):
    """10 Hz for the full run, 5 for --small, 2.5 for reproduce.py: without a command in between, and the same that the
    command gives."""
    made = [make_episode(k, n=14 + k) for k in range(3)]
    root = write_set(tmp_path / "set", made, fps=fps, per_file=2)
    reader = LeRobotReader(root)
    assert set(reader.stats) == {"observation.state", *(action_key(n) for n in strides)}
    assert reader.stats == stats.statistics(reader, *strides)
    for hz in RATES:
        Windows([root], {}, 2, hz, 0)


def test_a_report_counts_what_is_there(whole):
    assert report(whole).startswith(f"mixture of {whole}: 29 of 29 sources") and "missing" not in report(whole)
    assert len(present(whole)) == 29
