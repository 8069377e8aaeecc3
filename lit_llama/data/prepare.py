"""Shared by the scripts that make or fetch data sets: reading a source, writing rows."""

import http.client
import json
import urllib.request
from pathlib import Path

from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write


def fetch(source: str) -> bytes:
    """The content of a file or an https address. Raises UserError if it cannot be read."""
    try:
        if not source.startswith("https://"):
            return Path(source).read_bytes()
        with urllib.request.urlopen(source, timeout=60) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{source} cannot be read ({error}); download it and pass its path to --source") from None


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a JSON array with one row per line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    with atomic_write(path) as temporary:
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")
    print(f"{path}: {len(rows):,} rows")
