"""--compile in training, evaluation and the chat, in every precision. What compiled blocks compute: test_blocks.py."""

import re

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


def check_compiled(precision: str, *command: object, stdin: str = "") -> None:
    """In float32 the script prints what it prints without --compile; in bfloat16 other roundings may end an answer."""
    plain, compiled = (run(*command, "--precision", precision, *more, stdin=stdin) for more in ([], ["--compile"]))
    assert compiled.returncode == 0 and "error" not in compiled.stderr, compiled.stderr
    if precision == "32-true":
        assert re.sub(r"\d+ ms", "", compiled.stdout) == re.sub(r"\d+ ms", "", plain.stdout)


@every_kind
def test_evaluate(precision, kind, folder):
    flags = ["--trained_dir", folder / "trained", "--data", folder / "data", "--batch_size", 3, "--quantize", kind]
    check_compiled(precision, "scripts/evaluate.py", *flags)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_chat(precision, folder):
    said = f"add 3 and 9\n/load {folder / 'trained'}\nadd 4 and 1\n/load\nand 5?\n"
    flags = ["--checkpoint_dir", folder / "base", "--max_new_tokens", 8]
    check_compiled(precision, "generate/chat.py", *flags, stdin=said)


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
