"""The pretraining mixture of Table 6: 29 sources and the paper's weights.

    python -m data.mixture                       what of it is in datasets/pretrain, what is missing, and how to get it
    python lam.py                                trains on it; `python distill.py` too

    datasets/pretrain/fractal20220817_data/      a LeRobot data set with our names, as the converters write it
    datasets/pretrain/droid/                     a LeRobot data set of others (or a link to one) ...
    datasets/pretrain/droid.json                 ... and beside it the mapping that reads it: a copy from data/mappings,
                                                 so that `python -m data.stats` can put the statistics there

Any folder can stand for datasets/pretrain: `--data FOLDER` is a mixture where FOLDER is no data set itself. Data sets
are known by the names of TABLE6; one that is not in it has no weight, and is named and left out.

What Table 6 leaves open (our choices):
 1. Its ratios add up to 107.8 % and three "< 0.1 %": they are taken as weights and divided by their sum.
 2. "< 0.1 %" is 0.05 %.
 3. A ratio is a share of the training samples (windows), whatever a source's size.
 4. A source that is missing is left out; its share goes to the others in proportion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common import InputError, run_main
from data.lerobot import LeRobotReader
from data.windows import Windows

FOLDER = "datasets/pretrain"


@dataclass(frozen=True)
class Source:
    """A row of Table 6: the paper's name and ratio in percent, the name of our folder (for Open X-Embodiment, its name
    in TensorFlow Datasets), the frames per second that a conversion should have, and the module that converts it. Image
    keys, action encodings and gripper rules stand in the converters."""

    title: str
    percent: float
    name: str
    hz: float
    converter: str = "data.rlds"


UNDER_A_TENTH = 0.05  # "< 0.1 %"
_OXE = "_converted_externally_to_rlds"
TABLE6 = (
    Source("Fractal", 12.8, "fractal20220817_data", 3),
    Source("Kuka", 12.8, "kuka", 10),
    Source("Bridge", 11.8, "bridge_dataset", 5),
    Source("Taco Play", 2.7, "taco_play", 15),
    Source("Jaco Play", 0.4, "jaco_play", 10),
    Source("Berkeley Cable Routing", 0.2, "berkeley_cable_routing", 10),
    Source("Roboturk", 2.1, "roboturk", 10),
    Source("Viola", 0.8, "viola", 20),
    Source("Berkeley Autolab UR5", 1.1, "berkeley_autolab_ur5", 5),
    Source("Toto", 1.8, "toto", 30),
    Source("Language Table", 4.4, "language_table", 10),
    Source("Stanford Hydra Dataset", 4.6, f"stanford_hydra_dataset{_OXE}", 10),
    Source("Austin Buds Dataset", 0.2, f"austin_buds_dataset{_OXE}", 20),
    Source("NYU Franka Play Dataset", 0.6, f"nyu_franka_play_dataset{_OXE}", 3),
    Source("Furniture Bench Dataset", 2.5, f"furniture_bench_dataset{_OXE}", 10),
    Source("UCSD Kitchen Dataset", UNDER_A_TENTH, f"ucsd_kitchen_dataset{_OXE}", 2),
    Source("Austin Sailor Dataset", 2.2, f"austin_sailor_dataset{_OXE}", 20),
    Source("Austin Sirius Dataset", 1.7, f"austin_sirius_dataset{_OXE}", 20),
    Source("DLR EDAN Shared Control", UNDER_A_TENTH, f"dlr_edan_shared_control{_OXE}", 5),
    Source("IAMLab CMU Pickup Insert", 0.9, f"iamlab_cmu_pickup_insert{_OXE}", 20),
    Source("UTAustin Mutex", 2.2, "utaustin_mutex", 20),
    Source("Berkeley Fanuc Manipulation", 7.8, "berkeley_fanuc_manipulation", 10),
    Source("CMU Stretch", 1.5, "cmu_stretch", 10),
    Source("BC-Z", 6.8, "bc_z", 10),
    Source("FMB Dataset", 7.1, "fmb_dataset", 10),
    Source("DobbE", 1.4, "dobbe", 3.75),
    Source("DROID", UNDER_A_TENTH, "droid", 15),
    Source("AgiBoT-alpha", 6.3, "agibot", 30, "data.agibot"),
    Source("EgoDex", 11.1, "egodex", 30, "data.egodex"),
)


def is_mixture(path: str | Path) -> bool:
    """A folder that is no data set itself; the default one also where it does not exist yet."""
    return str(path) == FOLDER or (Path(path).is_dir() and not (Path(path) / "meta").exists())


def present(folder: str | Path) -> dict[Source, str]:
    """What of Table 6 is in a folder, as sources for `LeRobotReader`: PATH, or PATH@PATH.json where that is there."""
    found = {}
    for row in TABLE6:
        path = Path(folder) / row.name
        if (path / "meta/info.json").exists():
            mapping = path.with_name(f"{row.name}.json")
            found[row] = f"{path}@{mapping}" if mapping.exists() else str(path)
    return found


def expand(data: Sequence[str], weights: Sequence[float] = ()) -> tuple[list[str], list[float]]:
    """The data sets that --data stands for and their weights (none: every frame counts alike). A mixture's folder
    becomes its data sets; they share its own weight as Table 6 has it.

    Raises InputError for a folder with nothing of Table 6 in it, and where weights are needed and do not fit."""
    mixtures = [path for path in data if is_mixture(path)]
    if not mixtures:
        return list(data), list(weights)
    if len(weights) != len(data) and (weights or len(data) > 1):
        raise InputError(f"--data {' '.join(data)} with the mixture {mixtures[0]} needs a --weights for each, not "
                         f"{list(weights)}")  # fmt: skip
    out = []
    for path, weight in zip(data, weights or [1.0], strict=True):
        if path not in mixtures:
            out.append((path, weight))
            continue
        found = present(path)
        if not found:
            raise InputError(
                f"{path} is no data set (no meta/info.json) and holds none of the paper's mixture (Table 6): type "
                f"`python -m data.mixture {path}` for how to get them, or give --tiny, or --data with a data set"
            )
        total = sum(row.percent for row in found)
        out += [(source, weight * row.percent / total) for row, source in found.items()]
    return [source for source, _ in out], [share for _, share in out]


def report(folder: str | Path) -> str:
    """What of Table 6 is there, what is missing, what is left out."""
    found = present(folder)
    missing = [row for row in TABLE6 if row not in found]
    strange = sorted({p.parent.parent.name for p in Path(folder).glob("*/meta/info.json")} - {r.name for r in TABLE6})
    sums = [sum(row.percent for row in rows) for rows in (found, TABLE6)]
    lines = [f"mixture of {folder}: {len(found)} of {len(TABLE6)} sources of Table 6, {sums[0]:.2f} of the paper's "
             f"{sums[1]:.2f} %, which become 100 %"]  # fmt: skip
    if missing:
        lines.append("missing: " + ", ".join(f"{row.title} {row.percent:g} %" for row in missing))
    if strange:
        lines.append(f"left out, not in Table 6: {', '.join(strange)}")
    return "\n".join(lines)


def summary(data: Sequence[str], windows: Windows) -> str:
    """What a run says at its start: each mixture's report, and the data sets with episodes, hours and weights."""
    mixtures = [path for path in data if is_mixture(path)]
    lines = [report(path) for path in mixtures]
    rates = {source: row.hz for path in mixtures for row, source in present(path).items()}
    for reader in windows.readers:
        if reader.fps != rates.get(reader.source, reader.fps):
            lines.append(f"note: {reader.source} has {reader.fps:g} Hz, and {rates[reader.source]:g} Hz were expected")
    return "\n".join([*lines, windows.summary()])


@dataclass
class Args:
    folder: Annotated[str, tyro.conf.Positional] = FOLDER
    """folder of the mixture"""


def main() -> None:
    folder = tyro.cli(Args, prog="python -m data.mixture", description=__doc__).folder
    found, total = present(folder), sum(row.percent for row in TABLE6)
    print(f"{'source':28s} {'paper':>7s} {'weight':>7s} {'episodes':>9s} {'hours':>8s}  where, or how to get it")
    share = sum(row.percent for row in found)
    for row in TABLE6:
        weight = f"{row.percent / share:7.2%}" if row in found else " " * 7
        paper = "< 0.1 %" if row.percent == UNDER_A_TENTH else f"{row.percent:5.1f} %"
        if row in found:
            reader = LeRobotReader(found[row])
            rest = f"{reader.num_episodes:9d} {reader.lengths.sum() / reader.fps / 3600:8.1f}  {found[row]}"
        else:
            command = f"python -m {row.converter} PATH_OF_{row.name.split('_')[0].upper()} --out {folder}/{row.name}"
            rest = f"{'missing':>9s} {'':8s}  {command}"
        print(f"{row.title:28s} {paper} {weight} {rest}")
    print(f"\n{report(folder)}" if found else f"\nthe paper's ratios add up to {total:.2f} %; they become 100 %")


if __name__ == "__main__":
    run_main(main, resumes=False)
