"""One run for each folder: a lock that ends with the process that holds it, however that process ends."""

from __future__ import annotations

import atexit
import errno
import os
import socket
import sys
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"
TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # what the systems say of a file that another process has locked
held: dict[Path, IO] = {}  # open until this process ends: closing a file gives its lock back


def lock_folder(folder: Path) -> str | None:
    """Lock ``folder``, made if need be, for the life of this process; or say which process has it.

    The lock is the operating system's, on a small file: a killed run leaves the file, but no lock on it. On
    a file system without locks the folder stays unlocked, with a note.
    """
    path = Path(folder).resolve() / LOCK_FILE
    if path in held:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")
    try:
        lock_file(file)
    except OSError as error:
        if error.errno in TAKEN:
            with file:
                file.seek(0)
                return file.read().strip() or "another process"
        reason = f"its file system has no locks: {error.strerror}"
        print(f"note: nothing keeps a second run from writing into {folder} ({reason})", file=sys.stderr)
    held[path] = file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return None


@atexit.register
def release() -> None:
    """At the interpreter's end, which would warn of files left open."""
    for file in held.values():
        file.close()


def lock_file(file: IO) -> None:
    """OSError at once, one of TAKEN, where another process has it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(2**30)  # Windows lets nobody read what is locked, so not the text
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
