"""The command line of every script: complete help, mistakes in one line, no bars in a log."""

import io
import math
import re
import sys
import time

import pytest
import torch
from helpers import ROOT, SCRIPTS, run_process, script_parser

from lit_llama import cli
from lit_llama.cli import parse
from lit_llama.common.errors import UserError
from lit_llama.devices import launch
from lit_llama.settings import TRAIN_RANGES, DataOptions, Hardware, Sampling, TrainArgs


def mistake(*args: str, script: str = "finetune/adapter.py") -> str:
    with pytest.raises(UserError) as error:
        parse(script_parser(ROOT / script), list(args))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_flag_has_a_sentence(path):
    flags = {(action.option_strings or [action.dest])[-1]: action.help for action in script_parser(path)._actions}
    for flag in ("--help", "--config", "--print_config", "--train", "--sampling"):  # jsonargparse's, and groups
        flags.pop(flag, None)
    assert flags
    for flag, text in flags.items():
        assert text and text.endswith(".") and text[0] != "(", f"{flag} has no sentence: {text!r}"


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_in_a_process_of_its_own(path):
    """A script has its own folder first on the path, which must not hide a package."""
    result = run_process(path, "--help")
    assert result.returncode == 0 and "--config" in result.stdout, result.stderr


def test_numbers_of_training_and_sampling_have_bounds():
    bounds = [(TrainArgs, "--train", name, *ends) for name, ends in TRAIN_RANGES.items()]
    bounds += [(Sampling, "--sampling", "temperature", 0.001, 1000), (Sampling, "--sampling", "top_k", 1, 10**9)]
    bounds += [(Sampling, "--sampling", "top_p", 1e-6, 1), (Sampling, "--sampling", "seed", 0, 2**32 - 1)]
    for settings, group, name, low, high in bounds:
        others = {"max_steps": 1} if settings is TrainArgs else {"temperature": 1.0}
        for value in (low, high):
            settings(**{**others, name: value})
        for value in (low - 1, high + 1, 1e300, math.inf, math.nan):
            with pytest.raises(UserError, match=f"^{group}.{name}.* must be between {low} and {high}$"):
                settings(**{**others, name: value})
    with pytest.raises(UserError, match="give --train.epochs or --train.max_steps"):
        TrainArgs()
    with pytest.raises(UserError, match="pass a --sampling.temperature above 0 with them"):
        Sampling(top_p=0.5)


def test_an_unknown_flag_is_answered_with_the_nearest():
    assert mistake("--learning_rate", "1") == "unknown flag --learning_rate; did you mean --train.learning_rate?"
    assert mistake("--train.learning_rte=1") == "unknown flag --train.learning_rte; did you mean --train.learning_rate?"
    assert mistake("--prompt-length", "3") == "unknown flag --prompt-length; did you mean --prompt_length?"
    assert mistake("--steps", "3") == "unknown flag --steps; did you mean --train.max_steps?"
    assert mistake("--xyz", "1") == "unknown flag --xyz; --help lists them"


def test_values_that_do_not_fit_are_named():
    assert re.search('"train.max_steps": .*int.* Given value: x', mistake("--train.max_steps", "x"))
    assert re.search('"train.clip": .*float.*inf', mistake("--train.clip", "inf"))
    assert re.search('"resume": .*bool.*perhaps', mistake("--resume", "perhaps"))
    assert mistake("stray") == "unrecognized arguments: stray"
    assert mistake("--prompt_length") == "argument --prompt_length: expected one argument"
    assert "File does not exist" in mistake("--config", "none.yaml")
    assert re.search("\"prompt_init\": .*'text', 'normal'.*zero", mistake("--prompt_init", "zero"))
    assert mistake(script="scripts/convert.py").endswith("arguments are required: source, out_dir")


def test_a_configuration_is_read_and_flags_win(tmp_path):
    content = "prompt_length: 7\nout_dir: null\ndata: Gruß\ntrain: {max_steps: null, epochs: 2}"
    (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
    flags = ["--config", str(tmp_path / "run.yaml"), "--prompt_length", "8"]
    found = parse(script_parser(ROOT / "finetune/adapter.py"), flags)
    assert (found.prompt_length, found.out_dir, found.data) == (8, None, "Gruß")
    assert (found.train.max_steps, found.train.epochs) == (None, 2)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"learning_rat: 3", "ption 'learning_rat'"),
        (b"train:\n  learning_rat: 3", "ption 'learning_rat'"),
        (b"resume: null", "--resume null: expected a value"),
        (b"train: null", "--train.batch_size null: expected a value"),
        (b"data: \xff", "can't decode byte 0xff"),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path, content, message):
    (tmp_path / "run.yaml").write_bytes(content)
    assert message in mistake("--config", str(tmp_path / "run.yaml"))


def test_a_value_that_begins_with_a_dash():
    parser = script_parser(ROOT / "generate/base.py")
    for prompt in ("-5", "-.5", "- a list", "--hi there", "-"):
        assert parse(parser, ["--prompt", prompt]).prompt == prompt
    assert parse(parser, ["--prompt=--hi"]).prompt == "--hi"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 538082424 bytes from file <a>: Cannot allocate memory (12)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        None,  # what torch itself raises
    ],
)
def test_too_little_memory_is_one_line(monkeypatch, capsys, error):
    def main() -> None:
        if error is not None:
            raise error
        torch.empty(2**50)

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: not enough memory; docs/memory.md names the flags that need less. ")


def test_other_runtime_errors_are_raised(monkeypatch):
    def main() -> None:
        raise RuntimeError("the tensors do not fit")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(RuntimeError, match="do not fit"):
        cli.run(main)


def test_switches_need_no_value():
    parser = script_parser(ROOT / "finetune/adapter.py")
    for args in ("--resume", "--resume --data x --yes", "--data x --resume", "--resume true", "--resume=true"):
        assert parse(parser, args.split()).resume is True
    for args in ("", "--resume false --yes", "--resume=false"):
        assert parse(parser, args.split()).resume is False


def test_defaults_in_main_count_for_fields_that_are_flags(monkeypatch, capsys):
    def main(hardware: Hardware = Hardware(devices=2, precision="32-true"), reading: DataOptions = DataOptions()):
        print(hardware.devices, hardware.precision, reading.val_fraction)

    monkeypatch.setattr(sys, "argv", ["main", "--precision", "bf16-true", "--val_fraction", "0.3"])
    cli.run(main)
    assert capsys.readouterr().out == "2 bf16-true 0.3\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_gets_lines_and_a_terminal_a_bar(monkeypatch, terminal):
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(launch, "SECONDS_BETWEEN_LINES", 0.0)
    with launch.Bar(20, "step", initial=10, file=stderr) as bar:
        for loss in range(10):
            time.sleep(0.02)  # a bar of less than 0.1 seconds is not worth drawing
            bar.set_postfix_str(f"loss {loss}", refresh=False)
            bar.update()
    printed = stderr.getvalue()
    assert ("\r" in printed) == terminal and re.search(r"step 1\d/20 \|", printed)
    if not terminal:
        lines = printed.strip().splitlines()
        assert lines[0].startswith("step 10/20 |") and lines[-1].startswith("step 20/20 |") and "loss 9" in lines[-1]


def test_pipes_hold_utf_8_whatever_the_locale(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    assert "prompt: é→\n" in run_process("generate/base.py", "--prompt", "é→", "--print_config").stdout
    assert "flag --é→" in run_process("generate/base.py", "--é→").stderr


def test_a_script_says_that_another_clone_is_imported(tmp_path, capsys):
    (tmp_path / "lit_llama").mkdir()
    cli.warn_of_other_clone(tmp_path / "finetune/lora.py")
    cli.warn_of_other_clone(ROOT / "finetune/lora.py")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: lit_llama is imported from {ROOT}, not from {tmp_path}; ")
