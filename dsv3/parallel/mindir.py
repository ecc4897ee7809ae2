"""A program that MindSpore exported (MindIR) as plain data: graphs of named values, parameters as NumPy arrays.

MindIR is a protocol buffer whose schema ships with MindSpore. What it does not say by itself: a node's ``op_type`` is "REF::"
and the name of a primitive of the model's list, of a function, or of a value that is a function; nodes stand in an order in
which they can run, side effects included; the attribute "shape" of a node is its result's type; a primitive that is a
function takes as inputs what older ones keep as attributes.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels import cast

# MindIR's numbers of types -> the NumPy type that holds them here; float16 and bfloat16 are float32, rounded.
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float32",
          11: "float64", 12: "uint32", 13: "uint64", 16: "float32", 17: "float64"}
FLOAT16, BFLOAT16 = 10, 16


@dataclass(frozen=True)
class Type:
    """A tensor's shape and its dtype as MindIR's number."""

    shape: tuple[int, ...]
    dtype: int


@dataclass(frozen=True)
class Node:
    """One application of a primitive or a function to values, by name. type: of the result as recorded; None: not a tensor."""

    name: str
    op: str  # primitive, or "call" of the first input with the others
    inputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    type: Any
    last: tuple[str, ...] = ()  # names that nobody reads after this node


@dataclass(frozen=True)
class Graph:
    """A function: names of its inputs, nodes in an order in which they can run, name of its result."""

    name: str
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    result: str


@dataclass(frozen=True)
class Program:
    """One rank's program. params: name -> array, this rank's part of each; ``run`` replaces what the program assigns."""

    rank: int
    graph: Graph
    functions: Mapping[str, Graph]
    constants: Mapping[str, Any]  # of all graphs
    types: Mapping[str, Type]  # of inputs, by their order, and of params
    params: dict[str, np.ndarray]
    refs: Mapping[str, str]  # name in the graph -> name of the param
    results: tuple[Type, ...] = ()  # of the tensors in a flat result, when recorded


def load(path: str | Path, rank: int, known: Set[str]) -> Program:
    """Read the exported program of ``rank``. Raises ValueError naming the nodes whose primitive is not ``known``."""
    from mindspore.train import mind_ir_pb2

    model = mind_ir_pb2.ModelProto()
    model.ParseFromString(Path(path).read_bytes())
    attributes = mind_ir_pb2.AttributeProto.AttributeType
    primitives = {p.name: (p.op_type, {a.name: _value(a, attributes) for a in p.attribute}) for p in model.primitives}
    protos = (model.graph, *model.functions)
    # A constant stands in the graph that was written first among those that use it: constants belong to the program.
    constants = {n.output[0]: _value(n.attribute[0], attributes) for g in protos for n in g.node if n.op_type == "Constant"}
    if len(constants) != sum(n.op_type == "Constant" for g in protos for n in g.node):
        raise ValueError(f"{path}: two constants have the same name")
    graphs = [_graph(g, primitives, attributes) for g in protos]
    unknown = [f"{n.name} = {n.op}" for g in graphs for n in g.nodes if n.op not in known | {"call"}]
    if unknown:
        raise ValueError(f"{path}, rank {rank}: lockstep_ops has no meaning for {len(unknown)} nodes: {'; '.join(unknown[:20])}")
    types, params, refs = {}, {}, {}
    for tensor in model.graph.parameter:
        name = tensor.ref_key or tensor.name.split(":", 1)[1]
        if tensor.HasField("external_data"):
            raise ValueError(f"{path}: the values of {name} are in another file; lockstep reads programs below 1 GiB")
        refs[tensor.name], types[name] = name, Type(tuple(tensor.dims), tensor.data_type)
        params[name] = _tensor(tensor)
    for i, value in enumerate(model.graph.input):
        types[str(i)] = Type(tuple(value.tensor[0].dims), value.tensor[0].data_type)
    flat = _type(model.graph.output[0].attr_info, attributes) if model.graph.output[0].HasField("attr_info") else ()
    results = tuple(t for t in flat if isinstance(t, Type)) if isinstance(flat, tuple) else ()
    return Program(rank, graphs[0], {g.name: g for g in graphs[1:]}, constants, types, params, refs, results)


def _graph(proto: Any, primitives: dict, attributes: Any) -> Graph:
    nodes = []
    for n in proto.node:
        recorded = next((a for a in n.attribute if a.name == "shape"), None)
        kind = None if recorded is None else _type(recorded, attributes)
        called = n.op_type.removeprefix("REF::")
        if n.op_type == "Constant":
            continue
        if called in primitives:
            op, attrs = primitives[called]
            node = Node(n.output[0], op, tuple(n.input), attrs, kind)
        else:  # a function, or a value that is one
            node = Node(n.output[0], "call", (called, *n.input), {}, kind)
        nodes.append(node)
    result, seen, done = proto.output[0].name, {proto.output[0].name}, []
    for node in reversed(nodes):  # what is read here for the last time can go
        done.append(Node(node.name, node.op, node.inputs, node.attrs, node.type, tuple(set(node.inputs) - seen)))
        seen.update(node.inputs)
    return Graph(proto.name, tuple(i.name for i in proto.input), tuple(reversed(done)), result)


def _tensor(proto: Any) -> np.ndarray:
    raw = {FLOAT16: "float16", BFLOAT16: "uint16"}.get(proto.data_type, DTYPES.get(proto.data_type))
    if raw is None:
        raise ValueError(f"tensor {proto.name}: type {proto.data_type} is not supported")
    array = np.frombuffer(proto.raw_data, raw)
    if array.size > math.prod(proto.dims) and np.all(array == array[0]):  # exported whole: moments of zeros
        array = array[: math.prod(proto.dims)]
    array = array.reshape(tuple(proto.dims))
    if proto.data_type == BFLOAT16:
        return cast.widen(array)
    return array.astype(DTYPES[proto.data_type])


def _value(a: Any, attributes: Any) -> Any:
    """A constant or an attribute as a Python value; None for what has no value, such as the tokens that order side effects."""
    kind = attributes.Name(a.type)
    if kind in ("TUPLE", "LIST"):
        return tuple(_value(v, attributes) for v in a.values)
    if kind == "TENSORS":
        return _tensor(a.tensors[0]) if a.tensors[0].raw_data or 0 in a.tensors[0].dims else None
    if kind == "STRING":
        return (a.s or (a.strings[0] if a.strings else b"")).decode()
    if kind == "BOOL":
        return bool(a.ints[0] if a.ints else a.i)
    if kind in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"):
        single, several = (a.d, a.doubles) if kind == "DOUBLE" else (a.f, a.floats)
        return several[0] if several else single
    if kind.startswith(("INT", "UINT")):
        return int(a.ints[0] if a.ints else a.i)
    return None


def _type(a: Any, attributes: Any) -> Any:
    kind = attributes.Name(a.type)
    if kind == "TENSORS":
        return Type(tuple(a.tensors[0].dims), a.tensors[0].data_type)
    return tuple(_type(v, attributes) for v in a.values) if kind in ("TUPLE", "LIST") else None


def conform(value: Any, kind: Any) -> Any:
    """``value`` in the recorded type. Raises ValueError when its shape is another; a size of -1 was not known before."""
    if isinstance(kind, tuple) and isinstance(value, tuple):
        if len(kind) != len(value):
            raise ValueError(f"gives {len(value)} results where the program records {len(kind)}")
        return tuple(map(conform, value, kind))
    if not isinstance(kind, Type) or value is None:
        return value
    array = np.asarray(value)
    if array.ndim != len(kind.shape) or any(n not in (-1, found) for n, found in zip(kind.shape, array.shape)):
        raise ValueError(f"gives shape {list(array.shape)} where the program records {list(kind.shape)}")
    return _rounded(array.astype(DTYPES[kind.dtype], copy=False), kind.dtype)


def _rounded(array: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == FLOAT16:
        return array.astype(np.float16).astype(np.float32)
    if dtype == BFLOAT16:
        return cast.widen(cast.narrow(np.ascontiguousarray(array)))
    return array
