"""The recipe of DeepSeek-V3 as functions of what was consumed so far: report, section 4.2.

`step` counts finished optimiser steps, `tokens` tokens consumed before the step at hand; both start at 0.
"""

import math

PEAK, FLOOR, LAST = 2.2e-4, 2.2e-5, 7.3e-6
CONSTANT_UNTIL = 10.0e12
DECAYED_AT = CONSTANT_UNTIL + 4.3e12
LAST_FROM = DECAYED_AT + 333e9
END = LAST_FROM + 167e9
WARMUP_STEPS = 2000


def half_cosine(fraction, start, end):
    """From start to end along half a cosine, fraction in [0, 1]."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def warmup(step, steps, peak):
    """Linear from 0 at step 0 to peak at `steps`, then peak."""
    return peak * min(1.0, step / steps) if steps else peak


def paper_learning_rate(step, tokens):
    """Warm-up in 2000 steps, 2.2e-4 to 10T tokens, cosine to 2.2e-5 over 4.3T, 333B there, 167B at 7.3e-6."""
    if step < WARMUP_STEPS:
        return warmup(step, WARMUP_STEPS, PEAK)
    if tokens < CONSTANT_UNTIL:
        return PEAK
    if tokens < DECAYED_AT:
        return half_cosine((tokens - CONSTANT_UNTIL) / (DECAYED_AT - CONSTANT_UNTIL), PEAK, FLOOR)
    return FLOOR if tokens < LAST_FROM else LAST


def paper_batch_size(tokens, *, multiple=1):
    """Sequences per step: 3072 growing to 15360 over 469B tokens, rounded down to a multiple.

    The report says only "gradually"; linear in tokens is this project's reading.
    """
    exact = 3072 + (15360 - 3072) * min(1.0, tokens / 469e9)
    return int(exact // multiple) * multiple


def paper_bias_rate(tokens):
    """0.001 for 14.3T tokens, then 0."""
    return 0.001 if tokens < 14.3e12 else 0.0


def paper_mtp_weight(tokens):
    """0.3 for 10T tokens, then 0.1."""
    return 0.3 if tokens < 10.0e12 else 0.1


def constant(step, *, peak, warmup_steps=0):
    """Warm-up, then peak for ever."""
    return warmup(step, warmup_steps, peak)


def cosine(step, *, peak, end, total_steps, warmup_steps=0):
    """Warm-up to peak at warmup_steps, half a cosine to `end` at total_steps, then `end`."""
    if step < warmup_steps:
        return warmup(step, warmup_steps, peak)
    return half_cosine((step - warmup_steps) / max(1, total_steps - warmup_steps), peak, end)
