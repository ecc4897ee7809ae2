"""Products with int8 weights, one scale a column: y = (x q) scale.

A quantised weight stands in the params as {mode: q, "scale": scale}: q int8 [D, F] (experts [E, D, F]), scale float32 [F]
([E, F]). The mode is a key, so that a graph knows it while it is compiled:

w8a16: activations stay as they are; weights take a quarter of float32's memory, and of its traffic.
w8a8: each token is rounded to int8 too, x ~ t round(x / t) with t = max |x| / 127 over D, and the products are of integers.

On the CPU C++ computes them (``products.h``): a row's result is the same, bit for bit, in any batch, and w8a8's sums are exact.
On Ascend the device's own operators do, in bfloat16 or float16. Elsewhere, and in the references, what the integers stand for is
multiplied. There is no gradient.
"""
from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.function.grad.grad_func import custom_vjp
from mindspore.ops.primitive import constexpr

from . import native

_matmul, _rint = ops.MatMul(), ops.Rint()


def int8_linear(x: Tensor, w: dict) -> Tensor:
    """x [N, D] times a quantised weight [D, F] -> [N, F] in x's dtype. Raises ValueError when the two D differ, for a device
    without such a product in x's dtype, and when it is differentiated."""
    _check(x.shape, integers(w).shape)
    return _linear(x, integers(w), w["scale"], "w8a8" in w)


def int8_linear_reference(x: Tensor, w: dict) -> Tensor:
    """``int8_linear`` as the float32 product of what the integers stand for."""
    return _matmul(activations(x, w).astype(ms.float32), widened(w)).astype(x.dtype)


def integers(w: Any) -> Tensor:
    """The tensor of a weight: the int8 one of a quantised weight."""
    if isinstance(w, dict):
        return w["w8a8"] if "w8a8" in w else w["w8a16"]
    return w


def widened(w: dict) -> Tensor:
    """What a quantised weight stands for, float32."""
    return integers(w).astype(ms.float32) * w["scale"].expand_dims(-2)


def activations(x: Tensor, w: dict) -> Tensor:
    """What is multiplied with a quantised weight: x; for w8a8 t round(x / t), to nearest even, of each row, in x's dtype."""
    if "w8a16" in w:
        return x
    wide = x.astype(ms.float32)
    largest = ops.amax(ops.abs(wide), -1, True)
    token = ops.select(largest == 0, ops.ones_like(largest), largest / 127)
    return (_rint(wide / token) * token).astype(x.dtype)


@constexpr
def _check(x: tuple, q: tuple) -> None:
    if x[1] != q[0]:
        raise ValueError(f"linear: expected x [..., {q[0]}] for a quantised weight {list(q)}, found {list(x)}")


@custom_vjp
def _linear(x, q, scale, tokens):
    if native.enabled() and x.dtype == ms.float32:
        return _rows_op()(x, q, scale, _flags(tokens))
    if native.on_ascend():
        return _linear_on_ascend(x, q, scale, tokens)
    return int8_linear_reference(x, {"w8a8": q, "scale": scale} if tokens else {"w8a16": q, "scale": scale})


@constexpr
def _rows_op():
    return native.native_op("rows", "rows_int8", lambda x, q, scale, rounds: (x[0], q[1]), lambda x, q, scale, rounds: x)


@constexpr
def _refuse() -> None:
    raise ValueError("quantised params have no gradient: train the float params, and quantise what comes of it")


def _linear_bwd(x, q, scale, tokens, out, dout):
    _refuse()
    return dout, q, scale, tokens


_linear.defbwd(_linear_bwd)


def int8_experts(x: Tensor, w_gate: Any, w_up: Any, w_down: Any, idx: Tensor, weights: Tensor) -> Tensor:
    """``experts`` by the native kernel, with quantised weights; some may be float32. x float32, idx int32, weights float32."""
    q, scales, rounds = operands(w_gate, w_up, w_down)
    return _experts(x, q[0], q[1], q[2], idx, weights, scales[0], scales[1], scales[2], rounds)


def operands(*weights: Any) -> tuple:
    """What native operators take of weights that may be quantised: (tensors, scales, rounds [len] int32: which are w8a8)."""
    tensors, scales, flags = (), (), ()
    for w in weights:
        tensors = tensors + (integers(w),)
        scales = scales + (w["scale"] if isinstance(w, dict) else _none(),)
        flags = flags + ("w8a8" in w if isinstance(w, dict) else False,)
    return tensors, scales, _flags(*flags)


@constexpr
def _flags(*flags: bool) -> Tensor:
    return Tensor(flags, ms.int32)


@constexpr
def _none() -> Tensor:
    return Tensor(np.zeros(1, np.float32))  # stands where a float32 weight has no scale


@custom_vjp
def _experts(x, gate, up, down, idx, weights, gate_scale, up_scale, down_scale, rounds):
    return _experts_op()(x, gate, up, down, idx, weights, gate_scale, up_scale, down_scale, rounds)[0]


@constexpr
def _experts_op():
    def shapes(x, gate, up, down, idx, weights, gate_scale, up_scale, down_scale, rounds):
        pairs, F = idx[0] * idx[1], gate[2]
        return x, (pairs, F), (pairs, F), (pairs,), (gate[0],), (pairs, x[1])

    def dtypes(x, gate, up, down, idx, weights, gate_scale, up_scale, down_scale, rounds):
        return x, x, x, idx, idx, x

    return native.native_op("moe", "experts_int8", shapes, dtypes)


def _experts_bwd(x, gate, up, down, idx, weights, gate_scale, up_scale, down_scale, rounds, out, dout):
    _refuse()
    return dout, gate, up, down, idx, weights, gate_scale, up_scale, down_scale, rounds


_experts.defbwd(_experts_bwd)


# -- Ascend ------------------------------------------------------------------------------------------------------------
def _linear_on_ascend(x, q, scale, tokens):
    _check_ascend(x.dtype)
    if tokens:
        rounded, token = ops.auto_generate.DynamicQuantExt()(x)
        return ops.auto_generate.QuantBatchMatmul(dtype=x.dtype)(rounded, q, scale, None, None, token)
    return ops.auto_generate.WeightQuantBatchMatmul()(x, q, scale.astype(x.dtype))


def grouped_on_ascend(x: Tensor, w: dict, group_end: Tensor) -> Tensor:
    """``grouped_matmul`` of x [M, D] with quantised weights [E, D, F] by CANN's operator; group_end [E] int64."""
    _check_ascend(x.dtype)
    if "w8a8" in w:
        rounded, token = ops.auto_generate.DynamicQuantExt()(x)
        scale = w["scale"].astype(ms.bfloat16) if x.dtype == ms.bfloat16 else w["scale"]  # it decides the result's dtype
        return ops.auto_generate.grouped_matmul_v4([rounded], [w["w8a8"]], scale=[scale], pre_token_scale=[token],
                                                   group_list=group_end, split_item=3, group_type=0, output_dtype=x.dtype)[0]
    scale = w["scale"].astype(x.dtype)
    return ops.auto_generate.grouped_matmul_v4([x], [w["w8a16"]], antiquant_scale=[scale],
                                               antiquant_offset=[ops.zeros_like(scale)], group_list=group_end, split_item=3,
                                               group_type=0)[0]


@constexpr
def _check_ascend(dtype) -> None:
    if dtype not in (ms.float16, ms.bfloat16):
        raise ValueError(f"Ascend multiplies quantised weights with bfloat16 or float16, found {dtype}: load the params in one")
