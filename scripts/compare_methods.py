"""What each method costs and gives on one data set: results.json, results.md and two plots.

    python scripts/compare_methods.py --data data/bookings
    python scripts/compare_methods.py --data data/reviews --n_samples 4000 --pilot       # learning rates chosen first
    python scripts/compare_methods.py --data data/bookings --ablations                   # parts of LLaMA-Adapter

Every method runs in a process of its own, through its own finetune script, and sees the same number of samples. The
same command goes on where it was stopped: what is finished is not run again. ``pip install -e ".[plot]"`` for plots.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_config, load_model
from lit_llama.cli import save_settings
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import atomic_write, check_writable, read_json, write_json
from lit_llama.common.progress import Bar
from lit_llama.data.task import load_splits, load_task, split_file
from lit_llama.devices.blocks import check_sharding
from lit_llama.devices.launch import STRATEGIES, check_launcher
from lit_llama.generate.load import load_trained_folder
from lit_llama.measure.benchmark import flops_per_token
from lit_llama.measure.compare import (
    NAMES,
    ScriptRun,
    ablation_jobs,
    learning_rate,
    lowest_loss,
    markdown,
    pilot_jobs,
    quality,
    variant_jobs,
)
from lit_llama.measure.plots import plot_ablations, plot_comparison
from lit_llama.settings import DEFAULT_BASE, MOST, MOST_SAMPLES, MOST_SEED
from lit_llama.train.run import COSTS_FILE, STATE_FILE, differences, read_metrics
from lit_llama.trained import read_method

ROOT = Path(__file__).parent.parent


def main(
    data: str = "data/bookings",
    methods: tuple[str, ...] = NAMES,
    n_samples: int = 1800,
    batch_size: int = 4,
    checkpoint_dir: str = DEFAULT_BASE,
    out_dir: str | None = None,
    variants: dict[str, str] | None = None,
    shots: tuple[int, ...] = (0, 4),
    pilot: bool = False,
    pilot_samples: int = 400,
    ablations: bool = False,
    ablation_steps: int = 50,
    max_test_samples: int | None = None,
    devices: int = 1,
    strategy: str = "auto",
    seed: int = 1337,
    yes: bool = False,
) -> None:
    """Compare methods on one data set.

    Args:
        data: A folder with train and validation files; where it holds a test file, too, quality is measured on that.
        methods: Which ones; features needs rows with a label.
        n_samples: Training samples that each method sees, once the data is through again from the start.
        batch_size: Samples of one optimizer step; the scripts' own learning rates are for two or four, see --pilot.
        checkpoint_dir: Folder of the base; the default one is offered for download when it is missing.
        out_dir: Where everything goes; by default out/compare/ and the data's name.
        variants: More runs by name, each a method and its script's flags: '{"lora r=4": "lora --r 4"}'.
        shots: The base itself is measured with so many examples in its prompt.
        pilot: First try three learning rates for each method, and keep the one of the lowest validation loss.
        pilot_samples: Training samples of such a trial.
        ablations: Vary LLaMA-Adapter instead: its gate's start, its number of layers, its prompt's length.
        ablation_steps: Steps of the comparison of gates.
        max_test_samples: Measure quality on the first ones only.
        devices: Processes of each run, one for each device; memory is that of the first, and features has one only.
        strategy: Strategy on several devices: ddp, fsdp (full uses ddp, as it trains every block), or auto.
        seed: Random seed for data order, initialization and dropout.
        yes: Do not ask before a download.
    """
    counts = dict(n_samples=n_samples, pilot_samples=pilot_samples, ablation_steps=ablation_steps)
    for name, value in counts.items():
        check_range(f"--{name}", value, 1, MOST)
    check_range("--batch_size", batch_size, 1, MOST_SAMPLES)
    check_range("--max_test_samples", max_test_samples, 1, MOST)
    check_range("--seed", seed, 0, MOST_SEED)
    for count in shots:
        check_range("--shots", count, 0, MOST)

    check_launcher(devices, num_nodes=1)
    if strategy not in STRATEGIES:
        raise UserError(f"--strategy {strategy!r} is none of {', '.join(STRATEGIES)}")
    if strategy == "fsdp":
        check_sharding(devices)
    methods, shots = possible_runs(methods, shots, Path(data))
    folder = Path(out_dir or f"out/compare/{Path(data).stem}")
    check_writable(folder / "settings.json")
    ensure_base(checkpoint_dir, yes)
    split = "test" if split_file(Path(data), "test") else "validation"
    settings = dict(data=data, split=split, n_samples=n_samples, batch_size=batch_size, seed=seed, pilot=pilot)
    settings |= dict(checkpoint_dir=checkpoint_dir, max_test_samples=max_test_samples, pilot_samples=pilot_samples)
    settings |= dict(devices=devices, strategy=strategy)
    steps, trials, bases = max(1, n_samples // batch_size), [], {}
    if ablations:
        jobs = ablation_jobs(folder, load_config(checkpoint_dir).n_layer, steps, ablation_steps)
    else:
        jobs = [ScriptRun(name, name, folder / name, 0 if name == "features" else steps) for name in methods]
        jobs += variant_jobs(folder, variants or {}, steps)
        tried = dict.fromkeys(job.method for job in jobs) if pilot else ()
        trials = pilot_jobs(folder, tried, max(1, pilot_samples // batch_size))
        bases = {f"base, {count} examples": (count, folder / f"base-{count}-{split}.json") for count in shots}
    keep_settings(folder / "settings.json", settings)
    save_settings(folder)
    failed: dict[str, str] = {}
    with Bar(sum(job.steps for job in trials + jobs), "steps") as bar:
        run_jobs(trials, jobs, settings, failed, bar)
        for name, (count, file) in bases.items():
            bar.set_description(name)
            flags = ["--checkpoint_dir", checkpoint_dir, "--shots", str(count), *several_devices(settings)]
            evaluate(name, file, settings, flags, failed)
    report(folder, "ablations" if ablations else "results", jobs, bases, settings, failed)
    if failed:
        lines = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise UserError(f"{len(failed)} of the runs failed, the same command tries them again: {lines}")


def possible_runs(
    methods: tuple[str, ...], shots: tuple[int, ...], data: Path
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Methods without features where the rows have no labels, and no examples in the prompt where they ask nothing.

    Raises UserError if a method is unknown.
    """
    unknown = set(methods) - set(NAMES)
    if unknown or not methods:
        raise UserError(f"--methods {sorted(unknown)}: choose from {', '.join(NAMES)}")
    if not data.is_dir():
        raise UserError(f"--data {data} must be a folder with train and validation files")
    samples, _ = load_splits(data)
    if "features" in methods and not all(sample.label for sample in samples):
        print(f"features is left out: the rows of {data} have no labels")
        methods = tuple(name for name in methods if name != "features")
    if any(shots) and not any(sample.messages for sample in samples):
        print(f"examples in the prompt are left out: the rows of {data} ask nothing")
        shots = tuple(count for count in shots if not count)
    return methods, shots


def keep_settings(path: Path, settings: dict) -> None:
    """Refuse to mix runs of other settings with those that are finished."""
    earlier = {"devices": 1, "strategy": "auto"}  # defaults of comparisons by older versions
    if path.exists() and (changes := differences({**earlier, **read_json(path)}, settings).values()):
        raise UserError(
            f"{path.parent} holds a comparison with other settings: {'; '.join(changes)}; pass another --out_dir"
        )
    write_json(path, settings)


# ---------------------------------------------------------------------------------------------- running


def run_jobs(trials: list[ScriptRun], jobs: list[ScriptRun], settings: dict, failed: dict[str, str], bar: Bar) -> None:
    """Train the trials, then each job at the learning rate of its method's best trial, and evaluate it."""
    shared = ["--data", settings["data"], "--checkpoint_dir", settings["checkpoint_dir"]]
    common = [*shared, "--eval_samples", "0", "--train.batch_size", str(settings["batch_size"])]
    common += ["--train.seed", str(settings["seed"])]
    unfit: dict[str, str] = {}  # trials that failed: too high a rate may well
    for job in trials:
        train(job, [*common, *several_devices(settings, job.method)], unfit, bar)
    for job in jobs:
        if tried := [trial for trial in trials if trial.method == job.method and trial.name not in unfit]:
            best = min(tried, key=lambda trial: lowest_loss(trial.out_dir))
            job.flags = ["--train.learning_rate", str(learning_rate(best.out_dir)), *job.flags]
        several = several_devices(settings, job.method)
        flags = [*common, *several]
        if job.method == "features":
            flags = [*shared, "--seed", str(settings["seed"]), "--max_samples", str(settings["n_samples"])]
        if train(job, flags, failed, bar) and job.evaluated:
            bar.set_description(f"{job.name}: answers")
            file = job.out_dir / f"{settings['split']}.json"
            evaluate(job.name, file, settings, ["--trained_dir", str(job.out_dir), *several], failed)


def several_devices(settings: dict, method: str = "") -> list[str]:
    """Features runs on one device; full is never sharded and takes no --strategy."""
    if method == "features":
        return []
    devices = ["--devices", str(settings["devices"])]
    return devices if method == "full" else [*devices, "--strategy", settings["strategy"]]


def train(job: ScriptRun, flags: list[str], failed: dict[str, str], bar: Bar) -> bool:
    """Run a finetune script unless it has run; the bar follows its metrics.csv. Whether there is a trained folder."""
    bar.set_description(job.name)
    before = bar.n
    if not job.trained:
        command = [sys.executable, str(ROOT / "finetune" / f"{job.method}.py"), *flags, *job.flags]
        command += ["--out_dir", str(job.out_dir), "--yes"]
        if job.method != "features":
            eval_every = -(-job.steps // job.validations)
            command += ["--train.max_steps", str(job.steps), "--train.eval_every", str(eval_every)]
        resumable = (job.out_dir / STATE_FILE).exists()
        command += ["--resume"] if resumable else ["--overwrite"]

        def follow() -> None:
            bar.update(before + len(read_metrics(job.out_dir)) - bar.n)

        log = run_process(command, job.out_dir / "train.log", follow)
        if log is None:
            shutil.rmtree((job.out_dir / STATE_FILE).parent, ignore_errors=True)  # three times the model, of "full"
        else:
            failed[job.name] = log
        bar.write(f"{job.name}: {'trained' if log is None else log}", file=sys.stderr)
    bar.update(before + job.steps - bar.n)
    return job.name not in failed


def evaluate(name: str, file: Path, settings: dict, flags: list[str], failed: dict[str, str]) -> None:
    if not file.exists():
        command = [sys.executable, str(ROOT / "scripts/evaluate.py"), *flags, "--results", str(file)]
        command += ["--data", settings["data"], "--split", settings["split"]]
        if settings["max_test_samples"] is not None:
            command += ["--max_samples", str(settings["max_test_samples"])]
        log = run_process(command, file.with_suffix(".log"), lambda: None)
        if log is not None:
            failed[name] = log


def run_process(command: list[str], log_file: Path, tick: Callable[[], object]) -> str | None:
    """None when it went well, else the last line of what it said; all of that is kept in ``log_file``."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                tick()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reaches it, too: it saves and ends
            raise
        log.seek(0)
        lines = log.read().strip().splitlines()
    return None if process.returncode == 0 else (lines or ["it said nothing"])[-1]


# ---------------------------------------------------------------------------------------------- measuring


def report(
    folder: Path,
    name: str,
    jobs: list[ScriptRun],
    bases: dict[str, tuple[int, Path]],
    settings: dict,
    failed: dict[str, str],
) -> None:
    """Measure what did not fail, and write it as a .json file, as a table, and as plots."""
    done = [job for job in jobs if job.name not in failed]
    sample = load_task(settings["data"], settings["checkpoint_dir"], None, 512).train[: settings["batch_size"]]
    results = {job.name: measure(job, sample, job.out_dir / f"{settings['split']}.json") for job in done}
    results |= {base: quality(file) for base, (_, file) in bases.items() if base not in failed}
    write_json(folder / f"{name}.json", {"settings": settings, "results": results, "failed": failed})
    table = markdown(results)
    with atomic_write(folder / f"{name}.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    print(f"\n{table}\nwrote {folder / name}.json and .md")
    if name == "ablations":
        curves = {job.name: [float(row["loss"]) for row in read_metrics(job.out_dir)] for job in done}
        plot_ablations(folder, {name: losses for name, losses in curves.items() if name.startswith("gate")})
    else:
        plot_comparison(folder, results)


def measure(job: ScriptRun, samples: list, file: Path) -> dict:
    """All figures of one finished run."""
    method = read_method(job.out_dir)
    if method["method"] == "full":
        model = load_model(job.out_dir).requires_grad_(True)
    elif method["method"] == "features":
        model = load_model(method["base"]["checkpoint_dir"]).requires_grad_(False)
    else:
        model, _ = load_trained_folder(job.out_dir)
    rows = read_metrics(job.out_dir)
    weights = [path for path in job.out_dir.glob("*.safetensors")]
    figures = {
        "trained_parameters": method["trained_parameters"],
        "trained_share": method["trained_parameters"] / sum(tensor.numel() for tensor in model.parameters()),
        "gflop_per_token": flops_per_token(model, samples) / 1e9,
        **read_json(job.out_dir / COSTS_FILE),  # seconds, peak_memory
        "kept_bytes": sum(path.stat().st_size for path in weights),
    }
    if rows:
        last = [float(row["loss"]) for row in rows[-max(1, len(rows) // 10) :]]
        figures |= {
            "learning_rate": learning_rate(job.out_dir),
            "train_loss": sum(last) / len(last),
            "val_loss": lowest_loss(job.out_dir),
        }
    return figures | (quality(file) if job.evaluated else {})


if __name__ == "__main__":
    cli.run(main)
