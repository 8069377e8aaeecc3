"""The benchmark runs all it names on the same work, and counts tokens that belong to samples."""

import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers import refuse, run, succeed

from lit_llama.common.errors import UserError
from lit_llama.data.batches import TokenizedSample
from lit_llama.measure import cases
from lit_llama.measure.benchmark import call, limit_of, limits, table
from lit_llama.measure.cases import BenchmarkCase
from lit_llama.train.loss import target_loss


@pytest.mark.slow
def test_ours_and_pefts_take_the_same_steps(folder):
    flags = ["--model", folder / "base", "--checkpoint_dir", folder / "base", "--data", folder / "sums"]
    flags += ["--rounds", 2, "--steps", 2, "--batch_size", 6, "--new_tokens", 5, "--results", folder / "results.jsonl"]
    flags += ["--variants", "[32-true, 32-true+checkpointing]", "--against", "[peft]", "--micro_batch_samples", 3]
    result = run("scripts/benchmark.py", *flags)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    trained = {row["name"]: row for row in rows if row["kind"] == "train"}
    names = ("ours {} 32-true", "ours {} 32-true checkpointing", "peft {} 32-true")
    assert set(trained) == {name.format(method) for name in names for method in ("adapter", "lora")}
    assert all(len(row["rounds"]) == 2 and min(row["rounds"]) > 0 for row in trained.values())
    assert trained["ours adapter 32-true"]["padding"] < trained["peft adapter 32-true"]["padding"]
    assert len([row for row in rows if row["kind"] == "decode"]) == 4  # nothing is checkpointed there
    assert "| decode | peft lora 32-true |" in result.stdout


def test_mistakes_are_answered_in_one_line(folder):
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "sums"]
    refuse("scripts/benchmark.py", *flags, "--model", "9B", message="--model 9B is neither a folder with a base")
    refuse("scripts/benchmark.py", *flags, "--variants", "[bf16-true+fast]", message="fast.* none of checkpointing")
    refuse("scripts/benchmark.py", *flags, "--against", "[torchtune]", message="Expected .*'litgpt', 'peft'")
    refuse("scripts/benchmark.py", *flags, "--variants", "[]", message="must name at least one each")
    refuse("scripts/benchmark.py", *flags, "--rounds", 0, message="--rounds 0 must be between 1 and")


def test_the_limit_is_that_of_the_work(folder):
    limit = {"32-true": 1e12, "read": 1e10}
    ours = BenchmarkCase("ours", str(folder / "base"), "adapter", "32-true")
    samples = [TokenizedSample(list(range(20)), [-100] * 10 + [3] * 10)]
    assert limit_of("train", replace(ours, method="full"), limit, samples) < limit_of("train", ours, limit, samples)
    quantized = replace(ours, options=("int8",))
    assert limit_of("decode", ours, limit, []) < limit_of("decode", quantized, limit, []) < 1e10
    weights = 3 * (32 * 64 + 32 * 32 + 3 * 32 * 48 + 2 * 32) + 259 * 32
    assert limit_of("decode", ours, limit, []) == pytest.approx(1e10 / (4 * weights))
    assert set(limits({"32-true", "bf16-true"}, ours.config)) == {"32-true", "bf16-true", "read"}


@pytest.mark.parametrize(("tokens", "passes"), [(100, 1), (60, 2), (30, 3)])
def test_micro_batches_have_the_size_that_was_asked_for(folder, tokens, passes, monkeypatch):
    samples = [TokenizedSample([5] * n, [-100, *[6] * (n - 1)]) for n in (40, 30, 20, 10)]
    ours = BenchmarkCase("ours", str(folder / "base"), "adapter", "32-true", micro_batch_tokens=tokens)
    seen: list[int] = []
    monkeypatch.setattr(cases, "target_loss", lambda *batch: seen.append(len(batch[1])) or target_loss(*batch))
    assert cases.build_ours(ours, "train", torch.device("cpu"))(samples) == 100
    assert len(seen) == passes and sum(seen) == 4


def test_a_case_that_is_killed_is_reported():
    case = BenchmarkCase("ours", "7B", "lora", "32-true")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with pytest.raises(UserError, match="ours lora 32-true failed: ValueError: invalid literal"):
            call(case, process, int, "two")
        with pytest.raises(UserError, match="ours lora 32-true: its process ended without an error"):
            call(case, process, os._exit, 1)


def test_the_ratio_is_taken_round_by_round():
    row = dict(kind="train", name="ours", of_limit=0.5, peak_mib=1.0, padding=0.1, least=1.0, most=4.0)
    ours, other = ({**row, "tokens_per_s": rounds[1], "rounds": rounds} for rounds in ([1, 2, 4], [0.5, 1, 2]))
    assert "| train | other | 1 (1 to 4) | 0.50 | 50 % | 10 % | 1 |" in table([ours, {**other, "name": "other"}])


def test_a_step_is_profiled(folder):
    flags = ["--model", folder / "base", "--batch_size", 3, "--warm_up", 1, "--precision", "32-true"]
    printed = succeed("scripts/profile_step.py", *flags)
    assert re.match(r"ours adapter 32-true: \d+ tokens in ", printed) and "aten::mm" in printed
    refuse("scripts/profile_step.py", "--method", "adapters", message="Expected .*'adapter'.*adapters")
