"""Count the kernels of one block in a training step, and the bytes they move: where a GPU's time goes, without a GPU.

    python scripts/count_kernels.py
    python scripts/count_kernels.py --model 7B --method lora --n_texts 34

The block runs on the meta device, which computes only shapes, in bfloat16 on a packed row. Matrix products and
attention are limited by arithmetic; every other kernel takes as long as its bytes take to read and write.
"""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_llama import cli
from lit_llama.attention import Texts
from lit_llama.common.errors import UserError, check_range
from lit_llama.configs import CONFIGS
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA, LLaMAConfig, RMSNorm

PRODUCTS = {"mm", "bmm", "addmm", "_varlen_attn", "_varlen_attn_backward"}
NO_KERNELS = {"detach", "_unsafe_view", "empty", "empty_like"}  # and views


def main(model: str = "7B", method: str = "adapter", n_texts: int = 26, text_tokens: int = 121) -> None:
    """Print the kernels of the last block, forward and backward.

    Args:
        model: A name in lit_llama/configs.py.
        method: A finetuning method.
        n_texts: Texts in the packed row. The defaults are 64 Alpaca records' share of 3,158 tokens.
        text_tokens: Tokens of each text.
    """
    for flag, name, known in (("--model", model, CONFIGS), ("--method", method, METHODS)):
        if name not in known:
            raise UserError(f"{flag} {name} is none of {', '.join(known)}")
    check_range("--n_texts", n_texts, 1, 4096)
    check_range("--text_tokens", text_tokens, 1, 4096)
    forward, backward = count(model, method, n_texts, text_tokens)
    print("| kernel | forward | backward | GB |\n|---|---|---|---|")
    gigabytes = {name: n / 1e9 for name, n in (forward.bytes + backward.bytes).most_common()}
    for name, size in gigabytes.items():
        print(f"| {name} | {forward.calls[name]} | {backward.calls[name]} | {size:.2f} |")
    other = sum(size for name, size in gigabytes.items() if name not in PRODUCTS)
    print(f"{sum(forward.calls.values())} kernels forward, {sum(backward.calls.values())} backward; ", end="")
    print(f"all but products and attention move {other:.2f} GB")


class KernelCounter(TorchDispatchMode):
    """Counts the operations that compute something, and the bytes of the tensors they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if not function.is_view and name not in NO_KERNELS:
            self.calls[name] += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes[name] += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)  # expanded or a part
        return result


class FusedNorm(torch.autograd.Function):
    """One kernel forward and one backward, as F.rms_norm on CUDA. The meta device would decompose it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mul(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return torch.addcmul(dy, *ctx.saved_tensors), None


def count(model: str, method: str, n_texts: int, text_tokens: int) -> tuple[KernelCounter, KernelCounter]:
    """The kernels of the last block of a ``model`` with a ``method``, forward and backward."""
    with torch.device("meta"):
        llama = LLaMA(LLaMAConfig.from_name(model, n_layer=3)).bfloat16().requires_grad_(False)
        METHODS[method](llama)
        positions = torch.zeros(n_texts * text_tokens, dtype=torch.long)
        texts = Texts([text_tokens] * n_texts, text_tokens, positions, torch.zeros(n_texts + 1, dtype=torch.int32))
        x = torch.zeros(1, len(positions), llama.config.n_embd, dtype=torch.bfloat16, requires_grad=True)
    for norm in [module for module in llama.modules() if isinstance(module, RMSNorm)]:
        norm.forward = lambda x, weight=norm.weight: FusedNorm.apply(x, weight.to(x.dtype))
    cos, sin = llama.rope(positions)
    with KernelCounter() as forward:
        y = llama.transformer.h[-1](x, cos, sin, None, texts)
    dy = torch.empty_like(y)
    with KernelCounter() as backward:
        y.backward(dy)
    return forward, backward


if __name__ == "__main__":
    cli.run(main)
