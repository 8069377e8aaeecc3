"""All methods that change a model, by name. Each is one function that adds the method to a frozen model."""

from collections.abc import Callable
from typing import Any

import torch

from lit_llama.methods.adapter import add_adapter
from lit_llama.methods.adapter_v2 import add_adapter_v2
from lit_llama.methods.full import add_full
from lit_llama.methods.houlsby import add_houlsby
from lit_llama.methods.lora import add_lora
from lit_llama.methods.output_layers import add_output_layers
from lit_llama.methods.prefix import add_prefix
from lit_llama.methods.soft_prompt import add_soft_prompt
from lit_llama.model import LLaMA, LLaMAConfig

METHODS: dict[str, Callable[..., None]] = {
    "output_layers": add_output_layers,
    "full": add_full,
    "soft_prompt": add_soft_prompt,
    "prefix": add_prefix,
    "houlsby": add_houlsby,
    "adapter": add_adapter,
    "adapter_v2": add_adapter_v2,
    "lora": add_lora,
}


def weightless(config: LLaMAConfig, method: str = "", **arguments: Any) -> LLaMA:
    """A frozen model on the meta device, with a method if it changes the model. A pass computes only shapes."""
    with torch.device("meta"):
        model = LLaMA(config).requires_grad_(False)
        if method in METHODS:
            METHODS[method](model, **arguments)
    return model
