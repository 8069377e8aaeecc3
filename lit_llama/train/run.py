"""The folder of a training run, and how to go on after a stop.

``trained.safetensors`` and ``method.json`` (the best validated step), ``metrics.csv`` (every step), ``config.yaml``
(the command line), ``costs.json`` (seconds, memory) and ``state/`` (the last saved step). A run knows files: it knows
neither the loop nor the model it saves.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from lit_llama import __version__, cli
from lit_llama.bars import Bar
from lit_llama.checkpoint import CONFIG_FILE as MODEL_CONFIG_FILE
from lit_llama.checkpoint import INDEX_FILE, MODEL_FILE, load_config
from lit_llama.cli import Interrupted, UserError
from lit_llama.common.files import (
    atomic_write,
    read_json,
    read_tensors,
    remove_unfinished,
    save_tensors,
    write_error,
    write_json,
)
from lit_llama.data.samples import read_text
from lit_llama.data.task import Task
from lit_llama.devices.launch import barrier, log_rank0, peak_memory, print_rank0
from lit_llama.formats.convert import copy_tokenizer
from lit_llama.model import LLaMA
from lit_llama.settings import TrainArgs
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

METRICS_FILE, COSTS_FILE = "metrics.csv", "costs.json"
CONFIG_FILE, LOCK_FILE, STATE_FILE = "config.yaml", ".lock", "state/state.safetensors"
# A resumed run may differ in these settings: they are names, or change how much memory is used and no result.
MAY_CHANGE = {"base.checkpoint_dir", "base.name", "data", "version", "train.micro_batch_tokens", "train.save_every"}


class Run:
    """The folder ``out_dir`` of one run.

    ``settings`` is what method.json will hold: what generation needs to know, and what a resumed run must share. A
    folder that holds a run needs ``resume`` or ``overwrite``; ``allow_changes`` resumes with another base, other data
    or other settings of training. With ``whole_model_of``, a checkpoint folder, ``out_dir`` becomes a checkpoint folder
    of the same shape. Raises UserError where the flags and the folder do not fit. Writes nothing until the first step.
    """

    def __init__(
        self,
        fabric: Fabric,
        out_dir: Path | str,
        settings: dict,
        resume: bool = False,
        overwrite: bool = False,
        allow_changes: bool = False,
        whole_model_of: Path | str | None = None,
    ) -> None:
        self.fabric, self.out_dir, self.settings, self.resume = fabric, Path(out_dir), settings, resume
        self.whole_model_of = whole_model_of
        self.trained_file = MODEL_FILE if whole_model_of else TRAINED_FILE
        self.recipe = {key: settings[key] for key in RECIPE}
        self.goal = [settings["base"]["fingerprint"], settings["data_fingerprint"]]  # what a validation loss is of
        self.step, self.best_loss, self.best_step = 0, math.inf, 0
        self.row: dict[str, float] = {}  # the figures of the current step
        self.step_began, self.tokens, self.seconds = 0.0, 0.0, 0.0
        # A singleton: from Python a second run may resume the first one's folder in the same process.
        self.folder_lock = FileLock(os.path.realpath(self.out_dir / LOCK_FILE), is_singleton=True)
        if resume and overwrite:
            raise UserError("--resume continues a run and --overwrite starts it again: give one of them")
        if allow_changes and not resume:
            raise UserError("--allow_changes is for --resume: give both or neither")
        self.check_folder(overwrite)
        self.describes_itself = resume and not self.check_settings(allow_changes)  # method.json is already true
        barrier(fabric, f"look into {out_dir}")  # nobody writes before everybody has looked

    def check_folder(self, overwrite: bool) -> None:
        """UserError if ``out_dir`` holds something that this run may not touch."""
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise UserError(f"--out_dir {self.out_dir} is a file")
        if os.path.realpath(self.out_dir) == os.path.realpath(self.settings["base"]["checkpoint_dir"]):
            raise UserError(f"--out_dir {self.out_dir} is the base itself; choose another --out_dir")
        holds_model = (self.out_dir / MODEL_FILE).exists() or (self.out_dir / INDEX_FILE).exists()
        if holds_model and not (self.out_dir / METHOD_FILE).exists():
            raise UserError(f"--out_dir {self.out_dir} holds a checkpoint that no run wrote; choose another --out_dir")
        held = [name for name in (METHOD_FILE, MODEL_FILE, METRICS_FILE, STATE_FILE) if (self.out_dir / name).exists()]
        if self.resume and STATE_FILE not in held:
            way_out = "with --overwrite" if held else "without --resume"
            raise UserError(f"nothing to resume: {self.out_dir / STATE_FILE} is missing; start again {way_out}")
        if held and not (self.resume or overwrite):
            raise UserError(
                f"{self.out_dir} holds a run already ({', '.join(held)}); pass --resume to continue it, --overwrite to "
                "start again, or another --out_dir"
            )

    def check_settings(self, allow_changes: bool) -> bool:
        """Whether a resumed run has other settings than it began with: UserError, unless they are allowed."""
        changed = differences(read_json(self.out_dir / METHOD_FILE), self.settings)
        changes = [change for key, change in changed.items() if key not in MAY_CHANGE]
        fits = not any(key.split(".")[0] in RECIPE for key in changed)  # what was trained so far stays of use
        if changes and not (fits and allow_changes):
            way_out = "--allow_changes to continue with these" if fits else "--overwrite to start again with these"
            raise UserError(
                f"--resume of {self.out_dir} with other settings: {'; '.join(changes)}. Give those that the run began "
                f"with ({CONFIG_FILE} has them), or {way_out}"
            )
        for change in changes:
            print_rank0(f"note: continuing with other settings: {change}")
        return bool(changes)

    def steps(self, model: LLaMA, optimizer: torch.optim.Optimizer, total_steps: int, save_every: int) -> Iterator[int]:
        """The number of each step still to take, from 0.

        Loads the state of a resumed run first, and saves the state after every ``save_every`` steps. On Ctrl-C or
        SIGTERM it finishes the step, saves, and raises Interrupted.
        """
        self.start(sum(tensor.numel() for tensor in trained_tensors(model).values()))
        self.step = self.load_state(model, optimizer) if self.resume else 0
        if self.step == 0:  # so that a run that is stopped before its first save can be resumed
            self.save_state(model, optimizer)
        hidden = not self.fabric.is_global_zero
        try:
            with catch_interrupt() as interrupt, Bar(total_steps, "step", "step", self.step, hidden) as bar:
                while self.step < total_steps:
                    self.row, self.step_began = {}, time.perf_counter()
                    try:
                        yield self.step
                    finally:  # after a break in the script, too
                        self.step += 1
                        self.write_row(bar)
                    stopping = interrupt.seen(self.fabric)
                    if self.step % save_every == 0 or self.step == total_steps or stopping:
                        self.save_state(model, optimizer)
                    if stopping:
                        raise Interrupted(
                            f"stopped and saved at step {self.step} of {total_steps}; the same command with --resume "
                            "continues"
                        )
                    if self.step == 40 + total_steps // 5:
                        self.warn_if_stuck()
        finally:
            for logger in self.fabric.loggers:
                logger.finalize("success")

    def log(self, step: int, **figures: float) -> None:
        """Add figures of a step (from 0) to metrics.csv, where a new name becomes a new column.

        The first call of a step also takes the seconds since the step began.
        """
        if not self.row:
            figures["seconds"] = round(time.perf_counter() - self.step_began, 3)
        self.row = {"step": step + 1, **self.row, **figures}

    def keep_best(self, model: LLaMA, val_loss: float) -> None:
        """Write the trained tensors if this is the lowest validation loss so far."""
        self.row["val_loss"] = val_loss
        if val_loss < self.best_loss:
            self.best_loss, self.best_step = val_loss, self.step + 1
            if self.fabric.is_global_zero:
                save_tensors(self.out_dir / self.trained_file, kept_tensors(model), self.recipe)

    def load_best(self, model: LLaMA) -> None:
        """Leave ``model`` as it was at its best validated step."""
        barrier(self.fabric, "finish the last step")
        if model.reparametrization is not None:
            model.reparametrization.flatten(model)
        load_trained(model, self.out_dir / self.trained_file)

    # what is written

    def start(self, trained_parameters: int) -> None:
        """Lock the folder, remove the run that was there unless it is resumed, and describe the new one."""
        self.lock()
        if self.fabric.is_global_zero and not self.describes_itself:
            if not self.resume:
                self.remove()
            write_json(self.out_dir / METHOD_FILE, {**self.settings, "trained_parameters": trained_parameters})
            if self.whole_model_of:
                write_json(self.out_dir / MODEL_CONFIG_FILE, read_json(Path(self.whole_model_of) / MODEL_CONFIG_FILE))
                copy_tokenizer(Path(self.whole_model_of), self.out_dir, self.settings["prompt_style"])
            save_command_line(self.out_dir)

    def lock(self) -> None:
        """Lock the folder for as long as this object lives. UserError on every rank if another process has it."""
        taken = False
        if self.fabric.is_global_zero:
            try:
                self.out_dir.mkdir(parents=True, exist_ok=True)
                self.folder_lock.acquire(blocking=False)
                for folder in (self.out_dir, self.out_dir / "state"):
                    remove_unfinished(folder)
            except Timeout:
                taken = True
            except OSError as error:
                raise write_error(self.out_dir, error) from None
        if self.fabric.broadcast(taken):
            raise UserError(
                f"another process is writing into {self.out_dir}; wait until it ends, stop it, or choose another "
                "--out_dir"
            )

    def remove(self) -> None:
        """Delete what a run writes, and nothing else in the folder."""
        for name in (METHOD_FILE, TRAINED_FILE, MODEL_FILE, METRICS_FILE, CONFIG_FILE, COSTS_FILE):
            (self.out_dir / name).unlink(missing_ok=True)
        for name in ("state", "tensorboard"):
            shutil.rmtree(self.out_dir / name, ignore_errors=True)

    def write_row(self, bar: Bar) -> None:
        """Write the figures of the step that ends to metrics.csv, to the loggers and to the bar."""
        if not self.fabric.is_global_zero or not self.row:
            return
        append_row(self.out_dir / METRICS_FILE, self.row)
        self.tokens += self.row.get("tokens", 0)
        self.seconds += self.row["seconds"]
        self.fabric.log_dict({name: value for name, value in self.row.items() if name != "step"}, self.step)
        loss, speed = self.row.get("loss", math.nan), self.tokens / self.seconds
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s", refresh=False)
        bar.update()
        if "val_loss" in self.row:
            bar.write(f"step {self.step}: validation loss {self.row['val_loss']:.4f}", file=sys.stderr)

    def save_state(self, model: LLaMA, optimizer: torch.optim.Optimizer) -> None:
        """Trained tensors, optimizer, step and best loss, in one file, so that they are of one step."""
        if self.fabric.is_global_zero:
            tensors = {f"trained.{name}": tensor for name, tensor in trained_tensors(model).items()}
            for i, values in optimizer.state_dict()["state"].items():
                tensors.update({f"optimizer.{i}.{key}": value for key, value in values.items()})
            about = {"step": self.step, "best_loss": self.best_loss, "best_step": self.best_step, "goal": self.goal}
            save_tensors(self.out_dir / STATE_FILE, tensors, about)
            self.save_costs(sum(float(row["seconds"]) for row in read_metrics(self.out_dir)))
        barrier(self.fabric, "save the state")  # no rank may end the job before the file is complete

    def save_costs(self, seconds: float) -> None:
        """Write how long training has taken, and the peak memory in bytes of rank 0's process."""
        write_json(self.out_dir / COSTS_FILE, {"seconds": seconds, "peak_memory": peak_memory(self.fabric.device)})

    def load_state(self, model: LLaMA, optimizer: torch.optim.Optimizer) -> int:
        """Load the last saved state and return its number of steps. Later rows of metrics.csv are removed."""
        path = self.out_dir / STATE_FILE
        load_trained(model, path, prefix="trained.")
        tensors, about = read_tensors(path)
        state: dict[int, dict] = {}
        for name in tensors:
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensors[name].clone()  # not mapped: the file will be replaced
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if about.get("goal", self.goal) == self.goal:
            self.best_loss, self.best_step = about["best_loss"], about["best_step"]
        if self.fabric.is_global_zero:
            rows = [row for row in read_metrics(self.out_dir) if int(row["step"]) <= about["step"]]
            write_rows(self.out_dir / METRICS_FILE, rows)
        return about["step"]

    def warn_if_stuck(self) -> None:
        """Warn if the training loss has not moved: compare its mean over the first and the last quarter of steps."""
        losses = [float(row["loss"]) for row in read_metrics(self.out_dir) if row.get("loss")]
        n = len(losses) // 4
        if not self.fabric.is_global_zero or not n:
            return
        before, now = sum(losses[:n]) / n, sum(losses[-n:]) / n
        if now > 0.99 * before:
            print(
                f"warning: after {len(losses)} steps the loss has not moved: {now:.4f}, at first {before:.4f}. Is "
                "--train.learning_rate too low, or so high that it jumps about? Are the answers where they should be?",
                file=sys.stderr,
            )


class Interrupt:
    """Whether Ctrl-C, SIGTERM or SIGHUP came."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, signum: int, frame: object) -> None:
        if self.came and signum == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.came = True
        try:
            log_rank0("\nstopping; press Ctrl-C again to stop at once")
        except OSError:  # the terminal has closed: what is still printed must not keep the state from being saved
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def seen(self, fabric: Fabric) -> bool:
        """The same answer on every rank, so that none waits for one that has stopped."""
        if fabric.world_size == 1:
            return self.came
        return bool(fabric.all_reduce(torch.tensor(float(self.came), device=fabric.device), reduce_op="sum"))


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a question to ask between steps."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield interrupt
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def describe_run(
    method: str,
    add: Callable[..., None],
    arguments: dict,
    checkpoint_dir: Path | str,
    task: Task,
    train: TrainArgs,
    dtype: torch.dtype,
    quantize: str = "none",
    **rates: float,
) -> dict:
    """What method.json says of a run: all that generation and a resumed run need to know.

    ``add`` adds the method to a model, with ``arguments``; ``rates`` are further settings of the optimizer. Raises
    UserError if the arguments do not fit the base; no weight is loaded to find out.
    """
    with torch.device("meta"):
        add(LLaMA(load_config(checkpoint_dir)).requires_grad_(False), **arguments)
    return {
        "method": method,
        "arguments": arguments,
        "base": describe_base(checkpoint_dir),
        "base_dtype": str(dtype).removeprefix("torch."),
        "quantize": quantize,
        "prompt_style": task.prompt_style,
        "data": task.data,
        "data_fingerprint": task.fingerprint,
        "train": asdict(train),
        **rates,
        "version": __version__,
    }


def default_out_dir(method: str, data: str | list[dict]) -> Path:
    """out/, the method, and the name of the data."""
    return Path("out") / method / ("rows" if isinstance(data, list) else Path(data).stem)


def save_command_line(folder: Path) -> None:
    """Write the resolved settings of the script that runs, if one does, for ``--config`` to read."""
    if cli.command_line is not None:
        with atomic_write(folder / CONFIG_FILE) as temporary:
            temporary.write_text(cli.command_line, encoding="utf-8")


def append_row(path: Path, row: dict) -> None:
    """Add a row to a CSV file. A name that is no column yet becomes one: the file is written again."""
    columns: list[str] = []
    if path.exists():
        with open(path, encoding="utf-8") as file:
            columns = file.readline().strip().split(",")
    if set(row) - set(columns):
        write_rows(path, [*read_metrics(path.parent), row])
        return
    try:
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerow(row)
    except OSError as error:
        raise write_error(path, error) from None


def write_rows(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_metrics(out_dir: Path) -> list[dict]:
    """The steps so far of a run that may still be going on: without a last line that is still being written.

    Raises UserError, with the line, for a value that is not a number. It may be empty: not every step has every figure.
    """
    path = out_dir / METRICS_FILE
    if not path.exists():
        return []
    reader = csv.DictReader(line for line in read_text(path).splitlines(keepends=True) if line.endswith("\n"))
    rows = []
    try:
        for row in reader:
            int(row["step"]), [float(value) for value in row.values() if value != ""]  # a column too many is a list
            rows.append(row)
    except (csv.Error, KeyError, TypeError, ValueError):
        raise UserError(f"{path}:{reader.line_num}: expected numbers; correct that line") from None
    return rows


def differences(before: dict, now: dict) -> dict[str, str]:
    """The settings that both have and that differ, each with a few words for the user."""
    before, now = flatten(before), flatten(now)
    changed = [key for key in now if key in before and before[key] != now[key]]
    return {key: f"{key} was {before[key]!r}, now {now[key]!r}" for key in changed}


def flatten(settings: dict, prefix: str = "") -> dict[str, object]:
    """{"train": {"seed": 1}} -> {"train.seed": 1}. Tuples become lists, as in JSON."""
    flat: dict[str, object] = {}
    for key, value in json.loads(json.dumps(settings)).items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
