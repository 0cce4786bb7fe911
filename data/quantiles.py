"""Statistics of a data set, as the normaliser needs them: streaming, mergeable, episode by episode.

`data.lerobot.LeRobotWriter` keeps them while it writes; `python -m data.stats` makes them for a data set that is there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common import ACTION_NAMES, STATE_NAMES, InputError, gather, seen_from, strided_actions

ACTION, STATE = "action", "observation.state"  # LeRobot's columns, and the keys of their statistics


def stride_for(fps: float, hz: float) -> int:
    """How many frames of a data set a step of a window at `hz` spans; 1 for slower data, which keep their own rate."""
    return max(1, round(fps / hz))


# Hz of the full run's, of --small's and of reproduce.py's windows: a written data set has statistics for all of them.
RATES = (10.0, 5.0, 2.5)


class Statistics:
    """LeRobot's statistics of rows (N, width) that come in parts and need not fit in memory: min, max, mean, std, count
    and the quantiles 1 and 99 %, of each column by itself.

    Quantiles are exact up to 2 KEEP rows. From then on 2 KEEP values are sorted and every other one is dropped, the
    rest counting twice; their like is thinned again to count four times, and so on (Munro and Paterson's selection with
    limited storage). N rows take log2(N / KEEP) levels, each of which displaces a rank by at most N / (2 KEEP); as the
    lower and the upper of a pair are dropped by turns, it is far less in practice."""

    KEEP = 1 << 14

    def __init__(self, width: int):
        self.width = width
        self.count, self.mean, self.moment = np.zeros(width, np.int64), np.zeros(width), np.zeros(width)
        self.low, self.high = np.full(width, np.inf), np.full(width, -np.inf)
        self.levels: list[list[np.ndarray]] = [[] for _ in range(width)]  # [column][h]: values that count 2**h times
        self.thinned: list[list[int]] = [[] for _ in range(width)]  # how often, for the turns

    def add(self, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Takes in rows (N, width); of those, with a mask (N, width), only the entries that are True."""
        values = np.asarray(values)
        for d in range(self.width):
            column = values[:, d] if mask is None else values[mask[:, d], d]
            if len(column):
                wide = column.astype(np.float64)
                mean = wide.mean()
                self._moments(d, len(wide), mean, ((wide - mean) ** 2).sum(), wide.min(), wide.max())
                self._push(d, 0, column.astype(np.float32))

    def merge(self, other: "Statistics") -> None:
        """Takes in the rows of another one, say those of another shard."""
        for d in range(self.width):
            if other.count[d]:
                self._moments(d, other.count[d], other.mean[d], other.moment[d], other.low[d], other.high[d])
            for h, values in enumerate(other.levels[d]):
                self._push(d, h, values)

    def _moments(self, d: int, n: int, mean: float, moment: float, low: float, high: float) -> None:
        """Mean and sum of squared deviations of a union (Chan et al.)."""
        total, away = self.count[d] + n, mean - self.mean[d]
        self.moment[d] += moment + away * away * self.count[d] * n / total
        self.mean[d] += away * n / total
        self.count[d] = total
        self.low[d], self.high[d] = min(self.low[d], low), max(self.high[d], high)

    def _push(self, d: int, h: int, values: np.ndarray) -> None:
        levels, thinned = self.levels[d], self.thinned[d]
        if len(levels) == h:
            levels.append(np.empty(0, np.float32))
            thinned.append(0)
        levels[h] = np.concatenate([levels[h], values])
        while len(levels[h]) >= 2 * self.KEEP:
            block, levels[h] = np.sort(levels[h][: 2 * self.KEEP]), levels[h][2 * self.KEEP :]
            thinned[h] += 1
            self._push(d, h + 1, block[thinned[h] % 2 :: 2])

    def quantile(self, q: float) -> np.ndarray:
        """The quantile q of each column (width,), interpolated as numpy does."""
        out = np.empty(self.width)
        for d, levels in enumerate(self.levels):
            weights = np.repeat(2 ** np.arange(len(levels)), [len(v) for v in levels])
            values = np.concatenate(levels).astype(np.float64)
            order = np.argsort(values, kind="stable")
            values, weights = values[order], weights[order]
            ranks = np.cumsum(weights) - (weights + 1) / 2  # of the middle of the rows that a value stands for
            out[d] = np.interp(q * (self.count[d] - 1), ranks, values)
        return out

    def result(self) -> dict[str, list]:
        """min, max, mean, std, q01 and q99 per column, and count. Raises InputError for a column without rows."""
        if not self.count.all():
            raise InputError(f"no values for columns {np.flatnonzero(self.count == 0).tolist()} of {self.width}")
        out = {"min": self.low, "max": self.high, "mean": self.mean, "std": np.sqrt(self.moment / self.count)}
        out |= {"q01": self.quantile(0.01), "q99": self.quantile(0.99)}
        return {k: v.tolist() for k, v in out.items()} | {"count": [int(self.count.max())]}


def quantile_stats(values: np.ndarray) -> dict[str, list]:
    """The statistics of rows (N, D) that are all there."""
    total = Statistics(np.shape(values)[1])
    total.add(values)
    return total.result()


class DatasetStatistics:
    """The statistics of a data set, episode by episode, by the keys of its meta/stats.json: `observation.state`,
    `action`, and `action.stride<N>` for actions composed over N steps, which windows at a lower rate consist of. Every
    frame counts once: all windows that `Windows` can draw start somewhere, and each start has one action."""

    def __init__(self, action_names: Sequence[str], state_names: Sequence[str], strides: Sequence[int]):
        self.action_names, self.state_names, self.strides = action_names, state_names, sorted({1, *strides})
        self.totals = {action_key(n): Statistics(len(action_names)) for n in self.strides if action_names}
        self.totals |= {STATE: Statistics(len(state_names))} if state_names else {}

    def add(self, episode: dict[str, Any]) -> None:
        """Takes in an episode as `LeRobotReader.episode` returns it, as seen from its camera where that moves."""
        camera, state = episode.get("camera"), episode["state"]
        if self.state_names:
            seen = state if camera is None else seen_from(camera, episode["action"], state)[1]
            self.totals[STATE].add(gather(seen, self.state_names, STATE_NAMES))
        for n in self.strides if self.action_names else ():
            starts = np.arange(max(0, episode["steps"] - n + 1))
            actions = strided_actions(episode, starts, n)
            if camera is not None:
                actions = seen_from(camera[starts], actions, state[starts])[0]
            self.totals[action_key(n)].add(gather(actions, self.action_names, ACTION_NAMES))

    def merge(self, other: "DatasetStatistics") -> None:
        for key, total in self.totals.items():
            total.merge(other.totals[key])

    def result(self) -> dict[str, dict]:
        """By key; a stride that is longer than every episode has none."""
        return {key: total.result() for key, total in self.totals.items() if total.count.all()}


def action_key(stride: int) -> str:
    """The name of the statistics of actions composed over `stride` steps."""
    return ACTION if stride == 1 else f"{ACTION}.stride{stride}"
