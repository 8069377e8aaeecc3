"""Export whole models as Hugging Face folders. GGUF files: gguf.py.

At most one shard of the output is in memory.
"""

from pathlib import Path

from lit_llama.base import refuse_trained
from lit_llama.checkpoint import CONFIG_FILE, load_model, tensor_shapes
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json, whole_folder, write_json
from lit_llama.data.prompts import stop_ids, trained_template, write_chat_template
from lit_llama.formats.convert import DTYPES, NamedTensors
from lit_llama.formats.gguf_tokenizer import named_id, sentencepiece_fields, write_tokenizer
from lit_llama.formats.layouts import CONFIG_NAMES, INTERLEAVED, layer_names, to_interleaved
from lit_llama.formats.shards import write_shards
from lit_llama.model import LLaMA, LLaMAConfig
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


def load_whole(folder: Path, prompt_style: str | None) -> tuple[LLaMA, Tokenizer, str | None]:
    """The model of a checkpoint folder, mapped into memory; its tokenizer; and the chat template to write.

    The template is that of ``prompt_style``, else of training (finetune/full.py); None is the tokenizer's own. Raises
    UserError for a trained folder.
    """
    refuse_trained(folder)
    method, tokenizer = base_method(folder), Tokenizer(folder)
    template = trained_template(method, tokenizer, prompt_style) if prompt_style or method else None
    return load_model(folder, dtype=None), tokenizer, template


def exported_tensors(model: LLaMA, target_format: str) -> NamedTensors:
    """The tensors with the names of ``target_format`` (one of FORMATS), with q, k and v apart.

    Raises UserError for a head with a bias, unless it is zero.
    """
    config, tensors = model.config, model.state_dict()
    names, slices = layer_names("ours", target_format, config.n_layer), model.transformer.h[0].attn.qkv_slices
    for name in sorted(tensor_shapes(config)):
        tensor, (layer, _, kind) = tensors[name], name.rpartition(".")
        if name == "lm_head.bias":
            if tensor.any():
                raise UserError(
                    f"{config.name} has a bias on its head, which no other project's LLaMA has; train with "
                    "finetune/adapter_v2.py --scale_head false"
                )
        elif not layer.endswith("attn.c_attn"):
            yield f"{names[layer]}.{kind}", tensor
        else:
            for part, rows in slices.items():
                weight = tensor[rows]
                if part != "v" and target_format in INTERLEAVED:
                    weight = to_interleaved(weight, config.head_size)
                yield f"{names[layer.replace('c_attn', part)]}.{kind}", weight


def export_hf(checkpoint_dir: Path, out_dir: Path, dtype: str | None = None, prompt_style: str | None = None) -> None:
    """Write a folder that transformers' Auto classes load. ``dtype`` None keeps each tensor's."""
    model, tokenizer, template = load_whole(checkpoint_dir, prompt_style)
    widest = max((tensor.dtype for tensor in model.state_dict().values()), key=lambda dtype: dtype.itemsize)
    stored = dtype or str(widest).removeprefix("torch.")
    tensors = exported_tensors(model, "hf")
    with whole_folder(out_dir) as folder:
        cast = ((name, tensor.to(DTYPES[dtype]) if dtype else tensor) for name, tensor in tensors)
        write_shards(folder, cast, foreign=True)
        ids = export_tokenizer(checkpoint_dir, folder, model.config, tokenizer, template)
        write_json(folder / CONFIG_FILE, {**llama_config(model.config), **ids, "torch_dtype": stored, "dtype": stored})


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


def export_tokenizer(
    source: Path, folder: Path, config: LLaMAConfig, tokenizer: Tokenizer, template: str | None
) -> dict:
    """Copy a tokenizer, and write the settings that transformers needs. Returns the special ids for config.json."""
    copy_tokenizer(source, folder)
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
    bos_id = named_id(tokenizer, "bos")
    write_json(path, generation | {"bos_token_id": bos_id, "eos_token_id": sorted(eos_ids)})
    return {"bos_token_id": bos_id, "eos_token_id": tokenizer.eos_id}
