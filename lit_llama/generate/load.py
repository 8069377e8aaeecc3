"""Load a base, or a trained folder over its base, ready to answer prompts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lit_llama.checkpoint import MODEL_FILE, load_model
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_tensors
from lit_llama.data.prompts import trained_template
from lit_llama.devices.blocks import shard
from lit_llama.devices.inference import prepare_for_inference
from lit_llama.devices.launch import base_dtype, check_launcher, default_device, launch, log_rank0
from lit_llama.devices.quantize import quantization, quantize_base
from lit_llama.generate.decode import label_probabilities, text_vectors
from lit_llama.methods.features import probabilities
from lit_llama.methods.table import METHODS, weightless
from lit_llama.model import LLaMA
from lit_llama.settings import DEFAULT_BASE, Hardware
from lit_llama.tokenizer import Tokenizer
from lit_llama.trained import (
    METHOD_FILE,
    TRAINED_FILE,
    base_method,
    check_base,
    check_header,
    check_trained,
    kept_tensors,
    load_parameters,
    read_method,
    trainable_parameters,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass
class LoadedModel:
    """A model that answers prompts, and what its prompts need."""

    name: str
    model: LLaMA
    tokenizer: Tokenizer
    chat_template: str
    max_seq_length: int | None  # tokens of a training sample, None for a base


def launch_sharded(devices: int, num_nodes: int, quantize: str | None, compile: bool) -> Fabric | None:
    """Fabric for several devices that answer with a sharded base. None for one: importing Fabric takes seconds."""
    if (devices, num_nodes) == (1, 1):
        if "TORCHELASTIC_RUN_ID" in os.environ:  # an sbatch script has SLURM's variables without srun
            check_launcher(devices, num_nodes)
        return None
    return launch(Hardware(devices, num_nodes, "fsdp", compile=compile, quantize=quantize or "none"))


def load_for_generation(
    trained_dir: Path | str | None = None,
    checkpoint_dir: Path | str | None = None,
    prompt_style: str | None = None,
    precision: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
    device: torch.device | None = None,
    fabric: Fabric | None = None,
) -> LoadedModel:
    """Load a trained folder over its base, or the base alone, ready to answer.

    ``prompt_style`` and ``quantize`` default to those of training. With ``fabric`` its ranks shard the base, which is
    then neither quantized nor compiled.
    """
    device = fabric.device if fabric else device or default_device()
    dtype = base_dtype(precision, device)
    load_dtype: torch.dtype | None = dtype
    if fabric:  # the base stays in its file, memory-mapped: ``shard`` casts and moves it block by block
        load_dtype, device, quantize = None, torch.device("cpu"), "none"
    if trained_dir:
        if is_classifier(read_method(trained_dir)):
            raise UserError(f"{trained_dir} answers with a label, not with text: see generate/classify.py")
        model, method = load_trained_folder(trained_dir, checkpoint_dir, load_dtype, device, quantize)
        whole = (Path(trained_dir) / MODEL_FILE).exists()
        tokenizer = Tokenizer(trained_dir if whole else checkpoint_dir or method["base"]["checkpoint_dir"])
        name = f"{method['method']} over {method['base']['name']}"
    else:
        folder = Path(checkpoint_dir or DEFAULT_BASE)
        method = base_method(folder)
        tokenizer, model = Tokenizer(folder), load_model(folder, load_dtype, device).requires_grad_(False)
        quantize_base(model, quantize or "none")
        name = model.config.name
    template = trained_template(method, tokenizer, prompt_style)
    if fabric:
        shard(fabric, model, dtype)
    prepare_for_inference(model, compile)
    return LoadedModel(name, model, tokenizer, template, method["train"]["max_seq_length"] if method else None)


def load_trained_folder(
    trained_dir: Path | str,
    checkpoint_dir: Path | str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str | None = "none",
) -> tuple[LLaMA, dict]:
    """The base with a trained method on it, frozen, and the method's method.json. A whole model needs no base.

    ``checkpoint_dir`` is for a base that was moved. ``quantize`` None is as in training; other values also work, but
    the method has learned to make up for the errors of the base that it was trained on.
    Raises UserError if a folder is damaged, or the base is another one.
    """
    method = read_method(trained_dir)
    whole = (Path(trained_dir) / MODEL_FILE).exists()
    base = trained_dir if whole else check_base(method["base"], checkpoint_dir, Path(trained_dir) / METHOD_FILE)
    model = load_model(base, dtype, device).requires_grad_(False)
    quantize_base(model, quantize or method["quantize"])
    if not whole:
        add_trained(model, trained_dir, method)
    return model, method


def add_trained(model: LLaMA, trained_dir: Path | str, method: dict) -> None:
    """Add to ``model``, a frozen base, what a trained folder with this method.json holds.

    After a UserError the model may be half changed: discard it.
    """
    path, tensors_path = Path(trained_dir) / METHOD_FILE, Path(trained_dir) / TRAINED_FILE
    if method["method"] not in METHODS:
        raise UserError(f"{path} names the method {method['method']!r}, not one of {', '.join(METHODS)}")
    try:
        on_meta = weightless(model.config, method["method"], **method["arguments"])  # a false size allocates nothing
    except Exception as error:  # arguments that no script wrote may raise anything
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: the arguments do not fit {method['method']}: {reason}") from None
    check_trained(kept_tensors(on_meta), tensors_path, prefix="")
    METHODS[method["method"]](model, **method["arguments"])
    if model.reparametrization is not None:
        model.reparametrization.flatten(model)
    for tensor in trainable_parameters(model).values():
        tensor.data = tensor.data.clone()  # it may be shared with a model that stays in use (chat.py)
    check_header(method, load_parameters(model, tensors_path)[1], path)
    before, now = method["quantize"], quantization(model)
    if now != before:
        log_rank0(
            f"note: {trained_dir} was trained with --quantize {before}, but its base is loaded with {now}: "
            "this works, but training saw other rounding errors"
        )


def is_classifier(method: dict) -> bool:
    """Whether a trained folder with this method.json answers with a label: features, or a classifier as head."""
    return method["arguments"].get("labels") is not None


def load_classifier(
    trained_dir: str, checkpoint_dir: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[list[list[int]]], np.ndarray], dict]:
    """A function from prompts as ids to the probability of each label, (n, labels), and the folder's method.json.

    Raises UserError if the folder answers with text.
    """
    method = read_method(trained_dir)
    if not is_classifier(method):
        raise UserError(f"{trained_dir} holds {method['method']}, which answers with text: see generate/adapter.py")
    if method["method"] != "features":
        model, _ = load_trained_folder(trained_dir, checkpoint_dir, dtype, device, quantize=None)
        return partial(label_probabilities, model), method
    model = load_model(check_base(method["base"], checkpoint_dir, Path(trained_dir) / METHOD_FILE), dtype, device)
    tensors, _ = read_tensors(Path(trained_dir) / TRAINED_FILE)
    if "weight" not in tensors:
        raise UserError(f"{trained_dir} holds a random forest of an earlier version; train again")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return lambda prompts: probabilities(arrays, text_vectors(model, prompts)), method
