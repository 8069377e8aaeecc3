"""From files to token ids: .json, .jsonl, .csv or .txt -> samples -> ids with masked prompts.

Rows may be Alpaca records (instruction, input, output), ``messages`` lists, ``text`` + ``label``, or ``text`` alone;
data/README.md shows each.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_llama.batches import IGNORE, Encoded
from lit_llama.checkpoint import load_config
from lit_llama.cli import UserError
from lit_llama.prompts import BOS, END_OF_TURN, EOS, STYLES, Message, choose_style, encode_control, encode_pieces
from lit_llama.tokenizer import Tokenizer

SUFFIXES = (".json", ".jsonl", ".csv", ".txt")
ROLES = ("system", "user", "assistant")


@dataclass
class Sample:
    """One row of a data file: a conversation that ends with an answer, or a plain text to be learned as it is."""

    where: str  # file and line, for messages to the user
    messages: list[Message]
    text: str | None = None  # of rows with a text
    label: str | None = None

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def key(self) -> str:
        """The content as one string, by which duplicates and the hash split go."""
        return json.dumps([self.messages, self.text], sort_keys=True)


# ---------------------------------------------------------------------------------------------- reading rows


def read_samples(path: Path) -> list[Sample]:
    """All samples of one file. UserError names file, line and what is wrong."""
    path = Path(path)
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".txt": txt_rows}
    if path.suffix not in readers:
        raise UserError(f"{path}: data files end in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark, as spreadsheets write it, is not content
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    samples = [to_sample(row, f"{path}:{line}") for line, row in readers[path.suffix](text, path)]
    if not samples:
        raise UserError(f"{path} holds no rows")
    return samples


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
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
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
        return Sample(where, [user, {"role": "assistant", "content": text_field(row, "output", where)}])
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


# ---------------------------------------------------------------------------------------------- splits


def load_splits(path: Path, val_fraction: float = 0.1) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples of a folder with train.* and validation.*, or of one file split by hash.

    The hash of a sample alone decides where it goes, so adding rows moves no other row across the split.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"--data {path} is missing; give a file ({', '.join(SUFFIXES)}) or a folder with train.*")
    train_file, val_file = (
        (path, None) if path.is_file() else (split_file(path, "train"), split_file(path, "validation"))
    )
    if train_file is None:
        raise UserError(f"{path} holds no train file ({', '.join('train' + suffix for suffix in SUFFIXES)})")
    train = read_samples(train_file)
    if val_file is not None:
        return train, read_samples(val_file)
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction} must lie between 0 and 1")
    held_out = [hash_fraction(sample.key()) < val_fraction for sample in train]
    if all(held_out) or not any(held_out):
        raise UserError(f"{path}: {len(train)} rows are too few to split off {val_fraction:.0%} for validation")
    return (
        [sample for sample, out in zip(train, held_out, strict=True) if not out],
        [sample for sample, out in zip(train, held_out, strict=True) if out],
    )


def split_file(folder: Path, split: str) -> Path | None:
    files = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").exists()]
    if len(files) > 1:
        raise UserError(f"{folder} holds {' and '.join(file.name for file in files)}; keep one")
    return files[0] if files else None


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


# ---------------------------------------------------------------------------------------------- token ids


def encode_sample(sample: Sample, style: str, tokenizer: Tokenizer, max_seq_length: int) -> Encoded | None:
    """Token ids with only the answers as targets; None when nothing of an answer is there to learn.

    Too long a sample loses its end, but a cut answer still ends with its end-of-turn token: a model that never sees
    one never learns to stop.
    """
    if sample.messages:
        pieces, end = STYLES[style](sample.messages), END_OF_TURN.get(style, EOS)
    else:
        pieces, end = iter([(BOS, False), (sample.text, True), (EOS, True)]), EOS
    try:
        ids, trains = encode_pieces(pieces, tokenizer)
    except UserError as error:
        raise UserError(f"{sample.where}: {error}") from None
    drop_untrained_end(ids, trains)
    cut = len(ids) > max_seq_length
    if cut and trains[max_seq_length - 1]:
        ids[max_seq_length - 1 :] = encode_control(end, tokenizer)
        trains[max_seq_length - 1 :] = [trains[max_seq_length - 2]]  # no end right after a prompt
    ids, trains = ids[:max_seq_length], trains[:max_seq_length]
    drop_untrained_end(ids, trains)
    targets = [token if train else IGNORE for token, train in zip(ids[1:], trains[1:], strict=True)]
    return Encoded(ids[:-1], targets, cut) if sum(trains[1:]) > 1 else None  # an end alone is an empty answer


def drop_untrained_end(ids: list[int], trains: list[bool]) -> None:
    """Remove, in place, what follows the last answer: it teaches nothing."""
    while trains and not trains[-1]:
        ids.pop(), trains.pop()


def encode_samples(
    samples: list[Sample], style: str, tokenizer: Tokenizer, max_seq_length: int
) -> tuple[list[Sample], list[Encoded]]:
    """The samples that have something to learn within ``max_seq_length``, and their ids."""
    encoded = [encode_sample(sample, style, tokenizer, max_seq_length) for sample in samples]
    kept = [(sample, ids) for sample, ids in zip(samples, encoded, strict=True) if ids is not None]
    if not kept:
        raise UserError(
            f"none of {len(samples)} samples has an answer that begins within max_seq_length {max_seq_length}; "
            "raise it, or fill in the answers"
        )
    return [sample for sample, _ in kept], [ids for _, ids in kept]


def can_be_asked(sample: Sample, encoded: Encoded) -> bool:
    """Whether a sample has a prompt that can be put to the model, and an answer to compare with."""
    return bool(sample.messages and sample.prompt) and not encoded.cut


@dataclass
class Task:
    """The data of a run: token ids to train and validate on, and the held-out samples to answer."""

    data: str
    tokenizer: Tokenizer
    prompt_style: str
    train: list[Encoded]
    validation: list[Encoded]
    held_out: list[Sample]
    summary: str

    @property
    def fingerprint(self) -> str:
        """sha256 over ids and targets: two runs with the same one learn from the same numbers in the same order."""
        digest = hashlib.sha256()
        for sample in self.train + self.validation:
            digest.update(json.dumps([sample.ids, sample.targets]).encode())
        return digest.hexdigest()


def load_task(data: Path, checkpoint_dir: Path, prompt_style: str | None, max_seq_length: int) -> Task:
    """Read, split and encode ``data`` for a base; ``summary`` says what was found and what was dropped."""
    tokenizer, block_size = Tokenizer(checkpoint_dir), load_config(checkpoint_dir).block_size
    if max_seq_length > block_size:
        raise UserError(f"--train.max_seq_length {max_seq_length} exceeds the base's context of {block_size} tokens")
    samples = load_splits(data)
    only_texts = not any(sample.messages for split in samples for sample in split)
    style = "plain" if only_texts else choose_style(prompt_style, tokenizer)
    (train, train_ids), (validation, val_ids) = (
        encode_samples(split, style, tokenizer, max_seq_length) for split in samples
    )
    seen = {sample.key() for sample in train}
    notes = {
        "dropped: no answer begins within max_seq_length": sum(map(len, samples)) - len(train) - len(validation),
        "cut to max_seq_length": sum(ids.cut for ids in train_ids + val_ids),
        "of validation also in training": sum(sample.key() in seen for sample in validation),
    }
    summary = f"{data}: {len(train)} samples to train on, {len(validation)} to validate, prompt style {style}"
    summary += "".join(f"; {count} {note}" for note, count in notes.items() if count)
    held_out = [sample for sample, ids in zip(validation, val_ids, strict=True) if can_be_asked(sample, ids)]
    return Task(str(data), tokenizer, style, train_ids, val_ids, held_out, summary)
