"""Tests VOC average precision against the numbers of the reference, a greedy loop, and cases computed by hand."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fidelity import compare
from handmade import dataset, found, record

from fasterrcnn_jax.data.records import Dataset, ImageDetections, ImageProposals, ImageRecord
from fasterrcnn_jax.evaluation import overlaps
from fasterrcnn_jax.evaluation.recall import proposal_recall
from fasterrcnn_jax.evaluation.report import mean_over_classes
from fasterrcnn_jax.evaluation.voc import (
    RECALL_POINTS,
    average_precision,
    precision_recall,
    voc_ap,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "average_precision.npz")
BOX, FAR_BOX = (10, 10, 30, 30), (50, 50, 70, 70)


def area_ap(detections, data):
    return voc_ap(detections, data, use_07_metric=False)


def golden_case():
    """Returns the golden file's inclusive boxes as continuous boxes."""
    gt, det = GOLDEN["gt"], GOLDEN["det"]
    inclusive = np.array([-1, -1, 0, 0])
    records, detections = [], []
    for image in range(GOLDEN["num_images"]):
        objects, rows = gt[gt[:, 0] == image], det[det[:, 0] == image]
        records.append(record(*((o[2:6] + inclusive, o[1], o[6]) for o in objects), image_id=str(image)))
        detections.append(found(*((r[2:6] + inclusive, r[6], r[1]) for r in rows)))
    return detections, dataset(*records, classes=int(GOLDEN["num_classes"]))


@pytest.mark.parametrize("column, iou_threshold", ((0, 0.5), (1, 0.7)))
@pytest.mark.parametrize("use_07_metric", (True, False))
def test_ap_equals_py_faster_rcnn(column, iou_threshold, use_07_metric):
    detections, data = golden_case()
    got = voc_ap(detections, data, iou_threshold=iou_threshold, use_07_metric=use_07_metric)
    want = GOLDEN["voc_ap"][:, column, 0 if use_07_metric else 1]
    metric = "11-point AP" if use_07_metric else "area AP"
    compare("average precision", "py-faster-rcnn", f"{metric}, IoU {iou_threshold}", got[:3], want[:3], atol=1e-9)
    assert np.isnan(got[3])  # no objects: the reference's 11-point form gives 0


@pytest.mark.parametrize("use_07_metric, suffix", ((True, "07"), (False, "area")))
def test_ap_equals_simple_faster_rcnn_pytorch(use_07_metric, suffix):
    """Also for a class without objects; the golden file has no overlap of exactly the threshold."""
    got = voc_ap(*golden_case(), use_07_metric=use_07_metric)
    both = np.append(got, mean_over_classes(got))
    theirs = np.append(GOLDEN[f"cy_ap_{suffix}"], GOLDEN[f"cy_map_{suffix}"])
    compare("average precision", "simple-faster-rcnn-pytorch", f"AP and mAP, {suffix}", both, theirs, atol=1e-9)


@pytest.mark.parametrize("iou_threshold, tag", ((0.5, "5"), (0.7, "7")))
def test_curves_equal_py_faster_rcnn(iou_threshold, tag):
    curves = precision_recall(*golden_case(), iou_threshold=iou_threshold)
    for label, (recall, precision) in enumerate(curves, start=1):
        curve = f"class {label}, IoU {iou_threshold}"
        theirs = [GOLDEN[f"voc_{kind}_c{label}_{tag}"] for kind in ("rec", "prec")]
        compare("average precision", "py-faster-rcnn", f"recall, {curve}", recall, theirs[0], atol=1e-9)
        compare("average precision", "py-faster-rcnn", f"precision, {curve}", precision, theirs[1], atol=1e-9)


def test_average_precision_of_a_curve_equals_py_faster_rcnn():
    recall, precision = GOLDEN["vocap_rec"], GOLDEN["vocap_prec"]
    got = [average_precision(recall, precision, use_07_metric=use_07) for use_07 in (True, False)]
    compare("average precision", "py-faster-rcnn", "AP of one curve", got, GOLDEN["vocap_11pt_area"], atol=1e-9)


def test_11_points_carry_the_float_noise_of_the_reference():
    np.testing.assert_array_equal(np.flatnonzero(RECALL_POINTS > np.arange(11) / 10), [3, 6, 7])
    np.testing.assert_array_equal(RECALL_POINTS, [k * 0.1 for k in range(11)])
    np.testing.assert_array_equal(RECALL_POINTS, np.linspace(0, 1, 11))


@pytest.mark.parametrize("tenths, points", [(0, 1), (1, 2), (2, 3), (3, 3), (4, 5), (5, 6), (6, 6), (7, 7), (10, 11)])
def test_recall_of_three_six_and_seven_tenths_misses_its_point_as_in_the_reference(tenths, points):
    found = average_precision(np.array([tenths / 10]), np.array([1.0]), use_07_metric=True)
    assert found == pytest.approx(points / 11, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_curves_equal_a_greedy_loop_on_crowded_images_with_ties(seed):
    rng = np.random.default_rng(seed)
    records, detections = [], []
    for image in range(8):

        def boxes(count):
            corner = rng.integers(0, 6, (count, 2))
            return np.concatenate([corner, corner + rng.integers(2, 7, (count, 2))], axis=1)

        objects = zip(boxes(rng.integers(0, 6)), rng.integers(1, 4, 6), rng.random(6) < 0.3)
        records.append(record(*objects, image_id=str(image)))
        rows = zip(boxes(rng.integers(0, 15)), rng.integers(0, 5, 15) / 4, rng.integers(1, 4, 15))
        detections.append(found(*rows))
    data = dataset(*records, classes=3)
    for label, (recall, precision) in enumerate(precision_recall(detections, data), start=1):
        want_recall, want_precision = greedy_curve(detections, data, label)
        np.testing.assert_allclose(recall, want_recall, atol=1e-12)
        np.testing.assert_allclose(precision, want_precision, atol=1e-12)


def greedy_curve(detections, data, label):
    """Matches one detection at a time, in exact integer arithmetic."""
    ranked = [
        (image, tuple(int(v) for v in box), score)
        for image, entry in enumerate(detections)
        for box, score, its_label in zip(*entry)
        if its_label == label
    ]
    ranked.sort(key=lambda row: -row[2])  # Python's sort is stable
    count = sum(((r.labels == label) & ~r.difficult).sum() for r in data.records)
    taken, hits, misses, recall, precision = set(), 0, 0, [], []
    for image, (x1, y1, x2, y2), _ in ranked:
        objects = data.records[image]
        best, best_pair = -1, (0, 1)
        for n in np.flatnonzero(objects.labels == label):
            a1, b1, a2, b2 = (int(v) for v in objects.boxes[n])
            shared = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - shared
            if best < 0 or shared * best_pair[1] > best_pair[0] * union:
                best, best_pair = n, (shared, union)
        if 2 * best_pair[0] <= best_pair[1]:
            misses += 1
        elif not objects.difficult[best]:
            hits, misses = hits + ((image, best) not in taken), misses + ((image, best) in taken)
            taken.add((image, best))
        recall.append(hits / count if count else np.nan)
        precision.append(hits / max(hits + misses, 1))
    return recall, precision


def test_detections_on_a_difficult_object_count_neither_way():
    data = dataset(record((BOX, 1, True), (FAR_BOX, 1, False)))
    detections = [found((BOX, 0.9, 1), (BOX, 0.8, 1), (FAR_BOX, 0.7, 1))]
    assert area_ap(detections, data) == [1.0]


def test_crowd_is_treated_as_a_difficult_object():
    data = dataset(record((BOX, 1, False), (FAR_BOX, 1, False), crowd=[True, False]))
    detections = [found((BOX, 0.9, 1), (BOX, 0.8, 1), (FAR_BOX, 0.7, 1))]
    assert area_ap(detections, data) == [1.0]


def test_second_detection_of_an_object_is_a_false_positive():
    data = dataset(record((BOX, 1, False), (FAR_BOX, 1, False)))
    detections = [found((BOX, 0.9, 1), (BOX, 0.8, 1), (FAR_BOX, 0.7, 1))]
    assert area_ap(detections, data) == pytest.approx([0.5 + 0.5 * 2 / 3])


def test_a_detection_is_held_against_its_best_object_even_if_that_is_taken():
    # (0, 0, 10, 8) overlaps the taken object by 0.8 and the free one by 8/12.
    data = dataset(record(((0, 0, 10, 10), 1, False), ((0, 0, 10, 12), 1, False)))
    detections = [found(((0, 0, 10, 10), 0.9, 1), ((0, 0, 10, 8), 0.8, 1))]
    assert area_ap(detections, data) == [0.5]


def test_iou_exactly_at_the_threshold_is_no_match():
    data = dataset(record(((0, 0, 10, 10), 1, False)))
    assert area_ap([found(((0, 0, 10, 5), 0.9, 1))], data) == [0.0]
    assert area_ap([found(((0, 0, 10, 5.01), 0.9, 1))], data) == [1.0]


def test_iou_is_decided_in_double_precision():
    # 8000000 / 15999999 is above 1/2; in float32 it is 1/2.
    data = dataset(record(((0, 0, 4001, 3999), 1, False)))
    assert area_ap([found(((0, 0, 4000, 2000), 0.9, 1))], data) == [1.0]


def test_boxes_without_area_do_not_match():
    data = dataset(record(((5, 5, 5, 5), 1, False)))
    assert area_ap([found(((5, 5, 5, 5), 0.9, 1))], data) == [0.0]


def test_an_object_of_another_class_or_image_is_no_match():
    data = dataset(record((BOX, 1, False)), record((FAR_BOX, 2, False)), classes=2)
    np.testing.assert_array_equal(area_ap([found((BOX, 0.9, 2)), found((BOX, 0.9, 1))], data), [0, 0])


def test_class_without_ground_truth_is_nan_in_both_metrics():
    data = dataset(record((BOX, 1, False), (BOX, 2, True)), classes=3)
    detections = [found((BOX, 0.9, 1), (BOX, 0.9, 2), (BOX, 0.9, 3))]
    for use_07_metric in (True, False):
        got = voc_ap(detections, data, use_07_metric=use_07_metric)
        np.testing.assert_allclose(got, [1.0, np.nan, np.nan])


@pytest.mark.parametrize("use_07_metric", (True, False))
def test_no_detections_give_zero(use_07_metric):
    data = dataset(record((BOX, 1, False)), record())
    assert voc_ap([found(), found()], data, use_07_metric=use_07_metric) == [0.0]


def test_detection_in_an_image_without_objects_is_a_false_positive():
    data = dataset(record(), record((BOX, 1, False)))
    assert area_ap([found((BOX, 0.9, 1)), found((BOX, 0.8, 1))], data) == [0.5]


def test_data_set_without_images_or_objects_is_nan():
    assert np.isnan(area_ap([], dataset(classes=2))).all()
    assert np.isnan(area_ap([found((BOX, 0.9, 1))], dataset(record())))


def test_equal_scores_keep_the_order_given():
    data = dataset(record((BOX, 1, False)), record())
    assert area_ap([found((BOX, 0.5, 1)), found((BOX, 0.5, 1))], data) == [1.0]
    assert area_ap([found((FAR_BOX, 0.5, 1), (BOX, 0.5, 1)), found()], data) == [0.5]


@pytest.mark.parametrize(
    "detections",
    (
        [],
        [found((BOX, np.nan, 1))],
        [found(((0, 0, np.inf, 1), 0.5, 1))],
        [found((BOX, 0.5, 0))],
        [found((BOX, 0.5, 2))],
        [found((BOX, 0.5, 1))._replace(scores=np.zeros(2))],
        [found((BOX, 0.5, 1))._replace(boxes=np.zeros((1, 5)))],
        [found((BOX, 0.5, 1))._replace(scores=np.zeros((1, 1)))],
        [found((BOX, 0.5, 1))._replace(labels=np.ones((1, 1), np.int32))],
        [found((BOX, 0.5, 1))._replace(labels=np.ones(1))],
    ),
)
def test_detections_that_do_not_fit_are_an_error(detections):
    with pytest.raises(ValueError, match="hand made|image 7"):
        area_ap(detections, dataset(record((BOX, 1, False), image_id="7")))


def test_threshold_outside_zero_to_one_is_an_error():
    with pytest.raises(ValueError, match="50"):
        voc_ap([], dataset(), iou_threshold=50, use_07_metric=True)
    with pytest.raises(ValueError, match="recall and precision"):
        average_precision(np.zeros(2), np.zeros(3), use_07_metric=True)


def test_thousands_of_boxes_take_little_memory_and_are_compared_in_parts(monkeypatch):
    """The IoU of 4,000 detections and 4,000 objects at once took 1 GB."""
    generator, count = np.random.default_rng(0), 3000
    corners = generator.uniform(0, 2000, (2, count, 2))
    sides = generator.uniform(5, 60, (2, count, 2))
    given, objects = np.concatenate([corners, corners + sides], axis=2).astype(np.float32)
    labels, flags = generator.integers(1, 3, count).astype(np.int32), np.zeros(count, bool)
    one = ImageRecord("a", None, (2100, 2100), objects, labels, flags, flags, np.ones(count))
    scores = np.linspace(1, 0, count).astype(np.float32)
    data = Dataset("dense", ("a", "b"), (one,), (), (1, 2))
    tracemalloc.start()
    first = voc_ap([ImageDetections(given, scores, labels)], data, use_07_metric=False)
    proposal_recall([ImageProposals(given, scores)], data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    monkeypatch.setattr("fasterrcnn_jax.evaluation.overlaps._PAIRS", 10**8)
    np.testing.assert_array_equal(first, voc_ap([ImageDetections(given, scores, labels)], data, use_07_metric=False))
    assert first.min() > 0


def test_boxes_far_from_each_other_are_not_compared(monkeypatch):
    """The time does not grow with the square of the boxes of an image."""
    compared, real = [], overlaps._compared
    monkeypatch.setattr(overlaps, "_compared", lambda *args: compared.append(len(args[2])) or real(*args))
    generator, count = np.random.default_rng(0), 2000
    corners = generator.uniform(0, 2000, (2, count, 2))
    given, objects = np.concatenate([corners, corners + 20], axis=2).astype(np.float32)
    labels, flags = np.ones(count, np.int32), np.zeros(count, bool)
    one = ImageRecord("a", None, (2100, 2100), objects, labels, flags, flags, np.ones(count))
    data = Dataset("dense", ("a",), (one,), (), (1,))
    voc_ap([ImageDetections(given, np.linspace(1, 0, count).astype(np.float32), labels)], data, use_07_metric=False)
    assert 0 < sum(compared) < count**2 / 20
