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
from lit_llama.data.batches import IGNORE, TokenizedSample, micro_batches, pack
from lit_llama.devices.blocks import is_sharded
from lit_llama.model import Linear, LLaMA
from lit_llama.settings import HEAD_CHUNK
from lit_llama.trained import trainable_parameters

if TYPE_CHECKING:
    from lightning.fabric import Fabric

LOWER_THE_RATE = "start again (--overwrite) with a lower --train.learning_rate or --train.clip, or check the samples"


def target_loss(model: LLaMA, samples: list[TokenizedSample], chunk_size: int = HEAD_CHUNK) -> Tensor:
    """Cross-entropy summed over the samples' target tokens, a float32 scalar, in one pass through the model.

    Only positions with a target reach the head, in chunks of ``chunk_size``: the float32 logits of a whole batch, by
    far the largest tensor, never exist. To train on another loss, change ``head_loss`` and delete the branch with
    FrozenHeadLoss, which computes the same loss and, by hand, its gradient.
    """
    hidden, targets = target_vectors(model, samples)
    head = model.lm_head
    hooks = head._forward_hooks or head._forward_pre_hooks
    frozen = type(head) is Linear and not hooks and not any(p.requires_grad for p in head.parameters())
    if frozen and hidden.requires_grad:
        return FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets, chunk_size)
    if len(targets) <= chunk_size:
        return head_loss(head, hidden, targets)
    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    return torch.stack([checkpoint(head_loss, head, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def target_vectors(model: LLaMA, samples: list[TokenizedSample]) -> tuple[Tensor, Tensor]:
    """The vectors (n, C) at the n positions that have a target, sample by sample, and the targets (n,)."""
    device = model.transformer.wte.weight.device
    # Lengths of texts and of packed rows are rounded up, so that few shapes occur. In bfloat16 on a CPU, oneDNN
    # compiles a kernel for every new shape and keeps a thousand of them: 375 steps on bookings, each of another length,
    # took 2.5 GB more memory. On CUDA, tensors of a few sizes are reused.
    text_multiple = row_multiple = 8 if model.dtype == torch.bfloat16 else 1
    if device.type == "cuda":
        text_multiple, row_multiple = 1, 256
    batch = pack(samples, device, model.virtual_ids, text_multiple, row_multiple, model.context)
    hidden = model.hidden_states(batch.ids, texts=batch.texts)
    return hidden[0].index_select(0, batch.places), batch.targets


def head_loss(lm_head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = lm_head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


class FrozenHeadLoss(torch.autograd.Function):
    """``head_loss`` of a frozen head, z = W h + b. The forward pass also computes the gradient of h, chunk by chunk:

        loss = sum of logsumexp(z) - z[target]        d loss / d h = W^T (softmax(z) - onehot(target))

    Both need the logits, which are then dropped. A backward pass would have to compute them again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_size: int
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        losses = []
        for h, target, dh in zip(*(t.split(chunk_size) for t in (hidden, targets, gradient)), strict=True):
            z = F.linear(h, weight, bias)
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            z -= z.amax(-1, keepdim=True)
            z_target = z.gather(1, target[:, None])
            total = z.exp_().sum(-1, keepdim=True)  # in place: z is the largest tensor of all
            losses.append((total.log() - z_target).sum())
            dz = z.div_(total).scatter_add_(1, target[:, None], -torch.ones_like(total))
            torch.mm(dz.to(h.dtype), weight, out=dh)
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss.to(gradient.dtype), None, None, None, None


def split_by_tokens(
    samples: list[TokenizedSample], micro_batch_tokens: int, fabric: Fabric, model: LLaMA
) -> list[list[TokenizedSample]]:
    """This rank's micro-batches: its part of the samples, in batches of at most ``micro_batch_tokens``.

    All ranks must run a sharded model equally often, so a rank with fewer micro-batches gets more, without targets.
    """
    parts = [micro_batches(part, micro_batch_tokens) for part in split_evenly(samples, fabric.world_size)]
    own = parts[fabric.global_rank]
    if is_sharded(model):
        idle = replace(samples[0], targets=array("i", [IGNORE]) * len(samples[0].targets))
        own = own + [[idle]] * (max(map(len, parts)) - len(own))
    return own


def split_evenly(samples: list[TokenizedSample], world_size: int) -> list[list[TokenizedSample]]:
    """The samples of each rank. Each, longest first, goes to the rank with the fewest tokens so far."""
    tokens = [0] * world_size
    parts: list[list[TokenizedSample]] = [[] for _ in range(world_size)]
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        least = tokens.index(min(tokens))
        tokens[least] += len(sample.ids)
        parts[least].append(sample)
    return parts


def sum_gradients(fabric: Fabric, model: LLaMA) -> None:
    """Sum the gradients over all ranks, in place.

    DistributedDataParallel would average them, and hang if a rank has no micro-batch.
    """
    if fabric.world_size > 1:
        for p in trainable_parameters(model).values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)


@torch.no_grad()
def broadcast_trained(fabric: Fabric, model: LLaMA) -> None:
    """Copy rank 0's trainable parameters to all ranks: their initialization may round differently on other machines."""
    if fabric.world_size > 1:
        for tensor in trainable_parameters(model).values():
            torch.distributed.broadcast(tensor.detach(), src=0)


def check_finite(loss: Tensor, grad_norm: Tensor, step: int, batch: list[TokenizedSample]) -> tuple[float, float]:
    """Loss and norm as Python numbers, read from the device together.

    Raises UserError with the step (counted from 1) and its samples if the norm is not finite, before the optimizer
    changes any weight.
    """
    loss_value, norm_value = torch.stack((loss.float(), grad_norm.float())).tolist()
    if not math.isfinite(norm_value):
        where = ", ".join(sample.where for sample in batch)
        raise UserError(f"step {step + 1}: the gradient is not finite; {LOWER_THE_RATE}. Samples: {where}")
    return loss_value, norm_value
