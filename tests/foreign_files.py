"""Writes weights files as torch and Python 2 do, without either of them."""

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

STORAGES = {
    "bool": "Bool",
    "uint8": "Byte",
    "int8": "Char",
    "int16": "Short",
    "int32": "Int",
    "int64": "Long",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "float32": "Float",
    "float64": "Double",
}


class Global(NamedTuple):
    """Pickles as a global name, which need not exist."""

    module: str
    name: str

    def __call__(self):
        raise AssertionError("only named")


class Call(NamedTuple):
    """Pickles as a call."""

    function: Global
    arguments: tuple
    state: object = None


class Storage(NamedTuple):
    key: str
    numbers: np.ndarray  # [n]


class Pickler(pickle._Pickler):
    """Pickles `Global` and `Call` as opcodes and arrays as torch tensors; `storages` are outside of the pickle."""

    dispatch = pickle._Pickler.dispatch.copy()

    def __init__(self, file, *, legacy=False, protocol=2, torch="torch"):
        super().__init__(file, protocol)
        self.legacy, self.torch = legacy, torch
        self.storages = []

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        kind = Global(self.torch, f"{STORAGES[obj.numbers.dtype.name]}Storage")
        pid = ("storage", kind, obj.key, "cpu", obj.numbers.size)
        return (*pid, None) if self.legacy else pid

    def save_name(self, obj):
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save_reduce(obj.function, obj.arguments, obj.state)

    def save_array(self, obj):
        # An array that is no array of its own is a view of its base, as in torch.
        whole = obj if obj.base is None else obj.base
        held = [storage for storage in self.storages if storage.numbers.base is whole]
        storage = held[0] if held else Storage(str(len(self.storages)), whole.ravel())
        self.storages += [] if held else [storage]
        offset = (obj.ctypes.data - whole.ctypes.data) // obj.itemsize
        strides = tuple(stride // obj.itemsize for stride in obj.strides)
        arguments = (storage, offset, obj.shape, strides)
        name = "_rebuild_tensor" if self.legacy else "_rebuild_tensor_v2"
        arguments += () if self.legacy else (False, OrderedDict())
        self.save_reduce(Global("torch._utils", name), arguments)

    dispatch[Global] = save_name
    dispatch[Call] = save_call
    dispatch[np.ndarray] = save_array


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2: text and bytes are one type, and arrays are written as by NumPy before version 2."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_text(self, obj):
        raw = obj if isinstance(obj, bytes) else obj.encode("latin1")
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)

    def save_array(self, obj):
        dtype = Call(Global("numpy", "dtype"), ("f4", 0, 1), (3, "<", None, None, None, -1, -1, 0))
        state = (1, obj.shape, dtype, False, obj.tobytes())
        self.save_reduce(
            Global("numpy.core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,), b"b"), state
        )

    dispatch[str] = dispatch[bytes] = save_text
    dispatch[Global] = Pickler.save_name
    dispatch[Call] = Pickler.save_call
    dispatch[np.ndarray] = save_array


def pickled(obj, **options) -> bytes:
    file = io.BytesIO()
    Pickler(file, **options).dump(obj)
    return file.getvalue()


def write_zip(path, obj, *, folder="archive", extra=(), compression=zipfile.ZIP_STORED) -> None:
    """Writes as torch.save does since version 1.6; `extra` (name, bytes) entries replace its own."""
    file = io.BytesIO()
    pickler = Pickler(file)
    pickler.dump(obj)
    entries = {f"{folder}/data.pkl": file.getvalue(), f"{folder}/byteorder": b"little"}
    entries |= {f"{folder}/data/{storage.key}": storage.numbers.tobytes() for storage in pickler.storages}
    entries |= {f"{folder}/version": b"3\n", **dict(extra)}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            if content is not None:
                archive.writestr(name, content)


def write_legacy(path, obj, *, little_endian=True, torch="torch") -> None:
    """Writes as torch.save did before version 1.6."""
    file = io.BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": little_endian}):
        pickle.dump(header, file, 2)
    pickler = Pickler(file, legacy=True, torch=torch)
    pickler.dump(obj)
    pickle.dump([storage.key for storage in pickler.storages], file, 2)
    for storage in pickler.storages:
        file.write(storage.numbers.size.to_bytes(8, "little") + storage.numbers.tobytes())
    path.write_bytes(file.getvalue())


def write_python2_pkl(path, obj) -> None:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(obj)
    path.write_bytes(file.getvalue())
