"""Dictionaries of pickled NumPy arrays, Detectron's and detectron2's `.pkl`, rebuilt without NumPy's own functions."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fasterrcnn_jax.weights import restricted_pickle

DTYPES = {"b1", "i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8"}


def read(data: bytes, where: str) -> Any:
    """Returns the pickled object; its arrays are `PickledArray`.

    Raises:
      InputError: the pickle holds anything but plain values, dictionaries and arrays of numbers.
    """
    # NumPy's bytes were text to Python 2.
    return restricted_pickle.unpickle(io.BytesIO(data), _names(), where=where, encoding="latin1")


class _Dtype:
    """A type of numbers; the state that a pickle gives it says the order of the bytes."""

    def __init__(self, name: str):
        if name not in DTYPES:
            raise ValueError(f"an array of dtype {name}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class PickledArray:
    """An array whose shape was compared with its bytes."""

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, column_major, raw = state[-4:]
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self._take(raw, dtype, shape, "F" if column_major else "C")

    def _take(self, raw: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str) -> None:
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise ValueError(f"an array of shape {shape} and {len(raw)} bytes")
        self.array = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)

    def read(self) -> np.ndarray:
        return self.array


def _names() -> dict[str, Callable | str]:
    """Returns the stand-ins, new ones for each file: a pickle can set attributes of what it is given."""

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

    # Bytes in the oldest protocols, which have none.
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
