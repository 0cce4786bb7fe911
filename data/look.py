"""What anyone does first with new data: looks at it.

    python -m data.look data/tiny                            a picture of the first episode, and tables on the terminal
    python -m data.look data/tiny --episode 7
    python -m data.look PATH@MAPPING                         a LeRobot data set of others, through a mapping

Reads a LeRobot data set; no statistics are needed. RLDS, hdf5 and other sources are converted first; a few episodes do
(`python -m data.rlds SOURCE --limit 10 --out runs/look/x`).

Writes one PNG (--out) of an episode: frames of all cameras, the instruction, the subtasks as coloured spans, and every
column of state and action over time, by its name and in its unit. Prints how much there is, the instructions, how far
the commands agree with the motion that followed them, and the statistics of each column. A wrong sign of the gripper, a
rotation in another frame or a wrong order of a quaternion are seen here, and nowhere later.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from common import ACTION_NAMES, STATE_NAMES, InputError, relative_action, run_main
from data.lerobot import LeRobotReader
from data.stats import sound, statistics

FRAMES = 8  # pictures of each camera
COLOURS = ("tab:red", "tab:green", "tab:blue", "tab:orange", "tab:purple")


@dataclass
class Args:
    source: Annotated[str, tyro.conf.Positional]
    """LeRobot data set, PATH or PATH@MAPPING"""
    episode: int | None = None
    """the episode to draw, from 0; none: the first that can be read"""
    out: str = ""
    """the PNG; none: runs/look/<data set>_<episode>.png"""
    sample: int = 100
    """make the tables from this many episodes, evenly spread; 0: all (our choice)"""


# --------------------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------------------


def panels(action_names: Sequence[str], state_names: Sequence[str]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """What belongs into one plot: (title, unit, [(kind, name)]), kind being "state" or "action"."""
    out = []
    for side in ("left", "right"):
        for title, unit, kind, axes in (
            ("position", "m", "state", ("x", "y", "z")),
            ("orientation", "quaternion", "state", ("qx", "qy", "qz", "qw")),
            ("gripper", "0 closed, 1 open", "both", ("gripper",)),
            ("move", "m a step", "action", ("x", "y", "z")),
            ("turn", "rad a step", "action", ("roll", "pitch", "yaw")),
        ):
            names = [f"{side}_{axis}" for axis in axes]
            lines = [("state", n) for n in names if n in state_names and kind != "action"]
            lines += [("action", n) for n in names if n in action_names and kind != "state"]
            out.append((f"{side} {title}", unit, lines))
        for kind, unit, names in (("state", "m", state_names), ("action", "m a step", action_names)):
            lines = [(kind, n) for n in names if n.startswith(side) and n.count("_") == 2]
            out.append((f"{side} fingertips{' move' if kind == 'action' else ''}", unit, lines))
    return [panel for panel in out if panel[2]]


def strip(reader: LeRobotReader, i: int, camera: str, height: int = 240) -> np.ndarray | str:
    """FRAMES pictures side by side (height, W, 3), each from the middle of its share of the episode; or why not."""
    n = int(reader.lengths[i])
    try:
        images = reader.frames(i, camera, [min(n - 1, int((k + 0.5) * n / FRAMES)) for k in range(FRAMES)])
    except InputError as error:
        return str(error)
    size = round(height * images.shape[2] / images.shape[1]), height
    gap = np.full((height, 4, 3), 255, np.uint8)
    scaled = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images]
    return np.concatenate([part for image in scaled for part in (gap, image, gap)], 1)


def spans(texts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of the same text: (text, first frame, frame after the last)."""
    starts = [0, *(t for t in range(1, len(texts)) if texts[t] != texts[t - 1]), len(texts)]
    return [(texts[a], a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]


def draw(reader: LeRobotReader, i: int, path: Path) -> list[str]:
    """Draws episode i into a PNG. Returns what was wrong with its pictures."""
    episode, n = reader.episode(i), int(reader.lengths[i])
    seconds = n / reader.fps
    strips = {camera: strip(reader, i, camera) for camera in reader.cameras}
    wrong = [text for text in strips.values() if isinstance(text, str)]
    wide = 13.0  # inches of the time axis
    high = [0.35 if isinstance(s, str) else wide * s.shape[0] / s.shape[1] for s in strips.values()]
    plots = panels(reader.action_names, reader.state_names)
    heights = [*high, 0.5, *[1.25] * len(plots)]
    total = sum(heights) + 1.0 + 0.12 * len(heights)
    figure = Figure((wide + 3.2, total), dpi=100)
    grid = figure.add_gridspec(
        len(heights), 1, height_ratios=heights, left=0.9 / (wide + 3.2), right=1 - 2.3 / (wide + 3.2),
        top=1 - 0.6 / total, bottom=0.4 / total, hspace=0.12 / np.mean(heights),
    )  # fmt: skip
    title = f"{reader.source}, episode {i} of {reader.num_episodes}: {n} steps, {seconds:.1f} s at {reader.fps:g} Hz"
    figure.suptitle(f"{title}\n“{episode['task']}”", fontsize=12, y=1 - 0.08 / total, va="top")
    axes = [figure.add_subplot(grid[k]) for k in range(len(heights))]
    for ax, (camera, picture) in zip(axes, strips.items(), strict=False):
        ax.set_yticks([])
        ax.set_ylabel(camera, fontsize=9)
        if isinstance(picture, str):
            ax.text(0.5, 0.5, textwrap.shorten(picture, 190), transform=ax.transAxes, ha="center", va="center", size=8)
        else:
            ax.imshow(picture, aspect="auto", extent=(0, seconds, 0, 1))
    runs = spans(episode["subtask"])
    hues = {text: f"C{k}" for k, text in enumerate(dict.fromkeys(text for text, _, _ in runs))}
    band, curves = axes[len(strips)], axes[len(strips) + 1 :]
    band.set_yticks([])
    band.set_ylabel("subtask", fontsize=9)
    for text, a, b in runs:
        a, b = a / reader.fps, b / reader.fps
        band.axvspan(a, b, color=hues[text], alpha=0.5, lw=0)
        letters = max(7, int((b - a) / seconds * wide * 13))
        label = "\n".join(textwrap.wrap(text, letters, break_long_words=False)[:3])
        band.text((a + b) / 2, 0.5, label, ha="center", va="center", size=7, transform=band.get_xaxis_transform())
        for ax in curves if len(runs) > 1 else ():
            ax.axvspan(a, b, color=hues[text], alpha=0.08, lw=0)
    for ax, (name, unit, lines) in zip(curves, plots, strict=True):
        plot(ax, name, unit, lines, episode, reader.fps)
    for ax in axes:
        ax.set_xlim(0, seconds)
        ax.tick_params(labelsize=8, labelbottom=ax is axes[-1])
    axes[-1].set_xlabel("seconds", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return wrong


def plot(ax: Axes, name: str, unit: str, lines: list[tuple[str, str]], episode: dict, fps: float) -> None:
    """One panel: states as lines, actions as steps, for they hold until the next one."""
    time = np.arange(len(episode["state"]) + 1) / fps
    ax.set_ylabel(f"{name}\n[{unit}]", fontsize=8)
    ax.grid(alpha=0.3)
    both = len({kind for kind, _ in lines}) > 1
    for k, (kind, column) in enumerate(lines):
        values = episode[kind][:, (STATE_NAMES if kind == "state" else ACTION_NAMES).index(column)]
        style = {"color": COLOURS[k // 3 if "fingertips" in name else k % 5], "lw": 1.2}
        if kind == "action":
            held = np.append(values[: episode["steps"]], values[episode["steps"] - 1])
            ax.step(time[: len(held)], held, where="post", label=f"{column}{' (action)' if both else ''}", **style)
        else:
            ax.plot(time[:-1], values, label=f"{column}{' (state)' if both else ''}", **style)
    if unit.startswith("0"):
        ax.set_ylim(-0.05, 1.05)
    shown = ax.get_legend_handles_labels()
    if "fingertips" in name:  # a colour a finger: x, y and z look alike here
        shown = [list(h)[::3] for h in shown]
        shown[1] = [label.rpartition("_")[0] for label in shown[1]]
    ax.legend(*shown, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


# --------------------------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------------------------


def overview(reader: LeRobotReader, i: int) -> str:
    """How much there is, of what (cameras as in episode i), and said in which words."""
    frames, lengths = int(reader.lengths.sum()), reader.lengths
    lines = [
        f"{reader.source}: LeRobot {reader.info['codebase_version']}, robot {reader.info.get('robot_type', '?')}",
        f"  {reader.num_episodes} episodes of {lengths.min()} to {lengths.max()} steps, median {np.median(lengths):g}; "
        f"{frames} frames, {frames / reader.fps / 3600:.3g} hours at {reader.fps:g} Hz",
    ]
    for camera in reader.cameras:
        path, _ = reader.video_path(i, camera)
        try:
            with av.open(str(path)) as video:
                stream = video.streams.video[0]
                what = f"{stream.width} x {stream.height}, {stream.codec.canonical_name}"
        except (av.error.FFmpegError, OSError, IndexError):
            what = f"no readable video for episode {i}"
        lines.append(f"  camera {camera}: {what}")
    texts = Counter(text for row in reader.episodes for text in row.get("tasks") or [])
    lines.append(f"  {len(texts)} instructions, {len(reader.subtasks)} subtasks")
    lines += [f"    {count:6d} x {textwrap.shorten(text, 100)}" for text, count in texts.most_common(5)]
    return "\n".join(lines)


def agreement(reader: LeRobotReader, chosen: Sequence[int]) -> str:
    """How the commands of each arm go with the motion of the next 0.2 s: the correlation of each of six numbers, and
    the measured gripper where commanded open and closed. Near 1 is right; near 0 a wrong axis or frame, or an arm that
    yields; below 0 a wrong sign."""
    lines, h = [], max(1, round(0.2 * reader.fps))
    for side, a, s in (("left", 0, 0), ("right", 7, 8)):
        moves = [n for n in ACTION_NAMES[a : a + 6] if n in reader.action_names]
        poses = all(n in reader.state_names for n in STATE_NAMES[s : s + 7])
        asked, done, jumps, grips = [], [], [], []
        for i in chosen:
            episode = reader.episode(i)
            state, action = episode["state"].astype(float), episode["action"].astype(float)
            p, q = state[:, s : s + 3], state[:, s + 3 : s + 7]
            grips.append(np.stack([action[:-h, a + 6], state[h:, s + 7]], 1))
            if moves and poses and len(p) > h:
                asked.append(action[:-h, a : a + 6])
                done.append(relative_action(p[:-h], q[:-h], p[h:], q[h:]))
                jumps.append(np.linalg.norm(np.diff(q, axis=0), axis=1) > 1)
        if done:
            x, y = np.concatenate(asked), np.concatenate(done)
            pairs = [(n.split("_")[1], x[:, k], y[:, k]) for k, n in enumerate(ACTION_NAMES[a : a + 6]) if n in moves]
            r = {n: np.corrcoef(u, v)[0, 1] if u.std() > 1e-6 and v.std() > 1e-6 else np.nan for n, u, v in pairs}
            text = ", ".join(f"{n} {c:.2f}" if np.isfinite(c) else f"{n} constant" for n, c in r.items())
            mark = "  <- look at this" if any(c < 0.2 for c in r.values()) else ""
            lines.append(f"  {side} arm: correlation of command and the motion of the next {h} steps: {text}{mark}")
            if share := np.mean(np.concatenate(jumps)):
                lines.append(f"  {side} arm: the quaternion changes its sign in {share:.1%} of the steps: half a "
                             f"turn from common.POSTURE")  # fmt: skip
        if {f"{side}_gripper"} <= {*reader.action_names} & {*reader.state_names}:
            command, measured = np.concatenate(grips).T
            means = [f"{measured[w].mean():.2f}" if w.any() else "never" for w in (command > 0.5, command <= 0.5)]
            lines.append(f"  {side} gripper: measured {means[0]} when commanded open, {means[1]} when commanded closed")
    if lines and not (reader.mapping.get("action") or reader.mapping.get("target")):
        lines.append("  (the actions are the change of the state: they agree by construction)")
    return "\n".join(lines)


def table(stats: dict[str, dict], reader: LeRobotReader) -> str:
    """Statistics, a row a column."""
    keys = ("min", "q01", "mean", "std", "q99", "max")
    lines = [f"{'':26s} {'unit':>8s}" + "".join(f"{k:>10s}" for k in keys)]
    units = {"gripper": "1 = open", "roll": "rad", "pitch": "rad", "yaw": "rad", "x": "m", "y": "m", "z": "m"}
    for key, names in (("observation.state", reader.state_names), ("action", reader.action_names)):
        for k, name in enumerate(names if key in stats else ()):  # episodes of one frame may have no action
            row = f"{key.split('.')[-1]} {name}", units.get(name.split("_")[-1], "")  # a quaternion has no unit
            lines.append("{:26s} {:>8s}".format(*row) + "".join(f"{stats[key][v][k]:10.4f}" for v in keys))
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args, prog="python -m data.look", description=__doc__)
    reader = LeRobotReader(args.source)
    if not 0 <= (args.episode or 0) < reader.num_episodes:
        raise InputError(f"--episode {args.episode}: {args.source} has episodes 0 to {reader.num_episodes - 1}")
    if args.sample < 0:
        raise InputError(f"--sample {args.sample}: give 1 or more, or 0 for all")
    damaged: dict[int, str] = {}
    drawn = next(sound(reader, range(reader.num_episodes), damaged))[0] if args.episode is None else args.episode
    path = Path(args.out or f"runs/look/{reader.root.resolve().name}_{drawn:06d}.png")
    if path.suffix != ".png" or path.is_dir():
        raise InputError(f"--out {path}: give a file that ends in .png")
    print(overview(reader, drawn))
    wrong = draw(reader, drawn, path)
    several = min(args.sample or reader.num_episodes, reader.num_episodes)
    chosen = sorted({int(i) for i in np.linspace(0, reader.num_episodes - 1, several)})
    if reader.action_names or reader.state_names:
        stats = statistics(reader, episodes=chosen, damaged=damaged)
        chosen = [i for i in chosen if i not in damaged]
        print(agreement(reader, chosen))
        print(f"\nstatistics of {len(chosen)} of {reader.num_episodes} episodes\n{table(stats, reader)}")
        if not reader.stats:
            print(f"\nno statistics are stored yet; before training: python -m data.stats {args.source}")
    else:
        print("  video alone: no states, no actions")
    for text in [*damaged.values(), *wrong]:
        print(f"note: {text}")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main, resumes=False)
