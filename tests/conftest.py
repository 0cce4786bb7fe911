"""Shared by all tests: where the recordings are, and small data sets made by our own writer."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the internet
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402

import common  # noqa: E402
from data.lerobot import LeRobotWriter  # noqa: E402

RECORDINGS = ROOT.parent / "shared/recordings"


def recording(name: str) -> Path:
    path = RECORDINGS / name
    if not path.exists():
        pytest.skip(f"the recording {path} is not on this machine")
    return path


@pytest.fixture(scope="session")
def bridge() -> Path:
    """Real WidowX episodes, RLDS."""
    return recording("bridge_rlds/1.0.0")


@pytest.fixture(scope="session")
def sim_pick_place() -> str:
    """A simulated Franka, LeRobot v2.1, as a source with its mapping."""
    return f"{recording('sim_pick_place_lerobot_v21')}@sim_pick_place"


@pytest.fixture(scope="session")
def process() -> common.Process:
    return common.Process(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def kernels():
    """Every test begins with fused attention, whatever a test in bfloat16, or a fixture, has switched off."""
    torch.backends.cuda.enable_flash_sdp(True)
    yield
    torch.backends.cuda.enable_flash_sdp(True)


class Alone(common.Process):
    """One rank of several, of which the others are not there."""

    def gather(self, values: list) -> list:
        return values


def make_episode(seed: int, n: int = 24, size: int = 32) -> dict:
    """A random walk whose commands overshoot the next measured pose, as those of a lagging controller do. Its pictures
    are smooth and each shows its own frame number as brightness."""
    rng = np.random.default_rng(seed)
    position = np.cumsum(rng.normal(size=(n, 3)) * 0.01, 0) + [0.4, 0, 0.3]
    turn = Rotation.from_rotvec(np.cumsum(rng.normal(size=(n, 3)) * 0.05, 0)) * Rotation.from_euler("x", np.pi)
    quaternion = common.canonical(turn.as_quat())
    target = position + rng.normal(size=(n, 3)) * 0.01
    goal = Rotation.from_rotvec(rng.normal(size=(n, 3)) * 0.05) * turn
    motion = common.relative_action(position, quaternion, target, goal.as_quat())
    action = np.concatenate([motion, rng.integers(0, 2, (n, 1))], 1).astype(np.float32)
    state = np.concatenate([position, quaternion, rng.uniform(size=(n, 1))], 1).astype(np.float32)
    ramp = np.linspace(0, 120, size)
    frames = {}
    for camera, offset in (("primary", 0), ("wrist", 60)):
        image = np.stack([ramp[None].repeat(size, 0), ramp[:, None].repeat(size, 1), np.zeros((size, size))], -1)
        frames[camera] = (image + offset + 3 * np.arange(n)[:, None, None, None]).clip(0, 255).astype(np.uint8)
    texts = ["reach for the cup"] * (n // 2) + ["lift the cup"] * (n - n // 2)
    task = ["pick up the red cup", "close the oven"][seed % 2]
    return {"frames": frames, "action": action, "state": state, "task": task, "subtasks": texts}


def write_set(root: Path, episodes: list[dict], fps: float = 10, per_file: int = 4, **options) -> Path:
    cameras = {name: clip.shape[1:3] for name, clip in episodes[0]["frames"].items()}
    with LeRobotWriter(root, fps=fps, cameras=cameras, episodes_per_file=per_file, **options) as writer:
        for episode in episodes:
            writer.add_episode(**episode)
    return root


@pytest.fixture(scope="session")
def episodes() -> list[dict]:
    return [make_episode(seed, n=18 + seed) for seed in range(10)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, episodes) -> Path:
    """Ten episodes of 18 to 27 steps at 10 Hz, two cameras of 32 px, in three files. Do not change it: copy it."""
    return write_set(tmp_path_factory.mktemp("data") / "set", episodes)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A data set, and one finished run of each stage, each started from the one before: 8 steps, saved at 4 and 8."""
    from helpers_lam import STAGES, forked, make_data, run, stage_command

    root = tmp_path_factory.mktemp("world")
    make_data(root / "data")
    run(*stage_command("lam", root, root / "lam"))
    for stage in STAGES[1:]:  # forked, to save the seconds of importing torch
        forked(*stage_command(stage, root, root / stage))
    return root
