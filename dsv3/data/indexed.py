"""Megatron's `.bin`/`.idx` pair: tokens on disk, read through a memory map, written as a stream.

`.bin` is the tokens of every sequence, one after the other, little-endian, nothing between them. `.idx` is

    9 bytes  "MMIDIDX" and two zeros
    uint64   version, always 1
    uint8    code of the token type (DTYPES)
    uint64   S, number of sequences
    uint64   D, number of documents + 1
    int32[S] length of each sequence, tokens
    int64[S] where each sequence starts in the .bin, bytes
    int64[D] where each document starts, in sequences; the last entry is S
    int8[S]  modes, only in multimodal files (read past, never written)

A document of a pretraining file is one sequence, or none when its text was empty. Files written here are
byte for byte those of megatron-core 0.16.1's builder for the same tokens.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
DTYPES = {code: np.dtype(name) for code, name in DTYPES.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20  # entries, when arrays too large to hold are walked


def token_dtype(vocab_size: int) -> np.dtype:
    """The token type Megatron picks: uint16 below 65500 entries, else int32 (DeepSeek-V3: int32)."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def bin_path(prefix: str | os.PathLike) -> Path:
    """`prefix` + ".bin"; the prefix may itself contain dots."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike) -> Path:
    """`prefix` + ".idx"."""
    return Path(f"{os.fspath(prefix)}.idx")


def exists(prefix: str | os.PathLike) -> bool:
    """Whether both files of the pair are there."""
    return bin_path(prefix).is_file() and idx_path(prefix).is_file()


# ---------------------------------------------------------------- reading


class IndexedDataset:
    """Sequences of one `.bin`/`.idx` pair, by number, without loading them.

    Attributes: `prefix` str, `dtype` of the tokens, `lengths` int32 [S] tokens, `pointers` int64 [S] bytes,
    `documents` int64 [D] first sequence of each document and S at the end, `tokens` [total] the whole file.
    Arrays are read-only views of the maps. Raises FileNotFoundError when a file is missing and ValueError,
    naming file, field, what was expected and what was found, when the pair is damaged.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = os.fspath(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} does not exist; a prefix names a .bin/.idx pair without its ending"
                )
        self.dtype, self.lengths, self.pointers, self.documents = _read_index(idx_path(prefix))
        self.tokens = _map(bin_path(prefix), self.dtype, int(self.lengths.sum(dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.lengths)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a sequence, a view; to its end when `length` is None."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"sequence {index} of {self.prefix}, which has {len(self.lengths)}")
        available = int(self.lengths[index])
        length = available - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > available:
            raise IndexError(
                f"tokens [{offset}, {offset + length}) of sequence {index} of {self.prefix}, "
                f"which has {available}"
            )
        start = int(self.pointers[index]) // self.dtype.itemsize + offset
        return self.tokens[start : start + length]

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get(index)

    def __reduce__(self):
        return IndexedDataset, (self.prefix,)  # a worker process maps the files again instead of copying them


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    found, expected = path.stat().st_size, count * dtype.itemsize
    if found != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes ({count} tokens of {dtype.name}, from the .idx), "
            f"found {found}; the pair is incomplete or mixed, write it again"
        )
    if count == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if head[:9] != MAGIC:
        raise ValueError(f"{path}: header: expected {MAGIC!r}, found {head[:9]!r}; not a Megatron .idx file")
    if len(head) < HEADER.size:
        raise ValueError(
            f"{path}: header: expected {HEADER.size} bytes, found {len(head)}; the file is cut off"
        )
    _, version, code, sequences, documents = HEADER.unpack(head)
    if version != 1:
        raise ValueError(f"{path}: version: expected 1, found {version}")
    if code not in DTYPES:
        raise ValueError(f"{path}: token type: expected a code of {sorted(DTYPES)}, found {code}")
    if documents == 0:
        raise ValueError(f"{path}: document count: expected at least 1, found 0")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):
        raise ValueError(
            f"{path}: size: expected {expected} bytes ({sequences} sequences, {documents - 1} "
            f"documents), found {size}; the file is cut off or its counts are wrong"
        )
    raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    lengths, pointers, starts = np.split(raw[HEADER.size : expected], [4 * sequences, 12 * sequences])
    lengths, pointers, starts = lengths.view("<i4"), pointers.view("<i8"), starts.view("<i8")
    _check_arrays(path, DTYPES[code], lengths, pointers, starts)
    return DTYPES[code], lengths, pointers, starts


def _check_arrays(
    path: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray
) -> None:
    expected = 0
    for begin in range(0, len(lengths), CHUNK):
        part = lengths[begin : begin + CHUNK].astype(np.int64)
        if part.min() < 0:
            raise ValueError(
                f"{path}: lengths: expected none below 0, found {part.min()} at sequence "
                f"{begin + int(part.argmin())}"
            )
        ends = expected + np.cumsum(part) * dtype.itemsize
        starts = ends - part * dtype.itemsize
        wrong = np.flatnonzero(starts != pointers[begin : begin + CHUNK])
        if wrong.size:
            at = int(wrong[0])
            raise ValueError(
                f"{path}: pointers: expected {starts[at]} (the bytes before it) at sequence "
                f"{begin + at}, found {pointers[begin + at]}"
            )
        expected = int(ends[-1])
    if documents[0] != 0 or documents[-1] != len(lengths):
        raise ValueError(
            f"{path}: documents: expected first 0 and last {len(lengths)} (the sequences), "
            f"found {documents[0]} and {documents[-1]}"
        )
    if np.any(documents[1:] < documents[:-1]):
        at = int(np.argmax(documents[1:] < documents[:-1]))
        raise ValueError(
            f"{path}: documents: expected ascending, found {documents[at]} before {documents[at + 1]}"
        )


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class WriterState:
    """How far a writer got: what is on disk for certain and may be continued from."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedWriter:
    """Writes a pair as a stream in constant memory; nothing bears the final names before `finalize`.

    Tokens, lengths and document starts go to `<prefix>.{bin,len,doc}.partial`. `sync` puts them on disk and
    returns a WriterState; a later writer given that state cuts the files back to it and goes on. `finalize`
    renames the .bin first and the .idx last, so a pair is either whole or has no .idx. The .bin.partial is
    locked: a second process writing the same prefix gets a ValueError.
    """

    def __init__(
        self, prefix: str | os.PathLike, dtype: np.dtype | type | str, state: WriterState | None = None
    ):
        self.prefix, self.dtype = os.fspath(prefix), np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise ValueError(
                f"token type: expected one of {[d.name for d in CODES]}, found {self.dtype.name}"
            )
        self.state = state or WriterState()
        self._counts = [self.state.tokens, self.state.sequences, self.state.documents]
        bin_path(prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
        self._bin = _lock(self._partial("bin"))
        self._lengths = open(self._partial("len"), "ab+")
        self._documents = open(self._partial("doc"), "ab+")
        try:
            for file, size in (
                (self._bin, self.state.tokens * self.dtype.itemsize),
                (self._lengths, self.state.sequences * 4),
                (self._documents, self.state.documents * 8),
            ):
                found = os.fstat(file.fileno()).st_size
                if found < size:
                    raise ValueError(
                        f"{file.name}: expected at least {size} bytes to continue from, found {found}"
                    )
                file.truncate(size)
        except ValueError:
            self.close()
            raise

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Iterable[int] | None = None) -> None:
        """One document. tokens: [n]; lengths: of its sequences, default one of n (none when n is 0)."""
        tokens = _as_tokens(tokens, self.dtype)
        lengths = ([len(tokens)] if len(tokens) else []) if lengths is None else list(lengths)
        self.add_documents(tokens, lengths, [len(lengths)])

    def add_documents(
        self,
        tokens: Sequence[int] | np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        sequences: Sequence[int] | np.ndarray,
    ) -> None:
        """Several at once. tokens: [sum(lengths)]; lengths: [sum(sequences)]; sequences: [documents]."""
        tokens = _as_tokens(tokens, self.dtype)
        lengths, sequences = np.asarray(lengths, np.int64), np.asarray(sequences, np.int64)
        if lengths.sum() != len(tokens) or sequences.sum() != len(lengths):
            raise ValueError(
                f"expected {lengths.sum()} tokens and {sequences.sum()} sequences (the sums of the "
                f"lengths given), found {len(tokens)} and {len(lengths)}"
            )
        if len(lengths) and (lengths.min() < 0 or lengths.max() > np.iinfo(np.int32).max):
            raise ValueError(
                f"a sequence of {lengths.max()} tokens does not fit the int32 of the format; split it"
            )
        self._bin.write(tokens.tobytes())
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._documents.write((self._counts[1] + np.cumsum(sequences)).astype("<i8").tobytes())
        self._counts[0] += len(tokens)
        self._counts[1] += len(lengths)
        self._counts[2] += len(sequences)

    def add_index(self, prefix: str | os.PathLike) -> None:
        """Everything in another pair of the same token type, in order."""
        part = IndexedDataset(prefix)
        if part.dtype != self.dtype:
            raise ValueError(
                f"{part.prefix}: token type: expected {self.dtype.name} as in {self.prefix}, "
                f"found {part.dtype.name}"
            )
        for begin in range(0, len(part.tokens), CHUNK):
            self._bin.write(part.tokens[begin : begin + CHUNK].tobytes())
        for begin in range(0, len(part), CHUNK):
            self._lengths.write(part.lengths[begin : begin + CHUNK].tobytes())
        for begin in range(1, len(part.documents), CHUNK):
            self._documents.write(
                (self._counts[1] + part.documents[begin : begin + CHUNK]).astype("<i8").tobytes()
            )
        self._counts[0] += len(part.tokens)
        self._counts[1] += len(part)
        self._counts[2] += len(part.documents) - 1

    def sync(self) -> WriterState:
        """Put everything added so far on disk and return the state to continue from."""
        for file in (self._bin, self._lengths, self._documents):
            file.flush()
            os.fsync(file.fileno())
        self.state = WriterState(*self._counts)
        return self.state

    def finalize(self) -> None:
        """Write the index and give both files their names. The writer is closed."""
        self.sync()
        index = self._partial("idx")
        with open(index, "wb") as file:
            file.write(
                HEADER.pack(MAGIC, 1, CODES[self.dtype], self.state.sequences, self.state.documents + 1)
            )
            for part in _chunks(self._lengths, "<i4"):
                file.write(part.tobytes())
            start = 0
            for part in _chunks(self._lengths, "<i4"):
                ends = start + np.cumsum(part, dtype=np.int64) * self.dtype.itemsize
                file.write((ends - part.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes())
                start = int(ends[-1])
            file.write(struct.pack("<q", 0))
            for part in _chunks(self._documents, "<i8"):
                file.write(part.tobytes())
            file.flush()
            os.fsync(file.fileno())
        # An .idx left by an earlier run must not stand beside the new .bin, not even between the two renames.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._partial("bin"), bin_path(self.prefix))
        os.replace(index, idx_path(self.prefix))
        _sync_directory(bin_path(self.prefix).absolute().parent)
        self.close()
        for kind in ("len", "doc"):
            self._partial(kind).unlink()

    def discard(self) -> None:
        """Close and remove what was written under partial names."""
        for kind in ("bin", "len", "doc", "idx"):
            self._partial(kind).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close; the partial files stay, to be continued."""
        for file in (self._bin, self._lengths, self._documents):
            file.close()

    def _partial(self, kind: str) -> Path:
        return Path(f"{self.prefix}.{kind}.partial")

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self._bin.closed:
            self.close()


def write_documents(
    prefix: str | os.PathLike, documents: Iterable[Sequence[int] | np.ndarray], dtype: np.dtype | type | str
) -> WriterState:
    """Write one sequence a document and finalise the pair. Returns the counts."""
    with IndexedWriter(prefix, dtype) as writer:
        for tokens in documents:
            writer.add_document(tokens)
        writer.finalize()
        return writer.state


def merge(prefixes: Sequence[str | os.PathLike], output_prefix: str | os.PathLike) -> WriterState:
    """Join pairs of one token type, in the order given, into a new pair. Returns the counts."""
    if not prefixes:
        raise ValueError("merge: expected at least one prefix, found none")
    if os.path.abspath(output_prefix) in [os.path.abspath(p) for p in prefixes]:
        raise ValueError(f"merge: the output {output_prefix} is also an input; choose another prefix")
    with IndexedWriter(output_prefix, IndexedDataset(prefixes[0]).dtype) as writer:
        for prefix in prefixes:
            writer.add_index(prefix)
        writer.finalize()
        return writer.state


def _as_tokens(tokens: Sequence[int] | np.ndarray, dtype: np.dtype) -> np.ndarray:
    found = np.asarray(tokens)
    if found.size == 0:
        return np.zeros(0, dtype)
    if found.ndim != 1:
        raise ValueError(f"tokens: expected one dimension, found shape {found.shape}")
    if found.dtype != dtype and dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if found.dtype.kind not in "iu" or found.min() < low or found.max() > high:
            raise ValueError(
                f"tokens: expected integers in [{low}, {high}] ({dtype.name}), found {found.dtype.name} "
                f"in [{found.min()}, {found.max()}]; is the vocabulary larger than the token type?"
            )
    return found.astype(dtype, copy=False)


def _chunks(file: BinaryIO, dtype: str) -> Iterable[np.ndarray]:
    file.seek(0)
    while data := file.read(CHUNK * np.dtype(dtype).itemsize):
        yield np.frombuffer(data, dtype)


def _lock(path: Path) -> BinaryIO:
    """Open to append and lock. Whoever held the lock may have renamed the file meanwhile: then open again."""
    while True:
        file = open(path, "ab+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"{path} is being written by another process; wait for it or choose another prefix"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
