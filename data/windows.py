"""Training samples: windows of LeRobot data sets, drawn by number, and the stream of batches that a stage learns from.

    LeRobotReader --Windows--> sample --collate--> batch (B, ...) --stream--> the training steps of this rank

Every sample is a function of (seed, number): see `Windows`. Damaged episodes are drawn around, counted and reported.
"""

import json
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from common import ACTION_NAMES, InputError, Process, load_meta, noise, seen_from, strided_actions
from data.lerobot import DamagedEpisode, LeRobotReader
from data.quantiles import stride_for

BEGINNING = 4  # frames of an episode that count as its beginning (our choice)


@dataclass(frozen=True)
class View:
    """What a stage wants to see: `frames` consecutive frames of a camera, starting now, at `size` pixels square. A data
    set without this camera is an error, or gives black frames if it is `optional`."""

    camera: str
    frames: int
    size: int
    optional: bool = False


class Windows(torch.utils.data.Dataset):
    """Training samples of one or several data sets, addressed by their number in an endless stream.

        episode   . . . t . . . . . . . . . . .      a window starts at any t but the last
        frames          V_t  V_t+s  V_t+2s ...       s = fps / hz, at least 1
        actions         A_t  A_t+s ...               each the composition of s actions
        past the end    the last frame repeats, action_mask = False

    Sample i is a function of (seed, i): the data set by weight (see `choose`), then one of its frames, uniformly but
    for `starts`. So the stream does not depend on ranks or workers, and continues anywhere. An episode of one frame, in
    which nothing can happen, is left out; a damaged one is drawn around (see `draw`). A sample holds
        <view>        uint8 (frames, 3, size, size) for each view;  <view>_seen  bool, for optional ones
        action        float32 (actions, 44), normalised; grippers 0 .. 1
        action_mask   bool (actions, 44)
        state         float32 (46,), normalised;  state_mask  bool (46,)
        instruction, subtask   str (the phase at t);   index, dataset, window   int
        damaged       str: what was passed over to find this window, a line each

    split: "train", "val" (one episode in `val_every`) or "all". `episodes` > 0 takes only the first so many of each
    task (see LeRobotReader.task_names), so that fewer are a part of more. starts: the share of the windows that begin
    within the first BEGINNING frames of an episode, all episodes alike, instead of at one of all frames: where little
    has moved yet, and what will happen is known from what is seen and said."""

    def __init__(
        self, sources: Sequence[str | Path], views: dict[str, View], actions: int, hz: float, seed: int,
        weights: Sequence[float] = (), split: str = "all", val_every: int = 10, episodes: int = 0,
        preload: bool = False, starts: float = 0.0,
    ):  # fmt: skip
        if not sources:
            raise InputError("no data: give at least one data set with --data PATH")
        if weights and (len(weights) != len(sources) or min(weights) < 0 or sum(weights) <= 0):
            raise InputError(f"--weights {list(weights)} for {len(sources)} --data sets: give each one, not all zero")
        if not 0 <= starts <= 1:
            raise InputError(f"--starts {starts:g} is a share of the windows: give 0 to 1")
        self.readers = [LeRobotReader(s) for s in sources]
        self.views, self.actions, self.seed, self.starts = views, actions, seed, starts
        self.strides = [stride_for(r.fps, hz) for r in self.readers]
        norms = [r.normalizers(s) for r, s in zip(self.readers, self.strides, strict=True)]
        self.action_norms, self.state_norms = [n[0] for n in norms], [n[1] for n in norms]
        self.chosen, self.ends = [], []
        cameras = {camera for reader in self.readers for camera in reader.cameras}
        if nowhere := {v.camera for v in views.values() if v.optional} - cameras:
            raise InputError(f"no data set has a camera {sorted(nowhere)}, they have {sorted(cameras)}")
        for reader in self.readers:
            for camera in sorted({v.camera for v in views.values() if not v.optional} - set(reader.cameras)):
                raise InputError(f"{reader.source} has no camera {camera!r}, it has {list(reader.cameras)}")
            ids = np.arange(reader.num_episodes)
            if episodes:
                names = np.array(reader.task_names)
                of_each = {name: np.flatnonzero(names == name) for name in np.unique(names).tolist()}
                name, fewest = min(of_each.items(), key=lambda item: len(item[1]))
                if episodes > len(fewest):
                    raise InputError(f"{reader.source} has {len(fewest)} episodes of {name!r}, fewer than {episodes}: "
                                     f"lower --episodes, or record more")  # fmt: skip
                ids = np.sort(np.concatenate([numbers[:episodes] for numbers in of_each.values()]))
            held_out = np.isin(ids, _held_out(reader.num_episodes, val_every))
            ids = {"train": ids[~held_out], "val": ids[held_out], "all": ids}[split]
            ids = ids[reader.lengths[ids] > 1]
            if not len(ids):
                raise InputError(
                    f"{reader.source}: {reader.num_episodes} episodes, {(reader.lengths < 2).sum()} of them of one "
                    f"frame, leave none for the {split} split (one in {val_every} is held out): give more episodes or "
                    f"--val-every 0"
                )
            frames, stride = max((v.frames for v in views.values()), default=1), self.strides[len(self.chosen)]
            if reader.lengths[ids].max() <= (frames - 1) * stride:
                raise InputError(
                    f"{reader.source}: the longest episode has {reader.lengths[ids].max()} frames, a window of "
                    f"{frames} frames in strides of {stride} needs {(frames - 1) * stride + 1}: lower --frames or "
                    f"raise --hz"
                )
            self.chosen.append(ids)
            self.ends.append(np.cumsum(reader.lengths[ids] - 1))
        self.weights = np.array(weights or [e[-1] for e in self.ends], np.float64)  # default: every frame counts alike
        self.weights /= self.weights.sum()
        self.reported: set[str] = set()  # damage that a message has named
        self.bounds = np.cumsum(self.weights)[:-1]  # of each data set's share of [0, 1)
        self.phase = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        self._episodes: OrderedDict[tuple[int, int], dict] = OrderedDict()
        if preload:
            for reader, ids in zip(self.readers, self.chosen, strict=True):
                for camera, size in sorted({(v.camera, v.size) for v in views.values() if v.camera in reader.cameras}):
                    reader.preload(camera, size, ids.tolist())

    def __len__(self) -> int:
        """Windows in one pass; the stream itself is endless."""
        return int(sum(e[-1] for e in self.ends))

    def statistics(self) -> dict[str, dict]:
        """The statistics in use, by data set: they go into the checkpoint's metadata."""
        return {r.source: r.stats for r in self.readers}

    def summary(self) -> str:
        short = [int((r.lengths < 2).sum()) for r in self.readers]
        # A window from t on runs past the end of n frames where t + stride * actions > n - 1.
        past = [
            np.minimum(r.lengths[ids] - 1, s * self.actions - 1).sum() / e[-1]
            for r, ids, e, s in zip(self.readers, self.chosen, self.ends, self.strides, strict=True)
        ]
        rows = [
            f"  {r.source}: {len(ids)} episodes, {r.lengths[ids].sum() / r.fps / 3600:.3g} hours, {e[-1]} windows, "
            f"{100 * p:.0f} % of them past an episode's end, {r.fps:g} Hz, stride {s}, weight {w:.3f}"
            + ("" if r.action_names else ", video without actions")
            + (f"; {n} of one frame left out" if n else "")
            for r, ids, e, s, w, n, p in zip(
                self.readers, self.chosen, self.ends, self.strides, self.weights, short, past, strict=True
            )
        ]
        return "\n".join(["data:", *rows])

    def longest_instruction(self) -> str:
        """The instruction with the most letters, to see at the start whether a model's context has room for it."""
        return max((task for reader in self.readers for task in reader.tasks.values()), key=len, default="")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(index)

    def draw(self, index: int, pictures: bool = True) -> dict[str, Any]:
        """Sample `index` of the stream, on request without its pictures. Where it falls on a damaged episode, another
        window of the same data set is drawn, as (seed, index, attempt) decides. InputError after 100 attempts."""
        d, damaged = self.choose(index), []
        while len(damaged) < 100:
            rng = np.random.default_rng([self.seed, index, len(damaged)])
            try:
                sample = self.window(d, self.pick(d, rng), pictures)
                return sample | {"index": index, "damaged": "\n".join(damaged)}
            except DamagedEpisode as error:
                damaged.append(" ".join(str(error).split()))
        raise InputError(f"100 draws in a row fell on damaged episodes, the last: {damaged[-1]}")

    def pick(self, d: int, rng: np.random.Generator) -> int:
        """The number of a window of data set d, at random."""
        ends = self.ends[d]
        if not self.starts or rng.random() >= self.starts:
            return int(rng.integers(ends[-1]))
        episode = rng.integers(len(ends))
        first = ends[episode - 1] if episode else 0
        return int(first + rng.integers(min(BEGINNING, ends[episode] - first)))

    def choose(self, index: int) -> int:
        """The data set of sample `index`: steps of the golden ratio through [0, 1), from a place that the seed gives.
        Any run of n samples holds each data set weight * n times to within two or three, where independent draws would
        be off by sqrt(n). As integers modulo 2^64, so that it is exact for any index."""
        at = (index * 0x9E3779B97F4A7C15 + self.phase) % 2**64 / 2**64
        return int(np.searchsorted(self.bounds, at, side="right"))

    def window(self, d: int, k: int, pictures: bool = True) -> dict[str, Any]:
        """The k-th window of data set d, on request without its pictures, which are the slow part. Raises
        DamagedEpisode."""
        reader, stride = self.readers[d], self.strides[d]
        at = int(np.searchsorted(self.ends[d], k, side="right"))
        i, t = int(self.chosen[d][at]), int(k - (self.ends[d][at - 1] if at else 0))
        if (d, i) not in self._episodes:
            self._episodes[d, i] = reader.episode(i)
            while len(self._episodes) > 1000:
                self._episodes.popitem(last=False)
        ep, n = self._episodes[d, i], int(reader.lengths[i])
        action = np.zeros((self.actions, len(ACTION_NAMES)), np.float32)
        starts = t + stride * np.arange(self.actions)
        inside = starts + stride <= ep["steps"]
        action[inside] = strided_actions(ep, starts[inside], stride)
        state = ep["state"][t]
        if ep["camera"] is not None:  # the frame of all actions of a window is that of its first frame's camera
            once = lambda row: np.repeat(row[None], self.actions, 0)
            action, states = seen_from(once(ep["camera"][t]), action, once(state))
            state = states[0]
        mask = torch.from_numpy(inside[:, None] & ep["action_mask"])
        state, state_mask = torch.from_numpy(state), torch.from_numpy(ep["state_mask"])
        sample: dict[str, Any] = {
            "action": torch.where(mask, self.action_norms[d].normalize(torch.from_numpy(action)), 0.0),
            "action_mask": mask, "state_mask": state_mask,
            "state": torch.where(state_mask, self.state_norms[d].normalize(state), 0.0),
            "instruction": ep["task"], "subtask": ep["subtask"][t], "dataset": d, "window": k,
        }  # fmt: skip
        for name, view in self.views.items() if pictures else ():
            there = view.camera in reader.cameras
            sample |= {f"{name}_seen": there} if view.optional else {}
            if not there:
                sample[name] = torch.zeros(view.frames, 3, view.size, view.size, dtype=torch.uint8)
                continue
            wanted = [min(t + f * stride, n - 1) for f in range(view.frames)]
            unique = sorted(set(wanted))
            images = reader.pictures(i, view.camera, unique, view.size)
            sample[name] = images if unique == wanted else images[[unique.index(f) for f in wanted]]
        return sample


def _held_out(episodes: int, every: int) -> list[int]:
    """One episode in each run of `every`, a place further each time: of tasks recorded in turn, each has its turn."""
    starts = range(0, episodes - every + 1, every) if every else ()
    return [b + (b // every) % every for b in starts]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors, collects texts in lists, numbers in int64 tensors."""
    batch: dict[str, Any] = {}
    for key, value in samples[0].items():
        column = [s[key] for s in samples]
        if isinstance(value, Tensor):
            batch[key] = torch.stack(column)
        else:
            batch[key] = column if isinstance(value, str) else torch.tensor(column)
    return batch


def stream(
    windows: Windows, batch: int, start: int, process: Process, accumulate: int, workers: int,
    tally: dict[str, int] | None = None, max_bad: float = 0.01,
) -> Iterator[list[dict]]:  # fmt: skip
    """Endless training steps from step `start` on: each a list of `accumulate` micro-batches of `batch` samples for
    this rank. Step s takes samples s * (world * accumulate * batch) onwards, whoever computes them. A collective: every
    rank must draw its step.

    What the global batch passed over is counted in tally["bad"], and each kind of damage reported once. Raises
    InputError on all ranks when that is more than a share `max_bad` of all samples since step 0, or of the first 1000
    (our choice: else one early find would stop a run)."""
    tally = {"bad": 0} if tally is None else tally

    def numbers() -> Iterator[list[int]]:
        k = start * accumulate
        while True:
            first = (k * process.world + process.rank) * batch
            yield list(range(first, first + batch))
            k += 1

    for reader in windows.readers:
        reader.close()  # before the workers are forked
    loader = torch.utils.data.DataLoader(
        windows, batch_sampler=numbers(), collate_fn=collate, num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=process.device.type == "cuda",
        generator=torch.Generator(),  # its own, so that making a loader leaves the global random numbers alone
    )  # fmt: skip
    batches, drawn = iter(loader), start * accumulate * process.world * batch
    while True:
        step = [to_device(next(batches), process.device) for _ in range(accumulate)]
        drawn += accumulate * process.world * batch
        damaged = _report(windows, step, process)
        tally["bad"] += len(damaged)
        if damaged and tally["bad"] > max_bad * max(drawn, 1000):
            raise InputError(
                f"{tally['bad']} of {drawn} samples fell on damaged episodes, which is more than --max-bad {max_bad:g} "
                f"allows (of 1000 at least); the last: {damaged[-1]}; mend the data, or add --resume and a larger "
                f"--max-bad"
            )
        yield step


def _report(windows: Windows, batches: list[dict], process: Process) -> list[str]:
    """What all ranks passed over to draw these batches; each kind of damage is printed once. A collective."""
    damaged = process.gather([line for b in batches for text in b["damaged"] for line in text.splitlines()])
    for line in dict.fromkeys(damaged):
        if process.main and line not in windows.reported:
            tqdm.write(f"damaged, another window is drawn: {line}", file=sys.stderr)
    windows.reported |= set(damaged)
    return damaged


def held_out_batches(windows: Windows, samples: int, batch: int, process: Process) -> Iterator[dict]:
    """The first `samples` windows of a stream, dealt to the ranks in order, in batches of at most `batch`.

    A sharded model's forward pass is a collective, so that all ranks get equally many batches of the same sizes: where
    windows run out the last one repeats. It is not counted: `counted` bool (B,), and no valid action."""
    share = math.ceil(samples / process.world)
    for first in range(0, share, batch):
        rows = process.rank * share + np.arange(first, min(first + batch, share))
        out = collate([windows[min(i, samples - 1)] for i in rows.tolist()])
        out["counted"] = torch.from_numpy(rows < samples)
        out["action_mask"] = out["action_mask"] & out["counted"][:, None, None]
        _report(windows, [out], process)
        yield to_device(out, process.device)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def augment(images: Tensor, index: Tensor, seed: int) -> Tensor:
    """Shifts each view by up to 6 % (edges repeated) and varies brightness and contrast; uint8 (B, K, 3, H, H). What
    happens to a sample depends on (seed, its number) alone."""
    size, pad = images.shape[-1], max(1, round(0.06 * images.shape[-1]))
    u = torch.special.ndtr(noise((images.shape[1], 4), index, seed, images.device, purpose=3))  # uniform (0, 1)
    padded = F.pad(images.flatten(0, 1).float(), (pad,) * 4, mode="replicate")
    corners = (u[..., :2] * (2 * pad + 1)).long().clamp(max=2 * pad).flatten(0, 1).tolist()
    crops = [view[:, top : top + size, left : left + size] for view, (top, left) in zip(padded, corners, strict=True)]
    x = torch.stack(crops).view(images.shape)
    gain, bias = rearrange(torch.stack([0.8 + 0.4 * u[..., 2], 25.5 * (2 * u[..., 3] - 1)]), "two b k -> two b k 1 1 1")
    mid = x.mean((2, 3, 4), keepdim=True)
    return ((x - mid) * gain + mid + bias).round().clamp(0, 255).to(torch.uint8)


def check_resume(checkpoint: Path, windows: Windows) -> None:
    """Raises InputError when the data sets are no longer those that a checkpoint was trained on."""
    then, now = load_meta(checkpoint)["statistics"], json.loads(json.dumps(windows.statistics()))
    if changed := [source for source in then | now if then.get(source) != now.get(source)]:
        raise InputError(f"the data at {changed} have other statistics than when {checkpoint} was trained, or were not "
                         f"there, or no longer are: put back the data that it saw, or choose another --out")
