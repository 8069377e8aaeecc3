"""Profile one training step on this machine: how busy its GPU is, and which kernels or operations take longest.

    python scripts/profile_step.py --model 7B --precision bf16-true --batch_size 64 --micro_batch_tokens 16384
    python scripts/profile_step.py --method lora --compile

Weights are random, and samples have random ids and about the lengths of Alpaca's records.
"""

import random
import time
from typing import Literal

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lit_llama import cli
from lit_llama.common.errors import check_range
from lit_llama.data.batches import IGNORE, TokenizedSample
from lit_llama.devices.launch import default_device, resolve_precision
from lit_llama.measure.cases import BenchmarkCase, build_ours, synchronize
from lit_llama.methods.table import METHODS
from lit_llama.settings import MAX_SAMPLES, MAX_TOKENS


def main(
    model: str = "smollm2-135m",
    method: Literal[tuple(METHODS)] = "adapter",
    precision: str = "auto",
    compile: bool = False,
    batch_size: int = 8,
    micro_batch_tokens: int = 1024,
    warm_up: int = 2,
) -> None:
    """Print what a step spends its time on.

    Args:
        model: A name in lit_llama/configs.py, or a folder with a base.
        method: The finetuning method.
        batch_size: Samples of the step.
        micro_batch_tokens: Tokens of a forward and backward pass.
        warm_up: Steps before the one that is profiled.
    """
    check_range("--batch_size", batch_size, 1, MAX_SAMPLES)
    check_range("--micro_batch_tokens", micro_batch_tokens, 1, MAX_TOKENS)
    check_range("--warm_up", warm_up, 1, 1000)
    device = default_device()
    options = ("compile",) if compile else ()
    case = BenchmarkCase("ours", model, method, resolve_precision(precision, device), options, micro_batch_tokens)
    step = build_ours(case, "train", device)
    samples = alpaca_like(batch_size, case.config.vocab_size)
    for _ in range(warm_up):
        step(samples)
    synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        tokens = step(samples)
        synchronize()
        seconds = time.perf_counter() - began
    print(f"{case.name}: {tokens:,} tokens in {seconds:.3f} s with the profiler, which slows the host down")
    events = profiler.key_averages()
    if device.type == "cuda":
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6 / seconds
        allocations = sum(event.count for event in events if event.key.startswith("cudaMalloc"))
        print(f"busy {busy:.0%}, {sum(event.count for event in kernels):,} kernels, {allocations} calls of cudaMalloc")
        print(f"peak {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")
    column = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(events.table(sort_by=column, row_limit=10, max_name_column_width=60))


def alpaca_like(n: int, vocab_size: int) -> list[TokenizedSample]:
    """Samples of 20 to 512 tokens, 120 on average, with an answer in the second half."""
    rng = random.Random(1)
    lengths = [min(512, 20 + round(rng.expovariate(1 / 100))) for _ in range(n)]
    ids = [rng.randrange(vocab_size) for _ in range(512)]
    return [TokenizedSample(ids[:n], [IGNORE] * (n // 2) + ids[n // 2 : n]) for n in lengths]


if __name__ == "__main__":
    cli.run(main)
