"""Disks that are full or locked: a clear error, and the last good state as it was."""

import errno
import multiprocessing
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_base, refuse, script_parser
from lightning.fabric import Fabric
from test_train import bytes_of, places, train  # noqa: F401  (places is a fixture)

from finetune import adapter
from lit_llama.cli import UserError
from lit_llama.common.files import (
    atomic_write,
    check_new,
    check_writable,
    open_tensors,
    read_json,
    read_tensors,
    remove_unfinished,
    save_tensors,
    whole_folder,
)
from lit_llama.formats.export import export_hf
from lit_llama.formats.export_gguf import export_gguf
from lit_llama.measure.plots import plot_runs
from lit_llama.train.run import LOCK_FILE, STATE_FILE, Run

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_after_step(monkeypatch, step: int, begin_to_fail) -> None:
    """Call ``begin_to_fail`` once a run has taken ``step`` steps."""
    taken, clip_gradient = [], adapter.clip_gradient

    def count(*args):
        taken.append(1)
        if len(taken) == step + 1:
            begin_to_fail()
        return clip_gradient(*args)

    monkeypatch.setattr(adapter, "clip_gradient", count)


def check_that_it_goes_on(places, tmp_path, monkeypatch, message) -> None:  # noqa: F811
    """``tmp_path / "out"`` is a run that fails with ``message`` after step 3; its state is that of step 2."""
    with pytest.raises(UserError, match=message):
        train(places, tmp_path / "out")
    monkeypatch.undo()
    assert read_tensors(tmp_path / "out" / STATE_FILE)[1]["step"] == 2
    assert not list((tmp_path / "out").rglob(".*tmp*"))
    train(places, tmp_path / "whole")
    train(places, tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@contextmanager
def small_files():
    """Yield a function after whose call no file may grow beyond 900 bytes: writes stop half-way, as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@posix
def test_a_file_that_may_not_grow(places, tmp_path, monkeypatch):  # noqa: F811
    with small_files() as begin, monkeypatch.context() as patch:
        fail_after_step(patch, 3, begin)
        with pytest.raises(UserError, match="state.safetensors cannot be written .File too large.: free some space"):
            train(places, tmp_path / "out")
    assert read_tensors(tmp_path / "out" / STATE_FILE)[1]["step"] == 2
    train(places, tmp_path / "out", resume=True)


def plot(path: Path) -> None:
    row = dict.fromkeys(("step", "loss", "lr", "tokens", "seconds", "val_loss"), "1")
    plot_runs(path, {"run": [row]})


def bookings(path: Path) -> None:
    script_parser(ROOT / "data/make_bookings.py")  # imports it
    sys.modules["script_data_make_bookings"].save_rows(path, [{"text": "x" * 10_000}])


@posix
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.png", plot),
        ("a.svg", plot),
        ("a.json", bookings),
        ("new.gguf", lambda path: export_gguf(path.parent / "base", path)),
        ("new", lambda path: export_hf(path.parent / "base", path)),
    ],
)
def test_every_output_is_written_whole_or_not_at_all(tmp_path, name, write):
    make_base(tmp_path / "base")
    if not name.startswith("new"):
        (tmp_path / name).write_bytes(b"the old one")
    before = files(tmp_path)
    with small_files() as begin:
        begin()
        with pytest.raises(
            UserError, match=f"{name}.* cannot be written .*: free some space and try again; existing files"
        ):
            write(tmp_path / name)
    assert files(tmp_path) == before


# The log of another process, and the one file that grows by a line a step.
NOT_ATOMIC = ['open(log_file, "w+"', 'open(path, "a", newline="", encoding="utf-8")']


def test_there_is_one_way_to_write():
    writes = re.compile(r'\.write_(text|bytes)\(|savefig\(|copyfile\(|save_file\(|[^.]open\([^)]*"[wax]|r\.save\(')
    for folder in ("lit_llama", "finetune", "generate", "scripts", "data"):
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text(encoding="utf-8").splitlines():
                allowed = any(text in line for text in ("temporary", *NOT_ATOMIC))
                assert allowed or not writes.search(line), f"{path.name}: {line}"


def test_an_output_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new/folders/a.json")
    check_writable(tmp_path / "file")
    before = sorted(tmp_path.rglob("*"))
    for place, reason in ((tmp_path, "Is a directory"), (tmp_path / "file/a.json", "Not a directory")):
        with pytest.raises(UserError, match=f"cannot be written .{reason}.: choose a folder that you can write to"):
            check_writable(place)
    with pytest.raises(UserError, match="exists already"):
        check_new(tmp_path / "file")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        ["scripts/evaluate.py", "--data", "data/bookings", "--results"],
        ["scripts/benchmark.py", "--results"],
        ["scripts/compare_methods.py", "--out_dir"],
        ["data/prepare_alpaca.py", "--out_dir"],
        ["data/prepare_reviews.py", "--out_dir"],
        ["scripts/download.py", "--out_dir"],
        ["scripts/export.py", "--to", "gguf", "--checkpoint_dir", "base", "--out_file"],
    ],
    ids=lambda command: command[0],
)
def test_scripts_check_their_output_before_they_fetch_or_load(tmp_path, monkeypatch, command):
    for fetch in ("urllib.request.urlopen", "subprocess.run", "lit_llama.checkpoint.load_model"):
        monkeypatch.setattr(fetch, None)
    (tmp_path / "file").touch()
    refuse(*command, tmp_path / "file/out", message="out.* cannot be written .Not a directory.: choose a folder")


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["os.fsync", "os.replace", "lit_llama.common.files.save_file"])
def test_a_full_disk(places, tmp_path, monkeypatch, function):  # noqa: F811
    fail_after_step(monkeypatch, 3, lambda: monkeypatch.setattr(function, no_space))
    message = "cannot be written .No space left on device.: free some space and try again; existing files are unchanged"
    check_that_it_goes_on(places, tmp_path, monkeypatch, message)


def test_a_full_disk_under_the_metrics(places, tmp_path, monkeypatch):  # noqa: F811
    fail_after_step(monkeypatch, 3, lambda: monkeypatch.setattr("csv.DictWriter.writerow", no_space))
    check_that_it_goes_on(places, tmp_path, monkeypatch, "metrics.csv cannot be written .No space left on device")


def without_permission(folder: Path, fabric: Fabric, pipe) -> None:
    """In a child, which is root no longer: what comes of each kind of write into ``folder``."""
    said, settings = [], read_json(folder / "method.json")
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    for write in (
        lambda: Run(fabric, folder, settings, resume=True).start(0),
        lambda: Run(fabric, folder / "new", settings).start(0),
        lambda: save_tensors(folder / "trained.safetensors", {"a": torch.zeros(1)}),
        lambda: whole_folder(folder / "new").__enter__(),
    ):
        try:
            write()
            said.append("written")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    pipe.send((os.getuid(), said))


@posix
def test_a_folder_without_write_permission(places, tmp_path):  # noqa: F811
    train(places, tmp_path / "out")
    before = files(tmp_path / "out")
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest-of-" in str(folder):  # pytest's own, closed to others
            folder.chmod(0o755)
    (tmp_path / "out").chmod(0o555)
    here, there = multiprocessing.Pipe()
    arguments = (tmp_path / "out", Fabric(accelerator="cpu", devices=1), there)  # made while all may be imported
    child = multiprocessing.get_context("fork").Process(target=without_permission, args=arguments)
    child.start()
    child.join()
    (tmp_path / "out").chmod(0o755)
    assert here.poll()
    uid, said = here.recv()
    assert uid != 0
    for message in said:
        assert message.startswith("UserError: ")
        assert "(Permission denied): choose a folder that you can write to" in message
    assert files(tmp_path / "out") == before


HOLD = """
import sys
from filelock import FileLock

lock = FileLock(sys.argv[1])
lock.acquire(blocking=False)
print(flush=True)
input()
"""


def test_two_runs_into_one_folder(places, tmp_path):  # noqa: F811
    command = [sys.executable, "-c", HOLD, tmp_path / LOCK_FILE]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip() == b""
    with pytest.raises(UserError, match="another process writes to .*; wait until it ends, stop it, or"):
        train(places, tmp_path)
    holder.kill()
    holder.wait()
    refused = []

    def try_to_lock(*_) -> None:
        refused.append(subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "unwrap_blocks", try_to_lock)
        train(places, tmp_path)  # a dead run keeps no lock
    assert b"Timeout" in refused[0].stderr
    train(places, tmp_path, overwrite=True)  # from Python, in one process


def test_a_rename_is_flushed_with_its_folder(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.path.isdir(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert events == [False, "rename", True] or sys.platform != "linux"


def test_only_what_a_killed_run_left_is_removed(tmp_path):
    ours = [".method.json.123.tmp", ".tmpAb12xY"]
    others = [".tmp_notes", ".vim.tmp", "method.json", ".tmp"]
    for name in ours + others:
        (tmp_path / name).touch()
    (tmp_path / ".run.123.tmp").mkdir()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ".run.123.tmp"])


@pytest.mark.parametrize("place", ["header", "number", "checksum", "entry"])
def test_a_spoiled_byte_is_noticed(tmp_path, place):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(5.0), "b": torch.zeros((), dtype=torch.int64)}, {"step": 3})
    tensors, about = read_tensors(path)
    assert about["step"] == 3 and torch.equal(tensors["a"], torch.arange(5.0)) and set(tensors) == {"a", "b"}
    content = bytearray(path.read_bytes())
    found = {"header": content.index(b'"a"') + 1, "checksum": content.index(b"crc32") + 10}
    content[{**found, "number": -1, "entry": content.index(b"lit_llama")}[place]] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):  # or no longer looks like ours, and may be that
        read_tensors(path)
    with open_tensors(path):  # it is a safetensors file all the same
        pass
