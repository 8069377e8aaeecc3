"""A frozen base in pieces: every rank keeps a share of each block's weights, and gathers a block when it is needed.

    rank 0   h[0] 1/2   h[1] 1/2  ...        forward and backward pass, one block after the other:
    rank 1   h[0] 2/2   h[1] 2/2  ...        gather its pieces -> compute -> let the others' pieces go

PyTorch's FSDP2 does it (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html). What trains is small:
it stays whole, in float32 and on every rank, so that its gradient, clipping, optimizer and files are what they are
without sharding. So do the embedding, the last norm and the head, 0.5 of the 13 GB of LLaMA-7B.

To gather is a collective, so all ranks must pass through the model equally often: one without work of its own in a step
passes with samples that have no targets (train/loss.py), one that has answered its samples goes along
(``keep_in_step``).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_llama.cli import UserError
from lit_llama.model import LLaMA

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def check_together(strategy: str, compile: bool, quantize: str) -> None:
    """UserError for flags that cannot be had together."""
    if strategy == "fsdp" and (compile or quantize != "none"):
        raise UserError("--strategy fsdp goes with neither --compile nor --quantize; pass ddp")


def check_sharding(world_size: int) -> None:
    """UserError where there is nobody to share with, or PyTorch cannot leave what trains whole."""
    try:
        from torch.distributed.fsdp import fully_shard

        able = "ignored_params" in inspect.signature(fully_shard).parameters
    except ImportError:
        able = False
    if not able:
        raise UserError(f"a base in pieces (fsdp) needs PyTorch 2.7 or newer, this is {torch.__version__}; update it")
    if world_size < 2:
        raise UserError("--strategy fsdp shares the base among devices: pass --devices 2 or more, or --strategy auto")


def shard(fabric: Fabric, model: LLaMA, dtype: torch.dtype) -> None:
    """Cut the frozen weights of each block, cast to ``dtype``, into pieces, one on each rank's device.

    The model may lie on the CPU, memory-mapped: it is cast and moved block by block, never as a whole. What trains must
    have been added; an optimizer may hold it. UserError where no block has a frozen weight left.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if all(param.requires_grad for block in model.transformer.h for param in block.parameters()):
        raise UserError("--strategy fsdp shards a frozen base, and here every block trains; pass --strategy ddp")
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
    trained = {param for param in model.parameters() if param.requires_grad}
    for block in model.transformer.h:
        place(block, dtype, fabric.device)
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    place(model, dtype, fabric.device)
    whole = {param for param in model.parameters() if not is_piece(param)}
    fully_shard(model, mesh=mesh, ignored_params=whole)  # it has no piece of its own, and fetches the blocks' in time
    register_fsdp_forward_method(model, "hidden_states")
    with torch.no_grad():  # FSDP's buffers are made in the first pass: in inference mode, training could not use them
        model.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=fabric.device))


def is_piece(param: torch.Tensor) -> bool:
    return hasattr(param, "device_mesh")


def is_sharded(model: LLaMA) -> bool:
    return any(map(is_piece, model.parameters()))


def place(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Move all whole weights to ``device``, frozen ones in ``dtype``; they stay the same Parameters."""
    for param in module.parameters():
        if not is_piece(param):
            param.data = param.data.to(device, param.dtype if param.requires_grad else dtype)


@contextmanager
def keep_in_step(fabric: Fabric | None, model: LLaMA) -> Iterator[None]:
    """Without gradients: a rank that leaves first passes through a sharded model for nothing until all have left.

    Before every pass the ranks count those that are still at work.
    """
    if fabric is None or not is_sharded(model):
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
