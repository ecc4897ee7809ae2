"""``dsv3 convert``: a checkpoint of any layout into any other, file to file."""
from __future__ import annotations

import argparse
import sys
from typing import Any

ALIASES = {"bf16": ("hf", "bfloat16"), "fp16": ("hf", "float16"), "fp32": ("hf", "float32")}


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    p = commands.add_parser("convert", help="weights from any layout to any other, streamed",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("source", help="the folder of the checkpoint to read")
    p.add_argument("out", help="the folder to write; it must not exist yet, or hold this very conversion")
    p.add_argument("--from", dest="source_form", default="auto", choices=("auto", "hf", "own", "mcore", "mindformers"),
                   help="the layout of the source")
    p.add_argument("--to", default="hf", choices=("hf", "hf-fp8", "own", "mcore", "mindformers", *ALIASES),
                   help="the layout to write; bf16, fp16 and fp32 are hf in that type")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
                   help="type of the weights; default: as they are stored, the config's torch_dtype if that is FP8")
    p.add_argument("--config", default=None, help="the model, where the source has no config.json: a preset, a file or a folder")
    p.add_argument("--layers", type=int, default=None, help="of a Hugging Face source: only the first so many blocks")
    p.add_argument("--no-mtp", action="store_true", help="of a Hugging Face source: leave the MTP modules out")
    p.add_argument("--max-shard-size", default="5GB", help="of hf and own: the most bytes of a file")
    p.add_argument("--ue8m0", action="store_true", help="of hf-fp8: scales that are powers of two, as in DeepSeek-V3.1")
    p.add_argument("--dry-run", action="store_true", help="print what would be read and written, and stop")
    p.add_argument("--verify", action="store_true", help="read the result again and compare checksums")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    forms = p.add_argument_group("MindSpore Transformers")
    forms.add_argument("--no-grouped-gemm", action="store_true", help="stacked w1, w2 and w3, each [E, out, in]")
    forms.add_argument("--infer", action="store_true", help="the layout of its inference network")
    g = p.add_argument_group("Megatron-core", "flags of MindSpeed-LLM, of what is written; what is read says most itself")
    for name in ("tensor", "pipeline", "expert"):
        g.add_argument(f"--target-{name}-parallel-size", type=int, default=1, metavar="N", help=f"{name}-parallel ranks")
    g.add_argument("--num-layers-per-virtual-pipeline-stage", type=int, default=None, metavar="N",
                   help="layers of a virtual stage")
    g.add_argument("--noop-layers", type=_numbers, default=(), metavar="I,J", help="places of layers that do nothing")
    g.add_argument("--num-layer-list", type=_numbers, default=None, metavar="N,N", help="layers of each pipeline stage")
    g.add_argument("--moe-grouped-gemm", action="store_true", help="experts of a rank in one weight1 and weight2")
    g.add_argument("--moe-tp-extend-ep", action="store_true", help="tensor-parallel ranks hold whole experts, and fewer of them")
    g.add_argument("--mla-mm-split", action="store_true", help="four up-projections in place of two")
    g.add_argument("--mtp-num-layers", type=int, default=None, metavar="N", help="MTP modules to write; default: all")
    g.add_argument("--schedules-method", choices=("dualpipev",), default=None, help="the placement of layers")
    g.add_argument("--source-moe-tp-extend-ep", action=argparse.BooleanOptionalAction, default=None,
                   help="what a source with grouped experts and tensor parallelism does not say itself")
    p.set_defaults(run=run)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers with commas, such as 47,62,63") from None


def run(args: argparse.Namespace) -> None:
    """Plan, write, verify."""
    from ..checkpoint import convert, formats
    from ..checkpoint.mcore import McoreStrategy
    from ..checkpoint.mindformers import MindformersForm
    from .info import find_config

    form, dtype = ALIASES.get(args.to, (args.to, args.dtype))
    if args.to in ALIASES and args.dtype not in (None, dtype):
        raise ValueError(f"--to {args.to} and --dtype {args.dtype} contradict each other; leave one out")
    cfg = find_config(args.config) if args.config else None
    options: dict[str, Any] = {}
    if args.source_moe_tp_extend_ep is not None:
        options["moe_tp_extend_ep"] = args.source_moe_tp_extend_ep
    source = formats.open_checkpoint(args.source, args.source_form, cfg=cfg, layers=args.layers, mtp=not args.no_mtp, **options)
    strategy = McoreStrategy(
        tensor_parallel_size=args.target_tensor_parallel_size, pipeline_parallel_size=args.target_pipeline_parallel_size,
        expert_parallel_size=args.target_expert_parallel_size,
        num_layers_per_virtual_pipeline_stage=args.num_layers_per_virtual_pipeline_stage, noop_layers=args.noop_layers,
        num_layer_list=args.num_layer_list, moe_grouped_gemm=args.moe_grouped_gemm, moe_tp_extend_ep=args.moe_tp_extend_ep,
        mla_mm_split=args.mla_mm_split, mtp_num_layers=args.mtp_num_layers, schedules_method=args.schedules_method)
    target = formats.make_target(source, form, dtype=dtype, max_shard_size=args.max_shard_size, ue8m0=args.ue8m0,
                                 strategy=strategy,
                                 mindformers_form=MindformersForm(use_grouped_gemm=not args.no_grouped_gemm, infer=args.infer))
    if args.dry_run:
        print("\n".join(convert.plan(source, target)))
        return

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    bar = False if args.quiet else None
    path = convert.convert(source, target, args.out, progress=bar, say=say)
    if args.verify:
        result = formats.open_checkpoint(path, "hf" if form == "hf-fp8" else form)
        count, crc = convert.verify(source, result, target, progress=bar)
        print(f"verified {count:,} tensors, checksum {crc:08x}")
    print(path)
