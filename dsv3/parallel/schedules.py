"""Pipeline schedules: which chunks a stage holds, and how many micro-batches it has in flight.

A pipeline of P stages cuts the model into chunks of consecutive layers: one a stage, or V with interleaving.
"""
from __future__ import annotations

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
        if isinstance(self.layers, str) or len(self.layers) != chunks or sum(self.layers) != num_hidden_layers:
            raise ValueError(f"pipeline layers={self.layers!r}: expected 'even', or {chunks} numbers (pipe={pipe}, {self.virtual} "
                             f"a stage) that add up to num_hidden_layers={num_hidden_layers}")
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
    ahead = min(M * V, 2 * (P - stage - 1) + (V - 1) * P)
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
