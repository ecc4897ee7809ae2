"""Prefill and decode over the latent cache against the training forward, and the cache's kernels against a float64 oracle.

Planted faults this file was seen to catch, one at a time:
a key of the future in the reference; a token that does not see itself, every sequence with the first one's table, and keys
turned by their place in the batch, in C++; a latent cached before its norm; weights with the bias in a decoded block; packed
prompts that see each other.
"""

import numpy as np
import pytest
from mindspore import Tensor

import dsv3
from dsv3 import decode
from dsv3.config import Yarn
from dsv3.kernels import latent
from dsv3.model import forward
from dsv3.transform import bind, jit

BLOCK = 4
TINY = dsv3.TINY.replace(vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
                         num_attention_heads=3, q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6,
                         v_head_dim=14, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
                         initializer_range=0.2, max_position_embeddings=4096)
YARN = Yarn(factor=4.0, original_max_position_embeddings=32, beta_fast=32, beta_slow=1, mscale=0.8, mscale_all_dim=1.0)


# -- the kernels -------------------------------------------------------------------------------------------------------
def oracle(q, w, cos, sin, positions, tables, pool, H, scale):
    """Keys and values in full, float64."""
    C, R, T = w.shape[0], 2 * cos.shape[1], len(q) // len(tables)
    N = q.shape[1] // H - R
    V, out = w.shape[1] // H - N, []
    for i, p in enumerate(positions):
        slots = (tables[i // T][:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)[:p + 1]
        rows, heads = pool[slots].astype(np.float64), []
        for h in range(H):
            q_h, w_h = q[i].astype(np.float64).reshape(H, N + R)[h], w.astype(np.float64).reshape(C, H, N + V)[:, h]
            pairs = (q_h[N::2] + 1j * q_h[N + 1::2]) * (cos[p] + 1j * sin[p].astype(np.float64))
            scores = (rows[:, :C] @ w_h[:, :N] @ q_h[:N] + rows[:, C:] @ np.concatenate([pairs.real, pairs.imag])) * scale
            weights = np.exp(scores - scores.max())
            heads.append(weights / weights.sum() @ (rows[:, :C] @ w_h[:, N:]))
        out.append(np.concatenate(heads))
    return np.array(out)


@pytest.mark.parametrize("form", ["chosen", "reference"])
def test_attention_over_blocks(form):
    rng, H, N, R, V, C, L = np.random.default_rng(0), 3, 10, 6, 14, 21, 40
    pool = rng.standard_normal((12 * BLOCK, C + R)).astype(np.float32)
    q, w = (rng.standard_normal(s).astype(np.float32) for s in ((6, H * (N + R)), (C, H * (N + V))))
    angles = rng.standard_normal((L, R // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    tables = np.array([[3, 1, 7, 0], [11, 2, 0, 0], [5, 9, 4, 10]], np.int32)
    positions = np.array([8, 9, 0, 1, 14, 15], np.int32)
    attend = latent.latent_attention if form == "chosen" else latent.latent_attention_reference

    def run(q, w, cos, sin, positions, tables, pool, written):
        return attend(q, w, cos, sin, positions, tables, pool, written, num_heads=H, scale=0.3, block_size=BLOCK)

    found = jit(run)(q, w, cos, sin, positions, tables, pool, np.zeros((6, C + R), np.float32)).asnumpy()
    np.testing.assert_allclose(found, oracle(q, w, cos, sin, positions, tables, pool, H, 0.3), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", ["chosen", "reference"])
def test_writing_rows(form):
    rng, C, R, L, n = np.random.default_rng(1), 21, 6, 30, 5
    x, norm, eps = rng.standard_normal((n, C + R)).astype(np.float32), rng.standard_normal(C).astype(np.float32), 1e-6
    angles, positions, slots = rng.standard_normal((L, R // 2)), np.array([0, 29, 3, 3, 7]), np.array([4, 19, 0, 7, 8])
    pool, before = bind(Tensor(np.full((20, C + R), 7, np.float32))), np.full((20, C + R), 7)
    write = latent.write_latents if form == "chosen" else latent.write_latents_reference

    def run(pool, *rest):
        return write(*rest, pool, eps=eps)

    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    found = jit(run, bound=pool)(x, norm, cos, sin, positions.astype(np.int32), slots.astype(np.int32)).asnumpy()
    pairs = (x[:, C::2] + 1j * x[:, C + 1::2]) * np.exp(1j * angles[positions])
    plain = x[:, :C] / np.sqrt((x[:, :C].astype(np.float64) ** 2).mean(1, keepdims=True) + eps) * norm
    wanted = np.concatenate([plain, pairs.real, pairs.imag], 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    after = before.astype(np.float64)
    after[slots] = wanted
    np.testing.assert_allclose(next(iter(pool.parameters.values())).asnumpy(), after, rtol=1e-5, atol=1e-6)


# -- the model ---------------------------------------------------------------------------------------------------------
class Decoder:
    """The graphs for one sequence or more, with tables of their own."""

    def __init__(self, params, cfg, rows, length, mtp=False, fused=True):
        self.M = -(-length // BLOCK)
        cache = decode.make_cache(cfg, blocks=1 + rows * self.M, block_size=BLOCK, rows=rows, max_length=length, mtp=mtp)
        bound = bind(params, cache)
        order = np.random.default_rng(3).permutation(rows * self.M) + 1  # blocks in any order
        self.tables = order.reshape(rows, self.M).astype(np.int32)

        def prefill(params, cache, *rest):
            return decode.prefill(params, cache, *rest, cfg=cfg, block_size=BLOCK, mtp=mtp, fused=fused)

        def extend(params, cache, *rest):
            return decode.extend(params, cache, *rest, cfg=cfg, block_size=BLOCK, mtp=mtp, fused=fused)

        self._prefill, self._extend = jit(prefill, bound=bound), jit(extend, bound=bound)

    def slots(self, row, positions):
        return (self.tables[row][positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32)

    def fresh(self, prompts):
        """Logits of every token of prompts that are packed into one row."""
        positions = [np.arange(len(p)) for p in prompts]
        slots = [self.slots(i, p) for i, p in enumerate(positions)]
        segments = [np.full(len(p), i) for i, p in enumerate(prompts)]
        flat = [np.concatenate(x).astype(np.int32) for x in (prompts, positions, slots, segments)]
        n = len(flat[0])
        logits = self._prefill(*flat, np.arange(n, dtype=np.int32), flat[0], np.zeros(n, np.int32))[1].asnumpy()
        return np.split(logits, np.cumsum([len(p) for p in prompts])[:-1])

    def more(self, tokens, starts):
        """Logits of the next tokens [B, T] of rows that begin at ``starts``."""
        B, T = tokens.shape
        positions = np.array(starts)[:, None] + np.arange(T)
        slots = np.stack([self.slots(b, positions[b]) for b in range(B)])
        flat = [x.reshape(-1).astype(np.int32) for x in (tokens, positions, slots)]
        every = np.arange(B * T, dtype=np.int32)
        return self._extend(*flat, self.tables[:B], every, flat[0], every * 0)[1].asnumpy().reshape(B, T, -1)


@pytest.mark.parametrize("fused, changes", [
    (True, {}), (False, {}),
    (True, {"rope_scaling": YARN, "rope_theta": 100.0}), (False, {"rope_scaling": YARN, "rope_theta": 100.0}),
    (True, {"q_lora_rank": None, "n_shared_experts": None, "norm_topk_prob": False}),
    (True, {"scoring_func": "softmax", "topk_method": "greedy", "n_shared_experts": 2}),
], ids=["plain", "composed", "yarn", "yarn composed", "no q_lora, none shared", "softmax, greedy"])
def test_every_step_is_the_forward(fused, changes):
    """Packed prompts, then single tokens, then several at once, of rows of different lengths: the forward's logits."""
    cfg = TINY.replace(**changes)
    params, rng = dsv3.init(cfg, seed=1), np.random.default_rng(0)
    for layer in params["layers"]:
        if "bias" in layer.get("router", {}):
            layer["router"]["bias"] = Tensor(rng.standard_normal(cfg.n_routed_experts).astype(np.float32) * 0.1)
    tokens = rng.integers(0, cfg.vocab_size, (3, 40))
    whole = forward(params, tokens, cfg=cfg).asnumpy()
    decoder, starts = Decoder(params, cfg, 3, 40, fused=fused), [9, 1, 20]
    for b, found in enumerate(decoder.fresh([tokens[b, :n] for b, n in enumerate(starts)])):
        np.testing.assert_allclose(found, whole[b, :starts[b]], rtol=0, atol=1e-5)
    for width in (1,) * 8 + (4,) * 3:
        new = np.stack([tokens[b, n:n + width] for b, n in enumerate(starts)])
        found = decoder.more(new, starts)
        for b, n in enumerate(starts):
            np.testing.assert_allclose(found[b], whole[b, n:n + width], rtol=0, atol=1e-5)
        starts = [n + width for n in starts]


@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
def test_long_positions(yarn):
    """A prompt in chunks up to position 3000, where float32 angles would be off by more than the bound."""
    cfg = TINY.replace(rope_scaling=yarn, num_hidden_layers=2)
    params = dsv3.init(cfg, seed=2)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (1, 3072))
    whole = forward(params, tokens, cfg=cfg).asnumpy()[0]
    decoder = Decoder(params, cfg, 1, 3072)
    worst = np.abs(decoder.fresh([tokens[0, :1024]])[0] - whole[:1024]).max()
    for start in range(1024, 3072, 1024):
        worst = max(worst, np.abs(decoder.more(tokens[:, start:start + 1024], [start])[0] - whole[start:start + 1024]).max())
    print("largest difference of a logit:", worst, "of", np.abs(whole).max())
    assert worst < 1e-5 * max(1, np.abs(whole).max())


def test_sizes_of_the_cache():
    assert decode.bytes_per_token(dsv3.V3) == 61 * 576 * 4
    assert 128 * (128 + 64 + 128) / 576 == pytest.approx(71.1, abs=0.1)  # expanded keys and values, beside it
    cache = decode.make_cache(TINY, blocks=5, block_size=4, rows=2, max_length=9, mtp=True)
    assert [p.shape for p in cache["layers"]] == [(20, 18)] * 4
    assert cache["hidden"].shape == (6, 32) and cache["cos"].shape == (9, 3)
    with pytest.raises(ValueError, match="drafts need an MTP module"):
        decode.make_cache(TINY.replace(num_nextn_predict_layers=0), blocks=5, block_size=4, rows=2, max_length=9, mtp=True)
    with pytest.raises(ValueError, match="dtype='int8'"):
        decode.make_cache(TINY, blocks=5, block_size=4, rows=2, max_length=9, dtype="int8")
