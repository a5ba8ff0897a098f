"""Tests the recall of proposals: against COCO's recall without classes, ignored objects, and the table."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import tiny
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fasterrcnn_jax.data.records import Dataset, ImageProposals, ImageRecord, box_areas
from fasterrcnn_jax.evaluation import recall
from fasterrcnn_jax.evaluation.recall import (
    LIMITS,
    THRESHOLDS,
    format_recall,
    proposal_recall,
    recall_dict,
)

UNIT = (10.0, 10.0, 30.0, 30.0)


def record(name, boxes, *, difficult=(), crowd=()):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    marks = (np.isin(np.arange(len(boxes)), chosen) for chosen in (difficult, crowd))
    labels = np.ones(len(boxes), np.int32)
    return ImageRecord(name, None, (100, 100), boxes, labels, *marks, box_areas(boxes))


def dataset(*records):
    return Dataset("made up", tiny.CLASS_NAMES, records, (), (1, 2))


def proposals(*boxes):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return ImageProposals(boxes, np.linspace(0.9, 0.1, len(boxes)).astype(np.float32))


def random_case(seed):
    """Returns (proposals, data set): integer boxes near dense objects and elsewhere, with many equal IoUs."""
    generator = np.random.default_rng(seed)

    def boxes(count):
        corner, side = generator.integers(0, 40, (count, 2)), generator.integers(5, 30, (count, 2))
        return np.concatenate([corner, corner + side], axis=1)

    found, records = [], []
    for index, count in enumerate(generator.integers(0, 9, 20)):
        objects = boxes(count)
        flags = dict(difficult=[0] if index % 3 == 1 else (), crowd=[1] if index % 4 == 2 else ())
        records.append(record(str(index), objects, **flags))
        near = np.repeat(objects, 4, axis=0) + generator.integers(-2, 3, (4 * count, 4))
        found.append(proposals(*generator.permutation(np.concatenate([near, boxes(10)]))))
    return found, dataset(*records)


def coco_recall(found, data, limits):
    """Returns [limits, thresholds] recall from pycocotools with useCats 0."""
    objects, results = [], []
    for image, (of_image, entry) in enumerate(zip(found, data.records, strict=True), start=1):
        ignored = entry.difficult | entry.crowd
        for box, flag in zip(entry.boxes.tolist(), ignored.tolist(), strict=True):
            area = (box[2] - box[0]) * (box[3] - box[1])
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            objects.append(dict(image_id=image, category_id=1, bbox=xywh, area=area, iscrowd=int(flag)))
        for box, score in zip(of_image.boxes.tolist(), of_image.scores.tolist(), strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            area = xywh[2] * xywh[3]
            results.append(dict(image_id=image, category_id=1, bbox=xywh, area=area, iscrowd=0, score=score))

    def indexed(entries):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": index + 1} for index in range(len(data.records))],
            "categories": [{"id": 1, "name": "object"}],
            "annotations": [entry | {"id": number} for number, entry in enumerate(entries, start=1)],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(indexed(objects), indexed(results), iouType="bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(limits)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["recall"][:, 0, 0, :].T


@pytest.mark.parametrize("seed", range(6))
def test_recall_equals_pycocotools(seed, monkeypatch):
    """Small limits are tested too, so that limits differ with few proposals."""
    limits = (1, 3, 10, 40)
    monkeypatch.setattr(recall, "LIMITS", limits)
    found, data = random_case(seed)
    result = proposal_recall(found, data)
    expected = coco_recall(found, data, limits)
    assert (np.diff(expected.mean(axis=1)) > 0.02).all() and (np.diff(expected[-1]) < 0).any()
    np.testing.assert_allclose(result.recall, expected, rtol=0, atol=1e-12)
    assert result.num_objects == sum(int((~(r.difficult | r.crowd)).sum()) for r in data.records)


def test_a_proposal_takes_the_last_of_two_objects_with_equal_iou():
    left, right, both = (0.0, 0.0, 10.0, 10.0), (10.0, 0.0, 20.0, 10.0), (0.0, 0.0, 20.0, 10.0)
    data = dataset(record("a", [left, right]))
    for second, expected in ((left, 1.0), (right, 0.5)):
        found = [proposals(both, second)]
        assert proposal_recall(found, data).recall[0, 0] == coco_recall(found, data, LIMITS)[0, 0] == expected


def test_limits_and_thresholds_are_cocos():
    assert LIMITS == (100, 300, 1000, 2000)
    evaluation = COCOeval(iouType="bbox")
    np.testing.assert_array_equal(THRESHOLDS, evaluation.params.iouThrs)


def test_a_proposal_beyond_the_limit_finds_nothing():
    far = (60.0, 60.0, 70.0, 70.0)
    result = proposal_recall([proposals(*[far] * 100, UNIT)], dataset(record("a", [UNIT])))
    np.testing.assert_array_equal(result.recall[:, 0], [0.0, 1.0, 1.0, 1.0])


def test_an_object_is_found_once_and_a_proposal_finds_one():
    twice = dataset(record("a", [UNIT, UNIT]))
    assert proposal_recall([proposals(UNIT)], twice).recall[0, 0] == 0.5
    assert proposal_recall([proposals(UNIT, UNIT)], twice).recall[0, 0] == 1.0


def test_difficult_objects_and_crowds_are_ignored():
    other = (60.0, 60.0, 90.0, 90.0)
    data = dataset(record("a", [UNIT, other, other], difficult=[1], crowd=[2]))
    result = proposal_recall([proposals(UNIT)], data)
    assert result.num_objects == 1 and (result.recall == 1.0).all()


def test_without_objects_recall_is_undefined():
    result = proposal_recall([proposals(UNIT)], dataset(record("a", [])))
    assert result.num_objects == 0 and np.isnan(result.recall).all()
    values = recall_dict(result)
    assert set(values.values()) == {None}
    json.dumps(values, allow_nan=False)
    assert format_recall(result).splitlines()[-1] == "AR@300 nan"


def test_the_wrong_number_of_images_is_refused():
    with pytest.raises(ValueError, match="made up has 1 images, but proposals has 2"):
        proposal_recall([proposals(), proposals()], dataset(record("a", [UNIT])))


def test_the_log_and_the_table_have_the_same_numbers():
    near = (10.0, 10.0, 30.0, 25.0)  # IoU 0.75 with UNIT
    result = proposal_recall([proposals(near)], dataset(record("a", [UNIT, (50.0, 50.0, 70.0, 70.0)])))
    values = recall_dict(result)
    assert values["proposal_recall50_100"] == values["proposal_recall70_2000"] == 0.5
    assert math.isclose(values["proposal_AR_300"], 0.5 * 6 / 10)
    lines = format_recall(result).splitlines()
    assert [line.split() for line in lines[1:5]] == [[str(limit), "0.500", "0.500", "0.300"] for limit in LIMITS]
    assert lines[0].endswith("of 2 objects") and lines[-1] == "AR@300 0.300"
