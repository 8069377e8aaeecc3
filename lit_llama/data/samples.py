"""Reading data files: .json, .jsonl, .csv or .txt -> samples.

Rows may be Alpaca records (instruction, input, output), ``messages`` lists, ``text`` + ``label``, or ``text`` alone;
data/README.md shows each.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lit_llama.cli import UserError
from lit_llama.data.prompts import Message

SUFFIXES = (".json", ".jsonl", ".csv", ".txt")
ROLES = ("system", "user", "assistant")


@dataclass(slots=True)
class Sample:
    """One row of a data file: a conversation that ends with an answer, or a plain text to be learned as it is."""

    where: str  # file and line or row, for messages to the user
    messages: list[Message]
    text: str | None = None  # of rows with a text
    label: str | None = None  # of rows that name one
    row: int = 0  # its place in the file

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def key(self) -> str:
        """The content as one string, by which duplicates and the hash split go."""
        return sorted_json([self.messages, self.text])


sorted_json = json.JSONEncoder(sort_keys=True).encode  # json.dumps would build the encoder for every sample


class Samples:
    """The samples of a file, or of a list of rows, read again in every loop over them: their texts are not kept.

    UserError names file, line and what is wrong.
    """

    def __init__(self, source: Path | list[dict], without: frozenset[int] = frozenset()) -> None:
        self.source, self.without = source, without  # rows that are left out

    def __iter__(self) -> Iterator[Sample]:
        if isinstance(self.source, list):
            rows: Iterator = ((f"row {i + 1}", row) for i, row in enumerate(self.source))
        else:
            rows = file_rows(Path(self.source))
        for i, (where, row) in enumerate(rows):
            sample = to_sample(row, where)
            sample.row = i
            if i not in self.without:
                yield sample


def read_samples(path: Path | str) -> list[Sample]:
    """All samples of one file."""
    return list(Samples(Path(path)))


def file_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Each row of a file, and where it stands: file and line, in a .json file the row's number."""
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".txt": txt_rows}
    if path.suffix not in readers:
        raise UserError(f"{path}: data files end in {', '.join(SUFFIXES)}")
    try:
        # A byte-order mark, as spreadsheets write it, is not content; line ends inside a quoted field are.
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else "\n") as file:
            empty = True
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
    """The content of a file that a user wrote. UserError names the line that is not UTF-8."""
    try:
        # A byte-order mark, as spreadsheets write it, is not content; line ends inside a quoted field are.
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def parse_json(text: str, path: Path | str, line: int | None = None) -> Any:
    """What ``text`` holds: a whole file, or one ``line`` of it. UserError names the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line or error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 open brackets
        where = path if line is None else f"{path}:{line}"
        raise UserError(f"{where}: not valid JSON: {str(error).splitlines()[0]}") from None


def json_rows(file: TextIO, path: Path) -> Iterator[tuple[str, object]]:
    rows = parse_json(file.read(), path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file must hold an array of rows; one object a line is .jsonl")
    rows.reverse()
    for number in range(1, len(rows) + 1):
        yield f"{path}, row {number}", rows.pop()  # so that nothing keeps its texts


def jsonl_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, path, number)


def csv_rows(file: TextIO, path: Path) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(2**31 - 1)
    reader: Any = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}:{reader.line_num}: the row does not have the header's {len(reader.fieldnames)} columns"
                )
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None


def txt_rows(file: TextIO, path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path}:{number}", {"text": line.rstrip("\r\n")}


def to_sample(row: object, where: str) -> Sample:
    """One row of any of the formats as a Sample. Columns beside those of the format are ignored."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object, got {type(row).__name__}")
    if "messages" in row:
        return Sample(where, check_messages(row["messages"], where))
    if "instruction" in row and "output" in row:
        given = text_field(row, "input", where) if row.get("input") else ""
        user = {"role": "user", "content": text_field(row, "instruction", where), "input": given}
        label = text_field(row, "label", where) if "label" in row else None
        return Sample(where, [user, {"role": "assistant", "content": text_field(row, "output", where)}], label=label)
    if "text" in row:
        text = text_field(row, "text", where)
        if "label" not in row:
            return Sample(where, [], text)
        label = text_field(row, "label", where)
        return Sample(where, [{"role": "user", "content": text}, {"role": "assistant", "content": label}], text, label)
    raise UserError(
        f"{where}: a row needs instruction and output, or messages, or text with or without label; "
        f"this one has {', '.join(map(repr, row)) or 'nothing'}"
    )


def text_field(row: dict, field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise UserError(f"{where}: {field} must be a string, got {json.dumps(row[field])[:40]}")
    return row[field]


def check_messages(messages: object, where: str) -> list[Message]:
    """Messages up to the last answer: what follows it can teach nothing."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise UserError(
                f"{where}: a message needs a role of {', '.join(ROLES)} and a content, got {json.dumps(message)[:60]}"
            )
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError(f"{where}: messages hold no assistant turn to learn")
    return [{"role": message["role"], "content": message["content"]} for message in messages[: answers[-1] + 1]]
