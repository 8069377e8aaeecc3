"""Whatever bytes come: files are read or refused, prompts never leak into targets, and nothing else happens."""

import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers import make_base, make_trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_llama.checkpoint import load_model
from lit_llama.cli import UserError
from lit_llama.data.batches import IGNORE
from lit_llama.data.prompts import END_OF_TURN, EOS, STYLES, encode_control, encode_pieces, encode_prompt
from lit_llama.data.samples import SUFFIXES, Sample, read_samples, to_sample
from lit_llama.data.task import tokenize_samples
from lit_llama.generate.load import load_trained_folder
from lit_llama.tokenizer import Tokenizer
from lit_llama.trained import trained_tensors

often, sometimes = (settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck)) for n in (150, 60))
text = st.text(st.characters(codec="utf-8"), max_size=30)
spelled = st.one_of(text, st.sampled_from(["<|im_end|>", "<|im_start|>user\n", "</s>", "[/INST]", "### Response:\n"]))
scalar = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9))
anything = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))
keys = st.sampled_from(["instruction", "input", "output", "messages", "text", "label", "role", "content"])
rows = st.one_of(
    st.dictionaries(keys, anything, max_size=5),
    st.fixed_dictionaries({"messages": st.lists(st.dictionaries(keys, scalar, max_size=3), max_size=4)}),
    anything,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("fuzz") / "base")


@pytest.fixture(scope="module")
def tokenizer(base):
    return Tokenizer(base)


# the data reader


def read(content: bytes, suffix: str) -> list[Sample]:
    """The samples, none where the file is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            samples = read_samples(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return []
    assert samples and [sample.row for sample in samples] == list(range(len(samples)))
    assert all(isinstance(part, str) for sample in samples for part in (sample.key(), sample.text or ""))
    return samples


@often
@given(st.binary(max_size=200), st.sampled_from(SUFFIXES))
def test_any_bytes_are_read_or_refused(content, suffix):
    read(content, suffix)


@often
@given(st.lists(rows, max_size=4), st.sampled_from([".json", ".jsonl"]), st.integers(0, 400), st.integers(0, 255))
def test_any_json_with_a_spoiled_byte_is_read_or_refused(content, suffix, at, byte):
    lines = "\n".join(map(json.dumps, content)) if suffix == ".jsonl" else json.dumps(content, indent=1)
    data = bytearray(lines.encode())
    read(bytes(data), suffix)
    data[at : at + 1] = bytes([byte])
    read(bytes(data), suffix)


@often
@given(st.lists(st.lists(text, min_size=2, max_size=2), min_size=1, max_size=4), st.booleans())
def test_json_and_csv_bring_back_what_was_written(content, as_csv):
    import csv
    import io

    if as_csv:
        out = io.StringIO()
        csv.writer(out).writerows([["instruction", "output"], *content])
        data = out.getvalue().encode()
    else:
        data = "\n".join(json.dumps({"instruction": a, "output": b}) for a, b in content).encode()
    samples = read(data, ".csv" if as_csv else ".jsonl")
    if samples or not as_csv:
        assert [[sample.prompt[0]["content"], sample.answer] for sample in samples] == content


# prompts and masks


@often
@given(
    st.sampled_from(sorted(set(STYLES) - {"llama3"})),  # this tokenizer has none of its control tokens
    st.lists(st.tuples(spelled, spelled), min_size=1, max_size=3),
    st.one_of(st.none(), spelled),
    st.integers(3, 300),
)
def test_targets_are_the_answers_and_their_ends(tokenizer, style, turns, system, max_seq_length):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sample = to_sample({"messages": messages}, "here")
    end = encode_control(END_OF_TURN.get(style, EOS), tokenizer)
    answers = [tokenizer.encode(answer) + end for _, answer in turns]
    expected = sum(answers, [])
    if not encode_prompt(messages[: 1 + (system is not None)], style, tokenizer):
        expected = expected[1:]  # what nothing precedes cannot be predicted
    other = to_sample({"text": "ab"}, "here")  # encoded at the same time, and trained on at any length
    _, (_, *found, _) = tokenize_samples([other, sample, other], style, tokenizer, 10**6)
    whole = found[0] if found else None
    if len(expected) < 2:  # a single, empty answer teaches nothing
        assert whole is None
    else:
        assert [target for target in whole.targets if target != IGNORE] == expected
        prompt = encode_prompt(messages[:-1], style, tokenizer)
        assert whole.ids[: len(prompt)].tolist() == prompt  # what generation asks is what training masks
    _, (_, *found, _) = tokenize_samples([other, sample, other], style, tokenizer, max_seq_length)
    for cut in found:
        trained = [target for target in cut.targets if target != IGNORE]
        assert len(cut.ids) < max_seq_length and trained[-1:] == end
        assert trained[:-1] == expected[: len(trained) - 1]


@often
@given(st.lists(st.lists(st.tuples(st.one_of(spelled, st.just(EOS)), st.booleans()), max_size=5), max_size=5))
def test_pieces_of_many_rows_are_encoded_as_one_by_one(tokenizer, rows):
    library = tokenizer.backend.tokenizer
    for row, (ids, trains) in zip(rows, encode_pieces(rows, tokenizer), strict=True):
        alone = [[tokenizer.eos_id] if p is EOS else library.encode(p, add_special_tokens=False).ids for p, _ in row]
        assert ids == sum(alone, [])
        assert trains == [train for (_, train), new in zip(row, alone, strict=True) for _ in new]


@often
@given(spelled)
def test_user_text_never_makes_a_control_token(tokenizer, words):
    assert not set(tokenizer.encode(words)) & set(tokenizer.backend.controls.values())
    assert tokenizer.decode(tokenizer.encode(words)) == words


# checkpoints and trained folders

edits = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


def spoil(path: Path, edits: list[tuple[int, int]], cut: int) -> bytes:
    """Overwrite bytes of a file, and cut off its end; returns what it was."""
    content = path.read_bytes()
    spoiled = bytearray(content[: len(content) - cut])
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(spoiled)
    for at, byte in edits:
        spoiled[at % (header if at % 2 else len(spoiled))] = byte  # every second one in the header
    path.write_bytes(spoiled)
    return content


def check(load, path: Path, changes, cut, expected) -> None:
    """Spoiled, the file is refused or its tensors are equal; and little more memory was asked for than it has bytes."""
    content = spoil(path, changes, cut)
    tracemalloc.start()
    try:
        found = load()
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    finally:
        assert tracemalloc.get_traced_memory()[1] < 10 * len(content) + 5e6
        tracemalloc.stop()
        path.write_bytes(content)


@pytest.fixture(scope="module")
def base_tensors(base):
    return {name: tensor.clone() for name, tensor in load_model(base).named_parameters()}


@sometimes
@given(edits, st.sampled_from([0, 0, 1, 100]), st.sampled_from(["model.safetensors", "config.json"]))
def test_a_spoiled_checkpoint_is_refused_or_equal(base, base_tensors, changes, cut, name):
    check(lambda: dict(load_model(base).named_parameters()), base / name, changes, cut, base_tensors)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    model = make_trained(folder, base)
    return folder, {name: tensor.detach().clone() for name, tensor in trained_tensors(model).items()}


@sometimes
@given(edits, st.sampled_from([0, 0, 1, 100]), st.sampled_from(["trained.safetensors", "method.json"]))
def test_a_spoiled_trained_folder_is_refused_or_equal(trained, changes, cut, name):
    folder, expected = trained
    check(lambda: trained_tensors(load_trained_folder(folder)[0]), folder / name, changes, cut, expected)
