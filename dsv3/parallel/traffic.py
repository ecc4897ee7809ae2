"""What one step of a rank sends, by arithmetic: to be held against what the compiled program says (``simulate``).

Payloads, as ``ir.Collective.bytes``: the whole tensor that a collective is about. For one micro-batch of B rows of T tokens on a
rank, with n = B T, hidden size D, K experts a token, E experts, a bytes an element of activations, t ranks along "model" and e
along "expert":

- tensor: every sum at the end of attention, ffn and embedding is n D a, an AllReduce, and once more in the backward pass, whose
  derivative of a sum is a sum. Cross entropy over a cut vocabulary takes 4 n for the maximum, which has no derivative, and 4 n
  each for the sum of exponentials and the label's logit.
- expert: the ranks that share the experts gather e n rows of D, their choices (which have no derivative) and their weights,
  4 K bytes a row each, and scatter the sums of e n rows; the derivative of a gather is a scatter and the other way round.
- data: the gradient of every leaf, summed over the ranks that hold copies of it, float32 when micro-batches are added up.
- small: tokens an expert, 4 E a MoE block; 4 bytes for each loss, its derivative and the gradients' norm; the denominators.

An MTP module at depth k sees T - k positions of a row.
"""
from __future__ import annotations

from collections import Counter
from math import prod

from ..config import Config
from ..model import param_specs
from ..optim import is_state
from ..spec import DTYPES, is_spec
from ..tree import paths
from .ir import Collective
from .rules import local_shape
from .shard import Placement

Traffic = Counter  # (kind, group) -> bytes of payload of one step


def traffic(cfg: Config, place: Placement, rows: int, length: int, micro_batches: int, dtype: str) -> Traffic:
    """Of one step without recomputation. rows: of one micro-batch on this rank. Raises ValueError for what is not worked out:
    a pipeline, ZeRO, and rows that are cut over ``context`` or by sequence parallelism."""
    rules, mesh = place.rules, place.mesh
    if mesh.pipe > 1 or rules.zero or place.axes("residual_seq"):
        raise ValueError(f"mesh {mesh}: what it sends is not worked out for a pipeline, ZeRO, or rows that are cut")
    if place.axes("expert") and rules.dispatch != "gather":
        raise ValueError(f"mesh {mesh}: what unequal exchanges send depends on the data; it is worked out for dispatch='gather'")
    a, D, K, E = DTYPES[dtype], cfg.hidden_size, cfg.num_experts_per_tok, cfg.n_routed_experts
    depths = cfg.num_nextn_predict_layers
    found: Traffic = Counter()

    def add(name: str, kind: str, size: int, times: int = 1) -> None:
        group = place.group(name)
        if len(group) > 1:
            found[kind, group] += size * times

    def summed(name: str, size: int) -> None:  # and its derivative
        add(name, "AllReduce", size, 2)

    def block(n: int, moe: bool) -> None:
        summed("heads", n * D * a)
        summed("ffn", n * D * a)
        if moe:
            e = len(place.group("expert"))
            for kind in ("AllGather", "ReduceScatter"):  # the tokens and back, each with its derivative; the weights likewise
                add("expert", kind, e * n * D * a, 2)
                add("expert", kind, e * n * K * 4)
            add("expert", "AllGather", e * n * K * 4)
            add("batch", "AllReduce", 4 * E)

    def scores(n: int) -> None:
        add("vocab", "AllReduce", 4 * n, 5)
        summed("tokens", 4)

    summed("vocab", rows * length * D * a)
    for i in range(cfg.num_hidden_layers):
        block(rows * length, cfg.is_moe_layer(i))
    scores(rows * length)
    for k in range(1, depths + 1):
        if not cfg.mtp_share_embeddings:
            summed("vocab", rows * (length - k) * D * a)
        block(rows * (length - k), True)
        scores(rows * (length - k))
    summed("batch", 4)  # the balance loss
    found = Counter({key: micro_batches * size for key, size in found.items()})
    add("tokens", "AllReduce", 4 * (depths + 2) if micro_batches > 1 else 4 * (depths + 1))  # what losses are divided by
    add("all", "AllReduce", 4)
    for path, spec in paths(param_specs(cfg), is_spec):
        if not is_state(path):
            each = 4 if micro_batches > 1 else DTYPES[spec.dtype or dtype]
            add(place.copies(spec, path), "AllReduce", prod(local_shape(spec, mesh, rules, path)) * each)
    return found


def of_program(collectives: tuple[Collective, ...]) -> Traffic:
    """The same of a compiled program."""
    found: Traffic = Counter()
    for c in collectives:
        found[c.kind, c.group] += c.count * c.bytes
    return found
