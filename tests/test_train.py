"""The loop: what a step means, the schedule, the metrics, stopping and going on."""

import csv
import math
import os
import signal
import threading
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from tools import make_base, sums, write_rows

from lit_llama.batches import IGNORE, TokenizedSample, collate, micro_batches
from lit_llama.checkpoint import load_model
from lit_llama.cli import Interrupted, UserError
from lit_llama.data import load_task
from lit_llama.files import open_tensors, read_json, read_tensors
from lit_llama.methods.adapter import add_adapter
from lit_llama.methods.lora import add_lora
from lit_llama.runs import STATE_FILE, Run, read_metrics
from lit_llama.train import TrainArgs, fit, learning_rate_at, share, step_gradient, target_loss, train_step, validate
from lit_llama.trained import trained_tensors

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


def build(base, dtype=torch.float32, on=False):
    model = load_model(base)
    model.to(dtype).requires_grad_(False)
    torch.manual_seed(5)
    add_adapter(model, prompt_length=4, start_layer=1)
    if on:
        for block in model.transformer.h[1:]:
            torch.nn.init.normal_(block.attn.gating_factor)
    return model


def start(fabric, places, out_dir, resume=False, overwrite=False, allow_changes=False, model=None, **changes):
    """What a finetune script does, on the tiny base."""
    base, data = places
    args = TrainArgs(**{**ARGS, **changes})
    run = Run(fabric, out_dir, "base", resume, overwrite, allow_changes)
    task = load_task(data, base, None, args.max_seq_length)
    model = model or build(base)
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=args.learning_rate)
    run.begin("adapter", dict(prompt_length=4, start_layer=1), base, task, args, model, optimizer)
    fit(fabric, model, optimizer, task.train, task.validation, args, run)
    return model


def metrics(out_dir):
    with open(out_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# the loss of a step


def test_loss_is_the_cross_entropy_of_the_targets_alone(places):
    model, task = build(places[0], on=True), load_task(places[1], places[0], None, 512)
    ids, targets, _ = collate(task.train[:4])
    logits = model(ids)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    for chunk_size in (1, 7, 10_000):
        torch.testing.assert_close(target_loss(model, ids, targets, chunk_size=chunk_size), expected)


def gradients(fabric, model, samples, micro_batch_tokens):
    loss = step_gradient(fabric, model, samples, micro_batch_tokens)
    found = {name: tensor.grad.clone() for name, tensor in trained_tensors(model).items()}
    model.zero_grad(set_to_none=True)
    return loss, found


def test_gradient_of_a_step_does_not_depend_on_micro_batch_tokens(fabric, places):
    model, task = build(places[0], torch.float64, on=True), load_task(places[1], places[0], None, 512)
    for block in model.transformer.h[1:]:
        block.attn.double()
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
def test_ranks_share_every_micro_batch_evenly(places, world_size):
    task = load_task(places[1], places[0], None, 512)
    for micro_batch_tokens in (150, 10_000):
        shares = share(task.train, micro_batch_tokens, world_size)
        assert sorted(id(sample) for own in shares for batch in own for sample in batch) == sorted(map(id, task.train))
        tokens = [sum(len(sample.ids) for batch in own for sample in batch) for own in shares]
        assert max(tokens) - min(tokens) <= max(len(sample.ids) for sample in task.train)
        assert all(tokens) or world_size > len(task.train)
    uneven = [TokenizedSample([1] * n, [1] * n) for n in (500, 10, 10, 10)]
    assert all(share(uneven, 1024, min(world_size, 4)))


# the schedule


def test_schedule_rises_in_a_line_to_the_full_rate_and_falls_to_zero():
    args = TrainArgs(max_steps=100, warmup_steps=10, learning_rate=3e-2)
    rates = [learning_rate_at(step, 100, args) for step in range(101)]
    assert rates[0] == pytest.approx(3e-3) and rates[9] == rates[10] == pytest.approx(3e-2) == max(rates)
    assert rates[55] == pytest.approx(1.5e-2) and rates[100] == pytest.approx(0, abs=1e-12)


def test_a_group_of_tensors_may_learn_at_a_share_of_the_rate(fabric, places):
    model, task = build(places[0], on=True), load_task(places[1], places[0], None, 512)
    gates = [block.attn.gating_factor for block in model.transformer.h[1:]]
    prompts = [block.attn.adapter_wte.weight for block in model.transformer.h[1:]]
    groups = [{"params": prompts}, {"params": gates, "lr_scale": 0.25}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    train_step(fabric, model, optimizer, task.train[:4], 0.4, TrainArgs(**ARGS))
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1]


def test_the_learning_rate_really_reached_the_optimizer(fabric, places, tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (seen.append([g["lr"] for g in self.param_groups]), step(self))
    )
    start(fabric, places, tmp_path / "out")
    args = TrainArgs(**ARGS)
    assert seen == [[learning_rate_at(i, 6, args)] for i in range(6)] and [max(seen)] == [[0.02]]
    assert [float(row["lr"]) for row in metrics(tmp_path / "out")] == [lr for (lr,) in seen]


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


def test_clipping_bounds_the_update(fabric, places, tmp_path):
    base, data = places
    norms = []
    for clip in (1e-6, 0.0):
        model = build(base)
        before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
        task, args = (
            load_task(data, base, None, 512),
            TrainArgs(**{**ARGS, "clip": clip, "max_steps": 1, "warmup_steps": 0}),
        )
        run = Run(fabric, tmp_path / f"clip{clip}", "base")
        optimizer = torch.optim.SGD(trained_tensors(model).values(), lr=1.0)
        run.begin("adapter", {}, base, task, args, model, optimizer)
        fit(fabric, model, optimizer, task.train, task.validation, args, run)
        moved = [(tensor - before[name]).norm() for name, tensor in trained_tensors(model).items()]
        norms.append(torch.stack(moved).norm().item())
    assert norms[0] == pytest.approx(0.02 * 1e-6, rel=0.05) and norms[1] > 1e-4


# a run's folder


def test_metrics_hold_every_step_and_the_best_is_kept(fabric, places, tmp_path):
    model = start(fabric, places, tmp_path)
    rows = metrics(tmp_path)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [bool(row["val_loss"]) for row in rows] == [False, False, True, False, False, True]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    task = load_task(places[1], places[0], None, 512)
    best = min(float(row["val_loss"]) for row in rows if row["val_loss"])
    assert validate(fabric, model, task.validation, 1024) == pytest.approx(best, rel=1e-5)
    method = read_json(tmp_path / "method.json")
    assert method["method"] == "adapter" and method["trained_numbers"] == 2 * (4 * 32 + 4)
    assert method["base"]["name"] == "tiny" and method["prompt_style"] == "chatml"


def test_best_validation_wins_over_the_last_step(fabric, places, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr("lit_llama.train.validate", lambda *_: next(losses))
    model = start(fabric, places, tmp_path, max_steps=9)
    _, about = read_tensors(tmp_path / STATE_FILE)
    assert about["best_step"] == 6 and about["step"] == 9
    with open_tensors(tmp_path / "trained.safetensors") as best, open_tensors(tmp_path / STATE_FILE) as last:
        for name in best.keys():
            assert not torch.equal(best.get_tensor(name), last.get_tensor(f"trained.{name}"))
            assert torch.equal(best.get_tensor(name), model.state_dict()[name])  # fit leaves the model at its best


class StopAt:
    """A model hook that sends this process a signal in the middle of an optimizer step."""

    def __init__(self, model, forward_passes):
        self.left = forward_passes
        model.lm_head.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_and_resumed_is_the_run_that_was_never_stopped(fabric, places, tmp_path):
    handler = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background
    start(fabric, places, tmp_path / "whole")
    model = build(places[0])
    StopAt(model, forward_passes=6)
    with pytest.raises(Interrupted, match="at step [1-5] of 6"):
        start(fabric, places, tmp_path / "parts", model=model)
    stopped = len(metrics(tmp_path / "parts"))
    assert 0 < stopped < 6
    with open(tmp_path / "parts" / "metrics.csv", "a") as file:
        file.write("99,a row of a step that was never saved")
    start(fabric, places, tmp_path / "parts", resume=True)
    for name in ("trained.safetensors", STATE_FILE):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    columns = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(tmp_path / d)] for d in ("whole", "parts")
    ]
    assert columns[0] == columns[1]
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_leaves_a_step_after_the_micro_batch_and_the_step_is_taken_anew(fabric, places, tmp_path):
    alone = dict(micro_batch_tokens=1)  # every sample a micro-batch of its own
    start(fabric, places, tmp_path / "whole", **alone)
    model = build(places[0])
    stop = StopAt(model, forward_passes=ARGS["batch_size"] + 2)  # in the second step
    with pytest.raises(Interrupted, match="at step 1 of 6"):
        start(fabric, places, tmp_path / "parts", model=model, **alone)
    assert stop.left == 0  # no further micro-batch
    start(fabric, places, tmp_path / "parts", resume=True, model=model, **alone)  # that still has half a gradient
    for name in ("trained.safetensors", STATE_FILE):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_training_outside_the_main_thread_sets_no_handlers(fabric, places, tmp_path):
    thread = threading.Thread(target=start, args=(fabric, places, tmp_path / "out"))
    thread.start()
    thread.join()
    assert len(metrics(tmp_path / "out")) == 6


def test_a_folder_with_a_run_is_not_touched_without_being_told(fabric, places, tmp_path):
    start(fabric, places, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        start(fabric, places, tmp_path)
    with pytest.raises(UserError, match="give one of them"):
        start(fabric, places, tmp_path, resume=True, overwrite=True)
    with pytest.raises(UserError, match="train.learning_rate was 0.02, now 0.5"):
        start(fabric, places, tmp_path, resume=True, learning_rate=0.5)
    with pytest.raises(UserError, match="nothing to resume"):
        start(fabric, places, tmp_path / "new", resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "notes.txt").write_text("mine")
    start(fabric, places, tmp_path, overwrite=True, max_steps=3)
    assert len(metrics(tmp_path)) == 3 and (tmp_path / "notes.txt").read_text() == "mine"


def test_a_loss_that_is_not_finite_stops_before_the_step(fabric, places, tmp_path):
    model = build(places[0])
    passes = []
    model.lm_head.register_forward_hook(
        lambda _, __, logits: passes.append(1) or (logits * math.nan if len(passes) > 1 else None)
    )
    with pytest.raises(UserError, match=r"step \d, .*train.json, row \d+.*loss is nan.*the last good step is saved"):
        start(fabric, places, tmp_path, model=model)
    with open_tensors(tmp_path / STATE_FILE) as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())


def test_a_validation_loss_that_is_not_finite_never_becomes_the_best(fabric, places, tmp_path, monkeypatch):
    losses = iter([1.0, math.nan])
    monkeypatch.setattr("lit_llama.train.validate", lambda *_: next(losses))
    with pytest.raises(UserError, match="step 6: the validation loss is nan"):
        start(fabric, places, tmp_path)
    with open_tensors(tmp_path / "trained.safetensors") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())


def test_a_run_killed_before_its_first_save_can_be_resumed(fabric, places, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_llama.train.train_step", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        start(fabric, places, tmp_path / "parts")
    monkeypatch.undo()
    start(fabric, places, tmp_path / "parts", resume=True)
    start(fabric, places, tmp_path / "whole")
    parts, whole = ((tmp_path / name / "trained.safetensors").read_bytes() for name in ("parts", "whole"))
    assert parts == whole


def test_dropout_too_resumes_to_the_same_bytes(fabric, places, tmp_path):
    base, data = places
    task, args = load_task(data, base, None, 512), TrainArgs(**ARGS)

    def run_lora(out_dir, stop_after=None, resume=False):
        model = load_model(base).requires_grad_(False)
        torch.manual_seed(5)
        add_lora(model, dropout=0.3)
        run = Run(fabric, out_dir, "base", resume)
        optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=args.learning_rate)
        run.begin("lora", {}, base, task, args, model, optimizer)
        if stop_after:
            StopAt(model, stop_after)
        fit(fabric, model, optimizer, task.train, task.validation, args, run)

    run_lora(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_lora(tmp_path / "parts", stop_after=5)
    torch.rand(7)  # whatever else draws random numbers in between
    run_lora(tmp_path / "parts", resume=True)
    for name in ("trained.safetensors", STATE_FILE):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_goes_on_with_other_settings_where_that_is_allowed(fabric, places, tmp_path, capsys):
    start(fabric, places, tmp_path / "out")
    more = dict(resume=True, max_steps=9, batch_size=3)
    with pytest.raises(UserError, match="train.max_steps was 6, now 9; train.batch_size was 5, now 3.*--allow_changes"):
        start(fabric, places, tmp_path / "out", **more)
    start(fabric, places, tmp_path / "out", allow_changes=True, **more)
    assert "note: going on with other settings: train.max_steps was 6, now 9" in capsys.readouterr().out
    assert [int(row["step"]) for row in metrics(tmp_path / "out")] == list(range(1, 10))
    assert read_json(tmp_path / "out" / "method.json")["train"]["batch_size"] == 3
    start(fabric, places, tmp_path / "out", **more)  # they are the run's own now
    with pytest.raises(UserError, match="--allow_changes is for --resume"):
        start(fabric, places, tmp_path / "out", allow_changes=True)


def test_a_best_step_counts_for_its_own_validation_data_alone(fabric, places, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_llama.train.validate", lambda *_: 1.0)
    start(fabric, places, tmp_path / "out")
    write_rows(tmp_path / "data" / "train.json", sums(23))
    write_rows(tmp_path / "data" / "validation.json", sums(60)[51:])
    monkeypatch.setattr("lit_llama.train.validate", lambda *_: 2.0)
    other = (places[0], tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after method.json, before any state
        patch.setattr(Run, "load_state", Mock(side_effect=KeyboardInterrupt))
        start(fabric, other, tmp_path / "out", resume=True, allow_changes=True, max_steps=9)
    start(fabric, other, tmp_path / "out", resume=True, max_steps=9)
    assert read_tensors(tmp_path / "out" / STATE_FILE)[1]["best_step"] == 9


def test_a_loss_that_does_not_move_is_worth_a_warning(fabric, places, tmp_path, capsys):
    start(fabric, places, tmp_path / "stuck", max_steps=46, warmup_steps=2, learning_rate=0.0)
    assert "warning: after 44 steps the loss has not moved: 5." in capsys.readouterr().err
    start(fabric, places, tmp_path / "moving", max_steps=46, warmup_steps=2, learning_rate=0.05)
    assert "warning" not in capsys.readouterr().err


def test_memory_and_place_may_change_on_resume(fabric, places, tmp_path):
    start(fabric, places, tmp_path / "out", max_steps=4, eval_every=2)
    (tmp_path / "out" / "metrics.csv").unlink()
    same = dict(max_steps=4, eval_every=2, resume=True)
    start(fabric, places, tmp_path / "out", micro_batch_tokens=64, save_every=1, **same)
    with pytest.raises(UserError, match="train.batch_size was 5, now 6"):
        start(fabric, places, tmp_path / "out", batch_size=6, **same)


def test_a_warmup_that_never_ends_is_refused(fabric, places, tmp_path):
    with pytest.raises(UserError, match="warmup_steps 6 must be less than the 6 steps"):
        start(fabric, places, tmp_path, warmup_steps=6)
    rates = [learning_rate_at(step, 50, TrainArgs(max_steps=50, learning_rate=1.0)) for step in range(50)]
    assert rates[4] == 1.0 and rates[3] < 1.0 and rates[6] < 1.0  # a tenth where it is not given


def test_an_overwrite_that_fails_early_loses_nothing(fabric, places, tmp_path):
    start(fabric, places, tmp_path)
    before = (tmp_path / "trained.safetensors").read_bytes()
    Run(fabric, tmp_path, "base", overwrite=True)  # and then the data turns out to be missing, say
    assert (tmp_path / "trained.safetensors").read_bytes() == before


HEADER = "step,loss,lr,tokens,seconds,val_loss\n"


@pytest.mark.parametrize(
    "content, line",
    [
        (HEADER + "1,0.5,0.1,9,0.2,\n2,abc,0.1,9,0.2,\n", 3),
        (HEADER + "1.5,0.5,0.1,9,0.2,\n", 2),
        (HEADER + "1,0.5,0.1\n", 2),
        (HEADER + "1,0.5,0.1,9,0.2,,7\n", 2),
        ("1,0.5,0.1,9,0.2,\n2,0.5,0.1,9,0.2,\n", 2),
        ("step;loss\n1;2\n", 2),
        (HEADER + "1,\udcff,0.1,9,0.2,\n", 2),
    ],
)
def test_metrics_edited_by_hand(tmp_path, content, line):
    (tmp_path / "metrics.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"metrics.csv:{line}: "):
        read_metrics(tmp_path)


def test_resume_with_metrics_edited_by_hand(fabric, places, tmp_path):
    start(fabric, places, tmp_path / "out")
    path = tmp_path / "out/metrics.csv"
    whole = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n") + b"\r\n")  # as saved on Windows
    start(fabric, places, tmp_path / "out", resume=True)
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b"\n2,", b"\ntwo,"))
    with pytest.raises(UserError, match=r"metrics.csv:3: expected numbers for step, .*; correct that line"):
        start(fabric, places, tmp_path / "out", resume=True)
    path.unlink()
    start(fabric, places, tmp_path / "out", resume=True)
    assert path.read_text() == HEADER
