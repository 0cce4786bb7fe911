"""benchmarks/plan.py and lam_step.py: parameters against the published numbers, memory and FLOPs against real steps."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import nn

import distill
import finetune
import lam
from benchmarks import lam_step, plan
from common import InputError

INTERNVL, SANA = lam.Args().encoder, lam.Args().decoder


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_parameter_counts():
    """InternVL3.5-2B: InternViT-300M (304 M, its model card), Qwen3-1.7B (1.72 B, its model card) with a head of its
    own, 2.3 B in all; SANA-1.6B: 1604 M (arXiv 2410.10629, Table 1); DC-AE f32c32: 312 M."""
    with torch.device("meta"):
        vlm, _ = plan.make_vlm(INTERNVL)
        sana = SanaTransformer2DModel(**plan.ARCHITECTURES[SANA])
        dcae = AutoencoderDC(**plan.ARCHITECTURES[f"{SANA}/vae"])
        model = plan.plan_lam(lam.Args()).build(True)
    assert size(vlm.model.vision_tower) == pytest.approx(304e6, rel=0.005)
    assert size(vlm.model.language_model) == pytest.approx(1.72e9, rel=0.005)
    assert size(vlm.lm_head) == 151936 * 2048 and size(vlm) == pytest.approx(2.35e9, rel=0.005)
    assert size(sana) == pytest.approx(1604e6, rel=0.001)
    assert size(dcae) == pytest.approx(312e6, rel=0.005)
    assert vlm.config.image_seq_length == 256 and dcae.spatial_compression_ratio == 32
    # The whole model: both, without the head, and what is added; every parameter in one part.
    parts = plan.count_parts(model, plan.plan_lam(lam.Args()).parts)
    assert sum(total for total, _ in parts.values()) == size(model)
    assert parts["vision encoder"] == (size(vlm.model.vision_tower), 0)
    assert parts["language model"][0] == size(vlm.model) - size(vlm.model.vision_tower)
    assert parts["scene stream (SANA)"] == (size(sana), size(sana)) and "other" not in parts


def test_memory_of_a_group_is_that_of_the_tensors():
    """On one GPU: exactly what parameters, gradients and AdamW hold after a step. On more, each holds its share."""
    args = replace(lam.TINY, freeze_vision=True)
    stage = plan.plan_lam(args)
    model = stage.build(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    stage.step(model).backward()
    optimizer.step()
    count = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    held = {
        "weights (float32)": count(model.parameters()),
        "gradients (float32)": count(p.grad for p in model.parameters() if p.grad is not None),
        "AdamW's moments (float32)": count(s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")),
    }
    assert plan.state_bytes(model, plan.Args(gpus=1)) == held
    for replicas, share in ((1, 4), (2, 2)):
        states = plan.state_bytes(model, plan.Args(gpus=4, replicas=replicas))
        assert all(states[k] == v // share for k, v in held.items())
    # What FSDP gathers: the layers one by one, the rest as the root.
    units = plan.units(model)
    vlm, decoder = model.encoder.vlm, model.decoder
    assert {id(x) for x in units} == {
        id(x) for layers in (vlm.vision_tower.encoder.layer, vlm.language_model.layers,
                             decoder.sana.transformer_blocks, decoder.motion, decoder.to_scene) for x in layers
    }  # fmt: skip
    largest = max(size(u) for u in units)
    root = size(model) - sum(size(u) for u in units)
    assert states["gathered units (bfloat16)"] == 2 * (root + 2 * largest)


TINY = {
    "lam": replace(lam.TINY, batch=2, frames=3), "distill": replace(distill.TINY, batch=2),
    "finetune": replace(finetune.TINY, batch=2),
}  # fmt: skip


@pytest.mark.parametrize(
    "name,checkpointing",
    [("lam", False), ("lam", True), ("distill", False), ("distill", True), ("finetune", False), ("finetune", True)],
)
def test_a_traced_step_is_a_real_step(name, checkpointing):
    """Without values: the same FLOPs to the last one, and the same bytes of tensors alive, as a real step counts."""
    stage = plan.STAGES[name][1](TINY[name])
    torch.manual_seed(0)
    model = stage.build(checkpointing)
    real = plan.measure(model, lambda: stage.step(model), {})
    with torch.device("meta"):
        meta = stage.build(checkpointing)
    traced = plan.trace(meta, lambda: stage.step(meta), gpu=False)
    assert traced.flops == real.flops
    assert traced.peak == pytest.approx(real.peak, rel=0.03) and traced.kept == pytest.approx(real.kept, rel=0.03)
    assert all(p.grad is None for p in model.parameters())


def test_the_later_stages(capsys):
    """Distillation: the student's own step and the teacher's forward pass. Parameters: SigLIP-So400m without its
    pooling, Gemma-2B with its embeddings (arXiv 2407.07726, 2403.08295: 2.51 B), Gemma-300M without."""
    args = TINY["distill"]
    stage = plan.plan_distill(args)
    make_teacher, teach = stage.frozen["teacher"]
    student, teacher = stage.build(False), make_teacher()
    real = plan.measure(student, lambda: stage.step(student), {}).flops
    taught = plan.measure(teacher, lambda: teach(teacher), {}).flops
    got = plan.make_plan(stage, plan.Args(gpus=4))
    assert got["flops_micro_batch"] == real + taught and got["flops_frozen_models"] == taught > real / 3
    assert got["flops_step"] == 4 * (real + taught) * args.accumulate and got["global_batch"] == 8
    assert got["parameters"]["teacher"] == (size(teacher), 0) and got["states"]["teacher (float32)"] == size(teacher)
    assert sum(total for total, _ in got["parameters"].values()) == size(student) + size(teacher)
    plan.show(got, plan.Args(gpus=4))
    assert "with checkpointing" in capsys.readouterr().out
    assert "more GPUs" in plan.advice(got | {"checkpointing": True, "largest_batch": 0})

    with torch.device("meta"):
        vla = plan.plan_finetune(finetune.Args()).build(False)
    parts = plan.count_parts(vla, plan.plan_finetune(finetune.Args()).parts)
    assert parts["vision encoder"] == (412_442_352,) * 2 and parts["language model"][0] == 2_508_531_712
    assert parts["action expert"][0] == pytest.approx(311e6, rel=0.005)
    # The last layer keeps its keys and values alone, and the student's head has no reader.
    assert parts["language model"][1] == 2_508_531_712 - 2048 - (2 * 2048 * 2048 + 3 * 2048 * 16384 + 2048)


def test_checkpointing_leaves_a_frozen_vision_encoder_alone():
    """What is recomputed is at most the forward pass of what is trained."""
    stage = plan.plan_lam(replace(lam.TINY, batch=2, frames=3, freeze_vision=True))
    costs = []
    for checkpointing in (False, True):
        with torch.device("meta"):
            model = stage.build(checkpointing)
        costs.append(plan.trace(model, lambda m=model: stage.step(m), False, prefixes=stage.parts))
    forward = costs[0].parts
    assert 0 < costs[1].flops - costs[0].flops <= sum(forward.values()) - forward["vision encoder"]


def test_flops_of_a_layer_in_closed_form():
    """A linear layer, a depthwise convolution, attention: 2 operations a multiply-add, twice that going back."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv = nn.Linear(32, 32), nn.Conv2d(32, 32, 3, padding=1, groups=32)

        def forward(self, x):  # (2, 64, 32)
            h = self.linear(x)
            h = self.conv(h.transpose(1, 2).reshape(2, 32, 8, 8)).flatten(2).transpose(1, 2)
            q = h.reshape(2, 64, 4, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q).sum()

    layer, x = Layer(), torch.randn(2, 64, 32, requires_grad=True)
    linear, conv, attention = 2 * 128 * 32 * 32, 2 * 128 * 32 * 9, 2 * 2 * 2 * 4 * 64 * 64 * 8
    cost = plan.measure(layer, lambda: layer(x), {"linear": "linear", "": "rest"})
    assert cost.flops == 3 * (linear + conv) + 3.5 * attention
    assert cost.parts == {"linear": linear, "rest": conv + attention}
    empty = lambda: layer(torch.empty(2, 64, 32, requires_grad=True))
    assert plan.trace(layer, empty, True, torch.bfloat16).flops == cost.flops


def test_a_plan_on_a_gpu(capsys, tmp_path, monkeypatch):
    """The printed plan, its verdict and its advice; checkpointing keeps less and computes more."""
    monkeypatch.setattr("sys.argv", ["plan", "lam", "--tiny", "--gpus", "4", "--replicas", "2", "--steps", "7200",
                                     "--checkpointing", "--json", str(tmp_path / "plan.json")])  # fmt: skip
    plan.main()
    got, text = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert got["fits"] and "fits into 40 GiB" in text and "2 groups of 2" in text and got["global_batch"] == 32
    a = got["activations"]
    assert a["peak_checkpointing"] < a["peak"] and a["kept_checkpointing"] < 0.5 * a["kept"]
    assert got["flops_step"] < got["hardware_flops_step"] < 1.5 * got["flops_step"]
    assert got["flops_step"] == 4 * got["flops_micro_batch"]
    assert got["seconds_step"] == pytest.approx(got["flops_micro_batch"] / (312e12 * 0.4))
    assert got["hours"] == pytest.approx(2 * got["seconds_step"])
    tight = got | {"fits": False, "largest_batch": 3}
    assert "--batch 2 --accumulate 4" in plan.advice(tight)
    assert "more GPUs" in plan.advice(tight | {"largest_batch": 0})
    assert "--checkpointing" in plan.advice(tight | {"checkpointing": False})


@pytest.mark.parametrize(
    "words,message",
    [
        (["distil"], "which stage.*plan lam.distill.finetune"),
        (["distill", "--student", "some/model"], "no architecture 'some/model'"),
        (["lam", "--encoder", "some/model"], "no architecture 'some/model'"),
        (["lam", "--tiny", "--gpus", "4", "--replicas", "3"], "--gpus 4 do not divide into --replicas 3"),
        (["lam", "--tiny", "--batch", "0"], "--batch 0"),
        (["lam", "--tiny", "--mfu", "0"], "--mfu 0"),
    ],
)
def test_bad_plans(monkeypatch, words, message):
    monkeypatch.setattr("sys.argv", ["plan", *words])
    with pytest.raises(InputError, match=message):
        plan.main()


def test_lam_step_times_steps(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["lam_step", "--sizes", "tiny", "--batch", "2", "--steps", "2", "--variants",
                                     "plain", "checkpointing", "--json", str(tmp_path / "t.json")])  # fmt: skip
    lam_step.main()
    plain, recomputing = json.loads((tmp_path / "t.json").read_text())
    assert plain["gflop"] == recomputing["gflop"] > 1  # the model's own, not what is recomputed
    assert recomputing["memory"] < plain["memory"] and 0 < plain["seconds"] < 60
    assert plain["per_frame"] == plain["seconds"] / (2 * lam.TINY.frames)
    assert "tiny" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["lam_step", "--sizes", "full"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="needs a GPU"):
            lam_step.main()


def test_the_size_for_comparison():
    """8 to 11 million parameters at 112 px, batch 2, as the stand-in that it is compared with."""
    with torch.device("meta"):
        model = plan.plan_lam(lam_step.SIZES["bench"]).build(False)
        reference = lam_step.Reference()
    assert 8e6 < size(model) < 11e6 and 8e6 < size(reference) < 11e6
    assert lam_step.SIZES["bench"].batch == 2 and lam_step.SIZES["bench"].image_size == 112
    assert lam_step.Reference()(torch.zeros(1, 8, 3, 112, 112)).isfinite()
