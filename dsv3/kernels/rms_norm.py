"""RMSNorm, alone and fused with the residual addition before it.

Each function has three implementations: C++ on the CPU (``elementwise.cc``), Ascend's own operator, and a
composition of MindSpore operators, which is the reference and runs everywhere. All compute in float32.
"""
from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.auto_generate import RmsNorm
from mindspore.ops.function.grad.grad_func import custom_vjp
from mindspore.ops.primitive import constexpr

from dsv3.kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x**2, -1) + eps) * weight``, computed in float32. Zhang and Sennrich, 2019, eq. 4.

    Args:
        x: [..., D], any float dtype.
        weight: [D], any float dtype.
        eps: a Python float.

    Returns:
        [..., D] in the dtype of ``x``; gradients flow to ``x`` and ``weight``.

    Raises:
        ValueError: weight is not [D].
    """
    _check("rms_norm", x.shape, x.shape, weight.shape)
    if native.enabled():
        return _native_norm(_float32(x), _float32(weight), _eps_tensor(eps)).astype(x.dtype)
    if native.on_ascend():
        return _fused(eps)(x, weight.astype(x.dtype))[0]
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum ``x + residual`` and its ``rms_norm``: the step between a sublayer and the next.

    Args:
        x, residual: [..., D], of one shape and one float dtype.
        weight: [D], any float dtype.
        eps: a Python float.

    Returns:
        (sum, normed), both [..., D] in the dtype of ``x``; gradients of both flow to ``x``, ``residual`` and
        ``weight``. In a dtype narrower than float32 the norm is that of the rounded sum.

    Raises:
        ValueError: shapes or dtypes of x and residual differ, or weight is not [D].
    """
    _check("add_rms_norm", x.shape, residual.shape, weight.shape)
    if x.dtype != residual.dtype:
        raise ValueError(f"add_rms_norm: x is {x.dtype} and residual {residual.dtype}: cast one of them")
    if native.enabled():
        if x.dtype == ms.float32:
            return _native_add_norm(x, residual, _float32(weight), _eps_tensor(eps))
        total = (_float32(x) + _float32(residual)).astype(x.dtype)
        return total, rms_norm(total, weight, eps)
    if native.on_ascend():
        total = x + residual
        return total, rms_norm(total, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` composed of MindSpore operators: any device, any float dtype."""
    wide = _float32(x)
    inverse_rms = ops.rsqrt(ops.mean(ops.square(wide), -1, True) + eps)
    return (wide * inverse_rms * _float32(weight)).astype(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` composed of MindSpore operators: any device, any float dtype."""
    total = (_float32(x) + _float32(residual)).astype(x.dtype)
    return total, rms_norm_reference(total, weight, eps)


def _float32(x):
    return x.astype(ms.float32)


def _check(name, x, residual, weight):
    if x != residual:
        raise ValueError(f"{name}: expected x and residual of one shape, found {x} and {residual}")
    if len(x) < 1 or weight != x[-1:]:
        raise ValueError(f"{name}: expected weight {x[-1:]}, the last dimension of x {x}, found {weight}")


@constexpr
def _fused(eps):
    return RmsNorm(eps)


@constexpr
def _eps_tensor(eps):
    return Tensor(np.full(1, eps, np.float32))


@functools.cache
def _ops():
    def op(function, infer):  # the same function gives shapes and dtypes, since both only copy an input's
        return native.native_op("elementwise", function, infer, infer)

    return {
        "norm": op("rms_norm", lambda x, weight, eps: x),
        "norm_grad": op("rms_norm_grad", lambda x, weight, eps, dy: (x, weight)),
        "add_norm": op("add_rms_norm", lambda x, residual, weight, eps: (x, x)),
        "add_norm_grad": op("add_rms_norm_grad", lambda total, weight, eps, dtotal, dy: (total, weight)),
    }


@constexpr
def _op(name):
    return _ops()[name]


@custom_vjp
def _native_norm(x, weight, eps):
    return _op("norm")(x, weight, eps)


def _native_norm_backward(x, weight, eps, y, dy):
    dx, dweight = _op("norm_grad")(x, weight, eps, dy)
    return dx, dweight, ops.zeros_like(eps)


@custom_vjp
def _native_add_norm(x, residual, weight, eps):
    return _op("add_norm")(x, residual, weight, eps)


def _native_add_norm_backward(x, residual, weight, eps, outputs, doutputs):
    dx, dweight = _op("add_norm_grad")(outputs[0], weight, eps, doutputs[0], doutputs[1])
    return dx, dx, dweight, ops.zeros_like(eps)


_native_norm.defbwd(_native_norm_backward)
_native_add_norm.defbwd(_native_add_norm_backward)
