"""``dsv3 info``: the sizes of a preset or of a checkpoint, and what a checkpoint's files hold."""
from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    p = commands.add_parser("info", help="parameters, operations and bytes of a model",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("model", help="a preset (V3, V3_4LAYER, V3_1B, V3_16EXPERTS, SMALL, TINY), a config.json, or a "
                                 "checkpoint folder of any layout")
    p.add_argument("--config", default=None, help="the model of a checkpoint without config.json: a preset, a file or a folder")
    p.add_argument("--context", type=int, default=4096, help="tokens of a row, for the cost of attention")
    p.set_defaults(run=run)


def find_config(name: str):
    """A preset by name, or the config of a file or folder."""
    from ..config import PRESETS, Config

    if name.upper() in PRESETS:
        return PRESETS[name.upper()]
    try:
        return Config.from_hf(name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: neither a preset ({', '.join(PRESETS)}) nor a config.json or its folder") from None


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from ..counts import counts

    if args.context < 1:
        raise ValueError(f"--context {args.context}: expected at least 1")
    rows: list[tuple[str, str]] = []
    if Path(args.model).is_dir() and any(p.name != "config.json" for p in Path(args.model).iterdir()):
        from ..checkpoint import formats

        source = formats.open_checkpoint(args.model, cfg=find_config(args.config) if args.config else None)
        cfg, rows = source.cfg, formats.describe(source)
    else:
        cfg = find_config(args.model)
    c = counts(cfg, args.context)
    layers = f"{cfg.num_hidden_layers} ({cfg.num_hidden_layers - cfg.num_moe_layers} dense, {cfg.num_moe_layers} MoE)"
    experts = f"{cfg.n_routed_experts} in {cfg.n_group} groups, {cfg.num_experts_per_tok} a token, {cfg.n_shared_experts} shared"
    rows += [
        ("layers", layers), ("hidden size", f"{cfg.hidden_size:,}"), ("experts", experts),
        ("MTP modules", f"{cfg.num_nextn_predict_layers}"), ("parameters, main model", f"{c.main:,}"),
        ("parameters, MTP only", f"{c.mtp:,}"), ("parameters, total", f"{c.main + c.mtp:,}"),
        ("active parameters a token", f"{c.active:,}"),
        (f"forward FLOPs a token, {args.context} tokens", f"{c.forward_flops:,}"),
        ("training FLOPs a token, with MTP", f"{c.train_flops:,}"),
        ("weights, bfloat16", f"{c.weight_bytes:,} bytes ({c.weight_bytes / 1e9:,.2f} GB)"),
        ("KV cache a token, latent", f"{c.cache_bytes:,} bytes"),
        ("KV cache a token, expanded", f"{c.expanded_cache_bytes:,} bytes ({c.expanded_cache_bytes / c.cache_bytes:.0f} x)"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
