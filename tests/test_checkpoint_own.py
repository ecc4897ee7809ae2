"""Our own checkpoints: round trips, what is refused, and that a folder is there whole or not at all.

Planted faults this file was seen to catch. Folders: the old one deleted before the rename; two renames where
a swap is possible; the old one not put back after a failed rename; the temporary one left after an error;
files or the parent not synced; other files dropped; a folder inside, or a folder that is no checkpoint,
replaced; leftovers not removed, or those of other targets removed. Manifest: checksums, sizes or its own
checksum not compared. Tensors: the router bias converted while saving or loading; names or shapes not
compared; params not compared with the config; all leaves on the host at once. Config: the marker left in it;
the version not compared.
"""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import numpy as np
import pytest

from dsv3.checkpoint import folder, leaves, load, safetensors_io, save, shards
from dsv3.config import Config
from dsv3.model import init, param_specs
from dsv3.spec import is_spec
from dsv3.tree import paths, tree_map

CFG = Config(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=10,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)


def bits(tree) -> dict:
    """{path: (type, shape, bytes)} of a tree: equal exactly when the trees are equal bit for bit."""
    return {path: (leaves.dtype_of(x), tuple(x.shape), leaves.host(x).tobytes()) for path, x in paths(tree)}


def files(path: Path) -> dict:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.fixture(scope="module")
def params():
    return init(CFG, seed=1)


# ---- round trips ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", ["5GB", 5000])
def test_params_come_back_bit_for_bit(tmp_path, dtype, size):
    params = init(CFG, seed=1, dtype=dtype)
    assert save(tmp_path / "a", params, cfg=CFG, max_shard_size=size) == tmp_path / "a"
    loaded, cfg = load(tmp_path / "a")
    assert cfg == CFG and list(bits(loaded)) == list(bits(params)) and bits(loaded) == bits(params)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    shown = [n for n in names if n.startswith("model-")]
    assert names == sorted(["config.json", "manifest.json", "model.safetensors.index.json", *shown])
    assert shown == [f"model-{i:05d}-of-{len(shown):05d}.safetensors" for i in range(1, len(shown) + 1)]
    assert (len(shown) == 1) == (size == "5GB")
    assert os.listdir(tmp_path) == ["a"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["torch_dtype"] == dtype and config["dsv3"] == {"format": "params", "version": 1}
    assert "dsv3" not in cfg.to_hf()


def test_conversion_while_saving_and_while_loading(tmp_path, params):
    save(tmp_path / "a", params, cfg=CFG, dtype="bfloat16")
    narrow = init(CFG, seed=1, dtype="bfloat16")
    assert bits(load(tmp_path / "a")[0]) == bits(narrow)
    save(tmp_path / "b", params, cfg=CFG)
    assert bits(load(tmp_path / "b", dtype="bfloat16")[0]) == bits(narrow)
    wide, _ = load(tmp_path / "a", dtype="float32")
    for path, leaf in paths(wide):
        assert leaves.dtype_of(leaf) == "F32"
        np.testing.assert_array_equal(
            leaf.asnumpy(),
            leaves.convert(
                leaves.host(dict(paths(narrow))[path]),
                leaves.dtype_of(dict(paths(narrow))[path]),
                "F32",
                path,
            ),
        )
    for call in (
        lambda: save(tmp_path / "c", params, cfg=CFG, dtype="int8"),
        lambda: load(tmp_path / "a", dtype="f32"),
    ):
        with pytest.raises(ValueError, match="expected one of float32, bfloat16, float16"):
            call()
    assert not (tmp_path / "c").exists()


def test_the_released_keys_of_a_config_survive(tmp_path, params):
    cfg = Config.from_hf(CFG.to_hf() | {"some_future_key": [1, {"a": None}], "torch_dtype": "float32"})
    save(tmp_path / "a", params, cfg=cfg)
    assert load(tmp_path / "a")[1].to_hf() == cfg.to_hf()


def test_one_leaf_is_on_the_host_at_a_time(tmp_path, monkeypatch):
    params = init(CFG, seed=1, dtype="bfloat16")
    events, host, write = [], leaves.host, safetensors_io.write
    monkeypatch.setattr(leaves, "host", lambda leaf: events.append("host") or host(leaf))
    monkeypatch.setattr(safetensors_io, "write", lambda *args: events.append("write") or write(*args))
    save(tmp_path / "a", params, cfg=CFG, max_shard_size=5000)
    assert events == ["host", "write"] * len(list(paths(params)))


# ---- what does not fit ---------------------------------------------------------------------------------
def test_params_that_do_not_fit_the_config_are_refused(tmp_path, params):
    for wrong, words in (
        ({k: v for k, v in params.items() if k != "head"}, r"missing 1 \(head\)"),
        (params | {"extra": params["norm"]}, r"unexpected 1 \(extra\)"),
        (params | {"norm": params["embed"]}, r"norm has shape \(50, 24\); the config asks for \(24,\)"),
        (params | {"norm": np.ones(24)}, "norm is F64; expected F32 or BF16 or F16"),
        (
            tree_map(lambda x: leaves.tensor(leaves.host(x).astype(np.float16), "F16"), params),
            "router.bias is F16; expected F32",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            save(tmp_path / "a", wrong, cfg=CFG)
    assert os.listdir(tmp_path) == []


def rewritten(path: Path, change) -> None:
    """Change the tensors of a checkpoint and bring its manifest up to date, as a foreign program might."""
    opened = shards.open_shards(path)
    tensors = change({n: (opened.slot(n).dtype, opened.read(n).copy()) for n in opened.home})
    for p in path.glob("model*"):
        p.unlink()
    slots = [safetensors_io.Slot(n, dtype, array.shape) for n, (dtype, array) in tensors.items()]
    shards.write_shards(
        path, "model", slots, ((n, array) for n, (_, array) in tensors.items()), "5GB", {}, always_index=True
    )
    (path / "manifest.json").unlink()
    folder.write_manifest(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda t: {n: v for n, v in t.items() if n != "layers.1.router.bias"},
            r"missing 1 \(layers.1.router.bias\)",
        ),
        (lambda t: t | {"layers.2.norm": t["norm"]}, r"unexpected 1 \(layers.2.norm\)"),
        (
            lambda t: t | {"norm": ("F32", np.ones(23, np.float32))},
            r"'norm' has shape \[23\]; the config asks for \[24\]",
        ),
        (
            lambda t: t | {"layers.1.router.bias": ("BF16", np.zeros(4, np.uint16))},
            "'layers.1.router.bias' is BF16; expected F32",
        ),
        (lambda t: t | {"norm": ("I32", np.ones(24, np.int32))}, "'norm': is stored as I32"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(tmp_path, params, change, words):
    save(tmp_path / "a", params, cfg=CFG)
    rewritten(tmp_path / "a", change)
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "a")


def test_every_truncation_flip_and_absence_is_refused_by_name(tmp_path, params):
    save(tmp_path / "a", params, cfg=CFG, max_shard_size=20000)
    good, refused = files(tmp_path / "a"), 0
    rng = np.random.default_rng(0)
    for name, data in good.items():
        flips = {0, len(data) // 2, len(data) - 1, *rng.integers(0, len(data), 5).tolist()}
        damaged = [data[:n] for n in (0, 7, len(data) // 2, len(data) - 1)] + [data + b"\0", b"foreign", None]
        damaged += [data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i + 1 :] for i in flips]
        for bad in damaged:
            (tmp_path / "a" / name).unlink() if bad is None else (tmp_path / "a" / name).write_bytes(bad)
            with pytest.raises((ValueError, FileNotFoundError)) as error:
                load(tmp_path / "a")
            assert name in str(error.value) and "\n" not in str(error.value), (name, bad, error.value)
            refused += 1
        (tmp_path / "a" / name).write_bytes(data)
    assert bits(load(tmp_path / "a")[0]) == bits(params)
    assert refused > 13 * len(good) and len(good) > 5


def test_sizes_are_compared_even_without_checksums(tmp_path, params):
    save(tmp_path / "a", params, cfg=CFG)
    shard = tmp_path / "a" / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="expected CRC-32 [0-9a-f]{8}, found [0-9a-f]{8}"):
        load(tmp_path / "a")
    load(tmp_path / "a", verify=False)
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"expected {len(data)} bytes, found {len(data) - 1}"):
        load(tmp_path / "a", verify=False)


def test_folders_that_are_not_ours_are_refused(tmp_path, params):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "absent")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CFG.to_hf()))
    with pytest.raises(ValueError, match="read a Hugging Face checkpoint with from_hf"):
        load(tmp_path / "hf")
    save(tmp_path / "a", params, cfg=CFG)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(
        json.dumps(config | {"dsv3": {"format": "params", "version": 2}})
    )
    with pytest.raises(ValueError, match="version 2; expected 'params' version 1"):
        load(tmp_path / "a")


# ---- all or nothing ------------------------------------------------------------------------------------
@pytest.mark.parametrize("swaps", [True, False])
def test_an_older_checkpoint_is_replaced_and_other_files_stay(tmp_path, params, monkeypatch, swaps):
    if not swaps:  # a system that cannot swap two names
        monkeypatch.setattr(folder, "_exchange", lambda a, b: False)
    save(tmp_path / "a", params, cfg=CFG, max_shard_size=5000)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    newer = init(CFG, seed=2)
    seen, rename, exchange = [], os.rename, folder._exchange

    def whole():
        seen.append(
            [p for p in tmp_path.iterdir() if p.name in ("a", ".old-a") and (p / "manifest.json").exists()]
        )

    monkeypatch.setattr(os, "rename", lambda *x: (whole(), rename(*x), whole())[1])
    monkeypatch.setattr(folder, "_exchange", lambda *x: (whole(), exchange(*x), whole())[1])
    save(tmp_path / "a", newer, cfg=CFG)
    assert len(seen) >= 2 and all(seen)  # at every step some whole one is there
    if swaps:
        assert all(tmp_path / "a" in there for there in seen)  # and it has its name
    assert bits(load(tmp_path / "a")[0]) == bits(newer)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "manifest.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert os.listdir(tmp_path) == ["a"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, params, monkeypatch):
    save(tmp_path / "a", params, cfg=CFG)
    os.rename(tmp_path / "a", tmp_path / ".old-a")
    (tmp_path / ".tmp-a-0123abcd").mkdir()
    (tmp_path / ".tmp-a-b-0123abcd").mkdir()  # of another target
    with pytest.raises(FileNotFoundError, match="left the previous one whole in .*old-a"):
        load(tmp_path / "a")
    assert bits(load(tmp_path / ".old-a")[0]) == bits(params)
    save(tmp_path / "a", params, cfg=CFG)
    assert sorted(os.listdir(tmp_path)) == [".tmp-a-b-0123abcd", "a"]
    assert bits(load(tmp_path / "a")[0]) == bits(params)


def test_a_failed_rename_puts_the_older_one_back(tmp_path, params, monkeypatch):
    save(tmp_path / "a", params, cfg=CFG)
    rename = os.rename

    def fails(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(folder, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path / "a", init(CFG, seed=2), cfg=CFG)
    assert os.listdir(tmp_path) == ["a"] and bits(load(tmp_path / "a")[0]) == bits(params)


def test_what_is_not_a_checkpoint_is_not_replaced(tmp_path, params):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    (tmp_path / "deep").mkdir()
    save(tmp_path / "deep", params, cfg=CFG)  # an empty folder may be filled
    (tmp_path / "deep" / "inner").mkdir()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    for name, words in (
        ("notes", "no manifest.json"),
        ("file", "is a file"),
        ("deep", "holds the folder 'inner'"),
    ):
        with pytest.raises(ValueError, match=words):
            save(tmp_path / name, params, cfg=CFG)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_what_was_there(tmp_path, params, monkeypatch):
    save(tmp_path / "a", params, cfg=CFG)
    before = files(tmp_path / "a")
    total = sum(len(data) for data in before.values())
    real = safetensors_io.write_bytes
    for limit in (0, 1, 500, total // 2, total - 1500, total - 1):
        left = [limit]

        def write_bytes(file, data):
            n = len(data)
            real(file, data[: left[0]])
            left[0] -= n
            if left[0] < 0:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(safetensors_io, "write_bytes", write_bytes)
        monkeypatch.setattr(folder, "write_bytes", write_bytes)
        for name in ("a", "b"):
            left[0] = limit
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path / name, init(CFG, seed=1), cfg=CFG)
        assert os.listdir(tmp_path) == ["a"] and files(tmp_path / "a") == before, limit
    left[0] = 10 * total
    save(tmp_path / "b", params, cfg=CFG)
    assert bits(load(tmp_path / "b")[0]) == bits(params)


def test_everything_is_synced_before_it_takes_its_name(tmp_path, params, monkeypatch):
    synced, names, fsync, rename = [], [], os.fsync, os.rename

    def note(fd):
        fsync(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(
        os,
        "rename",
        lambda a, b: (
            names.extend([str(a), *map(str, Path(a).iterdir())]),
            names.append(len(synced)),
            rename(a, b),
        ),
    )
    save(tmp_path / "a", params, cfg=CFG, max_shard_size=20000)
    before = names.pop()
    assert len(names) > 5 and set(names) <= set(synced[:before])
    assert synced[-1] == str(tmp_path)
    assert before == len(synced) - 1


def test_a_link_to_a_checkpoint_is_followed(tmp_path, params):
    save(tmp_path / "real", params, cfg=CFG)
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", init(CFG, seed=2), cfg=CFG)
    assert (tmp_path / "link").is_symlink() and bits(load(tmp_path / "real")[0]) == bits(init(CFG, seed=2))


def test_names_are_our_paths(tmp_path, params):
    save(tmp_path / "a", params, cfg=CFG)
    opened = shards.open_shards(tmp_path / "a")
    for path, spec in paths(param_specs(CFG), is_spec):
        assert opened.slot(path).shape == spec.shape
    assert "layers.0.attn.wq_a" in opened.home
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert bits(load(tmp_path / "moved")[0]) == bits(params)
