"""The strategy of an existing Megatron-core checkpoint, from its folders, the names of its tensors and their shapes."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

from ..config import Config
from . import torch_file
from .mcore import FILE, TRACKER, McoreStrategy, check, chunk_order, models, tensors


def detect(folder: str | Path, cfg: Config, *, moe_tp_extend_ep: bool | None = None) -> tuple[McoreStrategy, str]:
    """The strategy of a checkpoint, and the name of its newest iteration's folder.

    Sizes, stages, no-op layers, "dualpipev" and names are read off the folders and tensors; ``num_layer_list`` and no-op
    layers at the ends of stages leave the same files and come back as the former. Whether tensor-parallel ranks hold shares
    of grouped experts or whole ones (``moe_tp_extend_ep``) shows only in a trained checkpoint's arguments; elsewhere it has
    to be given. Raises FileNotFoundError for missing folders and files, ValueError for what does not fit the config.
    """
    root = Path(folder)
    iteration = _iteration(root)
    path, (tp, first, second) = root / iteration, _ranks(root / iteration)
    opened: dict[str, torch_file.TorchFile] = {}

    def names(rank: str) -> list[str]:
        if rank not in opened:
            opened[rank] = torch_file.open_file(path / rank / FILE)
        try:
            return list(tensors(opened[rank].structure))
        except ValueError as error:
            raise ValueError(f"{path / rank / FILE}: {error}") from None

    if second is None and first is not None:  # one number more: a stage, or an expert rank if both have the head
        head = [any(n.endswith(".output_layer.weight") for n in names(f"mp_rank_00_{i:03}")) for i in range(min(first, 2))]
        pp, ep = (1, first) if all(head) else (first, 1)
    else:
        pp, ep = first or 1, second or 1
    ranks = ["mp_rank_00" + (f"_{p:03}" if pp > 1 else "") + ("_000" if ep > 1 else "") for p in range(pp)]
    found = [names(rank) for rank in ranks]
    seen = [n for stage in found for n in stage]
    keys = list(models(opened[ranks[0]].structure))
    virtual = len(keys)
    if sorted(keys) != sorted([f"model{v}" for v in range(virtual)] if virtual > 1 else ["model"]):
        raise ValueError(f"{path / ranks[0] / FILE}: expected 'model', or 'model0', 'model1' and on, found {keys!r:.100}")
    dual = virtual == 2 and pp > 1 and "model1.output_layer.weight" in found[0]
    here: dict[tuple[int, int], set[int]] = {chunk: set() for chunk in chunk_order(pp, virtual, dual)}
    for p, stage in enumerate(found):
        for n in stage:
            if match := re.match(r"model(\d*)\.decoder\.layers\.(\d+)\.", n):
                here.setdefault((p, int(match[1] or 0)), set()).add(int(match[2]))
    total = sum(map(len, here.values()))
    if total != cfg.num_hidden_layers:
        raise ValueError(f"{path}: the files hold {total} layers but the config has num_hidden_layers={cfg.num_hidden_layers}")
    size = 1 + max(max(locals_, default=-1) for locals_ in here.values())
    counts = tuple(len(locals_) for locals_ in here.values())
    listed = virtual == 1 and all(c and locals_ == set(range(c)) for c, locals_ in zip(counts, here.values()))
    slots = [(chunk, local) for chunk in here for local in range(size)]
    noop = () if listed else tuple(i for i, (chunk, local) in enumerate(slots) if local not in here[chunk])
    grouped = any(n.endswith(".mlp.experts.weight1") for n in seen)
    if not grouped or tp == 1:
        moe_tp_extend_ep = False
    elif moe_tp_extend_ep is None:
        args = opened[ranks[0]].structure.get("args")
        moe_tp_extend_ep = True if dual else getattr(args, "moe_tp_extend_ep", None)
    if moe_tp_extend_ep is None:
        raise ValueError(
            f"{path}: {tp} tensor-parallel ranks hold grouped experts, which lie in the same shapes with and without "
            f"moe_tp_extend_ep; say which it is"
        )
    strategy = McoreStrategy(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        expert_parallel_size=ep,
        num_layers_per_virtual_pipeline_stage=size if virtual > 1 and not dual else None,
        noop_layers=noop,
        num_layer_list=counts if listed and len(set(counts)) > 1 else None,
        moe_grouped_gemm=grouped,
        moe_tp_extend_ep=bool(moe_tp_extend_ep),
        mla_mm_split=any(n.endswith(".linear_qk_nope.weight") for n in seen),
        mtp_num_layers=len({m[1] for n in seen if (m := re.search(r"\.mtp(?:\.|_)layers\.(\d+)\.", n))}),
        schedules_method="dualpipev" if dual else None,
        version="2.2" if any(".kv_layernorm." in n for n in seen) else "2.0" if any(".mtp_layers." in n for n in seen) else "2.1",
    )
    try:
        check(strategy, cfg)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return strategy, iteration


def _iteration(root: Path) -> str:
    """The folder that ``latest_checkpointed_iteration.txt`` names, or the only one there is."""
    if (root / TRACKER).is_file():
        text = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not text.isdecimal():
            raise ValueError(f"{root / TRACKER}: expected the number of an iteration or 'release', found {text[:40]!r}")
        name = text if text == "release" else f"iter_{int(text):07}"
    else:
        names = sorted(p.name for p in root.glob("iter_*")) if root.is_dir() else []
        if len(names) != 1:
            raise FileNotFoundError(f"{root}: expected {TRACKER} or one folder iter_NNNNNNN, found {len(names)} such folders")
        name = names[0]
    if not (root / name).is_dir():
        raise FileNotFoundError(f"{root / name}: no such folder; {TRACKER} names it")
    return name


def _ranks(path: Path) -> tuple[int, int | None, int | None]:
    """How many values the numbers in mp_rank_TT[_A[_B]] take. Raises FileNotFoundError for a rank that is missing."""
    found = [m for p in sorted(path.iterdir()) if (m := re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?", p.name))]
    if not found:
        raise FileNotFoundError(f"{path}: no folder mp_rank_TT[_PPP][_EEE]: not a checkpoint of Megatron-core")
    if len({m.lastindex for m in found}) > 1:
        raise ValueError(f"{path}: the folders {found[0][0]} and {found[-1][0]} are of different checkpoints")
    counts = [max(int(m[i]) for m in found) + 1 for i in range(1, found[0].lastindex + 1)]
    if prod(counts) != len(found):
        ranks = " x ".join(map(str, counts))
        raise FileNotFoundError(f"{path}: expected the {ranks} ranks up to {found[-1][0]}, found {len(found)}")
    if 1 in counts[1:]:
        raise FileNotFoundError(f"{path}: {found[-1][0]} is one of several stages or expert ranks; the others are missing")
    for m in found:
        if not (path / m[0] / FILE).is_file():
            raise FileNotFoundError(f"{path / m[0] / FILE}: no such file")
    return (*counts, None, None)[:3]
