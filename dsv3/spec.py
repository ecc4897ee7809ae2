"""Declaration of a parameter: shape, logical axes and initialiser on one line; counts without allocation."""
from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from .tree import paths

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
AT_ONCE = 1 << 20  # numbers drawn together


@dataclass(frozen=True)
class Init:
    """How a leaf starts: normal(0, std), or the constant ``value`` when std is 0."""

    std: float = 0.0
    value: float = 0.0


def normal(std: float) -> Init:
    """Gaussian of mean 0 and standard deviation ``std``."""
    return Init(std=std)


ones = Init(value=1.0)
zeros = Init(value=0.0)


@dataclass(frozen=True)
class ParamSpec:
    """One leaf: its logical shape, a logical axis name (or None) per dim, its initialiser, and a dtype it insists on."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    dtype: str | None = None  # None: follows the model's dtype

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} has {len(self.shape)} dims but axes {self.axes} name {len(self.axes)}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def nbytes(self, dtype: str = "bfloat16") -> int:
        """Bytes of the leaf when the model is stored in ``dtype``."""
        return self.size * DTYPES[self.dtype or dtype]


def is_spec(x: Any) -> bool:
    """Leaf test for trees of ParamSpec."""
    return isinstance(x, ParamSpec)


def is_state(path: str) -> bool:
    """Leaves that no gradient moves: the router's choice bias has a rule of its own."""
    return path.endswith("router.bias")


def count(specs: Any) -> int:
    """Parameters declared by a tree of ParamSpec; nothing is allocated."""
    return sum(spec.size for _, spec in paths(specs, is_spec))


def draw(spec: ParamSpec, path: str, seed: int, where: tuple[slice, ...] | None = None) -> np.ndarray:
    """The initial float32 value of one leaf. It depends on the seed and the path alone, not on the rest of the model.

    where: a part of it, a slice with both ends for each dim. The leaf is drawn up to there, but never held.
    """
    where = where or tuple(slice(0, n) for n in spec.shape)
    out = np.full([s.stop - s.start for s in where], spec.init.value, np.float32)
    if spec.init.std == 0.0:
        return out
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    first, inner = where[0], int(np.prod(spec.shape[1:], dtype=np.int64))
    step = max(1, AT_ONCE // max(inner, 1))
    for start in range(0, first.stop, step):  # one stream, in pieces
        rows = rng.standard_normal((min(step, first.stop - start), *spec.shape[1:]), np.float32)
        lo = max(first.start - start, 0)
        if lo < len(rows):
            at = start + lo - first.start
            np.multiply(rows[(slice(lo, None), *where[1:])], np.float32(spec.init.std), out=out[at:at + len(rows) - lo])
    return out
