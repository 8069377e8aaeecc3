"""Answers that are printed as their tokens arrive."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lit_llama.data.prompts import encode_prompt, stop_ids
from lit_llama.devices.blocks import keep_in_step
from lit_llama.devices.inference import NextLogits
from lit_llama.devices.launch import log_rank0, print_rank0, rank
from lit_llama.generate.decode import generate
from lit_llama.generate.load import LoadedModel
from lit_llama.settings import Sampling
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric


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
