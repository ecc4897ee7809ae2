"""Host casts of checkpoint conversion: each C++ loop beside its NumPy definition and a plain copy of as many bytes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from .measure import build_kernels, check_positive, machine, spread, timed


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser("cast", help="GB/s of casts, FP8 blocks and transposes on the host, one thread")
    p.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    p.add_argument("--rows", type=int, default=2048, help="rows of the matrix")
    p.add_argument("--columns", type=int, default=7168, help="columns of the matrix")
    p.add_argument("--rounds", type=int, default=7, help="calls of each side, in turns")
    p.add_argument("--only", nargs="+", help="names of casts; default: all")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    check_positive(args, "rows", "columns", "rounds")
    return casts(args.rows, args.columns, rounds=args.rounds, only=args.only)


def casts(rows: int, columns: int, *, rounds: int = 7, only: list[str] | None = None) -> dict[str, Any]:
    """GB/s, bytes read and written, of each cast of a [rows, columns] matrix into memory that was written before.

    "ratio": seconds of the NumPy definition over ours; "of_copy": seconds of np.copyto that reads and writes as many
    bytes over ours. Raises ValueError when the native kernels are not in use here, or a name in ``only`` is unknown.
    """
    from ..kernels import native

    if (why := native.why_reference()) is not None:
        raise ValueError(f"the native kernels are off: {why}; there is nothing to compare")
    build_kernels()
    made = cases(rows, columns)
    if unknown := sorted(set(only or ()) - set(made)):
        raise ValueError(f"--only {' '.join(unknown)}: expected some of {', '.join(made)}")
    out = {}
    for name in only or made:
        ours, reference, size = made[name]
        source, target = np.ones(size // 2, np.uint8), np.ones(size // 2, np.uint8)
        sides = (ours, reference, lambda: np.copyto(target, source))
        for call in sides:  # touches what is written to
            call()
        seconds = [[timed(call)[0] for call in sides] for _ in range(rounds)]
        out[name] = {
            "native_gb_per_second": spread(size / a / 1e9 for a, _, _ in seconds),
            "ratio": spread(b / a for a, b, _ in seconds),
            "of_copy": spread(c / a for a, _, c in seconds),
        }
    return {"rows": rows, "columns": columns, "casts": out, "machine": machine()}


def cases(m: int, n: int) -> dict[str, tuple[Callable, Callable, int]]:
    """name -> (our call, the definition's, bytes that a call reads and writes), in blocks of 128 x 128."""
    from ..kernels import cast

    block, size = (128, 128), m * n
    x = np.random.default_rng(0).standard_normal((m, n), np.float32) * np.float32(0.02)
    bits = cast.narrow(x)
    codes, scales = cast.quantise(x, block)
    wide, half = np.ones((m, n), np.float32), np.ones((m, n), np.uint16)
    wide_T, half_T, code_T = (np.ones((n, m), dtype) for dtype in (np.float32, np.uint16, np.uint8))

    def dequantised() -> np.ndarray:
        return cast.dequantise_reference(codes, scales, block)

    def quantised(x: np.ndarray) -> None:
        cast.encode_blocks_reference(x, cast.block_scales_reference(x, block), block)

    return {
        "widen": (lambda: cast.widen(bits, wide), lambda: cast.widen_reference(bits), 6 * size),
        "narrow": (lambda: cast.narrow(x, half), lambda: cast.narrow_reference(x), 6 * size),
        "dequantise to float32": (
            lambda: cast.dequantise(codes, scales, block, wide, bfloat16=False), dequantised, 5 * size,
        ),
        "dequantise to bfloat16": (
            lambda: cast.dequantise(codes, scales, block, half, bfloat16=True),
            lambda: cast.narrow_reference(dequantised()), 3 * size,
        ),
        "quantise float32": (lambda: cast.quantise(x, block, codes), lambda: quantised(x), 5 * size),
        "quantise bfloat16": (lambda: cast.quantise(bits, block, codes), lambda: quantised(bits), 3 * size),
        "scales of float32": (
            lambda: cast.block_scales(x, block), lambda: cast.block_scales_reference(x, block), 4 * size,
        ),
        "finite float32": (lambda: cast.all_finite(x), lambda: cast.all_finite_reference(x), 4 * size),
        "transpose 1 byte": (lambda: cast.transpose(codes, code_T), lambda: np.copyto(code_T, codes.T), 2 * size),
        "transpose 2 bytes": (lambda: cast.transpose(bits, half_T), lambda: np.copyto(half_T, bits.T), 4 * size),
        "transpose 4 bytes": (lambda: cast.transpose(x, wide_T), lambda: np.copyto(wide_T, x.T), 8 * size),
        "widen transposed": (
            lambda: cast.widen(bits, wide_T, transposed=True),
            lambda: np.copyto(wide_T, cast.widen_reference(bits).T), 6 * size,
        ),
        "narrow transposed": (
            lambda: cast.narrow(x, half_T, transposed=True),
            lambda: np.copyto(half_T, cast.narrow_reference(x).T), 6 * size,
        ),
        "dequantise transposed": (
            lambda: cast.dequantise(codes, scales, block, half_T, bfloat16=True, transposed=True),
            lambda: np.copyto(half_T, cast.narrow_reference(dequantised()).T), 3 * size,
        ),
    }


def table(r: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = [
        f"[{r['rows']}, {r['columns']}], one thread; medians; load {r['machine']['load']:.1f}",
        f"{'cast':<24}{'GB/s':>8}{'NumPy / native':>24}{'copy / native':>24}",
    ]
    for name, row in r["casts"].items():
        ratios = (f"{q['median']:.2f} ({q['min']:.2f} to {q['max']:.2f})" for q in (row["ratio"], row["of_copy"]))
        lines.append(f"{name:<24}{row['native_gb_per_second']['median']:>8.2f}" + "".join(f"{text:>24}" for text in ratios))
    return "\n".join(lines)
