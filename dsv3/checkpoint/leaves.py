"""Leaves of params on their way to and from a file: types, exact bytes, conversions, checks of a tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.common.np_dtype import bfloat16

from ..config import Config
from ..kernels import cast
from ..model import param_specs
from ..spec import is_spec
from ..tree import paths
from .safetensors_io import DTYPES

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what params may be stored in
_OF_TENSOR = {
    "Float32": "F32",
    "BFloat16": "BF16",
    "Float16": "F16",
    "Float64": "F64",
    "Int64": "I64",
    "Int32": "I32",
    "Int16": "I16",
    "Int8": "I8",
    "UInt64": "U64",
    "UInt32": "U32",
    "UInt16": "U16",
    "UInt8": "U8",
    "Bool": "BOOL",
}
_OF_ARRAY = {DTYPES[name]: name for name in _OF_TENSOR.values() if name != "BF16"}
_TO_TENSOR = {"BF16": ms.bfloat16}
CHUNK = 1 << 24  # elements converted at once: bounds what a conversion holds beside its result


def float_dtype(dtype: str) -> str:
    """ "float32" -> "F32" and so on. Raises ValueError listing what params may be stored in."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(FLOATS)}")
    return FLOATS[dtype]


def dtype_of(leaf: Any, path: str = "leaf") -> str:
    """The file type, such as "BF16", of a Tensor, NumPy array or scalar. Raises ValueError for any other."""
    if isinstance(leaf, Tensor) and str(leaf.dtype) in _OF_TENSOR:
        return _OF_TENSOR[str(leaf.dtype)]
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype in _OF_ARRAY:
        return _OF_ARRAY[leaf.dtype]
    raise ValueError(
        f"{path}: cannot store a {type(leaf).__name__} of type {getattr(leaf, 'dtype', None)}; expected a "
        f"Tensor or NumPy array of {', '.join(_OF_TENSOR)}"
    )


def host(leaf: Any) -> np.ndarray:
    """Values of a leaf on the host, in C order; bfloat16 as uint16 bits. A view where possible."""
    if not isinstance(leaf, Tensor):
        return np.asarray(leaf, order="C")
    values = np.asarray(leaf.asnumpy(), order="C")
    return values.view(np.uint16) if leaf.dtype == ms.bfloat16 else values


def tensor(array: np.ndarray, dtype: str) -> Tensor:
    """A Tensor with memory of its own from values of a file type ("BF16": uint16 bits), bit for bit."""
    return adopt(np.array(array, order="C"), dtype)


def adopt(array: np.ndarray, dtype: str) -> Tensor:
    """A Tensor that takes over the memory of a C-contiguous array, which nothing else may use any more."""
    return Tensor.from_numpy(array.view(bfloat16) if dtype == "BF16" else array)


def _by_columns(array: np.ndarray) -> bool:
    return array.ndim == 2 and array.strides[0] == array.itemsize and array.strides[1] > array.itemsize


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order: itself if it is, else a copy."""
    return cast.transpose(array.T) if _by_columns(array) else np.ascontiguousarray(array)


# -- conversions between F32, BF16 and F16 ---------------------------------------------------------------
def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16 bits, rounded to nearest, ties to even; NaN stays NaN."""
    return cast.narrow(np.asarray(x, np.float32))


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 bits -> float32, exact."""
    return cast.widen(np.asarray(bits))


def convert(array: np.ndarray, source: str, target: str, path: str, *, transposed: bool = False) -> np.ndarray:
    """Values of F32, BF16 or F16 as another of them, rounded to nearest even. ``path`` is for errors.

    transposed: [m, n] -> [n, m]. A view when the type stays; ``contiguous`` makes it one in C order.

    Raises ValueError for any other type, and when a finite value does not fit into float16.
    """
    for dtype in (source, target):
        if dtype not in FLOATS.values():
            raise ValueError(f"{path}: is stored as {dtype}; expected one of {', '.join(FLOATS.values())}")
    if source == target:
        return array.T if transposed else array
    if _by_columns(array):
        array, transposed = array.T, not transposed
    if {source, target} == {"BF16", "F32"}:
        return (cast.widen if source == "BF16" else cast.narrow)(array, transposed=transposed)
    array = cast.transpose(array) if transposed else array
    out = np.empty(array.shape, DTYPES[target])
    flat_in, flat_out = np.asarray(array, order="C").reshape(-1), out.reshape(-1)
    for i in range(0, flat_in.size, CHUNK):
        part = flat_in[i : i + CHUNK]
        values = bf16_values(part) if source == "BF16" else part.astype(np.float32, copy=False)
        if target == "F16":
            with np.errstate(over="ignore"):
                narrow = values.astype(np.float16)
            if np.any(np.isinf(narrow) & np.isfinite(values)):
                raise ValueError(
                    f"{path}: holds {np.abs(values[np.isfinite(values)]).max():g}, beyond float16's 65504; "
                    f"choose bfloat16 or float32"
                )
            values = narrow
        flat_out[i : i + CHUNK] = bf16_bits(values) if target == "BF16" else values
    return out


# -- trees -----------------------------------------------------------------------------------------------
def listed(names: Any, most: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_names(where: str, found: Any, expected: Any) -> None:
    """Raises ValueError naming what is missing and what is unexpected."""
    found, expected = dict.fromkeys(found), dict.fromkeys(expected)
    missing, unexpected = [n for n in expected if n not in found], [n for n in found if n not in expected]
    if missing or unexpected:
        what = [
            f"{word} {len(names)} ({listed(names)})"
            for word, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(f"{where}: of {len(expected)} tensors {'; '.join(what)}")


def check_params(params: Any, cfg: Config) -> dict[str, Any]:
    """{path: leaf} of params, in order; names, shapes and types are checked against ``param_specs(cfg)``."""
    specs = dict(paths(param_specs(cfg), is_spec))
    leaves = dict(paths(params))
    check_names("params do not fit the config", leaves, specs)
    for path, spec in specs.items():
        if tuple(leaves[path].shape) != spec.shape:
            raise ValueError(
                f"params: {path} has shape {tuple(leaves[path].shape)}; the config asks for {spec.shape}"
            )
        dtype = dtype_of(leaves[path], path)
        allowed = [FLOATS[spec.dtype]] if spec.dtype else list(FLOATS.values())
        if dtype not in allowed:
            raise ValueError(f"params: {path} is {dtype}; expected {' or '.join(allowed)}")
    return {path: leaves[path] for path in specs}


def common_dtype(dtypes: Mapping[str, str]) -> str | None:
    """The one type of {path: file type}, by its long name ("bfloat16"), or None if there are several."""
    kinds = set(dtypes.values())
    return {v: k for k, v in FLOATS.items()}.get(kinds.pop()) if len(kinds) == 1 else None
