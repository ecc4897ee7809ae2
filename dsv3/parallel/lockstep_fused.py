"""What Ascend's fused operators compute, in NumPy, for ``lockstep``: by the formulas of their documentation."""
from __future__ import annotations

from typing import Any

import numpy as np

BNSD = 1  # input_layout as the program stores it
TRIANGLE = 2048
COPIES = 8  # the statistics of a row are stored this many times


def _hidden(mask: Any, mode: int, queries: int, keys: int) -> np.ndarray:
    """[..., T, S] bool, True where a query must not look. mode: 1 as ``mask`` says, 2 the triangle above the diagonal."""
    triangle = np.triu(np.ones((TRIANGLE, TRIANGLE), bool), 1)
    if mode == 1:
        return np.asarray(mask).astype(bool)
    if mode != 2 or not np.array_equal(np.asarray(mask).astype(bool), triangle):
        raise ValueError(f"sparse_mode={mode}: expected 1 with a mask, or 2 with the triangle of {TRIANGLE} x {TRIANGLE}")
    return np.triu(np.ones((queries, keys), bool), 1)


def _scores(q, k, mask, settings: tuple) -> np.ndarray:
    """Scaled scores [B, H, T, S], -inf where hidden. settings: heads, keep_prob, scale, -, -, -, layout, sparse_mode."""
    heads, keep, scale, *_, layout, mode = settings
    if float(keep) != 1 or int(layout) != BNSD or int(heads) != q.shape[1] or k.shape[1] != q.shape[1]:
        raise ValueError(f"keep_prob={keep}, input_layout={layout}, {heads} heads of {q.shape[1]} and {k.shape[1]}: expected "
                         f"1.0, {BNSD} (BNSD) and equal numbers, as the model's programs have")
    scores = np.matmul(q, k.swapaxes(-1, -2)) * np.float32(scale)
    return np.where(_hidden(mask, int(mode), q.shape[2], k.shape[2]), -np.inf, scores)


def _flash(node, q, k, v, shift, drop, padding, mask, prefix, lengths_q, lengths_kv, *settings):
    _none(shift, drop, padding, prefix, lengths_q, lengths_kv)
    scores = _scores(q, k, mask, settings)
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True)
    return np.repeat(top, COPIES, -1), np.repeat(total, COPIES, -1), np.zeros(1, q.dtype), np.matmul(e / total, v)


def _flash_grad(node, q, k, v, dy, shift, drop, padding, mask, top, total, weights, out, prefix, len_q, len_kv, *settings):
    _none(shift, drop, padding, prefix, len_q, len_kv)
    scale = np.float32(settings[2])
    p = np.exp(_scores(q, k, mask, settings) - top[..., :1]) / total[..., :1]
    ds = p * (np.matmul(dy, v.swapaxes(-1, -2)) - (dy * out).sum(-1, keepdims=True)) * scale
    return np.matmul(ds, k), np.matmul(ds.swapaxes(-1, -2), q), np.matmul(p.swapaxes(-1, -2), dy), np.zeros(0, q.dtype)


def _dynamic_quant(node, x, smooth):
    _none(smooth)
    token = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.rint(x / token).astype(np.int8), token[..., 0]


def _quant_matmul(node, x, w, scale, offset, bias, token, *_):
    _none(offset, bias)
    return np.matmul(x.astype(np.int32), w.astype(np.int32)) * scale * (1 if token is None else token[:, None])


def _weight_quant_matmul(node, x, w, scale, offset, quant_scale, quant_offset, bias, *_):
    _none(offset, quant_scale, quant_offset, bias)
    return np.matmul(x, w * scale)


def _none(*values: Any) -> None:
    if any(v is not None for v in values):
        raise ValueError("an argument is given that the model's programs leave out: a shift, dropout, padding, prefix, lengths, "
                         "bias, offset")


def adamw(p, m, v, most, grad, step, rate, beta1, beta2, decay, eps, amsgrad, maximize, *_) -> tuple[np.ndarray, ...]:
    """New p, m and v (arXiv 1711.05101, algorithm 2), as aclnnApplyAdamWV2 has it; scalars as float32."""
    if amsgrad or maximize:
        raise ValueError(f"amsgrad={amsgrad}, maximize={maximize}: expected neither, as the model's programs have")
    rate, beta1, beta2, decay, eps = (np.float32(x) for x in (rate, beta1, beta2, decay, eps))
    t, one = np.float32(np.asarray(step).reshape(())), np.float32(1)
    m, v = beta1 * m + (one - beta1) * grad, beta2 * v + (one - beta2) * np.square(grad)
    new = p - rate * decay * p - rate * (m / (one - beta1**t)) / (np.sqrt(v / (one - beta2**t)) + eps)
    return new, m, v


FUSED = {"FlashAttentionScore": _flash, "FlashAttentionScoreGrad": _flash_grad, "DynamicQuantExt": _dynamic_quant,
         "QuantBatchMatmul": _quant_matmul, "WeightQuantBatchMatmul": _weight_quant_matmul}
