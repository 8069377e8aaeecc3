"""What answers a prompt: a base, or what a finetune script trained over it, with its tokenizer and prompt style."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lit_llama.checkpoint import MODEL_FILE, load_model
from lit_llama.cli import UserError
from lit_llama.data.prompts import choose_style
from lit_llama.devices.blocks import shard
from lit_llama.devices.launch import base_dtype, default_device, launch_sharded, log_rank0
from lit_llama.devices.prepack import prepare_for_inference
from lit_llama.devices.quantize import quantization, quantize_base
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA
from lit_llama.settings import DEFAULT_BASE
from lit_llama.tokenizer import Tokenizer
from lit_llama.trained import (
    METHOD_FILE,
    TRAINED_FILE,
    base_method,
    check_base,
    check_recipe,
    check_trained,
    load_trained,
    read_method,
    tokenizer_dir,
    trained_tensors,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Answerer(NamedTuple):
    name: str
    model: LLaMA
    tokenizer: Tokenizer
    style: str  # of prompts
    max_seq_length: int | None  # tokens of a sample in training, where there was one


@contextmanager
def answering(
    trained_dir: Path | str | None,
    checkpoint_dir: Path | str | None,
    prompt_style: str | None,
    precision: str,
    quantize: str | None,
    compile: bool,
    devices: int = 1,
    num_nodes: int = 1,
) -> Iterator[tuple[Answerer, Fabric | None]]:
    """What generate/base.py and generate/adapter.py answer with, and Fabric where several devices share it.

    The arguments are those scripts' flags. UserError for flags that cannot be had together.
    """
    if compile and (devices, num_nodes) != (1, 1):
        raise UserError(
            f"--devices {devices} --num_nodes {num_nodes} keep the base in pieces, which are not compiled; leave out "
            "--compile, or take one device"
        )
    fabric = launch_sharded(devices, num_nodes, quantize)
    device = fabric.device if fabric else default_device()
    dtype = base_dtype(precision, device)
    loaded = load_answerer(trained_dir, checkpoint_dir, prompt_style, dtype, device, quantize, fabric)
    prepare_for_inference(loaded.model, compile)
    yield loaded, fabric


def load_answerer(
    trained_dir: Path | str | None,
    checkpoint_dir: Path | str | None,
    prompt_style: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    fabric: Fabric | None = None,
) -> Answerer:
    """A trained folder over its base, or the base alone where ``trained_dir`` is None.

    What is None is as it was in training, or the default. With ``fabric`` its ranks hold the base in pieces, and
    ``quantize`` is not looked at: pieces are never quantized.
    """
    # With fabric left in its file, memory-mapped, for shard to cast and move block by block.
    kept = (None, "cpu", "none") if fabric else (dtype, device, quantize)
    if trained_dir:
        model, method = load_trained_folder(trained_dir, checkpoint_dir, *kept)
        tokenizer = Tokenizer(tokenizer_dir(trained_dir, checkpoint_dir, method))
        name = f"{method['method']} over {method['base']['name']}"
    else:
        folder = Path(checkpoint_dir or DEFAULT_BASE)
        method = base_method(folder)
        tokenizer, model = Tokenizer(folder), load_model(folder, *kept[:2]).requires_grad_(False)
        quantize_base(model, kept[2] or "none")
        name = model.config.name
    style = choose_style(prompt_style or method.get("prompt_style"), tokenizer)
    if fabric:
        shard(fabric, model, dtype)
    return Answerer(name, model, tokenizer, style, method["train"]["max_seq_length"] if method else None)


def load_trained_folder(
    trained_dir: Path | str,
    checkpoint_dir: Path | str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str | None = "none",
) -> tuple[LLaMA, dict]:
    """The base with a finished method on it, and its method.json.

    ``checkpoint_dir`` overrides where the base lies; that it is the same base is checked. A folder that holds a whole
    model needs no base. ``quantize`` says what its weights are kept in, None as in training: what was trained over a
    narrow base fits the wide one too, but has learned to make up for the narrow one's errors.
    """
    method, path = read_method(trained_dir), Path(trained_dir) / METHOD_FILE
    quantize = quantize or method["quantize"]
    if (Path(trained_dir) / MODEL_FILE).exists():  # a checkpoint folder: nothing of the base is left
        model = load_model(trained_dir, dtype, device)
        quantize_base(model, quantize)
        return model.requires_grad_(False), method
    model = load_model(check_base(method["base"], checkpoint_dir, path), dtype, device)
    quantize_base(model, quantize)
    add_trained(model, trained_dir, method)
    return model, method


def add_trained(model: LLaMA, trained_dir: Path | str, method: dict) -> None:
    """Freeze ``model``, a base, and put on it what a trained folder with this method.json learned."""
    path = Path(trained_dir) / METHOD_FILE
    if method["method"] not in METHODS:
        raise UserError(f"{path} names the method {method['method']!r}, not one of {', '.join(METHODS)}")

    def add_method(model: LLaMA) -> LLaMA:
        model.requires_grad_(False)
        try:
            METHODS[method["method"]](model, **method["arguments"])
        except Exception as error:  # whatever arguments raise that no script wrote
            reason = str(error).split("\n")[0]
            raise UserError(f"{path}: the arguments do not fit {method['method']}: {reason}") from None
        if model.reparametrization is not None:
            model.reparametrization.flatten(model)
        return model

    with torch.device("meta"):  # arguments that the tensors do not bear out cost no memory
        plan = add_method(LLaMA(model.config))
    check_trained(trained_tensors(plan), Path(trained_dir) / TRAINED_FILE)
    for tensor in trained_tensors(add_method(model)).values():
        tensor.data = tensor.data.clone()  # it may be the base's own, which another model goes on using (chat.py)
    check_recipe(method, load_trained(model, Path(trained_dir) / TRAINED_FILE), path)
    before, now = method["quantize"], quantization(model)
    if now != before:
        why = "has not seen its errors" if before == "none" else "has learned to make up for the other's errors"
        log_rank0(
            f"note: {trained_dir} was trained with --quantize {before}, its base is loaded with {now}: "
            f"it fits, but {why}"
        )
