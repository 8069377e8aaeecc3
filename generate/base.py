"""Generate with a base model, or with any checkpoint folder: finetune/full.py writes one.

python generate/base.py --prompt "What is the capital of France?"
python generate/base.py --prompt "Once upon a time" --prompt_style plain --sampling.temperature 0.8
"""

from pathlib import Path

from lit_llama import cli
from lit_llama.settings import DEFAULT_BASE, Sampling


def main(
    prompt: str,
    input: str = "",
    checkpoint_dir: str = DEFAULT_BASE,
    prompt_style: str | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),
    devices: int = 1,
    num_nodes: int = 1,
    precision: str = "auto",
    quantize: str = "none",
) -> None:
    """Answer a prompt with a base model.

    Args:
        prompt: The instruction, or with --prompt_style plain the text to continue.
        input: What the instruction is about, as in an Alpaca record.
        checkpoint_dir: Folder of the model.
        prompt_style: alpaca, chatml, llama2, llama3 or plain; by default as trained, or what the tokenizer tells.
        max_new_tokens: The longest answer.
        sampling: How the next token is chosen.
        devices: More than one share the model in pieces, where it does not fit one; on every node as many.
        num_nodes: Machines.
        precision: Width of the weights: bf16-true, 32-true, or auto for the faster one.
        quantize: What the blocks' weights are kept in: none, int8, or on CUDA nf4.
    """
    from lit_llama import ranks
    from lit_llama.checkpoint import load_model
    from lit_llama.devices import base_dtype, default_device, launch_pieces
    from lit_llama.download import ensure_base
    from lit_llama.generate import stream_answer
    from lit_llama.prompts import choose_style
    from lit_llama.quantize import pack, quantize_base
    from lit_llama.sharding import shard
    from lit_llama.tokenizer import Tokenizer
    from lit_llama.trained import METHOD_FILE, read_method

    fabric = launch_pieces(devices, num_nodes, quantize)
    ranks.first(f"fetch {checkpoint_dir}", lambda: ensure_base(checkpoint_dir, yes=False))
    tokenizer = Tokenizer(checkpoint_dir)
    if (Path(checkpoint_dir) / METHOD_FILE).exists():  # finetune/full.py wrote it
        prompt_style = prompt_style or read_method(checkpoint_dir)["prompt_style"]
    style = choose_style(prompt_style, tokenizer)
    device = fabric.device if fabric else default_device()
    dtype = base_dtype(precision, device)
    if fabric:  # left in its file, memory-mapped, for shard to cast and move block by block
        model = load_model(checkpoint_dir, dtype=None).requires_grad_(False)
        shard(fabric, model, dtype)
    else:
        model = load_model(checkpoint_dir, dtype, device)
        quantize_base(model, quantize)
        pack(model)
    stream_answer(model, tokenizer, style, prompt, input, max_new_tokens, sampling, fabric)


if __name__ == "__main__":
    cli.run(main)
