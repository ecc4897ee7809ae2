"""SwiGLU's element-wise half: the gate's SiLU times the other projection.

Two implementations: C++ on the CPU (``elementwise.cc``) and a composition of MindSpore operators, which is
the reference and what every other device compiles, with a backward that keeps no more than the C++ one does.
Both compute in float32.
"""
from __future__ import annotations

import functools

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.function.grad.grad_func import custom_vjp
from mindspore.ops.primitive import constexpr

from dsv3.kernels import native


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` with ``silu(g) = g / (1 + exp(-g))``, computed in float32. Shazeer, 2020, eq. 5.

    Args:
        gate, up: of one shape and one float dtype.

    Returns:
        That shape and dtype; gradients flow to both. The backward recomputes the sigmoid and keeps only the
        arguments.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    _check(gate.shape, up.shape)
    if gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate is {gate.dtype} and up {up.dtype}: cast one of them")
    if native.enabled():
        return _native(gate.astype(ms.float32), up.astype(ms.float32)).astype(gate.dtype)
    return _composed(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``swiglu`` composed of MindSpore operators: any device, any float dtype."""
    wide = gate.astype(ms.float32)
    return (wide * ops.sigmoid(wide) * up.astype(ms.float32)).astype(gate.dtype)


@constexpr
def _check(gate, up):  # shapes that a program knows when it runs would make a raise part of the graph
    if gate != up:
        raise ValueError(f"swiglu: expected gate and up of one shape, found {gate} and {up}")


@functools.cache
def _ops():
    def op(function, infer):
        return native.native_op("elementwise", function, infer, infer)

    return {"forward": op("swiglu", lambda gate, up: gate),
            "backward": op("swiglu_grad", lambda gate, up, dout: (gate, up))}


@constexpr
def _op(name):
    return _ops()[name]


@custom_vjp
def _native(gate, up):
    return _op("forward")(gate, up)


def _native_backward(gate, up, out, dout):
    dgate, dup = _op("backward")(gate, up, dout)
    return dgate, dup


_native.defbwd(_native_backward)


@custom_vjp
def _composed(gate, up):
    return swiglu_reference(gate, up)


def _composed_backward(gate, up, out, dout):
    # Without depend the float32 copies would be those of the forward pass, kept instead of gate and up.
    gate, up, dout = ops.depend(gate, dout), ops.depend(up, dout), dout.astype(ms.float32)
    wide = gate.astype(ms.float32)
    share = ops.sigmoid(wide)
    silu = wide * share
    return (dout * up.astype(ms.float32) * (share + silu * (1 - share))).astype(gate.dtype), (dout * silu).astype(up.dtype)


_composed.defbwd(_composed_backward)
