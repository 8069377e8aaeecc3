"""Quantized and prepacked linear layers: their error and gradient, and models with them. Methods: test_methods.py."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import every_case, logits_of, metrics, refuse, succeed, tiny_model, tokens, tuned

from lit_llama.common.errors import UserError
from lit_llama.devices import quantize
from lit_llama.devices.inference import PrepackedLinear, can_prepack, prepare_for_inference
from lit_llama.devices.launch import PRECISIONS
from lit_llama.devices.quantize import Int8Linear, QuantizedLinear, kernel_fits, quantization, quantize_base
from lit_llama.generate.load import load_for_generation, load_trained_folder
from lit_llama.generate.stream import generate
from lit_llama.model import Linear


def linear(n_out: int, n_in: int, bias: bool = False, dtype=torch.float32) -> Linear:
    torch.manual_seed(n_out + n_in)
    return Linear(n_in, n_out, bias=bias).to(dtype).requires_grad_(False)


# ---------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(64, 96), (5, 7), (33, 64)])
def test_each_weight_is_within_half_a_scale(n_out, n_in, bias, dtype):
    """Also if the scales are rounded to bfloat16. A row of zeros stays zero."""
    plain = linear(n_out, n_in, bias, dtype)
    plain.weight[2] = 0
    quantized = Int8Linear(plain)
    assert quantized.scales.dtype == dtype
    scales = quantized.scales.float()
    torch.testing.assert_close(scales, plain.weight.float().abs().amax(1) / 127, rtol=2**-8, atol=1e-30)
    assert ((quantized.full_weight() - plain.weight.float()).abs() <= scales[:, None] / 2 * 1.001).all()
    x = torch.randn(3, 4, n_in)
    bound = (x.abs().sum(-1, keepdim=True) * scales / 2) * 1.001 + 1e-5
    assert ((quantized(x) - plain(x)).abs() <= bound).all()
    full_bias = plain.bias.float() if bias else None
    torch.testing.assert_close(quantized(x), F.linear(x, quantized.full_weight(), full_bias))


@pytest.mark.parametrize("rows", [1, 4, quantize.FEW_ROWS])
@pytest.mark.parametrize(("n_out", "n_in"), [(32, 32), (96, 64), (64, 160)])
def test_the_kernel_and_the_plain_path_agree(n_out, n_in, rows, monkeypatch):
    layer = Int8Linear(linear(n_out, n_in, bias=True, dtype=torch.bfloat16))
    x = torch.randn(1, rows, n_in, dtype=torch.bfloat16)
    assert kernel_fits(x, layer.weight)
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


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float64, 3), (torch.bfloat16, 3), (torch.bfloat16, 1)])
def test_the_input_gets_the_gradient_of_the_rounded_weight(dtype, rows):
    layer = Int8Linear(linear(32, 64, bias=rows > 1))
    layer.register_forward_hook(lambda _, args, y: y.add_(0))  # in place, as LoRA's
    x = torch.randn(rows, 5, 64, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, 5, 32, dtype=dtype)
    layer(x).backward(dy)
    tolerance = dict(atol=1e-6, rtol=1e-6) if dtype == torch.float64 else dict(atol=0.05, rtol=0.02)
    torch.testing.assert_close(x.grad.double(), dy.double() @ layer.full_weight().double(), **tolerance)


# ---------------------------------------------------------------------------------------------- the model


def test_the_blocks_are_quantized_under_the_same_keys_and_the_rest_is_as_it_was():
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
    with pytest.raises(UserError, match="'int3' is none of none, int8, nf4"):
        quantize_base(tiny_model(), "int3")
    with pytest.raises(UserError, match="needs CUDA, and this runs on cpu"):
        quantize_base(tiny_model(), "nf4")


@pytest.mark.parametrize("dtype, kind", [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "int8")])
@every_case
def test_a_prepacked_model_answers_alike(case, dtype, kind):
    """Layers keep a method's hooks. Quantized ones are not prepacked."""
    sizes = dict(n_embd=64, head_size=16, n_head=4, intermediate_size=96)  # what the int8 kernel takes
    model, packed = (tuned(case, True, dtype, kind, **sizes).eval() for _ in range(2))
    plain_layers = sum(type(layer) is Linear for layer in packed.modules())
    prepare_for_inference(packed)
    prepacked = sum(isinstance(layer, PrepackedLinear) for layer in packed.modules())
    assert prepacked == (plain_layers if can_prepack(dtype) else 0)
    tolerance = dict(atol=0.1, rtol=0.05) if dtype == torch.bfloat16 else dict(atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(packed, tokens()), logits_of(model, tokens()), **tolerance)
    plain, same = (list(generate(m, [1, 2, 3], 8, stop=set())) for m in (model, packed))
    assert len(plain) == 8 and plain[0] == same[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("kind", ["none", "int8"])
def test_compiled_blocks_answer_alike_and_are_not_prepacked(kind, precision, base, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
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
def test_a_run_over_int8_says_so_and_is_loaded_over_int8(method, folder, tmp_path, capsys):
    out, data = tmp_path / "out", ["--data", folder / "sums", "--precision", "32-true"]
    flags = ["--checkpoint_dir", folder / "base", *data, "--out_dir", out, "--eval_samples", 0]
    flags += ["--train.max_steps", 4, "--train.eval_every", 4]
    succeed(f"finetune/{method}.py", *flags, "--quantize", "int8")
    assert json.loads((out / "method.json").read_text())["quantize"] == "int8"
    loss = f"loss {float(metrics(out)[-1]['val_loss']):.4f}"
    evaluate = ["scripts/evaluate.py", "--trained_dir", out, *data]
    assert loss in succeed(*evaluate)
    assert loss not in succeed(*evaluate, "--quantize", "none")
    capsys.readouterr()
    assert quantization(load_trained_folder(out, quantize=None)[0]) == "int8" and capsys.readouterr().err == ""
    load_trained_folder(out)
    assert "trained with --quantize int8, but its base is loaded with none: this works" in capsys.readouterr().err
    answer = ["generate/adapter.py", "--trained_dir", out, "--prompt", "add 1 and 1", "--max_new_tokens", 3]
    assert succeed(*answer) and succeed(*answer, "--quantize", "none")
    refuse(f"finetune/{method}.py", *flags, "--resume", "--quantize", "none", message="quantize was 'int8'")
