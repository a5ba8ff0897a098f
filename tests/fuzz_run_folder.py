"""Changes the files of a run folder at random and reads them: python tests/fuzz_run_folder.py --minutes 10

Every reader must, within seconds, return what it declares, or raise InputError with one sentence that names the file.
Damaged lines of metrics.jsonl must not even raise: they are removed.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import tiny
from fuzz_readers import BYTES, MAX_SECONDS, spoil_bytes, spoil_json

from fasterrcnn_jax.config import Config, ModelConfig
from fasterrcnn_jax.config.text import from_json, to_json
from fasterrcnn_jax.data.proposal_files import read_proposals
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.training import checkpoint, replay
from fasterrcnn_jax.training.progress import MetricsWriter

RUN = Path(__file__).parent / "golden" / "run_of_0.1.0.tar.gz"
LINES = [
    b'{"step": true}', b'{"step": 1e400}', b'{"step": NaN}', b'{"step": -1}', b'{"step": 1.0}', b'{"step": null}',
    b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 10000000000000000000000}', b"\0" * 512, b"\xff\xfe", b"[]", b"1",
    b"[" * 100_000, b'{"step": "1"}', '{"step": "\u0663"}'.encode(), b"", b"\r", b'{"step": 1, "loss": "\xff"}',
]  # fmt: skip
NAMES = ["²", "١", "007", "-1", "1_0", "+5", " 3", "9" * 30, "0", "1", "3", "x", "2.orbax-checkpoint-tmp", "2.damaged"]
NUMBERS = [0, -1, 2**31, 2**63 - 1, 7, 1]
DTYPES = ["float64", "float16", "int8", "bool", "int64", "complex64", "S3", "U2"]


def prepare(folder: Path) -> None:
    with tarfile.open(RUN) as archive:
        archive.extractall(folder, filter="data")
    shutil.move(folder / "run", folder / "healthy")
    (folder / "proposals").mkdir()
    boxes = np.zeros((3, 4), np.float32)
    counts = np.array([1, 2])
    arrays = {"boxes": boxes, "scores": np.zeros(3, np.float32), "counts": counts}
    np.savez(folder / "proposals.npz", **arrays)
    truth = {"boxes": np.zeros((1, 2, 4), np.float32), "labels": np.zeros((1, 2), np.int32)}
    truth["valid"] = np.zeros((1, 2), bool)
    batch = {"images": np.zeros((1, 16, 16, 3), np.float32), "image_hw": np.ones((1, 2), np.float32)}
    batch |= {"scale": np.ones((1, 2), np.float32), "image_index": np.zeros(1, np.int32)}
    batch |= {"image_valid": np.ones(1, bool), "step": np.int64(3), "ids": np.array(["a"])}
    np.savez(folder / "batch.npz", **batch, **{f"ground_truth.{name}": array for name, array in truth.items()})


def spoiled(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.choice((0, 1, 1, 2))):
        content = spoil_bytes(rng, content)
    return content


def spoil_arrays(rng: random.Random, path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file with up to two of them removed or of another type, shape or value."""
    arrays = dict(np.load(path))
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(arrays))
        kind = rng.randrange(5)
        if kind == 0:
            del arrays[name]
        elif kind == 1 and arrays[name].dtype.kind in "fib":
            with np.errstate(all="ignore"):
                arrays[name] = arrays[name].astype(rng.choice(DTYPES))
        elif kind == 2:
            arrays[name] = arrays[name].reshape(-1)[: rng.randrange(4)]
        elif kind == 3 and arrays[name].dtype.kind in "fi":
            value = rng.choice(NUMBERS) if arrays[name].dtype.kind == "i" else np.float32(np.nan)
            arrays[name] = np.full(arrays[name].shape, value)
        else:
            arrays[name] = arrays[name][None]
    return arrays


def spoiled_batch(rng: random.Random, folder: Path) -> bytes:
    arrays = spoil_arrays(rng, folder / "batch.npz")
    if rng.randrange(6) == 0:
        arrays[rng.choice(list(arrays))] = np.array([{"a": 1}], object)  # np.load would unpickle it
    content = io.BytesIO()
    rng.choice((np.savez, np.savez_compressed))(content, **arrays)
    content = content.getvalue()
    if rng.randrange(4) == 0:
        content = content.replace(b"(1, 16, 16, 3)", b"(1, %d, 6, 3)" % rng.choice((10**3, 10**4)))
    return spoiled(rng, content)


def spoiled_proposals(rng: random.Random, folder: Path) -> bytes:
    arrays = {
        name: np.ascontiguousarray(array)
        for name, array in spoil_arrays(rng, folder / "proposals.npz").items()
        if array.dtype.kind in "fib"
    }
    ids = json.dumps(spoil_json(rng, ["a", "b"]) if rng.randrange(2) else ["a", "b"])
    return spoiled(rng, safetensors.numpy.save(arrays, {"ids": ids, "made_by": "w"}))


def spoiled_config(rng: random.Random, config) -> str:
    content = json.loads(to_json(config))
    for _ in range(rng.randrange(1, 4)):
        if isinstance(content, dict | list):
            content = spoil_json(rng, content)
    text = json.dumps(content).encode()
    return (spoiled(rng, text) if rng.randrange(2) else text).decode(errors="replace")


def spoil_checkpoint(rng: random.Random, run: Path) -> None:
    """Changes one checkpoint. In half of the cases the digest of `meta` fits, as a stranger would make it."""
    step = run / "checkpoints" / "2"
    kind = rng.randrange(5)
    files = sorted(path for path in step.rglob("*") if path.is_file())
    if kind == 0:
        path = rng.choice(files)
        path.write_bytes(spoiled(rng, path.read_bytes()))
    elif kind == 1:
        path = rng.choice(sorted(step.rglob("*")))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif kind == 2:
        shutil.copytree(step, run / "checkpoints" / rng.choice(NAMES), dirs_exist_ok=True)
    else:
        texts = json.loads((step / "meta" / "_strings.json").read_text())
        name = rng.choice([*texts, "version", "iterator", "metrics"])
        values = ["²", "-1", "0", "3", "null", "[]", "{", "NaN", '{"next_index": -1}', "[" * 10_000, '"\\ud800"']
        if kind == 3 and name == "config":
            texts[name] = spoiled_config(rng, from_json(texts["config"], ""))
        elif kind == 3:
            texts[name] = rng.choice(values)
        else:
            texts = spoil_json(rng, texts)
        write_texts(step, texts)


def write_texts(step: Path, texts) -> None:
    """Writes the texts of a checkpoint, with the digest that fits if they are texts."""
    if isinstance(texts, dict):
        path = step / "meta" / "_METADATA"
        metadata = json.loads(path.read_text())
        value = {"value_type": "string", "skip_deserialize": False}
        metadata["tree_metadata"] = {
            f"('{name}',)": {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": value} for name in texts
        }
        path.write_text(json.dumps(metadata))
        rest = {name: str(text) for name, text in texts.items() if name != "digest"}
        texts = texts | {"digest": checkpoint._digest_of_texts(rest)} if "digest" in texts else texts
    (step / "meta" / "_strings.json").write_text(json.dumps(texts))


def reads(rng: random.Random, folder: Path) -> tuple[Path, list]:
    """Writes one changed file; returns what an error must name, and the functions that read it."""
    kind = rng.choice(["metrics", "batch", "proposals", "config", "config", "model", "checkpoint"])
    if kind == "batch":
        path = folder / "step.npz"
        path.write_bytes(spoiled_batch(rng, folder))
        return path, [lambda: replay.read_batch(path)]
    if kind == "proposals":
        path = folder / "p.safetensors"
        path.write_bytes(spoiled_proposals(rng, folder))
        return path, [lambda: read_proposals(path)]
    if kind in ("config", "model"):
        config, of = (tiny.config(folder), Config) if kind == "config" else (tiny.MODEL, ModelConfig)
        text = spoiled_config(rng, config)
        return folder, [lambda: from_json(text, str(folder), of=of)]
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "healthy", run)
    if kind == "checkpoint":
        spoil_checkpoint(rng, run)

        def opened():
            with checkpoint.open_checkpoints(run, keep=2) as checkpoints:
                checkpoint.best(checkpoints)

        return run, [lambda: checkpoint.load_run_config(run), lambda: checkpoint.load(run), opened]
    lines = [b'{"step": %d, "loss": 0.5}' % step for step in range(1, 5)]
    for _ in range(rng.randrange(1, 4)):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES + BYTES))
    (run / "metrics.jsonl").write_bytes(spoiled(rng, b"\n".join(lines) + b"\n"))

    def continued():
        try:
            with MetricsWriter(run, after=3) as metrics:
                metrics.write(4, {"loss": 0.5})
        except InputError as error:
            raise AssertionError(f"a damaged line keeps the run from being continued: {error}") from error
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1] == 4 and all(type(step) is int and step <= 3 for step in steps[:-1]), steps

    return run, [continued]


def attempt(folder: Path, seed: int) -> bool:
    """Changes a file at random by `seed` and reads it; returns whether all readers accepted it."""
    accepted = True
    where, functions = reads(random.Random(seed), folder)
    for function in functions:
        started = time.process_time()
        try:
            function()
        except InputError as error:
            message = str(error)
            assert str(where) in message and "\n" not in message and len(message) < 3000, message
            accepted = False
        assert time.process_time() - started < MAX_SECONDS
    return accepted


@contextlib.contextmanager
def quiet():
    """Inside this context, the warnings about damaged files and the housekeeping of Orbax are not printed."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    arguments = parser.parse_args()
    end, seed, read, failed = time.monotonic() + 60 * arguments.minutes, arguments.seed, 0, 0
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepare(Path(folder))
        while time.monotonic() < end:
            try:
                read += attempt(Path(folder), seed)
            except Exception as error:
                failed += 1
                print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            seed += 1
    count = seed - arguments.seed
    print(f"{count} executions, {read} of them read, {failed} failures")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
