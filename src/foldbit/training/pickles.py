"""Pickles of plain data, read without executing anything.

Unpickling usually runs what the file tells it to. Here a file may use only operations that build plain
values, its memo stays within the file's own size, and the three names that NumPy's arrays are pickled by
stand for objects of this module that accept a uint8 array and nothing else: no code of the file's choosing
runs, NumPy's included.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any, ClassVar

import numpy as np

from foldbit.training.idx import DataError


def read(data: bytes, name: str) -> dict[Any, Any]:
    """The dict of plain values that a pickle holds, as Python 2's (bytes stay bytes) or Python 3's wrote it.

    Read are protocols 2 to 5 with None, booleans, integers, bytes, str, tuples, lists, dicts, and NumPy
    arrays of uint8 as the dict's values. Takes half a second for the 155 MB of CIFAR-100.

    Args:
        data: the pickle, whole.
        name: of the file, for errors.

    Returns:
        Its dict; arrays are read-only.

    Raises:
        DataError: for everything else, naming what was refused.
    """
    try:
        _check_operations(data)
        loaded = _Unpickler(data).load()
    except _Refused as refused:
        raise DataError(
            f"{name} is refused: {refused}; only plain values and uint8 arrays are read"
        ) from None
    except Exception as error:  # what a broken pickle raises is nowhere written down
        raise DataError(f"{name} is not a pickle, or a damaged or truncated one: {_line(error)}") from error
    if type(loaded) is not dict:
        raise DataError(f"{name} holds a {type(loaded).__name__}; expected a dict")
    return {key: value.values if type(value) is _Array else value for key, value in loaded.items()}


class _Refused(Exception):
    """The pickle asks for more than plain data."""


_OPERATIONS = frozenset(
    [
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
        *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
        *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    ]
)


def _check_operations(data: bytes) -> None:
    """Refuse other operations than those above, and a memo larger than the file could fill."""
    end = 0
    for operation, argument, position in pickletools.genops(data):
        end = position or 0
        if operation.name not in _OPERATIONS:
            raise _Refused(f"it uses the operation {operation.name}")
        if operation.name in ("BINPUT", "LONG_BINPUT") and (argument or 0) > end:
            raise _Refused(f"it claims to hold {argument:,} values by its byte {end:,}")
    if end + 1 < len(data):
        raise _Refused(f"{len(data) - end - 1:,} bytes follow its end")


_PythonsOwn: Any = vars(pickle)["_Unpickler"]


class _Unpickler(_PythonsOwn):
    """Finds three names, each of which stands for an object of this module.

    Python's own code of the standard library: its keys can be looked at before they are hashed. In the faster
    one a tuple of tuples, deep or many times the same, ends the process or never ends.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonsOwn.dispatch)

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), fix_imports=False, encoding="bytes")

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(items[::2], items[1::2])

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key], [value])

    def _set(self, keys: list[Any], values: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or not all(type(key) in (bytes, str, int) for key in keys):
            raise _Refused("it has keys that are neither text nor numbers")
        self.stack[-1].update(zip(keys, values, strict=True))

    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.SETITEM[0]] = load_setitem

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy", "ndarray"): _ArrayClass,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
        }
        if (module, name) not in known:
            raise _Refused(f"it asks for {str(module)[:80]}.{str(name)[:80]}")
        return known[module, name]()


# The file decides which of these meets which, and with what: each checks all it is given. They have no
# attributes that a file could set, and are made anew for each file, so that none reaches beyond it.


class _ArrayClass:
    """In place of ``numpy.ndarray``: a name, that nothing can be done with."""

    __slots__ = ()


class _Dtype:
    """In place of ``numpy.dtype``: makes uint8, and only that."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> _UInt8:
        if len(arguments) != 3 or arguments[0] not in (b"u1", "u1"):
            raise _Refused("it holds an array of another type than uint8")
        return _UInt8()


class _UInt8:
    """In place of ``numpy.dtype("u1")``."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        # Version, byte order, sub-array, names, fields, size and alignment (-1: the type's own), flags.
        if type(state) is not tuple or len(state) != 8 or state[1] not in (b"|", "|"):
            raise _Refused("it holds an array of another type than uint8")
        if state[2:5] != (None, None, None) or state[5:] != (-1, -1, 0):
            raise _Refused("it holds an array of another type than uint8")


class _Reconstruct:
    """In place of NumPy's ``_reconstruct``: an array that is yet to be filled."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> _Array:
        if len(arguments) != 3 or type(arguments[0]) is not _ArrayClass:
            raise _Refused("it makes an array of an unknown kind")
        return _Array()


_MOST_DIMS = 4


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**40  # a product of some that are longer takes minutes


class _Array:
    """In place of an array."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: np.ndarray = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not _UInt8:
            raise _Refused("it holds an array of another type than uint8")
        _, shape, _, fortran, values = state
        if type(shape) is not tuple or len(shape) > _MOST_DIMS or not all(map(_is_size, shape)):
            raise _Refused("it holds an array without a proper shape")
        if type(values) is not bytes or math.prod(shape) != len(values):
            raise _Refused("it holds an array whose shape and values do not fit")
        self.values = np.frombuffer(values, np.uint8).reshape(shape, order="F" if fortran else "C")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
