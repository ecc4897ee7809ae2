"""Multi-head latent attention between its projections: rotation, causal scores, softmax, values.

``mla_attention`` is one function with three implementations: C++ on the CPU (``attention.cc``), Ascend's fused
operator (``flash.py``), and a composition of MindSpore operators, which is the reference and runs everywhere.
"""
from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.ops.function.grad.grad_func import custom_vjp
from mindspore.ops.primitive import constexpr

from dsv3.kernels import flash, native
from dsv3.kernels.rotary import apply_rotary


def mla_attention(q, kv, k_pe, cos, sin, segment_ids, *, num_heads, qk_nope_head_dim, qk_rope_head_dim,
                  v_head_dim, scale, query_positions=None):
    """Causal attention of H heads that share one rotary key. DeepSeek-V3 report, eqs. 4 and 7 to 10.

    Token t attends to s when s <= t and both carry the same segment id. Scores are
    ``(q_nope . k_nope + rotate(q_pe) . rotate(k_pe)) * scale``; the softmax is in float32.

    Args:
        q: [B, T, H*(N+R)], of every head the N plain channels, then the R rotary ones, not yet rotated.
        kv: [B, T, H*(N+V)], of every head the plain key, then the value.
        k_pe: [B, T, R], not yet rotated, the same for all heads.
        cos, sin: [B or 1, T, R/2] float32; constants, without gradient.
        segment_ids: [B, T] int32, the document of each token, or None for one document a row.
        num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: H, N, R (even) and V.
        scale: the softmax scale, a Python float.
        query_positions: None, or [t] int32: then q has t tokens, at these positions of the T that all else is about.

    Returns:
        [B, T, H*V] in the dtype of ``q``, or [B, t, H*V].

    Raises:
        ValueError: a tensor's shape does not follow from the sizes given, R is odd, or dtypes differ.
    """
    H, N, R, V = num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
    _check_shapes(q, kv, k_pe, cos, sin, segment_ids, H, N, R, V, query_positions)
    if kv.dtype != q.dtype or k_pe.dtype != q.dtype:
        raise ValueError(f"kv and k_pe: expected the dtype of q, {q.dtype}, found {kv.dtype} and "
                         f"{k_pe.dtype}; cast them")
    if cos.dtype != ms.float32 or sin.dtype != ms.float32:
        raise ValueError(f"cos and sin: expected Float32, found {cos.dtype} and {sin.dtype}; "
                         f"keep the tables in float32")
    if native.enabled() and q.dtype == ms.float32 and query_positions is None:
        segments = _no_segments() if segment_ids is None else segment_ids.astype(ms.int32)
        out_BTHV, _ = _native(q, kv, k_pe, cos, sin, segments, _head_scale(num_heads, scale))
        return out_BTHV
    sizes = (H, N, R, V)
    if flash.usable(N + R, V):
        q, k, v, hidden_BTS = _rotated(q, kv, k_pe, cos, sin, segment_ids, query_positions, sizes)
        if segment_ids is None and query_positions is None:
            out_BHTV = flash.flash_attention(q, k, v, None, scale=scale)
        else:
            hidden_BHTS = ops.broadcast_to(ops.expand_dims(hidden_BTS, 1), (q.shape[0], 1, q.shape[2], k.shape[2]))
            out_BHTV = flash.flash_attention(q, k, v, hidden_BHTS, scale=scale)
        return out_BHTV.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], H * V)
    return mla_attention_reference(q, kv, k_pe, cos, sin, segment_ids, num_heads=H, qk_nope_head_dim=N,
                                   qk_rope_head_dim=R, v_head_dim=V, scale=scale, query_positions=query_positions)


def mla_attention_reference(q, kv, k_pe, cos, sin, segment_ids, *, num_heads, qk_nope_head_dim,
                            qk_rope_head_dim, v_head_dim, scale, query_positions=None):
    """``mla_attention`` composed of MindSpore operators: any device, any float dtype."""
    sizes = (num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
    q_BHTd, k_BHSd, v_BHSV, hidden_BTS = _rotated(q, kv, k_pe, cos, sin, segment_ids, query_positions, sizes)
    scores_BHTS = mint.matmul(q_BHTd, k_BHSd.transpose(0, 1, 3, 2)).astype(ms.float32) * scale
    # the lowest finite number, not -inf: every row sees its own token, so this exponential is an exact 0 too
    scores_BHTS = ops.masked_fill(scores_BHTS, ops.expand_dims(hidden_BTS, 1), _lowest())
    weights_BHTS = ops.softmax(scores_BHTS, -1).astype(q.dtype)
    out_BHTV = mint.matmul(weights_BHTS, v_BHSV)
    return out_BHTV.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[1], num_heads * v_head_dim)


def _rotated(q, kv, k_pe, cos, sin, segment_ids, query_positions, sizes):
    """Queries [B, H, T, N+R], keys [B, H, S, N+R], values [B, H, S, V], and what is hidden from whom: [B or 1, T, S] bool."""
    H, N, R, V = sizes
    B, T, _ = q.shape
    S = kv.shape[1]
    q_cos, q_sin, q_segments, k_position_S = cos, sin, segment_ids, native.iota(S)
    q_position_T = k_position_S
    if query_positions is not None:
        q_position_T = query_positions
        q_cos, q_sin = ops.gather(cos, query_positions, 1), ops.gather(sin, query_positions, 1)
        if segment_ids is not None:
            q_segments = ops.gather(segment_ids, query_positions, 1)
    q_nope_BTHN, q_pe_BTHR = ops.split(q.reshape(B, T, H, N + R), (N, R), -1)
    k_nope_BSHN, v_BSHV = ops.split(kv.reshape(B, S, H, N + V), (N, V), -1)
    q_pe_BTHR = apply_rotary(q_pe_BTHR, q_cos, q_sin)
    k_pe_BSHR = ops.broadcast_to(apply_rotary(k_pe.reshape(B, S, 1, R), cos, sin), (B, S, H, R))
    q_BHTd = mint.cat((q_nope_BTHN, q_pe_BTHR), -1).transpose(0, 2, 1, 3)
    k_BHSd = mint.cat((k_nope_BSHN, k_pe_BSHR), -1).transpose(0, 2, 1, 3)
    hidden_BTS = (q_position_T.reshape(T, 1) < k_position_S.reshape(1, S)).reshape(1, T, S)
    if segment_ids is not None:
        hidden_BTS = ops.logical_or(hidden_BTS, q_segments.reshape(B, T, 1) != segment_ids.reshape(B, 1, S))
    return q_BHTd, k_BHSd, v_BSHV.transpose(0, 2, 1, 3), hidden_BTS


def _check_shapes(q, kv, k_pe, cos, sin, segment_ids, H, N, R, V, query_positions):
    if R % 2:
        raise ValueError(f"rotary pairs channels: expected an even qk_rope_head_dim, found {R}")
    B, t, _ = q.shape
    T = t if query_positions is None else kv.shape[1]
    if query_positions is not None and query_positions.shape != (t,):
        raise ValueError(f"query_positions: expected {(t,)}, one for each token of q, found {query_positions.shape}")
    if q.shape[2] != H * (N + R):
        raise ValueError(f"q: expected [B, T, {H * (N + R)}] (num_heads * (qk_nope_head_dim + "
                         f"qk_rope_head_dim)), found {q.shape}")
    if kv.shape != (B, T, H * (N + V)):
        raise ValueError(f"kv: expected {(B, T, H * (N + V))} (B and T of q, num_heads * (qk_nope_head_dim + "
                         f"v_head_dim)), found {kv.shape}")
    if k_pe.shape != (B, T, R):
        raise ValueError(f"k_pe: expected {(B, T, R)} (B and T of q, qk_rope_head_dim), found {k_pe.shape}")
    if cos.shape != sin.shape or cos.shape[1:] != (T, R // 2) or cos.shape[0] not in (1, B):
        raise ValueError(f"cos and sin: expected [{B} or 1, {T}, {R // 2}], found {cos.shape} and "
                         f"{sin.shape}; slice the rotary tables to the {T} positions of q")
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids: expected {(B, T)} like q, found {segment_ids.shape}")


@constexpr
def _lowest():
    return float(np.finfo(np.float32).min)


@constexpr
def _no_segments():
    return Tensor(np.zeros(1, np.int32))  # one dim instead of two tells the kernel that there are none


@constexpr
def _head_scale(num_heads, scale):
    return Tensor(np.full(num_heads, scale, np.float32))  # its length tells the kernel the number of heads


@functools.cache
def _ops():
    def forward_shape(q, kv, k_pe, cos, sin, segments, scale):
        H = scale[0]
        return (q[0], q[1], kv[2] - q[2] + H * k_pe[2]), (q[0], H, q[1], 2)

    def forward_dtype(q, kv, k_pe, cos, sin, segments, scale):
        return q, q

    def backward_shape(q, kv, k_pe, cos, sin, segments, scale, rows, dout):
        return q, kv, k_pe

    def backward_dtype(q, kv, k_pe, cos, sin, segments, scale, rows, dout):
        return q, kv, k_pe

    return (native.native_op("attention", "mla_forward", forward_shape, forward_dtype),
            native.native_op("attention", "mla_backward", backward_shape, backward_dtype))


@constexpr
def _forward_op():
    return _ops()[0]


@constexpr
def _backward_op():
    return _ops()[1]


@custom_vjp
def _native(q, kv, k_pe, cos, sin, segments, scale):
    return _forward_op()(q, kv, k_pe, cos, sin, segments, scale)


def _native_backward(q, kv, k_pe, cos, sin, segments, scale, result, dresult):
    dq, dkv, dk_pe = _backward_op()(q, kv, k_pe, cos, sin, segments, scale, result[1], dresult[0])
    return (dq, dkv, dk_pe, ops.zeros_like(cos), ops.zeros_like(sin), ops.zeros_like(segments),
            ops.zeros_like(scale))


_native.defbwd(_native_backward)
