"""A training run's folder: who may write into it, what it is made of, and how to go on after a stop.

``trained.safetensors`` and ``method.json`` (the best validated step), ``metrics.csv`` (every step), ``config.yaml``
(the command line, resolved), ``costs.json`` (seconds, memory) and ``state/`` (the last saved step).
"""

from __future__ import annotations

import csv
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lit_llama import __version__, cli, ranks
from lit_llama.bars import Bar
from lit_llama.checkpoint import CONFIG_FILE as MODEL_CONFIG_FILE
from lit_llama.checkpoint import INDEX_FILE, MODEL_FILE
from lit_llama.cli import Interrupted, UserError
from lit_llama.convert import copy_tokenizer
from lit_llama.devices import peak_memory
from lit_llama.files import (
    read_json,
    read_tensors,
    remove_unfinished,
    save_tensors,
    whole_file,
    write_error,
    write_json,
)
from lit_llama.lock import lock_folder
from lit_llama.model import LLaMA
from lit_llama.quantize import count_numbers, quantization
from lit_llama.trained import (
    METHOD_FILE,
    RECIPE,
    TRAINED_FILE,
    describe_base,
    kept_tensors,
    load_trained,
    trained_tensors,
)

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
METRICS_FILE, COSTS_FILE = "metrics.csv", "costs.json"
CONFIG_FILE, STATE_FILE = "config.yaml", "state/state.safetensors"


class Run:
    """The folder ``out_dir`` of one run, locked for as long as the process lives.

    A folder that holds a run needs ``resume`` or ``overwrite``. ``allow_changes`` resumes with another
    base, too, or other data or settings of training.
    """

    def __init__(
        self,
        fabric: Fabric,
        out_dir: Path | str,
        checkpoint_dir: Path | str,
        resume: bool = False,
        overwrite: bool = False,
        allow_changes: bool = False,
    ) -> None:
        self.fabric, self.out_dir, self.resume, self.allow_changes = fabric, Path(out_dir), resume, allow_changes
        self.best_loss, self.best_step = math.inf, 0
        self.trained_file = TRAINED_FILE
        if resume and overwrite:
            raise UserError("--resume goes on with a run and --overwrite starts it anew: give one of them")
        if allow_changes and not resume:
            raise UserError("--allow_changes is for --resume, which goes on with a run: give both or neither")
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise UserError(f"--out_dir {out_dir} is a file")
        if self.out_dir.resolve() == Path(checkpoint_dir).resolve():
            raise UserError(f"--out_dir {out_dir} is the base itself; choose another --out_dir")
        holds_model = (self.out_dir / MODEL_FILE).exists() or (self.out_dir / INDEX_FILE).exists()
        if holds_model and not (self.out_dir / METHOD_FILE).exists():
            raise UserError(f"--out_dir {out_dir} holds a checkpoint that no run wrote; choose another --out_dir")
        if resume and not (self.out_dir / STATE_FILE).exists():
            anew = "with --overwrite" if self.held() else "without --resume"
            raise UserError(f"nothing to resume: {self.out_dir / STATE_FILE} is missing; start anew {anew}")
        self.lock()  # before looking what is there: it stays that way
        held = self.held()
        if held and not (resume or overwrite):
            raise UserError(
                f"{out_dir} holds a run already ({', '.join(held)}); pass --resume to go on with it, "
                "--overwrite to start anew, or another --out_dir"
            )
        ranks.meet(self.fabric, f"look into {out_dir}")  # nobody writes before everybody has looked

    def held(self) -> list[str]:
        """What tells that the folder holds a run."""
        return [name for name in (METHOD_FILE, MODEL_FILE, METRICS_FILE, STATE_FILE) if (self.out_dir / name).exists()]

    def lock(self) -> None:
        """UserError on every rank where another process is writing into the folder."""
        owner = None
        if self.fabric.is_global_zero:
            try:
                owner = lock_folder(self.out_dir)
                for folder in (self.out_dir, self.out_dir / "state"):
                    remove_unfinished(folder)
            except OSError as error:
                raise write_error(self.out_dir, error) from None
        if owner := self.fabric.broadcast(owner):
            raise UserError(
                f"{self.out_dir} is being written by {owner}; wait until it ends, stop it, or choose another --out_dir"
            )

    def remove(self) -> None:
        """Delete what a run writes, and nothing else that may lie in the folder."""
        for name in (METHOD_FILE, TRAINED_FILE, MODEL_FILE, METRICS_FILE, CONFIG_FILE, COSTS_FILE):
            (self.out_dir / name).unlink(missing_ok=True)
        for name in ("state", "tensorboard"):
            shutil.rmtree(self.out_dir / name, ignore_errors=True)

    def begin(
        self,
        method: str,
        arguments: dict,
        checkpoint_dir: Path | str,
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
        whole = count_numbers(model)
        ranks.say(f"{method} trains {numbers:,} of {whole:,} numbers ({100 * numbers / whole:.2f} %)")
        description = {
            "method": method,
            "arguments": arguments,
            "trained_numbers": numbers,
            "base": (base := describe_base(checkpoint_dir)),
            "base_dtype": str(model.dtype).removeprefix("torch."),
            "quantize": quantization(model),
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
        self.recipe = {key: description[key] for key in RECIPE}
        self.goal = [base["fingerprint"], task.fingerprint]  # losses of another say nothing about the best step
        if self.resume and not self.accept_changes(description):
            return
        if self.fabric.is_global_zero:
            if not self.resume:
                self.remove()  # only now: an --overwrite that fails before here loses nothing
            write_json(self.out_dir / METHOD_FILE, description)
            if whole_model:
                write_json(self.out_dir / MODEL_CONFIG_FILE, asdict(model.config))
                copy_tokenizer(Path(checkpoint_dir), self.out_dir, task.prompt_style)
            save_command_line(self.out_dir)

    def accept_changes(self, description: dict) -> bool:
        """Whether a resumed run has other settings than it began with: UserError, unless they were allowed."""
        before = {"quantize": "none", **read_json(self.out_dir / METHOD_FILE)}  # older runs do not say it
        changes = [change for change in differences(before, description) if not change.startswith(MAY_CHANGE)]
        fits = not any(change.startswith(RECIPE) for change in changes)  # what was trained so far, the best step too
        if changes and not (fits and self.allow_changes):
            way_out = "--allow_changes to go on with these" if fits else "--overwrite to start anew with these"
            raise UserError(
                f"--resume of {self.out_dir} with other settings: {'; '.join(changes)}. Give those that the run began "
                f"with ({CONFIG_FILE} has them), or {way_out}"
            )
        for change in changes:
            ranks.say(f"note: going on with other settings: {change}")
        return bool(changes)

    # the state to go on from

    def save_state(self, model: LLaMA, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Trained tensors, optimizer, step and best loss, in one file, so that they are of one step."""
        if self.fabric.is_global_zero:
            tensors = {f"trained.{name}": tensor for name, tensor in trained_tensors(model).items()}
            for i, values in optimizer.state_dict()["state"].items():
                tensors.update({f"optimizer.{i}.{key}": value for key, value in values.items()})
            numbers = {"step": step, "best_loss": self.best_loss, "best_step": self.best_step, "goal": self.goal}
            save_tensors(self.out_dir / STATE_FILE, tensors, numbers)
        ranks.meet(self.fabric, "save the state")  # no rank may leave, and so end the job, before the file is whole

    def load_state(self, model: LLaMA, optimizer: torch.optim.Optimizer) -> int:
        """The step to go on from: 0 for a new run, which is saved as such so that any stop can be resumed."""
        if not self.resume:
            if self.fabric.is_global_zero:
                self.cut_metrics(0)
            self.save_state(model, optimizer, step=0)
            return 0
        path = self.out_dir / STATE_FILE
        load_trained(model, path, prefix="trained.")
        tensors, numbers = read_tensors(path)
        state: dict[int, dict] = {}
        for name in tensors:
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensors[name].clone()  # not mapped: the file will be replaced
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if numbers.get("goal", self.goal) == self.goal:
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
            save_tensors(self.out_dir / self.trained_file, kept_tensors(model), self.recipe)

    def load_best(self, model: LLaMA) -> None:
        ranks.meet(self.fabric, "finish the last step")
        if model.reparametrization is not None:
            model.reparametrization.flatten(model)
        load_trained(model, self.out_dir / self.trained_file)

    # what the user sees

    @contextmanager
    def progress(self, step: int, total_steps: int) -> Iterator[Bar]:
        """A bar on the terminal of rank 0, or a line now and then where there is none."""
        self.last_step = step
        self.tokens, self.seconds = 0, 0.0
        status = "failed"
        try:
            with Bar(total_steps, "step", "step", initial=step, hidden=not self.fabric.is_global_zero) as bar:
                yield bar
            status = "success"
        except Interrupted:
            status = "interrupted"
            raise
        finally:
            for logger in self.fabric.loggers:
                logger.finalize(status)

    def log(
        self, bar: Bar, step: int, loss: float, lr: float, tokens: int, seconds: float, val_loss: float | None
    ) -> None:
        """A row of metrics.csv, and the bar's or a line's figures."""
        self.last_step = step
        self.tokens += tokens
        self.seconds += seconds
        if not self.fabric.is_global_zero:
            return
        row = [step, repr(loss), repr(lr), tokens, f"{seconds:.3f}", "" if val_loss is None else repr(val_loss)]
        try:
            with open(self.out_dir / METRICS_FILE, "a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
        except OSError as error:
            raise write_error(self.out_dir / METRICS_FILE, error) from None
        known = {"loss": loss, "lr": lr, "tokens_per_second": tokens / seconds, "val_loss": val_loss}
        self.fabric.log_dict({name: value for name, value in known.items() if value is not None}, step)
        figures = f"loss {loss:.3f}, lr {lr:.1e}, {self.tokens / self.seconds:.0f} tokens/s"
        bar.set_postfix_str(figures, refresh=False)
        bar.update()
        if val_loss is not None:
            bar.write(f"step {step}: validation loss {val_loss:.4f}", file=sys.stderr)

    def warn_if_stuck(self) -> None:
        """Say so when the training loss is where it was: the mean of the last quarter of steps beside the first's."""
        if not self.fabric.is_global_zero:
            return
        losses = [float(row["loss"]) for row in read_metrics(self.out_dir)]
        n = max(1, len(losses) // 4)
        before, now = sum(losses[:n]) / n, sum(losses[-n:]) / n
        if now > 0.99 * before:
            print(
                f"warning: after {len(losses)} steps the loss has not moved: {now:.4f}, at first {before:.4f}. Is "
                "--train.learning_rate too low, or so high that it jumps about? Are the answers where they should be?",
                file=sys.stderr,
            )


def save_command_line(folder: Path) -> None:
    """Write the resolved settings of the script that runs, if one does, for ``--config`` to read again."""
    if cli.command_line is not None:
        with whole_file(folder / CONFIG_FILE) as temporary:
            temporary.write_text(cli.command_line, encoding="utf-8")


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
