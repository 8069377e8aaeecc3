"""Where a program runs: processes (ranks), their device, the base's precision, and what rank 0 prints.

Fabric's launcher and torchrun end the whole job when a process dies. A rank that waits for a dead one fails when its
connection breaks, or after 30 minutes, Fabric's default timeout.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from tqdm import tqdm

from lit_llama.common.errors import UserError, check_range
from lit_llama.settings import Hardware

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import Logger

# Fabric only starts the processes. This project shards (blocks.py) and sums gradients (train/loss.py) itself.
STRATEGIES = {"auto": "auto", "ddp": "ddp", "fsdp": "ddp"}
PRECISIONS = {"bf16-true": torch.bfloat16, "32-true": torch.float32}


def launch(hardware: Hardware = Hardware(), logger: str | None = None, out_dir: Path | str = "") -> Fabric:
    """Start Fabric with one process per device, or join the processes that torchrun or srun started.

    Fabric's own precision stays float32: its "bf16-true" would also cast trainable parameters. ``--precision`` applies
    to the frozen base.
    """
    from lightning.fabric import Fabric  # it takes seconds to import; --help does not need it

    devices, num_nodes, strategy = hardware.devices, hardware.num_nodes, hardware.strategy
    check_launcher(devices, num_nodes, strategy)
    loggers = make_loggers(logger, Path(out_dir))
    try:
        fabric = Fabric(
            devices=devices, num_nodes=num_nodes, strategy=STRATEGIES[strategy], precision="32-true", loggers=loggers
        )
        fabric.launch()
    except Exception as error:  # Fabric's errors have no common class
        raise UserError(f"--devices {devices} --num_nodes {num_nodes}: {error}") from None
    return fabric


def make_loggers(name: str | None, out_dir: Path) -> list[Logger]:
    """The logger for a ``--logger``. Raises UserError if the name is unknown or the logger's package is missing."""
    if name is None:
        return []
    try:
        if name == "tensorboard":
            from lightning.fabric.loggers import TensorBoardLogger

            return [TensorBoardLogger(out_dir, name="tensorboard", version="", default_hp_metric=False)]
        if name == "wandb":
            from lightning.pytorch.loggers import WandbLogger

            return [WandbLogger(project="lit-llama", save_dir=out_dir)]
        if name == "mlflow":
            from lightning.pytorch.loggers import MLFlowLogger

            uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
            return [MLFlowLogger("lit-llama", tracking_uri=uri)]
    except ModuleNotFoundError:
        raise UserError(f"--logger {name} needs its package; run: pip install {name}") from None
    raise UserError(f"--logger {name!r} is none of tensorboard, wandb, mlflow; metrics.csv is always written")


def check_launcher(devices: int, num_nodes: int, strategy: str = "auto") -> None:
    """Raises UserError for flags that do not fit each other or the processes that torchrun or srun started.

    Fabric would not notice the latter: with --devices 1, every process would be a run of its own in the same folder.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"--strategy {strategy} is none of {', '.join(STRATEGIES)}")
    check_range("--num_nodes", num_nodes, 1, 2**20)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        world, per_node = os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        world = os.environ["SLURM_NTASKS"]
        per_node = os.environ.get("SLURM_NTASKS_PER_NODE", world)
    else:  # Fabric starts the processes: on a CPU, at most one for each core
        most = torch.cuda.device_count() or os.cpu_count() or 1
        if not 1 <= devices <= most:
            raise UserError(f"--devices {devices} must be between 1 and {most}, the GPUs or else the cores here")
        world, per_node = devices * num_nodes, devices
    if (int(per_node), int(world)) != (devices, devices * num_nodes):
        raise UserError(
            f"{per_node} processes were started on a node and {world} in all; instead of --devices {devices} "
            f"--num_nodes {num_nodes} pass --devices {per_node} --num_nodes {int(world) // int(per_node)}"
        )
    if strategy == "fsdp" and devices * num_nodes < 2:
        raise UserError("--strategy fsdp shards the base across devices: pass --devices 2 or more, or --strategy auto")


def default_device() -> torch.device:
    """The device of a single process: CUDA if available, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def base_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The base's dtype for a ``--precision`` of "bf16-true", "32-true" or "auto" (the faster one on this device)."""
    return PRECISIONS[resolve_precision(precision, device)]


def resolve_precision(precision: str, device: torch.device) -> str:
    """The key of PRECISIONS for a ``--precision``. Prints a note if it is slow on this device."""
    if precision == "auto":
        return "bf16-true" if multiplies_bf16(device) else "32-true"
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision!r} is none of auto, {', '.join(PRECISIONS)}")
    if precision == "bf16-true" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        log_rank0("note: this CPU has no bfloat16 instructions; --precision 32-true is many times faster")
    return precision


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device is known to have bfloat16 matrix instructions (False for Apple's GPUs).

    Without them, bfloat16 is slow: on two Zen 3 cores with AVX2, a product of 284 x 576 x 1536 takes seven times as
    long as in float32, and its backward pass sixty times as long.
    """
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


PARENT = os.getppid()  # rank 0, if Fabric started this process


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def print_rank0(text: str = "") -> None:
    """Print ``text`` on rank 0. Fabric's own print does so once per node."""
    if rank() == 0:
        print(text, flush=True)  # before later output to stderr


def log_rank0(text: str) -> None:
    """Print ``text`` on rank 0 to stderr, for everything that is not a result."""
    if rank() == 0:
        print(text, file=sys.stderr)


def barrier(fabric: Fabric, what: str) -> None:
    """Wait for all ranks. ``what`` completes the error message "waited for the others to ..."."""
    try:
        fabric.barrier()
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank()} waited for the others to {what}: {error}") from None


def let_rank0_report() -> None:
    """Let rank 0 report a fault first: other ranks wait ten seconds, exit if their parent (Fabric's rank 0) ends."""
    for _ in range(10 if rank() > 0 else 0):
        time.sleep(1)
        if os.getppid() != PARENT:
            sys.exit(1)


SECONDS_BETWEEN_LINES = 15.0


class Bar(tqdm):
    """tqdm's bar on rank 0's stderr: a bar on a terminal; elsewhere, as in a log file, a line every 15 seconds."""

    def __init__(self, total: int, name: str, **options) -> None:
        self.in_lines = not sys.stderr.isatty()
        wait = SECONDS_BETWEEN_LINES if self.in_lines else 0.1
        text = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
        options |= dict(dynamic_ncols=True, mininterval=wait, delay=wait, disable=rank() > 0)
        super().__init__(total=total, desc=name, bar_format=text, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.in_lines:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr)
