"""The plan: what every stage of a cluster holds, computes and keeps in memory, for a given or the best split and recompute."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from pathlib import Path

from ..config import Config
from .balance import best_split, choose, deal_evenly, in_flight_bytes
from .memory import MODES, Cost, Part, Run, chunk_bytes, embedding_copy, inputs_in_flight, parts, update_bytes
from .mesh import MESHES, Mesh
from .rules import Rules, make_rules
from .schedules import bubble, check_schedule, chunks_of, deal, in_flight


@dataclass(frozen=True)
class Setting:
    """How a model is trained on a cluster. ``plan`` refuses what does not fit together.

    schedule, virtual: see ``schedules.chunks_of``. layers: "even" (``schedules.deal``, with ``noop``), "auto" (the fastest split
    in the budget), or the layers of each stage (each chunk, in the order of the model, when stages hold several).
    recompute: one of "none", "selective", "full" for every block; several of these, of which each stage takes what fits
    the budget with the least recomputation ("auto" allows all); or for each stage how many of its blocks are recomputed
    in full. budget: bytes of a rank.
    kept: False is this library's own step, which keeps of a micro-batch in flight the inputs of its chunks and computes them
    again (``parallel.pipeline``), and makes float32 gradients of a single micro-batch in the update alone. True are pipelines
    that keep activations until the backward pass, and float32 gradients all along, as those of the published settings.
    """

    mesh: Mesh
    rules: Rules = make_rules()
    run: Run = Run()
    schedule: str = "1f1b"
    virtual: int = 1
    layers: str | tuple[int, ...] = "even"
    noop: tuple[int, ...] = ()
    recompute: str | tuple[str, ...] | tuple[int, ...] = "none"
    budget: float | None = None
    kept: bool = False

    @property
    def in_parts(self) -> bool:
        """Whether gradients are summed over several graphs."""
        return self.kept or self.run.micro_batches > 1 or self.mesh.pipe > 1


@dataclass(frozen=True)
class Stage:
    """One stage on any of its ranks: the parts of each chunk and their recompute modes, bytes, and FLOPs a micro-batch."""

    index: int
    chunks: tuple[tuple[Part, ...], ...]
    modes: tuple[tuple[int, ...], ...]
    states: tuple[tuple[int, ...], ...]  # micro-batches in flight, of ``schedules.in_flight``
    copy: int  # bytes of an embedding that another stage owns; in weights, gradients and state too
    weights: int
    gradients: int
    state: int
    activations: int  # of all micro-batches in flight
    working: int  # on top, while a part is differentiated or params are updated
    worst: int  # activations and working bytes when routing sends this rank all that it can
    forward: float
    extra: float

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.gradients + self.state + self.activations + self.working

    @property
    def flops(self) -> float:
        """Forward, backward (twice the forward) and recompute of one micro-batch on one rank."""
        return 3 * self.forward + self.extra

    @property
    def blocks(self) -> Iterator[tuple[Part, int]]:
        """The blocks and MTP modules with their recompute modes."""
        for chunk, modes in zip(self.chunks, self.modes):
            yield from ((p, m) for p, m in zip(chunk, modes) if p.kind in ("dense", "moe", "mtp"))


@dataclass(frozen=True)
class Plan:
    """A setting worked out: its stages, and the layers of every chunk."""

    cfg: Config
    setting: Setting
    layers: tuple[int, ...]
    stages: tuple[Stage, ...]

    @property
    def slowest(self) -> Stage:
        """The stage that the others wait for."""
        return max(self.stages, key=lambda s: s.flops)

    @property
    def largest(self) -> Stage:
        """The stage with the highest peak."""
        return max(self.stages, key=lambda s: s.total)


def plan(cfg: Config, setting: Setting) -> Plan:
    """Work out a setting for a model. ValueError, with numbers and a remedy, when it cannot be or exceeds its budget."""
    mesh, run, schedule, virtual = setting.mesh, setting.run, setting.schedule, setting.virtual
    check_schedule(schedule, mesh.pipe, virtual, run.micro_batches)
    modes, counts = _recompute(setting)
    if (setting.layers == "auto" or len(modes) > 1) and setting.budget is None:
        raise ValueError("a split or a recompute that is to be found needs a budget; give one, for example 55 GB of a 64 GB rank")
    if setting.layers == "auto" and counts:
        raise ValueError(f"recompute={counts} counts blocks of stages that layers='auto' is to find; give their layers, or modes")
    everything = parts(cfg, mesh, setting.rules, run)
    if virtual * mesh.pipe - 1 not in chunks_of(0, mesh.pipe, virtual, schedule):
        everything += embedding_copy(everything[0], cfg, setting.kept)
    work_out = _worker(cfg, setting, everything, modes, counts)
    lengths = _lengths(setting, everything, work_out)
    chunks = _chunks(everything, lengths, cfg.num_hidden_layers)
    stages = tuple(work_out(s, tuple(chunks[c] for c in chunks_of(s, mesh.pipe, virtual, schedule)), setting.budget or inf)
                   for s in range(mesh.pipe))
    for stage in stages:
        if setting.budget is not None and stage.total > setting.budget:
            static = stage.weights + stage.gradients + stage.state
            how = f"{counts[stage.index]} blocks recomputed" if counts else f"recompute {' or '.join(MODES[m] for m in modes)}"
            raise ValueError(f"stage {stage.index} ({_names(stage.chunks)}) needs {stage.total / 1e9:.2f} GB with {how}, "
                             f"{static / 1e9:.2f} GB of it params, gradients and state; the budget is {setting.budget / 1e9:.2f} "
                             f"GB: raise it, recompute more, move layers away, or use more ranks or ZeRO")
    return Plan(cfg, setting, lengths, stages)


def balance(cfg: Config, mesh: Mesh, budget: float, *, rules: Rules | None = None, run: Run | None = None, schedule: str = "1f1b",
            virtual: int = 1, modes: Sequence[str] = MODES, kept: bool = False) -> Plan:
    """The split into stages and the recompute of each that fit ``budget`` bytes a rank and make the slowest stage fastest.

    By the totals of the plan itself. Exact for one chunk a stage (1F1B and GPipe). With several, layers are dealt by
    ``deal_evenly`` without regard to memory, and then each stage takes the least recompute that fits. modes: those that may be
    used.
    """
    return plan(cfg, Setting(mesh, rules or make_rules(), run or Run(micro_batches=mesh.pipe), schedule, virtual, "auto", (),
                             tuple(modes), budget, kept))


def _recompute(setting: Setting) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """(modes that stages may choose from, how many blocks of each stage are recomputed or None)."""
    given = setting.recompute
    if given == "auto":
        return (0, 1, 2), None
    names = (given,) if isinstance(given, str) else tuple(given)
    if names and all(isinstance(n, int) for n in names):
        if len(names) != setting.mesh.pipe:
            raise ValueError(f"recompute lists {len(names)} stages, the mesh has pipe={setting.mesh.pipe}; give one for each")
        return (0,), names
    for name in names:
        if name not in MODES:
            raise ValueError(f"recompute={name!r}; expected 'auto', some of {', '.join(MODES)}, or a number for each stage")
    if not names:
        raise ValueError(f"recompute allows no mode; expected 'auto' or some of {', '.join(MODES)}")
    return tuple(sorted({MODES.index(n) for n in names})), None


def _lengths(setting: Setting, everything: tuple[Part, ...], work_out: Callable) -> tuple[int, ...]:
    """Layers of every chunk."""
    L = sum(p.name.startswith("layers.") for p in everything)
    pipe, chunks = setting.mesh.pipe, setting.mesh.pipe * setting.virtual
    if setting.noop and setting.layers != "even":
        raise ValueError(f"layers={setting.layers!r} with no-op layers {setting.noop}: these are for an even split; drop one")
    named = setting.layers in ("even", "auto")
    if not named and (isinstance(setting.layers, str) or not all(isinstance(n, int) for n in setting.layers)):
        raise ValueError(f"layers={setting.layers!r}; expected 'even', 'auto', or a number for each of {chunks} chunks")
    if setting.layers == "even":
        return deal(L, chunks, setting.noop)
    if setting.layers == "auto":
        if setting.schedule in ("1f1b", "gpipe"):
            return _fastest(setting, everything, L, work_out)
        costs = [p.cost for p in everything]
        first, layers, last = costs[:1], costs[1:1 + L], costs[1 + L:]
        ends = [0.0] * chunks
        ends[0] += sum(c.forward for c in first)
        ends[-1] += sum(c.forward for c in last)
        held = [chunks_of(s, pipe, setting.virtual, setting.schedule) for s in range(pipe)]
        return deal_evenly(L, sum(c.forward for c in layers) / L, ends, held)
    if len(setting.layers) != chunks or sum(setting.layers) != L or min(setting.layers) < 0:
        raise ValueError(f"layers {', '.join(map(str, setting.layers))}: {len(setting.layers)} numbers that add up to "
                         f"{sum(setting.layers)}; expected {chunks} (pipe={pipe}, {setting.virtual} a stage) that add up to "
                         f"num_hidden_layers={L}")
    return tuple(setting.layers)


def _fastest(setting: Setting, everything: tuple[Part, ...], L: int, work_out: Callable) -> tuple[int, ...]:
    """Layers of each stage, one chunk each, by what ``work_out`` says of every stage that is tried."""
    pipe, costs, known = setting.mesh.pipe, [p.cost for p in everything[1:1 + L]], {}
    sizes = [0, *accumulate(c.weights + c.state + c.gradients * setting.in_parts for c in costs)]
    times = [0.0, *accumulate((1 - 1e-9) * c.forward for c in costs)]  # less than what rounding may add

    def tried(s: int, i: int, j: int, budget: float) -> tuple[int, float]:
        held = (*everything[:s == 0], *everything[1 + i:1 + j], *(everything[1 + L:] if s == pipe - 1 else ()))
        key = s, budget, tuple(p.kind for p in held)
        if key not in known:
            stage = work_out(s, (held,), budget)
            known[key] = stage.total, stage.flops
        return known[key]

    def floor(s: int, i: int, j: int) -> tuple[int, float]:
        return sizes[j] - sizes[i], (3 if setting.kept or s == pipe - 1 else 4) * (times[j] - times[i])

    return best_split(L, pipe, tried, floor, setting.budget)


def _chunks(everything: tuple[Part, ...], lengths: tuple[int, ...], L: int) -> list[tuple[Part, ...]]:
    """The parts of every chunk: the embedding leads the first, head and MTP modules end the last."""
    out, start = [], 1
    for n in lengths:
        out.append(everything[start:start + n])
        start += n
    out[0] = (everything[0], *out[0])
    out[-1] = (*out[-1], *everything[1 + L:])
    return out


def _worker(cfg: Config, setting: Setting, everything: tuple[Part, ...], modes: tuple[int, ...],
            counts: tuple[int, ...] | None) -> Callable:
    """``work_out(s, chunks, budget) -> Stage``: stage s with the parts of its chunks, its recompute chosen for the budget
    (as little as can be where nothing fits), its numbers added up."""
    mesh, rules, run, kept, schedule, virtual = (setting.mesh, setting.rules, setting.run, setting.kept, setting.schedule,
                                                 setting.virtual)
    worst = {p.name: p.cost for p in (*everything, *parts(cfg, mesh, rules, dataclasses.replace(run, load=inf)))}
    last = mesh.pipe * virtual - 1
    share = 0.5 if schedule == "dualpipe" else 1  # each of its chunks runs half of the micro-batches

    def work_out(s: int, chunks: tuple[tuple[Part, ...], ...], budget: float) -> Stage:
        which, states = chunks_of(s, mesh.pipe, virtual, schedule), in_flight(s, mesh.pipe, virtual, run.micro_batches, schedule)
        held = [p for chunk in chunks for p in chunk]
        weights, state = sum(p.cost.weights for p in held), sum(p.cost.state for p in held)
        gradients = sum(p.cost.gradients for p in held) if setting.in_parts else 0
        update = 0 if kept else update_bytes(held, mesh, rules, setting.in_parts)
        waiting = 0 if kept else inputs_in_flight(cfg, setting, s, states)
        if counts:
            chosen = _first_blocks(chunks, counts[s], s)
        else:
            room = budget - weights - gradients - state - waiting
            chosen = choose([[p.cost for p in chunk] for chunk in chunks], states, room, modes, kept)[1]

        def needed(costs: Sequence[Sequence[Cost]]) -> tuple[int, int]:
            """Bytes beside those that stay: of activations, and at the peak."""
            numbers = [chunk_bytes(chunk, ms, kept) for chunk, ms in zip(costs, chosen)]
            saved = in_flight_bytes(states, [(saved, 0) for saved, _ in numbers], True) if kept else max(n for n, _ in numbers)
            return saved + waiting, max(in_flight_bytes(states, numbers, kept) + waiting, update)

        saved, peak = needed([[p.cost for p in chunk] for chunk in chunks])
        again = 0.0 if kept else sum(p.cost.forward for c, chunk in zip(which, chunks) for p in chunk if c < last)
        copy = sum(p.cost.static for p in held if p.kind == "copy")
        return Stage(s, chunks, chosen, states, copy, weights, gradients, state, min(saved, peak),
                     peak - min(saved, peak), needed([[worst[p.name] for p in chunk] for chunk in chunks])[1],
                     share * sum(p.cost.forward for p in held),
                     share * (again + sum(p.cost.extra[m] for chunk, ms in zip(chunks, chosen) for p, m in zip(chunk, ms))))

    return work_out


def _first_blocks(chunks: tuple, count: int, index: int) -> tuple[tuple[int, ...], ...]:
    """Full recompute for the first ``count`` blocks of a stage, none for the rest."""
    left, out = count, []
    for chunk in chunks:
        modes = []
        for p in chunk:
            full = left > 0 and p.kind in ("dense", "moe", "mtp")
            left -= full
            modes.append(2 if full else 0)
        out.append(tuple(modes))
    if left or count < 0:
        raise ValueError(f"recompute asks for {count} blocks of stage {index}, which holds {_names(chunks)}; lower the number")
    return tuple(out)


def _names(chunks: tuple) -> str:
    """What a stage holds: "embed, layers 0-3; layers 32-35, head, mtp.0"."""
    out = []
    for chunk in chunks:
        layers = [int(p.name.split(".")[1]) for p in chunk if p.name.startswith("layers.")]
        run = [f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"] if layers else []
        names = [p.name for p in chunk if p.kind == "embed"] + run + [p.name for p in chunk if p.kind in ("head", "mtp")]
        out.append(", ".join(names) or "nothing")
    return "; ".join(out)


# -- what others do ----------------------------------------------------------------------------------------------------
_MINDSPORE = dict(sequence_parallel=True, vocab_parallel=False, zero=1, zero_axes=("replica", "expert", "context", "model"))
SETTINGS = {
    # MindSpore Transformers r1.5, research/deepseek3, and its yaml files: use_seq_parallel, vocab_emb_dp, parallel optimiser,
    # expert_model_parallel 1. Its offset counts the MTP block as a layer of the last stage.
    "1b": Setting(MESHES["1b"], make_rules(experts="whole", **_MINDSPORE), Run(micro_batches=4), layers=(2, 1),
                  kept=True),
    "4layer": Setting(MESHES["4layer"], make_rules(experts="extend", shard_size=4, **_MINDSPORE), Run(micro_batches=8),
                      layers=(2, 1), kept=True),
    "671b": Setting(MESHES["671b"], make_rules(experts="whole", **_MINDSPORE), Run(micro_batches=32), layers=(*[4] * 15, 1),
                    recompute=(3, *[4] * 12, 3, 2, 0), budget=55 * 2**30, kept=True),
    # MindSpeed-LLM's scripts: distributed optimiser, moe-tp-extend-ep, dualpipev, batches of 3840 and 8 rows; --reuse-fp32-param
    # would save 2 more bytes of state an element
    "mindspeed": Setting(MESHES["mindspeed"], make_rules(sequence_parallel=True, experts="extend", zero=1),
                         Run(micro_batches=240), "dualpipev", 2, noop=(61, 62, 63), recompute="full", kept=True),
    "mindspeed-1node": Setting(MESHES["mindspeed-1node"], make_rules(zero=1), Run(micro_batches=2), "dualpipev", 2, noop=(0,),
                               recompute="full", kept=True),
    # the report, sections 3.2 and 3.3: ZeRO-1, DualPipe, bfloat16 moments, norms and MLA up-projections recomputed; 15360 rows
    # of 4096 on 128 data ranks. Its FP8 weights and activations are counted as bfloat16 here.
    "paper": Setting(MESHES["paper"], make_rules(zero=1), Run(micro_batches=120, moment_dtype="bfloat16"), "dualpipe",
                     recompute="selective", kept=True),
}
MODELS = {"1b": "V3_1B", "4layer": "V3_4LAYER", "mindspeed-1node": "V3_16EXPERTS", "671b": "V3", "mindspeed": "V3", "paper": "V3"}


# -- showing -----------------------------------------------------------------------------------------------------------
def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Rows as lines of aligned columns, those in ``left`` flush left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    pad = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    return "\n".join("  ".join(p(cell, w) for p, cell, w in zip(pad, row, widths)).rstrip() for row in rows)


def table(p: Plan) -> str:
    """A line a stage: what it holds, its recompute, gigabytes (1e9) of every kind, and its FLOPs beside the mean."""
    rows = [("stage", "holds", "recompute", "in flight", "weights", "gradients", "state", "activations", "working", "total",
             "worst routing", "TFLOPs", "of mean")]
    mean = sum(s.flops for s in p.stages) / len(p.stages)
    for s in p.stages:
        count = [sum(m == mode for _, m in s.blocks) for mode in range(3)]
        recompute = ", ".join(f"{n} {MODES[m]}" for m, n in enumerate(count) if n and m) or "none"
        flight = " or ".join("+".join(map(str, state)) for state in s.states[:2]) + (" ..." if len(s.states) > 2 else "")
        static = s.weights + s.gradients + s.state
        sizes = (s.weights, s.gradients, s.state, s.activations, s.working, s.total, static + s.worst)
        rows.append((str(s.index), _names(s.chunks), recompute, flight, *(f"{n / 1e9:.2f}" for n in sizes),
                     f"{s.flops / 1e12:.1f}", f"{100 * s.flops / mean:.0f}%"))
    return aligned(rows, left=(1, 2))


def summary(p: Plan) -> str:
    """Why the plan is as it is, in a few lines: the slowest and the largest stage, what waits, what recompute costs."""
    setting, slow, large = p.setting, p.slowest, p.largest
    idle = bubble(setting.mesh.pipe, setting.virtual, setting.run.micro_batches, setting.schedule)
    total = sum(s.flops for s in p.stages)
    wait = 1 - total / (len(p.stages) * slow.flops)
    again = sum(s.extra for s in p.stages) / (total - sum(s.extra for s in p.stages))
    room = "" if setting.budget is None else f", {(setting.budget - large.total) / 1e9:.2f} GB below the budget"
    return "\n".join([
        f"layers of each {'chunk' if setting.virtual > 1 else 'stage'}: {', '.join(map(str, p.layers))}",
        f"slowest stage: {slow.index} ({_names(slow.chunks)}), {slow.flops / 1e12:.1f} TFLOPs a micro-batch and rank; the others "
        f"wait {100 * wait:.1f}% of the time for it",
        f"largest stage: {large.index}, {large.total / 1e9:.2f} GB{room}",
        f"recompute: {100 * again:.1f}% more FLOPs; pipeline bubble: {100 * idle:.1f}% with {setting.run.micro_batches} "
        f"micro-batches",
    ])


def draw(p: Plan, path: str | Path) -> None:
    """The stages as a PNG: stacked bytes with the budget, and FLOPs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7, 0.55 * len(p.stages)), 7), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True)
    x = [s.index for s in p.stages]
    base = [0.0] * len(x)
    for kind in ("weights", "gradients", "state", "activations", "working"):
        height = [getattr(s, kind) / 1e9 for s in p.stages]
        upper.bar(x, height, bottom=base, label=kind)
        base = [b + h for b, h in zip(base, height)]
    if p.setting.budget is not None:
        upper.axhline(p.setting.budget / 1e9, linestyle="--", color="black", linewidth=1, label="budget")
    upper.set(ylabel="GB a rank", title=f"{p.setting.mesh} ({p.setting.schedule})")
    upper.set_ylim(0, 1.25 * max(*base, p.setting.budget / 1e9 if p.setting.budget else 0, 1e-9))
    upper.legend(ncols=6, fontsize=8, loc="upper center")
    useful = [3 * s.forward / 1e12 for s in p.stages]
    lower.bar(x, useful, label="forward and backward")
    lower.bar(x, [s.extra / 1e12 for s in p.stages], bottom=useful, label="recompute")
    lower.set(xlabel="stage", ylabel="TFLOPs a micro-batch", xticks=x)
    lower.set_ylim(0, 1.2 * p.slowest.flops / 1e12)
    lower.legend(ncols=2, fontsize=8, loc="upper center")
    figure.savefig(path, format="png", dpi=120)
