"""A network that is symmetric in left and right finds the mirrored boxes in the mirrored image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from fasterrcnn_jax.config import BackboneConfig, BoxHeadConfig, RoiFeaturesConfig
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.faster_rcnn import detect

H, W, S = 64, 96, 4
# VGG16, because its poolings cover the same places in the mirrored image; strided convolutions do not.
CONFIG = dataclasses.replace(
    tiny.MODEL,
    backbone=BackboneConfig(name="vgg16", width=8, norm="none", fixed_stages=0),
    box_head=BoxHeadConfig(channels=16),
    roi_features=RoiFeaturesConfig(output_size=S, sampling_ratio=2, aligned=True),
)


def symmetric(path, leaf):
    """Returns a model whose convolutions and fc6 equal their mirror image and whose deltas move no box sideways."""
    names = [str(part.key) for part in path if hasattr(part, "key")]
    values = np.array(leaf)
    if values.ndim == 4:
        values = (values + values[:, ::-1]) / 2
    elif "fcs" in names and "kernel" in names:
        grid = values.reshape(S, S, -1, values.shape[-1])
        values = ((grid + grid[:, ::-1]) / 2).reshape(values.shape)
    if "deltas" in names:
        values.reshape(-1, values.shape[-1])[:, ::4] = 0.0
    return jnp.asarray(values)


@pytest.mark.parametrize("seed", range(3))
def test_detection_commutes_with_mirroring(random_weights, seed):
    model = random_weights(lambda: Detector(CONFIG, tiny.CLASS_NAMES, rng=np.random.default_rng(0)), seed=seed)
    graphdef, state = nnx.split(model)
    run = jax.jit(detect)
    image = np.random.default_rng(seed).normal(size=(1, H, W, 3)).astype(np.float32)
    hw, scale = np.float32([[H, W]]), np.ones((1, 2), np.float32)

    def scores_and_boxes(state, image):
        found = run(nnx.merge(graphdef, state), image, hw, scale)
        valid = np.asarray(found.valid[0])
        return np.asarray(found.scores[0])[valid], np.asarray(found.boxes[0])[valid]

    even = jax.tree_util.tree_map_with_path(symmetric, state)
    scores, boxes = scores_and_boxes(even, image)
    mirrored_scores, mirrored_boxes = scores_and_boxes(even, image[:, :, ::-1].copy())
    assert len(scores) == len(mirrored_scores) >= 3
    np.testing.assert_allclose(mirrored_scores, scores, atol=1e-5)
    back = np.stack([W - mirrored_boxes[:, 2], mirrored_boxes[:, 1], W - mirrored_boxes[:, 0], mirrored_boxes[:, 3]], 1)
    # Boxes of equal score may change places.
    distance = np.abs(back[:, None] - boxes[None]).max(axis=2).min(axis=1)
    np.testing.assert_allclose(distance, np.zeros(len(distance)), atol=1e-2)
    # The same network without the symmetry does not.
    other_scores, _ = scores_and_boxes(state, image)
    other_mirrored, _ = scores_and_boxes(state, image[:, :, ::-1].copy())
    assert len(other_scores) != len(other_mirrored) or np.abs(other_scores - other_mirrored).max() > 1e-3
