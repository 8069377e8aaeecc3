"""Finetune with Houlsby adapters: a small bottleneck after attention and after the MLP of every block.

    python finetune/houlsby.py
    python finetune/houlsby.py --bottleneck_size 8

Paper: https://arxiv.org/abs/1902.00751. What it adds to the model: lit_llama/methods/houlsby.py.
"""

from lit_llama import cli
from lit_llama.job import Job
from lit_llama.settings import TrainArgs


def main(
    bottleneck_size: int = 64,
    # The paper tunes the rate over 3e-5 to 3e-3.
    train: TrainArgs = TrainArgs(max_steps=450, batch_size=4, learning_rate=1e-3, eval_every=150),
    **shared,
) -> None:
    """Finetune a base with Houlsby adapters.

    Args:
        bottleneck_size: Width of each bottleneck (m).
        train: The settings that every finetune script shares.
    """
    import torch

    from lit_llama.methods.houlsby import add_houlsby
    from lit_llama.trained import trained_tensors

    job = Job("houlsby", train, head="language", **shared)
    arguments = dict(bottleneck_size=bottleneck_size)
    add_houlsby(job.model, **arguments)

    optimizer = torch.optim.AdamW(
        trained_tensors(job.model).values(), lr=train.learning_rate, weight_decay=train.weight_decay
    )
    job.finetune(optimizer, arguments)


if __name__ == "__main__":
    cli.run(main)
