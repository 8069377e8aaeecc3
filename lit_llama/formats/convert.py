"""Convert checkpoints of Hugging Face and Meta. GGUF files: convert_gguf.py.

Each format has a column of names in layouts.py and a generator of (name, tensor). ``write_model`` renames and casts the
tensors, fuses q, k and v, and writes them as they come. ``save_checkpoint`` checks names and shapes against the config.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.checkpoint import shard_files, tensor_shapes
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json, read_tensors, whole_folder, write_json
from lit_llama.configs import CONFIGS, LLAMA_31_SCALING
from lit_llama.devices.launch import Bar
from lit_llama.formats.layouts import CONFIG_NAMES, layer_names, to_half_split
from lit_llama.formats.shards import save_checkpoint
from lit_llama.model import CausalSelfAttention, LLaMAConfig
from lit_llama.tokenizer import GENERATION_FILE, JSON_FILE, SENTENCEPIECE_FILE, Tokenizer, copy_tokenizer

Tensors = Iterable[tuple[str, Tensor]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPUTED = ("rotary_emb.inv_freq", "rope.freqs", "rope_freqs.weight")  # tables that the model computes itself


def write_model(
    folder: Path, config: LLaMAConfig, tensors: Tensors, source_format: str, dtype: str | None, interleaved: bool = True
) -> None:
    """Write ``tensors``, named as in ``source_format`` (one of FORMATS), to ``folder``.

    ``dtype`` None keeps each tensor's. ``interleaved`` says how the rows of q and k are ordered, see layouts.py.
    """
    renamed = rename(tensors, source_format, config, dtype)
    fused = add_biases(fuse_qkv(renamed, config, interleaved), config)
    total = len(tensor_shapes(config))
    save_checkpoint(folder, config, Bar(total, "converting", iterable=drop_tied_head(fused, config)))


def rename(
    tensors: Tensors, source_format: str, config: LLaMAConfig, dtype: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Our names, and ``dtype``. Raises UserError for a tensor that is quantized or not a LLaMA's."""
    names = layer_names(source_format, "ours", config.n_layer)
    for name, tensor in tensors:
        if name.endswith(COMPUTED):
            continue
        layer, _, kind = name.rpartition(".")
        if layer not in names or kind != "weight" and not (kind == "bias" and config.bias):
            raise UserError(f"tensor {name} has no place in a LLaMA of {config.n_layer} layers; is it another model?")
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{name} has dtype {tensor.dtype}, not one of {', '.join(DTYPES)}: is the file quantized?")
        yield f"{names[layer]}.{kind}", tensor.to(DTYPES.get(dtype or "", tensor.dtype))


def fuse_qkv(tensors: Tensors, config: LLaMAConfig, interleaved: bool) -> Iterator[tuple[str, Tensor]]:
    """Fuse attn.q, attn.k and attn.v into attn.c_attn as soon as all three of a layer have arrived."""
    with torch.device("meta"):
        slices = CausalSelfAttention(config).qkv_slices
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        layer, _, kind = name.rpartition(".")
        attn, _, part = layer.rpartition(".")
        if part not in slices:
            yield name, tensor
            continue
        shape = (slices[part].stop - slices[part].start, config.n_embd)[: tensor.dim()]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)} instead of {shape}")
        parts = waiting.setdefault(f"{attn}.c_attn.{kind}", {})
        parts[part] = to_half_split(tensor, shape[0] // config.head_size) if interleaved and part != "v" else tensor
        if len(parts) == len(slices):
            yield f"{attn}.c_attn.{kind}", torch.cat([parts[part] for part in slices])  # (q, k, v rows, C)
            del waiting[f"{attn}.c_attn.{kind}"]
    for fused, parts in waiting.items():
        missing = fused.replace("c_attn", min(set(slices) - set(parts)))
        raise UserError(f"{missing} is missing: the checkpoint is not complete")


def add_biases(tensors: Tensors, config: LLaMAConfig) -> Iterator[tuple[str, Tensor]]:
    """If only some layers have biases, the others get zeros: a model here has them on all layers or none."""
    missing = {name: shape for name, shape in tensor_shapes(config).items() if name.endswith(".bias")}
    dtype = torch.float32
    for name, tensor in tensors:
        missing.pop(name, None)
        dtype = tensor.dtype
        yield name, tensor
    yield from ((name, torch.zeros(shape, dtype=dtype)) for name, shape in missing.items())


def drop_tied_head(tensors: Tensors, config: LLaMAConfig) -> Iterator[tuple[str, Tensor]]:
    """Leave out the head of a tied model. Raises UserError if the head differs from the embedding."""
    tied = {}
    for name, tensor in tensors:
        if config.tie_embeddings and name in ("transformer.wte.weight", "lm_head.weight"):
            tied[name] = tensor
        if name != "lm_head.weight" or not config.tie_embeddings:
            yield name, tensor
    if len(tied) == 2 and not torch.equal(*tied.values()):
        raise UserError(f"{config.name} is tied by its config, but its head differs from its embedding: it is untied")


def load_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .bin file, memory-mapped if its format allows. Nothing in the file is run."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(f"{path} is not a plain file of tensors, and nothing in it was run: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path} must hold a dict of tensors and nothing else; save model.state_dict() alone")
    return content


# ---------------------------------------------------------------------------------------------- Hugging Face


def convert_hf(
    source: Path, out_dir: Path, name: str | None = None, dtype: str | None = None, tokenizer: Path | None = None
) -> LLaMAConfig:
    """Convert a Hugging Face folder of a LlamaForCausalLM: safetensors or .bin, in one file or several."""
    config = hf_config(source / "config.json", name or source.resolve().name)
    with whole_folder(out_dir) as folder:
        copy_tokenizer(tokenizer or source, folder)
        keep_eos(source / "config.json", folder)
        write_model(folder, config, hf_tensors(source), "hf", dtype, interleaved=False)
        if any((folder / name).exists() for name in (JSON_FILE, SENTENCEPIECE_FILE)):
            Tokenizer(folder)  # raises if it does not fit the model
    return config


def keep_eos(config_file: Path, folder: Path) -> None:
    """Write the end-of-sequence ids of config.json to generation_config.json, unless that file exists."""
    eos = read_json(config_file).get("eos_token_id")
    if eos is not None and not (folder / GENERATION_FILE).exists():
        write_json(folder / GENERATION_FILE, {"eos_token_id": eos})


def hf_config(path: Path, name: str) -> LLaMAConfig:
    """Read LlamaForCausalLM's config.json. Raises UserError for a setting that the model here does not have."""
    raw = read_json(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: the rope parameters are {rope!r}, not an object")
    given = {**rope, **raw, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    if (given.get("sliding_window") or 0) >= (given.get("max_position_embeddings") or math.inf):
        del given["sliding_window"]  # as long as the context, it hides nothing
    supported: dict[str, list] = {"model_type": ["llama", "mistral"], "hidden_act": [None, "silu"]}
    supported |= {"rope_type": ["default", "linear", "llama3"], "partial_rotary_factor": [None, 1.0]}
    supported |= {"sliding_window": [None], "quantization_config": [None]}
    for key, known in supported.items():
        if given.get(key) not in known:
            raise UserError(f"{path}: {key} {given.get(key)!r} is not supported; a plain LLaMA has one of {known}")
    try:
        n_head = raw["num_attention_heads"]
        defaults = {"num_key_value_heads": n_head, "head_dim": raw["hidden_size"] // n_head, "rope_theta": 10000.0}
        values = defaults | {key: value for key, value in {**rope, **raw}.items() if value is not None}
        values |= {key: float(values[key]) for key in ("rms_norm_eps", "rope_theta")}
        return LLaMAConfig(
            name=name,
            rope_scaling=hf_rope_scaling(rope, given["rope_type"]),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            bias=bool(raw.get("attention_bias") or raw.get("mlp_bias")),
            **{ours: values[theirs] for ours, theirs, _ in CONFIG_NAMES},
        )
    except KeyError as error:
        raise UserError(f"{path} lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}") from None


def hf_rope_scaling(rope: dict, rope_type: str) -> dict | None:
    """Llama 3.1's rotary scaling, or a linear one.

    Numbers get the types of LLAMA_31_SCALING, so that equal configs compare equal.
    """
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    scaling = {key: type(LLAMA_31_SCALING.get(key, ""))(rope[key]) for key in rope if key not in known}
    if scaling and rope_type == "default":
        raise ValueError(f"rope parameters {sorted(scaling)} are not supported without rope_type 'llama3'")
    if rope_type == "linear":
        return {"factor": float(rope["factor"])}
    if rope_type == "llama3" and len(scaling) < len(LLAMA_31_SCALING):
        raise ValueError(f"rope_type 'llama3' needs {', '.join(LLAMA_31_SCALING)}")
    return None if rope_type == "default" else scaling  # LLaMAConfig accepts the four known fields only


def hf_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in hf_files(folder):
        tensors = read_tensors(path, foreign=True)[0] if path.suffix == ".safetensors" else load_pth(path)
        yield from tensors.items()


def hf_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder. Safetensors are preferred to .bin."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            return shard_files(index)
        if (folder / single).exists():
            return [folder / single]
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin, whole or with an index")


# ---------------------------------------------------------------------------------------------- Meta


def convert_meta(
    source: Path, out_dir: Path, name: str, dtype: str | None = None, tokenizer: Path | None = None
) -> LLaMAConfig:
    """Convert a folder with Meta's consolidated.*.pth and params.json.

    ``name`` is one of CONFIGS: params.json has neither the context length nor the factor of the rotary scaling.
    """
    config = named_config(name)
    check_params(source / "params.json", config)
    with whole_folder(out_dir) as folder:
        copy_tokenizer(tokenizer or find_tokenizer(source), folder)
        write_model(folder, config, meta_tensors(source, config.vocab_size), "meta", dtype)
    return config


def named_config(name: str) -> LLaMAConfig:
    if name not in CONFIGS:
        raise UserError(f"--name {name!r} is unknown; this format needs one of: {', '.join(CONFIGS)}")
    return LLaMAConfig.from_name(name)


def find_tokenizer(folder: Path) -> Path:
    """LLaMA 1 has tokenizer.model one folder above the weights."""
    above = folder.resolve().parent
    return above if (above / "tokenizer.model").exists() and not any(folder.glob("tokenizer.*")) else folder


def check_params(path: Path, config: LLaMAConfig) -> None:
    """Raises UserError if Meta's params.json is another model's. The tensors' shapes show the other sizes."""
    params = read_json(path)
    ours = {"dim": config.n_embd, "n_layers": config.n_layer, "n_heads": config.n_head, "norm_eps": config.norm_eps}
    ours |= {"rope_theta": config.rope_base, "use_scaled_rope": config.rope_scaling is not None}
    theirs = {"rope_theta": 10000.0, "use_scaled_rope": False, **params}  # LLaMA 1 and 2 have no such entries
    if wrong := [f"{key} is {theirs.get(key)}, not {value}" for key, value in ours.items() if theirs.get(key) != value]:
        raise UserError(f"{path} is not {config.name}'s: {'; '.join(wrong)}; pass the --name of this model")


def meta_tensors(folder: Path, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Join the model-parallel shards tensor by tensor. The files are memory-mapped."""
    shards = [load_pth(path) for path in sorted(folder.glob("consolidated.*.pth"))]
    if not shards:
        raise UserError(f"{folder} holds no consolidated.*.pth")
    for name, first in shards[0].items():
        by_columns = name.endswith((".wo.weight", ".w2.weight"))
        if name == "tok_embeddings.weight":  # LLaMA 1 and 2 split it by columns, Llama 3 by rows
            by_columns = first.shape[:1] == (vocab_size,)
        try:  # norms are the same in all shards
            yield name, torch.cat([shard[name] for shard in shards], int(by_columns)) if first.dim() == 2 else first
        except (RuntimeError, KeyError) as error:
            raise UserError(f"the parts of {name} in {folder} do not fit together: {error}") from None
