"""A comparison of methods: the runs it needs, their figures with 95 % intervals, and the table."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, ttest_rel

from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json
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
# What all runs of a comparison have in common; a classifier's answers are no text to compare.
COMMON_FLAGS = {"--data", "--checkpoint_dir", "--out_dir", "--head"}
COMMON_FLAGS |= {"--train.max_steps", "--train.epochs", "--train.batch_size"}


@dataclass
class ScriptRun:
    """One run of a finetune script, in the folder ``out_dir``."""

    name: str
    method: str
    out_dir: Path
    steps: int
    flags: list[str] = field(default_factory=list)
    evaluated: bool = True  # on the held-out split; a pilot and a curve need none
    validations: int = 4

    @property
    def trained(self) -> bool:
        if self.method == "features":
            return (self.out_dir / COSTS_FILE).exists()
        return len(read_metrics(self.out_dir)) == self.steps and (self.out_dir / COSTS_FILE).exists()


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
                f"--variants {name!r}: {words!r} must be flags of one of {', '.join(METHODS)}, under a new "
                f"name and each once, without {', '.join(sorted(COMMON_FLAGS))}"
            )
        jobs[out_dir] = ScriptRun(name, method, out_dir, steps, flags)
    return list(jobs.values())


ABLATION_RATE = 2e-2  # LLaMA-Adapter's with prompts at random and four samples a step, whatever its script's default


def ablation_jobs(folder: Path, n_layer: int, steps: int, gate_steps: int) -> list[ScriptRun]:
    """The paper's: the gate's start (the same seed, so the same prompts), the number of blocks, the prompt's length."""

    def job(name: str, flags: list, steps: int = steps, evaluated: bool = True) -> ScriptRun:
        flags = ["--train.learning_rate", ABLATION_RATE, "--prompt_init", "normal", *flags]
        return ScriptRun(
            name, "adapter", folder / "ablations" / name.replace(" ", "-"), steps, [*map(str, flags)], evaluated
        )

    gates = [job(f"gate {start}", ["--gate_init", start], gate_steps, evaluated=False) for start in (0, 1)]
    shapes = [(depth, 10) for depth in sorted({n_layer // 3, 2 * n_layer // 3, n_layer - 2})]
    shapes += [(n_layer - 2, length) for length in (1, 50)]
    return gates + [job(f"L {L} K {K}", ["--start_layer", n_layer - L, "--prompt_length", K]) for L, K in shapes]


def quality(file: Path) -> dict:
    """Exact match and loss per token, with intervals, of a file that scripts/evaluate.py wrote.

    Plain texts have only a loss.
    """
    rows = read_json(file)["samples"]
    losses, counts = [row["loss"] for row in rows], [row["n_targets"] for row in rows]
    asked = [row for row in rows if row["right"] is not None]
    right = sum(row["right"] for row in asked)
    figures = {"loss": sum(losses) / sum(counts), "loss_interval": loss_interval(losses, counts), "n_test": len(rows)}
    if asked:
        figures |= {
            "right": right / len(asked),
            "right_interval": proportion_interval(right, len(asked)),
            "answers": {str(row["row"]): row["right"] for row in asked},
        }
    return figures


def lowest_loss(out_dir: Path) -> float:
    """The lowest validation loss of a run."""
    return min(float(row["val_loss"]) for row in read_metrics(out_dir) if row["val_loss"])


def learning_rate(out_dir: Path) -> float:
    """The learning rate of a run."""
    return read_method(out_dir)["train"]["learning_rate"]


def markdown(results: dict[str, dict]) -> str:
    """The table. It also compares each method's exact match with full finetuning's on the same samples."""
    header = ["", "trained", "of all", "right, 95 %", "minus full", "loss, 95 %", "training loss", "GFLOP/token"]
    header += ["minutes", "peak MB", "kept MB"]
    rows = [header, ["---"] * len(header)]
    full = results.get("full")
    for name, row in results.items():
        cells = [name]
        if "trained_parameters" in row:
            cells += [f"{row['trained_parameters']:,}", f"{row['trained_share']:.3%}"]
        else:
            cells += ["0", "0 %"]
        if "right" in row:
            cells += [f"{row['right']:.1%} ({spread(row['right_interval'], '.1%')})"]
            cells += [paired(row, full) if full and row is not full else ""]
        else:
            cells += [""] * 2
        cells += [f"{row['loss']:.4f} ({spread(row['loss_interval'], '.4f')})" if "loss" in row else ""]
        cells += [f"{row['train_loss']:.4f}" if "train_loss" in row else ""]
        if "seconds" in row:
            cells += [f"{row['gflop_per_token']:.2f}", f"{row['seconds'] / 60:.1f}"]
            cells += ["" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:,.0f}"]  # unknown on Windows
            cells += [f"{row['kept_bytes'] / 1e6:,.2f}"]
        else:
            cells += [""] * 4
        rows.append([cell.replace("%", " %").replace("  %", " %") for cell in cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def spread(interval: tuple[float, float], form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def paired(row: dict, full: dict) -> str:
    """The difference to full finetuning in points, on the samples that both answered."""
    both = [number for number in row["answers"] if number in full["answers"]]
    mean, low, high = paired_difference(*([one["answers"][number] for number in both] for one in (row, full)))
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def proportion_interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's interval for a proportion. It is also valid at 0 % and 100 %."""
    interval = binomtest(right, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def loss_interval(losses: list[float], counts: list[int], seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval (2,000 resamples) for the loss per token, sum(losses) / sum(counts)."""
    rows = np.random.default_rng(seed).integers(len(losses), size=(2000, len(losses)))
    drawn = np.asarray(losses)[rows].sum(1) / np.asarray(counts)[rows].sum(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def paired_difference(ours: list[bool], theirs: list[bool]) -> tuple[float, float, float]:
    """The difference of two exact matches on the same samples in the same order, and its interval (paired t-test).

    It is more precise than either exact match: samples that both get right, or both wrong, add no noise.
    """
    mean = float(np.mean(ours) - np.mean(theirs))
    if list(ours) == list(theirs):  # no variance
        return 0.0, 0.0, 0.0
    interval = ttest_rel(np.asarray(ours, float), np.asarray(theirs, float)).confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high)
