"""The Megatron-core layout as MindSpeed-LLM writes and reads it, for every rank of a parallel strategy.

Facts: MindSpeed-LLM, examples/mcore/deepseek3/convert_ckpt_deepseek3.py and ..._mcore2hf.py, branches 2.0.0 to 26.1.0. Each
rank has a file ``iter_0000001/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt``, a torch file of {"model": {name: tensor}}, or of
"model0", "model1", ... where a stage holds several virtual stages. Tensors here carry that key in front of their name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import Config
from . import torch_file
from .layout import EVERYTHING, Chunk, Part, Stored, StoredFile, joined, one, stacked
from .names import published
from .torch_file import TorchTensor

TRACKER = "latest_checkpointed_iteration.txt"  # holds the number of the newest iteration
FILE = "model_optim_rng.pt"
VERSIONS = ("2.0", "2.1", "2.2")  # MindSpeed-LLM's branches that named tensors differently; 2.2 to 26.1 agree


@dataclass(frozen=True)
class McoreStrategy:
    """How a model is cut into ranks; the fields are MindSpeed-LLM's flags.

    ``num_layers`` is not among them: it is the config's layers and the no-op ones. ``mtp_num_layers`` None is the config's.
    ``version`` says whose names the tensors have: before 2.2 linear_qb, linear_kvb and k_layernorm; in 2.0 mtp_layers too.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    noop_layers: tuple[int, ...] = ()
    num_layer_list: tuple[int, ...] | None = None
    moe_grouped_gemm: bool = False
    moe_tp_extend_ep: bool = False
    mla_mm_split: bool = False
    mtp_num_layers: int | None = None
    schedules_method: str | None = None
    version: str = "2.2"


# -- which layers lie where ------------------------------------------------------------------------------
def check(strategy: McoreStrategy, cfg: Config) -> None:
    """Raises ValueError for a strategy that is not defined for the config, with both numbers and the remedy."""
    s, tp, pp, ep = strategy, strategy.tensor_parallel_size, strategy.pipeline_parallel_size, strategy.expert_parallel_size
    vpp, num_layers = s.num_layers_per_virtual_pipeline_stage, cfg.num_hidden_layers + len(s.noop_layers)
    dual, mtp = s.schedules_method == "dualpipev", _mtp(s, cfg)

    def refuse(condition: Any, what: str, remedy: str) -> None:
        if condition:
            raise ValueError(f"{what}; {remedy}")

    def divide(size: int, by: int, what: str, divisor: str) -> None:
        refuse(size % by, f"{what}={size} is not divisible by {divisor}={by}", f"choose a divisor of {size}")

    for name in ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size"):
        n = getattr(s, name)
        refuse(type(n) is not int or n < 1, f"{name}={n!r}", "it must be an integer of at least 1")
    refuse(s.version not in VERSIONS, f"version={s.version!r}", f"pick one of {', '.join(VERSIONS)}")
    refuse(s.schedules_method not in (None, "dualpipev"), f"schedules_method={s.schedules_method!r}", "pick 'dualpipev' or None")
    refuse(cfg.q_lora_rank is None, "q_lora_rank=None", "this layout joins q_a_proj with kv_a_proj_with_mqa and needs both")
    refuse(cfg.tie_word_embeddings, "tie_word_embeddings=True", "this layout always stores output_layer: untie the head")
    refuse(not 0 <= mtp <= cfg.num_nextn_predict_layers, f"mtp_num_layers={mtp}",
           f"the config has num_nextn_predict_layers={cfg.num_nextn_predict_layers}: choose 0 to that")  # fmt: skip

    given = [name for name in ("num_layers_per_virtual_pipeline_stage", "num_layer_list") if getattr(s, name) is not None]
    refuse(dual and given, f"schedules_method='dualpipev' and {', '.join(given)} are both given", "it sets the stages itself")
    refuse(len(given) > 1, f"{' and '.join(given)} are both given", "a list of stages has no virtual stages: give one of them")
    refuse(s.num_layer_list is not None and s.noop_layers, "num_layer_list and noop_layers are both given",
           "a list needs no no-op layers to fill its stages: give one of them")  # fmt: skip
    bad = [n for n in s.noop_layers if type(n) is not int or not 0 <= n < num_layers]
    refuse(bad or len(set(s.noop_layers)) != len(s.noop_layers), f"noop_layers={s.noop_layers}",
           f"they must be different numbers below num_layers={num_layers}, which counts them")  # fmt: skip
    if s.num_layer_list is not None:
        n, total = len(s.num_layer_list), sum(s.num_layer_list)
        refuse(n != pp, f"num_layer_list has {n} stages but pipeline_parallel_size={pp}", "give one number of layers a stage")
        refuse(min(s.num_layer_list) < 1, f"num_layer_list={s.num_layer_list}", "every stage needs a layer")
        refuse(total != num_layers, f"num_layer_list adds up to {total} layers; the config has {num_layers}", "make them equal")
    else:
        what = f"num_layers={num_layers} ({cfg.num_hidden_layers} and {len(s.noop_layers)} no-op)"
        stages = 2 * pp if dual else pp
        refuse(num_layers % stages, f"{what} is not divisible by the {stages} stages of pipeline_parallel_size={pp}",
               "add no-op layers, or give num_layer_list")  # fmt: skip
        refuse((vpp is not None or dual) and pp == 1, "virtual stages with pipeline_parallel_size=1", "they need at least 2")
        if vpp is not None:
            layers = num_layers // pp
            refuse(vpp < 1 or layers % vpp or layers == vpp, f"num_layers_per_virtual_pipeline_stage={vpp}",
                   f"a stage has {layers} layers: choose a smaller divisor of that")  # fmt: skip

    refuse(s.moe_tp_extend_ep and tp > 1 and not s.moe_grouped_gemm, "moe_tp_extend_ep without moe_grouped_gemm",
           "only grouped experts are dealt out over tensor-parallel ranks: give both")  # fmt: skip
    refuse(dual and tp > 1 and not s.moe_tp_extend_ep, f"schedules_method='dualpipev' with tensor_parallel_size={tp}",
           "it needs moe_tp_extend_ep")  # fmt: skip
    for name in ("vocab_size", "num_attention_heads", *(["hidden_size"] if mtp else [])):
        divide(getattr(cfg, name), tp, name, "tensor_parallel_size")
    shapes = {t.name: t.shape for t in published(cfg)}
    dense = any(name.endswith("mlp.gate_proj.weight") for name in shapes)
    if dense:
        divide(cfg.intermediate_size, tp, "intermediate_size", "tensor_parallel_size")
    if any(name.endswith("mlp.gate.weight") for name in shapes):
        if cfg.n_shared_experts:
            width = cfg.n_shared_experts * cfg.moe_intermediate_size
            divide(width, tp, "n_shared_experts * moe_intermediate_size", "tensor_parallel_size")
        if s.moe_tp_extend_ep:
            divide(cfg.n_routed_experts, ep * tp, "n_routed_experts", "expert_parallel_size * tensor_parallel_size")
        else:
            divide(cfg.n_routed_experts, ep, "n_routed_experts", "expert_parallel_size")
            divide(cfg.moe_intermediate_size, tp, "moe_intermediate_size", "tensor_parallel_size")


def _mtp(strategy: McoreStrategy, cfg: Config) -> int:
    return cfg.num_nextn_predict_layers if strategy.mtp_num_layers is None else strategy.mtp_num_layers


def chunk_order(pipeline: int, virtual: int, dual: bool) -> list[tuple[int, int]]:
    """(stage, virtual stage) in the order that a token goes through them; "dualpipev" comes back the way it went."""
    if dual:
        return [(p, 0) for p in range(pipeline)] + [(p, 1) for p in reversed(range(pipeline))]
    return [(p, v) for v in range(virtual) for p in range(pipeline)]


def stages(cfg: Config, strategy: McoreStrategy) -> dict[tuple[int, int], dict[int, int]]:
    """{(stage, virtual stage): {layer's number there: layer of the model}}, in the order of the model.

    No-op layers leave a gap in the numbers there. The first entry also holds the embedding, the last the head and MTP.
    """
    s, num_layers = strategy, cfg.num_hidden_layers + len(strategy.noop_layers)
    pp, dual, vpp = s.pipeline_parallel_size, s.schedules_method == "dualpipev", s.num_layers_per_virtual_pipeline_stage
    virtual = 2 if dual else num_layers // pp // vpp if vpp else 1
    order = chunk_order(pp, virtual, dual)
    sizes = s.num_layer_list or [num_layers // len(order)] * len(order)
    out: dict[tuple[int, int], dict[int, int]] = {}
    slot = layer = 0
    for chunk, size in zip(order, sizes):
        out[chunk] = {}
        for local in range(size):
            if slot not in s.noop_layers:
                out[chunk][local] = layer
                layer += 1
            slot += 1
    return out


# -- the layout ------------------------------------------------------------------------------------------
def layout(cfg: Config, strategy: McoreStrategy, folder: str = "iter_0000001") -> tuple[StoredFile, ...]:
    """Every file of every rank, inside ``folder``. Raises ValueError as ``check`` does.

    On a last stage of several the embedding is MTP's published copy; MTP's copy of the head is not stored.
    """
    check(strategy, cfg)
    tp, pp, ep = strategy.tensor_parallel_size, strategy.pipeline_parallel_size, strategy.expert_parallel_size
    shapes = {t.name: t.shape for t in published(cfg)}
    chunks = stages(cfg, strategy)
    several = any(v for _, v in chunks)
    files = []
    for p in range(pp):
        for t in range(tp):
            blocks: list[tuple[str, str]] = []  # our name and the published one of each transformer block of the rank
            shared: list[Stored] = []  # the same for all expert-parallel ranks
            for chunk, layers in chunks.items():
                if chunk[0] != p:
                    continue
                key = f"model{chunk[1]}." if several else "model."
                here = [(f"{key}decoder.layers.{local}.", f"model.layers.{layer}.") for local, layer in layers.items()]
                if chunk == next(iter(chunks)):
                    shared.append(_rows(f"{key}embedding.word_embeddings.weight", "model.embed_tokens.weight", shapes, t, tp))
                if chunk == next(reversed(chunks)):
                    here += _mtp_blocks(cfg, strategy, key)
                    shared += _ends(cfg, strategy, key, shapes, t)
                for name, source in here:
                    shared += _block(cfg, strategy, name, source, shapes, t)
                blocks += here
            for e in range(ep):
                rank = f"mp_rank_{t:02}" + (f"_{p:03}" if pp > 1 else "") + (f"_{e:03}" if ep > 1 else "")
                experts = [x for name, source in blocks for x in _experts(cfg, strategy, name, source, shapes, t, e)]
                files.append(StoredFile(f"{folder}/{rank}/{FILE}", (*shared, *experts)))
    return tuple(files)


def _share(n: int, rank: int, ranks: int) -> slice:
    return slice(rank * n // ranks, (rank + 1) * n // ranks)


def _rows(name: str, source: str, shapes: dict, rank: int, ranks: int) -> Stored:
    return one(name, Part(source, shapes[source], _share(shapes[source][0], rank, ranks)))


def _columns(name: str, source: str, shapes: dict, rank: int, ranks: int) -> Stored:
    return one(name, Part(source, shapes[source], cols=_share(shapes[source][1], rank, ranks)))


def _gate_up(name: str, source: str, shapes: dict, rank: int, ranks: int) -> Stored:
    """A rank's rows of gate, then its rows of up."""
    parts = [f"{source}{half}_proj.weight" for half in ("gate", "up")]
    return joined(name, [Part(x, shapes[x], _share(shapes[x][0], rank, ranks)) for x in parts])


def _mtp_blocks(cfg: Config, strategy: McoreStrategy, key: str) -> list[tuple[str, str]]:
    layers = "mtp_layers" if strategy.version == "2.0" else "mtp.layers"
    return [
        (f"{key}{layers}.{k}.transformer_layer.", f"model.layers.{cfg.num_hidden_layers + k}.")
        for k in range(_mtp(strategy, cfg))
    ]


def _ends(cfg: Config, strategy: McoreStrategy, key: str, shapes: dict, t: int) -> Iterator[Stored]:
    """The last norm, the head, and what MTP has around its blocks."""
    tp, first, old = strategy.tensor_parallel_size, cfg.num_hidden_layers, strategy.version == "2.0"
    blocks = _mtp_blocks(cfg, strategy, key)
    norm = "final_layernorm.weight" if blocks else "decoder.final_layernorm.weight"
    yield one(key + norm, Part("model.norm.weight", shapes["model.norm.weight"]))
    yield _rows(f"{key}output_layer.weight", "lm_head.weight", shapes, t, tp)
    for k, (name, source) in enumerate(blocks):
        name = name.removesuffix("transformer_layer.")
        for ours in ("enorm.weight", "hnorm.weight"):
            yield one(name + ours, Part(source + ours, shapes[source + ours]))
        yield _rows(f"{name}eh_proj.weight", f"{source}eh_proj.weight", shapes, t, tp)
        last = f"{source}shared_head.norm.weight"
        yield one(f"{name}final_layernorm.weight" if old else f"{key}mtp.final_layernorms.{k}.weight", Part(last, shapes[last]))
        if strategy.pipeline_parallel_size > 1 and (old or k == 0):
            copy = f"model.layers.{first + k}.embed_tokens.weight"
            yield _rows(f"{name if old else key}embedding.word_embeddings.weight", copy, shapes, t, tp)


def _block(cfg: Config, strategy: McoreStrategy, name: str, source: str, shapes: dict, t: int) -> Iterator[Stored]:
    """A transformer block without its routed experts, on tensor-parallel rank t."""
    tp, new = strategy.tensor_parallel_size, strategy.version == "2.2"
    attention, theirs, mlp = f"{name}self_attention.", f"{source}self_attn.", f"{source}mlp."

    def whole(ours: str, published_name: str, dtype: str | None = None) -> Stored:
        return one(ours, Part(published_name, shapes[published_name]), dtype=dtype)

    yield whole(f"{name}input_layernorm.weight", f"{source}input_layernorm.weight")
    yield whole(f"{name}pre_mlp_layernorm.weight", f"{source}post_attention_layernorm.weight")
    down = [f"{theirs}q_a_proj.weight", f"{theirs}kv_a_proj_with_mqa.weight"]
    yield joined(f"{attention}linear_qkv.weight", [Part(x, shapes[x]) for x in down])
    yield _columns(f"{attention}linear_proj.weight", f"{theirs}o_proj.weight", shapes, t, tp)
    yield whole(f"{attention}q_layernorm.weight", f"{theirs}q_a_layernorm.weight")
    yield whole(f"{attention}{'kv' if new else 'k'}_layernorm.weight", f"{theirs}kv_a_layernorm.weight")
    if strategy.mla_mm_split:
        nope, rope, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        for ours, up, start, width, head in (
            ("linear_qk_nope", "q_b_proj", 0, nope, nope + rope),
            ("linear_qk_rope", "q_b_proj", nope, rope, nope + rope),
            ("linear_kv_nope", "kv_b_proj", 0, nope, nope + v),
            ("linear_v", "kv_b_proj", nope, v, nope + v),
        ):
            heads = np.arange(cfg.num_attention_heads)[_share(cfg.num_attention_heads, t, tp)]
            rows = (heads[:, None] * head + np.arange(start, start + width)).reshape(-1)
            x = f"{theirs}{up}.weight"
            yield one(f"{attention}{ours}.weight", Part(x, shapes[x], rows))
    else:
        for ours, old, up in (("linear_q_up_proj", "linear_qb", "q_b_proj"), ("linear_kv_up_proj", "linear_kvb", "kv_b_proj")):
            yield _rows(f"{attention}{ours if new else old}.weight", f"{theirs}{up}.weight", shapes, t, tp)
    if f"{mlp}gate_proj.weight" in shapes:
        yield _gate_up(f"{name}mlp.linear_fc1.weight", mlp, shapes, t, tp)
        yield _columns(f"{name}mlp.linear_fc2.weight", f"{mlp}down_proj.weight", shapes, t, tp)
        return
    yield whole(f"{name}mlp.router.weight", f"{mlp}gate.weight")
    if f"{mlp}gate.e_score_correction_bias" in shapes:
        yield whole(f"{name}mlp.router.expert_bias", f"{mlp}gate.e_score_correction_bias", "F32")
    if f"{mlp}shared_experts.gate_proj.weight" in shapes:
        yield _gate_up(f"{name}mlp.shared_experts.linear_fc1.weight", f"{mlp}shared_experts.", shapes, t, tp)
        down_proj = f"{mlp}shared_experts.down_proj.weight"
        yield _columns(f"{name}mlp.shared_experts.linear_fc2.weight", down_proj, shapes, t, tp)


def _experts(
    cfg: Config, strategy: McoreStrategy, name: str, source: str, shapes: dict, t: int, e: int
) -> Iterator[Stored]:
    """A block's routed experts on tensor-parallel rank t and expert-parallel rank e; none in a dense block.

    A rank holds a share of all its group's experts, or with moe_tp_extend_ep fewer experts whole. Grouped, weight1 is
    [experts, hidden, gate and up] read as [hidden, ...], and weight2 [experts, ffn, hidden] read as [..., hidden].
    """
    if f"{source}mlp.gate.weight" not in shapes:
        return
    tp, ep = strategy.tensor_parallel_size, strategy.expert_parallel_size
    group, groups, rank, ranks = (e * tp + t, ep * tp, 0, 1) if strategy.moe_tp_extend_ep else (e, ep, t, tp)
    mine = range(cfg.n_routed_experts)[_share(cfg.n_routed_experts, group, groups)]
    sources = [f"{source}mlp.experts.{i}." for i in mine]
    if not strategy.moe_grouped_gemm:
        for local, x in enumerate(sources):
            prefix = f"{name}mlp.experts.local_experts.{local}."
            yield _gate_up(f"{prefix}linear_fc1.weight", x, shapes, rank, ranks)
            yield _columns(f"{prefix}linear_fc2.weight", f"{x}down_proj.weight", shapes, rank, ranks)
        return
    share = _share(cfg.moe_intermediate_size, rank, ranks)

    def turned(x: str, rows: slice = EVERYTHING, cols: slice = EVERYTHING) -> Part:
        return Part(x, shapes[x], rows, cols, transposed=True)

    ups = [Chunk((turned(f"{x}gate_proj.weight", share), turned(f"{x}up_proj.weight", share)), 1) for x in sources]
    downs = [Chunk((turned(f"{x}down_proj.weight", cols=share),)) for x in sources]
    hidden = cfg.hidden_size
    yield stacked(f"{name}mlp.experts.weight1", ups, (hidden, sum(c.size for c in ups) // hidden))
    yield stacked(f"{name}mlp.experts.weight2", downs, (sum(c.size for c in downs) // hidden, hidden))


# -- files -----------------------------------------------------------------------------------------------
def structure(file: StoredFile, cfg: Config, strategy: McoreStrategy, dtype: str, iteration: int = 1) -> dict[str, Any]:
    """What ``torch_file.create`` writes for a file of the layout; ``dtype`` ("BF16") where none is fixed.

    A virtual stage of no-op layers alone is there too, empty: it is opened by its key.
    """
    virtual = 1 + max(v for _, v in stages(cfg, strategy))
    out: dict[str, Any] = {key: {} for key in ([f"model{v}" for v in range(virtual)] if virtual > 1 else ["model"])}
    for stored in file.tensors:
        key, _, name = stored.name.partition(".")
        out[key][name] = TorchTensor(stored.dtype or dtype, stored.shape)
    return out | {"checkpoint_version": 3.0, "iteration": iteration}


def models(saved: Any) -> dict[str, Any]:
    """The entries "model", or "model0", "model1", ..., of a saved structure. Raises ValueError when there are none."""
    found = {k: v for k, v in saved.items() if re.fullmatch(r"model\d*", str(k))} if isinstance(saved, dict) else {}
    if not found:
        raise ValueError("expected the entry 'model', or 'model0' and on: not a checkpoint of Megatron-core")
    return found


def tensors(saved: Any) -> dict[str, TorchTensor]:
    """{name with its model key: tensor} of a saved structure; what training adds is left out. Raises ValueError."""
    return torch_file.tensors(models(saved))
