"""The training loop that every finetune script calls: ``fit``.

A step is ``batch_size`` samples, chosen by the step's number alone. They are cut into micro-batches by tokens, shared
among the ranks, and the loss is the sum over all target tokens divided by their number: neither the size of the
micro-batches nor the number of devices changes the gradient. (Dropout alone, where a method has it, draws its mask for
a micro-batch as a whole.)
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_llama.batches import IGNORE, Encoded, collate, micro_batches, step_indices
from lit_llama.checkpoint import trained_tensors
from lit_llama.cli import Interrupted, UserError
from lit_llama.model import LLaMA
from lit_llama.runs import Run, catch_interrupt
from lit_llama.sharding import idle_passes, keep_in_step

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass
class TrainArgs:
    """The settings that every finetune script shares.

    Args:
        max_steps: Optimizer steps in all.
        epochs: Passes over the training samples; where it is given, max_steps does not count.
        batch_size: Samples of one optimizer step, on all devices together.
        micro_batch_tokens: Tokens, padding included, of one forward and backward pass: less takes less memory.
        max_seq_length: Longer samples are cut to this many tokens.
        learning_rate: The highest rate, reached at the end of the warm-up.
        warmup_steps: Optimizer steps over which the rate rises in a line, by default a tenth; a cosine to 0 follows.
        weight_decay: AdamW's, on what the method's paper decays.
        clip: The gradient's norm is cut to this; 0 switches that off.
        eval_every: Steps between validations; there is one at the end in any case.
        save_every: Steps between saves of the state that --resume goes on from.
        seed: Of the order of samples and of everything drawn at random.
    """

    max_steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    micro_batch_tokens: int = 1024
    max_seq_length: int = 512
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int = 50
    save_every: int = 25
    seed: int = 1337

    def __post_init__(self):
        if self.max_steps is None and self.epochs is None:
            raise UserError("give --train.max_steps or --train.epochs")
        at_least_1 = ("max_steps", "epochs", "batch_size", "micro_batch_tokens", "eval_every", "save_every")
        for name in at_least_1:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "clip"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise UserError(f"--train.{name} must not be negative, got {getattr(self, name)}")
        if self.max_seq_length < 3:
            raise UserError(f"--train.max_seq_length must be at least 3, got {self.max_seq_length}")

    def total_steps(self, n_samples: int) -> int:
        return self.max_steps if self.epochs is None else math.ceil(self.epochs * n_samples / self.batch_size)


def learning_rate_at(step: int, total_steps: int, args: TrainArgs) -> float:
    """Of optimizer step ``step`` (from 0): a line up to ``learning_rate``, then a cosine that ends at 0."""
    warmup_steps = total_steps // 10 if args.warmup_steps is None else args.warmup_steps
    if step < warmup_steps:
        return args.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------- loss


def target_loss(model: LLaMA, ids: Tensor, targets: Tensor, chunk_size: int = 384) -> Tensor:
    """Cross-entropy summed over the target tokens, a float32 scalar. ids and targets (B, T).

    Only positions with a target reach the head. More than ``chunk_size`` of them do so in chunks, and again in the
    backward pass: the float32 logits of a whole batch, its largest tensor by far, never exist.
    """
    if model.virtual_ids:
        virtual = torch.tensor([model.virtual_ids], device=ids.device).expand(len(ids), -1)
        ids, targets = torch.cat((virtual, ids), 1), F.pad(targets, (virtual.size(1), 0), value=IGNORE)
    where = targets != IGNORE
    hidden, targets = model.hidden_states(ids)[where], targets[where]  # (n, C) and (n,)
    if len(targets) <= chunk_size:
        return head_loss(model.lm_head, hidden, targets)
    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    losses = [checkpoint(head_loss, model.lm_head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


def head_loss(lm_head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = lm_head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def share(batches: list[list[Encoded]], world_size: int) -> list[list[list[Encoded]]]:
    """The micro-batches of every rank: each goes to the rank that has the fewest tokens so far."""
    tokens, shares = [0] * world_size, [[] for _ in range(world_size)]
    for batch in sorted(batches, key=lambda batch: len(batch) * len(batch[0].ids), reverse=True):
        least = tokens.index(min(tokens))
        tokens[least] += len(batch) * len(batch[0].ids)
        shares[least].append(batch)
    return shares


def step_gradient(fabric: Fabric, model: LLaMA, samples: list[Encoded], micro_batch_tokens: int) -> float:
    """Leave the gradient of one step in ``.grad`` on every rank, and return the step's loss per target token."""
    params = list(trained_tensors(model).values())
    n_targets = sum(sample.n_targets for sample in samples)
    loss = torch.zeros(1, device=fabric.device)
    shares = share(micro_batches(samples, micro_batch_tokens), fabric.world_size)
    for batch in shares[fabric.global_rank]:
        batch_loss = target_loss(model, *collate(batch, fabric.device)) / n_targets
        fabric.backward(batch_loss)
        loss += batch_loss.detach()
    for _ in range(idle_passes(model, [len(batches) for batches in shares], fabric.global_rank)):
        fabric.backward(0 * target_loss(model, *collate(samples[:1], fabric.device)))
    if fabric.world_size > 1:
        sum_over_ranks(fabric, params)
        loss = fabric.all_reduce(loss, reduce_op="sum")
    return loss.item()


BUCKET_NUMBERS = 2**24  # of gradients that travel together, where no single tensor has more


def sum_over_ranks(fabric: Fabric, params: list[torch.nn.Parameter]) -> None:
    """Make every gradient the sum of all ranks', in place.

    DistributedDataParallel would average, and hang where a rank has no work.
    """
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    buckets: list[list[Tensor]] = [[]]
    for p in params:
        if buckets[-1] and sum(g.numel() for g in buckets[-1]) + p.numel() > BUCKET_NUMBERS:
            buckets.append([])
        buckets[-1].append(p.grad)
    for gradients in buckets:
        flat = fabric.all_reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="sum")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def validate(fabric: Fabric, model: LLaMA, data: list[Encoded], micro_batch_tokens: int) -> float:
    """Loss per target token over all of ``data``, each sample counted once whatever the number of ranks."""
    training = model.training
    model.eval()
    loss = torch.zeros(1, device=fabric.device)
    with keep_in_step(fabric, model):
        for batch in share(micro_batches(data, micro_batch_tokens), fabric.world_size)[fabric.global_rank]:
            loss += target_loss(model, *collate(batch, fabric.device))
    model.train(training)
    return (fabric.all_reduce(loss, reduce_op="sum") / sum(sample.n_targets for sample in data)).item()


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
    ``run`` was opened to resume. Ctrl-C finishes the step, saves, and raises Interrupted.
    """
    total_steps = args.total_steps(len(train_data))
    if (args.warmup_steps or 0) >= total_steps:
        raise UserError(f"--train.warmup_steps {args.warmup_steps} must be less than the {total_steps} steps in all")
    step = run.load_state(model, optimizer)
    model.train()
    with catch_interrupt() as interrupt, run.progress(step, total_steps) as bar:
        while step < total_steps:
            started = time.perf_counter()
            samples = step_indices(step, args.batch_size, len(train_data), args.seed, args.epochs)
            batch = [train_data[i] for i in samples]
            lr = learning_rate_at(step, total_steps, args)
            torch.manual_seed(1_000_003 * args.seed + step)  # dropout too depends on the step alone
            try:
                loss = train_step(fabric, model, optimizer, batch, lr, args)
            except NotFinite as error:
                run.save_state(model, optimizer, step)
                raise UserError(f"step {step + 1}, samples {samples}: {error}; {LOWER_THE_RATE}") from None
            step += 1
            seconds = time.perf_counter() - started
            due = step % args.eval_every == 0 or step == total_steps
            val_loss = validate(fabric, model, val_data, args.micro_batch_tokens) if due else None
            stopping = interrupt.seen(fabric)
            run.log(bar, step, loss, lr, sum(len(sample.ids) for sample in batch), seconds, val_loss)
            if val_loss is not None:
                if not math.isfinite(val_loss):
                    raise UserError(f"step {step}: the validation loss is {val_loss}; {LOWER_THE_RATE}")
                run.keep_best(model, val_loss)
            if step % args.save_every == 0 or step == total_steps or stopping:
                run.save_state(model, optimizer, step)
            if stopping:
                raise Interrupted(
                    f"stopped and saved at step {step} of {total_steps}; the same command with --resume goes on"
                )
    run.load_best(model)


LOWER_THE_RATE = (
    "the last good step is saved. Start anew with a lower --train.learning_rate or --train.clip (--overwrite), "
    "or look at the samples"
)


class NotFinite(Exception):
    """A loss or a gradient that is NaN or infinite."""


def train_step(
    fabric: Fabric, model: LLaMA, optimizer: torch.optim.Optimizer, samples: list[Encoded], lr: float, args: TrainArgs
) -> float:
    """One optimizer step; returns the loss before it. NotFinite leaves the weights as they are."""
    loss = step_gradient(fabric, model, samples, args.micro_batch_tokens)
    params = [p for p in trained_tensors(model).values() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, args.clip or math.inf).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFinite(f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss
