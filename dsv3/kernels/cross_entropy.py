"""Cross entropy of logits, and of the product that makes them without keeping them.

Each function has two implementations: C++ on the CPU (``cross_entropy.cc``) and a composition of MindSpore
operators, which is the reference and what every other device compiles. Both compute in float32.
"""
from __future__ import annotations

import functools

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.function.grad.grad_func import custom_vjp
from mindspore.ops.primitive import constexpr

from dsv3.kernels import native
from dsv3.kernels.native import iota


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``ln sum exp(logits) - logits[label]`` of each token.

    Args:
        logits: [tokens, W], any float dtype.
        labels: [tokens] int32, below W; a negative one is ignored.

    Returns:
        [tokens] float32, 0 where the label is ignored; the gradient to ``logits`` is 0 there too.

    Raises:
        ValueError: shapes or the dtype of labels do not fit. RuntimeError, on the CPU's native kernel: a
            label is not below W.
    """
    _check("cross_entropy", logits.shape, labels.shape)
    _check_labels("cross_entropy", labels.dtype)
    if native.enabled():
        loss, _ = _native(logits.astype(ms.float32), labels)
        return loss
    return cross_entropy_reference(logits, labels)


def linear_cross_entropy(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """``cross_entropy(h @ w, labels)`` that never holds the logits of all tokens.

    The native forward keeps two numbers a token, and the backward makes the logits again, a chunk of 512
    tokens at a
    time: 8 instead of 6 operations per token, hidden channel and vocabulary entry, for 512 instead of twice
    ``tokens`` rows of W float32.

    Args:
        h: [tokens, D], any float dtype.
        w: [D, W], any float dtype.
        labels: [tokens] int32, below W; a negative one is ignored.

    Returns:
        [tokens] float32, 0 where the label is ignored; gradients flow to ``h`` and ``w``.

    Raises:
        ValueError: shapes or the dtype of labels do not fit. RuntimeError, on the CPU's native kernel: a
            label is not below W.
    """
    _check_product(h.shape, w.shape)
    _check("linear_cross_entropy", h.shape, labels.shape)
    _check_labels("linear_cross_entropy", labels.dtype)
    if native.enabled():
        loss, _ = _native_linear(h.astype(ms.float32), w.astype(ms.float32), labels)
        return loss
    return linear_cross_entropy_reference(h, w, labels)


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """``cross_entropy`` composed of MindSpore operators: any device, any float dtype. It keeps the logits as they come and a
    number a token; the backward makes softmax minus one hot of these."""
    return _composed(logits, labels)[0]


def logits_gradient(logits: Tensor, top: Tensor, total: Tensor, column: Tensor, weight: Tensor, dloss: Tensor) -> Tensor:
    """(exp(logits - top) / total - weight at the column of the label) * dloss, in the dtype of logits: [tokens, W].

    top, total, dloss: [tokens] float32, the maximum and the sum of exp(logits - top); column: [tokens] int32 from 0 to W - 1;
    weight: [tokens] float32, 1, or 0 where the label is not among these columns.
    """
    e = ops.exp(logits.astype(ms.float32) - top.reshape(-1, 1))
    place = ops.stack((iota(column.shape[0]), column), 1)
    return (ops.tensor_scatter_add(e, place, -weight * total) * (dloss / total).reshape(-1, 1)).astype(logits.dtype)


@custom_vjp
def _composed(logits, labels):
    wide, (column, _) = logits.astype(ms.float32), _kept(labels)
    top = ops.amax(wide, -1)
    total = ops.exp(wide - top.reshape(-1, 1)).sum(-1)
    loss = ops.log(total) - (ops.gather_elements(wide, 1, column.reshape(-1, 1)).reshape(-1) - top)
    return ops.select(labels >= 0, loss, ops.zeros_like(loss)), top, total


def _composed_backward(logits, labels, outputs, doutputs):
    column, kept = _kept(labels)
    return logits_gradient(logits, outputs[1], outputs[2], column, kept, doutputs[0] * kept), ops.zeros_like(labels)


def _kept(labels):
    """Labels with 0 for ignored ones, and 1 or 0: whether they count."""
    kept = labels >= 0
    return ops.select(kept, labels, ops.zeros_like(labels)), kept.astype(ms.float32)


_composed.defbwd(_composed_backward)


def linear_cross_entropy_reference(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """``linear_cross_entropy`` composed of MindSpore operators, with all the logits: any device and dtype."""
    return cross_entropy_reference(ops.matmul(h.astype(ms.float32), w.astype(ms.float32)), labels)


def _check(name, x, labels):
    if len(x) != 2 or labels != x[:1]:
        raise ValueError(f"{name}: expected [tokens, ...] of two dimensions and labels [tokens], found {x} "
                         f"and {labels}; flatten batch and sequence first")


def _check_product(h, w):
    if len(h) != 2 or len(w) != 2 or h[1] != w[0]:
        raise ValueError(f"linear_cross_entropy: expected h [tokens, D] and w [D, W], found {h} and {w}")


def _check_labels(name, dtype):
    if dtype != ms.int32:
        raise ValueError(f"{name}: expected int32 labels, found {dtype}; cast them")


@functools.cache
def _ops():
    def forward_shape(logits, labels):
        return labels, (logits[0], 2)

    def linear_shape(h, w, labels):
        return labels, (h[0], 2)

    def gradient(h, w, *rest):
        return h, w

    op = functools.partial(native.native_op, "cross_entropy")
    return {
        "forward": op("cross_entropy", forward_shape, lambda logits, labels: (logits, logits)),
        "backward": op("cross_entropy_grad", lambda logits, *rest: logits, lambda logits, *rest: logits),
        "linear_forward": op("linear_cross_entropy", linear_shape, lambda h, w, labels: (h, h)),
        "linear_backward": op("linear_cross_entropy_grad", gradient, gradient),
    }


@constexpr
def _op(name):
    return _ops()[name]


@custom_vjp
def _native(logits, labels):
    return _op("forward")(logits, labels)


def _native_backward(logits, labels, outputs, doutputs):
    return _op("backward")(logits, labels, outputs[1], doutputs[0]), ops.zeros_like(labels)


@custom_vjp
def _native_linear(h, w, labels):
    return _op("linear_forward")(h, w, labels)


def _native_linear_backward(h, w, labels, outputs, doutputs):
    dh, dw = _op("linear_backward")(h, w, labels, outputs[1], doutputs[0])
    return dh, dw, ops.zeros_like(labels)


_native.defbwd(_native_backward)
_native_linear.defbwd(_native_linear_backward)
