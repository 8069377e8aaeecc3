"""Write a base, a fully finetuned or a merged folder as a GGUF file, for llama.cpp and what is built on it.

python scripts/merge_lora.py --trained_dir out/lora/bookings --out_dir checkpoints/bookings
python scripts/export_gguf.py --checkpoint_dir checkpoints/bookings --out_file bookings.gguf --prompt_style chatml

llama-cli -m bookings.gguf
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_llama.cli import run


def main(
    checkpoint_dir: Path, out_file: Path, type: Literal["f32", "f16", "q8_0"] = "f16", prompt_style: str | None = None
) -> None:
    """Export a whole model to GGUF.

    Args:
        checkpoint_dir: Folder of a base, of finetune/full.py or of scripts/merge_lora.py.
        out_file: The .gguf file to write; it must not exist.
        type: What the matrices are stored in; q8_0 is half of f16, in blocks of 32 numbers with a scale each.
        prompt_style: Whose chat template to write: alpaca, chatml, llama2, llama3 or plain. By default the style that
            finetune/full.py trained with; for other folders, which do not say, the tokenizer's own template stays.
    """
    from lit_llama.export_gguf import export_gguf

    export_gguf(checkpoint_dir, out_file, type, prompt_style)
    print(f"wrote {out_file}")


if __name__ == "__main__":
    run(main)
