"""The routed experts of a mixture-of-experts layer, dropless: every (token, expert) pair is computed.

``experts`` is the whole computation. The reference is built of the pieces that an expert-parallel version
uses too: ``sort_by_expert``, ``permute``, the products, ``unpermute``.
"""
from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.function.grad.grad_func import custom_vjp
from mindspore.ops.primitive import constexpr

from . import native
from .grouped_matmul import grouped_matmul
from .int8 import int8_experts, integers
from .native import iota
from .swiglu import swiglu
from .topk import count_experts


def experts(x: Tensor, w_gate: Any, w_up: Any, w_down: Any, idx: Tensor, weights: Tensor) -> Tensor:
    """y[t] = sum_k weights[t, k] * (silu(x[t] w_gate[e]) * (x[t] w_up[e])) w_down[e], with e = idx[t, k].

    x [T, D] and w_gate, w_up [E, D, F], w_down [E, F, D] of one float dtype; idx [T, K] int32, distinct
    within a token; weights [T, K] float32 -> y [T, D] in x's dtype (DeepSeek-V3 report, eq. 12, without the
    shared expert). Gradients flow to all but idx; an expert without tokens gets exactly zero. The three w may be
    quantised instead (see ``int8``), without gradients. Raises ValueError for shapes and dtypes that do not fit,
    and RuntimeError when idx holds a number that is no expert and the native kernel runs.
    """
    idx, weights = idx.astype(ms.int32), weights.astype(ms.float32)
    if isinstance(w_gate, dict) or isinstance(w_up, dict) or isinstance(w_down, dict):  # quantised
        _check(x.shape, integers(w_gate).shape, integers(w_up).shape, integers(w_down).shape, idx.shape, weights.shape)
        if native.enabled() and x.dtype == ms.float32:
            return int8_experts(x, w_gate, w_up, w_down, idx, weights)
        return experts_reference(x, w_gate, w_up, w_down, idx, weights)
    _check(x.shape, w_gate.shape, w_up.shape, w_down.shape, idx.shape, weights.shape)
    _check_dtypes(x.dtype, w_gate.dtype, w_up.dtype, w_down.dtype)
    if native.enabled() and x.dtype == ms.float32:
        return _native(x, w_gate, w_up, w_down, idx, weights)[0]
    return experts_reference(x, w_gate, w_up, w_down, idx, weights)


def experts_reference(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    idx: Tensor,
    weights: Tensor,
    *,
    matmul=grouped_matmul,
) -> Tensor:
    """``experts`` as sort, permute, three grouped products (by ``matmul``), un-permute."""
    order_P, group_end_E = sort_by_expert(idx, integers(w_gate).shape[0])
    rows_PD = permute(x, order_P, idx.shape[1])
    gate_PF = matmul(rows_PD, w_gate, group_end_E)
    up_PF = matmul(rows_PD, w_up, group_end_E)
    out_PD = matmul(swiglu(gate_PF, up_PF), w_down, group_end_E)
    return unpermute(out_PD, order_P, weights)


def sort_by_expert(idx: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """idx [T, K] int32 -> (order [P] int32, group_end [E] int32), with P = T * K.

    order[row] is the pair t * K + k at that row once the pairs are sorted by expert, those of one expert by
    token; the rows of expert e end at group_end[e].
    """
    n_pairs = idx.shape[0] * idx.shape[1]
    _check_keys(n_pairs, n_experts)
    # All keys differ, so that the order owes nothing to whether the device's sort is stable.
    keys_P = idx.reshape(-1) * n_pairs + iota(n_pairs)
    _, order_P = ops.sort(keys_P)
    return order_P.astype(ms.int32), ops.cumsum(count_experts(idx, n_experts), 0)


def permute(x: Tensor, order: Tensor, k: int) -> Tensor:
    """x [T, D] -> [P, D]: the token of each pair, in the given order."""
    return ops.gather(x, order // k, 0)


def unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """rows [P, D] in the given order, weights [T, K] -> [T, D]: each token's weighted sum.

    Summed in float32, returned in rows' dtype.
    """
    T, K = weights.shape
    _, row_of_pair_P = ops.sort(order)
    rows_TKD = ops.gather(rows, row_of_pair_P.astype(ms.int32), 0).reshape(T, K, rows.shape[1])
    return weighted_sum(rows_TKD, weights).astype(rows.dtype)


@custom_vjp
def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """rows [T, K, D], weights [T, K] float32 -> [T, D], summed in float32; the backward keeps the rows in their own dtype."""
    return (rows.astype(ms.float32) * ops.expand_dims(weights, 2)).sum(1)


def _weighted_sum_bwd(rows, weights, out, dout):
    dout = ops.expand_dims(dout, 1)
    drows = (dout * ops.expand_dims(weights, 2)).astype(rows.dtype)
    wide = ops.depend(rows, drows).astype(ms.float32)  # one float32 copy of all rows after the other
    return drows, (dout * wide).sum(2)


weighted_sum.defbwd(_weighted_sum_bwd)


@constexpr
def _check(x: tuple, w_gate: tuple, w_up: tuple, w_down: tuple, idx: tuple, weights: tuple) -> None:
    fits = len(x) == 2 and len(w_gate) == 3 and len(idx) == 2 and x[1] == w_gate[1] and idx[0] == x[0]
    if not fits or w_up != w_gate or tuple(w_down) != (w_gate[0], w_gate[2], w_gate[1]) or weights != idx:
        raise ValueError(
            "experts: expected x [T, D], w_gate and w_up [E, D, F], w_down [E, F, D], idx, weights [T, K], "
            f"found {x}, {w_gate}, {w_up}, {w_down}, {idx}, {weights}"
        )


@constexpr
def _check_dtypes(*dtypes) -> None:
    if len(set(dtypes)) != 1:
        raise ValueError(f"experts: expected x, w_gate, w_up, w_down of one dtype, found {dtypes}; cast them")


@constexpr
def _check_keys(n_pairs: int, n_experts: int) -> None:
    if n_pairs * n_experts >= 2**31:
        raise ValueError(f"{n_pairs} pairs of {n_experts} experts overflow int32 keys; use smaller batches")


@constexpr
def _forward_op():
    def shapes(x, w_gate, w_up, w_down, idx, weights):
        n_pairs, F = idx[0] * idx[1], w_gate[2]
        return x, (n_pairs, F), (n_pairs, F), (n_pairs,), (w_gate[0],), (n_pairs, x[1])

    def dtypes(x, w_gate, w_up, w_down, idx, weights):
        return x, x, x, idx, idx, x

    return native.native_op("moe", "experts", shapes, dtypes)


@constexpr
def _backward_op():
    def shapes(x, w_gate, w_up, w_down, idx, weights, gate, up, order, ends, dy):
        scratch = (order[0] * (2 * x[1] + 3 * w_gate[2]),)
        return x, w_gate, w_up, w_down, weights, scratch

    def dtypes(x, w_gate, w_up, w_down, idx, weights, gate, up, order, ends, dy):
        return x, x, x, x, x, x

    return native.native_op("moe", "experts_grad", shapes, dtypes)


@custom_vjp
def _native(x, w_gate, w_up, w_down, idx, weights):
    return _forward_op()(x, w_gate, w_up, w_down, idx, weights)


def _native_bwd(x, w_gate, w_up, w_down, idx, weights, out, dout):
    saved = out[1:5]  # gate and up before the activation, the order of the pairs, the ends of the experts
    grads = _backward_op()(x, w_gate, w_up, w_down, idx, weights, *saved, dout[0])
    return grads[0], grads[1], grads[2], grads[3], ops.zeros_like(idx), grads[4]


_native.defbwd(_native_bwd)
