"""What ``dsv3 train`` does differently on a mesh: join the other ranks, and share the files of the run's folder with them."""
from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OF_MESH = ("zero", "shard_size", "experts", "dispatch", "node", "sequence_parallel", "no_vocab_parallel", "pipeline", "virtual",
           "layers", "noop_layers", "no_shared_storage")


def add(p: argparse.ArgumentParser) -> None:
    """The options."""
    g = p.add_argument_group("cluster", "one process a rank, started by msrun; the guide is docs/launch.md")
    g.add_argument("--mesh", help="degrees of parallelism, as data=2,model=2,expert=2 (also pipe, context), or the name of a "
                                  "layout of dsv3 plan; default: this process alone")
    g.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0, help="share out among the ranks with copies: 1 the "
                                                                             "optimiser's state, 2 and gradients, 3 and params")
    g.add_argument("--shard-size", type=int, help="over how many copies --zero shares out; default: all")
    g.add_argument("--experts", choices=("tensor", "extend", "whole"), default="tensor",
                   help="cut each expert over model; spread whole experts over expert * model; or keep them whole over expert")
    g.add_argument("--dispatch", choices=("gather", "alltoall", "two_level"),
                   help="how tokens meet their experts; default: what sends the fewest bytes")
    g.add_argument("--node", type=int, help="how many neighbours of the ranks that share the experts sit in one node, for an "
                                            "all-to-all in two levels; default: unknown")
    g.add_argument("--sequence-parallel", action="store_true", help="cut rows over model between the parallel products")
    g.add_argument("--no-vocab-parallel", action="store_true", help="copy embedding and head over model")
    g.add_argument("--pipeline", choices=("1f1b", "gpipe", "interleaved", "dualpipev"), default="1f1b",
                   help="the schedule, where the mesh has pipe")
    g.add_argument("--virtual", type=int, default=1, help="chunks of each pipeline stage")
    g.add_argument("--layers", default="even", help="main layers of each stage or chunk, as 16,15,15,15")
    g.add_argument("--noop-layers", help="positions of no-op layers in an even split, as 61,62,63; default: none")
    g.add_argument("--no-shared-storage", action="store_true",
                   help="the nodes do not share the file system of --out: every node keeps what its own ranks write")
    g.add_argument("--stall-timeout", type=float, default=1800.0, help="seconds without any progress after which the run ends")
    p.set_defaults(without_mesh={name: p.get_default(name) for name in OF_MESH})


def join(args: argparse.Namespace, cfg: Any) -> tuple[Any, Any]:
    """(world, placement) of this process: alone and None without --mesh. Waits for the other ranks.

    Raises ValueError when mesh, rules and processes do not fit together, ConnectionError when ranks do not come.
    """
    from ..parallel import launch
    from ..parallel.mesh import Mesh
    from ..parallel.pipeline import check
    from ..parallel.rules import make_rules
    from ..parallel.schedules import Pipeline
    from ..parallel.shard import Placement

    if args.mesh is None:
        given = [name for name, value in args.without_mesh.items() if getattr(args, name) != value]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is of a cut model: give --mesh too, or leave it out")
        return launch.ALONE, None
    mesh = Mesh.parse(args.mesh)
    rules = make_rules(sequence_parallel=args.sequence_parallel, experts=args.experts, zero=args.zero,
                       vocab_parallel=not args.no_vocab_parallel, shard_size=args.shard_size, dispatch=args.dispatch,
                       node=args.node)
    layers = args.layers if args.layers == "even" else _numbers(args.layers, "--layers")
    noop = _numbers(args.noop_layers, "--noop-layers") if args.noop_layers else ()
    place = Placement(mesh, rules, 0, Pipeline(args.pipeline, args.virtual, layers, noop))
    check(cfg, place, args.accumulate)
    if args.batch_size % (mesh.data * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by data={mesh.data} times --accumulate "
                         f"{args.accumulate}; it counts the rows of all ranks together")
    world = launch.start(mesh, shared=not args.no_shared_storage, stalled=args.stall_timeout)
    return world, dataclasses.replace(place, rank=world.rank)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{option} {text!r}: expected whole numbers with commas between them, as 61,62,63")
    return tuple(map(int, words))


def rows(placement: Any) -> tuple[int, int]:
    """(i, n): this rank takes the i-th of n parts of every batch; ranks that share rows take the same."""
    return (0, 1) if placement is None else (placement.index("batch"), len(placement.group("batch")))


def once(world: Any, work: Callable[[], Any], what: str) -> None:
    """Let the rank that leads a folder work on its files, the others wait."""
    from ..checkpoint.sharded import together

    together(world.gather, lambda: work() if world.leads else None, what)


def check_shared(world: Any, out: Path) -> None:
    """Raises ValueError when ranks do not see what the first one writes, unless they said so."""
    if world.size == 1 or not world.shared:
        return
    number = secrets.randbelow(1 << 24)
    number = int(world.gather(number)[0])
    token = out / f".shared-{number}"
    if world.rank == 0:
        token.touch()
    world.gather(0.0)
    deadline = time.monotonic() + 60  # as long as a network file system may keep an old listing
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [rank for rank, sees in enumerate(world.gather(float(token.exists()))) if not sees]
    if world.rank == 0:
        token.unlink()
    if blind:
        raise ValueError(f"rank {', '.join(map(str, blind))}: the file that rank 0 has made in {out} is not there; put --out on "
                         f"a file system that all nodes share, or give --no-shared-storage")


# -- params and checkpoints --------------------------------------------------------------------------------------------
def partition(placement: Any) -> dict[str, Any]:
    """What ``make_train_step`` and ``make_eval_step`` are told."""
    return {} if placement is None else {"mesh": placement.mesh, "rules": placement.rules, "pipeline": placement.pipeline}


def describe(world: Any, placement: Any, params: Any) -> str:
    """Where this process is and what it holds."""
    from ..tree import size

    if placement is None:
        return ""
    return (f"; rank {world.rank} of {world.size} (process {os.getpid()} on {socket.gethostname()}), mesh {placement.mesh}, "
            f"holds {size(params):,}")


def fresh(placement: Any, cfg: Any, optimizer: Any, seed: int, dtype: str) -> tuple[Any, dict]:
    """(params, opt_state) of step 0, this rank's part."""
    from ..checkpoint import sharded
    from ..model import init
    from ..parallel.stages import held
    from ..parallel.update import init_state

    if placement is None:
        params = init(cfg, seed, dtype)
        return params, optimizer.init(params)
    params = sharded.draw_part(cfg, placement, seed, dtype)
    return params, init_state(optimizer, params, held(cfg, placement)[0], placement)


def latest(world: Any, placement: Any, out: Path) -> Path | None:
    """The newest checkpoint that all ranks can read."""
    from ..checkpoint import sharded, training

    if placement is None:
        return training.latest_training(out)
    return sharded.latest_sharded(out, placement=placement, gather=world.gather, share=world.share)


def load(placement: Any, path: Path) -> tuple[Any, dict, dict, Any]:
    """(params, opt_state, meta, cfg) of a checkpoint, this rank's part."""
    from ..checkpoint import sharded, training

    return training.load_training(path) if placement is None else sharded.load_sharded(path, placement)


def save(world: Any, placement: Any, out: Path, step: int, params: Any, opt_state: dict, meta: dict, cfg: Any, keep: int) -> None:
    """Write a checkpoint, all ranks together."""
    from ..checkpoint import sharded, training

    if placement is None:
        training.save_training(out, step, params, opt_state, meta, cfg=cfg, keep=keep)
    else:
        sharded.save_sharded(out, step, params, opt_state, meta, cfg=cfg, placement=placement, gather=world.gather,
                             node=world.size if world.shared else world.local_size, leads=world.leads, keep=keep)


# -- the loop ----------------------------------------------------------------------------------------------------------
def announced(world: Any, feed: Iterator[dict], doing: str = "waiting for data") -> Iterator[dict]:
    """The batches, the watch being told when one is waited for."""
    while True:
        world.watch.at(doing)
        try:
            batch = next(feed)
        except StopIteration:
            return
        yield batch


def logger(world: Any, placement: Any, report: Callable[[dict], None] | None) -> Callable[[dict], None]:
    """``log`` of a rank: a line of its own for each step, and rank 0's report; tokens of all ranks."""
    from ..report import summary

    parts = rows(placement)[1]

    def log(record: dict) -> None:
        if "tokens" in record:
            record = record | {"tokens": record["tokens"] * parts}
        if placement is not None:
            held = {k: v for k, v in record.items() if k.startswith("eval_")}
            text = summary(record) if not held else ", ".join(f"{k} {v:.3f}" for k, v in held.items())
            print(f"rank {world.rank}: step {record['step']}: {text}", file=sys.stderr, flush=True)
        if report is not None:
            report(record)

    return log
