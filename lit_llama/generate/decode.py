"""From a prompt to an answer: sampling, streaming, and batches of prompts of different lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_llama.cli import UserError
from lit_llama.data.prompts import encode_prompt, stop_ids
from lit_llama.devices.blocks import keep_in_step
from lit_llama.devices.cuda_graphs import NextLogits
from lit_llama.devices.launch import log_rank0, print_rank0, rank
from lit_llama.model import LLaMA
from lit_llama.settings import Sampling
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric


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
    if prompt_tokens < 1:
        raise UserError("the prompt is empty: there is nothing to continue")
    if max_new_tokens < 1 or prompt_tokens + max_new_tokens > model.max_text_tokens:
        left = model.max_text_tokens - prompt_tokens
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens {max_new_tokens} do not fit the context of "
            f"{model.max_text_tokens} tokens; shorten the prompt"
            + (f" or choose max_new_tokens from 1 to {left}" if left > 0 else "")
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
    with decoding(model, 1, len(prompt) + max_new_tokens):
        yield from decode(model, prompt, 0, max_new_tokens, stop, sampling or Sampling())


@torch.inference_mode()
def decode(
    model: LLaMA,
    ids: list[int],
    cached: int,
    max_new_tokens: int,
    stop: set[int],
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Go on after ``ids`` with a KV cache that has room and holds the first ``cached`` of them: these are not fed."""
    device = model.transformer.wte.weight.device
    generator = generator or torch.Generator(device).manual_seed(sampling.seed)
    idx = torch.tensor([ids[cached:]], device=device)
    input_pos = torch.arange(cached, len(ids), device=device)
    next_logits = NextLogits(model)
    for _ in range(max_new_tokens):
        token = next_token(next_logits(idx, input_pos), sampling, generator)  # (1,)
        if int(token) in stop:
            return
        yield int(token)
        idx, input_pos = token[:, None], input_pos[-1:] + 1  # the whole prompt, then one token at a time


@torch.inference_mode()
def generate_batch(
    model: LLaMA,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: set[int] | list[set[int]],
    sampling: Sampling | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The answers to several prompts, decoded together: in float32 the greedy ones are those of ``generate``.

    In bfloat16 they may differ after some tokens: a sum is rounded by the shape of its product, and two tokens may be
    nearly as likely. Prompts are padded at the left, so that all rows write the same slot of the cache; rows that have
    ended go on until all have. ``ended`` tells of an answer so far whether it is whole.
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
    open_rows = set(range(len(prompts)))
    with decoding(model, len(prompts), width + max_new_tokens):
        input_pos = torch.arange(width, device=device)
        for _ in range(max_new_tokens):
            hidden = model.hidden_states(idx, input_pos, pad)
            tokens = next_token(model.lm_head(hidden[:, -1]), sampling, generator)
            for row, token in enumerate(tokens.tolist()):
                if token in stops[row]:
                    open_rows.discard(row)
                elif row in open_rows:
                    answers[row].append(token)
                    if ended is not None and ended(answers[row]):
                        open_rows.discard(row)
            if not open_rows:
                break
            idx, input_pos = tokens[:, None], input_pos[-1:] + 1
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


def reply(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: str,
    prompt: str,
    input: str = "",
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
) -> str:
    """The answer to one prompt."""
    ids = encode_prompt([{"role": "user", "content": prompt, "input": input}], style, tokenizer)
    return tokenizer.decode(generate(model, ids, max_new_tokens, stop_ids(style, tokenizer), sampling))


def stream_answer(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: str,
    prompt: str,
    input: str,
    max_new_tokens: int,
    sampling: Sampling,
    fabric: Fabric | None = None,
) -> None:
    """Print the answer to one prompt as its tokens arrive, and tokens/s on stderr.

    ``fabric``: of the ranks that share a sharded model. All compute the answer, and the first one prints it.
    """
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
    with keep_in_step(fabric, model):  # unlike devices may round unlike, and end their answers at other tokens
        for text in stream_text(tokenizer, counted(ids)):
            if rank() == 0:
                print(text, end="", flush=True)
    seconds = time.perf_counter() - started
    print_rank0()
    log_rank0(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s")
