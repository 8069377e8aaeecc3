"""Generate with a base and what a finetune script trained over it.

    python generate/adapter.py --prompt "Can we come to Casa Mar on Friday? There will be 6 of us at 19:30. - Priya"
    python generate/adapter.py --trained_dir out/adapter/my --prompt "..." --sampling.temperature 0.8

The trained folder says which method, base and prompt style it needs.
"""

from lit_llama import cli
from lit_llama.devices.launch import log_rank0
from lit_llama.generate.load import launch_sharded, load_for_generation
from lit_llama.generate.stream import stream_answer
from lit_llama.settings import Sampling


def main(
    prompt: str,
    input: str = "",
    trained_dir: str = "out/adapter/bookings",
    checkpoint_dir: str | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),
    devices: int = 1,
    num_nodes: int = 1,
    precision: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
) -> None:
    """Answer a prompt with a finetuned model.

    Args:
        prompt: The instruction.
        checkpoint_dir: Folder of the base, if it has moved since training.
        devices: GPUs per node. With more than one, the base is sharded across them.
        quantize: Keep the base's weights in int8, or on CUDA in nf4, or none. Default: as in training; none if sharded.
    """
    fabric = launch_sharded(devices, num_nodes, quantize, compile)  # None for one device
    loaded = load_for_generation(
        trained_dir, checkpoint_dir, precision=precision, quantize=quantize, compile=compile, fabric=fabric
    )
    log_rank0(loaded.name + (f", sharded across {fabric.world_size} devices" if fabric else ""))
    stream_answer(loaded, prompt, input, max_new_tokens, sampling, fabric)


if __name__ == "__main__":
    cli.run(main)
