"""One prompt at a time: the ids of its answer as they are chosen, its text as it arrives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_llama.data.prompts import encode_prompt, stop_ids
from lit_llama.devices.blocks import keep_in_step
from lit_llama.devices.inference import NextLogits
from lit_llama.devices.launch import log_rank0, print_rank0, rank
from lit_llama.generate.decode import check_length, decoding, next_token
from lit_llama.generate.load import LoadedModel
from lit_llama.model import LLaMA
from lit_llama.settings import Sampling
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@torch.inference_mode()
def generate(
    model: LLaMA,
    prompt: list[int],
    max_new_tokens: int,
    stop: set[int],
    sampling: Sampling = Sampling(),
    next_logits: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """The ids of the answer one by one, without the stop id that ends it. Raises UserError if it cannot fit."""
    check_length(model, len(prompt), max_new_tokens)
    prompt = model.virtual_ids + prompt
    with decoding(model, 1, len(prompt) + max_new_tokens):
        yield from decode(model, prompt, 0, max_new_tokens, stop, sampling, next_logits=next_logits)


@torch.inference_mode()
def decode(
    model: LLaMA,
    ids: list[int],
    cached: int,
    max_new_tokens: int,
    stop: set[int],
    sampling: Sampling,
    generator: torch.Generator | None = None,
    next_logits: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """Continue ``ids``. The model's KV cache holds the first ``cached`` of them, and has room for the rest.

    ``next_logits`` replaces the forward pass, idx (1, T) and cache slots (T,) -> (1, V): see devices/inference.py.
    """
    device = model.transformer.wte.weight.device
    generator = generator or torch.Generator(device).manual_seed(sampling.seed)
    idx = torch.tensor([ids[cached:]], device=device)  # first the prompt, then one token at a time
    input_pos = torch.arange(cached, len(ids), device=device)
    next_logits = next_logits or (lambda idx, input_pos: model.lm_head(model.hidden_states(idx, input_pos)[:, -1]))
    for _ in range(max_new_tokens):
        token = next_token(next_logits(idx, input_pos), sampling, generator)  # (1,)
        if int(token) in stop:
            return
        yield int(token)
        idx, input_pos = token[:, None], input_pos[-1:] + 1


def reply(
    model: LLaMA,
    tokenizer: Tokenizer,
    template: str,
    prompt: str,
    input: str = "",
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),
) -> str:
    """The answer to one prompt."""
    ids = encode_prompt([{"role": "user", "content": prompt, "input": input}], template, tokenizer)
    return tokenizer.decode(generate(model, ids, max_new_tokens, stop_ids(template, tokenizer), sampling))


def stream_text(tokenizer: Tokenizer, ids: Iterator[int], seen: list[int]) -> Iterator[str]:
    """The text in parts as ids arrive, which are appended to ``seen``.

    A character whose bytes span several tokens waits for the last of them.
    """
    shown = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(seen)
    if text != shown:
        yield text[len(shown) :]


def stream_answer(
    loaded: LoadedModel, prompt: str, input: str, max_new_tokens: int, sampling: Sampling, fabric: Fabric | None
) -> None:
    """Print the answer to one prompt as its tokens arrive, and tokens/s on stderr.

    With ``fabric``, all ranks compute the answer of a sharded model, and rank 0 prints it.
    """
    model, tokenizer, template = loaded.model, loaded.tokenizer, loaded.chat_template
    ids = encode_prompt([{"role": "user", "content": prompt, "input": input}], template, tokenizer)
    tokens = generate(model, ids, max_new_tokens, stop_ids(template, tokenizer), sampling, NextLogits(model))
    answer: list[int] = []
    started = time.perf_counter()
    with keep_in_step(fabric, model):  # different devices may round differently and end their answers at other tokens
        for text in stream_text(tokenizer, tokens, answer):
            if rank() == 0:
                print(text, end="", flush=True)
    seconds = time.perf_counter() - started
    print_rank0()
    log_rank0(f"{len(answer)} tokens in {seconds:.1f} s, {len(answer) / seconds:.1f} tokens/s")
