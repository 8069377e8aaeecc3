"""The LLaMA family in one file: config, RMSNorm, rotary embedding, attention, MLP, block, KV cache, model.

Papers: LLaMA (https://arxiv.org/abs/2302.13971), Llama 2 (https://arxiv.org/abs/2307.09288),
Llama 3 (https://arxiv.org/abs/2407.21783).

Shapes in comments: B batch, T time, C n_embd, V vocab_size, nh n_head, nkv n_kv_head, hs head_size, S cache slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.attention import Texts, attention
from lit_llama.configs import CONFIGS, LLAMA_31_SCALING


@dataclass
class LLaMAConfig:
    """The sizes and constants of a model of the LLaMA family. The defaults are LLaMA 1's 7B."""

    name: str = "7B"
    block_size: int = 2048  # longest sequence in tokens
    vocab_size: int = 32000
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32  # fewer than n_head: grouped queries (https://arxiv.org/abs/2305.13245)
    n_embd: int = 4096
    head_size: int = 128
    intermediate_size: int = 11008
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's, or only a "factor", see rope_frequencies
    tie_embeddings: bool = False  # lm_head shares the weight of wte
    bias: bool = False  # on every linear layer, as in a merged adapter_v2

    def __post_init__(self):
        sizes = "block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_size", "intermediate_size"
        for field in sizes:
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= (4096 if field == "n_layer" else 2**24):
                raise ValueError(f"{field} must be a positive integer of a plausible size, got {value!r}")
        if self.head_size % 2:
            raise ValueError(f"head_size must be even (rotary pairs), got {self.head_size}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.rope_scaling is not None and set(self.rope_scaling) not in ({"factor"}, set(LLAMA_31_SCALING)):
            raise ValueError(f"rope_scaling needs exactly {sorted(LLAMA_31_SCALING)}, got {self.rope_scaling}")

    @classmethod
    def from_name(cls, name: str) -> LLaMAConfig:
        """The config of a released model (lit_llama/configs.py)."""
        return cls(name=name, **CONFIGS[name])


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), with statistics in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_frequencies(config: LLaMAConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position of each rotary pair, (hs/2,) in float32.

    A ``rope_scaling`` of only a "factor" makes all wavelengths that much longer. Llama 3.1's rule has more: wavelengths
    that fit the original context at least ``high_freq_factor`` times stay as they are. Those that fit at most
    ``low_freq_factor`` times become ``factor`` times longer. The rule interpolates between the two.
    """
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / config.rope_base ** (pairs / config.head_size)
    if config.rope_scaling is None:
        return freqs
    scaling = config.rope_scaling
    if set(scaling) == {"factor"}:
        return freqs / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / scaling["factor"]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + hs/2]) by its angle: the half-split layout of Hugging Face checkpoints.

    x (B, heads, T, hs); cos and sin (T, hs/2) or (B, 1, T, hs/2) (https://arxiv.org/abs/2104.09864).
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class KVCache:
    """Preallocated keys and values of one layer, (B, nkv, S, hs)."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v
        self.prompt: tuple[Tensor, Tensor] | None = None  # keys and values that a method caches

    def update(self, k: Tensor, v: Tensor, input_pos: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Write k and v (B, nkv, T, hs) into the slots ``input_pos`` (T,); return the first ``end`` slots of each."""
        self.k.index_copy_(2, input_pos, k)
        self.v.index_copy_(2, input_pos, v)
        return self.k[:, :, :end], self.v[:, :, :end]


class Linear(nn.Linear):
    """Casts its weight to the input's dtype: a trainable weight is float32 whatever the base's precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class CausalSelfAttention(nn.Module):
    """Attention in two steps, ``qkv`` and ``attend``. A method can override one and keep the other.

    ``qkv_slices`` holds the rows of q, k and v in the fused projection; other code reads the layout from it.
    """

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.n_kv_head, config.head_size
        q_size, kv_size = self.n_head * self.head_size, self.n_kv_head * self.head_size
        self.c_attn = Linear(config.n_embd, q_size + 2 * kv_size, bias=config.bias)
        self.c_proj = Linear(q_size, config.n_embd, bias=config.bias)
        q, k = slice(0, q_size), slice(q_size, q_size + kv_size)
        self.qkv_slices = {"q": q, "k": k, "v": slice(k.stop, k.stop + kv_size)}
        self.kv_cache: KVCache | None = None  # set by LLaMA.set_kv_cache for decoding

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, nh, T, hs), k and v (B, nkv, T, hs), not yet rotated."""
        sizes = [rows.stop - rows.start for rows in self.qkv_slices.values()]
        parts = self.c_attn(x).split(sizes, -1)  # not slices: their gradients would be three full tensors
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in parts)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor | None = None, mask: Tensor | Texts | None = None
    ) -> Tensor:
        """-> (B, nh, T, hs). Causal over k and v, or over the cache where ``mask`` (B or 1, 1, T, S) is True.

        ``Texts`` make it causal within each text.
        """
        if input_pos is not None:
            k, v = self.kv_cache.update(k, v, input_pos, end=mask.size(-1))
        return attention(q, k, v, mask, is_causal=mask is None)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos=None, mask=None) -> Tensor:
        q, k, v = self.qkv(x)
        y = self.attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, input_pos, mask)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, nh * hs)


class MLP(nn.Module):
    """SwiGLU: c_proj(silu(c_fc1(x)) * c_fc2(x)) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.c_fc1 = Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.c_fc2 = Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.c_proj = Linear(config.intermediate_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_fc1(x)) * self.c_fc2(x))


class Block(nn.Module):
    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.rms_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.rms_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos=None, mask=None) -> Tensor:
        x = x + self.attn(self.rms_1(x), cos, sin, input_pos, mask)
        return x + self.mlp(self.rms_2(x))


class LLaMA(nn.Module):
    """Token ids in, logits out.

    Training calls ``hidden_states`` with a packed row (train/loss.py). Decoding passes ``input_pos``, for the KV cache.
    """

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer: Any = nn.ModuleDict()  # Any: mypy takes submodules for tensors
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=config.bias)
        self.tie_weights()
        self._rope: tuple[Tensor, Tensor] | None = None  # cos and sin (positions, hs/2), grown as needed
        # What some methods set:
        self.first_position = 0  # position of the first token, after a prefix (methods/prefix.py)
        self.virtual_ids: list[int] = []  # ids beyond the vocabulary, before every text (methods/soft_prompt.py)
        self.compute_dtype: torch.dtype | None = None  # if it is not that of the weights (methods/full.py)
        self.reparametrization: Any = None  # an MLP that computes the prefix in training (methods/prefix.py)

    def tie_weights(self) -> None:
        """Let the head use the embedding's weight if the config says so. Loading weights needs it again."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: the embedding's, unless ``compute_dtype`` is set."""
        return self.compute_dtype or self.transformer.wte.weight.dtype

    def init_weights(self, std: float = 0.02) -> LLaMA:
        """Random weights as in GPT-2: normal for matrices, ones for norms."""
        for matrix in (param for param in self.parameters() if param.dim() == 2):
            nn.init.normal_(matrix, std=std)
        return self

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at ``positions``, (*positions.shape, hs/2) in the dtype of activations.

        The angles are float32. In bfloat16 they would have errors up to 1.0 at position 256.
        """
        length = max(positions.size(-1), self.cache_size) + self.first_position
        if self._rope is None or self._rope[0].size(0) < length or self._rope[0].device != positions.device:
            with torch.inference_mode(False):  # tables made in generation must also serve training
                steps = torch.arange(length, device=positions.device, dtype=torch.float32)
                angles = torch.outer(steps, rope_frequencies(self.config, positions.device))
                self._rope = angles.cos(), angles.sin()
        cos, sin = (table[positions + self.first_position].to(self.dtype) for table in self._rope)
        return cos, sin

    def hidden_states(
        self, idx: Tensor, input_pos: Tensor | None = None, pad: Tensor | None = None, texts: Texts | None = None
    ) -> Tensor:
        """idx (B, T) -> the vectors after the final norm (B, T, C).

        Without ``input_pos``: causal over idx, no cache and no mask tensor. Right padding is harmless. A packed row
        (1, N) comes with its ``texts`` (data/batches.py); a text sees itself alone.
        With ``input_pos`` (T,): the tokens go into these slots of the KV cache, and each sees the slots up to its own.
        ``pad`` (B,) is the number of padding slots at the left of each row, which no token sees.
        """
        longest = idx.size(1) if texts is None else max(texts.lengths)
        if longest > self.context:
            raise ValueError(f"{longest} tokens do not fit the context of {self.context}; shorten the input")
        mask: Any = None
        if texts is not None:  # training
            positions, mask = texts.positions, texts
        elif input_pos is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        else:  # decoding
            positions, mask = input_pos, self.decode_mask(input_pos, pad)
            if pad is not None:  # (B, 1, T): positions count from the row's first real token
                positions = (input_pos - pad[:, None, None]).clamp(min=0)
        cos, sin = self.rope(positions)
        x = self.transformer.wte(idx).to(self.dtype)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, cos, sin, input_pos, mask)
        return self.transformer.ln_f(x)

    def forward(self, idx: Tensor, input_pos: Tensor | None = None, pad: Tensor | None = None) -> Tensor:
        """idx (B, T) -> logits (B, T, V). For the arguments see ``hidden_states``."""
        return self.lm_head(self.hidden_states(idx, input_pos, pad))

    @property
    def context(self) -> int:
        """Tokens that fit, including the ``virtual_ids``."""
        return self.config.block_size - self.first_position

    @property
    def max_text_tokens(self) -> int:
        """Tokens that fit after the ``virtual_ids``."""
        return self.context - len(self.virtual_ids)

    @property
    def cache_size(self) -> int:
        """Slots of the KV cache; 0 without a cache."""
        cache = self.transformer.h[0].attn.kv_cache
        return 0 if cache is None else cache.k.size(2)

    def set_kv_cache(self, batch_size: int, max_seq_length: int) -> None:
        """Allocate an empty KV cache of ``max_seq_length`` slots for ``batch_size`` rows in every layer."""
        if not 0 < max_seq_length <= self.context:
            raise ValueError(f"max_seq_length {max_seq_length} is not within 1 to {self.context} (the context)")
        shape = (batch_size, self.config.n_kv_head, max_seq_length, self.config.head_size)
        like = dict(dtype=self.dtype, device=self.transformer.wte.weight.device)
        for block in self.transformer.h:
            block.attn.kv_cache = KVCache(torch.zeros(shape, **like), torch.zeros(shape, **like))

    def clear_kv_cache(self) -> None:
        for block in self.transformer.h:
            block.attn.kv_cache = None

    def decode_mask(self, input_pos: Tensor, pad: Tensor | None) -> Tensor:
        """(1 or B, 1, T, S): a token sees the slots up to its own, except the row's padding."""
        # A CPU reads only the filled slots. On a GPU, finding out how many there are would cost a sync per token.
        end = int(input_pos[-1]) + 1 if input_pos.device.type == "cpu" else self.cache_size
        slots = torch.arange(end, device=input_pos.device)
        mask = slots <= input_pos[:, None]  # (T, S)
        if pad is None:
            return mask[None, None]
        real = slots >= pad[:, None, None]  # (B, 1, S)
        # A padding token sees itself: a softmax over nothing is NaN.
        return (mask & (real | (slots == input_pos[:, None])))[:, None]
