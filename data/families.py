"""What bodies do in play (see `data.play`): a class for each family of behaviour, with its things, its script, its
texts, and the predicate that says whether it was done.

Every number without a source is our choice."""

import itertools
from collections.abc import Iterator

import numpy as np
from scipy.spatial.transform import Rotation

from data.bodies import BODIES, Z, tint
from data.scenes import FLAT, GRASPABLE, HIGH, LOW, Crowded, Scene, Thing
from franka import (
    CLOSED,
    OPEN,
    Command,
    add_free,
    add_geom,
    descend,
    fold,
    hold,
    import_mujoco,
    move_fingers,
    pointing_down,
    reach,
)


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

    def descend(self, s, grip, facing, what: str, height: float):
        phases = (f"move above {what}", f"lower onto {what}")
        yield from descend(s.actor, grip, facing, OPEN, phases, height, 0.28 * self.pace, tolerance=0.004, ticks=70)

    def grasp(self, s, thing: Thing, lift: float):
        """Takes a thing from above, where it is now, near its top, and lifts it."""
        at, turned = s.where(thing.name)
        yaw = fold(turned.as_euler("xyz")[2], thing.period) if thing.period else self.rng.uniform(-0.5, 0.5)
        facing, what = pointing_down(yaw), f"the {thing.words}"
        grip = np.array([*at[:2], at[2] + max(0.014 - thing.half, thing.half - 0.026, 0.0)])
        yield from self.descend(s, grip, facing, what, 0.09 + thing.half)
        yield from move_fingers(s.actor, CLOSED, f"grip {what}")
        yield from self.go(s, grip + lift * Z, facing, CLOSED, f"lift {what}", 0.2, 0.012, False)

    def carry(self, s, thing: Thing, goal, phase: str, speed=0.28, tolerance=0.006, free=True):
        """Moves the held thing's centre to a place, as it hangs in the fingers now."""
        here, facing = s.actor.pose()
        target = np.asarray(goal) + here - s.where(thing.name)[0]
        yield from self.go(s, target, facing, CLOSED, phase, speed, tolerance, free)

    def let_go(self, s, rise=0.08):
        yield from move_fingers(s.actor, OPEN, "open the fingers")
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
        frame = tint(rng)
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
            yield from self.descend(s, handle, facing, f"the handle of {what}", 0.09)
            yield from move_fingers(s.actor, CLOSED, "grip the handle")
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
        add_geom(body, "cylinder", (0.035, 0.006), (0, 0, 0.006), tint(rng))
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
            add_geom(body, "box", (0.042, 0.042, 0.012), (0, 0, 0.012), tint(rng, 0.2, 0.8), yaw=rng.uniform(0, 1.5))
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
        rgba, self.balls = tint(rng), []
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
        add_geom(ball, "sphere", (0.012,), (0, 0, 0), tint(rng), 0.006)
        self.thing = s.things["scoop"] = Thing("scoop", scoop, h, 0.06, place, yaw, np.pi)
        s.things["marble"] = Thing("marble", "marble", 0.012, 0.012, place, 0.0, 0.0)
        self.focus, self.tilt = (self.goal + place) / 2, rng.choice([-1, 1]) * rng.uniform(1.8, 2.1)
        self.say(x=scoop, y=self.words)

    def expert(self, s):
        at, turned = s.where("scoop")
        yaw, what = turned.as_euler("xyz")[2], f"the {self.thing.words}"
        facing, handle = pointing_down(yaw), turned.apply([self.grip, 0, 0])
        grip = at + handle + (self.top - 0.018) * Z
        yield from self.descend(s, grip, facing, what, 0.1)
        yield from move_fingers(s.actor, CLOSED, f"grip {what}")
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
        add_geom(body, "box", self.half * (0.2, 1, 1) + 5e-4, (0, 0, 0), tint(rng), visual=True)
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
