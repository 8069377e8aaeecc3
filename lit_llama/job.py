"""What every finetune script shares: its flags, the frozen base, the data, the devices, and the run's folder.

``--help`` reads Job's signature and need not wait for torch: what is heavy is imported late, and the annotations of
the signature are no strings, for which jsonargparse would import all that TYPE_CHECKING names.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llama.cli import UserError
from lit_llama.settings import DEFAULT_BASE, TrainArgs

if TYPE_CHECKING:
    import torch

    from lit_llama.batches import Encoded

    Data = str | list[dict]  # a path, or from Python the rows themselves
else:
    Data = str  # what the command line can say

HEADS = ("language", "classifier")


def check_together(strategy: str, num_nodes: int, narrow: bool, compile: bool, cache_trunk: bool) -> None:
    """UserError for flags that cannot be had together."""
    if cache_trunk and num_nodes > 1:
        raise UserError(f"--cache_trunk needs one machine, whose ranks share a file: got --num_nodes {num_nodes}")
    if strategy == "fsdp" and (cache_trunk or compile or narrow):
        raise UserError("--strategy fsdp goes with none of --cache_trunk, --compile and --quantize; pass ddp")


class Job:
    """A base with all weights frozen (``model``), data to train on (``task``), and where it runs (``fabric``)."""

    def __init__(
        self,
        method: str,
        train: TrainArgs,
        head: str = "language",
        checkpoint_dir: str = DEFAULT_BASE,
        data: Data = "data/bookings",
        out_dir: str | None = None,
        prompt_style: str | None = None,
        eval_samples: int = 200,
        devices: int = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: str = "auto",
        logger: str | None = None,
        compile: bool = False,
        checkpointing: bool = False,
        quantize: str = "none",
        cache_trunk: bool = False,
        resume: bool = False,
        overwrite: bool = False,
        allow_changes: bool = False,
        yes: bool = False,
    ) -> None:
        """Load the base and the data.

        Args:
            method: The script's own name.
            train: The settings of the training loop.
            head: The "language" head, or a new "classifier" of the data's labels.
            checkpoint_dir: Folder of the base; the default one is offered for download when it is missing.
            data: A .json, .jsonl, .csv or .txt file, or a folder with train and validation files.
            out_dir: Where the trained folder is written; by default out/, the method and the data's name.
            prompt_style: alpaca, chatml, llama2, llama3 or plain; by default what the base's tokenizer tells.
            eval_samples: Held-out samples that are answered before and after training; 0 for none.
            devices: Processes, one for each device, on every node.
            num_nodes: Machines.
            strategy: ddp, with the base on every device; fsdp, in pieces, where it does not fit one; or auto.
            precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
            logger: "tensorboard" shows the figures of metrics.csv there, too; it reads them from out_dir.
            compile: Compile the blocks by torch.compile: minutes once; in float32 on a CPU nothing is gained.
            checkpointing: Compute activations again in the backward pass: less memory, a third more work.
            quantize: Keep the frozen base's weights in "int8", or on CUDA in "nf4".
            cache_trunk: Compute what lies below the first changed block once for each sample, not in every epoch.
            resume: Go on with the run that out_dir holds.
            overwrite: Start anew in an out_dir that holds a run.
            allow_changes: With resume, go on although data, base or settings of training are others than before.
            yes: Do not ask before a download.
        """
        import torch

        from lit_llama import ranks
        from lit_llama.checkpoint import load_model
        from lit_llama.data import check_data, load_task
        from lit_llama.devices import base_dtype, free_memory, launch, named_loggers
        from lit_llama.download import ensure_base
        from lit_llama.evaluate import Comparison
        from lit_llama.quantize import quantize_base
        from lit_llama.runs import Run

        if head not in HEADS:
            raise UserError(f"--head {head!r} is none of {', '.join(HEADS)}")
        check_together(strategy, num_nodes, quantize != "none", compile, cache_trunk)
        self.method, self.train, self.checkpoint_dir, self.devices = method, train, checkpoint_dir, devices
        self.quantize, self.cache_trunk = quantize, cache_trunk
        self.block_options = dict(compile=compile, checkpointing=checkpointing)
        name = "rows" if isinstance(data, list) else Path(data).stem
        folder = Path(out_dir or f"out/{method}/{name}")
        self.fabric = launch(devices, num_nodes, strategy, named_loggers(logger, folder))
        if train.batch_size < self.fabric.world_size:
            ranks.note(
                f"note: --train.batch_size {train.batch_size} gives work to only {train.batch_size} of "
                f"{self.fabric.world_size} devices; a larger one, with a higher --train.learning_rate, to all"
            )
        check_data(data)  # before anything is fetched
        ranks.first(f"fetch {checkpoint_dir}", lambda: ensure_base(checkpoint_dir, yes))
        self.run = Run(self.fabric, folder, checkpoint_dir, resume, overwrite, allow_changes)
        self.task = load_task(data, checkpoint_dir, prompt_style, train.max_seq_length, head == "classifier")
        steps = train.total_steps(len(self.task.train))  # an impossible warm-up is refused before anything is written
        ranks.say(self.task.summary)
        passes = train.epochs or steps * train.batch_size / len(self.task.train)
        ranks.say(f"{steps:,} steps of {train.batch_size}: {passes:.2g} times through the samples to train on")
        self.comparison = Comparison(self.fabric, self.task, eval_samples)
        torch.manual_seed(train.seed)
        self.room = free_memory(self.fabric.device)  # before the base is read: it is part of what a run takes
        self.dtype, self.sharded = base_dtype(precision, self.fabric.device), strategy == "fsdp"
        if self.sharded:  # left in its file, memory-mapped, for shard to cast and move block by block
            self.model = load_model(checkpoint_dir, dtype=None)
        else:
            self.model = load_model(checkpoint_dir, self.dtype, self.fabric.device)
        quantize_base(self.model, quantize)
        self.model.requires_grad_(False)

    def finetune(
        self,
        optimizer: "torch.optim.Optimizer",
        arguments: dict,
        whole_model: bool = False,
        start: Callable[[], None] | None = None,
    ) -> None:
        """Answer held-out samples, train, answer them again; the trained folder is written on the way.

        ``arguments`` are those that the method's function was called with: method.json keeps them. ``whole_model``
        writes a checkpoint folder, for a method that leaves nothing of the base. ``start``, for what trains to start
        from what the base computes, is called with the base on its devices, and not for a run that is resumed.
        """
        from lit_llama import ranks
        from lit_llama.blocks import block_forwards
        from lit_llama.quantize import quantization
        from lit_llama.runs import read_metrics
        from lit_llama.sharding import shard
        from lit_llama.train import fit
        from lit_llama.trunk import check_reuse

        if self.quantize != quantization(self.model):
            raise UserError(f"{self.method} trains every block: none stays as it is, to be kept in fewer bits")
        if self.cache_trunk:
            check_reuse(self.model, self.train, len(self.task.train))
        longest = max(len(sample.ids) for sample in self.task.train + self.task.validation)
        room = self.model.text_room
        if longest > room:
            raise UserError(
                f"the longest sample has {longest} tokens, and what {self.method} puts in front leaves {room} of the "
                f"context of {self.model.config.block_size}; pass --train.max_seq_length {room}"
            )
        ranks.first("estimate the memory", lambda: self.check_memory(arguments, longest))
        if self.sharded:
            shard(self.fabric, self.model, self.dtype)
        if start is not None and not self.run.resume:
            start()
        begin = partial(self.run.begin, self.method, arguments, self.checkpoint_dir, self.task, self.train, self.model)
        if self.run.resume:  # where other settings are refused, before anything is answered
            begin(optimizer, whole_model)
        self.comparison.answer("before", self.model)
        if not self.run.resume:  # only now: an --overwrite that is stopped before here loses nothing
            begin(optimizer, whole_model)
        with self.samples() as (train_data, val_data), block_forwards(self.model, **self.block_options):
            fit(self.fabric, self.model, optimizer, train_data, val_data, self.train, self.run)
        self.run.save_costs(seconds=sum(float(row["seconds"]) for row in read_metrics(self.run.out_dir)))
        self.comparison.answer("after", self.model)
        self.comparison.show()
        out_dir = self.run.out_dir
        script = f"generate/adapter.py --trained_dir {out_dir}"
        if self.task.labels is not None:
            script = f"generate/classify.py --trained_dir {out_dir}"
        elif whole_model:
            script = f"generate/base.py --checkpoint_dir {out_dir}"
        ranks.say(f'\nsaved in {out_dir}; try: python {script} --prompt "..."')

    def samples(self) -> "AbstractContextManager[list[list[Encoded]]]":
        """The samples to train on and to validate with; with ``cache_trunk`` for the time of the context."""
        from lit_llama.trunk import cached_trunk

        splits = [self.task.train, self.task.validation]
        if not self.cache_trunk:
            return nullcontext(splits)
        return cached_trunk(self.fabric, self.model, splits, self.train.micro_batch_tokens, self.run.out_dir)

    def check_memory(self, arguments: dict, longest: int) -> None:
        """Warn, or raise UserError, where the largest micro-batch of the training data will not fit the device."""
        from lit_llama.memory import check_room, estimate
        from lit_llama.train import share

        if self.room is None:
            return
        samples = sorted(self.task.train, key=lambda sample: len(sample.ids))[-self.train.batch_size :]
        shares = share(samples, self.train.micro_batch_tokens, self.fabric.world_size)
        batch = max(sum(shares, []), key=lambda batch: sum(len(sample.ids) for sample in batch))
        lengths = [len(sample.ids) for sample in batch]
        found = estimate(
            self.model.config,
            self.method,
            arguments,
            self.dtype,
            lengths,
            n_targets=sum(sample.n_targets for sample in batch),
            device_type=self.fabric.device.type,
            devices=self.fabric.world_size,
            sharded=self.sharded,
            checkpointing=self.block_options["checkpointing"],
            quantize=self.quantize,
        )
        sharing = self.devices if self.fabric.device.type == "cpu" else 1  # processes in the same memory
        if warning := check_room(found, self.room // sharing, sum(lengths), longest, self.savings()):
            print(warning, file=sys.stderr)

    def savings(self) -> list[str]:
        """What saves memory and can still be passed to this run."""
        import torch

        from lit_llama.devices import multiplies_bf16

        device, narrow = self.fabric.device, self.quantize != "none"
        frozen = not (self.sharded or narrow or all(p.requires_grad for p in self.model.transformer.h.parameters()))
        several = "" if self.fabric.world_size > 1 else " with more --devices"
        flags = {
            "--precision bf16-true": self.dtype == torch.float32 and multiplies_bf16(device),
            "--quantize int8": frozen,
            "--checkpointing": not self.block_options["checkpointing"],
            f"--strategy fsdp{several}": frozen
            and device.type == "cuda"
            and not (self.block_options["compile"] or self.cache_trunk),
            "a lower --train.max_seq_length": True,
        }
        return [flag for flag, saves in flags.items() if saves]
