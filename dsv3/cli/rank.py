"""The step of one rank as a target of ``parallel.simulate``: to be compiled or recorded, and replayed in lockstep."""
from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from ..config import PRESETS, Config
from ..model import init
from ..optim import adamw
from ..parallel.groups import own_rank
from ..parallel.mesh import Mesh
from ..parallel.program import batch_of, own_rows
from ..parallel.rules import local_slices, make_rules
from ..parallel.schedules import Pipeline
from ..parallel.shard import Placement
from ..parallel.stages import held, own
from ..parallel.update import init_state
from ..train import make_eval_step, make_train_step
from ..tree import paths, tree_map, tree_map_with_path


def run_steps(model: str | dict, mesh: str, rows: int, length: int, *, steps: int = 1, rules: dict[str, Any] | None = None,
              changes: dict | None = None, learning_rate: float = 1e-2, accumulate: int = 1, dtype: str = "float32",
              empty: bool = False, recompute: Any = False, pipeline: dict[str, Any] | None = None,
              evaluate: bool = False) -> tuple[Any, list[dict]]:
    """``make_train_step(mesh=...)`` on this rank's part of ``init`` with seed 0 and of batches of ``rows`` x ``length``, the
    same as ``batch_of`` of the seeds 1, 2, ... Returns (params, metrics of every step).

    model, changes, rules: see ``parallel.program.train_step``. empty: params and state have shapes and no values, so that a
    step is compiled without drawing them. evaluate: ``make_eval_step`` on the batch after the last; its metrics come last.
    """
    cfg = (PRESETS[model] if isinstance(model, str) else Config.from_hf(model)).replace(**(changes or {}))
    table, line, optimizer = make_rules(**_tuples(rules)), Pipeline(**_tuples(pipeline)), adamw(learning_rate)
    placement = Placement(Mesh.parse(mesh), table, own_rank(), line)
    specs = held(cfg, placement)[0]
    params = blank(specs, placement, dtype, table.zero == 3) if empty else own(init(cfg, 0, dtype), cfg, placement)
    state = blank_state(specs, placement, dtype) if empty else init_state(optimizer, params, specs, placement)
    recompute = tuple(recompute) if isinstance(recompute, list) else recompute
    place = {"mesh": placement.mesh, "rules": table, "pipeline": line, "accumulate": accumulate}
    step, metrics = make_train_step(cfg, optimizer, recompute=recompute, **place), []

    def batch(i: int) -> dict:
        return {"tokens": own_rows(placement, batch_of(cfg, rows, length, 1 + i))}

    for i in range(steps):
        params, state, found = step(params, state, batch(i))
        metrics.append(found)
    if evaluate:
        metrics.append(make_eval_step(cfg, **place)(params, batch(steps)))
    return params, metrics


def _tuples(keywords: dict[str, Any] | None) -> dict[str, Any]:
    """As JSON cannot have them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in (keywords or {}).items()}


def record_steps(**job: Any) -> None:
    """A target of ``simulate``: ``run_steps`` of its arguments."""
    run_steps(**job)


def blank(specs: Any, placement: Placement, dtype: str, state: bool = False) -> Any:
    """A rank's params as tensors that were never written. state: the parts of which the rank keeps the optimiser's state."""
    coords = placement.mesh.coords(placement.rank)

    def leaf(path: str, spec: Any) -> Tensor:
        where = local_slices(spec, placement.mesh, placement.rules, coords, path, state=state)
        return mint.empty(tuple(s.stop - s.start for s in where), dtype=getattr(ms, spec.dtype or dtype))

    return tree_map_with_path(leaf, specs)


def blank_state(specs: Any, placement: Placement, dtype: str) -> dict:
    """AdamW's state of blank params, as ``update.init_state`` makes it."""
    def one(leaf: Tensor) -> Tensor:
        return mint.empty(leaf.shape, dtype=ms.float32)

    parts = blank(specs, placement, dtype, True)
    state = {"step": Tensor(np.zeros((), np.int32)), "m": tree_map(one, parts), "v": tree_map(one, parts)}
    masters = {path: one(leaf) for path, leaf in paths(parts) if leaf.dtype != ms.float32}
    return state | {"masters": masters} if masters else state
