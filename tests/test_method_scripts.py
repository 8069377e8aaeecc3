"""Each finetune script on a tiny base: what it writes, what answers with it, how it resumes, merges and is refused."""

import json

import numpy as np
import pytest
import torch
from helpers import make_base, metrics, refuse, run, succeed
from safetensors import safe_open

from lit_llama.checkpoint import load_model
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.features import fit_classifier, probabilities

SCRIPTS = {
    "adapter": ["--start_layer", 1],
    "adapter_v2": ["--start_layer", 1],
    "full": [],
    "houlsby": ["--bottleneck_size", 4],
    "lora": ["--targets", "[q, v, fc1]"],
    "output_layers": ["--n_blocks", 1],
    "prefix": ["--prompt_length", 4, "--mlp_size", 8],
    "soft_prompt": ["--prompt_length", 4, "--init_text", "add"],
}
STEPS = ["--train.max_steps", 4, "--train.eval_every", 2, "--train.save_every", 2, "--eval_samples", 2]


def trained(folder, method: str, precision: str = "32-true"):
    """The folder of a run, made when it is asked for first."""
    out = folder / f"out-{method}-{precision}"
    if not out.exists():
        flags = ["--checkpoint_dir", folder / "base", "--data", folder / "sums", *SCRIPTS[method], *STEPS]
        printed = succeed(f"finetune/{method}.py", *flags, "--out_dir", out)
        assert "trainable parameters: " in printed and "exact match after" in printed
        assert f"saved in {out}" in printed
    return out


@pytest.mark.parametrize("method", SCRIPTS)
def test_a_script_trains_saves_and_its_folder_answers(folder, method, auto):
    out = trained(folder, method, auto)
    assert len(metrics(out)) == 4
    if method == "full":
        answer = succeed("generate/base.py", "--checkpoint_dir", out, "--prompt", "add 1 and 1", "--max_new_tokens", 5)
    else:
        answer = succeed("generate/adapter.py", "--trained_dir", out, "--prompt", "add 1 and 1", "--max_new_tokens", 5)
    assert answer.endswith("\n")
    evaluated = succeed("scripts/evaluate.py", "--trained_dir", out, "--data", folder / "sums")
    best = min(float(row["val_loss"]) for row in metrics(out) if row["val_loss"])  # the saved step is the best one
    rounded = 5e-5 if auto == "32-true" else best * 2**-8  # a loss depends a little on what shares its batch
    assert float(evaluated.split("loss ")[1].split()[0].rstrip(",;")) == pytest.approx(best, abs=1.01 * rounded)


def test_a_resumed_run_ends_with_the_same_numbers(folder, tmp_path):
    """Of the method that keeps something else than it trains."""
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "sums", *SCRIPTS["prefix"], *STEPS]
    out = tmp_path / "out"
    succeed("finetune/prefix.py", *flags, "--out_dir", out)
    whole = (out / "trained.safetensors").read_bytes()
    succeed("finetune/prefix.py", *flags, "--out_dir", out, "--resume")
    assert (out / "trained.safetensors").read_bytes() == whole
    with safe_open(out / "trained.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"transformer.h.{i}.attn.prefix" for i in range(3)}


def test_training_all_layers_leaves_the_bases_file_alone(folder):
    before = (folder / "base" / "model.safetensors").read_bytes()
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "sums", *STEPS]
    refuse("finetune/full.py", *flags, "--out_dir", folder / "base", "--overwrite", message="is the base itself")
    other = make_base(folder / "other-base")
    refuse("finetune/full.py", *flags, "--out_dir", other, "--overwrite", message="that no run wrote")
    assert (other / "model.safetensors").exists()
    succeed("finetune/full.py", *flags, "--out_dir", folder / "out-full-again", "--train.learning_rate", 0.1)
    assert (folder / "base" / "model.safetensors").read_bytes() == before
    trained, base = load_model(folder / "out-full-again"), load_model(folder / "base")
    assert (trained.transformer.wte.weight - base.transformer.wte.weight).abs().max() > 0.01


@pytest.mark.parametrize("method", ["full", "output_layers"])
def test_a_classifiers_head_and_what_labels_with_it(folder, method):
    out = folder / f"labels-{method}"
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "words", "--head", "classifier"]
    flags += ["--train.max_steps", 40, "--train.eval_every", 40, "--train.learning_rate", 0.01, "--out_dir", out]
    printed = succeed(f"finetune/{method}.py", *flags)
    after = float(printed.split("exact match after: ")[1].split(" %")[0])
    assert after > 60
    evaluated = succeed("scripts/evaluate.py", "--trained_dir", out, "--data", folder / "words")
    assert f"accuracy: {after:.1f} %" in evaluated
    lines = succeed("generate/classify.py", "--trained_dir", out, "--prompt", "owl owl rook").splitlines()
    assert {line.split()[0] for line in lines} == {"bird", "fruit", "tool"}
    refuse("generate/adapter.py", "--trained_dir", out, "--prompt", "owl", message="see generate/classify.py")
    refuse(f"finetune/{method}.py", *flags[:2], "--data", folder / "sums", "--head", "classifier", message="no label")


@pytest.mark.parametrize("classifier", ["logistic", "forest"])
def test_features_and_what_labels_with_them(folder, classifier):
    out = folder / f"features-{classifier}"
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "words", "--classifier", classifier]
    printed = succeed("finetune/features.py", *flags, "--out_dir", out)
    accuracy = printed.split("accuracy on validation: ")[1].split(" %")[0]
    assert float(accuracy) > 60
    assert f"accuracy: {accuracy} %" in succeed("scripts/evaluate.py", "--trained_dir", out, "--data", folder / "words")
    lines = succeed("generate/classify.py", "--trained_dir", out, "--prompt", "owl owl rook").splitlines()
    assert sum(float(line.split()[1].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.2)
    refuse("finetune/features.py", *flags, "--out_dir", out, message="holds a run already")
    refuse("generate/adapter.py", "--trained_dir", out, "--prompt", "x", message="see generate/classify.py")


@pytest.mark.parametrize("n_labels", [2, 4])
@pytest.mark.parametrize("classifier", ["logistic", "forest"])
def test_probabilities_are_scikit_learns(classifier, n_labels, monkeypatch):
    import sklearn.ensemble
    import sklearn.linear_model

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 8)).astype(np.float32) * rng.uniform(0.1, 9, 8).astype(np.float32) + 3
    labels = [f"label {int(v)}" for v in np.digitize(vectors[:, 0] + vectors[:, 1] ** 2 / 9, [2, 3, 4][: n_labels - 1])]
    fitted = []
    for module, name in ((sklearn.linear_model, "LogisticRegression"), (sklearn.ensemble, "RandomForestClassifier")):
        original = getattr(module, name)

        class Watched(original):
            def fit(self, X, y):
                fitted.append((self, X))
                return super().fit(X, y)

        Watched.__init__ = original.__init__
        monkeypatch.setattr(module, name, Watched)
    arrays, names = fit_classifier(classifier, vectors, labels, seed=1)
    model, X = fitted[0]
    assert names == sorted(set(labels)) == list(model.classes_)
    np.testing.assert_allclose(probabilities(arrays, vectors), model.predict_proba(X), atol=1e-4)


def test_merged_lora_is_a_base_with_equal_logits(folder, tmp_path):
    out = trained(folder, "lora")
    succeed("scripts/merge_lora.py", "--trained_dir", out, "--out_dir", tmp_path / "merged")
    merged, (unmerged, _) = load_model(tmp_path / "merged"), load_trained_folder(out)
    ids = torch.randint(0, 259, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids), unmerged.eval()(ids), atol=1e-5, rtol=1e-5)
        assert (merged(ids) - load_model(folder / "base")(ids)).abs().max() > 1e-4
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_adapter_v2_merges_but_for_its_prompts(folder, tmp_path):
    out, merged_dir = trained(folder, "adapter_v2"), tmp_path / "v2"
    printed = succeed("scripts/merge_lora.py", "--trained_dir", out, "--out_dir", merged_dir)
    assert "its prompts, which cannot be merged" in printed
    unmerged, merged = (load_trained_folder(path)[0].eval() for path in (out, merged_dir / "adapter"))
    ids = torch.randint(0, 259, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids), unmerged(ids), atol=1e-5, rtol=1e-5)
        plain = load_model(merged_dir)
        assert plain.config.bias and not plain.config.tie_embeddings
        assert (plain(ids) - merged(ids)).abs().max() > 1e-6  # the prompts are not in it
        assert (merged(ids) - load_model(folder / "base")(ids)).abs().max() > 1e-4
    for path in (out, merged_dir / "adapter"):
        flags = ["--prompt", "add 1 and 1", "--max_new_tokens", 5]
        assert succeed("generate/adapter.py", "--trained_dir", path, *flags)


def test_what_cannot_merge_says_why(folder, tmp_path):
    for method in ("adapter", "houlsby", "soft_prompt"):
        (tmp_path / method).mkdir()
        base = {"checkpoint_dir": "base", "name": "tiny", "fingerprint": ""}
        content = {"method": method, "arguments": {}, "base": base, "prompt_style": "chatml"}
        (tmp_path / method / "method.json").write_text(json.dumps(content))
        flags = ["--trained_dir", tmp_path / method, "--out_dir", tmp_path / "merged"]
        refuse("scripts/merge_lora.py", *flags, message=f"{method}, which cannot be merged: only lora and adapter_v2")
        assert not (tmp_path / "merged").exists()


def test_a_file_of_requests_is_answered_in_one_batch(folder, tmp_path):
    rows = [{"prompt": "add 1 and 1", "trained_dir": str(trained(folder, m))} for m in ("adapter", "prefix")]
    rows += [{"prompt": "add 2 and 4", "trained_dir": str(trained(folder, "soft_prompt"))}, {"prompt": "add 3 and 9"}]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(json.dumps(row) for row in rows))
    printed = succeed("generate/batch.py", "--requests", requests, "--max_new_tokens", 6)
    answers = [json.loads(line) for line in printed.splitlines()]
    assert [{k: v for k, v in answer.items() if k != "answer"} for answer in answers] == rows
    alone = ["--prompt", "add 1 and 1", "--max_new_tokens", 6]
    for i, method in enumerate(("adapter", "prefix")):
        single = succeed("generate/adapter.py", "--trained_dir", trained(folder, method), *alone)
        assert answers[i]["answer"] == single.strip()
    requests.write_text('{"prompt": "x"}\n{"input": "y"}\n')
    refuse("generate/batch.py", "--requests", requests, message=r"requests.jsonl:2: a request needs a \"prompt\"")


def test_a_whole_model_is_asked_as_it_was_trained(folder, tmp_path):
    out, prompt = tmp_path / "out", "add 1 and 1"
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "sums", *STEPS, "--prompt_style", "alpaca"]
    succeed("finetune/full.py", *flags, "--out_dir", out)
    asked = ["--checkpoint_dir", out, "--max_new_tokens", 9]
    answer = succeed("generate/base.py", *asked, "--prompt", prompt).strip()
    (tmp_path / "requests.jsonl").write_text(json.dumps({"prompt": prompt}))
    row = json.loads(succeed("generate/batch.py", *asked, "--requests", tmp_path / "requests.jsonl"))
    said = run("generate/chat.py", *asked, stdin=f"{prompt}\n").stdout.strip()
    assert row["answer"] == said == answer


def test_examples_in_the_prompt(folder):
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "sums", "--max_samples", 4]
    without, with_two = (succeed("scripts/evaluate.py", *flags, "--shots", shots) for shots in (0, 2))
    assert without != with_two and "\n4 samples\n" in with_two
    refuse("scripts/evaluate.py", *flags, "--shots", 41, message="holds 40 rows")
    refuse("scripts/evaluate.py", *flags[:2], "--data", folder / "sums/train.json", "--shots", 1, message="folder")


def test_reviews_are_split_and_checked(tmp_path):
    for name in ("rt-polarity.pos", "rt-polarity.neg"):
        (tmp_path / name).write_text("a film\n")
    refuse("data/prepare_reviews.py", "--source", tmp_path, "--out_dir", tmp_path / "out", message="sha256")
    refuse("data/prepare_reviews.py", "--source", tmp_path / "no", message="neither an https address nor a folder")
    assert not (tmp_path / "out").exists()
