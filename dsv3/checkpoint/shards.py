"""A set of named tensors over several safetensors files with an index, as Hugging Face lays it out."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import safetensors_io
from .folder import read_json, write_text
from .safetensors_io import File, Slot

Box = tuple[tuple[int, int], ...]  # [start, stop) in each dim

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_size(size: int | str) -> int:
    """Bytes of 5_000_000_000, "5GB" or "4GiB". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    nbytes = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if nbytes < 1:
        raise ValueError(
            f"max_shard_size={size!r}; expected a number of bytes such as 5000000000, '5GB' or '4GiB'"
        )
    return nbytes


def deal(
    slots: Iterable[Slot], stem: str, most: int, *, always_index: bool
) -> tuple[dict[str, list[Slot]], dict[str, str]]:
    """Consecutive files of at most ``most`` bytes, a larger tensor in a file of its own, and the index's text.

    ``stem``-00001-of-0000N.safetensors ... and ``stem``.safetensors.index.json; one file without an index,
    ``stem``.safetensors, when one is enough, unless ``always_index``. Returns ({file: slots}, {index: text}).
    """
    groups: list[list[Slot]] = [[]]
    size = total = 0
    for slot in slots:
        if groups[-1] and size + slot.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(slot)
        size += slot.nbytes
        total += slot.nbytes
    if len(groups) == 1 and not always_index:
        return {f"{stem}.safetensors": groups[0]}, {}
    files = {
        f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)
    }
    index = {
        "metadata": {"total_size": total},
        "weight_map": {slot.name: name for name, group in files.items() for slot in group},
    }
    return files, {f"{stem}.safetensors.index.json": json.dumps(index, indent=2)}


def write_shards(
    folder: Path,
    stem: str,
    slots: list[Slot],
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_size: int | str,
    metadata: Mapping[str, str],
    *,
    always_index: bool,
) -> None:
    """Write the files and the index of ``deal``.

    ``arrays`` yields (name, array) once for each slot, in any order, so the caller decides what is in memory
    at once.
    """
    files, texts = deal(slots, stem, parse_size(max_shard_size), always_index=always_index)
    writers = []
    try:
        for name, group in files.items():
            writers.append(safetensors_io.create(folder / name, group, metadata))
        home = {slot.name: writer for writer, group in zip(writers, files.values()) for slot in group}
        for name, array in arrays:
            safetensors_io.write(home[name], name, array)
        for writer in writers:
            safetensors_io.finish(writer)
    finally:
        for writer in writers:
            writer.file.close()
    for name, text in texts.items():
        write_text(folder / name, text)


@dataclass(frozen=True)
class Shards:
    """Open files and, for every tensor, its slot and the file that holds it."""

    folder: Path
    files: tuple[File, ...]
    home: Mapping[str, File]

    def slot(self, name: str) -> Slot:
        """Type and shape of a tensor."""
        return self.home[name].slots[name]

    def where(self, name: str) -> str:
        """A tensor, for an error."""
        return f"{self.home[name].path}: tensor {name!r}"

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor, or a box of it, as a read-only view of its file."""
        values = safetensors_io.read(self.home[name], name)
        return values if box is None else values[tuple(slice(*dim) for dim in box)]


@dataclass(frozen=True)
class Pieces:
    """Tensors that lie in pieces over several files, each piece under the tensor's name: {name: (the whole one, {file: box})}.

    Several files may have the same piece; one that is there is taken. Files are opened when something in them is read.
    """

    folder: Path
    home: Mapping[str, tuple[Slot, Mapping[str, Box]]]
    file: Callable[[str], File]

    def slot(self, name: str) -> Slot:
        """Type and shape of a whole tensor."""
        return self.home[name][0]

    def where(self, name: str) -> str:
        """A tensor, for an error."""
        return f"{self.folder}: tensor {name!r}"

    def pieces(self, name: str, box: Box | None = None) -> dict[str, Box]:
        """{file: its box} of what makes up a tensor, or a box of it."""
        slot, held = self.home[name]
        box = tuple((0, n) for n in slot.shape) if box is None else box
        chosen: dict[Box, str] = {}
        for file, there in held.items():
            if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, there)) and (
                    there not in chosen or not (self.folder / chosen[there]).is_file()):
                chosen[there] = file
        return {file: there for there, file in chosen.items()}

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A tensor, or a box of it: a read-only view where one piece holds it all. Only these bytes are read."""
        box = tuple((0, n) for n in self.slot(name).shape) if box is None else box
        out = None
        for file, held in self.pieces(name, box).items():
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, held))
            part = safetensors_io.read(self.file(file), name)[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, held))]
            if part.shape == extents(box):
                return part
            out = np.empty(extents(box), part.dtype) if out is None else out
            out[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box))] = part
        return out


def extents(box: Box) -> tuple[int, ...]:
    """Shape of a box."""
    return tuple(stop - start for start, stop in box)


def open_shards(folder: str | Path, stem: str = "model") -> Shards | Pieces:
    """Open ``stem``.safetensors, or the files that its index names, and check that files and index agree.

    Raises FileNotFoundError, or ValueError naming the file and the tensor.
    """
    folder = Path(folder)
    if (folder / f"{stem}.pieces.json").is_file():
        return open_pieces(folder, stem)
    single, index_path = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        file = safetensors_io.open_file(single)
        return Shards(folder, (file,), dict.fromkeys(file.slots, file))
    if not index_path.is_file():
        raise FileNotFoundError(f"{folder}: neither {single.name} nor {index_path.name} is there")
    weight_map = index_files(folder, stem)
    files = {name: safetensors_io.open_file(folder / name) for name in dict.fromkeys(weight_map.values())}
    for tensor, name in weight_map.items():
        if tensor not in files[name].slots:
            raise ValueError(
                f"{folder / name}: tensor {tensor!r} is missing, which {index_path.name} places there"
            )
    for name, file in files.items():
        for tensor in file.slots:
            if weight_map.get(tensor) != name:
                raise ValueError(
                    f"{file.path}: tensor {tensor!r} is unexpected: {index_path.name} places it in "
                    f"{weight_map.get(tensor, 'no file')}"
                )
    return Shards(folder, tuple(files.values()), {tensor: files[name] for tensor, name in weight_map.items()})


def index_files(folder: Path, stem: str = "model") -> dict[str, str]:
    """{tensor: file name} of an index file. Raises ValueError unless its files stay inside the folder."""
    path = folder / f"{stem}.safetensors.index.json"
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise ValueError(f"{path}: expected an object whose weight_map gives every tensor its file")
    for name in weight_map.values():
        if Path(name).name != name:
            raise ValueError(
                f"{path}: names the file {name!r}; expected a plain file name in the same folder"
            )
    return weight_map


# -- tensors in pieces ---------------------------------------------------------------------------------------------------
def pieces_index(home: Mapping[str, tuple[Slot, Mapping[str, Box]]], metadata: Mapping[str, str]) -> str:
    """The text of an index of ``Pieces.home``."""
    content = {name: {"dtype": slot.dtype, "shape": slot.shape, "pieces": held} for name, (slot, held) in home.items()}
    return json.dumps({"metadata": dict(metadata), "pieces": content})


def index_name(folder: Path, stem: str) -> str:
    """The index of a set: of pieces, or of whole tensors."""
    pieces = f"{stem}.pieces.json"
    return pieces if (folder / pieces).is_file() else f"{stem}.safetensors.index.json"


def open_pieces(folder: Path, stem: str) -> Pieces:
    """The index of pieces, checked: every tensor is covered once. Raises ValueError naming the tensor."""
    path = folder / f"{stem}.pieces.json"
    home = {}
    for name, entry in read_json(path)["pieces"].items():
        shape = tuple(entry["shape"])
        if entry["dtype"] not in safetensors_io.DTYPES:
            raise ValueError(f"{path}: {name!r} has the unknown dtype {entry['dtype']!r}")
        held = {file: tuple((start, stop) for start, stop in box) for file, box in entry["pieces"].items()}
        inside = all(len(box) == len(shape) and all(0 <= a < b <= n for (a, b), n in zip(box, shape)) for box in held.values())
        covered = sum(math.prod(extents(box)) for box in set(held.values()))
        if not inside or covered != math.prod(shape):
            raise ValueError(f"{path}: the pieces of {name!r} do not cover its shape {list(shape)} once")
        if any(Path(file).name != file for file in held):
            raise ValueError(f"{path}: {name!r} names a file outside the folder")
        home[name] = Slot(name, entry["dtype"], shape), held
    wanted: dict[str, dict[str, tuple]] = {}
    for name, (slot, held) in home.items():
        for file, box in held.items():
            wanted.setdefault(file, {})[name] = slot.dtype, extents(box)

    @functools.cache
    def opened(file: str) -> File:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: no such file; without a shared file system it lies on the node whose "
                                    f"ranks wrote it: copy the nodes' {folder.name} folders together")
        found = safetensors_io.open_file(folder / file)
        there = {name: (slot.dtype, slot.shape) for name, slot in found.slots.items()}
        for name in sorted(there.keys() | wanted[file].keys()):
            if there.get(name) != wanted[file].get(name):
                raise ValueError(f"{found.path}: tensor {name!r} is {there.get(name)}; {path.name} says {wanted[file].get(name)}")
        return found

    return Pieces(folder, home, opened)


def files_of(folder: Path, stem: str = "model") -> list[str]:
    """The files that an index names."""
    if (folder / f"{stem}.pieces.json").is_file():
        opened = open_pieces(folder, stem)
        return sorted({file for name in opened.home for file in opened.pieces(name)})
    return sorted(set(index_files(folder, stem).values()))
