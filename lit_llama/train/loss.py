"""Loss and gradient of a step.

The loss is the sum over all target tokens, divided by their number on all ranks. So the gradient depends on neither the
size of the micro-batches nor the number of devices. (With dropout, the mask depends on the micro-batch.)
"""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_llama.common.errors import UserError
from lit_llama.data.batches import IGNORE, Packing, TokenizedSample, micro_batches
from lit_llama.devices.blocks import is_sharded
from lit_llama.model import LLaMA
from lit_llama.settings import HEAD_CHUNK
from lit_llama.trained import trained_tensors

if TYPE_CHECKING:
    from lightning.fabric import Fabric

LOWER_THE_RATE = "start again with a lower --train.learning_rate or --train.clip (--overwrite), or look at the samples"


def target_loss(
    model: LLaMA, ids: Tensor, targets: Tensor, lengths: list[int] | None = None, chunk_size: int = HEAD_CHUNK
) -> Tensor:
    """Cross-entropy summed over the target tokens, a float32 scalar. ids and targets (B, T).

    With the rows' ``lengths``, only attention computes padding. Only positions with a target reach the head, in chunks
    of ``chunk_size`` that the backward pass recomputes: the float32 logits of a whole batch, by far the largest tensor,
    never exist.
    """
    hidden, targets, _ = target_vectors(model, ids, targets, lengths)
    if len(targets) <= chunk_size:
        return head_loss(model.lm_head, hidden, targets)
    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    losses = [checkpoint(head_loss, model.lm_head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


def target_vectors(
    model: LLaMA, ids: Tensor, targets: Tensor, lengths: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The n positions of ids (B, T) that have a target: vectors (n, C), targets (n,), and a mask of them (B, T')."""
    more = padded_width(model, ids) - ids.size(1)
    ids, targets = F.pad(ids, (0, more)), F.pad(targets, (0, more), value=IGNORE)
    if model.virtual_ids:
        virtual = torch.tensor([model.virtual_ids], device=ids.device).expand(len(ids), -1)
        ids, targets = torch.cat((virtual, ids), 1), F.pad(targets, (virtual.size(1), 0), value=IGNORE)
    where = targets != IGNORE
    if lengths is None or min(lengths) == ids.size(1) - len(model.virtual_ids):  # nothing is padded
        return model.hidden_states(ids)[where], targets[where], where
    packing = Packing(
        [n + len(model.virtual_ids) for n in lengths], ids.size(1), ids.device, shape_multiple(model, ids)
    )
    hidden = model.hidden_states(ids, packing=packing)[packing.unpad(where)]
    return hidden, targets[where], where


def shape_multiple(model: LLaMA, ids: Tensor) -> int:
    """A batch's width and number of tokens are rounded up to a multiple of this: 8 in bfloat16 on a CPU, else 1.

    oneDNN compiles a kernel for every new shape and keeps a thousand of them: 375 steps on bookings, each of another
    length, took 2.5 GB more memory.
    """
    return 8 if ids.device.type == "cpu" and model.dtype == torch.bfloat16 else 1


def padded_width(model: LLaMA, ids: Tensor) -> int:
    """Width of a batch of ids (B, T) after padding: the next multiple of ``shape_multiple`` that fits the context."""
    T, multiple = ids.size(1), shape_multiple(model, ids)
    return max(T, min(-(-T // multiple) * multiple, model.max_text_tokens))


def head_loss(lm_head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = lm_head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def split_by_tokens(
    samples: list[TokenizedSample], micro_batch_tokens: int, fabric: Fabric, model: LLaMA
) -> list[list[TokenizedSample]]:
    """This rank's micro-batches of a step. Each sample, longest first, goes to the rank with the fewest tokens so far.

    All ranks must run a sharded model equally often, so a rank with fewer micro-batches gets more, without targets.
    """
    parts = [micro_batches(part, micro_batch_tokens) for part in split_evenly(samples, fabric.world_size)]
    own = parts[fabric.global_rank]
    if is_sharded(model):
        idle = replace(samples[0], targets=array("i", [IGNORE]) * len(samples[0].targets))
        own = own + [[idle]] * (max(map(len, parts)) - len(own))
    return own


def split_evenly(samples: list[TokenizedSample], world_size: int) -> list[list[TokenizedSample]]:
    """The samples of each rank. Their token counts differ by at most the longest sample."""
    tokens = [0] * world_size
    parts: list[list[TokenizedSample]] = [[] for _ in range(world_size)]
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        least = tokens.index(min(tokens))
        tokens[least] += len(sample.ids)
        parts[least].append(sample)
    return parts


BUCKET_PARAMETERS = 2**24  # gradients summed by one all-reduce


def sum_over_ranks(fabric: Fabric, model: LLaMA, loss: Tensor) -> Tensor:
    """Sum the gradients over all ranks, in place, and return the sum of their losses.

    DistributedDataParallel would average them, and hang if a rank has no micro-batch.
    """
    if fabric.world_size == 1:
        return loss
    buckets: list[list[Tensor]] = [[]]
    for p in trained_tensors(model).values():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if buckets[-1] and sum(g.numel() for g in buckets[-1]) + p.numel() > BUCKET_PARAMETERS:
            buckets.append([])
        buckets[-1].append(p.grad)
    for gradients in buckets:
        flat: Any = fabric.all_reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="sum")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    summed: Any = fabric.all_reduce(loss, reduce_op="sum")
    return summed


@torch.no_grad()
def broadcast_trained(fabric: Fabric, model: LLaMA) -> None:
    """Copy rank 0's trainable parameters to all ranks: their initialization may round differently on other machines."""
    if fabric.world_size > 1:
        for tensor in trained_tensors(model).values():
            torch.distributed.broadcast(tensor.detach(), src=0)


def clip_gradient(model: LLaMA, max_norm: float, step: int, batch: list[TokenizedSample]) -> float:
    """Clip the gradient's norm to ``max_norm`` (0: no limit) and return the norm before clipping.

    Raises UserError with the step (counted from 1) and its samples if it is not finite; the weights are unchanged.
    """
    params = [p for p in trained_tensors(model).values() if p.grad is not None]
    try:
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm or math.inf, error_if_nonfinite=True)
    except RuntimeError:
        where = ", ".join(sample.where for sample in batch)
        raise UserError(f"step {step + 1}: the gradient is not finite; {LOWER_THE_RATE}. Samples: {where}") from None
    return norm.item()
