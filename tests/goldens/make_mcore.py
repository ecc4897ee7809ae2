"""Makes tests/goldens/mcore with torch itself: files by torch.save and, in values.npz, what their tensors hold.

Needs torch and numpy. From an empty directory:

    python <repository>/tests/goldens/make_mcore.py

types.pt      every type that torch can store, 0-dim and empty tensors, OrderedDict, torch.Size, text, numbers
views.pt      tensors that share a storage, start inside it, are transposed, strided or Parameters
converted.pt  a state dict as Megatron's converters save it: protocol 4, collections.defaultdict
trained.pt    what training adds: argparse.Namespace, dtypes and devices, an enumeration, a generator state, NumPy arrays
big.pt        saved as on a big-endian machine
legacy.pt     the format before torch 1.6
script.pt     an object with code in it

Names in values.npz are FILE|KEYS.JOINED.BY.DOTS|FILE TYPE; bfloat16 is kept as uint16 bits and float8 as uint8.
"""

import argparse
import enum
import os
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent / "mcore"
NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Code:
    """Pickles as a call of ``os.system``."""

    def __reduce__(self):
        return os.system, ("true",)


def enumeration():
    """An enumeration in a module of megatron's name."""
    module = types.ModuleType("megatron.core.transformer.enums")
    for name in ("megatron", "megatron.core", "megatron.core.transformer"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module.__name__] = module
    module.AttnBackend = enum.Enum("AttnBackend", {"flash": 1, "auto": 5}, module=module.__name__, qualname="AttnBackend")
    return module.AttnBackend


def random(dtype, *shape, seed=0):
    """Random bits of a type, without NaN."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 50
    return (x > 0) if dtype == torch.bool else x.abs().to(dtype) if not dtype.is_signed else x.to(dtype)


def values(tensor):
    """The tensor's bits as NumPy array."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.detach().contiguous().view(torch.uint16)
    elif tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensor = tensor.detach().contiguous().view(torch.uint8)
    return tensor.detach().numpy().copy()


def collect(out, where, value):
    """All tensors of a nested structure."""
    if isinstance(value, torch.Tensor):
        out[f"{where}|{NAMES[value.dtype]}"] = values(value)
    elif isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            collect(out, f"{where}.{key}" if not where.endswith("|") else f"{where}{key}", inner)


def main():
    """Write every file."""
    HERE.mkdir(exist_ok=True)
    out = {}

    def save(name, structure, **kwargs):
        torch.save(structure, HERE / name, **kwargs)
        collect(out, f"{name}|", structure)

    base = random(torch.float32, 6, 5, seed=1)
    save("types.pt", OrderedDict(
        {name: random(dtype, 3, 5, seed=i) for i, (dtype, name) in enumerate(NAMES.items())},
        scalar=torch.tensor(2.5), empty=torch.empty(0, 7, dtype=torch.bfloat16), size=torch.Size([2, 3]), text="naïve",
        numbers=[1, -1, 300, 70000, 1 << 40, -(1 << 70), 0.5, True, False, None, ()], nested={"list": [torch.arange(4)]},
    ))  # fmt: skip
    save("views.pt", {
        "whole": base, "again": base, "row": base[2], "column": base[:, 1], "block": base[1:4, 2:5], "turned": base.t(),
        "steps": base[::2, ::3], "parameter": torch.nn.Parameter(base[3:]), "four": base.view(3, 2, 1, 5).permute(2, 3, 0, 1),
    })  # fmt: skip
    model = defaultdict(dict)
    model["decoder.layers.0.mlp.linear_fc1.weight"] = random(torch.bfloat16, 4, 3, seed=5)
    model["decoder.layers.0.mlp.router.expert_bias"] = random(torch.float32, 4, seed=6)
    converted = {"model": model, "checkpoint_version": 3.0, "iteration": 1}
    save("converted.pt", converted, pickle_protocol=4, _use_new_zipfile_serialization=True)
    backend = enumeration()
    args = argparse.Namespace(
        tensor_model_parallel_size=2, moe_tp_extend_ep=True, params_dtype=torch.bfloat16, attention_backend=backend.auto,
        device=torch.device("cpu"), data_path=["a", "b"], noop_layers={47, 62},
    )  # fmt: skip
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with attributes
    save("trained.pt", {
        "args": args, "checkpoint_version": 3.0, "iteration": 7, "model": state,
        "optimizer": {"param_groups": [{"lr": 1e-4, "params": [0, 1]}], "state": {0: {"exp_avg": torch.ones(2, 3)}},
                      ("a", "tuple"): 1},
        "rng_state": [{"random_rng_state": (3, (1, 2, 3), None), "np_rng_state": np.random.RandomState(0).get_state()[:2],
                       "torch_rng_state": torch.arange(5, dtype=torch.uint8), "scalar": np.float64(1.5)}],
    })  # fmt: skip
    save("big.pt", {"w": base.to(torch.bfloat16), "n": torch.arange(3)})
    swap(HERE / "big.pt")
    torch.save({"w": base}, HERE / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"w": base, "code": Code()}, HERE / "script.pt")
    np.savez(HERE / "values.npz", **out)


def swap(path):
    """Turn a little-endian file into the big-endian one that holds the same: torch cannot save one here, but reads it."""
    tensors = torch.load(path)
    with zipfile.ZipFile(path) as archive:
        text = archive.read("big/data.pkl")
    writer = torch._C.PyTorchFileWriter(str(path))
    swapped = {f"data/{i}": values(x).byteswap().tobytes() for i, x in enumerate(tensors.values())}
    for name, record in ({"data.pkl": text, "byteorder": b"big"} | swapped).items():
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    for name, loaded in torch.load(path).items():
        assert torch.equal(loaded, tensors[name]), name


if __name__ == "__main__":
    main()
