"""The layouts by name: how each is recognised and opened, and what is to be written for it."""
from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from . import folder, hf, leaves, mcore, mindformers, own, safetensors_io, shards, torch_file
from .convert import Target, sharded
from .folder import read_json
from .layout import Stored
from .mcore_detect import detect as detect_strategy
from .names import published
from .source import Source, open_layout, own_tensors, stored_kind

FORMS = ("hf", "own", "mcore", "mindformers")  # that can be read
STRATEGY = "strategy.json"  # beside a Megatron folder of ours: the flags, one of which its files do not show
TARGETS = ("hf", "hf-fp8", "own", "mcore", "mindformers")


def detect(path: str | Path) -> str:
    """Which layout a folder has. Raises FileNotFoundError, or ValueError saying what was looked for."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if (path / mcore.TRACKER).is_file() or any(path.glob("iter_*")) or any(path.glob("mp_rank_*")):
        return "mcore"
    if (path / mindformers.NAME_MAP).is_file() or any(path.glob("ms-model-*.safetensors")):
        return "mindformers"
    if (path / own.CONFIG).is_file() and _is_marked(path / own.CONFIG):
        return "own"
    if any(path.glob("model*.safetensors")) or (path / own.INDEX).is_file():
        return "hf"
    raise ValueError(f"{path}: no checkpoint that we know: expected model*.safetensors (Hugging Face or own), "
                     f"ms-model-*.safetensors (MindSpore Transformers), or iter_*/mp_rank_* (Megatron-core)")


def _is_marked(config: Path) -> bool:
    content = read_json(config)
    return isinstance(content, dict) and own.MARKER in content


def open_checkpoint(path: str | Path, form: str = "auto", *, cfg: Config | None = None, layers: int | None = None,
                    mtp: bool = True, **options: Any) -> Source:
    """A checkpoint of any layout as a Source. form: "auto" or one of FORMS.

    cfg: for layouts whose folder has no config.json. layers, mtp: read a part only (Hugging Face). options: what a
    Megatron folder does not say (``mcore_source``). Raises FileNotFoundError, or ValueError naming file and tensor.
    """
    form = detect(path) if form == "auto" else form
    if form not in FORMS:
        raise ValueError(f"form {form!r}; expected one of {', '.join(FORMS)}")
    if (layers is not None or not mtp) and form != "hf":
        raise ValueError(f"{path} is {form}: a part of a checkpoint is read from a Hugging Face folder only")
    path = Path(path)
    if form == "hf":
        return hf.open_hf(path, layers, mtp)
    if form == "own":
        return own.open_own(path)
    cfg = cfg or _config(path)
    return mindformers_source(path, cfg) if form == "mindformers" else mcore_source(path, cfg, **options)


def _config(path: Path) -> Config:
    if not (path / own.CONFIG).is_file():
        raise FileNotFoundError(f"{path}: no {own.CONFIG}; give the model's config (a preset, or the path of a config.json)")
    return Config.from_hf(path)


def mindformers_source(path: Path, cfg: Config) -> Source:
    """A folder of MindSpore Transformers as a Source; its form is recognised."""
    form, home = mindformers.detect(path)
    files = mindformers.regroup(mindformers.layout(cfg, form), home, str(path))
    opened = {file.path: safetensors_io.open_file(path / file.path) for file in files}
    for file in files:
        for t in file.tensors:
            slot = opened[file.path].slots.get(t.name)
            if slot is None:
                raise ValueError(f"{path / file.path}: tensor {t.name!r} is missing")
            _check(f"{path / file.path}: tensor {t.name!r}", slot.dtype, slot.shape, t)
        for name in opened[file.path].slots:
            if name.startswith(("model.", "lm_head.")) and name not in home:
                raise ValueError(f"{path / file.path}: tensor {name!r} is unexpected: {mindformers.NAME_MAP} does not list it")

    def raw(file: str, tensor: str) -> tuple[str, np.ndarray]:
        return opened[file].slots[tensor].dtype, safetensors_io.read(opened[file], tensor).reshape(-1)

    return open_layout(str(path), "mindformers", cfg, files, raw, paths=tuple(f.path for f in opened.values()), notes=str(form))


def mcore_source(path: Path, cfg: Config, moe_tp_extend_ep: bool | None = None) -> Source:
    """A Megatron-core folder as a Source; its strategy is recognised as far as its files say it."""
    if moe_tp_extend_ep is None and (path / STRATEGY).is_file():
        moe_tp_extend_ep = folder.read_json(path / STRATEGY).get("moe_tp_extend_ep")
    strategy, iteration = detect_strategy(path, cfg, moe_tp_extend_ep=moe_tp_extend_ep)
    files = mcore.layout(cfg, strategy, iteration)
    opened: dict[str, tuple[torch_file.TorchFile, dict[str, torch_file.TorchTensor]]] = {}
    for file in files:
        saved = torch_file.open_file(path / file.path)
        held = mcore.tensors(saved.structure)
        opened[file.path] = saved, held
        found = [name for name in held if not name.endswith("_extra_state")]
        leaves.check_names(str(path / file.path), found, [t.name for t in file.tensors])
        for t in file.tensors:
            _check(f"{path / file.path}: tensor {t.name!r}", held[t.name].dtype, held[t.name].shape, t)

    def raw(file: str, tensor: str) -> tuple[str, np.ndarray]:
        saved, held = opened[file]
        return held[tensor].dtype, torch_file.read(saved, held[tensor]).reshape(-1)

    return open_layout(str(path), "mcore", cfg, files, raw, paths=tuple(path / file for file in opened), notes=str(strategy))


def _check(where: str, dtype: str, shape: tuple[int, ...], wanted: Stored) -> None:
    if shape != wanted.shape:
        raise ValueError(f"{where} has shape {list(shape)}; the config asks for {list(wanted.shape)}")
    if dtype not in leaves.FLOATS.values():
        raise ValueError(f"{where} is {dtype}; expected one of {', '.join(leaves.FLOATS.values())}")


def describe(source: Source) -> list[tuple[str, str]]:
    """(what, value) rows about an open checkpoint: layout, files and bytes, tensors by type, strategy or form."""
    kinds = Counter(source.kind(t.name) for t in published(source.cfg) if source.home(t.name) == t.name)
    nbytes = sum(path.stat().st_size for path in source.paths)
    rows = [("layout", source.form), ("files", f"{len(source.paths):,}, {nbytes:,} bytes ({nbytes / 1e9:,.2f} GB)"),
            ("published tensors", ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common()))]
    return rows + [("as", source.notes)] if source.notes else rows


# -- what is to be written ---------------------------------------------------------------------------------------------
def make_target(source: Source, form: str, *, dtype: str | None = None, max_shard_size: int | str = "5GB", ue8m0: bool = False,
                mindformers_form: mindformers.MindformersForm | None = None,
                strategy: mcore.McoreStrategy | None = None) -> Target:
    """The files of a checkpoint of another layout. form: one of TARGETS.

    dtype: float32, bfloat16 or float16 for the weights, default as they are stored (the config's torch_dtype when that is
    FP8 or a mixture). max_shard_size, of hf and own: bytes of a file. ue8m0: power-of-two scales of hf-fp8. Raises
    ValueError for what the layout cannot hold.
    """
    if form not in TARGETS:
        raise ValueError(f"to {form!r}; expected one of {', '.join(TARGETS)}")
    if form == "hf-fp8" and dtype not in (None, "bfloat16"):
        raise ValueError(f"dtype={dtype!r} with hf-fp8: what is not FP8 there is bfloat16, as released; leave dtype out")
    cfg = source.cfg
    if form in ("mcore", "mindformers") and cfg.num_nextn_predict_layers and not cfg.mtp_share_embeddings:
        raise ValueError(f"{source.name}: mtp_share_embeddings is false, but {form} has no place for an embedding and a head "
                         f"of the MTP modules' own; leave MTP out")
    kind = "BF16" if form == "hf-fp8" else leaves.float_dtype(dtype) if dtype else stored_kind(source)
    named = next(name for name, short in leaves.FLOATS.items() if short == kind)
    if (form == "own" or form == "mindformers" and not _holds_copies(mindformers_form)) or form == "mcore":
        hf.check_copies(source)
    if form in ("hf", "hf-fp8"):
        files, texts = sharded(hf.hf_tensors(cfg, form == "hf-fp8"), kind, shards.parse_size(max_shard_size), False)
        config = hf.config_json(cfg, hf.FP8_DTYPE if form == "hf-fp8" else named, ue8m0)
        return Target(form, kind, files, texts | _json(own.CONFIG, config), ue8m0, {"format": "pt"})
    if form == "own":
        files, texts = sharded(own_tensors(cfg), kind, shards.parse_size(max_shard_size), True)
        return Target(form, kind, files, texts | _json(own.CONFIG, own.config_json(cfg, named)), metadata={"format": own.MARKER},
                      manifest=True)
    config = _json(own.CONFIG, hf.config_json(cfg, named))
    if form == "mindformers":
        files = mindformers.layout(cfg, mindformers_form or mindformers.MindformersForm())
        texts = _json(mindformers.NAME_MAP, mindformers.param_name_map(files))
        return Target(form, kind, files, texts | config, metadata=mindformers.METADATA)
    strategy = strategy or mcore.McoreStrategy()
    files = mcore.layout(cfg, strategy)
    if strategy.mtp_num_layers is not None:
        config = _json(own.CONFIG, hf.config_json(cfg.replace(num_nextn_predict_layers=strategy.mtp_num_layers), named))
    texts = {mcore.TRACKER: "1"} | _json(STRATEGY, dataclasses.asdict(strategy))
    return Target(form, kind, files, texts | config, nest=lambda file: mcore.structure(file, cfg, strategy, kind))


def _holds_copies(form: mindformers.MindformersForm | None) -> bool:
    return form is not None and form.infer and not form.via_train


def _json(name: str, content: Any) -> dict[str, str]:
    return {name: json.dumps(content, indent=2)}
