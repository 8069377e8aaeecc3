"""Write the weights of a checkpoint folder: one model.safetensors, or numbered shards with an index.

Tensors may come from a generator that reads and converts them: at most one shard is in memory.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from lit_llama.checkpoint import CONFIG_FILE, INDEX_FILE, MODEL_FILE, check_tensors, shapes_of, tensor_shapes
from lit_llama.common.errors import UserError
from lit_llama.common.files import save_tensors, write_json
from lit_llama.model import LLaMAConfig

SHARD_BYTES = 4 * 2**30


def save_checkpoint(
    folder: Path, config: LLaMAConfig, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write weights and config.json to ``folder``. Raises UserError if they do not fit each other."""
    found = write_shards(Path(folder), tensors, shard_bytes)
    check_tensors(found, tensor_shapes(config), folder)
    write_json(Path(folder) / CONFIG_FILE, asdict(config))


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES, foreign: bool = False
) -> dict[str, tuple[int, ...]]:
    """Write tensors to one file, or to shards with an index. Returns their shapes.

    ``foreign``: for other programs, see ``save_tensors``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    total_bytes = 0
    names: list[list[str]] = []  # tensor names, one list per part
    for shard in split_by_bytes(tensors, shard_bytes):
        save_tensors(folder / f"part-{len(names)}", shard, foreign=foreign)
        shapes |= shapes_of(shard)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        names.append(list(shard))
    weight_map: dict[str, str] = {}
    for i, own in enumerate(names):
        file = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" if len(names) > 1 else MODEL_FILE
        os.replace(folder / f"part-{i}", folder / file)
        weight_map |= dict.fromkeys(own, file)
    if len(names) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return shapes


def split_by_bytes(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors, each of at most ``shard_bytes`` or one tensor. A group is emptied once it has been used."""
    shard: dict[str, Tensor] = {}
    seen, size = set(), 0
    for name, tensor in tensors:
        if name in seen:
            raise UserError(f"tensor {name} appears twice")
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard.clear()
            size = 0
        seen.add(name)
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
