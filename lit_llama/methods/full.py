"""Finetuning all layers: every parameter of the base trains.

        ids -> wte -> h[0] .. h[N-1] -> ln_f -> lm_head   all trained, in float32

With a bfloat16 base, products stay in bfloat16: each layer casts its float32 weight.

Trains all parameters: 6,738,415,616 for LLaMA-7B.
"""

import torch

from lit_llama.model import LLaMA, unfreeze


def add_full(model: LLaMA, labels: list[str] | None = None) -> None:
    """Unfreeze the whole model; with ``labels`` a new classification head replaces the language head."""
    if model.dtype != torch.float32:
        model.compute_dtype = model.dtype
    if labels is not None:
        model.replace_head(len(labels))
    unfreeze(model)
