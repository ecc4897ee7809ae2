"""Greedy decoding here, plain and with drafts, and in Hugging Face transformers, taking turns on the same CPUs.

All start from the same weights and prompts; their texts are compared, so that they do the same work is measured, not assumed.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .measure import check_positive, machine, rows_text, spread, spread_text
from .peer import answer, start, stop

HERE = Path(__file__).parent


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser("generate", help="greedy decoding: plain, with drafts, and by transformers, in turns",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--config", default="TINY", help="a preset, a config.json or its folder; fresh weights, random prompts")
    p.add_argument("--checkpoint", help="a training run in place of --config; prompts from the standard library's source, by its "
                                        "tokenizer: drafts are only right where a model has learnt something")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="rows that are generated together")
    p.add_argument("--prompt-length", type=int, default=64, help="tokens of a prompt")
    p.add_argument("--new", type=int, default=64, help="tokens to add to each")
    p.add_argument("--rounds", type=int, default=5, help="generations of each side and batch, after one of warm-up")
    p.add_argument("--threads", type=int, default=2, help="CPUs of each side, the same ones")
    p.add_argument("--peer", metavar="PYTHON", help="a Python with torch and transformers; default: this one, if it has them")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    check_positive(args, "prompt_length", "new", "rounds", "threads")
    if min(args.batches) < 1 or args.new < 2:
        raise ValueError(f"--batches {args.batches} --new {args.new}: expected batches of at least 1 and 2 new tokens")
    has_peer = args.peer or (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"))
    with tempfile.TemporaryDirectory(prefix="dsv3-generate-") as folder:
        cfg = _prepare(args, Path(folder))
        settings = {"folder": folder, "new": args.new, "threads": args.threads, "most": max(args.batches)}
        own = [sys.executable, "-m", "dsv3.bench.generate_own"]
        sides = {"plain": start([*own, json.dumps(settings | {"speculative": False})], folder)}
        if cfg.num_nextn_predict_layers:
            sides["drafts"] = start([*own, json.dumps(settings | {"speculative": True})], folder)
        if has_peer:
            theirs = [args.peer or sys.executable, str(HERE / "generate_hf.py"), json.dumps(settings)]
            sides["transformers"] = start(theirs, folder, {"OMP_NUM_THREADS": str(args.threads)})
        try:
            facts, found = {name: answer(side) for name, side in sides.items()}, {}
            for batch in args.batches:
                said: dict[str, list] = {name: [] for name in sides}
                for i in range(args.rounds + 1):
                    for name in sorted(sides, reverse=i % 2 == 1):
                        print(batch, file=sides[name].stdin, flush=True)
                        said[name].append(answer(sides[name]))
                found[batch] = {name: _summary(rounds) for name, rounds in said.items()}
        finally:
            for side in sides.values():
                stop(side)
    return {"model": args.checkpoint or args.config, "prompt_length": args.prompt_length, "new": args.new,
            "threads": args.threads, "machine": machine(), "sides": facts, "batches": found}


def _prepare(args: argparse.Namespace, folder: Path) -> Any:
    """Weights for both sides and the prompts, in ``folder``; returns the config."""
    from ..checkpoint.hf import to_hf
    from ..checkpoint.own import save
    from ..cli.generate import open_checkpoint
    from ..cli.info import find_config
    from ..data import load_tokenizer
    from ..model import init

    rng = np.random.default_rng(0)
    if args.checkpoint:
        params, cfg, place = open_checkpoint(args.checkpoint)
        if place is None:
            raise ValueError(f"{args.checkpoint} has no tokenizer.json; give a training run")
        tokenizer, sources = load_tokenizer(place), sorted(Path(argparse.__file__).parent.glob("*.py"))
        texts = [tokenizer.encode(p.read_text(encoding="utf-8", errors="replace")[:20000]) for p in sources]
        texts = [t for t in texts if len(t) > args.prompt_length]
        chosen = [texts[i] for i in rng.choice(len(texts), max(args.batches))]
        prompts = [t[k:k + args.prompt_length] for t in chosen for k in [int(rng.integers(len(t) - args.prompt_length))]]
    else:
        cfg = find_config(args.config)
        params = init(cfg)
        prompts = rng.integers(2, cfg.vocab_size, (max(args.batches), args.prompt_length)).tolist()
    save(folder / "own", params, cfg=cfg)
    main = {k: v for k, v in params.items() if k != "mtp"}
    to_hf(main, cfg.replace(num_nextn_predict_layers=0), folder / "hf", dtype="float32")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return cfg


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Spreads over the rounds after the first, which compiled."""
    last = rounds[-1]
    return {"first": spread(r["first"] for r in rounds[1:]), "rate": spread(r["rate"] for r in rounds[1:]),
            "rates": [r["rate"] for r in rounds[1:]], "cpu": spread(r["cpu"] for r in rounds[1:]), "new": last["new"],
            "peak_bytes": last["peak_bytes"]} | {k: last[k] for k in ("drafted", "accepted") if k in last}


def table(r: dict[str, Any]) -> str:
    """The result as lines of text."""
    m = r["machine"]
    rows = [("model", f"{r['model']}, prompts of {r['prompt_length']} tokens, {r['new']} new"),
            ("machine", f"{m['cpu']}, {r['threads']} CPUs used, load {m['load']:.1f}")]
    rows += [(name, ", ".join(f"{k} {v}" for k, v in facts.items())) for name, facts in r["sides"].items()]
    for batch, sides in r["batches"].items():
        plain = sides["plain"]
        for name, s in sides.items():
            ratios = spread(own / other for own, other in zip(plain["rates"], s["rates"]))
            length = next((i for i in range(r["new"]) if any(a[i] != b[i] for a, b in zip(s["new"], plain["new"]))), r["new"])
            text = f"{spread_text(s['rate'])} tokens/s after the first; first after {spread_text(s['first'], 1e3)} ms"
            if "drafted" in s and s["drafted"]:
                text += f"; {s['accepted']} of {s['drafted']} drafts right"
            if name != "plain":
                text += f"; plain / this {spread_text(ratios, digits=2)}; texts equal for {length} of {r['new']}"
            rows.append((f"batch {batch}, {name}", text))
    return rows_text(rows)
