"""Reading data files: .json, .jsonl, .csv or .txt -> samples.

Rows may be Alpaca records (instruction, input, output), ``messages`` lists, ``text`` + ``label``, or ``text`` alone;
data/README.md shows each.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_llama.cli import UserError
from lit_llama.prompts import Message

SUFFIXES = (".json", ".jsonl", ".csv", ".txt")
ROLES = ("system", "user", "assistant")


@dataclass
class Sample:
    """One row of a data file: a conversation that ends with an answer, or a plain text to be learned as it is."""

    where: str  # file and line, for messages to the user
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
        return json.dumps([self.messages, self.text], sort_keys=True)


def read_samples(path: Path) -> list[Sample]:
    """All samples of one file. UserError names file, line and what is wrong."""
    path = Path(path)
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".txt": txt_rows}
    if path.suffix not in readers:
        raise UserError(f"{path}: data files end in {', '.join(SUFFIXES)}")
    text = read_text(path)
    one_line = path.suffix == ".json" and "\n" not in text.strip()  # where the line tells nothing
    samples = []
    for i, (line, row) in enumerate(readers[path.suffix](text, path)):
        sample = to_sample(row, f"{path}, row {i + 1}" if one_line else f"{path}:{line}")
        samples.append(replace(sample, row=i))
    if not samples:
        raise UserError(f"{path} holds no rows")
    return samples


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


def json_rows(text: str, path: Path) -> Iterator[tuple[int, object]]:
    """The elements of a JSON array with the line each begins on."""
    decoder, position, line = json.JSONDecoder(), 0, 1

    def skip(characters: str) -> None:
        nonlocal position, line
        while position < len(text) and text[position] in characters:
            line += text[position] == "\n"
            position += 1

    skip(" \t\r\n")
    if text[position : position + 1] != "[":
        raise UserError(f"{path}:{line}: a .json file must hold an array of rows; one object a line is .jsonl")
    position += 1
    first = True
    while True:
        skip(" \t\r\n")
        if text[position : position + 1] == "]":
            break
        if not first:
            if text[position : position + 1] != ",":
                raise UserError(f"{path}:{line}: not valid JSON: Expecting ',' or ']'")
            position += 1
            skip(" \t\r\n")
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = line + text.count("\n", position, getattr(error, "pos", position))
            raise UserError(f"{path}:{at}: not valid JSON: {getattr(error, 'msg', 'nested too deeply')}") from None
        yield line, row
        line += text.count("\n", position, end)
        position, first = end, False
    position += 1
    skip(" \t\r\n")
    if position < len(text):
        raise UserError(f"{path}:{line}: not valid JSON: there is more after the array's end")


def jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                message = getattr(error, "msg", "nested too deeply")
                raise UserError(f"{path}:{number}: not valid JSON: {message}") from None


def csv_rows(text: str, path: Path) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(2**31 - 1)
    reader: Any = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}:{reader.line_num}: the row does not have the header's {len(reader.fieldnames)} columns"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None


def txt_rows(text: str, path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"text": line.rstrip("\r")}


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
