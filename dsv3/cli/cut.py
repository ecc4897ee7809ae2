"""What ``dsv3 generate`` and ``dsv3 serve`` do differently on a mesh: one model cut over ranks, of which rank 0 alone talks."""
from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cluster


def add(p: argparse.ArgumentParser) -> None:
    """The options."""
    g = p.add_argument_group("cluster", "one process a rank, started by msrun; the guide is docs/generate.md")
    g.add_argument("--mesh", help="cut the model over ranks, as model=8 or data=4,model=2,expert=4: heads, ffn and vocabulary "
                                  "over model, experts over expert, which divides data; along the rest of data the ranks compute "
                                  "the same. Default: this process alone")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a mesh. connections: of ``parallel.lead``."""

    world: Any
    placement: Any
    connections: tuple

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.world.rank == 0


def join(args: argparse.Namespace) -> Ranks | None:
    """Wait for the other ranks; None without --mesh. Signals to end any rank go to rank 0 from now on.

    Raises ValueError for a mesh that decoding cannot use and for other processes than its ranks, ConnectionError when ranks do
    not come.
    """
    from ..parallel import launch, lead
    from ..parallel.mesh import Mesh
    from ..parallel.rules import make_rules
    from ..parallel.shard import Placement

    if args.mesh is None:
        return None
    mesh = Mesh.parse(args.mesh)
    if mesh.pipe > 1 or mesh.context > 1:
        raise ValueError(f"--mesh {args.mesh}: decoding cuts no layers (pipe={mesh.pipe}) and no rows (context={mesh.context}); "
                         f"give model, and data with expert")
    if os.environ.get("MS_ROLE") == "MS_SCHED":  # it ends when all ranks have, and msrun calls anything else a failure
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    world = launch.start(mesh, stalled=float("inf"))  # a service may be idle for as long as it likes
    connections = lead.meet(world)
    if world.rank == 0:
        lead.heed_signals(connections)
    else:
        lead.pass_on_signals(connections[0])
    world.watch.at("loading")
    return Ranks(world, Placement(mesh, make_rules(), world.rank), connections)


def load(folder: Path, ranks: Ranks, mtp: bool) -> tuple[Any, Any]:
    """(params, cfg): this rank's slices, of a run's newest checkpoint that all ranks can read, or of a folder of weights."""
    from ..checkpoint import sharded
    from ..checkpoint.part import load_part

    world, weights = ranks.world, folder
    if (folder / "checkpoints").is_dir():
        weights = sharded.latest_sharded(folder, placement=ranks.placement, gather=world.gather, share=world.share) or folder
    params, cfg = load_part(weights, ranks.placement, mtp=mtp, share=world.share)
    print(f"{weights}{cluster.describe(world, ranks.placement, params)}", file=sys.stderr, flush=True)
    return params, cfg


def quantized(params: Any, cfg: Any, mode: str | None, ranks: Ranks | None) -> Any:
    """Params with int8 matrices if there is a mode; a rank's slices too."""
    from ..checkpoint.sharded import parts
    from ..checkpoint.shards import extents
    from ..quant import quantize

    if mode is None:
        return params
    shapes = None if ranks is None else {part.path: extents(part.box) for part in parts(cfg, ranks.placement)}
    return quantize(params, cfg, mode, shapes=shapes)


def make_engine(params: Any, cfg: Any, ranks: Ranks | None, **settings: Any) -> Any:
    """The engine that answers for all ranks, on rank 0 or without any."""
    from ..engine import Engine
    from ..parallel.lead import Lead

    if ranks is None:
        return Engine(params, cfg, **settings)
    ranks.world.watch.at("answering")
    return Lead(lambda **given: Engine(params, cfg, mesh=ranks.placement.mesh, **given), settings, ranks.connections)


def follow(params: Any, cfg: Any, ranks: Ranks) -> None:
    """Compute as rank 0 says, until it says that it is all."""
    from ..engine import Engine
    from ..parallel import lead

    ranks.world.watch.at("answering")
    lead.follow(lambda **given: Engine(params, cfg, mesh=ranks.placement.mesh, **given), ranks.connections[0])
    ranks.world.watch.close()


def leave(engine: Any, ranks: Ranks | None) -> None:
    """Let the other ranks go, where the engine is one of several. Those inside of a step that was broken off end by the watch."""
    if ranks is not None and engine.close():
        ranks.world.watch.close()
