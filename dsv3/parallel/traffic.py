"""What one step of a rank sends, by arithmetic: to be held against what the compiled program says (``simulate``).

Payloads, as ``ir.Collective.bytes``: the whole tensor that a collective is about. For one micro-batch of B rows of T tokens on a
rank, with n = B T, hidden size D, K experts a token, E experts, a bytes an element of activations, t ranks along "model" and e
along "expert":

- tensor: every sum at the end of attention, ffn and embedding is n D a, an AllReduce, and once more in the backward pass, whose
  derivative of a sum is a sum. With sequence parallelism each is a ReduceScatter, whose derivative is an AllGather, and what goes
  into the products is gathered: the query's latent n Q a, the keys' and rotary latent n (C + R) a, the ffn's input n D a, the
  head's input n D a, a router's choice and weights 4 n K each (the choice has no derivative). Cross entropy over a cut vocabulary
  sums 4 n for the maximum, which has no derivative, and 4 n each for the sum of exponentials and the label's logit.
- expert: the ranks that share the experts gather e n rows of D, their choices and weights, and scatter the sums of e n rows.
- data: the gradient of every leaf, summed over the ranks that hold copies of it, float32 when micro-batches are added up.
- small: tokens an expert, 4 E a MoE block; 4 bytes for each loss, its derivative and the gradients' norm; the denominators.

An MTP module at depth k sees T - k positions of a row, or all T when rows are cut.
"""
from __future__ import annotations

from collections import Counter

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
    """Of one step without recomputation. rows: of one micro-batch on this rank. Raises ValueError for what is not counted here:
    a pipeline, ZeRO, rows cut over ``context``, and experts dispatched otherwise than by gathering."""
    rules, mesh, cut = place.rules, place.mesh, bool(place.axes("residual"))
    if mesh.pipe > 1 or rules.zero or mesh.context > 1 or cut:
        raise ValueError(f"mesh {mesh}: what it sends is not worked out for a pipeline, ZeRO, or rows that are cut")
    a, D, K, E, depths = DTYPES[dtype], cfg.hidden_size, cfg.num_experts_per_tok, cfg.n_routed_experts, cfg.num_nextn_predict_layers
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
    if micro_batches > 1:
        add("tokens", "AllReduce", 4 * (depths + 2))
    add("all", "AllReduce", 4)
    for path, spec in paths(param_specs(cfg), is_spec):
        if not is_state(path):
            size = 1
            for n in local_shape(spec, mesh, rules, path):
                size *= n
            add(place.copies(spec, path), "AllReduce", size * (4 if micro_batches > 1 else DTYPES[spec.dtype or dtype]))
    return found


def of_program(collectives: tuple[Collective, ...]) -> Traffic:
    """The same of a compiled program."""
    found: Traffic = Counter()
    for c in collectives:
        found[c.kind, c.group] += c.count * c.bytes
    return found
