"""What a run costs, before it is paid for: parameters, bytes on every GPU, tokens and FLOPs of a step, hours.

    python -m benchmarks.plan lam                                    # the paper's run on 16 GPUs of 40 GiB
    python -m benchmarks.plan lam --batch 8 --accumulate 4           # any flag of lam.py
    python -m benchmarks.plan lam --gpus 8 --gpu-memory 141 --gpu-tflops 989 --mfu 0.45
    python -m benchmarks.plan distill                                # stage 2 and 3 likewise
    python -m benchmarks.plan lam --tiny --check                     # against a real step on this CPU

Nothing is downloaded and nothing large allocated: the real classes are built on the meta device from the published
architectures (ARCHITECTURES), and the real forward and backward pass run on tensors that have shapes and no values. So

- FLOPs are counted operation by operation (a multiply-add is 2; a causal mask saves nothing). "Model" FLOPs, which MFU
  refers to, leave out what checkpointing recomputes; "hardware" FLOPs have it.
- Activations are the peak of all bytes that are alive at the same time during the step, weights and their gradients
  apart, with the types that autocast gives them on a GPU and with fused attention.
- Weights, gradients and AdamW's moments are float32, an equal share of each on every GPU of a group of --gpus /
  --replicas; the unit at work, the next one and the root are gathered in bfloat16, and the unit's gradient is there
  whole, in bfloat16 and in float32, while it is reduced. A unit is a layer (an element of a ModuleList).

Checked: parameters against the published counts; FLOPs of a traced step equal those of a real one to the last, and its
peak of tensors within 3 % (tests/test_plan.py; --check). Resident memory of a CPU process rises by 1.4 to 1.5 times
that peak at --tiny, with what the kernels and the C allocator take. Not yet checked on a GPU.

Not in it: what the allocator fragments, the CUDA context and NCCL's buffers (RESERVE stands for them), the data
loader, validation, time lost to communication (it is part of the MFU that you assume).
"""

import contextlib
import ctypes
import math
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import distill
import finetune
import lam
from common import InputError

GIB = 2**30
RESERVE = 2 * GIB  # CUDA context, NCCL's buffers, fragmentation (our choice)

# Published architectures, where they differ from their classes' defaults.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "OpenGVLab/InternVL3_5-2B-HF": dict(  # InternViT-300M (the class's default), Qwen3-1.7B with a head of its own
        text_config=dict(
            model_type="qwen3", hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
            tie_word_embeddings=False,
        ),
        model_type="internvl", tie_word_embeddings=False, image_seq_length=256,
    ),
    "lerobot/pi05_base": common.PI05,  # its VLM; its expert is finetune.py's "300m"
    "google/paligemma-3b-pt-224": common.PI05 | {"text": common.PI05["text"] | {"vocab_size": 257216}},
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": dict(sample_size=16),  # else as diffusers' class
    "Efficient-Large-Model/Sana_1600M_512px_diffusers/vae": dict(  # DC-AE f32c32
        latent_channels=32, scaling_factor=0.41407, downsample_block_type="conv", upsample_block_type="interpolate",
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), decoder_layers_per_block=(3,) * 6,
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    ),
}  # fmt: skip


@dataclass
class Args:
    gpus: int = 16
    """GPUs of the run. (Sec. 4.1)"""
    replicas: int = 1
    """Groups that each hold a whole model (hybrid sharding); 1: every GPU holds a share of one. (our choice)"""
    gpu_memory: float = 40
    """Memory of a GPU in GiB. (Sec. 4.1: A100 of 40 GB)"""
    gpu_tflops: float = 312
    """Peak of a GPU in bfloat16, in TFLOP/s: A100 312, H100 and H200 989."""
    mfu: float = 0.4
    """Share of that peak that the model's own FLOPs are assumed to reach. (our choice)"""
    check: bool = False
    """Compare with a real step on this CPU, in float32: for --tiny and --small."""
    json: str = ""
    """Write the numbers to this file, too."""


# --------------------------------------------------------------------------------------------------------------------
# Running a step without values
# --------------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made under it: those alive `now`, and their `peak`. Views count once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known and storage not in known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.now -= size


class Values(TorchFunctionMode):
    """Lets the model run on fake tensors: what is computed from token ids and masks alone keeps its values, so that
    indexing by a mask has a shape. With `gpu`, attention and autocast behave as on a GPU."""

    def __init__(self, gpu: bool):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        faked = any(isinstance(x, FakeTensor) for x in given)
        if func in (torch.tensor, torch.arange) or (given and not faked):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            if isinstance(out, Tensor) and (out.numel() > 1e6 or out.is_floating_point()):
                return torch.empty(out.shape, dtype=out.dtype)  # too large to keep, or a number like any other
            return out
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and not isinstance(args[1], FakeTensor):
            if args[1].dtype == torch.bool:
                with unset_fake_temporarily():
                    args = (args[0], args[1].nonzero(as_tuple=True))
        if self.gpu and func is F.scaled_dot_product_attention:
            return gpu_attention(*args, **kwargs)
        if self.gpu and func is torch.layer_norm:  # in float32 under CUDA's autocast, not under the CPU's
            args = [x.float() if isinstance(x, Tensor) else x for x in args]
        return func(*args, **kwargs)


def gpu_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """What PyTorch chooses on a GPU: flash attention, or with a mask the memory-efficient kernel and a bias."""
    q, k, v = (x.bfloat16() for x in (q, k, v))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    bias = torch.where(attn_mask, 0.0, -math.inf).bfloat16() if attn_mask.dtype == torch.bool else attn_mask
    bias = bias.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, scale=scale)[0]


def _conv_backward(grad, x, weight, bias, stride, padding, dilation, transposed, out_padding, groups, mask, **_) -> int:
    """The gradients of input and of weights cost a forward pass each (PyTorch's own formula counts a grouped
    convolution as a full one)."""
    positions = math.prod(x[2:] if transposed else grad[2:])
    return 2 * grad[0] * positions * math.prod(weight) * (int(mask[0]) + int(mask[1]))


def _attention(q, k, v, *_, **__) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def _attention_backward(grad, q, k, v, *_, **__) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (3 * q[3] + 2 * v[3])


class _NoModules(contextlib.nullcontext):
    parents = frozenset({"Global"})


def count_flops(by_module: bool) -> FlopCounterMode:
    """PyTorch's counter, with the formulas that it lacks or has wrong. Its hooks that tell modules apart keep alive
    what checkpointing recomputes: without them where memory matters."""
    aten = torch.ops.aten
    own = {
        aten.convolution_backward: _conv_backward,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=own)
    if not by_module:
        counter.mod_tracker = _NoModules()
    return counter


def fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Replaces parameters and buffers by fake ones of the same shapes (call it in a FakeTensorMode)."""
    made: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                new = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad)
                part._parameters[name] = made.setdefault(id(p), new)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = torch.empty(x.shape, dtype=x.dtype)


@dataclass
class Cost:
    """One micro-batch on one GPU: FLOPs, those of the forward pass by part, and bytes of activations: kept for the
    backward pass, and the peak."""

    flops: int
    parts: dict[str, int]
    kept: int
    peak: int


def measure(module: nn.Module, step: Callable[[], Tensor | None], prefixes: dict[str, str]) -> Cost:
    """Runs step() and its backward pass. Gradients of parameters go as soon as they are there: a sharded run keeps
    its share of them."""
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
             for p in module.parameters() if p.requires_grad]  # fmt: skip
    with count_flops(by_module=bool(prefixes)) as counter, LiveBytes() as live:
        loss = step()
        kept, counts = live.now, {k: sum(v.values()) for k, v in counter.get_flop_counts().items()}
        if loss is not None:
            # As loss.backward() does, which would leave Values first: what is recomputed has to run under it, too.
            engine, ones = torch.autograd.Variable._execution_engine, torch.ones_like(loss)
            engine.run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    for hook in hooks:
        hook.remove()
    counts.pop("Global", None)
    forward = {k.removeprefix(type(module).__name__).removeprefix("."): v for k, v in counts.items()}
    return Cost(counter.get_total_flops(), flops_of_parts(forward, prefixes), kept, live.peak)


def part_of(name: str, prefixes: dict[str, str]) -> str:
    """The part that a parameter or module belongs to: that of its longest prefix."""
    return prefixes.get(max((x for x in prefixes if name.startswith(x)), key=len, default=None), "other")


def flops_of_parts(counts: dict[str, int], prefixes: dict[str, str]) -> dict[str, int]:
    """{module: FLOPs with all that it contains} -> {part: FLOPs}."""
    parts: dict[str, int] = {}
    for name, flops in counts.items():
        part = part_of(name, prefixes)
        above = name
        while above:
            above = above.rpartition(".")[0]
            if above in counts:
                parts[part_of(above, prefixes)] = parts.get(part_of(above, prefixes), 0) - flops
                break
        parts[part] = parts.get(part, 0) + flops
    return {k: v for k, v in parts.items() if v}


def trace(module: nn.Module, step: Callable[[], Tensor | None], gpu: bool, dtype=torch.float32, prefixes=()) -> Cost:
    """`measure` without values: as on a GPU with parameters of `dtype` under bfloat16's autocast, or as on this CPU."""
    # On a CPU backend, as this build of PyTorch may have no other: Values makes the differences.
    autocast = torch.autocast("cpu", torch.bfloat16) if gpu else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake(module, dtype)
        with Values(gpu), autocast:
            return measure(module, step, dict(prefixes))


# --------------------------------------------------------------------------------------------------------------------
# The stages: what is built, and one micro-batch
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A training stage as the plan needs it."""

    args: Any
    """The stage's own arguments: batch, accumulate, steps, checkpointing."""
    build: Callable[[bool], nn.Module]
    """The model, with or without activation checkpointing, on the current device."""
    step: Callable[[nn.Module], Tensor]
    """The loss of one micro-batch of `batch` samples of zeros."""
    parts: dict[str, str]
    """Prefix of a parameter's name -> part of the model; the longest prefix counts."""
    tokens: Callable[[nn.Module], dict[str, int]]
    """Tokens of one sample, by kind."""
    frozen: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = field(default_factory=dict)
    """Models beside it that are not trained: how to build one, and what it does in a micro-batch."""
    sharded: bool = False
    """Whether each GPU holds its share of these, in float32; else it holds all of them, in bfloat16."""


def plan_lam(args: lam.Args) -> Stage:
    """lam.py: InternVL and SANA at any size, and the autoencoder at the full one."""
    vae = ARCHITECTURES.get(f"{args.decoder}/vae")

    def build(checkpointing: bool) -> nn.Module:
        vlm, tokenizer = make_vlm(args.encoder)
        if args.decoder in lam.SANA_SIZES:
            config = lam.SANA_SIZES[args.decoder] | {"caption_channels": args.latent_dim}
        else:
            config = architecture(args.decoder)
        sana = SanaTransformer2DModel(**config)
        return lam.assemble(replace(args, checkpointing=checkpointing), vlm, tokenizer, sana).train()

    def images() -> Tensor:
        return torch.zeros(args.batch, 3, args.image_size, args.image_size, dtype=torch.uint8)

    def step(model: nn.Module) -> Tensor:
        b, actions = args.batch, args.frames - 1
        factor = 32 if vae else math.isqrt(model.decoder.config.in_channels // 3)
        side = args.image_size // factor
        latents = torch.zeros(b, model.decoder.config.in_channels, side, side)
        batch = {"action": torch.zeros(b, actions, len(common.ACTION_NAMES))}
        batch["action_mask"] = torch.zeros(batch["action"].shape, dtype=torch.bool)
        video = torch.zeros(b, args.frames, *images().shape[1:], dtype=torch.uint8)
        velocity, predicted = model(video, instructions(b), latents, latents, torch.zeros(b))
        return lam.lam_loss(velocity, latents, predicted, batch, torch.ones(2), args.lambda_a)[0]

    def encode(codec: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(2):  # the first and the last frame
                codec.encode((images().float() / 127.5 - 1).bfloat16())

    def tokens(model: nn.Module) -> dict[str, int]:
        length = model.encoder.tokenize(instructions(args.batch), args.frames)[0].shape[1]
        seen = args.frames * model.encoder.config.image_seq_length
        latent = args.scene_tokens + args.motion_tokens
        return {"image": seen, "latent": latent, "text": length - seen - latent}

    parts = {
        "encoder.vlm.vision_tower": "vision encoder", "encoder.vlm": "language model", "encoder": "queries, head",
        "decoder.sana": "scene stream (SANA)", "decoder.current": "scene stream, added",
        "decoder.to_caption": "scene stream, added", "decoder.to_scene": "exchange", "decoder": "motion stream",
    }  # fmt: skip
    frozen = {"image autoencoder": (lambda: AutoencoderDC(**vae), encode)} if vae else {}
    return Stage(args, build, step, parts, tokens, frozen)


def plan_distill(args: distill.Args) -> Stage:
    """distill.py: the student, and the teacher of lam.py's preset of the same size."""
    teacher = {"paligemma-tiny": lam.TINY, "paligemma-small": lam.SMALL}.get(args.student, lam.Args())
    counts = (teacher.scene_tokens, teacher.motion_tokens)

    def build(checkpointing: bool) -> nn.Module:
        student = distill.assemble(*make_vlm(args.student), counts, teacher.latent_dim, checkpointing)
        return student.train()

    def step(model: distill.Student) -> Tensor:
        b, texts = args.batch, ["lower the gripper around the cup"] * args.batch
        hat, logits, words = model(images(b, 1, model.image_size), instructions(b), texts)
        z = torch.zeros(b, sum(counts), teacher.latent_dim)
        return distill.distill_loss(hat, z, logits, words, torch.tensor(float(words.numel())), args.lambda_r)[0]

    def make_teacher() -> nn.Module:
        return lam.Encoder(*make_vlm(teacher.encoder), *counts, teacher.latent_dim).eval().requires_grad_(False)

    def teach(encoder: lam.Encoder) -> None:
        with torch.no_grad():
            encoder(images(args.batch, teacher.frames, teacher.image_size), instructions(args.batch))

    def tokens(model: distill.Student) -> dict[str, int]:
        seen = teacher.frames * make_teacher().config.image_seq_length
        texts = ["lower the gripper around the cup" + model.tokenizer.eos_token]
        return {"image": patches(model), "text": words(model), "latent": sum(counts),
                "subtask": model.ids(texts)[0].shape[1], "image, teacher": seen}  # fmt: skip

    parts = {"vlm.vision_tower": "vision encoder", "vlm.language_model": "language model", "": "projector, head"}
    return Stage(args, build, step, parts, tokens, {"teacher": (make_teacher, teach)}, sharded=True)


def plan_finetune(args: finetune.Args) -> Stage:
    """finetune.py: around the student that --init names, or for a distilled one around that of the expert's size. FSDP
    leaves the student's last layer with the root; here it is a unit like the others (0.2 GiB at full size)."""
    known = args.init in ARCHITECTURES or args.init in common.VLM_SIZES
    same = {"tiny": "paligemma-tiny", "small": "paligemma-small"}.get(args.expert, "lerobot/pi05_base")

    def build(checkpointing: bool) -> nn.Module:
        vlm, tokenizer = make_vlm(args.init if known else same)
        student = distill.Student(vlm, tokenizer, args.latents, vlm.config.text_config.hidden_size)
        size = finetune.expert_size(args.expert)
        model = finetune.VLA(student, size, args.chunk, len(args.cameras), checkpointing).train()
        model.freeze_unread()
        return model

    def step(model: finetune.VLA) -> Tensor:
        b, k = args.batch, len(args.cameras)
        state, target = torch.zeros(b, len(common.STATE_NAMES)), torch.zeros(b, args.chunk, len(common.ACTION_NAMES))
        actions = model(images(b, k, model.student.image_size), state, instructions(b))
        mask = torch.zeros(target.shape, dtype=torch.bool)
        return finetune.policy_loss(actions, target, mask, torch.ones(2))[0]

    def tokens(model: finetune.VLA) -> dict[str, int]:
        student = model.student
        return {"image": len(args.cameras) * patches(student), "text": words(student), "latent": sum(args.latents),
                "state, action": 1 + args.chunk}  # fmt: skip

    parts = {
        "student.vlm.vision_tower": "vision encoder", "student.vlm.language_model": "language model",
        "expert": "action expert", "": "projector, queries, heads",
    }  # fmt: skip
    return Stage(args, build, step, parts, tokens)


STAGES = {"lam": (lam, plan_lam), "distill": (distill, plan_distill), "finetune": (finetune, plan_finetune)}


def images(batch: int, frames: int, size: int) -> Tensor:
    return torch.zeros(batch, frames, 3, size, size, dtype=torch.uint8)


def patches(student: distill.Student) -> int:
    return (student.image_size // student.config.vision_config.patch_size) ** 2


def words(student: distill.Student) -> int:
    """Tokens of a prompt: of the longer of `instructions`."""
    prompts = [common.STUDENT_PROMPT.format(sent=s) for s in instructions(2)]
    return student.ids(prompts, start=student.tokenizer.bos_token)[0].shape[1]


def instructions(batch: int) -> list[str]:
    """Unequal lengths, as in a run: then the language model needs a mask."""
    return ["pick up the red cup", "close the oven"] * (batch // 2) + ["pick up the red cup"] * (batch % 2)


def architecture(source: str) -> dict[str, Any]:
    if source not in ARCHITECTURES:
        raise InputError(f"the plan knows no architecture {source!r}, only {sorted(ARCHITECTURES)} and the sizes that "
                         f"start from random weights: {[*common.VLM_SIZES, *lam.SANA_SIZES]}")  # fmt: skip
    return ARCHITECTURES[source]


def make_vlm(source: str) -> tuple[nn.Module, Any]:
    """As common.load_vlm, from an architecture: its tokenizer is our small one, which spells the template in nearly as
    many words as the published one."""
    import transformers as tf

    tf.logging.set_verbosity_error()
    if source in common.VLM_SIZES:
        return common.load_vlm(source)
    known = architecture(source)
    if "text" in known:
        config = common.paligemma_config(known["vision"], known["text"], image_token=257152)
        kind = tf.PaliGemmaForConditionalGeneration
    else:
        config, kind = tf.InternVLConfig(**known), tf.InternVLForConditionalGeneration
    return kind._from_config(config, dtype=torch.float32), common.make_tokenizer()


# --------------------------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------------------------


def count_parts(model: nn.Module, prefixes: dict[str, str]) -> dict[str, tuple[int, int]]:
    """{part: (parameters, of which trained)}; tied parameters count once."""
    counts = {part: [0, 0] for part in prefixes.values()}
    for name, p in model.named_parameters():
        entry = counts.setdefault(part_of(name, prefixes), [0, 0])
        entry[0] += p.numel()
        entry[1] += p.numel() * p.requires_grad
    return {k: (total, trained) for k, (total, trained) in counts.items() if total}


def units(model: nn.Module) -> list[nn.Module]:
    """The layers that FSDP gathers one by one: every element of an outermost ModuleList, as in the stages' shard()."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [unit for child in model.children() for unit in units(child)]


def state_bytes(model: nn.Module, args: Args) -> dict[str, int]:
    """Bytes per GPU of everything that is there whatever the batch."""
    size = lambda module, trained=False: sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
    total, trained, share = size(model), size(model, True), args.gpus // args.replicas
    states = {
        "weights (float32)": 4 * total // share,
        "gradients (float32)": 4 * trained // share,
        "AdamW's moments (float32)": 8 * trained // share,
    }
    if args.gpus > 1:
        states["gathered units (bfloat16)"] = gathered_bytes(model)
        states["gradient being reduced"] = (2 + 4) * max(size(x, True) for x in units(model))
    return states


def gathered_bytes(model: nn.Module) -> int:
    """Whole parameters on each GPU at a time: the root's, the unit's at work, and the next one's."""
    size = lambda module: sum(p.numel() for p in module.parameters())
    layers = units(model)
    root = size(model) - sum(map(size, layers))
    return 2 * (root + 2 * max(map(size, layers)))


def make_plan(stage: Stage, args: Args) -> dict[str, Any]:
    """All numbers. Raises InputError for groups that do not divide."""
    common.at_least(args, gpus=1, replicas=1, gpu_memory=1e-9, gpu_tflops=1e-9, mfu=1e-9)
    if args.gpus % args.replicas:
        raise InputError(f"--gpus {args.gpus} do not divide into --replicas {args.replicas} groups")
    with torch.device("meta"):
        model = stage.build(False)
        recomputing = stage.build(True)
        frozen = {name: make() for name, (make, _) in stage.frozen.items()}
    dtype = torch.bfloat16 if args.gpus > 1 else torch.float32
    shared = stage.sharded and args.gpus > 1
    parts = count_parts(model, stage.parts)
    states = state_bytes(model, args)
    tokens = stage.tokens(model)
    keep = trace(model, lambda: stage.step(model), True, dtype, stage.parts)
    recompute = trace(recomputing, lambda: stage.step(recomputing), True, dtype)
    extra_flops = extra_peak = 0
    for name, module in frozen.items():
        parts[name] = (sum(p.numel() for p in module.parameters()), 0)
        kind, each = ("float32", 4) if stage.sharded else ("bfloat16", 2)
        states[f"{name} ({kind})"] = each * parts[name][0] // (args.gpus // args.replicas if shared else 1)
        gathered = gathered_bytes(module) if shared else 0  # while it runs, and the other model does not
        seen_as = torch.float32 if stage.sharded and not shared else torch.bfloat16
        cost = trace(module, lambda m=module, n=name: stage.frozen[n][1](m), True, seen_as)
        extra_flops, extra_peak = extra_flops + cost.flops, max(extra_peak, cost.peak + gathered)
    chosen, micro = (recompute if stage.args.checkpointing else keep), stage.args.accumulate * args.gpus
    peak = max(chosen.peak, extra_peak)
    step_flops = (keep.flops + extra_flops) * micro
    seconds = step_flops / (args.gpus * args.gpu_tflops * 1e12 * args.mfu)
    limit = args.gpu_memory * GIB - RESERVE - sum(states.values())
    return {
        "batch": stage.args.batch, "accumulate": stage.args.accumulate, "global_batch": stage.args.batch * micro,
        "gpus": args.gpus, "replicas": args.replicas, "parameters": parts, "tokens": tokens, "states": states,
        "checkpointing": stage.args.checkpointing, "activations": {
            "kept": keep.kept, "peak": keep.peak, "kept_checkpointing": recompute.kept,
            "peak_checkpointing": recompute.peak, "frozen_models_peak": extra_peak,
        },
        "flops_parts": keep.parts, "flops_micro_batch": keep.flops + extra_flops, "flops_frozen_models": extra_flops,
        "flops_step": step_flops, "hardware_flops_step": (chosen.flops + extra_flops) * micro,
        "seconds_step": seconds, "steps": stage.args.steps, "hours": seconds * stage.args.steps / 3600,
        "total": sum(states.values()) + peak + RESERVE, "fits": peak <= limit,
        "fits_checkpointing": max(recompute.peak, extra_peak) <= limit,
        # Activations grow in proportion to the batch.
        "largest_batch": max(0, int(limit / peak * stage.args.batch)),
    }  # fmt: skip


def show(plan: dict[str, Any], args: Args) -> None:
    gib = lambda x: f"{x / GIB:7.2f} GiB"
    print(f"{'parameters':34s} {'M':>10s} {'trained':>10s} {'TFLOP forward':>14s}")
    for part, (total, trained) in plan["parameters"].items():
        flops = plan["flops_parts"].get(part) or (plan["flops_frozen_models"] if trained == 0 else 0)
        print(f"  {part:32s} {total / 1e6:10.1f} {trained / 1e6:10.1f} {flops / 1e12:14.3f}")
    total, trained = (sum(x) for x in zip(*plan["parameters"].values(), strict=True))
    print(f"  {'all':32s} {total / 1e6:10.1f} {trained / 1e6:10.1f}   forward and backward, a micro-batch: "
          f"{plan['flops_micro_batch'] / 1e12:.3f} TFLOP")  # fmt: skip

    groups = f"{args.replicas} groups of {args.gpus // args.replicas}" if args.replicas > 1 else "one group"
    print(f"\nbytes on each of {args.gpus} GPUs, {groups}, micro-batch {plan['batch']}")
    for name, size in plan["states"].items():
        print(f"  {name:32s} {gib(size)}")
    a = plan["activations"]
    for name, suffix in (("without", ""), ("with", "_checkpointing")):
        used = "" if plan["checkpointing"] == bool(suffix) else "  (not this run)"
        print(f"  activations {name + ' checkpointing':20s} {gib(a['peak' + suffix])}  kept for the backward pass "
              f"{a['kept' + suffix] / GIB:.2f}{used}")  # fmt: skip
    if a["frozen_models_peak"]:
        print(f"  {'frozen models, at another time':32s} {gib(a['frozen_models_peak'])}")
    print(f"  {'reserve (assumed)':32s} {gib(RESERVE)}")
    print(f"  {'all':32s} {gib(plan['total'])}")
    verdict = f"fits into {args.gpu_memory:g} GiB"
    if not plan["fits"]:
        verdict = f"does NOT fit into {args.gpu_memory:g} GiB: " + advice(plan)
    print(verdict)

    per_sample = sum(plan["tokens"].values())
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in plan["tokens"].items())
    print(f"\na step: {plan['global_batch']} samples of {per_sample:,} tokens ({kinds}), "
          f"{plan['global_batch'] * per_sample / 1e6:.2f} M tokens")  # fmt: skip
    print(f"        {plan['flops_step']:.2e} model FLOPs, {plan['hardware_flops_step']:.2e} with what is recomputed")
    print(f"        {plan['seconds_step']:.1f} s at an MFU of {args.mfu:.0%} of {args.gpu_tflops:g} TFLOP/s")
    print(f"{plan['steps']:,} steps: {plan['hours']:,.0f} hours = {plan['hours'] / 24:.1f} days, "
          f"{plan['hours'] * args.gpus:,.0f} GPU-hours")  # fmt: skip


def advice(plan: dict[str, Any]) -> str:
    """What would have to change, with the same global batch."""
    if not plan["checkpointing"] and plan["fits_checkpointing"]:
        return "add --checkpointing"
    whole = plan["batch"] * plan["accumulate"]
    fitting = [b for b in range(1, plan["batch"]) if whole % b == 0 and b <= plan["largest_batch"]]
    if not fitting:
        return "not at any micro-batch: more GPUs in a group, or larger ones"
    return f"--batch {fitting[-1]} --accumulate {whole // fitting[-1]} would, with the same global batch"


# --------------------------------------------------------------------------------------------------------------------
# Against a real step
# --------------------------------------------------------------------------------------------------------------------


def resident_peak(run: Callable[[], None]) -> int:
    """Bytes by which the process's resident memory rises at most while run() runs (Linux)."""
    status = lambda key: next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(key)) * 1024
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back, so that it is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS:")
    run()
    return status("VmHWM:") - before


def check(stage: Stage) -> dict[str, float]:
    """Two real steps on this CPU in float32 beside what the plan says of them: ratios of FLOPs, of the bytes of all
    tensors alive, and of resident memory, in which the allocator and the kernels' workspace take part."""
    values = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = stage.build(checkpointing)
        real = measure(model, lambda m=model: stage.step(m), {})
        rise = resident_peak(lambda m=model: measure(m, lambda: stage.step(m), {}))
        with torch.device("meta"):
            model = stage.build(checkpointing)
        planned = trace(model, lambda m=model: stage.step(m), False)
        name = f"checkpointing {'on' if checkpointing else 'off'}"
        print(f"{name:18s} planned {planned.flops / 1e9:9.2f} GFLOP, peak {planned.peak / 1e6:8.1f} MB; real step "
              f"{real.flops / 1e9:9.2f} GFLOP, tensors {real.peak / 1e6:8.1f} MB, resident memory rose by "
              f"{rise / 1e6:8.1f} MB")  # fmt: skip
        values |= {f"flops, {name}": real.flops / planned.flops, f"tensors, {name}": real.peak / planned.peak}
        values |= {f"resident, {name}": rise / planned.peak}
    print("real / planned: " + "; ".join(f"{k} {v:.3f}" for k, v in values.items()))
    return values


def claim(path: str) -> None:
    """Makes the folder of a file that is going to be written, so that a wrong name is noticed before the work."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        raise InputError(f"which stage? python -m benchmarks.plan {'|'.join(STAGES)} [flags of the plan and the stage]")
    args, rest = tyro.cli(Args, args=sys.argv[2:], description=__doc__, return_unknown_args=True)
    module, plan_stage = STAGES[sys.argv[1]]
    stage_args = common.parse_args(module.Args, {"tiny": module.TINY, "small": module.SMALL}, module.__doc__, rest)
    module.check(stage_args)
    common.at_least(args, gpus=1, replicas=1, gpu_memory=0, gpu_tflops=1e-3, mfu=1e-3)
    claim(args.json)
    stage = plan_stage(stage_args)
    if args.check:
        check(stage)
        return
    plan = make_plan(stage, args)
    show(plan, args)
    if args.json:
        common.write_json(Path(args.json), plan)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    common.run_main(main, resumes=False)
