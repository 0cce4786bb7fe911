"""How well a vision-language model of --small finds named things: what it must know before any policy can.

    python benchmarks/localise.py                                            # the student's, a minute of a core
    python benchmarks/localise.py --vlm runs/small/pretrain/internvl-small/hf
    python benchmarks/localise.py --vlm runs/small/distill                   # what distillation has left of it

Each thing is asked for by itself ("detect red cup"); the answer's four places are taken as expected values, each with
those before it as the model said them. Distances are between the centres of the found box and of the true one, medians:
in pixels, and in cm on the plane 3 cm above the table, where the lines of sight through both meet it.

    stills      unseen ones (`data.stills`), of the FR3 at home and of all other scenes apart. Hands and grippers are
                left out: they are not on the table
    tasks       the first frames of the five tasks (seed 0), whose objects no model has seen: what policies will look
                for, by the words of the instructions. Their true boxes are of the pixels that show them

Places come in steps of 1/128 of the image, and a box's centre is exact to about half a pixel.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import pretrain
from benchmarks import plan
from common import Process
from data.stills import Still, look, stills
from distill import load_student
from franka import TASKS, SimFranka

HEIGHT = 0.03  # m above the table, of the plane on which centimetres are measured
# What the tasks' bodies are called, and with "/" what one geom of a body is called. As the instructions say it; they do
# not name the bowl.
NAMES = {"red": "red cup", "blue": "blue cup", "block": "yellow block", "board": "green slot", "oven": "oven",
         "brush": "yellow brush", "bowl": "blue bowl", "bowl/1": "red sauce", "pot": "red pot"}  # fmt: skip


@dataclass
class Args:
    vlm: str = "runs/small/pretrain/paligemma-small/hf"
    """Folder of the model, as pretrain.py leaves it; or a run of distill.py."""
    scenes: int = 60
    """Scenes of stills, of six each."""
    trials: int = 20
    """First frames of each task."""
    seed: int = 0
    """Seed of stills and trials."""
    json: str = ""
    """Write the table to this file, too."""


def load(source: str) -> tuple[nn.Module, Any]:
    """A vision-language model and its tokenizer; of a run of distill.py the student, whose language head is its
    embedding."""
    if not common.checkpoints(Path(source)) and not (Path(source) / "meta.json").exists():
        return common.load_vlm(source)
    student = load_student(source)[0]
    model = nn.Module()
    model.model, model.config, model.lm_head = student.vlm, student.config, student.logits
    return model, student.tokenizer


@torch.no_grad()
def detect(model: nn.Module, tokenizer: Any, images: Tensor, names: list[str], process: Process) -> np.ndarray:
    """The boxes (B, 4) of named things, one an image, in shares of it: top, left, bottom, right. images: uint8
    (B, 3, H, H)."""
    first, said, boxes = tokenizer.convert_tokens_to_ids(common.loc(0.0)), [""] * len(names), []
    for _ in range(4):
        asked = [(f"detect {name}", f"{name} {places}") for name, places in zip(names, said, strict=True)]
        batch = pretrain.encode(tokenizer, model.config, asked)
        last = batch["attention_mask"].sum(1) - 2  # before the end of the answer
        batch = {k: v.to(process.device) for k, v in batch.items() if k != "labels"}
        pixels = common.normalize_pixels(images.to(process.device), model.config.model_type, torch.float32)
        with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
            hidden = model.model(pixel_values=pixels, **batch, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[range(len(names)), last])[:, first : first + common.PLACES]
        expected = (logits.float().softmax(-1).cpu() * torch.arange(common.PLACES)).sum(-1)
        boxes.append((expected + 0.5) / common.PLACES)
        said = [s + common.loc(share) for s, share in zip(said, boxes[-1].tolist(), strict=True)]
    return torch.stack(boxes, 1).numpy()


def on_table(still: Still, centre: np.ndarray) -> np.ndarray:
    """Where (2,) the line of sight through a point of the image, (down, right) in shares, meets the plane; NaN above
    the horizon."""
    eye, axes, half = still.view
    ray = axes @ np.array([(2 * centre[1] - 1) * half, (1 - 2 * centre[0]) * half, -1.0])
    return (eye + ray * (HEIGHT - eye[2]) / ray[2])[:2] if ray[2] < 0 else np.full(2, np.nan)


def of_stills(args: Args, size: int) -> dict[tuple[str, str], list[tuple[Still, str, tuple]]]:
    """What to ask: by (where, camera) the stills, names and true boxes."""
    asked: dict = {}
    for number in range(args.scenes):
        for still in stills(args.seed + pretrain.UNSEEN, number, size):
            key = f"stills {'at home' if still.home else 'elsewhere'}", still.camera
            for name, box in still.things:
                if not name.endswith(("gripper", "hand")):
                    asked.setdefault(key, []).append((still, name, box))
    return asked


def of_tasks(args: Args, size: int) -> dict[tuple[str, str], list[tuple[Still, str, tuple]]]:
    """The same of the first frames of the five tasks."""
    asked: dict = {}
    for task in TASKS:
        robot, words, owner = SimFranka(task, size), [], []
        model = robot.model
        for geom, body in enumerate(model.geom_bodyid):
            root = model.body(model.body_rootid[body]).name
            name = NAMES.get(f"{root}/{geom - model.body(root).geomadr[0]}", NAMES.get(root))
            if name and name not in words:
                words.append(name)
            owner.append(words.index(name) if name else -1)
        for trial in range(args.trials):
            robot.reset(trial, args.seed)
            for still in look(robot, robot.cameras, words, np.array(owner)):
                for name, box in still.things:
                    asked.setdefault((f"{task}: {name}", still.camera), []).append((still, name, box))
        robot.close()
    return asked


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    common.at_least(args, scenes=1, trials=1, seed=0)
    plan.claim(args.json)
    process = common.setup(args.seed, cpu_bf16=True)
    model, tokenizer = load(args.vlm)
    model, size = model.to(process.device).eval(), model.config.vision_config.image_size
    size = size if isinstance(size, int) else size[0]
    print(f"{'':24s} {'camera':8s} {'things':>6s} {'pixels':>7s} {'cm':>6s} {'< 2 px':>7s}")
    rows = []
    for (where, camera), asked in sorted({**of_stills(args, size), **of_tasks(args, size)}.items(), key=_order):
        pixels, metres = [], []
        for k in range(0, len(asked), 60):
            some = asked[k : k + 60]
            images = torch.from_numpy(np.stack([still.image for still, _, _ in some])).permute(0, 3, 1, 2)
            found = detect(model, tokenizer, images, [name for _, name, _ in some], process)
            for (still, _, box), there in zip(some, found, strict=True):
                true, there = (np.reshape(b, (2, 2)).mean(0) for b in (box, there))
                pixels.append(np.linalg.norm(there - true) * size)
                metres.append(np.linalg.norm(on_table(still, there) - on_table(still, true)))
        row = {"where": where, "camera": camera, "things": len(asked), "pixels": float(np.median(pixels)),
               "cm": float(100 * np.median(np.nan_to_num(metres, nan=9.0))),
               "near": float(np.mean(np.less(pixels, 2)))}  # fmt: skip
        rows.append(row)
        print(f"{where:24s} {camera:8s} {len(asked):6d} {row['pixels']:7.2f} {row['cm']:6.2f} {row['near']:7.2f}")
    if args.json:
        common.write_json(Path(args.json), rows)


def _order(item) -> tuple:
    (where, camera), _ = item
    return not where.startswith("stills"), [*TASKS].index(where.split(":")[0]) if ":" in where else 0, where, camera


if __name__ == "__main__":
    common.run_main(main, resumes=False)
