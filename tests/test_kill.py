"""A run that is killed at any moment loses the steps since its last save, and nothing else."""

import csv
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from helpers import make_base, sums, write_rows

from finetune import adapter, full
from lit_llama.common.files import read_tensors
from lit_llama.settings import TrainArgs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")

STEPS = 40
METHODS = {"adapter": adapter, "full": full}
SAVE_SECONDS = 0.04  # what the test makes a save last
# A server with all imported that forks: a child begins in milliseconds, without the threads of this process.
children = multiprocessing.get_context("forkserver" if os.name != "nt" else "spawn")
children.set_forkserver_preload(["test_kill", "lightning.fabric"])


def train(base, data, out_dir, method, resume, saving, steps=STEPS):
    """In a child: a finetune script. ``saving`` is 1 while a file is being written, where it is given."""
    torch.set_num_threads(1)
    if saving is not None:
        slow_down_saves(saving)
    args = TrainArgs(max_steps=steps, batch_size=4, learning_rate=0.01, eval_every=5, save_every=4, max_seq_length=60)
    where = dict(checkpoint_dir=str(base), data=str(data), out_dir=str(out_dir))
    METHODS[method].main(**where, train=args, precision="32-true", eval_samples=0, resume=resume)


def slow_down_saves(saving):
    """Write each file in two halves with a pause between, as a slow disk might, and tell the parent."""
    import lit_llama.common.files

    save_file = lit_llama.common.files.save_file

    def save_slowly(tensors, path, metadata):
        saving.value = 1
        save_file(tensors, path, metadata)
        whole = path.read_bytes()
        with open(path, "wb") as file:
            for half in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
                file.write(half)
                file.flush()
                time.sleep(SAVE_SECONDS / 2)
        saving.value = 0

    lit_llama.common.files.save_file = save_slowly


def run_child(*args) -> None:
    child = children.Process(target=train, args=args)
    child.start()
    child.join()
    assert child.exitcode == 0


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, data, and for each method a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("kill")
    base = make_base(folder / "base")
    write_rows(folder / "data" / "train.json", sums(30))
    write_rows(folder / "data" / "validation.json", sums(40)[34:])
    for method in METHODS:
        run_child(base, folder / "data", folder / method, method, False, None)
    return folder


def metrics(out_dir: Path) -> list[dict]:
    """But for the seconds. A last line without its end is one that was being written."""
    lines = (out_dir / "metrics.csv").read_text().splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def wait_until(condition, child) -> bool:
    while child.is_alive():
        if condition():
            return True
        time.sleep(0.001)
    return False


def kill_somewhere(places, out_dir, method, in_save, rng) -> bool:
    """Start a run and kill it at a random moment after its first step; False where it ended before that."""
    saving = children.Value("i", 0, lock=False)
    child = children.Process(target=train, args=(places / "base", places / "data", out_dir, method, False, saving))
    child.start()
    begun = wait_until(lambda: (out_dir / "metrics.csv").exists() and metrics(out_dir), child)
    time.sleep(rng.uniform(0, 0.5))
    if begun and in_save and wait_until(lambda: saving.value == 0, child) and wait_until(lambda: saving.value, child):
        time.sleep(rng.uniform(0, 0.9 * SAVE_SECONDS))
    child.kill()
    child.join()
    if child.exitcode == 0 or len(metrics(out_dir)) == STEPS:
        return False
    assert child.exitcode == -9 and 0 < len(metrics(out_dir)) < STEPS
    return bool(saving.value) or not in_save


def check_files(out_dir: Path) -> None:
    """Every file under a final name is whole."""
    names = {path.name for path in out_dir.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert {"method.json", "metrics.csv", "state.safetensors"} <= names
    for path in out_dir.rglob("*"):
        if path.suffix == ".safetensors":
            read_tensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def check_kills(places, tmp_path, n_kills: int) -> None:
    rng = random.Random(n_kills)
    kills = 0
    while kills < n_kills:
        method, in_save = list(METHODS)[kills % 2], kills % 3 == 0
        out_dir = tmp_path / f"{kills} {time.monotonic_ns()}"
        if not kill_somewhere(places, out_dir, method, in_save, rng):
            continue
        kills += 1
        check_files(out_dir)
        run_child(places / "base", places / "data", out_dir, method, True, None)
        whole = places / method
        assert metrics(out_dir) == metrics(whole)
        for path in whole.rglob("*"):
            if path.is_file() and path.name not in ("metrics.csv", "costs.json", ".lock"):
                assert (out_dir / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
        assert not list(out_dir.rglob(".*tmp*"))  # what the killed run had begun to write


@pytest.mark.processes
def test_twenty_kills(places, tmp_path):
    check_kills(places, tmp_path, 20)


@pytest.mark.slow
def test_a_hundred_kills(places, tmp_path):
    check_kills(places, tmp_path, 100)
