"""Matrix product with a weight: one plain 2-D product whatever the leading dims.

``ops.matmul`` of a 3-D by a 2-D tensor becomes a batched product here: it copies the weight once a row of the batch, and
its gradient too. ``MatMul`` on flattened rows also takes transposed operands in its gradient without copying them.
"""
from __future__ import annotations

from mindspore import Tensor, ops

_matmul = ops.MatMul()


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x w. x: [..., D], w: [D, F] -> [..., F], in their common dtype."""
    if len(x.shape) == 2:
        return _matmul(x, w)
    return _matmul(x.reshape(-1, x.shape[-1]), w).reshape(x.shape[:-1] + (w.shape[1],))
