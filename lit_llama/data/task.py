"""From samples to token ids: training and validation splits, masked prompts, and counts of what was dropped."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lit_llama.checkpoint import load_config
from lit_llama.common.errors import UserError, check_range
from lit_llama.data.batches import IGNORE, TokenizedSample
from lit_llama.data.prompts import BOS, END_OF_TURN, EOS, STYLES, Piece, choose_style, encode_control, encode_pieces
from lit_llama.data.samples import SUFFIXES, Sample, read_samples
from lit_llama.tokenizer import Tokenizer

MAX_VALIDATION = 2000  # samples split off, and samples kept to be answered

# ---------------------------------------------------------------------------------------------- splits


def check_data(data: Path | str | list[dict]) -> None:
    """Raises UserError if the path does not exist."""
    if not isinstance(data, list) and not Path(data).exists():
        raise UserError(
            f"--data {data} is missing in {Path.cwd()}; give a file ({', '.join(SUFFIXES)}) or a folder with train.*"
        )


def load_splits(data: Path | str | list[dict], val_fraction: float = 0.1) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples: a folder's train.* and validation.*, or one file or list, split by hash."""
    check_data(data)
    if isinstance(data, list):
        return split_by_hash(read_samples(data), "data", val_fraction)
    path = Path(data)
    train_file, val_file = (path, None) if path.is_file() else (split_file(path, s) for s in ("train", "validation"))
    if train_file is None:
        raise UserError(f"{path} holds no train file ({', '.join('train' + suffix for suffix in SUFFIXES)})")
    train = read_samples(train_file)
    return (train, read_samples(val_file)) if val_file else split_by_hash(train, str(path), val_fraction)


def split_file(folder: Path, split: str) -> Path | None:
    """The one file of a split in a folder, None without one. Raises UserError if there are several."""
    files = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").exists()]
    if len(files) > 1:
        raise UserError(f"{folder} holds {' and '.join(file.name for file in files)}; keep one")
    return files[0] if files else None


def split_by_hash(samples: list[Sample], where: str, val_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Split off the samples with the smallest hashes for validation: ``val_fraction`` of all, at most MAX_VALIDATION.

    So new rows do not move old ones across the split, except to keep the limit, and equal samples stay together.
    ``where`` names the data in errors.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction} must lie between 0 and 1")
    fractions = [hash_fraction(sample.key()) for sample in samples]
    limit = min([val_fraction, *sorted(fractions)[MAX_VALIDATION : MAX_VALIDATION + 1]])
    train = [sample for sample, fraction in zip(samples, fractions, strict=True) if fraction >= limit]
    validation = [sample for sample, fraction in zip(samples, fractions, strict=True) if fraction < limit]
    if not train or not validation:
        raise UserError(
            f"{where}: {len(samples)} rows are too few to split off {val_fraction:.0%} for validation; give more, or "
            "a folder with train.* and validation.*"
        )
    return train, validation


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends only on the key."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


# ---------------------------------------------------------------------------------------------- token ids


def tokenize_samples(
    samples: list[Sample], style: str, tokenizer: Tokenizer, max_seq_length: int
) -> tuple[list[Sample], list[TokenizedSample]]:
    """The samples that have a part of an answer to learn, and their token ids with only the answers as targets.

    A sample that is too long loses its end, but a cut answer still ends with its end-of-turn token: a model that never
    sees one never learns to stop. Raises UserError if no sample has an answer.
    """

    def pieces(sample: Sample) -> Iterable[Piece]:
        text = [(BOS, False), (sample.text or "", True), (EOS, True)]
        return STYLES[style](sample.messages) if sample.messages else text

    kept, tokenized = [], []
    for sample, ids, trains in encode_in_batches(samples, pieces, tokenizer):
        drop_untrained_end(ids, trains)
        cut = len(ids) > max_seq_length
        if cut and trains[max_seq_length - 1]:
            end = END_OF_TURN.get(style, EOS) if sample.messages else EOS
            ids[max_seq_length - 1 :] = encode_control(end, tokenizer)
            trains[max_seq_length - 1 :] = [trains[max_seq_length - 2]]  # no end directly after a prompt
        ids, trains = ids[:max_seq_length], trains[:max_seq_length]
        drop_untrained_end(ids, trains)
        targets = [token if train else IGNORE for token, train in zip(ids[1:], trains[1:], strict=True)]
        encoded = TokenizedSample(array("i", ids[:-1]), array("i", targets), cut, sample.where)
        if encoded.n_targets > 1:  # a single one is an end without an answer
            kept.append(sample)
            tokenized.append(encoded)
    if not kept:
        raise UserError(
            f"none of {len(samples)} samples has an answer that begins within max_seq_length {max_seq_length}; "
            "raise it, or fill in the answers"
        )
    return kept, tokenized


def tokenize_labels(
    samples: list[Sample], style: str, tokenizer: Tokenizer, max_seq_length: int, labels: list[str]
) -> list[TokenizedSample]:
    """Each sample's prompt, with the number of its label as the target of the last token, for a classifier's head.

    A prompt that is too long loses its beginning. Raises UserError if a sample has no prompt or none of the labels.
    """

    def pieces(sample: Sample) -> Iterable[Piece]:
        if sample.label not in labels:
            found = "no label" if sample.label is None else f"the label {sample.label!r}, which training never shows"
            raise UserError(f"a classifier needs rows with one of its labels; this one has {found}")
        return STYLES[style](sample.prompt)

    tokenized = []
    for sample, ids, _ in encode_in_batches(samples, pieces, tokenizer):
        ids = ids[-max_seq_length:]
        if not ids:
            raise UserError(f"{sample.where}: the text is empty, there is nothing to classify")
        targets = array("i", [IGNORE] * (len(ids) - 1) + [labels.index(sample.label or "")])
        tokenized.append(TokenizedSample(array("i", ids), targets, where=sample.where))
    return tokenized


def encode_in_batches(
    samples: list[Sample], pieces: Callable[[Sample], Iterable[Piece]], tokenizer: Tokenizer, size: int = 1000
) -> Iterator[tuple[Sample, list[int], list[bool]]]:
    """Each sample with its token ids, and for each id whether it is trained on. UserErrors name the sample."""
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        try:
            encoded = encode_pieces(map(pieces, batch), tokenizer)
        except UserError as error:
            if size == 1:
                raise UserError(f"{batch[0].where}: {error}") from None
            encoded = [row[1:] for row in encode_in_batches(batch, pieces, tokenizer, size=1)]  # finds the sample
        for sample, (ids, trains) in zip(batch, encoded, strict=True):
            yield sample, ids, trains


def drop_untrained_end(ids: list[int], trains: list[bool]) -> None:
    """Remove, in place, what follows the last answer: it teaches nothing."""
    while trains and not trains[-1]:
        ids.pop(), trains.pop()


def can_be_asked(sample: Sample, encoded: TokenizedSample) -> bool:
    """Whether a sample has a prompt for the model, and a whole answer to compare with."""
    return bool(sample.messages and sample.prompt) and not encoded.cut


# ---------------------------------------------------------------------------------------------- the data of a run


@dataclass
class Task:
    """The data of a run: token ids to train and validate on, and the held-out samples to answer."""

    data: str
    tokenizer: Tokenizer
    prompt_style: str
    train: list[TokenizedSample]
    validation: list[TokenizedSample]
    held_out: list[Sample]
    summary: str  # what was found and dropped
    labels: list[str] | None = None  # of a classifier, in the order of its head's rows

    @property
    def longest(self) -> int:
        """Tokens of the longest training sample."""
        return max(len(sample.ids) for sample in self.train)

    @property
    def fingerprint(self) -> str:
        """sha256 of all ids and targets: runs with the same one train on the same tokens."""
        digest = hashlib.sha256()
        for sample in self.train + self.validation:
            digest.update(json.dumps([sample.ids.tolist(), sample.targets.tolist()]).encode())
        return digest.hexdigest()


def load_task(
    data: Path | str | list[dict],
    checkpoint_dir: Path | str,
    prompt_style: str | None,
    max_seq_length: int,
    classify: bool = False,
    n_virtual: int = 0,
) -> Task:
    """Read, split and encode ``data`` for a base. With ``classify`` the targets are labels.

    ``n_virtual`` positions of the context are taken by the method. Raises UserError if data or flags are invalid.
    """
    tokenizer, block_size = Tokenizer(checkpoint_dir), load_config(checkpoint_dir).block_size
    if max_seq_length > block_size:
        raise UserError(f"--train.max_seq_length {max_seq_length} exceeds the base's context of {block_size} tokens")
    check_range("--prompt_length", n_virtual, 0, block_size - 1)
    name = "rows" if isinstance(data, list) else str(data)
    train, validation = load_splits(data)
    only_texts = not any(sample.messages for split in (validation, train) for sample in split)
    style = choose_style("plain" if only_texts and not prompt_style else prompt_style, tokenizer)
    if classify:
        labels = sorted({sample.label for sample in train if sample.label is not None})
        train_ids = tokenize_labels(train, style, tokenizer, max_seq_length, labels)
        val_ids = tokenize_labels(validation, style, tokenizer, max_seq_length, labels)
        summary = f"{name}: {len(train_ids)} training samples, {len(val_ids)} for validation, labels {labels}"
        answers = [replace(s, messages=[*s.prompt, {"role": "assistant", "content": s.label}]) for s in validation]
        return Task(name, tokenizer, style, train_ids, val_ids, answers[:MAX_VALIDATION], summary, labels)

    _, train_ids = tokenize_samples(train, style, tokenizer, max_seq_length)
    kept, val_ids = tokenize_samples(validation, style, tokenizer, max_seq_length)
    longest = max(len(sample.ids) for sample in train_ids + val_ids)
    if longest + n_virtual > block_size:
        raise UserError(
            f"the longest sample has {longest} tokens, and {n_virtual} in front of it leave {block_size - n_virtual} "
            f"of the base's context of {block_size}; pass --train.max_seq_length {block_size - n_virtual}"
        )
    in_train = {hash(sample.ids.tobytes()) for sample in train_ids}
    dropped = len(train) - len(train_ids) + len(validation) - len(val_ids)
    notes = {
        "dropped: nothing to learn within max_seq_length (an empty answer?)": dropped,
        "cut to max_seq_length": sum(sample.cut for sample in train_ids + val_ids),
        "of validation also in training": sum(hash(sample.ids.tobytes()) in in_train for sample in val_ids),
    }
    summary = f"{name}: {len(train_ids)} training samples, {len(val_ids)} for validation, prompt style {style}"
    summary += "".join(f"; {count} {note}" for note, count in notes.items() if count)
    held_out = [sample for sample, ids in zip(kept, val_ids, strict=True) if can_be_asked(sample, ids)]
    return Task(name, tokenizer, style, train_ids, val_ids, held_out[:MAX_VALIDATION], summary)
