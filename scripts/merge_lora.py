"""Merge what a method learned into its base's matrices: a plain checkpoint folder.

    python scripts/merge_lora.py --trained_dir out/lora/bookings --out_dir checkpoints/bookings
    python generate/base.py --checkpoint_dir checkpoints/bookings --prompt "..."

LoRA merges as a whole: W + alpha/r * B A. Of LLaMA-Adapter V2 the scales, biases and norms merge, diag(s) W and s * b,
but its prompts are further keys and values of attention: they become a LLaMA-Adapter over the merged base.

    python scripts/merge_lora.py --trained_dir out/adapter_v2/bookings --out_dir checkpoints/bookings
    python generate/adapter.py --trained_dir checkpoints/bookings/adapter --prompt "..."
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llama import cli

if TYPE_CHECKING:
    from torch import Tensor

    from lit_llama.model import LLaMA, LLaMAConfig

WHY_NOT = {
    "adapter": "its prompts are further keys and values that every token attends to, behind a gate",
    "prefix": "its prefixes are further keys and values that every token attends to",
    "soft_prompt": "its prompt is further input in front of every text",
    "houlsby": "its bottlenecks are not linear",
    "output_layers": "it already is a part of the model's own weights; load it over its base",
    "full": "it already is a checkpoint folder of its own",
    "features": "its classifier stands behind the model",
}


def main(trained_dir: str, out_dir: str, checkpoint_dir: str | None = None, dtype: str = "float32") -> None:
    """Write a checkpoint folder with LoRA, or with LLaMA-Adapter V2's scales and biases, merged in.

    Args:
        trained_dir: Folder that finetune/lora.py or finetune/adapter_v2.py wrote.
        out_dir: Folder to write; it must not exist.
        checkpoint_dir: Folder of the base, where it is no longer where it was in training.
        dtype: What the merged weights are stored in: float32, bfloat16 or float16. They are computed in float32.
    """
    import torch

    from lit_llama.checkpoint import save_checkpoint
    from lit_llama.cli import save_settings
    from lit_llama.common.files import check_new, whole_folder
    from lit_llama.data.prompts import write_chat_template
    from lit_llama.generate.load import load_trained_folder
    from lit_llama.tokenizer import Tokenizer, copy_tokenizer
    from lit_llama.trained import read_method

    if dtype not in ("float32", "bfloat16", "float16"):
        raise cli.UserError(f"--dtype {dtype!r} is none of float32, bfloat16, float16")
    method = read_method(trained_dir)
    if method["method"] not in ("lora", "adapter_v2"):
        why = WHY_NOT.get(method["method"], "it is unknown here")
        raise cli.UserError(f"{trained_dir} was trained with {method['method']}, which cannot be merged: {why}")
    check_new(out_dir)
    model, _ = load_trained_folder(trained_dir, checkpoint_dir)
    config, merged = merge_lora(model) if method["method"] == "lora" else merge_scales(model)
    with whole_folder(Path(out_dir)) as folder:
        save_checkpoint(folder, config, ((name, t.to(getattr(torch, dtype))) for name, t in merged.items()))
        copy_tokenizer(Path(checkpoint_dir or method["base"]["checkpoint_dir"]), folder)
        write_chat_template(folder, Tokenizer(folder), method["prompt_style"])
        save_settings(folder)
    print(f"wrote {out_dir}")
    if method["method"] == "adapter_v2":
        save_prompts(model, method, Path(out_dir))


def base_weights(model: "LLaMA") -> "dict[str, Tensor]":
    """What lies under the base's own keys: without what a method added."""
    import torch

    from lit_llama.model import LLaMA

    with torch.device("meta"):
        base = LLaMA(model.config)
    weights = model.state_dict()
    return {name: weights[name] for name in base.state_dict()}


def merge_lora(model: "LLaMA") -> "tuple[LLaMAConfig, dict[str, Tensor]]":
    """W + alpha/r * B A for each matrix with a pair: config and weights of the plain model."""
    from lit_llama.methods.lora import places

    merged = base_weights(model)
    if model.config.tie_embeddings:
        del merged["lm_head.weight"]
    names = {id(layer): name for name, layer in model.named_modules()}
    for block in model.transformer.h:
        for target, (layer, rows) in places(block).items():
            if target in getattr(layer, "lora", {}):
                key = f"{names[id(layer)]}.weight"
                merged[key] = merged[key].clone()  # the base's own file is mapped into memory
                merged[key][rows] += layer.lora[target].delta().detach()
    return model.config, merged


def merge_scales(model: "LLaMA") -> "tuple[LLaMAConfig, dict[str, Tensor]]":
    """s * (W x + b) as (diag(s) W) x + s * b: config and weights of a model with biases, without the prompts."""
    import torch

    merged = base_weights(model)
    scaled_head = hasattr(model.lm_head, "scale_bias")
    config = replace(model.config, bias=True, tie_embeddings=model.config.tie_embeddings and not scaled_head)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            bias = merged.get(f"{name}.bias", torch.zeros(layer.out_features))  # a base that was merged has its own
            if hasattr(layer, "scale_bias"):
                scale = layer.scale_bias.scale.detach()
                merged[f"{name}.weight"] = scale[:, None] * merged[f"{name}.weight"]
                bias = scale * (bias + layer.scale_bias.bias.detach())
            merged[f"{name}.bias"] = bias
    if config.tie_embeddings:
        del merged["lm_head.weight"]
    return config, merged


def save_prompts(model: "LLaMA", method: dict, base: Path) -> None:
    """Write what of adapter_v2 cannot be merged as a trained folder of adapter, over the merged base."""
    from lit_llama.common.files import save_tensors, write_json
    from lit_llama.methods.adapter import AdapterAttention
    from lit_llama.trained import METHOD_FILE, TRAINED_FILE, describe_base

    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterAttention)}
    prompts = {f"{name}.adapter_wte.weight": layer.adapter_wte.weight for name, layer in adapted.items()}
    prompts |= {f"{name}.gating_factor": layer.gating_factor for name, layer in adapted.items()}
    arguments = {key: method["arguments"][key] for key in ("prompt_length", "start_layer")}
    changes = {
        "method": "adapter",
        "arguments": arguments,
        "trained_parameters": sum(tensor.numel() for tensor in prompts.values()),
        "base": describe_base(base),
    }
    save_tensors(base / "adapter" / TRAINED_FILE, prompts)
    write_json(base / "adapter" / METHOD_FILE, method | changes)
    print(f"wrote {base / 'adapter'}: its prompts, which cannot be merged, over {base}")


if __name__ == "__main__":
    cli.run(main)
