"""A checkpoint's layout as data: which tensors lie in which files, and which pieces of published tensors they are.

One description serves both directions. Writing puts a stored tensor together from its chunks; reading finds every place
of a published tensor (``locate``) and puts it together again. A layout is a function of a config and some options that
returns a tuple of ``StoredFile``; the common currency of all layouts is the published tensor of ``names.published``.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

EVERYTHING = slice(None)
PIECE = 1 << 23  # elements that are read, converted and written at once


@dataclass(frozen=True, eq=False)
class Part:
    """Rows and columns of a published tensor (``name``, ``shape``; 1-D or 2-D, [out, in]), transposed or not.

    rows and cols are slices of step 1, or for rows an array of distinct indices, in the order wanted. ``field`` says what
    of the tensor: its "values", or of an FP8 one its "codes" or its "scales" (whose ``shape`` is theirs).
    """

    name: str
    shape: tuple[int, ...]
    rows: slice | np.ndarray = dataclasses.field(default_factory=lambda: EVERYTHING)  # Python < 3.12: a slice is unhashable,
    cols: slice = dataclasses.field(default_factory=lambda: EVERYTHING)  # so no dataclass takes it as a default
    transposed: bool = False
    field: str = "values"

    @cached_property
    def taken(self) -> tuple[int, ...]:
        """Shape of what ``take`` returns."""
        n = len(range(self.shape[0])[self.rows]) if isinstance(self.rows, slice) else len(self.rows)
        if len(self.shape) == 1:
            return (n,)
        m = len(range(self.shape[1])[self.cols])
        return (m, n) if self.transposed else (n, m)

    @property
    def whole(self) -> bool:
        """Whether this is the whole tensor in its own order."""
        return isinstance(self.rows, slice) and int(np.prod(self.taken)) == int(np.prod(self.shape))

    def take(self, values: np.ndarray) -> np.ndarray:
        """The part of a published tensor; a view unless rows are an array."""
        part = values[self.rows]
        if len(self.shape) == 1:
            return part
        return part[:, self.cols].T if self.transposed else part[:, self.cols]

    def put(self, out: np.ndarray, part: np.ndarray) -> None:
        """Write what ``take`` returned to its place in a published tensor."""
        if len(self.shape) == 1:
            out[self.rows] = part
        else:
            out[self.rows, self.cols] = part.T if self.transposed else part


@dataclass(frozen=True, eq=False)
class Chunk:
    """A contiguous run of a stored tensor: parts joined along ``axis``, in C order."""

    parts: tuple[Part, ...]
    axis: int = 0

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the joined parts."""
        shape = list(self.parts[0].taken)
        shape[self.axis] = sum(p.taken[self.axis] for p in self.parts)
        return tuple(shape)

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a file: its chunks, one after another, read as ``shape``.

    dtype is its file type ("F32") when that is fixed, None when it is the type that the checkpoint is stored in.
    """

    name: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    dtype: str | None = None

    def __post_init__(self) -> None:
        if sum(c.size for c in self.chunks) != int(np.prod(self.shape, dtype=np.int64)):
            raise ValueError(f"{self.name}: chunks of {[c.shape for c in self.chunks]:.200} do not fill {list(self.shape)}")


@dataclass(frozen=True, eq=False)
class StoredFile:
    """A file of a checkpoint: its path inside the folder, with forward slashes, and its tensors."""

    path: str
    tensors: tuple[Stored, ...]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a part is stored: the file, the tensor, the first element of the chunk in it, and where in the chunk."""

    file: str
    tensor: str
    start: int
    chunk: Chunk
    at: tuple[slice, ...]
    part: Part


def one(name: str, part: Part, *, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> Stored:
    """A stored tensor that is a single part."""
    return Stored(name, shape or part.taken, (Chunk((part,)),), dtype)


def joined(name: str, parts: Iterable[Part], axis: int = 0, *, dtype: str | None = None) -> Stored:
    """A stored tensor of parts joined along an axis."""
    chunk = Chunk(tuple(parts), axis)
    return Stored(name, chunk.shape, (chunk,), dtype)


def stacked(name: str, chunks: Iterable[Chunk], shape: tuple[int, ...] | None = None) -> Stored:
    """A stored tensor of equal chunks under a new leading dimension, or read as ``shape``."""
    chunks = tuple(chunks)
    return Stored(name, shape or (len(chunks), *chunks[0].shape), chunks)


def locate(files: Iterable[StoredFile]) -> dict[tuple[str, str], tuple[tuple[Place, ...], ...]]:
    """{(published name, field): for each different part of it, all the places that hold it}.

    Several places of one part are replicas (norms on every tensor-parallel rank). Raises ValueError when the parts of a
    tensor do not cover it exactly.
    """
    found: dict[tuple[str, str], dict[tuple, list[Place]]] = {}
    for file in files:
        for stored in file.tensors:
            start = 0
            for chunk in stored.chunks:
                at = 0
                for part in chunk.parts:
                    n = part.taken[chunk.axis]
                    where = (EVERYTHING,) * chunk.axis + (slice(at, at + n),)
                    place = Place(file.path, stored.name, start, chunk, where, part)
                    found.setdefault((part.name, part.field), {}).setdefault(_region(part), []).append(place)
                    at += n
                start += chunk.size
    for (name, field), regions in found.items():
        first = next(iter(regions.values()))[0].part
        covered = sum(int(np.prod(places[0].part.taken, dtype=np.int64)) for places in regions.values())
        if covered != int(np.prod(first.shape, dtype=np.int64)):
            raise ValueError(f"the files hold {covered} elements of {name!r} ({field}), which has {list(first.shape)}")
    return {key: tuple(tuple(places) for places in regions.values()) for key, regions in found.items()}


def _region(part: Part) -> tuple:
    """What distinguishes a part of a tensor from another part of the same tensor. The parts of one do not overlap otherwise."""
    rows = part.rows
    begin = rows.indices(part.shape[0])[:2] if isinstance(rows, slice) else tuple(rows[[0, -1]].tolist())
    return begin, part.cols.indices(part.shape[1])[:2] if len(part.shape) > 1 else None


def cut(chunk: Chunk, most: int) -> Iterator[Chunk]:
    """A chunk cut into consecutive smaller ones of about ``most`` elements, where it is made of rows."""
    if chunk.size <= most or (len(chunk.parts) > 1 and chunk.axis):
        yield chunk
        return
    for part in chunk.parts:
        size = int(np.prod(part.taken, dtype=np.int64))
        n = part.taken[0]
        if part.field != "values" or size <= most or not isinstance(part.rows, slice):
            yield Chunk((part,))
            continue
        step = max(1, most * n // size)
        step = step // 128 * 128 or step  # whole blocks of FP8
        dim = 1 if part.transposed else 0
        start = (part.rows, part.cols)[dim].indices(part.shape[dim])[0]
        for i in range(0, n, step):
            run = slice(start + i, start + min(i + step, n))
            yield Chunk((dataclasses.replace(part, cols=run) if dim else dataclasses.replace(part, rows=run),))


def assemble(chunk: Chunk, read: Callable[[Part], np.ndarray]) -> np.ndarray:
    """The chunk from the published tensors that ``read(part)`` returns whole. A view when it is one part taken as it is."""
    taken = [part.take(read(part)) for part in chunk.parts]
    return taken[0] if len(taken) == 1 else np.concatenate(taken, chunk.axis)
