"""Folders that appear whole or not at all: written beside, synced, renamed; with a manifest of checksums."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .safetensors_io import write_bytes

MANIFEST = "manifest.json"
BLOCK = 1 << 22  # bytes read at once for a checksum
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100


def write_text(path: Path, text: str) -> None:
    """Write a small file. It is synced with its folder."""
    with open(path, "wb") as f:
        write_bytes(f, text.encode("utf-8"))


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises FileNotFoundError, or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


# -- the manifest ----------------------------------------------------------------------------------------
def checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _manifest_text(files: dict) -> str:
    """The manifest as text; it carries a checksum of itself."""
    body = json.dumps(files, indent=1)
    return json.dumps({"crc32": zlib.crc32(body.encode()), "files": files}, indent=1)


def write_manifest(folder: Path, names: Iterable[str] | None = None, part: str | None = None) -> None:
    """List size and checksum of every file of a folder, hidden ones and manifests aside, or of ``names``.

    part: of a folder that several processes fill, the name of this one's own list; ``MANIFEST`` comes last.
    """
    shown = [folder / name for name in names] if names is not None else \
        [p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and not is_manifest(p.name)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        files = {p.name: {"size": p.stat().st_size, "crc32": crc} for p, crc in zip(shown, pool.map(checksum, shown))}
    write_text(folder / (f"manifest-{part}.json" if part else MANIFEST), _manifest_text(files))


def is_manifest(name: str) -> bool:
    """Whether a file is the manifest of a folder or one of its parts."""
    return re.fullmatch(r"manifest(-.+)?\.json", name) is not None


def manifest(folder: Path) -> dict[str, dict[str, int]]:
    """{file: {"size", "crc32"}} as written last into the folder, its parts included. Raises ValueError if one was altered."""
    out: dict[str, dict[str, int]] = {}
    for path in (folder / MANIFEST, *sorted(folder.glob("manifest-*.json"))):
        found = read_json(path)
        files = found.get("files") if isinstance(found, dict) else None
        if not isinstance(files, dict) or path.read_text(encoding="utf-8") != _manifest_text(files):
            raise ValueError(f"{path}: damaged or edited: it does not match its own checksum")
        out |= files
    return out


def verify(folder: Path, names: Iterable[str] | None = None, checksums: bool = True) -> None:
    """Compare files (default: all) with the manifest. Raises ValueError naming the first that differs."""
    listed = manifest(folder)
    for name in listed if names is None else names:
        path = folder / name
        if name not in listed and not path.exists() and any(folder.glob("manifest-*.json")):
            raise FileNotFoundError(f"{path}: missing; without a shared file system it lies on the node whose ranks wrote it: "
                                    f"copy the nodes' {folder.name} folders together")
        if name not in listed:
            raise ValueError(f"{path}: not a file of this checkpoint: {MANIFEST} does not list it")
        want = listed[name]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {MANIFEST} lists it with {want['size']} bytes")
        size = path.stat().st_size
        if size != want["size"]:
            raise ValueError(f"{path}: expected {want['size']} bytes, found {size}")
        if checksums and (crc := checksum(path)) != want["crc32"]:
            raise ValueError(
                f"{path}: expected CRC-32 {want['crc32']:08x}, found {crc:08x}: the file is damaged"
            )


# -- appearing whole -------------------------------------------------------------------------------------
def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one atomic step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def is_temporary(name: str) -> bool:
    """Names that this module uses for folders under construction or being deleted."""
    return name.startswith(".tmp-")


def _temporary(target: Path) -> Path:
    return target.parent / f".tmp-{target.name}-{secrets.token_hex(4)}"


def aside(target: Path) -> Path:
    """Where the old folder waits, whole, while a new one takes its name where names cannot be swapped."""
    return target.parent / f".old-{target.name}"


def replace_folder(
    target: str | Path, write: Callable[[Path], None], *, is_ours: Callable[[Path], bool], with_manifest: bool
) -> Path:
    """Fill a temporary sibling by ``write(folder)``, sync it, rename it to ``target``; returns the full path.

    What stood there stays whole until the new folder does, then goes; files in it that ``is_ours(file)``
    disowns are carried over. If ``write`` raises, nothing has changed. Leftovers of killed writers of the
    same target are removed. Raises ValueError when ``target`` is a file or holds a folder.
    """
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; expected the name of a folder to write")
    others = [p for p in sorted(target.iterdir()) if p.is_dir() or not is_ours(p)] if target.exists() else []
    for p in others:
        if p.is_dir():
            raise ValueError(
                f"{target} holds the folder {p.name!r}, so it is not a checkpoint to replace; choose another "
                f"path or move it away"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    for p in target.parent.iterdir():
        if re.fullmatch(rf"\.tmp-{re.escape(target.name)}-[0-9a-f]{{8}}", p.name):
            shutil.rmtree(p)
    if target.exists() and aside(target).exists():
        shutil.rmtree(aside(target))
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        write(temporary)
        if with_manifest:
            write_manifest(temporary)
        for p in others:
            if not (temporary / p.name).exists():
                shutil.copy2(p, temporary / p.name)
        settle(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in (temporary, aside(target)):
        if old.exists():
            shutil.rmtree(old)
    return target


def settle(temporary: Path, target: Path) -> None:
    """Give a full folder beside ``target`` its name, on the disk first. What had the name before stays whole until then, and is
    then found under the name ``temporary``, or ``aside(target)`` where names cannot be swapped."""
    for p in temporary.iterdir():
        sync(p)
    sync(temporary)
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        os.rename(target, aside(target))
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(aside(target), target)
            raise
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that its name vanishes at once: a kill in between leaves no half of it there."""
    temporary = _temporary(folder)
    os.rename(folder, temporary)
    shutil.rmtree(temporary)
