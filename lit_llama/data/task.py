"""From samples to token ids: training and validation splits, masked prompts, and counts of what was dropped."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn.functional as F

from lit_llama.checkpoint import load_config, weight_files
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import open_tensors, tensor_headers
from lit_llama.data.batches import IGNORE, TokenizedSample
from lit_llama.data.prompts import (
    Piece,
    choose_template,
    control_pieces,
    encode_pieces,
    end_of_answer,
    pieces,
    style_of,
)
from lit_llama.data.samples import SUFFIXES, Sample, Source, read_samples
from lit_llama.settings import DataOptions
from lit_llama.tokenizer import Tokenizer

MIN_VALIDATION = 10  # samples split off
MAX_VALIDATION = 2000  # also of samples kept to be answered

# ---------------------------------------------------------------------------------------------- splits


def check_data(data: Source) -> None:
    """Raises UserError if the path does not exist."""
    if not isinstance(data, list) and not Path(data).exists():
        raise UserError(f"--data {data} is missing in {Path.cwd()}; data/README.md says what it may be")


def load_splits(data: Source, options: DataOptions = DataOptions()) -> tuple[list[Sample], list[Sample], list[str]]:
    """Training samples, validation samples (from a second file, or split off), and notes on what was ignored."""
    check_data(data)
    files: dict[str, Path | None] = {}
    if not isinstance(data, list) and Path(data).is_dir():
        files = {split: split_file(Path(data), split) for split in SPLITS}
    train_file, val_file = files.get("train"), files.get("validation")
    train, notes = read_samples(train_file or data, options)
    if train_file and val_file:
        validation, val_notes = read_samples(val_file, options)
        notes += val_notes
    else:
        train, validation = split_by_hash(train, "data" if isinstance(data, list) else str(data), options.val_fraction)
    if train_file:
        others = {path for path in train_file.parent.iterdir() if path.name.endswith(SUFFIXES)} - {*files.values()}
        notes += [f"{data}: files ignored: {', '.join(sorted(path.name for path in others))}"] if others else []
        notes += [f"{files['test']} is left for scripts/evaluate.py --split test"] if files["test"] else []
    return train, validation, notes


SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev", "eval"), "test": ("test",)}


def split_file(folder: Path, split: str) -> Path | None:
    """The one file of a split in a folder, None without one. Raises UserError if there are several."""
    paths = [folder / f"{name}{suffix}" for name in SPLITS.get(split, (split,)) for suffix in SUFFIXES]
    files = [path for path in paths if path.exists()]
    if len(files) > 1:
        raise UserError(f"{folder} holds {' and '.join(file.name for file in files)}; keep one")
    return files[0] if files else None


def split_by_hash(samples: list[Sample], where: str, val_fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Training samples, and ``val_fraction`` of all for validation: those with the smallest hashes.

    Between MIN_VALIDATION (if that leaves half of them) and MAX_VALIDATION samples validate. Within these limits, new
    samples do not move old ones across the split. Equal samples stay together. ``where`` names the data in errors.
    """
    check_range("--val_fraction", val_fraction, 1e-6, 1 - 1e-6)
    hashes = [hash_fraction(sample.key()) for sample in samples]
    wanted = sum(fraction < val_fraction for fraction in hashes)
    wanted = min(max(wanted, min(MIN_VALIDATION, len(samples) // 2)), MAX_VALIDATION)
    limit = [*sorted(hashes), 1.0][wanted]
    train = [sample for sample, fraction in zip(samples, hashes, strict=True) if fraction >= limit]
    validation = [sample for sample, fraction in zip(samples, hashes, strict=True) if fraction < limit]
    if not train or not validation:
        raise UserError(
            f"{where}: {len(samples)} rows are too few, or too much alike, to split off some for validation; give "
            "more, or a folder with train.* and validation.*"
        )
    return train, validation


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends only on the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


# ---------------------------------------------------------------------------------------------- token ids


def encode_samples(
    samples: list[Sample], template: str, tokenizer: Tokenizer, max_seq_length: int, skip_bad_rows: bool = False
) -> tuple[list[Sample], list[TokenizedSample]]:
    """The samples that have something to learn, and their token ids with only the answers as targets.

    A plain text is trained on as a whole, in as many windows as it needs, and returned with each of them.
    """

    def pieces_of(sample: Sample) -> Iterable[Piece]:
        if sample.messages:
            return pieces(sample.messages, template, tokenizer)
        text, eos = sample.text or "", Piece("", True, ids=[tokenizer.eos_id])
        if tokenizer.bos_id is None:
            return [Piece(text, True), eos]
        text = f" {text}" if text and tokenizer.spaced_start else text  # as in pretraining
        return [Piece("", False, ids=[tokenizer.bos_id]), Piece(text, True, "control"), eos]

    kept: list[Sample] = []
    encoded: list[TokenizedSample] = []
    end = end_of_answer(template, tokenizer)
    for sample, ids, trains in encode_in_batches(samples, pieces_of, tokenizer, skip_bad_rows):
        if sample.messages:
            found = [cut_conversation(ids, trains, max_seq_length, end, sample.where)]
        else:
            found = cut_text(ids, trains, max_seq_length, sample.where)
        if sum(part.n_targets for part in found) > 1:  # one target is an end without anything before it
            kept += [sample] * len(found)
            encoded += found
    if not encoded:
        raise UserError(
            f"none of {len(samples)} samples has an answer that begins within max_seq_length {max_seq_length}; "
            "raise it, fill in the answers, or pass fewer --shots"
        )
    return kept, encoded


def cut_conversation(ids: list[int], trains: list[bool], max_seq_length: int, end: int, where: str) -> TokenizedSample:
    """A long conversation loses its end, but a cut answer still has the id ``end``: models must learn to stop."""
    cut = True in trains[max_seq_length:]
    if cut and trains[max_seq_length - 1]:
        ids[max_seq_length - 1] = end
        trains[max_seq_length - 1] = trains[max_seq_length - 2]  # no end directly after a prompt
    trains = trains[:max_seq_length]
    while trains and not trains[-1]:  # what follows the last answer teaches nothing
        trains.pop()
    return shifted(ids[: len(trains)], trains, where, cut)


def cut_text(ids: list[int], trains: list[bool], max_seq_length: int, where: str) -> list[TokenizedSample]:
    """A text in windows of at most ``max_seq_length`` ids. Each begins with the last id of the one before it."""
    starts = range(0, len(ids) - 1, max_seq_length - 1)
    spans = [slice(start, start + max_seq_length) for start in starts]
    return [shifted(ids[span], trains[span], where) for span in spans]


def shifted(ids: list[int], trains: list[bool], where: str, cut: bool = False) -> TokenizedSample:
    """The target of each position is the next id, or IGNORE if that id is not trained on."""
    targets = [token if train else IGNORE for token, train in zip(ids[1:], trains[1:], strict=True)]
    return TokenizedSample(array("i", ids[:-1]), array("i", targets), cut, where)


def tokenize_labels(
    samples: list[Sample], template: str, tokenizer: Tokenizer, max_seq_length: int, labels: list[str]
) -> list[TokenizedSample]:
    """Each sample's prompt, its beginning cut if too long, with the number of its label as the last token's target."""

    def pieces_of(sample: Sample) -> Iterable[Piece]:
        if sample.label not in labels:
            found = "no label" if sample.label is None else f"the label {sample.label!r}, which training never shows"
            raise UserError(f"a classifier needs rows with one of its labels; this one has {found}")
        return pieces(sample.prompt, template, tokenizer)

    tokenized = []
    for sample, ids, _ in encode_in_batches(samples, pieces_of, tokenizer):
        ids = ids[-max_seq_length:]
        if not ids:
            raise UserError(f"{sample.where}: the text is empty, there is nothing to classify")
        targets = array("i", [IGNORE] * (len(ids) - 1) + [labels.index(sample.label or "")])
        tokenized.append(TokenizedSample(array("i", ids), targets, where=sample.where))
    return tokenized


def encode_in_batches(
    samples: list[Sample],
    pieces_of: Callable[[Sample], Iterable[Piece]],
    tokenizer: Tokenizer,
    skip_bad_rows: bool = False,
    size: int = 1000,
) -> Iterator[tuple[Sample, list[int], list[bool]]]:
    """Each sample with its ids, and which are trained on; a refused sample has none, with ``skip_bad_rows``."""
    for i in range(0, len(samples), size):
        batch = samples[i : i + size]
        try:
            encoded = encode_pieces(map(pieces_of, batch), tokenizer)
        except UserError as error:
            if len(batch) > 1:  # find the sample
                yield from encode_in_batches(batch, pieces_of, tokenizer, skip_bad_rows, size=1)
                continue
            if not skip_bad_rows:
                raise UserError(f"{batch[0].where}: {error}") from None
            encoded = [([], [])]
        for sample, (ids, trains) in zip(batch, encoded, strict=True):
            yield sample, ids, trains


def can_be_asked(sample: Sample, encoded: TokenizedSample) -> bool:
    """Whether a sample has a prompt for the model, and a whole answer to compare with."""
    return bool(sample.prompt) and not encoded.cut


# ---------------------------------------------------------------------------------------------- the data of a run


@dataclass
class Task:
    """The data of a run: token ids to train and validate on, and the held-out samples to answer."""

    data: str
    checkpoint_dir: str  # of the base that the ids are for
    tokenizer: Tokenizer
    chat_template: str
    train: list[TokenizedSample]
    validation: list[TokenizedSample]
    held_out: list[Sample]
    summary: str  # what was found and dropped
    labels: list[str] | None = None  # for a classifier: label i is row i of its head

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
    data: Source,
    checkpoint_dir: Path | str,
    max_seq_length: int,
    options: DataOptions = DataOptions(),
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
    train, validation, notes = load_splits(data, options)
    notes = [f"note: {text}" for text in notes]
    only_texts = not any(sample.messages for sample in validation + train)
    template = choose_template(options.prompt_style or ("plain" if only_texts else None), tokenizer)
    labels = sorted({sample.label for sample in train if sample.label is not None}) if classify else None
    if labels is not None:
        train_ids, val_ids = (
            tokenize_labels(split, template, tokenizer, max_seq_length, labels) for split in (train, validation)
        )
        found = f", labels {labels}"
        held_out = [replace(s, messages=[*s.prompt, {"role": "assistant", "content": s.label}]) for s in validation]
    else:
        train_kept, train_ids = encode_samples(train, template, tokenizer, max_seq_length, options.skip_bad_rows)
        val_kept, val_ids = encode_samples(validation, template, tokenizer, max_seq_length, options.skip_bad_rows)
        longest, most = max(len(sample.ids) for sample in train_ids + val_ids), block_size - n_virtual
        if longest > most:
            raise UserError(
                f"the longest sample has {longest} tokens, and {n_virtual} in front of it leave {most} of the base's "
                f"context of {block_size}; pass --train.max_seq_length {most}"
            )
        n_kept = len({id(sample) for sample in train_kept + val_kept})  # a long text is kept as several samples
        dropped = len(train) + len(validation) - n_kept
        in_train = {hash(sample.ids.tobytes()) for sample in train_ids}
        counts = [
            (dropped, "dropped: nothing to learn within max_seq_length (an empty answer?), or refused by the template"),
            (sum(sample.cut for sample in train_ids + val_ids), "cut to max_seq_length"),
            (sum(hash(sample.ids.tobytes()) in in_train for sample in val_ids), "of validation also in training"),
        ]
        found = f", prompt style {style_of(template)}"
        found += "".join(f"; {count} {what}" for count, what in counts if count)
        notes += [f"warning: {text}" for text in warnings_of(train, checkpoint_dir, template, tokenizer)]
        notes += [bracket_targets(train_ids[0], tokenizer)] if options.show_sample else []
        held_out = [sample for sample, ids in zip(val_kept, val_ids, strict=True) if can_be_asked(sample, ids)]
    name = "rows" if isinstance(data, list) else str(data)
    summary = f"{name}: {len(train_ids)} training samples, {len(val_ids)} for validation{found}"
    summary = "\n".join([summary, *notes])
    held_out = held_out[:MAX_VALIDATION]
    return Task(name, str(checkpoint_dir), tokenizer, template, train_ids, val_ids, held_out, summary, labels)


def warnings_of(samples: list[Sample], checkpoint_dir: Path | str, template: str, tokenizer: Tokenizer) -> list[str]:
    """Warnings of likely mistakes: control tokens spelled in plain texts, or that the base never learned."""
    found = []
    texts = (sample.text for sample in samples[:1000] if sample.text and not sample.messages)
    if spelled := next(filter(None, map(tokenizer.control_pattern.search, texts)), None):
        found.append(
            f"plain texts spell control tokens such as {spelled[0]}, which stay text there; give conversations as rows "
            'of "messages"'
        )
    controls = {tokenizer.controls[piece.text] for piece in control_pieces(template, tokenizer)}
    if unlearned := untrained_rows(checkpoint_dir, sorted(controls)):
        names = ", ".join(sorted(tokenizer.token(i) for i in unlearned))
        found.append(
            f"the base has not learned {names}, as their embeddings are zero or alike, but prompts use them; "
            "pass --prompt_style alpaca, unless the method trains the embeddings"
        )
    return found


def untrained_rows(checkpoint_dir: Path | str, ids: list[int]) -> set[int]:
    """Those of ``ids`` whose embeddings are nearly zero, or nearly that of another one of ``ids``."""
    name = "transformer.wte.weight"
    (path,) = [path for path in weight_files(checkpoint_dir) if name in tensor_headers(path)]
    with open_tensors(path) as file:
        table = file.get_tensor(name)  # (V, C), memory-mapped
    near = 0.01 * table[:1000].float().norm(dim=1).median()
    rows = F.pad(table[ids].float(), (0, 0, 0, 1))  # (n + 1, C), the last row is zero
    alike = (rows[:, None] - rows).norm(dim=2) < near  # (n + 1, n + 1): each is like itself
    return {i for i, n_alike in zip(ids, alike.sum(1)[:-1].tolist(), strict=True) if n_alike > 1}


def bracket_targets(sample: TokenizedSample, tokenizer: Tokenizer) -> str:
    """A sample's tokens, those that are trained on in brackets. The last token always is."""
    tokens = [tokenizer.decode([i]) for i in [*sample.ids, sample.targets[-1]]]
    trained = [False, *(target != IGNORE for target in sample.targets)]
    shown = (f"[{token}]" if train else token for token, train in zip(tokens, trained, strict=True))
    return f"the first sample, its trained tokens in brackets:\n{'|'.join(shown)}"
