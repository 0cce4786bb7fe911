"""Milliseconds from pictures to a chunk of actions, beside what the machine could do at best, and beside pi0.

    python -m benchmarks.policy_latency                              # small on a CPU, the full size on a GPU
    python -m benchmarks.policy_latency --views 2 --batches 1        # one row each: a GPU compiles for minutes a row

    ours            Policy.act of finetune.py: pictures and text in, one pass, actions in metres out; on a GPU compiled,
                    as CUDA graphs
    ours, eager     the same without compiling (GPU)
    pi0             transformers' PI0ForConditionalGeneration.sample_actions as it ships: the prefix once, then ten
                    denoising steps of its expert (--denoise)

Comparable: the VLM is the same class in the same size, from one configuration; so are the expert's width and depth, the
chunk, the numbers of state and action, views, batch, words, type of numbers, device. At the full size these are pi0's
own defaults. All weights are random: no time depends on them. Not equal: ours has 64 + 64 latent tokens (16 + 16 at
small) after its prompt, which pi0 has not, and its time includes preprocessing, tokenising and the checks of its input,
while pi0 is handed tensors on the device. pi0 is not compiled, as transformers does not compile it: compare it with
`ours, eager`, too. This is about time alone, and says nothing of success.

The limits are of the same model on the same machine in the same run. `weights`: bytes of all weights that a chunk
reads (ten times the expert's for pi0; of the word embedding nothing is counted) by the bandwidth of a copy in memory.
`FLOPs`: those of a chunk by the rate of a large matrix product. No implementation can be faster than the larger of
both, but for weights that fit into a CPU's cache. The models take turns call by call, so `pi0 / it`, the median of the
pairs' ratios, holds on a busy machine, too; `ms` is the median of the calls, `min` the fastest.
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import finetune
from benchmarks import measure, plan
from common import ACTION_NAMES, STATE_NAMES, InputError
from distill import Student

VIEWS = ("primary", "wrist", "side")
INSTRUCTION = "put the building block into the corresponding slot"
PRESETS = {"tiny": finetune.TINY, "small": finetune.SMALL, "full": finetune.Args()}


@dataclass
class Args:
    sizes: tuple[Literal["tiny", "small", "full"], ...] = ()
    """Models; none: small on a CPU, full on a GPU."""
    views: tuple[int, ...] = (1, 2, 3)
    """Camera views."""
    batches: tuple[int, ...] = (1, 16)
    """Samples in a call."""
    repeats: int = 30
    """Calls that are timed, after three that are not."""
    denoise: int = 10
    """Denoising steps of pi0. (its default)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and matrix products; auto: bfloat16 on a GPU and float32 on a CPU, as load_policy has them."""
    compile: bool = True
    """On a GPU: measure the compiled policy, too."""
    seed: int = 0
    """Of weights and pictures."""
    json: str = ""
    """Write the table to this file, too."""


def pi0_config(size: str) -> Any:
    """pi0's configuration: its defaults at the full size, else our VLM and expert of that size in it."""
    import transformers as tf

    shared = dict(chunk_size=PRESETS[size].chunk, max_state_dim=len(STATE_NAMES), max_action_dim=len(ACTION_NAMES))
    if size == "full":
        return tf.PI0Config(**shared)
    vlm = common.load_vlm(f"paligemma-{size}")[0].config
    same = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters")
    expert = finetune.EXPERT_SIZES[size] | {k: getattr(vlm.text_config, k) for k in same}
    return tf.PI0Config(vlm_config=vlm.to_dict(), dit_config=expert | {"model_type": "gemma"}, **shared)


def make_models(size: str, args: Args, process: common.Process) -> tuple[finetune.VLA, nn.Module]:
    """Ours and pi0 around VLMs of one configuration, with random weights, on the device."""
    import transformers as tf

    tf.logging.set_verbosity_error()
    config, preset = pi0_config(size), PRESETS[size]
    torch.manual_seed(args.seed)
    with process.device:
        vlm = tf.PaliGemmaForConditionalGeneration._from_config(config.vlm_config, dtype=torch.float32)
        student = Student(vlm, common.make_tokenizer(), preset.latents, config.vlm_config.text_config.hidden_size)
        ours = finetune.VLA(student, finetune.expert_size(preset.expert), preset.chunk, 1)
        pi0 = tf.PI0ForConditionalGeneration._from_config(config, dtype=process.dtype).eval()
    ours.freeze_unread()
    return ours, pi0


def read_bytes(ours: finetune.VLA, pi0: nn.Module, denoise: int, process: common.Process) -> dict[str, int]:
    """Bytes of weights that a chunk reads. What freeze_unread leaves out is not read, nor more than some words' rows of
    an embedding; pi0 reads its expert in every denoising step."""
    count = lambda module: sum(p.numel() for n, p in module.named_parameters() if "embed_tokens" not in n)
    unread = sum(p.numel() for p in ours.parameters() if not p.requires_grad)
    vlm = count(pi0.model.vlm)
    sizes = {"ours": count(ours) - unread, "pi0": vlm + denoise * (count(pi0) - vlm)}
    return {name: n * process.dtype.itemsize for name, n in sizes.items()}


def calls(
    size: str, ours: finetune.VLA, pi0: nn.Module, views: int, batch: int, args: Args, process: common.Process
) -> dict[str, Callable[[], Any]]:
    """What is timed with so many views and samples, by name."""
    g, pixels, texts = np.random.default_rng(args.seed), ours.student.image_size, [INSTRUCTION] * batch
    images = {c: g.integers(0, 256, (batch, pixels, pixels, 3), np.uint8) for c in VIEWS[:views]}
    state = g.uniform(size=(batch, len(STATE_NAMES))).astype(np.float32)
    for _, _, first in common.ARMS:
        state[:, first + 3 : first + 7] = 0, 0, 0, 1  # a quaternion
    ours.cameras, settings = views, replace(PRESETS[size], cameras=VIEWS[:views])
    made = {}
    if process.device.type == "cuda" and args.compile:
        compiled = finetune.Policy(ours, settings, process, "ours", compile=True)
        made["ours"] = lambda: compiled.act(images, state, texts)
    policy = finetune.Policy(ours, settings, process, "ours", compile=False)
    made["ours, eager" if made else "ours"] = lambda: policy.act(images, state, texts)

    ids, valid = ours.student.prompts(texts, views)
    vision = pi0.config.vlm_config.vision_config
    pictures = views * (vision.image_size // vision.patch_size) ** 2
    place = torch.full((batch, pictures), pi0.config.vlm_config.image_token_id, device=process.device)
    given = dict(
        state=torch.from_numpy(state).to(process.device, process.dtype), input_ids=torch.cat([place, ids], 1),
        attention_mask=torch.cat([torch.ones_like(place), valid.long()], 1),
        pixel_values=torch.rand(batch, views, 3, pixels, pixels, device=process.device, dtype=process.dtype) * 2 - 1,
        pixel_attention_mask=torch.ones(batch, views, dtype=torch.bool, device=process.device),
    )  # fmt: skip
    made["pi0"] = lambda: pi0.sample_actions(**given, num_steps=args.denoise)
    return made


def bench(size: str, args: Args, process: common.Process) -> Iterator[dict]:
    """The rows of a size."""
    ours, pi0 = make_models(size, args, process)
    weights = read_bytes(ours, pi0, args.denoise, process)
    bandwidth, peak = measure.bandwidth(process), measure.matmul_peak(process)
    million = {k: sum(p.numel() for p in m.parameters()) / 1e6 for k, m in (("ours", ours), ("pi0", pi0))}
    print(f"{size}: ours {million['ours']:.1f} M parameters, pi0 {million['pi0']:.1f} M; a copy moves "
          f"{bandwidth / 1e9:.1f} GB/s, a matrix product makes {peak / 1e12:.2f} TFLOP/s")  # fmt: skip
    for views in args.views:
        for batch in args.batches:
            timed = calls(size, ours, pi0, views, batch, args, process)
            flops = {}
            for name in ("ours, eager" if "ours, eager" in timed else "ours", "pi0"):
                with plan.count_flops(by_module=False) as counter:
                    timed[name]()
                flops[name.split(",")[0]] = counter.get_total_flops()
            seconds = measure.in_turns(timed, args.repeats, 3, process)
            for name, values in seconds.items():
                model = name.split(",")[0]
                limits = weights[model] / bandwidth, flops[model] / peak
                ratio = statistics.median(b / a for a, b in zip(values, seconds["pi0"], strict=True))
                yield {
                    "size": size, "views": views, "batch": batch, "model": name, "ms": 1e3 * statistics.median(values),
                    "min_ms": 1e3 * min(values), "weights_ms": 1e3 * limits[0], "flops_ms": 1e3 * limits[1],
                    "times_limit": statistics.median(values) / max(limits), "pi0_ratio": ratio,
                    "bandwidth": bandwidth, "peak": peak, "flops": flops[model], "bytes": weights[model],
                }  # fmt: skip


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    common.at_least(args, views=1, batches=1, repeats=1, denoise=1, seed=0)
    plan.claim(args.json)
    process = measure.here(args.dtype)
    gpu = process.device.type == "cuda"
    if max(args.views) > len(VIEWS):
        raise InputError(f"--views {list(args.views)}: a policy has one to {len(VIEWS)} views")
    sizes = args.sizes or ("full" if gpu else "small",)
    if "full" in sizes and not gpu:
        raise InputError("the full size needs a GPU: choose --sizes small")
    print(f"{measure.where(process)}; medians and minima of {args.repeats} calls, pi0 with {args.denoise} steps")
    rows = []
    for size in sizes:
        for r in bench(size, args, process):
            if not rows or rows[-1]["size"] != size:
                print(f"{'size':6s} {'views':>5s} {'batch':>5s} {'model':12s} {'ms':>9s} {'min':>9s} {'weights':>9s} "
                      f"{'FLOPs':>9s} {'x limit':>8s} {'pi0 / it':>8s}")  # fmt: skip
            rows.append(r)
            print(f"{size:6s} {r['views']:5d} {r['batch']:5d} {r['model']:12s} {r['ms']:9.2f} {r['min_ms']:9.2f} "
                  f"{r['weights_ms']:9.2f} {r['flops_ms']:9.2f} {r['times_limit']:8.1f} {r['pi0_ratio']:8.2f}",
                  flush=True)  # fmt: skip
    if args.json:
        common.write_json(Path(args.json), rows)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    common.run_main(main, resumes=False)
