"""Peak memory, free memory, and an estimate of what a training step needs:

    frozen weights     their own size; sharded, one device holds its part and two gathered blocks
    what trains        16 bytes per parameter: weight, gradient and AdamW's two moments, all float32
    activations        what autograd saves for the backward pass, in every block from the first that trains
    temporaries        the largest of: the head's logits, a block's gradients, the optimizer's step

Most measured peaks are within 20 % (docs/memory.md). The process adds about 0.5 GB, or 0.7 GB in bfloat16 on a CPU.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_llama.common.errors import UserError
from lit_llama.devices.blocks import first_trained
from lit_llama.devices.launch import log_rank0
from lit_llama.model import LLaMA
from lit_llama.settings import HEAD_CHUNK, TrainArgs

if TYPE_CHECKING:
    from lightning.fabric import Fabric

QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5}  # per weight of a block's matrices; the scales are few


@dataclass
class StepMemory:
    """Bytes on one device at the peak of a step."""

    frozen_weights: float
    trainable_parameters: float
    activations: float
    temporaries: float

    @property
    def total(self) -> float:
        return self.frozen_weights + self.trainable_parameters + self.activations + self.temporaries


def step_memory(
    model: LLaMA,
    dtype: torch.dtype,
    tokens: int,
    seq_length: int,
    checkpointing: bool = False,
    quantize: str = "none",
    shards: int = 1,
    device_type: str = "cuda",
) -> StepMemory:
    """The memory of a step of ``model``, which may be on the meta device and has its method.

    The base's weights have ``dtype``; a micro-batch has ``tokens`` tokens in samples of ``seq_length``, all of them
    targets; ``shards`` devices share the frozen blocks.
    """
    blocks, size = model.transformer.h, (model.compute_dtype or dtype).itemsize
    tokens += tokens // seq_length * len(model.virtual_ids)
    block_sizes = [sum(p.numel() for p in block.parameters() if not p.requires_grad) for block in blocks]
    elsewhere = sum(p.numel() for p in model.parameters() if not p.requires_grad) - sum(block_sizes)
    held = sum(block_sizes) / shards + (2 * max(block_sizes) if shards > 1 else 0)
    frozen = elsewhere * dtype.itemsize + held * QUANTIZED_BYTES.get(quantize, dtype.itemsize)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    trained_blocks = blocks[first_trained(model) :]
    saved = [block_bytes(block, model, size, tokens, seq_length, device_type) for block in trained_blocks]
    if checkpointing and saved:  # each block's input, and all of one block
        saved = [tokens * model.config.n_embd * size] * len(saved) + saved[:1]
    logits = min(tokens, HEAD_CHUNK) * model.lm_head.out_features * (2 * size + 8)  # also float32, and the gradients
    mlp_gradients = tokens * model.config.intermediate_size * size * 4  # of one block
    return StepMemory(frozen, 16 * n_trained, sum(saved), max(logits, mlp_gradients, 4 * n_trained))


def block_bytes(block: nn.Module, model: LLaMA, size: int, tokens: int, seq_length: int, device_type: str) -> float:
    """Bytes that autograd saves in one block, whose activations have ``size`` bytes."""
    c = model.config
    norms = 2 * (size if device_type == "cuda" else 4) * c.n_embd  # their inputs; a CPU computes them in float32
    attention = 2 * (c.n_head + c.n_kv_head) * c.head_size * size  # q, k, v and the output
    if device_type == "cpu" and size == 2:  # plain products (attention.py): also the scores
        attention += c.n_head * seq_length * size
    mlp = 3 * c.intermediate_size * size
    trained = [p for name, p in block.named_parameters() if p.requires_grad and not name.endswith("bias")]
    inputs = sum(p.size(-1) for p in trained) * size  # what a trainable matrix or scale is multiplied by
    copies = sum(p.numel() for p in trained) * size if size == 2 else 0  # of float32 weights in bfloat16
    return tokens * (norms + attention + mlp + inputs) + copies


def check_memory(fabric: Fabric, model: LLaMA, train: TrainArgs, longest: int, checkpointing: bool) -> None:
    """Warn if a step may not fit in the free memory. Raises UserError if it cannot.

    ``model`` is loaded and has its method; ``longest`` is the number of tokens of the longest sample.
    """
    free_bytes = free_memory(fabric.device)
    if free_bytes is None or not fabric.is_global_zero:
        return
    if fabric.device.type == "cpu":
        free_bytes //= fabric.world_size
    tokens, dtype = min(train.micro_batch_tokens, train.batch_size * longest), model.transformer.wte.weight.dtype
    memory = step_memory(model, dtype, max(longest, tokens), longest, checkpointing, device_type=fabric.device.type)
    needed = memory.total - memory.frozen_weights - memory.trainable_parameters / 4  # the weights are loaded already
    if needed < 0.8 * free_bytes:
        return
    less = f"--train.micro_batch_tokens below {tokens}" if tokens > longest else "a lower --train.max_seq_length"
    text = (
        f"a step needs about {needed / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free; pass {less}, "
        "--checkpointing, --precision bf16-true or --quantize int8 (docs/memory.md)"
    )
    if needed > 1.25 * free_bytes:
        raise UserError(text)
    log_rank0(f"warning: {text}")


def peak_memory(device: torch.device) -> int | None:
    """Peak memory of this process in bytes: GPU memory on a GPU, else main memory.

    None on a Windows CPU, where the standard library cannot tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # here rusage includes the peak of the parent process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if "VmHWM:" in status:  # some sandboxes leave it out
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int | None:
    """Free memory in bytes: of the GPU, or main memory within the limit of the process's cgroup.

    None if neither CUDA nor Linux can tell.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return int(min(int(lines["MemAvailable"].split()[0]) * 1024, *cgroup_free_bytes()))
    except OSError:
        return None


CGROUP_FILES = {  # of version 2 and 1: root, limit, usage, and the reclaimable part of the usage
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def cgroup_free_bytes() -> list[float]:
    """Free bytes in each control group of this process, and infinity.

    The kernel kills a process that exceeds a limit: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory.
    """
    free_bytes: list[float] = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controller, path = line.split(":", 2)
        root, limit_file, used_file, cache = CGROUP_FILES.get(controller, ("", "", "", ""))
        group = Path(root + path)
        for level in (group, *group.parents) if root else ():
            try:
                limit, used = ((level / name).read_text(encoding="utf-8").strip() for name in (limit_file, used_file))
                stat = dict(entry.split() for entry in (level / "memory.stat").read_text(encoding="utf-8").splitlines())
            except OSError:  # a group outside the container, or the root group
                continue
            if limit != "max":
                free_bytes.append(int(limit) - int(used) + int(stat.get(cache, 0)))
    return [*free_bytes, math.inf]
