"""A rank's slices of the params in a checkpoint: of our own on one device or any mesh, or of a folder of released weights."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import Config
from ..parallel.shard import Placement
from . import folder, hf, own, sharded, shards


def load_part(path: str | Path, placement: Placement, dtype: str | None = None, *, mtp: bool = True,
              share: tuple[int, int] = (0, 1)) -> tuple[Any, Config]:
    """(params, cfg): the slices that ``parallel.stages.own`` makes of what ``load`` or ``from_hf`` read, and no more is read.

    path: a folder of ``save``, a checkpoint of a training run, or a Hugging Face folder, FP8 too. dtype, mtp: as for
    ``from_hf``; our own checkpoints are read with the modules they have. share: (i, n), of our own files this rank compares
    every n-th with its checksum, beginning with the i-th. Raises FileNotFoundError, or ValueError naming the file or tensor
    that is damaged, missing or unexpected, or the dim that the mesh does not divide; and for a mesh with stages.
    """
    path = Path(path)
    if placement.mesh.pipe > 1:
        raise ValueError(f"mesh {placement.mesh}: the params of a pipeline stage are read by load_sharded, of a training run")
    if (path / own.MANIFEST).exists():
        source = own.open_own(path)
        common = (own.CONFIG, shards.index_name(path, "model"))
        folder.verify(path, (*common, *sorted(file.name for file in source.paths)[share[0]::share[1]]))
    else:
        source = hf.open_hf(path, mtp=mtp)
        if placement.rank == 0:
            hf.check_copies(source)
    boxes = {part.leaf: part.box for part in sharded.parts(source.cfg, placement)}
    return own.read_params(source, dtype, boxes=boxes), source.cfg
