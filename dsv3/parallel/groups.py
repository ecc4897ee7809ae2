"""Names of groups of ranks that say who is in them, so that a dumped or exported program can be read without its process."""
from __future__ import annotations

import itertools
import threading

PREFIX = "dsv3_"


def group_name(ranks: tuple[int, ...]) -> str:
    """``dsv3_FIRST_COUNTxSTRIDE...``, the fastest axis first: (0, 1, 4, 5) is dsv3_0_2x1_2x4.

    ranks: those of ``Mesh.group``, a product of evenly spaced axes. Raises ValueError for others.
    """
    axes, starts = [], list(ranks)
    while len(starts) > 1:
        stride = starts[1] - starts[0]
        n = 1 + sum(1 for _ in itertools.takewhile(lambda i: starts[i] - starts[i - 1] == stride, range(1, len(starts))))
        axes.append(f"{n}x{stride}")
        starts = starts[::n]
    name = PREFIX + "_".join([str(ranks[0]), *axes])
    if group_ranks(name) != tuple(ranks):
        raise ValueError(f"the ranks {list(ranks)} are not evenly spaced along axes")
    return name


def group_ranks(name: str) -> tuple[int, ...] | None:
    """The ranks of a group by its name, or None when the name is not one of ours."""
    if not name.startswith(PREFIX):
        return None
    first, *axes = name.removeprefix(PREFIX).split("_")
    ranks = [int(first)]
    for axis in axes:
        n, stride = map(int, axis.split("x"))
        ranks = [r + i * stride for i in range(n) for r in ranks]
    return tuple(ranks)


_stand_in = threading.local()


def stand_for(rank: int) -> None:
    """From now on this thread is that rank, in a process that plays all of them."""
    _stand_in.rank = rank


def stands() -> bool:
    """Whether this thread stands for a rank, so that there is nobody to form groups with."""
    return hasattr(_stand_in, "rank")


def own_rank() -> int:
    """The rank of this process, or that for which this thread stands."""
    if stands():
        return _stand_in.rank
    from mindspore.communication import get_rank

    return get_rank()
