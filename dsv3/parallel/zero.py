"""Who shares what under ZeRO (arXiv 1910.02054, section 5), and params that are kept as parts and made whole where they are used.

What the optimiser does with the parts is in ``parallel.update``.
"""
from __future__ import annotations

from typing import Any

from mindspore.ops.primitive import constexpr

from ..spec import ParamSpec
from ..tree import tree_map_with_path
from .rules import copies, layout, state_shards
from .shard import STAGE_AXES, Placement, all_gather, here


def groups_of(spec: ParamSpec, path: str, placement: Placement) -> tuple[str, str, str]:
    """(shards, across, others): names for ``psum`` of the ranks that hold copies of a leaf, in three groups.

    shards share out its state, across are those with the same part of it in other groups (``shard_size``), others hold
    copies that do not share, such as those along ``model`` of a norm. The product of the three is all copies.
    """
    cuts = layout(spec, placement.mesh, placement.rules, path)
    n = state_shards(spec, placement.mesh, placement.rules, path)
    everywhere = tuple(a for a in STAGE_AXES if not any(a in dim for dim in cuts))
    if n == 1:
        return "@", "@", "@" + "+".join(everywhere)
    sharing = copies(cuts, placement.rules)
    name = "@" + "+".join(sharing)
    across = f"{name}/{n}" if placement.mesh.extent(sharing) > n else "@"
    return f"{name}%{n}" if across != "@" else name, across, "@" + "+".join(a for a in everywhere if a not in sharing)


@constexpr
def cuts_params() -> bool:
    """Whether params are kept as parts where this is compiled for."""
    return here() is not None and here().rules.zero == 3


def shard_names(specs: Any, prefix: str = "") -> Any:
    """For ``gathered``: the tree of ``specs`` with the name of the ranks that share out each leaf."""
    return tree_map_with_path(lambda path, spec: groups_of(spec, path, here())[0], specs, prefix)


def gathered(params: Any, names: Any) -> Any:
    """The part of ``params`` that ``names`` has, its leaves whole, made of the ranks' parts; for graph code.

    names: a tree of ``shard_names``; "@" leaves what stands there, a leaf or a tree, as it is.
    """
    if isinstance(names, dict):
        return {k: gathered(params[k], names[k]) for k in names}
    if isinstance(names, tuple):
        return tuple([gathered(params[i], names[i]) for i in range(len(names))])
    return all_gather(params, names)
