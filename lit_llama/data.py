"""From samples to token ids: training and validation splits, masked prompts, what was dropped and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from lit_llama.batches import IGNORE, Encoded
from lit_llama.checkpoint import load_config
from lit_llama.common.errors import UserError, check_range
from lit_llama.prompts import (
    BOS,
    END_OF_TURN,
    EOS,
    STYLES,
    choose_style,
    encode_control,
    encode_pieces,
    encode_prompt,
)
from lit_llama.samples import SUFFIXES, Sample, read_samples, to_sample
from lit_llama.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------- splits


def load_splits(data: Path | str | list[dict], val_fraction: float = 0.1) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples of a folder with train.* and validation.*, or of one file or list split by hash.

    The hash of a sample alone decides where it goes, so adding rows moves no other row across the split.
    """
    if isinstance(data, list):
        samples = [replace(to_sample(row, f"row {i + 1}"), row=i) for i, row in enumerate(data)]
        return split_by_hash(samples, "data", val_fraction)
    check_data(data)
    path = Path(data)
    train_file, val_file = (
        (path, None) if path.is_file() else (split_file(path, "train"), split_file(path, "validation"))
    )
    if train_file is None:
        raise UserError(f"{path} holds no train file ({', '.join('train' + suffix for suffix in SUFFIXES)})")
    train = read_samples(train_file)
    if val_file is not None:
        return train, read_samples(val_file)
    return split_by_hash(train, str(path), val_fraction)


def check_data(data: Path | str | list[dict]) -> None:
    """UserError where it is the name of nothing."""
    if not isinstance(data, list) and not Path(data).exists():
        raise UserError(
            f"--data {data} is missing, seen from {Path.cwd()}; give a file ({', '.join(SUFFIXES)}) or a folder with "
            "train.*"
        )


def split_by_hash(samples: list[Sample], where: str, val_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples; ``where`` they come from, for messages to the user."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction} must lie between 0 and 1")
    held_out = [hash_fraction(sample.key()) < val_fraction for sample in samples]
    if all(held_out) or not any(held_out):
        raise UserError(
            f"{where}: {len(samples)} rows are too few to split off {val_fraction:.0%} for validation; give more, or a "
            "folder with train.* and validation.*"
        )
    return (
        [sample for sample, out in zip(samples, held_out, strict=True) if not out],
        [sample for sample, out in zip(samples, held_out, strict=True) if out],
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
        pieces, end = iter([(BOS, False), (sample.text or "", True), (EOS, True)]), EOS
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
    has_answer = sum(trains[1:]) > 1  # an end alone is an empty answer
    return Encoded(ids[:-1], targets, cut, sample.where) if has_answer else None


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


def encode_labels(
    samples: list[Sample], style: str, tokenizer: Tokenizer, max_seq_length: int, labels: list[str]
) -> list[Encoded]:
    """Each sample's prompt, with its label's number as the target of the last token: what a classifier's head learns.

    Too long a prompt loses its beginning.
    """
    encoded = []
    for sample in samples:
        if sample.label not in labels:
            found = "no label" if sample.label is None else f"the label {sample.label!r}, which training never shows"
            raise UserError(f"{sample.where}: a classifier needs rows with one of its labels; this one has {found}")
        ids = encode_prompt(sample.prompt, style, tokenizer)[-max_seq_length:]
        if not ids:
            raise UserError(f"{sample.where}: the text is empty, there is nothing to classify")
        encoded.append(Encoded(ids, [IGNORE] * (len(ids) - 1) + [labels.index(sample.label)], where=sample.where))
    return encoded


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
    labels: list[str] | None = None  # of a classifier, in the order of its head's rows

    @property
    def fingerprint(self) -> str:
        """sha256 over ids and targets: two runs with the same one learn from the same numbers in the same order."""
        digest = hashlib.sha256()
        for sample in self.train + self.validation:
            digest.update(json.dumps([sample.ids, sample.targets]).encode())
        return digest.hexdigest()


def load_task(
    data: Path | str | list[dict],
    checkpoint_dir: Path | str,
    prompt_style: str | None,
    max_seq_length: int,
    classify: bool = False,
    n_virtual: int = 0,
) -> Task:
    """Read, split and encode ``data`` for a base; ``summary`` says what was found and what was dropped.

    With ``classify`` the targets are labels, for a head that takes the place of the language head.
    """
    tokenizer, block_size = Tokenizer(checkpoint_dir), load_config(checkpoint_dir).block_size
    if max_seq_length > block_size:
        raise UserError(f"--train.max_seq_length {max_seq_length} exceeds the base's context of {block_size} tokens")
    check_range("--prompt_length", n_virtual, 0, block_size - 1)
    samples, name = load_splits(data), "rows" if isinstance(data, list) else str(data)
    only_texts = not any(sample.messages for split in samples for sample in split)
    style = choose_style("plain" if only_texts and not prompt_style else prompt_style, tokenizer)
    if classify:
        labels = sorted({sample.label for sample in samples[0] if sample.label is not None})
        train_ids, val_ids = (encode_labels(split, style, tokenizer, max_seq_length, labels) for split in samples)
        summary = f"{name}: {len(train_ids)} samples to train on, {len(val_ids)} to validate, labels {labels}"
        held_out = [replace(s, messages=[*s.prompt, {"role": "assistant", "content": s.label}]) for s in samples[1]]
        return Task(name, tokenizer, style, train_ids, val_ids, held_out, summary, labels)
    (train, train_ids), (validation, val_ids) = (
        encode_samples(split, style, tokenizer, max_seq_length) for split in samples
    )
    longest = max(len(sample.ids) for sample in train_ids + val_ids)
    if longest + n_virtual > block_size:
        raise UserError(
            f"the longest sample has {longest} tokens, and the {n_virtual} in front leave {block_size - n_virtual} of "
            f"the base's context of {block_size}; pass --train.max_seq_length {block_size - n_virtual}"
        )
    seen = {sample.key() for sample in train}
    dropped = sum(map(len, samples)) - len(train) - len(validation)
    notes = {
        "dropped: nothing to learn within max_seq_length (an empty answer?)": dropped,
        "cut to max_seq_length": sum(ids.cut for ids in train_ids + val_ids),
        "of validation also in training": sum(sample.key() in seen for sample in validation),
    }
    summary = f"{name}: {len(train)} samples to train on, {len(validation)} to validate, prompt style {style}"
    summary += "".join(f"; {count} {note}" for note, count in notes.items() if count)
    held_out = [sample for sample, ids in zip(validation, val_ids, strict=True) if can_be_asked(sample, ids)]
    return Task(name, tokenizer, style, train_ids, val_ids, held_out, summary)
