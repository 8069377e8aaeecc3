"""Write a model or an adapter for other programs.

    python scripts/merge_lora.py --trained_dir out/lora/bookings --out_dir checkpoints/bookings

for transformers, vLLM and others, the whole model:

    python scripts/export.py --to hf --checkpoint_dir checkpoints/bookings --out_dir exported/bookings

    model = AutoModelForCausalLM.from_pretrained("exported/bookings")
    tokenizer = AutoTokenizer.from_pretrained("exported/bookings")

for llama.cpp, the same as one file:

    python scripts/export.py --to gguf --checkpoint_dir checkpoints/bookings --out_file bookings.gguf --type q8_0

    llama-cli -m bookings.gguf

for PEFT, what adapter (with --gate layer), prefix, soft_prompt or lora learned, over the same base in transformers: the
one that was converted, or what --to hf makes of ours:

    python scripts/export.py --to peft --trained_dir out/lora/bookings --out_dir out/peft/bookings

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    model = PeftModel.from_pretrained(model, "out/peft/bookings")
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_llama.cli import call, run


def main(
    to: Literal["hf", "peft", "gguf"],
    checkpoint_dir: Path | None = None,
    trained_dir: Path | None = None,
    out_dir: Path | None = None,
    out_file: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    type: Literal["f32", "f16", "q8_0"] | None = None,
    prompt_style: str | None = None,
    base_model: str | None = None,
) -> None:
    """Export a whole model to Hugging Face's format or GGUF, or a trained folder to PEFT.

    Args:
        to: The format: hf, gguf (a whole model) or peft (what a method learned).
        checkpoint_dir: For hf and gguf: folder of a base, of finetune/full.py or of scripts/merge_lora.py. For peft:
            folder of the base, where it is no longer where it was in training.
        trained_dir: For peft: folder that finetune/adapter.py, prefix.py, soft_prompt.py or lora.py wrote.
        out_dir: For hf and peft: folder to write; it must not exist.
        out_file: For gguf: the .gguf file to write; it must not exist.
        dtype: For hf: what to cast the weights to, by default each stays in the dtype it is stored in.
        type: For gguf: what the matrices are stored in, by default f16; q8_0 takes half of it, in blocks of 32 numbers
            with a scale each.
        prompt_style: For hf and gguf: whose chat template to write: alpaca, chatml, llama2, llama3 or plain. By default
            the style of training; a base that was not trained here keeps its tokenizer's own template.
        base_model: For peft: the base in transformers, a hub id or a folder: what AutoPeftModelForCausalLM fetches by
            itself.
    """
    from lit_llama.formats.export import export_hf
    from lit_llama.formats.export_gguf import export_gguf
    from lit_llama.formats.peft import export_peft

    export = {"hf": export_hf, "gguf": export_gguf, "peft": export_peft}[to]
    flags = dict(checkpoint_dir=checkpoint_dir, trained_dir=trained_dir, out_dir=out_dir, out_file=out_file)
    call(export, f"--to {to}", **flags, dtype=dtype, type=type, prompt_style=prompt_style, base_model=base_model)
    print(f"wrote {out_dir or out_file}")


if __name__ == "__main__":
    run(main)
