"""The curves of runs, and the same figures in TensorBoard."""

import sys

import pytest
from helpers import finetune, metrics, refuse, succeed

from lit_llama.common.errors import UserError
from lit_llama.devices import launch


@pytest.fixture(scope="module")
def run_dir(folder):
    finetune(folder, folder / "out", logger="tensorboard")
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
    (tmp_path / "running").mkdir()  # no validation yet, and a line that is being written
    (tmp_path / "running/metrics.csv").write_text("step,loss,lr,tokens,seconds\n1,3.5,0.1,40,0.2\n2,0.5")
    printed = succeed("scripts/plot_runs.py", run_dir, tmp_path / "running", "--out_file", tmp_path / "new/runs.png")
    assert printed.strip() == f"wrote {tmp_path / 'new/runs.png'}"
    assert (tmp_path / "new/runs.png").read_bytes().startswith(b"\x89PNG")
    succeed("scripts/plot_runs.py", "--runs", f"[{run_dir}]", "--out_file", tmp_path / "one.svg")
    refuse("scripts/plot_runs.py", run_dir.parent / "sums", message="sums: no step in a metrics.csv there")


def test_without_matplotlib_the_way_out_is_named(run_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    flags = [run_dir, "--out_file", tmp_path / "a.png"]
    refuse("scripts/plot_runs.py", *flags, message=r'pip install -e "\.\[plot\]"')
