"""Numbers have bounds, which are checked where they come in: before anything is allocated or written."""

import math

import pytest
from helpers import make_base

from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError
from lit_llama.methods.table import METHODS
from lit_llama.settings import TRAIN_RANGES, Sampling, TrainArgs

BOUNDED = {  # of a tiny model with 3 layers, a width of 32 and a context of 512: the least and the most
    "adapter": dict(prompt_length=(1, 512), start_layer=(0, 2), gate_init=(-100, 100)),
    "adapter_v2": dict(prompt_length=(1, 512), start_layer=(0, 2)),
    "houlsby": dict(bottleneck_size=(1, 128)),
    "lora": dict(r=(1, 32), alpha=(0.001, 10_000), dropout=(0, 0.99), start_layer=(0, 2)),
    "output_layers": dict(n_blocks=(0, 3)),
    "prefix": dict(prompt_length=(1, 511), mlp_size=(0, 128)),
    "soft_prompt": dict(prompt_length=(1, 511)),
}
CASES = [(method, name, *ends) for method, bounds in BOUNDED.items() for name, ends in bounds.items()]


def outside(low: float, high: float) -> list[float]:
    return [low - 1, high + 1, 10**12, 1e300, math.inf, -math.inf, math.nan]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("ranges") / "base")


@pytest.mark.parametrize("method, name, low, high", CASES)
def test_arguments_of_a_method(base, method, name, low, high):
    for value in (low, high):
        METHODS[method](load_model(base), **{name: value})
    for value in outside(low, high):
        model = load_model(base)
        modules = [type(module) for module in model.modules()]
        with pytest.raises(UserError, match=f"^{name} .* must lie within {low} and {high}$"):
            METHODS[method](model, **{name: value})
        assert [type(module) for module in model.modules()] == modules


@pytest.mark.parametrize("name", TRAIN_RANGES)
def test_settings_of_training(name):
    low, high = TRAIN_RANGES[name]
    for value in (low, high):
        TrainArgs(**{"max_steps": 1, name: value})
    for value in outside(low, high):
        with pytest.raises(UserError, match=f"^--train.{name} .* must lie within {low} and {high}$"):
            TrainArgs(**{"max_steps": 1, name: value})


@pytest.mark.parametrize("name, low, high", [("temperature", 0.001, 1000), ("top_k", 1, 10**9), ("top_p", 1e-6, 1)])
def test_settings_of_sampling(name, low, high):
    for value in (low, high):
        Sampling(**{"temperature": 1.0, name: value})
    for value in outside(low, high):
        with pytest.raises(UserError, match=f"{name}.* must lie within {low} and {high}$"):
            Sampling(**{"temperature": 1.0, name: value})
