"""Convert checkpoints of Hugging Face and Meta. GGUF files: gguf.py.

Each format has a column of names in layouts.py and a generator of (name, tensor). ``write_model`` renames and casts the
tensors, fuses q, k and v, and writes them as they come. ``save_checkpoint`` checks names and shapes against the config.
"""

import math
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.checkpoint import shard_files, tensor_shapes
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json, read_tensors, whole_folder, write_json
from lit_llama.configs import CONFIGS, LLAMA_31_SCALING
from lit_llama.devices.launch import Bar
from lit_llama.formats.layouts import CONFIG_NAMES, INTERLEAVED, layer_names, to_half_split
from lit_llama.formats.shards import save_checkpoint
from lit_llama.model import CausalSelfAttention, LLaMAConfig
from lit_llama.tokenizer import GENERATION_FILE, JSON_FILE, SENTENCEPIECE_FILE, Tokenizer, copy_tokenizer

NamedTensors = Iterator[tuple[str, Tensor]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPUTED = ("rotary_emb.inv_freq", "rope.freqs", "rope_freqs.weight")  # tables that the model computes itself


def write_model(
    folder: Path, config: LLaMAConfig, tensors: NamedTensors, source_format: str, dtype: str | None
) -> None:
    """Write ``tensors``, named as in ``source_format`` (one of FORMATS), to ``folder``. ``dtype`` None keeps each's."""
    renamed = rename(tensors, source_format, config, dtype)
    fused = add_biases(fuse_qkv(renamed, config, source_format in INTERLEAVED), config)
    total = len(tensor_shapes(config))
    save_checkpoint(folder, config, Bar(total, "converting", iterable=drop_tied_head(fused, config)))


def rename(tensors: NamedTensors, source_format: str, config: LLaMAConfig, dtype: str | None) -> NamedTensors:
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
        yield f"{names[layer]}.{kind}", tensor.to(DTYPES[dtype]) if dtype else tensor


def fuse_qkv(tensors: NamedTensors, config: LLaMAConfig, interleaved: bool) -> NamedTensors:
    """Fuse attn.q, attn.k and attn.v into attn.c_attn as soon as all three of a layer have arrived."""
    with torch.device("meta"):
        slices = CausalSelfAttention(config).qkv_slices
    waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        layer, _, kind = name.rpartition(".")
        attn, _, part = layer.rpartition(".")
        if part not in slices:
            yield name, tensor
            continue
        shape = (slices[part].stop - slices[part].start, config.n_embd)[: tensor.dim()]
        if tensor.shape != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)} instead of {shape}")
        fused = f"{attn}.c_attn.{kind}"
        waiting[fused][part] = to_half_split(tensor, config.head_size) if interleaved and part != "v" else tensor
        if len(waiting[fused]) == len(slices):
            parts = waiting.pop(fused)
            yield fused, torch.cat([parts[part] for part in slices])  # (q, k, v rows, C)


def add_biases(tensors: NamedTensors, config: LLaMAConfig) -> NamedTensors:
    """If only some layers have biases, the others get zeros: a model here has them on all layers or none."""
    missing = {name: shape for name, shape in tensor_shapes(config).items() if name.endswith(".bias")}
    dtype = torch.float32
    for name, tensor in tensors:
        missing.pop(name, None)
        dtype = tensor.dtype
        yield name, tensor
    yield from ((name, torch.zeros(shape, dtype=dtype)) for name, shape in missing.items())


def drop_tied_head(tensors: NamedTensors, config: LLaMAConfig) -> NamedTensors:
    """Leave out the head of a tied model. Raises UserError if the head differs from the embedding."""
    tied = []
    for name, tensor in tensors:
        if config.tie_embeddings and name in ("transformer.wte.weight", "lm_head.weight"):
            tied.append(tensor)
        if name != "lm_head.weight" or not config.tie_embeddings:
            yield name, tensor
    if len(tied) == 2 and not torch.equal(*tied):
        raise UserError(f"{config.name} is tied by its config, but its head differs from its embedding: it is untied")


def load_foreign(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .bin file, memory-mapped if its format allows. Nothing in it is run."""
    if path.suffix == ".safetensors":
        return read_tensors(path, foreign=True)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(f"{path} cannot be read as tensors, and nothing in it was run: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path} must hold a dict of tensors and nothing else; save model.state_dict() alone")
    return content


@contextmanager
def config_errors(path: Path) -> Iterator[None]:
    """Raises UserError instead of what wrong values in another project's config, at ``path``, can raise."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} lacks {error}") from None
    except (AttributeError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} cannot be converted: {reason}") from None


# ---------------------------------------------------------------------------------------------- Hugging Face


def convert_hf(
    source: Path, out_dir: Path, name: str | None = None, dtype: str | None = None, tokenizer: Path | None = None
) -> None:
    """Convert a Hugging Face folder of a LlamaForCausalLM: safetensors or .bin, in one file or several."""
    config = hf_config(source / "config.json", name or source.resolve().name)
    with whole_folder(out_dir) as folder:
        tensors = (item for path in hf_files(source) for item in load_foreign(path).items())
        copy_tokenizer(tokenizer or source, folder)
        eos = read_json(source / "config.json").get("eos_token_id")
        if eos is not None and not (folder / GENERATION_FILE).exists():
            write_json(folder / GENERATION_FILE, {"eos_token_id": eos})
        write_model(folder, config, tensors, "hf", dtype)
        if any((folder / name).exists() for name in (JSON_FILE, SENTENCEPIECE_FILE)):
            Tokenizer(folder)  # raises if it does not fit the model


# For each type of rotary scaling, its fields that the model here has.
ROPE_TYPES: dict[str, list[str]] = {"default": [], "linear": ["factor"], "llama3": list(LLAMA_31_SCALING)}
SUPPORTED: dict[str, list] = {  # settings of config.json that the model here has with these values only
    "model_type": ["llama", "mistral"],
    "hidden_act": [None, "silu"],
    "rope_type": list(ROPE_TYPES),
    "partial_rotary_factor": [None, 1.0],
    "sliding_window": [None],
    "quantization_config": [None],
}


def hf_config(path: Path, name: str) -> LLaMAConfig:
    """Read LlamaForCausalLM's config.json. Raises UserError for a setting that the model here does not have."""
    raw = read_json(path)
    with config_errors(path):
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        given = {key: value for part in (raw, rope) for key, value in part.items() if value is not None}
        if raw.get("model_type") == "mistral" and "sliding_window" not in raw:
            given["sliding_window"] = 4096  # MistralConfig's default
        given["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        if given["rope_type"] == "default" and set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
            raise ValueError(f"the rotary embedding {rope} is not supported")
        if given.get("sliding_window", 0) >= given.get("max_position_embeddings", math.inf):
            given.pop("sliding_window", None)  # as long as the context, it hides nothing
        for key, known in SUPPORTED.items():
            if given.get(key) not in known:
                raise ValueError(f"{key} {given.get(key)!r} is not supported; a plain LLaMA has one of {known}")
        # Numbers get the types of LLAMA_31_SCALING, so that equal configs compare equal.
        scaling = {key: type(LLAMA_31_SCALING[key])(rope[key]) for key in ROPE_TYPES[given["rope_type"]]}
        n_head = given["num_attention_heads"]
        defaults = {"num_key_value_heads": n_head, "head_dim": given["hidden_size"] // n_head, "rope_theta": 10000.0}
        values = defaults | given
        values |= {key: float(values[key]) for key in ("rms_norm_eps", "rope_theta")}
        return LLaMAConfig(
            name=name,
            rope_scaling=scaling or None,
            tie_embeddings=bool(given.get("tie_word_embeddings")),
            bias=bool(given.get("attention_bias") or given.get("mlp_bias")),
            **{ours: values[theirs] for ours, theirs, _ in CONFIG_NAMES},
        )


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
) -> None:
    """Convert a folder with Meta's consolidated.*.pth and params.json.

    ``name`` is one of CONFIGS: params.json has neither the context length nor the factor of the rotary scaling.
    """
    if name not in CONFIGS:
        raise UserError(f"--name {name!r} is unknown; Meta's folder needs one of: {', '.join(CONFIGS)}")
    config = LLaMAConfig.from_name(name)
    check_params(source / "params.json", config)
    above = source.resolve().parent
    if (above / SENTENCEPIECE_FILE).exists() and not any(source.glob("tokenizer.*")):  # as LLaMA 1 came
        tokenizer = tokenizer or above
    with whole_folder(out_dir) as folder:
        copy_tokenizer(tokenizer or source, folder)
        write_model(folder, config, meta_tensors(source, config.vocab_size), "meta", dtype)


def check_params(path: Path, config: LLaMAConfig) -> None:
    """Raises UserError if Meta's params.json is another model's. The tensors' shapes show the other sizes."""
    params = read_json(path)
    ours = {"dim": config.n_embd, "n_layers": config.n_layer, "n_heads": config.n_head, "norm_eps": config.norm_eps}
    ours |= {"rope_theta": config.rope_base, "use_scaled_rope": config.rope_scaling is not None}
    theirs = {"rope_theta": 10000.0, "use_scaled_rope": False, **params}  # LLaMA 1 and 2 have no such entries
    if wrong := [f"{key} is {theirs.get(key)}, not {value}" for key, value in ours.items() if theirs.get(key) != value]:
        raise UserError(f"{path} is not {config.name}'s: {'; '.join(wrong)}; pass the --name of this model")


def meta_tensors(folder: Path, vocab_size: int) -> NamedTensors:
    """Join the model-parallel shards tensor by tensor. The files are memory-mapped."""
    shards = [load_foreign(path) for path in sorted(folder.glob("consolidated.*.pth"))]
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
