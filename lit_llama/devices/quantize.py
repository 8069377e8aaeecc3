"""Narrow weights for the frozen base: int8 on every device, nf4 on CUDA; and weights prepacked for decoding on a CPU.

        y = x (s W8)^T          W8 (out, in) in int8, s (out,) one scale per row: |W - s W8| <= s / 2
        dx = dy (s W8)          the weight itself gets no gradient

A narrow layer takes the place of a linear one under the same key, with ``in_features``, ``out_features``, ``weight``
and ``bias``: a method's hooks and modules go on it as on a wide one. The embedding and the head stay wide: of the
embedding few rows are read, and the head's errors go straight into the logits. Order: load, quantize, freeze, add.

int8: round to nearest, the largest number of each row at 127. nf4: "QLoRA: Efficient Finetuning of Quantized LLMs",
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

from lit_llama.cli import UserError
from lit_llama.devices.sharding import is_sharded
from lit_llama.model import Linear, LLaMA

# Up to here the int8 kernel for CPUs beats widening the weight first. Two Zen 4 cores, a weight of 960 x 576: 24 us for
# one row, where the bfloat16 product takes 49 us and the widened one 130 us; 2,300 us for 300 rows, widened 1,390 us.
FEW_ROWS = 16


class AdoptedLinear(Linear):
    """Another linear layer with its sizes, hooks and modules; the weight it puts in place is not that layer's, too."""

    def __init__(self, layer: Linear) -> None:
        self.__dict__.update(layer.__dict__)
        self._parameters, self._buffers = dict(layer._parameters), dict(layer._buffers)


class NarrowLinear(AdoptedLinear):
    """A frozen linear layer whose weight is kept in fewer bits."""

    kind: str
    scales: Any

    def wide_weight(self) -> Tensor:
        """(out, in) in float32."""
        raise NotImplementedError

    def widen(self) -> None:
        """Become a plain linear layer again, that holds the rounded weight in float32."""
        self.weight = nn.Parameter(self.wide_weight(), requires_grad=False)
        del self.scales
        self.__class__ = Linear  # type: ignore[assignment]


class Int8Linear(NarrowLinear):
    kind = "int8"

    def __init__(self, layer: Linear) -> None:
        super().__init__(layer)
        weight = layer.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # (out,)
        scales = scales.to(layer.weight.dtype)  # rounded before what they divide: no error is added, none cast per call
        rounded = (weight / scales[:, None].float()).round().clamp(-127, 127)
        self.weight = nn.Parameter(rounded.to(torch.int8), requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)  # the keys stay the base's

    def wide_weight(self) -> Tensor:
        return self.weight.float() * self.scales[:, None].float()

    def forward(self, x: Tensor) -> Tensor:
        y = Int8Matmul.apply(x, self.weight, self.scales)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Matmul(torch.autograd.Function):
    """x (.., in), weight (out, in) in int8, scales (out,) -> (.., out) in x's dtype. Only x gets a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scales)
        if kernel_fits(x, weight):
            return torch._weight_int8pack_mm(x.flatten(0, -2), weight, scales.to(x.dtype)).unflatten(0, x.shape[:-1])
        return F.linear(x, widened(weight, scales, x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        weight, scales = ctx.saved_tensors
        return dy @ widened(weight, scales, dy.dtype), None, None


def widened(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    # The scales go onto the weight, not onto the product: that inductor would turn into the kernel for few rows.
    return weight.to(dtype) * scales.to(dtype)[:, None]


def kernel_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's int8 kernel for CPUs takes these shapes, and is the faster one: it is slow in float32."""
    few = 0 < x.numel() <= FEW_ROWS * x.size(-1)
    fast = x.device.type == "cpu" and x.dtype == torch.bfloat16 and hasattr(torch, "_weight_int8pack_mm")
    return few and fast and weight.size(0) % 32 == 0 and weight.size(1) % 32 == 0


class Nf4Linear(NarrowLinear):
    """4-bit codes for blocks of 64 numbers, their scales quantized once more; by the bitsandbytes package."""

    kind = "nf4"

    def __init__(self, layer: Linear) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__(layer)
        codes, self.scales = quantize_4bit(layer.weight.detach(), quant_type="nf4", compress_statistics=True)
        self.weight = nn.Parameter(codes, requires_grad=False)  # (out * in / 2, 1) in uint8

    def wide_weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self.scales).float()

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        bias = None if self.bias is None else self.bias.to(x.dtype)
        return matmul_4bit(x, self.weight.t(), self.scales, bias=bias)  # gives x its gradient, and nothing else


KINDS: dict[str, type[NarrowLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}


def quantize_base(model: LLaMA, kind: str) -> None:
    """Keep the blocks' weights in ``kind``, "int8" or "nf4"; "none" leaves the model as it is.

    UserError where nf4 lacks a CUDA device or the bitsandbytes package.
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
    """Put a ``kind`` made of it in place of every plain linear layer of the model below ``parent``."""
    places = [
        (module, name)
        for module in parent.modules()
        for name, child in module.named_children()
        if type(child) is Linear
    ]
    for module, name in places:  # no list of layers: each old weight is gone before the next is made
        setattr(module, name, kind(getattr(module, name)))


def count_numbers(model: LLaMA) -> int:
    """The model's numbers, also where nf4 keeps two of them in a byte."""
    narrow = [layer for layer in model.modules() if isinstance(layer, NarrowLinear)]
    further = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in narrow)
    return sum(param.numel() for param in model.parameters()) + further


def quantization(model: LLaMA) -> str:
    """What ``quantize_base`` was told."""
    kinds = {layer.kind for layer in model.transformer.h.modules() if isinstance(layer, NarrowLinear)}
    return kinds.pop() if kinds else "none"


# ---------------------------------------------------------------------------------------------- decoding on a CPU


class PrepackedLinear(AdoptedLinear):
    """A linear layer whose weight lies in oneDNN's own blocked order: the same products, but no gradient."""

    def __init__(self, layer: Linear, dtype: torch.dtype) -> None:
        super().__init__(layer)
        prepacked = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        self.weight = nn.Parameter(prepacked, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")


def prepack(model: LLaMA, blocks: bool = True) -> None:
    """Prepack the head and the ``blocks`` of a whole model on a CPU that only answers from now on; else do nothing.

    Two Zen 4 cores, one row in bfloat16: 24 us instead of 49 for a weight of 960 x 576, 2.9 ms instead of 4.1 for a
    head of 49,152 x 576. Two Zen 3 cores, float32: 153 us instead of 240, 7.3 ms instead of 11.6. With the hundreds of
    rows of a training step it gains 3 %: training does without. A tied head gets a copy of its own; of the embedding
    then only the rows of the text's tokens are read.
    """
    if model.transformer.wte.weight.device.type != "cpu" or not can_prepack(model.dtype) or is_sharded(model):
        return
    if blocks:
        replace_linears(model.transformer.h, lambda layer: PrepackedLinear(layer, model.dtype))
    if type(model.lm_head) is Linear:
        model.lm_head = PrepackedLinear(model.lm_head, model.dtype)


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has an order of its own for weights of this dtype here; in float32 it was tried on x86 alone."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
