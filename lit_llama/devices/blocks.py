"""Wrappers around the blocks: compilation, activation checkpointing, and sharding.

Sharding (--strategy fsdp): every rank holds a part of each block's frozen weights, and gathers a block when it runs.

    rank 0   h[0] 1/2   h[1] 1/2  ...        forward and backward, one block after the other:
    rank 1   h[0] 2/2   h[1] 2/2  ...        gather its weights -> compute -> free the other ranks' part

PyTorch's FSDP2 does it (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html). Trainable parameters
are few and stay whole, in float32, on every rank, so gradients, clipping, optimizer and files are the same as without
sharding. The embedding, the last norm and the head also stay whole: 0.5 of the 13 GB of LLaMA-7B.

Gathering is a collective operation, so all ranks must run the model equally often. A rank without work runs it on
samples without targets (train/loss.py) or waits in ``keep_in_step``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_llama.common.errors import UserError
from lit_llama.model import LLaMA

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def wrap_blocks(model: LLaMA, compile: bool = False, checkpointing: bool = False, packed: bool = True) -> None:
    """Replace every block's forward; ``unwrap_blocks`` restores it.

    ``compile`` runs torch.compile on each block. It takes a minute or more, then runs fewer and larger kernels: on CUDA
    one set for each size of a ``packed`` row, of which there are few (train/loss.py), else one set for all sizes.
    ``checkpointing`` keeps only a block's input and recomputes the rest in the backward pass
    (https://arxiv.org/abs/1604.06174); blocks below the first trainable one need no backward pass.
    """
    first = first_trained(model)
    static = packed and model.transformer.wte.weight.device.type == "cuda"
    if compile:
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # blocks that differ only in hooks (LoRA) are different
        torch._dynamo.config.cache_size_limit = 64  # variants: with a method, a gradient, padding, in validation, ...
    for i, block in enumerate(model.transformer.h):
        forward = block.forward
        if compile:
            forward = torch.compile(forward, dynamic=not static)
        if checkpointing and i >= first:
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward


def unwrap_blocks(model: LLaMA) -> None:
    for block in model.transformer.h:
        block.__dict__.pop("forward", None)  # the class's own forward applies again


def first_trained(model: LLaMA) -> int:
    """The first block that needs a backward pass; 0 if anything before the blocks trains, n_layer if nothing does."""
    if any(p.requires_grad for p in model.transformer.wte.parameters()) or model.reparametrization is not None:
        return 0
    trains = [any(p.requires_grad for p in block.parameters()) for block in model.transformer.h]
    return trains.index(True) if True in trains else len(trains)


def shard(fabric: Fabric, model: LLaMA, dtype: torch.dtype) -> None:
    """Shard the frozen weights of each block, cast to ``dtype``, across the ranks' devices.

    The model may be on the CPU, memory-mapped: it is cast and moved one block at a time. The method must have been
    added. Raises UserError if no block has a frozen weight.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if all(param.requires_grad for block in model.transformer.h for param in block.parameters()):
        raise UserError("--strategy fsdp shards a frozen base, but here every block trains; pass --strategy ddp")
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
    trained = {param for param in model.parameters() if param.requires_grad}
    for block in model.transformer.h:
        place(block, dtype, fabric.device)
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    place(model, dtype, fabric.device)
    whole = {param for param in model.parameters() if not is_shard(param)}
    fully_shard(model, mesh=mesh, ignored_params=whole)  # nothing left to shard, but it prefetches the blocks
    register_fsdp_forward_method(model, "hidden_states")
    with torch.no_grad():  # FSDP allocates its buffers in the first pass; training cannot use those of inference mode
        model.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=fabric.device))


def is_shard(param: torch.Tensor) -> bool:
    return hasattr(param, "device_mesh")


def is_sharded(model: LLaMA) -> bool:
    return any(map(is_shard, model.parameters()))


def place(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Move weights that are not sharded to ``device``, frozen ones as ``dtype``. They stay the same Parameters."""
    for param in module.parameters():
        if not is_shard(param):
            param.data = param.data.to(device, param.dtype if param.requires_grad else dtype)


@contextmanager
def keep_in_step(fabric: Fabric | None, model: LLaMA | None) -> Iterator[None]:
    """Let ranks run a sharded model, without gradients, a different number of times.

    Before each pass the ranks count those still at work. A rank that has finished runs empty passes until all have.
    """
    if fabric is None or model is None or not is_sharded(model):
        yield
        return
    hidden_states, device = model.hidden_states, fabric.device

    def announced(*args, **kwargs) -> torch.Tensor:
        fabric.all_reduce(torch.ones(1, device=device), reduce_op="sum")
        return hidden_states(*args, **kwargs)

    model.__dict__["hidden_states"] = announced
    try:
        yield
    finally:
        model.__dict__["hidden_states"] = hidden_states
    with torch.no_grad():
        while bool(fabric.all_reduce(torch.zeros(1, device=device), reduce_op="sum")):
            hidden_states(torch.zeros(1, 1, dtype=torch.long, device=device))
