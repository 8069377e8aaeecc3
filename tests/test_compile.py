"""--compile in training and in generation, in every precision. What compiled blocks compute: test_blocks.py."""

import pytest
import torch
from helpers import make_base, metrics, run, save_trained, sums, write_rows

pytestmark = pytest.mark.slow
every_kind = pytest.mark.parametrize(
    ("precision", "kind"), [("32-true", "none"), ("bf16-true", "none"), ("bf16-true", "int8")]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base of sizes that the int8 kernel takes, an adapter over it, and data."""
    folder = tmp_path_factory.mktemp("compile")
    make_base(folder / "base", n_layer=2, n_embd=64, head_size=16, intermediate_size=96)
    save_trained(folder / "base", folder / "trained", "adapter", start_layer=1)
    write_rows(folder / "data" / "train.json", sums(20))
    write_rows(folder / "data" / "validation.json", sums(28)[20:])
    return folder


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


@every_kind
def test_evaluate(precision, kind, folder):
    flags = ["--trained_dir", folder / "trained", "--data", folder / "data", "--batch_size", 3, "--quantize", kind]
    plain, compiled = (run("scripts/evaluate.py", *flags, "--precision", precision, *it) for it in ([], ["--compile"]))
    assert compiled.returncode == 0, compiled.stderr
    if precision == "32-true":  # in bfloat16 other roundings may end an answer
        assert compiled.stdout == plain.stdout


@every_kind
def test_training(precision, kind, folder, tmp_path):
    flags = ["--checkpoint_dir", folder / "base", "--data", folder / "data", "--start_layer", 1, "--eval_samples", 2]
    flags += ["--train.max_steps", 2, "--train.eval_every", 2, "--precision", precision, "--quantize", kind]
    losses = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        result = run("finetune/adapter.py", *flags, "--out_dir", tmp_path / name, *more)
        assert result.returncode == 0, result.stderr
        losses.append([float(row["loss"]) for row in metrics(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if precision == "32-true" else 0.02)
