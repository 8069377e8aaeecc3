"""--cache_trunk: the same losses as without, found by structure, refused where nothing is saved, gone afterwards."""

import pytest
import torch
from lightning.fabric import Fabric
from test_methods import CASES, shake
from test_model import tiny_model
from test_scripts import metrics, refuse, run_process, succeed
from tools import make_base, sums, write_rows

from lit_llama.batches import Encoded
from lit_llama.cli import UserError
from lit_llama.methods import METHODS
from lit_llama.train import TrainArgs, step_gradient, validate
from lit_llama.trained import trained_tensors
from lit_llama.trunk import TRUNK_FILE, cached_trunk, check_reuse, trunk_size

TOP = {
    "adapter": ("adapter", dict(prompt_length=4, start_layer=2), 2),
    "lora": ("lora", dict(r=3, dropout=0.0, start_layer=1), 1),
    "output_layers": ("output_layers", dict(n_blocks=1), 2),
    "the head alone": ("output_layers", dict(n_blocks=0), 3),
}
every_top = pytest.mark.parametrize("case", TOP)


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def build(case: str, dtype=torch.float32, **changes):
    method, arguments, _ = TOP[case]
    model = tiny_model(**changes).to(dtype).requires_grad_(False)
    METHODS[method](model, **arguments)
    shake(model)
    return model


def samples(n: int, seed: int = 0) -> list[Encoded]:
    """Of uneven length; the first tokens have no target."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (n,), generator=generator).tolist()
    rows = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]
    return [Encoded(row, [-100, *row[2:], 1]) for row in rows]


@every_top
def test_the_trunk_ends_below_the_first_block_that_changes(case):
    assert trunk_size(build(case)) == TOP[case][2]


@every_top
def test_losses_and_gradients_are_the_same_in_micro_batches_of_any_composition(case, fabric, tmp_path):
    model, train, val = build(case), samples(12), samples(5, seed=1)
    expected = {}
    for tokens in (40, 90):
        loss = step_gradient(fabric, model, train[3:9], tokens), validate(fabric, model, val, tokens)
        expected[tokens] = loss, {name: t.grad.clone() for name, t in trained_tensors(model).items()}
        model.zero_grad()
    with cached_trunk(fabric, model, [train, val], 60, tmp_path) as (train_rows, val_rows):
        assert (tmp_path / TRUNK_FILE).stat().st_size == 4 * 48 * sum(len(s.ids) for s in train + val)
        assert [s.targets for s in train_rows] == [s.targets for s in train]
        for tokens, (losses, gradients) in expected.items():
            found = step_gradient(fabric, model, train_rows[3:9], tokens), validate(fabric, model, val_rows, tokens)
            assert found == pytest.approx(losses, rel=1e-6)
            for name, tensor in trained_tensors(model).items():
                torch.testing.assert_close(tensor.grad, gradients[name], atol=1e-5, rtol=1e-5)
            model.zero_grad()


def test_the_trunk_is_not_computed_again(fabric, tmp_path):
    model, train, calls = build("adapter"), samples(8), []
    with cached_trunk(fabric, model, [train, []], 60, tmp_path) as (rows, _):
        model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *_: calls.append("trunk"))
        model.transformer.h[2].attn.c_attn.register_forward_hook(lambda *_: calls.append("top"))
        step_gradient(fabric, model, rows, 1000)
    assert "top" in calls and "trunk" not in calls


def test_the_model_is_whole_again_and_the_file_is_gone_also_after_an_error(fabric, tmp_path):
    model = build("adapter", tie_embeddings=True)
    modules, names = list(model.modules()), list(model.state_dict())
    for error in (None, RuntimeError("stop")):
        try:
            with cached_trunk(fabric, model, [samples(4), samples(2)], 60, tmp_path):
                assert list(model.state_dict()) == names and (tmp_path / TRUNK_FILE).exists()
                if error:
                    raise error
        except RuntimeError as raised:
            assert raised is error
        assert list(model.modules()) == modules
        assert not list(tmp_path.iterdir())


def test_a_bfloat16_base_keeps_bfloat16_rows(fabric, tmp_path):
    model, train = build("lora", torch.bfloat16), samples(6)
    expected = step_gradient(fabric, model, train, 1000)
    with cached_trunk(fabric, model, [train, []], 1000, tmp_path) as (rows, _):
        assert (tmp_path / TRUNK_FILE).stat().st_size == 2 * 48 * sum(len(s.ids) for s in train)
        assert step_gradient(fabric, model, rows, 1000) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("case", ["full", "soft_prompt", "prefix", "prefix by an MLP", "houlsby", "adapter_v2", "lora"])
def test_a_method_that_changes_the_first_block_or_its_input_is_refused(case):
    method, arguments = CASES[case]
    model = tiny_model().requires_grad_(False)
    METHODS[method](model, **arguments)
    with pytest.raises(UserError, match="no block's output stays the same"):
        trunk_size(model)


def test_a_run_that_reads_each_sample_once_is_refused():
    model = build("adapter")
    check_reuse(model, TrainArgs(max_steps=6, batch_size=2), n_samples=11)
    for once in (TrainArgs(max_steps=5, batch_size=2), TrainArgs(epochs=1, batch_size=11)):
        with pytest.raises(UserError, match="none comes twice"):
            check_reuse(model, once, n_samples=11)


def test_a_full_disk_is_seen_before_it_is_written_to(fabric, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_llama.trunk.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="0.0 are free"):
        with cached_trunk(fabric, build("adapter"), [samples(4), []], 60, tmp_path):
            pass
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunk")
    write_rows(folder / "data" / "train.json", sums(20))
    write_rows(folder / "data" / "validation.json", sums(30)[20:])
    flags = ["--checkpoint_dir", make_base(folder / "base"), "--data", folder / "data", "--precision", "32-true"]
    return [*flags, "--train.max_steps", 8, "--train.eval_every", 4, "--train.save_every", 4, "--eval_samples", 2]


def test_a_run_has_the_same_losses_and_may_be_resumed_without(flags, tmp_path):
    flags = [*flags, "--start_layer", 2, "--dropout", 0.1]
    for name, switch in (("with", ["--cache_trunk"]), ("without", [])):
        succeed("finetune/lora.py", *flags, "--out_dir", tmp_path / name, *switch)
    found, expected = ([float(row["loss"]) for row in metrics(tmp_path / name)] for name in ("with", "without"))
    assert found == pytest.approx(expected, rel=1e-5)
    assert not (tmp_path / "with" / TRUNK_FILE).exists()
    succeed("finetune/lora.py", *flags, "--out_dir", tmp_path / "with", "--resume")
    refuse("finetune/lora.py", *flags, "--start_layer", 0, "--cache_trunk", message="first block changes already")


@pytest.mark.slow
def test_two_ranks_share_one_file(flags, tmp_path):
    flags = [*flags, "--n_blocks", 1, "--out_dir"]
    result = run_process("finetune/output_layers.py", *flags, tmp_path / "two", "--devices", 2, "--cache_trunk")
    assert result.returncode == 0, result.stderr
    succeed("finetune/output_layers.py", *flags, tmp_path / "one")
    found, expected = ([float(row["loss"]) for row in metrics(tmp_path / name)] for name in ("two", "one"))
    assert found == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / "two" / TRUNK_FILE).exists()
