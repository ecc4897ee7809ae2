"""A stand-in for CANN's libraries: enough to load MindSpore's Ascend plugin, nothing that computes.

MindSpore's wheel compiles, shards and plans for Ascend on the host, but its plugin links against the libraries of CANN,
Huawei's driver stack. Where CANN is not installed, ``ensure`` writes one shared library that defines every symbol the plugin
misses, and a symbolic link to it for every library the plugin names. Every function returns 0 save a few C++ members whose
callers would otherwise read memory that nobody wrote. Good for ``MS_SIMULATION_LEVEL`` 0 and 1 (compile; plan memory), where
MindSpore launches no kernel; a program that does launch one fails or gets zeros. Pure Python: ELF in, ELF out, no compiler.
"""
from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MACHINES = {"x86_64": 62, "aarch64": 183}  # ELF e_machine
PLUGIN = ("libmindspore_ascend.so*", "libmindspore_ops_ascend.so*", "ascend/*.so", "ascend/ms_kernels_symmetric_memory/**/*.so")
# What MindSpore opens by name below the CANN root, beside what the plugin is linked with.
OPENED = ("libascendcl.so", "libopapi.so", "libacl_op_compiler.so", "libmsprofiler.so", "libacl_tdt_channel.so",
          "libacl_tdt_queue.so", "driver/libascend_hal.so")
# Functions that the plugin looks up by name at run time stand in it as strings.
LOOKED_UP = re.compile(rb"(?<=\0)(?:acl[A-Za-z]|Hccl|Hcom|(?:rt|drv|hal)[A-Z])\w+(?=\0)")
STATUS_FACTORY = "_ZN2ge13StatusFactory8InstanceEv"
OBJECT = 512  # bytes of zeros behind every data symbol: more than any of the plugin's tables of virtual functions
README = """This folder is a stand-in for CANN, written by dsv3.parallel.fake_cann for MindSpore {version} on {machine}.

It holds no code of CANN and computes nothing: {functions} functions that return 0, under the names that MindSpore's Ascend
plugin needs in order to load, so that MindSpore can compile a program and plan its memory for Ascend on a machine without
one (MS_SIMULATION_LEVEL=0 or 1). Never use it to run a program. It may be deleted at any time.
"""


# -- the real one, the cached one --------------------------------------------------------------------------------------
def real_cann() -> Path | None:
    """Root of an installed CANN: ``$ASCEND_HOME_PATH``, ``$ASCEND_TOOLKIT_HOME``, or the default place; None without one."""
    roots = [os.environ.get("ASCEND_HOME_PATH"), os.environ.get("ASCEND_TOOLKIT_HOME"), "/usr/local/Ascend/ascend-toolkit/latest",
             "/usr/local/Ascend/latest", "/usr/local/Ascend/cann"]
    return next((Path(r) for r in roots if r and Path(r, "lib64", "libascendcl.so").exists()), None)


def ensure() -> Path:
    """The stand-in's folder in the user's cache, written when missing; see ``environment`` for how to use it.

    Raises RuntimeError on other machines than x86-64 and aarch64 Linux and for a MindSpore without the Ascend plugin.
    """
    from ..kernels.native import cache_dir

    version, machine = importlib.metadata.version("mindspore"), platform.machine()
    key = hashlib.sha256(Path(__file__).read_bytes() + f"{version} {machine}".encode()).hexdigest()[:12]
    # MindSpore takes for the root of CANN what comes before the last "cann" of the library's path.
    target = cache_dir() / f"ascend-stand-in-{version}-{key}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".stand-in-"))
        try:
            generate(temporary)
            os.rename(temporary, target)  # atomic; a folder that is not empty is never replaced
        except OSError:
            if not target.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def environment(folder: Path) -> dict[str, str]:
    """The variables under which MindSpore finds the stand-in of ``folder``, to be set before its process starts."""
    return {"LD_LIBRARY_PATH": str(folder / "cann" / "lib64"), "PYTHONPATH": str(folder / "python")}


def generate(folder: Path) -> dict[str, int]:
    """Write the stand-in into ``folder``: ``cann/lib64`` and ``python``; how many libraries and functions it has."""
    machine = MACHINES.get(platform.machine())
    if machine is None or sys.platform != "linux":
        here, known = f"{sys.platform} {platform.machine()}", " or ".join(MACHINES)
        raise RuntimeError(f"no stand-in for CANN on {here}: expected linux on {known}")
    spec = importlib.util.find_spec("mindspore")
    if spec is None:
        raise RuntimeError("MindSpore is not installed")
    home = Path(spec.submodule_search_locations[0])
    files = sorted({p for pattern in PLUGIN for p in (home / "lib" / "plugin").glob(pattern)})
    plugin = [elf for elf in map(Elf, files) if elf.machine == machine]
    if not plugin:
        raise RuntimeError(f"{home / 'lib' / 'plugin'} has no Ascend plugin for {platform.machine()}: this MindSpore was built "
                           f"without Ascend, install the wheel from PyPI")
    libraries, functions, objects = wanted(plugin, [*(home / "lib").glob("*.so*"), *home.glob("*.so")])
    lib = folder / "cann" / "lib64"
    (lib / "driver").mkdir(parents=True)
    # The file itself must not be called after CANN: MindSpore looks for the last "cann" in its path.
    (lib / "libstandin.so").write_bytes(shared_object(machine, "libstandin.so", functions, objects))
    for name in sorted(libraries | set(OPENED)):
        (lib / name).symlink_to("../" * name.count("/") + "libstandin.so")
    (folder / "python" / "hccl").mkdir(parents=True)  # MindSpore asks CANN's Python package for its version
    (folder / "python" / "hccl" / "__init__.py").write_text("")
    (folder / "python" / "hccl" / "sys_version.py").write_text('__sys_version__ = "1.84"\n')
    version = importlib.metadata.version("mindspore")
    (folder / "README.txt").write_text(README.format(version=version, machine=platform.machine(), functions=len(functions)))
    return {"libraries": len(libraries), "functions": len(functions), "objects": len(objects)}


def wanted(plugin: list[Elf], wheel: list[Path]) -> tuple[set[str], list[str], list[str]]:
    """What the plugin misses: names of libraries, of functions, of data. ``wheel``: the other libraries beside it."""
    beside = {path.name for path in (*(elf.path for elf in plugin), *wheel)}
    system, missing = [ctypes.pythonapi], set()  # Python's own symbols come from the interpreter
    for name in sorted({name for elf in plugin for name in elf.needed} - beside):
        try:
            system.append(ctypes.CDLL(name))
        except OSError:
            missing.add(name)
    defined, undefined = set(), {}
    for elf in (*plugin, *(Elf(path) for path in wheel if path.is_file())):
        for name, here, weak, kind in elf.symbols():
            if here:
                defined.add(name)
            elif elf in plugin and not weak:
                undefined[name] = kind
    for elf in plugin:
        for match in LOOKED_UP.findall(elf.data):
            undefined.setdefault(match.decode(), 2)
            if match.startswith(b"aclnn"):  # every aclnn operator comes with a second function
                undefined.setdefault(match.decode() + "GetWorkspaceSize", 2)
    names = [n for n in sorted(undefined.keys() - defined) if not any(_has(library, n) for library in system)]
    objects = {n for n in names if n.startswith(("_ZTV", "_ZTI", "_ZTS")) or undefined[n] == 1}
    return missing, [n for n in names if n not in objects], sorted(objects)


def _has(library: ctypes.CDLL, name: str) -> bool:
    try:
        return bool(ctypes.c_void_p.in_dll(library, name)) or True
    except ValueError:
        return False


# -- ELF, read ---------------------------------------------------------------------------------------------------------
class Elf:
    """The dynamic part of an ELF64 shared library: path, machine, needed (names of libraries), symbols()."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.data[:5] != b"\x7fELF\x02":
            raise RuntimeError(f"{path} is not a 64-bit ELF file")
        self.machine = self._unpack("<H", 18)[0]
        (start,), (size, count) = self._unpack("<Q", 32), self._unpack("<HH", 54)
        segments = [self._unpack("<IIQQQQ", start + i * size) for i in range(count)]
        self._loads = [(address, offset, length) for kind, _, offset, address, _, length in segments if kind == 1]
        self._dynamic, needed = {}, []
        for kind, _, offset, _, _, length in segments:
            for at in range(offset, offset + length, 16) if kind == 2 else ():
                tag, value = self._unpack("<qQ", at)
                if tag == 0:
                    break
                if tag == 1:
                    needed.append(value)
                self._dynamic[tag] = value
        self.needed = [self._string(at) for at in needed]

    def symbols(self) -> Iterator[tuple[str, bool, bool, int]]:
        """(name, is it defined here, is it weak, ELF symbol type) of each symbol."""
        if 6 not in self._dynamic or not self._dynamic.keys() & {4, 0x6FFFFEF5}:
            return
        start = self._offset(self._dynamic[6])
        for name, info, _, section, _, _ in struct.iter_unpack("<IBBHQQ", self.data[start : start + 24 * self._count()]):
            if name:
                yield self._string(name), section != 0, info >> 4 == 2, info & 15

    def _count(self) -> int:
        if 4 in self._dynamic:  # the older hash table says how many symbols there are
            return self._unpack("<II", self._offset(self._dynamic[4]))[1]
        at = self._offset(self._dynamic[0x6FFFFEF5])
        buckets, first, bloom, _ = self._unpack("<IIII", at)
        chains = at + 16 + bloom * 8 + buckets * 4
        last = max(self._unpack(f"<{buckets}I", at + 16 + bloom * 8), default=0)
        if last < first:
            return first
        while not self._unpack("<I", chains + (last - first) * 4)[0] & 1:  # the low bit ends a chain
            last += 1
        return last + 1

    def _unpack(self, layout: str, at: int) -> tuple:
        return struct.unpack_from(layout, self.data, at)

    def _offset(self, address: int) -> int:
        return next((address - start + offset for start, offset, length in self._loads if start <= address < start + length), 0)

    def _string(self, index: int) -> str:
        start = self._offset(self._dynamic[5]) + index
        return self.data[start : self.data.find(b"\0", start)].decode()


# -- ELF, written ------------------------------------------------------------------------------------------------------
def shared_object(machine: int, soname: str, functions: list[str], objects: list[str]) -> bytes:
    """An ELF64 library that defines ``functions`` (see ``body``) and ``objects``, each OBJECT bytes of zeros."""
    page = 0x10000 if machine == MACHINES["aarch64"] else 0x1000
    names = [*functions, *objects]
    offsets, strings = {}, bytearray(b"\0")
    for name in (*names, soname):
        offsets[name] = len(strings)
        strings += name.encode() + b"\0"
    symbols_at = 64 + 4 * 56
    strings_at = symbols_at + 24 * (len(names) + 1)
    hash_at = _align(strings_at + len(strings), 8)
    table = _hash_table(names)
    text_at = _align(hash_at + len(table), 16)
    text, address = bytearray(), {}
    for name in (None, *functions):  # None: what all the plain functions share
        code = body(name, machine)
        if name is None or code is not None:
            text += bytes(_align(len(text), 16) - len(text))
            address[name] = text_at + len(text)
            text += code
        else:
            address[name] = address[None]
    dynamic_at = _align(text_at + len(text) + 16, page)
    factory, relocations_at = dynamic_at + 16 * 10, dynamic_at + 16 * 10 + 64
    if STATUS_FACTORY in address:
        text += bytes(_align(len(text), 16) - len(text))
        address[STATUS_FACTORY] = text_at + len(text)
        text += _address_of(factory, address[STATUS_FACTORY], machine)
    # An empty std::map: the header's left and right neighbours are the header itself, 8 bytes in.
    relative = 8 if machine == MACHINES["x86_64"] else 1027
    relocations = b"".join(struct.pack("<QQq", factory + at, relative, factory + 8) for at in (24, 32))
    file_end = relocations_at + len(relocations)
    objects_at = _align(file_end, 64)
    address |= {name: objects_at + OBJECT * i for i, name in enumerate(objects)}
    memory_end = objects_at + OBJECT * len(objects)
    symbols = bytes(24) + b"".join(struct.pack("<IBBHQQ", offsets[n], 0x12 if i < len(functions) else 0x11, 0, 1, address[n],
                                               8 if i < len(functions) else OBJECT) for i, n in enumerate(names))
    tags = ((14, offsets[soname]), (4, hash_at), (5, strings_at), (6, symbols_at), (10, len(strings)), (11, 24),
            (7, relocations_at), (8, len(relocations)), (9, 24), (0, 0))
    text_end = text_at + len(text)
    segments = ((1, 5, 0, text_end, text_end, page), (1, 6, dynamic_at, file_end - dynamic_at, memory_end - dynamic_at, page),
                (2, 6, dynamic_at, 16 * len(tags), 16 * len(tags), 8), (0x6474E551, 6, 0, 0, 0, 16))
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    program = b"".join(struct.pack("<IIQQQQQQ", kind, flags, at, at, at, *sizes) for kind, flags, at, *sizes in segments)
    out = bytearray(file_end)
    for at, data in ((0, header), (64, program), (symbols_at, symbols), (strings_at, strings), (hash_at, table), (text_at, text),
                     (dynamic_at, b"".join(struct.pack("<qQ", *tag) for tag in tags)), (relocations_at, relocations)):
        out[at : at + len(data)] = data
    return bytes(out)


def _align(n: int, step: int) -> int:
    return -(-n // step) * step


def _hash_table(names: list[str]) -> bytes:
    """The ELF hash table (System V ABI, "Hash Table") of symbols 1 .. n."""
    buckets, chains = [0] * max(1, len(names) // 2), [0] * (len(names) + 1)
    for i, name in enumerate(names, 1):
        h = 0
        for byte in name.encode():
            h = (h << 4) + byte
            high = h & 0xF0000000
            h = (h ^ high >> 24) & ~high
        chains[i], buckets[h % len(buckets)] = buckets[h % len(buckets)], i
    return struct.pack(f"<{2 + len(buckets) + len(chains)}I", len(buckets), len(chains), *buckets, *chains)


def _address_of(target: int, here: int, machine: int) -> bytes:
    """Code at address ``here`` of a function that returns the address ``target`` of the same library."""
    if machine == MACHINES["x86_64"]:
        return b"\x48\x8d\x05" + struct.pack("<i", target - (here + 7)) + b"\xc3"  # lea rax, [rip + d]; ret
    pages = (target >> 12) - (here >> 12)
    adrp, add = 0x90000000 | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5, 0x91000000 | (target & 0xFFF) << 10
    return struct.pack("<III", adrp, add, 0xD65F03C0)


# Machine code for x86-64 (result or object in rdi, value in rax) and aarch64 (result in x8, object and value in x0).
_CODE = {
    "zero": ("31c0 c3", "d2800000 d65f03c0"),  # return 0
    "clear 16": ("31c0 488907 48894708 4889f8 c3", "a9007c1f d65f03c0"),  # the object at hand: a constructor
    "clear 24": ("31c0 488907 48894708 48894710 4889f8 c3", "a9007c1f f900081f d65f03c0"),
    "give 16": ("31c0 488907 48894708 4889f8 c3", "a9007d1f d65f03c0"),  # an object returned by value
    "give 24": ("31c0 488907 48894708 48894710 4889f8 c3", "a9007d1f f900091f d65f03c0"),
    "give string": ("488d4710 488907 48c7470800000000 c6471000 4889f8 c3", "91004109 a9007d09 3900411f d65f03c0"),  # empty
    "empty text": ("488d0501000000 c3 00", "10000040 d65f03c0 00000000"),  # const char * ""
}
_GETTERS = {  # members of ge:: that return an object by value
    "give 16": ("GetShape", "GetOriginShape", "GetTensorDesc", "GetOutputDesc", "GetInputDesc"),  # one shared pointer
    "give 24": ("CreateOperator", "GetDims", "GetDirectNode", "GetInControlNodes", "GetOutControlNodes",
                "GetOutDataNodesAndPortIndexs", "GetInDataNodesAndPortIndexs"),  # ge::Operator, std::vector
    "give string": ("GetName", "GetOpType"),
    "empty text": ("GetString",),
}


def body(name: str | None, machine: int) -> bytes | None:
    """Machine code of a function: None for the plain ``return 0``, whose code is that of the name None.

    CANN's C++ classes (namespace ge) hold shared pointers; a constructor or a getter that left them unwritten would crash
    the caller when it copies the object.
    """
    kind = "zero" if name is None else None
    member = re.match(r"_ZNK?2ge(\d+)(.*)", name or "")
    if member:
        owner, rest = member[2][: int(member[1])], member[2][int(member[1]) :]
        method = re.match(r"(\d+)(.*)", rest)
        if re.match(r"C[12]E", rest):
            if owner not in ("InferShapeFuncRegister", "OperatorCreatorRegister", "Session"):
                kind = "clear 24" if owner == "Operator" else "clear 16"
        elif method:
            called, arguments = method[2][: int(method[1])], method[2][int(method[1]) :]
            kind = next((k for k, names in _GETTERS.items() if called in names), None)
            if kind == "give string" and arguments != "Ev":  # the others write into an argument
                kind = None
    if kind is None:
        return None
    x86, arm = _CODE[kind]
    return bytes.fromhex(x86) if machine == MACHINES["x86_64"] else b"".join(struct.pack("<I", int(w, 16)) for w in arm.split())
