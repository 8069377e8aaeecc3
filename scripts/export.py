"""Export a model or an adapter for other programs. LoRA can be merged into a whole model first:

    python scripts/merge_lora.py --trained_dir out/lora/bookings --out_dir checkpoints/bookings

For transformers, vLLM and others, a whole model:

    python scripts/export.py --to hf --checkpoint_dir checkpoints/bookings --out_dir exported/bookings

    model = AutoModelForCausalLM.from_pretrained("exported/bookings")
    tokenizer = AutoTokenizer.from_pretrained("exported/bookings")

For llama.cpp, the same in one file:

    python scripts/export.py --to gguf --checkpoint_dir checkpoints/bookings --out_file bookings.gguf --type q8_0

    llama-cli -m bookings.gguf

For PEFT, what adapter (with --gate layer), prefix, soft_prompt or lora learned. It is loaded over the same base in
transformers: the one that was converted, or one exported with --to hf:

    python scripts/export.py --to peft --trained_dir out/lora/bookings --out_dir out/peft/bookings

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    model = PeftModel.from_pretrained(model, "out/peft/bookings")
"""

from pathlib import Path
from typing import Literal

from lit_llama.cli import call, run
from lit_llama.formats.export import export_hf
from lit_llama.formats.gguf import export_gguf
from lit_llama.formats.peft import export_peft


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
            folder of the base, if it moved since training.
        trained_dir: For peft: folder from finetune/adapter.py, prefix.py, soft_prompt.py or lora.py.
        out_dir: For hf and peft: folder to write; it must not exist.
        out_file: For gguf: .gguf file to write; it must not exist.
        dtype: For hf: dtype of the weights. Default: as stored.
        type: For gguf: type of the matrices. Default: f16. q8_0 is half as large.
        prompt_style: For hf and gguf: the chat template to write, alpaca, plain or template (the base's own). Default:
            that of training.
        base_model: For peft: hub id or folder of the base in transformers, for AutoPeftModelForCausalLM.
    """
    export = {"hf": export_hf, "gguf": export_gguf, "peft": export_peft}[to]
    flags = dict(checkpoint_dir=checkpoint_dir, trained_dir=trained_dir, out_dir=out_dir, out_file=out_file)
    call(export, f"--to {to}", **flags, dtype=dtype, type=type, prompt_style=prompt_style, base_model=base_model)
    print(f"wrote {out_dir or out_file}")


if __name__ == "__main__":
    run(main)
