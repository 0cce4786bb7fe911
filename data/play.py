"""The pretraining corpus of the simulated world: play with many things, by several bodies (DESIGN's stand-in for OXE,
AgiBot and EgoDex).

    python -m data.play --small                    # 3,000 episodes in runs/data/play: 14 minutes of a core
    python -m data.play --small --resume           # go on after an interruption; nothing is half-written
    python -m data.play --sheet docs/play.png      # a picture of every family of behaviour

    python lam.py --small --data runs/data/play/*        # train on it; `python distill.py` too

Writes LeRobot data sets side by side, one a body (10 Hz; cameras `primary` and, on a gripper, `wrist`):

    fr3       the Franka Research 3 of the five tasks: right arm, action 7, state 8
    sixaxis   an arm of another shape (six joints in another order) and of changing colour
    gripper   a gripper that floats: the same tool without an arm in the picture
    hands     two floating hands with five fingers each: all 44 actions and 46 states by name. As in EgoDex, the camera
              is a head's and moves, what the hands do is told in its frame (`observation.camera`), and the action is
              the change of pose to the next tick; only the grippers, which EgoDex lacks, are as commanded
    video     all of the above as video alone: no actions, no states

An episode is a function of (seed, disturb, data set, number): the set does not depend on workers, interruptions or
--episodes. Only successful ones are kept, as judged by a predicate of the family; the rest are counted and reported.

What it shares with the five tasks of franka.py: the FR3 and how it is drawn, its control (`franka.Arm`), the action's
and the state's meaning, the verbs that any language for a table has ("put", "pick up", "close"), and the workplace:
nine of ten scenes of the FR3 have nearly their table and light and one of the two places of their primary camera
(`scenes.AT_HOME`); in the rest, and for other bodies, these are a case or two among random ones.
What it does not: their objects (cups, block and slotted board, oven, brush, bowl of sauce, pot), their goals, their
placements and seeds. The nearest that there are: cylinders narrower and lower than a cup and never red or blue, bricks
of random sizes that go into no slot, drawers that are shut, thin bars, trays that things fall into. `HELD_OUT` lists
words that no text contains.

The bodies are in `data.bodies`, what stands on the table in `data.scenes`, what is done with it in `data.families`.
Every number without a source is our choice.
"""

import contextlib
import multiprocessing
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from common import ACTION_NAMES, ARM_ACTION, ARM_STATE, STATE_NAMES, InputError
from data.bodies import BODIES
from data.families import FAMILIES
from data.lerobot import Clip, LeRobotWriter
from data.scenes import Crowded, Scene
from franka import (
    EXPERTS,
    HZ,
    Cameras,
    Command,
    Disturbance,
    begin_work,
)

HELD_OUT = ("cup", "mug", "block", "slot", "oven", "door", "brush", "sauce", "bowl", "pot", "dip", "pan", "lid")
ATTEMPTS = 40  # at an episode, before something must be wrong

# --------------------------------------------------------------------------------------------------------------------
# Args
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    episodes: int = 30_000
    """Successful episodes of all data sets together (our choice)."""
    image_size: int = 96
    """Height and width of the pictures, in pixels (our choice)."""
    disturb: float = 1.0
    """How hard free movements are disturbed: see `franka.Disturbance` (our choice)."""
    workers: int = 2
    """Processes that simulate and render; the data do not depend on it (our choice)."""
    seed: int = 0
    """Seed of everything (our choice)."""
    out: str = "runs/data/play"
    """Folder of the data sets."""
    resume: bool = False
    """Go on in a folder that already holds episodes (our choice)."""
    sheet: str = ""
    """Instead of recording, draw this PNG: a row of frames of each family."""


TINY = Args(episodes=20, image_size=64, out="runs/tiny/play")
SMALL = Args(episodes=3000, disturb=2)

# --------------------------------------------------------------------------------------------------------------------
# One episode
# --------------------------------------------------------------------------------------------------------------------

LIMIT = 120  # ticks
_eyes: dict[tuple[int, int], Cameras] = {}  # of this process: a GL context takes longer than an episode


@dataclass(frozen=True)
class Corpus:
    """A data set of the corpus: whose play, its share of all episodes, its columns."""

    bodies: tuple[str, ...]
    share: float
    cameras: tuple[str, ...] = ("primary", "wrist")
    action_names: tuple[str, ...] = ARM_ACTION
    state_names: tuple[str, ...] = ARM_STATE
    moving_camera: bool = False


CORPORA = {
    "fr3": Corpus(("fr3",), 0.8),
    "sixaxis": Corpus(("sixaxis",), 0.05),
    "gripper": Corpus(("gripper",), 0.05),
    "hands": Corpus(("hands",), 0.05, ("primary",), ACTION_NAMES, STATE_NAMES, True),
    "video": Corpus(tuple(BODIES), 0.05, ("primary",), (), ()),
}


def behaviour(corpus: str, number: int) -> tuple[str, str]:
    """Body and family of an episode: they take turns."""
    bodies = CORPORA[corpus].bodies
    body = bodies[number % len(bodies)]
    able = [name for name, family in FAMILIES.items() if body in family.bodies]
    return body, able[number // len(bodies) % len(able)]


def play(
    body: str, family: str, entropy: Sequence[int], size: int = 96, cameras: Sequence[str] = ("primary",),
    disturb: float = 1.0,
) -> tuple[dict | None, str]:  # fmt: skip
    """One attempt, a function of its arguments. Returns what was seen and done, or None and why it is no success:
    "frames" by camera, lists of uint8 (size, size, 3), empty where size is 0; "action" (n, A) and "state" (n, S), of
    the body's columns; "task", "subtasks"; "camera" (n, 7), the primary camera's pose."""
    rng = np.random.default_rng(np.random.SeedSequence(list(entropy)))
    try:
        scene = Scene(body, FAMILIES[family], rng)
    except Crowded:
        return None, "no room"
    script, disturbance = scene.family.expert(scene), Disturbance(rng, disturb)
    if size:
        key = size, len(cameras)
        if key not in _eyes:
            _eyes[key] = Cameras(scene.model, tuple(cameras), size)
        _eyes[key].watch(scene.model, tuple(cameras))
    seen: dict[str, list] = {camera: [] for camera in cameras}
    rows = defaultdict(list)
    while scene.clock < LIMIT and (wanted := next(script, None)) is not None:
        wanted = wanted if isinstance(wanted, dict) else {scene.actor.side: wanted}
        commands = {side: wanted.get(side) or scene.idle(limb) for side, limb in scene.limbs.items()}
        for camera, image in (_eyes[key].render(scene.data) if size else {}).items():
            seen[camera].append(image)
        rows["state"].append(scene.state())
        rows["camera"].append(scene.camera_pose())
        rows["action"].append(scene.action(commands))
        rows["subtasks"].append(next(iter(wanted.values())).phase)
        push = disturbance.push(all(c.free for c in wanted.values()))
        scene.step({side: _pushed(command, push) if side in wanted else command for side, command in commands.items()})
        scene.family.watch(scene)
    reason = scene.family.check(scene) if scene.clock < LIMIT else "too slow"
    moved = [np.linalg.norm(scene.where(name)[0] - scene.before[name]) for name in scene.bystanders]
    if reason or max(moved, default=0) > 0.02:
        return None, reason or "something else was moved"
    stacked = {key: np.stack(rows[key]) for key in ("action", "state", "camera")}
    if body == "hands":
        rows["state"].append(scene.state())
        stacked["action"] = hand_action(np.stack(rows["state"]), stacked["action"])
    return {"frames": seen, "task": scene.family.instruction, "subtasks": rows["subtasks"]} | stacked, ""


def hand_action(state: np.ndarray, commanded: np.ndarray) -> np.ndarray:
    """What two hands did, as recordings of people have it: the change of pose from each tick to the next. state
    (n + 1, 46); commanded (n, 14), of which the grippers count. Returns (n, 44)."""
    parts = []
    for _, a, s in common.ARMS:
        p, q = state[:, s : s + 3], state[:, s + 3 : s + 7]
        parts += [common.relative_action(p[:-1], q[:-1], p[1:], q[1:]), commanded[:, a + 6 : a + 7]]
    return np.concatenate([*parts, np.diff(state[:, 16:], axis=0)], 1).astype(np.float32)


def _pushed(command: Command, push: np.ndarray) -> Command:
    position, quaternion = common.apply_action(command.position, command.quaternion, push)
    return command._replace(position=position, quaternion=quaternion)


def make(corpus: str, number: int, seed: int, size: int, disturb: float = 1.0) -> tuple[dict, list[str], float]:
    """Episode `number` of a data set: the first success. Returns the arguments of LeRobotWriter.add_episode, why the
    attempts before it were dropped, and the seconds all took. A worker runs this."""
    start, dropped, of = time.perf_counter(), [], CORPORA[corpus]
    body, family = behaviour(corpus, number)
    for attempt in range(ATTEMPTS):
        entropy = (seed, list(CORPORA).index(corpus), number, attempt)
        episode, reason = play(body, family, entropy, size, of.cameras, disturb)
        if episode is not None:
            break
        dropped.append(reason)
    else:
        raise RuntimeError(f"{family} by {body}, number {number}: {ATTEMPTS} attempts failed, {Counter(dropped)}")
    episode["frames"] = {c: Clip.encode(images, (size, size), HZ) for c, images in episode["frames"].items()}
    if not of.moving_camera:
        del episode["camera"]
    if not of.action_names:
        episode |= {key: episode[key][:, :0] for key in ("action", "state")}
    return episode, dropped, time.perf_counter() - start


# --------------------------------------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------------------------------------


def order(episodes: int) -> list[tuple[str, int]]:
    """Which data set each of the corpus's episodes belongs to, and its number there: first one of each, so that none
    is empty. A larger corpus begins alike."""
    made, out = dict.fromkeys(CORPORA, 0), []
    for i in range(episodes):
        corpus = max(CORPORA, key=lambda name: (not made[name], CORPORA[name].share * (i + 1) - made[name]))
        out.append((corpus, made[corpus]))
        made[corpus] += 1
    return out


def record(args: Args) -> None:
    """Writes the data sets, all of them growing together; prints what was kept and dropped of each family."""
    if args.image_size % 2:
        raise InputError(f"--image-size {args.image_size}: must be even (h264 halves the colours)")
    play("gripper", "lift", (0,), args.image_size)  # a missing GL library is said here, not by a worker
    out = Path(args.out)
    settings = {"experts": EXPERTS, "seed": args.seed, "image_size": args.image_size, "disturb": args.disturb}
    kept, dropped, spent, ticks = Counter(), defaultdict(Counter), Counter(), Counter()
    with contextlib.ExitStack() as stack:
        writers = {}
        for name, corpus in CORPORA.items():
            path = out / name / "meta/play.json"
            there = common.read_json(path) if path.exists() else "another program"
            if args.resume and (out / name / "meta/info.json").exists() and there != settings:
                raise InputError(f"{out / name} was made with {there}, not {settings}: choose another --out")
            writers[name] = LeRobotWriter(
                out / name, HZ, corpus.bodies[0] if len(corpus.bodies) == 1 else "several", corpus.action_names,
                corpus.state_names, {c: (args.image_size,) * 2 for c in corpus.cameras}, args.resume,
                moving_camera=corpus.moving_camera,
            )  # fmt: skip
        for name, writer in writers.items():
            (out / name / "meta").mkdir(parents=True, exist_ok=True)
            common.write_json(out / name / "meta/play.json", settings)
            stack.enter_context(writer)
        wanted = order(args.episodes)
        missing = deque(job for job in wanted if job[1] >= writers[job[0]].num_episodes)
        if len(missing) < len(wanted):
            print(f"{out} holds {len(wanted) - len(missing)} of {len(wanted)} episodes already")
        # Spawned, not forked: a GL context does not survive a fork.
        pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), begin_work)
        stack.callback(pool.shutdown, cancel_futures=True)
        bar = stack.enter_context(tqdm(total=len(missing), desc="play", unit="episode", mininterval=1))
        running: deque = deque()
        try:
            while missing or running:
                while missing and len(running) < 4 * args.workers:
                    job = missing.popleft()
                    running.append((job, pool.submit(make, *job, args.seed, args.image_size, args.disturb)))
                job, future = running.popleft()
                episode, reasons, seconds = future.result()
                writers[job[0]].add_episode(**episode)
                family = behaviour(*job)[1]
                kept[family] += 1
                dropped[family].update(reasons)
                spent[family] += seconds
                ticks[family] += len(episode["action"])
                bar.update()
        except BrokenProcessPool:
            raise InputError(
                f"a worker process died (out of memory?): run again with --workers 1 --resume --out {out}"
            ) from None
    print(f"{'family':10s} {'kept':>5s} {'dropped':>7s} {'ticks':>6s} {'s each':>6s}  why dropped")
    for family in filter(kept.get, FAMILIES):
        why = ", ".join(f"{reason} {n}" for reason, n in dropped[family].most_common())
        n = kept[family]
        print(
            f"{family:10s} {n:5d} {dropped[family].total():7d} {ticks[family] / n:6.1f} {spent[family] / n:6.2f}  {why}"
        )
    print(f"wrote {', '.join(f'{out}/{name} ({w.num_episodes})' for name, w in writers.items())}")


# --------------------------------------------------------------------------------------------------------------------
# The sheet
# --------------------------------------------------------------------------------------------------------------------


def sheet(path: Path, seed: int, size: int = 96, frames: int = 6) -> None:
    """Draws frames of an episode of each family, the bodies taking turns, with its instruction; two families a row."""
    from PIL import Image, ImageDraw, ImageFont

    label, gap = 17, 3
    width, height = frames * (size + gap) + 4 * gap, size + label + gap
    page = Image.new("RGB", (2 * width - 3 * gap, height * ((len(FAMILIES) + 1) // 2)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for k, (name, family) in enumerate(tqdm(FAMILIES.items(), "sheet", unit="family")):
        body = family.bodies[k % len(family.bodies)]
        tries = (play(body, name, (seed, len(CORPORA), k, attempt), size)[0] for attempt in range(ATTEMPTS))
        episode, left, top = next(filter(None, tries)), k % 2 * width, k // 2 * height
        draw.text((left + gap, top), f"{name}, {body}: {episode['task']}", "black", font)
        shown = np.linspace(0, len(episode["action"]) - 1, frames).round().astype(int)
        for i, t in enumerate(shown):
            page.paste(Image.fromarray(episode["frames"]["primary"][t]), (left + gap + i * (size + gap), top + label))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, optimize=True)  # in true colours: a palette would bend those that texts name
    print(f"wrote {path}")


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    common.at_least(args, episodes=1, image_size=16, disturb=0, workers=1, seed=0)
    if not args.sheet:
        record(args)
    elif Path(args.sheet).suffix != ".png":
        raise InputError(f"--sheet {args.sheet}: give a file that ends in .png")
    else:
        sheet(Path(args.sheet), args.seed)


if __name__ == "__main__":
    common.run_main(main)
