"""Which samples a step takes, and how they are split into micro-batches."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # the target of a position that is not trained on


@dataclass(slots=True)
class TokenizedSample:
    """Input ids (T,) and targets (T,), each the next token or IGNORE, as arrays of int32: 8 bytes per token."""

    ids: array[int]
    targets: array[int]
    cut: bool = False  # its end was cut off
    where: str = ""  # file and line, for messages to the user

    @property
    def n_targets(self) -> int:
        return len(self.targets) - self.targets.count(IGNORE)


def step_indices(step: int, batch_size: int, n_samples: int, seed: int, epochs: int | None = None) -> list[int]:
    """The samples of an optimizer step: a pure function, so a resumed run needs only the step number.

    Each epoch is a permutation drawn from (seed, epoch). The last of several ``epochs`` may end with a smaller step.
    """
    stream = range(step * batch_size, (step + 1) * batch_size)
    if epochs is not None:
        stream = range(stream.start, min(stream.stop, epochs * n_samples))
    return [epoch_order(seed, i // n_samples, n_samples)[i % n_samples] for i in stream]


@lru_cache(maxsize=1)  # 200,000 samples take 0.1 s
def epoch_order(seed: int, epoch: int, n_samples: int) -> array[int]:
    order = array("i", range(n_samples))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def micro_batches(samples: list[TokenizedSample], max_tokens: int) -> list[list[TokenizedSample]]:
    """Split samples, longest first, into batches of at most ``max_tokens`` tokens including padding.

    A sample shorter than half of its batch's longest starts a new batch. Only attention computes the padding, so a
    sample with less padding costs less than another pass.
    """
    batches: list[list[TokenizedSample]] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        width = len(batches[-1][0].ids) if batches else 0
        if batches and (len(batches[-1]) + 1) * width <= max_tokens and 2 * len(sample.ids) >= width:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def collate(samples: list[TokenizedSample], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, list[int]]:
    """ids (B, T), targets (B, T) and the rows' lengths. Padding is at the right, where causal attention never looks."""
    lengths = [len(sample.ids) for sample in samples]
    ids = np.zeros((len(samples), max(lengths)), dtype=np.int64)
    targets = np.full_like(ids, IGNORE)
    for row, sample in enumerate(samples):
        ids[row, : lengths[row]] = sample.ids
        targets[row, : lengths[row]] = sample.targets
    return torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device), lengths


class GatherRows(torch.autograd.Function):
    """x (M, ...), index (N,) -> x[index] (N, ...). The gradient is dy[back] (M, ...), and zero in the rows ``unused``.

    Only valid if the whole gradient of a row arrives at its place in ``back`` (M,). The gradient of index_select would
    add up rows that were taken twice, on a GPU by atomic operations that all hit the row that padding repeats.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, back: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(back, unused)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        back, unused = ctx.saved_tensors
        return dy.index_select(0, back).index_fill_(0, unused, 0), None, None, None


class Packing:
    """Removes the padding of a batch (B, T): N tokens in one row, and back.

    Only attention needs the (B, T) form. Everything else works on single tokens and skips the padding.
    """

    def __init__(self, lengths: list[int], T: int, device: torch.device | str = "cpu", multiple: int = 1) -> None:
        """Keep the first ``lengths`` tokens of each row, and enough padding to make N a ``multiple``."""
        places = [row * T + t for row, length in enumerate(lengths) for t in range(length)]
        padding = [row * T + t for row, length in enumerate(lengths) for t in range(length, T)]
        fill = -len(places) % multiple
        places, padding = places + padding[:fill], padding[fill:]
        order = [0] * (len(lengths) * T)  # padding repeats the first token; causal attention never sees it
        for i, place in enumerate(places):
            order[place] = i
        self.shape = torch.Size((len(lengths), T))
        self.places = torch.tensor(places, device=device)  # (N,) within B * T
        self.order = torch.tensor(order, device=device)  # (B * T,) within N
        self.padding = torch.tensor(padding, device=device, dtype=torch.long)  # the rest of B * T

    def unpad(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return GatherRows.apply(x.flatten(0, 1), self.places, self.order, self.padding)[None]

    def pad(self, x: Tensor) -> Tensor:
        """(1, heads, N, hs) -> (B, heads, T, hs). Autograd keeps only the indices.

        The gradient of padding is dropped. It is zero: ``unpad`` gives none to queries in padding, and no other query
        sees their keys.
        """
        rows = GatherRows.apply(x[0].transpose(0, 1), self.order, self.places, self.padding[:0])
        return rows.unflatten(0, self.shape).transpose(1, 2)
