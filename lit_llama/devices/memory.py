"""How much memory a run will take, before it takes it: a step played through with tensors that have no content.

The model is built as it will be, the method is added, and the loss of a micro-batch goes forward and backward through
the very code of training, while a ``Ledger`` notes when each tensor comes to life and when it dies. So nothing here has
to be told what a block keeps for its backward pass, and nothing is fitted to a measurement.

Not counted: what the interpreter and its libraries hold (0.3 to 0.5 GB of main memory), a GPU's context and workspaces
(about as much of its own), and what an allocator loses between the tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_llama.checkpoint import load_config
from lit_llama.cli import UserError
from lit_llama.data.batches import micro_batches
from lit_llama.devices.blocks import wrap_blocks
from lit_llama.devices.launch import free_memory, multiplies_bf16
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.settings import TrainArgs
from lit_llama.train.loss import BUCKET_PARAMETERS, split_evenly, target_loss
from lit_llama.trained import trained_tensors

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from lit_llama.data.task import Task

aten = torch.ops.aten
INDEX_PUT = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


@dataclass
class Estimate:
    """Bytes on one device, at the fullest moment of a step."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass when the last block is through
    logits: int  # from there to the fullest moment: the head's logits and gradients, all that is short-lived
    update: int  # short-lived as well, when the gradients are summed over devices and the optimizer takes its step

    @property
    def lasting(self) -> int:
        return self.frozen + self.trained + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.lasting + max(self.activations + self.logits, self.update)

    def table(self) -> str:
        names = {
            "frozen": "frozen weights",
            "trained": "trained tensors, float32",
            "gradients": "their gradients",
            "optimizer": "the optimizer's moments",
            "activations": "activations kept for the backward pass",
            "logits": "logits and other short-lived tensors",
        }
        rows = [(names[name], size) for name, size in asdict(self).items() if name in names]
        if self.update > self.activations + self.logits:
            rows[-2:] = [("the optimizer's step", self.update)]  # after the backward pass has let go of the others
        rows.append(("in all, on each device", self.total))
        return "\n".join(f"{name:40}{size / 1e9:10.3f} GB" for name, size in rows)


class Ledger(TorchDispatchMode):
    """Bytes of the tensors made while it is entered and still alive (``now``), and the most there were (``peak``).

    A mask that chooses the targets has no content either: it stands for ``n_targets`` indices.
    """

    def __init__(self, n_targets: int = 0) -> None:
        super().__init__()
        self.n_targets, self.now, self.peak = n_targets, 0, 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.index.Tensor or func in INDEX_PUT:
            args = (args[0], self.indices(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def indices(self, chosen: list[Tensor | None]) -> list[Tensor | None]:
        mask = chosen[0]
        if mask is None or mask.dtype != torch.bool:
            return chosen
        return [torch.empty(self.n_targets, dtype=torch.long, device=mask.device) for _ in range(mask.dim())]

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.alive:  # a view, or written in place
            return
        self.alive.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, id(storage), storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch takes attention apart; on a GPU it is one kernel, which keeps no (T, T) scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v, mask = (*args, None)[:4]
            if mask is None:
                is_causal = (kwargs or {}).get("is_causal", False)
                return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
        return func(*args, **(kwargs or {}))


def imagined(config: LLaMAConfig, method: str, arguments: dict, dtype: torch.dtype) -> LLaMA:
    """The model as it will be trained, on the meta device."""
    from lit_llama.methods.table import METHODS

    if method not in METHODS:
        raise UserError(f"the method {method!r} is none of {', '.join(METHODS)}; see lit_llama/methods/__init__.py")
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            model = LLaMA(config).to(dtype)
        model.requires_grad_(False)
        METHODS[method](model, **arguments)
    return model


def fake_on_cpu(model: LLaMA) -> None:
    """Put fake tensors in place of meta ones: they go through the CPU's code. (A GPU's can be had only with a GPU.)"""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), param.requires_grad)
            setattr(module, name, fakes.setdefault(id(param), fake))


def check_room(found: Estimate, room: int, batch_tokens: int, longest: int, savings: Sequence[str]) -> str:
    """What to say of a run that has ``room`` bytes: nothing where it fits well. UserError where it surely does not.

    ``batch_tokens``: of the micro-batch that was estimated; ``longest``: of a sample, below which none can go;
    ``savings``: flags that would save memory, where shorter micro-batches alone do not.
    """
    if found.total < WARN_ABOVE * room:
        return ""
    text = f"a step takes about {found.total / 1e9:.2f} GB on each device, where {room / 1e9:.2f} GB are free; "
    fitting = int(batch_tokens * (WARN_ABOVE * room - found.lasting) / (found.activations + found.logits))
    if longest <= fitting < batch_tokens:
        text += f"pass --train.micro_batch_tokens {fitting}"
    else:
        text += f"pass one or more of {', '.join(savings)}, or take another method"
    if found.total > REFUSE_ABOVE * room:
        raise UserError(text)
    return f"warning: {text}"


def check_memory(
    fabric: Fabric,
    settings: dict,
    task: Task,
    train: TrainArgs,
    strategy: str = "auto",
    compile: bool = False,
    checkpointing: bool = False,
) -> None:
    """Warn, or raise UserError, if the largest micro-batch of a run will not fit its device. Before the base is loaded.

    ``settings`` are those of method.json (trained.py).
    """
    room = free_memory(fabric.device)
    if room is None or not fabric.is_global_zero:
        return
    config, dtype = load_config(settings["base"]["checkpoint_dir"]), getattr(torch, settings["base_dtype"])
    method, arguments, quantize = (settings[key] for key in ("method", "arguments", "quantize"))
    cpu = fabric.device.type == "cpu"
    samples = sorted(task.train, key=lambda sample: len(sample.ids))[-train.batch_size :]
    parts = [micro_batches(part, train.micro_batch_tokens) for part in split_evenly(samples, fabric.world_size)]
    batch = max(sum(parts, []), key=lambda batch: sum(len(sample.ids) for sample in batch))
    lengths = [len(sample.ids) for sample in batch]
    found = estimate(
        config,
        method,
        arguments,
        dtype,
        lengths,
        n_targets=sum(sample.n_targets for sample in batch),
        device_type=fabric.device.type,
        devices=fabric.world_size,
        sharded=strategy == "fsdp",
        checkpointing=checkpointing,
        quantize=quantize,
    )
    blocks = imagined(config, method, arguments, dtype).transformer.h.parameters()
    frozen = strategy != "fsdp" and quantize == "none" and not all(param.requires_grad for param in blocks)
    several = "" if fabric.world_size > 1 else " with more --devices"
    flags = {  # what saves memory and can still be passed to this run
        "--precision bf16-true": dtype == torch.float32 and multiplies_bf16(fabric.device),
        "--quantize int8": frozen,
        "--checkpointing": not checkpointing,
        f"--strategy fsdp{several}": frozen and not cpu and not compile,
        "a lower --train.max_seq_length": True,
    }
    longest = max(len(sample.ids) for sample in task.train + task.validation)
    room //= fabric.world_size if cpu else 1  # processes in the same memory
    if warning := check_room(found, room, sum(lengths), longest, [flag for flag, saves in flags.items() if saves]):
        print(warning, file=sys.stderr)


# Shares of the free memory. The tensors counted must all be there at one time, so beyond 1 there is no hope; what an
# allocator loses between them comes on top. Measured on SmolLM2 with adapter: 21 % in float32, and 62 % in bfloat16,
# where oneDNN's kernels are part of it.
WARN_ABOVE, REFUSE_ABOVE = 0.6, 1.0
NARROW_BYTES = {"int8": 1.0, "nf4": 0.5}  # of each number; the scales of rows or blocks are few


def estimate(
    config: LLaMAConfig,
    method: str,
    arguments: dict,
    dtype: torch.dtype,
    lengths: list[int],
    n_targets: int | None = None,
    device_type: str = "cpu",
    devices: int = 1,
    sharded: bool = False,
    checkpointing: bool = False,
    quantize: str = "none",
) -> Estimate:
    """The memory of one optimizer step of ``method`` (a key of METHODS) with its ``arguments``.

    The largest micro-batch has samples of these ``lengths`` in tokens, and ``n_targets`` targets in all (by default
    every token is one). ``dtype`` is the frozen base's. With ``sharded`` its blocks are spread over all ``devices``;
    with ``checkpointing`` blocks keep their input alone, and compute the rest again in the backward pass. ``quantize``
    is what the frozen matrices of the blocks are kept in.
    """
    model = imagined(config, method, arguments, dtype)
    blocks = [sum(p.nbytes for p in block.parameters() if not p.requires_grad) for block in model.transformer.h]
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2 and not p.requires_grad]
    frozen -= sum(p.nbytes - int(p.numel() * NARROW_BYTES.get(quantize, p.itemsize)) for p in matrices)
    params = list(trained_tensors(model).values())
    trained = sum(p.nbytes for p in params)
    state, update = optimizer_step(params, foreach=device_type == "cuda")
    if devices > 1:
        update = max(update, min(trained, 4 * max(BUCKET_PARAMETERS, *(p.numel() for p in params))))
    if sharded:  # one block gathered for use, and one on its way
        frozen -= max(0, sum(blocks) - sum(blocks) // devices - 2 * max(blocks))
    with FakeTensorMode() if device_type == "cpu" else FusedAttention():
        if device_type == "cpu":
            fake_on_cpu(model)
        ledger = Ledger(sum(lengths) if n_targets is None else n_targets)
        activations, logits = one_pass(model, ledger, lengths, checkpointing)
    return Estimate(frozen, trained, trained, state, activations, logits, update)


def one_pass(model: LLaMA, ledger: Ledger, lengths: list[int], checkpointing: bool) -> tuple[int, int]:
    """Forward and backward, with gradients there already: bytes kept when the head is reached, and then on top."""
    device = model.transformer.wte.weight.device
    ids, targets = (torch.zeros(len(lengths), max(lengths), dtype=torch.long, device=device) for _ in range(2))
    for param in model.parameters():
        ledger.note(param)
        if param.requires_grad:
            param.grad = torch.zeros_like(param)
            ledger.note(param.grad)
    before, at_head = ledger.now, []
    model.lm_head.register_forward_pre_hook(lambda *_: at_head.append(ledger.now))
    wrap_blocks(model, checkpointing=checkpointing)
    with ledger:
        target_loss(model.train(), ids, targets, lengths).backward()
    return at_head[0] - before, ledger.peak - at_head[0]


def optimizer_step(params: list[Tensor], foreach: bool) -> tuple[int, int]:
    """AdamW's lasting state, and what its step needs on top, in bytes."""
    copies, ledger = [torch.empty_like(p).requires_grad_(True) for p in params], Ledger()
    for copy in copies:
        copy.grad = torch.empty_like(copy)
        ledger.note(copy)
        ledger.note(copy.grad)
    before, optimizer = ledger.now, torch.optim.AdamW(copies, foreach=foreach)
    with ledger:
        optimizer.step()
    return ledger.now - before, ledger.peak - ledger.now
