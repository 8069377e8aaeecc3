"""A comparison of methods: the runs it needs, their results with 95 % intervals, and the table."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json
from lit_llama.measure.intervals import difference_interval, per_token, proportion_interval
from lit_llama.methods.table import METHODS
from lit_llama.train.run import COSTS_FILE, read_metrics
from lit_llama.trained import METHOD_FILE, read_method

# Learning rates for --pilot, for steps of four or eight samples. A method that is not listed tries OTHER_RATES.
PILOT_RATES = {
    "output_layers": (1e-4, 3e-4, 1e-3),
    "full": (3e-5, 1e-4, 3e-4),
    "soft_prompt": (1e-1, 3e-1, 1.0),
    "prefix": (1e-2, 3e-2, 1e-1),
    "houlsby": (1e-4, 3e-4, 1e-3),
    "adapter": (7e-3, 2e-2, 6e-2),
    "adapter_v2": (1e-3, 3e-3, 1e-2),
    "lora": (3e-4, 1e-3, 3e-3),
}
OTHER_RATES = (1e-3, 3e-3, 1e-2)
NAMES = ("features", *METHODS)
# Flags that all runs of a comparison share. A classifier's answers cannot be compared with texts.
COMMON_FLAGS = {"--data", "--checkpoint_dir", "--out_dir", "--head"}
COMMON_FLAGS |= {f"--train.{name}" for name in ("max_steps", "epochs", "batch_size", "seed", "eval_every", "patience")}


@dataclass
class ScriptRun:
    """One run of a finetune script, in the folder ``out_dir``."""

    name: str
    method: str
    out_dir: Path
    steps: int  # none for features
    seed: int
    flags: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def trained(self) -> bool:
        """Whether the run took all steps and validated the last one."""
        rows = read_metrics(self.out_dir)
        complete = len(rows) == self.steps and all(row.get("val_loss") for row in rows[-1:])
        return complete and (self.out_dir / COSTS_FILE).exists()


def with_seeds(runs: list[ScriptRun], seeds: int) -> list[ScriptRun]:
    """All runs with their own seed, then with the next one, in folders inside the first ones, and so on.

    Features has one run: nothing in it is random.
    """
    again = [(run, run.seed + more) for more in range(1, seeds) for run in runs if run.method != "features"]
    return runs + [replace(run, out_dir=run.out_dir / f"seed-{seed}", seed=seed) for run, seed in again]


def pilot_runs(folder: Path, methods: Iterable[str], steps: int, seed: int) -> list[ScriptRun]:
    """Three trials for each method that has a learning rate (features has none). They validate once."""
    runs = []
    for name in methods:
        for rate in PILOT_RATES.get(name, OTHER_RATES) if name in METHODS else ():
            flags = ["--train.learning_rate", f"{rate:g}", "--train.eval_every", str(steps)]
            runs.append(ScriptRun(f"{name} at {rate:g}", name, folder / f"pilot/{name}-{rate:g}", steps, seed, flags))
    return runs


def pilot_flags(run: ScriptRun, trials: list[ScriptRun]) -> list[str]:
    """The flag for the learning rate of the method's best trial, if one succeeded. A started run keeps its rate."""
    tried = [trial for trial in trials if trial.method == run.method and trial.trained]
    if not tried:
        return []
    best = min(tried, key=lambda trial: lowest_loss(trial.out_dir))
    started = (run.out_dir / METHOD_FILE).exists()
    method = read_method(run.out_dir if started else best.out_dir)
    return ["--train.learning_rate", str(method["train"]["learning_rate"])]


def variant_runs(folder: Path, variants: dict[str, str], steps: int, seed: int) -> list[ScriptRun]:
    """Runs of a method with other flags. After a pilot they take the learning rate that is best for the method."""
    runs: dict[Path, ScriptRun] = {}
    for name, words in variants.items():
        try:
            method, *flags = shlex.split(words) or [""]
        except ValueError as error:
            raise UserError(f"--variants {name!r}: {words!r}: {error}") from None
        out_dir = folder / "variants" / re.sub(r"[^\w.=-]+", "-", words.strip())
        fixed = {flag.split("=")[0] for flag in flags} & COMMON_FLAGS
        if method not in METHODS or fixed or name in NAMES or name.startswith("base,") or out_dir in runs:
            raise UserError(
                f"--variants {name!r}: {words!r} must be one of {', '.join(METHODS)} and its flags, without "
                f"{', '.join(sorted(COMMON_FLAGS))}, under a new name, each given once"
            )
        runs[out_dir] = ScriptRun(name, method, out_dir, steps, seed, flags)
    return list(runs.values())


def lowest_loss(out_dir: Path) -> float:
    """The lowest validation loss of a run."""
    return min(float(row["val_loss"]) for row in read_metrics(out_dir) if row["val_loss"])


def read_results(files: list[Path]) -> tuple[list[int], dict[str, np.ndarray]]:
    """The rows in files that scripts/evaluate.py wrote, and their "loss", "n_targets" and "right", each (files, rows).

    The pieces of a long text are added up. Rows that do not have the same number of targets in all files are left out.
    """
    read: list[dict[int, dict]] = []
    for file in files:
        read.append({})
        for piece in read_json(file)["samples"]:
            row = read[-1].setdefault(piece["row"], {**piece, "loss": 0.0, "n_targets": 0})
            row["loss"] += piece["loss"]
            row["n_targets"] += piece["n_targets"]
    common = [row for row in read[0] if len({one[row]["n_targets"] if row in one else 0 for one in read}) == 1]
    keys = ("loss", "n_targets", "right")
    return common, {key: np.array([[one[row][key] for row in common] for one in read], dtype=float) for key in keys}


def quality(files: list[Path]) -> dict:
    """Exact match and loss per token, with intervals. scripts/evaluate.py wrote a file for each seed.

    Plain texts have only a loss.
    """
    rows, values = read_results(files)
    counts, right = values["n_targets"][0], values["right"]
    loss, interval = per_token(values["loss"], counts)
    result = {"loss": loss, "loss_interval": interval, "n_test": len(counts), "seeds": len(files)}
    asked = ~np.isnan(right[0])
    if asked.any():
        right = right[:, asked]
        result |= {"right": float(right.mean()), "right_interval": proportion_interval(right)}
        result["answers"] = dict(zip(map(str, np.array(rows)[asked]), right.T.tolist(), strict=True))
    return result


def loss_change(name: str, after: list[Path], before: list[Path]) -> dict:
    """The change of the loss per token on the same samples, under ``name``, and its interval.

    There is a file for each seed. One file before, such as the base's, is compared with all.
    """
    _, values = read_results([*after, *before])
    losses = values["loss"]
    change, interval = per_token(losses[: len(after)] - losses[len(after) :], values["n_targets"][0])
    return {name: change, f"{name}_interval": interval}


def versus_full(row: dict, full: dict) -> dict:
    """The difference to full finetuning's exact match in points, on the samples that both answered."""
    both = [sample for sample in row["answers"] if sample in full["answers"]]
    ours, theirs = (np.array([one["answers"][sample] for sample in both]).T for one in (row, full))
    interval = [100 * end for end in difference_interval(ours, theirs)]
    return {"minus_full": 100 * float(ours.mean() - theirs.mean()), "minus_full_interval": interval}


COLUMNS: dict[str, tuple[str, float, str]] = {  # header: key, unit, format
    "trained": ("trained_parameters", 1, ",.0f"),
    "of all": ("trained_share", 1, ".3%"),
    "right, 95 %": ("right", 1, ".1%"),
    "minus full": ("minus_full", 1, "+.1f"),
    "loss, 95 %": ("loss", 1, ".4f"),
    "minus the method's own": ("minus_method", 1, "+.4f"),
    "rise on other data": ("forgetting", 1, "+.4f"),
    "training loss": ("train_loss", 1, ".4f"),
    "GFLOP/token": ("gflop_per_token", 1, ".2f"),
    "minutes": ("seconds", 60, ".1f"),
    "peak MB": ("peak_memory", 1e6, ",.0f"),  # unknown on Windows
    "kept MB": ("kept_bytes", 1e6, ",.2f"),
}


def markdown(results: dict[str, dict]) -> str:
    """The table, with each method's exact match compared with full finetuning's on the same samples."""
    full = results.get("full")
    table = [["", *COLUMNS]]
    for name, row in results.items():
        if full and row is not full and "right" in row:
            row = row | versus_full(row, full)
        table.append([name, *(cell(row, *column) for column in COLUMNS.values())])
    table.insert(1, ["---"] * len(table[0]))
    used = [i for i in range(len(table[0])) if not i or any(cells[i] for cells in table[2:])]  # drop empty columns
    return "".join(f"| {' | '.join(cells[i] for i in used)} |\n" for cells in table)


def cell(row: dict, key: str, unit: float, form: str) -> str:
    """A figure, with its interval if it has one; "" if the row lacks it."""
    if row.get(key) is None:
        return ""
    value, *interval = (f"{number / unit:{form}}" for number in (row[key], *row.get(f"{key}_interval", ())))
    return (f"{value} ({' to '.join(interval)})" if interval else value).replace("%", " %")
