"""Fetch Stanford Alpaca's 52,002 instructions, check their number and form, and split them for --data data/alpaca.

    python data/prepare_alpaca.py
    python data/prepare_alpaca.py --source alpaca_data.json      # a copy that lies here already

The data is https://github.com/tatsu-lab/stanford_alpaca, licensed CC BY-NC 4.0: not for commercial use.
"""

import hashlib
import json
from pathlib import Path

from lit_llama import cli
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import check_writable, parse_json
from lit_llama.data.prepare import fetch, write_rows
from lit_llama.data.samples import to_sample
from lit_llama.data.task import hash_fraction

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json"
SHA256 = "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419"
N_RECORDS = 52_002


def main(
    out_dir: str = "data/alpaca",
    source: str = URL,
    sha256: str = SHA256,
    n_records: int = N_RECORDS,
    val_fraction: float = 0.01,
) -> None:
    """Write train.json and validation.json.

    Args:
        out_dir: Where to write them.
        source: Address or path of alpaca_data.json.
        sha256: SHA-256 of the downloaded file; other content is refused. A local file may be edited.
        n_records: Number of records it must hold.
        val_fraction: The part held out, chosen by a hash of each record.
    """
    check_range("--val_fraction", val_fraction, 1e-6, 1 - 1e-6)
    check_writable(Path(out_dir) / "train.json")
    content = fetch(source)
    found = hashlib.sha256(content).hexdigest()
    print(f"{source}: {len(content):,} bytes, sha256 {found}")
    if source.startswith("https://") and found != sha256:
        raise UserError(f"{source} has sha256 {found} instead of {sha256}; pass the expected one to --sha256")
    records = parse_json(content, Path(source).name)
    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    for number, record in enumerate(records, 1):
        to_sample(record, f"{source}, record {number}")  # raises UserError if its form is wrong
        held_out = hash_fraction(json.dumps(record, sort_keys=True)) < val_fraction
        splits["validation" if held_out else "train"].append(record)
    if len(records) != n_records:
        raise UserError(f"{source} holds {len(records):,} records instead of {n_records:,}; is it the whole file?")
    for name, rows in splits.items():
        write_rows(Path(out_dir) / f"{name}.json", rows)


if __name__ == "__main__":
    cli.run(main)
