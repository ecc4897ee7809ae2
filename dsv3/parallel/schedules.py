"""Pipeline schedules: which chunks a stage holds, what it does when, and how many micro-batches it has in flight.

A pipeline of P stages cuts the model into chunks of consecutive layers: one a stage, or V with interleaving.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

SCHEDULES = ("1f1b", "gpipe", "interleaved", "dualpipe", "dualpipev")


@dataclass(frozen=True)
class Pipeline:
    """How a model is dealt to the stages of ``mesh.pipe``. layers: of every chunk, in the order of the model; "even" as ``deal``.

    schedule, virtual: see ``chunks_of``. noop: positions of no-op layers, for ``deal``.
    """

    schedule: str = "1f1b"
    virtual: int = 1
    layers: str | tuple[int, ...] = "even"
    noop: tuple[int, ...] = ()

    def lengths(self, num_hidden_layers: int, pipe: int) -> tuple[int, ...]:
        """Main layers of each of the pipe * virtual chunks. ValueError for lengths that do not fit the model or the mesh."""
        chunks = pipe * self.virtual
        if self.layers == "even":
            return deal(num_hidden_layers, chunks, self.noop)
        if self.noop:
            raise ValueError(f"pipeline layers={self.layers!r}, no-op layers {self.noop}: these are for an even split; drop one")
        if isinstance(self.layers, str) or len(self.layers) != chunks or sum(self.layers) != num_hidden_layers:
            raise ValueError(f"pipeline layers={self.layers!r}: expected 'even', or {chunks} numbers (pipe={pipe}, "
                             f"{self.virtual} a stage) that add up to num_hidden_layers={num_hidden_layers}")
        return tuple(self.layers)


# -- schedules ---------------------------------------------------------------------------------------------------------
def check_schedule(schedule: str, pipe: int, virtual: int, micro_batches: int) -> None:
    """Refuse a pipeline that cannot run, with the numbers and a remedy."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}; expected one of {', '.join(SCHEDULES)}")
    needed = {"interleaved": "at least 2", "dualpipev": "2"}.get(schedule, "1")
    if virtual < 1 or (virtual > 1) != (needed != "1") or (needed == "2" and virtual != 2):
        raise ValueError(f"virtual={virtual} chunks a stage; schedule={schedule!r} has {needed}: change one of them")
    if schedule == "interleaved" and micro_batches % pipe:
        raise ValueError(f"micro_batches={micro_batches} is not divisible by pipe={pipe}, which interleaving needs; "
                         f"pick {-(-micro_batches // pipe) * pipe}")
    if schedule == "dualpipe" and (pipe % 2 or micro_batches % 2):
        raise ValueError(f"dualpipe works from both ends: pipe={pipe} and micro_batches={micro_batches} must be even")


def chunks_of(stage: int, pipe: int, virtual: int, schedule: str) -> tuple[int, ...]:
    """The chunks on a stage, in the order of the layers that they hold.

    Interleaved: every P-th (arXiv 2104.04473, section 2.2). DualPipe: stage s holds the chunks s and P - 1 - s of P, so
    every layer is on two stages (report section 3.2.1). DualPipeV folds 2 P chunks: s and 2 P - 1 - s.
    """
    if schedule == "dualpipe":
        return tuple(sorted((stage, pipe - 1 - stage)))
    if schedule == "dualpipev":
        return stage, 2 * pipe - 1 - stage
    return tuple(stage + v * pipe for v in range(virtual))


def in_flight(stage: int, pipe: int, virtual: int, micro_batches: int, schedule: str) -> tuple[tuple[int, ...], ...]:
    """Micro-batches whose activations a stage holds, for each chunk of ``chunks_of``: the states among which the peak is.

    GPipe: all M. 1F1B: min(M, P - s) for s = 0 ... P - 1. DualPipe: 1F1B from both ends at once, P + 1 together; DualPipeV
    the same over its 2 P chunks. Interleaved: stage s runs min(M V, 2 (P - s - 1) + (V - 1) P) chunk passes ahead, then one
    forward and one backward in turn, forwards in groups of P micro-batches chunk by chunk and backwards with the chunks
    reversed (Megatron's schedule): several states, none of which is the largest for every weighting of the chunks.
    """
    M, P, V = micro_batches, pipe, virtual
    if schedule == "gpipe":
        return ((M,),)
    if schedule == "1f1b":
        return ((min(M, P - stage),),)
    if schedule == "dualpipe":
        first = min(stage, P - 1 - stage)
        return ((min(M // 2, P - first), min(M // 2, first + 1)),)
    if schedule == "dualpipev":
        return ((min(M, 2 * P - stage), min(M, stage + 1)),)
    ahead = min(M * V, _ahead(stage, P, V))
    now, states = [0] * V, set()
    for k in range(M * V):
        now[k // P % V] += 1
        if k >= ahead or k == M * V - 1:
            states.add(tuple(now))
        if k >= ahead:
            now[V - 1 - (k - ahead) // P % V] -= 1
    return tuple(sorted(s for s in states if not any(o != s and all(a >= b for a, b in zip(o, s)) for o in states)))


def bubble(pipe: int, virtual: int, micro_batches: int, schedule: str) -> float:
    """Idle over useful time of a balanced pipeline: (P - 1) / (V M) (arXiv 2104.04473, section 2.2).

    For DualPipe and DualPipeV, whose stages work from both ends, (P / 2 - 1) / M and (P - 1) / (2 M), an estimate with
    equal forward and backward chunks and every pair of them overlapped.
    """
    if schedule == "dualpipe":
        return max(pipe / 2 - 1, 0) / micro_batches
    return (pipe - 1) / (virtual * micro_batches)


# -- the order of work -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Action:
    """A stage's forward or backward of one micro-batch through one of its chunks, which takes one tick."""

    tick: int
    stage: int
    kind: str  # "forward" or "backward"
    chunk: int
    micro: int


@functools.cache
def timeline(schedule: str, pipe: int, virtual: int, micro_batches: int) -> tuple[Action, ...]:
    """What every stage does when, by tick and then stage: at each tick the first thing it wants that is ready.

    GPipe, 1F1B and interleaved stages want one thing at a time, in their published order (``_order``). DualPipeV is 1F1B on
    2 P stages of which each rank plays two: a backward before a forward, the later chunk before the earlier, which never has
    more in flight than 1F1B there. Its pairs of forward and backward are not overlapped. Each takes a tick.
    Raises ValueError for what ``check_schedule`` refuses and for "dualpipe".
    """
    check_schedule(schedule, pipe, virtual, micro_batches)
    if schedule == "dualpipe":
        raise ValueError("schedule='dualpipe' keeps every layer on two stages and is planned for, not run; take 'dualpipev' with "
                         "virtual=2, which has the same bubble and holds every layer once")
    last, M = pipe * virtual - 1, micro_batches
    held = [chunks_of(stage, pipe, virtual, schedule) for stage in range(pipe)]
    counts = {(kind, c): 0 for kind in ("forward", "backward") for c in range(last + 1)}  # done before this tick
    orders = None if schedule == "dualpipev" else [_order(s, pipe, virtual, M, schedule) for s in range(pipe)]
    actions: list[Action] = []

    def wanted(stage: int) -> list[tuple[str, int, int]]:
        if orders:
            return orders[stage][:1]
        return [(kind, c, counts[kind, c]) for kind in ("backward", "forward") for c in held[stage][::-1]]

    def ready(kind: str, chunk: int, micro: int) -> bool:
        if kind == "forward":
            return micro < M and (chunk == 0 or counts["forward", chunk - 1] > micro)
        return counts["forward", chunk] > micro and (chunk == last or counts["backward", chunk + 1] > micro)

    tick = 0
    while len(actions) < 2 * M * (last + 1):
        now = [(stage, next((w for w in wanted(stage) if ready(*w)), None)) for stage in range(pipe)]
        for stage, action in now:
            if action is not None:
                actions.append(Action(tick, stage, *action))
                counts[action[:2]] += 1
                if orders:
                    del orders[stage][0]
        if all(action is None for _, action in now):
            raise RuntimeError(f"{schedule}, pipe={pipe}, virtual={virtual}, micro_batches={M}: no stage goes on at tick {tick}")
        tick += 1
    return tuple(actions)


def _order(stage: int, pipe: int, virtual: int, micro_batches: int, schedule: str) -> list[tuple[str, int, int]]:
    """(kind, chunk, micro) of a stage in turn: some forwards ahead, one forward and one backward, the backwards left over."""
    M, P, V = micro_batches, pipe, virtual
    group = P if V > 1 else 1  # micro-batches that go through a chunk before the stage's next chunk has its turn
    forwards, backwards = ([(kind, stage + (v if kind == "forward" else V - 1 - v) * P, first + i)
                            for first in range(0, M, group) for v in range(V) for i in range(group)]
                           for kind in ("forward", "backward"))
    ahead = {"gpipe": M, "1f1b": P - stage - 1}.get(schedule, _ahead(stage, P, V))
    ahead = min(M * V, ahead)
    steady = [action for pair in zip(forwards[ahead:], backwards) for action in pair]
    return forwards[:ahead] + steady + backwards[M * V - ahead:]


def _ahead(stage: int, pipe: int, virtual: int) -> int:
    """Chunk passes by which an interleaved stage runs ahead (arXiv 2104.04473; Megatron's warm-up)."""
    return 2 * (pipe - stage - 1) + (virtual - 1) * pipe


@dataclass(frozen=True)
class Task:
    """A stage's next thing to do. kind: "forward" or "backward" of (chunk, micro); "send" or "receive", to or from the stage
    ``peer``, of what a neighbouring chunk made for (chunk, micro): its input "x", or the gradient "dy" of its output."""

    kind: str
    chunk: int
    micro: int
    what: str = ""
    peer: int = -1


def tasks(stage: int, actions: Sequence[Action]) -> tuple[Task, ...]:
    """A stage's part of a ``timeline`` with its transfers, each after the tick that made what it moves.

    All stages make the transfers that concern them in one order, by tick and then sender. So the earliest that is not made yet
    is the next one for both its stages, and nothing can wait for ever, even where a send waits for its receiver.
    """
    home, last = {a.chunk: a.stage for a in actions}, max(a.chunk for a in actions)
    out: list[tuple[tuple[int, int, int], Task]] = []
    for a in actions:
        if a.stage == stage:
            out.append(((a.tick, 0, 0), Task(a.kind, a.chunk, a.micro)))
        what, to = ("x", a.chunk + 1) if a.kind == "forward" else ("dy", a.chunk - 1)
        if 0 <= to <= last and home[to] != a.stage and stage in (a.stage, home[to]):
            kind, peer = ("send", home[to]) if stage == a.stage else ("receive", a.stage)
            out.append(((a.tick, 1, a.stage), Task(kind, to, a.micro, what, peer)))
    return tuple(task for _, task in sorted(out, key=lambda item: item[0]))


# -- dealing layers ----------------------------------------------------------------------------------------------------
def deal(layers: int, chunks: int, noop: Sequence[int] = ()) -> tuple[int, ...]:
    """Real layers of each chunk when ``layers`` and the no-op layers are dealt in equal runs.

    noop: positions of the no-op layers in the padded numbering, as MindSpeed's ``--noop-layers``: V3's 61 layers with
    (61, 62, 63) are 64. Without them, and with layers that do not divide, the first chunks get one more. Raises ValueError
    for positions that do not exist and padded numbers that do not divide.
    """
    total = layers + len(noop)
    if not noop:
        return tuple(layers // chunks + (c < layers % chunks) for c in range(chunks))
    if len(set(noop)) < len(noop) or min(noop) < 0 or max(noop) >= total:
        raise ValueError(f"no-op layers {', '.join(map(str, noop))}: expected different positions from 0 to {total - 1}, "
                         f"{layers} layers and {len(noop)} no-ops together")
    if total % chunks:
        raise ValueError(f"{layers} layers and {len(noop)} no-op layers, {total}, are not divisible by {chunks} chunks; "
                         f"give {-layers % chunks} no-op layers")
    each = total // chunks
    return tuple(each - sum(i // each == c for i in noop) for c in range(chunks))
