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
from lit_llama.trained import read_method

# Learning rates for --pilot, for steps of four or eight samples. A method that is not listed tries OTHER_RATES.
PILOT_RATES = {
    "output_layers": (3e-4, 1e-3, 3e-3),
    "full": (1e-5, 3e-5, 1e-4),
    "soft_prompt": (3e-3, 1e-2, 3e-2),
    "prefix": (1e-2, 3e-2, 1e-1),
    "houlsby": (3e-4, 1e-3, 3e-3),
    "adapter": (7e-3, 2e-2, 6e-2),
    "adapter_v2": (3e-3, 1e-2, 3e-2),
    "lora": (1e-3, 3e-3, 1e-2),
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
    steps: int
    flags: list[str] = field(default_factory=list)
    validations: int = 2
    seed: int = 0

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def trained(self) -> bool:
        if self.method == "features":
            return (self.out_dir / COSTS_FILE).exists()
        return len(read_metrics(self.out_dir)) == self.steps and (self.out_dir / COSTS_FILE).exists()


def with_seeds(jobs: list[ScriptRun], seeds: Iterable[int]) -> list[ScriptRun]:
    """All jobs with the first seed, then with the next one, in folders inside the first ones, and so on.

    Features has one run: nothing in it is random.
    """
    first, *others = seeds
    random = [job for job in jobs if job.method != "features"]
    again = [replace(job, out_dir=job.out_dir / f"seed-{seed}", seed=seed) for seed in others for job in random]
    return [replace(job, seed=first) for job in jobs] + again


def pilot_jobs(folder: Path, methods: Iterable[str], steps: int) -> list[ScriptRun]:
    """Three trials for each method that has a learning rate."""

    def job(name: str, rate: str) -> ScriptRun:
        flags = ["--train.learning_rate", rate]
        return ScriptRun(f"{name} at {rate}", name, folder / "pilot" / f"{name}-{rate}", steps, flags, validations=1)

    rates = {name: PILOT_RATES.get(name, OTHER_RATES) for name in METHODS}  # features has none
    return [job(name, f"{rate:g}") for name in methods for rate in rates.get(name, ())]


def variant_jobs(folder: Path, variants: dict[str, str], steps: int) -> list[ScriptRun]:
    """Runs of a method with other flags. After a pilot they take the learning rate that is best for the method."""
    jobs: dict[Path, ScriptRun] = {}
    for name, words in variants.items():
        try:
            method, *flags = shlex.split(words) or [""]
        except ValueError as error:
            raise UserError(f"--variants {name!r}: {words!r}: {error}") from None
        out_dir = folder / "variants" / re.sub(r"[^\w.=-]+", "-", words.strip())
        fixed = {flag.split("=")[0] for flag in flags} & COMMON_FLAGS
        if method not in METHODS or fixed or name in NAMES or name.startswith("base,") or out_dir in jobs:
            raise UserError(
                f"--variants {name!r}: {words!r} must be one of {', '.join(METHODS)} and its flags, without "
                f"{', '.join(sorted(COMMON_FLAGS))}, under a new name, each given once"
            )
        jobs[out_dir] = ScriptRun(name, method, out_dir, steps, flags)
    return list(jobs.values())


def lowest_loss(out_dir: Path) -> float:
    """The lowest validation loss of a run."""
    return min(float(row["val_loss"]) for row in read_metrics(out_dir) if row["val_loss"])


def learning_rate(out_dir: Path) -> float:
    """The learning rate of a run."""
    return read_method(out_dir)["train"]["learning_rate"]


def read_results(files: list[Path]) -> list[dict[int, dict]]:
    """The samples in files that scripts/evaluate.py wrote, by row: those with the same number of targets in all files.

    The pieces of a long text are added up.
    """
    read: list[dict[int, dict]] = []
    for file in files:
        read.append({})
        for piece in read_json(file)["samples"]:
            row = read[-1].setdefault(piece["row"], {**piece, "loss": 0.0, "n_targets": 0})
            row["loss"] += piece["loss"]
            row["n_targets"] += piece["n_targets"]
    common = [row for row in read[0] if len({one[row]["n_targets"] if row in one else 0 for one in read}) == 1]
    return [{row: samples[row] for row in common} for samples in read]


def values_of(samples: list[dict[int, dict]], key: str) -> np.ndarray:
    """One value of each sample, (files, samples)."""
    return np.array([[row[key] for row in one.values()] for one in samples], dtype=float)


def quality(files: list[Path]) -> dict:
    """Exact match and loss per token, with intervals. scripts/evaluate.py wrote a file for each seed.

    Plain texts have only a loss.
    """
    samples = read_results(files)
    counts = values_of(samples, "n_targets")[0]
    loss, interval = per_token(values_of(samples, "loss"), counts)
    result = {"loss": loss, "loss_interval": interval, "n_test": len(counts), "seeds": len(files)}
    asked = [{row: sample for row, sample in one.items() if sample["right"] is not None} for one in samples]
    if asked[0]:
        right = values_of(asked, "right")
        result |= {"right": float(right.mean()), "right_interval": proportion_interval(right)}
        result["answers"] = dict(zip(map(str, asked[0]), right.T.tolist(), strict=True))
    return result


def loss_change(after: list[Path], before: list[Path]) -> tuple[float, tuple[float, float]]:
    """The change of the loss per token on the same samples, and its interval.

    There is a file for each seed. One file before, such as the base's, is compared with all.
    """
    samples = read_results([*after, *before])
    counts = values_of(samples, "n_targets")[0]
    losses = values_of(samples, "loss")
    return per_token(losses[: len(after)] - losses[len(after) :], counts)


def versus_full(row: dict, full: dict) -> tuple[float, tuple[float, float]]:
    """The difference to full finetuning's exact match, on the samples that both answered, and its interval."""
    both = [sample for sample in row["answers"] if sample in full["answers"]]
    ours, theirs = (np.array([one["answers"][sample] for sample in both]).T for one in (row, full))
    return float(ours.mean() - theirs.mean()), difference_interval(ours, theirs)


def markdown(results: dict[str, dict]) -> str:
    """The table, with each method's exact match compared with full finetuning's on the same samples."""
    header = ["", "trained", "of all", "right, 95 %", "minus full", "loss, 95 %", "minus the method's own"]
    header += ["rise on other data", "training loss", "GFLOP/token", "minutes", "peak MB", "kept MB"]
    rows, full = [], results.get("full")
    for name, row in results.items():
        trains = "trained_parameters" in row
        cells = [name, *((f"{row['trained_parameters']:,}", f"{row['trained_share']:.3%}") if trains else ("", ""))]
        cells.append(with_interval(row["right"], row["right_interval"], ".1%") if "right" in row else "")
        if full and row is not full and "right" in row:
            difference, interval = versus_full(row, full)
            cells.append(with_interval(100 * difference, [100 * end for end in interval], "+.1f"))
        else:
            cells.append("")
        for key, form in (("loss", ".4f"), ("minus_method", "+.4f"), ("forgetting", "+.4f")):
            cells.append(with_interval(row[key], row[f"{key}_interval"], form) if key in row else "")
        cells.append(f"{row['train_loss']:.4f}" if "train_loss" in row else "")
        if "seconds" in row:
            cells += [f"{row['gflop_per_token']:.2f}", f"{row['seconds'] / 60:.1f}"]
            cells += ["" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:,.0f}"]  # unknown on Windows
            cells += [f"{row['kept_bytes'] / 1e6:,.2f}"]
        else:
            cells += [""] * 4
        rows.append([cell.replace("%", " %") for cell in cells])
    used = [i for i, name in enumerate(header) if not i or any(row[i] for row in rows)]  # drop empty columns
    lines = [[row[i] for i in used] for row in (header, ["---"] * len(header), *rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def with_interval(value: float, interval: Iterable[float], form: str) -> str:
    low, high = interval
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
