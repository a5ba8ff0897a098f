"""Weights files below 1 MB that made a reader hang, crash or fill the memory, or could."""

import json
import struct
import zipfile
from pathlib import Path

import foreign_files
import numpy as np
from foreign_files import Call, Global

SIZE = 300_000  # bytes
DEPTH = 100_000
MODULUS = 2**61 - 1  # of Python's hashes of numbers
DOUBLED = b")" + b"2\x86" * 64  # a tuple that holds a tuple twice, which holds a tuple twice, ...: 2^64 elements
DOUBLED_LISTS = b"](K\x00K\x00e" + b"q\x00]q\x01(h\x00h\x00e" * 64
ORDERED, ENCODE = b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n"
RECONSTRUCT, FROM_BUFFER = b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.numeric\n_frombuffer\n"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R"


def text(content: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int, size: int) -> bytes:
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little")


def repeated(code: bytes) -> bytes:
    return code * (SIZE // len(code))


def calls(function: bytes, arguments: bytes) -> bytes:
    """Returns a list of many calls with the same arguments."""
    return function + b"q\x00" + arguments + b"q\x01(" + repeated(b"h\x00h\x01R")[: SIZE // 2] + b"l"


HALF = b"a" * (SIZE // 2)
# Each is a pickle without its first instruction and its STOP.
PROGRAMS = {
    "doubled tuples": DOUBLED,
    "doubled tuples as a key": b"}" + DOUBLED + b"Ns",
    "doubled tuples as a dtype": b"cnumpy\ndtype\n" + DOUBLED + b"\x85R",
    "doubled tuples as a name": DOUBLED + DOUBLED + b"\x93",
    "doubled tuples as arguments": b"cunknown\nClass\n" + DOUBLED + b"R",
    "doubled lists": DOUBLED_LISTS,
    "doubled lists as a shape": FROM_BUFFER + b"(C\x00" + DTYPE + DOUBLED_LISTS + b"X\x01\x00\x00\x00CtR",
    "doubled lists as items": ORDERED + DOUBLED_LISTS + b"\x85R",
    "a list of itself": b"]q\x00h\x00a",
    "a model of itself": b"}q\x00" + text(b"model") + b"h\x00s",
    "nested tuples": b")" + b"\x85" * DEPTH,
    "nested tuples as a key": b"}" + b")" + b"\x85" * DEPTH + b"Ns",
    "nested lists": b"]" * DEPTH + b"a" * (DEPTH - 1),
    "nested dictionaries": b"}" + b"N}" * DEPTH + b"s" * DEPTH,
    "keys of one hash": b"}(" + b"".join(number(i * MODULUS, 10) + b"N" for i in range(1, SIZE // 13)) + b"u",
    "memo numbers of one hash": b"N" + b"".join(b"p%d\n" % (i * MODULUS) for i in range(1, SIZE // 26)),
    "a memo number of 2^32": b"Nr\xff\xff\xff\xff",
    "a frame of 2^64 bytes": b"\x95" + b"\xff" * 8 + b"N",
    "a frame that ends inside an argument": b"\x95" + struct.pack("<Q", 3) + b"C\x03.\x82\xf1",
    "sets": b"(" + b"\x8f" * DEPTH + b"l",
    "dictionaries": b"(" + b"}" * DEPTH + b"l",
    "marks": b"(" * DEPTH,
    "a number of 300,000 bytes": b"\x8b" + struct.pack("<I", SIZE) + b"\x7f" * SIZE,
    "a number of 300,000 digits": b"I" + b"9" * SIZE + b"\n",
    "large numbers as a shape": FROM_BUFFER + b"(C\x00"
    + DTYPE + b"(" + number(2**2000, 255) * 64 + b"tX\x01\x00\x00\x00CtR",
    "one text is encoded often": calls(ENCODE, text(HALF) + text(b"latin1") + b"\x86"),
    "one list becomes many dictionaries": calls(ORDERED, b"](" + b"N)\x86" * (SIZE // 8) + b"e\x85"),
    "one text is the numbers of many arrays": RECONSTRUCT + b"NNN\x87R(NM" + struct.pack("<H", SIZE // 8) + b"\x85"
    + DTYPE + b"\x89" + text(HALF) + b"tq\x01b" + repeated(b"h\x01b")[: SIZE // 2],
    "long arguments of an unknown class": b"(" + b"N" * (SIZE // 2) + b"tq\x00cunknown\nClass\nq\x01}q\x02("
    + repeated(b"h\x01h\x00h\x02\x92")[: SIZE // 2] + b"l",
}  # fmt: skip


def overlapping(path: Path) -> None:
    """Writes a zip whose entries all lie on the same bytes, each of nearly the whole file."""
    foreign_files.write_zip(path, {"a": np.zeros(SIZE // 8, np.float32)})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
        (one,) = (entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    directory = content[start : content.rindex(b"PK\x05\x06")]
    place = directory.rindex(b"PK\x01\x02", 0, directory.rindex(b"archive/data/0"))
    header = bytearray(directory[place : directory.find(b"PK\x01\x02", place + 4)])
    directory += bytes(header) * 1000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1004, 1004, len(directory), start, 0)
    path.write_bytes(content[:start] + directory + end)
    assert one.file_size > SIZE // 3


def many_views(path: Path) -> None:
    """Writes a file of 2,000 tensors that all view one storage, as some optimizers keep all weights in one buffer."""
    base = np.zeros(180_000, np.float32)
    foreign_files.write_zip(path, {f"{i}": base[i * 5 : i * 5 + 5] for i in range(2_000)})


def repeated_views(path: Path) -> None:
    """Writes a file whose tensors are all the whole storage."""
    base = np.zeros(100_000, np.float32)
    foreign_files.write_zip(path, {f"layer{i}.running_var": base[:] for i in range(1_000)})


def tensors(path: Path, shape: tuple, strides: tuple) -> None:
    storage = foreign_files.Storage("0", np.zeros(4, np.float32))
    rebuilt = Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides))
    foreign_files.write_zip(path, {"a": rebuilt}, extra={"archive/data/0": bytes(16)}.items())


def persistent_id(path: Path) -> None:
    pid = b"(" + DOUBLED * 5 + b"t"
    foreign_files.write_zip(path, {}, extra=[("archive/data.pkl", b"\x80\x04" + pid + b"Q.")])


def safetensors(path: Path, header: bytes, size: int | None = None, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + data)


def tensor_header(dtype: str, shape: list, end: int, **other) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}} | other).encode()


FILES = {
    "overlapping entries.pth": overlapping,
    "many views of one storage.pth": many_views,
    "many views of a whole storage.pth": repeated_views,
    "doubled tuples as a persistent id.pth": persistent_id,
    "a shape of 2^62.pth": lambda path: tensors(path, (0, 2**62, 2**62), (1, 1, 1)),
    "strides of 0.pth": lambda path: tensors(path, (2**40,), (0,)),
    "a header of 2^62 bytes.safetensors": lambda path: safetensors(path, b"{}", 2**62),
    "a header of 300,000 brackets.safetensors": lambda path: safetensors(path, b'{"a":' + b"[" * SIZE),
    "metadata of brackets.safetensors": lambda path: safetensors(path, b'{"__metadata__":' + b'{"a":' * (SIZE // 5)),
    "a shape of 2^62.safetensors": lambda path: safetensors(path, tensor_header("F32", [2**62, 0], 0)),
    "a shape of 2^64.safetensors": lambda path: safetensors(path, tensor_header("F32", [2**62, 4], 0)),
    "100 axes.safetensors": lambda path: safetensors(path, tensor_header("F32", [1] * 100, 4), data=bytes(4)),
    "offsets of 2^62.safetensors": lambda path: safetensors(path, tensor_header("U8", [2**62], 2**62)),
}


def write_all(folder: Path) -> list[Path]:
    """Writes every hostile file into a folder and returns their paths."""
    for name, program in PROGRAMS.items():
        (folder / f"{name}.pkl").write_bytes(b"\x80\x04" + program + b".")
    for name, write in FILES.items():
        write(folder / name)
    paths = sorted(folder.iterdir())
    assert len(paths) == len(PROGRAMS) + len(FILES)
    assert all(path.stat().st_size < 1.1e6 for path in paths)
    return paths
