"""Stacked batches from a dataset, with a position that can be saved and returned to."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def batches(
    dataset: Any,
    batch_size: int | Callable[[int], int],
    start_sample: int = 0,
    *,
    stop_sample: int | None = None,
    shard: tuple[int, int] = (0, 1),
    prefetch: int = 0,
) -> Batches:
    """An iterator of dicts of arrays [rows, ...], rows in the dataset's order.

    dataset: anything with `len` and integer indexing that gives dicts of equal arrays. batch_size: rows over
    all shards, or a function of the step (0, 1, ...) for a ramp. start_sample: where to begin, `state` of an
    earlier iterator. stop_sample: end of the samples used, default the dataset's; a last batch that would be
    short is not given. shard: (rank, count), take that consecutive part of each batch. prefetch: batches made
    ahead in a background thread, 0 for none.
    Raises ValueError when the position is not a batch boundary or a batch does not divide among the shards.
    """
    return Batches(dataset, batch_size, start_sample, stop_sample, shard, prefetch)


class Batches:
    """What `batches` returns.

    `state`: number of the first sample not yet given, to start the next run with;
    batches made ahead do not count. `step`: batches before that sample. `close()` ends the background
    thread.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | Callable[[int], int],
        start_sample: int,
        stop_sample: int | None,
        shard: tuple[int, int],
        prefetch: int,
    ):
        self.dataset, self.shard = dataset, shard
        self.batch_size = batch_size if callable(batch_size) else lambda step: batch_size
        self.stop = len(dataset) if stop_sample is None else min(stop_sample, len(dataset))
        self.state, self.step = _locate(self.batch_size, start_sample)
        if not 0 <= shard[0] < shard[1]:
            raise ValueError(f"shard: expected (rank, count) with 0 <= rank < count, found {shard}")
        self._made = self._make(self.state, self.step)
        self._thread = None
        if prefetch > 0:
            self._queue: queue.Queue = queue.Queue(prefetch)
            self._ended = threading.Event()
            self._thread = threading.Thread(
                target=_fill, args=(self._make(self.state, self.step), self._queue, self._ended), daemon=True
            )
            self._thread.start()
            self._made = _drain(self._queue)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch, self.state, self.step = next(self._made)
        return batch

    def close(self) -> None:
        """End the background thread, if any; the iterator is then spent, its `state` still right."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
        self._made = iter(())

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_thread", None) is not None:
            self._ended.set()

    def _make(self, sample: int, step: int) -> Iterator[tuple[dict[str, np.ndarray], int, int]]:
        return _make(self.dataset, self.batch_size, sample, step, self.stop, self.shard)


def _make(dataset, batch_size, sample: int, step: int, stop: int, shard: tuple[int, int]):
    # Takes nothing of Batches: a thread that held it would keep it from ever being collected.
    while True:
        rows = batch_size(step)
        if rows < 1 or rows % shard[1]:
            raise ValueError(
                f"batch_size at step {step}: expected a multiple of {shard[1]} shards, found {rows}"
            )
        if sample + rows > stop:
            return
        part = rows // shard[1]
        first = sample + shard[0] * part
        samples = [dataset[i] for i in range(first, first + part)]
        sample, step = sample + rows, step + 1
        yield {key: np.stack([one[key] for one in samples]) for key in samples[0]}, sample, step


def _locate(batch_size: Callable[[int], int], start: int) -> tuple[int, int]:
    """The step that begins at sample `start`."""
    sample = step = 0
    while sample < start:
        rows = batch_size(step)
        if rows < 1:
            raise ValueError(f"batch_size at step {step}: expected at least 1, found {rows}")
        sample, step = sample + rows, step + 1
    if sample != start:
        raise ValueError(
            f"start_sample: expected a batch boundary, found {start}; the nearest after it is {sample}. "
            f"Was the batch size changed?"
        )
    return sample, step


def _fill(made: Iterator, ready: queue.Queue, ended: threading.Event) -> None:
    """Body of the thread: batches, or the exception that ended them, into the queue."""

    def put(item) -> bool:
        while not ended.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in made:
            if not put(item):
                return
        put(StopIteration())
    except Exception as error:  # handed to the reader, which raises it
        put(error)


def _drain(ready: queue.Queue) -> Iterator:
    while True:
        item = ready.get()
        if isinstance(item, StopIteration):
            return
        if isinstance(item, Exception):
            raise item
        yield item
