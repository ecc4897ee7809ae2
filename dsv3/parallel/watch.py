"""A watch over the ranks of a run: one that dies, or stays behind for too long, ends all others with a message, not a hang.

Every rank keeps one TCP connection to rank 0 and says on it what it is about to do ("step 12"). A process that dies closes
its connection, whatever way it dies, and the kernel's keep-alive finds a dead host within half a minute; no heartbeat of
ours is needed, which a compilation that holds Python's lock would delay. Rank 0 tells the others; each prints who is
missing and where everybody was, and ends with ``LOST``, for its collective would wait for ever.
"""
from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

LOST = 75  # exit code: EX_TEMPFAIL of sysexits.h, start again
KEEPALIVE = (10, 5, 3)  # seconds of silence before a probe, between probes, probes that may fail
GRACE = 1.0  # seconds between the message and the end, in which the others get it too


@dataclass(frozen=True)
class Watch:
    """at(doing): this rank now begins to do that; close(): it has done all, and its going is no loss."""

    at: Callable[[str], None]
    close: Callable[[], None]


def die(message: str) -> None:
    """Say it on standard error and end the process at once: the main thread may be inside of a collective for ever."""
    print(message, file=sys.stderr, flush=True)
    time.sleep(GRACE)
    os._exit(LOST)


def listen() -> socket.socket:
    """A listening socket on a free port, for ``serve``."""
    server = socket.create_server(("", 0), backlog=1024)
    server.setblocking(False)
    return server


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out within half a minute that the other end's host has died."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def join(rank: int, address: tuple[str, int], lost: Callable[[str], None] = die) -> Watch:
    """Watch as a rank other than 0. address: rank 0's. Raises OSError when it cannot be reached."""
    connection = socket.create_connection(address, timeout=60)
    connection.settimeout(None)
    keep_alive(connection)
    closing = threading.Event()
    connection.sendall(json.dumps({"rank": rank}).encode() + b"\n")

    def follow() -> None:
        text = b""
        while not text.endswith(b"\n"):
            try:
                more = connection.recv(65536)
            except OSError:
                more = b""
            if not more:
                break
            text += more
        if not closing.is_set():
            told = json.loads(text)["lost"] if text.endswith(b"\n") else "rank 0 has ended, or cannot be reached any more"
            if told:
                lost(f"rank {rank}: {told}; ending this rank with code {LOST}, the same command starts from the last checkpoint")

    threading.Thread(target=follow, daemon=True).start()

    def at(doing: str) -> None:
        try:
            connection.sendall(json.dumps({"at": doing}).encode() + b"\n")
        except OSError:  # the thread above finds out why
            return

    def close() -> None:
        closing.set()
        at("")
        connection.close()

    return Watch(at, close)


def serve(server: socket.socket, size: int, stalled: float, lost: Callable[[str], None] = die) -> Watch:
    """Watch as rank 0 over ``size`` ranks. stalled: seconds after which a run in which no rank begins anything new is ended."""
    doing = dict.fromkeys(range(size), "starting")
    changed, closing = [time.monotonic()], threading.Event()

    def follow() -> None:
        ranks: dict[socket.socket, int] = {}
        pending: dict[socket.socket, bytes] = {}
        chosen = selectors.DefaultSelector()
        chosen.register(server, selectors.EVENT_READ)
        while not closing.is_set():
            missing = None
            for key, _ in chosen.select(timeout=0.5):
                if key.fileobj is server:
                    connection, _ = server.accept()
                    keep_alive(connection)
                    chosen.register(connection, selectors.EVENT_READ)
                    pending[connection] = b""
                    continue
                connection = key.fileobj
                try:
                    more = connection.recv(65536)
                except OSError:
                    more = b""
                *lines, pending[connection] = (pending[connection] + more).split(b"\n")
                for line in lines:
                    said = json.loads(line)
                    if "rank" in said:
                        ranks[connection] = said["rank"]
                    else:
                        doing[ranks[connection]] = said["at"]
                    changed[0] = time.monotonic()
                if not more:
                    chosen.unregister(connection)
                    rank = ranks.pop(connection, None)
                    connection.close()
                    if rank is not None and doing[rank]:
                        missing = f"rank {rank} has ended, or cannot be reached any more ({where(doing)})"
            quiet = time.monotonic() - changed[0]
            if missing is None and quiet > stalled and any(doing.values()):
                missing = f"nothing has happened for {quiet:.0f} s ({where(doing)})"
            if missing and not closing.is_set():
                tell(ranks, missing)
                lost(f"rank 0: {missing}; ending with code {LOST}, the same command starts from the last checkpoint")
                return
        tell(ranks, "")
        for connection in ranks:
            connection.close()
        server.close()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()

    def at(what: str) -> None:
        doing[0] = what
        changed[0] = time.monotonic()

    def close() -> None:
        at("")
        closing.set()
        thread.join()

    return Watch(at, close)


def tell(ranks: dict[socket.socket, int], message: str) -> None:
    """Send a last line to all."""
    for connection in ranks:
        try:
            connection.sendall(json.dumps({"lost": message}).encode() + b"\n")
        except OSError:  # that one is gone too
            continue


def where(doing: dict[int, str]) -> str:
    """Who was at what: the ranks by what they last said, in few words."""
    at: dict[str, list[int]] = {}
    for rank, what in doing.items():
        at.setdefault(what or "done", []).append(rank)
    return "; ".join(f"{'ranks' if len(ranks) > 1 else 'rank'} {_numbers(ranks)}: {what}"
                     for what, ranks in sorted(at.items(), key=lambda item: len(item[1])))


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) < 9 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]} ({len(ranks)})"
