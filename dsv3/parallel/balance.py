"""Pipelines: the split of layers into stages that is fastest in a budget of memory.

Everything here is small integers and exact; the numbers of ``memory.Cost`` come in as they are.
"""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, product
from operator import itemgetter

from .memory import Cost, with_part


# -- dealing layers ----------------------------------------------------------------------------------------------------
def deal_evenly(layers: int, cost: float, ends: Sequence[float], stages: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Layers of each chunk such that the slowest stage is as fast as can be when every layer costs ``cost``.

    ends: what each chunk costs without layers; stages: the chunks of each stage (a chunk may be on two). One layer at a
    time goes to the least loaded stage and there to its least loaded chunk, which is exact for layers of equal cost.
    """
    lengths = [0] * len(ends)
    loads = [sum(ends[c] for c in held) for held in stages]
    for _ in range(layers):
        stage = min(range(len(stages)), key=lambda s: (loads[s], s))
        chunk = min(stages[stage], key=lambda c: (ends[c] + lengths[c] * cost, c))
        lengths[chunk] += 1
        for s, held in enumerate(stages):
            loads[s] += cost * (chunk in held)
    return tuple(lengths)


# -- recompute ---------------------------------------------------------------------------------------------------------
Option = tuple[float, int, int, tuple[int, ...]]  # extra FLOPs, the two numbers of ``memory.with_part``, mode of each part


@cache
def options(costs: tuple[Cost, ...], modes: tuple[int, ...] = (0, 1, 2), kept: bool = False) -> tuple[Option, ...]:
    """The choices of a recompute mode for each part of a chunk of which none is better in every number, fastest first.

    modes: indices into ``memory.MODES`` that may be used; kept: of ``plan.Setting``. Exact: more parts after some of which one
    choice is better in every number leave it better.
    """
    if not costs:
        return ((0.0, 0, 0, ()),)
    *before, cost = costs
    found = []
    for extra, saved, peak, chosen in reversed(options(tuple(before), modes, kept)):
        for mode in modes:
            found.append((extra + cost.extra[mode], *with_part(saved, peak, cost, mode, kept), (*chosen, mode)))
    return _undominated(found)


def _undominated(found: list[Option]) -> tuple[Option, ...]:
    """Fastest first: one that is slower must save less, or have a lower peak than those that save as little."""
    out: list[Option] = []
    peaks: list[int] = []  # of those so far that are best for some peak, ascending; what they save descends
    saves: list[int] = []
    for option in sorted(found, key=itemgetter(0, 1, 2)):  # of equal ones the first, which has the higher modes at the front
        _, saved, peak, _ = option
        i = bisect_right(peaks, peak)
        if i and saves[i - 1] <= saved:
            continue
        worse = i
        while worse < len(saves) and saves[worse] >= saved:
            worse += 1
        peaks[i:worse], saves[i:worse] = [peak], [saved]
        out.append(option)
    return tuple(out)


def in_flight_bytes(states: Sequence[tuple[int, ...]], chunks: Sequence[tuple[int, int]], kept: bool) -> int:
    """Most bytes of activations on a stage. chunks: the numbers of ``memory.with_part`` of each; states: of ``in_flight``.

    Kept activations: what its chunks save in each state, and working bytes. Otherwise one chunk at a time is differentiated.
    """
    top = max(peak for _, peak in chunks)
    return top + max(sum(n * saved for n, (saved, _) in zip(state, chunks)) for state in states) if kept else top


def choose(chunks: Sequence[Sequence[Cost]], states: Sequence[tuple[int, ...]], room: float, modes: Sequence[int] = (0, 1, 2),
           kept: bool = False) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """(extra FLOPs, mode of every part) with which a stage's activations fit in ``room`` bytes at the least extra FLOPs; when
    nothing fits, those that need the fewest bytes. Exact: all combinations of the ``options`` of its chunks are looked at."""
    def rank(combination: tuple[Option, ...]) -> tuple[float, float]:
        need = in_flight_bytes(states, [option[1:3] for option in combination], kept)
        return max(need - room, 0), sum(option[0] for option in combination)

    best = min(product(*(options(tuple(chunk), tuple(modes), kept) for chunk in chunks)), key=rank)
    return sum(option[0] for option in best), tuple(option[3] for option in best)


# -- the split ---------------------------------------------------------------------------------------------------------
def split(n: int, parts: int, cost: Callable[[int, int, int], float],
          floor: Callable[[int, int, int], float]) -> tuple[int, ...] | None:
    """Deal items 0 ... n - 1 to ``parts`` consecutive runs of at least one: the dearest run as cheap as can be, and of all
    such splits the one whose costs add up to the least. Returns the lengths; None when every split has an infinite cost.

    cost(part, i, j) is that of the items i ... j - 1 in a part; floor(part, i, j) is a lower bound on it that grows with the
    run. Dynamic programming over (parts dealt, items dealt), which is exact because the maximum and, below a given
    maximum, the sum over the first parts do not depend on how the rest is dealt.
    """
    costs: dict[tuple[int, int, int], float] = {}

    def dear(s: int, i: int, j: int) -> float:
        if (s, i, j) not in costs:
            costs[s, i, j] = cost(s, i, j)
        return costs[s, i, j]

    def solve(join: Callable[[float, float], float], limit: float) -> tuple[float, tuple[int, ...]]:
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for s in range(parts):
            after: dict[int, tuple[float, tuple[int, ...]]] = {}
            for j in [n] if s == parts - 1 else range(s + 1, n - (parts - s - 1) + 1):
                found = (math.inf, ())
                for i in range(j - 1, s - 1, -1):
                    bound = floor(s, i, j)
                    if bound > limit or bound >= found[0]:
                        break  # longer runs are dearer still
                    if i in best and (mine := dear(s, i, j)) <= limit and (total := join(best[i][0], mine)) < found[0]:
                        found = total, (*best[i][1], j - i)
                if found[0] < math.inf:
                    after[j] = found
            best = after
        return best.get(n, (math.inf, ()))

    dearest, _ = solve(max, math.inf)
    if dearest == math.inf:
        return None
    return solve(lambda a, b: a + b, dearest)[1]


def best_split(n: int, stages: int, tried: Callable[[int, int, int, float], tuple[int, float]],
               floor: Callable[[int, int, int], tuple[int, float]], budget: float) -> tuple[int, ...]:
    """Layers of each stage such that every stage fits in ``budget`` bytes and the slowest is as fast as can be.

    tried(s, i, j, budget) is (bytes, time) of stage s with the layers i ... j - 1, as fast as it can be in a budget, or as small
    when it cannot; floor(s, i, j) are lower bounds on both that grow with the run. Raises ValueError with the smallest
    budget that would do when none fits.
    """
    def time(s: int, i: int, j: int) -> float:
        size, seconds = tried(s, i, j, budget)
        return seconds if size <= budget else math.inf

    def least(s: int, i: int, j: int) -> float:
        size, seconds = floor(s, i, j)
        return seconds if size <= budget else math.inf

    if n < stages:
        raise ValueError(f"{n} layers cannot fill pipe={stages} stages; pick pipe of at most {n}")
    found = split(n, stages, time, least)
    if found is None:
        lean = split(n, stages, lambda s, i, j: tried(s, i, j, 0)[0], lambda s, i, j: floor(s, i, j)[0])
        ends = list(accumulate(lean, initial=0))
        need = max(tried(s, ends[s], ends[s + 1], 0)[0] for s in range(stages))
        raise ValueError(f"no split of {n} layers over {stages} stages fits in {budget / 1e9:.2f} GB: the smallest need is "
                         f"{need / 1e9:.2f} GB; raise the budget, allow more recompute, or use more ranks or ZeRO")
    return found
