"""Tests COCO average precision against the numbers of pycocotools and cases computed by hand."""

from pathlib import Path

import numpy as np
import pytest
from fidelity import compare
from handmade import dataset, found, record

from fasterrcnn_jax.evaluation.coco import coco_ap

GOLDEN = np.load(Path(__file__).parent / "golden" / "average_precision.npz")
BOX, FAR_BOX = (10, 10, 60, 60), (100, 100, 150, 150)


def golden_case(crowds=False):
    """Returns the golden file's boxes, continuous as in its COCO run; difficult ones are ordinary or crowds."""
    gt, det = GOLDEN["gt"], GOLDEN["det"]
    records, detections = [], []
    for image in range(GOLDEN["num_images"]):
        objects, rows = gt[gt[:, 0] == image], det[det[:, 0] == image]
        crowd = objects[:, 6] if crowds else None
        records.append(record(*((o[2:6], o[1], False) for o in objects), image_id=f"{image:06d}", crowd=crowd))
        detections.append(found(*((r[2:6], r[6], r[1]) for r in rows)))
    return detections, dataset(*records, classes=int(GOLDEN["num_classes"]))


@pytest.mark.parametrize("crowds, suffix", ((False, ""), (True, "_crowd")))
def test_numbers_equal_pycocotools_on_files(crowds, suffix):
    got = coco_ap(*golden_case(crowds))
    want = GOLDEN[f"coco_stats{suffix}"]
    name = f"12 COCO numbers{suffix.replace('_', ', ')}"
    compare("average precision", "pycocotools", name, got[:12], want, atol=1e-9)


@pytest.mark.parametrize("crowds, suffix", ((False, ""), (True, "_crowd")))
def test_numbers_per_class_equal_pycocotools_on_files(crowds, suffix):
    got, want = coco_ap(*golden_case(crowds)), GOLDEN[f"coco_ap_per_class_iou{suffix}"]
    ours = np.column_stack([got.class_iou_ap, got.class_ap, got.class_ap50])[:3]
    theirs = np.column_stack([want, want.mean(axis=1), want[:, 0]])[:3]
    name = f"AP per class and IoU{suffix.replace('_', ', ')}"
    compare("average precision", "pycocotools", name, ours, theirs, atol=1e-9)
    assert np.isnan([got.class_ap[3], got.class_ap50[3]]).all()  # no objects: pycocotools gives -1


def test_nothing_is_printed(capsys):
    coco_ap(*golden_case())
    assert capsys.readouterr() == ("", "")


def test_detections_on_a_difficult_object_count_neither_way():
    # Two on the difficult object: one that is only "ignored" in pycocotools would take the first alone.
    data = dataset(record((BOX, 1, True), (FAR_BOX, 1, False)))
    got = coco_ap([found((BOX, 0.9, 1), (BOX, 0.8, 1), (FAR_BOX, 0.7, 1))], data)
    assert (got.ap, got.ap50) == pytest.approx((1.0, 1.0))


def test_difficult_object_overlaps_by_ordinary_iou():
    # The small box lies inside the difficult one: crowd IoU 1, IoU 0.16.
    data = dataset(record((BOX, 1, True), (FAR_BOX, 1, False)))
    got = coco_ap([found(((20, 20, 40, 40), 0.9, 1), (FAR_BOX, 0.7, 1))], data)
    assert got.ap50 == pytest.approx(0.5)


def test_crowd_overlaps_by_the_part_of_the_detection_inside_it():
    data = dataset(record((BOX, 1, False), (FAR_BOX, 1, False), crowd=[True, False]))
    got = coco_ap([found(((20, 20, 40, 40), 0.9, 1), ((0, 0, 15, 15), 0.8, 1), (FAR_BOX, 0.7, 1))], data)
    # The first lies inside the crowd; of the second a ninth does, so that it is a false positive.
    assert got.ap50 == pytest.approx(0.5)
    assert coco_ap([found(((20, 20, 40, 40), 0.9, 1), (FAR_BOX, 0.7, 1))], data).ap50 == pytest.approx(1.0)


def test_crowd_and_difficult_object_of_one_class_keep_their_own_overlap():
    small, small_too = (20, 20, 40, 40), (110, 110, 130, 130)
    last = (200, 200, 250, 250)
    data = dataset(record((BOX, 1, False), (FAR_BOX, 1, True), (last, 1, False), crowd=[True, False, False]))
    assert coco_ap([found((small, 0.9, 1), (last, 0.7, 1))], data).ap50 == pytest.approx(1.0)
    assert coco_ap([found((small_too, 0.9, 1), (last, 0.7, 1))], data).ap50 == pytest.approx(0.5)


def test_difficult_objects_do_not_count_for_recall():
    data = dataset(record((BOX, 1, True), (BOX, 2, False)), classes=2)
    got = coco_ap([found((BOX, 0.9, 2))], data)
    np.testing.assert_allclose(got.class_ap50, [np.nan, 1.0])
    assert (got.ap50, got.ar_100) == pytest.approx((1.0, 1.0))


def test_second_detection_of_an_object_is_a_false_positive():
    data = dataset(record((BOX, 1, False), (FAR_BOX, 1, False)))
    got = coco_ap([found((BOX, 0.9, 1), (BOX, 0.8, 1), (FAR_BOX, 0.7, 1))], data)
    # Recall 0, 0.01, ..., 0.5 at precision 1; 0.51, ..., 1 at 2/3.
    assert got.ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_iou_exactly_at_the_threshold_is_a_match_unlike_voc():
    got = coco_ap([found(((0, 0, 40, 20), 0.9, 1))], dataset(record(((0, 0, 40, 40), 1, False))))
    assert got.ap50 == pytest.approx(1.0) and got.ap75 == 0.0
    assert got.ap == pytest.approx(0.1)  # 1 of 10 thresholds


def test_area_ranges_use_the_area_of_the_record():
    small, medium, large = (0, 0, 20, 20), (50, 50, 100, 100), (120, 120, 280, 280)
    objects = (small, 1, False), (medium, 1, False), (large, 1, False)
    detections = [found((small, 0.9, 1), (large, 0.8, 1))]
    got = coco_ap(detections, dataset(record(*objects)))
    assert (got.ap_small, got.ap_medium, got.ap_large) == pytest.approx((1.0, 0.0, 1.0))
    assert (got.ar_small, got.ar_medium, got.ar_large) == pytest.approx((1.0, 0.0, 1.0))
    np.testing.assert_allclose(got.class_size_ap, [[1.0, 0.0, 1.0]])
    # The outline of the largest covers less than 96^2 of its 160^2 pixels.
    got = coco_ap(detections, dataset(record(*objects, area=[400, 2500, 9000])))
    assert got.ap_small == pytest.approx(1.0) and np.isnan(got.ap_large)
    assert got.ap_medium == pytest.approx(51 / 101)  # one of two


def test_recall_counts_up_to_1_and_10_detections():
    data = dataset(record((BOX, 1, False), (FAR_BOX, 1, False)))
    got = coco_ap([found((BOX, 0.9, 1), *[((200, 200, 250, 250), 0.8, 1)] * 9, (FAR_BOX, 0.7, 1))], data)
    assert (got.ar_1, got.ar_10, got.ar_100) == pytest.approx((0.5, 0.5, 1.0))
    np.testing.assert_allclose(got.class_ar_100, [1.0])


def test_recall_counts_up_to_100_detections_of_an_image_and_class():
    data = dataset(record((BOX, 1, False)))
    for misses, recall in ((99, 1.0), (100, 0.0)):
        got = coco_ap([found(*[(FAR_BOX, 0.9, 1)] * misses, (BOX, 0.8, 1))], data)
        assert got.ar_100 == pytest.approx(recall)


def test_no_detections_give_zero():
    got = coco_ap([found(), found()], dataset(record((BOX, 1, False)), record(), classes=2))
    assert (got.ap, got.ap50, got.ap75, got.ap_medium, got.ar_100) == (0, 0, 0, 0, 0)
    np.testing.assert_array_equal(got.class_ap, [0, np.nan])
    assert np.isnan(got.ap_small)


def test_detection_in_an_image_without_objects_is_a_false_positive():
    data = dataset(record(), record((BOX, 1, False)))
    assert coco_ap([found((BOX, 0.9, 1)), found((BOX, 0.8, 1))], data).ap50 == pytest.approx(0.5)


def test_data_set_without_objects_is_nan():
    for detections, data in (([], dataset(classes=2)), ([found((BOX, 0.9, 1))], dataset(record(), classes=2))):
        got = coco_ap(detections, data)
        assert np.isnan([got.ap, got.ap50, got.ar_100]).all()
        assert got.class_ap.shape == got.class_ap50.shape == (2,)
        assert np.isnan(got.class_ap).all() and np.isnan(got.class_ap50).all()


def test_equal_scores_keep_the_order_given():
    data = dataset(record((BOX, 1, False)), record())
    assert coco_ap([found((BOX, 0.5, 1)), found((BOX, 0.5, 1))], data).ap50 == pytest.approx(1.0)
    assert coco_ap([found((FAR_BOX, 0.5, 1), (BOX, 0.5, 1)), found()], data).ap50 == pytest.approx(0.5)


def test_detections_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="hand made"):
        coco_ap([], dataset(record((BOX, 1, False))))
    with pytest.raises(ValueError, match="image 0: labels"):
        coco_ap([found((BOX, 0.5, 2))], dataset(record((BOX, 1, False))))
