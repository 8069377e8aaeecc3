"""Flags that several scripts share, with their help texts and limits, and the learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lit_llama.common.errors import UserError, check_range

Data = str  # on the command line a path; from Python also the rows themselves, list[dict]

ROOT = Path(__file__).parents[1]  # the clone
DEFAULT_BASE = str(ROOT / "checkpoints/smollm2-135m-instruct")

# Help texts of flags that several scripts have.
SHARED_FLAGS = {
    "data": "A file (.json, .jsonl, .csv, .tsv, .txt, .parquet) or a folder with train and validation files.",
    "columns": 'Maps our column names to the file\'s: \'{"instruction": "query", "output": "reply"}\'.',
    "val_fraction": "Share of the samples (10 to 2,000) to split off for validation, if the data has no file for it.",
    "skip_bad_rows": "Leave out, and count, rows that cannot be read.",
    "show_sample": "Print the first sample as tokens, those that are trained on in brackets.",
    "checkpoint_dir": "Folder of the base. The default one is offered for download if it is missing.",
    "out_dir": "Folder for the results. Default: out/, the method and the name of the data.",
    "init_from": "A trained folder of the same method to begin with.",
    "prompt_style": "template (the base's chat template), alpaca or plain. Default: plain if all rows are plain texts, "
    "else template if the base has one, else alpaca.",
    "eval_samples": "Number of held-out samples to answer before and after training; 0 for none.",
    "devices": "Devices per node: GPUs, or processes on a CPU.",
    "num_nodes": "Number of nodes (machines).",
    "strategy": "ddp (the base on every device), fsdp (the base sharded across them), or auto (ddp).",
    "precision": "Precision of the base's weights: bf16-true, 32-true, or auto for the faster one.",
    "compile": "Compile the blocks with torch.compile, which takes minutes; no gain in float32 on a CPU.",
    "checkpointing": "Recompute activations in the backward pass: less memory, a third more computation.",
    "quantize": "Keep the frozen blocks' weights in int8, or on CUDA in nf4.",
    "logger": "Also send settings and metrics to tensorboard, wandb or mlflow; the package must be installed.",
    "resume": "Continue the run in out_dir.",
    "overwrite": "Replace the run in out_dir.",
    "allow_changes": "With --resume: continue although the data, the base or training settings have changed.",
    "trained_dir": "Folder that a finetune script wrote.",
    "runs": "Folders that finetune scripts wrote.",
    "input": "The text that the instruction is about, as in an Alpaca record.",
    "max_new_tokens": "Maximum length of the answer.",
    "yes": "Do not ask before a download.",
}


MAX_COUNT = 10**9  # steps, samples or tokens, where a large value alone allocates nothing
MAX_TOKENS = 2**20  # in one forward pass or sample
MAX_SAMPLES = 2**16  # in one step or batch
MAX_SEED = 2**32 - 1
HEAD_CHUNK = 384  # targets whose logits exist at a time (train/loss.py)
TRAIN_RANGES = {
    "max_steps": (1, MAX_COUNT),
    "epochs": (1e-6, MAX_COUNT),
    "batch_size": (1, MAX_SAMPLES),
    "micro_batch_tokens": (1, MAX_TOKENS),
    "max_seq_length": (3, MAX_TOKENS),
    "learning_rate": (0, 100),
    "warmup_steps": (0, MAX_COUNT),
    "weight_decay": (0, 100),
    "clip": (0, MAX_COUNT),
    "eval_every": (1, MAX_COUNT),
    "patience": (1, MAX_COUNT),
    "save_every": (1, MAX_COUNT),
    "seed": (0, MAX_SEED),
}


@dataclass
class TrainArgs:
    """Settings of the training loop.

    Args:
        epochs: Passes over the training samples.
        max_steps: Number of optimizer steps, instead of epochs.
        batch_size: Samples per optimizer step, over all devices.
        micro_batch_tokens: Tokens per forward and backward pass; fewer take less memory.
        max_seq_length: Longer samples are cut to this many tokens.
        learning_rate: Peak learning rate, reached at the end of the warm-up.
        warmup_steps: Steps of linear warm-up, then a cosine decay to 0. Default: a tenth of all steps.
        weight_decay: AdamW's weight decay, on the parameters that the method's paper decays.
        clip: Maximum norm of the gradient; 0 turns clipping off.
        eval_every: Steps between validations; the last step is always validated.
        patience: Stop after so many validations in a row without a lower loss. Default: never.
        save_every: Steps between saves of the state for --resume.
        seed: Random seed for data order, initialization and dropout.
    """

    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 8
    micro_batch_tokens: int = 1024
    max_seq_length: int = 512
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int = 50
    patience: int | None = None
    save_every: int = 25
    seed: int = 1337

    def __post_init__(self):
        if self.max_steps is None and self.epochs is None:
            raise UserError("give --train.epochs or --train.max_steps")
        for name, (low, high) in TRAIN_RANGES.items():
            check_range(f"--train.{name}", getattr(self, name), low, high)
        if self.max_steps is not None:
            self.epochs = None

    def total_steps(self, n_samples: int) -> int:
        """Number of optimizer steps. Raises UserError if the warm-up leaves none after it."""
        steps = self.max_steps or math.ceil(math.ceil((self.epochs or 0) * n_samples) / self.batch_size)
        if (self.warmup_steps or 0) >= steps:
            raise UserError(f"--train.warmup_steps {self.warmup_steps} must be less than the {steps} steps in all")
        return steps

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of optimizer step ``step`` (from 0): linear warm-up, then a cosine decay towards 0."""
        warmup = total_steps // 10 if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def summary(self, n_samples: int, world_size: int = 1) -> str:
        """Steps, epochs, and a note if some devices have no work."""
        steps = self.total_steps(n_samples)
        passes = self.epochs or steps * self.batch_size / n_samples
        text = f"{steps:,} steps of {self.batch_size} samples: {passes:.2g} epochs"
        if self.batch_size < world_size:
            text += (
                f"\nnote: --train.batch_size {self.batch_size} gives work to only {self.batch_size} of {world_size} "
                "devices; raise it, and --train.learning_rate with it"
            )
        return text


@dataclass(frozen=True)
class DataOptions:
    """How data is read, split, and made into prompts."""

    columns: dict[str, str] | None = None
    val_fraction: float = 0.1
    skip_bad_rows: bool = False
    show_sample: bool = False
    prompt_style: str | None = None


@dataclass(frozen=True)
class Hardware:
    """Where a finetune script runs, and how it fits there."""

    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    compile: bool = False
    checkpointing: bool = False
    quantize: str = "none"

    def __post_init__(self):
        if self.strategy == "fsdp" and (self.compile or self.quantize != "none"):
            raise UserError(
                "a sharded base works with neither --compile nor --quantize; leave them out, or use one device"
            )


FLAT = (DataOptions, Hardware)  # --devices, not --hardware.devices


@dataclass
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token (greedy); a higher value samples more evenly.
        top_k: Sample from this many of the likeliest tokens.
        top_p: Sample from the likeliest tokens with this much total probability.
        seed: Random seed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1337

    def __post_init__(self):
        if self.temperature != 0:  # outside this range sampling is greedy or uniform, or float32 overflows
            check_range("--sampling.temperature (unless 0, greedy)", self.temperature, 0.001, 1000)
        elif not (self.top_k is None and self.top_p is None):
            raise UserError(
                "top_k and top_p choose among likely tokens: pass a --sampling.temperature above 0 with them"
            )
        check_range("--sampling.top_k", self.top_k, 1, MAX_COUNT)
        check_range("--sampling.top_p", self.top_p, 1e-6, 1)  # one that rounds to 0 in float32 would leave no token
        check_range("--sampling.seed", self.seed, 0, MAX_SEED)
