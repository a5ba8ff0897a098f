"""Tests stored proposals: exact round trip, named faults, and the same transforms as the image."""

import dataclasses
import os

import numpy as np
import pytest
import safetensors.numpy
import tiny
from flax import nnx

from fasterrcnn_jax.config import AugmentConfig, DataConfig
from fasterrcnn_jax.data import loader
from fasterrcnn_jax.data.proposal_files import read_proposals, write_proposals
from fasterrcnn_jax.data.records import ImageProposals
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference import dataset as inference
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.structures import Detections

SIZES = [(48, 72), (72, 48), (30, 90), (64, 64), (90, 30)]


def made_up(counts, seed=0):
    generator = np.random.default_rng(seed)
    return {
        f"image {index} ü": ImageProposals(
            generator.uniform(0, 90, (count, 4)).astype(np.float32), generator.random(count, np.float32)
        )
        for index, count in enumerate(counts)
    }


@pytest.mark.parametrize("counts", [(3, 0, 2), (0,), (), (1, 1)])
def test_proposals_come_back_bit_for_bit(tmp_path, counts):
    path, written = tmp_path / "deep" / "er.safetensors", made_up(counts)
    write_proposals(path, written, made_by="weights")
    found, made_by = read_proposals(path)
    assert made_by == "weights" and list(found) == list(written)
    for name in written:
        for array, other in zip(found[name], written[name], strict=True):
            np.testing.assert_array_equal(array, other)
            assert array.dtype == np.float32
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_boxes_are_stored_by_rows_however_they_lie_in_memory(tmp_path):
    boxes = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    write_proposals(tmp_path / "a", {"x": ImageProposals(boxes, np.ones(3, np.float32))}, made_by="w")
    np.testing.assert_array_equal(read_proposals(tmp_path / "a")[0]["x"].boxes, boxes)


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "train.safetensors"
    write_proposals(path, made_up((2,)), made_by="first")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"train.safetensors cannot be written: no space left"):
        write_proposals(path, made_up((5,)), made_by="second")
    assert read_proposals(path)[1] == "first" and len(list(tmp_path.iterdir())) == 1


GOOD = dict(boxes=np.zeros((2, 4), np.float32), scores=np.zeros(2, np.float32), counts=np.array([2]))
FAULTS = {
    "a count too many": (dict(GOOD, counts=np.array([2, 0])), None),
    "a negative count": (dict(GOOD, counts=np.array([3, -1])), {"ids": '["a", "b"]', "made_by": "w"}),
    "more boxes than counted": (dict(GOOD, boxes=np.zeros((3, 4), np.float32)), None),
    "fewer scores": (dict(GOOD, scores=np.zeros(1, np.float32)), None),
    "float64": (dict(GOOD, boxes=np.zeros((2, 4))), None),
    "not finite": (dict(GOOD, boxes=np.full((2, 4), np.nan, np.float32)), None),
    "no scores": ({name: GOOD[name] for name in ("boxes", "counts")}, None),
    "no ids": (GOOD, {"made_by": "w"}),
    "ids that are no list": (GOOD, {"ids": "7", "made_by": "w"}),
    "ids that are no JSON": (GOOD, {"ids": "[", "made_by": "w"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_holds_something_else_is_refused(tmp_path, fault):
    arrays, metadata = FAULTS[fault]
    path = tmp_path / "train.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata=metadata or {"ids": '["a"]', "made_by": "w"})
    with pytest.raises(InputError, match=r"train.safetensors: the (boxes, scores|proposals file is missing, damaged)"):
        read_proposals(path)


def test_a_torn_or_missing_file_is_refused(tmp_path):
    path = tmp_path / "train.safetensors"
    write_proposals(path, made_up((3,)), made_by="w")
    path.write_bytes(path.read_bytes()[:-5])
    for broken in (path, tmp_path / "none.safetensors"):
        with pytest.raises(InputError, match=f"{broken.name}: the proposals file is missing, damaged"):
            read_proposals(broken)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Returns a data set with two boxes per image; some images are long enough to be cropped."""
    images = []
    for index in range(10):
        height, width = SIZES[index % len(SIZES)]
        boxes = [(1 + index, 2, 13 + index, 20), (2, 5 + index, 16, 19 + index)]
        images.append((tiny.rectangle_image((height, width), boxes[0], seed=index), boxes, [1, 2]))
    return tiny.dataset(tmp_path_factory.mktemp("images"), images)


def options(**fields):
    plain = dict(class_names=tiny.CLASS_NAMES, max_boxes=4, flip="none", crop_aspect=None, rank_by_aspect=False)
    return DataConfig(root=tiny.Path("unused"), **plain | fields)


VARIED = {
    "as it is": options(),
    "mirrored at random": options(flip="random"),
    "mirrored copies": options(flip="double"),
    "cropped": options(crop_aspect=1.5, flip="random"),
    "other sizes": options(augment=AugmentConfig(short_sides=(40, 64))),
    "jittered": options(augment=AugmentConfig(scale_jitter=(0.5, 1.8)), flip="random", crop_aspect=1.5),
}


@pytest.mark.parametrize("name", VARIED)
def test_proposals_are_transformed_with_their_image(dataset, name):
    """Proposals equal to the ground truth stay equal to it after every transform of the image."""
    data = VARIED[name]
    stored = {record.id: ImageProposals(record.boxes, np.array([0.75, 0.25], np.float32)) for record in dataset.records}
    batches = loader.training_batches(
        prepare_training_set(dataset, data), data, tiny.IMAGE, batch_size=3, seed=0, steps=16, proposals=stored
    )
    rows = 0
    for batch in batches:
        found, truth = batch.proposals, batch.ground_truth
        assert found.boxes.shape == (3, 2, 4) and found.boxes.dtype == np.float32
        for row in range(3):
            boxes = truth.boxes[row][truth.valid[row]]
            np.testing.assert_array_equal(found.boxes[row][found.valid[row]], boxes)
            expected = np.array([0.75, 0.25], np.float32)[truth.labels[row][truth.valid[row]] - 1]
            np.testing.assert_array_equal(found.scores[row][found.valid[row]], expected)
            assert not found.boxes[row][~found.valid[row]].any() and not found.scores[row][~found.valid[row]].any()
            rows += len(boxes)
    assert rows > 50


def test_without_stored_proposals_batches_hold_none(dataset):
    batches = loader.training_batches(dataset, options(), tiny.IMAGE, batch_size=2, seed=0, steps=1)
    assert next(batches).proposals is None
    assert next(loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=2)).proposals is None


def test_evaluation_shows_whole_images_with_their_proposals(dataset):
    stored = {record.id: ImageProposals(record.boxes, np.ones(2, np.float32)) for record in dataset.records}
    seen = []
    for batch in loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=3, proposals=stored):
        for row in np.flatnonzero(batch.image_valid):
            record = dataset.records[batch.image_index[row]]
            scale = np.tile(batch.scale[row][::-1], 2)
            np.testing.assert_allclose(batch.proposals.boxes[row] / scale, record.boxes, rtol=1e-6)
            assert batch.proposals.valid[row].all()
            seen.append(record.id)
        assert not batch.proposals.valid[~batch.image_valid].any()
    assert sorted(seen) == [record.id for record in dataset.records]


# Of the fields of detections, without batch and count.
SHAPES = (((4,), np.float32), ((), np.float32), ((), np.int32), ((), bool))


def test_detection_takes_the_best_given_proposals_up_to_the_limit_of_detection(dataset, monkeypatch):
    """Detection and training have limits of their own, of which only the one of detection counts here."""
    limits = tiny.MODEL.test_proposals.post_nms_top_n, tiny.MODEL.train_proposals.post_nms_top_n
    assert limits == (8, 16)
    boxes = np.arange(12, dtype=np.float32)[:, None] / 2 + np.float32([0, 0, 9, 9])
    scores = np.linspace(1, 0.5, 12, dtype=np.float32)
    seen = []

    def nothing(model, rows):
        images, _, proposals = rows
        seen.extend(found[valid] for found, valid in zip(proposals.scores, proposals.valid))
        return Detections(*(np.zeros((len(images), 1, *more), kind) for more, kind in SHAPES))

    monkeypatch.setattr(inference, "on_devices", lambda *_: nothing)
    monkeypatch.setattr(inference, "replicate", lambda model, devices: model)
    model = nnx.eval_shape(lambda: Detector(tiny.MODEL, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))
    stored = {record.id: ImageProposals(boxes, scores) for record in dataset.records}
    found = inference.detect_dataset_in_proposals(model, dataset, stored, batch_size=5)
    assert len(found) == len(dataset.records) == sum(len(of) > 0 for of in seen)
    for of in seen:
        np.testing.assert_array_equal(of, scores[:8] if len(of) else [])


def test_proposals_do_not_change_the_rest_of_a_batch(dataset):
    data = dataclasses.replace(VARIED["jittered"])
    plain, with_proposals = (
        list(
            loader.training_batches(
                prepare_training_set(dataset, data), data, tiny.IMAGE, batch_size=3, seed=0, steps=4, proposals=stored
            )
        )
        for stored in (None, {r.id: ImageProposals(r.boxes, np.ones(2, np.float32)) for r in dataset.records})
    )
    for batch, other in zip(plain, with_proposals, strict=True):
        for array, twin in zip(batch[:5], other[:5], strict=True):
            np.testing.assert_array_equal(array, twin)
        np.testing.assert_array_equal(batch.ground_truth.boxes, other.ground_truth.boxes)
