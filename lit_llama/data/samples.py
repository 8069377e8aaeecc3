"""Read data files -> samples. data/README.md shows every format of rows and files.

A format is chosen by a row's keys. What a row holds and its format does not read is named, never dropped in silence:
keys of a known meaning, such as tool calls, are refused; other columns are listed once as ignored.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from lit_llama.common.errors import UserError
from lit_llama.data.prompts import Message

TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))


@dataclass(slots=True)
class Sample:
    """One row of a data file: a conversation that ends with an answer, or a plain text."""

    where: str  # file and line or row, for messages to the user
    messages: list[Message]  # empty for a plain text
    text: str | None = None
    label: str | None = None
    row: int = 0  # number in the file
    unread: tuple[str, ...] = ()  # columns that its format does not have
    unread_turns: int = 0  # after the last answer

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def key(self) -> str:
        """The content as one string. Duplicates have the same key, and the split hashes it."""
        return json.dumps([self.messages, self.text], sort_keys=True)


@dataclass(frozen=True)
class DataOptions:
    """How data is read and split.

    ``columns`` maps our keys to a file's. ``val_fraction`` of a single file is split off for validation.
    ``skip_bad_rows`` leaves out rows that fit no format. ``show_sample`` prints the first sample as tokens.
    """

    columns: dict[str, str] | None = None
    val_fraction: float = 0.1
    skip_bad_rows: bool = False
    show_sample: bool = False


def read_samples(
    source: Path | str | list[dict], options: DataOptions = DataOptions()
) -> tuple[list[Sample], list[str]]:
    """The samples of a file, a folder of texts or a list of rows, and notes on what was ignored.

    Raises UserError if the file or a row is invalid.
    """
    if isinstance(source, list):
        name, rows = "the rows", iter([(f"row {i + 1}", row) for i, row in enumerate(source)])
    else:
        name, rows = Path(source).name, read_rows(Path(source))
    samples: list[Sample] = []
    bad: list[UserError] = []
    for number, (where, row) in enumerate(rows):
        try:
            samples.append(to_sample(row, where, number, options.columns))
        except UserError as error:
            if not options.skip_bad_rows:
                raise
            bad.append(error)
    if bad and not samples:
        raise UserError(f"none of {len(bad)} rows can be read; the first: {bad[0]}")
    ignored = dict.fromkeys(key for sample in samples for key in sample.unread)  # a set that keeps its order
    n_longer = sum(sample.unread_turns > 0 for sample in samples)
    notes = [f"{name}: columns ignored: {', '.join(ignored)}"] if ignored else []
    notes += [f"{name}: turns after the last answer ignored in {n_longer} rows"] if n_longer else []
    notes += [f"{name}: {len(bad)} bad rows left out; the first: {bad[0]}"] if bad else []
    return samples, notes


# ---------------------------------------------------------------------------------------------- files


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with its place for messages: file and line, or file and row.

    A folder's .txt files are a row each. Raises UserError if the file is missing, empty or invalid.
    """
    empty = True
    for where_and_row in folder_rows(path) if path.is_dir() else file_rows(path):
        empty = False
        yield where_and_row
    if empty:
        raise UserError(f"{path} holds no rows")


def folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob("*.txt")):
        yield str(path), {"text": read_text(path)}


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: data files end in {', '.join(SUFFIXES)}")
    try:
        if kind == ".parquet":
            yield from parquet_rows(path)
            return
        # utf-8-sig drops the byte-order mark that spreadsheets write. A quoted field of a .csv keeps its line ends.
        open_text: Any = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else "\n") as file:
            yield from READERS[kind](file, path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete .gz file: {error}") from None
    except UnicodeDecodeError as error:
        if path.suffix != ".gz":
            read_text(path)  # names the line
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


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
    if isinstance(rows, dict):  # {"data": [...]}
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file must hold an array of rows; one object per line is .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def jsonl_rows(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, path, number)


def csv_rows(file: TextIO, path: Path, delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    reader: Any = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        if len(reader.fieldnames or ()) == 1 and ";" in reader.fieldnames[0]:
            raise UserError(f"{path}: the header {reader.fieldnames[0]!r} has semicolons; separate columns with commas")
        if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
            raise UserError(f"{path}: the header names a column twice: {', '.join(reader.fieldnames)}")
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


READERS: dict[str, Callable] = {".json": json_rows, ".jsonl": jsonl_rows, ".txt": txt_rows}
READERS |= {".csv": csv_rows, ".tsv": partial(csv_rows, delimiter="\t")}


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow; pip install pyarrow") from None
    try:
        rows = (row for batch in parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
    except ArrowException as error:
        raise UserError(f"{path} is not a parquet file: {error}") from None


# ---------------------------------------------------------------------------------------------- rows

UNSUPPORTED = ["tools", "tool_calls", "functions", "function_call", "images", "image", "audio", "reasoning_content"]
UNSUPPORTED += ["thinking", "reasoning", "chosen", "rejected"]
ROLES = {role: role for role in ("system", "user", "assistant")}
ROLES |= {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}


def to_sample(row: Any, where: str, number: int = 0, columns: dict[str, str] | None = None) -> Sample:
    """A row as a Sample. Raises UserError if it fits no format."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object, got {type(row).__name__}")
    row = renamed(row, columns or {}, where)
    check_supported(row, where)
    for keys, optional, read in FORMATS:
        if all(key in row for key in keys):
            unread = tuple(key for key in row if key not in keys + optional)
            return Sample(where, row=number, unread=unread, **read(row, where))
    question, answer = [*map(str, row), "...", "..."][:2]
    example = json.dumps({"instruction": question, "output": answer})
    raise UserError(
        f"{where}: no format of data/README.md has the columns {', '.join(map(repr, row)) or '(none)'}; name those to "
        f"read: --columns '{example}'"
    )


def renamed(row: dict, columns: dict[str, str], where: str) -> dict:
    """The row with our keys in place of the file's."""
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
        raise UserError(f"{where}: --columns names {', '.join(missing)}; the row has {', '.join(map(str, row))}")
    return {key: value for key, value in row.items() if key not in columns.values()} | {
        ours: row[theirs] for ours, theirs in columns.items()
    }


def check_supported(row: dict, where: str) -> None:
    """Raises UserError for a key that is known but not supported. Empty values are allowed."""
    for key in UNSUPPORTED:
        if row.get(key):
            raise UserError(f"{where}: {key} is not supported; remove it, or leave such rows out with --skip_bad_rows")


def from_messages(row: dict, where: str) -> dict:
    return conversation(row["messages"], row, where)


def from_sharegpt(row: dict, where: str) -> dict:
    turns = row["conversations"]
    if isinstance(turns, list) and all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns):
        turns = [{**turn, "role": turn["from"], "content": turn["value"]} for turn in turns]
    return conversation(turns, row, where)


def from_completion(row: dict, where: str) -> dict:
    if isinstance(row.get("label"), bool):
        raise UserError(f"{where}: rated completions are not supported; keep the good ones, without label")
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):  # as TRL writes conversations
        return conversation(row["prompt"] + row["completion"], row, where)
    return from_instruction("prompt", "", "completion", row, where)


def from_instruction(question: str, given: str, answer: str, row: dict, where: str) -> dict:
    """A conversation of one question, after the turns of ``history``, a list of [question, answer]."""
    turns = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where}: history must be a list of [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    context = text_field(row, given, where) if row.get(given) else ""
    user = {"role": "user", "content": text_field(row, question, where), "input": context}
    turns += [user, {"role": "assistant", "content": text_field(row, answer, where)}]
    label = {"label": label_of(row, where)} if row.get("label") is not None else {}
    return conversation(turns, row, where) | label


def from_text(row: dict, where: str) -> dict:
    text = text_field(row, "text", where)
    if row.get("label") is None:
        return {"messages": [], "text": text}
    label = label_of(row, where)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
    return {"messages": messages, "text": text, "label": label}


# The keys that a row must have, those that it may have, and what reads it. The first that fits is taken.
alpaca = partial(from_instruction, "instruction", "input", "output")
dolly = partial(from_instruction, "instruction", "context", "response")
question_answer = partial(from_instruction, "question", "", "answer")
Format = tuple[tuple[str, ...], tuple[str, ...], Callable[[dict, str], dict]]
FORMATS: list[Format] = [
    (("messages",), ("system",), from_messages),
    (("conversations",), ("system",), from_sharegpt),
    (("instruction", "output"), ("input", "system", "history", "label"), alpaca),
    (("instruction", "response"), ("context", "system", "history"), dolly),
    (("prompt", "completion"), ("system", "history"), from_completion),
    (("question", "answer"), ("system", "history"), question_answer),
    (("text",), ("label",), from_text),
]


def text_field(row: dict, field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise UserError(f"{where}: {field} must be a string, got {json.dumps(row[field])[:40]}")
    return row[field]


def label_of(row: dict, where: str) -> str:
    """A label. A number is its own text."""
    return json.dumps(row["label"]) if isinstance(row["label"], int | float) else text_field(row, "label", where)


def conversation(turns: Any, row: dict, where: str) -> dict:
    """The messages up to the last answer, and the number of turns after it. Raises UserError if they are invalid."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    messages = [to_message(turn, where) for turn in turns]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError(f"{where}: messages hold no assistant turn to learn")
    end = answers[-1] + 1
    return {"messages": messages[:end], "unread_turns": len(messages) - end}


def to_message(turn: dict, where: str) -> Message:
    """A turn with our names of roles. "weight" 0, do not train on it, and "input" stay."""
    check_supported(turn, where)
    role, content = ROLES.get(str(turn.get("role"))), turn.get("content")
    if isinstance(content, list) and all(isinstance(it, dict) and it.get("type") == "text" for it in content):
        content = "".join(str(it.get("text", "")) for it in content)
    if role is None or not isinstance(content, str):
        got = json.dumps(turn)[:60]
        raise UserError(f"{where}: a message needs a role (system, user or assistant) and a text, got {got}")
    if turn.get("weight", 1) not in (0, 1):
        raise UserError(f"{where}: the weight of a message must be 0 or 1, got {turn['weight']}")
    kept = {key: turn[key] for key in ("input", "weight") if key in turn}
    return {"role": role, "content": content, **kept}
