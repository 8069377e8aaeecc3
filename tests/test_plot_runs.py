"""The curves of runs, and the same figures in TensorBoard."""

import shutil
import sys

import pytest
from helpers import make_base, metrics, refuse, succeed, sums, write_rows

from lit_llama.common.errors import UserError
from lit_llama.devices import launch


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    base = make_base(folder / "base")
    write_rows(folder / "data/train.json", sums(20))
    write_rows(folder / "data/validation.json", sums(25)[20:])
    flags = ["--checkpoint_dir", base, "--data", folder / "data", "--start_layer", 1, "--eval_samples", 0]
    flags += ["--train.max_steps", 9, "--train.eval_every", 3, "--logger", "tensorboard"]
    succeed("finetune/adapter.py", *flags, "--out_dir", folder / "out")
    return folder / "out"


def test_tensorboard_shows_what_metrics_csv_holds(run_dir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    rows = metrics(run_dir)
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


def test_runs_are_drawn_side_by_side(run_dir, tmp_path):
    pytest.importorskip("matplotlib")
    with open(run_dir / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("10,0.5")  # a line that is being written
    shutil.copytree(run_dir, tmp_path / "other")
    printed = succeed("scripts/plot_runs.py", run_dir, tmp_path / "other", "--out_file", tmp_path / "new/runs.png")
    assert printed.strip() == f"wrote {tmp_path / 'new/runs.png'}"
    assert (tmp_path / "new/runs.png").read_bytes().startswith(b"\x89PNG")
    succeed("scripts/plot_runs.py", "--runs", f"[{run_dir}]", "--out_file", tmp_path / "one.svg")
    refuse("scripts/plot_runs.py", run_dir.parent / "data", message="data: no step in a metrics.csv there")


def test_without_matplotlib_the_way_out_is_named(run_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    flags = [run_dir, "--out_file", tmp_path / "a.png"]
    refuse("scripts/plot_runs.py", *flags, message=r'pip install -e "\.\[plot\]"')
