"""How ranks learn that another one has died or stands still: by a connection, and by what is no longer heard on it.

Rank 0 listens, every other rank holds a connection to it. A rank that fails says so; one that is killed says nothing,
but its connection ends. Both ends send a beat now and then, from a thread of their own, whatever the main thread is
at: a process that is stopped, or a node that vanishes, sends none. Rank 0 passes on which rank ended first, and why. A
collective would tell no more than that some peer is gone: gloo at once, NCCL after its timeout; a main thread that
waits for ever, while its process runs, is left to that timeout.

The port is open to the whole network: who does not begin with the run's token is not listened to.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any

GRACE_SECONDS = 5.0  # the main thread has to end by itself after bad news; NCCL would hold it until its timeout
CONNECT_SECONDS = 30.0
LONGEST_REASON = 400
LONGEST_LINE = 8192  # bytes
BEATS = 6  # that a rank may miss
KEEP_ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # a node without power: noticed in a minute
BAD_NEWS = 2  # exit code


class Watch:
    """One rank's end of the watch. Rank 0 is made first; the others are given its port and token.

    Args:
        rank, world_size: this rank among all.
        address, port, token: of rank 0; not needed there.
        silence: seconds without a beat after which a rank counts as lost.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(
        self, rank: int, world_size: int, address: str = "", port: int = 0, token: str = "", *, silence: float = 120.0
    ) -> None:
        self.rank, self.token, self._silence = rank, token or secrets.token_hex(16), silence
        self._news = ""
        self._known, self._leaving = threading.Event(), threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._listener = _listen(world_size) if rank == 0 else None
        self._peers: dict[socket.socket, _Peer] = {}
        if rank != 0:
            connection = socket.create_connection((address, port), CONNECT_SECONDS)
            connection.settimeout(None)
            self._keep(connection, _Peer(0, address))
            _send(connection, {"token": token, "rank": rank, "host": platform.node()})
        self.port = self._listener.getsockname()[1] if self._listener else port
        os.register_at_fork(after_in_child=self._forget)  # a loader worker's copy would outlive the rank
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def news(self, seconds: float) -> str:
        """Which rank has failed, and why; empty if none is heard of within the time."""
        self._known.wait(seconds)
        return self._news

    def leave(self, failure: str = "") -> None:
        """Say goodbye: in good order, or with the reason of this rank's failure."""
        self._leaving.set()
        message: dict[str, Any] = {"done": True}
        if failure:
            message = {"failed": self._named(self.rank, platform.node(), f"failed: {failure}"[:LONGEST_REASON])}
        for connection in list(self._peers):
            _send(connection, message)
        _send(self._wake, {})
        self._thread.join(GRACE_SECONDS)
        self._forget()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for known in filter(None, (self._listener, *self._peers)):
                selector.register(known, selectors.EVENT_READ)
            beat = time.monotonic()
            while not (self._leaving.is_set() or self._news):
                if time.monotonic() >= beat:
                    self._beat()
                    beat = time.monotonic() + self._silence / BEATS
                for key, _ in selector.select(max(0.0, beat - time.monotonic())):
                    one = key.fileobj
                    assert isinstance(one, socket.socket)
                    if one is self._listener:
                        self._accept(one, selector)
                    elif one in self._peers and not self._hear(one):
                        selector.unregister(one)
                        one.close()
                        del self._peers[one]
        if self._news:
            self._spread()

    def _accept(self, listener: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # it is gone again, or this process may open no more files: whoever waits is asked later
            time.sleep(0.1)
            return
        self._keep(connection, _Peer())
        selector.register(connection, selectors.EVENT_READ)

    def _beat(self) -> None:
        """Send a beat to every peer, and count those that it did not send meanwhile. Own beats are the clock: a job
        that was suspended as a whole, and goes on, has missed none."""
        for connection, peer in list(self._peers.items()):
            _send(connection, {})
            if peer.missed > BEATS and peer.rank >= 0 and not (peer.done or self._news):
                what = f"has not been heard for {self._silence:.0f} seconds: stopped, or its node is gone"
                self._news = self._named(peer.rank, peer.host, what)
            peer.missed += 1

    def _hear(self, connection: socket.socket) -> bool:
        """Read what a peer says; False at its end, and where it is none of ours."""
        peer = self._peers[connection]
        try:
            received = connection.recv(4096)
        except OSError:
            received = b""
        *lines, peer.unread = (peer.unread + received).split(b"\n")
        if len(peer.unread) > LONGEST_LINE:
            return False
        peer.missed = 0
        for line in lines:
            message = _parsed(line)
            if peer.rank < 0 and message.get("token") != self.token:
                return False
            peer.rank, peer.host = message.get("rank", peer.rank), message.get("host", peer.host)
            peer.done = peer.done or "done" in message
            self._news = self._news or message.get("failed", "")
        if not received and peer.rank >= 0 and not (peer.done or self._news):
            self._news = self._named(peer.rank, peer.host, "ended without a word: killed, or out of memory")
        return bool(received)

    def _spread(self) -> None:
        """Rank 0 passes the news on; a main thread that does not end on it is ended."""
        if self.rank == 0:
            for connection in list(self._peers):
                _send(connection, {"failed": self._news})
        self._known.set()
        if not self._leaving.wait(GRACE_SECONDS):
            with contextlib.suppress(Exception):  # nothing may keep us from ending
                sys.stdout.flush()
            print(f"disttempnet: {self._news}", file=sys.stderr, flush=True)
            os._exit(BAD_NEWS)

    def _named(self, rank: int, host: str, what: str) -> str:
        return f"rank {rank} on {host} {what}"

    def _keep(self, connection: socket.socket, peer: _Peer) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[connection] = peer

    def _forget(self) -> None:
        for one in filter(None, (self._listener, self._wake, self._woken, *self._peers)):
            one.close()


class _Peer:
    """Whom a connection leads to, what was received of a line, and own beats since anything was."""

    def __init__(self, rank: int = -1, host: str = "an unknown host") -> None:
        self.rank, self.host, self.done, self.unread, self.missed = rank, host, False, b"", 0


def _listen(world_size: int) -> socket.socket:
    """For one connection a rank, which on a thousand ranks are more files than a process may open by custom."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + world_size
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # the kernel knows IPv6, but no interface has an address of it
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=world_size, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=world_size)


def _parsed(line: bytes) -> dict[str, Any]:
    """A line's message; empty where it is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is gone: nobody to tell
        connection.sendall(json.dumps(message).encode() + b"\n")
