"""Evaluation on several devices: the same detections as on one, and each image once."""

from collections import Counter

import jax
import numpy as np
import pytest
import tiny

from fasterrcnn_jax.inference import dataset as inference
from fasterrcnn_jax.structures import Detections

pytestmark = pytest.mark.skipif(jax.local_device_count() < 4, reason="needs four devices")

SCORE, PIXELS = 1e-4, 1e-2  # fixed before the comparison: only the rounding may differ


@pytest.fixture(scope="module")
def model(random_weights):
    return tiny.quick_model(random_weights)[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Nine landscapes and two portraits: neither fills its last batch on 4 devices."""
    sizes = [(50, 70)] * 9 + [(70, 50)] * 2
    images = [
        (tiny.rectangle_image(size, (5, 6, 30, 40), seed=seed), [(5, 6, 30, 40)], [1])
        for seed, size in enumerate(sizes)
    ]
    return tiny.dataset(tmp_path_factory.mktemp("images"), images)


def test_four_devices_find_what_one_finds(model, dataset, monkeypatch):
    # Of one canvas: each canvas takes two compilations.
    dataset = dataset._replace(records=dataset.records[:9])
    with tiny.quick_compilation():
        together = inference.detect_dataset(model, dataset, batch_size=2)
        monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        alone = inference.detect_dataset(model, dataset, batch_size=2)
    assert len(together) == len(alone) == 9
    assert sum(len(found.scores) for found in alone) > 18
    for found, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(found.labels, other.labels)
        np.testing.assert_allclose(found.scores, other.scores, atol=SCORE)
        np.testing.assert_allclose(found.boxes, other.boxes, atol=PIXELS)


def test_every_device_gets_its_rows_and_every_image_is_detected_once(model, dataset, monkeypatch):
    seen, devices_of = Counter(), []

    def noting(function, *, devices):
        def run(state, rows):
            devices_of.append(len(devices))
            images, image_hw, _ = rows
            assert len(images) == 2 * len(devices), "each device processes batch_size images"
            for pixels, size in zip(images, image_hw):
                seen[pixels.tobytes()] += bool(size.any())
            shape = (len(devices), 2, 1)
            zeros = np.zeros(shape, np.float32)
            return Detections(np.zeros((*shape, 4), np.float32), zeros, zeros.astype(np.int32), zeros.astype(bool))

        return run

    inference.on_devices.cache_clear()
    monkeypatch.setattr(inference, "over_devices", noting)
    try:
        assert len(inference.detect_dataset(model, dataset, batch_size=2)) == 11
    finally:
        inference.on_devices.cache_clear()
    assert devices_of == [4, 4, 4]  # two calls for the landscapes, one for the portraits
    assert sorted(count for count in seen.values() if count) == [1] * 11
