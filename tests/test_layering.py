"""Who may import whom, who may say ``ms.jit``, how long a file may be: read from the sources, nothing is run.

Planted faults this file was seen to catch, one at a time: kernels importing the model; data importing
mindspore; ``ms.jit`` and an imported ``mutable`` elsewhere; ``import dsv3``; an import inside a function; a
file of 480 lines.
"""

import ast
from pathlib import Path

import pytest

import dsv3

ROOT = Path(dsv3.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py"))
LONGEST = 420

# room (a file or folder of dsv3) -> rooms it may import; a room may always import itself
FOUNDATION = {"config", "tree", "spec", "schedule", "transform", "kernels", "nn", "model", "optim", "counts", "parallel"}
MAY_IMPORT = {
    "config": set(),
    "tree": set(),
    "schedule": set(),
    "kernels": set(),
    "report": set(),
    "spec": {"tree"},
    "transform": {"tree"},
    "nn": {"config", "spec", "kernels", "parallel"},  # parallel.shard: communication by name
    "model": {"nn", "spec", "config", "kernels", "transform", "tree", "parallel"},
    "optim": {"kernels", "schedule", "spec", "transform", "tree"},
    "counts": {"config", "model", "spec", "tree"},
    "data": {"tree", "config"},
    "text": {"data"},
    "chat": {"data"},
    "train": FOUNDATION,
    "decode": FOUNDATION,
    "sampling": set(),
    "blocks": set(),
    "engine": FOUNDATION | {"blocks", "decode", "sampling"},
    "generation": FOUNDATION | {"data", "engine", "sampling"},
    "quant": {"config", "model", "spec", "tree"},
    "lora": FOUNDATION,
    "checkpoint": FOUNDATION,
    "parallel": FOUNDATION | {"sampling"},  # what rank 0 tells the others of a request
}
ANYTHING = {"cli", "bench", "serve", "__init__", "__main__"}
NO_MINDSPORE = {"config", "tree", "spec", "report", "data", "text", "chat"}


def room(path):
    """The room of a file."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """(module, line) of every import in a file, also inside functions: absolute dotted names, relative ones
    resolved.

    ``from . import x`` counts as an import of ``dsv3.x``, and a name of ``dsv3/__init__`` as one of ``dsv3``.
    """
    package = ("dsv3", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            for alias in node.names:
                inner = ROOT.joinpath(*module.split(".")[1:], alias.name)
                is_module = module.split(".")[0] == "dsv3" and (
                    inner.is_dir() or inner.with_suffix(".py").exists()
                )
                yield (f"{module}.{alias.name}" if is_module else module), node.lineno


def where(path, line):
    """For a message."""
    return f"{path.relative_to(ROOT.parent)}:{line}"


def test_every_room_has_a_rule():
    rooms = {room(p) for p in FILES}
    assert rooms <= set(MAY_IMPORT) | ANYTHING, "say in MAY_IMPORT what the new room may import"
    assert {"config", "model", "kernels", "nn", "data"} <= rooms and len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    own, wrong = room(path), []
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] == "dsv3" and own != "__init__":
            if len(parts) == 1:
                if own not in ANYTHING:
                    wrong.append(
                        f"{where(path, line)}: imports dsv3 itself; import the file that has the name"
                    )
            elif own not in ANYTHING and parts[1] != own and parts[1] not in MAY_IMPORT[own]:
                wrong.append(f"{where(path, line)}: {own} may not import {parts[1]}")
        if parts[0] in ("mindspore", "torch", "transformers", "megatron") and own in NO_MINDSPORE:
            wrong.append(f"{where(path, line)}: {own} may not import {parts[0]}")
        if parts[0] in ("torch", "transformers", "megatron", "tests") and own != "bench":
            wrong.append(f"{where(path, line)}: imports {parts[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_transform_compiles(path):
    """``ms.jit`` and ``mutable`` by any spelling: an attribute of any name that was bound to mindspore, or
    imported.
    """
    if path in (ROOT / "transform.py", ROOT / "parallel" / "bind.py"):  # bind: a mesh's Parameters are closed over
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        a.asname or a.name.split(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, ast.Import)
        for a in n.names
        if a.name.split(".")[0] == "mindspore"
    }
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in (
            "jit",
            "mutable",
            "Parameter",
            "value_and_grad",
            "grad",
        ):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in names:
                wrong.append(f"{where(path, node.lineno)}: {ast.unparse(node)}")
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "mindspore":
            wrong += [
                f"{where(path, node.lineno)}: {a.name}"
                for a in node.names
                if a.name in ("jit", "mutable", "Parameter", "value_and_grad", "grad")
            ]
    assert not wrong, f"only transform.py does this: {wrong}"


def test_transform_says_what_it_should():
    """Otherwise the test above would hold of an empty rule."""
    source = (ROOT / "transform.py").read_text()
    assert "ms.jit(" in source and "ms.value_and_grad(" in source


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST, "a file this long is two ideas"
    if path.name != "__main__.py":
        assert ast.get_docstring(ast.parse(text)), "say what the file is for"
