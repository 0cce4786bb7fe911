"""Seconds per training step of the latent action model: forward, backward, clipping and AdamW, on random frames.

    python -m benchmarks.lam_step                                        # tiny, small and bench on this CPU
    python -m benchmarks.lam_step --sizes bench --variants plain compile # 8 to 11 M parameters, 8 frames of 112 px
    python -m benchmarks.lam_step --sizes full --batch 4                 # a GPU: the paper's model, random weights
    python -m benchmarks.lam_step --sizes bench --profile                # where the time goes

Loading data is not in it. FLOPs are the model's own, counted by benchmarks/plan.py: what checkpointing recomputes costs
time and counts for nothing. Memory: what CUDA's allocator gave out at most; on a CPU the weights, their gradients and
AdamW's moments, and the peak of all other tensors alive. "reference" is a stand-in, written here, for the latent action
models without a language model (a spatio-temporal transformer over pixels in villa-X's proportions: 10 M parameters,
8 frames of 112 px, about as many FLOPs); it is not villa-X's code.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import lam
from benchmarks import measure, plan
from common import InputError
from data.windows import to_device

# Between tiny and small, with frames of 112 px: patches of 14 pixels and 16 visual tokens a frame, as InternVL has them
# for its image size, and 14 x 14 patches of 8 pixels for the decoder.
common.VLM_SIZES["internvl-bench"] = common.vlm_size(vision=(192, 4, 4, 512, 112, 14), text=(256, 4, 8, 4, 768))
lam.SANA_SIZES["sana-bench"] = lam.SANA_SIZES["sana-small"]
SIZES = {
    "tiny": lam.TINY, "small": lam.SMALL, "full": lam.Args(),
    "bench": replace(
        lam.SMALL, encoder="internvl-bench", decoder="sana-bench", frames=8, image_size=112, motion_width=192,
        motion_heads=6, batch=2,
    ),
}  # fmt: skip


@dataclass
class Args:
    sizes: tuple[Literal["tiny", "small", "bench", "full", "reference"], ...] = ("tiny", "small", "bench", "reference")
    """Presets of lam.py, the size for comparison with others, and the stand-in for others."""
    variants: tuple[Literal["plain", "checkpointing", "compile", "both"], ...] = ("plain",)
    """With activation checkpointing, with every layer compiled, with both."""
    batch: int = 0
    """Windows in a step; 0: as the preset has it (reference: 2)."""
    steps: int = 5
    """Steps that are timed, after two that are not; the median counts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 on a GPU, float32 on a CPU, where `lam.py --small` asks for bfloat16."""
    fused: bool = False
    """AdamW as one kernel."""
    channels_last: bool = False
    """Weights and latents of convolutions with the channels innermost."""
    profile: bool = False
    """Print the operations that a step spends its time in."""
    json: str = ""
    """Write the table to this file, too."""


# --------------------------------------------------------------------------------------------------------------------
# The stand-in
# --------------------------------------------------------------------------------------------------------------------


class SpaceTimeBlock(nn.Module):
    """Attention within a frame, causal attention along time at each place, an MLP: (B, T, N, D) -> the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.space, self.time = (lam.Attention(width, width, width, heads) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        h = rearrange(self.norms[0](x), "b t n d -> (b t) n d")
        x = x + rearrange(self.space(h, h), "(b t) n d -> b t n d", b=b)
        h = rearrange(self.norms[1](x), "b t n d -> (b n) t d")
        x = x + rearrange(self.time(h, h), "(b n) t d -> b t n d", b=b)
        return x + self.mlp(self.norms[2](x))


class Reference(nn.Module):
    """Frames -> a latent action between each two -> the next frame from the one before and its latent action."""

    def __init__(self, width: int = 256, heads: int = 8, encoder: int = 5, decoder: int = 4, frames: int = 8):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 14, 14)
        self.place = nn.Parameter(torch.randn(frames, 64, width) * 0.02)
        self.encoder = nn.ModuleList(SpaceTimeBlock(width, heads) for _ in range(encoder))
        self.decoder = nn.ModuleList(SpaceTimeBlock(width, heads) for _ in range(decoder))
        self.latent = nn.Linear(2 * width, width)
        self.pixels = nn.Linear(width, 3 * 14 * 14)

    def forward(self, video: Tensor) -> Tensor:
        """video (B, T, 3, 112, 112) in [-1, 1] -> the loss."""
        b = len(video)
        patches = rearrange(self.embed(video.flatten(0, 1)), "(b t) d h w -> b t (h w) d", b=b) + self.place
        x = patches
        for block in self.encoder:
            x = block(x)
        z = self.latent(torch.cat([x[:, :-1].mean(2), x[:, 1:].mean(2)], -1))
        x = patches[:, :-1] + z[:, :, None]
        for block in self.decoder:
            x = block(x)
        shape = dict(h=8, p=14, q=14)
        return F.mse_loss(rearrange(self.pixels(x), "b t (h w) (c p q) -> b t c (h p) (w q)", **shape), video[:, 1:])


def plan_reference(batch: int) -> plan.Stage:
    args = replace(SIZES["bench"], batch=batch)
    step = lambda model: model(torch.rand(batch, 8, 3, 112, 112) * 2 - 1)
    return plan.Stage(args, lambda checkpointing: Reference(), step, {"": "reference"}, lambda model: {})


# --------------------------------------------------------------------------------------------------------------------
# A step
# --------------------------------------------------------------------------------------------------------------------


def make_step(size: str, args: Args, process: common.Process, checkpointing: bool):
    """(model, its plan, loss(i): the loss of step i as train() computes it, on batches of random frames)."""
    torch.manual_seed(0)
    if size == "reference":
        stage = plan_reference(args.batch or 2)
        model = stage.build(False).to(process.device)
        video = torch.rand(args.batch or 2, 8, 3, 112, 112, device=process.device) * 2 - 1
        return model, stage, lambda i: model(video)
    asked = SIZES[size]
    asked = replace(asked, batch=args.batch or asked.batch, checkpointing=checkpointing)
    stage = plan.plan_lam(asked)
    with process.device:
        model = stage.build(checkpointing)
    b, channels = asked.batch, model.decoder.config.in_channels
    shape = (b, asked.frames, 3, asked.image_size, asked.image_size)
    g = torch.Generator().manual_seed(0)
    batch = {
        "video": torch.randint(0, 256, shape, generator=g, dtype=torch.uint8), "index": torch.arange(b),
        "action": torch.rand(b, asked.frames - 1, len(common.ACTION_NAMES), generator=g),
        "action_mask": torch.ones(b, asked.frames - 1, len(common.ACTION_NAMES), dtype=torch.bool),
        "instruction": plan.instructions(b),
    }  # fmt: skip
    batch = to_device(batch, process.device)
    codec: Any
    if stage.frozen:  # the autoencoder from random weights: its latents mean nothing, their cost is the same
        with process.device:
            vae = stage.frozen["image autoencoder"][0]().to(process.dtype).eval()
        encode = lambda x: vae.encode((x.float() / 127.5 - 1).to(process.dtype)).latent.float()
        codec = SimpleNamespace(encode=torch.no_grad()(encode))
    else:
        codec = lam.load_codec(asked.decoder, channels, process)
    counts = lam.valid_counts(batch["action_mask"])

    def loss(i: int) -> Tensor:
        return lam.micro_step(model, codec, batch | {"index": batch["index"] + i * b}, counts, asked)[0]

    return model, stage, loss


def bench(size: str, variant: str, args: Args, process: common.Process) -> dict:
    """One row of the table."""
    checkpointing, compiled = variant in ("checkpointing", "both"), variant in ("compile", "both")
    model, stage, loss = make_step(size, args, process, checkpointing)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if compiled:
        for layer in plan.units(model):
            layer.compile()
    step = measure.training_step(model, loss, process, args.fused)
    seconds = measure.time_training(step, args.steps, process)
    if args.profile:
        measure.profile(lambda: step(0), process)
    parameters, trained = lam.count(model) * 1e6, lam.count(model, trained=True) * 1e6
    model = loss = step = None  # before the next size needs the memory
    flops, activations = measure.planned(stage, checkpointing, process)
    frames = stage.args.batch * stage.args.frames
    return {
        "size": size, "variant": variant, "parameters": parameters / 1e6, "batch": stage.args.batch,
        "frames": stage.args.frames, "pixels": stage.args.image_size, "seconds": seconds, "per_frame": seconds / frames,
        "gflop": flops / 1e9, "per_gflop": seconds / (flops / 1e9), "mfu": measure.mfu(flops, seconds, process),
        "memory": measure.memory(parameters, trained, activations, process),
    }  # fmt: skip


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    common.at_least(args, steps=1, batch=0)
    plan.claim(args.json)
    process = measure.here(args.dtype)
    if "full" in args.sizes and process.device.type == "cpu":
        raise InputError("the full size needs a GPU: leave it out of --sizes (its cost: python -m benchmarks.plan lam)")
    print(f"{measure.where(process)}; medians of {args.steps} steps")
    print(f"{'size':10s} {'variant':14s} {'M':>8s} {'batch':>6s} {'frames':>8s} {'s/step':>8s} {'s/frame':>8s} "
          f"{'GFLOP':>9s} {'s/GFLOP':>8s} {'GiB':>6s} {'MFU':>6s}")  # fmt: skip
    rows = []
    for size in args.sizes:
        for variant in args.variants if size != "reference" else ("plain",):
            r = bench(size, variant, args, process)
            rows.append(r)
            mfu = f"{r['mfu']:6.1%}" if r["mfu"] else f"{'-':>6s}"
            print(f"{size:10s} {variant:14s} {r['parameters']:8.2f} {r['batch']:6d} {r['frames']:3d}x{r['pixels']:<4d} "
                  f"{r['seconds']:8.3f} {r['per_frame']:8.4f} {r['gflop']:9.1f} {r['per_gflop']:8.4f} "
                  f"{r['memory']:6.2f} {mfu}", flush=True)  # fmt: skip
    if args.json:
        common.write_json(Path(args.json), rows)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    common.run_main(main, resumes=False)
