"""The mesh: how the ranks of a cluster are named by coordinates, and which of them form a group along an axis.

A cluster is described with the field's words: ``data``, ``pipe``, ``expert``, ``model`` and ``context`` parallelism.
``expert`` is no factor of its own but divides ``data``: the seeds' layout for 8 NPUs is dp2 tp2 pp2 ep2, and 2 * 2 * 2
is 8 already; Megatron's ``expert_model_parallel_size`` lies inside the data-parallel ranks in the same way. A dense
weight is replicated over all ``data`` ranks, an expert over every ``data / expert``-th of them, and a token meets all
experts inside one group of ``expert`` ranks.

The device matrix is (pipe, replica, expert, context, model), slowest first, with replica = data / expert; "data" stands
for the pair (replica, expert). Neighbouring ranks sit in one node, so the axes that talk most vary fastest: ``model``
(several collectives a block, each waited for), then ``context`` (keys and values of each attention), then ``expert``
(two all-to-alls a MoE block), then ``replica`` (gradients, once a step); ``pipe`` is outermost because stages exchange
one activation, and because MindSpore gives every stage a contiguous range of ranks.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import prod

AXES = ("pipe", "replica", "expert", "context", "model")  # the device matrix, slowest axis first
MERGED = {"data": ("replica", "expert")}


@dataclass(frozen=True)
class Mesh:
    """Degrees of parallelism; the world has pipe * data * context * model ranks, because ``expert`` divides ``data``.

    Raises ValueError, with the numbers and a remedy, for degrees below 1 and for an ``expert`` that does not divide.
    """

    data: int = 1  # replicas of the dense weights, each with its own rows of the batch
    pipe: int = 1  # stages that the layers are dealt to
    expert: int = 1  # of the data ranks, how many neighbours share out the experts
    model: int = 1  # tensor parallelism: heads, ffn and vocabulary are cut
    context: int = 1  # parts of a row

    def __post_init__(self) -> None:
        for f in fields(self):
            n = getattr(self, f.name)
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"mesh: {f.name}={n!r}; it must be an integer of at least 1")
        if self.data % self.expert:
            above = -(-self.data // self.expert) * self.expert
            raise ValueError(f"mesh: expert={self.expert} does not divide data={self.data}; the experts are spread over the "
                             f"data-parallel ranks: pick expert from {divisors(self.data)}, or data={above}")

    @property
    def axes(self) -> dict[str, int]:
        """The device matrix: axis -> size, slowest first. "data" is not in it; see ``expand``."""
        return {"pipe": self.pipe, "replica": self.data // self.expert, "expert": self.expert, "context": self.context,
                "model": self.model}

    @property
    def size(self) -> int:
        """The number of ranks."""
        return prod(self.axes.values())

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1) or "data=1"

    def extent(self, axes: str | Iterable[str]) -> int:
        """Ranks along one axis, or along several together."""
        return prod(self.axes[a] for a in expand(axes))

    # -- ranks -----------------------------------------------------------------------------------------------------
    def coords(self, rank: int) -> dict[str, int]:
        """rank -> {axis: coordinate} over the device matrix. Raises ValueError for a rank that does not exist."""
        if not 0 <= rank < self.size:
            raise ValueError(f"mesh {self}: rank {rank} does not exist; it has the ranks 0 to {self.size - 1}")
        out = {}
        for axis, n in reversed(self.axes.items()):
            rank, out[axis] = divmod(rank, n)
        return {axis: out[axis] for axis in AXES}

    def rank(self, **coords: int) -> int:
        """Coordinates -> rank, the inverse of ``coords``; axes left out are 0, ``data`` counts over replica and expert."""
        if "data" in coords:
            if {"replica", "expert"} & set(coords):
                raise ValueError("mesh: data is replica and expert together; give either it or them")
            coords["replica"], coords["expert"] = divmod(coords.pop("data"), self.expert)
        unknown = set(coords) - set(AXES)
        if unknown:
            raise ValueError(f"mesh: no axis {min(unknown)!r}; the axes are {', '.join((*AXES, *MERGED))}")
        rank = 0
        for axis, n in self.axes.items():
            i = coords.get(axis, 0)
            if not 0 <= i < n:
                raise ValueError(f"mesh {self}: {axis}={i} does not exist; {axis} has the coordinates 0 to {n - 1}")
            rank = rank * n + i
        return rank

    def group(self, rank: int, axes: str | Iterable[str]) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` along ``axes`` only, itself included, in ascending order."""
        here, along = self.coords(rank), expand(axes)
        ranges = [range(n) if axis in along else (here[axis],) for axis, n in self.axes.items()]
        return tuple(self.rank(**dict(zip(AXES, at))) for at in itertools.product(*ranges))

    def groups(self, axes: str | Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """All groups along ``axes``: every rank is in exactly one."""
        along = expand(axes)
        firsts = [(0,) if axis in along else range(n) for axis, n in self.axes.items()]
        return tuple(self.group(self.rank(**dict(zip(AXES, at))), along) for at in itertools.product(*firsts))

    def index(self, coords: dict[str, int], axes: Iterable[str]) -> int:
        """Position of a rank along several axes together, the first the slowest: which part of a merged dim it has."""
        i = 0
        for axis in expand(axes):
            i = i * self.axes[axis] + coords[axis]
        return i

    # -- by text ---------------------------------------------------------------------------------------------------
    @classmethod
    def parse(cls, text: str) -> Mesh:
        """``"data=16,pipe=16,model=4,expert=8"`` or the name of one of ``MESHES``. Raises ValueError saying what is wrong."""
        if text in MESHES:
            return MESHES[text]
        names, given = [f.name for f in fields(cls)], {}
        for item in text.split(","):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                raise ValueError(f"mesh {text!r}: {item!r} is not AXIS=NUMBER, and no layout has the name; "
                                 f"expected for example data=2,model=2, or one of {', '.join(MESHES)}")
            if name not in names:
                raise ValueError(f"mesh {text!r}: no axis {name!r}; the axes are {', '.join(names)}")
            if name in given:
                raise ValueError(f"mesh {text!r}: {name} is given twice, {given[name]} and {value}; give it once")
            if not value.isdecimal():
                raise ValueError(f"mesh {text!r}: {name}={value!r}; expected a whole number")
            given[name] = int(value)
        return cls(**given)


def expand(axes: str | Iterable[str]) -> tuple[str, ...]:
    """Names of axes as axes of the device matrix: "data" becomes ("replica", "expert"). Raises ValueError for no axis."""
    out: tuple[str, ...] = ()
    for axis in (axes,) if isinstance(axes, str) else axes:
        if axis not in AXES and axis not in MERGED:
            raise ValueError(f"mesh: no axis {axis!r}; the axes are {', '.join((*AXES, *MERGED))}")
        out += MERGED.get(axis, (axis,))
    return out


def coarsen(axes: dict[str, int], layouts: Iterable[tuple[tuple[str, ...], ...]]) -> tuple[dict[str, int], tuple]:
    """The coarsest device matrix on which ``layouts`` (of one operator's tensors) can be written.

    Adjacent axes that these layouts only ever use together, in order and in one dim, become one axis whose name joins
    theirs by "_". Some MindSpore operators refuse a dim that lies on two axes, so their layouts must be written on
    this matrix. axes: name -> size, slowest first. Returns (axes, layouts) in the new names.
    """
    layouts = tuple(layouts)
    names = list(axes)
    uses = {dim for layout in layouts for dim in layout if dim}

    def together(run: tuple[str, ...]) -> bool:
        start = names.index(run[0])
        return tuple(names[start:start + len(run)]) == run and all(dim == run or not set(dim) & set(run) for dim in uses)

    runs = {run[0]: run for run in uses if len(run) > 1 and together(run)}
    inside = {axis for run in runs.values() for axis in run}
    merged = {"_".join(runs[n]) if n in runs else n: prod(axes[a] for a in runs.get(n, (n,)))
              for n in names if n in runs or n not in inside}
    return merged, tuple(tuple(("_".join(d),) if d and runs.get(d[0]) == d else d for d in layout) for layout in layouts)


def divisors(n: int) -> str:
    """The divisors of n, for a message."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


MESHES = {
    # MindSpore Transformers r1.5, research/deepseek3: the one-node demonstration of 8 NPUs
    "1b": Mesh(data=2, model=2, pipe=2, expert=2),
    # the same guide's fine-tuning demonstration, 4 nodes of 8. Its ep stays 8, above dp 4: there ep counts ranks of dp * tp,
    # whole experts on each; here that is 2 data ranks times the 4 of a model group (experts="extend")
    "4layer": Mesh(data=4, model=4, pipe=2, expert=2),
    # pretrain_deepseek3_671b.yaml there: 128 nodes of 8 Atlas 800T A2
    "671b": Mesh(data=16, model=4, pipe=16, expert=8),
    # MindSpeed-LLM, pretrain_deepseek3_671b_4k_ms.sh: TP4 PP8 EP8 on 64 nodes of 8, so 512 / (4 * 8) = 16 data ranks
    "mindspeed": Mesh(data=16, model=4, pipe=8, expert=8),
    # its one-node cut-down in the MindSpeed guide: TP1 PP2 EP4 on 8 NPUs
    "mindspeed-1node": Mesh(data=4, pipe=2, expert=4),
    # the report, sections 3.1 and 3.2: 2048 H800, PP16, EP64 over 8 nodes of 8, no TP; so 2048 / 16 = 128 data ranks
    "paper": Mesh(data=128, pipe=16, expert=64),
}
