"""Matrix product with a weight: one plain 2-D product whatever the leading dims.

``ops.matmul`` of a 3-D by a 2-D tensor becomes a batched product here: it copies the weight once a row of the batch, and
its gradient too. ``MatMul`` on flattened rows also takes transposed operands in its gradient without copying them.

Up to ``FEW_ROWS`` rows, as when decoding, the CPU has a kernel of its own (``rows.h``): it reads the weight once, where MatMul
copies it first, and what it makes of a row does not depend, bit for bit, on how many rows stand beside it.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.function.grad.grad_func import custom_vjp
from mindspore.ops.primitive import constexpr

from . import native
from .int8 import int8_linear

FEW_ROWS = 32  # kFewRows of rows.h

_matmul, _matmul_tb, _matmul_ta = ops.MatMul(), ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)


def linear(x: Tensor, w: Tensor | dict) -> Tensor:
    """x w. x: [..., D], w: [D, F], quantised (see ``int8``) or in x's dtype -> [..., F] in x's dtype. Raises ValueError when
    the two D differ."""
    if len(x.shape) == 2:
        return _product(x, w)
    out = _product(x.reshape(-1, x.shape[-1]), w)
    return out.reshape(x.shape[:-1] + (out.shape[1],))


def _product(x, w):
    if isinstance(w, dict):
        return int8_linear(x, w)
    if native.enabled() and _few(x.shape, w.shape) and x.dtype == ms.float32 and w.dtype == ms.float32:
        return _native(x, w)
    return _matmul(x, w)


@constexpr
def _few(x: tuple, w: tuple) -> bool:
    if x[1] != w[0]:
        raise ValueError(f"linear: expected x [..., {w[0]}] for w {list(w)}, found {list(x)}")
    return 1 <= x[0] <= FEW_ROWS


@constexpr
def _rows_op():
    return native.native_op("rows", "rows", lambda x, w: (x[0], w[1]), lambda x, w: x)


@custom_vjp
def _native(x, w):
    return _rows_op()(x, w)


def _native_bwd(x, w, out, dout):
    return _matmul_tb(dout, w), _matmul_ta(x, dout)


_native.defbwd(_native_bwd)
