"""The compile boundary: the only file that says ``ms.jit``. Pytrees in, pytrees out, nothing compiled twice.

MindSpore compiles a Python function from its source. Its traps with pytrees are many and mostly silent: a plain dict
recompiles at every call and its gradient comes back as ``()``; ``mutable`` containers cost time that grows with the
square of their leaves; a list changes its type, a returned dict makes the graph dynamic. So containers never cross the
boundary here. On the host a tree is flattened to positional tensors; the graph starts with a line of generated source
that writes the tree down as a literal of those tensors (building it by recursion inside the graph compiles far slower);
the result leaves as one flat tuple whose structure is noted while it is compiled.
"""
from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import itertools
import json
import linecache
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.ops.primitive import constexpr

from .tree import flatten

MAX_DEPTH = 6  # containers inside one another that MindSpore converts in a graph
RECURSION_LIMIT = 1_000_000  # MindSpore's default of 1000 nested calls is reached near 16 unrolled layers

_numbers = itertools.count()  # of graphs and of generated sources
_outlines: dict[int, Any] = {}  # graph number -> structure of its result, noted while it is compiled
_compiling: list[int] = []  # numbers of the graphs being called now; non-empty means: we are inside graph code


# -- structures ------------------------------------------------------------------------------------------------------
def literal(tree: Any, leaves: dict[int, Any], where: str, depth: int = 0, letter: str = "a") -> str:
    """Python source of ``tree`` with its leaves written as a0, a1, ...; adds them to ``leaves``, id -> (i, Tensor, leaf).

    The same Tensor at two places is one leaf. Raises TypeError with the remedy for what cannot cross the boundary.
    """
    if depth > MAX_DEPTH:
        raise TypeError(f"{where} lies inside {depth} containers; MindSpore allows {MAX_DEPTH}: join some of the levels")
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; keys of a pytree must be strings")
        items = (f"{k!r}: {literal(v, leaves, f'{where}[{k!r}]', depth + 1, letter)}" for k, v in tree.items())
        return "{" + ",\n".join(items) + "}"
    if type(tree) is tuple:
        return "(" + "".join(f"{literal(v, leaves, f'{where}[{i}]', depth + 1, letter)},\n" for i, v in enumerate(tree)) + ")"
    if isinstance(tree, list):
        raise TypeError(f"{where} is a list; use a tuple: MindSpore recompiles lists and changes their type")
    if tree is None or isinstance(tree, (bool, str)):
        return repr(tree)
    if isinstance(tree, (int, float)) and not isinstance(tree, np.generic):
        raise TypeError(f"{where} is the Python number {tree!r}, which would recompile for every new value; pass "
                        f"np.float32({tree!r}) or a Tensor, or close over it if it never changes")
    if id(tree) not in leaves:
        leaves[id(tree)] = len(leaves), _tensor(tree, where), tree
    return f"{letter}{leaves[id(tree)][0]}"


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


@functools.cache
def _source_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dsv3-graphs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def generated(source: str, names: dict[str, Any]) -> Callable:
    """The one function that ``source`` defines, with ``names`` as its globals, in a form that graph code can parse:
    MindSpore wants a file to read the source from and a module to find the globals in."""
    module = types.ModuleType(f"dsv3_generated_{next(_numbers)}")
    path = _source_folder() / f"{module.__name__}.py"
    path.write_text(source)
    linecache.checkcache(str(path))
    module.__dict__.update(names, __file__=str(path))
    sys.modules[module.__name__] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return next(v for k, v in module.__dict__.items() if inspect.isfunction(v) and v.__module__ == module.__name__)


def builder(tree: Any, second: list[bool]) -> Callable:
    """``build(first, second) -> tree`` for graph code: the structure of ``tree`` around two flat tuples of its leaves,
    those (in ``flatten`` order) for which ``second`` is False and those for which it is True."""
    flags, counts = iter(second), {False: itertools.count(), True: itertools.count()}

    def write(node: Any) -> str:
        if isinstance(node, dict):
            return "{" + ",\n".join(f"{k!r}: {write(v)}" for k, v in node.items()) + "}"
        if isinstance(node, tuple):
            return "(" + "".join(f"{write(v)},\n" for v in node) + ")"
        flag = next(flags)
        return f"{'second' if flag else 'first'}[{next(counts[flag])}]"

    return generated(f"def build(first, second):\n    return {write(tree)}\n", {})


def picker(tree: Any, wanted: list[bool]) -> Callable:
    """``pick(tree) -> leaves`` for graph code: a flat tuple of the wanted leaves, in ``flatten`` order. Written out as
    source because the gradient of an index into a long tuple is as long as the tuple, and a model has hundreds."""
    flags = iter(wanted)

    def write(node: Any, where: str) -> str:
        if isinstance(node, dict):
            return "".join(write(v, f"{where}[{k!r}]") for k, v in node.items())
        if isinstance(node, tuple):
            return "".join(write(v, f"{where}[{i}]") for i, v in enumerate(node))
        return f"{where},\n" if next(flags) else ""

    return generated(f"def pick(tree):\n    return ({write(tree, 'tree')})\n", {})


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
def _note(number: int, outline: str) -> int:
    """Runs while the graph is compiled: remember the structure of its result."""
    _outlines[number] = json.loads(outline)
    return 0


@constexpr
def _inside() -> bool:
    return bool(_compiling)


def enter_graph() -> None:
    """From now on this process compiles graphs by itself (``ms.jit``, ``ms.export``), so that library functions called in
    them are inlined. For processes that do nothing else, such as a simulated rank's."""
    _compiling.append(-1)


def whole_program(fn: Callable) -> Callable:
    """``fn`` of flat tensors, compiled as it is: for programs that close over their Parameters and are exported."""
    return ms.jit(fn)


# -- jit -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Graph:
    """What ``jit`` makes of a function for one structure of arguments. literals: that structure; function: of flat tensors."""

    name: str
    number: int
    literals: tuple[str, ...]
    function: Callable


@dataclass(frozen=True)
class Bound:
    """Trees that graphs close over. literals: their structures; parameters: a Parameter for every leaf, by its name there."""

    literals: tuple[str, ...]
    parameters: dict[str, Any]


def bind(*trees: Any) -> Bound:
    """Trees for graphs that run often: ``jit(fn, bound=bind(params, cache))`` is a function of fn's other arguments.

    Handing over a tensor costs some 10 us a call, and a model has hundreds; these are Parameters that graphs close over. They
    share the memory of the leaves: what either changes in place the other sees. Raises TypeError as ``jit`` does.
    """
    leaves: dict[int, Any] = {}
    literals = tuple(literal(tree, leaves, f"bound tree {i}", letter="p") for i, tree in enumerate(trees))

    def empty(dtype: Any) -> Any:
        return ms.Parameter(Tensor(np.zeros(1), dtype=dtype), name=f"bound{next(_numbers)}", requires_grad=False)

    bound = Bound(literals, {f"p{i}": empty(tensor.dtype) for i, tensor, _ in leaves.values()})
    rebind(bound, *trees)
    return bound


def rebind(bound: Bound, *trees: Any) -> None:
    """Let graphs see other tensors in the place of the first trees that were bound, of the same structure, shapes and dtypes."""
    leaves: dict[int, Any] = {}
    literals = tuple(literal(tree, leaves, f"bound tree {i}", letter="p") for i, tree in enumerate(trees))
    if literals != bound.literals[:len(trees)]:
        raise TypeError("rebind: the trees have another structure than those that were bound; bind them anew")
    for i, tensor, _ in leaves.values():
        bound.parameters[f"p{i}"].set_data(tensor, slice_shape=True)  # shares the memory, where the constructor would copy


def run_graph(graph: Graph, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Any]:
    """(flat results, their structure) of a graph, compiled when it is new. It is how every graph runs, save where
    ``parallel.recorded`` puts something else in the place of ``runner``."""
    with tracing(graph.number):
        flat = graph.function(*tensors)
    return flat, outline_of(graph)


runner: Callable = run_graph


@contextlib.contextmanager
def tracing(number: int) -> Iterator[None]:
    """Inside, graph code is compiled: library functions called in it are inlined."""
    _compiling.append(number)
    try:
        yield
    finally:
        _compiling.pop()


def outline_of(graph: Graph) -> Any:
    """The structure of a graph's result, known once it is compiled: dicts and lists with 0 for a tensor."""
    return _outlines[graph.number]


def _refuse(fn: Any, what: str) -> None:
    if isinstance(fn, functools.partial):
        raise TypeError(f"{what} got a functools.partial, which MindSpore would run uncompiled without a word; wrap it "
                        f"in a def that closes over the fixed arguments")
    if not inspect.isfunction(fn):
        raise TypeError(f"{what} got a {type(fn).__name__}; it compiles plain functions: wrap it in a def")


def jit(fn: Callable, *, jit_level: str = "O0", bound: Bound | None = None) -> Callable:
    """Compile ``fn(*pytrees)`` once per structure and shapes; call it with trees of Tensors or NumPy arrays.

    Arguments and results are nested dicts and tuples; None, bool and str in arguments are constants of the compilation.
    Integers of 64 bits become int32 and float64 becomes float32. ``fn`` is compiled from its source: it may close over
    a Config, but not use try, with, lambda, or a list where a tree is meant. Raises TypeError with the remedy for
    whatever MindSpore would recompile or get wrong silently: a list, a Python number, a partial.

    bound: trees that come before the arguments of a call (``bind``). Raises TypeError when fn cannot take them.
    """
    _refuse(fn, "jit")
    graphs: dict[tuple[str, ...], tuple[Callable, int]] = {}
    signature = inspect.signature(fn)
    if bound is not None:
        signature = signature.replace(parameters=list(signature.parameters.values())[len(bound.literals):])
    names = list(signature.parameters)

    @functools.wraps(fn)  # sets __wrapped__, by which graph code that calls a jitted function inlines it
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs:  # graph code gets positional arguments only
            given = signature.bind(*args, **kwargs)
            if given.kwargs:
                raise TypeError(f"{fn.__name__}: keyword-only arguments {tuple(given.kwargs)} cannot cross the compile "
                                f"boundary; close over them")
            args = given.args
        leaves: dict[int, Any] = {}
        key = tuple(literal(a, leaves, names[min(i, len(names) - 1)]) for i, a in enumerate(args))
        if key not in graphs:
            graphs[key] = _graph(fn, key, len(leaves), jit_level, bound)
        graph, number = graphs[key]
        flat, outline = runner(Graph(fn.__name__, number, key, graph), tuple(tensor for _, tensor, _ in leaves.values()))
        return _restore(outline, iter(flat))

    return call


def _graph(fn: Callable, literals: tuple[str, ...], n_leaves: int, jit_level: str,
           bound: Bound | None) -> tuple[Callable, int]:
    ms.set_recursion_limit(RECURSION_LIMIT)
    first, parameters = (bound.literals, bound.parameters) if bound else ((), {})
    number, sep = next(_numbers), ",\n"  # one leaf a line: MindSpore complains of lines longer than its buffer
    graph = generated(f"def graph({sep.join(f'a{i}' for i in range(n_leaves))}):\n"
                      f"    out = fn({', '.join(first + literals)})\n"
                      f"    note({number}, outline(out))\n"
                      f"    return flatten(out)\n",
                      {"fn": fn, "note": _note, "outline": _outline, "flatten": flatten} | parameters)
    return ms.jit(graph, jit_level=jit_level), number


def compiled(fn: Callable) -> Callable:
    """Make ``fn(*pytrees, **static)`` callable from anywhere: compiled when called from Python, once per set of static
    keywords (hashable: a Config, functions, bools), and inlined when called from a function given to ``jit``.
    """
    host: dict[tuple, Callable] = {}
    parameters = tuple(p for p in inspect.signature(fn).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)

    def from_python(args: tuple, static: dict) -> Any:
        rest = parameters[len(args):]
        by_name = {p.name: static.pop(p.name) for p in rest if p.name in static}
        for p in rest:  # graph code gets positional arguments only
            if p.name not in by_name and p.default is p.empty:
                raise TypeError(f"{fn.__name__}: the argument {p.name!r} is missing")
            if not by_name:
                break
            args = (*args, by_name.pop(p.name, p.default))
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
    in_graph = ms.value_and_grad(fn, 0, None, has_aux)

    def grad_fn(*args):
        return in_graph(*args)

    from_python = jit(grad_fn)

    def call(*args):
        if _inside():
            return in_graph(*args)
        return from_python(*args)

    call.__name__, call.__doc__ = f"value_and_grad_{fn.__name__}", fn.__doc__  # no __wrapped__: graph code would call fn
    return call
