"""Trained folders: what a method adds to a base, in ``trained.safetensors`` and ``method.json``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_llama.checkpoint import check_headers, fingerprint, load_config, shapes_of
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json, read_tensors, tensor_headers
from lit_llama.devices.quantize import count_parameters
from lit_llama.model import LLaMA
from lit_llama.settings import ROOT

TRAINED_FILE, METHOD_FILE = "trained.safetensors", "method.json"
DTYPES = {torch.float32: "F32", torch.float64: "F64"}  # trainable parameters are float32; tests also use float64
METHOD_FIELDS = {"method": str, "arguments": dict, "base": dict, "prompt_style": str, "train": dict}
BASE_FIELDS = {"checkpoint_dir": str, "name": str, "fingerprint": str}
HEADER_KEYS = ("method", "arguments", "prompt_style")  # parts of method.json that the tensors' header repeats


def trainable_parameters(model: LLaMA) -> dict[str, Tensor]:
    """The trainable parameters by name. Freeze the base, then add a method: only its parameters are left."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def count_trainable(model: LLaMA) -> str:
    """The number of trainable parameters, as a line for the user."""
    trainable, total = sum(tensor.numel() for tensor in trainable_parameters(model).values()), count_parameters(model)
    return f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)"


def kept_tensors(model: LLaMA) -> dict[str, Tensor]:
    """The tensors of a trained folder by name: what trains, or what is computed from it (methods/prefix.py)."""
    return trainable_parameters(model) if model.reparametrization is None else model.reparametrization.kept_tensors()


def describe_base(checkpoint_dir: Path | str, files: Path | None = None) -> dict:
    """The base that a method was trained on, for method.json. Its files may still be in another folder."""
    folder = Path(checkpoint_dir)
    if folder.absolute().is_relative_to(ROOT):  # so that a trained folder can move to another clone
        folder = folder.absolute().relative_to(ROOT)
    return {
        "checkpoint_dir": folder.as_posix(),  # the same on Windows
        "name": load_config(files or checkpoint_dir).name,
        "fingerprint": fingerprint(files or checkpoint_dir),
    }


def load_parameters(model: LLaMA, path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """Copy the tensors of a safetensors file whose names begin with ``prefix`` into the trainable ones of ``model``.

    Returns all tensors of the file, and its ``about``. Raises UserError, before it copies any, if names, shapes or
    dtypes differ.
    """
    tensors = trainable_parameters(model)
    check_trained(tensors, path, prefix)
    loaded, about = read_tensors(path)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(loaded[prefix + name])
    return loaded, about


def load_initial(model: LLaMA, trained_dir: Path | str) -> None:
    """Start from the tensors of a trained folder. ``describe_run`` has checked that it fits the run."""
    load_parameters(model, Path(trained_dir) / TRAINED_FILE)


def check_trained(tensors: dict[str, Tensor], path: Path, prefix: str) -> None:
    """Raises UserError unless a safetensors file holds exactly ``tensors``. Reads only its header."""
    headers = {name[len(prefix) :]: it for name, it in tensor_headers(path).items() if name.startswith(prefix)}
    check_headers(headers, shapes_of(tensors), tuple({DTYPES[tensor.dtype] for tensor in tensors.values()}), path)


def with_defaults(method: dict) -> dict:
    """A method.json or a header, with the arguments that older versions did not write."""
    if method.get("method") != "lora" or "arguments" not in method:
        return method
    return {**method, "arguments": {"rslora": False, **method["arguments"]}}


def check_header(method: dict, about: dict, path: Path) -> None:
    """Raises UserError unless method.json (``path``) agrees with the tensors' header (``about``)."""
    about = with_defaults(about)
    for key in HEADER_KEYS:
        if about.get(key, method[key]) != method[key]:
            raise UserError(f"{path}: {key} is {method[key]}, but {TRAINED_FILE} was trained with {about[key]}")


def read_method(trained_dir: Path | str) -> dict:
    """The method.json of a trained folder."""
    path = Path(trained_dir) / METHOD_FILE
    if not path.exists():
        raise UserError(f"{path} is missing, so no finetune script wrote {trained_dir}; run one, or pass its --out_dir")
    method = with_defaults(read_json(path))
    method.setdefault("train", {})  # older folders lack it
    for fields, content in ((METHOD_FIELDS, method), (BASE_FIELDS, method.get("base", {}))):
        if wrong := [field for field, kind in fields.items() if not isinstance(content.get(field), kind)]:
            raise UserError(f"{path} lacks {', '.join(wrong)}, or holds another type; copy the trained folder again")
    if not Path(method["base"]["checkpoint_dir"]).exists():  # a relative path may be one from the clone
        method["base"]["checkpoint_dir"] = str(ROOT / method["base"]["checkpoint_dir"])
    method.setdefault("trained_parameters", method.get("trained_numbers"))  # its name in older folders
    method.setdefault("quantize", "none")  # older folders lack it
    method["train"] = {"max_seq_length": 512} | method["train"]
    return method


def base_method(checkpoint_dir: Path | str) -> dict:
    """The method.json of a base that finetune/full.py wrote (it knows the prompt style); {} for any other base."""
    return read_method(checkpoint_dir) if (Path(checkpoint_dir) / METHOD_FILE).exists() else {}


def check_base(base: dict, checkpoint_dir: Path | str | None, path: Path) -> Path:
    """The folder of the base that ``path`` (a method.json) was trained on. Raises UserError if it is another model."""
    folder = Path(checkpoint_dir or base["checkpoint_dir"])
    if not folder.exists():
        raise UserError(
            f"{path.parent} was trained on {base['name']} in {folder}, which is missing; pass --checkpoint_dir"
        )
    if fingerprint(folder) != base["fingerprint"]:
        raise UserError(
            f"{path.parent} was trained on {base['name']} (fingerprint {base['fingerprint'][:12]}), but {folder} holds "
            f"{load_config(folder).name} ({fingerprint(folder)[:12]}); pass the right --checkpoint_dir"
        )
    return folder
