"""How fast the simulated Franka records: episodes, frames and camera pairs a second.

    python benchmarks/record.py                 # five tasks, 40 episodes each, 64 px, 2 workers, about a minute
    python benchmarks/record.py --episodes 10   # a quick look

"with start" counts the start of the worker processes; "steady" counts from the first finished episode on.
Everything goes to a temporary folder.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import franka


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(franka.TASKS)
    """Tasks to record (our choice)."""
    episodes: int = 40
    """Episodes of each task (our choice)."""
    image_size: int = 64
    """Height and width of both pictures, in pixels (our choice)."""
    workers: int = 2
    """Processes that simulate and render (our choice)."""


def renders(size: int, look: str, seconds: float = 2.0) -> float:
    """Camera pairs a second of one process, at one moment of pick_cup."""
    robot = franka.SimFranka("pick_cup", size, look)
    robot.reset(0)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        robot.observe()
        count += 1
    rate = count / (time.perf_counter() - start)
    robot.close()
    return rate


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    print(f"{args.episodes} episodes a task, {args.image_size} px, {args.workers} workers, capsules, no shadows")
    print(f"{'task':12s} {'episodes/s':>10s} {'with start':>10s} {'frames/s':>9s} {'pairs/s':>8s} {'frames/ep':>9s}")
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            asked = franka.Args(
                task=task, record=args.episodes, image_size=args.image_size, workers=args.workers, out=f"{folder}/demos"
            )
            r = franka.record(asked)
        frames = r["frames"] / r["episodes"]
        print(
            f"{task:12s} {r['rate']:10.1f} {r['episodes'] / r['seconds']:10.1f} {r['rate'] * frames:9.0f} "
            f"{r['rate'] * frames:8.0f} {frames:9.1f}"
        )
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: more load than workers makes it slower")
    print("\nrendering alone, one process: camera pairs a second")
    for look in ("capsule", "mesh"):
        for size in (64, 128, 256):
            print(f"{look:8s} {size:4d} px {renders(size, look):8.0f}")


if __name__ == "__main__":
    common.run_main(main)
