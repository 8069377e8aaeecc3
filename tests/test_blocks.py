"""The two bodies of attention; blocks that are compiled or recomputed, also by the scripts: the same numbers."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import make_base, metrics, naive_attention, run, save_trained, sums, to_samples, tuned, write_rows

from lit_llama.attention import Texts, attention, plain_attention
from lit_llama.data.batches import IGNORE
from lit_llama.devices.blocks import unwrap_blocks, wrap_blocks
from lit_llama.generate.decode import generate_batch
from lit_llama.generate.stream import generate
from lit_llama.model import LLaMA
from lit_llama.train.loss import target_loss
from lit_llama.trained import trainable_parameters


def gradients(model: LLaMA, lengths: tuple[int, ...] = (11,)) -> list[torch.Tensor]:
    """The loss and every gradient, summed over batches of several lengths whose last row is half as long."""
    losses = []
    for length in lengths:
        ids = torch.arange(3 * length).view(3, length) % 89
        targets = ids.roll(-1, 1)
        targets[-1, length // 2 :] = IGNORE
        losses.append(target_loss(model, to_samples(ids, targets, [length, length, length // 2])))
    loss = torch.stack(losses).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(trainable_parameters(model).values()))]


def test_every_variant_of_a_block_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # what counts is how often
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    model = tuned("adapter")
    wrap_blocks(model, compile=True)
    for lengths in ((8, 12), (12,), (9, 7)):
        gradients(model, lengths)
    with torch.no_grad():
        for lengths in ([7], [4], [7, 7, 7], [7, 7, 4]):
            ids = torch.arange(len(lengths) * 7).view(-1, 7)
            target_loss(model, to_samples(ids, ids, lengths))
    assert len(list(generate(model, [1, 2, 3], 4, stop=set()))) == 4
    assert len(generate_batch(model, [[1, 2, 3], [4, 5]], 4, stop=set())) == 2


@pytest.mark.parametrize(("n_head", "n_kv_head"), [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("how", ["all", "causal", "one mask", "a mask for each row"])
@pytest.mark.parametrize("T", [1, 13])
def test_attention_is_the_naive_one_in_every_precision(n_head, n_kv_head, how, T):
    """Both bodies, values and gradients."""
    torch.manual_seed(1)
    S = T if how == "causal" else 29
    mask = torch.rand(3 if how == "a mask for each row" else 1, 1, T, S) < 0.5
    mask[..., 0] = True
    arguments = (mask if "mask" in how else None, how == "causal")
    q, k, v = (torch.randn(3, heads, n, 8).bfloat16() for heads, n in ((n_head, T), (n_kv_head, S), (n_kv_head, S)))
    weights = torch.randn(q.shape)

    def values_and_gradients(body, dtype):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        y = body(*inputs, *arguments)
        return [y, *torch.autograd.grad((y * weights.to(dtype)).sum(), inputs)]

    expected = values_and_gradients(naive_attention, torch.float64)
    bodies = [(body, dtype) for body in (attention, plain_attention) for dtype in (torch.float32, torch.bfloat16)]
    for body, dtype in bodies:
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        for found, exact in zip(values_and_gradients(body, dtype), expected, strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", ["adapter", "lora", "prefix by an MLP", "soft_prompt", "output_layers", "full"])
def test_checkpointed_blocks_have_the_same_gradients(case):
    model = tuned(case).train()
    if case == "lora":
        model.transformer.h[0].attn.c_attn.lora["q"].dropout = 0.5  # the same is dropped again
    torch.manual_seed(5)
    plain = gradients(model)
    torch.manual_seed(5)
    wrap_blocks(model, checkpointing=True)
    torch.testing.assert_close(gradients(model), plain)
    unwrap_blocks(model)
    assert all("forward" not in vars(block) for block in model.transformer.h)


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_blocks_with_varlen_attention_compile_whole_and_once_for_all_texts(method):
    """On the meta device, which takes the same way as CUDA."""
    compiled = []
    with torch.device("meta"):
        model = tuned(method, on=False, dtype=torch.bfloat16)
        x = torch.zeros(1, 16, 48, dtype=torch.bfloat16, requires_grad=True)
        positions, starts = torch.zeros(16, dtype=torch.long), torch.zeros(32, dtype=torch.int32)
    cos, sin = model.rope(positions)
    torch._dynamo.reset()
    block = torch.compile(
        model.transformer.h[-1].forward, backend=lambda graph, _: compiled.append(graph) or graph, fullgraph=True
    )
    for lengths in ([10, 6], [9, 7], [4, 8, 4]):
        block(x, cos, sin, None, Texts(lengths, 16, positions, starts)).sum().backward()
    assert len(compiled) == 1


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients_for_all_lengths():
    """Also where blocks, or two models, differ in their hooks alone: torch.compile must not take one for the other."""
    lengths = (11, 17, 23)
    for method in ("adapter", "lora"):
        model = tuned(method, dtype=torch.float64)
        plain = gradients(model, lengths)
        wrap_blocks(model, compile=True)
        torch.testing.assert_close(gradients(model, lengths), plain)


def test_bfloat16_texts_are_padded_to_few_lengths_on_a_cpu_and_mean_the_same():
    model, seen = tuned("adapter", dtype=torch.bfloat16), []
    model.transformer.h[0].mlp.c_proj.register_forward_hook(lambda _, x, __: seen.append(x[0][..., 0].numel()))
    for lengths in ([11, 4, 7], [11, 8, 5], [64, 3, 2]):
        ids = torch.arange(192).view(3, 64) % 89
        target_loss(model, to_samples(ids, ids.roll(-1, 1), lengths))
    assert seen == [32, 32, 80]
    ids = torch.arange(33).view(3, 11)
    padded = F.pad(ids, (0, 5)), F.pad(ids.roll(-1, 1), (0, 5), value=IGNORE)
    loss = target_loss(model, to_samples(ids, ids.roll(-1, 1)))
    assert torch.equal(loss, target_loss(model, to_samples(*padded)))
    seen.clear()
    model.first_position = 1  # a context of 63, as after a prefix
    target_loss(model, to_samples(*2 * [torch.zeros(1, 59, dtype=torch.long)]))
    assert seen == [64]  # the text is not rounded up, the row is


# ------------------ --compile in training, evaluation and the chat

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
    assert compiled.returncode == 0 and "error:" not in compiled.stderr, compiled.stderr
    if precision == "32-true":
        assert re.sub(r"\d+ ms", "", compiled.stdout) == re.sub(r"\d+ ms", "", plain.stdout)


@pytest.mark.slow
@every_kind
def test_evaluation_and_chat(precision, kind, folder):
    flags = ["--trained_dir", folder / "trained", "--data", folder / "data", "--batch_size", 3, "--quantize", kind]
    check_compiled(precision, "scripts/evaluate.py", *flags)
    said = f"add 3 and 9\n/load {folder / 'trained'}\nadd 4 and 1\n/load\nand 5?\n"
    flags = ["--checkpoint_dir", folder / "base", "--max_new_tokens", 8]
    check_compiled(precision, "generate/chat.py", *flags, stdin=said)


@pytest.mark.slow
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
