"""Pyramid levels of regions, and RoIAlign over several levels, against torchvision's MultiScaleRoIAlign."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import compare

from fasterrcnn_jax.config import RoiFeaturesConfig
from fasterrcnn_jax.ops.roi_alignment import assign_levels
from fasterrcnn_jax.ops.roi_operators import roi_features

GOLDEN = np.load(Path(__file__).parent / "golden" / "roi_levels.npz")
BOXES = jnp.asarray(np.concatenate([GOLDEN["boxes0"], GOLDEN["boxes1"]]))


def test_levels_equal_torchvisions():
    levels = assign_levels(BOXES, lowest=2, highest=5)
    compare("RoI features", "torchvision", "pyramid levels", levels, GOLDEN["levels"] + 2)


@pytest.mark.parametrize(
    "side, level", [(0.0, 2), (1.0, 2), (111.9, 2), (112.0, 3), (224.0, 4), (447.9, 4), (448.0, 5), (9e3, 5)]
)
def test_a_level_begins_at_its_own_size(side, level):
    assert assign_levels(jnp.float32([3.0, 5.0, 3.0 + side, 5.0 + side]), lowest=2, highest=5) == level


@pytest.mark.parametrize("corner, level", [(np.nan, 2), (np.inf, 5), (-np.inf, 2)])
def test_a_box_without_a_size_is_on_an_existing_level(corner, level):
    assert assign_levels(jnp.float32([0.0, 0.0, corner, 9.0]), lowest=2, highest=5) == level


def test_levels_out_of_order_are_refused():
    with pytest.raises(ValueError, match="got 5 and 2"):
        assign_levels(BOXES, lowest=5, highest=2)


def test_features_over_levels_and_their_gradients_equal_torchvisions():
    """As in torchvision, each region is taken from its level, not aligned, with two samples per bin and axis."""
    features = tuple(jnp.asarray(GOLDEN[f"features{level}"]) for level in range(4))
    boxes = jnp.asarray(np.stack([GOLDEN["boxes0"], GOLDEN["boxes1"]]))
    config = RoiFeaturesConfig(sampling_ratio=2)

    @jax.jit
    def pooled(features):
        options = dict(strides=(4, 8, 16, 32), far_corner_offset=0, config=config)
        values = jax.vmap(lambda f, b: roi_features(f, b, **options))(features, boxes)
        return values.reshape(-1, *values.shape[2:])

    found, pull_back = jax.vjp(pooled, features)
    compare("RoI features", "torchvision", "RoIAlign over four levels", found, GOLDEN["pooled"], atol=2e-5)
    (gradients,) = pull_back(jnp.asarray(GOLDEN["cotangent"]))
    for level, gradient in enumerate(gradients):
        theirs = GOLDEN[f"gradient{level}"]
        compare("RoI features", "torchvision", f"gradient of level {level + 2}", gradient, theirs, atol=1e-4)


def test_a_size_just_below_a_boundary_gets_the_level_above_as_in_torchvision():
    sides = np.float32([223.99, 223.9999, 224.0])[:, None]
    boxes = np.concatenate([np.zeros((3, 2), np.float32), sides, sides], axis=1)
    assert assign_levels(jnp.asarray(boxes), lowest=2, highest=5).tolist() == [3, 4, 4]
