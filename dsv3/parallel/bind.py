"""Compile a pure loss for a mesh: Parameters that are a rank's slices, one ``shard()`` around the whole loss.

The loss is written for shards (``parallel.shard``). It becomes one operator, MindSpore's ``Morph``, whose inputs carry the
layouts that the rules give to every leaf; from those MindSpore slices the Parameters and adds, to the gradient of each
leaf, the AllReduce over the ranks that hold the same slice. Everything else that ranks say to each other is in the model.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, ops
from mindspore.common.initializer import Initializer, initializer
from mindspore.parallel import Layout

from ..spec import draw, is_spec
from ..transform import generated
from ..tree import paths, tree_map_with_path
from .rules import layout, layout_of, local_slices
from .shard import STAGE_AXES, Placement, global_norm


class _Slice(Initializer):
    """Fills a Parameter that MindSpore has sliced, by its layout or further by its parallel optimizer (ZeRO).

    values(slices) gives a part of the leaf; candidates: the slices that this rank may have.
    """

    def __init__(self, values: Callable | None, *candidates: tuple[slice, ...]):
        super().__init__()
        self.values, self.candidates = values, candidates

    def _initialize(self, arr: np.ndarray) -> None:
        if self.values is None:  # memory that is never touched is never there
            return
        shapes = {tuple(s.stop - s.start for s in slices): slices for slices in self.candidates}
        if arr.shape not in shapes:
            raise ValueError(f"MindSpore asks for a slice of shape {arr.shape}; the rules say {list(shapes)}")
        arr[...] = self.values(shapes[arr.shape])


def device_layout(placement: Placement, cuts: tuple[tuple[str, ...], ...]) -> Layout:
    """A tensor's layout on the stage's device matrix; cuts: mesh axes of every dim."""
    sizes = placement.mesh.axes
    names = [tuple(a for a in dim) for dim in cuts]
    spelled = ["None" if not dim else dim[0] if len(dim) == 1 else dim for dim in names]
    return Layout(tuple(sizes[a] for a in STAGE_AXES), STAGE_AXES)(*spelled)


def make_params(specs: Any, placement: Placement, values: Callable[[str, Any, tuple[slice, ...]], np.ndarray] | None,
                dtype: str = "float32") -> Any:
    """The tree of Parameters of ``specs``, none of which is ever whole on the host.

    values(path, spec, slices) gives a rank's part of a leaf, as float32; None leaves them as they are, for a program that is
    compiled and never run.
    """
    coords = placement.mesh.coords(placement.rank)

    def one(path: str, spec: Any) -> Parameter:
        slices = [local_slices(spec, placement.mesh, placement.rules, coords, path, state=state) for state in (True, False)]
        kind = getattr(ms, spec.dtype or dtype)
        fill = _Slice(values and (lambda where: values(path, spec, where)), *slices)
        leaf = Parameter(initializer(fill, spec.shape, kind), name=path, requires_grad=not path.endswith("router.bias"))
        leaf.parallel_optimizer = leaf.requires_grad  # the bias is used and updated whole
        return leaf

    return tree_map_with_path(one, specs)


def drawn(seed: int) -> Callable:
    """``values`` of fresh params, equal to those of ``init``."""
    return lambda path, spec, slices: draw(spec, path, seed, slices)


def like(leaf: Parameter, prefix: str, dtype: Any, start: Any = "zeros") -> Parameter:
    """A Parameter that MindSpore slices as it slices ``leaf``: a moment. start: zeros, or an initializer that does nothing."""
    out = Parameter(initializer(start, leaf.shape, dtype), name=prefix + leaf.name, requires_grad=False)
    out.param_info = leaf.param_info.clone()
    out.name, out.requires_grad = prefix + leaf.name, False
    return out


# -- one function on shards as one operator ----------------------------------------------------------------------------
def shard_map(fn: Callable, ins: tuple[Layout, ...], outs: tuple[Layout, ...], shapes: tuple, dtypes: tuple) -> Callable:
    """``fn(*tensors) -> tuple of tensors``, written for shards, as one operator on whole tensors.

    ins, outs: layouts; shapes, dtypes: of the results, whole (static).
    """
    n = len(ins)
    args = ",\n".join(f"a{i}" for i in range(n))
    one = len(outs) == 1
    shape = generated(f"def shape({args}):\n    return {list(shapes[0]) if one else tuple(list(s) for s in shapes)!r}\n", {})
    kinds = ", ".join(f"ms.{d}" for d in dtypes)
    dtype = generated(f"def dtype({args}):\n    return {kinds}\n", {"ms": ms})
    return ops.Morph(fn, shape, dtype).add_prim_attr("self_define_shard", True).shard(ins, outs)


def written(tree: Any, first: int = 0) -> tuple[str, int]:
    """Source of a tree of dict and tuple with its leaves as a0, a1, ... in order, and the number after the last."""
    count = [first]

    def write(node: Any) -> str:
        if isinstance(node, dict):
            return "{" + ",\n".join(f"{k!r}: {write(v)}" for k, v in node.items()) + "}"
        if isinstance(node, tuple):
            return "(" + "".join(f"{write(v)},\n" for v in node) + ")"
        count[0] += 1
        return f"a{count[0] - 1}"

    return write(tree), count[0]


METRICS = ("loss", "main_loss", "mtp_loss", "balance_loss")


def bound_loss(loss_of: Callable, specs: Any, batch: dict[str, tuple], placement: Placement,
               load_shape: tuple[int, int]) -> Callable:
    """``f(params..., batch..., weight) -> (objective [1], metrics [4], load)`` as one operator.

    loss_of(params, batch, mtp_weight) -> (loss, metrics) on shards. batch: {key: whole shape}, rows first. The objective is
    the loss over the ranks of a stage, all of which have it, so that its gradient summed over them is the loss's.
    """
    named = list(paths(specs, is_spec))
    source, n = written(specs)
    args = ",\n".join(f"a{i}" for i in range(n + len(batch) + 1))
    items = ", ".join(f"{key!r}: a{n + i}" for i, key in enumerate(batch))
    share = 1.0 / len(placement.group("all"))

    def outputs(loss, metrics):
        picked = ops.stack((metrics["loss"], metrics["main_loss"], metrics["mtp_loss"], metrics["balance_loss"]))
        return (loss * share).reshape(1), ops.stop_gradient(picked), metrics["load"]

    local = generated(f"def local({args}):\n"
                      f"    loss, metrics = loss_of({source}, {{{items}}}, a{n + len(batch)}.reshape(()))\n"
                      f"    return outputs(loss, metrics)\n", {"loss_of": loss_of, "outputs": outputs})
    mesh, rules = placement.mesh, placement.rules
    ins = tuple(device_layout(placement, layout(spec, mesh, rules, path)) for path, spec in named)
    ins += tuple(batch_layout(placement, shape, key) for key, shape in batch.items())
    whole = device_layout(placement, ((),))
    outs = (whole, whole, device_layout(placement, ((), ())))
    return shard_map(local, ins + (whole,), outs, ((1,), (len(METRICS),), load_shape), ("float32", "float32", "int32"))


def batch_layout(placement: Placement, shape: tuple[int, ...], name: str = "batch") -> Layout:
    """Rows of a batch over the data ranks."""
    axes = ("batch", *[None] * (len(shape) - 1))
    return device_layout(placement, layout_of(shape, axes, placement.mesh, placement.rules, name))


# -- the step ----------------------------------------------------------------------------------------------------------
def mesh_step(loss_of: Callable, params: Any, specs: Any, optimizer: Any, placement: Placement, batch: dict[str, tuple], *,
              load_shape: tuple[int, int], updated_bias: Callable, moment_dtype: Any = ms.float32,
              empty: bool = False) -> Callable:
    """``step(batch..., hyper) -> (metrics [4], load, grad_norm)`` of one rank: loss, gradients, update, in one graph.

    params: ``make_params``'s tree, updated in place with the moments that are made here. batch: {key: whole shape}; the step
    takes the rank's own rows in this order. hyper: float32, those of ``optimizer.hyper``, then bias rate and MTP weight.
    """
    named = list(paths(params))
    leaves = [leaf for _, leaf in named]
    biases = [leaf for path, leaf in named if path.endswith("router.bias")]
    moving = [leaf for path, leaf in named if not path.endswith("router.bias")]
    nothing = _Slice(None) if empty else "zeros"
    m, v = ([like(leaf, prefix, moment_dtype, nothing) for leaf in moving] for prefix in ("m.", "v."))
    masters = [like(leaf, "master.", ms.float32, nothing) for leaf in moving if leaf.dtype != ms.float32]
    decays = tuple(bool(optimizer.decays(leaf.name, tuple(leaf.shape))) for leaf in moving)
    f = bound_loss(loss_of, specs, batch, placement, load_shape)
    names = ", ".join(batch)
    everything = "".join(f"p[{i}],\n" for i in range(len(leaves)))
    call = generated(f"def call({names}, weight):\n    return f({everything}{names}, weight)\n", {"f": f, "p": leaves})
    weights = ParameterTuple(moving)
    loss_and_grads = ms.value_and_grad(call, None, weights=weights, has_aux=True)
    # A gradient's norm is summed over all ranks of the stage: a copy of a part counts for its share of the copies.
    shares = tuple(placement.share(spec, path) for path, spec in paths(specs, is_spec) if not path.endswith("router.bias"))
    take_p, take_m, take_v = (_taker(x) for x in (moving, m, v))
    take_masters, take_biases = _taker(masters), _taker(biases)

    def finish(grads, load, hyper):
        norm = global_norm(grads, shares)
        done = optimizer.apply_(hyper[:7], norm, take_p(), grads, take_m(), take_v(), take_masters(), decays)
        rate = ops.where(ops.isfinite(norm), hyper[7], ops.zeros_like(norm))
        moved, b = (), take_biases()
        for i in range(len(b)):
            moved = moved + (ops.assign(b[i], updated_bias(b[i], load[i], rate)),)
        return ops.depend(norm, (done, moved))

    step = generated(f"def step({names}, hyper):\n"
                     f"    (_, metrics, load), grads = loss_and_grads({names}, hyper[8:9])\n"
                     f"    return metrics, load, finish(grads, load, hyper)\n",
                     {"loss_and_grads": loss_and_grads, "finish": finish})
    return step


def _taker(parameters: list) -> Callable:
    """``take() -> tuple`` of closed-over Parameters, for graph code."""
    items = "".join(f"p[{i}],\n" for i in range(len(parameters)))
    return generated(f"def take():\n    return ({items})\n", {"p": parameters})
