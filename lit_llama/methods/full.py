"""Finetuning all layers: every number of the base trains.

        ids -> wte -> h[0] .. h[N-1] -> ln_f -> lm_head   all trained, in float32

Over a base in bfloat16 the products are computed in bfloat16 from float32 masters: each layer casts its weight.

Trains everything: 6,738,415,616 numbers for LLaMA-7B.
"""

import torch

from lit_llama.model import LLaMA, unfreeze


def add_full(model: LLaMA, labels: list[str] | None = None) -> None:
    """Unfreeze the whole model; with ``labels`` a new classification head takes the place of the language head."""
    if model.dtype != torch.float32:
        model.compute_dtype = model.dtype
    if labels is not None:
        model.replace_head(len(labels))
    unfreeze(model)
