"""Read data files: .json, .jsonl, .csv or .txt -> samples.

Rows are Alpaca records (instruction, input, output), ``messages``, ``text`` with ``label``, or ``text`` alone;
data/README.md shows each.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lit_llama.common.errors import UserError
from lit_llama.data.prompts import Message

SUFFIXES = (".json", ".jsonl", ".csv", ".txt")
ROLES = ("system", "user", "assistant")


@dataclass(slots=True)
class Sample:
    """One row of a data file: a conversation that ends with an answer, or a plain text."""

    where: str  # file and line or row, for messages to the user
    messages: list[Message]  # empty for a plain text
    text: str | None = None
    label: str | None = None
    row: int = 0  # number in the file

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def key(self) -> str:
        """The content as one string. Duplicates have the same key, and the split hashes it."""
        return json.dumps([self.messages, self.text], sort_keys=True)


class Samples:
    """The samples of a file or a list of rows. Each loop reads them again, so texts do not stay in memory.

    A loop raises UserError if the file or a row is invalid.
    """

    def __init__(self, source: Path | list[dict], without: frozenset[int] = frozenset()) -> None:
        self.source, self.without = source, without  # the numbers of rows to leave out

    def __iter__(self) -> Iterator[Sample]:
        if isinstance(self.source, list):
            rows: Iterable = ((f"row {i + 1}", row) for i, row in enumerate(self.source))
        else:
            rows = file_rows(self.source)
        for i, (where, row) in enumerate(rows):
            sample = to_sample(row, where, i)
            if i not in self.without:
                yield sample


def read_samples(path: Path | str) -> list[Sample]:
    """All samples of one file."""
    return list(Samples(Path(path)))


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with its place for messages: file and line, or file and row of a .json file.

    Raises UserError if the file is missing, empty or invalid.
    """
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".txt": txt_rows}
    if path.suffix not in readers:
        raise UserError(f"{path}: data files end in {', '.join(SUFFIXES)}")
    empty = True
    try:
        # utf-8-sig drops the byte-order mark that spreadsheets write. A quoted field of a .csv keeps its line ends.
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else "\n") as file:
            for row in readers[path.suffix](file, path):
                empty = False
                yield row
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UnicodeDecodeError:
        read_text(path)  # names the line
        raise
    if empty:
        raise UserError(f"{path} holds no rows")


def read_text(path: Path) -> str:
    """The content of a file that a user wrote. Raises UserError, naming the line, if it is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def parse_json(text: str, path: Path | str, line: int | None = None) -> Any:
    """The value of a JSON text: a whole file, or one ``line`` of it. Raises UserError, naming the line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # invalid, or a number of 5,000 digits, or 100,000 open brackets
        line = line or getattr(error, "lineno", None)
        reason = getattr(error, "msg", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{f':{line}' if line else ''}: not valid JSON: {reason}") from None


def json_rows(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    rows = parse_json(file.read(), path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file must hold an array of rows; one object per line is .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def jsonl_rows(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, path, number)


def csv_rows(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    reader: Any = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: the row does not have the header's {len(reader.fieldnames)} columns")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None


def txt_rows(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path}:{number}", {"text": line.rstrip("\r\n")}


def to_sample(row: Any, where: str, number: int = 0) -> Sample:
    """A row of any format as a Sample. Further columns are ignored. Raises UserError if the row fits no format."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object, got {type(row).__name__}")
    messages: list[Message] = []
    text = label = None
    if "messages" in row:
        messages = check_messages(row["messages"], where)
    elif "instruction" in row and "output" in row:
        given = text_field(row, "input", where) if row.get("input") else ""
        user = {"role": "user", "content": text_field(row, "instruction", where), "input": given}
        messages = [user, {"role": "assistant", "content": text_field(row, "output", where)}]
        label = text_field(row, "label", where) if "label" in row else None
    elif "text" in row:
        text = text_field(row, "text", where)
        if "label" in row:
            label = text_field(row, "label", where)
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
    else:
        raise UserError(
            f"{where}: a row needs instruction and output, or messages, or text with or without label; "
            f"this one has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return Sample(where, messages, text, label, number)


def text_field(row: dict, field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise UserError(f"{where}: {field} must be a string, got {json.dumps(row[field])[:40]}")
    return row[field]


def check_messages(messages: Any, where: str) -> list[Message]:
    """The messages up to the last answer; nothing after it is trained on. Raises UserError if they are invalid."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            got = json.dumps(message)[:60]
            raise UserError(f"{where}: a message needs a role of {', '.join(ROLES)} and a content, got {got}")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError(f"{where}: messages hold no assistant turn to learn")
    return [{"role": message["role"], "content": message["content"]} for message in messages[: answers[-1] + 1]]
