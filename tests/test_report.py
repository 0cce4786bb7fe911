"""The tables of the evidence, from made-up results."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
from scipy import stats

import common
import report
from common import InputError
from franka import Film
from reproduce import TASKS, fingerprint

STAGE_ARGS = {"finetune": {"steps": 100, "episodes": 0}, "lam": {"steps": 50, "uad": True}, "evaluate": {"seed": 1000}}


def write(folder, name, stage, needs=(), own=(), cells=None, **args):
    """A unit's result as reproduce.py writes it."""
    args = STAGE_ARGS[stage] | args
    marks = {n: json.loads((folder / f"{n}.json").read_text())["fingerprint"] for n in needs}
    record = {"unit": name, "stage": stage, "args": args, "own": list(own), "needs": marks, "seconds": 3600.0,
              "fingerprint": fingerprint(args, marks), "finished": True, "commit": "abc",
              "hardware": ("2 cores" if stage == "lam" else "1 core") + " of a CPU"}
    if stage == "lam":
        record["curve"] = {"step": [0, 25, 50], "val_frame": [3.0, 2.0, 1.0], "val_action": [2.0, 1.0, 0.5]}
    folder.mkdir(exist_ok=True)
    common.write_json(folder / f"{name}.json", record | ({"cells": cells} if cells else {}))


def cells(method, n, outcomes, seed=0, tasks=TASKS):
    """The same outcomes in each task."""
    return [{"experiment": "a", "method": method, "task": t, "demonstrations": n, "seed": seed, "trials": len(outcomes),
             "successes": outcomes.count("1"), "outcomes": outcomes} for t in tasks]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "small"
    write(made, "lam_latbot", "lam")
    write(made, "policy_latbot_10", "finetune", ["lam_latbot"], ["episodes"], episodes=50)
    write(made, "policy_none_10", "finetune", own=["episodes"], episodes=50)
    write(made, "trials_latbot_10", "evaluate", ["policy_latbot_10"], cells=cells("latbot", 10, "1111011110"))
    write(made, "trials_none_10", "evaluate", ["policy_none_10"], cells=cells("none", 10, "0100010000"))
    return made


def test_paired_statistics():
    """By hand; the interval is the worked example of Newcombe's paper (36, 12, 2, 0: 0.0569 to 0.3404)."""
    first, second = dict.fromkeys(TASKS[:2], "1100"), dict.fromkeys(TASKS[:1], "1010") | {TASKS[4]: "1111"}
    assert report.pairs(first, second) == (1, 1, 1, 1)
    flips = lambda b, c: report.sign_flips([1] * b + [0] * 3 + [-1] * c)  # of single policies: McNemar's test
    assert flips(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert flips(0, 0) == flips(3, 3) == 1 and flips(2, 8) == flips(8, 2)
    assert report.sign_flips([3, -1, 0]) == 1 and report.sign_flips([2, 1, 1]) == 2 / 8
    assert report.newcombe(36, 12, 2, 0) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    assert report.newcombe(10, 5, 1, 4) == pytest.approx((0.2, -0.0455, 0.4136), abs=2e-4)  # phi = 25 / 86.2
    delta, low, high = report.newcombe(36, 2, 12, 0)
    assert (delta, low, high) == pytest.approx((-0.2, -0.3404, -0.0569), abs=5e-5)
    assert report.newcombe(0, 10, 0, 0)[0] == 1 and -0.1 < report.newcombe(0, 0, 0, 40)[1] < 0
    # Proportions that agree in most pairs are known to differ more precisely than as many that do not.
    width = lambda *n: report.newcombe(*n)[2] - report.newcombe(*n)[1]
    assert width(40, 10, 0, 50) < width(20, 30, 20, 30)


def test_a_placement_met_again_is_no_new_one():
    """Three policies that do alike everywhere tell no more than one; where they do not, each trial counts."""
    once = {TASKS[0]: ("1100000000",), TASKS[1]: ("1111100000",)}
    alike = {task: trials * 3 for task, trials in once.items()}
    assert report.rate_interval(once) == common.wilson(7, 20)
    assert report.rate_interval(alike) == pytest.approx(common.wilson(7, 20))
    assert report.rate_interval({TASKS[0]: ("1100000000", "0011000000", "0000110000")}) == common.wilson(6, 30)
    assert report.rate_interval({TASKS[0]: ("1" * 10,) * 3}) == pytest.approx(common.wilson(10, 10))
    none = {t: ("0000000000",) * 3 for t in TASKS[:2]}
    delta, low, high, p = report.difference_interval(alike, none)
    assert delta == pytest.approx(0.35) and p == pytest.approx(2 / 2**7)
    half = 1.96 * np.std([1] * 7 + [0] * 13, ddof=1) / 20**0.5
    assert (low, high) == pytest.approx((delta - half, delta + half))
    single = {t: none[t][:1] for t in none}
    assert report.difference_interval(once, single)[1:3] == report.newcombe(0, 7, 0, 13)[1:]
    # As many policies or not: a placement's mean of three against that of one.
    assert report.difference_interval(alike, single) == pytest.approx((delta, low, high, p))
    assert report.difference_interval(single, alike)[:3] == pytest.approx((-delta, -high, -low))
    # Where no placement differs, or all do alike, the interval is that of a placement once, and not a point.
    assert report.difference_interval(alike, once)[:3] == pytest.approx(report.newcombe(7, 0, 0, 13))
    thirds, ones = {TASKS[0]: ("1" * 10, "0" * 10, "0" * 10)}, {TASKS[0]: ("1" * 10,)}
    assert report.difference_interval(thirds, ones)[:3] == pytest.approx(report.newcombe(10 / 3, 0, 20 / 3, 0))


def test_unequal_numbers_of_policies():
    """Three against two, by hand: the placements' mean rates, and each policy's own."""
    first = {TASKS[0]: ("1110", "1100", "1000"), TASKS[1]: ("0001", "0000", "0001")}
    second = {TASKS[0]: ("0000", "1000"), TASKS[1]: ("1000", "0000")}
    d = np.array([1 - 1 / 2, 2 / 3, 1 / 3, 0, -1 / 2, 0, 0, 2 / 3])
    delta, low, high, p = report.difference_interval(first, second)
    half = 1.96 * d.std(ddof=1) / 8**0.5
    assert (delta, low, high) == pytest.approx((d.mean(), d.mean() - half, d.mean() + half))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    assert p == pytest.approx(np.mean(np.abs(d @ signs) > abs(d.sum()) - 1e-9))
    rates, others = np.array([4, 2, 2]) / 8, np.array([1, 1]) / 8
    low, high, p = report.by_policies(first, second)
    spread = 4.303 * rates.std(ddof=1) / 3**0.5  # the others do not differ: two degrees of freedom
    delta = rates.mean() - others.mean()
    assert (low, high) == pytest.approx((delta - spread, delta + spread), abs=1e-3) and 0.05 < p < 0.2
    apart, ours = ([48, 53, 54], [43, 32, 45]), lambda x: {TASKS[0]: tuple("1" * k + "0" * (100 - k) for k in x)}
    test = stats.ttest_ind(*apart, equal_var=False)
    low, high = (x / 100 for x in test.confidence_interval())
    assert report.by_policies(*map(ours, apart)) == pytest.approx((low, high, test.pvalue))
    assert report.by_policies(first, {t: x[:1] for t, x in second.items()}) is None
    assert report.by_policies({t: x[:1] * 2 for t, x in first.items()}, second) is None
    assert report.difference_interval({TASKS[0]: ("1" * 9 + "0",) * 2}, {TASKS[0]: ("0" * 10,) * 2})[2] == 1


def test_points():
    shown = [report.points(x) for x in (0.124, -0.06, 0.0, -0.0004, -0.004, 0.0006, -0.01)]
    assert shown == ["+12", "-6", "0", "0", "-0.4", "+0.1", "-1"]


def test_each_task_is_compared_by_itself(folder):
    """Tasks that differ, and no row twice."""
    write(folder, "policy_latbot_10_s2", "finetune", ["lam_latbot"], ["episodes"], episodes=50)
    apart = [c for task, text in zip(TASKS, ("1111111111", "0000000000", "1111100000", "1000000000", "0100010000"),
                                     strict=True) for c in cells("latbot", 10, text, 2, [task])]  # fmt: skip
    write(folder, "trials_latbot_10_s2", "evaluate", ["policy_latbot_10_s2"], cells=apart)
    write(folder, "trials_uad_10", "evaluate", cells=cells("uad", 10, "0000000000"))
    made = report.tables(report.load(folder)[0])
    row = next(line for line in made["by_task"].splitlines() if line.startswith("| LatBot against no"))
    assert [cell.split(" (")[0] for cell in row.split(" | ")[2:]] == ["+70", "+20", "+45", "+25", "+30"]
    assert "–" not in row and ";" not in row  # one policy of the other: none by policies
    rows = made["paired"].splitlines()[2:]
    assert len(rows) == len(set(rows)) and sum(line.startswith("| + UAD against no") for line in rows) == 1


def test_a_miniature_fills_no_page(folder, tmp_path, monkeypatch):
    """`report.py --tiny` would put its toys where the evidence is."""
    monkeypatch.chdir(tmp_path)
    for name in ("results/tiny", "results/small"):
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder)
    page = tmp_path / "README.md"
    page.write_text(old := "<!-- results:table4 -->\n<!-- /results:table4 -->\n")
    for preset, filled in (("--tiny", False), ("--small", True)):
        monkeypatch.setattr("sys.argv", ["report.py", preset])
        report.main()
        assert (page.read_text() != old) == filled, preset


def test_tables(folder):
    records, strange = report.load(folder)
    made = report.tables(records)
    assert not strange
    assert set(made) == {"summary", "table4", "table5", "learned", "controls", "paired", "fresh", "by_task", "hours",
                         "units"}
    none, latbot, *more = made["table4"].splitlines()[2:]
    assert [line.count("–") for line in more] == [6] * 4  # 50 and 100, which nobody has measured
    assert none.startswith("| 10 | no distillation | 2/10 (0) | 2/10 (0) | 2/10 (60) |")
    low, high = (100 * x for x in common.wilson(40, 50))
    assert f"**80 %** (48) | {low:.0f} to {high:.0f} %, n = 50 |" in latbot
    paired = made["paired"].splitlines()[2]
    delta, low, high = (f"{100 * x:+.0f}" for x in report.newcombe(10, 30, 0, 10))
    numbers = f"{delta} | {low} to {high} | < 0.001 |  |  | 10, 30, 0, 10 | 50"
    assert paired == f"| LatBot against no distillation | 10 | 0 | {numbers} |"
    assert made["hours"].splitlines()[2:] == [
        "| lam | 1 | 1.00 | 1.0 | 1.0 |", "| finetune | 2 | 1.00 | 2.0 | 1.0 |", "| evaluate | 2 | 1.00 | 2.0 | 1.0 |",
        "| all | 5 |  | 5.0 | 3.0 |",
    ]  # fmt: skip
    five = made["table5"].splitlines()
    assert "–" in five[2] and five[2].endswith("| 51.0 % |") and "| LatBot | ✓ | ✓ | 8/10" in five[5]


def test_what_is_missing_is_shown_as_such(folder):
    (folder / "trials_none_10.json").unlink()
    write(folder, "trials_dla_10", "evaluate", cells=cells("dla", 10, "1100000000", tasks=TASKS[:3]))
    made = report.tables(report.load(folder)[0])
    assert made["table4"].splitlines()[2].count("–") == 6 and made["table5"].startswith("| 10 demonstrations |")
    assert "n = 30, 3 of 5 tasks" in made["table5"]
    assert "| LatBot against no distillation | 10 | 0 | – |" in made["paired"]
    assert report.draw(report.load(folder)[0], folder)[0].stat().st_size > 5000


def test_what_stages_1_and_2_learned(folder):
    """The last values of a method's model and student, each where it belongs; the control has no model of its own."""
    curves = {"lam_dla": {"val_r2": [0.1, None], "val_psnr": [20.2, 24.47], "val_psnr_copy": [20.2, 20.2],
                          "val_frame_zero_sce": [1.0, 3.478]},
              "lam_latbot": {"val_r2": [-2.0, 0.41], "val_gripper_accuracy": [0.2, 0.906]},
              "lam_latbot_s1": {"val_r2": [-2.0, 0.34]},
              "student_latbot": {"val_mse": [2.0, 0.2], "val_mse_mean": [0.5, 0.5], "val_cosine": [0.1, 0.897]},
              "student_shuffled": {"val_mse": [2.0, 0.6], "val_mse_mean": [0.5, 0.5]}}  # fmt: skip
    made = report.tables({n: {"stage": "lam", "args": {}, "own": [], "needs": {}, "seconds": 1.0, "curve": curve}
                          for n, curve in curves.items()})["learned"].splitlines()[2:]  # fmt: skip
    assert made == ["| UniVLA-style |  |  |  |  |  |  |  |  |", "| + DLA | 24.5 (20.2) | x 3.5; |  |  |  |  |  |  |",
                    "| + UAD |  |  |  |  |  |  |  |  |", "| LatBot |  |  | 0.41 |  | 0.91 | 0.40 | 0.90 |  |",
                    "| LatBot, seed 1 |  |  | 0.34 |  |  |  |  |  |",
                    "| Z shuffled |  |  |  |  |  | 1.20 |  |  |"]  # fmt: skip


def test_all_policies_of_a_method_are_taken_together(folder):
    """However many there are; those of another student also by themselves, and each beside its own seed's."""
    write(folder, "demos", "lam")
    write(folder, "lam_latbot_s1", "lam")
    for method, seed, source, outcomes in (
        ("latbot", 2, "lam_latbot", "0000000000"), ("none", 2, "", "1000000000"),
        ("latbot", 1, "lam_latbot_s1", "1111111111"), ("latbot", 4, "lam_latbot_s1", "0111111111"),
    ):  # fmt: skip
        name = f"{method}_10_s{seed}"
        write(folder, f"policy_{name}", "finetune", ["demos", *filter(None, [source])], ["episodes"], episodes=50)
        write(folder, f"trials_{name}", "evaluate", [f"policy_{name}"], cells=cells(method, 10, outcomes, seed))
    made = report.tables(report.load(folder)[0])
    shown = [line.split(" | ")[2:4] for line in made["controls"].splitlines() if line.startswith("| LatBot | 10 |")]
    assert shown == [["0", "8/10"], ["1", "10/10"], ["2", "0/10"], ["4", "9/10"],
                     ["0, 2", "8/20"], ["1, 4", "19/20"], ["0, 1, 2, 4", "27/40"]]  # fmt: skip
    assert "| no distillation | 10 | 0, 2 | 3/20 |" in made["controls"]
    assert "| 10 | LatBot | 27/40 (60) |" in made["table4"] and "| LatBot | ✓ | ✓ | 27/40 |" in made["table5"]
    shown = [line.split(" | ")[2:] for line in made["paired"].splitlines() if line.startswith("| LatBot against no")]
    assert [(row[0], row[1], row[-1]) for row in shown] == [
        ("0", "+60", "50 |"), ("2", "-10", "50 |"), ("0, 2", "+25", "100 |"), ("1, 4 / 0, 2", "+80", "100 |"),
        ("0, 1, 2, 4 / 0, 2", "+52", "200, 100 |"), ("0", "–", "– |"), ("0", "–", "– |")]  # fmt: skip
    assert made["by_task"].count("+52 (0.00") == len(TASKS)  # two placements of ten are missed by both
    test = stats.ttest_ind([0.8, 1, 0, 0.9], [0.2, 0.1], equal_var=False)  # by policies, behind what is by placements
    low, high = (f"{100 * x:+.0f}" for x in test.confidence_interval())
    assert shown[4][4:6] == [f"{low} to {high}", f"{test.pvalue:.3f}"] and shown[4][3] == "< 0.001"
    assert made["by_task"].count(f"; {test.pvalue:.3f})") == len(TASKS)
    assert "| LatBot | **68 %** (" in made["summary"] and "| no distillation | **15 %** (" in made["summary"]
    assert "| LatBot against no distillation, points | +52 (" in made["summary"]
    for seed in (0, 3):  # a control with other seeds
        write(folder, f"trials_shuffled_10_s{seed}", "evaluate", cells=cells("shuffled", 10, "1100000000", seed))
    made = report.tables(report.load(folder)[0])
    assert "| Z shuffled | 10 | 0, 3 | 4/20 |" in made["controls"]
    assert "| LatBot against Z shuffled | 10 | 0 | +60 |" in made["paired"]
    assert "| LatBot against Z shuffled | 10 | 0, 1, 2, 4 / 0, 3 | +48 |" in made["paired"]
    assert "| Z shuffled | **20 %** (11 to 33 %, n = 100) | – |  |" in made["summary"]  # 100 is not asked of it


def test_policies_that_were_planned_before_any_was_known_are_compared_by_themselves(folder):
    """Those of seeds 4 and 5, of two methods that have both; what the others did changes nothing."""
    assert report.tables(report.load(folder)[0])["fresh"].count("\n") == 1  # head and rule
    for method, seed, outcomes in (("latbot", 4, "1111100000"), ("latbot", 5, "1110000000"), ("none", 4, "1000000000"),
                                   ("none", 5, "1100000000"), ("uad", 4, "1111111111")):  # fmt: skip
        write(folder, f"trials_{method}_10_s{seed}", "evaluate", cells=cells(method, 10, outcomes, seed))
    made = report.tables(report.load(folder)[0])["fresh"]
    assert made.count("\n") == 2 and "| LatBot against no distillation | 40.0 %, 15.0 % | +25 |" in made
    assert "| +25 (0." in made.splitlines()[-1]  # cups, of the same outcomes


def test_seeds_of_more_demonstrations_have_rows_too(folder):
    """Fifty with a second seed, which is taken together with the first; a hundred with one have no row of seeds."""
    for n, seed in ((50, 0), (50, 2), (100, 0)):
        for method, outcomes in (("latbot", "1110000000"), ("none", "1000000000")):
            name = f"{method}_{n}_s{seed}"
            write(folder, f"policy_{name}", "finetune", own=["episodes"], episodes=5 * n)
            write(folder, f"trials_{name}", "evaluate", [f"policy_{name}"], cells=cells(method, n, outcomes, seed))
    write(folder, "trials_shuffled_50", "evaluate", cells=cells("shuffled", 50, "1100000000"))
    made = report.tables(report.load(folder)[0])
    assert "| 50 | LatBot | 6/20 (80) |" in made["table4"] and "| 100 | LatBot | 3/10 (60) |" in made["table4"]
    for row in ("| no distillation | 50 | 0 | 1/10 |", "| no distillation | 50 | 2 |", "| LatBot | 50 | 0, 2 | 6/20 |",
                "| Z shuffled | 50 | 0 | 2/10 |"):  # fmt: skip
        assert row in made["controls"]
    assert "| LatBot against Z shuffled | 50 | 0 | +10 |" in made["paired"]
    assert "| LatBot against Z shuffled | 50 | 0, 2 / 0 | +10 |" in made["paired"]
    assert "| LatBot | 100 |" not in made["controls"] and "| LatBot | 10 | 2 |" not in made["controls"]
    assert "| LatBot against no distillation | 50 | 0, 2 | +20 |" in made["paired"]
    assert "| LatBot against no distillation | 100 | +20 (0.500) |" in made["by_task"]
    write(folder, "trials_shuffled_100", "evaluate", cells=cells("shuffled", 100, "1100000000"))
    made = report.tables(report.load(folder)[0])  # a control brings what it is compared with
    assert "| Z shuffled | 100 | 0 | 2/10 |" in made["controls"] and "| LatBot | 100 | 0 | 3/10 |" in made["controls"]


def test_configurations_are_not_mixed(folder):
    """Neither another setting in a stage, nor a unit that was made anew under those that were made from it."""
    write(folder, "policy_none_50", "finetune", own=["episodes"], episodes=250)
    report.tables(report.load(folder)[0])  # what a unit sets itself may differ
    write(folder, "policy_none_100", "finetune", own=["episodes"], episodes=500, steps=200)
    with pytest.raises(InputError, match=r"policy_latbot_10.json has steps 100, policy_none_100.json 200"):
        report.tables(report.load(folder)[0])
    (folder / "policy_none_100.json").unlink()
    write(folder, "policy_latbot_100", "finetune", own=["episodes", "steps"], episodes=500, steps=200)
    report.tables(report.load(folder)[0])  # nor for how long it learns from so many demonstrations
    write(folder, "policy_none_100", "finetune", own=["episodes"], episodes=500)
    with pytest.raises(InputError, match=r"policy_latbot_100.json has steps 200, policy_none_100.json 100"):
        report.tables(report.load(folder)[0])
    (folder / "policy_none_100.json").unlink()
    write(folder, "lam_latbot", "lam", steps=60)
    with pytest.raises(InputError, match="policy_latbot_10.json was made with another lam_latbot"):
        report.draw(report.load(folder)[0], folder)


def test_what_was_made_from_a_unit_without_a_record_is_left_out(folder):
    """While the queue makes a policy anew, its old trials are nobody's; and so is all that was made from those."""
    (folder / "lam_latbot.json").unlink()
    records, strange = report.load(folder)
    assert set(records) == {"policy_none_10", "trials_none_10"}
    assert sorted(strange) == [str(folder / f"{name}.json") for name in ("policy_latbot_10", "trials_latbot_10")]
    assert "made from policy_latbot_10, of which there is no record" in strange[str(folder / "trials_latbot_10.json")]


def test_foreign_and_damaged_files_are_left_out(folder):
    (folder / "notes.json").write_text("{}")
    path = folder / "trials_none_10.json"
    path.write_text(path.read_text().replace('"successes": 2', '"successes": 7'))
    records, strange = report.load(folder)
    assert [p.split("/")[-1] for p in strange] == ["notes.json", "trials_none_10.json"] and "lam_latbot" in records


def test_pages(folder, tmp_path):
    made = report.tables(report.load(folder)[0])
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- results:table4 -->\nold \\1\n<!-- /results:table4 -->\nb\n")
    for _ in range(2):
        assert report.fill(page, made) == ["table4"]
        start, end = "a\n<!-- results:table4 -->\n| demonstrations |", "|\n<!-- /results:table4 -->\nb\n"
        assert page.read_text().startswith(start) and page.read_text().endswith(end) and "old" not in page.read_text()
    page.write_text("no place here\n")
    assert report.fill(page, made) == [] and page.read_text() == "no place here\n"
    for text in ("<!-- results:table4 -->\nnot closed", "<!-- results:table9 -->\n<!-- /results:table9 -->"):
        page.write_text(text)
        with pytest.raises(InputError, match="results:table"):
            report.fill(page, made)
        assert page.read_text() == text


def test_figures(folder, monkeypatch):
    """Two files; and in the first, each number of demonstrations has its place, and no method lies upon another."""
    write(folder, "trials_none_100", "evaluate", cells=cells("none", 100, "1100"))
    figures, keep = [], report.save
    monkeypatch.setattr(report, "save", lambda fig, path: figures.append(fig) or keep(fig, path))
    drawn = report.draw(report.load(folder)[0], folder)
    assert [p.name for p in drawn] == ["demonstrations.png", "curves.png"] and all(p.exists() for p in drawn)
    numbers = [int(label.get_text()) for label in figures[0].axes[3].get_xticklabels()]
    assert numbers == [10, 50, 100]
    for ax in figures[0].axes:
        assert ax.get_xticks().tolist() == [*range(len(numbers))]
        places = [c.lines[0].get_xdata() for c in ax.containers]
        assert len(places) == 2 and not {*places[0]} & {*places[1]}
        assert [[round(x) for x in xs] for xs in places] == [[0, 2], [0]]
        assert all(abs(x - round(x)) < 0.1 for xs in places for x in xs)


def test_films(folder, tmp_path):
    """The first success beside the first failure, each to its end and that for a second; where there is but one kind,
    that alone. And films that are absent, or of other trials."""
    with pytest.raises(InputError, match="--films lam_latbot is no unit of trials: choose one of trials_latbot_10, "):
        report.films("lam_latbot", tmp_path, folder)  # whose folder nobody should be told to remove
    with pytest.raises(InputError, match="no .*video.mp4: films stay .* --only trials_latbot_10`"):
        report.films("trials_latbot_10", tmp_path, folder)
    colours = np.eye(3)  # of the first failure, the second, the success
    for task in TASKS:
        done = task != "pot_oven"
        trials = [{"seconds": 0.4, "success": False}, {"seconds": 0.2, "success": False},
                  {"seconds": 1.0, "success": done}]  # fmt: skip
        path = tmp_path / "trials_latbot_10" / task / "video.mp4"
        path.parent.mkdir(parents=True)
        common.write_json(path.with_name("results.json"), trials)
        film = Film(path)
        for entry, colour in zip(trials, colours, strict=True):
            for k in range(round(10 * entry["seconds"]) + 10):  # no two alike: a GIF would have them once
                film.add(np.full((36, 64, 3), colour * (255 - 6 * k), np.uint8))
        film.close()
    made = report.films("trials_latbot_10", tmp_path, folder)
    assert [path.name for path in made] == [f"{task}.gif" for task in TASKS]
    frames = iio.imread(made[0])
    assert frames.shape == (10, 153, 2 * 272, 3)  # 20 frames of the success, every second one; the failure had 14
    for page in frames:
        assert page[:, :272].argmax(-1).min() == 2 and page[:, 272:].argmax(-1).max() == 0
    assert iio.imread(made[-1]).shape == (7, 153, 272, 3)
    common.write_json(path.with_name("results.json"), trials[:2])
    with pytest.raises(InputError, match="has 46 frames, .* results.json 26, as after an interruption"):
        report.films("trials_latbot_10", tmp_path, folder)
