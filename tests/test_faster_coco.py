"""faster-coco-eval gives the numbers of pycocotools: on the golden file, by hand, and on many random images."""

import sys

import numpy as np
import pytest
from handmade import dataset, found, random_case, record
from test_coco_ap import golden_case

from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.coco import coco_ap

BOX, FAR_BOX, LAST = (10, 10, 60, 60), (100, 100, 150, 150), (200, 200, 250, 250)
NAME = "faster-coco-eval"


def assert_equal(detections, data):
    pytest.importorskip("faster_coco_eval")
    theirs, ours = coco_ap(detections, data, backend=NAME), coco_ap(detections, data)
    for name, value in ours._asdict().items():
        np.testing.assert_allclose(getattr(theirs, name), value, atol=1e-12, err_msg=name)
    return ours


@pytest.mark.parametrize("crowds", (False, True))
def test_numbers_on_the_golden_file(crowds):
    assert assert_equal(*golden_case(crowds)).ap > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_numbers_on_crowded_images_with_equal_scores(seed):
    assert assert_equal(*random_case(seed)).ap50 > 0.02


def test_difficult_objects_and_crowds_keep_their_own_overlap():
    small, small_too = (20, 20, 40, 40), (110, 110, 130, 130)
    data = dataset(record((BOX, 1, False), (FAR_BOX, 1, True), (LAST, 1, False), crowd=[True, False, False]))
    for rows, ap50 in (
        ([(small, 0.9, 1), (LAST, 0.7, 1)], 1.0),
        ([(small_too, 0.9, 1), (LAST, 0.7, 1)], 0.5),
        ([(FAR_BOX, 0.9, 1), (FAR_BOX, 0.8, 1), (LAST, 0.7, 1)], 1.0),
    ):
        assert assert_equal([found(*rows)], data).ap50 == pytest.approx(ap50)


def test_nothing_to_find_and_nothing_found():
    assert_equal([], dataset(classes=2))
    assert_equal([found((BOX, 0.9, 1))], dataset(record(), classes=2))
    assert_equal([found(), found()], dataset(record((BOX, 1, False)), record(), classes=2))


def test_a_missing_package_is_named_with_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    message = r"coco_backend = faster-coco-eval: .*pip install 'fasterrcnn_jax\[faster-coco-eval\]'"
    with pytest.raises(InputError, match=message):
        coco_ap([], dataset(), backend=NAME)


def test_nothing_is_printed(capfd):
    pytest.importorskip("faster_coco_eval")
    coco_ap(*golden_case(), backend=NAME)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_numbers_on_800_random_images():
    given, records = [], []
    for seed in range(4):
        some, data = random_case(seed, images=200, classes=10, most=60)
        given += some
        records += data.records
    names = tuple(f"class{number}" for number in range(10))
    records = tuple(of._replace(id=str(number)) for number, of in enumerate(records))
    assert assert_equal(given, Dataset("random", names, records, (), tuple(range(1, 11)))).ap_large > 0.01
