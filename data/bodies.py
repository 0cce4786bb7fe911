"""The bodies that play (see `data.play`): two arms, a gripper that floats, and a pair of hands.

Every number without a source is our choice."""


import numpy as np

from franka import (
    HOME,
    MAX_OPENING,
    POSTURE,
    Arm,
    Oven,
    Task,
    World,
    add_geom,
    fr3_spec,
    import_mujoco,
    look_at,
    stage,
)

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


def tint(rng, low=0.1, high=0.95) -> tuple:
    return (*rng.uniform(low, high, 3), 1)


def build_fr3(rng):
    spec = fr3_spec("capsule")
    return spec, lambda world: [Limb(world, "right", HOME, POSTURE)]


def build_sixaxis(rng):
    """Shoulder yaw and pitch, elbow, and a wrist of pitch, roll and yaw, of capsules."""
    spec, paint, trim = _empty(), tint(rng), tint(rng, 0.05, 0.4)
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
    _gripper(spec, _floating(spec, "hand", "tool"), tint(rng), tint(rng, 0.05, 0.5))
    stage(spec)
    return spec, lambda world: [Limb(world, "right", np.zeros(6), np.zeros(6), grips=2)]


SKINS = ((0.95, 0.78, 0.66), (0.85, 0.62, 0.46), (0.6, 0.4, 0.28), (0.36, 0.24, 0.17), (0.25, 0.45, 0.75))  # one glove


def build_hands(rng):
    """Mirror images: thumb on the inside, the four fingers opposite, closing along y."""
    spec, mj = _empty(), import_mujoco()
    skin, sleeve = (*SKINS[rng.integers(len(SKINS))], 1), tint(rng)

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
