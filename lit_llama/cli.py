"""The command line of every script: flags from main's signature, errors of the user in one line."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable
from difflib import get_close_matches
from itertools import takewhile
from typing import TYPE_CHECKING

from lit_llama.common.errors import Interrupted, UserError
from lit_llama.settings import SHARED_FLAGS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def run(main: Callable, leading: str | None = None) -> None:
    """Call ``main`` with the command line's flags; what stands before the first one is the list ``leading``.

    A UserError, a file that cannot be read or written, and too little memory end the program with one line and exit
    code 2, Ctrl-C with 130; of several processes one says so.
    """
    from jsonargparse import Namespace

    from lit_llama.ranks import leave

    global command_line
    open_closed_streams()
    write_utf8()
    config = Namespace()
    try:
        parser = parser_of(main)
        config = parse(parser, gather(sys.argv[1:], leading) if leading else sys.argv[1:])
        command_line = parser.dump(Namespace({k: v for k, v in vars(config).items() if k not in ONE_OFF}))
        arguments = parser.instantiate(config)
        arguments.pop("config", None)
        main(**arguments)
    except UserError as error:
        leave(f"error: {error}", 2, failed=True)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            leave(f"error: {out_of_memory(str(error), config)}", 2, failed=True)
        if not isinstance(error, OSError):
            raise
        leave(f"error: {describe(error)}", 2, failed=True)
    except Interrupted as stopped:
        leave(str(stopped), 130, failed=False)
    except KeyboardInterrupt:
        leave("interrupted", 130, failed=True)


def describe(error: OSError) -> str:
    return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"


# What torch's allocators, their libraries and the operating system say.
OUT_OF_MEMORY = re.compile("(?i)out of memory|can.t allocate|cannot allocate|not enough memory|bad_alloc|ALLOC_FAILED")
LESS_MEMORY = {  # flags, and the value that takes less memory; None for any lower one
    "train.micro_batch_tokens": None,
    "micro_batch_tokens": None,
    "batch_size": None,
    "train.max_seq_length": None,
    "max_seq_length": None,
    "max_new_tokens": None,
    "checkpointing": True,
    "quantize": "int8",
    "precision": "bf16-true",
}


def out_of_memory(message: str, config: Namespace) -> str:
    """One line for the user: what was asked for, and which of the script's flags lower it."""
    asked = re.search(r"(?:tried|unable) to (?:allocate|mmap) ([\d.,]+ ?\w+)", message, re.I)
    ways = [
        f"a lower --{flag}" if value is None else f"--{flag}" if value is True else f"--{flag} {value}"
        for flag, value in LESS_MEMORY.items()
        if flag in config and config[flag] not in (value, "nf4")
    ]
    return (
        f"not enough memory{f' (tried to allocate {asked[1]})' if asked else ''}; free some, or pass "
        f"{', '.join(ways) or 'a smaller model'}"
    )


def open_closed_streams() -> None:
    """Let a standard stream that is closed, as with ``<&-``, be an empty one: libraries do not expect None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def write_utf8() -> None:
    """Print UTF-8 into files and pipes, too, where Windows has a code page that lacks most characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


ONE_OFF = ("config", "resume", "overwrite", "allow_changes", "yes")  # answers to a situation, not settings of a run
command_line: str | None = None  # the resolved settings as YAML, for a run to save beside its output


def parser_of(main: Callable) -> ArgumentParser:
    """A flag for each argument of ``main``; its help is a line of the docstring's Args, or of SHARED_FLAGS."""
    from jsonargparse import auto_parser

    parser = auto_parser(main, as_positional=False)
    parser.exit_on_error = False  # jsonargparse prints the usage, a screenful, before what is wrong
    parser.allow_abbrev = False
    for action in parser._actions:
        action.help = action.help or SHARED_FLAGS.get(action.dest)
    return parser


def parse(parser: ArgumentParser, args: list[str]) -> Namespace:
    """The values of the flags. UserError for one that is unknown, with the nearest, or missing, or does not fit."""
    try:
        return parser.parse_args(bare_switches(parser, args))
    except ArgumentError as error:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise UserError(in_our_words(" ".join(str(error).split()), flags)) from None


def in_our_words(message: str, flags: list[str]) -> str:
    """One of jsonargparse's messages, shorter and with the way out; as it is where it is none of the frequent ones."""
    if match := re.match(r"unrecognized arguments: ([^\s=]+)", message):
        if not match[1].startswith("--"):
            return f"{match[1]!r} belongs to no flag; --help lists them"
        return f"unknown flag {match[1]}; {nearest_flag(match[1], flags)}"
    if match := re.match(r"(?:Group '\w+' does not accept option|Option) '(\S+?)'", message):
        return f"--config holds {match[1]}, which is no flag; {nearest_flag(match[1], flags)}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return f"missing: --{match[1].replace(', ', ', --')}; --help says what they are"
    if match := re.match(r'Parser key "(.+?)": (.*Expected .*) (?:Got|Given) value: (.*)', message):
        types = re.findall(r"Expected an? (?:<class ')?(?:typing\.)?(\w+\[.*?\]|\w+)", match[2])
        example = ", in brackets: '[a, b]'" if any(name.startswith(("tuple", "list")) for name in types) else ""
        return f"--{match[1]} {match[3]}: expected {' or '.join(name for name in types if name != 'NoneType')}{example}"
    return re.sub(r'^Parser key "(.+?)": ', r"--\1: ", message)[:300]  # it may quote a whole file


def nearest_flag(name: str, flags: list[str]) -> str:
    """A question for the flag with the same last part, --train.seed for --seed, or with the one spelled most alike."""
    by_last_part = {flag.strip("-").split(".")[-1]: flag for flag in reversed(flags)}
    last_part = name.strip("-").replace("-", "_").split(".")[-1]
    alike = get_close_matches(last_part, by_last_part, n=1)
    return f"did you mean {by_last_part[alike[0]]}?" if alike else "--help lists them"


def gather(args: list[str], flag: str) -> list[str]:
    """``a b --out c`` as ``--flag ["a", "b"] --out c``."""
    leading = list(takewhile(lambda arg: not arg.startswith("-"), args))
    return [f"--{flag}", json.dumps(leading), *args[len(leading) :]] if leading else args


def bare_switches(parser: ArgumentParser, args: list[str]) -> list[str]:
    """Let ``--resume`` stand for ``--resume true``: jsonargparse wants a value for every bool."""
    switches = {flag for flag, value in vars(parser.get_defaults()).items() if isinstance(value, bool)}
    switches = {f"--{flag}" for flag in switches}
    spelled = []
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        spelled += [arg, "true"] if arg in switches and following.startswith("--") else [arg]
    return spelled


def call(function: Callable, what: str, **flags: object) -> None:
    """Call ``function`` with the flags that were given (are not None), for a script that serves several.

    UserError where ``function``, ``what`` in words, does not take one of them or needs another.
    """
    parameters = inspect.signature(function).parameters
    given = {name: value for name, value in flags.items() if value is not None}
    if foreign := [f"--{name}" for name in given if name not in parameters]:
        raise UserError(f"{what} does not take {', '.join(foreign)}, but --{', --'.join(parameters)}")
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    if missing := [f"--{name}" for name in needed if name not in given]:
        raise UserError(f"{what} needs {', '.join(missing)}; --help says what they are")
    function(**given)
