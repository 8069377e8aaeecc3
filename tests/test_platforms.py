"""Windows and macOS, as far as they can be simulated here."""

import errno
import io
import os
import signal
import sys
from pathlib import Path, PureWindowsPath

import pytest
import torch
from helpers import make_base, run, succeed, sums, write_rows
from lightning.fabric import Fabric

from lit_llama import cli, trained
from lit_llama.devices import launch, memory
from lit_llama.measure.compare import markdown
from lit_llama.measure.plots import plot_comparison
from lit_llama.train.run import catch_interrupt

ROOT = Path(__file__).parent.parent
CODE = [
    path
    for folder in ("lit_llama", "finetune", "generate", "scripts", "data")
    for path in (ROOT / folder).rglob("*.py")
]


def test_apples_gpu_is_picked_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("lightning.fabric.accelerators.mps.MPSAccelerator.is_available", lambda: True)
    assert launch.default_device() == torch.device("mps")
    fabric = Fabric(devices=1, precision="32-true")  # as launch makes it
    assert fabric.device.type == "mps"
    assert launch.base_dtype("auto", fabric.device) == torch.float32
    assert launch.base_dtype("bf16-true", fabric.device) == torch.bfloat16


@pytest.mark.parametrize("instructions, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_a_cpu_multiplies_it(monkeypatch, cpus_own_auto, instructions, dtype):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: instructions, raising=False)
    assert launch.base_dtype("auto", torch.device("cpu")) == dtype


def test_bfloat16_on_a_cpu_without_its_instructions_is_noted(monkeypatch, capsys):
    cpu = torch.device("cpu")
    for capability, noted in (("AVX2", True), ("AVX512", False), ("DEFAULT", False)):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda capability=capability: capability)
        assert launch.base_dtype("bf16-true", cpu) == torch.bfloat16 and launch.base_dtype("32-true", cpu)
        assert ("note: this CPU has no bfloat16 instructions" in capsys.readouterr().err) == noted


def test_without_the_resource_module_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails
    assert memory.peak_memory(torch.device("cpu")) is None


def test_macos_counts_memory_in_bytes(monkeypatch):
    here = memory.peak_memory(torch.device("cpu"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert 1000 < here / memory.peak_memory(torch.device("cpu")) < 1050  # Linux counts in units of 1,024


def test_a_comparison_does_without_the_memory(tmp_path):
    pytest.importorskip("matplotlib")
    row = dict(
        method="lora", trained_parameters=3, trained_share=0.1, gflop_per_token=1.0, seconds=60, peak_memory=None
    )
    row |= dict(kept_bytes=12, right=0.5, right_interval=(0.4, 0.6), loss=1.0, loss_interval=(0.9, 1.1))
    row |= dict(n_test=10, answers={})
    assert "| 1.0 | 0.00 |" in markdown({"lora": row}) and "peak" not in markdown({"lora": row})
    plot_comparison(tmp_path, {"lora": row})
    assert [path.name for path in tmp_path.iterdir()] == ["quality_by_trained_parameters.png"]


def test_a_code_page_does_not_stop_an_answer(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    with pytest.raises(UnicodeEncodeError):
        print("三", flush=True)
    cli.write_utf8()
    print("三 \udce9", flush=True)
    assert raw.getvalue().decode("utf-8").rstrip("\r\n") == "三 \\udce9"


def test_a_trained_folder_names_its_base_for_every_system(monkeypatch):
    class WindowsPath(PureWindowsPath):
        def absolute(self):
            return type(self)("C:\\work") / self

    monkeypatch.setattr(trained, "Path", WindowsPath)
    monkeypatch.setattr(trained, "load_config", lambda folder: type("config", (), {"name": "tiny"}))
    monkeypatch.setattr(trained, "fingerprint", lambda folder: "0")
    assert trained.describe_base("checkpoints\\my\\base")["checkpoint_dir"] == "checkpoints/my/base"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_no_file_is_replaced_while_it_is_mapped(tmp_path, monkeypatch):
    """Windows refuses that. Base and state are read through maps; a resumed run writes its state again."""

    replaced, replace = [], os.replace

    def checked(source, target):
        assert str(target) not in Path("/proc/self/maps").read_text(), f"{target} is mapped"
        replaced.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    write_rows(tmp_path / "data/train.json", sums(20))
    write_rows(tmp_path / "data/validation.json", sums(25)[20:])
    flags = ["--checkpoint_dir", make_base(tmp_path / "base"), "--data", tmp_path / "data", "--precision", "32-true"]
    flags += ["--eval_samples", 0, "--train.max_steps", 4, "--train.save_every", 2, "--out_dir", tmp_path / "out"]
    for method in ("full", "lora"):
        with monkeypatch.context() as patch:
            patch.setattr("lit_llama.train.run.Interrupt.seen", lambda self, fabric: True)  # Ctrl-C in the first step
            assert run(f"finetune/{method}.py", *flags, "--overwrite").returncode == 130
        written = len(replaced)
        succeed(f"finetune/{method}.py", *flags, "--resume")
        assert replaced[written:].count("state.safetensors") == 2


def test_files_are_opened_as_utf8():
    """Elsewhere the default is the system's code page."""
    for path in CODE:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            opens = any(call in line for call in (".read_text(", ".write_text(", " open(")) and "def " not in line
            binary = any(mode in line for mode in ('"rb', '"wb', "archive.open"))
            assert not opens or binary or "encoding=" in line, f"{path.name}:{number}: {line}"


def test_nothing_is_imported_that_only_posix_has():
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        for module in ("fcntl", "pwd", "grp", "termios", "resource"):
            unguarded = f"\nimport {module}\n" in text  # at the top; within a function it is guarded
            assert not unguarded, (path.name, module)
        assert "os.fork" not in text and "signal.SIGALRM" not in text and "signal.pause" not in text, path.name


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX")
def test_a_closed_terminal_is_a_reason_to_save(monkeypatch):
    def gone(text: str) -> None:
        raise OSError(errno.EIO, "the terminal is gone")

    given = signal.signal(signal.SIGHUP, signal.default_int_handler)  # nohup, if the tests run under it, ignores it
    before = signal.getsignal(signal.SIGHUP)
    with open(os.devnull, "w") as terminal, catch_interrupt() as interrupt:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr("lit_llama.devices.launch.log_rank0", gone)
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.came
    assert signal.getsignal(signal.SIGHUP) is before
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with catch_interrupt():  # under nohup
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGHUP) is before
    signal.signal(signal.SIGHUP, given)
