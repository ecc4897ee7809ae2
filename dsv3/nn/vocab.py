"""Where the model meets the vocabulary: embedding, head and cross entropy, each over the rows or columns a rank has."""
from __future__ import annotations

import mindspore as ms
from mindspore import ops
from mindspore.ops.function.grad.grad_func import custom_vjp

from ..kernels.cross_entropy import cross_entropy, logits_gradient
from ..kernels.linear import linear
from ..parallel.rows import gather_seq, own_seq, scatter_seq
from ..parallel.shard import all_gather, part, parts, pmax, psum


def embed(w_WD, tokens):
    """Rows of the embedding: the entrance of the model. tokens: [B, T] int, whole rows -> [B, T, D], a rank's positions.

    A rank without a token's row of the embedding adds nothing to it. Raises ValueError when T does not divide.
    """
    if parts("vocab") == 1:
        return ops.gather(w_WD, own_seq(tokens, "residual_seq"), 0)
    rows, here = _local(own_seq(tokens, "seq"), w_WD.shape[0])
    return scatter_seq(ops.gather(w_WD, rows, 0) * here.expand_dims(-1).astype(w_WD.dtype), "vocab")


def head(params, x):
    """Logits of normalised hidden states, float32, for the part of the vocabulary a rank has. x: [..., D] -> [..., W]."""
    return _logits(params, x).astype(ms.float32)


def _logits(params, x):
    if "head" in params:
        return linear(x, params["head"])
    return linear(x, ops.transpose(params["embed"], (1, 0)))


def whole_head(params, x):
    """``head`` for the whole vocabulary, on every rank. x: [n, D] -> [n, W]."""
    logits = head(params, x)
    if parts("vocab") == 1:
        return logits
    return ops.transpose(all_gather(ops.transpose(logits, (1, 0)), "vocab"), (1, 0))


def token_losses(params, hidden, labels):
    """Cross entropy of each position that a rank has along "seq"; 0 where the label is negative. [B, T] float32.

    hidden: [B, T, D], a rank's positions; labels: [B, T] int32, whole rows.
    """
    hidden, labels = gather_seq(hidden, "residual"), own_seq(labels, "seq")
    B, T = labels.shape
    logits, labels = _logits(params, hidden.reshape(B * T, hidden.shape[2])), labels.reshape(B * T)
    if parts("vocab") == 1:
        return cross_entropy(logits, labels).reshape(B, T)
    return _cut_cross_entropy(logits, labels)[0].reshape(B, T)


@custom_vjp
def _cut_cross_entropy(logits, labels):
    """log sum exp - logit of the label, each of them a sum over the ranks (arXiv 1909.08053, section 3); the maximum; the sum.

    Of logits [tokens, W] a rank keeps what it has of them, in their dtype, and two numbers a token.
    """
    wide, (column, here) = logits.astype(ms.float32), _local(labels, logits.shape[1])
    top = pmax(ops.amax(wide, -1), "vocab")
    total = psum(ops.exp(wide - top.reshape(-1, 1)).sum(-1), "vocab")
    own = (ops.gather_elements(wide, 1, column.reshape(-1, 1)).reshape(-1) - top) * here.astype(ms.float32)
    loss = ops.log(total) - psum(own, "vocab")
    return ops.select(labels >= 0, loss, ops.zeros_like(loss)), top, total


def _cut_backward(logits, labels, outputs, doutputs):
    """Every rank that has a part of the logits reports their losses, hence the sum (``parallel.shard``)."""
    column, here = _local(labels, logits.shape[1])
    dloss = psum(ops.select(labels >= 0, doutputs[0], ops.zeros_like(doutputs[0])), "vocab")
    return logits_gradient(logits, outputs[1], outputs[2], column, here.astype(ms.float32), dloss), ops.zeros_like(labels)


_cut_cross_entropy.defbwd(_cut_backward)


def _local(ids, n):
    """Ids in a rank's range of n, 0 outside of it, and whether they are inside."""
    own = ids - part("vocab") * n
    here = ops.logical_and(own >= 0, own < n)
    return ops.select(here, own, ops.zeros_like(own)), here
