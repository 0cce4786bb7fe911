"""Shared by test_distill.py and test_finetune.py: models small enough for seconds, a data set, checkpoints."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import distill
import lam
from data.lerobot import LeRobotWriter

TASKS = ("push the red square", "move the red square onto the blue square, slowly")

# As VLM_SIZES, one size smaller: 32 px images, 16 tokens each.
MICRO = {
    f"{family}-micro": {
        "vision": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                       patch_size=8),
        "text": dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                     intermediate_size=128, head_dim=32),
    }
    for family in ("internvl", "paligemma")
}  # fmt: skip
LAM_ARGS = replace(
    lam.TINY, encoder="internvl-micro", frames=3, image_size=32, scene_tokens=3, motion_tokens=2, latent_dim=48
)


def micro_models():
    """For a module's autouse fixture: the sizes above can be built, on one thread (more do not pay at this size)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in MICRO.items():
            patch.setitem(common.VLM_SIZES, name, size)
        yield
    torch.set_num_threads(threads)


def process() -> common.Process:
    return common.Process(0, 1, torch.device("cpu"), torch.float32)


def make_student(tokens: tuple[int, int] = (3, 2), latent_dim: int = 48, seed: int = 0) -> distill.Student:
    torch.manual_seed(seed)
    return distill.Student(*common.load_vlm("paligemma-micro"), tokens, latent_dim).eval()


def pictures(b: int, k: int = 1, seed: int = 0) -> torch.Tensor:
    """Random images, uint8 (b, k, 3, 32, 32)."""
    return torch.randint(0, 256, (b, k, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def save_lam(run: Path, args: lam.Args = LAM_ARGS, seed: int = 0) -> lam.LAM:
    """A run folder of stage 1 with an untrained model."""
    torch.manual_seed(seed)
    model = lam.build(args)
    meta = {"stage": "lam", "args": asdict(args), "encoder_config": model.encoder.config.to_dict(),
            "decoder_config": dict(model.decoder.config), "statistics": {}}  # fmt: skip
    common.save_checkpoint(run, 1, model, None, meta, model.encoder.tokenizer, process())
    return model


def save_student(run: Path, student: distill.Student, **changes) -> Path:
    """A run folder of stage 2 with this student."""
    meta = {"stage": "distill", "args": asdict(replace(distill.TINY, student="paligemma-micro", **changes)),
            "student_config": student.config.to_dict(), "tokens": student.tokens,
            "latent_dim": student.head.out_features, "statistics": {}}  # fmt: skip
    common.save_checkpoint(run, 1, student, None, meta, student.tokenizer, process())
    return run


def make_data(
    root: Path, episodes: int = 4, length: int = 8, size: tuple[int, int] = (48, 64), cameras=("primary", "wrist")
) -> Path:
    """A square that moves over a floor, seen by cameras that are not square; actions and states of every kind, of very
    different ranges, that follow from what is seen. Subtasks change half way."""
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, cameras={camera: size for camera in cameras}) as writer:
        for e in range(episodes):
            n = length + e % 2
            t = np.arange(n)
            where = np.stack([10 + 5 * t, np.full(n, 12 + 8 * (e % 4))], 1).astype(int)  # x, y in pixels
            frames = np.full((n, *size, 3), 40, np.uint8)
            for k, (x, y) in enumerate(where):
                frames[k, y - 6 : y + 6, x - 6 : x + 6] = (220, 40 + 50 * (e % 4), 60)
            wrist = np.broadcast_to((30 + 20 * t)[:, None, None, None], frames.shape).astype(np.uint8)
            scales = np.array([0.02, 0.01, 0.005, 0.1, 0.3, 0.05])
            action = np.concatenate([np.sin(t[:, None] * 0.7 + rng.uniform(0, 6, 6)) * scales,
                                     (t < n // 2)[:, None]], 1).astype(np.float32)  # fmt: skip
            turn = np.stack([np.zeros(n), np.zeros(n), np.sin(0.1 * t), np.cos(0.1 * t)], 1)
            state = np.concatenate([0.4 + where / 200, 0.3 - 0.01 * t[:, None], turn, (t < n // 2)[:, None]], 1)
            texts = ["move to the square" if k < n // 2 else "let go of it" for k in t]
            films = {"primary": frames, "wrist": wrist, "side": 255 - frames[:, ::-1]}
            writer.add_episode({camera: films[camera] for camera in cameras}, action, state, TASKS[e % 2], texts)
    return root


def log(run: Path) -> list[dict]:
    """The lines of a run's log without the times, which may differ between equal runs."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "wait")} for row in rows]
