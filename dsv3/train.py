"""One training step as a function, and the small parts of a loop that a user could have written."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
import optree
from mindspore import Tensor, mint, ops

from .config import Config
from .model import MTP_WEIGHT, denominators, loss_fn
from .nn.router import updated_bias
from .optim import Optimizer, is_state
from .parallel.groups import own_rank
from .parallel.mesh import Mesh
from .parallel.pipeline import accumulated, check, embedding_joiner, evaluated, loads_of, reporter
from .parallel.rules import make_rules
from .parallel.schedules import Pipeline
from .parallel.shard import Placement, placed
from .parallel.stages import held
from .parallel.update import check_params, check_state, make_reduce, make_update
from .schedule import Schedule, value_at
from .transform import builder, jit, picker, value_and_grad
from .tree import flatten, paths


def make_train_step(cfg: Config, optimizer: Optimizer, *, mesh: Any = None, rules: Any = None, route: Callable | None = None,
                    balance: Callable | None = None, mtp_weight: float | Schedule = MTP_WEIGHT,
                    bias_update_rate: float | Schedule = 0.001, accumulate: int = 1,
                    recompute: bool | str | tuple[int, ...] = False, mtp_prenorm: bool = False,
                    pipeline: Pipeline | None = None) -> Callable:
    """``step(params, opt_state, batch) -> (params, opt_state, metrics)``: loss, gradients, AdamW, router bias.

    params and opt_state are donated: their tensors are updated in place and handed back; the count of steps is new.
    batch: as ``loss_fn`` takes it, [accumulate * micro rows, T]; its rows are split into ``accumulate`` equal parts
    whose gradients add up to that of the whole batch exactly. mtp_weight and bias_update_rate may be Schedules over
    steps. metrics: those of ``loss_fn`` with the load of the whole batch, "grad_norm" before clipping and
    "learning_rate" (a Python float). When the gradients are not finite nothing but the count changes, and grad_norm
    says so. Raises ValueError when the rows do not divide.

    mesh: a ``parallel.Mesh``; this process is one rank of it, params are its slices (``parallel.stages.own``), opt_state
    that of its parts (``parallel.update.init_state``), the batch its own rows. rules: ``parallel.make_rules()`` by default,
    with ``zero`` one of 0 to 3. Communication is explicit, so that any device that has the collectives will do, the CPU too;
    metrics are those of the whole batch, on every rank. Level 3 keeps one block's params whole at a time only where blocks
    are recomputed.

    pipeline: for a mesh with ``pipe`` above 1, how the layers are dealt to the stages and in which order these work;
    ``accumulate`` is the number of micro-batches, and every stage is given the batch. A pipeline always recomputes a chunk's
    forward (``parallel.pipeline``); ``recompute`` then saves memory inside that.
    """
    placement = _place(cfg, mesh, rules, pipeline, accumulate)
    if isinstance(recompute, str) and recompute != "selective":
        raise ValueError(f"recompute={recompute!r}; expected True, False, 'selective' or a tuple of layer numbers")

    steps: dict[Any, Callable] = {}

    def step(params: Any, opt_state: dict, batch: dict) -> tuple[Any, dict, dict]:
        structure = optree.tree_structure((params, "masters" in opt_state))
        if structure not in steps:
            if placement is not None:
                check_state(params, opt_state, held(cfg, placement)[0], placement)
            steps[structure] = _bind(params, loss_of, optimizer, accumulate, cfg, placement, pieces)
        count = int(opt_state["step"].asnumpy())
        rates = (value_at(bias_update_rate, count), value_at(mtp_weight, count))
        hyper = np.concatenate([optimizer.hyper(count), np.array(rates, np.float32)])
        with _at(placement):
            metrics = steps[structure](params, opt_state, batch, hyper)
        metrics["learning_rate"] = float(hyper[0])
        return params, opt_state | {"step": Tensor(np.array(count + 1, np.int32))}, metrics

    pieces = {"route": route, "balance": balance, "recompute": recompute, "mtp_prenorm": mtp_prenorm}

    def loss_of(params, batch, weight):
        return loss_fn(params, batch, weight, cfg=cfg, route=route, balance=balance, recompute=recompute,
                       mtp_prenorm=mtp_prenorm)

    return step


def _place(cfg: Config, mesh: Any, rules: Any, pipeline: Pipeline | None, accumulate: int) -> Placement | None:
    """This process's place; None on one device."""
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}; expected at least 1")
    if mesh is None:
        if rules is not None:
            raise ValueError(f"rules={rules!r} without a mesh; give the mesh that they are for, or leave them out")
        if pipeline is not None:
            raise ValueError(f"pipeline={pipeline} without a mesh; give mesh=Mesh(pipe=...), or leave it out")
        return None
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r}; expected a dsv3.parallel.Mesh, or None for one device")
    placement = Placement(mesh, rules or make_rules(), own_rank(), pipeline or Pipeline())
    check(cfg, placement, accumulate)
    return placement


def _in_parts(placement: Placement | None, accumulate: int) -> bool:
    """Whether Python drives several graphs (``parallel.pipeline``)."""
    return accumulate > 1 or (placement is not None and placement.mesh.pipe > 1)


def _at(placement: Placement | None) -> contextlib.AbstractContextManager:
    return placed(placement) if placement else contextlib.nullcontext()


def _parted(tree: Any, is_bias: list[bool]) -> tuple[tuple, tuple]:
    """(what gradients move, router biases) among the leaves of a tree like params."""
    leaves = list(zip(flatten(tree), is_bias))
    return tuple(leaf for leaf, bias in leaves if not bias), tuple(leaf for leaf, bias in leaves if bias)


def _bind(params: Any, loss_of: Callable, optimizer: Optimizer, accumulate: int, cfg: Config, placement: Placement | None,
          pieces: dict) -> Callable:
    """The compiled part of a step for one structure of params: ``run(params, state, batch, hyper) -> metrics``.

    Leaves cross as flat tuples, the router biases apart from the rest: they are what the gradient does not move.
    """
    named = list(paths(params))
    is_bias = [is_state(path) for path, _ in named]
    decays = tuple(bool(optimizer.decays(path, tuple(leaf.shape))) for path, leaf in named if not is_state(path))
    build = builder(params, is_bias)
    pick = picker(params, [not bias for bias in is_bias])
    is_cut, share = placement is not None, 1 / len(placement.group("all")) if placement else 1.0
    reduce, update_ = make_reduce(cfg, placement), make_update(optimizer, cfg, placement, decays)

    def objective(params, batch, weight):
        """Of a rank: all of them report the loss, and the sum of what they report is differentiated (parallel.shard)."""
        loss, metrics = loss_of(params, batch, weight)
        return loss * share if is_cut else loss, metrics

    # Differentiated as a tree: through one flat tuple, compilation would grow with the square of the leaves.
    loss_and_grads = value_and_grad(objective, has_aux=True)

    def finish(leaves, biases, grads, m, v, masters, load_LE, hyper):
        done, norm = update_(hyper[:7], leaves, grads, m, v, masters)
        # The rate depends on the norm of all gradients, so no recomputed forward pass can see a new bias.
        rate = ops.where(ops.isfinite(norm), hyper[7], ops.zeros_like(norm))
        moved = ()
        for i in range(len(biases)):
            moved = moved + (ops.assign(biases[i], updated_bias(biases[i], load_LE[i], rate)),)
        return ops.depend(norm, (done, moved))

    @jit
    def whole(leaves, biases, moments, batch, hyper):
        (_, metrics), tree = loss_and_grads(build(leaves, biases), batch, hyper[8])
        grads = reduce(pick(tree))
        metrics["grad_norm"] = finish(leaves, biases, grads, moments["m"], moments["v"], moments["masters"],
                                      metrics["load"], hyper)
        return metrics

    @jit
    def apply(leaves, biases, moments, sums, found, hyper, zero):
        load = ops.cat(loads_of(found), 0) if biases else ()
        norm = finish(leaves, biases, sums, moments["m"], moments["v"], moments["masters"], load, hyper)
        cleared = ()
        for leaf in sums:
            # zeros_like would become a constant as large as the sums
            cleared = cleared + (ops.assign(leaf, ops.depend(ops.broadcast_to(zero, leaf.shape), norm)),)
        return ops.depend(norm, cleared)

    in_parts = _in_parts(placement, accumulate)
    if in_parts:
        gradients = accumulated(params, cfg, placement, accumulate, **pieces)
        join, report = embedding_joiner(params, cfg, placement), reporter(cfg, placement)
    sums: list = []

    def run(params: Any, state: dict, batch: dict, hyper: np.ndarray) -> dict:
        leaves, biases = _parted(params, is_bias)
        m, v = (_parted(state[name], is_bias)[0] for name in ("m", "v"))
        moments = {"m": m, "v": v, "masters": flatten(state.get("masters", ()))}
        if not in_parts:
            return whole(leaves, biases, moments, batch, hyper)
        if not sums:
            sums_like = moments["m"] if placement and placement.rules.zero >= 2 else leaves
            sums.append(tuple(mint.zeros(leaf.shape, dtype=ms.float32) for leaf in sums_like))
        found = gradients(leaves, biases, sums[0], split_rows(batch, accumulate, cfg), hyper[8])
        join(sums[0])
        norm = apply(leaves, biases, moments, sums[0], found, hyper, np.zeros(1, np.float32))
        return report(found, hyper[8]) | {"grad_norm": norm}

    return run


def split_rows(batch: dict, parts: int, cfg: Config) -> list[dict]:
    """``parts`` micro-batches of equal rows, each told the denominators of the whole, so that losses and gradients add."""
    rows = batch["tokens"].shape[0]
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows does not divide into accumulate={parts} parts; make it a multiple")
    n = rows // parts
    whole = denominators(batch, cfg=cfg)
    return [{k: v[i * n:(i + 1) * n] for k, v in batch.items()} | {"denominators": whole} for i in range(parts)]


def make_eval_step(cfg: Config, *, mesh: Any = None, rules: Any = None, route: Callable | None = None,
                   balance: Callable | None = None, accumulate: int = 1, mtp_prenorm: bool = False,
                   pipeline: Pipeline | None = None) -> Callable:
    """``evaluate(params, batch) -> metrics`` of ``loss_fn``; updates nothing, so no load is counted twice.

    mesh, rules, pipeline, accumulate: as of ``make_train_step``, whose params it reads where they are; the batch is this rank's
    own rows, the metrics are those of the whole batch, on every rank. With micro-batches forward passes alone are made, in the
    training step's order, and with a pipeline every stage is given the batch. Raises ValueError when the rows do not divide.
    """
    placement = _place(cfg, mesh, rules, pipeline, accumulate)
    bound: dict[Any, Callable] = {}

    @jit
    def whole(params, batch):
        return loss_fn(params, batch, cfg=cfg, route=route, balance=balance, mtp_prenorm=mtp_prenorm)[1]

    def bind(params: Any) -> Callable:
        losses = evaluated(params, cfg, placement, accumulate, route=route, balance=balance, mtp_prenorm=mtp_prenorm)
        report, is_bias = reporter(cfg, placement), [is_state(path) for path, _ in paths(params)]

        def run(params: Any, batch: dict) -> dict:
            found = losses(*_parted(params, is_bias), split_rows(batch, accumulate, cfg))
            return report(found, np.float32(MTP_WEIGHT))

        return run

    def evaluate(params: Any, batch: dict) -> dict:
        structure = optree.tree_structure(params)
        if structure not in bound:
            if placement is not None:
                check_params(params, held(cfg, placement)[0], placement)
            bound[structure] = bind(params) if _in_parts(placement, accumulate) else whole
        with _at(placement):
            return bound[structure](params, batch)

    return evaluate


class NotFinite(FloatingPointError):
    """A loss or gradient that is NaN or infinite; the params are those before the step."""


def train(step: Callable, params: Any, opt_state: dict, batches: Any, *, steps: int, log: Callable[[dict], None],
          evaluate: Callable[[Any], dict] | None = None, eval_every: int = 0,
          save: Callable[[int, Any, dict], None] | None = None, save_every: int = 0,
          should_stop: Callable[[], bool] | None = None, on_nonfinite: str = "stop") -> tuple[Any, dict]:
    """The loop: take a batch, make a step, log; every so often evaluate and save. Nothing a user could not have written.

    batches: an iterator of what ``step`` takes. steps: total number, of which ``opt_state["step"]`` are done already.
    log(record): called each step with plain numbers ("step", "loss", "main_loss", "mtp_loss", "balance_loss",
    "balance" (max over mean load, the worst layer), "grad_norm", "learning_rate", "tokens", "seconds") and after each
    evaluation with {"step", "eval_...": ...}. save(step, params, opt_state): at ``save_every``, at the end, and when
    should_stop() says so between two steps. on_nonfinite: "stop" saves and raises NotFinite, "skip" goes on (the step
    has changed nothing); either way the log has it. Returns (params, opt_state).
    """
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"on_nonfinite={on_nonfinite!r}; expected 'stop' or 'skip'")
    done = int(opt_state["step"].asnumpy())
    saved = done
    while done < steps:
        batch = next(batches)
        start = time.perf_counter()
        params, opt_state, metrics = step(params, opt_state, batch)
        record = plain(metrics)
        done += 1
        record |= {"step": done, "tokens": int(np.prod(batch["tokens"].shape)), "seconds": time.perf_counter() - start}
        finite = np.isfinite(record["loss"]) and np.isfinite(record["grad_norm"])
        log(record if finite else record | {"skipped": True})
        if not finite and on_nonfinite == "stop":
            if save and done - 1 > saved:
                save(done, params, opt_state)
            raise NotFinite(f"step {done}: loss {record['loss']}, grad norm {record['grad_norm']}; the params are those "
                            f"before this step. Lower the learning rate or look at the data of this batch, or go on "
                            f"with on_nonfinite='skip'")
        if evaluate and eval_every and (done % eval_every == 0 or done == steps):
            log({"step": done} | {f"eval_{k}": v for k, v in evaluate(params).items()})
        stopping = should_stop is not None and should_stop()
        if save and (done == steps or stopping or (save_every and done % save_every == 0)):
            save(done, params, opt_state)
            saved = done
        if stopping:
            break
    return params, opt_state


def plain(metrics: dict) -> dict:
    """Metrics as Python numbers; the load becomes "balance", max over mean load in the worst layer (1 is even)."""
    record = {k: float(v) for k, v in metrics.items() if k != "load"}
    load = metrics["load"].asnumpy().astype(np.float64)
    if load.size:
        record["balance"] = float((load.max(1) / np.maximum(load.mean(1), 1e-9)).max())
    return record


def mean_loss(evaluate: Callable, params: Any, batches: Any) -> dict:
    """Mean metrics of ``make_eval_step``'s function over some batches of equal size."""
    records = [plain(evaluate(params, batch)) for batch in batches]
    if not records:
        raise ValueError("no batch to evaluate on; the held-out split is smaller than one batch")
    return {k: float(np.mean([r[k] for r in records])) for k in records[0]}
