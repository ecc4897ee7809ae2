"""Hugging Face checkpoints of DeepSeek-V3: read float or FP8 folders into our params, and write them back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..model import param_specs
from ..spec import ParamSpec
from ..tree import tree_map_with_path
from . import fp8, leaves, shards
from .folder import MANIFEST, replace_folder, write_text
from .leaves import FLOATS
from .names import IGNORED, SCALE, Published, is_mtp, published, to_leaf, to_published
from .own import CONFIG, MARKER
from .safetensors_io import DTYPES, Slot
from .shards import Shards

FP8_DTYPE = "float8_e4m3fn"


# -- reading ---------------------------------------------------------------------------------------------
def from_hf(
    path: str | Path, dtype: str | None = None, layers: int | None = None, mtp: bool = True
) -> tuple[Any, Config]:
    """(params, cfg) of a folder with config.json and safetensors, one file or several with an index.

    Accepts float32, bfloat16, float16, and FP8 E4M3 with block scales, which become float(code) * scale in
    float32. dtype: float32, bfloat16 or float16; None keeps what is stored, and takes the config's
    torch_dtype when that is FP8 or a mixture. The router bias is always float32. layers: read only the first
    so many main blocks, and cut the config to them. mtp=False leaves the MTP modules out, there or not. At
    most two copies of one leaf are held beside the result. Raises FileNotFoundError, or ValueError naming the
    tensor and the remedy.
    """
    path = Path(path)
    whole, block = _read_config(path)
    cfg = _cut(whole, layers, mtp)
    opened = shards.open_shards(path)
    everything = published(whole)
    if whole.tie_word_embeddings and "lm_head.weight" in opened.home:  # some writers repeat a tied head
        everything += (dataclasses.replace(everything[0], name="lm_head.weight", copy=True),)
    wanted = _wanted(everything, whole, cfg)
    _check_names(path, opened, everything, wanted, whole, mtp)
    for t in wanted:
        if opened.slot(t.name).shape != t.shape:
            raise ValueError(
                f"{_where(opened, t.name)} has shape {list(opened.slot(t.name).shape)}; the config asks for "
                f"{list(t.shape)}"
            )
    target = leaves.float_dtype(dtype) if dtype else _stored_dtype(path, opened, wanted, whole)
    _check_copies(opened, wanted)
    parts: dict[str, list[Published]] = {}
    for t in wanted:
        if not t.copy:
            parts.setdefault(t.path, []).append(t)

    def leaf(name: str, spec: ParamSpec) -> Any:
        kind = FLOATS[spec.dtype] if spec.dtype else target
        if len(parts[name]) == 1 and parts[name][0].expert is None:
            values = to_leaf(_values(opened, parts[name][0], kind, block), parts[name][0])
        else:
            values = np.empty(spec.shape, DTYPES[kind])
            for t in parts[name]:
                values[t.expert] = to_leaf(_values(opened, t, kind, block), t)
        return leaves.tensor(values, kind)

    return tree_map_with_path(leaf, param_specs(cfg)), cfg


def _read_config(path: Path) -> tuple[Config, tuple[int, int]]:
    """The config without quantization_config (params are never quantised), and the size of an FP8 block."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder; expected one with config.json and safetensors files"
        )
    cfg = Config.from_hf(path)
    raw = json.loads(cfg.released)
    if MARKER in raw:
        raise ValueError(f"{path / CONFIG}: this is a checkpoint of our own format; read it with load")
    quantised = raw.pop("quantization_config", None)
    block = fp8.BLOCK
    if quantised is not None:
        if not isinstance(quantised, dict) or quantised.get("quant_method") != "fp8":
            raise ValueError(
                f"{path / CONFIG}: quantization_config is {quantised!r:.120}; expected quant_method 'fp8' in "
                f"blocks, or none"
            )
        size = quantised.get("weight_block_size", list(block))
        if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
            raise ValueError(
                f"{path / CONFIG}: weight_block_size is {size!r}; expected two numbers such as [128, 128]"
            )
        block = (size[0], size[1])
    return dataclasses.replace(cfg, released=json.dumps(raw)), block


def _cut(cfg: Config, layers: int | None, mtp: bool) -> Config:
    if layers is not None:
        if not 1 <= layers <= cfg.num_hidden_layers:
            raise ValueError(
                f"layers={layers}; the checkpoint has {cfg.num_hidden_layers}: pick 1 to "
                f"{cfg.num_hidden_layers}"
            )
        cfg = cfg.replace(
            num_hidden_layers=layers, first_k_dense_replace=min(cfg.first_k_dense_replace, layers)
        )
    return cfg if mtp else cfg.replace(num_nextn_predict_layers=0)


def _wanted(everything: tuple[Published, ...], whole: Config, cfg: Config) -> list[Published]:
    """The published tensors that the cut-down config needs."""

    def keeps(t: Published) -> bool:
        if is_mtp(t.name, whole):
            return cfg.num_nextn_predict_layers > 0
        room, _, rest = t.path.partition(".")
        return room != "layers" or int(rest.partition(".")[0]) < cfg.num_hidden_layers

    return [t for t in everything if keeps(t)]


def _where(opened: Shards, name: str) -> str:
    return f"{opened.home[name].path}: tensor {name!r}"


def _check_names(
    path: Path,
    opened: Shards,
    everything: tuple[Published, ...],
    wanted: list[Published],
    whole: Config,
    mtp: bool,
) -> None:
    """Nothing missing, nothing unexpected; quantised tensors in FP8 have their scales and no others have."""
    is_fp8 = {name for name in opened.home if opened.slot(name).dtype == "F8_E4M3"}
    allowed = {t.name for t in everything} | {
        t.name + SCALE for t in everything if t.quantised and t.name in is_fp8
    }
    found = [name for name in opened.home if not name.endswith(IGNORED)]
    beyond = [name for name in found if is_mtp(name, whole)]
    if mtp and whole.num_nextn_predict_layers and not beyond:
        raise ValueError(
            f"{path}: config.json has num_nextn_predict_layers={whole.num_nextn_predict_layers} but the "
            f"files hold no MTP tensors (model.layers.{whole.num_hidden_layers}.*); load without them by "
            f"mtp=False"
        )
    last = max((int(name.split(".")[2]) for name in beyond), default=-1) - whole.num_hidden_layers + 1
    if mtp and last > whole.num_nextn_predict_layers:
        raise ValueError(
            f"{path}: holds blocks up to model.layers.{last + whole.num_hidden_layers - 1} but config.json "
            f"has num_hidden_layers={whole.num_hidden_layers} and num_nextn_predict_layers="
            f"{whole.num_nextn_predict_layers}; leave the MTP modules out by mtp=False, or set "
            f"num_nextn_predict_layers={last}"
        )
    if not mtp:
        found = [name for name in found if not is_mtp(name, whole)]
    needed = dict.fromkeys(t.name for t in wanted)
    needed |= dict.fromkeys(t.name + SCALE for t in wanted if t.quantised and t.name in is_fp8)
    leaves.check_names(str(path), [name for name in found if name in needed or name not in allowed], needed)


def _stored_dtype(path: Path, opened: Shards, wanted: list[Published], cfg: Config) -> str:
    """The file type of all weights, or the config's torch_dtype when they are FP8 or of several types."""
    kinds = {opened.slot(t.name).dtype for t in wanted if not t.float32}
    if len(kinds) == 1 and kinds <= set(FLOATS.values()):
        return kinds.pop()
    raw = json.loads(cfg.released)
    named = raw.get("torch_dtype", raw.get("dtype"))
    if named not in FLOATS:
        raise ValueError(
            f"{path}: the tensors are {', '.join(sorted(kinds))} and torch_dtype in config.json is "
            f"{named!r}; say dtype='bfloat16' or another of {', '.join(FLOATS)}"
        )
    return FLOATS[named]


def _check_copies(opened: Shards, wanted: list[Published]) -> None:
    """MTP's copies of the embedding and the head must equal the main ones: we keep one of each."""
    main = {t.path: t.name for t in wanted if not t.copy}
    for t in wanted:
        if not t.copy:
            continue
        a, b = opened.slot(t.name).dtype, opened.slot(main[t.path]).dtype
        mine, other = opened.read(t.name), opened.read(main[t.path])
        for i in range(0, t.shape[0], 4096):
            x, y = mine[i : i + 4096], other[i : i + 4096]
            if a != b:
                x, y = leaves.convert(x, a, "F32", t.name), leaves.convert(y, b, "F32", main[t.path])
            if not np.array_equal(x.view(f"u{x.itemsize}"), y.view(f"u{y.itemsize}")):
                row = i + int(np.argmax((x != y).any(axis=1)))
                raise ValueError(
                    f"{_where(opened, t.name)} differs from {main[t.path]!r} (first in row {row}), but "
                    f"the model has one tensor for both; if it belongs to MTP, leave that out by mtp=False"
                )


def _values(opened: Shards, t: Published, kind: str, block: tuple[int, int]) -> np.ndarray:
    """One published tensor in the wanted type, its own orientation."""
    stored, where = opened.slot(t.name).dtype, _where(opened, t.name)
    if stored != "F8_E4M3":
        return leaves.convert(opened.read(t.name), stored, kind, where)
    if not t.quantised:
        raise ValueError(
            f"{where} is FP8; expected one of {', '.join(FLOATS.values())}: it has no block scales"
        )
    name = t.name + SCALE
    if opened.slot(name).dtype not in FLOATS.values() or opened.slot(name).shape != fp8.scale_shape(
        t.shape, block
    ):
        raise ValueError(
            f"{_where(opened, name)} is {opened.slot(name).dtype} {list(opened.slot(name).shape)}; expected "
            f"F32 {list(fp8.scale_shape(t.shape, block))}: one scale per block of {list(block)}"
        )
    scales = leaves.convert(opened.read(name), opened.slot(name).dtype, "F32", name)
    if not np.all(np.isfinite(scales)) or scales.min(initial=0) < 0:
        bad = np.argwhere(~(np.isfinite(scales) & (scales >= 0)))[0]
        raise ValueError(
            f"{_where(opened, name)} has the scale {scales[tuple(bad)]} at {bad.tolist()}; expected finite "
            f"numbers of at least 0"
        )
    return leaves.convert(fp8.dequantise(opened.read(t.name), scales, block), "F32", kind, where)


# -- writing ---------------------------------------------------------------------------------------------
def to_hf(
    params: Any, cfg: Config, path: str | Path, dtype: str = "bfloat16", max_shard_size: int | str = "5GB"
) -> Path:
    """Write params as a Hugging Face folder of config.json and safetensors; returns its path.

    dtype: float32, bfloat16, float16, or float8_e4m3fn (128 x 128 blocks with scales amax/448, the rest
    bfloat16, as released). MTP's copies of the embedding and the head are written again. The folder is
    complete before it takes its name; files that are not weights (a tokenizer) are kept when it existed.
    Raises ValueError when params do not fit cfg, or when the path holds something that this would not
    replace.
    """
    found = leaves.check_params(params, cfg)
    is_fp8 = dtype == FP8_DTYPE
    if not is_fp8 and dtype not in FLOATS:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join([*FLOATS, FP8_DTYPE])}")
    kind = "BF16" if is_fp8 else FLOATS[dtype]
    tensors = published(cfg)
    slots = []
    for t in tensors:
        blocks = is_fp8 and t.quantised
        slots.append(Slot(t.name, "F8_E4M3" if blocks else "F32" if t.float32 else kind, t.shape))
        if blocks:
            slots.append(Slot(t.name + SCALE, "F32", fp8.scale_shape(t.shape)))
    out = {k: v for k, v in cfg.to_hf().items() if k != "quantization_config"}
    out.update({key: {"BF16": "bfloat16"}.get(kind, dtype) for key in ("torch_dtype", "dtype") if key in out})
    if is_fp8:
        out["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(fp8.BLOCK),
        }

    def fill(new: Path) -> None:
        write_text(new / CONFIG, json.dumps(out, indent=2))
        shards.write_shards(
            new,
            "model",
            slots,
            _arrays(found, tensors, kind, is_fp8),
            max_shard_size,
            {"format": "pt"},
            always_index=False,
        )

    return replace_folder(path, fill, is_ours=_ownership(Path(path)), with_manifest=False)


def _arrays(
    found: dict[str, Any], tensors: tuple[Published, ...], kind: str, is_fp8: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of every tensor to write, leaf after leaf, so that one leaf is on the host at a time."""
    by_leaf: dict[str, list[Published]] = {}
    for t in tensors:
        by_leaf.setdefault(t.path, []).append(t)
    for path, parts in by_leaf.items():
        stored, values = leaves.dtype_of(found[path], path), leaves.host(found[path])
        for t in parts:
            part = to_published(values, t)
            if not (is_fp8 and t.quantised):
                yield t.name, leaves.convert(part, stored, "F32" if t.float32 else kind, path)
                continue
            wide = leaves.convert(part, stored, "F32", path)
            if not np.all(np.isfinite(wide)):
                raise ValueError(
                    f"params: {path} holds values that are not finite; FP8 blocks cannot be scaled to them"
                )
            codes, scales = fp8.quantise(wide)
            yield t.name, codes
            yield t.name + SCALE, scales


def _ownership(path: Path) -> Any:
    """What is replaced in an existing folder: weights and config. Raises ValueError for foreign weights."""

    def is_ours(file: Path) -> bool:
        name = file.name
        return (
            name == CONFIG
            or name == "model.safetensors.index.json"
            or name.startswith("model")
            and name.endswith(".safetensors")
        )

    if path.is_dir():
        for file in path.iterdir():
            if (
                file.name == MANIFEST
                or file.suffix in (".safetensors", ".bin", ".pt", ".ckpt")
                and not is_ours(file)
            ):
                raise ValueError(
                    f"{path} holds {file.name}, which a Hugging Face checkpoint of ours does not have; "
                    f"choose another path or empty it"
                )
    return is_ours
