"""One token of decoding as one launch: on CUDA its kernels are recorded once, then replayed together.

A token of LLaMA-7B is some fifteen hundred small kernels. To launch them one by one takes a CPU longer than the GPU
needs to read the weights; a CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) launches them
all at once. Its kernels read and write the same memory each time: the KV cache's, which is allocated beforehand, and
that of a token and its position, which are copied there. Batches of answers go without.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lit_llama.devices.sharding import is_sharded
from lit_llama.model import LLaMA


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: PyTorch's own belongs to the device that was the current one when it first recorded."""
    return torch.cuda.Stream(device)


class NextLogits:
    """Tokens in, the logits of the one that follows out, over the KV cache that the model has now.

    One for each cache: a graph remembers where the cache, the rotary tables and the weights lay when it was recorded.
    """

    def __init__(self, model: LLaMA) -> None:
        self.model, self.device = model, model.transformer.wte.weight.device
        # To gather the pieces of a sharded block waits for other ranks, which a graph cannot.
        self.recordable = self.device.type == "cuda" and not is_sharded(model)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        """idx (1, T) for the slots ``input_pos`` (T,) -> (1, V), which the next call may overwrite."""
        self.calls += 1
        # The first call is the prompt, the second the first single token. What is set up at first use, such as compiled
        # kernels, cannot be set up while recording.
        if not self.recordable or idx.size(1) > 1 or self.calls <= 2:
            return self.compute(idx, input_pos)
        if self.graph is None:
            self.idx, self.input_pos = idx.clone(), input_pos.clone()
            self.tables = self.model._rope  # kept alive: the model may grow new ones
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=recording_stream(self.device)):  # records, and computes nothing
                self.logits = self.compute(self.idx, self.input_pos)
        self.idx.copy_(idx)
        self.input_pos.copy_(input_pos)
        self.graph.replay()
        return self.logits

    def compute(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        return self.model.lm_head(self.model.hidden_states(idx, input_pos)[:, -1])
