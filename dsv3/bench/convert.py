"""How fast checkpoints are converted and loaded, beside ``cp`` of the same bytes, and in how much memory."""
from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .measure import machine, rows_text, spread, spread_text

ROUTES = (("hf-fp8", "hf"), ("hf", "hf"), ("hf", "own"), ("own", "hf"), ("hf", "hf-fp8"), ("hf", "mindformers"), ("hf", "mcore"),
          ("mcore", "hf"))


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser("convert", help="conversion and loading of a synthetic checkpoint, beside cp",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--experts", type=int, default=16, help="routed experts of each block; the other sizes are V3's")
    p.add_argument("--layers", type=int, default=2, help="blocks, the first dense; one MTP module follows")
    p.add_argument("--repeats", type=int, default=3, help="rounds; cp and the conversions alternate")
    p.add_argument("--folder", default=None, help="where to work; default: a temporary folder")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    from ..config import V3

    cfg = V3.replace(num_hidden_layers=args.layers, first_k_dense_replace=1, n_routed_experts=args.experts, vocab_size=32768,
                     n_group=4, topk_group=2, num_experts_per_tok=4)
    with tempfile.TemporaryDirectory(prefix="dsv3-convert-", dir=args.folder) as folder:
        return convert(cfg, Path(folder), repeats=args.repeats)


def convert(cfg: Any, folder: Path, *, repeats: int = 3) -> dict[str, Any]:
    """Seconds, bytes moved (read and written) and memory of ``ROUTES`` and of loading, each beside ``cp`` of its output.

    All data are synced. "anonymous" is the most memory beyond the start that is not pages of files.
    """
    from ..checkpoint import convert as conversion
    from ..checkpoint import formats
    from ..checkpoint.hf import from_hf
    from ..checkpoint.mcore import McoreStrategy

    sources = {"hf-fp8": synthetic(cfg, folder / "hf-fp8")}
    strategy = McoreStrategy(tensor_parallel_size=2, expert_parallel_size=2, moe_grouped_gemm=True)

    def once(start: str, to: str, out: Path) -> None:
        options = {"moe_tp_extend_ep": False} if start == "mcore" else {}
        source = formats.open_checkpoint(sources[start], **options)
        conversion.convert(source, formats.make_target(source, to, dtype="bfloat16", strategy=strategy), out, progress=False)

    rows: dict[str, dict[str, Any]] = {}
    for start, to in (("hf-fp8", "hf"), ("hf", "own"), ("hf", "mcore")):  # what the other routes start from
        if to not in sources:
            once(start, to, folder / to)
            sources[to] = folder / to
    for _ in range(repeats):
        for start, to in ROUTES:
            row = rows.setdefault(f"{start} -> {to}", {"seconds": [], "cp_seconds": [], "anonymous": []})
            out = folder / "out"
            seconds, anonymous = _measured(lambda: once(start, to, out))
            moved, written = _bytes(sources[start]) + _bytes(out), _bytes(out)
            copied, _ = _measured(lambda: _copy(out, folder / "copy"))
            shutil.rmtree(out)
            shutil.rmtree(folder / "copy")
            row["seconds"].append(seconds)
            row["cp_seconds"].append(copied * moved / (2 * written))  # of cp moving as many bytes
            row["anonymous"].append(anonymous)
            row["moved"] = moved
        for name in ("hf-fp8", "hf"):
            row = rows.setdefault(f"from_hf({name})", {"seconds": [], "cp_seconds": [], "anonymous": []})
            seconds, anonymous = _measured(lambda: from_hf(sources[name], dtype="bfloat16", progress=False))
            row["seconds"].append(seconds)
            row["anonymous"].append(anonymous)
            row["moved"] = _bytes(sources[name])
    result = {name: {"seconds": spread(r["seconds"]), "moved": r["moved"], "anonymous": max(r["anonymous"]),
                     "ratio": spread(a / b for a, b in zip(r["seconds"], r["cp_seconds"])) if r["cp_seconds"] else None}
              for name, r in rows.items()}
    return {"machine": machine(), "bytes": {k: _bytes(v) for k, v in sources.items()}, "rows": result}


def synthetic(cfg: Any, path: Path) -> Path:
    """A Hugging Face folder in FP8 with the released layout and random values, written piece by piece."""
    import json

    from ..checkpoint import hf, shards
    from ..checkpoint.safetensors_io import DTYPES, Slot

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 1 << 24, np.uint8)
    path.mkdir()
    tensors = hf.hf_tensors(cfg, True)
    slots = [Slot(t.name, t.dtype or "BF16", t.shape) for t in tensors]

    def values(slot: Slot) -> np.ndarray:
        size = int(np.prod(slot.shape))
        if slot.dtype == "F32":  # scales, router biases
            return rng.uniform(1e-4, 2e-4, slot.shape).astype(np.float32)
        raw = np.resize(noise, size)
        if slot.dtype == "F8_E4M3":
            return (raw % 127).reshape(slot.shape)  # no NaN
        return (raw.astype(np.uint16) << 3 | 0x3C00).astype(DTYPES[slot.dtype]).reshape(slot.shape)

    (path / "config.json").write_text(json.dumps(hf.config_json(cfg, hf.FP8_DTYPE)))
    arrays = ((slot.name, _copied(slot, values)) for slot in slots)
    shards.write_shards(path, "model", slots, arrays, "1GB", {"format": "pt"}, always_index=True)
    return path


def _copied(slot: Any, values: Callable[[Any], np.ndarray]) -> np.ndarray:
    """The embedding and the head are the same numbers at every place, as MTP's copies must be."""
    return np.full(slot.shape, 0x3C12, np.uint16) if slot.dtype == "BF16" and slot.shape[0] > 30000 else values(slot)


def _copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    subprocess.run(["sync", "-f", str(out)], check=True)


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _measured(work: Callable[[], Any]) -> tuple[float, int]:
    """(seconds, most anonymous bytes beyond the start) of a call."""
    done, start, most = threading.Event(), _anonymous(), [0]

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], _anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    return seconds, most[0]


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def table(r: dict[str, Any]) -> str:
    """The result as lines of text."""
    rows = [("checkpoints", ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in r["bytes"].items())),
            ("machine", f"{r['machine']['cpu']}, {r['machine']['cpus']} CPUs, load {r['machine']['load']:.1f}")]
    for name, row in r["rows"].items():
        rate = f"{row['moved'] / row['seconds']['median'] / 1e9:5.2f} GB/s"
        ratio = f", {spread_text(row['ratio'], digits=2)} times cp" if row["ratio"] else ""
        rows.append((name, f"{spread_text(row['seconds'])} s, {rate} moved{ratio}, {row['anonymous'] / 1e6:,.0f} MB"))
    return rows_text(rows)
