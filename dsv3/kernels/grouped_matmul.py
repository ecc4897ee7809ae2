"""Matrix products of sorted rows with one matrix a group: the arithmetic of a mixture of experts.

Rows are sorted by group and ``group_end`` holds the cumulative ends, so group e owns the rows
``group_end[e-1] .. group_end[e]``. Nothing is padded or dropped.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.function.grad.grad_func import custom_vjp
from mindspore.ops.primitive import constexpr

from . import native
from .int8 import activations, grouped_on_ascend, widened
from .native import iota


def grouped_matmul(x: Tensor, w: Tensor | dict, group_end: Tensor, tail: bool = False) -> Tensor:
    """x [M, K] times w [E, K, N] by groups of rows -> [M, N]; the rows from group_end[-1] on are zero.

    group_end [E] int32 never decreases and does not exceed M; gradients flow to x and w, and a group without
    rows gets a gradient of exactly zero. tail: say so when rows may follow the last group; Ascend's kernel leaves
    them undefined, and there M must be static for them to be zeroed. Raises ValueError for shapes and dtypes that
    do not fit, and RuntimeError when the native kernel meets ends that do not.
    """
    if isinstance(w, dict):  # quantised
        if native.on_ascend():
            return _ascend(x, w, group_end, tail)
        return _of_floats(activations(x, w), widened(w).astype(x.dtype), group_end, tail)
    return _of_floats(x, w, group_end, tail)


def _of_floats(x, w, group_end, tail):
    _check(x.shape, w.shape, group_end.shape, x.dtype, w.dtype)
    group_end = group_end.astype(ms.int32)
    if native.enabled() and x.dtype == ms.float32:
        return _native(x, w, group_end)
    if native.on_ascend():
        return _ascend(x, w, group_end, tail)
    return grouped_matmul_reference(x, w, group_end)


def _ascend(x, w, group_end, tail):
    """CANN's grouped product; MindSpore differentiates it as two more."""
    real = (iota(x.shape[0]) < group_end[-1]).reshape(-1, 1) if tail else None
    zero = ops.zeros((1, 1), x.dtype)  # zeros_like would be a constant as large as x
    if tail:  # whose gradient is as undefined as its product
        x = ops.where(real, x, zero)
    group_end = group_end.astype(ms.int64)
    if isinstance(w, dict):
        out = grouped_on_ascend(x, w, group_end)
    else:
        out = ops.auto_generate.grouped_matmul_v4([x], [w], group_list=group_end, split_item=3, group_type=0)[0]
    if tail:
        return ops.where(real, out, zero)
    return out


def grouped_matmul_reference(x: Tensor, w: Tensor, group_end: Tensor) -> Tensor:
    """``grouped_matmul`` of gathers and one batched product, for any device and float dtype.

    The rows are dealt into blocks of ceil(M / E), each of one group and the last of a group padded. There are
    at most 2 E blocks whatever the groups are, so the shapes are static, and the cost about twice the exact
    product's at worst.
    """
    M, E = x.shape[0], w.shape[0]
    size = (M + E - 1) // E
    n_blocks = M // size + E
    starts_E = ops.concat((ops.zeros((1,), ms.int32), group_end[:-1]))
    block_end_E = ops.cumsum((group_end - starts_E + size - 1) // size, 0)
    block_start_E = ops.concat((ops.zeros((1,), ms.int32), block_end_E[:-1]))

    block = iota(n_blocks)
    # Blocks to spare go to the last group and lie past its end.
    group = ops.minimum(_count_ends(block_end_E, block), E - 1)
    first = ops.gather(starts_E, group, 0) + (block - ops.gather(block_start_E, group, 0)) * size
    rows = first.reshape(n_blocks, 1) + iota(size).reshape(1, size)
    real = (rows < ops.gather(group_end, group, 0).reshape(n_blocks, 1)).reshape(n_blocks, size, 1)
    blocks = ops.gather(x, ops.minimum(rows, M - 1), 0)
    blocks = ops.where(real, blocks, ops.zeros_like(blocks))  # a product would spread 0 * inf of padding
    product = ops.bmm(blocks, ops.gather(w, group, 0)).reshape(n_blocks * size, w.shape[2])

    row = iota(M)
    group = ops.minimum(_count_ends(group_end, row), E - 1)
    within = row - ops.gather(starts_E, group, 0)
    place = ops.minimum(ops.gather(block_start_E, group, 0) * size + within, n_blocks * size - 1)
    out = ops.gather(product, place, 0)
    return ops.where((row < group_end[-1]).reshape(M, 1), out, ops.zeros_like(out))


def _count_ends(ends: Tensor, positions: Tensor) -> Tensor:
    """The number of ends at or below each position: the index of the group that owns it."""
    return (ends.reshape(1, -1) <= positions.reshape(-1, 1)).astype(ms.int32).sum(1).astype(ms.int32)


@constexpr
def _check(x: tuple, w: tuple, group_end: tuple, x_dtype, w_dtype) -> None:
    if x_dtype != w_dtype:
        raise ValueError(f"grouped_matmul: expected x and w of one dtype, found {x_dtype}, {w_dtype}")
    if len(x) != 2 or len(w) != 3 or x[1] != w[1] or tuple(group_end) != (w[0],):
        raise ValueError(
            f"grouped_matmul: expected x [M, K], w [E, K, N], group_end [E], found {x}, {w}, {group_end}"
        )


@constexpr
def _forward_op():
    return native.native_op("moe", "grouped_matmul", lambda x, w, end: (x[0], w[2]), lambda x, w, end: x)


@constexpr
def _backward_op():
    return native.native_op(
        "moe", "grouped_matmul_grad", lambda x, w, end, dout: (x, w), lambda x, w, end, dout: (x, w)
    )


@custom_vjp
def _native(x, w, group_end):
    return _forward_op()(x, w, group_end)


def _native_bwd(x, w, group_end, out, dout):
    dx, dw = _backward_op()(x, w, group_end, dout)
    return dx, dw, ops.zeros_like(group_end)


_native.defbwd(_native_bwd)
