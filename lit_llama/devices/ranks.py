"""What the processes (ranks) of one job need besides tensors: rank 0 prints, and one of them reports a failure.

Fabric's launcher and torchrun end the whole job when a process dies. A rank that waits for a dead one fails when its
connection breaks, or after 30 minutes: Fabric's default timeout.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PARENT = os.getppid()  # rank 0, if Fabric's launcher started this process


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def print_rank0(text: str = "") -> None:
    """Print ``text`` once for the whole job. Fabric's own print does so once per node."""
    if rank() == 0:
        print(text, flush=True)  # before anything that goes to stderr next


def log_rank0(text: str) -> None:
    """Like ``print_rank0``, on stderr: for everything that is not a result."""
    if rank() == 0:
        print(text, file=sys.stderr)


def barrier(fabric: Fabric, what: str) -> None:
    """Wait for all ranks. ``what`` completes "waited for the others to ..." in an error."""
    try:
        fabric.barrier()
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank()} waited for the others to {what}: {error}") from None


def give_way() -> None:
    """On ranks other than 0: wait before reporting a fault that rank 0 may report, too, and end if it has."""
    started_by_rank0 = "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_PROCID" not in os.environ
    for _ in range(10 if rank() > 0 else 0):
        time.sleep(1)
        if started_by_rank0 and os.getppid() != PARENT:  # rank 0 has ended
            sys.exit(1)
