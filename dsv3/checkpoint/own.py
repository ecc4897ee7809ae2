"""Our own checkpoint: a folder of safetensors shards whose tensors are the leaves, named by their paths.

``config.json`` carries the released keys and a marker of the format; ``manifest.json``, written last, has the
size and CRC-32 of every file. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..config import Config
from ..model import param_specs
from ..spec import is_spec
from ..tree import paths, tree_map_with_path
from . import folder, leaves, safetensors_io, shards
from .folder import MANIFEST, read_json, replace_folder, write_text
from .layout import PIECE, StoredFile, cut
from .leaves import FLOATS
from .safetensors_io import DTYPES, Slot
from .shards import Box, extents
from .source import Source, open_layout, own_tensor, own_tensors, read_chunk, stored_kind, tensors_by_leaf

MARKER = "dsv3"  # the key of config.json that says: these are our names and layout
VERSION = 1
CONFIG = "config.json"
THREADS = min(os.cpu_count() or 1, 8)  # that read and convert
INDEX = "model.safetensors.index.json"


def save(
    path: str | Path, params: Any, *, cfg: Config, dtype: str | None = None, max_shard_size: int | str = "5GB"
) -> Path:
    """Write params and config as a checkpoint folder, replacing an older one there; returns its path.

    dtype: "float32", "bfloat16" or "float16", default as the params are; the router bias stays float32. The
    folder is complete on the disk before it takes its name: if writing fails, or the process is killed, what
    was there is still there. Other files in the folder (a tokenizer) are kept. Raises ValueError when params
    do not fit cfg, or when the path holds something that is not such a checkpoint.
    """
    found = leaves.check_params(params, cfg)
    return replace_folder(
        path,
        lambda new: write_model(new, found, cfg, dtype, max_shard_size),
        is_ours=ownership(Path(path)),
        with_manifest=True,
    )


def load(path: str | Path, dtype: str | None = None, *, verify: bool = True) -> tuple[Any, Config]:
    """(params, cfg) of a folder written by ``save``.

    dtype: None as stored, or one of float32, bfloat16, float16 to convert to. Every file is compared with the
    manifest first; verify=False compares sizes only. Raises FileNotFoundError, or ValueError naming the file
    or tensor that is truncated, damaged, foreign, missing, unexpected or of a wrong shape.
    """
    path = Path(path)
    cfg = read_config(path)
    folder.verify(path, (CONFIG, shards.index_name(path, "model")), verify)
    folder.verify(path, shards.files_of(path), verify)
    return read_model(path, cfg, dtype), cfg


def ownership(path: Path) -> Any:
    """What a new checkpoint replaces in an existing folder. Raises ValueError if that is not one of ours."""
    if not path.is_dir() or not any(path.iterdir()):
        return lambda file: True
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"{path} holds files but no {MANIFEST}, so it is not a checkpoint to replace; choose another "
            f"path or empty it"
        )
    ours = folder.manifest(path)
    return lambda file: file.name in ours or folder.is_manifest(file.name)


def write_model(
    new: Path, found: dict[str, Any], cfg: Config, dtype: str | None, max_shard_size: int | str
) -> None:
    """Write config.json, the shards and their index into a folder. ``found``: {path: leaf} in order."""
    target = leaves.float_dtype(dtype) if dtype else None
    stored = {path: leaves.dtype_of(leaf, path) for path, leaf in found.items()}
    fixed = {path for path, spec in paths(param_specs(cfg), is_spec) if spec.dtype}
    kept = {path: source if path in fixed else target or source for path, source in stored.items()}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in found.items():  # one leaf on the host at a time
            yield path, leaves.convert(leaves.host(leaf), stored[path], kept[path], path)

    common = leaves.common_dtype({path: kind for path, kind in kept.items() if path not in fixed})
    write_text(new / CONFIG, config_text(cfg, common))
    slots = [Slot(path, kept[path], tuple(leaf.shape)) for path, leaf in found.items()]
    shards.write_shards(new, "model", slots, arrays(), max_shard_size, {"format": MARKER}, always_index=True)


def read_config(path: Path) -> Config:
    """The config of one of our folders. Raises ValueError with the remedy for any other or a newer one."""
    if not path.is_dir():
        waiting = folder.aside(path)
        hint = f"; an interrupted save left the previous one whole in {waiting}" if waiting.exists() else ""
        raise FileNotFoundError(f"{path}: no such folder{hint}")
    raw = read_json(path / CONFIG)
    mark = raw.pop(MARKER, None) if isinstance(raw, dict) else None
    if not isinstance(mark, dict):
        raise ValueError(
            f"{path / CONFIG}: no {MARKER!r} entry, so this is not a folder written by save; read a Hugging "
            f"Face checkpoint with from_hf"
        )
    if mark.get("format") != "params" or mark.get("version") != VERSION:
        raise ValueError(
            f"{path / CONFIG}: format {mark.get('format')!r} version {mark.get('version')!r}; expected "
            f"'params' version {VERSION}: it needs another release of this library"
        )
    try:
        return Config.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None


def open_own(path: str | Path) -> Source:
    """A folder written by ``save``, or one of a training run, as a Source; names, types, shapes and sizes are checked."""
    path = Path(path)
    cfg = read_config(path)
    folder.verify(path, checksums=False)
    opened = shards.open_shards(path)
    tensors = own_tensors(cfg)
    leaves.check_names(str(path), opened.home, [t.name for t in tensors])
    for t in tensors:
        slot, where = opened.slot(t.name), opened.where(t.name)
        if slot.shape != t.shape:
            raise ValueError(f"{where} has shape {list(slot.shape)}; the config asks for {list(t.shape)}")
        if slot.dtype not in ([t.dtype] if t.dtype else FLOATS.values()):
            raise ValueError(f"{where} is {slot.dtype}; expected {t.dtype or ' or '.join(FLOATS.values())}")
    files: dict[str, list] = {}
    if isinstance(opened, shards.Pieces):
        for name, held in tensors_by_leaf(cfg).items():
            for file, box in opened.pieces(name).items():
                files.setdefault(file, []).append(own_tensor(name, held, box))
        by_name = {file: opened.file(file) for file in files}
    else:
        for t in tensors:
            files.setdefault(opened.home[t.name].path.name, []).append(t)
        by_name = {file.path.name: file for file in opened.files}

    def raw(file: str, tensor: str) -> tuple[str, np.ndarray]:
        return by_name[file].slots[tensor].dtype, safetensors_io.read(by_name[file], tensor).reshape(-1)

    return open_layout(str(path), "own", cfg, (StoredFile(name, tuple(held)) for name, held in files.items()), raw,
                       paths=tuple(file.path for file in by_name.values()))


def config_json(cfg: Config, dtype: str | None) -> dict[str, Any]:
    """The config.json of our own format: the released keys, the type of the weights where it is one, and our marker."""
    out = cfg.to_hf() | {MARKER: {"format": "params", "version": VERSION}}
    out.update({key: dtype for key in ("torch_dtype", "dtype") if dtype and key in out})
    return out


def config_text(cfg: Config, dtype: str | None = None) -> str:
    """The text of config.json."""
    return json.dumps(config_json(cfg, dtype), indent=2)


def read_params(source: Source, dtype: str | None = None, progress: bool | None = None,
                boxes: Mapping[str, Box] | None = None) -> Any:
    """The params of an open checkpoint of any layout, leaf by leaf, a leaf in pieces and in parallel.

    dtype: float32, bfloat16 or float16, None as stored. Beside the result a few pieces are held. progress: a bar on
    stderr, None on a terminal only. boxes: of each leaf this part only, and only its bytes are read; all by default.
    """
    target = leaves.float_dtype(dtype) if dtype else stored_kind(source)
    specs, tensors = param_specs(source.cfg), tensors_by_leaf(source.cfg)
    boxes = boxes or {path: tuple((0, n) for n in spec.shape) for path, spec in paths(specs, is_spec)}
    total = sum(math.prod(extents(boxes[path])) * DTYPES[FLOATS.get(spec.dtype, target)].itemsize
                for path, spec in paths(specs, is_spec))
    with (tqdm(total=total, unit="B", unit_scale=True, disable=None if progress is None else not progress) as bar,
          ThreadPoolExecutor(THREADS) as pool):

        def leaf(path: str, spec: Any) -> Any:
            shape, kind = extents(boxes[path]), FLOATS.get(spec.dtype, target)
            stored = own_tensor(path, tensors[path], boxes[path])
            pieces = [piece for chunk in stored.chunks for piece in cut(chunk, PIECE)]
            values = np.empty(math.prod(shape), DTYPES[kind])
            ends = np.cumsum([piece.size for piece in pieces])

            def fill(i: int) -> None:
                part = values[ends[i] - pieces[i].size : ends[i]]
                part.reshape(pieces[i].shape)[...] = leaves.contiguous(read_chunk(source, pieces[i], kind))
                bar.update(part.nbytes)

            list(pool.map(fill, range(len(pieces))))
            return leaves.adopt(values.reshape(shape), kind)

        return tree_map_with_path(leaf, specs)


def read_model(path: Path, cfg: Config, dtype: str | None) -> Any:
    """Params from the shards of a folder, checked against ``param_specs(cfg)``."""
    target = leaves.float_dtype(dtype) if dtype else None
    opened = shards.open_shards(path)
    specs = param_specs(cfg)
    leaves.check_names(str(path), opened.home, [name for name, _ in paths(specs, is_spec)])

    def leaf(name: str, spec: Any) -> Any:
        slot, where = opened.slot(name), opened.where(name)
        if slot.shape != spec.shape:
            raise ValueError(f"{where} has shape {list(slot.shape)}; the config asks for {list(spec.shape)}")
        kind = FLOATS[spec.dtype] if spec.dtype else target or slot.dtype
        if spec.dtype and slot.dtype != kind:
            raise ValueError(f"{where} is {slot.dtype}; expected {kind}")
        return leaves.tensor(leaves.convert(opened.read(name), slot.dtype, kind, where), kind)

    return tree_map_with_path(leaf, specs)
