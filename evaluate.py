"""Stage 4: is it any good? Reports on the latent action model, the student and the policy (LatBot, Sec. 4, Table 4).

    lam      V_t, Z --> V_{t+k} sampled and actions decoded, with Z whole, in part, and of another clip; probes on Z
    student  V_1, instruction --> Zhat beside the teacher's Z, and the sentences it writes
    sim      policy --> simulated Franka, five tasks --> success rates with Wilson intervals

    python evaluate.py --tiny                        everything, about a minute, on what the tiny stages left
    python evaluate.py lam --small                   one report
    python evaluate.py lam --small --results results/lam_small.json            ... and all that it takes to repeat it
    python evaluate.py sim --policy runs/small/finetune --tasks pick_cup block_slot --trials 20

Reads checkpoints of the other stages and held-out windows of the data sets they were trained on. Writes
runs/<preset>/evaluate/report.json, sim.json (one entry a trial) and runs/<preset>/report.png. One report by itself
renews its part of report.json, keeps the others, and draws report_<which>.png. Each part names the checkpoint that it
is about; a part on another checkpoint is not overwritten but moved to `earlier`.

Where we depart from the paper, or fill in what it does not say:
 1. The paper judges by success rates alone. Users of latent action models ask above all whether theirs is any good, so
    there is a report without a robot: the questions and the controls are those of the field.
 2. Copying the current frame, predicting the mean action, raw pixels, the raw vision encoder and shuffled latents are
    the baselines: a number that does not beat them means nothing. Pixels and raw encoder see all T frames, as Z does.
    (Where nothing was pretrained, raw is the random encoder that training started from.)
 3. Probes are ridge regressions on windows of training episodes, their strength chosen on one in four of those
    episodes, scored on windows of held-out episodes: no episode serves two ends.
 4. R2 and the error of actions are means over the dimensions that move in the held-out windows, without grippers. In
    the log of lam.py, `val_motion` is the mean over all valid entries.
 5. Zeroed tokens are something the decoder never saw in training; shuffled ones, of a window of another episode, are
    ordinary and say the same more fairly. Both are reported.
 6. Trials are paired: trial i has the same placement for every policy. Success rates come with Wilson's 95 % interval.
 7. Other intervals are bootstraps: the held-out episodes are drawn again 1,000 times, with all of their windows. They
    tell what other episodes would have changed; neither the model nor the probes are trained anew.
 8. The student's text is held against what can be said of a subtask from the instruction alone: how often each text
    stands at the frames of training episodes of that instruction (see `text_only`). Its perplexity is that of the
    student's log: nats of all texts over tokens of all texts. A student that sees where the robot is should be below.
 9. The `undistilled` student is the one that this run of distill.py began with: same weights, same random queries.
"""

import math
import os
import platform
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

import common
import distill
import franka
import lam
from common import ACTION_NAMES, GRIPPERS, MOTION, InputError, Process
from data.lerobot import DamagedEpisode
from data.windows import Windows, collate, to_device


@dataclass
class Args:
    what: Annotated[Literal["all", "lam", "student", "sim"], tyro.conf.Positional] = "all"
    """Which report: the latent action model, the student, the simulated robot, or all of them."""
    lam: str = "runs/paper/lam"
    """The latent action model: a run or checkpoint of lam.py."""
    student: str = "runs/paper/distill"
    """The distilled student: a run or checkpoint of distill.py."""
    policy: str = "runs/paper/finetune"
    """The policy: a run or checkpoint of finetune.py, or `expert`, the scripted one."""
    data: tuple[str, ...] = ()
    """Data sets to report on; none: those the checkpoint was trained on (their held-out episodes)."""
    out: str = "runs/paper/evaluate"
    """Folder of report.json and sim.json; report.png goes beside it."""
    results: str = ""
    """Also write the one report asked for to this JSON file, with what it takes to repeat it: command, commits,
    hardware, the training's arguments and time. For results/. (our choice)"""
    samples: int = 256
    """Held-out windows of the LAM's and the student's report. (our choice)"""
    probe_samples: int = 1024
    """Windows of training episodes that the linear probes are fitted to. (our choice)"""
    frames: int = 64
    """How many of them get their future frame sampled. (our choice)"""
    sampling_steps: int = 20
    """Euler steps from noise to a frame. (our choice)"""
    tasks: tuple[str, ...] = tuple(franka.TASKS)
    """Simulated tasks. (Sec. 4.4)"""
    trials: int = 10
    """Trials of each task. (Sec. 4.4)"""
    seconds: float = 0.0
    """Time limit of a trial in simulated seconds; 0: the task's own. (our choice)"""
    image_size: int = 0
    """Pixels of the simulated cameras; 0: as the policy's training pictures, 128 for the expert. (our choice)"""
    seed: int = 0
    """Seed of the placements, the held-out windows and the sampler's noise."""


TINY = Args(
    lam="runs/tiny/lam", student="runs/tiny/distill", policy="runs/tiny/finetune", out="runs/tiny/evaluate", samples=64,
    probe_samples=256, frames=16, sampling_steps=10, tasks=("pick_cup",), trials=2, seconds=4,
)  # fmt: skip
SMALL = Args(
    lam="runs/small/lam", student="runs/small/distill", policy="runs/small/finetune", out="runs/small/evaluate",
    probe_samples=4096, tasks=("pick_cup",), trials=20,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------------------------

Table = dict[str, dict[str, float]]  # row -> column -> number
NO_PROBES = "{}: nothing was held out (--val-every 0): no probes, which would be scored on what they were fitted to"
STRENGTHS = tuple(10.0**k for k in range(-4, 3))  # of a ridge regression; 1: as large as a mean feature vector


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each of the uint8 images (B, 3, H, W): (B,), 1 for equal ones (Wang et al., 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds to import

    # In double precision: variances are differences of large squares.
    return structural_similarity_index_measure(a.double(), b.double(), data_range=255.0, reduction="none").view(-1)


def frame_scores(a: Tensor, b: Tensor) -> dict[str, float]:
    """PSNR (dB) and SSIM, means over images, and the squared error of pixels in 0 .. 1 with its own PSNR. Windows in
    which nothing moves have a PSNR without a bound when copied, and weigh on its mean; the error does not mind them."""
    mse = (a.float() - b.float()).div(255).square().mean().item()
    pooled = -10 * math.log10(max(mse, 1e-8))
    return {"psnr": lam.psnr(a, b).mean().item(), "psnr_of_mse": pooled, "ssim": ssim(a, b).mean().item(), "mse": mse}


def dimension_scores(
    predicted: Tensor, target: Tensor, mask: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """R2 = 1 - error / variance, and squared error, of each dimension: (D,) each, over valid entries of (B, A, D). NaN
    for one that does not move. counts (R, B), how often each window counts: then (R, D) each."""
    counts = torch.ones(len(target), dtype=torch.float64) if counts is None else counts
    target, mask = target.double(), mask.double()
    total = lambda x: counts @ (x * mask).sum(1)
    n = total(torch.ones_like(target)).clamp(min=1)
    variance = total(target.square()) / n - (total(target) / n).square()
    error = total((predicted - target).square()) / n
    error = error.where(variance > 0.01, torch.nan)  # normalised units: a tenth of the range
    return 1 - error / variance, error


def action_scores(predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, float]:
    """R2 and squared error over the dimensions that move, each weighing alike. (B, A, 44) each; without grippers."""
    scores = dimension_scores(predicted[..., MOTION], target[..., MOTION], mask[..., MOTION])
    return {k: v.nanmean().item() for k, v in zip(("r2", "mse"), scores, strict=True)}


def resampled(episode: Tensor, seed: int, times: int = 1000) -> Tensor:
    """Bootstrap over episodes, because windows of one are no independent evidence: how often each window (B,) counts in
    each of so many draws of as many episodes, (1 + times, B). Row 0 is the windows as they are."""
    episodes, number = episode.unique(return_inverse=True)
    n = len(episodes)
    drawn = torch.from_numpy(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), times))
    return torch.cat([torch.ones(1, len(episode)), drawn[:, number]]).double()


def interval(values: Tensor) -> dict[str, float]:
    """A measure of the windows as they are (row 0), and its 95 % interval from their other draws."""
    low, high = np.nanquantile(values[1:].numpy(), (0.025, 0.975)).tolist()
    return {"value": values[0].item(), "low": low, "high": high}


def ridge(gram: Tensor, cross: Tensor, y: Tensor, mask: Tensor, strength: float) -> Tensor:
    """Ridge regression in its dual form, for few rows of many features: fitted to the valid entries of y (n, K), given
    the rows' inner products gram (n, n); its values (m, K) at rows with the inner products cross (m, n)."""
    out = torch.zeros(len(cross), y.shape[1], dtype=y.dtype)
    patterns, which = torch.unique(mask, dim=1, return_inverse=True)  # columns that are valid together
    for i, valid in enumerate(patterns.unbind(1)):
        if valid.any():
            known, mean = y[valid][:, which == i], y[valid][:, which == i].mean(0)
            factor = torch.linalg.cholesky(gram[valid][:, valid] + strength * torch.eye(len(known), dtype=y.dtype))
            out[:, which == i] = cross[:, valid] @ torch.cholesky_solve(known - mean, factor) + mean
    return out


def probe(seen: dict[str, Tensor], held_out: dict[str, Tensor], name: str) -> Tensor:
    """What a linear map from features `name` (B, ...) to `action` (B, A, D) says of the held-out windows. It is fitted
    on the valid entries (`mask`) of the seen ones; its strength is chosen on one in four of their episodes."""
    x, at = seen[name].flatten(1).double(), held_out[name].flatten(1).double()
    mean = x.mean(0)
    x, at = x - mean, at - mean
    scale = x.square().sum(1).mean().clamp(min=1e-9)
    gram, cross = x @ x.T / scale, at @ x.T / scale
    y, mask = seen["action"].flatten(1).double(), seen["mask"].flatten(1)
    episodes, number = seen["episode"].unique(return_inverse=True)
    fit, check = number % 4 != 3, number % 4 == 3
    best = STRENGTHS[len(STRENGTHS) // 2]
    if len(episodes) > 3:
        errors = []
        for strength in STRENGTHS:
            values = ridge(gram[fit][:, fit], gram[check][:, fit], y[fit], mask[fit], strength)
            errors.append(((values - y[check]).square() * mask[check]).sum().item())
        best = STRENGTHS[int(np.argmin(errors))]
    return ridge(gram, cross, y, mask, best).float().view_as(held_out["action"])


def mean_action(seen: dict[str, Tensor]) -> Tensor:
    """The mean action (A, D) of the seen windows: what a model that sees nothing would predict."""
    return (seen["action"] * seen["mask"]).sum(0) / seen["mask"].sum(0).clamp(min=1)


def partners(episode: Tensor) -> Tensor:
    """For each window the number of another, of another episode unless one has more than half of them (B,)."""
    order = episode.argsort(stable=True)
    return torch.empty_like(order).scatter(0, order, order.roll(len(order) // 2))


def batches(
    windows: Windows, samples: int, batch: int, process: Process, desc: str, damaged: set[str]
) -> Iterator[dict[str, Any]]:
    """Windows 0 .. samples - 1 of a stream, each with the number of its `episode`. What is damaged is said, added to
    `damaged`, and drawn around."""
    bar = tqdm(total=samples, desc=desc, unit="window", mininterval=1)
    for first in range(0, samples, batch):
        drawn = [windows[i] for i in range(first, min(first + batch, samples))]
        for s in drawn:
            at = int(np.searchsorted(windows.ends[s["dataset"]], s["window"], side="right"))
            s["episode"] = (s["dataset"] << 32) + int(windows.chosen[s["dataset"]][at])
            for line in set(s["damaged"].splitlines()) - damaged:
                tqdm.write(f"damaged, another window is drawn: {line}", file=sys.stderr)
                damaged.add(line)
        yield to_device(collate(drawn), process.device)
        bar.update(len(drawn))
    bar.close()


def columns(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Batches (dictionaries of tensors and lists) one below the other."""
    rows = list(rows)
    return {k: torch.cat([r[k] for r in rows]) if isinstance(v, Tensor) else sum((r[k] for r in rows), [])
            for k, v in rows[0].items()}  # fmt: skip


def pixels(frames: Tensor) -> Tensor:
    """Thumbnails of uint8 frames (B, T, 3, H, W) and how the last differs from the first: (B, F)."""
    small = F.interpolate(frames.flatten(1, 2).float() / 255, (16, 16), mode="area").unflatten(1, (-1, 3))
    return torch.cat([small, small[:, -1:] - small[:, :1]], 1).flatten(1).cpu()


def targets(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What probes need of a batch beside features."""
    return {"action": batch["action"].cpu(), "mask": batch["action_mask"].cpu(), "episode": batch["episode"].cpu()}


def probes(seen: dict[str, Tensor], held_out: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """What the mean action, and a probe on each of the features (row -> column of the windows), say of the held-out
    windows: (B, A, D) each. Nothing where no dimension moves."""
    action, mask = held_out["action"], held_out["mask"]
    mean = mean_action(seen).expand_as(action)
    if not np.isfinite(action_scores(mean, action, mask)["mse"]):
        return {}
    return {"mean": mean} | {row: probe(seen, held_out, name) for row, name in names.items()}


def score(
    predicted: dict[str, Tensor], held_out: dict[str, Tensor], counts: Tensor, pairs: Sequence[tuple[str, str]] = ()
) -> tuple[Table, Table]:
    """A table of the scores of what is predicted, each row with the 95 % interval of its R2; and one of how much R2 the
    first of each of the `pairs` has above the second, a difference within the same draws of the windows."""
    action, mask = held_out["action"], held_out["mask"]
    r2 = {k: dimension_scores(p[..., MOTION], action[..., MOTION], mask[..., MOTION], counts)[0].nanmean(-1)
          for k, p in predicted.items()}  # fmt: skip
    table = {}
    for row, p in predicted.items():
        of = interval(r2[row])
        table[row] = action_scores(p, action, mask) | {"r2_low": of["low"], "r2_high": of["high"]}
    return table, {f"R2: {a} - {b}": interval(r2[a] - r2[b]) for a, b in pairs if {a, b} <= set(r2)}


def origin(checkpoint: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Which checkpoint a part of the report is about."""
    return {"path": str(checkpoint), "step": meta["step"], "commit": meta["commit"], "time": meta["time"]}


# --------------------------------------------------------------------------------------------------------------------
# The latent action model
# --------------------------------------------------------------------------------------------------------------------


def raw_encoder(model: lam.LAM, frames: Tensor) -> Tensor:
    """uint8 frames (B, T, 3, H, H) as the LAM's vision encoder sees them, before the language model: image tokens,
    averaged to at most 4 x 4 places, (B, F)."""
    vlm = model.encoder.vlm
    images = common.normalize_pixels(frames.flatten(0, 1), "internvl", vlm.get_input_embeddings().weight.dtype)
    tokens = vlm.get_image_features(pixel_values=images).pooler_output.float()  # (B T, n, width)
    grid = rearrange(tokens, "b (h w) d -> b d h w", h=math.isqrt(tokens.shape[1]))
    grid = F.adaptive_avg_pool2d(grid, min(grid.shape[-1], 4))
    return rearrange(grid, "(b t) d h w -> b (t d h w)", b=len(frames))


def tampered(z: tuple[Tensor, Tensor], other: Tensor, dla: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """(Z_sce, Z_mot) as they are, zeroed, and those of the window `other` (B,); both sets, and each alone."""
    zero, shuffled = [torch.zeros_like(x) for x in z], [x[other] for x in z]
    changes = {"as_is": z, "zeroed": tuple(zero), "shuffled": tuple(shuffled)}
    if dla:  # without it there is one undivided set
        changes |= {"z_mot_zeroed": (z[0], zero[1]), "z_sce_zeroed": (zero[0], z[1]),
                    "z_mot_shuffled": (z[0], shuffled[1]), "z_sce_shuffled": (shuffled[0], z[1])}  # fmt: skip
    return changes


@torch.no_grad()
def report_lam(args: Args, process: Process) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tables for report.json and pictures for report.png, from held-out windows of the LAM's data.

    frames     V_t copied, V_{t+k} sampled, V_{t+k} through the image codec and back: each beside the true V_{t+k}
    actions    decoded beside true, of each dimension and on average
    probes     linear maps to the actions: the mean, from pixels, from the raw encoder, from each set of tokens
    split      what becomes of frames and actions when Z is tampered with, and how many times worse that is
    transfer   Z of one clip, or its Z_mot alone, decoded from V_t of another: is it that clip's action in this scene?
    gains      how far what counts is above its control, with the interval

    Parts that an ablated model or data without actions do not have are left out."""
    found = common.find_checkpoint(args.lam, "lam")
    model, trained, meta = lam.load_lam(found)
    trained = replace(trained, data=args.data or trained.data, weights=() if args.data else trained.weights,
                      preload=False)  # fmt: skip
    model = raw = model.to(process.device).eval()
    if trained.encoder in common.VLM_SIZES:  # nothing was pretrained: the encoder as training found it
        torch.manual_seed(trained.seed)
        raw = lam.build(trained).to(process.device).eval()
    damaged: set[str] = set()
    codec = lam.load_codec(trained.decoder, model.decoder.config.in_channels, process)
    amp = lambda: torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32)

    def encoded(split: str, samples: int) -> Iterator[dict[str, Any]]:
        windows = lam.make_windows(trained, split)
        for batch in batches(windows, samples, trained.batch, process, f"lam, {split}", damaged):
            video, first, last = batch["video"], batch["video"][:, 0], batch["video"][:, -1]
            with amp():
                z_sce, z_mot = model.encode(video, batch["instruction"])
                row = {"z_sce": z_sce, "z_mot": z_mot, "encoder": raw_encoder(raw, video), "pixels": pixels(video)}
                if split == "val":
                    row |= {"first": first, "last": last, "now": codec.encode(first), "future": codec.encode(last)}
                    row |= {"codec": codec.decode(row["future"]), "index": batch["index"]}
            row = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in row.items()}
            yield {k: v.cpu() for k, v in (row | targets(batch)).items()} | {"instruction": batch["instruction"]}

    held_out, seen = columns(encoded("val", args.samples)), columns(encoded("train", args.probe_samples))
    action, mask, other = held_out["action"], held_out["mask"], partners(held_out["episode"])
    changes = tampered((held_out["z_sce"], held_out["z_mot"]), other, trained.dla)
    n = min(args.frames, args.samples)
    losses, decoded, sampled = ({name: [] for name in changes} for _ in range(3))
    starts = range(0, args.samples, trained.batch)
    for i in tqdm(starts, desc="lam, decoding", unit="batch", mininterval=1):
        part = slice(i, i + trained.batch)
        now, future, index = (held_out[k][part].to(process.device) for k in ("now", "future", "index"))
        noisy, s, velocity = lam.flow(future, index, args.seed, trained.pure_noise)
        for name, changed in changes.items():
            z = tuple(x[part].to(process.device) for x in changed)
            with amp():
                predicted, _ = model.decode(noisy, now, s, z)
                error = (predicted.float() - velocity) * lam.frame_weight(s, trained)
                losses[name].append(error.square().flatten(1).mean(1).cpu())
                if trained.uad:
                    decoded[name].append(lam.decode_actions(model, now, z, index, args.seed).cpu())
                if m := max(0, min(n - i, len(now))):
                    x = lam.sample_frame(model, now[:m], tuple(x[:m] for x in z), index[:m], args.seed,
                                         args.sampling_steps)  # fmt: skip
                    sampled[name].append(codec.decode(x).cpu())
    losses, sampled = ({k: torch.cat(v) for k, v in d.items()} for d in (losses, sampled))
    decoded = {k: torch.cat(v) for k, v in decoded.items() if v}

    out: dict[str, Any] = {"checkpoint": origin(found, meta), "data": list(trained.data), "samples": args.samples,
                           "probe_samples": args.probe_samples, "sampled": n, "sampling_steps": args.sampling_steps,
                           "held_out": bool(trained.val_every), "damaged": sorted(damaged)}  # fmt: skip
    first, last = held_out["first"][:n], held_out["last"][:n]
    out["frames"] = {"copied": frame_scores(first, last), "sampled": frame_scores(sampled["as_is"], last),
                     "codec": frame_scores(held_out["codec"][:n], last)}  # fmt: skip
    tokens = {"z_sce": "z_sce", "z_mot": "z_mot"} if trained.dla else {"z": "z_mot"}
    features = {"pixels": "pixels", "encoder": "encoder"} | tokens
    if not trained.val_every:
        print(NO_PROBES.format("lam"))
        features = {}
    predicted, counts = probes(seen, held_out, features), resampled(held_out["episode"], args.seed)
    if not predicted:  # data without actions
        decoded = {}
    if decoded:
        predicted["decoder"] = decoded["as_is"]
        out["actions"] = action_table(decoded["as_is"], action, mask, mean_action(seen))
    pairs = [("decoder", "pixels"), ("z_mot", "pixels"), ("z_mot", "z_sce")]
    out["probes"], out["gains"] = score(predicted, held_out, counts, pairs)
    gain = (lam.psnr(sampled["as_is"], last) - lam.psnr(first, last)).double()
    out["gains"]["PSNR: sampled - copied"] = interval(counts[:, :n] @ gain / counts[:, :n].sum(1))
    out["split"] = {}
    for name in changes:
        scores = frame_scores(sampled[name], last)
        row = {"psnr": scores["psnr"], "frame_mse": scores["mse"], "frame_loss": losses[name].mean().item()}
        if decoded:
            row["action_mse"] = action_scores(decoded[name], action, mask)["mse"]
        whole = out["split"].get("as_is", row)
        out["split"][name] = row | {f"{k}_ratio": row[k] / max(whole[k], 1e-9) for k in row if k != "psnr"}
    out["transfer"] = {}
    for row, name in {"z": "shuffled", "z_mot": "z_mot_shuffled"}.items():
        if name in changes:
            frames = {"source": held_out["last"][other[:n]], "scene": first}
            truth = {"source": (action[other], mask[other]), "scene": (action, mask)}
            scores = {f"psnr_{k}": lam.psnr(sampled[name], v).mean().item() for k, v in frames.items()}
            for k, v in truth.items() if decoded else ():
                scores |= {f"{c}_{k}": x for c, x in action_scores(decoded[name], *v).items()}
            out["transfer"][row] = scores
    return out, held_out | {"sampled": sampled, "decoded": decoded, "other": other}


def action_table(predicted: Tensor, target: Tensor, mask: Tensor, mean: Tensor) -> Table:
    """A row for each dimension that moves (R2, squared error, the mean action's squared error) and each gripper
    (accuracy, and that of its more frequent command); and the means over the former. (B, A, 44) each, mean (A, 44)."""
    r2, mse = dimension_scores(predicted, target, mask)
    baseline = dimension_scores(mean.expand_as(target), target, mask)[1]
    moving = [i for i in MOTION if not mse[i].isnan()]
    scores = {"r2": r2, "mse": mse, "mse_mean": baseline}
    table = {"mean": {k: v[moving].mean().item() for k, v in scores.items()}}
    table |= {ACTION_NAMES[i]: {k: v[i].item() for k, v in scores.items()} for i in moving}
    for i in GRIPPERS:
        valid = mask[..., i]
        if valid.any():
            open_ = target[..., i][valid] > 0.5
            right, share = (predicted[..., i][valid] > 0.5) == open_, open_.float().mean().item()
            table[ACTION_NAMES[i]] = {"accuracy": right.float().mean().item(), "majority": max(share, 1 - share)}
    return table


# --------------------------------------------------------------------------------------------------------------------
# The student
# --------------------------------------------------------------------------------------------------------------------


def text_only(windows: Windows, instructions: list[str], texts: list[str]) -> Tensor:
    """Nats (B,) that each subtask text costs whoever knows its instruction but sees no image, -log p(text |
    instruction), by how often whole texts stand at the frames of the training episodes, `windows`:

        p(text | instruction) = (n(instruction, text) + p(text)) / (n(instruction) + 1)
        p(text) = (n(text) + 1) / (n + S)

    where S is the number of texts that the data sets list, so that none is impossible. (our choice)"""
    pairs: Counter = Counter()
    for reader, chosen in zip(windows.readers, windows.chosen, strict=True):
        for i in chosen.tolist():
            try:
                ep = reader.episode(i)
            except DamagedEpisode:  # told where its windows are drawn
                continue
            subtask = ep["subtask"][:-1]  # no window starts at the last frame
            for text in distill.phases({"subtask": subtask, "instruction": [ep["task"]] * len(subtask)}):
                pairs[ep["task"], text] += 1
    listed = {text for r in windows.readers for text in (*r.tasks.values(), *r.subtasks.values())}
    given, written = Counter(), Counter()
    for (instruction, text), n in pairs.items():
        given[instruction] += n
        written[text] += n
    prior = lambda text: (written[text] + 1) / (written.total() + len(listed))
    p = [(pairs[i, t] + prior(t)) / (given[i] + 1) for i, t in zip(instructions, texts, strict=True)]
    return -torch.tensor(p, dtype=torch.float64).log()


@torch.no_grad()
def report_student(args: Args, process: Process) -> dict[str, Any]:
    """What the student foresees and writes of held-out windows, beside the teacher's Z and the true subtask.

    mse, kl, cosine   between Zhat and Z; `_mean` of the mean Z, `_shuffled` with Z of windows of other episodes
    perplexity        of the subtask's text, and `perplexity_text_only` without an image (see `text_only`)
    probes            linear maps to the actions: the mean, from pixels, from Zhat of the `undistilled` student, as it
                      was before its first step, and from Zhat
    gains             how far what counts is above its control, with the interval
    sentences         a few that the student writes"""
    found = common.find_checkpoint(args.student, "distill")
    student, trained, meta = distill.load_student(found)
    torch.manual_seed(trained.seed)  # and then as distill.train: the weights with which this student began
    teacher, teacher_args, taught = lam.load_lam(args.lam)
    if meta["teacher"] != {k: taught[k] for k in meta["teacher"]}:
        raise InputError(f"the student at {args.student} learned from {meta['teacher']} of {trained.lam}; {args.lam} "
                         f"is now at step {taught['step']} of {taught['commit']}: distil again, or give its --lam")
    sizes = found if trained.student in common.VLM_SIZES else None  # as they were then
    before = distill.build(trained, student.tokens, student.head.out_features, sizes)
    student, before, teacher = (model.to(process.device).eval() for model in (student, before, teacher))
    trained = replace(trained, data=args.data or trained.data, weights=() if args.data else trained.weights,
                      preload=False, starts=0.0)  # fmt: skip
    out: dict[str, Any] = {"checkpoint": origin(found, meta), "teacher": meta["teacher"], "data": list(trained.data),
                           "samples": args.samples, "probe_samples": args.probe_samples,
                           "held_out": bool(trained.val_every)}  # fmt: skip
    amp = lambda: torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32)
    damaged: set[str] = set()

    def encoded(split: str, samples: int) -> Iterator[dict[str, Any]]:
        windows = distill.make_windows(trained, teacher_args, student.image_size, split)
        for batch in batches(windows, samples, trained.batch, process, f"student, {split}", damaged):
            images, there = distill.first_frames(batch)
            given = images, batch["instruction"], None, there
            if split == "val" and "sentences" not in out:
                few = None if there is None else there[:4]
                wrote = student.describe(images[:4], batch["instruction"][:4], seen=few)
                out["sentences"] = [{"instruction": i, "wrote": w, "true": t} for i, w, t in
                                    zip(batch["instruction"], wrote, distill.phases(batch), strict=False)]  # fmt: skip
            with amp():
                row = {"undistilled": before(*given), "pixels": pixels(images)}
                row |= distill.foresee(student, teacher, batch) if split == "val" else {"hat": student(*given)}
            row = {k: v.float().cpu() for k, v in row.items()} | targets(batch)
            yield row | {"instruction": batch["instruction"], "text": distill.phases(batch)}

    held_out, seen = columns(encoded("val", args.samples)), columns(encoded("train", args.probe_samples))
    out["damaged"] = sorted(damaged)
    hat, z, episode = held_out["hat"], held_out["z"], held_out["episode"]
    counts = resampled(episode, args.seed)
    out |= {k: v.item() for k, v in distill.alignment_loss(hat, z)[1].items()}
    out["mse_mean"] = F.mse_loss(z.mean(0, keepdim=True).expand_as(z), z).item()
    cosine = torch.einsum("ind,jnd->ij", F.normalize(hat, dim=-1), F.normalize(z, dim=-1)).double() / hat.shape[1]
    other = (episode[:, None] != episode).double()
    true, shuffled = cosine.diagonal(), (cosine * other).sum(1) / other.sum(1).clamp(min=1)
    out |= {"cosine": true.mean().item(), "cosine_shuffled": shuffled.mean().item()}
    guess = text_only(distill.make_windows(trained, teacher_args, 16, "train"), held_out["instruction"],
                      held_out["text"])  # fmt: skip
    perplexity = lambda nats: (counts @ nats.double() / (counts @ held_out["words"].double())).clamp(max=20).exp()
    out |= {"perplexity": perplexity(held_out["nats"])[0].item(), "perplexity_text_only": perplexity(guess)[0].item()}
    names = {"pixels": "pixels", "undistilled": "undistilled", "zhat": "hat"}
    if not trained.val_every:
        print(NO_PROBES.format("student"))
        names = {}
    pairs = [("zhat", "undistilled"), ("zhat", "pixels")]
    out["probes"], out["gains"] = score(probes(seen, held_out, names), held_out, counts, pairs)
    out["gains"] |= {
        "cosine: true - shuffled": interval(counts @ (true - shuffled) / counts.sum(1)),
        "perplexity: student - text only": interval(perplexity(held_out["nats"]) - perplexity(guess)),
    }
    return out


# --------------------------------------------------------------------------------------------------------------------
# The simulated robot
# --------------------------------------------------------------------------------------------------------------------


def report_sim(args: Args) -> tuple[dict[str, Any], list[dict], list[np.ndarray]]:
    """Success rates by task; the entries, one a trial; and the first ten seconds of film, frame by frame."""
    unknown = [t for t in args.tasks if t not in franka.TASKS]
    if unknown:
        raise InputError(f"unknown tasks {unknown}: choose from {list(franka.TASKS)}")
    policy = franka.make_policy(args.policy)
    size = franka.picture_size(policy, args.image_size)
    out: dict[str, Any] = {"checkpoint": policy.name, "image_size": size}
    entries: list[dict] = []
    film: list[np.ndarray] = []
    keep = lambda frame: film.append(frame) if len(film) < 10 * franka.HZ else None  # a frame has most of a megabyte
    for task in args.tasks:
        rows = franka.run_trials(policy, task, args.trials, args.seed, image_size=size, seconds=args.seconds,
                                 film=None if film else keep)  # fmt: skip
        k = sum(r["success"] for r in rows)
        low, high = common.wilson(k, len(rows))
        out[task] = {"successes": k, "trials": len(rows), "low": low, "high": high}
        print(f"{task}: {k}/{len(rows)}, 95 % interval {100 * low:.0f} to {100 * high:.0f} %")
        entries += rows
    return out, entries, film


# --------------------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------------------


def draw_frames(fig: Any, pictures: dict[str, Any], title: str) -> None:
    """A column for each of ten windows: V_t, V_{t+k}, and what is sampled from Z, without parts of it, with another."""
    sampled, other = pictures["sampled"], pictures["other"]
    n = len(sampled["as_is"])
    first, last, source = pictures["first"][:n], pictures["last"][:n], other[:n]
    rows = {"V_t": first, "true V_{t+k}": last, "sampled": sampled["as_is"]}
    rows |= {f"sampled,\n{label}": sampled[k] for k, label in {"zeroed": "Z zeroed", "z_mot_zeroed": "Z_mot zeroed",
             "z_sce_zeroed": "Z_sce zeroed"}.items() if k in sampled}  # fmt: skip
    rows |= {"another clip:\nits V_t": pictures["first"][source], "its V_{t+k}": pictures["last"][source],
             "sampled, its Z\nfrom the top V_t": sampled["shuffled"]}  # fmt: skip
    moved = (first.float() - last.float()).abs().flatten(1).mean(1)  # the windows in which most happens say most
    shown = moved.argsort(descending=True)[:10].sort().values.tolist()
    axes = fig.subplots(len(rows), len(shown), squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
        for ax, i in zip(line, shown, strict=True):
            ax.imshow(images[i].permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[])
            if label == "V_t" or label.startswith("sampled") and "its Z" not in label:
                decibel = lam.psnr(images[[i]], last[[i]]).item()
                ax.text(0.03, 0.04, f"{decibel:.1f} dB", fontsize=7, color="white", transform=ax.transAxes,
                        bbox={"color": "black", "alpha": 0.5, "pad": 1})  # fmt: skip
    for ax, i in zip(axes[0], shown, strict=True):
        ax.set_title(textwrap.shorten(pictures["instruction"][i], 24, placeholder=" ..."), fontsize=7)
    fig.suptitle(title, fontsize=11)


def draw_actions(fig: Any, pictures: dict[str, Any], table: Table) -> None:
    """Decoded against true actions, for up to seven dimensions that move, and a gripper."""
    names = [k for k in table if "r2" in table[k] and k != "mean"][:7]
    names += [k for k in table if "accuracy" in table[k]][-1:]
    for ax, name in zip(fig.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        i = ACTION_NAMES.index(name)
        valid = pictures["mask"][..., i]
        x, y = pictures["action"][..., i][valid], pictures["decoded"]["as_is"][..., i][valid]
        if "accuracy" in table[name]:
            bins = np.linspace(0, 1, 11)
            ax.hist([y[x < 0.5].numpy(), y[x > 0.5].numpy()], bins, stacked=True, label=["closed", "open"])
            ax.set_title(f"{name}\naccuracy {table[name]['accuracy']:.2f} ({table[name]['majority']:.2f})", fontsize=9)
            ax.set_xlabel("decoded probability of open", fontsize=8)
            ax.legend(title="true", fontsize=7, title_fontsize=7)
            continue
        ax.plot(x, y, ".", markersize=3, alpha=0.4)
        ends = [float(torch.cat([x, y]).min()), float(torch.cat([x, y]).max())]
        ax.plot(ends, ends, "k-", linewidth=0.5)
        ax.set_title(f"{name}\nR2 {table[name]['r2']:.2f}", fontsize=9)
        ax.set_xlabel("true", fontsize=8)
    fig.axes[0].set_ylabel("decoded", fontsize=8)
    mean = table["mean"]
    fig.suptitle(f"actions, decoded against true (normalised): R2 {mean['r2']:.3f}, squared error {mean['mse']:.4f}, "
                 f"of the mean action {mean['mse_mean']:.4f}", fontsize=11)  # fmt: skip


def draw_bars(ax: Any, table: Table, labels: dict[str, str], title: str, least: float | None = None) -> None:
    """Horizontal bars, a group for each row and one of them for each of the columns `labels`, with their values. least:
    where the axis begins at the left; None: a logarithmic axis of factors. A line spans the interval of a column that
    has its `_low` and `_high`."""
    labels = {k: v for k, v in labels.items() if any(k in row for row in table.values())}
    height = 0.8 / max(len(labels), 1)
    for j, (column, label) in enumerate(labels.items()):
        at = [i + (j - (len(labels) - 1) / 2) * height for i in range(len(table))]
        values = [row.get(column, np.nan) for row in table.values()]
        start = 1 if least is None else 0
        shown = [v if least is None else max(v, least) for v in values]
        ax.barh(at, np.array(shown) - start, height, left=start, label=label)
        for y, v, x, row in zip(at, values, shown, table.values(), strict=True):
            ends = [min(max(row[k], least), 1) for k in (f"{column}_low", f"{column}_high") if k in row]
            ax.plot(ends, [y] * len(ends), color="black", linewidth=0.8)
            right = max(x, start, *ends)
            ax.annotate(f"{v:.2f}", (right, y), (2, 0), textcoords="offset points", va="center", fontsize=7)
    if least is None:
        ax.set_xscale("log")
        ticks = [v for v in (0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if ax.get_xlim()[0] <= v <= ax.get_xlim()[1]]
        ax.set_xticks(ticks, [f"x{v:g}" for v in ticks], minor=False)
        ax.minorticks_off()
        ax.axvline(1, color="black", linewidth=0.8)
    else:
        ax.set_xlim(least, 1.15)
        ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(table)), table)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_title(title, fontsize=10)
    if len(labels) > 1:
        ax.legend(fontsize=7)


def draw_curves(fig: Any, runs: dict[str, str]) -> None:
    """The logged losses of each run (dashed: what predicting the mean would give), and the LAM's held-out health."""
    ends = ("frame", "motion", "mse", "ee", "motion_mean", "ee_mean")
    skip = ("step", "lr", "seconds", "wait", "grad_norm", "bad", "skipped")
    panels = {
        "losses": lambda k: k not in skip and (not k.startswith("val_") or k.endswith(ends)),
        "PSNR in dB": lambda k: k.startswith("val_psnr"),
        "times worse without": lambda k: "_zero_" in k,
    }
    wanted = []
    for stage, run in runs.items():
        metrics = common.read_metrics(run)
        keys = sorted({k for m in metrics for k in m})
        wanted += [(f"{stage}: {title}", metrics, list(filter(chosen, keys))) for title, chosen in panels.items()]
    wanted = [panel for panel in wanted if panel[2]] or wanted[:1]
    for ax, (title, metrics, keys) in zip(fig.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True):
        for key in keys:
            points = [(m["step"], m[key]) for m in metrics if key in m]
            ax.plot(*zip(*points, strict=True), "--" if key.endswith(("mean", "copy")) else "-", label=key)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step", fontsize=8)
        if "PSNR" not in title:
            ax.set_yscale("log")
        if keys:
            ax.legend(fontsize=7)


def draw_student(fig: Any, part: dict[str, Any]) -> None:
    """The student's probes and cosines as bars; how far it is above its controls, and what it writes, in words."""
    fig.suptitle(f"{part['checkpoint']['path']}, held-out windows", fontsize=11)
    probes, cosines, words = fig.subplots(1, 3, width_ratios=[1, 0.7, 1.6])
    draw_bars(probes, part["probes"], {"r2": "R2"}, "R2 of linear probes to the actions", -0.2)
    rows = {"its own Z": {"cosine": part["cosine"]}, "other episodes' Z": {"cosine": part["cosine_shuffled"]}}
    draw_bars(cosines, rows, {"cosine": "cosine"}, "cosine of Zhat and", -0.2)
    lines = [f"perplexity of the subtask's text {part['perplexity']:.3f}, of one who knows the instruction alone "
             f"{part['perplexity_text_only']:.3f}", "", "differences, with 95 % intervals over episodes:"]  # fmt: skip
    lines += [f"{name}: {g['value']:+.3f} ({g['low']:+.3f} to {g['high']:+.3f})" for name, g in part["gains"].items()]
    lines += ["", *(f"{s['instruction']}: writes {s['wrote']!r}, true {s['true']!r}" for s in part["sentences"])]
    words.text(0, 1, "\n".join(textwrap.shorten(x, 100) for x in lines), va="top", fontsize=7.5)
    words.axis("off")


def draw_film(fig: Any, film: list[np.ndarray], report: dict[str, Any]) -> None:
    """Six frames of a rollout."""
    shown = [film[i] for i in np.linspace(0, len(film) - 1, min(6, len(film))).round().astype(int)]
    rates = [f"{t} {v['successes']}/{v['trials']}" for t, v in report.items() if isinstance(v, dict) and "trials" in v]
    fig.suptitle(f"rollout of {report['checkpoint']}: " + ", ".join(rates), fontsize=11)
    for ax, frame in zip(fig.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        ax.imshow(frame)
        ax.set(xticks=[], yticks=[])


def draw(path: Path, pictures: dict[str, Any] | None, runs: dict[str, str], film: list, report: dict) -> None:
    """One PNG: the latent action model's frames, actions and tables, the stages' losses, the rollout; what there is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = report["lam"] if pictures else {}
    rows = 6 + len({"zeroed", "z_mot_zeroed", "z_sce_zeroed"} & set(pictures["sampled"])) if pictures else 0
    student = report.get("student") if "distill" in runs else None
    heights = [1.25 * rows + 0.7, 2.8 * ("actions" in n), 3.4 * bool(n), 2.6 * bool(student), 3.0, 2.6 * bool(film)]
    if not pictures:
        heights[0] = 0
    fig = plt.figure(figsize=(14, sum(heights)), layout="constrained")
    present = [h for h in heights if h]
    parts = iter(fig.subfigures(len(present), 1, height_ratios=present, squeeze=False)[:, 0])
    frames, actions, bars, told, curves, rollout = (next(parts) if h else None for h in heights)
    if frames:
        words = {"copied": "V_t copied", "sampled": "V_{t+k} sampled", "codec": "V_{t+k} through the codec"}
        scores = [f"{words[k]}: {v['psnr']:.1f} dB, SSIM {v['ssim']:.3f}" for k, v in n["frames"].items()]
        draw_frames(frames, pictures, f"{n['checkpoint']['path']}, held-out windows\n{'; '.join(scores)}")
        axes = bars.subplots(1, 3, width_ratios=[1, 1.3, 1])
        draw_bars(axes[0], n["probes"], {"r2": "R2"}, "R2 of linear probes to the actions", -0.2)
        worse = {"action_mse_ratio": "actions", "frame_loss_ratio": "frame loss", "frame_mse_ratio": "sampled frame"}
        split = {k.replace("_", " ").replace("z ", "Z_"): row for k, row in n["split"].items() if k != "as_is"}
        draw_bars(axes[1], split, worse, "times worse when Z is tampered with")
        whose = {"r2_source": "of the clip that Z is from", "r2_scene": "of the scene's own clip"}
        draw_bars(axes[2], n["transfer"], whose, "Z in another clip's scene: R2 to actions", -1)
    if actions:
        draw_actions(actions, pictures, n["actions"])
    if told:
        draw_student(told, student)
    draw_curves(curves, runs)
    if rollout:
        draw_film(rollout, film, report["sim"])
    partial = path.with_name("partial." + path.name)
    fig.savefig(partial, dpi=100)
    partial.replace(path)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


def file_part(report: dict[str, Any], name: str, part: dict[str, Any]) -> None:
    """Puts a part into the report. One that is there and was made from another checkpoint moves to `earlier`."""
    same = lambda other: other.get("checkpoint") == part["checkpoint"]
    earlier = [old for old in report.get("earlier", []) if old["part"] != name or not same(old)]
    if name in report and not same(report[name]):
        earlier.append({"part": name} | report[name])
        print(f"{name}: the report on {report[name].get('checkpoint')} is kept under `earlier`")
    report |= {name: part, "earlier": earlier}


def show(title: str, part: dict[str, Any]) -> None:
    """Prints the numbers of a part and its tables."""
    about = part["checkpoint"]
    print(f"{title}: {about['path'] if isinstance(about, dict) else about}")
    print("\n".join(f"  {k:24} {v:9.4f}" for k, v in part.items() if isinstance(v, float)))
    for name, table in part.items():
        if not (isinstance(table, dict) and table and all(isinstance(row, dict) for row in table.values())):
            continue
        keys = list(dict.fromkeys(k for row in table.values() for k in row))
        print(f"  {name:16}" + "".join(f"{k:>18}" for k in keys))
        for row, values in table.items():
            print(f"    {row:14}" + "".join(f"{values[k]:18.4f}" if k in values else " " * 18 for k in keys))


def hardware() -> str:
    """This machine: its GPU, or how many cores of which CPU this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {(names or [platform.machine()])[0]}"


def training(stage: str, run: str) -> dict[str, Any]:
    """By which commit, for how long and with which arguments a checkpoint was trained. The seconds are of its steps
    alone, by the mean of the logged ones."""
    found = common.find_checkpoint(run, stage)
    meta = common.load_meta(found)
    logged = [m["seconds"] for m in common.read_metrics(found.parent.parent) if "seconds" in m]
    seconds = round(meta["step"] * float(np.mean(logged))) if logged else None
    return {"trained_at_commit": meta["commit"], "training_seconds": seconds, "training_args": meta["args"]}


def evaluate(args: Args, process: Process) -> dict[str, Any]:
    """Runs the reports asked for, merges them into report.json and draws report.png."""
    common.at_least(args, samples=8, probe_samples=8, frames=1, sampling_steps=1, trials=1, seconds=0, seed=0,
                    image_size=16 * bool(args.image_size))  # fmt: skip
    if not args.tasks:
        raise InputError(f"--tasks is empty: choose from {list(franka.TASKS)}")
    results = Path(args.results)
    if args.results and (args.what == "all" or results.suffix != ".json"):
        raise InputError(f"--results {args.results} is for one report, lam, student or sim, and ends in .json")
    results.parent.mkdir(parents=True, exist_ok=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.json"
    report = common.read_json(path) if path.exists() else {}
    pictures, film = None, []
    for name in ("lam", "student", "sim") if args.what == "all" else (args.what,):
        began = time.time()
        if name == "lam":
            part, pictures = report_lam(args, process)
        elif name == "student":
            part = report_student(args, process)
        else:
            part, entries, film = report_sim(args)
            common.write_json(out / "sim.json", entries)
        part |= {"commit": common.git_commit(), "seed": args.seed, "seconds": round(time.time() - began, 1)}
        file_part(report, name, part)
        show(name, part)
    common.write_json(path, report)
    stages = {"lam": ("lam", args.lam), "student": ("distill", args.student), "sim": ("finetune", args.policy)}
    if args.results:
        words = [re.sub(r"(^|=)/.*/(?=.)", r"\1", w) for w in sys.argv]  # not where a machine has it
        facts = {"commands": [f"python {' '.join(words)}"], "seed": args.seed, "hardware": hardware()}
        facts |= {"evaluated_at_commit": part["commit"]}
        if stages[args.what][1] != "expert":
            facts |= training(*stages[args.what])
        common.write_json(results, facts | {args.what: part})
    picture = out.parent / ("report.png" if args.what == "all" else f"report_{args.what}.png")
    draw(picture, pictures, dict(run for k, run in stages.items() if args.what in ("all", k)), film, report)
    print(f"wrote {path} and {picture}")
    return report


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    evaluate(args, common.setup(args.seed))


if __name__ == "__main__":
    common.run_main(main, resumes=False)
