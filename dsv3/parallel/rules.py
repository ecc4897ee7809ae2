"""The rules: one table from logical axes to mesh axes, and what follows for a leaf: layout, local shape, slices, ZeRO.

A leaf's dims carry logical names (``ParamSpec.axes``), activations carry the same names and those of batch and
sequence; ``Rules`` maps each name to the mesh axes that cut it. Nothing else decides a layout, and a layout that cannot
be is refused: two dims on one mesh axis, or a size that does not divide.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from ..spec import ParamSpec, is_spec, is_state
from ..tree import paths
from .mesh import AXES, Mesh, divisors, expand

Layout = tuple[tuple[str, ...], ...]  # for each dim the mesh axes that cut it, the first the slowest; () for a whole dim

EXPERTS = ("tensor", "extend", "whole")
DISPATCH = ("gather", "alltoall", "two_level", "replicated")
ZERO_AXES = ("replica", "expert", "context")


@dataclass(frozen=True)
class Rules:
    """The table, and how ZeRO shards what the optimiser keeps. Make one with ``make_rules``, or write the table.

    table: (logical axis, mesh axes) pairs. A name like "expert.ffn" is the rule of "ffn" in a leaf that has a dim
    "expert"; without it the plain name holds there too.
    zero: what is sharded over the ranks that would hold copies (ZeRO, arXiv 1910.02054): 0 nothing, 1 the optimiser's
    state, 2 also gradients, 3 also params. shard_size: over how many of these ranks, None for all; a leaf with a number
    of copies that it does not divide is sharded over all of them, as MindSpore does with
    ``optimizer_weight_shard_size``. zero_axes: the axes along which copies count, data and context as in Megatron's
    distributed optimiser; MindSpore's parallel optimiser counts "model" too.
    dispatch: how tokens meet their experts, one of ``DISPATCH`` (see ``nn.dispatch``), None for what moves the fewest bytes.
    node: how many neighbours of the ranks that share the experts sit in one node, for the all-to-all in two levels.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]
    zero: int = 0
    shard_size: int | None = None
    zero_axes: tuple[str, ...] = ZERO_AXES
    dispatch: str | None = None
    node: int | None = None

    def __post_init__(self) -> None:
        names = [name for name, _ in self.table]
        for name, axes in self.table:
            if names.count(name) > 1:
                raise ValueError(f"rules: {name!r} is given {names.count(name)} times; give it once")
            whole = expand(axes)
            if len(set(whole)) < len(whole):
                raise ValueError(f"rules: {name!r} names a mesh axis twice, {axes}; name each once")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"rules: zero={self.zero!r}; expected 0 (off), 1 (state), 2 (and gradients) or 3 (and params)")
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError(f"rules: shard_size={self.shard_size}; expected at least 1, or None for all copies")
        expand(self.zero_axes)
        if self.dispatch is not None and self.dispatch not in DISPATCH:
            raise ValueError(f"rules: dispatch={self.dispatch!r}; expected None or one of {', '.join(DISPATCH)}")
        if self.node is not None and self.node < 1:
            raise ValueError(f"rules: node={self.node}; expected how many expert-parallel ranks a node has, at least 1, or None")
        if self.dispatch == "two_level" and self.node is None:
            raise ValueError("rules: dispatch='two_level' without node; say how many expert-parallel ranks a node has")

    def axes(self, name: str | None, siblings: Iterable[str | None] = ()) -> tuple[str, ...]:
        """Mesh axes of a logical axis in a leaf whose dims are ``siblings``; raises ValueError for an unknown name."""
        if name is None:
            return ()
        table = dict(self.table)
        for other in siblings:
            if other is not None and f"{other}.{name}" in table:
                return expand(table[f"{other}.{name}"])
        name = name if name in table else name.rpartition(".")[2]
        if name not in table:
            raise ValueError(f"rules: no rule for the axis {name!r}; the table has {', '.join(table)}: add ({name!r}, ())")
        return expand(table[name])

    def replace(self, name: str, axes: tuple[str, ...]) -> Rules:
        """A copy in which one logical axis lies on other mesh axes."""
        return dataclasses.replace(self, table=tuple(dict(self.table, **{name: axes}).items()))


def make_rules(*, sequence_parallel: bool = False, experts: str = "tensor", vocab_parallel: bool = True, zero: int = 0,
               shard_size: int | None = None, zero_axes: tuple[str, ...] = ZERO_AXES, dispatch: str | None = None,
               node: int | None = None) -> Rules:
    """The usual table: Megatron's tensor parallelism, experts over ``expert``, batch over ``data``.

    Column-parallel: wq_b, wkv_b (heads), w_gate, w_up (ffn), the head (vocab); row-parallel: wo, w_down and, by rows of
    the vocabulary, the embedding (arXiv 1909.08053). Replicated over ``model``: norms, router, eh_proj and the
    down-projections to the latents, which are the same for all heads.

    sequence_parallel: between the parallel products a row is cut over ``model`` too (arXiv 2205.05198), named
    "residual_seq" and "residual_tokens". experts: "tensor", each expert cut over ``model`` inside its ``expert`` rank;
    "extend", whole experts over expert * model ranks (Megatron's and MindSpeed's moe-tp-extend-ep); "whole", whole
    experts over ``expert`` ranks, copied over ``model``, whose ranks then route their own part of the tokens (MindSpore
    Transformers with expert_model_parallel 1). dispatch, node: as in ``Rules``. vocab_parallel=False copies embedding and head
    (``vocab_emb_dp``).
    Raises ValueError for settings that do not exist.
    """
    if experts not in EXPERTS:
        raise ValueError(f"rules: experts={experts!r}; expected one of {', '.join(EXPERTS)}")
    along = ("model",) if sequence_parallel else ()
    table = {
        "vocab": ("model",) if vocab_parallel else (), "embed": (), "q_lora": (), "kv_lora": (), "heads": ("model",),
        "ffn": ("model",), "expert": ("expert", "model") if experts == "extend" else ("expert",),
        "expert.ffn": ("model",) if experts == "tensor" else (),
        "batch": ("data",), "seq": ("context",), "tokens": ("data", "context"),
        "residual_seq": ("context", *along), "residual_tokens": ("data", "context", *along),
    }
    return Rules(tuple(table.items()), zero, shard_size, zero_axes, dispatch, node)


# -- one leaf ----------------------------------------------------------------------------------------------------------
def layout(spec: ParamSpec, mesh: Mesh, rules: Rules, name: str = "leaf") -> Layout:
    """Mesh axes of every dim of a leaf. ValueError: two dims on one axis, or a size that does not divide (with a remedy)."""
    return layout_of(spec.shape, spec.axes, mesh, rules, name)


def layout_of(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, rules: Rules, name: str = "tensor") -> Layout:
    """``layout`` of any tensor, given its logical shape and the logical axis (or None) of each dim."""
    if len(shape) != len(axes):
        raise ValueError(f"{name}: shape {shape} has {len(shape)} dims but axes {axes} name {len(axes)}")
    out = tuple(rules.axes(axis, axes) for axis in axes)
    for i, cuts in enumerate(out):
        for j in range(i):
            both = [a for a in cuts if a in out[j]]
            if both:
                raise ValueError(f"{name}: dims {j} ({axes[j]!r}) and {i} ({axes[i]!r}) both lie on the mesh axis {both[0]!r}; "
                                 f"change the rule of one of them, for example rules.replace({axes[i]!r}, ())")
        n = mesh.extent(cuts)
        if shape[i] % n:
            where = "*".join(f"{a}={mesh.axes[a]}" for a in cuts)
            raise ValueError(f"{name}: dim {i} ({axes[i]!r}) of size {shape[i]} is not divisible by {n} ({where}); pick a mesh "
                             f"whose product is one of {divisors(shape[i])}, or rules.replace({axes[i]!r}, ())")
    return out


def local_shape(spec: ParamSpec, mesh: Mesh, rules: Rules, name: str = "leaf") -> tuple[int, ...]:
    """Shape of one rank's part of a leaf; every rank's is the same. Refuses what ``layout`` refuses."""
    return tuple(n // mesh.extent(cuts) for n, cuts in zip(spec.shape, layout(spec, mesh, rules, name)))


def state_shards(spec: ParamSpec, mesh: Mesh, rules: Rules, name: str = "leaf") -> int:
    """Into how many parts ZeRO cuts dim 0 of a rank's part: the number of its copies, or ``shard_size`` of them.

    1 when ``zero`` is 0, when dim 0 does not divide (MindSpore too leaves such a leaf whole), and for the router's choice
    bias, which has no state and is used and updated whole.
    """
    if rules.zero == 0 or is_state(name):
        return 1
    n = mesh.extent(copies(layout(spec, mesh, rules, name), rules))
    if rules.shard_size is not None and n % rules.shard_size == 0:
        n = rules.shard_size
    return 1 if local_shape(spec, mesh, rules, name)[0] % n else n


def local_slices(spec: ParamSpec, mesh: Mesh, rules: Rules, coords: dict[str, int], name: str = "leaf", *,
                 state: bool = False) -> tuple[slice, ...]:
    """Which part of a leaf the rank at ``coords`` (``mesh.coords``) holds, a slice a dim.

    state: the part of which it keeps the optimiser's state under ZeRO, dim 0 cut further over the copies.
    """
    cuts, local = layout(spec, mesh, rules, name), local_shape(spec, mesh, rules, name)
    starts = [mesh.index(coords, axes) * n for axes, n in zip(cuts, local)]
    if state:
        shards = state_shards(spec, mesh, rules, name)
        local = (local[0] // shards, *local[1:])
        starts[0] += mesh.index(coords, copies(cuts, rules)) % shards * local[0]
    return tuple(slice(start, start + n) for start, n in zip(starts, local))


def copies(cuts: Layout, rules: Rules) -> tuple[str, ...]:
    """Axes along which ranks hold the same part of a leaf and share its state, slowest first."""
    used, shared = {axis for dim in cuts for axis in dim}, expand(rules.zero_axes)
    return tuple(axis for axis in AXES if axis in shared and axis not in used)


# -- all leaves --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Leaf:
    """One leaf on a mesh. ``shards``: parts into which ZeRO cuts its state."""

    path: str
    spec: ParamSpec
    layout: Layout
    local: tuple[int, ...]
    shards: int

    @property
    def size(self) -> int:
        """Elements on one rank."""
        return prod(self.local)


def leaves(specs: Any, mesh: Mesh, rules: Rules) -> Iterator[Leaf]:
    """Every leaf of a tree of ParamSpec on a mesh; refuses what ``layout`` refuses, naming the leaf."""
    for path, spec in paths(specs, is_spec):
        yield Leaf(path, spec, layout(spec, mesh, rules, path), local_shape(spec, mesh, rules, path),
                   state_shards(spec, mesh, rules, path))
