"""Reads files of `torch.save`: an uncompressed zip since version 1.6; before that, pickles followed by the numbers.

Needs only NumPy. Numbers are read only for the requested tensors, not for an optimizer's state.
"""

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.weights import restricted_pickle

# The pickled magic number at the start of files before version 1.6.
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# Exceptions of `zipfile` for damaged files, unknown versions and encryption.
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, ValueError, RuntimeError)

DTYPES = {
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
}


class Storage(NamedTuple):
    """Numbers of one type; tensors are views of a storage."""

    key: str
    dtype: np.dtype
    size: int  # in numbers
    fetch: Callable[[str], tuple[memoryview, str]]  # from a key to its bytes and their place for messages

    def read(self) -> np.ndarray:
        raw, where = self.fetch(self.key)
        if self.size * self.dtype.itemsize > len(raw):
            raise InputError(f"{where}: must have {self.size} numbers of {self.dtype}, got {len(raw)} bytes")
        return np.frombuffer(raw, self.dtype, self.size)


class Tensor(NamedTuple):
    """A strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers

    def read(self) -> np.ndarray:
        numbers = self.storage.read()
        try:
            if self._fits(len(numbers)):
                strides = [stride * numbers.itemsize for stride in self.strides]
                return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides, writeable=False)
        except (
            ValueError,
            OverflowError,
        ):  # unequal numbers of axes, or too many or too long axes for NumPy
            pass
        _, where = self.storage.fetch(self.storage.key)
        raise InputError(f"{where}: {len(numbers)} numbers do not fit a tensor of {self[1:]} (offset, shape, strides)")

    def _fits(self, numbers: int) -> bool:
        if min(self.offset, *self.shape, *self.strides, 0) < 0:
            return False
        size = math.prod(self.shape)
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        # With a stride of 0, one number could fill a tensor of any shape.
        return size <= numbers and (size == 0 or last < numbers)


def read_zip(path: Path) -> Any:
    """Returns the saved object; its tensors are `Tensor`.

    Raises:
      InputError: the file is damaged, holds something else, or asks for code to be run.
    """
    data = path.read_bytes()
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except ZIP_ERRORS as error:
        raise InputError(f"{path}: the zip is damaged ({error})") from error
    entries = {entry.filename: entry for entry in archive.infolist()}
    for name, entry in entries.items():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise InputError(f"{path}: entry {name} is compressed; torch.save writes uncompressed entries only")
        if entry.file_size > len(data):
            raise InputError(f"{path}: entry {name} states {entry.file_size} bytes, more than the file has")

    def fetch(name: str) -> tuple[memoryview, str]:
        where = f"{path}: entry {name}"
        if name not in entries:
            raise InputError(f"{where} is missing")
        try:
            return memoryview(archive.read(name)), where
        except ZIP_ERRORS as error:
            raise InputError(f"{where} is damaged ({error})") from error

    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{path}: not a file of torch.save: the zip must contain one data.pkl, got {len(pickles)}")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in entries and fetch(f"{folder}byteorder")[0] != b"little":
        raise InputError(f"{path}: entry {folder}byteorder: only little-endian numbers are supported")

    def storage(pid: tuple) -> Storage:
        kind, dtype, key, _, size = pid
        return _storage(kind, dtype, f"{folder}data/{key}", size, fetch)

    pickled, where = fetch(pickles[0])
    return restricted_pickle.unpickle(io.BytesIO(pickled), _names(), where=where, persistent=storage)


def read_legacy(path: Path) -> Any:
    """Returns the saved object; its tensors are `Tensor`.

    Raises:
      InputError: the file is damaged, holds something else, or asks for code to be run.
    """
    data = path.read_bytes()
    file = io.BytesIO(data)
    announced: dict[str, Storage] = {}
    found: dict[str, memoryview] = {}

    def fetch(key: str) -> tuple[memoryview, str]:
        where = f"{path}: storage {key}"
        if key not in found:
            raise InputError(f"{where} is missing")
        return found[key], where

    def storage(pid: tuple) -> Storage:
        kind, dtype, key, _, size, view = pid
        if view is not None:  # a view of another storage, which only the first versions wrote
            raise ValueError("views of a storage are not supported")
        return announced.setdefault(key, _storage(kind, dtype, key, size, fetch))

    def pickled(entry: str) -> Any:
        return restricted_pickle.unpickle(file, _names(), where=f"{path}: {entry}", persistent=storage)

    pickled("magic number")
    pickled("version")
    system = pickled("system")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InputError(f"{path}: system: only little-endian numbers are supported")
    saved, keys = pickled("object"), pickled("storage keys")
    position = file.tell()
    for key in keys if isinstance(keys, list) else []:
        if key not in announced:
            raise InputError(f"{path}: no tensor uses storage {key}")
        size = int.from_bytes(data[position : position + 8], "little")
        end = position + 8 + size * announced[key].dtype.itemsize
        if end > len(data):
            raise InputError(f"{path}: storage {key}: the file ends before its {size} numbers")
        found[key] = memoryview(data)[position + 8 : end]
        position = end
    return saved


def _storage(kind: Any, dtype: Any, key: str, size: Any, fetch: Callable) -> Storage:
    if kind != "storage" or dtype not in DTYPES or not isinstance(size, int) or size < 0:
        raise ValueError(f"unknown persistent id {kind} {dtype} {size}")
    return Storage(key, np.dtype(DTYPES[dtype]), size, fetch)


def _names() -> dict[str, Callable | str]:
    """Returns the replacements for pickled names; new ones per pickle, because a pickle can set their attributes."""

    def rebuild(storage, offset, shape, strides, *gradient):
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        return Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))

    def parameter(tensor, *gradient):
        return tensor

    names = {
        "collections.OrderedDict": restricted_pickle.ordered_dict(),
        "torch._utils._rebuild_tensor": rebuild,
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_parameter": parameter,
    }
    for module in ("torch", "torch.cuda"):
        names |= {f"{module}.{storage}": storage for storage in DTYPES}
    return names
