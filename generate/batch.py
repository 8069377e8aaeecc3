"""Answer a file of requests in one batch, each with a trained folder of its own, over one copy of the base.

    python generate/batch.py --requests requests.jsonl

A line is {"prompt": "...", "trained_dir": "out/adapter/bookings"}, with an "input" where the prompt has one; without a
trained_dir the base answers. The folders may come from adapter, prefix, soft_prompt and lora. The answers are printed
as lines of the same form with an "answer".
"""

import json
import sys
from pathlib import Path

from lit_llama import cli
from lit_llama.settings import DEFAULT_BASE, Sampling


def main(
    requests: str,
    checkpoint_dir: str | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),
    precision: str = "auto",
    quantize: str = "none",
) -> None:
    """Answer requests to several trained folders together.

    Args:
        requests: A .jsonl file, one request a line.
        checkpoint_dir: Folder of the base, where it is no longer where it was in training.
        max_new_tokens: The longest answer.
        sampling: How the next token is chosen.
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
        quantize: What the base's weights are kept in: none, int8, or on CUDA nf4.
    """
    from lit_llama.base import ensure_base
    from lit_llama.checkpoint import load_model
    from lit_llama.data.prompts import choose_style, encode_prompt, stop_ids
    from lit_llama.devices.launch import base_dtype, default_device
    from lit_llama.devices.quantize import prepack, quantize_base
    from lit_llama.generate.decode import generate_batch
    from lit_llama.generate.mixed import Mixer
    from lit_llama.tokenizer import Tokenizer
    from lit_llama.trained import base_method, read_method

    rows = read_requests(Path(requests))
    folders = {Path(row["trained_dir"]) for row in rows if "trained_dir" in row}
    if checkpoint_dir is None:
        bases = {read_method(folder)["base"]["checkpoint_dir"] for folder in folders} or {DEFAULT_BASE}
        if len(bases) > 1:
            raise cli.UserError(f"{requests} names folders over several bases, {sorted(bases)}: one batch has one base")
        (checkpoint_dir,) = bases
    ensure_base(checkpoint_dir, yes=False)
    device = default_device()
    model = load_model(checkpoint_dir, base_dtype(precision, device), device)
    quantize_base(model, quantize)
    mixer = Mixer(model)
    tokenizer = Tokenizer(checkpoint_dir)
    styles = {folder: mixer.add(folder, checkpoint_dir)["prompt_style"] for folder in sorted(folders)}
    styles[None] = base_method(checkpoint_dir).get("prompt_style")
    styles = {folder: choose_style(style, tokenizer) for folder, style in styles.items()}
    prepack(model)

    tasks = [Path(row["trained_dir"]) if "trained_dir" in row else None for row in rows]
    messages = [[{"role": "user", "content": row["prompt"], "input": row.get("input", "")}] for row in rows]
    prompts = [encode_prompt(asked, styles[task], tokenizer) for asked, task in zip(messages, tasks, strict=True)]
    stops = [stop_ids(styles[task], tokenizer) for task in tasks]
    print(f"{len(rows)} requests to {len(set(tasks))} tasks over one base", file=sys.stderr)
    answers = generate_batch(mixer.model, mixer.assign(tasks, prompts), max_new_tokens, stops, sampling)
    for row, ids in zip(rows, answers, strict=True):
        print(json.dumps({**row, "answer": tokenizer.decode(ids).strip()}, ensure_ascii=False))


def read_requests(path: Path) -> list[dict]:
    from lit_llama.data.samples import jsonl_rows, read_text

    if not path.is_file():
        raise cli.UserError(f"--requests {path} is missing")
    rows = []
    for where, row in jsonl_rows(read_text(path).split("\n"), path):
        fields = ("prompt", "input", "trained_dir")
        texts = isinstance(row, dict) and all(isinstance(row[field], str) for field in fields if field in row)
        if not texts or "prompt" not in row:
            raise cli.UserError(f'{where}: a request needs a "prompt", and may have "input" and "trained_dir"')
        rows.append(row)
    if not rows:
        raise cli.UserError(f"{path} holds no requests")
    return rows


if __name__ == "__main__":
    cli.run(main)
