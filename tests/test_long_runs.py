"""Memory over thousands of steps."""

import multiprocessing
from pathlib import Path

import pytest
from helpers import make_base, sums, write_rows
from test_kill import train

from finetune import adapter
from lit_llama.devices.launch import held_memory

STEPS = 2000


def measure(base, data, out_dir, pipe) -> None:
    """In a child: train, and note after each step what the process holds."""
    held, clip_gradient = [], adapter.clip_gradient

    def clip_and_look(*args):
        held.append(held_memory())
        return clip_gradient(*args)

    adapter.clip_gradient = clip_and_look
    train(base, data, out_dir, "adapter", False, None, steps=STEPS)
    pipe.send(held)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat(tmp_path):
    base = make_base(tmp_path / "base")
    write_rows(tmp_path / "data" / "train.json", sums(30))
    write_rows(tmp_path / "data" / "validation.json", sums(40)[34:])
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=measure, args=(base, tmp_path / "data", tmp_path / "out", there))
    child.start()
    there.close()  # so that a child that fails is noticed
    held = here.recv()
    child.join()
    assert len(held) == STEPS
    early, late = max(held[200:400]), max(held[-200:])  # after every kind of step was taken, saves and validations
    assert late < 1.01 * early, f"{early:,} bytes became {late:,}"
