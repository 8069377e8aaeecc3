"""Decode a token with one launch: on CUDA its kernels are recorded once and then replayed together.

A token of LLaMA-7B takes some fifteen hundred small kernels, and launching them one by one takes a CPU longer than the
GPU needs to read the weights. A CUDA graph launches them all at once
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Its kernels always read and write the same memory:
the KV cache, and buffers for a token and its position. Batches of answers do not use graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llama.devices.blocks import is_sharded
from lit_llama.model import LLaMA


class NextLogits:
    """The logits of the next token, over the model's current KV cache.

    Make a new one for each cache: a graph keeps the addresses of cache, rotary tables and weights.
    """

    def __init__(self, model: LLaMA) -> None:
        self.model, self.device = model, model.transformer.wte.weight.device
        # A sharded block waits for other ranks, which a graph cannot record.
        self.recordable = self.device.type == "cuda" and not is_sharded(model)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        """idx (1, T) for the slots ``input_pos`` (T,) -> (1, V), which the next call may overwrite."""
        self.calls += 1
        # The first call is the prompt, the second the first single token, which initializes what cannot be initialized
        # while recording.
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
