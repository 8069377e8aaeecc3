"""Merge LoRA into its base: W + alpha/r * B A, a plain checkpoint folder that needs the method no more.

    python scripts/merge_lora.py --trained_dir out/lora/bookings --out_dir checkpoints/bookings
    python generate/base.py --checkpoint_dir checkpoints/bookings --prompt "..."

Of the other methods none becomes a matrix: prompts and prefixes are further keys and values of attention, a soft prompt
is further input, and a bottleneck is not linear.
"""

from pathlib import Path

import torch

from lit_llama import cli
from lit_llama.checkpoint import load_trained_folder, read_method, save_checkpoint, whole_folder
from lit_llama.convert import copy_tokenizer
from lit_llama.methods.lora import places

WHY_NOT = {
    "adapter": "its prompts are further keys and values that every token attends to, behind a gate",
    "adapter_v2": "its prompts are further keys and values that every token attends to, behind a gate",
    "prefix": "its prefixes are further keys and values that every token attends to",
    "soft_prompt": "its prompt is further input in front of every text",
    "houlsby": "its bottlenecks are not linear",
    "output_layers": "it already is a part of the model's own weights; load it over its base",
    "full": "it already is a checkpoint folder of its own",
    "features": "its classifier stands behind the model",
}


def main(trained_dir: str, out_dir: str, checkpoint_dir: str | None = None, dtype: str = "float32") -> None:
    """Write a checkpoint folder with LoRA merged in.

    Args:
        trained_dir: Folder that finetune/lora.py wrote.
        out_dir: Folder to write; it must not exist.
        checkpoint_dir: Folder of the base, where it is no longer where it was in training.
        dtype: What the merged weights are stored in: float32, bfloat16 or float16. They are summed in float32.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise cli.UserError(f"--dtype {dtype!r} is none of float32, bfloat16, float16")
    method = read_method(trained_dir)
    if method["method"] != "lora":
        why = WHY_NOT.get(method["method"], "it is unknown here")
        raise cli.UserError(f"{trained_dir} was trained with {method['method']}, which cannot be merged: {why}")
    model, _ = load_trained_folder(trained_dir, checkpoint_dir)
    merged = {name: tensor for name, tensor in model.state_dict().items() if ".lora." not in name}
    if model.config.tie_embeddings:
        del merged["lm_head.weight"]
    names = {id(layer): name for name, layer in model.named_modules()}
    for block in model.transformer.h:
        for target, (layer, rows) in places(block).items():
            if target in getattr(layer, "lora", {}):
                key = f"{names[id(layer)]}.weight"
                merged[key] = merged[key].clone()  # the base's own file is mapped into memory
                merged[key][rows] += layer.lora[target].delta().detach()
    with whole_folder(Path(out_dir)) as folder:
        save_checkpoint(folder, model.config, ((name, t.to(getattr(torch, dtype))) for name, t in merged.items()))
        copy_tokenizer(Path(checkpoint_dir or method["base"]["checkpoint_dir"]), folder)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    cli.run(main)
