"""Disks that are full or locked: a clear error, and the last good state as it was."""

import errno
import os
import sys
from contextlib import contextmanager

import pytest
import torch
from filelock import FileLock, Timeout
from helpers import bytes_of, files, finetune, make_base, refuse

from finetune import adapter
from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write, read_tensors, remove_unfinished, save_tensors
from lit_llama.formats.export import export_hf
from lit_llama.formats.gguf import export_gguf
from lit_llama.measure.plots import plot_runs
from lit_llama.train.run import LOCK_FILE, STATE_FILE


@contextmanager
def small_files():
    """No file may grow beyond 900 bytes: writes stop half-way, as on a full disk."""
    import resource  # POSIX alone has it

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["os.fsync", "os.replace", "lit_llama.common.files.save_file"])
def test_a_run_on_a_full_disk_keeps_its_last_state_and_resumes(folder, tmp_path, monkeypatch, function):
    check_finite, message = adapter.check_finite, "cannot be written .No space left on device.: free some space and try"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):

        def fail_from_the_fourth_step_on(loss, norm, step, batch):
            if step == 3:
                patch.setattr(function, no_space)
            return check_finite(loss, norm, step, batch)

        patch.setattr(adapter, "check_finite", fail_from_the_fourth_step_on)
        finetune(folder, tmp_path / "out")
    assert read_tensors(tmp_path / "out" / STATE_FILE)[1]["step"] == 2
    assert not list((tmp_path / "out").rglob(".*tmp*"))
    finetune(folder, tmp_path / "whole")
    finetune(folder, tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


ROW = dict.fromkeys(("step", "loss", "lr", "tokens", "seconds", "val_loss"), "1")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.png", lambda path: plot_runs(path, {"run": [ROW]})),
        ("new.gguf", lambda path: export_gguf(path.parent / "base", path)),
        ("new", lambda path: export_hf(path.parent / "base", path)),
    ],
)
def test_every_output_is_written_whole_or_not_at_all(tmp_path, name, write):
    make_base(tmp_path / "base")
    if not name.startswith("new"):
        (tmp_path / name).write_bytes(b"the old one")
    before = files(tmp_path)
    with small_files(), pytest.raises(UserError, match=f"{name}.* cannot be written .*: free some space and try again"):
        write(tmp_path / name)
    assert files(tmp_path) == before


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


def test_a_run_locks_its_folder_until_it_ends(folder, tmp_path, monkeypatch):
    with FileLock(tmp_path / LOCK_FILE):
        with pytest.raises(UserError, match="another process writes to .*; wait until it ends, stop it, or"):
            finetune(folder, tmp_path)
    refused = []

    def try_to_lock(*_) -> None:
        with pytest.raises(Timeout):
            FileLock(tmp_path / LOCK_FILE).acquire(blocking=False)
        refused.append(True)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "unwrap_blocks", try_to_lock)
        finetune(folder, tmp_path)
    assert refused
    finetune(folder, tmp_path, overwrite=True)  # from Python, in one process


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
def test_a_changed_byte_is_noticed(tmp_path, place):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(5.0), "b": torch.zeros((), dtype=torch.int64)}, {"step": 3})
    tensors, about = read_tensors(path)
    assert about["step"] == 3 and torch.equal(tensors["a"], torch.arange(5.0)) and set(tensors) == {"a", "b"}
    content = bytearray(path.read_bytes())
    header, checksum, entry = (content.index(part) for part in (b'"a"', b"crc32", b"lit_llama"))
    content[{"header": header + 1, "checksum": checksum + 10, "entry": entry, "number": -1}[place]] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):  # or no longer looks like ours, and may be that
        read_tensors(path)
