"""The loop of a finetune script: what a step means, the schedule, the metrics, stopping and resuming."""

import csv
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import make_base, sums, write_rows
from lightning.fabric import Fabric

from finetune import adapter, lora
from lit_llama.checkpoint import load_model
from lit_llama.common.errors import Interrupted, UserError
from lit_llama.common.files import open_tensors, read_json, read_tensors, write_json
from lit_llama.data.batches import IGNORE, TokenizedSample, collate, micro_batches
from lit_llama.data.task import load_task
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.adapter import add_adapter
from lit_llama.settings import TrainArgs
from lit_llama.train.evaluate import validate
from lit_llama.train.loss import split_by_tokens, split_evenly, target_loss
from lit_llama.train.run import STATE_FILE, Run, read_metrics
from lit_llama.trained import trained_tensors

SCRIPTS = sorted(path for path in (Path(__file__).parent.parent / "finetune").glob("*.py") if path.stem != "features")
ARGS = dict(max_steps=6, batch_size=5, learning_rate=0.02, warmup_steps=2, eval_every=3, save_every=2)


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_rows(folder / "data" / "train.json", sums(23))
    write_rows(folder / "data" / "validation.json", sums(40)[31:])
    return make_base(folder / "base"), folder / "data"


def build(base, dtype=torch.float32):
    """The method switched on: its gates are open."""
    model = load_model(base)
    model.to(dtype).requires_grad_(False)
    torch.manual_seed(5)
    add_adapter(model, prompt_length=4, start_layer=1)
    for block in model.transformer.h[1:]:
        torch.nn.init.normal_(block.attn.gating_factor)
    return model.to(dtype)


def train(places, out_dir, script=adapter, **flags):
    """A finetune script on the tiny base, called as from Python."""
    base, data = places
    changes = {name: flags.pop(name) for name in list(flags) if name in TrainArgs.__dataclass_fields__}
    if script is adapter:
        flags = dict(prompt_length=4, start_layer=1, prompt_init="normal") | flags
    args = TrainArgs(**{**ARGS, **changes})
    where = dict(checkpoint_dir=str(base), data=str(data), out_dir=str(out_dir))
    script.main(**{**where, "eval_samples": 0, "precision": "32-true", "train": args, **flags})


@pytest.fixture
def hook(monkeypatch):
    """Calls a function with the model of the next runs, once the method is on it."""

    def set_hook(function, script=adapter, name="add_adapter"):
        add = getattr(script, name)
        monkeypatch.setattr(script, name, lambda model, **arguments: (add(model, **arguments), function(model)))

    return set_hook


def metrics(out_dir):
    with open(out_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def bytes_of(folder):
    return [(folder / name).read_bytes() for name in ("trained.safetensors", STATE_FILE)]


# the scripts


def loop_of(path: Path) -> list[str]:
    """The lines from the loop on, without the line that says that it is one script's own."""
    lines = path.read_text(encoding="utf-8").split("    # Loop: ")[1].split("    answers.show()")[0].splitlines()
    return [line for line in lines if not line.endswith("alone: dropout depends on the step")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_all_scripts_have_the_same_loop(path):
    assert len(SCRIPTS) == 8 and len(loop_of(path)) > 25
    assert loop_of(path) == loop_of(SCRIPTS[0])
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 151


# the loss of a step


def test_loss_is_the_cross_entropy_of_the_targets_alone(places):
    model, task = build(places[0]), load_task(places[1], places[0], None, 512)
    ids, targets, _ = collate(task.train[:4])
    logits = model(ids)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    for chunk_size in (1, 7, 10_000):
        torch.testing.assert_close(target_loss(model, ids, targets, chunk_size=chunk_size), expected)


def gradients(fabric, model, samples, micro_batch_tokens):
    """Of a step, as the scripts compute it."""
    loss, n_targets = torch.zeros(()), sum(sample.n_targets for sample in samples)
    for batch in split_by_tokens(samples, micro_batch_tokens, fabric, model):
        part = target_loss(model, *collate(batch)) / n_targets
        part.backward()
        loss = loss + part.detach()
    found = {name: tensor.grad.clone() for name, tensor in trained_tensors(model).items()}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def test_gradient_of_a_step_does_not_depend_on_micro_batch_tokens(fabric, places):
    model, task = build(places[0], torch.float64), load_task(places[1], places[0], None, 512)
    loss, expected = gradients(fabric, model, task.train[:7], 10_000)
    for tokens in (1, 60, 100):
        assert len(micro_batches(task.train[:7], tokens)) > len(micro_batches(task.train[:7], 10_000))
        other_loss, found = gradients(fabric, model, task.train[:7], tokens)
        assert math.isclose(loss, other_loss, rel_tol=1e-9)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_validation_weighs_tokens_not_batches(fabric, places):
    model, task = build(places[0]), load_task(places[1], places[0], None, 512)
    total = sum(target_loss(model, *collate([sample])).item() for sample in task.validation)
    n_targets = sum(sample.n_targets for sample in task.validation)
    for tokens in (50, 2000):
        assert math.isclose(validate(fabric, model, task.validation, tokens), total / n_targets, rel_tol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_ranks_share_the_samples_of_a_step_evenly(places, world_size):
    task = load_task(places[1], places[0], None, 512)
    parts = split_evenly(task.train, world_size)
    assert sorted(id(sample) for own in parts for sample in own) == sorted(map(id, task.train))
    tokens = [sum(len(sample.ids) for sample in own) for own in parts]
    assert max(tokens) - min(tokens) <= max(len(sample.ids) for sample in task.train)
    assert all(tokens) or world_size > len(task.train)
    assert all(split_evenly([TokenizedSample([1] * n, [1] * n) for n in (500, 10, 10, 10)], min(world_size, 4)))


# the schedule


def test_schedule_rises_in_a_line_to_the_full_rate_and_falls_to_zero():
    args = TrainArgs(max_steps=100, warmup_steps=10, learning_rate=3e-2)
    rates = [args.learning_rate_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(3e-3) and rates[9] == rates[10] == pytest.approx(3e-2) == max(rates)
    assert rates[55] == pytest.approx(1.5e-2) and rates[100] == pytest.approx(0, abs=1e-12)


def test_the_learning_rate_really_reached_the_optimizer(places, tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(adapter, "check_memory", lambda *_: None)  # it imagines a step of AdamW
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (seen.append([g["lr"] for g in self.param_groups]), step(self))
    )
    train(places, tmp_path / "out", gate_lr_scale=0.5)
    rates = [TrainArgs(**ARGS).learning_rate_at(i, 6) for i in range(6)]
    assert seen == [[rate, 0.5 * rate] for rate in rates] and max(rates) == 0.02
    assert [float(row["lr"]) for row in metrics(tmp_path / "out")] == rates


def test_epochs_count_passes_over_the_data():
    assert TrainArgs(epochs=3, batch_size=5).total_steps(23) == 14
    assert TrainArgs(max_steps=7).total_steps(23) == 7


@pytest.mark.parametrize(
    "changes",
    [dict(max_steps=0), dict(max_steps=None), dict(batch_size=0), dict(learning_rate=-1.0), dict(clip=math.nan)],
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(UserError, match="--train"):
        TrainArgs(**{**ARGS, **changes})


def test_clipping_bounds_the_gradient(places, tmp_path, monkeypatch):
    norms = []

    def step(self):
        norms.append(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm().item())

    monkeypatch.setattr(adapter, "check_memory", lambda *_: None)  # it imagines a step of AdamW
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for clip in (1e-6, 0.0):
        train(places, tmp_path / f"clip{clip}", clip=clip, max_steps=1, warmup_steps=0)
    assert norms[0] == pytest.approx(1e-6, rel=0.05) and norms[1] > 1e-3
    for name in ("clip1e-06", "clip0.0"):  # the norm before it is cut
        assert float(metrics(tmp_path / name)[0]["grad_norm"]) == pytest.approx(norms[1], rel=1e-5)


# a run's folder


def test_metrics_hold_every_step_and_the_best_is_kept(fabric, places, tmp_path):
    train(places, tmp_path)
    rows = metrics(tmp_path)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert list(rows[0]) == ["step", "loss", "lr", "grad_norm", "tokens", "seconds", "val_loss"]
    assert [bool(row["val_loss"]) for row in rows] == [False, False, True, False, False, True]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    task = load_task(places[1], places[0], None, 512)
    best = min(float(row["val_loss"]) for row in rows if row["val_loss"])
    model, method = load_trained_folder(tmp_path)
    assert validate(fabric, model, task.validation, 1024) == pytest.approx(best, rel=1e-5)
    assert method == read_json(tmp_path / "method.json")
    assert method["method"] == "adapter" and method["trained_parameters"] == 2 * (4 * 32 + 4)
    assert method["base"]["name"] == "tiny" and method["prompt_style"] == "chatml"


def test_a_new_figure_becomes_a_column(places, tmp_path, monkeypatch):
    log = Run.log

    def log_more(self, step, **figures):
        log(self, step, **figures, **({"new": 7.5} if step >= 4 else {}))

    monkeypatch.setattr(Run, "log", log_more)
    train(places, tmp_path)
    assert [row["new"] for row in metrics(tmp_path)] == ["", "", "", "", "7.5", "7.5"]


def test_best_validation_wins_over_the_last_step(places, tmp_path, monkeypatch):
    losses, after = iter([3.0, 1.0, 2.0]), []
    monkeypatch.setattr(adapter, "validate", lambda *_: next(losses))
    monkeypatch.setattr(adapter, "unwrap_blocks", after.append)
    train(places, tmp_path, max_steps=9)
    _, about = read_tensors(tmp_path / STATE_FILE)
    assert about["best_step"] == 6 and about["step"] == 9
    with open_tensors(tmp_path / "trained.safetensors") as best, open_tensors(tmp_path / STATE_FILE) as last:
        for name in best.keys():
            assert not torch.equal(best.get_tensor(name), last.get_tensor(f"trained.{name}"))
            assert torch.equal(best.get_tensor(name), after[0].state_dict()[name])  # the model is left at its best


class StopAt:
    """A hook of a model that sends this process a signal in the middle of an optimizer step."""

    def __init__(self, forward_passes):
        self.left = forward_passes

    def put_on(self, model):
        model.lm_head.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_interrupted_and_resumed_is_the_run_that_was_never_stopped(places, tmp_path, hook, precision):
    handler = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background
    train(places, tmp_path / "whole", precision=precision)
    hook(StopAt(forward_passes=6).put_on)
    with pytest.raises(Interrupted, match="at step [1-5] of 6"):
        train(places, tmp_path / "parts", precision=precision)
    stopped = len(metrics(tmp_path / "parts"))
    assert 0 < stopped < 6
    with open(tmp_path / "parts" / "metrics.csv", "a") as file:
        file.write("99,a row of a step that was never saved")
    train(places, tmp_path / "parts", precision=precision, resume=True)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    columns = [[{**row, "seconds": ""} for row in metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert columns[0] == columns[1]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_stops_at_once_and_the_last_save_is_resumed(places, tmp_path, hook):
    train(places, tmp_path / "whole")
    first, second = StopAt(forward_passes=2), StopAt(forward_passes=3)
    hook(lambda model: (first.put_on(model), second.put_on(model)))
    with pytest.raises(KeyboardInterrupt):
        train(places, tmp_path / "parts", micro_batch_tokens=1)  # every sample is a micro-batch
    assert second.left == 0 and not read_metrics(tmp_path / "parts")  # in the middle of the first step
    train(places, tmp_path / "parts", resume=True, micro_batch_tokens=1)
    assert len(metrics(tmp_path / "parts")) == 6


def test_training_outside_the_main_thread_sets_no_handlers(places, tmp_path):
    thread = threading.Thread(target=train, args=(places, tmp_path / "out"))
    thread.start()
    thread.join()
    assert len(metrics(tmp_path / "out")) == 6


def test_a_folder_with_a_run_is_not_touched_without_being_told(places, tmp_path):
    train(places, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        train(places, tmp_path)
    with pytest.raises(UserError, match="give one of them"):
        train(places, tmp_path, resume=True, overwrite=True)
    with pytest.raises(UserError, match="train.learning_rate was 0.02, now 0.5"):
        train(places, tmp_path, resume=True, learning_rate=0.5)
    with pytest.raises(UserError, match="lr_scale was 0.25, now 0.5"):
        train(places, tmp_path, resume=True, gate_lr_scale=0.5)
    with pytest.raises(UserError, match="arguments.prompt_length was 4, now 5.*--overwrite"):
        train(places, tmp_path, resume=True, allow_changes=True, prompt_length=5)
    with pytest.raises(UserError, match="nothing to resume"):
        train(places, tmp_path / "new", resume=True)
    with pytest.raises(UserError, match="start_layer 7"):
        train(places, tmp_path / "new", start_layer=7)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not (tmp_path / "new").exists()  # a refused run leaves nothing behind
    (tmp_path / "notes.txt").write_text("mine")
    train(places, tmp_path, overwrite=True, max_steps=3)
    assert len(metrics(tmp_path)) == 3 and (tmp_path / "notes.txt").read_text() == "mine"


def test_a_gradient_that_is_not_finite_stops_before_the_step(places, tmp_path, hook):
    passes = []

    def spoil(model):
        model.lm_head.register_forward_hook(
            lambda _, __, logits: passes.append(1) or (logits * math.nan if len(passes) > 1 else None)
        )

    hook(spoil)
    with pytest.raises(UserError, match=r"step \d: the gradient is not finite; start again .*train.json, row \d+"):
        train(places, tmp_path)
    with open_tensors(tmp_path / STATE_FILE) as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())


def test_a_validation_loss_that_is_not_finite_never_becomes_the_best(places, tmp_path, monkeypatch):
    real, calls = adapter.validate, []

    def sometimes_nan(fabric, model, *rest):
        calls.append(1)
        if len(calls) == 2:
            model.transformer.ln_f.weight.data.fill_(math.nan)
        return real(fabric, model, *rest)

    monkeypatch.setattr(adapter, "validate", sometimes_nan)
    with pytest.raises(UserError, match="the validation loss is nan"):
        train(places, tmp_path)
    with open_tensors(tmp_path / "trained.safetensors") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())


def test_a_run_killed_before_its_first_save_can_be_resumed(places, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(adapter, "clip_gradient", lambda *_: (_ for _ in ()).throw(MemoryError))
        train(places, tmp_path / "parts")
    train(places, tmp_path / "parts", resume=True)
    train(places, tmp_path / "whole")
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_dropout_too_resumes_to_the_same_bytes(places, tmp_path, hook):
    train(places, tmp_path / "whole", lora, dropout=0.3)
    with pytest.raises(Interrupted):
        hook(StopAt(5).put_on, lora, "add_lora")
        train(places, tmp_path / "parts", lora, dropout=0.3)
    torch.rand(7)  # whatever else draws random numbers in between
    train(places, tmp_path / "parts", lora, dropout=0.3, resume=True)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_run_continues_with_other_settings_where_that_is_allowed(places, tmp_path, capsys):
    train(places, tmp_path / "out")
    more = dict(resume=True, max_steps=9, batch_size=3)
    with pytest.raises(UserError, match="train.max_steps was 6, now 9; train.batch_size was 5, now 3.*--allow_changes"):
        train(places, tmp_path / "out", **more)
    train(places, tmp_path / "out", allow_changes=True, **more)
    assert "note: continuing with other settings: train.max_steps was 6, now 9" in capsys.readouterr().out
    assert [int(row["step"]) for row in metrics(tmp_path / "out")] == list(range(1, 10))
    assert read_json(tmp_path / "out" / "method.json")["train"]["batch_size"] == 3
    train(places, tmp_path / "out", **more)  # they are the run's own now
    with pytest.raises(UserError, match="--allow_changes is for --resume"):
        train(places, tmp_path / "out", allow_changes=True)


def test_a_best_step_counts_for_its_own_validation_data_alone(places, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "validate", lambda *_: 1.0)
    train(places, tmp_path / "out")
    write_rows(tmp_path / "data" / "train.json", sums(23))
    write_rows(tmp_path / "data" / "validation.json", sums(60)[51:])
    monkeypatch.setattr(adapter, "validate", lambda *_: 2.0)
    other = (places[0], tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after method.json, before any state
        patch.setattr(Run, "load_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(other, tmp_path / "out", resume=True, allow_changes=True, max_steps=9)
    train(other, tmp_path / "out", resume=True, max_steps=9)
    assert read_tensors(tmp_path / "out" / STATE_FILE)[1]["best_step"] == 9


def test_a_loss_that_does_not_move_is_worth_a_warning(places, tmp_path, capsys):
    train(places, tmp_path / "stuck", max_steps=60, learning_rate=0.0, batch_size=2, eval_every=60, save_every=60)
    assert "warning: the loss has not fallen in 52 steps" in capsys.readouterr().err
    train(places, tmp_path / "moving", max_steps=60, learning_rate=0.05, batch_size=2, eval_every=60, save_every=60)
    assert "warning" not in capsys.readouterr().err


def test_memory_and_place_may_change_on_resume(places, tmp_path):
    train(places, tmp_path / "out", max_steps=4, eval_every=2)
    (tmp_path / "out" / "metrics.csv").unlink()
    same = dict(max_steps=4, eval_every=2, resume=True)
    train(places, tmp_path / "out", micro_batch_tokens=64, save_every=1, **same)
    with pytest.raises(UserError, match="train.batch_size was 5, now 6"):
        train(places, tmp_path / "out", batch_size=6, **same)


def test_a_folder_of_an_earlier_version_resumes(places, tmp_path):
    train(places, tmp_path / "whole")
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
        add = adapter.add_adapter
        patch.setattr(adapter, "add_adapter", lambda model, **kw: (add(model, **kw), StopAt(6).put_on(model)))
        train(places, tmp_path / "parts")
    method = read_json(tmp_path / "parts" / "method.json")
    method["trained_numbers"] = method.pop("trained_parameters")
    method["optimizer"] = [{"weight_decay": 0.02, "betas": [0.9, 0.95]}, {"weight_decay": 0.0, "lr_scale": 0.25}]
    for later in ("lr_scale", "quantize"):
        del method[later]
    write_json(tmp_path / "parts" / "method.json", method)
    rows = [{k: v for k, v in row.items() if k != "grad_norm"} for row in metrics(tmp_path / "parts")]
    with open(tmp_path / "parts" / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader(), writer.writerows(rows)
    train(places, tmp_path / "parts", resume=True)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert [bool(row["grad_norm"]) for row in metrics(tmp_path / "parts")].count(False) == len(rows)
    assert load_trained_folder(tmp_path / "parts")[1]["trained_parameters"] == 264


def test_a_warmup_that_never_ends_is_refused(places, tmp_path):
    with pytest.raises(UserError, match="warmup_steps 6 must be less than the 6 steps"):
        train(places, tmp_path, warmup_steps=6)
    rates = [TrainArgs(max_steps=50, learning_rate=1.0).learning_rate_at(step, 50) for step in range(50)]
    assert rates[4] == 1.0 and rates[3] < 1.0 and rates[6] < 1.0  # a tenth where it is not given


def test_leaving_the_loop_early_keeps_the_best_and_the_last_row(places, tmp_path, monkeypatch):
    """What ``break`` in a script's loop does."""

    def steps(self, *args):
        for step in real(self, *args):
            yield step
            if step == 3:
                return

    real = Run.steps
    monkeypatch.setattr(Run, "steps", steps)
    train(places, tmp_path)
    assert [int(row["step"]) for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "trained.safetensors").exists()
