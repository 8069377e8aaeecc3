"""Settings that are flags of several scripts. Nothing heavy is imported here: ``--help`` needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_llama.common.errors import UserError

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
    "logger": '"tensorboard" also shows the figures of metrics.csv there; it reads them from out_dir.',
    "resume": "Continue the run in out_dir.",
    "overwrite": "Replace the run in out_dir.",
    "allow_changes": "With resume: continue although data, base or settings of training have changed.",
    "yes": "Do not ask before a download.",
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
        at_least_1 = ("max_steps", "epochs", "batch_size", "micro_batch_tokens", "eval_every", "save_every")
        for name in at_least_1:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "clip"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise UserError(f"--train.{name} must not be negative, got {getattr(self, name)}")
        if self.max_seq_length < 3:
            raise UserError(f"--train.max_seq_length must be at least 3, got {self.max_seq_length}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--train.seed must lie within 0 and {2**32 - 1}, got {self.seed}")

    def total_steps(self, n_samples: int) -> int:
        """Optimizer steps in all; UserError where the warm-up leaves none of them."""
        steps = (self.max_steps or 0) if self.epochs is None else math.ceil(self.epochs * n_samples / self.batch_size)
        if (self.warmup_steps or 0) >= steps:
            raise UserError(f"--train.warmup_steps {self.warmup_steps} must be less than the {steps} steps in all")
        return steps

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
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature} must be 0 (greedy) or more")
        if self.temperature == 0 and not (self.top_k is None and self.top_p is None):
            raise UserError(
                "top_k and top_p choose among likely tokens: pass a --sampling.temperature above 0 with them"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed} must lie within 0 and {2**32 - 1}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must lie above 0 and at most at 1")
