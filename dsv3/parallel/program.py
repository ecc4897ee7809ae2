"""The training step of one rank of a mesh as a program: to be compiled in simulation, exported, run in lockstep."""
from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.communication import get_rank

from ..config import PRESETS, Config
from ..model import loss_fn, param_specs
from ..nn.router import updated_bias
from ..optim import adamw
from ..transform import enter_graph, whole_program
from . import bind, shard
from .mesh import Mesh
from .rules import Rules, make_rules
from .shard import Placement
from .simulate import Step

STATE_AXES = ("replica", "expert", "context", "model")  # over which MindSpore's parallel optimizer counts copies


def auto_parallel(placement: Placement, batch: dict[str, tuple], rules: Rules) -> None:
    """MindSpore's settings for a mesh: explicit layouts, the batch's rows where they belong, ZeRO by its parallel optimizer."""
    whole = bind.device_layout(placement, ((),))
    rows = [bind.batch_layout(placement, shape, key) for key, shape in batch.items()]
    settings: dict[str, Any] = {
        "parallel_mode": "semi_auto_parallel", "device_num": placement.mesh.size, "dataset_strategy": (*rows, whole),
        "pipeline_stages": placement.mesh.pipe,
    }
    if rules.zero:
        settings |= {"enable_parallel_optimizer": True, "parallel_optimizer_config": {
            "parallel_optimizer_threshold": 0, "optimizer_weight_shard_size": rules.shard_size or -1,
            "optimizer_level": f"level{rules.zero}"}}
    ms.set_auto_parallel_context(**settings)


def load_shape(cfg: Config) -> tuple[int, int]:
    """Of the metrics' load: MoE layers, the MTP modules' included, by experts."""
    return cfg.num_moe_layers + cfg.num_nextn_predict_layers, cfg.n_routed_experts


def train_step(model: str | dict, mesh: str, rows: int, length: int, *, rules: dict[str, Any] | None = None,
               changes: dict | None = None, dtype: str = "float32", learning_rate: float = 1e-2, empty: bool = False,
               tokens_seed: int = 1) -> Step:
    """A target of ``simulate``: loss, gradients, AdamW and router bias of this rank on a batch of ``rows`` x ``length``.

    model: a preset's name or a config.json as a dict; changes: fields to replace. rules: arguments of ``make_rules``. The
    params are those of ``init`` with seed 0, or with ``empty`` not drawn at all, which is for models that no host could hold.
    """
    cfg = PRESETS[model] if isinstance(model, str) else Config.from_hf(model)
    cfg = cfg.replace(**(changes or {}))
    if dtype != "float32" and not empty:  # MindSpore 2.10 fills a master that it slices with zeros, not with the weights
        raise ValueError(f"dtype={dtype!r}: such a step can be compiled (empty=True), not run: its master weights start wrong")
    table = make_rules(zero_axes=STATE_AXES, **(rules or {}))
    placement = Placement(Mesh.parse(mesh), table, get_rank())
    if placement.mesh.pipe > 1:
        raise ValueError(f"mesh {mesh}: one operator cannot be a pipeline; take make_train_step(mesh=, pipeline=)")
    batch = {"tokens": (rows, length)}
    auto_parallel(placement, batch, table)
    shard.enter(placement)
    enter_graph()
    specs, optimizer = param_specs(cfg), adamw(learning_rate)
    params = bind.make_params(specs, placement, None if empty else bind.drawn(0), dtype)

    def loss_of(params, batch, weight):
        return loss_fn(params, batch, weight, cfg=cfg)

    step = bind.mesh_step(loss_of, params, specs, optimizer, placement, batch, load_shape=load_shape(cfg),
                          updated_bias=updated_bias, empty=empty)
    tokens = own_rows(placement, batch_of(cfg, rows, length, tokens_seed))
    return Step(whole_program(step), (Tensor(tokens), Tensor(hyper(optimizer, 0))))


def batch_of(cfg: Config, rows: int, length: int, seed: int) -> np.ndarray:
    """Random tokens, the same on every rank. [rows, length] int32."""
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (rows, length)).astype(np.int32)


def own_rows(placement: Placement, array: np.ndarray) -> np.ndarray:
    """A rank's rows of a whole batch."""
    n = array.shape[0] // len(placement.group("batch"))
    i = placement.index("batch")
    return array[i * n : (i + 1) * n]


def hyper(optimizer: Any, step: int, bias_rate: float = 0.001, mtp_weight: float = 0.3) -> np.ndarray:
    """The vector that ``bind.mesh_step``'s step takes."""
    return np.concatenate([optimizer.hyper(step), np.array([bias_rate, mtp_weight], np.float32)])
