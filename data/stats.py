"""Statistics for the normaliser: the quantiles of a data set's actions and states (Sec. 6.3).

    python -m data.stats runs/data/bridge                    a data set with our names: into its meta/stats.json
    python -m data.stats PATH@sim_pick_place                 a mapped data set: into the mapping's JSON file
    python -m data.stats runs/data/bridge --stride 4         also actions over four steps

Reads the tables of all episodes, one after the other, no video. Writes `observation.state`, `action`, and
`action.stride<N>` for windows at 10, 5 and 2.5 Hz, each with min, max, mean, std, q01, q99 and count over the columns
that the data set has. The file is written beside and renamed; other statistics in it stay. An episode that cannot be
read, because of NaN say, is left out by name: training passes over it, too.

Data sets of `data.lerobot.LeRobotWriter`, so all that `franka.py` and the converters make, come with all of this.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from common import InputError, run_main, write_json
from data.lerobot import DamagedEpisode, LeRobotReader
from data.quantiles import RATES, DatasetStatistics, action_key, stride_for


@dataclass
class Args:
    source: Annotated[str, tyro.conf.Positional]
    """data set, PATH or PATH@MAPPING"""
    stride: int = 1
    """also describe actions composed over this many steps: the data's fps divided by the stage's --hz (our choice)"""


def sound(reader: LeRobotReader, chosen: Iterable[int], damaged: dict[int, str]) -> Iterator[tuple[int, dict]]:
    """(number, episode) of those that can be read; why the others cannot goes into `damaged`. Raises InputError when
    none can."""
    count = 0
    for i in chosen:
        try:
            episode = reader.episode(i)
        except DamagedEpisode as error:
            damaged[i] = str(error)
            continue
        count += 1
        yield i, episode
    if not count:
        raise InputError(f"none of {len(damaged)} episodes of {reader.source} can be read; the first: "
                         f"{next(iter(damaged.values()))}")  # fmt: skip


def statistics(
    reader: LeRobotReader, *strides: int, episodes: Sequence[int] | None = None, damaged: dict[int, str] | None = None
) -> dict[str, dict]:
    """The statistics of all episodes or of some, of actions as they are and composed over each of `strides`. Damaged
    episodes are left out, and named in `damaged`."""
    total = DatasetStatistics(reader.action_names, reader.state_names, strides)
    chosen = range(reader.num_episodes) if episodes is None else episodes
    bar = tqdm(chosen, desc=f"reading {reader.root.name}", unit="episode", mininterval=1)
    for _, episode in sound(reader, bar, {} if damaged is None else damaged):
        total.add(episode)
    return total.result()


def main() -> None:
    args = tyro.cli(Args, prog="python -m data.stats", description=__doc__)
    if args.stride < 1:
        raise InputError(f"--stride {args.stride}: give 1 or more")
    reader = LeRobotReader(args.source)
    if not (reader.action_names or reader.state_names):
        raise InputError(f"{args.source} is video alone: there is nothing to describe, train on it as it is")
    damaged: dict[int, str] = {}
    fresh = statistics(reader, args.stride, *(stride_for(reader.fps, hz) for hz in RATES), damaged=damaged)
    for text in damaged.values():
        print(f"left out: {text}", file=sys.stderr)
    key = action_key(args.stride)
    if key not in fresh:
        raise InputError(f"{args.source}: no episode is {args.stride} steps long; choose a smaller --stride")
    stats = reader.stats | fresh
    path = reader.mapping_path or Path(reader.root) / "meta/stats.json"
    try:
        write_json(path, reader.mapping | {"stats": stats} if reader.mapping_path else stats)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; copy the data set or the mapping first") from None
    for name, low, high in zip(reader.action_names, stats[key]["q01"], stats[key]["q99"], strict=True):
        print(f"{key} {name}: q01 {low:.4g}, q99 {high:.4g}")
    n = reader.num_episodes
    print(f"{path}: {stats[key]['count'][0]} actions of {n - len(damaged)} of {n} episodes; {', '.join(fresh)}")


if __name__ == "__main__":
    run_main(main, resumes=False)
