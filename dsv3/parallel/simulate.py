"""Compile for one rank of an Ascend cluster on any machine, and say what came out: collectives, bytes, memory, the program.

``simulate("package.module:function", kwargs, ranks=1024, rank=7)`` starts a child process in which MindSpore believes to be
rank 7 of 1024 Ascend devices (``MS_SIMULATION_LEVEL``), on CANN where that is installed and on the stand-in of
``fake_cann`` elsewhere. The child calls the function, which builds a step as a training script would and either calls it,
which compiles the graphs that it is made of (``recorded``), or returns one that closes over its Parameters as a ``Step``;
the parent gets a ``Report``. Level 0 compiles; level 1 also plans the device's memory. Nothing is computed: results are
blank. To check numbers, export the programs of all ranks (``export=True``) and run them with ``recorded.replay`` or
``lockstep.run``.
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import fake_cann
from .ir import Collective, times

TAIL = 40  # lines of a failed child's output that the exception quotes


# -- what a simulation is asked and says -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """What a target returns for the child to compile: a compiled function (or Cell) and the rank's own inputs.

    Parameters are closed over. With ``export=True`` every output must be a tensor and, for a Cell, every Parameter its own.
    value: JSON, handed on in the report.
    """

    function: Callable
    inputs: tuple[Any, ...]
    value: Any = None


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph of a rank: the function's name, the structures of its arguments and of its result (as
    ``transform.jit`` writes them), how often it was called, seconds of compilation, the collectives of one call, and the
    exported program."""

    name: str
    literals: tuple[str, ...]
    outline: Any
    calls: int
    seconds: float
    collectives: tuple[Collective, ...]
    program: Path | None

    def again(self) -> GraphReport:
        """The same, called once more."""
        return dataclasses.replace(self, calls=self.calls + 1)


@dataclass(frozen=True)
class Report:
    """What came of one rank: seconds of compilation, peak host memory of the child, planned peak of device memory (level 1
    only), the collectives of all graphs as often as they were called, the graphs themselves (none of a ``Step``), the
    target's value, the exported program of a ``Step``, and whose CANN it was."""

    rank: int
    ranks: int
    seconds: float
    host_bytes: int
    device_bytes: int | None
    collectives: tuple[Collective, ...]
    graphs: tuple[GraphReport, ...]
    value: Any
    program: Path | None
    cann: str


def summary(report: Report) -> list[str]:
    """Lines of a table: what the step of one rank sends to whom, most bytes first."""
    gib, mib = 1 << 30, 1 << 20
    device = "" if report.device_bytes is None else f", planned device memory {report.device_bytes / gib:.2f} GiB"
    lines = [f"rank {report.rank} of {report.ranks}: compiled in {report.seconds:.1f} s, host memory "
             f"{report.host_bytes / gib:.2f} GiB{device}, {report.cann}",
             f"{'collective':<20}{'count':>6}  {'pass':<9}{'group':<28}{'dtype':<10}{'shape':<24}{'MiB each':>10}{'on wire':>10}"]
    for c in sorted(report.collectives, key=lambda c: -c.count * c.wire_bytes):
        group = " ".join(map(str, c.group))
        group = group if len(group) < 27 else f"{len(c.group)} ranks: {' '.join(map(str, c.group[:3]))} .. {c.group[-1]}"
        name = f"{c.kind} {c.op}".strip()
        lines.append(f"{name:<20}{c.count:>6}  {'backward' if c.backward else 'forward':<9}{group:<28}{c.dtype:<10}"
                     f"{str(list(c.shape)):<24}{c.bytes / mib:>10.3f}{c.count * c.wire_bytes / mib:>10.3f}")
    count, wire = sum(c.count for c in report.collectives), sum(c.count * c.wire_bytes for c in report.collectives)
    lines.append(f"{'total':<20}{count:>6}  {'':<81}{wire / mib:>10.3f}")
    lines += [f"graph {g.name}: {g.calls} calls of {sum(c.count for c in g.collectives)} collectives, "
              f"compiled in {g.seconds:.1f} s" for g in report.graphs]
    return lines


# -- the parent --------------------------------------------------------------------------------------------------------
def simulate(target: str, kwargs: dict[str, Any], ranks: int, rank: int, *, level: int = 0, timeout: float = 600.0,
             keep: str | Path | None = None, export: bool = False) -> Report:
    """Call ``target`` ("module:function", importable on this process's sys.path) as rank ``rank`` of ``ranks`` simulated
    Ascend devices and report; see the module. It must return a Step, or JSON when it calls its graphs.

    kwargs: JSON. level: 0 compiles, 1 also plans memory. keep: a folder for the child's files (log, IR, program) as
    ``rank_<n>``, needed with export; the function runs in it, so paths in kwargs should be absolute. Raises ValueError for
    arguments that do not fit together, RuntimeError with the last lines of a child that failed, TimeoutError.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks} ranks: expected 0 to {ranks - 1}")
    if level not in (0, 1) or (export and level):
        raise ValueError(f"level={level}, export={export}: expected level 0 or 1, and 0 to export")
    if export and keep is None:
        raise ValueError("export=True writes the program: say where with keep=")
    if not re.fullmatch(r"[\w.]+:\w+", target):
        raise ValueError(f"target {target!r}: expected 'module:function'")
    cann = fake_cann.real_cann()
    folder = Path(tempfile.mkdtemp(prefix="dsv3-simulate-")) if keep is None else Path(keep).absolute() / f"rank_{rank}"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        environment = _environment(ranks, rank, level, folder, None if cann else fake_cann.ensure())
        (folder / "job.json").write_text(json.dumps({"target": target, "kwargs": kwargs, "level": level, "export": export}))
        _run_child(environment, folder, f"rank {rank} of {ranks} of {target}", timeout)
        answer = json.loads((folder / "answer.json").read_text())
        graphs = tuple(GraphReport(**g | {"collectives": _collectives(g["collectives"]), "literals": tuple(g["literals"]),
                                          "program": g["program"] and Path(g["program"])}) for g in answer.pop("graphs"))
        collectives = _collectives(answer.pop("collectives"))
        program = folder / "program.mindir" if export and not graphs else None
        name = f"CANN in {cann}" if cann else "stand-in for CANN"
        return Report(rank=rank, ranks=ranks, collectives=collectives, graphs=graphs, program=program, cann=name, **answer)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _collectives(found: list[dict]) -> tuple[Collective, ...]:
    return tuple(Collective(**c | {k: tuple(c[k]) for k in ("group", "shape")}) for c in found)


def simulate_ranks(target: str, kwargs: dict[str, Any], ranks: int, which: Sequence[int] | None = None, *,
                   jobs: int | None = None, **options: Any) -> tuple[Report, ...]:
    """``simulate`` for several ranks (default: all) in at most ``jobs`` processes at once (default: one a processor)."""
    which = range(ranks) if which is None else which
    if fake_cann.real_cann() is None:
        fake_cann.ensure()  # once, not in every thread
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        futures = [pool.submit(simulate, target, kwargs, ranks, rank, **options) for rank in which]
        try:
            return tuple(future.result() for future in futures)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def simulate_many(target: str, kwargs: dict[str, Any], ranks: int, which: Sequence[int], **options: Any) -> Iterator[Report]:
    """``simulate`` for several large ranks: the first alone, the others as many at once as there is memory for, by its need."""
    first = simulate(target, kwargs, ranks, which[0], **options)
    yield first
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    jobs = max(1, min(os.cpu_count() or 1, int(free / (1.2 * first.host_bytes))))
    yield from simulate_ranks(target, kwargs, ranks, which[1:], jobs=jobs, **options)


def _environment(ranks: int, rank: int, level: int, folder: Path, stand_in: Path | None) -> dict[str, str]:
    """The child's variables, all of which MindSpore reads when it is imported."""
    environment = dict(os.environ) | {
        "RANK_SIZE": str(ranks), "RANK_ID": str(rank), "MS_SIMULATION_LEVEL": str(level), "GLOG_v": "3",
        "PYTHONWARNINGS": "ignore", "MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(folder / "ir"),
        "MS_DEV_DUMP_IR_PASSES": "validate", "MS_DEV_DUMP_IR_CONFIG": "LINE_LEVEL0",  # without a model's source lines
        "TMPDIR": str(folder),  # it ends without clean-up: what it leaves goes with its folder
    }
    for name in ("MS_DEV_JIT_PIPELINE", "MS_ROLE", "DEVICE_ID", "RANK_TABLE_FILE"):
        environment.pop(name, None)  # left over from a cluster or a CPU run, these would change what is compiled
    paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    stand_in_paths = fake_cann.environment(stand_in) if stand_in else {}
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        parts = (stand_in_paths.get(name), paths.get(name), os.environ.get(name))
        environment[name] = os.pathsep.join(filter(None, parts))
    return environment


def _run_child(environment: dict[str, str], folder: Path, what: str, timeout: float) -> None:
    # Compiling a deep graph recurses deeply in C++: the stack may grow as far as the system lets it.
    command = ["/bin/sh", "-c", 'ulimit -S -s "$(ulimit -H -s)"; exec "$@"', "sh", sys.executable, "-c",
               "from dsv3.parallel.simulate import child; child()"]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            code = process.wait(timeout)
        except BaseException as error:
            process.kill()
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"{what} did not finish within {timeout} s; its last lines:\n{_tail(folder)}") from None
            raise
    if code or not (folder / "answer.json").exists():
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise RuntimeError(f"{what} {ended}; its last lines:\n{_tail(folder)}")


def _tail(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip() and "_check_version.py" not in line][-TAIL:])


# -- the child ---------------------------------------------------------------------------------------------------------
def child() -> None:
    """What the child process does, in the folder with its job.json: call the target, compile, write answer.json."""
    import mindspore as ms
    from mindspore import communication

    from .. import transform
    from .ir import last_graph, read_collectives
    from .recorded import ranks_of, recorder

    job = json.loads(Path("job.json").read_text())
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    ms.set_recursion_limit(1_000_000)
    communication.init()
    module, name = job["target"].split(":")
    function = getattr(importlib.import_module(module), name)
    graphs: list[GraphReport] = []
    transform.runner = recorder(job["export"], job["level"] == 1, graphs)
    start = time.perf_counter()
    value = function(**job["kwargs"])
    if isinstance(value, Step):
        start = time.perf_counter()
        if job["export"]:
            ms.export(value.function, *value.inputs, file_name="program", file_format="MINDIR")
        else:
            value.function(*value.inputs)
            ms.runtime.synchronize()
        collectives, value = read_collectives(last_graph(Path("ir")), communication.get_rank(), ranks_of), value.value
    elif not graphs:
        raise RuntimeError(f"nothing was compiled: {job['target']} must call what transform.jit makes, or return a Step")
    else:
        collectives = times((c, g.calls) for g in graphs for c in g.collectives)
    seconds = time.perf_counter() - start
    answer = {
        "seconds": seconds,
        "host_bytes": _peak_memory(),
        "device_bytes": ms.runtime.max_memory_allocated() if job["level"] else None,
        "collectives": [dataclasses.asdict(c) for c in collectives],
        "graphs": [dataclasses.asdict(g) | {"program": g.program and str(g.program)} for g in graphs],
        "value": value,
    }
    Path("answer.json.part").write_text(json.dumps(answer))
    os.replace("answer.json.part", "answer.json")
    sys.stdout.flush()
    os._exit(0)  # MindSpore's own clean-up talks to devices that are not there


def hush() -> None:
    """Let the threads that wait for the device's reports, one a stream, have the time that nobody else wants: a simulated device
    has a report at once, so they spin for as long as the process lives."""
    spinning = set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}
    for _ in range(3):
        time.sleep(0.01)
        spinning = {thread for thread in spinning if _is_running(thread)}
    for thread in spinning:
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.setpriority(os.PRIO_PROCESS, int(thread), 19)


def _is_running(thread: str) -> bool:
    try:
        return ") R " in Path(f"/proc/self/task/{thread}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended since
        return False


def _peak_memory() -> int:
    """Bytes. Not getrusage's, which counts what the parent had when it started this process."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
