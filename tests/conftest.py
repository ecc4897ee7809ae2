"""What every test file shares: the environment, where the goldens are, params under published names."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault(
    "MS_DEV_JIT_PIPELINE", "0"
)  # before any import of mindspore: its caller would spin otherwise
os.environ.setdefault("GLOG_v", "3")

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("dsv3") is None:  # not installed: test the sources, in child processes too
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

import numpy as np  # noqa: E402
import pytest  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens"
ALPHA, MTP_WEIGHT = 1e-2, 0.3  # of the golden training runs


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory):
    """Work in a scratch folder: MindSpore drops files into the working directory."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("scratch"))
    yield
    os.chdir(before)


def golden(name):
    """(params, cfg, arrays) of a golden folder, as ``hf/base`` or ``train/run``; the balance loss as it was
    made.
    """
    import dsv3

    params, cfg = dsv3.from_hf(GOLDENS / name)
    alpha = ALPHA if name.startswith("train/") else 0.0
    return params, cfg.replace(aux_loss_alpha=alpha), np.load(GOLDENS / name / "golden.npz")


def golden_final(folder):
    """(params, cfg) after the last step of the golden training run; ``folder`` is an empty one to work in."""
    import dsv3

    for source, name in (("config.json", "config.json"), ("final.safetensors", "model.safetensors")):
        shutil.copy(GOLDENS / "train" / "run" / source, folder / name)
    params, cfg = dsv3.from_hf(folder)
    return params, cfg.replace(aux_loss_alpha=ALPHA)


def by_published_name(tree, cfg):
    """Published name -> float32 array of a tree shaped like params (weights, gradients), MTP's copies left
    out.
    """
    from dsv3 import tree as trees
    from dsv3.checkpoint.names import published, to_published

    arrays = dict(trees.paths(trees.to_numpy(tree)))
    return {t.name: to_published(arrays[t.path], t) for t in published(cfg) if not t.copy}


@pytest.fixture(scope="session")
def run():
    """The golden training run: its start, its arrays, and one compiled value_and_grad for all who need
    gradients.
    """
    import dsv3

    params, cfg, arrays = golden("train/run")

    def loss(params, batch):
        return dsv3.model.loss_fn(params, batch, cfg=cfg)

    return SimpleNamespace(
        params=params, cfg=cfg, arrays=arrays, value_and_grad=dsv3.value_and_grad(loss, has_aux=True)
    )
