"""Which samples a step takes, and how they are split into micro-batches."""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lit_llama.attention import Texts

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
    """Split samples into batches of at most ``max_tokens`` tokens; a longer sample gets a batch of its own.

    Best fit: each sample, longest first, goes to the fullest batch that has room for it.
    """
    batches: list[list[TokenizedSample]] = []
    free: list[tuple[int, int]] = []  # sorted: the tokens that still fit, and the batch's index
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        fitting = bisect_left(free, (len(sample.ids), 0))
        room, i = free.pop(fitting) if fitting < len(free) else (max_tokens, len(batches))
        if i == len(batches):
            batches.append([])
        batches[i].append(sample)
        insort(free, (room - len(sample.ids), i))
    return batches


@dataclass
class Packed:
    """A micro-batch on the device: its texts one after the other in a row of N tokens, of which n have a target."""

    ids: Tensor  # (1, N)
    texts: Texts
    targets: Tensor  # (n,), sample by sample
    places: Tensor  # (n,): where in the row they are


def pack(
    samples: list[TokenizedSample],
    device: torch.device,
    virtual_ids: list[int] | None = None,
    text_multiple: int = 1,
    row_multiple: int = 1,
    context: int = 2**31,
) -> Packed:
    """Put the samples into one row, each after the ``virtual_ids``, and copy it to ``device``.

    Each text is padded to a ``text_multiple``, if it fits the ``context``, and the row to a ``row_multiple``, so that
    few shapes occur. All indices are computed here on the host, and copied at once, without waiting for the device.
    """
    before = virtual_ids or []
    real = [len(before) + len(sample.ids) for sample in samples]
    lengths = [max(n, min(round_up(n, text_multiple), context)) for n in real]
    longest, padding = max(lengths), -sum(lengths) % row_multiple
    lengths += [min(longest, padding - i) for i in range(0, padding, longest)]  # padding is texts of its own
    ends = np.cumsum(lengths)
    starts = ends - lengths
    ids, targets = np.zeros(ends[-1], dtype=np.int64), np.full(ends[-1], IGNORE)
    for sample, start, n in zip(samples, starts[: len(samples)], real, strict=True):
        ids[start : start + n] = [*before, *sample.ids]
        targets[start + len(before) : start + n] = sample.targets
    places = np.flatnonzero(targets != IGNORE)
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    bounds = np.full(round_up(len(ends) + 1, 32), ends[-1])  # the last texts may be empty: their number is a shape too
    bounds[0], bounds[1 : len(ends) + 1] = 0, ends
    parts = [ids, positions, targets[places], places, bounds]
    table = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        table = table.pin_memory()
    on_device = table.to(device, non_blocking=True).split([len(part) for part in parts])
    longest = 1 << (longest - 1).bit_length()  # a power of two: kernels are compiled for few values of it
    texts = Texts(lengths, longest, positions=on_device[1], bounds=on_device[4].int())
    return Packed(on_device[0][None], texts, targets=on_device[2], places=on_device[3])


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
