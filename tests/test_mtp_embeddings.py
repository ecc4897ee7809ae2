"""MTP modules with an embedding and a head of their own (``mtp_share_embeddings=False``).

Planted faults this file was seen to catch: the main embedding used ahead; the main head used; gradients that go to the main
embedding; export that writes the main embedding's values; a config that forgets the key.
"""
import numpy as np
import pytest

import dsv3
from dsv3.checkpoint import convert, formats
from dsv3.tree import paths

SHARED = dsv3.TINY.replace(num_hidden_layers=1, vocab_size=64, hidden_size=32, num_nextn_predict_layers=1, n_routed_experts=4,
                           num_experts_per_tok=2, n_group=1, topk_group=1, aux_loss_alpha=0.0)
APART = SHARED.replace(mtp_share_embeddings=False)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)


def values(tree):
    return {path: leaf.asnumpy() for path, leaf in paths(tree)}


def losses_and_grads(params, cfg):
    def loss(params, batch):
        return dsv3.loss_fn(params, batch, cfg=cfg)

    (_, metrics), grads = dsv3.value_and_grad(loss, has_aux=True)(params, {"tokens": TOKENS})
    return {k: float(metrics[k]) for k in ("loss", "main_loss", "mtp_loss")}, values(grads)


def test_equal_copies_change_nothing_but_where_gradients_go():
    params = dsv3.init(SHARED, seed=1)
    module = params["mtp"][0] | {"embed": params["embed"], "head": params["head"]}
    shared, g = losses_and_grads(params, SHARED)
    apart, h = losses_and_grads(params | {"mtp": (module,)}, APART)
    assert shared == pytest.approx(apart, rel=1e-6)
    for name in ("embed", "head"):
        np.testing.assert_allclose(g[name], h[name] + h[f"mtp.0.{name}"], rtol=1e-4, atol=1e-7)
        assert np.abs(h[f"mtp.0.{name}"]).max() > 0
    rest = [k for k in g if k not in ("embed", "head")]
    assert all(np.allclose(g[k], h[k], rtol=1e-4, atol=1e-7) for k in rest) and len(h) == len(g) + 2


def test_its_own_embedding_and_head_are_used():
    def losses(params):
        metrics = dsv3.loss_fn(params, {"tokens": TOKENS}, cfg=APART)[1]
        return {k: float(metrics[k]) for k in ("main_loss", "mtp_loss")}

    params = dsv3.init(APART, seed=1)
    before = losses(params)
    for name in ("embed", "head"):
        changed = params["mtp"][0] | {name: dsv3.init(APART, seed=2)["mtp"][0][name]}
        after = losses(params | {"mtp": (changed,)})
        assert after["main_loss"] == before["main_loss"] and after["mtp_loss"] != before["mtp_loss"]


def test_kept_apart_through_files(tmp_path):
    params = dsv3.init(APART, seed=3)
    dsv3.to_hf(params, APART, tmp_path / "hf", dtype="float32")
    found, cfg = dsv3.from_hf(tmp_path / "hf")
    assert cfg == APART and not cfg.mtp_share_embeddings
    ours = values(params)
    assert all(np.array_equal(x, ours[k]) for k, x in values(found).items())
    source = formats.open_checkpoint(tmp_path / "hf")
    target = formats.make_target(source, "own")
    convert.convert(source, target, tmp_path / "own")
    convert.verify(source, formats.open_checkpoint(tmp_path / "own"), target)
    assert not np.array_equal(values(dsv3.load(tmp_path / "own")[0])["mtp.0.embed"], ours["embed"])
    for form in ("mcore", "mindformers"):
        with pytest.raises(ValueError, match="mtp_share_embeddings is false"):
            formats.make_target(source, form)
    config = (tmp_path / "hf" / "config.json").read_text()
    (tmp_path / "hf" / "config.json").write_text(config.replace('"mtp_share_embeddings": false', '"mtp_share_embeddings": true'))
    with pytest.raises(ValueError, match="set mtp_share_embeddings to false"):
        dsv3.from_hf(tmp_path / "hf")
