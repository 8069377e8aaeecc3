"""LLaMA-Adapter V2: LLaMA-Adapter, a scale and a bias for every linear layer, and trained norms.

Paper: "LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model", Gao et al. 2023,
https://arxiv.org/abs/2304.15010

        y = s * (x W^T + b)        s (out,) starts at one, b (out,) at zero: the model begins as the base, exactly

The adapter's prompts pass through the same layers, so s and b act on them, too.

Trains the adapter's parameters, 2 * out per linear layer and (2N + 1)*C in the norms: 4,279,744 for LLaMA-7B,
4,215,744 without the head's scale and bias.
"""

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.methods.adapter import add_adapter
from lit_llama.methods.full import unfreeze
from lit_llama.model import LLaMA, RMSNorm


class ScaleBias(nn.Module):
    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size, device=device, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=torch.float32))

    def forward(self, y: Tensor) -> Tensor:
        return (self.scale * (y + self.bias)).type_as(y)  # in float32: near 1, bfloat16 is too coarse for s


def apply_scale_bias(layer: nn.Linear, args: tuple, output: Tensor) -> Tensor:
    return layer.scale_bias(output)


def add_adapter_v2(model: LLaMA, prompt_length: int = 10, start_layer: int = 2, scale_head: bool = True) -> None:
    """Add LLaMA-Adapter, a scale and a bias to every linear layer (the head's by ``scale_head``); unfreeze norms."""
    add_adapter(model, prompt_length, start_layer)
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear) and (scale_head or layer is not model.lm_head):
            layer.scale_bias = ScaleBias(layer.out_features, layer.weight.device)
            layer.register_forward_hook(apply_scale_bias)
        if isinstance(layer, RMSNorm):
            unfreeze(layer)
