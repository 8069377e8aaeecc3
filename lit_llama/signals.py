"""Ctrl-C and SIGTERM as a question to ask between steps and micro-batches."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lit_llama import ranks

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Interrupt:
    """Whether Ctrl-C or SIGTERM came."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, signum: int, frame: object) -> None:
        if self.came and signum == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.came = True
        ranks.note("\nstopping; press Ctrl-C again to stop at once")

    def seen(self, fabric: Fabric) -> bool:
        """The same answer on every rank, so that none waits for one that has stopped."""
        if fabric.world_size == 1:
            return self.came
        return bool(fabric.all_reduce(torch.tensor(float(self.came), device=fabric.device), reduce_op="sum"))


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Turn Ctrl-C and SIGTERM into a question to ask between steps and micro-batches."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield interrupt
        return
    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
