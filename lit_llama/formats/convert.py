"""Other projects' checkpoints -> this project's: Hugging Face, Meta and the original Lit-LLaMA (GGUF: convert_gguf.py).

Each format is a column of names (layouts.py) and a generator of (name, tensor); from there one pipeline renames, casts,
joins q, k, v into the fused projection, and writes as it goes. ``save_checkpoint`` holds the result against the config:
no tensor missing, none left over, every shape right. Pickles are read by ``torch.load(weights_only=True)`` alone.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.bars import track
from lit_llama.checkpoint import save_checkpoint, shard_files, tensor_shapes
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json, read_tensors, whole_folder
from lit_llama.configs import CONFIGS, LLAMA_31_SCALING
from lit_llama.formats.layouts import layer_names, to_half_split
from lit_llama.model import CausalSelfAttention, LLaMAConfig
from lit_llama.tokenizer import copy_tokenizer

Tensors = Iterable[tuple[str, Tensor]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPUTED = ("rotary_emb.inv_freq", "rope.freqs", "rope_freqs.weight")  # tables that the model makes itself


def write_model(
    folder: Path, config: LLaMAConfig, tensors: Tensors, source_format: str, dtype: str | None, interleaved: bool = True
) -> None:
    """Write the ``tensors`` of one of FORMATS into ``folder`` under our names, in ``dtype`` (None: as they are).

    ``interleaved``: their q and k rows are, and are reordered.
    """
    fused = fuse_qkv(rename(tensors, source_format, config.n_layer, dtype), config, interleaved)
    save_checkpoint(folder, config, track(drop_tied_head(fused, config), len(tensor_shapes(config)), "converting"))


def rename(tensors: Tensors, source_format: str, n_layer: int, dtype: str | None) -> Iterator[tuple[str, Tensor]]:
    names = layer_names(source_format, "ours", n_layer)
    table = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in names.items()}
    for name, tensor in tensors:
        if name.endswith(COMPUTED):
            continue
        if name not in table:
            raise UserError(f"tensor {name} has no place in a LLaMA of {n_layer} layers; is it another model?")
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{name} has dtype {tensor.dtype}, not one of {', '.join(DTYPES)}: is the file quantized?")
        yield table[name], tensor.to(DTYPES.get(dtype or "", tensor.dtype))


def fuse_qkv(tensors: Tensors, config: LLaMAConfig, interleaved: bool) -> Iterator[tuple[str, Tensor]]:
    """Join attn.q, attn.k, attn.v into attn.c_attn; parts wait here until those of their layer are complete."""
    with torch.device("meta"):
        slices = CausalSelfAttention(config).qkv_slices
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        attn, _, part = name.removesuffix(".weight").rpartition(".")
        if part not in slices:
            yield name, tensor
            continue
        shape = (slices[part].stop - slices[part].start, config.n_embd)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)} instead of {shape}")
        parts = waiting.setdefault(attn, {})
        if part in parts:
            raise UserError(f"tensor {name} comes twice")
        parts[part] = to_half_split(tensor, shape[0] // config.head_size) if interleaved and part != "v" else tensor
        if len(parts) == len(slices):
            yield f"{attn}.c_attn.weight", torch.cat([parts[part] for part in slices])  # (q, k, v rows, C)
            del waiting[attn]
    for attn, parts in waiting.items():
        raise UserError(f"{attn}.{min(set(slices) - set(parts))} is missing: the checkpoint is not complete")


def drop_tied_head(tensors: Tensors, config: LLaMAConfig) -> Iterator[tuple[str, Tensor]]:
    """Leave out the head of a tied model, which is stored once; UserError where it is not the embedding after all."""
    pair = {}
    for name, tensor in tensors:
        if config.tie_embeddings and name in ("transformer.wte.weight", "lm_head.weight"):
            pair[name] = tensor
        if name not in pair or name != "lm_head.weight":
            yield name, tensor
    if len(pair) == 2:
        head, wte = pair["lm_head.weight"], pair["transformer.wte.weight"]
        if head.shape != wte.shape or not bool((head == wte).all()):
            raise UserError(f"{config.name} is tied by its config, but its head is not its embedding: it is untied")


def load_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .bin file, memory-mapped where its format allows. Nothing in the file is run."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged or hostile pickle raises
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(f"{path} is not a plain file of tensors, and nothing in it was run: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path} must hold a dict of tensors and nothing else; save model.state_dict() alone")
    return content


# ---------------------------------------------------------------------------------------------- Hugging Face


def convert_hf(
    source: Path, out_dir: Path, name: str | None = None, dtype: str | None = None, tokenizer: Path | None = None
) -> LLaMAConfig:
    """A folder of the Hugging Face hub (LlamaForCausalLM, safetensors or .bin, sharded or not) -> ``out_dir``."""
    source = Path(source)
    with whole_folder(out_dir) as folder:
        config = hf_config(source / "config.json", name or source.resolve().name)
        copy_tokenizer(Path(tokenizer or source), folder)
        write_model(folder, config, hf_tensors(source), "hf", dtype, interleaved=False)
    return config


def hf_config(path: Path, name: str) -> LLaMAConfig:
    """LlamaForCausalLM's config.json -> our config; UserError for what the model does not know."""
    raw = read_json(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: the rope parameters are {rope!r}, not an object")
    says = {**rope, **raw, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    supported: dict[str, list] = {"model_type": ["llama"], "hidden_act": [None, "silu"]}
    supported |= {"rope_type": ["default", "llama3"], "partial_rotary_factor": [None, 1.0], "sliding_window": [None]}
    supported |= {"quantization_config": [None], "attention_bias": [None, False], "mlp_bias": [None, False]}
    for key, values in supported.items():
        if says.get(key) not in values:
            raise UserError(f"{path}: {key} {says.get(key)!r} is not supported; a plain LLaMA has one of {values}")
    try:
        n_head, n_embd = raw["num_attention_heads"], raw["hidden_size"]
        return LLaMAConfig(
            name=name,
            block_size=raw["max_position_embeddings"],
            vocab_size=raw["vocab_size"],
            n_layer=raw["num_hidden_layers"],
            n_head=n_head,
            n_kv_head=raw.get("num_key_value_heads") or n_head,
            n_embd=n_embd,
            head_size=raw.get("head_dim") or n_embd // n_head,
            intermediate_size=raw["intermediate_size"],
            norm_eps=float(raw["rms_norm_eps"]),
            rope_base=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),  # 2023's configs leave it out
            rope_scaling=hf_rope_scaling(rope, says["rope_type"]),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise UserError(f"{path} lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}") from None


def hf_rope_scaling(rope: dict, rope_type: str) -> dict | None:
    """Llama 3.1's rotary scaling, in LLAMA_31_SCALING's types so that equal configs are equal."""
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    given = {key: value for key, value in rope.items() if key not in known}
    if given and rope_type == "default":
        raise ValueError(f"rope parameters {sorted(given)} are not supported without rope_type 'llama3'")
    scaling = {key: type(LLAMA_31_SCALING.get(key, ""))(value) for key, value in given.items()}
    return None if rope_type == "default" else scaling  # LLaMAConfig refuses any but the four fields


def hf_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, safetensors before .bin."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            return shard_files(index)
        if (folder / single).exists():
            return [folder / single]
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin, whole or with an index")


def hf_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in hf_files(folder):
        tensors = read_tensors(path, foreign=True)[0] if path.suffix == ".safetensors" else load_pth(path)
        yield from tensors.items()


# ---------------------------------------------------------------------------------------------- Meta


def convert_meta(
    source: Path, out_dir: Path, name: str, dtype: str | None = None, tokenizer: Path | None = None
) -> LLaMAConfig:
    """A folder of consolidated.*.pth with params.json -> ``out_dir``.

    ``name`` is one of CONFIGS: params.json says neither the context's length nor the factor of the rotary scaling.
    """
    source = Path(source)
    with whole_folder(out_dir) as folder:
        config = named_config(name)
        check_params(source / "params.json", config)
        copy_tokenizer(Path(tokenizer or find_tokenizer(source)), folder)
        write_model(folder, config, meta_tensors(source, config.vocab_size), "meta", dtype)
    return config


def named_config(name: str) -> LLaMAConfig:
    if name not in CONFIGS:
        raise UserError(f"--name {name!r} is unknown; this format needs one of: {', '.join(CONFIGS)}")
    return LLaMAConfig.from_name(name)


def find_tokenizer(folder: Path) -> Path:
    """LLaMA 1 and Lit-LLaMA keep tokenizer.model one folder above the weights, beside all sizes."""
    above = folder.resolve().parent
    return above if (above / "tokenizer.model").exists() and not any(folder.glob("tokenizer.*")) else folder


def check_params(path: Path, config: LLaMAConfig) -> None:
    """UserError where Meta's params.json says something else than ``config``."""
    params = read_json(path)
    try:
        hidden = int((params.get("ffn_dim_multiplier") or 1) * int(8 * params["dim"] / 3))
        said = {
            "n_embd": params["dim"],
            "n_layer": params["n_layers"],
            "n_head": params["n_heads"],
            "n_kv_head": params.get("n_kv_heads") or params["n_heads"],
            "norm_eps": params["norm_eps"],
            "rope_base": params.get("rope_theta", 10000.0),  # LLaMA 1 and 2 have no such entry
            "vocab_size": config.vocab_size if params["vocab_size"] == -1 else params["vocab_size"],
            "intermediate_size": -(-hidden // params["multiple_of"]) * params["multiple_of"],  # rounded up
            "use_scaled_rope": bool(params.get("use_scaled_rope")),
        }
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not Meta's params.json: {type(error).__name__} {error}") from None
    known = {**asdict(config), "use_scaled_rope": config.rope_scaling is not None}
    wrong = [f"{key} is {value}, not {known[key]}" for key, value in said.items() if value != known[key]]
    if wrong:
        raise UserError(f"{path} is not {config.name}'s: {'; '.join(wrong)}; pass the --name of the model it is of")


def meta_tensors(folder: Path, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Join the model-parallel shards tensor by tensor; they are memory-mapped, so one tensor's parts are in memory."""
    shards = [load_pth(path) for path in sorted(folder.glob("consolidated.*.pth"))]
    if not shards:
        raise UserError(f"{folder} holds no consolidated.*.pth")
    if any(set(shard) != set(shards[0]) for shard in shards):
        raise UserError(f"the consolidated.*.pth files of {folder} hold different tensors; are they of one model?")
    for name, first in shards[0].items():
        columns = name.endswith((".wo.weight", ".w2.weight"))
        if name == "tok_embeddings.weight":  # LLaMA 1 and 2 cut its columns, Llama 3 its rows
            columns = first.shape[:1] == (vocab_size,)
        try:
            whole = torch.cat([shard[name] for shard in shards], int(columns)) if first.dim() == 2 else first
        except RuntimeError as error:
            raise UserError(f"the parts of {name} in {folder} do not fit together: {error}") from None
        yield name, whole  # norms are the same in all shards


# ---------------------------------------------------------------------------------------------- Lit-LLaMA


def convert_lit(
    source: Path, out_dir: Path, name: str, dtype: str | None = None, tokenizer: Path | None = None
) -> LLaMAConfig:
    """lit-llama.pth of the original Lit-LLaMA -> ``out_dir``; ``name`` is 7B, 13B, 30B or 65B."""
    with whole_folder(out_dir) as folder:
        config = named_config(name)
        copy_tokenizer(Path(tokenizer or find_tokenizer(source.parent)), folder)
        write_model(folder, config, lit_tensors(source, config.vocab_size), "ours", dtype)
    return config


def lit_tensors(path: Path, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Take q, k and v apart again (their rows are interleaved) and cut the rows that pad the vocabulary."""
    padded = -(-vocab_size // 64) * 64
    for name, tensor in load_pth(path).items():
        if name.endswith("attn.c_attn.weight") and tensor.dim() == 2:  # (3C, C)
            yield from zip((name.replace("c_attn", part) for part in "qkv"), tensor.chunk(3), strict=True)
        else:
            is_padded = name in ("transformer.wte.weight", "lm_head.weight") and tensor.shape[:1] == (padded,)
            yield name.replace(".scale", ".weight"), tensor[:vocab_size] if is_padded else tensor
