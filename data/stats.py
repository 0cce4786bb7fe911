"""Statistics for the normaliser: the quantiles of a data set's actions and states (Sec. 6.3).

    python -m data.stats runs/data/bridge                    a data set with our names: into its meta/stats.json
    python -m data.stats runs/data/bridge --stride 3         also actions over three steps (30 fps -> 10 Hz)
    python -m data.stats PATH@sim_pick_place --stride 3      a mapped data set: into the mapping's JSON file

Reads the tables of all episodes, no video. Writes `action` and `observation.state`, and with a stride above 1
`action.stride<N>`, each with min, max, mean, std, q01, q99 and count over the columns that the data set has. The file
is written beside and renamed; other statistics in it stay.

Every frame counts once: all windows that `common.Windows` can draw start somewhere, and each start has one action.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from common import (
    ACTION_NAMES,
    STATE_NAMES,
    InputError,
    LeRobotReader,
    gather,
    quantile_stats,
    run_main,
    strided_actions,
    write_json,
)


@dataclass
class Args:
    source: Annotated[str, tyro.conf.Positional]
    """data set, PATH or PATH@MAPPING"""
    stride: int = 1
    """also describe actions composed over this many steps: the data's fps divided by the stage's --hz (our choice)"""


def statistics(reader: LeRobotReader, stride: int = 1) -> dict[str, dict]:
    """"action", "observation.state" and, for stride > 1, "action.stride<N>". Raises InputError where an episode has NaN
    or a broken table, or where none is as long as the stride."""
    values: dict[str, list[np.ndarray]] = {"action": [], "observation.state": []}
    if stride > 1:
        values[f"action.stride{stride}"] = []
    for i in tqdm(range(reader.num_episodes), desc=f"reading {reader.root.name}", unit="episode", mininterval=1):
        episode = reader.episode(i)
        for key in values:
            if key == "observation.state":
                values[key].append(gather(episode["state"], reader.state_names, STATE_NAMES))
            else:
                step = stride if "stride" in key else 1
                starts = np.arange(max(0, episode["steps"] - step + 1))
                values[key].append(gather(strided_actions(episode, starts, step), reader.action_names, ACTION_NAMES))
    out = {key: np.concatenate(parts) for key, parts in values.items()}
    if not all(len(v) for v in out.values()):
        raise InputError(f"{reader.source}: no episode is {stride} steps long; choose a smaller --stride")
    return {key: quantile_stats(v) for key, v in out.items() if v.shape[1]}


def main() -> None:
    args = tyro.cli(Args, prog="python -m data.stats", description=__doc__)
    if args.stride < 1:
        raise InputError(f"--stride {args.stride}: give 1 or more")
    reader = LeRobotReader(args.source)
    stats = reader.stats | statistics(reader, args.stride)
    path = reader.mapping_path or Path(reader.root) / "meta/stats.json"
    try:
        write_json(path, reader.mapping | {"stats": stats} if reader.mapping_path else stats)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; copy the data set or the mapping first") from None
    key = "action" if args.stride == 1 else f"action.stride{args.stride}"
    for name, low, high in zip(reader.action_names, stats[key]["q01"], stats[key]["q99"], strict=True):
        print(f"{key} {name}: q01 {low:.4g}, q99 {high:.4g}")
    print(f"{path}: {stats[key]['count'][0]} actions of {reader.num_episodes} episodes")


if __name__ == "__main__":
    run_main(main, resumes=False)
