"""Finetune with LLaMA-Adapter V2: the adapter, a scale and a bias on every linear layer, and the norms.

    python finetune/adapter_v2.py
    python finetune/adapter_v2.py --data my.json --out_dir out/my

Paper: https://arxiv.org/abs/2304.15010. What it adds to the model: lit_llama/methods/adapter_v2.py.
"""

from lit_llama import cli
from lit_llama.job import Job
from lit_llama.settings import TrainArgs


def main(
    prompt_length: int = 10,
    start_layer: int = 2,
    scale_head: bool = True,
    # Prompts learn at the full rate, all that starts at the base's own values at a tenth of it.
    other_lr_scale: float = 0.1,
    train: TrainArgs = TrainArgs(max_steps=450, batch_size=4, learning_rate=1e-2, weight_decay=0.02, eval_every=150),
    **shared,
) -> None:
    """Finetune a base with LLaMA-Adapter V2.

    Args:
        prompt_length: Rows of the learned prompt in each block (K).
        start_layer: The first block that gets a prompt.
        scale_head: Whether the language head, too, gets a scale and a bias.
        other_lr_scale: All but the prompts learn at this share of the learning rate.
        train: The settings that every finetune script shares.
    """
    import torch

    from lit_llama.methods.adapter_v2 import add_adapter_v2
    from lit_llama.trained import trained_tensors

    job = Job("adapter_v2", train, head="language", **shared)
    arguments = dict(prompt_length=prompt_length, start_layer=start_layer, scale_head=scale_head)
    add_adapter_v2(job.model, **arguments)

    prompts = [block.attn.adapter_wte.weight for block in job.model.transformer.h[start_layer:]]
    others = [tensor for tensor in trained_tensors(job.model).values() if not any(tensor is p for p in prompts)]
    optimizer = torch.optim.AdamW(
        [
            {"params": prompts, "weight_decay": train.weight_decay},
            {"params": others, "weight_decay": 0.0, "lr_scale": other_lr_scale},
        ],
        lr=train.learning_rate,
        betas=(0.9, 0.95),
    )
    job.finetune(optimizer, arguments)


if __name__ == "__main__":
    cli.run(main)
