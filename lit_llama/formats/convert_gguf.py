"""Convert GGUF files of LLaMA models, in every quantization type that the gguf package dequantizes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from lit_llama.common.errors import UserError
from lit_llama.common.files import whole_folder
from lit_llama.configs import LLAMA_31_SCALING, LLAMA_32_SCALING
from lit_llama.formats.convert import write_model
from lit_llama.formats.gguf_tokenizer import write_gguf_tokenizer
from lit_llama.formats.layouts import CONFIG_NAMES
from lit_llama.model import LLaMAConfig, rope_frequencies


def convert_gguf(source: Path, out_dir: Path, name: str | None = None, dtype: str | None = None) -> LLaMAConfig:
    """Convert a .gguf file of a LLaMA, with its tokenizer. Its tensors become float32 if ``dtype`` is None."""
    with whole_folder(out_dir) as folder:
        reader = open_gguf(source)
        config = gguf_config(reader, source, name or source.stem)
        write_gguf_tokenizer(reader, folder)
        write_model(folder, config, gguf_tensors(reader), "gguf", dtype)
    return config


def open_gguf(path: Path) -> GGUFReader:
    """Map the file into memory. Raises UserError unless it is one complete GGUF file of a LLaMA."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        reader = GGUFReader(path)
        architecture, parts = field(reader, "general.architecture"), field(reader, "split.count", 1)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} is not a complete GGUF file: {error}") from None
    if architecture != "llama":
        raise UserError(f"{path} holds a model of architecture {architecture!r}; only 'llama' is supported")
    if parts > 1:
        raise UserError(f"{path} is one of {parts} parts; join them with llama-gguf-split --merge first")
    if reader.byte_order != "I":
        raise UserError(f"{path} has another byte order than this machine; use a file made for it")
    return reader


def field(reader: GGUFReader, key: str, default: object = None) -> Any:
    """A value of the header. Raises KeyError if it is missing and there is no default."""
    found = reader.fields.get(key)
    if found is None and default is None:
        raise KeyError(f"its header lacks {key}")
    return default if found is None else found.contents()


def gguf_config(reader: GGUFReader, path: Path, name: str) -> LLaMAConfig:
    """Read the header. Raises UserError for a setting that the model here does not have."""
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    if (scaling := field(reader, "llama.rope.scaling.type", "none")) not in ("none", "linear"):
        raise UserError(f"{path}: rope scaling {scaling!r} is not supported")
    try:
        n_head, n_embd = field(reader, "llama.attention.head_count"), field(reader, "llama.embedding_length")
        head_size = field(reader, "llama.attention.key_length", n_embd // n_head)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if field(reader, key, head_size) != head_size:
                raise ValueError(f"{key} {field(reader, key)} differs from the head size {head_size}")
        defaults = {"head_size": head_size, "n_kv_head": n_head, "rope_base": 10000.0, "vocab_size": 0}
        values = {ours: field(reader, f"llama.{key}", defaults.get(ours)) for ours, _, key in CONFIG_NAMES}
        values["vocab_size"] = shapes["token_embd.weight"][0]  # the header may lack it
        values |= {key: shortest(values[key]) for key in ("norm_eps", "rope_base")}
        config = LLaMAConfig(name=name, tie_embeddings="output.weight" not in shapes, **values)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {str(error).strip(chr(34))}") from None
    return replace(config, rope_scaling=gguf_rope_scaling(reader, config, path))


def shortest(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747378752e-06 was 1e-5 before the file rounded it."""
    return float(str(np.float32(value)))


def gguf_rope_scaling(reader: GGUFReader, config: LLaMAConfig, path: Path) -> dict | None:
    """Llama 3's scaling, stored as a divisor for the frequency of each rotary pair, (hs/2,), or a linear one."""
    if field(reader, "llama.rope.scaling.type", "none") == "linear":
        return {"factor": shortest(field(reader, "llama.rope.scaling.factor"))}
    stored = [tensor for name, tensor in gguf_tensors(reader, only="rope_freqs.weight")]
    if not stored:
        return None
    for scaling in (LLAMA_31_SCALING, LLAMA_32_SCALING):
        divisors = rope_frequencies(config) / rope_frequencies(replace(config, rope_scaling=scaling))
        if stored[0].shape == divisors.shape and torch.allclose(stored[0], divisors, rtol=1e-4):
            return dict(scaling)
    raise UserError(f"{path}: rope_freqs.weight fits neither Llama 3.1's scaling (factor 8) nor 3.2's (factor 32)")


def gguf_tensors(reader: GGUFReader, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """All tensors, or the one named ``only``, dequantized to float32 one by one."""
    for tensor in reader.tensors:
        if only not in (None, tensor.name):
            continue
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"tensor {tensor.name}: {error}") from None
        yield tensor.name, torch.from_numpy(np.require(array, np.float32, ["C", "W"]))  # copies read-only arrays
