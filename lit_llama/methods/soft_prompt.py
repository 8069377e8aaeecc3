"""Soft prompts: learned vectors in front of the text's embeddings.

Paper: "The Power of Scale for Parameter-Efficient Prompt Tuning", Lester et al. 2021,
https://arxiv.org/abs/2104.08691

        ids        V  V+1 .. V+K-1   5   17   9 ..        virtual ids past the vocabulary, then the text
        x0   =  [  P_0 P_1 .. P_K-1 ; E(5) E(17) E(9) .. ]    (B, K + T, C), P (K, C) learned

The blocks see a longer text: causal over all of it, positions 0 to K+T-1, no loss on the prompt. In decoding the prompt
is read once; its keys and values stay in the cache. P starts from embeddings of the vocabulary.

Trains K*C parameters: 81,920 for LLaMA-7B with K=20.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_llama.common.errors import check_range
from lit_llama.model import LLaMA

COMMON_IDS = 5000  # P starts from common tokens, as in the paper: byte-pair encodings number tokens by frequency


class SoftPromptEmbedding(nn.Embedding):
    def __init__(self, wte: nn.Embedding, prompt: Tensor) -> None:
        self.__dict__.update(wte.__dict__)  # adopt the layer: its weight under the same key, not copied
        self.soft_prompt = nn.Parameter(prompt)  # (K, C) in float32

    def forward(self, idx: Tensor) -> Tensor:
        virtual = idx - self.num_embeddings  # the row of P, negative for ids of the vocabulary
        text = super().forward(idx.clamp(max=self.num_embeddings - 1))  # (B, T, C)
        prompt = F.embedding(virtual.clamp(min=0), self.soft_prompt).to(text.dtype)
        return torch.where((virtual >= 0).unsqueeze(-1), prompt, text)


def add_soft_prompt(model: LLaMA, prompt_length: int = 20, init_ids: list[int] | None = None) -> None:
    """Put ``prompt_length`` learned vectors in front of every text.

    They start from the embeddings of ``init_ids`` (repeated or cut to fit), or of random common tokens.
    """
    wte = model.transformer.wte
    check_range("prompt_length", prompt_length, 1, model.config.block_size - 1)
    if init_ids:
        rows = torch.tensor((init_ids * prompt_length)[:prompt_length])
    else:
        rows = torch.randint(min(COMMON_IDS, wte.num_embeddings), (prompt_length,), device="cpu")
    prompt = wte.weight.detach()[rows.to(wte.weight.device)].float().clone()
    model.transformer.wte = SoftPromptEmbedding(wte, prompt)
    model.virtual_ids = list(range(wte.num_embeddings, wte.num_embeddings + prompt_length))
