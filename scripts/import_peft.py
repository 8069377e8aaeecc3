"""Read an adapter that Hugging Face PEFT trained: ADAPTION_PROMPT, PREFIX_TUNING, PROMPT_TUNING or LORA.

python scripts/import_peft.py --source my-adapter --checkpoint_dir checkpoints/llama-3.2-1b --out_dir out/lora/mine
python generate/adapter.py --trained_dir out/lora/mine --prompt "..."
"""

from __future__ import annotations

from pathlib import Path

from lit_llama.cli import run


def main(
    source: Path, checkpoint_dir: Path, out_dir: Path, prompt_style: str | None = None, max_seq_length: int = 512
) -> None:
    """Import an adapter of PEFT as a trained folder.

    Args:
        source: The folder with adapter_config.json and adapter_model.safetensors.
        checkpoint_dir: Folder of the base that it was trained over.
        out_dir: Folder to write; it must not exist.
        prompt_style: How it was asked in training: alpaca, chatml, llama2, llama3 or plain; by default what the
            base's tokenizer tells.
        max_seq_length: The longest sample in its training, in tokens.
    """
    from lit_llama.peft_format import import_peft

    method = import_peft(source, checkpoint_dir, out_dir, prompt_style, max_seq_length)
    print(f"wrote {out_dir}: {method}")


if __name__ == "__main__":
    run(main)
