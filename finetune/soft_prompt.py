"""Finetune with soft prompts: learned vectors in front of the text's own embeddings.

    python finetune/soft_prompt.py
    python finetune/soft_prompt.py --init_text "Turn the message into JSON."

Paper: https://arxiv.org/abs/2104.08691. What it adds to the model: lit_llama/methods/soft_prompt.py.
"""

from lit_llama import cli
from lit_llama.job import Job
from lit_llama.settings import TrainArgs


def main(
    prompt_length: int = 20,
    init_text: str = "",
    train: TrainArgs = TrainArgs(max_steps=450, batch_size=4, learning_rate=1e-2, eval_every=150),
    **shared,
) -> None:
    """Finetune a base with soft prompts.

    Args:
        prompt_length: Learned vectors (K).
        init_text: The vectors start as this text's embeddings, repeated or cut to fit; else as common tokens'.
        train: The settings that every finetune script shares.
    """
    import torch

    from lit_llama.methods.soft_prompt import add_soft_prompt
    from lit_llama.trained import trained_tensors

    job = Job("soft_prompt", train, head="language", **shared)
    arguments = dict(prompt_length=prompt_length)
    add_soft_prompt(job.model, **arguments, init_ids=job.task.tokenizer.encode(init_text))

    optimizer = torch.optim.AdamW(
        trained_tensors(job.model).values(), lr=train.learning_rate, weight_decay=train.weight_decay
    )
    job.finetune(optimizer, arguments)


if __name__ == "__main__":
    cli.run(main)
