"""Schedules as data: a value over steps made of straight and cosine pieces."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import mindspore as ms
from mindspore import ops


@dataclass(frozen=True)
class Piece:
    """From ``start`` (inclusive) on, go from ``first`` to ``last`` until ``end``: "linear" or half a "cosine"."""

    start: float
    end: float
    first: float
    last: float
    shape: str = "linear"


@dataclass(frozen=True)
class Schedule:
    """A piecewise function of the step; before its first piece and after its last it stays at their outer values.

    ``schedule(step)`` is exact float64 on the host; ``schedule.traced(step)`` is the same in graph code, in float32.
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if not self.pieces:
            raise ValueError("a Schedule needs at least one Piece")
        for before, after in zip(self.pieces, self.pieces[1:]):
            if before.end != after.start:
                raise ValueError(f"a Piece ends at {before.end} but the next starts at {after.start}; make them meet")
        for piece in self.pieces:
            if piece.end < piece.start or piece.shape not in ("linear", "cosine"):
                raise ValueError(f"{piece}: end must not lie before start, shape is 'linear' or 'cosine'")

    def __call__(self, step: float) -> float:
        """The value at ``step``."""
        piece = next((p for p in self.pieces if step < p.end), self.pieces[-1])
        length = piece.end - piece.start
        done = min(max((step - piece.start) / length, 0.0), 1.0) if length else 1.0
        if piece.shape == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        return piece.first + (piece.last - piece.first) * done

    def traced(self, step):
        """The value at a 0-D tensor, for graph code. 0-D float32."""
        step = step.astype(ms.float32)
        value = ops.full_like(step, self.pieces[-1].last)
        for i in range(len(self.pieces)):
            piece = self.pieces[len(self.pieces) - 1 - i]
            if piece.end > piece.start:
                done = ops.clamp((step - piece.start) / (piece.end - piece.start), 0.0, 1.0)
                if piece.shape == "cosine":
                    done = 0.5 - 0.5 * ops.cos(math.pi * done)
                value = ops.where(step < piece.end, piece.first + (piece.last - piece.first) * done, value)
        return value


def value_at(value, step: float) -> float:
    """A schedule's value at ``step``, or the plain number itself."""
    return float(value(step)) if callable(value) else float(value)


def constant(value: float, warmup: int = 0) -> Schedule:
    """``value``, after a linear warm-up from 0 over ``warmup`` steps."""
    flat = Piece(warmup, warmup, value, value)
    return Schedule((Piece(0, warmup, 0.0, value), flat) if warmup else (flat,))


def cosine(peak: float, total: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Linear warm-up from 0 to ``peak`` over ``warmup`` steps, then half a cosine to ``final`` at step ``total``."""
    if warmup >= total:
        raise ValueError(f"warmup={warmup} must be below total={total}")
    down = Piece(warmup, total, peak, final, "cosine")
    return Schedule((Piece(0, warmup, 0.0, peak), down) if warmup else (down,))


# -- the report's recipe, section 4.2 ----------------------------------------------------------------------------------
# The report counts tokens; training counts steps. Every breakpoint but the warm-up lies after the batch-size ramp, where
# a step is a constant number of tokens, so that all of it is exact over steps.
T = 10**12
RAMP_FIRST, RAMP_LAST, RAMP_TOKENS = 3072, 15360, 469 * 10**9


def paper_batch_size(tokens: int) -> int:
    """Sequences per batch after ``tokens`` tokens: 3072, rising evenly to 15360 over the first 469 B, then constant."""
    return int(RAMP_FIRST + (RAMP_LAST - RAMP_FIRST) * min(tokens / RAMP_TOKENS, 1.0))


@functools.cache
def _ramp(seq_length: int) -> tuple[int, int]:
    """(steps, tokens) when the batch-size ramp is over."""
    steps = tokens = 0
    while tokens < RAMP_TOKENS:
        tokens += paper_batch_size(tokens) * seq_length
        steps += 1
    return steps, tokens


def paper_step(tokens: float, seq_length: int = 4096) -> float:
    """The step, as a real number, at which ``tokens`` tokens (at least the ramp's 469 B) have been seen."""
    steps, seen = _ramp(seq_length)
    return steps + (tokens - seen) / (RAMP_LAST * seq_length)


def paper_learning_rate(seq_length: int = 4096) -> Schedule:
    """Linear to 2.2e-4 in 2000 steps, constant to 10 T tokens, cosine to 2.2e-5 over 4.3 T, 333 B there, 167 B at 7.3e-6."""
    at = [paper_step(tokens, seq_length) for tokens in (10 * T, 14.3 * T, 14.633 * T, 14.8 * T)]
    return Schedule((
        Piece(0, 2000, 0.0, 2.2e-4), Piece(2000, at[0], 2.2e-4, 2.2e-4), Piece(at[0], at[1], 2.2e-4, 2.2e-5, "cosine"),
        Piece(at[1], at[2], 2.2e-5, 2.2e-5), Piece(at[2], at[3], 7.3e-6, 7.3e-6)))


def paper_bias_update_rate(seq_length: int = 4096) -> Schedule:
    """0.001 for the first 14.3 T tokens, then 0."""
    at, end = paper_step(14.3 * T, seq_length), paper_step(14.8 * T, seq_length)
    return Schedule((Piece(0, at, 1e-3, 1e-3), Piece(at, end, 0.0, 0.0)))


def paper_mtp_weight(seq_length: int = 4096) -> Schedule:
    """0.3 for the first 10 T tokens, then 0.1."""
    at, end = paper_step(10 * T, seq_length), paper_step(14.8 * T, seq_length)
    return Schedule((Piece(0, at, 0.3, 0.3), Piece(at, end, 0.1, 0.1)))
