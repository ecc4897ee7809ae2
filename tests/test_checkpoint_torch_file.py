"""torch's files: read as torch wrote them, written as torch reads them, refused when damaged or armed.

The goldens were written by torch 2.13 (goldens/make_mcore.py). Planted faults this file was seen to catch, one at a time:
strides ignored; the storage's offset not multiplied by the element size; big-endian bytes not swapped; a pickle's CRC not
compared; a storage longer or shorter than declared accepted; a tensor one element beyond its storage accepted; containers
within themselves followed; deflated records read as plain; ``posix.system`` understood; inert packages matched by prefix;
records not aligned; a CRC of 0 in the headers or in the directory; no zip64 field or no zip64 end for huge files; a chunk
too many accepted; wrong strides written; no sync.
"""

import argparse
import importlib.util
import io
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from conftest import GOLDENS

from dsv3.checkpoint import torch_file, torch_pickle
from dsv3.checkpoint.safetensors_io import DTYPES
from dsv3.checkpoint.torch_file import TorchTensor

FOLDER = GOLDENS / "mcore"
READABLE = ("types", "views", "converted", "trained", "big")
VALUES = np.load(FOLDER / "values.npz")


def expected(name):
    """{tensor: (file type, values)} of a golden."""
    keys = [k.split("|") for k in VALUES.files if k.startswith(f"{name}.pt|")]
    return {k[1]: (k[2], VALUES["|".join(k)]) for k in keys}


def records(source):
    """{name: bytes} of an archive, by the standard library."""
    with zipfile.ZipFile(source) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path, contents, compression=zipfile.ZIP_STORED):
    """An archive by the standard library."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def repack(path, name, **changes):
    """A golden with some records changed, added, or dropped (None); their CRCs right."""
    contents = records(FOLDER / f"{name}.pt")
    prefix = next(iter(contents)).split("/")[0]
    for key, content in changes.items():
        contents[f"{prefix}/{key.replace('__', '/').replace('_pkl', '.pkl')}"] = content
    return pack(path, {k: v for k, v in contents.items() if v is not None})


def pkl(name):
    """The pickle of a golden."""
    return next(v for k, v in records(FOLDER / f"{name}.pt").items() if k.endswith("data.pkl"))


# -- reading ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", READABLE)
def test_reads_what_torch_wrote(name):
    file = torch_file.open_file(FOLDER / f"{name}.pt")
    torch_file.verify(file)
    found, want = torch_file.tensors(file.structure), expected(name)
    assert list(found) == list(want) and len(want) >= 2
    for key, (dtype, values) in want.items():
        array = torch_file.read(file, found[key])
        assert (found[key].dtype, array.dtype, array.shape) == (dtype, DTYPES[dtype], values.shape), key
        assert array.tobytes() == values.tobytes(), key
        if array.size and not file.big_endian:
            assert not array.flags.writeable and not array.flags.owndata, f"{key} is not a view of the file"


def test_contiguous_tensors_lie_where_the_file_says():
    raw = (FOLDER / "types.pt").read_bytes()
    file = torch_file.open_file(FOLDER / "types.pt")
    for key, tensor in torch_file.tensors(file.structure).items():
        assert raw[tensor.offset : tensor.offset + tensor.nbytes] == expected("types")[key][1].tobytes(), key


def test_plain_data_and_placeholders():
    types = torch_file.open_file(FOLDER / "types.pt").structure
    assert types["size"] == (2, 3) and types["text"] == "naïve"
    assert types["numbers"] == [1, -1, 300, 70000, 1 << 40, -(1 << 70), 0.5, True, False, None, ()]
    converted = torch_file.open_file(FOLDER / "converted.pt").structure
    assert (converted["checkpoint_version"], converted["iteration"]) == (3.0, 1)
    trained = torch_file.open_file(FOLDER / "trained.pt").structure
    args = trained["args"]
    assert isinstance(args, argparse.Namespace) and args.moe_tp_extend_ep is True and args.data_path == ["a", "b"]
    assert args.params_dtype.name == "torch.bfloat16" and args.attention_backend.name.startswith("megatron.core.")
    assert trained["iteration"] == 7 and trained["rng_state"][0]["random_rng_state"] == (3, (1, 2, 3), None)


# -- refusing --------------------------------------------------------------------------------------------
def refuse(path, pattern):
    with pytest.raises(ValueError, match=pattern) as error:
        torch_file.open_file(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_refuses_other_formats(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        torch_file.open_file(tmp_path / "none.pt")
    refuse(FOLDER / "legacy.pt", "before 1.6.*load it with torch and save it again")
    (tmp_path / "empty").write_bytes(b"")
    refuse(tmp_path / "empty", "expected a zip archive by torch.save")
    refuse(pack(tmp_path / "other.zip", {"a/b": b"c"}), r"one record named \*/data.pkl, found 0")
    refuse(pack(tmp_path / "two.zip", {"a/data.pkl": b"c", "b/data.pkl": b"c"}), "found 2")
    packed = pack(tmp_path / "packed.pt", records(FOLDER / "converted.pt"), zipfile.ZIP_DEFLATED)
    refuse(packed, "compressed or encrypted; torch.save stores plain bytes")


@pytest.mark.parametrize(
    "name",
    ["posix system", "nt system", "os system", "builtins eval", "__builtin__ exec", "subprocess Popen", "runpy run_module",
     "torch load", "torch.hub load", "numpy.testing runstring", "megatronx f"],
)  # fmt: skip
def test_refuses_code(tmp_path, name, monkeypatch):
    import os

    monkeypatch.setattr(os, "system", lambda *a: pytest.fail("it ran"))
    module, _, function = name.partition(" ")
    old = b"\x80\x02c%s\n%s\n(X\x01\x00\x00\x00xtR." % (module.encode(), function.encode())
    new = b"\x80\x04\x8c%c%s\x8c%c%s\x93." % (len(module), module.encode(), len(function), function.encode())
    for text in (old, new):
        refuse(pack(tmp_path / "x.pt", {"x/data.pkl": text}), f"pickle with code in it: it asks for '{module}.{function}'")
    refuse(FOLDER / "script.pt", "'posix.system'")


def tensor_pickle(numel=6, start=0, shape=(2, 3), stride=(3, 1), kind=b"Float", key="0"):
    """A pickle of {"a": {"w": tensor}} with any claim."""
    out = bytearray(b"\x80\x02}X\x01\x00\x00\x00a}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((")
    for piece in ("storage", b"ctorch\n%sStorage\n" % kind, key, "cpu", numel, b"tQ", start, shape, stride, False, b"NtRss."):
        out += piece if isinstance(piece, bytes) else torch_pickle.dump(piece)[2:-1]
    return bytes(out)


def test_tensor_pickle_is_right(tmp_path):
    path = pack(tmp_path / "x.pt", {"x/data.pkl": tensor_pickle(), "x/data/0": bytes(range(24))})
    file = torch_file.open_file(path)
    assert torch_file.read(file, file.structure["a"]["w"]).tobytes() == bytes(range(24))


@pytest.mark.parametrize(
    "claims, pattern",
    [
        (dict(numel=7), "takes 28 bytes but the record 'x/data/0' has 24"),
        (dict(numel=5), "takes 20 bytes but the record"),
        (dict(kind=b"Double"), "takes 48 bytes but the record"),
        (dict(key="1"), "the record 'x/data/1', is missing"),
        (dict(key="../y"), "is missing"),
        (dict(start=1), r"F32 \[2, 3\] with strides \[3, 1\] from element 1 does not fit its storage of 6 elements"),
        (dict(shape=(3, 3)), "does not fit"),
        (dict(shape=(1 << 62, 3), stride=(0, 0)), "does not fit"),
        (dict(stride=(4, 1)), "does not fit"),
        (dict(stride=(3,)), "expected a shape and strides"),
        (dict(shape=(2, -3)), "expected a shape and strides"),
        (dict(stride=(3, -1)), "expected a shape and strides"),
        (dict(shape=(1,) * 33, stride=(1,) * 33), "expected a shape and strides"),
        (dict(shape="23"), "expected a shape and strides"),
        (dict(start=-1), "has no storage, or starts before it"),
        (dict(kind=b"Untyped", numel=24), "a type that cannot be read"),
    ],
)
def test_refuses_tensors_that_lie(tmp_path, claims, pattern):
    path = pack(tmp_path / "x.pt", {"x/data.pkl": tensor_pickle(**claims), "x/data/0": bytes(24)})
    refuse(path, rf"tensor 'a\.w'.*{pattern}")


def test_refuses_damaged_pickles(tmp_path):
    loop = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."  # a dict that holds itself
    bomb = b"\x80\x02]q\x00" + b"".join(b"(" + b"h%c" % i * 9 + b"tq%c" % (i + 1) for i in range(40)) + b"."
    for text, pattern in [
        (loop, "containers within themselves"),
        (bomb, "containers within themselves"),
        (b"", "does not end"),
        (b"\x80\x02}", "does not end"),
        (b"\x80\x02\xff.", "no opcode 0xff at byte 2"),
        (b"\x80\x02r\xff\xff\xff\xff.", "IndexError"),
        (b"\x80\x02X\xff\xff\xff\xffab.", "ends within a text of 4294967295 bytes"),
        (b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x7fab.", "ends within a text"),
        (b"\x80\x02(]X\x01\x00\x00\x00au.", "damaged"),
        (b"\x80\x02K\x01K\x02R.", "a call of something that is not a global"),
        (b"\x80\x02ctorch\nFloatStorage", "damaged"),
    ]:
        refuse(pack(tmp_path / "x.pt", {"x/data.pkl": text}), pattern)


def test_refuses_damaged_archives(tmp_path):
    path, raw = tmp_path / "x.pt", (FOLDER / "converted.pt").read_bytes()
    at = raw.index(b"expert_bias")
    path.write_bytes(raw[:at] + b"E" + raw[at + 1 :])
    refuse(path, "data.pkl: expected CRC-32 .*, found .*: the file is damaged")
    refuse(repack(path, "converted", byteorder=b"middle"), "byteorder: expected little or big")
    refuse(repack(path, "converted", data__0=None), "tensor 'model.decoder.*missing")
    refuse(repack(path, "converted", data__1=b"12"), "tensor 'model.decoder.*but the record 'converted/data/1' has 2")
    path.write_bytes(raw[: len(raw) // 2])
    refuse(path, "truncated or damaged: the zip archive's directory")
    header = raw.rindex(b"PK\x03\x04")
    path.write_bytes(raw[:header] + b"XX" + raw[header + 2 :])
    refuse(path, "no header at byte")
    repack(path, "converted", data__1=bytes(16))
    file = torch_file.open_file(path)
    torch_file.verify(file)
    changed = bytearray(path.read_bytes())
    changed[torch_file.tensors(file.structure)["model.decoder.layers.0.mlp.router.expert_bias"].offset] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="data/1: expected CRC-32"):
        torch_file.verify(torch_file.open_file(path))


def test_no_damage_gets_through(tmp_path):
    """Every truncation, every bit of the directory, and bits of the pickle under a right CRC: ValueError or a readable file."""
    rng, path, counts = random.Random(0), tmp_path / "x.pt", [0, 0]

    def attempt(content):
        path.write_bytes(content)
        try:
            file = torch_file.open_file(path)
            for tensor in torch_file.tensors(file.structure).values():
                torch_file.read(file, tensor).sum()
            torch_file.verify(file)
        except ValueError as error:
            assert str(error).startswith((str(path), "two tensors are called")), error
            counts[0] += 1
        else:
            counts[1] += 1

    raw = (FOLDER / "converted.pt").read_bytes()
    for n in range(len(raw)):
        attempt(raw[:n])
    assert counts == [len(raw), 0], "a truncated file was read"
    for at in range(raw.index(b"PK\x01\x02"), len(raw)):
        for bit in range(8):
            attempt(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
    for at in range(0, raw.index(b"PK\x01\x02")):
        attempt(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
    for name in ("converted", "trained", "views"):
        contents, text = records(FOLDER / f"{name}.pt"), pkl(name)
        key = next(k for k in contents if k.endswith("data.pkl"))
        for at in range(len(text)):
            buffer = io.BytesIO()
            pack(buffer, contents | {key: text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :]})
            attempt(buffer.getvalue())
    print(f"{sum(counts)} damaged files, {counts[0]} refused")
    assert sum(counts) > 9000 and counts[0] > 5000


# -- writing ---------------------------------------------------------------------------------------------
def example():
    """(structure, {name: values}) with every type, a 0-dim and an empty tensor, and plain data."""
    source = expected("types")
    model = OrderedDict((key, TorchTensor(dtype, values.shape)) for key, (dtype, values) in source.items())
    plain = {"checkpoint_version": 3.0, "iteration": 1, "more": [1, -(1 << 70), 1 << 31, None, True, (), (False,), {}, [], "ü"]}
    return {"model": model, **plain}, {f"model.{key}": values for key, (_, values) in source.items()}


def save(path, structure, values, order=list):
    writer = torch_file.create(path, structure)
    for name in order(values):
        flat = values[name].reshape(-1)
        torch_file.write(writer, name, values[name] if flat.size < 3 else iter([flat[:2], flat[2:].tobytes()]))
    torch_file.finish(writer)
    return path


@pytest.fixture(params=[0xFFFFFFFF, 64], ids=["zip", "zip64"])
def wide(request, monkeypatch):
    """Also with sizes and places as of a huge file. Returns whether."""
    monkeypatch.setattr(torch_file, "_WIDE", request.param)
    return request.param == 64


def test_round_trip(tmp_path, wide):
    structure, values = example()
    path = save(tmp_path / "a.pt", structure, values)
    file = torch_file.open_file(path)
    torch_file.verify(file)
    found = torch_file.tensors(file.structure)
    assert list(found) == list(values)
    for name, tensor in found.items():
        assert torch_file.read(file, tensor).tobytes() == values[name].tobytes() and tensor.shape == values[name].shape, name
        assert tensor.offset % 64 == 0
    assert {k: v for k, v in file.structure.items() if k != "model"} == {k: v for k, v in structure.items() if k != "model"}
    other = save(tmp_path / "b.pt", structure, values, order=lambda names: list(names)[::-1])
    assert path.read_bytes() == other.read_bytes(), "the order of writing shows"
    assert (b"PK\6\6" in path.read_bytes()[-200:]) == wide, "the zip64 end of the directory"
    with zipfile.ZipFile(path) as archive:  # checks every CRC
        assert archive.testzip() is None and archive.namelist()[0] == "archive/data.pkl"
        assert not any(info.flag_bits or info.compress_type for info in archive.infolist())


def test_the_pickle_is_torchs_call():
    """Seen by the standard library's unpickler, which resolves globals to their names."""

    class Names(pickle.Unpickler):
        def find_class(self, module, name):
            if name == "OrderedDict":
                return OrderedDict
            return (lambda *a: (f"{module}.{name}", *a)) if name.startswith("_") else f"{module}.{name}"

        def persistent_load(self, pid):
            return pid

    text = torch_pickle.dump({"a": TorchTensor("BF16", (2, 3, 4)), "b": TorchTensor("U16", (5,)), "c": TorchTensor("F32", ())})
    found = Names(io.BytesIO(text)).load()
    rebuild, storage = "torch._utils._rebuild_tensor_v", "storage"
    assert found["a"] == (f"{rebuild}2", (storage, "torch.BFloat16Storage", "0", "cpu", 24), 0, (2, 3, 4), (12, 4, 1), False, {})
    untyped = (storage, "torch.storage.UntypedStorage", "1", "cpu", 10)
    assert found["b"] == (f"{rebuild}3", untyped, 0, (5,), (1,), False, {}, "torch.uint16")
    assert found["c"] == (f"{rebuild}2", (storage, "torch.FloatStorage", "2", "cpu", 1), 0, (), (), False, {})


def test_writer_refuses(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    for structure, pattern in [
        ({"a": {1, 2}}, "cannot write a set"),
        ({"a": np.zeros(2)}, "cannot write a ndarray"),
        ({"a": TorchTensor("F4", (2,))}, "tensor 'a': cannot write 'F4'"),
        ({"a": TorchTensor("F32", (2, -1))}, r"tensor 'a': cannot write 'F32' \(2, -1\)"),
        ({"a": {"b": TorchTensor("F32", ())}, "a.b": TorchTensor("F32", ())}, "two tensors are called 'a.b'"),
    ]:
        with pytest.raises(ValueError, match=pattern):
            torch_file.create(path, structure)
    writer = torch_file.create(path, {"w": TorchTensor("F32", (2, 3)), "v": TorchTensor("F32", (1,))})
    for chunks, pattern in [
        ([np.zeros(5, "f4")], "takes 24 bytes but is given 20"),
        ([np.zeros(6, "f4"), np.zeros(1, "f4")], "takes 24 bytes but is given 28 or more"),
        ([np.zeros(3, "f8")], "'w' was declared F32 but is given float64"),
    ]:
        with pytest.raises(ValueError, match=pattern):
            torch_file.write(writer, "w", chunks)
    with pytest.raises(ValueError, match="'u' is not declared"):
        torch_file.write(writer, "u", [])
    torch_file.write(writer, "w", np.arange(6, dtype="f4").reshape(2, 3).T.copy().T)  # any memory layout
    with pytest.raises(ValueError, match="'w' is not declared, or was written before"):
        torch_file.write(writer, "w", np.zeros((2, 3), "f4"))
    with pytest.raises(ValueError, match="1 declared tensors were not written, the first is 'v'"):
        torch_file.finish(writer)
    assert writer.file.closed

    synced = []
    monkeypatch.setattr(torch_file.os, "fsync", lambda fd: synced.append(path.stat().st_size))
    save(path, {"w": TorchTensor("F32", (2, 3))}, {"w": np.arange(6, dtype="f4").reshape(2, 3)})
    assert synced == [path.stat().st_size], "synced once, when everything was there"
    file = torch_file.open_file(path)
    assert torch_file.read(file, file.structure["w"]).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_memory_is_a_chunk(tmp_path):
    part = np.ones(1 << 14, "u2")
    tracemalloc.start()
    writer = torch_file.create(tmp_path / "a.pt", {"w": TorchTensor("BF16", (256, 1 << 14))})
    torch_file.write(writer, "w", (part for _ in range(256)))
    torch_file.finish(writer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 18, f"{peak} bytes for chunks of {part.nbytes}"
    assert (tmp_path / "a.pt").stat().st_size > 256 << 15


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="optional peer: torch")
def test_torch_reads_it(tmp_path, wide):
    import torch

    structure, values = example()
    path = save(tmp_path / "a.pt", structure, values)
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert loaded["more"] == structure["more"] and list(loaded["model"]) == list(structure["model"])
        for name, tensor in loaded["model"].items():
            assert tuple(tensor.shape) == values[f"model.{name}"].shape
            same = bytes(tensor.contiguous().untyped_storage()) if tensor.numel() else b""
            assert same == values[f"model.{name}"].tobytes(), name


def test_headers_hold_the_checksums(tmp_path):
    """Every local header repeats what the directory says: readers that stream trust it."""
    structure, values = example()
    raw = save(tmp_path / "a.pt", structure, values).read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        for info in archive.infolist():
            fields = struct.unpack_from("<4s5H3I2H", raw, info.header_offset)
            assert fields[6:9] == (info.CRC, info.file_size, info.file_size), info.filename
