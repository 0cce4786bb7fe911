"""The queue of the evidence, with trivially small programs in place of the stages; the tables, with made-up results."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import common
import reproduce
from common import InputError
from reproduce import Queue, Unit

# Counts to --steps in a file, one a wait, and goes on where it was.
STAGE = """
import dataclasses, sys, time, pathlib

@dataclasses.dataclass
class Args:
    steps: int = 9
    wait: float = 0.0
    out: str = "runs/x"
    init: str = ""

SMALL = Args(steps=3)

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--init" in flags and not (pathlib.Path(flags["--init"]) / "starts").exists():
    sys.exit("too early")
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
steps = int(flags.get("--steps", 3))
done = len((out / "steps").read_text()) if (out / "steps").exists() else 0
for i in range(done, steps):
    time.sleep(float(flags.get("--wait", 0)))
    with (out / "steps").open("a") as file:
        file.write(".")
    if flags.get("--fail"):
        sys.exit("no luck today")
with (out / "starts").open("a") as file:
    file.write("x")
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Queues over one folder: make(name="flags with {needs}", ...)."""
    monkeypatch.setattr(common, "git_commit", lambda: "abc")  # takes longer than all the rest
    (tmp_path / "stage.py").write_text(STAGE)
    for folder in ("work", "results"):
        (tmp_path / folder).mkdir()
    reproduce.defaults.cache_clear()

    def queue(shared: str = "", **units: str) -> Queue:
        made = {n: Unit(n, "stage", f"{tmp_path}/stage.py {shared}".strip(), own) for n, own in units.items()}
        return Queue(made, tmp_path / "work", tmp_path / "results")

    return queue


def run(queue: Queue, jobs: int = 1) -> set[str]:
    return reproduce.work(queue, jobs, wait=0.02)


def starts(queue: Queue) -> dict[str, int]:
    return {n: len(f.read_text()) for n in queue.units if (f := queue.work / n / "starts").exists()}


def model(at: Path, scale: float = 1) -> None:
    """What a stage leaves, in small: weights, and what only training needs."""
    at.mkdir(parents=True, exist_ok=True)
    common.write_json(at / "meta.json", {"stage": "lam", "step": 1})
    for name in ("model", "optimizer"):
        tensors = {"x": scale * torch.tensor([[1 / 3, 1e-3]]), "n": torch.tensor(7), "centre": torch.tensor([1 / 3])}
        save_file(tensors, at / f"{name}.safetensors")


def results(queue: Queue) -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text()) for p in sorted(queue.results.glob("*.json"))}


# ---- The table ----


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_the_plan(preset):
    """The headline comes first, everything after what it needs, and each method differs as it should."""
    units = reproduce.plan(preset)
    names = list(units)
    for i, (name, unit) in enumerate(units.items()):
        assert all(names.index(n) < i for n in unit.needs), name
    few = min(reproduce.PRESETS[preset].demonstrations.values())
    trials = [n for n in names if units[n].cell]
    assert trials[:2] == [f"trials_latbot_{few}", f"trials_none_{few}"] and len(trials) == 49
    needed = {n: set(reproduce.closure(units, [n])) for n in trials}
    assert not any(n.startswith(("lam", "student")) for n in needed[f"trials_none_{few}"])
    assert needed[f"trials_scratch_{few}"] == {"demos", f"policy_scratch_{few}", f"trials_scratch_{few}"}
    assert {"lam_uad", "student_uad", f"policy_uad_{few}"} < needed[f"trials_uad_{few}"]
    for seed in (1, 4, 5):
        assert {"lam_latbot_s1", "student_latbot_s1"} < needed[f"trials_latbot_{few}_s{seed}"]
    assert {"lam_latbot", "student_latbot"} < needed[f"trials_latbot_{few}_s2"]
    assert "lam_latbot" in needed[f"trials_shuffled_{few}"] and "lam_latbot" not in needed[f"trials_bc_{few}"]
    for name in trials:  # every policy of a method starts from a student of its own
        of = units[name].cell["method"]
        own = {f"student_{of}", "student_latbot_s1"} if of == "latbot" else {f"student_{of}"}
        students = {n for n in needed[name] if n.startswith("student")}
        assert students <= own and len(students) == (of not in ("none", "scratch")), name
    counts = {n: 0 for n in "abc"}
    for name in trials:
        for experiment in units[name].cell["experiment"]:
            counts[experiment] += 1
    assert counts == {"a": 6, "b": 17, "c": 30}
    queue, steps = reproduce.Queue(units, Path("work"), Path("results")), {}
    for unit in units.values():
        args = queue.args(unit)
        what = f"{unit.stage} {args.get('episodes', '')}{' scratch' * ('scratch' in unit.name)}"
        steps.setdefault(what, set()).add(args.get("steps"))
    assert all(len(of) == 1 for of in steps.values())  # the same work for every method
    if preset == "small":  # a scratch student learns for half of it; more demonstrations are learned for longer
        of = {k: min(v) for k, v in steps.items() if k.startswith("finetune")}
        assert of == {"finetune 10": 3000, "finetune 10 scratch": 1500, "finetune 50": 6000, "finetune 100": 6000}


def test_arguments_are_read_from_the_stages_source():
    """As the stages themselves parse them."""
    import finetune

    queue = Queue(reproduce.plan("small"), Path("w"), Path("r"))
    args = queue.args(queue.units["policy_latbot_50"])
    words = reproduce.shlex.split(queue.command(queue.units["policy_latbot_50"]))[1:]
    real = common.parse_args(finetune.Args, {"tiny": finetune.TINY, "small": finetune.SMALL}, "", words)
    real = json.loads(json.dumps(vars(real)))
    assert args["episodes"] == 50 and args["init"] == "w/student_latbot"
    assert {k: real[k] for k in args if k != "data"} == {k: v for k, v in args.items() if k != "data"}
    assert set(real) - set(args) == reproduce.FREE
    assert reproduce.parse("-m data.play --no-uad --x 1e-3 a --seed 2")[1] == {"uad": False, "x": "0.001 a", "seed": 2}


def test_tasks_and_seeds():
    """The tasks are franka.py's; trials and demonstrations share no placements, nor trials and looking (seed 0)."""
    import franka

    assert tuple(franka.TASKS) == reproduce.TASKS
    seeds = {stage: reproduce.parse(reproduce.STAGES[stage])[1]["seed"] for stage in ("record", "evaluate")}
    assert seeds["record"] % 2 == 1 and seeds["evaluate"] % 2 == 0 and seeds["evaluate"] != 0


# ---- The queue ----


def test_units_run_in_order_and_only_once(make, capsys):
    queue = make(a="--steps 2", b="--init {a}", c="--init {b}")
    assert run(queue) == set() and run(queue) == set()
    assert starts(queue) == {"a": 1, "b": 1, "c": 1}
    found = results(queue)
    assert found["a"]["args"]["steps"] == 2 and found["b"]["args"]["steps"] == 9
    assert found["b"]["needs"] == {"a": found["a"]["fingerprint"]} and found["b"]["own"] == ["init"]
    assert all(r["finished"] and r["seconds"] >= 0 and r["commit"] and r["hardware"] for r in found.values())
    assert not list(queue.work.glob("*.claim*"))
    assert "next:" not in reproduce.listing(queue) and "finished in" in reproduce.listing(queue)


def test_two_at_once(make):
    """Units run side by side, what needs one of them after it."""
    queue = make(a="--steps 6 --wait 0.15", b="--init {a} --steps 1", c="--steps 6 --wait 0.15")
    began = time.monotonic()
    assert run(queue, 2) == set()
    assert time.monotonic() - began < sum(r["seconds"] for r in results(queue).values())


def test_a_failure_stops_what_needs_it_and_nothing_else(make, capsys):
    queue = make(a="--fail yes", b="--init {a}", c="--steps 1")
    assert run(queue) == {"a"}
    out = capsys.readouterr().out
    assert "no luck today" in out and "not tried, because they need those: b" in out
    assert list(results(queue)) == ["c"] and not list(queue.work.glob("*.claim*"))
    assert run(queue) == {"a"}  # tried again


def start(queue: Queue) -> multiprocessing.Process:
    """The queue in a process of its own: forked, since importing torch again would take longer than all the rest."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(len(reproduce.work(queue, 1, 0.05))))
    process.start()
    return process


def wait_for(what, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_in_the_middle(make, monkeypatch, kind):
    """The stage dies with the queue; the next one goes on where it was, at once, and adds up the time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in a shell's background has it ignored
    monkeypatch.setattr(reproduce, "HEARTBEAT", 0.1)
    queue = make(a="--steps 30 --wait 0.1", b="--init {a} --steps 1")
    steps = queue.work / "a/steps"
    process = start(queue)
    wait_for(lambda: steps.exists() and len(steps.read_text()) > 8)
    os.kill(process.pid, kind)
    process.join()
    assert bool(queue.claims("a")) == (kind == signal.SIGKILL)
    time.sleep(0.3)
    before, spent = len(steps.read_text()), reproduce.load(queue.work / "a.json")["seconds"]
    time.sleep(0.4)
    assert len(steps.read_text()) == before < 30 and spent > 0.5  # nobody writes any more
    assert "interrupted" in reproduce.listing(queue)
    assert run(queue) == set()
    assert len(steps.read_text()) == 30 and starts(queue) == {"a": 1, "b": 1}
    assert results(queue)["a"]["seconds"] > spent + 0.1 * (30 - before) - 0.1
    assert not (queue.work / "old").exists()


def test_two_processes_share_the_work(make):
    units = {n: "--steps 3 --wait 0.1" for n in "abcdef"} | {"g": "--init {a} --steps 1"}
    queue = make(**units)
    processes = [start(queue) for _ in range(2)]
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0]
    assert starts(queue) == dict.fromkeys(units, 1) and set(results(queue)) == set(units)


def test_claims(make, monkeypatch):
    """A live claim is respected, a silent or dead one is taken over, and the loser of the unit notices."""
    queue = make(a="--steps 1")
    mine = queue.claim("a")
    assert mine and queue.claim("a") is None and str(os.getpid()) in queue.holder("a")
    mine.write_text(f"{reproduce.machine()} 999999999")  # a dead process of this machine
    second = queue.claim("a")
    assert second.name == "a.claim.2" and not mine.exists()
    second.write_text("elsewhere 1")
    assert queue.claim("a") is None  # just seen
    monkeypatch.setattr(reproduce, "STALE", 0.2)
    time.sleep(0.3)
    os.utime(second)
    assert queue.claim("a") is None  # renewed
    time.sleep(0.3)
    third = queue.claim("a")
    assert third.name == "a.claim.3"
    monkeypatch.setattr(reproduce, "HEARTBEAT", 0.0)
    job = reproduce.Job(queue, queue.units["a"], third, [0])
    (queue.work / "a.claim.4").write_text("elsewhere 1")
    assert "taken it over" in job.poll()
    job.stop()


@pytest.mark.parametrize("theirs", [1, 2])
def test_who_claims_at_the_same_moment_does_not_get_it_twice(make, monkeypatch, theirs):
    """Between our look at the claims and our own, somebody else made his: of our number, or of the next."""
    queue, look, looks = make(a=""), Queue.claims, []

    def claims(self, name):
        looks.append(look(self, name))
        if len(looks) == 2:
            (queue.work / f"a.claim.{theirs}").write_text("elsewhere 1")
        return looks[-1]

    monkeypatch.setattr(Queue, "claims", claims)
    assert queue.claim("a") is None and len(looks) == 1 + theirs
    assert [p.name for p in queue.work.glob("*.claim.*")] == [f"a.claim.{theirs}"]


def test_changed_arguments(make, capsys):
    """What is of other arguments is set aside and made anew, with all that needs it; the rest is kept."""
    assert not run(make(a="--steps 2", b="--init {a}", c="--steps 1"))
    queue = make(a="--steps 4", b="--init {a}", c="--steps 1")
    status = queue.survey()
    assert "steps 2, now 4" in status["a"].why and "another a" in status["b"].why and status["c"].done
    assert not run(queue)
    assert starts(queue) == {"a": 1, "b": 1, "c": 1} and len((queue.work / "a/steps").read_text()) == 4
    assert len(list((queue.work / "old").rglob("results/*.json"))) == 2  # nothing is lost
    assert "what was there is in" in capsys.readouterr().out


def test_a_changed_preset_and_a_new_argument(make):
    """A preset's other value makes anew; an argument that the stage did not have, at its default, does not."""
    queue = make("--small", a="")
    assert not run(queue) and results(queue)["a"]["args"]["steps"] == 3
    script = queue.work.parent / "stage.py"
    script.write_text(STAGE.replace("    init:", "    fresh: bool = False\n    init:"))
    reproduce.defaults.cache_clear()
    assert queue.survey()["a"].done and "fresh" in queue.args(queue.units["a"])
    script.write_text(STAGE.replace("steps=3", "steps=2"))
    reproduce.defaults.cache_clear()
    assert "steps 3, now 2" in queue.survey()["a"].why


def test_what_is_a_units_own_is_told_anew(make):
    """An argument may move from what all units of a stage have in common to those that still have it: nothing is made
    anew, and the report, which compares what is in common, is told."""
    assert run(make(a="--steps 2", b="--init {a} --steps 9")) == set()
    queue = make(a="--steps 2", b="--init {a}")
    assert [results(queue)[n]["own"] for n in "ab"] == [["steps"], ["init", "steps"]]
    assert not any(s.wanted for s in queue.survey().values())
    assert [results(queue)[n]["own"] for n in "ab"] == [["steps"], ["init"]] and starts(queue) == {"a": 1, "b": 1}


def test_half_finished_work_of_other_arguments_is_not_resumed(make):
    queue = make(a="--steps 3")
    (queue.work / "a").mkdir()
    (queue.work / "a/steps").write_text("..........")  # nobody knows whose
    assert not run(queue) and (queue.work / "a/steps").read_text() == "..."
    assert len(list((queue.work / "old").rglob("steps"))) == 1


def test_half_finished_work_on_an_input_that_was_made_anew_is_not_resumed(make):
    queue = make(a="--steps 1", b="--init {a} --fail yes")
    steps = queue.work / "b/steps"
    for expected in (".", ".."):  # as an interrupted stage, it goes on where it was
        assert run(queue) == {"b"} and steps.read_text() == expected
    shutil.rmtree(queue.work / "a")
    assert run(queue) == {"b"} and steps.read_text() == "."


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"unit": "b"}', "null"])
def test_damaged_and_foreign_results(make, capsys, text):
    """They are named; what was finished is written out again without work; where nothing is left, made anew."""
    queue = make(a="--steps 1")
    (queue.results / "a.json").write_text(text)
    assert "damaged" in queue.survey()["a"].why
    assert not run(queue) and results(queue)["a"]["finished"]
    (queue.results / "a.json").write_text(text)
    assert not run(queue) and results(queue)["a"]["finished"] and starts(queue) == {"a": 1}
    assert "written anew from" in capsys.readouterr().out


def test_results_without_the_work(make):
    """On a fresh clone nothing is made again, but for what an unfinished unit needs; its result stays as it is."""
    queue = make(a="--steps 1", b="--init {a} --steps 1")
    assert not run(queue)
    kept = (queue.results / "a.json").read_text()
    shutil.rmtree(queue.work)
    queue.work.mkdir()
    assert not any(s.wanted for s in queue.survey().values())
    (queue.results / "b.json").unlink()
    assert "b needs" in queue.survey()["a"].why
    assert not run(queue) and starts(queue) == {"a": 1, "b": 1}
    assert (queue.results / "a.json").read_text() == kept


def test_shipped_weights_are_taken_where_the_work_is_missing(make, capsys):
    queue = make(a="--steps 1", b="--init {a} --steps 1")
    queue.shipped = queue.work.parent / "weights"
    with pytest.raises(InputError, match="a: no finished weights"):
        queue.ship("a")
    assert not run(queue)
    with pytest.raises(InputError, match="a: no finished weights"):  # as of play
        queue.ship("a")
    model(queue.work / "a" / "hf")
    (queue.work / "a" / "steps").write_text("mark")
    queue.ship("a")
    shutil.rmtree(queue.work)
    queue.work.mkdir()
    assert queue.survey()["a"].present and not list(queue.work.iterdir())  # nothing needs it yet
    (queue.results / "b.json").unlink()
    assert not run(queue) and starts(queue) == {"a": 1, "b": 1}
    assert (queue.work / "a" / "steps").read_text() == "mark" and "a: taken from" in capsys.readouterr().out
    # Of another making than the result that is there, or half-finished here: made anew.
    shipped = json.loads((queue.shipped / "a.json").read_text())
    for change in ("begun", "work"):
        shutil.rmtree(queue.work)
        queue.work.mkdir()
        if change == "work":
            (queue.work / "a").mkdir()
            (queue.work / "a" / "half").touch()
        else:
            common.write_json(queue.shipped / "a.json", shipped | {"begun": "once"})
        (queue.results / "b.json").unlink()
        assert not run(queue) and (queue.work / "a" / "steps").read_text() != "mark"
        common.write_json(queue.shipped / "a.json", shipped)
        assert not list(queue.work.glob("*.partial"))
    model(queue.work / "a" / "hf")
    with pytest.raises(InputError, match="is of another run"):
        queue.ship("a")
    (queue.results / "a.json").unlink()  # as it says
    queue.ship("a")


def test_a_kill_while_weights_are_shipped_or_restored(make, monkeypatch):
    queue = make(a="--steps 1", b="--init {a} --steps 1")
    queue.shipped = queue.work.parent / "weights"
    assert not run(queue)
    model(queue.work / "a" / "hf")
    queue.ship("a")
    whole = common.write_json

    def killed(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        queue.ship("a")
    assert not queue.shipped_weights("a")
    monkeypatch.setattr(common, "write_json", whole)
    queue.ship("a")
    shutil.rmtree(queue.work / "a")
    (queue.work / "a.json").unlink()
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        queue.restore("a")
    monkeypatch.undo()
    assert not list(queue.work.glob("*.partial")) and queue.survey()["a"].present
    queue.restore("a")
    assert starts(queue) == {"a": 1, "b": 1}


def test_a_finished_unit_is_made_small(make):
    """By the queue itself: what the next unit starts from is what is shipped."""
    queue = make(a="--steps 1")
    model(queue.work / "a" / "hf")
    model(queue.work / "a" / "checkpoints" / "step_00000001")
    half = {"unit": "a", "stage": "stage", "args": queue.args(queue.units["a"]), "own": [], "needs": {}, "inputs": {},
            "fingerprint": "x", "begun": "now", "commit": "", "hardware": "", "seconds": 0.0, "finished": False}
    common.write_json(queue.work / "a.json", half)  # what is there is of a half-finished run of the same arguments
    assert not run(queue)
    assert not list((queue.work / "a" / "checkpoints").iterdir())
    assert common.read_tensors(queue.work / "a" / "hf" / "model.safetensors")["x"].dtype == torch.float16


def test_data_of_earlier_experts_or_instructions_are_made_anew(monkeypatch):
    queue = Queue(reproduce.plan("small"), Path("w"), Path("r"))
    for name in ("play", "demos"):
        args = queue.args(queue.units[name])
        monkeypatch.setattr(reproduce.franka, "EXPERTS", 10_000)
        assert queue.args(queue.units[name]) == args | {"experts": 10_000} != args
        monkeypatch.undo()
        then = {"args": {k: v for k, v in args.items() if k != "experts"}, "needs": {}}
        assert "experts" in queue.difference(queue.units[name], then, {})
    args = queue.args(queue.units["demos"])
    then = {"args": args | {"instructions": args["instructions"] | {"close_oven": "shut it"}}, "needs": {}}
    assert queue.difference(queue.units["demos"], {"args": args, "needs": {}}, {}) == ""
    assert "shut it" in queue.difference(queue.units["demos"], then, {})


def test_what_stays_of_a_finished_unit(tmp_path):
    """The last weights, rounded as they are shipped, and nothing that only training needs."""
    for step in (1, 2):
        model(tmp_path / f"checkpoints/step_0000000{step}", step)
    kept = reproduce.halve(tmp_path)
    reproduce.clear(tmp_path, kept)
    assert kept == [tmp_path / "checkpoints/step_00000002"] == list((tmp_path / "checkpoints").iterdir())
    assert {p.name for p in kept[0].iterdir()} == {"meta.json", "model.safetensors"}
    found = common.read_tensors(kept[0] / "model.safetensors")
    assert torch.equal(found["x"], torch.tensor([[2 / 3, 2e-3]]).half()) and found["n"] == 7
    assert found["centre"].dtype == torch.float32  # a normaliser's
    reproduce.halve(tmp_path)  # once more, after a kill
    assert torch.equal(common.read_tensors(kept[0] / "model.safetensors")["x"], found["x"])
    model(kept[0], 1e9)
    with pytest.raises(InputError, match="too large for float16"):
        reproduce.halve(tmp_path)


@pytest.mark.parametrize("gb, cores, jobs", [(7, 8, 1), (24, 2, 2), (25.3, 8, 2), (200, 8, 4), (200, 1, 1)])
def test_units_at_once_go_by_memory_too(monkeypatch, gb, cores, jobs):
    """Two students side by side took a machine of 24 GB to its knees when each grew to 14."""
    size = {"SC_PHYS_PAGES": int(gb * 1e9 / 4096), "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(reproduce.os, "sysconf", lambda name: size[name])
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: False)
    assert reproduce.at_once() == jobs


def test_a_full_disk(make, monkeypatch):
    queue = make(a="--steps 1")
    monkeypatch.setattr(reproduce, "ROOM", 1e30)
    with pytest.raises(InputError, match="make room"):
        run(queue)
    monkeypatch.undo()
    whole = common.write_json

    def full(path, value):
        if path.parent == queue.results:
            raise OSError(28, "No space left on device", str(path))
        whole(path, value)

    monkeypatch.setattr(common, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        run(queue)
    monkeypatch.undo()
    assert not run(queue) and starts(queue) == {"a": 1}  # the work was kept


def test_main(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--tiny", "--only", "trails*"])
    with pytest.raises(InputError, match="fits none of"):
        reproduce.main()
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--tiny", "--only", "trials_none_1", "--list"])
    reproduce.main()
    out = capsys.readouterr().out
    assert "policy_none_1" in out and "lam_latbot" not in out and "\nleft: about" in out


# ---- What is read from the stages ----


def write_trials(folder: Path, outcomes: dict[str, str], seed: int = 1000) -> None:
    for task, text in outcomes.items():
        (folder / task).mkdir(parents=True)
        rows = [{"trial": i, "seed": seed, "success": c == "1", "reason": "" if c == "1" else "missed"}
                for i, c in enumerate(text)]  # fmt: skip
        (folder / task / "results.json").write_text(json.dumps(rows))


def test_cells(tmp_path):
    unit = reproduce.plan("tiny")["trials_uad_1"]
    write_trials(tmp_path, dict.fromkeys(reproduce.TASKS, "10"))
    cells = reproduce.trials(unit, tmp_path)["cells"]
    assert [c["task"] for c in cells] == list(reproduce.TASKS)
    assert cells[0] | {"task": ""} == {
        "experiment": "b", "method": "uad", "task": "", "demonstrations": 1, "seed": 0, "successes": 1, "trials": 2,
        "outcomes": "10", "failures": {"missed": 1},
    }  # fmt: skip
    (tmp_path / "pick_cup/results.json").write_text(json.dumps([{"trial": 0, "seed": 1000, "success": True}]))
    with pytest.raises(InputError, match="does not hold the trials"):
        reproduce.trials(unit, tmp_path)


def test_curve(tmp_path):
    rows = [{"step": 60000 + i} | ({"loss": 1.0} if i % 2 else {"val_x": 1 / 3 + i}) for i in range(200)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 2')
    curve = reproduce.curve(tmp_path, 5)["curve"]
    assert curve["step"] == [60000, 60048, 60098, 60148, 60198] and curve["val_x"][0] == 0.3333
    assert reproduce.curve(tmp_path / "none") == {}


# ---- The real stages, in miniature ----


@pytest.mark.slow
def test_a_few_real_units(tmp_path, monkeypatch):
    units = reproduce.plan("tiny")
    queue = Queue(reproduce.closure(units, ["play", "demos"]), tmp_path / "work", tmp_path / "results")
    queue.work.mkdir()
    assert not run(queue, 2)
    for name in ("policy_none_1", "trials_none_1"):
        own = units[name].own.replace("{start_paligemma}/hf", "paligemma-tiny")
        queue.units[name] = Unit(name, units[name].stage, units[name].shared, own, units[name].cell)
    assert not run(queue)
    found = results(queue)
    assert found["policy_none_1"]["curve"]["step"] == [0, 2, 4] and len(found["trials_none_1"]["cells"]) == 5
    assert "demos: 5 episodes" in (queue.work / "policy_none_1.log").read_text()  # one of each task
    assert textwrap.shorten(found["trials_none_1"]["command"], 30).startswith("python franka.py --tiny")
