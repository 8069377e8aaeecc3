"""Several processes, by gloo on the CPU: a step means the same on one, two and three, and over a sharded base."""

import subprocess
from pathlib import Path

import pytest
import torch
from helpers import make_base, metrics, run_process, save_trained, succeed, sums, write_rows
from safetensors.torch import load_file

from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json
from lit_llama.devices.blocks import shard

pytestmark = pytest.mark.processes
METHODS = ("adapter", "lora", "full")
CASES = [(name, devices, "ddp") for name in METHODS for devices in (2, 3)]
CASES += [(name, 2, "fsdp") for name in METHODS if name != "full"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_rows(folder / "sums" / "train.json", sums(23))
    write_rows(folder / "sums" / "validation.json", sums(40)[31:])
    make_base(folder / "base")
    return folder


def run_on(devices: int, script: str, *flags: object) -> subprocess.CompletedProcess:
    """By torchrun where there may be more processes than cores: a script itself starts no more."""
    torchrun = ["--standalone", "--nproc_per_node", devices] if devices > 2 else []
    return run_process(script, *flags, torchrun=torchrun)


def work(places: Path, devices: int = 1, strategy: str = "auto") -> Path:
    """What the worker writes on so many processes."""
    out_dir = places / f"{strategy}-{devices}"
    if not out_dir.exists():
        names = METHODS if strategy != "fsdp" else METHODS[:2]
        result = run_on(devices, "tests/ranks_worker.py", places, out_dir, devices, strategy, *names)
        assert result.returncode == 0, result.stderr
    return out_dir


@pytest.mark.parametrize("method, devices, strategy", CASES)
def test_a_run_in_float64_ends_in_the_same_place(places, method, devices, strategy):
    """Losses, norms of gradients, AdamW's moments, which are made of gradients, and what is trained."""
    one, several = work(places) / method, work(places, devices, strategy) / method
    names = [sorted(str(path.relative_to(folder)) for path in (folder / "run").rglob("*")) for folder in (one, several)]
    assert names[0] == names[1] and len(names[0]) > 5
    state = load_file(one / "run" / "state" / "state.safetensors")
    assert all(tensor.dtype == torch.float64 for name, tensor in state.items() if name.startswith("trained."))
    for name in names[0]:
        if name.endswith(".safetensors"):
            first, second = (load_file(folder / name) for folder in (one, several))
            torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-6)
    for first, second in zip(metrics(one / "run"), metrics(several / "run"), strict=True):
        assert float(first["grad_norm"]) > 1e-3
        for name in ("loss", "grad_norm", "val_loss"):
            assert float(second[name] or 0) == pytest.approx(float(first[name] or 0), abs=1e-5)
    assert len(metrics(one / "run")) == 4 and metrics(one / "run")[-1]["val_loss"]
    assert read_json(several / "answers-0.json") == read_json(one / "answers-0.json")
    assert len(read_json(several / "answers-0.json")["before"]) == 1
    assert read_json(several / "answers-1.json") == read_json(one / "answers-0.json")


def test_an_evaluation_counts_each_sample_once(places, tmp_path):
    trained, found = save_trained(places / "base", tmp_path / "lora", "lora"), []
    for name, several in (("one", []), ("two", ["--devices", 2, "--strategy", "fsdp"])):
        flags = ["--trained_dir", trained, "--data", places / "sums", "--precision", "32-true"]
        result = run_process("scripts/evaluate.py", *flags, "--results", tmp_path / name, *several)
        assert result.returncode == 0, result.stderr
        printed = result.stdout
        assert printed.count("exact match") == printed.count("perplexity") == 1
        found.append(read_json(tmp_path / name)["samples"])
    assert [row["row"] for row in found[1]] == list(range(9))
    for one, other in zip(*found, strict=True):
        assert other.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5)
        assert other == one


def test_an_answer_from_a_sharded_model_is_the_same(places, tmp_path):
    trained = save_trained(places / "base", tmp_path / "adapter", "adapter", start_layer=1)
    asked = ["--checkpoint_dir", places / "base", "--prompt", "What?", "--max_new_tokens", 12, "--precision", "32-true"]
    sampled = ["--sampling.temperature", 0.8]
    for script, flags in (("adapter", ["--trained_dir", trained]), ("base", sampled)):
        one = succeed(f"generate/{script}.py", *asked, *flags)
        two = run_process(f"generate/{script}.py", *asked, *flags, "--devices", 2)
        assert two.returncode == 0, two.stderr
        assert two.stdout == one and one.strip()
        assert "MEMBER: 2/2" in two.stderr and two.stderr.count("tokens/s") == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_sharded_base_starts_prompts_from_the_same_text(places, tmp_path, precision):
    """Two devices take one sample of a step each. On one device each is a micro-batch of its own here: then both round
    alike, in bfloat16 too, where samples that share a micro-batch round differently.
    """
    flags = ["--checkpoint_dir", places / "base", "--data", places / "sums", "--start_layer", 1, "--eval_samples", 4]
    flags += ["--train.max_steps", 4, "--train.micro_batch_tokens", 1, "--precision", precision, "--out_dir"]
    succeed("finetune/adapter.py", *flags, tmp_path / "one")
    result = run_process("finetune/adapter.py", *flags, tmp_path / "two", "--devices", 2, "--strategy", "fsdp")
    assert result.returncode == 0, result.stderr
    one, two = ([float(row["loss"]) for row in metrics(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5)


def test_what_trains_as_a_whole_is_not_sharded(places):
    with pytest.raises(UserError, match="every block trains; pass --strategy ddp"):
        shard(None, load_model(places / "base").requires_grad_(True), torch.float32)


@pytest.mark.slow
def test_more_devices_than_labelled_texts(places, tmp_path):
    rows = [{"text": word, "label": label} for label, words in (("a", "xyz"), ("b", "uvw")) for word in words]
    for split in ("train", "validation"):
        write_rows(tmp_path / "words" / f"{split}.json", rows)
    data = ["--checkpoint_dir", places / "base", "--data", tmp_path / "words"]
    classifier = ["--head", "classifier", "--train.max_steps", 2, "--eval_samples", 5, "--precision", "32-true"]
    for name, devices, flags in (("features", 1, []), ("full", 3, [*classifier, "--devices", 3])):
        trained = run_on(devices, f"finetune/{name}.py", *data, *flags, "--out_dir", tmp_path / name)
        assert trained.returncode == 0 and trained.stdout.count("on validation" if devices == 1 else "match after") == 1
        found = []
        for devices in (1, 3):
            flags = ["--trained_dir", tmp_path / name, "--precision", "32-true", "--max_samples", 2]
            flags += ["--devices", devices, "--results", tmp_path / f"{name}-{devices}"]
            result = run_on(devices, "scripts/evaluate.py", *data, *flags)
            assert result.returncode == 0 and result.stdout.count("accuracy") == 1, result.stderr
            found.append(read_json(tmp_path / f"{name}-{devices}")["samples"])
        for one, other in zip(*found, strict=True):
            assert other.pop("loss") == pytest.approx(one.pop("loss"), abs=1e-5)
            assert other == one
