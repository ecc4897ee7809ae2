"""Communication by logical names inside a partitioned program; without a mesh none of it is there.

The model is written for one rank's shards, and says where ranks must talk by the name of the dim that is cut:
``psum(y, "heads")`` adds up what the ranks that share the heads have computed. Which ranks these are, the rules of the
placement say; when nothing is cut there, the call is its argument. It is JAX's shard_map with the mesh axes looked up.

Gradients: every rank differentiates the sum of all ranks' objectives, so the derivative of ``psum`` is ``psum``, and a
rank's objective is its loss divided by the number of ranks that report it (``parallel.bind``).
"""
from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.communication import create_group
from mindspore.ops.primitive import constexpr

from ..kernels.native import iota
from ..spec import ParamSpec
from ..tree import paths, tree_map_with_path
from . import groups
from .mesh import AXES, Mesh, divisors
from .rules import Rules, layout, local_slices, state_shards
from .schedules import Pipeline

STAGE_AXES = AXES[1:]  # of the ranks that share one pipeline stage


@dataclass(frozen=True)
class Placement:
    """One rank's place: the mesh, the rules, which rank, and how its stage is filled.

    Raises ValueError for what the model has no communication for yet.
    """

    mesh: Mesh
    rules: Rules
    rank: int = 0
    pipeline: Pipeline = Pipeline()

    def __post_init__(self) -> None:
        rules, mesh = self.rules, self.mesh

        def refuse(condition: bool, what: str) -> None:
            if condition:
                raise ValueError(f"mesh {mesh}: {what} can be planned for, not compiled: the model's code does not do it yet")

        batch, seq, cut = (rules.axes(name) for name in ("batch", "seq", "residual_seq"))
        refuse(cut[:len(seq)] != seq or rules.axes("tokens") != batch + seq or rules.axes("residual_tokens") != batch + cut,
               f"rules other than tokens = batch + seq, residual_seq = seq + more, residual_tokens = batch + residual_seq (found "
               f"batch={batch}, seq={seq}, tokens={rules.axes('tokens')}, residual_seq={cut}, "
               f"residual_tokens={rules.axes('residual_tokens')})")
        inner, n = rules.axes("ffn", ("expert",)), mesh.extent(rules.axes("expert"))
        refuse(rules.axes("expert") not in (("expert",), ("expert", "model")) or inner not in ((), rules.axes("ffn")),
               f"experts over {rules.axes('expert')}, each over {inner},")
        if rules.dispatch == "two_level" and n % rules.node:
            raise ValueError(f"mesh {mesh}: node={rules.node} does not divide the {n} ranks that share the experts; expected "
                             f"one of {divisors(n)}")
        for name in ("heads", "ffn", "vocab"):
            refuse(bool(set(rules.axes(name)) & set(batch + seq)), f"{name!r} on an axis of the batch or of its rows")
            refuse(bool(self.axes("residual")) and self.axes(name) not in ((), self.axes("residual")),
                   f"sequence parallelism over {self.axes('residual')} with {name!r} on {self.axes(name)}")

    def axes(self, name: str) -> tuple[str, ...]:
        """Mesh axes of size above 1 that cut the dim of this name. "all" is every axis of a stage, "world" every axis, "@a+b" the
        axes a and b, "residual" the axes of "residual_seq" beyond those of "seq". For ``group``, "NAME%n" is every n neighbours
        of the ranks of a name, "NAME/n" those that have the same place among such n."""
        name = re.split("[%/]", name)[0]
        if name.startswith("@"):
            axes: tuple[str, ...] = tuple(filter(None, name[1:].split("+")))
        elif name == "residual":
            axes = tuple(a for a in self.rules.axes("residual_seq") if a not in self.rules.axes("seq"))
        else:
            axes = {"all": STAGE_AXES, "world": AXES}.get(name) or self.rules.axes(name)
        return tuple(a for a in axes if self.mesh.axes[a] > 1)

    def group(self, name: str) -> tuple[int, ...]:
        """Ranks that hold the parts of the dim, in the order of the parts."""
        ranks = self.mesh.group(self.rank, self.axes(name))
        _, kind, n = re.fullmatch(r"([^%/]*)([%/]?)(\d*)", name).groups()
        if kind == "%":
            first = ranks.index(self.rank) // int(n) * int(n)
            return ranks[first:first + int(n)]
        return ranks[ranks.index(self.rank) % int(n)::int(n)] if kind else ranks

    def share(self, spec: ParamSpec, path: str) -> float:
        """What a rank's part of a leaf counts for in a sum over all ranks of the stage: copies share it."""
        cut = self.mesh.extent(a for dim in layout(spec, self.mesh, self.rules, path) for a in dim)
        return cut * state_shards(spec, self.mesh, self.rules, path) / len(self.group("all"))

    def index(self, name: str) -> int:
        """Which part this rank holds."""
        if re.search("[@%/]", name):
            return self.group(name).index(self.rank)
        return self.mesh.index(self.mesh.coords(self.rank), self.axes(name))


_placed: list[Placement] = []  # the placement that is being compiled for


@contextlib.contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Compile what is first called inside for this place."""
    _placed.append(placement)
    try:
        yield
    finally:
        _placed.pop()


def enter(placement: Placement) -> None:
    """``placed`` for the rest of this process."""
    _placed.append(placement)


@functools.cache
def group_of(ranks: tuple[int, ...]) -> str:
    """MindSpore's name of a group of ranks; all of them must call this, in the same order of groups."""
    name = groups.group_name(ranks)
    if not groups.stands():
        create_group(name, list(ranks))
    return name


def place(tree: Any, specs: Any, placement: Placement, *, state: bool = False) -> Any:
    """A rank's slices of whole params (or of anything shaped like them), as Tensors of their own.

    state: the slices of which the rank keeps the optimiser's state under ZeRO. Params are kept so too at level 3.
    """
    state = state or placement.rules.zero == 3
    coords, leaves = placement.mesh.coords(placement.rank), dict(paths(tree))

    def part_of(path: str, spec: ParamSpec) -> Tensor:
        return cut(leaves[path], local_slices(spec, placement.mesh, placement.rules, coords, path, state=state))

    return tree_map_with_path(part_of, specs)


def cut(leaf: Tensor, where: tuple[slice, ...]) -> Tensor:
    """A part of a tensor as a Tensor of its own."""
    array = (leaf.float() if leaf.dtype == ms.bfloat16 else leaf).asnumpy()  # which NumPy 2 refuses for bfloat16
    return Tensor(np.ascontiguousarray(array[where]), dtype=leaf.dtype)


def here() -> Placement | None:
    """The place that is being compiled for; None without a mesh. For code that runs while a graph is compiled."""
    return _placed[-1] if _placed else None


# -- what graph code asks while it is compiled ---------------------------------------------------------------------------
@constexpr
def parts(name: str) -> int:
    """Into how many parts the dim of this name is cut; 1 without a mesh."""
    return len(_placed[-1].group(name)) if _placed else 1


@constexpr
def part(name: str) -> int:
    """Which of them this rank has."""
    return _placed[-1].index(name) if _placed else 0


@constexpr
def on_cpu() -> bool:
    """Whether this is compiled for the CPU, which has AllReduce of float32 sums and Broadcast alone."""
    return ms.get_context("device_target") == "CPU"


@constexpr
def _all_reduce(name: str, op: str):
    return ops.AllReduce(getattr(ops.ReduceOp, op), group_of(_placed[-1].group(name)))


@constexpr
def _all_gather(name: str):
    return ops.AllGather(group_of(_placed[-1].group(name)))


@constexpr
def _reduce_scatter(name: str):
    return ops.ReduceScatter(ops.ReduceOp.SUM, group_of(_placed[-1].group(name)))


@constexpr
def _all_to_all_v(name: str, width: int):
    return ops.AlltoAllV(group_of(_placed[-1].group(name)), width)


@constexpr
def _own_part(name: str) -> Tensor:
    """[parts, 1] float32: 1 at this rank's part."""
    place = _placed[-1]
    return Tensor(np.eye(len(place.group(name)), dtype=np.float32)[place.index(name)][:, None])


# -- collectives -------------------------------------------------------------------------------------------------------
def psum(x, name):
    """The sum of x over the ranks that hold parts of the dim ``name``; all of them get it."""
    if parts(name) == 1:
        return x
    if on_cpu() and x.dtype == ms.int32:  # whose AllReduce has no integers; counts below 2^24 are exact
        return _all_reduce(name, "SUM")(x.astype(ms.float32)).astype(ms.int32)
    return _all_reduce(name, "SUM")(x)


def pmax(x, name):
    """The maximum over these ranks, a constant to the gradient."""
    x = ops.stop_gradient(x)
    if parts(name) == 1:
        return x
    if on_cpu():  # whose AllReduce only adds
        rows = psum(_own_part(name) * x.reshape(1, -1), name)
        return ops.stop_gradient(ops.amax(rows, 0).reshape(x.shape))
    return ops.stop_gradient(_all_reduce(name, "MAX")(x))


def all_gather(x, name):
    """The ranks' x one after another along the first dim, in the order of the parts."""
    n = parts(name)
    if n == 1:
        return x
    if on_cpu():  # which has no gradient of AllGather
        rows = _own_part(name).astype(x.dtype) * x.reshape(1, -1)
        return psum(rows, name).reshape((n * x.shape[0],) + x.shape[1:])
    return _all_gather(name)(x)


def reduce_scatter(x, name):
    """This rank's part, along the first dim, of the sum of x over these ranks."""
    n = parts(name)
    if n == 1:
        return x
    if on_cpu():
        rows = psum(x, name).reshape(n, -1)
        return rows[part(name)].reshape((x.shape[0] // n,) + x.shape[1:])
    return _reduce_scatter(name)(x)


def all_to_all_v(x, counts, name, most):
    """Rows to each of these ranks: x [P, D] holds those for part 0 first; counts[s, d] of them go from part s to part d.

    Returns the rows that come, part 0's first. On the CPU, where shapes are static and the exchange is made of the one
    collective there is, these are ``most`` rows, what is too much zero; else as many as come, and at least one must.
    """
    me, D = part(name), x.shape[1]
    if not on_cpu():
        sent, got = counts[me].astype(ms.int64), counts[:, me].astype(ms.int64)
        return _all_to_all_v(name, D)(x.reshape(-1), sent, got).reshape(-1, D)
    P = x.shape[0]
    start_S = (ops.cumsum(counts, 1) - counts)[:, me]  # of the rows for this rank, among the sender's
    end_S, row = ops.cumsum(counts[:, me], 0), iota(most)
    sender = ops.minimum((end_S.reshape(1, -1) <= row.reshape(-1, 1)).astype(ms.int32).sum(1).astype(ms.int32), len(end_S) - 1)
    place = ops.gather(start_S - end_S + counts[:, me] + iota(len(end_S)) * P, sender, 0) + row
    real = (row < end_S[-1]).reshape(-1, 1)
    rows = ops.gather(all_gather(x, name), ops.clamp(place, 0, len(end_S) * P - 1), 0)
    return ops.where(real, rows, ops.zeros_like(rows))


# -- gradients ---------------------------------------------------------------------------------------------------------
_map = ops.Map()


def global_norm(grads, shares):
    """Euclidean norm of gradients that are cut over all ranks; shares: ``Placement.share`` of each. 0-D float32."""
    return ops.sqrt(psum(ops.stack(_map(_square_sum, grads, shares)).sum(), "world"))


def _square_sum(x, share):
    return ops.square(x.astype(ms.float32)).sum() * share
