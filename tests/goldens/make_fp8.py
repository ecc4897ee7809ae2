"""Write fp8/e4m3.npz: casts and block scales by torch alone.

    python make_fp8.py                  needs torch

value_bits/value_codes: float32 as uint32, within +-448, and torch's float8_e4m3fn of it: around every boundary between
two codes, subnormals, zeros, NaN. x_bits [40, 52] bfloat16, in blocks of 16 x 16: scales, codes (amax / 448, clamped,
float8_e4m3fn) and the same with powers_scales, powers_codes by log2 and ceil in float64; bfloat16_bits: the codes times
the scales in float32, then torch's bfloat16. narrow_bits/narrow_codes: float32 as uint32 and torch's bfloat16 of it.
"""

from pathlib import Path

import numpy as np
import torch

BLOCK = 16


def bits(x):
    """bfloat16 or float8 tensor -> NumPy array of its bits."""
    return x.view({1: torch.uint8, 2: torch.int16}[x.element_size()]).numpy().view({1: np.uint8, 2: np.uint16}[x.element_size()])


def expand(scales, shape):
    """One scale per element."""
    return scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def main():
    """Draw, cast, write."""
    rng = np.random.default_rng(448)
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    middles = (codes[1:] + codes[:-1]) / 2
    edges = [codes, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9)), [1e-45, 1e-38]]
    values = np.concatenate([*edges, np.exp(rng.uniform(-9, 6.1, 200))]).astype(np.float32)
    values = np.concatenate([values, -values, np.uint32([0x7FC00000, 0xFFC00000, 0x7F800001]).view(np.float32)])
    out = {"value_bits": values.view(np.uint32), "value_codes": bits(torch.from_numpy(values).to(torch.float8_e4m3fn))}

    wide = rng.integers(0, 2**32, 600, np.uint32)
    wide[::3] = (wide[::3] & 0xFFFF0000) | 0x8000  # ties
    wide[1::6] = (wide[1::6] & 0xFFFF0000) | 0x7FFF
    wide = wide[np.isfinite(wide.view(np.float32))]
    out |= {"narrow_bits": wide, "narrow_codes": bits(torch.from_numpy(wide.view(np.float32)).to(torch.bfloat16))}

    x = torch.from_numpy(rng.standard_normal((40, 52)) * np.exp(rng.uniform(-6, 6, (40, 52)))).to(torch.bfloat16)
    x[16:32, 16:32] = 0
    x[0, 0] = 448 * 2.0**9  # amax / 448 is a power of two exactly
    out["x_bits"], x = bits(x), x.float()
    amax = torch.stack([torch.stack([part.abs().max() for part in row.split(BLOCK, 1)]) for row in x.split(BLOCK, 0)])
    exact = torch.where(amax == 0, 1.0, amax / 448.0)
    powers = torch.where(amax == 0, 1.0, torch.exp2(torch.ceil(torch.log2(amax.double() / 448.0)))).float()
    for name, scales in (("", exact), ("powers_", powers)):
        coded = (x / expand(scales, x.shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
        out |= {f"{name}scales": scales.numpy(), f"{name}codes": bits(coded)}
        if not name:
            out["bfloat16_bits"] = bits((coded.float() * expand(scales, x.shape)).to(torch.bfloat16))
    folder = Path(__file__).parent / "fp8"
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "e4m3.npz", **out)


if __name__ == "__main__":
    main()
