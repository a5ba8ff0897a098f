"""`save_exported`, `load_exported` and the script `export`: one file that JAX alone runs, with the same detections.

The tolerances towards `predict` were fixed before the first comparison; they are those of tests/test_device_prediction.
"""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import mosaic
import numpy as np
import pytest
import reference_weights
import safetensors.numpy
import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_device_prediction import PHOTOS, PIXELS, SCORE, smooth
from test_weights import fpn_arrays, thin

from fasterrcnn_jax import exported, zoo
from fasterrcnn_jax.config import ImageConfig, TtaConfig
from fasterrcnn_jax.config.families import resnet_fpn
from fasterrcnn_jax.data.records import Prediction
from fasterrcnn_jax.data.transforms import canvas_for
from fasterrcnn_jax.exported import ExportedDetector, is_exported, load_exported
from fasterrcnn_jax.inference import exporting
from fasterrcnn_jax.inference.exporting import detection_of_weights, save_exported
from fasterrcnn_jax.inference.prediction import predict, preprocess
from fasterrcnn_jax.inference.stream import ExportedRunner, ModelRunner, detect_stream
from fasterrcnn_jax.models.detector import create_detector, empty_detector, with_image_config
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.scripts import cli, weights
from fasterrcnn_jax.scripts import export as script
from fasterrcnn_jax.scripts import predict as predict_script
from fasterrcnn_jax.weights import load_weights, save_weights

ROOT = Path(__file__).parents[1]
CANVAS = (130, 140)  # of the images; those of the network are 64 x 96 and 96 x 64
LANDSCAPE, PORTRAIT = (64, 96), (96, 64)
STORED = sorted((Path(__file__).parent / "golden").glob("exported_by_jax_*.zip"))


@pytest.fixture(scope="module", autouse=True)
def environment():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def model(random_weights):
    return tiny.quick_model(random_weights)[0]


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """Returns a file for every platform, exported in a process that takes itself for one with a GPU."""
    path = tmp_path_factory.mktemp("exported") / "detector.zip"
    with pytest.MonkeyPatch.context() as patch:
        mosaic.pretend(patch)
        save_exported(model, path, canvas=CANVAS)
    return path


@pytest.fixture(scope="module")
def loaded(path):
    return load_exported(path)


def on_canvas(images):
    """Returns the batch of the images, with noise beyond them, and their sizes."""
    pixels = np.random.default_rng(0).integers(0, 255, (len(images), *CANVAS, 3), dtype=np.uint8)
    for row, image in enumerate(images):
        pixels[row, : image.shape[0], : image.shape[1]] = image
    return pixels, np.array([image.shape[:2] for image in images], np.int32)


# Landscape, so that all are on one canvas of the network.
EIGHT = [smooth(*size, seed) for seed, size in enumerate([(50, 70), (130, 140), (64, 96), (20, 90)] * 2)]


@pytest.fixture(scope="module")
def three(loaded):
    """Returns a batch of three images and what the loaded program finds in it."""
    batch = on_canvas(EIGHT[:3])
    return batch, jax.device_get(loaded(*batch))


def assert_same_bits(found, expected):
    assert set(found) == {"boxes", "scores", "labels", "valid"} and found["valid"].sum() > 6
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


# Between two forms of one program. XLA fuses them differently, by rules that an untaken branch in Python can change.
ROUNDING = {"boxes": 1e-3, "scores": 1e-5}


def assert_equal_but_for_rounding(found, expected):
    assert set(found) == {"boxes", "scores", "labels", "valid"} and found["valid"].sum() > 6
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=ROUNDING.get(name, 0), err_msg=name)


def test_the_loaded_program_finds_what_the_function_finds_that_was_exported(model, three):
    (pixels, sizes), found = three
    run = jax.jit(detection_of_weights(model, LANDSCAPE))
    assert_equal_but_for_rounding(found, run(jax.tree.leaves(model), pixels, sizes))


def test_the_loaded_program_finds_what_detect_finds_on_the_same_canvas_pixels(model, three):
    (pixels, sizes), found = three

    @jax.jit
    def prepared(pixels, sizes):
        return preprocess(pixels, model.config.image, size=sizes, canvas=LANDSCAPE)

    arguments = prepared(pixels, sizes)
    expected = jax.jit(detect, static_argnames="implementation")(model, *arguments, implementation="xla")
    boxes = np.asarray(expected.boxes) * np.tile(1 / np.asarray(arguments[2])[:, None, ::-1], 2)
    boxes = np.clip(boxes, 0, np.tile(sizes[:, None, ::-1].astype(np.float32), 2))
    valid = np.asarray(expected.valid)
    assert_equal_but_for_rounding(
        found,
        {
            "boxes": np.where(valid[..., None], boxes, 0),
            "scores": np.where(valid, expected.scores, 0),
            "labels": np.where(valid, expected.labels, 0),
            "valid": valid,
        },
    )


FRESH = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from exported import load_exported
detector = load_exported(sys.argv[2])
batch = np.load(sys.argv[3])
np.savez(sys.argv[4], **detector(batch["pixels"], batch["sizes"]))
print(*sorted({name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names))
"""
# Our other dependencies, and the package itself. SciPy, opt_einsum and ml_dtypes are JAX's.
OTHERS = "fasterrcnn_jax flax jaxtyping optax orbax PIL pycocotools safetensors tensorboardX tqdm typeguard tyro yaml"


def numbers(path):
    with np.load(path) as stored:
        return dict(stored)


def in_fresh_process(python, path, batch, folder):
    """Returns what a new process finds that has exported.py alone, and the names of its modules."""
    shutil.copy(exported.__file__, folder / "exported.py")
    np.savez(folder / "batch.npz", pixels=batch[0], sizes=batch[1])
    command = [python, "-I", "-c", FRESH, folder, path, folder / "batch.npz", folder / "found.npz"]
    environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if python == sys.executable:
        # The same number of devices. Another JAX may not know these flags, and an unknown flag ends its process.
        environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return numbers(folder / "found.npz"), set(done.stdout.split())


def test_a_fresh_process_imports_jax_alone_and_finds_the_same_bits(path, three, tmp_path):
    batch, expected = three
    found, modules = in_fresh_process(sys.executable, path, batch, tmp_path)
    assert {"jax", "numpy", "flatbuffers", "exported"} <= modules and not modules & set(OTHERS.split()), modules
    assert_same_bits(found, expected)


def test_the_loader_imports_nothing_but_jax_and_numpy():
    names = set()
    for node in ast.walk(ast.parse(Path(exported.__file__).read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"jax", "numpy"}


def assert_close(found: exported.Found, expected):
    assert found.names == expected.class_names
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=SCORE)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=PIXELS)


def test_detections_are_those_of_predict_in_images_of_any_size_and_either_orientation(model, loaded):
    images = [
        *EIGHT[:4],
        smooth(130, 90, 7),
        smooth(64, 64, 8),
        smooth(96, 40, 9),
        *(photo[:130, :140] for photo in PHOTOS),
    ]
    found, expected = loaded.predict(images), predict(model, images)
    assert sum(len(one.scores) for one in expected) > 3 * len(images)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_one_file_takes_batches_of_1_3_and_8_images(loaded, three):
    whole = jax.device_get(loaded(*on_canvas(EIGHT)))
    single = jax.device_get(loaded(*on_canvas(EIGHT[:1])))
    for few in (three[1], single):
        assert few["boxes"].shape[1:] == (6, 4)
        for name, values in few.items():
            tolerance = {"boxes": PIXELS, "scores": SCORE}.get(name, 0)
            np.testing.assert_allclose(values, whole[name][: len(values)], atol=tolerance, err_msg=name)


def test_a_batch_of_both_orientations_and_an_empty_row_comes_back_in_its_order(loaded):
    # Three rows on the landscape canvas and one on the other, as other tests compile them.
    images = [EIGHT[0], smooth(90, 60, 1), np.zeros((0, 0, 3), np.uint8), EIGHT[3]]
    found = jax.device_get(loaded(*on_canvas(images)))
    assert found["valid"].any(1).tolist() == [True, True, False, True]
    for row in (0, 1, 3):
        alone = loaded.predict([images[row]])[0]
        np.testing.assert_allclose(found["boxes"][row][found["valid"][row]], alone.boxes, atol=PIXELS)


def test_the_programs_are_plain_jax_for_three_platforms_and_name_no_folder_of_this_machine(path, loaded):
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    with zipfile.ZipFile(path) as archive:
        programs = {name: archive.read(name) for name in archive.namelist() if name.endswith(".bin")}
        assert all(info.date_time == (1980, 1, 1, 0, 0, 0) for info in archive.infolist())
    del programs["weights.bin"]
    assert set(programs) == {"program_64x96.bin", "program_96x64.bin"}
    for name, content in programs.items():
        program = jax.export.deserialize(bytearray(content))
        assert program.platforms == loaded.platforms and "mosaic" not in program.mlir_module(), name
        assert str(ROOT).encode() not in content and b"detector.py" not in content, name


def test_the_manifest_says_what_the_file_is(model, path, loaded):
    manifest, digest = exported.read_manifest(path)
    assert manifest == loaded.manifest and digest == loaded.digest and len(digest) == 64
    assert loaded.class_names == model.class_names and loaded.canvas == CANVAS
    assert manifest["thresholds"] == {"score_threshold": 0.0, "nms_threshold": 0.3, "max_detections": 6}
    assert manifest["sizes"] == {"short_side": 64, "long_side": 96, "size_rounding": "nearest"}
    assert manifest["versions"]["jax"] == jax.__version__
    assert set(manifest["sha256"]) == {"weights.bin", "program_64x96.bin", "program_96x64.bin"}
    assert is_exported(path)


@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=30, max_size=30))
@pytest.mark.parametrize("rounding", ["nearest", "down"])
def test_an_image_runs_on_the_canvas_that_predict_takes(rounding, sizes):
    # Many canvases, so that one pixel more or less often takes another one.
    wide = [(64, side) for side in range(64, 161, 16)]
    canvases = (*wide, *((side, 64) for _, side in wide[1:]))
    config = ImageConfig(short_side=64, long_side=160, canvases=canvases, size_rounding=rounding)
    given_sizes = {"short_side": 64, "long_side": 160, "size_rounding": rounding}
    manifest = {"class_names": [], "canvas": (9000, 9000), "platforms": [], "sizes": given_sizes}
    detector = ExportedDetector(Path("a.zip"), manifest, "", [], dict.fromkeys(config.canvases))
    assert [detector.network_canvas(size) for size in sizes] == [canvas_for(size, config) for size in sizes]


LARGER = (
    r"image 1 is 100 x 141 pixels \(height x width\), larger than the canvas of 130 x 140 of .*detector\.zip: make the "
    r"image smaller, or export again with --canvas 130 141$"
)


def test_wrong_input_is_refused_in_one_sentence(loaded):
    pixels, sizes = on_canvas(EIGHT[:2])
    with pytest.raises(ValueError, match=LARGER):
        loaded.predict([EIGHT[0], np.zeros((100, 141, 3), np.uint8)])
    with pytest.raises(ValueError, match=LARGER):
        loaded(pixels, [(50, 70), (100, 141)])
    with pytest.raises(
        ValueError, match=r"images must be uint8 \[batch, 130, 140, 3\], got float32 \[2, 130, 140, 3\]"
    ):
        loaded(pixels.astype(np.float32), sizes)
    with pytest.raises(ValueError, match=r"got uint8 \[2, 129, 140, 3\]"):
        loaded(pixels[:, 1:], sizes)
    with pytest.raises(ValueError, match=r"whole numbers \[2, 2\], got int32 \[1, 2\]"):
        loaded(pixels, sizes[:1])
    with pytest.raises(ValueError, match="image 0 is -1 x 4 pixels .* no size of an image"):
        loaded(pixels, [(-1, 4), (1, 1)])
    with pytest.raises(ValueError, match="there is no image"):
        loaded(pixels[:0], sizes[:0])
    with pytest.raises(ValueError, match=r"image 0 must be uint8 \[height, width, 3\], got uint8 \[50, 70\]"):
        loaded.predict([EIGHT[0][..., 0]])
    with pytest.raises(ValueError, match="image 0 is 0 x 4 pixels"):
        loaded.predict([np.zeros((0, 4, 3), np.uint8)])
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        loaded.predict(EIGHT, batch_size=0)


def repacked(path, target, change, how=zipfile.ZIP_STORED):
    """Writes a zip with changed members and the comment of `path`."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", how) as new:
        members = {name: old.read(name) for name in old.namelist()}
        for name, content in change(members).items():
            new.writestr(name, content)
        new.comment = old.comment
    return target


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: m | {"weights.bin": m["weights.bin"][:-1] + b"\0\0"}, "weights.bin does not have the digest"),
        (lambda m: m | {"program_64x96.bin": b""}, "program_64x96.bin does not have the digest"),
        (
            lambda m: {k: v for k, v in m.items() if k != "program_64x96.bin"},
            "program_64x96.bin does not have the digest",
        ),
        (lambda m: m | {"manifest.json": m["manifest.json"] + b" "}, "manifest.json does not have the digest"),
        (lambda m: {"data.pkl": b""}, "not a file of fasterrcnn-jax export"),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(path, tmp_path, change, said):
    broken = repacked(path, tmp_path / "broken.zip", change)
    with pytest.raises(ValueError, match=f"broken.zip: .*{said}"):
        load_exported(broken)


def test_files_of_another_kind_are_refused(path, tmp_path, monkeypatch):
    (tmp_path / "cut.zip").write_bytes(path.read_bytes()[:-100])
    for name in ("cut.zip", "missing.zip"):
        assert not is_exported(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: not a file of fasterrcnn-jax export, or damaged"):
            load_exported(tmp_path / name)
    with pytest.raises(ValueError, match="small.zip: not a file of fasterrcnn-jax export, or damaged: a part of it is"):
        load_exported(repacked(path, tmp_path / "small.zip", lambda members: members, zipfile.ZIP_DEFLATED))
    lacking = {"platforms": ["cpu"], "programs": [{"file": "a.bin"}]}
    (tmp_path / "lacking.zip").write_bytes(exported.packed(lacking, {"weights.bin": b""}))
    with pytest.raises(ValueError, match="lacking.zip: manifest.json lacks 'network_canvas'; the file is damaged"):
        load_exported(tmp_path / "lacking.zip")
    (tmp_path / "later.zip").write_bytes(exported.packed({"format_version": 2}, {"weights.bin": b""}))
    with pytest.raises(ValueError, match="later.zip: format version 2 of .* cannot be read, only 1"):
        load_exported(tmp_path / "later.zip")
    monkeypatch.setattr(exported.export, "default_export_platform", lambda: "rocm")
    with pytest.raises(ValueError, match="the programs are for cpu, cuda, tpu, and this process runs on rocm"):
        load_exported(path)
    monkeypatch.undo()

    def refuse(content):
        raise ValueError("calling convention version 99")

    monkeypatch.setattr(exported.export, "deserialize", refuse)
    with pytest.raises(ValueError, match=f"JAX {jax.__version__} cannot read the program that JAX .* wrote; .*99"):
        load_exported(path)


@pytest.fixture
def call(model, tmp_path, monkeypatch, restored_logging):
    """Returns a function that exports tmp_path/model.safetensors; models come from memory."""
    several = with_image_config(model, dataclasses.replace(model.config.image, canvases=((96, 96),)))
    several.config = dataclasses.replace(several.config, test_augment=TtaConfig(flip=True))
    monkeypatch.setattr(cli, "load_model", lambda path, backbone: several)
    return lambda *more: script.main([str(tmp_path / "model.safetensors"), *map(str, more)])


@pytest.fixture
def restored_logging():
    with tiny.restored_logging():
        yield


def test_the_script_writes_a_file_beside_the_weights_and_says_what_is_in_it(call, tmp_path, capsys, monkeypatch):
    call("--canvas", 100, 120, "--platforms", "cpu")
    said, warned = capsys.readouterr()
    assert "input      uint8 images [batch, 100, 120, 3], sizes [batch, 2]" in said
    assert "canvases   96 x 96 of the network" in said and "platforms  cpu\n" in said
    detector = load_exported(tmp_path / "model.zip")
    assert detector.canvas == (100, 120) and detector.platforms == ("cpu",) and f"digest     {detector.digest}" in said
    assert "model.test_augment does not apply" in warned
    program = detector._programs[96, 96]
    monkeypatch.setattr(exporting, "exported_program", lambda *_, **options: asked.append(options) or program)
    asked = []
    call("--output", tmp_path / "other.zip")
    assert exported.read_manifest(tmp_path / "other.zip")[0]["canvas"] == [96, 96]
    assert asked == [{"platforms": ("cpu", "cuda", "tpu")}]


@pytest.mark.parametrize(
    "more, said",
    [
        (("--canvas", 0, 10), "canvas must be two positive sides of at most 100000000 pixels, got 0 x 10"),
        (("--canvas", 20000, 20000), "got 20000 x 20000"),
        (("--output", "."), "--output .: is a folder"),
        (("--output", "{}/model.safetensors"), "would replace the weights that are exported"),
        (("--platforms",), "platforms must be of cpu, cuda, tpu, got none"),
    ],
)
def test_the_script_refuses_wrong_arguments_in_one_sentence(call, tmp_path, capsys, more, said):
    with pytest.raises(SystemExit) as ended:
        call(*(str(value).format(tmp_path) for value in more))
    written = capsys.readouterr().err
    assert ended.value.code == 2 and said in written and written.count("\n") == 1


def test_the_script_refuses_a_run_that_trained_a_part_of_the_detector(call, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    config = tiny.config(tmp_path, scheme="rpn")
    monkeypatch.setattr(script.checkpoint, "load_run_config", lambda path: config)
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "run")])
    assert "train.scheme was rpn, so a part of the detector was not trained" in capsys.readouterr().err


def with_operator(operator):
    return dataclasses.replace(tiny.MODEL, roi_features=dataclasses.replace(tiny.MODEL.roi_features, operator=operator))


# Of the zoo, whose anchors in the padding make proposals; and every other operator, norm and backbone.
CONFIGS = {name: info.config for name, info in zoo.MODELS.items()}
CONFIGS |= {name: with_operator(name) for name in ("pool", "crop", "align_average")} | {"fpn": tiny.FPN}
CONFIGS["efficientnet"] = dataclasses.replace(
    tiny.FPN, backbone=dataclasses.replace(tiny.FPN.backbone, name="efficientnet_lite0", norm="batch", width=64)
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "resnet50_fpn")) for name in CONFIGS]
)
def test_every_kind_of_detector_takes_a_symbolic_batch(name):
    model = empty_detector(CONFIGS[name], tiny.CLASS_NAMES)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 100, 120, 3), np.uint8)
    sizes = jax.ShapeDtypeStruct((batch, 2), np.int32)
    run = detection_of_weights(model, model.config.image.canvases[0])
    found = jax.eval_shape(run, jax.tree.leaves(model), images, sizes)
    assert found["boxes"].shape == (batch, model.config.postprocess.max_detections, 4)


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_a_file_of_another_jax_gives_the_numbers_that_it_gave_there(stored):
    """Written by tests/write_exported.py, which stores the numbers beside the file."""
    if "0.12" in stored.stem and jax.__version_info__ < (0, 11):
        pytest.skip("JAX before 0.11 does not read programs of JAX 0.12; the next test shows what is said")
    detector, expected = load_exported(stored), numbers(stored.with_suffix(".npz"))
    found = jax.device_get(detector(expected["pixels"], expected["sizes"]))
    assert expected["valid"].sum() > 6
    for name, values in found.items():
        tolerance = {"boxes": PIXELS, "scores": SCORE}.get(name, 0)
        np.testing.assert_allclose(values, expected[name], atol=tolerance, err_msg=name)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this JAX reads the stored programs")
def test_a_program_that_is_too_new_for_this_jax_is_refused_when_it_is_loaded():
    with pytest.raises(ValueError, match=f"JAX {jax.__version__} cannot read the program that JAX 0.12.0.1 wrote; exp"):
        load_exported(STORED[-1])


def test_there_are_files_of_two_versions_of_jax():
    versions = [exported.read_manifest(path)[0]["versions"]["jax"] for path in STORED]
    assert len(set(versions)) == len(versions) >= 2


def test_another_python_with_another_jax_reads_a_new_file(path, three, tmp_path):
    """FASTERRCNN_OTHER_PYTHON names a Python with another version of JAX."""
    other = os.environ.get("FASTERRCNN_OTHER_PYTHON")
    if not other:
        pytest.skip("FASTERRCNN_OTHER_PYTHON names no Python with another JAX; .ci/run names one")
    batch, expected = three
    found, modules = in_fresh_process(other, path, batch, tmp_path)
    assert not modules & set(OTHERS.split())
    for name, values in found.items():
        tolerance = {"boxes": PIXELS, "scores": SCORE}.get(name, 0)
        np.testing.assert_allclose(values, expected[name], atol=tolerance, err_msg=name)


def test_converted_weights_are_those_of_torchvisions_detector(tmp_path, capsys):
    """The names, shapes and file that docs/export.md gives to torchvision, written by the script from our own model."""
    own = create_detector(thin(resnet_fpn(50)), ("a", "b"), seed=3)
    save_weights(own, tmp_path / "own.safetensors")
    with tiny.restored_logging():
        weights.main(["convert", str(tmp_path / "own.safetensors"), str(tmp_path / "theirs.safetensors")])
    written = safetensors.numpy.load_file(tmp_path / "theirs.safetensors")
    assert {name: array.shape for name, array in written.items()} == {
        name: array.shape for name, array in fpn_arrays(classes=2).items()
    }


# Fixed before the first comparison: torch, onnxruntime and XLA add in different orders through 50 layers.
ONNX_PIXELS, ONNX_SCORE = 0.1, 1e-3


@pytest.mark.filterwarnings("default")  # torch warns of its older exporter
def test_the_documented_export_by_torchvision_finds_in_onnxruntime_what_predict_finds(tmp_path):
    """Needs torch, torchvision, onnx and onnxruntime, which are no dependencies; CONTRIBUTING.md has the command.

    The weights follow a rule and are those of tests/test_whole_pyramid.py, and so are the images.
    """
    for module in ("torch", "torchvision", "onnx", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is not installed: CONTRIBUTING.md has the command")
    import onnxruntime

    golden = np.load(ROOT / "tests/golden/model_tv_r50fpn_21.npz")
    safetensors.numpy.save_file(reference_weights.rule_weights(golden), tmp_path / "rule.safetensors")
    config = resnet_fpn(50)
    # torchvision pads each image to whole multiples of 32 pixels; what lies beyond an image changes features in it.
    image = dataclasses.replace(
        config.image, short_side=192, long_side=400, canvases=((192, 288), (256, 192), (192, 416), (416, 192))
    )
    config, names = dataclasses.replace(config, image=image), tuple(f"class{k}" for k in range(1, 21))
    model = load_weights(create_detector(config, names, seed=0), tmp_path / "rule.safetensors")
    save_weights(model, tmp_path / "own.safetensors")
    with tiny.restored_logging():
        weights.main(["convert", str(tmp_path / "own.safetensors"), str(tmp_path / "theirs.safetensors")])
    settings = {"min_size": 192, "max_size": 400}
    place = {"WEIGHTS": str(tmp_path / "theirs.safetensors"), "ONNX": str(tmp_path / "detector.onnx")}
    place |= {"NUM_CLASSES": 20, "SETTINGS": settings}
    text = (ROOT / "docs" / "export.md").read_text().split("## ONNX")[1]
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], place)
    session, total = onnxruntime.InferenceSession(place["ONNX"]), 0
    for pixels in (golden["image0"], golden["image1"]):
        given_image = np.float32(pixels.transpose(2, 0, 1)) / 255
        boxes, labels, scores = session.run(None, {session.get_inputs()[0].name: given_image})
        expected = predict(model, pixels)
        assert len(scores) == len(expected.scores)
        # Detections of almost equal scores may change their places.
        far = np.abs(boxes[:, None] - expected.boxes).max(axis=2) + 1e3 * (labels[:, None] != expected.labels)
        nearest = far.argmin(axis=1)
        assert sorted(nearest) == list(range(len(scores)))
        differences = far.min(axis=1).max(), np.abs(scores - expected.scores[nearest]).max()
        print(f"{len(scores)} detections, boxes within {differences[0]:.2g} pixels, scores within {differences[1]:.2g}")
        assert differences[0] <= ONNX_PIXELS and differences[1] <= ONNX_SCORE
        total += len(scores)
    assert total > 20


@pytest.fixture
def predicted(path, tmp_path, restored_logging):
    """Returns a function that runs `predict` on tmp_path/images, and returns the lines that it writes."""
    (tmp_path / "images").mkdir()

    def run(*more, ckpt=path):
        given = (tmp_path / "images", "--ckpt", ckpt, "--out", tmp_path / "out", *more)
        predict_script.main(list(map(str, given)))
        return [json.loads(line) for line in (tmp_path / "out/detections.jsonl").read_text().splitlines()]

    return run


def test_predict_takes_an_exported_file_and_finds_the_bits_of_load_exported(predicted, model, loaded, tmp_path):
    """In images of both orientations, on all devices; against `predict` of the model within the limits above."""
    images = [*EIGHT[:4], smooth(130, 90, 7)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"images/{number}.png")
    lines = predicted("--score_threshold", 0.3, "--formats", "coco", "csv", "yolo", "voc", "--crops")
    out, shown, total = tmp_path / "out", 0, 0
    for line, of_file, of_model in zip(lines, loaded.predict(images), predict(model, images), strict=True):
        found = exported.Found(
            np.float32(line["boxes"]), np.float32(line["scores"]), np.int32(line["labels"]), (*line["class_names"],)
        )
        for one, other in zip(found, of_file, strict=True):
            np.testing.assert_array_equal(one, other)
        assert_close(found, of_model)
        total += len(found.scores)
        shown += (found.scores >= 0.3).sum()
    assert 0 < shown < total
    assert len(json.loads((out / "detections.json").read_text())) == total
    assert len((out / "detections.csv").read_text().splitlines()) == 1 + shown == 1 + len(list(out.glob("crops/*/*")))
    assert {len(list((out / name).iterdir())) for name in ("labels", "annotations", "images")} == {len(images)}


def test_predict_counts_images_that_the_canvas_does_not_hold_and_continues_the_job(predicted, tmp_path, capsys):
    Image.fromarray(EIGHT[0]).save(tmp_path / "images/a.png")
    Image.new("RGB", (141, 100)).save(tmp_path / "images/b.png")
    for before in ("", ", of which 1 were done before"):
        with pytest.raises(SystemExit) as ended:
            predicted()
        said = capsys.readouterr().out
        assert ended.value.code == 3 and f"images     1{before}\n" in said and "unreadable 1, listed in" in said
        assert re.search(
            r"b\.png is 100 x 141 pixels .*, larger than the canvas of 130 x 140 of .*--canvas 130 141", said
        )
    with pytest.raises(SystemExit) as ended:
        predicted("--faults", "error")
    assert ended.value.code == 2 and "b.png is 100 x 141 pixels" in capsys.readouterr().err
    (tmp_path / "images/b.png").unlink()
    (first,) = predicted("--classes", "disc")
    assert set(first["class_names"]) == {"disc"}


def test_predict_in_windows_of_an_exported_file_finds_what_the_model_finds_in_windows(model, path):
    """The windows and the whole image run on the canvas; NMS has the threshold of the manifest."""
    image = smooth(120, 140, 3)
    runners = ExportedRunner(load_exported(path), batch_size=2), ModelRunner(model, batch_size=2)
    (found,), (expected,) = (list(detect_stream([image], np.asarray, runner, tile=72)) for runner in runners)
    assert len(found.detections.scores) > 6
    names = tuple(model.class_names[label - 1] for label in found.detections.labels)
    assert_close(exported.Found(*found.detections, names), Prediction(*expected.detections, names))


def test_predict_refuses_options_that_an_exported_file_cannot_follow(predicted, path, tmp_path, capsys):
    Image.fromarray(EIGHT[0]).save(tmp_path / "images/a.png")
    for option, value in (("backbone", "mine:Mine"), ("implementation", "xla")):
        with pytest.raises(SystemExit) as ended:
            predicted(f"--{option}", value)
        said = capsys.readouterr().err
        assert (
            ended.value.code == 2 and said.startswith(f"error: --{option} has no effect on") and said.count("\n") == 1
        )
    broken = repacked(path, tmp_path / "broken.zip", lambda members: members | {"weights.bin": b""})
    with pytest.raises(SystemExit) as ended:
        predicted(ckpt=broken)
    assert ended.value.code == 2 and "weights.bin does not have the digest" in capsys.readouterr().err
