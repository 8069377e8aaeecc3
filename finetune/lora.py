"""Finetune with LoRA: a product of two thin matrices beside the projections of queries and values.

    python finetune/lora.py
    python finetune/lora.py --targets '[q, k, v, proj, fc1, fc2, mlp_proj]'      # all seven matrices of a block

Paper: https://arxiv.org/abs/2106.09685. What it adds to the model: lit_llama/methods/lora.py.
"""

from lit_llama import cli
from lit_llama.job import Job
from lit_llama.settings import TrainArgs


def main(
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    targets: tuple[str, ...] = ("q", "v"),
    start_layer: int = 0,
    # A small model trained for a few hundred steps takes ten times the 3e-4 that is common for 7B.
    train: TrainArgs = TrainArgs(max_steps=450, batch_size=4, learning_rate=3e-3, eval_every=150),
    **shared,
) -> None:
    """Finetune a base with LoRA.

    Args:
        r: The rank: rows of A and columns of B.
        alpha: The product is scaled by alpha / r.
        dropout: On what goes into A, while training.
        targets: Matrices with a pair (A, B): some of q, k, v, proj, fc1, fc2, mlp_proj.
        start_layer: The first block that gets pairs; the ones below stay as they are.
        train: The settings that every finetune script shares.
    """
    import torch

    from lit_llama.methods.lora import add_lora
    from lit_llama.trained import trained_tensors

    job = Job("lora", train, head="language", **shared)
    arguments = dict(r=r, alpha=alpha, dropout=dropout, targets=list(targets), start_layer=start_layer)
    add_lora(job.model, **arguments)

    optimizer = torch.optim.AdamW(
        trained_tensors(job.model).values(), lr=train.learning_rate, weight_decay=train.weight_decay
    )
    job.finetune(optimizer, arguments)


if __name__ == "__main__":
    cli.run(main)
