"""The finetuning methods: one file each, one function each that adds the method to a frozen model.

features, which changes no model, stands beside them in methods/features.py.
"""

from collections.abc import Callable

from lit_llama.methods.adapter import add_adapter
from lit_llama.methods.adapter_v2 import add_adapter_v2
from lit_llama.methods.full import add_full
from lit_llama.methods.houlsby import add_houlsby
from lit_llama.methods.lora import add_lora
from lit_llama.methods.output_layers import add_output_layers
from lit_llama.methods.prefix import add_prefix
from lit_llama.methods.soft_prompt import add_soft_prompt

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
