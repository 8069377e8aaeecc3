"""Write what a method learned as an adapter that Hugging Face PEFT loads: adapter, prefix, soft_prompt, lora.

    python scripts/export_peft.py --trained_dir out/lora/bookings --out_dir out/peft/bookings

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    model = PeftModel.from_pretrained(model, "out/peft/bookings")

The base is the same model in transformers: the one that was converted, or what scripts/export_hf.py makes of ours.
"""

from __future__ import annotations

from pathlib import Path

from lit_llama.cli import run


def main(trained_dir: Path, out_dir: Path, checkpoint_dir: Path | None = None, base_model: str | None = None) -> None:
    """Export a trained folder to PEFT.

    Args:
        trained_dir: Folder that finetune/adapter.py (with --gate layer), prefix.py, soft_prompt.py or lora.py wrote.
        out_dir: Folder to write; it must not exist.
        checkpoint_dir: Folder of the base, where it is no longer where it was in training.
        base_model: The base in transformers, a hub id or a folder: what AutoPeftModelForCausalLM fetches by itself.
    """
    from lit_llama.peft_format import export_peft

    export_peft(trained_dir, out_dir, checkpoint_dir, base_model)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    run(main)
