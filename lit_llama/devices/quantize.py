"""Quantized weights for the frozen base: int8 on every device, nf4 on CUDA.

        y = x (s W8)^T          W8 (out, in) in int8, s (out,) one scale per row: |W - s W8| <= s / 2
        dx = dy (s W8)          the weight gets no gradient

A quantized layer replaces a linear one under the same key, and methods add hooks and modules to it as to any other. The
embedding and the head stay in full precision: few rows of the embedding are read, and errors of the head would go
straight into the logits. Order: load, quantize, freeze, add.

int8 rounds to nearest, with the largest value of each row at 127. nf4: "QLoRA: Efficient Finetuning of Quantized LLMs",
Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_llama.common.errors import UserError
from lit_llama.model import Linear, LLaMA

# Up to this many rows the int8 kernel for CPUs beats dequantizing first. On two Zen 4 cores, for a weight of 960 x 576:
# 24 us for one row (bfloat16 49 us, dequantized 130 us), 2,300 us for 300 rows (dequantized 1,390 us).
FEW_ROWS = 16


class AdoptedLinear(Linear):
    """Takes over another linear layer's sizes, hooks and modules, and gets a weight of its own."""

    def __init__(self, layer: Linear) -> None:
        self.__dict__.update(layer.__dict__)
        self._parameters, self._buffers = dict(layer._parameters), dict(layer._buffers)


class QuantizedLinear(AdoptedLinear):
    """A frozen linear layer with its weight in fewer bits."""

    kind: str
    scales: Any

    def full_weight(self) -> Tensor:
        """(out, in) in float32."""
        raise NotImplementedError

    def dequantize(self) -> None:
        """Become a plain linear layer that holds the rounded weight in float32."""
        self.weight = nn.Parameter(self.full_weight(), requires_grad=False)
        del self.scales
        self.__class__ = Linear  # type: ignore[assignment]


class Int8Linear(QuantizedLinear):
    kind = "int8"

    def __init__(self, layer: Linear) -> None:
        super().__init__(layer)
        weight = layer.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # (out,)
        scales = scales.to(layer.weight.dtype)  # rounded before the division, so that this rounding adds no error
        rounded = (weight / scales[:, None].float()).round().clamp(-127, 127)
        self.weight = nn.Parameter(rounded.to(torch.int8), requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)  # the base's keys stay the same

    def full_weight(self) -> Tensor:
        return self.weight.float() * self.scales[:, None].float()

    def forward(self, x: Tensor) -> Tensor:
        y = Int8Matmul.apply(x.flatten(0, -2), self.weight, self.scales).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Matmul(torch.autograd.Function):
    """x (n, in), weight (out, in) in int8, scales (out,) -> (n, out) in x's dtype. Only x gets a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scales)
        if kernel_fits(x, weight):
            return torch._weight_int8pack_mm(x, weight, scales.to(x.dtype))
        return F.linear(x, dequantized(weight, scales, x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        weight, scales = ctx.saved_tensors
        return dy @ dequantized(weight, scales, dy.dtype), None, None


def dequantized(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    # Scaling the product instead would make inductor choose the kernel for few rows.
    return weight.to(dtype) * scales.to(dtype)[:, None]


def kernel_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's int8 kernel for CPUs takes these shapes and is faster (it is slow in float32)."""
    few = 0 < x.numel() <= FEW_ROWS * x.size(-1)
    fast = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return few and fast and weight.size(0) % 32 == 0 and weight.size(1) % 32 == 0


class Nf4Linear(QuantizedLinear):
    """4-bit codes in blocks of 64 weights, with quantized scales, by the bitsandbytes package."""

    kind = "nf4"

    def __init__(self, layer: Linear) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__(layer)
        codes, self.scales = quantize_4bit(layer.weight.detach(), quant_type="nf4", compress_statistics=True)
        self.weight = nn.Parameter(codes, requires_grad=False)  # (out * in / 2, 1) in uint8

    def full_weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self.scales).float()

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        bias = None if self.bias is None else self.bias.to(x.dtype)
        return matmul_4bit(x, self.weight.t(), self.scales, bias=bias)  # only x gets a gradient


KINDS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}


def quantize_base(model: LLaMA, kind: str) -> None:
    """Quantize the blocks' weights to ``kind``, "int8" or "nf4"; "none" leaves the model as it is.

    Raises UserError if nf4 lacks a CUDA device or the bitsandbytes package.
    """
    if kind == "none":
        return
    if kind not in KINDS:
        raise UserError(f"--quantize {kind!r} is none of none, {', '.join(KINDS)}")
    if kind == "nf4":
        device = model.transformer.wte.weight.device
        if device.type != "cuda":
            raise UserError(f"--quantize nf4 needs CUDA, and this runs on {device.type}; pass --quantize int8 or none")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError('--quantize nf4 needs the bitsandbytes package: pip install -e ".[quantize]"')
    replace_linears(model.transformer.h, KINDS[kind])


def replace_linears(parent: nn.Module, kind: Callable[[Linear], Linear]) -> None:
    """Replace every plain linear layer below ``parent`` with ``kind(layer)``, one at a time to save memory."""
    places = [
        (module, name)
        for module in parent.modules()
        for name, child in module.named_children()
        if type(child) is Linear
    ]
    for module, name in places:
        setattr(module, name, kind(getattr(module, name)))


def count_parameters(model: LLaMA) -> int:
    """The model's parameters. (nf4 keeps two in one byte.)"""
    quantized = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    hidden = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in quantized)
    return sum(param.numel() for param in model.parameters()) + hidden


def quantization(model: LLaMA) -> str:
    """The ``kind`` that ``quantize_base`` was called with."""
    kinds = {layer.kind for layer in model.transformer.h.modules() if isinstance(layer, QuantizedLinear)}
    return kinds.pop() if kinds else "none"
