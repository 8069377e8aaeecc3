"""Exported folders as transformers' Auto classes load them: logits, ids, chat templates, and back again."""

import shutil

import pytest
import torch
from helpers import (
    CONTROLS,
    EXPORT_SHAPES,
    TALK,
    check_logits,
    make_base,
    refuse,
    save_trained,
    succeed,
    train_sentencepiece,
    varied_strings,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from lit_llama.checkpoint import load_config
from lit_llama.common.files import read_json, write_json
from lit_llama.formats import export
from lit_llama.formats.convert import convert_hf
from lit_llama.formats.export import export_hf
from lit_llama.tokenizer import Tokenizer


def check_exported(base, exported, tolerance: float = 1e-5) -> LlamaForCausalLM:
    """The same logits in transformers, whose model it gives."""
    theirs, info = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check_logits(base, theirs.eval(), tolerance)
    return theirs


@pytest.mark.parametrize("shape", EXPORT_SHAPES)
def test_logits(tmp_path, shape, monkeypatch):
    base = make_base(tmp_path / "base", **EXPORT_SHAPES[shape])
    if shape == "grouped":
        write = export.write_shards
        monkeypatch.setattr(export, "write_shards", lambda *args, foreign: write(*args, 20_000, foreign))
    export_hf(base, tmp_path / "hf")
    assert (len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1) == (shape == "grouped")
    theirs = check_exported(base, tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "again", name="tiny")
    assert load_config(tmp_path / "again") == load_config(base)
    assert theirs.config.max_position_embeddings == 512 and theirs.config.tie_word_embeddings == ("tied" in shape)

    config = read_json(tmp_path / "hf/config.json")  # versions before 5 know rope_theta and rope_scaling
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == load_config(base).rope_base
    assert (config["rope_scaling"] or {"rope_type": "default"}).items() <= config["rope_parameters"].items()
    del config["rope_parameters"]
    write_json(tmp_path / "hf/config.json", config)
    check_exported(base, tmp_path / "hf")


def check_ids(folder, exported, texts) -> None:
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(exported)
    assert theirs.eos_token_id == ours.eos_id
    in_front = [] if ours.bos_id is None else [ours.bos_id]
    for text in texts:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), repr(text)
        assert theirs(text).input_ids == in_front + ours.encode(text)
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text


def test_ids_of_a_sentencepiece_model(tmp_path):
    base = make_base(tmp_path / "base", vocab_size=1200)
    train_sentencepiece(base)
    export_hf(base, tmp_path / "hf")
    check_ids(base, tmp_path / "hf", [text for text in varied_strings(300) if "▁" not in text])
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").bos_token == "<s>"


def test_dtype_and_the_tokenizers_own_settings(tmp_path):
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    write_json(base / "generation_config.json", {"eos_token_id": 0, "temperature": 0.5})
    export_hf(base, tmp_path / "hf", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "hf/model.safetensors").values())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.apply_chat_template(TALK[1:2], tokenize=False) == TALK[1]["content"] + "!"
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.eos_token_id, generation.temperature) == ([0, CONTROLS.index("<|im_end|>")], 0.5)


@pytest.mark.parametrize("scale_head", [False, True])
def test_a_trained_folder_is_merged_first(tmp_path, scale_head):
    base, merged, out = make_base(tmp_path / "base", tie_embeddings=True), tmp_path / "merged", tmp_path / "hf"
    arguments = dict(prompt_length=4, start_layer=1, scale_head=scale_head)
    trained = save_trained(base, tmp_path / "trained", "adapter_v2", **arguments)
    export = ("scripts/export.py", "--to", "hf", "--out_dir", out, "--checkpoint_dir")
    refuse(*export, trained, message="holds what adapter_v2 learned")
    succeed("scripts/merge_lora.py", "--trained_dir", trained, "--out_dir", merged)
    if scale_head:
        refuse(*export, merged, message="bias on its head.*--scale_head false")
    else:
        assert succeed(*export, merged) == f"wrote {out}\n"
        config = check_exported(merged, out).config
        assert config.attention_bias and config.mlp_bias


@pytest.mark.weights
def test_the_default_base(smollm2_dir, tmp_path):
    export_hf(smollm2_dir, tmp_path / "hf")
    check_exported(smollm2_dir, tmp_path / "hf", tolerance=1e-4)
    check_ids(smollm2_dir, tmp_path / "hf", varied_strings(300))
    shutil.rmtree(tmp_path / "hf")
