"""Exceptions that end a script with one line instead of a traceback."""


class UserError(ValueError):
    """Something the user can fix. The message says what was found, with the numbers, and what to do."""


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raises UserError if the value of a flag or argument, unless None, is not between ``low`` and ``high``."""
    if value is not None and not low <= value <= high:  # NaN fails, too
        raise UserError(f"{name} {value} must be between {low} and {high}")


class Interrupted(Exception):
    """The user stopped training, and its state is saved."""
