"""Reads files of `torch.save`: an uncompressed zip since version 1.6; before that, pickles followed by the numbers.

Needs only NumPy. Numbers are read only for the requested tensors, not for an optimizer's state, and each storage once.
"""

import functools
import io
import itertools
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.weights import restricted_pickle
from fasterrcnn_jax.weights.restricted_pickle import Unknown, is_shape, is_size

# The pickled magic number at the start of files before version 1.6.
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# Exceptions of `zipfile` for damaged files, unknown versions and encryption.
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, OSError, struct.error)
# Bytes of an entry before its name.
LOCAL_HEADER = 30

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

    def read(self, where: str) -> np.ndarray:
        """Returns the view, which cannot be written to.

        Args:
          where: file and name of the tensor for messages.
        """
        numbers = self.storage.read()
        try:
            if self._fits(len(numbers)):
                strides = [stride * numbers.itemsize for stride in self.strides]
                return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides, writeable=False)
        except (ValueError, OverflowError):  # unequal numbers of axes, or too long axes for NumPy
            pass
        place, numbers = quoted(self.storage.key), len(numbers)
        raise InputError(
            f"{where}: offset, shape and strides {quoted(self[1:])} do not fit the {numbers} numbers of storage {place}"
        )

    def _fits(self, numbers: int) -> bool:
        size = math.prod(self.shape)
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        # With a stride of 0, one number could fill a tensor of any shape.
        return size <= numbers and (size == 0 or last < numbers)


def read_zip(path: Path) -> Any:
    """Returns the saved object; its tensors are `Tensor`.

    Raises:
      InputError: the file is damaged or holds something else.
    """
    try:
        archive = zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        raise InputError(f"{path}: the zip is damaged ({quoted(str(error))})") from error
    entries = {entry.filename: entry for entry in archive.infolist()}
    _check_entries(archive, path)

    # Many tensors can be views of one storage.
    @functools.cache
    def fetch(name: str) -> tuple[memoryview, str]:
        where = f"{path}: entry {quoted(name)}"
        if name not in entries:
            raise InputError(f"{where} is missing")
        try:
            return memoryview(archive.read(entries[name])), where
        except ZIP_ERRORS as error:
            raise InputError(f"{where} is damaged ({quoted(str(error))})") from error

    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{path}: not a file of torch.save: the zip must contain one data.pkl, got {len(pickles)}")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in entries and fetch(f"{folder}byteorder")[0] != b"little":
        raise InputError(f"{path}: entry {quoted(f'{folder}byteorder')}: only little-endian numbers are supported")

    def storage(pid: Any) -> Storage | Unknown:
        kind, dtype, key, _, size = pid
        return _storage(kind, dtype, key, size, lambda key: fetch(f"{folder}data/{key}"))

    pickled, where = fetch(pickles[0])
    return restricted_pickle.unpickle(io.BytesIO(pickled), NAMES, where=where, persistent=storage)


def _check_entries(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises InputError where an entry is compressed or overlaps another, so that all are no larger than the file."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    starts = [*(entry.header_offset for entry in entries), archive.start_dir]
    for entry, end in zip(entries, starts[1:], strict=True):
        where = f"{path}: entry {quoted(entry.filename)}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise InputError(f"{where} is compressed; torch.save writes uncompressed entries only")
        if entry.header_offset + LOCAL_HEADER + entry.file_size > end:
            raise InputError(f"{where} states {entry.file_size} bytes, which overlap the next entry")


def read_legacy(path: Path) -> Any:
    """Returns the saved object; its tensors are `Tensor`.

    Raises:
      InputError: the file is damaged or holds something else.
    """
    data = path.read_bytes()
    file = io.BytesIO(data)
    announced: dict[str, Storage] = {}
    found: dict[str, memoryview] = {}

    def fetch(key: str) -> tuple[memoryview, str]:
        where = f"{path}: storage {quoted(key)}"
        if key not in found:
            raise InputError(f"{where} is missing")
        return found[key], where

    def storage(pid: Any) -> Storage | Unknown:
        kind, dtype, key, _, size, view = pid
        if view is not None:  # a view of another storage, which only the first versions wrote
            raise ValueError("views of a storage are not supported")
        made = _storage(kind, dtype, key, size, fetch)
        return announced.setdefault(key, made) if isinstance(made, Storage) else made

    def pickled(entry: str) -> Any:
        return restricted_pickle.unpickle(file, NAMES, where=f"{path}: {entry}", persistent=storage)

    pickled("magic number")
    pickled("version")
    system = pickled("system")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InputError(f"{path}: system: only little-endian numbers are supported")
    saved, keys = pickled("object"), pickled("storage keys")
    position = file.tell()
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str) or key not in announced:
            raise InputError(f"{path}: no tensor uses storage {quoted(key) if isinstance(key, str) else type(key)}")
        size = int.from_bytes(data[position : position + 8], "little")
        end = position + 8 + size * announced[key].dtype.itemsize
        if end > len(data):
            raise InputError(f"{path}: storage {quoted(key)}: the file ends before its {size} numbers")
        found[key] = memoryview(data)[position + 8 : end]
        position = end
    return saved


def _storage(kind: Any, dtype: Any, key: Any, size: Any, fetch: Callable) -> Storage | Unknown:
    if isinstance(dtype, Unknown):
        return dtype
    texts = all(isinstance(value, str) for value in (kind, dtype, key))
    if not texts or kind != "storage" or dtype not in DTYPES or not is_size(size):
        raise ValueError("a storage of unknown form")
    return Storage(key, np.dtype(DTYPES[dtype]), size, fetch)


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *gradient: Any) -> Tensor:
    if not (isinstance(storage, Storage) and is_size(offset) and is_shape(shape) and is_shape(strides)):
        raise ValueError("a tensor must have a storage, an offset, a shape and strides")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


NAMES: Mapping[str, Callable | str] = {
    "collections.OrderedDict": restricted_pickle.ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_parameter": lambda tensor, *gradient: tensor,
    **{f"{module}.{name}": name for module, name in itertools.product(("torch", "torch.cuda"), DTYPES)},
}
