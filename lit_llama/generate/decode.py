"""Batches of prompts: their answers, decoded with a KV cache, or their labels' probabilities. And sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lit_llama.common.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.settings import Sampling


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
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # never the likeliest token
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check_length(model: LLaMA, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises UserError unless prompt and answer fit the model's context."""
    if prompt_tokens < 1:
        raise UserError("the prompt is empty: there is nothing to continue")
    left = model.max_text_tokens - prompt_tokens
    if not 1 <= max_new_tokens <= left:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens {max_new_tokens} do not fit the context of "
            f"{model.max_text_tokens} tokens; shorten the prompt"
            + (f" or choose max_new_tokens from 1 to {left}" if left > 0 else "")
        )


@contextmanager
def decoding(model: LLaMA, batch_size: int, length: int) -> Iterator[None]:
    """Give the model a KV cache and put it in evaluation mode; undo both afterwards."""
    training = model.training
    model.eval()
    model.set_kv_cache(batch_size, length)
    try:
        yield
    finally:
        model.clear_kv_cache()
        model.train(training)


@torch.inference_mode()
def generate_batch(
    model: LLaMA,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: set[int] | list[set[int]],
    sampling: Sampling = Sampling(),
) -> list[list[int]]:
    """The answers to several prompts, decoded together until all have ended. ``stop`` may differ per prompt.

    Greedy answers in float32 equal those of ``generate``. In bfloat16 they may differ, because the shape of a product
    changes its rounding, and two tokens may be nearly as likely.
    """
    for length in {max(map(len, prompts)), min(map(len, prompts))}:
        check_length(model, length, max_new_tokens)
    prompts = [model.virtual_ids + prompt for prompt in prompts]
    stops = stop if isinstance(stop, list) else [stop] * len(prompts)
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    # Prompts are padded at the left, so that all rows write the same slot of the cache.
    width = max(map(len, prompts))
    idx = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    pad = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    input_pos = torch.arange(width, device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    with decoding(model, len(prompts), width + max_new_tokens):
        for _ in range(max_new_tokens):
            hidden = model.hidden_states(idx, input_pos, pad)
            tokens = next_token(model.lm_head(hidden[:, -1]), sampling, generator)
            unfinished -= {row for row, token in enumerate(tokens.tolist()) if token in stops[row]}
            for row in unfinished:
                answers[row].append(int(tokens[row]))
            if not unfinished:
                break
            idx, input_pos = tokens[:, None], input_pos[-1:] + 1
    return answers


@torch.inference_mode()
def text_vectors(
    model: LLaMA, texts: list[list[int]], tick: Callable[[int], object] = lambda count: None
) -> np.ndarray:
    """The vector after the final norm at each text's last token, (n, C) in float32. Texts are token ids.

    Texts of similar length share a batch of at most 4096 tokens with padding. ``tick`` gets the number of its texts.
    """
    vectors = np.empty((len(texts), model.config.n_embd), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    while order:
        longest = len(texts[order[-1]])
        rows = order[-max(1, 4096 // longest) :]
        del order[-len(rows) :]
        idx = torch.tensor([texts[i] + [0] * (longest - len(texts[i])) for i in rows])
        hidden = model.hidden_states(idx.to(model.transformer.wte.weight.device))  # causal: padding is never seen
        last = torch.tensor([len(texts[i]) - 1 for i in rows])
        vectors[rows] = hidden[torch.arange(len(rows)), last].float().cpu().numpy()
        tick(len(rows))
    return vectors


@torch.inference_mode()
def label_probabilities(model: LLaMA, prompts: list[list[int]]) -> np.ndarray:
    """The probability of each label, (n, labels), by a model whose head is a classifier."""
    training = model.training
    vectors = torch.from_numpy(text_vectors(model.eval(), prompts))
    model.train(training)
    return model.lm_head(vectors.to(model.lm_head.weight.device)).softmax(-1).cpu().numpy()
