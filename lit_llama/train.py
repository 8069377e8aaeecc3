"""The training loop that every finetune script calls: ``fit``.

A step is ``batch_size`` samples, chosen by the step's number alone. They are cut into micro-batches by tokens, shared
among the ranks, and the loss is the sum over all target tokens divided by their number: neither the size of the
micro-batches nor the number of devices changes the gradient. (Dropout alone, where a method has it, draws its mask for
a micro-batch as a whole.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_llama.batches import IGNORE, Encoded, Packing, collate, micro_batches, step_indices
from lit_llama.cli import Interrupted, UserError
from lit_llama.model import LLaMA
from lit_llama.runs import Run
from lit_llama.settings import TrainArgs
from lit_llama.sharding import idle_passes, keep_in_step
from lit_llama.signals import catch_interrupt
from lit_llama.trained import trained_tensors

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def learning_rate_at(step: int, total_steps: int, args: TrainArgs) -> float:
    """Of optimizer step ``step`` (from 0): a line up to ``learning_rate``, then a cosine that ends at 0."""
    warmup = warmup_steps(total_steps, args)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_steps(total_steps: int, args: TrainArgs) -> int:
    return total_steps // 10 if args.warmup_steps is None else args.warmup_steps


# ---------------------------------------------------------------------------------------------- loss


def target_loss(
    model: LLaMA, ids: Tensor, targets: Tensor, lengths: list[int] | None = None, chunk_size: int = 384
) -> Tensor:
    """Cross-entropy summed over the target tokens, a float32 scalar. ids and targets (B, T).

    Where the rows' ``lengths`` are told, attention alone computes their padding.

    Only positions with a target reach the head. More than ``chunk_size`` of them do so in chunks, and again in the
    backward pass: the float32 logits of a whole batch, its largest tensor by far, never exist.
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
    """Of the n positions of ids (B, T) that have a target: vectors (n, C), targets (n,), and where they are (B, T')."""
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
    hidden = model.hidden_states(ids, packing=packing)[packing.gather(where)]
    return hidden, targets[where], where


def shape_multiple(model: LLaMA, ids: Tensor) -> int:
    """What a batch's width and its number of tokens are rounded up to: a multiple of 8 in bfloat16 on a CPU, else of 1.

    oneDNN compiles a kernel for every new shape and keeps a thousand of them: 375 steps on bookings, each with a length
    of its own, took 2.5 GB of memory, and no less time.
    """
    return 8 if ids.device.type == "cpu" and model.dtype == torch.bfloat16 else 1


def padded_width(model: LLaMA, ids: Tensor) -> int:
    """How wide a batch of ids (B, T) is made: the next multiple of ``shape_multiple`` that fits the context."""
    T, multiple = ids.size(1), shape_multiple(model, ids)
    return max(T, min(-(-T // multiple) * multiple, model.text_room))


def head_loss(lm_head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = lm_head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def share(samples: list[Encoded], micro_batch_tokens: int, world_size: int) -> list[list[list[Encoded]]]:
    """The micro-batches of every rank: each sample, longest first, goes to the rank that has the fewest tokens so far.

    So all ranks have work where there are samples enough, and differ by the tokens of the longest at most.
    """
    tokens = [0] * world_size
    shares: list[list[Encoded]] = [[] for _ in range(world_size)]
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        least = tokens.index(min(tokens))
        tokens[least] += len(sample.ids)
        shares[least].append(sample)
    return [micro_batches(own, micro_batch_tokens) for own in shares]


def step_gradient(
    fabric: Fabric,
    model: LLaMA,
    samples: list[Encoded],
    micro_batch_tokens: int,
    stop: Callable[[], bool] = lambda: False,
) -> float:
    """Leave the gradient of one step in ``.grad`` on every rank, and return the step's loss per target token.

    ``stop`` is asked before each micro-batch: StepLeft where it says so.
    """
    n_targets = sum(sample.n_targets for sample in samples)
    loss: Any = torch.zeros(1, device=fabric.device)
    shares = share(samples, micro_batch_tokens, fabric.world_size)
    for batch in shares[fabric.global_rank]:
        if stop():
            raise StepLeft
        batch_loss = target_loss(model, *collate(batch, fabric.device)) / n_targets
        fabric.backward(batch_loss)
        loss += batch_loss.detach()
    for _ in range(idle_passes(model, [len(batches) for batches in shares], fabric.global_rank)):
        fabric.backward(0 * target_loss(model, *collate(samples[:1], fabric.device)))
    if fabric.world_size > 1:
        sum_over_ranks(fabric, list(trained_tensors(model).values()))
        loss = fabric.all_reduce(loss, reduce_op="sum")
    return loss.item()


BUCKET_NUMBERS = 2**24  # of gradients that travel together, where no single tensor has more


def sum_over_ranks(fabric: Fabric, params: list[Tensor]) -> None:
    """Make every gradient the sum of all ranks', in place.

    DistributedDataParallel would average, and hang where a rank has no work.
    """
    buckets: list[list[Tensor]] = [[]]
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if buckets[-1] and sum(g.numel() for g in buckets[-1]) + p.numel() > BUCKET_NUMBERS:
            buckets.append([])
        buckets[-1].append(p.grad)
    for gradients in buckets:
        flat: Any = fabric.all_reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="sum")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def start_alike(fabric: Fabric, model: LLaMA) -> None:
    """Give every rank rank 0's trained tensors: another machine may round otherwise what they are computed from."""
    if fabric.world_size > 1:
        for tensor in trained_tensors(model).values():
            torch.distributed.broadcast(tensor.detach(), src=0)


@torch.no_grad()
def validate(fabric: Fabric, model: LLaMA, data: list[Encoded], micro_batch_tokens: int) -> float:
    """Loss per target token over all of ``data``, each sample counted once whatever the number of ranks."""
    training = model.training
    model.eval()
    loss = torch.zeros(1, device=fabric.device)
    with keep_in_step(fabric, model):
        for batch in share(data, micro_batch_tokens, fabric.world_size)[fabric.global_rank]:
            loss += target_loss(model, *collate(batch, fabric.device))
    model.train(training)
    summed: Any = fabric.all_reduce(loss, reduce_op="sum")
    return (summed / sum(sample.n_targets for sample in data)).item()


# ---------------------------------------------------------------------------------------------- the loop


def fit(
    fabric: Fabric,
    model: LLaMA,
    optimizer: torch.optim.Optimizer,
    train_data: list[Encoded],
    val_data: list[Encoded],
    args: TrainArgs,
    run: Run,
) -> None:
    """Train what of ``model`` requires a gradient, and leave it at its best validated step.

    Writes the best step, metrics.csv and the state to resume from into the run's folder; goes on from there where
    ``run`` was opened to resume. Ctrl-C finishes the micro-batch, saves, and raises Interrupted: a resumed run takes a
    step that was left half done from its beginning. After a step's last micro-batch, and with several ranks, the step
    is finished first, with its validation where one is due.
    """
    total_steps = args.total_steps(len(train_data))
    step = run.load_state(model, optimizer)
    start_alike(fabric, model)
    alone = fabric.world_size == 1  # several ranks agree between steps on whether to stop
    look_at = 40 + 2 * warmup_steps(total_steps, args)  # enough steps to tell whether the loss moves
    model.train()
    with catch_interrupt() as interrupt, run.progress(step, total_steps) as bar:
        while step < total_steps:
            started = time.perf_counter()
            samples = step_indices(step, args.batch_size, len(train_data), args.seed, args.epochs)
            batch = [train_data[i] for i in samples]
            lr = learning_rate_at(step, total_steps, args)
            torch.manual_seed(1_000_003 * args.seed + step)  # dropout too depends on the step alone
            try:
                loss = train_step(fabric, model, optimizer, batch, lr, args, lambda: alone and interrupt.came)
            except StepLeft:
                run.save_state(model, optimizer, step)
                raise interrupted(step, total_steps) from None
            except NotFinite as error:
                run.save_state(model, optimizer, step)
                where = ", ".join(sample.where or str(i) for i, sample in zip(samples, batch, strict=True))
                raise UserError(f"step {step + 1}, samples {where}: {error}; {LOWER_THE_RATE}") from None
            step += 1
            seconds = time.perf_counter() - started
            due = step % args.eval_every == 0 or step == total_steps
            val_loss = validate(fabric, model, val_data, args.micro_batch_tokens) if due else None
            stopping = interrupt.seen(fabric)
            run.log(bar, step, loss, lr, sum(len(sample.ids) for sample in batch), seconds, val_loss)
            if step == look_at:
                run.warn_if_stuck()
            if val_loss is not None:
                if not math.isfinite(val_loss):
                    raise UserError(f"step {step}: the validation loss is {val_loss}; {LOWER_THE_RATE}")
                run.keep_best(model, val_loss)
            if step % args.save_every == 0 or step == total_steps or stopping:
                run.save_state(model, optimizer, step)
            if stopping:
                raise interrupted(step, total_steps)
    run.load_best(model)


def interrupted(step: int, total_steps: int) -> Interrupted:
    return Interrupted(f"stopped and saved at step {step} of {total_steps}; the same command with --resume goes on")


LOWER_THE_RATE = (
    "the last good step is saved. Start anew with a lower --train.learning_rate or --train.clip (--overwrite), "
    "or look at the samples"
)


class NotFinite(Exception):
    """A loss or a gradient that is NaN or infinite."""


class StepLeft(Exception):
    """A step that was stopped between two micro-batches."""


def train_step(
    fabric: Fabric,
    model: LLaMA,
    optimizer: torch.optim.Optimizer,
    samples: list[Encoded],
    lr: float,
    args: TrainArgs,
    stop: Callable[[], bool] = lambda: False,
) -> float:
    """One optimizer step; returns the loss before it. NotFinite and StepLeft leave the weights as they are."""
    try:
        loss = step_gradient(fabric, model, samples, args.micro_batch_tokens, stop)
        params = [p for p in trained_tensors(model).values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}")
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
    finally:  # however a step ends, its gradient ends with it
        optimizer.zero_grad(set_to_none=True)
    return loss
