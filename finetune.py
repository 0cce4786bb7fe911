"""Stage 3: the action expert (LatBot, arXiv 2511.23034, Sec. 3.3 "Action Expert Finetuning", 4.3, 6.3).

The distilled student knows what is about to happen, but cannot move a robot. Here a smaller Gemma stands beside it,
layer by layer, reads the student's keys and values, and writes the next H actions in one pass.

    images (B,K,3,H,H), instruction --> student --> keys and values of every layer     [ image | text | latents ]
                                                      |  |  |  (all of it is visible to the expert)
    state (B,46), H action queries  --> expert  ------+--+--+--> actions (B,H,44)

                  image  text  latents  state  queries
        state       1      1      1       1       1
        queries     1      1      1       1       1        the student's own rows: see distill.py; it never sees these

    L = L_ee + L_gripper        squared error on translation and rotation, cross-entropy on the gripper

    python finetune.py --tiny                                                       a CPU, about a minute
    python finetune.py --small --data runs/data/pick_cup --episodes 10              a laptop, a GPU in minutes
    torchrun --nproc-per-node 8 finetune.py --data datasets/libero                  LIBERO: 60,000 steps at batch 64
    python finetune.py --small --init paligemma-small --student-lr 1 --prefix-dropout 0 --data runs/data/play/fr3
    python finetune.py --small --init runs/small/finetune --out runs/cloned         a control: the play cloned before

Reads a LeRobot data set (--data) and a student (--init): a distilled one from stage 2, pi0.5 or PaliGemma weights
(the baselines of Table 4), or a size with random weights (nothing learned before). Writes runs/<preset>/finetune/:
args.json, metrics.jsonl, checkpoints/step_*/ with everything a robot needs; `load_policy` reads them.

Where we depart from the paper, or fill in what it does not say:
 1. The expert is pi0.5's Gemma of 300M, but answers in one pass instead of ten denoising steps: the paper's losses are
    a squared error and a cross-entropy, which need no noise. It starts as pi0.5's at the first of these steps (see
    `pi05_expert`), beside a distilled student as beside pi0.5's own, so that Table 4 compares the students alone.
 2. Its tokens are the state and H = 16 learned action queries, all visible to each other. 8 of 16 actions are executed
    before the policy looks again; at --small one, where demonstrations take a few seconds and their corrections count.
 3. All valid entries of the global batch weigh alike; steps past the episode's end carry no loss.
 4. Learning rate 5e-5 with 1,000 warm-up steps: ours; the paper gives steps and batch for LIBERO only. At --small Muon
    trains the matrices of the layers (lam.py 8). The paper trains vision encoder, VLM and expert together (Sec. 6.3);
    at --small the student stays as it is and reads each window once (`Memory`), and the expert, which sees a random
    half of what it said at each step, learns for twice as many steps in a third of the time. With ten demonstrations
    33 of 60 trials succeeded so, and 27 with a student that learns at three hundredths of the rates; which of the
    three changes did it was not told apart (results/LOG.md, seed 0, one policy each). A student from random weights
    has to learn: --student-lr 1 --prefix-dropout 0. --stills goes on asking where things are, as distill.py 8: for
    what learns from play.
 5. What nothing reads in this stage is neither computed nor trained: the student's latent head, and in its last layer
    everything behind the keys and values. With --stills the last layer answers, and is trained.
 6. Several data sets share one normaliser, from the lowest of their q01 to the highest of their q99; every frame counts
    alike.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
import distill
from common import ACTION_NAMES, GRIPPERS, STATE_NAMES, InputError, Normalizer, Process
from data.lerobot import DamagedEpisode
from data.windows import View, Windows, augment, check_resume, collate, held_out_batches, stream, to_device
from distill import Student, attention_mask
from lam import action_terms, count, mean_action, valid_counts

# Shapes: B batch, K camera views, L prefix positions, H action steps, W the expert's width.

# The expert beside each student: as deep as it, with its number of key-value heads and head width, but narrower.
EXPERT_SIZES: dict[str, dict[str, int]] = {
    "300m": dict(hidden_size=1024, intermediate_size=4096),  # pi0.5's: 18 layers, 8 heads of 256, 1 KV head
    "small": dict(hidden_size=192, intermediate_size=512),
    "tiny": dict(hidden_size=96, intermediate_size=192),
}
POSITIONS = 8192  # more than any student reads at once: see `partly`


@dataclass
class Args:
    data: tuple[str, ...] = ("datasets/libero",)
    """LeRobot data sets with the same columns, of one robot or of several: PATH, or PATH@MAPPING."""
    episodes: int = 0
    """Use only the first so many demonstrations of each task; 0 for all. Tasks are told apart as the recorder names
    them, or else by their instructions. (Table 4: 10, 50, all)"""
    init: str = "runs/paper/distill"
    """The student: a run of distill.py; lerobot/pi05_base or PaliGemma (folder or hub name) for the baselines;
    paligemma-small or paligemma-tiny for random weights. Or a run of this stage, whose student and expert then learn
    other data: normalisation is that of the new data, not its own. (Sec. 3.3)"""
    new_expert: bool = False
    """Of the policy that --init names take the student alone: the expert is --expert's, as beside any student. (our
    choice)"""
    out: str = "runs/paper/finetune"
    """Run folder: log and checkpoints."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, bit for bit."""
    export: str = ""
    """Instead of training: write the newest policy of this run into the folder `out`, to be handed on: weights in
    bfloat16 and no optimizer, a sixth of the bytes (a fourth with --muon). (our choice)"""
    expert: str = "lerobot/pi05_base"
    """The action expert: pi0.5 (folder or hub name), to start from its own beside whatever student; a run of this
    stage, whose expert goes on with the new data's normalisation; or 300m, small or tiny from random weights (300m
    beside pi0.5 itself: its own). (our choice: one start for all rows of Table 4)"""
    cameras: tuple[str, ...] = ("primary", "wrist")
    """The views that the policy gets, one to three. (Fig. 3: multi-view)"""
    chunk: int = 16
    """H, actions predicted at once. (our choice)"""
    execute: int = 8
    """Actions executed before the policy looks again. (our choice)"""
    hz: float = 10.0
    """Actions per second; faster data are strided. (our choice)"""
    latents: tuple[int, int] = (64, 64)
    """Scene and motion queries where --init is no distilled student (one brings its own). (Sec. 4.1)"""
    starts: float = 0.0
    """Share of the training windows that begin within an episode's first four frames, where what is going to happen is
    known from what is seen and said alone; the others begin anywhere. (our choice)"""
    augment: bool = False
    """Shift the training images by up to 6 % and vary brightness and contrast. (our choice)"""
    state_noise: float = 0.0
    """Standard deviation of noise on the training states, normalised, so that a few demonstrations are told apart by
    what is seen rather than by where the robot is. (our choice)"""
    prefix_dropout: float = 0.0
    """Share of the student's positions (image, text and latents alike) that the expert does not see in a training step,
    others for each sample, so that few demonstrations are not told apart by single ones. (our choice)"""
    remember: bool = False
    """Where the student stays as it is (--student-lr 0, no --augment), it reads each window once, before training, and
    what it said is kept, in half precision (at --small 87 kB a window): a step costs the expert and the decoding of
    pictures alone. (our choice)"""
    stills: int = 0
    """Scenes of six stills each, per GPU and micro-step, with the questions of pretrain.py about them, so that a
    student that began there keeps what it knew, as in distill.py. 0: none. (our choice)"""
    refer: float = 0.4
    """With --stills: the share of their questions that are sentences, as instructions are. (our choice)"""
    lambda_r: float = 0.5
    """Weight of their answers beside the actions, as of L_r in distill.py. (our choice)"""
    batch: int = 8
    """Windows per GPU and micro-step: 8 x 8 GPUs = 64. (Sec. 4.3)"""
    accumulate: int = 1
    """Micro-steps per optimizer step. (our choice)"""
    steps: int = 60_000
    """Optimizer steps. (Sec. 4.3)"""
    lr: float = 5e-5
    """Peak learning rate. (our choice)"""
    min_lr: float = 2.5e-6
    """Learning rate at the last step of the cosine. (Sec. 6.3)"""
    student_lr: float = 1.0
    """The student's learning rates as a share of the expert's; at 0 it stays as it is. (our choice)"""
    vision_lr: float = 1.0
    """Those of its vision encoder as a share of the rest of it; at 0 that stays as it is. (our choice)"""
    warmup: int = 1000
    """Warm-up steps. (our choice)"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas. (Sec. 6.3)"""
    weight_decay: float = 0.01
    """Weight decay, AdamW's and Muon's. (our choice)"""
    muon: float = 0.0
    """Peak learning rate of Muon for the matrices of the layers, while AdamW has the rest; 0: AdamW has all, as in
    Sec. 6.3. (our choice)"""
    clip: float = 1.0
    """Largest norm of the gradient. (our choice)"""
    cpu_bf16: bool = False
    """On a CPU that has instructions for it, multiply matrices in bfloat16, as GPUs always do. (our choice)"""
    checkpointing: bool = False
    """Recompute activations in the backward pass. (our choice)"""
    val_every: int = 0
    """One episode in so many is held out for validation, also of the few that --episodes leaves; 0: none, training
    windows are measured. (our choice: trials judge a policy, and 10 demonstrations are to be 10)"""
    val_samples: int = 64
    """Held-out windows measured at each save. (our choice)"""
    save_every: int = 2000
    """Steps between checkpoints, each with a validation. (our choice)"""
    log_every: int = 20
    """Steps between lines of the log. (our choice)"""
    workers: int = 8
    """Decoding processes per GPU. (our choice)"""
    preload: bool = False
    """Decode all frames into memory at the start: for data that fit. (our choice)"""
    max_bad: float = 0.01
    """Share of samples that may fall on damaged episodes, and be drawn anew, before the run stops. (our choice)"""
    replicas: int = 1
    """Copies of the sharded model: 1 shards it over all GPUs (FSDP), the number of nodes within each (HSDP)."""
    seed: int = 0
    """Seed of the initialisation and the data stream."""


TINY = Args(
    data=("data/tiny",), init="runs/tiny/distill", out="runs/tiny/finetune", expert="tiny", latents=(8, 8), batch=8,
    steps=200, lr=1e-3, min_lr=1e-5, warmup=10, val_every=15, val_samples=64, save_every=50, log_every=10, workers=0,
    preload=True,
)  # fmt: skip
SMALL = Args(
    data=("runs/data/pick_cup",), init="runs/small/distill", out="runs/small/finetune", expert="small",
    latents=(16, 16), execute=1, prefix_dropout=0.5, remember=True, batch=16, steps=3000, lr=1e-3, student_lr=0.0,
    min_lr=1e-5, warmup=100, muon=4e-3, cpu_bf16=True, save_every=500, log_every=20, workers=0, preload=True,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------------------------


class ShiftedNorm(nn.Module):
    """Gemma's norm with a shift: (B, L, width) -> x / rms(x) * (1 + weight) + bias. Starts without either."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight, self.bias = eps, nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (y * (1 + self.weight.float()) + self.bias.float()).type_as(x)


def pi05_expert(tensors: dict[str, Tensor], time: float = 1.0) -> dict[str, Tensor]:
    """pi0.5's action expert at one moment of its flow, as the weights of `VLA.expert`, by name.

    Attention and MLP have the shapes of ours. The norms have not: pi0.5's scale and shift what they normalise and gate
    what their branch adds, x + gate * branch(x / rms(x) * (1 + scale) + shift), all three a function of the flow's
    time. Ours answers in one pass, without a time. At time = 1, the first denoising step, when the expert knows nothing
    of the actions but noise, the three are constant vectors: scale and shift become the norm's, the gate goes into the
    branch's last matrix, and nothing of the function is lost (our choice).

    tensors: those of `common.pi05_rest`. All are used but the language head, action_in_proj and action_out_proj."""
    get = lambda name: tensors[name].float()
    linear = lambda name, x: F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))
    bias = tensors["time_mlp_in.bias"]
    steps = torch.linspace(0, 1, len(bias) // 2, dtype=torch.float64, device=bias.device)
    angle = 2 * math.pi * time / (4e-3 * 1000**steps)  # periods of 4 ms to 4 s
    embedded = torch.cat([angle.sin(), angle.cos()]).float()
    when = F.silu(linear("time_mlp_out", F.silu(linear("time_mlp_in", embedded))))
    expert = f"{common.PI05_PART}gemma_expert.model."
    out = {k.removeprefix(expert): get(k) for k in tensors if k.startswith(expert) and ".dense." not in k}
    for norm in (k.removesuffix(".dense.weight") for k in tensors if k.endswith(".dense.weight")):
        name = norm.removeprefix(expert)
        out[f"{name}.weight"], out[f"{name}.bias"], gate = linear(f"{norm}.dense", when).chunk(3)
        layer, _, kind = name.rpartition(".")
        if layer:  # nothing is added after the last norm
            last = f"{layer}.{'self_attn.o' if kind == 'input_layernorm' else 'mlp.down'}_proj.weight"
            out[last] = out[last] * gate[:, None]
    return out


class Read(NamedTuple):
    """What the expert reads. layers: keys and values (B, heads, L, head_dim) of each of the student's layers; valid
    (B, L): which of the L positions can be seen; last (B,): the number of the last position."""

    layers: list[tuple[Tensor, Tensor]]
    valid: Tensor
    last: Tensor


class VLA(nn.Module):
    """The student and its action expert. `forward` works in normalised units; `Policy` speaks metres.

    expert: a name of EXPERT_SIZES; chunk: H; cameras: K; checkpointing: training recomputes activations. Raises
    InputError for an unknown expert."""

    def __init__(self, student: Student, expert: str, chunk: int, cameras: int, checkpointing: bool = False):
        super().__init__()
        from transformers import GemmaConfig, GemmaModel

        if expert not in EXPERT_SIZES:
            raise InputError(f"unknown --expert {expert!r}: choose one of {sorted(EXPERT_SIZES)}")
        text = student.config.text_config
        self.student, self.cameras, self.checkpointing = student, cameras, checkpointing
        student.vlm.activation_checkpointing_disable()  # for layers with keys and values there is `recomputed`
        if checkpointing:
            student.vlm.vision_tower.activation_checkpointing_enable()
        same = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters")
        config = GemmaConfig(
            **EXPERT_SIZES[expert], **{k: getattr(text, k) for k in same}, vocab_size=1, pad_token_id=0,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.expert = GemmaModel._from_config(config, dtype=torch.float32)
        self.expert.embed_tokens = None  # it reads no words
        if expert == "300m":  # pi0.5's norms shift, too
            for name, norm in list(self.expert.named_modules()):
                if name.endswith("norm"):
                    self.expert.set_submodule(name, ShiftedNorm(config.hidden_size, norm.eps))
        width = config.hidden_size
        self.state_in = nn.Linear(len(STATE_NAMES), width)
        self.queries = nn.Parameter(torch.randn(chunk, width) * 0.02 * width**0.5)
        self.action_out = nn.Linear(width, len(ACTION_NAMES))
        self.action_norm, self.state_norm = Normalizer(ACTION_NAMES), Normalizer(STATE_NAMES)
        self.register_buffer("action_mask", torch.ones(len(ACTION_NAMES), dtype=torch.bool))
        self.register_buffer("state_mask", torch.ones(len(STATE_NAMES), dtype=torch.bool))

    def freeze_unread(self, answers: bool = False) -> None:
        """Excludes from training what no loss depends on: that of the actions, and with `answers` also that of what
        `answer` says (departure 5)."""
        last, unread = self.student.vlm.language_model.layers[-1], [self.student.head]
        if not answers:
            unread += [self.student.vlm.language_model.norm, last.mlp, last.post_attention_layernorm,
                       last.self_attn.q_proj, last.self_attn.o_proj]  # fmt: skip
        for module in unread:
            module.requires_grad_(False)

    def answer(self, images: Tensor, questions: list[str], answers: list[str]) -> tuple[Tensor, Tensor]:
        """What the student would say: logits (B, S, vocabulary), and the tokens of the answers (B, S), -100 where there
        is none. images: uint8 (B, 1, 3, H, H)."""
        return self.student(images, questions, answers, latents=False)[1:]

    def forward(
        self, images: Tensor, state: Tensor, instructions: list[str] | tuple[Tensor, Tensor],
        hide: Callable[[Read], Read] | None = None,
    ) -> Tensor:  # fmt: skip
        """images uint8 (B, K, 3, H, H), state (B, 46) normalised, instructions as texts or as `Student.prompts` gives
        them -> actions (B, H, 44), normalised, gripper columns as logits of being open. hide: see `partly`."""
        read = self.read(images, instructions)
        return self.write(hide(read) if hide else read, state)

    def read(self, images: Tensor, instructions: list[str] | tuple[Tensor, Tensor]) -> Read:
        """What the student says of pictures and instructions, as `forward` takes them."""
        assert images.shape[1] == self.cameras, (images.shape, self.cameras)
        *layers, last = self.student.vlm.language_model.layers
        x, group, valid, positions = self.student.prefix(images, instructions)  # (B, L, D)
        rope = self.student.vlm.language_model.rotary_emb(x, positions)
        of_x = {"attention_mask": attention_mask(group, valid), "position_embeddings": rope}
        said = []
        for layer in layers:
            x, *keys = self.recomputed(through, layer, x, of_x)
            said.append(tuple(keys))
        return Read([*said, keys_and_values(last, x, rope)], valid, positions[:, -1])

    def write(self, read: Read, state: Tensor) -> Tensor:
        """state (B, 46) normalised -> actions (B, H, 44), normalised, gripper columns as logits of being open."""
        y = torch.cat([self.state_in(state)[:, None], repeat(self.queries, "h w -> b h w", b=len(state))], 1)
        after = read.last[:, None] + 1 + torch.arange(y.shape[1], device=y.device)
        seen = F.pad(read.valid, (0, y.shape[1]), value=True)[:, None, None]  # all of the prefix, and themselves
        of_y = {"attention_mask": seen.expand(-1, -1, y.shape[1], -1),
                "position_embeddings": self.expert.rotary_emb(y, after)}  # fmt: skip
        for layer, said in zip(self.expert.layers, read.layers, strict=True):
            y = self.recomputed(beside, layer, y, said, of_y)
        return self.action_out(self.expert.norm(y)[:, 1:])

    def recomputed(self, function: Callable, *given: Any) -> Any:
        """function(*given), with `checkpointing` computed once more in the backward pass."""
        if self.checkpointing and self.training:
            return checkpoint(function, *given, use_reentrant=False)
        return function(*given)


def through(layer: nn.Module, x: Tensor, of_x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of the student on x (B, L, D): its output, its keys and its values."""
    cache = KeysAndValues()
    return layer(x, past_key_values=cache, **of_x), *cache.kept


def beside(layer: nn.Module, y: Tensor, said: tuple[Tensor, Tensor], of_y: dict[str, Tensor]) -> Tensor:
    """A layer of the expert, which reads the student's keys and values, on y (B, 1 + H, W)."""
    return layer(y, past_key_values=KeysAndValues(*said), **of_y)


class KeysAndValues:
    """What Gemma's attention takes for its cache: the first to come leaves its keys and values (B, heads, L, head_dim),
    the second attends to these and to its own."""

    def __init__(self, *kept: Tensor):
        self.kept = kept

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if not self.kept:
            self.kept = key, value
            return key, value
        return torch.cat([self.kept[0], key], 2), torch.cat([self.kept[1], value], 2)


def keys_and_values(layer: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A Gemma layer's keys and values, without the rest of it. rope: cosines and sines (B, L, head_dim)."""
    x = layer.input_layernorm(x)
    key, value = (rearrange(p(x), "b l (h d) -> b h l d", d=layer.self_attn.head_dim)
                  for p in (layer.self_attn.k_proj, layer.self_attn.v_proj))  # fmt: skip
    (cos, sin), (left, right) = (r[:, None] for r in rope), key.chunk(2, -1)
    return key * cos + torch.cat([-right, left], -1) * sin, value


def build(args: Args, checkpoint: Path | None = None) -> VLA:
    """The model: around the student that --init names, or with the architecture of a checkpoint, to be filled.

    What was loaded from published weights, is new or left over is printed: of pi0.5 its expert's head, which nothing
    reads, and the flow-matching heads action_in_proj and action_out_proj (its time_mlp_* are spent, see `pi05_expert`).

    Raises InputError where --init names no student, no policy, no pi0.5 and no PaliGemma, for a policy of another
    shape, for an unknown --expert, for one that does not fit, and where both are policies."""
    if checkpoint:
        meta = common.load_meta(checkpoint, "student_config", "tokens", "latent_dim")
        vlm, tokenizer = common.load_vlm("", meta["student_config"], checkpoint)
        student = Student(vlm, tokenizer, tuple(meta["tokens"]), meta["latent_dim"])
        size = expert_size(meta.get("args", {}).get("expert", args.expert))
        return VLA(student, size, args.chunk, len(args.cameras), args.checkpointing)
    size, rest = expert_size(args.expert), {}
    trained = _run(args.expert) if args.expert not in EXPERT_SIZES else None
    policy = found if (found := _run(args.init)) and common.load_meta(found)["stage"] == "finetune" else None
    if args.new_expert and not policy:
        raise InputError(f"--new-expert takes the student of a policy, and --init {args.init} is none: give a run of "
                         f"finetune.py, or leave --new-expert out")
    if policy and not args.new_expert:
        then = common.load_args(Args, common.load_meta(policy, "args"))
        if trained:
            raise InputError(f"--init {args.init} is a policy with an expert of its own, and so is --expert "
                             f"{args.expert}: give --expert {expert_size(then.expert)}, or add --new-expert to take "
                             f"the student of the one alone")  # fmt: skip
        there, here = ({"expert": expert_size(a.expert), "chunk": a.chunk, "cameras": list(a.cameras)}
                       for a in (then, args))  # fmt: skip
        if there != here:
            raise InputError(f"--init {args.init} is a policy with {there}, and this command asks for {here}: give the "
                             f"same --expert, --chunk and --cameras, or add --new-expert to take its student alone")
        model = build(args, policy)
        common.load_weights(model, policy)
        return model
    sources: dict[str, list[tuple[str, Tensor]]] = {}  # what was in published files
    if args.expert not in EXPERT_SIZES and args.expert != args.init and not trained:
        rest, sources[args.expert] = _pi05_rest(args.expert), []
    if policy:
        # A policy of its own arguments, of which the expert and the norms are then left behind.
        whole = build(common.load_args(Args, common.load_meta(policy, "args")), policy)
        common.load_weights(whole, policy)
        student = whole.student
    elif args.init in common.VLM_SIZES or (Path(args.init) / "config.json").exists() or _hub_name(args.init):
        vlm, tokenizer = common.load_vlm(args.init)
        student = Student(vlm, tokenizer, args.latents, vlm.config.text_config.hidden_size)
        if args.init not in common.VLM_SIZES:
            sources[args.init] = list(vlm.named_parameters())
        rest = rest or getattr(vlm, "left_over", {})
    elif "/" not in args.init and not Path(args.init).exists():
        sizes = [name for name in common.VLM_SIZES if name.startswith("paligemma")]
        raise InputError(f"--init {args.init!r} is no folder here and no size: give one of {sizes}, a run of "
                         f"distill.py, or a folder or hub name (owner/model) of pi0.5 or PaliGemma")  # fmt: skip
    else:
        student = distill.load_student(args.init)[0]
    if args.expert not in EXPERT_SIZES and not rest and not trained:
        _pi05_rest(args.expert)  # says why
    model = VLA(student, size, args.chunk, len(args.cameras), args.checkpointing)
    if trained:
        if args.chunk != (chunk := common.load_meta(trained)["args"]["chunk"]):
            raise InputError(f"--expert {args.expert} writes {chunk} actions at once: give --chunk {chunk}")
        theirs, ours = common.read_tensors(trained / "model.safetensors"), model.state_dict()
        parts = {k: v for k, v in theirs.items() if not k.startswith("student.")}
        parts |= {k: v for k, v in ours.items() if k.startswith("student.")}
        common.load_tensors(model, parts, f"the expert of {trained}")
    elif rest:
        found = sources[args.expert if args.expert in sources else args.init]
        if size == "300m":
            common.load_tensors(model.expert, pi05_expert(rest), "pi0.5's expert")
            found += model.expert.named_parameters()
            rest = {k: v for k, v in rest.items() if "lm_head" in k or k.startswith("action_")}
        found += rest.items()
    if sources:
        common.report_loading(model, sources)
    return model


def expert_size(expert: str) -> str:
    """The name in EXPERT_SIZES of what --expert asks for. Raises InputError for a run of another stage."""
    if expert in EXPERT_SIZES or not (found := _run(expert)):
        return expert if expert in EXPERT_SIZES else "300m"
    if (meta := common.load_meta(found, "args"))["stage"] != "finetune":
        raise InputError(f"unknown --expert {expert!r}, a run of stage {meta['stage']!r}: give one of finetune.py, or "
                         f"one of {sorted(EXPERT_SIZES)}")  # fmt: skip
    return expert_size(common.load_args(Args, meta).expert)


def _pi05_rest(source: str) -> dict[str, Tensor]:
    """What --expert names, read. Raises InputError where that is no pi0.5."""
    try:
        if common.is_pi05(source):
            return common.pi05_tensors(source)[1]
        why = "it is another model"
    except InputError:
        raise
    except common.LOADING_ERRORS as error:
        why = str(error).splitlines()[0]
    raise InputError(f"unknown --expert {source!r}: choose one of {sorted(EXPERT_SIZES)}, a run of finetune.py, or a "
                     f"folder or hub name of pi0.5 ({why})")  # fmt: skip


def _run(init: str) -> Path | None:
    """The checkpoint that --init or --expert names, if it is one of ours."""
    path = Path(init)
    return path if (path / "meta.json").exists() else next(reversed(common.checkpoints(path)), None)


def origin(init: str) -> dict[str, Any] | None:
    """Which checkpoint of ours --init or --expert names, for the metadata of what is made of it: its stage, step, time
    and commit. None for published and for random weights."""
    if not (found := _run(init)):
        return None
    meta = common.load_meta(found, "time", "commit")
    return {k: meta[k] for k in ("stage", "step", "time", "commit")}


def _hub_name(name: str) -> bool:
    """owner/model, and no such folder here: "runs/..." always means a run of ours."""
    return name.count("/") == 1 and not name.startswith(("runs/", ".", "/")) and not Path(name).exists()


# --------------------------------------------------------------------------------------------------------------------
# Policy: what evaluate.py and the robot use
# --------------------------------------------------------------------------------------------------------------------


class Policy:
    """A fine-tuned model behind physical units. Images go through the same preprocessing as in training.

    Weights are of `process.dtype` (float32 on a CPU, bfloat16 on a GPU). With `compile` (None: on a GPU) all that
    happens between pixels and actions is compiled and replayed as one CUDA graph, so that a call costs one launch in
    place of thousands. Instructions are then padded to a multiple of 16 tokens; the first call with another such length
    or batch size compiles again, which takes its time.

    pictures: the sizes that training pictures had before they were resized (see `picture_sizes`); None: the model's.
    Pictures of another size can be given, but their edges then lie elsewhere by a pixel, which is millimetres."""

    def __init__(
        self, model: VLA, args: Args, process: Process, name: str, compile: bool | None = None,
        pictures: dict[str, list[list[int]]] | None = None,
    ):  # fmt: skip
        self.model, self.process, self.name = model.to(process.device).eval().requires_grad_(False), process, name
        size = model.student.image_size
        self.pictures = pictures or {camera: [[size, size]] for camera in args.cameras}
        for parameter in model.parameters():  # not the buffers: normalisers and rotary frequencies stay float32
            parameter.data = parameter.data.to(process.dtype)
        self.cameras, self.chunk, self.execute, self.hz = args.cameras, args.chunk, args.execute, args.hz
        self.grippers = torch.tensor([i in GRIPPERS for i in range(len(ACTION_NAMES))], device=process.device)
        of = lambda names, mask: tuple(n for n, there in zip(names, mask.tolist(), strict=True) if there)
        self.action_names, self.state_names = of(ACTION_NAMES, model.action_mask), of(STATE_NAMES, model.state_mask)
        compile = process.device.type == "cuda" if compile is None else compile
        self.multiple = 16 if compile else 1
        if compile:
            for x in (self.grippers, model.queries):  # the types go into a table of einops', whose growth recompiles
                rearrange(x, "... -> ...")
            # Each batch size and length is a graph of its own: eight, torch's limit, are soon seen.
            self.predict = torch.compile(self.predict, mode="reduce-overhead", dynamic=False, fullgraph=True,
                                         recompile_limit=256)  # fmt: skip

    def predict(self, pixels: Tensor, state: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """pixels uint8 (B, K, 3, H, H), state (B, 46), prompts (B, L) -> actions (B, chunk, 44) in physical units, and
        whether all of them are finite. Nothing in it comes from the host, as a CUDA graph demands."""
        m = self.model
        state = torch.where(m.state_mask, m.state_norm.normalize(state), 0.0)
        out = m(pixels, state.to(self.process.dtype), (ids, valid)).float()
        actions = torch.where(self.grippers, out.sigmoid(), m.action_norm.unnormalize(out))
        finite = torch.isfinite(out).all() & torch.isfinite(actions).all()
        return torch.where(m.action_mask, actions, 0.0), finite

    @torch.inference_mode()
    def act(self, images: dict[str, np.ndarray], state: np.ndarray, instruction: Sequence[str]) -> np.ndarray:
        """images[camera] uint8 (B, H, W, 3), state (B, 46) unified and in physical units, one instruction each.

        Returns actions (B, chunk, 44): unified, metres and radians, gripper columns as probabilities of being open.
        Raises InputError for other views than it was trained with, wrong shapes or types, a state that training could
        not have seen (`common.conform`), an instruction that is empty or too long, and rather than return an action
        that is not finite."""
        if not isinstance(images, dict) or set(images) != set(self.cameras):
            got = sorted(map(str, images)) if isinstance(images, dict) else type(images).__name__
            raise InputError(f"{self.name} was trained with the views {sorted(self.cameras)}, it got {got}")
        texts = [] if isinstance(instruction, str) or not np.iterable(instruction) else list(instruction)
        if not texts or not all(isinstance(s, str) and s.strip() for s in texts):
            raise InputError(f"one instruction a sample is needed, and none may be empty: got {instruction!r}")
        state = self.check_state(state, b := len(texts))
        for camera, image in images.items():
            array = isinstance(image, np.ndarray)
            if not array or image.dtype != np.uint8 or image.shape != (b, *image.shape[1:3], 3) or not image.size:
                raise InputError(f"view {camera} must be uint8 ({b}, H, W, 3), one a sample: got "
                                 + (f"{image.dtype} {image.shape}" if array else type(image).__name__))  # fmt: skip
        student = self.model.student
        pixels = torch.stack([common.prepare_images(images[c], student.image_size) for c in self.cameras], 1)
        given = pixels, torch.from_numpy(state), *student.prompts(texts, len(images), self.multiple)
        actions, finite = self.predict(*(x.to(self.process.device) for x in given))
        if not finite:
            raise InputError(f"{self.name} produced a non-finite action: do not run it on a robot; train it again")
        return actions.cpu().numpy()

    def check_state(self, state: np.ndarray, b: int) -> np.ndarray:
        """A state as training had it, float32 (b, 46): zero where the policy reads nothing, grippers in [0, 1],
        quaternions canonical. Raises InputError where it is no such state."""
        try:
            state = np.array(state, np.float32)
        except (TypeError, ValueError) as error:  # ragged, or no numbers
            raise InputError(f"state must be numbers ({b}, {len(STATE_NAMES)}): {error}") from None
        if state.shape != (b, len(STATE_NAMES)):
            raise InputError(f"state must be ({b}, {len(STATE_NAMES)}), as common.STATE_NAMES: got {state.shape}")
        sane = (np.abs(state) < 1e4).all(0)  # NaN is not, nor is a robot 10 km away (our choice)
        if bad := [n for n, well in zip(STATE_NAMES, sane, strict=True) if not well]:
            raise InputError(f"NaN, infinite or absurdly large state: {bad}; look at the robot's sensors")
        state = np.where(np.isin(STATE_NAMES, self.state_names), state, np.float32(0))
        try:
            return common.conform(state, self.state_names, STATE_NAMES, "state: the {}")
        except InputError as error:  # what it advises is for data sets
            raise InputError(f"{str(error).rpartition(': ')[0]}: give what {self.name} reads as its data had it, "
                             f"{list(self.state_names)}") from None  # fmt: skip


def load_policy(path: str | Path, compile: bool | None = None) -> Policy:
    """A fine-tuned policy from a run folder or checkpoint of this stage; compile: see Policy.

    Raises InputError when the path holds no checkpoint of this stage, or one that does not fit."""
    found = common.find_checkpoint(path, "finetune")
    meta = common.load_meta(found, "args")
    args = common.load_args(Args, meta)
    model = build(args, found)
    common.load_weights(model, found)
    return Policy(model, args, common.here(), str(path), compile, meta.get("pictures"))


# --------------------------------------------------------------------------------------------------------------------
# Loss (Sec. 3.3)
# --------------------------------------------------------------------------------------------------------------------


def policy_loss(actions: Tensor, target: Tensor, mask: Tensor, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_ee + L_gripper (Sec. 3.3), and its parts.

    actions (logits for grippers), target, mask: (B, H, 44); counts (2,) > 0: what the sums over valid moving dimensions
    and grippers are divided by, so that the mean can be taken over more than this batch."""
    ee, gripper = action_terms(actions, target, mask) / counts
    return ee + gripper, {"ee": ee.detach(), "gripper": gripper.detach()}


# --------------------------------------------------------------------------------------------------------------------
# Validation
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model: VLA, windows: Windows, mean: Tensor, args: Args, process: Process) -> dict[str, float]:
    """Held-out errors beside that of always predicting the mean action; gripper accuracy; the position error of the
    commanded step in millimetres, over arms. The ranks share the windows; the values do not depend on how many."""
    model.eval()
    total = torch.zeros(7, device=process.device)
    xyz = [ACTION_NAMES.index(f"{s}_{a}") for s in ("left", "right") for a in "xyz"]
    for batch in held_out_batches(windows, args.val_samples, args.batch, process):
        with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
            actions = model(views(batch, args), batch["state"], batch["instruction"]).float()
        target, mask = batch["action"], batch["action_mask"]
        ee, _ = action_terms(actions, target, mask)
        baseline, _ = action_terms(mean.to(actions).expand_as(actions), target, mask)
        right = (((actions > 0) == (target > 0.5)) & mask)[..., GRIPPERS].sum()
        off = ((actions - target) * mask * windows.action_norms[0].scale.to(actions))[..., xyz].norm(dim=-1)
        moving = mask[..., xyz].any(-1)
        off = (off * moving).sum() * 1e3
        total += torch.stack([ee, baseline, right.float(), *valid_counts(mask), off, moving.sum()])
    model.train()
    ee, baseline, right, n, grippers, off, moving = process.sum(total).tolist()
    return {"val_ee": ee / max(n, 1), "val_ee_mean": baseline / max(n, 1),
            "val_gripper_accuracy": right / max(grippers, 1), "val_millimetres": off / max(moving, 1)}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Data, sharding
# --------------------------------------------------------------------------------------------------------------------


def make_windows(args: Args, image_size: int, split: str) -> Windows:
    """One frame of each camera and the next `chunk` actions, normalised alike whichever data set they are of.

    Raises InputError for data sets of different columns, or without actions."""
    wanted = {camera: View(camera, 1, image_size) for camera in args.cameras}
    seed = args.seed + (2 if split == "train" else 10_002)
    windows = Windows(args.data, wanted, args.chunk, args.hz, seed, (), split if args.val_every else "all",
                      args.val_every, args.episodes, args.preload, args.starts * (split == "train"))  # fmt: skip
    if video := [reader.source for reader in windows.readers if not reader.action_names]:
        raise InputError(f"--data {video} has no actions, and of videos alone a policy learns nothing: leave it to "
                         f"lam.py and distill.py, or name the columns of actions in a mapping")  # fmt: skip
    first, *others = windows.readers
    for other in others:
        for kind in ("action_names", "state_names"):
            if odd := sorted({*getattr(first, kind)} ^ {*getattr(other, kind)}):
                raise InputError(f"--data {first.source} and {other.source} differ in their {kind} {odd}: a policy has "
                                 f"one set of columns; train one for each")  # fmt: skip
    windows.action_norms, windows.state_norms = (
        [spanning(norms)] * len(norms) for norms in (windows.action_norms, windows.state_norms)
    )
    return windows


def picture_sizes(windows: Windows) -> dict[str, list[list[int]]]:
    """The [height, width] that each camera's pictures have in the data sets, each size once."""
    out: dict[str, list[list[int]]] = {view.camera: [] for view in windows.views.values()}
    for reader in windows.readers:
        for camera, sizes in out.items():
            shape = reader.info["features"][reader.mapping["images"][camera]].get("shape")
            shape = shape or reader.frames(int(windows.chosen[0][0]), camera, [0]).shape[1:]
            size = [n for n in shape if n != 3]  # the colours come first or last
            sizes += [size] if size not in sizes else []
    return out


def spanning(norms: list[Normalizer]) -> Normalizer:
    """One normaliser for data sets of the same columns: from the lowest q01 to the highest q99 of each dimension."""
    if len(norms) == 1:
        return norms[0]
    low = torch.stack([n.centre - n.scale for n in norms]).amin(0)
    high = torch.stack([n.centre + n.scale for n in norms]).amax(0)
    out = Normalizer(norms[0].names)
    out.centre, out.scale = (low + high) / 2, (high - low) / 2
    return out


def views(batch: dict, args: Args) -> Tensor:
    """The batch's images, uint8 (B, K, 3, H, H), in the order of --cameras."""
    return torch.cat([batch[c] for c in args.cameras], 1)


def noisy(state: Tensor, mask: Tensor, sigma: float, index: Tensor, seed: int) -> Tensor:
    """The normalised state (B, 46) with Gaussian noise of standard deviation sigma in what the robot has of it, mask
    (46,). The noise of a sample depends on (seed, its number) alone."""
    return state + sigma * mask * common.noise(state.shape[1:], index, seed, state.device, purpose=7)


def partly(read: Read, dropout: float, index: Tensor, seed: int) -> Read:
    """Without a share `dropout` of its positions. What a sample loses depends on (seed, its number) alone: numbers are
    drawn for more positions than there are, since torch draws others where it draws fewer, and given to those that are
    not padding."""
    if not dropout:
        return read
    drawn = common.noise((POSITIONS,), index, seed, read.valid.device, purpose=8)
    number = (read.valid.cumsum(1) - 1).clamp(min=0)
    return read._replace(valid=read.valid & (torch.special.ndtr(drawn.gather(1, number)) >= dropout))


class Memory:
    """What a student that stays as it is says of every window: read once, and kept on the host, of each rank all. In
    float16, or in bfloat16 where that is what attention takes.

    Raises InputError where that is more than four fifths of the machine's memory."""

    @torch.no_grad()
    def __init__(self, model: VLA, windows: Windows, args: Args, process: Process):
        self.device, self.dtype, self.said = process.device, process.dtype, None
        kept = torch.bfloat16 if process.dtype == torch.bfloat16 else torch.float16
        self.first = np.cumsum([0, *(ends[-1] for ends in windows.ends)]).tolist()  # of each data set's windows
        of = {text: i for i, text in enumerate(sorted({t for r in windows.readers for t in r.tasks.values()}))}
        ids, valid = model.student.prompts([*of], len(args.cameras))  # padded to one length
        numbers = [(d, k) for d, ends in enumerate(windows.ends) for k in range(ends[-1])]
        for at in tqdm(range(0, len(numbers), 32), "remember", leave=False, disable=not process.main):
            batch, rows = [], []
            for row, (d, k) in enumerate(numbers[at : at + 32], at):
                with contextlib.suppress(DamagedEpisode):  # nor will it be drawn
                    batch.append(windows.window(d, k))
                    rows.append(row)
            if not batch:
                continue
            batch = to_device(collate(batch), process.device)
            which = [of[text] for text in batch["instruction"]]
            with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
                read = model.read(views(batch, args), (ids[which], valid[which]))
            said = torch.stack([torch.stack(pair, 1) for pair in read.layers], 1)  # (B, layers, 2, heads, L, head_dim)
            if self.said is None:
                size = 2 * said[0].numel() * len(numbers)
                most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
                if size > 0.8 * most:
                    raise InputError(f"--remember: what the student says of {len(numbers)} windows takes "
                                     f"{size / 1e9:.0f} GB, this machine has {most / 1e9:.0f}: give --no-remember, or "
                                     f"fewer --episodes")  # fmt: skip
                if process.main:
                    print(f"the student stays as it is: it reads {len(numbers)} windows once, {size / 1e9:.2g} GB")
                # Of a window that it has not read nothing finite is said, and a step with it is skipped and counted.
                self.said = torch.full((len(numbers), *said.shape[1:]), math.nan, dtype=kept)
                self.valid = torch.zeros(len(numbers), read.valid.shape[1], dtype=torch.bool)
                self.last = torch.zeros(len(numbers), dtype=torch.long)
            self.said[rows], self.valid[rows], self.last[rows] = said.to("cpu", kept), read.valid.cpu(), read.last.cpu()

    def __call__(self, batch: dict) -> Read:
        """What it said of a batch of `windows`."""
        rows = [self.first[d] + k for d, k in zip(batch["dataset"].tolist(), batch["window"].tolist(), strict=True)]
        said = self.said[rows].to(self.device, self.dtype)
        return Read([tuple(layer.unbind(1)) for layer in said.unbind(1)], self.valid[rows].to(self.device),
                    self.last[rows].to(self.device))  # fmt: skip


def shard(model: VLA, process: Process) -> None:
    """FSDP2 or HSDP: every transformer layer is a unit that is gathered when needed, then the rest."""
    if process.world == 1:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    how = common.sharding(process)
    vlm = model.student.vlm
    # The student's last layer stays with the rest: of it `forward` computes keys and values alone, and never calls it.
    for layer in [*vlm.vision_tower.encoder.layers, *vlm.language_model.layers[:-1], *model.expert.layers]:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    for name in ("answer", "read", "write"):
        register_fsdp_forward_method(model, name)


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def train(args: Args, process: Process) -> None:
    run, kept = common.open_run(args.out, args, process, args.resume)
    if kept:  # of what it began with, nothing is needed any more
        then = common.load_meta(kept, "args")
        origins, args = {k: then.get(k) for k in ("init", "expert")}, replace(args, expert=then["args"]["expert"])
    else:
        origins = {"init": origin(args.init), "expert": origin(args.expert)}
    model = build(args, kept).to(process.device).train()
    # A distilled student brings its own latents; an expert of ours is told by its size, so that nobody has to find it.
    named, size = args.expert, expert_size(args.expert) if origins["expert"] else args.expert
    args = replace(args, latents=model.student.tokens, expert=size)
    size = model.student.image_size
    windows = make_windows(args, size, "train")
    held_out = make_windows(args, size, "val") if args.val_every else windows
    model.action_norm.load_state_dict(windows.action_norms[0].state_dict())
    model.state_norm.load_state_dict(windows.state_norms[0].state_dict())
    for reader, stride in zip(windows.readers, windows.strides, strict=True):
        if abs((rate := reader.fps / stride) / args.hz - 1) > 0.05:
            raise InputError(f"{reader.source} has {reader.fps:g} Hz: in strides of {stride} that is {rate:g} actions "
                             f"a second, and not --hz {args.hz:g}; add --hz {rate:g}")  # fmt: skip
    model.action_mask.copy_(torch.tensor([n in reader.action_names for n in ACTION_NAMES]))  # the same of all
    model.state_mask.copy_(torch.tensor([n in reader.state_names for n in STATE_NAMES]))
    model.freeze_unread(args.stills > 0)
    for part, rate in ((model.student, args.student_lr), (model.student.vlm.vision_tower, args.vision_lr)):
        if not rate:
            part.requires_grad_(False)  # nor are its gradients computed
    distill.check_instructions(windows)
    model.student.prompts([windows.longest_instruction()], len(args.cameras))  # too long: rather said now than later
    start, tally = 0, {"bad": 0, "skipped": 0}
    if kept:
        then = common.load_meta(kept)
        start, tally = then["step"], tally | then.get("tally", {})
        check_resume(kept, windows)
        common.load_weights(model, kept)
    tokenizer = model.student.tokenizer
    meta = {"stage": "finetune", "args": asdict(args), "student_config": model.student.config.to_dict(),
            "tokens": model.student.tokens, "latent_dim": model.student.head.out_features,
            "pictures": picture_sizes(windows), "statistics": windows.statistics()} | origins  # fmt: skip
    if process.main:
        print(windows.summary())
        at = {k: f" (step {o['step']}, commit {o['commit']})" if o else "" for k, o in origins.items()}
        print(f"parameters: student {count(model.student):.2f} M from {args.init}{at['init']}, "
              f"expert {count(model.expert):.2f} M from {named}{at['expert']}, "
              f"trained {count(model, trained=True):.2f} M; commit {common.git_commit()}")  # fmt: skip
    shard(model, process)
    shares = {"student.vlm.vision_tower.": args.student_lr * args.vision_lr, "student.": args.student_lr}
    optimizer = common.Optimizers(model, args, shares)
    if kept:
        common.load_optimizer(model, optimizer, kept)
    mean = mean_action(windows)
    still = not args.student_lr and not args.augment
    memory = Memory(model, windows, args, process) if args.remember and still else None
    log = common.MetricsLog(run, start, args.steps, process, "finetune")
    data = stream(windows, args.batch, start, process, args.accumulate, args.workers, tally, args.max_bad)
    update = common.Updates(optimizer, args.clip, process, tally)
    if start == 0:
        log.write(0, validate(model, held_out, mean, args, process))

    for step in range(start, args.steps):
        began = time.perf_counter()
        batches, asked = next(data), distill.quizzes(args, step, process, model.student)
        waited = time.perf_counter() - began
        rate = common.learning_rate(step, args.steps, args.lr, args.min_lr, args.warmup)
        optimizer.rate(rate)
        # As in lam.py: each rank's share of the global count makes the loss a mean over all valid entries.
        counts = process.sum(sum(valid_counts(b["action_mask"]) for b in batches)).clamp(min=1)
        counts = counts / (process.world * args.accumulate)
        totals: dict[str, Tensor] = {}
        words = float(sum(distill.tokenized(tokenizer, answers) for *_, answers in asked))
        n_words = process.sum(torch.tensor(words, device=process.device)) / process.world
        for batch in batches:
            images, state = views(batch, args), batch["state"]
            if args.augment:
                images = augment(images, batch["index"], args.seed)
            if args.state_noise:
                state = noisy(state, model.state_mask, args.state_noise, batch["index"], args.seed)
            hide = partial(partly, dropout=args.prefix_dropout, index=batch["index"], seed=args.seed)
            with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
                if memory:
                    actions = model.write(hide(memory(batch)), state)
                else:
                    actions = model(images, state, batch["instruction"], hide)
                loss, parts = policy_loss(actions, batch["action"], batch["action_mask"], counts)
            (loss / args.accumulate).backward()
            for k, v in parts.items():
                totals[k] = totals.get(k, 0) + v / args.accumulate
        for quiz in asked:
            with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
                text = distill.nats(*model.answer(*quiz)).sum() / n_words
            (args.lambda_r * text).backward()
            totals["text"] = totals.get("text", 0) + text.detach()
        norm = update(sum(totals.values()))
        log.bar.update()

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            values = {k: (process.sum(v) / process.world).item() for k, v in sorted(totals.items())}
            values |= {"grad_norm": norm, "lr": rate, **tally}
            log.write(done, values | {"seconds": time.perf_counter() - began, "wait": waited})
        if done % args.save_every == 0 or done == args.steps:
            log.write(done, validate(model, held_out, mean, args, process))
            common.save_checkpoint(run, done, model, optimizer, meta | {"tally": tally}, tokenizer, process)
    log.close()
    if process.main:
        print(f"done: {run}")
    del model, optimizer, update  # before the process group goes (see common.teardown)


def export(run: str, out: str) -> None:
    """The newest policy of a run as a folder that `load_policy` reads, weights in bfloat16, without what only training
    needs. Raises InputError where there is no policy, or something at `out`."""
    found, to = common.find_checkpoint(run, "finetune"), Path(out)
    if to.exists():
        raise InputError(f"{to} exists: give another --out, where the policy of {run} shall go")
    partial = to.with_name(to.name + ".partial")
    weights = common.read_tensors(found / "model.safetensors")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(found, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({k: v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()},
              partial / "model.safetensors")  # fmt: skip
    partial.rename(to)
    print(f"wrote {to}: {sum(path.stat().st_size for path in to.iterdir()) / 1e6:.1f} MB, from {found}")


def check(args: Args) -> None:
    """Raises InputError for options out of range."""
    common.check_training(args)
    common.at_least(args, chunk=1, episodes=0, latents=1, hz=1e-3, state_noise=0, student_lr=0, vision_lr=0, stills=0,
                    refer=0, lambda_r=0, prefix_dropout=0)  # fmt: skip
    if args.refer > 1:
        raise InputError(f"--refer {args.refer:g}: a share is at most 1")
    if args.stills and not args.student_lr * args.lambda_r:
        raise InputError(f"--stills {args.stills} asks, so that the student keeps what it knew; with --student-lr "
                         f"{args.student_lr:g} and --lambda-r {args.lambda_r:g} it learns nothing of it: give "
                         f"--student-lr 1, or leave --stills out")  # fmt: skip
    if args.init in common.VLM_SIZES and not args.student_lr:
        raise InputError(f"--init {args.init} is random weights, which --student-lr 0 leaves as they are: give "
                         f"--student-lr 1 --prefix-dropout 0, or a student that has learned something")  # fmt: skip
    if args.prefix_dropout >= 1:
        raise InputError(f"--prefix-dropout {args.prefix_dropout:g}: a share below 1, or the expert sees nothing")
    if not 1 <= args.execute <= args.chunk:
        raise InputError(f"--execute {args.execute} must lie between 1 and --chunk {args.chunk}")
    if not 1 <= len(set(args.cameras)) == len(args.cameras) <= 3:
        raise InputError(f"--cameras {list(args.cameras)}: give one to three different views")


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    check(args)
    if args.export:
        return export(args.export, args.out)
    process = common.setup(args.seed, args.replicas, args.cpu_bf16)
    train(args, process)
    common.teardown(process)


if __name__ == "__main__":
    common.run_main(main)
