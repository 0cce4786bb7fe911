"""Stage 5: the robot. A Franka Research 3 in MuJoCo, the paper's five tasks (Sec. 4.4), a recorder, a policy runner.

    observe: cameras (H, W, 3) x 2 + state (8,) --> policy or scripted expert --> action (7,) --> step: 0.1 s of physics

    python franka.py --task pick_cup                      # 10 trials with the best fine-tuned policy present
    python franka.py --task pot_oven --policy expert      # the scripted expert shows the task
    python franka.py --record 100 --task all --out runs/demos   # 100 demonstrations a task, as a LeRobot data set

Reads: a policy of finetune.py (`--policy PATH`). Writes: `<out>/<task>/results.json` (one entry a trial) and
`video.mp4`; or, with --record, a LeRobot v3.0 data set.

Conventions (golden tests in tests/test_franka.py):
- Tool frame: its origin lies between the fingertips, and its axes are the base's axes when the gripper points down (x
  forward, y left, z up): the hand's own frame turned half around x. So quaternions stay near (0, 0, 0, 1).
- Action (7,) = common.ARM_ACTION: move the tool by dp (metres, base frame) and by extrinsic xyz Euler angles (radians,
  base frame) from the pose measured *now*; gripper 1 opens, 0 closes.
- State (8,) = common.ARM_STATE: position, quaternion xyzw (common.canonical), opening in [0, 1].

Where we depart from the paper, or fill in what it does not say:
1. The paper's robot is real, with human demonstrations. Here both are simulated: scenes of primitives with the idea
   of each task kept, demonstrations by scripted experts that act through the same `Robot.step` as a policy.
2. Ten control ticks a second. The arm servo gets a velocity feed-forward, so that the tool arrives at its target by
   the end of the tick: action[t] is then also the change of pose from t to t+1.
3. Placements depend on SeedSequence([seed, task, trial]) alone, so every policy meets the same ones. Evaluation has
   even seeds (0), demonstrations odd ones (1), never shared.
4. Demonstrations contain disturbances: for some ticks the executed target is pushed off, while the recorded action
   stays the expert's. The policy sees how to come back.
5. Scripted experts do what a policy without memory can follow: what comes next shows in poses and fingers, hardly in
   how long something lasted, and a way back along itself has other fingers. `benchmarks/ceiling.py` measures what that
   is worth.
6. Instructions name colours, where the paper's do not ("the building block into the corresponding slot"): a small model
   that has never read of a slot knows it better by its colour (results/LOG.md).
"""

import atexit
import dataclasses
import importlib.util
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import common
from common import ARM_ACTION, ARM_STATE, InputError
from data.lerobot import LeRobotWriter

HZ = 10  # control ticks a second (our choice)
PHYSICS_DT = 0.004  # s
SUBSTEPS = round(1 / HZ / PHYSICS_DT)
JOINT_SPEED = 2.0  # rad/s
MAX_OPENING = 0.08  # m between the fingertips
HOME = np.array([0.0, -0.35, 0.0, -2.3, 0.0, 1.95, 0.785])  # rad, pointing down above the table
# Pull towards HOME in the null space. Joint 3 needs it most: it and joint 1 are nearly parallel above a table, and the
# elbow would wander off sideways.
POSTURE = np.array([0.02, 0.02, 0.3, 0.02, 0.02, 0.02, 0.02])
# The joint servos' damping (N m s/rad). The shipped ten times critical damping makes a wrist lose a third of a tick
# whenever it starts to move: its torque limit of 12 N m is spent on the damping.
DAMPING = (150, 150, 120, 120, 40, 40, 40)
DOWN = np.array([0.0, 0.0, 0.0, 1.0])  # quaternion of a tool that points down
EXPERTS = 2  # which version of the scripts it is that data were made with: to be raised with every change of theirs
OPEN, CLOSED = 1.0, 0.0
SHIPPED = Path(__file__).resolve().parent / "policies/small"  # a policy that comes with the project
GL_HELP = "install a headless GL library: `apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1`"

# --------------------------------------------------------------------------------------------------------------------
# Args
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    task: str = "pick_cup"
    """One of the five tasks (Sec. 4.4): pick_cup, block_slot, close_oven, dip_brush, pot_oven; with --record also
    `all`."""
    policy: str = ""
    """Folder of a policy trained by finetune.py, or `expert`. Empty: that in runs/paper or runs/small, else
    the one that comes with the project, else the expert (our choice)."""
    execute: int = 0
    """Actions of each predicted chunk that are executed before the policy looks again. 0: as many as --execute of
    finetune.py said, on which training does not depend. The expert has no chunks (our choice)."""
    trials: int = 10
    """Trials to run (Sec. 4.4: 10 a task)."""
    first_trial: int = 0
    """Number of the first trial; the trial's number and the seed fix the placement (our choice)."""
    seed: int | None = None
    """Seed of the placements. None: 0 for trials, 1 for demonstrations. Even seeds are for evaluation, odd ones for
    demonstrations: --record refuses even ones, and trials on odd ones say that they are none (our choice)."""
    seconds: float = 0.0
    """Time limit of a trial, in simulated seconds. 0: the task's own, over twice what the expert takes (our choice)."""
    image_size: int = 0
    """Height and width of both camera pictures, in pixels. 0: for a policy those of its training pictures, else
    --record-size (our choice)."""
    record_size: int = 128
    """Height and width of recordings, and of what the expert is filmed with, in pixels (our choice)."""
    look: Literal["capsule", "mesh"] = "capsule"
    """How the arm is drawn: capsules (fast), or the real meshes with shadows (our choice)."""
    variation: bool = False
    """Vary light, cameras and the table's colour mildly, and add distractor objects (our choice)."""
    record: int = 0
    """Record that many successful demonstrations of each task instead of running trials (Sec. 4.4: 100 a task)."""
    disturb: float = 1.0
    """How hard demonstrations are disturbed: see `Disturbance`. 0 for perfect ones (our choice)."""
    tilt: float = 0.0
    """How hard disturbances of demonstrations tilt the tool, beside: see `Disturbance` (our choice)."""
    workers: int = 2
    """Processes that simulate and render while recording; the data set does not depend on it (our choice)."""
    out: str = "runs/paper/franka"
    """Where to write: trials into <out>/<task>; a recording into <out> itself, or <out>/demos if --out is not given."""
    resume: bool = False
    """Go on in a folder that already holds results or episodes (our choice)."""


TINY = Args(policy="runs/tiny/finetune", trials=2, record_size=64, out="runs/tiny/franka")
SMALL = Args(record_size=96, out="runs/small/franka")

# --------------------------------------------------------------------------------------------------------------------
# Rendering
# --------------------------------------------------------------------------------------------------------------------


class Cameras:
    """Renders named cameras of a model side by side into one offscreen buffer: one read-back for all of them.

    Makes its own GL context (EGL, else OSMesa), so nothing depends on MUJOCO_GL having been set before an import.
    Raises InputError when there is no GL library."""

    def __init__(self, model, names: tuple[str, ...], size: int, shadows: bool = False):
        mujoco = import_mujoco()

        self.mj, self.size = mujoco, size
        self.watch(model, names, shadows)
        self.context = _gl_context(len(names) * size, size)
        self.context.make_current()
        self.option, self.perturb, self.camera = mujoco.MjvOption(), mujoco.MjvPerturb(), mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.gl = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        self.close = weakref.finalize(self, _free_gl, self.gl, self.context)
        atexit.register(self.close)  # after EGL's own exit handler, i.e. called before it
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.gl)
        self.pixels = np.zeros((size, len(names) * size, 3), np.uint8)

    def watch(self, model, names: tuple[str, ...], shadows: bool = False) -> None:
        """From now on renders these cameras of this model: at most as many as at first, and no other drawn meshes."""
        mj, self.model = self.mj, model
        self.ids = {name: model.camera(name).id for name in names}
        self.scene = mj.MjvScene(model, maxgeom=1000)
        self.scene.flags[mj.mjtRndFlag.mjRND_SHADOW] = shadows
        for flag in (mj.mjtRndFlag.mjRND_REFLECTION, mj.mjtRndFlag.mjRND_HAZE, mj.mjtRndFlag.mjRND_SKYBOX):
            self.scene.flags[flag] = 0

    def render(self, data) -> dict[str, np.ndarray]:
        """Camera name -> uint8 (size, size, 3)."""
        mj, size = self.mj, self.size
        self.context.make_current()
        for i, camera in enumerate(self.ids.values()):
            self.camera.fixedcamid = camera
            if i == 0:  # the geoms are the same for every camera
                every = mj.mjtCatBit.mjCAT_ALL
                mj.mjv_updateScene(self.model, data, self.option, self.perturb, self.camera, every, self.scene)
            else:
                mj.mjv_updateCamera(self.model, data, self.camera, self.scene)
            mj.mjr_render(mj.MjrRect(i * size, 0, size, size), self.scene, self.gl)
        mj.mjr_readPixels(self.pixels, None, mj.MjrRect(0, 0, len(self.ids) * size, size), self.gl)
        flipped = self.pixels[::-1]
        return {name: flipped[:, i * size : (i + 1) * size].copy() for i, name in enumerate(self.ids)}


def _free_gl(gl, context) -> None:
    context.make_current()
    gl.free()
    context.free()


def import_mujoco():
    """MuJoCo, imported with MUJOCO_GL set aside: its import fails where that names a library that is absent."""
    wanted = os.environ.pop("MUJOCO_GL", None)
    try:
        import mujoco
    finally:
        if wanted is not None:
            os.environ["MUJOCO_GL"] = wanted
    return mujoco


def _gl_context(width: int, height: int):
    """An offscreen GL context: what MUJOCO_GL asks for, else EGL, else OSMesa. Raises InputError if none works."""
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    errors = []
    for backend in [wanted] if wanted in ("egl", "osmesa") else ["egl", "osmesa"]:
        try:
            return importlib.import_module(f"mujoco.{backend}").GLContext(width, height)
        except Exception as error:  # a missing library shows as any of six exception types, from ctypes to PyOpenGL
            errors.append(f"{backend}: {type(error).__name__}")
            os.environ.pop("PYOPENGL_PLATFORM", None)  # set by the failed import; the next backend needs another
    raise InputError(f"no GL library to render with ({', '.join(errors)}): {GL_HELP}")


# --------------------------------------------------------------------------------------------------------------------
# The robot
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Observation:
    """What a policy sees. images: "primary" and "wrist", uint8 (H, W, 3) (none where rendering is off);
    state: float32 (8,), the columns of common.ARM_STATE."""

    images: dict[str, np.ndarray]
    state: np.ndarray


class Robot(Protocol):
    """A robot arm with a gripper, simulated or real, driven by ten relative actions a second."""

    instruction: str

    def reset(self, trial: int, seed: int = 0) -> Observation: ...

    def observe(self) -> Observation: ...

    def step(self, action: np.ndarray) -> Observation: ...

    def close(self) -> None: ...


class Command(NamedTuple):
    """What an expert wants of one tick: a tool pose in the base frame, the gripper, the text of the phase, and whether
    the tool is in free space, where the recorder may disturb it."""

    position: np.ndarray
    quaternion: np.ndarray
    gripper: float
    phase: str
    free: bool


class Arm:
    """A chain of joints with one servo each and a tool at its end: inverse kinematics, and targets for the servos.

    In the model, a joint, its degree of freedom and its servo have one number; the chain's are `first` and the next.
    home: joint positions that `posture`, a pull for each, draws towards where the tool leaves freedom."""

    def __init__(self, model, data, first: int = 0, tool: str = "tool", home=HOME, posture=POSTURE):
        self.mj, self.model, self.data, self.home, self.posture = import_mujoco(), model, data, home, posture
        self.scratch = self.mj.MjData(model)
        self.tool, self.servos = model.site(tool).id, slice(first, first + len(home))
        self.jacobian = np.zeros((6, model.nv))
        # Ticks by which a servo trails: its damping over its stiffness.
        self.lead = -model.actuator_biasprm[self.servos, 2] / model.actuator_gainprm[self.servos, 0] * HZ
        self.joints, self.change = np.array(home), np.zeros(len(home))

    def pose(self) -> tuple[np.ndarray, np.ndarray]:
        """The measured tool pose in the base frame: position (3,), quaternion xyzw (4,)."""
        quat = np.empty(4)
        self.mj.mju_mat2Quat(quat, self.data.site_xmat[self.tool])
        return self.data.site_xpos[self.tool].copy(), common.canonical(quat[[1, 2, 3, 0]])

    def start(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """Puts the tool at a pose at once, as far as it can be reached."""
        self.data.qpos[self.servos] = self.joints = self.solve(position, quaternion, self.home, limit=np.inf)
        self.change = np.zeros_like(self.joints)

    def aim(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """Sets the pose that the tool shall have at the end of this tick, as far as the joints' speed allows."""
        before = self.joints
        self.joints = self.solve(position, quaternion, before, limit=JOINT_SPEED / HZ)
        self.before, self.change = before, self.joints - before

    def follow(self, part: float) -> None:
        """Tells the servos where to be when this part, up to 1, of the tick is over."""
        # Their damping makes the arm trail: feeding the velocity forward, i.e. leading, removes the lag.
        self.data.ctrl[self.servos] = self.before + self.change * (part + self.lead)

    def solve(self, position, quaternion, joints, limit: float) -> np.ndarray:
        """Inverse kinematics by damped least squares, started from `joints`, with a pull to `home` in the null
        space. No joint moves by more than `limit` (rad); the direction in joint space is kept."""
        mj, model, data, start = self.mj, self.model, self.scratch, np.array(joints)
        low, high = model.jnt_range[self.servos].T
        q, target = start.copy(), np.empty(4)
        target[:] = quaternion[3], *quaternion[:3]
        here, error = np.empty(4), np.empty(6)
        for _ in range(40 if limit == np.inf else 12):
            data.qpos[self.servos] = q
            mj.mj_kinematics(model, data)
            mj.mj_comPos(model, data)
            error[:3] = position - data.site_xpos[self.tool]
            mj.mju_mat2Quat(here, data.site_xmat[self.tool])
            mj.mju_subQuat(error[3:], target, here)
            error[3:] = data.site_xmat[self.tool].reshape(3, 3) @ error[3:]  # subQuat answers in the tool's own frame
            if np.abs(error).max() < 1e-4:
                break
            mj.mj_jacSite(model, data, self.jacobian[:3], self.jacobian[3:], self.tool)
            jac = self.jacobian[:, self.servos]
            inverse = jac.T @ np.linalg.inv(jac @ jac.T + 1e-4 * np.eye(6))
            move = inverse @ error + (np.eye(len(q)) - inverse @ jac) @ (self.posture * (self.home - q))
            q = np.clip(q + np.clip(move, -0.3, 0.3), low, high)
        change = q - start
        return start + change * min(1.0, limit / max(np.abs(change).max(), 1e-9))


class World:
    """A model in MuJoCo that arms act in, and what tasks and experts may look at."""

    def __init__(self, spec):
        self.mj = import_mujoco()
        self.model = spec.compile()
        self.data = self.mj.MjData(self.model)
        self.owners, self.known_contacts = self._owners(), {}
        self.touched: set[tuple[str, str]] = set()

    def tick(self, arms: Sequence[Arm], watch: bool = False) -> None:
        """The physics of one tick, in which arms go where they aim. watch: also collects contacts in `touched`."""
        for i in range(SUBSTEPS):
            for arm in arms:
                arm.follow((i + 1) / SUBSTEPS)
            self.mj.mj_step(self.model, self.data)
            if watch:
                self.touched |= self.contacts()

    def where(self, body: str) -> tuple[np.ndarray, Rotation]:
        """A body's pose in the base frame."""
        ref = self.data.body(body)
        return ref.xpos.copy(), Rotation.from_quat(ref.xquat[[1, 2, 3, 0]])

    def contacts(self) -> set[tuple[str, str]]:
        """Pairs of things in touch, each sorted: names of bodies that stand in the world, "robot" (also for fingers),
        "left_finger", "right_finger", "table"."""
        key = self.data.contact.geom.tobytes()
        if key not in self.known_contacts:  # they rarely change between physics steps
            if len(self.known_contacts) > 10_000:
                self.known_contacts.clear()
            geoms = self.data.contact.geom.tolist()
            both = {(x, y) for a, b in geoms for x in self.owners[a] for y in self.owners[b] if x != y}
            self.known_contacts[key] = {tuple(sorted(pair)) for pair in both}
        return self.known_contacts[key]

    def touching(self, a: str, b: str) -> bool:
        return ((a, b) if a < b else (b, a)) in self.contacts()

    def held(self, body: str) -> bool:
        """Whether both fingers touch the body."""
        return self.touching(body, "left_finger") and self.touching(body, "right_finger")

    def _owners(self) -> list[tuple[str, ...]]:
        """For each geom, the names that `contacts` gives it."""
        model, owners = self.model, []
        for body in model.geom_bodyid:
            name, root = model.body(body).name, model.body(model.body_rootid[body]).name
            finger = (name,) if name.endswith("finger") else ()
            owners.append(("table",) if body == 0 else ("robot", *finger) if root == "base" else (root,))
        return owners


class SimFranka(World):
    """A Franka Research 3 with its hand in MuJoCo, in front of one of the five tasks. Implements Robot.

    image_size 0 renders nothing (Observation.images is empty), which is how experts are checked quickly."""

    def __init__(self, task: str, image_size: int = 64, look: str = "capsule", variation: bool = False):
        if task not in TASKS:
            raise InputError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
        if image_size and not 16 <= image_size <= 1024:
            raise InputError(f"image size {image_size}: must lie between 16 and 1024 pixels")
        self.task, self.variation = TASKS[task](), variation
        spec = fr3_spec(look)
        spec.visual.global_.offwidth, spec.visual.global_.offheight = max(2 * image_size, 16), max(image_size, 16)
        spec.visual.quality.offsamples = 0 if image_size <= 128 and look == "capsule" else 4
        spec.visual.quality.shadowsize = 1024 if look == "mesh" else 0  # the default of 4096 is 7 times slower on a CPU
        self.task.build(spec.worldbody, spec)
        for i, (kind, size) in enumerate(DISTRACTORS):
            add_geom(spec.worldbody.add_body(name=f"distractor{i}"), kind, size, name=f"distractor{i}")
        camera, aim = self.task.camera
        spec.worldbody.add_camera(name="primary", pos=camera, quat=look_at(camera, aim), fovy=37)
        super().__init__(spec)
        self.arm = Arm(self.model, self.data)
        varied = ("cam_pos", "cam_quat", "light_dir", "light_diffuse", "geom_rgba")
        self.default = {key: getattr(self.model, key).copy() for key in varied}
        self.cameras = None
        if image_size:
            self.cameras = Cameras(self.model, ("primary", "wrist"), image_size, shadows=look == "mesh")
        self.instruction, self.seconds = "", 0.0

    # ---- Robot ----

    def reset(self, trial: int, seed: int = 0) -> Observation:
        """Places everything anew: a function of (seed, task, trial) alone. Raises InputError for negative numbers."""
        if trial < 0 or seed < 0:
            raise InputError(f"trial {trial}, seed {seed}: neither may be negative")
        mj, model, data = self.mj, self.model, self.data
        entropy = [seed, list(TASKS).index(self.task.name), trial]
        rng = np.random.default_rng(np.random.SeedSequence(entropy))
        self._plain()
        for _ in range(200):
            mj.mj_resetData(model, data)
            start = np.array([0.42, 0.0, 0.28]) + rng.uniform(-0.03, 0.03, 3)
            self.arm.start(start, pointing_down(yaw=rng.uniform(-0.1, 0.1)))
            data.qpos[7:9] = MAX_OPENING / 2
            self.task.place(self, rng)
            mj.mj_forward(model, data)
            if all("table" in pair for pair in self.contacts()):  # nothing else may touch at the start
                break
        else:
            raise RuntimeError(f"no placement without contact for {self.task.name}, seed {seed}, trial {trial}")
        if self.variation:
            self._vary(np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(1,))))
        data.ctrl[:7], data.ctrl[7] = self.arm.joints, MAX_OPENING / 2
        mj.mj_step(model, data, SUBSTEPS)  # objects come to rest
        self.instruction, self.seconds, self.touched = self.task.instruction, 0.0, set()
        self.task.begin(self)
        return self.observe()

    def observe(self) -> Observation:
        state = np.concatenate([*self.pose(), [self.opening()]]).astype(np.float32)
        return Observation(self.cameras.render(self.data) if self.cameras else {}, state)

    def step(self, action: np.ndarray) -> Observation:
        """One tick: action (7,) in common.ARM_ACTION, from the pose measured now. Raises ValueError unless finite."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action must be 7 finite numbers, got {action}")
        self.drive(*common.apply_action(*self.pose(), action[:6]), action[6])
        return self.observe()

    def close(self) -> None:
        if self.cameras:
            self.cameras.close()
            self.cameras = None

    def pose(self) -> tuple[np.ndarray, np.ndarray]:
        """The measured tool pose in the base frame: position (3,), quaternion xyzw (4,), canonical."""
        return self.arm.pose()

    def opening(self) -> float:
        """The measured opening of the gripper, 0 (closed) to 1."""
        return float(np.clip(self.data.qpos[7:9].sum() / MAX_OPENING, 0, 1))

    def drive(self, position: np.ndarray, quaternion: np.ndarray, gripper: float) -> None:
        """Drives the tool to a pose within one tick, as far as the joints' speed allows."""
        self.arm.aim(position, quaternion)
        self.data.ctrl[7] = MAX_OPENING / 2 if gripper > 0.5 else 0.0
        self.tick((self.arm,), self.task.watch)
        self.seconds += 1 / HZ

    # ---- What tasks and experts may look at, beside World's ----

    def place(self, body: str, position, yaw: float = 0.0) -> None:
        """Puts a free body, or a fixed one, at a position (x, y[, z]) with a yaw angle."""
        position = np.array([*position, 0.0][:3])
        quat = np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
        ref = self.model.body(body)
        if ref.dofnum[0] == 6:
            address = self.model.jnt_qposadr[ref.jntadr[0]]
            self.data.qpos[address : address + 7] = *position, *quat
        else:
            ref.pos[:], ref.quat[:] = position, quat

    def released(self, body: str) -> bool:
        """Whether the gripper is told to open and no part of the robot touches the body."""
        return self.data.ctrl[7] > 0 and not self.touching(body, "robot")

    def _plain(self) -> None:
        """Undoes `_vary`: light, cameras and table as built, the distractors out of sight."""
        for key, value in self.default.items():
            getattr(self.model, key)[:] = value
        for i in range(len(DISTRACTORS)):
            self.place(f"distractor{i}", (0, 0, -1 - i))

    def _vary(self, rng: np.random.Generator) -> None:
        """Mild variation of light, cameras and table, and up to three distractors at least 10 cm off everything."""
        model, data = self.model, self.data
        model.light_dir[0] += rng.uniform(-0.25, 0.25, 3)
        model.light_diffuse[0] *= rng.uniform(0.7, 1.25)
        model.geom_rgba[model.geom("table").id, :3] += rng.uniform(-0.08, 0.08, 3)
        model.cam_pos += rng.uniform(-0.012, 0.012, model.cam_pos.shape)
        model.cam_quat += rng.uniform(-0.008, 0.008, model.cam_quat.shape)
        model.cam_quat /= np.linalg.norm(model.cam_quat, axis=1, keepdims=True)
        for i in range(rng.integers(0, len(DISTRACTORS) + 1)):
            near = (data.geom_xpos[:, 2] > -0.2) & (data.geom_xpos[:, 2] < 0.3) & (model.geom_bodyid > 0)
            things, radii = data.geom_xpos[near, :2], model.geom_rbound[near]
            for spot in rng.uniform((0.3, -0.4), (0.75, 0.4), (20, 2)):
                if (np.linalg.norm(things - spot, axis=1) - radii).min() > 0.1:
                    self.place(f"distractor{i}", (*spot, DISTRACTORS[i][1][-1]))
                    break
            model.geom(f"distractor{i}").rgba[:3] = rng.uniform(0.15, 0.85, 3)
            self.mj.mj_kinematics(model, data)


# --------------------------------------------------------------------------------------------------------------------
# The scene: arm, table, light
# --------------------------------------------------------------------------------------------------------------------

# What --variation may add: kind and size (m), the last number being the height of the centre above the table.
DISTRACTORS = (("box", (0.02, 0.03, 0.015)), ("cylinder", (0.02, 0.02)), ("sphere", (0.022,)))
# The capsule look: link -> (from, to, radius), in the link's frame (m).
CAPSULES = {
    "fr3_link0": [((-0.06, 0, 0.03), (0, 0, 0.14), 0.07)],
    "fr3_link1": [((0, 0, -0.19), (0, 0, 0), 0.062)],
    "fr3_link2": [((0, 0, 0), (0, -0.19, 0), 0.06)],
    "fr3_link3": [((0, 0, -0.13), (0, 0, -0.02), 0.058), ((0, 0, 0), (0.0825, 0, 0), 0.055)],
    "fr3_link4": [((0, 0, 0), (-0.0825, 0.1, 0), 0.056)],
    "fr3_link5": [((0, 0, -0.28), (0, 0, -0.02), 0.055)],
    "fr3_link6": [((0, 0, 0), (0.088, 0, 0), 0.05)],
    "fr3_link7": [((0, 0, 0), (0, 0, 0.085), 0.045)],
}


def fr3_spec(look: str):
    """MjSpec of the FR3 with its hand (from the franky-sim wheel), servos and contacts as they need to be, a `tool`
    site, the wrist camera and the `stage`. Raises InputError when franky-sim is not installed."""
    mujoco = import_mujoco()

    found = importlib.util.find_spec("franky_sim")
    if found is None:
        raise InputError("the robot's model comes with franky-sim, which is not installed: `pip install franky-sim`")
    assets = Path(found.submodule_search_locations[0]) / "assets"
    spec = mujoco.MjSpec.from_file(str(assets / "fr3.xml"))
    spec.meshdir = str(assets / "meshes")
    for key in list(spec.keys):
        spec.delete(key)
    for body in spec.bodies:
        if body.name not in ("world", "base"):
            body.gravcomp = 1
        for geom in list(body.geoms):
            # Of the fingertips' five pads the large one holds: 20 more contact points a grasp only cost time.
            spare = "pad_collision" in geom.classname.name and not geom.classname.name.endswith("_1")
            if spare or geom.classname.name == "visual" and look == "capsule":
                spec.delete(geom)
            elif geom.classname.name == "visual":
                geom.mass = 0  # as the capsules: the look changes no physics
            else:
                _grip(geom)
        for start, end, radius in CAPSULES.get(body.name, []) if look == "capsule" else []:
            body.add_geom(
                type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=[*start, *end], size=(radius, 0, 0),
                rgba=(0.9, 0.9, 0.92, 1), contype=0, conaffinity=0, mass=0, group=2,
            )  # fmt: skip
    hand = spec.body("hand")
    if look == "capsule":
        used = {geom.meshname for geom in spec.geoms}
        for mesh in list(spec.meshes):  # 135,000 triangles that nobody draws
            if mesh.name not in used:
                spec.delete(mesh)
        add_geom(hand, "box", (0.03, 0.1, 0.033), (0, 0, 0.034), (0.3, 0.32, 0.36, 1), visual=True)
        for finger in ("left_finger", "right_finger"):
            pad = spec.body(finger)
            add_geom(pad, "box", (0.0105, 0.007, 0.026), (0, 0.0085, 0.027), (0.12, 0.12, 0.14, 1), visual=True)
    hand.add_site(name="tool", pos=(0, 0, 0.1034), quat=(0, 1, 0, 0))
    eye = np.array([-0.1, 0, 0.045])
    hand.add_camera(name="wrist", pos=eye, quat=look_at(eye, (0, 0, 0.13), up=(1, 0, 0)), fovy=72)
    for servo, damping in zip(spec.actuators[:7], DAMPING, strict=True):
        servo.biasprm[2] = -damping
    grip = spec.actuator("hand")  # the shipped kp of 100 N/m lets everything slip
    grip.inheritrange = 0
    grip.ctrlrange, grip.forcerange = (0, MAX_OPENING / 2), (-140, 140)
    grip.gainprm[:1], grip.biasprm[:3] = [2000], [0, -2000, -100]
    stage(spec, shadows=look == "mesh")
    return spec


def stage(spec, shadows: bool = False) -> None:
    """Adds to a robot what surrounds it: how physics is computed, the table at z = 0, and the light."""
    mujoco = import_mujoco()

    spec.option.timestep, spec.option.integrator = PHYSICS_DT, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone, spec.option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 10
    world = spec.worldbody
    add_geom(world, "plane", (4, 4, 0.1), rgba=(0.62, 0.52, 0.42, 1), name="table")
    light = world.add_light(pos=(0.6, -0.6, 2), dir=(-0.15, 0.3, -1), diffuse=(0.5, 0.5, 0.5), specular=(0.1, 0.1, 0.1))
    light.type, light.castshadow = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, shadows
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = (0.45, 0.45, 0.45), (0.2, 0.2, 0.2)
    spec.visual.headlight.specular = (0, 0, 0)
    spec.stat.extent, spec.visual.map.znear, spec.visual.map.zfar = 1, 0.01, 10  # the wrist camera looks from near


def _grip(geom) -> None:
    """Contact settings that hold what is gripped: without torsional friction (condim 4) a pot turns in the fingers."""
    geom.condim, geom.friction, geom.solref, geom.solimp[:3] = 4, (1, 0.02, 0.0005), (0.01, 1), (0.95, 0.99, 0.001)


def add_geom(body, kind: str, size, pos=(0, 0, 0), rgba=(0.5, 0.5, 0.5, 1), mass=0.0, yaw=0.0, visual=False, name=""):
    """Adds one primitive; visual ones touch nothing."""
    mujoco = import_mujoco()

    geom = body.add_geom(
        type=getattr(mujoco.mjtGeom, f"mjGEOM_{kind.upper()}"), size=[*size, 0, 0][:3], pos=pos, rgba=rgba, mass=mass,
        quat=(np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)), name=name, group=1,
    )  # fmt: skip
    _grip(geom)
    if visual:
        geom.contype = geom.conaffinity = 0
    return geom


def add_free(world, name: str):
    body = world.add_body(name=name)
    body.add_freejoint()
    return body


def look_at(eye, aim, up=(0, 0, 1)) -> np.ndarray:
    """Quaternion wxyz of a camera (which looks along its -z, with y up) at `eye` that looks at `aim`."""
    back = np.subtract(eye, aim) / np.linalg.norm(np.subtract(eye, aim))
    right = np.cross(up, back) / np.linalg.norm(np.cross(up, back))
    quat = Rotation.from_matrix(np.stack([right, np.cross(back, right), back], 1)).as_quat()
    return quat[[3, 0, 1, 2]]


def pointing_down(yaw: float = 0.0, pitch: float = 0.0) -> np.ndarray:
    """Quaternion xyzw of a tool that points down, pitched (positive: the front goes down), then turned by yaw."""
    return Rotation.from_euler("xyz", [0, pitch, yaw]).as_quat(canonical=True)


def _turned(yaw: float) -> Rotation:
    return Rotation.from_euler("z", yaw)


def fold(yaw: float, period: float = np.pi) -> float:
    """The equivalent angle nearest to zero of something that looks the same after `period`."""
    return (yaw + period / 2) % period - period / 2


# --------------------------------------------------------------------------------------------------------------------
# The experts' vocabulary
# --------------------------------------------------------------------------------------------------------------------


def reach(
    sim, position, quaternion, gripper, phase, speed=0.25, tolerance=0.003, free=True, ticks=80
) -> Iterator[Command]:  # fmt: skip
    """Moves the tool straight towards a pose at limited speed (m/s; a radian counts as 0.2 m), from wherever it is
    measured each tick, until it is there: disturbances are corrected by themselves."""
    for _ in range(ticks):
        here, turned = sim.pose()
        delta = np.subtract(position, here)
        turn = Rotation.from_quat(quaternion) * Rotation.from_quat(turned).inv()
        length = max(np.linalg.norm(delta), 0.2 * turn.magnitude())
        if length < tolerance:
            return
        part = min(1.0, speed / HZ / length)
        nearer = Rotation.from_rotvec(part * turn.as_rotvec()) * Rotation.from_quat(turned)
        yield Command(here + part * delta, nearer.as_quat(canonical=True), gripper, phase, free)


def hold(sim, gripper, phase, ticks) -> Iterator[Command]:
    """Keeps the pose it finds."""
    position, quaternion = sim.pose()
    for _ in range(ticks):
        yield Command(position, quaternion, gripper, phase, False)


def move_fingers(sim, gripper, phase, ticks=10) -> Iterator[Command]:
    """Opens or closes the gripper where it is, until the fingers stand still. A policy without memory sees whether they
    stand, not for how long: told to wait, it would wait forever."""
    opening, moved = sim.opening(), False
    for tick, command in enumerate(hold(sim, gripper, phase, ticks)):
        yield command
        before, opening = opening, sim.opening()
        moves = abs(opening - before) >= 0.01
        moved |= moves
        if not moves and (moved or tick >= 2):
            return


def descend(
    sim, position, quaternion, gripper, phases, height, speed=0.25, slope=5.0, tolerance=0.003, ticks=120
) -> Iterator[Command]:  # fmt: skip
    """Moves above a pose and down to it in a funnel: it stays `slope` times as high above the pose as it is beside it
    (a radian counts as 0.1 m), `height` (m) at most. So what it does depends on where it is alone, and whoever follows
    it a little beside still comes down. phases: texts for far, where disturbances may come, too, and near."""
    for _ in range(ticks):
        here, turned = sim.pose()
        turn = Rotation.from_quat(quaternion) * Rotation.from_quat(turned).inv()
        beside = max(np.linalg.norm(np.subtract(position, here)[:2]), 0.1 * turn.magnitude())
        up = min(height, slope * max(0.0, beside - 0.7 * tolerance))
        if beside < tolerance and here[2] - position[2] < tolerance:
            return
        far = up >= height
        goal = np.add(position, (0, 0, up))
        yield from reach(sim, goal, quaternion, gripper, phases[not far], speed if far else 0.8 * speed, 0.0, far, 1)


def grasp(sim, position, quaternion, thing: str, lift: float, speed=0.2) -> Iterator[Command]:
    """From above down to a pose, closes around `thing` ("the cup"), and lifts it by `lift` (m) at `speed` (m/s)."""
    around = f"the gripper around {thing}"
    yield from descend(sim, position, quaternion, OPEN, (f"move above {thing}", f"lower {around}"), 0.1)
    yield from move_fingers(sim, CLOSED, f"close {around}")
    up = np.add(position, (0, 0, lift))
    yield from reach(sim, up, quaternion, CLOSED, f"lift {thing}", speed, 0.01, free=False)


# --------------------------------------------------------------------------------------------------------------------
# The five tasks (Sec. 4.4)
# --------------------------------------------------------------------------------------------------------------------


class Task:
    """A scene, a placement sampler, a success predicate and a scripted expert.

    build: adds the objects. place: puts them somewhere at random. begin: remembers what `check` needs.
    check, after each tick: (True, "") = success; (False, reason) = lost for good; (None, reason) = not yet, with what
    would be reported if time ran out now. expert: the commands that solve it, tick by tick."""

    name = ""
    limit = 10.0  # s
    watch = False  # whether contacts are collected at every physics step, in sim.touched
    camera = ((1.0, -0.4, 0.5), (0.46, 0.0, 0.11))  # primary camera: where it stands, where it looks
    instruction = ""  # PickCup's has a place for the colour

    def build(self, world, spec) -> None: ...

    def place(self, sim: SimFranka, rng: np.random.Generator) -> None: ...

    def begin(self, sim: SimFranka) -> None:
        self.ticks = 0

    def lasting(self, state: bool, seconds: float) -> bool:
        """Whether a state has held for so long; to be called once a tick."""
        self.ticks = self.ticks + 1 if state else 0
        return self.ticks >= seconds * HZ

    def check(self, sim: SimFranka) -> tuple[bool | None, str]: ...

    def expert(self, sim: SimFranka) -> Iterator[Command]: ...


class PickCup(Task):
    """Task 1, colour discrimination: a red and a blue cup, one of them named in the instruction."""

    name, limit, instruction = "pick_cup", 10.0, "pick up the {} cup"
    colours = {"red": (0.85, 0.1, 0.1, 1), "blue": (0.1, 0.25, 0.85, 1)}

    def build(self, world, spec):
        for colour, rgba in self.colours.items():
            cup = add_free(world, colour)
            add_geom(cup, "cylinder", (0.032, 0.045), rgba=rgba, mass=0.12)
            add_geom(cup, "cylinder", (0.027, 0.002), (0, 0, 0.0445), (0.2, 0.15, 0.12, 1), visual=True)

    def place(self, sim, rng):
        self.target, self.other = ("red", "blue") if rng.random() < 0.5 else ("blue", "red")
        self.instruction = type(self).instruction.format(self.target)
        while True:
            xy = rng.uniform((0.4, -0.2), (0.62, 0.2), (2, 2))
            if np.linalg.norm(xy[0] - xy[1]) > 0.13:
                break
        for cup, spot in zip((self.target, self.other), xy, strict=True):
            sim.place(cup, (*spot, 0.045))

    def begin(self, sim):
        super().begin(sim)
        self.start = {cup: sim.where(cup)[0] for cup in self.colours}

    def check(self, sim):
        if np.linalg.norm(sim.where(self.other)[0] - self.start[self.other]) > 0.015:
            return False, f"the {self.other} cup was moved"
        lifted = sim.where(self.target)[0][2] - self.start[self.target][2] > 0.1
        if self.lasting(lifted and sim.held(self.target), 0.5):
            return True, ""
        return None, f"the {self.target} cup was not held 10 cm up for 0.5 s"

    def expert(self, sim):
        cup = f"the {self.target} cup"
        yield from grasp(sim, sim.where(self.target)[0] + (0, 0, 0.01), DOWN, cup, 0.15)
        yield from hold(sim, CLOSED, f"hold {cup} up", 20)


class BlockSlot(Task):
    """Task 2: a block into the slot of its shape, 4 mm wider on each side."""

    name, limit = "block_slot", 16.0
    instruction = "put the yellow block into the green slot"
    half = np.array([0.025, 0.017, 0.03])  # m; the gripper closes along y
    gap, wall, height = 0.004, 0.015, 0.03

    def build(self, world, spec):
        block = add_free(world, "block")
        add_geom(block, "box", self.half, rgba=(0.95, 0.75, 0.1, 1), mass=0.08)
        board = world.add_body(name="board")
        (x, y), w, z = self.half[:2] + self.gap, self.wall, self.height / 2
        for sign in (-1, 1):
            add_geom(board, "box", (w, y + 2 * w, z), (sign * (x + w), 0, z), (0.15, 0.5, 0.3, 1))
            add_geom(board, "box", (x, w, z), (0, sign * (y + w), z), (0.15, 0.5, 0.3, 1))
        add_geom(board, "box", (x, y, 0.0005), (0, 0, 0.0005), (0.08, 0.1, 0.08, 1), visual=True)

    def place(self, sim, rng):
        sim.place("block", (*rng.uniform((0.42, -0.22), (0.56, -0.08)), self.half[2]), rng.uniform(-0.6, 0.6))
        sim.place("board", rng.uniform((0.44, 0.06), (0.58, 0.2)), rng.uniform(-0.4, 0.4))

    def check(self, sim):
        (block, _), (slot, _) = sim.where("block"), sim.where("board")
        away, above = np.linalg.norm(block[:2] - slot[:2]), block[2] - self.half[2]
        inside = away < 0.006 and above < 0.004
        if self.lasting(inside and sim.released("block"), 0.3):
            return True, ""
        if inside:
            return None, "the block was not released"
        return None, f"the block is {1000 * away:.0f} mm beside the slot and {1000 * above:.0f} mm above its floor"

    def expert(self, sim):
        (block, turned), (slot, aligned) = sim.where("block"), sim.where("board")
        yaw, goal = fold(turned.as_euler("xyz")[2]), fold(aligned.as_euler("xyz")[2])
        yield from grasp(sim, block + (0, 0, 0.014), pointing_down(yaw), "the block", 0.1)
        # Where the tool must go so that the block, as it now lies in the hand, arrives upright in the slot.
        (here, tool), (held, tilt) = sim.pose(), sim.where("block")
        turn = _turned(goal) * _turned(fold(tilt.as_euler("xyz")[2])).inv()
        target = np.array([*slot[:2], self.half[2] + 0.004]) + turn.apply(here - held)
        facing = (turn * Rotation.from_quat(tool)).as_quat(canonical=True)
        phases = ("move the block above the slot", "lower the block into the slot")
        yield from descend(sim, target, facing, CLOSED, phases, 0.085, slope=12.0, tolerance=0.0025)
        yield from move_fingers(sim, OPEN, "open the gripper")
        yield from reach(sim, sim.pose()[0] + (0, 0, 0.1), sim.pose()[1], OPEN, "move up", free=False)


class Oven(Task):
    """What the two oven tasks share: an oven that opens towards the robot, its door hinged at the bottom. The oven's
    frame has its origin at the foot of the opening, x going in and z up."""

    camera = ((0.12, -0.74, 0.52), (0.56, -0.01, 0.09))  # from the side: from the front the oven shows its back
    inside = np.array([0.2, 0.26, 0.16])  # m: depth, width, height
    hinge = 0.012  # m above the table

    def build(self, world, spec):
        oven, grey = world.add_body(name="oven"), (0.36, 0.38, 0.42, 1)
        (depth, width, height), w = self.inside / 2, 0.006
        add_geom(oven, "box", (depth, width, w), (depth, 0, w), grey)
        add_geom(oven, "box", (depth, width, w), (depth, 0, 2 * height + 3 * w), grey)
        add_geom(oven, "box", (w, width, height + 2 * w), (2 * depth + w, 0, height + 2 * w), (0.2, 0.2, 0.22, 1))
        for side in (-1, 1):
            add_geom(oven, "box", (depth, w, height + 2 * w), (depth, side * (width + w), height + 2 * w), grey)
        door = oven.add_body(name="door", pos=(0, 0, self.hinge))
        joint = door.add_joint(name="door", axis=(0, -1, 0), range=(0, 1.5), damping=(0.1, 0, 0), frictionloss=1.2)
        joint.solimp_friction[:2] = 0.9999, 0.9999  # stiff dry friction: a half open door stays where it is
        add_geom(door, "box", (w, width, height), (-w, 0, height), (0.85, 0.45, 0.12, 1), mass=0.3)
        pane = (0.002, 0.8 * width, 0.45 * height)
        add_geom(door, "box", pane, (-2 * w, 0, 0.9 * height), (0.1, 0.1, 0.12, 1), visual=True)
        spec.add_exclude(bodyname1="oven", bodyname2="door")

    def place_oven(self, sim, rng, low, high, yaw: float, angle: float) -> None:
        sim.place("oven", rng.uniform(low, high), rng.uniform(-yaw, yaw))
        sim.data.joint("door").qpos[0] = angle

    def in_oven(self, sim, body: str) -> np.ndarray:
        """A body's position in the oven's frame."""
        (oven, turned), (position, _) = sim.where("oven"), sim.where(body)
        return turned.inv().apply(position - oven)


class CloseOven(Oven):
    """Task 3: the closed fingers push the door's upper edge until it is shut."""

    name, limit = "close_oven", 12.0
    instruction = "close the oven"

    def place(self, sim, rng):
        self.place_oven(sim, rng, (0.66, -0.08), (0.71, 0.12), 0.15, rng.uniform(0.5, 0.95))

    def check(self, sim):
        angle = sim.data.joint("door").qpos[0]
        return (True, "") if angle < 0.05 else (None, f"the door is {angle:.2f} rad open")

    def edge(self, sim, angle: float, away: float, below: float) -> np.ndarray:
        """A point near the middle of the door's upper edge at a door angle: `away` on the robot's side, `below` it."""
        oven, turned = sim.where("oven")
        length = self.inside[2]
        x, z = -length * np.sin(angle) - away, self.hinge + length * np.cos(angle) - below
        return oven + turned.apply([x, 0, z])

    def expert(self, sim):
        door, yaw = sim.data.joint("door"), sim.where("oven")[1].as_euler("xyz")[2]

        def behind(angle: float, away: float, below: float):
            # The fingers lean back with the door: so the push stays inside the friction cone, and the hand stays off
            # the oven's top in the end.
            return self.edge(sim, angle, away, below), pointing_down(yaw, pitch=-0.05 - 0.4 * max(angle, 0))

        start, facing = behind(door.qpos[0], 0.06, 0.03)
        yield from reach(sim, start + (0, 0, 0.12), facing, CLOSED, "move in front of the oven door", tolerance=0.01)
        yield from reach(sim, start, facing, CLOSED, "lower the gripper behind the door's edge", 0.2, 0.005, False)
        for _ in range(80):
            goal, facing = behind(max(door.qpos[0] - 0.15, -0.15), 0.012, 0.03)
            yield from reach(sim, goal, facing, CLOSED, "push the oven door shut", 0.15, 0.0, False, 1)


class DipBrush(Task):
    """Task 4: the brush is picked up by its thin handle and dipped into the sauce without pushing the bowl away."""

    name, limit = "dip_brush", 16.0
    instruction = "dip the yellow brush in the red sauce"
    tip, grip, radius = 0.1, -0.05, 0.05  # m from the handle's centre to tip and grip; inner radius of the bowl

    def build(self, world, spec):
        brush = add_free(world, "brush")
        add_geom(brush, "box", (0.07, 0.008, 0.008), rgba=(0.9, 0.85, 0.3, 1), mass=0.03)
        add_geom(brush, "box", (0.015, 0.012, 0.007), (0.085, 0, 0), (0.95, 0.95, 0.95, 1), mass=0.005)
        bowl, side = add_free(world, "bowl"), 2 * np.pi / 10
        add_geom(bowl, "cylinder", (self.radius, 0.004), (0, 0, 0.004), (0.2, 0.35, 0.75, 1), mass=0.4)
        add_geom(bowl, "cylinder", (self.radius - 0.001, 0.001), (0, 0, 0.014), (0.75, 0.08, 0.05, 1), visual=True)
        pane = (0.004, self.radius * np.tan(side / 2) + 0.002, 0.016)
        for angle in side * np.arange(10):
            at = (self.radius * np.cos(angle), self.radius * np.sin(angle), 0.02)
            add_geom(bowl, "box", pane, at, (0.2, 0.35, 0.75, 1), 0.01, angle)

    def place(self, sim, rng):
        sim.place("brush", (*rng.uniform((0.4, -0.2), (0.48, -0.06)), 0.008), rng.uniform(-0.5, 0.5))
        sim.place("bowl", (*rng.uniform((0.5, 0.08), (0.6, 0.2)), 0.0))

    def begin(self, sim):
        super().begin(sim)
        self.start, self.dipped = sim.where("bowl")[0], False

    def tip_of(self, sim) -> np.ndarray:
        position, turned = sim.where("brush")
        return position + turned.apply([self.tip, 0, 0])

    def check(self, sim):
        bowl, tip = sim.where("bowl")[0], self.tip_of(sim)
        if np.linalg.norm(bowl - self.start) > 0.03:
            return False, "the bowl was pushed away"
        self.dipped |= bool(np.linalg.norm(tip[:2] - bowl[:2]) < self.radius - 0.008 and tip[2] < 0.028)
        if not self.dipped:
            return None, "the brush's tip was not in the sauce"
        return (True, "") if tip[2] > 0.07 and sim.held("brush") else (None, "the brush was not held up after the dip")

    def expert(self, sim):
        (brush, turned), bowl = sim.where("brush"), sim.where("bowl")[0]
        yaw, pitch = turned.as_euler("xyz")[2], 0.75
        handle = brush + turned.apply([self.grip, 0, 0]) + (0, 0, 0.003)
        yield from grasp(sim, handle, pointing_down(yaw), "the brush's handle", 0.12)
        tilted = pointing_down(yaw / 2, pitch)
        # The tip's place in the hand is measured: the brush may have turned a little when it was gripped.
        here, tool = sim.pose()
        offset = Rotation.from_quat(tool).inv().apply(self.tip_of(sim) - here)
        target = np.array([*bowl[:2], 0.019]) - Rotation.from_quat(tilted).apply(offset)
        phases = ("move the brush above the bowl", "dip the brush in the sauce")
        yield from descend(sim, target, tilted, CLOSED, phases, 0.07, 0.2, slope=4.0, tolerance=0.004)
        # Back and upright, not the way it came: whoever looks at the middle of that way could not tell in from out.
        out = sim.pose()[0] + (-0.08, 0, 0.1)
        yield from reach(sim, out, pointing_down(yaw / 2), CLOSED, "lift the brush out of the sauce", 0.2, free=False)


class PotOven(Oven):
    """Task 5: the pot goes into the oven by its long handle, gripped 15.5 cm from the pot's centre. Touching the oven
    with the robot fails, at whatever moment: a predicate on the final state alone let the hand run into it."""

    name, limit, watch = "pot_oven", 20.0, True
    instruction = "put the red pot in the oven"
    radius, half, grip, handle = 0.055, 0.028, 0.155, 0.018  # m: radius, half height, and the handle along -x and up

    def build(self, world, spec):
        super().build(world, spec)
        pot = add_free(world, "pot")
        add_geom(pot, "cylinder", (self.radius, self.half), rgba=(0.75, 0.12, 0.12, 1), mass=0.15)
        add_geom(pot, "cylinder", (self.radius - 0.006, 0.001), (0, 0, self.half), (0.15, 0.12, 0.1, 1), visual=True)
        grip = (-self.radius - 0.065, 0, self.handle)
        add_geom(pot, "box", (0.07, 0.009, 0.008), grip, (0.12, 0.12, 0.14, 1), mass=0.03)

    def place(self, sim, rng):
        self.place_oven(sim, rng, (0.6, 0.08), (0.64, 0.16), 0.12, 1.5)
        sim.place("pot", (*rng.uniform((0.48, -0.27), (0.54, -0.19)), self.half), rng.uniform(-0.35, 0.35))

    def check(self, sim):
        if ("oven", "robot") in sim.touched:
            return False, "the robot touched the oven"
        x, y, z = self.in_oven(sim, "pot")
        depth, width, _ = self.inside
        inside = self.radius < x < depth and abs(y) < width / 2 - self.radius and z < 0.012 + self.half + 0.006
        flat = sim.where("pot")[1].apply([0, 0, 1])[2] > np.cos(0.1)
        if self.lasting(inside and flat and sim.released("pot"), 0.3):
            return True, ""
        return None, "the pot was not released" if inside and flat else "the pot does not stand on the oven's floor"

    def expert(self, sim):
        (pot, turned), (oven, facing) = sim.where("pot"), sim.where("oven")
        yaw, goal = turned.as_euler("xyz")[2], facing.as_euler("xyz")[2]
        handle = pot + turned.apply([-self.grip, 0, self.handle])
        yield from grasp(sim, handle, pointing_down(yaw), "the pot's handle", 0.14, speed=0.1)
        for x, z, phase, speed, free in (
            (-0.1, 0.1, "move the pot in front of the oven", 0.2, True),
            (0.085, 0.06, "move the pot into the oven", 0.12, False),
            (0.085, 0.0155, "set the pot down in the oven", 0.08, False),
        ):
            target = oven + facing.apply([x - self.grip, 0, z + self.half + self.handle])
            yield from reach(sim, target, pointing_down(goal), CLOSED, phase, speed, 0.003, free, 60)
        yield from move_fingers(sim, OPEN, "open the gripper")
        up = sim.pose()[0] + facing.apply([-0.03, 0, 0.1])
        yield from reach(sim, up, pointing_down(goal), OPEN, "move up and away", 0.2, free=False)


TASKS: dict[str, type[Task]] = {task.name: task for task in (PickCup, BlockSlot, CloseOven, DipBrush, PotOven)}
INSTRUCTIONS = {name: task.instruction for name, task in TASKS.items()}

# --------------------------------------------------------------------------------------------------------------------
# Policies
# --------------------------------------------------------------------------------------------------------------------


class ExpertPolicy:
    """The scripted expert behind the interface of a learned policy. It looks into the simulator, so it needs one."""

    name = "expert"

    def reset(self, robot: SimFranka) -> None:
        self.robot, self.commands, self.phase = robot, robot.task.expert(robot), ""

    def act(self, observation: Observation, instruction: str) -> np.ndarray:
        """The action (7,) of this tick; `phase` says what it is for. Stays put once the script is over."""
        position, quaternion = self.robot.pose()
        self.command = next(self.commands, Command(position, quaternion, OPEN, "done", False))
        self.phase = self.command.phase
        move = common.relative_action(position, quaternion, self.command.position, self.command.quaternion)
        return np.append(move, np.float32(self.command.gripper))


class ChunkPolicy:
    """A policy of finetune.py: predicts a chunk of actions, executes some of them, predicts anew.

    execute: how many; 0 for `policy.execute`. Raises InputError where a chunk has not as many."""

    def __init__(self, policy: Any, name: str, execute: int = 0):
        if not 0 <= execute <= policy.chunk:
            raise InputError(f"--execute {execute}: {name} predicts {policy.chunk} actions at once, execute 1 to that")
        self.policy, self.name, self.execute, self.phase = policy, name, execute or policy.execute, ""

    def reset(self, robot: Robot) -> None:
        self.queue: deque[np.ndarray] = deque()

    def act(self, observation: Observation, instruction: str) -> np.ndarray:
        """The action (7,) of this tick. Raises InputError for a camera that this robot does not have."""
        if not self.queue:
            absent = [c for c in self.policy.cameras if c not in observation.images]
            if absent:
                raise InputError(f"{self.name} wants cameras {absent}; the robot has {list(observation.images)}")
            images = {camera: observation.images[camera][None] for camera in self.policy.cameras}
            state = common.scatter(observation.state, ARM_STATE, common.STATE_NAMES)[None].astype(np.float32)
            chunk = self.policy.act(images, state, [instruction])[0]  # (H, 44)
            actions = common.gather(chunk, ARM_ACTION, common.ACTION_NAMES)
            actions[:, 6] = actions[:, 6] > 0.5
            self.queue.extend(actions[: self.execute])
        return self.queue.popleft()


def make_policy(path: str, execute: int = 0) -> ExpertPolicy | ChunkPolicy:
    """`expert`, a folder written by finetune.py, or "": the policy in runs/, else the one that comes with the project,
    else the expert. execute: see `ChunkPolicy`; the expert has no chunks.

    Raises InputError for a folder without a policy, and for one trained at another rate or for another robot."""
    if path == "expert":
        return ExpertPolicy()
    if not path:
        runs = [Path("runs") / preset / "finetune" for preset in ("paper", "small")]
        path = next((str(run) for run in runs if common.checkpoints(run)), str(SHIPPED) if SHIPPED.exists() else "")
        if not path:
            print("no fine-tuned policy in runs/: the scripted expert shows the task (it looks into the simulator)")
            return ExpertPolicy()
        print(f"policy: {path}")
    found = common.find_checkpoint(path, "finetune")  # says what is wrong before the models are imported
    import finetune

    policy = finetune.load_policy(path)
    if absent := [n for n in ARM_ACTION if n not in policy.action_names]:  # they would be zeros: a closed gripper
        raise InputError(f"{path} gives no {absent}, and the robot needs them: train on data that have them")
    if more := [n for n in policy.state_names if n not in ARM_STATE]:
        raise InputError(f"{path} reads {more}, which this robot of one arm has not: train on data of such a robot")
    if policy.hz != HZ:
        raise InputError(f"{path} was trained at {policy.hz} Hz, the robot runs at {HZ}: train with --hz {HZ}")
    # The checkpoint and its time are part of the name: results of a policy trained anew never mix with the old one's.
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(common.load_meta(found)["time"]))
    return ChunkPolicy(policy, f"{path} {found.name} of {made}", execute)


def picture_size(policy: ExpertPolicy | ChunkPolicy, asked: int, otherwise: int = Args.record_size) -> int:
    """Pixels that the cameras' square pictures are drawn with: what was `asked`; for 0, as the policy's training
    pictures had; `otherwise` for the expert, which needs none. Prints a warning where a policy gets another size than
    it learned from: drawn and resized they differ by up to a pixel, and what it grasps is off by millimetres."""
    if isinstance(policy, ExpertPolicy):
        return asked or otherwise
    learned = {tuple(size) for sizes in policy.policy.pictures.values() for size in sizes}
    size = asked or max(max(learned))
    if learned != {(size, size)}:
        there = ", ".join(f"{h} x {w}" for h, w in sorted(learned))
        print(f"warning: {policy.name} learned from pictures of {there} pixels, and gets {size} x {size}: it will miss "
              f"by millimetres; leave --image-size away, or train on recordings of that size")  # fmt: skip
    return size


# --------------------------------------------------------------------------------------------------------------------
# Trials
# --------------------------------------------------------------------------------------------------------------------


def picture(images: dict[str, np.ndarray], title: str, text: str, size: int = 320) -> np.ndarray:
    """One frame of the video: the cameras side by side, enlarged to `size` pixels, over two lines of text. uint8."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("RGB", (size * len(images), size + 44), (20, 20, 24))
    for i, image in enumerate(images.values()):
        canvas.paste(Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST), (i * size, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    colour = {"success": (120, 230, 130), "failed:": (255, 130, 110)}.get(text.split(" ")[0], (190, 190, 200))
    draw.text((8, size + 2), title, (255, 255, 255), font)
    draw.text((8, size + 22), text, colour, font)
    return np.asarray(canvas)


class Film:
    """Writes frames, uint8 (H, W, 3) with even sides, into an mp4 as they come; it appears when it is complete."""

    def __init__(self, path: Path):
        self.path, self.partial, self.container = path, path.with_name(path.name + ".partial"), None

    def add(self, frame: np.ndarray) -> None:
        import av

        if self.container is None:
            self.container = av.open(str(self.partial), "w", format="mp4")
            self.stream = self.container.add_stream("libx264", rate=HZ, options={"crf": "23", "preset": "veryfast"})
            self.stream.height, self.stream.width, self.stream.pix_fmt = *frame.shape[:2], "yuv420p"
        self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def close(self) -> None:
        if self.container is not None:
            self.container.mux(self.stream.encode())
            self.container.close()
            os.replace(self.partial, self.path)


def run_trial(policy, robot: SimFranka, trial: int, seed: int, seconds: float = 0.0, film=None) -> dict:
    """One trial until success, failure or the time limit. Returns the entry of results.json."""
    observation = robot.reset(trial, seed)
    policy.reset(robot)
    limit, done, reason = seconds or robot.task.limit, None, ""
    while done is None and robot.seconds < limit - 1e-6:
        action = policy.act(observation, robot.instruction)
        if film:
            film(picture(observation.images, robot.instruction, policy.phase or policy.name))
        observation = robot.step(action)
        done, reason = robot.task.check(robot)
    if film:
        last = picture(observation.images, robot.instruction, "success" if done else f"failed: {reason}")
        for _ in range(HZ):
            film(last)
    return {
        "task": robot.task.name, "trial": trial, "seed": seed, "policy": policy.name, "instruction": robot.instruction,
        "success": bool(done), "seconds": round(robot.seconds, 1), "reason": "" if done else reason,
    }  # fmt: skip


def run_trials(
    policy: ExpertPolicy | ChunkPolicy, task: str, trials: int | Sequence[int], seed: int = 0, *, image_size: int = 128,
    look: str = "capsule", variation: bool = False, seconds: float = 0.0,
    film: Callable[[np.ndarray], Any] | None = None, report: Callable[[dict], Any] | None = None,
) -> list[dict]:  # fmt: skip
    """Runs trials of one task (a number of them from 0 on, or a list of trial numbers) with a progress bar.

    image_size: see `picture_size`. film: called with every frame of the video, e.g. `frames.append`. report: called
    with each entry as it is done. An expert without film runs without rendering. Raises InputError for an unknown task
    or negative numbers."""
    if seed % 2:
        print(f"note: seed {seed} is odd, so these placements may be those of demonstrations: this is no evaluation")
    blind = isinstance(policy, ExpertPolicy) and film is None
    robot = SimFranka(task, 0 if blind else image_size, look, variation)
    entries: list[dict] = []
    bar = tqdm(range(trials) if isinstance(trials, int) else trials, desc=task, unit="trial", mininterval=1)
    for trial in bar:
        entries.append(run_trial(policy, robot, trial, seed, seconds, film))
        bar.set_postfix_str(f"{sum(e['success'] for e in entries)}/{len(entries)} successful")
        if report:
            report(entries[-1])
    robot.close()
    return entries


def evaluate(args: Args) -> None:
    """Runs the trials asked for, writes results.json after each and a video at the end, and prints k/n."""
    folder, seed = Path(args.out) / args.task, args.seed or 0
    SimFranka(args.task).close()  # an unknown task or a missing GL library is said before anything is written
    policy = make_policy(args.policy, args.execute)
    size = picture_size(policy, args.image_size, args.record_size)
    settings = {"policy": policy.name, "seed": seed, "limit": args.seconds or TASKS[args.task].limit,
                "image_size": size, "look": args.look, "variation": args.variation,
                "execute": getattr(policy, "execute", 0)}  # fmt: skip
    path, entries = folder / "results.json", []
    if path.exists():
        if not args.resume:
            raise InputError(f"{path} exists: add --resume to run the missing trials, or choose another --out")
        entries = common.read_json(path)
        for there in ({k: e.get(k, v) for k, v in settings.items()} for e in entries):  # earlier commits had fewer
            if there != settings:
                raise InputError(f"{path} holds trials of {there}, not of {settings}: choose another --out")
    wanted = range(args.first_trial, args.first_trial + args.trials)
    missing = [t for t in wanted if t not in {e["trial"] for e in entries}]
    folder.mkdir(parents=True, exist_ok=True)

    def report(entry: dict) -> None:
        entries.append(entry | settings)
        common.write_json(path, sorted(entries, key=lambda e: e["trial"]))

    more = missing and (folder / "video.mp4").exists()
    film = Film(folder / (f"video_from_{missing[0]}.mp4" if more else "video.mp4"))
    run_trials(
        policy, args.task, missing, seed, image_size=size, look=args.look, variation=args.variation,
        seconds=args.seconds, film=film.add, report=report,
    )  # fmt: skip
    film.close()
    here = sorted((e for e in entries if e["trial"] in wanted), key=lambda e: e["trial"])
    for e in here:
        verdict = "success" if e["success"] else f"failed: {e['reason']}"
        print(f"  trial {e['trial']:3d}  {e['seconds']:5.1f} s  {verdict}")
    k = sum(e["success"] for e in here)
    low, high = common.wilson(k, len(here))
    print(f"{args.task}, {policy.name}: {k}/{len(here)} successful (95 % interval {low:.0%} to {high:.0%})")
    print(f"wrote {path}" + (f" and {film.path}" if missing else "; no trial was missing"))


# --------------------------------------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------------------------------------


class Disturbance:
    """Noise injection (as in DART, arXiv 1703.09327): pushes of 2 to 4 ticks, in free space only. What is executed is
    pushed off; what is recorded is what the expert wanted, so the data show the way back.

    strength: a push is up to this times 1 cm along each axis and 0.05 rad around the vertical one, each tick; its
    square times 5 % is the chance that one begins in a tick. tilt: up to this times 0.05 rad around each horizontal
    axis, too (our choice)."""

    def __init__(self, rng: np.random.Generator, strength: float = 1.0, tilt: float = 0.0):
        self.rng, self.strength, self.tilt, self.left, self.now = rng, strength, tilt, 0, np.zeros(6)

    def push(self, free: bool) -> np.ndarray:
        """What is added to this tick's move (6,); to be called once a tick."""
        if self.left == 0 and self.rng.random() < 0.05 * self.strength**2:
            self.left = int(self.rng.integers(2, 5))
            size = self.rng.uniform(-0.01, 0.01, 3), [0, 0, self.rng.uniform(-0.05, 0.05)]
            self.now = self.strength * np.concatenate(size)
            if self.tilt:
                self.now[3:5] = self.tilt * self.rng.uniform(-0.05, 0.05, 2)
        pushed = self.left > 0 and free
        self.left = max(0, self.left - 1)
        return self.now if pushed else np.zeros(6)


def demonstrate(
    robot: SimFranka, trial: int, seed: int, disturb: float = 1.0, tilt: float = 0.0
) -> tuple[dict | None, str]:
    """One demonstration. Returns the arguments of LeRobotWriter.add_episode, or None and the reason of failure. With
    rendering off, `frames` is empty and everything else the same. disturb, tilt: see `Disturbance`."""
    observation, expert, task = robot.reset(trial, seed), ExpertPolicy(), robot.task
    expert.reset(robot)
    entropy = [seed, list(TASKS).index(task.name), trial]
    disturbance = Disturbance(np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(2,))), disturb, tilt)
    frames: dict[str, list] = {camera: [] for camera in observation.images}
    actions, states, phases, done, reason = [], [], [], None, ""
    while done is None and robot.seconds < task.limit - 1e-6:
        action = expert.act(observation, robot.instruction)
        for camera, image in observation.images.items():
            frames[camera].append(image)
        actions.append(action)
        states.append(observation.state)
        phases.append(expert.phase)
        observation = robot.step(action + np.append(disturbance.push(expert.command.free), 0))
        done, reason = task.check(robot)
    if not done:
        return None, reason
    return {
        "frames": {camera: np.stack(images) for camera, images in frames.items()}, "action": np.stack(actions),
        "state": np.stack(states), "task": robot.instruction, "subtasks": phases, "task_name": task.name,
    }, ""  # fmt: skip


_robots: dict[tuple, SimFranka] = {}  # of a worker process: building one takes longer than an episode


def begin_work() -> None:
    """A worker leaves Ctrl-C to the main process, and never outlives it, even if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _work(
    task: str, image_size: int, look: str, variation: bool, trial: int, seed: int, disturb: float, tilt: float
) -> tuple[dict | None, str]:  # fmt: skip
    key = (task, image_size, look, variation)
    if key not in _robots:
        _robots[key] = SimFranka(*key)
    return demonstrate(_robots[key], trial, seed, disturb, tilt)


def record(args: Args) -> dict[str, float]:
    """Records args.record successful demonstrations of each task, round-robin, in the order of the trials' numbers: the
    first n episodes of a task are the same for any larger number and for any number of workers. What else they depend
    on is kept in meta/record.json.

    Returns episodes, frames, seconds, and the rate (episodes/s) from the first finished episode on."""
    seed = 1 if args.seed is None else args.seed
    if seed % 2 == 0:
        raise InputError(f"--seed {seed} with --record: even seeds belong to the evaluation, give an odd one")
    pixels = args.image_size or args.record_size
    SimFranka("pick_cup", pixels).close()  # a missing GL library is said here, not by a worker
    tasks = list(TASKS) if args.task == "all" else [args.task]
    cameras = {name: (pixels, pixels) for name in ("primary", "wrist")}
    writer = LeRobotWriter(args.out, fps=HZ, cameras=cameras, resume=args.resume)
    skip, total = writer.num_episodes, args.record * len(tasks)
    path = Path(args.out) / "meta/record.json"
    settings = {"experts": EXPERTS, "instructions": {task: INSTRUCTIONS[task] for task in tasks}, "seed": seed,
                "disturb": args.disturb, "tilt": args.tilt, "look": args.look, "variation": args.variation}  # fmt: skip
    if not skip:
        path.parent.mkdir(parents=True, exist_ok=True)
        common.write_json(path, settings)
    elif path.exists() and (there := {"tilt": 0.0} | common.read_json(path)) != settings:  # tilt came later
        raise InputError(f"{args.out} was recorded with {there}, not {settings}: choose another --out")
    else:
        print(f"{args.out} holds {skip} episodes: simulating those again without rendering, then going on")
    failures: dict[str, list[str]] = {task: [] for task in tasks}
    ahead = max(2, 3 * args.workers // len(tasks))  # trials of a task under way at a time
    # Spawned, not forked: a GL context does not survive a fork.
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), begin_work)

    def episodes(task: str) -> Iterator[dict]:
        queue: deque = deque()
        trial = made = 0
        while True:
            while len(queue) < min(ahead, args.record - made):
                on_disk = (made + len(queue)) * len(tasks) + tasks.index(task) < skip
                size = 0 if on_disk else pixels
                how = trial, seed, args.disturb, args.tilt
                queue.append(pool.submit(_work, task, size, args.look, args.variation, *how))
                trial += 1
            episode, reason = queue.popleft().result()
            if episode is None:
                failures[task].append(reason)
            else:
                made += 1
                yield episode

    start, first, frames = time.perf_counter(), 0.0, 0
    try:
        with writer, tqdm(total=total, desc="record", unit="episode", mininterval=1) as bar:
            sources = [episodes(task) for task in tasks]
            for i in range(total):
                episode = next(sources[i % len(tasks)])
                n = len(episode["action"])
                first = first or time.perf_counter()
                if i >= skip:
                    writer.add_episode(**episode)
                elif (writer.episodes[i]["tasks"], writer.episodes[i]["length"]) != ([episode["task"]], n):
                    other = "another --task, --seed, --disturb or --tilt"
                    raise InputError(f"{args.out} was recorded with {other}: choose another --out")
                frames += n
                bar.update()
    except BrokenProcessPool:
        raise InputError(
            f"a worker process died (out of memory?): run again with --workers 1 --resume --out {args.out}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    end = time.perf_counter()
    for task, reasons in failures.items():
        why = f" ({'; '.join(sorted(set(reasons)))})" if reasons else ""
        print(f"{task}: {args.record} demonstrations, {len(reasons)} more failed and were left out{why}")
    print(f"wrote {args.out}: {max(total, skip)} episodes, {frames} frames, {end - start:.1f} s")
    rate = (total - 1) / (end - first) if total > 1 else 0.0
    return {"episodes": total, "frames": frames, "seconds": end - start, "rate": rate}


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    common.at_least(args, execute=0, trials=1, first_trial=0, seed=0, seconds=0, record=0, disturb=0, tilt=0, workers=1,
                    record_size=16, image_size=16 * bool(args.image_size))  # fmt: skip
    if args.task not in TASKS and not (args.task == "all" and args.record):
        raise InputError(f"unknown task {args.task!r}: choose one of {', '.join(TASKS)}, or with --record also all")
    if not args.record:
        evaluate(args)
    elif args.out in (Args.out, TINY.out, SMALL.out):
        record(dataclasses.replace(args, out=f"{args.out}/demos"))
    else:
        record(args)


if __name__ == "__main__":
    common.run_main(main)
