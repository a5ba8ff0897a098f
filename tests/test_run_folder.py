"""The run folder's pictures."""

import numpy as np
import pytest
import tiny
from PIL import Image

from fasterrcnn_jax.evaluation.results import ImageDetections
from fasterrcnn_jax.run_folder import PICTURED_SIDE, write_picture


@pytest.mark.parametrize("image_hw", [(60, 90), (1500, 1000)])
def test_small_images_grow_and_large_ones_shrink_with_their_boxes(tmp_path, image_hw):
    height, width = image_hw
    box = (width // 4, height // 4, width // 2, height // 2)
    dataset = tiny.dataset(tmp_path / "images", [(tiny.picture(image_hw, box), [box], [1])])
    found = ImageDetections(np.float32([box]), np.float32([0.9]), np.int32([1]))
    with Image.open(write_picture(tmp_path, 7, [found], dataset)) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    shown = (sheet.shape[1] - 24) // 2
    longest = max(shown, shown * height // width)
    assert PICTURED_SIDE * 0.6 <= longest <= PICTURED_SIDE * 1.5
    # The middle of the object is red on both sides.
    y = 8 + round(shown * height / width * 3 / 8)
    for left in (8, 16 + shown):
        red, green, _ = sheet[y, left + shown * 3 // 8].astype(int)
        assert red > green + 100
