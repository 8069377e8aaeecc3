"""Whatever bytes come: data files are read or refused, and prompts never leak into targets."""

import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_llama.common.errors import UserError
from lit_llama.data.batches import IGNORE, TokenizedSample
from lit_llama.data.prompts import STYLES, choose_template, encode_prompt, end_of_answer
from lit_llama.data.samples import SUFFIXES, Sample, read_samples, to_sample
from lit_llama.data.task import encode_samples

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
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


def read(content: bytes, suffix: str) -> list[Sample]:
    """The samples, none where the file is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            samples, _ = read_samples(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return []
    assert samples and [sample.row for sample in samples] == list(range(len(samples)))
    assert all(isinstance(part, str) for sample in samples for part in (sample.key(), sample.text or ""))
    return samples


as_json = st.lists(rows, max_size=4).map(lambda content: json.dumps(content, indent=1).encode())
as_jsonl = st.lists(rows, max_size=4).map(lambda content: "\n".join(map(json.dumps, content)).encode())


@fuzz
@given(st.binary(max_size=200) | as_json | as_jsonl, st.sampled_from(SUFFIXES), st.integers(0, 400), st.binary())
def test_any_bytes_are_read_or_refused(content, suffix, at, change):
    read(content, suffix)
    read(content[:at] + change + content[at + len(change) :], suffix)


@fuzz
@given(
    st.sampled_from(STYLES),
    st.lists(st.tuples(spelled, spelled), min_size=1, max_size=3),
    st.one_of(st.none(), spelled),
    st.integers(3, 300),
)
def test_targets_are_the_answers_and_their_ends(tokenizer, style, turns, system, max_seq_length):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sample = to_sample({"messages": messages}, "here")
    template = choose_template(style, tokenizer)
    end = [end_of_answer(template, tokenizer)]
    answers = [tokenizer.encode(answer) + end for _, answer in turns]
    expected = sum(answers, [])
    if not encode_prompt(messages[: 1 + (system is not None)], template, tokenizer):
        expected = expected[1:]  # what nothing precedes cannot be predicted
    others = [to_sample({"text": "ab"}, "here")] * 2  # encoded at the same time, and trained on at any length

    def encoded(length: int) -> TokenizedSample | None:
        kept, found = encode_samples([others[0], sample, others[1]], template, tokenizer, length)
        return next((ids for one, ids in zip(kept, found, strict=True) if one is sample), None)

    whole = encoded(10**6)
    if len(expected) < 2:  # a single, empty answer teaches nothing
        assert whole is None
    else:
        assert [target for target in whole.targets if target != IGNORE] == expected
        prompt = encode_prompt(messages[:-1], template, tokenizer)
        assert whole.ids[: len(prompt)].tolist() == prompt  # what generation asks is what training masks
    cut = encoded(max_seq_length)
    if whole is not None and len(whole.ids) < max_seq_length:
        assert (cut.ids, cut.targets) == (whole.ids, whole.targets)
    elif whole is not None and sum(target != IGNORE for target in whole.targets[: max_seq_length - 1]) > 2:
        assert cut is not None  # with something of an answer
    if cut is not None:
        trained = [target for target in cut.targets if target != IGNORE]
        assert len(cut.ids) < max_seq_length and trained[-1:] == end
        assert trained[:-1] == expected[: len(trained) - 1]
