"""How good a model is on samples: the loss of the expected answers, and exact match of its own answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lit_llama.common.errors import UserError, check_range
from lit_llama.data.batches import TokenizedSample
from lit_llama.data.prompts import encode_prompt, stop_ids, user_text
from lit_llama.data.samples import Sample
from lit_llama.data.task import Task
from lit_llama.devices.blocks import keep_in_step
from lit_llama.devices.launch import Bar, print_rank0
from lit_llama.generate.decode import generate_batch, label_probabilities
from lit_llama.model import LLaMA
from lit_llama.settings import MAX_COUNT
from lit_llama.tokenizer import Tokenizer
from lit_llama.train.loss import LOWER_THE_RATE, split_by_tokens, target_loss

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def map_over_ranks(fabric: Fabric, model: LLaMA | None, items: list, work: Callable[[list], list]) -> list:
    """The results of ``work`` on ``items``, in order, on every rank. Each rank works on its part of them.

    A sharded ``model`` that ``work`` runs is kept in step.
    """
    own = items[fabric.global_rank :: fabric.world_size]
    with keep_in_step(fabric, model):
        done = work(own) if own else []
    if fabric.world_size == 1:
        return done
    parts: list[list] = [[]] * fabric.world_size
    torch.distributed.all_gather_object(parts, done)
    results = [None] * len(items)
    for i, part in enumerate(parts):
        results[i :: fabric.world_size] = part
    return results


def longest_answer(tokenizer: Tokenizer, samples: list[Sample]) -> int:
    """Tokens to generate: one more than the longest expected answer, so that one that does not stop is wrong."""
    return 1 + max((len(tokenizer.encode(sample.answer)) for sample in samples), default=0)


def answer_samples(
    model: LLaMA,
    tokenizer: Tokenizer,
    template: str,
    samples: list[Sample],
    max_new_tokens: int,
    batch_size: int = 32,
    name: str = "answering",
) -> list[str]:
    """The model's greedy answer to each sample's prompt, in order. Prompts of similar length are decoded together."""
    prompts = [encode_prompt(sample.prompt, template, tokenizer) for sample in samples]
    # A prompt near the context's end gets a shorter answer, in a batch of its own.
    max_new = [max(1, min(max_new_tokens, model.max_text_tokens - len(prompt))) for prompt in prompts]
    order = sorted(range(len(samples)), key=lambda i: (max_new[i], len(prompts[i])))
    answers = [""] * len(samples)
    with Bar(len(samples), name) as bar:
        while order:
            rows = [i for i in order[:batch_size] if max_new[i] == max_new[order[0]]]
            order = order[len(rows) :]
            tokens = generate_batch(model, [prompts[i] for i in rows], max_new[rows[0]], stop_ids(template, tokenizer))
            for i, ids in zip(rows, tokens, strict=True):
                answers[i] = tokenizer.decode(ids).strip()
            bar.update(len(rows))
    return answers


def is_right(answer: str, sample: Sample) -> bool:
    """Whether an answer is exactly the expected text, apart from surrounding whitespace."""
    return answer.strip() == sample.answer.strip()


@torch.no_grad()
def validate(fabric: Fabric, model: LLaMA, data: list[TokenizedSample], micro_batch_tokens: int) -> float:
    """Loss per target token over all of ``data``. Each rank computes its part."""
    training = model.training
    model.eval()
    loss = torch.zeros((), device=fabric.device)
    batches = split_by_tokens(data, micro_batch_tokens, fabric, model)
    with Bar(len(batches), "validation", leave=False) as bar:
        for batch in batches:
            loss += target_loss(model, batch)
            bar.update()
    model.train(training)
    summed: Any = fabric.all_reduce(loss, reduce_op="sum")
    mean = summed.item() / sum(sample.n_targets for sample in data)
    if not math.isfinite(mean):
        raise UserError(f"the validation loss is {mean}; {LOWER_THE_RATE}")
    return mean


class BeforeAfter:
    """Answers to held-out samples at several points of a run, and how many are right. Each rank answers its part."""

    def __init__(self, fabric: Fabric, task: Task, n_samples: int) -> None:
        check_range("--eval_samples", n_samples, 0, MAX_COUNT)
        self.fabric, self.task, self.samples = fabric, task, task.held_out[:n_samples]
        self.answers: dict[str, list[str]] = {}

    def ask(self, when: str, model: LLaMA) -> None:
        """Answer the samples. Does nothing before a base is sharded, or before a classifier has its head."""
        task, labels = self.task, self.task.labels
        unsharded = model.transformer.wte.weight.device.type != self.fabric.device.type  # a base to be sharded
        if unsharded or labels and model.lm_head.out_features != len(labels):
            return
        encoded = task.validation[: len(self.samples)]  # for a classifier the same samples
        longest = longest_answer(task.tokenizer, self.samples)

        def answer(own: list[int]) -> list[str]:
            if labels:
                chosen = label_probabilities(model, [encoded[i].ids.tolist() for i in own]).argmax(1)
                return [labels[i] for i in chosen]
            samples = [self.samples[i] for i in own]
            return answer_samples(model, task.tokenizer, task.chat_template, samples, longest, name=when)

        self.answers[when] = map_over_ranks(self.fabric, model, list(range(len(self.samples))), answer)

    def show(self, n_examples: int = 3) -> None:
        """Print some samples with their answers, then the exact match at each point."""
        if not self.samples:
            return
        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        for i, sample in enumerate(self.samples[:n_examples]):
            print_rank0(f"\nprompt    {user_text(sample.prompt[-1])}\nexpected  {sample.answer}")
            for when, answers in self.answers.items():
                print_rank0(f"{when:8}  {bold}{answers[i]}{plain}")
        print_rank0()
        for when, answers in self.answers.items():
            right = sum(is_right(*pair) for pair in zip(answers, self.samples, strict=True))
            print_rank0(f"exact match {when}: {100 * right / len(self.samples):.1f} %")
