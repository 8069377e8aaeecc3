"""The estimate of a step's memory against tensors that are really there, and what a run does with it."""

import re

import pytest
import torch
from helpers import TINY, every_case, finetune, refuse, saved_bytes, succeed, to_samples, tokens, tuned

from lit_llama.common.errors import UserError
from lit_llama.devices import memory
from lit_llama.devices.blocks import wrap_blocks
from lit_llama.devices.memory import free_memory, step_memory
from lit_llama.methods.table import METHODS, weightless
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.trained import trainable_parameters

# Wide enough that matrices, not norms and gates, decide.
CONFIG = {**TINY, "n_embd": 192, "n_head": 4, "n_kv_head": 4, "head_size": 48, "intermediate_size": 512, "n_layer": 4}


def estimate(method: str, checkpointing=False) -> dict[str, float]:
    return step_memory(weightless(LLaMAConfig(**CONFIG), method), "cpu", 128, 32, checkpointing)


@every_case
def test_weights_and_optimizer_are_counted(case):
    model = tuned(case)
    params = list(trainable_parameters(model).values())
    memory = step_memory(model, "cpu", 64, 32, checkpointing=False)
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert memory["trainable parameters"] == 2 * sum(p.nbytes for p in params) + moments


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"output_layers"}))  # it keeps almost nothing
def test_activations_are_those_that_a_real_model_saves(method):
    model = LLaMA(LLaMAConfig(**CONFIG)).init_weights().requires_grad_(False)
    METHODS[method](model)
    found = saved_bytes(model, to_samples(tokens(4, 32), tokens(4, 32)))
    assert estimate(method)["activations"] == pytest.approx(found, rel=0.2)


@pytest.mark.parametrize("length", [256, 1024])
def test_scores_count_in_bfloat16_where_attention_keeps_them(length):
    model = LLaMA(LLaMAConfig(**{**CONFIG, "block_size": 1024})).init_weights().bfloat16().requires_grad_(False)
    METHODS["lora"](model)
    found = saved_bytes(model, to_samples(tokens(1, length), tokens(1, length)))
    memory = step_memory(model, "cpu", length, length, checkpointing=False)
    assert memory["activations"] == pytest.approx(found, rel=0.2)


def test_checkpointing_saves_memory_only_where_a_graph_is_built():
    assert estimate("lora", checkpointing=True)["activations"] < estimate("lora")["activations"] / 2
    model, samples = tuned("adapter", n_layer=4), to_samples(tokens(2, 30), tokens(2, 30))
    plain = saved_bytes(model, samples)
    wrap_blocks(model, checkpointing=True)
    assert ["checkpoint" in repr(block.forward) for block in model.transformer.h] == [False, True, True, True]
    assert saved_bytes(model, samples) < plain / 2


def frozen_weights(*flags: object) -> float:
    printed = succeed("scripts/estimate_memory.py", "--model", "7B", *flags)
    return float(re.search(r"frozen weights +([\d.]+) GB", printed)[1])


def test_sharding_and_quantization_shrink_the_frozen_blocks():
    whole, sharded = frozen_weights(), frozen_weights("--devices", 4, "--strategy", "fsdp")
    ends = 2 * 32000 * 4096 * 2 / 1e9  # the embedding and the head
    assert whole == pytest.approx(2 * 6.738, abs=0.002)  # LLaMA-7B in bfloat16
    assert sharded - ends == pytest.approx((whole - ends) * (1 / 4 + 2 / 32), abs=0.002)
    assert frozen_weights("--quantize", "int8") - ends == pytest.approx((whole - ends) / 2, abs=0.002)
    assert frozen_weights("--method", "full") == 0


def test_a_run_says_what_it_needs_before_it_runs_out(folder, tmp_path, monkeypatch, capsys):
    needed = {"trainable parameters": 10**8, "activations": 8 * 10**8, "temporaries": 10**8}
    monkeypatch.setattr(memory, "step_memory", lambda *_: needed)
    for gigabytes, warning in ((2, ""), (1.1, "warning: a step needs about 0.97 GB and 1.10 GB are free")):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=gigabytes: free * 10**9)
        finetune(folder, tmp_path, overwrite=True, max_steps=3)
        printed = capsys.readouterr().err
        assert warning in printed and bool(warning) == ("a step needs" in printed)
    monkeypatch.setattr(memory, "free_memory", lambda _: 0.7 * 10**9)
    with pytest.raises(UserError, match="a step needs about 0.97 GB and 0.70 GB are free; pass a lower"):
        finetune(folder, tmp_path, overwrite=True)


def test_the_script_prints_a_table(folder):
    flags = ["--model", folder / "base", "--method", "lora", "--arguments", "{r: 4}", "--seq_length", 16]
    printed = succeed("scripts/estimate_memory.py", *flags, "--micro_batch_tokens", 64, "--device", "cpu")
    assert "lora on tiny, bf16-true, micro-batches of 64 tokens" in printed and "activations" in printed
    refuse("scripts/estimate_memory.py", *flags, "--arguments", "{rank: 4}", message="do not fit lora")
    refuse("scripts/estimate_memory.py", "--model", "8B", message="neither a folder with a base nor one of 7B, 13B")
    refuse("scripts/estimate_memory.py", "--model", "7B", "--method", "ia5", message="Expected .*'lora'.*ia5")


def test_free_memory_of_a_container(tmp_path, monkeypatch):
    """Page cache counts as used, but the kernel gives it back before it kills a process."""
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path[1:])
    group = tmp_path / "sys/fs/cgroup"
    for folder in (tmp_path / "proc", group):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemFree: 1 kB\nMemAvailable: 9000 kB\n")
    assert free_memory(torch.device("cpu")) == 9000 * 1024
    for name, text in (("max", "max"), ("current", "5000000"), ("stat", "anon 1\ninactive_file 2000000")):
        (group / f"memory.{name}").write_text(f"{text}\n")
    assert free_memory(torch.device("cpu")) == 9000 * 1024
    (group / "memory.max").write_text("8000000\n")
    assert free_memory(torch.device("cpu")) == 8_000_000 - 5_000_000 + 2_000_000
