"""Tests the analysis of detections: kinds of errors, AP that each costs, curves, confusion and calibration."""

from pathlib import Path

import numpy as np
import pytest
from fidelity import compare
from handmade import dataset, found, random_case, record

from fasterrcnn_jax.evaluation import analysis, overlaps
from fasterrcnn_jax.evaluation.analysis import ERRORS, KINDS, analyse, average_precision_101
from fasterrcnn_jax.evaluation.coco import coco_ap

TIDE = np.load(Path(__file__).parent / "golden" / "tide.npz")
BOX, FAR, THIRD = (10, 10, 60, 60), (100, 100, 150, 150), (200, 200, 250, 250)


def shifted(box, by):
    """Moves a box of 50 x 50 pixels to the right."""
    return (box[0] + by, box[1], box[2] + by, box[3])


def kinds(result):
    return [KINDS[kind] for kind in result.detections.kind]


def counts(result):
    return dict(zip(ERRORS, result.errors.count.sum(axis=1).tolist()))


def delta(result):
    return dict(zip(ERRORS, result.errors.delta.tolist()))


def golden_case(seed):
    gt, det = TIDE[f"gt_{seed}"], TIDE[f"det_{seed}"]
    images = range(30)
    records = [
        record(*((row[2:6], row[1], False) for row in gt[gt[:, 0] == image]), image_id=str(image)) for image in images
    ]
    given = [found(*((row[2:6], row[6], row[1]) for row in det[det[:, 0] == image])) for image in images]
    return given, dataset(*records, classes=4)


# Kinds


@pytest.mark.parametrize(
    "box, label, kind, iou",
    [
        (shifted(BOX, 5), 1, "correct", 45 / 55),
        (shifted(BOX, 40), 1, "localisation", 10 / 90),
        (shifted(BOX, 5), 2, "class", 45 / 55),
        (shifted(BOX, 40), 2, "both", 10 / 90),
        (shifted(BOX, 45), 1, "background", 5 / 95),
        (shifted(BOX, 45), 2, "background", 5 / 95),
        (FAR, 1, "background", 0.0),
    ],
)
def test_one_detection_beside_one_object(box, label, kind, iou):
    result = analyse([found((box, 0.9, label))], dataset(record((BOX, 1, False)), classes=2))
    assert kinds(result) == [kind]
    assert result.detections.iou[0] == pytest.approx(iou)
    assert result.detections.object[0] == (-1 if kind == "background" else 0)
    # An error of both explains nothing: nobody knows which object was meant.
    assert result.objects.missed.tolist() == [kind in ("both", "background")]
    assert result.objects.detection.tolist() == [0 if kind == "correct" else -1]


def test_a_second_detection_of_a_found_object_is_a_duplicate():
    result = analyse([found((BOX, 0.9, 1), (BOX, 0.8, 1))], dataset(record((BOX, 1, False))))
    assert kinds(result) == ["correct", "duplicate"] and result.detections.object.tolist() == [0, 0]


def test_the_better_score_finds_the_object_even_with_the_lower_iou():
    result = analyse([found((BOX, 0.8, 1), (shifted(BOX, 10), 0.9, 1))], dataset(record((BOX, 1, False))))
    assert kinds(result) == ["correct", "duplicate"]  # by descending score
    assert result.detections.index.tolist() == [1, 0]


def test_a_localisation_error_comes_before_a_class_error_and_a_class_error_before_a_duplicate():
    """The order of the program of the authors; the paper does not say which holds."""
    data = dataset(record((BOX, 1, False), (shifted(BOX, 30), 2, False)), classes=2)
    result = analyse([found((shifted(BOX, 30), 0.9, 1))], data)
    assert kinds(result) == ["localisation"]  # IoU .25 with class 1, 1 with class 2
    data = dataset(record((BOX, 1, False), (BOX, 2, False)), classes=2)
    result = analyse([found((BOX, 0.9, 1), (BOX, 0.8, 1))], data)
    assert kinds(result) == ["correct", "class"]


@pytest.mark.parametrize("sides, kind", [((0, 0, 40, 20), "correct"), ((0, 0, 40, 4), "localisation")])
def test_an_iou_of_exactly_a_threshold_is_high_enough(sides, kind):
    """IoU of exactly 1/2 and 1/10."""
    result = analyse([found((sides, 0.9, 1))], dataset(record(((0, 0, 40, 40), 1, False))))
    assert kinds(result) == [kind]


def test_detections_on_difficult_objects_and_crowds_are_ignored():
    small = (110, 110, 120, 120)  # inside FAR: IoU .04
    data = dataset(record((BOX, 1, True), (FAR, 1, False), crowd=[False, True]), classes=2)
    result = analyse([found((BOX, 0.9, 1), (BOX, 0.8, 1), (small, 0.7, 1), (BOX, 0.6, 2))], data)
    # Of another class, they are no objects.
    assert kinds(result) == ["ignored", "ignored", "ignored", "background"]
    assert result.detections.object.tolist() == [0, 0, 1, -1]
    assert result.objects.ignored.all() and not result.objects.missed.any()
    assert result.objects.predicted_label.tolist() == [-1, -1]
    assert result.errors.count.sum() == 1 and np.isnan(result.errors.ap50) and np.isnan(result.errors.delta).all()
    assert result.calibration.count.sum() == 1


def test_only_the_best_100_of_an_image_and_class_take_part():
    result = one_class([(BOX, 1)], [(FAR, 0.9, 1)] * 100 + [(BOX, 0.8, 1), (BOX, 0.8, 2)], classes=2)
    assert len(result.detections.kind) == 101 and result.objects.missed.tolist() == [False]  # explained by class 2
    assert counts(result)["background"] == 100 and counts(result)["class"] == 1


def test_planted_errors_are_found_in_their_kinds():
    """Ten images for each kind, and ten without an error."""
    planted = {
        "correct": ([(BOX, 1)], [(BOX, 0.9, 1)]),
        "class": ([(BOX, 1)], [(BOX, 0.5, 2)]),
        "localisation": ([(BOX, 1)], [(shifted(BOX, 25), 0.5, 1)]),
        "both": ([(BOX, 1)], [(shifted(BOX, 25), 0.99, 2)]),
        "duplicate": ([(BOX, 1)], [(BOX, 0.96, 1), (BOX, 0.97, 1)]),
        "background": ([(BOX, 2)], [(BOX, 0.9, 2), (FAR, 0.95, 2)]),
        "missed": ([(BOX, 2)], []),
    }
    records, given = [], []
    for objects, rows in planted.values():
        records += [record(*((box, label, False) for box, label in objects))] * 10
        given += [found(*rows)] * 10
    result = analyse(given, dataset(*records, classes=2))
    # An error of both explains no object, so that its object is also missed.
    assert counts(result) == dict.fromkeys(ERRORS, 10) | {"missed": 20}
    of_image = [kind for kind in planted for _ in range(10)]
    for image, kind in zip(result.detections.image, kinds(result)):
        assert kind in (of_image[image], "correct")
    missed = [of_image[image] for image in result.objects.image[result.objects.missed]]
    assert missed == ["both"] * 10 + ["missed"] * 10
    assert (result.errors.delta > 0).all()


# AP that each kind costs


def one_class(objects, rows, classes=1):
    return analyse([found(*rows)], dataset(record(*((box, label, False) for box, label in objects)), classes=classes))


def test_the_ap_that_a_localisation_error_costs():
    result = one_class([(BOX, 1), (FAR, 1)], [(BOX, 0.9, 1), (shifted(FAR, 25), 0.8, 1)])
    # 51 of 101 recall points at precision 1; with the second box in place, all.
    assert result.errors.ap50 == pytest.approx(51 / 101)
    assert delta(result) == pytest.approx(dict.fromkeys(ERRORS, 0.0) | {"localisation": 50 / 101})


def test_the_ap_that_a_class_error_costs_is_gained_in_both_classes():
    rows = [(BOX, 0.9, 1), (FAR, 0.95, 1)]
    result = one_class([(BOX, 1), (FAR, 2)], rows, classes=2)
    # Class 1 has one false positive before its object: AP 1/2. Class 2 has nothing: 0. Afterwards both are 1.
    assert result.errors.class_ap50 == pytest.approx([0.5, 0.0])
    assert delta(result) == pytest.approx(dict.fromkeys(ERRORS, 0.0) | {"class": 0.75})


def test_of_two_errors_on_one_object_the_better_score_is_mended_and_the_other_is_taken_away():
    rows = [(shifted(BOX, 20), 0.9, 1), (shifted(BOX, 25), 0.8, 1), (FAR, 0.7, 1)]
    result = one_class([(BOX, 1), (FAR, 1)], rows)
    assert kinds(result) == ["localisation", "localisation", "correct"]
    # The only object that is found comes third: 51 points at 1/3.
    assert result.errors.ap50 == pytest.approx(51 / 3 / 101)
    assert result.errors.delta[1] == pytest.approx(1 - 51 / 3 / 101)


def test_a_localisation_error_on_a_found_object_is_taken_away():
    result = one_class([(BOX, 1)], [(shifted(BOX, 25), 0.9, 1), (BOX, 0.8, 1)])
    assert kinds(result) == ["localisation", "correct"]
    assert delta(result) == pytest.approx(dict.fromkeys(ERRORS, 0.0) | {"localisation": 0.5})


def test_duplicates_background_and_errors_of_both_are_taken_away():
    rows = [(BOX, 0.9, 1), (BOX, 0.8, 1), (THIRD, 0.7, 1), (FAR, 0.6, 1)]
    result = one_class([(BOX, 1), (FAR, 1)], rows)
    # The second object comes fourth: 51 points at 1, 50 at 2/4. Without one false positive: 50 at 2/3.
    assert result.errors.ap50 == pytest.approx((51 + 25) / 101)
    gain = 50 * (2 / 3 - 1 / 2) / 101
    assert delta(result) == pytest.approx(dict.fromkeys(ERRORS, 0.0) | {"duplicate": gain, "background": gain})
    result = one_class([(BOX, 1), (FAR, 2)], [(shifted(FAR, 25), 0.9, 1), (BOX, 0.8, 1)], classes=2)
    assert delta(result)["both"] == pytest.approx(0.25)


def test_missed_objects_are_taken_away():
    result = one_class([(BOX, 1), (FAR, 1)], [(BOX, 0.9, 1)])
    assert delta(result) == pytest.approx(dict.fromkeys(ERRORS, 0.0) | {"missed": 50 / 101})
    # Nothing is left: nothing is wrong.
    assert delta(one_class([(BOX, 1)], []))["missed"] == 1.0


def test_the_gains_do_not_add_up():
    """Each kind is mended alone: the object is missed because nothing fits, and two false positives hide each other."""
    rows = [(FAR, 0.9, 1), (BOX, 0.7, 1), (BOX, 0.6, 1)]
    result = one_class([(BOX, 1), (THIRD, 1)], rows)
    total = result.errors.ap50 + result.errors.delta.sum()
    assert result.errors.ap50 == pytest.approx(51 / 2 / 101) and 0.7 < total < 1.0
    assert total == pytest.approx((51 / 2 + 51 / 2 + 50 / 2) / 101)


def test_scores_of_0_for_false_positives_and_leaving_out_what_is_not_found():
    rows = [(THIRD, 0.9, 1), (BOX, 0.8, 1)]
    result = one_class([(BOX, 1), (FAR, 1)], rows)
    assert result.errors.ap50 == pytest.approx(51 / 2 / 101)
    assert result.errors.false_positive_delta == pytest.approx(51 / 2 / 101)  # half of the objects at precision 1
    assert result.errors.false_negative_delta == pytest.approx(1 / 2 - 51 / 2 / 101)  # all objects at precision 1/2


@pytest.mark.parametrize("seed", range(3))
def test_kinds_and_gains_equal_those_of_tidecv(seed, monkeypatch):
    # Its recall points are k / 100, with other bits than COCO's.
    monkeypatch.setattr(analysis, "RECALLS", np.arange(101) / 100)
    given, data = golden_case(seed)
    result, theirs = analyse(given, data), TIDE[f"det_{seed}"][:, 0]
    rows = result.detections
    place = np.array([np.flatnonzero(theirs == image)[index] for image, index in zip(rows.image, rows.index)])
    name = f"set {seed}"
    compare("errors by kind", "tidecv", f"kind of each detection, {name}", rows.kind, TIDE[f"kind_{seed}"][place])
    compare("errors by kind", "tidecv", f"missed objects, {name}", result.objects.missed, TIDE[f"missed_{seed}"])
    special = [result.errors.false_positive_delta, result.errors.false_negative_delta]
    numbers = np.array([result.errors.ap50, *result.errors.delta[2:], *special])
    delta = TIDE[f"delta_{seed}"] / 100
    want = np.array([TIDE[f"ap_{seed}"] / 100, *delta[2:], *TIDE[f"special_{seed}"] / 100])
    compare("errors by kind", "tidecv", f"AP and AP gained, {name}", numbers, want, atol=1e-9)
    # tidecv mends a class error only if no localisation error with a better score refers to the same object, and the
    # reverse, although it mends each kind alone. Set 2 has no such object.
    if seed == 2:
        name = f"AP gained of class and localisation errors, {name}"
        compare("errors by kind", "tidecv", name, result.errors.delta[:2], delta[:2], atol=1e-9)
    else:
        assert (result.errors.delta[:2] > delta[:2] - 1e-9).all()


@pytest.mark.parametrize("seed", range(4))
def test_ap50_equals_cocos(seed):
    given, data = random_case(seed)
    result, coco = analyse(given, data), coco_ap(given, data)
    np.testing.assert_allclose(result.errors.class_ap50, coco.class_ap50, atol=1e-12)
    assert result.errors.ap50 == pytest.approx(coco.ap50, abs=1e-12)


def test_average_precision_of_a_ranking():
    assert average_precision_101(np.array([True, False, True]), 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision_101(np.zeros(0, bool), 2) == average_precision_101(np.array([False]), 0) == 0.0


# Overlaps and matching


@pytest.mark.parametrize("parts", [2**20, 7])
@pytest.mark.parametrize("seed", range(3))
def test_overlaps_equal_those_of_all_pairs(seed, parts, monkeypatch):
    monkeypatch.setattr(overlaps, "_PAIRS", parts)
    rng = np.random.default_rng(seed)
    groups, other_groups = rng.integers(0, 9, 150) * 10**6, rng.integers(0, 9, 40) * 10**6
    corner, other_corner = rng.uniform(-300, 3000, (150, 2)), rng.uniform(-300, 3000, (40, 2))
    boxes = np.concatenate([corner, corner + rng.exponential(400, (150, 2))], axis=1)
    others = np.concatenate([other_corner, other_corner + rng.exponential(900, (40, 2))], axis=1)
    got = overlaps.overlapping_pairs(boxes, groups, others, other_groups)
    want = []
    for row, box in enumerate(boxes):
        for column, other in enumerate(others):
            sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
            if groups[row] == other_groups[column] and (sides > 0).all():
                area, other_area = ((of[2:] - of[:2]).prod() for of in (box, other))
                shared = sides.prod()
                want.append((row, column, shared / (area + other_area - shared), shared / area))
    assert len(want) > 40
    np.testing.assert_allclose(np.stack(got, axis=1), want, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_matching_in_rounds_equals_the_loop(seed):
    rng = np.random.default_rng(seed)
    iou = rng.integers(0, 5, (40, 12)) / 4.0  # many are equal
    rows, columns = np.nonzero(iou > 0)
    pairs = overlaps.Overlaps(rows, columns, iou[rows, columns], iou[rows, columns])
    want, free = np.full(40, -1), np.ones(12, bool)
    for row in range(40):
        able = np.flatnonzero(free & (iou[row] > 0))
        if len(able):
            want[row] = max(able, key=lambda column: (iou[row, column], column))
            free[want[row]] = False
    assert (want >= 0).sum() == 12
    np.testing.assert_array_equal(overlaps.matched_in_order(pairs, 40, 12), want)


# Curves and thresholds


def test_curve_and_best_threshold_of_a_class():
    rows = [(BOX, 0.9, 1), (THIRD, 0.8, 1), (FAR, 0.7, 1), (shifted(THIRD, 60), 0.6, 1)]
    curve = one_class([(BOX, 1), (FAR, 1)], rows).curves[0]
    np.testing.assert_allclose(curve.score, np.float32([0.9, 0.8, 0.7, 0.6]))
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 2 / 3, 2 / 4])
    np.testing.assert_allclose(curve.recall, [1 / 2, 1 / 2, 1, 1])
    np.testing.assert_allclose(curve.f1, [2 / 3, 2 / 4, 4 / 5, 4 / 6])
    assert curve.best == 2 and curve.best_threshold == np.float32(0.7)


def test_equal_scores_are_kept_or_dropped_together():
    curve = one_class([(BOX, 1), (FAR, 1)], [(BOX, 0.9, 1), (THIRD, 0.9, 1), (FAR, 0.9, 1)]).curves[0]
    assert (len(curve.score), curve.precision[0], curve.recall[0]) == (1, pytest.approx(2 / 3), 1.0)


def test_a_class_that_finds_nothing_has_no_threshold():
    result = one_class([(BOX, 1), (FAR, 2)], [(THIRD, 0.9, 1), (FAR, 0.8, 2), (THIRD, 0.3, 3)], classes=4)
    assert [curve.best for curve in result.curves] == [-1, 0, -1, -1]
    assert np.isnan(result.curves[0].best_threshold) and np.isnan(result.curves[2].f1).all()
    # In the confusion matrix it has the threshold of all classes.
    assert result.confusion_thresholds[0] == result.best_threshold == result.confusion_thresholds[3]


def test_one_threshold_for_all_classes_has_the_best_mean_f1():
    rows = [(BOX, 0.8, 1), (THIRD, 0.4, 1), (FAR, 0.6, 2), (shifted(THIRD, 60), 0.2, 2)]
    result = one_class([(BOX, 1), (FAR, 2)], rows, classes=3)
    at = {round(float(t), 2): f1 for t, f1 in zip(result.thresholds, result.mean_f1)}
    assert (at[0.1], at[0.3], at[0.5], at[0.7], at[0.9]) == pytest.approx((2 / 3, 5 / 6, 1.0, 0.5, 0.0))
    # All thresholds above .4 and up to .6 are equally good.
    assert result.best_threshold == pytest.approx(0.51)


def test_a_data_set_without_objects_has_no_threshold():
    for given, data in (([], dataset(classes=2)), ([found((BOX, 0.9, 1))], dataset(record(), classes=2))):
        result = analyse(given, data)
        assert np.isnan(result.best_threshold) and np.isnan(result.mean_f1).all()
        assert result.confusion.shape == (3, 3) and result.confusion.sum() == len(given)


# Confusion


def test_confusion_with_background():
    objects = [(BOX, 1), (FAR, 1), (THIRD, 2)]
    rows = [(BOX, 0.9, 1), (FAR, 0.9, 2), (THIRD, 0.9, 2), ((0, 200, 50, 250), 0.9, 1), (BOX, 0.9, 1)]
    result = one_class(objects, rows, classes=2)
    assert result.confusion.tolist() == [
        [0, 2, 0],  # no object, and a second box on the first object
        [0, 1, 1],  # one found, one taken for class 2
        [0, 0, 1],
    ]
    assert result.detections.true_label.tolist() == [1, 1, 2, 0, 0]
    assert result.objects.predicted_label.tolist() == [1, 2, 2]


def test_an_object_goes_to_a_detection_of_its_class_before_a_better_placed_one_of_another():
    result = one_class([(BOX, 1), (FAR, 2)], [(shifted(BOX, 10), 0.9, 1), (BOX, 0.9, 2), (FAR, 0.9, 2)], classes=2)
    assert result.confusion.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_detections_below_the_threshold_of_their_class_are_not_in_the_confusion_matrix():
    rows = [(BOX, 0.9, 1), (THIRD, 0.3, 1), (FAR, 0.8, 2)]
    result = one_class([(BOX, 1), (FAR, 2)], rows, classes=2)
    assert result.confusion_thresholds.tolist() == [np.float32(0.9), np.float32(0.8)]
    assert result.confusion.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert result.detections.true_label.tolist() == [1, 2, -1]


@pytest.mark.parametrize("seed", range(4))
def test_every_count_of_the_confusion_matrix_has_its_list(seed):
    given, data = random_case(seed)
    result = analyse(given, data)
    rows, objects = result.detections, result.objects
    for true in range(4):
        for predicted in range(1, 4):
            listed = (rows.true_label == true) & (rows.label == predicted)
            assert listed.sum() == result.confusion[true, predicted]
        assert ((objects.label == true) & (objects.predicted_label == 0)).sum() == result.confusion[true, 0]
    # Each object is counted once, and the diagonal is what the curves count.
    np.testing.assert_array_equal(
        result.confusion[1:].sum(axis=1), np.bincount(objects.label[~objects.ignored], minlength=4)[1:]
    )
    for label, curve in enumerate(result.curves, start=1):
        hits = curve.recall[curve.best] * result.confusion[label].sum()
        assert curve.best >= 0 and result.confusion[label, label] == round(hits)
        assert result.confusion[:, label].sum() == round(hits / curve.precision[curve.best])


# Calibration


def test_calibration_of_scores():
    objects = [(BOX, 1), (FAR, 1), (THIRD, 2)]
    rows = [(BOX, 0.95, 1), (FAR, 0.85, 1), ((0, 200, 50, 250), 0.88, 1), (THIRD, 0.5, 2)]
    calibration = one_class(objects, rows, classes=3).calibration
    assert calibration.count.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 2, 1]  # .5 belongs to the bin from .5
    np.testing.assert_allclose(calibration.edges, np.linspace(0, 1, 11))
    np.testing.assert_allclose(calibration.precision[[5, 8, 9]], [1, 0.5, 1])
    np.testing.assert_allclose(calibration.score[[5, 8, 9]], [0.5, 0.865, 0.95], rtol=1e-6)
    assert np.isnan(calibration.precision[0])
    assert calibration.expected_error == pytest.approx((0.5 + 2 * 0.365 + 0.05) / 4, abs=1e-6)
    np.testing.assert_allclose(calibration.class_expected_error, [(2 * 0.365 + 0.05) / 3, 0.5, np.nan], atol=1e-6)


def test_scores_of_0_and_1_are_in_the_outer_bins():
    count = one_class([(BOX, 1)], [(BOX, 1.0, 1), (FAR, 0.0, 1)]).calibration.count
    assert count.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_scores_that_are_right_as_often_as_they_say_have_no_expected_error():
    objects, rows = [], []
    for number in range(100):
        box = (number * 3, 0, number * 3 + 2, 2)
        rows.append((box, 0.25, 1))
        objects += [(box, 1)] if number % 4 == 0 else []
    calibration = one_class(objects, rows).calibration
    assert calibration.precision[2] == 0.25 and calibration.expected_error == 0.0


# Tables


def test_tables_name_image_position_and_box():
    records = [record((BOX, 1, False), image_id="a"), record((FAR, 1, False), (BOX, 1, False), image_id="b")]
    given = [found((THIRD, 0.3, 1), (BOX, 0.9, 1)), found((BOX, 0.5, 1))]
    result = analyse(given, dataset(*records))
    rows, objects = result.detections, result.objects
    assert (rows.image.tolist(), rows.index.tolist()) == ([0, 0, 1], [1, 0, 0])
    for image, index, box, score in zip(rows.image, rows.index, rows.box, rows.score):
        np.testing.assert_array_equal(given[image].boxes[index], box)
        assert given[image].scores[index] == score
    assert (objects.image.tolist(), objects.index.tolist()) == ([0, 1, 1], [0, 0, 1])
    assert objects.detection.tolist() == [0, -1, 2] and objects.missed.tolist() == [False, True, False]
    wide = analyse([found()], dataset(record(((0, 0, 40, 10), 1, False))))
    assert (wide.objects.aspect.tolist(), wide.objects.area.tolist()) == ([0.25], [400.0])


def test_detections_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="image 0: labels"):
        analyse([found((BOX, 0.5, 2))], dataset(record((BOX, 1, False))))
