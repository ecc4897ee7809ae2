"""Where the model meets the vocabulary: embedding, head and cross entropy, each over the rows or columns a rank has."""
from __future__ import annotations

import mindspore as ms
from mindspore import ops

from ..kernels.cross_entropy import cross_entropy
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
    if "head" in params:
        return linear(x, params["head"]).astype(ms.float32)
    return linear(x, ops.transpose(params["embed"], (1, 0))).astype(ms.float32)


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
    logits, labels = head(params, hidden.reshape(B * T, hidden.shape[2])), labels.reshape(B * T)
    if parts("vocab") == 1:
        return cross_entropy(logits, labels).reshape(B, T)
    # log sum exp - logit of the label, each of them a sum over the ranks (arXiv 1909.08053, section 3)
    shifted = logits - pmax(ops.amax(logits, -1), "vocab").reshape(-1, 1)
    column, here = _local(labels, logits.shape[1])
    own = ops.gather_elements(shifted, 1, column.reshape(-1, 1)).reshape(-1) * here.astype(ms.float32)
    loss = ops.log(psum(ops.exp(shifted).sum(-1), "vocab")) - psum(own, "vocab")
    return ops.select(labels >= 0, loss, ops.zeros_like(loss)).reshape(B, T)


def _local(ids, n):
    """Ids in a rank's range of n, 0 outside of it, and whether they are inside."""
    own = ids - part("vocab") * n
    here = ops.logical_and(own >= 0, own < n)
    return ops.select(here, own, ops.zeros_like(own)), here
