"""What every measurement shares: spreads of timings, the machine's facts, its matmul peak, tokens."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def spread(values: Iterable[float]) -> dict[str, Any]:
    """{"median", "min", "max", "n"} of some numbers."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def spread_text(s: dict[str, Any], scale: float = 1.0, digits: int = 1) -> str:
    """``median (min to max, of n)`` of a spread, each number times ``scale``."""
    a, b, c = (f"{s[k] * scale:,.{digits}f}" for k in ("median", "min", "max"))
    return f"{a} ({b} to {c}, of {s['n']})"


def rows_text(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def timed(fn: Callable[[], Any]) -> tuple[float, float, Any]:
    """(wall seconds, CPU seconds of all threads of the process, result) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = fn()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def peak_bytes() -> int:
    """The most memory this process ever had resident (``ru_maxrss``, which Linux gives in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, Any]:
    """Processor, usable CPUs, the system's load of the last minute, and versions."""
    import mindspore as ms

    from ..kernels import native

    why = native.why_reference()
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "mindspore": ms.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "kernels": "native" if why is None else f"reference ({why})",
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")),
                platform.machine(),
            )
    except OSError:
        return platform.processor() or platform.machine()


def build_kernels() -> float:
    """Compile the C++ kernels that the cache lacks, so that no timing contains it; returns the seconds."""
    from ..kernels import native

    start = time.perf_counter()
    if native.why_reference() is None:
        for source in sorted(native.HERE.glob("*.cc")):
            native.library(source.stem)
    return time.perf_counter() - start


def sgemm_peak(n: int = 2048, calls: int = 10) -> float:
    """GFLOP/s of the fastest of some float32 products [n, n] by MindSpore's own matmul, here and now."""
    from mindspore import ops

    from ..transform import jit

    def product(a, b):
        return ops.matmul(a, b)

    compiled, a = jit(product), np.random.default_rng(0).standard_normal((n, n), np.float32)
    best = min(timed(lambda: compiled(a, a).asnumpy())[0] for _ in range(calls + 1))
    return 2 * n**3 / best / 1e9


def tokens(vocab_size: int, batch: int, seq: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Endless batches of uniform ids, [batch, seq] int32, the same everywhere for the same arguments."""
    rng = np.random.default_rng(seed)
    while True:
        yield rng.integers(0, vocab_size, (batch, seq), dtype=np.int32)


def child_environment() -> dict[str, str]:
    """The environment for a child of this interpreter, which finds the package where this process did."""
    here = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}


def add_shape(parser: argparse.ArgumentParser, config: str = "TINY", batch: int = 16, seq: int = 128) -> None:
    """The options that say which model and how many tokens."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--config", default=config, help="a preset, a config.json, or the folder of one")
    parser.add_argument("--batch", type=int, default=batch, help="rows of a step")
    parser.add_argument("--seq", type=int, default=seq, help="tokens of a row")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse options below 1 by name."""
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
