"""A pipeline that Python drives: a few compiled graphs a chunk, run in the order of the schedule, with transfers between.

A forward graph gives the next chunk its input. A backward graph computes the chunk's forward again from its saved input,
differentiates it and adds the gradients to float32 sums in place; so of each micro-batch in flight a stage keeps the
chunk's input alone (full recomputation), and neither the number nor the size of the graphs grows with the micro-batches.
The last chunk's backward is its forward too. Without stages this is gradient accumulation. An evaluation makes the forward
passes of the same table, by graphs of their own, which also say what they find.

Gradients follow ``parallel.shard``: the sum of all ranks' objectives is differentiated. A chunk's objective is its balance
losses, the last one's the whole loss, over the ranks of the stage; what later chunks make of its output y enters as y . dy.
"""
from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from ..config import Config
from ..model import balance_of, entered, layers, make_block, score
from ..nn.vocab import embed
from ..optim import is_state
from ..transform import builder, jit, picker, value_and_grad
from ..tree import flatten, paths, tree_map_with_path
from .schedules import Pipeline, Task, tasks, timeline
from .shard import Placement, group_of, on_cpu, psum
from .stages import Chunk, chunks, held, moe_rows, part_of, reads_embedding
from .update import make_reduce


@dataclass(frozen=True)
class Part:
    """A chunk on its stage. forward(leaves, biases, micro) -> y; not of the last chunk. evaluate(leaves, biases, micro, so_far)
    -> (found, y), (found,) of the last. backward(leaves, biases, sums, dy, micro, weight, so_far) -> (found,) or (found, dx).
    leaves: those of the chunk, then its input x unless it is the first."""

    chunk: Chunk
    leaves: tuple[int, ...]  # its places in the stage's flat leaves
    biases: tuple[int, ...]
    nothing: dict[str, np.ndarray]  # what is found before the first micro-batch
    forward: Callable
    evaluate: Callable
    backward: Callable

    def own(self, leaves: tuple, biases: tuple, x: Tensor | None) -> tuple[tuple, tuple]:
        """The first arguments of its graphs, of the stage's leaves and the chunk's input."""
        return tuple(leaves[i] for i in self.leaves) + (() if x is None else (x,)), tuple(biases[i] for i in self.biases)


def accumulated(params: Any, cfg: Config, placement: Placement | None, micro_batches: int, **pieces: Any) -> Callable:
    """``run(leaves, biases, sums, micros, weight) -> found``: the gradients of all micro-batches, added to ``sums``.

    params: a rank's own (``stages.own``). leaves, biases: flat, in their order, the router biases apart; sums: float32, like
    leaves. micros: the rank's rows in parts that know the denominators of the whole. weight: of the MTP loss, float32.
    pieces: route, balance, recompute and mtp_prenorm of ``loss_fn``. found: of each chunk of the stage {"losses": [3] float32,
    main, MTP and balance, and, where it has MoE blocks, "load": [``stages.moe_rows``, E] int32}.
    """
    parts, walk = _parts(params, cfg, placement, **pieces), _walker(params, cfg, placement, micro_batches)

    def run(leaves: tuple, biases: tuple, sums: tuple, micros: Sequence[dict], weight: Any) -> tuple:
        found = {c: part.nothing for c, part in parts.items()}

        def work(task: Task, kept: dict) -> None:
            c, m, part = task.chunk, task.micro, parts[task.chunk]
            own, states = part.own(leaves, biases, kept.get(("x", c, m)))
            if task.kind == "backward":
                dy = None if part.chunk.last else kept.pop(("dy", c, m))
                found[c], *dx = part.backward(own, states, tuple(sums[i] for i in part.leaves), dy, micros[m], weight, found[c])
                if not part.chunk.first:
                    del kept["x", c, m]
                    kept["dy", c - 1, m] = dx[0]
            elif not part.chunk.last:
                kept["x", c + 1, m] = part.forward(own, states, micros[m])

        walk(work, micros)
        return tuple(found.values())

    return run


def evaluated(params: Any, cfg: Config, placement: Placement | None, micro_batches: int, **pieces: Any) -> Callable:
    """``run(leaves, biases, micros) -> found``: what ``accumulated`` finds, by forward passes alone; its arguments likewise."""
    parts = _parts(params, cfg, placement, recompute=False, **pieces)
    walk = _walker(params, cfg, placement, micro_batches, backward=False)

    def run(leaves: tuple, biases: tuple, micros: Sequence[dict]) -> tuple:
        found = {c: part.nothing for c, part in parts.items()}

        def work(task: Task, kept: dict) -> None:
            c, m, part = task.chunk, task.micro, parts[task.chunk]
            found[c], *y = part.evaluate(*part.own(leaves, biases, kept.pop(("x", c, m), None)), micros[m], found[c])
            if not part.chunk.last:
                kept["x", c + 1, m] = y[0]

        walk(work, micros)
        return tuple(found.values())

    return run


def _parts(params: Any, cfg: Config, placement: Placement | None, **pieces: Any) -> dict[int, Part]:
    mine, share = chunks(cfg, placement), 1 / len(placement.group("all")) if placement else 1.0
    return {chunk.index: _part(chunk, params, mine, cfg, placement, share, **pieces) for chunk in mine}


def _walker(params: Any, cfg: Config, placement: Placement | None, micro_batches: int, backward: bool = True) -> Callable:
    """``walk(work, micros)``: this stage's part of the schedule, or of its forward passes, in order. Transfers are made here;
    ``work(task, kept)`` does the rest. kept: {(what, chunk, micro): tensor}, what is made and not used up."""
    line = placement.pipeline if placement else Pipeline()
    pipe, stage = (placement.mesh.pipe, placement.mesh.coords(placement.rank)["pipe"]) if placement else (1, 0)
    actions = timeline(line.schedule, pipe, line.virtual, micro_batches)
    program = tasks(stage, [action for action in actions if backward or action.kind == "forward"])
    peers = {task.peer for task in program if task.what}
    if pipe > 1:
        meet(placement, peers)
    channels = {peer: channel(placement, peer) for peer in peers}
    # As ``model.computable`` makes it.
    dtype = ms.float32 if on_cpu() else next(leaf.dtype for path, leaf in paths(params) if not is_state(path))

    def walk(work: Callable[[Task, dict], None], micros: Sequence[dict]) -> None:
        kept: dict[tuple[str, int, int], Tensor] = {}
        rows, length = micros[0]["tokens"].shape
        shape = (rows, length // len(placement.group("residual_seq")) if placement else length, cfg.hidden_size)
        for task in program:
            if task.kind == "send":
                channels[task.peer][0](kept.pop((task.what, task.chunk, task.micro)))
            elif task.kind == "receive":
                kept[task.what, task.chunk, task.micro] = channels[task.peer][1](shape, dtype)
            else:
                work(task, kept)

    return walk


def check(cfg: Config, placement: Placement, micro_batches: int) -> None:
    """Raises ValueError for a schedule that cannot run, layers that do not fit, and a stage that would have nothing to do."""
    line, mesh = placement.pipeline, placement.mesh
    timeline(line.schedule, mesh.pipe, line.virtual, micro_batches)
    for stage in range(mesh.pipe):
        if not flatten(held(cfg, replace(placement, rank=mesh.rank(pipe=stage)))[0]):
            raise ValueError(f"mesh {mesh}: stage {stage} would hold nothing at all; give it a layer: {line}")


# -- the graphs of a chunk ---------------------------------------------------------------------------------------------
def _part(chunk: Chunk, params: Any, mine: tuple[Chunk, ...], cfg: Config, placement: Placement | None, share: float, *,
          route: Callable | None, balance: Callable | None, recompute: bool | tuple[int, ...], mtp_prenorm: bool) -> Part:
    rows, one_block = len(moe_rows(chunk, cfg)), make_block(cfg, route, balance)
    first, last, start = chunk.first, chunk.last, chunk.layers[0] if chunk.layers else 0
    embeds = chunk.embeds(cfg)
    nothing = {"losses": np.zeros(3, np.float32)} | ({"load": np.zeros((rows, cfg.n_routed_experts), np.int32)} if rows else {})
    state, count = [is_state(path) for path, _ in paths(params)], itertools.count()
    tree = part_of(tree_map_with_path(lambda path, leaf: next(count), params), chunk, mine, cfg)  # of the leaves' numbers
    numbers = flatten(tree)
    leaves, biases = (tuple(state[:i].count(kind) for i in numbers if state[i] == kind) for kind in (False, True))
    if not numbers:  # no-op layers only
        return Part(chunk, (), (), nothing, lambda own, *_: own[0], lambda own, states, micro, so_far: (so_far, own[0]),
                    lambda own, states, sums, dy, *rest: (rest[-1], dy))
    tree, flags = (tree if first else tree | {"x": -1}), [state[i] for i in numbers] + ([] if first else [False])
    build, pick = builder(tree, flags), picker(tree, [not flag for flag in flags])

    def through(params, micro):
        """(y, embedding of the tokens or None, loads, balance losses) of the main layers."""
        embedded = embed(params["embed"], micro["tokens"]) if embeds else None
        x = embedded if first else params["x"]
        x, loads, aux = layers(params["layers"], x, micro, one_block, recompute, cfg, start)
        return x, embedded, loads, aux

    def scored(params, micro, weight):
        """(y, this rank's share of the losses, what is found of the micro-batch) of all that the chunk has."""
        params = entered(params, cfg)
        y, embedded, loads, aux = through(params, micro)
        main_loss, mtp_loss = Tensor(0.0, ms.float32), Tensor(0.0, ms.float32)
        if last:
            main_loss, mtp_loss, more, more_aux = score(params, y, embedded, micro, one_block, recompute, cfg, mtp_prenorm)
            loads, aux = loads + more, aux + more_aux
        balance_loss = balance_of(aux, micro, cfg)
        found = {"losses": ops.stack((main_loss, mtp_loss, balance_loss))}
        if rows:
            found["load"] = ops.stack(loads)
        return y, (main_loss + weight * mtp_loss + balance_loss) * share, found

    def objective(params, dy, micro, weight):
        y, total, found = scored(params, micro, weight)
        if not last:
            total = total + ops.sum(y.astype(ms.float32) * ops.stop_gradient(dy).astype(ms.float32))
        return total, found

    def added(so_far, found):
        total = {"losses": so_far["losses"] + found["losses"]}
        if rows:
            total["load"] = so_far["load"] + found["load"]
        return total

    reduce = make_reduce(cfg, placement, leaves)
    with_gradients = value_and_grad(objective, has_aux=True)

    @jit
    def forward(leaves, biases, micro):
        return through(entered(build(leaves, biases), cfg), micro)[0]

    @jit
    def evaluate(leaves, biases, micro, so_far):
        y, _, found = scored(build(leaves, biases), micro, 0.0)
        return (added(so_far, found),) if last else (added(so_far, found), y)

    @jit
    def backward(leaves, biases, sums, dy, micro, weight, so_far):
        (_, found), tree = with_gradients(build(leaves, biases), dy, micro, weight)
        grads, done = pick(tree), ()
        own = reduce(grads[:len(sums)])
        for i in range(len(sums)):
            done = done + (ops.assign_add(sums[i], own[i].astype(ms.float32)),)
        total = added(so_far, found)
        total["losses"] = ops.depend(total["losses"], done)
        return (total,) if first else (total, grads[len(sums)])

    return Part(chunk, leaves, biases, nothing, forward, evaluate, backward)


# -- communication -----------------------------------------------------------------------------------------------------
@constexpr
def _meet(groups: tuple) -> int:
    for ranks in groups:
        group_of(ranks)
    return 0


def meet(placement: Placement, peers: set[int]) -> None:
    """Make the groups that join stages, in one order on all ranks: later, stages would come to them in orders of their own.

    In a graph, as every group is made: what is replayed needs none.
    """
    here, line = placement.rank, placement.mesh.group(placement.rank, "pipe")
    groups = {tuple(sorted((here, line[peer]))) for peer in peers} | {line, placement.group("world")}
    if here in (line[0], line[-1]):
        groups.add((line[0], line[-1]))
    groups = tuple(sorted(groups))

    @jit
    def meeting(one):
        _meet(groups)
        return one

    meeting(np.ones(1, np.float32))


@constexpr
def _sender(pair: tuple, to: int):
    """On the CPU, which has no Send, and Broadcast in the whole world only, a sum with the receiver's zeros."""
    group = group_of(pair)
    if on_cpu():
        return ops.AllReduce(ops.ReduceOp.SUM, group)
    return ops.Send(0, pair.index(to), group, group).add_prim_attr("dst_global_rank", to)  # as MindSpore's own passes say it


@constexpr
def _receiver(pair: tuple, source: int, shape: tuple, dtype: Any):
    group = group_of(pair)
    if on_cpu():
        return ops.AllReduce(ops.ReduceOp.SUM, group)
    return ops.Receive(0, pair.index(source), shape, dtype, group, group).add_prim_attr("src_global_rank", source)


@constexpr
def _start(shape: tuple, dtype: Any) -> Tensor:
    return Tensor(np.zeros(shape if on_cpu() else 1, np.float32), dtype=dtype)


@functools.cache  # the same graphs for training and evaluation
def channel(placement: Placement, peer: int) -> tuple[Callable, Callable]:
    """(send(x), receive(shape, dtype) -> x) between this rank and the one of stage ``peer`` at the same place in it."""
    there, graphs = placement.mesh.group(placement.rank, "pipe")[peer], {}
    pair = tuple(sorted((placement.rank, there)))

    @jit
    def send(x):
        return ops.depend(ops.ones((1,), ms.float32), _sender(pair, there)(x))

    def receive(shape: tuple[int, ...], dtype: Any) -> Tensor:
        if shape not in graphs:
            @jit
            def receiving(one):
                return _receiver(pair, there, shape, dtype)(ops.depend(_start(shape, dtype), one))

            graphs[shape] = receiving
        return graphs[shape](np.ones(1, np.float32))

    return send, receive


@constexpr
def _adder(ranks: tuple):
    return ops.AllReduce(ops.ReduceOp.SUM, group_of(ranks))


def embedding_joiner(params: Any, cfg: Config, placement: Placement | None) -> Callable:
    """``join(sums)``: where the first and the last stage both hold the embedding, both get the sum of its gradients, in place."""
    mine = chunks(cfg, placement)
    is_end = mine[0].first != mine[-1].last
    if not (is_end and any(chunk.embeds(cfg) for chunk in mine) and reads_embedding(cfg)):
        return lambda sums: None
    line, names = placement.mesh.group(placement.rank, "pipe"), [path for path, _ in paths(params) if not is_state(path)]
    place, ends = names.index("embed"), (line[0], line[-1])

    @jit
    def join(total):
        return ops.assign(total, _adder(ends)(total))

    return lambda sums: join(sums[place])


@functools.cache
def reporter(cfg: Config, placement: Placement | None) -> Callable:
    """``report(found, weight) -> metrics`` of the whole batch on every rank, from what ``accumulated`` found on each stage."""
    own = tuple(row for chunk in chunks(cfg, placement) for row in moe_rows(chunk, cfg))
    n = cfg.num_moe_layers + cfg.num_nextn_predict_layers
    source = Tensor(np.array([own.index(row) if row in own else len(own) for row in range(n)], np.int32))

    @jit
    def report(found, weight):
        losses, E = found[0]["losses"], cfg.n_routed_experts
        for i in range(1, len(found)):
            losses = losses + found[i]["losses"]
        losses = psum(losses, "@pipe")
        load = ops.zeros((0, E), ms.int32)
        if n:  # one more row, of zeros, for those of other stages
            load = ops.gather(ops.cat(loads_of(found) + (ops.zeros((1, E), ms.int32),), 0), source, 0)
            load = psum(ops.depend(load, losses), "@pipe")  # both meet the same ranks: one order
        return {"loss": losses[0] + weight * losses[1] + losses[2], "main_loss": losses[0], "mtp_loss": losses[1],
                "balance_loss": losses[2], "load": load}

    return report


def loads_of(found: tuple) -> tuple:
    """The loads of a stage's chunks that have MoE blocks, [blocks, E] int32 each. For graph code."""
    loads = ()
    for one in found:
        if "load" in one:
            loads = loads + (one["load"],)
    return loads
