"""Answer a file of requests in one batch, each with its own trained folder, over one copy of the base.

    python generate/batch.py --requests requests.jsonl

A line is {"prompt": "...", "input": "...", "trained_dir": "out/adapter/bookings"}. "input" is optional, and without
"trained_dir" the base answers. The folders may come from adapter, prefix, soft_prompt and lora. Each line is printed
again with its "answer".
"""

import json
import sys
from pathlib import Path

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError
from lit_llama.data.prompts import encode_prompt, stop_ids, trained_template
from lit_llama.data.samples import read_rows
from lit_llama.devices.inference import prepare_for_inference
from lit_llama.devices.launch import base_dtype, default_device
from lit_llama.devices.quantize import quantize_base
from lit_llama.generate.decode import generate_batch
from lit_llama.generate.mixed import Mixer
from lit_llama.settings import DEFAULT_BASE, Sampling
from lit_llama.tokenizer import Tokenizer
from lit_llama.trained import base_method, read_method


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
        requests: A .jsonl file with one request per line.
        checkpoint_dir: Folder of the base, if it has moved since training.
    """
    # Requests, and the one base that they need
    rows = read_requests(Path(requests))
    tasks = [Path(row["trained_dir"]) if "trained_dir" in row else None for row in rows]
    folders = sorted(set(tasks) - {None})
    if checkpoint_dir is None:
        named = [read_method(folder)["base"] for folder in folders]
        bases = {base["fingerprint"]: base["checkpoint_dir"] for base in named} or {"": DEFAULT_BASE}
        if len(bases) > 1:
            found = sorted(bases.values())
            raise UserError(f"{requests} names folders over several bases, {found}: one batch has one base")
        (checkpoint_dir,) = bases.values()
    ensure_base(checkpoint_dir)

    # Model: the base, and the additions of every folder
    device = default_device()
    model = load_model(checkpoint_dir, base_dtype(precision, device), device)
    quantize_base(model, quantize)
    mixer = Mixer(model)
    methods = {folder: mixer.add(folder, checkpoint_dir) for folder in folders}
    prepare_for_inference(model)

    # Prompts: each by the chat template of its folder
    tokenizer = Tokenizer(checkpoint_dir)
    methods[None] = base_method(checkpoint_dir)
    templates = {folder: trained_template(method, tokenizer) for folder, method in methods.items()}
    messages = [[{"role": "user", "content": row["prompt"], "input": row.get("input", "")}] for row in rows]
    prompts = [encode_prompt(asked, templates[task], tokenizer) for asked, task in zip(messages, tasks, strict=True)]
    stops = [stop_ids(templates[task], tokenizer) for task in tasks]

    print(f"{len(rows)} requests to {len(set(tasks))} tasks over one base", file=sys.stderr)
    answers = generate_batch(model, mixer.assign(tasks, prompts), max_new_tokens, stops, sampling)
    for row, ids in zip(rows, answers, strict=True):
        print(json.dumps({**row, "answer": tokenizer.decode(ids).strip()}, ensure_ascii=False))


def read_requests(path: Path) -> list[dict]:
    """The requests of a file. Raises UserError if one has no prompt, or a field that is not a string."""
    rows = []
    for where, row in read_rows(path):
        if isinstance(row, UserError):
            raise row
        texts = isinstance(row, dict) and all(isinstance(row.get(key, ""), str) for key in ("input", "trained_dir"))
        if not texts or not isinstance(row.get("prompt"), str):
            raise UserError(f'{where}: a request needs a "prompt", and may have "input" and "trained_dir"')
        rows.append(row)
    return rows


if __name__ == "__main__":
    cli.run(main)
