"""Convert a lit-llama.pth that the original Lit-LLaMA wrote (LLaMA 1).

    python scripts/convert_lit_checkpoint.py --source checkpoints/lit-llama/7B/lit-llama.pth --name 7B \\
        --out_dir checkpoints/llama-7b
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_llama.cli import run


def main(
    source: Path,
    out_dir: Path,
    name: Literal["7B", "13B", "30B", "65B"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Convert a lit-llama.pth to a checkpoint folder.

    Args:
        source: The lit-llama.pth file.
        out_dir: Folder to write; it must not exist.
        name: Which model it is; the file does not say.
        dtype: What to cast the weights to, by default each stays in the dtype it is stored in.
        tokenizer: File or folder to copy the tokenizer from, by default the file's folder or the one above it.
    """
    from lit_llama.convert import convert_lit

    convert_lit(source, out_dir, name, dtype, tokenizer)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    run(main)
