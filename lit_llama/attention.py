"""softmax(q k^T / sqrt(hs)) v, by the kernel that is fastest for the device, the precision and the sizes.

Shapes: q (B, nh, T, hs), k and v (B, nkv, S, hs) -> (B, nh, T, hs), where nkv divides nh. A packed row has B = 1.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention import varlen  # from PyTorch 2.10 on

    varlen_attn: Any = varlen.varlen_attn
    VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters)
except ImportError:
    VARLEN_OPTIONS = set()
VARLEN_GROUPED = "enable_gqa" in VARLEN_OPTIONS  # from 2.12 on
VARLEN_CAUSAL: Any = {"is_causal": True} if "is_causal" in VARLEN_OPTIONS else {"window_size": (-1, 0)}  # 2.10, later


PLAIN_LENGTH = 512  # up to this many queries and keys, plain products beat the fused bfloat16 kernel for CPUs


@dataclass
class Texts:
    """The texts that share a packed row of N tokens. A token sees its own text, up to itself.

    ``prefix`` is the number of keys in front of each text's own (methods/prefix.py).
    """

    lengths: list[int]
    longest: int  # at least the longest of them
    positions: Tensor  # (N,): of each token in its text
    bounds: Tensor  # (texts + 1,) in int32: where each text starts, and where the last one ends
    prefix: int = 0


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Texts | None = None, is_causal: bool = False) -> Tensor:
    """Attention over all of k; only where a ``mask`` (B or 1, 1, T, S) is True; within each of ``Texts``; or causal.

    If it is causal, the last query sees all keys, the one before it all but one, and so on.
    """
    if isinstance(mask, Texts):
        v = v.contiguous()  # a view would keep the whole fused projection in memory, until the backward pass
        return varlen_attention(q, k, v, mask) if has_varlen(q, k) else attention_by_text(q, k, v, mask)
    if is_causal and (more := k.size(2) - q.size(2)):  # the kernels count from the first query: add some, and drop them
        return attention(F.pad(q, (0, 0, more, 0)), k, v, is_causal=True)[:, :, more:]
    # The fused bfloat16 kernel for CPUs is slow below 512 x 512 scores per head. On one AVX512-BF16 core with nine
    # heads, one token over 1,000 keys takes 950 us fused and 250 us as plain products.
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.size(2) * k.size(2) <= PLAIN_LENGTH**2:
        return plain_attention(q, k, v, mask, is_causal)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Two batched products. Query heads that share a key head are stacked along T."""
    (B, nh, T, hs), (nkv, S) = q.shape, k.shape[1:3]
    q, k, v = q.reshape(B * nkv, -1, hs), k.reshape(B * nkv, S, hs), v.reshape(B * nkv, S, hs)
    if is_causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    bias = q.new_zeros(()) if mask is None else q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    scores = torch.add(bias, (q @ k.transpose(1, 2)).view(B, nh, T, S), alpha=hs**-0.5)
    return (scores.softmax(-1).view(B * nkv, -1, S) @ v).view(B, nh, T, hs)


@torch.compiler.disable  # it would compile a loop for each list of lengths
def attention_by_text(q: Tensor, k: Tensor, v: Tensor, texts: Texts) -> Tensor:
    own, seen = texts.lengths, [n + texts.prefix for n in texts.lengths]
    parts = zip(q.split(own, 2), k.split(seen, 2), v.split(seen, 2), strict=True)
    return torch.cat([attention(*part, is_causal=True) for part in parts], 2)


@torch.compiler.disable
def insert_prefix(prefix: Tensor, own: Tensor, texts: Texts) -> Tensor:
    """Put a prefix (1, nkv, K, hs) in front of the keys or values of each text, (1, nkv, N, hs)."""
    return torch.cat([part for text in own.split(texts.lengths, 2) for part in (prefix, text)], 2)


def has_varlen(q: Tensor, k: Tensor) -> bool:
    """Whether FlashAttention takes all texts at once: in half precision, on CUDA (or meta, to count kernels)."""
    if q.size(-1) % 8 or q.size(-1) > 256:  # sizes that the kernel refuses
        return False
    if q.dtype not in (torch.bfloat16, torch.float16) or not (VARLEN_GROUPED or q.size(1) == k.size(1)):
        return False
    return bool(VARLEN_OPTIONS) and (q.device.type == "meta" or q.device.type == "cuda" and has_flash(q.device.index))


@torch.compiler.assume_constant_result
def has_flash(cuda_index: int) -> bool:
    """FlashAttention needs an Ampere GPU or a newer one."""
    return torch.cuda.get_device_capability(cuda_index) >= (8, 0)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, texts: Texts) -> Tensor:
    """FlashAttention over a packed row (https://docs.pytorch.org/docs/stable/nn.attention.varlen.html)."""
    seen = bounds = texts.bounds
    if texts.prefix:
        before = texts.prefix * torch.arange(len(bounds), device=bounds.device, dtype=bounds.dtype)
        seen = (bounds + before).clamp(max=k.size(2))  # the last texts may be empty
    grouped = {"enable_gqa": True} if q.size(1) != k.size(1) else {}
    rows = [t[0].transpose(0, 1) for t in (q, k, v)]  # (N, heads, hs)
    longest = (texts.longest, texts.longest + texts.prefix)
    return varlen_attn(*rows, bounds, seen, *longest, **VARLEN_CAUSAL, **grouped).transpose(0, 1)[None]
