"""How good a base or a trained folder is on a data file: exact match, and loss and perplexity of the answers.

    python scripts/evaluate.py --trained_dir out/adapter/bookings --data data/bookings
    python scripts/evaluate.py --data my.jsonl                              # the default base as it is
    python scripts/evaluate.py --data data/bookings --shots 4               # with four examples in the prompt

It evaluates a whole file, or the validation file of a folder. For a classifier it prints the accuracy.
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.common.errors import UserError, check_range
from lit_llama.common.files import check_writable, write_json
from lit_llama.data.batches import IGNORE, TokenizedSample, micro_batches
from lit_llama.data.prompts import encode_prompt, trained_template
from lit_llama.data.samples import DataOptions, Sample, read_samples
from lit_llama.data.task import can_be_asked, encode_samples, split_file, tokenize_labels
from lit_llama.devices.blocks import check_fsdp_flags
from lit_llama.devices.launch import Bar, base_dtype, launch, print_rank0
from lit_llama.generate.classify import is_classifier, load_classifier
from lit_llama.generate.load import load_for_generation
from lit_llama.model import LLaMA
from lit_llama.settings import DEFAULT_BASE, MAX_COUNT
from lit_llama.tokenizer import Tokenizer
from lit_llama.train.evaluate import answer_samples, is_right, longest_answer, map_over_ranks
from lit_llama.train.loss import target_vectors
from lit_llama.trained import read_method

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def main(
    data: str,
    columns: dict[str, str] | None = None,
    split: str = "validation",
    trained_dir: str | None = None,
    checkpoint_dir: str | None = None,
    prompt_style: str | None = None,
    max_samples: int | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 32,
    only_loss: bool = False,
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
        data: A file, or a folder with one file for each split (data/README.md).
        split: The file of a folder: validation, test or train.
        trained_dir: Folder that a finetune script wrote; without it the base alone is evaluated.
        checkpoint_dir: Folder of the base. Default: the one trained on, or the default base.
        prompt_style: alpaca, plain or template. Default: as in training, or template if the base has one.
        max_samples: Evaluate only the first samples.
        max_seq_length: For the loss, longer samples are cut. Default: as in training, or 512 tokens.
        batch_size: Prompts answered together. Fewer need less memory.
        only_loss: Do not generate answers.
        shots: Examples from the folder's train file before every prompt (in-context learning).
        shots_seed: Random seed of their choice.
        devices: GPUs per node. Each evaluates its part of the samples.
        num_nodes: Number of machines.
        strategy: ddp or auto: the model on every device; fsdp: sharded, if it does not fit on one.
        precision: Precision of the base's weights: bf16-true, 32-true, or auto for the faster one.
        quantize: Data type of the base's weights: none, int8, or on CUDA nf4. Default: as in training; none with fsdp.
        compile: Compile the blocks with torch.compile: minutes once; no gain in float32 on a CPU.
        results: A .json file for each sample's loss and answer.
    """
    for name, value in (("max_samples", max_samples), ("batch_size", batch_size), ("max_seq_length", max_seq_length)):
        check_range(f"--{name}", value, 1, MAX_COUNT)
    check_range("--shots", shots, 0, MAX_COUNT)

    sharded, labels = strategy == "fsdp", bool(trained_dir) and is_classifier(read_method(trained_dir))
    if labels and (only_loss or shots or prompt_style or max_seq_length or quantize or compile or sharded):
        raise UserError(
            f"{trained_dir} answers with labels: --only_loss, --shots, --prompt_style, --max_seq_length, --quantize, "
            "--compile and fsdp do not apply"
        )
    check_fsdp_flags(strategy, compile, quantize or "none")
    file = split_file(Path(data), split) if Path(data).is_dir() else Path(data)
    if file is None:
        raise UserError(f"{data} holds no {split} file; give the file to evaluate, or another --split")
    if results is not None:
        check_writable(results)
    samples = read_samples(file, DataOptions(columns))[0][:max_samples]
    asked = add_shots(samples, Path(data), DataOptions(columns), shots, shots_seed) if shots else samples
    if not trained_dir:
        ensure_base(checkpoint_dir or DEFAULT_BASE)
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
        model, tokenizer, template = loaded.model, loaded.tokenizer, loaded.chat_template
        length = max_seq_length or loaded.max_seq_length or (model.max_text_tokens if shots else 512)
        length = min(length, model.max_text_tokens)
        rows = evaluate_answers(
            fabric, asked, model, tokenizer, template, length, batch_size, only_last=shots > 0, only_loss=only_loss
        )
        if dropped := len(samples) - len({row for row, *_ in rows}):
            print_rank0(f"{dropped} samples dropped: no answer within {length} tokens")
    if results is not None and fabric.is_global_zero:
        write_results(Path(results), rows)


def add_shots(samples: list[Sample], folder: Path, options: DataOptions, shots: int, seed: int) -> list[Sample]:
    """The samples with the same ``shots`` examples in front, drawn from the folder's train file."""
    file = split_file(folder, "train") if folder.is_dir() else None
    if file is None:
        raise UserError(f"--shots takes its examples from a train file: {folder} must be a folder with one")
    examples = [sample for sample in read_samples(file, options)[0] if sample.messages]
    if len(examples) < shots:
        raise UserError(f"--shots {shots}, but {file} holds {len(examples)} rows with an answer")
    given = [message for sample in random.Random(seed).sample(examples, shots) for message in sample.messages]
    return [replace(sample, messages=given + sample.messages) for sample in samples if sample.messages]


def keep_last_answers(
    samples: list[Sample], encoded: list[TokenizedSample], template: str, tokenizer: Tokenizer
) -> tuple[list[Sample], list[TokenizedSample]]:
    """Remove the few-shot answers from the targets. Drop samples whose own answer does not fit."""
    kept = []
    for sample, ids in zip(samples, encoded, strict=True):
        given = len(encode_prompt(sample.prompt, template, tokenizer)) - 1
        if given < len(ids.ids):
            ids.targets[:given] = array("i", [IGNORE]) * given
            kept.append((sample, ids))
    if not kept:
        raise UserError(f"none of {len(samples)} samples fits the context with its examples; pass fewer --shots")
    return [sample for sample, _ in kept], [ids for _, ids in kept]


@torch.inference_mode()
def sample_losses(model: LLaMA, encoded: list[TokenizedSample]) -> list[float]:
    """The cross-entropy of each sample, summed over its target tokens."""
    model.eval()
    losses: dict[int, float] = {}
    with Bar(len(encoded), "loss") as bar:
        for batch in micro_batches(encoded, max_tokens=1024):
            vectors, targets = target_vectors(model, batch)
            of_tokens = F.cross_entropy(model.lm_head(vectors).float(), targets, reduction="none")  # (n,)
            of_samples = of_tokens.cpu().split([sample.n_targets for sample in batch])
            losses |= {id(sample): own.sum().item() for sample, own in zip(batch, of_samples, strict=True)}
            bar.update(len(batch))
    return [losses[id(ids)] for ids in encoded]


def evaluate_answers(
    fabric: Fabric,
    samples: list[Sample],
    model: LLaMA,
    tokenizer: Tokenizer,
    template: str,
    length: int,
    batch_size: int,
    only_last: bool,
    only_loss: bool,
) -> list[tuple]:
    """Print loss, perplexity and, unless ``only_loss``, exact match. Each rank evaluates its part, and returns all.

    With ``only_last`` the targets are the last answers, not those of the few-shot examples.
    """
    kept, encoded = encode_samples(samples, template, tokenizer, length)
    if only_last:
        kept, encoded = keep_last_answers(kept, encoded, template, tokenizer)
    losses = map_over_ranks(fabric, model, encoded, lambda own: sample_losses(model, own))
    loss = sum(losses) / sum(ids.n_targets for ids in encoded)
    print_rank0(f"{len(kept)} samples")
    print_rank0(f"loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    pairs = [] if only_loss else list(zip(kept, encoded, strict=True))
    questions = [i for i, pair in enumerate(pairs) if can_be_asked(*pair)]
    longest = longest_answer(tokenizer, [kept[i] for i in questions])

    def answer(own: list[int]) -> list[str]:
        return answer_samples(model, tokenizer, template, [kept[i] for i in own], longest, batch_size)

    answers = dict(zip(questions, map_over_ranks(fabric, model, questions, answer), strict=True))
    right = {i: is_right(answer, kept[i]) for i, answer in answers.items()}
    if right:
        correct = sum(right.values())
        print_rank0(f"exact match: {100 * correct / len(right):.1f} % ({correct} of {len(right)})")
    values = [(losses[i], ids.n_targets, right.get(i), answers.get(i)) for i, ids in enumerate(encoded)]
    return [(sample.row, *row) for sample, row in zip(kept, values, strict=True)]


def write_results(path: Path, rows: list[tuple]) -> None:
    """Write each sample's row in the file (from 0), summed loss, number of targets, whether it is right, its answer."""
    names = ("row", "loss", "n_targets", "right", "answer")
    write_json(path, {"samples": [dict(zip(names, row, strict=True)) for row in rows]})


def evaluate_labels(
    fabric: Fabric, samples: list[Sample], trained_dir: str, checkpoint_dir: str | None, dtype: torch.dtype
) -> list[tuple]:
    """Print the accuracy of a classifier, and its loss: the mean of -log p of the right label."""
    classify, method = load_classifier(trained_dir, checkpoint_dir, dtype, fabric.device)
    tokenizer, labels = Tokenizer(checkpoint_dir or method["base"]["checkpoint_dir"]), method["arguments"]["labels"]
    template = trained_template(method, tokenizer)
    encoded = tokenize_labels(samples, template, tokenizer, method["train"]["max_seq_length"], labels)
    prompts = [sample.ids.tolist() for sample in encoded]
    probabilities = np.array(map_over_ranks(fabric, None, prompts, lambda own: list(classify(own))))
    answers = [sample.targets[-1] for sample in encoded]
    chosen = probabilities.argmax(1).tolist()
    correct = sum(one == other for one, other in zip(chosen, answers, strict=True))
    losses = -np.log(probabilities[range(len(answers)), answers].clip(1e-12))
    print_rank0(f"{method['method']} over {method['base']['name']}: loss {losses.mean():.4f}")
    print_rank0(f"accuracy: {100 * correct / len(answers):.1f} % ({correct} of {len(answers)})")
    rows = zip(samples, losses.tolist(), chosen, answers, strict=True)
    return [(sample.row, loss, 1, one == other, labels[one]) for sample, loss, one, other in rows]


if __name__ == "__main__":
    cli.run(main)
