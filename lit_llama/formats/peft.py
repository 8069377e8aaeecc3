"""Trained folders of adapter, prefix, soft_prompt and lora <-> the adapter folders of Hugging Face PEFT.

An adapter folder holds adapter_config.json and adapter_model.safetensors
(https://huggingface.co/docs/peft/developer_guides/checkpoint), and often the tokenizer with the chat template of
training, which PEFT itself says nothing about. These four compute the same in both projects:

    adapter      ADAPTION_PROMPT   model.layers.{i}.self_attn.adaption_prompt (1, K, C), .adaption_gate (1,)
    prefix       PREFIX_TUNING     prompt_embeddings (K, N * 2 * nkv * hs): keys, then values of each block
    soft_prompt  PROMPT_TUNING     prompt_embeddings (K, C)
    lora         LORA              model.layers.{i}.self_attn.q_proj.lora_A.weight (r, in), .lora_B.weight (out, r)

What one of the two cannot express is refused. Tensors are float32 in a trained folder and in what is exported.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from lit_llama import __version__
from lit_llama.checkpoint import check_tensors, load_config
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import read_json, read_tensors, save_tensors, whole_folder, write_json
from lit_llama.data.chat_templates import style_of
from lit_llama.data.prompts import choose_style
from lit_llama.formats.export import complete_tokenizer
from lit_llama.formats.layouts import layer_names
from lit_llama.methods.adapter import ACTIVATIONS
from lit_llama.methods.lora import TARGETS
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.settings import MOST_TOKENS
from lit_llama.tokenizer import Tokenizer, copy_tokenizer, read_chat_template
from lit_llama.trained import (
    METHOD_FILE,
    TRAINED_FILE,
    check_base,
    check_recipe,
    describe_base,
    kept_tensors,
    read_method,
)

Tensors = dict[str, Tensor]
SETTINGS_FILE, WEIGHTS_FILE, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
WRAPPED = "base_model.model."  # how PEFT's names of what lies inside the model begin
PROMPT = "prompt_embeddings"

WHY_NOT = {
    "adapter_v2": "PEFT's ADAPTION_PROMPT has no scales, biases and norms that train",
    "houlsby": "PEFT has no bottleneck adapters",
    "output_layers": "it changes the base's own weights; PEFT would have to store them whole",
    "full": "it is a whole model: scripts/export.py --to hf",
    "features": "its classifier stands behind the model",
}


def export_peft(
    trained_dir: Path, out_dir: Path, checkpoint_dir: Path | None = None, base_model: str | None = None
) -> None:
    """A trained folder -> an adapter folder ``out_dir`` that PEFT loads over the same base in transformers.

    Beside it lies the tokenizer, with the chat template of the style that was trained.
    ``checkpoint_dir``: the base, where it moved. ``base_model``: its name in adapter_config.json, a hub id or a folder.
    """
    method, path = read_method(trained_dir), Path(trained_dir) / METHOD_FILE
    name, arguments = method["method"], method["arguments"]
    if name not in TO_PEFT:
        raise UserError(f"{trained_dir} was trained with {name}: {WHY_NOT.get(name, 'unknown here')}")
    base_dir = check_base(method["base"], checkpoint_dir, path)
    config = load_config(base_dir)
    tensors, written = read_tensors(Path(trained_dir) / TRAINED_FILE)
    check_recipe(method, written, path)
    check_tensors(shapes(tensors), kept_shapes(config, name, arguments), Path(trained_dir) / TRAINED_FILE)
    settings, tensors = TO_PEFT[name](config, arguments, tensors)
    about = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    with whole_folder(Path(out_dir)) as folder:
        save_tensors(folder / WEIGHTS_FILE, tensors, foreign=True)
        write_json(folder / SETTINGS_FILE, {**settings, **about})
        copy_tokenizer(base_dir, folder)
        complete_tokenizer(folder, config, Tokenizer(base_dir), method["prompt_style"])


def import_peft(
    source: Path, checkpoint_dir: Path, out_dir: Path, prompt_style: str | None = None, max_seq_length: int = 512
) -> None:
    """An adapter folder of PEFT -> a trained folder ``out_dir`` over the base in ``checkpoint_dir``.

    The prompt style defaults to that of the adapter folder's chat template, if it is one of ours, else to what the
    base's tokenizer tells; the longest sequence to a finetune script's own. Raises UserError for a type or a setting
    that the method here does not have, and for tensors that are not the base's.
    """
    source, config = Path(source), load_config(checkpoint_dir)
    check_range("--max_seq_length", max_seq_length, 1, MOST_TOKENS)
    settings = read_json(source / SETTINGS_FILE)
    check_settings(settings, source / SETTINGS_FILE)
    if (source / PICKLE).exists() and not (source / WEIGHTS_FILE).exists():
        raise UserError(
            f"{source / PICKLE} is a pickle, which is not opened here: load it with PEFT where you trust it, and "
            f"save_pretrained writes {WEIGHTS_FILE}"
        )
    stored, _ = read_tensors(source / WEIGHTS_FILE, foreign=True)
    given = {name: tensor.float() for name, tensor in stored.items()}
    try:
        method, arguments, tensors = FROM_PEFT[settings["peft_type"]](config, settings, given)
        expected = kept_shapes(config, method, arguments)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{source} lacks {error}") from None
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # a text where a number belongs, ...
        reason = str(error).split("\n")[0]
        raise UserError(f"{source / SETTINGS_FILE} does not fit {settings['peft_type']}: {reason}") from None
    check_tensors(shapes(tensors), expected, source / WEIGHTS_FILE)
    style = prompt_style or style_of(read_chat_template(source))
    description = {
        "method": method,
        "arguments": arguments,
        "trained_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "base": describe_base(checkpoint_dir),
        "prompt_style": choose_style(style, Tokenizer(checkpoint_dir)),
        "train": {"max_seq_length": max_seq_length},
        "version": __version__,
    }
    with whole_folder(Path(out_dir)) as folder:
        save_tensors(folder / TRAINED_FILE, tensors)
        write_json(folder / METHOD_FILE, description)


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def kept_shapes(config: LLaMAConfig, method: str, arguments: dict) -> dict[str, tuple[int, ...]]:
    """What a trained folder of the method holds over a base of this config."""
    with torch.device("meta"):
        model = LLaMA(config).requires_grad_(False)
        METHODS[method](model, **arguments)
        return shapes(kept_tensors(model))


# ---------------------------------------------------------------------------------------------- adapter_config.json

# They name things, say how training began, or are read below. Any other has to be off: a later PEFT may add more.
ANY_TYPE = {"peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"}
PROMPT_SIZES = {"num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"}
KNOWN = {
    "ADAPTION_PROMPT": {"target_modules", "adapter_len", "adapter_layers"},
    "PREFIX_TUNING": PROMPT_SIZES | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    "PROMPT_TUNING": PROMPT_SIZES | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"},
    "LORA": {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "init_lora_weights"}
    | {"layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"},
}
OFF: tuple = (None, False, "none", [], {})
PLAIN_STARTS = (True, False, "gaussian")  # "pissa" and others change the base's weights before training


def check_settings(settings: dict, path: Path) -> None:
    """UserError for what changes the numbers in a way that the methods here do not have."""
    kind = settings.get("peft_type")
    if kind not in KNOWN:
        raise UserError(f"{path}: peft_type {kind!r} is none of {', '.join(KNOWN)}")
    known = KNOWN[kind] | ANY_TYPE | {"inference_mode", "tokenizer_kwargs"}
    foreign = [f"{key} {value!r}" for key, value in settings.items() if key not in known and value not in OFF]
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        foreign.append(f"task_type {settings['task_type']!r}")
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        foreign.append(f"init_lora_weights {settings['init_lora_weights']!r}")
    if foreign:
        raise UserError(f"{path}: {', '.join(foreign)}: the method here has nothing that computes the same")


# ---------------------------------------------------------------------------------------------- adapter


def check_adapter_base(config: LLaMAConfig) -> None:
    """UserError for bases over which PEFT's ADAPTION_PROMPT does not compute LLaMA-Adapter."""
    if config.bias:
        raise UserError(f"{config.name} has biases, and PEFT's ADAPTION_PROMPT adds that of o_proj twice")
    if config.n_head * config.head_size != config.n_embd:
        raise UserError(
            f"{config.name} has {config.n_head} heads of {config.head_size} and n_embd {config.n_embd}; PEFT's "
            "ADAPTION_PROMPT needs their product to be n_embd"
        )


def adapter_names(i: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """The prompt's and the gate's name in block ``i``, ours and PEFT's."""
    ours, theirs = f"transformer.h.{i}.attn", f"{WRAPPED}model.layers.{i}.self_attn"
    prompt = f"{ours}.adapter_wte.weight", f"{theirs}.adaption_prompt"
    return prompt, (f"{ours}.gating_factor", f"{theirs}.adaption_gate")


def adapter_to_peft(config: LLaMAConfig, arguments: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    check_adapter_base(config)
    activation = ACTIVATIONS[arguments.get("gate_activation", "none")]()
    theirs: Tensors = {}
    for i in range(arguments["start_layer"], config.n_layer):
        (prompt, peft_prompt), (gate, peft_gate) = adapter_names(i)
        gates = activation(tensors[gate]).flatten()  # PEFT's gate is one number as it is multiplied: tanh is taken here
        if (gates != gates[0]).any():
            raise UserError(
                f"block {i} has gates from {gates.min():.3g} to {gates.max():.3g}, and PEFT has one for all its heads; "
                "train with finetune/adapter.py --gate layer"
            )
        theirs |= {peft_prompt: tensors[prompt][None], peft_gate: gates[:1]}
    layers = config.n_layer - arguments["start_layer"]
    settings = {"adapter_len": arguments["prompt_length"], "adapter_layers": layers, "target_modules": "self_attn"}
    return {"peft_type": "ADAPTION_PROMPT", **settings}, theirs


def adapter_from_peft(config: LLaMAConfig, settings: dict, tensors: Tensors) -> tuple[str, dict, Tensors]:
    check_adapter_base(config)
    ours, start_layer = dict(tensors), config.n_layer - settings["adapter_layers"]
    for i in range(max(start_layer, 0), config.n_layer):
        (prompt, peft_prompt), (gate, peft_gate) = adapter_names(i)
        ours[prompt], ours[gate] = ours.pop(peft_prompt).squeeze(0), ours.pop(peft_gate).view(-1, 1, 1)
    return "adapter", dict(prompt_length=settings["adapter_len"], start_layer=start_layer, gate="layer"), ours


# ---------------------------------------------------------------------------------------------- prefix, soft_prompt


def prompt_settings(config: LLaMAConfig, kind: str, K: int, heads: int, width: int) -> dict:
    sizes = {"num_virtual_tokens": K, "num_layers": config.n_layer, "num_attention_heads": heads, "token_dim": width}
    return {"peft_type": kind, **sizes, "num_transformer_submodules": 1}


def prefix_to_peft(config: LLaMAConfig, arguments: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    blocks = torch.stack([tensors[f"transformer.h.{i}.attn.prefix"] for i in range(config.n_layer)])
    rows = blocks.permute(3, 0, 1, 2, 4).flatten(1)  # (N, 2, nkv, K, hs) -> (K, N * 2 * nkv * hs)
    width = config.n_kv_head * config.head_size
    return prompt_settings(config, "PREFIX_TUNING", len(rows), config.n_kv_head, width), {PROMPT: rows}


def prefix_from_peft(config: LLaMAConfig, settings: dict, tensors: Tensors) -> tuple[str, dict, Tensors]:
    ours = dict(tensors)
    rows = ours.pop(PROMPT)
    width = 2 * config.n_layer * config.n_kv_head * config.head_size
    if rows.dim() != 2 or rows.size(1) != width:
        raise UserError(f"{PROMPT} has shape {tuple(rows.shape)}; over {config.name} a prefix has {width} columns")
    blocks = rows.view(-1, config.n_layer, 2, config.n_kv_head, config.head_size).permute(1, 2, 3, 0, 4)
    ours |= {f"transformer.h.{i}.attn.prefix": block for i, block in enumerate(blocks)}  # (2, nkv, K, hs)
    return "prefix", dict(prompt_length=settings["num_virtual_tokens"]), ours


def soft_prompt_to_peft(config: LLaMAConfig, arguments: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    (rows,) = tensors.values()
    return prompt_settings(config, "PROMPT_TUNING", len(rows), config.n_head, config.n_embd), {PROMPT: rows}


def soft_prompt_from_peft(config: LLaMAConfig, settings: dict, tensors: Tensors) -> tuple[str, dict, Tensors]:
    ours = dict(tensors)
    ours["transformer.wte.soft_prompt"] = ours.pop(PROMPT)
    return "soft_prompt", dict(prompt_length=settings["num_virtual_tokens"]), ours


# ---------------------------------------------------------------------------------------------- lora


def lora_names(config: LLaMAConfig, arguments: dict) -> dict[str, str]:
    """transformer.h.0.attn.c_attn.lora.q.A -> base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ..."""
    modules, names = layer_names("ours", "hf", config.n_layer), {}
    for name in kept_shapes(config, "lora", arguments):
        layer, _, pair = name.partition(".lora.")
        target, _, factor = pair.partition(".")
        names[name] = f"{WRAPPED}{modules[layer.replace('c_attn', target)]}.lora_{factor}.weight"
    return names


def lora_to_peft(config: LLaMAConfig, arguments: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    names = lora_names(config, arguments)
    settings = {
        "peft_type": "LORA",
        "r": arguments["r"],
        "lora_alpha": arguments["alpha"],
        "lora_dropout": arguments["dropout"],
        "target_modules": sorted({name.split(".")[-3] for name in names.values()}),
        "bias": "none",
    }
    if arguments.get("start_layer"):  # PEFT would add pairs to all blocks
        settings["layers_to_transform"] = list(range(arguments["start_layer"], config.n_layer))
    return settings, {names[name]: tensor for name, tensor in tensors.items()}


def lora_from_peft(config: LLaMAConfig, settings: dict, tensors: Tensors) -> tuple[str, dict, Tensors]:
    r, alpha = settings["r"], settings["lora_alpha"]
    if settings.get("use_rslora"):
        alpha *= math.sqrt(r)  # its scale is alpha / sqrt(r)
    arguments = dict(r=r, alpha=alpha, dropout=settings.get("lora_dropout", 0.0), targets=list(TARGETS))
    if (layers := settings.get("layers_to_transform")) not in (None, []):
        layers = [layers] if isinstance(layers, int) else sorted(layers)
        arguments["start_layer"] = config.n_layer - len(layers)
        if layers != list(range(arguments["start_layer"], config.n_layer)):
            raise UserError(f"layers_to_transform {layers}: LoRA here stands in the top blocks, up to the last one")
    ours = {theirs: name for name, theirs in lora_names(config, arguments).items()}
    if foreign := sorted(set(tensors) - set(ours)):
        modules = sorted({name.split(".")[-3] for name in ours})
        raise UserError(f"{foreign[0]} has no place over {config.name}: LoRA here stands beside {', '.join(modules)}")
    renamed = {ours[name]: tensor for name, tensor in tensors.items()}
    arguments["targets"] = [target for target in TARGETS if any(f".lora.{target}." in name for name in renamed)]
    return "lora", arguments, renamed


TO_PEFT = {
    "adapter": adapter_to_peft,
    "prefix": prefix_to_peft,
    "soft_prompt": soft_prompt_to_peft,
    "lora": lora_to_peft,
}
FROM_PEFT = {
    "ADAPTION_PROMPT": adapter_from_peft,
    "PREFIX_TUNING": prefix_from_peft,
    "PROMPT_TUNING": soft_prompt_from_peft,
    "LORA": lora_from_peft,
}
