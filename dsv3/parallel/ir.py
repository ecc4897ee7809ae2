"""What MindSpore's dump of a compiled graph says: its collectives, with how often each runs, and the types of its results."""
from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .groups import group_ranks

KINDS = {  # primitive -> the name of the collective
    "AlltoAll": "AllToAll", "AlltoAllV": "AllToAllV", "AllToAllv": "AllToAllV", "AlltoAllVC": "AllToAllV",
    "CollectiveGather": "Gather", "CollectiveScatter": "Scatter", "NeighborExchangeV2": "NeighborExchange",
    "BatchISendIRecv": "NeighborExchange",
} | {name: name for name in ("AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Broadcast", "Reduce", "Send", "Receive",
                             "NeighborExchange")}
BITS = {"Bool": 8, "Int8": 8, "UInt8": 8, "Int16": 16, "UInt16": 16, "Float16": 16, "BFloat16": 16, "Int32": 32, "UInt32": 32,
        "Float32": 32, "Int64": 64, "UInt64": 64, "Float64": 64}


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a rank's program, before the runtime fuses any: ``count`` of them are equal in all fields.

    group: global ranks in the group's order; for Send and Receive (source, destination). op: of a reduction, else "".
    shape: of what the rank puts in (what it gets, for Receive). backward: inside of the gradient, as its scope says.
    bytes: the payload of one, which is the whole tensor that the collective is about: the larger of what goes into and what
    comes out of this rank. This is the "size" of NVIDIA's nccl-tests. Of AllToAllV the shape is (-1, elements of a row) and
    the bytes are 0: how many rows there are depends on the data.
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
_TENSOR = re.compile(r"Tensor\[(\w+)\]\]?, \(([-\d, ]*)\)")


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
    if kind in ("Send", "Receive"):  # MindSpore's own pipelines say the other's rank, a Send in a model its place in the group
        end, place = ("dst_global_rank", "dest_rank") if kind == "Send" else ("src_global_rank", "src_rank")
        other = number(end) if f"{end}:" in line else group[number(place)]
        group = (rank, other) if kind == "Send" else (other, rank)
    into, _, out = types.partition("->")
    sides = [[(d, tuple(int(n) for n in s.split(",") if n.strip())) for d, s in _TENSOR.findall(side)] for side in (into, out)]
    sizes = [sum(math.prod(shape) * BITS.get(dtype, 0) // 8 for dtype, shape in side) for side in sides]
    first = next((t for side in (reversed(sides) if kind == "Receive" else sides) for t in side), None)
    if first is None or first[0] not in BITS:
        raise ValueError(f"{where}: {kind} of a type that is not known: {types.strip()[:300]}")
    if kind == "AllToAllV" and first[1] == (-1,):
        first, sizes = (first[0], (-1, number("block_size"))), [0]
    op = re.search(r'\bop: "(\w+)"', line)
    return Collective(kind=kind, op=op[1] if op else "", group=group, dtype=first[0], shape=first[1], bytes=max(sizes),
                      backward=False, count=0)


def result_types(path: Path) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(dtype, shape) of each tensor that a dumped graph returns, all of them in one flat tuple, or one alone.

    Raises ValueError for a result that cannot be read.
    """
    text = path.read_text(errors="replace")
    entry = re.search(r"^# IR entry: @(\S+)", text, re.MULTILINE)[1]
    body = text[text.index(f"\nsubgraph @{entry}("):]
    types = re.search(r"^  Return\([^\n]*\n *: \((.*)\)$", body, re.MULTILINE)[1]
    dtypes = [name for name, times in re.findall(r"Tensor\[(\w+)\]+(?:\*(\d+))?", types) for _ in range(int(times or 1))]
    _, several, shapes = types.partition("TupleShape(")
    shapes = re.findall(r"\(([\d, ]*)\)", shapes if several else types)
    if len(dtypes) != len(shapes):
        raise ValueError(f"{path}: cannot read what the graph returns: {types[:300]}")
    return tuple((dtype, tuple(int(n) for n in shape.split(",") if n.strip())) for dtype, shape in zip(dtypes, shapes))


def times(collectives: Iterable[tuple[Collective, int]]) -> tuple[Collective, ...]:
    """Collectives of several graphs together, each with how often its graph runs; equal ones counted, sorted."""
    counts: Counter = Counter()
    for c, calls in collectives:
        counts[dataclasses.replace(c, count=0)] += c.count * calls
    found = [dataclasses.replace(c, count=n) for c, n in counts.items()]
    return tuple(sorted(found, key=lambda c: (c.backward, c.kind, c.group, c.shape, c.dtype, c.op)))
