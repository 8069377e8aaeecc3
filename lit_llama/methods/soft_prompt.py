"""Soft prompts: learned vectors in front of the text's embeddings.

Paper: "The Power of Scale for Parameter-Efficient Prompt Tuning", Lester et al. 2021,
https://arxiv.org/abs/2104.08691

        ids        V  V+1 .. V+K-1   5   17   9 ..        virtual ids past the vocabulary, then the text
        x0   =  [  P_0 P_1 .. P_K-1 ; E(5) E(17) E(9) .. ]    (B, K + T, C), P (K, C) learned

The blocks see a longer text: causal over all of it, positions 0 to K+T-1, no loss on the prompt. In decoding the prompt
is read once; its keys and values stay in the cache. P starts from embeddings of common tokens, as in the paper, from
those of a text, or at random.

Trains K*C parameters: 81,920 for LLaMA-7B with K=20.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_llama.common.errors import check_range
from lit_llama.model import LLaMA

COMMON_IDS = 5000  # the paper's number of common tokens: byte-pair encodings number tokens by frequency


class SoftPromptEmbedding(nn.Embedding):
    def __init__(self, wte: nn.Embedding, prompt: Tensor) -> None:
        self.__dict__.update(wte.__dict__)  # adopt the layer: its weight under the same key, not copied
        self.soft_prompt = nn.Parameter(prompt)  # (K, C) in float32

    def forward(self, idx: Tensor) -> Tensor:
        virtual = idx - self.num_embeddings  # the row of P, negative for ids of the vocabulary
        text = super().forward(idx.clamp(max=self.num_embeddings - 1))  # (B, T, C)
        prompt = F.embedding(virtual.clamp(min=0), self.soft_prompt).to(text.dtype)
        return torch.where((virtual >= 0).unsqueeze(-1), prompt, text)


def add_soft_prompt(model: LLaMA, prompt_length: int = 20) -> None:
    """Put ``prompt_length`` learned vectors in front of every text, at first the embeddings of common tokens."""
    wte = model.transformer.wte
    check_range("prompt_length", prompt_length, 1, model.config.block_size - 1)
    rows = torch.randint(min(COMMON_IDS, wte.num_embeddings), (prompt_length,), device="cpu")
    prompt = wte.weight.detach()[rows.to(wte.weight.device)].float().clone()
    model.transformer.wte = SoftPromptEmbedding(wte, prompt)
    model.virtual_ids = list(range(wte.num_embeddings, wte.num_embeddings + prompt_length))


@torch.no_grad()
def start_from_text(model: LLaMA, ids: list[int]) -> None:
    """Start from the embeddings of a text's first K tokens. A text of fewer tokens is repeated."""
    wte, K = model.transformer.wte, len(model.virtual_ids)
    wte.soft_prompt.copy_(wte.weight[(ids * K)[:K]])


@torch.no_grad()
def start_normal(model: LLaMA) -> None:
    """Start from N(0, s^2) with the standard deviation s of the embeddings."""
    wte = model.transformer.wte
    wte.soft_prompt.normal_(std=wte.weight.float().std().item())
