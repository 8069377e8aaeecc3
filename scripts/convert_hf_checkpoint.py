"""Convert a LLaMA of the Hugging Face hub that lies in a local folder: safetensors or .bin, sharded or not.

    python scripts/convert_hf_checkpoint.py --source downloads/Llama-3.2-1B --out_dir checkpoints/llama-3.2-1b

scripts/download.py --repo_id fetches and converts in one go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_llama.cli import run


def main(
    source: Path,
    out_dir: Path,
    name: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Convert a Hugging Face folder to a checkpoint folder.

    Args:
        source: The folder with config.json and the weights, model_type "llama".
        out_dir: Folder to write; it must not exist.
        name: The model's name in config.json, by default the source folder's name.
        dtype: What to cast the weights to, by default each stays in the dtype it is stored in.
        tokenizer: File or folder to copy the tokenizer from, by default the source folder.
    """
    from lit_llama.convert import convert_hf

    convert_hf(source, out_dir, name, dtype, tokenizer)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    run(main)
