"""The safetensors reader and writer against the safetensors package; bits of bfloat16 and FP8 against plain
arithmetic.

Planted faults this file was seen to catch. Files: memory order kept instead of C order; the header not
padded; gaps, overlaps or bytes after the last tensor accepted; a name twice in the header; the span not
compared with the shape; a tensor written twice; tensors ordered by name alone; a copy instead of a view.
bfloat16: truncated; ties away from zero; NaN rounded like a number; written or read through float32; a Tensor
sharing the array's memory. Conversions: float16 overflow accepted; a chunk one short. FP8: ties up;
subnormals flushed; the sign lost; 0x7f decoded as 480; scale amax/240; a partial block dropped; scale 0 for a
block of zeros. Shards: files outside the folder or tensors outside the index accepted; a shard one tensor too
large.
"""

import json
import os

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import mindspore as ms
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from mindspore import Tensor

from dsv3.checkpoint import fp8, leaves, safetensors_io, shards
from dsv3.checkpoint.safetensors_io import DTYPES, Slot, open_file, read, write_file

SIZES = {
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


def some_tensors(seed: int = 0) -> dict[str, tuple[str, np.ndarray]]:
    """Tensors of every type, in a random order, some empty, some without dims, some with odd numbers of
    bytes.
    """
    rng = np.random.default_rng(seed)
    out = {}
    for i in rng.permutation(60):
        dtype = list(DTYPES)[i % len(DTYPES)]
        shape = [(), (3,), (5, 7), (0, 4), (2, 3, 5)][rng.integers(5)]
        raw = rng.integers(
            0, 2 if dtype == "BOOL" else 256, int(np.prod(shape)) * DTYPES[dtype].itemsize, np.uint8
        )
        out[f'tensor.{i}.ä"\\'] = dtype, raw.view(DTYPES[dtype]).reshape(shape)
    return out


def describe(dtype: str, shape: tuple, data: np.ndarray):
    """One tensor for ``safetensors.serialize``, which took dicts before 0.8 and takes addresses since."""
    if hasattr(safetensors, "TensorSpec"):
        return safetensors.TensorSpec(
            dtype=dtype, shape=list(shape), data_ptr=data.ctypes.data, data_len=data.nbytes
        )
    return {"dtype": dtype, "shape": list(shape), "data": data.tobytes()}


# ---- both ways against the package ---------------------------------------------------------------------
def test_the_package_reads_what_we_write_and_writes_the_same_bytes(tmp_path):
    tensors = some_tensors()
    write_file(tmp_path / "ours", tensors, {"format": "pt"})
    theirs = dict(safetensors.deserialize((tmp_path / "ours").read_bytes()))
    assert set(theirs) == set(tensors)
    for name, (dtype, array) in tensors.items():
        assert theirs[name]["dtype"] == dtype and tuple(theirs[name]["shape"]) == array.shape
        assert bytes(theirs[name]["data"]) == array.tobytes()
    flat = {
        name: np.frombuffer(array.tobytes(), np.uint8) for name, (_, array) in tensors.items()
    }  # kept alive
    described = {
        name: describe(SIZES[dtype], array.shape, flat[name]) for name, (dtype, array) in tensors.items()
    }
    (tmp_path / "theirs").write_bytes(safetensors.serialize(described, {"format": "pt"}))
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "ours").read_bytes()


def test_we_read_what_the_package_writes(tmp_path):
    arrays = {
        name: array
        for name, (dtype, array) in some_tensors(1).items()
        if dtype not in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")
    }
    safetensors.numpy.save_file(arrays, tmp_path / "file", {"a": "b"})
    file = open_file(tmp_path / "file")
    assert file.metadata == {"a": "b"} and set(file.slots) == set(arrays)
    for name, array in arrays.items():
        found = read(file, name)
        assert (
            found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()
        )
        assert not found.flags.writeable and not found.flags.owndata  # a view of the mapped file


def test_any_memory_layout_is_written_right(tmp_path):
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for array in (
        x.T,
        x[:, ::2],
        x[::-1],
        np.asfortranarray(x),
        x[1, 2, 3:4].reshape(()),
        np.broadcast_to(x[0], (2, 4, 5)),
    ):
        write_file(tmp_path / "file", {"x": ("F32", array)})
        np.testing.assert_array_equal(read(open_file(tmp_path / "file"), "x"), array)


def test_the_writer_refuses_what_was_not_declared(tmp_path):
    writer = safetensors_io.create(tmp_path / "file", [Slot("a", "F32", (2,)), Slot("b", "BF16", (2,))])
    for name, array, words in (
        ("c", np.zeros(2, np.float32), "not declared"),
        ("a", np.zeros(3, np.float32), "declared F32"),
        ("a", np.zeros(2, np.float64), "float64"),
        ("b", np.zeros(2, np.float16), "float16"),
    ):
        with pytest.raises(ValueError, match=words):
            safetensors_io.write(writer, name, array)
    safetensors_io.write(writer, "a", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="written before"):
        safetensors_io.write(writer, "a", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="1 declared tensors were not written, the first is 'b'"):
        safetensors_io.finish(writer)
    with pytest.raises(ValueError, match="two tensors"):
        safetensors_io.create(tmp_path / "file", [Slot("a", "F32", (2,)), Slot("a", "F32", (2,))])


# ---- refusals ------------------------------------------------------------------------------------------
def raw_file(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


GOOD = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}


def changed(name, **entry):
    return GOOD | {name: {**GOOD[name], **entry}}


@pytest.mark.parametrize(
    "header, words",
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (
            b'{"a":%b,"a":%b}' % (2 * (b'{"dtype":"F32","shape":[4],"data_offsets":[0,16]}',)),
            "twice",
        ),
        ({"__metadata__": {"a": 1}, **GOOD}, "__metadata__"),
        (changed("b", dtype="F31"), "'b': dtype 'F31' is unknown"),
        (changed("b", dtype=["F32"]), "unknown"),
        (changed("b", shape=[3]), r"'b': F32 \[3\] takes 12 bytes but data_offsets \[8, 16\] span 8"),
        (changed("b", shape=[-2]), "integers of at least 0"),
        (changed("b", shape=[True, 2]), "integers of at least 0"),
        (changed("b", shape=2), "integers of at least 0"),
        (changed("b", data_offsets=[8]), "two data_offsets"),
        (changed("b", data_offsets=[8, 16.0]), "two data_offsets"),
        (changed("b", data_offsets=[16, 8]), "span -8"),
        (changed("b", data_offsets=[9, 17]), "'b' starts at byte 9 of the data; expected 8"),
        (changed("b", data_offsets=[4, 12]), "'b' starts at byte 4 of the data; expected 8"),
        (
            changed("b", shape=[3], data_offsets=[8, 20]),
            "'b' ends at byte 20 of the data but the file holds 16: truncated",
        ),
        (
            changed("b", shape=[1], data_offsets=[8, 12]),
            "end at byte 12 of the data but the file holds 16: foreign bytes",
        ),
        ({"a": GOOD["a"] | {"extra": 1}, "b": GOOD["b"]}, "expected dtype, shape and data_offsets"),
        ({"a": 3}, "expected dtype, shape and data_offsets"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path, header, words):
    with pytest.raises(ValueError, match=words) as refused:
        open_file(raw_file(tmp_path / "wrong.safetensors", header))
    assert "wrong.safetensors" in str(refused.value) and "\n" not in str(refused.value)


def test_a_right_header_is_accepted_and_every_truncation_refused(tmp_path):
    path = raw_file(tmp_path / "file", GOOD)
    assert set(open_file(path).slots) == {"a", "b"}
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match="file"):
            open_file(path)
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match="foreign bytes"):
        open_file(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        open_file(tmp_path / "absent")


# ---- shards --------------------------------------------------------------------------------------------
def test_shards_are_full_but_not_larger_than_asked(tmp_path):
    arrays = {f"x{i}": np.full(25, i, np.float32) for i in range(10)}  # 100 bytes each
    slots = [Slot(name, "F32", (25,)) for name in arrays]
    shards.write_shards(tmp_path, "model", slots, reversed(arrays.items()), 350, {}, always_index=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 1000
    assert [index["weight_map"][f"x{i}"] for i in range(10)] == [
        f"model-0000{1 + i // 3}-of-00004.safetensors" for i in range(10)
    ]
    opened = shards.open_shards(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(opened.read(name), array)


@pytest.mark.parametrize(
    "size, nbytes", [(7, 7), ("12", 12), ("5GB", 5 * 10**9), ("2 KiB", 2048), ("1.5mb", 1500000)]
)
def test_sizes_are_understood(size, nbytes):
    assert shards.parse_size(size) == nbytes


@pytest.mark.parametrize("size", [0, -1, "", "5 apples", "GB", "0.1"])
def test_sizes_are_refused(size):
    with pytest.raises(ValueError, match="max_shard_size"):
        shards.parse_size(size)


@pytest.mark.parametrize(
    "index, words",
    [
        ({"weight_map": {"a": "../one.safetensors"}}, "plain file name"),
        ({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}, "'c' is missing"),
        ({"weight_map": {"a": "one.safetensors"}}, "'b' is unexpected"),
        ({"weight_map": {"a": 1}}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ([], "weight_map"),
        ("{", "weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path, index, words):
    raw_file(tmp_path / "one.safetensors", GOOD)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        shards.open_shards(tmp_path)


# ---- bits of bfloat16 ----------------------------------------------------------------------------------
def nearest_bf16(x: float) -> int:
    """The bits of the bfloat16 nearest to x, ties to even: the better of the two around it."""
    low = int(np.float32(x).view(np.uint32)) >> 16
    value = [float(np.uint32(bits << 16).view(np.float32)) for bits in (low, low + 1)]
    if np.isinf(value[1]):
        value[1] = np.copysign(2.0**128, x)
    below, above = abs(x - value[0]), abs(value[1] - x)
    return low if below < above or below == above and low % 2 == 0 else low + 1


def test_bf16_rounds_to_nearest_even_as_mindspore_does():
    rng = np.random.default_rng(3)
    u = rng.integers(0, 2**32, 4000, np.uint32)
    u[::4] = (u[::4] & 0xFFFF0000) | 0x8000  # ties
    u[1::8] = (u[1::8] & 0xFFFF0000) | 0x7FFF
    u[:4] = 0x7F7FFFFF, 0xFF7FFFFF, 0x00000001, 0x80008000  # largest, subnormal, a tie at zero
    x = u.view(np.float32)
    x = x[np.isfinite(x)]
    bits = leaves.bf16_bits(x)
    assert bits.tolist() == [nearest_bf16(float(v)) for v in x]
    assert leaves.host(Tensor(x, dtype=ms.bfloat16)).tolist() == bits.tolist()


def test_every_bf16_pattern_passes_through_a_tensor_and_a_file(tmp_path):
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    made = leaves.tensor(bits, "BF16")
    assert isinstance(made, Tensor) and made.dtype == ms.bfloat16 and made.shape == (256, 256)
    np.testing.assert_array_equal(leaves.host(made), bits)
    write_file(tmp_path / "file", {"x": ("BF16", leaves.host(made))})
    np.testing.assert_array_equal(
        leaves.host(leaves.tensor(read(open_file(tmp_path / "file"), "x"), "BF16")), bits
    )
    values = leaves.bf16_values(bits)
    np.testing.assert_array_equal(made.float().asnumpy(), values)  # NaN equals NaN here
    ordinary = ~np.isnan(values)
    np.testing.assert_array_equal(leaves.bf16_bits(values)[ordinary], bits[ordinary])
    nan = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    assert np.isnan(leaves.bf16_values(leaves.bf16_bits(nan))).all()


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64", "I32", "I64", "U8", "BOOL", "BF16"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5)])
def test_tensors_keep_bits_types_and_shapes(dtype, shape):
    raw = np.random.default_rng(4).integers(0, 2, int(np.prod(shape)) * DTYPES[dtype].itemsize, np.uint8)
    array = raw.view(DTYPES[dtype]).reshape(shape)
    made = leaves.tensor(array, dtype)
    assert made.shape == shape and leaves.dtype_of(made) == dtype
    assert leaves.host(made).tobytes() == array.tobytes() and leaves.host(made).shape == shape
    if shape == (3, 5):
        assert leaves.host(leaves.tensor(array.T, dtype)).tobytes() == array.T.tobytes()


def test_a_tensor_has_memory_of_its_own(tmp_path):
    array = np.ones(4, np.float32)
    made = leaves.tensor(array, "F32")
    array[0] = 5
    assert made.asnumpy().tolist() == [1, 1, 1, 1]
    write_file(tmp_path / "file", {"x": ("F32", np.ones(4, np.float32))})
    made = leaves.tensor(read(open_file(tmp_path / "file"), "x"), "F32")
    made[0] = 5.0
    assert made.asnumpy().tolist() == [5, 1, 1, 1]
    assert read(open_file(tmp_path / "file"), "x").tolist() == [1, 1, 1, 1]


def test_conversions(monkeypatch):
    monkeypatch.setattr(leaves, "CHUNK", 7)  # so that several chunks are seen
    x = np.random.default_rng(5).standard_normal((5, 9)).astype(np.float32)
    bits = leaves.bf16_bits(x)
    np.testing.assert_array_equal(leaves.convert(x.T, "F32", "BF16", "x"), bits.T)
    np.testing.assert_array_equal(leaves.convert(bits, "BF16", "F32", "x"), leaves.bf16_values(bits))
    np.testing.assert_array_equal(leaves.convert(x, "F32", "F16", "x"), x.astype(np.float16))
    np.testing.assert_array_equal(
        leaves.convert(x.astype(np.float16), "F16", "F32", "x"), x.astype(np.float16)
    )
    np.testing.assert_array_equal(
        leaves.convert(bits, "BF16", "F16", "x"), leaves.bf16_values(bits).astype(np.float16)
    )
    np.testing.assert_array_equal(
        leaves.convert(x.astype(np.float16), "F16", "BF16", "x"),
        leaves.bf16_bits(x.astype(np.float16).astype(np.float32)),
    )
    assert np.isinf(leaves.convert(np.float32([np.inf]), "F32", "F16", "x")).all()
    with pytest.raises(ValueError, match="w.x: holds 70000, beyond float16's 65504"):
        leaves.convert(np.float32([1, 70000]), "F32", "F16", "w.x")
    with pytest.raises(ValueError, match="w.x: is stored as I32"):
        leaves.convert(np.int32([1]), "I32", "F32", "w.x")


# ---- FP8 -----------------------------------------------------------------------------------------------
def decode(code: int) -> float:
    """E4M3FN by its definition."""
    sign, exponent, mantissa = -1.0 if code > 127 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_fp8_codes():
    values = np.float32([decode(code) for code in range(256)])
    np.testing.assert_array_equal(fp8.DECODED, values)
    assert np.nanmax(fp8.DECODED) == 448
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(fp8.encode(values)[finite], np.arange(256)[finite])
    rng = np.random.default_rng(6)
    positive = [decode(code) for code in range(127)]
    middles = [(a + b) / 2 for a, b in zip(positive, positive[1:])]
    x = np.float32(
        [
            *middles,
            *np.nextafter(np.float32(middles), np.float32(0)),
            *np.nextafter(np.float32(middles), 1e9),
            *np.exp(rng.uniform(-9, 6.2, 500)),
            0,
            449,
            1e9,
            np.inf,
            1e-30,
        ]
    )
    x = np.concatenate([x, -x])
    for value, code in zip(x.tolist(), fp8.encode(x).tolist()):
        distance = [abs(min(abs(value), 1e9) - p) for p in positive]
        best = [c for c in range(127) if distance[c] == min(distance)]
        right = min(best, key=lambda c: c % 2)  # of two equally near, the even one
        assert code == right + 128 * (np.signbit(value)), value
    assert set(fp8.encode(np.float32([np.nan, -np.nan])) & 127) == {127}


def test_fp8_blocks():
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((130, 257)) * np.exp(rng.uniform(-5, 5, (130, 1)))).astype(np.float32)
    x[:128, :128] = 0
    x[128:, 256] = 1e-44  # a block whose scale would underflow
    codes, scales = fp8.quantise(x)
    assert (
        scales.shape == fp8.scale_shape(x.shape) == (2, 3)
        and codes.dtype == np.uint8
        and scales.dtype == np.float32
    )
    assert scales[0, 0] == 1 and scales[1, 2] == 1 and np.isfinite(scales).all()
    values = fp8.dequantise(codes, scales)
    for i, j in np.ndindex(2, 3):
        part = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        amax = np.abs(x[part]).max()
        if amax > 1e-40:
            assert scales[i, j] == np.float32(amax) / np.float32(448)
            assert (codes[part] & 127).max() == 126  # the largest of each block is 448 steps of its scale
            assert np.abs(values[part] - x[part]).max() <= amax * 2**-4
        want = np.float32([[decode(int(c)) for c in row] for row in codes[part]]) * scales[i, j]
        np.testing.assert_array_equal(values[part], want)
    again = fp8.quantise(values)
    np.testing.assert_array_equal(fp8.dequantise(*again), values)
    small = fp8.dequantise(codes[:5, :7], np.float32([[1, 2], [3, 4], [5, 6]]), (2, 4))
    np.testing.assert_array_equal(
        small,
        fp8.DECODED[codes[:5, :7]]
        * np.float32([[1, 1, 1, 1, 2, 2, 2]] * 2 + [[3, 3, 3, 3, 4, 4, 4]] * 2 + [[5, 5, 5, 5, 6, 6, 6]]),
    )
