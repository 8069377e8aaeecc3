"""Finetuning the output layers: the top blocks, the final norm and the head train, the blocks below stay frozen.

Paper: "Universal Language Model Fine-tuning for Text Classification",
Howard & Ruder 2018, https://arxiv.org/abs/1801.06146

        ids -> wte -> h[0] .. h[N-n-1]   frozen, no graph is built
                    -> h[N-n] .. h[N-1] -> ln_f -> lm_head   trained

A head that shares the embedding's weight gets a copy first, so that the embedding stays frozen. For data with labels, a
new head with one row per label can replace the language head; it reads the last token's vector.

Trains n blocks + C + V*C parameters: 131,072,000 for LLaMA-7B's head, 4,096 for the norm, 404,766,720 for two blocks.
"""

import torch.nn as nn

from lit_llama.common.errors import check_range
from lit_llama.methods.full import replace_head, unfreeze
from lit_llama.model import LLaMA


def add_output_layers(model: LLaMA, n_blocks: int = 2, labels: list[str] | None = None) -> None:
    """Unfreeze the top ``n_blocks`` blocks, the norm and the head; with ``labels``, a new classification head."""
    check_range("n_blocks", n_blocks, 0, model.config.n_layer)
    if labels is None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # no longer the embedding's
    else:
        replace_head(model, len(labels))
    for layer in [*model.transformer.h[model.config.n_layer - n_blocks :], model.transformer.ln_f, model.lm_head]:
        unfreeze(layer)
