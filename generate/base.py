"""Generate with a base model, or with any checkpoint folder: finetune/full.py writes one.

python generate/base.py --prompt "What is the capital of France?"
python generate/base.py --prompt "Once upon a time" --prompt_style plain --sampling.temperature 0.8
"""

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.generate.load import launch_sharded, load_for_generation
from lit_llama.generate.stream import stream_answer
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
        devices: GPUs per node. With more than one, the base is sharded across them.
        quantize: Keep the blocks' weights in int8, or on CUDA in nf4.
    """
    ensure_base(checkpoint_dir)
    fabric = launch_sharded(devices, num_nodes, quantize, compile)  # None for one device
    loaded = load_for_generation(
        None, checkpoint_dir, prompt_style, precision=precision, quantize=quantize, compile=compile, fabric=fabric
    )
    stream_answer(loaded, prompt, input, max_new_tokens, sampling, fabric)


if __name__ == "__main__":
    cli.run(main)
