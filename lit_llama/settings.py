"""Settings that are flags of several scripts. Nothing heavy is imported here: ``--help`` needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_llama.common.errors import UserError, check_range

if TYPE_CHECKING:
    Data = str | list[dict]  # a path, or from Python the rows themselves
else:
    Data = str  # what the command line can say

DEFAULT_BASE = "checkpoints/smollm2-135m-instruct"

# The flags that all finetune scripts have, for --help.
SHARED_FLAGS = {
    "train": "The settings of the training loop.",
    "data": "A .json, .jsonl, .csv or .txt file, or a folder with train and validation files.",
    "checkpoint_dir": "Folder of the base. The default one is offered for download if it is missing.",
    "out_dir": "Folder for the results. Default: out/, the method and the name of the data.",
    "prompt_style": "alpaca, chatml, llama2, llama3 or plain. Default: what the base's tokenizer tells.",
    "eval_samples": "Held-out samples to answer before and after training; 0 for none.",
    "devices": "Processes per node, one for each device.",
    "num_nodes": "Number of machines.",
    "strategy": "ddp: the base on every device; fsdp: sharded across them, if it does not fit on one; or auto.",
    "precision": "Precision of the base's weights: bf16-true, 32-true, or auto for the faster one.",
    "compile": "Compile the blocks with torch.compile: minutes once; no gain in float32 on a CPU.",
    "checkpointing": "Recompute activations in the backward pass: less memory, a third more work.",
    "quantize": "Keep the frozen base's weights in int8, or on CUDA in nf4.",
    "logger": "Also send settings and metrics to tensorboard, wandb or mlflow; the package must be installed.",
    "resume": "Continue the run in out_dir.",
    "overwrite": "Replace the run in out_dir.",
    "allow_changes": "With resume: continue although data, base or settings of training have changed.",
    "yes": "Do not ask before a download.",
}


MOST = 10**9  # steps, samples or tokens: none of them allocates anything by itself
MOST_TOKENS = 2**20  # of one forward pass or sample
MOST_SAMPLES = 2**16  # of one step or batch
MOST_SEED = 2**32 - 1
TRAIN_RANGES = {
    "max_steps": (1, MOST),
    "epochs": (1, MOST),
    "batch_size": (1, MOST_SAMPLES),
    "micro_batch_tokens": (1, MOST_TOKENS),
    "max_seq_length": (3, MOST_TOKENS),
    "learning_rate": (0, 100),
    "warmup_steps": (0, MOST),
    "weight_decay": (0, 100),
    "clip": (0, MOST),
    "eval_every": (1, MOST),
    "save_every": (1, MOST),
    "seed": (0, MOST_SEED),
}


@dataclass
class TrainArgs:
    """The settings that every finetune script shares.

    Args:
        max_steps: Optimizer steps in all.
        epochs: Passes over the training samples; where it is given, max_steps does not count.
        batch_size: Samples of one optimizer step, on all devices together.
        micro_batch_tokens: Tokens, padding included, of one forward and backward pass: less takes less memory.
        max_seq_length: Longer samples are cut to this many tokens.
        learning_rate: The highest rate, reached at the end of the warm-up.
        warmup_steps: Optimizer steps over which the rate rises in a line, by default a tenth; a cosine to 0 follows.
        weight_decay: AdamW's, on what the method's paper decays.
        clip: The gradient's norm is cut to this; 0 switches that off.
        eval_every: Steps between validations; there is one at the end in any case.
        save_every: Steps between saves of the state that --resume goes on from.
        seed: Of the order of samples and of everything drawn at random.
    """

    max_steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    micro_batch_tokens: int = 1024
    max_seq_length: int = 512
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int = 50
    save_every: int = 25
    seed: int = 1337

    def __post_init__(self):
        if self.max_steps is None and self.epochs is None:
            raise UserError("give --train.max_steps or --train.epochs")
        for name, (low, high) in TRAIN_RANGES.items():
            check_range(f"--train.{name}", getattr(self, name), low, high)

    def total_steps(self, n_samples: int) -> int:
        """Optimizer steps in all; UserError where the warm-up leaves none of them."""
        steps = (self.max_steps or 0) if self.epochs is None else math.ceil(self.epochs * n_samples / self.batch_size)
        if (self.warmup_steps or 0) >= steps:
            raise UserError(f"--train.warmup_steps {self.warmup_steps} must be less than the {steps} steps in all")
        return steps

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of optimizer step ``step`` (from 0): linear warm-up, then a cosine that ends at 0."""
        warmup = total_steps // 10 if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def summary(self, n_samples: int, world_size: int = 1) -> str:
        """How often the steps go through the samples, and whether every device has work."""
        steps = self.total_steps(n_samples)
        passes = self.epochs or steps * self.batch_size / n_samples
        text = f"{steps:,} steps of {self.batch_size}: {passes:.2g} times through the samples to train on"
        if self.batch_size < world_size:
            text += (
                f"\nnote: --train.batch_size {self.batch_size} gives work to only {self.batch_size} of {world_size} "
                "devices; a larger one, with a higher --train.learning_rate, to all"
            )
        return text


@dataclass
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token (greedy); higher values flatten the distribution.
        top_k: Keep only this many of the likeliest tokens.
        top_p: Keep the likeliest tokens that together hold this much probability.
        seed: Makes sampled answers repeatable.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1337

    def __post_init__(self):
        if self.temperature != 0:  # beyond these, float32 logits divided by it are all alike, or infinite
            check_range("--sampling.temperature, other than 0 (greedy),", self.temperature, 0.001, 1000)
        elif not (self.top_k is None and self.top_p is None):
            raise UserError(
                "top_k and top_p choose among likely tokens: pass a --sampling.temperature above 0 with them"
            )
        check_range("--sampling.top_k", self.top_k, 1, MOST)
        check_range("--sampling.top_p", self.top_p, 1e-6, 1)  # less is 0 in float32, which leaves no token
        check_range("--sampling.seed", self.seed, 0, MOST_SEED)
