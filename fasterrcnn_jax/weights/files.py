"""Reads and writes files of named arrays. The first bytes of a file show its kind."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.regular_files import check_regular
from fasterrcnn_jax.weights import numpy_pickle, torch_files
from fasterrcnn_jax.weights.numpy_pickle import PickledArray
from fasterrcnn_jax.weights.torch_files import LEGACY_START, Tensor

# torchvision's file names end in the first digits of the SHA-256. These are the digits of the ResNets, VGG16 and the
# detectors.
DIGITS = {
    *("f37072fd", "b627a593", "0676ba61", "11ad3fa6", "63fe2227", "cd907fc2", "394f9c45", "f82ba261"),
    *("397923af", "6c64b313", "258fb6c6", "dd69338a"),
}
# Entries that contain the weights in files of training programs and of Detectron.
WRAPPINGS = ("model", "blobs")


class Weights(NamedTuple):
    """The named arrays of a file, in the layout of the program that wrote it."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]  # of a `.safetensors` file, otherwise empty
    sha256: str


def read(path: Path) -> Weights:
    """Returns the weights of a `.safetensors`, `.pth` or `.pkl` file; runs no code in it.

    Raises:
      InputError: the file does not have the checksum in its name, is damaged or of an unknown kind, or would run
        code.
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
        return Weights(*_read_safetensors(path), sha256)
    if start.startswith(b"PK"):
        saved = torch_files.read_zip(path)
    elif start.startswith(LEGACY_START):
        saved = torch_files.read_legacy(path)
    elif start.startswith(b"\x80"):
        saved = numpy_pickle.read(path.read_bytes(), str(path))
    else:
        raise InputError(f"{path}: must be .safetensors, a .pth file of torch.save or a .pkl file of NumPy arrays")
    return Weights(_arrays(path, saved), {}, sha256)


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a `.safetensors` file.

    Raises:
      InputError: the file cannot be written.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        safetensors.numpy.save_file(contiguous, path, metadata=dict(metadata))
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: the file cannot be written ({error})") from error


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: the file is damaged ({error})") from error


def _arrays(path: Path, saved: Any) -> dict[str, np.ndarray]:
    """Returns the named arrays of a saved object without other values (epochs, an optimizer)."""
    for wrapping in WRAPPINGS:
        if isinstance(saved, dict) and isinstance(saved.get(wrapping), dict):
            saved = saved[wrapping]
    arrays = {}
    for name, value in saved.items() if isinstance(saved, dict) else ():
        if not isinstance(value, Tensor | PickledArray):
            continue
        if not isinstance(name, str):
            raise InputError(f"{path}: the name of a tensor must be text, got {name!r}")
        arrays[name] = value.read()
    if not arrays:
        raise InputError(f"{path}: contains no named tensors; it must be a state_dict or have one as entry 'model'")
    return arrays
