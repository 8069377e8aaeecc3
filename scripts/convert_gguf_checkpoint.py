"""Convert a GGUF file of a LLaMA, quantized or not; its tokenizer is in the file.

    python scripts/convert_gguf_checkpoint.py --source SmolLM2-135M-Instruct.Q4_1.gguf \\
        --out_dir checkpoints/smollm2-135m-instruct
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_llama.cli import run


def main(
    source: Path, out_dir: Path, name: str | None = None, dtype: Literal["float32", "bfloat16", "float16"] = "float32"
) -> None:
    """Convert a GGUF file to a checkpoint folder.

    Args:
        source: The .gguf file, of architecture "llama".
        out_dir: Folder to write; it must not exist.
        name: The model's name in config.json, by default the file's name.
        dtype: What the weights are dequantized to.
    """
    from lit_llama.convert_gguf import convert_gguf

    convert_gguf(source, out_dir, name, dtype)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    run(main)
