"""Convert a model or an adapter of another project. The content of --source tells its format.

    python scripts/convert.py --source Llama-3.2-1B --out_dir checkpoints/llama-3.2-1b           # Hugging Face folder
    python scripts/convert.py --source llama.Q4_1.gguf --out_dir checkpoints/llama               # GGUF file
    python scripts/convert.py --source llama-2-7b --name Llama-2-7b --out_dir checkpoints/llama  # Meta's release
    python scripts/convert.py --source mine --checkpoint_dir checkpoints/llama --out_dir out/mine  # PEFT adapter

Llama 3's tokenizer.model cannot be read: take tokenizer.json from the model's Hugging Face repository and pass it
as --tokenizer. scripts/download.py --repo_id downloads a model from the hub and converts it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lit_llama.cli import call, run
from lit_llama.common.errors import UserError
from lit_llama.common.files import check_new
from lit_llama.formats.convert import convert_hf, convert_meta
from lit_llama.formats.gguf import convert_gguf
from lit_llama.formats.peft import import_peft


def main(
    source: Path,
    out_dir: Path,
    name: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: Path | None = None,
    checkpoint_dir: Path | None = None,
    prompt_style: str | None = None,
    max_seq_length: int | None = None,
) -> None:
    """Convert a model to a checkpoint folder, or a PEFT adapter to a trained folder.

    Args:
        source: A Hugging Face folder, a .gguf file, a folder with Meta's consolidated.*.pth and params.json, or PEFT's
            adapter folder (ADAPTION_PROMPT, PREFIX_TUNING, PROMPT_TUNING or LORA).
        out_dir: Folder to write; it must not exist.
        name: The model's name. Default: the source's name. Meta's files need a name from lit_llama/configs.py, such as
            7B or Llama-2-7b.
        dtype: The dtype of the weights. Default: as stored, and float32 for GGUF.
        tokenizer: File or folder with the tokenizer. Default: the source folder or the one above it.
        checkpoint_dir: For an adapter: folder of its base.
        prompt_style: For an adapter: alpaca, plain or template (the base's own). Default: the template in the adapter's
            folder, or else in the base's.
        max_seq_length: For an adapter: the longest sample of its training, in tokens. Default: 512.
    """
    check_new(out_dir)
    convert, kind = find_converter(source)
    flags = dict(name=name, dtype=dtype, tokenizer=tokenizer, checkpoint_dir=checkpoint_dir, prompt_style=prompt_style)
    call(convert, kind, source=source, out_dir=out_dir, **flags, max_seq_length=max_seq_length)
    print(f"wrote {out_dir}")


def find_converter(source: Path) -> tuple[Callable, str]:
    """The function that converts ``source``, and what ``source`` is in words."""
    if not source.exists():
        raise UserError(f"{source} is missing")
    if source.suffix == ".gguf":
        return convert_gguf, "a GGUF file"
    if (source / "adapter_config.json").exists():
        return import_peft, "a PEFT adapter"
    if (source / "config.json").exists():
        return convert_hf, "a Hugging Face folder"
    if (source / "params.json").exists():
        return convert_meta, "Meta's folder"
    raise UserError(
        f"{source} is neither a .gguf file nor a folder with config.json (Hugging Face), params.json (Meta) or "
        "adapter_config.json (PEFT)"
    )


if __name__ == "__main__":
    run(main)
