"""Checkpoint folders: a whole model in ``model.safetensors`` or shards, its ``config.json`` and its tokenizer."""

import hashlib
import json
import math
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.common.errors import UserError
from lit_llama.common.files import open_tensors, read_json, read_tensors, tensor_headers
from lit_llama.model import LLaMA, LLaMAConfig

CONFIG_FILE, MODEL_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"


def check_format(folder: Path | str) -> None:
    """Raises UserError if ``folder`` is a GGUF file or a Hugging Face folder, which must be converted first."""
    folder = Path(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        kind, name = "GGUF file", folder.stem
    elif (folder / CONFIG_FILE).exists() and {"model_type", "architectures"} & set(read_json(folder / CONFIG_FILE)):
        kind, name = "Hugging Face folder", folder.resolve().name
    else:
        return
    raise UserError(
        f"{folder} is a {kind}; convert it first: "
        f"python scripts/convert.py --source {folder} --out_dir checkpoints/{name}"
    )


def load_config(folder: Path | str) -> LLaMAConfig:
    """The config of a checkpoint folder. Raises UserError if its config.json is not one of this project."""
    check_format(folder)
    path = Path(folder) / CONFIG_FILE
    content = read_json(path)
    known = {field.name for field in fields(LLaMAConfig)}
    content.setdefault("bias", False)  # folders written before the field existed lack it
    if wrong := known ^ set(content):
        raise UserError(
            f"{path} is not a config of this project: missing or unknown are {', '.join(sorted(wrong))}; convert the "
            "checkpoint with scripts/convert.py"
        )
    for name in ("norm_eps", "rope_base"):
        if not isinstance(content[name], int | float) or not 0 < content[name] < math.inf:
            raise UserError(f"{path}: {name} must be a number above 0, got {content[name]!r}")
    try:
        return LLaMAConfig(**content)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def tensor_shapes(config: LLaMAConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint. A tied head is stored once, as the embedding."""
    with torch.device("meta"):
        state = LLaMA(config).state_dict()
    if config.tie_embeddings:
        del state["lm_head.weight"]
    return shapes_of(state)


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: Path) -> None:
    """Raises UserError unless names and shapes are equal."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{repr(name)[1:-1]} is not expected" for name in found if name not in expected]  # it may hold a newline
    wrong += [
        f"{name} has shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        raise UserError(f"{where} does not fit the model: {'; '.join(wrong[:3])} ({len(wrong)} differences in all)")


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    index = Path(folder) / INDEX_FILE
    return shard_files(index) if index.exists() else [Path(folder) / MODEL_FILE]


def shard_files(index: Path) -> list[Path]:
    """The files in an index. Raises UserError for a file outside the index's folder."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or name == ".." or Path(name).name != name for name in names):
        raise UserError(f"{index} must map tensors to file names of its own folder")
    return [index.parent / name for name in sorted(set(names))]


def check_headers(
    headers: dict[str, tuple[tuple[int, ...], str]],
    shapes: dict[str, tuple[int, ...]],
    dtypes: tuple[str, ...],
    where: Path,
) -> None:
    """Raises UserError unless ``headers`` hold these names and shapes, and only ``dtypes`` (safetensors' names)."""
    check_tensors({name: shape for name, (shape, _) in headers.items()}, shapes, where)
    for name, (_, dtype) in headers.items():
        if dtype not in dtypes:
            raise UserError(f"{where}: {name} has dtype {dtype}, not {' or '.join(dtypes)}; convert the weights again")


def load_model(
    folder: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    sharded: bool = False,
) -> LLaMA:
    """The model of a checkpoint folder, in ``dtype`` (None: as stored) on ``device``.

    Loading needs memory for one extra tensor. On the CPU, tensors stored in ``dtype`` stay memory-mapped and are not
    copied. With ``sharded`` all tensors stay memory-mapped: devices/blocks.py casts and moves them block by block.
    Raises UserError if the weights do not fit the config.
    """
    if sharded:
        dtype, device = None, "cpu"
    config, files = load_config(folder), weight_files(folder)
    headers = {name: header for path in files for name, header in tensor_headers(path).items()}
    check_headers(headers, tensor_shapes(config), ("F32", "BF16", "F16"), Path(folder))
    state: dict[str, Tensor] = {}
    for path in files:
        tensors, _ = read_tensors(path)
        state.update({name: tensor.to(device).to(dtype or tensor.dtype) for name, tensor in tensors.items()})
    if config.tie_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    with torch.device("meta"):
        model = LLaMA(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def fingerprint(folder: Path | str) -> str:
    """sha256 of the config, and of each tensor's name, shape, dtype and 16 slices of 32 values: 100 GB take seconds.

    The model's name and the division into files do not matter.
    """
    config = {**asdict(load_config(folder)), "name": None}
    if not config["bias"]:
        del config["bias"]  # so that fingerprints from before the field existed stay valid
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path)) for path in weight_files(folder)]
        where = {name: file for file in files for name in file.keys()}
        for name in sorted(where):
            tensor = where[name].get_tensor(name)  # memory-mapped: only what is sampled below is read
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.flatten()
            for i in range(16):
                start = i * max(0, flat.numel() - 32) // 15
                digest.update(flat[start : start + 32].float().numpy().tobytes())
    return digest.hexdigest()
