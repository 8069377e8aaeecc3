"""The loop of a finetune script: what a step means, the schedule, the metrics, stopping and resuming."""

import importlib
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ARGS, bytes_of, finetune, metrics, sums, timeless_metrics, to_samples, tokens, tuned, write_rows
from lightning.fabric import Fabric

from finetune import adapter
from lit_llama.common.errors import Interrupted, UserError
from lit_llama.common.files import read_json, read_tensors, write_json
from lit_llama.data.batches import IGNORE, TokenizedSample
from lit_llama.generate.load import load_trained_folder
from lit_llama.settings import ROOT, TrainArgs
from lit_llama.train.loss import FrozenHeadLoss, head_loss, split_by_tokens, split_evenly, target_loss
from lit_llama.train.run import STATE_FILE, Run
from lit_llama.train.run import write_rows as write_metrics
from lit_llama.trained import trainable_parameters

LOOPS = [path for path in sorted((ROOT / "finetune").glob("*.py")) if path.stem != "features"]


@pytest.fixture
def hook(monkeypatch):
    """Calls a function with the model of the next runs, once the method is on it."""

    def set_hook(function: Callable, method: str = "adapter") -> None:
        script = importlib.import_module(f"finetune.{method}")
        add = getattr(script, f"add_{method}")
        monkeypatch.setattr(script, f"add_{method}", lambda model, **kwargs: (add(model, **kwargs), function(model)))

    return set_hook


# The scripts


def loop_of(path: Path) -> list[str]:
    """The lines of the loop, without the line that is marked as one script's own."""
    lines = path.read_text(encoding="utf-8").split("    # Loop: ")[1].split("    answers.show()")[0].splitlines()
    return [line for line in lines if not line.endswith("# lora.py alone: a resumed run drops the same activations")]


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_all_scripts_have_the_same_loop(path):
    assert len(LOOPS) == 8 and len(loop_of(path)) > 25
    assert loop_of(path) == loop_of(LOOPS[0]), "a fork that changes one loop may delete this test"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 156


# The loss of a step


TARGETS = tokens(7).roll(-1, 1)
TARGETS[:, :3] = IGNORE  # a prompt
SAMPLES = to_samples(tokens(7), TARGETS, [11, 4, 9, 7, 10, 5, 8])


def test_the_loss_is_the_cross_entropy_of_the_targets_alone():
    model, expected = tuned("adapter"), torch.zeros(())
    for sample in SAMPLES:
        logits = model(torch.tensor([sample.ids]))[0]
        expected += F.cross_entropy(logits, torch.tensor(sample.targets).long(), ignore_index=IGNORE, reduction="sum")
    for chunk_size in (1, 7, 10_000):
        torch.testing.assert_close(target_loss(model, SAMPLES, chunk_size), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [5, 100])
def test_the_gradient_of_a_frozen_head_is_autograds(dtype, chunk_size):
    torch.manual_seed(1)
    h, targets = torch.randn(13, 24).to(dtype).requires_grad_(), torch.randint(50, (13,))
    same, head = h.detach().clone().requires_grad_(), torch.nn.Linear(24, 50).to(dtype).requires_grad_(False)
    expected = head_loss(head, h, targets)
    loss = FrozenHeadLoss.apply(same, head.weight, head.bias, targets, chunk_size)
    (0.3 * (loss + expected)).backward()
    tolerance = {"rtol": 0.02, "atol": 5e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close([loss, same.grad], [expected, h.grad], **tolerance)


def test_the_gradient_of_a_step_does_not_depend_on_micro_batch_tokens():
    model, fabric, found = tuned("adapter").double(), Fabric(accelerator="cpu", devices=1), []
    for limit in (10_000, 1, 12, 30):
        batches = split_by_tokens(SAMPLES, limit, fabric, model)
        assert (len(batches) > 1) == (limit < 10_000)
        loss = torch.stack([target_loss(model, batch) for batch in batches]).sum()
        found.append([loss, *torch.autograd.grad(loss, list(trainable_parameters(model).values()))])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_ranks_share_the_samples_of_a_step_evenly(world_size):
    parts = split_evenly(SAMPLES, world_size)
    assert sorted(id(sample) for own in parts for sample in own) == sorted(map(id, SAMPLES))
    n_tokens = [sum(len(sample.ids) for sample in own) for own in parts]
    assert max(n_tokens) - min(n_tokens) <= 11 and (all(n_tokens) or world_size > 7)
    assert all(split_evenly([TokenizedSample([1] * n, [1] * n) for n in (500, 10, 10, 10)], min(world_size, 4)))


# The schedule and the gradient


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine_to_zero():
    assert TrainArgs(epochs=3, batch_size=5).total_steps(23) == 14
    args = TrainArgs(max_steps=100, warmup_steps=10, learning_rate=3e-2)
    rates = [args.learning_rate_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(3e-3) and rates[9] == rates[10] == pytest.approx(3e-2) == max(rates)
    assert rates[55] == pytest.approx(1.5e-2) and rates[100] == pytest.approx(0, abs=1e-12)
    rates = [TrainArgs(max_steps=50, learning_rate=1.0).learning_rate_at(step, 50) for step in range(50)]
    assert rates[4] == 1.0 and rates[3] < 1.0 and rates[6] < 1.0  # the warm-up is a tenth by default


@pytest.mark.parametrize("clip", [1e-6, 0.0])
def test_the_optimizer_gets_the_schedules_rate_and_the_clipped_gradient(folder, tmp_path, monkeypatch, clip):
    rates, norms, step = [], [], torch.optim.AdamW.step

    def watch(self):
        rates.append([group["lr"] for group in self.param_groups])
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm())
        step(self)

    monkeypatch.setattr(adapter, "check_memory", lambda *_: None)  # it imagines a step of AdamW
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    finetune(folder, tmp_path, gate_lr_scale=0.5, clip=clip)
    expected = [TrainArgs(**ARGS).learning_rate_at(i, 6) for i in range(6)]
    assert rates == [[rate, 0.5 * rate] for rate in expected] and max(expected) == 0.02
    assert [float(row["lr"]) for row in metrics(tmp_path)] == expected
    logged = [float(row["grad_norm"]) for row in metrics(tmp_path)]  # before it is clipped
    assert min(logged) > 1e-3
    assert norms == pytest.approx([clip or norm for norm in logged], rel=0.05)


# A run's folder


def test_a_run_that_gets_no_better_ends_and_leaves_the_model_at_its_best(folder, tmp_path, monkeypatch):
    losses, after = iter([3.0, 1.0, 2.0, 1.5, 0.5]), []
    monkeypatch.setattr(adapter, "validate", lambda *_: next(losses))
    monkeypatch.setattr(adapter, "unwrap_blocks", after.append)
    finetune(folder, tmp_path, max_steps=15, patience=2)
    assert len(metrics(tmp_path)) == 12 and next(losses) == 0.5
    seconds = [float(row["seconds"]) for row in metrics(tmp_path)]
    assert read_json(tmp_path / "costs.json")["seconds"] == pytest.approx(sum(seconds))
    last, about = read_tensors(tmp_path / STATE_FILE)
    assert about["best_step"] == 6 and about["step"] == 10
    for name, best in read_tensors(tmp_path / "trained.safetensors")[0].items():
        assert not torch.equal(best, last[f"trained.{name}"])
        assert torch.equal(best, after[0].state_dict()[name])


def test_a_loop_that_ends_before_a_validation_keeps_its_last_step(folder, tmp_path, monkeypatch):
    steps = Run.steps
    monkeypatch.setattr(Run, "steps", lambda *args: islice(steps(*args), 2))  # as a break in the script
    finetune(folder, tmp_path)
    assert len(metrics(tmp_path)) == 2
    model, _ = load_trained_folder(tmp_path)
    assert all(attn.gating_factor.any() for attn in (block.attn for block in model.transformer.h[1:]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("target_loss", r"step 2: the gradient is not finite; start again .*train.json, row \d+"),
        ("validate", "the validation loss is nan"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_is_not_saved(folder, tmp_path, monkeypatch, hook, function, message):
    real, calls, models = getattr(adapter, function), [], []
    hook(models.append)  # also one on the meta device

    def break_the_second(*args):
        calls.append(1)
        if len(calls) == 2:
            models[-1].transformer.ln_f.weight.data.fill_(math.nan)
        return real(*args)

    monkeypatch.setattr(adapter, function, break_the_second)
    with pytest.raises(UserError, match=message):
        finetune(folder, tmp_path)
    tensors = [tensor for path in tmp_path.rglob("*.safetensors") for tensor in read_tensors(path)[0].values()]
    assert tensors and all(tensor.isfinite().all() for tensor in tensors)


# Stopping and resuming


def stop_at(forward_passes: int) -> Callable:
    """A hook of a model that sends this process a signal in the middle of an optimizer step."""
    left = [forward_passes]

    def count(*_) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)

    return lambda model: model.transformer.ln_f.register_forward_pre_hook(count)


@pytest.mark.parametrize(
    ("method", "flags"),
    [("adapter", dict(precision="bf16-true")), ("lora", dict(dropout=0.3)), ("prefix", dict(mlp_size=6))],
)
def test_interrupted_and_resumed_is_the_run_that_was_never_stopped(folder, tmp_path, hook, method, flags):
    """A prefix keeps something else than it trains."""
    handler = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background
    finetune(folder, tmp_path / "whole", method, **flags)
    hook(stop_at(6), method)
    with pytest.raises(Interrupted, match="at step [1-5] of 6"):
        finetune(folder, tmp_path / "parts", method, **flags)
    assert 0 < len(metrics(tmp_path / "parts")) < 6
    with open(tmp_path / "parts" / "metrics.csv", "a") as file:
        file.write("99,a row of a step that was never saved")
    torch.rand(7)  # whatever else draws random numbers in between
    finetune(folder, tmp_path / "parts", method, resume=True, **flags)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert timeless_metrics(tmp_path / "parts") == timeless_metrics(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_stops_at_once_and_the_last_save_is_resumed(folder, tmp_path, hook):
    flags = dict(micro_batch_tokens=1)  # every sample is a micro-batch
    finetune(folder, tmp_path / "whole", **flags)
    first, second = stop_at(2), stop_at(3)
    hook(lambda model: (first(model), second(model)))
    with pytest.raises(KeyboardInterrupt):
        finetune(folder, tmp_path / "parts", **flags)
    assert not metrics(tmp_path / "parts")  # in the middle of the first step
    finetune(folder, tmp_path / "parts", resume=True, **flags)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_training_outside_the_main_thread_sets_no_handlers(folder, tmp_path):
    thread = threading.Thread(target=finetune, args=(folder, tmp_path))
    thread.start()
    thread.join()
    assert len(metrics(tmp_path)) == 6


def test_a_base_in_the_clone_is_not_overwritten_from_another_folder(folder, tmp_path, monkeypatch):
    for module in ("lit_llama.trained", "lit_llama.train.run"):
        monkeypatch.setattr(f"{module}.ROOT", folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the base itself"):
        finetune(folder, folder / "base", overwrite=True)


def test_a_run_continues_with_other_settings_if_that_is_allowed(folder, tmp_path, capsys):
    finetune(folder, tmp_path)
    more = dict(resume=True, max_steps=9, batch_size=3)
    with pytest.raises(UserError, match="train.max_steps was 6, now 9; train.batch_size was 5, now 3.*--allow_changes"):
        finetune(folder, tmp_path, **more)
    finetune(folder, tmp_path, allow_changes=True, **more)
    assert "note: continuing with other settings: train.max_steps was 6, now 9" in capsys.readouterr().out
    assert [int(row["step"]) for row in metrics(tmp_path)] == list(range(1, 10))
    assert read_json(tmp_path / "method.json")["train"]["batch_size"] == 3
    (tmp_path / "metrics.csv").unlink()
    finetune(folder, tmp_path, micro_batch_tokens=64, save_every=1, **more)  # the changes are the run's own now


def test_a_best_step_counts_for_its_own_validation_data_alone(folder, tmp_path, monkeypatch):
    out, data = tmp_path / "out", tmp_path / "sums"
    monkeypatch.setattr(adapter, "validate", lambda *_: 1.0)
    finetune(folder, out)
    write_rows(data / "train.json", sums(23))
    write_rows(data / "validation.json", sums(60)[51:])
    monkeypatch.setattr(adapter, "validate", lambda *_: 2.0)
    other = dict(data=str(data), resume=True, max_steps=9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after method.json, before any state
        patch.setattr(Run, "load_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        finetune(folder, out, allow_changes=True, **other)
    finetune(folder, out, **other)
    assert read_tensors(out / STATE_FILE)[1]["best_step"] == 9


def test_a_folder_of_an_earlier_version_resumes(folder, tmp_path, hook):
    finetune(folder, tmp_path / "whole")
    hook(stop_at(6))
    with pytest.raises(Interrupted):
        finetune(folder, tmp_path / "parts")
    method = read_json(tmp_path / "parts" / "method.json")
    method["trained_numbers"] = method.pop("trained_parameters")
    method["optimizer"] = [{"weight_decay": 0.02, "betas": [0.9, 0.95]}, {"weight_decay": 0.0, "lr_scale": 0.25}]
    for later in ("gate_lr_scale", "quantize"):
        del method[later]
    write_json(tmp_path / "parts" / "method.json", method)
    rows = [{k: v for k, v in row.items() if k != "grad_norm"} for row in metrics(tmp_path / "parts")]
    write_metrics(tmp_path / "parts" / "metrics.csv", rows)
    finetune(folder, tmp_path / "parts", resume=True)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert [bool(row["grad_norm"]) for row in metrics(tmp_path / "parts")].count(False) == len(rows)
    assert load_trained_folder(tmp_path / "parts")[1]["trained_parameters"] == 264


def test_a_lora_run_from_before_rslora_goes_on_without_it(folder, tmp_path):
    finetune(folder, tmp_path, "lora")
    method = read_json(tmp_path / "method.json")
    del method["arguments"]["rslora"]
    write_json(tmp_path / "method.json", method)
    with pytest.raises(UserError, match="arguments.rslora was False, now True"):
        finetune(folder, tmp_path, "lora", resume=True, rslora=True)
    finetune(folder, tmp_path, "lora", resume=True, allow_changes=True, max_steps=9)
    assert load_trained_folder(tmp_path)[1]["arguments"]["rslora"] is False


# Ending, going on


def test_a_finished_run_is_not_changed_by_resume_and_replaced_by_overwrite(folder, tmp_path, capsys):
    finetune(folder, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    other = write_rows(tmp_path.with_name("other") / "rows.json", sums(40)[::-1])
    finetune(folder, tmp_path, data=str(other), resume=True, allow_changes=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert "has taken all of its 6 steps; nothing is changed" in capsys.readouterr().out
    shutil.copytree(folder / "base", tmp_path, dirs_exist_ok=True)  # as if finetune/full.py had been there
    finetune(folder, tmp_path, overwrite=True, max_steps=3)
    assert len(metrics(tmp_path)) == 3 and (tmp_path / "notes.txt").read_text() == "mine"
    assert not any((tmp_path / file.name).exists() for file in (folder / "base").iterdir())


def test_a_new_run_begins_with_a_trained_folder(folder, tmp_path, monkeypatch):
    finetune(folder, tmp_path / "first")
    finetune(folder, tmp_path / "second", init_from=str(tmp_path / "first"), learning_rate=0.0)
    first, second = (read_tensors(tmp_path / name / "trained.safetensors")[0] for name in ("first", "second"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert read_json(tmp_path / "second/method.json")["init_from"] == str(tmp_path / "first")
    with pytest.raises(UserError, match="--init_from .*first: arguments.prompt_length was 4, now 5; pass the same"):
        finetune(folder, tmp_path / "third", init_from=str(tmp_path / "first"), prompt_length=5)
    with pytest.raises(UserError, match="--init_from .*first: method was 'adapter', now 'lora'; .*; pass the same"):
        finetune(folder, tmp_path / "third", "lora", init_from=str(tmp_path / "first"))
    assert not (tmp_path / "third").exists()
    finetune(folder, tmp_path / "mlp", "prefix", max_steps=3, prompt_length=4, mlp_size=6)
    further = dict(init_from=str(tmp_path / "mlp"), max_steps=3, prompt_length=4)
    with pytest.raises(UserError, match="without their MLP; pass --mlp_size 0"):
        finetune(folder, tmp_path / "flat", "prefix", mlp_size=6, **further)
    finetune(folder, tmp_path / "flat", "prefix", **further)
