"""Finetune the output layers: the last blocks, the final norm and the head.

    python finetune/output_layers.py
    python finetune/output_layers.py --head classifier --data data/intents      # a new head: a row for each label

All below stays as it is. What it trains of the model: lit_llama/methods/output_layers.py.
"""

from lit_llama import cli
from lit_llama.job import Job
from lit_llama.settings import TrainArgs


def main(
    n_blocks: int = 2,
    head: str = "language",
    train: TrainArgs = TrainArgs(max_steps=450, batch_size=4, learning_rate=1e-3, weight_decay=0.01, eval_every=150),
    **shared,
) -> None:
    """Finetune the output layers of a base.

    Args:
        n_blocks: How many of the last blocks train.
        head: The "language" head, or a new "classifier" of the data's labels.
        train: The settings that every finetune script shares.
    """
    import torch

    from lit_llama import ranks
    from lit_llama.methods.output_layers import add_output_layers
    from lit_llama.trained import trained_tensors

    job = Job("output_layers", train, head=head, **shared)
    arguments = dict(n_blocks=n_blocks, labels=job.task.labels)
    add_output_layers(job.model, **arguments)
    if job.model.config.tie_embeddings and job.task.labels is None:
        ranks.say("the head shared the embedding's weight; it has its own now, so the embedding stays frozen")

    optimizer = torch.optim.AdamW(
        trained_tensors(job.model).values(), lr=train.learning_rate, weight_decay=train.weight_decay
    )
    job.finetune(optimizer, arguments)


if __name__ == "__main__":
    cli.run(main)
