"""What runs otherwise on a CUDA device: graphs in decoding, attention in bfloat16, nf4. Skipped without one."""

from dataclasses import replace

import pytest
import torch

from lit_llama.attention import attention_by_text, has_varlen, varlen_attention
from lit_llama.data.batches import TokenizedSample, pack
from lit_llama.devices.blocks import unwrap_blocks, wrap_blocks
from lit_llama.devices.inference import NextLogits
from lit_llama.devices.quantize import QuantizedLinear, count_parameters, quantize_base
from lit_llama.generate.decode import decoding, generate_batch
from lit_llama.generate.stream import decode, generate
from lit_llama.measure.cases import open_gates
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.settings import Sampling
from lit_llama.train.loss import target_loss
from lit_llama.trained import trainable_parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPT = [5, 7, 11, 13, 17, 19]
SAMPLES = [TokenizedSample(list(range(2, n)), [-100] * (n // 2) + list(range(n // 2, n - 2))) for n in (12, 30, 7, 21)]


def adapted(method: str = "adapter", dtype: torch.dtype = torch.float32, quantize: str = "none"):
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    sizes = dict(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, head_size=32)
    torch.manual_seed(1)
    model = LLaMA(LLaMAConfig(**sizes, intermediate_size=192)).init_weights(0.1).to("cuda", dtype)
    quantize_base(model, quantize)
    model.requires_grad_(False)
    torch.manual_seed(3)
    METHODS[method](model)
    open_gates(model)
    return model.eval()  # without dropout


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trained, loss = trainable_parameters(model), target_loss(model, SAMPLES)
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return loss.detach().cpu(), {name: gradient.cpu() for name, gradient in zip(trained, gradients, strict=True)}


METHODS_THAT_ANSWER = ["adapter", "lora", "prefix", "soft_prompt", "houlsby", "adapter_v2"]


@pytest.mark.parametrize(
    ("method", "dtype", "quantize"),
    [(method, torch.float32, "none") for method in METHODS_THAT_ANSWER]
    + [("adapter", torch.bfloat16, quantize) for quantize in ("none", "int8", "nf4")],
)
def test_answers_of_the_graph_are_those_of_single_launches(method, dtype, quantize):
    model = adapted(method, dtype, quantize)
    step = NextLogits(model)
    assert list(generate(model, PROMPT, 24, set(), next_logits=step)) == list(generate(model, PROMPT, 24, set()))
    assert step.graph is not None
    how = Sampling(temperature=1.0, seed=5)
    drawn = [list(generate(model, PROMPT, 24, set(), how, NextLogits(model))) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_batch_answers_alike():
    model = adapted()
    assert generate_batch(model, [PROMPT, PROMPT[:3]], 24, stop=set())[0] == list(generate(model, PROMPT, 24, set()))


def test_a_cache_that_goes_on_is_recorded_again():
    model = adapted()
    whole = list(generate(model, PROMPT, 20, stop=set()))
    with torch.inference_mode(), decoding(model, 1, 40):
        first = list(decode(model, PROMPT, 0, 8, set(), Sampling(), next_logits=NextLogits(model)))
        ids = PROMPT + first
        rest = list(decode(model, ids, len(ids) - 1, 12, set(), Sampling(), next_logits=NextLogits(model)))
    assert first + rest == whole


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_a_step_is_the_cpus(method):
    model = adapted(method)
    found = loss_and_gradients(model)
    torch.testing.assert_close(found, loss_and_gradients(model.cpu()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n_kv_head", "prefix"), [(4, 0), (4, 5), (2, 0), (2, 5)])
def test_texts_in_one_kernel_are_those_taken_one_by_one(n_kv_head, prefix):
    torch.manual_seed(1)
    packed = pack(SAMPLES, torch.device("cuda"), row_multiple=64)
    texts = replace(packed.texts, prefix=prefix)
    N, S = packed.ids.numel(), packed.ids.numel() + prefix * len(texts.lengths)
    sizes = ((4, N), (n_kv_head, S), (n_kv_head, S))
    q, k, v = (torch.randn(1, heads, n, 32, device="cuda", dtype=torch.bfloat16) for heads, n in sizes)
    if not has_varlen(q, k):
        pytest.skip("this PyTorch has no varlen_attn for these heads")
    found = []
    for body in (varlen_attention, attention_by_text):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = body(*inputs, texts)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    torch.testing.assert_close(*found, atol=0.05, rtol=0.05)


def test_blocks_compile_whole():
    model = adapted(dtype=torch.bfloat16)
    packed = pack(SAMPLES, torch.device("cuda"), row_multiple=64)
    q, k = (torch.empty(1, heads, 1, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    if not has_varlen(q, k):
        pytest.skip("this PyTorch has no varlen_attn for grouped queries")
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    compiled = model.hidden_states(packed.ids, texts=packed.texts)
    unwrap_blocks(model)
    plain = model.hidden_states(packed.ids, texts=packed.texts)
    torch.testing.assert_close(compiled, plain, atol=0.1, rtol=0.05)


def test_bfloat16_is_near_float32():
    loss, _ = loss_and_gradients(adapted(dtype=torch.bfloat16))
    expected, _ = loss_and_gradients(adapted())
    assert float(loss) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_agree(checkpointing):
    model = adapted()
    expected = loss_and_gradients(model)
    prompts = [PROMPT, PROMPT[:1]]  # of one token, too: it looks like one that is decoded
    wrap_blocks(model, compile=True, checkpointing=checkpointing)
    found = loss_and_gradients(model)
    answers = [list(generate(model, prompt, 12, stop=set())) for prompt in prompts]
    unwrap_blocks(model)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert answers == [list(generate(model, prompt, 12, stop=set())) for prompt in prompts]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_blocks_compute_their_rounded_weights(kind):
    model = adapted(quantize=kind)
    assert count_parameters(model) == count_parameters(adapted())
    found = loss_and_gradients(model)
    for layer in [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]:
        layer.dequantize()
    torch.testing.assert_close(found, loss_and_gradients(model), rtol=1e-2, atol=1e-3)
