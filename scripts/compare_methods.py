"""Compare what the methods cost and how well they work on one data set: results.json, results.md and plots.

    python scripts/compare_methods.py --data data/bookings
    python scripts/compare_methods.py --data data/reviews --n_samples 4000 --pilot       # choose learning rates first
    python scripts/compare_methods.py --data data/bookings --seeds 3 --other_data data/alpaca/validation.json
    python scripts/compare_methods.py --variants '{"K=50": "adapter --prompt_length 50"}'   # parts of a method

Every method runs in its own process, by its own finetune script, on the same number of samples. If a comparison was
stopped, the same command continues it: runs that have finished are kept. ``pip install -e ".[plot]"`` for plots.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Literal

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_config
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import atomic_write, check_writable, read_json, write_json
from lit_llama.data.samples import read_samples
from lit_llama.data.task import load_splits, load_task, split_file
from lit_llama.devices.launch import Bar, check_launcher
from lit_llama.measure.benchmark import flops_per_token
from lit_llama.measure.compare import (
    NAMES,
    ScriptRun,
    loss_change,
    lowest_loss,
    markdown,
    pilot_flags,
    pilot_runs,
    quality,
    variant_runs,
    with_seeds,
)
from lit_llama.measure.plots import plot_comparison, plot_variants
from lit_llama.methods.table import weightless
from lit_llama.settings import DEFAULT_BASE, MAX_COUNT, MAX_SAMPLES, MAX_SEED, ROOT
from lit_llama.tokenizer import Tokenizer
from lit_llama.train.run import COSTS_FILE, STATE_FILE, differences, read_metrics
from lit_llama.trained import read_method


def main(
    data: str = "data/bookings",
    methods: tuple[Literal[NAMES], ...] = NAMES,
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
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    seed: int = 1337,
    yes: bool = False,
) -> None:
    """Compare methods on one data set.

    Args:
        data: A folder with train and validation files. Quality is measured on its test file, if it has one.
        methods: The methods to compare; features needs rows with a label.
        n_samples: Training samples that each method sees, in as many epochs as that takes.
        batch_size: Samples per optimizer step. The scripts' own learning rates are for two or four, see --pilot.
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
    """
    counts = dict(n_samples=n_samples, pilot_samples=pilot_samples, max_test_samples=max_test_samples)
    for name, value in counts.items():
        check_range(f"--{name}", value, 1, MAX_COUNT)
    check_range("--batch_size", batch_size, 1, MAX_SAMPLES)
    check_range("--seeds", seeds, 1, 100)
    check_range("--seed", seed, 0, MAX_SEED - seeds + 1)
    for count in shots:
        check_range("--shots", count, 0, MAX_COUNT)
    if other_data is not None:
        read_samples(other_data)
    check_launcher(devices, num_nodes=1, strategy=strategy)
    if not Path(data).is_dir():
        raise UserError(f"--data {data} must be a folder with train and validation files")
    if not split_file(Path(data), "test") and not split_file(Path(data), "validation"):
        raise UserError(f"--data {data} holds neither a validation nor a test file to measure quality on")
    samples, _, _ = load_splits(data)
    if "features" in methods and not all(sample.label for sample in samples):
        print(f"features is left out: the rows of {data} have no labels")
        methods = tuple(name for name in methods if name != "features")
    if any(shots) and not any(sample.messages for sample in samples):
        print(f"examples in the prompt are left out: the rows of {data} have no prompt")
        shots = tuple(count for count in shots if not count)
    folder = Path(out_dir or f"out/compare/{Path(data).stem}")
    check_writable(folder / "settings.json")

    # Runs: trials of learning rates; each method and variant with each seed
    steps = max(1, n_samples // batch_size)
    runs = [ScriptRun(name, name, folder / name, 0 if name == "features" else steps, seed) for name in methods]
    runs = with_seeds(runs + variant_runs(folder, variants or {}, steps, seed), seeds)
    tried = dict.fromkeys(run.method for run in runs) if pilot else ()  # each once, in order
    trials = pilot_runs(folder, tried, max(1, pilot_samples // batch_size), seed)

    # Settings: equal to those of the runs that the folder already holds
    ensure_base(checkpoint_dir, yes)
    split = "test" if split_file(Path(data), "test") else "validation"
    settings = dict(data=data, split=split, n_samples=n_samples, batch_size=batch_size, seed=seed, pilot=pilot)
    settings |= dict(checkpoint_dir=checkpoint_dir, max_test_samples=max_test_samples, pilot_samples=pilot_samples)
    settings |= dict(devices=devices, strategy=strategy)
    before = read_json(folder / "settings.json") if (folder / "settings.json").exists() else {}
    if changes := "; ".join(differences(before, settings).values()):
        raise UserError(f"{folder} holds a comparison with other settings: {changes}; pass another --out_dir")
    write_json(folder / "settings.json", settings)
    cli.save_settings(folder)

    # Tests: the files and flags of scripts/evaluate.py. Other data is the same tokens for all methods: in the base's
    # prompt style, cut at the same length.
    test_file, other_file = f"{split}.json", f"other-{'-'.join(Path(other_data or '').absolute().parts[1:])}.json"
    test_flags = ["--data", data, "--split", split]
    test_flags += [] if max_test_samples is None else ["--max_samples", str(max_test_samples)]
    style = "template" if Tokenizer(checkpoint_dir).chat_template else "alpaca"
    other_flags = ["--data", str(other_data), "--max_samples", "500", "--only_loss"]
    other_flags += ["--prompt_style", style, "--max_seq_length", "512"]
    bases = {count: folder / f"base-{count}-{test_file}" for count in shots}

    # Loop: what has not run yet. A finished run is kept, and one that fails does not stop the others.
    errors: dict[str, str | None] = {}
    with Bar(sum(run.steps for run in trials + runs), "base") as bar:
        base = ["--checkpoint_dir", checkpoint_dir, *device_flags("base", settings)]
        for count, file in bases.items():
            errors[f"base, {count} examples"] = evaluate(file, [*base, "--shots", str(count), *test_flags])
        if other_data is not None:
            errors["base, other data"] = evaluate(folder / other_file, [*base, *other_flags])
        for trial in trials:
            train(trial, train_flags(trial, settings), bar)  # one that fails is no candidate
        for run in runs:
            errors[run.label] = train(run, pilot_flags(run, trials) + train_flags(run, settings), bar)
            if errors[run.label]:
                continue
            bar.set_description(f"{run.label}: answers")
            trained = ["--trained_dir", str(run.out_dir), *device_flags(run.method, settings)]
            errors[run.label] = evaluate(run.out_dir / test_file, [*trained, *test_flags])
            if other_data is not None and run.method != "features":
                errors[f"{run.label}, other data"] = evaluate(run.out_dir / other_file, [*trained, *other_flags])
    failed = {label: error for label, error in errors.items() if error}

    # Results
    first_step = load_task(data, checkpoint_dir, 512).train[:batch_size]
    results = method_results(runs, first_step, test_file, other_file, folder)
    results |= {f"base, {count} examples": quality([file]) for count, file in bases.items() if file.exists()}
    write_json(folder / "results.json", {"settings": settings, "results": results, "failed": failed})
    text = markdown(results)
    if rates := [f"{name} {row['learning_rate']:g}" for name, row in results.items() if "learning_rate" in row]:
        text += f"\nLearning rates: {', '.join(rates)}.\n"
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwrote {folder / 'results.json'} and results.md")
    if find_spec("matplotlib"):
        plot_comparison(folder, results)
        plot_variants(folder, results)
    else:
        print('no plots: matplotlib is missing; pip install -e ".[plot]"', file=sys.stderr)
    if failed:
        lines = "; ".join(f"{label}: {error}" for label, error in failed.items())
        raise UserError(f"{len(failed)} runs failed; the same command tries them again: {lines}")


def device_flags(method: str, settings: dict) -> list[str]:
    """Features runs on one device, and full is never sharded."""
    if method == "features":
        return []
    flags = ["--devices", str(settings["devices"])]
    return flags if method == "full" else [*flags, "--strategy", settings["strategy"]]


def train_flags(run: ScriptRun, settings: dict) -> list[str]:
    """The flags of a run's finetune script, its own last."""
    flags = ["--data", settings["data"], "--checkpoint_dir", settings["checkpoint_dir"]]
    if run.method == "features":
        return [*flags, "--max_samples", str(settings["n_samples"])]
    flags += ["--eval_samples", "0", "--train.batch_size", str(settings["batch_size"])]
    flags += ["--train.max_steps", str(run.steps), "--train.eval_every", str(-(-run.steps // 2))]
    return [*flags, "--train.seed", str(run.seed), *device_flags(run.method, settings), *run.flags]


def train(run: ScriptRun, flags: list[str], bar: Bar) -> str | None:
    """Run a finetune script unless it has run; the bar follows its metrics.csv. Returns the error of one that fails."""
    bar.set_description(run.label)
    before, error = bar.n, None

    def follow() -> None:
        bar.update(before + len(read_metrics(run.out_dir)) - bar.n)

    if not run.trained:
        state = run.out_dir / STATE_FILE
        flags = [*flags, "--out_dir", str(run.out_dir), "--yes", "--resume" if state.exists() else "--overwrite"]
        error = run_script(f"finetune/{run.method}.py", flags, run.out_dir / "train.log", follow)
        if error is None:
            shutil.rmtree(state.parent, ignore_errors=True)  # for full, three times the model
        bar.write(f"{run.label}: {error or 'trained'}", file=sys.stderr)
    bar.update(before + run.steps - bar.n)
    return error


def evaluate(file: Path, flags: list[str]) -> str | None:
    """Run scripts/evaluate.py unless ``file`` has its results. Returns the error if it fails."""
    if file.exists():
        return None
    return run_script("scripts/evaluate.py", [*flags, "--results", str(file)], file.with_suffix(".log"))


def run_script(script: str, flags: list[str], log_file: Path, tick: Callable[[], None] = lambda: None) -> str | None:
    """Run a script and write its output to ``log_file``. Returns the last line if it fails."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "w+", encoding="utf-8", errors="replace") as log:
        command = [sys.executable, str(ROOT / script), *flags]
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


def method_results(runs: list[ScriptRun], samples: list, test_file: str, other_file: str, folder: Path) -> dict:
    """The results of each method and variant, over the seeds that have been tested."""
    groups: dict[str, list[ScriptRun]] = {run.name: [] for run in runs}
    for run in runs:
        if (run.out_dir / test_file).exists():
            groups[run.name].append(run)
    results = {}
    for name, group in groups.items():
        if not group:
            continue
        row = costs(group, samples) | quality([run.out_dir / test_file for run in group])
        after, base = [run.out_dir / other_file for run in group], folder / other_file
        if all(file.exists() for file in [*after, base]):
            row |= loss_change("forgetting", after, [base])
        own = {run.seed: run.out_dir / test_file for run in groups.get(row["method"], [])}
        pairs = [run for run in group if run.seed in own]  # a variant and the method's own run with the same seed
        if pairs and name != row["method"]:
            files = [run.out_dir / test_file for run in pairs]
            row |= loss_change("minus_method", files, [own[run.seed] for run in pairs])
        results[name] = row
    return results


def costs(runs: list[ScriptRun], samples: list) -> dict:
    """Size and costs of a method: means over its runs, and the highest peak memory."""
    first = runs[0].out_dir
    method = read_method(first)
    model = weightless(load_config(method["base"]["checkpoint_dir"]), method["method"], **method["arguments"])
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
    curves = [[float(step["loss"]) for step in read_metrics(run.out_dir)] for run in runs]
    if curves[0]:
        row |= {
            "learning_rate": method["train"]["learning_rate"],
            "train_loss": mean(mean(losses[-max(1, len(losses) // 10) :]) for losses in curves),
            "val_loss": mean(lowest_loss(run.out_dir) for run in runs),
        }
    return row


if __name__ == "__main__":
    cli.run(main)
