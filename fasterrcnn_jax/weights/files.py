"""Reads and writes files of named arrays. The first bytes of a file show its kind."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular
from fasterrcnn_jax.weights import numpy_pickle, torch_files
from fasterrcnn_jax.weights.numpy_pickle import PickledArray
from fasterrcnn_jax.weights.restricted_pickle import Unknown
from fasterrcnn_jax.weights.torch_files import LEGACY_START, Tensor

# These file names end in the first digits of the SHA-256: torchvision's ResNets, VGG16 and detectors, and the three
# EfficientNet-Lite.
DIGITS = {
    *("f37072fd", "b627a593", "0676ba61", "11ad3fa6", "63fe2227", "cd907fc2", "394f9c45", "f82ba261"),
    *("397923af", "6c64b313", "258fb6c6", "dd69338a", "57934424", "77cc7160", "9656183e"),
}
# Entries that contain the weights in files of training programs: of torchvision, fvcore and timm; of PyTorch's
# tutorial; of Lightning and mmengine; of Detectron; and averages of the weights, for files that hold nothing else.
WRAPPINGS = ("model", "model_state_dict", "state_dict", "blobs", "ema")
# A file can wrap the weights twice, such as {"ema": {"state_dict": ...}}.
LEVELS = 3
# Modules that contain the detector put their name for it before the names of its arrays: DataParallel, Lightning's
# modules, torch.compile.
PREFIXES = re.compile(r"^((module|model|_orig_mod)\.)+")
# Tensors can share numbers (tied weights), but an honest file does not repeat all of its numbers so often.
MAX_SHARING = 10

SAFETENSORS_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


class Weights(NamedTuple):
    """The named arrays of a file, in the layout of the program that wrote it."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]  # of a `.safetensors` file, otherwise empty
    sha256: str


def read(path: Path) -> Weights:
    """Returns the weights of a `.safetensors`, `.pth` or `.pkl` file; runs no code in it.

    Everything beside the weights is skipped: an optimizer, arguments, objects of any class.

    Raises:
      InputError: the file does not have the checksum in its name, is damaged or of an unknown kind, or its weights
        need a class or function that we do not know.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read ({error.strerror})") from error
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named and named[1] in DIGITS and not sha256.startswith(named[1]):
        raise InputError(f"{path}: the SHA-256 must start with {named[1]}, as the file name says; download it again")
    if start[8:9] == b"{":
        arrays, metadata = _read_safetensors(path)
        return Weights(_without_prefixes(arrays), metadata, sha256)
    if start.startswith(b"PK"):
        saved = torch_files.read_zip(path)
    elif start.startswith(LEGACY_START):
        saved = torch_files.read_legacy(path)
    elif start.startswith(b"\x80"):
        saved = numpy_pickle.read(path.read_bytes(), str(path))
    else:
        raise InputError(f"{path}: must be .safetensors, a .pth file of torch.save or a .pkl file of NumPy arrays")
    return Weights(_without_prefixes(_arrays(path, saved)), {}, sha256)


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a `.safetensors` file.

    Raises:
      InputError: the file cannot be written, or a name of another program's file is no valid text.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        content = safetensors.numpy.save(contiguous, metadata=dict(metadata))
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: the name {quoted(error.object)} cannot be written as UTF-8") from error
    write_atomically(path, content)


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        found = safetensors.deserialize(path.read_bytes())
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: the file is damaged ({quoted(str(error))})") from error
    arrays = {}
    for name, tensor in found:
        dtype = SAFETENSORS_DTYPES.get(tensor["dtype"])
        if dtype is None:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise InputError(f"{path}: the dtype of {quoted(name)} must be one of {known}, got {tensor['dtype']}")
        try:
            arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
        except (ValueError, OverflowError) as error:
            raise InputError(f"{path}: {quoted(name)} has no shape of NumPy: {quoted(tensor['shape'])}") from error
    return arrays, metadata


def _arrays(path: Path, saved: Any) -> dict[str, np.ndarray]:
    """Returns the named arrays of a saved object without other values (epochs, an optimizer)."""
    weights = _state_dict(saved) or {}
    unknown = next((value for value in _values(weights or saved) if isinstance(value, Unknown)), None)
    if unknown is not None:
        raise InputError(
            f"{path}: refused, its weights use {quoted(unknown.name)}, which no weights file needs; no code was run; "
            "save the state_dict of the model, which holds tensors only"
        )
    arrays, size = {}, 0
    for name, value in weights.items():
        if not isinstance(value, Tensor | PickledArray):
            continue
        if not isinstance(name, str):
            raise InputError(f"{path}: the name of a tensor must be text, got {quoted(name)}")
        arrays[name] = value.read(f"{path}: tensor {quoted(name)}")
        size += arrays[name].nbytes
    if not arrays:
        raise InputError(
            f"{path}: contains no named tensors; it must be a state_dict or have one as entry {', '.join(WRAPPINGS)}"
        )
    if size > MAX_SHARING * path.stat().st_size:
        raise InputError(f"{path}: its tensors share numbers: they hold {size} bytes, more than {MAX_SHARING} files")
    return arrays


def _state_dict(saved: Any, levels: int = LEVELS) -> dict | None:
    """Returns the dictionary of tensors inside the usual wrappings; None where there is none."""
    if not isinstance(saved, dict) or levels == 0:
        return None
    for wrapping in WRAPPINGS:
        found = _state_dict(saved.get(wrapping), levels - 1)
        if found is not None:
            return found
    return saved if any(isinstance(value, Tensor | PickledArray) for value in saved.values()) else None


def _values(saved: Any) -> Iterator[Any]:
    """Yields what can be weights: the object itself, the entries of a wrapping, the other entries."""
    yield saved
    if isinstance(saved, dict):
        for wrapping in WRAPPINGS:
            entry = saved.get(wrapping)
            yield entry
            yield from entry.values() if isinstance(entry, dict) else ()
        yield from saved.values()


def _without_prefixes(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays under the names that they have in the detector itself; all names where two would be one."""
    renamed = {PREFIXES.sub("", name): array for name, array in arrays.items()}
    return renamed if len(renamed) == len(arrays) else arrays
