"""The commands as a user types them: on a tiny base, and on the real one."""

import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import time

import pytest
from helpers import ROOT, command, make_base, metrics, refuse, run, run_process, succeed, sums, write_rows


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny base, its data, and a run of finetune/adapter.py on them."""
    folder = tmp_path_factory.mktemp("scripts")
    base = make_base(folder / "base")
    write_rows(folder / "data" / "train.json", sums(40))
    write_rows(folder / "data" / "validation.json", sums(53)[40:])
    flags = ["--checkpoint_dir", base, "--data", folder / "data", "--start_layer", 1, "--train.max_steps", 6]
    flags += ["--train.eval_every", 3, "--eval_samples", 4, "--precision", "32-true"]
    printed = succeed("finetune/adapter.py", *flags, "--out_dir", folder / "out")
    return folder, flags, printed


def test_finetune_says_what_it_did_and_what_to_do_next(places):
    folder, _, printed = places
    assert "40 training samples, 13 for validation, prompt style chatml" in printed
    assert "\n6 steps of 2 samples: 0.3 epochs\n" in printed
    assert "trainable parameters: 648 of " in printed
    matches = [line for line in printed.splitlines() if "exact match" in line]
    assert re.fullmatch(r"exact match before: [\d.]+ %", matches[-2])
    assert re.fullmatch(r"exact match after: [\d.]+ %", matches[-1])
    assert printed.count("expected  ") == 3
    assert f"python generate/adapter.py --trained_dir {folder / 'out'}" in printed
    written = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*") if path.is_file()}
    run = {".lock", "method.json", "metrics.csv", "config.yaml", "costs.json", "state/state.safetensors"}
    assert written == run | {"trained.safetensors"}
    costs = json.loads((folder / "out" / "costs.json").read_text())
    assert costs["seconds"] > 0 and costs["peak_memory"] > 50e6


def test_the_saved_configuration_runs_again(places, tmp_path):
    folder, _, _ = places
    config = folder / "out" / "config.yaml"
    assert not {"resume", "overwrite", "yes"} & {line.split(":")[0] for line in config.read_text().splitlines()}
    succeed("finetune/adapter.py", "--config", config, "--out_dir", tmp_path / "again")
    rows = [[{**row, "seconds": ""} for row in metrics(path)] for path in (folder / "out", tmp_path / "again")]
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_a_second_run_into_the_same_folder_is_refused(places):
    folder, flags, _ = places
    before = (folder / "out" / "trained.safetensors").read_bytes()
    refuse(
        "finetune/adapter.py", *flags, "--out_dir", folder / "out", message="holds a run already.*--resume.*--overwrite"
    )
    assert (folder / "out" / "trained.safetensors").read_bytes() == before


def test_a_run_resumes_with_its_own_settings_alone(places, monkeypatch):
    folder, flags, _ = places
    flags = [*flags, "--out_dir", folder / "out", "--resume"]
    refuse("finetune/adapter.py", *flags, "--gate_lr_scale", 0.5, message="lr_scale was 0.25, now 0.5")
    refuse("finetune/adapter.py", *flags, "--prompt_length", 5, message="arguments.prompt_length was 10, now 5")
    monkeypatch.setattr("lit_llama.common.progress.SECONDS_BETWEEN_LINES", 0.0)
    answered = [
        "before 0/" in run("finetune/adapter.py", *flags, *more).stderr for more in ([], ["--prompt_length", 5])
    ]
    assert answered == [True, False]  # nobody waits for answers to be refused


def test_ctrl_c_saves_and_says_how_to_go_on(places, tmp_path):
    _, flags, _ = places
    flags = [*flags, "--train.max_steps", 400, "--train.eval_every", 400, "--out_dir", tmp_path / "out"]
    process = subprocess.Popen(command("finetune/adapter.py", *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not ((tmp_path / "out/metrics.csv").exists() and len(metrics(tmp_path / "out")) >= 3):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    step = int(re.search(r"saved at step (\d+) of 400; --resume continues", stderr)[1])
    assert len(metrics(tmp_path / "out")) == step
    succeed("finetune/adapter.py", *flags, "--resume")
    assert [int(row["step"]) for row in metrics(tmp_path / "out")] == list(range(1, 401))


def test_generate_reads_everything_from_the_trained_folder(places):
    folder, _, _ = places
    result = run(
        "generate/adapter.py", "--trained_dir", folder / "out", "--prompt", "add 3 and 9", "--max_new_tokens", 8
    )
    assert result.returncode == 0, result.stderr
    assert "adapter over tiny" in result.stderr and "tokens/s" in result.stderr
    assert result.stdout.endswith("\n")
    refuse("generate/adapter.py", "--trained_dir", folder, "--prompt", "a", message="no finetune script wrote")
    refuse(
        "generate/base.py", "--checkpoint_dir", folder / "base", "--prompt", "a" * 600, message="do not fit the context"
    )
    flags = ["--checkpoint_dir", folder / "base", "--prompt", "a", "--compile", "--devices", 2]
    refuse("generate/base.py", *flags, message="--devices 2 .* neither --compile nor --quantize")


def test_generate_repeats_a_seed(places):
    folder, _, _ = places
    flags = [
        "--checkpoint_dir",
        folder / "base",
        "--prompt",
        "a",
        "--max_new_tokens",
        20,
        "--sampling.temperature",
        1.0,
    ]
    one, again, other = (succeed("generate/base.py", *flags, "--sampling.seed", seed) for seed in (1, 1, 2))
    assert one == again != other


def test_evaluate_agrees_with_the_run(places):
    folder, _, _ = places
    printed = succeed("scripts/evaluate.py", "--trained_dir", folder / "out", "--data", folder / "data")
    best = min(float(row["val_loss"]) for row in metrics(folder / "out") if row["val_loss"])
    assert float(re.search(r"loss ([\d.]+)", printed)[1]) == pytest.approx(best, abs=2e-4)
    assert re.search(r"exact match: [\d.]+ % \(\d+ of 13\)", printed)


def test_prompts_start_as_asked(places, tmp_path):
    """At first nothing is seen of them, for the gates are zero."""
    _, flags, _ = places
    text, normal = tmp_path / "text", tmp_path / "normal"
    for out in (text, normal):
        succeed("finetune/adapter.py", *flags, "--eval_samples", 0, "--prompt_init", out.name, "--out_dir", out)
    assert metrics(text)[0]["loss"] == metrics(normal)[0]["loss"]
    assert metrics(text)[-1]["loss"] != metrics(normal)[-1]["loss"]


@pytest.mark.processes
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_sharded_base_starts_prompts_from_the_same_text(places, tmp_path, precision):
    """Two devices take one sample of a step each. On one device each is a micro-batch of its own here: then both round
    alike, in bfloat16 too, where samples that share a micro-batch round differently.
    """
    _, flags, _ = places
    flags = [*flags, "--train.micro_batch_tokens", 1, "--eval_samples", 0, "--precision", precision, "--out_dir"]
    succeed("finetune/adapter.py", *flags, tmp_path / "one")
    result = run_process("finetune/adapter.py", *flags, tmp_path / "two", "--devices", 2, "--strategy", "fsdp")
    assert result.returncode == 0, result.stderr
    one, two = ([float(row["loss"]) for row in metrics(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5)


def test_prepare_alpaca_checks_what_it_is_given(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "alpaca_data.json", [{**row, "input": ""} for row in sums(300)])
    flags = ["--source", source, "--out_dir", tmp_path / "alpaca", "--val_fraction", 0.1]
    refuse("data/prepare_alpaca.py", *flags, message="holds 300 records instead of 52,002")
    assert not list((tmp_path / "alpaca").glob("*"))
    succeed("data/prepare_alpaca.py", *flags, "--n_records", 300)
    parts = [json.loads((tmp_path / "alpaca" / f"{name}.json").read_text()) for name in ("train", "validation")]
    assert len(parts[0]) + len(parts[1]) == 300 and 10 < len(parts[1]) < 60
    fetched = lambda url, timeout: io.BytesIO(source.read_bytes())  # noqa: E731
    monkeypatch.setattr("urllib.request.urlopen", fetched)
    flags[1] = "https://example.org/alpaca_data.json"
    shutil.rmtree(tmp_path / "alpaca")
    refuse("data/prepare_alpaca.py", *flags, "--n_records", 300, message="has sha256 .* instead of 2eddafc6")
    assert not (tmp_path / "alpaca").exists()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    succeed("data/prepare_alpaca.py", *flags, "--n_records", 300, "--sha256", digest)
    flags[1] = source
    source.write_text('[{"instruction": "a"}]')
    refuse("data/prepare_alpaca.py", *flags, message="alpaca_data.json, record 1: a row needs instruction")


# the real model


def test_the_base_answers_sensibly(smollm2_dir):
    printed = succeed("generate/base.py", "--checkpoint_dir", smollm2_dir, "--prompt", "What is the capital of France?")
    assert printed.strip() == "The capital of France is Paris."


@pytest.mark.weights
def test_a_few_steps_on_the_real_model_already_lower_the_loss(smollm2_dir, tmp_path):
    flags = ["--checkpoint_dir", smollm2_dir, "--train.max_steps", 8, "--train.warmup_steps", 2, "--eval_samples", 0]
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
def test_the_main_job_learns_bookings(smollm2_dir, tmp_path):
    printed = succeed("finetune/adapter.py", "--checkpoint_dir", smollm2_dir, "--out_dir", tmp_path / "out")
    before, after = (float(re.search(rf"exact match {when}: ([\d.]+) %", printed)[1]) for when in ("before", "after"))
    assert before < 5 and after > 82
    message = "A table for 4 at Nordlys on Friday, 19:30, please. My name is Ingrid."
    answer = succeed("generate/adapter.py", "--trained_dir", tmp_path / "out", "--prompt", message)
    assert json.loads(answer) == {"name": "Ingrid", "place": "Nordlys", "day": "Friday", "time": "19:30", "guests": 4}
