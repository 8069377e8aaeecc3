"""A progress bar on stderr."""

import sys

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class Bar(tqdm):
    """tqdm's bar on a terminal; elsewhere, as in a log file, a line every 15 seconds."""

    def __init__(self, total: int, name: str, **options) -> None:
        self.in_lines = not sys.stderr.isatty()
        wait = SECONDS_BETWEEN_LINES if self.in_lines else 0.1
        text = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
        super().__init__(
            total=total, desc=name, bar_format=text, dynamic_ncols=True, mininterval=wait, delay=wait, **options
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.in_lines:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr)
