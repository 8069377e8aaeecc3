"""Finetuning all layers: every parameter of the base trains.

        ids -> wte -> h[0] .. h[N-1] -> ln_f -> lm_head   all trained, in float32

With a bfloat16 base, products stay in bfloat16: each layer casts its float32 weight.

Trains all parameters: 6,738,415,616 for LLaMA-7B.
"""

import torch
from torch import nn

from lit_llama.model import Linear, LLaMA


def unfreeze(module: nn.Module) -> None:
    """Make a module trainable, in float32: in bfloat16, 0.5 + 1e-3 rounds back to 0.5."""
    for layer in [layer for layer in module.modules() if hasattr(layer, "dequantize")]:  # devices/quantize.py
        layer.dequantize()
    module.float().requires_grad_(True)


def replace_head(model: LLaMA, n_labels: int) -> None:
    """Replace the language head with a new one, C -> labels. At first all labels are equally likely."""
    model.lm_head = Linear(model.config.n_embd, n_labels, bias=False).to(model.transformer.wte.weight.device)
    nn.init.zeros_(model.lm_head.weight)


def add_full(model: LLaMA, labels: list[str] | None = None) -> None:
    """Unfreeze the whole model; with ``labels`` a new classification head replaces the language head."""
    if model.dtype != torch.float32:
        model.compute_dtype = model.dtype
    if labels is not None:
        replace_head(model, len(labels))
    unfreeze(model)
