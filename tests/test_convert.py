"""Hugging Face and Meta checkpoints against transformers on the same weights, and what must be refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import (
    HF_TINY,
    HIDDEN,
    VOCAB,
    C,
    check_logits,
    foreign_state,
    refuse,
    refused,
    succeed,
    tiny_hf,
    write_tokenizer,
)
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lit_llama.checkpoint import load_config
from lit_llama.common.files import read_json, write_json
from lit_llama.configs import CONFIGS, LLAMA_31_SCALING
from lit_llama.formats.convert import convert_hf, convert_meta
from lit_llama.model import LLaMAConfig


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_hf_safetensors(tmp_path, tied, shard):
    theirs = tiny_hf(tie_word_embeddings=tied)
    theirs.config.eos_token_id = [0, 2]
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1 or shard == "1GB"
    (tmp_path / "hf/generation_config.json").unlink()  # then config.json has the ends of a text
    (tmp_path / "hf/special_tokens_map.json").write_text("{}")
    convert_hf(tmp_path / "hf", tmp_path / "ours")
    assert load_config(tmp_path / "ours") == LLaMAConfig(name="hf", tie_embeddings=tied, **HF_TINY)
    assert (tmp_path / "ours/special_tokens_map.json").read_text() == "{}"
    assert read_json(tmp_path / "ours/generation_config.json") == {"eos_token_id": [0, 2]}
    check_logits(tmp_path / "ours", theirs)


def write_bin(folder: Path, theirs: LlamaForCausalLM, **changes) -> None:
    """Two .bin files with an index, which take turns, so that q, k and v are parted. None drops a tensor."""
    theirs.config.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()} | changes
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    weight_map = {name: f"pytorch_model-{i % 2 + 1:05d}.bin" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_hf_bin(tmp_path):
    theirs = tiny_hf(tie_word_embeddings=True)  # a state dict has a tied head twice
    write_bin(tmp_path / "hf", theirs, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    convert_hf(tmp_path / "hf", tmp_path / "ours")
    check_logits(tmp_path / "ours", theirs)


@pytest.mark.parametrize(("flag", "dtype"), [(None, torch.bfloat16), ("float16", torch.float16)])
def test_hf_file_of_the_old_format_and_dtype(tmp_path, flag, dtype):
    theirs = tiny_hf().bfloat16()
    theirs.config.save_pretrained(tmp_path / "hf")
    torch.save(theirs.state_dict(), tmp_path / "hf/pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_hf(tmp_path / "hf", tmp_path / "ours", dtype=flag)
    tensors = load_file(tmp_path / "ours/model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], theirs.lm_head.weight.to(dtype))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


SCALING = dict(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=16)
LLAMAS = {
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}, "head_dim": 10},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"mistral": True, "sliding_window": None},
    "wide mistral": {"mistral": True, "sliding_window": 64},
}


@torch.no_grad()
@pytest.mark.parametrize("name", LLAMAS)
def test_llama_by_another_name(tmp_path, name):
    theirs = tiny_hf(**LLAMAS[name])
    for key, parameter in theirs.named_parameters():
        if key.endswith("bias"):
            parameter.normal_()
    theirs.save_pretrained(tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "ours")
    config = load_config(tmp_path / "ours")
    assert config.bias == ("bias" in name)
    for key, value in (config.rope_scaling or {}).items():  # so that its JSON, and the fingerprint, are one
        assert type(value) is type(LLAMA_31_SCALING[key])
    check_logits(tmp_path / "ours", theirs)

    raw = read_json(tmp_path / "hf/config.json")
    rope = raw.pop("rope_parameters")  # versions before 5 wrote it so:
    old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    write_json(tmp_path / "hf/config.json", raw | old)
    convert_hf(tmp_path / "hf", tmp_path / "again")
    assert load_config(tmp_path / "again") == config


UNSUPPORTED = [
    ("model_type", "qwen2"), ("hidden_act", "gelu"), ("sliding_window", 63), ("partial_rotary_factor", 0.5),
    ("quantization_config", {"bits": 4}), ("rope_theta", "big"), ("num_attention_heads", 0), ("head_dim", 7),
    ("num_key_value_heads", 3), ("vocab_size", None), ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}), ("rope_parameters", "yes"),
]  # fmt: skip


def test_hf_config_refused(tmp_path):
    tiny_hf().save_pretrained(tmp_path / "hf")
    raw = read_json(tmp_path / "hf/config.json")
    raw.pop("rope_parameters")
    for key, value in UNSUPPORTED:
        write_json(tmp_path / "hf/config.json", {**raw, key: value})
        refused("config.json", tmp_path / "ours", convert_hf, tmp_path / "hf", tmp_path / "ours")
    write_json(tmp_path / "hf/config.json", {**raw, "model_type": "mistral", "max_position_embeddings": 8192})
    refused("sliding_window 4096", tmp_path / "ours", convert_hf, tmp_path / "hf", tmp_path / "ours")
    write_json(tmp_path / "hf/config.json", {**raw, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}})
    convert_hf(tmp_path / "hf", tmp_path / "ours")
    assert load_config(tmp_path / "ours").rope_base == 5e5


K_PROJ, GATE = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight"
WRONG_TENSORS = {
    "h.1.attn.c_attn.weight is missing": {K_PROJ: None},
    "mlp.c_fc1.weight is missing": {GATE: None},
    "q_proj.bias has no place": {"model.layers.0.self_attn.q_proj.bias": torch.zeros(C)},
    "layers.2.input_layernorm.weight has no place": {"model.layers.2.input_layernorm.weight": torch.zeros(C)},
    r"attn.k.weight has shape \(32, 32\) instead of \(16, 32\)": {K_PROJ: torch.zeros(C, C)},
    r"has shape \(96, 31\) instead of \(96, 32\)": {GATE: torch.zeros(HIDDEN, C - 1)},
    "dtype torch.int8": {GATE: torch.zeros(HIDDEN, C, dtype=torch.int8)},
    "tied by its config, but .* it is untied": {"lm_head.weight": torch.zeros(VOCAB, C)},
}


@pytest.mark.parametrize("match", WRONG_TENSORS)
def test_hf_wrong_tensors(tmp_path, match):
    write_bin(tmp_path / "hf", tiny_hf(tie_word_embeddings=True), **WRONG_TENSORS[match])
    refused(match, tmp_path / "ours", convert_hf, tmp_path / "hf", tmp_path / "ours")


def test_hf_files(tmp_path):
    source, out = tmp_path / "hf", tmp_path / "ours"
    tiny_hf().config.save_pretrained(source)
    refused("neither model.safetensors nor pytorch_model.bin", out, convert_hf, source, out)
    write_bin(source, tiny_hf())
    (source / "pytorch_model-00002.bin").unlink()
    refused("pytorch_model-00002.bin .*No such file", out, convert_hf, source, out)
    tiny_hf(vocab_size=258).save_pretrained(source)
    write_tokenizer(source)
    refused("259 tokens, but the model 258 .* resize_token_embeddings", out, convert_hf, source, out)


class Attack(str):
    def __reduce__(self):
        return Path.touch, (Path(self),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("as_zip", [True, False])
def test_pickles_are_not_run(tmp_path, as_zip):
    target = tmp_path / "executed"
    tiny_hf().config.save_pretrained(tmp_path / "hf")
    torch.save({"x": Attack(target)}, tmp_path / "hf/pytorch_model.bin", _use_new_zipfile_serialization=as_zip)
    refused("nothing in it was run", tmp_path / "ours", convert_hf, tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "hf/pytorch_model.bin").write_bytes(pickle.dumps(Attack(target)))
    refused("nothing in it was run", tmp_path / "ours", convert_hf, tmp_path / "hf", tmp_path / "ours")
    torch.save({"model": {"x": torch.ones(1)}}, tmp_path / "hf/pytorch_model.bin")
    refused("a dict of tensors", tmp_path / "ours", convert_hf, tmp_path / "hf", tmp_path / "ours")
    assert not target.exists()


def write_meta(folder: Path, theirs: LlamaForCausalLM, shards: int, embedding_dim: int, **params) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict] = [{} for _ in range(shards)]
    for name, tensor in {**foreign_state(theirs, is_gguf=False), "rope.freqs": torch.ones(4)}.items():
        dim = embedding_dim if name.startswith("tok") else int("wo." in name or "w2." in name)
        pieces = tensor.chunk(shards, dim) if tensor.dim() == 2 else [tensor] * shards
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    for i, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    sizes = dict(dim=C, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=-1, multiple_of=32, norm_eps=1e-5)
    (folder / "params.json").write_text(json.dumps({**sizes, **params}))


@pytest.fixture
def tiny(monkeypatch) -> LlamaForCausalLM:
    """A model of transformers, whose sizes have the name "tiny" here."""
    monkeypatch.setitem(CONFIGS, "tiny", dict(HF_TINY))
    return tiny_hf()


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("shards", [1, 2])
def test_meta(tmp_path, tiny, shards, embedding_dim):
    source, out = tmp_path / "models/tiny", tmp_path / "ours"
    write_meta(source, tiny, shards, embedding_dim)
    (tmp_path / "models/tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")  # one folder up, as LLaMA 1 came
    convert = ["scripts/convert.py", "--source", source, "--out_dir", out]
    refuse(*convert, message="Meta's folder needs --name")
    assert succeed(*convert, "--name", "tiny") == f"wrote {out}\n"
    assert load_config(out) == LLaMAConfig(name="tiny", **HF_TINY)
    assert (out / "tokenizer.model").exists()
    check_logits(out, tiny)


def test_meta_refused(tmp_path, tiny):
    source, out = tmp_path / "meta", tmp_path / "ours"
    write_meta(source, tiny, 2, 0)
    refused("--name 'huge' is unknown", out, convert_meta, source, out, "huge")
    refused("dim is 32, not 4096", out, convert_meta, source, out, "7B")
    for params in (dict(rope_theta=5e5), dict(use_scaled_rope=True), dict(n_heads=2), dict(dim=None)):
        write_meta(source, tiny, 2, 0, **params)
        refused("params.json", out, convert_meta, source, out, "tiny")
    write_meta(source, tiny, 2, 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    convert_meta(source, tmp_path / "fine", "tiny", tokenizer=tmp_path / "tokenizer.json")
    assert (tmp_path / "fine/tokenizer.json").exists()
    (source / "consolidated.01.pth").unlink()
    refused("instead of", out, convert_meta, source, out, "tiny")
    (source / "consolidated.00.pth").unlink()
    refused("no consolidated", out, convert_meta, source, out, "tiny")
