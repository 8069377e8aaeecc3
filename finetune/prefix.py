"""Finetune with prefix tuning: learned keys and values in front of the text's own, in every block.

    python finetune/prefix.py
    python finetune/prefix.py --mlp_size 512      # made by an MLP while training, as in the paper

Paper: https://arxiv.org/abs/2101.00190. What it adds to the model: lit_llama/methods/prefix.py.
"""

from lit_llama import cli
from lit_llama.job import Job
from lit_llama.settings import TrainArgs


def main(
    prompt_length: int = 10,
    mlp_size: int = 0,
    train: TrainArgs = TrainArgs(max_steps=450, batch_size=4, learning_rate=3e-2, eval_every=150),
    **shared,
) -> None:
    """Finetune a base with prefix tuning.

    Args:
        prompt_length: Learned keys and values in each block (K).
        mlp_size: Width of the MLP that makes them while training; 0 trains them directly.
        train: The settings that every finetune script shares.
    """
    import torch

    from lit_llama.methods.prefix import add_prefix
    from lit_llama.trained import trained_tensors

    job = Job("prefix", train, head="language", **shared)
    arguments = dict(prompt_length=prompt_length, mlp_size=mlp_size)
    add_prefix(job.model, **arguments)

    optimizer = torch.optim.AdamW(
        trained_tensors(job.model).values(), lr=train.learning_rate, weight_decay=train.weight_decay
    )
    job.finetune(optimizer, arguments)


if __name__ == "__main__":
    cli.run(main)
