"""From a prompt to an answer: sampling, streaming, and batches of prompts of different lengths."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_llama.cli import UserError
from lit_llama.model import LLaMA
from lit_llama.prompts import encode_prompt, stop_ids
from lit_llama.tokenizer import Tokenizer


@dataclass
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token (greedy); higher values flatten the distribution.
        top_k: Keep only this many of the likeliest tokens.
        top_p: Keep the likeliest tokens that together hold this much probability.
        seed: Makes sampled answers repeatable.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1337

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature} must be 0 (greedy) or more")
        if self.temperature == 0 and not (self.top_k is None and self.top_p is None):
            raise UserError(
                "top_k and top_p choose among likely tokens: pass a --sampling.temperature above 0 with them"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed} must lie within 0 and {2**32 - 1}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must lie above 0 and at most at 1")


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """logits (B, V) -> token ids (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the likeliest token always stays
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check_length(model: LLaMA, prompt_tokens: int, max_new_tokens: int) -> None:
    """UserError unless prompt and answer fit the model's context."""
    block_size = model.context - len(model.virtual_ids)
    if prompt_tokens < 1:
        raise UserError("the prompt is empty: there is nothing to continue")
    if max_new_tokens < 1 or prompt_tokens + max_new_tokens > block_size:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens {max_new_tokens} do not fit the context of "
            f"{block_size} tokens; shorten the prompt or choose max_new_tokens from 1 to {block_size - prompt_tokens}"
        )


@contextmanager
def decoding(model: LLaMA, batch_size: int, length: int) -> Iterator[None]:
    """A KV cache and evaluation mode for the time of an answer; both are as before afterwards."""
    training = model.training
    model.eval()
    model.set_kv_cache(batch_size, length)
    try:
        yield
    finally:
        model.clear_kv_cache()
        model.train(training)


@torch.inference_mode()
def generate(
    model: LLaMA, prompt: list[int], max_new_tokens: int, stop: set[int], sampling: Sampling | None = None
) -> Iterator[int]:
    """The ids of the answer one by one, without the stop id that ends it."""
    check_length(model, len(prompt), max_new_tokens)
    prompt = model.virtual_ids + prompt
    sampling = sampling or Sampling()
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    with decoding(model, 1, len(prompt) + max_new_tokens):
        idx, input_pos = torch.tensor([prompt], device=device), torch.arange(len(prompt), device=device)
        for _ in range(max_new_tokens):
            hidden = model.hidden_states(idx, input_pos)  # (1, T, C): the whole prompt, then one token at a time
            token = next_token(model.lm_head(hidden[:, -1]), sampling, generator)
            if int(token) in stop:
                return
            yield int(token)
            idx, input_pos = token[:, None], input_pos[-1:] + 1


@torch.inference_mode()
def generate_batch(
    model: LLaMA,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: set[int] | list[set[int]],
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """The answers to several prompts, decoded together; greedy ones equal those of ``generate``.

    Prompts are padded at the left, so that all rows write the same slot of the cache. Rows that have ended are dropped
    once they are half of the batch.
    """
    for length in {max(map(len, prompts)), min(map(len, prompts))}:
        check_length(model, length, max_new_tokens)
    prompts = [model.virtual_ids + prompt for prompt in prompts]
    width = max(map(len, prompts))
    sampling = sampling or Sampling()
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    idx = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    pad = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    stops = stop if isinstance(stop, list) else [stop] * len(prompts)  # the ids that end each answer
    rows = list(range(len(prompts)))  # the prompt of each row of the batch
    open_rows = set(rows)
    with decoding(model, len(prompts), width + max_new_tokens):
        input_pos = torch.arange(width, device=device)
        for _ in range(max_new_tokens):
            hidden = model.hidden_states(idx, input_pos, pad)
            tokens = next_token(model.lm_head(hidden[:, -1]), sampling, generator)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if token in stops[row]:
                    open_rows.discard(row)
                elif row in open_rows:
                    answers[row].append(token)
            if not open_rows:
                break
            idx, input_pos = tokens[:, None], input_pos[-1:] + 1
            if len(open_rows) <= len(rows) // 2:
                keep = torch.tensor([i for i, row in enumerate(rows) if row in open_rows], device=device)
                rows = [row for row in rows if row in open_rows]
                idx, pad = idx[keep], pad[keep]
                model.keep_rows(keep)
    return answers


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Pieces of text as tokens arrive; a character whose bytes are spread over tokens waits for the last of them."""
    so_far: list[int] = []
    shown = ""
    for token in ids:
        so_far.append(token)
        text = tokenizer.decode(so_far)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(so_far)
    if text != shown:
        yield text[len(shown) :]


def stream_answer(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: str,
    prompt: str,
    input: str,
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Print the answer to one prompt as its tokens arrive, and tokens/s on stderr."""
    messages = [{"role": "user", "content": prompt, "input": input}]
    count, started = 0, time.perf_counter()

    def counted(ids: Iterator[int]) -> Iterator[int]:
        nonlocal count
        for token in ids:
            count += 1
            yield token

    ids = generate(
        model, encode_prompt(messages, style, tokenizer), max_new_tokens, stop_ids(style, tokenizer), sampling
    )
    for text in stream_text(tokenizer, counted(ids)):
        print(text, end="", flush=True)
    seconds = time.perf_counter() - started
    print(flush=True)
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
