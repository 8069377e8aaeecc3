"""Peak memory, free memory, and an estimate of what a training step needs:

    frozen weights     their own size; sharded, one device holds its part and two gathered blocks
    what trains        16 bytes per parameter: weight, gradient and AdamW's two moments, all float32
    activations        what autograd saves for the backward pass, in every block from the first that trains
    temporaries        the largest of: the head's logits, a block's gradients, the optimizer's step

Most measured peaks are within 20 % (docs/memory.md). The process adds about 0.5 GB, or 0.7 GB in bfloat16 on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lit_llama.common.errors import UserError
from lit_llama.devices.blocks import first_trained
from lit_llama.devices.launch import log_rank0
from lit_llama.model import LLaMA
from lit_llama.settings import HEAD_CHUNK, TrainArgs

if TYPE_CHECKING:
    from lightning.fabric import Fabric

QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5}  # per weight of a block's matrices; the scales are few


def step_memory(
    model: LLaMA, device: str, tokens: int, seq_length: int, checkpointing: bool, quantize: str, shards: int
) -> dict[str, float]:
    """Bytes at the peak of a step on a ``device`` ("cuda" or "cpu"), of a model that may be on the meta device.

    A micro-batch has ``tokens`` tokens in samples of ``seq_length``, all of them targets. ``shards`` devices share the
    frozen blocks.
    """
    c, blocks, size = model.config, model.transformer.h, model.dtype.itemsize
    tokens += tokens // seq_length * len(model.virtual_ids)
    block_sizes = [sum(p.numel() for p in block.parameters() if not p.requires_grad) for block in blocks]
    elsewhere = sum(p.numel() for p in model.parameters() if not p.requires_grad) - sum(block_sizes)
    held = sum(block_sizes) / shards + (2 * max(block_sizes) if shards > 1 else 0)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    # A block's activations; all blocks from the first that trains are alike.
    norms = 2 * (size if device == "cuda" else 4) * c.n_embd  # their inputs; a CPU computes them in float32
    attention = 2 * (c.n_head + c.n_kv_head) * c.head_size * size  # q, k, v and the output
    if device == "cpu" and size == 2:  # plain products (attention.py): also the scores
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
    return {
        "frozen weights": elsewhere * size + held * QUANTIZED_BYTES.get(quantize, size),
        "trainable parameters": 16 * n_trained,
        "activations": activations,
        "temporaries": max(logits, mlp_gradients, 4 * n_trained),
    }


def check_memory(fabric: Fabric, model: LLaMA, train: TrainArgs, longest: int, checkpointing: bool) -> None:
    """Warn if a step may not fit in the free memory. Raises UserError if it cannot.

    ``model`` is loaded and has its method; ``longest`` is the number of tokens of the longest sample.
    """
    free_bytes = free_memory(fabric.device)
    if free_bytes is None or not fabric.is_global_zero:
        return
    if fabric.device.type == "cpu":
        free_bytes //= fabric.world_size
    tokens = max(longest, min(train.micro_batch_tokens, train.batch_size * longest))
    memory = step_memory(model, fabric.device.type, tokens, longest, checkpointing, quantize="none", shards=1)
    # The weights are loaded already: of 16 bytes per trainable parameter, 12 are to come.
    needed = 0.75 * memory["trainable parameters"] + memory["activations"] + memory["temporaries"]
    if needed < 0.8 * free_bytes:
        return
    text = (
        f"a step needs about {needed / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free; pass a lower "
        "--train.micro_batch_tokens or --train.max_seq_length, --checkpointing or --quantize int8 (docs/memory.md)"
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
    """Free memory in bytes, of the GPU, or of this machine or container. None if neither CUDA nor Linux can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    free_bytes = int(path.read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0]) * 1024
    cgroup = Path("/sys/fs/cgroup")  # of a container
    if (cgroup / "memory.max").exists() and (limit := (cgroup / "memory.max").read_text().strip()) != "max":
        used, stat = (cgroup / "memory.current").read_text(), (cgroup / "memory.stat").read_text()
        reclaimable = int(dict(line.split() for line in stat.splitlines())["inactive_file"])
        free_bytes = min(free_bytes, int(limit) - int(used) + reclaimable)
    return free_bytes
