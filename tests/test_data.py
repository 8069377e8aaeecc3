"""Reading, splitting, masking, truncating and batching."""

import csv
import gzip
import hashlib
import json
import random

import pytest
import torch
from chat_templates import TEMPLATES
from helpers import CONTROLS, make_base, sums, write_rows
from pyarrow import Table, parquet
from safetensors.torch import load_file

from lit_llama.common.errors import UserError
from lit_llama.common.files import save_tensors
from lit_llama.data.batches import IGNORE, TokenizedSample, epoch_order, micro_batches, pack, step_indices
from lit_llama.data.prompts import choose_template, style_of
from lit_llama.data.samples import UNSUPPORTED, Sample, read_samples, to_sample
from lit_llama.data.task import encode_samples, hash_fraction, load_splits, load_task
from lit_llama.settings import DataOptions


def sample_of(row: dict) -> Sample:
    return to_sample(row, "test:1")


def test_the_same_rows_in_files_of_every_kind(tmp_path):
    given = 'a, "b"\n\tc\u2028d\x0ce'  # only a line feed ends a line
    rows = [
        {"instruction": "a", "input": given, "output": "ü"},
        {"instruction": "b", "input": "", "output": "c" * 200_000},
    ]
    lines = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(tmp_path / f"a{suffix}", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([rows[0], *(row.values() for row in rows)])
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        samples, _ = read_samples(path)
        assert samples[0].prompt == [{"role": "user", "content": "a", "input": given}], path
        assert [sample.answer for sample in samples] == ["ü", "c" * 200_000], path
    (tmp_path / "a.txt").write_bytes("first\u2028line\r\n\nsecond line\n".encode())
    assert [sample.text for sample in read_samples(tmp_path / "a.txt")[0]] == ["first\u2028line", "second line"]


BAD = {
    "a.xml": ("<a/>", "data files end in .json"),
    "empty.json": ("[]", "holds no rows"),
    "object.json": ('{"a": 1}', "object.json: a .json file must hold an array"),
    "broken.json": ('[\n{"instruction": "a", "output": "b"},\n{"instruction": }\n]', "is not valid JSON: .*line 3"),
    "deep.json": ("[" * 100_000, "deep.json is not valid JSON: .*recursion"),
    "number.json": ('[{"text": "a"},\n\n 7]', "number.json, row 2: a row must be an object, got int"),
    "keys.json": ('[{"question": "a"}]', "keys.json, row 1: no format .* the columns 'question'; name .* --columns"),
    "type.jsonl": ('{"text": "a"}\n{"text": null}\n', "type.jsonl:2: text must be a string, got None"),
    "line.jsonl": ('{"text": "a"}\n\n{"text": \n', "line.jsonl:3 is not valid JSON"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "latin1.jsonl cannot be read as UTF-8 text: .*position 24"),
    "messages.jsonl": ('{"messages": "a"}', "messages must be a list of objects with role and content"),
    "turns.jsonl": ('{"messages": ["a"]}', "messages must be objects with role and content, got 'a'"),
    "role.jsonl": ('{"messages": [{"role": "boss", "content": "a"}]}', "role.jsonl:1: a message needs a role"),
    "tool.jsonl": ('{"messages": [{"role": "bot", "content": "a", "tool_calls": [1]}]}', "tool_calls is not supported"),
    "silent.jsonl": ('{"messages": [{"role": "user", "content": "a"}]}', "silent.jsonl:1: messages hold no assistant"),
    "rated.jsonl": ('{"prompt": "a", "completion": "b", "label": false}', "rated completions are not supported"),
    "weight.jsonl": ('{"messages": [{"role": "bot", "content": "a", "weight": 2}]}', "weight .* must be 0 or 1"),
    "history.jsonl": ('{"instruction": "a", "output": "b", "history": ["c"]}', "history must be a list of"),
    "ragged.csv": ("text,label\na,b\nc\n", "ragged.csv:3: the row does not have the header's 2 columns"),
    "twice.csv": ("text,text\na,b\n", "twice.csv: the header names a column twice: text, text"),
    "quote.csv": ('text,label\na,"b\n', "quote.csv:1: unexpected end of data"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}')[:-9], "cut.jsonl.gz cannot be read .*Compressed file ended"),
    "a.parquet": ("PAR1", "a.parquet is not a parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_line_and_reason(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_samples(tmp_path / name)


USER, ANSWER, SYSTEM = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
ASKED = {**USER, "input": ""}
HISTORY = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
ROWS = [
    ({"messages": [USER, ANSWER], "system": "s"}, [SYSTEM, USER, ANSWER]),
    ({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, [USER, {**ANSWER, "weight": 0}, USER, ANSWER]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}, ANSWER]}, [USER, ANSWER]),
    ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, [USER, ANSWER]),
    ({"instruction": "u", "output": "a", "system": "s"}, [SYSTEM, ASKED, ANSWER]),
    ({"instruction": "u", "input": None, "output": "a", "history": [["q", "r"]]}, [*HISTORY, ASKED, ANSWER]),
    ({"instruction": "u", "context": "c", "response": "a"}, [{**USER, "input": "c"}, ANSWER]),
    ({"prompt": "u", "completion": "a"}, [ASKED, ANSWER]),
    ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
    ({"question": "u", "answer": "a"}, [ASKED, ANSWER]),
    ({"text": "u", "label": 3}, [USER, {"role": "assistant", "content": "3"}]),
]


@pytest.mark.parametrize("row, messages", ROWS)
def test_rows_as_the_field_writes_them(row, messages):
    assert sample_of(row).messages == messages and sample_of(row).unread == ()
    more = {**row, "id": 7, "images": [], "tools": None}
    assert sample_of(more).messages == messages and sample_of(more).unread == ("id", "images", "tools")
    for key in UNSUPPORTED:
        with pytest.raises(UserError, match=f"test:1: {key} is not supported"):
            sample_of({**row, key: ["something"]})


def test_what_is_not_read_is_noted(tmp_path):
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    lines = [json.dumps({"question": str(i), "answer": "a"}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, '{"question": "cut']))
    write_rows(tmp_path / "dev.json", [{"messages": turns, "source": "web"}, {"messages": turns[:2]}, {"messages": []}])
    write_rows(tmp_path / "test.json", sums(3))
    write_rows(tmp_path / "more.json", sums(3))
    train, validation, notes = load_splits(tmp_path, DataOptions(skip_bad_rows=True))
    assert len(train) == 20 and [len(sample.messages) for sample in validation] == [2, 2]
    assert notes == [
        f"train.jsonl: 1 bad rows left out; the first: {tmp_path / 'train.jsonl'}:21 is not valid JSON: Unterminated "
        "string starting at: line 1 column 14 (char 13)",
        "dev.json: source ignored in 1 rows",
        "dev.json: turns after the last answer ignored in 1 rows",
        f"dev.json: 1 bad rows left out; the first: {tmp_path / 'dev.json'}, row 3: messages hold no assistant turn to "
        "learn",
        f"{tmp_path}: files ignored: more.json",
        f"{tmp_path / 'test.json'} is left for scripts/evaluate.py --split test",
    ]


def test_columns_are_renamed(tmp_path):
    rows = [{"query": f"q{i}", "reply": "r", "output": i} for i in range(30)] + [{"query": 5, "reply": "r"}]
    path = write_rows(tmp_path / "a.json", rows)
    columns = {"instruction": "query", "output": "reply"}
    with pytest.raises(UserError, match="row 31: instruction must be a string, got 5"):
        load_splits(path, DataOptions(columns))
    train, validation, _ = load_splits(path, DataOptions(columns, skip_bad_rows=True))
    assert len(train) + len(validation) == 30 and len(validation) == 10 and train[0].answer == "r"
    with pytest.raises(UserError, match="none of 31 rows can be read; the first: .*, row 1: no format"):
        load_splits(path, DataOptions(skip_bad_rows=True))
    with pytest.raises(UserError, match="row 1: --columns names ask; the row has query, reply, output"):
        load_splits(path, DataOptions({"instruction": "ask"}))


def test_a_folder_needs_one_file_for_each_split(tmp_path):
    write_rows(tmp_path / "dev.json", sums(3))
    with pytest.raises(UserError, match="no train file"):
        load_splits(tmp_path)
    write_rows(tmp_path / "eval.json", sums(3))
    with pytest.raises(UserError, match="holds dev.json and eval.json; keep one"):
        load_splits(tmp_path)


def test_a_folder_of_texts_is_a_document_each_and_long_ones_train_whole(tmp_path, base):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"{i}: " + "word " * 30)
    task = load_task(tmp_path, base, 64)
    texts = "".join(task.tokenizer.decode(sample.targets) for sample in task.train + task.validation)
    assert texts.count("word ") == 12 * 30 and texts.count("<|im_end|>") == 12
    assert task.longest == 63 and style_of(task.chat_template) == "plain" and not task.held_out


def test_what_is_probably_not_meant_is_warned_of(tmp_path):
    base = make_base(tmp_path / "base")
    rows = [{"text": f"<|im_start|>user {i}<|im_end|>"} for i in range(30)]
    assert "warning: plain texts spell control tokens such as <|im_start|>" in load_task(rows, base, 64).summary
    assert "warning" not in load_task(sums(30), base, 64).summary
    tensors = load_file(base / "model.safetensors")
    table = tensors["transformer.wte.weight"]
    for like, names in ((0 * table[0], "<|im_start|>"), (table[2], "<|im_end|>, <|im_start|>")):
        table[CONTROLS.index("<|im_start|>")] = like
        save_tensors(base / "model.safetensors", tensors)
        assert f"warning: the base has not learned {names}, as" in load_task(sums(30), base, 64).summary
        assert "warning" not in load_task(sums(30), base, 64, DataOptions(prompt_style="plain")).summary


def test_split_by_hash_is_disjoint_stable_and_about_the_fraction(tmp_path, monkeypatch):
    """From a file and from Python; validation has the smallest hashes, so a limit and new rows move few samples."""
    train, validation, _ = load_splits(write_rows(tmp_path / "a.json", sums(1000)), DataOptions(val_fraction=0.2))
    assert len(train) + len(validation) == 1000 and 150 < len(validation) < 250
    fractions = [hash_fraction(sample.key()) for sample in validation]
    assert max(fractions) < min(hash_fraction(sample.key()) for sample in train)
    _, more, _ = load_splits(sums(1300)[::-1], DataOptions(val_fraction=0.2))
    assert {sample.key() for sample in validation} <= {sample.key() for sample in more}
    monkeypatch.setattr("lit_llama.data.task.MAX_VALIDATION", 20)
    _, largest, _ = load_splits(sums(1000))
    assert [hash_fraction(sample.key()) for sample in largest] == [x for x in fractions if x <= sorted(fractions)[19]]
    with pytest.raises(UserError, match="data: 1 rows are too few"):
        load_splits(sums(1))


def test_the_summary_says_what_was_found_and_held_out_samples_have_a_prompt_and_their_whole_answer(tmp_path, base):
    long = {"question": "a", "answer": "y" * 300}
    greeting = {"messages": [{"role": "assistant", "content": "hello"}]}
    write_rows(tmp_path / "train.json", [*sums(5), {"instruction": "x" * 300, "output": "dropped"}])
    write_rows(tmp_path / "validation.json", [greeting, long, *sums(7)[3:]])
    task = load_task(tmp_path, base, 100, DataOptions(show_sample=True, prompt_style="plain"))
    assert "5 training samples, 6 for validation, prompt style plain; 1 dropped: nothing to learn" in task.summary
    assert "; 1 cut to max_seq_length; 2 of validation also in training" in task.summary
    assert "in brackets:\na|d|d|" in task.summary and task.summary.endswith("[<|im_end|>]")
    assert [sample.answer for sample in task.held_out] == [row["output"] for row in sums(7)[3:]]


def test_the_fingerprint_is_that_of_earlier_versions(base):
    task = load_task(sums(60), base, 100)
    rows = [[list(sample.ids), list(sample.targets)] for sample in task.train + task.validation]
    assert task.fingerprint == hashlib.sha256("".join(map(json.dumps, rows)).encode()).hexdigest()


def test_rows_that_cannot_be_encoded_are_named_or_left_out(tmp_path):
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATES["llama2"][0])
    refused, broken = {"messages": [USER, USER, ANSWER]}, {"text": "\ud83d"}
    for bad, message in ((refused, "the chat template refuses this: .* roles"), (broken, "the text holds a lone surr")):
        with pytest.raises(UserError, match=f"^row 31: {message}"):
            load_task([*sums(30), bad], base, 100)
        assert "; 1 dropped: " in load_task([*sums(30), bad], base, 100, DataOptions(skip_bad_rows=True)).summary


def test_truncation_keeps_the_end_of_the_answer(tokenizer):
    def encoded(question: str, answer: str, length: int) -> TokenizedSample:
        sample = sample_of({"question": question, "answer": answer})
        return encode_samples([sample], choose_template("plain", tokenizer), tokenizer, length)[1][0]

    for length in (*range(3, 12), 512):
        sample = encoded("q", "abcdefghij", length)
        text = tokenizer.decode([target for target in sample.targets if target != IGNORE])
        assert text == "abcdefghij"[: length - 2] + "<|im_end|>" and len(sample.ids) == min(length - 1, 11)
    for question, answer, length in (("q", "a", 2), ("long prompt", "a", 8), ("q", "", 8)):
        with pytest.raises(UserError, match=f"none of 1 samples .* begins within max_seq_length {length}"):
            encoded(question, answer, length)


def test_steps_take_the_samples_of_an_epoch_in_an_order_that_is_drawn_once():
    epoch_order.cache_clear()
    steps = [step_indices(step, 4, 10, seed=5, epochs=1) for step in range(3)]
    assert epoch_order.cache_info().misses == 1
    order = list(range(10))
    random.Random("5 0").shuffle(order)  # the order that earlier versions trained in
    assert sum(steps, []) == order and len(steps[2]) == 2
    assert step_indices(2, 4, 10, seed=5)[:2] == order[8:] and len(step_indices(2, 4, 10, seed=5)) == 4
    second = sum((step_indices(step, 5, 10, seed=5) for step in (2, 3)), [])
    assert sorted(second) == sorted(order) and second != order
    assert step_indices(0, 4, 10, seed=6) != steps[0]


@pytest.mark.parametrize("max_tokens", [1, 150, 1024])
def test_micro_batches_hold_every_sample_once_within_the_limit(max_tokens):
    rng = random.Random(0)
    samples = [TokenizedSample([1] * rng.randint(5, 200), [2] * 5) for _ in range(300)]
    batches = micro_batches(samples, max_tokens)
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, samples))
    tokens = [sum(len(sample.ids) for sample in batch) for batch in batches]
    assert all(n <= max_tokens or len(batch) == 1 for n, batch in zip(tokens, batches, strict=True))
    if max_tokens == 1024:
        assert len(batches) == -(-sum(tokens) // 1024), "no number of batches is smaller"


def test_packed_samples_lie_one_after_the_other():
    samples = [TokenizedSample([1, 2, 3], [IGNORE, 5, 6]), TokenizedSample([4], [7])]
    assert pack(samples, torch.device("cpu")).ids.tolist() == [[1, 2, 3, 4]]
    packed = pack(samples, torch.device("cpu"), [91, 92], text_multiple=4, row_multiple=20, context=6)
    assert packed.texts.lengths == [6, 4, 6, 4], "8 tokens exceed the context; 10 of padding are two texts"
    assert packed.ids.tolist() == [[91, 92, 1, 2, 3, 0, 91, 92, 4, 0] + [0] * 10]
    assert packed.texts.positions.tolist() == [*range(6), *range(4), *range(6), *range(4)]
    bounds = packed.texts.bounds
    assert bounds[:5].tolist() == [0, 6, 10, 16, 20] and set(bounds[5:].tolist()) == {20}
    assert bounds.dtype == torch.int32 and packed.texts.longest == 8
    assert packed.targets.tolist() == [5, 6, 7] and packed.places.tolist() == [3, 4, 8]
