"""The command line of every script: flags from main's signature, errors of the user in one line."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can put right: the message says what was found, with the numbers, and the way out."""


class Interrupted(Exception):
    """Training was stopped by the user after its state was saved."""


def run(main: Callable) -> None:
    """Call ``main`` with the command line's flags.

    A UserError, and a file that cannot be read or written, end the program with one line and exit code 2, Ctrl-C with
    130.
    """
    from jsonargparse import Namespace, auto_parser

    global command_line
    parser = auto_parser(main, as_positional=False)
    parser.exit_on_error = False  # it would print a page of usage before the error
    try:
        config = parser.parse_args(bare_switches(parser, sys.argv[1:]))
        command_line = parser.dump(Namespace({k: v for k, v in vars(config).items() if k not in ONE_OFF}))
        arguments = parser.instantiate(config)
        arguments.pop("config", None)
        main(**arguments)
    except ArgumentError as error:
        leave(f"error: {flag_error(str(error))}; --help explains each flag", 2)
    except UserError as error:
        leave(f"error: {error}", 2)
    except OSError as error:
        leave(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", 2)
    except Interrupted as stopped:
        leave(str(stopped) if os.environ.get("LOCAL_RANK", "0") == "0" else "", 130)
    except KeyboardInterrupt:
        leave("interrupted", 130)


ONE_OFF = ("config", "resume", "overwrite", "allow_changes", "yes")  # answers to a situation, not settings of a run
command_line: str | None = None  # the resolved settings as YAML, for a run to save beside its output


def leave(message: str, code: int) -> None:
    if message:
        print(message, file=sys.stderr)
    sys.exit(code)


def flag_error(message: str) -> str:
    """jsonargparse's message in one line, in the words of the command line."""
    message = re.sub(r'Parser key "([^"]*)":', r"--\1:", " ".join(message.split()))
    return re.sub(r"<class '(\w+)'>", r"\1", message).rstrip(".")[:300]


def bare_switches(parser: ArgumentParser, args: list[str]) -> list[str]:
    """Let ``--resume`` stand for ``--resume true``: jsonargparse wants a value for every bool."""
    switches = {flag for flag, value in vars(parser.get_defaults()).items() if isinstance(value, bool)}
    switches = {f"--{flag}" for flag in switches}
    spelled = []
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        spelled += [arg, "true"] if arg in switches and following.startswith("--") else [arg]
    return spelled
