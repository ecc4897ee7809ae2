"""Documents out of files: text, JSON lines (also .gz and .zst), parquet, wikitext, directories and globs.

Reading is split in two. `read_raw` walks the files in order and hands out undecoded documents with where they
came from; it is cheap and runs in one process. `parse` turns one into text; it runs in the workers. Both
raise ValueError naming file and line.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

JSONL = (".jsonl", ".json", ".ndjson")
TEXT = (".txt", ".text", ".md", ".rst", ".py")
KNOWN = (*JSONL, *TEXT, ".parquet", ".tokens", *(f"{name}{end}" for name in JSONL for end in (".gz", ".zst")))
HEADING = re.compile(rb"^ = (?!=).* = *$")  # " = Title = ", not " = = Section = = "


@dataclass(frozen=True)
class Raw:
    """One document as found. kind: "json", "text" or "columns"; size: bytes of the file it took."""

    kind: str
    file: str
    line: int
    payload: bytes | dict
    size: int


class BadDocument(ValueError):
    """A document that cannot be read; the message names file and line."""


def expand_inputs(inputs: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Files named by paths, directories (walked, known endings only) and globs; each one's files sorted."""
    files: list[str] = []
    for item in [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs:
        name = os.fspath(item)
        if os.path.isfile(name):
            found = [name]
        elif os.path.isdir(name):
            found = sorted(
                os.path.join(root, file)
                for root, _, names in os.walk(name)
                for file in names
                if file.lower().endswith(KNOWN)
            )
            if not found:
                raise ValueError(f"{name}: expected files ending in {', '.join(KNOWN)}, found none")
        else:
            found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not found:
                raise FileNotFoundError(f"{name}: no such file, directory or match")
        files += found
    if not files:
        raise ValueError("inputs: expected at least one file, found none")
    return files


def read_raw(
    files: Sequence[str], keys: Sequence[str] = ("text",), one_per_line: bool = False
) -> Iterator[Raw]:
    """Undecoded documents of `files`, in order.

    JSON lines: a document a line. Parquet: a document a row, of columns `keys`. `*.tokens` (wikitext): cut
    before each " = Title = ". Anything else is text: the whole file is one document, or each line that is not
    blank with `one_per_line`.
    """
    for file in files:
        name = file.lower()
        if name.endswith((*JSONL, *(f"{end}{pack}" for end in JSONL for pack in (".gz", ".zst")))):
            yield from _lines(file, "json")
        elif name.endswith(".parquet"):
            yield from _parquet(file, keys)
        elif len(keys) > 1:
            raise ValueError(f"{file}: text has one field, found {len(keys)} keys: {', '.join(keys)}")
        elif name.endswith(".tokens"):
            yield from _wikitext(file)
        elif one_per_line:
            yield from _lines(file, "text")
        else:
            yield Raw("text", file, 1, Path(file).read_bytes(), os.path.getsize(file))


def parse(raw: Raw, keys: Sequence[str] = ("text",)) -> dict[str, list[str]]:
    """The texts of a document by key: one string, or several when its JSON value is a list of strings.

    Raises BadDocument on bad UTF-8, bad JSON, a missing key, or a value that is no text.
    """
    if raw.kind == "text":
        return {keys[0]: [_decode(raw, raw.payload)]}
    if raw.kind == "json":
        try:
            record = json.loads(_decode(raw, raw.payload))
        except ValueError as error:
            if isinstance(error, BadDocument):
                raise
            raise BadDocument(f"{raw.file}:{raw.line}: not a line of JSON: {error}") from error
        except RecursionError as error:
            raise BadDocument(f"{raw.file}:{raw.line}: JSON nested too deep to read") from error
    else:
        record = raw.payload
    if not isinstance(record, dict):
        raise BadDocument(
            f"{raw.file}:{raw.line}: expected a JSON object a line, found {type(record).__name__}"
        )
    texts = {}
    for key in keys:
        if key not in record:
            raise BadDocument(
                f"{raw.file}:{raw.line}: no key {key!r}; found {', '.join(map(repr, record)) or 'none'}"
            )
        value = record[key]
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise BadDocument(
                f"{raw.file}:{raw.line}: {key!r}: expected a string or a list of strings, "
                f"found {type(record[key]).__name__}"
            )
        for text in value:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadDocument(
                    f"{raw.file}:{raw.line}: {key!r}: half of a surrogate pair: {error}"
                ) from error
        texts[key] = value
    return texts


def _decode(raw: Raw, data: bytes) -> str:
    data = data[3:] if raw.line == 1 and data.startswith(b"\xef\xbb\xbf") else data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.line + data.count(b"\n", 0, error.start)
        raise BadDocument(
            f"{raw.file}:{line}: not UTF-8: byte 0x{data[error.start]:02x}, {error.reason}"
        ) from error


def _lines(file: str, kind: str) -> Iterator[Raw]:
    with open(file, "rb") as source:
        seen = 0
        try:
            for line, data in enumerate(_unpack(file, source), 1):
                if kind == "text":
                    data = data.rstrip(b"\r\n")
                if data.strip():
                    at = source.tell()
                    yield Raw(kind, file, line, data, at - seen)
                    seen = at
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file}: damaged or cut off gzip: {error}") from error


def _unpack(file: str, source: BinaryIO) -> BinaryIO:
    if file.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=source)
    if file.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{file} needs the package 'zstandard': pip install zstandard") from error
        return io.BufferedReader(
            zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True), 1 << 20
        )
    return source


def _wikitext(file: str) -> Iterator[Raw]:
    with open(file, "rb") as source:
        lines: list[bytes] = []
        start, size, line = 1, 0, 0
        for line, data in enumerate(source, 1):
            # The sets write a blank line on both sides of a heading.
            if HEADING.match(data.rstrip(b"\r\n")) and any(part.strip() for part in lines):
                yield Raw("text", file, start, b"".join(lines), size)
                lines, start, size = [], line, 0
            lines.append(data)
            size += len(data)
        if any(part.strip() for part in lines):
            yield Raw("text", file, start, b"".join(lines), size)


def _parquet(file: str, keys: Sequence[str]) -> Iterator[Raw]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{file} needs the package 'pyarrow': pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a readable parquet file: {error}") from error
    with table:
        missing = [key for key in keys if key not in table.schema_arrow.names]
        if missing:
            raise ValueError(f"{file}: no column {missing[0]!r}; found {', '.join(table.schema_arrow.names)}")
        size = os.path.getsize(file) // max(table.metadata.num_rows, 1)
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=list(keys)):
            for record in batch.to_pylist():
                row += 1
                yield Raw("columns", file, row, record, size)
