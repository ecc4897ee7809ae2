"""Write train/adamw.npz: torch's AdamW and gradient clipping by themselves, in float64.

    python make_adamw.py                needs torch

Five steps on three small arrays: start_N, grad_STEP_N (before clipping), end_N and norms [5] (before
clipping). Clip norm 1, learning rate 3e-3, betas 0.9 and 0.95, eps 1e-8, decay 0.1 on arrays of
two dims or more.
"""

from pathlib import Path

import numpy as np
import torch

SHAPES = [(5, 3), (7,), (2, 3, 4)]
SCALES = [1.0, 0.03, 1e-8, 1.0, 0.1]  # clipped, left alone, at the size of eps, clipped, nearly at the limit


def main():
    """Draw, step five times, write."""
    rng = np.random.default_rng(2002)
    params = [torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape))) for shape in SHAPES]
    out = {f"start_{n}": p.detach().numpy().copy() for n, p in enumerate(params)}
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for step, scale in enumerate(SCALES):
        for n, p in enumerate(params):
            out[f"grad_{step}_{n}"] = rng.standard_normal(p.shape) * scale
            p.grad = torch.from_numpy(out[f"grad_{step}_{n}"].copy())
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))
        optimiser.step()
    out |= {f"end_{n}": p.detach().numpy() for n, p in enumerate(params)}
    folder = Path(__file__).parent / "train"
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "adamw.npz", norms=np.array(norms), **out)


if __name__ == "__main__":
    main()
