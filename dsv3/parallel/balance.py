"""Pipelines: the split of layers into stages that is fastest in a budget of memory.

Everything here is small integers and exact; the numbers of ``memory.Cost`` come in as they are.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product

from .memory import MODES, Cost


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
Option = tuple[float, int, int, tuple[int, ...]]  # (extra FLOPs, saved bytes a micro-batch, working bytes, mode of each part)


def options(costs: Sequence[Cost], modes: Sequence[int] = (0, 1, 2)) -> list[Option]:
    """The choices of a recompute mode for each part of a chunk of which none is better in every number, fastest first.

    Parts of equal cost are interchangeable, so only how many of them take each mode is enumerated; the first take the
    higher modes. modes: indices into ``memory.MODES`` that may be used.
    """
    places: dict[tuple, list[int]] = {}
    for i, cost in enumerate(costs):
        places.setdefault(_key(cost), []).append(i)
    order = [i for at in places.values() for i in at]
    out = []
    for extra, saved, working, chosen in _options(tuple((key, len(at)) for key, at in places.items()), tuple(modes)):
        of = dict(zip(order, chosen))
        out.append((extra, saved, working, tuple(of[i] for i in range(len(costs)))))
    return out


def _key(cost: Cost) -> tuple:
    return cost.extra, cost.saved, cost.working


@cache
def _options(groups: tuple[tuple[tuple, int], ...], modes: tuple[int, ...]) -> tuple[Option, ...]:
    """``options`` of groups (key, number of parts), with the modes of the parts group by group."""
    if not groups:
        return ((0.0, 0, 0, ()),)
    (extra, saved, working), n = groups[0]
    choices = modes if any(extra) or len(set(saved)) > 1 else modes[:1]
    found = []
    for counts in product(range(n + 1), repeat=len(choices)):
        if sum(counts) != n:
            continue
        pairs = tuple(zip(choices, counts))
        mine = (sum(c * extra[m] for m, c in pairs), sum(c * saved[m] for m, c in pairs),
                max((working[m] for m, c in pairs if c), default=0), tuple(m for m, c in reversed(pairs) for _ in range(c)))
        for e, s, w, rest in _options(groups[1:], modes):
            found.append((mine[0] + e, mine[1] + s, max(mine[2], w), mine[3] + rest))
    return _undominated(found)


def _undominated(found: list[Option]) -> tuple[Option, ...]:
    out: list[Option] = []
    least: dict[int, int] = {}  # working bytes -> least saved bytes so far
    for option in sorted(found):
        if not any(w <= option[2] and s <= option[1] for w, s in least.items()):
            least[option[2]] = option[1]
            out.append(option)
    return tuple(out)


def peak(states: Sequence[tuple[int, ...]], saved: Sequence[int], working: Sequence[int]) -> int:
    """Most bytes of activations on a stage: the saved bytes of its chunks in each state of ``in_flight``, and working bytes."""
    return max(sum(n * s for n, s in zip(state, saved)) for state in states) + max(working)


def choose(chunks: Sequence[Sequence[Cost]], states: Sequence[tuple[int, ...]], room: float,
           modes: Sequence[int] = (0, 1, 2)) -> tuple[float, tuple[tuple[int, ...], ...]] | None:
    """The least extra FLOPs with which a stage's activations fit in ``room`` bytes, and the mode of every part; None if none.

    Exact: of each chunk only dominated choices are left out, and all combinations over the chunks are looked at.
    """
    lists = [options(chunk, modes) for chunk in chunks]
    best = None
    for combination in product(*lists):
        extra = sum(o[0] for o in combination)
        if best is not None and extra >= best[0]:
            if len(lists) == 1:
                break  # fastest first
            continue
        if peak(states, [o[1] for o in combination], [o[2] for o in combination]) <= room:
            best = extra, tuple(o[3] for o in combination)
    return best


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


def best_split(first: Sequence[Cost], layers: Sequence[Cost], last: Sequence[Cost], more: Sequence[int], pipe: int,
               flights: Sequence[tuple[tuple[int, ...], ...]], budget: float, modes: Sequence[int] = (0, 1, 2), *,
               again: bool = False) -> tuple[int, ...]:
    """Layers of each stage such that every stage fits in ``budget`` bytes and the slowest is as fast as can be.

    first, last: what the first and the last stage hold beside layers; more: bytes of each stage beside its parts';
    flights: ``in_flight`` of each stage, for one chunk a stage. A stage's time is three forwards and the least recompute
    that fits; with again four forwards, but on the last, and the gradients of a backward pass are beside what stays.
    Raises ValueError with the smallest budget that would do when none fits.
    """
    forward, static = [0.0], [0]
    kinds = list(dict.fromkeys(_key(c) for c in layers))
    number = {kind: [0] for kind in kinds}  # of each kind among the first layers
    for c in layers:
        forward.append(forward[-1] + c.forward)
        static.append(static[-1] + c.static + c.made * again)
        for kind in kinds:
            number[kind].append(number[kind][-1] + (kind == _key(c)))
    ends = {s: (*(first if s == 0 else ()), *(last if s == pipe - 1 else ())) for s in range(pipe)}
    passes = {s: 4 if again and s < pipe - 1 else 3 for s in ends}
    time = {s: passes[s] * sum(c.forward for c in ends[s]) for s in ends}
    kept = {s: sum(c.static + c.made * again for c in ends[s]) + more[s] for s in ends}

    def choices(s: int, i: int, j: int) -> Iterator[tuple[float, int]]:
        counts = ((kind, number[kind][j] - number[kind][i]) for kind in kinds)
        groups = (*((kind, n) for kind, n in counts if n), *((_key(c), 1) for c in ends[s]))
        return ((extra, peak(flights[s], [saved], [working])) for extra, saved, working, _ in _options(groups, tuple(modes)))

    def fastest(s: int, i: int, j: int) -> float:
        room = budget - stays(s, i, j)
        return base(s, i, j) + next((extra for extra, need in choices(s, i, j) if need <= room), math.inf)

    def base(s: int, i: int, j: int) -> float:
        return time[s] + passes[s] * (forward[j] - forward[i]) if stays(s, i, j) <= budget else math.inf

    def stays(s: int, i: int, j: int) -> int:
        return kept[s] + static[j] - static[i]

    def smallest(s: int, i: int, j: int) -> int:
        return stays(s, i, j) + min(need for _, need in choices(s, i, j))

    if len(layers) < pipe:
        raise ValueError(f"{len(layers)} layers cannot fill pipe={pipe} stages; pick pipe of at most {len(layers)}")
    found = split(len(layers), pipe, fastest, base)
    if found is None:
        lean = split(len(layers), pipe, smallest, stays)
        starts = [sum(lean[:s]) for s in range(pipe)]
        need = max(smallest(s, i, i + n) for s, (i, n) in enumerate(zip(starts, lean)))
        allowed = " or ".join(MODES[m] for m in modes)
        raise ValueError(f"no split of {len(layers)} layers over {pipe} stages fits in {budget / 1e9:.2f} GB with recompute "
                         f"{allowed}: the smallest need is {need / 1e9:.2f} GB; raise the budget, or use more ranks or ZeRO")
    return found
