"""How good a base or a trained folder is on a data file: exact match, and loss and perplexity of the answers.

    python scripts/evaluate.py --trained_dir out/adapter/bookings --data data/bookings
    python scripts/evaluate.py --data my.jsonl                              # the default base as it is
    python scripts/evaluate.py --data data/bookings --shots 4               # with four examples in the prompt

Of a folder the validation file is evaluated, of a file all of it. Folders that answer with labels get their accuracy.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.common.errors import check_range
from lit_llama.settings import DEFAULT_BASE, MOST

if TYPE_CHECKING:
    import torch
    from lightning.fabric import Fabric

    from lit_llama.data.samples import Sample
    from lit_llama.model import LLaMA
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
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
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
        devices: Processes that share the samples, one for each device, on every node.
        num_nodes: Machines.
        strategy: ddp, with the model on every device; fsdp, in pieces, where it does not fit one; or auto.
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
        quantize: What the base's weights are kept in: none, int8, or on CUDA nf4; by default as in training, with
            fsdp none.
        compile: Compile the blocks by torch.compile: minutes first; in float32 on a CPU nothing is gained.
        results: A .json file to write each sample's loss and answer to.
    """
    for name, value in (("max_samples", max_samples), ("batch_size", batch_size), ("max_seq_length", max_seq_length)):
        check_range(f"--{name}", value, 1, MOST)
    check_range("--shots", shots, 0, MOST)

    from lit_llama.common.files import check_writable
    from lit_llama.data.samples import read_samples
    from lit_llama.data.task import split_file
    from lit_llama.devices.launch import base_dtype, launch, print_rank0
    from lit_llama.generate.classify import is_classifier
    from lit_llama.generate.load import load_for_generation
    from lit_llama.trained import read_method

    sharded, labels = strategy == "fsdp", bool(trained_dir) and is_classifier(read_method(trained_dir))
    if labels and (shots or prompt_style or max_seq_length or quantize or compile or sharded):
        raise cli.UserError(
            f"{trained_dir} answers with labels: no --shots, --prompt_style, --max_seq_length, --quantize, --compile, "
            "fsdp"
        )
    if sharded and (compile or (quantize or "none") != "none"):
        raise cli.UserError("--strategy fsdp goes with neither --quantize nor --compile; pass ddp")
    file = split_file(Path(data), split) if Path(data).is_dir() else Path(data)
    if file is None:
        raise cli.UserError(f"{data} holds no {split} file; give the file to evaluate, or another --split")
    if results is not None:
        check_writable(results)
    if not trained_dir:
        ensure_base(checkpoint_dir or DEFAULT_BASE)
    samples = read_samples(file)[:max_samples]
    fabric = launch(devices, num_nodes, strategy)
    if labels:
        dtype = base_dtype(precision, fabric.device)
        rows = evaluate_labels(fabric, samples, trained_dir, checkpoint_dir, dtype)
    else:
        loaded = load_for_generation(
            trained_dir,
            checkpoint_dir,
            prompt_style,
            precision,
            quantize,
            compile,
            device=fabric.device,
            fabric=fabric if sharded else None,
        )
        print_rank0(f"{loaded.name} on {file}")
        model, tokenizer, style = loaded.model, loaded.tokenizer, loaded.prompt_style
        length = max_seq_length or loaded.max_seq_length or (model.max_text_tokens if shots else 512)
        length = min(length, model.max_text_tokens)
        given = Examples(Path(data), shots, shots_seed)
        rows = evaluate_answers(fabric, samples, model, tokenizer, style, length, batch_size, given)
    if results is not None and fabric.is_global_zero:
        write_results(Path(results), rows)


class Examples(NamedTuple):
    """How many examples stand in front of every prompt, from whose train file, and the seed of their choice."""

    folder: Path
    count: int
    seed: int


def evaluate_answers(
    fabric: "Fabric",
    samples: "list[Sample]",
    model: "LLaMA",
    tokenizer: "Tokenizer",
    style: str,
    length: int,
    batch_size: int,
    given: Examples,
) -> list[tuple]:
    """Print loss, perplexity and exact match. The ranks share the samples, and each has all results in the end."""
    from lit_llama.data.task import can_be_asked, encode_samples
    from lit_llama.devices.launch import print_rank0
    from lit_llama.train.evaluate import (
        add_shots,
        answer_samples,
        count_last_answers,
        is_right,
        longest_answer,
        sample_losses,
        shared,
    )

    asked = add_shots(samples, *given) if given.count else samples
    kept, encoded = encode_samples(asked, style, tokenizer, length)
    if given.count:
        kept, encoded = count_last_answers(kept, encoded, style, tokenizer)
    losses = shared(fabric, model, encoded, lambda own: sample_losses(model, own, fabric.device))
    loss = sum(losses) / sum(ids.n_targets for ids in encoded)
    dropped = len(samples) - len(kept)
    drops = f"; {dropped} dropped: no answer within {length} tokens" if dropped else ""
    print_rank0(f"{len(kept)} samples{drops}")
    print_rank0(f"loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    questions = [i for i, (sample, ids) in enumerate(zip(kept, encoded, strict=True)) if can_be_asked(sample, ids)]
    longest = longest_answer(tokenizer, [kept[i] for i in questions])

    def answer(own: list[int]) -> list[str]:
        return answer_samples(model, tokenizer, style, [kept[i] for i in own], longest, batch_size)

    answers = dict(zip(questions, shared(fabric, model, questions, answer), strict=True))
    right = {i: is_right(answer, kept[i]) for i, answer in answers.items()}
    if right:
        correct = sum(right.values())
        print_rank0(f"exact match: {100 * correct / len(right):.1f} % ({correct} of {len(right)})")
    figures = [(losses[i], ids.n_targets, right.get(i), answers.get(i)) for i, ids in enumerate(encoded)]
    return [(sample.row, *row) for sample, row in zip(kept, figures, strict=True)]


def write_results(path: Path, rows: list[tuple]) -> None:
    """Each: the row of the file (from 0), its loss, the tokens that this is a sum over, right or not, the answer."""
    from lit_llama.common.files import write_json

    names = ("row", "loss", "n_targets", "right", "answer")
    write_json(path, {"samples": [dict(zip(names, row, strict=True)) for row in rows]})


def evaluate_labels(
    fabric: "Fabric", samples: "list[Sample]", trained_dir: str, checkpoint_dir: str | None, dtype: "torch.dtype"
) -> list[tuple]:
    """Print the accuracy of a classifier, and its loss: the mean of -log of the right label's probability."""
    import numpy as np

    from lit_llama.data.prompts import choose_style
    from lit_llama.data.task import tokenize_labels
    from lit_llama.devices.launch import print_rank0
    from lit_llama.generate.classify import load_classifier
    from lit_llama.tokenizer import Tokenizer
    from lit_llama.train.evaluate import shared

    classify, method = load_classifier(trained_dir, checkpoint_dir, dtype, fabric.device)
    tokenizer, labels = Tokenizer(checkpoint_dir or method["base"]["checkpoint_dir"]), method["arguments"]["labels"]
    style = choose_style(method["prompt_style"], tokenizer)
    encoded = tokenize_labels(samples, style, tokenizer, method["train"]["max_seq_length"], labels)
    prompts = [sample.ids.tolist() for sample in encoded]
    shares = np.array(shared(fabric, None, prompts, lambda own: list(classify(own))))
    answers = [sample.targets[-1] for sample in encoded]
    chosen = shares.argmax(1).tolist()
    correct = sum(one == other for one, other in zip(chosen, answers, strict=True))
    losses = -np.log(shares[range(len(answers)), answers].clip(1e-12))
    print_rank0(f"{method['method']} over {method['base']['name']}: loss {losses.mean():.4f}")
    print_rank0(f"accuracy: {100 * correct / len(answers):.1f} % ({correct} of {len(answers)})")
    rows = zip(samples, losses.tolist(), chosen, answers, strict=True)
    return [(sample.row, loss, 1, one == other, labels[one]) for sample, loss, one, other in rows]


if __name__ == "__main__":
    cli.run(main)
