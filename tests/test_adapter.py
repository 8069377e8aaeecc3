"""LLaMA-Adapter against the paper's formula, against PEFT, and against everything that broke it elsewhere.

What holds for every method is in test_methods.py.
"""

import math

import pytest
import torch
from helpers import TINY, adapted, tiny_model, tokens, transformers_model

from lit_llama.generate.decode import generate
from lit_llama.methods.adapter import AdapterAttention, add_adapter, start_from_text
from lit_llama.model import LLaMA, LLaMAConfig, apply_rope
from lit_llama.train.loss import target_loss
from lit_llama.trained import trained_tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_prompt_as_long_as_the_context_starts_from_a_text(dtype):
    model = tiny_model().to(dtype).requires_grad_(False)
    add_adapter(model, prompt_length=TINY["block_size"], start_layer=1)
    start_from_text(model, tokens(1, 7)[0].tolist())
    for block in model.transformer.h[1:]:
        prompt = block.attn.adapter_wte.weight
        assert prompt.dtype == torch.float32 and torch.equal(prompt, prompt.to(dtype).float())


@pytest.mark.parametrize("length", [23, 6, 3])
def test_prompts_start_as_what_their_block_reads_of_a_text(length):
    """Of one of fewer tokens than the prompt has rows, repeated: no two rows are alike."""
    base, model, ids = tiny_model(), adapted(on=False), tokens(1, length)[0].tolist()
    start_from_text(model, ids)
    assert torch.equal(model(tokens()), base(tokens()))
    text = torch.tensor([(ids * 2)[: max(length, 6)]])
    read: list[torch.Tensor] = []
    for block in base.transformer.h[1:]:
        block.attn.register_forward_pre_hook(lambda attn, args: read.append(args[0][0]))
    base(text)
    rows = {23: [1, 6, 11, 16, 22]}.get(length, [1, 2, 3, 4, 5])
    for block, x in zip(model.transformer.h[1:], read, strict=True):
        prompt = block.attn.adapter_wte.weight
        assert torch.equal(prompt, x[rows]) and len(prompt.unique(dim=0)) == len(prompt)
        assert prompt.requires_grad and not block.attn._forward_pre_hooks


def naive_attention(attn: AdapterAttention, x, cos, sin, gate) -> torch.Tensor:
    """The paper's formula, one head and one query at a time."""
    weight, hs = attn.c_attn.weight, attn.head_size
    wq, wk, wv = weight.split([attn.n_head * hs, attn.n_kv_head * hs, attn.n_kv_head * hs])
    P, out = attn.adapter_wte.weight, torch.zeros(x.size(0), x.size(1), attn.n_head * hs)
    for h in range(attn.n_head):
        g = h // (attn.n_head // attn.n_kv_head)  # the key/value head that this query head uses
        q_rows, kv_rows = slice(h * hs, (h + 1) * hs), slice(g * hs, (g + 1) * hs)
        ak, av = P @ wk[kv_rows].T, P @ wv[kv_rows].T  # (K, hs), not rotated
        for b in range(x.size(0)):
            q = apply_rope((x[b] @ wq[q_rows].T)[None, None], cos, sin)[0, 0]
            k = apply_rope((x[b] @ wk[kv_rows].T)[None, None], cos, sin)[0, 0]
            v = x[b] @ wv[kv_rows].T
            for t in range(x.size(1)):
                text = (k[: t + 1] @ q[t] / math.sqrt(hs)).softmax(0) @ v[: t + 1]
                prompt = (ak @ q[t] / math.sqrt(hs)).softmax(0) @ av
                out[b, t, q_rows] = text + gate[h] * prompt
    return out @ attn.c_proj.weight.T


@pytest.mark.parametrize("changes", [dict(), dict(n_kv_head=6), dict(gate="layer"), dict(gate_activation="tanh")])
def test_equals_the_papers_formula_with_random_gates(changes):
    model = adapted(**changes)
    attn = model.transformer.h[1].attn
    x, (cos, sin) = torch.randn(2, 7, TINY["n_embd"]), model.rope(torch.arange(7))
    gate = attn.gating_factor.flatten()
    gate = gate.tanh() if changes.get("gate_activation") == "tanh" else gate
    with torch.no_grad():
        expected = naive_attention(attn, x, cos, sin, gate.expand(attn.n_head))
        torch.testing.assert_close(attn(x, cos, sin), expected, atol=1e-5, rtol=1e-4)
        attn.gating_factor.zero_()
        assert (attn(x, cos, sin) - expected).abs().max() > 0.05  # the prompt was really in it


def test_only_the_top_blocks_are_changed():
    model = adapted(start_layer=2)
    assert [type(block.attn) is AdapterAttention for block in model.transformer.h] == [False, False, True]


def test_only_the_prompts_and_gates_train():
    expected = {f"transformer.h.{i}.attn.{t}" for i in (1, 2) for t in ("adapter_wte.weight", "gating_factor")}
    assert trained_tensors(adapted()).keys() == expected


def test_only_gates_move_on_the_first_step():
    model = adapted(on=False)
    target_loss(model, tokens(), tokens().roll(-1, 1)).backward()
    for block in model.transformer.h[1:]:
        assert block.attn.adapter_wte.weight.grad.abs().max() == 0
        assert block.attn.gating_factor.grad.abs().min() > 0


def test_blocks_below_the_first_changed_one_build_no_graph():
    model = adapted(start_layer=2)
    seen = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    model(tokens())
    assert seen == [False, False, True]


def test_a_sample_after_training_uses_the_new_prompts():
    model = adapted()
    prompt = [1, 2, 3]
    list(generate(model, prompt, 4, stop=set()))
    for block in model.transformer.h[1:]:
        torch.nn.init.normal_(block.attn.adapter_wte.weight, std=5.0)
    answer = list(generate(model, prompt, 4, stop=set()))
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert ids[3:] == answer


def test_equals_pefts_adaption_prompt_on_smollm2_shapes():
    from peft import AdaptionPromptConfig, get_peft_model

    config = LLaMAConfig.from_name("smollm2-135m", n_layer=4, vocab_size=512)
    torch.manual_seed(0)
    model = LLaMA(config).init_weights(0.05)
    theirs = transformers_model(model)
    model.requires_grad_(False)
    add_adapter(model, prompt_length=10, start_layer=1, gate="layer")
    peft_config = AdaptionPromptConfig(
        adapter_len=10, adapter_layers=3, target_modules="self_attn", task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(theirs, peft_config).eval()
    for block, layer in zip(model.transformer.h[1:], theirs.base_model.model.model.layers[1:], strict=True):
        torch.nn.init.normal_(block.attn.gating_factor)
        with torch.no_grad():
            layer.self_attn.adaption_gate.copy_(block.attn.gating_factor.flatten())
            layer.self_attn.adaption_prompt.copy_(block.attn.adapter_wte.weight[None])
    idx = torch.randint(0, 512, (2, 40))
    with torch.no_grad():
        ours = model(idx)
        torch.testing.assert_close(ours, theirs(idx).logits, atol=1e-4, rtol=1e-4)
        for block in model.transformer.h[1:]:
            block.attn.gating_factor.zero_()
        assert (model(idx) - ours).abs().max() > 0.01
