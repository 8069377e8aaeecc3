"""Export whole models as GGUF files for llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from lit_llama.checkpoint import tensor_shapes
from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write, check_new
from lit_llama.data.prompts import BOS_LINE, SPACED_BOS_LINE
from lit_llama.devices.launch import Bar
from lit_llama.formats.export import checked_config, exported_template, exported_tensors
from lit_llama.formats.gguf_vocabulary import vocabulary_fields
from lit_llama.formats.layouts import CONFIG_NAMES
from lit_llama.model import LLaMAConfig, rope_frequencies
from lit_llama.tokenizer import Tokenizer

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def export_gguf(checkpoint_dir: Path, out_file: Path, type: str = "f16", prompt_style: str | None = None) -> None:
    """Write a model and its tokenizer to one file: matrices in one of TYPES, vectors in float32.

    The chat template is that of ``prompt_style``, else of training (finetune/full.py), else the tokenizer's.
    """
    check_new(out_file)
    config, (quantization, file_type) = checked_config(checkpoint_dir), TYPES[type]
    writer = GGUFWriter(None, "llama")
    add_config(writer, config, file_type)
    template = exported_template(checkpoint_dir, Tokenizer(checkpoint_dir), prompt_style)
    if template:  # llama.cpp puts a space there itself
        template = template.replace(SPACED_BOS_LINE, BOS_LINE)
    add_fields(writer, vocabulary_fields(checkpoint_dir, config.vocab_size, template))
    # The file begins with a table of its tensors. They are read twice, so that only one is in memory at a time.
    for name, tensor in gguf_tensors(checkpoint_dir, config):
        stored = stored_type(tensor, quantization)
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        nbytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), nbytes, stored)
    with atomic_write(out_file) as temporary, closing(writer):
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = len(tensor_shapes(config)) + 2 * config.n_layer  # q, k and v apart
        for name, tensor in Bar(total, "exporting", iterable=gguf_tensors(checkpoint_dir, config)):
            stored = stored_type(tensor, quantization)
            if stored == GGMLQuantizationType.F16 and tensor.abs().max() > np.finfo(np.float16).max:
                raise UserError(f"{name} holds {tensor.abs().max():.3g}, more than float16 can; pass --type f32")
            writer.write_tensor_data(gguf.quantize(tensor.float().numpy(), stored))


def stored_type(tensor: Tensor, quantization: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type a tensor is stored in: llama.cpp wants vectors in float32, and rows of whole blocks."""
    if tensor.dim() == 1:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[quantization]
    return quantization if tensor.size(1) % block == 0 else GGMLQuantizationType.F16


def gguf_tensors(checkpoint_dir: Path, config: LLaMAConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors with GGUF's names. Llama 3's scaling becomes a divisor for each rotary pair's frequency, (hs/2,)."""
    if len(config.rope_scaling or ()) > 1:
        yield "rope_freqs.weight", rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)
    yield from exported_tensors(checkpoint_dir, config, "gguf", interleaved=True)


def add_config(writer: GGUFWriter, config: LLaMAConfig, file_type: LlamaFileType) -> None:
    writer.add_name(config.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for ours, _, key in CONFIG_NAMES:
        add = writer.add_float32 if ours in ("norm_eps", "rope_base") else writer.add_uint32
        add(f"llama.{key}", getattr(config, ours))
    if config.rope_scaling is not None and set(config.rope_scaling) == {"factor"}:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)


def add_fields(writer: GGUFWriter, fields: dict) -> None:
    add: dict[type, Callable] = {bool: writer.add_bool, int: writer.add_uint32}
    add |= {str: writer.add_string, list: writer.add_array}
    for name, value in fields.items():
        add[type(value)](f"tokenizer.{name}", value)
