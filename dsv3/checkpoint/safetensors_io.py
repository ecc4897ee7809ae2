"""The safetensors format: 8 bytes of header length, a JSON header, the tensors end to end.

Reading maps the file and returns views; every claim of the header is checked before a byte is believed.
Values travel as NumPy arrays; the types NumPy lacks travel as bit patterns: BF16 as uint16, F8_E4M3 and
F8_E5M2 as uint8.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# From narrow to wide; within a file tensors lie in the opposite order, so each is aligned to its own size.
DTYPES = {
    name: np.dtype(kind)
    for name, kind in (
        ("BOOL", "bool"),
        ("U8", "u1"),
        ("I8", "i1"),
        ("F8_E5M2", "u1"),
        ("F8_E4M3", "u1"),
        ("F8_E8M0", "u1"),
        ("I16", "<i2"),
        ("U16", "<u2"),
        ("F16", "<f2"),
        ("BF16", "<u2"),
        ("I32", "<i4"),
        ("U32", "<u4"),
        ("F32", "<f4"),
        ("F64", "<f8"),
        ("I64", "<i8"),
        ("U64", "<u8"),
    )
}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


@dataclass(frozen=True)
class Slot:
    """One tensor of a file: name, type, shape, and its bytes [start, end) counted from the header's end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the type and the shape ask for."""
        return DTYPES[self.dtype].itemsize * _count(self.shape)


@dataclass(frozen=True)
class File:
    """An open file: its slots by name, its free-text metadata and its bytes, mapped into memory."""

    path: Path
    slots: Mapping[str, Slot]
    metadata: Mapping[str, str]
    data: mmap.mmap
    offset: int  # of the first tensor's first byte


def _count(shape: Iterable[int]) -> int:
    n = 1
    for dim in shape:
        n *= dim
    return n


# -- reading ---------------------------------------------------------------------------------------------
def open_file(path: str | Path) -> File:
    """Map a file and check its header. Raises FileNotFoundError, or ValueError naming file and tensor."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size < 8:
        raise ValueError(
            f"{path}: expected at least 8 bytes, found {size}: truncated, or not a safetensors file"
        )
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{path}: the header claims {length} bytes but {min(MAX_HEADER, size - 8)} is the most this "
                f"file of {size} bytes can have: truncated, or not a safetensors file"
            )
        text = f.read(length)
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    slots, metadata = _parse(path, text)
    _check_layout(path, slots, size - 8 - length)
    return File(path, {s.name: s for s in slots}, metadata, data, 8 + length)


def read(file: File, name: str) -> np.ndarray:
    """One tensor as a read-only view of the mapped file. Raises ValueError if it is not there."""
    if name not in file.slots:
        raise ValueError(f"{file.path}: no tensor {name!r} in this file")
    slot = file.slots[name]
    flat = np.frombuffer(file.data, DTYPES[slot.dtype], _count(slot.shape), file.offset + slot.start)
    return flat.reshape(slot.shape)


def _once(pairs: list) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = [k for k in out if sum(k == name for name, _ in pairs) > 1]
        raise ValueError(f"the name {twice[0]!r} appears twice")
    return out


def _parse(path: Path, text: bytes) -> tuple[list[Slot], dict[str, str]]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: expected a JSON object as header, found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: expected __metadata__ to map strings to strings, found {metadata!r:.80}")
    return [_slot(path, name, entry) for name, entry in header.items()], metadata


def _natural(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _slot(path: Path, name: str, entry: Any) -> Slot:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets, found {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where}: dtype {dtype!r:.40} is unknown; expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise ValueError(f"{where}: expected a shape of integers of at least 0, found {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise ValueError(f"{where}: expected two data_offsets of at least 0, found {offsets!r:.80}")
    slot = Slot(name, dtype, tuple(shape), *offsets)
    if slot.end - slot.start != slot.nbytes:
        raise ValueError(
            f"{where}: {dtype} {list(shape)} takes {slot.nbytes} bytes but data_offsets {offsets} span "
            f"{slot.end - slot.start}"
        )
    return slot


def _check_layout(path: Path, slots: list[Slot], nbytes: int) -> None:
    """The tensors lie end to end from 0 to the last byte of the file: no gap, no overlap, nothing beyond."""
    at = 0
    for slot in sorted(slots, key=lambda s: (s.start, s.end)):
        if slot.start != at:
            raise ValueError(
                f"{path}: tensor {slot.name!r} starts at byte {slot.start} of the data; expected {at}: "
                f"tensors must lie end to end"
            )
        at = slot.end
        if at > nbytes:
            raise ValueError(
                f"{path}: tensor {slot.name!r} ends at byte {at} of the data but the file holds {nbytes}: "
                f"truncated"
            )
    if at != nbytes:
        raise ValueError(
            f"{path}: the tensors end at byte {at} of the data but the file holds {nbytes}: foreign bytes "
            f"at the end"
        )


# -- writing ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Writer:
    """A file being written. ``pending`` holds the slots not written yet and shrinks."""

    path: Path
    file: BinaryIO
    pending: dict[str, Slot]
    offset: int


def write_bytes(file: BinaryIO, data: Any) -> None:
    """Every byte of every checkpoint goes through here."""
    file.write(data)


def create(path: str | Path, slots: Iterable[Slot], metadata: Mapping[str, str] | None = None) -> Writer:
    """Start a file of these tensors (their offsets are set here) and write its header. Names must differ."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    placed: dict[str, Slot] = {}
    at = 0
    for s in sorted(slots, key=lambda s: (-_RANK[s.dtype], s.name)):
        if s.name in placed:
            raise ValueError(f"{path}: two tensors are called {s.name!r}")
        placed[s.name] = Slot(s.name, s.dtype, tuple(s.shape), at, at + s.nbytes)
        header[s.name] = {"dtype": s.dtype, "shape": list(s.shape), "data_offsets": [at, at + s.nbytes]}
        at += s.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data starts aligned to 8 bytes
    file = open(path, "wb")
    try:
        write_bytes(file, len(text).to_bytes(8, "little") + text)
    except BaseException:
        file.close()
        raise
    return Writer(Path(path), file, placed, 8 + len(text))


def write(writer: Writer, name: str, array: np.ndarray) -> None:
    """Write one tensor, in any order. Any memory layout is right: what is written is the array in C order.

    Raises ValueError when the name is unknown or written already, or type or shape are not the declared ones.
    """
    if name not in writer.pending:
        raise ValueError(f"{writer.path}: {name!r} is not declared, or was written before")
    slot = writer.pending[name]
    if array.dtype != DTYPES[slot.dtype] or array.shape != slot.shape:
        raise ValueError(
            f"{writer.path}: tensor {name!r} was declared {slot.dtype} {list(slot.shape)} but is given "
            f"{array.dtype} {list(array.shape)}"
        )
    writer.file.seek(writer.offset + slot.start)
    if slot.nbytes:
        write_bytes(writer.file, memoryview(np.asarray(array, order="C").reshape(-1).view(np.uint8)))
    del writer.pending[name]


def append(writer: Writer, name: str, array: np.ndarray) -> None:
    """Write the next elements of a tensor, in C order; a tensor may come in any number of pieces, mixed with others.

    Raises ValueError when the name is unknown or full, the type is not the declared one, or there is too much.
    """
    slot = writer.pending.get(name)
    if slot is None or array.dtype != DTYPES[slot.dtype] or array.nbytes > slot.end - slot.start:
        raise ValueError(
            f"{writer.path}: tensor {name!r} has {0 if slot is None else slot.end - slot.start} bytes of "
            f"{slot and slot.dtype} to come but is given {array.nbytes} of {array.dtype}"
        )
    writer.file.seek(writer.offset + slot.start)
    write_bytes(writer.file, memoryview(np.asarray(array, order="C").reshape(-1).view(np.uint8)))
    if slot.start + array.nbytes == slot.end:
        del writer.pending[name]
    else:
        writer.pending[name] = replace(slot, start=slot.start + array.nbytes)


def finish(writer: Writer) -> None:
    """Flush, sync to the disk and close. Raises ValueError if a declared tensor was never written."""
    with writer.file:
        if writer.pending:
            raise ValueError(
                f"{writer.path}: {len(writer.pending)} declared tensors were not written, "
                f"the first is {next(iter(writer.pending))!r}"
            )
        writer.file.flush()
        os.fsync(writer.file.fileno())


def write_file(
    path: str | Path, tensors: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str] | None = None
) -> None:
    """A whole file at once: {name: (dtype such as "BF16", array)}."""
    writer = create(
        path, [Slot(name, dtype, array.shape) for name, (dtype, array) in tensors.items()], metadata
    )
    with writer.file:
        for name, (_, array) in tensors.items():
            write(writer, name, array)
        finish(writer)
