"""The web application: routes, the key, limits, and what happens when a client goes away."""
from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..chat import Chat
from ..data.tokenizer import Tokenizer
from ..text import TextStream
from .answer import Choice, Piece, chunks, pieces, whole
from .body import Ask, Limits, parse
from .errors import ApiError, broken, closing, gone
from .metrics import CONTENT_TYPE, Metrics
from .worker import Job, Worker

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {  # only what stands in the page itself, and only to its own server
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
                               "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter: a proxy should not collect events
LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass
class Service:
    """All that a request needs."""

    worker: Worker
    tokenizer: Tokenizer
    chat: Chat
    model: str
    limits: Limits
    api_key: str | None = None
    local: bool = False   # whether it listens on a loopback address
    created: int = field(default_factory=lambda: int(time.time()))
    closing: bool = False
    watches: set[asyncio.Task] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.worker)

    def authorize(self, request: Request) -> None:
        """Raises ApiError 401 unless the request bears the key, compared in constant time.

        A server without key on a loopback address takes requests to loopback names only, else 403: a web page whose own name has
        been pointed at this machine would be of the same origin.
        """
        if self.api_key is None:
            host = request.headers.get("host", "").lower()
            if self.local and (host if host.endswith("]") else host.rpartition(":")[0] or host) not in LOCAL:
                raise ApiError(403, f"Host: expected one of {', '.join(LOCAL)}, found {host!r}; start the server with --api-key "
                                    f"to use it by other names", code="host_not_allowed")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode()):
            raise ApiError(401, "Authorization: expected 'Bearer ' and this server's API key", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})


def make_app(service: Service) -> Callable:
    """The ASGI application of a service whose worker is loaded."""
    app = FastAPI(openapi_url=None)  # no pages of documentation: they load scripts from elsewhere
    worker = service.worker

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, what, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error; the server's log says more", code="internal_error").response()

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_bytes(), headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        if worker.failure is not None:
            raise broken(worker.failure)
        if service.closing:
            raise closing()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.authorize(request)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models(request: Request) -> Any:
        service.authorize(request)
        return {"object": "list", "data": [describe(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Any:
        service.authorize(request)
        if name != service.model:
            raise ApiError(404, f"model: expected {service.model!r}, found {name!r}", "model", "model_not_found")
        return describe(service)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await complete(service, request, service.chat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await complete(service, request, None)

    paths = {route.path for route in app.routes}

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        """Count every answer by its path and status."""
        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in paths else "other"
                service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await app(scope, receive, counting if scope["type"] == "http" else send)

    return counted


def describe(service: Service) -> dict[str, Any]:
    """One entry of ``/v1/models``."""
    return {"id": service.model, "object": "model", "created": service.created, "owned_by": "dsv3",
            "max_model_len": service.worker.max_length}


async def read(request: Request, limit: int, seconds: float) -> bytes:
    """The body. Raises ApiError 413 when it is larger than ``limit``, 408 if it takes too long, 415 if it is not called JSON."""
    # Browsers send JSON to another origin only after asking, so a page from elsewhere cannot use a server on the loopback.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type: expected application/json")
    parts: list[bytes] = []
    size = 0

    async def receive() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > 8 * limit:  # up to there it is read and dropped: a client reads no answer before it has sent all
                return

    try:
        await asyncio.wait_for(receive(), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise gone() from None
    if size > limit:
        raise ApiError(413, f"the body: expected at most {limit} bytes, found more", code="body_too_large",
                       headers={"Connection": "close"})
    return b"".join(parts)


async def complete(service: Service, request: Request, chat: Chat | None) -> Response:
    """Both endpoints: check, queue, answer whole or in pieces; nothing runs on when the client has gone or the time is up."""
    arrived = time.monotonic()
    service.authorize(request)
    worker, limits = service.worker, service.limits
    body = await read(request, limits.body_bytes, limits.seconds)
    # in a thread: a long text takes long to encode, and others wait for their tokens
    ask = await asyncio.to_thread(parse, body, chat, service.tokenizer, service.model, worker.max_length, limits)
    if service.closing:
        raise closing()
    choices = [Choice(TextStream(service.tokenizer, ask.stop)) for _ in ask.samplings]
    job = Job(len(choices))
    watch = asyncio.create_task(end_early(request, job, worker, arrived + limits.seconds))
    watch.add_done_callback(service.watches.discard)
    service.watches.add(watch)  # the loop itself holds tasks only weakly
    try:
        await worker.submit(job, [prompt for prompt in ask.prompts for _ in range(ask.n)], ask.samplings)
    except ApiError:
        watch.cancel()
        raise
    stream = observed(service, ask, job, choices, arrived)
    if ask.stream:
        return StreamingResponse(chunks(ask, stream, choices, service.tokenizer), media_type="text/event-stream",
                                 headers=STREAM_HEADERS)
    return JSONResponse(await whole(ask, stream, choices, service.tokenizer))


async def observed(service: Service, ask: Ask, job: Job, choices: list[Choice], arrived: float) -> AsyncIterator[Piece]:
    """The pieces, measured; whatever ends them, the engine goes on with nothing."""
    metrics, first = service.metrics, True
    try:
        async for piece in pieces(ask, job, service.worker, service.tokenizer, choices):
            if first and piece.tokens:
                metrics.first.observe(time.monotonic() - arrived)
                first = False
            yield piece
        metrics.seconds.observe(time.monotonic() - arrived)
    finally:
        service.worker.cancel(job)
        for choice in choices:
            metrics.finished.labels(choice.finish or "cut").inc()


async def end_early(request: Request, job: Job, worker: Worker, deadline: float) -> None:
    """Wait for the client to go away, or for the end of its time, and end the job then."""
    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    try:
        await asyncio.wait_for(wait(), deadline - time.monotonic())
        error = gone()
    except asyncio.TimeoutError:
        error = ApiError(504, "the request took longer than this server allows", code="timeout")
    if job in worker.live:
        job.news.put_nowait(error)
        worker.cancel(job)
