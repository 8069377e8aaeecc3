"""The folder of a training run: what it holds, and how a stopped run continues.

    trained.safetensors    the best validated step (finetune/full.py writes a checkpoint folder's files instead)
    method.json            what generation and a resumed run need to know
    metrics.csv            one row per step
    config.yaml            the command line, for --config
    costs.json             seconds of training without validation, peak memory
    state/                 the last saved step, for --resume

Run counts the steps and writes the files. The loop itself is in the scripts.
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
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from lit_llama import __version__
from lit_llama.checkpoint import CONFIG_FILE, INDEX_FILE, MODEL_FILE, load_config
from lit_llama.cli import FLAGS_FILE, save_settings
from lit_llama.common.errors import Interrupted, UserError
from lit_llama.common.files import (
    atomic_write,
    check_writable,
    read_json,
    read_tensors,
    remove_unfinished,
    save_tensors,
    write_error,
    write_json,
)
from lit_llama.data.prompts import describe_template, write_chat_template
from lit_llama.data.task import Task
from lit_llama.devices.launch import Bar, barrier, log_rank0, print_rank0
from lit_llama.devices.memory import peak_memory
from lit_llama.model import LLaMA
from lit_llama.settings import ROOT, TrainArgs
from lit_llama.tokenizer import TOKENIZER_FILES, copy_tokenizer
from lit_llama.trained import (
    HEADER_KEYS,
    METHOD_FILE,
    TRAINED_FILE,
    check_base,
    describe_base,
    kept_tensors,
    load_parameters,
    read_method,
    trainable_parameters,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

METRICS_FILE, COSTS_FILE = "metrics.csv", "costs.json"
LOCK_FILE, STATE_FILE = ".lock", "state/state.safetensors"
# A resumed run may differ in these settings; data_fingerprint covers data and chat_template. Micro-batches change
# rounding, and which activations dropout drops.
MAY_CHANGE = {"base.checkpoint_dir", "base.name", "data", "version", "chat_template"}
MAY_CHANGE |= {"train.micro_batch_tokens", "train.save_every", "train.patience"}


class Run:
    """The folder ``out_dir`` of one run.

    ``settings`` becomes method.json: what generation needs, and what a resumed run must share. If the folder already
    holds a run, pass ``resume`` or ``overwrite``; ``allow_changes`` resumes with another base, other data or other
    training settings. ``whole_model_of`` is the base's folder if the whole model trains: its config and tokenizer are
    copied, so that ``out_dir`` can serve as a base. Nothing is written before the loop starts.

    Raises UserError if the flags do not fit the folder.
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
        self.header = {key: settings[key] for key in HEADER_KEYS}
        # What validation losses refer to: they can only be compared on the same base and data.
        self.goal = [settings["base"]["fingerprint"], settings["data_fingerprint"]]
        self.step, self.best_loss, self.best_step = 0, math.inf, 0
        self.row: dict[str, float] = {}  # metrics of the current step
        self.step_began, self.tokens, self.seconds = 0.0, 0.0, 0.0
        # A singleton, so that a second run in the same process can resume the folder.
        self.folder_lock = FileLock(os.path.realpath(self.out_dir / LOCK_FILE), is_singleton=True)
        if resume and overwrite:
            raise UserError("--resume continues a run and --overwrite starts it again: give one of them")
        if allow_changes and not resume:
            raise UserError("--allow_changes is for --resume: give both or neither")
        self.check_folder(overwrite)
        self.writes_settings = not resume or self.check_settings(allow_changes)
        barrier(fabric, f"check {out_dir}")  # no rank writes before all have looked

    def check_folder(self, overwrite: bool) -> None:
        """Raises UserError if ``out_dir`` holds something that this run must not change."""
        check_writable(self.out_dir / METHOD_FILE)
        base = self.settings["base"]["checkpoint_dir"]  # relative to the current folder, or to the clone
        if os.path.realpath(self.out_dir) in (os.path.realpath(base), os.path.realpath(ROOT / base)):
            raise UserError(f"--out_dir {self.out_dir} is the base itself; choose another --out_dir")
        names = (METHOD_FILE, MODEL_FILE, INDEX_FILE, METRICS_FILE, STATE_FILE)
        held = [name for name in names if (self.out_dir / name).exists()]
        if {MODEL_FILE, INDEX_FILE} & set(held) and METHOD_FILE not in held:
            raise UserError(f"--out_dir {self.out_dir} holds a checkpoint that no run wrote; choose another --out_dir")
        if self.resume and STATE_FILE not in held:
            way_out = "with --overwrite" if held else "without --resume"
            raise UserError(f"nothing to resume: {self.out_dir / STATE_FILE} is missing; start again {way_out}")
        if self.resume:
            read_metrics(self.out_dir)  # refuses a damaged file
        if held and not (self.resume or overwrite):
            raise UserError(
                f"{self.out_dir} holds a run already ({', '.join(held)}); pass --resume to continue it, --overwrite to "
                "start again, or another --out_dir"
            )

    def check_settings(self, allow_changes: bool) -> bool:
        """Whether settings differ from those the run began with. Raises UserError unless that is allowed."""
        changed = differences(read_method(self.out_dir), self.settings)
        changes = [change for key, change in changed.items() if key not in MAY_CHANGE]
        fits = not any(key.split(".")[0] in HEADER_KEYS for key in changed)  # the trained tensors can still be used
        if changes and not (fits and allow_changes):
            way_out = "--allow_changes to continue with these" if fits else "--overwrite to start again with these"
            raise UserError(
                f"--resume of {self.out_dir} with other settings: {'; '.join(changes)}. Pass the settings that the run "
                f"began with (see {FLAGS_FILE}), or {way_out}"
            )
        for change in changes:
            print_rank0(f"note: continuing with other settings: {change}")
        return bool(changes)

    def steps(self, model: LLaMA, optimizer: torch.optim.Optimizer, total_steps: int, save_every: int) -> Iterator[int]:
        """Yields the number of each step to take, counted from 0.

        A resumed run continues after its saved step; if that was the last one, nothing is changed. The state is saved
        before the first step, every ``save_every`` steps and after the last. On Ctrl-C or SIGTERM, the step is
        finished, the state saved, and Interrupted raised.
        """
        if self.resume and (taken := read_tensors(self.out_dir / STATE_FILE)[1]["step"]) >= total_steps:
            print_rank0(f"{self.out_dir} has taken all of its {taken} steps; nothing is changed")
            return
        self.start(sum(tensor.numel() for tensor in trainable_parameters(model).values()))
        self.step = self.load_state(model, optimizer) if self.resume else 0
        if self.step == 0:  # a run stopped before its first regular save can be resumed
            self.save_state(model, optimizer)
        bar = Bar(total_steps, "step", initial=self.step)
        try:
            with catch_interrupt(self.fabric) as interrupted, bar:
                while self.step < total_steps:
                    self.row, self.step_began = {}, time.perf_counter()
                    try:
                        yield self.step
                    finally:  # also when the script breaks out of the loop
                        self.step += 1
                        self.write_row(bar)
                    stopping = interrupted()
                    if self.step % save_every == 0 or self.step == total_steps or stopping:
                        self.save_state(model, optimizer)
                    if stopping:
                        raise Interrupted(f"stopped and saved at step {self.step} of {total_steps}; --resume continues")
        finally:
            for logger in self.fabric.loggers:
                logger.finalize("success")

    def log(self, step: int, **metrics: float) -> None:
        """Add metrics to a step's row (steps count from 0), which is written to metrics.csv when the step ends.

        A new name becomes a new column. The first call in a step also records the seconds since the step began.
        """
        if not self.row:
            metrics["seconds"] = round(time.perf_counter() - self.step_began, 3)
        self.row = {"step": step + 1, **self.row, **metrics}

    def keep_best(self, model: LLaMA, val_loss: float) -> None:
        """Log the validation loss. Write the trained tensors if it is the lowest so far."""
        self.log(self.step, val_loss=val_loss)
        if val_loss < self.best_loss:
            self.best_loss, self.best_step = val_loss, self.step + 1
            self.save_trained(model)

    def load_best(self, model: LLaMA) -> None:
        """Load the best validated step into ``model``. If a script left the loop before any, the last step is kept."""
        if self.step and not (self.out_dir / self.trained_file).exists():
            self.save_trained(model)
        if self.step and self.fabric.is_global_zero:
            self.save_costs(self.seconds)  # of all steps, also if the script left the loop
        barrier(self.fabric, "finish the last step")
        if model.reparametrization is not None:
            model.reparametrization.flatten(model)
        load_parameters(model, self.out_dir / self.trained_file)

    # files

    def save_trained(self, model: LLaMA) -> None:
        if self.fabric.is_global_zero:
            save_tensors(self.out_dir / self.trained_file, kept_tensors(model), self.header)

    def start(self, trained_parameters: int) -> None:
        """Lock the folder while this object lives, remove an earlier run unless it is resumed, and describe this one.

        Raises UserError on every rank if another process holds the lock.
        """
        if self.fabric.is_global_zero:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                self.folder_lock.acquire(blocking=False)
        if not self.fabric.broadcast(self.folder_lock.is_locked):  # what rank 0 sees
            raise UserError(
                f"another process writes to {self.out_dir}; wait until it ends, stop it, or choose another --out_dir"
            )
        if self.fabric.is_global_zero:
            remove_unfinished(self.out_dir)
            remove_unfinished(self.out_dir / "state")
            if not self.resume:  # remove what a run writes, and nothing else
                names = [TRAINED_FILE, MODEL_FILE, METRICS_FILE, FLAGS_FILE, COSTS_FILE, METHOD_FILE]
                if (self.out_dir / CONFIG_FILE).exists():  # finetune/full.py copied it, and a tokenizer, from a base
                    names += [CONFIG_FILE, *TOKENIZER_FILES]
                for name in names:
                    (self.out_dir / name).unlink(missing_ok=True)
                for name in ("state", "tensorboard"):
                    shutil.rmtree(self.out_dir / name, ignore_errors=True)
            if self.writes_settings:
                write_json(self.out_dir / METHOD_FILE, {**self.settings, "trained_parameters": trained_parameters})
                save_settings(self.out_dir)
            if self.writes_settings and self.whole_model_of:
                base = Path(self.whole_model_of)
                write_json(self.out_dir / CONFIG_FILE, read_json(base / CONFIG_FILE))
                copy_tokenizer(base, self.out_dir)
                write_chat_template(self.out_dir, self.settings["chat_template"])
        for logger in self.fabric.loggers:
            logger.log_hyperparams(flatten_settings(self.settings))

    def write_row(self, bar: Bar) -> None:
        """Write the step's metrics to metrics.csv, the loggers and the bar."""
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
        """Save trained tensors, optimizer, step and best loss in one file, so that they belong to the same step."""
        if self.fabric.is_global_zero:
            tensors = {f"trained.{name}": tensor for name, tensor in trainable_parameters(model).items()}
            for i, values in optimizer.state_dict()["state"].items():
                tensors.update({f"optimizer.{i}.{key}": value for key, value in values.items()})
            about = {"step": self.step, "best_loss": self.best_loss, "best_step": self.best_step, "goal": self.goal}
            save_tensors(self.out_dir / STATE_FILE, tensors, about)
            self.save_costs(self.seconds)
        barrier(self.fabric, "save the state")  # no rank may end the job before the file is complete

    def save_costs(self, seconds: float) -> None:
        """Write the seconds of training, and the peak memory of rank 0 in bytes."""
        write_json(self.out_dir / COSTS_FILE, {"seconds": seconds, "peak_memory": peak_memory(self.fabric.device)})

    def load_state(self, model: LLaMA, optimizer: torch.optim.Optimizer) -> int:
        """Load the last saved state, drop later rows of metrics.csv, and return the number of steps taken."""
        path = self.out_dir / STATE_FILE
        tensors, about = load_parameters(model, path, prefix="trained.")
        state: dict[int, dict] = {}
        for name in tensors:
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensors[name].clone()  # a copy: the mapped file will be replaced
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if about.get("goal", self.goal) == self.goal:
            self.best_loss, self.best_step = about["best_loss"], about["best_step"]
        if self.fabric.is_global_zero:
            rows = [row for row in read_metrics(self.out_dir) if int(row["step"]) <= about["step"]]
            self.seconds = sum(float(row["seconds"]) for row in rows)
            self.tokens = sum(float(row.get("tokens") or 0) for row in rows)
            write_rows(self.out_dir / METRICS_FILE, rows)
        return about["step"]


@contextmanager
def catch_interrupt(fabric: Fabric) -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C and SIGTERM. Yields a function: whether any rank was interrupted, so that all stop together."""
    came = False

    def handle(signum: int, frame: object) -> None:
        nonlocal came
        if came and signum == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        came = True
        log_rank0("\nstopping; press Ctrl-C again to stop at once")

    def interrupted() -> bool:
        if fabric.world_size == 1:
            return came
        return bool(fabric.all_reduce(torch.tensor(float(came), device=fabric.device), reduce_op="sum"))

    in_main_thread = threading.current_thread() is threading.main_thread()  # only there handlers can be set
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield interrupted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def describe_run(
    method: str,
    add: Callable[..., None],
    arguments: dict,
    task: Task,
    train: TrainArgs,
    dtype: torch.dtype,
    quantize: str = "none",
    init_from: str | None = None,
) -> dict:
    """The method.json of a run: everything that generation and a resumed run need to know.

    ``add(model, **arguments)`` adds the method to a model. ``init_from`` is a trained folder to begin with, of the same
    method, arguments and base. Raises UserError if the arguments do not fit the base or that folder, which is checked
    without loading weights.
    """
    with torch.device("meta"):
        model = LLaMA(load_config(task.checkpoint_dir)).requires_grad_(False)
        add(model, **arguments)
    settings = {
        "method": method,
        "arguments": arguments,
        "base": describe_base(task.checkpoint_dir),
        "base_dtype": str(dtype).removeprefix("torch."),
        "quantize": quantize,
        **describe_template(task.chat_template),
        "data": task.data,
        "data_fingerprint": task.fingerprint,
        "train": asdict(train),
        "version": __version__,
    }
    if init_from:
        initial = read_method(init_from)
        changed = differences({key: initial[key] for key in ("method", "arguments")}, settings)
        for free in ("arguments.dropout", "arguments.mlp_size"):  # not in the tensors
            changed.pop(free, None)
        if changed:
            raise UserError(f"--init_from {init_from}: {'; '.join(changed.values())}; pass the same")
        if model.reparametrization is not None:
            raise UserError(f"--init_from {init_from} holds prefixes without their MLP; pass --mlp_size 0")
        check_base(initial["base"], task.checkpoint_dir, Path(init_from) / METHOD_FILE)
        settings["init_from"] = init_from
    return settings


def default_out_dir(method: str, data: str | list[dict]) -> Path:
    """out/METHOD/DATA, relative to the current directory."""
    return Path("out") / method / ("rows" if isinstance(data, list) else Path(data).stem)


def append_row(path: Path, row: dict) -> None:
    """Append a row to a CSV file. If it has a new column, the file is rewritten."""
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
    """The rows of metrics.csv. A last line that is still being written is left out; a missing value is ""."""
    path = out_dir / METRICS_FILE
    lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True) if path.exists() else []
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
    try:
        [(int(row["step"]), float(row["seconds"])) for row in rows]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: a row lacks step or seconds; repair or remove it") from None
    return rows


def differences(before: dict, now: dict) -> dict[str, str]:
    """The settings that are in both and differ, each with a description for the user."""
    before, now = flatten_settings(before), flatten_settings(now)
    changed = [key for key in now if key in before and before[key] != now[key]]
    return {key: f"{key} was {before[key]!r}, now {now[key]!r}" for key in changed}


def flatten_settings(settings: dict, prefix: str = "") -> dict[str, object]:
    """{"train": {"seed": 1}} -> {"train.seed": 1}. Tuples become lists, as in JSON."""
    flat: dict[str, object] = {}
    for key, value in json.loads(json.dumps(settings)).items():
        flat.update(flatten_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
