"""The command line of every script: flags come from main's signature, and a user's error is one line."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn, get_args, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from lit_llama.common.errors import Interrupted, UserError
from lit_llama.common.files import atomic_write
from lit_llama.devices.launch import let_rank0_report, log_rank0, rank
from lit_llama.settings import DEFAULT_BASE, FLAT, ROOT, SHARED_FLAGS


def run(main: Callable) -> None:
    """Call ``main`` with the command line's flags.

    A UserError, a file that cannot be read or written, or too little memory ends the program with one line and exit
    code 2; Ctrl-C ends it with 130. If several processes fail, one reports it.
    """
    global _settings
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # Windows' code pages lack most characters
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    warn_of_other_clone(Path(main.__code__.co_filename))
    try:
        parser = parser_of(main)
        config = parse(parser, sys.argv[1:])
        _settings = parser.dump(Namespace({k: v for k, v in vars(config).items() if k not in ONE_OFF}))
        arguments = vars(parser.instantiate(config))
        del arguments["config"]
        for name, kind in flat_arguments(main).items():
            arguments[name] = kind(**{field.name: arguments.pop(field.name) for field in fields(kind)})
        main(**arguments)
    except (UserError, OSError) as error:
        fail(str(error))
    except Interrupted as stopped:
        log_rank0(str(stopped))
        sys.exit(130 if rank() == 0 else 0)  # Fabric's launcher kills rank 0 after any other exit code
    except KeyboardInterrupt:
        log_rank0("interrupted")
        sys.exit(130)
    except Exception as error:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            reason = " ".join(str(error).split())[:300]
            fail(f"not enough memory; docs/memory.md names the flags that need less. {reason}")
        let_rank0_report()
        raise


# The words of torch's allocators and their libraries.
OUT_OF_MEMORY = re.compile("(?i)out of memory|can.t allocate|cannot allocate|not enough memory|bad_alloc|ALLOC_FAILED")


def fail(text: str) -> NoReturn:
    """End the program with one line and exit code 2. If several ranks find the same fault, rank 0 reports it."""
    let_rank0_report()
    print(f"error: {text}" + (f" (rank {rank()})" if rank() else ""), file=sys.stderr)
    sys.exit(2)


def warn_of_other_clone(script: Path) -> None:
    """Print a note if the script's own clone is not the one that ``lit_llama`` is imported from."""
    here = script.resolve().parents[1]
    if (here / "lit_llama").is_dir() and here != ROOT.resolve():
        log_rank0(f"note: lit_llama is imported from {ROOT}, not from {here}; to change that: pip install -e {here}")


ONE_OFF = ("config", "resume", "overwrite", "allow_changes", "yes")  # flags that are not settings of a run
FLAGS_FILE = "config.yaml"
_settings: str | None = None  # the running script's settings as YAML


def save_settings(folder: Path) -> None:
    """Write the settings of the script that runs, if one does, to ``folder``, for ``--config`` to read."""
    if _settings is not None:
        with atomic_write(folder / FLAGS_FILE) as temporary:
            temporary.write_text(_settings, encoding="utf-8")


class Parser(ArgumentParser):
    """Reads a --config as UTF-8, as it is written; jsonargparse would use the locale's encoding."""

    def parse_path(self, path, *args, **kwargs) -> Namespace:
        return self.parse_string(Path(path).read_text(encoding="utf-8"), str(path), *args, **kwargs)


def parser_of(main: Callable) -> ArgumentParser:
    """A flag for each argument of ``main``; a list without a default becomes positional arguments.

    Help texts come from the docstring's Args, else from SHARED_FLAGS. The default base is shown relative to the current
    folder, if it lies inside.
    """
    # argparse itself would print a screenful of usage before an error
    parser = Parser(description=(inspect.getdoc(main) or "").split("\n")[0], exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file with flags, such as a run's config.yaml.")
    parameters, flat = inspect.signature(main).parameters, flat_arguments(main)
    lists = {name for name, one in parameters.items() if one.annotation == list[str] and one.default is one.empty}
    for name in lists:
        parser.add_argument(name, type=str, nargs="+")
    parser.add_function_arguments(main, as_group=False, skip={*lists, *flat})
    for name, kind in flat.items():
        parser.add_class_arguments(kind, as_group=False)
        parser.set_defaults(vars(parameters[name].default))
    for action in parser._actions:
        action.help = action.help or SHARED_FLAGS.get(action.dest)
        if action.default == DEFAULT_BASE and Path(DEFAULT_BASE).is_relative_to(Path.cwd()):
            action.default = Path(DEFAULT_BASE).relative_to(Path.cwd()).as_posix()
    return parser


def flat_arguments(main: Callable) -> dict[str, type]:
    """The arguments of ``main`` whose fields are flags of their own."""
    return {name: kind for name, kind in get_type_hints(main).items() if kind in FLAT}


def parse(parser: ArgumentParser, args: list[str]) -> Namespace:
    """The values of the flags. Raises UserError if one is unknown (naming the nearest), missing or invalid."""
    flags = parser._option_string_actions
    for arg in args:
        name = arg.split("=")[0]
        if name.startswith("--") and name not in flags and " " not in arg:
            raise UserError(f"unknown flag {name}; {nearest_flag(name, flags)}")
    try:
        config = parser.parse_args(bare_switches(parser, args))
    except (ArgumentError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())[:500]) from None  # it may quote a whole file
    for action in parser._actions:  # jsonargparse accepts null in a --config for every type
        kind = getattr(action, "_typehint", None)
        if kind is not None and type(None) not in get_args(kind) and config.get(action.dest) is None:
            raise UserError(f"--{action.dest} null: expected a value")
    return config


def nearest_flag(name: str, flags: Iterable[str]) -> str:
    """Suggests the flag with the same last part (--train.seed for --seed) or the most similar spelling."""
    by_last_part = {flag.strip("-").split(".")[-1]: flag for flag in reversed(list(flags)) if flag != "-h"}
    last_part = name.strip("-").replace("-", "_").split(".")[-1]
    alike = get_close_matches(last_part, by_last_part, n=1)
    return f"did you mean {by_last_part[alike[0]]}?" if alike else "--help lists them"


def bare_switches(parser: ArgumentParser, args: list[str]) -> list[str]:
    """Make ``--resume`` mean ``--resume true``: jsonargparse wants a value for every bool."""
    switches = {f"--{flag}" for flag, value in vars(parser.get_defaults()).items() if isinstance(value, bool)}
    spelled = []
    for i, arg in enumerate(args):
        has_value = i + 1 < len(args) and not args[i + 1].startswith("--")
        spelled += [arg, "true"] if arg in switches and not has_value else [arg]
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
