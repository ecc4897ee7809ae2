"""The paged latent cache: writing rows into it, and attention over it with the up-projections absorbed.

A cache of one layer is a pool [S, C + R] of rows, each the normalised latent and the rotated key of one token; ``block_size``
rows in a line are a block, and a sequence's table lists its blocks. Two implementations: C++ on the CPU (``latent.cc``), and a
composition of MindSpore operators, which is the reference and what other devices compile.
"""
from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.ops.primitive import constexpr

from dsv3.kernels import native
from dsv3.kernels.rms_norm import rms_norm
from dsv3.kernels.rotary import apply_rotary


def write_latents(latent, norm, cos, sin, positions, slots, pool, *, eps):
    """What is cached of n tokens, left in their slots of the pool and returned. DeepSeek-V3 report, eqs. 1 to 3.

    Args:
        latent: [n, C + R], as projected: neither normalised nor rotated.
        norm: [C], the weight of the latent's RMSNorm.
        cos, sin: [L, R/2] float32, a row for every position.
        positions, slots: [n] int32, where a token is in its sequence and where its row goes in the pool.
        pool: [S, C + R]; changes in place.

    Returns:
        [n, C + R]: the normalised latent, then the rotated key (all real parts, then all imaginary ones). Whatever reads the
        pool must depend on it (``latent_attention`` takes it as ``written``).
    """
    _check_write(latent.shape, norm.shape, cos.shape, positions.shape, slots.shape, pool.shape)
    if native.enabled():
        return _write_op()(latent, norm, cos, sin, positions, slots, pool, numbers(eps))
    return write_latents_reference(latent, norm, cos, sin, positions, slots, pool, eps=eps)


def write_latents_reference(latent, norm, cos, sin, positions, slots, pool, *, eps):
    """``write_latents`` composed of MindSpore operators."""
    n, C, R = latent.shape[0], norm.shape[0], latent.shape[1] - norm.shape[0]
    plain, k_pe = ops.split(latent, (C, R), -1)
    turned = apply_rotary(k_pe.reshape(1, n, 1, R), *_angles(cos, sin, positions))
    rows = mint.cat((rms_norm(plain, norm, eps), turned.reshape(n, R)), -1)
    written = ops.scatter_update(pool, slots, rows)
    return ops.depend(rows, written)


def latent_attention(q, w, cos, sin, positions, tables, pool, written, *, num_heads, scale, block_size):
    """Attention of new tokens over what is cached of their sequences, themselves included, in the absorbed form.

    With k = c W_k and v = c W_v of a head, q k' = (q W_k') c' and (softmax) v = ((softmax) c) W_v: scores and sums are made of
    the latents, C + R values a token instead of H (N + R + V) (report section 2.1.1; DeepSeek-V2, appendix C).

    Args:
        q: [n, H * (N + R)], of every head the N plain channels, then the R rotary ones, not yet rotated.
        w: [C, H * (N + V)], the up-projection of keys and values.
        cos, sin: [L, R/2] float32, a row for every position.
        positions: [n] int32; token i sees positions 0 to positions[i] of its sequence.
        tables: [B, M] int32, the blocks of each sequence; token i belongs to row i // (n / B).
        pool: [S, C + R], in which position p of a sequence is row table[p // block_size] * block_size + p % block_size.
        written: the result of ``write_latents``.

    Returns:
        [n, H * V] in the dtype of q.
    """
    _check_attention(q.shape, w.shape, cos.shape, positions.shape, tables.shape, pool.shape, num_heads, block_size)
    if native.enabled():
        return _attention_op()(q, w, cos, sin, positions, tables, pool, per_head(num_heads, scale), length(block_size), written)
    return latent_attention_reference(q, w, cos, sin, positions, tables, pool, written, num_heads=num_heads, scale=scale,
                                      block_size=block_size)


def latent_attention_reference(q, w, cos, sin, positions, tables, pool, written, *, num_heads, scale, block_size):
    """``latent_attention`` composed of MindSpore operators: whole tables are read, what is not seen is masked."""
    n, H, C, R = q.shape[0], num_heads, w.shape[0], 2 * cos.shape[1]
    B, M = tables.shape
    T, S, N = n // B, M * block_size, q.shape[1] // H - R
    q_nope, q_pe = ops.split(q.reshape(n, H, N + R), (N, R), -1)
    w_CHd = w.reshape(C, H, w.shape[1] // H)
    w_k_HNC, w_v_HCV = w_CHd[:, :, :N].transpose(1, 2, 0), w_CHd[:, :, N:].transpose(1, 0, 2)
    q_HnC = mint.matmul(q_nope.transpose(1, 0, 2), w_k_HNC)
    q_nHR = apply_rotary(q_pe.reshape(1, n, H, R), *_angles(cos, sin, positions)).reshape(n, H, R)
    query = mint.cat((q_HnC.transpose(1, 0, 2), q_nHR), -1).reshape(B, T * H, C + R)
    slots = (tables.reshape(B, M, 1) * block_size + native.iota(block_size)).reshape(B, S)
    rows = ops.gather(ops.depend(pool, written), slots, 0)
    scores = mint.matmul(query, rows.transpose(0, 2, 1)).astype(ms.float32).reshape(B, T, H, S) * scale
    hidden = positions.reshape(B, T, 1, 1) < native.iota(S).reshape(1, 1, 1, S)
    weights = ops.softmax(ops.masked_fill(scores, hidden, _lowest()), -1).astype(q.dtype)
    sums = mint.matmul(weights.reshape(B, T * H, S), rows[:, :, :C]).reshape(n, H, C)
    out_HnV = mint.matmul(sums.transpose(1, 0, 2), w_v_HCV)
    return out_HnV.transpose(1, 0, 2).reshape(n, out_HnV.shape[2] * H)


def _angles(cos, sin, positions):
    return ops.gather(cos, positions, 0).expand_dims(0), ops.gather(sin, positions, 0).expand_dims(0)


@constexpr
def _check_write(latent, norm, cos, positions, slots, pool):
    n, W = latent
    if pool[1:] != (W,) or 2 * cos[1] != W - norm[0] or positions != (n,) or slots != (n,):
        raise ValueError(f"write_latents: expected latent [n, C + R], norm [C], cos [L, R/2], positions and slots [n], pool "
                         f"[S, C + R], found {latent}, {norm}, {cos}, {positions}, {slots}, {pool}")


@constexpr
def _check_attention(q, w, cos, positions, tables, pool, H, block_size):
    n, C, R = q[0], w[0], 2 * cos[1]
    if pool[1] != C + R or q[1] % H or w[1] % H or q[1] // H <= R or positions != (n,) or n % tables[0]:
        raise ValueError(f"latent_attention with {H} heads: expected q [n, H(N+R)], w [C, H(N+V)], cos [L, R/2], positions [n], "
                         f"tables [B, M] with B dividing n, pool [S, C + R], found {q}, {w}, {cos}, {positions}, {tables}, "
                         f"{pool}")
    if pool[0] % block_size:
        raise ValueError(f"latent_attention: a pool of {pool[0]} rows is not made of blocks of {block_size}")


@constexpr
def _lowest():
    return float(np.finfo(np.float32).min)


@constexpr
def numbers(*values):
    return Tensor(np.array(values, np.float32))


@constexpr
def per_head(num_heads, scale):
    return Tensor(np.full(num_heads, scale, np.float32))  # its length tells the kernel the number of heads


@constexpr
def length(n):
    return Tensor(np.zeros(n, np.int32))  # tells the kernel the size of a block


@functools.cache
def _ops():
    def attention_shape(q, w, cos, sin, positions, tables, pool, scale, block, written):
        H, C = scale[0], w[0]
        return (q[0], w[1] - q[1] + H * (pool[1] - C))

    return (native.native_op("latent", "latent_write", lambda latent, *rest: latent, lambda latent, *rest: latent),
            native.native_op("latent", "latent_attention", attention_shape, lambda q, *rest: q))


@constexpr
def _write_op():
    return _ops()[0]


@constexpr
def _attention_op():
    return _ops()[1]
