"""A training run's folder: who may write into it, what it is made of, and how to go on after a stop.

``trained.safetensors`` and ``method.json`` (the best validated step), ``metrics.csv`` (every step), ``config.yaml``
(the command line, resolved), ``costs.json`` (memory) and ``state/`` (the last saved step).
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from lit_llama import __version__, cli, ranks
from lit_llama.checkpoint import CONFIG_FILE as MODEL_CONFIG_FILE
from lit_llama.checkpoint import (
    INDEX_FILE,
    METHOD_FILE,
    MODEL_FILE,
    TRAINED_FILE,
    describe_base,
    kept_tensors,
    load_trained,
    trained_tensors,
)
from lit_llama.cli import UserError
from lit_llama.convert import copy_tokenizer
from lit_llama.devices import peak_memory
from lit_llama.files import open_tensors, read_json, save_tensors, whole_file, write_json
from lit_llama.model import LLaMA

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from lit_llama.data import Task
    from lit_llama.train import TrainArgs

METRICS = ["step", "loss", "lr", "tokens", "seconds", "val_loss"]
# What may differ between the parts of a resumed run: it names things or is about memory, and changes no number.
MAY_CHANGE = (
    "base.checkpoint_dir ",
    "base.name ",
    "data ",
    "version ",
    "train.micro_batch_tokens ",
    "train.save_every ",
)
OWN = ("lr_scale", "weight_decay", "betas")  # of an optimizer's groups: what a finetune script sets for each
METRICS_FILE, CONFIG_FILE, STATE_FILE = "metrics.csv", "config.yaml", "state/state.safetensors"
COSTS_FILE = "costs.json"


class Run:
    """The folder ``out_dir`` of one run. A folder that holds a run needs ``resume`` or ``overwrite``."""

    def __init__(
        self, fabric: Fabric, out_dir: Path, checkpoint_dir: Path, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.fabric, self.out_dir, self.resume = fabric, Path(out_dir), resume
        self.best_loss, self.best_step = math.inf, 0
        self.trained_file = TRAINED_FILE
        if resume and overwrite:
            raise UserError("--resume goes on with a run and --overwrite starts it anew: give one of them")
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise UserError(f"--out_dir {out_dir} is a file")
        if self.out_dir.resolve() == Path(checkpoint_dir).resolve():
            raise UserError(f"--out_dir {out_dir} is the base itself; choose another --out_dir")
        holds_model = (self.out_dir / MODEL_FILE).exists() or (self.out_dir / INDEX_FILE).exists()
        if holds_model and not (self.out_dir / METHOD_FILE).exists():
            raise UserError(f"--out_dir {out_dir} holds a checkpoint that no run wrote; choose another --out_dir")
        held = [name for name in (METHOD_FILE, MODEL_FILE, METRICS_FILE, STATE_FILE) if (self.out_dir / name).exists()]
        if held and not (resume or overwrite):
            raise UserError(
                f"{out_dir} holds a run already ({', '.join(held)}); pass --resume to go on with it, "
                "--overwrite to start anew, or another --out_dir"
            )
        if resume and not (self.out_dir / STATE_FILE).exists():
            raise UserError(f"nothing to resume: {self.out_dir / STATE_FILE} is missing; start anew with --overwrite")
        self.fabric.barrier()  # nobody writes before everybody has looked

    def remove(self) -> None:
        """Delete what a run writes, and nothing else that may lie in the folder."""
        for name in (METHOD_FILE, TRAINED_FILE, MODEL_FILE, METRICS_FILE, CONFIG_FILE, COSTS_FILE):
            (self.out_dir / name).unlink(missing_ok=True)
        shutil.rmtree(self.out_dir / "state", ignore_errors=True)

    def begin(
        self,
        method: str,
        arguments: dict,
        checkpoint_dir: Path,
        task: Task,
        train: TrainArgs,
        model: LLaMA,
        optimizer: torch.optim.Optimizer,
        whole_model: bool = False,
    ) -> None:
        """Write method.json, which says all that generation and a resumed run need to know.

        ``whole_model`` makes the folder a checkpoint folder, too. UserError when the settings are not what the run to
        be resumed was started with.
        """
        self.trained_file = MODEL_FILE if whole_model else TRAINED_FILE
        numbers = sum(tensor.numel() for tensor in trained_tensors(model).values())
        whole = sum(tensor.numel() for tensor in model.parameters())
        ranks.say(f"{method} trains {numbers:,} of {whole:,} numbers ({numbers / whole:.2%})")
        description = {
            "method": method,
            "arguments": arguments,
            "trained_numbers": numbers,
            "base": describe_base(checkpoint_dir),
            "base_dtype": str(model.dtype).removeprefix("torch."),
            "prompt_style": task.prompt_style,
            "data": task.data,
            "data_fingerprint": task.fingerprint,
            "train": asdict(train),
            "optimizer": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in group.items() if key in OWN}
                for group in optimizer.param_groups
            ],
            "version": __version__,
        }
        if self.resume:
            changes = differences(read_json(self.out_dir / METHOD_FILE), description)
            changes = [change for change in changes if not change.startswith(MAY_CHANGE)]
            if changes:
                raise UserError(f"--resume of {self.out_dir} with other settings: {'; '.join(changes)}")
        elif self.fabric.is_global_zero:
            self.remove()  # only now: an --overwrite that fails before here loses nothing
            write_json(self.out_dir / METHOD_FILE, description)
            if whole_model:
                write_json(self.out_dir / MODEL_CONFIG_FILE, asdict(model.config))
                copy_tokenizer(Path(checkpoint_dir), self.out_dir)
            (self.out_dir / METRICS_FILE).write_text(",".join(METRICS) + "\n", encoding="utf-8")
            if cli.command_line is not None:
                with whole_file(self.out_dir / CONFIG_FILE) as temporary:
                    temporary.write_text(cli.command_line, encoding="utf-8")

    # the state to go on from

    def save_state(self, model: LLaMA, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Trained tensors, optimizer, step and best loss, in one file, so that they are of one step."""
        if self.fabric.is_global_zero:
            tensors = {f"trained.{name}": tensor for name, tensor in trained_tensors(model).items()}
            for i, values in optimizer.state_dict()["state"].items():
                tensors.update({f"optimizer.{i}.{key}": value for key, value in values.items()})
            numbers = {"step": step, "best_loss": self.best_loss, "best_step": self.best_step}
            save_tensors(self.out_dir / STATE_FILE, tensors, {"state": json.dumps(numbers)})
        self.fabric.barrier()  # no rank may leave, and so end the job, before the file is whole

    def load_state(self, model: LLaMA, optimizer: torch.optim.Optimizer) -> int:
        """The step to go on from: 0 for a new run, which is saved as such so that any stop can be resumed."""
        if not self.resume:
            self.save_state(model, optimizer, step=0)
            return 0
        path = self.out_dir / STATE_FILE
        with open_tensors(path) as file:
            numbers = json.loads(file.metadata()["state"])
            state: dict[int, dict] = {}
            for name in file.keys():
                if name.startswith("optimizer."):
                    _, i, key = name.split(".")
                    state.setdefault(int(i), {})[key] = file.get_tensor(name)
        load_trained(model, path, prefix="trained.")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.best_loss, self.best_step = numbers["best_loss"], numbers["best_step"]
        if self.fabric.is_global_zero:
            self.cut_metrics(numbers["step"])
        return numbers["step"]

    def cut_metrics(self, step: int) -> None:
        """Forget the steps after ``step``: they are about to be taken again."""
        path = self.out_dir / METRICS_FILE
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step]
        with whole_file(path) as temporary:
            temporary.write_text("".join([",".join(METRICS) + "\n", *kept]), encoding="utf-8")

    def save_costs(self, seconds: float) -> None:
        """Write how long training took, and the most memory that rank 0 held since its process began (bytes)."""
        if self.fabric.is_global_zero:
            costs = {"seconds": seconds, "peak_memory": peak_memory(self.fabric.device)}
            write_json(self.out_dir / COSTS_FILE, costs)

    # the best step

    def keep_best(self, model: LLaMA, val_loss: float) -> None:
        """Write the trained folder if this is the best validation so far."""
        if not val_loss < self.best_loss:
            return
        self.best_loss, self.best_step = val_loss, self.last_step
        if self.fabric.is_global_zero:
            save_tensors(self.out_dir / self.trained_file, kept_tensors(model))

    def load_best(self, model: LLaMA) -> None:
        self.fabric.barrier()
        if model.reparametrization is not None:
            model.reparametrization.flatten(model)
        load_trained(model, self.out_dir / self.trained_file)

    # what the user sees

    @contextmanager
    def progress(self, step: int, total_steps: int) -> Iterator[tqdm]:
        """A bar on the terminal of rank 0; elsewhere ``log`` prints a line now and then."""
        self.last_step, self.total_steps = step, total_steps
        self.tokens, self.seconds = 0, 0.0
        hidden = not (self.fabric.is_global_zero and sys.stderr.isatty())
        with tqdm(total=total_steps, initial=step, unit="step", disable=hidden, dynamic_ncols=True) as bar:
            yield bar

    def log(
        self, bar: tqdm, step: int, loss: float, lr: float, tokens: int, seconds: float, val_loss: float | None
    ) -> None:
        """A row of metrics.csv, and the bar's or a line's figures."""
        self.last_step = step
        self.tokens += tokens
        self.seconds += seconds
        if not self.fabric.is_global_zero:
            return
        with open(self.out_dir / METRICS_FILE, "a", newline="", encoding="utf-8") as file:
            row = [step, repr(loss), repr(lr), tokens, f"{seconds:.3f}", "" if val_loss is None else repr(val_loss)]
            csv.writer(file, lineterminator="\n").writerow(row)
        figures = f"loss {loss:.3f}, lr {lr:.1e}, {self.tokens / self.seconds:.0f} tokens/s"
        bar.set_postfix_str(figures, refresh=False)
        bar.update()
        if val_loss is not None:
            bar.write(f"step {step}: validation loss {val_loss:.4f}", file=sys.stderr)
        if bar.disable and (val_loss is not None or step % max(1, self.total_steps // 10) == 0):
            print(f"step {step} of {self.total_steps}: {figures}", file=sys.stderr)


def read_metrics(out_dir: Path) -> list[dict]:
    """The steps so far of a run, that may be going on: without a last line that is still being written."""
    path = out_dir / METRICS_FILE
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return list(csv.DictReader(lines))


def differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """What changed between two nested dicts, one short text each."""
    changes = []
    for key in now:
        name = f"{prefix}{key}"
        if isinstance(now[key], dict) and isinstance(before.get(key), dict):
            changes += differences(before[key], now[key], f"{name}.")
        elif before.get(key) != now[key]:
            changes.append(f"{name} was {before.get(key)!r}, now {now[key]!r}")
    return changes


class Interrupt:
    """Whether Ctrl-C or SIGTERM came."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, signum: int, frame: object) -> None:
        if self.came and signum == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.came = True
        if ranks.is_first():
            print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    def seen(self, fabric: Fabric) -> bool:
        """The same answer on every rank, so that none waits for one that has stopped."""
        if fabric.world_size == 1:
            return self.came
        return bool(fabric.all_reduce(torch.tensor(float(self.came), device=fabric.device), reduce_op="sum"))


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Turn Ctrl-C and SIGTERM into a question to ask between steps."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield interrupt
        return
    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
