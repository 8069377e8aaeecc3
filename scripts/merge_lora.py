"""Merge what a method learned into its base's matrices: a plain checkpoint folder.

    python scripts/merge_lora.py --trained_dir out/lora/bookings --out_dir checkpoints/bookings
    python generate/base.py --checkpoint_dir checkpoints/bookings --prompt "..."

LoRA merges completely: W + s B A. LLaMA-Adapter V2 merges its scales, biases and norms: diag(s) W and s * b.
Its prompts remain, as a LLaMA-Adapter over the merged base.

    python scripts/merge_lora.py --trained_dir out/adapter_v2/bookings --out_dir checkpoints/bookings
    python generate/adapter.py --trained_dir checkpoints/bookings/adapter --prompt "..."
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lit_llama.checkpoint import tensor_shapes
from lit_llama.cli import run, save_settings
from lit_llama.common.errors import UserError
from lit_llama.common.files import check_new, save_tensors, whole_folder, write_json
from lit_llama.data.prompts import trained_template, write_chat_template
from lit_llama.formats.convert import DTYPES
from lit_llama.formats.shards import save_checkpoint
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.lora import target_layers
from lit_llama.methods.table import weightless
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.tokenizer import Tokenizer, copy_tokenizer
from lit_llama.trained import METHOD_FILE, TRAINED_FILE, describe_base, kept_tensors, read_method


def main(
    trained_dir: Path,
    out_dir: Path,
    checkpoint_dir: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a checkpoint folder with LoRA, or with LLaMA-Adapter V2's scales and biases, merged in.

    Args:
        trained_dir: Folder from finetune/lora.py or finetune/adapter_v2.py.
        out_dir: Folder to write; it must not exist.
        checkpoint_dir: Folder of the base, if it moved since training.
        dtype: Dtype of the merged weights. They are computed in float32.
    """
    method = read_method(trained_dir)
    if method["method"] not in ("lora", "adapter_v2"):
        raise UserError(
            f"{trained_dir} was trained with {method['method']}, which cannot be merged: "
            "only lora and adapter_v2 learn linear changes of the base's matrices"
        )
    check_new(out_dir)
    model, _ = load_trained_folder(trained_dir, checkpoint_dir)
    config, weights = merge_lora(model) if method["method"] == "lora" else merge_scales(model)
    with whole_folder(out_dir) as folder:
        save_checkpoint(folder, config, ((name, weights[name].to(DTYPES[dtype])) for name in tensor_shapes(config)))
        copy_tokenizer(checkpoint_dir or Path(method["base"]["checkpoint_dir"]), folder)
        write_chat_template(folder, trained_template(method, Tokenizer(folder)))
        save_settings(folder)
        if method["method"] == "adapter_v2":
            save_prompts(model, method, out_dir, folder)
    print(f"wrote {out_dir}")
    if method["method"] == "adapter_v2":
        print(f"wrote {out_dir / 'adapter'}: its prompts, which cannot be merged, over {out_dir}")


def merge_lora(model: LLaMA) -> tuple[LLaMAConfig, dict[str, Tensor]]:
    """W + s B A for each matrix with a pair: config and weights of the plain model."""
    weights, names = model.state_dict(), {layer: name for name, layer in model.named_modules()}
    for block in model.transformer.h:
        for target, (layer, rows) in target_layers(block).items():
            if target in getattr(layer, "lora", {}):
                key = f"{names[layer]}.weight"
                weights[key] = weights[key].clone()  # the base's own file is mapped into memory
                weights[key][rows] += layer.lora[target].delta().detach()
    return model.config, weights


def merge_scales(model: LLaMA) -> tuple[LLaMAConfig, dict[str, Tensor]]:
    """s * (W x + b) as (diag(s) W) x + s * b: config and weights of a model with biases, without the prompts."""
    weights, scaled_head = model.state_dict(), hasattr(model.lm_head, "scale_bias")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            bias = weights.setdefault(f"{name}.bias", torch.zeros(layer.out_features))  # a merged base has them already
            if hasattr(layer, "scale_bias"):
                scale = layer.scale_bias.scale.detach()
                weights[f"{name}.weight"] = scale[:, None] * weights[f"{name}.weight"]
                weights[f"{name}.bias"] = scale * (bias + layer.scale_bias.bias.detach())
    config = replace(model.config, bias=True, tie_embeddings=model.config.tie_embeddings and not scaled_head)
    return config, weights


def save_prompts(model: LLaMA, method: dict, base: Path, files: Path) -> None:
    """Write adapter_v2's prompts, which cannot be merged, as a trained folder of adapter over the merged ``base``,
    whose files are in the folder ``files`` until all are complete.
    """
    arguments = {key: method["arguments"][key] for key in ("prompt_length", "start_layer")}
    names = kept_tensors(weightless(model.config, "adapter", **arguments))
    tensors = {name: model.get_parameter(name) for name in names}
    method = {
        **method,
        "method": "adapter",
        "arguments": arguments,
        "trained_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "base": describe_base(base, files),
    }
    save_tensors(files / "adapter" / TRAINED_FILE, tensors)
    write_json(files / "adapter" / METHOD_FILE, method)


if __name__ == "__main__":
    run(main)
