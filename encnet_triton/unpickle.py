"""Read untrusted pickles without running anything in them.

Python's own unpickler calls what a file names, sets attributes of what it finds, and hands bytes to
C code that trusts them. This one makes numbers, texts, bytes, lists, tuples, sets and dictionaries
by itself, looks every global up in a table that the caller gives, and knows two objects of NumPy:
arrays and types of numbers. Every other object is refused, or stays a `Placeholder`.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["NUMBERS", "Placeholder", "load_pickle", "printable"]

_Numbers = NDArray[np.number[Any]]
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# What pickletools has read as the opcode's argument is the object itself.
_LITERALS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip


class Placeholder:
    """Stands for an object, or a class, that is not made; nothing in it was called.

    Attributes:
        name: ``module.name`` of the class or function.
        arguments: what the file would call it with; None for the class or function itself.
        state: what the file would set its attributes from.
        elements, items: what the file would append, and set by keys.
    """

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.elements: list[Any] = []
        self.items: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<{self.name}>"


def load_pickle(
    file: BinaryIO,
    allowed: Mapping[tuple[str, str], Any],
    *,
    placeholders: bool = False,
    persistent: Callable[[Any], Any] | None = None,
    encoding: str = "utf-8",
) -> Any:
    """The object of the pickle at the position of ``file``, which is then at the pickle's end.

    Args:
        file: opened for reading bytes.
        allowed: (module, name) -> what stands for that global, for example `NUMBERS` and more. A
            callable is called with whatever arguments the file has, so it must check them; it may
            raise ValueError or TypeError. What is only named can be a `Placeholder`.
        placeholders: leave a `Placeholder` where a global is not in ``allowed``, instead of an
            error.
        persistent: gives the object of a persistent id; without it, these are an error.
        encoding: of texts that Python 2 wrote; "bytes" leaves them bytes.

    Raises:
        pickle.UnpicklingError: it is damaged, or asks for something that is not allowed.
    """
    machine = _Machine(allowed, placeholders, persistent, encoding)
    try:
        return machine.run(file)
    except pickle.UnpicklingError:
        raise
    except (
        ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError, MemoryError,
        RecursionError, Warning,
    ) as error:  # fmt: skip
        reason = printable(str(error)) or type(error).__name__
        raise pickle.UnpicklingError(f"the pickle is damaged: {reason}") from error


def printable(text: str, most: int = 200) -> str:
    """One printable line of untrusted text."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: most + 1])
    return line if len(line) <= most else line[:most] + " ..."


class _Machine:
    """The stack machine that a pickle is a program of."""

    def __init__(
        self,
        allowed: Mapping[tuple[str, str], Any],
        placeholders: bool,
        persistent: Callable[[Any], Any] | None,
        encoding: str,
    ) -> None:
        self.allowed = allowed
        self.functions = {id(value) for value in allowed.values() if callable(value)}
        self.placeholders = placeholders
        self.persistent = persistent
        self.encoding = encoding
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name == "STOP":
                break
            elif name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise pickle.UnpicklingError(f"it has the opcode {name}, which is not read")
                step(argument)
        return self.stack.pop()

    # Texts and bytes of Python 2; pickletools takes them for Latin-1.

    def _string(self, text: str) -> None:
        data = text.encode("latin-1")
        self.stack.append(data if self.encoding == "bytes" else data.decode(self.encoding))

    _binstring = _short_binstring = _string

    # Stack and memo.

    def _mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def _marked(self) -> list[Any]:
        """Everything above the last mark, taken off the stack with it."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def _pop(self, _: None) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _pop_mark(self, _: None) -> None:
        self._marked()

    def _dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _binput = _long_binput = _put

    def _get(self, index: int) -> None:
        if index not in self.memo:
            raise IndexError("it refers to something that it has not stored")
        self.stack.append(self.memo[index])

    _binget = _long_binget = _get

    # Containers.

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._marked()))

    def _last(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("a tuple has too few members")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _tuple1(self, _: None) -> None:
        self._last(1)

    def _tuple2(self, _: None) -> None:
        self._last(2)

    def _tuple3(self, _: None) -> None:
        self._last(3)

    def _list(self, _: None) -> None:
        self.stack.append(self._marked())

    def _dict(self, _: None) -> None:
        pairs = self._marked()
        made: dict[Any, Any] = {}
        _set_items(made, pairs)
        self.stack.append(made)

    def _frozenset(self, _: None) -> None:
        self.stack.append(frozenset(_key(member) for member in self._marked()))

    def _append(self, _: None) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def _appends(self, _: None) -> None:
        values = self._marked()
        _extend(self.stack[-1], values)

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def _setitems(self, _: None) -> None:
        pairs = self._marked()
        _set_items(self.stack[-1], pairs)

    def _additems(self, _: None) -> None:
        members = self._marked()
        _extend(self.stack[-1], members)

    # Objects.

    def _global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self.stack.append(self._find(module, name))

    def _stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("the name of a global is not text")
        self.stack.append(self._find(module, name))

    def _find(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        full = printable(f"{module}.{name}")
        if not self.placeholders:
            raise pickle.UnpicklingError(f"it asks for {full}")
        return Placeholder(full)

    def _call(self, what: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise TypeError("the arguments of a call are not a tuple")
        if isinstance(what, Placeholder):
            made: Any = Placeholder(what.name, arguments)
        elif id(what) in self.functions:
            made = what(*arguments)
        else:
            raise TypeError("it calls something that is not a function")
        self.stack.append(made)

    def _reduce(self, _: None) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        self._call(what, arguments)

    _newobj = _reduce

    def _newobj_ex(self, _: None) -> None:
        keywords, arguments, what = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if keywords and not isinstance(what, Placeholder):
            raise TypeError("it calls a function with names")
        self._call(what, arguments)

    def _obj(self, _: None) -> None:
        what, *arguments = self._marked()
        self._call(what, tuple(arguments))

    def _inst(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self._call(self._find(module, name), tuple(self._marked()))

    def _build(self, _: None) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Placeholder):
            made.state = state
        elif isinstance(made, np.ndarray):
            _build_array(made, state)
        elif isinstance(made, np.dtype):
            _build_dtype(made, state)
        elif not isinstance(made, dict):  # its attributes, as of a state dict, are left out
            raise TypeError("it sets attributes of something that has none")

    def _persid(self, identity: Any) -> None:
        if self.persistent is None:
            raise pickle.UnpicklingError("it asks for an object that is stored elsewhere")
        self.stack.append(self.persistent(identity))

    def _binpersid(self, _: None) -> None:
        self._persid(self.stack.pop())


def _key(key: Any) -> Any:
    """A key or a member of a set. No tuple of tuples: the hash of a deep one ends the process."""
    members = key if isinstance(key, tuple) else (key,)
    plain = (str, bytes, int, float, type(None), Placeholder)
    if not all(isinstance(member, plain) for member in members):
        raise TypeError("a key is neither text nor a number")
    return key


def _set_items(target: Any, pairs: list[Any]) -> None:
    if len(pairs) % 2:
        raise ValueError("a key has no value")
    items = target.items if isinstance(target, Placeholder) else target
    if not isinstance(items, dict):
        raise TypeError("it sets an item of something that has none")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        items[_key(key)] = value


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, Placeholder):
        target.elements.extend(values)
    elif isinstance(target, list):
        target.extend(values)
    elif isinstance(target, set):
        target.update(_key(value) for value in values)
    else:
        raise TypeError("it appends to something that is not a list")


# NumPy's arrays and scalars, of types of numbers alone: an array of objects made from bytes holds
# addresses, and touching one of them ends the process.

_NUMBER = re.compile(r"[<>|=]?(\?|b1|[iu][1248]|f[248]|c8|c16)")


def _text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _dtype(name: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    if not isinstance(name, str | bytes) or not _NUMBER.fullmatch(_text(name)):
        raise pickle.UnpicklingError("it has an array of something other than numbers")
    # A copy: its order of bytes is set afterwards.
    return np.dtype(_text(name), copy=True)


def _build_dtype(dtype: np.dtype[Any], state: Any) -> None:
    plain = (None, None, None, -1, -1, 0)
    if not isinstance(state, tuple) or len(state) != 8 or state[2:] != plain:
        raise ValueError("a type of numbers has fields")
    order = _text(state[1])
    if state[0] != 3 or order not in "<>|=" or len(order) != 1:
        raise ValueError("a type of numbers has no order of bytes")
    if dtype.byteorder != "|":
        dtype.__setstate__((3, order, *plain))  # type: ignore[attr-defined]


def _filled(dtype: Any, shape: Any, data: Any, order: Any) -> _Numbers:
    """The array of these bytes; ValueError if they are not as many as it takes."""
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes | bytearray):
        raise TypeError("an array has no type or no content")
    if not isinstance(shape, tuple) or len(shape) > 32:
        raise TypeError("an array has no shape")
    if not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise TypeError("an array has no shape")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order else "C")


def _build_array(array: NDArray[Any], state: Any) -> None:
    if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1 or array.size:
        raise ValueError("an array has no content")
    _, shape, dtype, order, data = state
    if isinstance(data, str):  # of Python 2, where the caller asked for texts
        data = data.encode("latin-1")
    _filled(dtype, shape, data, order)
    array.__setstate__((1, shape, dtype, bool(order), bytes(data)))  # type: ignore[arg-type]


def _array(kind: Any, shape: Any, code: Any) -> NDArray[Any]:
    """An array without content, which the file then fills."""
    return np.empty(0, np.int8)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Numbers:
    """An array in protocol 5."""
    array = _filled(dtype, shape, data, order == "F")
    return (array if axes is None else array.transpose(axes)).copy(order="K")


def _scalar(dtype: Any, data: Any) -> Any:
    if isinstance(data, str):
        data = data.encode("latin-1")
    return _filled(dtype, (), data, False)[()]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or _text(encoding) not in ("latin1", "latin-1"):
        raise TypeError("its bytes are no Latin-1")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """How protocols 0 to 2 write b""."""
    return b""


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    made: OrderedDict[Any, Any] = OrderedDict()
    for key, value in pairs:
        made[_key(key)] = value
    return made


def _class(*_: Any) -> None:
    """Stands for a class that is named as an argument and never called."""
    raise TypeError("it makes an array by itself")


NUMBERS: Mapping[tuple[str, str], Any] = MappingProxyType(
    {
        **{
            (f"numpy.{core}.{module}", name): value
            for core in ("core", "_core")
            for module, name, value in (
                ("multiarray", "_reconstruct", _array),
                ("multiarray", "scalar", _scalar),
                ("numeric", "_frombuffer", _from_buffer),
            )
        },
        ("numpy", "ndarray"): _class,
        ("numpy", "dtype"): _dtype,
        ("_codecs", "encode"): _encode,
        ("__builtin__", "bytes"): _no_bytes,
        ("collections", "OrderedDict"): _ordered,
    }
)
"""What arrays and scalars of numbers ask for, and ordered dictionaries."""
