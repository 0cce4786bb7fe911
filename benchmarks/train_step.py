"""Seconds per training step of distillation and fine-tuning: forward, backward, clipping and AdamW, random weights.

    python -m benchmarks.train_step                                              # both stages, tiny and small
    python -m benchmarks.train_step --stages finetune --sizes small --variants plain checkpointing compile both
    python -m benchmarks.train_step --sizes full --batch 4 --variants checkpointing both        # a GPU
    python -m benchmarks.train_step --stages distill --sizes small --profile     # where the time goes

A step of distillation has the frozen teacher's forward pass in it. Loading data is not in it, images are black, texts
are a few words: no time depends on their values. FLOPs are the model's own, counted by benchmarks/plan.py: what
checkpointing recomputes costs time and counts for nothing. Memory: what CUDA's allocator gave out at most; on a CPU
weights, gradients and AdamW's moments, and the peak of all other tensors alive. benchmarks/lam_step.py has stage 1.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import distill
import finetune
from benchmarks import measure, plan
from common import InputError
from lam import count

STAGES: dict[str, Any] = {"distill": distill, "finetune": finetune}


@dataclass
class Args:
    stages: tuple[Literal["distill", "finetune"], ...] = ("distill", "finetune")
    """Which stages."""
    sizes: tuple[Literal["tiny", "small", "full"], ...] = ("tiny", "small")
    """Presets of the stages; full: the paper's models."""
    variants: tuple[Literal["plain", "checkpointing", "compile", "both"], ...] = ("plain", "checkpointing")
    """With activation checkpointing, with every layer compiled, with both."""
    batch: int = 0
    """Windows in a step; 0: as the preset has it."""
    steps: int = 5
    """Steps that are timed, after two that are not; the median counts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 on a GPU and float32 on a CPU."""
    seed: int = 0
    """Of the random weights."""
    profile: bool = False
    """Print the operations that a step spends its time in."""
    json: str = ""
    """Write the table to this file, too."""


def bench(name: str, size: str, variant: str, args: Args, process: common.Process) -> dict:
    """One row of the table."""
    checkpointing, compiled = variant in ("checkpointing", "both"), variant in ("compile", "both")
    module = STAGES[name]
    asked = {"tiny": module.TINY, "small": module.SMALL, "full": module.Args()}[size]
    stage = plan.STAGES[name][1](replace(asked, batch=args.batch or asked.batch, checkpointing=checkpointing))
    torch.manual_seed(args.seed)
    with process.device:
        model = stage.build(checkpointing)
        frozen = [(make(), run) for make, run in stage.frozen.values()]
    if compiled:
        for layer in plan.units(model):
            layer.compile()

    def loss(i: int) -> torch.Tensor:
        with process.device:
            for teacher, run in frozen:
                run(teacher)
            return stage.step(model)

    step = measure.training_step(model, loss, process)
    seconds = measure.time_training(step, args.steps, process)
    if args.profile:
        measure.profile(lambda: step(0), process)
    parameters, trained = count(model), count(model, trained=True)
    beside = sum(count(teacher) for teacher, _ in frozen)
    model = frozen = step = loss = None  # before the next size needs the memory
    flops, activations = measure.planned(stage, checkpointing, process)
    return {
        "stage": name, "size": size, "variant": variant, "parameters": parameters, "frozen": beside,
        "batch": stage.args.batch, "seconds": seconds, "samples": stage.args.batch / seconds, "gflop": flops / 1e9,
        "mfu": measure.mfu(flops, seconds, process),
        "memory": measure.memory((parameters + beside) * 1e6, trained * 1e6, activations, process),
    }  # fmt: skip


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    common.at_least(args, steps=1, batch=0, seed=0)
    plan.claim(args.json)
    process = measure.here(args.dtype)
    if "full" in args.sizes and process.device.type == "cpu":
        raise InputError("the full size needs a GPU: leave it out of --sizes (its cost: python -m benchmarks.plan)")
    print(f"{measure.where(process)}; medians of {args.steps} steps")
    print(f"{'stage':8s} {'size':6s} {'variant':14s} {'M':>8s} {'frozen':>8s} {'batch':>6s} {'s/step':>8s} "
          f"{'samples/s':>10s} {'GFLOP':>9s} {'GiB':>7s} {'MFU':>6s}")  # fmt: skip
    rows = []
    for name in args.stages:
        for size in args.sizes:
            for variant in args.variants:
                r = bench(name, size, variant, args, process)
                rows.append(r)
                mfu = f"{r['mfu']:6.1%}" if r["mfu"] else f"{'-':>6s}"
                print(f"{name:8s} {size:6s} {variant:14s} {r['parameters']:8.2f} {r['frozen']:8.2f} {r['batch']:6d} "
                      f"{r['seconds']:8.3f} {r['samples']:10.2f} {r['gflop']:9.1f} {r['memory']:7.2f} {mfu}",
                      flush=True)  # fmt: skip
    if args.json:
        common.write_json(Path(args.json), rows)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    common.run_main(main, resumes=False)
