"""Read data files -> samples. data/README.md shows every format of rows and files.

A format is chosen by a row's keys. What a row holds and its format does not read is named, never dropped in silence:
keys of a known meaning, such as tool calls, are refused; other columns are listed once as ignored.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lit_llama.common.errors import UserError
from lit_llama.common.files import parse_json
from lit_llama.data.prompts import Message
from lit_llama.settings import DataOptions

Source = Path | str | list[dict]  # a file, a folder of texts, or rows
Rows = Iterator[tuple[str, Any]]  # place, for errors, and row; a row that cannot be read is its UserError


@dataclass(slots=True)
class Sample:
    """One row of a data file: a conversation that ends with an answer, or a plain text."""

    where: str  # file and line or row, for messages to the user
    messages: list[Message]  # empty for a plain text
    text: str | None = None
    label: str | None = None
    row: int = 0  # number in the file
    unread: tuple[str, ...] = ()  # columns and turns that are ignored

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def key(self) -> str:
        """The content as one string. Duplicates have the same key, and the split hashes it."""
        return json.dumps([self.messages, self.text], sort_keys=True)


def read_samples(source: Source, options: DataOptions = DataOptions()) -> tuple[list[Sample], list[str]]:
    """The samples, and notes on what was ignored. Raises UserError if the file or a row is invalid."""
    if isinstance(source, list):
        name, rows = "the rows", iter([(f"row {i}", row) for i, row in enumerate(source, 1)])
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
    ignored = Counter(key for sample in samples for key in sample.unread)
    notes = [f"{name}: {key} ignored in {n} rows" for key, n in ignored.items()]
    notes += [f"{name}: {len(bad)} bad rows left out; the first: {bad[0]}"] if bad else []
    return samples, notes


def read_rows(path: Path) -> Rows:
    """The rows of a file; of a folder, its .txt files. Raises UserError if there are none, or a file is invalid."""
    if path.is_dir():
        rows: Rows = ((str(file), {"text": read_text(file)}) for file in sorted(path.glob("*.txt")))
    elif path.name.endswith(SUFFIXES):
        rows = READERS[Path(path.name.removesuffix(".gz")).suffix](path)
    else:
        raise UserError(f"{path}: data files end in {', '.join(SUFFIXES)}")
    where = None
    for where, row in rows:
        yield where, row
    if where is None:
        raise UserError(f"{path} holds no {'train file, such as train.jsonl, nor .txt' if path.is_dir() else 'rows'}")


def read_text(path: Path) -> str:
    """The content of a file that a user wrote, unpacked if it is a .gz. Raises UserError if it cannot be read."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        return data.decode("utf-8-sig")  # without the byte-order mark that spreadsheets write
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None


def json_rows(path: Path) -> Rows:
    rows = parse_json(read_text(path), path)
    if isinstance(rows, dict):  # {"data": [...]}
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file must hold an array of rows; one object per line is .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def line_rows(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def parse_line(line: str, where: str) -> Any:
    """The value of a line of JSON, or the UserError that it raises: --skip_bad_rows goes on after it."""
    try:
        return parse_json(line, where)
    except UserError as error:
        return error


def csv_rows(path: Path, delimiter: str = ",") -> Rows:
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(read_text(path), newline="")  # a quoted field keeps its line ends
    reader: Any = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise UserError(f"{path}: the header names a column twice: {', '.join(names)}")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                row = UserError(f"{where}: the row does not have the header's {len(names)} columns")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None


def parquet_rows(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow; pip install pyarrow") from None
    try:
        rows = (row for batch in parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {error}") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": json_rows,
    ".jsonl": lambda path: ((where, parse_line(line, where)) for where, line in line_rows(path)),
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, delimiter="\t"),
    ".txt": lambda path: ((where, {"text": line}) for where, line in line_rows(path)),
    ".parquet": parquet_rows,
}
SUFFIXES = (*READERS, *(f"{suffix}.gz" for suffix in READERS if suffix != ".parquet"))

# The keys that a row must have, and those that it may have. The first format that fits is taken.
FORMATS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): ("system",),
    ("conversations",): ("system",),
    ("instruction", "output"): ("input", "system", "history", "label"),
    ("instruction", "response"): ("context", "system", "history"),
    ("prompt", "completion"): ("system", "history"),
    ("question", "answer"): ("system", "history"),
    ("text",): ("label",),
}
UNSUPPORTED = ["tools", "tool_calls", "functions", "function_call", "images", "image", "audio", "reasoning_content"]
UNSUPPORTED += ["thinking", "reasoning", "chosen", "rejected"]
ROLES = {role: role for role in ("system", "user", "assistant")}
ROLES |= {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}


def to_sample(row: Any, where: str, number: int = 0, columns: dict[str, str] | None = None) -> Sample:
    """A row as a Sample. Raises UserError if it fits no format, or is the error of reading it."""
    if isinstance(row, UserError):
        raise row
    try:
        return Sample(where, row=number, **read_row(row, columns or {}))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_row(row: Any, columns: dict[str, str]) -> dict:
    """The fields of the Sample that a row says."""
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object, got {type(row).__name__}")
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
        raise UserError(f"--columns names {', '.join(missing)}; the row has {', '.join(map(str, row))}")
    others = {key: value for key, value in row.items() if key not in columns.values()}
    row = others | {ours: row[theirs] for ours, theirs in columns.items()}
    check_supported(row)
    keys = next((keys for keys in FORMATS if all(key in row for key in keys)), None)
    if keys is None:
        names = ", ".join(map(repr, row)) or "(none)"
        raise UserError(f"no format of data/README.md has the columns {names}; name those to read with --columns")
    if keys == ("prompt", "completion") and isinstance(row.get("label"), bool):
        raise UserError("rated completions are not supported; keep the good ones, without label")
    unread = tuple(key for key in row if key not in keys + FORMATS[keys])
    row = {key: value for key, value in row.items() if key not in unread}
    if isinstance(row.get("label"), int | float):
        row["label"] = json.dumps(row["label"])  # a number is its own text
    in_lists = all(isinstance(row[key], list) for key in keys)  # TRL writes a prompt and a completion as messages, too
    asks = len(keys) == 2 and not in_lists
    for key in ("text", "label", *((*keys, "input", "context") if asks else ())):
        if not isinstance(row.get(key, ""), str) and (row[key] is not None or key in keys):
            raise UserError(f"{key} must be a string, got {row[key]!r:.40}")
    text, label = row.get("text"), row.get("label")
    if text is not None:
        turns = [] if label is None else [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
    elif in_lists:
        turns = [turn for key in keys for turn in row[key]]
    elif asks:
        turns = question_turns(row, *keys)
    else:
        raise UserError(f"{keys[0]} must be a list of objects with role and content")
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    messages = [to_message(turn) for turn in turns]
    end = max((i for i, message in enumerate(messages, 1) if message["role"] == "assistant"), default=0)
    if end == 0 and text is None:
        raise UserError("messages hold no assistant turn to learn")
    if end < len(messages):
        unread += ("turns after the last answer",)
    return {"messages": messages[:end], "text": text, "label": label, "unread": unread}


def check_supported(row: dict) -> None:
    """Raises UserError for a key that is known but not supported. Empty values are allowed."""
    for key in UNSUPPORTED:
        if row.get(key):
            raise UserError(f"{key} is not supported; remove it, or leave such rows out with --skip_bad_rows")


def question_turns(row: dict, question: str, answer: str) -> list[dict]:
    """A question with its answer, after the turns of ``history``, a list of [question, answer]."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history must be a list of [question, answer]")
    pairs = [*history, [row[question], row[answer]]]
    turns = [{"role": role, "content": pair[i]} for pair in pairs for i, role in enumerate(("user", "assistant"))]
    turns[-2]["input"] = row.get("input") or row.get("context") or ""
    return turns


def to_message(turn: Any) -> Message:
    """A turn with our names of roles. "weight" 0, do not train on it, and "input" stay."""
    if not isinstance(turn, dict):
        raise UserError(f"messages must be objects with role and content, got {turn!r:.60}")
    check_supported(turn)
    role, content = ROLES.get(str(turn.get("role", turn.get("from")))), turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(it, dict) and it.get("type") == "text" for it in content):
        content = "".join(str(it.get("text", "")) for it in content)
    kept = {key: turn[key] for key in ("input", "weight") if turn.get(key) is not None}
    if role is None or not isinstance(content, str) or not isinstance(kept.get("input", ""), str):
        raise UserError(f"a message needs a role (system, user or assistant) and a text, got {turn!r:.60}")
    if kept.get("weight", 1) not in (0, 1):
        raise UserError(f"the weight of a message must be 0 or 1, got {turn['weight']}")
    return {"role": role, "content": content, **kept}
