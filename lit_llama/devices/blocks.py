"""How the blocks run: compiled, or in training recomputed in the backward pass to save memory."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from lit_llama.devices.quantize import prepack
from lit_llama.model import LLaMA


def wrap_blocks(model: LLaMA, compile: bool = False, checkpointing: bool = False) -> None:
    """Replace the forward pass of every block; ``unwrap_blocks`` puts the plain one back.

    ``compile``: by torch.compile, each block alone and for all lengths: a minute or more once, then fewer and larger
    kernels.
    ``checkpointing``: keep a block's input alone and compute the rest again in the backward pass
    (https://arxiv.org/abs/1604.06174). Blocks below the first one that trains build no graph, and are left out.
    """
    first = first_trained(model)
    if compile:  # by default it takes a block for another one that differs in its hooks alone, as LoRA's do
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        # and gives up after eight variants: with a method or without, a gradient or not, padding or not, in validation
        torch._dynamo.config.cache_size_limit = 64
    for i, block in enumerate(model.transformer.h):
        forward = block.forward
        if compile:
            forward = torch.compile(forward, dynamic=True)
        if checkpointing and i >= first:
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward


def unwrap_blocks(model: LLaMA) -> None:
    for block in model.transformer.h:
        block.__dict__.pop("forward", None)  # the class's own is left


def prepare_for_inference(model: LLaMA, compile: bool = False) -> None:
    """Make a model faster that only answers from now on: prepack it, or compile its blocks and prepack the head alone.

    Blocks are never both: torch.compile has no kernels for prepacked weights.
    """
    prepack(model, blocks=not compile)
    wrap_blocks(model, compile=compile)


def first_trained(model: LLaMA) -> int:
    """The first block that builds a graph: where something trains, be it the embedding in front of all."""
    if any(p.requires_grad for p in model.transformer.wte.parameters()) or model.reparametrization is not None:
        return 0
    trains = [any(p.requires_grad for p in block.parameters()) for block in model.transformer.h]
    return trains.index(True) if True in trains else len(trains)
