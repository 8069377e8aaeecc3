"""Exceptions that end a script with one line instead of a traceback."""


class UserError(ValueError):
    """Something the user can fix. The message says what was found, with the numbers, and what to do."""


class Interrupted(Exception):
    """The user stopped training, and its state is saved."""
