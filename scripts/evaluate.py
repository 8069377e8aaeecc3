"""How good a base or a trained folder is on a data file: exact match, and loss and perplexity of the answers.

    python scripts/evaluate.py --trained_dir out/adapter/bookings --data data/bookings
    python scripts/evaluate.py --data my.jsonl                              # the default base as it is
    python scripts/evaluate.py --data data/bookings --shots 4               # with four examples in the prompt

Of a folder the validation file is evaluated, of a file all of it. Folders that answer with labels get their accuracy.
"""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from lit_llama import cli
from lit_llama.batches import IGNORE, Encoded
from lit_llama.checkpoint import load_model, load_trained_folder, read_method, tokenizer_dir
from lit_llama.classify import Classifier, is_classifier, load_classifier
from lit_llama.data import can_be_asked, encode_labels, encode_samples, split_file
from lit_llama.devices import base_dtype, launch
from lit_llama.download import DEFAULT_BASE, ensure_base
from lit_llama.evaluate import answer_samples, count_correct
from lit_llama.prompts import choose_style, encode_prompt
from lit_llama.samples import Sample, read_samples
from lit_llama.tokenizer import Tokenizer
from lit_llama.train import validate


def main(
    data: str,
    trained_dir: str | None = None,
    checkpoint_dir: str | None = None,
    prompt_style: str | None = None,
    max_samples: int | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 32,
    shots: int = 0,
    shots_seed: int = 1337,
    precision: str = "auto",
) -> None:
    """Evaluate a base or a trained folder.

    Args:
        data: A .json, .jsonl, .csv or .txt file, or a folder with a validation file.
        trained_dir: Folder that a finetune script wrote; without it the base alone is evaluated.
        checkpoint_dir: Folder of the base; by default the one trained on, or the default base.
        prompt_style: alpaca, chatml, llama2, llama3 or plain; by default as trained, or what the tokenizer tells.
        max_samples: Evaluate only the first ones.
        max_seq_length: Longer samples are cut for the loss; by default as in training, or 512 tokens.
        batch_size: Prompts answered together; fewer take less memory.
        shots: Examples of the data folder's train file in front of every prompt: in-context learning.
        shots_seed: Of the choice of these examples.
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
    """
    for name, value in (("max_samples", max_samples), ("batch_size", batch_size), ("max_seq_length", max_seq_length)):
        if value is not None and value < 1:
            raise cli.UserError(f"--{name} {value} must be at least 1")
    if shots < 0:
        raise cli.UserError(f"--shots {shots} must not be negative")
    file = split_file(Path(data), "validation") if Path(data).is_dir() else Path(data)
    if file is None:
        raise cli.UserError(f"{data} holds no validation file; give the file to evaluate")
    samples = read_samples(file)[:max_samples]
    fabric = launch()
    dtype = base_dtype(precision, fabric.device)
    if trained_dir and is_classifier(read_method(trained_dir)):
        if shots or prompt_style or max_seq_length:
            raise cli.UserError(f"{trained_dir} answers with labels: no --shots, --prompt_style, --max_seq_length")
        evaluate_labels(samples, *load_classifier(trained_dir, checkpoint_dir, dtype, fabric.device), checkpoint_dir)
        return
    if trained_dir:
        model, method = load_trained_folder(trained_dir, checkpoint_dir, dtype, fabric.device)
        checkpoint_dir = tokenizer_dir(trained_dir, checkpoint_dir, method)
        prompt_style = prompt_style or method["prompt_style"]
        max_seq_length = max_seq_length or method["train"]["max_seq_length"]
        print(f"{method['method']} over {method['base']['name']} on {data}")
    else:
        checkpoint_dir = checkpoint_dir or DEFAULT_BASE
        ensure_base(checkpoint_dir, yes=False)
        model = load_model(checkpoint_dir, dtype, fabric.device)
        print(f"{model.config.name} on {data}")
    tokenizer = Tokenizer(checkpoint_dir)
    style = choose_style(prompt_style, tokenizer)
    room = model.context - len(model.virtual_ids)
    max_seq_length = min(max_seq_length or (room if shots else 512), room)
    asked = add_shots(samples, Path(data), shots, shots_seed) if shots else samples
    kept, encoded = encode_samples(asked, style, tokenizer, max_seq_length)
    if shots:
        kept, encoded = count_last_answers(kept, encoded, style, tokenizer)
    loss = validate(fabric, model, encoded, micro_batch_tokens=2048)
    print(f"{len(kept)} samples; {len(samples) - len(kept)} dropped: no answer begins within {max_seq_length} tokens")
    print(f"loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    asked = [sample for sample, ids in zip(kept, encoded, strict=True) if can_be_asked(sample, ids)]
    if asked:
        correct = count_correct(answer_samples(model, tokenizer, style, asked, batch_size), asked)
        print(f"exact match: {correct / len(asked):.1%} ({correct} of {len(asked)})".replace("%", " %"))


def add_shots(samples: list[Sample], folder: Path, shots: int, seed: int) -> list[Sample]:
    """The samples with the same ``shots`` examples in front, drawn from the folder's train file."""
    file = split_file(folder, "train") if folder.is_dir() else None
    if file is None:
        raise cli.UserError(f"--shots takes its examples from a train file: {folder} must be a folder with one")
    examples = [sample for sample in read_samples(file) if sample.messages]
    if len(examples) < shots:
        raise cli.UserError(f"--shots {shots}, but {file} holds {len(examples)} rows with an answer")
    given = [message for sample in random.Random(seed).sample(examples, shots) for message in sample.messages]
    return [replace(sample, messages=given + sample.messages) for sample in samples if sample.messages]


def count_last_answers(
    samples: list[Sample], encoded: list[Encoded], style: str, tokenizer: Tokenizer
) -> tuple[list[Sample], list[Encoded]]:
    """Take the examples' answers off the targets, for they are given; drop what has no room for its own answer."""
    kept = []
    for sample, ids in zip(samples, encoded, strict=True):
        given = len(encode_prompt(sample.prompt, style, tokenizer)) - 1
        if given < len(ids.ids):
            ids.targets[:given] = [IGNORE] * given
            kept.append((sample, ids))
    if not kept:
        raise cli.UserError(f"none of {len(samples)} samples fits the context with its examples; pass fewer --shots")
    return [sample for sample, _ in kept], [ids for _, ids in kept]


def evaluate_labels(samples: list[Sample], classify: Classifier, method: dict, checkpoint_dir: str | None) -> None:
    """Print the accuracy of a classifier, and its loss: the mean of -log of the right label's probability."""
    tokenizer, labels = Tokenizer(checkpoint_dir or method["base"]["checkpoint_dir"]), method["arguments"]["labels"]
    encoded = encode_labels(samples, method["prompt_style"], tokenizer, method["train"]["max_seq_length"], labels)
    shares = classify([sample.ids for sample in encoded])
    answers = [sample.targets[-1] for sample in encoded]
    right = int((shares.argmax(1) == answers).sum())
    loss = -np.log(shares[range(len(answers)), answers].clip(1e-12)).mean()
    print(f"{method['method']} over {method['base']['name']}: loss {loss:.4f}")
    print(f"accuracy: {right / len(answers):.1%} ({right} of {len(answers)})".replace("%", " %"))


if __name__ == "__main__":
    cli.run(main)
