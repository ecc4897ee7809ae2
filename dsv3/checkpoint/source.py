"""A checkpoint opened for reading: any region of any published tensor, from whatever layout it lies in."""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..kernels import cast
from . import fp8, leaves
from .layout import Chunk, Part, Place, Stored, StoredFile, locate, one, stacked
from .leaves import FLOATS
from .names import Published, published
from .safetensors_io import DTYPES
from .shards import Box

FP8 = "F8_E4M3"


@dataclass(frozen=True, eq=False)
class Source:
    """Where every published tensor of ``cfg`` lies, and how to get at the bytes.

    raw(file, tensor) -> (file type, its elements in C order, flat, best a view). ``places`` is that of ``locate``;
    ``aliases`` gives a tensor that the layout does not hold (MTP's copy of the embedding) the one that stands for it.
    where(file, tensor) names a stored tensor in errors. block is that of FP8 scales.
    """

    name: str  # for messages: the folder
    form: str  # hf, own, mcore, mindformers, params
    cfg: Config
    places: Mapping[tuple[str, str], tuple[tuple[Place, ...], ...]]
    raw: Callable[[str, str], tuple[str, np.ndarray]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    block: tuple[int, int] = fp8.BLOCK
    paths: tuple[Path, ...] = ()  # of its files
    notes: str = ""  # what else is to be said of it: a strategy

    def home(self, name: str) -> str:
        """The published name under which a tensor is stored."""
        return self.aliases.get(name, name)

    def places_of(self, name: str, field: str = "values") -> tuple[tuple[Place, ...], ...]:
        """All places of a tensor. Raises ValueError when there is none."""
        if (self.home(name), field) not in self.places:
            raise ValueError(f"{self.name}: tensor {name!r} is missing")
        return self.places[self.home(name), field]

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is stored as FP8 codes with block scales."""
        return (self.home(name), "codes") in self.places

    def kind(self, name: str) -> str:
        """File type of a tensor as stored: "BF16", "F32", ..., or "F8_E4M3"."""
        if self.is_fp8(name):
            return FP8
        place = self.places_of(name)[0][0]
        return self.raw(place.file, place.tensor)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a published tensor."""
        return self.places_of(name, "codes" if self.is_fp8(name) else "values")[0][0].part.shape

    def where(self, name: str, field: str = "values") -> str:
        """The file and the stored name of a tensor, for an error."""
        field = "codes" if field == "values" and self.is_fp8(name) else field
        place = self.places_of(name, field)[0][0]
        return f"{place.file}: tensor {place.tensor!r}"


def open_layout(name: str, form: str, cfg: Config, files: Iterable[StoredFile],
                raw: Callable[[str, str], tuple[str, np.ndarray]], **more: Any) -> Source:
    """A Source of a layout. MTP copies that it does not hold stand for the main embedding and head. Raises ValueError when
    a tensor of the config is not there whole."""
    places = locate(files)
    held = {name for name, _ in places}
    tensors = published(cfg)
    mains = {t.path: t.name for t in tensors if not t.copy}
    aliases = {t.name: mains[t.path] for t in tensors if t.copy and t.name not in held}
    absent = [t.name for t in tensors if not t.copy and t.name not in held]
    if absent:
        raise ValueError(f"{name}: missing {len(absent)} tensors ({leaves.listed(absent)})")
    return Source(name, form, cfg, places, raw, aliases, **more)


def params_source(params: Any, cfg: Config) -> Source:
    """Params as a Source, one leaf on the host at a time. Raises ValueError when they do not fit cfg."""
    found = leaves.check_params(params, cfg)
    kinds = {path: leaves.dtype_of(leaf, path) for path, leaf in found.items()}

    @functools.lru_cache(maxsize=1)  # the experts of one leaf are asked for one after another
    def raw(file: str, path: str) -> tuple[str, np.ndarray]:
        return kinds[path], leaves.host(found[path]).reshape(-1)

    return open_layout("params", "params", cfg, (StoredFile("params", own_tensors(cfg)),), raw)


def own_tensors(cfg: Config) -> tuple[Stored, ...]:
    """Our own layout: a tensor per leaf of params, named by its path; weights [in, out], experts stacked."""
    return tuple(own_tensor(path, tensors) for path, tensors in tensors_by_leaf(cfg).items())


def tensors_by_leaf(cfg: Config) -> dict[str, list[Published]]:
    """The published tensors that each leaf holds, copies left out."""
    out: dict[str, list[Published]] = {}
    for t in published(cfg):
        if not t.copy:
            out.setdefault(t.path, []).append(t)
    return out


def own_tensor(path: str, tensors: list[Published], box: Box | None = None) -> Stored:
    """A leaf as our own layout stores it, or the box of it that a rank does. tensors: the published ones that it holds."""
    t = tensors[0]
    inner = t.shape[::-1] if t.transposed else t.shape
    box = box or ((0, len(tensors)),) * (t.expert is not None) + tuple((0, n) for n in inner)
    index = [slice(*dim) for dim in box[t.expert is not None:]]
    index = index[::-1] if t.transposed else index

    def part(one_of: Published) -> Part:
        return Part(one_of.name, one_of.shape, *index, transposed=one_of.transposed)

    if t.expert is None:
        return one(path, part(t), dtype="F32" if t.float32 else None)
    return stacked(path, (Chunk((part(tensor),)) for tensor in tensors[slice(*box[0])]))


def stored_kind(source: Source) -> str:
    """The file type of all weights, or the config's torch_dtype when they are FP8 or of several types. Raises ValueError."""
    kinds = {source.kind(t.name) for t in published(source.cfg) if not t.float32}
    if len(kinds) == 1 and kinds <= set(FLOATS.values()):
        return kinds.pop()
    raw = source.cfg.to_hf()
    named = raw.get("torch_dtype", raw.get("dtype"))
    if named not in FLOATS:
        raise ValueError(f"{source.name}: the tensors are {', '.join(sorted(kinds))} and torch_dtype in config.json is "
                         f"{named!r}; say dtype='bfloat16' or another of {', '.join(FLOATS)}")
    return FLOATS[named]


# -- reading -----------------------------------------------------------------------------------------------------------
def read(source: Source, part: Part, kind: str, ue8m0: bool = False) -> np.ndarray:
    """What ``part.take`` gives of the published tensor, in the file type ``kind``: a view of the file if it is stored so, else
    a new array (``leaves.contiguous`` for one in C order).

    FP8 is decoded and scaled on the way. With the field "codes" or "scales" the tensor is wanted in FP8, whole: as it is
    stored, or quantised now, in blocks of 128 x 128. ue8m0 makes those scales powers of two.
    """
    if part.field != "values":
        return _quantised(source, part, ue8m0)
    where, rows = source.where(part.name), part.rows
    if not isinstance(rows, slice):  # of the whole rows, then
        part = dataclasses.replace(part, rows=slice(None), transposed=False)
    if source.is_fp8(part.name):
        values = _decoded(source, part, kind)
    else:
        values = leaves.convert(_region(source, part), source.kind(part.name), kind, where, transposed=part.transposed)
    return values if isinstance(rows, slice) else values[rows]


def _quantised(source: Source, part: Part, ue8m0: bool) -> np.ndarray:
    if source.is_fp8(part.name) and source.block == fp8.BLOCK:
        scales = scales_of(source, part.name)
        if not ue8m0 or fp8.are_e8m0(scales):
            return scales if part.field == "scales" else _region(source, part)
    kind = "BF16" if source.kind(part.name) == "BF16" else "F32"
    values = read(source, Part(part.name, source.shape(part.name)), kind)
    if not cast.all_finite(values):
        raise ValueError(f"{source.where(part.name)} holds values that are not finite; FP8 blocks cannot be scaled to them")
    if part.field == "scales":
        return cast.block_scales(values, fp8.BLOCK, ue8m0)
    return cast.quantise(values, fp8.BLOCK, ue8m0=ue8m0)[0]


def read_chunk(source: Source, chunk: Chunk, kind: str, ue8m0: bool = False) -> np.ndarray:
    """A chunk of a stored tensor, put together from its published parts."""
    parts = [read(source, part, kind, ue8m0) for part in chunk.parts]
    return parts[0] if len(parts) == 1 else np.concatenate([leaves.contiguous(part) for part in parts], chunk.axis)


def _box(index: slice, n: int) -> tuple[int, int]:
    start, stop, _ = index.indices(n)
    return start, max(start, stop)


def _view(source: Source, place: Place) -> tuple[str, np.ndarray]:
    """The stored values of one place in published orientation."""
    kind, flat = source.raw(place.file, place.tensor)
    chunk = flat[place.start : place.start + place.chunk.size].reshape(place.chunk.shape)[place.at]
    return kind, chunk.T if place.part.transposed else chunk


def _region(source: Source, part: Part) -> np.ndarray:
    """Rows and columns of a published tensor as stored, untransposed; copied only when several places make it up."""
    wanted = [_box(index, n) for index, n in zip((part.rows, part.cols), part.shape)]
    out = None
    for replicas in source.places_of(part.name, part.field):
        place = replicas[0]
        p, (kind, values) = place.part, _view(source, place)
        if out is not None and out.dtype != values.dtype:
            raise ValueError(f"{place.file}: tensor {place.tensor!r} is {kind}; another piece of {part.name!r} is not")
        if p.shape != part.shape:
            raise ValueError(f"{source.where(part.name, part.field)} belongs to a tensor of shape {list(p.shape)}; the config "
                             f"asks for {list(part.shape)}")
        if not isinstance(p.rows, slice):
            inside = np.flatnonzero((p.rows >= wanted[0][0]) & (p.rows < wanted[0][1]))
            if not len(inside):
                continue
            into: list[Any] = [p.rows[inside] - wanted[0][0]]
            taken: list[Any] = [inside if len(inside) < len(p.rows) else slice(None)]
        else:
            into, taken = [], []
        for dim in range(len(into), len(part.shape)):
            start, stop = _box((p.rows, p.cols)[dim], part.shape[dim])
            low, high = max(start, wanted[dim][0]), min(stop, wanted[dim][1])
            into.append(slice(low - wanted[dim][0], max(low, high) - wanted[dim][0]))
            taken.append(slice(low - start, max(low, high) - start))
        values = values[tuple(taken)]
        shape = tuple(b - a for a, b in wanted)
        if values.shape == shape and isinstance(into[0], slice):
            return values
        if values.size:
            out = np.empty(shape, DTYPES[kind]) if out is None else out
            out[tuple(into)] = values
    if out is None:
        out = np.empty(tuple(b - a for a, b in wanted), DTYPES[kind])
    return out


def _decoded(source: Source, part: Part, kind: str) -> np.ndarray:
    """A region of an FP8 tensor as numbers, transposed as the part says."""
    codes = _region(source, dataclasses.replace(part, field="codes"))
    scales = scales_of(source, part.name)
    row0, col0 = part.rows.indices(part.shape[0])[0], part.cols.indices(part.shape[1])[0]
    values = cast.dequantise(codes, scales, source.block, bfloat16=kind == "BF16", row0=row0, col0=col0,
                             transposed=part.transposed)
    return leaves.convert(values, "BF16" if kind == "BF16" else "F32", kind, source.where(part.name))


def scales_of(source: Source, name: str) -> np.ndarray:
    """The scales of an FP8 tensor as float32, checked. Raises ValueError for a NaN, infinite or negative one."""
    place = source.places_of(name, "scales")[0][0]
    kind = source.raw(place.file, place.tensor)[0]
    stored = _region(source, Part(name, place.part.shape, field="scales"))
    scales = fp8.from_e8m0(stored) if kind == "F8_E8M0" else leaves.convert(stored, kind, "F32", name)
    if not np.all(np.isfinite(scales)) or scales.min(initial=0) < 0:
        bad = np.argwhere(~(np.isfinite(scales) & (scales >= 0)))[0]
        raise ValueError(f"{source.where(name, 'scales')} has the scale {scales[tuple(bad)]} at {bad.tolist()}; expected "
                         f"finite numbers of at least 0")
    return scales


# -- checks ------------------------------------------------------------------------------------------------------------
def differing_replica(source: Source, name: str) -> str | None:
    """The first pair of places that should hold the same part of a tensor and do not, in words; None when all agree."""
    for field in ("values", "codes", "scales"):
        for replicas in source.places.get((source.home(name), field), ()):
            first = _view(source, replicas[0])[1]
            for other in replicas[1:]:
                if not same_bits(first, _view(source, other)[1]):
                    a, b = (f"{p.file}: {p.tensor!r}" for p in (replicas[0], other))
                    return f"{a} and {b} should hold the same part of {name!r} and differ"
    return None


def differing_copy(source: Source, tensors: Iterable[Published]) -> tuple[str, str, int] | None:
    """(copy, main, row) of the first MTP copy of the embedding or the head that differs from the main one, or None."""
    tensors = tuple(tensors)
    main = {t.path: t for t in tensors if not t.copy}
    for t in tensors:
        if not t.copy or source.home(t.name) != t.name:
            continue
        kinds = {source.kind(t.name), source.kind(main[t.path].name)}
        kind = kinds.pop() if len(kinds) == 1 else "F32"
        for i in range(0, t.shape[0], 4096):
            rows = slice(i, min(i + 4096, t.shape[0]))
            x, y = (read(source, Part(name, t.shape, rows), kind) for name in (t.name, main[t.path].name))
            if not same_bits(x, y):
                unequal = np.asarray(x, order="C").view(f"u{x.itemsize}") != np.asarray(y, order="C").view(f"u{y.itemsize}")
                return t.name, main[t.path].name, i + int(np.argmax(unequal.any(axis=1)))
    return None


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays agree bit for bit, NaNs and signs of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = f"u{a.itemsize}"
    return np.array_equal(np.asarray(a, order="C").view(kind), np.asarray(b, order="C").view(kind))
