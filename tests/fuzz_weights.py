"""Changes weights files at random and reads them: python tests/fuzz_weights.py --minutes 10

A healthy file of each kind gets changes of its bytes, of its pickle inside a correct zip, or of its header. Some files
are programs of random pickle instructions. In every case the reader must, within seconds and 1 GB, return arrays no
larger than the file allows, or raise InputError with one sentence that names the file, and it must not import or run
anything. `--guided` lets atheris, if it is installed, choose the changes by the lines that they reach.
"""

import argparse
import codecs
import importlib
import json
import pickle
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import foreign_files
import fuzz_readers
import numpy as np
import safetensors.numpy

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.weights import files

WEIGHTS = OrderedDict(
    {
        "module.conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
        "module.conv.bias": np.ones(3, np.float32),
    }
)
TRAINING = {
    "epoch": 3,
    "model": WEIGHTS,
    "optimizer": {"state": {0: {"momentum_buffer": np.ones(2, np.float32)}}, "lr": 0.1},
    "args": argparse.Namespace(lr=0.1, device="cuda"),
}
NAMES = [
    b"collections OrderedDict", b"torch._utils _rebuild_tensor_v2", b"torch._utils _rebuild_parameter",
    b"torch FloatStorage", b"numpy dtype", b"numpy ndarray", b"numpy.core.multiarray _reconstruct",
    b"numpy.core.multiarray scalar", b"numpy.core.numeric _frombuffer", b"_codecs encode", b"__builtin__ bytes",
    b"os system", b"builtins exec", b"argparse Namespace",
]  # fmt: skip
TEXTS = [b"model", b"state_dict", b"a", b"storage", b"0", b"cpu", b"f4", b"<", b"latin1", b"C", b"\x1b[2J", b""]
SIZES = [0, 1, 2, 3, 4, 8, 64, 255, 2**31, 2**32, 2**61 - 1, 2**63, 2**64, 2**70]
EVENTS = ("exec", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
MAX_SECONDS, MAX_BYTES, MAX_MESSAGE = 5.0, 10**9, 1500
reached: list[str] = []  # by code of a file


def watch(event: str, arguments: tuple) -> None:
    if event in EVENTS or (event == "import" and str(arguments[0]).partition(".")[0] in ("os", "argparse", "torch")):
        reached.append(f"{event} {arguments}")


def size(rng: random.Random) -> int:
    return rng.choice(SIZES) if rng.randrange(8) == 0 else rng.randrange(6)


def argument(rng: random.Random, instruction: pickletools.OpcodeInfo) -> bytes:
    """Returns an argument that the instruction can have."""
    kind = instruction.arg.name if instruction.arg else ""
    text = rng.choice(TEXTS) if rng.randrange(4) else rng.randbytes(rng.randrange(9))
    if kind == "stringnl_noescape_pair":
        return rng.choice(NAMES).replace(b" ", b"\n") + b"\n"
    if kind in ("decimalnl_short", "decimalnl_long"):
        return b"%d\n" % size(rng)
    if kind == "floatnl":
        return rng.choice((b"1.5\n", b"nan\n", b"x\n"))
    if kind in ("stringnl", "stringnl_noescape", "unicodestringnl"):
        return b"'" + text.replace(b"\n", b"") + b"'\n"
    fixed = {"uint1": 1, "uint2": 2, "int4": 4, "uint4": 4, "uint8": 8, "float8": 8}
    if kind in fixed:
        return (size(rng) % 256 ** fixed[kind]).to_bytes(fixed[kind], "little")
    if not kind:
        return b""
    width = 8 if kind.endswith("8") else 1 if kind.endswith("1") else 4
    length = size(rng) % 256**width if rng.randrange(8) == 0 else len(text)
    return length.to_bytes(width, "little") + text


def program(rng: random.Random) -> bytes:
    """Returns a pickle of random instructions, most of them those that build values and call names."""
    common = [pickletools.code2op[code] for code in "(]})0uesabRtq\x85\x86\x87\x94KXCcQh2N\x88M\x81o\x93\x8a"]
    code = b"\x80\x02"
    for _ in range(rng.randrange(1, 60)):
        one = rng.choice(common if rng.randrange(8) else pickletools.opcodes)
        if one.name not in ("STOP", "PROTO"):
            code += one.code.encode("latin1") + argument(rng, one)
    return code + b"."


def changed_program(rng: random.Random, code: bytes) -> bytes:
    """Returns the pickle with some of its instructions removed, repeated, exchanged or replaced."""
    starts = [position for *_, position in pickletools.genops(code)] + [len(code)]
    parts = [code[start:end] for start, end in zip(starts, starts[1:], strict=False)]
    for _ in range(rng.randrange(1, 5)):
        place, other, kind = rng.randrange(len(parts)), rng.randrange(len(parts)), rng.randrange(5)
        if kind == 0 and len(parts) > 1:
            del parts[place]
        elif kind == 1:
            parts.insert(place, parts[other])
        elif kind == 2:
            parts[place], parts[other] = parts[other], parts[place]
        else:
            one = rng.choice(pickletools.opcodes)
            parts[place] = one.code.encode("latin1") + argument(rng, one)
    return b"".join(parts)


def zipped(folder: Path, code: bytes) -> bytes:
    foreign_files.write_zip(folder / "made", TRAINING, extra=[("archive/data.pkl", code)])
    return (folder / "made").read_bytes()


def prepare(folder: Path) -> dict[str, bytes]:
    """Returns a healthy file of each kind; every one is read once, so that later reads import nothing."""
    for encoding in ("raw_unicode_escape", "unicode_escape", "cp437", "latin1"):
        codecs.lookup(encoding)  # imports the module of the codec
    made = folder / "made"
    content = {}
    for name, write in (
        ("zip", lambda: foreign_files.write_zip(made, TRAINING)),
        ("legacy", lambda: foreign_files.write_legacy(made, TRAINING)),
        ("pkl 2", lambda: foreign_files.write_python2_pkl(made, {"blobs": WEIGHTS})),
        ("pkl 5", lambda: made.write_bytes(pickle.dumps({"model": dict(WEIGHTS)}, 5))),
        ("safetensors", lambda: safetensors.numpy.save_file(WEIGHTS, made, metadata={"weights_format": "caffe"})),
    ):
        write()
        assert files.read(made).arrays
        content[name] = made.read_bytes()
    return content


def spoiled(rng: random.Random, folder: Path, healthy: dict[str, bytes]) -> bytes:
    """Returns a file with random faults."""
    kind = rng.choice((*healthy, "program", "program", "zip of a program", "changed zip", "changed pkl", "header"))
    code = (
        pickletools.optimize(foreign_files.pickled(TRAINING)) if rng.randrange(2) else foreign_files.pickled(TRAINING)
    )
    if kind == "program":
        return program(rng)
    if kind == "zip of a program":
        return zipped(folder, program(rng))
    if kind == "changed zip":
        return zipped(folder, changed_program(rng, code))
    if kind == "changed pkl":
        return changed_program(rng, healthy[rng.choice(("pkl 2", "pkl 5"))])
    if kind == "header":
        content = healthy["safetensors"]
        end = 8 + int.from_bytes(content[:8], "little")
        header = fuzz_readers.spoil_json(rng, json.loads(content[8:end]))
        header = json.dumps(header).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(header)) + header + content[end:]
    content = healthy[kind]
    for _ in range(rng.randrange(1, 4)):
        content = fuzz_readers.spoil_bytes(rng, content)
    return content


def check(path: Path) -> bool:
    """Returns whether the file was read; AssertionError: neither valid arrays nor a valid error came of it."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        weights = files.read(path)
    except InputError as error:
        message = str(error)
        assert str(path) in message and message.isprintable() and len(message) < MAX_MESSAGE, message
        weights = None
    assert time.process_time() - started < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_BYTES
    assert not reached, reached
    if weights is None:
        return False
    assert weights.arrays and all(isinstance(name, str) for name in weights.arrays)
    assert sum(array.nbytes for array in weights.arrays.values()) <= files.MAX_SHARING * path.stat().st_size
    for array in weights.arrays.values():
        array.sum(dtype=np.float64)  # every number can be read
    return True


def attempt(folder: Path, seed: int, healthy: dict[str, bytes]) -> bool:
    """Changes a file at random by `seed`; returns whether it could be read."""
    path = folder / "weights"
    path.write_bytes(spoiled(random.Random(seed), folder, healthy))
    return check(path)


def guided(folder: Path, minutes: float) -> None:
    """Lets atheris choose the bytes; ends the process."""
    import atheris  # noqa: PLC0415 (not a dependency)

    global files  # noqa: PLW0603
    instrumented = ("fasterrcnn_jax.weights", "pickletools", "zipfile")
    for name in [name for name in sys.modules if name.startswith(instrumented)]:
        del sys.modules[name]
    with atheris.instrument_imports(include=instrumented):
        files = importlib.import_module("fasterrcnn_jax.weights.files")
    healthy, corpus = prepare(folder), folder / "corpus"
    corpus.mkdir()
    for name, content in healthy.items():
        (corpus / name).write_bytes(content)
    path = folder / "weights"

    def one(content: bytes) -> None:
        path.write_bytes(content)
        check(path)

    reached.clear()
    atheris.Setup([sys.argv[0], f"-max_total_time={int(60 * minutes)}", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--guided", action="store_true", help="by atheris")
    arguments = parser.parse_args()
    end, seed, read, failed = time.monotonic() + 60 * arguments.minutes, arguments.seed, 0, 0
    sys.addaudithook(watch)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.guided:
            guided(Path(folder), arguments.minutes)
        healthy = prepare(Path(folder))
        reached.clear()
        while time.monotonic() < end:
            try:
                read += attempt(Path(folder), seed, healthy)
            except Exception as error:
                failed += 1
                print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            seed += 1
    print(f"{seed - arguments.seed} executions, {read} of them read, {failed} failures")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
