"""``dsv3 convert`` on damaged input, on targets that are taken, and dry; and the readers on random damage.

Planted faults this file was seen to catch, one at a time: NaN scales let through; a config.json that is a number; a tensor
beside param_name_map.json; a target inside the source; a dry run that writes, or whose sizes are one byte a tensor off; the
tokenizer left behind.
"""
import json
import os
import pickle
import random
import shutil
import zipfile

import numpy as np
import pytest
from test_convert import SMALL, files, stored, weights, write_hf
from test_convert_fp8 import fp8_weights

from dsv3.checkpoint import folder as folders
from dsv3.checkpoint import formats, hf, mcore, safetensors_io
from dsv3.checkpoint.names import SCALE, published
from dsv3.cli.main import main


def contents(folder):
    """{relative path: bytes} of every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in files(folder)}


# -- damaged input -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small folder of every layout, to be copied before it is damaged."""
    home = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(4)
    finite = {n: (k, a if k == "F32" else a & 0xBFFF) for n, (k, a) in weights(SMALL, "BF16", rng).items()}
    out = {"hf": write_hf(home / "hf", SMALL, finite, most=6000)}
    out["hf-fp8"] = write_hf(home / "hf-fp8", SMALL, fp8_weights(SMALL, "F32", rng), config=hf.config_json(SMALL, hf.FP8_DTYPE))
    for form in ("own", "mcore", "mindformers"):
        out[form] = home / form
        assert main(["convert", str(out["hf"]), str(home / form), "--to", form, "--max-shard-size", "6KB", "--quiet"]) == 0
    return out


def truncated(folder):
    path = sorted([*folder.rglob("*.pt"), *folder.glob("*.safetensors")])[-1]
    os.truncate(path, path.stat().st_size - 3)
    return path.name


def flipped(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[8] ^= 1  # the brace that the header starts with
    path.write_bytes(data)
    return path.name


def rewritten(change):
    """Damage that changes the tensors {name: (file type, array)} of the file that holds the name which it returns."""

    def damage(folder):
        for path in sorted(folder.glob("*.safetensors")):
            file = safetensors_io.open_file(path)
            tensors = {n: (s.dtype, np.array(safetensors_io.read(file, n))) for n, s in file.slots.items()}
            if word := change(tensors):
                path.unlink()
                safetensors_io.write_file(path, tensors, file.metadata)
                return word
        raise AssertionError("nothing to damage")

    return damage


NORM = ("model.layers.1.input_layernorm.weight", "layers.1.attn_norm", "model.layers.1.attention_norm.weight")


@rewritten
def wrong_shape(tensors):
    for name in NORM:
        if name in tensors:
            tensors[name] = tensors[name][0], tensors[name][1][:-1]
            return name


@rewritten
def missing(tensors):
    return next((name for name in NORM if tensors.pop(name, None)), None)


@rewritten
def unexpected(tensors):
    tensors["model.layers.0.extra.weight"] = "F32", np.zeros(2, np.float32)
    return "model.layers.0.extra.weight"


@rewritten
def nan_scale(tensors):
    name = f"model.layers.1.mlp.experts.2.up_proj.weight{SCALE}"
    tensors[name][1][0, 0] = np.nan
    return name


def reindexed(change):
    """Damage to the index."""

    def damage(folder):
        path = next(folder.glob("*index.json"), folder / "param_name_map.json")
        index = json.loads(path.read_text())
        places = index.get("weight_map", index)
        places[list(places)[3]] = change
        path.write_text(json.dumps(index))
        return path.name if "/" in change else change

    return damage


def without_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def odd_config(folder):
    (folder / "config.json").write_text("[" * 100_000)
    return "config.json"


def number_for_config(folder):
    (folder / "config.json").write_text("5")
    return "config.json"


def hostile(folder):
    """A pickle that would run a command."""
    path = next(folder.rglob("*.pt"))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {folder}/ran",)

    records["archive/data.pkl"] = pickle.dumps({"model": Command()}, 2)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path.name


DAMAGES = [
    *((form, truncated) for form in ("hf", "own", "mindformers", "mcore")),
    *((form, damage) for form in ("hf", "own", "mindformers") for damage in (flipped, wrong_shape, missing, unexpected)),
    *((form, reindexed(name)) for form in ("hf", "own", "mindformers") for name in ("no.safetensors", "../other.safetensors")),
    *((form, damage) for form in ("hf", "own", "mindformers", "mcore")
      for damage in (without_config, odd_config, number_for_config)),
    ("hf-fp8", nan_scale), ("mcore", hostile),
]


@pytest.mark.parametrize("form, damage", DAMAGES)
def test_damaged_input_is_refused_in_one_line(tmp_path, capsys, sources, form, damage):
    folder = shutil.copytree(sources[form], tmp_path / form)
    word = damage(folder)
    if form == "own" and damage is not truncated:  # or else its sizes say it first
        folders.write_manifest(folder)
    before = contents(folder)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "bf16", "--quiet"]) == 1
    out, line = capsys.readouterr()
    assert line.startswith("dsv3 convert: ") and line.count("\n") == 1 and len(line) < 1500 and not out
    assert word in line and (folder.name in line or ".safetensors" in line), line
    assert not (tmp_path / "out").exists() and contents(folder) == before


def test_targets_that_are_taken_or_inside_the_source(tmp_path, capsys, sources):
    folder = shutil.copytree(sources["hf"], tmp_path / "hf")
    (tmp_path / "file").write_text("x")
    os.symlink(folder, tmp_path / "link")
    before = contents(tmp_path)
    inside = "lies in the source"
    for out, words in ((folder, inside), (folder / "out", inside), (folder / "a/b", inside), (tmp_path / "link/out", inside),
                       (tmp_path, "is not empty"), (tmp_path / "file", "file exists"), (tmp_path / "file/o", "Not a directory")):
        assert main(["convert", str(folder), str(out), "--to", "own", "--quiet"]) == 1, out
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and words in line and str(out.name) in line, line
        assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 3
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(folder), str(tmp_path / "empty"), "--to", "own", "--quiet", "--verify"]) == 0


def test_a_dry_run_writes_nothing_and_says_what_will_be(tmp_path, capsys, sources):
    folder = shutil.copytree(sources["hf"], tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text(f'{{"{name}": 1}}')
    before = contents(tmp_path)
    for form in ("bf16", "fp32", "hf-fp8", "own", "mcore", "mindformers"):
        argv = ["convert", str(folder), str(tmp_path / form), "--to", form, "--max-shard-size", "9KB", "--quiet"]
        assert main([*argv, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 1
        assert main(argv) == 0
        capsys.readouterr()
        out = tmp_path / form
        sizes = {}
        for line in said.splitlines()[2:]:
            name, *numbers = line.replace(",", "").split()
            assert (out / name).stat().st_size >= int(numbers[-2]) > 0
            sizes[name] = int(numbers[-2])
        weighty = {p for p in files(out) if p.suffix in (".safetensors", ".pt")}
        assert {str(p.relative_to(out)) for p in weighty} | {"config.json"} <= set(sizes)
        for path in weighty:
            name = str(path.relative_to(out))
            if path.suffix == ".pt":
                found = sum(t.nbytes for t in mcore.tensors(formats.torch_file.open_file(path).structure).values())
            else:
                found = sum(s.nbytes for s in safetensors_io.open_file(path).slots.values())
            assert found == sizes[name], (form, name)
        for name in set(sizes) - {str(p.relative_to(out)) for p in weighty}:
            assert (out / name).stat().st_size == sizes[name]
        assert f"{sum(sizes[str(p.relative_to(out))] for p in weighty):,} bytes" in said.splitlines()[1]
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()
        shutil.rmtree(out)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "fp32", "--dtype", "bfloat16"]) == 1
    assert main(["convert", str(folder), str(tmp_path / "bf16"), "--to", "bf16", "--quiet"]) == 0
    assert stored(tmp_path / "bf16") == stored(sources["hf"])


# -- fuzz --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["hf", "hf-fp8", "own", "mindformers"])
def test_damage_raises_nothing_but_what_is_announced(tmp_path, sources, form):
    seed = random.randrange(1 << 30)
    folder, rng = shutil.copytree(sources[form], tmp_path / form), random.Random(seed)
    whole = {p: p.read_bytes() for p in files(folder)}
    read = refused = 0
    while read + refused < 300:
        path = rng.choice(sorted(whole))
        data = bytearray(whole[path])
        end = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
        kind, at = rng.randrange(5), rng.randrange(8) if rng.randrange(4) == 0 else rng.randrange(end)
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 30)]
        else:
            data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            source = formats.open_checkpoint(folder)
            for t in published(source.cfg):
                kind = "F32" if source.is_fp8(t.name) else source.kind(t.name)
                formats_read(source, t, kind)
            read += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(error), (seed, path)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{seed=} {path.name}: {type(error).__name__}: {error}") from error
        path.write_bytes(whole[path])
    print(f"{form}: {refused} refused, {read} read")
    assert refused > 100


def formats_read(source, t, kind):
    """All values of one published tensor, taken out of the file."""
    from dsv3.checkpoint.layout import Part
    from dsv3.checkpoint.source import read

    np.array(read(source, Part(t.name, t.shape), kind))
