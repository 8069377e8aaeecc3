"""Quantized and prepacked linear layers: their error, their gradient, and every method over an int8 base."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CASES,
    check_cached_decoding,
    logits_of,
    make_base,
    refuse,
    shake,
    succeed,
    sums,
    tiny_model,
    tokens,
    train_steps,
    write_rows,
)

from lit_llama.common.errors import UserError
from lit_llama.devices import quantize
from lit_llama.devices.launch import PRECISIONS
from lit_llama.devices.prepack import PrepackedLinear, can_prepack, prepack
from lit_llama.devices.quantize import Int8Linear, QuantizedLinear, kernel_fits, quantization, quantize_base
from lit_llama.generate.decode import generate, generate_batch
from lit_llama.generate.load import load_for_generation, load_trained_folder
from lit_llama.methods.table import METHODS
from lit_llama.model import Linear
from lit_llama.trained import trainable_parameters

OVER_INT8 = [case for case in CASES if case != "full"]  # full keeps nothing of the base
every_case = pytest.mark.parametrize("case", OVER_INT8)


def over_int8(case: str, dtype=torch.float32, on: bool = True, **changes):
    """A tiny int8 base with the method; with ``on`` all that trains is away from where it starts."""
    method, arguments = CASES[case]
    model = tiny_model(**changes).to(dtype)
    quantize_base(model, "int8")
    model.requires_grad_(False)
    METHODS[method](model, **arguments)
    if on:
        shake(model)
    return model


def linear(n_out: int, n_in: int, bias: bool = False, dtype=torch.float32) -> Linear:
    torch.manual_seed(n_out + n_in)
    return Linear(n_in, n_out, bias=bias).to(dtype).requires_grad_(False)


# ---------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(64, 96), (5, 7), (33, 64)])
def test_each_weight_is_within_half_a_scale(n_out, n_in, bias):
    plain = linear(n_out, n_in, bias)
    quantized = Int8Linear(plain)
    scales = plain.weight.abs().amax(1, keepdim=True) / 127
    assert ((quantized.full_weight() - plain.weight).abs() <= scales / 2 * 1.0001).all()
    x = torch.randn(3, 4, n_in)
    bound = (x.abs().sum(-1, keepdim=True) * scales[:, 0] / 2) * 1.001 + 1e-5
    assert ((quantized(x) - plain(x)).abs() <= bound).all()
    torch.testing.assert_close(quantized(x), F.linear(x, quantized.full_weight(), plain.bias))


def test_a_row_of_zeros_stays_zero():
    plain = linear(4, 8)
    plain.weight[2] = 0
    assert Int8Linear(plain)(torch.randn(1, 8))[0, 2] == 0


@pytest.mark.parametrize("rows", [1, 4, quantize.FEW_ROWS])
@pytest.mark.parametrize(("n_out", "n_in"), [(32, 32), (96, 64), (64, 160)])
def test_the_kernel_and_the_plain_path_agree(n_out, n_in, rows, monkeypatch):
    layer = Int8Linear(linear(n_out, n_in, bias=True, dtype=torch.bfloat16))
    x = torch.randn(1, rows, n_in, dtype=torch.bfloat16)
    assert kernel_fits(x, layer.weight) == hasattr(torch, "_weight_int8pack_mm")
    by_kernel = layer(x)
    monkeypatch.setattr(quantize, "FEW_ROWS", 0)
    assert not kernel_fits(x, layer.weight)
    plain = layer(x)
    exact = F.linear(x.double(), layer.full_weight().double(), layer.bias.double())
    for y in (by_kernel, plain):
        assert y.shape == (1, rows, n_out) and y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), exact, atol=0.02, rtol=0.02)


def test_shapes_and_types_that_the_kernel_does_not_take():
    weight = Int8Linear(linear(32, 32)).weight
    assert not kernel_fits(torch.randn(1, 32), weight)  # float32: slow there
    assert not kernel_fits(torch.randn(99, 32, dtype=torch.bfloat16), weight)
    assert not kernel_fits(torch.randn(1, 7, dtype=torch.bfloat16), Int8Linear(linear(32, 7)).weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_input_gets_the_gradient_of_the_rounded_weight(dtype):
    layer = Int8Linear(linear(32, 64, bias=True))
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, 32, dtype=dtype)
    layer(x).backward(dy)
    tolerance = dict(atol=1e-6, rtol=1e-6) if dtype == torch.float64 else dict(atol=0.05, rtol=0.02)
    torch.testing.assert_close(x.grad.double(), dy.double() @ layer.full_weight().double(), **tolerance)


def test_scales_in_bfloat16_add_no_error():
    plain = linear(64, 96, dtype=torch.bfloat16)
    quantized = Int8Linear(plain)
    assert quantized.scales.dtype == torch.bfloat16
    assert (
        (quantized.full_weight() - plain.weight.float()).abs() <= quantized.scales.float()[:, None] / 2 * 1.001
    ).all()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 40])
def test_compiled_and_eager_agree(rows):
    layer = Int8Linear(linear(64, 96, dtype=torch.bfloat16))
    x, dy = torch.randn(rows, 96, dtype=torch.bfloat16), torch.randn(rows, 64, dtype=torch.bfloat16)
    results = []
    for forward in (layer, torch.compile(layer, dynamic=True)):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


# ---------------------------------------------------------------------------------------------- the model


def test_the_blocks_are_narrow_under_the_same_keys_and_the_rest_is_as_it_was():
    base, model = tiny_model(tie_embeddings=True), tiny_model(tie_embeddings=True)
    quantize_base(model, "int8")
    assert quantization(model) == "int8" and quantization(base) == "none"
    assert list(model.state_dict()) == list(base.state_dict())
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(quantized) == 5 * model.config.n_layer and all(name.startswith("transformer.h.") for name in quantized)
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        difference = (model(tokens()) - base(tokens())).abs().mean() / base(tokens()).abs().mean()
    assert 0 < difference < 0.05


def test_kinds_that_cannot_be_are_refused():
    quantize_base(tiny_model(), "none")
    with pytest.raises(UserError, match="'int3' is none of none, int8, nf4"):
        quantize_base(tiny_model(), "int3")
    with pytest.raises(UserError, match="needs CUDA, and this runs on cpu"):
        quantize_base(tiny_model(), "nf4")


@every_case
def test_every_method_trains_over_int8_and_leaves_the_base_alone(case):
    model = over_int8(case, on=False)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    trained = set(trainable_parameters(model))
    losses = train_steps(model, steps=3)
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in trained), name


@every_case
def test_cached_decoding_equals_uncached_over_int8(case):
    check_cached_decoding(over_int8(case).eval().double())


@every_case
def test_a_method_over_int8_decodes_in_bfloat16_packed_or_not(case):
    sizes = dict(n_embd=64, head_size=16, n_head=4, intermediate_size=96)  # what the kernel takes
    model, packed = (over_int8(case, torch.bfloat16, **sizes).eval() for _ in range(2))
    prepack(packed)
    plain, same = (list(generate(m, [1, 2, 3], 8, stop=set())) for m in (model, packed))
    assert len(plain) == 8 and plain[0] == same[0]
    with torch.no_grad():
        torch.testing.assert_close(logits_of(packed, tokens()), logits_of(model, tokens()), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype, atol, rtol", [(torch.bfloat16, 0.05, 0.02), (torch.float32, 1e-5, 1e-5)])
def test_packed_layers_keep_a_methods_hooks(dtype, atol, rtol):
    packable = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # of oneDNN's x86 builds
    if dtype == torch.bfloat16:
        packable = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model = tiny_model().to(dtype).requires_grad_(False)
    METHODS["lora"](model, dropout=0.0)
    METHODS["adapter_v2"](model, start_layer=1)
    shake(model)
    model.eval()
    with torch.inference_mode():
        expected = model(tokens())
        prepack(model)
        packed = [layer for layer in model.modules() if isinstance(layer, PrepackedLinear)]
        assert len(packed) == (3 * 5 + 1 if packable else 0)
        torch.testing.assert_close(model(tokens()), expected, atol=atol, rtol=rtol)
    assert len(generate_batch(model, [[1, 2, 3], [4]], 4, stop=set())[0]) == 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("kind", ["none", "int8"])
def test_compiled_blocks_answer_alike_and_are_not_prepacked(kind, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    base = make_base(tmp_path / "base")
    answers = []
    for compiled in (False, True):
        loaded = load_for_generation(None, base, "plain", precision, kind, compiled)
        block, head = loaded.model.transformer.h[0], loaded.model.lm_head
        assert hasattr(block.forward, "_torchdynamo_orig_callable") == compiled
        prepacks = can_prepack(PRECISIONS[precision])
        assert isinstance(head, PrepackedLinear) == prepacks
        assert isinstance(block.mlp.c_proj, PrepackedLinear) == (prepacks and not compiled and kind == "none")
        answers.append(list(generate(loaded.model, [5, 6, 7], 8, stop=set())))
    assert answers[0] == answers[1] or precision == "bf16-true"


# ---------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("method", ["lora", "output_layers"])
def test_a_run_over_int8_says_so_and_is_loaded_over_int8(method, tmp_path, capsys):
    write_rows(tmp_path / "data" / "train.json", sums(20))
    write_rows(tmp_path / "data" / "validation.json", sums(30)[20:])
    base, out = make_base(tmp_path / "base"), tmp_path / "out"
    flags = ["--checkpoint_dir", base, "--data", tmp_path / "data", "--out_dir", out, "--quantize", "int8"]
    flags += ["--train.max_steps", 4, "--train.eval_every", 4, "--eval_samples", 0, "--precision", "32-true"]
    succeed(f"finetune/{method}.py", *flags)
    assert json.loads((out / "method.json").read_text())["quantize"] == "int8"
    best = next(row.split(",")[-1] for row in (out / "metrics.csv").read_text().splitlines()[::-1])
    evaluate = ["scripts/evaluate.py", "--trained_dir", out, "--data", tmp_path / "data", "--precision", "32-true"]
    assert f"loss {float(best):.4f}" in succeed(*evaluate)
    assert f"loss {float(best):.4f}" not in succeed(*evaluate, "--quantize", "none")
    assert quantization(load_trained_folder(out, quantize=None)[0]) == "int8"
    capsys.readouterr()
    load_trained_folder(out)
    note = capsys.readouterr().err
    assert "trained with --quantize int8, but its base is loaded with none: this works, but training" in note
    answer = ["generate/adapter.py", "--trained_dir", out, "--prompt", "add 1 and 1", "--max_new_tokens", 3]
    assert succeed(*answer) and succeed(*answer, "--quantize", "none")
    refuse(f"finetune/{method}.py", *flags[:-2], "--resume", "--quantize", "none", message="quantize was 'int8'")


def test_a_run_over_a_wide_base_says_so_where_it_is_loaded_over_int8(tmp_path, capsys):
    write_rows(tmp_path / "rows.json", sums(30))
    base, out = make_base(tmp_path / "base"), tmp_path / "out"
    flags = ["--checkpoint_dir", base, "--data", tmp_path / "rows.json", "--out_dir", out, "--train.max_steps", 1]
    succeed("finetune/adapter.py", *flags, "--eval_samples", 0)
    capsys.readouterr()
    load_trained_folder(out)
    assert capsys.readouterr().err == ""
    load_trained_folder(out, quantize="int8")
    assert "but its base is loaded with int8: this works, but training did not see" in capsys.readouterr().err
