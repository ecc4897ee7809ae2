"""Pipelines: schedules against a run of them, and the best split and recompute against trying all.

Planted faults this file was seen to catch, one at a time: one micro-batch more in flight; too short a warm-up and backward chunks
in order when interleaving; DualPipeV not folded; no-ops dealt by remainder; working bytes left out of a comparison or of the
peak; the last parts recomputed first; ties of splits, or splits, missed; the sum before the slowest; the copy of the embedding
not in the budget; a chunk on two stages that loads one; layers dealt to the first stage.
"""
import dataclasses
import itertools
import random
import re
from math import inf

import pytest

from dsv3.parallel.balance import best_split, choose, deal_evenly, options, peak
from dsv3.parallel.memory import Cost
from dsv3.parallel.schedules import bubble, chunks_of, deal, in_flight


# -- schedules ---------------------------------------------------------------------------------------------------------
def run_pipeline(P, V, M, orders):
    """Peak states of every stage when each runs its list of (is_forward, micro-batch, chunk) as soon as it can; also proves
    that the orders do not deadlock."""
    done, at = set(), [0] * P
    held = [[0] * V for _ in range(P)]
    states = [set() for _ in range(P)]
    last = P * V - 1
    while any(at[s] < len(orders[s]) for s in range(P)):
        moved = False
        for s in range(P):
            while at[s] < len(orders[s]):
                forward, m, v = orders[s][at[s]]
                c = v * P + s
                needs = ("F", m, c - 1) if forward and c else None
                if not forward:
                    needs = ("B", m, c + 1) if c < last else ("F", m, c)
                if needs is not None and needs not in done:
                    break
                done.add(("F" if forward else "B", m, c))
                held[s][v] += 1 if forward else -1
                states[s].add(tuple(held[s]))
                at[s] += 1
                moved = True
        assert moved, "deadlock"
    assert len(done) == 2 * P * V * M
    return [tuple(sorted(a for a in st if not any(b != a and all(x >= y for x, y in zip(b, a)) for b in st))) for st in states]


def orders(P, V, M, ahead):
    """Forwards in groups of P micro-batches chunk by chunk, backwards with the chunks reversed, ``ahead(s)`` forwards first."""
    groups = [range(g, min(g + P, M)) for g in range(0, M, P)]
    F = [(True, m, v) for g in groups for v in range(V) for m in g]
    B = [(False, m, v) for g in groups for v in reversed(range(V)) for m in g]
    out = []
    for s in range(P):
        w = min(ahead(s), len(F))
        steady = [x for pair in zip(F[w:], B) for x in pair]
        out.append(F[:w] + steady + B[len(F) - w:])
    return out


@pytest.mark.parametrize("P, M", [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (4, 9), (5, 20)])
def test_in_flight_of_1f1b_and_gpipe_is_what_running_them_shows(P, M):
    for schedule, ahead in (("1f1b", lambda s: P - s - 1), ("gpipe", lambda s: M)):
        seen = run_pipeline(P, 1, M, orders(P, 1, M, ahead))
        assert seen == [in_flight(s, P, 1, M, schedule) for s in range(P)]


@pytest.mark.parametrize("P, V, M", [(2, 2, 2), (2, 2, 8), (4, 2, 4), (4, 2, 12), (4, 3, 8), (3, 4, 9)])
def test_in_flight_of_interleaving_is_what_running_it_shows(P, V, M):
    seen = run_pipeline(P, V, M, orders(P, V, M, lambda s: 2 * (P - s - 1) + (V - 1) * P))
    assert seen == [in_flight(s, P, V, M, "interleaved") for s in range(P)]


def test_in_flight_of_the_two_ended_schedules():
    for P, M in ((4, 40), (16, 120)):
        for s in range(P):
            both, = in_flight(s, P, 1, M, "dualpipe")
            assert sum(both) == P + 1 and both == in_flight(P - 1 - s, P, 1, M, "dualpipe")[0]  # DualPipe's published P + 1
            folded, = in_flight(s, P, 2, M, "dualpipev")
            assert sum(folded) == 2 * P + 1 and folded[0] == 2 * P - s
    assert in_flight(0, 4, 1, 2, "dualpipe") == ((1, 1),)


def test_chunks_are_on_every_stage_as_often_as_the_schedule_says():
    for schedule, P, V in (("1f1b", 4, 1), ("gpipe", 3, 1), ("interleaved", 4, 3), ("dualpipev", 8, 2), ("dualpipe", 6, 1)):
        all_chunks = sorted(itertools.chain(*(chunks_of(s, P, V, schedule) for s in range(P))))
        assert all_chunks == sorted([*range(P * V)] * (2 if schedule == "dualpipe" else 1))
    assert chunks_of(0, 8, 2, "dualpipev") == (0, 15) and chunks_of(3, 16, 1, "dualpipe") == (3, 12)
    assert chunks_of(1, 4, 3, "interleaved") == (1, 5, 9)
    assert bubble(16, 1, 32, "1f1b") == 15 / 32 and bubble(4, 2, 8, "interleaved") == 3 / 16
    assert bubble(16, 1, 120, "dualpipe") == 7 / 120


def test_deal():
    assert deal(61, 16) == (4,) * 13 + (3,) * 3 and deal(3, 2) == (2, 1) and deal(2, 4) == (1, 1, 0, 0)
    assert deal(61, 16, (61, 62, 63)) == (4,) * 15 + (1,)
    assert deal(61, 16, (47, 62, 63)) == (*[4] * 11, 3, 4, 4, 4, 2)  # MindSpeed's example; 47 is the last of chunk 11
    assert deal(3, 4, (0,)) == (0, 1, 1, 1)


# -- the best split ----------------------------------------------------------------------------------------------------
def random_cost(rng, modes=3):
    saved = sorted((rng.randrange(1, 60) for _ in range(3)), reverse=True)
    extra = (0.0, *sorted(float(rng.randrange(0, 9)) for _ in range(2)))
    return Cost(rng.randrange(20), rng.randrange(20), rng.randrange(20), float(rng.randrange(1, 12)), tuple(saved), extra,
                tuple(rng.randrange(30) for _ in range(3)))


def cheapest(held, static, n, budget, modes):
    """Least extra FLOPs of one stage by trying every mode of every part."""
    best = inf
    for choice in itertools.product(modes, repeat=len(held)):
        need = static + n * sum(c.saved[m] for c, m in zip(held, choice)) + max(c.working[m] for c, m in zip(held, choice))
        if need <= budget:
            best = min(best, sum(c.extra[m] for c, m in zip(held, choice)))
    return best


def brute_force(first, layers, last, more, P, M, budget, modes, again):
    """(slowest, sum of all) of the best split by trying all; (inf, inf) when none fits."""
    best = inf, inf
    for cuts in itertools.combinations(range(1, len(layers)), P - 1):
        bounds, times = (0, *cuts, len(layers)), []
        for s in range(P):
            held = [*(first if s == 0 else []), *layers[bounds[s]:bounds[s + 1]], *(last if s == P - 1 else [])]
            static = sum(c.static for c in held) + more[s]
            passes = 4 if again and s < P - 1 else 3
            times.append(passes * sum(c.forward for c in held) + cheapest(held, static, min(M, P - s), budget, modes))
        best = min(best, (max(times), sum(times)))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_the_split_is_as_good_as_the_best_of_all(seed):
    rng = random.Random(seed)
    L, P, M = rng.randrange(3, 7), rng.randrange(1, 4), rng.randrange(1, 6)
    kinds = [random_cost(rng) for _ in range(3)]
    layers = [kinds[0] if i < 1 else kinds[1] for i in range(L)] if seed % 2 else [random_cost(rng) for _ in range(L)]
    first, last, more, again = [random_cost(rng)], [kinds[2]], [rng.randrange(30) for _ in range(P)], seed % 3 == 0
    modes = rng.choice([(0, 1, 2), (0, 2), (1,), (0,)])
    flights = [in_flight(s, P, 1, M, "1f1b") for s in range(P)]
    budgets = sorted(rng.randrange(60, 800) for _ in range(4))
    for budget in budgets:
        want = brute_force(first, layers, last, more, P, M, budget, modes, again)
        if want[0] == inf:
            with pytest.raises(ValueError, match="no split .* the smallest need is"):
                best_split(first, layers, last, more, P, flights, budget, modes, again=again)
            continue
        lengths = best_split(first, layers, last, more, P, flights, budget, modes, again=again)
        assert sum(lengths) == L and min(lengths) >= 1 and len(lengths) == P
        starts, times = [sum(lengths[:s]) for s in range(P)], []
        for s in range(P):
            held = [*(first if s == 0 else []), *layers[starts[s]:starts[s] + lengths[s]], *(last if s == P - 1 else [])]
            static = sum(c.static for c in held) + more[s]
            extra, (chosen,) = choose([held], flights[s], budget - static, modes)
            assert extra == sum(c.extra[m] for c, m in zip(held, chosen)) and set(chosen) <= set(modes)
            assert static + peak(flights[s], [sum(c.saved[m] for c, m in zip(held, chosen))],
                                 [c.working[m] for c, m in zip(held, chosen)]) <= budget
            times.append((4 if again and s < P - 1 else 3) * sum(c.forward for c in held) + extra)
        assert (max(times), sum(times)) == want


@pytest.mark.parametrize("seed", range(8))
def test_the_smallest_need_is_exact(seed):
    rng = random.Random(seed)
    layers, P = [dataclasses.replace(random_cost(rng), weights=10**7 * rng.randrange(1, 9)) for _ in range(5)], 3
    args = [random_cost(rng)], layers, [random_cost(rng)], [0, 0, 7], P, [in_flight(s, P, 1, 4, "1f1b") for s in range(P)]
    with pytest.raises(ValueError, match="no split") as refused:
        best_split(*args, 1)
    need = float(re.search(r"smallest need is ([0-9.]+) GB", str(refused.value))[1]) * 1e9
    best_split(*args, need + 5.1e6)  # the message rounds to 10 MB
    with pytest.raises(ValueError, match="no split"):
        best_split(*args, need - 5.1e6)


@pytest.mark.parametrize("seed", range(20))
def test_recompute_over_several_chunks_is_as_good_as_the_best_of_all(seed):
    rng = random.Random(seed)
    kinds = [random_cost(rng) for _ in range(2)]
    chunks = [[rng.choice(kinds) for _ in range(rng.randrange(0, 3))] for _ in range(2)]
    states = in_flight(rng.randrange(3), 3, 2, 6, "interleaved")
    for room in (50, 200, 500, 1000):
        best = inf
        flat = [c for chunk in chunks for c in chunk]
        for choice in itertools.product(range(3), repeat=len(flat)):
            saved = [sum(c.saved[m] for c, m in list(zip(flat, choice))[:len(chunks[0])]),
                     sum(c.saved[m] for c, m in list(zip(flat, choice))[len(chunks[0]):])]
            need = max(sum(n * b for n, b in zip(st, saved)) for st in states)
            need += max((c.working[m] for c, m in zip(flat, choice)), default=0)
            if need <= room:
                best = min(best, sum(c.extra[m] for c, m in zip(flat, choice)))
        found = choose(chunks, states, room)
        assert (inf if found is None else found[0]) == best


@pytest.mark.parametrize("schedule, P, V", [("interleaved", 2, 2), ("interleaved", 3, 2), ("dualpipe", 4, 1),
                                            ("dualpipev", 2, 2)])
def test_layers_over_several_chunks_are_dealt_as_well_as_can_be(schedule, P, V):
    stages = [chunks_of(s, P, V, schedule) for s in range(P)]
    for L, head in ((3, 0.0), (5, 2.5), (7, 4.0), (6, 9.0)):
        ends = [0.5, *[0.0] * (P * V - 2), head]

        def slowest(lengths, ends=ends):
            return max(sum(ends[c] + lengths[c] for c in held) for held in stages)
        best = min(slowest(lengths) for lengths in itertools.product(range(L + 1), repeat=P * V) if sum(lengths) == L)
        found = deal_evenly(L, 1.0, ends, stages)
        assert sum(found) == L and slowest(found) == best
    assert deal_evenly(8, 1.0, [0.0] * 4, [(0, 2), (1, 3)]) == (2, 2, 2, 2)


def test_options_keep_the_order_of_parts():
    a = Cost(0, 0, 0, 1.0, (10, 6, 1), (0.0, 1.0, 3.0), (2, 2, 2))
    b = Cost(0, 0, 0, 1.0, (100, 60, 5), (0.0, 1.0, 3.0), (2, 2, 2))
    for held in ([a, b, a], [b, a, a], [a, a, b]):
        for extra, saved, _, modes in options(held):
            assert saved == sum(c.saved[m] for c, m in zip(held, modes)) and extra == sum(c.extra[m] for c, m in zip(held, modes))
    one_full = [o for o in options([a, a, a], (0, 2)) if o[0] == 3.0]
    assert [o[3] for o in one_full] == [(2, 0, 0)]  # the first of equal parts is recomputed
