"""Rows cut over ranks: sequence and context parallelism make the step of one device, and say to each other what they must.

Planted faults this file was seen to catch: segments not taken at the queries' positions; chunks dealt out in their order (two
ranks with unequal work); rows held against one chunk a rank only; a row's weight counted by every rank that shares it; a load
that counts MTP's last positions.
"""
from collections import Counter

import numpy as np
import pytest
from parallel_worker import EPSILON, cut_up
from test_parallel_numbers import CHANGES, LENGTH, ROWS, assert_lockstep, on_one_device
from test_parallel_processes import assert_equal, launch

import dsv3
from dsv3.kernels.attention import mla_attention
from dsv3.nn.vocab import embed
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rows import order
from dsv3.parallel.rules import make_rules
from dsv3.parallel.shard import Placement, placed
from dsv3.transform import jit, value_and_grad

SP = {"sequence_parallel": True}


@pytest.mark.parametrize("mesh, rules, more", [
    (Mesh(context=2), {}, {"num_nextn_predict_layers": 1}),  # experts in the MTP
    pytest.param(Mesh(context=2, model=2), SP, {"first_k_dense_replace": 0, "num_nextn_predict_layers": 2},
                 marks=pytest.mark.slow),
], ids=["context", "context and sequence, two depths"])
def test_processes_that_share_rows_make_the_step_of_one_device(tmp_path, mesh, rules, more):
    """Context parallelism, with sequence parallelism too, of rows of two documents each with their own positions."""
    changes = CHANGES | {"num_hidden_layers": 1} | more
    cfg = dsv3.TINY.replace(**changes)
    wanted, final = on_one_device(cfg, cut_up, eps=EPSILON)
    launch(tmp_path, mesh, changes, rules, documents=True)
    assert_equal(tmp_path, mesh, cfg, wanted, final)


@pytest.mark.slow
def test_sequence_parallelism_with_micro_batches_and_selective_recompute(tmp_path):
    """Norms and up-projections computed again gather the latents again; the sums of two micro-batches are of the whole batch."""
    mesh, changes = Mesh(model=2), CHANGES | {"num_nextn_predict_layers": 1}
    cfg = dsv3.TINY.replace(**changes)
    wanted, final = on_one_device(cfg, accumulate=2)
    launch(tmp_path, mesh, changes, SP, options={"accumulate": 2, "recompute": "selective"})
    assert_equal(tmp_path, mesh, cfg, wanted, final)


def test_sequence_parallelism_in_lockstep_sends_what_it_must(tmp_path):
    """The programs for Ascend: their numbers, and what they send of the residual stream and the latents, by hand."""
    changes = CHANGES | {"num_hidden_layers": 1, "num_nextn_predict_layers": 1, "q_lora_rank": 40}  # dense, MoE in MTP
    cfg = dsv3.TINY.replace(**changes)
    D, Q, latent = cfg.hidden_size, cfg.q_lora_rank, cfg.kv_lora_rank + cfg.qk_rope_head_dim
    found = Counter()
    for c in assert_lockstep(tmp_path, "model=2", SP, changes)[0].collectives:
        if len(c.shape) == 3 and c.shape[-1] in (D, Q, latent):
            found[c.kind, c.backward, c.shape[-1], c.bytes] += c.count
    blocks, heads, wanted = 2, 2, Counter()  # with the MTP module's
    for width, gathers, scatters in ((D, blocks + heads, 2 * blocks + heads), (Q, blocks, 0), (latent, blocks, 0)):
        size = ROWS * LENGTH * width * 4  # gathers before FFN and head, scatters after embedding, attention and FFN
        wanted["AllGather", False, width, size] = wanted["ReduceScatter", True, width, size] = gathers
        wanted["ReduceScatter", False, width, size] = wanted["AllGather", True, width, size] = scatters
    assert found == +wanted


@pytest.mark.parametrize("documents", [False, True])
def test_attention_of_some_queries_is_that_of_all(documents):
    """Values, and gradients with respect to all inputs when the chunks of two ranks are added up."""
    B, T, H, N, R, V = 2, 8, 2, 4, 2, 4
    rng = np.random.default_rng(0)
    q, kv, k_pe = (rng.normal(size=(B, T, n)).astype(np.float32) for n in (H * (N + R), H * (N + V), R))
    angles = rng.normal(size=(B, T, R // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    segments = cut_up(np.zeros((B, T), np.int32), 1)["segment_ids"] if documents else None
    parts = order(T, 2).reshape(2, -1)
    out_weight = rng.normal(size=(B, T, H * V)).astype(np.float32)

    def attend(tensors, positions):
        return mla_attention(tensors["q"], tensors["kv"], tensors["k_pe"], tensors["cos"], tensors["sin"], tensors["segments"],
                             num_heads=H, qk_nope_head_dim=N, qk_rope_head_dim=R, v_head_dim=V, scale=0.5,
                             query_positions=positions)

    def loss(moving, rest, weight, positions):
        out = attend({"q": moving[0], "kv": moving[1], "k_pe": moving[2], "cos": rest[0], "sin": rest[1], "segments": rest[2]},
                     positions)
        return (out * weight).sum(), out

    run = value_and_grad(loss, has_aux=True)
    (_, whole), wanted = run((q, kv, k_pe), (cos, sin, segments), out_weight, None)
    found = [np.zeros_like(x) for x in (q, kv, k_pe)]
    for at in parts:
        (_, out), (dq, dkv, dk_pe) = run((q[:, at], kv, k_pe), (cos, sin, segments), out_weight[:, at], at)
        np.testing.assert_allclose(out.asnumpy(), whole.asnumpy()[:, at], atol=5e-6)
        found[0][:, at] = dq.asnumpy()
        found[1] += dkv.asnumpy()
        found[2] += dk_pe.asnumpy()
    for ours, theirs in zip(found, wanted):
        np.testing.assert_allclose(ours, theirs.asnumpy(), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_rank_has_as_much_to_attend_to(n):
    positions = order(12, n)
    assert sorted(positions) == list(range(12))
    assert len({part.sum() for part in positions.reshape(n, -1)}) == 1
    assert all((np.diff(part.reshape(2, -1)) == 1).all() for part in positions.reshape(n, -1))


@pytest.mark.parametrize("mesh, rules, length, needed, right", [
    (Mesh(context=2), {}, 10, 4, 12), (Mesh(context=2, model=4), SP, 20, 8, 24),
])
def test_rows_that_do_not_divide_are_refused(mesh, rules, length, needed, right):
    @jit
    def run(table, tokens):
        return embed(table, tokens)

    complaint = f"{length} tokens.* by {needed},.* {right} "
    with placed(Placement(mesh, make_rules(**rules))), pytest.raises(ValueError, match=complaint):
        run(np.zeros((8, 4), np.float32), np.zeros((1, length), np.int32))


def test_rules_that_the_model_has_no_communication_for_are_refused_by_name():
    rules = make_rules(sequence_parallel=True)
    with pytest.raises(ValueError, match="residual_seq"):
        Placement(Mesh(model=2), rules.replace("residual_tokens", ("data", "context")))
    with pytest.raises(ValueError, match="sequence parallelism.*'heads'"):
        rules = rules.replace("seq", ()).replace("tokens", ("data",)).replace("residual_seq", ("model",))
        rules = rules.replace("residual_tokens", ("data", "model")).replace("heads", ("model", "context"))
        Placement(Mesh(model=2, context=2), rules)
