"""Houlsby adapters: a small bottleneck after attention and after the MLP of every block.

Paper: "Parameter-Efficient Transfer Learning for NLP", Houlsby et al. 2019, https://arxiv.org/abs/1902.00751

        x = x + A1(attn(rms_1(x)))                 A(z) = z + gelu(z W_down + b1) W_up + b2
        x = x + A2(mlp(rms_2(x)))                             (.., C) -> (.., m) -> (.., C)

W_up and b2 start at zero, so the model begins as the base, exactly. The norms train, too, as in the paper.

Trains N*2*(2*C*m + C + m) + (2N + 1)*C parameters: 33,820,672 + 266,240 for LLaMA-7B with m=64.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_llama.common.errors import check_range
from lit_llama.methods.full import unfreeze
from lit_llama.model import LLaMA


class Bottleneck(nn.Module):
    def __init__(self, n_embd: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(n_embd, size, device=device, dtype=torch.float32)
        self.up = nn.Linear(size, n_embd, device=device, dtype=torch.float32)
        nn.init.normal_(self.down.weight, std=0.01)  # as in the paper
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, z: Tensor) -> Tensor:
        down, up = self.down, self.up
        hidden = F.gelu(F.linear(z, down.weight.to(z.dtype), down.bias.to(z.dtype)))
        return z + F.linear(hidden, up.weight.to(z.dtype), up.bias.to(z.dtype))


def apply_bottleneck(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return layer.houlsby(output)


def add_houlsby(model: LLaMA, bottleneck_size: int = 64) -> None:
    """Add a bottleneck of ``bottleneck_size`` after every attention and MLP, and unfreeze the norms."""
    check_range("bottleneck_size", bottleneck_size, 1, 4 * model.config.n_embd)
    device = model.transformer.wte.weight.device
    for block in model.transformer.h:
        for layer in (block.attn, block.mlp):
            layer.houlsby = Bottleneck(model.config.n_embd, bottleneck_size, device)
            layer.register_forward_hook(apply_bottleneck)
        unfreeze(block.rms_1)
        unfreeze(block.rms_2)
    unfreeze(model.transformer.ln_f)
