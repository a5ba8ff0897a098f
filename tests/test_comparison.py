"""Tests the comparison of two models: differences, bootstrap intervals, and the images that are won and lost."""

import json

import numpy as np
import pytest
from handmade import dataset, found, random_case, record

from fasterrcnn_jax.evaluation import comparison
from fasterrcnn_jax.evaluation.coco import coco_ap
from fasterrcnn_jax.evaluation.comparison import compare, comparison_dict, format_comparison
from fasterrcnn_jax.evaluation.tables import flat_objects

BOX, FAR = (10, 10, 60, 60), (100, 100, 150, 150)


def images(count, classes=1):
    return dataset(*(record((BOX, 1, False), image_id=str(number)) for number in range(count)), classes=classes)


HIT, MISS, NOTHING = found((BOX, 0.9, 1)), found((FAR, 0.9, 1)), found()


def test_two_evaluations_of_the_same_model_differ_by_nothing():
    given, data = random_case(0)
    result = compare(given, given, data)
    for interval in (result.ap, result.ap50, *result.class_ap, *result.class_ap50):
        assert (interval.difference, interval.low, interval.high, interval.verdict) == (0.0, 0.0, 0.0, "unclear")
    assert len(result.won) == len(result.lost) == 0
    np.testing.assert_array_equal(result.first_f1, result.second_f1)


@pytest.mark.parametrize("seed", range(3))
def test_values_equal_cocos(seed):
    (first, data), (second, _) = random_case(seed), random_case(seed, most=25)
    result = compare(first, second, data)
    for values, detections in (("first", first), ("second", second)):
        coco = coco_ap(detections, data)
        assert getattr(result.ap, values) == pytest.approx(coco.ap, abs=1e-12)
        assert getattr(result.ap50, values) == pytest.approx(coco.ap50, abs=1e-12)
        np.testing.assert_allclose([getattr(of, values) for of in result.class_ap], coco.class_ap, atol=1e-12)
        np.testing.assert_allclose([getattr(of, values) for of in result.class_ap50], coco.class_ap50, atol=1e-12)
    assert result.ap.difference == pytest.approx(result.ap.second - result.ap.first)


def test_a_draw_has_the_ap_of_a_data_set_with_these_images():
    """Every image appears as often as it is drawn."""
    generator = np.random.default_rng(0)
    given, data = random_case(1)
    # No equal scores: their order would differ.
    given = [of._replace(scores=generator.random(len(of.scores)).astype(np.float32)) for of in given]
    count = len(data.records)
    weights = np.bincount(generator.integers(0, count, count), minlength=count)
    objects = flat_objects(data)
    regular = ~(objects.difficult | objects.crowd)
    per_image = np.zeros((count, 3), np.int64)
    np.add.at(per_image, (objects.image[regular], objects.label[regular] - 1), 1)
    got = comparison._Ranking.of(given, data).average_precisions(weights[None], per_image)[0]
    drawn = np.repeat(np.arange(count), weights)
    records = [data.records[at]._replace(id=str(number)) for number, at in enumerate(drawn)]
    want = coco_ap([given[at] for at in drawn], data._replace(records=tuple(records)))
    assert weights.max() > 2 and (weights == 0).any()
    np.testing.assert_allclose(got, want.class_iou_ap, atol=1e-12)


def test_a_clear_gain_and_a_clear_loss():
    data = images(40)
    worse, better = [HIT] * 10 + [NOTHING] * 30, [HIT] * 30 + [NOTHING] * 10
    gain, loss = compare(worse, better, data), compare(better, worse, data)
    assert gain.ap.verdict == "gain" and loss.ap.verdict == "loss"
    assert gain.ap.difference == pytest.approx((76 - 26) / 101)
    assert 0 < gain.ap.low < gain.ap.difference < gain.ap.high < 1
    assert (loss.ap.low, loss.ap.high) == pytest.approx((-gain.ap.high, -gain.ap.low))


def test_a_difference_of_one_image_is_not_called_a_gain():
    result = compare([HIT] * 30 + [NOTHING] * 30, [HIT] * 31 + [NOTHING] * 29, images(60))
    assert result.ap.difference > 0 and result.ap.low == 0.0 and result.ap.verdict == "unclear"


def test_the_interval_is_that_of_the_mean_of_paired_differences():
    """With one object in each image and no false positive, the AP is the recall, but for the 101 points."""
    generator, count = np.random.default_rng(3), 150
    first, second = generator.random((2, count)) < [[0.5], [0.6]]
    given = ([HIT if hit else NOTHING for hit in hits] for hits in (first, second))
    result = compare(*given, images(count))
    change = second.astype(float) - first
    half = 1.96 * change.std() / np.sqrt(count)
    assert result.ap50.difference == pytest.approx(change.mean(), abs=0.01)
    assert (result.ap50.low, result.ap50.high) == pytest.approx((change.mean() - half, change.mean() + half), abs=0.02)


def test_images_won_and_lost_by_their_f1():
    both = found((BOX, 0.9, 1), (FAR, 0.9, 1))
    data = dataset(*(record((BOX, 1, False), image_id=name) for name in "abcd"), record(image_id="e"))
    result = compare([HIT, MISS, both, HIT, NOTHING], [NOTHING, HIT, HIT, HIT, NOTHING], data)
    np.testing.assert_allclose(result.first_f1, [1, 0, 2 / 3, 1, 1])
    np.testing.assert_allclose(result.second_f1, [0, 1, 1, 1, 1])
    assert (result.won.tolist(), result.lost.tolist()) == ([1, 2], [0])


def test_the_table_names_differences_intervals_and_images():
    data = images(40, classes=2)
    result = compare([HIT] * 10 + [NOTHING] * 30, [HIT] * 30 + [NOTHING] * 10, data)
    lines = format_comparison(result, data, "runs/a", "runs/b").split("\n")
    assert lines[0].startswith("compare    runs/b (second) minus runs/a (first) on 40 images")
    assert lines[2].split()[:5] == ["class1", "40", "0.257", "0.752", "+0.495"] and lines[2].count("gain") == 2
    assert lines[3].split()[:5] == ["class2", "0", "nan", "nan", "+nan"]
    assert lines[4].split()[:2] == ["mAP", "40"]
    assert lines[5] == "images     20 won, 0 lost, 20 equal, by the F1 at the best thresholds"
    assert lines[6] == "           most won: 10 (+1.00), 11 (+1.00), 12 (+1.00), 13 (+1.00), 14 (+1.00)"
    content = comparison_dict(result, data)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["classes"]["class2"]["AP"]["difference"] is None and len(content["won"]) == 20


def test_a_data_set_without_images_or_objects_has_no_difference():
    for given, data in (([], dataset()), ([HIT], dataset(record()))):
        result = compare(given, given, data)
        assert np.isnan(result.ap.difference) and np.isnan(result.ap.low) and result.ap.verdict == "unclear"
