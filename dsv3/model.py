"""DeepSeek-V3 as pure functions on a params pytree: declare, initialise, run, score.

Dims: B batch, T query tokens, S key tokens, D hidden, H heads, N qk_nope, R qk_rope, V v_head, Q q_lora, C kv_lora,
F ffn, E experts, G groups, K top-k, L layers, W vocabulary. Names carry them (``scores_TE``).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from .config import Config
from .kernels.rms_norm import rms_norm
from .nn.balance import make_balance
from .nn.block import block, block_spec
from .nn.mtp import mtp_input, mtp_spec
from .nn.rope import rope_tables
from .nn.router import route as default_route
from .nn.vocab import embed, head, token_losses
from .parallel.rows import gather_seq, own_seq
from .parallel.shard import on_cpu, parts, psum
from .parallel.zero import cuts_params, gathered, shard_names
from .spec import DTYPES, ParamSpec, draw, normal, ones
from .transform import compiled
from .tree import tree_map, tree_map_with_path


def param_specs(cfg: Config) -> dict[str, Any]:
    """Every leaf of the model as a ParamSpec, in the tree that ``init`` fills. Nothing is allocated."""
    D, W, std = cfg.hidden_size, cfg.vocab_size, normal(cfg.initializer_range)
    specs = {
        "embed": ParamSpec((W, D), ("vocab", "embed"), std),
        "layers": tuple(block_spec(cfg, cfg.is_moe_layer(i)) for i in range(cfg.num_hidden_layers)),
        "norm": ParamSpec((D,), ("embed",), ones),
    }
    if not cfg.tie_word_embeddings:
        specs["head"] = ParamSpec((D, W), ("embed", "vocab"), std)
    if cfg.num_nextn_predict_layers:
        specs["mtp"] = tuple(mtp_spec(cfg) for _ in range(cfg.num_nextn_predict_layers))
    return specs


def init(cfg: Config, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
    """Fresh params: nested dicts and tuples of Tensors in ``dtype`` (the router bias always float32).

    A leaf's value depends on the seed and its own path alone, so a cut-down model starts like the larger one.
    Raises ValueError for a dtype other than float32, bfloat16 and float16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")

    def leaf(path: str, spec: ParamSpec) -> Tensor:
        return Tensor(draw(spec, path, seed), dtype=getattr(ms, spec.dtype or dtype))

    return tree_map_with_path(leaf, param_specs(cfg))


# -- forward -----------------------------------------------------------------------------------------------------------
def computable(params: Any) -> Any:
    """The CPU has no bfloat16 kernels: there every leaf is widened once, at the graph's entry, and gradients narrow. Not int8."""
    def widen(leaf):
        if leaf.dtype == ms.float32 or leaf.dtype == ms.int8:
            return leaf
        return leaf.astype(ms.float32)

    if on_cpu():
        return tree_map(widen, params)
    return params


def entered(params: Any, cfg: Config) -> Any:
    """``computable`` params, or a part of the tree, as the loss uses them: what is kept as parts outside of blocks is whole."""
    params = computable(params)
    if cuts_params():
        names = _end_shards(cfg)
        params = {k: gathered(params[k], names[k]) if k in names else params[k] for k in params}
    return params


def layers(params: tuple, x: Tensor, batch: dict, one_block: Callable, recompute: Any, cfg: Config, first: int = 0) -> tuple:
    """Main blocks one after another, the first of them layer ``first``: (x [B, T, D], loads, balance losses).

    Where rows are cut over ranks, x is a rank's positions of them; the batch is whole rows.
    """
    rope, loads, aux = rope_tables(batch.get("position_ids"), batch["tokens"].shape[1], cfg=cfg), (), ()
    for i in range(len(params)):
        x, load, loss = one_block(params[i], x, rope, batch.get("segment_ids"), _recomputes(recompute, first + i))
        loads, aux = loads + load, aux + loss
    return x, loads, aux


@constexpr
def _recomputes(recompute: Any, layer: int) -> str:
    """How much of a block is computed again in the backward pass: "none", "selective" or "full"."""
    if isinstance(recompute, str):
        return recompute
    return "full" if (recompute if isinstance(recompute, bool) else layer in recompute) else "none"


def make_block(cfg: Config, route: Callable | None, balance: Callable | None) -> Callable:
    """``block`` with the configuration and the pieces that may be swapped filled in."""
    chosen_route = default_route if route is None else route
    chosen_balance = make_balance(cfg) if balance is None else balance

    def one_block(params, x, rope, segment_ids, recompute="none", counted=None):
        if recompute == "full":  # not this closure: MindSpore cannot recompute a function made inside a graph
            return ms.recompute(_whole_block, params, x, rope, segment_ids, cfg=cfg, route=chosen_route, balance=chosen_balance,
                                counted=counted)
        return _whole_block(params, x, rope, segment_ids, cfg=cfg, route=chosen_route, balance=chosen_balance, counted=counted,
                            selective=recompute == "selective")

    return one_block


def _whole_block(params, x, rope, segment_ids, *, cfg, route, balance, counted, selective=False):
    """``block`` of params that are kept as parts (ZeRO level 3): inside of what is recomputed, so that they are not saved."""
    if cuts_params():
        params = gathered(params, _block_shards(cfg, "router" in params))
    return block(params, x, rope, segment_ids, cfg=cfg, route=route, balance=balance, counted=counted, selective=selective)


@constexpr
def _block_shards(cfg: Config, is_moe: bool) -> dict:
    return shard_names(block_spec(cfg, is_moe))


@constexpr
def _end_shards(cfg: Config) -> dict:
    """Names for ``gathered`` of what stands outside of blocks; blocks stay as they are."""
    tree, inside = shard_names(param_specs(cfg)), block_spec(cfg, True)
    mtp = tuple({k: "@" if k in inside else v for k, v in one.items()} for one in tree.get("mtp", ()))
    return tree | {"layers": "@"} | ({"mtp": mtp} if mtp else {})


@compiled
def forward(params, tokens, position_ids=None, segment_ids=None, *, cfg, route=None):
    """Logits of the next token. tokens: [B, T] int -> [B, T, W] float32; NumPy arrays or Tensors.

    position_ids: [B, T] int, default 0 ... T-1. segment_ids: [B, T] int, tokens attend within their own segment only,
    default one segment a row. route: a stand-in for ``nn.router.route``. The MTP modules take no part.
    """
    params, batch = computable(params), {"tokens": tokens, "position_ids": position_ids, "segment_ids": segment_ids}
    x = layers(params["layers"], embed(params["embed"], tokens), batch, make_block(cfg, route, None), False, cfg)[0]
    return head(params, gather_seq(rms_norm(x, params["norm"], cfg.rms_norm_eps), "residual"))


# -- loss --------------------------------------------------------------------------------------------------------------
MTP_WEIGHT = 0.3  # of the MTP loss, for the first 10T tokens of the 14.8T (report section 4.2)


def targets(batch: dict) -> tuple:
    """(labels [B, T] int32 with -1 where there is none, weight [B, T] float32) of a batch.

    Labels default to the next token of the row and of the same segment. Labels below 0 and positions where
    ``loss_mask`` is 0 count for nothing; a fractional mask weighs.
    """
    tokens = batch["tokens"]
    if "labels" in batch and batch["labels"] is not None:
        labels = batch["labels"].astype(ms.int32)
    else:
        labels = _ahead(tokens, batch.get("segment_ids"), 1)
    mask = ops.greater_equal(labels, 0).astype(ms.float32)
    if "loss_mask" in batch and batch["loss_mask"] is not None:
        mask = mask * batch["loss_mask"].astype(ms.float32)
    return ops.select(mask > 0, labels, ops.full_like(labels, -1)), mask


def _ahead(x: Tensor, segment_ids: Any, by: int) -> Tensor:
    """x moved ``by`` to the left, -1 where that leaves the row or the segment. x: [B, T] int."""
    B, T = x.shape
    moved = ops.cat((x[:, by:], ops.full((B, by), -1, dtype=ms.int32)), axis=1)
    if segment_ids is None:
        return moved
    same = ops.equal(ops.cat((segment_ids[:, by:], ops.full((B, by), -1, dtype=ms.int32)), axis=1), segment_ids)
    return ops.select(same, moved, ops.full_like(moved, -1))


def _mean(losses: Tensor, weight: Tensor, batch: dict, depth: int) -> Tensor:
    """The mean over what counts, in this batch or, when it is a part, in the whole one; over all ranks' tokens.

    losses: of the positions that a rank has along "seq"; weight: [B, T], of whole rows.
    """
    total = batch["denominators"][depth] if "denominators" in batch else psum(ops.sum(weight), "batch")
    return psum(ops.sum(losses * own_seq(weight, "seq")), "tokens") / ops.maximum(total, 1e-9)


def _further(labels: Tensor, weight: Tensor, segment_ids: Any, k: int) -> tuple:
    """Labels and weights k positions ahead, -1 and 0 for the last k. [B, T] each."""
    labels, none = _ahead(labels, segment_ids, k), ops.zeros((weight.shape[0], k), ms.float32)
    return labels, ops.cat((weight[:, k:], none), axis=1) * ops.greater_equal(labels, 0).astype(ms.float32)


@compiled
def denominators(batch, *, cfg):
    """What a batch divides by: [1 + D + 1] float32, the weights of the main loss, of each MTP depth, and its rows.

    Given to the parts of the batch as ``batch["denominators"]``, it makes their losses and gradients add up to the whole.
    """
    labels, weight = targets(batch)
    sums = (ops.sum(weight),)
    for k in range(1, cfg.num_nextn_predict_layers + 1):
        sums = sums + (ops.sum(_further(labels, weight, batch.get("segment_ids"), k)[1]),)
    return psum(ops.stack(sums + (ops.full_like(sums[0], labels.shape[0]),)), "batch")


@compiled
def loss_fn(params, batch, mtp_weight=None, *, cfg, route=None, balance=None, recompute=False, mtp_prenorm=False):
    """Training loss: main + mtp_weight * MTP + balance, and its parts (report equations 17 and 24-25).

    batch: {"tokens" [B, T] int, and optionally "labels" [B, T] int (the target of each position, negative for none;
    default: the next token), "loss_mask" [B, T], "position_ids" [B, T], "segment_ids" [B, T]}. A cross entropy is the
    mean over the positions that count. MTP depth k runs on the first T - k positions, reads the embedding k ahead and
    the hidden state of the depth before (after ``norm``; before it with ``mtp_prenorm``), and predicts the label k
    ahead where that lies in the same segment; its loss is the mean over the depths.

    mtp_weight: 0-D float32, default MTP_WEIGHT. route, balance: stand-ins for ``nn.router.route`` and the function made by
    ``nn.balance.make_balance``. recompute: True, a tuple of layer numbers (MTP blocks follow the main ones), or "selective",
    the norms and MLA up-projections of every block (report section 3.2.3). What ranks say to each other in a recomputed part
    is said again.
    Returns (loss, {"loss", "main_loss", "mtp_loss", "balance_loss" (weighted) 0-D float32, "load" [MoE layers incl.
    MTP, E] int32}); all but the load are differentiable.
    """
    params, one_block = entered(params, cfg), make_block(cfg, route, balance)
    embedded = embed(params["embed"], batch["tokens"])
    x, loads, aux = layers(params["layers"], embedded, batch, one_block, recompute, cfg)
    main_loss, mtp_loss, more_loads, more_aux = score(params, x, embedded, batch, one_block, recompute, cfg, mtp_prenorm)
    loads, balance_loss = loads + more_loads, balance_of(aux + more_aux, batch, cfg)
    loss = main_loss + balance_loss
    if cfg.num_nextn_predict_layers:
        loss = loss + (MTP_WEIGHT if mtp_weight is None else mtp_weight) * mtp_loss
    load = ops.stack(loads) if loads else ops.zeros((0, cfg.n_routed_experts), ms.int32)
    return loss, {"loss": loss, "main_loss": main_loss, "mtp_loss": mtp_loss, "balance_loss": balance_loss,
                  "load": load}


def score(params: Any, x: Tensor, embedded: Tensor, batch: dict, one_block: Callable, recompute: Any, cfg: Config,
          mtp_prenorm: bool) -> tuple:
    """What follows the main blocks: final norm, head, cross entropy and the MTP modules.

    x: [B, T, D] of the last block; embedded: [B, T, D] of the tokens. Returns (main loss, MTP loss, loads, balance losses).
    """
    tokens, segment_ids, eps = batch["tokens"], batch.get("segment_ids"), cfg.rms_norm_eps
    hidden = rms_norm(x, params["norm"], eps)
    labels, weight = targets(batch)
    main_loss = _mean(token_losses(params, hidden, labels), weight, batch, 0)

    mtp_loss, loads, aux = Tensor(0.0, ms.float32), (), ()
    T, depths = tokens.shape[1], cfg.num_nextn_predict_layers
    _check_length(T, depths)
    handed_on = x if mtp_prenorm else hidden
    for k in range(1, depths + 1):
        p, n = params["mtp"][k - 1], T if parts("residual_seq") > 1 else T - k
        segments = None if segment_ids is None else segment_ids[:, :n]
        positions = None if batch.get("position_ids") is None else batch["position_ids"][:, :n]
        if n == T:
            # T - k positions need not divide: all T run. The last k, whatever they read, come last: no other position sees
            # them, nor do load, balance and cross entropy.
            ahead = embed(p["embed"] if "embed" in p else params["embed"], ops.cat((tokens[:, k:], tokens[:, :k]), axis=1))
        else:
            ahead = embed(p["embed"], tokens[:, k:]) if "embed" in p else embedded[:, k:]
            handed_on = handed_on[:, :n]
        x, load, loss = one_block(p, mtp_input(p, ahead, handed_on, cfg=cfg), rope_tables(positions, n, cfg=cfg), segments,
                                  _recomputes(recompute, cfg.num_hidden_layers + k - 1), T - k)
        loads, aux = loads + load, aux + loss
        normed = rms_norm(x, p["norm"], eps)
        handed_on = x if mtp_prenorm else normed
        further, further_weight = _further(labels, weight, segment_ids, k)
        losses = token_losses(p if "head" in p else params, normed, further[:, :n])
        mtp_loss = mtp_loss + _mean(losses, further_weight[:, :n], batch, k) / depths
    return main_loss, mtp_loss, loads, aux


def balance_of(aux: tuple, batch: dict, cfg: Config) -> Tensor:
    """The balance losses of some blocks together: the mean over all ranks' rows, those of the whole batch if it is a part."""
    total = Tensor(0.0, ms.float32)
    for one in aux:
        total = total + one
    total = psum(total, "batch") / parts("batch")
    if "denominators" in batch:
        total = total * (batch["tokens"].shape[0] * parts("batch") / batch["denominators"][cfg.num_nextn_predict_layers + 1])
    return total


@constexpr
def _check_length(T: int, depths: int) -> None:
    if T <= depths:
        raise ValueError(f"a row of {T} tokens leaves nothing for num_nextn_predict_layers={depths}; give longer rows")
