"""This project's checkpoints -> Hugging Face folders (GGUF: export_gguf.py): convert.py the other way round.

A tensor is read, renamed, and written before the next one: what is in memory is one shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    check_tensors,
    load_config,
    tensor_shapes,
    weight_files,
    write_shards,
)
from lit_llama.cli import UserError
from lit_llama.common.files import open_tensors, read_json, whole_folder, write_json
from lit_llama.data.prompts import choose_style, stop_ids, write_chat_template
from lit_llama.formats.convert import DTYPES
from lit_llama.formats.gguf_tokenizer import write_tokenizer
from lit_llama.formats.gguf_vocabulary import sentencepiece_fields
from lit_llama.formats.layouts import layer_names, to_interleaved
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
from lit_llama.trained import METHOD_FILE, read_method


def whole_model(checkpoint_dir: Path) -> LLaMAConfig:
    """The config of a folder that holds a whole model; UserError for a trained folder that needs a base."""
    folder = Path(checkpoint_dir)
    if (folder / METHOD_FILE).exists() and not (folder / MODEL_FILE).exists():
        raise UserError(
            f"{folder} holds what {read_method(folder)['method']} learned, not a whole model: scripts/merge_lora.py "
            "merges lora and adapter_v2 into their base; scripts/export.py --to peft writes an adapter over it"
        )
    if not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"{folder} holds no model; give a base, what finetune/full.py wrote, or what scripts/merge_lora.py wrote"
        )
    config, found = load_config(folder), {}
    for path in weight_files(folder):
        with open_tensors(path) as file:
            found.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})
    check_tensors(found, tensor_shapes(config), folder)
    return config


def exported_tensors(
    checkpoint_dir: Path, config: LLaMAConfig, target_format: str, interleaved: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint under the names of one of layouts.FORMATS, q, k and v apart.

    ``interleaved``: the rows of q and k are reordered so. The head's bias is left out where it is zero, for no other
    project's LLaMA has one; UserError where it is not.
    """
    names = layer_names("ours", target_format, config.n_layer)
    with torch.device("meta"):
        slices = CausalSelfAttention(config).qkv_slices
    for name, tensor in stored_tensors(checkpoint_dir):
        layer, _, kind = name.rpartition(".")
        if name == "lm_head.bias":
            if tensor.any():
                raise UserError(
                    f"{checkpoint_dir} has a bias on its head, which no other project's LLaMA has; train with "
                    "finetune/adapter_v2.py --scale_head false"
                )
        elif not layer.endswith("attn.c_attn"):
            yield f"{names[layer]}.{kind}", tensor
        else:
            for part, rows in slices.items():
                piece = tensor[rows]
                if interleaved and part != "v":
                    piece = to_interleaved(piece, len(piece) // config.head_size)
                yield f"{names[layer.replace('c_attn', part)]}.{kind}", piece


def stored_tensors(checkpoint_dir: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weight_files(checkpoint_dir):
        with open_tensors(path) as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())


def export_hf(checkpoint_dir: Path, out_dir: Path, dtype: str | None = None, prompt_style: str | None = None) -> None:
    """A whole model -> a folder that transformers' Auto classes load; ``dtype`` None: as it is stored.

    The chat template becomes that of ``prompt_style``, or of the style that the folder was trained with (full); of
    other folders the tokenizer's own is kept.
    """
    source, config = Path(checkpoint_dir), whole_model(checkpoint_dir)
    tokenizer, style, written = Tokenizer(source), trained_style(source, prompt_style), set()

    def cast() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in exported_tensors(source, config, "hf", interleaved=False):
            tensor = tensor if dtype is None else tensor.to(DTYPES[dtype])
            written.add(tensor.dtype)
            yield name, tensor

    with whole_folder(Path(out_dir)) as folder:
        write_shards(folder, cast(), foreign=True)
        copy_tokenizer(source, folder)
        special = complete_tokenizer(folder, config, tokenizer, style)
        stored = str(max(written, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
        write_json(folder / CONFIG_FILE, {**llama_config(config), **special, "torch_dtype": stored, "dtype": stored})


def trained_style(folder: Path, prompt_style: str | None) -> str | None:
    """``prompt_style`` or, where it is None, what a folder's method.json says; None where nothing says it."""
    if prompt_style is None and (Path(folder) / METHOD_FILE).exists():
        return read_method(folder)["prompt_style"]
    return prompt_style


def llama_config(config: LLaMAConfig) -> dict:
    """LlamaForCausalLM's config.json; its rotary parameters as transformers 5 reads them, and as those before did."""
    scaling = None if config.rope_scaling is None else {"rope_type": "llama3", **config.rope_scaling}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_base, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
    }


def complete_tokenizer(folder: Path, config: LLaMAConfig, tokenizer: Tokenizer, style: str | None) -> dict:
    """Write what transformers wants to know beside the tokenizer's own file; returns the special ids of config.json."""
    settings = read_settings(folder)
    if not (folder / JSON_FILE).exists():  # transformers reads tokenizer.model only where protobuf is installed
        write_tokenizer(sentencepiece_fields(folder / SENTENCEPIECE_FILE), folder)
        settings |= read_settings(folder)
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    defaults |= {"eos_token": tokenizer.token(tokenizer.eos_id), "clean_up_tokenization_spaces": False}
    if tokenizer.bos_id is not None:
        defaults["bos_token"] = tokenizer.token(tokenizer.bos_id)
    write_json(folder / SETTINGS_FILE, defaults | settings)
    write_chat_template(folder, tokenizer, style)

    path = folder / GENERATION_FILE
    generation = read_json(path) if path.exists() else {}
    ends = stop_ids(choose_style(style, tokenizer), tokenizer)
    said = generation.get("eos_token_id", [])
    ends |= set(said if isinstance(said, list) else [said])
    bos_id = tokenizer.named_id("bos") if tokenizer.bos_id is None else tokenizer.bos_id
    write_json(path, generation | {"bos_token_id": bos_id, "eos_token_id": sorted(ends)})
    return {"bos_token_id": bos_id, "eos_token_id": tokenizer.eos_id}
