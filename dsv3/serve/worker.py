"""The engine's own thread: requests go in through a queue, tokens come out into the event loop."""
from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..sampling import Sampling
from .errors import ApiError, broken, busy

log = logging.getLogger("dsv3.serve")


class Job:
    """The sequences of one request. What happens to them is put into ``news``: lists of (choice, event), or an ApiError that ends
    the request early.
    """

    def __init__(self, size: int):
        self.news: asyncio.Queue[list[tuple[int, Any]] | ApiError] = asyncio.Queue()
        self.accepted: asyncio.Future[ApiError | None] = asyncio.get_running_loop().create_future()
        self.open = set(range(size))       # choices not finished
        self.numbers: dict[int, int] = {}  # choice -> the engine's request number; the worker's thread alone looks at it


class Worker:
    """One thread that owns the engine and nothing else touches.

    ``make_engine`` is called in the thread, for MindSpore keeps part of its state by thread. All methods are for the thread of
    the event loop. When the engine raises, every request gets 500, ``failure`` says why, and nothing is accepted any more.
    """

    def __init__(self, make_engine: Callable[[], Any], places: int):
        self.failure: str | None = None
        self.stats: Any = None        # of the engine, after its last step
        self.max_length = 0
        self.places = places          # sequences that may be running or waiting
        self.live: set[Job] = set()   # that have open choices
        self._make = make_engine
        self._inbox: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self._ready: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def load(self) -> None:
        """Start the thread and wait for the engine. Raises whatever making it raised."""
        self._thread.start()
        self._ready.result()

    async def submit(self, job: Job, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> None:
        """Queue one sequence for each prompt.

        Raises ApiError: 429 if too many wait, 400 if the engine refuses one, 500 if the engine is broken.
        """
        if self.failure is not None:
            raise broken(self.failure)
        taken = sum(len(other.open) for other in self.live)
        if taken + len(job.open) > self.places:
            raise busy(f"{taken} answers are being written or wait; {len(job.open)} more would exceed {self.places}")
        self._loop = asyncio.get_running_loop()
        self.live.add(job)
        self._inbox.put(("submit", job, prompts, samplings))
        try:
            error = await job.accepted
        except asyncio.CancelledError:
            self.cancel(job)
            raise
        if error is not None:
            self.live.discard(job)
            raise error

    def cancel(self, job: Job, choice: int | None = None) -> None:
        """Stop one choice of a request, or all: it frees its place at once, and its blocks before the engine's next step."""
        if job in self.live:
            self._inbox.put(("cancel", job, choice))
            self._finished(job, choice)

    def end(self, error: ApiError) -> None:
        """Answer every request with ``error``."""
        for job in list(self.live):
            answer(job.accepted, error)
            job.news.put_nowait(error)
            self.cancel(job)

    def close(self, seconds: float = 10.0) -> bool:
        """End the thread after the step it is in; returns whether it has ended."""
        self._inbox.put(("close",))
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # -- in the event loop, called by the thread -------------------------------------------------------------------------
    def _deliver(self, news: dict[Job, list[tuple[int, Any]]]) -> None:
        for job, events in news.items():
            if job in self.live:  # else it has been cancelled since
                job.news.put_nowait(events)
                for choice, event in events:
                    if event.finish is not None:
                        self._finished(job, choice)

    def _finished(self, job: Job, choice: int | None) -> None:
        job.open = set() if choice is None else job.open - {choice}
        if not job.open:
            self.live.discard(job)

    def _break(self, failure: str) -> None:
        self.failure = failure
        self.end(broken(failure))

    # -- in the thread -----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            engine = self._make()
            self.max_length, self.stats = engine.max_length, engine.stats
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        routes: dict[int, tuple[Job, int]] = {}  # the engine's request number -> where its events go
        try:
            while self._obey(engine, routes):
                news: dict[Job, list[tuple[int, Any]]] = {}
                for event in engine.step():
                    job, choice = routes[event.request]
                    news.setdefault(job, []).append((choice, event))
                    if event.finish is not None:
                        del routes[event.request], job.numbers[choice]
                self.stats = engine.stats
                if news:
                    self._tell(self._deliver, news)
        except Exception as error:
            log.exception("the engine has stopped")
            self._tell(self._break, f"{type(error).__name__}: {error}")

    def _obey(self, engine: Any, routes: dict) -> bool:
        """Carry out what has been asked since the last step; wait for something when there is nothing to do. False: stop."""
        while True:
            try:
                command = self._inbox.get(block=engine.idle)
            except queue.Empty:
                return True
            if command[0] == "close":
                return False
            if command[0] == "submit":
                _, job, prompts, samplings = command
                self._tell(answer, job.accepted, admit(engine, routes, job, prompts, samplings))
            else:
                _, job, choice = command
                for c in list(job.numbers) if choice is None else [c for c in [choice] if c in job.numbers]:
                    engine.cancel(job.numbers[c])
                    del routes[job.numbers.pop(c)]
                self.stats = engine.stats

    def _tell(self, function: Callable, *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop is closed: nobody listens any more
            log.debug("the event loop has gone")


def admit(engine: Any, routes: dict, job: Job, prompts: Sequence[Sequence[int]],
          samplings: Sequence[Sampling]) -> ApiError | None:
    """Submit the sequences of a job, all or none; returns the refusal of the engine if there is one."""
    for choice, (prompt, sampling) in enumerate(zip(prompts, samplings)):
        try:
            number = engine.submit(prompt, sampling)
        except ValueError as error:
            for c in list(job.numbers):
                engine.cancel(job.numbers[c])
                del routes[job.numbers.pop(c)]
            return ApiError(400, str(error), code="invalid_value")
        job.numbers[choice], routes[number] = number, (job, choice)
    return None


def answer(future: asyncio.Future, value: Any) -> None:
    """Set a future that may have been cancelled."""
    if not future.done():
        future.set_result(value)
