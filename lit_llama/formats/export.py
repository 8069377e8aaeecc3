"""Export whole models as Hugging Face folders. GGUF files: export_gguf.py.

At most one shard of the output is in memory.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.base import refuse_trained
from lit_llama.checkpoint import CONFIG_FILE, check_headers, load_config, weight_files
from lit_llama.common.errors import UserError
from lit_llama.common.files import open_tensors, read_json, whole_folder, write_json
from lit_llama.data.prompts import stop_ids, trained_template, write_chat_template
from lit_llama.formats.convert import DTYPES
from lit_llama.formats.gguf_tokenizer import write_tokenizer
from lit_llama.formats.gguf_vocabulary import sentencepiece_fields
from lit_llama.formats.layouts import CONFIG_NAMES, layer_names, to_interleaved
from lit_llama.formats.shards import write_shards
from lit_llama.model import CausalSelfAttention, LLaMAConfig
from lit_llama.tokenizer import (
    GENERATION_FILE,
    JSON_FILE,
    SENTENCEPIECE_FILE,
    SETTINGS_FILE,
    Tokenizer,
    copy_tokenizer,
    read_settings,
)
from lit_llama.trained import base_method


def checked_config(folder: Path) -> LLaMAConfig:
    """The config of a checkpoint folder. Raises UserError for a trained folder, and if the tensors do not fit."""
    refuse_trained(folder)
    config = load_config(folder)
    check_headers(config, weight_files(folder), folder)
    return config


def exported_tensors(
    folder: Path, config: LLaMAConfig, target_format: str, interleaved: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors with the names of ``target_format`` (one of FORMATS), with q, k and v apart.

    ``interleaved`` says how to order the rows of q and k. Raises UserError for a head with a bias, unless it is zero.
    """
    names = layer_names("ours", target_format, config.n_layer)
    with torch.device("meta"):
        slices = CausalSelfAttention(config).qkv_slices
    for name, tensor in stored_tensors(folder):
        layer, _, kind = name.rpartition(".")
        if name == "lm_head.bias":
            if tensor.any():
                raise UserError(
                    f"{folder} has a bias on its head, which no other project's LLaMA has; train with "
                    "finetune/adapter_v2.py --scale_head false"
                )
        elif not layer.endswith("attn.c_attn"):
            yield f"{names[layer]}.{kind}", tensor
        else:
            for part, rows in slices.items():
                weight = tensor[rows]
                if interleaved and part != "v":
                    weight = to_interleaved(weight, len(weight) // config.head_size)
                yield f"{names[layer.replace('c_attn', part)]}.{kind}", weight


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weight_files(folder):
        with open_tensors(path) as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())


def export_hf(checkpoint_dir: Path, out_dir: Path, dtype: str | None = None, prompt_style: str | None = None) -> None:
    """Write a folder that transformers' Auto classes load. ``dtype`` None keeps each tensor's.

    The chat template is that of ``prompt_style``, else of training (finetune/full.py), else the tokenizer's.
    """
    config, tokenizer, dtypes = checked_config(checkpoint_dir), Tokenizer(checkpoint_dir), set()
    template = exported_template(checkpoint_dir, tokenizer, prompt_style)

    def cast() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in exported_tensors(checkpoint_dir, config, "hf", interleaved=False):
            tensor = tensor.to(DTYPES.get(dtype or "", tensor.dtype))
            dtypes.add(tensor.dtype)
            yield name, tensor

    with whole_folder(out_dir) as folder:
        write_shards(folder, cast(), foreign=True)
        copy_tokenizer(checkpoint_dir, folder)
        special = complete_tokenizer(folder, config, tokenizer, template)
        stored = str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
        write_json(folder / CONFIG_FILE, {**llama_config(config), **special, "torch_dtype": stored, "dtype": stored})


def exported_template(checkpoint_dir: Path, tokenizer: Tokenizer, prompt_style: str | None) -> str | None:
    """The chat template of a style, or of a whole model's training; None for that of its tokenizer."""
    method = base_method(checkpoint_dir)
    return trained_template(method, tokenizer, prompt_style) if prompt_style or method else None


def llama_config(config: LLaMAConfig) -> dict:
    """LlamaForCausalLM's config.json, with rotary parameters for transformers 5 and for earlier versions."""
    scaling = config.rope_scaling
    if scaling is not None:
        scaling = {"rope_type": "linear" if set(scaling) == {"factor"} else "llama3", **scaling}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **{theirs: getattr(config, ours) for ours, theirs, _ in CONFIG_NAMES},
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_base, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
    }


def complete_tokenizer(folder: Path, config: LLaMAConfig, tokenizer: Tokenizer, template: str | None) -> dict:
    """Write the tokenizer's settings that transformers needs. Returns the special ids for config.json."""
    settings = read_settings(folder)
    if not (folder / JSON_FILE).exists():  # transformers reads tokenizer.model only where protobuf is installed
        write_tokenizer(sentencepiece_fields(folder / SENTENCEPIECE_FILE), folder, settings.get("legacy", True))
        settings |= read_settings(folder)
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    defaults |= {"eos_token": tokenizer.token(tokenizer.eos_id), "clean_up_tokenization_spaces": False}
    if tokenizer.bos_id is not None:
        defaults["bos_token"] = tokenizer.token(tokenizer.bos_id)
    write_json(folder / SETTINGS_FILE, defaults | settings)
    if template:
        write_chat_template(folder, template)

    path = folder / GENERATION_FILE
    generation = read_json(path) if path.exists() else {}
    eos_ids = stop_ids(template, tokenizer) if template else tokenizer.eos_ids
    bos_id = tokenizer.named_id("bos") if tokenizer.bos_id is None else tokenizer.bos_id
    write_json(path, generation | {"bos_token_id": bos_id, "eos_token_id": sorted(eos_ids)})
    return {"bos_token_id": bos_id, "eos_token_id": tokenizer.eos_id}
