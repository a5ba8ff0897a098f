"""The images in a run folder."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from fasterrcnn_jax.data.records import ImageDetections, ImageProposals
from fasterrcnn_jax.inference.drawing import (
    SHOWN_SIDE,
    comparison_sheet,
    shown_positions,
)
from fasterrcnn_jax.training.progress import MetricsWriter


@pytest.mark.parametrize("image_hw", [(60, 90), (1500, 1000)])
def test_small_images_grow_and_large_ones_shrink_with_their_boxes(tmp_path, image_hw):
    height, width = image_hw
    box = (width // 4, height // 4, width // 2, height // 2)
    dataset = tiny.dataset(tmp_path / "images", [(tiny.rectangle_image(image_hw, box), [box], [1])])
    found = ImageDetections(np.float32([box]), np.float32([0.9]), np.int32([1]))
    proposals = [ImageProposals(np.float32([[0, 0, width, height]]), np.float32([0.5]))]
    with MetricsWriter(tmp_path, after=0) as metrics:
        path = metrics.write_image(7, comparison_sheet(dataset, shown_positions(dataset), [found], proposals))
    with Image.open(path) as image:
        drawn = np.asarray(image.convert("RGB"))
    shown = (drawn.shape[1] - 32) // 3
    longest = max(shown, shown * height // width)
    assert SHOWN_SIDE * 0.6 <= longest <= SHOWN_SIDE * 1.5
    # The middle of the object is red in all three.
    # Above it are the titles of the columns and the name of the image.
    y = 3 * 8 + 2 * 24 + round(shown * height / width * 3 / 8)
    for left in (8, 16 + shown, 24 + 2 * shown):
        red, green, _ = drawn[y, left + shown * 3 // 8].astype(int)
        assert red > green + 100


def test_without_detections_the_third_column_is_left_out(tmp_path):
    box = (10, 10, 40, 40)
    dataset = tiny.dataset(tmp_path / "images", [(tiny.rectangle_image((60, 90), box), [box], [1])])
    found = ImageDetections(np.float32([box]), np.float32([0.9]), np.int32([1]))
    proposals = [ImageProposals(np.float32([box]), np.float32([0.5]))]
    widths = [comparison_sheet(dataset, [0], detections, proposals).shape[1] for detections in (None, [found])]
    assert (widths[0] - 24) / 2 == (widths[1] - 32) / 3


def test_images_of_two_splits_are_two_files(tmp_path):
    white, black = (np.full((4, 4, 3), value, np.uint8) for value in (255, 0))
    with MetricsWriter(tmp_path, after=0) as metrics:
        paths = [metrics.write_image(6, white), metrics.write_image(6, black, split="test")]
    assert [path.name for path in paths] == ["000006.png", "000006_test.png"]
    assert [np.asarray(Image.open(path)).max() for path in paths] == [255, 0]


def test_a_silent_writer_leaves_nothing_behind(tmp_path):
    with MetricsWriter(tmp_path, after=0, silent=True) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.write_image(1, np.zeros((4, 4, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_damaged_lines_of_the_log_are_removed_with_a_warning(tmp_path, caplog):
    lines = ['{"step": 1}\n', '{"bad}\n', "[]\n", '{"step": "x"}\n', '{"step": 2}\n', '{"step": 3}\n', '{"ste']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    with MetricsWriter(tmp_path, after=2) as metrics:
        metrics.write(3, {})
    kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [1, 2, 3]
    (record,) = caplog.records
    assert "metrics.jsonl: 3 damaged lines are removed" in record.getMessage()
