"""How good a base or a trained folder is on a data file: exact match, and loss and perplexity of the answers.

    python scripts/evaluate.py --trained_dir out/adapter/bookings --data data/bookings
    python scripts/evaluate.py --data my.jsonl                              # the default base as it is
    python scripts/evaluate.py --data data/bookings --shots 4               # with four examples in the prompt

It evaluates a whole file, or the validation file of a folder. For a classifier it prints the accuracy.
"""

from __future__ import annotations

import math
import random
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
from lit_llama.data.batches import TokenizedSample, micro_batches
from lit_llama.data.prompts import trained_template
from lit_llama.data.samples import Sample, read_samples
from lit_llama.data.task import can_be_asked, encode_samples, split_file, tokenize_labels
from lit_llama.devices.launch import Bar, base_dtype, launch, print_rank0
from lit_llama.generate.load import LoadedModel, is_classifier, load_classifier, load_for_generation
from lit_llama.model import LLaMA
from lit_llama.settings import DEFAULT_BASE, MAX_COUNT, DataOptions, Hardware
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
        quantize: Data type of the base's weights: none, int8, or on CUDA nf4. Default: as in training; none with fsdp.
        compile: Compile the blocks with torch.compile: minutes once; no gain in float32 on a CPU.
        results: A .json file for each sample's loss and answer.
    """
    for name, value in (("max_samples", max_samples), ("batch_size", batch_size)):
        check_range(f"--{name}", value, 1, MAX_COUNT)
    check_range("--max_seq_length", max_seq_length, 3, MAX_COUNT)
    check_range("--shots", shots, 0, MAX_COUNT)

    labels = bool(trained_dir) and is_classifier(read_method(trained_dir))
    sharded = strategy == "fsdp"
    if labels and (only_loss or shots or prompt_style or max_seq_length or quantize or compile or sharded):
        raise UserError(
            f"{trained_dir} answers with labels: --only_loss, --shots, --prompt_style, --max_seq_length, --quantize, "
            "--compile and fsdp do not apply"
        )
    hardware = Hardware(devices, num_nodes, strategy, compile=compile, quantize=quantize or "none")
    file = split_file(Path(data), split) if Path(data).is_dir() else Path(data)
    if file is None:
        raise UserError(f"{data} holds no {split} file; give the file to evaluate, or another --split")
    if results is not None:
        check_writable(results)
    samples = read_samples(file, DataOptions(columns))[0][:max_samples]
    asked = add_shots(samples, Path(data), DataOptions(columns), shots, shots_seed) if shots else samples
    if not trained_dir:
        ensure_base(checkpoint_dir or DEFAULT_BASE)
    fabric = launch(hardware)
    if labels:
        rows = evaluate_labels(fabric, samples, trained_dir, checkpoint_dir, base_dtype(precision, fabric.device))
    else:
        place = {"fabric": fabric} if sharded else {"device": fabric.device}
        loaded = load_for_generation(trained_dir, checkpoint_dir, prompt_style, precision, quantize, compile, **place)
        print_rank0(f"{loaded.name} on {file}")
        context = loaded.model.max_text_tokens
        length = min(context, max_seq_length or loaded.max_seq_length or (context if shots else 512))
        rows = evaluate_answers(fabric, loaded, asked, length, batch_size, only_loss)
        if dropped := len(samples) - len({row["row"] for row in rows}):
            print_rank0(f"{dropped} samples dropped: no answer within {length} tokens")
    if results is not None and fabric.is_global_zero:
        write_json(Path(results), {"samples": rows})


def add_shots(samples: list[Sample], folder: Path, options: DataOptions, shots: int, seed: int) -> list[Sample]:
    """The samples with the same ``shots`` examples in front, drawn from the folder's train file.

    Only a sample's last answer is a target, not those of the examples.
    """
    file = split_file(folder, "train") if folder.is_dir() else None
    if file is None:
        raise UserError(f"--shots takes its examples from a train file: {folder} must be a folder with one")
    examples = [sample for sample in read_samples(file, options)[0] if sample.messages]
    if len(examples) < shots:
        raise UserError(f"--shots {shots}, but {file} holds {len(examples)} rows with an answer")
    given = [message for sample in random.Random(seed).sample(examples, shots) for message in sample.messages]
    few_shot = []
    for sample in samples:
        if sample.messages:
            before = [{**message, "weight": 0} for message in given + sample.prompt]
            few_shot.append(replace(sample, messages=[*before, sample.messages[-1]]))
    return few_shot


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
    fabric: Fabric, loaded: LoadedModel, samples: list[Sample], length: int, batch_size: int, only_loss: bool
) -> list[dict]:
    """Print loss, perplexity and, unless ``only_loss``, exact match. Each rank evaluates its part, and returns all."""
    model, tokenizer, template = loaded.model, loaded.tokenizer, loaded.chat_template
    kept, encoded = encode_samples(samples, template, tokenizer, length)
    losses = map_over_ranks(fabric, model, encoded, lambda own: sample_losses(model, own))
    loss = sum(losses) / sum(ids.n_targets for ids in encoded)
    print_rank0(f"{len(kept)} samples")
    print_rank0(f"loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    rows = [
        {"row": sample.row, "loss": own_loss, "n_targets": ids.n_targets, "right": None, "answer": None}
        for sample, ids, own_loss in zip(kept, encoded, losses, strict=True)
    ]
    questions = [i for i in range(len(kept)) if not only_loss and can_be_asked(kept[i], encoded[i])]
    asked = [kept[i] for i in questions]
    longest = longest_answer(tokenizer, asked)

    def answer(own: list[Sample]) -> list[str]:
        return answer_samples(model, tokenizer, template, own, longest, batch_size)

    for i, text in zip(questions, map_over_ranks(fabric, model, asked, answer), strict=True):
        rows[i] |= {"right": is_right(text, kept[i]), "answer": text}
    if questions:
        correct = sum(rows[i]["right"] for i in questions)
        print_rank0(f"exact match: {100 * correct / len(questions):.1f} % ({correct} of {len(questions)})")
    return rows


def evaluate_labels(
    fabric: Fabric, samples: list[Sample], trained_dir: str, checkpoint_dir: str | None, dtype: torch.dtype
) -> list[dict]:
    """Print the accuracy of a classifier, and its loss: the mean of -log p of the right label."""
    classify, method = load_classifier(trained_dir, checkpoint_dir, dtype, fabric.device)
    tokenizer, labels = Tokenizer(checkpoint_dir or method["base"]["checkpoint_dir"]), method["arguments"]["labels"]
    template = trained_template(method, tokenizer)
    encoded = tokenize_labels(samples, template, tokenizer, method["train"]["max_seq_length"], labels)
    prompts = [sample.ids.tolist() for sample in encoded]
    probabilities = np.array(map_over_ranks(fabric, None, prompts, lambda own: list(classify(own))))
    answers = [sample.targets[-1] for sample in encoded]
    losses = -np.log(probabilities[range(len(answers)), answers].clip(1e-12))
    rows = [
        {"row": sample.row, "loss": loss, "n_targets": 1, "right": chosen == answer, "answer": labels[chosen]}
        for sample, loss, chosen, answer in zip(
            samples, losses.tolist(), probabilities.argmax(1).tolist(), answers, strict=True
        )
    ]
    correct = sum(row["right"] for row in rows)
    print_rank0(f"{method['method']} over {method['base']['name']}: loss {losses.mean():.4f}")
    print_rank0(f"accuracy: {100 * correct / len(rows):.1f} % ({correct} of {len(rows)})")
    return rows


if __name__ == "__main__":
    cli.run(main)
