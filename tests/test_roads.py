"""After train, merge, export and import the same messages have the ids of training, here and in transformers."""

import pytest
from helpers import HEADERS, TALK, base_with_controls, save_trained, succeed, sums, write_rows
from transformers import AutoTokenizer

from lit_llama.common.files import read_json, write_json
from lit_llama.data.prompts import STYLES, choose_style, encode_prompt, stop_ids
from lit_llama.formats.convert import convert_hf
from lit_llama.formats.convert_gguf import convert_gguf
from lit_llama.formats.export import export_hf
from lit_llama.formats.export_gguf import export_gguf
from lit_llama.formats.peft import export_peft, import_peft
from lit_llama.tokenizer import Tokenizer

TALKS = [TALK[1:2], TALK[:2], TALK]  # a question; with a system message; of several turns
OTHER = "{{ 'You are a helpful assistant.' }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(params=[(style, bos) for style in STYLES for bos in (True, False)], ids=str)
def trained(request, tmp_path):
    """A folder trained in a style over a base whose own template adds a system message; and the style."""
    style, bos = request.param
    start, eos = ("<|begin_of_text|>", "<|eot_id|>") if style == "llama3" else ("<s>", "</s>")
    base = base_with_controls(tmp_path / "base", HEADERS, start if bos else None, eos)
    (base / "chat_template.jinja").write_text(OTHER)
    folder = save_trained(base, tmp_path / "trained", "lora", r=2, alpha=4, dropout=0.0, targets=["q"])
    write_json(folder / "method.json", read_json(folder / "method.json") | {"prompt_style": style})
    return folder, style, Tokenizer(base)


def asked_alike(folder, style: str, trained_with: Tokenizer) -> None:
    """Here: the folder is asked in the style of training without being told."""
    ours = Tokenizer(folder)
    found = choose_style(None, ours)
    assert [encode_prompt(talk, found, ours) for talk in TALKS] == [
        encode_prompt(talk, style, trained_with) for talk in TALKS
    ]
    assert stop_ids(found, ours) == stop_ids(style, trained_with)


def asked_alike_by_transformers(folder, style: str, trained_with: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for talk in TALKS:
        found = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert found == encode_prompt(talk, style, trained_with)


def test_merge_export_and_convert_back(trained, tmp_path):
    folder, *expected = trained
    succeed("scripts/merge_lora.py", "--trained_dir", folder, "--out_dir", tmp_path / "merged")
    asked_alike(tmp_path / "merged", *expected)
    export_hf(tmp_path / "merged", tmp_path / "hf")
    asked_alike_by_transformers(tmp_path / "hf", *expected)
    convert_hf(tmp_path / "hf", tmp_path / "from_hf")
    asked_alike(tmp_path / "from_hf", *expected)
    export_gguf(tmp_path / "merged", tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "from_gguf")
    asked_alike(tmp_path / "from_gguf", *expected)
    export_hf(tmp_path / "from_gguf", tmp_path / "hf_again")
    asked_alike_by_transformers(tmp_path / "hf_again", *expected)


def test_export_to_peft_and_import(trained, tmp_path):
    folder, *expected = trained
    export_peft(folder, tmp_path / "peft")
    asked_alike_by_transformers(tmp_path / "peft", *expected)
    import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "ours")
    assert read_json(tmp_path / "ours/method.json")["prompt_style"] == expected[0]


def test_what_full_trained_is_a_base_that_is_asked_as_it_was_trained(tmp_path):
    base = base_with_controls(tmp_path / "base", HEADERS, "<s>", "</s>")
    (base / "chat_template.jinja").write_text(OTHER)
    write_rows(tmp_path / "data/train.json", sums(4))
    write_rows(tmp_path / "data/validation.json", sums(2))
    flags = ["--data", tmp_path / "data", "--train.max_steps", 1, "--eval_samples", 0, "--precision", "32-true"]
    told = ["--checkpoint_dir", base, "--prompt_style", "alpaca", "--out_dir", tmp_path / "full"]
    succeed("finetune/full.py", *flags, *told)
    asked_alike(tmp_path / "full", "alpaca", Tokenizer(base))
    succeed("finetune/lora.py", *flags, "--checkpoint_dir", tmp_path / "full", "--out_dir", tmp_path / "lora")
    assert read_json(tmp_path / "lora/method.json")["prompt_style"] == "alpaca"
