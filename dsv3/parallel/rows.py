"""Rows that are cut over ranks: the model's dim 1, the positions of a row of T tokens.

"seq" (context parallelism) cuts a row for everything but attention. Rank i of n has the chunks i and 2n-1-i of 2n, so that
the tokens of all ranks together see equally many earlier ones. "residual" (sequence parallelism, arXiv 2205.05198) cuts what a
rank has of it once more, over the ranks of tensor parallelism, where no product needs it whole: norms, residual sums, the
projections to the latents, the router. "residual_seq" is both. A batch comes in whole rows to all ranks that share them, so
labels, segments and shifts are computed on whole rows and each rank takes its own positions of what comes out.
"""
from __future__ import annotations

import math

import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from .shard import all_gather, here, part, parts, psum, reduce_scatter


def own_seq(x, name):
    """This rank's positions, along "seq" or "residual_seq", of whole rows. x: [B, T, ...] -> [B, T / parts, ...].

    Raises ValueError when the tokens of a row do not divide.
    """
    _check(x.shape[1])
    if parts(name) == 1:
        return x
    return ops.gather(x, _positions(name, x.shape[1]), 1)


def own_positions(length):
    """Which of a row's positions this rank has along "seq": [length / parts] int32, or None when it has them all."""
    if parts("seq") == 1:
        return None
    return _positions("seq", length)


def gather_seq(x, name):
    """What the ranks along a name have of the same rows, put together. x: [B, t, F] -> [B, parts * t, F].

    Along "residual" it is what the rank has along "seq", along "residual_seq" the whole row from its first token to its last.
    """
    n = parts(name)
    if n == 1:
        return x
    B, t, F = x.shape
    joined = all_gather(x, name)
    if B > 1:
        joined = ops.transpose(joined.reshape(n, B, t, F), (1, 0, 2, 3))
    joined = joined.reshape(B, n * t, F)
    if name == "residual" or parts("seq") == 1:
        return joined
    chunks, sorted_chunks = ops.split(joined, n * t // (2 * parts("seq")), axis=1), ()
    for i in _places():
        sorted_chunks = sorted_chunks + (chunks[i],)
    return ops.cat(sorted_chunks, axis=1)


def scatter_seq(y, name):
    """``psum(y, name)``, of which a rank keeps its positions along "residual". y: [B, t, F] -> [B, t / parts, F]."""
    n = parts("residual")
    if n == 1:
        return psum(y, name)
    B, t, F = y.shape
    if parts(name) == 1:  # the same on all of these ranks
        return y[:, part("residual") * (t // n) : (part("residual") + 1) * (t // n)]
    if B > 1:
        y = ops.transpose(y.reshape(B, n, t // n, F), (1, 0, 2, 3))
    return reduce_scatter(y.reshape(n * B, t // n, F), name)


def order(length: int, n: int) -> np.ndarray:
    """Positions of a row, those of the first of n ranks, of the second, ... [length] int32."""
    positions = np.arange(length, dtype=np.int32)
    return positions if n == 1 else positions.reshape(2 * n, -1)[_chunks(n)].reshape(-1)


def _chunks(n: int) -> list[int]:
    return [chunk for i in range(n) for chunk in (i, 2 * n - 1 - i)]


@constexpr
def _positions(name: str, length: int) -> Tensor:
    place = here()
    every = order(length, len(place.group("seq"))).reshape(len(place.group(name)), -1)
    return Tensor(every[place.index(name)])


@constexpr
def _places() -> tuple[int, ...]:
    """Where each chunk of a row is when the ranks' are one after another."""
    return tuple(int(i) for i in np.argsort(_chunks(len(here().group("seq")))))


@constexpr
def _check(length: int) -> None:
    place = here()
    if place is None:
        return
    context, ranks = len(place.group("seq")), len(place.group("residual_seq"))
    needed = math.lcm(ranks, 2 * context if context > 1 else 1)
    if length % needed:
        raise ValueError(f"mesh {place.mesh}: a row of {length} tokens is not divisible by {needed}, which its cut over context "
                         f"({context} ranks, two chunks each) and sequence parallelism ({ranks} ranks in all) needs; give "
                         f"rows of {-(-length // needed) * needed} tokens")
