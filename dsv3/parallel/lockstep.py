"""Run the partitioned programs of all ranks in one process, with NumPy, in lockstep: proof that they compute the right thing.

``simulate(..., export=True)`` writes the program that one rank of a cluster would run. Here N of them run together: each
rank until its next collective, which takes place once every member of its group has arrived. What comes out are the numbers
that the cluster would have computed, up to rounding, so that a step on 8 ranks can be held against the same step on one.

Arrays are float32 where the program says float32, bfloat16 or float16; results of the latter two are rounded to their type
after every primitive, and a reduction over ranks is summed in float32 in the group's order. Results are deterministic. Every
result's shape is held against the one that MindSpore recorded in the program.
"""
from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import mindir
from .groups import group_ranks
from .lockstep_fused import adamw
from .lockstep_ops import PRIMITIVES
from .mindir import DTYPES, Graph, Node, Program, conform

POINT_TO_POINT = {"Send": ("dst_global_rank", "dest_rank"), "Receive": ("src_global_rank", "src_rank")}
ASSIGNMENTS = {  # the new values of the first inputs
    "Assign": lambda old, new, *_: (new,), "AssignAdd": lambda old, x, *_: (old + x,),
    "AssignSub": lambda old, x, *_: (old - x,), "AdamW": adamw,
}
STRUCTURAL = {"Load", "Depend", "UpdateState", "MakeTuple", "TupleGetItem", "Partial", "Switch", "Return"}
REDUCTIONS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}
WORLD = "hccl_world_group"


@dataclass(frozen=True)
class Ref:
    """A parameter as a value: who reads it later gets what was assigned to it in between."""

    name: str


@dataclass(frozen=True)
class Closure:
    """A function with its first arguments."""

    function: str
    arguments: tuple = ()


def load(path: str | Path, rank: int) -> Program:
    """Read the exported program of ``rank``. Raises ValueError naming the nodes that cannot be interpreted."""
    known = (PRIMITIVES, COLLECTIVE, POINT_TO_POINT, ASSIGNMENTS)
    return mindir.load(path, rank, STRUCTURAL.union(*known))


# -- one rank ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Arrival:
    """A rank at a collective: what it brings, and what must be equal on all members of the group."""

    node: Node
    group: tuple[int, ...]
    value: Any
    terms: tuple


def _execute(program: Program, graph: Graph, arguments: Sequence[Any], world: int) -> Generator[Arrival, Any, Any]:
    """Run one function of a program; yields at collectives and is sent their results; returns the function's result."""
    values: dict[str, Any] = dict(zip(graph.inputs, arguments))

    def get(name: str) -> Any:
        if name in values:
            return values[name]
        if name in program.refs:
            return Ref(program.refs[name])
        if name in program.constants:
            return program.constants[name]
        if name in program.functions:
            return Closure(name)
        raise RuntimeError(f"rank {program.rank}, graph {graph.name}: {name} has no value when it is read")

    def plain(value: Any) -> Any:
        if isinstance(value, Ref):
            return program.params[value.name]
        return tuple(map(plain, value)) if isinstance(value, tuple) else value

    def compute(node: Node, inputs: tuple) -> Any:
        if node.op in PRIMITIVES:
            return conform(PRIMITIVES[node.op](node, *map(plain, inputs)), node.type)
        if node.op in ("Depend", "UpdateState"):
            return inputs[0]
        if node.op in ("Load", "Return"):
            return plain(inputs[0])
        if node.op == "MakeTuple":
            return inputs
        if node.op == "TupleGetItem":
            return inputs[0][int(inputs[1])]
        if node.op == "Partial":
            return Closure(inputs[0].function, (*inputs[0].arguments, *inputs[1:]))
        if node.op == "Switch":
            return inputs[1] if bool(plain(inputs[0])) else inputs[2]
        if node.op in ASSIGNMENTS:
            new = ASSIGNMENTS[node.op](*map(plain, inputs))
            for target, value in zip(inputs, new):
                if not isinstance(target, Ref):
                    raise TypeError("assigns to what is not a parameter")
                program.params[target.name] = conform(value, program.types[target.name])
            return inputs[0] if len(new) == 1 else inputs[:len(new)]
        return _arrival(program, node, tuple(map(plain, inputs)), world)

    for node in graph.nodes:
        inputs = tuple(map(get, node.inputs))
        if node.op == "call":
            closure = inputs[0]
            result = yield from _execute(program, program.functions[closure.function], (*closure.arguments, *inputs[1:]), world)
        else:
            try:
                result = compute(node, inputs)
            except Exception as error:
                raise _failed(program, node, map(plain, inputs), error) from error
            if isinstance(result, Arrival):
                answer = yield result
                try:
                    result = conform(answer, node.type)
                except ValueError as error:
                    raise _failed(program, node, map(plain, inputs), error) from error
        values[node.name] = result
        for name in node.last:
            values.pop(name, None)
    return plain(get(graph.result))


def _failed(program: Program, node: Node, inputs: Iterable, error: Exception) -> RuntimeError:
    seen = ", ".join(f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else repr(x)[:60] for x in inputs)
    return RuntimeError(f"rank {program.rank}, node {node.name}: {node.op}({seen}): {error}")


def _arrival(program: Program, node: Node, inputs: tuple, world: int) -> Arrival:
    attrs, value = node.attrs, inputs[0] if inputs else None
    group = group_ranks(str(attrs.get("group", ""))) or attrs.get("group_rank_ids") or attrs.get("rank_list")
    if attrs.get("group") == WORLD:
        group = range(world)
    if node.op in POINT_TO_POINT:  # MindSpore's own pipelines say the other's rank, a Send in a model its place in the group
        end, place = POINT_TO_POINT[node.op]
        other = attrs[end] if end in attrs else group[attrs[place]]
        group = (program.rank, other) if node.op == "Send" else (other, program.rank)
    if group is None:
        raise ValueError(f"names the group {attrs.get('group')!r} but not its ranks")
    group = tuple(int(r) for r in group)
    if program.rank not in group or not set(group) <= set(range(world)):
        raise ValueError(f"goes to ranks {list(group)}, of which this is not one or which are not all among the {world} programs")
    terms = (node.op, attrs.get("op"), attrs.get("split_dim"), attrs.get("concat_dim"), attrs.get("root_rank"))
    if node.op == "AlltoAllV":
        block = int(attrs.get("block_size", 1))
        value = (value, *(np.asarray(x).reshape(-1).astype(np.int64) * block for x in inputs[1:3]))
    elif node.op not in POINT_TO_POINT and node.op != "Barrier":
        parts = value if isinstance(value, tuple) else (value,)
        terms += tuple((p.shape, p.dtype.name) for p in map(np.asarray, parts))
    return Arrival(node, group, value, terms)


# -- all ranks ---------------------------------------------------------------------------------------------------------
def run(programs: Sequence[Program], feeds: Sequence[Sequence[np.ndarray]]) -> list[Any]:
    """One step of all ranks. programs: rank i at place i; feeds: each rank's inputs. -> each rank's result, arrays or tuples.

    ``Program.params`` is updated. Raises ValueError for inputs that do not fit, and RuntimeError naming
    rank, node and primitive for one that fails, for members of a group that meet in different collectives, and for ranks
    that wait for one another for ever. Sends do not wait for their receiver: an order that works only without buffers is not
    found out here.
    """
    world = len(programs)
    for i, (program, feed) in enumerate(itertools.zip_longest(programs, feeds)):
        if program is None or feed is None:
            raise ValueError(f"{world} programs but inputs for {len(feeds)} ranks")
        if program.rank != i:
            raise ValueError(f"program {i} is that of rank {program.rank}; programs must come in the order of their ranks")
    return [result for result, _ in together([execute(p, feed, world) for p, feed in zip(programs, feeds)])]


def execute(program: Program, feed: Sequence[np.ndarray], world: int) -> Generator[Arrival, Any, tuple[Any, dict]]:
    """One rank's program: yields at collectives, is sent their results, and returns its result and, by their places, the
    inputs that it has assigned to. Raises ValueError for inputs that do not fit."""
    arrays = _checked(program, feed)
    names = [str(i) for i in range(len(arrays))]
    program.params.update(zip(names, arrays))  # an input is a parameter as long as the program runs
    result = yield from _execute(program, program.graph, tuple(map(Ref, names)), world)
    after = [program.params.pop(name) for name in names]
    return result, {i: array for i, array in enumerate(after) if array is not arrays[i]}


def together(ranks: Sequence[Generator[Arrival, Any, Any]]) -> list[Any]:
    """Run all ranks, each until its next collective, which takes place once every member of its group is there.

    Returns what they return; raises what they raise and what ``run`` says of collectives that do not fit together.
    """
    answers: dict[int, Any] = dict.fromkeys(range(len(ranks)))  # of ranks that can go on
    waiting: dict[int, Arrival] = {}
    mail: dict[tuple, deque] = defaultdict(deque)
    results: list[Any] = [None] * len(ranks)
    try:
        with np.errstate(all="ignore"):
            while answers:
                for rank in sorted(answers):
                    _advance(rank, ranks[rank], answers.pop(rank), waiting, mail, results)
                for rank in sorted(waiting):
                    if rank in waiting:
                        answers |= _meet(waiting, rank, mail)
    finally:
        for rank in ranks:
            rank.close()
    if waiting:
        places = "; ".join(_place(rank, arrival, mail) for rank, arrival in sorted(waiting.items()))
        raise RuntimeError(f"ranks wait for one another for ever: {places}")
    if left := [f"rank {s} to {d} with tag {t}" for (s, d, t), queue in mail.items() if queue]:
        raise RuntimeError(f"sent but never received: {'; '.join(left)}")
    return results


def _checked(program: Program, feed: Sequence) -> list[np.ndarray]:
    rank = program.rank
    if len(feed) != len(program.graph.inputs):
        raise ValueError(f"rank {rank} takes {len(program.graph.inputs)} inputs, found {len(feed)}")
    out = []
    for i, x in enumerate(map(np.asarray, feed)):
        kind = program.types[str(i)]
        if x.shape != kind.shape or x.dtype.kind != np.dtype(DTYPES[kind.dtype]).kind:
            expected, found = f"{DTYPES[kind.dtype]}{list(kind.shape)}", f"{x.dtype}{list(x.shape)}"
            raise ValueError(f"rank {rank}, input {i}: expected {expected}, found {found}")
        out.append(conform(x, kind))
    return out


def _advance(rank: int, steps: Generator, answer: Any, waiting: dict, mail: dict, results: list) -> None:
    """Let a rank run until it has to wait or ends."""
    try:
        arrival = steps.send(answer)
        while arrival.node.op == "Send":
            mail[(*arrival.group, arrival.node.attrs.get("sr_tag"))].append(arrival.value)
            arrival = steps.send(arrival.value)
        waiting[rank] = arrival
    except StopIteration as end:
        results[rank] = end.value


def _meet(waiting: dict[int, Arrival], rank: int, mail: dict) -> dict[int, Any]:
    """Answers for the ranks that ``rank``'s collective lets go on; none when it has to wait."""
    here = waiting[rank]
    if here.node.op == "Receive":
        queue = mail[(*here.group, here.node.attrs.get("sr_tag"))]
        return {rank: queue.popleft()} if queue and waiting.pop(rank) else {}
    waiters = [waiting[r] for r in here.group if r in waiting]
    there = [w for w in waiters if w.group == here.group and w.node.op != "Receive"]
    if any(other.terms != here.terms for other in there):
        places = "; ".join(_place(r, waiting[r], mail) for r in here.group if r in waiting)
        raise RuntimeError(f"ranks of the group {list(here.group)} meet in different collectives: {places}")
    if len(there) < len(here.group):
        return {}
    values = COLLECTIVE[here.node.op](here, [a.value for a in there])
    for r in here.group:
        del waiting[r]
    return dict(zip(here.group, values))


def _place(rank: int, arrival: Arrival, mail: dict) -> str:
    detail = f"tag {arrival.node.attrs.get('sr_tag')}, in the mail: " + (", ".join(
        f"tag {t}" for (s, d, t), q in mail.items() if q and (s, d) == arrival.group) or "nothing")
    detail = detail if arrival.node.op == "Receive" else " ".join(str(t) for t in arrival.terms[1:] if t is not None)
    return f"rank {rank} in {arrival.node.op} of {list(arrival.group)} ({detail}) at {arrival.node.name}"


# -- collectives: the members' values in the group's order -> what each gets ------------------------------------------
def _reduced(here: Arrival, values: list[np.ndarray]) -> np.ndarray:
    reduction = REDUCTIONS[here.node.attrs.get("op") or "sum"]
    total = values[0]
    for value in values[1:]:
        total = reduction(total, value)
    return total


def _all_to_all(here: Arrival, values: list[np.ndarray]) -> list[np.ndarray]:
    split, concat = int(here.node.attrs["split_dim"]), int(here.node.attrs["concat_dim"])
    parts = [np.split(value, len(values), split) for value in values]
    return [np.concatenate([part[i] for part in parts], concat) for i in range(len(values))]


def _all_to_all_v(here: Arrival, values: list[tuple]) -> list[np.ndarray]:
    parts = [np.split(x, np.cumsum(sent)) for x, sent, _ in values]  # one part more than members: what is not sent
    for i, (_, _, expected) in enumerate(values):
        if (sent := [len(part[i]) for part in parts]) != expected.tolist():
            raise RuntimeError(f"rank {here.group[i]} at {here.node.name} expects {expected.tolist()} elements from the ranks "
                                f"{list(here.group)}, which send {sent}")
    got = [np.concatenate([part[i] for part in parts]) for i in range(len(values))]
    return [x if x.size else np.zeros((), x.dtype) for x in got]  # MindSpore's answer where nothing comes has no dims


COLLECTIVE: dict[str, Callable[[Arrival, list], list]] = {
    "AllReduce": lambda here, values: [_reduced(here, values)] * len(values),
    "AllGather": lambda here, values: [np.concatenate(values)] * len(values),
    "ReduceScatter": lambda here, values: np.split(_reduced(here, values), len(values)),
    "AlltoAll": _all_to_all,
    "AllToAll": _all_to_all,
    "AlltoAllV": _all_to_all_v,
    "Broadcast": lambda here, values: [values[here.group.index(int(here.node.attrs["root_rank"]))]] * len(values),
    "Barrier": lambda here, values: values,
}


# -- params of all ranks as those of one -------------------------------------------------------------------------------
def gather(programs: Sequence[Program], mesh: Mapping[str, int], layouts: Mapping[str, Sequence[Any]],
           tolerance: float = 0.0) -> dict[str, np.ndarray]:
    """Whole params from the ranks' parts. -> {name: array} for the names of ``layouts``.

    mesh: axis -> size, the last axis moving fastest with the rank. layouts: for each dim of the param the mesh axis that it
    is divided by, a tuple of axes (the first divides coarsest), or None. A param may be missing on some ranks (pipeline
    stages). Raises ValueError when ranks that hold the same part differ by more than ``tolerance``, or a part is nowhere.
    """
    coordinates = list(itertools.product(*map(range, mesh.values())))
    if len(coordinates) != len(programs):
        raise ValueError(f"a mesh of {dict(mesh)} has {len(coordinates)} ranks, found {len(programs)} programs")
    whole = {}
    for name, layout in layouts.items():
        held = [(p, dict(zip(mesh, at))) for p, at in zip(programs, coordinates) if name in p.params]
        if not held or held[0][0].params[name].ndim != len(layout):
            found = f"shape {list(held[0][0].params[name].shape)}" if held else "no rank that holds it"
            raise ValueError(f"{name}: expected {len(layout)} dims, as its layout {tuple(layout)} has, found {found}")
        axes = [(a,) if isinstance(a, str) else tuple(a or ()) for a in layout]
        counts = [int(np.prod([mesh[a] for a in dim])) for dim in axes]
        part = held[0][0].params[name].shape
        array, filled = np.empty([n * c for n, c in zip(part, counts)], held[0][0].params[name].dtype), {}
        for program, at in held:
            index = tuple(int(np.ravel_multi_index([at[a] for a in dim], [mesh[a] for a in dim])) if dim else 0 for dim in axes)
            value, window = program.params[name], tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, part))
            if index in filled and not (worst := np.abs(array[window] - value).max(initial=0)) <= tolerance:
                raise ValueError(f"{name}: ranks {filled[index]} and {program.rank} hold the same part and differ by {worst:.3g}")
            filled.setdefault(index, program.rank)
            array[window] = value
        if len(filled) < np.prod(counts):
            raise ValueError(f"{name}: ranks hold {len(filled)} of its {int(np.prod(counts))} parts")
        whole[name] = array
    return whole
