"""The estimate of memory against tensors that are really there, and what a run does with it."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import CASES, TINY, every_case, make_base, refuse, run, succeed, sums, tuned, write_rows

from lit_llama.cli import UserError
from lit_llama.data.batches import IGNORE
from lit_llama.devices import launch
from lit_llama.devices.memory import Estimate, Ledger, check_room, estimate
from lit_llama.model import LLaMAConfig
from lit_llama.train.loss import target_loss
from lit_llama.trained import trained_tensors


def estimate_tiny(case: str, **changes) -> Estimate:
    method, arguments = CASES[case]
    fixed = dict(dtype=torch.float32, lengths=[24, 24])
    return estimate(LLaMAConfig(**TINY), method, arguments, **{**fixed, **changes})


def test_a_ledger_counts_what_is_alive():
    weight = torch.zeros(10, 10, requires_grad=True)
    ledger = Ledger()
    with ledger:
        x = torch.zeros(4, 10)  # 160 bytes
        y = (x @ weight).relu()  # 160 bytes for a moment, and 160 that stay
        assert (ledger.now, ledger.peak) == (320, 480)
        y.view(20, 2).add_(1)  # nothing new
        assert (ledger.now, ledger.peak) == (320, 480)
        y.detach().sum()
    del x, y
    assert ledger.now == 0


@every_case
def test_the_lasting_part_is_exact(case):
    found, model = estimate_tiny(case), tuned(case)
    params = list(trained_tensors(model).values())
    assert found.frozen == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert found.trained == found.gradients == sum(p.nbytes for p in params)
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert moments <= found.optimizer <= moments + 4 * len(params)  # and each tensor's count of steps


@pytest.mark.parametrize("case", [case for case in CASES if case != "adapter"])
def test_activations_are_those_that_a_real_model_keeps(case):
    model, kept = tuned(case), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    lengths = [24, 11]
    ids = torch.randint(0, TINY["vocab_size"], (2, 24))
    targets = ids.clone()
    targets[1, 11:] = IGNORE
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        target_loss(model.train(), ids, targets, lengths)  # kept until here, for nothing has gone backward yet
    found = estimate_tiny(case, lengths=lengths)
    at_head = sum(kept.values()) - 2 * 35 * TINY["vocab_size"] * 4  # without the logits and their log-softmax
    assert found.activations == pytest.approx(at_head, rel=0.13)


def test_blocks_that_build_no_graph_keep_nothing():
    config = LLaMAConfig(**{**TINY, "n_layer": 8})

    def activations(start_layer: int, **changes) -> int:
        arguments = dict(start_layer=start_layer)
        return estimate(config, "adapter", arguments, torch.float32, lengths=[32, 32], **changes).activations

    whole, half, one = (activations(start) for start in (0, 4, 7))
    assert half == pytest.approx(whole / 2, rel=0.1) and one == pytest.approx(whole / 8, rel=0.3)
    assert activations(0, checkpointing=True) < 0.3 * whole


def test_more_devices_hold_less_only_of_a_sharded_base():
    config = LLaMAConfig(**{**TINY, "n_layer": 8})
    one, whole, sharded = (
        estimate(config, "lora", {}, torch.bfloat16, lengths=[8], devices=n, sharded=cut)
        for n, cut in ((1, False), (4, False), (4, True))
    )
    assert one.frozen == whole.frozen and one.trained == whole.trained == sharded.trained
    block = (one.frozen - 2 * (2 * 97 + 1) * 48) // 8  # the embedding, the head and the norm stay whole
    assert sharded.frozen == one.frozen - 8 * block + 2 * block + 2 * block


def test_a_gpu_is_estimated_without_one():
    cpu, cuda = (estimate_tiny("adapter_v2", device_type=name) for name in ("cpu", "cuda"))
    assert cuda.activations == pytest.approx(cpu.activations, rel=0.01) and cuda.lasting == cpu.lasting


def test_a_method_without_a_line_in_methods_is_refused():
    with pytest.raises(UserError, match="the method 'ia5' is none of .*adapter"):
        estimate(LLaMAConfig(**TINY), "ia5", {}, torch.float32, lengths=[8])


def test_what_is_said_about_the_room():
    found = Estimate(600, 20, 20, 40, activations=200, logits=120, update=30)
    assert found.lasting == 680 and found.total == 1000
    assert check_room(found, 2000, batch_tokens=320, longest=100, savings=[]) == ""
    warning = check_room(found, 1250, batch_tokens=320, longest=60, savings=[])
    assert warning.startswith("warning: a step takes") and "pass --train.micro_batch_tokens 70" in warning  # 60 % of it
    without = check_room(found, 1250, 320, longest=71, savings=["--checkpointing", "--quantize int8"])
    assert "micro_batch_tokens" not in without
    assert without.endswith("; pass one or more of --checkpointing, --quantize int8, or take another method")
    update = Estimate(600, 20, 20, 40, activations=20, logits=12, update=300)  # AdamW's own, whatever the micro-batch
    assert "micro_batch_tokens" not in check_room(update, 1250, 320, longest=60, savings=["--checkpointing"])
    with pytest.raises(UserError, match="pass one or more of --strategy fsdp, or take another method"):
        check_room(found, 900, 320, 60, ["--strategy fsdp"])


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    for name, text in {"max": "5000", "current": "3000", "stat": "anon 1\ninactive_file 700"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    files = (str(tmp_path), "memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(launch, "CGROUP_FILES", {"": files})
    assert launch.free_memory(torch.device("cpu")) == 5000 - 3000 + 700
    (tmp_path / "memory.max").write_text("max")
    assert launch.free_memory(torch.device("cpu")) > 10**6


def test_a_run_says_what_it_needs_before_it_runs_out(tmp_path, monkeypatch):
    write_rows(tmp_path / "data" / "train.json", sums(20))
    write_rows(tmp_path / "data" / "validation.json", sums(30)[25:])
    flags = ["--checkpoint_dir", make_base(tmp_path / "base"), "--data", tmp_path / "data", "--eval_samples", 0]
    flags += ["--train.max_steps", 1, "--start_layer", 1, "--out_dir", tmp_path / "out"]
    monkeypatch.setattr("lit_llama.devices.memory.free_memory", lambda device: 300_000)
    message = "a step takes about .* GB on each device, where .* are free; pass .*--quantize int8, --checkpointing, a"
    refuse("finetune/adapter.py", *flags, message=message)
    refuse("finetune/adapter.py", *flags, "--quantize", "int8", message="pass one or more of .*--checkpointing, a")
    assert not (tmp_path / "out" / "method.json").exists()
    monkeypatch.setattr("lit_llama.devices.memory.free_memory", lambda device: 10**9)
    result = run("finetune/adapter.py", *flags)
    assert result.returncode == 0 and "warning" not in result.stderr


def test_the_script_prints_a_table(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLaMAConfig(**TINY, name="tiny").__dict__))
    flags = ["--model", tmp_path, "--method", "lora", "--arguments", "{r: 4}", "--seq_length", 16]
    printed = succeed("scripts/estimate_memory.py", *flags, "--micro_batch_tokens", 64)
    assert "lora on tiny, bf16-true, micro-batches of 4 x 16 tokens" in printed and "in all, on each device" in printed
    last = succeed("scripts/estimate_memory.py", *flags, "--device", "cpu").splitlines()[-1]
    if (status := Path("/proc/self/status")).exists():
        held = float(re.fullmatch(r"the interpreter and its libraries, here +([\d.]+) GB on top", last)[1])
        assert held == pytest.approx(int(status.read_text().split("VmRSS:")[1].split()[0]) * 1024 / 1e9, rel=0.1)
    whole = succeed("scripts/estimate_memory.py", *flags[:2], "--method", "soft_prompt", "--seq_length", 10**6)
    assert f" x {TINY['block_size'] - 20} tokens" in whole  # the prompt's 20 need room, too
    refuse("scripts/estimate_memory.py", *flags, "--arguments", "{rank: 4}", message="do not fit lora")
    refuse("scripts/estimate_memory.py", "--model", "8B", message="neither a folder with a base nor one of 7B, 13B")


def test_a_narrow_base_counts_as_what_it_is_kept_in():
    wide, narrow = estimate_tiny("lora"), estimate_tiny("lora", quantize="int8")
    model = tuned("lora")
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2 and not p.requires_grad]
    assert wide.frozen - narrow.frozen == 3 * sum(p.numel() for p in matrices) > 0
    assert narrow.trained == wide.trained
