"""Trees of dict and tuple: one map that runs inside compiled graphs, and host helpers on ``optree``."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optree


def tree_map(fn: Callable, tree: Any, *rest: Any) -> Any:
    """Apply ``fn`` leaf by leaf over equal trees of dict and tuple. Also works in graph code, which ``optree`` does not."""
    if isinstance(tree, dict):
        return {k: tree_map(fn, tree[k], *[r[k] for r in rest]) for k in tree}
    if isinstance(tree, tuple):
        return tuple([tree_map(fn, tree[i], *[r[i] for r in rest]) for i in range(len(tree))])
    return fn(tree, *rest)


def tree_map_with_path(fn: Callable, tree: Any, prefix: str = "") -> Any:
    """``fn(path, leaf)`` over a tree of dict and tuple, on the host; paths as in ``paths``."""
    dot = prefix + "." if prefix else ""
    if isinstance(tree, dict):
        return {k: tree_map_with_path(fn, v, f"{dot}{k}") for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(tree_map_with_path(fn, v, f"{dot}{i}") for i, v in enumerate(tree))
    return fn(prefix, tree)


def flatten(tree: Any) -> tuple:
    """The leaves of a tree of dict and tuple, in insertion order, as one flat tuple. Also works in graph code."""
    out = ()
    if isinstance(tree, dict):
        for key in tree:
            out = out + flatten(tree[key])
        return out
    if isinstance(tree, tuple):
        for i in range(len(tree)):
            out = out + flatten(tree[i])
        return out
    return (tree,)


def fill(tree: Any, leaves: tuple) -> Any:
    """The structure of ``tree`` with a flat tuple of ``leaves`` put in, in the order of ``flatten``. For graph code too."""
    return _fill(tree, leaves, 0)[0]


def _fill(tree: Any, leaves: tuple, start: int) -> tuple:
    if isinstance(tree, dict):
        out = {}
        for key in tree:
            filled = _fill(tree[key], leaves, start)
            out[key] = filled[0]
            start = filled[1]
        return out, start
    if isinstance(tree, tuple):
        items = ()
        for i in range(len(tree)):
            filled = _fill(tree[i], leaves, start)
            items = items + (filled[0],)
            start = filled[1]
        return items, start
    return leaves[start], start + 1


def flat_paths(tree: Any) -> tuple:
    """The paths of the leaves in the order of ``flatten``. Also works in graph code."""
    return _flat_paths(tree, "")


def _flat_paths(tree: Any, prefix: str) -> tuple:
    if isinstance(tree, dict):
        out = ()
        for key in tree:
            out = out + _flat_paths(tree[key], prefix + "." + key)
        return out
    if isinstance(tree, tuple):
        out = ()
        for i in range(len(tree)):
            out = out + _flat_paths(tree[i], prefix + "." + str(i))
        return out
    return (prefix[1:],)


def paths(tree: Any, is_leaf: Callable | None = None) -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs in insertion order; a path is the keys joined by dots, ``layers.0.attn.wq_a``."""
    def walk(node: Any, prefix: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if not (is_leaf and is_leaf(node)) and isinstance(node, dict):
            for key in node:
                yield from walk(node[key], (*prefix, str(key)))
        elif not (is_leaf and is_leaf(node)) and isinstance(node, (tuple, list)):
            for i, child in enumerate(node):
                yield from walk(child, (*prefix, str(i)))
        else:
            yield ".".join(prefix), node
    yield from walk(tree, ())


def size(tree: Any) -> int:
    """Number of elements in all leaves (anything with a ``shape``)."""
    return sum(int(np.prod(leaf.shape)) for leaf in optree.tree_leaves(tree))


def same_structure(a: Any, b: Any) -> bool:
    """Whether two trees have the same containers and keys."""
    return optree.tree_structure(a) == optree.tree_structure(b)


def to_numpy(tree: Any) -> Any:
    """The same tree with every tensor copied to a NumPy array (bfloat16 widened to float32)."""
    def convert(leaf: Any) -> np.ndarray:
        if not hasattr(leaf, "asnumpy"):
            return np.asarray(leaf)
        if str(leaf.dtype) == "BFloat16":  # asnumpy refuses it under NumPy 2
            leaf = leaf.float()
        return leaf.asnumpy().copy()
    return optree.tree_map(convert, tree)


def global_norm(tree: Any) -> float:
    """Euclidean norm of all leaves together, accumulated in float64 on the host."""
    return float(np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in optree.tree_leaves(to_numpy(tree)))))
