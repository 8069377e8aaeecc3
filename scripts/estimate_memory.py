"""How much memory finetuning will take on each device, before anything is rented: no weights are needed.

    python scripts/estimate_memory.py --model 7B --method adapter --precision bf16-true --micro_batch_tokens 4096
    python scripts/estimate_memory.py --model checkpoints/NAME --method lora --arguments '{r: 16}' --device cpu
    python scripts/estimate_memory.py --model Llama-2-70b --method lora --devices 8 --strategy fsdp

How it is worked out: devices/memory.py. The finetune scripts do the same for their own data, and say so before they
run out.
"""

from __future__ import annotations

from pathlib import Path

from lit_llama import cli
from lit_llama.common.errors import check_range
from lit_llama.settings import MOST_TOKENS


def main(
    model: str,
    method: str = "adapter",
    arguments: dict = {},  # noqa: B006, the command line's default
    precision: str = "bf16-true",
    devices: int = 1,
    strategy: str = "auto",
    micro_batch_tokens: int = 4096,
    seq_length: int = 512,
    checkpointing: bool = False,
    quantize: str = "none",
    device: str = "cuda",
) -> None:
    """Estimate the memory of a step of finetuning.

    Args:
        model: A folder with a base, or a released model's name in lit_llama/configs.py.
        method: A finetune script's name, features aside.
        arguments: What the method's function gets, as YAML, where it is not the default: see lit_llama/methods.
        precision: Width of the frozen base's weights: bf16-true or 32-true.
        devices: Devices in all, on all nodes.
        strategy: auto or ddp, with the base on every device; or fsdp, with its blocks shared among them.
        micro_batch_tokens: Tokens of one forward and backward pass.
        seq_length: Tokens of each sample in it, all of them targets.
        checkpointing: Whether blocks keep their input alone and compute the rest again in the backward pass.
        quantize: What the frozen matrices of the blocks are kept in: none, int8 or nf4.
        device: Where it will run: cuda, or cpu.
    """
    from lit_llama.checkpoint import load_config
    from lit_llama.configs import CONFIGS
    from lit_llama.devices.launch import PRECISIONS, STRATEGIES, held_memory
    from lit_llama.devices.memory import NARROW_BYTES, estimate, imagined
    from lit_llama.methods.table import METHODS
    from lit_llama.model import LLaMAConfig

    if not (Path(model) / "config.json").exists() and model not in CONFIGS:
        raise cli.UserError(f"--model {model} is neither a folder with a base nor one of {', '.join(CONFIGS)}")
    config = LLaMAConfig.from_name(model) if model in CONFIGS else load_config(model)
    choices = [("method", method, METHODS), ("precision", precision, PRECISIONS), ("strategy", strategy, STRATEGIES)]
    choices += [("device", device, ("cuda", "cpu")), ("quantize", quantize, ("none", *NARROW_BYTES))]
    for name, value, known in choices:
        if value not in known:
            raise cli.UserError(f"--{name} {value!r} is none of {', '.join(known)}")
    for name, value in dict(devices=devices, micro_batch_tokens=micro_batch_tokens, seq_length=seq_length).items():
        check_range(f"--{name}", value, 1, MOST_TOKENS)
    try:
        tokens = min(seq_length, imagined(config, method, arguments, PRECISIONS[precision]).text_room)
        rows = max(1, micro_batch_tokens // tokens)
        found = estimate(
            config,
            method,
            arguments,
            PRECISIONS[precision],
            [tokens] * rows,
            device_type=device,
            devices=devices,
            sharded=strategy == "fsdp",
            checkpointing=checkpointing,
            quantize=quantize,
        )
    except TypeError as error:
        raise cli.UserError(f"--arguments {arguments} do not fit {method}: {error}") from None
    print(f"{method} on {config.name}, {precision}, micro-batches of {rows} x {tokens} tokens\n\n{found.table()}")
    if device == "cpu":
        import lightning.fabric  # noqa: F401, a run holds it, too

        if (held := held_memory()) is not None:
            print(f"{'the interpreter and its libraries, here':40}{held / 1e9:10.3f} GB on top")


if __name__ == "__main__":
    cli.run(main)
