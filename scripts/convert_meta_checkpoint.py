"""Convert Meta's own release of a LLaMA: consolidated.*.pth, however many, and params.json.

    python scripts/convert_meta_checkpoint.py --source downloads/llama-2-7b --name Llama-2-7b \\
        --out_dir checkpoints/llama-2-7b

Llama 3's tokenizer.model is a tiktoken file: take tokenizer.json from the model's Hugging Face repository and pass
it as --tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_llama.cli import run


def main(
    source: Path,
    out_dir: Path,
    name: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Convert a folder of Meta's to a checkpoint folder.

    Args:
        source: The folder with params.json and every consolidated.*.pth of the model.
        out_dir: Folder to write; it must not exist.
        name: Which model it is, as in lit_llama/configs.py; params.json leaves out the context's length.
        dtype: What to cast the weights to, by default each stays in the dtype it is stored in.
        tokenizer: File or folder to copy the tokenizer from, by default the source folder or the one above it.
    """
    from lit_llama.convert import convert_meta

    convert_meta(source, out_dir, name, dtype, tokenizer)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    run(main)
