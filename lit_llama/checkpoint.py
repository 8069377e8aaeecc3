"""Checkpoint folders (a whole model) and trained folders (what a method learned over a base).

A checkpoint folder holds ``model.safetensors`` (or shards with an index), ``config.json`` and the tokenizer's files;
a trained folder ``trained.safetensors`` and ``method.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.cli import UserError
from lit_llama.files import open_tensors, read_json, save_tensors, write_json
from lit_llama.model import LLaMA, LLaMAConfig

# ---------------------------------------------------------------------------------------------- checkpoint folders

CONFIG_FILE, MODEL_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"


def load_config(folder: Path) -> LLaMAConfig:
    path = Path(folder) / CONFIG_FILE
    content = read_json(path)
    known = {field.name for field in fields(LLaMAConfig)}
    content.setdefault("bias", False)  # folders written before the field existed lack it
    if set(content) != known:
        missing, unknown = sorted(known - set(content)), sorted(set(content) - known)
        raise UserError(
            f"{path} is not a config of this project: missing {missing}, unknown {unknown}; "
            "convert the checkpoint with one of scripts/convert_*.py"
        )
    try:
        return LLaMAConfig(**content)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def tensor_shapes(config: LLaMAConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint; a tied head is stored once, as the embedding."""
    with torch.device("meta"):
        state = LLaMA(config).state_dict()
    if config.tie_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_tensors(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: Path) -> None:
    """UserError unless names and shapes are the same."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is not expected" for name in found if name not in expected]
    wrong += [
        f"{name} has shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        raise UserError(f"{where} does not fit the model: {'; '.join(wrong[:3])} ({len(wrong)} differences in all)")


def save_checkpoint(
    folder: Path, config: LLaMAConfig, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = 4 * 2**30
) -> None:
    """Write weights and config.json into ``folder``, checked against the config; holds one shard in memory at most.

    ``tensors`` is consumed once, so it may be a generator that reads and converts as it goes.
    """
    folder, found, files = Path(folder), {}, []
    shard, shard_bytes = {}, 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        files.append((folder / f"part-{len(files)}", list(shard)))
        save_tensors(files[-1][0], shard)
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if name in found:
            raise UserError(f"tensor {name} comes twice")
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        found[name] = tuple(tensor.shape)
        shard[name] = tensor
        shard_bytes += tensor.nbytes
    flush()
    check_tensors(found, tensor_shapes(config), folder)
    name_shards(folder, files)
    write_json(folder / CONFIG_FILE, asdict(config))


def name_shards(folder: Path, files: list[tuple[Path, list[str]]]) -> None:
    """Give the parts their final names: one model.safetensors, or numbered shards with an index."""
    if len(files) == 1:
        os.replace(files[0][0], folder / MODEL_FILE)
        return
    weight_map = {}
    for i, (part, names) in enumerate(files):
        shard_name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(part, folder / shard_name)
        weight_map.update(dict.fromkeys(names, shard_name))
    write_json(folder / INDEX_FILE, {"weight_map": weight_map})


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    folder = Path(folder)
    if not (folder / INDEX_FILE).exists():
        return [folder / MODEL_FILE]
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{folder / INDEX_FILE} must map tensors to file names of its own folder")
    return [folder / name for name in names]


def load_model(folder: Path, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> LLaMA:
    """The model of a checkpoint folder, in ``dtype`` (as it is stored: None) on ``device``.

    It is made on the meta device and takes each tensor as it is read: at most one tensor exists twice. On the CPU a
    tensor that is stored in ``dtype`` already stays memory-mapped and is not copied at all.
    """
    config = load_config(folder)
    state: dict[str, Tensor] = {}
    for path in shard_files(folder):
        with open_tensors(path, device) as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                state[name] = tensor if dtype is None else tensor.to(dtype)
    check_tensors({name: tuple(t.shape) for name, t in state.items()}, tensor_shapes(config), Path(folder))
    if config.tie_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    with torch.device("meta"):
        model = LLaMA(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def fingerprint(folder: Path, pieces: int = 16, piece_numbers: int = 32) -> str:
    """sha256 over the config, and each tensor's name, shape, dtype and a sample of its numbers.

    It reads ``pieces`` runs of ``piece_numbers`` numbers of each tensor, so 100 GB take seconds. How the tensors are
    spread over files does not matter, nor does the model's name.
    """
    config = {**asdict(load_config(folder)), "name": None}
    if not config["bias"]:
        del config["bias"]  # so that what was trained before the field existed still finds its base
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path)) for path in shard_files(folder)]
        where = {name: file for file in files for name in file.keys()}
        for name in sorted(where):
            tensor = where[name].get_tensor(name)  # memory-mapped: only what is sampled below is read
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.flatten()
            for i in range(pieces):
                start = i * max(0, flat.numel() - piece_numbers) // max(1, pieces - 1)
                digest.update(flat[start : start + piece_numbers].float().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- trained folders

TRAINED_FILE, METHOD_FILE = "trained.safetensors", "method.json"


def trained_tensors(model: LLaMA) -> dict[str, Tensor]:
    """What trains, by name: freeze first, then add, and nothing else is left."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def kept_tensors(model: LLaMA) -> dict[str, Tensor]:
    """What a trained folder holds, by name: what trains, or what is made of it (methods/prefix.py)."""
    return trained_tensors(model) if model.reparametrization is None else model.reparametrization.kept_tensors()


def describe_base(checkpoint_dir: Path) -> dict:
    """What method.json says of the base a method was trained on."""
    return {
        "checkpoint_dir": str(checkpoint_dir),
        "name": load_config(checkpoint_dir).name,
        "fingerprint": fingerprint(checkpoint_dir),
    }


def load_trained(model: LLaMA, path: Path, prefix: str = "") -> None:
    """Copy the tensors of a safetensors file, those named with ``prefix``, into the trained ones of ``model``.

    UserError, and nothing copied, unless names and shapes are the same.
    """
    tensors = trained_tensors(model)
    with open_tensors(path) as file:
        loaded = {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
    check_tensors(
        {name: tuple(t.shape) for name, t in loaded.items()},
        {name: tuple(t.shape) for name, t in tensors.items()},
        path,
    )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(loaded[name])


def load_trained_folder(
    trained_dir: Path, checkpoint_dir: Path | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[LLaMA, dict]:
    """The base with a finished method on it, and its method.json.

    ``checkpoint_dir`` overrides where the base lies; that it is the same base is checked. A folder that holds a whole
    model needs no base.
    """
    from lit_llama.methods import METHODS

    method, path = read_method(trained_dir), Path(trained_dir) / METHOD_FILE
    if (Path(trained_dir) / MODEL_FILE).exists():  # a checkpoint folder: nothing of the base is left
        return load_model(trained_dir, dtype, device).requires_grad_(False), method
    if method["method"] not in METHODS:
        raise UserError(f"{path} names the method {method['method']!r}, not one of {', '.join(METHODS)}")
    checkpoint_dir = check_base(method["base"], checkpoint_dir, path)
    model = load_model(checkpoint_dir, dtype, device)
    model.requires_grad_(False)
    try:
        METHODS[method["method"]](model, **method["arguments"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: the arguments do not fit {method['method']}: {error}") from None
    if model.reparametrization is not None:
        model.reparametrization.flatten(model)
    load_trained(model, Path(trained_dir) / TRAINED_FILE)
    return model, method


def tokenizer_dir(trained_dir: Path, checkpoint_dir: Path | None, method: dict) -> Path:
    """Where the tokenizer of a trained folder lies: in its base, or in itself where it holds a whole model."""
    whole = (Path(trained_dir) / MODEL_FILE).exists()
    return Path(trained_dir if whole else checkpoint_dir or method["base"]["checkpoint_dir"])


def read_method(trained_dir: Path) -> dict:
    """The method.json of a trained folder."""
    path = Path(trained_dir) / METHOD_FILE
    if not path.exists():
        raise UserError(f"{path} is missing: {trained_dir} is not what a finetune script wrote")
    method = read_json(path)
    if missing := {"method", "arguments", "base", "prompt_style"} - set(method):
        raise UserError(f"{path} lacks {sorted(missing)}")
    return method


def check_base(base: dict, checkpoint_dir: Path | None, path: Path) -> Path:
    """The folder of the base that ``path`` (a method.json) was trained on; UserError when it is another model."""
    folder = Path(checkpoint_dir or base["checkpoint_dir"])
    if not folder.exists():
        raise UserError(f"{path} was trained on {base['name']} in {folder}, which is missing; pass --checkpoint_dir")
    if fingerprint(folder) != base["fingerprint"]:
        raise UserError(
            f"{path} was trained on {base['name']} (fingerprint {base['fingerprint'][:12]}), but {folder} holds "
            f"{load_config(folder).name} ({fingerprint(folder)[:12]}); pass the right --checkpoint_dir"
        )
    return folder
