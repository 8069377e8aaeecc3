"""LLaMA-Adapter: learned prompts in the top L blocks, attended to through a gate that starts at zero.

Paper: "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", Zhang et al. 2023,
https://arxiv.org/abs/2303.16199

        x (B, T, C)                       P (K, C), learned, one per block
            |                                 |
         [c_attn]  the block's own frozen  [c_attn]
        q   k   v                           ak   av
        |   |   |                            |    |
        |  rope + causal attention           |    |       no RoPE on ak, no mask: every token sees all K
        |       |                            |    |
        |       y        +      g  *  softmax(q ak^T / sqrt(hs)) av
        |                       |
        +-- rotated q, shared   one gate per head, 0 at the start: the model begins as the base, exactly

P starts from N(0, 1), as in the paper, or from K tokens of a text as the block reads them (``start_from_text``).

Trains L*K*C + L*nh parameters: 1,229,760 for LLaMA-7B with L=30, K=10.
"""

import torch
import torch.nn as nn

from lit_llama.attention import attention
from lit_llama.common.errors import UserError, check_range
from lit_llama.model import CausalSelfAttention, LLaMA

ACTIVATIONS = {"none": nn.Identity, "tanh": nn.Tanh}


class AdapterAttention(CausalSelfAttention):
    def __init__(
        self, attn: CausalSelfAttention, prompt_length: int, gate: str, gate_activation: str, gate_init: float
    ) -> None:
        self.__dict__.update(attn.__dict__)  # adopt the layer: its modules under the same keys, no weight is copied
        device, n_embd = attn.c_attn.weight.device, attn.c_attn.in_features
        # float32 whatever the base's precision: in bfloat16, 0.5 + 1e-3 rounds back to 0.5
        self.adapter_wte = nn.Embedding(prompt_length, n_embd, device=device, dtype=torch.float32)  # P ~ N(0, 1)
        gates = {"head": self.n_head, "layer": 1}[gate]
        self.gating_factor = nn.Parameter(torch.full((gates, 1, 1), gate_init, device=device, dtype=torch.float32))
        self.gate_activation = ACTIVATIONS[gate_activation]()

    def prompt_kv(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the prompt through the layer's own projection: (1, nkv, K, hs) each."""
        _, ak, av = self.qkv(self.adapter_wte.weight[None].to(dtype))
        return ak, av

    def attend(self, q, k, v, input_pos=None, mask=None):
        y = super().attend(q, k, v, input_pos, mask)  # (B, nh, T, hs)
        if input_pos is None:  # without a cache; in training the prompt changes with every step
            prompt = self.prompt_kv(q.dtype)
        else:  # decoding: projected once per cache
            if self.kv_cache.prompt is None:
                self.kv_cache.prompt = self.prompt_kv(q.dtype)
            prompt = self.kv_cache.prompt
        ak, av = (t.expand(q.size(0), -1, -1, -1) for t in prompt)
        ya = attention(q, ak, av)
        return y + (self.gate_activation(self.gating_factor) * ya).type_as(y)


def add_adapter(
    model: LLaMA,
    prompt_length: int = 10,
    start_layer: int = 2,
    gate: str = "head",
    gate_activation: str = "none",
    gate_init: float = 0.0,
) -> None:
    """Give the L = n_layer - ``start_layer`` upper blocks a prompt of ``prompt_length`` rows and a gate.

    ``gate``: one per "head" (the paper) or per "layer" (PEFT). ``gate_activation``: "none", or "tanh" as in the
    paper's training code; no script has a flag for it. ``gate_init``: 0 as in the paper; others show why 0 matters.
    """
    check_range("prompt_length", prompt_length, 1, model.config.block_size)
    check_range("start_layer", start_layer, 0, model.config.n_layer - 1)
    check_range("gate_init", gate_init, -100, 100)
    if gate not in ("head", "layer"):
        raise UserError(f"gate must be 'head' or 'layer', got {gate!r}")
    if gate_activation not in ACTIVATIONS:
        raise UserError(f"gate_activation must be one of {list(ACTIVATIONS)}, got {gate_activation!r}")
    for block in model.transformer.h[start_layer:]:
        block.attn = AdapterAttention(block.attn, prompt_length, gate, gate_activation, gate_init)


@torch.no_grad()
def start_from_text(model: LLaMA, ids: list[int]) -> None:
    """Set each prompt to what its block's attention reads (the output of rms_1) at K tokens spread over a text.

    Their keys and values are then like those of a text. Those of N(0, 1) are not: in SmolLM2-135M they are about three
    times (keys) and up to eight times (values) as large. Prefix tuning gains from real words, too (Li & Liang 2021,
    section 7.4, https://arxiv.org/abs/2101.00190). A text shorter than K + 1 tokens is repeated.
    The gates must be zero, or the prompts below would change what a block reads.
    """
    adapted = [block.attn for block in model.transformer.h if isinstance(block.attn, AdapterAttention)]
    K, device = adapted[0].adapter_wte.num_embeddings, adapted[0].adapter_wte.weight.device
    length = min(max(len(ids), K + 1), model.context)
    text = torch.tensor([(ids * (K + 1))[:length]], device=device)
    rows = torch.linspace(1, length - 1, K).long().to(device)  # the first token's vector is unlike all others

    def copy_inputs(attn: AdapterAttention, inputs: tuple) -> None:
        attn.adapter_wte.weight.copy_(inputs[0][0, rows])  # inputs[0] is x (1, T, C)

    hooks = [attn.register_forward_pre_hook(copy_inputs) for attn in adapted]
    model.hidden_states(text)
    for hook in hooks:
        hook.remove()
