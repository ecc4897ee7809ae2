"""Hugging Face checkpoints of DeepSeek-V3: read float or FP8 folders into our params, and write them back."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..config import Config
from . import fp8, leaves, own, shards
from .folder import MANIFEST, replace_folder, write_text
from .layout import Part, Stored, StoredFile, one
from .leaves import FLOATS
from .names import IGNORED, SCALE, Published, is_mtp, published
from .own import CONFIG, MARKER
from .safetensors_io import Slot
from .shards import Shards
from .source import FP8, Source, differing_copy, open_layout, params_source, read

FP8_DTYPE = "float8_e4m3fn"
HEAD = "lm_head.weight"
SCALE_KINDS = (*FLOATS.values(), "F8_E8M0")


# -- reading -----------------------------------------------------------------------------------------------------------
def from_hf(path: str | Path, dtype: str | None = None, layers: int | None = None, mtp: bool = True,
            progress: bool | None = None) -> tuple[Any, Config]:
    """(params, cfg) of a folder with config.json and safetensors, one file or several with an index.

    Accepts float32, bfloat16, float16, and FP8 E4M3 with block scales (float or E8M0), which become float(code) * scale
    in float32. dtype: float32, bfloat16 or float16; None keeps what is stored, and takes the config's torch_dtype when
    that is FP8 or a mixture. The router bias is always float32. layers: read only the first so many main blocks, and cut
    the config to them. mtp=False leaves the MTP modules out, there or not. progress: a bar with bytes a second on
    stderr; None shows it on a terminal. At most two copies of one leaf are held beside the result. Raises
    FileNotFoundError, or ValueError naming the tensor and the remedy.
    """
    source = open_hf(path, layers, mtp)
    check_copies(source)
    return own.read_params(source, dtype, progress), source.cfg


def open_hf(path: str | Path, layers: int | None = None, mtp: bool = True) -> Source:
    """A Hugging Face folder as a Source; names, types and shapes are checked, values are not read. Arguments as ``from_hf``."""
    path = Path(path)
    whole, block = _read_config(path)
    cfg = _cut(whole, layers, mtp)
    opened = shards.open_shards(path)
    everything = published(whole)
    if whole.tie_word_embeddings and HEAD in opened.home:  # some writers repeat a tied head
        everything += (dataclasses.replace(everything[0], name=HEAD, copy=True),)
    wanted = _wanted(everything, whole, cfg)
    _check_names(path, opened, everything, wanted, whole, mtp)
    files: dict[str, list[Stored]] = {}
    for t in wanted:
        for stored in _stored(opened, t, _renamed(t.name, whole, cfg), block):
            files.setdefault(opened.home[stored.name].path.name, []).append(stored)

    def raw(file: str, tensor: str) -> tuple[str, Any]:
        return opened.slot(tensor).dtype, opened.read(tensor).reshape(-1)

    return open_layout(str(path), "hf", cfg, (StoredFile(name, tuple(tensors)) for name, tensors in files.items()), raw,
                       block=block, paths=tuple(file.path for file in opened.files))


def _renamed(name: str, whole: Config, cfg: Config) -> str:
    """The published name in the cut-down model: its MTP modules follow fewer blocks."""
    if not is_mtp(name, whole):
        return name
    parts = name.split(".")
    parts[2] = str(int(parts[2]) - whole.num_hidden_layers + cfg.num_hidden_layers)
    return ".".join(parts)


def _stored(opened: Shards, t: Published, name: str, block: tuple[int, int]) -> list[Stored]:
    """What the files hold of one published tensor, under its own and its new name."""
    slot, where = opened.slot(t.name), f"{opened.home[t.name].path}: tensor {t.name!r}"
    if slot.shape != t.shape:
        raise ValueError(f"{where} has shape {list(slot.shape)}; the config asks for {list(t.shape)}")
    if slot.dtype != FP8:
        if slot.dtype not in FLOATS.values():
            raise ValueError(f"{where}: is stored as {slot.dtype}; expected one of {', '.join([*FLOATS.values(), FP8])}")
        return [one(t.name, Part(name, t.shape))]
    if not t.quantised:
        raise ValueError(f"{where} is FP8; expected one of {', '.join(FLOATS.values())}: it has no block scales")
    scale, shape = opened.slot(t.name + SCALE), fp8.scale_shape(t.shape, block)
    if scale.dtype not in SCALE_KINDS or scale.shape != shape:
        raise ValueError(f"{opened.home[scale.name].path}: tensor {scale.name!r} is {scale.dtype} {list(scale.shape)}; "
                         f"expected F32 {list(shape)}: one scale per block of {list(block)}")
    return [one(t.name, Part(name, t.shape, field="codes")), one(scale.name, Part(name, shape, field="scales"))]


def check_copies(source: Source) -> None:
    """MTP's copies of the embedding and the head must equal the main ones: we keep one of each. Raises ValueError."""
    tensors = published(source.cfg)
    if source.cfg.tie_word_embeddings and (HEAD, "values") in source.places:
        tensors += (dataclasses.replace(tensors[0], name=HEAD, copy=True),)
    if found := differing_copy(source, tensors):
        copy, main, row = found
        raise ValueError(f"{source.where(copy)} differs from {main!r} (first in row {row}), but the model has one tensor for "
                         f"both; to keep them apart set mtp_share_embeddings to false in config.json, or leave MTP out by "
                         f"mtp=False")


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


# -- writing -----------------------------------------------------------------------------------------------------------
def to_hf(params: Any, cfg: Config, path: str | Path, dtype: str = "bfloat16", max_shard_size: int | str = "5GB") -> Path:
    """Write params as a Hugging Face folder of config.json and safetensors; returns its path.

    dtype: float32, bfloat16, float16, or float8_e4m3fn (128 x 128 blocks with scales amax/448, the rest bfloat16, as
    released). MTP's copies of the embedding and the head are written again. The folder is complete before it takes its
    name; files that are not weights (a tokenizer) are kept when it existed. Raises ValueError when params do not fit cfg,
    or when the path holds something that this would not replace.
    """
    source = params_source(params, cfg)
    kind = storage_kind(dtype)
    tensors = hf_tensors(cfg, dtype == FP8_DTYPE)
    slots = [Slot(t.name, t.dtype or kind, t.shape) for t in tensors]

    def fill(new: Path) -> None:
        write_text(new / CONFIG, json.dumps(config_json(cfg, dtype), indent=2))
        arrays = ((t.name, read(source, t.chunks[0].parts[0], t.dtype or kind)) for t in tensors)
        shards.write_shards(new, "model", slots, arrays, max_shard_size, {"format": "pt"}, always_index=False)

    return replace_folder(path, fill, is_ours=_ownership(Path(path)), with_manifest=False)


def storage_kind(dtype: str) -> str:
    """The file type of weights that are not quantised, for a dtype of ``to_hf``. Raises ValueError for an unknown one."""
    if dtype not in (*FLOATS, FP8_DTYPE):
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join([*FLOATS, FP8_DTYPE])}")
    return "BF16" if dtype == FP8_DTYPE else FLOATS[dtype]


def hf_tensors(cfg: Config, is_fp8: bool) -> list[Stored]:
    """What a Hugging Face checkpoint holds, in the order of our params; with ``is_fp8`` codes and scales as released."""
    out = []
    for t in published(cfg):
        if is_fp8 and t.quantised:
            out.append(one(t.name, Part(t.name, t.shape, field="codes"), dtype=FP8))
            out.append(one(t.name + SCALE, Part(t.name, fp8.scale_shape(t.shape), field="scales"), dtype="F32"))
        else:
            out.append(one(t.name, Part(t.name, t.shape), dtype="F32" if t.float32 else None))
    return out


def config_json(cfg: Config, dtype: str, ue8m0: bool = False) -> dict[str, Any]:
    """The config.json of a checkpoint stored in ``dtype``: torch_dtype and quantization_config say what is there."""
    out = {k: v for k, v in cfg.to_hf().items() if k != "quantization_config"}
    named = "bfloat16" if dtype == FP8_DTYPE else dtype
    out.update({key: named for key in [key for key in ("torch_dtype", "dtype") if key in out] or ["torch_dtype"]})
    if dtype == FP8_DTYPE:
        out["quantization_config"] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                      "weight_block_size": list(fp8.BLOCK)}
        if ue8m0:
            out["quantization_config"]["scale_fmt"] = "ue8m0"
    return out


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
