"""The tokenizer against transformers and sentencepiece; all of Unicode there and back."""

import json
import random
import unicodedata

import gguf
import pytest
import sentencepiece
import tokenizers
from gguf import GGUFReader, TokenType
from helpers import CODE_POINTS, SMOLLM2_UNKNOWN, make_base, train_sentencepiece, varied_strings
from transformers import AutoTokenizer

from lit_llama.common.errors import UserError
from lit_llama.data.prompts import CHATML, choose_template, encode_prompt
from lit_llama.formats.export import export_hf
from lit_llama.formats.gguf_tokenizer import write_gguf_tokenizer
from lit_llama.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------- SmolLM2, a real one


@pytest.fixture(scope="module")
def smollm2(smollm2_dir) -> Tokenizer:
    return Tokenizer(smollm2_dir)


@pytest.fixture(scope="module")
def reference_smollm2(smollm2_gguf):
    transformers = pytest.importorskip("transformers")
    # not AutoTokenizer, which reads the whole GGUF once more for a config
    return transformers.PreTrainedTokenizerFast.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.mark.weights
def test_equals_transformers(smollm2, reference_smollm2):
    """On its own where digits are left out; with digits split off first on everything.

    llama.cpp defines the pre-tokenizer "smollm" as: every digit (\\p{N}) by itself, then GPT-2's regex. transformers
    (5.23) does not know the name and applies GPT-2's regex alone, so "a  1" becomes a, _, _1 instead of a, __, 1.
    """
    strings = varied_strings(4000)
    plain = ["".join(char for char in s if unicodedata.category(char)[0] != "N") for s in strings]
    assert [smollm2.encode(s) for s in plain] == reference_smollm2(plain, add_special_tokens=False).input_ids
    own = reference_smollm2.backend_tokenizer.pre_tokenizer
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    reference_smollm2.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, own])
    assert [smollm2.encode(s) for s in strings] == reference_smollm2(strings, add_special_tokens=False).input_ids


def assert_round_trip(tokenizer: Tokenizer, unsayable: set[int], step: int = 1) -> None:
    """All of Unicode but ``unsayable`` in stretches (every ``step``-th of them), some characters alone, hard texts."""
    sayable = [chr(i) for i in CODE_POINTS if i not in unsayable]
    texts = ["".join(sayable[i : i + 300]) for i in range(0, len(sayable), 300 * step)]
    texts += random.Random(0).sample(sayable, 2000) + sayable[:256]
    texts += ["", " ", "  ", " a", "a ", "\n a \n", "a\0b", "e\u0301", "👩‍👩‍👧‍👦", "\ufeffx", "\u202eabc", "a   b\t\tc"]
    texts += varied_strings(500, seed=2)
    for text in texts:
        text = "".join(char for char in text if ord(char) not in unsayable)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_unicode(smollm2):
    assert_round_trip(smollm2, SMOLLM2_UNKNOWN)


@pytest.mark.parametrize("code", [4, 6, 0x13, 0x14, 0x16, 0x1D, 0x40000, 0xBFFFF])
def test_bytes_without_a_token_are_dropped_aloud(smollm2, code):
    with pytest.warns(UserWarning, match="no token for 1 bytes"):
        assert smollm2.decode(smollm2.encode(f"a{chr(code)}b")) != f"a{chr(code)}b"


def test_names_of_control_tokens_in_a_text_are_text(smollm2):
    controls = smollm2.backend.controls
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} < set(controls)
    for name in controls:
        for text in (name, f"a{name}b", f" {name} \n{name}"):
            ids = smollm2.encode(text)
            assert not set(ids) & set(controls.values())
            assert smollm2.decode(ids) == text


def test_control_tokens_of_smollm2(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id) == (49152, None, 2)
    assert smollm2.control_id("<|im_start|>") == 1 and smollm2.control_id("<|im_end|>") == 2
    assert smollm2.control_id("hello") is None and smollm2.control_id("<|eot_id|>") is None
    assert smollm2.decode([1, *smollm2.encode("user\nhi"), 2, 60000]) == "<|im_start|>user\nhi<|im_end|>"
    assert "<|im_start|>" in smollm2.chat_template


# ---------------------------------------------------------------------------------------------- small ones, made here


def write_gguf(path, **meta) -> GGUFReader:
    """A GGUF that holds nothing but a tokenizer; the keywords are GGUFWriter's methods without "add_"."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in meta.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFReader(path)


def gguf_of(processor: sentencepiece.SentencePieceProcessor, path, **meta) -> GGUFReader:
    ids = range(processor.vocab_size())
    kinds = {"is_unknown": TokenType.UNKNOWN, "is_control": TokenType.CONTROL, "is_byte": TokenType.BYTE}
    types = [next((kind for f, kind in kinds.items() if getattr(processor, f)(i)), TokenType.NORMAL) for i in ids]
    pieces, scores = [processor.id_to_piece(i) for i in ids], [processor.get_score(i) for i in ids]
    return write_gguf(path, tokenizer_model="llama", token_list=pieces, token_scores=scores, token_types=types, **meta)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_and_a_gguf_of_it(tmp_path, prefix):
    (tmp_path / "gguf").mkdir()
    processor = train_sentencepiece(tmp_path, add_dummy_prefix=prefix)
    write_gguf_tokenizer(gguf_of(processor, tmp_path / "model.gguf", add_space_prefix=prefix), tmp_path / "gguf")
    model, json_file = Tokenizer(tmp_path), Tokenizer(tmp_path / "gguf")
    for tokenizer in (model, json_file):
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (1200, 1, 2)
        assert tokenizer.control_id("<s>") == 1 and tokenizer.control_id("▁") is None
        assert_round_trip(tokenizer, {0x2581}, step=1 if tokenizer is model and prefix else 50)
        assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"  # the way sentencepiece writes a space
        ids = [1, *tokenizer.encode(" hi"), 2, *tokenizer.encode("</s>x"), tokenizer.control_id("<ctl>"), 0, 1200]
        assert tokenizer.decode(ids) == "<s> hi</s></s>x<ctl><unk>"
    assert json_file.backend.controls == model.backend.controls
    assert json_file.backend.tokenizer.encode("").ids == [1]  # other readers of the file find the bos there
    strings = varied_strings(3000, seed=4) + [char * n for char in " a=-0\n." for n in range(1, 40)]
    strings += ["<s>", "a</s>b", "<unk>", "<ctl>", "<0x0A>", "\u2581", "a \u2581b", ""]
    assert model.encode_batch(strings) == [processor.encode(s) for s in strings]
    assert json_file.encode_batch(strings) == [processor.encode(s) for s in strings]


def small_bpe() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(varied_strings(300, seed=5), trainer)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def gpt2_meta() -> dict:
    content = json.loads(small_bpe().to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    types = [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 3) + [TokenType.USER_DEFINED]
    merges = [" ".join(pair) for pair in content["merges"]]
    return dict(tokenizer_model="gpt2", token_list=tokens[:-1] + ["<think>"], token_types=types,
                token_merges=merges[:-1], bos_token_id=0, eos_token_id=1)  # fmt: skip


TEXT = "It's 12345 X'Sam\r\n\n y  z 7!!\nok\t\tgo "
WORDS = {  # llama.cpp's definitions by hand
    "gpt-2": "It|'s| 12345| X|'|Sam|\r\n\n| y| | z| 7|!!|\n|ok|\t|\t|go| ",
    "smollm": "It|'s| |1|2|3|4|5| X|'|Sam|\r\n\n| y| | z| |7|!!|\n|ok|\t|\t|go| ",
    "llama-bpe": "It|'s| |123|45| X|'S|am|\r\n\n| y| | z| |7|!!\n|ok|\t|\tgo| ",
}


@pytest.mark.parametrize("pre", WORDS)
def test_byte_level_gguf(tmp_path, pre):
    meta = gpt2_meta()
    meta["token_list"][-2], meta["token_merges"] = "Sam", meta["token_merges"][:-1]  # no merge makes it
    write_gguf_tokenizer(write_gguf(tmp_path / "m.gguf", tokenizer_pre=pre, **meta), tmp_path)
    tokenizer = Tokenizer(tmp_path)
    split = tokenizer.backend.tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert "|".join(TEXT[start:end] for _, (start, end) in split) == WORDS[pre]
    vocab = {token: i for i, token in enumerate(meta["token_list"])}
    is_llama3 = pre == "llama-bpe"
    assert (tokenizer.encode("Sam") == [vocab["Sam"]]) == is_llama3  # it takes a word that is a token as a whole
    assert tokenizer.bos_id == (0 if is_llama3 else None)  # unless the file says otherwise
    assert_round_trip(tokenizer, set(), step=50)
    assert vocab["<think>"] in tokenizer.encode("a<think>b") and tokenizer.control_id("<think>") is None
    assert tokenizer.decode(tokenizer.encode("a<think> b")) == "a<think> b"
    write_gguf_tokenizer(write_gguf(tmp_path / "m.gguf", tokenizer_pre=pre, add_bos_token=False, **meta), tmp_path)
    assert Tokenizer(tmp_path).bos_id is None


def test_control_and_user_defined_tokens_of_sentencepiece(tmp_path):
    normal = ["▁", "a", "b", "▁b", "<", "/", "s", ">", "s>", "/s>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *normal, "<think>"]
    types = [TokenType.UNKNOWN, 3, 3, *[TokenType.BYTE] * 256, *[1] * len(normal), TokenType.USER_DEFINED]
    meta = dict(tokenizer_model="llama", token_list=tokens, token_types=types, token_scores=[0.0] * len(tokens))
    write_gguf_tokenizer(write_gguf(tmp_path / "m.gguf", **meta), tmp_path)
    tokenizer = Tokenizer(tmp_path)
    pieces = {"a<think>b": "▁ a <think> ▁b", "</s>": "▁ < /s>"}  # as llama.cpp has them; never </s> from its pieces
    for text, expected in pieces.items():
        assert [tokens[i] for i in tokenizer.encode(text)] == expected.split()
    for text in ("a<think>b", "a<think> b", "<think>", " <think> "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_truncation_and_padding(tmp_path):
    backend = small_bpe()
    backend.enable_truncation(3)
    backend.enable_padding(length=8, pad_id=0)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("some longer text")) == "some longer text"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    settings.write_text('{"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": true}')
    assert Tokenizer(tmp_path).bos_id == 0
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings.write_text('{"eos_token": "</s>", "bos_token": "<s>", "chat_template": "{{ x }}"}')
    assert Tokenizer(tmp_path).bos_id == 0 and Tokenizer(tmp_path).chat_template == "{{ x }}"
    settings.write_text('{"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": false}')
    assert Tokenizer(tmp_path).bos_id is None
    settings.unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id) == (0, 1)
    backend.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).bos_id is None


# ---------------------------------------------------------------------------------------------- errors


def test_errors_of_a_folder(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name} holds neither .* convert"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="is not a sentencepiece model.*tokenizer.json"):
        Tokenizer(tmp_path)
    small_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    for rows, fits in {899: False, 900: True, 1024: True, 1923: True, 1924: False, 32000: False}.items():
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows}))
        if fits:
            Tokenizer(tmp_path)
            continue
        with pytest.raises(UserError, match=f"{tmp_path.name}: the tokenizer has 900 tokens, but the model {rows}"):
            Tokenizer(tmp_path)


def test_errors_of_a_gguf(tmp_path):
    for change, message in (
        ({"tokenizer_model": "rwkv"}, "of kind 'rwkv'; known kinds: gpt2, llama"),
        ({"tokenizer_pre": "qwen2"}, "pre-tokenizer is 'qwen2'; known ones: .*smollm"),
        ({"tokenizer_model": "llama"}, "900 tokens but 0 scores"),
        ({"token_types": [1]}, "900 tokens and 1 token types"),
        ({"token_merges": ["no such"]}, "1 merges do not fit its 900 tokens"),
        ({"eos_token_id": 900}, "eos token is 900, but it has 900 tokens"),
    ):
        reader = write_gguf(tmp_path / "m.gguf", **{"tokenizer_pre": "gpt-2", **gpt2_meta(), **change})
        with pytest.raises(UserError, match=message):
            write_gguf_tokenizer(reader, tmp_path)
        assert not (tmp_path / "tokenizer.json").exists()


def test_tokens_that_a_folder_adds_to_a_sentencepiece_model(tmp_path):
    """As Hugging Face writes them: added_tokens.json and special_tokens_map.json. The ids are those of transformers."""
    base = make_base(tmp_path / "base", vocab_size=1202)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    train_sentencepiece(base)
    (base / "added_tokens.json").write_text('{"<|im_start|>": 1200, "<|im_end|>": 1201}')
    (base / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    talk = [{"role": "user", "content": "a cat <|im_end|>"}, {"role": "assistant", "content": "Yes. "}]
    for legacy in (True, False):
        (base / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "chat_template": CHATML}))
        ours = Tokenizer(base)
        assert ours.controls["<|im_end|>"] == 1201 == ours.eos_id and ours.vocab_size == 1202
        ids = encode_prompt(talk, choose_template(None, ours), ours)
        assert ids.count(1201) == 2 and ours.decode(ids).count("<|im_end|>") == 3
        export_hf(base, tmp_path / f"hf{legacy}")
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"hf{legacy}")
        honest = [{**talk[0], "content": "a cat"}, talk[1]]
        expected = theirs.apply_chat_template(honest, return_dict=False)
        assert encode_prompt(honest, choose_template(None, ours), ours) == expected
