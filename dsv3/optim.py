"""Optimisers as a frozen pair of functions on pytrees: ``init(params)`` and ``update(grads, state, params)``."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from .kernels.adamw import adamw_update, global_norm_sq, store
from .schedule import Schedule, value_at
from .spec import is_state as is_state
from .transform import compiled
from .tree import fill, flat_paths, flatten, paths, tree_map


@dataclass(frozen=True)
class Optimizer:
    """What a training step needs of an optimiser.

    init(params) -> state. update(grads, state, params) -> (params, state) is pure and runs from Python or inside a
    function given to ``jit``. update_(hyper, leaves, grads, m, v, masters, decays) -> (done, grad_norm) is its form in
    place on flat tuples, for graph code: leaves, m, v and masters change, and ``done`` must be returned from the graph.
    apply_(hyper, grad_norm, leaves, ...) -> done is the same for a norm that is known, of gradients cut over ranks.
    renew_(hyper, grad_norm, old, grads, m, v, decays) -> (new, done) leaves the float32 values ``old`` as they are, for
    parts of leaves, and returns the new ones; m and v change.
    hyper(step) -> the float32 vector that update_ takes. decays(path, shape) -> bool is the mask of weight decay.
    """

    init: Callable[[Any], dict]
    update: Callable[[Any, dict, Any], tuple]
    update_: Callable[..., tuple]
    apply_: Callable[..., Any]
    renew_: Callable[..., tuple]
    hyper: Callable[[int], np.ndarray]
    decays: Callable[[str, tuple[int, ...]], bool]
    learning_rate: float | Schedule


def matrices(path: str, shape: tuple[int, ...]) -> bool:
    """The default mask of weight decay: leaves with two or more dims, so neither norms nor biases."""
    return len(shape) >= 2


_map = ops.Map()  # a loop over leaves nests one graph call a leaf, which compiles far slower


def _shape(x):
    return x.shape


def _dtype(x):
    return x.dtype


def _take(leaves, i):
    return leaves[i]


def _pick(i, leaf):
    return leaf[i]


def adamw(learning_rate: float | Schedule = 2.2e-4, *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8,
          weight_decay: float = 0.1, clip_norm: float | None = 1.0,
          decay: Callable[[str, tuple[int, ...]], bool] = matrices, moment_dtype: str = "float32") -> Optimizer:
    """AdamW with decoupled decay (arXiv 1711.05101) and clipping by the global norm; the report's values, section 4.2.

    learning_rate: a number, or a Schedule over steps. decay(path, shape) -> bool says which leaves decay.
    moment_dtype: "float32", or "bfloat16" as in the report (section 3.3.2). Leaves that are not float32 get a float32
    master weight. State: {"step" int32, "m", "v": trees like params, "masters": {path: float32 leaf} when needed}.
    The router bias is left alone. A step whose gradients are not all finite changes nothing but the count.
    Raises ValueError for settings that make no sense.
    """
    if moment_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"moment_dtype={moment_dtype!r}; expected 'float32' or 'bfloat16'")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm={clip_norm}; expected a positive number, or None for no clipping")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and eps > 0 and weight_decay >= 0):
        raise ValueError(f"beta1={beta1}, beta2={beta2}, eps={eps}, weight_decay={weight_decay}; expected betas in "
                         f"[0, 1), eps above 0 and weight_decay of at least 0")
    b1, b2 = float(np.float32(beta1)), float(np.float32(beta2))  # as the float32 update sees them

    @constexpr
    def plan(names, shapes, dtypes):
        """Of all leaves at once: whether each moves, whether it decays, the places of those that move and of those that
        have a master, and where in params + masters each leaf's float32 value is."""
        moves = tuple(not is_state(name) for name in names)
        narrow = tuple(i for i, dtype in enumerate(dtypes) if dtype != ms.float32)
        sources = tuple(len(names) + narrow.index(i) if i in narrow else i for i in range(len(names)))
        return (moves, tuple(bool(decay(name, tuple(shape))) for name, shape in zip(names, shapes)),
                tuple(i for i, moving in enumerate(moves) if moving), narrow, sources)

    def init(params):
        def zeros(leaf):
            return Tensor(np.zeros(leaf.shape, np.float32), dtype=getattr(ms, moment_dtype))

        state = {"step": Tensor(np.zeros((), np.int32)), "m": tree_map(zeros, params), "v": tree_map(zeros, params)}
        masters = {path: Tensor(leaf.float().asnumpy().copy()) for path, leaf in paths(params)
                   if leaf.dtype != ms.float32}
        return state | {"masters": masters} if masters else state

    def hyper(step):
        """lr, beta1, beta2, eps, weight_decay and both bias corrections of the update that follows ``step`` others."""
        return np.array([value_at(learning_rate, step), b1, b2, eps, weight_decay,
                         1 - b1 ** (step + 1), 1 - b2 ** (step + 1)], np.float32)

    def clip(norm):
        """The factor on the gradients whose norm this is, 0-D float32; NaN when the norm is not finite."""
        scale = ops.ones_like(norm)
        if clip_norm is not None:
            scale = ops.minimum(scale, clip_norm / (norm + 1e-6))  # 1e-6 as torch.nn.utils.clip_grad_norm_
        return ops.where(ops.isfinite(norm), scale, ops.full_like(scale, float("nan")))

    def update_(hyper_7, leaves, grads, m, v, masters, decays):
        norm = ops.sqrt(global_norm_sq(*grads))
        return apply_(hyper_7, norm, leaves, grads, m, v, masters, decays), norm

    def apply_(hyper_7, norm, leaves, grads, m, v, masters, decays):
        return adamw_update(ops.cat((hyper_7, ops.expand_dims(clip(norm), 0))), leaves, grads, m, v, decays, masters)

    def renew_(hyper_7, norm, old, grads, m, v, decays):
        rate, root2 = hyper_7[0] / hyper_7[5], ops.sqrt(hyper_7[6])
        new = _map(ops.partial(one_leaf, hyper_7[0], rate, root2, clip(norm)), old, grads, m, v, old, decays)
        done = _map(store, m, _map(ops.partial(_pick, 1), new)), _map(store, v, _map(ops.partial(_pick, 2), new))
        return _map(ops.partial(_pick, 3), new), done

    def one_leaf(lr, rate, root2, scale, p, g, m, v, master, decays, moves=True):
        """(param, m, v, master) of one leaf after the update; ``master`` is p itself where that is float32."""
        if not moves:
            return p, m, v, master
        old, first, second = master, m.astype(ms.float32), v.astype(ms.float32)
        ok, grad = ops.isfinite(scale), g.astype(ms.float32) * scale
        new_first = first + (1 - b1) * (grad - first)
        new_second = b2 * second + (1 - b2) * ops.square(grad)
        kept = old * (1 - lr * weight_decay) if decays else old
        new = ops.where(ok, kept - rate * new_first / (ops.sqrt(new_second) / root2 + eps), old)
        return (new.astype(p.dtype), ops.where(ok, new_first, first).astype(m.dtype),
                ops.where(ok, new_second, second).astype(v.dtype), new)

    @compiled
    def update(grads, state, params):
        p, g, m, v = flatten(params), flatten(grads), flatten(state["m"]), flatten(state["v"])
        moves, decayed, moving, narrow, sources = plan(flat_paths(params), _map(_shape, p), _map(_dtype, p))
        scale = clip(ops.sqrt(global_norm_sq(*_map(ops.partial(_take, g), moving))))
        t = (state["step"] + 1).astype(ms.float32)
        lr = learning_rate.traced(state["step"]) if isinstance(learning_rate, Schedule) else learning_rate
        rate, root2 = lr / (1 - ops.pow(b1, t)), ops.sqrt(1 - ops.pow(b2, t))
        masters = flatten(state["masters"]) if "masters" in state else ()
        old = _map(ops.partial(_take, p + masters), sources)
        new = _map(ops.partial(one_leaf, lr, rate, root2, scale), p, g, m, v, old, decayed, moves)
        after = {"step": state["step"] + 1, "m": fill(state["m"], _map(ops.partial(_pick, 1), new)),
                 "v": fill(state["v"], _map(ops.partial(_pick, 2), new))}
        if "masters" in state:
            after["masters"] = fill(state["masters"], _map(ops.partial(_pick, 3), _map(ops.partial(_take, new), narrow)))
        return fill(params, _map(ops.partial(_pick, 0), new)), after

    return Optimizer(init, update, update_, apply_, renew_, hyper, decay, learning_rate)
