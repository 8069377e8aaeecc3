"""Reading and writing files. A file is complete or absent, and checked when read; nothing is unpickled.

Every file is written under a temporary name, flushed to disk and renamed. Only metrics.csv is appended to.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_llama.common.errors import UserError


@contextmanager
def atomic_write(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary file or folder next to ``path``. On success flush and rename it, on failure remove it.

    Raises UserError if the disk is full or the folder cannot be written; an existing file stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_folder:
            temporary.mkdir()
        else:
            temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        flush(temporary)  # the files in a folder were flushed one by one
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        if is_folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # after a rename it is gone
                temporary.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """``atomic_write`` for a folder that does not exist yet."""
    check_new(path)
    with atomic_write(path, is_folder=True) as temporary:
        yield temporary


def check_writable(path: Path | str) -> None:
    """Raises UserError if the file ``path`` cannot be written. Scripts call it before their work."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        TemporaryFile(dir=next(folder for folder in Path(path).absolute().parents if folder.exists())).close()
    except OSError as error:
        raise write_error(path, error) from None


def check_new(path: Path | str) -> None:
    """Raises UserError if the file or folder ``path`` exists already or cannot be written."""
    if Path(path).exists():
        raise UserError(f"{path} exists already; remove it or choose another name")
    check_writable(path)


def flush(path: Path) -> None:
    """Wait until a file's content is on disk, or a folder's names: a power failure could undo a rename."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_error(path: Path | str, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: from numpy and safetensors
    way_out = "free some space and try again" if full else "choose a folder that you can write to"
    return UserError(f"{path} cannot be written ({error.strerror or error}): {way_out}; existing files are unchanged")


# Temporary names of ``atomic_write`` and of safetensors.
UNFINISHED = re.compile(r"\..+\.\d+\.tmp|\.tmp[0-9A-Za-z]{6}")


def remove_unfinished(folder: Path) -> None:
    """Delete temporary files that a killed process left in ``folder``."""
    for file in folder.glob(".*"):
        if UNFINISHED.fullmatch(file.name) and file.is_file():
            file.unlink()


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_json(text: str | bytes, where: Path | str) -> Any:
    """The value of a JSON text. Raises UserError, which says ``where`` it stands, if it is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, or 100,000 open brackets
        raise UserError(f"{where} is not valid JSON: {error}") from None


def read_json(path: Path) -> dict:
    try:
        content = parse_json(Path(path).read_bytes(), path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict | None = None, foreign: bool = False) -> None:
    """Write a file with a checksum and ``about`` in its header; a ``foreign`` one, for transformers, has neither."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # A single entry: safetensors writes several in any order, and equal runs must give equal bytes.
    header = json.dumps({**(about or {}), "crc32": checksum(tensors, about or {})}, sort_keys=True)
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, {"format": "pt"} if foreign else {ABOUT: header})
        except SafetensorError as error:
            raise OSError(str(error)) from None


ABOUT = "lit_llama"  # our entry in the header


def checksum(tensors: dict[str, Tensor], about: dict) -> int:
    """CRC-32 of tensors and ``about`` (2 to 3 GB/s). It finds damage by disk or network, not forgery."""
    crc = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode(), crc))
    return crc


def open_tensors(path: Path):
    """safetensors' ``safe_open``. Raises UserError if the file is missing or incomplete."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from None


def read_tensors(path: Path, foreign: bool = False) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file, memory-mapped, and its ``about``. Only ``foreign`` files may lack our checksum."""
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = (file.metadata() or {}).get(ABOUT)
    if header is None and foreign:
        return tensors, {}
    try:
        about = json.loads(header or "{}")
        intact = about.pop("crc32") == checksum(tensors, about)
    except (KeyError, ValueError):  # no such entry, no JSON
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged, or another program wrote it: its checksum is wrong; copy or make it again")
    return tensors, about


def tensor_headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype (as safetensors names it) of each tensor, by name. Reads only the header."""
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
