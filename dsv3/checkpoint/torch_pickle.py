"""The pickle inside torch's files, read and written without torch and without running anything that it names.

``load`` is a small machine for the opcodes of protocols 2 to 5 (CPython's ``Lib/pickletools.py``) that knows the few globals
of a checkpoint by name; ``dump`` writes protocol 2, which is torch's default and what ``torch.load(weights_only=True)`` reads.
"""

from __future__ import annotations

import argparse
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

from .safetensors_io import DTYPES

_STORAGES = {
    "Float": "F32", "BFloat16": "BF16", "Half": "F16", "Double": "F64", "Long": "I64", "Int": "I32", "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL", "Untyped": None,
}  # fmt: skip
_DTYPES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items() if dtype}
_NAME_OF = {dtype: name for name, dtype in _DTYPES.items()}
_STORAGE_TYPES = {
    f"{module}.{name}Storage": dtype for module in ("torch", "torch.cuda", "torch.storage") for name, dtype in _STORAGES.items()
}
# Globals that are understood, and what holds nothing that we read and becomes an inert placeholder: settings of a training
# run, states of random generators, enumerations (which Python 3.11 pickles through getattr).
_UNDERSTOOD = {
    "collections.OrderedDict", "collections.defaultdict", "argparse.Namespace", "torch.Size",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2",
    *_STORAGE_TYPES, *(f"torch.{name}" for name in _DTYPES),
}  # fmt: skip
_BUILTINS = "dict list set frozenset slice range bytes bytearray complex getattr".split()
_INERT = {
    "torch.device", "torch.Tensor", "torch.Generator", "torch.nn.parameter.Parameter", "_io.BytesIO", "_codecs.encode",
    "pathlib.PosixPath", "datetime.timedelta", "numpy.ndarray", "numpy.dtype",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS),  # protocol 2 has Python 2's name
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}  # fmt: skip
_INERT_PACKAGES = ("megatron", "mindspeed", "mindspeed_llm", "transformer_engine")


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a file: file type ("BF16"), shape, stride in elements and the byte of the file where its first element is.

    For a tensor that is to be written only type and shape are given.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return DTYPES[self.dtype].itemsize * prod(self.shape)


@dataclass(frozen=True, eq=False)
class Opaque:
    """Something of a pickle that is neither a tensor nor plain data, by the name of its type. Nothing else is known of it."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage as the pickle describes it: its record, its type, and its length."""

    key: str
    dtype: str | None
    numel: int  # bytes where dtype is None


@dataclass(frozen=True, eq=False)
class Unplaced:
    """A tensor as the pickle describes it, not checked yet."""

    storage: Any
    start: Any
    shape: Any
    stride: Any
    dtype: str | None


# -- reading ---------------------------------------------------------------------------------------------
_ARGUMENT = {  # opcode -> format of its argument; for numbers of any length, texts and bytes that of the length in front
    "J": "<i", "K": "<B", "M": "<H", "G": ">d", "q": "<B", "r": "<I", "h": "<B", "j": "<I", "\x80": "<B", "\x95": "<Q",
    "\x8a": "<B", "\x8b": "<i", "\x8c": "<B", "X": "<I", "\x8d": "<Q", "C": "<B", "B": "<I", "\x8e": "<Q", "\x96": "<Q",
}  # fmt: skip
_CONSTANTS = {"N": None, "\x88": True, "\x89": False, ")": ()}


def load(text: bytes) -> Any:
    """The pickled object, with ``Unplaced`` for tensors and ``Opaque`` for what is not data. Raises ValueError."""
    try:
        return _load(text)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"damaged: {type(error).__name__}: {error}"[:200]) from None


def _load(text: bytes) -> Any:
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    at = 0
    while at < len(text):
        op, number = chr(text[at]), 0
        at += 1
        if op in _ARGUMENT:
            (number,) = struct.unpack_from(_ARGUMENT[op], text, at)
            at += struct.calcsize(_ARGUMENT[op])
        if op in "JKMG":
            stack.append(number)
        elif op in "\x8a\x8b\x8cX\x8dCB\x8e\x96":
            if not 0 <= number <= len(text) - at:
                raise ValueError(f"damaged: it ends within a text of {number} bytes")
            raw = text[at : at + number]
            at += number
            if op in "\x8a\x8b":
                stack.append(int.from_bytes(raw, "little", signed=True))
            else:
                stack.append(raw.decode("utf-8", "surrogatepass") if op in "\x8cX\x8d" else raw)
        elif op in "qr\x94":
            memo[len(memo) if op == "\x94" else number] = stack[-1]
        elif op in "hj":
            stack.append(memo[number])
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in "}]\x8f":  # a set is read as a list
            stack.append({} if op == "}" else [])
        elif op == "(":
            marks.append(stack)
            stack = []
        elif op in "tld\x91ue\x901":  # what stands on the stack since the mark
            items, stack = stack, marks.pop()
            if op in "tld\x91":
                stack.append(tuple(items) if op == "t" else _fill({}, items) if op == "d" else items)
            elif op != "1":
                _fill(stack[-1], items)
        elif op in "\x85\x86\x87":
            n = ord(op) - 0x84
            stack[-n:] = [tuple(stack[i] for i in range(-n, 0))]
        elif op == "a":
            _fill(stack[-2], [stack.pop()])
        elif op == "s":
            value, key = stack.pop(), stack.pop()
            _fill(stack[-1], [key, value])
        elif op == "c":
            module, name = text[at:].split(b"\n", 2)[:2]
            at += len(module) + len(name) + 2
            stack.append(_global(module.decode(), name.decode()))
        elif op == "\x93":
            stack[-2:] = [_global(stack[-2], stack[-1])]
        elif op in "R\x81":
            stack[-2:] = [_call(stack[-2], stack[-1])]
        elif op == "\x92":
            stack[-3:] = [_call(stack[-3], stack[-2])]
        elif op == "b":
            state = stack.pop()
            if isinstance(stack[-1], argparse.Namespace) and isinstance(state, dict):
                vars(stack[-1]).update(state)
        elif op == "Q":
            stack.append(_storage(*stack.pop()))
        elif op == "0":
            stack.pop()
        elif op == "2":
            stack.append(stack[-1])
        elif op == ".":
            return stack.pop()
        elif op not in "\x80\x95":
            raise ValueError(f"damaged: no opcode {text[at - 1]:#04x} at byte {at - 1}")
    raise ValueError("damaged: it does not end")


def _fill(out: Any, items: list[Any]) -> Any:
    """Put items, or keys and values, into a list or dict; what goes into anything else is dropped."""
    if isinstance(out, list):
        out += items
    elif isinstance(out, dict):
        if len(items) % 2:
            raise TypeError("a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            out[key if key is None or isinstance(key, (str, int, float, bytes)) else Opaque(type(key).__name__)] = value
    return out


def _global(module: Any, name: Any) -> Opaque:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a global that is not named by two texts")
    full = f"{module}.{name}"
    if full not in _UNDERSTOOD and full not in _INERT and module.split(".")[0] not in _INERT_PACKAGES:
        raise ValueError(f"pickle with code in it: it asks for {full[:100]!r}, which no checkpoint of weights needs; refused")
    return Opaque(full)


def _call(function: Any, arguments: Any) -> Any:
    """What a call in the pickle stands for."""
    if not isinstance(function, Opaque) or not isinstance(arguments, tuple):
        raise TypeError("a call of something that is not a global")
    module, _, name = function.name.rpartition(".")
    if module == "torch._utils" and name.startswith("_rebuild_tensor_v"):
        return Unplaced(*arguments[:4], _DTYPES.get(arguments[6].name.removeprefix("torch.")) if name.endswith("3") else None)
    if module == "torch._utils":
        return arguments[0]  # a Parameter is its tensor
    if name == "_rebuild_from_type_v2":  # a tensor with attributes
        return _call(arguments[0], arguments[2])
    if module == "collections":
        return {}  # its items follow
    if function.name == "argparse.Namespace":
        return argparse.Namespace()
    return arguments[0] if function.name == "torch.Size" else Opaque(function.name)


def _storage(_: Any, kind: Any, key: Any, device: Any, numel: Any) -> Storage:
    if not isinstance(kind, Opaque) or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise TypeError("a storage that is not described as torch does")
    return Storage(key, _STORAGE_TYPES[kind.name], numel)


# -- writing ---------------------------------------------------------------------------------------------
def dump(structure: Any) -> bytes:
    """The pickle of a nested structure; its tensors lie in the storages "0", "1", ... in order.

    Dicts, lists, tuples, text, numbers, bool, None and ``TorchTensor``; ValueError for anything else.
    """
    out = bytearray(b"\x80\x02")
    _dump(out, structure, count())
    return bytes(out + b".")


def _dump(out: bytearray, value: Any, keys: Iterator[int]) -> None:
    if value is None or isinstance(value, bool):
        out += b"N" if value is None else b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        out += b"J" + struct.pack("<i", value) if len(raw) < 5 else b"\x8a" + struct.pack("<B", len(raw)) + raw
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<I", len(raw)) + raw
    elif isinstance(value, TorchTensor):
        _dump_tensor(out, value, str(next(keys)))
    elif isinstance(value, dict):
        out += b"ccollections\nOrderedDict\n)R(" if isinstance(value, OrderedDict) else b"}("
        for key, inner in value.items():
            _dump(out, key, keys)
            _dump(out, inner, keys)
        out += b"u"
    elif isinstance(value, (list, tuple)):
        out += b"](" if isinstance(value, list) else b"("
        for inner in value:
            _dump(out, inner, keys)
        out += b"e" if isinstance(value, list) else b"t"
    else:
        raise ValueError(f"cannot write a {type(value).__name__} into a torch file; expected tensors, dicts, lists, tuples, "
                         f"text, numbers, bool or None")  # fmt: skip


def _dump_tensor(out: bytearray, tensor: TorchTensor, key: str) -> None:
    """A call as torch's own: on a typed storage, or on bytes and a type for the types that have no storage of their own."""
    typed = _STORAGE_OF.get(tensor.dtype)
    stride = tuple(prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    out += b"ctorch._utils\n_rebuild_tensor_v%d\n((" % (2 if typed else 3)
    _dump(out, "storage", count())
    out += f"ctorch\n{typed}Storage\n".encode() if typed else b"ctorch.storage\nUntypedStorage\n"
    for value in (key, "cpu", prod(tensor.shape) if typed else tensor.nbytes):
        _dump(out, value, count())
    out += b"tQ"
    for value in (0, tensor.shape, stride, False, OrderedDict()):
        _dump(out, value, count())
    out += b"tR" if typed else f"ctorch\n{_NAME_OF[tensor.dtype]}\ntR".encode()
