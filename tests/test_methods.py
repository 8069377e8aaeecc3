"""Every method: gradients, decoding, counts; and formulas and PEFT of all but LLaMA-Adapter (test_adapter.py)."""

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
    equal_to,
    every_case,
    logits_of,
    shake,
    tiny_model,
    tokens,
    train_steps,
    transformers_model,
    tuned,
)

from lit_llama.common.files import save_tensors
from lit_llama.data.batches import IGNORE
from lit_llama.generate.decode import generate, generate_batch, label_probabilities, text_vectors
from lit_llama.methods.lora import TARGETS, places
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA, LLaMAConfig, apply_rope
from lit_llama.train.loss import target_loss
from lit_llama.trained import kept_tensors, load_trained, trained_tensors

IDENTITY = [name for name in CASES if not name.startswith(("soft", "prefix"))]
SHAPES = [dict(), dict(n_kv_head=6, bias=True), dict(tie_embeddings=True, rope_scaling=SCALING)]


def count(name: str, method: str, **arguments) -> int:
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.from_name(name))
        model.requires_grad_(False)
        METHODS[method](model, **arguments)
    return sum(tensor.numel() for tensor in trained_tensors(model).values())


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("full", dict(), 6_738_415_616),
        ("output_layers", dict(n_blocks=0), 131_072_000 + 4_096),
        ("output_layers", dict(n_blocks=2), 131_072_000 + 4_096 + 404_766_720),
        ("soft_prompt", dict(prompt_length=20), 81_920),
        ("prefix", dict(prompt_length=10), 2_621_440),
        ("prefix", dict(prompt_length=30), 7_864_320),
        ("prefix", dict(prompt_length=10, mlp_size=512), 136_618_496),
        ("houlsby", dict(bottleneck_size=64), 33_820_672 + 266_240),
        ("adapter", dict(), 1_229_760),
        ("adapter_v2", dict(), 4_279_744),
        ("adapter_v2", dict(scale_head=False), 4_215_744),
        ("lora", dict(), 4_194_304),
        ("lora", dict(targets=TARGETS), 19_988_480),
    ],
)
def test_count_of_trained_numbers_of_7b(method, arguments, expected):
    assert count("7B", method, **arguments) == expected


@pytest.mark.parametrize(
    ("name", "adapter", "prefix", "lora"),
    [
        ("tiny-llama-1.1b", 410_240, 112_640, 1_126_400),
        ("smollm2-135m", 161_532, 115_200, 460_800),
        ("Llama-3.2-1B", 287_168, 163_840, 851_968),
    ],
)
def test_count_of_trained_numbers_of_smaller_models(name, adapter, prefix, lora):
    assert [count(name, method) for method in ("adapter", "prefix", "lora")] == [adapter, prefix, lora]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("case", IDENTITY)
def test_is_the_base_exactly_at_init(case, changes):
    with torch.no_grad():
        assert torch.equal(tuned(case, on=False, **changes)(tokens()), tiny_model(**changes)(tokens()))


@every_case
def test_base_keys_and_bytes_are_kept(case):
    base, model = tiny_model(tie_embeddings=True), tuned(case, on=False, tie_embeddings=True)
    assert base.state_dict().keys() <= model.state_dict().keys()
    trained = set(trained_tensors(model))
    if case == "full":
        trained.add("lm_head.weight")  # the embedding's
    train_steps(model, steps=3)
    for name, tensor in base.state_dict().items():
        assert name in trained or torch.equal(model.state_dict()[name], tensor), name


def test_what_trains_of_the_base():
    def of_the_base(case):
        return {name for name in trained_tensors(tuned(case, tie_embeddings=True)) if name in base}

    base = tiny_model().state_dict()
    norms = {name for name in base if "rms_" in name or "ln_f" in name}
    last = {name for name in base if name.startswith("transformer.h.2.")}
    assert of_the_base("full") == set(base) - {"lm_head.weight"}
    assert of_the_base("output_layers") == last | {"transformer.ln_f.weight", "lm_head.weight"}
    assert of_the_base("houlsby") == of_the_base("adapter_v2") == norms
    assert not any(of_the_base(case) for case in ("soft_prompt", "prefix", "prefix by an MLP", "adapter", "lora"))


@every_case
def test_every_trained_tensor_moves_within_three_steps(case):
    model = tuned(case, on=False)
    before = {name: tensor.detach().clone() for name, tensor in trained_tensors(model).items()}
    losses = train_steps(model, steps=3)
    for name, tensor in trained_tensors(model).items():
        assert not torch.equal(tensor, before[name]), name
    assert losses[-1] < losses[0]


@every_case
def test_gradients_by_finite_differences(case):
    model = tuned(case).double().eval()
    ids, targets = tokens(1, 5), tokens(1, 5).roll(-1, 1)
    target_loss(model, ids, targets).backward()
    generator = torch.Generator().manual_seed(5)
    for name, tensor in trained_tensors(model).items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.double)
        losses = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                tensor += step * direction
                losses.append(target_loss(model, ids, targets).item())
            tensor += 1e-6 * direction
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx((tensor.grad * direction).sum().item(), rel=1e-4, abs=1e-6), name


@every_case
def test_padding_is_not_computed_and_changes_nothing(case):
    """Rows of 11, 4 and 7 tokens: the same loss and gradients as padded, and 22 tokens in the MLP instead of 33."""
    model, lengths, found, seen = tuned(case).double(), [11, 4, 7], [], []
    model.transformer.h[0].mlp.c_proj.register_forward_hook(lambda _, x, __: seen.append(x[0][..., 0].numel()))
    ids = tokens(3)
    targets = ids.roll(-1, 1)
    for row, length in enumerate(lengths):
        targets[row, length:] = IGNORE
    for told in (None, lengths):
        loss = target_loss(model, ids, targets, told)
        found.append([loss, *torch.autograd.grad(loss, list(trained_tensors(model).values()))])
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded)
    virtual = 3 * len(model.virtual_ids)
    assert seen == [33 + virtual, 22 + virtual]


@pytest.mark.parametrize("changes", SHAPES)
@every_case
def test_cached_decoding_equals_uncached(case, changes):
    check_cached_decoding(tuned(case, **changes).eval().double())


@every_case
def test_answers_are_those_of_the_full_forward_alone_and_in_a_batch(case):
    model, prompts = tuned(case), [[5, 7, 9, 4, 4, 2], [3], [8, 1, 6]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(5):
                ids.append(int(logits_of(model.eval(), torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert [list(generate(model, prompt, 5, stop=set())) for prompt in prompts] == expected
    assert generate_batch(model, prompts, 5, stop=set()) == expected


@every_case
def test_gradient_still_flows_after_a_sample_and_a_validation(case):
    model = tuned(case)
    list(generate(model, [1, 2, 3], 4, stop=set()))
    with torch.no_grad():
        target_loss(model, tokens(), tokens().roll(-1, 1))
    for _ in range(2):
        target_loss(model, tokens(), tokens().roll(-1, 1)).backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in trained_tensors(model).values())


@every_case
def test_save_and_load_give_equal_logits(case, tmp_path):
    trained = tuned(case)
    save_tensors(tmp_path / "trained.safetensors", kept_tensors(trained))
    loaded = tuned(case, on=False)
    if loaded.reparametrization is not None:
        loaded.reparametrization.flatten(loaded)
    load_trained(loaded, tmp_path / "trained.safetensors")
    with torch.no_grad():
        assert torch.equal(logits_of(loaded.eval(), tokens()), logits_of(trained.eval(), tokens()))


@every_case
def test_trained_tensors_are_float32_over_a_bfloat16_base(case):
    method, arguments = CASES[case]
    model = tiny_model().to(torch.bfloat16)
    model.requires_grad_(False)
    METHODS[method](model, **arguments)
    assert all(tensor.dtype == torch.float32 for tensor in trained_tensors(model).values())
    shake(model)
    assert logits_of(model, tokens()).dtype == torch.bfloat16
    assert len(list(generate(model, [1, 2, 3], 4, stop=set()))) == 4
    assert train_steps(model, steps=1)[0] > 0


def test_blocks_below_the_first_changed_one_build_no_graph():
    seen = []
    model = tuned("output_layers")
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    model(tokens())
    assert seen == [False, False, True]


# ---------------------------------------------------------------------------------------------- formulas


def test_lora_is_the_product_added_to_the_matrix():
    model, merged = tuned("lora on all").eval(), tiny_model()
    for block, plain in zip(model.transformer.h, merged.transformer.h, strict=True):
        for name, (layer, rows) in places(plain).items():
            pair = places(block)[name][0].lora[name]
            with torch.no_grad():
                layer.weight[rows] += 5.0 / 3 * pair.B @ pair.A
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), merged(tokens()), atol=1e-4, rtol=1e-4)
        assert (model(tokens()) - tiny_model()(tokens())).abs().max() > 0.1


def test_lora_drops_out_in_training_alone():
    model = tiny_model()
    model.requires_grad_(False)
    METHODS["lora"](model, dropout=0.5)
    shake(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()), model(tokens()))
        assert not torch.equal(model.train()(tokens()), model(tokens()))


def test_houlsby_is_the_papers_formula():
    def bottleneck(layer, z):
        down, up = layer.houlsby.down, layer.houlsby.up
        return z + F.gelu(z @ down.weight.T + down.bias) @ up.weight.T + up.bias

    model = tuned("houlsby")
    plain = tiny_model()
    cos, sin = model.rope(torch.arange(11))
    with torch.no_grad():
        x = model.transformer.wte(tokens())
        for block, base in zip(model.transformer.h, plain.transformer.h, strict=True):
            x = x + bottleneck(block.attn, base.attn(block.rms_1(x), cos, sin))
            x = x + bottleneck(block.mlp, base.mlp(block.rms_2(x)))
        expected = model.lm_head(model.transformer.ln_f(x))
        torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=1e-5)


class WrittenOut(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.weight, self.scale, self.bias = layer.weight, layer.scale_bias.scale, layer.scale_bias.bias
        self.in_features = layer.in_features

    def forward(self, x):
        return self.scale * (torch.einsum("...i,oi->...o", x, self.weight) + self.bias)


def test_adapter_v2_scales_and_shifts_every_linear_layer_also_for_the_prompts():
    model = tuned("adapter_v2")
    expected = copy.deepcopy(model)
    for block in expected.transformer.h:
        for owner, names in ((block.attn, ("c_attn", "c_proj")), (block.mlp, ("c_fc1", "c_fc2", "c_proj"))):
            for name in names:
                setattr(owner, name, WrittenOut(getattr(owner, name)))
    expected.lm_head = WrittenOut(expected.lm_head)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), expected(tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_kv_head", [2, 6])
def test_prefix_is_the_papers_formula(n_kv_head):
    model = tuned("prefix", n_kv_head=n_kv_head)
    attn, K, hs = model.transformer.h[1].attn, 4, TINY["head_size"]
    x = torch.randn(1, 7, TINY["n_embd"])
    cos, sin = model.rope(torch.arange(7))
    base_cos, base_sin = tiny_model(n_kv_head=n_kv_head).rope(torch.arange(11))
    assert torch.equal(cos, base_cos[4:]) and torch.equal(sin, base_sin[4:])  # the text starts at position K
    with torch.no_grad():
        q, k, v = attn.qkv(x)
        q, k = apply_rope(q, cos, sin)[0], apply_rope(k, cos, sin)[0]
        out = torch.zeros(7, attn.n_head * hs)
        for h in range(attn.n_head):
            g = h // (attn.n_head // n_kv_head)
            keys, values = torch.cat((attn.prefix[0, g], k[g])), torch.cat((attn.prefix[1, g], v[0, g]))
            for t in range(7):
                seen = slice(0, K + t + 1)
                weights = (keys[seen] @ q[h, t] / math.sqrt(hs)).softmax(0)
                out[t, h * hs : (h + 1) * hs] = weights @ values[seen]
        torch.testing.assert_close(attn(x, cos, sin)[0], attn.c_proj(out), atol=1e-5, rtol=1e-5)


def test_the_mlp_of_prefix_tuning_is_the_papers_formula():
    model = tuned("prefix by an MLP")
    mlp = model.reparametrization
    P = (mlp.embedding.weight @ mlp.down.weight.T + mlp.down.bias).tanh() @ mlp.up.weight.T + mlp.up.bias
    expected = P.view(4, TINY["n_layer"], 2, TINY["n_kv_head"], TINY["head_size"])  # K, N, keys and values, nkv, hs
    model(tokens())
    for i, block in enumerate(model.transformer.h):
        torch.testing.assert_close(block.attn.prefix, expected[:, i].permute(1, 2, 0, 3))


def test_soft_prompt_is_the_papers_formula():
    model = tuned("soft_prompt", tie_embeddings=True)
    plain, wte = tiny_model(tie_embeddings=True), model.transformer.wte
    cos, sin = plain.rope(torch.arange(15))
    with torch.no_grad():
        x = torch.cat((wte.soft_prompt.expand(2, -1, -1), plain.transformer.wte(tokens())), 1)
        for block in plain.transformer.h:
            x = block(x, cos, sin)
        expected = plain.lm_head(plain.transformer.ln_f(x))[:, 4:]
        torch.testing.assert_close(logits_of(model, tokens()), expected, atol=1e-5, rtol=1e-5)
        loss = F.cross_entropy(expected.flatten(0, 1), tokens().roll(-1, 1).flatten(), reduction="sum")
        torch.testing.assert_close(target_loss(model, tokens(), tokens().roll(-1, 1)), loss)


def test_soft_prompt_starts_from_a_text_or_from_the_vocabulary():
    model = tiny_model()
    METHODS["soft_prompt"](model, prompt_length=5, init_ids=[7, 9])
    wte = model.transformer.wte
    assert torch.equal(wte.soft_prompt, wte.weight[[7, 9, 7, 9, 7]])
    model = tiny_model()
    METHODS["soft_prompt"](model, prompt_length=5)
    wte = model.transformer.wte
    assert all((wte.weight == row).all(1).any() for row in wte.soft_prompt)


@pytest.mark.parametrize("method", ["full", "output_layers"])
def test_a_classifiers_head_learns_labels_from_the_last_token(method):
    model = tiny_model(tie_embeddings=True)
    model.requires_grad_(False)
    METHODS[method](model, labels=["yes", "no", "perhaps"])
    assert model(tokens()).shape == (2, 11, 3) and model(tokens()).abs().max() == 0
    embedding = model.transformer.wte.weight.clone()
    targets = torch.full((2, 11), -100)
    targets[:, -1] = torch.tensor([2, 0])
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=0.01)
    for _ in range(20):
        target_loss(model, tokens(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert label_probabilities(model, tokens().tolist()).argmax(-1).tolist() == [2, 0]
    assert torch.equal(model.transformer.wte.weight, embedding) == (method == "output_layers")


def test_the_vectors_of_texts_are_those_of_each_text_alone():
    model, texts = tiny_model(), [[1, 2, 3, 4], [5], [6, 7]]
    together = torch.from_numpy(text_vectors(model, texts))
    for vector, text in zip(together, texts, strict=True):
        torch.testing.assert_close(vector, model.hidden_states(torch.tensor([text]))[0, -1].detach())


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("lora", dict(targets=("w",))), ("adapter", dict(gate="row")), ("adapter", dict(gate_activation="relu"))],
)
def test_unknown_words_are_refused(method, arguments):
    """Numbers out of range: test_ranges.py."""
    with pytest.raises(ValueError, match="row|relu|w"):
        METHODS[method](tiny_model(), **arguments)


# ---------------------------------------------------------------------------------------------- PEFT


def test_lora_equals_peft():
    from peft import LoraConfig, get_peft_model

    model = tuned("lora")
    config = LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(transformers_model(tiny_model()), config)
    with torch.no_grad():
        for block, layer in zip(model.transformer.h, theirs.base_model.model.model.layers, strict=True):
            for name, low_rank in block.attn.c_attn.lora.items():
                projection = getattr(layer.self_attn, f"{name}_proj")
                projection.lora_A["default"].weight.copy_(low_rank.A)
                projection.lora_B["default"].weight.copy_(low_rank.B)
    equal_to(theirs, model)


def test_prefix_equals_peft():
    from peft import PrefixTuningConfig, get_peft_model

    model = tuned("prefix")
    config = PrefixTuningConfig(
        num_virtual_tokens=4,
        num_layers=TINY["n_layer"],
        num_attention_heads=TINY["n_kv_head"],
        token_dim=TINY["n_kv_head"] * TINY["head_size"],
        num_transformer_submodules=1,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(transformers_model(tiny_model()), config)
    rows = torch.stack([block.attn.prefix for block in model.transformer.h])  # (N, 2, nkv, K, hs)
    with torch.no_grad():
        weight = theirs.prompt_encoder["default"].embedding.weight
        weight.copy_(rows.permute(3, 0, 1, 2, 4).reshape(weight.shape))
    equal_to(theirs, model)


def test_soft_prompt_equals_pefts_prompt_tuning():
    from peft import PromptTuningConfig, get_peft_model

    model = tuned("soft_prompt")
    config = PromptTuningConfig(num_virtual_tokens=4, token_dim=TINY["n_embd"], task_type="CAUSAL_LM")
    theirs = get_peft_model(transformers_model(tiny_model()), config)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(model.transformer.wte.soft_prompt)
    equal_to(theirs, model, drop=4)
