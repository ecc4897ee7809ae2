"""Conversions from and to the released FP8 form, against its definition in NumPy, which is written out below, and torch's cast.

Planted faults this file was seen to catch, one at a time: the scales of the first block for a piece further down; FP8 that is
there quantised again; power-of-two scales rounded down, or up from one that is a power already; E8M0's bias; codes cut off
instead of rounded.
"""
import json

import numpy as np
import pytest
from conftest import GOLDENS
from test_convert import SMALL, TARGETS, files, run, stored, weights, write_hf

from dsv3.checkpoint import convert, formats, fp8, hf, leaves, safetensors_io
from dsv3.checkpoint.names import SCALE, published

WIDE = SMALL.replace(hidden_size=136, intermediate_size=262, moe_intermediate_size=130, num_hidden_layers=2, q_lora_rank=128)


def fp8_weights(cfg, scale_kind, rng, block=(128, 128)):
    """Like ``weights`` with FP8 where it is released so, no NaN among the codes.

    With F32 scales every block has a largest code, as scales of amax / 448 make them, with others none has.
    """
    out = {}
    quantised = {t.name for t in published(cfg) if t.quantised}
    for name, (kind, array) in weights(cfg, "BF16", rng).items():
        if name not in quantised:
            out[name] = kind, array
            continue
        codes = rng.integers(0, 127 if scale_kind == "F32" else 90, array.shape, np.uint8)
        if scale_kind == "F32":
            codes[:: block[0], :: block[1]] = 0x7E
        codes |= rng.integers(0, 2, array.shape, np.uint8) << 7
        shape = tuple(-(-n // b) for n, b in zip(array.shape, block))
        if scale_kind == "F8_E8M0":
            scales = rng.integers(100, 130, shape, np.uint8)
        else:
            scales = rng.integers(0x3000, 0x4000, shape, np.uint16)  # bfloat16
            scales = scales if scale_kind == "BF16" else (scales.astype(np.uint32) << 16).view(np.float32)
        out[name], out[name + SCALE] = ("F8_E4M3", codes), (scale_kind, scales)
    return out


def e4m3(code):
    """The value of a code by the definition of the format."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(code) if code & 127 != 127 else np.nan for code in range(256)])


def scale_values(kind, scales):
    """Scales of any file type as float64."""
    if kind == "F8_E8M0":
        return 2.0 ** (scales.astype(np.float64) - 127)
    return ((scales.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else scales).astype(np.float64)


def decoded(codes, scales, block=(128, 128)):
    """value(code) * the scale of its block, exactly."""
    rows, cols = (np.arange(n) // b for n, b in zip(codes.shape, block))
    return E4M3[codes] * scales[rows[:, None], cols[None]]


def nearest_bf16(x):
    """Bits of the bfloat16 next to a float32, the even one of two; by trying both neighbours."""
    low = (x.view(np.uint32) >> 16).astype(np.uint16)  # towards zero

    def distance(bits):
        return np.abs((bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64) - x)

    a, b = distance(low), distance(low + np.uint16(1))
    return np.where((b < a) | ((a == b) & (low & 1 == 1)), low + np.uint16(1), low)


def test_codes_and_blocks_are_those_of_torch():
    golden = np.load(GOLDENS / "fp8" / "cast.npz")
    assert np.array_equal(golden["decoded"], E4M3, equal_nan=True)
    assert np.array_equal(fp8.DECODED, golden["decoded"], equal_nan=True)
    assert np.array_equal(fp8.encode(golden["numbers"]), golden["cast"]) and len(golden["numbers"]) > 1000
    values = fp8.dequantise(golden["codes"], golden["scales"])
    assert np.array_equal(leaves.bf16_bits(values), golden["bits"])
    exact = decoded(golden["codes"], golden["scales"].astype(np.float64))
    assert np.array_equal(nearest_bf16(exact.astype(np.float32)), golden["bits"])


@pytest.mark.parametrize("kind, block", [("F32", (128, 128)), ("BF16", (128, 128)), ("F8_E8M0", (128, 128)), ("F32", (96, 64))])
def test_released_fp8(tmp_path, kind, block):
    first = fp8_weights(WIDE, kind, np.random.default_rng(5), block)
    config = hf.config_json(WIDE, hf.FP8_DTYPE)
    config["quantization_config"]["weight_block_size"] = list(block)
    order = sorted(first, key=lambda name: (name.endswith(SCALE), name))  # the scales come last: in other files
    source = write_hf(tmp_path / "hf", WIDE, {name: first[name] for name in order}, config=config, most=300_000)
    files = [set(safetensors_io.open_file(p).slots) for p in sorted(source.glob("*.safetensors"))]
    apart = [name for name in first if name + SCALE in first and not any({name, name + SCALE} <= held for held in files)]
    assert len(files) > 2 and len(apart) > 10

    run(source, tmp_path / "bf16", "hf", dtype="bfloat16")
    for name, (k, _, found) in stored(tmp_path / "bf16").items():
        if name + SCALE in first:
            exact = decoded(first[name][1], scale_values(*first[name + SCALE]), block)
            assert found == nearest_bf16(exact.astype(np.float32)).tobytes(), name
        else:
            assert (k, found) == (first[name][0], first[name][1].tobytes()), name
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())

    run(source, tmp_path / "fp8", "hf-fp8")
    for name, (k, shape, found) in stored(tmp_path / "fp8").items():
        if block == (128, 128) and name.endswith(SCALE):
            assert k == "F32" and np.array_equal(np.frombuffer(found, np.float32).reshape(shape), scale_values(*first[name]))
        elif block == (128, 128):
            assert (k, shape, found) == (first[name][0], first[name][1].shape, first[name][1].tobytes()), name
    assert set(stored(tmp_path / "fp8")) == set(first)

    if kind == "F32" and block == (128, 128):  # quantised anew from numbers; the scales come out again
        for dtype in ("float32", "bfloat16"):
            run(source, tmp_path / f"own {dtype}", "own", dtype=dtype)
            run(tmp_path / f"own {dtype}", tmp_path / f"fp8 of {dtype}", "hf-fp8")
            again = stored(tmp_path / f"fp8 of {dtype}")
            for name, (k, shape, found) in stored(tmp_path / "fp8").items():
                if not name.endswith(SCALE) or dtype == "float32":
                    assert again[name] == (k, shape, found), (dtype, name)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_numbers_become_fp8(tmp_path, ue8m0):
    rng = np.random.default_rng(6)
    first = weights(WIDE, "F32", rng)
    for t in published(WIDE):
        if t.quantised:
            rows, cols = (np.arange(n) // 128 for n in t.shape)
            size = np.exp2(rng.integers(-30, 30, (rows[-1] + 1, cols[-1] + 1)))[rows[:, None], cols[None]]
            values = (rng.standard_normal(t.shape) * size).astype(np.float32)
            special = rng.integers(3)
            if special == 0:
                values[:128, :128] = 0
            elif special == 1:  # the scale is a power of two as it is
                values[:128, :128] = np.clip(values[:128, :128], -0.25, 0.25)
                values[0, 0] = -448 * 2.0**-9
            first[t.name] = "F32", values
    run(write_hf(tmp_path / "hf", WIDE, first, "float32"), tmp_path / "fp8", "hf-fp8", ue8m0=ue8m0)
    found = stored(tmp_path / "fp8")
    written = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert written.get("scale_fmt") == ("ue8m0" if ue8m0 else None) and written["weight_block_size"] == [128, 128]
    for t in published(WIDE):
        if not t.quantised:
            continue
        x = first[t.name][1].astype(np.float64)
        codes = np.frombuffer(found[t.name][2], np.uint8).reshape(t.shape)
        scales = np.frombuffer(found[t.name + SCALE][2], np.float32).reshape(found[t.name + SCALE][1]).astype(np.float64)
        for i, j in np.ndindex(scales.shape):
            block = np.abs(x[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128])
            if ue8m0:
                assert np.frexp(scales[i, j])[0] == 0.5
                assert not block.any() or block.max() / 448 <= scales[i, j] < 2 * block.max() / 448, (t.name, i, j)
            else:
                assert scales[i, j] == (np.float32(block.max()) / np.float32(448) if block.any() else 1)
        assert not np.any(codes & 127 == 127)
        rows, cols = (np.arange(n) // 128 for n in t.shape)
        scale = scales[rows[:, None], cols[None]]
        ulp = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(x) / scale, 2.0**-6))), -6) - 3)
        assert np.all(np.abs(decoded(codes, scales) - x) <= scale * ulp * 0.5000001), t.name


def test_what_is_not_a_number_has_no_fp8(tmp_path):
    first = weights(SMALL, "BF16", np.random.default_rng(0))
    source = formats.open_checkpoint(write_hf(tmp_path / "hf", SMALL, first))  # every tensor has an infinity
    with pytest.raises(ValueError, match="model.safetensors: tensor 'model.layers.0.self_attn.q_a_proj.weight' .*not finite"):
        convert.convert(source, formats.make_target(source, "hf-fp8"), tmp_path / "fp8", progress=False)
    assert not (tmp_path / "fp8").exists()


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("form", TARGETS)
def test_the_bytes_do_not_depend_on_the_piece(tmp_path, monkeypatch, form, kind):
    rng = np.random.default_rng(8)
    first = fp8_weights(WIDE, "F32", rng) if kind == "fp8" else {
        name: (k, a if k == "F32" else a & 0xBFFF) for name, (k, a) in weights(WIDE, "BF16", rng).items()}  # all finite
    source = formats.open_checkpoint(write_hf(tmp_path / "hf", WIDE, first, config=hf.config_json(
        WIDE, hf.FP8_DTYPE if kind == "fp8" else "bfloat16")))
    for piece in (1 << 24, 700, 20_000):
        monkeypatch.setattr(convert, "PIECE", piece)
        monkeypatch.setattr(convert, "THREADS", 1 if piece == 700 else 3)
        run(source, tmp_path / str(piece), form, **TARGETS[form])
    one = {p.relative_to(tmp_path / str(1 << 24)): p.read_bytes() for p in files(tmp_path / str(1 << 24))}
    for piece in ("700", "20000"):
        assert one == {p.relative_to(tmp_path / piece): p.read_bytes() for p in files(tmp_path / piece)}
