"""Before stage 1: what pretrained models bring along, for the sizes that start from random weights.

At full size both vision-language models come pretrained on captions and on detection: PaliGemma knows where things are
before it sees a robot. Those of --small know nothing, and no method can foresee what it does not see. Here they learn
from rendered still scenes (`data.stills`), in PaliGemma's own words:

    image, "detect red cube ; gripper"   -->   "red cube <loc0400><loc0312><loc0456><loc0368> ; gripper <loc....> x 4"
    image, "detect lift the red cube"    -->   "red cube <loc0400><loc0312><loc0456><loc0368>"
    image, "describe"                    -->   "gripper <loc....> x 4 ; red cube <loc....> x 4", from left to right

    python pretrain.py --small --model paligemma-small      the student of stage 2
    python pretrain.py --small --model internvl-small --sight 1      the encoder of stage 1: its vision alone

Then `lam.py --encoder runs/small/pretrain/internvl-small/hf` and `distill.py --student .../paligemma-small/hf` start
from there as from a downloaded model. It is no part of LatBot, and every method that we compare gets it alike.

Reads nothing: scenes are drawn as they are needed (--pool keeps them). Writes runs/<preset>/pretrain/<model>/:
args.json, metrics.jsonl, checkpoints/step_*/, and at the end hf/, a folder in Hugging Face's layout.

All of it is our choice:
 1. Half of the questions ask for up to five things, half for all that is there. --refer is a share for a third kind,
    sentences, as phrases are grounded in images. Where no other thing has its noun, a thing is at times asked for
    without its colour. Unlike PaliGemma's, answers name a thing before they say where it is: the places then follow the
    words that they belong to, which is learned faster.
 2. <loc0000>, <loc0008> ... <loc1016> are 128 places between two edges of the image; the target is blurred over the
    next places, since a cross-entropy does not know that numbers have an order. Words and places weigh alike.
 3. Muon instead of AdamW for the layers' matrices: it gets as far in half the steps.
 4. Each patch of the vision encoder is asked, too, which thing it shows and where that thing's edges are, through one
    linear map that is thrown away: answers alone teach a vision encoder slowly. At first it is asked alone, which takes
    a third of the time a step.
 5. Both parts, sight alone and all together, have a schedule of their own, with warm-up and cosine: the language model
    begins with the second.
"""

import functools
import os
import pickle
import shutil
import time
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

import common
from common import InputError, Process
from data.scenes import COLOURS
from data.stills import KINDS, NOUNS, Still, ask, kind_of_question, stills

# Shapes: B stills, H x H pixels, L tokens, P places asked for.

BLUR = 1.0  # standard deviation of a place's target, in places
CLASSES = np.array([len(COLOURS) + 1, len(NOUNS) + 1])  # and none
SHOWN = 0.08  # share of a patch that a thing must cover
UNSEEN = 1_000_003  # added to the seed of the scenes that are measured


@dataclass
class Args:
    model: str = "paligemma-small"
    """What to train: a size of common.VLM_SIZES."""
    out: str = ""
    """Run folder; runs/<preset>/pretrain/<model> if not given."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, bit for bit."""
    scenes: int = 5
    """Scenes a step, of six stills each."""
    pool: int = 0
    """Different scenes, 20 kB each in memory: after these come the first again, with other questions. 0: ever new."""
    steps: int = 8000
    """Optimizer steps."""
    sight: float = 0.6
    """Share of them, the first, in which the vision encoder learns alone."""
    refer: float = 0.0
    """Share of the questions that are sentences about a thing or two; the others ask by names or for all, half each."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    muon: float = 4e-3
    """Peak learning rate of Muon for the matrices of the layers; 0: AdamW has them, too."""
    min_lr: float = 1e-5
    """Learning rate at the last step of a cosine."""
    warmup: int = 100
    """Warm-up steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.01
    """Weight decay of both."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    cpu_bf16: bool = True
    """On a CPU that has instructions for it, multiply matrices in bfloat16, as GPUs always do."""
    val_scenes: int = 20
    """Scenes measured at each save, which training never sees."""
    save_every: int = 250
    """Steps between checkpoints, each with a validation."""
    log_every: int = 20
    """Steps between lines of the log."""
    seed: int = 0
    """Seed of the initialisation and of the scenes."""


TINY = Args(model="paligemma-tiny", scenes=2, steps=30, warmup=5, val_scenes=4, save_every=10, log_every=5)
SMALL = Args(pool=10_000)


# --------------------------------------------------------------------------------------------------------------------
# Questions and answers
# --------------------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, config: Any, asked: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Questions and answers in the words of the model's family: what its forward takes, and labels, all (B, L); a
    label is -100 where nothing is to be said. Answers begin with a space, so that a name is the same word as asked."""
    text = lambda s: tokenizer(s, add_special_tokens=False).input_ids
    paligemma, rows = config.model_type == "paligemma", []
    for question, answer in asked:
        if paligemma:
            vision = config.vision_config
            before = [config.image_token_index] * (vision.image_size // vision.patch_size) ** 2
            rows.append((before + text(f"<bos>{common.STUDENT_PROMPT.format(sent=question)}"), text(f" {answer}<eos>")))
        else:
            before = text("<|im_start|>user\nFrame1: <img>") + [config.image_token_id] * config.image_seq_length
            rows.append((before + text(f"</img>\n{question}<|im_end|>\n<|im_start|>assistant\n"),
                         text(f" {answer}<|im_end|>")))  # fmt: skip
    length, pad = max(len(q) + len(a) for q, a in rows), tokenizer.pad_token_id
    stack = lambda of, value: torch.tensor([of(q, a) + [value] * (length - len(q) - len(a)) for q, a in rows])
    made = {
        "input_ids": stack(lambda q, a: q + a, pad),
        "attention_mask": stack(lambda q, a: [1] * len(q + a), 0),
        "labels": stack(lambda q, a: [-100] * len(q) + a, -100),
    }
    if paligemma:  # image and question see each other, the answer is causal
        made["token_type_ids"] = stack(lambda q, a: [0] * len(q) + [1] * len(a), 1)
    return made


def label_patches(still: Still, grid: int) -> np.ndarray:
    """What each of grid x grid squares shows most of: float32 (grid ** 2, 6), the numbers of its colour and noun (of a
    further class where there is none), and its box relative to the square's centre, in squares."""
    size, found = len(still.image) // grid, np.zeros((grid, grid, 6), np.float32)
    found[..., :2] = CLASSES - 1
    if still.things:
        shown = still.owner == np.arange(len(still.things))[:, None, None]
        shares = reduce(shown.astype(np.float32), "thing (i h) (j w) -> i j thing", "mean", h=size, w=size)
        for i, j in np.argwhere(shares.max(-1) >= SHOWN):
            name, box = still.things[shares[i, j].argmax()]
            *colour, noun = name.split()
            if colour and colour[0] in COLOURS:  # hands are left or right
                found[i, j, 0] = list(COLOURS).index(colour[0])
            found[i, j, 1] = NOUNS.index(noun)
            found[i, j, 2:] = np.array(box) * grid - np.array([i, j, i, j]) - 0.5
    return found.reshape(-1, 6)


def patch_loss(found: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies of colour and noun, and the error of the box where there is a thing. found (B, n, classes + 4);
    labels (B, n, 6) as in `label_patches`."""
    colours, nouns, boxes = found.float().split((*CLASSES.tolist(), 4), -1)
    numbers, there = labels[..., :2].long(), labels[..., 1] < CLASSES[1] - 1
    named = sum(F.cross_entropy(x.flatten(0, 1), numbers[..., k].flatten()) for k, x in enumerate((colours, nouns)))
    return named + F.smooth_l1_loss(boxes[there], labels[..., 2:][there], beta=0.2, reduction="sum") / max(
        1, 4 * there.sum()
    )


def patch_size(config: Any) -> int:
    """Pixels; InternVL's configuration has it for both directions."""
    size = config.vision_config.patch_size
    return size if isinstance(size, int) else size[0]


@functools.cache
def drawn(seed: int, number: int, size: int) -> bytes:
    """The stills of a scene, packed: to draw them takes ten times as long as all else before the model."""
    return zlib.compress(pickle.dumps(stills(seed, number, size)), 1)


def draw(seed: int, step: int, args: Args, size: int, tokenizer: Any, config: Any, kind: str = ""):
    """A step's images, uint8 (B, 3, H, H), and what `encode` makes of questions about them: a function of (seed, step).
    kind: of the questions, one of stills.KINDS; "" mixes them."""
    rng = np.random.default_rng([seed, step])
    numbers = np.arange(step * args.scenes, (step + 1) * args.scenes)
    kept = (lambda n: pickle.loads(zlib.decompress(drawn(seed, n, size)))) if args.pool else (
        lambda n: stills(seed, n, size))  # fmt: skip
    shown = [still for n in (numbers % args.pool if args.pool else numbers).tolist() for still in kept(n)]
    asked = [ask(still, rng, kind or kind_of_question(rng, args.refer)) for still in shown]
    images = torch.from_numpy(np.stack([still.image for still in shown])).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.stack([label_patches(still, size // patch_size(config)) for still in shown]))
    return images, encode(tokenizer, config, asked) | {"patches": labels}


def answer_loss(model: nn.Module, images: Tensor, batch: dict[str, Tensor], first: int):
    """Cross-entropies of words and of places, in nats a token, and the P places: as expected and as they are, (P,).
    first: the id of <loc0000>."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "patches")}
    pixels = common.normalize_pixels(images, model.config.model_type, torch.float32)
    hidden = model.model(pixel_values=pixels, **inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    logits, target = model.lm_head(hidden[labels != -100]).float(), labels[labels != -100]
    is_place = (target >= first) & (target < first + common.PLACES)
    words = F.cross_entropy(logits[~is_place], target[~is_place])
    true, grid = target[is_place] - first, torch.arange(common.PLACES, device=target.device)
    blurred = torch.softmax(-0.5 * ((grid - true[:, None]) / BLUR) ** 2, -1)  # (P, PLACES)
    log_p = logits[is_place].log_softmax(-1)[:, first : first + common.PLACES]
    places = -(blurred * log_p).sum(-1).sum() / max(1, len(true))
    expected = (log_p.exp() * grid).sum(-1) / log_p.exp().sum(-1)
    return words, places, expected.detach(), true


class Pretraining(nn.Module):
    """The vision-language model, and a linear map from each patch of its vision encoder to what the patch shows."""

    def __init__(self, vlm: nn.Module):
        super().__init__()
        self.vlm, self.config = vlm, vlm.config
        self.patches = nn.Linear(vlm.config.vision_config.hidden_size, int(CLASSES.sum()) + 4)

    def speak(self, may: bool) -> None:
        """Whether all learns, or the vision encoder alone."""
        self.requires_grad_(may)
        for module in (self.vlm.model.vision_tower, self.patches):
            module.requires_grad_(True)

    def see(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of the patches, of the vision encoder alone."""
        pixels = common.normalize_pixels(images, self.config.model_type, torch.float32)
        seen = self.vlm.model.vision_tower(pixel_values=pixels).last_hidden_state
        return patch_loss(self.patches(seen[:, -labels.shape[1] :]), labels)

    def forward(self, images: Tensor, batch: dict[str, Tensor], first: int):
        tower, seen = self.vlm.model.vision_tower, []
        hook = tower.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
        try:
            answered = answer_loss(self.vlm, images, batch, first)
        finally:
            hook.remove()
        labels = batch["patches"]
        return *answered, patch_loss(self.patches(seen[0][:, -labels.shape[1] :]), labels)


@torch.no_grad()
def validate(model: nn.Module, args: Args, process: Process, size: int, tokenizer: Any, first: int) -> dict[str, float]:
    """On unseen scenes: the losses; the distance in pixels of a box's upper left corner from the true one, its median,
    asked for by name, where all is told (`described`) and where a sentence speaks of it (`referred`); and the share of
    the first nearer than 2 % of the image's side. The lower right corner is left out: asked for with the true upper
    left one given, it is easy. What is found without any such help is what `benchmarks/localise.py` measures."""
    model.eval()
    found: dict[str, list[Tensor]] = {k: [] for k in ("words", "places", "patches", *KINDS)}
    for k in range(0, args.val_scenes, args.scenes):
        for kind in KINDS:
            images, batch = draw(args.seed + UNSEEN, k, args, size, tokenizer, model.config, kind)
            images, batch = images.to(process.device), {k: v.to(process.device) for k, v in batch.items()}
            with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
                words, places, expected, true, dense = model(images, batch, first)
            off = (expected - true).float().view(-1, 4)[:, :2].norm(dim=-1) * size / common.PLACES
            found[kind].append(off)
            if kind == "detect":
                for name, value in (("words", words), ("places", places), ("patches", dense)):
                    found[name].append(value)
    model.train()
    distance, described, referred = (torch.cat(found[kind]) for kind in ("detect", "describe", "refer"))
    means = {f"val_{k}": torch.stack(found[k]).mean().item() for k in ("words", "places", "patches")}
    means |= {"val_pixels": distance.median().item(), "val_described": described.median().item()}
    means |= {"val_referred": referred.median().item()}
    return means | {"val_near": (distance < 0.02 * size).float().mean().item()}


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def train(args: Args, process: Process) -> None:
    run, kept = common.open_run(args.out, args, process, args.resume)
    model, tokenizer = common.load_vlm(args.model)
    model, size = Pretraining(model).to(process.device).train(), model.config.vision_config.image_size
    size = size if isinstance(size, int) else size[0]
    first, start, tally = tokenizer.convert_tokens_to_ids(common.loc(0.0)), 0, {"skipped": 0}
    alone = round(args.sight * args.steps)
    if kept:
        then = common.load_meta(kept)
        start, tally = then["step"], then["tally"]
        common.load_weights(model, kept)
    optimizer = common.Optimizers(model, args)
    if kept:
        model.speak(start > alone)  # what has learned has moments
        common.load_optimizer(model, optimizer, kept)
    print(f"parameters: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M; commit {common.git_commit()}")
    meta = {"stage": "pretrain", "args": asdict(args), "config": model.config.to_dict()}
    log = common.MetricsLog(run, start, args.steps, process, "pretrain")
    update = common.Updates(optimizer, args.clip, process, tally)
    if start == 0:
        log.write(0, validate(model, args, process, size, tokenizer, first))
    for step in range(start, args.steps):
        began = time.perf_counter()
        at, of = (step, alone) if step < alone else (step - alone, args.steps - alone)
        optimizer.rate(common.learning_rate(at, of, args.lr, args.min_lr, args.warmup))
        images, batch = draw(args.seed, step, args, size, tokenizer, model.config)
        images, batch = images.to(process.device), {k: v.to(process.device) for k, v in batch.items()}
        waited = time.perf_counter() - began
        model.speak(step >= alone)
        with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
            if step < alone:
                parts = {"patches": model.see(images, batch["patches"])}
            else:
                words, places, _, _, dense = model(images, batch, first)
                parts = {"words": words, "places": places, "patches": dense}
        loss = sum(parts.values())
        loss.backward()
        norm = update(loss.detach())
        log.bar.update()

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            values = {k: v.item() for k, v in parts.items()}
            values |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], **tally}
            log.write(done, values | {"seconds": time.perf_counter() - began, "wait": waited})
        if done % args.save_every == 0 or done == args.steps:
            log.write(done, validate(model, args, process, size, tokenizer, first))
            common.save_checkpoint(run, done, model, optimizer, meta | {"tally": tally}, tokenizer, process)
    log.close()
    partial = run / "hf.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.vlm.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(run / "hf", ignore_errors=True)
    os.replace(partial, run / "hf")
    print(f"done: {run / 'hf'}")


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    common.at_least(args, scenes=1, pool=0, steps=1, val_scenes=1, save_every=1, log_every=1, warmup=0, seed=0)
    common.at_least(args, sight=0, refer=0, lr=0, muon=0, min_lr=0, weight_decay=0, betas=0)
    if max(args.sight, args.refer) > 1:
        raise InputError(f"--sight {args.sight:g}, --refer {args.refer:g}: a share is at most 1")
    if args.model not in common.VLM_SIZES:
        raise InputError(f"--model {args.model}: choose one of {', '.join(common.VLM_SIZES)}; models of the hub are "
                         f"pretrained already")  # fmt: skip
    args.out = args.out or f"runs/{args.model.split('-')[1]}/pretrain/{args.model}"
    process = common.setup(args.seed, cpu_bf16=args.cpu_bf16)
    if process.world > 1:
        raise InputError("pretrain.py is for models that fit one process: start it with python, not torchrun")
    train(args, process)


if __name__ == "__main__":
    common.run_main(main)
