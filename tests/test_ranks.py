"""Several processes, by gloo on the CPU: a step means the same on one, two and three of them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import ROOT, metrics
from tools import make_base, sums, write_rows

WORKER = ROOT / "tests" / "ranks_worker.py"
METHODS = ("adapter", "lora", "full")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_rows(folder / "data" / "train.json", sums(23))
    write_rows(folder / "data" / "validation.json", sums(40)[31:])
    make_base(folder / "base")
    return folder


def work(places: Path, devices: int) -> Path:
    """What the worker writes on so many processes."""
    out_dir = places / f"{devices}"
    if not out_dir.exists():
        command = [sys.executable, WORKER, places / "base", places / "data", out_dir, devices, "auto", *METHODS]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert result.returncode == 0, result.stderr
    return out_dir


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_has_one_loss_and_gradient_on_every_number_of_devices(places, method, devices):
    for step in ("even", "uneven"):  # 7 micro-batches, and 2: with three ranks one has none
        one = load_file(work(places, 1) / method / f"{step}-0.safetensors")
        assert any(gradient.abs().max() > 1e-3 for gradient in one.values())
        for rank in range(devices):
            several = load_file(work(places, devices) / method / f"{step}-{rank}.safetensors")
            torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_float64_ends_in_the_same_place(places, method, devices):
    one, several = (work(places, n) / method / "run" for n in (1, devices))
    states = [load_file(folder / "state" / "state.safetensors") for folder in (one, several)]
    assert states[0]["trained.lm_head.weight" if method == "full" else min(states[0])].dtype == torch.float64
    torch.testing.assert_close(states[1], states[0], rtol=1e-6, atol=1e-6)
    for first, second in zip(metrics(one), metrics(several), strict=True):
        assert float(second["loss"]) == pytest.approx(float(first["loss"]), abs=1e-5)
        if first["val_loss"]:
            assert float(second["val_loss"]) == pytest.approx(float(first["val_loss"]), abs=1e-5)
    assert len(metrics(one)) == 4 and metrics(one)[-1]["val_loss"]
