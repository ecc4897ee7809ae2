"""Figures for Prometheus: requests and their times, and the engine's own counts."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .worker import Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
COUNTS = {"prompt_tokens": "prompt tokens taken", "reused_tokens": "prompt tokens found in the cache",
          "generated_tokens": "tokens generated", "steps": "decoding steps, each of each sequence",
          "drafted": "tokens drafted", "accepted": "drafts accepted"}
LEVELS = {"waiting": "sequences that wait", "running": "sequences being generated", "blocks": "cache blocks",
          "free_blocks": "free cache blocks", "cached_blocks": "free blocks that hold a reusable prefix"}


class EngineStats:
    """The engine's counts at the moment of asking (prometheus_client's collector interface)."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def collect(self) -> Iterator[Any]:
        """The engine's figures."""
        for name, text in COUNTS.items():
            yield CounterMetricFamily(f"dsv3_engine_{name}", text, value=getattr(self.worker.stats, name))
        for name, text in LEVELS.items():
            yield GaugeMetricFamily(f"dsv3_engine_{name}", text, value=getattr(self.worker.stats, name))
        yield GaugeMetricFamily("dsv3_engine_up", "1 until the engine fails", value=float(self.worker.failure is None))
        yield GaugeMetricFamily("dsv3_requests_live", "requests with an answer not finished", value=len(self.worker.live))


class Metrics:
    """What one app counts; a registry of its own, so that two apps in one process do not meet."""

    def __init__(self, worker: Worker):
        self._registry = CollectorRegistry()
        self.requests = Counter("dsv3_http_requests", "answers", ["path", "status"], registry=self._registry)
        self.finished = Counter("dsv3_choices_finished", "choices by the reason they ended", ["reason"], registry=self._registry)
        self.first = Histogram("dsv3_first_token_seconds", "from a request to its first token", registry=self._registry,
                               buckets=SECONDS)
        self.seconds = Histogram("dsv3_request_seconds", "from a request to its last token", registry=self._registry,
                                 buckets=SECONDS)
        self._registry.register(EngineStats(worker))

    def text(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)
