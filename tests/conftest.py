"""One thread and one precision for all tests; the real base; a tiny base with data for the scripts."""

import os
import random
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import make_base, sums, write_rows

from lit_llama.base import ensure_base
from lit_llama.devices import launch
from lit_llama.formats.download import fetch_default_gguf
from lit_llama.settings import DEFAULT_BASE, ROOT
from lit_llama.tokenizer import Tokenizer

# Tiny products gain nothing from threads, and threads that wait for a busy core cost many times what they save.
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # for the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def auto_is_float32():
    """``--precision auto`` is float32 on every CPU, so that tests compute alike; processes that they start need it."""
    multiplies_bf16 = launch.multiplies_bf16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "multiplies_bf16", lambda device: device.type != "cpu" and multiplies_bf16(device))
        yield


@pytest.fixture(params=["32-true", "bf16-true"])
def auto(request, monkeypatch) -> str:
    """What ``--precision auto`` is: a test that asks for this runs in both precisions, on any CPU."""
    monkeypatch.setattr(launch, "multiplies_bf16", lambda device: request.param == "bf16-true")
    return request.param


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The default base as a checkpoint folder, fetched into checkpoints/ unless it is there."""
    folder = Path(DEFAULT_BASE)
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / ".tests.lock"):  # pytest's workers fetch it once
        ensure_base(folder, yes=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file that the default base is converted from, kept in checkpoints/ too."""
    folder = Path(f"{DEFAULT_BASE}-gguf")
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / ".tests.lock"):
        return next(folder.glob("*.gguf"), None) or fetch_default_gguf(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny base that a test must leave as it is."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(base) -> Tokenizer:
    return Tokenizer(base)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base, sums to learn, and texts with labels."""
    folder = tmp_path_factory.mktemp("methods")
    make_base(folder / "base", tie_embeddings=True)
    write_rows(folder / "sums" / "train.json", sums(40))
    write_rows(folder / "sums" / "validation.json", sums(53)[40:])
    rng = random.Random(1)
    words = {"fruit": ["fig", "pear", "plum"], "tool": ["saw", "axe", "file"], "bird": ["owl", "rook", "tern"]}
    rows = [
        {"text": " ".join(rng.choices(words[label], k=3)), "label": label} for label in rng.choices(sorted(words), k=60)
    ]
    write_rows(folder / "words" / "train.json", rows[:45])
    write_rows(folder / "words" / "validation.json", rows[45:])
    return folder
