"""Pipelines: schedules against a run of them, and the best split and recompute against trying all.

Planted faults this file was seen to catch, one at a time: one micro-batch more in flight; too short a warm-up and backward chunks
in order when interleaving; DualPipeV not folded; no-ops dealt by remainder; working bytes left out of a comparison or of the
peak; the last parts recomputed first; ties of splits, or splits, missed; the sum before the slowest; the copy of the embedding
not in the budget; a chunk on two stages that loads one; layers dealt to the first stage.
"""
import itertools
import random
from math import inf

import pytest

from dsv3.parallel.balance import best_split, choose, deal_evenly, in_flight_bytes, options
from dsv3.parallel.memory import Cost, chunk_bytes
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
def random_cost(rng):
    saved = sorted((rng.randrange(1, 60) for _ in range(3)), reverse=True)
    extra = (0.0, *sorted(float(rng.randrange(0, 9)) for _ in range(2)))
    return Cost(rng.randrange(20), rng.randrange(20), rng.randrange(20), float(rng.randrange(1, 12)), tuple(saved), extra,
                tuple(rng.randrange(30) for _ in range(3)), rng.randrange(40))


def need(chunks, choice, states, kept):
    """Activations of a stage whose parts, chunk by chunk, take the modes of ``choice``: the definitions, written out."""
    modes, peaks, saved = iter(choice), [0], []
    for chunk in chunks:
        mine = [(c.saved[m], c.working[m], c.made) for c, m in zip(chunk, modes)]
        saved.append(sum(s for s, _, _ in mine))
        for k, (_, working, _) in enumerate(mine):
            peaks.append(working if kept else sum(s for s, _, _ in mine[:k + 1]) + working + sum(made for *_, made in mine[k:]))
    return max(peaks) + kept * max(sum(n * s for n, s in zip(state, saved)) for state in states)


def every_choice(chunks, states, modes, kept):
    """(bytes, extra FLOPs) of all modes of all parts."""
    flat = [c for chunk in chunks for c in chunk]
    for choice in itertools.product(modes, repeat=len(flat)):
        yield need(chunks, choice, states, kept), sum(c.extra[m] for c, m in zip(flat, choice))


def random_problem(rng, kept):
    """(layers, stages, tried, floor, every_split) of a small model; every_split(budget): the bytes and the times of its stages,
    by trying everything."""
    L, P, M = rng.randrange(3, 7), rng.randrange(1, 4), rng.randrange(1, 6)
    kinds = [random_cost(rng) for _ in range(3)]
    layers = [kinds[i > 0] for i in range(L)] if rng.random() < 0.5 else [random_cost(rng) for _ in range(L)]
    ends, more = (random_cost(rng), kinds[2]), [rng.randrange(30) for _ in range(P)]
    modes = rng.choice([(0, 1, 2), (0, 2), (1,), (0,)])

    def stage(s, i, j):
        held = [*ends[:s == 0], *layers[i:j], *ends[1:][:s == P - 1]]
        return held, in_flight(s, P, 1, M, "1f1b"), sum(c.static for c in held) + more[s]

    def tried(s, i, j, budget):
        held, states, static = stage(s, i, j)
        extra, (chosen,) = choose([held], states, budget - static, modes, kept)
        assert extra == sum(c.extra[m] for c, m in zip(held, chosen)) and set(chosen) <= set(modes)
        assert in_flight_bytes(states, [chunk_bytes(held, chosen, kept)], kept) == need([held], chosen, states, kept)
        return static + need([held], chosen, states, kept), 3 * sum(c.forward for c in held) + extra

    def floor(s, i, j):
        return sum(c.static for c in layers[i:j]), 3 * sum(c.forward for c in layers[i:j])

    def every_split(budget):
        for cuts in itertools.combinations(range(1, L), P - 1):
            sizes, times = [], []
            for s, (i, j) in enumerate(itertools.pairwise((0, *cuts, L))):
                held, states, static = stage(s, i, j)
                choices = [(static + size, extra) for size, extra in every_choice([held], states, modes, kept)]
                sizes.append(min(size for size, _ in choices))
                times.append(3 * sum(c.forward for c in held) + min((e for size, e in choices if size <= budget), default=inf))
            yield sizes, times

    return L, P, tried, floor, every_split


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "inputs"])
@pytest.mark.parametrize("seed", range(30))
def test_the_split_is_as_good_as_the_best_of_all(seed, kept):
    rng = random.Random(seed)
    L, P, tried, floor, every_split = random_problem(rng, kept)
    for budget in sorted(rng.randrange(60, 800) for _ in range(4)):
        want = min((max(times), sum(times)) for _, times in every_split(budget))
        if want[0] == inf:
            with pytest.raises(ValueError, match="no split .* the smallest need is"):
                best_split(L, P, tried, floor, budget)
            continue
        lengths = best_split(L, P, tried, floor, budget)
        assert sum(lengths) == L and min(lengths) >= 1 and len(lengths) == P
        bounds = [0, *itertools.accumulate(lengths)]
        found = [tried(s, bounds[s], bounds[s + 1], budget) for s in range(P)]
        assert max(size for size, _ in found) <= budget
        assert (max(time for _, time in found), sum(time for _, time in found)) == want


@pytest.mark.parametrize("seed", range(8))
def test_the_smallest_need_is_exact(seed):
    rng = random.Random(seed)
    L, P, tried, floor, every_split = random_problem(rng, seed % 2 == 0)
    smallest = min(max(sizes) for sizes, _ in every_split(0))
    big = 10**7  # the message rounds to 10 MB
    with pytest.raises(ValueError, match=f"the smallest need is {smallest * big / 1e9:.2f} GB"):
        best_split(L, P, lambda s, i, j, budget: (big * tried(s, i, j, budget / big)[0], inf), floor, 1)
    best_split(L, P, tried, floor, smallest)
    with pytest.raises(ValueError, match="no split"):
        best_split(L, P, tried, floor, smallest - 1)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "inputs"])
@pytest.mark.parametrize("seed", range(20))
def test_recompute_over_several_chunks_is_as_good_as_the_best_of_all(seed, kept):
    rng = random.Random(seed)
    kinds = [random_cost(rng) for _ in range(2)]
    chunks = [[rng.choice(kinds) for _ in range(rng.randrange(0, 3))] for _ in range(2)]
    states = in_flight(rng.randrange(3), 3, 2, 6, "interleaved")
    for room in (10, 50, 200, 500, 1000):
        extra, chosen = choose(chunks, states, room, kept=kept)
        size, others = need(chunks, itertools.chain(*chosen), states, kept), every_choice(chunks, states, (0, 1, 2), kept)
        assert (max(size - room, 0), extra) == min((max(other - room, 0), slower) for other, slower in others)


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
    for held in ((a, b, a), (b, a, a), (a, a, b)):
        for extra, saved, _, modes in options(held, kept=True):
            assert saved == sum(c.saved[m] for c, m in zip(held, modes)) and extra == sum(c.extra[m] for c, m in zip(held, modes))
    one_full = [o for o in options((a, a, a), (0, 2), True) if o[0] == 3.0]
    assert [o[3] for o in one_full] == [(2, 0, 0)]  # the first of equal parts is recomputed
