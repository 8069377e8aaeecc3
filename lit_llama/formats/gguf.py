"""Convert GGUF files of LLaMA models, and export whole models as GGUF files for llama.cpp.

Every quantization type that the gguf package dequantizes is read.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, ReaderTensor
from torch import Tensor

from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write, check_new, whole_folder
from lit_llama.configs import LLAMA_31_SCALING, LLAMA_32_SCALING
from lit_llama.data.prompts import BOS_LINE, SPACED_BOS_LINE
from lit_llama.devices.launch import Bar
from lit_llama.formats.convert import NamedTensors, config_errors, write_model
from lit_llama.formats.export import exported_tensors, load_whole
from lit_llama.formats.gguf_tokenizer import vocabulary_fields, write_tokenizer
from lit_llama.formats.layouts import CONFIG_NAMES
from lit_llama.model import LLaMA, LLaMAConfig, rope_frequencies

FILE_TYPES = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}

# ---------------------------------------------------------------------------------------------- convert


def convert_gguf(source: Path, out_dir: Path, name: str | None = None, dtype: str | None = None) -> None:
    """Convert a .gguf file of a LLaMA, with its tokenizer. Its tensors become float32 if ``dtype`` is None."""
    with whole_folder(out_dir) as folder:
        header, stored = read_gguf(source)
        config = gguf_config(header, stored, source, name or source.stem)
        write_tokenizer({key.removeprefix("tokenizer."): value for key, value in header.items()}, folder)
        tensors = ((tensor.name, dequantized(tensor)) for tensor in stored.values())
        write_model(folder, config, tensors, "gguf", dtype)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, ReaderTensor]]:
    """Header, and tensors mapped into memory. Raises UserError unless it is one complete GGUF file of a LLaMA."""
    try:
        reader = GGUFReader(path)
        header = {key: field.contents() for key, field in reader.fields.items()}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} is not a complete GGUF file: {error}") from None
    if (parts := header.get("split.count", 1)) > 1:
        raise UserError(f"{path} is one of {parts} parts; join them with llama-gguf-split --merge first")
    if (architecture := header.get("general.architecture")) != "llama":
        raise UserError(f"{path} holds a model of architecture {architecture!r}; only 'llama' is supported")
    if reader.byte_order != "I":
        raise UserError(f"{path} has another byte order than this machine; use a file made for it")
    return header, {tensor.name: tensor for tensor in reader.tensors}


def gguf_config(header: dict[str, Any], stored: dict[str, ReaderTensor], path: Path, name: str) -> LLaMAConfig:
    """Raises UserError for a setting that the model here does not have."""
    given = {key.removeprefix("llama."): value for key, value in header.items()}
    with config_errors(path):
        n_head = given["attention.head_count"]
        head_size = given.setdefault("attention.key_length", given["embedding_length"] // n_head)
        for key in ("attention.value_length", "rope.dimension_count"):
            if given.get(key, head_size) != head_size:
                raise ValueError(f"{key} {given[key]} differs from the head size {head_size}")
        defaults = {"attention.head_count_kv": n_head, "rope.freq_base": 10000.0}
        given = defaults | given | {"vocab_size": int(stored["token_embd.weight"].shape[-1])}  # the header may lack it
        values = {ours: given[key] for ours, _, key in CONFIG_NAMES}
        values |= {key: shortest(values[key]) for key in ("norm_eps", "rope_base")}
        config = LLaMAConfig(name=name, tie_embeddings="output.weight" not in stored, **values)
        return replace(config, rope_scaling=rope_scaling(given, stored.get("rope_freqs.weight"), config))


def shortest(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747378752e-06 was 1e-5 before the file rounded it."""
    return float(str(np.float32(value)))


def rope_scaling(given: dict[str, Any], divisors: ReaderTensor | None, config: LLaMAConfig) -> dict | None:
    """Llama 3's scaling, stored as a divisor for the frequency of each rotary pair, (hs/2,), or a linear one."""
    kind = given.get("rope.scaling.type", "linear")  # llama.cpp's default
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear", 0.0))  # its key in old files
    if kind == "linear" and factor:
        return {"factor": shortest(factor)}
    if kind not in ("none", "linear"):
        raise ValueError(f"rope scaling {kind!r} is not supported")
    if divisors is None:
        return None
    found = dequantized(divisors)
    for scaling in (LLAMA_31_SCALING, LLAMA_32_SCALING):
        known = rope_frequencies(config) / rope_frequencies(replace(config, rope_scaling=scaling))
        if found.shape == known.shape and torch.allclose(found, known, rtol=1e-4):
            return dict(scaling)
    raise ValueError("rope_freqs.weight fits neither Llama 3.1's scaling (factor 8) nor 3.2's (factor 32)")


def dequantized(tensor: ReaderTensor) -> Tensor:
    """In float32."""
    try:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"tensor {tensor.name}: {error}") from None
    return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))  # copies read-only arrays


# ---------------------------------------------------------------------------------------------- export


def export_gguf(checkpoint_dir: Path, out_file: Path, type: str = "f16", prompt_style: str | None = None) -> None:
    """Write a model and its tokenizer to one file: matrices in one of FILE_TYPES, vectors in float32."""
    check_new(out_file)
    model, tokenizer, template = load_whole(checkpoint_dir, prompt_style)
    quantization = GGMLQuantizationType[type.upper()]
    writer = GGUFWriter(None, "llama")
    if template:  # llama.cpp puts a space there itself
        template = template.replace(SPACED_BOS_LINE, BOS_LINE)
    vocabulary = vocabulary_fields(checkpoint_dir, tokenizer, model.config.vocab_size, template)
    add_header(writer, model.config, FILE_TYPES[type], vocabulary)
    # The file begins with a table of its tensors. They are read twice, so that only one is in memory at a time.
    for name, tensor in gguf_tensors(model):
        stored = stored_type(tensor, quantization)
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        nbytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), nbytes, stored)
    with atomic_write(out_file) as temporary, closing(writer):
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in Bar(len(writer.tensors[0]), "exporting", iterable=gguf_tensors(model)):
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


def gguf_tensors(model: LLaMA) -> NamedTensors:
    """The tensors with GGUF's names. Llama 3's scaling becomes a divisor for each rotary pair's frequency, (hs/2,)."""
    config = model.config
    if len(config.rope_scaling or ()) > 1:
        yield "rope_freqs.weight", rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)
    yield from exported_tensors(model, "gguf")


def add_header(writer: GGUFWriter, config: LLaMAConfig, file_type: LlamaFileType, vocabulary: dict) -> None:
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
    add_field: dict = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in vocabulary.items():
        add_field[type(value)](f"tokenizer.{key}", value)
