"""Progress on stderr: a bar on a terminal; elsewhere, as in a log file, a line every so often."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
T = TypeVar("T")


class Bar(tqdm):
    """tqdm's bar, without colours; ``hidden`` shows nothing at all, for ranks other than 0."""

    def __init__(self, total: int, name: str, unit: str, initial: int = 0, hidden: bool = False) -> None:
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        super().__init__(
            total=total, desc=name, unit=unit, initial=initial, disable=hidden or not on_terminal, dynamic_ncols=True
        )
        self.prints_lines = not (hidden or on_terminal)
        self.name, self.last_line = name, time.monotonic()

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        self.name = desc or ""
        super().set_description(desc, refresh)

    def update(self, n: float | None = 1) -> bool | None:
        """Count ``n`` more; what ``set_postfix_str`` was given last goes with it."""
        if not self.disable:
            return super().update(n)
        self.n += n or 0
        if self.prints_lines and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            figures = f", {self.postfix}" if getattr(self, "postfix", None) else ""
            print(f"{self.name}: {self.n} of {self.total}{figures}", file=sys.stderr, flush=True)
        return None


def track(items: Iterable[T], total: int, name: str, unit: str = "it") -> Iterator[T]:
    """The items one by one, counted by a bar."""
    with Bar(total, name, unit) as bar:
        for item in items:
            yield item
            bar.update()
