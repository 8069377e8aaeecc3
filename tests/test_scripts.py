"""The scripts as a user calls them, on a tiny base and on the real one: training, answers, labels, merging."""

import hashlib
import io
import json
import os
import re
import signal

import numpy as np
import pytest
import sklearn.linear_model
import torch
from chat_templates import TEMPLATES
from helpers import HEADERS, TALK, base_with_controls, metrics, refuse, run, save_trained, succeed, sums, write_rows
from transformers import AutoTokenizer

from lit_llama.checkpoint import load_model
from lit_llama.common.files import read_json, write_json
from lit_llama.data.prompts import STYLES, choose_template, encode_prompt, stop_ids, style_of
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.features import fit_logistic, probabilities
from lit_llama.settings import ROOT
from lit_llama.tokenizer import Tokenizer

SCRIPTS = {
    "adapter": ["--start_layer", 1],
    "adapter_v2": ["--start_layer", 1],
    "full": [],
    "houlsby": ["--bottleneck_size", 4],
    "lora": ["--targets", "[q, v, fc1]"],
    "output_layers": ["--n_blocks", 1],
    "prefix": ["--prompt_length", 4, "--mlp_size", 8],
    "soft_prompt": ["--prompt_length", 4, "--prompt_init", "text", "--init_text", "add"],
}
STEPS = ["--train.max_steps", 4, "--train.eval_every", 2, "--train.save_every", 2]
ASK = ["--prompt", "add 1 and 1", "--max_new_tokens", 6]


def flags_of(folder, method: str = "adapter", data: str = "sums") -> list:
    return ["--checkpoint_dir", folder / "base", "--data", folder / data, *SCRIPTS[method], *STEPS, "--eval_samples", 4]


def trained(folder, method: str, precision: str = "32-true"):
    """The folder of a run, made when it is first asked for; ``printed`` in it is what the script printed."""
    out = folder / f"out-{method}-{precision}"
    if not out.exists():
        printed = succeed(f"finetune/{method}.py", *flags_of(folder, method), "--out_dir", out)
        (out / "printed").write_text(printed)
    return out


# Training


@pytest.mark.parametrize("method", SCRIPTS)
def test_a_script_trains_and_saves_what_generate_and_evaluate_read(folder, method, auto):
    out = trained(folder, method, auto)
    printed = (out / "printed").read_text()
    assert "trainable parameters: " in printed and "exact match after" in printed and f"saved in {out}" in printed
    place = ["--checkpoint_dir" if method == "full" else "--trained_dir", out]
    answer = run(f"generate/{'base' if method == 'full' else 'adapter'}.py", *place, *ASK)
    assert answer.returncode == 0 and answer.stdout.endswith("\n") and "tokens/s" in answer.stderr
    evaluated = succeed("scripts/evaluate.py", "--trained_dir", out, "--data", folder / "sums")
    assert re.search(r"exact match: [\d.]+ % \(\d+ of 13\)", evaluated)
    best = min(float(row["val_loss"]) for row in metrics(out) if row["val_loss"])  # the saved step is the best one
    rounded = 5e-5 if auto == "32-true" else best * 2**-8  # a loss depends a little on what shares its batch
    assert float(re.search(r"loss ([\d.]+)", evaluated)[1]) == pytest.approx(best, abs=1.01 * rounded)


def test_a_run_says_what_it_does_and_writes_its_files(folder):
    out = trained(folder, "adapter")
    printed = (out / "printed").read_text()
    assert "40 training samples, 13 for validation, prompt style template" in printed
    assert "\n4 steps of 2 samples: 0.2 epochs\n" in printed
    assert "trainable parameters: 648 of " in printed
    assert re.search(r"exact match before: [\d.]+ %\n.*exact match after: [\d.]+ %\n", printed)
    assert printed.count("expected  ") == 3
    assert f"python generate/adapter.py --trained_dir {out}" in printed
    rows = metrics(out)
    assert list(rows[0]) == ["step", "loss", "lr", "grad_norm", "tokens", "seconds", "val_loss"]
    assert [(row["step"], bool(row["val_loss"])) for row in rows] == [(str(i), i % 2 == 0) for i in range(1, 5)]
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"printed"}
    run = {".lock", "method.json", "metrics.csv", "config.yaml", "costs.json", "state/state.safetensors"}
    assert written == run | {"trained.safetensors"}
    costs = read_json(out / "costs.json")
    assert costs["seconds"] > 0 and costs["peak_memory"] > 50e6


def test_the_saved_configuration_runs_again(folder, tmp_path):
    out = trained(folder, "adapter")
    config = (out / "config.yaml").read_text()
    assert not {"resume", "overwrite", "yes"} & {line.split(":")[0] for line in config.splitlines()}
    succeed("finetune/adapter.py", "--config", out / "config.yaml", "--out_dir", tmp_path)
    found = [[(row["loss"], row["lr"], row["val_loss"]) for row in metrics(path)] for path in (out, tmp_path)]
    assert found[0] == found[1] and len(found[0]) == 4


def test_nobody_waits_for_answers_before_a_resumed_run_is_refused(folder, monkeypatch):
    monkeypatch.setattr("lit_llama.devices.launch.SECONDS_BETWEEN_LINES", 0.0)
    flags = [*flags_of(folder), "--out_dir", trained(folder, "adapter"), "--resume"]
    for more, answers in (([], True), (["--prompt_length", 5], False)):
        assert ("before 0/" in run("finetune/adapter.py", *flags, *more).stderr) == answers


def test_ctrl_c_saves_and_says_how_to_go_on(folder, tmp_path, monkeypatch):
    def validate_and_press(*_) -> float:  # after the second step
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    monkeypatch.setattr("lit_llama.train.evaluate.validate", validate_and_press)
    result = run("finetune/adapter.py", *flags_of(folder), "--out_dir", tmp_path)
    assert result.returncode == 130 and "saved at step 2 of 4; --resume continues" in result.stderr
    assert len(metrics(tmp_path)) == 2


# Answers


def test_a_file_of_requests_is_answered_in_one_batch(folder, tmp_path):
    rows = [{"prompt": "add 1 and 1", "trained_dir": str(trained(folder, m))} for m in ("adapter", "prefix")]
    rows += [{"prompt": "add 2 and 4", "trained_dir": str(trained(folder, "soft_prompt"))}, {"prompt": "add 3 and 9"}]
    (tmp_path / "requests.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    printed = succeed("generate/batch.py", "--requests", tmp_path / "requests.jsonl", "--max_new_tokens", 6)
    answers = [json.loads(line) for line in printed.splitlines()]
    assert [{k: v for k, v in answer.items() if k != "answer"} for answer in answers] == rows
    for row, answer in zip(rows[:2], answers, strict=False):
        assert answer["answer"] == succeed("generate/adapter.py", "--trained_dir", row["trained_dir"], *ASK).strip()


def test_a_whole_model_is_asked_as_it_was_trained_and_its_base_is_left_alone(folder, tmp_path):
    out, prompt, before = tmp_path / "out", "add 1 and 1", (folder / "base/model.safetensors").read_bytes()
    succeed("finetune/full.py", *flags_of(folder, "full"), "--prompt_style", "alpaca", "--out_dir", out)
    assert (out / "model.safetensors").read_bytes() != before == (folder / "base/model.safetensors").read_bytes()
    asked = ["--checkpoint_dir", out, "--max_new_tokens", 9]
    answer = succeed("generate/base.py", *asked, "--prompt", prompt).strip()
    (tmp_path / "requests.jsonl").write_text(json.dumps({"prompt": prompt}))
    row = json.loads(succeed("generate/batch.py", *asked, "--requests", tmp_path / "requests.jsonl"))
    said = run("generate/chat.py", *asked, stdin=f"{prompt}\n").stdout.strip()
    assert row["answer"] == said == answer
    flags = ["--checkpoint_dir", out, *flags_of(folder, "lora")[2:], "--out_dir", tmp_path / "lora"]
    succeed("finetune/lora.py", *flags)
    assert read_json(tmp_path / "lora/method.json")["prompt_style"] == "alpaca"


def test_examples_in_the_prompt(folder, tmp_path):
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "sums", "--max_samples", 4]
    printed, targets = [], []
    for shots in (0, 2):
        printed.append(succeed("scripts/evaluate.py", *flags, "--shots", shots, "--results", tmp_path / "results.json"))
        targets.append([row["n_targets"] for row in read_json(tmp_path / "results.json")["samples"]])
    assert printed[0] != printed[1] and "\n4 samples\n" in printed[1]
    assert targets[0] == targets[1]  # those of the examples do not count
    refuse("scripts/evaluate.py", *flags, "--shots", 41, message="holds 40 rows")
    refuse("scripts/evaluate.py", *flags[:2], "--data", folder / "sums/train.json", "--shots", 1, message="folder")


# Labels


HEAD = ["--head", "classifier", "--train.max_steps", 40, "--train.eval_every", 40, "--train.learning_rate", 0.01]


@pytest.mark.parametrize(("method", "flags"), [("full", HEAD), ("output_layers", HEAD), ("features", [])])
def test_labels_are_learned_evaluated_and_given(folder, tmp_path, method, flags):
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "words", *flags, "--out_dir", tmp_path]
    printed = succeed(f"finetune/{method}.py", *flags)
    accuracy = re.search(r"(?:exact match after|accuracy on validation): ([\d.]+) %", printed)[1]
    assert float(accuracy) > 60
    evaluated = succeed("scripts/evaluate.py", "--trained_dir", tmp_path, "--data", folder / "words")
    assert f"accuracy: {accuracy} %" in evaluated
    lines = succeed("generate/classify.py", "--trained_dir", tmp_path, "--prompt", "owl owl rook").splitlines()
    assert {line.split()[0] for line in lines} == {"bird", "fruit", "tool"}
    assert sum(float(line.split()[1].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.2)
    refuse("generate/adapter.py", "--trained_dir", tmp_path, "--prompt", "owl", message="see generate/classify.py")


@pytest.mark.parametrize("n_labels", [2, 4])
def test_probabilities_are_scikit_learns(n_labels, monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 8)).astype(np.float32) * rng.uniform(0.1, 9, 8).astype(np.float32) + 3
    labels = [f"label {int(v)}" for v in np.digitize(vectors[:, 0] + vectors[:, 1] ** 2 / 9, [2, 3, 4][: n_labels - 1])]
    fitted, kind = [], sklearn.linear_model.LogisticRegression
    fit = kind.fit
    monkeypatch.setattr(kind, "fit", lambda self, X, y: fitted.append((self, X)) or fit(self, X, y))
    arrays, names = fit_logistic(vectors, labels)
    model, X = fitted[0]
    assert names == sorted(set(labels)) == list(model.classes_)
    np.testing.assert_allclose(probabilities(arrays, vectors), model.predict_proba(X), atol=1e-4)


# Merging, exporting, converting back


@pytest.mark.parametrize("method", ["lora", "adapter_v2"])
def test_a_merged_model_is_a_base_with_equal_logits_but_for_an_adapters_prompts(folder, tmp_path, method):
    out, ids = trained(folder, method), torch.arange(40).view(2, 20)
    printed = succeed("scripts/merge_lora.py", "--trained_dir", out, "--out_dir", tmp_path / "merged")
    merged, unmerged = load_model(tmp_path / "merged"), load_trained_folder(out)[0].eval()
    if method == "adapter_v2":
        assert "its prompts, which cannot be merged" in printed
        assert merged.config.bias and not merged.config.tie_embeddings
        assert (merged(ids) - unmerged(ids)).abs().max() > 1e-6  # the prompts are not in it
        merged = load_trained_folder(tmp_path / "merged/adapter")[0].eval()
    torch.testing.assert_close(merged(ids), unmerged(ids), atol=1e-5, rtol=1e-5)
    assert (merged(ids) - load_model(folder / "base")(ids)).abs().max() > 1e-4


TALKS = [TALK[1:2], TALK[:2], TALK]  # a question; with a system message; of several turns
OTHER_TEMPLATE = "{{ 'You are a helpful assistant.' }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("style", ["alpaca", "plain", "zephyr", "llama2", "llama3.1"])
@pytest.mark.parametrize("bos", [True, False])
def test_prompts_are_those_of_training_after_merge_export_and_import(tmp_path, style, bos):
    """Over a base whose own template adds a system message; in this project and in transformers."""
    if not bos and style.startswith("llama"):
        pytest.skip("its template needs a bos_token")
    start, eos = ("<|begin_of_text|>", "<|eot_id|>") if style == "llama3.1" else ("<s>", "</s>")
    base = base_with_controls(tmp_path / "base", HEADERS, start if bos else None, eos)
    (base / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    folder = save_trained(base, tmp_path / "trained", "lora", r=2, alpha=4, dropout=0.0, targets=["q"])
    tokenizer = Tokenizer(base)
    template = choose_template(style, tokenizer) if style in STYLES else TEMPLATES[style][0]
    method = read_json(folder / "method.json") | {"prompt_style": style_of(template), "chat_template": template}
    write_json(folder / "method.json", method)
    expected = [encode_prompt(talk, template, tokenizer) for talk in TALKS]

    for command in (
        "merge_lora.py --trained_dir trained --out_dir merged",
        "export.py --to hf --checkpoint_dir merged --out_dir hf",
        "convert.py --source hf --out_dir from_hf --dtype float32",
        "export.py --to gguf --checkpoint_dir merged --out_file tiny.gguf --type q8_0",
        "convert.py --source tiny.gguf --out_dir from_gguf",
        "export.py --to hf --checkpoint_dir from_gguf --out_dir hf_again",
        "export.py --to peft --trained_dir trained --out_dir peft",
        "convert.py --source peft --out_dir ours --checkpoint_dir base",
    ):
        result = run(*f"scripts/{command}".split(), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    for name in ("merged", "from_hf", "from_gguf"):  # the folder says the template by itself
        ours = Tokenizer(tmp_path / name)
        found = choose_template(None, ours)
        assert found == template and [encode_prompt(talk, found, ours) for talk in TALKS] == expected
        assert stop_ids(found, ours) == stop_ids(template, tokenizer)
    for name in ("hf", "hf_again", "peft"):
        apply = AutoTokenizer.from_pretrained(tmp_path / name).apply_chat_template
        assert [apply(talk, add_generation_prompt=True, return_dict=False) for talk in TALKS] == expected
    imported = read_json(tmp_path / "ours/method.json")
    assert (imported["prompt_style"], imported["chat_template"]) == (style_of(template), template)


# Data


def test_prepare_alpaca_checks_what_it_fetches_and_splits_it(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "alpaca_data.json", [{**row, "input": ""} for row in sums(300)])
    flags = ["--out_dir", tmp_path / "alpaca", "--val_fraction", 0.1, "--source"]
    refuse("data/prepare_alpaca.py", *flags, source, message="holds 300 records instead of 52,002")
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(source.read_bytes()))
    fetch = [*flags, "https://example.org/alpaca_data.json", "--n_records", 300]
    refuse("data/prepare_alpaca.py", *fetch, message="has sha256 .* instead of 2eddafc6")
    assert not (tmp_path / "alpaca").exists()
    succeed("data/prepare_alpaca.py", *fetch, "--sha256", hashlib.sha256(source.read_bytes()).hexdigest())
    parts = [json.loads((tmp_path / "alpaca" / f"{name}.json").read_text()) for name in ("train", "validation")]
    assert len(parts[0]) + len(parts[1]) == 300 and 10 < len(parts[1]) < 60
    source.write_text('[{"instruction": "a"}]')
    refuse("data/prepare_alpaca.py", *flags, source, message="record 1: no format of data/README.md has")


def test_prepare_reviews_checks_what_it_is_given(tmp_path):
    for name in ("rt-polarity.pos", "rt-polarity.neg"):
        (tmp_path / name).write_text("a film\n")
    refuse("data/prepare_reviews.py", "--source", tmp_path, "--out_dir", tmp_path / "out", message="sha256")
    refuse("data/prepare_reviews.py", "--source", tmp_path / "no", message="no cannot be read .*No such file")
    (tmp_path / "reviews.tar.gz").write_bytes(b"")
    refuse("data/prepare_reviews.py", "--source", tmp_path / "reviews.tar.gz", message="is not an archive with rt-pol")
    assert not (tmp_path / "out").exists()


# The real model


@pytest.mark.weights
def test_the_base_answers_sensibly(smollm2_dir):
    printed = succeed("generate/base.py", "--checkpoint_dir", smollm2_dir, "--prompt", "What is the capital of France?")
    assert printed.strip() == "The capital of France is Paris."


@pytest.mark.weights
def test_a_few_steps_on_the_real_model_already_lower_the_loss(smollm2_dir, tmp_path):
    flags = ["--checkpoint_dir", smollm2_dir, "--train.max_steps", 8, "--train.warmup_steps", 2, "--eval_samples", 0]
    flags += ["--train.learning_rate", 2e-2]
    rows = json.loads((ROOT / "data/bookings/train.json").read_text(encoding="utf-8"))
    write_rows(tmp_path / "data/train.json", rows[:40])
    write_rows(tmp_path / "data/validation.json", rows[40:48])
    printed = succeed("finetune/adapter.py", *flags, "--data", tmp_path / "data", "--out_dir", tmp_path / "out")
    assert "trainable parameters: 161,532 of 134,676,540 (0.12 %)" in printed
    losses = [float(row["loss"]) for row in metrics(tmp_path / "out")]
    assert losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "out/trained.safetensors").stat().st_size < 700_000


@pytest.mark.slow
@pytest.mark.weights
def test_a_third_of_the_main_job_learns_bookings(smollm2_dir, tmp_path):
    """All 450 steps end at 92 %, and take an hour of one core without bfloat16 instructions."""
    flags = ["--checkpoint_dir", smollm2_dir, "--train.max_steps", 150, "--eval_samples", 100]
    printed = succeed("finetune/adapter.py", *flags, "--out_dir", tmp_path / "out")
    before, after = (float(re.search(rf"exact match {when}: ([\d.]+) %", printed)[1]) for when in ("before", "after"))
    assert before < 5 and after > 50
    message = "A table for 4 at Nordlys on Friday, 19:30, please. My name is Ingrid."
    answer = succeed("generate/adapter.py", "--trained_dir", tmp_path / "out", "--prompt", message)
    assert list(json.loads(answer)) == ["name", "place", "day", "time", "guests"]
