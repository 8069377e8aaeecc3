"""Generate with a base and what a finetune script trained over it.

    python generate/adapter.py --prompt "Can we come to Casa Mar on Friday? There will be 6 of us at 19:30. - Priya"
    python generate/adapter.py --trained_dir out/adapter/my --prompt "..." --sampling.temperature 0.8

The trained folder says which method it is, which base it needs and how prompts are worded.
"""

from lit_llama import cli
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
        input: What the instruction is about, as in an Alpaca record.
        trained_dir: Folder that a finetune script wrote.
        checkpoint_dir: Folder of the base, where it is no longer where it was in training.
        max_new_tokens: The longest answer.
        sampling: How the next token is chosen.
        devices: Of each node; several keep the base in pieces, for one that does not fit on one device.
        num_nodes: Machines.
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
        quantize: What the base's weights are kept in: none, int8, or on CUDA nf4; by default as in training, on
            several devices none.
        compile: Compile the blocks by torch.compile: half a minute first; in float32 on a CPU nothing is gained.
    """
    from lit_llama.devices.launch import log_rank0
    from lit_llama.generate.classify import is_classifier
    from lit_llama.generate.decode import stream_answer
    from lit_llama.generate.load import answering
    from lit_llama.trained import read_method

    if is_classifier(read_method(trained_dir)):
        raise cli.UserError(f"{trained_dir} answers with a label, not with text: see generate/classify.py")
    flags = (trained_dir, checkpoint_dir, None, precision, quantize, compile, devices, num_nodes)
    with answering(*flags) as (loaded, fabric):
        log_rank0(loaded.name + (f" in {fabric.world_size} pieces" if fabric else ""))
        stream_answer(loaded.model, loaded.tokenizer, loaded.style, prompt, input, max_new_tokens, sampling, fabric)


if __name__ == "__main__":
    cli.run(main)
