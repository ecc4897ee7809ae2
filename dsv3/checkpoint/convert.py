"""Conversion from any layout to any other, file to file: planned first, streamed in pieces, resumable, verified.

The files grow in a folder ``.convert-NAME`` beside the target; each is synced under a temporary name and renamed when it
is whole, so that a run after a kill goes on with the next file; the folder takes its own name at the very end.
"""
from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import folder, leaves, safetensors_io, shards, torch_file
from .folder import write_text
from .layout import PIECE, Chunk, Part, Stored, StoredFile, cut
from .names import published
from .safetensors_io import Slot
from .source import FP8, Source, differing_replica, read, read_chunk

THREADS = min(os.cpu_count() or 1, 8)
RECORD = "conversion.json"  # in the finished folder: what it was made from
VERSION = 1
CARRIED = ("tokenizer", "special_tokens", "generation_config", "vocab", "merges", "chat_template", "added_tokens", "LICENSE")


@dataclass(frozen=True, eq=False)
class Target:
    """What is to be written: the files of a layout, the type of weights whose type is not fixed, and small text files."""

    form: str
    kind: str
    files: tuple[StoredFile, ...]
    texts: Mapping[str, str] = field(default_factory=dict)
    ue8m0: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)  # of each safetensors file
    manifest: bool = False  # our own format lists its files with checksums
    nest: Callable[[StoredFile], Any] | None = None  # for torch files: the structure around the tensors

    def slots(self, file: StoredFile) -> list[Slot]:
        """Names, types and shapes of a file's tensors."""
        return [Slot(t.name, t.dtype or self.kind, t.shape) for t in file.tensors]

    def nbytes(self, file: StoredFile) -> int:
        """Bytes of a file's tensors."""
        return sum(slot.nbytes for slot in self.slots(file))


def sharded(tensors: Iterable[Stored], kind: str, most: int, always_index: bool) -> tuple[tuple[StoredFile, ...], dict[str, str]]:
    """Tensors dealt into safetensors files of at most ``most`` bytes, and {name of the index file: its text}."""
    by_name = {t.name: t for t in tensors}
    slots = [Slot(t.name, t.dtype or kind, t.shape) for t in by_name.values()]
    files, texts = shards.deal(slots, "model", most, always_index=always_index)
    return tuple(StoredFile(name, tuple(by_name[slot.name] for slot in group)) for name, group in files.items()), texts


# -- the plan ----------------------------------------------------------------------------------------------------------
def plan(source: Source, target: Target) -> list[str]:
    """Lines that say what a conversion reads and writes, file by file."""
    sizes = [target.nbytes(file) for file in target.files]
    lines = [f"from  {source.name} ({source.form}), {len(published(source.cfg)):,} tensors",
             f"to    {target.form}, weights {target.kind}, {sum(len(f.tensors) for f in target.files):,} tensors in "
             f"{len(target.files):,} files, {sum(sizes):,} bytes ({sum(sizes) / 1e9:,.2f} GB)"]
    width = max(len(file.path) for file in target.files)
    lines += [f"  {file.path:<{width}}  {len(file.tensors):7,} tensors  {size:17,} bytes"
              for file, size in zip(target.files, sizes)]
    return [*lines, *(f"  {name:<{width}}  {len(text):,} bytes" for name, text in target.texts.items())]


def fingerprint(source: Source, target: Target) -> str:
    """Of everything that decides the bytes written; a half-finished conversion goes on only when it is equal."""
    read_from = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in source.paths]
    what = [VERSION, source.form, source.notes, read_from, target.form, target.ue8m0, dict(target.texts), dict(target.metadata)]
    mark = hashlib.sha256(json.dumps(what).encode())
    for file in target.files:
        mark.update(file.path.encode())
        for t, slot in zip(file.tensors, target.slots(file)):
            mark.update(repr((slot.name, slot.dtype, slot.shape)).encode())
            for part in (part for chunk in t.chunks for part in chunk.parts):  # the same shapes may hold other parts
                mark.update(repr((part.name, part.cols, part.transposed, part.field)).encode())
                mark.update(part.rows.tobytes() if isinstance(part.rows, np.ndarray) else repr(part.rows).encode())
    return mark.hexdigest()


def _ahead(pool: ThreadPoolExecutor, fn: Callable, items: Iterable, window: int) -> Iterator:
    """``map(fn, items)`` in order, at most ``window`` results ahead of the one asked for."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(fn, item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk is reported without saying what was being written."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


# -- writing -----------------------------------------------------------------------------------------------------------
def convert(source: Source, target: Target, path: str | Path, *, progress: bool | None = None,
            say: Callable[[str], None] = lambda line: None) -> Path:
    """Write ``target`` from ``source`` into the new folder ``path``; returns it. Memory is bounded by a few pieces.

    A conversion that was killed goes on after its last whole file when source and target are the same. An identical one
    that is complete is left alone. Raises ValueError when the path is taken, when there is not enough space, or for a value
    that the target cannot hold; the finished files wait for the next run.
    """
    path, home = Path(path).resolve(), Path(source.name).resolve()
    if source.paths and home in (path, *path.parents):
        raise ValueError(f"{path} lies in the source {home}, which stays as it is; choose a path outside")
    mark = fingerprint(source, target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if (path / RECORD).is_file() and folder.read_json(path / RECORD).get("fingerprint") == mark:
            say(f"{path} is complete")
            return _tidy(path)
        raise ValueError(f"{path} exists and is not empty; choose another path or remove it")
    work = path.parent / f".convert-{path.name}"
    work.mkdir(parents=True, exist_ok=True)
    with _naming(work), open(work / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process; wait for it or choose another path") from None
        _start(work, mark, say)
        done = [file for file in target.files if (work / file.path).is_file()]
        if done:
            say(f"resuming: {len(done)} of {len(target.files)} files are there")
        _check_space(work, sum(target.nbytes(f) for f in target.files if f not in done))
        with (tqdm(total=sum(map(target.nbytes, target.files)), initial=sum(map(target.nbytes, done)), unit="B",
                   unit_scale=True, disable=None if progress is None else not progress) as bar,
              ThreadPoolExecutor(THREADS) as pool):
            for file in target.files:
                if file not in done:
                    _write(source, target, file, work / file.path, pool, bar.update)
        for name, text in target.texts.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            with _naming(work / name):
                write_text(work / name, text)
        _carry(source, work)
        record = {"fingerprint": mark, "source": source.name, "source_form": source.form, "form": target.form}
        write_text(work / RECORD, json.dumps(record, indent=1))
        if target.manifest:
            folder.write_manifest(work)
        for p in sorted(work.rglob("*"), reverse=True):
            folder.sync(p)
        folder.sync(work)
        if path.exists():
            path.rmdir()  # empty
        os.rename(work, path)
    folder.sync(path.parent)
    return _tidy(path)


def _tidy(path: Path) -> Path:
    """Remove what only a conversion under way needs; it stays until the folder has its name."""
    for name in (".plan", ".lock"):
        (path / name).unlink(missing_ok=True)
    return path


def _start(work: Path, mark: str, say: Callable[[str], None]) -> None:
    """Keep what an equal conversion has finished; throw away what another one left."""
    if (work / ".plan").is_file() and (work / ".plan").read_text() == mark:
        return
    left = [p for p in work.iterdir() if p.name != ".lock"]
    if left:
        say(f"{work}: left by a conversion of another source or target; starting anew")
    for p in left:
        shutil.rmtree(p) if p.is_dir() else p.unlink()
    write_text(work / ".plan.new", mark)
    folder.sync(work / ".plan.new")
    os.rename(work / ".plan.new", work / ".plan")


def _check_space(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if needed > free:
        raise ValueError(f"{work.parent}: {needed:,} bytes are needed and {free:,} are free; nothing was written")


def _write(source: Source, target: Target, file: StoredFile, path: Path, pool: ThreadPoolExecutor,
           advance: Callable[[int], Any]) -> None:
    """One file, whole on the disk before it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    tasks = ((t.name, t.dtype or target.kind, piece) for t in file.tensors for c in t.chunks for piece in cut(c, PIECE))

    def prepare(task: tuple[str, str, Chunk]) -> tuple[str, np.ndarray]:
        name, kind, piece = task
        return name, leaves.contiguous(read_chunk(source, piece, kind, target.ue8m0))

    with _naming(half):
        if target.nest:
            writer: Any = torch_file.create(half, target.nest(file))
        else:
            writer = safetensors_io.create(half, target.slots(file), target.metadata)
        with writer.file:
            for name, run in itertools.groupby(_ahead(pool, prepare, tasks, THREADS + 1), lambda item: item[0]):
                arrays = _counted(run, advance)
                if target.nest:
                    torch_file.write(writer, name, arrays)
                else:
                    for values in arrays:
                        safetensors_io.append(writer, name, values)
            (torch_file if target.nest else safetensors_io).finish(writer)
    os.rename(half, path)
    folder.sync(path.parent)


def _counted(run: Iterable[tuple[str, np.ndarray]], advance: Callable[[int], Any]) -> Iterator[np.ndarray]:
    for _, values in run:
        yield values
        advance(values.nbytes)


def _carry(source: Source, work: Path) -> None:
    """The tokenizer and the other small files of the source's folder go along."""
    home = Path(source.name)
    if not home.is_dir():
        return
    for p in sorted(home.iterdir()):
        if p.is_file() and p.name.startswith(CARRIED) and not (work / p.name).exists():
            shutil.copyfile(p, work / p.name)


# -- verifying ---------------------------------------------------------------------------------------------------------
def verify(source: Source, result: Source, target: Target, *, progress: bool | None = None) -> tuple[int, int]:
    """Read everything again and compare checksums: (tensors compared, CRC-32 over theirs in order).

    Every published tensor of the result is compared with the source's, converted as it was for writing; replicas inside the
    result (other ranks) with one another; config and index files with what was to be written. Raises ValueError naming the
    first that differs.
    """
    for name, text in target.texts.items():
        if (Path(result.name) / name).read_bytes() != text.encode("utf-8"):
            raise ValueError(f"{Path(result.name) / name} is not what the conversion writes")
    tensors = [t for t in published(result.cfg) if result.home(t.name) == t.name]
    total, crc = sum(int(np.prod(t.shape, dtype=np.int64)) for t in tensors), 0

    def compare(t: Any) -> tuple[Any, int]:
        found = expected = 0
        for part, kind in _compared(t.name, t.shape, result, target):
            found = zlib.crc32(leaves.contiguous(read(result, part, kind)).data, found)
            expected = zlib.crc32(leaves.contiguous(read(source, part, kind, target.ue8m0)).data, expected)
        if found != expected:
            raise ValueError(f"{result.where(t.name)}: published tensor {t.name!r} has CRC-32 {found:08x}; expected "
                             f"{expected:08x} from {source.where(t.name)}")
        if differs := differing_replica(result, t.name):
            raise ValueError(f"{result.name}: {differs}")
        return t, found

    with (tqdm(total=total, unit=" values", unit_scale=True, disable=None if progress is None else not progress) as bar,
          ThreadPoolExecutor(THREADS) as pool):
        for t, one in _ahead(pool, compare, tensors, THREADS + 1):
            crc = zlib.crc32(one.to_bytes(4, "little"), crc)
            bar.update(int(np.prod(t.shape, dtype=np.int64)))
    return len(tensors), crc


def _compared(name: str, shape: tuple[int, ...], result: Source, target: Target) -> Iterator[tuple[Part, str]]:
    """The parts to compare of one tensor, and the file type to compare them in."""
    if result.is_fp8(name):
        yield Part(name, shape, field="codes"), FP8
        yield Part(name, result.places_of(name, "scales")[0][0].part.shape, field="scales"), "F32"
        return
    rows = max(1, PIECE * shape[0] // max(1, int(np.prod(shape, dtype=np.int64)))) if shape else 1
    for i in range(0, shape[0], rows):
        yield Part(name, shape, slice(i, min(i + rows, shape[0]))), result.kind(name)
