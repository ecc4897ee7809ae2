"""``dsv3 plan``: what each rank of a cluster holds and computes, and the best split into stages, before renting it."""
from __future__ import annotations

import argparse
import dataclasses
import re

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    p = commands.add_parser(
        "plan", help="memory and balance of a training run on a cluster", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prints the mesh, the layout of the leaves, and for every pipeline stage memory and FLOPs of one rank.\n"
                    "Nothing is allocated and no device is needed. An option overrides what --preset says.",
        epilog="examples:\n  dsv3 plan --preset 671b\n"
               "  dsv3 plan V3 --mesh data=16,pipe=16,model=4,expert=8 --micro-batches 32 --zero 1 --sequence-parallel \\\n"
               "            --layers auto --recompute auto --budget 55GiB --png plan.png")
    say = "; default: the preset's, otherwise "
    p.add_argument("model", nargs="?", help="a preset (V3, V3_1B, ...), a config.json or its folder" + say + "V3")
    p.add_argument("--preset", help="a published setting: 1b, 4layer, 671b, mindspeed, mindspeed-1node, paper; default: none")
    p.add_argument("--mesh", help="degrees, as data=16,pipe=16,model=4,expert=8 (also context), or the name of a preset for its "
                                  "mesh alone" + say + "one rank")
    p.add_argument("--micro-batches", type=int, help="micro-batches of a step on each data rank" + say + "the number of stages")
    p.add_argument("--micro-batch-size", type=int, help="rows of a micro-batch" + say + "1")
    p.add_argument("--seq-length", type=int, help="tokens of a row" + say + "4096")
    p.add_argument("--schedule", choices=("1f1b", "gpipe", "interleaved", "dualpipe", "dualpipev"),
                   help="the pipeline's schedule" + say + "1f1b")
    p.add_argument("--virtual", type=int, help="chunks of each stage" + say + "1")
    p.add_argument("--layers", help="even, auto (the fastest split in the budget), or the layers of each stage or chunk, as "
                                    "16,15,15,15" + say + "auto with a budget, even without")
    p.add_argument("--noop-layers", help="positions of no-op layers in an even split, as 61,62,63" + say + "none")
    p.add_argument("--recompute", help="none, selective (norms and MLA up-projections) or full; several, as none,full, or auto "
                                       "for all of them: each stage takes what fits the budget; or how many blocks of each "
                                       "stage are recomputed in full, as 3,4,2,0" + say + "auto with a budget, none without")
    p.add_argument("--budget", help="bytes of a rank that the plan may use, as 56GB (1e9) or 55GiB (2**30)" + say + "unlimited")
    p.add_argument("--experts", choices=("tensor", "extend", "whole"),
                   help="cut each expert over model; spread whole experts over expert * model; or keep them whole over expert"
                        + say + "tensor")
    p.add_argument("--dispatch", choices=("gather", "alltoall", "two_level"),
                   help="how tokens meet their experts" + say + "what sends the fewest bytes")
    p.add_argument("--node", type=int, help="how many neighbours of the ranks that share the experts sit in one node, for an "
                                            "all-to-all in two levels" + say + "unknown")
    p.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction,
                   help="cut rows over model between the parallel products" + say + "off")
    p.add_argument("--vocab-parallel", action=argparse.BooleanOptionalAction,
                   help="cut embedding and head over model" + say + "on")
    p.add_argument("--keep-activations", action=argparse.BooleanOptionalAction,
                   help="keep those of micro-batches in flight, as other pipelines do; this library's keeps the inputs of its "
                        "stages and computes the rest again" + say + "off")
    p.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="share out among the ranks with copies: 1 the optimiser's "
                                                                  "state, 2 and gradients, 3 and params" + say + "0")
    p.add_argument("--shard-size", type=int, help="over how many copies ZeRO shares out" + say + "all")
    p.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="of weights and activations" + say + "bfloat16")
    p.add_argument("--gradient-dtype", choices=("float32", "bfloat16"), help="of accumulated gradients" + say + "float32")
    p.add_argument("--moment-dtype", choices=("float32", "bfloat16"), help="of AdamW's moments" + say + "float32")
    p.add_argument("--load", type=float, help="tokens at the experts of the busiest rank over the mean; inf for the worst that "
                                              "dropless routing allows" + say + "1")
    p.add_argument("--leaves", action="store_true", help="print every leaf: shape, logical axes, layout, local shape, bytes; "
                                                         "default: their totals")
    p.add_argument("--simulate", action="store_true",
                   help="compile the step of --rank for Ascend, here, and print what it sends to whom; no device is needed")
    p.add_argument("--rank", default="0", help="ranks to simulate, as 0,5; default: 0")
    p.add_argument("--png", help="draw memory and FLOPs of the stages; default: no drawing")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    from ..model import param_specs
    from ..parallel import plan as plans
    from ..parallel.memory import dispatch
    from ..parallel.rules import leaves
    from .info import find_config

    if args.preset is not None and args.preset not in plans.SETTINGS:
        raise ValueError(f"--preset {args.preset}: expected one of {', '.join(plans.SETTINGS)}")
    cfg = find_config(args.model or plans.MODELS.get(args.preset, "V3"))
    setting = read_setting(args)
    made = plans.plan(cfg, setting)

    axes = " x ".join(f"{axis}={n}" for axis, n in setting.mesh.axes.items())
    print(f"mesh       {axes} = {setting.mesh.size} ranks, slowest axis first; data = replica x expert")
    print(f"groups     {'; '.join(_group(setting.mesh, axis) for axis in ('model', 'context', 'expert', 'data', 'pipe'))}")
    rules = setting.rules
    zero = "off" if not rules.zero else f"{rules.zero} over {rules.shard_size or 'all'} copies along {', '.join(rules.zero_axes)}"
    print(f"rules      {', '.join(f'{name}: {_axes(cuts)}' for name, cuts in rules.table)}; ZeRO {zero}; "
          f"dispatch {dispatch(cfg, setting.mesh, rules) or 'inside a rank'}")
    step = setting.run
    print(f"step       {step.micro_batches} micro-batches of {step.micro_batch_size} x {step.seq_length} tokens on each of "
          f"{setting.mesh.data} data ranks ({step.micro_batches * step.micro_batch_size * setting.mesh.data:,} rows), "
          f"{setting.schedule}, {step.dtype} weights, {step.gradient_dtype} gradients, {step.moment_dtype} moments, "
          f"{'a float32 master' if step.master and step.dtype != 'float32' else 'no master'}, load {step.load:g}")
    held = list(leaves(param_specs(cfg), setting.mesh, rules))
    print("leaves     " + _totals(held, setting))
    if args.leaves:
        print()
        print(_leaf_table(held, setting))
    print(f"\n{plans.table(made)}\n\n{plans.summary(made)}")
    if args.png:
        plans.draw(made, args.png)
        print(f"drawn: {args.png}")
    if args.simulate:
        _simulate(cfg, made, list(_numbers(args.rank, "--rank")))


def _simulate(cfg, made, ranks: list[int]) -> None:
    from ..parallel.pipeline import check
    from ..parallel.schedules import Pipeline
    from ..parallel.shard import Placement
    from ..parallel.simulate import simulate_many, summary

    setting = made.setting
    mesh, rules, step = setting.mesh, setting.rules, setting.run
    line = Pipeline(setting.schedule, setting.virtual, made.layers)
    for rank in ranks:  # refuses ranks that there are not, and what cannot be compiled
        mesh.coords(rank)
        check(cfg, Placement(mesh, rules, rank, line), step.micro_batches)
    job = {"model": cfg.to_hf(), "mesh": str(mesh), "rows": step.micro_batch_size * step.micro_batches * mesh.data,
           "length": step.seq_length, "accumulate": step.micro_batches, "dtype": step.dtype, "empty": True,
           "pipeline": dataclasses.asdict(line), "rules": _switches(rules) | {
               "zero": rules.zero, "shard_size": rules.shard_size, "zero_axes": rules.zero_axes, "dispatch": rules.dispatch,
               "node": rules.node},
           "recompute": [_number(part.name, cfg) for stage in made.stages for part, mode in stage.blocks if mode == 2]}
    for report in simulate_many("dsv3.cli.rank:record_steps", job, mesh.size, ranks, timeout=3600):
        print("\n" + "\n".join(summary(report)))
        place = Placement(mesh, rules, report.rank, line)
        print(_beside(report, cfg, place, step, tuple(job["recompute"])))


def _beside(report, cfg, place, step, recompute: tuple[int, ...]) -> str:
    """What the compiled step sends beside what arithmetic says, by kind and group."""
    from ..parallel.plan import aligned
    from ..parallel.traffic import of_program, traffic

    found = of_program(report.collectives)
    try:
        wanted = traffic(cfg, place, step.micro_batch_size, step.seq_length, step.micro_batches, step.dtype, recompute)
    except ValueError as error:
        return f"arithmetic: {error}"
    rows = [("bytes a step", "ranks", "compiled", "arithmetic")]
    for kind, group in sorted(found | wanted):
        rows.append((kind, f"{group[0]} .. {group[-1]}, {len(group)}", f"{found[kind, group]:,}", f"{wanted[kind, group]:,}"))
    return aligned(rows, left=range(2))


def _number(part: str, cfg) -> int:
    """The number of a block as ``recompute`` counts them: MTP modules follow the layers."""
    kind, i = part.split(".")
    return int(i) + (cfg.num_hidden_layers if kind == "mtp" else 0)


def _switches(rules) -> dict:
    """The arguments of ``make_rules`` that give the table of these rules."""
    table = dict(rules.table)
    return {"experts": "tensor" if table["expert.ffn"] else "extend" if "model" in table["expert"] else "whole",
            "sequence_parallel": "model" in table["residual_seq"], "vocab_parallel": bool(table["vocab"])}


def read_setting(args: argparse.Namespace):
    """The preset's setting, or one rank's, with the options put in. ValueError for what cannot be read."""
    from ..parallel.mesh import Mesh
    from ..parallel.plan import SETTINGS, Setting
    from ..parallel.rules import make_rules

    setting = SETTINGS[args.preset] if args.preset else Setting(Mesh())
    if args.mesh is not None:
        setting = dataclasses.replace(setting, mesh=Mesh.parse(args.mesh))
    chosen = {name: getattr(args, name) for name in ("schedule", "virtual") if getattr(args, name) is not None}
    if args.keep_activations is not None:
        chosen["kept"] = args.keep_activations
    if args.budget is not None:
        chosen["budget"] = read_bytes(args.budget)
    searched = "auto" if chosen.get("budget") and not args.preset else None
    for name, text in (("layers", args.layers or searched), ("recompute", args.recompute or searched)):
        if text is not None:
            chosen[name] = _words(text)
    if args.noop_layers is not None:
        chosen |= {"noop": _numbers(args.noop_layers, "--noop-layers"), "layers": chosen["layers"] if args.layers else "even"}
    given = ("seq_length", "micro_batch_size", "micro_batches", "dtype", "gradient_dtype", "moment_dtype", "load")
    step = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    if not args.preset:
        step.setdefault("micro_batches", setting.mesh.pipe)
    chosen["run"] = dataclasses.replace(setting.run, **step)

    rules = setting.rules
    asked = {"experts": args.experts, "sequence_parallel": args.sequence_parallel, "vocab_parallel": args.vocab_parallel}
    if any(value is not None for value in asked.values()):
        new = make_rules(**_switches(rules) | {name: value for name, value in asked.items() if value is not None})
        rules = dataclasses.replace(rules, table=new.table)
    sharing = {"zero": args.zero, "shard_size": args.shard_size, "dispatch": args.dispatch, "node": args.node}
    rules = dataclasses.replace(rules, **{name: value for name, value in sharing.items() if value is not None})
    return dataclasses.replace(setting, rules=rules, **chosen)


def read_bytes(text: str) -> float:
    """"56GB" (1e9), "55GiB" (2**30), "64000000000"; ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgt]?i?b)?\s*", text, re.IGNORECASE)
    unit = (match[2] or "").upper() if match else None
    if unit not in UNITS or float(match[1]) <= 0:
        raise ValueError(f"--budget {text!r}: expected a number of bytes above 0, as 56GB or 55GiB")
    return float(match[1]) * UNITS[unit]


def _words(text: str) -> str | tuple:
    """ "auto" stays, "none,full" and "3,4,2" become tuples of words and of numbers."""
    words = tuple(word.strip() for word in text.split(","))
    if all(word.isdecimal() for word in words):
        return tuple(int(word) for word in words)
    return words[0] if len(words) == 1 else words


def _numbers(text: str, option: str) -> tuple[int, ...]:
    numbers = _words(text) if text else ()
    if isinstance(numbers, str) or not all(isinstance(n, int) for n in numbers):
        raise ValueError(f"{option} {text!r}: expected whole numbers with commas between them, as 61,62,63")
    return numbers


def _axes(cuts: tuple[str, ...]) -> str:
    return "*".join(cuts) or "-"


def _group(mesh, axis: str) -> str:
    group = mesh.group(0, axis)
    return f"{axis} {len(group)} ranks" + (f", {group[1] - group[0]} apart" if len(group) > 1 else "")


def _totals(held: list, setting) -> str:
    from ..parallel.memory import leaf_bytes

    whole = sum(leaf.spec.size for leaf in held)
    local = sum(leaf.size for leaf in held)
    cut = [leaf for leaf in held if leaf.size < leaf.spec.size]
    left = [leaf for leaf in held if setting.rules.zero and leaf.shards == 1]
    state = sum(leaf_bytes(leaf, setting.rules, setting.run)[2] for leaf in held)
    text = (f"{len(held):,} with {whole:,} params; a rank has {local:,} of every stage together, {len(cut):,} leaves cut by the "
            f"mesh; state {state / 1e9:,.2f} GB")
    return text + (f"; ZeRO leaves {len(left)} whole" if left else "")


def _leaf_table(held: list, setting) -> str:
    from ..parallel.memory import leaf_bytes
    from ..parallel.plan import aligned

    rows = [("leaf", "shape", "axes", "layout", "local shape", "weights", "gradients", "state", "shards")]
    for leaf in held:
        numbers = (f"{n:,}" for n in (*leaf_bytes(leaf, setting.rules, setting.run), leaf.shards))
        rows.append((leaf.path, _dims(leaf.spec.shape), ", ".join(axis or "-" for axis in leaf.spec.axes),
                     ", ".join(_axes(cuts) for cuts in leaf.layout), _dims(leaf.local), *numbers))
    return aligned(rows, left=range(5))


def _dims(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
