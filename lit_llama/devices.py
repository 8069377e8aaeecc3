"""Where a program runs and how wide its base weights are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_llama.cli import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PRECISIONS = {"bf16-true": torch.bfloat16, "32-true": torch.float32}


def launch(devices: int = 1, num_nodes: int = 1, strategy: str = "auto") -> Fabric:
    """Start Fabric on the machine's accelerator, with one process for each device.

    Fabric's own precision stays at float32: its "bf16-true" would cast the trained tensors too, and in bfloat16 an
    optimizer step of 1e-3 on 0.5 is lost. ``--precision`` is the width that the base is loaded in.
    """
    from lightning.fabric import Fabric  # takes seconds to import, which --help need not wait for

    try:
        fabric = Fabric(devices=devices, num_nodes=num_nodes, strategy=strategy, precision="32-true")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--devices {devices} --num_nodes {num_nodes} --strategy {strategy}: {error}") from None
    fabric.launch()
    return fabric


def default_device() -> torch.device:
    """What one process generates on: CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def base_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The base's dtype for a ``--precision`` of "bf16-true", "32-true", or "auto": the faster one on this device."""
    if precision == "auto":
        precision = "bf16-true" if multiplies_bf16(device) else "32-true"
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision!r} is none of auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matrix instructions.

    On a CPU without them bfloat16 is several times slower than float32, not faster: on two cores of an AVX2 server
    17 against 150 GFLOP/s at 1024 x 576 x 1536.
    """
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
