"""Train a classifier on the frozen model's vectors: no gradient, one pass over the data.

    python finetune/features.py                     # SmolLM2-135M on data/intents
    python finetune/features.py --data my.csv       # your texts and labels

The classifier: lit_llama/methods/features.py. The vectors: text_vectors in lit_llama/generate/decode.py.
"""

import time

import torch

from lit_llama import __version__, cli
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_model
from lit_llama.common.errors import check_range
from lit_llama.common.files import save_tensors
from lit_llama.data.prompts import describe_template
from lit_llama.data.task import check_data, load_task
from lit_llama.devices.launch import Bar, base_dtype, launch
from lit_llama.generate.decode import text_vectors
from lit_llama.methods.features import fit_logistic, probabilities
from lit_llama.settings import DEFAULT_BASE, MAX_COUNT, MAX_TOKENS, Data, DataOptions
from lit_llama.train.run import Run, default_out_dir
from lit_llama.trained import TRAINED_FILE, describe_base


def main(
    checkpoint_dir: str = DEFAULT_BASE,
    data: Data = "data/intents",
    data_options: DataOptions = DataOptions(),  # --columns, --val_fraction, --prompt_style, ... (settings.py)
    out_dir: str | None = None,
    max_samples: int | None = None,
    max_seq_length: int = 512,
    precision: str = "auto",
    overwrite: bool = False,
    yes: bool = False,
) -> None:
    """Train a classifier on the vectors of a base.

    Args:
        data: A file, or a folder with train and validation files, whose rows have a label.
        max_samples: Number of training samples to use, from the first.
        max_seq_length: Texts with more tokens lose their beginning.
    """
    check_range("--max_samples", max_samples, 1, MAX_COUNT)
    check_range("--max_seq_length", max_seq_length, 1, MAX_TOKENS)
    check_data(data)  # before anything is fetched
    ensure_base(checkpoint_dir, yes)
    fabric = launch()
    task = load_task(data, checkpoint_dir, max_seq_length, data_options, classify=True)
    print(task.summary)
    settings = {
        "method": "features",
        "arguments": {"labels": task.labels},
        "base": describe_base(checkpoint_dir),
        **describe_template(task.chat_template),
        "data": task.data,
        "data_fingerprint": task.fingerprint,
        "train": {"max_seq_length": max_seq_length},
        "version": __version__,
    }
    run = Run(fabric, out_dir or default_out_dir("features", data), settings, overwrite=overwrite)
    model = load_model(checkpoint_dir, base_dtype(precision, fabric.device), fabric.device)

    started = time.perf_counter()
    splits = {"train": task.train[:max_samples], "validation": task.validation}
    with Bar(sum(map(len, splits.values())), "vectors") as bar:
        texts = {name: [sample.ids.tolist() for sample in split] for name, split in splits.items()}
        vectors = {name: text_vectors(model, ids, tick=bar.update) for name, ids in texts.items()}
    answers = {name: [task.labels[sample.targets[-1]] for sample in split] for name, split in splits.items()}

    # The penalty that is best in validation: a few hundred texts are easily separated in as many dimensions
    def right(fit: tuple, split: str) -> int:
        arrays, labels = fit
        chosen = [labels[i] for i in probabilities(arrays, vectors[split]).argmax(1)]
        return sum(one == other for one, other in zip(chosen, answers[split], strict=True))

    fits = [fit_logistic(vectors["train"], answers["train"], C) for C in (1.0, 1e-1, 1e-2, 1e-3, 1e-4)]
    arrays, labels = best = max(fits, key=lambda fit: right(fit, "validation"))
    seconds = time.perf_counter() - started
    for name, split in splits.items():
        n_right = right(best, name)
        print(f"accuracy on {name}: {100 * n_right / len(split):.1f} % ({n_right} of {len(split)})")

    settings["arguments"]["labels"] = labels  # only labels in the training samples
    run.start(sum(array.size for array in arrays.values()))
    save_tensors(run.out_dir / TRAINED_FILE, {name: torch.from_numpy(array) for name, array in arrays.items()})
    run.save_costs(seconds)
    print(f'\nsaved in {run.out_dir}; try: python generate/classify.py --trained_dir {run.out_dir} --prompt "..."')


if __name__ == "__main__":
    cli.run(main)
