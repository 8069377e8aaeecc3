"""Peak memory, free memory, and what a training step needs. Most estimates are within 20 % (docs/memory.md)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lit_llama.attention import PLAIN_LENGTH
from lit_llama.common.errors import UserError
from lit_llama.devices.blocks import first_trained
from lit_llama.devices.launch import log_rank0
from lit_llama.model import LLaMA
from lit_llama.settings import HEAD_CHUNK, TrainArgs

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def step_memory(model: LLaMA, device: str, tokens: int, seq_length: int, checkpointing: bool) -> dict[str, float]:
    """Bytes at the peak of a step on a ``device`` ("cuda" or "cpu"), by kind, without the frozen weights.

    The model may be on the meta device. A micro-batch has ``tokens`` tokens in samples of ``seq_length``.
    """
    c, blocks, size = model.config, model.transformer.h, model.dtype.itemsize
    tokens += tokens // seq_length * len(model.virtual_ids)

    # A block's activations; all blocks from the first that trains are alike.
    norms = 2 * (size if device == "cuda" else 4) * c.n_embd  # their inputs; a CPU computes them in float32
    attention = 2 * (c.n_head + c.n_kv_head) * c.head_size * size  # q, k, v and the output
    if device == "cpu" and size == 2 and seq_length <= PLAIN_LENGTH:  # plain products (attention.py): also the scores
        attention += c.n_head * seq_length * size
    mlp = 3 * c.intermediate_size * size
    trained = [p for name, p in blocks[-1].named_parameters() if p.requires_grad and not name.endswith("bias")]
    inputs = sum(p.size(-1) for p in trained) * size  # what a trainable matrix or scale is multiplied by
    copies = sum(p.numel() for p in trained) * size if size == 2 else 0  # of float32 weights in bfloat16
    saved = tokens * (norms + attention + mlp + inputs) + copies
    n_blocks = len(blocks) - first_trained(model)
    activations = n_blocks * saved
    if checkpointing and n_blocks:  # each block's input, and all of one block
        activations = n_blocks * tokens * c.n_embd * size + saved

    logits = min(tokens, HEAD_CHUNK) * model.lm_head.out_features * (2 * size + 8)  # also float32, and the gradients
    mlp_gradients = tokens * c.intermediate_size * size * 4  # of one block
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "trainable parameters": 16 * n_trained,  # weight, gradient and AdamW's two moments, all float32
        "activations": activations,
        "temporaries": max(logits, mlp_gradients, 4 * n_trained),  # the last is the optimizer's
    }


def check_memory(fabric: Fabric, model: LLaMA, train: TrainArgs, longest: int, checkpointing: bool) -> None:
    """Warn if a step may not fit in the free memory. Raises UserError if it cannot.

    ``longest`` is the number of tokens of the longest sample.
    """
    free_bytes = free_memory(fabric.device)
    if free_bytes is None or not fabric.is_global_zero:
        return
    if fabric.device.type == "cpu":
        free_bytes //= fabric.world_size
    tokens = max(longest, min(train.micro_batch_tokens, train.batch_size * longest))
    memory = step_memory(model, fabric.device.type, tokens, longest, checkpointing)
    needed = sum(memory.values()) - memory["trainable parameters"] / 4  # the weights are loaded already
    text = (
        f"a step needs about {needed / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free; pass a lower "
        "--train.micro_batch_tokens or --train.max_seq_length, --checkpointing or --quantize int8 (docs/memory.md)"
    )
    if needed > 1.25 * free_bytes:
        raise UserError(text)
    if needed >= 0.8 * free_bytes:
        log_rank0(f"warning: {text}")


def peak_memory(device: torch.device) -> int | None:
    """Peak memory of this process in bytes: of the GPU, or else main memory. None on Windows, which does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if kilobytes := read_number("/proc/self/status", "VmHWM:"):  # on Linux rusage includes the parent's peak
        return 1024 * kilobytes
    if sys.platform == "win32":
        return None
    import resource  # for macOS, and sandboxes whose /proc lacks the peak

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> int | None:
    """Free memory in bytes, of the GPU, or of this machine or container. None if neither CUDA nor Linux can tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached  # PyTorch keeps freed memory for itself
    kilobytes = read_number("/proc/meminfo", "MemAvailable:")
    if kilobytes is None:
        return None
    free_bytes = 1024 * kilobytes
    limit = read_number("/sys/fs/cgroup/memory.max")  # of a container; "max" is no limit
    if limit is not None:
        used = read_number("/sys/fs/cgroup/memory.current") or 0
        reclaimable = read_number("/sys/fs/cgroup/memory.stat", "inactive_file") or 0
        free_bytes = min(free_bytes, limit - used + reclaimable)
    return free_bytes


def read_number(file: str, name: str = "") -> int | None:
    """The number after ``name`` in a file of the Linux kernel. None without the file or the number."""
    path = Path(file)
    found = re.search(rf"^{name}\s*(\d+)", path.read_text(encoding="utf-8"), re.M) if path.exists() else None
    return int(found[1]) if found else None
