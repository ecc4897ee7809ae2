"""The gated feed-forward network: dense layers, and the shared experts of MoE layers."""
from __future__ import annotations

from ..kernels.linear import linear
from ..kernels.swiglu import swiglu
from ..spec import ParamSpec, normal


def mlp_spec(cfg, ffn: int) -> dict:
    """Leaves of one SwiGLU network of inner width ``ffn``."""
    D, std = cfg.hidden_size, normal(cfg.initializer_range)
    return {
        "w_gate": ParamSpec((D, ffn), ("embed", "ffn"), std),
        "w_up": ParamSpec((D, ffn), ("embed", "ffn"), std),
        "w_down": ParamSpec((ffn, D), ("ffn", "embed"), std),
    }


def mlp(params, x):
    """(silu(x w_gate) * (x w_up)) w_down. x: [..., D] -> [..., D]; with a mesh the part of a rank's "ffn", to be summed."""
    return linear(swiglu(linear(x, params["w_gate"]), linear(x, params["w_up"])), params["w_down"])
