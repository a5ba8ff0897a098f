"""Reads pickled dictionaries of NumPy arrays (`.pkl` of Detectron and detectron2) without calling NumPy's functions."""

import io
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from fasterrcnn_jax.weights import restricted_pickle

DTYPES = {"b1", "i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8"}


def read(data: bytes, where: str) -> Any:
    """Returns the pickled object; its arrays are `PickledArray`.

    Raises:
      InputError: the pickle contains anything except plain values, dictionaries and arrays of numbers.
    """
    # Python 2 pickled the bytes of NumPy arrays as text.
    return restricted_pickle.unpickle(io.BytesIO(data), _names(), where=where, encoding="latin1")


class _Dtype:
    """A number type; the state in the pickle gives the byte order."""

    def __init__(self, name: str):
        if name not in DTYPES:
            raise ValueError(f"arrays of dtype {name} are not supported")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class PickledArray:
    """An array whose shape has been checked against its number of bytes."""

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, column_major, raw = state[-4:]
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self._take(raw, dtype, shape, "F" if column_major else "C")

    def _take(self, raw: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise ValueError(f"an array of shape {shape} and dtype {dtype.dtype} has {len(raw)} bytes")
        self.array = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)

    def read(self) -> np.ndarray:
        return self.array


def _names() -> dict[str, Callable | str]:
    """Returns the replacements for pickled names; new ones per file, because a pickle can set their attributes."""

    def reconstruct(subtype, shape, dtype):
        return PickledArray()

    def dtype(name, *flags):
        return _Dtype(name)

    def from_buffer(raw, dtype, shape, order):
        array = PickledArray()
        array._take(raw, dtype, shape, order)
        return array

    def scalar(dtype, raw):
        array = PickledArray()
        array._take(raw.encode("latin1") if isinstance(raw, str) else raw, dtype, (), "C")
        return array

    # The oldest pickle protocols have no bytes type and encode bytes as text.
    def encode(text, encoding):
        return text.encode("latin1")

    def empty():
        return b""

    names = {
        "numpy.ndarray": "ndarray",
        "numpy.dtype": dtype,
        "_codecs.encode": encode,
        "__builtin__.bytes": empty,
    }
    names["collections.OrderedDict"] = restricted_pickle.ordered_dict()
    for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        names |= {
            f"{core}.multiarray._reconstruct": reconstruct,
            f"{core}.multiarray.scalar": scalar,
            f"{core}.numeric._frombuffer": from_buffer,
        }
    return names
