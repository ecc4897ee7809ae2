"""What a pipeline stage holds: its own part of the tree of params, and what each leaf is called in the whole model."""
from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..model import param_specs
from ..spec import is_spec
from ..tree import paths, tree_map_with_path
from .schedules import check_schedule, chunks_of
from .shard import Placement, place

AFTER = ("norm", "head", "mtp")  # what follows the main layers, on the last stage


@dataclass(frozen=True)
class Chunk:
    """Consecutive main layers, by their numbers in the model; the first chunk begins with the embedding, the last ends with
    the final norm, the head and the MTP modules."""

    index: int
    layers: tuple[int, ...]
    first: bool
    last: bool

    def embeds(self, cfg: Config) -> bool:
        """Whether it reads the main embedding."""
        return self.first or (self.last and reads_embedding(cfg))


def chunks(cfg: Config, placement: Placement | None) -> tuple[Chunk, ...]:
    """The chunks of a rank's stage, in the order of the model; without a pipeline one, the whole model."""
    if placement is None:
        return (Chunk(0, tuple(range(cfg.num_hidden_layers)), True, True),)
    pipe, line = placement.mesh.pipe, placement.pipeline
    check_schedule(line.schedule, pipe, line.virtual, pipe)
    lengths = line.lengths(cfg.num_hidden_layers, pipe)
    starts = [0, *itertools.accumulate(lengths)]
    stage = placement.mesh.coords(placement.rank)["pipe"]
    return tuple(Chunk(c, tuple(range(starts[c], starts[c + 1])), c == 0, c == len(lengths) - 1)
                 for c in sorted(chunks_of(stage, pipe, line.virtual, line.schedule)))


def held(cfg: Config, placement: Placement | None) -> tuple[Any, tuple[str, ...]]:
    """(specs, names) of a rank's stage: a tree like ``param_specs`` with this stage's layers only, in their order, and of each
    leaf, in the order of ``paths``, its path in the whole model.

    The embedding is also on the last stage when the MTP modules or a tied head read it there; ``owns_embedding`` says whose
    copy is the one that counts. Without a pipeline it is the whole tree.
    """
    whole, mine = param_specs(cfg), chunks(cfg, placement)
    numbers = [i for chunk in mine for i in chunk.layers]
    tree = {"embed": whole["embed"]} if any(chunk.embeds(cfg) for chunk in mine) else {}
    tree["layers"] = tuple(whole["layers"][i] for i in numbers)
    if mine[-1].last:
        tree |= {key: whole[key] for key in AFTER if key in whole}

    def name(path: str) -> str:
        top, _, rest = path.partition(".")
        if top != "layers":
            return path
        i, _, rest = rest.partition(".")
        return f"layers.{numbers[int(i)]}.{rest}"

    return tree, tuple(name(path) for path, _ in paths(tree, is_spec))


def part_of(tree: Any, chunk: Chunk, mine: tuple[Chunk, ...], cfg: Config) -> Any:
    """What one of a stage's chunks ``mine`` reads of a tree shaped like the stage's params."""
    start = sum(len(other.layers) for other in mine if other.index < chunk.index)
    part = {"embed": tree["embed"]} if chunk.embeds(cfg) else {}
    part["layers"] = tree["layers"][start:start + len(chunk.layers)]
    return part | ({key: tree[key] for key in AFTER if key in tree} if chunk.last else {})


def own(params: Any, cfg: Config, placement: Placement) -> Any:
    """A rank's own params, of whole ones: the slices of its stage, as Tensors of their own (``shard.place`` for a pipeline)."""
    specs, names = held(cfg, placement)
    leaves, name = dict(paths(params)), iter(names)
    return place(tree_map_with_path(lambda path, spec: leaves[next(name)], specs), specs, placement)


def moe_rows(chunk: Chunk, cfg: Config) -> tuple[int, ...]:
    """Rows of the metric "load" that a chunk's MoE blocks fill, those of its MTP modules included, in its order."""
    row = {layer: i for i, layer in enumerate(i for i in range(cfg.num_hidden_layers) if cfg.is_moe_layer(i))}
    rows = tuple(row[i] for i in chunk.layers if i in row)
    return rows + (tuple(range(len(row), len(row) + cfg.num_nextn_predict_layers)) if chunk.last else ())


def reads_embedding(cfg: Config) -> bool:
    """Whether what follows the main layers reads the main embedding."""
    return cfg.tie_word_embeddings or (cfg.num_nextn_predict_layers > 0 and cfg.mtp_share_embeddings)


def owns_embedding(cfg: Config, placement: Placement) -> bool:
    """Whether a rank's embedding is the one that counts (in norms, in files), not the last stage's copy of it."""
    return chunks(cfg, placement)[0].first
