"""Write fp8/cast.npz: torch's own E4M3, by itself and in 128 x 128 blocks.

    python make_fp8_cast.py              needs torch with float8_e4m3fn

decoded [256] float32: every code's value. numbers [n] float32 and their codes [n]: halfway cases, subnormals, the largest.
codes [150, 200] with scales [2, 2] and their product, taken in float32 and rounded to bfloat16: bits [150, 200] uint16.
"""
from pathlib import Path

import numpy as np
import torch


def main():
    """Draw, cast, write."""
    generator = torch.Generator().manual_seed(8)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[~every.isnan()].sort().values.unique()
    halfway = (finite[1:] + finite[:-1]) / 2
    up, down = (torch.nextafter(halfway, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    around = torch.cat([halfway, up, down])
    numbers = torch.cat([finite, around, torch.randn(500, generator=generator) * 100])
    numbers = numbers[numbers.abs() <= 448]
    codes = torch.randint(0, 127, (150, 200), generator=generator, dtype=torch.uint8)
    codes |= torch.randint(0, 2, (150, 200), generator=generator, dtype=torch.uint8) << 7
    scales = torch.rand(2, 2, generator=generator) * 1e-3
    whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:150, :200]
    bits = (codes.view(torch.float8_e4m3fn).float() * whole).to(torch.bfloat16).view(torch.uint16)
    folder = Path(__file__).parent / "fp8"
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "cast.npz", decoded=every.numpy(), numbers=numbers.numpy(),
                        cast=numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), codes=codes.numpy(),
                        scales=scales.numpy(), bits=bits.numpy())


if __name__ == "__main__":
    main()
