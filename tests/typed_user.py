"""A user's script, which tests/check_types.py checks against the wheel: types of the public names reach a checker."""

# pyright: reportUnnecessaryTypeIgnoreComment=error

from typing import assert_type

import jax
import numpy as np
from jax import Array

import fasterrcnn_jax
from fasterrcnn_jax import models, nms, ops

boxes = np.zeros((5, 4))
scores = np.zeros(5)
kept = nms(boxes, scores, iou_threshold=0.5)
assert_type(kept, ops.Kept)
assert_type(kept.indices, Array)
assert_type(fasterrcnn_jax.batched_nms(boxes, scores, np.zeros(5, int), iou_threshold=0.5), ops.Kept)
assert_type(ops.soft_nms(boxes, scores).scores, Array)
assert_type(ops.roi_align(np.zeros((8, 8, 3)), boxes, output_size=(7, 7)), Array)
assert_type(ops.roi_align((np.zeros((8, 8, 3)),), boxes, strides=(4,), output_size=7), Array)
assert_type(ops.roi_pool(np.zeros((8, 8, 3)), boxes, stride=16, output_size=7), Array)
assert_type(ops.pairwise_iou(boxes, boxes), Array)
assert_type(ops.clip(ops.decode(ops.encode(boxes, boxes), boxes), (480, 640)), Array)
assert_type(ops.match(ops.pairwise_iou(boxes, boxes), fg_iou=0.5), ops.Matches)
assert_type(ops.sample(jax.random.key(0), np.zeros(5, int), size=2, fg_fraction=0.5).valid, Array)
# What a checker must refuse. It reports an ignore that is not needed.
nms(boxes, scores, iou_threshold="0.5")  # pyright: ignore[reportArgumentType]
nms(boxes, scores)  # pyright: ignore[reportCallIssue]


def total_loss(model: models.Detector, batch: models.Batch) -> Array:
    losses = models.training_losses(model, batch, jax.random.key(0))
    assert_type(losses, models.Losses)
    return losses.terms().total
