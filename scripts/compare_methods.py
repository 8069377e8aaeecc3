"""Compare what the methods cost and how well they work on one data set: results.json, results.md and plots.

    python scripts/compare_methods.py --data data/bookings
    python scripts/compare_methods.py --data data/reviews --n_samples 4000 --pilot       # choose learning rates first
    python scripts/compare_methods.py --data data/bookings --seeds 3 --other_data data/alpaca/validation.json
    python scripts/compare_methods.py --variants '{"K=50": "adapter --prompt_length 50"}'   # parts of a method

Every method runs in its own process, by its own finetune script, on the same number of samples. If a comparison was
stopped, the same command continues it: runs that have finished are kept. ``pip install -e ".[plot]"`` for plots.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_model
from lit_llama.cli import save_settings
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import atomic_write, check_writable, read_json, write_json
from lit_llama.data.samples import read_samples
from lit_llama.data.task import load_splits, load_task, split_file
from lit_llama.devices.launch import Bar, check_launcher
from lit_llama.generate.load import load_trained_folder
from lit_llama.measure.benchmark import flops_per_token
from lit_llama.measure.compare import (
    NAMES,
    ScriptRun,
    learning_rate,
    loss_change,
    lowest_loss,
    markdown,
    pilot_jobs,
    quality,
    variant_jobs,
    with_seeds,
)
from lit_llama.measure.plots import plot_comparison, plot_variants
from lit_llama.settings import DEFAULT_BASE, MAX_COUNT, MAX_SAMPLES, MAX_SEED, ROOT
from lit_llama.tokenizer import Tokenizer
from lit_llama.train.run import COSTS_FILE, STATE_FILE, differences, read_metrics
from lit_llama.trained import METHOD_FILE, read_method

OTHER_SAMPLES = 500


def main(
    data: str = "data/bookings",
    methods: tuple[str, ...] = NAMES,
    n_samples: int = 1800,
    batch_size: int = 4,
    checkpoint_dir: str = DEFAULT_BASE,
    out_dir: str | None = None,
    variants: dict[str, str] | None = None,
    shots: tuple[int, ...] = (0, 4),
    seeds: int = 1,
    other_data: str | None = None,
    pilot: bool = False,
    pilot_samples: int = 400,
    max_test_samples: int | None = None,
    devices: int = 1,
    strategy: str = "auto",
    seed: int = 1337,
    yes: bool = False,
) -> None:
    """Compare methods on one data set.

    Args:
        data: A folder with train and validation files. Quality is measured on its test file, if it has one.
        methods: The methods to compare; features needs rows with a label.
        n_samples: Training samples that each method sees, in as many epochs as that takes.
        batch_size: Samples per optimizer step. The scripts' own learning rates are for two or four, see --pilot.
        checkpoint_dir: Folder of the base. The default one is offered for download if it is missing.
        out_dir: Folder for the results. Default: out/compare/ and the name of the data.
        variants: More runs by name, each a method and its script's flags: '{"lora r=4": "lora --r 4"}'.
        shots: Also measure the base, with so many examples in its prompt.
        seeds: Runs per method, with seeds --seed, --seed + 1 and so on. Intervals then cover seeds and samples.
        other_data: A file of other data, to measure forgetting: the rise of the loss on its first 500 samples.
        pilot: First try three learning rates for each method, and keep the one with the lowest validation loss.
        pilot_samples: Training samples of such a trial.
        max_test_samples: Measure quality on only the first samples.
        devices: Processes of each run, one per device. Memory is that of the first. Features uses one device.
        strategy: Strategy on several devices: ddp, fsdp (full uses ddp, as it trains every block), or auto.
        seed: Random seed for data order, initialization and dropout.
        yes: Do not ask before a download.
    """
    check_range("--n_samples", n_samples, 1, MAX_COUNT)
    check_range("--pilot_samples", pilot_samples, 1, MAX_COUNT)
    check_range("--batch_size", batch_size, 1, MAX_SAMPLES)
    check_range("--max_test_samples", max_test_samples, 1, MAX_COUNT)
    check_range("--seeds", seeds, 1, 100)
    check_range("--seed", seed, 0, MAX_SEED - seeds + 1)
    for count in shots:
        check_range("--shots", count, 0, MAX_COUNT)
    if other_data is not None:
        read_samples(other_data)

    check_launcher(devices, num_nodes=1, strategy=strategy)
    methods, shots = possible_runs(methods, shots, Path(data))
    folder = Path(out_dir or f"out/compare/{Path(data).stem}")
    check_writable(folder / "settings.json")
    ensure_base(checkpoint_dir, yes)
    split = "test" if split_file(Path(data), "test") else "validation"
    settings = dict(data=data, split=split, n_samples=n_samples, batch_size=batch_size, seed=seed, pilot=pilot)
    settings |= dict(checkpoint_dir=checkpoint_dir, max_test_samples=max_test_samples, pilot_samples=pilot_samples)
    settings |= dict(devices=devices, strategy=strategy)
    steps = max(1, n_samples // batch_size)
    jobs = [ScriptRun(name, name, folder / name, 0 if name == "features" else steps) for name in methods]
    jobs += variant_jobs(folder, variants or {}, steps)
    tried = dict.fromkeys(job.method for job in jobs) if pilot else ()
    trials = with_seeds(pilot_jobs(folder, tried, max(1, pilot_samples // batch_size)), [seed])
    jobs = with_seeds(jobs, range(seed, seed + seeds))
    bases = {f"base, {count} examples": count for count in shots}
    keep_settings(folder / "settings.json", settings)
    save_settings(folder)

    comparison = Comparison(folder, settings, other_data)
    with Bar(sum(job.steps for job in trials + jobs), "steps") as bar:
        comparison.evaluate_base(bases, bar)
        comparison.run(trials, jobs, bar)
    results = comparison.results(jobs) | comparison.base_results(bases)
    comparison.write(results)
    plot_comparison(folder, results)
    plot_variants(folder, results)
    if comparison.failed:
        lines = "; ".join(f"{name}: {why}" for name, why in comparison.failed.items())
        raise UserError(f"{len(comparison.failed)} runs failed; the same command tries them again: {lines}")


def possible_runs(
    methods: tuple[str, ...], shots: tuple[int, ...], data: Path
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Leave out features if rows have no labels, and examples in the prompt if rows have no prompt.

    Raises UserError if a method is unknown.
    """
    unknown = set(methods) - set(NAMES)
    if unknown or not methods:
        raise UserError(f"--methods {sorted(unknown)}: choose from {', '.join(NAMES)}")
    if not data.is_dir():
        raise UserError(f"--data {data} must be a folder with train and validation files")
    samples, _, _ = load_splits(data)
    if "features" in methods and not all(sample.label for sample in samples):
        print(f"features is left out: the rows of {data} have no labels")
        methods = tuple(name for name in methods if name != "features")
    if any(shots) and not any(sample.messages for sample in samples):
        print(f"examples in the prompt are left out: the rows of {data} have no prompt")
        shots = tuple(count for count in shots if not count)
    return methods, shots


def keep_settings(path: Path, settings: dict) -> None:
    """Write the settings. Raises UserError if the folder's finished runs had others."""
    if path.exists() and (changes := differences(read_json(path), settings).values()):
        raise UserError(
            f"{path.parent} holds a comparison with other settings: {'; '.join(changes)}; pass another --out_dir"
        )
    write_json(path, settings)


@dataclass
class Comparison:
    """Runs what has not run yet, and reads the results. ``failed`` holds the last line that a failed run printed."""

    folder: Path
    settings: dict
    other_data: str | None
    failed: dict[str, str] = field(default_factory=dict)

    def run(self, trials: list[ScriptRun], jobs: list[ScriptRun], bar: Bar) -> None:
        """Train the trials, then each job at the learning rate of its method's best trial, and evaluate it."""
        unfit: dict[str, str] = {}  # trials that failed, perhaps because the rate is too high
        for job in trials:
            train(job, self.flags_of(job), unfit, bar)
        for job in jobs:
            flags = self.flags_of(job)
            if tried := [trial for trial in trials if trial.method == job.method and trial.label not in unfit]:
                best = min(tried, key=lambda trial: lowest_loss(trial.out_dir)).out_dir
                source = job.out_dir if (job.out_dir / METHOD_FILE).exists() else best  # a started run keeps its rate
                flags = ["--train.learning_rate", str(learning_rate(source)), *flags]
            if train(job, flags, self.failed, bar):
                bar.set_description(f"{job.label}: answers")
                trained = ["--trained_dir", str(job.out_dir), *self.devices(job.method)]
                self.evaluate(job.label, self.test_file(job.out_dir), [*trained, *self.test_flags])
                if self.other_data and job.method != "features":
                    self.evaluate(
                        f"{job.label}, other data", self.other_file(job.out_dir), [*trained, *self.other_flags]
                    )

    def evaluate_base(self, bases: dict[str, int], bar: Bar) -> None:
        """Evaluate the base with each number of examples in its prompt, and on the other data."""
        bar.set_description("base")
        base = ["--checkpoint_dir", self.settings["checkpoint_dir"], *self.devices()]
        for name, shots in bases.items():
            self.evaluate(name, self.base_file(shots), [*base, "--shots", str(shots), *self.test_flags])
        if self.other_data:
            self.evaluate("base, other data", self.other_file(self.folder), [*base, *self.other_flags])

    def evaluate(self, name: str, file: Path, flags: list[str]) -> None:
        """Run scripts/evaluate.py, unless ``file`` has its results."""
        command = [sys.executable, str(ROOT / "scripts/evaluate.py"), *flags, "--results", str(file)]
        if not file.exists() and (error := run_process(command, file.with_suffix(".log"))) is not None:
            self.failed[name] = error

    # files and flags

    def test_file(self, out_dir: Path) -> Path:
        return out_dir / f"{self.settings['split']}.json"

    def base_file(self, shots: int) -> Path:
        return self.folder / f"base-{shots}-{self.settings['split']}.json"

    def other_file(self, out_dir: Path) -> Path:
        return out_dir / f"other-{Path(self.other_data or '').stem}.json"

    @property
    def test_flags(self) -> list[str]:
        flags = ["--data", self.settings["data"], "--split", self.settings["split"]]
        limit = self.settings["max_test_samples"]
        return flags if limit is None else [*flags, "--max_samples", str(limit)]

    @cached_property
    def other_flags(self) -> list[str]:
        """The same tokens for all: in the base's prompt style, cut at the same length."""
        style = "template" if Tokenizer(self.settings["checkpoint_dir"]).chat_template else "alpaca"
        flags = ["--data", str(self.other_data), "--max_samples", str(OTHER_SAMPLES), "--only_loss"]
        return [*flags, "--prompt_style", style, "--max_seq_length", "512"]

    def flags_of(self, job: ScriptRun) -> list[str]:
        """The flags of a job's finetune script."""
        flags = ["--data", self.settings["data"], "--checkpoint_dir", self.settings["checkpoint_dir"]]
        if job.method == "features":
            return [*flags, "--max_samples", str(self.settings["n_samples"]), *job.flags]
        flags += ["--eval_samples", "0", "--train.batch_size", str(self.settings["batch_size"])]
        flags += ["--train.max_steps", str(job.steps), "--train.eval_every", str(-(-job.steps // job.validations))]
        return [*flags, "--train.seed", str(job.seed), *self.devices(job.method), *job.flags]

    def devices(self, method: str = "") -> list[str]:
        """Features runs on one device; full is never sharded and takes no --strategy."""
        if method == "features":
            return []
        devices = ["--devices", str(self.settings["devices"])]
        return devices if method == "full" else [*devices, "--strategy", self.settings["strategy"]]

    # results

    def results(self, jobs: list[ScriptRun]) -> dict[str, dict]:
        """The results by name, over the seeds whose run did not fail."""
        samples = load_task(self.settings["data"], self.settings["checkpoint_dir"], None, 512).train
        results: dict[str, dict] = {}
        for name in dict.fromkeys(job.name for job in jobs):
            runs = [job for job in jobs if job.name == name and job.label not in self.failed]
            if not runs:
                continue
            results[name] = costs(runs, samples[: self.settings["batch_size"]])
            results[name] |= quality([self.test_file(run.out_dir) for run in runs])
            after, base = [self.other_file(run.out_dir) for run in runs], self.other_file(self.folder)
            if all(file.exists() for file in [*after, base]):
                add_change(results[name], "forgetting", after, [base])
            if name != runs[0].method:  # a variant: compare it with the method's own run with the same seed
                own = [job for job in jobs if job.name == runs[0].method and job.label not in self.failed]
                ours, theirs = ({run.seed: self.test_file(run.out_dir) for run in group} for group in (runs, own))
                if seeds := sorted(ours.keys() & theirs.keys()):
                    tests = [[files[seed] for seed in seeds] for files in (ours, theirs)]
                    add_change(results[name], "minus_method", *tests)
        return results

    def base_results(self, bases: dict[str, int]) -> dict[str, dict]:
        return {name: quality([self.base_file(n)]) for name, n in bases.items() if name not in self.failed}

    def write(self, results: dict[str, dict]) -> None:
        """Write results.json and a table, and print the table."""
        content = {"settings": self.settings, "results": results, "failed": self.failed}
        write_json(self.folder / "results.json", content)
        text = markdown(results)
        if rates := [f"{run} {row['learning_rate']:g}" for run, row in results.items() if "learning_rate" in row]:
            text += f"\nLearning rates: {', '.join(rates)}.\n"
        with atomic_write(self.folder / "results.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"\n{text}\nwrote {self.folder / 'results.json'} and results.md")


def add_change(row: dict, key: str, after: list[Path], before: list[Path]) -> None:
    row[key], row[f"{key}_interval"] = loss_change(after, before)


def train(job: ScriptRun, flags: list[str], failed: dict[str, str], bar: Bar) -> bool:
    """Run a finetune script unless it has run; the bar follows its metrics.csv. Returns whether it succeeded."""
    bar.set_description(job.label)
    before = bar.n
    if not job.trained:
        resumable = (job.out_dir / STATE_FILE).exists()
        command = [sys.executable, str(ROOT / "finetune" / f"{job.method}.py"), *flags, "--out_dir", str(job.out_dir)]
        command += ["--yes", "--resume" if resumable else "--overwrite"]

        def follow() -> None:
            bar.update(before + len(read_metrics(job.out_dir)) - bar.n)

        error = run_process(command, job.out_dir / "train.log", follow)
        if error is None:
            shutil.rmtree((job.out_dir / STATE_FILE).parent, ignore_errors=True)  # for full, three times the model
        else:
            failed[job.label] = error
        bar.write(f"{job.label}: {'trained' if error is None else error}", file=sys.stderr)
    bar.update(before + job.steps - bar.n)
    return job.label not in failed


def run_process(command: list[str], log_file: Path, tick: Callable[[], object] = lambda: None) -> str | None:
    """Run a command and write its output to ``log_file``. Returns None on success, else its last line."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                tick()
        except KeyboardInterrupt:
            process.wait()  # it gets Ctrl-C too: it saves and stops
            raise
        log.seek(0)
        lines = log.read().strip().splitlines()
    return None if process.returncode == 0 else (lines or ["no output"])[-1]


def costs(runs: list[ScriptRun], samples: list) -> dict:
    """Size and costs of a method: means over its runs, and the highest peak memory."""
    first = runs[0].out_dir
    method = read_method(first)
    if method["method"] == "full":
        model = load_model(first).requires_grad_(True)
    elif method["method"] == "features":
        model = load_model(method["base"]["checkpoint_dir"]).requires_grad_(False)
    else:
        model, _ = load_trained_folder(first)
    spent = [read_json(run.out_dir / COSTS_FILE) for run in runs]
    peaks = [one["peak_memory"] for one in spent]
    row = {
        "method": method["method"],
        "trained_parameters": method["trained_parameters"],
        "trained_share": method["trained_parameters"] / sum(tensor.numel() for tensor in model.parameters()),
        "gflop_per_token": flops_per_token(model, samples) / 1e9,
        "seconds": mean(one["seconds"] for one in spent),
        "peak_memory": None if None in peaks else max(peaks),
        "kept_bytes": sum(path.stat().st_size for path in first.glob("*.safetensors")),
    }
    curves = [losses_of(run) for run in runs]
    if curves[0]:
        row |= {
            "learning_rate": learning_rate(first),
            "train_loss": mean(mean(losses[-max(1, len(losses) // 10) :]) for losses in curves),
            "val_loss": mean(lowest_loss(run.out_dir) for run in runs),
        }
    return row


def losses_of(run: ScriptRun) -> list[float]:
    """The training loss of each step."""
    return [float(row["loss"]) for row in read_metrics(run.out_dir)]


if __name__ == "__main__":
    cli.run(main)
