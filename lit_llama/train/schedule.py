"""The learning rate of a step."""

import math

from lit_llama.settings import TrainArgs


def learning_rate_at(step: int, total_steps: int, args: TrainArgs) -> float:
    """The learning rate of optimizer step ``step`` (from 0): linear warm-up, then a cosine that ends at 0."""
    warmup = total_steps // 10 if args.warmup_steps is None else args.warmup_steps
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
