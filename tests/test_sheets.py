"""The sheets of images in a run folder: titles, names, fonts, and training batches as the network sees them."""

import dataclasses

import numpy as np
import pytest
import tiny

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import loader
from fasterrcnn_jax.data.records import ImageDetections, ImageProposals, Prediction
from fasterrcnn_jax.data.transforms import to_canvas
from fasterrcnn_jax.inference import drawing
from fasterrcnn_jax.inference.drawing import batch_sheet, comparison_sheet, draw, label_colour, readable, text_line
from fasterrcnn_jax.structures import Batch, GroundTruth

GAP, LINE = 8, 24
# A batch sheet has two lines of text above each image; a canvas of 64 x 96 is shown five times as large.
TOP, LEFT, ZOOM = 3 * GAP + 2 * LINE, GAP, 5


def batch_of(pixels, boxes, config):
    canvas, image_hw, scale = to_canvas(pixels, (64, 96), config)
    # One slot is empty, and one image only fills the batch.
    slots = np.zeros((2, len(boxes) + 1, 4), np.float32)
    slots[0, : len(boxes)] = np.float32(boxes).reshape(-1, 4)
    valid = np.zeros(slots.shape[:2], bool)
    valid[0, : len(boxes)] = True
    labels = np.where(valid, 2, 0).astype(np.int32)
    return Batch(
        images=np.stack([canvas, np.zeros_like(canvas)]),
        image_hw=np.stack([image_hw, np.zeros_like(image_hw)]),
        scale=np.stack([scale, np.ones_like(scale)]),
        image_index=np.int32([17, 0]),
        image_valid=np.array([True, False]),
        ground_truth=GroundTruth(slots, labels, valid),
    )


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
@pytest.mark.parametrize("pixel_dtype", ["float32", "uint8"])
def test_a_batch_is_shown_in_the_colours_of_its_files_with_its_padding(channel_order, pixel_dtype):
    config = dataclasses.replace(tiny.IMAGE, short_side=56, channel_order=channel_order, pixel_dtype=pixel_dtype)
    pixels = np.random.default_rng(0).integers(0, 256, (56, 80, 3), dtype=np.uint8)
    sheet = batch_sheet(batch_of(pixels, [], config), config, tiny.CLASS_NAMES)
    assert sheet.shape == (TOP + 64 * ZOOM + GAP, 96 * ZOOM + 2 * GAP, 3)  # one image
    shown = sheet[TOP : TOP + 64 * ZOOM, LEFT : LEFT + 96 * ZOOM]
    np.testing.assert_array_equal(shown[: 56 * ZOOM : ZOOM, : 80 * ZOOM : ZOOM], pixels)
    for padding in (shown[:, 80 * ZOOM :], shown[56 * ZOOM :]):
        assert set(np.unique(padding)) == {205, 235}
    for line, text in enumerate(("image 17", "80 x 56 on 96 x 64")):
        top = GAP + line * (LINE + GAP)
        np.testing.assert_array_equal(sheet[top : top + LINE, LEFT:-GAP], text_line(text, 96 * ZOOM))


def test_boxes_of_a_batch_lie_on_their_mirrored_objects(tmp_path):
    box = (10, 12, 40, 44)
    dataset = tiny.dataset(tmp_path, [(tiny.rectangle_image((64, 96), box), [box], [2])])
    dataset = dataset._replace(records=(dataset.records[0]._replace(flipped=True),))
    data = DataConfig(root=tmp_path, class_names=tiny.CLASS_NAMES, flip="none")
    batches = loader.training_batches(dataset, data, tiny.IMAGE, batch_size=1, seed=0, steps=1)
    sheet = batch_sheet(next(batches), tiny.IMAGE, tiny.CLASS_NAMES, names=["ring.png"])
    np.testing.assert_array_equal(sheet[GAP : GAP + LINE, LEFT:-GAP], text_line("ring.png", 96 * ZOOM))
    shown = sheet[TOP : TOP + 64 * ZOOM, LEFT : LEFT + 96 * ZOOM]
    x1, y1, x2, y2 = (side * ZOOM for side in (96 - 40, 12, 96 - 10, 44))
    assert (shown[y1:y2, x1] == label_colour(2)).all() and (shown[y2 - 1, x1:x2] == label_colour(2)).all()
    assert (shown[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] == (250, 30, 40)).all()


def test_a_large_batch_is_shown_in_rows_of_four():
    one = batch_of(np.zeros((64, 96, 3), np.uint8), [], tiny.IMAGE)
    count = drawing.SHOWN_IN_BATCH + 5
    many = Batch(
        *(np.stack([values[0]] * count) for values in one[:5]),
        GroundTruth(*(np.stack([values[0]] * count) for values in one.ground_truth)),
    )
    rows = drawing.SHOWN_IN_BATCH // 4
    sheet = batch_sheet(many, tiny.IMAGE, tiny.CLASS_NAMES)
    assert sheet.shape == (rows * (TOP + 64 * ZOOM) + GAP, 4 * (96 * ZOOM + GAP) + GAP, 3)


@pytest.mark.parametrize("detected", [False, True])
def test_a_comparison_names_its_columns_and_its_images(tmp_path, detected):
    box = (10, 12, 40, 44)
    dataset = tiny.dataset(tmp_path, [(tiny.rectangle_image((60, 90), box, seed=seed), [box], [1]) for seed in (0, 1)])
    found = [ImageDetections(np.float32([box]), np.float32([0.9]), np.int32([1]))] * 2
    proposals = [ImageProposals(np.float32([box]), np.float32([0.5]))] * 2
    sheet = comparison_sheet(dataset, [0, 1], found if detected else None, proposals)
    titles = ("ground truth", "best 20 proposals", "detections, score at least 0.5")[: 2 + detected]
    for column, title in enumerate(titles):
        left = GAP + column * (450 + GAP)
        np.testing.assert_array_equal(sheet[GAP : GAP + LINE, left : left + 450], text_line(title, 450))
    assert sheet.shape == (2 * GAP + LINE + 2 * (LINE + 300 + 2 * GAP), len(titles) * (450 + GAP) + GAP, 3)
    for row, name in enumerate(("000", "001")):
        top = 2 * GAP + LINE + row * (LINE + 300 + 2 * GAP)
        np.testing.assert_array_equal(sheet[top : top + LINE, GAP : GAP + 450], text_line(name, 450))
        assert (sheet[top : top + LINE, GAP + 450 :] == 255).all()


def test_a_long_name_is_cut_to_its_image():
    name = "DSC_0001_a_very_long_name_of_an_image.jpg"
    short = text_line(name, 150)
    assert short.shape == (LINE, 150, 3) and (short[:, -1] == 255).all() and (short < 128).any()
    assert np.any(short != text_line(name, 1000)[:, :150])  # it ends in dots
    assert text_line(name, 5).shape == (LINE, 5, 3) and (text_line(name, 5) == 255).all()


def test_letters_that_no_font_has_lose_their_accents_or_become_codes(monkeypatch):
    monkeypatch.setattr(drawing, "FONTS", ("no such font.ttf",))
    assert readable("traffic light 0.95", 12)[0] == "traffic light 0.95"
    assert readable("Bär, été", 12)[0] == "Bar, ete"
    assert readable("猫 0.9", 12)[0] == "\\u732b 0.9"
    assert readable("\udce9\U0001f408", 12)[0] == "\\udce9\\U0001f408"  # a byte that is no text, and an emoji
    assert readable("a\nb\x00", 12)[0] == "a b "


def test_an_installed_font_with_the_letters_is_used():
    if drawing._font("DejaVuSans.ttf", 12) is None:
        pytest.skip("DejaVu is not installed")
    assert readable("ring", 12)[1].getname()[0] != "DejaVu Sans"
    text, font = readable("Bär, Лёд, 猫", 12)
    assert text.startswith("Bär, Лёд, ") and font.getname()[0] == "DejaVu Sans"


@pytest.mark.parametrize("names", [("猫", "犬"), ("Größe", "Große"), ("\udce9", "\udcea")])
def test_two_class_names_of_any_script_have_two_captions(names):
    image = np.zeros((60, 90, 3), np.uint8)
    one, other = (
        draw(image, Prediction(np.float32([(10, 25, 80, 50)]), np.float32([0.9]), np.int32([1]), (name,)))
        for name in names
    )
    assert np.any(one != other)
