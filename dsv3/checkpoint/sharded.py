"""Checkpoints of a training run on a mesh: every rank writes its slices, any other mesh, or one device, reads its own.

The folder is that of ``training``, with two differences: the tensors lie in pieces, ``model-rank-00003.safetensors`` and
``optimizer-rank-00003.safetensors`` with what rank 3 writes, and ``model.pieces.json`` says which box of which leaf is where.
Of ranks with copies of a part the first one writes; without a shared file system the first one on each node does, so that
every node can read again what its ranks wrote. What lies where follows from mesh, rules and pipeline alone, so that the
index needs no communication: the nodes' folders have the same index and, copied into one, are the whole checkpoint.
"""
from __future__ import annotations

import dataclasses
import functools
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ..config import Config
from ..model import param_specs
from ..parallel.rules import local_slices
from ..parallel.shard import Placement
from ..parallel.stages import held
from ..spec import ParamSpec, draw, is_spec
from ..tree import flatten, paths, tree_map_with_path
from . import folder, leaves, own, safetensors_io, shards, training
from .safetensors_io import Slot
from .shards import Box, extents

Gather = Callable[[float], np.ndarray]  # every rank gives a number and gets those of all, in the order of ranks


@dataclass(frozen=True)
class Part:
    """A rank's part of a leaf: the leaf's name in the whole model, its path in the rank's tree, and the boxes of the param and
    of the optimiser's state that the rank holds."""

    leaf: str
    path: str
    spec: ParamSpec
    box: Box
    state_box: Box


def parts(cfg: Config, placement: Placement) -> tuple[Part, ...]:
    """What one rank holds, in the order of its tree."""
    mesh, rules, coords = placement.mesh, placement.rules, placement.mesh.coords(placement.rank)
    specs, names = held(cfg, placement)

    def box(spec: ParamSpec, leaf: str, state: bool) -> Box:
        return tuple((s.start, s.stop) for s in local_slices(spec, mesh, rules, coords, leaf, state=state))

    return tuple(Part(leaf, path, spec, box(spec, leaf, rules.zero == 3), box(spec, leaf, True))
                 for (path, spec), leaf in zip(paths(specs, is_spec), names))


def draw_part(cfg: Config, placement: Placement, seed: int, dtype: str) -> Any:
    """This rank's slices of the params that ``init(cfg, seed, dtype)`` draws, whatever the mesh; nobody holds a whole leaf."""
    mine = {p.path: p for p in parts(cfg, placement)}

    def leaf(path: str, spec: ParamSpec) -> Tensor:
        part = mine[path]
        where = tuple(slice(*dim) for dim in part.box)
        return Tensor(draw(spec, part.leaf, seed, where), dtype=getattr(ms, spec.dtype or dtype))

    return tree_map_with_path(leaf, held(cfg, placement)[0])


# -- the optimiser's state ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Group:
    """An entry of the optimiser's state. kind: a "tree" like params, "masters", {path: leaf} of the leaves without a type of
    their own, or a "leaf", the same on all ranks. shape: of a leaf."""

    key: str
    kind: str
    dtype: str
    shape: tuple[int, ...] = ()


def groups_of(opt_state: dict[str, Any], held_parts: tuple[Part, ...]) -> tuple[Group, ...]:
    """The entries of a rank's state. Raises ValueError for one of no known kind."""
    everything = [p.path for p in held_parts]
    free = [p.path for p in held_parts if p.spec.dtype is None]
    out = []
    for key, value in opt_state.items():
        if not isinstance(value, (dict, tuple)):
            out.append(Group(key, "leaf", leaves.dtype_of(value, key), tuple(value.shape)))
            continue
        is_tree = "layers" in value  # which is no path of a leaf; a stage may have no leaf that masters leave out
        if sorted(path for path, _ in paths(value)) != sorted(everything if is_tree else free):
            raise ValueError(f"opt_state[{key!r}]: expected one value, a tree like the params, or a dict from paths of leaves")
        kind = "tree" if is_tree else "masters"
        out.append(Group(key, kind, leaves.dtype_of(flatten(value)[0], key)))
    return tuple(out)


def _outline(groups: tuple[Group, ...], cfg: Config) -> Any:
    """The outline of the whole state, as ``training`` keeps it."""
    specs = param_specs(cfg)

    def of(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {"dict": {key: of(child) for key, child in tree.items()}}
        return {"tuple": [of(child) for child in tree]} if isinstance(tree, tuple) else "tensor"

    masters = {path: "tensor" for path, spec in paths(specs, is_spec) if spec.dtype is None}
    whole = {"leaf": "tensor", "masters": {"dict": masters}, "tree": of(specs)}
    return {"dict": {key: whole[kind] for key, kind in ((group.key, group.kind) for group in groups)}}


@functools.lru_cache(maxsize=2)
def layouts(cfg: Config, placement: Placement, dtype: str, groups: tuple[Group, ...], node: int) -> dict[str, dict]:
    """{stem: ``Pieces.home``} of a checkpoint of the whole mesh: who writes what.

    placement: of any of its ranks; dtype: file type of the params; node: ranks that share a file system, consecutive ones.
    """
    home: dict[str, dict] = {stem: {} for stem in training.STEMS}
    written = set()

    def add(stem: str, rank: int, slot: Slot, box: Box) -> None:
        if (rank // node, slot.name, box) not in written:
            written.add((rank // node, slot.name, box))
            home[stem].setdefault(slot.name, (slot, {}))[1][file_name(stem, rank)] = box

    for rank in range(placement.mesh.size):
        for group in groups:
            if group.kind == "leaf":
                add("optimizer", rank, Slot(group.key, group.dtype, group.shape), tuple((0, n) for n in group.shape))
        for p in parts(cfg, dataclasses.replace(placement, rank=rank)):
            add("model", rank, Slot(p.leaf, leaves.FLOATS.get(p.spec.dtype, dtype), p.spec.shape), p.box)
            for group in groups:
                if group.kind == "tree" or group.kind == "masters" and p.spec.dtype is None:
                    add("optimizer", rank, Slot(f"{group.key}.{p.leaf}", group.dtype, p.spec.shape), p.state_box)
    return home


def file_name(stem: str, rank: int) -> str:
    """The file of what one rank writes."""
    return f"{stem}-rank-{rank:05d}.safetensors"


# -- writing -----------------------------------------------------------------------------------------------------------
def save_sharded(run_dir: str | Path, step: int, params: Any, opt_state: dict[str, Any], meta: dict[str, Any], *, cfg: Config,
                 placement: Placement, gather: Gather, node: int, leads: bool, keep: int = 3) -> Path:
    """Write ``run_dir/checkpoints/step_00000120`` together with all other ranks; returns its path.

    params, opt_state: this rank's slices. meta: as for ``save_training``. node: how many consecutive ranks share the folder;
    leads: one of them makes it, names it when all ranks of the mesh have written, and deletes all but the newest ``keep`` when
    every folder has its name; until then the older checkpoints are whole. When a rank fails, all raise.
    """
    target = Path(run_dir) / "checkpoints" / f"step_{step:08d}"
    held_parts = parts(cfg, placement)
    dtype = leaves.dtype_of(next(leaf for (_, leaf), p in zip(paths(params), held_parts) if p.spec.dtype is None), "params")
    groups = groups_of(opt_state, held_parts)
    home = layouts(cfg, dataclasses.replace(placement, rank=0), dtype, groups, node)
    named = next(name for name, kind in leaves.FLOATS.items() if kind == dtype)
    texts = {own.CONFIG: own.config_text(cfg, named), training.TRAINING: training.description(step, meta, _outline(groups, cfg))}
    about = {"mesh": str(placement.mesh), "ranks": str(placement.mesh.size)}

    together(gather, lambda: prepare(target) if leads else None, "making the folder of the checkpoint")
    together(gather, lambda: write_part(target, params, opt_state, home, held_parts, placement.rank), "writing the checkpoint")
    together(gather, lambda: commit(target, texts, home, about) if leads else None, "completing the checkpoint")
    if leads:
        training.keep_newest(target.parent, target.name, keep)
    return target


def together(gather: Gather, work: Callable[[], Any], what: str) -> Any:
    """Do this rank's share and wait for the others; what ``work`` returns. If any rank failed, every rank raises."""
    error, result = None, None
    try:
        result = work()
    except Exception as caught:  # raised below, once the others know
        error = caught
    failed = np.flatnonzero(gather(float(error is not None)))
    if error is not None:
        raise error
    if len(failed):
        raise OSError(f"{what} failed on rank {', '.join(map(str, failed))}; its log says why; older checkpoints are whole")
    return result


def temporary(target: Path) -> Path:
    """Where the ranks write: they all know the name."""
    return target.parent / f".tmp-{target.name}-{0:08x}"


def prepare(target: Path) -> None:
    """Make the empty folder in which the ranks will write; leftovers of killed writers go."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.iterdir():
        if folder.is_temporary(leftover.name):
            shutil.rmtree(leftover)
    temporary(target).mkdir()


def write_part(target: Path, params: Any, opt_state: dict[str, Any], home: dict[str, dict], held_parts: tuple[Part, ...],
               rank: int) -> None:
    """Write and sync what ``home`` gives this rank to write, and its part of the manifest. ValueError for wrong shapes."""
    found = dict(paths(params))
    leaves.check_names("params do not fit the stage", found, [p.path for p in held_parts])
    mine: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for p in held_parts:
        mine["model"][p.leaf] = _checked(f"params: {p.path}", found[p.path], p.box)
    for group in groups_of(opt_state, held_parts):
        entry = opt_state[group.key]
        state = {} if group.kind == "leaf" else entry if group.kind == "masters" else dict(paths(entry))
        if group.kind == "leaf":
            mine["optimizer"][group.key] = entry
        for p in held_parts:
            if p.path in state:
                where = f"opt_state[{group.key!r}]: {p.path}"
                mine["optimizer"][f"{group.key}.{p.leaf}"] = _checked(where, state[p.path], p.state_box)
    new, files = temporary(target), []
    for stem, tensors in mine.items():
        file = file_name(stem, rank)
        named = {name: leaf for name, leaf in tensors.items() if file in home[stem][name][1]}
        if not named:
            continue
        slots = [Slot(name, leaves.dtype_of(leaf, name), tuple(leaf.shape)) for name, leaf in named.items()]
        writer = safetensors_io.create(new / file, slots, {"format": own.MARKER})
        with writer.file:
            for name, leaf in named.items():  # one leaf on the host at a time
                safetensors_io.write(writer, name, leaves.host(leaf))
            safetensors_io.finish(writer)
        files.append(file)
    if files:
        folder.write_manifest(new, files, part=f"rank-{rank:05d}")
        folder.sync(new / f"manifest-rank-{rank:05d}.json")


def _checked(where: str, leaf: Any, box: Box) -> Any:
    if tuple(leaf.shape) != extents(box):
        raise ValueError(f"{where} has shape {tuple(leaf.shape)}; this rank's slice {list(box)} has {extents(box)}")
    return leaf


def commit(target: Path, texts: dict[str, str], home: dict[str, dict], about: dict[str, str]) -> None:
    """Write the common files and the manifest, and give the folder its name. All ranks must have written.

    Raises FileNotFoundError when a file that a rank of this folder listed is not there.
    """
    new = temporary(target)
    texts = texts | {f"{stem}.pieces.json": shards.pieces_index(held_by, about) for stem, held_by in home.items()}
    for name, text in texts.items():
        folder.write_text(new / name, text)
    folder.write_manifest(new, texts)
    folder.verify(new, checksums=False)
    folder.settle(new, target)
    for old in (new, folder.aside(target)):
        if old.exists():
            shutil.rmtree(old)


# -- reading -----------------------------------------------------------------------------------------------------------
def latest_sharded(run_dir: str | Path, *, placement: Placement, gather: Gather, share: tuple[int, int]) -> Path | None:
    """The newest checkpoint that every rank can read its slices from, of one device or of any mesh; None when there is none.

    share: (i, n), this rank compares every n-th file with its checksum, beginning with the i-th. A damaged checkpoint is skipped
    with a warning. Raises ValueError when there are checkpoints but none that all ranks can read.
    """
    here = {int(path.name.removeprefix("step_")): path for path in training.steps(Path(run_dir) / "checkpoints")}
    limit, seen = float("inf"), False
    while True:
        newest = gather(max((step for step in here if step < limit), default=-1))
        seen, step = seen or newest.max() >= 0, int(newest.min())
        if step < 0:
            break
        fine = gather(float(step in here and _usable(here[step], placement, share)))
        if fine.all():
            return here[step]
        limit = step
    if seen:
        raise ValueError(f"{run_dir}: no checkpoint that every rank can read ({len(here)} are here); without a shared file "
                         f"system copy the nodes' folders together first, or begin again with --restart")
    return None


def _usable(path: Path, placement: Placement, share: tuple[int, int]) -> bool:
    try:
        common = [own.CONFIG, training.TRAINING, *(shards.index_name(path, stem) for stem in training.STEMS)]
        folder.verify(path, common)
        cfg = own.read_config(path)
        wanted = {file for stem in training.STEMS for file in _needed(path, stem, cfg, placement)}
        folder.verify(path, sorted(wanted), checksums=False)
        folder.verify(path, sorted(folder.manifest(path))[share[0]::share[1]])
    except (ValueError, FileNotFoundError) as error:
        warnings.warn(f"skipping an incomplete checkpoint: {error}", stacklevel=2)
        return False
    return True


def _needed(path: Path, stem: str, cfg: Config, placement: Placement) -> set[str]:
    """The files with this rank's slices."""
    if not (path / f"{stem}.pieces.json").is_file():
        return set(shards.files_of(path, stem))
    opened = shards.open_pieces(path, stem)
    mine = {p.leaf: p.box if stem == "model" else p.state_box for p in parts(cfg, placement)}
    out = set()
    for name in opened.home:
        leaf = name if stem == "model" else name.partition(".")[2]  # a name without a dot: one value for all
        if not leaf or leaf in mine:
            out.update(opened.pieces(name, mine.get(leaf)))
    return out


def load_sharded(path: str | Path, placement: Placement) -> tuple[Any, dict[str, Any], dict[str, Any], Config]:
    """(params, opt_state, meta, cfg) of a training checkpoint of one device or of any mesh: this rank's slices, bit for bit.

    Only their bytes are read. Raises FileNotFoundError, or ValueError naming what is missing or does not fit; checksums are
    compared by ``latest_sharded``.
    """
    path = Path(path)
    cfg = own.read_config(path)
    described = training.read_description(path)
    held_parts = {p.path: p for p in parts(cfg, placement)}
    specs = held(cfg, placement)[0]
    opened = {stem: shards.open_shards(path, stem) for stem in training.STEMS}

    def read(stem: str, name: str, box: Box | None, shape: tuple[int, ...] | None) -> Any:
        if name not in opened[stem].home:
            raise ValueError(f"{path}: tensor {name!r} is missing")
        slot = opened[stem].slot(name)
        if shape is not None and slot.shape != shape:
            raise ValueError(f"{opened[stem].where(name)} has shape {list(slot.shape)}; the config asks for {list(shape)}")
        return leaves.tensor(opened[stem].read(name, box), slot.dtype)

    def state(name: str, spec: ParamSpec, key: str) -> Any:
        p = held_parts[name]
        return read("optimizer", f"{key}.{p.leaf}", p.state_box, spec.shape)

    params = tree_map_with_path(lambda name, spec: read("model", held_parts[name].leaf, held_parts[name].box, spec.shape), specs)
    opt_state: dict[str, Any] = {}
    for key, outline in described["opt_state"]["dict"].items():
        if outline in ("tensor", "numpy"):
            opt_state[key] = read("optimizer", key, None, None)
        elif isinstance(outline, dict) and outline.get("dict", {}).keys() == param_specs(cfg).keys():
            opt_state[key] = tree_map_with_path(functools.partial(state, key=key), specs)
        elif isinstance(outline, dict) and "dict" in outline:
            opt_state[key] = {name: state(name, p.spec, key) for name, p in held_parts.items() if p.leaf in outline["dict"]}
        else:
            opt_state[key] = outline["value"] if isinstance(outline, dict) and "value" in outline else None
    return params, opt_state, described["meta"], cfg

