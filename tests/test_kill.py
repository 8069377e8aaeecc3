"""A run that is killed at any moment loses only the steps since its last save. Memory stays flat over many steps."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import finetune, job, metrics, succeed, timeless_metrics, wait_for_steps

import lit_llama.common.files
from finetune import adapter
from lit_llama.common.files import read_json, read_tensors

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")

FLAGS = dict(max_steps=40, batch_size=4, learning_rate=0.01, eval_every=5, save_every=4, max_seq_length=60)
METHODS = ("adapter", "full")
# A server with all imported that forks: a child begins in milliseconds, without the threads of this process.
children = multiprocessing.get_context("forkserver" if os.name != "nt" else "spawn")
children.set_forkserver_preload(["test_kill", "finetune.full", "lightning.fabric"])


def train(folder, out_dir, method, resume=False, slow_saves=False) -> None:
    """In a child: a finetune script."""
    torch.set_num_threads(1)
    if slow_saves:
        slow_down_saves()
    finetune(folder, out_dir, method, resume=resume, **FLAGS)


def slow_down_saves() -> None:
    """Write each file in two halves with a pause between, as a slow disk might, so that kills hit half a file."""
    save_file = lit_llama.common.files.save_file

    def save_slowly(tensors, path, metadata):
        save_file(tensors, path, metadata)
        whole = path.read_bytes()
        with open(path, "wb") as file:
            for half in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
                file.write(half)
                file.flush()
                time.sleep(0.02)

    lit_llama.common.files.save_file = save_slowly


def run_child(function, *args) -> None:
    child = children.Process(target=function, args=args)
    child.start()
    child.join()
    assert child.exitcode == 0


def kill_somewhere(folder, out_dir, method, seconds) -> bool:
    """Start a run and kill it so many seconds after its first step; False if it ended before that."""
    child = children.Process(target=train, args=(folder, out_dir, method, False, True))
    child.start()
    while child.is_alive() and not metrics(out_dir):
        time.sleep(0.001)
    time.sleep(seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -9)
    return child.exitcode == -9 and len(metrics(out_dir)) < FLAGS["max_steps"]


@pytest.mark.processes
def test_a_killed_run_resumes_to_the_same_bytes(folder, tmp_path):
    for method in METHODS:
        run_child(train, folder, tmp_path / method, method)
    rng, kills, ends = random.Random(1), 0, set()
    while kills < 20:
        method = METHODS[kills % 2]
        whole, out_dir = tmp_path / method, tmp_path / f"{kills} {time.monotonic_ns()}"
        if not kill_somewhere(folder, out_dir, method, rng.uniform(0, 1)):
            continue
        kills += 1
        ends.add(len(metrics(out_dir)))
        assert all((out_dir / name).exists() for name in ("method.json", "metrics.csv", "state/state.safetensors"))
        for path in out_dir.rglob("[!.]*"):  # every file under a final name is whole
            if path.suffix == ".safetensors":
                read_tensors(path)
            elif path.suffix == ".json":
                read_json(path)
        run_child(train, folder, out_dir, method, True)
        assert timeless_metrics(out_dir) == timeless_metrics(whole)
        for path in whole.rglob("*"):
            if path.is_file() and path.name not in ("metrics.csv", "costs.json", ".lock"):
                assert (out_dir / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
        assert not list(out_dir.rglob(".*tmp*"))  # what the killed run had begun to write
    assert len(ends) > 3  # steps


@pytest.mark.processes
@pytest.mark.parametrize(("torchrun", "strategy"), [([], "fsdp"), (["--standalone", "--nproc_per_node", 2], "ddp")])
def test_a_killed_rank_ends_the_job_within_a_minute_and_one_process_resumes_it(folder, tmp_path, torchrun, strategy):
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "sums", "--start_layer", 1, "--eval_samples", 0]
    flags += ["--train.max_steps", 300, "--train.eval_every", 300, "--train.save_every", 5, "--precision", "32-true"]
    flags += ["--out_dir", tmp_path]
    with job("finetune/adapter.py", *flags, "--devices", 2, "--strategy", strategy, torchrun=torchrun) as process:
        wait_for_steps(process, tmp_path, 7)
        ranks = subprocess.check_output(["pgrep", "-f", "-P", str(process.pid), "finetune/adapter.py"], text=True)
        os.kill(int(ranks.split()[-1]), signal.SIGKILL)  # rank 1
        assert process.wait(timeout=60) != 0
    assert len(metrics(tmp_path)) < 300
    succeed("finetune/adapter.py", *flags, "--resume")
    assert [int(row["step"]) for row in metrics(tmp_path)] == list(range(1, 301))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_over_thousands_of_steps(folder, tmp_path, monkeypatch):
    pages, check_finite = [], adapter.check_finite

    def look(*args):
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))  # that this process holds
        return check_finite(*args)

    monkeypatch.setattr(adapter, "check_finite", look)
    finetune(folder, tmp_path, **{**FLAGS, "max_steps": 2000})
    assert len(pages) == 2000
    # The first steps, saves and validations are over.
    assert max(pages[-200:]) < 1.01 * max(pages[200:400])
