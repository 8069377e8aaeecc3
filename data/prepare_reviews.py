"""Fetch Pang & Lee's movie-review sentences and write them as a task: is the review positive or negative?

    python data/prepare_reviews.py
    python data/prepare_reviews.py --source reviews/      # a folder with rt-polarity.pos and rt-polarity.neg

5,331 positive and 5,331 negative sentences from "Seeing stars: Exploiting class relationships for sentiment
categorization with respect to rating scales", Pang & Lee 2005, https://arxiv.org/abs/cs/0506075; for research.
"""

import hashlib
import io
import random
import tarfile
import zlib
from pathlib import Path

from lit_llama import cli
from lit_llama.common.errors import UserError
from lit_llama.common.files import check_writable
from lit_llama.data.prepare import fetch, write_rows

URL = "https://www.cs.cornell.edu/people/pabo/movie-review-data/rt-polaritydata.tar.gz"
# SHA-256 of the sentences in UTF-8, stripped and joined by line feeds. The original files are in Latin-1.
SHA256 = {
    "positive": "38ef5f688f1c34b3c9e5820b5edabc3272ecb721bff86c56fdfd9119540d7bd0",
    "negative": "a35e6bf99f4da4bd5780ca60b061e80d9c1d2076395d4cec79e85f25d62b3f83",
}
FILES = {"positive": "rt-polarity.pos", "negative": "rt-polarity.neg"}
VALIDATION, TEST = 200, 1066  # sentences
INSTRUCTION = "Is this movie review positive or negative?"


def main(out_dir: str = "data/reviews", source: str = URL, seed: int = 1337) -> None:
    """Write train.json, validation.json and test.json.

    Args:
        out_dir: Where to write them.
        source: Address or path of the archive, or a folder that holds its two files.
        seed: Random seed of the split.
    """
    check_writable(Path(out_dir) / "train.json")
    by_text: dict[str, dict] = {}  # by sentence: of two copies, one could land in train and the other in test
    for label, content in read_source(source).items():
        sentences = [line.strip() for line in decode(content).split("\n") if line.strip()]
        found = hashlib.sha256("\n".join(sentences).encode()).hexdigest()
        if found != SHA256[label]:
            raise UserError(f"{source}: the sentences of {FILES[label]} have sha256 {found} instead of {SHA256[label]}")
        for text in sentences:
            row = {"instruction": INSTRUCTION, "input": text, "output": label, "text": text, "label": label}
            by_text.setdefault(text, row)
    rows = list(by_text.values())
    random.Random(seed).shuffle(rows)
    held_out = TEST + VALIDATION
    splits = {"test": rows[:TEST], "validation": rows[TEST:held_out], "train": rows[held_out:]}
    for name, part in splits.items():
        write_rows(Path(out_dir) / f"{name}.json", part)


def decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_source(source: str) -> dict[str, bytes]:
    """The content of the two files, by label."""
    if Path(source).is_dir():
        return {label: fetch(f"{source}/{name}") for label, name in FILES.items()}
    try:
        with tarfile.open(fileobj=io.BytesIO(fetch(source))) as archive:  # in memory: nothing is written by its names
            members = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}
            return {label: archive.extractfile(members[name]).read() for label, name in FILES.items()}
    except (tarfile.TarError, EOFError, KeyError, zlib.error):
        raise UserError(f"{source} is not an archive with {' and '.join(FILES.values())}") from None


if __name__ == "__main__":
    cli.run(main)
