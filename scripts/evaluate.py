"""How good a base or a trained folder is on a data file: exact match, and loss and perplexity of the answers.

    python scripts/evaluate.py --trained_dir out/adapter/bookings --data data/bookings
    python scripts/evaluate.py --data my.jsonl                              # the default base as it is
    python scripts/evaluate.py --data data/bookings --shots 4               # with four examples in the prompt

Of a folder the validation file is evaluated, of a file all of it. Folders that answer with labels get their accuracy.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llama import cli

if TYPE_CHECKING:
    from lit_llama.batches import Encoded
    from lit_llama.classify import Classifier
    from lit_llama.model import LLaMA
    from lit_llama.samples import Sample
    from lit_llama.tokenizer import Tokenizer


def main(
    data: str,
    split: str = "validation",
    trained_dir: str | None = None,
    checkpoint_dir: str | None = None,
    prompt_style: str | None = None,
    max_samples: int | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 32,
    shots: int = 0,
    shots_seed: int = 1337,
    precision: str = "auto",
    quantize: str | None = None,
    results: str | None = None,
) -> None:
    """Evaluate a base or a trained folder.

    Args:
        data: A .json, .jsonl, .csv or .txt file, or a folder with one file for each split.
        split: Which of a folder's files: validation, test or train.
        trained_dir: Folder that a finetune script wrote; without it the base alone is evaluated.
        checkpoint_dir: Folder of the base; by default the one trained on, or the default base.
        prompt_style: alpaca, chatml, llama2, llama3 or plain; by default as trained, or what the tokenizer tells.
        max_samples: Evaluate only the first ones.
        max_seq_length: Longer samples are cut for the loss; by default as in training, or 512 tokens.
        batch_size: Prompts answered together; fewer take less memory.
        shots: Examples of the data folder's train file in front of every prompt: in-context learning.
        shots_seed: Of the choice of these examples.
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
        quantize: What the base's weights are kept in: none, int8, or on CUDA nf4; by default as in training.
        results: A .json file to write each sample's loss and answer to.
    """
    from lit_llama.classify import is_classifier, load_classifier
    from lit_llama.data import encode_samples, split_file
    from lit_llama.devices import base_dtype, launch
    from lit_llama.evaluate import add_shots, count_last_answers, is_right, load_either, sample_losses
    from lit_llama.quantize import pack
    from lit_llama.samples import read_samples
    from lit_llama.trained import read_method

    for name, value in (("max_samples", max_samples), ("batch_size", batch_size), ("max_seq_length", max_seq_length)):
        if value is not None and value < 1:
            raise cli.UserError(f"--{name} {value} must be at least 1")
    if shots < 0:
        raise cli.UserError(f"--shots {shots} must not be negative")
    file = split_file(Path(data), split) if Path(data).is_dir() else Path(data)
    if file is None:
        raise cli.UserError(f"{data} holds no {split} file; give the file to evaluate, or another --split")
    samples = read_samples(file)[:max_samples]
    device = launch().device
    dtype = base_dtype(precision, device)
    if trained_dir and is_classifier(read_method(trained_dir)):
        if shots or prompt_style or max_seq_length or quantize:
            raise cli.UserError(
                f"{trained_dir} answers with labels: no --shots, --prompt_style, --max_seq_length, --quantize"
            )
        classify, method = load_classifier(trained_dir, checkpoint_dir, dtype, device)
        write_results(results, evaluate_labels(samples, classify, method, checkpoint_dir))
        return
    name, model, tokenizer, style, length = load_either(
        trained_dir, checkpoint_dir, prompt_style, dtype, device, quantize
    )
    print(f"{name} on {file}")
    room = model.text_room
    length = min(max_seq_length or length or (room if shots else 512), room)
    asked = add_shots(samples, Path(data), shots, shots_seed) if shots else samples
    kept, encoded = encode_samples(asked, style, tokenizer, length)
    if shots:
        kept, encoded = count_last_answers(kept, encoded, style, tokenizer)
    losses = sample_losses(model, encoded, device)
    pack(model)  # for decoding: the many rows of the loss gain nothing by it
    loss = sum(losses) / sum(ids.n_targets for ids in encoded)
    print(f"{len(kept)} samples; {len(samples) - len(kept)} dropped: no answer begins within {length} tokens")
    print(f"loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    answers = ask(model, tokenizer, style, kept, encoded, batch_size)
    right = {i: is_right(answer, kept[i]) for i, answer in answers.items()}
    if right:
        correct = sum(right.values())
        print(f"exact match: {correct / len(right):.1%} ({correct} of {len(right)})".replace("%", " %"))
    figures = [(losses[i], ids.n_targets, right.get(i), answers.get(i)) for i, ids in enumerate(encoded)]
    write_results(results, [(sample.row, *row) for sample, row in zip(kept, figures, strict=True)])


def ask(
    model: "LLaMA",
    tokenizer: "Tokenizer",
    style: str,
    samples: "list[Sample]",
    encoded: "list[Encoded]",
    batch_size: int,
) -> dict[int, str]:
    """The answers to the samples that have a question, by their number; ``batch_size`` of them are decoded together."""
    from lit_llama.data import can_be_asked
    from lit_llama.evaluate import answer_samples

    asked = [i for i, (sample, ids) in enumerate(zip(samples, encoded, strict=True)) if can_be_asked(sample, ids)]
    answers = answer_samples(model, tokenizer, style, [samples[i] for i in asked], batch_size)
    return dict(zip(asked, answers, strict=True))


def write_results(path: str | None, rows: list[tuple]) -> None:
    """Each: the row of the file (from 0), its loss, the tokens that this is a sum over, right or not, the answer."""
    from lit_llama.files import write_json

    if path is not None:
        names = ("row", "loss", "n_targets", "right", "answer")
        write_json(Path(path), {"samples": [dict(zip(names, row, strict=True)) for row in rows]})


def evaluate_labels(
    samples: "list[Sample]", classify: "Classifier", method: dict, checkpoint_dir: str | None
) -> list[tuple]:
    """Print the accuracy of a classifier, and its loss: the mean of -log of the right label's probability."""
    import numpy as np

    from lit_llama.data import encode_labels
    from lit_llama.prompts import choose_style
    from lit_llama.tokenizer import Tokenizer

    tokenizer, labels = Tokenizer(checkpoint_dir or method["base"]["checkpoint_dir"]), method["arguments"]["labels"]
    style = choose_style(method["prompt_style"], tokenizer)
    encoded = encode_labels(samples, style, tokenizer, method["train"]["max_seq_length"], labels)
    shares = classify([sample.ids for sample in encoded])
    answers = [sample.targets[-1] for sample in encoded]
    chosen = shares.argmax(1).tolist()
    correct = sum(one == other for one, other in zip(chosen, answers, strict=True))
    losses = -np.log(shares[range(len(answers)), answers].clip(1e-12))
    print(f"{method['method']} over {method['base']['name']}: loss {losses.mean():.4f}")
    print(f"accuracy: {correct / len(answers):.1%} ({correct} of {len(answers)})".replace("%", " %"))
    rows = zip(samples, losses.tolist(), chosen, answers, strict=True)
    return [(sample.row, loss, 1, one == other, labels[one]) for sample, loss, one, other in rows]


if __name__ == "__main__":
    cli.run(main)
