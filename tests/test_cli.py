"""The command line of every script: fast and complete help, mistakes in one line, no bars or colours in a log."""

import errno
import io
import os
import re
import sys
from functools import partial

import pytest
import torch
from helpers import ROOT, run_process, script_parser, succeed

from lit_llama import cli
from lit_llama.cli import UserError, bare_switches, parse, parser_of
from lit_llama.common import progress

SCRIPT_FOLDERS = ("finetune", "generate", "scripts", "data")
SCRIPTS = [path for folder in SCRIPT_FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_flag_has_a_sentence(path):
    flags = {action.option_strings[-1]: action.help for action in script_parser(path)._actions}
    own = {flag: text for flag, text in flags.items() if flag not in JSONARGPARSES}
    assert own
    assert path.parent.name != "finetune" or "--overwrite" in own
    for flag, text in own.items():
        assert text and text.endswith(".") and text[0] != "(", f"{flag} has no sentence: {text!r}"


JSONARGPARSES = ("--help", "--config", "--print_config", "--train", "--sampling")  # the last two: a file for a group


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_in_a_process_of_its_own(path):
    """A script sees its own folder first on the path, and must not shadow a package."""
    result = run_process(path, "--help")
    assert result.returncode == 0 and "--config" in result.stdout, result.stderr


def mistake(*args: str, script: str = "finetune/adapter.py") -> str:
    with pytest.raises(UserError) as error:
        parse(script_parser(ROOT / script), list(args))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_flag_is_answered_with_the_nearest():
    assert mistake("--learning_rate", "1") == "unknown flag --learning_rate; did you mean --train.learning_rate?"
    assert mistake("--train.learning_rte=1") == "unknown flag --train.learning_rte; did you mean --train.learning_rate?"
    assert mistake("--prompt-length", "3") == "unknown flag --prompt-length; did you mean --prompt_length?"
    assert mistake("--resum") == "unknown flag --resum; did you mean --resume?"
    assert mistake("--steps", "3") == "unknown flag --steps; did you mean --train.max_steps?"
    assert mistake("--xyz", "1") == "unknown flag --xyz; --help lists them"


def test_values_that_do_not_fit_are_named():
    assert re.search('"train.epochs": .*int.* Given value: x', mistake("--train.epochs", "x"))
    methods = mistake("--methods", "adapter", script="scripts/compare_methods.py")
    assert re.search('"methods": .*tuple.*adapter', methods)
    assert re.search('"resume": .*bool.*perhaps', mistake("--resume", "perhaps"))
    assert mistake("stray") == "unrecognized arguments: stray"
    assert mistake("--prompt_length") == "argument --prompt_length: expected one argument"
    assert "File does not exist" in mistake("--config", "none.yaml")
    convert = "scripts/convert.py"
    assert mistake(script=convert) == "the following arguments are required: source, out_dir"
    flags = ("--source", "a", "--out_dir", "b", "--dtype", "int3")
    assert re.search("\"dtype\": .*'float32', 'bfloat16', 'float16'.*int3", mistake(*flags, script=convert))


def test_a_configuration_is_read_and_its_mistakes_are_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("prompt_length: 7\ntrain:\n  learning_rate: 0.5\n")
    config = parse(script_parser(ROOT / "finetune/adapter.py"), ["--config", str(file), "--prompt_length", "8"])
    assert config.train.learning_rate == 0.5 and config.prompt_length == 8
    for wrong in ("learning_rat: 3", "train:\n  learning_rat: 3"):
        file.write_text(wrong)
        assert "option 'learning_rat'" in mistake("--config", str(file)).lower()


@pytest.mark.parametrize(
    "content, message",
    [
        ("data: null", "--data null: expected a value"),
        ("devices: null", "--devices null: expected a value"),
        ("resume: null", "--resume null: expected a value"),
        ("train: null", "--train None must hold its settings by name"),
        ("train: 3", "--train 3 must hold its settings by name"),
        ("train: []", "--train [] must hold its settings by name"),
        ("train: {learning_rate: null}", "--train.learning_rate null: expected a value"),
        ("train: {seed: null}", "--train.seed null: expected a value"),
        ("gate_init: .nan", "--gate_init nan must be a finite number"),
        ("gate_init: 1e400", "--gate_init inf must be a finite number"),
        (f"gate_init: 1{400 * '0'}", "int too large to convert to float"),
        ('data: "a\\0b"', "--data 'a\\x00b' must not hold a zero byte"),
        (b"data: \xff", "run.yaml is not UTF-8: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_what_yaml_can_hold_is_checked_like_flags(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in mistake("--config", str(file))


def test_what_may_be_null_stays_so(tmp_path):
    (tmp_path / "run.yaml").write_text("out_dir: null\ntrain: {max_steps: null, epochs: 2}")
    config = parse(script_parser(ROOT / "finetune/adapter.py"), ["--config", str(tmp_path / "run.yaml")])
    assert config.out_dir is None and config.train.max_steps is None and config.train.epochs == 2


def test_a_configuration_is_utf8_whatever_the_locale(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("data: Gruß", encoding="utf-8")
    monkeypatch.setattr("builtins.open", partial(open, encoding="ascii"))  # what a call without an encoding would get
    config = parse(script_parser(ROOT / "finetune/adapter.py"), ["--config", str(tmp_path / "run.yaml")])
    assert config.data == "Gruß"


def test_a_value_that_begins_with_a_dash():
    asked = "write --prompt=--hi"
    assert mistake("--prompt", "--hi", script="generate/base.py").endswith(f"if it is the value of --prompt, {asked}")
    assert mistake("--prompt", "-x", script="generate/base.py").endswith("write --prompt=-x")
    for prompt in ("-5", "-.5", "- a list", "--hi there", "-"):
        assert parse(script_parser(ROOT / "generate/base.py"), ["--prompt", prompt]).prompt == prompt
    assert parse(script_parser(ROOT / "generate/base.py"), ["--prompt=--hi"]).prompt == "--hi"


def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(rate: float = 1.0) -> None:
        raise AssertionError("not reached")

    monkeypatch.setattr(sys, "argv", ["script.py", "--rat", "2"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err == "error: unknown flag --rat; did you mean --rate?\n"


def error_of(action) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: B017
        action()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 538082424 bytes from file <a>: Cannot allocate memory (12)"),
        error_of(lambda: torch.empty(2**50)),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 538082424 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of"),
        torch.OutOfMemoryError("MPS backend out of memory (MPS allocated: 5.05 GB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_memory_is_one_line_with_the_flags_that_need_less(monkeypatch, capsys, error):
    def main(batch_size: int = 32, checkpointing: bool = False, quantize: str = "int8", rate: float = 1.0) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    said = capsys.readouterr().err
    sizes = ("538082424 bytes", "4503599627370496 bytes", "20.00 MiB")
    asked = next((f" (tried to allocate {size})" for size in sizes if size in str(error)), "")
    assert stop.value.code == 2
    assert said == f"error: not enough memory{asked}; free some, or pass a lower --batch_size, --checkpointing\n"


def test_other_runtime_errors_are_raised(monkeypatch):
    def main() -> None:
        raise RuntimeError("the tensors do not fit")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(RuntimeError, match="do not fit"):
        cli.run(main)


def test_closed_standard_streams_are_empty(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    cli.run(lambda: print("nobody reads this"))
    with pytest.raises(EOFError):
        input()
    assert not sys.stdin.isatty()


def test_print_config_can_be_read_again(tmp_path):
    (tmp_path / "run.yaml").write_text(succeed("finetune/lora.py", "--r", "3", "--print_config"))
    parser = script_parser(ROOT / "finetune/lora.py")
    config = parse(parser, ["--config", str(tmp_path / "run.yaml")])
    assert {**vars(config), "config": None} == {**vars(parse(parser, ["--r", "3"])), "config": None}


def test_switches_need_no_value():
    def main(resume: bool = False, yes: bool = True, data: str = ""):
        pass

    parser = parser_of(main)
    assert bare_switches(parser, []) == []
    assert bare_switches(parser, ["--resume"]) == ["--resume", "true"]
    spelled = ["--resume", "true", "--data", "x", "--yes", "true"]
    assert bare_switches(parser, ["--resume", "--data", "x", "--yes"]) == spelled
    assert bare_switches(parser, ["--resume", "false", "--yes=false"]) == ["--resume", "false", "--yes=false"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(monkeypatch, stderr: io.StringIO, disable: bool = False) -> str:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.Bar(20, "step", initial=10, disable=disable, file=stderr) as bar:
        for loss in range(10):
            bar.set_postfix_str(f"loss {loss}", refresh=False)
            bar.update()
    return stderr.getvalue()


def test_a_log_gets_lines_and_a_terminal_a_bar(monkeypatch):
    lines = steps(monkeypatch, io.StringIO()).strip().splitlines()
    assert lines[0].startswith("step 10/20 |") and lines[-1].startswith("step 20/20 |") and "loss 9" in lines[-1]
    assert steps(monkeypatch, io.StringIO(), disable=True) == ""
    assert steps(monkeypatch, Terminal()) == ""  # the work is done before a bar is worth drawing


def test_a_script_says_that_another_clone_is_imported(tmp_path, capsys):
    (tmp_path / "lit_llama").mkdir()
    cli.warn_of_other_clone(tmp_path / "finetune/lora.py")
    cli.warn_of_other_clone(ROOT / "finetune/lora.py")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: lit_llama is imported from {ROOT}, not from {tmp_path}; ")
