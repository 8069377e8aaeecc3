"""What every finetune script shares: its flags, the frozen base, the data, the devices, and the run's folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lit_llama import ranks
from lit_llama.batches import micro_batches
from lit_llama.checkpoint import load_model
from lit_llama.cli import UserError
from lit_llama.data import load_task
from lit_llama.devices import base_dtype, free_memory, launch
from lit_llama.download import DEFAULT_BASE, ensure_base
from lit_llama.evaluate import Comparison
from lit_llama.memory import check_room, estimate
from lit_llama.runs import Run, read_metrics
from lit_llama.sharding import shard
from lit_llama.train import TrainArgs, fit

HEADS = ("language", "classifier")


class Job:
    """A base with all weights frozen (``model``), data to train on (``task``), and where it runs (``fabric``)."""

    def __init__(
        self,
        method: str,
        train: TrainArgs,
        head: str,
        checkpoint_dir: str = DEFAULT_BASE,
        data: str = "data/bookings",
        out_dir: str | None = None,
        prompt_style: str | None = None,
        eval_samples: int = 200,
        devices: int = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: str = "auto",
        resume: bool = False,
        overwrite: bool = False,
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
            resume: Go on with the run that out_dir holds.
            overwrite: Start anew in an out_dir that holds a run.
            yes: Do not ask before a download.
        """
        if head not in HEADS:
            raise UserError(f"--head {head!r} is none of {', '.join(HEADS)}")
        self.method, self.train, self.checkpoint_dir = method, train, checkpoint_dir
        self.fabric = launch(devices, num_nodes, strategy)
        ranks.first(f"fetch {checkpoint_dir}", lambda: ensure_base(checkpoint_dir, yes))
        self.run = Run(self.fabric, out_dir or f"out/{method}/{Path(data).stem}", checkpoint_dir, resume, overwrite)
        self.task = load_task(data, checkpoint_dir, prompt_style, train.max_seq_length, head == "classifier")
        ranks.say(self.task.summary)
        self.comparison = Comparison(self.fabric, self.task, eval_samples)
        torch.manual_seed(train.seed)
        self.room = free_memory(self.fabric.device)  # before the base is read: it is part of what a run takes
        self.devices = devices
        self.dtype, self.sharded = base_dtype(precision, self.fabric.device), strategy == "fsdp"
        if self.sharded:  # left in its file, memory-mapped, for shard to cast and move block by block
            self.model = load_model(checkpoint_dir, dtype=None)
        else:
            self.model = load_model(checkpoint_dir, self.dtype, self.fabric.device)
        self.model.requires_grad_(False)

    def finetune(self, optimizer: torch.optim.Optimizer, arguments: dict, whole_model: bool = False) -> None:
        """Answer held-out samples, train, answer them again; the trained folder is written on the way.

        ``arguments`` are those that the method's function was called with: method.json keeps them. ``whole_model``
        writes a checkpoint folder, for a method that leaves nothing of the base.
        """
        longest = max(len(sample.ids) for sample in self.task.train + self.task.validation)
        room = self.model.context - len(self.model.virtual_ids)
        if longest > room:
            raise UserError(
                f"the longest sample has {longest} tokens, and what {self.method} puts in front leaves {room} of the "
                f"context of {self.model.config.block_size}; pass --train.max_seq_length {room}"
            )
        if self.room is not None:
            ranks.first("estimate the memory", lambda: self.check_memory(arguments, longest))
        if self.sharded:
            shard(self.fabric, self.model, self.dtype)
        self.comparison.answer("before", self.model)
        self.run.begin(
            self.method, arguments, self.checkpoint_dir, self.task, self.train, self.model, optimizer, whole_model
        )
        fit(self.fabric, self.model, optimizer, self.task.train, self.task.validation, self.train, self.run)
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

    def check_memory(self, arguments: dict, longest: int) -> None:
        """Warn, or raise UserError, where the largest micro-batch of the training data will not fit the device."""
        samples = sorted(self.task.train, key=lambda sample: len(sample.ids))[-self.train.batch_size :]
        batches = micro_batches(samples, self.train.micro_batch_tokens)
        batch = max(batches, key=lambda batch: len(batch) * len(batch[0].ids))
        rows, tokens = len(batch), len(batch[0].ids)
        found = estimate(
            self.model.config,
            self.method,
            arguments,
            self.dtype,
            rows,
            tokens,
            n_targets=sum(sample.n_targets for sample in batch),
            device_type=self.fabric.device.type,
            devices=self.fabric.world_size,
            sharded=self.sharded,
        )
        sharing = self.devices if self.fabric.device.type == "cpu" else 1  # processes in the same memory
        if warning := check_room(found, self.room // sharing, rows * tokens, longest):
            print(warning, file=sys.stderr)
