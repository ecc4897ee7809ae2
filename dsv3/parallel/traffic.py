"""What one step of a rank sends, by arithmetic: to be held against what the compiled program says (``simulate``).

Payloads, as ``ir.Collective.bytes``: the whole tensor that a collective is about. For one micro-batch of B rows of T tokens
on a data rank: n = B T, of which a rank has m = n / context between the products; hidden size D, latents Q and C + R, K experts
a token of E, a bytes an element of activations. A sum over ranks has a sum as its derivative, a gather a scatter, and the other
way round, so all but what is marked * is sent once more in the backward pass.

- attention: gathers of the latents, m Q a and n (C + R) a, where rows are cut; the sum of its heads, m D a, where heads are: an
  AllReduce, or with sequence parallelism a ReduceScatter.
- ffn: a gather and a sum of m D a likewise. Experts that are shared out: ``dispatch`` gathers e t rows of D with their
  choices* and weights, 4 K bytes a row each, and scatters the sums of as many, for t tokens on each of e ranks; the unequal
  exchanges count for nothing here, because their rows depend on the data, but their 4 e^2 bytes of counts* do.
- router: the choices* and scores of whole rows for load* and balance loss, 4 n K and 4 n E where rows are cut.
- ends: the embedding's sum, the head's gather, and of a cut vocabulary 4 m* each for the maximum, the sum of exponentials, the
  label's logit and, on the way back, the gradient of the losses.
- data: the float32 gradient of every leaf, summed over its copies; with ZeRO scattered over those that share it out (level 2 in
  every micro-batch), summed over the others, and the new params gathered.
- pipeline: m D a / r from stage to stage and back; the gradient of a shared embedding; losses and loads to all stages.

Forward passes are computed more than once: the chunks of a pipeline again in the backward pass, without the last sum of the
chunk, which nothing there reads; recomputed blocks once more, without their own last sums. An MTP module at depth k sees T - k
positions of a row, all T where rows are cut.
"""
from __future__ import annotations

from collections import Counter
from math import prod

from ..config import Config
from ..spec import DTYPES, is_spec, is_state
from ..tree import paths
from .ir import Collective
from .memory import dispatch
from .rules import local_shape, state_shards
from .schedules import chunks_of
from .shard import Placement
from .stages import Chunk, chunks, held, moe_rows, reads_embedding
from .zero import groups_of

Traffic = Counter  # (kind, group) -> bytes of payload of one step
OTHER_WAY = {"AllReduce": "AllReduce", "AllGather": "ReduceScatter", "ReduceScatter": "AllGather"}


def traffic(cfg: Config, place: Placement, rows: int, length: int, micro_batches: int, dtype: str,
            recompute: tuple[int, ...] = ()) -> Traffic:
    """Of one step of this rank. rows: of one micro-batch on its data rank; recompute: numbers of the blocks that are computed
    again in full, MTP modules after the layers. Raises ValueError for what is not worked out: ZeRO level 3."""
    rules, mesh = place.rules, place.mesh
    if rules.zero == 3:
        raise ValueError(f"mesh {mesh}, zero=3: what the gathers of params send is not worked out")
    a, D, K, E = DTYPES[dtype], cfg.hidden_size, cfg.num_experts_per_tok, cfg.n_routed_experts
    latent, depths, line = cfg.kv_lora_rank + cfg.qk_rope_head_dim, cfg.num_nextn_predict_layers, place.pipeline
    r, context = len(place.group("residual")), len(place.group("seq"))
    in_parts = micro_batches > 1 or mesh.pipe > 1
    found: Traffic = Counter()

    def add(name: str, kind: str, size: int, times: int = 1) -> None:
        group = place.group(name)
        if len(group) > 1 and times:
            found[kind, group] += size * times

    def both(name: str, kind: str, size: int, passes: int) -> None:  # in every forward pass, and its derivative
        add(name, kind, size, passes)
        add(name, OTHER_WAY[kind], size)

    def summed(name: str, size: int, passes: int) -> None:
        if r == 1:
            both(name, "AllReduce", size, passes)
        elif len(place.group(name)) > 1:
            both(name, "ReduceScatter", size, passes)

    def block(n: int, moe: bool, passes: int, last: int) -> None:
        """passes: forward passes through it; last: of its last sums."""
        m = n // context
        both("residual", "AllGather", m * (cfg.q_lora_rank or D) * a, passes)
        both("residual_seq", "AllGather", n * latent * a, passes)
        summed("heads", m * D * a, passes)
        cut = len(place.group("ffn")) > 1 and place.rules.axes("ffn", ("expert",)) == place.rules.axes("ffn")
        whole = len(place.group("ffn")) > 1 and not cut
        if not moe or cfg.n_shared_experts or not whole:
            both("residual", "AllGather", m * D * a, passes)
            summed("ffn", m * D * a, last)
        if not moe:
            return
        t = m
        if whole:
            t = -(-m // len(place.group("ffn")))
            if r == 1:  # each rank sees to a part of the tokens
                both("ffn", "AllGather", t * len(place.group("ffn")) * D * a, last)
        else:
            add("residual", "AllGather", m * K * 4, passes)
            both("residual", "AllGather", m * K * 4, passes)
        _dispatch(t, passes, last)
        add("residual_seq", "AllGather", n * K * 4)
        both("residual_seq", "AllGather", n * E * 4, 1)
        add("batch", "AllReduce", 4 * E)

    def _dispatch(t: int, passes: int, last: int) -> None:
        e = len(place.group("expert"))
        form = dispatch(cfg, mesh, rules)
        if form == "gather":
            both("expert", "AllGather", e * t * D * a, passes)
            both("expert", "ReduceScatter", e * t * D * a, last)
            add("expert", "AllGather", e * t * K * 4, passes)
            both("expert", "AllGather", e * t * K * 4, passes)
        elif form == "alltoall":
            add("expert", "AllGather", 4 * e * e, passes)
        elif form == "two_level":
            for name in (f"expert/{rules.node}", f"expert%{rules.node}"):
                add(name, "AllGather", 4 * len(place.group(name)) ** 2, passes)

    def scores(n: int) -> None:
        m = n // context
        both("residual", "AllGather", m * D * a, 1)
        add("vocab", "AllReduce", 4 * m, 4)
        add("tokens", "AllReduce", 4, 2)

    def chunk_of(chunk: Chunk) -> None:
        n, ahead = rows * length, 0 if chunk.last else 1  # forward passes before the backward pass
        if chunk.first:
            summed("vocab", n // context * D * a, 1 + ahead)
        elif chunk.last and chunk.embeds(cfg) and (depths and not place.axes("residual_seq")):
            summed("vocab", n // context * D * a, 1)
        for i in chunk.layers:
            again = i in recompute
            unread = not chunk.last and i == chunk.layers[-1]  # in the pass of the backward graph
            block(n, cfg.is_moe_layer(i), 1 + ahead + again, 1 + ahead - unread)
        if chunk.last:
            scores(n)
            for k in range(1, depths + 1):
                n = rows * (length if place.axes("residual_seq") else length - k)
                if place.axes("residual_seq") or not cfg.mtp_share_embeddings:
                    summed("vocab", n // context * D * a, 1)
                block(n, True, 1 + (cfg.num_hidden_layers + k - 1 in recompute), 1)
                scores(n)
        if moe_rows(chunk, cfg):
            add("batch", "AllReduce", 4, 2)  # the balance loss

    mine = chunks(cfg, place)
    for chunk in mine:
        chunk_of(chunk)
    found = Counter({key: micro_batches * size for key, size in found.items()})
    total = len(line.lengths(cfg.num_hidden_layers, mesh.pipe))
    for chunk in mine:  # to the chunk before and the one after, and from them
        for other in (chunk.index - 1, chunk.index + 1):
            stage = next((s for s in range(mesh.pipe) if 0 <= other < total and other in _held(place, s)), None)
            if stage is not None and stage != mesh.coords(place.rank)["pipe"]:
                there = mesh.group(place.rank, "pipe")[stage]
                size = micro_batches * (rows * length // context // r) * D * a
                found["Send", (place.rank, there)] += size
                found["Receive", (there, place.rank)] += size
    return found + _once(cfg, place, in_parts, micro_batches, dtype)


def _held(place: Placement, stage: int) -> tuple[int, ...]:
    return chunks_of(stage, place.mesh.pipe, place.pipeline.virtual, place.pipeline.schedule)


def _once(cfg: Config, place: Placement, in_parts: bool, micro_batches: int, dtype: str) -> Traffic:
    """Gradients, update and what is told to all, once a step."""
    rules, mesh, depths, found = place.rules, place.mesh, cfg.num_nextn_predict_layers, Counter()

    def add(group: tuple[int, ...], kind: str, size: int) -> None:
        if len(group) > 1:
            found[kind, group] += size

    if in_parts:
        add(place.group("batch"), "AllReduce", 4 * (depths + 2))  # what losses are divided by
    elif any(chunk.last for chunk in chunks(cfg, place)):
        add(place.group("batch"), "AllReduce", 4 * (depths + 1))
    add(place.group("world"), "AllReduce", 4)  # the norm
    line, total = mesh.group(place.rank, "pipe"), len(place.pipeline.lengths(cfg.num_hidden_layers, mesh.pipe))
    tied = mesh.pipe > 1 and reads_embedding(cfg) and total - 1 not in _held(place, 0)  # the embedding is on two stages
    add(line, "AllReduce", 12 + 4 * (cfg.num_moe_layers + depths) * cfg.n_routed_experts)
    specs, names = held(cfg, place)
    for name, (_, spec) in zip(names, paths(specs, is_spec)):
        if is_state(name):
            continue
        size, shards = prod(local_shape(spec, mesh, rules, name)), state_shards(spec, mesh, rules, name)
        sharing, across, others = (place.group(g) for g in groups_of(spec, name, place))
        if shards > 1:
            add(sharing, "ReduceScatter", 4 * size * (micro_batches if rules.zero == 2 else 1))
            add(sharing, "AllGather", DTYPES[spec.dtype or dtype] * size)
        for group in (across, others):
            add(group, "AllReduce", 4 * size // shards)
        if name == "embed" and tied:
            add((line[0], line[-1]), "AllReduce", 4 * size // (shards if rules.zero == 2 else 1))
    return found


def of_program(collectives: tuple[Collective, ...]) -> Traffic:
    """The same of a compiled program."""
    found: Traffic = Counter()
    for c in collectives:
        found[c.kind, c.group] += c.count * c.bytes
    return found
