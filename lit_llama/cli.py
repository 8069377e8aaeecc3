"""The command line of every script: flags come from main's signature, and a user's error is one line."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import NoReturn, get_args

from jsonargparse import ArgumentParser, Namespace, auto_parser

from lit_llama.common.errors import Interrupted, UserError
from lit_llama.common.files import atomic_write
from lit_llama.devices.launch import let_rank0_report, log_rank0, rank
from lit_llama.settings import DEFAULT_BASE, SHARED_FLAGS


def run(main: Callable, leading: str | None = None) -> None:
    """Call ``main`` with the command line's flags. Arguments before the first flag become the list ``leading``.

    A UserError, a file that cannot be read or written, or too little memory ends the program with one line and exit
    code 2; Ctrl-C ends it with 130. If several processes fail, one reports it.
    """
    global _settings
    open_closed_streams()
    write_utf8()
    warn_of_other_clone(Path(main.__code__.co_filename))
    config = Namespace()
    try:
        parser = parser_of(main)
        config = parse(parser, gather(sys.argv[1:], leading) if leading else sys.argv[1:])
        _settings = parser.dump(Namespace({k: v for k, v in vars(config).items() if k not in ONE_OFF}))
        arguments = parser.instantiate(config)
        arguments.pop("config", None)
        main(**arguments)
    except UserError as error:
        fail(str(error))
    except Interrupted as stopped:
        log_rank0(str(stopped))
        sys.exit(130 if rank() == 0 else 0)  # Fabric's launcher kills rank 0 after any other exit code
    except KeyboardInterrupt:
        log_rank0("interrupted")
        sys.exit(130)
    except Exception as error:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            fail(out_of_memory(str(error), config))
        if isinstance(error, OSError):
            fail(describe(error))
        let_rank0_report()
        raise


def fail(text: str) -> NoReturn:
    """End the program with one line and exit code 2. If several ranks find the same fault, rank 0 reports it."""
    let_rank0_report()
    print(f"error: {text}" + (f" (rank {rank()})" if rank() else ""), file=sys.stderr)
    sys.exit(2)


def describe(error: OSError) -> str:
    return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"


# The words of torch's allocators, their libraries and the operating system.
OUT_OF_MEMORY = re.compile("(?i)out of memory|can.t allocate|cannot allocate|not enough memory|bad_alloc|ALLOC_FAILED")
LESS_MEMORY = {  # flags, and the value that needs less memory (None: any lower one)
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
    """One line for the user: how much memory was requested, and which of the script's flags lower it."""
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


def warn_of_other_clone(script: Path) -> None:
    """Print a note if the script's own clone is not the one that ``lit_llama`` is imported from."""
    here, imported = script.resolve().parents[1], Path(__file__).resolve().parents[1]
    if (here / "lit_llama").is_dir() and here != imported:
        log_rank0(
            f"note: lit_llama is imported from {imported}, not from {here}; to change that: pip install -e {here}"
        )


def open_closed_streams() -> None:
    """Open /dev/null for a closed standard stream (``<&-``): libraries do not expect None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def write_utf8() -> None:
    """Print UTF-8 into files and pipes too: Windows' code pages lack most characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


ONE_OFF = ("config", "resume", "overwrite", "allow_changes", "yes")  # flags that are not settings of a run
CONFIG_FILE = "config.yaml"
_settings: str | None = None  # the running script's settings as YAML


def save_settings(folder: Path) -> None:
    """Write the settings of the script that runs, if one does, to ``folder``, for ``--config`` to read."""
    if _settings is not None:
        with atomic_write(folder / CONFIG_FILE) as temporary:
            temporary.write_text(_settings, encoding="utf-8")


class Parser(ArgumentParser):
    """Reads a --config as UTF-8, as it is written; jsonargparse would use the locale's encoding."""

    def parse_path(self, path, *args, **kwargs) -> Namespace:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--config {path} is not UTF-8: {error}") from None
        return self.parse_string(text, str(path), *args, **kwargs)


def parser_of(main: Callable) -> ArgumentParser:
    """A flag for each argument of ``main``. Its help is a line of the docstring's Args or of SHARED_FLAGS.

    The default base is shown relative to the current folder, if it lies inside.
    """
    parser = auto_parser(main, as_positional=False, parser_class=Parser)
    parser.exit_on_error = False  # argparse would print a screenful of usage before the error
    parser.allow_abbrev = False
    for action in parser._actions:
        action.help = action.help or SHARED_FLAGS.get(action.dest)
        if action.default == DEFAULT_BASE and Path(DEFAULT_BASE).is_relative_to(Path.cwd()):
            action.default = Path(DEFAULT_BASE).relative_to(Path.cwd()).as_posix()
    return parser


def parse(parser: ArgumentParser, args: list[str]) -> Namespace:
    """The values of the flags. Raises UserError if one is unknown (naming the nearest), missing or invalid."""
    args = bare_switches(parser, args)
    check_flags(parser, args)
    try:
        config = parser.parse_args(args)
    except (ArgumentError, ValueError, OverflowError) as error:  # a path with a zero byte, 10**400 for a float
        raise UserError(" ".join(str(error).split())[:500]) from None  # it may quote a whole file
    check_values(parser, config)
    return config


def check_flags(parser: ArgumentParser, args: list[str]) -> None:
    """Raises UserError for the first unknown flag."""
    flags = parser._option_string_actions
    for before, arg in zip(["", *args], args, strict=False):
        name = arg.split("=")[0]
        a_value = len(arg) < 2 or " " in arg or parser._negative_number_matcher.match(arg)
        if arg.startswith("-") and name not in flags and not a_value:
            meant = f"; if it is the value of {before}, write {before}={arg}" if before in flags else ""
            raise UserError(f"unknown flag {name}; {nearest_flag(name, flags)}{meant}")


def check_values(parser: ArgumentParser, config: Namespace) -> None:
    """Raises UserError for values that jsonargparse accepts: null for any type, infinity, NaN."""
    for group in parser.groups or ():
        if not isinstance(config[group], Namespace):
            raise UserError(f"--{group} {config[group]} must hold its settings by name")
    for action in parser._actions:
        kind, value = getattr(action, "_typehint", None), config.get(action.dest)
        if value is None and kind is not None and type(None) not in get_args(kind):
            raise UserError(f"--{action.dest} null: expected a value")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{action.dest} {value} must be a finite number")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"--{action.dest} {value!r} must not hold a zero byte")


def nearest_flag(name: str, flags: Iterable[str]) -> str:
    """Suggests the flag with the same last part (--train.seed for --seed) or the most similar spelling."""
    by_last_part = {flag.strip("-").split(".")[-1]: flag for flag in reversed(list(flags)) if flag != "-h"}
    last_part = name.strip("-").replace("-", "_").split(".")[-1]
    alike = get_close_matches(last_part, by_last_part, n=1)
    return f"did you mean {by_last_part[alike[0]]}?" if alike else "--help lists them"


def gather(args: list[str], flag: str) -> list[str]:
    """``a b --out c`` as ``--flag ["a", "b"] --out c``."""
    leading = list(takewhile(lambda arg: not arg.startswith("-"), args))
    return [f"--{flag}", json.dumps(leading), *args[len(leading) :]] if leading else args


def bare_switches(parser: ArgumentParser, args: list[str]) -> list[str]:
    """Make ``--resume`` mean ``--resume true``: jsonargparse wants a value for every bool."""
    switches = {f"--{flag}" for flag, value in vars(parser.get_defaults()).items() if isinstance(value, bool)}
    spelled = []
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        spelled += [arg, "true"] if arg in switches and following.startswith("--") else [arg]
    return spelled


def call(function: Callable, what: str, **flags: object) -> None:
    """Call ``function`` with the flags that are not None, for a script that serves several functions.

    Raises UserError if ``function`` (``what`` in words) does not take one of them or needs another.
    """
    parameters = inspect.signature(function).parameters
    given = {name: value for name, value in flags.items() if value is not None}
    if foreign := [f"--{name}" for name in given if name not in parameters]:
        raise UserError(f"{what} does not take {', '.join(foreign)}; it takes --{', --'.join(parameters)}")
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    if missing := [f"--{name}" for name in needed if name not in given]:
        raise UserError(f"{what} needs {', '.join(missing)}; --help says what they are")
    function(**given)
