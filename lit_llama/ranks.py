"""What the processes of one job tell each other beside tensors: what rank 0 has done, and who failed.

Every rank holds a connection to rank 0, its line. The operating system closes it when the process ends, however it
ends, so a death is heard at once, while a collective would wait for half an hour. Only the first failure is printed,
once, and every other rank ends on hearing of it: what waits in a collective cannot be woken.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lit_llama.cli import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

GO_ON = "The same command with --resume goes on from the last saved step, on any number of devices"
# When a rank dies, the others' collectives fail too; so long they wait for the news of what really happened.
GRACE_SECONDS = 3
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine that is gone is noticed after 30 s


class Line:
    """The connections of one rank: rank 0 has one to every other, the others one to rank 0 (``peers``).

    A message is one line of JSON: ``{"done": what}``, ``{"failed": text, "code": exit code}``, or ``{"left": true}``
    before a process ends as it should.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket]) -> None:
        self.rank, self.peers = rank, peers
        self.done: set[str] = set()  # what rank 0 has done for all
        self.news = threading.Condition()  # that done has grown
        self.ending = threading.Lock()
        self.listeners = [threading.Thread(target=self.listen, args=(peer,), daemon=True) for peer in peers]
        for listener in self.listeners:
            listener.start()

    def listen(self, peer: int) -> None:
        """Hear what ``peer`` says until it leaves; end this process when it fails or falls silent."""
        with self.peers[peer].makefile("r", encoding="utf-8") as lines:
            try:
                for message in map(json.loads, lines):
                    if "left" in message:
                        return
                    if "failed" in message:
                        self.end(message["failed"] if self.rank == 0 else "", message["code"])
                    with self.news:
                        self.done.add(message["done"])
                        self.news.notify_all()
            except OSError:  # reset, or no answer from its machine
                pass
        gone = f"error: rank {peer} ended without a word; perhaps it was killed for want of memory. {GO_ON}"
        self.end(gone if self.rank in (0, 1) else "", 1)  # rank 1 speaks for those that lost rank 0

    def end(self, text: str, code: int) -> None:
        """Print ``text``, tell the others, and leave at once. The lock is kept: only the first failure counts."""
        self.ending.acquire()
        sys.stdout.flush()
        if text:
            print(text, file=sys.stderr, flush=True)
        if self.rank == 0:
            self.send(failed=text, code=code)
        os._exit(code)

    def fail(self, text: str, code: int) -> None:
        """End the whole job because this rank cannot go on."""
        if self.rank > 0:
            self.send(failed=text, code=code)
            self.listeners[0].join(10)  # in which rank 0 prints it and ends this process, too
        self.end(text, code)

    def send(self, **message) -> None:
        for peer in self.peers.values():
            try:
                peer.sendall((json.dumps(message) + "\n").encode())
            except OSError:  # it has ended
                pass


line: Line | None = None  # of this process, where it is one of several


def connect(fabric: Fabric) -> None:
    """Open the line; every rank calls this once."""
    global line
    if fabric.world_size == 1:
        return
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    server = socket.create_server(("", 0), family=family, dualstack_ipv6=ipv6) if fabric.is_global_zero else None
    where: Any = fabric.broadcast((server.getsockname()[1], secrets.token_hex()) if server else None)
    port, token = where
    peers: dict[int, socket.socket] = {}
    if server:
        server.settimeout(60)
        while len(peers) < fabric.world_size - 1:
            peer, _ = server.accept()
            peer.settimeout(60)
            said, _, rank = peer.makefile("r", encoding="utf-8").readline().strip().partition(" ")
            if secrets.compare_digest(said, token):
                peers[int(rank)] = peer
        server.close()
    else:
        strategy: Any = fabric.strategy
        peers[0] = socket.create_connection((strategy.cluster_environment.main_address, port), timeout=60)
        peers[0].sendall(f"{token} {fabric.global_rank}\n".encode())
    for peer in peers.values():
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    line = Line(fabric.global_rank, peers)
    sys.excepthook = fail_loudly
    atexit.register(line.send, left=True)


def fail_loudly(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As Python's own hook for an exception that nobody caught; the whole job ends. Of several ranks one speaks."""
    time.sleep(GRACE_SECONDS + line.rank / 10)
    sys.__excepthook__(kind, error, trace)
    why = (str(error).strip().splitlines() or [""])[0]
    line.fail(f"error: rank {line.rank} failed with {kind.__name__}: {why}. {GO_ON}", 1)


def is_first() -> bool:
    """Whether this process is the one that speaks to the user."""
    return line is None or line.rank == 0


def say(text: str = "") -> None:
    """Print ``text`` once in all; Fabric's own print does so once on every node."""
    if is_first():
        print(text, flush=True)  # before what goes to stderr next


def note(text: str) -> None:
    """As ``say``, on stderr: what is no result."""
    if is_first():
        print(text, file=sys.stderr)


def leave(text: str, code: int, failed: bool) -> None:
    """End this process with ``code``, and all others where it ``failed``. ``text`` is printed once in all."""
    if line is not None and failed:
        line.fail(text if is_first() else f"{text} (rank {line.rank})", code)
    if is_first():
        print(text, file=sys.stderr)
    else:
        line.listeners[0].join(10)  # whoever started the ranks may kill the first one when another has ended
    sys.exit(code)


def meet(fabric: Fabric, what: str) -> None:
    """Wait until every rank is here; ``what`` names what each has done. After half an hour (gloo's) it is an error."""
    try:
        fabric.barrier()
    except RuntimeError as error:
        time.sleep(GRACE_SECONDS + fabric.global_rank / 10)  # for the news that a rank has died, if that is why
        why = str(error).splitlines()[0]
        raise UserError(f"rank {fabric.global_rank} waited for the others to {what}: {why}. {GO_ON}") from None


def first(what: str, action: Callable[[], None], timeout_minutes: float = 120) -> None:
    """Let rank 0 do ``action`` while the others wait; ``what`` names it, once in a job: "fetch the base"."""
    if line is None:
        action()
    elif line.rank == 0:
        action()
        line.send(done=what)
    else:
        with line.news:
            if not line.news.wait_for(lambda: what in line.done, 60 * timeout_minutes):
                raise UserError(f"rank {line.rank} waited {timeout_minutes:g} minutes for rank 0 to {what}")
