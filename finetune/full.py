"""Finetune all layers.

    python finetune/full.py
    python finetune/full.py --head classifier --data data/intents      # a new head: a row for each label

The trained folder is a checkpoint folder: generate/base.py and every script take it as a base.
What it trains of the model: lit_llama/methods/full.py.
"""

from lit_llama import cli
from lit_llama.job import Job
from lit_llama.settings import TrainArgs


def main(
    head: str = "language",
    train: TrainArgs = TrainArgs(
        max_steps=450, batch_size=4, learning_rate=3e-5, weight_decay=0.01, eval_every=150, save_every=150
    ),
    **shared,
) -> None:
    """Finetune all layers of a base.

    Args:
        head: The "language" head, or a new "classifier" of the data's labels.
        train: The settings that every finetune script shares.
    """
    import torch

    from lit_llama.methods.full import add_full
    from lit_llama.trained import trained_tensors

    job = Job("full", train, head=head, **shared)
    arguments = dict(labels=job.task.labels)
    add_full(job.model, **arguments)

    optimizer = torch.optim.AdamW(
        trained_tensors(job.model).values(), lr=train.learning_rate, weight_decay=train.weight_decay
    )
    job.finetune(optimizer, arguments, whole_model=job.task.labels is None)


if __name__ == "__main__":
    cli.run(main)
