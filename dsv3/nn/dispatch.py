"""How tokens meet their experts when ranks share the experts out: dropless exchanges, and what each costs.

n ranks hold E / n experts each and T tokens of their own. All forms compute the same; they differ in the rows a rank sends,
and again gets back, D elements each:

gather: every token to every rank, (n - 1) T rows. Shapes are static, so all pairs of n T tokens have memory at each rank.
alltoall: a token once to each rank that holds one of its K experts. That is at most V = min(K, n, G max(1, n / groups)) ranks
    with the router's limit to G groups, V (n - 1) / n T rows. The data decide how many: n counts are exchanged before, and
    AlltoAllV gives tensors whose size the compiler does not know. (Equal blocks would have to leave room for all T tokens
    between any two ranks: as many bytes as gather.)
two_level: a token once to each node with one of its experts, to the rank with its sender's place in the node, and from there
    inside the node to the experts' ranks: only min(V, nodes) (1 - 1 / nodes) T rows at most between nodes, for which the
    report limits a token to 4 nodes (section 3.2.2).
replicated: where all ranks have the same tokens, as when they decode together, none travels: only the answers are summed.

For the 671B in bfloat16, K = 8 in 4 of 8 groups, KiB a token and direction, averages of an even load: n = 8: gather 98,
alltoall 44; n = 64 on nodes of 8: gather 882, alltoall 101, of which 90 between nodes, two_level 44 between and 90 inside.
Each rank weights and sums what its own experts say of a token before it answers, so a row comes back for each row sent.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import ops
from mindspore.ops.primitive import constexpr

from ..kernels.experts import experts, weighted_sum
from ..kernels.grouped_matmul import grouped_matmul
from ..kernels.int8 import integers
from ..kernels.native import iota
from ..kernels.swiglu import swiglu
from ..parallel.shard import all_gather, all_to_all_v, here, on_cpu, part, parts, psum, reduce_scatter


@constexpr
def ranks_visited(n: int, K: int, n_group: int, topk_group: int) -> int:
    """V: the most of n ranks that hold experts of one token with K experts in ``topk_group`` of ``n_group`` groups."""
    return min(K, n, topk_group * max(1, n // n_group))


@constexpr
def form_of(n: int, visited: int) -> str:
    """``form_by`` the rules of the place that is compiled for."""
    place = here()
    return form_by(n, visited, *((place.rules.dispatch, place.rules.node) if place else (None, None)))


def form_by(n: int, visited: int, choice: str | None, node: int | None) -> str:
    """The rules' choice, else by rows sent: gather where a token may visit all ranks anyway, two levels where nodes are named."""
    if choice is not None:
        return choice
    if visited >= n:
        return "gather"
    return "two_level" if node is not None and 1 < node < n and n % node == 0 else "alltoall"


def exchanged_experts(w, x_TD, idx_TK, weights_TK, form):
    """``kernels.experts.experts`` of a rank's tokens [T, D], with the experts of all ranks, of which ``w`` has this one's.

    idx_TK: numbers among all experts, distinct in a token. With each expert cut over ranks too, the parts are to be summed.
    """
    if parts("expert") == 1:
        return experts(x_TD, w["w_gate"], w["w_up"], w["w_down"], idx_TK, weights_TK)
    E = integers(w["w_gate"]).shape[0]
    if form == "replicated":
        return psum(_own_experts(w, x_TD, idx_TK - part("expert") * E, weights_TK, True), "expert")
    if form == "gather":
        x, idx, weights = all_gather(x_TD, "expert"), all_gather(idx_TK, "expert"), all_gather(weights_TK, "expert")
        return reduce_scatter(_own_experts(w, x, idx - part("expert") * E, weights, True), "expert")
    # A row of zeros to this rank's first expert, of no weight: nobody is ever sent nothing, for which AlltoAllV answers a
    # tensor without dims.
    K = idx_TK.shape[1]
    x = ops.concat((x_TD, ops.zeros((1, x_TD.shape[1]), x_TD.dtype)))
    idx = ops.concat((idx_TK, ops.full((1, K), part("expert") * E, dtype=ms.int32)))
    weights = ops.concat((weights_TK, ops.zeros((1, K), weights_TK.dtype)))
    if form == "two_level":
        out = _through_nodes(w, x, idx, weights, E)
    else:
        x, idx, weights, way = _send(x, idx, weights, "expert", E)
        out = _answer(_own_experts(w, x, idx, weights, on_cpu()), way, "expert")
    return out[:-1]


def _through_nodes(w, x, idx, weights, E):
    across, within = _levels()
    x, idx, weights, outer = _send(x, idx, weights, across, E * parts(within))
    x, idx, weights, inner = _send(x, idx, weights, within, E)
    out = _own_experts(w, x, idx, weights, on_cpu())
    return _answer(_answer(out, inner, within), outer, across)


@constexpr
def _levels() -> tuple[str, str]:
    """The ranks with this one's place in every node, and those of its node."""
    node = here().rules.node
    return f"expert/{node}", f"expert%{node}"


def _send(x_RD, idx_RK, weights_RK, name, size):
    """Each row once to every rank of ``name`` that leads to one of its experts; ``size``: experts behind each of them.

    Returns the rows that come, [Q, D], their idx counted from the first of the ``size`` experts here (others lie outside of
    0 .. size - 1), their weights, and the way back.
    """
    n, K = parts(name), idx_RK.shape[1]
    _, at_P, sent_n = _copies(idx_RK // size, n, on_cpu())
    counts_nn = all_gather(sent_n.reshape(1, n), name)
    most = x_RD.shape[0] * n if on_cpu() else 0
    x_QD = all_to_all_v(ops.gather(x_RD, at_P, 0), counts_nn, name, most)
    choice = ops.concat((idx_RK.astype(ms.float32), weights_RK.astype(ms.float32)), 1)  # numbers of experts are exact in it
    choice = all_to_all_v(ops.gather(choice, at_P, 0), counts_nn, name, most)
    return x_QD, choice[:, :K].astype(ms.int32) - part(name) * size, choice[:, K:], (x_RD, at_P, counts_nn)


def _answer(out_QD, way, name):
    """The sum of the answers to each row that was sent: the reverse of ``_send``."""
    x_RD, at_P, counts_nn = way
    rows_PD = all_to_all_v(out_QD, counts_nn.transpose(), name, at_P.shape[0] if on_cpu() else 0)
    return _add_rows(x_RD, at_P, rows_PD)


def _own_experts(w, x_RD, idx_RK, weights_RK, static):
    """The weighted sum of what this rank's experts say, [R, D]; an idx that is none of theirs counts for nothing."""
    expert_P, at_P, counts_E = _copies(idx_RK, integers(w["w_gate"]).shape[0], static)
    end_E, x_PD = ops.cumsum(counts_E, 0), ops.gather(x_RD, at_P, 0)
    gate_PF, up_PF = grouped_matmul(x_PD, w["w_gate"], end_E, static), grouped_matmul(x_PD, w["w_up"], end_E, static)
    out_PD = grouped_matmul(swiglu(gate_PF, up_PF), w["w_down"], end_E, static)
    chosen_PK = ops.equal(ops.gather(idx_RK, at_P, 0), expert_P.reshape(-1, 1)).astype(ms.float32)
    weight_P1 = (ops.gather(weights_RK, at_P, 0).astype(ms.float32) * chosen_PK).sum(1, keepdims=True)
    return _add_rows(x_RD, at_P, weighted_sum(ops.expand_dims(out_PD, 1), weight_P1))


def _copies(to_RK, n, static):
    """A copy of each row for every one of n places that it names: (place [P], row [P], copies for each place [n]), all int32.

    Sorted by place, then row. Numbers outside of 0 .. n - 1 name no place. static, on the CPU, which has no exchange of unequal
    parts: P is R min(n, K), enough for all, and the
    copies after the last name some place and row; else P is their number, known when the program runs.
    """
    R, K = to_RK.shape
    named_nR = ops.equal(to_RK.expand_dims(0), iota(n).reshape(n, 1, 1)).astype(ms.int32).sum(-1) > 0
    counts_n = named_nR.astype(ms.int32).sum(1).astype(ms.int32)
    if static:
        position = iota(n * R)
        keys = ops.select(named_nR.reshape(-1), position, position + n * R)
        position = ops.sort(keys)[0][:R * min(n, K)] % (n * R)
        return (position // R).astype(ms.int32), (position % R).astype(ms.int32), counts_n
    at_P2 = ops.nonzero(named_nR).astype(ms.int32)
    return at_P2[:, 0], at_P2[:, 1], counts_n


def _add_rows(like_RD, at_P, rows_PD):
    """[R, D] of zeros in the dtype of ``like_RD``, with each row added in at its place; summed in float32."""
    total = ops.tensor_scatter_add(ops.zeros_like(like_RD, dtype=ms.float32), at_P.reshape(-1, 1), rows_PD.astype(ms.float32))
    return total.astype(like_RD.dtype)
