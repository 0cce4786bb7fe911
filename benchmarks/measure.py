"""What the benchmarks share: where they run, how long a call takes, what the device can do at most, a training step.

Machines are shared and clocks vary: a time is the median of several, and times to be compared are taken in turns.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import common
from benchmarks import plan

PEAK = {"A100": 312, "H100": 989, "H200": 989}  # TFLOP/s in bfloat16, without sparsity


def here(dtype: str) -> common.Process:
    """This process, with matrix products of the type asked for; "auto": bfloat16 on a GPU, float32 on a CPU."""
    process = common.here()
    if dtype != "auto":
        process = replace(process, dtype=getattr(torch, dtype))
    common.choose_attention(process)
    return process


def where(process: common.Process) -> str:
    """The device, for the table's first line."""
    name = torch.cuda.get_device_name() if process.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, {process.dtype}, load average {os.getloadavg()[0]:.1f}"


def synchronize(process: common.Process) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(calls: dict[str, Callable[[], object]], repeats: int, warmup: int, process: common.Process):
    """Seconds of each call: {name: list of `repeats`}, the calls taking turns so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            synchronize(process)
            began = time.perf_counter()
            call()
            synchronize(process)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


# --------------------------------------------------------------------------------------------------------------------
# What the device can do at most
# --------------------------------------------------------------------------------------------------------------------


def bandwidth(process: common.Process) -> float:
    """Bytes per second to and from memory, by the fastest of some copies of tensors that no cache holds."""
    size = 2**31 if process.device.type == "cuda" else 2**28
    a = torch.zeros(size, dtype=torch.uint8, device=process.device)
    b = torch.empty_like(a)
    return 2 * size / min(in_turns({"": lambda: b.copy_(a)}, 10, 2, process)[""])


def matmul_peak(process: common.Process) -> float:
    """FLOP/s of the fastest of some large matrix products in the process's type."""
    n = 8192 if process.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=process.device, dtype=process.dtype)
    return 2 * n**3 / min(in_turns({"": lambda: a @ a}, 20, 3, process)[""])


# --------------------------------------------------------------------------------------------------------------------
# A training step
# --------------------------------------------------------------------------------------------------------------------


def training_step(
    model: nn.Module, loss: Callable[[int], Tensor], process: common.Process, fused: bool = False
) -> Callable[[int], None]:
    """step(i): loss(i) under autocast, its backward pass, clipping and AdamW, as the stages' train() has them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=fused or None)

    def step(i: int) -> None:
        with torch.autocast(process.device.type, process.dtype, enabled=process.dtype != torch.float32):
            value = loss(i)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_training(step: Callable[[int], None], steps: int, process: common.Process) -> float:
    """The median of `steps` steps in seconds, after two that do not count, nor for CUDA's peak of memory."""
    numbers = iter(range(steps + 2))
    in_turns({"": lambda: step(next(numbers))}, 0, 2, process)
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return statistics.median(in_turns({"": lambda: step(next(numbers))}, steps, 0, process)[""])


def planned(stage: plan.Stage, checkpointing: bool, process: common.Process) -> tuple[int, int]:
    """(FLOPs of a micro-batch, peak of activations in bytes) as benchmarks/plan.py has them: forward and backward
    without what is recomputed, and the forward pass of the frozen models beside it."""

    def cost(make: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor | None], gpu: bool) -> plan.Cost:
        with torch.device("meta"):
            model = make()
        return plan.trace(model, lambda: run(model), gpu)

    gpu = process.dtype == torch.bfloat16
    whole = cost(lambda: stage.build(False), stage.step, gpu)
    frozen = sum(cost(make, run, True).flops for make, run in stage.frozen.values())
    own = cost(lambda: stage.build(True), stage.step, gpu) if checkpointing else whole
    return whole.flops + frozen, own.peak


def memory(model_size: int, trained: int, activations: int, process: common.Process) -> float:
    """GiB: what CUDA's allocator gave out at most; on a CPU weights, their gradients, AdamW's moments, activations."""
    if process.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (4 * model_size + 12 * trained + activations) / 2**30


def mfu(flops: float, seconds: float, process: common.Process) -> float | None:
    """Share of the GPU's published peak; None for a device that PEAK does not know."""
    name = torch.cuda.get_device_name() if process.device.type == "cuda" else ""
    peak = next((v for k, v in PEAK.items() if k in name), None)
    return flops / seconds / (peak * 1e12) if peak else None


def profile(call: Callable[[], object], process: common.Process) -> None:
    """Prints the operations that a call spends its time in."""
    cuda = process.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as seen:
        call()
    sort = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=sort, row_limit=16, max_name_column_width=44))
