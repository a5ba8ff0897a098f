"""Tests training batches: exact resume, boxes flipped with the image, named faults, one shape per canvas."""

import dataclasses
import json
import logging
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import image_cache, loader, sources
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.plan import plan_epoch
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.data.transforms import canvas_for, flip_boxes, scale_boxes
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.faster_rcnn import training_losses

SIZES = [(48, 72), (72, 48), (50, 90), (64, 64), (30, 70), (90, 40), (55, 56)]
STEPS, BATCH_SIZE = 20, 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Writes eleven images of many sizes; the box of image i is i pixels from the left."""
    images = []
    for index in range(11):
        box = (index, 3, index + 12, 20)
        images.append((tiny.rectangle_image(SIZES[index % len(SIZES)], box, seed=index), [box], [1 + index % 2]))
    return tiny.dataset(tmp_path_factory.mktemp("images"), images)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Returns the settings without crops and ranking by aspect; tests of these turn them on."""
    return DataConfig(
        root=tmp_path_factory.mktemp("unused"),
        class_names=tiny.CLASS_NAMES,
        max_boxes=3,
        flip="random",
        crop_aspect=None,
        rank_by_aspect=False,
    )


@pytest.fixture(scope="module")
def everything(data):
    """Returns settings with every random and ordering option; half of the images have an aspect above 1.4."""
    return dataclasses.replace(data, crop_aspect=1.4, rank_by_aspect=True)


def batches_of(dataset, data, *, seed=0, steps=STEPS, batch_size=BATCH_SIZE):
    """Returns training batches made as in train.py."""
    return loader.training_batches(
        prepare_training_set(dataset, data), data, tiny.IMAGE, batch_size=batch_size, seed=seed, steps=steps
    )


def assert_same_bits(batch, other):
    jax.tree.map(np.testing.assert_array_equal, batch, other)


@pytest.mark.parametrize("done", [0, 1, 7, STEPS - 1])
def test_the_position_resumes_in_a_new_iterator_bit_for_bit(dataset, everything, done):
    first = batches_of(dataset, everything)
    for _ in range(done):
        next(first)
    position = first.get_state()
    expected = list(first)
    resumed = batches_of(dataset, everything)
    loader.set_position(resumed, position, "RUN")
    rest = list(resumed)
    assert len(rest) == len(expected) == STEPS - done
    for batch, other in zip(rest, expected):
        assert_same_bits(batch, other)


def test_the_position_is_plain_data(dataset, data):
    iterator = batches_of(dataset, data)
    next(iterator)
    position = iterator.get_state()
    assert json.loads(json.dumps(position)) == position


def test_the_position_after_the_last_batch_is_the_end(dataset, data):
    iterator = batches_of(dataset, data, steps=3)
    assert len(list(iterator)) == 3
    resumed = batches_of(dataset, data, steps=3)
    loader.set_position(resumed, iterator.get_state(), "RUN")
    assert list(resumed) == []


POSITIONS = [{}, [], None, 7, "2"] + [
    {"next_index": value} for value in (-1, STEPS + 1, 10**30, True, 1.5, "2", None, [1])
]


@pytest.mark.parametrize("position", POSITIONS, ids=repr)
def test_a_position_that_is_none_of_this_run_is_refused(dataset, data, position):
    with pytest.raises(InputError, match="^RUN: the stored position of the data does not belong to this run"):
        loader.set_position(batches_of(dataset, data), position, "RUN")


@pytest.mark.parametrize("threads", [1, 5])
def test_batches_do_not_depend_on_the_number_of_threads(dataset, everything, threads):
    expected = list(batches_of(dataset, everything))
    threaded = dataclasses.replace(everything, threads=threads)
    for batch, other in zip(batches_of(dataset, threaded), expected, strict=True):
        assert_same_bits(batch, other)


@pytest.mark.parametrize("threads", [1, 3, 12])
def test_the_configured_number_of_threads_loads_batches_ahead(dataset, data, threads, monkeypatch):
    """Each batch waits until as many batches are being loaded as there are threads."""
    barrier, seen, assemble = threading.Barrier(threads), set(), loader.assemble

    def waiting(*arguments, **options):
        seen.add(threading.get_ident())
        barrier.wait(timeout=30)
        return assemble(*arguments, **options)

    monkeypatch.setattr(loader, "assemble", waiting)
    iterator = batches_of(dataset, dataclasses.replace(data, threads=threads), steps=2 * threads)
    assert len(list(iterator)) == 2 * threads
    assert len(seen) == threads


def test_a_position_resumes_with_another_number_of_threads(dataset, everything):
    first = batches_of(dataset, dataclasses.replace(everything, threads=4))
    for _ in range(5):
        next(first)
    position = first.get_state()
    expected = list(first)
    resumed = batches_of(dataset, dataclasses.replace(everything, threads=1))
    loader.set_position(resumed, position, "RUN")
    for batch, other in zip(resumed, expected, strict=True):
        assert_same_bits(batch, other)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often each file is decoded."""
    counts, read = Counter(), image_cache.record_pixels

    def counting(record, **options):
        counts[record.path.name] += 1
        return read(record, **options)

    monkeypatch.setattr(image_cache, "record_pixels", counting)
    return counts


@pytest.mark.parametrize("flip", ["random", "double"])
def test_cached_images_are_decoded_once_and_batches_keep_their_bits(dataset, everything, flip, reads, caplog):
    plain = dataclasses.replace(everything, flip=flip)
    expected = list(batches_of(dataset, plain, steps=40))
    assert max(reads.values()) > 2
    reads.clear()
    # One thread: two may decode the same image at the same time.
    for batch, other in zip(
        batches_of(dataset, dataclasses.replace(plain, cache_mb=1, threads=1), steps=40), expected, strict=True
    ):
        assert_same_bits(batch, other)
    assert reads == {f"{index:03d}.png": 1 for index in range(11)}
    assert "data.cache_mb" not in caplog.text


def test_a_full_cache_is_logged_once_and_keeps_what_fits(tmp_path, data, reads, caplog):
    """Of three images of 0.4 MB, two fit into one megabyte."""
    box = (3, 3, 200, 200)
    images = [(tiny.rectangle_image((374, 374), box, seed=seed), [box], [1]) for seed in range(3)]
    dataset = tiny.dataset(tmp_path / "large", images)
    cached = dataclasses.replace(data, cache_mb=1, threads=1)
    list(batches_of(dataset, cached, steps=15, batch_size=1))
    assert sorted(reads.values()) == [1, 1, 5]
    said = [message for message in caplog.messages if "data.cache_mb" in message]
    assert said == [
        "the image cache (data.cache_mb = 1) is full with 2 images; the other images are decoded in every epoch"
    ]


def test_without_a_cache_every_image_is_decoded_in_every_epoch_and_nothing_is_logged(dataset, data, reads, caplog):
    epoch = len(plan_epoch([canvas_for(r.image_hw, tiny.IMAGE) for r in dataset.records], BATCH_SIZE, seed=0, epoch=0))
    list(batches_of(dataset, dataclasses.replace(data, threads=1), steps=3 * epoch))
    assert set(reads.values()) == {3} and len(reads) == 11
    assert "data.cache_mb" not in caplog.text


def test_a_cached_image_cannot_be_written_to(dataset):
    read = image_cache.caching_reader(1)
    pixels = read(dataset.records[0])
    assert read(dataset.records[0]) is pixels
    with pytest.raises(ValueError, match="read-only"):
        pixels[0, 0, 0] = 1


def test_threads_that_share_a_cache_keep_within_it(dataset):
    """An image counts once, even if several threads decoded it."""
    read = image_cache.caching_reader(1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, dataset.records * 20))
    for index, record in enumerate(dataset.records):
        np.testing.assert_array_equal(found[index], read_image(record.path))
    assert len({id(pixels) for pixels in map(read, dataset.records * 2)}) == 11


def test_annotations_are_read_once_for_all_epochs(tmp_path, data):
    """A run continues after the annotation files are deleted."""
    tiny.write_voc(tmp_path, train=5, test=1)
    of_folder = dataclasses.replace(data, root=tmp_path, class_names=tiny.CLASS_NAMES)
    prepared = prepare_training_set(sources.open_split(of_folder, "train"), of_folder)
    shutil.rmtree(tmp_path / "Annotations")
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    batches = loader.training_batches(prepared, of_folder, tiny.IMAGE, batch_size=2, seed=0, steps=9)
    assert len(list(batches)) == 9


def test_rounded_images_are_uint8(dataset, data):
    """In training and evaluation; the values differ from float images by at most half a grey level."""
    image = dataclasses.replace(tiny.IMAGE, pixel_dtype="uint8")
    prepared = prepare_training_set(dataset, data)
    options = dict(batch_size=BATCH_SIZE, seed=0, steps=4)
    for rounded, plain in (
        (loader.training_batches(prepared, data, image, **options),
         loader.training_batches(prepared, data, tiny.IMAGE, **options)),
        (loader.evaluation_batches(dataset, image, batch_size=4),
         loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=4)),
    ):  # fmt: skip
        for batch, other in zip(rounded, plain, strict=True):
            assert batch.images.dtype == np.uint8
            assert_same_bits(batch._replace(images=0), other._replace(images=0))
            for row in np.flatnonzero(batch.image_valid):
                height, width = batch.image_hw[row].astype(int)
                levels = other.images[row, :height, :width] * np.float32(tiny.IMAGE.std) + np.float32(tiny.IMAGE.mean)
                np.testing.assert_allclose(batch.images[row, :height, :width], levels, atol=0.501)
                assert not batch.images[row, height:].any() and not batch.images[row, :, width:].any()


@pytest.mark.parametrize("ranked", [False, True])
def test_batches_follow_the_plan_over_epochs(dataset, data, ranked):
    data = dataclasses.replace(data, rank_by_aspect=ranked)
    canvases = [canvas_for(record.image_hw, tiny.IMAGE) for record in dataset.records]
    aspects = np.array([width / height for height, width in (r.image_hw for r in dataset.records)])
    options = dict(seed=0, aspects=aspects if ranked else None)
    planned = [plan for epoch in range(5) for plan in plan_epoch(canvases, BATCH_SIZE, epoch=epoch, **options)]
    for batch, plan in zip(batches_of(dataset, data), planned):
        assert batch.images.shape == (BATCH_SIZE, *plan.canvas, 3)
        np.testing.assert_array_equal(batch.image_index, plan.image_index)
        np.testing.assert_array_equal(batch.image_valid, plan.image_valid)


def flipped_images(dataset, batches):
    """Returns {image index: list of whether it was flipped}, derived from the boxes."""
    found = {}
    for batch in batches:
        for row in np.flatnonzero(batch.image_valid):
            record = dataset.records[batch.image_index[row]]
            width = record.image_hw[1]
            truth = batch.ground_truth.boxes[row, :1]
            plain = scale_boxes(record.boxes, batch.scale[row])
            mirrored = scale_boxes(flip_boxes(record.boxes, width), batch.scale[row])
            assert not np.array_equal(plain, mirrored)
            is_flipped = np.array_equal(truth, mirrored)
            assert is_flipped or np.array_equal(truth, plain)
            found.setdefault(int(batch.image_index[row]), []).append(is_flipped)
    return found


def test_flips_follow_seed_epoch_and_image_and_not_the_batch(dataset, data):
    epochs = 6
    runs = {}
    for batch_size in (1, 2, 4):
        canvases = [canvas_for(record.image_hw, tiny.IMAGE) for record in dataset.records]
        steps = epochs * len(plan_epoch(canvases, batch_size, seed=0, epoch=0))
        batches = batches_of(dataset, data, steps=steps, batch_size=batch_size)
        runs[batch_size] = flipped_images(dataset, batches)
    assert runs[1] == runs[2] == runs[4]
    flips = np.array([runs[1][index] for index in range(11)])
    assert flips.shape == (11, epochs)
    assert 0.25 < flips.mean() < 0.75
    assert (flips != flips[:, :1]).any()  # differs over epochs
    assert (flips != flips[:1]).any()  # differs over images
    other = flipped_images(dataset, batches_of(dataset, data, seed=1, steps=66, batch_size=1))
    assert [other[index] for index in range(11)] != flips.tolist()


def test_without_flips_nothing_is_mirrored(dataset, data):
    plain = dataclasses.replace(data, flip="none")
    assert not any(any(flips) for flips in flipped_images(dataset, batches_of(dataset, plain)).values())


def test_with_double_an_epoch_has_every_image_plain_and_mirrored(dataset, data):
    double = dataclasses.replace(data, flip="double")
    records = [r.image_hw for r in dataset.records] * 2
    steps = len(plan_epoch([canvas_for(hw, tiny.IMAGE) for hw in records], BATCH_SIZE, seed=0, epoch=0))
    prepared = dataset._replace(records=dataset.records * 2)  # what flipped_images finds a row's record in
    found = flipped_images(prepared, batches_of(dataset, double, steps=steps))
    assert found == {index: [index >= 11] for index in range(22)}


def test_crops_follow_seed_epoch_and_image_and_not_the_batch(tmp_path, data):
    """Each image is twice as long as allowed and has a small box in the middle, which many crops contain."""
    box = (50, 8, 54, 20)
    images = [(tiny.rectangle_image((24, 96), box, seed=index), [box], [1]) for index in range(6)]
    dataset = tiny.dataset(tmp_path / "long", images)
    cropping = dataclasses.replace(data, crop_aspect=2.0, flip="none")

    def places(batch_size, *, seed=0, epochs=4):
        """Returns [image, epoch] left edges of the boxes in original pixels."""
        found = {}
        steps = epochs * -(-6 // batch_size)
        for batch in batches_of(dataset, cropping, seed=seed, steps=steps, batch_size=batch_size):
            for row in np.flatnonzero(batch.image_valid):
                np.testing.assert_array_equal(batch.image_hw[row], [48, 96])
                edge = batch.ground_truth.boxes[row, 0, 0] / batch.scale[row, 1]
                found.setdefault(int(batch.image_index[row]), []).append(float(edge))
        return np.array([found[index] for index in range(6)])

    runs = places(1)
    np.testing.assert_array_equal(runs, places(4))
    assert (runs >= 0).all() and (runs <= 44).all()
    assert (runs != runs[:, :1]).any() and (runs != runs[:1]).any()
    assert (runs != places(1, seed=1)).any()


def test_the_canvas_is_that_of_the_cropped_image(tmp_path, data):
    """30 x 70 needs a wide canvas; the square after cropping fits any canvas."""
    box = (30, 5, 45, 25)
    dataset = tiny.dataset(tmp_path / "wide", [(tiny.rectangle_image((30, 70), box), [box], [1])])
    square = dataclasses.replace(data, crop_aspect=1.0, flip="none")
    image = dataclasses.replace(tiny.IMAGE, canvases=(*tiny.IMAGE.canvases, (64, 64)))
    prepared = prepare_training_set(dataset, square)
    for options, canvas, shown in ((square, (64, 64), (64, 64)), (data, (64, 96), (41, 96))):
        (batch,) = loader.training_batches(prepared, options, image, batch_size=1, seed=0, steps=1)
        assert batch.images.shape[1:3] == canvas
        np.testing.assert_array_equal(batch.image_hw[0], shown)


def test_images_of_a_ranked_batch_are_neighbours_in_aspect(dataset, data):
    ranked = dataclasses.replace(data, rank_by_aspect=True)

    def spread(options):
        """Returns the sum over the batches of the range of width / height."""
        total = 0.0
        for batch in batches_of(dataset, options, steps=5):
            sizes = [dataset.records[index].image_hw for index in batch.image_index[batch.image_valid]]
            total += np.ptp([width / height for height, width in sizes])
        return total

    assert spread(ranked) < 0.7 * spread(data)


def test_ranking_uses_the_aspect_after_cropping(tmp_path, data):
    """The aspects are 1.2, 3 and 5; the last two are equal after cropping to 1.5 and are shuffled."""
    box = (2, 2, 12, 12)
    sizes = [(50, 60)] * 2 + [(30, 90), (20, 100)] * 2
    dataset = tiny.dataset(tmp_path / "ranks", [(tiny.rectangle_image(hw, box), [box], [1]) for hw in sizes])
    options = dataclasses.replace(data, rank_by_aspect=True, crop_aspect=1.5)
    pairs = set()
    for batch in batches_of(dataset, options, steps=30, batch_size=2):
        pairs.add(tuple(sorted(dataset.records[index].image_hw for index in batch.image_index)))
    assert pairs == {((50, 60), (50, 60)), ((20, 100), (30, 90)), ((20, 100),) * 2, ((30, 90),) * 2}


def test_an_evaluation_never_crops_or_mirrors(dataset):
    """Long images are not cropped, and mirrored records are not mirrored."""
    records = tuple(record._replace(flipped=True) for record in dataset.records)
    plain = list(loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=4))
    for batch, other in zip(
        loader.evaluation_batches(dataset._replace(records=records), tiny.IMAGE, batch_size=4), plain
    ):
        assert_same_bits(batch, other)


@pytest.mark.parametrize("crop_aspect", [None, 1.4])
@pytest.mark.parametrize("flip", ["random", "double"])
def test_boxes_lie_on_the_objects_in_the_pixels(dataset, data, flip, crop_aspect):
    """In flipped, cropped and plain images, the bright rectangle is inside its box."""
    seen = set()
    data = dataclasses.replace(data, flip=flip, crop_aspect=crop_aspect)
    for batch in batches_of(dataset, data):
        for row in np.flatnonzero(batch.image_valid):
            red = batch.images[row, ..., 0] * tiny.IMAGE.std[0] + tiny.IMAGE.mean[0]
            height, width = batch.image_hw[row].astype(int)
            bright = red[:height, :width] > 150
            rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
            extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(batch.ground_truth.boxes[row, 0], extent, atol=1.01)
            seen.add(int(batch.image_index[row]) % 11)
    assert seen == set(range(11))


def test_filling_rows_and_empty_slots_are_zero(dataset, data):
    filled = 0
    for batch in batches_of(dataset, data):
        truth = batch.ground_truth
        for leaf in (truth.boxes, truth.labels, truth.valid):
            assert not leaf[~truth.valid].any()
        for leaf in (batch.images, batch.image_hw, *truth):
            assert not leaf[~batch.image_valid].any()
        assert (batch.scale[~batch.image_valid] == 1).all()
        filled += int((~batch.image_valid).sum())
    assert filled  # otherwise nothing was shown


def test_difficult_objects_are_left_out(tmp_path, data):
    boxes = [(2, 3, 20, 30), (25, 8, 40, 38), (5, 5, 30, 20)]
    pixels = tiny.rectangle_image((48, 72), boxes[0])
    dataset = tiny.dataset(tmp_path / "images", [(pixels, boxes, [1, 2, 1])], difficult=[[False, True, False]])
    plain = dataclasses.replace(data, flip="none")
    (batch,) = batches_of(dataset, plain, steps=1, batch_size=1)
    truth = batch.ground_truth
    assert truth.valid[0].tolist() == [True, True, False]
    assert truth.labels[0].tolist() == [1, 1, 0]
    np.testing.assert_allclose(truth.boxes[0, :2], scale_boxes(np.float32(boxes)[[0, 2]], batch.scale[0]))


def crowd(tmp_path, count, hard):
    boxes = [(x, 2, x + 5, 9) for x in range(count)]
    return tiny.dataset(
        tmp_path / "crowd",
        [(tiny.rectangle_image((48, 72), (0, 0, 5, 5)), boxes, [1] * count)],
        difficult=[[False] * (count - hard) + [True] * hard],
    )


def test_objects_beyond_the_slots_are_not_trained_on(tmp_path, data):
    dataset = crowd(tmp_path, 5, 0)
    (batch,) = batches_of(dataset, dataclasses.replace(data, flip="none"), steps=1, batch_size=1)
    assert batch.ground_truth.valid.all()
    first = scale_boxes(dataset.records[0].boxes[:3], batch.scale[0])
    np.testing.assert_allclose(batch.ground_truth.boxes[0], first)


def test_difficult_objects_need_no_slots(tmp_path, data):
    (batch,) = batches_of(crowd(tmp_path, 5, 2), data, steps=1, batch_size=1)
    assert batch.ground_truth.valid.all()


@pytest.mark.parametrize("count, hard", [(0, 0), (2, 2)])
def test_a_training_set_without_objects_is_refused(tmp_path, data, count, hard):
    with pytest.raises(InputError, match=r"crowd .*no image has an object to train on"):
        batches_of(crowd(tmp_path, count, hard), data)


def test_a_training_set_without_images_is_refused(tmp_path, data):
    with pytest.raises(InputError, match="tiny.*no image has an object"):
        batches_of(tiny.dataset(tmp_path / "none", []), data)


def test_an_image_without_objects_trains_as_background(tmp_path, data):
    box = (3, 3, 20, 20)
    images = [(tiny.rectangle_image((48, 72), box), [box], [1]), (tiny.rectangle_image((20, 96), box), [], [])]
    dataset = tiny.dataset(tmp_path / "images", images)
    keeping = dataclasses.replace(data, keep_empty=True, crop_aspect=1.5)
    batches = list(batches_of(dataset, keeping, steps=2, batch_size=1))
    counts = {int(batch.image_index[0]): int(batch.ground_truth.valid.sum()) for batch in batches}
    assert counts == {0: 1, 1: 0}


@pytest.mark.parametrize("training", [True, False])
def test_an_image_that_breaks_when_decoded_names_its_file(tmp_path, data, training):
    box = (3, 3, 20, 20)
    dataset = tiny.dataset(tmp_path / "images", [(tiny.rectangle_image((48, 72), box), [box], [1])] * 2)
    broken = dataset.records[1].path
    broken.write_bytes(broken.read_bytes()[:400])
    if training:
        iterator = batches_of(dataset, data, steps=4, batch_size=2)
    else:
        iterator = loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=2)
    with pytest.raises(InputError, match="001.png") as caught:
        list(iterator)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cache_mb", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_an_image_that_changes_its_size_under_a_running_job_stops_it_with_its_name(tmp_path, data, training, cache_mb):
    box = (3, 3, 20, 20)
    dataset = tiny.dataset(tmp_path / "images", [(tiny.rectangle_image((48, 72), box), [box], [1])] * 2)
    data = dataclasses.replace(data, cache_mb=cache_mb)
    if training:
        iterator = batches_of(dataset, data, steps=4, batch_size=2)
    else:
        iterator = loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=2)
    Image.fromarray(tiny.rectangle_image((48, 71), box)).save(dataset.records[1].path)
    with pytest.raises(InputError, match=r"001.png: the image has changed: 72 x 48 pixels .*, now 71 x 48"):
        list(iterator)


def test_an_evaluation_meets_every_image_once_in_its_own_pixels(dataset):
    batches = list(loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=4))
    index = np.concatenate([batch.image_index[batch.image_valid] for batch in batches])
    assert sorted(index) == list(range(11))
    for batch in batches:
        assert batch.ground_truth.boxes.shape == (4, 0, 4)
        for row in np.flatnonzero(batch.image_valid):
            size = np.array(dataset.records[batch.image_index[row]].image_hw, np.float32)
            np.testing.assert_allclose(size * batch.scale[row], batch.image_hw[row], rtol=1e-6)


def test_an_epoch_of_many_sizes_has_one_shape_per_canvas(dataset, data, random_weights, caplog):
    """The jitted losses are traced once per shape, which is the number of compiled programs in a run."""
    model = random_weights(lambda: Detector(tiny.MODEL, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))
    canvases = {canvas_for(record.image_hw, tiny.IMAGE) for record in dataset.records}
    batches = list(batches_of(dataset, data))
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(batch)) for batch in batches}
    assert len({record.image_hw for record in dataset.records}) == 7
    assert len(shapes) == len(canvases) == 2
    traced = jax.jit(lambda batch: training_losses(model, batch, jax.random.key(0)))
    with caplog.at_level(logging.INFO, logger="fasterrcnn_jax"):
        for batch in batches:
            traced.trace(batch)
    lines = [line for line in caplog.messages if line.startswith("compiling the training step")]
    assert len(lines) == len(set(lines)) == len(canvases)
