"""What each primitive of an exported program computes, in NumPy: the table that ``lockstep`` looks them up in.

``PRIMITIVES[name](node, *inputs)``: inputs are arrays, tuples of arrays, or plain numbers, tuples and None, as the program
has them; node.attrs are the primitive's attributes; node.type is the recorded type of the result, to which the caller rounds
and whose shape it checks, so that no function here needs to think of dtypes. Meanings are those of MindSpore 2.10's
primitives of the same names, found in its documentation and by running them.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .lockstep_fused import FUSED


def _ints(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in np.asarray(value).reshape(-1)) if value is not None else ()


def _int(value: Any) -> int:
    return int(np.asarray(value).reshape(-1)[0])


def _given(node: Any, x: tuple, i: int, name: str, default: Any = None) -> Any:
    """An argument that is input ``i`` of newer programs and attribute ``name`` of older ones."""
    return x[i] if i < len(x) else node.attrs.get(name, default)


# -- products, reductions ----------------------------------------------------------------------------------------------
def _matmul(node, a, b, *flags):
    left = _given(node, flags, 0, "transpose_a", _given(node, (), 0, "transpose_x1", False))
    right = _given(node, flags, 1, "transpose_b", _given(node, (), 0, "transpose_x2", False))
    return np.matmul(a.swapaxes(-1, -2) if left else a, b.swapaxes(-1, -2) if right else b)


def _grouped_matmul(node, x, w, *rest):
    """GroupedMatmulV4 of one tensor each: group_type 0, rows of x in groups; 2, the inner dim in groups (the gradient of w).
    int8 weights are widened with antiquant_scale and -offset, or their products with scale and pre_token_scale."""
    (x,), (w,), (groups, (split, kind, as_counts)) = x, w, (rest[6], map(_int, rest[10:13]))
    scale, widening, shift, token = (rest[i] and rest[i][0] for i in (1, 3, 4, 5))
    if widening is not None:
        w = (w + shift[:, None]) * widening[:, None]
    if split != 3 or kind not in (0, 2):
        raise ValueError(f"split_item={split}, group_type={kind}: expected 3, and 0 or 2, as the model's programs have")
    ends = np.cumsum(groups) if as_counts else np.asarray(groups)
    if np.any(np.diff(ends, prepend=0) < 0) or ends[-1] > x.shape[1 if kind else 0]:
        raise IndexError(f"the groups end at {ends.tolist()}, of {x.shape[1 if kind else 0]} rows")
    if kind:
        return (np.stack([a @ b for a, b in zip(np.split(x, ends, 1), np.split(w, ends))][:len(ends)]),)
    out = np.full((x.shape[0], w.shape[2]), np.nan, np.float32)  # what follows the last group is undefined
    for start, end, matrix in zip((0, *ends), ends, w):
        out[start:end] = x[start:end].astype(np.float32) @ matrix.astype(np.float32)
    if scale is not None:
        out *= scale[np.searchsorted(ends, np.arange(len(out)), "right").clip(max=len(ends) - 1)] * token[:, None]
    return (out,)


def _reduction(function: Callable) -> Callable:
    def reduce(node, x, *rest):
        dims = _ints(_given(node, rest, 0, "axis")) or None
        if dims is None and _given(node, rest, 2, "skip_mode", False) is True:
            return x
        return function(x, axis=dims, keepdims=bool(_given(node, rest, 1, "keep_dims", False)))
    return reduce


def _arg_with_value(pick: Callable) -> Callable:
    def arg(node, x, *rest):
        dim = _int(_given(node, rest, 0, "axis", 0))
        index = np.expand_dims(pick(x, axis=dim), dim)
        value = np.take_along_axis(x, index, dim)
        return (index, value) if _given(node, rest, 1, "keep_dims", False) else (index.squeeze(dim), value.squeeze(dim))
    return arg


def _arg(pick: Callable) -> Callable:
    return lambda node, x, dim=None, keep=False, *rest: pick(x, axis=None if dim is None else _int(dim), keepdims=bool(keep))


def _cumsum(node, x, dim, exclusive=False, reverse=False):
    dim = _int(dim)
    x = np.flip(x, dim) if reverse is True else x
    total = np.cumsum(x, dim, dtype=x.dtype) - (x if exclusive is True else 0)
    return np.flip(total, dim) if reverse is True else total


def _softmax(node, x, dim=None):
    dim = _int(node.attrs.get("axis", -1) if dim is None else dim)
    e = np.exp(x - x.max(dim, keepdims=True))
    return e / e.sum(dim, keepdims=True)


def _log_softmax(node, x, dim=None):
    dim = _int(node.attrs.get("axis", -1) if dim is None else dim)
    x = x - x.max(dim, keepdims=True)
    return x - np.log(np.exp(x).sum(dim, keepdims=True))


def _softmax_backward(node, dout, out, dim=-1):
    return out * (dout - (dout * out).sum(_int(dim), keepdims=True))


def _rms_norm(node, x, gain, eps=1e-6):
    inverse = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
    return x * inverse * gain, inverse


def _rms_norm_grad(node, dout, x, inverse, gain):
    normal, scaled = x * inverse, dout * gain
    dx = inverse * (scaled - normal * (scaled * normal).mean(-1, keepdims=True))
    return dx, (dout * normal).reshape(-1, x.shape[-1]).sum(0)


# -- order -------------------------------------------------------------------------------------------------------------
def _sort(node, x, *rest):
    dim, descending = _int(_given(node, rest, 0, "axis", -1)), bool(_given(node, rest, 1, "descending", False))
    order = _order(x, dim, descending)
    return np.take_along_axis(x, order, dim), order


def _top_k(node, x, k, dim=-1, largest=True, is_sorted=True):
    dim = _int(dim)
    index = np.take(_order(x, dim, bool(largest)), np.arange(_int(k)), dim)
    return np.take_along_axis(x, index, dim), index


def _order(x: np.ndarray, dim: int, descending: bool) -> np.ndarray:
    """Stable argsort: of equal elements the first comes first, in both directions."""
    if not descending:
        return np.argsort(x, dim, kind="stable")
    return x.shape[dim] - 1 - np.flip(np.argsort(np.flip(x, dim), dim, kind="stable"), dim)


# -- gather, scatter ---------------------------------------------------------------------------------------------------
def _gather(node, x, index, dim, batch_dims=0):
    index = np.asarray(index)
    if _int(batch_dims):
        raise ValueError(f"batch_dims={batch_dims}: expected 0, the only form that the model's programs have")
    _within(index, x.shape[_int(dim)])
    return np.take(x, index, _int(dim))


def _within(index: np.ndarray, size: int) -> None:
    if index.size and not 0 <= index.min() <= index.max() < size:
        raise IndexError(f"indices from {index.min()} to {index.max()} into {size} rows: a device would read at random")


def _gather_dim_grad(node, x, dim, index, dout):
    dim, out = _int(dim), np.zeros(x.shape, dout.dtype)
    at = list(np.indices(index.shape, sparse=True))
    at[dim] = index
    np.add.at(out, tuple(at), dout)
    return out


def _unsorted_segment_sum(node, x, index, count):
    out = np.zeros((_int(count), *x.shape[index.ndim :]), x.dtype)
    flat, rows = index.reshape(-1), x.reshape((-1, *x.shape[index.ndim :]))
    _within(flat[flat >= 0], len(out))
    np.add.at(out, flat[flat >= 0], rows[flat >= 0])  # rows of negative segments are dropped
    return out


def _scatter_nd(node, index, update, shape):
    out = np.zeros(_ints(shape), update.dtype)
    np.add.at(out, tuple(np.moveaxis(index, -1, 0)), update)
    return out


def _gather_nd(node, x, index):
    _within(index[..., 0], x.shape[0])
    return x[tuple(np.moveaxis(index, -1, 0))]


def _shape_calc(node, x, other):
    """What gradients ask of shapes that the data decide, told apart by their inputs: of Gather, how many rows there were; of
    Concat, where its parts begin; of broadcast operands, the dims over which each one's gradient is summed."""
    if isinstance(x, tuple):
        dim, ends = _int(other), np.cumsum([part.shape[_int(other)] for part in x])
        return tuple(tuple(int(end) - part.shape[dim] if i == dim else 0 for i in range(part.ndim)) for part, end in zip(x, ends))
    if np.ndim(other) == 0:
        return (x.shape[_int(other)],)
    if x.ndim != other.ndim:
        raise ValueError(f"broadcasts {list(x.shape)} with {list(other.shape)}: expected as many dims")
    return tuple(np.flatnonzero([n == 1 != m for n, m in zip(a.shape, b.shape)]) for a, b in ((x, other), (other, x)))


def _tensor_scatter_add(node, x, index, update):
    out = x.copy()
    np.add.at(out, tuple(np.moveaxis(index, -1, 0)), update)
    return out


def _one_hot(node, index, depth, on=1, off=0, dim=-1):
    hot = index[..., None] == np.arange(_int(depth))
    return np.moveaxis(np.where(hot, on, off), -1, _int(dim))


# -- shape -------------------------------------------------------------------------------------------------------------
def _window(node, shape: tuple[int, ...], begin, end, strides, *masks) -> tuple[slice, ...]:
    names = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    begin_mask, end_mask, *others = (_int(_given(node, masks, i, name, 0)) for i, name in enumerate(names))
    if any(others[:2]):
        raise ValueError(f"ellipsis_mask={others[0]}, new_axis_mask={others[1]}: expected 0, as the model's programs have")
    window = []
    for i, (b, e, s) in enumerate(zip(_ints(begin), _ints(end), _ints(strides))):
        if others[2] >> i & 1:  # one element; the caller drops the dim by reshaping
            b, e, s = b % shape[i], b % shape[i] + 1, 1
        else:
            b, e = None if begin_mask >> i & 1 else b, None if end_mask >> i & 1 else e
        window.append(slice(b, e, s))
    return tuple(window)


def _strided_slice(node, x, *where):
    return x[_window(node, x.shape, *where)].reshape(node.type.shape)


def _strided_slice_grad(node, dout, shape, *where):
    out = np.zeros(_ints(shape), dout.dtype)
    part = out[_window(node, out.shape, *where)]
    part[...] = dout.reshape(part.shape)
    return out


def _slice(node, x, begin, size):
    return x[tuple(slice(b, None if n == -1 else b + n) for b, n in zip(_ints(begin), _ints(size)))]


def _slice_ext(node, x, dim, start, end, step=1):
    return x[(slice(None),) * (_int(dim) % x.ndim) + (slice(_int(start), _int(end), _int(step)),)]


def _split_with_size(node, x, sizes, dim=0):
    return tuple(np.split(x, np.cumsum(_ints(sizes))[:-1], _int(dim)))


def _split(node, x, *rest):
    return tuple(np.split(x, _int(_given(node, rest, 1, "output_num", 1)), _int(_given(node, rest, 0, "axis", 0))))


def _concat(node, parts, *rest):
    if not isinstance(parts, tuple):  # older programs list the parts as inputs
        parts, rest = (parts, *rest), ()
    return np.concatenate(parts, _int(_given(node, rest, 0, "axis", 0)))


def _stack(node, parts, *rest):
    return np.stack(parts, _int(_given(node, rest, 0, "axis", 0)))


def _triangle(function: Callable) -> Callable:
    return lambda node, x, diagonal=0: function(x, _int(_given(node, (diagonal,), 0, "diagonal", 0)))


# -- elementwise -------------------------------------------------------------------------------------------------------
def _sigmoid(x):
    return np.where(x >= 0, 1, np.exp(-np.abs(x))) / (1 + np.exp(-np.abs(x)))


def _elementwise(function: Callable) -> Callable:
    return lambda node, *x: function(*x)


def _silu_grad(dout, x):
    s = _sigmoid(x)
    return dout * s * (1 + x * (1 - s))


def _swiglu(node, x, dim=-1):
    a, b = np.split(x, 2, _int(dim))
    return a * _sigmoid(a) * b


def _swiglu_grad(node, dout, x, dim=-1):
    a, b = np.split(x, 2, _int(dim))
    return np.concatenate([_silu_grad(dout * b, a), dout * a * _sigmoid(a)], _int(dim))


_erf = np.vectorize(math.erf, otypes=[np.float64])

# Of one or more arrays (or numbers), element by element.
ELEMENTWISE: dict[str, Callable] = {
    "Abs": np.abs, "Add": np.add, "Adds": np.add, "BitwiseAnd": np.bitwise_and, "Ceil": np.ceil, "Cos": np.cos,
    "ClampScalar": lambda x, low=None, high=None: np.clip(x, low, high),
    "ClampTensor": lambda x, low=None, high=None: np.clip(x, low, high),
    "Div": np.true_divide, "Divs": np.true_divide, "Equal": np.equal, "Erf": lambda x: _erf(x), "Exp": np.exp, "Floor": np.floor,
    "FloorDiv": np.floor_divide, "FloorMod": np.mod, "Greater": np.greater, "GreaterEqual": np.greater_equal,
    "IsFinite": np.isfinite, "IsInf": np.isinf, "IsNan": np.isnan, "Less": np.less, "LessEqual": np.less_equal, "Log": np.log,
    "LogicalAnd": np.logical_and, "LogicalNot": np.logical_not, "LogicalOr": np.logical_or,
    "MaskedFill": lambda x, mask, value: np.where(mask, value, x), "Maximum": np.maximum, "Minimum": np.minimum,
    "Mul": np.multiply, "Muls": np.multiply, "Neg": np.negative, "NotEqual": np.not_equal, "Pow": np.power,
    "PowTensorScalar": np.power, "RemainderTensorScalar": np.mod,
    "LessScalar": np.less, "LessEqualScalar": np.less_equal, "GreaterScalar": np.greater, "GreaterEqualScalar": np.greater_equal,
    "EqualScalar": np.equal, "NotEqualScalar": np.not_equal,
    "RealDiv": np.true_divide, "Reciprocal": np.reciprocal, "Round": lambda x, *_: np.rint(x), "Rsqrt": lambda x: 1 / np.sqrt(x),
    "RsqrtGrad": lambda out, dout: dout * out * out * out * np.float32(-0.5), "Select": np.where, "Sigmoid": _sigmoid,
    "SigmoidGrad": lambda out, dout: dout * out * (1 - out), "SiLU": lambda x: x * _sigmoid(x), "SiLUGrad": _silu_grad,
    "Sign": np.sign, "Sin": np.sin, "Softplus": lambda x: np.logaddexp(x, 0), "Sqrt": np.sqrt,
    "SqrtGrad": lambda out, dout: dout / out * np.float32(0.5), "Square": np.square, "Sub": np.subtract, "Subs": np.subtract,
    "Tanh": np.tanh, "TanhGrad": lambda out, dout: dout * (1 - out * out),
    "Cast": lambda x, *_: x, "Identity": lambda x: x, "TensorMove": lambda x: x, "StopGradient": lambda x: x,
    "TensorToScalar": lambda x: x.reshape(()).item(), "ScalarToTensor": lambda x, *_: x, "Contiguous": lambda x: x,
}

PRIMITIVES: dict[str, Callable] = {name: _elementwise(function) for name, function in ELEMENTWISE.items()} | {
    "AddN": lambda node, parts, *more: sum((parts, *more)[1:], parts) if more else sum(parts[1:], parts[0]),
    "ArgMaxWithValue": _arg_with_value(np.argmax), "ArgMinWithValue": _arg_with_value(np.argmin),
    "Argmax": _arg(np.argmax), "ArgMaxExt": _arg(np.argmax), "ArgMinExt": _arg(np.argmin),
    "BatchMatMul": _matmul, "MatMul": _matmul,
    **dict.fromkeys(("MatMulExt", "Mm", "BatchMatMulExt"), lambda node, a, b: np.matmul(a, b)),
    "BroadcastTo": lambda node, x, *_: np.broadcast_to(x, node.type.shape),
    "Concat": _concat, "Stack": _stack, "CumSum": _cumsum, "CumsumExt": lambda node, x, dim, *_: _cumsum(node, x, dim),
    **dict.fromkeys(("ExpandDims", "Squeeze", "Reshape", "View", "Flatten"), lambda node, x, *_: x.reshape(node.type.shape)),
    "Gather": _gather, "GatherDGradV2": _gather_dim_grad,
    **dict.fromkeys(("GatherNd", "GatherNdExt"), _gather_nd), "GroupedMatmulV4": _grouped_matmul, "ShapeCalc": _shape_calc,
    "NonZero": lambda node, x: np.argwhere(x), "Shape": lambda node, x: x.shape,
    "GatherD": lambda node, x, dim, index: np.take_along_axis(x, index, _int(dim)),
    "IndexSelect": lambda node, x, dim, index: _gather(node, x, index, dim),
    "LogSoftmax": _log_softmax, "LogSoftmaxExt": _log_softmax, "OneHot": _one_hot, "OneHotExt": _one_hot,
    "ReduceAll": _reduction(np.all), "ReduceAny": _reduction(np.any), "ReduceMax": _reduction(np.max),
    "ReduceMin": _reduction(np.min), "ReduceMean": _reduction(np.mean), "ReduceSum": _reduction(np.sum),
    "MeanExt": _reduction(np.mean), "SumExt": _reduction(np.sum), "Max": _reduction(np.max), "Min": _reduction(np.min),
    "ProdExt": _reduction(np.prod), "ReduceProd": _reduction(np.prod),
    "RmsNorm": _rms_norm, "RmsNormGrad": _rms_norm_grad, "ScatterNd": _scatter_nd, "TensorScatterAdd": _tensor_scatter_add,
    "Slice": _slice, "SliceExt": _slice_ext, "Softmax": _softmax, "SoftmaxBackward": _softmax_backward,
    "Sort": _sort, "SortExt": _sort, "Split": _split, "SplitWithSize": _split_with_size, "StridedSlice": _strided_slice,
    "StridedSliceGrad": _strided_slice_grad,
    "Swiglu": _swiglu, "SwigluGrad": _swiglu_grad, "Tile": lambda node, x, repeats: np.tile(x, _ints(repeats)),
    "TopK": _top_k, "TopkExt": _top_k, "Transpose": lambda node, x, order: x.transpose(_ints(order)),
    "TransposeExtView": lambda node, x, a, b: x.swapaxes(_int(a), _int(b)),
    "Tril": _triangle(np.tril), "TrilExt": _triangle(np.tril), "Triu": _triangle(np.triu),
    "UnsortedSegmentSum": _unsorted_segment_sum,
    **dict.fromkeys(("ZerosLike", "ZerosLikeExt"), lambda node, x, *_: np.zeros(np.shape(x))),
    "Zeros": lambda node, *_: np.zeros(node.type.shape),
    **dict.fromkeys(("Ones", "OnesLike", "OnesLikeExt"), lambda node, *_: np.ones(node.type.shape)),
    **dict.fromkeys(("FillV2", "FillScalar"), lambda node, shape, value, *_: np.full(node.type.shape, value)),
} | FUSED
