"""Convert trained folders of adapter, prefix, soft_prompt and lora to adapter folders of Hugging Face PEFT, and back.

An adapter folder holds adapter_config.json and adapter_model.safetensors
(https://huggingface.co/docs/peft/developer_guides/checkpoint), and often a tokenizer with the chat template of
training. These four methods compute the same in both projects:

    adapter      ADAPTION_PROMPT   model.layers.{i}.self_attn.adaption_prompt (1, K, C), .adaption_gate (1,)
    prefix       PREFIX_TUNING     prompt_embeddings (K, N * 2 * nkv * hs): keys, then values of each block
    soft_prompt  PROMPT_TUNING     prompt_embeddings (K, C)
    lora         LORA              model.layers.{i}.self_attn.q_proj.lora_A.weight (r, in), .lora_B.weight (out, r)

Settings that the other project lacks are refused. All tensors are float32.
"""

from pathlib import Path

import torch
from torch import Tensor

from lit_llama import __version__
from lit_llama.checkpoint import check_tensors, load_config
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import read_json, read_tensors, save_tensors, whole_folder, write_json
from lit_llama.data.prompts import choose_template, describe_template, end_of_answer, trained_template
from lit_llama.formats.convert import load_pth
from lit_llama.formats.export import complete_tokenizer
from lit_llama.formats.layouts import layer_names
from lit_llama.methods.adapter import ACTIVATIONS
from lit_llama.methods.lora import TARGETS
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.settings import MAX_TOKENS
from lit_llama.tokenizer import Tokenizer, copy_tokenizer, read_chat_template
from lit_llama.trained import (
    METHOD_FILE,
    TRAINED_FILE,
    check_base,
    check_header,
    describe_base,
    kept_tensors,
    read_method,
)

Tensors = dict[str, Tensor]
SETTINGS_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
WRAPPED = "base_model.model."  # PEFT's prefix for names inside the model
PROMPT = "prompt_embeddings"


def export_peft(
    trained_dir: Path, out_dir: Path, checkpoint_dir: Path | None = None, base_model: str | None = None
) -> None:
    """Write an adapter folder that PEFT loads over the same base in transformers, with the tokenizer of training.

    ``checkpoint_dir``: the base, if it moved. ``base_model``: its hub id or folder, for adapter_config.json.
    """
    method, path = read_method(trained_dir), trained_dir / METHOD_FILE
    name, arguments = method["method"], method["arguments"]
    if name not in TO_PEFT:
        raise UserError(
            f"{trained_dir} was trained with {name}, which PEFT lacks; it has {', '.join(TO_PEFT)}. "
            "For whole models, merged or from finetune/full.py: scripts/export.py --to hf"
        )
    base_dir = check_base(method["base"], checkpoint_dir, path)
    config = load_config(base_dir)
    tensors, about = read_tensors(trained_dir / TRAINED_FILE)
    check_header(method, about, path)
    check_tensors(shapes(tensors), kept_shapes(config, name, arguments), trained_dir / TRAINED_FILE)
    settings, tensors = TO_PEFT[name](config, arguments, tensors)
    settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    with whole_folder(out_dir) as folder:
        save_tensors(folder / WEIGHTS_FILE, tensors, foreign=True)
        write_json(folder / SETTINGS_FILE, settings)
        copy_tokenizer(base_dir, folder)
        tokenizer = Tokenizer(base_dir)
        complete_tokenizer(folder, config, tokenizer, trained_template(method, tokenizer))


def import_peft(
    source: Path, checkpoint_dir: Path, out_dir: Path, prompt_style: str | None = None, max_seq_length: int = 512
) -> None:
    """Convert PEFT's adapter folder ``source`` to a trained folder over the base in ``checkpoint_dir``.

    The default chat template is the adapter folder's, or else the base's. Raises
    UserError if this project lacks the type or a setting, or if tensors do not fit the base.
    """
    config, settings = load_config(checkpoint_dir), read_json(source / SETTINGS_FILE)
    check_range("--max_seq_length", max_seq_length, 1, MAX_TOKENS)
    check_settings(settings, source / SETTINGS_FILE)
    path = source / WEIGHTS_FILE
    stored = read_tensors(path, foreign=True)[0] if path.exists() else load_pth(path.with_suffix(".bin"))
    given = {name: tensor.float() for name, tensor in stored.items()}
    try:
        method, arguments, tensors = FROM_PEFT[settings["peft_type"]](config, settings, given)
        expected = kept_shapes(config, method, arguments)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # such as a string for a number
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise UserError(f"{source / SETTINGS_FILE} does not fit {settings['peft_type']}: {reason}") from None
    check_tensors(shapes(tensors), expected, source / WEIGHTS_FILE)
    tokenizer, own = Tokenizer(checkpoint_dir), read_chat_template(source)
    template = own if own and not prompt_style else choose_template(prompt_style, tokenizer)
    end_of_answer(template, tokenizer)
    description = {
        "method": method,
        "arguments": arguments,
        "trained_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "base": describe_base(checkpoint_dir),
        **describe_template(template),
        "train": {"max_seq_length": max_seq_length},
        "version": __version__,
    }
    with whole_folder(out_dir) as folder:
        save_tensors(folder / TRAINED_FILE, tensors)
        write_json(folder / METHOD_FILE, description)


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def kept_shapes(config: LLaMAConfig, method: str, arguments: dict) -> dict[str, tuple[int, ...]]:
    """The shapes in the method's trained folder over a base of this config."""
    with torch.device("meta"):
        model = LLaMA(config).requires_grad_(False)
        METHODS[method](model, **arguments)
        return shapes(kept_tensors(model))


# ---------------------------------------------------------------------------------------------- adapter_config.json

# These settings are names, or say how training began, or are read below. Any other must be off: a later PEFT may add
# settings that change the result.
ANY_TYPE = {"peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"}
ANY_TYPE |= {"inference_mode", "tokenizer_kwargs"}
PROMPT_SIZES = {"num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"}
KNOWN = {
    "ADAPTION_PROMPT": {"target_modules", "adapter_len", "adapter_layers"},
    "PREFIX_TUNING": PROMPT_SIZES | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    "PROMPT_TUNING": PROMPT_SIZES | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"},
    "LORA": {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "init_lora_weights"}
    | {"layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"},
}
OFF: tuple = (None, False, "none", [], {})


def check_settings(settings: dict, path: Path) -> None:
    """Raises UserError for a setting that changes the result and that the methods here lack."""
    kind = settings.get("peft_type")
    if kind not in KNOWN:
        raise UserError(f"{path}: peft_type {kind!r} is none of {', '.join(KNOWN)}")
    foreign = [key for key, value in settings.items() if key not in KNOWN[kind] | ANY_TYPE and value not in OFF]
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        foreign.append("task_type")
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):  # "pissa" changes the base's weights
        foreign.append("init_lora_weights")
    if foreign:
        found = ", ".join(f"{key} {settings[key]!r}" for key in foreign)
        raise UserError(
            f"{path}: {found}: the method here has no such setting; merge the adapter with "
            "merge_and_unload in PEFT, save the model, and convert it with scripts/convert.py"
        )


# ---------------------------------------------------------------------------------------------- adapter


def adapter_names(config: LLaMAConfig, i: int) -> list[str]:
    """Our names of the prompt and gate of block ``i``, then PEFT's. Raises UserError if PEFT cannot have this base."""
    if config.bias or config.n_head * config.head_size != config.n_embd:  # PEFT would add the bias of o_proj twice
        raise UserError(
            f"PEFT's ADAPTION_PROMPT needs a base without biases, with n_head * head_size equal to n_embd; "
            f"{config.name} has bias {config.bias}, {config.n_head} * {config.head_size} and {config.n_embd}"
        )
    ours, peft = f"transformer.h.{i}.attn", f"{WRAPPED}model.layers.{i}.self_attn"
    return [f"{ours}.adapter_wte.weight", f"{ours}.gating_factor", f"{peft}.adaption_prompt", f"{peft}.adaption_gate"]


def adapter_to_peft(config: LLaMAConfig, arguments: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    activation = ACTIVATIONS[arguments.get("gate_activation", "none")]()
    theirs: Tensors = {}
    for i in range(arguments["start_layer"], config.n_layer):
        prompt, gate, peft_prompt, peft_gate = adapter_names(config, i)
        gates = activation(tensors[gate]).flatten()  # PEFT multiplies by its gate as it is
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
    ours, start_layer = dict(tensors), config.n_layer - settings["adapter_layers"]
    for i in range(max(start_layer, 0), config.n_layer):
        prompt, gate, peft_prompt, peft_gate = adapter_names(config, i)
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
    """Maps transformer.h.0.attn.c_attn.lora.q.A to base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight."""
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
        "use_rslora": arguments.get("rslora", False),
        "target_modules": sorted({name.split(".")[-3] for name in names.values()}),
        "bias": "none",
    }
    if arguments.get("start_layer"):  # PEFT would add pairs to all blocks
        settings["layers_to_transform"] = list(range(arguments["start_layer"], config.n_layer))
    return settings, {names[name]: tensor for name, tensor in tensors.items()}


def lora_from_peft(config: LLaMAConfig, settings: dict, tensors: Tensors) -> tuple[str, dict, Tensors]:
    arguments = dict(r=settings["r"], alpha=settings["lora_alpha"], dropout=settings.get("lora_dropout", 0.0))
    arguments |= dict(targets=list(TARGETS), rslora=bool(settings.get("use_rslora")))
    if (layers := settings.get("layers_to_transform")) not in (None, []):
        layers = [layers] if isinstance(layers, int) else sorted(layers)
        arguments["start_layer"] = config.n_layer - len(layers)
        if layers != list(range(arguments["start_layer"], config.n_layer)):
            raise UserError(f"layers_to_transform {layers}: LoRA here is in the top blocks, without a gap")
    ours = {theirs: name for name, theirs in lora_names(config, arguments).items()}
    if foreign := sorted(set(tensors) - set(ours)):
        modules = sorted({name.split(".")[-3] for name in ours})
        raise UserError(f"{foreign[0]} has no place over {config.name}: LoRA here can change {', '.join(modules)}")
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
