"""From files to token ids: .json, .jsonl, .csv or .txt -> samples -> ids with masked prompts -> micro-batches.

Rows may be Alpaca records (instruction, input, output), ``messages`` lists, ``text`` + ``label``, or ``text`` alone;
data/README.md shows each.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.checkpoint import load_config
from lit_llama.cli import UserError
from lit_llama.prompts import BOS, END_OF_TURN, EOS, STYLES, Message, choose_style, encode_control, encode_pieces
from lit_llama.tokenizer import Tokenizer

IGNORE = -100  # the target of a position that is not trained on
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


@dataclass
class Encoded:
    """ids (T,) as fed to the model and targets (T,), the next token or IGNORE."""

    ids: list[int]
    targets: list[int]

    @property
    def n_targets(self) -> int:
        return sum(target != IGNORE for target in self.targets)


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
    while True:
        skip(" \t\r\n,")
        if text[position : position + 1] == "]":
            return
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = line + text.count("\n", position, getattr(error, "pos", position))
            raise UserError(f"{path}:{at}: not valid JSON: {getattr(error, 'msg', 'nested too deeply')}") from None
        yield line, row
        line += text.count("\n", position, end)
        position = end


def jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                message = getattr(error, "msg", "nested too deeply")
                raise UserError(f"{path}:{number}: not valid JSON: {message}") from None


def csv_rows(text: str, path: Path) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
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
    """Token ids with only the answers as targets; None when nothing of an answer fits.

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
    if len(ids) > max_seq_length and trains[max_seq_length - 1]:
        ids[max_seq_length - 1 :] = encode_control(end, tokenizer)
        trains[max_seq_length - 1 :] = [trains[max_seq_length - 2]]  # no end right after a prompt
    ids, trains = ids[:max_seq_length], trains[:max_seq_length]
    while trains and not trains[-1]:  # what follows the last answer teaches nothing
        ids.pop(), trains.pop()
    targets = [token if train else IGNORE for token, train in zip(ids[1:], trains[1:], strict=True)]
    return Encoded(ids[:-1], targets) if sum(trains[1:]) > 1 else None  # an end alone is an empty answer


def encode_samples(
    samples: list[Sample], style: str, tokenizer: Tokenizer, max_seq_length: int
) -> tuple[list[Encoded], int]:
    """The samples that have a target within ``max_seq_length``, and how many have none."""
    encoded = [encode_sample(sample, style, tokenizer, max_seq_length) for sample in samples]
    kept = [sample for sample in encoded if sample is not None]
    if not kept:
        raise UserError(
            f"none of {len(samples)} samples has an answer within max_seq_length {max_seq_length}; raise it"
        )
    return kept, len(encoded) - len(kept)


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
    style = choose_style(prompt_style, tokenizer)
    train, validation = load_splits(data)
    (train_ids, dropped), (val_ids, val_dropped) = (
        encode_samples(samples, style, tokenizer, max_seq_length) for samples in (train, validation)
    )
    seen = {sample.key() for sample in train}
    notes = {
        "dropped: no answer within max_seq_length": dropped + val_dropped,
        "cut to max_seq_length": sum(len(sample.ids) >= max_seq_length - 1 for sample in train_ids + val_ids),
        "of validation also in training": sum(sample.key() in seen for sample in validation),
    }
    summary = f"{data}: {len(train_ids)} samples to train on, {len(val_ids)} to validate, prompt style {style}"
    summary += "".join(f"; {count} {note}" for note, count in notes.items() if count)
    held_out = [sample for sample in validation if sample.messages]
    return Task(str(data), tokenizer, style, train_ids, val_ids, held_out, summary)


# ---------------------------------------------------------------------------------------------- batches


def step_indices(step: int, batch_size: int, n_samples: int, seed: int, epochs: int | None = None) -> list[int]:
    """The samples of an optimizer step: a pure function, so a resumed run needs only the step number.

    The samples of an epoch are a permutation drawn by (seed, epoch). With ``epochs`` the last step ends with the data.
    """
    stream = range(step * batch_size, (step + 1) * batch_size)
    if epochs is not None:
        stream = range(stream.start, min(stream.stop, epochs * n_samples))
    orders = {epoch: epoch_order(seed, epoch, n_samples) for epoch in {i // n_samples for i in stream}}
    return [orders[i // n_samples][i % n_samples] for i in stream]


def epoch_order(seed: int, epoch: int, n_samples: int) -> list[int]:
    order = list(range(n_samples))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def micro_batches(samples: list[Encoded], max_tokens: int, max_padding: float = 0.2) -> list[list[Encoded]]:
    """Cut samples, longest first, into batches of at most ``max_tokens`` tokens with padding.

    A sample shorter than its batch's longest by more than ``max_padding`` opens a new one: sorted lengths then keep
    the padding of a whole step well under half of that.
    """
    batches: list[list[Encoded]] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        width = len(batches[-1][0].ids) if batches else 0
        if batches and (len(batches[-1]) + 1) * width <= max_tokens and len(sample.ids) >= (1 - max_padding) * width:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def collate(samples: list[Encoded], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """ids (B, T) and targets (B, T), padded at the right, where causal attention never looks back at it."""
    width = max(len(sample.ids) for sample in samples)
    ids = [sample.ids + [0] * (width - len(sample.ids)) for sample in samples]
    targets = [sample.targets + [IGNORE] * (width - len(sample.targets)) for sample in samples]
    return torch.tensor(ids, device=device), torch.tensor(targets, device=device)
