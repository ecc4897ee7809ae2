"""Params whose matrices are int8, for inference: 8 bits a weight and one float32 scale for each output channel."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from mindspore import Tensor

from .config import Config
from .model import param_specs
from .spec import is_spec
from .tree import paths, to_numpy, tree_map_with_path

MODES = ("w8a16", "w8a8")
# What a product with a quantised weight is written for. Not the embedding, whose rows are looked up; the router and norms, which
# are small and decide much; wkv_b, which decoding multiplies with from both sides.
MATRICES = ("wq", "wq_a", "wq_b", "wkv_a", "wo", "w_gate", "w_up", "w_down", "eh_proj", "head")
EXCLUDE = ("head", "mtp.*.head")


def quantize(params: Any, cfg: Config, mode: str = "w8a16", exclude: Sequence[str] = EXCLUDE,
             shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
    """Params in which each matrix w [D, F] that ``exclude`` leaves is {mode: q int8 [D, F], "scale": float32 [F]}.

    w ~ q scale, symmetric, one scale for each output channel (and expert): scale = max |w| / 127 over D, q = round(w / scale) to
    nearest even; 1 for a channel of zeros. Of experts [E, D, F] the scales are [E, F]. mode: "w8a16" for weights alone; "w8a8"
    rounds the activations of every token too, when the graph runs. exclude: patterns of paths that stay as they are, such as
    "*.w_down", "mtp.*" or "layers.0.*"; by default the head. Embedding, router, norms and wkv_b always stay. shapes: of each
    path, where params are a rank's slices; those of cfg by default. A slice along D has scales of its own: it is rounded more
    finely than the whole, never worse.

    The result goes wherever the model computes without gradients: ``forward``, ``loss_fn``, ``generate``, ``Engine``. Checkpoints
    hold float params: quantise what is loaded, which takes seconds. One leaf at a time is held in float32.

    Raises ValueError for another mode, a pattern that fits no path, params that do not fit cfg (or are quantised already), and
    weights that are not finite.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    shapes = shapes or {path: spec.shape for path, spec in paths(param_specs(cfg), is_spec)}
    found = {path: tuple(leaf.shape) for path, leaf in paths(params)}
    for path in (*shapes, *found):
        if found.get(path) != shapes.get(path):
            raise ValueError(f"params: {path} is {found.get(path, 'missing')}, expected {shapes.get(path, 'no such leaf')}; give "
                             f"float params of this cfg, not quantised before")
    for pattern in exclude:
        if pattern not in EXCLUDE and not any(fnmatchcase(path, pattern) for path in shapes):
            raise ValueError(f"exclude={pattern!r} fits no path; paths are such as {', '.join(list(shapes)[1:4])}")

    def leaf(path: str, w: Any) -> Any:
        if path.rpartition(".")[2] not in MATRICES or any(fnmatchcase(path, pattern) for pattern in exclude):
            return w
        q, scale = rounded(to_numpy(w), path)
        return {mode: Tensor(q), "scale": Tensor(scale)}

    return tree_map_with_path(leaf, params)


def rounded(w: np.ndarray, path: str = "w") -> tuple[np.ndarray, np.ndarray]:
    """(q int8, scale float32) of w [..., D, F]: q of w's shape, scale [..., F]. Raises ValueError naming ``path``."""
    w = w.astype(np.float32, copy=False)
    largest = np.maximum(w.max(-2), -w.min(-2))
    if not np.isfinite(largest).all():
        raise ValueError(f"{path} holds NaN or infinity, which int8 cannot; mend the checkpoint, or exclude {path!r}")
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    q = np.empty(w.shape, np.int8)
    for at in np.ndindex(w.shape[:-2]):  # one expert at a time: the quotients are float32
        q[at] = np.clip(np.rint(w[at] / scale[at]), -127, 127)
    return q, scale


def nbytes(params: Any) -> int:
    """Bytes of all leaves, quantised or not."""
    return sum(leaf.nbytes for _, leaf in paths(params))
