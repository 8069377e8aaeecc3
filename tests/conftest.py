"""The real base for the tests that ask for it; the first one fetches it."""

from pathlib import Path

import pytest

from lit_llama.download import DEFAULT_BASE, ensure_base, fetch_default_gguf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The default base as a checkpoint folder, fetched into checkpoints/ unless it is there."""
    folder = ROOT / DEFAULT_BASE
    ensure_base(folder, yes=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file that the default base is converted from, kept in checkpoints/ too."""
    return fetch_default_gguf(ROOT / f"{DEFAULT_BASE}-gguf")
