"""Steps that Python drives over several compiled graphs: recorded on a simulated rank, replayed on all ranks in lockstep.

``make_train_step(mesh=...)`` is Python that calls graphs, hands results of one to the next and lets them update their
arguments in place. In a simulated rank's process ``recorder`` stands in for ``transform.run_graph``: it compiles every graph
(or exports it), counts its calls, and hands back blank tensors. ``replay`` then runs the same Python for every rank in one
ordinary process, a thread each, and each call of a graph is interpreted from what was recorded: the graphs compiled for
Ascend and the Python between them together give the numbers that the cluster would have computed.
"""
from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint
from mindspore.communication import get_group_size, get_rank, get_world_rank_from_group_rank

from .. import transform
from . import groups, lockstep
from .ir import last_graph, read_collectives, result_types
from .mindir import BFLOAT16, DTYPES, FLOAT16, Type
from .simulate import GraphReport, Report, hush


# -- in a simulated rank's process -------------------------------------------------------------------------------------
def recorder(export: bool, planning: bool, found: list[GraphReport]) -> Callable:
    """A stand-in for ``transform.run_graph`` that keeps in ``found`` what it compiles, in the order of the first calls.

    export: write every graph as graph_<n>.mindir instead of compiling it to the end. planning: MindSpore's dry run hands back
    results whose memory it accounts for; otherwise there are none, and blank ones are made.
    """
    places: dict[int, int] = {}
    types: list[tuple] = []

    def run(graph: transform.Graph, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Any]:
        flat: Any = None
        if graph.number not in places:
            k = places[graph.number] = len(found)
            hush()  # results of the graphs before have made streams
            start, file = time.perf_counter(), f"graph_{k}.mindir" if export else None
            with transform.tracing(graph.number):
                if file:  # not by its whole path, in which MindSpore allows few characters
                    ms.export(graph.function, *tensors, file_name=file, file_format="MINDIR")
                else:
                    flat = graph.function(*tensors)
                    ms.runtime.synchronize()
            seconds, text = time.perf_counter() - start, last_graph(Path("ir"))
            found.append(GraphReport(graph.name, graph.literals, transform.outline_of(graph), 0, seconds,
                                     read_collectives(text, get_rank(), ranks_of), file and Path(file).absolute()))
            types.append(result_types(text))
        elif planning:
            flat = graph.function(*tensors)
        k = places[graph.number]
        found[k] = found[k].again()
        if not planning:
            flat = tuple(mint.empty(shape, dtype=getattr(ms, _dtype(name))) for name, shape in types[k])
        return flat, found[k].outline

    return run


def _dtype(name: str) -> str:
    return "bool_" if name == "Bool" else name.lower()


def ranks_of(group: str) -> tuple[int, ...]:
    """Global ranks of a communication group of this process, in its order."""
    return tuple(get_world_rank_from_group_rank(group, i) for i in range(get_group_size(group)))


# -- all ranks together ------------------------------------------------------------------------------------------------
def replay(function: Callable[[], Any], reports: Sequence[Report]) -> list[Any]:
    """``function()`` as every rank, its graphs interpreted from what ``simulate(..., export=True)`` recorded of that rank.

    function must call the graphs of the recorded one, in the order in which it called them first, as often as it likes. It
    asks ``groups.own_rank()`` for its rank. reports: rank i at place i. Returns what it returned on each rank. Raises what it
    raises, and what ``lockstep.run`` raises: for ranks that meet in different collectives, or wait for ever.
    """
    programs = functools.cache(lambda rank, k: lockstep.load(reports[rank].graphs[k].program, rank))

    def body(rank: int, meet: Callable) -> Any:
        places: dict[int, int] = {}

        def run(graph: transform.Graph, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Any]:
            k, recorded = places.setdefault(graph.number, len(places)), reports[rank].graphs
            if k >= len(recorded) or (recorded[k].name, recorded[k].literals) != (graph.name, graph.literals):
                known = recorded[k].name if k < len(recorded) else f"nothing more than {len(recorded)} graphs"
                raise RuntimeError(f"rank {rank} calls {graph.name} as its graph {k}, of which {known} was recorded, or other "
                                   f"arguments: replay the function that was recorded")
            program = programs(rank, k)
            with np.errstate(all="ignore"):
                result, assigned = _drain(lockstep.execute(program, [array_of(t) for t in tensors], len(reports)), meet)
            for i, array in assigned.items():
                tensors[i].assign_value(Tensor(array, dtype=tensors[i].dtype))
            return tuple(_tensor(x, kind) for x, kind in zip(result, program.results, strict=True)), recorded[k].outline

        _threads.run = run
        groups.stand_for(rank)
        return function()

    before, transform.runner = transform.runner, lambda graph, tensors: _threads.run(graph, tensors)
    try:
        return lockstep.together([_thread(functools.partial(body, rank), rank) for rank in range(len(reports))])
    finally:
        transform.runner = before


_threads = threading.local()


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor's values as lockstep keeps them: float32 for the narrow floats."""
    return (tensor.float() if tensor.dtype in (ms.bfloat16, ms.float16) else tensor).asnumpy()


def _tensor(array: np.ndarray, kind: Type) -> Tensor:
    name = {FLOAT16: "float16", BFLOAT16: "bfloat16", 9: "bool_"}.get(kind.dtype) or DTYPES[kind.dtype]
    return Tensor(np.asarray(array), dtype=getattr(ms, name))


def _drain(steps: Generator, meet: Callable) -> Any:
    """Run a generator of arrivals to its end, with ``meet`` giving the answers."""
    answer = None
    while True:
        try:
            arrival = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = meet(arrival)


class _Abandoned(BaseException):
    """Ends the thread of a rank whose others have failed."""


def _thread(body: Callable[[Callable], Any], rank: int) -> Generator[lockstep.Arrival, Any, Any]:
    """``body(meet)`` in a thread, as a generator that yields what is given to ``meet``; one of the two runs at a time."""
    out, into = queue.SimpleQueue(), queue.SimpleQueue()

    def meet(arrival: lockstep.Arrival) -> Any:
        out.put(("arrival", arrival))
        kind, answer = into.get()
        if kind == "end":
            raise _Abandoned
        return answer

    def run() -> None:
        try:
            out.put(("result", body(meet)))
        except BaseException as error:  # raised again where the generator runs
            out.put(("error", error))

    thread = threading.Thread(target=run, name=f"rank {rank}", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = out.get()
            if kind == "result":
                return value
            if kind == "error":
                raise value
            into.put(("answer", (yield value)))
    finally:
        into.put(("end", None))
        thread.join()
