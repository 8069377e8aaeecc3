"""What scripts/compare_methods.py runs: methods, trials of learning rates, variants, ablations of LLaMA-Adapter."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lit_llama.common.errors import UserError
from lit_llama.methods.table import METHODS
from lit_llama.train.run import COSTS_FILE, read_metrics

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
