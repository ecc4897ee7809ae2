"""Which experts a token goes to, by group-limited top-k with a fixed rule for ties, and how many each gets.

DeepSeek-V3 report, section 2.1.2 (the choice is made on score + bias) and the node-limited routing of the
released model; the "max" group score is DeepSeek-V2's ``group_limited_greedy``.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from . import native
from .native import iota

GROUP_SCORES = ("top2", "max")


def choose_experts(
    choice: Tensor, *, n_group: int, topk_group: int, k: int, group_score: str = "top2"
) -> Tensor:
    """choice [T, E] float32 -> idx [T, k] int32, the highest first, ties to the lowest index.

    The E experts form n_group groups of neighbours. The topk_group groups of the highest score stay, the
    others count as -inf (not 0: a choice may be negative). A group scores by the sum of its two highest
    choices (``"top2"``; by the one where groups hold a single expert) or by the highest (``"max"``). No
    gradient flows. The native kernel ranks NaN last and keeps the indices distinct even then. Raises
    ValueError for numbers that do not fit together.
    """
    _check(choice.shape, n_group, topk_group, k, group_score)
    choice = ops.stop_gradient(choice)
    if native.enabled() and choice.dtype == ms.float32:
        return _choose_op(k)(choice, _options(n_group, topk_group, group_score))
    return choose_experts_reference(
        choice, n_group=n_group, topk_group=topk_group, k=k, group_score=group_score
    )


def choose_experts_reference(
    choice: Tensor, *, n_group: int, topk_group: int, k: int, group_score: str = "top2"
) -> Tensor:
    """``choose_experts`` of maxima and comparisons: each of k rounds takes the maximum, then the lowest index
    that holds it, so that nothing depends on how a device's own top-k breaks ties.
    """
    choice = ops.stop_gradient(choice)
    T, E = choice.shape
    size = E // n_group
    if topk_group < n_group:
        grouped = choice.reshape(T * n_group, size)
        summed = 2 if group_score == "top2" and size > 1 else 1
        best, _ = _highest(grouped, summed)
        scores_TG = ops.gather_elements(grouped, 1, best).sum(1).reshape(T, n_group)
        _, kept_TG = _highest(scores_TG, topk_group)
        kept_TE = ops.broadcast_to(kept_TG.reshape(T, n_group, 1), (T, n_group, size)).reshape(T, E)
        choice = ops.where(kept_TE, choice, float("-inf"))
    idx, _ = _highest(choice, k)
    return idx


def _highest(values: Tensor, k: int):
    """values [T, N] -> the indices [T, k] int32 of the k highest, and the mask [T, N] of their places."""
    n = values.shape[1]
    place = iota(n).reshape(1, n)
    taken = ops.zeros_like(values) > 0
    chosen = []
    for _ in range(k):
        left = ops.where(taken, float("-inf"), values)
        top = ops.logical_and(left == left.max(1, True), ops.logical_not(taken))
        index = ops.where(top, place, n - 1).min(1, True)
        taken = ops.logical_or(taken, place == index)
        chosen.append(index)
    return ops.concat(chosen, 1), taken


def count_experts(idx: Tensor, n_experts: int) -> Tensor:
    """idx, integers of any shape in [0, n_experts) -> how often each occurs, [n_experts] int32."""
    if native.enabled():
        return _count_op(n_experts)(idx.astype(ms.int32).reshape(-1))
    return count_experts_reference(idx, n_experts)


def count_experts_reference(idx: Tensor, n_experts: int) -> Tensor:
    """``count_experts`` of a comparison with every expert."""
    hits = (idx.reshape(-1, 1) == iota(n_experts).reshape(1, n_experts)).astype(ms.int32)
    return hits.sum(0).astype(ms.int32)  # a sum of int32 is int64


@constexpr
def _check(shape: tuple, n_group: int, topk_group: int, k: int, group_score: str) -> None:
    if group_score not in GROUP_SCORES:
        raise ValueError(f"group_score={group_score!r}: expected one of {GROUP_SCORES}")
    if len(shape) != 2:
        raise ValueError(f"choose_experts: expected choice [T, E], found shape {shape}; flatten the tokens")
    n_experts = shape[1]
    if n_group < 1 or n_experts % n_group:
        raise ValueError(f"{n_experts} experts do not divide into n_group={n_group} groups; pick a divisor")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group={topk_group}: expected 1 to n_group={n_group}")
    left = topk_group * (n_experts // n_group)
    if not 1 <= k <= left:
        raise ValueError(f"k={k}: expected 1 to {left}, the experts of topk_group={topk_group} groups")


@constexpr
def _options(n_group: int, topk_group: int, group_score: str) -> Tensor:
    return Tensor([n_group, topk_group, int(group_score == "top2")], ms.int32)


@constexpr
def _choose_op(k: int):
    return native.native_op("moe", "choose_experts", lambda x, options: (x[0], k), lambda x, options: options)


@constexpr
def _count_op(n_experts: int):
    return native.native_op("moe", "count_experts", lambda idx: (n_experts,), lambda idx: idx)
