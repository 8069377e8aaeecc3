"""The tokenizer against transformers and sentencepiece; all of Unicode there and back."""

import json
import random
import unicodedata

import pytest
import tokenizers
import transformers
from gguf import TokenType
from helpers import CODE_POINTS, SMOLLM2_UNKNOWN, byte_level_bpe, make_base, train_sentencepiece, varied_strings
from tokenizers import pre_tokenizers, processors

from lit_llama.common.errors import UserError
from lit_llama.common.files import write_json
from lit_llama.data.prompts import CHATML, choose_template, encode_prompt
from lit_llama.formats.export import export_hf
from lit_llama.formats.gguf_tokenizer import sentencepiece_fields, write_tokenizer
from lit_llama.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def smollm2(smollm2_dir) -> Tokenizer:
    return Tokenizer(smollm2_dir)


@pytest.mark.weights
def test_equals_transformers(smollm2, smollm2_gguf):
    """On its own where digits are left out; with digits split off first on everything.

    llama.cpp defines the pre-tokenizer "smollm" as: every digit (\\p{N}) by itself, then GPT-2's regex. transformers
    (5.23) does not know the name and applies GPT-2's regex alone, so "a  1" becomes a, _, _1 instead of a, __, 1.
    """
    # not AutoTokenizer, which reads the whole GGUF once more for a config
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    strings = varied_strings(4000)
    plain = ["".join(char for char in s if unicodedata.category(char)[0] != "N") for s in strings]
    assert [smollm2.encode(s) for s in plain] == theirs(plain, add_special_tokens=False).input_ids
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, theirs.backend_tokenizer.pre_tokenizer])
    assert [smollm2.encode(s) for s in strings] == theirs(strings, add_special_tokens=False).input_ids


def assert_round_trip(tokenizer: Tokenizer, unsayable: set[int], step: int = 1) -> None:
    """Unicode but ``unsayable`` in stretches (every ``step``-th), some characters alone, hard texts, control tokens."""
    sayable = [chr(i) for i in CODE_POINTS if i not in unsayable]
    texts = ["".join(sayable[i : i + 300]) for i in range(0, len(sayable), 300 * step)]
    texts += random.Random(0).sample(sayable, 2000) + sayable[:256]
    texts += ["", " ", "  ", " a", "a ", "\n a \n", "a\0b", "e\u0301", "👩‍👩‍👧‍👦", "\ufeffx", "\u202eabc", "a   b\t\tc"]
    texts += [*varied_strings(500, seed=2), *tokenizer.controls, *(f" a{name}b\n" for name in tokenizer.controls)]
    for text in texts:
        text = "".join(char for char in text if ord(char) not in unsayable)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.controls.values())


@pytest.mark.weights
def test_round_trip_of_unicode_and_control_tokens(smollm2):
    assert_round_trip(smollm2, SMOLLM2_UNKNOWN)
    for code in (4, 6, 0x13, 0x14, 0x16, 0x1D, 0x40000, 0xBFFFF):
        with pytest.warns(UserWarning, match="no token for 1 bytes"):
            assert smollm2.decode(smollm2.encode(f"a{chr(code)}b")) != f"a{chr(code)}b"
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id) == (49152, None, 2)
    assert smollm2.controls["<|im_start|>"] == 1 and "<|eot_id|>" not in smollm2.controls
    assert smollm2.decode([1, *smollm2.encode("user\nhi"), 2, 60000]) == "<|im_start|>user\nhi<|im_end|>"


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_and_a_json_file_of_it(tmp_path, prefix):
    (tmp_path / "json").mkdir()
    processor = train_sentencepiece(tmp_path, add_dummy_prefix=prefix)
    write_tokenizer(sentencepiece_fields(tmp_path / "tokenizer.model"), tmp_path / "json")
    model, json_file = Tokenizer(tmp_path), Tokenizer(tmp_path / "json")
    strings = varied_strings(3000, seed=4) + [char * n for char in " a=-0\n." for n in range(1, 40)]
    strings += ["<s>", "a</s>b", "<unk>", "<ctl>", "<0x0A>", "\u2581", "a \u2581b", ""]
    for tokenizer in (model, json_file):
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (1200, 1, 2)
        assert tokenizer.controls["<s>"] == 1 and "▁" not in tokenizer.controls
        assert_round_trip(tokenizer, {0x2581}, step=1 if tokenizer is model and prefix else 50)
        assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"  # the way sentencepiece writes a space
        ids = [1, *tokenizer.encode(" hi"), 2, *tokenizer.encode("</s>x"), tokenizer.controls["<ctl>"], 0, 1200]
        assert tokenizer.decode(ids) == "<s> hi</s></s>x<ctl><unk>"
        assert tokenizer.encode_batch(strings) == [processor.encode(s) for s in strings]
    assert json_file.controls == model.controls
    assert json_file.backend.tokenizer.encode("").ids == [1]  # other readers of the file find the bos there


def small_bpe() -> tokenizers.Tokenizer:
    return byte_level_bpe([pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], ["<s>", "</s>"])


def gpt2_fields() -> dict:
    content = json.loads(small_bpe().to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    types = [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 3) + [TokenType.USER_DEFINED]
    fields = {"ggml.model": "gpt2", "ggml.tokens": tokens[:-1] + ["<think>"], "ggml.token_type": types}
    fields["ggml.merges"] = [" ".join(pair) for pair in content["merges"][:-1]]
    return fields | {"ggml.bos_token_id": 0, "ggml.eos_token_id": 1}


TEXT = "It's 12345 X'Sam\r\n\n y  z 7!!\nok\t\tgo "
WORDS = {  # llama.cpp's definitions by hand
    "gpt-2": "It|'s| 12345| X|'|Sam|\r\n\n| y| | z| 7|!!|\n|ok|\t|\t|go| ",
    "smollm": "It|'s| |1|2|3|4|5| X|'|Sam|\r\n\n| y| | z| |7|!!|\n|ok|\t|\t|go| ",
    "llama-bpe": "It|'s| |123|45| X|'S|am|\r\n\n| y| | z| |7|!!\n|ok|\t|\tgo| ",
}


@pytest.mark.parametrize("pre", WORDS)
def test_byte_level_gguf(tmp_path, pre):
    fields = gpt2_fields() | {"ggml.pre": pre}
    fields["ggml.tokens"][-2], fields["ggml.merges"] = "Sam", fields["ggml.merges"][:-1]  # no merge makes it
    write_tokenizer(fields, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    split = tokenizer.backend.tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert "|".join(TEXT[start:end] for _, (start, end) in split) == WORDS[pre]
    vocab = {token: i for i, token in enumerate(fields["ggml.tokens"])}
    is_llama3 = pre == "llama-bpe"
    assert (tokenizer.encode("Sam") == [vocab["Sam"]]) == is_llama3  # it takes a word that is a token as a whole
    assert tokenizer.bos_id == (0 if is_llama3 else None)  # unless the file says otherwise
    assert_round_trip(tokenizer, set(), step=50)
    assert vocab["<think>"] in tokenizer.encode("a<think>b") and "<think>" not in tokenizer.controls
    assert tokenizer.decode(tokenizer.encode("a<think> b")) == "a<think> b"
    write_tokenizer(fields | {"ggml.add_bos_token": False}, tmp_path)
    assert Tokenizer(tmp_path).bos_id is None


def test_control_and_user_defined_tokens_of_sentencepiece(tmp_path):
    normal = ["▁", "a", "b", "▁b", "<", "/", "s", ">", "s>", "/s>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *normal, "<think>"]
    types = [TokenType.UNKNOWN, 3, 3, *[TokenType.BYTE] * 256, *[1] * len(normal), TokenType.USER_DEFINED]
    fields = {"ggml.model": "llama", "ggml.tokens": tokens, "ggml.token_type": types}
    write_tokenizer(fields | {"ggml.scores": [0.0] * len(tokens)}, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    pieces = {"a<think>b": "▁ a <think> ▁b", "</s>": "▁ < /s>"}  # as llama.cpp has them; never </s> from its pieces
    for text, expected in pieces.items():
        assert [tokens[i] for i in tokenizer.encode(text)] == expected.split()
    for text in ("a<think>b", "a<think> b", "<think>", " <think> "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


NAMED = {"eos_token": "</s>", "bos_token": "<s>"}
AROUND = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
BEHIND = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])


@pytest.mark.parametrize(
    ("settings", "post_processor", "bos_id"),
    [
        ({**NAMED, "eos_token": {"content": "</s>"}}, None, None),
        ({**NAMED, "add_bos_token": True}, None, 0),
        (NAMED, AROUND, 0),
        ({**NAMED, "add_bos_token": False}, AROUND, None),
        ({}, AROUND, 0),
        ({}, BEHIND, None),
    ],
)
def test_bos_truncation_and_padding(tmp_path, settings, post_processor, bos_id):
    backend = small_bpe()
    backend.enable_truncation(3)
    backend.enable_padding(length=8, pad_id=0)
    if post_processor:
        backend.post_processor = post_processor
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')  # the first one, if nothing is named
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("some longer text")) == "some longer text"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, 1)


def test_a_tokenizer_has_as_many_tokens_as_the_model_or_few_less(tmp_path):
    small_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMED))
    for rows in (600, 1623):
        write_json(tmp_path / "config.json", {"vocab_size": rows})
        Tokenizer(tmp_path)
    for rows in (599, 1624):
        write_json(tmp_path / "config.json", {"vocab_size": rows})
        with pytest.raises(UserError, match=f"{tmp_path.name}: the tokenizer has 600 tokens, but the model {rows}"):
            Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ggml.model": "rwkv"}, "of kind 'rwkv' .*; known are llama, and gpt2"),
        ({"ggml.pre": "qwen2"}, "pre-tokenizer 'qwen2'; known are .*smollm"),
        ({"ggml.model": "llama"}, "inconsistent: KeyError.'ggml.scores'"),
        ({"ggml.eos_token_id": 600}, "inconsistent: IndexError"),
    ],
)
def test_errors_of_a_gguf(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write_tokenizer({"ggml.pre": "gpt-2", **gpt2_fields(), **change}, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_tokens_that_a_folder_adds_to_a_sentencepiece_model(tmp_path):
    """As Hugging Face writes them: added_tokens.json and special_tokens_map.json. The ids are those of transformers."""
    base = make_base(tmp_path / "base", vocab_size=1202)
    train_sentencepiece(base)
    (base / "added_tokens.json").write_text('{"<|im_start|>": 1200, "<|im_end|>": 1201}')
    (base / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    talk = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "Yes. "}]
    for legacy in (True, False):
        (base / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "chat_template": CHATML}))
        ours = Tokenizer(base)
        assert ours.controls["<|im_end|>"] == 1201 == ours.eos_id and ours.vocab_size == 1202
        export_hf(base, tmp_path / f"hf{legacy}")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / f"hf{legacy}")
        expected = theirs.apply_chat_template(talk, return_dict=False)
        assert encode_prompt(talk, choose_template(None, ours), ours) == expected and expected.count(1201) == 2
