"""One engine over many ranks: rank 0 is asked, tells the others what it is about to do, and all do it in step.

Every rank of a mesh has to be asked the same in the same order (``Engine``). Rank 0 keeps a TCP connection to each other rank
and sends one line of JSON before a step: what was submitted and cancelled since the last one, and the tokens that one gave, by
which a rank that computes something else is found. While there is nothing to do nothing is sent: the others wait for a line,
not inside of a collective, which would run out of time.
"""
from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ..sampling import Sampling
from . import watch
from .launch import World, tell_address

HELLO = struct.Struct("!II")  # a rank, and the number that only ranks of this run know
GREEDY = Sampling()
PATIENCE = 60  # seconds in which the others must come: all have been there when this began


def meet(world: World) -> tuple[socket.socket, ...]:
    """Rank 0's connections to all other ranks, in their order; on these the one to rank 0. All ranks must call it.

    Raises ConnectionError on rank 0 when a rank does not come, OSError on the others when rank 0 cannot be reached.
    """
    key = int(world.gather(secrets.randbelow(1 << 24))[0])  # exact in float32
    server = watch.listen() if world.rank == 0 else None
    address = tell_address(world, server)
    if server is None:
        connection = socket.create_connection(address, timeout=PATIENCE)
        connection.sendall(HELLO.pack(world.rank, key))
        return (_ready(connection),)
    with server:
        return accept(server, world.size, key)


def accept(server: socket.socket, size: int, key: int, patience: float = PATIENCE) -> tuple[socket.socket, ...]:
    """Connections of the ranks 1 to size - 1, in their order; whoever does not know the key is sent away."""
    found: dict[int, socket.socket] = {}
    server.settimeout(patience)
    while len(found) < size - 1:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            missing = [str(rank) for rank in range(1, size) if rank not in found]
            raise ConnectionError(f"rank {', '.join(missing)} did not connect to rank 0 within {patience:g} s; open the nodes' "
                                  f"firewalls to each other") from None
        connection.settimeout(patience)
        try:
            said = connection.recv(HELLO.size, socket.MSG_WAITALL)
        except OSError:  # a stranger who says nothing, or has gone
            said = b""
        rank, given = HELLO.unpack(said) if len(said) == HELLO.size else (0, -1)
        if given == key and 0 < rank < size:
            found[rank] = _ready(connection)
        else:
            connection.close()
    return tuple(found[rank] for rank in range(1, size))


def _ready(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    watch.keep_alive(connection)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a line is short, and the step waits for it
    return connection


# -- signals -----------------------------------------------------------------------------------------------------------
def pass_on_signals(connection: socket.socket) -> None:
    """As a rank other than 0: a signal to end this process is one to end rank 0, which then ends all."""
    def ask(number: int, frame: Any) -> None:
        try:
            connection.send(b".")
        except OSError:  # rank 0 has gone: the watch ends this rank
            return

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)


def heed_signals(connections: Sequence[socket.socket]) -> None:
    """As rank 0: SIGTERM to this process when another rank was told to end."""
    def listen(connection: socket.socket) -> None:
        try:
            while connection.recv(1):
                os.kill(os.getpid(), signal.SIGTERM)
        except OSError:  # the watch notices ranks that go
            return

    for connection in connections:
        threading.Thread(target=listen, args=(connection,), daemon=True).start()


# -- orders ------------------------------------------------------------------------------------------------------------
class Lead:
    """Rank 0's engine, of which a step is one of all ranks. It is used like an ``Engine``; one thread owns it.

    make_engine(**settings) makes each rank's engine, here and in ``follow``. connections: to the other ranks (``meet``). A
    request without a seed gets one here. What the engine refuses is not told to the others. Raises ConnectionError from ``step``
    when a rank cannot be told.
    """

    def __init__(self, make_engine: Callable[..., Any], settings: dict[str, Any], connections: Sequence[socket.socket]) -> None:
        self._connections = connections
        self._tell({"settings": settings})
        self._engine = make_engine(**settings)
        self.cfg, self.max_length = self._engine.cfg, self._engine.max_length
        self._asked: list[list[Any]] = []  # since the last step
        self._tokens: list[int] = []  # of the last step
        self._together = True  # whether no rank is inside of a step

    def submit(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> int:
        """``Engine.submit``."""
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(64))
        prompt = [int(t) for t in prompt]
        number = self._engine.submit(prompt, sampling)
        self._asked.append([number, prompt, dataclasses.asdict(sampling)])
        return number

    def cancel(self, request: int) -> None:
        """``Engine.cancel``; the other ranks do it before their next step."""
        self._engine.cancel(request)
        self._asked.append([request])

    def step(self) -> list[Any]:
        """``Engine.step`` of all ranks."""
        asked, self._asked = self._asked, []
        self._together = False
        self._tell({"asked": asked, "tokens": self._tokens})
        events = self._engine.step()
        self._together, self._tokens = True, [event.token for event in events]
        return events

    @property
    def idle(self) -> bool:
        """``Engine.idle``."""
        return self._engine.idle

    @property
    def stats(self) -> Any:
        """``Engine.stats``."""
        return self._engine.stats

    def close(self) -> bool:
        """Let the other ranks go. False, and they are not told, when a step was broken off: they may be inside of it for ever,
        and it is for the watch to end them."""
        if self._together:
            self._tell({"close": True})
        return self._together

    def _tell(self, order: dict[str, Any]) -> None:
        line = json.dumps(order, separators=(",", ":")).encode() + b"\n"
        for i, connection in enumerate(self._connections):
            try:
                connection.sendall(line)
            except OSError as error:
                raise ConnectionError(f"rank {i + 1} cannot be told what to do: {error.strerror or error}") from error


def follow(make_engine: Callable[..., Any], connection: socket.socket) -> None:
    """Do what ``Lead`` on rank 0 does, until it closes. connection: to rank 0.

    Raises ConnectionError when rank 0 goes without a word, RuntimeError when this rank has found other tokens, or numbers a
    request differently.
    """
    engine, tokens = None, []
    with connection.makefile("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            order = json.loads(line)
            if "settings" in order:
                engine = make_engine(**order["settings"])
                continue
            if "close" in order:
                return
            if order["tokens"] != tokens:
                raise RuntimeError(f"this rank found the tokens {tokens[:8]} where rank 0 found {order['tokens'][:8]}; "
                                   f"the ranks must run the same versions on the same kind of device, with the same weights")
            for number, *request in order["asked"]:
                if not request:
                    engine.cancel(number)
                    continue
                prompt, fields = request
                found = engine.submit(prompt, Sampling(**fields | {"stop_token_ids": tuple(fields["stop_token_ids"])}))
                if found != number:
                    raise RuntimeError(f"this rank has numbered a request {found}, rank 0 {number}")
            tokens = [event.token for event in engine.step()]
    raise ConnectionError("rank 0 has gone")
