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
from lit_llama.checkpoint import check_tensors, load_config, shapes_of
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import read_json, read_tensors, save_tensors, whole_folder, write_json
from lit_llama.data.prompts import describe_template, trained_template
from lit_llama.formats.convert import config_errors, load_foreign
from lit_llama.formats.export import export_tokenizer
from lit_llama.formats.layouts import layer_names
from lit_llama.methods.adapter import ACTIVATIONS
from lit_llama.methods.lora import TARGETS
from lit_llama.methods.table import weightless
from lit_llama.model import LLaMAConfig
from lit_llama.settings import MAX_TOKENS
from lit_llama.tokenizer import Tokenizer, read_chat_template
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
    if name not in KINDS:
        raise UserError(
            f"{trained_dir} was trained with {name}, which PEFT lacks; it has {', '.join(KINDS)}. "
            "For whole models, merged or from finetune/full.py: scripts/export.py --to hf"
        )
    base_dir = check_base(method["base"], checkpoint_dir, path)
    config = load_config(base_dir)
    tensors, about = read_tensors(trained_dir / TRAINED_FILE)
    check_header(method, about, path)
    check_tensors(shapes_of(tensors), kept_shapes(config, name, arguments), trained_dir / TRAINED_FILE)
    kind, to_peft, _ = KINDS[name]
    settings, tensors = to_peft(config, arguments, tensors)
    settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    tokenizer = Tokenizer(base_dir)
    with whole_folder(out_dir) as folder:
        save_tensors(folder / WEIGHTS_FILE, tensors, foreign=True)
        write_json(folder / SETTINGS_FILE, {"peft_type": kind, **settings})
        export_tokenizer(base_dir, folder, config, tokenizer, trained_template(method, tokenizer))


def import_peft(
    source: Path, checkpoint_dir: Path, out_dir: Path, prompt_style: str | None = None, max_seq_length: int = 512
) -> None:
    """Convert PEFT's adapter folder ``source`` to a trained folder over the base in ``checkpoint_dir``.

    The default chat template is the adapter folder's, or else the base's. Raises UserError if this project lacks the
    type or a setting, or if tensors do not fit the base.
    """
    config, settings = load_config(checkpoint_dir), read_json(source / SETTINGS_FILE)
    check_range("--max_seq_length", max_seq_length, 1, MAX_TOKENS)
    check_settings(settings, source / SETTINGS_FILE)
    path = source / WEIGHTS_FILE
    stored = load_foreign(path if path.exists() else path.with_suffix(".bin"))
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    name, from_peft = next((name, it) for name, (kind, _, it) in KINDS.items() if kind == settings["peft_type"])
    with config_errors(source):  # such as a string for a number
        arguments = from_peft(config, settings, tensors)
        expected = kept_shapes(config, name, arguments)
    check_tensors(shapes_of(tensors), expected, path)
    tokenizer = Tokenizer(checkpoint_dir)
    template = trained_template({"chat_template": read_chat_template(source)}, tokenizer, prompt_style)
    description = {
        "method": name,
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


def kept_shapes(config: LLaMAConfig, method: str, arguments: dict) -> dict[str, tuple[int, ...]]:
    """The shapes in the method's trained folder over a base of this config."""
    return shapes_of(kept_tensors(weightless(config, method, **arguments)))


# ---------------------------------------------------------------------------------------------- adapter_config.json

# These settings are names, or say how training began, or are read below. Any other must be off: a later PEFT may add
# settings that change the result.
ANY_TYPE = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
ANY_TYPE |= {"tokenizer_kwargs"}
PROMPT_SIZES = {"num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"}
KNOWN = {
    "ADAPTION_PROMPT": {"target_modules", "adapter_len", "adapter_layers"},
    "PREFIX_TUNING": PROMPT_SIZES | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    "PROMPT_TUNING": PROMPT_SIZES | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"},
    "LORA": {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_pattern"}
    | {"layers_to_transform", "megatron_core", "qalora_group_size"},
}
OFF: tuple = (None, False, "none", [], {})
# Values that are allowed. PEFT's init_lora_weights "pissa", for one, changes the base's weights.
VALUES: dict[str, tuple] = {"task_type": (None, "CAUSAL_LM"), "init_lora_weights": (True, False, "gaussian")}


def check_settings(settings: dict, path: Path) -> None:
    """Raises UserError for a setting that changes the result and that the methods here lack."""
    kind = settings.get("peft_type")
    if kind not in KNOWN:
        raise UserError(f"{path}: peft_type {kind!r} is none of {', '.join(KNOWN)}")
    harmless = KNOWN[kind] | ANY_TYPE
    foreign = [key for key, it in settings.items() if key not in harmless and it not in VALUES.get(key, OFF)]
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
    return settings, theirs


def adapter_from_peft(config: LLaMAConfig, settings: dict, tensors: Tensors) -> dict:
    start_layer = config.n_layer - settings["adapter_layers"]
    for i in range(max(start_layer, 0), config.n_layer):
        prompt, gate, peft_prompt, peft_gate = adapter_names(config, i)
        tensors[prompt], tensors[gate] = tensors.pop(peft_prompt).squeeze(0), tensors.pop(peft_gate).view(-1, 1, 1)
    return dict(prompt_length=settings["adapter_len"], start_layer=start_layer, gate="layer")


# ---------------------------------------------------------------------------------------------- prefix, soft_prompt


def prompt_settings(config: LLaMAConfig, K: int, heads: int, width: int) -> dict:
    sizes = {"num_virtual_tokens": K, "num_layers": config.n_layer, "num_attention_heads": heads, "token_dim": width}
    return {**sizes, "num_transformer_submodules": 1}


def prefix_to_peft(config: LLaMAConfig, arguments: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    blocks = torch.stack([tensors[f"transformer.h.{i}.attn.prefix"] for i in range(config.n_layer)])
    rows = blocks.permute(3, 0, 1, 2, 4).flatten(1)  # (N, 2, nkv, K, hs) -> (K, N * 2 * nkv * hs)
    width = config.n_kv_head * config.head_size
    return prompt_settings(config, len(rows), config.n_kv_head, width), {PROMPT: rows}


def prefix_from_peft(config: LLaMAConfig, settings: dict, tensors: Tensors) -> dict:
    rows = tensors.pop(PROMPT)
    width = 2 * config.n_layer * config.n_kv_head * config.head_size
    if rows.shape[1:] != (width,):
        raise UserError(f"{PROMPT} has shape {tuple(rows.shape)}; over {config.name} a prefix has {width} columns")
    blocks = rows.view(-1, config.n_layer, 2, config.n_kv_head, config.head_size).permute(1, 2, 3, 0, 4)
    tensors |= {f"transformer.h.{i}.attn.prefix": block for i, block in enumerate(blocks)}  # (2, nkv, K, hs)
    return dict(prompt_length=settings["num_virtual_tokens"])


def soft_prompt_to_peft(config: LLaMAConfig, arguments: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    (rows,) = tensors.values()
    return prompt_settings(config, len(rows), config.n_head, config.n_embd), {PROMPT: rows}


def soft_prompt_from_peft(config: LLaMAConfig, settings: dict, tensors: Tensors) -> dict:
    tensors["transformer.wte.soft_prompt"] = tensors.pop(PROMPT)
    return dict(prompt_length=settings["num_virtual_tokens"])


# ---------------------------------------------------------------------------------------------- lora


LORA_SETTINGS = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}  # ours: PEFT's


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
    settings = {theirs: arguments[ours] for ours, theirs in LORA_SETTINGS.items()}
    settings |= {"target_modules": sorted({name.split(".")[-3] for name in names.values()}), "bias": "none"}
    if arguments.get("start_layer"):  # PEFT would add pairs to all blocks
        settings["layers_to_transform"] = list(range(arguments["start_layer"], config.n_layer))
    return settings, {names[name]: tensor for name, tensor in tensors.items()}


def lora_from_peft(config: LLaMAConfig, settings: dict, tensors: Tensors) -> dict:
    settings = {"lora_dropout": 0.0, "use_rslora": False, **settings}  # early versions of PEFT lack them
    arguments = {ours: settings[theirs] for ours, theirs in LORA_SETTINGS.items()} | {"targets": list(TARGETS)}
    arguments["rslora"] = bool(arguments["rslora"])  # null in some folders
    if (layers := settings.get("layers_to_transform")) not in (None, []):
        layers = [layers] if isinstance(layers, int) else sorted(layers)
        arguments["start_layer"] = config.n_layer - len(layers)
        if layers != list(range(arguments["start_layer"], config.n_layer)):
            raise UserError(f"layers_to_transform {layers}: LoRA here is in the top blocks, without a gap")
    names = {theirs: ours for ours, theirs in lora_names(config, arguments).items() if theirs in tensors}
    arguments["targets"] = [target for target in TARGETS if any(f".lora.{target}." in ours for ours in names.values())]
    tensors |= {ours: tensors.pop(theirs) for theirs, ours in names.items()}
    return arguments


# By method: PEFT's type; what makes PEFT's settings and tensors; what renames PEFT's tensors and returns the arguments.
KINDS = {
    "adapter": ("ADAPTION_PROMPT", adapter_to_peft, adapter_from_peft),
    "prefix": ("PREFIX_TUNING", prefix_to_peft, prefix_from_peft),
    "soft_prompt": ("PROMPT_TUNING", soft_prompt_to_peft, soft_prompt_from_peft),
    "lora": ("LORA", lora_to_peft, lora_from_peft),
}
