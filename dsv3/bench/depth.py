"""How compile time and step time grow with depth: one narrow model, each depth in its own process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .measure import check_positive, child_environment

KEPT = ("compile_seconds", "compile_cpu_seconds", "step_seconds", "step_cpu_seconds")  # of what `train` says


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser(
        "depth",
        help="compile time and step time at several depths",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--layers", type=int, nargs="+", default=[4, 16, 61], help="depths")
    p.add_argument("--batch", type=int, default=2, help="rows of a step")
    p.add_argument("--seq", type=int, default=64, help="tokens of a row")
    p.add_argument("--steps", type=int, default=3, help="steps of one repeat; three repeats")
    p.add_argument("--timeout", type=float, default=900.0, help="seconds after which a depth is given up")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    check_positive(args, "batch", "seq", "steps")
    return depth(tuple(args.layers), args.batch, args.seq, steps=args.steps, timeout=args.timeout)


def narrow(layers: int) -> Any:
    """``layers`` blocks, the first dense, and one MTP block: hidden 64, 8 experts in 2 groups, 2 a token."""
    from ..config import Config

    return Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
    )


def depth(
    layers: tuple[int, ...] = (4, 16, 61),
    batch: int = 2,
    seq: int = 64,
    *,
    steps: int = 3,
    timeout: float = 900.0,
) -> dict[str, Any]:
    """``train`` at each depth: seconds of wall or CPU, peak bytes, or "failed" and why."""
    rows = []
    for n in layers:
        with tempfile.TemporaryDirectory(prefix="dsv3-depth-") as folder:
            Path(folder, "config.json").write_text(json.dumps(narrow(n).to_hf()))
            words = f"--batch {batch} --seq {seq} --steps {steps} --repeats 3 --warmup 2 --no-peak --json"
            command = [sys.executable, "-m", "dsv3.bench", "train", "--config", folder, *words.split()]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    cwd=folder,
                    timeout=timeout,
                    env=child_environment(),
                )
            except subprocess.TimeoutExpired:
                rows.append({"layers": n, "failed": f"no result in {timeout:.0f} s"})
                continue
        if done.returncode:
            rows.append({"layers": n, "failed": done.stderr.strip()[-500:]})
            continue
        r = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            {"layers": n, "parameters": r["parameters"], "peak_bytes": r["bytes"]["trained"]}
            | {k: r[k] for k in KEPT}
        )
    return {"batch": batch, "seq": seq, "rows": rows}


def table(r: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = [
        f"{r['batch']} x {r['seq']} tokens a step",
        "layers  parameters  compile s  compile CPU s  step ms (min)   step CPU ms   peak MB",
    ]
    for row in r["rows"]:
        if "failed" in row:
            lines.append(f"{row['layers']:6}  failed: {row['failed']}")
            continue
        step, cpu = row["step_seconds"], row["step_cpu_seconds"]["median"]
        lines.append(
            f"{row['layers']:6}  {row['parameters']:10,}  {row['compile_seconds']:9.1f}  "
            f"{row['compile_cpu_seconds']:13.1f}  {step['median'] * 1e3:6.0f} ({step['min'] * 1e3:4.0f})  "
            f"{cpu * 1e3:12.0f}  {row['peak_bytes'] / 1e6:8,.0f}"
        )
    return "\n".join(lines)
