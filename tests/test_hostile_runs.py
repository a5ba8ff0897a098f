"""Run folders and stored models of strangers: every damage is an InputError, and small files cost little."""

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

import budget
import fuzz_run_folder
import numpy as np
import pytest
import safetensors.numpy
import tensorstore
import tiny
from orbax.checkpoint import v1 as ocp

from fasterrcnn_jax import zoo
from fasterrcnn_jax.config import Config, ModelConfig
from fasterrcnn_jax.config.text import from_json, to_json
from fasterrcnn_jax.data.proposal_files import read_proposals
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import create_detector, empty_detector
from fasterrcnn_jax.models.layers import Undrawn
from fasterrcnn_jax.training import checkpoint, replay
from fasterrcnn_jax.training.progress import MetricsWriter
from fasterrcnn_jax.weights import save_weights

# When reading fails, Orbax leaves coroutines that were never awaited and callbacks to a closed event loop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings(
        "ignore:(?s)Exception ignored.*(never awaited|Event loop is closed):pytest.PytestUnraisableExceptionWarning"
    ),
]
NAME = "params/rpn_head/objectness/bias/value"


def go_on(run):
    """Opens the checkpoints as a training that continues."""
    checkpoint.open_checkpoints(Path(run), keep=2).close()


READERS = {"load": zoo.load, "go on": go_on, "replay": replay.read_batch}


def read(given):
    """Reads (name of the reader, path)."""
    READERS[given[0]](Path(given[1]))


def rewrite_texts(step, **changed):
    """Changes texts of a checkpoint as a stranger would, with a digest that fits; None removes a text."""
    texts = json.loads((step / "meta" / "_strings.json").read_text()) | changed
    fuzz_run_folder.write_texts(step, {name: text for name, text in texts.items() if text is not None})


def with_field(config, field, value):
    """Returns the JSON of a configuration in which one field, given as a path with dots, has another value."""
    content = json.loads(to_json(config))
    entry = content
    *parents, name = field.split(".")
    for parent in parents:
        entry = entry[parent]
    entry[name] = value
    return json.dumps(content)


# Fields of a stored model that no published network has in this size, and the message.
SIZES = {
    "backbone.width": (2**40, "width must be at most 1024"),
    "rpn.channels": (2**40, "channels must be at most"),
    "rpn.convs": (10**9, "convs must be at most 64"),
    "test_proposals.pre_nms_top_n": (10**9, "pre_nms_top_n must be at most"),
    "test_proposals.post_nms_top_n": (10**9, "post_nms_top_n must be at most"),
    "fpn": ({"channels": 2**40}, "channels must be at most 16384"),
    "box_head.convs": (10**9, "convs must be at most 64"),
    "roi_features.output_size": (10**6, "output_size must be at most 64"),
    "roi_features.sampling_ratio": (10**9, "sampling_ratio must be at most 16"),
    "box_head.layers": (10**9, "layers must be at most 64"),
    "box_head.channels": (2**50, "channels must be at most"),
    "postprocess.max_detections": (10**9, "max_detections must be at most"),
    "image.canvases": ([[2**30, 2**30]], "a canvas must have at most 8388608 pixels"),
}


@pytest.mark.parametrize("field", SIZES)
def test_a_size_beyond_any_network_is_refused_by_field(field):
    value, message = SIZES[field]
    with pytest.raises(InputError, match=f"^FILE: this configuration cannot be read: config.*{message}"):
        from_json(with_field(tiny.MODEL, field, value), "FILE", of=ModelConfig)


PRODUCTS = {
    "rpn.anchor_scales": ([1.0 + i for i in range(60_000)], "the number of anchors .* must be at most 4194304"),
    "roi_features": ({"output_size": 64, "sampling_ratio": 16}, "must be at most 2097152, got 8388608"),
    "test_proposals": ({"pre_nms_top_n": 10_000, "post_nms_top_n": 10_000}, "number of classes must be at most"),
}


@pytest.mark.parametrize("field", PRODUCTS)
def test_sizes_that_are_too_large_together_are_refused_with_the_file(field):
    value, message = PRODUCTS[field]
    config = from_json(with_field(tiny.MODEL, field, value), "FILE", of=ModelConfig)
    with pytest.raises(InputError, match=f"^FILE: .*{message}"):
        empty_detector(config, tuple(map(str, range(500))), where="FILE")


def stored_models(folder):
    """Returns (reader, path) and the message for files whose layers a network may have; drawn, they are 12 GB."""
    save_weights(create_detector(tiny.MODEL, tiny.CLASS_NAMES, seed=0), folder / "healthy.safetensors")
    with safetensors.safe_open(folder / "healthy.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    arrays = safetensors.numpy.load_file(folder / "healthy.safetensors")
    zoo.load(folder / "healthy.safetensors")
    wide, many = (json.loads(to_json(tiny.MODEL)) for _ in range(2))
    wide["backbone"] |= {"name": "resnet152", "width": 1024}
    many["test_proposals"] |= {"pre_nms_top_n": 10_000, "post_nms_top_n": 10_000}
    files = {
        "does not fit backbone/": (json.dumps(wide), tiny.CLASS_NAMES),
        "number of classes must be at most": (json.dumps(many), [f"class {i}" for i in range(500)]),
        "layers must be at most 64": (with_field(tiny.MODEL, "box_head.layers", 10**9), tiny.CLASS_NAMES),
    }
    for number, (message, (config, names)) in enumerate(files.items()):
        path = folder / f"{number}.safetensors"
        stored = metadata | {"model_config": config, "class_names": json.dumps(names)}
        safetensors.numpy.save_file(arrays, path, metadata=stored)
        yield ("load", str(path)), message


def declared(step, change):
    """Changes the description of one array in a checkpoint."""
    base = {"driver": "file", "path": f"{step / 'model'}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    described = json.loads(store.read(f"{NAME}/zarr.json").result().value)
    change(described, described["chunk_grid"]["configuration"], described["codecs"][0]["configuration"])
    store.write(f"{NAME}/zarr.json", json.dumps(described)).result()


ARRAYS = {
    "shape and chunk": lambda array, grid, shard: (array.update(shape=[2**38]), grid.update(chunk_shape=[2**38])),
    "shape": lambda array, grid, shard: array.update(shape=[2**40]),
    "chunk": lambda array, grid, shard: (grid.update(chunk_shape=[2**38]), array.update(codecs=shard["codecs"])),
    "many chunks": lambda array, grid, shard: (array.update(shape=[2**23]), grid.update(chunk_shape=[1])),
    "many inner chunks": lambda array, grid, shard: (
        shard.update(chunk_shape=[1]), array.update(shape=[2**22]), grid.update(chunk_shape=[2**22])
    ),
}  # fmt: skip


def checkpoints(folder, small_run):
    """Returns (reader, path) and the message for run folders that declare large arrays."""
    for kind, change in ARRAYS.items():
        run = Path(shutil.copytree(small_run, folder / kind))
        declared(run / "checkpoints" / "2", change)
        yield ("load", str(run)), "checkpoints/2.* damaged"
    # A training that continues reads the optimizer's arrays too, whose shapes no configuration states.
    yield ("go on", str(run)), "checkpoints/2.* damaged"
    wide = Path(shutil.copytree(small_run, folder / "wide run"))
    text = json.loads((wide / "checkpoints/2/meta/_strings.json").read_text())["config"]
    config = with_field(from_json(text, ""), "model.backbone.width", 1024)
    rewrite_texts(wide / "checkpoints" / "2", config=config)
    yield ("load", str(wide)), "does not fit its model"


def test_an_empty_detector_draws_nothing(monkeypatch):
    monkeypatch.setattr(Undrawn, "standard_normal", None, raising=False)
    empty = empty_detector(tiny.FPN, tiny.CLASS_NAMES)
    made = create_detector(tiny.FPN, tiny.CLASS_NAMES, seed=0)
    assert checkpoint._by_path(empty).keys() == checkpoint._by_path(made).keys()
    for path, leaf in checkpoint._by_path(made).items():
        shape = checkpoint._by_path(empty)[path]
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype) and not hasattr(shape, "addressable_data")


TEXTS = {
    "no version number": ({"version": "²"}, r"version must be a number, got '²'"),
    "a negative version": ({"version": "-1"}, "version must be a number"),
    "no configuration": ({"config": None}, "this configuration cannot be read"),
    "no digests": ({"digests": None}, r"incomplete or damaged \(KeyError\)"),
    "digests of nothing": ({"digests": "{}"}, r"incomplete or damaged \(KeyError\)"),
    "digests that are a list": ({"digests": "[]"}, r"incomplete or damaged \(TypeError\)"),
    "no position": ({"iterator": None}, r"incomplete or damaged \(KeyError\)"),
    "a position that is no JSON": ({"iterator": "{"}, r"incomplete or damaged \(JSONDecodeError\)"),
    "a deep position": ({"iterator": "[" * 100_000}, r"incomplete or damaged \(RecursionError\)"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_a_checkpoint_that_are_none_of_ours_are_refused(small_run, tmp_path, kind):
    changed, message = TEXTS[kind]
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    rewrite_texts(run / "checkpoints" / "2", **changed)
    with pytest.raises(InputError, match=f"checkpoints/2: .*{message}"):
        checkpoint.load(run)


def test_arrays_in_place_of_texts_are_refused_before_they_are_read(small_run, tmp_path):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    meta = run / "checkpoints" / "2" / "meta"
    texts = json.loads((meta / "_strings.json").read_text())
    ocp.save_checkpointables(tmp_path / "other", {"meta": texts | {"large": np.zeros(3, np.float32)}})
    shutil.rmtree(meta)
    shutil.copytree(tmp_path / "other" / "meta", meta)
    with pytest.raises(InputError, match=r"checkpoints/2: the checkpoint is damaged: meta\.large must be a text"):
        checkpoint.load(run)


@pytest.mark.parametrize("name", ["²", "١", "007", "-1", "1_0", " 3", "99999999999"])
def test_a_folder_name_that_is_no_step_is_refused_in_training_and_ignored_in_loading(small_run, tmp_path, name):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    (run / "checkpoints" / name).mkdir()
    assert checkpoint.load_run_config(run).data.class_names == tiny.CLASS_NAMES
    with pytest.raises(InputError, match=f"checkpoints/{name}: the name of a checkpoint folder must be a step number"):
        go_on(run)
    with pytest.raises(InputError, match="contains no checkpoint"):
        checkpoint.load(run / "checkpoints" / name)


def test_a_checkpoint_under_the_name_of_another_step_is_set_aside(small_run, tmp_path, caplog):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "9")
    go_on(run)
    assert "checkpoints/9: the checkpoint is of step 2; rename the folder to 2" in caplog.text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "9.damaged"]


BAD_JSON = {
    "a number that is text": ('"steps": 6', '"steps": "6"', "config.train.steps must be int or 'auto', got '6'"),
    "true as a number": ('"steps": 6', '"steps": true', "config.train.steps must be int or 'auto', got True"),
    "a huge number": ('"learning_rate": 0.01', f'"learning_rate": 1{"0" * 400}', "number below 2\\^63"),
    "infinity": ('"learning_rate": 0.01', '"learning_rate": 1e400', "learning_rate must be a number below 2\\^63"),
    "nan": ('"momentum": 0.9', '"momentum": NaN', "momentum must be a number below 2\\^63, got nan"),
    "a repeated field": ('"steps": 6', '"steps": 6, "steps": 7', "field 'steps' appears twice"),
    "an unknown field": ('"steps": 6', '"steps": 6, "step\\u001b": 7', r"has no field 'step\\x1b'"),
    "a missing field": ('"steps": 6,', "", "config.train needs a field 'steps'"),
    "a surrogate": ('"ring"', '"\\ud800"', "class_names must be text without NUL and surrogate"),
    "a null character": ('"ring"', '"a\\u0000"', "class_names must be text without NUL"),
    "a path with a null character": ('"train_split"', '"coco_images": "\\u0000", "train_split"', "appears twice"),
    "a pair of three": ("[\n          64,\n          96\n", "[\n          64,\n          96, 5\n", "canvases must be"),
    "a deep list": ('"steps": 6', f'"steps": {"[" * 50_000}', "recursion depth"),
    "a list of lists": ('"steps": 6', f'"steps": {"[" * 900}{"]" * 900}', "config.train.steps|recursion"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_a_configuration_that_is_damaged_is_refused_by_field(tmp_path, kind):
    old, new, message = BAD_JSON[kind]
    text = to_json(tiny.config(tmp_path))
    assert old in text
    with pytest.raises(InputError, match=f"(?s)^FILE: this configuration cannot be read: .*(?:{message})") as caught:
        from_json(text.replace(old, new, 1), "FILE")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("of", [Config, ModelConfig])
def test_a_field_that_is_missing_and_takes_its_default_is_named(tmp_path, caplog, of):
    config = tiny.config(tmp_path) if of is Config else tiny.MODEL
    content = json.loads(to_json(config))
    model = content["model"] if of is Config else content
    del model["loss"]["rpn_sigma"], model["box_coder"]
    found = from_json(json.dumps(content), "FILE", of=of)
    assert found == config
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "FILE: fields without a value" in record.getMessage()
    assert re.search(r"config\.(model\.)?loss\.rpn_sigma = 3\.0", record.getMessage())
    assert re.search(r"config\.(model\.)?box_coder = BoxCoderConfig", record.getMessage())
    caplog.clear()
    assert from_json(to_json(config), "FILE", of=of) == config and not caplog.records


@pytest.mark.parametrize("names", ['"abc"', "[1]", "[]", "{}", "[" * 100_000, "7"])
def test_class_names_of_a_stored_model_must_be_a_list_of_names(tmp_path, names):
    save_weights(create_detector(tiny.MODEL, tiny.CLASS_NAMES, seed=0), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        metadata = file.metadata() | {"class_names": names}
    arrays = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(InputError, match="a.safetensors: metadata class_names must be a JSON list of names"):
        zoo.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("line", fuzz_run_folder.LINES, ids=lambda line: repr(line[:20]))
def test_a_damaged_line_of_the_metrics_is_removed_and_the_run_goes_on(tmp_path, line, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
    with MetricsWriter(tmp_path, after=2) as metrics:
        metrics.write(3, {"loss": 1.0})
    steps = [json.loads(kept)["step"] for kept in path.read_text().splitlines()]
    assert [step for step in steps if step > 0] == [1, 2, 3] and all(type(step) is int for step in steps)
    is_number = line in (b'{"step": -1}', b'{"step": 10000000000000000000000}')
    assert is_number or "damaged lines are removed" in caplog.text


def test_metrics_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read and written: Is a directory"):
        MetricsWriter(tmp_path, after=0)


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def entry(path, name, header, content=b""):
    """Writes an archive with one array whose header is given."""
    text = f"{header}\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content)
    return path


class Touch:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "x"))


# Writers of replay files, and what is said of each.
BATCHES = {
    "a pickle": (lambda path: npz(path, images=np.array([Touch(path.with_name("ran"))])), "Object arrays cannot"),
    "a size": (
        lambda path: entry(path, "images", {"descr": "<f4", "fortran_order": False, "shape": (2**38,)}),
        r"images\.npy declares float32\[274877906944\] in ",
    ),
    "a bomb": (
        lambda path: entry(path, "images", {"descr": "<f4", "fortran_order": False, "shape": (2**26,)}, bytes(2**28)),
        "declares arrays of 2684[0-9]* bytes",
    ),
    "no archive": (lambda path: path.write_bytes(b"PK"), "BadZipFile"),
    "other arrays": (lambda path: npz(path, images=np.zeros((1, 8, 8, 3), np.float32), step=1), "KeyError"),
}


def test_small_hostile_files_cost_little_time_and_memory(tmp_path, small_run):
    inputs = dict([*stored_models(tmp_path), *checkpoints(tmp_path, small_run)])
    for kind, (write, message) in BATCHES.items():
        path = tmp_path / f"{kind}.npz"
        write(path)
        inputs["replay", str(path)] = message
    said = budget.check("test_hostile_runs:read", list(inputs))
    for (reader, path), text in zip(inputs, said, strict=True):
        assert path in text and re.search(inputs[reader, path], text), text
    assert not (tmp_path / "ran").exists()


def test_a_replay_file_with_an_array_of_another_type_or_shape_is_refused_by_name(tmp_path):
    fuzz_run_folder.prepare(tmp_path)
    healthy = dict(np.load(tmp_path / "batch.npz"))
    assert replay.read_batch(npz(tmp_path / "a.npz", **healthy))[0] == 3
    for name, array, message in [
        ("images", np.zeros((1, 16, 16, 4), np.float32), "images must be"),
        ("scale", np.ones((1, 2)), r"scale must be float32\[1, 2\], got float64"),
        ("ground_truth.valid", np.zeros((1, 3), bool), "ground_truth.valid must be"),
        ("ids", np.array(["a", "b"]), "ids must name the 1 valid images"),
        ("more", np.zeros(1), "TypeError"),
    ]:
        with pytest.raises(InputError, match=f"a.npz: this file is not the batch of a failed step.*{message}"):
            replay.read_batch(npz(tmp_path / "a.npz", **healthy | {name: array}))


COUNTS = {
    "counts that wrap around": ([2**62] * 4, ["a", "b", "c", "d"]),
    "ids twice": ([0, 0], ["a", "a"]),
    "ids that are no text": ([0, 0], [1, 2]),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_stored_proposals_that_do_not_fit_are_refused(tmp_path, kind):
    counts, ids = COUNTS[kind]
    arrays = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0, np.float32), "counts": np.array(counts)}
    path = tmp_path / "p.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"ids": json.dumps(ids), "made_by": "w"})
    with pytest.raises(InputError, match=r"p\.safetensors: the boxes, scores and counts"):
        read_proposals(path)


def test_a_changed_run_folder_is_read_or_refused(tmp_path):
    """A short version of `python tests/fuzz_run_folder.py --minutes 10`."""
    fuzz_run_folder.prepare(tmp_path)
    with fuzz_run_folder.quiet():
        read = sum(fuzz_run_folder.attempt(tmp_path, seed) for seed in range(80))
    assert 10 < read < 60
