"""`train FOLDER` from the folder to the first step: what is understood, divided and fitted, and what a run keeps."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import types

import exports
import jax
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from fasterrcnn_jax.config.text import load_config, to_json
from fasterrcnn_jax.data import sources
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.scripts import evaluate as evaluate_script
from fasterrcnn_jax.scripts import train as train_script
from fasterrcnn_jax.training import preparation, run_folder
from fasterrcnn_jax.training.preparation import prepare, stored_split
from fasterrcnn_jax.weights import pretrained


def write_labelimg(root, count, *, first=0):
    """Writes images that differ, with a disc each and a square in the first one."""
    names = [f"image {index}" for index in range(first, first + count)]
    for index, name in enumerate(names):
        classes = ("disc", "square") if index == 0 else ("disc",)
        boxes = ((10, 10, 40, 40), (45, 20, 85, 60))
        record = exports.Labelled(name, (96, 64), tuple(zip(classes, boxes, strict=False)))
        exports.write_xml(root, [record])
        pixels = np.random.default_rng(first + index).integers(0, 255, (8, 12, 3)).astype(np.uint8)
        Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(root / f"{name}.png")


def configured(root, run, *, train=None, **data):
    config = load_config(cli.RANDOM)
    data = dataclasses.replace(config.data, root=root, **data)
    return dataclasses.replace(config, run=run, data=data, train=dataclasses.replace(config.train, **(train or {})))


def used(prepared):
    """Returns the splits that are trained on, that choose the checkpoint, and that the report is of."""
    data = prepared.config.data
    return data.train_split, prepared.config.train.best_split or data.test_split, data.test_split


def sizes(prepared):
    return {name: len(dataset.records) for name, dataset in prepared.splits.items()}


# ---------------------------------------------------------------- what is divided


def test_one_list_is_divided_and_everything_is_said_and_stored(tmp_path):
    write_labelimg(tmp_path / "set", 10)
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run"))
    assert sizes(prepared) == {"train": 8, "val": 2} and used(prepared) == ("train", "val", "val")
    said = "\n".join(prepared.sentences)
    assert "PASCAL VOC, XML beside the images (10 XML files" in said and "images     train 8, val 2" in said
    assert re.search(r"classes    2, with objects to train on: disc 8, square 1", said)
    preparation.write_division(prepared)
    stored = json.loads(run_folder.division_path(tmp_path / "run").read_text())
    assert {name: len(ids) for name, ids in stored.items()} == {"train": 8, "val": 2}
    assert '"auto"' not in to_json(prepared.config)


def test_a_continued_run_has_the_same_parts_whatever_was_added(tmp_path):
    write_labelimg(tmp_path / "set", 10)
    config = configured(tmp_path / "set", tmp_path / "run")
    first = prepare(config)
    preparation.write_division(first)
    run_folder.write_config(first.config, tmp_path / "run")
    write_labelimg(tmp_path / "set", 2, first=20)
    data = dataclasses.replace(config.data, accept_changed=True)
    again = prepare(dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, seed=7)))
    for name in ("train", "val"):
        ids = [record.id for record in first.splits[name].records]
        assert [record.id for record in again.splits[name].records] == ids
        assert [record.id for record in stored_split(first.config, tmp_path / "run", name).records] == ids


def test_three_fractions_choose_on_the_second_part_and_report_on_the_third(tmp_path):
    write_labelimg(tmp_path / "set", 10)
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run", split=(0.6, 0.2, 0.2)))
    assert used(prepared) == ("train", "val", "test") and set(sizes(prepared)) == {"train", "val", "test"}


def test_a_training_split_that_is_divided_leaves_the_test_split_for_the_report(tmp_path):
    exports.write_voc(tmp_path / "set", records=exports.RECORDS)
    for index, name in enumerate("abc"):
        Image.fromarray(
            tiny.rectangle_image(exports.RECORDS[index].size[::-1], (1, 1, 9, 9), seed=index)
        ).save(tmp_path / f"set/JPEGImages/{name}.png")  # fmt: skip
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run", split=(0.7,)))
    assert used(prepared) == ("train", "val", "test") and sizes(prepared) == {"train": 2, "val": 1, "test": 3}


@pytest.mark.parametrize("seen", [1, 2])
def test_images_that_cannot_be_divided_are_trained_on_and_evaluated(tmp_path, caplog, seen):
    write_labelimg(tmp_path / "set", 1)
    for extension in ("png", "xml") if seen == 2 else ():
        (tmp_path / f"set/copy.{extension}").write_bytes((tmp_path / f"set/image 0.{extension}").read_bytes())
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run"))
    assert used(prepared) == ("all", "all", "all") and sizes(prepared) == {"all": seen}
    assert "too few images that differ to divide them: all are trained on and evaluated" in caplog.text
    with pytest.raises(InputError, match="--data.split 1.0 trains on all images"):
        prepare(configured(tmp_path / "set", tmp_path / "other", split=(0.8,)))


def test_the_fraction_one_trains_on_every_image(tmp_path):
    write_labelimg(tmp_path / "set", 4)
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run", split=(1.0,)))
    assert used(prepared) == ("all", "all", "all") and sizes(prepared) == {"all": 4}
    assert not run_folder.division_path(tmp_path / "run").exists()


def test_a_set_with_nothing_but_a_test_split_is_divided(tmp_path):
    write_labelimg(tmp_path / "set/test", 5)
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run"))
    assert used(prepared) == ("train", "val", "val") and sizes(prepared) == {"train": 4, "val": 1}


@pytest.mark.parametrize("name", ["val", "valid", "Valid", "validation", "dev", "eval"])
def test_validation_images_of_the_data_choose_the_checkpoint(tmp_path, name):
    for number, split in enumerate(("train", name, "test")):
        write_labelimg(tmp_path / "set" / split, 2, first=3 * number)
    config = configured(tmp_path / "set", tmp_path / "run")
    assert used(prepare(config)) == ("train", name, "test")
    without_test = configured(tmp_path / "set", tmp_path / "run", test_split=name)
    assert used(prepare(without_test)) == ("train", name, name)


def test_a_split_for_the_report_that_does_not_exist_is_refused(tmp_path):
    write_labelimg(tmp_path / "set", 4)
    with pytest.raises(InputError, match="no split is named 'tset'; the existing splits are: train, val, all"):
        prepare(configured(tmp_path / "set", tmp_path / "run", test_split="tset"))
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run", test_split="train"))
    assert used(prepared) == ("train", "val", "train")


def test_the_folder_of_a_run_is_evaluated_in_the_parts_of_the_run_and_another_folder_whole(tmp_path, monkeypatch):
    write_labelimg(tmp_path / "set", 10)
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run"))
    preparation.write_division(prepared)
    (tmp_path / "run/checkpoints/1").mkdir(parents=True)
    shutil.copytree(tmp_path / "set", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    model = types.SimpleNamespace(class_names=prepared.config.data.class_names)

    def evaluated(root, **arguments):
        arguments = evaluate_script.Arguments(ckpt=tmp_path / "run", root=root, **arguments)
        split, dataset = evaluate_script._dataset(arguments, prepared.config, model)
        return split, [record.id for record in dataset.records]

    of_run = "val", list(prepared.division["val"])
    # The same folder in other words.
    for root in (None, tmp_path / "set", preparation.Path("set"), tmp_path / "other/../set"):
        assert evaluated(root) == of_run
    assert evaluated(tmp_path / "set", split="train") == ("train", list(prepared.division["train"]))
    split, ids = evaluated(tmp_path / "other")
    assert split == "all" and len(ids) == 10
    # A layout that is named is that of the folder, not the one of the run.
    assert evaluated(tmp_path / "other", layout="voc") == (split, ids)
    # Results on other images do not replace those on the run's own.
    for root, folder in ((None, "val"), (tmp_path / "set", "val"), (tmp_path / "other", "other_val")):
        arguments = evaluate_script.Arguments(ckpt=tmp_path / "run", root=root)
        assert evaluate_script._folder_name(arguments, prepared.config, "val") == folder


def test_a_continued_run_keeps_the_split_that_chooses_its_checkpoint(tmp_path):
    for number, split in enumerate(("train", "test")):
        write_labelimg(tmp_path / "set" / split, 2, first=2 * number)
    config = configured(tmp_path / "set", tmp_path / "run")
    first = prepare(config)
    run_folder.write_config(first.config, tmp_path / "run")
    write_labelimg(tmp_path / "set/val", 2, first=8)
    assert used(prepare(config)) == used(first) == ("train", "test", "test")
    assert used(prepare(dataclasses.replace(config, run=tmp_path / "other"))) == ("train", "val", "test")


# ---------------------------------------------------------------- a layout that is named


@pytest.fixture
def painted(tmp_path):
    """Returns a function that writes four images, which differ, as a tool does."""

    def write(tool):
        boxes = ((8, 10, 48, 50), (50, 10, 90, 50))
        records = tuple(
            exports.Labelled(name, (96, 64), tuple(zip(exports.CLASSES[::-1], boxes[: 1 + int(name) % 2])))
            for name in "0123"
        )
        exports.WRITERS[tool](tmp_path / "set", records=records)
        for path in (tmp_path / "set").rglob("*.png"):
            seed = int(path.stem)
            Image.fromarray(tiny.rectangle_image((64, 96), (8, 10, 48, 50), seed=seed)).save(path)
        return tmp_path / "set"

    return write


@pytest.mark.parametrize("split", ["auto", (0.5,)])
@pytest.mark.parametrize("tool", exports.WRITERS)
def test_a_named_layout_is_prepared_like_the_recognised_one(painted, tmp_path, tool, split):
    root = painted(tool)
    auto = prepare(configured(root, tmp_path / "run", split=split))
    named = prepare(configured(root, tmp_path / "run", split=split, layout=auto.config.data.layout))
    assert named.config == auto.config and named.division == auto.division
    assert sizes(named) == sizes(auto) and used(named) == used(auto)
    for name, dataset in auto.splits.items():
        assert [record.id for record in named.splits[name].records] == [record.id for record in dataset.records]
        for one, other in zip(named.splits[name].records, dataset.records, strict=True):
            np.testing.assert_array_equal(one.boxes, other.boxes)
    # The first line says why; the notes of the recognised one name other layouts too.
    fitted = [line for line in auto.sentences[1:] if line.split()[0] in ("classes", "images", "canvases", "schedule")]
    assert set(fitted) <= set(named.sentences) and named.sentences[0].startswith(f"data       {root}: ")


@pytest.mark.parametrize("asked", ["voc", "vocdevkit", "coco", "yolo", "labelme", "csv"])
@pytest.mark.parametrize("tool", ["labelImg", "Roboflow COCO", "YOLO", "LabelMe", "csv"])
def test_a_folder_of_another_layout_than_the_named_one_is_refused_with_the_way_out(painted, tmp_path, tool, asked):
    root = painted(tool)
    layout = sources.recognise(root).data.layout
    if layout == asked:
        return
    with pytest.raises(InputError) as caught:
        prepare(configured(root, tmp_path / "run", layout=asked))
    said = str(caught.value)
    assert said.startswith(f"{root}: not of layout {asked}, which data.layout names, but ")
    assert said.endswith(f"; use --data.layout {layout} or auto") and "\n" not in said
    prepare(configured(root, tmp_path / "run", layout=layout))


@pytest.mark.parametrize("asked", ["voc", "vocdevkit", "coco", "yolo", "labelme", "csv"])
def test_a_folder_without_labels_is_refused_with_what_it_contains(tmp_path, asked):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.txt").touch()
    with pytest.raises(InputError, match=f"not of layout {asked}, which data.layout names: the folder contains 1 of"):
        prepare(configured(tmp_path / "set", tmp_path / "run", layout=asked))


def test_images_without_labels_are_refused_with_what_the_folder_contains(tmp_path):
    write_labelimg(tmp_path / "set", 2)
    for path in (tmp_path / "set").glob("*.xml"):
        path.unlink()
    with pytest.raises(InputError, match="has a class name; the folder contains 2 of .png, and no annotations"):
        prepare(configured(tmp_path / "set", tmp_path / "run", layout="yolo"))


def test_labels_that_show_no_sign_of_their_layout_are_read_where_it_is_named(tmp_path):
    """The label files of the first images are empty."""
    write_labelimg(tmp_path / "set", 30)
    for path in (tmp_path / "set").glob("*.xml"):
        path.unlink()
    for path in sorted((tmp_path / "set").glob("*.png")):
        path.with_suffix(".txt").write_text("")
    path.with_suffix(".txt").write_text("0 0.5 0.5 0.25 0.25\n")
    with pytest.raises(InputError, match="no known layout"):
        prepare(configured(tmp_path / "set", tmp_path / "run"))
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run", layout="yolo"))
    assert sum(len(record.boxes) for dataset in prepared.splits.values() for record in dataset.records) == 1


def test_places_that_are_given_stay_and_the_split_is_divided(tmp_path):
    write_labelimg(tmp_path / "set/photos", 5)
    places = dict(voc_images="photos", voc_annotations="photos", voc_lists=None)
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run", layout="voc", **places))
    assert sizes(prepared) == {"train": 4, "val": 1} and prepared.config.data.voc_annotations == "photos"


def test_joined_splits_of_the_data_stay_the_report_where_the_training_split_is_divided(tmp_path):
    for number, split in enumerate(("train", "val", "test")):
        write_labelimg(tmp_path / "set" / split, 4, first=4 * number)
    prepared = prepare(configured(tmp_path / "set", tmp_path / "run", split=(0.5,), test_split="val+test"))
    assert used(prepared) == ("train", "val", "val+test") and sizes(prepared)["val+test"] == 8


# ---------------------------------------------------------------- where the run is


def test_the_run_is_named_after_the_folder_and_other_settings_take_the_next_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_labelimg(tmp_path / "my set", 4)
    config = configured(tmp_path / "my set", load_config(cli.RANDOM).run)

    def started(**train):
        prepared = prepare(dataclasses.replace(config, train=dataclasses.replace(config.train, **train)))
        run_folder.write_config(prepared.config, prepared.config.run)
        return prepared.config.run.as_posix()

    assert started() == started() == "runs/my set"
    assert started(learning_rate=0.5) == "runs/my set-2"
    # A longer run is the same run.
    assert started(epochs=900.0) == "runs/my set"
    write_labelimg(tmp_path / "other/my set", 4)
    config = configured(tmp_path / "other/my set", config.run)
    assert started() == "runs/my set-3"


def test_a_path_with_a_point_at_its_end_has_the_name_of_its_folder(tmp_path, monkeypatch):
    write_labelimg(tmp_path / "set", 4)
    monkeypatch.chdir(tmp_path / "set")
    prepared = prepare(configured(preparation.Path("."), load_config(cli.RANDOM).run))
    assert prepared.config.run.as_posix() == "runs/set"


# ---------------------------------------------------------------- the whole way


def called(main, *argv):
    """Returns (exit status, stdout and stderr) of a script."""
    out, status = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main([str(argument) for argument in argv])
        except SystemExit as error:
            status = error.code
    return status, out.getvalue()


@pytest.fixture
def kept_programs(tmp_path, monkeypatch):
    """The evaluation uses the program that the training compiled."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    # Optax's schedules mix integers and floats.
    with tiny.restored_logging(), tiny.quick_compilation(), jax.numpy_dtype_promotion("standard"):
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()


@pytest.mark.usefixtures("kept_programs")
def test_a_folder_is_trained_on_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # From random weights, which need not fit a network of another width.
    monkeypatch.setattr(pretrained, "is_installed", lambda name: False)
    write_labelimg(tmp_path / "my set", 2)
    quick = ["--size", 64, "--model.backbone.width", 8, "--model.rpn.channels", 8, "--model.rpn.anchor_scales", 2]
    quick += ["--model.roi_features.output_size", 4, "--train.steps", 1, "--train.warmup_steps", 0]
    status, said = called(train_script.main, "my set", *quick, "--data.split", 1.0)
    assert status == 0, said
    order = ["data       my set: PASCAL VOC", "classes    2", "images     all 2", "run        runs/my set", "mAP "]
    assert sorted(order, key=said.index) == order
    # One evaluation chooses nothing.
    assert "split      all, also trained on" in said
    assert (tmp_path / "runs/my set/best").is_dir()
    # Images whose names have blanks: the table is there, and every file that can be.
    status, said = called(evaluate_script.main, "runs/my set")
    assert status == 0 and "\nclass " in said and "lack 2 images whose id has white space" in said, said
    assert ", also trained on" in said
    written = {path.name for path in (tmp_path / "runs/my set/evaluation/all").iterdir()}
    assert written == {"detections.json", "metrics.json", "comp4_det_all_disc.txt", "comp4_det_all_square.txt"}
