"""The estimate of a step's memory against tensors that are really there, and what a run does with it."""

import json

import pytest
import torch
from helpers import TINY, every_case, make_base, refuse, run, succeed, sums, to_samples, tuned, write_rows

from lit_llama.devices import memory
from lit_llama.devices.memory import StepMemory, step_memory
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.train.loss import target_loss
from lit_llama.trained import trainable_parameters

# Wide enough that matrices, not norms and gates, decide.
CONFIG = {**TINY, "n_embd": 192, "n_head": 4, "n_kv_head": 4, "head_size": 48, "intermediate_size": 512, "n_layer": 4}


def estimate(method: str, dtype=torch.float32, tokens=128, device_type="cpu", arguments: dict = {}, **changes):  # noqa: B006
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig(**CONFIG)).requires_grad_(False)
        METHODS[method](model, **arguments)
    return step_memory(model, dtype, tokens, seq_length=32, device_type=device_type, **changes)


@every_case
def test_weights_and_optimizer_are_counted(case):
    model = tuned(case)
    params = list(trainable_parameters(model).values())
    memory = step_memory(model, torch.float32, tokens=64, seq_length=32)
    assert memory.frozen_weights == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert memory.trainable_parameters == 2 * sum(p.nbytes for p in params) + moments


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method != "output_layers"]
)  # it keeps almost nothing
def test_activations_are_those_that_a_real_model_saves(method):
    model, saved = LLaMA(LLaMAConfig(**CONFIG)).init_weights().requires_grad_(False), {}
    METHODS[method](model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, TINY["vocab_size"], (4, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = target_loss(model.train(), to_samples(ids, ids))
    assert loss.requires_grad and estimate(method).activations == pytest.approx(sum(saved.values()), rel=0.2)


def test_blocks_below_the_first_trainable_one_save_nothing():
    of_all, of_half = (estimate("adapter", arguments=dict(start_layer=start)).activations for start in (0, 2))
    assert of_half == of_all / 2
    assert estimate("lora", checkpointing=True).activations < estimate("lora").activations / 2


def test_sharding_and_quantization_shrink_the_frozen_blocks():
    changes: list[dict] = [{}, {"shards": 4}, {"quantize": "int8"}]
    whole, sharded, quantized = (estimate("lora", **changed).frozen_weights for changed in changes)
    ends = (2 * CONFIG["vocab_size"] + 1) * CONFIG["n_embd"] * 4  # the embedding, the head and the last norm
    assert sharded - ends == pytest.approx((whole - ends) * (1 / 4 + 2 / CONFIG["n_layer"]))
    assert quantized - ends == pytest.approx((whole - ends) / 4)


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    for name, text in {"max": "5000", "current": "3000", "stat": "anon 1\ninactive_file 700"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    files = (str(tmp_path), "memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(memory, "CGROUP_FILES", {"": files})
    assert memory.free_memory(torch.device("cpu")) == 5000 - 3000 + 700
    (tmp_path / "memory.max").write_text("max")
    assert memory.free_memory(torch.device("cpu")) > 10**6


def test_a_run_says_what_it_needs_before_it_runs_out(tmp_path, monkeypatch):
    write_rows(tmp_path / "data" / "train.json", sums(20))
    write_rows(tmp_path / "data" / "validation.json", sums(30)[25:])
    flags = ["--checkpoint_dir", make_base(tmp_path / "base"), "--data", tmp_path / "data", "--eval_samples", 0]
    flags += ["--train.max_steps", 1, "--start_layer", 1, "--overwrite", "--out_dir", tmp_path / "out"]
    free = []
    monkeypatch.setattr("lit_llama.devices.memory.free_memory", lambda device: free[-1])
    monkeypatch.setattr(
        "lit_llama.devices.memory.step_memory", lambda *_, **__: StepMemory(10**9, 10**8, 8 * 10**8, 10**8)
    )
    for size, code, message in [
        (2 * 10**9, 0, ""),
        (1.1 * 10**9, 0, "warning: a step needs about 0.97 GB and 1.10 GB"),
        (0.7 * 10**9, 2, "error: a step needs about 0.97 GB and 0.70 GB are free; pass --"),
    ]:
        free.append(int(size))
        result = run("finetune/adapter.py", *flags)
        assert result.returncode == code and message in result.stderr and bool(message) == ("a step" in result.stderr)


def test_the_script_prints_a_table(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLaMAConfig(**TINY, name="tiny").__dict__))
    flags = ["--model", tmp_path, "--method", "lora", "--arguments", "{r: 4}", "--seq_length", 16]
    printed = succeed("scripts/estimate_memory.py", *flags, "--micro_batch_tokens", 64, "--device", "cpu")
    assert "lora on tiny, bf16-true, micro-batches of 64 tokens" in printed and "total on each device" in printed
    refuse("scripts/estimate_memory.py", *flags, "--arguments", "{rank: 4}", message="do not fit lora")
    refuse("scripts/estimate_memory.py", "--model", "8B", message="neither a folder with a base nor one of 7B, 13B")
    refuse("scripts/estimate_memory.py", "--model", "7B", "--method", "ia5", message="--method ia5 is none of")
