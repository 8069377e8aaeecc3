"""The model against transformers' LlamaForCausalLM, parameter counts, and what it refuses."""

import pytest
import torch
from helpers import SCALING, TINY, tiny_model, transformers_model

from lit_llama.configs import CONFIGS
from lit_llama.model import LLaMA, LLaMAConfig, RMSNorm, rope_frequencies

GRID = {
    "heads = kv heads": dict(n_kv_head=6),
    "grouped": dict(),
    "multi-query": dict(n_kv_head=1),
    "odd sizes": dict(n_embd=39, n_head=3, n_kv_head=1, head_size=10, intermediate_size=53, vocab_size=101),
    "all others": dict(n_layer=1, tie_embeddings=True, rope_scaling=SCALING, rope_base=500000.0, norm_eps=1e-2),
}


@pytest.mark.parametrize("changes", GRID.values(), ids=GRID.keys())
def test_logits_equal_transformers(changes):
    model = tiny_model(**changes)
    for block in model.transformer.h:
        torch.nn.init.normal_(block.rms_1.weight, mean=1.0, std=0.3)
    idx = torch.randint(0, model.config.vocab_size, (3, 50))
    with torch.no_grad():
        torch.testing.assert_close(model(idx), transformers_model(model)(idx).logits, atol=1e-4, rtol=1e-4)


COUNTS = {  # of the released checkpoints, a tied head counted once
    "7B": 6_738_415_616,
    "13B": 13_015_864_320,
    "30B": 32_528_943_616,
    "65B": 65_285_660_672,
    "Llama-2-7b": 6_738_415_616,
    "Llama-2-13b": 13_015_864_320,
    "Llama-2-70b": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "tiny-llama-1.1b": 1_100_048_384,
    "open-llama-3b": 3_426_473_600,
    "open-llama-7b": 6_738_415_616,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_parameter_counts_of_the_released_models():
    assert set(COUNTS) == set(CONFIGS)
    for name, count in COUNTS.items():
        with torch.device("meta"):
            model = LLaMA(LLaMAConfig.from_name(name))
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("n_layer", [0, -1, 10**9, "3", 3.0, True], "n_layer must be a positive integer of a plausible size, got"),
        ("n_embd", [10**15], "n_embd must be .*, got 1000000000000000"),
        ("n_kv_head", [4], "n_head 6 is not a multiple of n_kv_head 4"),
        ("head_size", [7], "head_size must be even .*, got 7"),
        ("rope_scaling", [{"factor": 8, "low_freq_factor": 1}, {"type": "yarn"}], "rope_scaling needs exactly"),
    ],
)
def test_absurd_configs_are_refused(field, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message):
            LLaMAConfig(**{**TINY, field: value})


def test_rope_angles_are_float32_in_a_bfloat16_model():
    model = tiny_model().to(torch.bfloat16)
    model(torch.zeros(1, 60, dtype=torch.long))
    cos, sin = model.rope(torch.arange(60))
    angles = torch.arange(60.0)[:, None] * rope_frequencies(model.config)
    torch.testing.assert_close(cos, angles.cos().bfloat16())
    torch.testing.assert_close(sin, angles.sin().bfloat16())


def test_padding_is_finite_in_bfloat16():
    """On a CPU its softmax over nothing would be NaN, and no real token could ignore it."""
    model = tiny_model().bfloat16()
    model.set_kv_cache(2, 16)
    logits = model(torch.ones(2, 9, dtype=torch.long), torch.arange(9), pad=torch.tensor([4, 0]))
    assert logits.isfinite().all()


def test_norm_statistics_are_float32():
    norm = RMSNorm(512, 1e-6)
    x = (torch.randn(4, 512) * 300).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), exact, atol=0.02, rtol=2**-8)


def test_too_long_inputs_are_refused_with_the_numbers():
    model = tiny_model()
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="max_seq_length 65"):
        model.set_kv_cache(1, 65)
