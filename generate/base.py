"""Generate with a base model, or with any checkpoint folder: finetune/full.py writes one.

python generate/base.py --prompt "What is the capital of France?"
python generate/base.py --prompt "Once upon a time" --prompt_style plain --sampling.temperature 0.8
"""

from lit_llama import cli
from lit_llama.base import ensure_base
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
    compile: bool = False,
) -> None:
    """Answer a prompt with a base model.

    Args:
        prompt: The instruction, or with --prompt_style plain the text to continue.
        input: What the instruction is about, as in an Alpaca record.
        checkpoint_dir: Folder of the model.
        prompt_style: alpaca, chatml, llama2, llama3 or plain; by default as trained, or what the tokenizer tells.
        max_new_tokens: The longest answer.
        sampling: How the next token is chosen.
        devices: Of each node; several keep the model in pieces, for one that does not fit on one device.
        num_nodes: Machines.
        precision: Width of the weights: bf16-true, 32-true, or auto for the faster one.
        quantize: What the blocks' weights are kept in: none, int8, or on CUDA nf4.
        compile: Compile the blocks by torch.compile: half a minute first; in float32 on a CPU nothing is gained.
    """
    ensure_base(checkpoint_dir)

    from lit_llama.generate.decode import stream_answer
    from lit_llama.generate.load import answering

    flags = (None, checkpoint_dir, prompt_style, precision, quantize, compile, devices, num_nodes)
    with answering(*flags) as (loaded, fabric):
        stream_answer(loaded.model, loaded.tokenizer, loaded.style, prompt, input, max_new_tokens, sampling, fabric)


if __name__ == "__main__":
    cli.run(main)
