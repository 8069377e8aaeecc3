"""LoRA: a low-rank update of frozen matrices.

Paper: "LoRA: Low-Rank Adaptation of Large Language Models", Hu et al. 2021, https://arxiv.org/abs/2106.09685

        x (.., in) ----------- W ------------ + ---- y (.., out)
            |                                 |
            +- dropout -- A (r, in) -- B (out, r) -- * s          s = alpha / r, or alpha / sqrt(r) with rslora

B starts at zero, so the model begins as the base, exactly. W + s B A has W's shape, so the update can be merged
(scripts/merge_lora.py). In the fused projection, q, k and v each have their own pair (A, B). At high ranks, alpha / r
makes gradients small; alpha / sqrt(r) does not (rank-stabilized LoRA, https://arxiv.org/abs/2312.03732).

Trains r*(in + out) parameters per matrix: 4,194,304 for LLaMA-7B with q and v at r=8, 19,988,480 with all seven.
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_llama.common.errors import UserError, check_range
from lit_llama.model import Block, LLaMA

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2", "mlp_proj")


class LowRank(nn.Module):
    """s B A dropout(x), for the rows ``rows`` of a layer's output."""

    def __init__(self, layer: nn.Linear, rows: slice, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        float32: Any = dict(device=layer.weight.device, dtype=torch.float32)
        self.A = nn.Parameter(torch.empty(r, layer.in_features, **float32))
        self.B = nn.Parameter(torch.zeros(len(range(layer.out_features)[rows]), r, **float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.rows, self.scale, self.dropout = rows, scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def delta(self) -> Tensor:
        """The update of the layer's rows of W: (out, in) in float32."""
        return self.scale * self.B @ self.A


def add_low_ranks(layer: nn.Linear, args: tuple, output: Tensor) -> Tensor:
    for low_rank in layer.lora.values():
        output[..., low_rank.rows] += low_rank(args[0])
    return output


def target_layers(block: Block) -> dict[str, tuple[nn.Linear, slice]]:
    """The layer of each target, and its rows in that layer's output."""
    attn, mlp, all_rows = block.attn, block.mlp, slice(None)
    fused = {name: (attn.c_attn, rows) for name, rows in attn.qkv_slices.items()}
    others = {"proj": attn.c_proj, "fc1": mlp.c_fc1, "fc2": mlp.c_fc2, "mlp_proj": mlp.c_proj}
    return fused | {name: (layer, all_rows) for name, layer in others.items()}


def add_lora(
    model: LLaMA,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    targets: tuple[str, ...] = ("q", "v"),
    start_layer: int = 0,
    rslora: bool = False,
) -> None:
    """Add a pair (A, B) of rank ``r`` to each of the matrices ``targets``, in the blocks from ``start_layer`` on."""
    check_range("r", r, 1, model.config.n_embd)
    check_range("alpha", alpha, 0.001, 10_000)
    check_range("dropout", dropout, 0, 0.99)
    check_range("start_layer", start_layer, 0, model.config.n_layer - 1)
    if not targets or set(targets) - set(TARGETS):
        raise UserError(f"targets {list(targets)} must be some of {TARGETS}")
    scale = alpha / (math.sqrt(r) if rslora else r)
    for block in model.transformer.h[start_layer:]:
        layers = target_layers(block)
        for name in targets:
            layer, rows = layers[name]
            if not hasattr(layer, "lora"):
                layer.lora = nn.ModuleDict()
                layer.register_forward_hook(add_low_ranks)
            layer.lora[name] = LowRank(layer, rows, r, scale, dropout)
