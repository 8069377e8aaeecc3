"""The command line of every script: flags from main's signature, errors of the user in one line."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can put right: the message says what was found, with the numbers, and the way out."""


class Interrupted(Exception):
    """Training was stopped by the user after its state was saved."""


def run(main: Callable) -> None:
    """Call ``main`` with the command line's flags.

    A UserError ends the program with one line and exit code 2, Ctrl-C with 130; of several processes one says so.
    """
    from jsonargparse import Namespace, auto_parser

    from lit_llama.ranks import leave

    global command_line
    parser = auto_parser(main, as_positional=False)
    try:
        config = parser.parse_args(bare_switches(parser, sys.argv[1:]))
        command_line = parser.dump(Namespace({k: v for k, v in vars(config).items() if k not in ONE_OFF}))
        arguments = parser.instantiate(config)
        arguments.pop("config", None)
        main(**arguments)
    except UserError as error:
        leave(f"error: {error}", 2, failed=True)
    except Interrupted as stopped:
        leave(str(stopped), 130, failed=False)
    except KeyboardInterrupt:
        leave("interrupted", 130, failed=True)


ONE_OFF = ("config", "resume", "overwrite", "yes")  # answers to a situation, not settings of a run
command_line: str | None = None  # the resolved settings as YAML, for a run to save beside its output


def bare_switches(parser: ArgumentParser, args: list[str]) -> list[str]:
    """Let ``--resume`` stand for ``--resume true``: jsonargparse wants a value for every bool."""
    switches = {flag for flag, value in vars(parser.get_defaults()).items() if isinstance(value, bool)}
    switches = {f"--{flag}" for flag in switches}
    spelled = []
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        spelled += [arg, "true"] if arg in switches and following.startswith("--") else [arg]
    return spelled
