"""ZeRO: ranks that hold copies of a leaf share out what the optimiser keeps of it (arXiv 1910.02054, section 5).

Where data parallelism sums a gradient over n copies, each of them here gets the sum of its own n-th alone, updates that
part with the moments and masters of that part, and hands it to the others: a ReduceScatter and an AllGather, which move
what the AllReduce did. Level 1 does it once a step. Level 2 cuts the gradient of every micro-batch, so that the sums over
micro-batches are of the part only. Level 3 keeps the params as parts too: ``zero.gathered`` makes a leaf whole where it is
used, and as the derivative of a gather is the reduce-scatter, its gradient arrives cut and summed. A leaf whose first dim does
not divide stays whole (``rules.state_shards``), as does the router's choice bias, which no gradient moves.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from ..config import Config
from ..kernels.adamw import store
from ..optim import Optimizer, is_state
from ..spec import ParamSpec, is_spec
from ..tree import paths, tree_map_with_path
from .rules import local_slices, state_shards
from .shard import Placement, all_gather, cut, global_norm, on_cpu, part, parts, psum, reduce_scatter
from .stages import held, owns_embedding
from .zero import groups_of

_map = ops.Map()


def _shape(spec: ParamSpec, path: str, placement: Placement, state: bool) -> tuple[int, ...]:
    coords = placement.mesh.coords(placement.rank)
    return tuple(s.stop - s.start for s in local_slices(spec, placement.mesh, placement.rules, coords, path, state=state))


# -- state -------------------------------------------------------------------------------------------------------------
def init_state(optimizer: Optimizer, params: Any, specs: Any, placement: Placement) -> dict:
    """``optimizer.init`` of what this rank keeps: moments, and float32 masters, of its parts of the leaves.

    params: the rank's own (``shard.place``); specs: of the whole leaves. Without ZeRO it is ``optimizer.init(params)``.
    """
    if placement.rules.zero in (0, 3):  # params are all that this rank updates
        return optimizer.init(params)
    held = dict(paths(params))

    def part_of(path: str, spec: Any) -> Tensor:
        leaf, n = held[path], state_shards(spec, placement.mesh, placement.rules, path)
        if n == 1:
            return leaf
        i = placement.index(groups_of(spec, path, placement)[0])
        rows = leaf.shape[0] // n
        return cut(leaf, (slice(i * rows, (i + 1) * rows),))

    return optimizer.init(tree_map_with_path(part_of, specs))


def check_params(params: Any, specs: Any, placement: Placement) -> None:
    """Refuse params that are not this rank's parts, naming a leaf and both shapes. specs: of ``stages.held``."""
    found = {path: tuple(leaf.shape) for path, leaf in paths(params)}
    own = {path: _shape(spec, path, placement, placement.rules.zero == 3) for path, spec in paths(specs, is_spec)}
    for path in sorted(found.keys() | own.keys()):
        here, expected = found.get(path, "none"), own.get(path, "none")
        if here != expected:
            raise ValueError(_not_its_part("params", path, here, expected, placement, "stages.own(params, ...)"))


def _not_its_part(what: str, path: str, found: Any, expected: Any, placement: Placement, remedy: str) -> str:
    return (f"{what} {path}: shape {found}, but a rank of mesh {placement.mesh} with zero={placement.rules.zero} has {expected}; "
            f"make it with parallel.{remedy}")


def check_state(params: Any, state: dict, specs: Any, placement: Placement) -> None:
    """Refuse params and optimiser state that are not this rank's parts, naming the leaf and both shapes."""
    check_params(params, specs, placement)
    moments = {"m": dict(paths(state["m"])), "v": dict(paths(state["v"])), "masters": state.get("masters", {})}
    for path, spec in paths(specs, is_spec):
        expected = _shape(spec, path, placement, True)
        for name, leaves in moments.items():
            found = expected if is_state(path) or path not in leaves else tuple(leaves[path].shape)
            if found != expected:
                raise ValueError(_not_its_part(name, path, found, expected, placement, "update.init_state(...)"))


# -- update ------------------------------------------------------------------------------------------------------------
def make_reduce(cfg: Config, placement: Placement | None, which: Sequence[int] | None = None) -> Callable:
    """``reduce(grads) -> grads``, for graph code: what a micro-batch adds to the sums of the gradients of a rank's leaves.

    which: their places among those that gradients move, by default all.
    """
    if placement is None:
        return _same
    shards = [groups_of(spec, path, placement)[0] for path, spec in _moving(cfg, placement)]
    names = tuple(shards if which is None else (shards[i] for i in which))

    def reduce(grads):
        grads = _map(_float32, grads)  # bfloat16 would lose what many add up
        if placement.rules.zero == 2:
            return _map(reduce_scatter, grads, names)
        return grads

    return reduce


def _moving(cfg: Config, placement: Placement) -> list[tuple[str, ParamSpec]]:
    """The leaves of a rank that gradients move, by their names in the whole model."""
    specs, names = held(cfg, placement)
    return [(name, spec) for name, (_, spec) in zip(names, paths(specs, is_spec)) if not is_state(name)]


def make_update(optimizer: Optimizer, cfg: Config, placement: Placement | None, decays: tuple) -> Callable:
    """``update_(hyper, leaves, sums, m, v, masters) -> (done, norm)``, for graph code, of a rank's flat tuples of the leaves
    that gradients move; decays: of each.

    Gradients summed over copies, the norm of all of them, AdamW on the rank's parts in place, params handed on; ``done`` must
    be returned from the graph. Without a placement gradients are whole already.
    """
    if placement is None:
        def update_whole(hyper, leaves, grads, m, v, masters):
            return optimizer.update_(hyper, leaves, grads, m, v, masters, decays)

        return update_whole
    zero, moving, counted = placement.rules.zero, _moving(cfg, placement), owns_embedding(cfg, placement)
    # the last stage's copy of the embedding counts for nothing in a norm
    shares = tuple(placement.share(spec, path) * (counted or path != "embed") for path, spec in moving)
    shards, across, others = zip(*(groups_of(spec, path, placement) for path, spec in moving))

    def update_(hyper, leaves, sums, m, v, masters):
        grads = sums
        if zero == 1:
            grads = _map(reduce_scatter, grads, shards)
        grads = _map(psum, _map(psum, grads, across), others)
        norm = global_norm(grads, shares)
        if zero == 0 or zero == 3:
            return optimizer.apply_(hyper, norm, leaves, grads, m, v, masters, decays), norm
        if masters:  # of all leaves, and a rank's parts already
            done = optimizer.apply_(hyper, norm, masters, grads, m, v, (), decays)
            return (done, _map(_hand_on, leaves, _map(ops.partial(_after, done), masters), shards)), norm
        new, done = optimizer.renew_(hyper, norm, _map(_own, leaves, shards), grads, m, v, decays)
        return (done, _map(_hand_on, leaves, new, shards)), norm

    return update_


def _own(x, name):
    """This rank's part of x along the first dim."""
    n = parts(name)
    if n == 1:
        return x
    rows = x.shape[0] // n
    return x[part(name) * rows:(part(name) + 1) * rows]


def _hand_on(leaf, new, name):
    """A leaf made of the ranks' new parts, in place. On the CPU float32 is all that can be gathered; it rounds at the end."""
    return store(leaf, all_gather(new if on_cpu() else new.astype(leaf.dtype), name))


def _same(x):
    return x


def _float32(x):
    return x.astype(ms.float32)


def _after(done, x):
    return ops.depend(x, done)
