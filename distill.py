"""Stage 2: knowledge distillation (LatBot, arXiv 2511.23034, Sec. 3.3, 6.3).

The latent action model needs the future to say what happens. A policy has no future to look at: here a student
vision-language model, pi0.5's PaliGemma, learns to foresee the same latent actions from the first frame and the
instruction alone, and keeps its language by describing the subtask.

    teacher (frozen)   f_lam(l, V_1 .. V_T)  --> Z  (B, N, D)                                             Eq. 2
    student            f_vlm(l, V_1)         --> Zhat (B, N, D), subtask text                             Eq. 3

    [ image n | text | N latent queries | subtask text ]     N = Ns + Nm; one pass, one mask:

                  image  text  latents  subtask
        image       1      1      0        0        image and text see each other (PaliGemma's prefix)
        text        1      1      0        0
        latents     1      1      1        0        the latent queries see the prefix and each other
        subtask     1      1      0      causal     text sees the prefix and what is written, never the latents

    L = L_a + lambda_r L_r                                                                                Eq. 6
    L_a = |Zhat - Z|^2 + KL(p(Zhat) || p(Z))                                                              Eq. 4
    L_r = - sum_i log p(w_{i+1} | w_{<=i}, l, V_1)                                                        Eq. 5

    python distill.py --tiny                                       a CPU, about a minute
    python distill.py --small                                      a laptop or one GPU, on the data of `lam.py --small`
    torchrun --nproc-per-node 16 distill.py --data A B C           the paper's run

Reads LeRobot data sets (--data) and the latent action model of stage 1 (--lam). Writes runs/<preset>/distill/:
args.json, metrics.jsonl, checkpoints/step_*/. `finetune.py` starts from there.

Where we depart from the paper, or fill in what it does not say:
 1. p is a softmax over the features of a latent token; the KL is printed with the student first, and so it is here. It
    is summed over features and averaged over tokens; |.|^2 is averaged over tokens and features.
 2. The student carries the teacher's number of latent queries, learned, after its prompt; a linear map takes their last
    hidden states to the teacher's width (the identity at the start where the widths agree).
 3. Image and text do not see the latent queries, so the subtask text is conditioned on (l, V_1) and nothing else, as
    Eq. 5 has it, and inference never has to write text.
 4. L_r is trained on the text of the present phase where a data set has it, on the instruction elsewhere, and averaged
    over all tokens of the global batch (with those of 8).
 5. The student starts from pi0.5's VLM (Sec. 6.2) as lerobot publishes it, which brings no tokenizer: PaliGemma's goes
    with it (see common.load_pi05). google/paligemma-3b-pt-224, from which pi0.5 was trained, can take its place. The
    prompt is PaliGemma's: pi0.5's own also spells out the robot's state, which this stage does not have. At --tiny and
    --small the student starts from random weights, and at --small Muon trains the matrices of its layers (lam.py 8).
 6. 138,000 steps at a batch of 256: 7 days of 16 A100s by `python -m benchmarks.plan distill`, 4.4 s a step at 40 % of
    their peak. 84 % of the arithmetic is the teacher's, which looks at 16 frames.
 7. The paper's student sees one frame. A policy sees more cameras, so at --small the student already learns to look at
    the wrist's, where a data set has one; elsewhere that view is masked, as in pi0.5.
 8. L_r is there so that the student keeps what it could do. What one that began with `pretrain.py` could do is to say
    where things are, and phases do not ask for that: within 160 steps it is gone (results/LOG.md). With --stills, still
    scenes and pretrain.py's questions about them are a part of L_r; the answers' loss is that of any other text.
    Four of ten (--refer) are sentences (data.stills.SENTENCES), which the stand-in was never asked: how names stand in
    commands.
    --vlm-lr is a smaller rate for what has learned before, --vision-lr for the eyes alone, which lose most: the paper
    trains all parameters, at a rate that suits pretrained ones. Off in every preset; `reproduce.py` asks and leaves the
    eyes as they are.
 9. With --starts, off in every preset, a share of the windows begins within four frames of its episode. Elsewhere the
    hand on its way already says where it is going, and a student can foresee that without looking for what the
    instruction names (results/LOG.md).
10. --shuffle is a control that must not help a policy: the student is taught the latent actions of other samples. All
    else, the subtask text and what validation measures among it, stays as it is.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import InputError, Process
from data import mixture
from data.windows import View, Windows, check_resume, collate, held_out_batches, stream, to_device
from lam import LAM, count, load_lam

# Shapes: B batch, K camera views, T frames, H x H pixels, n tokens of an image, L positions, N = Ns + Nm latent tokens,
# D their width, S positions of subtask text.

IMAGE_TEXT, LATENT, SUBTASK = 0, 1, 2  # the groups of the attention mask
STILLS = 77_003  # added to the seed of the stills: not those that pretrain.py shows or measures


@dataclass
class Args:
    data: tuple[str, ...] = ("datasets/pretrain",)
    """LeRobot data sets: PATH, PATH@MAPPING for columns named otherwise (see data/mappings), or a folder with those of
    Table 6 (see data/mixture.py). (Sec. 6.3)"""
    weights: tuple[float, ...] = ()
    """Sampling weight of each --data; none: every frame counts alike, but a folder's data sets as in Table 6."""
    lam: str = "runs/paper/lam"
    """The teacher: a run folder or checkpoint of lam.py."""
    out: str = "runs/paper/distill"
    """Run folder: log and checkpoints."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, bit for bit."""
    student: str = "lerobot/pi05_base"
    """pi0.5, whose VLM is taken, or PaliGemma: folder or hub name; or paligemma-tiny / paligemma-small from random
    weights. (Sec. 4.1, 6.2)"""
    lambda_r: float = 0.5
    """Weight of the reasoning preservation loss L_r. (Eq. 6)"""
    more_cameras: tuple[str, ...] = ()
    """Cameras that the student sees beside the teacher's; masked in data sets that lack them. (our choice)"""
    starts: float = 0.0
    """Share of the training windows that begin within an episode's first four frames, where what is going to happen is
    known from what is seen and said alone; the others begin anywhere. (our choice)"""
    stills: int = 0
    """Scenes of six stills each, per GPU and micro-step, with the questions of pretrain.py about them: a part of L_r,
    so that a student that began there keeps what it knew. 0: none, as in Sec. 3.3. (our choice)"""
    refer: float = 0.4
    """With --stills: the share of their questions that are sentences, as instructions are. (our choice)"""
    shuffle: bool = False
    """A control: in training Z is that of another sample of the micro-batch, chosen at random. (our choice)"""
    batch: int = 8
    """Windows per GPU and micro-step. (Sec. 6.3)"""
    accumulate: int = 2
    """Micro-steps per optimizer step: 8 x 2 x 16 GPUs = 256. (Sec. 6.3)"""
    steps: int = 138_000
    """Optimizer steps. (our choice: 7 days of 16 A100s)"""
    lr: float = 1e-4
    """Peak learning rate. (Sec. 6.3)"""
    min_lr: float = 2.5e-6
    """Learning rate at the last step of the cosine. (Sec. 6.3)"""
    vlm_lr: float = 1.0
    """Learning rates of the vision-language model as a share of those of the latent queries and their map. Below 1
    where it was pretrained and the rates are those of random weights. (our choice)"""
    vision_lr: float = 1.0
    """Learning rates of its vision encoder as a share of the rest of it; at 0 it stays as it is. (our choice)"""
    warmup: int = 2000
    """Warm-up steps. (Sec. 6.3)"""
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
    checkpointing: bool = True
    """Recompute activations in the backward pass. (our choice)"""
    val_every: int = 20
    """One episode in so many is held out for validation; 0: none, training windows are measured. (our choice)"""
    val_samples: int = 64
    """Held-out windows measured at each save. (our choice)"""
    save_every: int = 1000
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
    data=("data/tiny",), lam="runs/tiny/lam", out="runs/tiny/distill", student="paligemma-tiny", batch=8, accumulate=1,
    steps=200, lr=1e-3, min_lr=1e-5, warmup=10, checkpointing=False, val_every=15, val_samples=64, save_every=50,
    log_every=10, workers=0, preload=True,
)  # fmt: skip
SMALL = Args(
    data=("runs/data/five_tasks",), lam="runs/small/lam", out="runs/small/distill", student="paligemma-small",
    more_cameras=("wrist",), batch=16, accumulate=1, steps=2000, lr=1e-3, min_lr=1e-5, warmup=100, muon=4e-3,
    cpu_bf16=True, checkpointing=False, val_every=10, val_samples=128, save_every=200, log_every=20, workers=0,
    preload=True,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Model: the student
# --------------------------------------------------------------------------------------------------------------------


def attention_mask(group: Tensor, valid: Tensor) -> Tensor:
    """Who attends to whom, bool (B, 1, L, L), from each position's group (L,) and whether it holds a token (B, L).

    One image token, one word, two latents, two words of the subtask:

        [[1 1 0 0 0 0]     image
         [1 1 0 0 0 0]     text
         [1 1 1 1 0 0]     latent
         [1 1 1 1 0 0]     latent
         [1 1 0 0 1 0]     subtask
         [1 1 0 0 1 1]]    subtask"""
    allowed = (group == IMAGE_TEXT) | (group[:, None] == group)  # (L, L): the prefix, and one's own group
    text = group == SUBTASK
    causal = torch.ones_like(allowed).tril() | ~(text[:, None] & text[None])
    return (allowed & causal)[None, None] & valid[:, None, None, :]


class Student(nn.Module):
    """PaliGemma with N = Ns + Nm latent queries. `forward` gives the foreseen latent actions (Eq. 3) and, if asked, the
    logits of the subtask text (Eq. 5). It may look at several cameras: `seen`, bool (B, K), says which of them there
    are, None that all are.

    tokens: (Ns, Nm); latent_dim: D. Raises InputError where `vlm` is no PaliGemmaForConditionalGeneration."""

    def __init__(self, vlm: nn.Module, tokenizer: Any, tokens: tuple[int, int], latent_dim: int):
        super().__init__()
        if vlm.config.model_type != "paligemma":
            raise InputError(f"the student is PaliGemma, not {vlm.config.model_type!r}: change --student")
        # The language head is the embedding itself (tied), so the model below the head is all there is.
        self.vlm, self.config, self.tokenizer, self.tokens = vlm.model, vlm.config, tokenizer, tokens
        self.width = vlm.config.text_config.hidden_size
        self.image_size = vlm.config.vision_config.image_size
        # Gemma's embeddings arrive scaled by sqrt(width): the queries are born at the same scale.
        self.queries = nn.Parameter(torch.randn(sum(tokens), self.width) * 0.02 * self.width**0.5)
        self.head = nn.Linear(self.width, latent_dim)
        if self.width == latent_dim:
            nn.init.eye_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def ids(self, texts: list[str], start: str = "", end: str = "") -> tuple[Tensor, Tensor]:
        """Token ids (B, L), right-padded, and where there are tokens, bool (B, L)."""
        rows = [self.tokenizer(start + t + end, add_special_tokens=False).input_ids for t in texts]
        length, pad = max(len(r) for r in rows), self.tokenizer.pad_token_id
        ids = torch.tensor([r + [pad] * (length - len(r)) for r in rows], device=self.queries.device)
        valid = torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows], device=self.queries.device).bool()
        return ids, valid

    def prompts(self, instructions: list[str], views: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) of the prompts and where there are tokens, bool (B, L), padded to a multiple of a length.

        Raises InputError for an instruction that does not fit into the model's context beside so many images."""
        ids, valid = self.ids([common.STUDENT_PROMPT.format(sent=s) for s in instructions], self.tokenizer.bos_token)
        vision = self.config.vision_config
        room = views * (vision.image_size // vision.patch_size) ** 2 + len(self.queries)
        if ids.shape[1] + room > (limit := self.config.text_config.max_position_embeddings):
            longest = max(instructions, key=len)
            raise InputError(f"an instruction of {len(longest)} letters makes {ids.shape[1]} tokens, {views} images "
                             f"and the latents {room}: the model takes {limit} in all; shorten {longest[:60]!r}...")
        more = (0, -ids.shape[1] % multiple)
        return F.pad(ids, more, value=self.tokenizer.pad_token_id), F.pad(valid, more, value=False)

    def prefix(
        self, images: Tensor, instructions: list[str] | tuple[Tensor, Tensor], latents: bool = True,
        seen: Tensor | None = None,
    ):  # fmt: skip
        """images uint8 (B, K, 3, H, H), instructions as texts or as `prompts` gives them -> what stands before the
        answer: embeddings (B, L, width), group (L,), valid (B, L) and position numbers (B, L). Padding and views that
        are not `seen` take no position. Given prompts, nothing is copied from the host, as a CUDA graph demands."""
        embed = self.vlm.get_input_embeddings()
        b, k = images.shape[:2]
        pixels = common.normalize_pixels(rearrange(images, "b k c h w -> (b k) c h w"), "paligemma", self.queries.dtype)
        pictures = self.vlm.get_image_features(pixels).pooler_output
        pictures = rearrange(pictures, "(b k) n d -> b (k n) d", b=b)  # (B, K n, width)
        ids, valid = instructions if isinstance(instructions, tuple) else self.prompts(instructions, k)
        seen = torch.ones(b, k, dtype=torch.bool, device=images.device) if seen is None else seen
        seen = repeat(seen, "b k -> b (k n)", n=pictures.shape[1] // k)
        parts, valid = [pictures, embed(ids).to(pictures.dtype)], torch.cat([seen, valid], 1)
        group = torch.full((valid.shape[1],), IMAGE_TEXT, device=images.device)
        if latents:
            parts.append(repeat(self.queries, "n d -> b n d", b=b).to(pictures.dtype))
            valid = F.pad(valid, (0, len(self.queries)), value=True)
            group = F.pad(group, (0, len(self.queries)), value=LATENT)
        positions = valid.cumsum(1) - 1
        return torch.cat(parts, 1), group, valid, positions.clamp(min=0)

    def forward(
        self, images: Tensor, instructions: list[str], subtasks: list[str] | None = None, seen: Tensor | None = None,
        latents: bool = True,
    ):  # fmt: skip
        """images uint8 (B, K, 3, H, H) -> Zhat (B, N, D), and with `subtasks` also the logits (B, S, vocabulary) that
        predict their tokens, and the tokens themselves (B, S), -100 where there is none.  (Eq. 3)
        Without `latents` Zhat is (B, 0, D), and the logits are the same: the text does not see the queries.

        Raises InputError for texts that do not fit into the model's context."""
        embeds, group, valid, positions = self.prefix(images, instructions, latents, seen)
        n, before = len(self.queries) * latents, embeds.shape[1]
        if subtasks is not None:
            ids, written = self.ids(subtasks, end=self.tokenizer.eos_token)  # (B, S)
            if before + ids.shape[1] - 1 > (limit := self.config.text_config.max_position_embeddings):
                longest = max(subtasks, key=len)
                raise InputError(f"a subtask text of {len(longest)} letters makes {ids.shape[1]} tokens, what stands "
                                 f"before it {before}: the model takes {limit} in all; shorten {longest[:60]!r}...")
            text = self.vlm.get_input_embeddings()(ids[:, :-1]).to(embeds.dtype)
            embeds = torch.cat([embeds, text], 1)
            group = torch.cat([group, torch.full((text.shape[1],), SUBTASK, device=group.device)])
            valid = torch.cat([valid, written[:, :-1]], 1)
            # The text goes on where the prompt ended, as if the latent queries were not there.
            last = valid[:, : before - n].sum(1, keepdim=True) - 1
            positions = torch.cat([positions, last + 1 + torch.arange(text.shape[1], device=group.device)], 1)
        hidden = self.vlm.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask(group, valid), position_ids=positions, use_cache=False
        ).last_hidden_state
        z = self.head(hidden[:, before - n : before])  # (B, N, D)
        if subtasks is None:
            return z
        # The prompt's last token predicts the first word.
        first = hidden[torch.arange(len(hidden)), last_token(valid[:, : before - n])][:, None]
        logits = self.logits(torch.cat([first, hidden[:, before:]], 1))
        return z, logits, ids.masked_fill(~written, -100)

    def logits(self, hidden: Tensor) -> Tensor:
        """The tied language head: hidden states (..., width) -> logits (..., vocabulary)."""
        return F.linear(hidden, self.vlm.get_input_embeddings().weight.to(hidden.dtype))

    @torch.no_grad()
    def describe(
        self, images: Tensor, instructions: list[str], limit: int = 24, seen: Tensor | None = None
    ) -> list[str]:
        """The subtask sentences that the student writes, greedily, with a cache, at most `limit` tokens each; images
        uint8 (B, K, 3, H, H). Call it in eval mode, on an unsharded student."""
        embeds, group, valid, positions = self.prefix(images, instructions, latents=False, seen=seen)
        out = self.vlm.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask(group, valid), position_ids=positions, use_cache=True
        )
        cache, rows = out.past_key_values, torch.arange(len(images), device=images.device)
        hidden, position = out.last_hidden_state[rows, last_token(valid)][:, None], positions[rows, last_token(valid)]
        words: list[Tensor] = []
        eos = self.tokenizer.eos_token_id
        while len(words) < limit and not (words and (torch.stack(words) == eos).any(0).all()):
            words.append(self.logits(hidden)[:, -1].argmax(-1))
            position, valid = position + 1, F.pad(valid, (0, 1), value=True)
            word = self.vlm.get_input_embeddings()(words[-1][:, None]).to(embeds.dtype)
            hidden = self.vlm.language_model(
                inputs_embeds=word, past_key_values=cache, attention_mask=valid[:, None, None, :],
                position_ids=position[:, None], use_cache=True,
            ).last_hidden_state  # fmt: skip
        texts = []
        for row in torch.stack(words, 1).tolist():
            texts.append(self.tokenizer.decode(row[: row.index(eos)] if eos in row else row, skip_special_tokens=True))
        return texts


def last_token(valid: Tensor) -> Tensor:
    """The position (B,) of the last True in each row of (B, L)."""
    return valid.shape[1] - 1 - valid.flip(1).int().argmax(1)


def build(args: Args, tokens: tuple[int, int], latent_dim: int, checkpoint: Path | None = None) -> Student:
    """The student: from pretrained weights (with a printed report of what was loaded, is new, or is left over: of pi0.5
    the action expert and the flow-matching heads), from random ones, or as a checkpoint describes it, to be filled.

    Raises InputError where --student names neither pi0.5 nor PaliGemma."""
    config = common.load_meta(checkpoint, "student_config")["student_config"] if checkpoint else None
    vlm, tokenizer = common.load_vlm(args.student, config, checkpoint)
    student = assemble(vlm, tokenizer, tokens, latent_dim, args.checkpointing)
    if not checkpoint and args.student not in common.VLM_SIZES:
        there = [*vlm.named_parameters(), *getattr(vlm, "left_over", {}).items()]
        common.report_loading(student, {args.student: there})
    return student


def assemble(vlm: nn.Module, tokenizer: Any, tokens: tuple[int, int], latent_dim: int, checkpointing: bool) -> Student:
    """The student around a VLM, on whatever device that is. Raises InputError as `Student` does."""
    student = Student(vlm, tokenizer, tokens, latent_dim)
    if checkpointing:  # of both halves, as both are trained
        student.vlm.activation_checkpointing_enable()
    return student


def load_student(path: str | Path) -> tuple[Student, Args, dict[str, Any]]:
    """A distilled student, its arguments and its checkpoint's metadata.

    Raises InputError when the path holds no checkpoint of this stage, or one that does not fit."""
    found = common.find_checkpoint(path, "distill")
    meta = common.load_meta(found, "args", "tokens", "latent_dim")
    args = common.load_args(Args, meta)
    student = build(args, tuple(meta["tokens"]), meta["latent_dim"], found)
    common.load_weights(student, found)
    return student, args, meta


# --------------------------------------------------------------------------------------------------------------------
# Loss (Sec. 3.3)
# --------------------------------------------------------------------------------------------------------------------


def alignment_loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """L_a = |Zhat - Z|^2 + KL(p(Zhat) || p(Z)), p a softmax over features; both (B, N, D). (scalar, parts).  (Eq. 4)"""
    student, teacher = student.float(), teacher.float()
    mse = F.mse_loss(student, teacher)
    log_p_hat, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    kl = (log_p_hat.exp() * (log_p_hat - log_p)).sum(-1).mean()
    return mse + kl, {"mse": mse.detach(), "kl": kl.detach()}


def distill_loss(
    student: Tensor, teacher: Tensor, logits: Tensor, words: Tensor, n_words: Tensor, lambda_r: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_a + lambda_r L_r (Eq. 6), L_r the next-token prediction of Eq. 5 divided by `n_words`; (scalar, parts).

    student, teacher (B, N, D); logits (B, S, vocabulary); words (B, S), -100 where there is none."""
    align, parts = alignment_loss(student, teacher)  # L_a
    text = nats(logits, words).sum() / n_words
    return align + lambda_r * text, parts | {"text": text.detach()}


def nats(logits: Tensor, words: Tensor) -> Tensor:
    """What each token costs, (B, S), 0 where there is none. logits (B, S, vocabulary); words (B, S), -100 for none."""
    return F.cross_entropy(logits.float().flatten(0, 1), words.flatten(), reduction="none").view_as(words)


def another(index: Tensor, seed: int) -> Tensor:
    """For each sample of a micro-batch, by its number in the stream (B,), the place of another one: a random cycle
    through all of them, a function of (seed, these numbers) alone."""
    order = common.noise((), index, seed, index.device, purpose=6).argsort()
    return torch.empty_like(order).scatter(0, order, order.roll(1))


# --------------------------------------------------------------------------------------------------------------------
# Validation
# --------------------------------------------------------------------------------------------------------------------


def foresee(student: Student, teacher: LAM, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Zhat and Z of a batch, `hat` and `z` (B, N, D), and of each window's subtask text the `nats` that it costs and
    its number of tokens with the end of the sentence, `words`, (B,). Call it under autocast, as in training."""
    z = torch.cat(teacher.encoder(batch["video"], batch["instruction"]), 1)
    images, seen = first_frames(batch)
    hat, logits, words = student(images, batch["instruction"], phases(batch), seen)
    return {"hat": hat.float(), "z": z.float(), "nats": nats(logits, words).sum(1),
            "words": (words >= 0).sum(1).float()}  # fmt: skip


@torch.no_grad()
def validate(student: Student, teacher: LAM, windows: Windows, args: Args, process: Process) -> dict[str, float]:
    """Held-out losses, the squared error beside that of always foreseeing the mean Z; the cosine between Zhat and Z,
    beside that of Zhat with the Z of another sample (what a student that foresees nothing in particular would reach);
    the perplexity of the subtask text. The ranks share the windows; the values do not depend on how many there are."""
    student.eval()
    hats, zs, text = [], [], torch.zeros(2, device=process.device)
    for batch in held_out_batches(windows, args.val_samples, args.batch, process):
        with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
            told = foresee(student, teacher, batch)
        text += (torch.stack([told["nats"], told["words"]]) * batch["counted"]).sum(1)
        hats.append(told["hat"])
        zs.append(told["z"])
    student.train()
    hat, z = (process.cat(torch.cat(values))[: args.val_samples] for values in (hats, zs))
    cost, n_words = process.sum(text).tolist()
    _, parts = alignment_loss(hat, z)
    return {
        "val_mse": parts["mse"].item(), "val_kl": parts["kl"].item(),
        "val_mse_mean": F.mse_loss(z.mean(0, keepdim=True).expand_as(z), z).item(),
        "val_cosine": F.cosine_similarity(hat, z, dim=-1).mean().item(),
        "val_cosine_shuffled": F.cosine_similarity(hat, z.roll(1, 0), dim=-1).mean().item(),
        "val_perplexity": math.exp(min(20.0, cost / max(1, n_words))),
    }  # fmt: skip


def tell(student: Student, windows: Windows, process: Process, samples: int = 4) -> None:
    """Prints the sentences that the student writes of a few windows, beside the true ones. Not on several ranks, whose
    shards know no `describe`: there they come from evaluate.py."""
    if process.world > 1:
        return
    batch = to_device(collate([windows[i] for i in range(samples)]), process.device)
    images, seen = first_frames(batch)
    student.eval()
    for written, true in zip(
        student.describe(images, batch["instruction"], seen=seen), phases(batch), strict=True
    ):
        tqdm.write(f"subtask written: {written!r}   true: {true!r}")
    student.train()


# --------------------------------------------------------------------------------------------------------------------
# Data, sharding
# --------------------------------------------------------------------------------------------------------------------


def make_windows(args: Args, teacher_args: Any, image_size: int, split: str) -> Windows:
    """The teacher's windows, and their first frame at the student's resolution, from each of its cameras."""
    t = teacher_args
    views = {"video": View(t.camera, t.frames, t.image_size), "first": View(t.camera, 1, image_size)}
    if args.more_cameras:
        cameras = (t.camera, *(c for c in args.more_cameras if c != t.camera))
        views |= {f"first{k or ''}": View(c, 1, image_size, optional=True) for k, c in enumerate(cameras)}
    seed = args.seed + (1 if split == "train" else 10_001)  # other windows than stage 1 drew
    sources, weights = mixture.expand(args.data, args.weights)
    return Windows(sources, views, t.frames - 1, t.hz, seed, weights, split if args.val_every else "all",
                   args.val_every, preload=args.preload, starts=args.starts * (split == "train"))  # fmt: skip


def first_frames(batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What the student looks at: uint8 (B, K, 3, H, H), and which of these views there are, bool (B, K); None: all."""
    names = [key.removesuffix("_seen") for key in batch if key.startswith("first") and key.endswith("_seen")]
    if not names:
        return batch["first"], None
    return torch.cat([batch[n] for n in names], 1), torch.stack([batch[f"{n}_seen"] for n in names], 1)


def check_instructions(windows: Windows) -> None:
    """Raises InputError for an instruction that is empty."""
    for reader in windows.readers:
        if empty := [i for i, task in reader.tasks.items() if not task.strip()]:
            raise InputError(f"{reader.source}: instruction {empty[0]} of its {len(reader.tasks)} is empty, and a "
                             f"student acts by instruction: write one into its meta/tasks")  # fmt: skip


def check_texts(student: Student, windows: Windows) -> None:
    """Raises InputError for an instruction that is empty, and for texts that are too long together: rather said now
    than in a week."""
    check_instructions(windows)
    texts = (text for r in windows.readers for text in (*r.tasks.values(), *r.subtasks.values()))
    longest = max(texts, key=len, default="")
    size = student.image_size
    blank = torch.zeros(1, 1, 3, size, size, dtype=torch.uint8, device=student.queries.device)
    with torch.no_grad():
        student(blank, [windows.longest_instruction()], [longest])


def phases(batch: dict[str, Any]) -> list[str]:
    """The texts that L_r is trained on: the subtask, or the instruction where a data set leaves it empty."""
    return [s if s.strip() else i for s, i in zip(batch["subtask"], batch["instruction"], strict=True)]


def quizzes(args: Any, step: int, process: Process, student: Student) -> list[tuple[Tensor, list[str], list[str]]]:
    """This rank's `still_questions` of a step, for each micro-step; none without --stills."""
    numbers = [(step * args.accumulate + k) * process.world + process.rank for k in range(args.accumulate)]
    return [still_questions(args, number, student) for number in numbers if args.stills]


def still_questions(args: Any, number: int, student: Student) -> tuple[Tensor, list[str], list[str]]:
    """Stills uint8 (B, 1, 3, H, H), a question about each and its answer: a function of (seed, number)."""
    from data.stills import ask, kind_of_question, stills  # they need the robot, and nothing else here does

    rng, scenes = np.random.default_rng([args.seed + STILLS, number]), range(args.stills)
    shown = [s for k in scenes for s in stills(args.seed + STILLS, number * args.stills + k, student.image_size)]
    asked, answers = zip(*(ask(still, rng, kind_of_question(rng, args.refer)) for still in shown), strict=True)
    images = torch.from_numpy(np.stack([still.image for still in shown])).to(student.queries.device)
    return rearrange(images, "b h w c -> b 1 c h w"), list(asked), [f" {a}" for a in answers]  # as pretrain.py says it


def check_teacher(taught: dict[str, dict], windows: Windows, lam: str) -> list[str]:
    """The data sets that the teacher has never seen. `taught`: the statistics that it learned with, by data set.

    Raises InputError where a data set has other statistics now: it is not what the teacher saw."""
    now = json.loads(json.dumps(windows.statistics()))  # as they are in a file
    if changed := [source for source in now if source in taught and not alike(taught[source], now[source])]:
        raise InputError(f"the data at {changed} have other statistics than when the teacher at {lam} learned from "
                         f"them: put back the data that it saw, or train it again with `python lam.py`")  # fmt: skip
    return [source for source in now if source not in taught]


def alike(then: dict[str, dict], now: dict[str, dict], tolerance: float = 0.05) -> bool:
    """Whether two data sets' statistics normalise alike: no quantile differs by more than this share of its dimension's
    range. Data simulated anew on a processor of another kind differ in their last digits, and in an episode or two."""
    then, now = ({k: v for k, v in of.items() if "q01" in v} for of in (then, now))  # images and times have none
    if {k: np.shape(then[k]["q01"]) for k in then} != {k: np.shape(now[k]["q01"]) for k in now}:
        return False
    differs = lambda k, q: np.abs(np.subtract(then[k][q], now[k][q]))
    room = {k: tolerance * np.subtract(then[k]["q99"], then[k]["q01"]) + 1e-6 for k in then}
    return all((differs(k, q) <= room[k]).all() for k in then for q in ("q01", "q99"))


def shard(student: Student, teacher: LAM, process: Process) -> None:
    """FSDP2 or HSDP for both: every transformer layer is a unit that is gathered when needed, then the rest."""
    if process.world == 1:
        return
    from torch.distributed.fsdp import fully_shard

    how = common.sharding(process)
    vlm, frozen = student.vlm, teacher.encoder.vlm
    for layer in [*vlm.vision_tower.encoder.layers, *vlm.language_model.layers]:
        fully_shard(layer, **how)
    for layer in [*frozen.vision_tower.encoder.layer, *frozen.language_model.layers]:
        fully_shard(layer, **how)
    fully_shard(student, **how)
    fully_shard(teacher.encoder, **how, reshard_after_forward=True)  # no backward pass will need it


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def train(args: Args, process: Process) -> None:
    teacher, teacher_args, teacher_meta = load_lam(args.lam)
    taught = {k: teacher_meta[k] for k in ("step", "time", "commit")}
    run, kept = common.open_run(args.out, args, process, args.resume)
    teacher.decoder = None  # the larger part, and nothing here reads it
    teacher = teacher.to(process.device).eval().requires_grad_(False)
    tokens, latent_dim = (teacher_args.scene_tokens, teacher_args.motion_tokens), teacher_args.latent_dim
    student = build(args, tokens, latent_dim, kept).to(process.device).train()
    student.vlm.vision_tower.requires_grad_(args.vision_lr > 0)
    windows = make_windows(args, teacher_args, student.image_size, "train")
    held_out = make_windows(args, teacher_args, student.image_size, "val") if args.val_every else windows
    check_texts(student, windows)
    unseen = check_teacher(teacher_meta["statistics"], windows, args.lam)
    start, tally = 0, {"bad": 0, "skipped": 0}
    if kept:
        then = common.load_meta(kept)
        start, tally = then["step"], tally | then.get("tally", {})
        if (tuple(then["tokens"]), then["latent_dim"]) != (tokens, latent_dim):
            raise InputError(f"{kept} has {then['tokens']} scene and motion tokens of width {then['latent_dim']}, the "
                             f"teacher at {args.lam} {list(tokens)} of {latent_dim}: give the --lam it learned from")
        if then["teacher"] != taught:
            raise InputError(f"{kept} learned from another checkpoint of {args.lam} ({then['teacher']}, now {taught}): "
                             f"choose another --out to start anew")
        check_resume(kept, windows)
        common.load_weights(student, kept)
    tokenizer = student.tokenizer
    meta = {"stage": "distill", "args": asdict(args), "student_config": student.config.to_dict(), "tokens": tokens,
            "latent_dim": latent_dim, "teacher": taught, "camera": teacher_args.camera, "hz": teacher_args.hz,
            "statistics": windows.statistics()}  # fmt: skip
    if process.main:
        print(mixture.summary(args.data, windows))
        print(f"inherited from {args.lam}, step {taught['step']} of {teacher_args.steps}: {tokens[0]} + {tokens[1]} "
              f"tokens of width {latent_dim}, {teacher_args.frames} frames at {teacher_args.hz:g} Hz"
              + (f"; it has not seen {unseen}" if unseen else ""))  # fmt: skip
        print(f"parameters: student {count(student):.2f} M, teacher {count(teacher.encoder):.2f} M (frozen); "
              f"commit {common.git_commit()}")  # fmt: skip
    shard(student, teacher, process)
    shares = {"vlm.vision_tower.": args.vlm_lr * args.vision_lr, "vlm.": args.vlm_lr}
    optimizer = common.Optimizers(student, args, shares)
    if kept:
        common.load_optimizer(student, optimizer, kept)
    log = common.MetricsLog(run, start, args.steps, process, "distill")
    data = stream(windows, args.batch, start, process, args.accumulate, args.workers, tally, args.max_bad)
    update = common.Updates(optimizer, args.clip, process, tally)
    if start == 0:
        log.write(0, validate(student, teacher, held_out, args, process))

    for step in range(start, args.steps):
        began = time.perf_counter()
        batches, asked = next(data), quizzes(args, step, process, student)
        waited = time.perf_counter() - began
        optimizer.rate(common.learning_rate(step, args.steps, args.lr, args.min_lr, args.warmup))
        # Words are spread unevenly: each rank's share of the global count makes L_r a mean over all of them.
        words = sum(tokenized(tokenizer, texts) for texts in [*map(phases, batches), *(q[2] for q in asked)])
        n_words = process.sum(torch.tensor(float(words), device=process.device)) / process.world
        totals: dict[str, Tensor] = {}
        for batch in batches:
            with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
                with torch.no_grad():
                    z = torch.cat(teacher.encoder(batch["video"], batch["instruction"]), 1)
                z = z[another(batch["index"], args.seed)] if args.shuffle else z
                images, seen = first_frames(batch)
                hat, logits, target = student(images, batch["instruction"], phases(batch), seen)
                loss, parts = distill_loss(hat, z, logits, target, n_words / args.accumulate, args.lambda_r)
            (loss / args.accumulate).backward()
            for k, v in parts.items():
                totals[k] = totals.get(k, 0) + v / args.accumulate
        for quiz in asked:
            with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
                _, logits, target = student(*quiz, latents=False)
                text = nats(logits, target).sum() / n_words
            (args.lambda_r * text).backward()
            totals["text"] = totals["text"] + text.detach()
        norm = update(sum(totals.values()))
        log.bar.update()

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            values = {k: (process.sum(v) / process.world).item() for k, v in sorted(totals.items())}
            values |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], **tally}
            log.write(done, values | {"seconds": time.perf_counter() - began, "wait": waited})
        if done % args.save_every == 0 or done == args.steps:
            log.write(done, validate(student, teacher, held_out, args, process))
            tell(student, held_out, process)
            common.save_checkpoint(run, done, student, optimizer, meta | {"tally": tally}, tokenizer, process)
    log.close()
    if process.main:
        print(f"done: {run}")
    del student, teacher, optimizer, update  # before the process group goes (see common.teardown)


def tokenized(tokenizer: Any, texts: list[str]) -> int:
    """Tokens that the texts have, each with its end of sentence."""
    return sum(len(tokenizer(t + tokenizer.eos_token, add_special_tokens=False).input_ids) for t in texts)


def check(args: Args) -> None:
    """Raises InputError for options out of range."""
    common.check_training(args)
    common.at_least(args, lambda_r=0, vlm_lr=0, vision_lr=0, stills=0, refer=0)
    if args.refer > 1:
        raise InputError(f"--refer {args.refer:g}: a share is at most 1")
    if args.stills and not args.vlm_lr * args.lambda_r:
        raise InputError(f"--stills {args.stills} asks, so that the student keeps what it knew; with --vlm-lr "
                         f"{args.vlm_lr:g} and --lambda-r {args.lambda_r:g} it learns nothing of it: leave "
                         f"--stills out")  # fmt: skip
    if args.shuffle and args.batch < 2:
        raise InputError(f"--shuffle needs another sample in the micro-batch: --batch {args.batch} must be 2 or more")


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    check(args)
    process = common.setup(args.seed, args.replicas, args.cpu_bf16)
    train(args, process)
    common.teardown(process)


if __name__ == "__main__":
    common.run_main(main)
