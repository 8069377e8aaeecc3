"""How good a base or a trained folder is on a data file: exact match, and loss and perplexity of the answers.

    python scripts/evaluate.py --trained_dir out/adapter/bookings --data data/bookings
    python scripts/evaluate.py --data my.jsonl                              # the default base as it is

Of a folder the validation file is evaluated, of a file all of it.
"""

import math
from pathlib import Path

from lit_llama import cli
from lit_llama.checkpoint import load_model, load_trained_folder
from lit_llama.data import can_be_asked, encode_samples, read_samples, split_file
from lit_llama.devices import base_dtype, launch
from lit_llama.download import DEFAULT_BASE, ensure_base
from lit_llama.evaluate import answer_samples, count_correct
from lit_llama.prompts import choose_style
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
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
    """
    for name, value in (("max_samples", max_samples), ("batch_size", batch_size), ("max_seq_length", max_seq_length)):
        if value is not None and value < 1:
            raise cli.UserError(f"--{name} {value} must be at least 1")
    fabric = launch()
    dtype = base_dtype(precision, fabric.device)
    if trained_dir:
        model, method = load_trained_folder(trained_dir, checkpoint_dir, dtype, fabric.device)
        checkpoint_dir = checkpoint_dir or method["base"]["checkpoint_dir"]
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
    file = split_file(Path(data), "validation") if Path(data).is_dir() else Path(data)
    if file is None:
        raise cli.UserError(f"{data} holds no validation file; give the file to evaluate")
    samples = read_samples(file)[:max_samples]
    max_seq_length = min(max_seq_length or 512, model.config.block_size)
    kept, encoded = encode_samples(samples, style, tokenizer, max_seq_length)
    loss = validate(fabric, model, encoded, micro_batch_tokens=2048)
    print(f"{len(kept)} samples; {len(samples) - len(kept)} dropped: no answer begins within {max_seq_length} tokens")
    print(f"loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    asked = [sample for sample, ids in zip(kept, encoded, strict=True) if can_be_asked(sample, ids)]
    if asked:
        correct = count_correct(answer_samples(model, tokenizer, style, asked, batch_size), asked)
        print(f"exact match: {correct / len(asked):.1%} ({correct} of {len(asked)})".replace("%", " %"))


if __name__ == "__main__":
    cli.run(main)
