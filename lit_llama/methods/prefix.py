"""Prefix tuning: learned keys and values in front of the text's own, in every block.

Paper: "Prefix-Tuning: Optimizing Continuous Prompts for Generation", Li & Liang 2021, https://arxiv.org/abs/2101.00190

        k = [Pk ; rope(k)]     (B, nkv, K + T, hs)     Pk, Pv (nkv, K, hs) learned, one pair per block
        v = [Pv ; v]
        y = softmax(q k^T / sqrt(hs)) v                one softmax over both; every token sees all K

The prefix takes the positions 0 to K-1 and is not rotated; the text starts at K. Keys and values are hard to train
directly, so in training an MLP can compute them from rows E (K, C); it is dropped once they are learned:

        P = tanh(E W_down + b) W_up + b'               (K, N * 2 * nkv * hs)

Keeps 2*N*K*nkv*hs parameters: 2,621,440 for LLaMA-7B with K=10. With an MLP of 512, 136,618,496 train.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_llama.attention import Texts, attention, insert_prefix
from lit_llama.common.errors import check_range
from lit_llama.model import CausalSelfAttention, LLaMA


class PrefixAttention(CausalSelfAttention):
    def __init__(self, attn: CausalSelfAttention, prefix: Tensor) -> None:
        self.__dict__.update(attn.__dict__)  # adopt the layer: its modules under the same keys, no weight is copied
        self.prefix = prefix  # (2, nkv, K, hs): keys and values

    def attend(self, q, k, v, input_pos=None, mask=None):
        pk, pv = (t.to(q.dtype).expand(q.size(0), -1, -1, -1) for t in self.prefix)
        K = pk.size(2)
        if isinstance(mask, Texts):  # each text of a packed row gets the prefix
            k, v = insert_prefix(pk, k, mask), insert_prefix(pv, v, mask)
            return attention(q, k, v, replace(mask, prefix=K))
        if input_pos is not None:
            k, v = self.kv_cache.update(k, v, input_pos, end=mask.size(-1))
            mask = F.pad(mask, (K, 0), value=True)
        return attention(q, torch.cat((pk, k), 2), torch.cat((pv, v), 2), mask, is_causal=mask is None)


class PrefixMLP(nn.Module):
    """Computes the prefixes of all blocks at the start of each pass through the model."""

    def __init__(self, model: LLaMA, prompt_length: int, mlp_size: int, device: torch.device) -> None:
        super().__init__()
        config = model.config
        float32: Any = dict(device=device, dtype=torch.float32)
        self.shape = (prompt_length, config.n_layer, 2, config.n_kv_head, config.head_size)
        self.embedding = nn.Embedding(prompt_length, config.n_embd, **float32)
        self.down = nn.Linear(config.n_embd, mlp_size, **float32)
        self.up = nn.Linear(mlp_size, 2 * config.n_layer * config.n_kv_head * config.head_size, **float32)

    def forward(self) -> Tensor:
        """-> (N, 2, nkv, K, hs)."""
        return self.up(self.down(self.embedding.weight).tanh()).view(self.shape).permute(1, 2, 3, 0, 4)

    def kept_tensors(self) -> dict[str, Tensor]:
        return {f"transformer.h.{i}.attn.prefix": prefix for i, prefix in enumerate(self())}

    def flatten(self, model: LLaMA) -> None:
        """Replace the MLP with the prefixes that it computes now."""
        self.handle.remove()
        for block, prefix in zip(model.transformer.h, self().detach(), strict=True):
            block.attn.__dict__.pop("prefix")
            block.attn.prefix = nn.Parameter(prefix.contiguous())
        model.reparametrization = None


def add_prefix(model: LLaMA, prompt_length: int = 10, mlp_size: int = 0) -> None:
    """Give every block a prefix of ``prompt_length`` keys and values; with an ``mlp_size``, an MLP computes them."""
    check_range("prompt_length", prompt_length, 1, model.config.block_size - 1)
    check_range("mlp_size", mlp_size, 0, 4 * model.config.n_embd)
    model.first_position = prompt_length
    config, device = model.config, model.transformer.wte.weight.device
    shape = (2, config.n_kv_head, prompt_length, config.head_size)
    for block in model.transformer.h:
        prefix = torch.zeros(shape, device=device, dtype=torch.float32)
        prefix.normal_(std=0.02)
        block.attn = PrefixAttention(block.attn, prefix if mlp_size else nn.Parameter(prefix))
    if mlp_size:
        model.reparametrization = mlp = PrefixMLP(model, prompt_length, mlp_size, device)

        def hand_out(*_) -> None:
            for block, prefix in zip(model.transformer.h, mlp(), strict=True):
                block.attn.prefix = prefix

        mlp.handle = model.transformer.wte.register_forward_pre_hook(hand_out)


@torch.no_grad()
def start_from_text(model: LLaMA, ids: list[int]) -> None:
    """Start the prefixes as the keys and values of the text's first K tokens, so that the model begins as if it had
    read them before every text (https://arxiv.org/abs/2506.06266). A text of fewer tokens is repeated. Only
    without an MLP.
    """
    attns, K = [block.attn for block in model.transformer.h], model.first_position
    text = torch.tensor([(ids * K)[:K]], device=model.transformer.wte.weight.device)
    model.first_position = 0
    for attn in attns:
        attn.attend = partial(CausalSelfAttention.attend, attn)  # without a prefix
    model.set_kv_cache(1, K)
    model.hidden_states(text, torch.arange(K, device=text.device))
    for attn in attns:
        attn.prefix.copy_(torch.cat((attn.kv_cache.k, attn.kv_cache.v)))
        del attn.attend
    model.clear_kv_cache()
    model.first_position = K
