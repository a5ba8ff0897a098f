"""The pytrees that flow from stage to stage.

B images, A anchors, P proposals, R sampled RoIs, D detections, G ground-truth slots, K classes,
S pool size. The functions of `ops/` take one image, so their arrays do not have the leading B axis.

Boxes are float32 xyxy, continuous, in pixels of the padded network input: a box covers
[x1, x2) x [y1, y2). Label 0 is background, 1..K are the classes. Only the bool array `valid` next to
the data tells which entries are padding; padded entries are zero and finite.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

PerDelta = tuple[float, float, float, float]  # one value for each of dx, dy, dw, dh

# The default limit of log scales: exp() of a larger value would turn a 16 px anchor into a box wider than a
# 1000 px image.
MAX_LOG_SCALE = math.log(1000.0 / 16.0)

# Canvases from the host: normalised float32, or unnormalised uint8 (`ImageConfig.pixel_dtype`); zero beyond the image.
Images = Float[Array, "b h w 3"] | UInt8[Array, "b h w 3"]


class GroundTruth(NamedTuple):
    boxes: Float[Array, "*b g 4"]
    labels: Int[Array, "*b g"]
    valid: Bool[Array, "*b g"]


class Proposals(NamedTuple):
    boxes: Float[Array, "*b p 4"]
    scores: Float[Array, "*b p"]  # objectness probability
    valid: Bool[Array, "*b p"]


class Batch(NamedTuple):
    images: Images
    image_hw: Float[Array, "*b 2"]  # (height, width) of the image inside the canvas
    scale: Float[Array, "*b 2"]  # (y, x) network pixels per pixel of the original image; y and x differ by rounding
    image_index: Int[Array, "*b"]  # position in the data set; seeds the random choices for the image
    image_valid: Bool[Array, "*b"]  # False for rows that only fill the batch
    ground_truth: GroundTruth
    proposals: Proposals | None = None  # stored proposals, to train the box head alone; None: the RPN makes them


class AnchorTargets(NamedTuple):
    labels: Int[Array, "*b a"]  # -1 ignored or not sampled, 0 background, 1 foreground
    deltas: Float[Array, "*b a 4"]  # zero unless the anchor is foreground, whether sampled or not
    foreground: Bool[Array, "*b a"]  # which anchors are foreground, whether sampled or not


class RoiTargets(NamedTuple):
    boxes: Float[Array, "*b r 4"]
    labels: Int[Array, "*b r"]  # 0 background, 1..K
    deltas: Float[Array, "*b r 4"]  # zero unless foreground
    valid: Bool[Array, "*b r"]


class Detections(NamedTuple):
    boxes: Float[Array, "*b d 4"]
    scores: Float[Array, "*b d"]  # class probability, descending
    labels: Int[Array, "*b d"]
    valid: Bool[Array, "*b d"]


class Mean(NamedTuple):
    """A mean before the division: sum and count are kept, because a mean of per-device means is not the global mean."""

    sum: Float[Array, "*b"]
    count: Float[Array, "*b"]  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's count, which nobody calls

    def divided(self, global_count: Callable[[Array], Array] = lambda count: count) -> Float[Array, "*b"]:
        """Returns the sum divided by the count, or by 1 where the count is 0.

        Args:
          global_count: maps the count of this device to the count over all devices.
        """
        return self.sum / jnp.maximum(global_count(jax.lax.stop_gradient(self.count)), 1.0)


class LossTerms(NamedTuple):
    """The four terms of the training loss, each a mean."""

    rpn_objectness: Float[Array, ""]
    rpn_box: Float[Array, ""]
    box_class: Float[Array, ""]
    box_delta: Float[Array, ""]

    @property
    def total(self) -> Float[Array, ""]:
        """Returns the training loss.

        Ren et al. 2015 (arXiv:1506.01497), eq. 1, and Girshick 2015 (arXiv:1504.08083), eq. 1.
        """
        return self.rpn_objectness + self.rpn_box + self.box_class + self.box_delta


class Losses(NamedTuple):
    """The four losses of a batch, or of each image of a batch, as sums and counts."""

    rpn_objectness: Mean
    rpn_box: Mean
    box_class: Mean
    box_delta: Mean
    # Numbers of sampled anchors and RoIs that are foreground: a loss over background alone says nothing about objects.
    rpn_foreground: Float[Array, "*b"]
    box_foreground: Float[Array, "*b"]

    @property
    def means(self) -> dict[str, Mean]:
        """Returns the four losses by name, without the foreground counts."""
        return {name: getattr(self, name) for name in LossTerms._fields}

    def terms(self, global_count: Callable[[Array], Array] = lambda count: count) -> LossTerms:
        """Returns each sum divided by its count, or by 1 where the count is 0.

        Args:
          global_count: maps the count of this device to the count over all devices.
        """
        return LossTerms(**{name: mean.divided(global_count) for name, mean in self.means.items()})
