"""Tables and figures of the evidence, from results/<preset>/*.json and nothing else; films from those of the trials.

    python report.py --small      # `make results`: into README.md and results/REPORT.md, and results/small/*.png
    python report.py --small --films trials_latbot_10     # and results/small/*.gif, where these were just made

Reads what `reproduce.py` wrote. Writes the text between `<!-- results:NAME -->` and `<!-- /results:NAME -->` in pages
that have such lines (NAME: summary, table4, table5, learned, controls, paired, fresh, by_task, hours, units), and two
figures. What has not been measured yet is shown as missing. Results of different configurations are refused: files
whose stages had different arguments beside those in which units are meant to differ, or that were made from another
unit than the one that is there.

Statistics (our choice; the paper gives none). Success rates: Wilson's 95 % interval, of all trials of a row together.
All policies meet the same placements, so two of them are compared trial by trial: the exact McNemar test (two-sided
binomial test on the trials that only one of them did), and Newcombe's score interval of the difference of paired
proportions (Statistics in Medicine 17, 1998, p. 2635, method 10), which does not fail at 0 % or 100 %. All policies of
a method are taken together, in Table 4's and Table 5's shapes and the figure too, however many they are, and where they
are of several students, those of each student as well. They meet the same placements, where they do alike more often
than elsewhere, so that a placement counts once, as the mean of its trials: Wilson's interval is of as many fewer trials
as that makes them worth (by the variance between placements), the test flips the signs of the placements' differences,
in all ways (of single policies that is McNemar's; it is exact where both methods have equally many policies, and nearly
so elsewhere), and the difference's interval is 1.96 standard errors of their mean to each side; where it and p
disagree, p decides. All this takes policies as they are, and says how far other *placements* would move a number. How
far other *policies* of the same students would, "by policies" says: Welch's t test of the policies' success rates,
where both methods have several; with three of each it is blunt. The table "fresh" has the policies alone that were
planned before any was known. What another student would do only the rows of LatBot's show.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import imageio.v3 as iio
import numpy as np
from PIL import Image
from scipy import stats

import common
import reproduce
from common import InputError, wilson
from franka import HZ
from reproduce import STAGES, TASKS

# Success in percent, in the order of TASKS, from the paper's Table 4; "none" is pi0.5.
PAPER4 = {
    (10, "none"): (0, 0, 60, 0, 20), (50, "none"): (0, 0, 60, 0, 20), (100, "none"): (20, 10, 80, 20, 20),
    (10, "latbot"): (60, 20, 80, 20, 60), (50, "latbot"): (80, 80, 100, 50, 60),
    (100, "latbot"): (60, 40, 80, 80, 80),
}  # fmt: skip
PAPER5 = {"univla-style": 51.0, "dla": 59.4, "uad": 61.5, "latbot": 87.5}  # the mean over SIMPLER's tasks (Table 5)
NAMES = {
    "none": "no distillation", "latbot": "LatBot", "univla-style": "UniVLA-style", "dla": "+ DLA", "uad": "+ UAD",
    "bc": "behaviour cloning on play", "shuffled": "Z shuffled",
    "scratch": "random weights",
}  # fmt: skip
COMPARED = (  # the first is hoped to be above the second; "shuffled" differs from LatBot in the latent actions alone
    ("latbot", "none"), ("latbot", "univla-style"), ("latbot", "uad"), ("latbot", "dla"), ("uad", "univla-style"),
    ("dla", "univla-style"), ("latbot", "shuffled"), ("uad", "shuffled"), ("latbot", "bc"), ("bc", "none"),
    ("shuffled", "none"), ("none", "scratch"), ("univla-style", "none"), ("uad", "none"), ("dla", "none"),
)  # fmt: skip
LEARNED = {  # columns: metrics of stages 1 and 2, and how they are written
    "frame: PSNR, dB (of copying)": {"val_psnr": "{:.1f}", "val_psnr_copy": "({:.1f})"},
    "its error without Z_sce; Z_mot": {"val_frame_zero_sce": "x {:.1f};", "val_frame_zero_mot": "x {:.2f}"},
    "actions: R2": {"val_r2": "{:.2f}"},
    "their error without Z_mot; Z_sce": {"val_motion_zero_mot": "x {:.1f};", "val_motion_zero_sce": "x {:.2f}"},
    "grippers": {"val_gripper_accuracy": "{:.2f}"},
    "Zhat: error, of the mean's": {"of_mean": "{:.2f}"},
    "cosine with Z (another's)": {"val_cosine": "{:.2f}", "val_cosine_shuffled": "({:.2f})"},
    "phases: perplexity": {"val_perplexity": "{:.2f}"},
}
FRESH = (4, 5)  # seeds of policies that were planned before any of them was known: all of Table 5, two controls (LOG)
MISSING = "–"  # what has not been measured

Key = tuple[str, int, tuple[int, ...]]  # method, demonstrations of each task, seeds: of one policy, or of several
Outcomes = dict[str, tuple[str, ...]]  # task -> for each policy a 1 or a 0 of each placement

# --------------------------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------------------------


def pairs(first: Outcomes, second: Outcomes) -> tuple[int, int, int, int]:
    """Trials of the tasks that both have: done by both, by the first only, by the second only, by neither."""
    both = [a + b for task in TASKS if task in first and task in second
            for a, b in zip("".join(first[task]), "".join(second[task]), strict=True)]  # fmt: skip
    return both.count("11"), both.count("10"), both.count("01"), both.count("00")


def placements(outcomes: Outcomes, task: str) -> list[int]:
    """Successes at each placement, of as many trials as there are policies."""
    return [trials.count("1") for trials in zip(*outcomes[task], strict=True)]


def sign_flips(differences: Sequence[int]) -> float:
    """Two-sided exact test of a mean of 0: the share of all 2^n choices of signs whose sum is as far from 0. Of ones
    alone it is McNemar's test: how likely so uneven a split of the trials that only one did is, were both alike."""
    ways = {0: 1}
    for d in filter(None, differences):
        flipped: dict[int, int] = {}
        for total, n in ways.items():
            for signed in (total + d, total - d):
                flipped[signed] = flipped.get(signed, 0) + n
        ways = flipped
    far = abs(sum(differences))
    return sum(n for total, n in ways.items() if abs(total) >= far) / sum(ways.values())


def newcombe(a: float, b: float, c: float, d: float, z: float = 1.96) -> tuple[float, float, float]:
    """Difference of two paired proportions (a + b) / n - (a + c) / n and its interval (Newcombe 1998, method 10)."""
    n = a + b + c + d
    if n == 0:
        return 0.0, -1.0, 1.0
    p, q, delta = (a + b) / n, (a + c) / n, (b - c) / n
    (l1, u1), (l2, u2) = wilson(a + b, n, z), wilson(a + c, n, z)
    product, excess = (a + b) * (c + d) * (a + c) * (b + d), a * d - b * c
    if excess > 0:
        excess = max(0.0, excess - n / 2)  # continuity correction
    phi = excess / math.sqrt(product) if product else 0.0
    half = lambda x, y: math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))
    return delta, delta - half(p - l1, u2 - q), delta + half(u1 - p, q - l2)


def rate_interval(outcomes: Outcomes) -> tuple[float, float]:
    """Wilson's interval of all trials together, with as many fewer of them as they are worth less than trials that all
    had placements of their own: by the variance of the tasks' success rates, estimated either way. Where all ended
    alike there is no variance to go by, and a placement counts once."""
    done, n, m, by_trial, by_place = 0, 0, 1, 0.0, 0.0
    for task, trials in outcomes.items():
        here, m = placements(outcomes, task), len(trials)
        p = sum(here) / (m * len(here))
        by_trial += m * len(here) * p * (1 - p)
        by_place += m * m * len(here) * float(np.var(np.array(here) / m))
        done, n = done + sum(here), n + m * len(here)
    worth = 1 / m if not by_trial else min(1.0, by_trial / by_place) if by_place else 1.0
    return wilson(done * worth, n * worth)


def difference_interval(first: Outcomes, second: Outcomes) -> tuple[float, float, float, float]:
    """Difference of two success rates on the same placements, its interval, and p. Where all placements differ alike
    there is no variance to go by: Newcombe's interval then, a placement counting once."""
    tasks = [task for task in TASKS if task in first and task in second]
    m, n = len(first[tasks[0]]), len(second[tasks[0]])
    if m == n == 1:
        ones = pairs(first, second)
        return *newcombe(*ones), sign_flips([1] * ones[1] + [-1] * ones[2])
    done = [(a, b) for t in tasks for a, b in zip(placements(first, t), placements(second, t), strict=True)]
    d = [n * a - m * b for a, b in done]  # in whole numbers, as sign_flips needs them
    mean, half = float(np.mean(d)) / (m * n), 1.96 * float(np.std(d, ddof=1)) / (m * n) / math.sqrt(len(d))
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    if not half:
        p, q = (sum(x) / (k * len(d)) for x, k in zip(zip(*done, strict=True), (m, n), strict=True))
        _, low, high = newcombe(*(len(d) * x for x in (min(p, q), max(p - q, 0), max(q - p, 0), 1 - max(p, q))))
    return mean, low, high, sign_flips(d)


def by_policies(first: Outcomes, second: Outcomes) -> tuple[float, float, float] | None:
    """Welch's interval of the same difference, and p, from each policy's success rate. None where either method has one
    policy, or where no policy of either differs from another."""
    tasks = [task for task in TASKS if task in first and task in second]
    rate_of = lambda texts: np.mean([float(c) for c in "".join(texts)])
    rates = [[rate_of(texts) for texts in zip(*(side[t] for t in tasks), strict=True)] for side in (first, second)]
    if min(map(len, rates)) < 2 or not sum(map(np.ptp, rates)):
        return None
    delta = np.mean(rates[0]) - np.mean(rates[1])
    squares = [np.var(r, ddof=1) / len(r) for r in rates]  # of the standard errors
    freedom = sum(squares) ** 2 / sum(x**2 / (len(r) - 1) for x, r in zip(squares, rates, strict=True))
    error, t = math.sqrt(sum(squares)), stats.t(freedom)
    half = t.ppf(0.975) * error
    return float(delta - half), float(delta + half), float(2 * t.sf(abs(delta) / error))


# --------------------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """The records in a folder by unit, and the files that count for nothing, with the reason: damaged, somebody else's,
    or made from a unit that has no record, whose configuration nobody knows."""
    records, strange = {}, {}
    for path in sorted(folder.glob("*.json")):
        record = reproduce.load(path)
        if record and record["finished"] and all(map(whole, record.get("cells", []))):
            records[path.stem] = record
        else:
            strange[str(path)] = "damaged, or no result of `python reproduce.py`"
    while alone := {name: lost for name, r in records.items() if (lost := sorted(r["needs"].keys() - records.keys()))}:
        for name, lost in alone.items():
            records.pop(name)
            strange[str(folder / f"{name}.json")] = (
                f"it was made from {', '.join(lost)}, of which there is no record: `make reproduce` makes both anew")
    place = lambda name: [*STAGES, records[name]["stage"]].index(records[name]["stage"])
    return {name: records[name] for name in sorted(records, key=place)}, strange


def whole(cell: Any) -> bool:
    """Whether a cell has what it must have, and its trials add up."""
    kinds = {"experiment": str, "method": str, "task": str, "demonstrations": int, "seed": int, "successes": int,
             "trials": int, "outcomes": str}  # fmt: skip
    if not isinstance(cell, dict) or not all(isinstance(cell.get(k), kind) for k, kind in kinds.items()):
        return False
    outcomes = cell["outcomes"]
    return (outcomes.count("1"), outcomes.count("0")) == (cell["successes"], cell["trials"] - cell["successes"])


def check(records: dict[str, dict]) -> None:
    """Raises InputError where records are of different configurations."""
    wrong, stages = [], {}
    for name, record in records.items():
        for need, mark in record["needs"].items():
            if need in records and records[need]["fingerprint"] != mark:
                wrong.append(f"{name}.json was made with another {need} than {need}.json")
        stages.setdefault(record["stage"], []).append(name)
    for names in stages.values():
        first = records[names[0]]
        for name in names[1:]:
            one, other = first["args"], records[name]["args"]
            free = {*first["own"], *records[name]["own"]}
            for key in (one.keys() & other.keys()) - free:
                if one[key] != other[key]:
                    wrong.append(f"{names[0]}.json has {key} {one[key]!r}, {name}.json {other[key]!r}")
    alike: dict[tuple, str] = {}  # steps go by demonstrations, and by whether the student learns: all methods alike
    for name in stages.get("finetune", []):
        args = records[name]["args"]
        one = alike.setdefault((args.get("episodes"), args.get("student_lr")), name)
        if (first := records[one]["args"].get("steps")) != args.get("steps"):
            wrong.append(f"{one}.json has steps {first!r}, {name}.json {args.get('steps')!r}")
    if wrong:
        raise InputError("results of different configurations: " + "; ".join(wrong) + ": `make reproduce` makes anew "
                         "what is not of today's, or move the files of one configuration away")  # fmt: skip


def gather(records: dict[str, dict]) -> dict[Key, Outcomes]:
    """The outcomes of each policy; of all policies of a method together, where there are several; and where these are
    of several students, of each student's. Together only in tasks that all have met."""
    found: dict[Key, Outcomes] = {}
    groups: dict[tuple[str, int, str], set[int]] = {}  # method, demonstrations, a student or "" for all: seeds
    for record in records.values():
        for c in record.get("cells", []):
            method, n, seed = c["method"], c["demonstrations"], c["seed"]
            found.setdefault((method, n, (seed,)), {})[c["task"]] = (c["outcomes"],)
            for student in ("", origin(records, record)):
                groups.setdefault((method, n, student), set()).add(seed)
    for (method, n, _), seeds in groups.items():
        key = method, n, tuple(sorted(seeds))
        found[key] = together(found, key)
    return found


def together(cells: dict[Key, Outcomes], key: Key) -> Outcomes:
    """The outcomes of several policies, in the tasks that all have met."""
    policies = [cells[*key[:2], (seed,)] for seed in key[2]]
    tasks = [task for task in TASKS if all(task in policy for policy in policies)]
    return {t: tuple(policy[t][0] for policy in policies) for t in tasks}


def origin(records: dict[str, dict], trials: dict) -> str:
    """What the policy of these trials was fine-tuned from."""
    return " ".join(sorted(n for policy in trials["needs"] for n in records[policy]["needs"] if n != "demos"))


def policies_of(cells: dict[Key, Outcomes], method: str, n: int) -> list[Key]:
    """The keys of a method's single policies, then of those of each student, then of all; of one that is not there, if
    it has none."""
    return sorted((k for k in cells if k[:2] == (method, n)), key=lambda k: (len(k[2]), k)) or [(method, n, (0,))]


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """Markdown; the first `left` columns to the left, the others to the right."""
    line = lambda row: "| " + " | ".join(row) + " |"
    return "\n".join([line(head), "|" + "---|" * left + "---:|" * (len(head) - left), *map(line, rows)])


def joined(outcomes: Outcomes) -> str:
    """All trials of all policies and tasks."""
    return "".join(text for texts in outcomes.values() for text in texts)


def rate(outcomes: Outcomes, paper: float | None = None) -> list[str]:
    """Mean success and its interval, in percent, and how many trials that is; "(paper's)" behind the mean."""
    if not (trials := joined(outcomes)):
        return [MISSING, ""]
    low, high = rate_interval(outcomes)
    few = "" if len(outcomes) == len(TASKS) else f", {len(outcomes)} of {len(TASKS)} tasks"
    mean = f"**{trials.count('1') / len(trials):.0%}**".replace("%", " %")
    return [mean + (f" ({paper:.0f})" if paper is not None else ""),
            f"{100 * low:.0f} to {100 * high:.0f} %, n = {len(trials)}{few}"]  # fmt: skip


def row(cells: dict[Key, Outcomes], key: Key, paper: Sequence[float] = ()) -> list[str]:
    """k/n of each task, the paper's percentage in brackets; then `rate`."""
    outcomes = cells.get(key, {})
    texts = []
    for i, task in enumerate(TASKS):
        trials = "".join(outcomes.get(task, ()))
        text = f"{trials.count('1')}/{len(trials)}" if trials else MISSING
        texts.append(text + (f" ({paper[i]})" if paper else ""))
    return texts + rate(outcomes, sum(paper) / len(TASKS) if paper else None)


def points(x: float) -> str:
    """A difference of success rates in points, with its sign; with a decimal where it would be none without."""
    return f"{100 * x:+.0f}" if abs(x) >= 0.01 else f"{100 * x:+.1f}" if abs(x) >= 0.0005 else "0"


def likely(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def difference(cells: dict[Key, Outcomes], first: Key, second: Key, task: str = "") -> list[str]:
    """Points between two methods, interval and p by placements, both by policies where there are several, of single
    policies the pairs, trials of each. Dashes where nothing can be compared. Of one task, or of all."""
    one, other = ({t: x for t, x in cells.get(key, {}).items() if task in ("", t)} for key in (first, second))
    both = one.keys() & other.keys()
    if not both:
        return [MISSING] * 7
    delta, low, high, p = difference_interval(one, other)
    welch = by_policies(one, other)
    single = len(first[2]) == len(second[2]) == 1
    numbers = dict.fromkeys(str(sum(len(text) for t in both for text in side[t])) for side in (one, other))
    return [points(delta), f"{points(low)} to {points(high)}", likely(p),
            *((f"{points(welch[0])} to {points(welch[1])}", likely(welch[2])) if welch else ("", "")),
            ", ".join(map(str, pairs(one, other))) if single else "", ", ".join(numbers)]  # fmt: skip


def tables(records: dict[str, dict], preset: str = "small") -> dict[str, str]:
    """All tables by name, in Markdown."""
    check(records)
    cells = gather(records)
    numbers = sorted(reproduce.PRESETS[preset].demonstrations.values())
    few = numbers[0]
    tasks = [*TASKS, "mean", "95 % interval"]
    four, five = [], []
    for n in numbers:
        for method in COMPARED[0][::-1]:
            key = policies_of(cells, method, n)[-1]
            four.append([str(n), NAMES[method], *row(cells, key, PAPER4.get((n, method), ()))])
    for method, score in PAPER5.items():
        uad, dla = ("✓" if method in (part, "latbot") else "" for part in ("uad", "dla"))
        five.append([NAMES[method], uad, dla, *row(cells, policies_of(cells, method, few)[-1]), f"{score:.1f} %"])
    paired, by_task = comparisons(cells, numbers)
    return {
        "summary": table(["", *(f"{n} demonstrations" for n in numbers)], summary(cells, preset), 1),
        "table4": table(["demonstrations", "method (paper's, %: pi0.5, LatBot)", *tasks], four),
        "table5": table([f"{few} demonstrations", "UAD", "DLA", *tasks, "paper (SIMPLER)"], five, 3),
        "learned": table(["held-out play", *LEARNED], learned(records), 1),
        "controls": table(["method", "demonstrations", "seed", *tasks], controls(cells, numbers), 1),
        "paired": table(["compared", "demonstrations", "seed", "points", "95 % interval", "p",
                         "by policies: 95 % interval", "p", "both, first, second, neither", "trials"], paired, 1),
        "fresh": table(["compared", "mean of each", "points", "95 % interval", "p", "by policies: 95 % interval", "p",
                        *(f"{task}: points (p)" for task in TASKS)], fresh(cells, few), 1),
        "by_task": table(["compared: points (p; by policies)", "demonstrations", *TASKS], by_task, 1),
        "hours": table(["stage", "units", "hours each", "one after another", "on two cores"], by_stage(records), 1),
        "units": table(["unit", "hours", "on", "commit", "command"], by_unit(records), 1),
    }  # fmt: skip


def seeds(key: Key) -> str:
    return ", ".join(map(str, key[2]))


def controls(cells: dict[Key, Outcomes], numbers: Sequence[int]) -> list[list[str]]:
    """Each policy, each student's and each method's together; where there is more than Table 4 has."""
    rows = []
    for n in numbers:
        if n == numbers[0] or any(k[1] == n and (k[0] not in COMPARED[0] or k[2] != (0,)) for k in cells):
            keys = [key for method in NAMES for key in policies_of(cells, method, n)]
            rows += [[NAMES[k[0]], str(n), seeds(k), *row(cells, k)] for k in keys if n == numbers[0] or k in cells]
    return rows


def comparisons(cells: dict[Key, Outcomes], numbers: Sequence[int]) -> tuple[list[list[str]], list[list[str]]]:
    """Methods against each other, policies of one seed and then all of each student's against all of the other method;
    and the last of these task by task."""
    paired, by_task = [], []
    for first, second in COMPARED:
        for n in numbers:
            what = [f"{NAMES[first]} against {NAMES[second]}", str(n)]
            *ones, all_ = policies_of(cells, first, n)
            other = policies_of(cells, second, n)[-1]
            for seed in sorted({0, *(k[2][0] for k in (*ones, all_))}):
                here = (first, n, (seed,)), (second, n, (seed,))
                if cells.keys() >= {*here} or not seed and (n == numbers[0] or (first, second) == COMPARED[0]):
                    paired.append([*what, str(seed), *difference(cells, *here)])
            if not cells.keys() >= {all_, other}:
                continue
            for key in [k for k in ones if len(k[2]) > 1] + [all_] * (len(all_[2]) + len(other[2]) > 2):
                both = " / ".join(dict.fromkeys((seeds(key), seeds(other))))
                paired.append([*what, both, *difference(cells, key, other)])
            texts = []
            for delta, _, p, _, welch, *_ in (difference(cells, all_, other, task) for task in TASKS):
                texts.append(f"{delta} ({p}{f'; {welch}' if welch else ''})" if p != MISSING else MISSING)
            by_task.append([*what, *texts])
    return paired, by_task


def fresh(cells: dict[Key, Outcomes], n: int) -> list[list[str]]:
    """Methods against each other by the policies of FRESH alone: which rows to make was not decided by looking."""
    rows = []
    for methods in COMPARED:
        keys = [(method, n, FRESH) for method in methods]
        if all((method, n, (seed,)) in cells for method in methods for seed in FRESH):
            own = {key: together(cells, key) for key in keys}
            by_task = (difference(own, *keys, task) for task in TASKS)
            means = ", ".join(f"{100 * x.count('1') / len(x):.1f} %" for x in map(joined, own.values()))
            rows.append([" against ".join(NAMES[method] for method in methods), means, *difference(own, *keys)[:5],
                         *(f"{delta} ({p})" for delta, _, p, *_ in by_task)])  # fmt: skip
    return rows


def summary(cells: dict[Key, Outcomes], preset: str) -> list[list[str]]:
    """Mean success of every method at every number of demonstrations, all its seeds of fine-tuning where they count
    together, and the headline's difference. What is not asked of a method stays empty."""
    size = reproduce.PRESETS[preset].demonstrations
    asked = {(method, size[number]) for _, method, number, seed, _ in reproduce.POLICIES if not seed}
    numbers, rows = sorted(size.values()), []
    for method, name in NAMES.items():
        texts = (rate(cells.get(policies_of(cells, method, n)[-1], {})) for n in numbers)
        rows.append([name, *(f"{mean} ({span})" if span else mean for mean, span in texts)])
        for i, n in enumerate(numbers, 1):
            if rows[-1][i] == MISSING and (method, n) not in asked:
                rows[-1][i] = ""
    first, second = COMPARED[0]
    last = [f"{NAMES[first]} against {NAMES[second]}, points"]
    for n in numbers:
        delta, span, *_ = difference(cells, policies_of(cells, first, n)[-1], policies_of(cells, second, n)[-1])
        last.append(f"{delta} ({span})" if span != MISSING else MISSING)
    return [*rows, last]


def learned(records: dict[str, dict]) -> list[list[str]]:
    """What the latent action model and the student of each method of Table 5 do on held-out play, LatBot's made anew
    and the control's beside them."""
    rows = []
    for unit in (*PAPER5, "latbot_s1", "shuffled"):
        last, (method, _, seed) = {}, unit.partition("_s")
        for name in (f"lam_{unit}", f"student_{unit}"):  # their metrics have different names
            curve = records.get(name, {}).get("curve", {})
            last |= {key: values[-1] for key, values in curve.items() if values[-1] is not None}
        if "val_mse" in last:
            last["of_mean"] = last["val_mse"] / last["val_mse_mean"]
        texts = (" ".join(form.format(last[k]) for k, form in metrics.items() if k in last)
                 for metrics in LEARNED.values())  # fmt: skip
        rows.append([f"{NAMES[method]}, seed {seed}" if seed else NAMES[method], *texts])
    return rows


def by_stage(records: dict[str, dict]) -> list[list[str]]:
    """What the stages took: each unit, all one after another, and on two cores, of which a unit of one takes half."""
    hours: dict[str, list[tuple[float, float]]] = {"all": []}
    for record in records.values():
        one = {int(n) for n in re.findall(r"(\d+) core", record.get("hardware", ""))} == {1}
        for stage in (record["stage"], "all"):
            hours.setdefault(stage, []).append((took := record["seconds"] / 3600, took / 2 if one else took))
    hours["all"] = hours.pop("all")  # the last row
    rows = []
    for stage, spent in hours.items():
        each, shared = zip(*spent, strict=True)
        span = " to ".join(dict.fromkeys(f"{h:.2f}" for h in (min(each), max(each))))
        rows.append([stage, str(len(each)), span if stage != "all" else "", f"{sum(each):.1f}", f"{sum(shared):.1f}"])
    return rows


def by_unit(records: dict[str, dict]) -> list[list[str]]:
    """What each unit took, where, and the command that makes it again."""
    return [[name, f"{r['seconds'] / 3600:.2f}", *(str(r.get(k, MISSING)) for k in ("hardware", "commit")),
             f"`{r.get('command', MISSING)}`"] for name, r in records.items()]  # fmt: skip


def fill(page: Path, made: dict[str, str]) -> list[str]:
    """Puts tables between their lines in a page. Returns the names of those that it has. Raises InputError for a line
    that opens a table and is not closed, or that names none."""
    text = page.read_text()
    names = re.findall(r"<!-- results:(\w+) -->", text)
    for name in names:
        inside = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- /results:{name} -->)", re.DOTALL)
        if name not in made or not inside.search(text):
            raise InputError(f"{page}: <!-- results:{name} --> is not closed by <!-- /results:{name} -->, or is none "
                             f"of {', '.join(made)}")  # fmt: skip
        text = inside.sub(lambda m, table=made[name]: f"{m[1]}{table}\n{m[2]}", text)
    partial = page.with_name(page.name + ".partial")
    partial.write_text(text)
    partial.replace(page)
    return names


# --------------------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------------------


def draw(records: dict[str, dict], folder: Path, preset: str = "small") -> list[Path]:
    """Success against demonstrations, and the stages' validation curves. Returns the PNGs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    check(records)
    cells, made = gather(records), []
    numbers = sorted(reproduce.PRESETS[preset].demonstrations.values())
    fig, axes = plt.subplots(2, 3, figsize=(12, 7), sharex=True, sharey=True, layout="constrained")
    for i, (ax, task) in enumerate(zip(axes.flat, ["mean of the five tasks", *TASKS], strict=True)):
        for method, colour, aside in (("none", "tab:gray", -0.06), ("latbot", "tab:blue", 0.06)):  # side by side
            dots = []
            for place, n in enumerate(numbers):
                outcomes = cells.get(policies_of(cells, method, n)[-1], {})
                shown = outcomes if i == 0 else {t: trials for t, trials in outcomes.items() if t == task}
                text = "".join(text for texts in shown.values() for text in texts)
                if text and (i or len(outcomes) == len(TASKS)):
                    dots.append((place + aside, text.count("1") / len(text), *rate_interval(shown)))
            if dots:
                x, y, low, high = zip(*dots, strict=True)
                bars = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
                ax.errorbar(x, y, bars, marker="o", capsize=4, color=colour, label=NAMES[method])
            scores = {place + aside: PAPER4[n, method] for place, n in enumerate(numbers) if (n, method) in PAPER4}
            if scores:
                at = [s[i - 1] if i else sum(s) / len(s) for s in scores.values()]
                ax.plot(list(scores), [s / 100 for s in at], ":", marker="x", color=colour,
                        label=f"paper: {'pi0.5' if method == 'none' else 'LatBot'}")  # fmt: skip
        ax.set(title=task, xlim=(-0.5, max(1, len(numbers)) - 0.5), xticks=range(len(numbers)), xticklabels=numbers,
               ylim=(-0.03, 1.03), xlabel="demonstrations of each task" if i > 2 else "",
               ylabel="success rate" if i % 3 == 0 else "")  # fmt: skip
    if axes.flat[0].has_data():
        axes.flat[0].legend(fontsize=8)
    made.append(save(fig, folder / "demonstrations.png"))

    curves = {n: r for n, r in records.items() if r.get("curve")}
    shown: dict[tuple[str, str], list[str]] = {}
    for name, record in curves.items():
        for key in record["curve"]:
            if key != "step" and not key.endswith(("_mean", "_shuffled")):
                shown.setdefault((record["stage"], key), []).append(name)
    if shown:
        rows = math.ceil(len(shown) / 3)
        fig, axes = plt.subplots(rows, 3, figsize=(13, 3 * rows), squeeze=False, layout="constrained")
        for ax, ((stage, key), names) in zip(axes.flat, shown.items(), strict=False):
            kinds: dict[str, list[str]] = {}  # seeds of one look alike
            for name in names:
                kinds.setdefault(re.sub(r"_s\d+$", "", name), []).append(name)
            for k, (kind, alike) in enumerate(kinds.items()):
                for name in alike:
                    steps, values = (curves[name]["curve"][c] for c in ("step", key))
                    learned = slice(1 if len(steps) > 2 else 0, None)  # before the first step it is off the scale
                    ax.plot(steps[learned], values[learned], ("-", "--", ":")[k // 10 % 3], color=f"C{k % 10}",
                            label=kind if name == alike[0] else None)  # fmt: skip
            ax.set(title=f"{stage}: {key}", xlabel="step")
            many = len(kinds) > 6
            ax.legend(fontsize=5 if many else 6, ncols=2 if many else 1, framealpha=0.5)
        for ax in axes.flat[len(shown) :]:
            ax.axis("off")
        made.append(save(fig, folder / "curves.png"))
    return made


def save(fig: Any, path: Path) -> Path:
    partial = path.with_name("partial." + path.name)
    fig.savefig(partial, dpi=90)
    partial.replace(path)
    return path


# --------------------------------------------------------------------------------------------------------------------
# Films
# --------------------------------------------------------------------------------------------------------------------

WIDE, SKIP = 272, 2  # pixels of a film in a GIF, and of how many of its frames one is shown


def films(unit: str, work: Path, folder: Path) -> list[Path]:
    """A GIF of each task: the first success of a unit's trials beside the first failure, or the one there is.

    Raises InputError where it is no unit of trials, and where its films are not on this disk, or are not those of its
    results."""
    known = [name for name, u in reproduce.plan(folder.name).items() if u.cell]
    if unit not in known:
        raise InputError(f"--films {unit} is no unit of trials: choose one of {', '.join(known)}")
    made, old = [], f"{work / unit} {work / unit}.json {folder / unit}.json"
    anew = f"to run these trials here, `rm -rf {old}` and `python reproduce.py --{folder.name} --only {unit}`"
    for task in TASKS:
        path = work / unit / task / "video.mp4"
        if not path.exists():
            raise InputError(f"no {path}: films stay where the trials ran; {anew}")
        trials = common.read_json(path.with_name("results.json"))
        ends = np.cumsum([round(e["seconds"] * HZ) + HZ for e in trials]).tolist()  # a second of the end of each
        shown = [next((k for k, e in enumerate(trials) if e["success"] == done), None) for done in (True, False)]
        spans = [(ends[k - 1] if k else 0, ends[k]) for k in shown if k is not None]
        frames: list[list[Image.Image]] = [[] for _ in spans]
        number = 0
        for number, frame in enumerate(iio.imiter(path, plugin="pyav"), 1):
            for (first, end), kept in zip(spans, frames, strict=True):
                if first < number <= end and (end - number) % SKIP == 0:
                    image = Image.fromarray(frame)
                    kept.append(image.resize((WIDE, round(WIDE * image.height / image.width))))
        if number != ends[-1]:
            raise InputError(f"{path} has {number} frames, the trials of its results.json {ends[-1]}, as after an "
                             f"interruption: {anew}")  # fmt: skip
        long = max(map(len, frames))
        pages = [np.hstack([np.asarray(kept[min(k, len(kept) - 1)]) for kept in frames]) for k in range(long)]
        out = folder / f"{task}.gif"
        pages = [Image.fromarray(page).quantize(64, dither=Image.Dither.NONE) for page in pages]
        pages[0].save(partial := out.with_name(f"partial.{out.name}"), save_all=True, append_images=pages[1:],
                      duration=1000 * SKIP // HZ, loop=0, optimize=True)  # fmt: skip
        partial.replace(out)
        made.append(out)
    return made


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    preset: Literal["small", "tiny"] = "small"
    """Whose results."""
    pages: tuple[str, ...] = ("README.md", "results/REPORT.md")
    """Where tables go; pages that are absent, or have no place for tables, stay as they are. Those of --tiny are no
    evidence, and go nowhere unless you say so."""
    films: str = ""
    """A unit of trials: draw a GIF of each task from its films, too."""


def main() -> None:
    args = common.parse_args(Args, {"tiny": Args("tiny", pages=()), "small": Args("small")}, __doc__)
    folder = Path("results") / args.preset
    records, strange = load(folder)
    for path, why in strange.items():
        print(f"{path} is left out: {why}")
    if not records:
        raise InputError(f"no results in {folder}: run `python reproduce.py --{args.preset}` first")
    made = tables(records, args.preset)
    print("\n\n".join(f"{name}\n\n{text}" for name, text in made.items()))
    for page in map(Path, args.pages):
        if page.exists() and (names := fill(page, made)):
            print(f"\nwrote {', '.join(names)} into {page}")
    drawn = draw(records, folder, args.preset)
    if args.films:
        drawn += films(args.films, Path("runs") / args.preset / "reproduce", folder)
    print("\nwrote " + ", ".join(map(str, drawn)))


if __name__ == "__main__":
    common.run_main(main, resumes=False)
