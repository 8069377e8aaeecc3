"""Write a base, a fully finetuned or a merged folder as a Hugging Face folder: for transformers, vLLM and others.

python scripts/merge_lora.py --trained_dir out/lora/bookings --out_dir checkpoints/bookings
python scripts/export_hf.py --checkpoint_dir checkpoints/bookings --out_dir exported/bookings --prompt_style chatml

model = AutoModelForCausalLM.from_pretrained("exported/bookings")
tokenizer = AutoTokenizer.from_pretrained("exported/bookings")
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_llama.cli import run


def main(
    checkpoint_dir: Path,
    out_dir: Path,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    prompt_style: str | None = None,
) -> None:
    """Export a whole model to Hugging Face's format.

    Args:
        checkpoint_dir: Folder of a base, of finetune/full.py or of scripts/merge_lora.py.
        out_dir: Folder to write; it must not exist.
        dtype: What to cast the weights to, by default each stays in the dtype it is stored in.
        prompt_style: Whose chat template to write: alpaca, chatml, llama2, llama3 or plain. By default the style that
            finetune/full.py trained with; for other folders, which do not say, the tokenizer's own template stays.
    """
    from lit_llama.export import export_hf

    export_hf(checkpoint_dir, out_dir, dtype, prompt_style)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    run(main)
