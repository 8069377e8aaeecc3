"""How much memory finetuning needs on each device. No weights are loaded.

python scripts/estimate_memory.py --model checkpoints/NAME --method lora --arguments '{r: 16}' --device cpu
python scripts/estimate_memory.py --model Llama-2-70b --method lora --devices 8 --strategy fsdp
"""

from typing import Literal

from lit_llama import cli
from lit_llama.common.errors import UserError, check_range
from lit_llama.devices.launch import PRECISIONS
from lit_llama.devices.memory import step_memory
from lit_llama.measure.cases import config_of
from lit_llama.methods.table import METHODS, weightless
from lit_llama.settings import MAX_TOKENS, Hardware

BYTES = {"int8": 1.0, "nf4": 0.5}  # per weight of a block's matrices; the scales are few


def main(
    model: str,
    method: Literal[tuple(METHODS)] = "adapter",
    arguments: dict = {},  # noqa: B006
    precision: Literal["bf16-true", "32-true"] = "bf16-true",
    devices: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    micro_batch_tokens: int = 4096,
    seq_length: int = 512,
    checkpointing: bool = False,
    quantize: Literal["none", "int8", "nf4"] = "none",
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Estimate the memory of a finetuning step.

    Args:
        model: Folder of a base, or the name of a released model in lit_llama/configs.py.
        method: Name of a finetune script.
        arguments: Arguments of the method's function in lit_llama/methods, as YAML.
        precision: Precision of the frozen base's weights.
        devices: Devices on all nodes together.
        micro_batch_tokens: Tokens of one forward and backward pass.
        seq_length: Tokens of each sample.
        device: Where it will run.
    """
    for name, value in dict(devices=devices, micro_batch_tokens=micro_batch_tokens, seq_length=seq_length).items():
        check_range(f"--{name}", value, 1, MAX_TOKENS)
    Hardware(devices, strategy=strategy, quantize=quantize)  # refuses what the scripts refuse
    try:
        llama = weightless(config_of(model), method, **arguments).to(PRECISIONS[precision])
    except TypeError as error:
        raise UserError(f"--arguments {arguments} do not fit {method}: {error}") from None
    blocks = [sum(p.numel() for p in block.parameters() if not p.requires_grad) for block in llama.transformer.h]
    rest = sum(p.numel() for p in llama.parameters() if not p.requires_grad) - sum(blocks)
    held = sum(blocks)
    if strategy == "fsdp" and devices > 1:
        held = held / devices + 2 * max(blocks)  # a device holds its part and two gathered blocks
    frozen = rest * llama.dtype.itemsize + held * BYTES.get(quantize, llama.dtype.itemsize)
    tokens = max(seq_length, micro_batch_tokens)
    memory = {"frozen weights": frozen, **step_memory(llama, device, tokens, seq_length, checkpointing)}
    print(f"{method} on {llama.config.name}, {precision}, micro-batches of {tokens} tokens, on each device:\n")
    for name, size in {**memory, "total": sum(memory.values())}.items():
        print(f"{name:34} {size / 1e9:10.3f} GB")
    print("\nThe process itself takes another 0.5 to 0.7 GB.")


if __name__ == "__main__":
    cli.run(main)
