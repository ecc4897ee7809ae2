"""C++ kernels for the CPU: compiled once per machine, loaded as ``ops.Custom`` inside compiled graphs.

A kernel is a plain C function in a ``.cc`` file of this folder with MindSpore's ahead-of-time signature
``int f(int n, void** data, int* ndims, int64_t** shapes, const char** dtypes, void* stream, void* extra)``.
``library(stem)`` compiles ``stem.cc`` with the system's C++ compiler into the user's cache, keyed by source, compiler
flags and CPU, so that a second process only loads it. Where there is no compiler, or with ``DSV3_KERNELS=reference``,
``enabled()`` is False and every kernel falls back to its composed reference.
"""
from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-shared", "-fPIC")
LIBS = ("-ldl", "-lpthread")


def cache_dir() -> Path:
    """The folder of compiled kernels: ``$DSV3_CACHE``, else ``$XDG_CACHE_HOME/dsv3``, else ``~/.cache/dsv3``."""
    if "DSV3_CACHE" in os.environ:
        return Path(os.environ["DSV3_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3"


def compiler() -> str | None:
    """Path of the C++ compiler (``$CXX``, ``c++``, ``g++``, ``clang++``), or None."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    return None


@functools.cache
def why_not_compiled() -> str | None:
    """None when C++ for the host can be compiled and is wanted, else the reason why not."""
    choice = os.environ.get("DSV3_KERNELS", "auto")
    if choice not in ("auto", "native", "reference"):
        raise ValueError(f"DSV3_KERNELS={choice!r}: expected 'auto', 'native' or 'reference'")
    if choice == "reference":
        return "DSV3_KERNELS=reference"
    if compiler() is None:
        if choice == "native":
            raise RuntimeError("DSV3_KERNELS=native needs a C++ compiler: install g++ or clang++, or set CXX")
        return "no C++ compiler (install g++ or clang++ for the fast kernels)"
    return None


@functools.cache
def why_reference() -> str | None:
    """None when the native kernels are used in graphs, else the reason why the composed references are."""
    if ms.get_context("device_target") != "CPU":
        return f"device is {ms.get_context('device_target')}"
    return why_not_compiled()


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


@functools.cache
def library(stem: str) -> str:
    """Path of the shared library compiled from ``stem.cc``; compiles it when the cache has none.

    Raises RuntimeError with the compiler's own words when the compilation fails.
    """
    source, headers = HERE / f"{stem}.cc", sorted(HERE.glob("*.h"))
    parts = [p.read_bytes() for p in (source, *headers)]
    key = hashlib.sha256(b"".join(parts) + repr((FLAGS, compiler(), _cpu_flags())).encode()).hexdigest()[:16]
    target = cache_dir() / "kernels" / f"{stem}-{key}.so"
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(fd)
    command = [compiler(), *FLAGS, str(source), "-o", temporary, *LIBS]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        os.unlink(temporary)
        raise RuntimeError(f"{' '.join(command)} failed (DSV3_KERNELS=reference avoids it):\n{result.stderr[-4000:]}")
    os.replace(temporary, target)  # atomic: two processes may compile at once
    return str(target)


@constexpr
def enabled() -> bool:
    """True when the native CPU kernels are in use; evaluated at compile time, so that a branch on it costs nothing."""
    return why_reference() is None


@constexpr
def on_ascend() -> bool:
    """True when graphs are compiled for Ascend, whose fused operators MindSpore has."""
    return ms.get_context("device_target") == "Ascend"


def native_op(stem: str, function: str, infer_shape, infer_dtype):
    """A fresh ``ops.Custom`` for ``function`` of ``stem.cc``; call it at compile time, from a ``constexpr``."""
    return ops.Custom(f"{library(stem)}:{function}", infer_shape, infer_dtype, func_type="aot")


@constexpr
def iota(n: int) -> Tensor:
    """0 .. n-1, int32: a constant of the graph, where ops.arange adds 0.7 s to the compilation of each."""
    return Tensor(np.arange(n, dtype=np.int32))
