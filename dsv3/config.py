"""The model's configuration: a frozen dataclass with the field names of DeepSeek-V3's released ``config.json``."""
from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


@dataclass(frozen=True)
class Yarn:
    """YaRN rotary scaling (arXiv 2309.00071) with the keys of ``rope_scaling`` in the released file."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class Config:
    """One DeepSeek-V3 model. Every inconsistent combination raises ValueError naming the numbers and the remedy."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    num_nextn_predict_layers: int = 1
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None  # MLA expands the latent to every head; kept because the file has it
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    aux_loss_alpha: float = 0.0001  # weight of the sequence-wise balance loss; the report's value (section 4.2)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mtp_share_embeddings: bool = True  # MTP modules use the main embedding and head, as released; a key of our own
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    released: str = dataclasses.field(default="", repr=False, compare=False)  # the JSON this came from: what to_hf() must keep

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", _read_yarn(self.rope_scaling))
        if self.n_shared_experts is None:
            object.__setattr__(self, "n_shared_experts", 0)
        if self.n_group is None or self.topk_group is None:
            object.__setattr__(self, "n_group", 1)
            object.__setattr__(self, "topk_group", 1)
        _check(self)

    # -- derived numbers -------------------------------------------------------------------------------------------
    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: nope + rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention scores: qk_head_dim^-0.5, times (0.1 mscale_all_dim ln factor + 1)^2 under YaRN."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.factor > 1 and self.rope_scaling.mscale_all_dim:
            scale *= (0.1 * self.rope_scaling.mscale_all_dim * math.log(self.rope_scaling.factor) + 1.0) ** 2
        return scale

    @property
    def num_moe_layers(self) -> int:
        """MoE blocks in the main model; every MTP block is one more."""
        return sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))

    @property
    def has_router_bias(self) -> bool:
        """Whether the router chooses by score + bias (auxiliary-loss-free balancing, ``noaux_tc``)."""
        return self.topk_method == "noaux_tc"

    def is_moe_layer(self, index: int) -> bool:
        """Whether block ``index`` (0-based) of the main model is a mixture of experts."""
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked again. Unknown names raise TypeError."""
        if "num_attention_heads" in changes and "num_key_value_heads" not in changes:
            changes["num_key_value_heads"] = changes["num_attention_heads"]
        return dataclasses.replace(self, **changes)

    # -- the released file -----------------------------------------------------------------------------------------
    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> Config:
        """Read a released ``config.json``: a dict, the file, or the folder that holds it. Unknown keys are kept.

        Accepts ``rope_scaling`` or transformers 5's ``rope_parameters``. Raises FileNotFoundError, or ValueError
        naming the field, for what is missing, malformed or not a DeepSeek-V3.
        """
        if isinstance(source, Mapping):
            raw, where = dict(source), "config"
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            where = str(path)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; expected a config.json or the folder that holds one")
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: not JSON ({error})") from None
            if not isinstance(raw, dict):
                raise ValueError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        model_type = raw.get("model_type", "deepseek_v3")
        if model_type != "deepseek_v3":
            raise ValueError(f"{where}: model_type is {model_type!r}; expected 'deepseek_v3'")
        known = {f.name for f in dataclasses.fields(cls)} - {"released"}
        values = {k: v for k, v in raw.items() if k in known}
        missing = [k for k in ("hidden_size", "num_hidden_layers", "vocab_size") if k not in raw]
        if missing:
            raise ValueError(f"{where}: missing {', '.join(missing)}")
        rope = raw.get("rope_parameters")
        if isinstance(rope, Mapping):
            values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
            if not values.get("rope_scaling"):
                values["rope_scaling"] = rope
        if "rope_scaling" in values:
            values["rope_scaling"] = _read_yarn(values["rope_scaling"], where)
        values.setdefault("num_nextn_predict_layers", 0)
        for f in dataclasses.fields(cls):
            if f.name in values:
                values[f.name] = _coerce(f.name, f.type, values[f.name], where)
        return cls(**values, released=json.dumps(raw))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model as a dict: the file it came from with what has changed since, or a new one."""
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "released"}
        if self.released:
            out, before = json.loads(self.released), Config.from_hf(json.loads(self.released))
            changed = {k: v for k, v in mine.items() if v != getattr(before, k)}
        else:
            out, changed = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}, mine
            out |= {"torch_dtype": "bfloat16", "use_cache": True}
            if self.mtp_share_embeddings:
                del changed["mtp_share_embeddings"]  # not one of the released file's keys
        if "rope_scaling" in changed or "rope_theta" in changed:
            out.pop("rope_parameters", None)
            changed |= {k: mine[k] for k in ("rope_scaling", "rope_theta")}
        for key, value in changed.items():
            out[key] = {"type": "yarn", **dataclasses.asdict(value)} if isinstance(value, Yarn) else value
        return out


def _read_yarn(value: Any, where: str = "config") -> Yarn | None:
    """``rope_scaling`` / ``rope_parameters`` of the file as Yarn, or None when it scales nothing."""
    if value is None or isinstance(value, Yarn):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: rope_scaling is {value!r}; expected null or an object")
    kind = value.get("rope_type", value.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"{where}: rope_scaling type {kind!r} is not supported; expected 'yarn' or null")
    for key in ("factor", "original_max_position_embeddings"):
        if not isinstance(value.get(key), (int, float)) or isinstance(value.get(key), bool):
            raise ValueError(f"{where}: rope_scaling.{key} is {value.get(key)!r}; expected a number")
    return Yarn(**{k: value[k] for k in YARN_KEYS if value.get(k) is not None})


def _coerce(name: str, annotation: str, value: Any, where: str) -> Any:
    """Refuse a JSON value of the wrong type by the field's name (dataclass annotations are strings here)."""
    if value is None:
        if "None" in annotation or name in ("n_shared_experts", "n_group", "topk_group"):
            return None
        raise ValueError(f"{where}: {name} is null; expected {annotation}")
    if annotation.startswith("Yarn"):
        return value
    kind = {"int": int, "float": float, "bool": bool, "str": str}[annotation.split(" ")[0]]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        if name in ("bos_token_id", "eos_token_id") and isinstance(value, list) and value:
            return _coerce(name, annotation, value[0], where)
        raise ValueError(f"{where}: {name} is {value!r}; expected {annotation}")
    return value


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _check(c: Config) -> None:
    def refuse(what: str, remedy: str) -> None:
        raise ValueError(f"{what}; {remedy}")

    positive = ("vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
                "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok n_group "
                "topk_group moe_layer_freq max_position_embeddings")
    for name in positive.split():
        if not isinstance(getattr(c, name), int) or getattr(c, name) < 1:
            refuse(f"{name}={getattr(c, name)!r}", "it must be an integer of at least 1")
    for name in "first_k_dense_replace num_nextn_predict_layers n_shared_experts".split():
        if not isinstance(getattr(c, name), int) or getattr(c, name) < 0:
            refuse(f"{name}={getattr(c, name)!r}", "it must be an integer of at least 0")
    for name in "rms_norm_eps rope_theta initializer_range".split():
        if not getattr(c, name) > 0:
            refuse(f"{name}={getattr(c, name)!r}", "it must be positive")
    if c.q_lora_rank is not None and c.q_lora_rank < 1:
        refuse(f"q_lora_rank={c.q_lora_rank}", "it must be at least 1, or None for a full-rank query projection")
    if c.aux_loss_alpha < 0:
        refuse(f"aux_loss_alpha={c.aux_loss_alpha}", "it must be at least 0")
    if c.qk_rope_head_dim % 2:
        refuse(f"qk_rope_head_dim={c.qk_rope_head_dim} is odd", "rotary embedding turns pairs: make it even")
    if c.num_key_value_heads != c.num_attention_heads:
        refuse(f"num_key_value_heads={c.num_key_value_heads} differs from num_attention_heads={c.num_attention_heads}",
               "MLA has one key and value per query head: make them equal")
    if c.first_k_dense_replace > c.num_hidden_layers:
        refuse(f"first_k_dense_replace={c.first_k_dense_replace} exceeds num_hidden_layers={c.num_hidden_layers}",
               f"lower it to at most {c.num_hidden_layers}")
    if c.topk_method not in TOPK_METHODS:
        refuse(f"topk_method={c.topk_method!r}", f"pick one of {', '.join(TOPK_METHODS)}")
    if c.scoring_func not in ("sigmoid", "softmax"):
        refuse(f"scoring_func={c.scoring_func!r}", "pick 'sigmoid' or 'softmax'")
    E, G, M, K = c.n_routed_experts, c.n_group, c.topk_group, c.num_experts_per_tok
    if c.topk_method == "greedy":
        G = M = 1
    if E % G:
        refuse(f"n_routed_experts={E} is not divisible by n_group={G}", f"pick n_group from {_divisors(E)}")
    if M > G:
        refuse(f"topk_group={M} exceeds n_group={G}", f"pick topk_group from 1 to {G}")
    if K > M * (E // G):
        refuse(f"num_experts_per_tok={K} exceeds the {M * (E // G)} experts of topk_group={M} groups of {E // G}",
               f"lower num_experts_per_tok to at most {M * (E // G)} or raise topk_group")
    if c.hidden_act != "silu":
        refuse(f"hidden_act={c.hidden_act!r}", "DeepSeek-V3 has 'silu'")
    if c.attention_bias or c.attention_dropout:
        refuse(f"attention_bias={c.attention_bias}, attention_dropout={c.attention_dropout}",
               "DeepSeek-V3 has neither: set them to False and 0.0")
    if c.rope_scaling is not None and c.rope_scaling.factor < 1:
        refuse(f"rope_scaling.factor={c.rope_scaling.factor}", "YaRN extends a context: it must be at least 1")
    if c.rope_scaling is not None and c.rope_scaling.original_max_position_embeddings < 1:
        refuse(f"rope_scaling.original_max_position_embeddings={c.rope_scaling.original_max_position_embeddings}",
               "it must be at least 1")
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(c, name)
        if value is not None and not 0 <= value < c.vocab_size:
            refuse(f"{name}={value} is outside the vocabulary of vocab_size={c.vocab_size}",
                   f"pick an id from 0 to {c.vocab_size - 1}, or None")


# -- presets -----------------------------------------------------------------------------------------------------------
V3 = Config(  # the released 671B model
    max_position_embeddings=163840,
    rope_scaling=Yarn(40, 4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
)
V3_4LAYER = Config(num_hidden_layers=3, first_k_dense_replace=1)  # full width, 256 experts, 3 layers and the MTP block
V3_1B = Config(  # the one-node demonstration of the MindSpore Transformers guide
    num_hidden_layers=3, first_k_dense_replace=1, hidden_size=2048, intermediate_size=6144, num_attention_heads=8,
    n_routed_experts=16,
)
V3_16EXPERTS = Config(  # MindSpeed-LLM's single-node cut-down: full width, 16 experts, one of its 4 layers a no-op
    num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=16,
)
SMALL = Config(  # 204 M, fixed: the benchmarks' model
    vocab_size=16384, hidden_size=512, intermediate_size=1536, moe_intermediate_size=256, num_hidden_layers=8,
    first_k_dense_replace=1, num_nextn_predict_layers=0, num_attention_heads=8, q_lora_rank=192, kv_lora_rank=128,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=64, num_experts_per_tok=8, n_group=8,
    topk_group=4,
)
TINY = Config(  # every part of the big one, trained on a laptop's CPU in minutes
    vocab_size=4096, hidden_size=128, intermediate_size=384, moe_intermediate_size=64, num_hidden_layers=4,
    first_k_dense_replace=1, num_nextn_predict_layers=1, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=32,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
    topk_group=2, max_position_embeddings=256,
)
PRESETS = {"V3": V3, "V3_4LAYER": V3_4LAYER, "V3_1B": V3_1B, "V3_16EXPERTS": V3_16EXPERTS, "SMALL": SMALL, "TINY": TINY}
