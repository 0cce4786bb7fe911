"""The things and the table that bodies play with (see `data.play`): shapes, cameras, light, bystanders, and what moves
by itself.

Every number without a source is our choice."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

import common
from data.bodies import BODIES, CAMERAS, Hand, Limb, Z, tint
from franka import (
    HZ,
    OPEN,
    SUBSTEPS,
    Command,
    World,
    add_free,
    add_geom,
    look_at,
    pointing_down,
)

LOW, HIGH = np.array([0.36, -0.27]), np.array([0.66, 0.27])  # m: where things may stand
AT_HOME = 0.9  # share of the FR3's scenes that look like its workplace in franka.py
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

    Most of the FR3's scenes are at `home`: seen from one of the two places that the five tasks' primary cameras have,
    give or take 5 mm, with nearly their table and light, and nothing that moves by itself. Which cameras and tables a
    robot has is no secret to those who pretrain for it, and a small model finds things 2 to 3 times as precisely where
    it need not work out the camera first. All other scenes vary widely.

    Everything is a function of (rng, body, family). `right` and `left` are limbs; `actor` is the one that the family's
    expert moves, the hand nearer to what it is about where there are two."""

    def __init__(self, body: str, family: type, rng: np.random.Generator):
        self.rng, self.body = rng, body
        self.home = body == "fr3" and bool(rng.random() < AT_HOME)
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
        """Adds one free thing at random, or `near` a place (2,). For hands never a cross: of six that they should have
        put down somewhere, none came loose from their fingers as it should."""
        kinds = [k for k in kinds if k != "cross" or self.body != "hands"]
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
        if self.home:
            table.rgba[:3] = table.rgba[:3] + rng.uniform(-0.03, 0.03, 3)
            light.dir = light.dir + rng.uniform(-0.03, 0.03, 3) * (1, 1, 0)
            light.diffuse = light.diffuse * rng.uniform(0.97, 1.03)
            return
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
        rgba, speed, start = tint(rng), rng.uniform(0.08, 0.3) * rng.choice([-1, 1]), rng.uniform(-0.35, 0.35)
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
                add_geom(body, "box", rng.uniform(0.02, 0.04, 3), along * gap + Z * 0.03, tint(rng), visual=True)
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
            add_geom(body, "box", (0.02, 0.02, 0.012), (-0.005, 0, 0.048), tint(rng), visual=True)
            for x, y in itertools.product((-0.028, 0.028), (-0.02, 0.02)):
                add_geom(body, "sphere", (0.012,), (x, y, 0.012), (0.1, 0.1, 0.1, 1), visual=True)
            r, pace = rng.uniform(0.05, 0.1), 8 * speed
            path = lambda t: middle + along * start + r * np.array([np.sin(pace * t), -np.cos(pace * t), 0])
            turning = lambda t: (np.cos(pace * t / 2), 0, 0, np.sin(pace * t / 2))
        self.movers.append((path, turning))

    def _camera(self) -> None:
        """The primary camera, so that it sees all that the family is about. Robots: one of the two places that the five
        tasks have (at home whenever that sees enough), or anywhere around. Hands: a head above and behind them, which
        moves a little."""
        rng, self.head = self.rng, None
        for attempt in range(30):
            near = np.mean(self.points, 0) if attempt else np.array([0.5, 0.0])
            if self.body == "hands":
                eye = np.array([rng.uniform(-0.05, 0.15), rng.uniform(-0.12, 0.12), rng.uniform(0.42, 0.6)])
                aim, fovy = np.array([*near, 0.03]) + rng.uniform(-0.03, 0.03, 3), rng.uniform(40, 52)
            elif attempt < 6 if self.home else attempt == 0 and rng.random() < 0.5:
                eye, aim = CAMERAS[rng.integers(len(CAMERAS))] + rng.uniform(-0.005, 0.005, (2, 3))
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
