"""Every method: gradients, decoding, saving and counts, its paper's formula, and PEFT's implementation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CASES,
    SCALING,
    TINY,
    check_cached_decoding,
    every_case,
    greedy,
    logits_of,
    naive_attention,
    shake,
    tiny_model,
    to_samples,
    tokens,
    train_steps,
    tuned,
)

from lit_llama.common.errors import UserError
from lit_llama.data.batches import IGNORE
from lit_llama.generate.decode import generate_batch, label_probabilities, text_vectors
from lit_llama.generate.stream import generate
from lit_llama.methods import prefix, soft_prompt
from lit_llama.methods.adapter import start_from_text
from lit_llama.methods.lora import TARGETS, target_layers
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA, LLaMAConfig, apply_rope
from lit_llama.train.loss import target_loss
from lit_llama.trained import trainable_parameters

EQUAL_AT_FIRST = [name for name in CASES if not name.startswith(("soft", "prefix"))]
OVER_INT8 = [name for name in CASES if name != "full"]  # which trains what int8 rounds
SHAPES = [dict(), dict(n_kv_head=6, bias=True), dict(tie_embeddings=True, rope_scaling=SCALING)]

over_int8_too = pytest.mark.parametrize(
    ("case", "kind"), [*((case, "none") for case in CASES), *((case, "int8") for case in OVER_INT8)]
)


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "method", "arguments", "expected"),
    [
        ("7B", "output_layers", dict(n_blocks=2), 131_072_000 + 4_096 + 404_766_720),
        ("7B", "soft_prompt", dict(prompt_length=20), 81_920),
        ("7B", "prefix", dict(prompt_length=10), 2_621_440),
        ("7B", "prefix", dict(prompt_length=10, mlp_size=512), 136_618_496),
        ("7B", "houlsby", dict(bottleneck_size=64), 33_820_672 + 266_240),
        ("7B", "adapter", dict(), 1_229_760),
        ("7B", "adapter_v2", dict(), 4_279_744),
        ("7B", "adapter_v2", dict(scale_head=False), 4_215_744),
        ("7B", "lora", dict(), 4_194_304),
        ("7B", "lora", dict(targets=TARGETS), 19_988_480),
        ("smollm2-135m", "adapter", dict(), 161_532),
        ("smollm2-135m", "prefix", dict(), 115_200),
        ("smollm2-135m", "lora", dict(), 460_800),
    ],
)
def test_number_of_trainable_parameters(name, method, arguments, expected):
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.from_name(name)).requires_grad_(False)
        METHODS[method](model, **arguments)
    assert sum(tensor.numel() for tensor in trainable_parameters(model).values()) == expected


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("case", EQUAL_AT_FIRST)
def test_the_model_is_the_base_exactly_before_training(case, changes):
    with torch.no_grad():
        assert torch.equal(tuned(case, on=False, **changes)(tokens()), tiny_model(**changes)(tokens()))


@over_int8_too
def test_three_steps_change_every_trained_tensor_and_nothing_of_the_frozen_base(case, kind):
    base = tiny_model(tie_embeddings=True)
    model = tuned(case, on=False, quantize=kind, tie_embeddings=True)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    assert base.state_dict().keys() <= before.keys()
    trained = set(trainable_parameters(model)) | ({"lm_head.weight"} if case == "full" else set())  # the embedding's
    losses = train_steps(model, steps=3)
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


@every_case
def test_gradients_by_finite_differences(case):
    model, samples = tuned(case).double().eval(), to_samples(tokens(1, 5), tokens(1, 5).roll(-1, 1))
    target_loss(model, samples).backward()
    generator = torch.Generator().manual_seed(5)
    for name, tensor in trainable_parameters(model).items():
        direction, losses = torch.randn(tensor.shape, generator=generator, dtype=torch.double), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                tensor += step * direction
                losses.append(target_loss(model, samples).item())
            tensor += 1e-6 * direction
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx((tensor.grad * direction).sum().item(), rel=1e-4, abs=1e-6), name


@every_case
def test_padding_is_not_computed_and_changes_nothing(case):
    """Texts of 11, 4 and 7 tokens in one row: the same loss and gradients as padded, 22 tokens in the MLP, not 33."""
    model, lengths, found, seen = tuned(case).double(), [11, 4, 7], [], []
    model.transformer.h[0].mlp.c_proj.register_forward_hook(lambda _, x, __: seen.append(x[0][..., 0].numel()))
    ids = tokens(3)
    targets = ids.roll(-1, 1)
    for row, length in enumerate(lengths):
        targets[row, length:] = IGNORE
    for told in (None, lengths):
        loss = target_loss(model, to_samples(ids, targets, told))
        found.append([loss, *torch.autograd.grad(loss, list(trainable_parameters(model).values()))])
    torch.testing.assert_close(found[1], found[0])
    virtual = 3 * len(model.virtual_ids)
    assert seen == [33 + virtual, 22 + virtual]


@pytest.mark.parametrize("changes", SHAPES)
@over_int8_too
def test_cached_decoding_equals_uncached(case, kind, changes):
    check_cached_decoding(tuned(case, quantize=kind, **changes).eval().double())


@every_case
def test_answers_are_the_argmax_of_the_full_forward_before_and_after_training(case):
    model, prompts = tuned(case), [[5, 7, 9, 4, 4, 2], [3], [8, 1, 6]]
    for _ in range(2):
        answers = [list(generate(model.eval(), prompt, 5, stop=set())) for prompt in prompts]
        target_loss(model, to_samples(tokens(1, 9), tokens(1, 9))).backward()  # generation leaves no inference tensors
        expected = [greedy(model, prompt, 5) for prompt in prompts]
        assert answers == generate_batch(model, prompts, 5, stop=set()) == expected
        assert all(tensor.grad.abs().sum() > 0 for tensor in trainable_parameters(model).values())
        shake(model)


@every_case
def test_trained_tensors_are_float32_over_a_bfloat16_base(case):
    model = tuned(case, dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in trainable_parameters(model).values())
    assert logits_of(model, tokens()).dtype == torch.bfloat16
    assert len(list(generate(model, [1, 2, 3], 4, stop=set()))) == 4
    assert train_steps(model, steps=1)[0] > 0


BOUNDS = [  # the least and the most for a tiny model with 3 layers, a width of 48 and a context of 64
    ("adapter", "prompt_length", 1, 64),
    ("adapter", "start_layer", 0, 2),
    ("adapter", "gate_init", -100, 100),
    ("houlsby", "bottleneck_size", 1, 192),
    ("lora", "r", 1, 48),
    ("lora", "alpha", 0.001, 10_000),
    ("lora", "dropout", 0, 0.99),
    ("lora", "start_layer", 0, 2),
    ("output_layers", "n_blocks", 0, 3),
    ("prefix", "prompt_length", 1, 63),
    ("prefix", "mlp_size", 0, 192),
    ("soft_prompt", "prompt_length", 1, 63),
]


@pytest.mark.parametrize(("method", "name", "low", "high"), BOUNDS)
def test_arguments_out_of_range_are_refused_before_anything_changes(method, name, low, high):
    for value in (low, high):
        METHODS[method](tiny_model().requires_grad_(False), **{name: value})
    model = tiny_model()
    modules = [type(module) for module in model.modules()]
    for value in (low - 1, high + 1, math.inf, math.nan):
        with pytest.raises(UserError, match=f"^{name} .* must be between {low} and {high}$"):
            METHODS[method](model, **{name: value})
    assert [type(module) for module in model.modules()] == modules


def test_unknown_words_are_refused():
    unknown = [("lora", "targets", ["w"]), ("adapter", "gate", "row"), ("adapter", "gate_activation", "?")]
    for method, name, value in unknown:
        with pytest.raises(UserError, match=f"^{name} .*must be"):
            METHODS[method](tiny_model(), **{name: value})


# LLaMA-Adapter


@pytest.mark.parametrize(("n_tokens", "rows"), [(23, [1, 6, 11, 16, 22]), (6, [1, 2, 3, 4, 5]), (3, [1, 2, 3, 4, 5])])
def test_prompts_start_as_what_their_block_reads_of_a_text(n_tokens, rows):
    """A text of fewer tokens than the prompt has rows is repeated: no two rows are alike."""
    base, model, ids = tiny_model(), tuned("adapter", on=False), tokens(1, n_tokens)[0].tolist()
    start_from_text(model, ids)
    assert torch.equal(model(tokens()), base(tokens()))
    read: list[torch.Tensor] = []
    for block in base.transformer.h[1:]:
        block.attn.register_forward_pre_hook(lambda attn, args: read.append(args[0][0]))
    base(torch.tensor([(ids * 2)[: max(n_tokens, 6)]]))
    for block, x in zip(model.transformer.h[1:], read, strict=True):
        prompt = block.attn.adapter_wte.weight
        assert torch.equal(prompt, x[rows]) and len(prompt.unique(dim=0)) == len(prompt)
        assert prompt.requires_grad and not block.attn._forward_pre_hooks


def test_a_prompt_as_long_as_the_context_starts_from_a_text_in_bfloat16():
    model = tiny_model().bfloat16().requires_grad_(False)
    METHODS["adapter"](model, prompt_length=TINY["block_size"])
    start_from_text(model, [5, 7, 9])
    prompt = model.transformer.h[2].attn.adapter_wte.weight
    assert prompt.dtype == torch.float32 and torch.equal(prompt, prompt.bfloat16().float())


def test_a_prefix_that_starts_from_a_text_is_that_text():
    base, model, K = tiny_model(), tuned("prefix", on=False), 4
    for n_tokens in (7, 3):
        ids = tokens(1, n_tokens)
        prefix.start_from_text(model, ids[0].tolist())
        read = torch.cat((ids, ids), 1)[:, :K].expand(2, -1)
        torch.testing.assert_close(model(tokens()), base(torch.cat((read, tokens()), 1))[:, K:])
    check_cached_decoding(model.double())
    assert all(block.attn.prefix.requires_grad for block in model.transformer.h)


def rotated_qkv(attn: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    q, k, v = attn.qkv(x)
    return [apply_rope(q, cos, sin), apply_rope(k, cos, sin), v]


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [({}, {}), (dict(n_kv_head=6), {}), ({}, dict(gate="layer")), ({}, dict(gate_activation="tanh"))],
)
def test_adapter_is_the_papers_formula(changes, arguments):
    model = tiny_model(**changes).requires_grad_(False)
    METHODS["adapter"](model, prompt_length=5, start_layer=1, **arguments)
    attn = model.transformer.h[1].attn
    torch.nn.init.normal_(attn.gating_factor)
    x, rope = torch.randn(1, 7, TINY["n_embd"]), model.rope(torch.arange(7))
    gate = attn.gating_factor.tanh() if "gate_activation" in arguments else attn.gating_factor
    with torch.no_grad():
        q, k, v = rotated_qkv(attn, x, *rope)
        _, prompt_k, prompt_v = attn.qkv(attn.adapter_wte.weight[None])  # the prompt's keys are not rotated
        y = naive_attention(q, k, v, is_causal=True) + gate * naive_attention(q, prompt_k, prompt_v)
        expected = attn.c_proj(y.transpose(1, 2).flatten(2))
        close(attn(x, *rope), expected)
        attn.gating_factor.zero_()
        assert (attn(x, *rope) - expected).abs().max() > 0.05  # the prompt was really in it


# The other papers' formulas


def test_lora_is_the_product_added_to_the_matrix():
    model, merged = tuned("lora on all").eval(), tiny_model()
    for block, plain in zip(model.transformer.h, merged.transformer.h, strict=True):
        for name, (layer, rows) in target_layers(plain).items():
            pair = target_layers(block)[name][0].lora[name]
            with torch.no_grad():
                layer.weight[rows] += 5.0 / 3 * pair.B @ pair.A
    with torch.no_grad():
        close(model(tokens()), merged(tokens()), 1e-4)
        assert (model(tokens()) - tiny_model()(tokens())).abs().max() > 0.1


def test_lora_drops_out_in_training_alone():
    model = tiny_model().requires_grad_(False)
    METHODS["lora"](model, dropout=0.5)
    shake(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()), model(tokens()))
        assert not torch.equal(model.train()(tokens()), model(tokens()))


def test_houlsby_is_the_papers_formula():
    def bottleneck(layer, z):
        down, up = layer.houlsby.down, layer.houlsby.up
        return z + F.gelu(z @ down.weight.T + down.bias) @ up.weight.T + up.bias

    model, plain = tuned("houlsby"), tiny_model()
    cos, sin = model.rope(torch.arange(11))
    with torch.no_grad():
        x = model.transformer.wte(tokens())
        for block, base in zip(model.transformer.h, plain.transformer.h, strict=True):
            x = x + bottleneck(block.attn, base.attn(block.rms_1(x), cos, sin))
            x = x + bottleneck(block.mlp, base.mlp(block.rms_2(x)))
        close(model(tokens()), model.lm_head(model.transformer.ln_f(x)))


def test_adapter_v2_scales_and_shifts_every_linear_layer_also_for_the_prompts():
    model = tuned("adapter_v2")
    expected = copy.deepcopy(model)

    def formula(layer, args, _):
        x, W, s, b = args[0], layer.weight, layer.scale_bias.scale, layer.scale_bias.bias
        return s * (torch.einsum("...i,oi->...o", x, W) + b)

    for layer in [layer for layer in expected.modules() if isinstance(layer, torch.nn.Linear)]:
        layer.register_forward_hook(formula)  # in place of what the method returns
    with torch.no_grad():
        close(model(tokens()), expected(tokens()))


@pytest.mark.parametrize("n_kv_head", [2, 6])
def test_prefix_is_the_papers_formula(n_kv_head):
    model = tuned("prefix", n_kv_head=n_kv_head)
    attn, x, rope = model.transformer.h[1].attn, torch.randn(1, 7, TINY["n_embd"]), model.rope(torch.arange(7))
    base_cos, base_sin = tiny_model(n_kv_head=n_kv_head).rope(torch.arange(11))
    assert torch.equal(rope[0], base_cos[4:]) and torch.equal(rope[1], base_sin[4:])  # the text starts at position K
    with torch.no_grad():
        q, k, v = rotated_qkv(attn, x, *rope)
        keys, values = (torch.cat((own[None], text), 2) for own, text in zip(attn.prefix, (k, v), strict=True))
        y = naive_attention(q, keys, values, torch.ones(7, 11, dtype=torch.bool).tril(4))
        close(attn(x, *rope), attn.c_proj(y.transpose(1, 2).flatten(2)))


def test_the_mlp_of_prefix_tuning_is_the_papers_formula():
    model = tuned("prefix by an MLP")
    mlp = model.reparametrization
    P = (mlp.embedding.weight @ mlp.down.weight.T + mlp.down.bias).tanh() @ mlp.up.weight.T + mlp.up.bias
    expected = P.view(4, TINY["n_layer"], 2, TINY["n_kv_head"], TINY["head_size"])  # K, N, keys and values, nkv, hs
    model(tokens())
    for i, block in enumerate(model.transformer.h):
        torch.testing.assert_close(block.attn.prefix, expected[:, i].permute(1, 2, 0, 3))


def test_soft_prompt_is_the_papers_formula():
    model, plain = tuned("soft_prompt", tie_embeddings=True), tiny_model(tie_embeddings=True)
    cos, sin = plain.rope(torch.arange(15))
    with torch.no_grad():
        x = torch.cat((model.transformer.wte.soft_prompt.expand(2, -1, -1), plain.transformer.wte(tokens())), 1)
        for block in plain.transformer.h:
            x = block(x, cos, sin)
        expected = plain.lm_head(plain.transformer.ln_f(x))[:, 4:]
        close(logits_of(model, tokens()), expected)
        loss = F.cross_entropy(expected.flatten(0, 1), tokens().roll(-1, 1).flatten(), reduction="sum")
        torch.testing.assert_close(target_loss(model, to_samples(tokens(), tokens().roll(-1, 1))), loss)


def test_soft_prompt_starts_from_a_text_or_from_the_vocabulary():
    model = tiny_model().bfloat16()
    METHODS["soft_prompt"](model, prompt_length=5)
    prompt, weight = model.transformer.wte.soft_prompt, model.transformer.wte.weight
    assert all((weight == row).all(1).any() for row in prompt) and prompt.dtype == torch.float32
    soft_prompt.start_from_text(model, [7, 9])
    assert torch.equal(prompt, weight[[7, 9, 7, 9, 7]].float())
    soft_prompt.start_normal(model)
    assert 0.7 < prompt.std() / weight.float().std() < 1.4 and prompt.requires_grad


@pytest.mark.parametrize("method", ["full", "output_layers"])
def test_a_classifiers_head_learns_labels_from_the_last_token(method):
    model = tiny_model(tie_embeddings=True).requires_grad_(False)
    METHODS[method](model, labels=["yes", "no", "perhaps"])
    assert model(tokens()).shape == (2, 11, 3) and model(tokens()).abs().max() == 0
    embedding = model.transformer.wte.weight.clone()
    targets = torch.full((2, 11), IGNORE)
    targets[:, -1] = torch.tensor([2, 0])
    train_steps(model, 20, targets)
    assert label_probabilities(model, tokens().tolist()).argmax(-1).tolist() == [2, 0]
    assert torch.equal(model.transformer.wte.weight, embedding) == (method == "output_layers")


def test_the_vectors_of_texts_are_those_of_each_text_alone():
    model, texts = tiny_model(), [[1, 2, 3, 4], [5], [6, 7]]
    together = torch.from_numpy(text_vectors(model, texts))
    for vector, text in zip(together, texts, strict=True):
        torch.testing.assert_close(vector, model.hidden_states(torch.tensor([text]))[0, -1].detach())
