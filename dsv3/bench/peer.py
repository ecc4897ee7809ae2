"""The same training steps here and in Hugging Face transformers, taking turns on the same CPUs.

Both start from one checkpoint, see the same tokens and do forward, backward, clipping and AdamW in float32,
so their losses agree: that they do the same work is measured, not assumed. transformers has neither
multi-token prediction nor a balance loss, so both are off on both sides, and so is our update of the router
bias.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .measure import add_shape, check_positive, child_environment, machine, rows_text, spread, spread_text

HERE = Path(__file__).parent
RECIPE = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser("peer", help="training steps of dsv3 and of transformers in turns")
    add_shape(p)
    p.add_argument("--steps", type=int, default=5, help="steps of one block")
    p.add_argument("--rounds", type=int, default=7, help="blocks of each side")
    p.add_argument("--threads", type=int, default=2, help="CPUs of each side, the same ones")
    p.add_argument(
        "--peer", metavar="PYTHON", help="an interpreter with torch and transformers; default: this one"
    )
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    from ..cli.info import find_config

    check_positive(args, "batch", "seq", "steps", "rounds", "threads")
    return {"config": args.config} | peer(
        find_config(args.config),
        args.batch,
        args.seq,
        python=args.peer,
        steps=args.steps,
        rounds=args.rounds,
        threads=args.threads,
    )


def peer(
    cfg: Any,
    batch: int,
    seq: int,
    *,
    python: str | None = None,
    steps: int = 5,
    rounds: int = 7,
    threads: int = 2,
) -> dict[str, Any]:
    """Alternate blocks of ``steps`` steps, ``rounds`` times after one block of warm-up each; who begins
    alternates too.

    "ratio" is theirs over ours of one round (above 1: we are faster). "loss_gap" is the largest relative
    difference of the two losses over all steps. "idle_cpu" is what the waiting side used while the other
    worked, per round, which must be near 0 for the turns to be fair. Raises RuntimeError with a worker's last
    words when it ends early, and ValueError when no interpreter has transformers.
    """
    if python is None and not (
        importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    ):
        raise ValueError("this Python lacks torch or transformers; give --peer the path of one that has both")
    cfg = cfg.replace(num_nextn_predict_layers=0, aux_loss_alpha=0.0)
    with tempfile.TemporaryDirectory(prefix="dsv3-peer-") as folder:
        settings = RECIPE | {"checkpoint": f"{folder}/model", "batch": batch, "seq": seq, "threads": threads}
        write_checkpoint(cfg, settings["checkpoint"])
        script, threads_of_torch = (
            [python or sys.executable, str(HERE / "peer_hf.py")],
            {"OMP_NUM_THREADS": str(threads)},
        )
        trial = start([*script, json.dumps(settings)], folder, threads_of_torch)
        try:  # in a process of its own: the slow variants' memory is not theirs to answer for
            trials = answer(trial)["trials"]
        finally:
            stop(trial)
        ran = [t for t in trials if "seconds" in t]
        if not ran:
            raise RuntimeError(f"no variant of the peer ran: {trials}")
        theirs = settings | {"variant": min(ran, key=lambda t: t["seconds"])["variant"]}
        sides = {
            "ours": start([sys.executable, "-m", "dsv3.bench.peer_own", json.dumps(settings)], folder),
            "theirs": start([*script, json.dumps(theirs)], folder, threads_of_torch),
        }
        try:
            facts = {name: answer(side) for name, side in sides.items()}
            blocks = {name: [] for name in sides}
            for i in range(rounds + 1):
                for name in sorted(sides, reverse=i % 2 == 1):
                    print(steps, file=sides[name].stdin, flush=True)
                    blocks[name].append(answer(sides[name]))
        finally:
            for side in sides.values():
                stop(side)
    return {
        "batch": batch,
        "seq": seq,
        "steps": steps,
        "rounds": rounds,
        "threads": threads,
        "trials": trials,
        "differs_from_config": "num_nextn_predict_layers=0, aux_loss_alpha=0, no router bias update",
        "machine": machine(),
    } | compare(facts, blocks, batch * seq)


def compare(facts: dict, blocks: dict, n_tokens: int) -> dict[str, Any]:
    """The numbers of ``peer`` from what the two sides said; their first blocks are the warm-up."""
    sides = {}
    for name, said in blocks.items():
        per_step = [sum(b["seconds"]) / len(b["seconds"]) for b in said[1:]]
        sides[name] = facts[name] | {
            "block_step_seconds": per_step,
            "step_seconds": spread(per_step),
            "fastest_step_seconds": min(t for b in said[1:] for t in b["seconds"]),
            "step_cpu_seconds": spread(b["cpu"] / len(b["seconds"]) for b in said[1:]),
            "tokens_per_second": spread(n_tokens / t for t in per_step),
            "idle_cpu": spread(b["idle_cpu"] for b in said[1:]),
            "peak_bytes": said[-1]["peak_bytes"],
        }
    losses = [[loss for b in blocks[name] for loss in b["losses"]] for name in ("ours", "theirs")]
    ratios = [
        t / o for o, t in zip(sides["ours"]["block_step_seconds"], sides["theirs"]["block_step_seconds"])
    ]
    return sides | {
        "ratios": ratios,
        "ratio": spread(ratios),
        "first_losses": [losses[0][0], losses[1][0]],
        "loss_gap": max(abs(a - b) / abs(b) for a, b in zip(*losses)),
    }


def write_checkpoint(cfg: Any, folder: str) -> None:
    """Fresh params in the released format, float32."""
    from ..checkpoint.hf import to_hf
    from ..model import init

    to_hf(init(cfg), cfg, folder, dtype="float32")


def start(command: list[str], folder: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a worker in ``folder``; only ours gets the search path of this process."""
    theirs = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (environment or {})
    number = len(list(Path(folder).glob("*.log")))
    log = open(Path(folder) / f"{number}.log", "w+")  # read when the worker dies
    side = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=folder,
        env=theirs if environment is not None else child_environment(),
    )
    side.log = log
    return side


def stop(side: subprocess.Popen) -> None:
    """End a worker: its input ends, which is its cue, and it is killed if it is in the middle of
    something.
    """
    side.stdin.close()
    try:
        side.wait(timeout=10)
    except subprocess.TimeoutExpired:
        side.kill()
        side.wait()
    side.stdout.close()
    side.log.close()


def answer(side: subprocess.Popen) -> dict[str, Any]:
    """One line of JSON from a worker."""
    line = side.stdout.readline()
    if not line:
        side.log.seek(0)
        raise RuntimeError(
            f"a worker ended early ({' '.join(side.args[:-1])}): {side.log.read()[-2000:].strip()}"
        )
    return json.loads(line)


def table(r: dict[str, Any]) -> str:
    """The result as lines of text."""
    m = r["machine"]
    rows = [
        (
            "model",
            f"{r.get('config', '')} {r['ours']['parameters']:,} parameters, {r['batch']} x {r['seq']} tokens",
        ),
        ("on both sides", r["differs_from_config"]),
        ("machine", f"{m['cpu']}, {r['threads']} CPUs used, load {m['load']:.1f}"),
    ]
    for name in ("ours", "theirs"):
        s = r[name]
        rows += [
            (name, f"{s['name']}, {s['variant']}"),
            (
                "  step, ms",
                spread_text(s["step_seconds"], 1e3) + f"; fastest {s['fastest_step_seconds'] * 1e3:,.1f}",
            ),
            ("  step, CPU ms", spread_text(s["step_cpu_seconds"], 1e3)),
            ("  tokens/s", spread_text(s["tokens_per_second"], digits=0)),
            (
                "  peak memory",
                f"{s['peak_bytes'] / 1e6:,.0f} MB; CPU s while waiting {s['idle_cpu']['max']:.2f} at most",
            ),
        ]
    for t in r["trials"]:
        rows.append(
            (
                f"  tried {t['variant']}",
                f"{t['seconds'] * 1e3:,.1f} ms forward and backward"
                if "seconds" in t
                else f"skipped: {t['skipped']}",
            )
        )
    pairs = zip(r["ours"]["block_step_seconds"], r["theirs"]["block_step_seconds"], r["ratios"])
    rows += [
        (f"round {i + 1}", f"ours {o * 1e3:,.1f} ms, theirs {t * 1e3:,.1f} ms, ratio {q:.2f}")
        for i, (o, t, q) in enumerate(pairs)
    ]
    rows += [
        ("theirs / ours", spread_text(r["ratio"], digits=2)),
        (
            "losses",
            f"first {r['first_losses'][0]:.6f} and {r['first_losses'][1]:.6f}; "
            f"largest relative difference {r['loss_gap']:.1e}",
        ),
    ]
    return rows_text(rows)
