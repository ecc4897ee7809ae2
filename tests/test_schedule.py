"""Schedules: the report's breakpoints against a simulation of the batch-size ramp, graph code against the
host.

Planted faults this file was seen to catch, one at a time: a whole cosine instead of half; a line for the
traced cosine; boundaries on the wrong side, on the host and in the graph; 14.0 T for 14.3 T; steps counted
without the ramp; a warm-up of 1000 steps; the MTP weight changed at 14.3 T; the bias rate never 0; pieces
with a gap accepted.
"""

import math
import re

import numpy as np
import pytest
from oracles import schedule as oracle

import dsv3
from dsv3 import schedule
from dsv3.schedule import Piece, Schedule, constant, cosine

SEQ = 4096
FULL = 15360 * SEQ  # tokens of a step after the ramp


@pytest.fixture(scope="module")
def ramp():
    """(steps, tokens) at the end of the ramp, and tokens seen before some steps inside it, by the oracle's
    batch sizes.
    """
    steps, tokens, seen = 0, 0, {}
    while tokens < 469e9:
        if steps % 997 == 0:
            seen[steps] = tokens
        tokens += oracle.paper_batch_size(tokens) * SEQ
        steps += 1
    return steps, tokens, seen


def tokens_before(step, ramp):
    """Tokens consumed before ``step``, a step after the ramp."""
    return ramp[1] + (step - ramp[0]) * FULL


def test_batch_sizes():
    for tokens in (0, 1, 10**9, 234.5e9, 468.99e9, 469e9, 10**12):
        assert schedule.paper_batch_size(tokens) == oracle.paper_batch_size(tokens)
    assert schedule.paper_batch_size(0) == 3072 and schedule.paper_batch_size(469 * 10**9) == 15360


def test_ramp(ramp):
    assert schedule._ramp(SEQ) == ramp[:2]
    # the ramp as a differential equation: d step / d tokens = 1 / (4096 (3072 + 12288 tokens / 469e9))
    assert abs(ramp[0] - 469e9 / (SEQ * 12288) * math.log(5)) < 5
    assert schedule.paper_step(ramp[1]) == ramp[0]
    assert schedule.paper_step(ramp[1] + 10 * FULL) == ramp[0] + 10


@pytest.mark.parametrize(
    "name, value",
    [
        ("paper_learning_rate", oracle.paper_learning_rate),
        ("paper_bias_update_rate", lambda step, tokens: oracle.paper_bias_rate(tokens)),
        ("paper_mtp_weight", lambda step, tokens: oracle.paper_mtp_weight(tokens)),
    ],
)
def test_paper_schedules(name, value, ramp):
    """At every step around a breakpoint, and along the way, the value by steps is the one by tokens."""
    found = getattr(schedule, name)(SEQ)
    for step, tokens in ramp[2].items():
        assert found(step) == pytest.approx(value(step, tokens), rel=1e-9), step
    for step in (0, 1, 1000, 1999, 2000, 2001):
        assert found(step) == pytest.approx(value(step, 0), rel=1e-9), step
    breaks = [math.ceil(ramp[0] + (t - ramp[1]) / FULL) for t in (10e12, 14.3e12, 14.633e12, 14.8e12)]
    steps = {b + d for b in breaks for d in (-2, -1, 0, 1, 2)} | set(range(ramp[0], breaks[3], 4999))
    for step in steps:
        assert found(step) == pytest.approx(value(step, tokens_before(step, ramp)), rel=1e-6), step
    assert found(breaks[3] + 10**6) == pytest.approx(value(10**9, 15e12))  # stays at its last value


def test_paper_values():
    lr, rate, mtp = (
        schedule.paper_learning_rate(),
        schedule.paper_bias_update_rate(),
        schedule.paper_mtp_weight(),
    )
    at = schedule.paper_step
    assert [lr(0), lr(1000), lr(2000), lr(at(9e12))] == pytest.approx([0, 1.1e-4, 2.2e-4, 2.2e-4], rel=1e-12)
    assert lr(at(12.15e12)) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert [lr(at(14.5e12)), lr(at(14.7e12))] == [2.2e-5, 7.3e-6]
    assert [rate(0), rate(at(14.2e12)), rate(at(14.31e12))] == [0.001, 0.001, 0.0]
    assert [mtp(0), mtp(at(9.9e12)), mtp(at(10.1e12))] == [0.3, 0.3, 0.1]


def test_longer_rows_take_fewer_steps():
    assert schedule.paper_step(10e12, 2 * SEQ) == pytest.approx(schedule.paper_step(10e12, SEQ) / 2, rel=1e-3)


def test_traced_equals_host():
    """In one graph for all schedules; float32 knows a step up to 2^24 exactly."""
    schedules = (
        schedule.paper_learning_rate(SEQ),
        schedule.paper_bias_update_rate(SEQ),
        schedule.paper_mtp_weight(SEQ),
        cosine(3e-4, 100, 10, 1e-5),
        constant(0.1, 7),
        constant(0.2),
        Schedule((Piece(2, 4, 1.0, 3.0), Piece(4, 4, 5.0, 5.0))),
    )

    def traced(step):
        out = ()
        for one in schedules:
            out = out + (one.traced(step),)
        return out

    traced = dsv3.jit(traced)
    end = math.ceil(schedule.paper_step(14.8e12))
    steps = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 55, 99, 100, 101, 1999, 2000, 12345, end - 1, end, end + 7]
    steps += [
        math.ceil(schedule.paper_step(t)) + d for t in (10e12, 12e12, 14.3e12, 14.633e12) for d in (-1, 1)
    ]
    counts = []
    for step in steps:
        found = [float(x.asnumpy()) for x in traced(np.array(step, np.int32))]
        counts.append(dsv3.transform.compile_count())
        np.testing.assert_allclose(
            found, [s(step) for s in schedules], rtol=2e-6, atol=1e-12, err_msg=f"step {step}"
        )
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("warmup, total, final", [(0, 50, 0.0), (10, 50, 1e-5), (49, 50, 0.0)])
def test_cosine_and_constant(warmup, total, final):
    found, flat = cosine(3e-4, total, warmup, final), constant(3e-4, warmup)
    for step in range(total + 5):
        want = oracle.cosine(step, peak=3e-4, end=final, total_steps=total, warmup_steps=warmup)
        assert found(step) == pytest.approx(want, rel=1e-12, abs=1e-18), step
        assert flat(step) == pytest.approx(
            oracle.constant(step, peak=3e-4, warmup_steps=warmup), rel=1e-12
        ), step


def test_value_at():
    assert schedule.value_at(0.3, 7) == 0.3 and schedule.value_at(constant(1.0, 10), 5) == 0.5
    assert hash(constant(1.0)) == hash(constant(1.0))  # so that graphs are found again


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Schedule(()), "a Schedule needs at least one Piece"),
        (
            lambda: Schedule((Piece(0, 5, 0, 1), Piece(6, 9, 1, 1))),
            "a Piece ends at 5 but the next starts at 6",
        ),
        (lambda: Schedule((Piece(5, 4, 0, 1),)), "end must not lie before start"),
        (lambda: Schedule((Piece(0, 4, 0, 1, "square"),)), "shape is 'linear' or 'cosine'"),
        (lambda: cosine(1.0, 10, 10), "warmup=10 must be below total=10"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
