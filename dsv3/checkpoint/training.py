"""Checkpoints of a training run: model, optimiser state and position, one folder a step, the newest kept."""

from __future__ import annotations

import json
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ..config import Config
from . import folder, leaves, own, shards
from .folder import read_json, remove_folder, replace_folder, verify, write_text
from .safetensors_io import Slot

TRAINING = "training.json"
VERSION = 1
STEMS = ("model", "optimizer")  # the two sets of tensors


def save_training(
    run_dir: str | Path,
    step: int,
    params: Any,
    opt_state: Any,
    meta: dict[str, Any],
    *,
    cfg: Config,
    keep: int = 3,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write ``run_dir/checkpoints/step_00000120`` and delete all but the newest ``keep``; returns its path.

    opt_state: a tree of dict and tuple of Tensors or NumPy values of any type, read back bit for bit. meta:
    what else the run needs to go on (data position, random state, schedule), of JSON's types; "step" is
    added. At most one leaf is held twice. The folder is complete on the disk before it takes its name, and
    nothing is deleted before that. One process writes a run: leftovers of killed writers are removed. Raises
    ValueError for what cannot be stored.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}; expected at least 1: the newest checkpoint always stays")
    if step < 0:
        raise ValueError(f"step={step}; expected at least 0")
    if meta.get("step", step) != step:
        raise ValueError(
            f"meta['step'] is {meta['step']} but step is {step}; leave it out of meta or make them equal"
        )
    found = leaves.check_params(params, cfg)
    tensors: dict[str, Any] = {}
    text = description(step, meta, _outline(opt_state, "", tensors))
    home = Path(run_dir) / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    for leftover in home.iterdir():
        if folder.is_temporary(leftover.name):
            shutil.rmtree(leftover)

    def fill(new: Path) -> None:
        own.write_model(new, found, cfg, None, max_shard_size)
        slots = [
            Slot(name, leaves.dtype_of(x, f"opt_state.{name}"), tuple(x.shape)) for name, x in tensors.items()
        ]
        shards.write_shards(
            new,
            "optimizer",
            slots,
            _on_host(tensors),
            max_shard_size,
            {"format": own.MARKER},
            always_index=True,
        )
        write_text(new / TRAINING, text)

    target = home / f"step_{step:08d}"
    written = replace_folder(target, fill, is_ours=lambda file: True, with_manifest=True)
    keep_newest(home, written.name, keep)
    return target


def description(step: int, meta: dict[str, Any], opt_state: Any) -> str:
    """The text of training.json. opt_state: the outline of its containers. Raises ValueError for what is no plain data."""
    described = {
        "format": "dsv3 training",
        "version": VERSION,
        "meta": _plain(meta | {"step": int(step)}, "meta"),
        "opt_state": opt_state,
        "versions": {"mindspore": ms.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    return json.dumps(described, indent=1)


def read_description(path: Path) -> dict[str, Any]:
    """What training.json holds. Raises ValueError for another format."""
    described = read_json(path / TRAINING)
    if described.get("format") != "dsv3 training" or described.get("version") != VERSION:
        raise ValueError(f"{path / TRAINING}: format {described.get('format')!r} version {described.get('version')!r}; "
                         f"expected 'dsv3 training' version {VERSION}")
    return described


def latest_training(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. One unlike its manifest is skipped with a warning."""
    for path in sorted(steps(Path(run_dir) / "checkpoints"), reverse=True):
        try:
            _check(path)
        except (ValueError, FileNotFoundError) as error:
            warnings.warn(f"skipping an incomplete checkpoint: {error}", stacklevel=2)
        else:
            return path
    return None


def load_training(path: str | Path) -> tuple[Any, Any, dict[str, Any], Config]:
    """(params, opt_state, meta, cfg) of one checkpoint folder, bit for bit as they were saved.

    Raises FileNotFoundError, or ValueError naming the file that is missing, truncated, damaged or foreign.
    """
    path = Path(path)
    cfg = own.read_config(path)
    _check(path)
    described = read_description(path)
    opened = shards.open_shards(path, "optimizer")
    used: list[str] = []
    opt_state = _rebuild(described["opt_state"], "", opened, used)
    leaves.check_names(str(path / shards.index_name(path, "optimizer")), opened.home, used)
    return own.read_model(path, cfg, None), opt_state, described["meta"], cfg


# -- which ones are there --------------------------------------------------------------------------------
def steps(home: Path) -> list[Path]:
    return (
        [p for p in home.glob("step_*") if p.is_dir() and re.fullmatch(r"step_\d{8,}", p.name)]
        if home.is_dir()
        else []
    )


def _check(path: Path, checksums: bool = True) -> None:
    """Every file of the manifest is as it says, and it has all that a training checkpoint needs."""
    verify(path, (own.CONFIG, TRAINING, *(shards.index_name(path, stem) for stem in STEMS)), checksums=False)
    verify(path, checksums=checksums)
    for stem in STEMS:
        verify(path, shards.files_of(path, stem), checksums=False)


def _has_right_sizes(path: Path) -> bool:
    try:
        _check(path, checksums=False)
    except (ValueError, FileNotFoundError):
        return False
    return True


def keep_newest(home: Path, newest: str, keep: int) -> None:
    """Delete all but ``keep``: the one just written, then whole ones before damaged, the newest first."""
    ranked = sorted(steps(home), key=lambda p: (p.name == newest, _has_right_sizes(p), p.name), reverse=True)
    for path in ranked[keep:]:
        remove_folder(path)


# -- trees of any leaves ---------------------------------------------------------------------------------
def _on_host(tensors: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for name, leaf in tensors.items():  # one leaf on the host at a time
        yield name, leaves.host(leaf)


def _outline(tree: Any, name: str, tensors: dict[str, Any]) -> Any:
    """The containers of a tree as JSON; its arrays go into ``tensors`` by name. Keys may hold dots."""
    dot = name + "." if name else ""
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str):
                raise ValueError(f"opt_state{'.' + name if name else ''}: the key {key!r} is not a string")
        return {"dict": {key: _outline(child, dot + key, tensors) for key, child in tree.items()}}
    if isinstance(tree, tuple):
        return {"tuple": [_outline(child, f"{dot}{i}", tensors) for i, child in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)) and not isinstance(tree, np.generic):
        return {"value": tree}
    if name in tensors:
        raise ValueError(f"opt_state: two leaves have the path {name!r}; rename a key that contains a dot")
    leaves.dtype_of(tree, f"opt_state.{name}")
    tensors[name] = tree
    return "tensor" if isinstance(tree, Tensor) else "numpy"


def _rebuild(outline: Any, name: str, opened: shards.Shards, used: list[str]) -> Any:
    dot = name + "." if name else ""
    if isinstance(outline, dict) and "dict" in outline:
        return {key: _rebuild(child, dot + key, opened, used) for key, child in outline["dict"].items()}
    if isinstance(outline, dict) and "tuple" in outline:
        return tuple([_rebuild(child, f"{dot}{i}", opened, used) for i, child in enumerate(outline["tuple"])])
    if isinstance(outline, dict):
        return outline["value"]
    used.append(name)
    if name not in opened.home:
        raise ValueError(f"{opened.folder}: optimiser tensor {name!r} is missing")
    dtype, array = opened.slot(name).dtype, opened.read(name)
    return leaves.tensor(array, dtype) if outline == "tensor" else array.copy()


def _plain(value: Any, where: str) -> Any:
    """JSON's types, NumPy scalars and tuples made plain. Raises ValueError for what would change."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {key!r} would come back as a string; use string keys")
        return {key: _plain(child, f"{where}[{key!r}]") for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child, f"{where}[{i}]") for i, child in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}; expected numbers, strings, lists and dicts")
