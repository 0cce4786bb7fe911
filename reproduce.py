"""The evidence: everything that `results/` holds, made by one command that may be stopped and typed again at any time.

    python reproduce.py --small --list                 # every unit: its state, its hours, what comes next
    python reproduce.py --small                        # go on (`make reproduce`)
    python reproduce.py --small --only 'trials_*_10'   # only these, and what they need
    python reproduce.py --small --ship 'start_*'       # put what these made into weights/small/, for other machines
    python reproduce.py --tiny                         # the same in miniature: every line of it, and no evidence

    play ------------> lam_* --> student_* --> policy_* --> trials_* --> results/small/*.json --> report.py
    start_internvl -----^          ^   demos ----^
    start_paligemma ---------------+     (the two are stand-ins for pretrained models)

A unit is one command of one stage. Reads weights/<preset>/, what was shipped. Writes runs/<preset>/reproduce/<unit>/,
the stage's own folder, beside it <unit>.log and <unit>.json, how far it is; and, when it is finished,
results/<preset>/<unit>.json.

What is kept: a unit whose JSON in results/ is whole, and was made with the arguments that the tables below give it and
all that it needs; the arguments of a stage and its preset are read from its source. What was made with others is set
aside in runs/<preset>/reproduce/old and made anew. What was interrupted goes on from its last checkpoint. Several
machines may work side by side in a shared folder. Of a finished unit remain its last weights, in half precision, from
which all that needs it starts; where they are missing and weights/<preset>/ has those of that very result, they are
taken from there, so that on a new machine one cell can be made again without the hours before it.

Where the paper is silent (all our choice):
 1. One policy for all five tasks, as for LIBERO (Sec. 4.3), from the first n demonstrations of each.
 2. Seeds of placements: 1 for demonstrations, 0 for looking and tuning, which is what `franka.py` does by itself, and
    1000 for the trials here, which nothing else uses. All methods meet the same.
 3. Every method's student starts from the same stand-in for pretrained models and is fine-tuned alike; one control,
    "scratch", from random weights, says what it is worth. Latent action models start from a vision encoder that has
    seen still scenes, the same for all, and the rest of them from random weights: so LatBot has a second model, its
    teacher, that has learned names and boxes. Behaviour cloning on play gets about the time that this, stage 1 and
    stage 2 take together, and the nine tenths of play in which one arm acts; of the policy that it makes the student is
    kept, and its expert and normalisation are made anew like everybody's (an expert that learned play before was worse:
    results/LOG.md). It learns no phases, and is asked about stills as often in all. Distillation and cloning leave the
    vision encoder as it is, and both go on asking where things are (distill.py 8), on stills that "none" and "scratch"
    do not see, and with commands about cups, pots and ovens that those two never hear before the tasks; so does
    "shuffled", which differs from LatBot in the latent actions alone. Half of their windows begin with their episodes
    (distill.py 9). Fine-tuning leaves the student as it is (finetune.py 4). That of "scratch" has to learn: at the full
    rates, its expert seeing all of it, for half as many steps, each of which takes five times as long.
 4. Steps of fine-tuning go by the number of demonstrations, for all students that stay as they are alike (Sec. 4.4 has
    it so): 3,000 for ten, and 6,000 for 50 and 100; at a hundred 3,000 see each window twice, and the error still
    falls.
"""

import ast
import ctypes
import fnmatch
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file

import common
import franka
from common import InputError

# --------------------------------------------------------------------------------------------------------------------
# The experiment. {x} is the folder of unit x, which has to be finished first.
# --------------------------------------------------------------------------------------------------------------------

TASKS = ("pick_cup", "block_slot", "close_oven", "dip_brush", "pot_oven")  # in the paper's order (Table 4)

STAGES = {  # what all units of a stage have in common
    "record": "franka.py --{preset} --record {record} --task all --seed 1",
    "play": "-m data.play --{preset}",
    "pretrain": "pretrain.py --{preset}",
    "lam": "lam.py --{preset} --encoder {start_internvl}/hf --data {play}/*",
    "distill": "distill.py --{preset} --student {start_paligemma}/hf --data {play}/*",
    "clone": "finetune.py --{preset} --init {start_paligemma}/hf --data {play}/fr3 {play}/sixaxis {play}/gripper",
    "finetune": "finetune.py --{preset} --data {demos}",
    "evaluate": "franka.py --{preset} --seed 1000 --trials {trials} --task {task}",  # once for each task
}

UNITS = {  # unit: its stage, and what it has of its own
    "demos": "record",
    "play": "play",
    "start_internvl": "pretrain --model internvl-{preset} --sight 1",
    "start_paligemma": "pretrain --model paligemma-{preset}",
    "lam_latbot": "lam",
    "lam_univla-style": "lam --no-uad --no-dla",
    "lam_dla": "lam --no-uad",
    "lam_uad": "lam --no-dla",
    "lam_latbot_s1": "lam --seed 1",
    "student_latbot": "distill --lam {lam_latbot}",
    "student_univla-style": "distill --lam {lam_univla-style}",
    "student_dla": "distill --lam {lam_dla}",
    "student_uad": "distill --lam {lam_uad}",
    "student_shuffled": "distill --lam {lam_latbot} --shuffle",
    "student_latbot_s1": "distill --lam {lam_latbot_s1} --seed 1",
    "student_bc": "clone",
}

POLICIES = (  # experiments, method, demonstrations of each task, seed, what fine-tuning starts from; in order of work
    ("abc", "latbot", 10, 0, "{student_latbot}"),
    ("abc", "none", 10, 0, "{start_paligemma}/hf"),
    ("c", "bc", 10, 0, "{student_bc} --new-expert"),
    ("c", "shuffled", 10, 0, "{student_shuffled}"),
    ("c", "scratch", 10, 0, "paligemma-{preset} {scratch}"),
    ("b", "univla-style", 10, 0, "{student_univla-style}"),
    ("b", "uad", 10, 0, "{student_uad}"),
    ("b", "dla", 10, 0, "{student_dla}"),
    ("a", "latbot", 100, 0, "{student_latbot}"),
    ("a", "none", 100, 0, "{start_paligemma}/hf"),
    ("a", "latbot", 50, 0, "{student_latbot}"),
    ("a", "none", 50, 0, "{start_paligemma}/hf"),
    ("c", "latbot", 10, 1, "{student_latbot_s1}"),  # all stages of LatBot anew
    ("c", "none", 10, 1, "{start_paligemma}/hf"),
    ("c", "latbot", 10, 2, "{student_latbot}"),  # fine-tuning alone anew
    ("c", "none", 10, 2, "{start_paligemma}/hf"),
    ("c", "latbot", 10, 3, "{student_latbot}"),
    ("c", "none", 10, 3, "{start_paligemma}/hf"),
    ("c", "latbot", 50, 2, "{student_latbot}"),
    ("c", "none", 50, 2, "{start_paligemma}/hf"),
    ("c", "latbot", 50, 3, "{student_latbot}"),
    ("c", "none", 50, 3, "{start_paligemma}/hf"),
    ("c", "shuffled", 50, 0, "{student_shuffled}"),
    ("c", "shuffled", 10, 2, "{student_shuffled}"),
    ("c", "shuffled", 10, 3, "{student_shuffled}"),
    ("c", "shuffled", 50, 2, "{student_shuffled}"),
    ("c", "shuffled", 50, 3, "{student_shuffled}"),
    ("c", "latbot", 10, 4, "{student_latbot_s1}"),
    ("c", "latbot", 10, 5, "{student_latbot_s1}"),
    ("b", "univla-style", 10, 2, "{student_univla-style}"),
    ("b", "univla-style", 10, 3, "{student_univla-style}"),
    ("b", "uad", 10, 2, "{student_uad}"),
    ("b", "uad", 10, 3, "{student_uad}"),
    ("b", "dla", 10, 2, "{student_dla}"),
    ("b", "dla", 10, 3, "{student_dla}"),
    ("c", "bc", 10, 2, "{student_bc} --new-expert"),
    ("c", "bc", 10, 3, "{student_bc} --new-expert"),
    ("b", "univla-style", 10, 4, "{student_univla-style}"),  # three of each, above, scatter too widely
    ("b", "univla-style", 10, 5, "{student_univla-style}"),
    ("b", "uad", 10, 4, "{student_uad}"),
    ("b", "uad", 10, 5, "{student_uad}"),
    ("b", "dla", 10, 4, "{student_dla}"),
    ("b", "dla", 10, 5, "{student_dla}"),
    ("c", "none", 10, 4, "{start_paligemma}/hf"),
    ("c", "none", 10, 5, "{start_paligemma}/hf"),
    ("c", "shuffled", 10, 4, "{student_shuffled}"),
    ("c", "shuffled", 10, 5, "{student_shuffled}"),
    ("c", "latbot", 100, 2, "{student_latbot}"),
    ("c", "none", 100, 2, "{start_paligemma}/hf"),
)


class Preset(NamedTuple):
    demonstrations: dict[int, int]  # of each task: those in POLICIES -> those of this preset
    trials: int  # of each task and policy
    flags: dict[str, str]  # of a stage, beside those in STAGES
    scratch: str  # flags of fine-tuning a student that knows nothing: it learns, too
    steps: dict[int, int]  # of fine-tuning on more demonstrations than ten


_SHORT = "--steps 4 --save-every 2 --val-samples 8 --val-every 0"
_ASKED = f"{_SHORT} --stills 1"
PRESETS = {
    "small": Preset({10: 10, 50: 50, 100: 100}, 20, {
        "record": "--disturb 2.5", "pretrain": "--steps 5000", "lam": "--steps 2400 --frames 5 --hz 2.5 --no-augment",
        "distill": "--steps 3600 --stills 3 --vision-lr 0 --starts 0.5",
        "clone": "--steps 12000 --stills 1 --val-every 10 --student-lr 1 --no-remember --prefix-dropout 0 "
                 "--vision-lr 0 --starts 0.5"},
        scratch="--student-lr 1 --no-remember --prefix-dropout 0 --steps 1500", steps={50: 6000, 100: 6000}),
    "tiny": Preset({10: 1, 50: 2, 100: 3}, 2, {
        "pretrain": "--steps 4 --save-every 2", "lam": _SHORT, "distill": _ASKED, "clone": _ASKED, "finetune": _SHORT,
        "evaluate": "--seconds 1"}, scratch="--student-lr 1", steps={}),
}  # fmt: skip

# Seconds of a step, or of a whole unit of a stage without steps, on one core of an AMD EPYC (Zen 4) at --small: for
# estimates before there are measured units of that stage.
SECONDS = {"record": 300, "play": 900, "pretrain": 1.0, "lam": 1.3, "distill": 1.4, "clone": 1.0, "finetune": 0.3,
           "evaluate": 900}  # fmt: skip

HERE = Path(__file__).resolve().parent
FREE = {"out", "resume", "workers", "log_every", "save_every", "preload", "max_bad"}  # change no result
HEARTBEAT, STALE = 10.0, 120.0  # s: how often a claim is renewed, and after how long without that it is void
ROOM = 3e9  # bytes that must be free on the disk before a unit starts
MEMORY = 12e9  # bytes that a unit may take: a student some 10, of which 7 are all pictures of play


@dataclass(frozen=True)
class Unit:
    """A command, in two parts: what all units of the stage have in common, and its own. `cell`: what its trials count
    for, if it has trials."""

    name: str
    stage: str
    shared: str
    own: str = ""
    cell: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> list[str]:
        return [n for n in re.findall(r"{([\w-]+)}", f"{self.shared} {self.own}") if n != "task"]


def plan(preset: str) -> dict[str, Unit]:
    """All units in the order of work: each after those that it needs, those of the first policies first."""
    size, table, cells = PRESETS[preset], dict(UNITS), {}
    for experiments, method, number, seed, init in POLICIES:
        n = size.demonstrations[number]
        name = f"{method}_{n}" + (f"_s{seed}" if seed else "")
        longer = f" --steps {size.steps[number]}" if number in size.steps else ""
        table[f"policy_{name}"] = f"finetune --init {init} --episodes {n} --seed {seed}{longer}"
        table[f"trials_{name}"] = f"evaluate --policy {{policy_{name}}}"
        cells[f"trials_{name}"] = {"experiment": experiments, "method": method, "demonstrations": n, "seed": seed}
    units, settings = {}, {"preset": preset, "record": max(size.demonstrations.values()), "trials": size.trials,
                                     "scratch": size.scratch}
    for name, text in table.items():
        stage, _, own = text.partition(" ")
        shared = f"{STAGES[stage]} {size.flags.get(stage, '')}".strip()
        for key, value in settings.items():
            shared, own = (part.replace(f"{{{key}}}", str(value)) for part in (shared, own))
        units[name] = Unit(name, stage, shared, own, cells.get(name, {}))
    return closure(units, list(cells))


def closure(units: dict[str, Unit], names: list[str]) -> dict[str, Unit]:
    """The units of these names and all that they need, each after what it needs."""
    found: dict[str, Unit] = {}
    for name in names:
        found |= closure(units, units[name].needs) | {name: units[name]}
    return found


# --------------------------------------------------------------------------------------------------------------------
# What a unit's arguments are
# --------------------------------------------------------------------------------------------------------------------


def value(text: str) -> Any:
    """A word of Python or of a command line, as JSON would bring it back."""
    try:
        return json.loads(json.dumps(ast.literal_eval(text)))
    except (ValueError, SyntaxError, TypeError):
        return text


@functools.cache
def defaults(program: str) -> dict[str, dict[str, Any]]:
    """The arguments of a stage {preset: {name: value}}, "" being no preset. Read from its source: importing all stages
    takes a minute. {} for what has no Args."""
    path, out = HERE / (program if program.endswith(".py") else program.replace(".", "/") + ".py"), {}
    for node in ast.parse(path.read_text()).body if path.exists() else []:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            out[""] = {n.target.id: value(ast.unparse(n.value)) for n in node.body if isinstance(n, ast.AnnAssign)}
        elif isinstance(node, ast.Assign) and (name := ast.unparse(node.targets[0])) in ("TINY", "SMALL"):
            out[name.lower()] = out[""] | {k.arg: value(ast.unparse(k.value)) for k in node.value.keywords}
    return out


def parse(command: str) -> tuple[str, dict[str, Any]]:
    """Program and flags of a command line: `lam.py --no-uad --seed 1` is ("lam.py", {"uad": False, "seed": 1})."""
    words, flags, name = shlex.split(command), {}, ""
    program = words[words[0] == "-m"] if words else ""
    for word in words:
        if word.startswith("--"):
            off, name = word.startswith("--no-"), word.removeprefix("--no-").removeprefix("--").replace("-", "_")
            flags[name] = not off
        elif name:
            flags[name] = value(word) if flags[name] is True else f"{flags[name]} {word}"
    return program, flags


# --------------------------------------------------------------------------------------------------------------------
# The state of the queue: records in results/ and in the folder of work, and who works on what
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Status:
    """done: its result is there and current; present: what it made is on this disk; wanted: not done, or needed and not
    present. why: what there is to say. fingerprint: of its arguments and of those of all that it needs."""

    done: bool
    present: bool
    wanted: bool
    why: str
    fingerprint: str


def load(path: Path) -> dict[str, Any] | None:
    """A record of a unit. None where there is none, or where it is damaged or somebody else's."""
    kinds = {"unit": str, "stage": str, "args": dict, "own": list, "needs": dict, "fingerprint": str,
             "seconds": (int, float), "finished": bool}  # fmt: skip
    try:
        record = json.loads(path.read_text())
        ours = all(isinstance(record[k], kind) for k, kind in kinds.items()) and record["unit"] == path.stem
        return record if ours else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class Queue:
    units: dict[str, Unit]
    work: Path
    results: Path
    shipped: Path = Path("weights")

    def command(self, unit: Unit) -> str:
        known = lambda m: m[0] if m[1] == "task" else str(self.work / m[1])
        return re.sub(r"{([\w-]+)}", known, f"{unit.shared} {unit.own}".strip())

    def args(self, unit: Unit) -> dict[str, Any]:
        """All arguments of a unit's stage, as its preset and its flags give them, but those that change no result."""
        program, flags = parse(self.command(unit))
        known = defaults(program)
        preset = next((k for k in flags if k in known), "")
        args = known.get(preset, {}) | {k: v for k, v in flags.items() if k != preset or not known}
        if unit.stage in ("record", "play"):
            args["experts"] = franka.EXPERTS
        if unit.stage == "record":
            args["instructions"] = franka.INSTRUCTIONS
        return {k: v for k, v in args.items() if k not in FREE}

    def difference(self, unit: Unit, record: dict[str, Any], known: dict[str, Status]) -> str:
        """Which arguments a record has that are not today's; "" for none. One that the stage did not have then counts
        as its default, so that a new flag, off, makes nothing anew."""
        now, new = self.args(unit), defaults(parse(unit.shared)[0]).get("", {})
        then = {k: v for k, v in new.items() if k in now} | record["args"]
        out = [f"{k} {then.get(k)!r}, now {now.get(k)!r}" for k in {**now, **then} if then.get(k) != now.get(k)]
        out += [f"another {n}" for n in unit.needs if record["needs"].get(n) != known[n].fingerprint]
        return "; ".join(out)

    def survey(self) -> dict[str, Status]:
        """Looks at every unit. A result that is finished in the folder of work and absent in results/ is put there."""
        found: dict[str, Status] = {}
        for name, unit in self.units.items():
            path, own = self.results / f"{name}.json", self.work / f"{name}.json"
            result, state, why = load(path), load(own), ""
            if result and (other := self.difference(unit, result, found)):
                result, why = None, f"{path} was made with {other}"
            elif path.exists() and not result:
                why = f"{path} is damaged or no result of this queue"
            if state and (other := self.difference(unit, state, found)):
                state, why = None, why or f"{own} was made with {other}"
            if state and state["finished"] and not result:
                self.results.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    tell(f"{why}: written anew from {own}")
                common.write_json(path, state)
                result = state
            if result and result["own"] != (today := own_arguments(unit, self.args(unit))):
                result = result | {"own": today}  # the tables above tell now what stages have in common otherwise
                common.write_json(path, result)
            kept, needs = result or state, {n: found[n].fingerprint for n in unit.needs}
            mark = kept["fingerprint"] if kept else fingerprint(self.args(unit), needs)
            folder = (self.work / name).exists()
            present = bool(state and state["finished"] and folder) or bool(
                not folder and not self.holder(name) and self.shipped_weights(name))
            found[name] = Status(bool(result), present, not result, "" if result else why, mark)
        for name in reversed(self.units):
            for n in self.units[name].needs if found[name].wanted else ():
                if found[n].done and not found[n].present:
                    found[n].wanted, found[n].why = True, f"its result is kept, but {name} needs {self.work / n}"
        return found

    def shipped_weights(self, name: str) -> dict[str, Any] | None:
        """The record of shipped weights of a unit, if they are of the very result that is there."""
        theirs, result = load(self.shipped / f"{name}.json"), load(self.results / f"{name}.json")
        same = theirs and result and theirs.get("begun") == result.get("begun")
        return theirs if same and (self.shipped / name).exists() else None

    def restore(self, name: str) -> None:
        """Puts shipped weights where they are looked for, unless something is there."""
        record = self.shipped_weights(name)
        if not record or (self.work / name).exists():
            return
        partial = self.work / f"{name}.{os.urandom(4).hex()}.partial"
        try:
            shutil.copytree(self.shipped / name, partial)
            common.write_json(self.work / f"{name}.json", record)  # first: without the folder it says nothing
            partial.rename(self.work / name)
            tell(f"{name}: taken from {self.shipped / name}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def ship(self, name: str) -> None:
        """The other way. Raises InputError where there are no weights, or those of another run than the result."""
        ready = self.survey()[name].present  # which also writes a result that is missing
        record, result = load(self.work / f"{name}.json"), load(self.results / f"{name}.json")
        kept, to = last_weights(self.work / name), self.shipped / name
        if not ready or not kept:
            raise InputError(f"{name}: no finished weights in {self.work}; there may be once it is done (--list)")
        if record["begun"] != result["begun"]:
            raise InputError(f"{self.results / name}.json is of another run than {self.work / name}: remove that file, "
                             f"then the same command again")  # fmt: skip
        clear(self.work / name, kept)  # a kill may have left what only training needs
        (self.shipped / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.work / name, to)
        common.write_json(self.shipped / f"{name}.json", record)  # last: without it the folder is nothing
        size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
        print(f"{to}: {size / 1e6:.1f} MB")

    # ---- Claims: <unit>.claim.<n>. The highest n holds; taking over a void claim makes n + 1, which only one can ----

    def claims(self, name: str) -> list[Path]:
        return sorted(self.work.glob(f"{name}.claim.*"), key=lambda p: int(p.suffix[1:]))

    def holder(self, name: str) -> str:
        """The machine and process at work on a unit; "" for nobody. A claim is void when its process is dead, or when
        it was not renewed for STALE seconds of our own clock: machines' clocks differ."""
        for path in self.claims(name)[-1:]:
            try:
                text, beat = path.read_text(), path.stat().st_mtime_ns
            except FileNotFoundError:  # given back just now
                return ""
            who, _, pid = text.rpartition(" ")
            dead = who == machine() and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists()
            silent = time.monotonic() - _seen.setdefault((path, beat), time.monotonic()) > STALE
            return "" if dead or silent else text or "somebody"
        return ""

    def claim(self, name: str) -> Path | None:
        """Claims a unit. None where somebody else holds it or was faster."""
        if self.holder(name):
            return None
        old = self.claims(name)
        mine = self.work / f"{name}.claim.{int(old[-1].suffix[1:]) + 1 if old else 1}"
        try:
            with mine.open("x") as file:
                file.write(f"{machine()} {os.getpid()}")
        except FileExistsError:
            return None
        for path in old:
            path.unlink(missing_ok=True)
        if self.claims(name)[-1:] == [mine]:
            return mine
        mine.unlink(missing_ok=True)
        return None


_seen: dict[tuple[Path, int], float] = {}  # a claim as last renewed, and when we first saw it so


@functools.cache
def machine() -> str:
    """This machine since its start: names are not unique, and process numbers mean nothing after a start."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (f"/{boot.read_text()[:8]}" if boot.exists() else "")


def own_arguments(unit: Unit, args: dict[str, Any]) -> list[str]:
    """The arguments that a unit does not have in common with its stage."""
    return sorted(set(parse(unit.own)[1]) & set(args))


def fingerprint(*of: Any) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------------------
# Work
# --------------------------------------------------------------------------------------------------------------------


class Job:
    """A claimed unit at work on `cores`: its command, or one command after another for each task."""

    def __init__(self, queue: Queue, unit: Unit, claim: Path, cores: list[int]):
        self.queue, self.unit, self.claim, self.cores = queue, unit, claim, cores
        self.folder, self.file, self.log = (queue.work / f"{unit.name}{end}" for end in ("", ".json", ".log"))
        status, old = queue.survey(), load(self.file)
        # When the units that it needs were begun: whatever was made anew in between, it starts from nothing.
        inputs = {n: (load(queue.work / f"{n}.json") or {}).get("begun") for n in unit.needs}
        if not old or old["finished"] or old.get("inputs") != inputs or queue.difference(unit, old, status):
            self.set_aside([] if status[unit.name].done else [queue.results / f"{unit.name}.json"])
            args, needs = queue.args(unit), {n: status[n].fingerprint for n in unit.needs}
            old = {
                "unit": unit.name, "stage": unit.stage, "command": f"python {queue.command(unit)}", "args": args,
                "own": own_arguments(unit, args), "needs": needs, "inputs": inputs,
                "fingerprint": fingerprint(args, needs), "begun": datetime.now(UTC).isoformat(" ", "milliseconds"),
                "commit": "", "hardware": "", "seconds": 0.0, "finished": False,
            }  # fmt: skip
        for key, now in (("commit", common.git_commit()), ("hardware", hardware(cores))):  # of all that worked on it
            old[key] = "; ".join(dict.fromkeys([*filter(None, old[key].split("; ")), now]))
        self.state, self.before, self.began, self.beat = old, old["seconds"], time.monotonic(), -HEARTBEAT
        self.tasks = list(TASKS) if "{task}" in unit.shared else [""]
        self.renew()
        self.start()

    def set_aside(self, results: list[Path]) -> None:
        """Moves away what is there of other arguments or inputs, or of nobody knows whom."""
        there = [path for path in (self.folder, self.file, *results) if path.exists()]
        old = self.queue.work / "old" / f"{self.unit.name}_{time.time_ns() // 10**6}"
        for path in there:
            (old / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.move(path, old / path.parent.name / path.name)
        if there:
            tell(f"{self.unit.name}: what was there is in {old}")

    def start(self) -> None:
        """Starts the next command."""
        words = shlex.split(self.queue.command(self.unit).replace("{task}", self.tasks.pop(0)))
        sets = lambda w: [str(p) for p in sorted(Path(w[:-2]).iterdir()) if p.is_dir()] if w.endswith("/*") else [w]
        argv = [sys.executable, *(x for w in words for x in sets(w)), "--out", str(self.folder), "--resume"]
        threads = str(len(self.cores))
        env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        parent = os.getpid()

        def tie() -> None:
            """In the child: its cores, and that it dies with us, or else it would write beside its successor."""
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, self.cores)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                if os.getppid() != parent:
                    os._exit(1)

        with self.log.open("ab") as log:
            log.write(f"\n$ {shlex.join(argv)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(argv, cwd=HERE, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True, preexec_fn=tie)  # fmt: skip

    def renew(self) -> bool:
        """Renews the claim and notes the time that it took so far. False where another has taken the unit over."""
        if time.monotonic() - self.beat >= HEARTBEAT:
            self.beat = time.monotonic()
            if self.queue.claims(self.unit.name)[-1:] != [self.claim]:
                return False
            os.utime(self.claim)
            self.note()
        return True

    def note(self, **more: Any) -> None:
        self.state |= {"seconds": round(self.before + time.monotonic() - self.began, 1)} | more
        common.write_json(self.file, self.state)

    def poll(self) -> str | None:
        """None while it works, "" when it is finished, else why it failed."""
        if not self.renew():
            return "this machine was silent, and another has taken it over"
        code = self.process.poll()
        if code == 0 and self.tasks:
            self.start()
        if code is None or code == 0 and self.process.poll() is None:
            return None
        if code:
            lines = [line for line in re.split(r"[\r\n]+", self.log.read_text(errors="replace")) if line.strip()]
            return "\n    ".join([f"exit code {code}; the end of {self.log}:", *lines[-12:]])
        try:
            kept = halve(self.folder)
            self.note(finished=True, **(trials(self.unit, self.folder) if self.unit.cell else curve(self.folder)))
        except InputError as error:
            return str(error)
        clear(self.folder, kept)
        self.queue.survey()  # puts it into results/
        return ""

    def stop(self) -> None:
        """Ends the command where it still runs, and gives the claim back."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, kind)
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    pass
        self.claim.unlink(missing_ok=True)


def last_weights(folder: Path) -> list[Path]:
    """The folders of models, in that of a stage, which others start from."""
    return [folder / "hf"] if (folder / "hf").exists() else common.checkpoints(folder)[-1:]


def halve(folder: Path) -> list[Path]:
    """Rounds the last weights in a stage's folder to float16: what others start from is what is shipped. What is no
    matrix stays as it is, normalisers above all. Returns the folders of the models. Raises InputError where a weight
    does not fit."""
    kept = last_weights(folder)
    for model in kept:
        tensors, partial = common.read_tensors(model / "model.safetensors"), model / "model.partial"
        half = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in tensors.items()}
        if large := [k for k, v in half.items() if torch.isinf(v).any()]:
            raise InputError(f"{model}: weights of {', '.join(large)} are too large for float16")
        save_file(half, partial, metadata={"format": "pt"})
        partial.replace(model / "model.safetensors")
    return kept


def clear(folder: Path, kept: list[Path]) -> None:
    """Removes what only training needs: other checkpoints, and the moments in those that stay."""
    for path in folder.glob("checkpoints/*"):
        if path not in kept:
            shutil.rmtree(path)
    for path in kept:
        (path / "optimizer.safetensors").unlink(missing_ok=True)


def trials(unit: Unit, folder: Path) -> dict[str, Any]:
    """The cells of a unit, one a task, from what franka.py wrote. Raises InputError where trials are missing."""
    flags = parse(unit.shared)[1]
    cells, wanted = [], [(i, flags["seed"]) for i in range(flags["trials"])]
    for task in TASKS:
        path = folder / task / "results.json"
        entries = sorted(common.read_json(path), key=lambda e: e["trial"])
        if [(e["trial"], e["seed"]) for e in entries] != wanted:
            raise InputError(f"{path} does not hold the trials (number, seed) {wanted} and no others: remove it")
        outcomes = "".join(str(int(e["success"])) for e in entries)
        why = Counter(e["reason"] for e in entries if not e["success"])
        cells.append({**unit.cell, "task": task, "successes": outcomes.count("1"), "trials": len(outcomes),
                      "outcomes": outcomes, "failures": dict(why)})  # fmt: skip
    return {"cells": cells}


def curve(folder: Path, points: int = 30) -> dict[str, Any]:
    """The validation lines of a stage's log, thinned out: {"curve": {"step": [...], "val_...": [...]}}, or {}."""
    rows = [r for r in common.read_metrics(folder) if any(k.startswith("val_") for k in r)]
    n = min(points, len(rows))
    rows = [rows[i * (len(rows) - 1) // max(1, n - 1)] for i in range(n)]
    short = lambda x: float(f"{x:.4g}") if isinstance(x, float) else x
    return {"curve": {k: [short(r.get(k)) for r in rows] for k in rows[0]}} if rows else {}


def hardware(cores: list[int]) -> str:
    """What a unit runs on, in words; on a CPU, whether it multiplies in bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", info)
    fast = ", bfloat16" * common.cpu_has_bf16()
    return f"{len(cores)} core{'s' * (len(cores) > 1)} of {name[1] if name else 'a CPU'}{fast}"


def work(queue: Queue, jobs: int, wait: float = 2.0) -> set[str]:
    """Works on units until there are none, or only such as cannot be worked on. Returns those that failed."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = max(1, len(cores) // jobs)
    at_work: dict[int, Job] = {}  # slot -> job
    failed: set[str] = set()
    said = ""
    try:
        while True:
            for slot, job in list(at_work.items()):
                if (end := job.poll()) is not None:
                    at_work.pop(slot).stop()
                    failed |= {job.unit.name} if end else set()
                    tell(f"{job.unit.name}: {'failed after' if end else 'finished in'} "
                         f"{hours(job.state['seconds'])}{': ' * bool(end)}{end}")  # fmt: skip
            while free := [slot for slot in range(jobs) if slot not in at_work]:
                status = queue.survey()
                left = [n for n in queue.units if status[n].wanted and n not in failed]
                ready = [n for n in left if all(status[x].present for x in queue.units[n].needs)]
                if ready:
                    room(queue.work)
                name, claim = next(((n, c) for n in ready if (c := queue.claim(n))), ("", None))
                if claim is None:
                    break
                if not queue.survey()[name].wanted:  # somebody finished it between our look and our claim
                    claim.unlink()
                    continue
                for needed in queue.units[name].needs:
                    queue.restore(needed)
                mine = [cores[i % len(cores)] for i in range(free[0] * share, (free[0] + 1) * share)]
                try:
                    at_work[free[0]] = Job(queue, queue.units[name], claim, mine)
                except BaseException:
                    claim.unlink(missing_ok=True)
                    raise
                spent, about = at_work[free[0]].before, hours(estimate(queue, queue.units[name]))
                tell(f"{name}: " + (f"goes on after {hours(spent)} of" if spent else "started,") + f" about {about}; "
                     f"{len(left)} units left")  # fmt: skip
            if not at_work:
                others = ", ".join(f"{n} ({who})" for n in left if (who := queue.holder(n)))
                if not others:
                    break
                if said != (said := others):
                    tell(f"waiting for others: {said}")
            time.sleep(wait)
    finally:
        for job in at_work.values():
            job.stop()
    if failed:
        behind = [n for n in queue.units if n not in failed and closure(queue.units, [n]).keys() & failed]
        tell(f"failed: {', '.join(sorted(failed))}; not tried, because they need those: {', '.join(behind) or 'none'}")
    return failed


def at_once() -> int:
    """How many units to work on at once, where nobody says."""
    if torch.cuda.is_available():
        return 1
    pages = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= getattr(os, "sysconf_names", {}).keys()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if pages else MEMORY
    return max(1, min(4, os.cpu_count() or 1, int(memory // MEMORY)))


def room(folder: Path) -> None:
    """Raises InputError where the disk is nearly full."""
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free, a unit may need {ROOM / 1e9:.0f}: make room, then the "
                         f"same command again; what is finished or half-finished is kept")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# What is said
# --------------------------------------------------------------------------------------------------------------------


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M')}  {text}", flush=True)


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds:.0f} s"


def estimate(queue: Queue, unit: Unit) -> float:
    """Seconds that a unit takes: by those of its stage that are measured, else by SECONDS; in proportion to steps."""
    args = queue.args(unit)
    # Sight alone is fast, and so is a student that stays as it is.
    alike = lambda r: all(r["args"].get(k) == args.get(k) for k in ("sight", "student_lr"))
    steps = args.get("steps", 1)
    records = [r for p in queue.results.glob("*.json") if (r := load(p)) and r["stage"] == unit.stage and alike(r)]
    rates = [r["seconds"] / r["args"].get("steps", 1) for r in records]
    return steps * (sum(rates) / len(rates) if rates else SECONDS.get(unit.stage, 60))


def listing(queue: Queue) -> str:
    """A line for each unit, and what comes next."""
    status, lines, left, following = queue.survey(), [], 0.0, ""
    wide = 2 + max(map(len, queue.units))
    for name, unit in queue.units.items():
        s, state, about = status[name], load(queue.work / f"{name}.json"), estimate(queue, unit)
        if not s.wanted:
            what = f"finished in {hours(load(queue.results / f'{name}.json')['seconds'])}"
        else:
            spent, who = state["seconds"] if state and not s.why else 0.0, queue.holder(name)
            step = next((f", step {r['step']}" for r in common.read_metrics(queue.work / name)[-1:] if spent), "")
            what = f"at work: {who}, " if who else "interrupted, " if spent else ""
            what += (f"{hours(spent)} so far{step}, of " if spent else "") + f"about {hours(about)}"
            left += max(0.0, about - spent)
            if not following and not who and all(status[x].present for x in unit.needs):
                following = f"next: {name}: python {queue.command(unit)}"
        lines.append(f"{name:{wide}}{what}" + (f"; {s.why}" if s.why else ""))
    return "\n".join([*lines, f"left: about {hours(left)}, one unit after another", following])


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    preset: Literal["small", "tiny"] = "small"
    """The size of everything: small is the real one, tiny a miniature."""
    jobs: int = 0
    """Units at once, each on its share of the cores. 0: one a core, at most 4, and for each 12 GB of memory one; one
    where there is a GPU."""
    only: str = ""
    """Only units whose name fits this pattern (* and ?, as for files), and what they need."""
    list: bool = False
    """Show every unit, its state and its hours, and do nothing."""
    ship: str = ""
    """Copy the weights of the units whose name fits this pattern, which must be finished, to weights/<preset>/."""


def main() -> None:
    args = common.parse_args(Args, {"tiny": Args("tiny"), "small": Args("small")}, __doc__)
    common.at_least(args, jobs=0)
    os.chdir(HERE)
    units = plan(args.preset)
    chosen = fnmatch.filter(units, args.only or "*")
    if not chosen:
        raise InputError(f"--only {args.only!r} fits none of {', '.join(units)}")
    queue = Queue(closure(units, chosen), Path("runs") / args.preset / "reproduce", Path("results") / args.preset,
                  Path("weights") / args.preset)  # fmt: skip
    queue.work.mkdir(parents=True, exist_ok=True)
    for path in sorted(queue.results.glob("*.json")):
        if path.stem not in units:
            print(f"{path} is no result of this queue: left alone")
    if args.list:
        print(listing(queue))
        return
    if args.ship:
        names = fnmatch.filter(queue.units, args.ship)
        if not names:
            raise InputError(f"--ship {args.ship!r} fits none of {', '.join(queue.units)}")
        for name in names:
            queue.ship(name)
        return
    status = queue.survey()
    print(f"{sum(not s.wanted for s in status.values())} of {len(status)} units are finished and kept")
    for name, s in status.items():
        if s.why:
            print(f"  {name} is made anew: {s.why}")
    failed = work(queue, args.jobs or at_once())
    print(f"tables and figures: python report.py --{args.preset}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the units end with it
    try:
        common.run_main(main, resumes=False)
    except OSError as error:  # above all, a full disk
        print(f"error: {error}: put it right, then the same command again; what is finished is kept", file=sys.stderr)
        sys.exit(2)
