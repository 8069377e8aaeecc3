"""Measurements for scripts/benchmark.py: the machine's limits, and cases that take turns.

Each case (cases.py) has its own process, and so its own peak memory. Cases take turns, round by round: if the machine's
speed drifts, all of them slow down.
"""

from __future__ import annotations

import multiprocessing
import statistics
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_llama.common.errors import UserError
from lit_llama.data.batches import TokenizedSample
from lit_llama.devices.launch import PRECISIONS, Bar, default_device
from lit_llama.measure.cases import BenchmarkCase, build, measured, synchronize
from lit_llama.methods.table import weightless
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.train.loss import target_loss, target_vectors

# ---------------------------------------------------------------------------------------------- the machine's limits


def best_seconds(work: Callable[[], object]) -> float:
    """The least of several times, after one that does not count."""

    def timed() -> None:
        work()
        synchronize()

    return min(timeit.repeat(timed, number=1, repeat=8)[1:])


def limits(precisions: set[str], config: LLaMAConfig, tokens: int = 1024) -> dict[str, float]:
    """This machine's limits: floating-point operations per second for each precision, in products of ``tokens`` rows
    with the model's shapes, and under "read" the bytes per second that it reads from memory."""
    device = default_device()
    large = torch.zeros(2**28, device=device)  # 1 GiB, more than any cache holds

    def product_rate(dtype: torch.dtype) -> float:
        x = torch.randn(tokens, config.n_embd, device=device, dtype=dtype)
        up = torch.randn(config.intermediate_size, config.n_embd, device=device, dtype=dtype)
        return 10 * 2 * tokens * up.numel() / best_seconds(lambda: [x @ up.T for _ in range(10)])

    found = {precision: product_rate(PRECISIONS[precision]) for precision in sorted(precisions)}
    return found | {"read": large.nbytes / best_seconds(large.sum)}


def limit_of(kind: str, case: BenchmarkCase, limit: dict[str, float], samples: list[TokenizedSample]) -> float:
    """Tokens per second if only matrix products took time; in decoding, if only reading the weights did."""
    if kind == "train":
        return limit[case.precision] / flops_per_token(weightless(case.config, case.method), samples[:16])
    model, itemsize = weightless(case.config), PRECISIONS[case.precision].itemsize
    in_blocks = 1 if "int8" in case.options else 0.5 if "nf4" in case.options else itemsize
    blocks = sum(p.numel() for p in model.transformer.h.parameters()) * in_blocks
    return limit["read"] / (blocks + model.lm_head.weight.numel() * itemsize)


def flops_per_token(model: LLaMA, samples: list[TokenizedSample]) -> float:
    """Floating-point operations of matrix products, forward and backward, for each token of these samples."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernels are not counted
        if any(tensor.requires_grad for tensor in model.parameters()):
            target_loss(model.train(), samples).backward()
        else:
            with torch.no_grad():
                target_vectors(model, samples)
    return counter.get_total_flops() / sum(len(sample.ids) for sample in samples)


# ---------------------------------------------------------------------------------------------- measuring


def measure(kind: str, cases: list[BenchmarkCase], work: list[list[tuple]], limit: dict[str, float]) -> list[dict]:
    """Measure the cases in turn, round by round. Returns a row for each.

    The first round does not count. In it, a compiled case does the work of all rounds: every new size may compile.
    """
    seen: list[list[tuple]] = [[] for _ in cases]
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack, Bar(len(work) * len(cases), kind) as bar:
        processes = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in cases]
        for case, process in zip(cases, processes, strict=True):
            call(case, process, build, case, kind, torch.get_num_threads())  # one by one, which needs less memory
        for number, jobs in enumerate(work):
            for case, process, found in zip(cases, processes, seen, strict=True):
                warms_up = number == 0 and "compile" in case.options
                answers = [call(case, process, measured, *job) for job in (chain(*work) if warms_up else jobs)]
                bar.update()
                if number:
                    seconds, computed, peaks = zip(*answers, strict=True)
                    peak = max(peak or 0 for peak in peaks)  # Windows does not tell
                    found.append((sum(seconds), sum(computed), peak, count_tokens(kind, jobs)))
    return [to_row(kind, *pair, work, limit) for pair in zip(cases, seen, strict=True)]


def call(case: BenchmarkCase, process: ProcessPoolExecutor, function: Callable, *arguments: Any) -> Any:
    """What a function returns in the case's process. Raises UserError if it fails, or if the process ends."""
    try:
        return process.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise UserError(f"{case.name}: its process ended without an error; it may have run out of memory") from None
    except Exception as error:
        raise UserError(f"{case.name} failed: {type(error).__name__}: {error}") from None


def count_tokens(kind: str, jobs: list[tuple]) -> int:
    return sum(job[1] if kind == "decode" else sum(len(sample.ids) for sample in job[0]) for job in jobs)


def to_row(kind: str, case: BenchmarkCase, found: list[tuple], work: list[list[tuple]], limit: dict) -> dict:
    rates = [tokens / seconds for seconds, _, _, tokens in found]
    samples = [] if kind == "decode" else work[1][0][0]
    median = statistics.median(rates)
    row = {"kind": kind, "name": case.name, "tokens_per_s": median, "least": min(rates), "most": max(rates)}
    row |= {"rounds": rates, "of_limit": median / limit_of(kind, case, limit, samples)}
    row["peak_mib"] = max(peak for _, _, peak, _ in found) / 2**20 or None
    if kind == "train":
        row["padding"] = 1 - sum(tokens for *_, tokens in found) / sum(computed for _, computed, _, _ in found)
    return row


def table(rows: list[dict]) -> str:
    """A Markdown table. ``x`` is the ratio to the first line of its kind."""
    lines = [
        "| | | tokens/s (least to most) | x | of the limit | padding | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = next(other for other in rows if other["kind"] == row["kind"])
        rate = f"{row['tokens_per_s']:,.0f} ({row['least']:,.0f} to {row['most']:,.0f})"
        ratio = statistics.median(a / b for a, b in zip(row["rounds"], first["rounds"], strict=True))
        padding = f"{row['padding']:.0%}" if "padding" in row else ""
        cells = [row["kind"], row["name"], rate, f"{ratio:.2f}", f"{row['of_limit']:.0%}", padding]
        cells.append("" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("%", " %")
