"""Attention by Ascend's fused operator: scores are made, normalised and used on the chip and are never in memory.

For heads whose widths are multiples of 16. ``attention.py`` makes queries, keys and values and says what is hidden.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.ops.operations.nn_ops import FlashAttentionScore
from mindspore.ops.primitive import constexpr

CAUSAL, MASKED = 2, 1  # sparse_mode: the lower triangle from the upper left corner; whatever the mask says
TRIANGLE = 2048  # side of the mask that sparse_mode 2 wants, whatever the lengths


@constexpr
def usable(*widths: int) -> bool:
    """Whether this device has the operator for heads of these widths."""
    return ms.get_context("device_target") == "Ascend" and all(n % 16 == 0 for n in widths)


def flash_attention(q, k, v, hidden, *, scale):
    """softmax(q k^T * scale, where not hidden) v. q: [B, H, T, d], k: [B, H, S, d], v: [B, H, S, V] -> [B, H, T, V].

    hidden: [B, 1, T, S] bool, True where a query must not look, or None for causal attention of a square. Operator and
    modes: MindSpore's ``FlashAttentionScore``; only ``usable`` devices have it.
    """
    if hidden is None:
        return _fused(q.shape[1], scale, CAUSAL)(q, k, v, None, None, None, _triangle(), None, None, None)[3]
    return _fused(q.shape[1], scale, MASKED)(q, k, v, None, None, None, hidden.astype(ms.uint8), None, None, None)[3]


@constexpr
def _fused(heads: int, scale: float, mode: int):
    return FlashAttentionScore(heads, scale_value=scale, input_layout="BNSD", sparse_mode=mode)


@constexpr
def _triangle() -> Tensor:
    return Tensor(np.triu(np.ones((TRIANGLE, TRIANGLE), np.uint8), 1))
