"""The choice of the operator and of the map for the features of a region."""

import functools

import jax
import jax.numpy as jnp
import mosaic
import pytest

from fasterrcnn_jax.config import RoiFeaturesConfig
from fasterrcnn_jax.ops.roi_operators import roi_features

# One map per level, filled with the number of the level.
STRIDES = (4, 8, 16, 32)
PYRAMID = tuple(jnp.full((512 // stride, 768 // stride, 1), float(number)) for number, stride in enumerate(STRIDES))
ALIGN = RoiFeaturesConfig(output_size=2, sampling_ratio=2)


def boxes_of(*sides):
    return jnp.float32([[10, 20, 10 + side, 20 + side] for side in sides])


def level_of(boxes, *, strides=STRIDES, far_corner_offset=0):
    first = STRIDES.index(strides[0])
    options = dict(strides=strides, far_corner_offset=far_corner_offset, config=ALIGN)
    pooled = jax.jit(functools.partial(roi_features, **options))(PYRAMID[first : first + len(strides)], boxes)
    assert bool((pooled == pooled[:, :1, :1]).all())
    return pooled[:, 0, 0, 0].astype(int).tolist()


def test_each_box_of_a_pyramid_is_taken_from_the_level_of_its_size():
    assert level_of(boxes_of(1, 111, 113, 223, 225, 447, 449, 1)) == [0, 0, 1, 1, 2, 2, 3, 0]


def test_the_strides_determine_the_levels():
    assert level_of(boxes_of(1, 223, 225, 449), strides=(8, 16)) == [1, 1, 2, 2]


def test_the_far_corner_offset_is_subtracted_before_the_level_is_chosen():
    assert level_of(boxes_of(112), far_corner_offset=0) == [1]
    assert level_of(boxes_of(112), far_corner_offset=1) == [0]


def test_a_single_map_takes_all_boxes():
    assert level_of(boxes_of(1, 449), strides=(16,)) == [2, 2]


@pytest.mark.parametrize("operator", ["align_average", "pool", "crop"])
def test_operators_of_a_single_map_refuse_a_pyramid(operator):
    config = RoiFeaturesConfig(operator=operator)
    with pytest.raises(ValueError, match=f"{operator} takes a single map, got 4"):
        roi_features(PYRAMID, boxes_of(9), strides=STRIDES, far_corner_offset=0, config=config)


@pytest.mark.parametrize("operator", ["align", "pool"])
def test_the_implementation_is_passed_on(monkeypatch, operator):
    mosaic.pretend(monkeypatch, platform="cpu")
    options = dict(strides=(16,), far_corner_offset=0, config=RoiFeaturesConfig(operator=operator))
    run = functools.partial(roi_features, PYRAMID[2:3], boxes_of(9), **options)
    assert jax.eval_shape(functools.partial(run, implementation="xla")).shape == (1, 7, 7, 1)
    with pytest.raises(NotImplementedError, match=f"roi_{operator} was asked for"):
        run(implementation="mosaic")
