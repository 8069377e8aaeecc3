"""Measure how fast this project trains and decodes, in how much memory, and how close to the machine's limit.

    python scripts/benchmark.py                                               # LLaMA-Adapter and LoRA, ours alone
    python scripts/benchmark.py --against '[litgpt, peft]' --data alpaca.json     # next to others, if installed
    python scripts/benchmark.py --variants '[auto, auto+compile, auto+int8]'

Each table row runs in its own process. All do the same work in turn, round by round; results are medians over the
rounds, with minimum and maximum. Padding does not count as tokens. ``--results`` gets a JSON object per row.
"""

import json
from array import array
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_config
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import atomic_write, check_writable
from lit_llama.data.batches import IGNORE, TokenizedSample, step_indices
from lit_llama.data.samples import read_text
from lit_llama.data.task import check_data, load_task
from lit_llama.devices.launch import default_device, resolve_precision
from lit_llama.measure.benchmark import limits, measure, table
from lit_llama.measure.cases import BenchmarkCase, config_of
from lit_llama.methods.table import METHODS
from lit_llama.settings import DEFAULT_BASE, MAX_SAMPLES

OPTIONS = {"compile", "checkpointing", "int8", "nf4"}


def main(
    kinds: tuple[Literal["train", "decode"], ...] = ("train", "decode"),
    methods: tuple[Literal[tuple(METHODS)], ...] = ("adapter", "lora"),
    variants: tuple[str, ...] = ("auto",),
    against: tuple[Literal["litgpt", "peft"], ...] = (),
    model: str = "smollm2-135m",
    checkpoint_dir: str = DEFAULT_BASE,
    data: str = "data/bookings",
    rounds: int = 5,
    steps: int = 4,
    batch_size: int = 8,
    micro_batch_tokens: int = 1024,
    micro_batch_samples: int = 4,
    new_tokens: int = 64,
    results: str | None = None,
    yes: bool = False,
) -> None:
    """Measure training and decoding.

    Args:
        kinds: What to measure: train, decode.
        methods: Finetuning methods. LitGPT and PEFT have adapter and lora.
        variants: Precisions, bf16-true, 32-true or auto (the faster one), each with options: auto+compile+int8.
        against: Other projects, litgpt and peft, which must be installed. They use the first variant's precision.
        model: The model's shapes: a name in lit_llama/configs.py, or a folder with a base. Weights are random.
        checkpoint_dir: A base, for its tokenizer. The default one is offered for download.
        data: The samples to train on.
        rounds: Measured rounds, after one that does not count.
        steps: Optimizer steps per round.
        batch_size: Samples per step.
        micro_batch_tokens: Tokens per micro-batch of ours. A GPU needs more than a CPU.
        micro_batch_samples: Samples of the others' micro-batches, padded to the longest.
        new_tokens: Tokens of a round of decoding, after a prompt of 64.
        results: A .jsonl file to append the results to.
    """
    sizes = dict(micro_batch_tokens=micro_batch_tokens, micro_batch_samples=micro_batch_samples)
    counts = dict(rounds=rounds, steps=steps, batch_size=batch_size, new_tokens=new_tokens)
    for name, value in (counts | sizes).items():
        check_range(f"--{name}", value, 1, MAX_SAMPLES)

    if missing := [name for name in against if find_spec(name) is None]:
        raise UserError(f"--against {', '.join(missing)}: not installed; pip install it, or leave it out")
    config = config_of(model)
    ours = []
    for variant in variants:
        precision, *options = variant.split("+")
        if unknown := set(options) - OPTIONS:
            raise UserError(f"--variants {variant}: {sorted(unknown)} are none of {', '.join(sorted(OPTIONS))}")
        precision = resolve_precision(precision, default_device())
        ours += [BenchmarkCase("ours", model, method, precision, tuple(options), **sizes) for method in methods]
    if not (kinds and ours):
        raise UserError("--kinds, --methods and --variants must name at least one each")
    both = [method for method in methods if method in ("adapter", "lora")]
    others = [BenchmarkCase(name, model, method, ours[0].precision, **sizes) for method in both for name in against]
    if results is not None:
        check_writable(results)
    check_data(data)
    ensure_base(checkpoint_dir, yes)
    task = load_task(data, checkpoint_dir, min(512, load_config(checkpoint_dir).block_size))
    limit = limits({case.precision for case in ours}, config, micro_batch_tokens)
    rates = [f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in limit.items() if name != "read"]
    print(f"{torch.get_num_threads()} threads, {', '.join(rates)}, {limit['read'] / 1e9:,.1f} GB/s")
    rows = []
    for kind in kinds:
        cases = ours + others
        if kind == "train":
            batches = [step_indices(i, batch_size, len(task.train), seed=1) for i in range(steps * (rounds + 1))]
            jobs = [([within_vocabulary(task.train[i], config.vocab_size) for i in batch],) for batch in batches]
            work = [jobs[i : i + steps] for i in range(0, len(jobs), steps)]
        else:
            cases = [case for case in cases if "checkpointing" not in case.options]
            work = [[(list(range(5, 69)), new_tokens)]] * (rounds + 1)
        rows += measure(kind, cases, work, limit)
    if results is not None:
        earlier = read_text(Path(results)) if Path(results).exists() else ""
        with atomic_write(Path(results)) as temporary:
            temporary.write_text(earlier + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(table(rows))


def within_vocabulary(sample: TokenizedSample, vocab_size: int) -> TokenizedSample:
    """The sample with ids that fit the model's vocabulary. Speed depends only on lengths."""
    targets = [target if target == IGNORE else target % vocab_size for target in sample.targets]
    return replace(sample, ids=array("i", [i % vocab_size for i in sample.ids]), targets=array("i", targets))


if __name__ == "__main__":
    cli.run(main)
