"""The pretraining corpus of the simulated world: play with many things, by several bodies (DESIGN's stand-in for OXE,
AgiBot and EgoDex).

    python -m data.play --small                    # 3,000 episodes in runs/data/play: 12 minutes of a core, by 240
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

An episode is a function of (seed, data set, number): the set does not depend on the workers, on interruptions or on
--episodes. Only successful ones are kept, as judged by a predicate of the family; the rest are counted and reported.

What it shares with the five tasks of franka.py: the FR3 and how it is drawn, its control (`franka.Arm`), the action's
and the state's meaning, the table and the light (as one case of random ones), and the two places of their primary
camera (as two cases among random ones), and the verbs that any language for a table has ("put", "pick up", "close").
What it does not: their objects (cups, block and slotted board, oven, brush, bowl of sauce, pot), their goals, their
placements and seeds. The nearest that there are: cylinders narrower and lower than a cup and never red or blue, bricks
of random sizes that go into no slot, drawers that are shut, thin bars, trays that things fall into. `HELD_OUT` lists
words that no text contains.

Every number without a source is our choice.
"""

import contextlib
import itertools
import multiprocessing
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import common
from common import ACTION_NAMES, ARM_ACTION, ARM_STATE, STATE_NAMES, InputError
from data.lerobot import Clip, LeRobotWriter
from franka import (
    CLOSED,
    HOME,
    HZ,
    MAX_OPENING,
    OPEN,
    POSTURE,
    SUBSTEPS,
    Arm,
    Cameras,
    Command,
    Disturbance,
    Oven,
    Task,
    World,
    add_free,
    add_geom,
    begin_work,
    fold,
    fr3_spec,
    hold,
    import_mujoco,
    look_at,
    pointing_down,
    reach,
    stage,
)

HELD_OUT = ("cup", "mug", "block", "slot", "oven", "door", "brush", "sauce", "bowl", "pot", "dip", "pan", "lid")
LOW, HIGH = np.array([0.36, -0.27]), np.array([0.66, 0.27])  # m: where things may stand
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
SMALL = Args(episodes=3000)

# --------------------------------------------------------------------------------------------------------------------
# Bodies
# --------------------------------------------------------------------------------------------------------------------

FINGERS = ("thumb", "index", "middle", "ring", "little")
Z = np.array([0.0, 0.0, 1.0])


class Limb(Arm):
    """An arm, or what floats in its place, with a parallel gripper. `home` says where it waits."""

    tips = 0

    def __init__(self, world: World, side: str, home, posture, tool="tool", first=0, grips=1):
        super().__init__(world.model, world.data, first, tool, np.array(home), np.array(posture))
        self.world, self.side = world, side
        n = first + len(home)
        self.grips, self.fingers = slice(n, n + grips), slice(n, n + 2)

    def begin(self) -> None:
        """Opens the gripper at once, where `start` has put the tool."""
        self.data.ctrl[self.servos] = self.joints
        self.data.qpos[self.fingers] = self.data.ctrl[self.grips] = MAX_OPENING / 2

    def close(self, gripper: float) -> None:
        """What this tick asks of the fingers."""
        self.data.ctrl[self.grips] = MAX_OPENING / 2 if gripper > 0.5 else 0.0

    def opening(self) -> float:
        return float(np.clip(self.data.qpos[self.fingers].sum() / MAX_OPENING, 0, 1))

    def holds(self, thing: str) -> bool:
        return self.world.held(thing)

    def state(self) -> np.ndarray:
        """(8,), as common.ARM_STATE has it."""
        return np.concatenate([*self.pose(), [self.opening()]])


class Hand(Limb):
    """A floating hand with five fingers of two joints each, which close between open (0) and closed (1), each at a pace
    of its own."""

    tips = 5
    open_joints, closed_joints = np.array([0.6, -0.75]), np.array([-0.1, -0.5])  # rad: proximal, distal

    def __init__(self, world: World, side: str, rng: np.random.Generator):
        first = 0 if side == "left" else 16
        super().__init__(world, side, np.zeros(6), np.zeros(6), f"{side}_tool", first)
        self.grips = self.fingers = slice(first + 6, first + 16)
        self.sites = [world.model.site(f"{side}_{f}_tip").id for f in FINGERS]
        self.pace, self.closed, self.resting = rng.uniform(0.22, 0.34, 5), np.zeros(5), np.zeros(5)

    def begin(self) -> None:
        self.data.ctrl[self.servos] = self.joints
        self.data.qpos[self.fingers] = self.data.ctrl[self.grips] = self._angles()

    def _angles(self) -> np.ndarray:
        part = self.closed[:, None]
        return ((1 - part) * self.open_joints + part * self.closed_joints).ravel()

    def close(self, gripper: float) -> None:
        goal = np.maximum(1.0 - gripper, self.resting)
        self.closed = np.clip(goal, self.closed - self.pace, self.closed + self.pace)
        self.data.ctrl[self.grips] = self._angles()

    def opening(self) -> float:
        angles = self.data.qpos[self.fingers].reshape(5, 2)[:, 0]
        opened, closed = self.open_joints[0], self.closed_joints[0]
        return float(np.clip((angles - closed) / (opened - closed), 0, 1).mean())

    def holds(self, thing: str) -> bool:
        touched = [self.world.touching(thing, f"{self.side}_{f}_finger") for f in FINGERS]
        return touched[0] and any(touched[1:])

    def tip_positions(self) -> np.ndarray:
        """Where the fingertips are (5, 3)."""
        return self.data.site_xpos[self.sites].copy()


def _servo(spec, joint, kp: float, kd: float) -> None:
    servo = spec.add_actuator(name=joint.name, target=joint.name, trntype=import_mujoco().mjtTrn.mjTRN_JOINT)
    servo.set_to_position(kp=kp, kv=kd)


def _joint(spec, body, name: str, axis, span, kp: float, kd: float, slide=False, armature=0.01):
    kind = import_mujoco().mjtJoint
    joint = body.add_joint(
        name=name, axis=axis, range=span, armature=armature, limited=1,
        type=kind.mjJNT_SLIDE if slide else kind.mjJNT_HINGE,
    )  # fmt: skip
    _servo(spec, joint, kp, kd)


def _floating(spec, name: str, tool: str):
    """A body that six servos carry, with a tool site at its origin; its joint positions are x y z, yaw pitch roll."""
    body = spec.body("base").add_body(name=name, gravcomp=1)
    for axis, span in zip("xyz", ((-1, 2), (-2, 2), (-1, 2)), strict=True):
        _joint(spec, body, f"{name}_{axis}", np.eye(3)["xyz".index(axis)], span, 6000, 260, slide=True)
    for axis in "zyx":
        _joint(spec, body, f"{name}_r{axis}", np.eye(3)["xyz".index(axis)], (-3, 3), 120, 5)
    body.add_site(name=tool, group=4)
    return body


def _gripper(spec, body, rgba, dark) -> None:
    """Two fingers that close along y, below a `body` whose origin lies between their tips; and a wrist camera."""
    add_geom(body, "box", (0.024, 0.075, 0.02), (0, 0, 0.078), rgba, 0.3)
    add_geom(body, "cylinder", (0.032, 0.02), (0, 0, 0.115), dark, 0.2)
    for side, sign in (("left", 1), ("right", -1)):
        finger = body.add_body(name=f"{side}_finger", gravcomp=1)
        add_geom(finger, "box", (0.011, 0.005, 0.032), (0, sign * 0.005, 0.024), dark, 0.03)
        # A contact is as stiff as what meets there is heavy: light fingers would sink into things, and lose them.
        _joint(spec, finger, f"{side}_finger", (0, sign, 0), (0, MAX_OPENING / 2), 1500, 80, slide=True, armature=0.15)
    eye = np.array([-0.1, 0, 0.06])
    body.add_camera(name="wrist", pos=eye, quat=look_at(eye, (0, 0, -0.025), up=(1, 0, 0)), fovy=72)


def _empty():
    spec = import_mujoco().MjSpec()
    spec.compiler.degree = False
    spec.worldbody.add_body(name="base")
    return spec


def _colour(rng, low=0.1, high=0.95) -> tuple:
    return (*rng.uniform(low, high, 3), 1)


def build_fr3(rng):
    spec = fr3_spec("capsule")
    return spec, lambda world: [Limb(world, "right", HOME, POSTURE)]


def build_sixaxis(rng):
    """Shoulder yaw and pitch, elbow, and a wrist of pitch, roll and yaw, of capsules."""
    spec, paint, trim = _empty(), _colour(rng), _colour(rng, 0.05, 0.4)
    radius = rng.uniform(0.035, 0.055)

    def link(parent, name, pos, axis, end, thick=1.0, rgba=paint):
        body = parent.add_body(name=name, pos=pos, gravcomp=1)
        _joint(spec, body, name, axis, (-3, 3), 4000, 200, armature=0.1)
        mj = import_mujoco()
        body.add_geom(
            type=mj.mjtGeom.mjGEOM_CAPSULE, fromto=[0, 0, 0, *end], size=(thick * radius, 0, 0), rgba=rgba,
            contype=0, conaffinity=0, mass=1, group=2,
        )  # fmt: skip
        return body

    base = spec.body("base")
    add_geom(base, "cylinder", (0.08, 0.06), (0, 0, 0.06), trim, visual=True)
    body = link(base, "shoulder", (0, 0, 0.14), Z, (0, 0, 0.16), 1.3, trim)
    body = link(body, "upper", (0, 0.07, 0.16), (0, 1, 0), (0.42, 0, 0), 1.1)
    body = link(body, "fore", (0.42, -0.07, 0), (0, 1, 0), (0.4, 0, 0), 0.9)
    body = link(body, "bend", (0.4, 0, 0), (0, 1, 0), (0, 0.05, 0), 0.9, trim)
    body = link(body, "roll", (0, 0, 0), (1, 0, 0), (0, 0, -0.05), 0.8)
    body = link(body, "turn", (0, 0, 0), Z, (0, 0, -0.06), 0.7, trim)
    hand = body.add_body(name="hand", pos=(0, 0, -0.18), gravcomp=1)
    hand.add_site(name="tool", group=4)
    _gripper(spec, hand, paint, trim)
    stage(spec)
    home = (0, -1.1, 1.9, -0.8, 0, 0)
    return spec, lambda world: [Limb(world, "right", home, np.zeros(6), grips=2)]


def build_gripper(rng):
    spec = _empty()
    _gripper(spec, _floating(spec, "hand", "tool"), _colour(rng), _colour(rng, 0.05, 0.5))
    stage(spec)
    return spec, lambda world: [Limb(world, "right", np.zeros(6), np.zeros(6), grips=2)]


SKINS = ((0.95, 0.78, 0.66), (0.85, 0.62, 0.46), (0.6, 0.4, 0.28), (0.36, 0.24, 0.17), (0.25, 0.45, 0.75))  # one glove


def build_hands(rng):
    """Mirror images: thumb on the inside, the four fingers opposite, closing along y."""
    spec, mj = _empty(), import_mujoco()
    skin, sleeve = (*SKINS[rng.integers(len(SKINS))], 1), _colour(rng)

    def bone(body, end, radius, rgba=skin):
        geom = body.add_geom(
            type=mj.mjtGeom.mjGEOM_CAPSULE, fromto=[0, 0, 0, *end], size=(radius, 0, 0), rgba=rgba, mass=0.02, group=1,
            condim=4, friction=(1.2, 0.02, 0.0005), solref=(0.01, 1), solimp=(0.95, 0.99, 0.001, 0.5, 2),
            contype=0, conaffinity=1,
        )  # fmt: skip
        return geom  # which touches things, and no other part of a hand

    for side, out in (("left", 1), ("right", -1)):
        palm = _floating(spec, f"{side}_palm", f"{side}_tool")
        add_geom(palm, "box", (0.042, 0.03, 0.022), (0, 0, 0.1), skin, 0.3).contype = 0
        arm = palm.add_body(name=f"{side}_forearm", pos=(-0.03, 0, 0.115), gravcomp=1)
        bone(arm, (-0.2, out * 0.11, 0.07), 0.025, sleeve).conaffinity = 0
        for i, finger in enumerate(FINGERS):
            # The thumb faces the others from the other side: left and right hands are mirror images.
            sign = -out if finger == "thumb" else out
            x = 0.012 if finger == "thumb" else 0.036 - 0.023 * (i - 1)
            length = (0.9, 1.0, 1.06, 1.0, 0.85)[i]
            near = palm.add_body(name=f"{side}_{finger}", pos=(x, sign * 0.03, 0.075), gravcomp=1)
            axis = (sign, 0, 0)  # positive: outwards
            _joint(spec, near, f"{side}_{finger}_near", axis, (-1.2, 0.9), 5, 0.15, armature=0.0005)
            bone(near, (0, 0, -0.045), 0.0095)
            far = near.add_body(name=f"{side}_{finger}_finger", pos=(0, 0, -0.045), gravcomp=1)
            _joint(spec, far, f"{side}_{finger}_far", axis, (-1.6, 0.3), 5, 0.15, armature=0.0005)
            bone(far, (0, 0, -0.04 * length), 0.0085)
            far.add_site(name=f"{side}_{finger}_tip", pos=(0, 0, -0.04 * length), group=4)
    stage(spec)
    return spec, lambda world: [Hand(world, side, rng) for side in ("left", "right")]


BODIES = {"fr3": build_fr3, "sixaxis": build_sixaxis, "gripper": build_gripper, "hands": build_hands}

CAMERAS = np.array([Task.camera, Oven.camera])  # of the five tasks: (2, place and aim, 3)

# --------------------------------------------------------------------------------------------------------------------
# Things
# --------------------------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (0.85, 0.12, 0.12), "green": (0.15, 0.6, 0.2), "blue": (0.12, 0.28, 0.85), "yellow": (0.95, 0.82, 0.15),
    "orange": (0.95, 0.5, 0.1), "purple": (0.5, 0.2, 0.65), "pink": (0.95, 0.55, 0.7), "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.09), "brown": (0.42, 0.26, 0.13), "turquoise": (0.2, 0.75, 0.75), "grey": (0.5, 0.5, 0.52),
}  # fmt: skip
# How a thing stands: "flat" on top and below; "high" ones can be knocked over; all can be gripped across y.
GRASPABLE = ("cube", "brick", "ball", "can", "egg", "bar", "tower", "cross", "puck")
FLAT = ("cube", "brick", "can", "puck", "cross")


@dataclass
class Thing:
    """Something on the table: the name of its body, what it is called, half its height, the radius of its footprint,
    where it stands and how it is turned; `period` is the angle after which the gripper may take it just as well."""

    name: str
    words: str
    half: float
    radius: float
    at: np.ndarray
    yaw: float
    period: float


def shape(kind: str, rng: np.random.Generator) -> tuple[list[tuple], float, float, float]:
    """Primitives (kind, size, position) of a thing, half its height, its radius, its period. Metres, radians."""
    u = rng.uniform
    if kind == "cube":
        a = u(0.019, 0.031)
        return [("box", (a, a, a), (0, 0, 0))], a, 1.42 * a, np.pi / 2
    if kind == "brick":
        x, y, z = u(0.034, 0.052), u(0.016, 0.027), u(0.015, 0.026)
        return [("box", (x, y, z), (0, 0, 0))], z, float(np.hypot(x, y)), np.pi
    if kind == "bar":
        x, y = u(0.05, 0.07), u(0.011, 0.016)
        return [("box", (x, y, y), (0, 0, 0))], y, x, np.pi
    if kind == "tower":
        a, z = u(0.016, 0.022), u(0.048, 0.065)
        return [("box", (a, a, z), (0, 0, 0))], z, 1.42 * a, np.pi / 2
    if kind == "ball":
        r = u(0.02, 0.033)
        return [("sphere", (r,), (0, 0, 0))], r, r, 0.0
    if kind == "egg":
        x, y = u(0.03, 0.04), u(0.02, 0.028)
        return [("ellipsoid", (x, y, y), (0, 0, 0))], y, x, np.pi
    if kind == "can":
        r, z = u(0.018, 0.026), u(0.024, 0.036)
        return [("cylinder", (r, z), (0, 0, 0))], z, r, 0.0
    if kind == "puck":
        r, z = u(0.026, 0.035), u(0.012, 0.018)
        return [("cylinder", (r, z), (0, 0, 0))], z, r, 0.0
    if kind == "cross":
        a, b, z = u(0.032, 0.042), u(0.011, 0.014), u(0.013, 0.018)
        return [("box", (a, b, z), (0, 0, 0)), ("box", (b, a, z), (0, 0, 0))], z, a, np.pi / 2
    raise AssertionError(kind)


class Crowded(Exception):
    """There is no room left for what an episode needs: it is dropped."""


class Scene(World):
    """One episode's world: a body, what a family of behaviour needs, and around it what has nothing to do with it.

    Everything is a function of (rng, body, family). `right` and `left` are limbs; `actor` is the one that the family's
    expert moves, the hand nearer to what it is about where there are two."""

    def __init__(self, body: str, family: "type[Family]", rng: np.random.Generator):
        self.rng, self.body = rng, body
        self.spec, limbs = BODIES[body](rng)
        self.root, self.taken, self.named, self.things = self.spec.worldbody, [], set(), {}
        self.movers: list = []
        self.family = family(rng)
        self.family.build(self)
        wanted, self.points = set(self.things), [at for at, _ in self.taken]
        for _ in range(rng.integers(0, 5)):
            with contextlib.suppress(Crowded):
                self.thing(GRASPABLE)
        self.bystanders = set(self.things) - wanted
        self._surroundings()
        self._camera()
        quality = self.spec.visual.quality
        quality.shadowsize, quality.offsamples = 0, 0  # as in franka.py at up to 128 px
        quality.numslices, quality.numstacks = 16, 8  # of round things: a third of the time, to the eye the same
        super().__init__(self.spec)
        self.limbs = {limb.side: limb for limb in limbs(self)}
        focus = self.family.focus
        side = "right" if len(self.limbs) == 1 or (focus is not None and focus[1] < 0.03) else "left"
        self.actor = self.limbs[side]
        self._start()

    # ---- building ----

    def spot(self, radius: float, low=LOW, high=HIGH, gap=0.035) -> np.ndarray:
        """A place (2,) for something of this radius beside what is there. Raises Crowded."""
        for at in self.rng.uniform(low, high, (100, 2)):
            if all(np.linalg.norm(at - other) > radius + r + gap for other, r in self.taken):
                self.taken.append((at, radius))
                return at
        raise Crowded

    def paint(self, nouns: Sequence[str]) -> tuple[str, str, tuple]:
        """A noun and a colour that together name nothing yet: the noun, "red ball", rgba."""
        for _ in range(50):
            noun, colour = str(self.rng.choice(nouns)), str(self.rng.choice(list(COLOURS)))
            like_a_cup = noun in ("can", "puck") and colour in ("red", "blue")
            if (words := f"{colour} {noun}") not in self.named and not like_a_cup:
                self.named.add(words)
                rgb = np.clip(np.array(COLOURS[colour]) + self.rng.uniform(-0.05, 0.05, 3), 0, 1)
                return noun, words, (*rgb, 1)
        raise Crowded

    def thing(self, kinds: Sequence[str], low=LOW, high=HIGH, turn=0.9, near=None) -> Thing:
        """Adds one free thing at random, or `near` a place (2,)."""
        kind, words, rgba = self.paint(kinds)
        parts, half, radius, period = shape(kind, self.rng)
        at = self.spot(radius, low, high) if near is None else near
        yaw, name = self.rng.uniform(-turn, turn), f"thing{len(self.things)}"
        body = add_free(self.root, name)
        body.pos, body.quat = (*at, half), (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
        for k, (geom, size, pos) in enumerate(parts):
            add_geom(body, geom, size, pos, rgba, self.rng.uniform(0.04, 0.12) / len(parts))
            if kind in ("ball", "egg", "can", "puck"):  # round ones would roll for ever
                body.geoms[k].condim, body.geoms[k].friction = 6, (1, 0.02, 0.002)
        self.things[name] = Thing(name, words, half, radius, np.array(at), yaw, period)
        return self.things[name]

    def fixed(self, name: str, nouns: Sequence[str], radius: float, low=LOW, high=HIGH, turn=0.0):
        """Adds a body that stands fast. Returns (body, words, rgba, at, yaw)."""
        _, words, rgba = self.paint(nouns)
        at, yaw = self.spot(radius, low, high), self.rng.uniform(-turn, turn)
        body = self.root.add_body(name=name, pos=(*at, 0), quat=(np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)))
        return body, words, rgba, at, yaw

    def tray(self, name: str, nouns: Sequence[str], half: float, wall: float):
        """A square open box that stands fast, of half an inner width and a height of its walls. Returns (words, at)."""
        body, words, rgba, at, _ = self.fixed(name, nouns, 1.35 * half)
        add_geom(body, "box", (half, half, 0.002), (0, 0, 0.002), rgba)
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            size = (0.003 if x else half + 0.006, 0.003 if y else half + 0.006, wall / 2)
            add_geom(body, "box", size, ((half + 0.003) * x, (half + 0.003) * y, wall / 2), 0.85 * np.array(rgba))
        return words, at

    def _surroundings(self) -> None:
        """Table, light, spots of colour on the table, and things that move by themselves."""
        rng, root = self.rng, self.root
        table, light = next(g for g in self.spec.geoms if g.name == "table"), self.spec.lights[0]
        table.rgba[:3] = (
            table.rgba[:3] + rng.uniform(-0.08, 0.08, 3) if rng.random() < 0.3 else rng.uniform(0.15, 0.9, 3)
        )
        light.dir = light.dir + rng.uniform(-0.6, 0.6, 3) * (1, 1, 0)
        light.diffuse = rng.uniform(0.3, 0.65) * rng.uniform(0.85, 1.0, 3)
        self.spec.visual.headlight.ambient = rng.uniform(0.35, 0.5) * np.ones(3)
        for _ in range(rng.integers(0, 4)):  # flat spots of other colours, anywhere
            size = (*rng.uniform(0.03, 0.2, 2), rng.uniform(0.0001, 0.0005))  # no two in one plane
            at = (*rng.uniform((0.25, -0.5), (0.95, 0.5)), 0.0)
            add_geom(root, "box", size, at, (*np.clip(table.rgba[:3] + rng.uniform(-0.2, 0.2, 3), 0, 1), 1),
                     yaw=rng.uniform(0, 3), visual=True)  # fmt: skip
        for k in range(rng.choice([0, 1, 2], p=[0.35, 0.45, 0.2])):
            self._mover(k)

    def _mover(self, k: int) -> None:
        """Something that moves whatever the body does, at the border of the scene: it is seen, and touches nothing."""
        rng, kind = self.rng, self.rng.choice(["ball", "belt", "swing", "fan", "car"])
        side = rng.choice(["left", "right", "far"])
        along, across = (Z[[2, 0, 1]], Z[[0, 2, 1]]) if side != "far" else (Z[[0, 2, 1]], Z[[2, 0, 1]])
        away = {"left": 1, "right": -1, "far": 1}[side] * rng.uniform(0.4, 0.55) + (0.4 if side == "far" else 0)
        middle = along * (0.5 if side != "far" else 0.0) + across * away  # (3,)
        rgba, speed, start = _colour(rng), rng.uniform(0.08, 0.3) * rng.choice([-1, 1]), rng.uniform(-0.35, 0.35)
        body = self.root.add_body(name=f"mover{k}", mocap=True, pos=(0, 0, -1))
        turning = lambda t: (1, 0, 0, 0)
        if kind == "ball":
            r = rng.uniform(0.025, 0.05)
            add_geom(body, "sphere", (r,), (0, 0, r), rgba, visual=True)
            path = lambda t: middle + along * (start + speed * t * np.exp(-0.1 * t))
        elif kind == "belt":
            size = np.abs(along) * 0.6 + np.abs(across) * 0.05 + Z * 0.004
            add_geom(self.root, "box", size, middle, (0.2, 0.2, 0.22, 1), visual=True)
            for gap in (-0.3, 0.0, 0.3):
                add_geom(body, "box", rng.uniform(0.02, 0.04, 3), along * gap + Z * 0.03, _colour(rng), visual=True)
            path = lambda t: middle + along * ((start + speed * t + 0.3) % 0.6 - 0.3)
        elif kind == "swing":
            add_geom(body, "sphere", (rng.uniform(0.02, 0.045),), (0, 0, 0), rgba, visual=True)
            add_geom(body, "cylinder", (0.004, 0.3), (0, 0, 0.3), (0.3, 0.3, 0.3, 1), visual=True)
            pace = rng.uniform(2.5, 5)
            path = lambda t: (
                middle + along * (start + 0.12 * np.sin(pace * t)) + Z * (0.1 - 0.03 * np.cos(2 * pace * t))
            )
        elif kind == "fan":
            for yaw in (0, np.pi / 2):
                add_geom(body, "box", (rng.uniform(0.05, 0.09), 0.012, 0.004), (0, 0, 0.07), rgba, yaw=yaw, visual=True)
            add_geom(body, "cylinder", (0.01, 0.035), (0, 0, 0.035), (0.3, 0.3, 0.3, 1), visual=True)
            path = lambda t: middle + along * start
            turning = lambda t: (np.cos(8 * speed * t), 0, 0, np.sin(8 * speed * t))
        else:
            add_geom(body, "box", (0.045, 0.022, 0.014), (0, 0, 0.024), rgba, visual=True)
            add_geom(body, "box", (0.02, 0.02, 0.012), (-0.005, 0, 0.048), _colour(rng), visual=True)
            for x, y in itertools.product((-0.028, 0.028), (-0.02, 0.02)):
                add_geom(body, "sphere", (0.012,), (x, y, 0.012), (0.1, 0.1, 0.1, 1), visual=True)
            r, pace = rng.uniform(0.05, 0.1), 8 * speed
            path = lambda t: middle + along * start + r * np.array([np.sin(pace * t), -np.cos(pace * t), 0])
            turning = lambda t: (np.cos(pace * t / 2), 0, 0, np.sin(pace * t / 2))
        self.movers.append((path, turning))

    def _camera(self) -> None:
        """The primary camera, so that it sees all that the family is about. Robots: one of the two places that the five
        tasks have, or anywhere around. Hands: a head above and behind them, which moves a little."""
        rng, self.head = self.rng, None
        for attempt in range(30):
            near = np.mean(self.points, 0) if attempt else np.array([0.5, 0.0])
            if self.body == "hands":
                eye = np.array([rng.uniform(-0.05, 0.15), rng.uniform(-0.12, 0.12), rng.uniform(0.42, 0.6)])
                aim, fovy = np.array([*near, 0.03]) + rng.uniform(-0.03, 0.03, 3), rng.uniform(40, 52)
            elif attempt == 0 and rng.random() < 0.5:
                eye, aim = CAMERAS[rng.integers(len(CAMERAS))] + rng.uniform(-0.02, 0.02, (2, 3))
                fovy = 37.0
            else:
                aim, fovy = np.array([*near, 0.06]) + rng.uniform(-0.05, 0.05, 3), rng.uniform(34, 46)
                around, up, far = rng.uniform(-2.3, 2.3), rng.uniform(0.35, 1.05), rng.uniform(0.55, 0.85)
                eye = aim + far * np.array([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)])
            w, *xyz = look_at(eye, aim)
            seen = Rotation.from_quat([*xyz, w]).inv().apply([(*at, 0.03) - eye for at in self.points])
            if (np.abs(seen[:, :2] / seen[:, 2:]) < 0.88 * np.tan(np.radians(fovy) / 2)).all():
                break
        if self.body == "hands":
            pace, phase, size = rng.uniform(0.5, 2, (2, 3)), rng.uniform(0, 6, (2, 3)), rng.uniform(0.003, 0.02, (2, 3))
            self.head = lambda t: np.array([eye, aim]) + size * np.sin(pace * t + phase)
        self.root.add_camera(name="primary", pos=eye, quat=look_at(eye, aim), fovy=fovy)

    # ---- acting ----

    def _start(self) -> None:
        """The limbs somewhere above the table, things at rest."""
        mj, rng = self.mj, self.rng
        self.rest, self.clock = {}, 0
        for side, limb in self.limbs.items():
            out = {"left": 1, "right": -1}[side] if len(self.limbs) > 1 else 0
            at = np.array([0.46, 0.22 * out, 0.2]) + rng.uniform((-0.1, -0.05, -0.03), (0.1, 0.05, 0.08))
            at[1] += rng.uniform(-0.15, 0.15) * (not out)
            self.rest[side] = at, pointing_down(rng.uniform(-0.4, 0.4)), rng.uniform(0, 6, 6)
            limb.start(self.idle(limb).position, self.rest[side][1])
            limb.begin()
        self.family.start(self)
        mj.mj_forward(self.model, self.data)
        mj.mj_step(self.model, self.data, SUBSTEPS)
        self.before = {name: self.where(name)[0] for name in self.things}
        self.gripper = {side: OPEN for side in self.limbs}
        self._move_movers()

    def idle(self, limb: Limb) -> Command:
        """What a limb does that has nothing to do: it wanders a little."""
        at, facing, phase = self.rest[limb.side]
        t = self.clock / HZ
        if isinstance(limb, Hand):
            limb.resting = 0.25 + 0.25 * np.sin(2 * t + phase[:5])
        return Command(at + 0.03 * np.sin(1.3 * t + phase[:3]), facing, OPEN, "", False)

    def released(self, thing: Thing) -> bool:
        return all(g == OPEN for g in self.gripper.values()) and not self.touching(thing.name, "robot")

    def step(self, commands: dict[str, Command]) -> None:
        """One tick in which each limb goes for its command's pose."""
        for side, command in commands.items():
            self.limbs[side].aim(command.position, command.quaternion)
            self.limbs[side].close(command.gripper)
            self.gripper[side] = command.gripper
        self.tick(list(self.limbs.values()))
        self.clock += 1
        self._move_movers()

    def _move_movers(self) -> None:
        t = self.clock / HZ
        for k, (path, turning) in enumerate(self.movers):
            self.data.mocap_pos[k], self.data.mocap_quat[k] = path(t), turning(t)
        if self.head:
            camera = self.model.camera("primary")
            camera.pos, camera.quat = self.head(t)[0], look_at(*self.head(t))
        self.mj.mj_kinematics(self.model, self.data)
        self.mj.mj_camlight(self.model, self.data)

    def camera_pose(self) -> np.ndarray:
        """Position and quaternion xyzw (7,) of the primary camera, which looks along its -z with y up."""
        camera = self.model.camera("primary")
        return np.concatenate([camera.pos, common.canonical(camera.quat[[1, 2, 3, 0]])])

    def action(self, commands: dict[str, Command]) -> np.ndarray:
        """Commanded poses relative to the measured ones, and the grippers: 7 numbers a limb."""
        parts = []
        for side, command in commands.items():
            pose = self.limbs[side].pose()
            parts += [common.relative_action(*pose, command.position, command.quaternion), [command.gripper]]
        return np.concatenate(parts).astype(np.float32)

    def state(self) -> np.ndarray:
        """(8,), with two hands (46,)."""
        tips = [limb.tip_positions().ravel() for limb in self.limbs.values() if limb.tips]
        return np.concatenate([*(limb.state() for limb in self.limbs.values()), *tips]).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# Families of behaviour
# --------------------------------------------------------------------------------------------------------------------


class Family:
    """A kind of behaviour. build: adds what it needs and words the `instruction`. expert: its motion, tick by tick, as
    commands for the actor, or for several limbs by side. watch: looks at every tick. check: what went wrong, or ""."""

    name = ""
    bodies = tuple(BODIES)
    texts: tuple[str, ...] = ()  # paraphrases of the instruction
    focus: np.ndarray | None = None  # where it happens

    def __init__(self, rng: np.random.Generator):
        self.rng, self.pace = rng, rng.uniform(0.5, 1.0)

    def say(self, **words: str) -> None:
        self.instruction = str(self.rng.choice(self.texts)).format(**words)

    def build(self, s: Scene) -> None: ...

    def start(self, s: Scene) -> None:
        """Sets joints of its own, before things come to rest."""

    def expert(self, s: Scene) -> Iterator[Command | dict[str, Command]]: ...

    def watch(self, s: Scene) -> None: ...

    def check(self, s: Scene) -> str: ...

    # ---- vocabulary ----

    def go(self, s, position, quaternion, gripper, phase, speed=0.28, tolerance=0.006, free=True, ticks=40):
        yield from reach(s.actor, position, quaternion, gripper, phase, speed * self.pace, tolerance, free, ticks)

    def grasp(self, s, thing: Thing, lift: float):
        """Takes a thing from above, where it is now, near its top, and lifts it."""
        at, turned = s.where(thing.name)
        yaw = fold(turned.as_euler("xyz")[2], thing.period) if thing.period else self.rng.uniform(-0.5, 0.5)
        facing, what = pointing_down(yaw), f"the {thing.words}"
        grip = np.array([*at[:2], at[2] + max(0.014 - thing.half, thing.half - 0.026, 0.0)])
        yield from self.go(s, grip + (0.09 + thing.half) * Z, facing, OPEN, f"move above {what}", tolerance=0.012)
        yield from self.go(s, grip, facing, OPEN, f"lower onto {what}", 0.2, 0.004, False)
        yield from hold(s.actor, CLOSED, f"grip {what}", 6 if s.actor.tips else 4)  # a hand closes slowly
        yield from self.go(s, grip + lift * Z, facing, CLOSED, f"lift {what}", 0.2, 0.012, False)

    def carry(self, s, thing: Thing, goal, phase: str, speed=0.28, tolerance=0.006, free=True):
        """Moves the held thing's centre to a place, as it hangs in the fingers now."""
        here, facing = s.actor.pose()
        target = np.asarray(goal) + here - s.where(thing.name)[0]
        yield from self.go(s, target, facing, CLOSED, phase, speed, tolerance, free)

    def let_go(self, s, rise=0.08):
        yield from hold(s.actor, OPEN, "open the fingers", 3)
        yield from self.go(s, s.actor.pose()[0] + rise * Z, s.actor.pose()[1], OPEN, "move up", 0.3, 0.015, False)


class Lift(Family):
    name = "lift"
    texts = ("lift the {x}", "pick the {x} up", "raise the {x} off the table", "take the {x} and hold it up",
             "grab the {x}")  # fmt: skip

    def build(self, s):
        self.thing = s.thing(GRASPABLE)
        self.focus = self.thing.at
        self.say(x=self.thing.words)

    def expert(self, s):
        yield from self.grasp(s, self.thing, self.rng.uniform(0.08, 0.18))
        yield from hold(s.actor, CLOSED, f"hold the {self.thing.words} up", 4)

    def check(self, s):
        risen = s.where(self.thing.name)[0][2] - s.before[self.thing.name][2]
        return "" if risen > 0.06 and s.actor.holds(self.thing.name) else "not held up"


class PlaceOn(Family):
    name = "place_on"
    texts = ("put the {x} on the {y}", "place the {x} onto the {y}", "set the {x} down on top of the {y}",
             "move the {x} to the {y}")  # fmt: skip

    def build(self, s):
        rng = self.rng
        if rng.random() < 0.5:
            self.half, self.top = rng.uniform(0.05, 0.075), rng.uniform(0.004, 0.008)
            body, words, rgba, self.goal, _ = s.fixed("goal", ("plate", "dish", "coaster"), self.half)
            add_geom(body, "cylinder", (self.half, self.top / 2), (0, 0, self.top / 2), rgba)
            add_geom(body, "cylinder", (0.7 * self.half, 0.0003), (0, 0, self.top), 0.8 * np.array(rgba), visual=True)
        else:
            self.half, self.top = rng.uniform(0.04, 0.06), rng.uniform(0.02, 0.06)
            body, words, rgba, self.goal, _ = s.fixed("goal", ("platform", "podium", "shelf"), 1.4 * self.half)
            add_geom(body, "box", (self.half, self.half, self.top / 2), (0, 0, self.top / 2), rgba)
        self.thing = s.thing(FLAT)
        self.focus = (self.goal + self.thing.at) / 2
        self.say(x=self.thing.words, y=words)
        self.words = words

    def expert(self, s):
        goal = np.array([*self.goal, self.top + self.thing.half])
        yield from self.grasp(s, self.thing, 0.07 + self.top)
        yield from self.carry(s, self.thing, goal + 0.05 * Z, f"move above the {self.words}", tolerance=0.008)
        yield from self.carry(s, self.thing, goal + 0.003 * Z, f"lower the {self.thing.words}", 0.2, 0.004, False)
        yield from self.let_go(s)

    def check(self, s):
        at, _ = s.where(self.thing.name)
        there = np.linalg.norm(at[:2] - self.goal) < self.half and abs(at[2] - self.top - self.thing.half) < 0.008
        return "" if there and s.released(self.thing) else "not on it"


class PlaceIn(Family):
    name = "place_in"
    texts = ("put the {x} into the {y}", "drop the {x} in the {y}", "place the {x} inside the {y}",
             "the {x} belongs in the {y}")  # fmt: skip

    def build(self, s):
        self.half, self.wall = self.rng.uniform(0.05, 0.07), self.rng.uniform(0.02, 0.05)
        self.words, self.goal = s.tray("goal", ("tray", "crate", "basket", "bin"), self.half, self.wall)
        self.thing = s.thing(("cube", "ball", "egg", "can", "puck", "cross"))
        self.focus = (self.goal + self.thing.at) / 2
        self.say(x=self.thing.words, y=self.words)

    def expert(self, s):
        goal = np.array([*self.goal, self.wall + self.thing.half])
        yield from self.grasp(s, self.thing, self.wall + 0.07)
        yield from self.carry(s, self.thing, goal + 0.04 * Z, f"move above the {self.words}", tolerance=0.01)
        yield from self.carry(s, self.thing, goal, f"lower into the {self.words}", 0.2, 0.01, False)
        yield from self.let_go(s, 0.06)

    def check(self, s):
        at, _ = s.where(self.thing.name)
        inside = np.abs(at[:2] - self.goal).max() < self.half and at[2] < self.wall + self.thing.half
        return "" if inside and s.released(self.thing) else "not inside"


class Stack(Family):
    name = "stack"
    texts = ("stack the {x} on the {y}", "put the {x} on top of the {y}", "build a tower: the {x} on the {y}")

    def build(self, s):
        self.below, self.thing = (
            s.thing(("cube", "puck", "can"), turn=0.4),
            s.thing(("cube", "puck", "brick"), turn=0.4),
        )
        self.focus = (self.below.at + self.thing.at) / 2
        self.say(x=self.thing.words, y=self.below.words)

    def expert(self, s):
        below, thing = s.where(self.below.name)[0], self.thing
        goal = below + (self.below.half + thing.half) * Z
        yield from self.grasp(s, thing, 2 * self.below.half + 0.06)
        yield from self.carry(s, thing, goal + 0.05 * Z, f"move above the {self.below.words}", tolerance=0.004)
        yield from self.carry(s, thing, goal + 0.003 * Z, f"lower onto the {self.below.words}", 0.15, 0.003, False)
        yield from self.let_go(s)

    def check(self, s):
        (below, _), (at, _) = s.where(self.below.name), s.where(self.thing.name)
        height = at[2] - below[2] - self.below.half - self.thing.half
        away = np.linalg.norm(at[:2] - below[:2])
        return "" if away < self.below.radius and abs(height) < 0.006 and s.released(self.thing) else "not stacked"


DIRECTIONS = {"to the left": (0, 1), "to the right": (0, -1), "forwards": (1, 0), "backwards": (-1, 0)}


class Push(Family):
    """Closed fingers behind a thing push it in one of four directions, or onto a spot on the table."""

    name = "push"
    kinds = ("cube", "brick", "puck", "can", "cross", "bar")
    texts = ("push the {x} {y}", "shove the {x} {y}", "nudge the {x} {y}", "move the {x} {y} without lifting it")
    verb = "push"

    def build(self, s):
        rng = self.rng
        self.thing = s.thing(self.kinds, LOW + 0.04, HIGH - 0.04)
        self.length = rng.uniform(0.08, 0.15)
        where = str(rng.choice(list(DIRECTIONS)))
        self.way = np.array([*DIRECTIONS[where], 0.0])
        if rng.random() < 0.4:  # any direction
            turn = Rotation.from_euler("z", rng.uniform(0, 2 * np.pi))
            self.way = turn.apply([1.0, 0, 0])
            _, words, rgba = s.paint(("spot", "patch", "mat"))
            goal = self.thing.at + self.length * self.way[:2]
            add_geom(s.root, "cylinder", (0.045, 0.0006), (*goal, 0.0), rgba, visual=True)
            where = f"onto the {words}"
        goal = self.thing.at + self.length * self.way[:2]
        if np.any(goal < LOW - 0.06) or np.any(goal > HIGH + 0.06):
            raise Crowded
        # Nothing else may stand in the way, or where the fingers come down.
        s.taken += [(self.thing.at + d * self.way[:2], 0.05) for d in (-0.06, 0.05, 0.1, self.length)]
        self.focus = self.thing.at
        self.say(x=self.thing.words, y=where)

    def expert(self, s):
        thing, what = self.thing, f"the {self.thing.words}"
        at, _ = s.where(thing.name)
        facing = pointing_down(fold(np.arctan2(self.way[1], self.way[0]) + np.pi / 2))
        z = max(0.014, 0.8 * thing.half) * Z
        behind = np.array([*at[:2], 0]) - self.way * (thing.radius + 0.04) + z
        yield from self.go(s, behind + 0.07 * Z, facing, CLOSED, f"move behind {what}", tolerance=0.012)
        yield from self.go(s, behind, facing, CLOSED, f"lower behind {what}", 0.25, 0.006, False)
        goal = s.before[thing.name] + self.length * self.way
        for _ in range(25):
            at, _ = s.where(thing.name)
            if (left := (goal - at) @ self.way) < 0.008:
                break
            here = s.actor.pose()[0]
            # Ahead along the way, and sideways to stay behind the thing.
            aside = (at - here) - ((at - here) @ self.way) * self.way
            step = min(0.025 * self.pace, left + 0.004) * self.way + 0.4 * aside
            target = np.array([*(here + step)[:2], z[2]])
            yield Command(target, facing, CLOSED, f"{self.verb} {what}", False)
        up = s.actor.pose()[0] + 0.07 * Z - 0.02 * self.way
        yield from self.go(s, up, facing, CLOSED, "move up", 0.3, 0.015, False)

    def check(self, s):
        moved = s.where(self.thing.name)[0] - s.before[self.thing.name]
        along, up = moved @ self.way, abs(moved[2])
        aside = np.linalg.norm(moved - along * self.way)
        return "" if abs(along - self.length) < 0.03 and aside < 0.035 and up < 0.01 else "pushed elsewhere"


class Drag(Push):
    """The fingers press on a flat tile from above and pull it along by friction."""

    name = "drag"
    texts = ("drag the {x} {y}", "slide the {x} {y}", "pull the {x} {y} with the fingertips on it")
    verb = "drag"

    def build(self, s):
        s_thing = s.thing
        s.thing = self._tile(s)
        super().build(s)
        s.thing = s_thing

    def _tile(self, s):
        def add(kinds, low, high):
            _, words, rgba = s.paint(("tile", "card", "slab"))
            half = np.array([*self.rng.uniform(0.035, 0.05, 2), self.rng.uniform(0.005, 0.008)])
            at, yaw = s.spot(float(np.hypot(*half[:2])), low, high), self.rng.uniform(-0.7, 0.7)
            body = add_free(s.root, "tile")
            body.pos, body.quat = (*at, half[2]), (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
            add_geom(body, "box", half * (1, 1, 0.7), (0, 0, 0.3 * half[2]), rgba, 0.03)
            smooth = add_geom(body, "box", half * (0.98, 0.98, 0.3), (0, 0, -0.7 * half[2]), rgba, 0.01)
            smooth.friction, smooth.priority = (0.25, 0.003, 0.0001), 1  # it slides on the table, not under the fingers
            s.things["tile"] = Thing("tile", words, half[2], 0.05, at, yaw, np.pi)
            return s.things["tile"]

        return add

    def expert(self, s):
        what, goal = f"the {self.thing.words}", s.before["tile"] + self.length * self.way
        at, turned = s.where("tile")
        facing = pointing_down(fold(turned.as_euler("xyz")[2]))
        top = at + (self.thing.half + 0.008) * Z
        yield from self.go(s, top + 0.07 * Z, facing, CLOSED, f"move above {what}", tolerance=0.01)
        yield from self.go(s, top - 0.001 * Z, facing, CLOSED, f"press on {what}", 0.2, 0.003, False, 12)
        for _ in range(25):
            at, _ = s.where("tile")
            if (left := (goal - at) @ self.way) < 0.006:
                break
            here = s.actor.pose()[0]
            target = here + min(0.022 * self.pace, left + 0.003) * self.way
            yield Command(np.array([*target[:2], top[2] - 0.005]), facing, CLOSED, f"drag {what}", False)
        up = s.actor.pose()[0] + 0.07 * Z
        yield from self.go(s, up, facing, CLOSED, "move up", 0.3, 0.015, False)


class Drawer(Family):
    """A drawer with an upright handle: it is taken and pulled open, or pushed shut."""

    name = "drawer"
    bodies = ("fr3", "sixaxis", "gripper")  # a hand is too wide for the handle
    travel = 0.1
    opens = ("open the {x}", "pull the {x} open", "pull out the {x}")
    shuts = ("shut the {x}", "push the {x} in", "close the {x}")

    def build(self, s):
        rng = self.rng
        self.open = rng.random() < 0.5
        half, wall = np.array([0.06, rng.uniform(0.05, 0.075), rng.uniform(0.025, 0.035)]), 0.004
        body, words, rgba, at, self.yaw = s.fixed("cabinet", ("drawer",), 0.16, (0.58, -0.2), (0.7, 0.2), 0.5)
        self.out = Rotation.from_euler("z", self.yaw).apply([-1.0, 0, 0])
        frame = _colour(rng)
        x, y, z = half + (0.002, 0.003, 0.003)
        add_geom(body, "box", (x, y + wall, wall), (0, 0, 2 * z + 2 * wall), frame)
        add_geom(body, "box", (wall, y + wall, z + wall), (x + wall, 0, z + wall), frame)
        for sign in (-1, 1):
            add_geom(body, "box", (x, wall, z + wall), (0, sign * (y + wall), z + wall), frame)
        drawer = body.add_body(name="drawer", pos=(0, 0, wall))
        drawer.add_joint(
            name="drawer", axis=(-1, 0, 0), type=import_mujoco().mjtJoint.mjJNT_SLIDE, range=(0, self.travel),
            damping=(2, 0, 0), frictionloss=1.5,
        )  # fmt: skip
        x, y, z = half
        add_geom(drawer, "box", (x, y, 0.003), (0, 0, 0.004), rgba, 0.1)
        for sign in (-1, 1):
            add_geom(drawer, "box", (0.003, y, z - 0.004), (sign * (x - 0.003), 0, z), rgba, 0.05)
            add_geom(drawer, "box", (x, 0.003, z - 0.004), (0, sign * (y - 0.003), z), rgba, 0.05)
        self.handle = np.array([-x - 0.022, 0, z])  # in the drawer's frame
        add_geom(drawer, "box", (0.024, 0.007, 0.013), self.handle, 0.5 * np.array(rgba), 0.03)
        for geom in drawer.geoms:  # it runs on rails: no contact with its own cabinet or the table
            geom.contype, geom.conaffinity = 2, 1
        s.spec.add_exclude(bodyname1="cabinet", bodyname2="drawer")
        self.focus = at + 0.1 * self.out[:2]
        s.taken += [(at + d * self.out[:2], 0.08) for d in (0.12, 0.2)]
        self.texts = self.opens if self.open else self.shuts
        self.words = words
        self.say(x=words)

    def start(self, s) -> None:
        s.data.joint("drawer").qpos[0] = self.rng.uniform(0, 0.01) if self.open else self.rng.uniform(0.07, 0.095)

    def expert(self, s):
        at, turned = s.where("drawer")
        facing, what = pointing_down(self.yaw), f"the {self.words}"
        handle = at + turned.apply(self.handle)
        if self.open:
            yield from self.go(s, handle + 0.09 * Z, facing, OPEN, f"move above the handle of {what}", tolerance=0.01)
            yield from self.go(s, handle, facing, OPEN, f"lower onto the handle of {what}", 0.2, 0.004, False)
            yield from hold(s.actor, CLOSED, "grip the handle", 4)
            pulled = handle + self.rng.uniform(0.075, 0.09) * self.out
            yield from self.go(s, pulled, facing, CLOSED, f"pull {what} open", 0.12, 0.008, False, 20)
            yield from self.let_go(s)
        else:
            front = handle + 0.06 * self.out
            yield from self.go(s, front + 0.08 * Z, facing, CLOSED, f"move in front of {what}", tolerance=0.012)
            yield from self.go(s, front, facing, CLOSED, f"lower in front of {what}", 0.2, 0.006, False)
            shut = front - (s.data.joint("drawer").qpos[0] + 0.03) * self.out
            yield from self.go(s, shut, facing, CLOSED, f"push {what} in", 0.14, 0.004, False, 20)
            yield from self.go(s, s.actor.pose()[0] + (0.04 * self.out + 0.06 * Z), facing, CLOSED, "move away", 0.3,
                               0.015, False)  # fmt: skip

    def check(self, s):
        q = s.data.joint("drawer").qpos[0]
        return "" if (q > 0.055 if self.open else q < 0.012) else "not far enough"


class Lever(Family):
    """An arm on an upright pin is swung to the other side by the closed fingers."""

    name = "lever"
    texts = ("turn the {x} {y}", "swing the {x} {y}", "flip the {x} over {y}")

    def build(self, s):
        rng = self.rng
        body, words, rgba, at, _ = s.fixed("post", ("lever", "pointer", "crank"), 0.11, LOW + 0.06, HIGH - 0.06)
        self.way, self.length = rng.choice([-1, 1]), rng.uniform(0.08, 0.11)
        self.facing = rng.uniform(-0.5, 0.5) + np.pi  # rad: it points towards the robot, in the middle of its range
        add_geom(body, "cylinder", (0.035, 0.006), (0, 0, 0.006), _colour(rng))
        add_geom(body, "cylinder", (0.009, 0.02), (0, 0, 0.02), (0.3, 0.3, 0.3, 1), visual=True)
        arm = body.add_body(
            name="lever", pos=(0, 0, 0.027), quat=(np.cos(self.facing / 2), 0, 0, np.sin(self.facing / 2))
        )
        arm.add_joint(name="lever", axis=Z, range=(-1.1, 1.1), damping=(0.05, 0, 0), frictionloss=0.08)
        add_geom(arm, "box", (self.length / 2, 0.009, 0.009), (self.length / 2, 0, 0), rgba, 0.08)
        add_geom(arm, "sphere", (0.016,), (self.length, 0, 0), 0.7 * np.array(rgba), 0.02)
        s.spec.add_exclude(bodyname1="post", bodyname2="lever")
        self.focus, self.words = at, words
        # Towards the robot, counterclockwise from above is to the right.
        self.say(x=words, y="to the right" if self.way > 0 else "to the left")

    def start(self, s) -> None:
        s.data.joint("lever").qpos[0] = -self.way * self.rng.uniform(0.5, 0.9)

    def tip(self, s, angle: float, beside: float) -> np.ndarray:
        angle += self.facing
        along, across = np.array([np.cos(angle), np.sin(angle), 0]), np.array([-np.sin(angle), np.cos(angle), 0])
        return s.where("lever")[0] + 0.8 * self.length * along + beside * across - 0.006 * Z

    def expert(self, s):
        joint, what = s.data.joint("lever"), f"the {self.words}"
        facing = lambda angle: pointing_down(fold(self.facing + angle))
        start = self.tip(s, joint.qpos[0], -self.way * 0.045)
        yield from self.go(s, start + 0.08 * Z, facing(joint.qpos[0]), CLOSED, f"move beside {what}", tolerance=0.012)
        yield from self.go(s, start, facing(joint.qpos[0]), CLOSED, f"lower beside {what}", 0.25, 0.006, False)
        goal = self.rng.uniform(0.45, 0.8)
        for _ in range(25):
            angle = joint.qpos[0]
            if self.way * angle > goal:
                break
            ahead = angle + self.way * 0.22 * self.pace
            yield Command(self.tip(s, ahead, -self.way * 0.02), facing(ahead), CLOSED, f"swing {what} over", False)
        up = s.actor.pose()[0] + 0.08 * Z
        yield from self.go(s, up, s.actor.pose()[1], CLOSED, "move up", 0.3, 0.015, False)

    def check(self, s):
        return "" if self.way * s.data.joint("lever").qpos[0] > 0.35 else "not turned over"


class Press(Family):
    """One of up to three buttons goes down."""

    name = "press"
    texts = ("press the {x}", "push the {x} down", "hit the {x}", "activate the {x}")

    def build(self, s):
        rng = self.rng
        self.count, self.radius = int(rng.integers(1, 4)), rng.uniform(0.02, 0.03)
        for k in range(self.count):
            body, words, rgba, at, _ = s.fixed(f"base{k}", ("button", "switch"), 0.05)
            add_geom(body, "box", (0.042, 0.042, 0.012), (0, 0, 0.012), _colour(rng, 0.2, 0.8), yaw=rng.uniform(0, 1.5))
            cap = body.add_body(name=f"button{k}", pos=(0, 0, 0.034))
            cap.add_joint(
                name=f"button{k}", axis=-Z, type=import_mujoco().mjtJoint.mjJNT_SLIDE, range=(0, 0.018),
                stiffness=(250, 0, 0), damping=(5, 0, 0), springref=-0.004,
            )  # fmt: skip
            add_geom(cap, "cylinder", (self.radius, 0.01), (0, 0, 0), rgba, 0.03)
            s.spec.add_exclude(bodyname1=f"base{k}", bodyname2=f"button{k}")
            if k == 0:
                self.focus, self.words = at, words
        self.say(x=self.words)
        self.deepest = np.zeros(self.count)

    def expert(self, s):
        top, facing, what = s.where("button0")[0] + 0.018 * Z, pointing_down(self.rng.uniform(-0.6, 0.6)), self.words
        yield from self.go(s, top + 0.07 * Z, facing, CLOSED, f"move above the {what}", tolerance=0.01)
        yield from self.go(s, top + 0.01 * Z, facing, CLOSED, f"lower onto the {what}", 0.25, 0.006, False)
        yield from self.go(s, top - 0.018 * Z, facing, CLOSED, f"press the {what}", 0.12, 0.003, False, 8)
        yield from self.go(s, top + 0.08 * Z, facing, CLOSED, "move up", 0.3, 0.015, False)

    def watch(self, s):
        depth = [s.data.joint(f"button{k}").qpos[0] for k in range(self.count)]
        self.deepest = np.maximum(self.deepest, depth)

    def check(self, s):
        wrong = self.deepest[1:].max(initial=0) > 0.004
        up = s.data.joint("button0").qpos[0] < 0.006
        return "" if self.deepest[0] > 0.01 and up and not wrong else "not pressed, or another one"


class Stir(Family):
    """Closed fingers go round in a tray of little balls."""

    name = "stir"
    texts = ("stir the balls in the {x}", "mix what is in the {x}", "go round in the {x} with the fingers")

    def build(self, s):
        rng = self.rng
        self.half = rng.uniform(0.06, 0.08)
        self.words, self.middle = s.tray("tray", ("tray", "crate", "basin"), self.half, rng.uniform(0.015, 0.03))
        rgba, self.balls = _colour(rng), []
        for k, (x, y) in enumerate(itertools.product((-0.6, 0, 0.6), (-0.6, 0, 0.6))):
            if k == 4 or rng.random() < 0.3:
                continue
            ball = add_free(s.root, f"ball{k}")
            ball.pos = (*self.middle + np.array([x, y]) * self.half, 0.016)
            add_geom(ball, "sphere", (0.011,), (0, 0, 0), rgba, 0.006)
            self.balls.append(f"ball{k}")
        self.focus, self.turns, self.last = self.middle, 0.0, None
        self.rounds, self.way = rng.uniform(1.3, 2.2), rng.choice([-1, 1])
        self.say(x=self.words)

    def expert(self, s):
        facing, r = pointing_down(self.rng.uniform(-0.5, 0.5)), self.half * self.rng.uniform(0.45, 0.6)
        at = lambda angle, z: np.array([*(self.middle + r * np.array([np.cos(angle), np.sin(angle)])), z])
        begin = self.rng.uniform(0, 2 * np.pi)
        yield from self.go(s, at(begin, 0.11), facing, CLOSED, f"move above the {self.words}", tolerance=0.012)
        yield from self.go(s, at(begin, 0.024), facing, CLOSED, f"lower into the {self.words}", 0.25, 0.006, False)
        step = self.way * min(0.55, 0.03 * self.pace / r)
        for k in range(1, int(self.rounds * 2 * np.pi / abs(step))):
            yield Command(at(begin + k * step, 0.024), facing, CLOSED, f"stir in the {self.words}", False)
        up = s.actor.pose()[0] + 0.09 * Z
        yield from self.go(s, up, facing, CLOSED, "move up", 0.3, 0.015, False)

    def watch(self, s):
        here = s.actor.pose()[0] - (*self.middle, 0)
        if here[2] < 0.035 and np.abs(here[:2]).max() < self.half:
            angle = np.arctan2(here[1], here[0])
            self.turns += fold(angle - self.last, 2 * np.pi) if self.last is not None else 0
            self.last = angle

    def check(self, s):
        at = [s.where(ball)[0][:2] - self.middle for ball in self.balls]
        kept = all(np.abs(p).max() < self.half + 0.01 for p in at)
        return "" if abs(self.turns) > 2 * np.pi and kept else "not stirred"


class Wipe(Family):
    """A sponge is taken and rubbed over a stain."""

    name = "wipe"
    texts = ("wipe the {y} with the {x}", "clean the {y} using the {x}", "rub the {x} over the {y}")

    def build(self, s):
        rng = self.rng
        _, words, rgba = s.paint(("stain", "smudge", "spill"))
        self.at = s.spot(0.09, LOW + 0.03, HIGH - 0.03)
        for _ in range(5):
            size, off = (rng.uniform(0.012, 0.03), 0.0006), rng.uniform(-0.03, 0.03, 2)
            add_geom(s.root, "cylinder", size, (*self.at + off, 0), rgba, visual=True)
        half = np.array([rng.uniform(0.035, 0.045), rng.uniform(0.02, 0.027), rng.uniform(0.013, 0.018)])
        _, sponge, rgba = s.paint(("sponge", "cloth"))
        place, yaw = s.spot(0.05), rng.uniform(-0.7, 0.7)
        body = add_free(s.root, "sponge")
        body.pos, body.quat = (*place, half[2]), (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
        add_geom(body, "box", half, (0, 0, 0), rgba, 0.04).friction = (0.6, 0.01, 0.0001)
        add_geom(body, "box", half * (1, 1, 0.3) + (1e-3, 1e-3, 0), (0, 0, -0.7 * half[2]), 0.6 * np.array(rgba),
                 visual=True)  # fmt: skip
        self.thing = s.things["sponge"] = Thing("sponge", sponge, half[2], 0.05, place, yaw, np.pi)
        self.words, self.focus = words, (self.at + place) / 2
        self.axis, self.strokes = rng.uniform(-0.6, 0.6) + rng.choice([0, np.pi / 2]), int(rng.integers(3, 6))
        self.passes, self.side = 0, 0
        self.say(x=sponge, y=words)

    def expert(self, s):
        yield from self.grasp(s, self.thing, 0.06)
        way = np.array([np.cos(self.axis), np.sin(self.axis), 0]) * self.rng.uniform(0.035, 0.05)
        goal = np.array([*self.at, self.thing.half])
        yield from self.carry(s, self.thing, goal + way + 0.04 * Z, f"move above the {self.words}", tolerance=0.012)
        yield from self.carry(s, self.thing, goal + way, f"lower onto the {self.words}", 0.2, 0.006, False)
        z, facing = s.actor.pose()[0][2] - 0.001, s.actor.pose()[1]
        for k in range(self.strokes):
            end = goal + way * (-1 if k % 2 == 0 else 1)
            target = s.actor.pose()[0] + end - s.where(self.thing.name)[0]
            target[2] = z
            yield from self.go(s, target, facing, CLOSED, f"rub over the {self.words}", 0.25, 0.01, False, 12)
        yield from self.go(s, s.actor.pose()[0] + 0.06 * Z, facing, CLOSED, f"lift the {self.thing.words}", 0.25, 0.015,
                           False)  # fmt: skip

    def watch(self, s):
        at = s.where(self.thing.name)[0]
        along = (at[:2] - self.at) @ (np.cos(self.axis), np.sin(self.axis))
        if at[2] < self.thing.half + 0.008 and abs(along) > 0.02 and np.linalg.norm(at[:2] - self.at) < 0.07:
            self.passes += self.side != 0 and np.sign(along) != self.side
            self.side = np.sign(along)

    def check(self, s):
        return "" if self.passes >= 3 and s.actor.holds(self.thing.name) else "not wiped"


class Turn(Family):
    """A thing is gripped and turned about the vertical."""

    name = "turn"
    texts = ("turn the {x} {y}", "rotate the {x} {y}", "twist the {x} {y}")

    def build(self, s):
        self.thing = s.thing(("brick", "bar", "egg"), turn=0.7)
        self.angle = self.rng.choice([-1, 1]) * self.rng.uniform(0.6, 1.1)
        self.focus = self.thing.at
        self.say(x=self.thing.words, y="counterclockwise" if self.angle > 0 else "clockwise")

    def expert(self, s):
        yield from self.grasp(s, self.thing, 0.015)
        here, facing = s.actor.pose()
        turned = (Rotation.from_euler("z", self.angle) * Rotation.from_quat(facing)).as_quat(canonical=True)
        yield from self.go(s, here, turned, CLOSED, f"turn the {self.thing.words}", 0.2, 0.01, False)
        down = here - 0.013 * Z
        yield from self.go(s, down, turned, CLOSED, f"set the {self.thing.words} down", 0.2, 0.004, False, 10)
        yield from self.let_go(s)

    def check(self, s):
        at, turned = s.where(self.thing.name)
        by = fold(turned.as_euler("xyz")[2] - self.thing.yaw, 2 * np.pi)
        moved = np.linalg.norm(at - s.before[self.thing.name])
        return "" if abs(by - self.angle) < 0.35 and moved < 0.03 and s.released(self.thing) else "not turned"


class Topple(Family):
    """A high thing is knocked over."""

    name = "topple"
    texts = ("knock the {x} over", "tip the {x} over", "make the {x} fall", "topple the {x}")

    def build(self, s):
        self.thing = s.thing(("tower",), LOW + 0.03, HIGH - 0.03)
        self.way = Rotation.from_euler("z", self.thing.yaw + self.rng.integers(4) * np.pi / 2).apply([1.0, 0, 0])
        s.taken += [(self.thing.at + d * self.way[:2], 0.04) for d in (-0.06, 0.06, 0.12)]
        self.focus = self.thing.at
        self.say(x=self.thing.words)

    def expert(self, s):
        what, at = f"the {self.thing.words}", s.where(self.thing.name)[0]
        facing = pointing_down(fold(np.arctan2(self.way[1], self.way[0]) + np.pi / 2))
        behind = at - 0.07 * self.way + 0.6 * self.thing.half * Z
        yield from self.go(s, behind + 0.05 * Z, facing, CLOSED, f"move behind {what}", tolerance=0.012)
        yield from self.go(s, behind, facing, CLOSED, f"lower behind {what}", 0.25, 0.008, False)
        yield from self.go(s, behind + 0.12 * self.way, facing, CLOSED, f"knock {what} over", 0.25, 0.01, False, 12)
        yield from self.go(s, s.actor.pose()[0] + 0.08 * Z, facing, CLOSED, "move up", 0.3, 0.015, False)

    def check(self, s):
        upright = s.where(self.thing.name)[1].apply(Z)[2]
        return "" if abs(upright) < 0.3 else "still upright"


class Pour(Family):
    """An open box with an upright handle and a marble in it is lifted over a tray and rolled to one side."""

    name = "pour"
    bodies = ("fr3", "gripper")  # the other arm's wrist does not turn that far, and hands spill
    texts = ("pour the marble into the {y}", "empty the {x} into the {y}", "tip the {x} out over the {y}")

    def build(self, s):
        rng = self.rng
        self.half = rng.uniform(0.07, 0.085)
        self.words, self.goal = s.tray("goal", ("tray", "crate", "basin"), self.half, rng.uniform(0.025, 0.035))
        _, scoop, rgba = s.paint(("scoop", "ladle", "shovel"))
        place, yaw = s.spot(0.06), rng.uniform(-0.4, 0.4)
        body = add_free(s.root, "scoop")
        body.pos, body.quat = (*place, 0), (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
        a, h, self.grip = 0.024, rng.uniform(0.014, 0.018), -0.036  # half of its outer width and height; the handle's x
        add_geom(body, "box", (a, a, 0.002), (0, 0, 0.002), rgba, 0.02)
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            size = (0.002 if x else a, 0.002 if y else a - 0.004, h)
            add_geom(body, "box", size, ((a - 0.002) * x, (a - 0.002) * y, h), rgba, 0.005)
        self.top = 2 * h + 0.04
        add_geom(body, "box", (0.012, 0.009, self.top / 2), (self.grip, 0, self.top / 2), 0.7 * np.array(rgba), 0.03)
        ball = add_free(s.root, "marble")
        ball.pos = (*place, 0.017)
        add_geom(ball, "sphere", (0.012,), (0, 0, 0), _colour(rng), 0.006)
        self.thing = s.things["scoop"] = Thing("scoop", scoop, h, 0.06, place, yaw, np.pi)
        s.things["marble"] = Thing("marble", "marble", 0.012, 0.012, place, 0.0, 0.0)
        self.focus, self.tilt = (self.goal + place) / 2, rng.choice([-1, 1]) * rng.uniform(1.8, 2.1)
        self.say(x=scoop, y=self.words)

    def expert(self, s):
        at, turned = s.where("scoop")
        yaw, what = turned.as_euler("xyz")[2], f"the {self.thing.words}"
        facing, handle = pointing_down(yaw), turned.apply([self.grip, 0, 0])
        grip = at + handle + (self.top - 0.018) * Z
        yield from self.go(s, grip + 0.1 * Z, facing, OPEN, f"move above {what}", tolerance=0.012)
        yield from self.go(s, grip, facing, OPEN, f"lower onto {what}", 0.2, 0.004, False)
        yield from hold(s.actor, CLOSED, f"grip {what}", 4)
        yield from self.go(s, grip + 0.12 * Z, facing, CLOSED, f"lift {what}", 0.25, 0.012, False)
        # Rolled by a positive angle the marble leaves to the right: the scoop stays that much to the left.
        aside = turned.apply([0, np.sign(self.tilt) * 0.05, 0])
        above = np.array([*self.goal, 0.2]) + handle + aside
        tilted = (Rotation.from_euler("z", yaw) * Rotation.from_euler("x", self.tilt)).as_quat(canonical=True)
        yield from self.go(s, above, facing, CLOSED, f"move above the {self.words}", tolerance=0.012)
        yield from self.go(s, above, tilted, CLOSED, f"tilt {what}", 0.35, 0.02, False, 20)
        yield from hold(s.actor, CLOSED, f"tilt {what}", 3)
        yield from self.go(s, above, facing, CLOSED, f"turn {what} back", 0.4, 0.03, False, 20)

    def check(self, s):
        at = s.where("marble")[0]
        inside = np.abs(at[:2] - self.goal).max() < self.half and at[2] < 0.04
        return "" if inside and s.actor.holds("scoop") else "the marble is elsewhere"


def together(left: Iterator[Command], right: Iterator[Command]) -> Iterator[dict[str, Command]]:
    """Two hands at once; the one that is done first waits where it is."""
    last: dict[str, Command] = {}
    for pair in itertools.zip_longest(left, right):
        last |= {side: c for side, c in zip(("left", "right"), pair, strict=True) if c is not None}
        if len(last) == 2:
            yield dict(last)


class Carry(Family):
    """Two hands squeeze a wide box between them and lift it."""

    name = "carry"
    bodies = ("hands",)
    texts = ("lift the {x} with both hands", "pick up the {x} using two hands", "carry the {x} up between the hands")

    def build(self, s):
        rng = self.rng
        _, words, rgba = s.paint(("parcel", "carton", "case"))
        self.half = np.array([rng.uniform(0.04, 0.07), rng.uniform(0.06, 0.1), rng.uniform(0.035, 0.055)])
        at, yaw = s.spot(0.16, (0.42, -0.06), (0.58, 0.06)), rng.uniform(-0.3, 0.3)
        body = add_free(s.root, "parcel")
        body.pos, body.quat = (*at, self.half[2]), (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
        add_geom(body, "box", self.half, (0, 0, 0), rgba, 0.25)
        add_geom(body, "box", self.half * (0.2, 1, 1) + 5e-4, (0, 0, 0), _colour(rng), visual=True)
        self.thing = s.things["parcel"] = Thing("parcel", words, self.half[2], 0.12, at, yaw, np.pi)
        self.focus = at
        self.say(x=words)

    def expert(self, s):
        at, turned = s.where("parcel")
        facing, what = turned.as_quat(canonical=True), f"the {self.thing.words}"
        self.height = self.rng.uniform(0.08, 0.14)

        def one(side: str, out: int):
            limb, beside = s.limbs[side], lambda gap, z: at + turned.apply([0, out * (self.half[1] + gap), z])
            go = lambda goal, phase, speed, tolerance, ticks=30: reach(
                limb, goal, facing, CLOSED, phase, speed * self.pace, tolerance, False, ticks
            )
            yield from go(beside(0.09, 0.1), f"move both hands beside {what}", 0.3, 0.012)
            yield from go(beside(0.07, -0.005), f"lower both hands beside {what}", 0.25, 0.01)
            yield from go(beside(0.005, -0.005), f"squeeze {what} between the hands", 0.15, 0.0, 6)
            yield from go(beside(0.005, self.height), f"lift {what} with both hands", 0.15, 0.0, 12)

        yield from together(one("left", 1), one("right", -1))

    def check(self, s):
        risen = s.where("parcel")[0][2] - s.before["parcel"][2]
        return "" if risen > 0.05 else "not lifted"


class Join(Family):
    """Each hand pushes one thing, until the two meet in the middle."""

    name = "join"
    bodies = ("hands",)
    texts = ("push the {x} and the {y} together", "bring the {x} and the {y} together with both hands",
             "slide the {x} up against the {y}, a hand on each")  # fmt: skip

    def build(self, s):
        rng = self.rng
        self.middle = np.array([rng.uniform(0.4, 0.6), rng.uniform(-0.06, 0.06)])
        self.pair = {}
        for side, out in (("left", 1), ("right", -1)):
            at = self.middle + (rng.uniform(-0.01, 0.01), out * rng.uniform(0.09, 0.13))
            self.pair[side] = s.thing(("cube", "puck"), turn=0.2, near=at)
            s.taken += [(at - (0, out * d), 0.05) for d in (-0.08, 0.0, 0.05)]
        self.focus = self.middle
        self.words = [self.pair[side].words for side in ("left", "right")]
        self.say(x=self.words[0], y=self.words[1])

    def expert(self, s):
        def one(side: str, out: int):
            limb, thing = s.limbs[side], self.pair[side]
            at, facing = s.where(thing.name)[0], pointing_down(0.0)
            go = lambda goal, phase, speed, tolerance, ticks=30: reach(
                limb, goal, facing, CLOSED, phase, speed * self.pace, tolerance, False, ticks
            )
            # The wide side of the closed fingers pushes: a hand closes along y, and y is the way.
            z = max(0.016, 0.5 * thing.half)
            behind = np.array([at[0], at[1] + out * (thing.radius + 0.05), z])
            yield from go(behind + 0.08 * Z, f"move the {side} hand behind the {thing.words}", 0.3, 0.012)
            yield from go(behind, f"lower the {side} hand behind the {thing.words}", 0.25, 0.008)
            goal = np.array([at[0], self.middle[1] + out * (thing.radius + 0.012), z])
            yield from go(goal, f"push the {self.words[0]} and the {self.words[1]} together", 0.15, 0.006, 20)
            yield from go(limb.pose()[0] + (0, 0.03 * out, 0.08), "move both hands up", 0.3, 0.015)

        yield from together(one("left", 1), one("right", -1))

    def check(self, s):
        a, b = (s.where(self.pair[side].name)[0] for side in ("left", "right"))
        gap = np.linalg.norm(a[:2] - b[:2]) - self.pair["left"].radius - self.pair["right"].radius
        return "" if gap < 0.02 and max(a[2], b[2]) < 0.05 else "still apart"


FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (
        Lift, PlaceOn, PlaceIn, Stack, Push, Drag, Drawer, Lever, Press, Stir, Wipe, Turn, Topple, Pour, Carry, Join
    )
}  # fmt: skip

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
    "fr3": Corpus(("fr3",), 0.4),
    "sixaxis": Corpus(("sixaxis",), 0.2),
    "gripper": Corpus(("gripper",), 0.1),
    "hands": Corpus(("hands",), 0.2, ("primary",), ACTION_NAMES, STATE_NAMES, True),
    "video": Corpus(tuple(BODIES), 0.1, ("primary",), (), ()),
}


def behaviour(corpus: str, number: int) -> tuple[str, str]:
    """Body and family of an episode: they take turns."""
    bodies = CORPORA[corpus].bodies
    body = bodies[number % len(bodies)]
    able = [name for name, family in FAMILIES.items() if body in family.bodies]
    return body, able[number // len(bodies) % len(able)]


def play(
    body: str, family: str, entropy: Sequence[int], size: int = 96, cameras: Sequence[str] = ("primary",)
) -> tuple[dict | None, str]:  # fmt: skip
    """One attempt, a function of its arguments. Returns what was seen and done, or None and why it is no success:
    "frames" by camera, lists of uint8 (size, size, 3), empty where size is 0; "action" (n, A) and "state" (n, S), of
    the body's columns; "task", "subtasks"; "camera" (n, 7), the primary camera's pose."""
    rng = np.random.default_rng(np.random.SeedSequence(list(entropy)))
    try:
        scene = Scene(body, FAMILIES[family], rng)
    except Crowded:
        return None, "no room"
    script, disturbance = scene.family.expert(scene), Disturbance(rng)
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


def make(corpus: str, number: int, seed: int, size: int) -> tuple[dict, list[str], float]:
    """Episode `number` of a data set: the first success. Returns the arguments of LeRobotWriter.add_episode, why the
    attempts before it were dropped, and the seconds all took. A worker runs this."""
    start, dropped, of = time.perf_counter(), [], CORPORA[corpus]
    body, family = behaviour(corpus, number)
    for attempt in range(ATTEMPTS):
        entropy = (seed, list(CORPORA).index(corpus), number, attempt)
        episode, reason = play(body, family, entropy, size, of.cameras)
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
    """Which data set each of the corpus's episodes belongs to, and its number there. A larger corpus begins alike."""
    made, out = dict.fromkeys(CORPORA, 0), []
    for i in range(episodes):
        corpus = max(CORPORA, key=lambda name: CORPORA[name].share * (i + 1) - made[name])
        out.append((corpus, made[corpus]))
        made[corpus] += 1
    return out


def record(args: Args) -> None:
    """Writes the data sets, all of them growing together; prints what was kept and dropped of each family."""
    if args.image_size % 2:
        raise InputError(f"--image-size {args.image_size}: must be even (h264 halves the colours)")
    play("gripper", "lift", (0,), args.image_size)  # a missing GL library is said here, not by a worker
    out, settings = Path(args.out), {"seed": args.seed, "image_size": args.image_size}
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
                    running.append((job, pool.submit(make, *job, args.seed, args.image_size)))
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
    page.quantize(128).save(path)
    print(f"wrote {path}")


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    common.at_least(args, episodes=1, image_size=16, workers=1, seed=0)
    if not args.sheet:
        record(args)
    elif Path(args.sheet).suffix != ".png":
        raise InputError(f"--sheet {args.sheet}: give a file that ends in .png")
    else:
        sheet(Path(args.sheet), args.seed)


if __name__ == "__main__":
    common.run_main(main)
