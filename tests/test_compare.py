"""scripts/compare_methods.py on a tiny base: what it measures and says of a failure; curves of runs; TensorBoard."""

import json
import math
import subprocess
import sys
from contextlib import contextmanager
from statistics import NormalDist

import numpy as np
import pytest
import torch
from helpers import TINY, finetune, make_base, metrics, refuse, run, succeed, tiny_model

from lit_llama.common.errors import UserError
from lit_llama.data.batches import TokenizedSample
from lit_llama.devices import launch
from lit_llama.measure.benchmark import flops_per_token
from lit_llama.measure.compare import loss_change, markdown, pilot_runs, quality, variant_runs, versus_full
from lit_llama.measure.intervals import difference_interval, mean_interval, per_token, proportion_interval
from lit_llama.methods.table import METHODS, weightless

COMPARE = "scripts/compare_methods.py"


@pytest.mark.processes
def test_a_failed_method_is_reported_and_the_others_go_on(folder, tmp_path):
    """Each in a process of its own, as users have them."""
    base = make_base(tmp_path / "base", n_layer=2)
    flags = ["--checkpoint_dir", base, "--data", folder / "sums", "--n_samples", 3, "--batch_size", 3]
    flags += ["--methods", "[adapter, lora]", "--shots", "[]", "--out_dir", tmp_path / "out"]
    result = run(COMPARE, *flags)
    assert result.returncode == 2 and "start_layer 2 must be between 0 and 1" in result.stderr.splitlines()[-1]
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert list(content["results"]) == ["lora"] and "start_layer" in content["failed"]["adapter, seed 1337"]


@contextmanager
def in_this_process():
    """Popen runs a script here."""

    def popen(command, stdout, **_):
        process = run(*command[1:])
        stdout.write(process.stdout + process.stderr)
        process.poll = lambda: process.returncode
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        yield


@pytest.fixture(scope="module")
def compared(folder):
    out = folder / "compared"
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "words", "--n_samples", 12, "--batch_size", 3]
    flags += ["--methods", "[features, full, lora]", "--variants", '{"lora r=2": "lora --r 2"}']
    flags += ["--shots", "[0, 1]", "--seeds", 2, "--other_data", folder / "sums/validation.json", "--out_dir", out]
    with in_this_process():
        return out, flags, succeed(COMPARE, *flags)


def test_every_figure_is_there(compared):
    out, _, printed = compared
    content = json.loads((out / "results.json").read_text())
    results = content["results"]
    assert list(results) == ["features", "full", "lora", "lora r=2", "base, 0 examples", "base, 1 examples"]
    assert content["failed"] == {} and content["settings"]["split"] == "validation"
    for name, row in results.items():
        low, high = row["right_interval"]
        assert row["n_test"] == 15 and low <= row["right"] <= high
        once = name == "features" or name.startswith("base")
        assert row["seeds"] == (1 if once else 2) == len(row["answers"]["0"])
        assert row["loss_interval"][0] < row["loss"] < row["loss_interval"][1]
    weights = {name: out / name / "trained.safetensors" for name in ("features", "lora")}
    weights |= {"full": out / "full/model.safetensors", "lora r=2": out / "variants/lora---r-2/trained.safetensors"}
    for name, path in weights.items():
        row = results[name]
        assert row["seconds"] > 0 and row["peak_memory"] > 50e6 and row["gflop_per_token"] > 0
        assert row["kept_bytes"] == path.stat().st_size
        assert name == "features" or metrics(path.parent) != metrics(path.parent / "seed-1338")
    lora, full, variant = results["lora"], results["full"], results["lora r=2"]
    assert variant["trained_parameters"] * 4 == lora["trained_parameters"] < full["trained_parameters"]
    assert full["trained_share"] == 1 and lora["gflop_per_token"] < full["gflop_per_token"]
    assert "forgetting" not in results["features"] and lora["forgetting"] != full["forgetting"]
    assert lora["forgetting_interval"][0] < lora["forgetting"] < lora["forgetting_interval"][1]
    minus_method = {name: row["minus_method"] for name, row in results.items() if "minus_method" in row}
    assert minus_method == {"lora r=2": pytest.approx(variant["loss"] - lora["loss"])}
    *table, empty, rates = (out / "results.md").read_text().splitlines()
    assert len(table) == 2 + 6 and len({line.count("|") for line in table}) == 1 and not empty
    assert rates == "Learning rates: full 3e-05, lora 0.003, lora r=2 0.003." and rates in printed
    for plot in ("quality_by_trained_parameters", "quality_by_peak_memory", "quality_by_forgetting", "variants"):
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_run_again(compared):
    out, flags, _ = compared
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".csv", ".log")}
    assert times
    succeed(COMPARE, *flags)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    refuse(COMPARE, *flags, "--n_samples", 15, message="a comparison with other settings: n_samples was 12, now 15")


def test_a_pilot_keeps_the_rate_of_the_lowest_loss(folder, tmp_path):
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "sums", "--n_samples", 6, "--batch_size", 3]
    flags += ["--methods", "[features, lora]", "--shots", "[]", "--pilot", "--pilot_samples", 6]
    with in_this_process():
        printed = succeed(COMPARE, *flags, "--out_dir", tmp_path)
    assert "features is left out" in printed
    row = json.loads((tmp_path / "results.json").read_text())["results"]["lora"]
    losses = {}
    for trial in (tmp_path / "pilot").iterdir():
        rate = float(trial.name.split("-", 1)[1])
        losses[rate] = min(float(row["val_loss"]) for row in metrics(trial) if row["val_loss"])
    assert len(losses) == 3 and row["learning_rate"] == min(losses, key=losses.get)


def test_plain_texts_have_a_loss_and_nothing_to_be_right_about(tmp_path):
    rows = [{"row": i, "loss": 2.0, "n_targets": 4, "right": None} for i in range(5)]
    (tmp_path / "validation.json").write_text(json.dumps({"samples": rows}))
    found = quality([tmp_path / "validation.json"])
    assert found["loss"] == 0.5 and found["n_test"] == 5 and "right" not in found
    assert markdown({"lora": found}).splitlines()[2] == "| lora | 0.5000 (0.5000 to 0.5000) |"
    pieces = [{"row": 1, "loss": loss, "n_targets": 2, "right": None} for loss in (1.5, 0.7)]  # of one long text
    cut = {"row": 4, "loss": 9.0, "n_targets": 3, "right": None}  # neither a cut nor a dropped row (0) is compared
    worse = [*pieces, *(row | {"loss": 2.2} for row in rows[2:4]), cut]
    (tmp_path / "after.json").write_text(json.dumps({"samples": worse}))
    change = loss_change("change", [tmp_path / "after.json"], [tmp_path / "validation.json"])
    assert change["change"] == change["change_interval"][0] == pytest.approx(0.05)
    (tmp_path / "one.json").write_text(json.dumps({"samples": rows[:1]}))
    assert quality([tmp_path / "one.json"])["loss_interval"] == (-math.inf, math.inf)


def test_mistakes_are_answered_in_one_line(folder, tmp_path):
    data = ["--data", folder / "sums", "--out_dir", tmp_path / "out"]
    refuse(COMPARE, *data, "--methods", "[qlora]", message="Expected .*'features', 'output_layers'.*qlora")
    wrong = [("lora", "lora --r 4"), ("mine", "qlora --r 4"), ("mine", "features"), ("base, mine", "lora")]
    wrong += [("mine", "full --head classifier"), ("mine", "lora --data=mine"), ("mine", "lora --train.epochs 3")]
    for name, words in wrong:
        message = f"--variants '{name}': '{words}' must be"
        refuse(COMPARE, *data, "--variants", json.dumps({name: words}), message=message)
    refuse(COMPARE, *data, "--variants", '{"mine": "lora \\"--r"}', message="No closing quotation")
    refuse(COMPARE, *data, "--variants", '{"a": "lora --r 4", "b": "lora  --r 4"}', message="each given once")
    refuse(COMPARE, *data, "--strategy", "fsdp", message="pass --devices 2 or more")
    assert not (tmp_path / "out").exists()
    refuse(COMPARE, *data, "--other_data", folder / "base/config.json", message="must hold an array of rows")
    refuse(COMPARE, "--data", folder / "sums/train.json", message="must be a folder")
    refuse(COMPARE, "--data", folder / "base", message="holds neither a validation nor a test file")


def test_flops_are_those_of_the_matrices():
    """6 for each weight and token that trains: 2 forward, 2 for its gradient, 2 for its input's; and attention's."""
    model = tiny_model()
    ids = torch.randint(0, TINY["vocab_size"], (9,)).tolist()
    sample = TokenizedSample(ids, ids)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "wte" not in name)
    attention = model.config.n_layer * 4 * model.config.n_head * model.config.head_size * len(ids)
    frozen = flops_per_token(model.requires_grad_(False), [sample])
    assert frozen == pytest.approx(2 * (weights - model.lm_head.weight.numel()) + attention)
    assert frozen == flops_per_token(weightless(model.config), [sample])
    assert flops_per_token(model.requires_grad_(True), [sample]) == pytest.approx(6 * weights + 3 * attention)


def test_intervals_of_one_run():
    right = np.array([[1.0] * 8 + [0.0] * 2])
    low, high = proportion_interval(right)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))  # Wilson's, by hand
    never, always = np.zeros((1, 10)), np.ones((1, 10))
    assert proportion_interval(never)[0] == 0 and proportion_interval(always)[1] == 1
    low, high = difference_interval(never, never)
    assert -0.3 < low < 0 < high < 0.3  # 0 of 10 twice does not prove that both are equal
    assert difference_interval(always, never)[0] > 0.5 and difference_interval(always, never)[1] == 1
    # Newcombe 1998, table II, case (36, 12, 2, 0): method 10 gives 0.0569 to 0.3404.
    ours = np.array([[1.0] * 36 + [1.0] * 12 + [0.0] * 2])
    theirs = np.array([[1.0] * 36 + [0.0] * 12 + [1.0] * 2])
    assert difference_interval(ours, theirs) == (pytest.approx(0.0569, abs=1e-3), pytest.approx(0.3404, abs=1e-3))
    rows = [{"answers": {str(i): [y] for i, y in enumerate(one[0])}} for one in (ours, theirs)]
    interval = [100 * end for end in difference_interval(ours, theirs)]
    assert versus_full(*rows) == {"minus_full": pytest.approx(20), "minus_full_interval": interval}
    losses, counts = np.array([[1.0, 2.0, 3.0, 4.0] * 50]), np.array([1.0, 2.0, 1.0, 2.0] * 50)
    loss, (low, high) = per_token(losses, counts)
    assert loss == losses.sum() / counts.sum() and low < loss < high and high - low < 0.4
    values = np.array([[1.0, 2.0, 4.0, 9.0]])
    low, high = mean_interval(values)
    assert high - 4 == pytest.approx(3.1824 * values.std(ddof=1) / 2, abs=1e-3)  # Student's, 3 degrees of freedom


@pytest.mark.parametrize(
    ("p", "q", "samples", "seeds", "seed_effect"),
    [(0.5, 0.5, 10, 1, 0), (0.98, 0.9, 40, 1, 0), (0.9, 0.85, 200, 3, 0), (0.9, 0.85, 200, 3, 0.3)],
)
def test_intervals_cover_seeds_and_samples(p, q, samples, seeds, seed_effect):
    """Two methods answer samples that are hard or easy for both; a seed makes a method better or worse on all."""
    rng, rounds = np.random.default_rng(0), 1500
    covered = np.zeros(3)
    for _ in range(rounds):
        hardness = rng.normal(size=samples) * 0.7
        of_seeds, rest = rng.normal(size=(2, seeds, 1)), rng.normal(size=(2, seeds, samples))
        ours, theirs = of_seeds * seed_effect + rest * (0.51 - seed_effect**2) ** 0.5
        right, other = (
            (hardness + own < NormalDist().inv_cdf(share)).astype(float) for own, share in ((ours, p), (theirs, q))
        )
        intervals = [proportion_interval(right), difference_interval(right, other), mean_interval(hardness + ours)]
        covered += [low <= truth <= high for (low, high), truth in zip(intervals, (p, p - q, 0), strict=True)]
    assert (covered / rounds > 0.93).all()


def test_a_new_method_needs_no_second_list(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "ia3", lambda model: None)
    (run,) = variant_runs(tmp_path, {"ia3, slower": "ia3 --train.learning_rate 1e-4"}, 10, seed=1)
    assert run.method == "ia3" and run.flags == ["--train.learning_rate", "1e-4"]
    trials = pilot_runs(tmp_path, ["ia3", "features"], 1, seed=1)
    assert [trial.name for trial in trials] == ["ia3 at 0.001", "ia3 at 0.003", "ia3 at 0.01"]
    # One that ends without a validation, as after a loss that is not a number, is no candidate.
    for trial, loss in zip(trials, (3, 2, ""), strict=True):
        trial.out_dir.mkdir(parents=True)
        (trial.out_dir / "metrics.csv").write_text(f"step,seconds,val_loss\n1,1,{loss}\n")
        (trial.out_dir / "costs.json").write_text("{}")
    assert [trial.trained for trial in trials] == [True, True, False]


def test_tensorboard_shows_what_metrics_csv_holds(folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    finetune(folder, tmp_path, logger="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = metrics(tmp_path)
    assert {"loss", "lr", "val_loss", "grad_norm"} < set(rows[0])
    for column in set(rows[0]) - {"step"}:
        shown = {event.step: event.value for event in events.Scalars(column)}
        assert shown == pytest.approx({int(row["step"]): float(row[column]) for row in rows if row[column]}, rel=1e-5)


def test_a_logger_that_is_missing_or_unknown(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="'aim' is none of tensorboard, wandb, mlflow"):
        launch.make_loggers("aim", tmp_path)
    loggers = pytest.importorskip("lightning.fabric.loggers.tensorboard")
    monkeypatch.setattr(loggers, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(loggers, "_TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(UserError, match="run: pip install tensorboard"):
        launch.make_loggers("tensorboard", tmp_path)
    assert launch.make_loggers(None, tmp_path) == []


def test_runs_are_drawn_side_by_side(compared, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run_dir = compared[0] / "lora"
    (tmp_path / "running").mkdir()  # no validation yet, and a line that is being written
    (tmp_path / "running/metrics.csv").write_text("step,loss,lr,tokens,seconds\n1,3.5,0.1,40,0.2\n2,0.5")
    printed = succeed("scripts/plot_runs.py", run_dir, tmp_path / "running", "--out_file", tmp_path / "new/runs.png")
    assert printed.strip() == f"wrote {tmp_path / 'new/runs.png'}"
    assert (tmp_path / "new/runs.png").read_bytes().startswith(b"\x89PNG")
    assert succeed("scripts/plot_runs.py", tmp_path / "running", "--out_file", tmp_path / "new/runs.png")
    refuse("scripts/plot_runs.py", tmp_path / "new", message="new: no step in a metrics.csv there")
    (tmp_path / "running/metrics.csv").write_text("step,loss,seconds\n1,3.5,1\n")
    refuse("scripts/plot_runs.py", tmp_path / "running", message="lacks the column lr")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    refuse("scripts/plot_runs.py", run_dir, "--out_file", tmp_path / "a.png", message=r'pip install -e "\.\[plot\]"')
