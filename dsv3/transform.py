"""The compile boundary: the only file that says ``ms.jit``. Pytrees in, pytrees out, nothing compiled twice.

MindSpore compiles a Python function from its source. Its traps with pytrees are many and mostly silent: a plain dict
recompiles at every call and its gradient comes back as ``()``; ``mutable`` containers cost time that grows with the
square of their leaves; a list changes its type, containers nest at most six deep, a returned dict makes the graph
dynamic. So containers never cross the boundary here. On the host a tree is flattened to positional tensors, inside the
graph it is rebuilt from a constant index tree, and the result leaves as one flat tuple whose structure was noted at
compile time.
"""
from __future__ import annotations

import functools
import inspect
import json
from typing import Any, Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.ops.primitive import constexpr

from .tree import flatten

MAX_DEPTH = 6  # containers inside one another that MindSpore converts in a graph
RECURSION_LIMIT = 1_000_000  # MindSpore's default of 1000 nested calls is reached near 16 unrolled layers

_skeletons: dict[int, Any] = {}  # graph id -> structure of its result, noted while it is compiled
_compiling: list[int] = []  # ids of the graphs being called now; non-empty means: we are inside graph code


# -- structures ------------------------------------------------------------------------------------------------------
# Graph constants, too, nest at most six deep, so a structure enters a graph as a flat table of nodes and leaves it as
# one string. A node is the number of a leaf, a negative number -1 - i for the i-th static value, or a container:
# ("d", keys, children) or ("t", (), children), with the children's places in the table.
def _table(tree: Any, leaves: list, statics: list, nodes: list, where: str, depth: int = 0) -> int:
    """Take a tree apart into ``leaves``, ``statics`` and ``nodes``; return its place. Refuses what cannot cross."""
    if depth > MAX_DEPTH:
        raise TypeError(f"{where} lies inside {depth} containers; MindSpore allows {MAX_DEPTH}: join some of the levels")
    down = depth + 1
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; keys of a pytree must be strings")
        node = ("d", tuple(tree), tuple(_table(v, leaves, statics, nodes, f"{where}[{k!r}]", down) for k, v in tree.items()))
    elif type(tree) is tuple:
        node = ("t", (), tuple(_table(v, leaves, statics, nodes, f"{where}[{i}]", down) for i, v in enumerate(tree)))
    elif isinstance(tree, list):
        raise TypeError(f"{where} is a list; use a tuple: MindSpore recompiles lists and changes their type")
    elif tree is None or isinstance(tree, (bool, str)):
        statics.append(tree)
        node = -len(statics)
    elif isinstance(tree, (int, float)) and not isinstance(tree, np.generic):
        raise TypeError(f"{where} is the Python number {tree!r}, which would recompile for every new value; pass "
                        f"np.float32({tree!r}) or a Tensor, or close over it if it never changes")
    else:
        leaves.append(_tensor(tree, where))
        node = len(leaves) - 1
    nodes.append(node)
    return len(nodes) - 1


def _tensor(leaf: Any, where: str) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, (np.ndarray, np.generic)):
        array = np.asarray(leaf)
        narrow = {"int64": np.int32, "uint32": np.int32, "float64": np.float32}.get(array.dtype.name)
        if narrow is np.int32 and array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
            raise ValueError(f"{where} holds {array.dtype} values outside int32: {array.min()} to {array.max()}")
        return Tensor(array if narrow is None else array.astype(narrow))
    raise TypeError(f"{where} is a {type(leaf).__name__}; a pytree holds dicts, tuples, Tensors and NumPy arrays "
                    f"(close over anything else)")


def _build(nodes: tuple, place: int, leaves: tuple, statics: tuple) -> Any:
    """The tree that ``_table`` took apart. Runs in graph code."""
    node = nodes[place]
    if isinstance(node, int):
        if node < 0:
            return statics[-1 - node]
        return leaves[node]
    if node[0] == "d":
        return {k: _build(nodes, c, leaves, statics) for k, c in zip(node[1], node[2])}
    return tuple([_build(nodes, c, leaves, statics) for c in node[2]])


def _apply(fn: Callable, nodes: tuple, roots: tuple, leaves: tuple, statics: tuple) -> Any:
    """``fn`` of its rebuilt arguments, written out because a tuple of them would be one level of the six."""
    if len(roots) == 0:
        return fn()
    a = _build(nodes, roots[0], leaves, statics)
    if len(roots) == 1:
        return fn(a)
    b = _build(nodes, roots[1], leaves, statics)
    if len(roots) == 2:
        return fn(a, b)
    c = _build(nodes, roots[2], leaves, statics)
    if len(roots) == 3:
        return fn(a, b, c)
    d = _build(nodes, roots[3], leaves, statics)
    if len(roots) == 4:
        return fn(a, b, c, d)
    return fn(a, b, c, d, *[_build(nodes, place, leaves, statics) for place in roots[4:]])


def _outline(tree: Any) -> str:
    """The containers of a result as JSON, a leaf as 0. Runs in graph code."""
    if isinstance(tree, dict):
        text = ""
        for key in tree:
            text = text + ',"' + key + '":' + _outline(tree[key])
        return "{" + text[1:] + "}"
    if isinstance(tree, tuple):
        text = ""
        for i in range(len(tree)):
            text = text + "," + _outline(tree[i])
        return "[" + text[1:] + "]"
    return "0"


def _restore(outline: Any, leaves: Any) -> Any:
    if isinstance(outline, dict):
        return {k: _restore(child, leaves) for k, child in outline.items()}
    if isinstance(outline, list):
        return tuple(_restore(child, leaves) for child in outline)
    return next(leaves)


@constexpr
def _note(graph_id: int, outline: str) -> int:
    """Runs while the graph is compiled: remember the structure of its result."""
    _skeletons[graph_id] = json.loads(outline)
    return 0


@constexpr
def _inside() -> bool:
    return bool(_compiling)


# -- jit -------------------------------------------------------------------------------------------------------------
def _refuse(fn: Any, what: str) -> None:
    if isinstance(fn, functools.partial):
        raise TypeError(f"{what} got a functools.partial, which MindSpore would run uncompiled without a word; wrap it "
                        f"in a def that closes over the fixed arguments")
    if not inspect.isfunction(fn):
        raise TypeError(f"{what} got a {type(fn).__name__}; it compiles plain functions: wrap it in a def")


def jit(fn: Callable, *, jit_level: str = "O0") -> Callable:
    """Compile ``fn(*pytrees)`` once per structure and shapes; call it with trees of Tensors or NumPy arrays.

    Arguments and results are nested dicts and tuples; None, bool and str in them are constants of the compilation.
    Integers of 64 bits become int32 and float64 becomes float32. ``fn`` is compiled from its source: it may close over
    a Config, but not use try, with, lambda, or a list where a tree is meant. Raises TypeError with the remedy for
    whatever MindSpore would recompile or get wrong silently: a list, a Python number, a partial.
    """
    _refuse(fn, "jit")
    graphs: dict[Any, tuple[Callable, int]] = {}
    parameters = inspect.signature(fn).parameters

    @functools.wraps(fn)  # sets __wrapped__, by which graph code that calls a jitted function inlines it
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs:  # graph code gets positional arguments only
            bound = inspect.signature(fn).bind(*args, **kwargs)
            if bound.kwargs:
                raise TypeError(f"{fn.__name__}: keyword-only arguments {tuple(bound.kwargs)} cannot cross the compile "
                                f"boundary; close over them")
            args = bound.args
        leaves: list = []
        statics: list = []
        names = list(parameters)
        nodes: list = []
        names = list(parameters)
        roots = tuple(_table(a, leaves, statics, nodes, names[min(i, len(names) - 1)]) for i, a in enumerate(args))
        key = (roots, tuple(nodes), tuple(statics))
        if key not in graphs:
            ms.set_recursion_limit(RECURSION_LIMIT)
            graphs[key] = _graph(fn, *key, jit_level)
        graph, graph_id = graphs[key]
        _compiling.append(graph_id)
        try:
            flat = graph(*leaves)
        finally:
            _compiling.pop()
        return _restore(_skeletons[graph_id], iter(flat))

    return call


def _graph(fn: Callable, roots: tuple, nodes: tuple, statics: tuple, jit_level: str) -> tuple[Callable, int]:
    graph_id = len(_graphs)

    def graph(*leaves):
        out = _apply(fn, nodes, roots, leaves, statics)
        _note(graph_id, _outline(out))
        return flatten(out)

    _graphs.append(graph)
    return ms.jit(graph, jit_level=jit_level), graph_id


_graphs: list[Callable] = []


def compiled(fn: Callable) -> Callable:
    """Make ``fn(*pytrees, **static)`` callable from anywhere: compiled when called from Python, once per set of static
    keywords (hashable: a Config, functions, bools), and inlined when called from a function given to ``jit``.
    """
    host: dict[tuple, Callable] = {}
    names = tuple(n for n, p in inspect.signature(fn).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)

    def from_python(args: tuple, static: dict) -> Any:
        by_name = {k: static.pop(k) for k in names[len(args):] if k in static}
        for name in names[len(args):]:
            if not by_name:
                break
            args = (*args, by_name.pop(name, None))
        key = tuple(sorted(static.items(), key=lambda item: item[0]))
        if key not in host:
            def bound(*trees):
                return fn(*trees, **static)

            bound.__name__ = fn.__name__
            host[key] = jit(bound)
        return host[key](*args)

    def call(*args, **static):
        if _inside():
            return fn(*args, **static)
        return from_python(args, static)

    call.__name__, call.__doc__, call.__signature__ = fn.__name__, fn.__doc__, inspect.signature(fn)
    return call


def compile_count() -> int:
    """Graphs MindSpore has compiled in this process; equal before and after a call means that it compiled nothing."""
    from mindspore.graph import api

    return len(api.ms_compile_cache)


# -- gradients -------------------------------------------------------------------------------------------------------
def value_and_grad(fn: Callable, has_aux: bool = False) -> Callable:
    """``fn(params, *rest) -> loss`` (or ``(loss, aux)``) becomes ``-> (loss, grads)`` (or ``((loss, aux), grads)``).

    ``grads`` has the structure of ``params``, always. Called from Python it is compiled; inside a function given to
    ``jit`` it becomes part of that graph. The loss must be a 0-D tensor.
    """
    _refuse(fn, "value_and_grad")

    def grad_fn(*args):
        params, rest = args[0], args[1:]

        def flat_fn(leaves, rest):
            return fn(_fill(params, leaves, 0)[0], *rest)

        value, grads = ms.value_and_grad(flat_fn, 0, None, has_aux)(flatten(params), rest)
        return value, _fill(params, grads, 0)[0]

    compiled = jit(grad_fn)

    def call(*args):
        if _inside():
            return grad_fn(*args)
        return compiled(*args)

    call.__name__, call.__doc__ = f"value_and_grad_{fn.__name__}", fn.__doc__  # no __wrapped__: graph code would call fn
    return call


def _fill(tree: Any, leaves: tuple, start: int) -> tuple:
    """Put a flat tuple of leaves, from ``start`` on, into the structure of ``tree``; returns (tree, next start)."""
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
