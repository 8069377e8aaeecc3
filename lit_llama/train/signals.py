"""Ctrl-C, SIGTERM and SIGHUP as a question to ask between steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lit_llama.devices import ranks

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Interrupt:
    """Whether Ctrl-C, SIGTERM or SIGHUP came."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, signum: int, frame: object) -> None:
        if self.came and signum == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.came = True
        try:
            ranks.log_rank0("\nstopping; press Ctrl-C again to stop at once")
        except OSError:  # the terminal has closed: what is still printed must not keep the state from being saved
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def seen(self, fabric: Fabric) -> bool:
        """The same answer on every rank, so that none waits for one that has stopped."""
        if fabric.world_size == 1:
            return self.came
        return bool(fabric.all_reduce(torch.tensor(float(self.came), device=fabric.device), reduce_op="sum"))


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a question to ask between steps."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield interrupt
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
