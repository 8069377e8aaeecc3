"""Which samples a step takes, and how they are split into micro-batches."""

from __future__ import annotations

import math
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


def step_indices(step: int, batch_size: int, n_samples: int, seed: int, epochs: float | None = None) -> list[int]:
    """The samples of an optimizer step: a pure function, so a resumed run needs only the step number.

    Each epoch is a permutation drawn from (seed, epoch). After ``epochs``, the last step may be smaller.
    """
    stream = range(step * batch_size, (step + 1) * batch_size)
    if epochs is not None:
        stream = range(stream.start, min(stream.stop, math.ceil(epochs * n_samples)))
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


class Packing:
    """Removes the padding of a batch (B, T): N tokens in one row, and back.

    Only attention needs the (B, T) form. Everything else works on single tokens and skips the padding.
    """

    def __init__(self, lengths: list[int], T: int, device: torch.device | str = "cpu", multiple: int = 1) -> None:
        """Keep the first ``lengths`` tokens of each row, and enough padding to make N a ``multiple``."""
        places = [row * T + t for row, length in enumerate(lengths) for t in range(length)]
        padding = [row * T + t for row, length in enumerate(lengths) for t in range(length, T)]
        places += padding[: -len(places) % multiple]
        self.shape = torch.Size((len(lengths), T))
        self.places = torch.tensor(places, device=device)  # (N,) within B * T

    def unpad(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def pad(self, x: Tensor) -> Tensor:
        """(1, heads, N, hs) -> (B, heads, T, hs), with zeros as padding, at which causal attention never looks."""
        rows = x[0].transpose(0, 1)  # (N, heads, hs)
        padded = rows.new_zeros(self.shape.numel(), *rows.shape[1:]).index_copy(0, self.places, rows)
        return padded.unflatten(0, self.shape).transpose(1, 2)
