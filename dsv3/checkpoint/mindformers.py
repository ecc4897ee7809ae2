"""The layouts of MindSpore Transformers (mindformers r1.5, research/deepseek3): training and inference, read and write.

Facts, from release v1.5.0 of that project. Its attention rotates halves where the published model rotates neighbouring
pairs, so the rope rows of every query head and of the shared key go evens first, then odds: a permutation, undone on
reading. Names and splits are those of convert_weight.py, file types too: float32 for every name with "norm",
"router.dense" or "topk_bias" in it, and so not for ``router_dense`` of the grouped form. Its MTP modules share embedding
and head, so the published copies have no place in the training forms. Sizes are free here where its scripts fix 61
layers, 3 dense ones, 256 experts or 128 heads; a full-rank query (q_lora_rank None), which only its inference network
has, is ``attention.q_proj`` with rope rows permuted as that network needs them (its script leaves them as they were).

Its other format, ``ckpt``, is all tensors by the same names in one protobuf file, checkpoints.ckpt;
``mindspore.ckpt_to_safetensors`` and ``mindspore.safetensors_to_ckpt`` turn a file into the other kind, bit for bit.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config
from . import safetensors_io
from .folder import read_json
from .layout import Chunk, Part, Stored, StoredFile, joined, one, stacked
from .leaves import check_names, listed
from .names import published

NAME_MAP = "param_name_map.json"
METADATA = {"format": "ms"}  # what MindSpore writes into its safetensors files
_OLD_INDEX = "ms-model.safetensors.index.json"  # what releases before r1.5 called it; some put it under "weight_map"

# published name -> theirs, inside a block ("model.layers.N.") and outside; tensors that are stored as they are
_BLOCK = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attention.q2l_proj.weight",
    "self_attn.q_a_layernorm.weight": "attention.lq_norm.weight",
    "self_attn.kv_a_layernorm.weight": "attention.lkv_norm.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.shared_experts.gate_proj.weight": "feed_forward.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "feed_forward.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "feed_forward.shared_experts.w3.weight",
}
_OUTER = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    "lm_head.weight": "lm_head.weight",
}
_ROUTER = "feed_forward.routed_experts."
_GATE, _BIAS = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"
_GROUPED = {_GATE: _ROUTER + "router_dense.weight", _BIAS: _ROUTER + "topk_bias"}
_SPLIT = {_GATE: _ROUTER + "router.dense.weight", _BIAS: _ROUTER + "router.router.topk_bias"}
_INFER = {_GATE: _ROUTER + "router.dense.weight", _BIAS: _ROUTER + "router.e_score_correction_bias"}
# MTP module k, block L + k: its own tensors lie outside the blocks in the training forms
_MTP = {
    "enorm.weight": "model.mtp_hidden_fusers.{k}.norm_emb.weight",
    "hnorm.weight": "model.mtp_hidden_fusers.{k}.norm.weight",
    "eh_proj.weight": "model.mtp_hidden_fusers.{k}.dense.weight",
    "shared_head.norm.weight": "model.mtp_norms.{k}.weight",
}
_MTP_INFER = {name: name for name in (*_MTP, "shared_head.head.weight")} | {"embed_tokens.weight": "tok_embeddings.weight"}
_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class MindformersForm:
    """Which of the layouts. The defaults are those of convert_weight.py.

    use_grouped_gemm: experts as ``ffn.w1`` [E, in, 2 ffn] (gate, then up) and ``ffn.w2`` [E, ffn, in], else as
    ``ffn.w1.weight``, ``w3`` [E, ffn, in] and ``w2`` [E, in, ffn]; the router has other names too. Of no effect on
    inference forms, whose experts are ``ffn.w1.weight``, ``w3`` [E, in, ffn] and ``w2`` [E, ffn, in].
    infer: what ``--infer True`` writes.
    via_train: with infer, what deepseek3_train2infer.py makes of a split training folder: its files, router and MTP names.
    With safetensors 0.8.0, whose save_file ignores strides, that script leaves the experts unturned under the turned shape,
    and nothing in the folder tells.
    hidden_first: the columns of an MTP module's ``dense`` as that project's network reads them, [hidden ; embedding]; its
    scripts copy the published [embedding ; hidden], so this is for weights trained there, or to be. No file says it, so
    ``detect`` cannot either.
    """

    use_grouped_gemm: bool = True
    infer: bool = False
    via_train: bool = False
    hidden_first: bool = False

    def __post_init__(self) -> None:
        if self.via_train and not self.infer:
            raise ValueError("via_train=True with infer=False; deepseek3_train2infer.py writes inference folders: set infer=True")

    @property
    def outer_mtp(self) -> bool:
        """Whether the MTP modules' own tensors have names outside the blocks."""
        return not self.infer or self.via_train


def layout(cfg: Config, form: MindformersForm = MindformersForm()) -> tuple[StoredFile, ...]:
    """Every file of a checkpoint of ``cfg`` and what is in it.

    Training: ``ms-model-00001-of-000NN.safetensors``, one a block; the first has the embedding too, the last the final
    norm and the head, which a tied model repeats there. Inference: one a block, one for each stacked expert weight, and
    one for the rest.
    """
    depth = cfg.num_hidden_layers
    outer: dict[str, Part] = {}
    blocks: list[dict[str, Part]] = [{} for _ in range(depth + cfg.num_nextn_predict_layers)]
    for t in published(cfg):
        if t.name.startswith("model.layers."):
            index, key = t.name.removeprefix("model.layers.").split(".", 1)
            blocks[int(index)][key] = Part(t.name, t.shape)
        else:
            outer[t.name] = Part(t.name, t.shape)
    outer.setdefault("lm_head.weight", outer["model.embed_tokens.weight"])
    embedding, *ending = [one(name, outer[key], dtype=_dtype(name, form)) for key, name in _OUTER.items()]

    rows = _row_orders(cfg)
    own = [_attention(block, f"model.layers.{i}.", form, rows) + _renamed(block, f"model.layers.{i}.", form)
           for i, block in enumerate(blocks)]
    experts = [_experts(block, f"model.layers.{i}.", cfg.n_routed_experts, form) for i, block in enumerate(blocks)]
    mtp = [_mtp(block, i, i - depth, form) if i >= depth else [] for i, block in enumerate(blocks)]
    n = len(blocks)
    if not form.infer:
        ends = [[embedding] if i == 0 else [] for i in range(n)]
        ends[-1] = ends[-1] + ending
        return tuple(StoredFile(f"ms-model-{i + 1:05d}-of-{n:05d}.safetensors",
                                (*own[i], *experts[i].values(), *mtp[i], *ends[i])) for i in range(n))
    if form.via_train:
        general = StoredFile("general.safetensors", (embedding, *ending, *(s for stored in mtp for s in stored)))
        return general, *(StoredFile(f"layer_{i}.safetensors", (*own[i], *experts[i].values())) for i in range(n))
    files = [StoredFile("model.safetensors", (embedding, *ending))]
    for i in range(n):
        files.append(StoredFile(f"model_layer_{i}.safetensors", (*own[i], *mtp[i])))
        files += [StoredFile(f"model_layer_{i}_routed_experts_{w}.safetensors", (s,)) for w, s in experts[i].items()]
    return tuple(files)


def param_name_map(files: Iterable[StoredFile]) -> dict[str, str]:
    """{tensor: file}: the content of ``param_name_map.json``, which must lie beside the files."""
    return {stored.name: file.path for file in files for stored in file.tensors}


# -- the tensors of a block --------------------------------------------------------------------------------------------
def _row_orders(cfg: Config) -> dict[str, np.ndarray]:
    """Rows of the published q_b (or q), kv_a and kv_b projections: for each piece of theirs, which and in what order."""
    heads, nope, rope, value = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    q = np.arange(heads * (nope + rope)).reshape(heads, nope + rope)
    kv = np.arange(heads * (nope + value)).reshape(heads, nope + value)
    halves = np.r_[0:rope:2, 1:rope:2]  # pairs (0, 1), (2, 3) ... become (0, rope/2), (1, rope/2 + 1) ...
    q_pe = q[:, nope + halves]
    return {
        "q": np.concatenate([q[:, :nope], q_pe], axis=1).reshape(-1),
        "q_nope": q[:, :nope].reshape(-1),
        "q_pe": q_pe.reshape(-1),
        "k_pe": cfg.kv_lora_rank + halves,
        "k_nope": kv[:, :nope].reshape(-1),
        "v": kv[:, nope:].reshape(-1),
    }


def _attention(block: Mapping[str, Part], prefix: str, form: MindformersForm, rows: Mapping[str, np.ndarray]) -> list[Stored]:
    """The projections whose rows are split or permuted."""

    def some(key: str, which: slice | np.ndarray) -> Part:
        return dataclasses.replace(block[f"self_attn.{key}.weight"], rows=which)

    def put(name: str, *parts: Part) -> Stored:
        return joined(f"{prefix}attention.{name}.weight", parts)

    latent = some("kv_a_proj_with_mqa", slice(0, int(rows["k_pe"][0])))
    k_pe = some("kv_a_proj_with_mqa", rows["k_pe"])
    if "self_attn.q_proj.weight" in block:
        out = [put("q_proj", some("q_proj", rows["q"]))]
    elif form.infer:
        out = [put("l2q_proj", some("q_b_proj", rows["q"]))]
    else:
        out = [put("l2q_nope_proj", some("q_b_proj", rows["q_nope"])), put("l2q_pe_proj", some("q_b_proj", rows["q_pe"]))]
    out += [put("kv2l", latent, k_pe)] if form.infer else [put("kv2l_latent_kv", latent), put("kv2l_k_pe", k_pe)]
    return out + [put("lkv2kv_k_nope", some("kv_b_proj", rows["k_nope"])), put("lkv2kv_v", some("kv_b_proj", rows["v"]))]


def _renamed(block: Mapping[str, Part], prefix: str, form: MindformersForm) -> list[Stored]:
    """The tensors of a block that only change their name."""
    grouped = form.use_grouped_gemm and not form.infer
    router = _GROUPED if grouped else _INFER if form.infer and not form.via_train else _SPLIT
    names = {key: prefix + name for key, name in (_BLOCK | router).items() if key in block}
    return [one(name, block[key], dtype=_dtype(name, form)) for key, name in names.items()]


def _experts(block: Mapping[str, Part], prefix: str, count: int, form: MindformersForm) -> dict[str, Stored]:
    """{"w1", "w2" and, unless grouped, "w3": stacked over the experts, a chunk each}; empty for a dense block."""
    if "mlp.experts.0.gate_proj.weight" not in block:
        return {}
    grouped, turned = form.use_grouped_gemm and not form.infer, form.use_grouped_gemm or form.infer

    def chunk(e: int, *keys: str) -> Chunk:
        whole = [block[f"mlp.experts.{e}.{key}.weight"] for key in keys]
        return Chunk(tuple(dataclasses.replace(p, transposed=turned) for p in whole), axis=1)

    if grouped:
        pieces = {"w1": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
    else:
        pieces = {w: (key,) for w, key in _EXPERTS.items()}
    ending = "" if grouped else ".weight"
    return {w: stacked(f"{prefix}{_ROUTER}ffn.{w}{ending}", (chunk(e, *keys) for e in range(count)))
            for w, keys in pieces.items()}


def _mtp(block: Mapping[str, Part], index: int, k: int, form: MindformersForm) -> list[Stored]:
    """What an MTP module has beside its block."""
    out = []
    for key, pattern in (_MTP if form.outer_mtp else _MTP_INFER).items():
        name = pattern.format(k=k) if form.outer_mtp else f"model.layers.{index}.{pattern}"
        parts = [block[key]]
        if key == "eh_proj.weight" and form.outer_mtp and form.hidden_first:
            width = block[key].shape[1] // 2
            parts = [dataclasses.replace(block[key], cols=cols) for cols in (slice(width, 2 * width), slice(0, width))]
        out.append(joined(name, parts, axis=len(parts[0].shape) - 1, dtype=_dtype(name, form)))
    return out


def _dtype(name: str, form: MindformersForm) -> str | None:
    """The file type that their scripts fix for a name. ``--infer`` keeps the source's, whose router bias is float32."""
    if form.infer and not form.via_train:
        return "F32" if name.endswith("e_score_correction_bias") else None
    return "F32" if any(piece in name for piece in ("norm", "router.dense", "topk_bias")) else None


# -- folders that are there --------------------------------------------------------------------------------------------
def detect(folder: str | Path) -> tuple[MindformersForm, dict[str, str]]:
    """(form, {tensor: file}) of an existing folder, from its tensors' names and, where names agree, shapes.

    The files are those of param_name_map.json, of its older namesake, or else every safetensors file in the folder;
    names outside the model (optimiser state) are left out. ``regroup`` puts a layout into these files. Raises
    FileNotFoundError, or ValueError when this is not such a folder, or its experts are turned otherwise than in v1.5.0.
    """
    folder = Path(folder)
    home = _home(folder)
    endings = {name.split(".", 3)[3] for name in home if name.startswith("model.layers.") and name.count(".") > 2}
    infer = "attention.kv2l.weight" in endings
    if not infer and "attention.kv2l_latent_kv.weight" not in endings:
        raise ValueError(f"{folder}: no tensor is called model.layers.*.attention.kv2l.weight or .kv2l_latent_kv.weight, so this "
                         f"is not a DeepSeek-V3 of MindSpore Transformers; found {listed(home)}")
    trained = _SPLIT[_BIAS] in endings or any(name.startswith("model.mtp_hidden_fusers.") for name in home)
    via_train = infer and (trained or home.get("lm_head.weight") == "general.safetensors")
    split = next((name for name in home if name.endswith("routed_experts.ffn.w1.weight")), None)
    if split:
        shape, width = _shape(folder, home, split), _shape(folder, home, "model.tok_embeddings.embedding_weight")[-1]
        if len(shape) != 3 or shape[1 if infer else 2] != width:
            wanted = f"[experts, {width}, ffn]" if infer else f"[experts, ffn, {width}]"
            raise ValueError(f"{folder / home[split]}: tensor {split!r} has shape {list(shape)}; expected {wanted} beside "
                             f"{'inference' if infer else 'training'} names, as release v1.5.0 stores it")
    return MindformersForm(use_grouped_gemm=infer or split is None, infer=infer, via_train=via_train), home


def regroup(files: Iterable[StoredFile], home: Mapping[str, str], where: str = NAME_MAP) -> tuple[StoredFile, ...]:
    """The tensors of a layout in the files that hold them. Raises ValueError naming what is missing or unexpected."""
    stored = {s.name: s for file in files for s in file.tensors}
    check_names(where, home, stored)
    return tuple(StoredFile(path, tuple(stored[name] for name, file in home.items() if file == path))
                 for path in dict.fromkeys(home.values()))


def _shape(folder: Path, home: Mapping[str, str], name: str) -> tuple[int, ...]:
    if name not in home:
        raise ValueError(f"{folder}: no file has the tensor {name!r}")
    return safetensors_io.read(safetensors_io.open_file(folder / home[name]), name).shape


def _home(folder: Path) -> dict[str, str]:
    index = next((folder / name for name in (NAME_MAP, _OLD_INDEX) if (folder / name).is_file()), None)
    if index:
        found = read_json(index)
        found = found.get("weight_map", found) if isinstance(found, dict) else None
        if not isinstance(found, dict) or not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
            raise ValueError(f"{index}: expected an object that gives every tensor the plain name of its file")
    else:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"{folder}: neither {NAME_MAP} nor a safetensors file is there; convert a .ckpt file by "
                                    f"mindspore.ckpt_to_safetensors first, merge rank folders by mindspore.unified_safetensors")
        found = {name: path.name for path in paths for name in safetensors_io.open_file(path).slots}
    return {name: file for name, file in found.items() if name.startswith(("model.", "lm_head."))}
