"""Stage 4: is it any good? Reports on the latent action model, the student and the policy (LatBot, Sec. 4, Table 4).

    lam      V_t, Z --> sampled V_{t+k} beside the true frame and beside V_t copied;  Z --> actions beside the truth
    student  V_1, instruction --> Zhat beside the teacher's Z, and the sentences it writes
    sim      policy --> simulated Franka, five tasks --> success rates with Wilson intervals

    python evaluate.py --tiny                        everything, a quarter of a minute, on what the tiny stages left
    python evaluate.py lam --small                   one report
    python evaluate.py sim --policy runs/small/finetune --tasks pick_cup block_slot --trials 20

Reads checkpoints of the other stages and held-out windows of the data sets they were trained on. Writes
runs/<preset>/evaluate/report.json, sim.json (one entry a trial) and runs/<preset>/report.png. One report by itself
renews its part of report.json, keeps the others, and draws report_<which>.png.

Where we depart from the paper, or fill in what it does not say:
 1. The paper judges by success rates alone. Users of latent action models ask above all whether theirs is any good, so
    there is a report without a robot: the questions and the controls are those of the field.
 2. Copying the current frame, predicting the mean action, a raw pixel encoding and shuffled latents are the baselines:
    a number that does not beat them means nothing.
 3. Probes are ridge regressions on half of the held-out windows, scored on the other half. Windows of one episode may
    fall into both, so a probe's R2 is to be compared with its neighbours, not read by itself.
 4. Trials are paired: trial i has the same placement for every policy. Success rates come with Wilson's 95 % interval.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

import common
import distill
import franka
import lam
from common import ACTION_NAMES, GRIPPERS, MOTION, InputError, Process


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
    samples: int = 256
    """Held-out windows of the LAM's and the student's report. (our choice)"""
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
    image_size: int = 128
    """Pixels of the simulated cameras. (our choice)"""
    seed: int = 0
    """Seed of the placements, the held-out windows and the sampler's noise."""


TINY = Args(
    lam="runs/tiny/lam", student="runs/tiny/distill", policy="runs/tiny/finetune", out="runs/tiny/evaluate", samples=64,
    frames=16, sampling_steps=10, tasks=("pick_cup",), trials=2, seconds=4, image_size=64,
)  # fmt: skip
SMALL = Args(
    lam="runs/small/lam", student="runs/small/distill", policy="runs/small/finetune", out="runs/small/evaluate",
    samples=256, frames=64, tasks=("pick_cup",), trials=20, image_size=96,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------------------------


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of uint8 images (B, 3, H, W), image by image."""
    mse = (a.float() - b.float()).square().flatten(1).mean(1).clamp(min=1e-3)
    return (10 * torch.log10(255**2 / mse)).mean().item()


def r2(predicted: Tensor, target: Tensor, mask: Tensor) -> float:
    """1 - error / variance over the valid entries (B, A, D) of dimensions that move, each dimension weighing alike."""
    mask = mask.float()
    n = mask.sum((0, 1)).clamp(min=1)
    mean = (target * mask).sum((0, 1)) / n
    variance = ((target - mean).square() * mask).sum((0, 1)) / n
    error = ((predicted - target).square() * mask).sum((0, 1)) / n
    moving = variance > 0.01  # normalised units: a tenth of the range
    return (1 - error[moving] / variance[moving]).mean().item() if moving.any() else float("nan")


def probe(features: Tensor, target: Tensor, mask: Tensor) -> float:
    """R2 of a ridge regression from features (B, F) to actions (B, A, D): fitted on the first half of the windows,
    scored on the second."""
    x = torch.cat([F.layer_norm(features, features.shape[1:]), torch.ones(len(features), 1)], 1).double()
    y = (target * mask).flatten(1).double()
    half = len(x) // 2
    gram = x[:half] @ x[:half].T + 10.0 * torch.eye(half, dtype=torch.float64)  # the dual form: few rows, many columns
    predicted = x[half:] @ (x[:half].T @ torch.linalg.solve(gram, y[:half]))
    return r2(predicted.float().view_as(target[half:]), target[half:], mask[half:])


# --------------------------------------------------------------------------------------------------------------------
# The latent action model
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def report_lam(args: Args, process: Process) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers for report.json and pictures for report.png, from held-out windows of the LAM's data."""
    model, trained, meta = lam.load_lam(args.lam)
    trained = replace(trained, data=args.data or trained.data, weights=() if args.data else trained.weights)
    model = model.to(process.device).eval()
    codec = lam.load_codec(trained.decoder, model.decoder.config.in_channels, process)
    windows = lam.make_windows(trained, "val")
    bar = tqdm(total=args.samples, desc="lam report", unit="window", mininterval=1)
    columns: dict[str, list[Tensor]] = {}
    texts: list[str] = []
    for first in range(0, args.samples, trained.batch):
        rows = range(first, min(first + trained.batch, args.samples))
        batch = common.to_device(common.collate([windows[i] for i in rows]), process.device)
        z_sce, z_mot = model.encode(batch["video"], batch["instruction"])
        raw = F.interpolate(batch["video"][:, [0, -1]].flatten(1, 2).float() / 255, (16, 16), mode="area").flatten(1)
        row = {"now": codec.encode(batch["video"][:, 0]), "future": codec.encode(batch["video"][:, -1]), "raw": raw,
               "first": batch["video"][:, 0], "last": batch["video"][:, -1], "z_sce": z_sce, "z_mot": z_mot,
               "index": batch["index"], "action": batch["action"], "mask": batch["action_mask"]}  # fmt: skip
        for k, v in row.items():
            columns.setdefault(k, []).append(v)
        texts += batch["instruction"]
        bar.update(len(rows))
    bar.close()
    c = {k: torch.cat(v) for k, v in columns.items()}
    z = (c["z_sce"], c["z_mot"])
    changes = {
        "as_is": z,
        "z_mot_zeroed": (z[0], torch.zeros_like(z[1])),
        "z_sce_zeroed": (torch.zeros_like(z[0]), z[1]),
        "shuffled": (z[0].roll(1, 0), z[1].roll(1, 0)),
    }
    out: dict[str, Any] = {"samples": args.samples, "step": meta["step"], "trained_at": meta["commit"]}
    # What the frame loss and the action error become when Z is tampered with: is the split into two sets real?
    actions = {}
    for name, changed in changes.items():
        frame, predicted = [], []
        for i in range(0, args.samples, trained.batch):
            part = slice(i, i + trained.batch)
            noisy, s, velocity = lam.flow(c["future"][part], c["index"][part], args.seed)
            v, _ = model.decode(noisy, c["now"][part], s, (changed[0][part], changed[1][part]))
            frame.append(F.mse_loss(v.float(), velocity).item())
            if trained.uad:
                zi = (changed[0][part], changed[1][part])
                predicted.append(lam.decode_actions(model, c["now"][part], zi, c["index"][part], args.seed))
        out[f"frame_loss_{name}"] = float(np.mean(frame))
        if trained.uad:
            a, mask = torch.cat(predicted), c["mask"]
            actions[name] = a
            motion, _ = lam.action_terms(a, c["action"], mask)
            out[f"action_mse_{name}"] = (motion / lam.valid_counts(mask)[0].clamp(min=1)).item()
    if trained.uad:
        mean = lam.mean_action(lam.make_windows(replace(trained, preload=False), "train")).to(process.device)
        baseline, _ = lam.action_terms(mean.expand_as(c["action"]), c["action"], c["mask"])
        out["action_mse_mean"] = (baseline / lam.valid_counts(c["mask"])[0].clamp(min=1)).item()
        out["action_r2"] = r2(actions["as_is"][..., MOTION], c["action"][..., MOTION], c["mask"][..., MOTION])
        right = (actions["as_is"][..., GRIPPERS] > 0.5) == (c["action"][..., GRIPPERS] > 0.5)
        out["gripper_accuracy"] = right[c["mask"][..., GRIPPERS]].float().mean().item()
    target, mask = c["action"][..., MOTION].cpu(), c["mask"][..., MOTION].cpu()
    for name in ("z_mot", "z_sce", "raw"):
        out[f"probe_r2_{name}"] = probe(c[name].float().cpu().flatten(1), target, mask)
    k = min(args.frames, args.samples)
    sampled = codec.decode(lam.sample_frame(model, c["now"][:k], (z[0][:k], z[1][:k]), c["index"][:k], args.seed,
                                            args.sampling_steps))  # fmt: skip
    # A latent action of one clip, applied to the scene of another.
    transferred = codec.decode(lam.sample_frame(model, c["now"][:k], (z[0][:k].roll(1, 0), z[1][:k].roll(1, 0)),
                                                c["index"][:k], args.seed, args.sampling_steps))  # fmt: skip
    out["psnr_sampled"] = psnr(sampled, c["last"][:k])
    out["psnr_copy"] = psnr(c["first"][:k], c["last"][:k])
    pictures = {"first": c["first"][:k], "sampled": sampled, "last": c["last"][:k], "transferred": transferred,
                "instructions": texts, "action": c["action"], "mask": c["mask"],
                "predicted": actions.get("as_is"), "names": ACTION_NAMES}  # fmt: skip
    return out, {key: v.cpu() if isinstance(v, Tensor) else v for key, v in pictures.items()}


# --------------------------------------------------------------------------------------------------------------------
# The student
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def report_student(args: Args, process: Process) -> dict[str, Any]:
    """Held-out cosine, losses and perplexity, a probe from Zhat to the next actions, and a few written sentences."""
    student, trained, meta = distill.load_student(args.student)
    teacher, teacher_args, taught = lam.load_lam(args.lam)
    if meta["teacher"] != {k: taught[k] for k in meta["teacher"]}:
        raise InputError(f"the student at {args.student} learned from {meta['teacher']} of {trained.lam}; {args.lam} "
                         f"is now at step {taught['step']} of {taught['commit']}: distil again, or give its --lam")
    student, teacher = student.to(process.device).eval(), teacher.to(process.device).eval()
    trained = replace(trained, data=args.data or trained.data, weights=() if args.data else trained.weights,
                      val_samples=args.samples)  # fmt: skip
    windows = distill.make_windows(trained, teacher_args, student.image_size, "val")
    out = {"step": meta["step"], "trained_at": meta["commit"]}
    out |= {k.removeprefix("val_"): v for k, v in distill.validate(student, teacher, windows, trained, process).items()}
    student.eval()
    hats, raws, actions, masks = [], [], [], []
    for first in tqdm(range(0, args.samples, trained.batch), desc="student report", unit="batch", mininterval=1):
        rows = range(first, min(first + trained.batch, args.samples))
        batch = common.to_device(common.collate([windows[i] for i in rows]), process.device)
        hats.append(student(batch["first"], batch["instruction"]).float().cpu().flatten(1))
        raws.append(F.interpolate(batch["first"][:, 0].float().cpu() / 255, (16, 16), mode="area").flatten(1))
        actions.append(batch["action"].cpu())
        masks.append(batch["action_mask"].cpu())
        if first == 0:
            wrote = student.describe(batch["first"][:4], batch["instruction"][:4])
            out["sentences"] = [{"instruction": i, "wrote": w, "true": t} for i, w, t in
                                zip(batch["instruction"], wrote, batch["subtask"], strict=False)]  # fmt: skip
    target, mask = torch.cat(actions)[..., MOTION], torch.cat(masks)[..., MOTION]
    out["probe_r2_zhat"] = probe(torch.cat(hats), target, mask)
    out["probe_r2_raw"] = probe(torch.cat(raws), target, mask)
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
    out: dict[str, Any] = {"policy": policy.name}
    entries: list[dict] = []
    film: list[np.ndarray] = []
    keep = lambda frame: film.append(frame) if len(film) < 10 * franka.HZ else None  # a frame has most of a megabyte
    for task in args.tasks:
        rows = franka.run_trials(policy, task, args.trials, args.seed, image_size=args.image_size, seconds=args.seconds,
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


def draw(path: Path, pictures: dict[str, Any] | None, runs: dict[str, str], film: list, report: dict) -> None:
    """One PNG: reconstructions, decoded actions, the stages' losses, the rollout; what there is of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decoded = pictures is not None and pictures["predicted"] is not None
    heights = [6.5 * (pictures is not None), 3.2 * decoded, 3.2, 2.8 * bool(film)]
    fig = plt.figure(figsize=(15, sum(heights)), layout="constrained")
    present = [h for h in heights if h]
    parts = iter(fig.subfigures(len(present), 1, height_ratios=present, squeeze=False)[:, 0])
    top, middle, curves, bottom = (next(parts) if h else None for h in heights)
    if pictures:
        rows = [("V_t, copied", "first"), ("sampled V_{t+k}", "sampled"), ("true V_{t+k}", "last"),
                ("Z of the left neighbour", "transferred")]  # fmt: skip
        # The windows in which most happens say most.
        moved = (pictures["first"].float() - pictures["last"].float()).abs().flatten(1).mean(1)
        shown = moved.argsort(descending=True)[:8].sort().values.tolist()
        axes = top.subplots(len(rows), len(shown), squeeze=False)
        n = report["lam"]
        top.suptitle(f"held-out windows: PSNR sampled {n['psnr_sampled']:.1f} dB, copied {n['psnr_copy']:.1f} dB")
        for r, (label, key) in enumerate(rows):
            for col, i in enumerate(shown):
                axes[r, col].imshow(pictures[key][i].permute(1, 2, 0).numpy())
                axes[r, col].set(xticks=[], yticks=[])
                if r == 0:
                    axes[r, col].set_title(pictures["instructions"][i], fontsize=7)
            axes[r, 0].set_ylabel(label, fontsize=9)
        if decoded:
            names = [i for i in range(len(ACTION_NAMES)) if pictures["mask"][..., i].any()][-7:]
            axes = middle.subplots(1, len(names), squeeze=False)[0]
            middle.suptitle(f"actions, decoded against true (normalised): R2 {n['action_r2']:.2f}, squared error "
                            f"{n['action_mse_as_is']:.3f}, of the mean action {n['action_mse_mean']:.3f}")  # fmt: skip
            for ax, i in zip(axes, names, strict=True):
                valid = pictures["mask"][..., i]
                x, y = pictures["action"][..., i][valid], pictures["predicted"][..., i][valid]
                ax.plot(x, y, ".", markersize=2, alpha=0.5)
                low, high = float(torch.cat([x, y]).min()), float(torch.cat([x, y]).max())
                ax.plot([low, high], [low, high], "k-", linewidth=0.5)
                ax.set_title(ACTION_NAMES[i], fontsize=9)
                ax.set_xlabel("true", fontsize=8)
            axes[0].set_ylabel("decoded", fontsize=8)
    axes = curves.subplots(1, len(runs), squeeze=False)[0]
    for ax, (stage, run) in zip(axes, runs.items(), strict=True):
        metrics = common.read_metrics(run)
        skip = {"step", "lr", "seconds", "wait", "grad_norm"}
        for key in sorted({k for m in metrics for k in m} - skip):
            if key.startswith("val_") and not key.endswith(("frame", "motion", "mse", "ee", "motion_mean", "ee_mean")):
                continue
            points = [(m["step"], m[key]) for m in metrics if key in m]
            ax.plot(*zip(*points, strict=True), "--" if key.endswith("mean") else "-", label=key, linewidth=1.2)
        ax.set(title=f"{stage}: losses", xlabel="step", yscale="log")
        ax.legend(fontsize=7)
    if film:
        shown = [film[i] for i in np.linspace(0, len(film) - 1, min(6, len(film))).round().astype(int)]
        axes = bottom.subplots(1, len(shown), squeeze=False)[0]
        rates = [f"{t} {v['successes']}/{v['trials']}" for t, v in report["sim"].items() if isinstance(v, dict)]
        bottom.suptitle(f"rollout of {report['sim']['policy']}: " + ", ".join(rates))
        for ax, frame in zip(axes, shown, strict=True):
            ax.imshow(frame)
            ax.set(xticks=[], yticks=[])
    partial = path.with_name("partial." + path.name)
    fig.savefig(partial, dpi=100)
    partial.replace(path)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


def evaluate(args: Args, process: Process) -> dict[str, Any]:
    """Runs the reports asked for, merges them into report.json and draws report.png."""
    common.at_least(args, samples=8, frames=1, sampling_steps=1, trials=1, seconds=0, image_size=16, seed=0)
    if not args.tasks:
        raise InputError(f"--tasks is empty: choose from {list(franka.TASKS)}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.json"
    report = common.read_json(path) if path.exists() else {}
    pictures, film = None, []
    began = time.time()
    if args.what in ("all", "lam"):
        report["lam"], pictures = report_lam(args, process)
    if args.what in ("all", "student"):
        report["student"] = report_student(args, process)
    if args.what in ("all", "sim"):
        report["sim"], entries, film = report_sim(args)
        common.write_json(out / "sim.json", entries)
    report |= {"commit": common.git_commit(), "seed": args.seed, "seconds": round(time.time() - began, 1)}
    common.write_json(path, report)
    for part in ("lam", "student"):
        if args.what in ("all", part):
            values = {k: v for k, v in report[part].items() if isinstance(v, float)}
            print(f"{part}:\n" + "\n".join(f"  {k:28} {v:9.4f}" for k, v in values.items()))
    picture = out.parent / ("report.png" if args.what == "all" else f"report_{args.what}.png")
    runs = {"lam": ("lam", args.lam), "student": ("distill", args.student), "sim": ("finetune", args.policy)}
    draw(picture, pictures, dict(run for k, run in runs.items() if args.what in ("all", k)), film, report)
    print(f"wrote {path} and {picture}")
    return report


def main() -> None:
    args = common.parse_args(Args, {"tiny": TINY, "small": SMALL}, __doc__)
    evaluate(args, common.setup(args.seed))


if __name__ == "__main__":
    common.run_main(main, resumes=False)
