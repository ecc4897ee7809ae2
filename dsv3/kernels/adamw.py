"""AdamW on flat tuples of tensors, in place, and the norm of their gradients: each one operator for a whole model.

Two implementations: C++ on the CPU (``adamw.cc``) and a composition of MindSpore operators, which is the reference
and what every other device compiles. To be called in compiled graphs (``ms.jit``).
"""
from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from dsv3.kernels import native


def global_norm_sq(*grads: Tensor) -> Tensor:
    """The sum of the squares of all elements of all tensors: 0-D float32.

    The native kernel accumulates in float64 and in an order fixed by the shapes, the same for any number of threads.

    Args:
        grads: float32 or bfloat16 tensors of any shapes.

    Raises:
        ValueError: no tensor, or one of another dtype.
    """
    _check_dtypes("global_norm_sq", [grad.dtype for grad in grads])
    if native.enabled():
        return _norm_op()(*grads)
    return global_norm_sq_reference(*grads)


def adamw_update(scalars: Tensor, params: tuple, grads: tuple, m: tuple, v: tuple, decay: tuple,
                 masters: tuple = ()) -> Tensor:
    """One step of AdamW on every leaf; ``params``, ``m``, ``v`` and ``masters`` change in place.

    Loshchilov and Hutter, 2019, algorithm 2, in the order of ``torch.optim.AdamW``, for every leaf with g = grad *
    grad_scale: p *= 1 - lr * weight_decay (where ``decay``); m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2;
    p -= lr / correction1 * m / (sqrt(v) / sqrt(correction2) + eps).

    Two duties of the caller. Return the result from the graph, or make something that is returned depend on it:
    otherwise the update is pruned. And make ``scalars`` depend on every gradient (grad_scale from ``global_norm_sq``
    of all of them does; so does ``ops.depend``): only this keeps a parameter from being overwritten while a gradient
    still needs its old value. For the same reason read no parameter beside the update in the same graph.

    Args:
        scalars: [8] float32: lr, beta1, beta2, eps, weight_decay, correction1 = 1 - beta1**step,
            correction2 = 1 - beta2**step, grad_scale. Take the corrections from the float32 values of the betas, so
            that their rounding cancels.
        params, grads, m, v: one tensor a leaf, of one shape, float32 or bfloat16 each. Moments in bfloat16 are
            widened to float32, updated, and rounded to nearest, ties to even.
        decay: one Python bool a leaf: whether weight decay applies.
        masters: one float32 tensor for each bfloat16 param, in order. The update happens there and the param is the
            master rounded to nearest, ties to even.

    Returns:
        [1] float32: the learning rate.

    Raises:
        ValueError: tuples of different lengths, shapes or dtypes that do not fit, a bfloat16 param without master,
            and, in the reference on the CPU, a bfloat16 leaf, to which MindSpore cannot assign there.
    """
    owners = _check_update(scalars, params, grads, m, v, decay, masters)
    if native.enabled():
        return _update_op()(scalars, _flags(decay), *params, *grads, *m, *v, *masters)
    return _update_reference(scalars, params, grads, m, v, decay, owners)


def global_norm_sq_reference(*grads: Tensor) -> Tensor:
    """``global_norm_sq`` composed of MindSpore operators: any device, in float32."""
    total = ops.square(grads[0].astype(ms.float32)).sum()
    for grad in grads[1:]:
        total = total + ops.square(grad.astype(ms.float32)).sum()
    return total


def adamw_update_reference(scalars: Tensor, params: tuple, grads: tuple, m: tuple, v: tuple, decay: tuple,
                           masters: tuple = ()) -> Tensor:
    """``adamw_update`` composed of MindSpore operators: one chain of them a leaf, on any device."""
    owners = _check_update(scalars, params, grads, m, v, decay, masters)
    return _update_reference(scalars, params, grads, m, v, decay, owners)


def _update_reference(scalars, params, grads, m, v, decay, owners):
    _check_assignable([leaf.dtype for leaf in params + m + v])
    done = [_update_leaf(scalars, params[i], grads[i], m[i], v[i], decay[i], owners[i]) for i in range(len(params))]
    return ops.depend(scalars[0:1], tuple(done))


def _update_leaf(scalars, param, grad, m, v, decay, owner):
    lr, beta1, beta2, eps, weight_decay = scalars[0], scalars[1], scalars[2], scalars[3], scalars[4]
    grad = grad.astype(ms.float32) * scalars[7]
    first, second = m.astype(ms.float32), v.astype(ms.float32)
    first = first + (1 - beta1) * (grad - first)
    second = beta2 * second + (1 - beta2) * ops.square(grad)
    kept = owner * (1 - lr * weight_decay) if decay else owner
    new = kept - lr / scalars[5] * first / (ops.sqrt(second) / ops.sqrt(scalars[6]) + eps)
    done = (ops.assign(m, first.astype(m.dtype)), ops.assign(v, second.astype(v.dtype)), ops.assign(owner, new))
    if param.dtype != ms.float32:
        done = done + (ops.assign(param, new.astype(param.dtype)),)
    return done


def _check_update(scalars, params, grads, m, v, decay, masters):
    """Raises ValueError as adamw_update says; returns the tensors that hold each leaf's float32 value.

    Shapes and dtypes go to constexprs, all leaves at once: an ``if`` in a loop over leaves would nest one graph call
    a leaf, and a few hundred exceed MindSpore's depth.
    """
    _check_scalars(scalars.shape, scalars.dtype)
    _check_lengths(len(params), len(grads), len(m), len(v), len(decay))
    _check_dtypes("adamw_update", [leaf.dtype for leaf in params + grads + m + v])
    candidates = params + masters
    places = _owner_places([leaf.dtype for leaf in params], [leaf.dtype for leaf in masters])
    owners = [candidates[i] for i in places]
    _check_shapes([leaf.shape for leaf in params], [leaf.shape for leaf in grads], [leaf.shape for leaf in m],
                  [leaf.shape for leaf in v], [leaf.shape for leaf in owners])
    return owners


@constexpr
def _check_dtypes(name, dtypes):
    if not dtypes:
        raise ValueError(f"{name}: expected at least one tensor, found none")
    for dtype in dtypes:
        if dtype not in (ms.float32, ms.bfloat16):
            raise ValueError(f"{name}: expected float32 or bfloat16 leaves, found {dtype}; cast it")


@constexpr
def _check_scalars(shape, dtype):
    if shape != (8,) or dtype != ms.float32:
        raise ValueError("adamw_update: expected scalars [8] float32 (lr, beta1, beta2, eps, weight_decay, "
                         f"correction1, correction2, grad_scale), found {shape} {dtype}")


@constexpr
def _check_lengths(params, grads, m, v, decay):
    if not params == grads == m == v == decay:
        raise ValueError("adamw_update: expected params, grads, m, v and decay of one length, found "
                         f"{params}, {grads}, {m}, {v} and {decay}")


@constexpr
def _check_shapes(params, grads, m, v, owners):
    for i, shapes in enumerate(zip(params, grads, m, v, owners)):
        if len(set(map(tuple, shapes))) != 1:
            raise ValueError("adamw_update: expected param, grad, m, v and master of one shape, found "
                             f"{', '.join(map(str, shapes))} at leaf {i}")


@constexpr
def _owner_places(params, masters):
    """For each param the place in params + masters of the tensor that holds its float32 value."""
    needed = sum(dtype != ms.float32 for dtype in params)
    if needed != len(masters) or any(dtype != ms.float32 for dtype in masters):
        raise ValueError(f"adamw_update: {needed} params are bfloat16 and need as many float32 masters, in order; "
                         f"found {len(masters)} of {[str(dtype) for dtype in masters]}")
    masters_left = iter(range(len(params), len(params) + needed))
    return tuple(i if dtype == ms.float32 else next(masters_left) for i, dtype in enumerate(params))


@constexpr
def _check_assignable(dtypes):
    if ms.get_context("device_target") == "CPU" and ms.bfloat16 in dtypes:
        raise ValueError("adamw_update: MindSpore's CPU backend cannot assign to bfloat16 leaves; use the native "
                         "kernel (a C++ compiler, DSV3_KERNELS=auto) or float32 params and moments")


@constexpr
def _flags(decay):
    return Tensor(np.array(decay, np.int32))


@functools.cache
def _ops():
    def op(function, shape):
        return native.native_op("adamw", function, lambda *shapes: shape, lambda *dtypes: ms.float32)

    return op("global_norm_sq", ()), op("adamw_update", (1,))


@constexpr
def _norm_op():
    return _ops()[0]


@constexpr
def _update_op():
    return _ops()[1]
