"""Exported GGUF files: converted back, dequantized, and run by llama.cpp where its Python package is installed."""

import json

import gguf
import pytest
import torch
from helpers import (
    CONTROLS,
    EXPORT_SHAPES,
    SCALING,
    interleave,
    make_base,
    refuse,
    save_trained,
    set_biases,
    succeed,
    train_sentencepiece,
    varied_strings,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lit_llama.checkpoint import load_config, load_model
from lit_llama.common.errors import UserError
from lit_llama.common.files import write_json
from lit_llama.formats.convert_gguf import convert_gguf
from lit_llama.formats.export_gguf import export_gguf
from lit_llama.formats.gguf_tokenizer import PRE_TOKENIZERS, write_tokenizer
from lit_llama.formats.gguf_vocabulary import sentencepiece_fields
from lit_llama.tokenizer import Tokenizer

LLAMA3 = dict(SCALING, original_max_position_embeddings=8192)
BACK = {**EXPORT_SHAPES, "tied, scaled": dict(tie_embeddings=True, rope_scaling=LLAMA3, rope_base=500000.0)}


def tensors_of(path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("shape", ["grouped", "tied, scaled", "odd sizes"])
def test_there_and_back(tmp_path, shape):
    base = make_base(tmp_path / "base", **BACK[shape])
    export_gguf(base, tmp_path / "tiny.gguf", "f32")
    assert convert_gguf(tmp_path / "tiny.gguf", tmp_path / "again") == load_config(base)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ours, again = Tokenizer(base), Tokenizer(tmp_path / "again")
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (again.bos_id, again.eos_id, again.vocab_size)
    assert all(ours.encode(text) == again.encode(text) for text in varied_strings(50))
    assert [again.control_id(token) for token in CONTROLS] == [0, 1, 2]


@pytest.mark.parametrize(("kind", "matrix", "tolerance"), [("f16", "F16", 2e-4), ("q8_0", "Q8_0", 5e-3)])
def test_types(tmp_path, kind, matrix, tolerance):
    base = make_base(tmp_path / "base")  # of C = 32: a row is one block; of its MLP's 48 it is not
    export_gguf(base, tmp_path / "tiny.gguf", kind)
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "tiny.gguf").items()}
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_output", "ffn_up")} == {matrix}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=tolerance, rtol=0)


def test_biases(tmp_path):
    base = make_base(tmp_path / "base", **EXPORT_SHAPES["biases"])
    set_biases(base)
    export_gguf(base, tmp_path / "tiny.gguf")
    found, ours = tensors_of(tmp_path / "tiny.gguf"), load_model(base).state_dict()
    q, k, v = ours["transformer.h.1.attn.c_attn.bias"].split([32, 16, 16])
    for name, expected in (("q", interleave(q[:, None], 4)[:, 0]), ("k", interleave(k[:, None], 2)[:, 0]), ("v", v)):
        assert torch.equal(torch.from_numpy(found[f"blk.1.attn_{name}.bias"].data.copy()), expected)
    assert "output.bias" not in found and found["blk.2.ffn_down.bias"].tensor_type.name == "F32"


SPLITS = ("gpt-2", "smollm", "llama-bpe")


def bpe_base(folder, split: str, bos: str | None = None, padding: int = 0, **changes):
    """A base with a trained byte-level tokenizer.json and ``padding`` more rows than tokens."""
    tokenizer = TokenizersTokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[split])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=CONTROLS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(varied_strings(300, seed=5), trainer)
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if bos:
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing([bos, "$A"], None, special)
        settings["bos_token"] = bos
    base = make_base(folder, vocab_size=tokenizer.get_vocab_size() + padding, **changes)
    tokenizer.save(str(base / "tokenizer.json"))
    write_json(base / "tokenizer_config.json", settings)
    return base


@pytest.mark.parametrize("bos", [None, "<|endoftext|>"])
@pytest.mark.parametrize("split", SPLITS)
def test_byte_level_tokenizer(tmp_path, split, bos):
    base = bpe_base(tmp_path / "base", split, bos, padding=5)
    export_gguf(base, tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "again")
    ours, again = Tokenizer(base), Tokenizer(tmp_path / "again")
    assert (ours.bos_id, ours.eos_id) == (again.bos_id, again.eos_id) == (None if bos is None else 0, 2)
    assert again.vocab_size == load_config(base).vocab_size == ours.vocab_size + 5
    assert all(ours.encode(text) == again.encode(text) for text in varied_strings(300))
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == split
    assert fields["tokenizer.ggml.padding_token_id"].contents() == 0


@pytest.mark.parametrize("from_json", [False, True])
def test_sentencepiece_tokenizer(tmp_path, from_json):
    """As tokenizer.model, which has scores, and as tokenizer.json, which has merges."""
    base = make_base(tmp_path / "base", vocab_size=1203)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
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


def test_refused(tmp_path):
    base = make_base(tmp_path / "base")
    flags = ["--checkpoint_dir", base, "--out_file", tmp_path / "tiny.gguf"]
    assert succeed("scripts/export.py", "--to", "gguf", *flags, "--type", "q8_0") == f"wrote {tmp_path / 'tiny.gguf'}\n"
    refuse("scripts/export.py", "--to", "gguf", *flags, message="exists already")
    succeed("scripts/convert.py", "--source", tmp_path / "tiny.gguf", "--out_dir", tmp_path / "again")
    content = json.loads((base / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has a pre-tokenizer that is none of"):
        export_gguf(base, tmp_path / "other.gguf")
    trained = save_trained(base, tmp_path / "trained", "lora")
    with pytest.raises(UserError, match="holds what lora learned.*merge_lora.py"):
        export_gguf(trained, tmp_path / "other.gguf")
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["tiny.gguf"]


# ---------------------------------------------------------------------------------------------- llama.cpp


@pytest.mark.parametrize("shape", BACK)
def test_llama_cpp_computes_the_same(tmp_path, shape):
    llama_cpp = pytest.importorskip("llama_cpp")
    base = bpe_base(tmp_path / "base", "smollm", **BACK[shape])
    if shape == "biases":
        set_biases(base)
    export_gguf(base, tmp_path / "tiny.gguf", "f32")
    llm = llama_cpp.Llama(str(tmp_path / "tiny.gguf"), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    ours = Tokenizer(base)
    for text in varied_strings(100):
        assert llm.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text), repr(text)
    ids = ours.encode("A table for two on Sunday, 19:00, and 12 more things")
    llm.eval(ids)
    with torch.no_grad():
        expected = load_model(base)(torch.tensor([ids]))[0]
    found = torch.from_numpy(llm.scores[: len(ids)].copy())
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)  # it keeps keys and values in float16
    assert expected.std() > 0.2
    llm.close()
