"""What the parts of a model cost on one rank: bytes kept, bytes saved for the backward pass, and FLOPs, from the config alone.

A ``Part`` is what a pipeline stage can hold: the embedding, a block, the head with its loss, an MTP module. Bytes that
live as long as the run (params, gradients, AdamW's state) follow from every leaf's local shape and are exact. Activations
follow from the formulas of ``saved_bytes``, which count the tensors that a backward pass needs when attention is fused
(no [T, S] scores are kept) and element-wise operators save their inputs once; communication buffers, fragmentation and the
runtime itself are not in them, so a budget leaves room for these (the reference runs give 55 of 64 GB to the model).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import Config
from ..model import param_specs
from ..nn.dispatch import form_by, ranks_visited
from ..optim import is_state
from ..spec import DTYPES
from .mesh import Mesh, divisors
from .rules import Leaf, Rules, leaves
from .schedules import chunks_of

MODES = ("none", "selective", "full")
STATISTICS = 64  # bytes a head and token: Ascend's FlashAttentionScore keeps softmax_max and softmax_sum, 8 float32 each


@dataclass(frozen=True)
class Run:
    """What a training step costs beside model, mesh and rules. Raises ValueError for sizes below 1 and unknown dtypes.

    load: pairs (token, expert) on the busiest rank over the mean of all ranks. 1 is the expected case under even load;
    inf the worst that dropless routing allows, every token choosing the experts of one rank as often as it can.
    """

    seq_length: int = 4096
    micro_batch_size: int = 1  # rows of one micro-batch on each data-parallel rank
    micro_batches: int = 1  # of one step on each data-parallel rank
    dtype: str = "bfloat16"  # of weights and activations
    gradient_dtype: str = "float32"
    moment_dtype: str = "float32"
    master: bool = True  # a float32 copy of weights that are not float32
    load: float = 1.0

    def __post_init__(self) -> None:
        for name in ("seq_length", "micro_batch_size", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"run: {name}={getattr(self, name)}; it must be at least 1")
        for name in ("dtype", "gradient_dtype", "moment_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"run: {name}={getattr(self, name)!r}; expected one of {', '.join(DTYPES)}")
        if not self.load >= 1:
            raise ValueError(f"run: load={self.load}; the busiest rank has at least the mean, so at least 1")


@dataclass(frozen=True)
class Cost:
    """Costs of one part of the model on one rank of its stage; bytes, and FLOPs of one micro-batch.

    saved, extra and working are by recompute mode ("none", "selective", "full"): bytes that one micro-batch in flight
    keeps, FLOPs to compute again, and bytes needed on top while the backward pass is inside this part.
    """

    weights: int
    gradients: int
    state: int
    forward: float
    saved: tuple[int, int, int]
    extra: tuple[float, float, float]
    working: tuple[int, int, int]
    made: int = 0  # gradients as the backward pass makes them, in the dtype of the weights

    @property
    def static(self) -> int:
        """Bytes that live as long as the run."""
        return self.weights + self.gradients + self.state


@dataclass(frozen=True)
class Part:
    """A part with its name ("embed", "layers.3", "head", "mtp.0", "embed copy"), kind ("embed", "dense", "moe", "head", "mtp",
    "copy") and cost."""

    name: str
    kind: str
    cost: Cost
    leaves: tuple[Leaf, ...] = field(repr=False, compare=False)


def check(cfg: Config, mesh: Mesh, rules: Rules, run: Run) -> None:
    """Refuse, with both numbers and the remedy, what the leaves' sizes do not show: cut heads, experts, rows, vocabulary."""
    H, T = cfg.num_attention_heads, run.seq_length
    heads = mesh.extent(rules.axes("heads"))
    if H % heads:
        raise ValueError(f"num_attention_heads={H} is not divisible by {heads} ranks, and a head is not cut; pick model from "
                         f"{divisors(H)}")
    parts = mesh.extent(rules.axes("residual_seq"))
    if T % parts:
        raise ValueError(f"seq_length={T} is not divisible by the {parts} ranks that share a row (context={mesh.context}, "
                         f"model={mesh.model}); pick a multiple of {parts}")
    if T <= cfg.num_nextn_predict_layers:
        raise ValueError(f"seq_length={T} leaves nothing for num_nextn_predict_layers={cfg.num_nextn_predict_layers}; raise it")


def parts(cfg: Config, mesh: Mesh, rules: Rules, run: Run) -> tuple[Part, ...]:
    """The model in order: embedding, blocks, head, MTP modules. Refuses what ``check`` and ``rules.layout`` refuse."""
    check(cfg, mesh, rules, run)
    held: dict[str, list[Leaf]] = {}
    for leaf in leaves(param_specs(cfg), mesh, rules):
        top, *rest = leaf.path.split(".")
        name = f"{top}.{rest[0]}" if top in ("layers", "mtp") else "head" if top == "norm" else top
        held.setdefault(name, []).append(leaf)
    names = ["embed", *(f"layers.{i}" for i in range(cfg.num_hidden_layers)), "head",
             *(f"mtp.{i}" for i in range(cfg.num_nextn_predict_layers))]
    kinds = [n.split(".")[0] for n in names]
    for i in range(cfg.num_hidden_layers):
        kinds[1 + i] = "moe" if cfg.is_moe_layer(i) else "dense"
    costs = {kind: _cost(kind, tuple(held[name]), cfg, mesh, rules, run) for name, kind in zip(names, kinds)}
    return tuple(Part(name, kind, costs[kind], tuple(held[name])) for name, kind in zip(names, kinds))


def embedding_copy(embed: Part, cfg: Config, kept: bool) -> tuple[Part, ...]:
    """The embedding as a part of a stage that reads it but does not own it; () when no later stage needs it.

    The MTP modules (and a tied head) on the last stage read the embedding. This library updates both copies alike, each with
    its own state. In the published implementations, which are ``kept`` pipelines, the first stage updates it, sends it there
    and receives the gradient: weights and gradients alone.
    """
    shared = cfg.num_nextn_predict_layers > 0 and cfg.mtp_share_embeddings
    if not (shared or cfg.tie_word_embeddings):
        return ()
    cost = Cost(embed.cost.weights, embed.cost.gradients, 0 if kept else embed.cost.state, 0.0, (0, 0, 0), (0.0, 0.0, 0.0),
                (0, 0, 0), 0 if kept else embed.cost.made)
    return (Part("embed copy", "copy", cost, embed.leaves),)


# -- bytes that stay ---------------------------------------------------------------------------------------------------
def leaf_bytes(leaf: Leaf, rules: Rules, run: Run) -> tuple[int, int, int]:
    """(weights, gradients, optimiser state) of one leaf on one rank; ZeRO level 3, 2 and 1 divide them by its shards.

    State: AdamW's two moments and, for weights that are not float32, a float32 master. The router's choice bias has
    neither gradient nor state.
    """
    weights = leaf.size * DTYPES[leaf.spec.dtype or run.dtype] // (leaf.shards if rules.zero >= 3 else 1)
    if is_state(leaf.path):
        return weights, 0, 0
    gradients = leaf.size * DTYPES[run.gradient_dtype] // (leaf.shards if rules.zero >= 2 else 1)
    master = 4 if run.master and (leaf.spec.dtype or run.dtype) != "float32" else 0
    return weights, gradients, leaf.size * (2 * DTYPES[run.moment_dtype] + master) // leaf.shards


# -- activations -------------------------------------------------------------------------------------------------------
def dispatch(cfg: Config, mesh: Mesh, rules: Rules) -> str | None:
    """The form of ``nn.dispatch`` that these rules and this model lead to; None where no ranks share the experts."""
    n, limited = mesh.extent(rules.axes("expert")), cfg.topk_method != "greedy"
    if n == 1:
        return None
    visited = ranks_visited(n, cfg.num_experts_per_tok, cfg.n_group if limited else 1, cfg.topk_group if limited else 1)
    return form_by(n, visited, rules.dispatch, rules.node)


def pairs(cfg: Config, mesh: Mesh, rules: Rules, run: Run) -> tuple[float, int]:
    """(token, expert) pairs that one rank's grouped products see in a micro-batch: (at ``run.load``, at worst).

    A rank brings n tokens to the dispatch: those of its rows, or with sequence parallelism or whole experts its part of
    them; each makes K pairs. Let g ranks, with n tokens each, share out E experts. On average a rank receives n * K; at
    worst every token of the g ranks chooses K, or all E / g, experts of one rank: g * n * min(K, E / g). With
    experts cut over ``model`` the ranks of one cut see the same pairs. The dispatch that gathers all tokens always has memory
    for the worst.
    """
    E, K = cfg.n_routed_experts, cfg.num_experts_per_tok
    tokens = run.micro_batch_size * run.seq_length // mesh.context
    over = rules.axes("expert")
    whole = "model" not in rules.axes("ffn", ("expert",))
    g = mesh.extent(over)
    if whole and ("model" in over or "model" in rules.axes("residual_seq")):
        tokens /= mesh.model
    worst = math.ceil(g * tokens * min(K, E // g))
    return worst if dispatch(cfg, mesh, rules) == "gather" else min(run.load * tokens * K, worst), worst


def saved_bytes(kind: str, cfg: Config, mesh: Mesh, rules: Rules, run: Run) -> dict[str, float]:
    """Bytes of activations that one micro-batch of one part keeps for its backward pass, by what they belong to.

    Per token, in elements of ``run.dtype`` (Korthikanti et al., arXiv 2205.05198, sections 4.1 and 4.2 adapted to MLA and
    MoE; t ranks along ``model``, r = t with sequence parallelism, otherwise 1; widths D H N R V Q C F of the config):

    - "norms": outputs of the block's two RMSNorms and of q_norm and kv_norm, (2 D + Q + C) / r
    - "inputs": x and x + attention, 2 D / r; the latents before their norms, (Q + C) / r; a float32 1/rms a norm
    - "up": what the MLA up-projections make: q and k after rotation and v, H (2 (N + R) + V) / t
    - "attention": its output by heads and by tokens, 2 H V / t, and the softmax statistics, 64 bytes a head
    - "ffn", dense: gate, up and their product, 3 F / t
    - "ffn", MoE: the float32 input and scores of the router, (4 D + 4 E) bytes / r, and 20 bytes a chosen expert; the
      shared expert's 3 F / t; for each pair on this rank (``pairs``) its row, gate, up and product, D + 3 F (F / t when
      experts are cut); for each of its own tokens the K returned rows, whose products with the weights are summed, K D / r
    - "head": input and output of the last norm, 2 D / r, and float32 logits, 4 W / t bytes
    - "mtp": the embedding and the two normalised halves of eh_proj's input, 3 D / r, beside a MoE block and a head
    """
    a, t = DTYPES[run.dtype], mesh.model
    r = t if "model" in rules.axes("residual_seq") else 1
    D, H, N, R, V = (cfg.hidden_size, cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim)
    Q, C, F, E, K = (cfg.q_lora_rank or 0, cfg.kv_lora_rank, cfg.moe_intermediate_size, cfg.n_routed_experts,
                     cfg.num_experts_per_tok)
    n = run.micro_batch_size * run.seq_length // mesh.context
    cut = mesh.extent(rules.axes("vocab"))
    head = {"head": n * (a * 2 * D / r + 4 * cfg.vocab_size / cut)}
    if kind == "embed":
        return {"ids": 4.0 * n}
    if kind == "head":
        return head
    block = {
        "norms": n * a * (2 * D + Q + C) / r,
        "inputs": n * (a * (2 * D + Q + C) + 4 * (4 if Q else 3)) / r,
        "up": n * a * H * (2 * (N + R) + V) / t,
        "attention": n * H * (a * 2 * V + STATISTICS) / t,
    }
    if kind == "dense":
        return block | {"ffn": n * a * 3 * cfg.intermediate_size / t}
    f = F / mesh.extent(rules.axes("ffn", ("expert",)))
    routed = pairs(cfg, mesh, rules, run)[0] * a * (2 * D + 3 * f)
    block["ffn"] = n * (4 * D + 4 * E + 20 * K) / r + n * a * 3 * F * cfg.n_shared_experts / t + routed
    return block | {"mtp": n * a * 3 * D / r} | head if kind == "mtp" else block


def _working(kind: str, cfg: Config, mesh: Mesh, rules: Rules, run: Run) -> float:
    """Bytes of gradients that live at once inside a part: of the larger of attention (q, k, v), ffn (gate, up, product; for MoE
    the pairs' rows, and two float32 copies of them for the weights' gradients) and head (float32 logits)."""
    a, n, t = DTYPES[run.dtype], run.micro_batch_size * run.seq_length // mesh.context, mesh.model
    logits = n * 4 * cfg.vocab_size / mesh.extent(rules.axes("vocab"))
    if kind in ("embed", "head"):
        return logits if kind == "head" else n * a * cfg.hidden_size
    attention = n * a * cfg.num_attention_heads * (2 * cfg.qk_head_dim + cfg.v_head_dim) / t
    ffn = n * a * 3 * cfg.intermediate_size / t
    if kind != "dense":
        ffn = pairs(cfg, mesh, rules, run)[0] * (a + 8) * cfg.hidden_size
    return max(attention, ffn, logits if kind == "mtp" else 0)


def _cost(kind: str, held: tuple[Leaf, ...], cfg: Config, mesh: Mesh, rules: Rules, run: Run) -> Cost:
    """Recompute "selective" drops "norms" and "up" (the report's choice, section 3.2.3), "full" all of the block but x."""
    weights, gradients, state = (sum(column) for column in zip(*(leaf_bytes(leaf, rules, run) for leaf in held)))
    kept = saved_bytes(kind, cfg, mesh, rules, run)
    total, again = sum(kept.values()), [0.0, 0.0, 0.0]
    dropped = [0.0, 0.0, 0.0]
    tokens = run.micro_batch_size * run.seq_length / mesh.context / mesh.model
    forward = tokens * flops(kind, cfg, run.seq_length)
    if kind in ("dense", "moe", "mtp"):
        r = mesh.model if "model" in rules.axes("residual_seq") else 1
        x = run.micro_batch_size * run.seq_length // mesh.context * DTYPES[run.dtype] * cfg.hidden_size / r
        H, C, Q = cfg.num_attention_heads, cfg.kv_lora_rank, cfg.q_lora_rank
        up = C * (cfg.qk_nope_head_dim + cfg.v_head_dim) + (Q or 0) * cfg.qk_head_dim
        query = 0.0 if Q else kept["up"] * cfg.qk_head_dim / (2 * cfg.qk_head_dim + cfg.v_head_dim)  # no latent to make it from
        dropped = [0.0, kept["norms"] + kept["up"] - query, sum(kept[k] for k in kept if k not in ("mtp", "head")) - x]
        again = [0.0, tokens * 2 * H * up, tokens * flops("dense" if kind == "dense" else "moe", cfg, run.seq_length)]
    gathered = 0  # ZeRO 3 gathers a part's weights while it is computed, ZeRO 2 has its gradients whole before scattering them
    if rules.zero >= 2:
        gathered = sum(leaf.size for leaf in held if not is_state(leaf.path)) * DTYPES[run.gradient_dtype]
    if rules.zero >= 3:
        gathered += sum(leaf.size * DTYPES[leaf.spec.dtype or run.dtype] for leaf in held)
    working = gathered + _working(kind, cfg, mesh, rules, run)
    made = sum(leaf.size * DTYPES[leaf.spec.dtype or run.dtype] for leaf in held if not is_state(leaf.path))
    return Cost(weights, gradients, state, forward, tuple(round(total - d) for d in dropped), tuple(again),
                tuple(round(working + d) for d in dropped), made)


# -- the peak of this library's own step -------------------------------------------------------------------------------
def inputs_in_flight(cfg: Config, setting: Any, stage: int, states: Sequence[tuple[int, ...]]) -> int:
    """Bytes that a stage keeps of micro-batches in flight: the inputs [B, T, D] of its chunks, but of the model's first.

    setting: of ``plan``; states: its ``in_flight``.
    """
    mesh, run = setting.mesh, setting.run
    tokens = run.micro_batch_size * run.seq_length // mesh.extent(setting.rules.axes("residual_seq"))
    x = tokens * cfg.hidden_size * DTYPES[run.dtype]
    held = chunks_of(stage, mesh.pipe, setting.virtual, setting.schedule)
    return max(sum(n * x for n, chunk in zip(state, held) if chunk) for state in states)


def with_part(saved: int, peak: int, cost: Cost, mode: int, kept: bool) -> tuple[int, int]:
    """(saved, peak) of a chunk after one more part at its end, for a chunk without any (0, 0).

    saved: bytes that a micro-batch keeps of it. peak: when activations are ``kept``, the most that is needed on top of them
    inside a part; otherwise the most that its backward pass holds, which has kept nothing but the chunk's input before:
    the activations of the parts up to one, what is needed inside that, and the gradients of it and those behind it.
    """
    saved, working = saved + cost.saved[mode], cost.working[mode]
    return saved, max(peak, working) if kept else max(peak, saved + working) + cost.made


def chunk_bytes(costs: Sequence[Cost], modes: Sequence[int], kept: bool) -> tuple[int, int]:
    """``with_part`` of all parts of a chunk."""
    saved = peak = 0
    for cost, mode in zip(costs, modes):
        saved, peak = with_part(saved, peak, cost, mode, kept)
    return saved, peak


def update_bytes(held: Sequence[Part], mesh: Mesh, rules: Rules, in_parts: bool) -> int:
    """What the update holds beside params, state and sums of gradients: gradients in float32 (the sums, when they are not of
    many graphs), their sums over the ranks that hold copies, and one leaf of them on top."""
    whole = [leaf for part in held for leaf in part.leaves if not is_state(leaf.path)]
    sums = 0 if in_parts else sum(4 * leaf.size for leaf in whole)
    reduced = [4 * leaf.size // leaf.shards for leaf in whole
               if in_parts or mesh.size // mesh.pipe > math.prod(mesh.extent(cuts) for cuts in leaf.layout)]
    return sums + sum(reduced) + max(4 * leaf.size // leaf.shards for leaf in whole)


def flops(kind: str, cfg: Config, context: int) -> float:
    """Forward FLOPs a token of one part, a multiply-add counted as two; a token attends to half the row on average.

    The backward pass has twice as many. The same count as ``counts.counts``, part by part.
    """
    D, H, N, R, V = (cfg.hidden_size, cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim)
    Q, C, F = cfg.q_lora_rank, cfg.kv_lora_rank, cfg.moe_intermediate_size
    if kind == "embed":
        return 0
    if kind == "head":
        return 2 * D * cfg.vocab_size
    query = D * Q + Q * H * (N + R) if Q else D * H * (N + R)
    mla = query + D * (C + R) + C * H * (N + V) + H * V * D
    if kind == "dense":
        ffn = 3 * D * cfg.intermediate_size
    else:
        ffn = D * cfg.n_routed_experts + 3 * D * F * (cfg.num_experts_per_tok + cfg.n_shared_experts)
    block = 2 * (mla + ffn) + H * (N + R + V) * context
    return block + 2 * (2 * D * D) + 2 * D * cfg.vocab_size if kind == "mtp" else block
