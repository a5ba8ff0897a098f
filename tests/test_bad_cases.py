"""Tests 128 bad inputs, strict and lenient, and the shared collection that they are modelled on."""

import dataclasses
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import bad_cases
import fuzz_readers
import jax
import numpy as np
import pytest
import tiny
import write_bad_inputs
from bad_cases import CASES, ERROR, NO_IMAGE, NO_OBJECT, NOTED, READ

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.loader import training_batches
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.data.sources import open_split
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.models.faster_rcnn import training_losses

SHARED = Path(__file__).parents[2] / "shared" / "data" / "bad"

# What a case of each kind in the collection may come to: strict, lenient.
ALLOWED = {
    "accept": ({READ, NOTED}, {READ, NOTED}),
    "accept_with_policy": ({READ, NOTED, ERROR}, {READ, NOTED, ERROR, NO_OBJECT}),
    "accept_or_error": ({READ, NOTED, ERROR}, {READ, NOTED, ERROR}),
    "accept_or_skip": ({READ, NOTED}, {READ, NOTED}),
    "error_or_accept": ({ERROR, NOTED}, {ERROR, NOTED}),
    "error_or_skip": ({ERROR, NOTED}, {NO_IMAGE, NO_OBJECT, NOTED}),
    "error_or_ignore": ({ERROR, NOTED}, {ERROR, NOTED, NO_IMAGE}),
    "error_or_warn": ({ERROR}, {NO_OBJECT}),
    # Lenient reading, and so `check`, goes on to the other faults.
    "error": ({ERROR}, {ERROR, NO_IMAGE}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Builds every case in a subfolder of its own folder, so that paths outside of the data exist."""
    root = tmp_path_factory.mktemp("cases")
    for name in CASES:
        bad_cases.build(name, root / name / "set")
    return {name: root / name / "set" for name in CASES}


def test_there_are_as_many_cases_as_the_page_says():
    assert len(CASES) == 128


@pytest.mark.parametrize("name", CASES)
def test_a_case_ends_as_the_page_says(folders, name):
    case = CASES[name]
    for faults, wanted in (("error", case.strict), ("skip", case.lenient)):
        ended, said = bad_cases.outcome(folders[name], faults=faults)
        assert ended == wanted, said
        assert [part for part in case.says if part not in said] == [], said
        assert "\n" not in said and len(said) < 700
        assert bool(said) == (ended != READ)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.lenient in (NO_IMAGE, NO_OBJECT)])
def test_lenient_reading_skips_counts_and_lists(folders, name):
    dataset = bad_cases.read(folders[name], faults="skip")
    (fault,) = [finding for finding in dataset.findings if finding.is_fault]
    assert [part for part in CASES[name].says if part not in fault.where] == []
    (note,) = dataset.notes
    assert f"{fault.sentence}: 1, the first in {fault.where.rstrip('.')}." == note
    # The healthy image is whole; of the other one object is left, or nothing.
    counts = sorted(len(record.boxes) for record in dataset.records)
    assert counts == ([2] if CASES[name].lenient == NO_IMAGE else [1, 2])


def test_unchanged_boxes_are_those_of_the_healthy_set(folders):
    """An irregularity does not change the boxes that are read after it."""
    changed = {
        "voc_image_1x1", "voc_panorama_6000x40", "voc_tall_40x6000", "voc_xml_no_objects", "voc_all_images_no_objects",
        "voc_box_zero_area", "voc_box_partly_outside", "voc_box_float", "voc_duplicate_box", "voc_box_covers_image",
        "voc_many_boxes_500", "voc_exif_rotated_xml_display_frame", "coco_zero_width", "coco_bbox_beyond_image",
        "coco_image_without_annotations", "voc_unknown_class", "voc_class_name_padded",
    }  # fmt: skip
    checked = 0
    for name, case in CASES.items():
        if case.strict == ERROR or name in changed:
            continue
        first, second = (record.boxes for record in bad_cases.read(folders[name]).records)
        exact = np.array(bad_cases.BOXES, np.float32)
        odd = exact + np.float32([[0, 0, 0, 0], [0.25, 0, 0.25, 0]]) if name.startswith("coco") else exact
        np.testing.assert_array_equal(first, odd if name.startswith("coco") else exact)
        np.testing.assert_array_equal(second, exact)
        checked += 1
    assert checked == 66


IMAGE = dataclasses.replace(tiny.IMAGE, canvases=((96, 96),))


@pytest.fixture(scope="module")
def batches(folders, tmp_path_factory):
    """Returns batches of all images that lenient reading keeps: one pixel, 6000 x 40, no box, 500 boxes, a full box."""
    different = {}
    for name, case in CASES.items():
        if case.lenient != ERROR:
            for record in bad_cases.read(folders[name], faults="skip").records:
                different[record.image_hw, record.boxes.tobytes(), record.crowd.tobytes()] = record
    data = DataConfig(
        root=tmp_path_factory.mktemp("none"), class_names=bad_cases.CLASSES, keep_empty=True, crop_aspect=None,
        flip="none",
    )  # fmt: skip
    dataset = prepare_training_set(Dataset("cases", bad_cases.CLASSES, tuple(different.values()), (), (1, 2)), data)
    assert 15 < len(dataset.records) < 33
    steps = -(-len(dataset.records) // 16)
    return list(training_batches(dataset, data, IMAGE, batch_size=16, seed=0, steps=steps))


def test_batches_of_all_the_cases_are_finite_and_their_boxes_have_an_area(batches):
    for batch in batches:
        assert all(np.isfinite(array).all() for array in jax.tree.leaves(batch))
        boxes = batch.ground_truth.boxes[batch.ground_truth.valid]
        # 6000 pixels times float32(96 / 6000) are 96 and one bit.
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all() and (boxes <= 96 + 2**-17).all()
        assert (batch.image_hw[batch.image_valid] >= 1).all() and (batch.scale > 0).all()
    assert max(batch.ground_truth.valid.sum(axis=1).max() for batch in batches) == 100


@pytest.mark.slow
def test_all_the_cases_together_train_with_a_finite_loss(batches):
    with tiny.quick_compilation():
        model = create_detector(dataclasses.replace(tiny.MODEL, image=IMAGE), bad_cases.CLASSES, seed=0)
        losses = jax.jit(training_losses)
        for number, batch in enumerate(batches):
            numbers = jax.tree.leaves(losses(model, batch, jax.random.key(number)))
            assert len(numbers) >= 8 and all(np.isfinite(number) for number in numbers)


def test_a_split_is_opened_as_the_configuration_says(folders, caplog):
    """Images that cannot be decoded are skipped too, so that a run does not stop at one of them."""
    data = DataConfig(root=folders["voc_truncated_jpeg"], class_names=bad_cases.CLASSES)
    assert [record.id for record in open_split(data, "train").records] == ["ok", "odd"]
    with caplog.at_level(logging.WARNING, logger="fasterrcnn_jax"):
        (record,) = open_split(dataclasses.replace(data, faults="skip"), "train").records
    assert record.id == "ok" and "Faulty images were skipped: 1, the first in" in caplog.text
    data = dataclasses.replace(data, root=folders["voc_box_inverted"])
    with pytest.raises(InputError, match="xmin 60 is greater"):
        open_split(data, "train")
    _, record = open_split(dataclasses.replace(data, faults="skip"), "train").records
    np.testing.assert_array_equal(record.boxes, bad_cases.BOXES[1:])
    data = DataConfig(
        root=folders["coco_bbox_nan"], layout="coco", class_names=bad_cases.CLASSES,
        coco_annotations="instances.json", coco_images="images",
    )  # fmt: skip
    with pytest.raises(InputError, match="nan"):
        open_split(data, "train")
    assert len(open_split(dataclasses.replace(data, faults="skip"), "train").records[0].boxes) == 1


def test_a_set_with_nothing_left_is_an_error_in_lenient_reading_too(tmp_path):
    bad_cases.write_voc(tmp_path / "images")
    for name in ("ok", "odd"):
        (tmp_path / f"images/JPEGImages/{name}.png").write_bytes(b"")
    with pytest.raises(InputError, match="no image is left because .*: 2, the first in .*ok.png: not an image"):
        bad_cases.read(tmp_path / "images", faults="skip")
    bad_cases.write_voc(tmp_path / "objects")
    bad_cases.no_objects_at_all(tmp_path / "objects")
    odd = "<object><name>square</name></object></annotation>"
    bad_cases.replace("</annotation>", odd)(tmp_path / "objects")
    with pytest.raises(InputError, match="no object in its images is left .*: 1, the first in .*odd.xml, object 1"):
        bad_cases.read(tmp_path / "objects", faults="skip")


# The folder that is read now; None: nothing is watched. A hook cannot be taken away again.
WATCHED = {"folder": None, "opened": []}


def watch(event, arguments):
    # Files of the system (fonts, modules) are read while no case is being read.
    if event == "open" and WATCHED["folder"] is not None and isinstance(arguments[0], str | bytes):
        WATCHED["opened"].append(os.fsdecode(arguments[0]))
    elif WATCHED["folder"] is not None and event.split(".")[0] in ("subprocess", "socket", "urllib"):
        WATCHED["opened"].append(f"{event} {arguments}")


def test_no_case_reads_outside_its_folder_or_takes_long(folders):
    """Uses Python's audit hook, which sees every opened file in all threads and modules."""
    bad_cases.outcome(folders["coco_healthy_sparse_ids"], faults="skip")  # modules that are loaded late
    sys.addaudithook(watch)
    for name, folder in folders.items():
        for faults in ("error", "skip"):
            WATCHED.update(folder=folder, opened=[])
            start = time.process_time()
            try:
                bad_cases.outcome(folder, faults=faults)
            finally:
                WATCHED["folder"] = None
            assert time.process_time() - start < 2.0, name
            assert WATCHED["opened"] or name == "voc_list_missing"
            for path in WATCHED["opened"]:
                assert Path(path).resolve().is_relative_to(folder.resolve()), (name, path)


def test_inputs_that_would_expand_are_refused_before_they_use_memory(tmp_path):
    """400 million pixels, 10^9 characters of entities, deeply nested lists: a new process uses less than 200 MB."""
    for name in ("voc_png_bomb_20000x20000", "voc_xml_billion_laughs"):
        bad_cases.build(name, tmp_path / name)
    bad_cases.write_coco(tmp_path / "nested")
    bad_cases.holding(b"[" * 1_000_000)(tmp_path / "nested")
    program = (
        "import resource, sys; from pathlib import Path; import bad_cases\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "root = Path(sys.argv[1]); bad_cases.write_voc(root / 'healthy'); bad_cases.outcome(root / 'healthy')\n"
        "before = used()\n"
        "for folder in sys.argv[2:]:\n"
        "    print(bad_cases.outcome(root / folder)[0], bad_cases.outcome(root / folder, faults='skip')[0])\n"
        "print(used() - before)\n"
    )
    folders = ["voc_png_bomb_20000x20000", "voc_xml_billion_laughs", "nested"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    said = subprocess.run(
        [sys.executable, "-c", program, tmp_path, *folders],
        env=os.environ | {"PYTHONPATH": paths}, check=True, capture_output=True, text=True, timeout=60,
    ).stdout.split("\n")  # fmt: skip
    assert said[:3] == ["error image skipped", "error image skipped", "error error"]
    assert int(said[3]) < 200 * 1024  # kilobytes


def test_the_page_is_what_the_readers_say(folders):
    """`python tests/write_bad_inputs.py` writes the page again."""
    assert write_bad_inputs.PAGE.read_text() == write_bad_inputs.page(folders)


@pytest.mark.parametrize("name", CASES)
def test_the_collection_ends_as_our_own_cases_and_as_it_expects(name):
    if not (SHARED / "expected.json").is_file():
        pytest.skip(f"the collection of bad inputs is not at {SHARED.name} beside the repository")
    expected = json.loads((SHARED / "expected.json").read_text())
    assert set(expected["cases"]) < set(CASES)
    if name not in expected["cases"]:
        pytest.skip("a case of our own")
    wanted = expected["cases"][name]
    for faults, allowed, ours in zip(("error", "skip"), ALLOWED[wanted["outcome"]], CASES[name][1:3]):
        ended, said = bad_cases.outcome(SHARED / name, faults=faults)
        assert ended == ours and ended in allowed, said
        if ended != READ:
            assert [part for part in wanted["message_should_name"] if part not in said] == [], said


def test_spoiled_annotations_give_records_or_one_sentence(tmp_path):
    """A short version of `python tests/fuzz_readers.py --minutes 10`."""
    fuzz_readers.prepare(tmp_path)
    read = sum(fuzz_readers.attempt(tmp_path, seed) for seed in range(300))
    assert 50 < read < 280


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged files
def test_spoiled_images_give_pixels_or_one_sentence(tmp_path):
    """A short version of `python tests/fuzz_readers.py --of images`."""
    assert 200 < sum(fuzz_readers.attempt_image(tmp_path, seed) for seed in range(1200)) < 600


@pytest.mark.skipif(importlib.util.find_spec("tensorflow_datasets") is None, reason="needs the extra tfds")
def test_spoiled_descriptions_of_tfds_give_records_or_one_sentence(tmp_path):
    """A short version of `python tests/fuzz_readers.py --of tfds`."""
    fuzz_readers.prepare_tfds(tmp_path)
    assert 5 < sum(fuzz_readers.attempt_tfds(tmp_path, seed) for seed in range(150)) < 60
