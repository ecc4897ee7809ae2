"""A service on a socket, from the moment it is bound to a clean end on SIGTERM."""
from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from .app import Service, make_app
from .errors import closing

SPARE = 256  # connections beside those that have a place with the engine


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not yet listening, so that a taken port is known before the model is loaded.

    port 0 takes any free one. Raises OSError naming the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"{host}:{port}: {error.strerror or error}; give another --host or --port") from error
    return bound


def address(bound: socket.socket) -> str:
    """The URL of a bound socket; of a wildcard address the loopback one."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def serve(service: Service, bound: socket.socket, ready: Callable[[], None], access_log: bool = False) -> bool:
    """Answer requests until SIGINT or SIGTERM; then take no new ones and let the others finish within the grace time.

    ready() is called once requests are answered. Returns whether the engine's thread has ended too: a step cannot be interrupted.
    Call it from the main thread, for the signals.
    """
    grace = service.limits.grace
    server = uvicorn.Server(uvicorn.Config(
        make_app(service), log_level="info" if access_log else "warning", lifespan="off", access_log=access_log,
        server_header=False, timeout_graceful_shutdown=int(grace) + 5,
        limit_concurrency=service.worker.places + SPARE))  # beyond it uvicorn says 503: so many sockets may be stuck or idle

    async def attend() -> None:
        while not (server.started or server.should_exit):
            await asyncio.sleep(0.01)
        ready()
        while not server.should_exit:  # uvicorn's handlers of the two signals set it
            await asyncio.sleep(0.05)
        service.closing = True
        await asyncio.sleep(grace)
        service.worker.end(closing())

    async def run() -> None:
        attending = asyncio.create_task(attend())
        await server.serve([bound])
        attending.cancel()

    def end(number: int, frame: Any) -> None:
        server.should_exit = True

    # For before uvicorn sets its own, and for after: it ends by sending itself the signal it has had.
    before = {s: signal.signal(s, end) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(run())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return service.worker.close()
