"""What each method costs and gives on one data set: results.json, results.md and two plots.

    python scripts/compare_methods.py --data data/bookings
    python scripts/compare_methods.py --data data/reviews --n_samples 4000 --pilot       # learning rates chosen first
    python scripts/compare_methods.py --data data/bookings --ablations                   # of LLaMA-Adapter itself

Every method runs in a process of its own, through its own finetune script, and sees the same number of samples. The
same command goes on where it was stopped: what is finished is not run again. ``pip install -e ".[plot]"`` for plots.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from lit_llama import cli
from lit_llama.bars import Bar
from lit_llama.settings import DEFAULT_BASE

ROOT = Path(__file__).parent.parent
# Learning rates for --pilot: each script's default, and about a third and three times of it.
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
METHODS = ("features", *PILOT_RATES)


@dataclass
class Job:
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
        from lit_llama.runs import COSTS_FILE, read_metrics

        if self.method == "features":
            return (self.out_dir / COSTS_FILE).exists()
        return len(read_metrics(self.out_dir)) == self.steps and (self.out_dir / COSTS_FILE).exists()


def main(
    data: str = "data/bookings",
    methods: tuple[str, ...] = METHODS,
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
        batch_size: Samples of one optimizer step.
        checkpoint_dir: Folder of the base; the default one is offered for download when it is missing.
        out_dir: Where everything goes; by default out/compare/ and the data's name.
        variants: More runs by name, each a method and its script's flags: '{"lora r=4": "lora --r 4"}'.
        shots: The base itself is measured with so many examples in its prompt.
        pilot: First try three learning rates for each method, and keep the one of the lowest validation loss.
        pilot_samples: Training samples of such a trial.
        ablations: Vary LLaMA-Adapter instead: its gate's start, its number of layers, its prompt's length.
        ablation_steps: Steps of the comparison of gates.
        max_test_samples: Measure quality on the first ones only.
        devices: Processes of each run, one for each device; features has one in any case.
        strategy: Of the runs on several devices: ddp, fsdp, or auto.
        seed: Of the order of samples and of everything drawn at random.
        yes: Do not ask before a download.
    """
    from lit_llama.checkpoint import load_config
    from lit_llama.data import split_file
    from lit_llama.download import ensure_base
    from lit_llama.runs import save_command_line

    for name, value in (("n_samples", n_samples), ("pilot_samples", pilot_samples), ("batch_size", batch_size)):
        if value < 1:
            raise cli.UserError(f"--{name} {value} must be at least 1")
    methods = possible_methods(methods, Path(data))
    ensure_base(checkpoint_dir, yes)
    folder = Path(out_dir or f"out/compare/{Path(data).stem}")
    split = "test" if split_file(Path(data), "test") else "validation"
    settings = dict(data=data, split=split, n_samples=n_samples, batch_size=batch_size, seed=seed, pilot=pilot)
    settings |= dict(checkpoint_dir=checkpoint_dir, max_test_samples=max_test_samples, pilot_samples=pilot_samples)
    settings |= dict(devices=devices, strategy=strategy)
    keep_settings(folder / "settings.json", settings)
    save_command_line(folder)

    steps, trials, bases = max(1, n_samples // batch_size), [], {}
    if ablations:
        jobs = ablation_jobs(folder, load_config(checkpoint_dir).n_layer, steps, ablation_steps)
    else:
        jobs = [Job(name, name, folder / name, 0 if name == "features" else steps) for name in methods]
        jobs += variant_jobs(folder, variants or {}, steps)
        trials = pilot_jobs(folder, methods, max(1, pilot_samples // batch_size)) if pilot else []
        bases = {f"base, {count} examples": (count, folder / f"base-{count}-{split}.json") for count in shots}
    failed: dict[str, str] = {}
    with Bar(sum(job.steps for job in trials + jobs), "steps", "step") as bar:
        run_jobs(trials, jobs, settings, failed, bar)
        for name, (count, file) in bases.items():
            bar.set_description(name)
            flags = ["--checkpoint_dir", checkpoint_dir, "--shots", str(count), *several_devices(settings)]
            evaluate(name, file, settings, flags, failed)
    report(folder, "ablations" if ablations else "results", jobs, bases, settings, failed)
    if failed:
        lines = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise cli.UserError(f"{len(failed)} of the runs failed, the same command tries them again: {lines}")


def possible_methods(methods: tuple[str, ...], data: Path) -> tuple[str, ...]:
    """Without features, where the rows have no labels; UserError for an unknown one."""
    from lit_llama.data import load_splits

    unknown = set(methods) - set(METHODS)
    if unknown or not methods:
        raise cli.UserError(f"--methods {sorted(unknown)}: choose from {', '.join(METHODS)}")
    if not data.is_dir():
        raise cli.UserError(f"--data {data} must be a folder with train and validation files")
    if "features" in methods and not all(sample.label for sample in load_splits(data)[0]):
        print(f"features is left out: the rows of {data} have no labels")
        return tuple(name for name in methods if name != "features")
    return methods


def keep_settings(path: Path, settings: dict) -> None:
    """Refuse to mix runs of other settings with those that are finished."""
    from lit_llama.files import read_json, write_json
    from lit_llama.runs import differences

    if path.exists() and (changes := differences(read_json(path), settings)):
        raise cli.UserError(
            f"{path.parent} holds a comparison with other settings: {'; '.join(changes)}; pass another --out_dir"
        )
    write_json(path, settings)


def pilot_jobs(folder: Path, methods: tuple[str, ...], steps: int) -> list[Job]:
    def job(name: str, rate: str) -> Job:
        flags = ["--train.learning_rate", rate]
        return Job(f"{name} at {rate}", name, folder / "pilot" / f"{name}-{rate}", steps, flags, validations=1)

    return [job(name, f"{rate:g}") for name in methods for rate in PILOT_RATES.get(name, ())]


def variant_jobs(folder: Path, variants: dict[str, str], steps: int) -> list[Job]:
    """Runs of a method with other flags. After a pilot they take the learning rate that is best for the method."""
    jobs = []
    for name, words in variants.items():
        method, *flags = shlex.split(words) or [""]
        if method not in PILOT_RATES or name in METHODS or not name.strip(" ./"):
            raise cli.UserError(
                f"--variants {name!r}: {words!r} must be flags of one of {', '.join(PILOT_RATES)}, under a new name"
            )
        jobs.append(Job(name, method, folder / re.sub(r"[^\w.=-]+", "-", name), steps, flags))
    return jobs


def ablation_jobs(folder: Path, n_layer: int, steps: int, gate_steps: int) -> list[Job]:
    """The paper's: the gate's start (the same seed, so the same prompts), the number of blocks, the prompt's length."""

    def job(name: str, flags: list, steps: int = steps, evaluated: bool = True) -> Job:
        return Job(name, "adapter", folder / "ablations" / name.replace(" ", "-"), steps, [*map(str, flags)], evaluated)

    gates = [job(f"gate {start}", ["--gate_init", start], gate_steps, evaluated=False) for start in (0, 1)]
    shapes = [(depth, 10) for depth in sorted({n_layer // 3, 2 * n_layer // 3, n_layer - 2})]
    shapes += [(n_layer - 2, length) for length in (1, 50)]
    return gates + [job(f"L {L} K {K}", ["--start_layer", n_layer - L, "--prompt_length", K]) for L, K in shapes]


# ---------------------------------------------------------------------------------------------- running


def run_jobs(trials: list[Job], jobs: list[Job], settings: dict, failed: dict[str, str], bar: Bar) -> None:
    """Train the trials, then each job at the learning rate of its method's best trial, and evaluate it."""
    from lit_llama.report import learning_rate, lowest_loss

    shared = ["--data", settings["data"], "--checkpoint_dir", settings["checkpoint_dir"]]
    common = [*shared, "--eval_samples", "0", "--train.batch_size", str(settings["batch_size"])]
    common += ["--train.seed", str(settings["seed"]), *several_devices(settings)]
    unfit: dict[str, str] = {}  # trials that failed: too high a rate may well
    for job in trials:
        train(job, common, unfit, bar)
    for job in jobs:
        if tried := [trial for trial in trials if trial.method == job.method and trial.name not in unfit]:
            best = min(tried, key=lambda trial: lowest_loss(trial.out_dir))
            job.flags += ["--train.learning_rate", str(learning_rate(best.out_dir))]
        features = [*shared, "--seed", str(settings["seed"]), "--max_samples", str(settings["n_samples"])]
        if train(job, features if job.method == "features" else common, failed, bar) and job.evaluated:
            bar.set_description(f"{job.name}: answers")
            file = job.out_dir / f"{settings['split']}.json"
            several = [] if job.method == "features" else several_devices(settings)
            evaluate(job.name, file, settings, ["--trained_dir", str(job.out_dir), *several], failed)


def several_devices(settings: dict) -> list[str]:
    return ["--devices", str(settings["devices"]), "--strategy", settings["strategy"]]


def train(job: Job, flags: list[str], failed: dict[str, str], bar: Bar) -> bool:
    """Run a finetune script unless it has run; the bar follows its metrics.csv. Whether there is a trained folder."""
    from lit_llama.runs import STATE_FILE, read_metrics

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
        log = run_process(command, job.out_dir, lambda: bar.update(before + len(read_metrics(job.out_dir)) - bar.n))
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
        log = run_process(command, file.parent, lambda: None)
        if log is not None:
            failed[name] = log


def run_process(command: list[str], folder: Path, tick) -> str | None:
    """None when it went well, else the last line of what it said; all of that is kept in log.txt beside its output."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w+", encoding="utf-8") as log:
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
    folder: Path, name: str, jobs: list[Job], bases: dict[str, tuple[int, Path]], settings: dict, failed: dict[str, str]
) -> None:
    """Measure what did not fail, and write it as a .json file, as a table, and as plots."""
    from lit_llama.data import load_task
    from lit_llama.files import write_json
    from lit_llama.plots import plot_ablations, plot_comparison
    from lit_llama.report import markdown, quality
    from lit_llama.runs import read_metrics

    done = [job for job in jobs if job.name not in failed]
    sample = load_task(settings["data"], settings["checkpoint_dir"], None, 512).train[: settings["batch_size"]]
    results = {job.name: measure(job, sample, job.out_dir / f"{settings['split']}.json") for job in done}
    results |= {base: quality(file) for base, (_, file) in bases.items() if base not in failed}
    write_json(folder / f"{name}.json", {"settings": settings, "results": results, "failed": failed})
    table = markdown(results)
    (folder / f"{name}.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwrote {folder / name}.json and .md")
    if name == "ablations":
        curves = {job.name: [float(row["loss"]) for row in read_metrics(job.out_dir)] for job in done}
        plot_ablations(folder, {name: losses for name, losses in curves.items() if name.startswith("gate")})
    else:
        plot_comparison(folder, results)


def measure(job: Job, samples: list, file: Path) -> dict:
    """All figures of one finished run."""
    from lit_llama.checkpoint import load_model
    from lit_llama.files import read_json
    from lit_llama.report import flops_per_token, learning_rate, lowest_loss, quality
    from lit_llama.runs import COSTS_FILE, read_metrics
    from lit_llama.trained import load_trained_folder, read_method

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
        "trained_numbers": method["trained_numbers"],
        "trained_share": method["trained_numbers"] / sum(tensor.numel() for tensor in model.parameters()),
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
