"""Faster decoding: weights prepacked for a CPU, compiled blocks, and CUDA graphs. Batches of answers use no graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_llama.devices.blocks import is_sharded, wrap_blocks
from lit_llama.devices.quantize import AdoptedLinear, replace_linears
from lit_llama.model import Linear, LLaMA


class PrepackedLinear(AdoptedLinear):
    """A linear layer with its weight in oneDNN's blocked layout: the same products, but no gradient."""

    def __init__(self, layer: Linear, dtype: torch.dtype) -> None:
        super().__init__(layer)
        prepacked = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        self.weight = nn.Parameter(prepacked, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")


def prepare_for_inference(model: LLaMA, compile: bool = False) -> None:
    """Prepack the weights of blocks and head on a CPU. The model can no longer train.

    With ``compile`` the blocks are compiled, and only the head is prepacked: torch.compile takes no prepacked weights.
    Two Zen 4 cores, one row in bfloat16: 24 us instead of 49 for a weight of
    960 x 576, 2.9 ms instead of 4.1 for a head of 49,152 x 576. A tied head gets its own copy.
    """
    on_cpu = model.transformer.wte.weight.device.type == "cpu"
    if on_cpu and can_prepack(model.dtype) and not is_sharded(model):
        if not compile:
            replace_linears(model.transformer.h, lambda layer: PrepackedLinear(layer, model.dtype))
        if type(model.lm_head) is Linear:
            model.lm_head = PrepackedLinear(model.lm_head, model.dtype)
    wrap_blocks(model, compile=compile, packed=False)


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a blocked layout for this dtype here. float32 was only tried on x86."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class NextLogits:
    """The logits of the next token, over the model's current KV cache; on CUDA, one launch computes them.

    A token of LLaMA-7B takes some fifteen hundred small kernels, and launching them one by one takes a CPU longer than
    the GPU needs to read the weights. A CUDA graph records them once and then launches them all together
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). A graph reads and writes fixed addresses. So it
    has its own buffers for a token and its position, and each KV cache needs a new graph.
    """

    def __init__(self, model: LLaMA) -> None:
        self.model = model
        # A sharded block waits for other ranks, which a graph cannot record.
        self.recordable = model.transformer.wte.weight.device.type == "cuda" and not is_sharded(model)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        """idx (1, T) for the slots ``input_pos`` (T,) -> (1, V), which the next call may overwrite."""
        self.calls += 1
        # The prompt and the first single token run without a graph: they initialize what a recording cannot.
        if not self.recordable or idx.size(1) > 1 or self.calls <= 2:
            return self.compute(idx, input_pos)
        if self.graph is None:
            self.idx, self.input_pos = idx.clone(), input_pos.clone()
            self.tables = self.model._rope  # keep them alive if the model makes longer ones
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, computes nothing
                self.logits = self.compute(self.idx, self.input_pos)
        self.idx.copy_(idx)
        self.input_pos.copy_(input_pos)
        self.graph.replay()
        return self.logits

    def compute(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        return self.model.lm_head(self.model.hidden_states(idx, input_pos)[:, -1])
