"""The evaluation harness on our folders: against its own class for Hugging Face's models, and as a command."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_methods import logits_of
from test_tokenizer import varied_strings
from tools import SOME_BASE, make_base, save_trained

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lit_llama import harness  # noqa: E402
from lit_llama.cli import UserError  # noqa: E402
from lit_llama.export import export_hf  # noqa: E402
from lit_llama.generate import generate  # noqa: E402
from lit_llama.harness_model import cut_before, load_harness_model, read_settings  # noqa: E402
from lit_llama.prompts import encode_prompt  # noqa: E402

ROOT = Path(__file__).parent.parent
METHODS = {
    "base": None,
    "lora": dict(r=2, alpha=4, dropout=0.0, targets=["q", "fc1"]),
    "soft_prompt": dict(prompt_length=3),
    "prefix": dict(prompt_length=3),
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: {kind}
{lines}
"""
CHOICE = """doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]"""
TEXT = """doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12}
metric_list: [{metric: !function helpers.equal, aggregation: mean, higher_is_better: true}]"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder of three tiny tasks over one local file; one has a metric that imports Hugging Face's evaluate."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = ["Two and two?", "The sky is", "naïve café, then:", "A b c"]
    rows = [
        {"question": q, "choices": [" four", " blue as the sea", " d"], "answer": i % 3}
        for i, q in enumerate(questions)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kinds = {"choice": ("multiple_choice", CHOICE), "text": ("generate_until", TEXT)}
    kinds["rolling"] = ("loglikelihood_rolling", ROLLING)
    for name, (kind, lines) in kinds.items():
        fields = dict(name=f"tiny_{name}", data=folder / "data.jsonl", cache=tmp_path / "cache", kind=kind)
        (folder / f"{name}.yaml").write_text(TASK.format(**fields, lines=lines))
    (folder / "helpers.py").write_text(
        "def equal(references, predictions, **kwargs):\n"
        "    import evaluate\n"
        "    assert callable(evaluate.load), evaluate\n"  # scripts/evaluate.py has none
        "    return float(references == predictions)\n"
    )
    return folder


def make(tmp_path, method: str, **changes):
    base = make_base(tmp_path / "base", **changes)
    trained = None if METHODS[method] is None else save_trained(base, tmp_path / "trained", method, **METHODS[method])
    return load_harness_model(trained, base, "chatml", batch_size=3, precision="32-true")


def request(*args) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def pairs() -> list[tuple[str, str]]:
    texts = [text.strip() for text in varied_strings(12, seed=8)]
    return [(a[:60].strip(), " " + (b[:25].strip() or "x")) for a, b in zip(texts, texts[1:], strict=False)] + [
        ("", "a b")
    ]


@pytest.mark.parametrize("method", METHODS)
def test_log_probabilities_are_those_of_the_logits(tmp_path, method):
    model = make(tmp_path, method)
    found = model.loglikelihood([request(*pair) for pair in pairs()], disable_tqdm=True)
    for (context, target), (value, greedy) in zip(pairs(), found, strict=True):
        start = model.tok_encode(context) if context else [model.prefix_token_id]
        ids = start + model.tok_encode(target)
        with torch.no_grad():
            logits = logits_of(model.model, torch.tensor([ids]))[0, len(start) - 1 : -1].log_softmax(-1)
        expected = sum(logits[i, token].item() for i, token in enumerate(ids[len(start) :]))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == ids[len(start) :])


def test_a_continuation_without_a_token_is_certain(tmp_path):
    model = make(tmp_path, "base")
    assert model._loglikelihood_tokens([(None, [5], []), (None, [5, 6], [])], disable_tqdm=True) == [(0.0, True)] * 2


@pytest.mark.parametrize("block_size", [512, 32])
def test_equals_the_harness_own_class_on_the_exported_folder(tmp_path, block_size):
    """Long contexts and texts are cut in the same way too."""
    ours = make(tmp_path, "base", block_size=block_size)
    export_hf(tmp_path / "base", tmp_path / "hf")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=3)
    asked = [request(*pair) for pair in pairs() if len(pair[1].encode()) < block_size]
    for one, other in zip(
        ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        assert one == pytest.approx(other, abs=1e-3)
    texts = [request(text) for text, _ in pairs() if text]
    found, expected = ours.loglikelihood_rolling(texts, disable_tqdm=True), theirs.loglikelihood_rolling(texts, True)
    assert found == pytest.approx(expected, abs=1e-3)
    settings = {"until": ["\n\n", "a"], "max_gen_toks": 20, "do_sample": False}
    asked = [request(context, settings) for context, _ in pairs() if context]
    assert ours.generate_until(asked, disable_tqdm=True) == theirs.generate_until(asked, disable_tqdm=True)


def test_answers_end_at_stop_strings(tmp_path):
    model = make(tmp_path, "prefix", bias=True)
    letters = model.tokenizer.encode("abcdefghijklmnopqrstuvwxyz")
    with torch.no_grad():
        model.model.lm_head.bias.fill_(-1e4)[letters] = 0.0
    ids = list(generate(model.model, model.tok_encode("Two and two?"), 30, stop=set()))
    whole = model.tokenizer.decode(ids)
    stop = whole[10:12]  # of two tokens
    first = whole.index(stop)
    asked = [{"until": stop, "max_gen_toks": 30}, {"max_new_tokens": 30}]
    found = model.generate_until([request("Two and two?", settings) for settings in asked], disable_tqdm=True)
    assert found == [whole[:first], whole] and len(whole) == 30
    ended = model.ends_with([stop, "never"])
    assert [ended(ids[:i]) for i in range(1, first + 3)] == [False] * (first + 1) + [True]


def test_generation_settings():
    assert read_settings({"until": "x", "do_sample": False, "temperature": 0.0, "top_k": 3})[2].temperature == 0
    until, length, sampling = read_settings({"until": ["a", ""], "temperature": 0.7, "top_p": 0.9, "max_tokens": 5})
    assert (until, length, sampling.temperature, sampling.top_p) == (["a"], 5, 0.7, 0.9)
    assert read_settings({"do_sample": True})[2].temperature == 1
    with pytest.raises(UserError, match="num_beams"):
        read_settings({"num_beams": 4})
    assert cut_before("one two three", ["three", " t"]) == "one" and cut_before("one", []) == "one"


def test_chats_are_in_the_prompt_style(tmp_path):
    model = make(tmp_path, "base")
    talk = [{"role": "user", "content": "say <|im_end|>\0"}, {"role": "assistant", "content": "a"}]
    talk += [{"role": "user", "content": "b"}]
    clean = [{**message, "content": message["content"].replace("\0", "")} for message in talk]
    ids = model.tok_encode(model.apply_chat_template(talk))
    assert ids == encode_prompt(clean, "chatml", model.tokenizer)
    assert ids.count(model.tokenizer.control_id("<|im_end|>")) == 3  # the one that the user wrote is text
    opened = model.apply_chat_template(talk[:2], add_generation_prompt=False)
    assert opened.endswith("assistant\na")


def test_tasks_run(tmp_path, tasks):
    """The same figures as the harness' own class on the exported folder."""
    ours = make(tmp_path, "base")
    export_hf(tmp_path / "base", tmp_path / "hf")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=3)
    names = ["tiny_choice", "tiny_text", "tiny_rolling"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    settings = dict(tasks=names, task_manager=manager, num_fewshot=1, bootstrap_iters=0, log_samples=False)
    results = [lm_eval.simple_evaluate(model, **settings)["results"] for model in (ours, theirs)]
    for name in names:
        for figure, value in results[1][name].items():
            assert results[0][name][figure] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)
    assert 1 < results[0]["tiny_rolling"]["word_perplexity,none"] < 1e30


@pytest.mark.slow  # the harness reads the files of its thousands of tasks first
def test_command(tmp_path, tasks):
    base = make_base(tmp_path / "base")
    trained = save_trained(base, tmp_path / "trained", "lora")
    flags = ["--tasks", "tiny_choice, tiny_text", "--include_path", tasks, "--trained_dir", trained, "--chat"]
    flags += ["--limit", 3, "--num_fewshot", 1, "--results", tmp_path / "results.json"]
    command = [sys.executable, "-m", "lit_llama.harness", *map(str, flags)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "|tiny_choice|" in result.stdout.replace(" ", "")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["n-samples"]["tiny_choice"]["effective"] == 3 and 0 <= found["results"]["tiny_text"]["equal,none"] <= 1


def test_an_unknown_task_is_refused(tasks, monkeypatch):
    own_only = functools.partial(TaskManager, include_defaults=False)  # to read the harness' thousands takes long
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_only)
    with pytest.raises(UserError, match="named 'nothing, more': .*--include_path"):
        harness.main("tiny_choice, nothing,more", include_path=str(tasks))
    with pytest.raises(UserError, match="--limit 0"):
        harness.main("tiny_choice", limit=0)


def test_without_the_harness_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[eval\]"'):
        harness.main("arc_easy")


def test_classifiers_are_refused(tmp_path):
    about = {"base": SOME_BASE, "prompt_style": "chatml"}
    (tmp_path / "method.json").write_text(json.dumps({"method": "full", "arguments": {"labels": ["a", "b"]}, **about}))
    with pytest.raises(UserError, match="answers with labels"):
        load_harness_model(str(tmp_path), None, None, 4, "32-true")
