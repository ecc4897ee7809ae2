"""Start of a process that is one rank of a mesh: communication, the watch over the others, numbers from rank to rank.

MindSpore's ``msrun`` starts the processes, on one node or many, and says by environment variables who is who.
"""
from __future__ import annotations

import dataclasses
import os
import shlex
import socket
import sys
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.communication import get_group_size, get_local_rank, get_rank, init

from . import watch
from .mesh import Mesh

# Seconds that a rank waits for the others, unless the environment says otherwise. A rank that dies is noticed at once by the
# watch; these are for slow ones, and the first step waits for the slowest compilation of all.
PATIENCE = {
    "MS_NODE_TIMEOUT": "1800",  # a collective of the CPU's; MindSpore's 30 s end a run in which one rank writes a large file
    "HCCL_CONNECT_TIMEOUT": "1800",  # Ascend, until the connections of a group stand; its own 120 s are too few for 671B
}


@dataclass(frozen=True)
class World:
    """This process among all: its rank, and on its node. leads: whether it is the one that makes the files of its folder."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    shared: bool
    watch: watch.Watch

    @property
    def leads(self) -> bool:
        """Whether this rank makes the folders that ranks share: rank 0, or without a shared file system the first of a node."""
        return (self.rank if self.shared else self.local_rank) == 0

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): which part of work on files that any rank sharing the folder could do is this one's."""
        return (self.rank, self.size) if self.shared else (self.local_rank, self.local_size)

    def gather(self, number: float) -> np.ndarray:
        """Every rank gives a number, exact in float32, and gets those of all, [size] float64. All ranks must call it."""
        if self.size == 1:
            return np.array([number], np.float64)
        row = np.zeros(self.size, np.float32)
        row[self.rank] = number
        return ops.AllReduce()(Tensor(row)).asnumpy().astype(np.float64)  # a sum: all that the CPU has


ALONE = World(0, 1, 0, 1, True, watch.Watch(lambda doing: None, lambda: None))


def command(mesh: Mesh) -> str:
    """How to start the ranks of a mesh on one node."""
    n = mesh.size
    return f"msrun --worker_num={n} --local_worker_num={n} --join=True --log_dir=logs python -m dsv3 {shlex.join(sys.argv[1:])}"


def check_environment(mesh: Mesh) -> None:
    """Raises ValueError unless msrun (or a rank table) started as many processes as the mesh has ranks."""
    if "MS_ROLE" not in os.environ and "RANK_TABLE_FILE" not in os.environ:
        raise ValueError(f"mesh {mesh} has {mesh.size} ranks, and this is a single process; start one process a rank:\n"
                         f"  {command(mesh)}")
    started = os.environ.get("MS_WORKER_NUM") or os.environ.get("RANK_SIZE")
    if started and int(started) != mesh.size:
        raise ValueError(f"mesh {mesh} has {mesh.size} ranks, and {started} processes were started; make --mesh multiply to "
                         f"{started}, or start {mesh.size} (--worker_num={mesh.size})")


def start(mesh: Mesh, *, shared: bool = True, stalled: float = 1800.0) -> World:
    """Join the other ranks; returns when all are there. In msrun's scheduler process it returns never: that ends with the run.

    shared: whether all ranks see the same files. stalled: seconds without any progress after which the run is ended. Raises
    ValueError when the processes do not make the mesh, ConnectionError when some do not come within msrun's
    --cluster_time_out.
    """
    check_environment(mesh)
    if os.environ.get("MS_ROLE") != "MS_SCHED":  # which must not be patient, because msrun waits for its end
        for name, seconds in PATIENCE.items():
            os.environ.setdefault(name, seconds)
    device = ms.get_context("device_target")
    try:
        init("mccl" if device == "CPU" else "hccl")
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        waited = os.environ.get("MS_TOPO_TIMEOUT", "?")
        raise ConnectionError(f"the {mesh.size} ranks did not come together, or not stay so ({reason.strip()}); all nodes must "
                              f"start within --cluster_time_out ({waited} s): see the logs of the nodes that did not") from None
    if get_group_size() != mesh.size:
        raise ValueError(f"mesh {mesh} has {mesh.size} ranks, and {get_group_size()} processes were started")
    world = World(get_rank(), mesh.size, 0, mesh.size, shared, ALONE.watch)
    world = dataclasses.replace(world, **_on_node(world))
    return dataclasses.replace(world, watch=_watch(world, stalled))


def _on_node(world: World) -> dict[str, int]:
    """local_rank and local_size. Raises ValueError, without a shared file system, for nodes that differ in size or are mixed."""
    local = world.gather(int(os.environ.get("DEVICE_ID", get_local_rank())))  # msrun numbers the processes of a node
    size = int(local.max()) + 1
    if not world.shared and not np.array_equal(local, np.arange(world.size) % size):
        raise ValueError(f"the ranks have the numbers {local.astype(int).tolist()} on their nodes; without a shared file system "
                         f"every node must have equally many, one after another: give msrun --node_rank")
    return {"local_rank": int(local[world.rank]), "local_size": size}


def _watch(world: World, stalled: float) -> watch.Watch:
    """Rank 0 listens; where, it tells by numbers."""
    server = watch.listen() if world.rank == 0 else None
    address = tell_address(world, server)
    made = watch.serve(server, world.size, stalled) if server else watch.join(world.rank, address)
    world.gather(0.0)  # all have joined
    return made


def tell_address(world: World, server: socket.socket | None) -> tuple[str, int]:
    """Where rank 0's ``server`` listens; the others give None. All ranks must call it."""
    here = [*map(int, _own_address().split(".")), server.getsockname()[1]] if server else [0] * 5
    *octets, port = (int(world.gather(number)[0]) for number in here)
    return ".".join(map(str, octets)), port


def _own_address() -> str:
    """The IPv4 address by which the other nodes reach this one: that of the way to msrun's master."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MS_SCHED_HOST", "127.0.0.1"), 9))  # sends nothing
        return probe.getsockname()[0]
