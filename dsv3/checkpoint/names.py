"""One map between the published tensors of DeepSeek-V3 and the leaves of our params, for any config.

Published weights are [out, in] and one tensor per expert; ours are [in, out] and stacked over the experts.
MTP module k is published as block ``num_hidden_layers + k``, with copies of the embedding and the head that
we keep once, unless the config says ``mtp_share_embeddings=False``: then each module has its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import Config
from ..model import param_specs
from ..spec import is_spec
from ..tree import paths

# our leaf -> published tensor; {e} is the expert. The second table is stored in FP8 in the released files.
_PLAIN = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "attn.q_norm": "self_attn.q_a_layernorm.weight",
    "attn.kv_norm": "self_attn.kv_a_layernorm.weight",
    "router.w": "mlp.gate.weight",
    "router.bias": "mlp.gate.e_score_correction_bias",
}
_QUANTISED = {
    "attn.wq": "self_attn.q_proj.weight",
    "attn.wq_a": "self_attn.q_a_proj.weight",
    "attn.wq_b": "self_attn.q_b_proj.weight",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.wkv_b": "self_attn.kv_b_proj.weight",
    "attn.wo": "self_attn.o_proj.weight",
    "mlp.w_gate": "mlp.gate_proj.weight",
    "mlp.w_up": "mlp.up_proj.weight",
    "mlp.w_down": "mlp.down_proj.weight",
    "experts.w_gate": "mlp.experts.{e}.gate_proj.weight",
    "experts.w_up": "mlp.experts.{e}.up_proj.weight",
    "experts.w_down": "mlp.experts.{e}.down_proj.weight",
    "shared.w_gate": "mlp.shared_experts.gate_proj.weight",
    "shared.w_up": "mlp.shared_experts.up_proj.weight",
    "shared.w_down": "mlp.shared_experts.down_proj.weight",
}
_MTP = {
    "enorm": "enorm.weight",
    "hnorm": "hnorm.weight",
    "eh_proj": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
}
_MTP_COPIES = {"embed": "embed_tokens.weight", "head": "shared_head.head.weight"}
IGNORED = ("rotary_emb.inv_freq",)  # endings of tensors that hold nothing to keep
SCALE = "_scale_inv"  # ending of the FP8 scales' names


@dataclass(frozen=True)
class Published:
    """One published tensor: its name and shape, the leaf it lives in, and how to get one from the other."""

    name: str
    shape: tuple[int, ...]
    path: str  # our leaf
    expert: int | None = None  # its place in a stacked leaf
    transposed: bool = False
    quantised: bool = False  # FP8 with block scales in the released files
    copy: bool = False  # repeats a leaf that another tensor already holds
    float32: bool = False  # never stored in less


def published(cfg: Config) -> tuple[Published, ...]:
    """Every tensor of the published layout of ``cfg``, scales aside, in the order of our params."""
    out: list[Published] = []
    specs = dict(paths(param_specs(cfg), is_spec))
    for path, spec in specs.items():
        prefix, key = _place(path, cfg)
        name = ((_MTP | _MTP_COPIES).get(key) if path.startswith("mtp.") else None) or _PLAIN.get(key) or _QUANTISED[key]
        quantised, float32 = key in _QUANTISED, spec.dtype == "float32"
        turned = len(spec.shape) > 1 and key != "embed"
        shape = spec.shape[:-2] + (spec.shape[-1], spec.shape[-2]) if turned else spec.shape
        if len(shape) == 3:
            out += [
                Published(prefix + name.format(e=e), shape[1:], path, e, turned, quantised)
                for e in range(shape[0])
            ]
        else:
            out.append(Published(prefix + name, shape, path, None, turned, quantised, float32=float32))
    for k in range(cfg.num_nextn_predict_layers if cfg.mtp_share_embeddings else 0):
        for main, name in _MTP_COPIES.items():
            path = main if main in specs else "embed"  # a tied head is the embedding
            shape = specs["embed"].shape
            out.append(
                Published(
                    f"model.layers.{cfg.num_hidden_layers + k}.{name}",
                    shape,
                    path,
                    transposed=path == "head",
                    copy=True,
                )
            )
    return tuple(out)


def _place(path: str, cfg: Config) -> tuple[str, str]:
    """Published prefix and the rest of our path: "mtp.0.attn.wo" -> ("model.layers.61.", "attn.wo")."""
    room, _, rest = path.partition(".")
    if room not in ("layers", "mtp"):
        return "", path
    number, _, key = rest.partition(".")
    return f"model.layers.{int(number) + (cfg.num_hidden_layers if room == 'mtp' else 0)}.", key


def is_mtp(name: str, cfg: Config) -> bool:
    """Whether a published name belongs to a block after the main ones."""
    parts = name.split(".")
    return (
        parts[:2] == ["model", "layers"]
        and len(parts) > 2
        and parts[2].isdecimal()
        and int(parts[2]) >= cfg.num_hidden_layers
    )


def to_published(leaf: np.ndarray, tensor: Published) -> np.ndarray:
    """The published tensor as a view of our leaf's values."""
    part = leaf if tensor.expert is None else leaf[tensor.expert]
    return part.T if tensor.transposed else part


def to_leaf(values: np.ndarray, tensor: Published) -> np.ndarray:
    """The values of a published tensor in our orientation, as a view; an expert's share of a stacked leaf."""
    return values.T if tensor.transposed else values
