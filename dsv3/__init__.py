"""DeepSeek-V3 as pure functions on a params pytree, compiled by MindSpore.

Names are imported when they are first used, so that the data tools and ``--help`` never load MindSpore.
"""
import importlib as _importlib
import os as _os

__version__ = "0.1.0"

if not _os.path.exists("/dev/davinci_manager"):  # no Ascend here: the CPU will compute
    # The caller of a compiled graph would spin while the kernels starve: a factor of two to ten on few cores.
    _os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")
_os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only; export GLOG_v=2 or 1 to see more

_HOME = {
    "Config": "config", "V3": "config", "V3_1B": "config", "V3_4LAYER": "config", "V3_16EXPERTS": "config",
    "SMALL": "config", "TINY": "config",
    "param_specs": "model", "init": "model", "forward": "model", "loss_fn": "model",
    "jit": "transform", "value_and_grad": "transform",
    "adamw": "optim", "make_train_step": "train", "make_eval_step": "train",
    "generate": "generation", "Engine": "engine", "Sampling": "sampling", "quantize": "quant",
    "save": "checkpoint.own", "load": "checkpoint.own", "from_hf": "checkpoint.hf", "to_hf": "checkpoint.hf",
    "Schedule": "schedule", "Piece": "schedule", "constant": "schedule", "cosine": "schedule",
}
_MODULES = ("tree", "spec", "schedule", "data", "nn", "kernels", "counts", "config", "model", "transform", "optim", "train",
            "checkpoint", "parallel", "quant")
__all__ = [*_HOME, *_MODULES]


def __getattr__(name):
    if name in _HOME:
        value = getattr(_importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name in _MODULES:
        return _importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'dsv3' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
