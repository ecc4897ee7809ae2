"""AdamW on flat tuples of tensors, in place, and the norm of their gradients.

Three implementations of the update: C++ on the CPU (``adamw.cc``), one operator for a whole model; Ascend's own, one
operator a leaf; and a composition of MindSpore operators, the reference, which runs everywhere. To be called in compiled
graphs (``ms.jit``).
"""
from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.auto_generate import AdamW, TensorToScalar
from mindspore.ops.primitive import constexpr

from dsv3.kernels import native

_map = ops.Map()  # a loop or comprehension over leaves nests one graph call a leaf, and MindSpore allows 1000


def global_norm_sq(*grads: Tensor) -> Tensor:
    """The sum of the squares of all elements of all tensors: 0-D float32.

    The native kernel accumulates in float64 and in an order fixed by the shapes, the same for any number of
    threads.

    Args:
        grads: float32 or bfloat16 tensors of any shapes.

    Raises:
        ValueError: no tensor, or one of another dtype.
    """
    _check_grads(_map(_dtype, grads))
    if native.enabled():
        return _norm_op()(*grads).reshape(())
    return global_norm_sq_reference(*grads)


def adamw_update(scalars: Tensor, params: tuple, grads: tuple, m: tuple, v: tuple, decay: tuple,
                 masters: tuple = ()) -> Tensor:
    """One step of AdamW on every leaf; ``params``, ``m``, ``v`` and ``masters`` change in place.

    Loshchilov and Hutter, 2019, algorithm 2, in the order of ``torch.optim.AdamW``. For every leaf, with
    g = grad * grad_scale::

        p *= 1 - lr * weight_decay          where decay
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g**2
        p -= lr / correction1 * m / (sqrt(v) / sqrt(correction2) + eps)

    Two duties of the caller. Return the result from the graph, or make something that is returned depend on
    it: otherwise the update is pruned. And make ``scalars`` depend on every gradient (grad_scale from
    ``global_norm_sq`` of all of them does; so does ``ops.depend``): only this keeps a parameter from being
    overwritten while a gradient still needs its old value. For the same reason read no parameter beside the
    update in the same graph.

    When grad_scale is not finite nothing changes: the way to skip a step whose gradients overflowed. (Ascend's operator
    then moves the moments, by a part in 2**24: it has no beta of 1.)

    Args:
        scalars: [8] float32: lr, beta1, beta2, eps, weight_decay, correction1 = 1 - beta1**step, correction2
            = 1 - beta2**step, grad_scale. Take the corrections from the float32 values of the betas, so that
            their rounding cancels.
        params, grads, m, v: one tensor a leaf, of one shape, float32 or bfloat16 each. Moments in bfloat16
            are widened to float32, updated, and rounded to nearest, ties to even.
        decay: one Python bool a leaf: whether weight decay applies.
        masters: one float32 tensor for each bfloat16 param, in order. The update happens there and the param
            is the master rounded to nearest, ties to even.

    Returns:
        [1] float32: the learning rate.

    Raises:
        ValueError: tuples of different lengths, shapes or dtypes that do not fit, a bfloat16 param without
            master, and, in the reference on the CPU, a bfloat16 leaf, to which MindSpore cannot assign there.
    """
    if native.enabled():
        flags, _ = _plan(scalars, params, grads, m, v, decay, masters)
        return _update_op()(scalars, flags, *params, *grads, *m, *v, *masters)
    if _has_operator(_map(_dtype, m + v)):
        return _by_operator(scalars, params, grads, m, v, decay, masters)
    return adamw_update_reference(scalars, params, grads, m, v, decay, masters)


def store(leaf: Tensor, value: Tensor) -> Tensor:
    """``leaf`` becomes ``value`` rounded to its dtype, in place; return the result from the graph, or it is pruned.

    value: of the leaf's shape, any float dtype. Native for bfloat16 on the CPU alone, which MindSpore cannot assign there.
    Raises ValueError for that without the native kernel.
    """
    if leaf.dtype == ms.bfloat16 and native.enabled():
        return _store_op()(leaf, value.astype(ms.float32))
    _check_assignable((leaf.dtype,))
    return ops.assign(leaf, value.astype(leaf.dtype))


def global_norm_sq_reference(*grads: Tensor) -> Tensor:
    """``global_norm_sq`` composed of MindSpore operators: any device, in float32."""
    return ops.stack(_map(_sum_of_squares, grads)).sum()


def _sum_of_squares(x):
    return ops.square(x.astype(ms.float32)).sum()


def adamw_update_reference(scalars: Tensor, params: tuple, grads: tuple, m: tuple, v: tuple, decay: tuple,
                           masters: tuple = ()) -> Tensor:
    """``adamw_update`` composed of MindSpore operators: one chain of them a leaf, on any device."""
    _check_assignable(_map(_dtype, params + m + v))
    _, places = _plan(scalars, params, grads, m, v, decay, masters)
    owners = _map(ops.partial(_take, params + masters), places)
    constants = (scalars[0] * scalars[4], 1 - scalars[1], scalars[2], 1 - scalars[2], scalars[0] / scalars[5],
                 ops.sqrt(scalars[6]), scalars[3], scalars[7])
    done = _map(ops.partial(_update_leaf, constants), params, grads, m, v, decay, owners)
    return ops.depend(scalars[0:1], done)


def _update_leaf(constants, param, grad, m, v, decay, owner):
    lr_decay, rest1, beta2, rest2, step, sqrt_correction2, eps, grad_scale = constants
    grad = grad.astype(ms.float32) * grad_scale
    first, second = m.astype(ms.float32), v.astype(ms.float32)
    first = first + rest1 * (grad - first)
    second = beta2 * second + rest2 * ops.square(grad)
    kept = owner * (1 - lr_decay) if decay else owner
    new = kept - step * first / (ops.sqrt(second) / sqrt_correction2 + eps)
    ok = ops.isfinite(grad_scale)
    first, second = ops.where(ok, first, m.astype(ms.float32)), ops.where(ok, second, v.astype(ms.float32))
    new = ops.where(ok, new, owner)
    done = (ops.assign(m, first.astype(m.dtype)), ops.assign(v, second.astype(v.dtype)),
            ops.assign(owner, new))
    if param.dtype != ms.float32:
        done = done + (ops.assign(param, new.astype(param.dtype)),)
    return done


# -- Ascend's operator -------------------------------------------------------------------------------------------------
_adamw, _scalar = AdamW(), TensorToScalar()
ALMOST_1 = 1 - 2.0**-24  # the highest float32 below 1
LATE = 1e10  # a step at which its corrections are 1, whatever the betas


@constexpr
def _has_operator(dtypes):
    """Ascend's wants moments of the weights' dtype, and has no layout under MindSpore's ``shard()``."""
    modes = ("stand_alone", "data_parallel")
    return (ms.get_context("device_target") == "Ascend" and all(dtype == ms.float32 for dtype in dtypes)
            and ms.get_auto_parallel_context("parallel_mode") in modes)


def _by_operator(scalars, params, grads, m, v, decay, masters):
    """``adamw_update`` by aclnnApplyAdamWV2: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr decay p + lr m / (sqrt(v) +
    eps), here at a step so high that its own corrections are 1: ours are in lr, eps and decay.

    p -= lr / c1 * m / (sqrt(v) / sqrt(c2) + eps) is p -= (lr sqrt(c2) / c1) * m / (sqrt(v) + eps sqrt(c2)). No chain of
    composed operators, which MindSpore runs one after another for all leaves, so that it holds three copies of a model.
    """
    _, places = _plan(scalars, params, grads, m, v, decay, masters)
    owners = _map(ops.partial(_take, params + masters), places)
    scale, root = scalars[7], ops.sqrt(scalars[6])
    ok = ops.isfinite(scale)
    rate = ops.where(ok, scalars[0] * root / scalars[5], ops.zeros_like(root))
    beta1, beta2 = ops.where(ok, scalars[1], ALMOST_1), ops.where(ok, scalars[2], ALMOST_1)
    numbers = (_scalar(rate), _scalar(beta1), _scalar(beta2), _scalar(scalars[4] * scalars[5] / root), _scalar(scalars[3] * root))
    done = _map(ops.partial(_operator_leaf, numbers, scale, ok), params, grads, m, v, decay, owners)
    return ops.depend(scalars[0:1], done)


def _operator_leaf(numbers, scale, ok, param, grad, m, v, decay, owner):
    rate, beta1, beta2, weight_decay, eps = numbers
    grad = grad.astype(ms.float32) * scale
    grad = ops.where(ok, grad, ops.zeros_like(scale))
    weight_decay = weight_decay if decay else 0.0
    done = _adamw(owner, m, v, v, grad, _late(), rate, beta1, beta2, weight_decay, eps, False, False)
    if param.dtype != ms.float32:
        return ops.assign(param, ops.depend(owner, done).astype(param.dtype))
    return done


@constexpr
def _late():
    return Tensor(np.full(1, LATE, np.float32))


def _dtype(x):
    return x.dtype


def _shape(x):
    return x.shape


def _take(leaves, i):
    return leaves[i]


def _plan(scalars, params, grads, m, v, decay, masters):
    """Checks all that adamw_update promises; returns the flags of the native kernel, and for each leaf the
    place in params + masters of the tensor that holds its float32 value.

    One constexpr sees all leaves at once, since a condition for each would take long to compile. Its results
    are used, since MindSpore drops a call, errors and all, when the result is assigned and not used.
    """
    dtypes = (_map(_dtype, params), _map(_dtype, grads), _map(_dtype, m), _map(_dtype, v),
              _map(_dtype, masters))
    shapes = (_map(_shape, params), _map(_shape, grads), _map(_shape, m), _map(_shape, v),
              _map(_shape, masters))
    return _plan_of(scalars.shape, scalars.dtype, dtypes, shapes, decay)


@constexpr
def _plan_of(scalars_shape, scalars_dtype, dtypes, shapes, decay):
    if scalars_shape != (8,) or scalars_dtype != ms.float32:
        raise ValueError("adamw_update: expected scalars [8] float32 (lr, beta1, beta2, eps, weight_decay, "
                         f"correction1, correction2, grad_scale), found {scalars_shape} {scalars_dtype}")
    lengths = [*map(len, dtypes[:4]), len(decay)]
    if len(set(lengths)) != 1 or not decay:
        raise ValueError("adamw_update: expected params, grads, m, v and decay of one length, found "
                         f"{lengths}")
    for dtype in sum(map(tuple, dtypes[:4]), ()):
        _check_dtype("adamw_update", dtype)
    wide, masters = [dtype == ms.float32 for dtype in dtypes[0]], dtypes[4]
    if wide.count(False) != len(masters) or any(dtype != ms.float32 for dtype in masters):
        raise ValueError(f"adamw_update: {wide.count(False)} params are bfloat16 and need as many float32 "
                         f"masters, in order; found {len(masters)} of {[str(dtype) for dtype in masters]}")
    next_master = iter(range(len(wide), len(wide) + len(masters)))
    places = tuple(i if is_wide else next(next_master) for i, is_wide in enumerate(wide))
    for i, place in enumerate(places):
        found = [tuple(leaves[i]) for leaves in shapes[:4]] + [tuple((*shapes[0], *shapes[4])[place])]
        if len(set(found)) != 1:
            raise ValueError(f"adamw_update: expected one shape of param, grad, m, v and master of leaf {i}, "
                             f"found {found}")
    return Tensor(np.array(decay, np.int32)), places


def _check_dtype(name, dtype):
    if dtype not in (ms.float32, ms.bfloat16):
        raise ValueError(f"{name}: expected float32 or bfloat16 leaves, found {dtype}; cast it")


def _check_grads(dtypes):
    if _count_leaves(dtypes) == 0:
        raise ValueError("global_norm_sq: expected at least one tensor, found none")


@constexpr
def _count_leaves(dtypes):
    for dtype in dtypes:
        _check_dtype("global_norm_sq", dtype)
    return len(dtypes)


def _check_assignable(dtypes):
    if _is_cpu() and _has_bfloat16(dtypes):
        raise ValueError("adamw_update: MindSpore's CPU backend cannot assign to bfloat16 leaves; use the "
                         "native kernel (a C++ compiler, DSV3_KERNELS=auto) or float32 params and moments")


@constexpr
def _is_cpu():
    return ms.get_context("device_target") == "CPU"


@constexpr
def _has_bfloat16(dtypes):
    return ms.bfloat16 in dtypes


@functools.cache
def _ops():
    def op(function):
        return native.native_op("adamw", function, lambda *shapes: (1,), lambda *dtypes: ms.float32)

    return op("global_norm_sq"), op("adamw_update"), op("store")


@constexpr
def _norm_op():
    return _ops()[0]


@constexpr
def _update_op():
    return _ops()[1]


@constexpr
def _store_op():
    return _ops()[2]
