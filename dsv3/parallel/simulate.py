"""Compile for one rank of an Ascend cluster on any machine, and say what came out: collectives, bytes, memory, the program.

``simulate("package.module:function", kwargs, ranks=1024, rank=7)`` starts a child process in which MindSpore believes to be
rank 7 of 1024 Ascend devices (``MS_SIMULATION_LEVEL``), on CANN where that is installed and on the stand-in of
``fake_cann`` elsewhere. The child calls the function, which builds a step as a training script would and returns it as a
``Step``; the child compiles it, and the parent gets a ``Report``. Level 0 compiles; level 1 also plans the device's memory.
Nothing is computed: initial values are right, results are zeros. To check numbers, export the programs of all ranks
(``export=True``) and run them with ``lockstep``.
"""
from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import fake_cann
from .groups import group_ranks

KINDS = {  # primitive -> the name of the collective
    "AlltoAll": "AllToAll", "AlltoAllV": "AllToAllV", "AllToAllv": "AllToAllV", "AlltoAllVC": "AllToAllV",
    "CollectiveGather": "Gather", "CollectiveScatter": "Scatter", "NeighborExchangeV2": "NeighborExchange",
    "BatchISendIRecv": "NeighborExchange",
} | {name: name for name in ("AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Broadcast", "Reduce", "Send", "Receive",
                             "NeighborExchange")}
BITS = {"Bool": 8, "Int8": 8, "UInt8": 8, "Int16": 16, "UInt16": 16, "Float16": 16, "BFloat16": 16, "Int32": 32, "UInt32": 32,
        "Float32": 32, "Int64": 64, "UInt64": 64, "Float64": 64}
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
class Collective:
    """One kind of collective of a rank's program, before the runtime fuses any: ``count`` of them are equal in all fields.

    group: global ranks in the group's order; for Send and Receive (source, destination). op: of a reduction, else "".
    shape: of what the rank puts in (what it gets, for Receive). backward: inside of the gradient, as its scope says.
    bytes: the payload of one, which is the whole tensor that the collective is about: the larger of what goes into and what
    comes out of this rank. This is the "size" of NVIDIA's nccl-tests.
    """

    kind: str
    op: str
    group: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    backward: bool
    count: int

    @property
    def wire_bytes(self) -> float:
        """Bytes this rank sends for one by the ring algorithms: of n equal parts n-1, for AllReduce twice; of kinds without
        a ring the payload, for Receive nothing."""
        n = len(self.group)
        if self.kind in ("AllReduce", "AllGather", "ReduceScatter", "AllToAll"):
            return self.bytes * (n - 1) / n * (2 if self.kind == "AllReduce" else 1)
        return 0.0 if self.kind == "Receive" else float(self.bytes)


@dataclass(frozen=True)
class Report:
    """What came of one rank: seconds of compilation, peak host memory of the child, planned peak of device memory (level 1
    only), collectives of the last compiled graph, the target's value, the exported program, and whose CANN it was."""

    rank: int
    ranks: int
    seconds: float
    host_bytes: int
    device_bytes: int | None
    collectives: tuple[Collective, ...]
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
    return lines


# -- the parent --------------------------------------------------------------------------------------------------------
def simulate(target: str, kwargs: dict[str, Any], ranks: int, rank: int, *, level: int = 0, timeout: float = 600.0,
             keep: str | Path | None = None, export: bool = False) -> Report:
    """Call ``target`` ("module:function", importable on this process's sys.path) as rank ``rank`` of ``ranks`` simulated
    Ascend devices and report; see the module. It must return a Step, or JSON when it compiles by itself.

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
        collectives = tuple(Collective(**c | {k: tuple(c[k]) for k in ("group", "shape")}) for c in answer.pop("collectives"))
        program = folder / "program.mindir" if export else None
        name = f"CANN in {cann}" if cann else "stand-in for CANN"
        return Report(rank=rank, ranks=ranks, collectives=collectives, program=program, cann=name, **answer)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


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


def _environment(ranks: int, rank: int, level: int, folder: Path, stand_in: Path | None) -> dict[str, str]:
    """The child's variables, all of which MindSpore reads when it is imported."""
    environment = dict(os.environ) | {
        "RANK_SIZE": str(ranks), "RANK_ID": str(rank), "MS_SIMULATION_LEVEL": str(level), "GLOG_v": "3",
        "PYTHONWARNINGS": "ignore", "MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(folder / "ir"),
        "MS_DEV_DUMP_IR_PASSES": "validate",
    }
    for name in ("MS_DEV_JIT_PIPELINE", "MS_DEV_DUMP_IR_CONFIG", "MS_ROLE", "DEVICE_ID", "RANK_TABLE_FILE"):
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

    job = json.loads(Path("job.json").read_text())
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    ms.set_recursion_limit(1_000_000)
    communication.init()
    module, name = job["target"].split(":")
    function = getattr(importlib.import_module(module), name)
    start = time.perf_counter()
    result = function(**job["kwargs"])
    if isinstance(result, Step):
        start = time.perf_counter()
        if job["export"]:
            ms.export(result.function, *result.inputs, file_name="program", file_format="MINDIR")
        else:
            result.function(*result.inputs)
            ms.runtime.synchronize()
        value = result.value
    elif job["export"]:
        raise TypeError(f"{job['target']} returned {type(result).__name__}; to export, it must return a Step")
    else:
        value = result
    seconds = time.perf_counter() - start
    collectives = read_collectives(last_graph(Path("ir")), communication.get_rank(), _ranks_of)
    answer = {
        "seconds": seconds,
        "host_bytes": _peak_memory(),
        "device_bytes": ms.runtime.max_memory_allocated() if job["level"] else None,
        "collectives": [dataclasses.asdict(c) for c in collectives],
        "value": value,
    }
    Path("answer.json.part").write_text(json.dumps(answer))
    os.replace("answer.json.part", "answer.json")
    sys.stdout.flush()
    os._exit(0)  # MindSpore's own clean-up talks to devices that are not there


def _peak_memory() -> int:
    """Bytes. Not getrusage's, which counts what the parent had when it started this process."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _ranks_of(group: str) -> tuple[int, ...]:
    """Global ranks of a communication group of this process, in its order."""
    from mindspore import communication

    size = communication.get_group_size(group)
    return tuple(communication.get_world_rank_from_group_rank(group, i) for i in range(size))


# -- the IR ------------------------------------------------------------------------------------------------------------
def last_graph(folder: Path) -> Path:
    """The file of the last graph that MindSpore compiled, as its ``validate`` pass left it: after all of the front end.

    Raises FileNotFoundError when none was compiled.
    """
    files = list(folder.rglob("*_validate_*.ir"))
    if not files:
        raise FileNotFoundError("nothing was compiled: the target must return a Step or compile by itself")
    return max(files, key=lambda f: int(f.stem.rsplit("_", 1)[1]))


_GRAPH = re.compile(r"subgraph @(\S+?)\(")
_NODE = re.compile(r"  %\S+\([^)]*\) = (?:PrimFunc_|DoSignaturePrimitive_)?(\w+)\(")
_CALL = re.compile(r"  %\S+\([^)]*\) = (?:call @([^\s()]+)\(|%\d+\[@(?:Partial\()?@?([^\s()\]]+))")
_TENSOR = re.compile(r"Tensor\[(\w+)\]\]?, \(([\d, ]*)\)")


def read_collectives(path: Path, rank: int, ranks_of: Callable[[str], tuple[int, ...]]) -> tuple[Collective, ...]:
    """The collectives of a dumped graph of ``rank``, of called subgraphs once for every call; sorted, equal ones counted.

    ranks_of: global ranks of a named group, asked for those that carry no ranks. Raises ValueError for a collective in a
    subgraph whose calls cannot be counted (a loop or a branch), and for one that cannot be read.
    """
    own, calls, entry, graph = {}, {}, None, None
    lines = path.read_text(errors="replace").splitlines()
    for i, line in enumerate(lines):
        if line.startswith("# IR entry: @"):
            entry = line[len("# IR entry: @") :].strip()
        elif match := _GRAPH.match(line):
            graph = match[1]
            own[graph], calls[graph] = Counter(), Counter()
        elif match := _CALL.match(line):
            calls[graph][match[1] or match[2]] += 1
        elif (match := _NODE.match(line)) and match[1] in KINDS:
            scope = next((text for text in lines[i + 1 : i + 4] if "Fullname with scope" in text), "")
            found = _collective(KINDS[match[1]], line, lines[i + 1], rank, ranks_of, f"{path}:{i + 1}")
            own[graph][dataclasses.replace(found, backward="(Gradients" in scope)] += 1
    totals: dict[str, Counter] = {}

    def total(name: str) -> Counter:
        if name not in own:
            raise ValueError(f"{path}: cannot count the collectives of {name!r}, which is called but not among its subgraphs")
        if name not in totals:
            totals[name] = Counter()  # a graph that calls itself has nothing more to add
            counts = own[name].copy()
            for callee, times in calls[name].items():
                counts.update({c: n * times for c, n in total(callee).items()})
            totals[name] = counts
        return totals[name]

    counts = total(entry)
    lost = [name for name in own if own[name] and name not in totals]
    if lost:
        raise ValueError(f"{path}: cannot count how often {lost} run, which communicate: they are not called directly")
    found = [dataclasses.replace(c, count=n) for c, n in counts.items()]
    return tuple(sorted(found, key=lambda c: (c.backward, c.kind, c.group, c.shape, c.dtype, c.op)))


def _collective(kind: str, line: str, types: str, rank: int, ranks_of: Callable, where: str) -> Collective:
    def number(name: str) -> int:
        found = re.search(rf"\b{name}: \w+\((\d+)\)", line)
        if found is None:
            raise ValueError(f"{where}: {kind} without {name}: {line[:300]}")
        return int(found[1])

    ranks = re.search(r"\bgroup_rank_ids: \(([\d, ]+)\)", line)
    name = re.search(r'\bgroup: "([^"]*)"', line)
    if ranks is None and name is None:
        raise ValueError(f"{where}: {kind} names no group: {line[:300]}")
    group = name and group_ranks(name[1])  # ours say it; what a simulated process says of groups it joins late is the world
    if not group:
        group = tuple(int(r) for r in ranks[1].split(",") if r.strip()) if ranks else ranks_of(name[1])
    if kind == "Send":
        group = (rank, number("dst_global_rank"))
    if kind == "Receive":
        group = (number("src_global_rank"), rank)
    into, _, out = types.partition("->")
    sides = [[(d, tuple(int(n) for n in s.split(",") if n.strip())) for d, s in _TENSOR.findall(side)] for side in (into, out)]
    sizes = [sum(math.prod(shape) * BITS.get(dtype, 0) // 8 for dtype, shape in side) for side in sides]
    first = next((t for side in (reversed(sides) if kind == "Receive" else sides) for t in side), None)
    if first is None or first[0] not in BITS:
        raise ValueError(f"{where}: {kind} of a type that is not known: {types.strip()[:300]}")
    op = re.search(r'\bop: "(\w+)"', line)
    return Collective(kind=kind, op=op[1] if op else "", group=group, dtype=first[0], shape=first[1], bytes=max(sizes),
                      backward=False, count=0)
