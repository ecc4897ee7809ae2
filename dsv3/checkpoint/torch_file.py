"""torch's zip files (``torch.save`` since 1.6), read and written without torch.

Such a file is a zip archive of uncompressed records: ``NAME/data.pkl``, a pickle of the saved object in which a tensor is
a call of ``torch._utils._rebuild_tensor_v2`` on a storage; ``NAME/data/KEY``, a storage's bytes; ``NAME/byteorder``;
``NAME/version``. The pickle is ``torch_pickle``'s: nothing that it names is ever imported or called.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import torch_pickle
from .safetensors_io import DTYPES, write_bytes
from .torch_pickle import Opaque, Storage, TorchTensor, Unplaced

_MAX_DIMS = 32  # of a NumPy array
_DEEPEST = 64  # containers in containers; checkpoints have about five


@dataclass(frozen=True)
class Record:
    """A record of the archive: where its bytes are in the file, and their CRC-32."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class TorchFile:
    """An open file: the saved object with ``TorchTensor`` for tensors, its records by name, its bytes mapped into memory."""

    path: Path
    structure: Any
    records: Mapping[str, Record]
    data: mmap.mmap
    big_endian: bool


# -- the archive -----------------------------------------------------------------------------------------
def open_file(path: str | Path) -> TorchFile:
    """Map a file and read its structure. Raises FileNotFoundError, or ValueError naming the file and the tensor."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as f:
        start = f.read(4)
        if start != b"PK\x03\x04":
            if start[:1] == b"\x80":
                raise ValueError(f"{path}: a file of torch before 1.6, one bare pickle; load it with torch and save it again")
            raise ValueError(f"{path}: expected a zip archive by torch.save, found a file that starts with {start!r}")
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        records = _records(path, f, data)
    prefixes = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(prefixes) != 1:
        raise ValueError(f"{path}: expected one record named */data.pkl, found {len(prefixes)}: not a file by torch.save")
    prefix = prefixes[0]
    order = _small(path, data, records[f"{prefix}byteorder"], "byteorder") if f"{prefix}byteorder" in records else b"little"
    if order not in (b"little", b"big"):
        raise ValueError(f"{path}: byteorder: expected little or big, found {order!r:.40}")
    text = _small(path, data, records[f"{prefix}data.pkl"], "data.pkl")
    try:
        saved = torch_pickle.load(text)
    except ValueError as error:
        raise ValueError(f"{path}: data.pkl: {error}") from None
    budget = [1000 + 4 * len(text)]  # each byte of a pickle makes at most one object; more means objects within themselves

    def place(value: Any, where: str, depth: int) -> Any:
        budget[0] -= 1
        if depth > _DEEPEST or budget[0] < 0:
            raise ValueError(f"{path}: data.pkl: damaged: containers within themselves at {where!r:.80}")
        if isinstance(value, Unplaced):
            return _place(path, where, value, records, f"{prefix}data/")
        if isinstance(value, dict):
            return {k: place(v, f"{where}.{_key(k)}" if where else _key(k), depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(place(v, f"{where}.{i}" if where else str(i), depth + 1) for i, v in enumerate(value))
        return Opaque(type(value).__name__) if isinstance(value, Storage) else value

    return TorchFile(path, place(saved, "", 0), records, data, order == b"big")


def _records(path: Path, file: BinaryIO, data: mmap.mmap) -> dict[str, Record]:
    """The archive's records. Every claim of its directory is checked against the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    # All that zipfile raises for damaged bytes (a fuzz found each): unknown features are NotImplementedError there.
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError, OSError, EOFError, OverflowError) as error:
        raise ValueError(f"{path}: truncated or damaged: the zip archive's directory cannot be read ({error})") from None
    out: dict[str, Record] = {}
    for info in infos:
        where, at = f"{path}: record {info.orig_filename!r:.100}", info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError(f"{where} is compressed or encrypted; torch.save stores plain bytes: unpack and store them again")
        if not 0 <= at <= len(data) - 30 or data[at : at + 4] != b"PK\x03\x04":
            raise ValueError(f"{where}: no header at byte {at}, where the directory has it: truncated or damaged")
        n, extra = struct.unpack_from("<2H", data, at + 26)
        start = at + 30 + n + extra
        if data[at + 30 : at + 30 + n] != info.orig_filename.encode("utf-8", "replace"):
            raise ValueError(f"{where}: the header at byte {at} belongs to another record: damaged")
        if start + info.file_size > len(data):
            raise ValueError(f"{where}: ends at byte {start + info.file_size} but the file has {len(data)}: truncated")
        if info.filename in out:
            raise ValueError(f"{where} appears twice")
        out[info.filename] = Record(start, info.file_size, info.CRC)
    return out


def _small(path: Path, data: mmap.mmap, record: Record, name: str) -> bytes:
    text = data[record.offset : record.offset + record.size]
    if zlib.crc32(text) != record.crc:
        raise ValueError(f"{path}: {name}: expected CRC-32 {record.crc:08x}, found {zlib.crc32(text):08x}: the file is damaged")
    return text


def verify(file: TorchFile, block: int = 1 << 22) -> None:
    """Compare every record with its CRC-32; reads the whole file. Raises ValueError naming the first that differs."""
    for name, record in file.records.items():
        crc, end = 0, record.offset + record.size
        for at in range(record.offset, end, block):
            crc = zlib.crc32(file.data[at : min(at + block, end)], crc)
        if crc != record.crc:
            raise ValueError(f"{file.path}: {name}: expected CRC-32 {record.crc:08x}, found {crc:08x}: the file is damaged")


def _naturals(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _place(path: Path, name: str, tensor: Unplaced, records: Mapping[str, Record], folder: str) -> TorchTensor:
    """The tensor with its place in the file. Raises ValueError where the pickle and the records disagree."""
    where, storage = f"{path}: tensor {name!r:.200}", tensor.storage
    if not isinstance(storage, Storage) or not _naturals((tensor.start,)):
        raise ValueError(f"{where}: has no storage, or starts before it: damaged")
    shape, stride, dtype = tensor.shape, tensor.stride, storage.dtype or tensor.dtype
    if dtype is None or tensor.dtype not in (None, dtype):
        raise ValueError(f"{where}: a type that cannot be read; expected one of {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(stride) or len(shape) != len(stride) or len(shape) > _MAX_DIMS:
        raise ValueError(f"{where}: expected a shape and strides of integers of at least 0, found {shape!r:.80}, {stride!r:.80}")
    if folder + storage.key not in records:
        raise ValueError(f"{where}: its storage, the record {folder + storage.key!r:.100}, is missing")
    record, size = records[folder + storage.key], DTYPES[dtype].itemsize
    nbytes = storage.numel * (size if storage.dtype else 1)
    if record.size != nbytes:
        raise ValueError(f"{where}: its storage takes {nbytes} bytes but the record {folder + storage.key!r} has {record.size}")
    elements, last = prod(shape), tensor.start + sum((n - 1) * s for n, s in zip(shape, stride))
    if elements and (last >= nbytes // size or elements > nbytes // size):
        raise ValueError(
            f"{where}: {dtype} {list(shape)} with strides {list(stride)} from element {tensor.start} does not fit its "
            f"storage of {nbytes // size} elements"
        )
    return TorchTensor(dtype, shape, stride, record.offset + (tensor.start * size if elements else 0))


def read(file: TorchFile, tensor: TorchTensor) -> np.ndarray:
    """Values of a tensor of the file: a read-only view of the mapped bytes; a copy where the file is big-endian."""
    kind = DTYPES[tensor.dtype]
    if not prod(tensor.shape):
        return np.empty(tensor.shape, kind)
    strides = tuple(s * kind.itemsize for s in tensor.stride)
    stored = kind.newbyteorder(">") if file.big_endian else kind
    return np.ndarray(tensor.shape, stored, file.data, tensor.offset, strides).astype(kind, copy=False)


def tensors(structure: Any, where: str = "") -> dict[str, TorchTensor]:
    """{keys joined by dots: tensor} of a nested structure, in its order. Raises ValueError when two get the same name."""
    out: dict[str, TorchTensor] = {}
    for name, tensor in _walk(structure, where):
        if name in out:
            raise ValueError(f"two tensors are called {name!r}")
        out[name] = tensor
    return out


def _walk(value: Any, where: str) -> Iterator[tuple[str, TorchTensor]]:
    if isinstance(value, TorchTensor):
        yield where, value
    elif isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(inner, f"{where}.{_key(key)}" if where else _key(key))


def _key(key: Any) -> str:
    return key.name if isinstance(key, Opaque) else str(key)


# -- writing ---------------------------------------------------------------------------------------------
_ALIGNMENT = 64  # of a record's bytes in the file, as torch's own
_WIDE = 0xFFFFFFFF  # what sizes and places that a zip archive's 32-bit fields cannot hold read there
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_DAY = 0x21  # 1980-01-01: the same bytes whenever they are written


@dataclass(frozen=True)
class _Entry:
    """A record to be written: where its header and its bytes go."""

    name: bytes
    header: int
    record: Record


@dataclass(frozen=True)
class Writer:
    """A file being written. ``pending`` holds the tensors not written yet and shrinks; ``done`` the finished records."""

    path: Path
    file: BinaryIO
    pending: dict[str, tuple[TorchTensor, _Entry]]
    done: list[_Entry]
    end: int  # of the last record


def create(path: str | Path, structure: Any) -> Writer:
    """Start a file of a nested structure, whose tensors are ``TorchTensor(dtype, shape)``, and write all but their values.

    The values follow by ``write`` under the names of ``tensors(structure)``. Raises ValueError for what cannot be written.
    """
    path = Path(path)
    try:
        declared = tensors(structure)
        for name, tensor in declared.items():
            if tensor.dtype not in DTYPES or not _naturals(tensor.shape):
                raise ValueError(f"tensor {name!r}: cannot write {tensor.dtype!r} {tensor.shape!r}")
        text = torch_pickle.dump(structure)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    small = {"data.pkl": text, "byteorder": b"little", "version": b"3\n"}
    entries, at = [], 0
    sizes = {n: len(b) for n, b in small.items()} | {f"data/{i}": t.nbytes for i, t in enumerate(declared.values())}
    for name, size in sizes.items():
        header = _local_header(f"archive/{name}".encode(), at, size)
        entries.append(_Entry(f"archive/{name}".encode(), at, Record(at + len(header), size, 0)))
        at += len(header) + size
    pending = {name: (tensor, entry) for (name, tensor), entry in zip(declared.items(), entries[len(small) :])}
    writer = Writer(path, open(path, "wb"), pending, [], at)
    try:
        for entry, content in zip(entries, small.values()):
            _write_record(writer, entry, (content,), entry.name.decode())
    except BaseException:
        writer.file.close()
        raise
    return writer


def write(writer: Writer, name: str, chunks: Iterable[np.ndarray | bytes] | np.ndarray) -> None:
    """Write one tensor, in any order of names, from consecutive chunks of its values in C order (one array is one chunk).

    Raises ValueError when the name is unknown or written already, or the chunks are not of its type or do not fill it.
    """
    if name not in writer.pending:
        raise ValueError(f"{writer.path}: {name!r} is not declared, or was written before")
    tensor, entry = writer.pending[name]

    def checked() -> Iterator[np.ndarray | bytes]:
        for chunk in (chunks,) if isinstance(chunks, np.ndarray) else chunks:
            if isinstance(chunk, np.ndarray) and chunk.dtype != DTYPES[tensor.dtype]:
                raise ValueError(f"{writer.path}: tensor {name!r} was declared {tensor.dtype} but is given {chunk.dtype}")
            yield chunk

    _write_record(writer, entry, checked(), f"tensor {name!r}")
    del writer.pending[name]


def finish(writer: Writer) -> None:
    """Write the archive's directory, flush, sync to the disk and close. Raises ValueError if a tensor was never written."""
    with writer.file as file:
        if writer.pending:
            first = next(iter(writer.pending))
            raise ValueError(f"{writer.path}: {len(writer.pending)} declared tensors were not written, the first is {first!r}")
        entries = sorted(writer.done, key=lambda e: e.header)
        directory = b"".join(_central_header(e) for e in entries)
        end = b""
        if writer.end >= _WIDE or len(directory) >= _WIDE or len(entries) >= 0xFFFF:
            numbers = (len(entries), len(entries), len(directory), writer.end)
            end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *numbers)
            end += struct.pack("<4sIQI", b"PK\6\7", 0, writer.end + len(directory), 1)
        n, size, at = min(len(entries), 0xFFFF), min(len(directory), 0xFFFFFFFF), 0xFFFFFFFF if end else writer.end
        end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, n, n, size, at, 0)
        file.seek(writer.end)
        write_bytes(file, directory + end)
        file.flush()
        os.fsync(file.fileno())


def _write_record(writer: Writer, entry: _Entry, chunks: Iterable[Any], what: str) -> None:
    """The chunks at their place, then the header, which holds their checksum."""
    crc, n, size = 0, 0, entry.record.size
    writer.file.seek(entry.record.offset)
    for chunk in chunks:
        part = memoryview(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8) if isinstance(chunk, np.ndarray) else chunk)
        n += part.nbytes
        if n > size:
            break
        if part.nbytes:
            write_bytes(writer.file, part)
            crc = zlib.crc32(part, crc)
    if n != size:
        raise ValueError(f"{writer.path}: {what} takes {size} bytes but is given {n}{' or more' if n > size else ''}")
    writer.file.seek(entry.header)
    write_bytes(writer.file, _local_header(entry.name, entry.header, size, crc))
    writer.done.append(_Entry(entry.name, entry.header, Record(entry.record.offset, size, crc)))


def _local_header(name: bytes, at: int, size: int, crc: int = 0) -> bytes:
    """The header in front of a record: padded by an extra field, as torch does, so that the record is aligned."""
    wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= _WIDE else b""
    padding = -(at + _LOCAL.size + len(name) + len(wide) + 4) % _ALIGNMENT
    extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    short = 0xFFFFFFFF if wide else size
    head = _LOCAL.pack(b"PK\3\4", 45 if wide else 20, 0, 0, 0, _DAY, crc, short, short, len(name), len(extra))
    return head + name + extra


def _central_header(entry: _Entry) -> bytes:
    size, at = entry.record.size, entry.header
    wide = struct.pack("<2Q", size, size) if size >= _WIDE else b""
    wide += struct.pack("<Q", at) if at >= _WIDE else b""
    extra = struct.pack("<2H", 1, len(wide)) + wide if wide else b""
    version, short = (45 if wide else 20), (0xFFFFFFFF if size >= _WIDE else size)
    numbers = (version, version, 0, 0, 0, _DAY, entry.record.crc, short, short, len(entry.name), len(extra), 0, 0, 0, 0)
    return _CENTRAL.pack(b"PK\1\2", *numbers, 0xFFFFFFFF if at >= _WIDE else at) + entry.name + extra
