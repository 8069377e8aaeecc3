"""How good a model is on samples: the loss of their answers, and whether its own answers are the same."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from lit_llama import ranks
from lit_llama.cli import UserError
from lit_llama.data import Sample, Task
from lit_llama.generate import generate_batch
from lit_llama.model import LLaMA
from lit_llama.prompts import encode_prompt, stop_ids, user_text
from lit_llama.sharding import keep_in_step
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def answer_samples(
    model: LLaMA, tokenizer: Tokenizer, style: str, samples: list[Sample], batch_size: int = 32, name: str = "answering"
) -> list[str]:
    """The model's greedy answer to each sample's prompt, in their order, decoded in batches of similar length.

    An answer may be one token longer than the longest expected one: whatever goes on beyond that is wrong already.
    """
    if not samples:
        return []
    prompts = [encode_prompt(sample.prompt, style, tokenizer) for sample in samples]
    longest = max(len(tokenizer.encode(sample.answer)) for sample in samples)
    order = sorted(range(len(samples)), key=lambda i: len(prompts[i]))
    answers = [""] * len(samples)
    hidden = not (sys.stderr.isatty() and ranks.is_first())
    with tqdm(total=len(samples), desc=name, unit="sample", disable=hidden, dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            room = model.context - len(model.virtual_ids) - max(len(prompts[i]) for i in rows)
            tokens = generate_batch(
                model, [prompts[i] for i in rows], min(longest + 1, max(1, room)), stop_ids(style, tokenizer)
            )
            for i, ids in zip(rows, tokens, strict=True):
                answers[i] = tokenizer.decode(ids).strip()
            bar.update(len(rows))
    return answers


@torch.inference_mode()
def choose_labels(model: LLaMA, prompts: list[list[int]], labels: list[str], batch_size: int = 32) -> list[str]:
    """The likeliest label of each prompt (ids), by a model whose head is a classifier."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    chosen = [""] * len(prompts)
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        logits = model.lm_head(model.last_vectors([prompts[i] for i in rows]))  # (rows, labels)
        for i, label in zip(rows, logits.argmax(-1).tolist(), strict=True):
            chosen[i] = labels[label]
    return chosen


def count_correct(answers: list[str], samples: list[Sample]) -> int:
    """How many answers are the expected text to the letter, blanks around it aside."""
    return sum(answer.strip() == sample.answer.strip() for answer, sample in zip(answers, samples, strict=True))


class Comparison:
    """The answers to held-out samples at several points of a run, shared among the ranks, and how many are right."""

    def __init__(self, fabric: Fabric, task: Task, n_samples: int) -> None:
        if n_samples < 0:
            raise UserError(f"--eval_samples {n_samples} must not be negative")
        self.fabric, self.task = fabric, task
        self.n_samples = min(n_samples, len(task.held_out))
        self.samples = task.held_out[: self.n_samples][fabric.global_rank :: fabric.world_size]
        self.answers: dict[str, list[str]] = {}

    def answer(self, when: str, model: LLaMA) -> None:
        task, samples = self.task, self.samples
        with keep_in_step(self.fabric, model):
            if task.labels is not None:
                encoded = task.validation[: self.n_samples][self.fabric.global_rank :: self.fabric.world_size]
                self.answers[when] = choose_labels(model, [sample.ids for sample in encoded], task.labels)
            else:
                self.answers[when] = answer_samples(model, task.tokenizer, task.prompt_style, samples, name=when)

    def show(self, n_examples: int = 3) -> None:
        """Print some samples with their answers, then the exact match at each point."""
        if not self.n_samples:
            return
        for i, sample in enumerate(self.samples[:n_examples]):
            ranks.say(f"\nprompt    {user_text(sample.prompt[-1])}\nexpected  {sample.answer}")
            for when, answers in self.answers.items():
                ranks.say(f"{when:8}  {answers[i]}")
        ranks.say()
        for when, answers in self.answers.items():
            correct = torch.tensor(float(count_correct(answers, self.samples)), device=self.fabric.device)
            share = self.fabric.all_reduce(correct, reduce_op="sum").item() / self.n_samples
            ranks.say(f"exact match {when}: {share:.1%}".replace("%", " %"))
