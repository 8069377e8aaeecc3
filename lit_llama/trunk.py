"""Blocks below the first changed one see the same input in every epoch: --cache_trunk computes their output once.

        once          ids -> wte -> h[0] .. h[n-1] -> a row (C,) for each token, in a file
        every epoch   rows -> h[n] .. h[N-1] -> ln_f -> lm_head

The trunk's output is an embedding of a kind: while training, ``wte`` is the table of all rows, a token's id is the
number of its row, and the blocks below n pass on what they are given. So the batches, the loss and the loop need not
know, and a sample may meet others in its micro-batch than it was computed with: causal, and padded at the right.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama import ranks
from lit_llama.batches import Encoded, Packing, collate
from lit_llama.cli import UserError
from lit_llama.model import CausalSelfAttention, LLaMA
from lit_llama.train import TrainArgs, share

if TYPE_CHECKING:
    from lightning.fabric import Fabric

TRUNK_FILE = ".trunk.tmp"  # by that ending the next run in the folder removes what a killed one left


def is_changed(module: nn.Module) -> bool:
    """Whether something in ``module`` trains, hangs on it as a hook, or overrides how attention mixes."""
    return any(param.requires_grad for param in module.parameters()) or any(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or (isinstance(layer, CausalSelfAttention) and type(layer) is not CausalSelfAttention)
        for layer in module.modules()
    )


def trunk_size(model: LLaMA) -> int:
    """How many blocks, from the first on, give the same output in every epoch. UserError where that is none."""
    if is_changed(model.transformer.wte) or type(model.transformer.wte) is not nn.Embedding:
        raise UserError("--cache_trunk: what goes into the first block trains, so no block's output stays the same")
    changed = [is_changed(block) for block in model.transformer.h]
    if changed[0]:
        raise UserError(
            "--cache_trunk: the first block changes already, so no block's output stays the same; "
            "give a higher --start_layer or a lower --n_blocks where the method has it"
        )
    return [*changed, True].index(True)


def check_reuse(model: LLaMA, args: TrainArgs, n_samples: int) -> None:
    """UserError unless there is a trunk, and its output is read more often than it is computed."""
    trunk_size(model)
    steps = args.total_steps(n_samples)
    drawn = steps * args.batch_size if args.epochs is None else args.epochs * n_samples
    if drawn <= n_samples:
        raise UserError(
            f"--cache_trunk: {drawn} samples are drawn from {n_samples}, so none comes twice and nothing is saved; "
            "give more --train.max_steps or --train.epochs, or leave the flag out"
        )


class TrunkRows(nn.Embedding):
    """The trunk's output as an embedding of (all tokens, C); ``wte``'s own weight stays under its key."""

    def __init__(self, wte: nn.Embedding, rows: Tensor) -> None:
        self.__dict__.update(wte.__dict__)
        self.rows = rows

    def forward(self, idx: Tensor) -> Tensor:
        return self.rows[idx.cpu()].to(idx.device)


class PassOn(nn.Module):
    """In place of a block: gives back what it gets. The block's modules stay under their keys."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._modules.update(block._modules)

    def forward(self, x: Tensor, *_) -> Tensor:
        return x


@contextmanager
def stand_ins(model: LLaMA, parts: dict[str, nn.Module]) -> Iterator[None]:
    """Other modules in place of some of the model's, by name; its own are back afterwards."""
    own = {name: model.get_submodule(name) for name in parts}
    try:
        for name, part in parts.items():
            model.set_submodule(name, part)
        yield
    finally:
        for name, part in own.items():
            model.set_submodule(name, part)


@contextmanager
def cached_trunk(
    fabric: Fabric, model: LLaMA, splits: list[list[Encoded]], micro_batch_tokens: int, out_dir: Path
) -> Iterator[list[list[Encoded]]]:
    """The ``splits`` with row numbers for ids, and a model that reads them, until the context is left.

    The file, C numbers of the model's dtype for each token, lies in ``out_dir`` and is removed at the end. All ranks
    fill it and map it into memory, so they run on one machine.
    """
    n, transformer = trunk_size(model), model.transformer
    samples = [sample for split in splits for sample in split]
    first_rows, n_rows = {}, 0
    for sample in samples:
        first_rows[id(sample)] = n_rows
        n_rows += len(sample.ids)
    path = Path(out_dir) / TRUNK_FILE
    try:
        rows = map_rows(fabric, path, n_rows, model)
        ranks.say(f"computing {n} of {len(transformer.h)} blocks once: {rows.nbytes / 2**20:,.0f} MiB in {path}")
        top = {f"transformer.h.{i}": PassOn(block) for i, block in enumerate(transformer.h) if i >= n}
        with torch.no_grad(), stand_ins(model, {**top, "transformer.ln_f": nn.Identity()}):
            for batch in share(samples, micro_batch_tokens, fabric.world_size)[fabric.global_rank]:
                ids, _, lengths = collate(batch, fabric.device)
                packing = Packing(lengths, ids.size(1), fabric.device)
                hidden = model.hidden_states(ids, packing=packing)[0].cpu()  # (N, C), one sample behind the other
                for sample, x in zip(batch, hidden.split(lengths), strict=True):
                    start = first_rows[id(sample)]
                    rows[start : start + len(x)] = x
        ranks.meet(fabric, "compute their share of the trunk")
        trunk = {f"transformer.h.{i}": PassOn(block) for i, block in enumerate(transformer.h) if i < n}
        with stand_ins(model, {**trunk, "transformer.wte": TrunkRows(transformer.wte, rows)}):
            yield [[as_rows(sample, first_rows[id(sample)]) for sample in split] for split in splits]
    finally:
        if fabric.is_global_zero:
            path.unlink(missing_ok=True)


def as_rows(sample: Encoded, first_row: int) -> Encoded:
    return replace(sample, ids=list(range(first_row, first_row + len(sample.ids))))


def map_rows(fabric: Fabric, path: Path, n_rows: int, model: LLaMA) -> Tensor:
    """A tensor (n_rows, C) of the model's dtype whose memory is the file ``path``, made by rank 0."""
    numbers = n_rows * model.config.n_embd
    n_bytes, free = numbers * model.dtype.itemsize, shutil.disk_usage(path.parent).free
    if fabric.is_global_zero and n_bytes > free:
        raise UserError(
            f"--cache_trunk needs {n_bytes / 2**30:.1f} GiB for {n_rows:,} tokens, and {free / 2**30:.1f} are free in "
            f"{path.parent}; leave the flag out, or pass another --out_dir"
        )
    if fabric.is_global_zero:
        torch.from_file(str(path), shared=True, size=numbers, dtype=model.dtype)
    ranks.meet(fabric, f"make {path}")
    return torch.from_file(str(path), shared=True, size=numbers, dtype=model.dtype).view(n_rows, -1)
