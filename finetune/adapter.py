"""Finetune with LLaMA-Adapter: learned prompts in the top blocks behind a gate that starts at zero.

    python finetune/adapter.py                                      # SmolLM2-135M on data/bookings
    python finetune/adapter.py --data my.json --out_dir out/my      # your own data
    python finetune/adapter.py --devices 8 --train.batch_size 64    # eight GPUs

Paper: https://arxiv.org/abs/2303.16199. What it adds to the model: lit_llama/methods/adapter.py.
"""

from lit_llama import cli
from lit_llama.job import Job
from lit_llama.settings import TrainArgs


def main(
    prompt_length: int = 10,
    start_layer: int = 2,
    prompt_init: str = "text",
    gate: str = "head",
    gate_init: float = 0.0,
    # The rates of prompts and gates were measured on data/bookings (450 steps of two end at a validation loss of 0.0355
    # at 1.4e-2, of 0.0448 at 2e-2); the paper has one, 9e-3 * batch_size / 256.
    gate_lr_scale: float = 0.25,
    train: TrainArgs = TrainArgs(max_steps=450, batch_size=2, learning_rate=1.4e-2, weight_decay=0.02, eval_every=150),
    **shared,
) -> None:
    """Finetune a base with LLaMA-Adapter.

    Args:
        prompt_length: Rows of the learned prompt in each block (K).
        start_layer: The first block that gets a prompt; the ones below stay as they are.
        prompt_init: Prompts start as what their blocks read of a training "text", or "normal", as in the paper.
        gate: One gate for each "head", as in the paper, or for each "layer", as in PEFT.
        gate_init: Where the gates start; the paper's zero leaves the model as it is at first.
        gate_lr_scale: The gates learn at this share of the learning rate.
        train: The settings that every finetune script shares.
    """
    from functools import partial

    import torch

    from lit_llama.methods.adapter import add_adapter, start_from_text

    if prompt_init not in ("text", "normal"):
        raise cli.UserError(f"--prompt_init {prompt_init!r} is none of text, normal")
    if prompt_init == "text" and gate_init:
        raise cli.UserError(f"--gate_init {gate_init:g} needs --prompt_init normal: a text is read with gates at zero")
    job = Job("adapter", train, head="language", **shared)
    arguments = dict(prompt_length=prompt_length, start_layer=start_layer, gate=gate, gate_init=gate_init)
    add_adapter(job.model, **arguments)

    adapted = job.model.transformer.h[start_layer:]
    prompts = [block.attn.adapter_wte.weight for block in adapted]
    gates = [block.attn.gating_factor for block in adapted]
    optimizer = torch.optim.AdamW(
        [
            {"params": prompts, "weight_decay": train.weight_decay},
            {"params": gates, "weight_decay": 0.0, "lr_scale": gate_lr_scale},
        ],
        lr=train.learning_rate,
        betas=(0.9, 0.95),
    )
    start = partial(start_from_text, job.model, job.task.train[0].ids) if prompt_init == "text" else None
    job.finetune(optimizer, arguments, start=start)


if __name__ == "__main__":
    cli.run(main)
