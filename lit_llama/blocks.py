"""How the blocks run: compiled, or in training recomputed in the backward pass to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from lit_llama.model import LLaMA
from lit_llama.quantize import prepack


@contextmanager
def block_forwards(model: LLaMA, compile: bool = False, checkpointing: bool = False) -> Iterator[None]:
    """Replace the forward pass of every block, and put the plain one back afterwards.

    ``compile``: by torch.compile, each block alone and for all lengths: a minute or more once, then fewer and larger
    kernels.
    ``checkpointing``: keep a block's input alone and compute the rest again in the backward pass
    (https://arxiv.org/abs/1604.06174). Blocks below the first one that trains build no graph, and are left out.
    """
    blocks, first = model.transformer.h, first_trained(model)
    for i, block in enumerate(blocks):
        forward = block.forward
        if compile:
            forward = torch.compile(forward, dynamic=True)
        if checkpointing and i >= first:
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward
    try:
        with tell_blocks_apart() if compile else nullcontext():
            yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is left


@contextmanager
def inference_blocks(model: LLaMA, compile: bool = False) -> Iterator[None]:
    """Make a model faster that only answers from now on: prepack it, or compile its blocks and prepack the head alone.

    Blocks are never both: torch.compile has no kernels for prepacked weights.
    """
    prepack(model, blocks=not compile)
    with block_forwards(model, compile=compile):
        yield


def tell_blocks_apart() -> AbstractContextManager:
    """Settings of torch.compile for blocks that share one function and differ in what they do.

    By default it takes a block for another one that differs in its hooks alone, as LoRA's do; and it gives up after
    eight variants, of which there are more: with a method or without, an input that has a gradient or not, padding or
    not, in training and in validation.
    """
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, cache_size_limit=64)


def first_trained(model: LLaMA) -> int:
    """The first block that builds a graph: where something trains, be it the embedding in front of all."""
    if any(p.requires_grad for p in model.transformer.wte.parameters()) or model.reparametrization is not None:
        return 0
    trains = [any(p.requires_grad for p in block.parameters()) for block in model.transformer.h]
    return trains.index(True) if True in trains else len(trains)
