"""Watchdog of the ranks: heartbeats over a connection from every rank to rank 0, and the news which rank has failed.

Rank 0 listens, every other rank connects to it. A rank that fails sends the reason; the connection of a killed one
ends. Both ends send heartbeats from a separate thread, whatever the main thread does: a suspended process or a lost
node sends none. A heartbeat holds the number of collectives that its main thread has entered, which distinguishes a
rank in an endless loop from those that wait for it. Rank 0 forwards which rank failed first, and why. A collective
itself would only report that some peer is gone: gloo at once, NCCL after its timeout.

The port accepts connections until all ranks have joined, then it is closed. A connection belongs to a rank once it has
answered a challenge with the run's token, which is never sent itself. Other connections are closed within seconds, are
limited in number, and receive nothing. Messages are authenticated with the token; they are not encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from disttempnet.sanitize import redacted
from disttempnet.terminal import say

GRACE_SECONDS = 5.0  # for the main thread to end by itself after a failure; NCCL would hold it until its timeout
CONNECT_SECONDS = 30.0
HELLO_SECONDS = 5.0  # for a connection to prove its rank
CROWDED_SECONDS = 1.0  # the same, while as many as are accepted at a time are waiting
STRANGERS = 128  # connections at a time that have not proved their rank
LONGEST_REASON = 400
LONGEST_HELLO, LONGEST_LINE = 1024, 8192  # bytes
BEATS = 8  # heartbeats in the time of silence: with one on its way and one just missed, six are surely missed
STALL_SHARE = 0.9  # of the timeout: then the rank that others wait for is named, before the collective fails
KEEP_ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # a node without power: noticed in a minute
EVERYWHERE = ("0.0.0.0", "::")
FAILED_EXIT = 2  # exit code


class Watch:
    """One rank's end of the watchdog. Rank 0 is created first; the others need its port and token.

    Args:
        rank, world_size: this rank among all.
        address: of rank 0, by which the others reach it. Rank 0 listens at this address alone, or at all own addresses
            that the name resolves to.
        port, token: of rank 0; not needed there.
        addresses: at which rank 0 listens; tried if `address` does not lead there.
        silence: seconds without a heartbeat after which a rank counts as lost, at the latest.
        timeout: seconds that a collective waits; a rank that the others wait for is named earlier.
        progress: returns how many collectives the main thread has entered; the same sequence on every rank.

    Raises:
        OSError: rank 0 cannot be reached, or the process that answers there does not know the token.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        address: str = "",
        port: int = 0,
        token: str = "",
        *,
        addresses: Sequence[str] = (),
        silence: float = 120.0,
        timeout: float = 600.0,
        progress: Callable[[], int] = int,
    ) -> None:
        self.rank, self.token, self._silence, self._timeout = rank, token or secrets.token_hex(32), silence, timeout
        self._others, self._progress = world_size - 1, progress
        self._own = _Peer(rank, platform.node())
        self._news = ""
        self._known, self._leaving = threading.Event(), threading.Event()
        self._sending = threading.Lock()
        self._listeners = _listen(world_size, address) if rank == 0 else []
        self._peers: dict[socket.socket, _Peer] = {}
        self._met: set[int] = set()  # ranks that have joined; they may have left
        if rank != 0:
            self._connect([address, *addresses], port)
        self._wake, self._woken = socket.socketpair()
        bound = [listener.getsockname() for listener in self._listeners]
        self.port: int = bound[0][1] if bound else port
        self.addresses = tuple(host for host, *_ in bound if host not in EVERYWHERE)
        os.register_at_fork(after_in_child=self._forget)  # a loader worker's copy would outlive the rank
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def news(self, seconds: float) -> str:
        """Return which rank has failed, and why; empty if none does within the time."""
        self._known.wait(seconds)
        return self._news

    def leave(self, failure: str = "") -> None:
        """Leave: in order, or with the reason of this rank's failure."""
        self._leaving.set()
        message: dict[str, Any] = {"done": True}
        if failure:
            message = {"failed": _named(self._own, f"failed: {redacted(failure)}"[:LONGEST_REASON])}
        for connection, peer in self._ranks():
            self._send(connection, peer, message)
        with contextlib.suppress(OSError):
            self._wake.send(b"\n")
        self._thread.join(GRACE_SECONDS)
        self._forget()

    # ---- the thread ----

    def _run(self) -> None:
        """Send heartbeats and read messages until this rank leaves or a rank fails."""
        with selectors.DefaultSelector() as selector:
            for known in (self._woken, *self._peers):
                selector.register(known, selectors.EVENT_READ)
            beat = time.monotonic()
            while not (self._leaving.is_set() or self._news):
                if time.monotonic() >= beat:
                    self._beat()
                    beat = max(beat + self._silence / BEATS, time.monotonic())
                strangers = self._admit(selector)
                wait = max(0.0, beat - time.monotonic())
                for key, _ in selector.select(min(wait, 0.2) if strangers else wait):
                    one = key.fileobj
                    assert isinstance(one, socket.socket)
                    if one in self._listeners:
                        self._accept(one, selector)
                    elif one in self._peers and not self._hear(one):
                        self._drop(one, selector)
        if self._news:
            self._spread()

    def _admit(self, selector: selectors.BaseSelector) -> int:
        """Close connections that have not proved their rank in time; listen only while ranks are missing.

        Returns the number of unproven connections that are left.
        """
        if not self._listeners:
            return 0
        waiting = [(connection, peer) for connection, peer in self._peers.items() if peer.rank < 0]
        complete = len(self._met) == self._others
        limit = CROWDED_SECONDS if len(waiting) >= STRANGERS else HELLO_SECONDS
        for connection, peer in waiting:
            if complete or time.monotonic() - peer.since > limit:
                self._drop(connection, selector)
        left = len(self._peers) - len(self._ranks())
        for listener in self._listeners:
            listening = listener in selector.get_map()
            if listening != (not complete and left < STRANGERS):
                if listening:
                    selector.unregister(listener)
                else:
                    selector.register(listener, selectors.EVENT_READ)
        if complete:
            for listener in self._listeners:
                listener.close()
            self._listeners = []
        return left

    def _accept(self, listener: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # it is gone again, or this process has too many open files: try again later
            time.sleep(0.1)
            return
        peer = _Peer()
        self._keep(connection, peer)
        selector.register(connection, selectors.EVENT_READ)
        _send_line(connection, {"challenge": peer.challenge})

    def _beat(self) -> None:
        """Send a heartbeat to every peer, and count those that each has missed.

        Own heartbeats are the clock: a job that was suspended as a whole has missed none.
        """
        self._own.at = self._progress()
        for connection, peer in self._ranks():
            self._send(connection, peer, {"at": self._own.at})
            peer.missed += 1
            if peer.missed >= BEATS and not (peer.done or self._news):
                what = f"has sent no heartbeat for {self._silence:.0f} seconds: stopped, or its node is gone"
                self._news = _named(peer, what)
        if self.rank == 0 and not self._news:
            self._news = self._waited_for()

    def _waited_for(self) -> str:
        """Return which rank has kept the others waiting in a collective; empty if none has."""
        peers = [self._own, *(peer for _, peer in self._ranks() if not peer.done)]
        front = max(peer.at for peer in peers)
        for peer in peers:
            peer.stood = peer.stood + 1 if peer.at == peer.last_at < front else 0
            peer.last_at = peer.at
        longest = max(peers, key=lambda peer: (peer.stood, -peer.at))
        if longest.stood * self._silence / BEATS < STALL_SHARE * self._timeout:
            return ""
        return _named(
            longest,
            f"has kept the others waiting for {self._timeout / 60:.3g} minutes: it is in an endless loop, or "
            "needs a larger train.timeout_minutes",
        )

    def _hear(self, connection: socket.socket) -> bool:
        """Read the messages of a peer; return False at its end, or if it is not a rank of this run."""
        peer = self._peers[connection]
        try:
            received = connection.recv(4096)
        except OSError:
            received = b""
        *lines, peer.unread = (peer.unread + received).split(b"\n")
        if len(peer.unread) > (LONGEST_LINE if peer.rank >= 0 else LONGEST_HELLO):
            return False
        for line in lines:
            if peer.rank < 0:
                if not self._welcome(connection, peer, line):
                    return False
                continue
            message = peer.opened(line)
            if message is None:
                self._news = self._news or _named(
                    peer, "sent a message that fails authentication: its connection is disturbed"
                )
                return False
            peer.missed = 0
            peer.at = max(peer.at, message["at"]) if isinstance(message.get("at"), int) else peer.at
            peer.done = peer.done or "done" in message
            self._news = self._news or str(message.get("failed", ""))
        if not received and peer.rank >= 0 and not (peer.done or self._news):
            self._news = _named(peer, "ended without a message: killed, or out of memory")
        return bool(received)

    def _spread(self) -> None:
        """Forward the news from rank 0; end the process if its main thread does not."""
        if self.rank == 0:
            for connection, peer in self._ranks():
                self._send(connection, peer, {"failed": self._news})
        self._known.set()
        if not self._leaving.wait(GRACE_SECONDS):
            with contextlib.suppress(Exception):  # nothing may prevent the exit
                sys.stdout.flush()
            with contextlib.suppress(Exception):
                say(f"disttempnet: {self._news}", error=True)
            os._exit(FAILED_EXIT)

    # ---- who is who ----

    def _connect(self, addresses: Sequence[str], port: int) -> None:
        """Connect to rank 0 at the first address that answers.

        Raises:
            OSError: none does; the error at the first address.
        """
        errors: list[OSError] = []
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), CONNECT_SECONDS)
                try:
                    self._keep(connection, self._introduced(connection, address))
                except BaseException:
                    connection.close()
                    raise
                connection.settimeout(None)
                return
            except OSError as error:
                errors.append(error)
        raise errors[0]

    def _introduced(self, connection: socket.socket, address: str) -> _Peer:
        """Prove this rank to rank 0, and verify that the other end is rank 0."""
        with connection.makefile("rb", buffering=0) as lines:  # what comes after its proof is for `_hear`
            challenge = str(_parsed(lines.readline(LONGEST_HELLO)).get("challenge"))
            own = secrets.token_hex(16)
            proof = _code(self.token, "rank", self.rank, self._own.host, challenge, own)
            hello = {"rank": self.rank, "host": self._own.host, "challenge": own, "proof": proof}
            _send_line(connection, hello)
            answer = str(_parsed(lines.readline(LONGEST_HELLO)).get("proof"))
        if not _same(answer, _code(self.token, "rank 0", challenge, own)):
            raise ConnectionError("the process that answers there is not rank 0 of this run")
        return _Peer(0, address, _code(self.token, "messages", challenge, own), mine=f"rank {self.rank}")

    def _welcome(self, connection: socket.socket, peer: _Peer, line: bytes) -> bool:
        """Accept a connection as a rank's if the line proves it."""
        hello = _parsed(line)
        rank, host, challenge = hello.get("rank"), hello.get("host"), hello.get("challenge")
        if not (type(rank) is int and 0 < rank <= self._others and isinstance(host, str)):
            return False
        if not _same(str(hello.get("proof")), _code(self.token, "rank", rank, host, peer.challenge, challenge)):
            return False
        if rank in self._met:
            return False
        self._met.add(rank)
        peer.key = _code(self.token, "messages", peer.challenge, challenge)
        peer.rank, peer.host, peer.missed = rank, host, 0
        _send_line(connection, {"proof": _code(self.token, "rank 0", peer.challenge, challenge)})
        return True

    def _ranks(self) -> list[tuple[socket.socket, _Peer]]:
        """Return the connections of ranks; no others are sent anything."""
        return [(connection, peer) for connection, peer in list(self._peers.items()) if peer.rank >= 0]

    def _send(self, connection: socket.socket, peer: _Peer, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):  # the peer is gone
            connection.sendall(peer.sealed(message) + b"\n")

    def _keep(self, connection: socket.socket, peer: _Peer) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[connection] = peer

    def _drop(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it was closed while this thread waited
            selector.unregister(connection)
        connection.close()
        del self._peers[connection]

    def _forget(self) -> None:
        for one in (*self._listeners, self._wake, self._woken, *self._peers):
            one.close()


class _Peer:
    """State of a connection to another rank.

    Attributes:
        rank: -1 until it is proved.
        missed: own heartbeats since the last message.
        at: collectives that its main thread has entered.
        stood: own heartbeats for which it has been behind others without moving.
    """

    def __init__(self, rank: int = -1, host: str = "an unknown host", key: str = "", mine: str = "rank 0") -> None:
        self.rank, self.host, self.key = rank, host, key
        self.challenge, self.since = secrets.token_hex(16), time.monotonic()
        self.done, self.unread, self.missed = False, b"", 0
        self.at = self.last_at = self.stood = 0
        self._mine, self._sent, self._received = mine, 0, 0

    def sealed(self, message: dict[str, Any]) -> bytes:
        """Return the next line to send: its authentication code, then the message."""
        body, self._sent = json.dumps(message), self._sent + 1
        return f"{_code(self.key, self._mine, self._sent, body)} {body}".encode()

    def opened(self, line: bytes) -> dict[str, Any] | None:
        """Return the message of the next line; None if the peer did not send it."""
        self._received += 1
        code, _, body = line.decode("utf-8", "replace").partition(" ")
        if not _same(code, _code(self.key, f"rank {self.rank}", self._received, body)):
            return None
        return _parsed(body.encode())


def _named(peer: _Peer, what: str) -> str:
    return f"rank {peer.rank} on {peer.host} {what}"


def _code(key: str, *parts: object) -> str:
    """Return the authentication code (HMAC) of some parts."""
    return hmac.digest(key.encode(), json.dumps(parts).encode(), "sha256").hex()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode())


def _listen(world_size: int, address: str = "") -> list[socket.socket]:
    """Listen for a connection from each rank, at all own addresses that the name resolves to, on one port.

    Other ranks may resolve the name to some of them only. Without any own address it listens at all interfaces.
    """
    # A thousand connections are more files than a process may open by default: raise the limit.
    queue = world_size + STRANGERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + queue
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    listeners: list[socket.socket] = []
    for family, (host, _, *scope) in _interfaces(address):
        port = listeners[0].getsockname()[1] if listeners else 0
        with contextlib.suppress(OSError):  # of another machine, such as a router or proxy before this one
            listeners.append(socket.create_server((host, port, *scope), family=family, backlog=queue))
    return listeners or [_listen_everywhere(queue)]


def _listen_everywhere(queue: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # the kernel knows IPv6, but no interface has an IPv6 address
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=queue, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=queue)


def _interfaces(address: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the addresses to listen at, for ranks that are given this name.

    There are none if a machine's own name leads it to itself (127.0.1.1 in many /etc/hosts): others are led elsewhere.
    """
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM) if address else []
    except OSError:
        return
    local = address == "localhost" or _loopback(address)
    for family, _, _, _, interface in found:
        if local or not _loopback(str(interface[0])):
            yield family, interface


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _parsed(line: bytes) -> dict[str, Any]:
    """Return a line's message; empty if it is not one."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _send_line(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")
