"""Reads the object arrays in CALVIN's `.npy` files without executing anything in them.

Such a file holds a program for a stack machine whose CALL instructions may name any function. Here the program is only
parsed (`pickletools.genops` never runs it), and this module rebuilds what the instructions describe: numbers, strings,
bytes, lists, tuples, dictionaries and NumPy arrays of plain dtypes. Four callables are known by name, and what they
stand for is done here; everything else is refused.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 1 << 30  # the largest published file, with its language embeddings, is under 100 MB
_HEADER = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"

_PLAIN_DTYPE = re.compile(r"[biuf][1248]|[US][1-9][0-9]{0,5}|O8?")


class ObjectArrayError(ValueError):
    """A file that is not a plain object array: what was found, and what is understood."""


@dataclass(frozen=True)
class _Name:
    """A callable or class that the file names; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class _DType:
    text: str
    order: str = "="

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.text)


@dataclass
class _Array:
    """An array between its construction and the instruction that fills it."""

    value: Any = None


_MARK = object()
_ARRAY, _DTYPE, _SCALAR, _ENCODE = "array", "dtype", "scalar", "encode"
_KNOWN = {
    **{_Name(f"numpy.{core}.multiarray", "_reconstruct"): _ARRAY for core in ("core", "_core")},
    **{_Name(f"numpy.{core}.multiarray", "scalar"): _SCALAR for core in ("core", "_core")},
    _Name("numpy", "dtype"): _DTYPE,
    _Name("_codecs", "encode"): _ENCODE,  # how protocol 2 spells bytes
}
_CLASSES = {_Name("numpy", "ndarray")}


def read_object(path: Path) -> Any:
    """The one object in a 0-dimensional object array of a `.npy` file.

    Returns:
        What was stored: dictionaries, lists, tuples, strings, bytes, numbers, None and NumPy arrays.

    Raises:
        ObjectArrayError: if the file is too large, is not such an array, is cut short, or names anything that is not
            plain data.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ObjectArrayError(f"{path}: {size} bytes, at most {MAX_BYTES} are read")
    stream = io.BytesIO(path.read_bytes())
    if stream.read(8) != b"\x93NUMPY\x01\x00":
        raise ObjectArrayError(f"{path}: not a .npy file of version 1")
    header = stream.read(int.from_bytes(stream.read(2), "little")).strip()
    if header != _HEADER:
        raise ObjectArrayError(f"{path}: expected one object (dtype object, shape ()), got {header[:100]!r}")
    try:
        array = _Machine().run(stream)
    except ObjectArrayError as error:
        raise ObjectArrayError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ObjectArrayError(f"{path}: damaged or cut short ({type(error).__name__}: {error})") from None
    if not isinstance(array, np.ndarray) or array.shape != ():
        raise ObjectArrayError(f"{path}: expected one object in an array of shape ()")
    return array.item()


@dataclass
class _Machine:
    """The stack machine's data instructions."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, stream: io.BytesIO) -> Any:
        constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in constants:
                self.stack.append(constants[name])
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name == "STOP":
                return _filled(self.stack.pop())
            elif name not in ("PROTO", "FRAME"):
                raise ObjectArrayError(f"instruction {name} is not plain data")
        raise ObjectArrayError("cut short: no STOP instruction")

    def since_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def pop(self, count: int) -> list[Any]:
        values = [self.stack.pop() for _ in range(count)][::-1]
        if any(value is _MARK for value in values):
            raise ObjectArrayError("damaged: too few values on the stack")
        return values

    def push_tuple(self, count: int) -> None:
        self.stack.append(tuple(_filled(value) for value in self.pop(count)))

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ObjectArrayError(f"cannot append to {type(target).__name__}")
        target.extend(_filled(value) for value in values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise ObjectArrayError(f"cannot set items of {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ObjectArrayError(f"dictionary key of type {type(key).__name__}, expected a string")
            target[key] = _filled(value)

    def push_name(self, name: _Name) -> None:
        if name not in _KNOWN and name not in _CLASSES:
            raise ObjectArrayError(f"names {name}, which is not plain data; nothing was executed")
        self.stack.append(name)

    def stack_global(self) -> None:
        module, name = self.pop(2)
        self.push_name(_Name(str(module), str(name)))

    def call(self) -> None:
        function, arguments = self.pop(2)
        kind = _KNOWN.get(function) if isinstance(function, _Name) else None
        if kind is None or not isinstance(arguments, tuple):
            raise ObjectArrayError(f"calls {function}, which is not plain data; nothing was executed")
        if kind == _ARRAY:
            self.stack.append(_Array())
        elif kind == _DTYPE:
            self.stack.append(_DType(_plain_dtype(arguments[0])))
        elif kind == _SCALAR:
            dtype, data = arguments
            self.stack.append(np.frombuffer(_bytes(data), dtype.dtype(), count=1)[0].item())
        else:
            text, encoding = arguments
            if encoding not in ("latin1", "latin-1"):
                raise ObjectArrayError(f"bytes encoded as {encoding!r}, expected latin1")
            self.stack.append(str(text).encode("latin-1"))

    def build(self) -> None:
        target, state = self.pop(2)
        if isinstance(target, _DType):
            if state[1] not in ("<", ">", "|", "="):
                raise ObjectArrayError(f"byte order {state[1]!r}, expected '<', '>', '|' or '='")
            target.order = str(state[1])
            if any(extra is not None for extra in state[2:5]):
                raise ObjectArrayError("an array with fields or sub-arrays, expected a plain dtype")
        elif isinstance(target, _Array):
            target.value = _array(*state[1:])
        else:
            raise ObjectArrayError(f"sets the state of {type(target).__name__}, which is not plain data")
        self.stack.append(target)


_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip

_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "LIST": lambda machine, _: machine.stack.append([_filled(value) for value in machine.since_mark()]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(_filled(value) for value in machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, argument: machine.push_name(_Name(*str(argument).split(" ", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    **{
        name: lambda machine, argument: machine.memo.update({int(argument): machine.stack[-1]})
        for name in ("PUT", "BINPUT", "LONG_BINPUT")
    },
    **{
        name: lambda machine, argument: machine.stack.append(machine.memo[int(argument)])
        for name in ("GET", "BINGET", "LONG_BINGET")
    },
}


def _filled(value: Any) -> Any:
    """An array that has its values by now; anything else as it is."""
    return value.value if isinstance(value, _Array) else value


def _plain_dtype(text: Any) -> str:
    if not isinstance(text, str) or not _PLAIN_DTYPE.fullmatch(text):
        raise ObjectArrayError(f"an array of dtype {text!r}, expected numbers, strings or objects")
    return text


def _bytes(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise ObjectArrayError(f"array data of type {type(data).__name__}, expected bytes")
    return data


def _array(shape: tuple[int, ...], dtype: _DType, fortran: bool, data: Any) -> np.ndarray:
    """An array from the state that NumPy stores."""
    plain = dtype.dtype()
    order: Any = "F" if fortran else "C"
    if plain == np.dtype(object):
        if not isinstance(data, list) or len(data) != math.prod(shape):
            raise ObjectArrayError(f"an object array of shape {shape} without its {math.prod(shape)} values")
        objects = np.empty(len(data), dtype=object)
        for index, value in enumerate(data):
            objects[index] = value
        return objects.reshape(shape, order=order)
    if len(_bytes(data)) != math.prod(shape) * plain.itemsize:
        raise ObjectArrayError(f"{len(data)} bytes for an array of shape {shape} and dtype {plain}")
    return np.frombuffer(data, plain).reshape(shape, order=order)
