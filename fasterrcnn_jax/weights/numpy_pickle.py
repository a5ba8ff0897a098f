"""Reads pickled dictionaries of NumPy arrays (`.pkl` of Detectron and detectron2) without calling NumPy's functions."""

import io
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.weights import restricted_pickle

DTYPES = {"b1", "i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8"}


def read(data: bytes, where: str) -> Any:
    """Returns the pickled object; its arrays are `PickledArray`.

    Raises:
      InputError: the pickle is damaged, or an array does not have the bytes of its shape or has no numbers.
    """
    return restricted_pickle.unpickle(io.BytesIO(data), NAMES, where=where)


class _Dtype:
    """A number type; the state in the pickle gives the byte order."""

    def __init__(self, name: Any):
        if not isinstance(name, str) or name not in DTYPES:
            raise ValueError(f"arrays of dtype {_shown(name)} are not supported")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class PickledArray:
    """An array whose shape has been checked against its number of bytes."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        shape, dtype, column_major, raw = state[-4:]
        self.take(raw, dtype, shape, "F" if column_major else "C")

    def take(self, raw: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> None:
        # Python 2 pickled the bytes of arrays as text.
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
            raise ValueError("an array without a dtype or without bytes")
        if not restricted_pickle.is_shape(shape):
            raise ValueError(f"an array of shape {_shown(shape)}")
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise ValueError(f"an array of shape {shape} and dtype {dtype.dtype} has {len(raw)} bytes")
        self.array = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)

    def read(self, where: str) -> np.ndarray:
        if self.array is None:
            raise InputError(f"{where} is an array without numbers")
        return self.array


def _shown(value: object) -> str:
    """Returns a value for a message; containers can be nested without end."""
    return quoted(value) if isinstance(value, str | int) else f"of type {type(value).__name__}"


def _reconstruct(subtype: Any, shape: Any, dtype: Any) -> PickledArray:
    return PickledArray()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array.take(raw, dtype, shape, "F" if order == "F" else "C")
    return array


def _scalar(dtype: Any, raw: Any) -> PickledArray:
    return _from_buffer(raw, dtype, (), "C")


NAMES: Mapping[str, Callable | str] = {
    "numpy.ndarray": "ndarray",
    "numpy.dtype": lambda name, *flags: _Dtype(name),
    # The oldest pickle protocols have no bytes type and encode bytes as text.
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    "__builtin__.bytes": lambda: b"",
    "collections.OrderedDict": restricted_pickle.ordered_dict,
    **{
        f"{core}.{name}": function
        for core in ("numpy.core", "numpy._core")  # before and since NumPy 2
        for name, function in (
            ("multiarray._reconstruct", _reconstruct),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}
