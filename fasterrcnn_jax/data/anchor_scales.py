"""Fits anchor scales to the boxes of a data set.

Boxes and anchors are compared as if they had the same centre, so positions do not matter. This IoU is an upper bound
of the IoU with the anchors on a grid.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.config.checks import AUTO
from fasterrcnn_jax.ops.anchors import cell_anchors, strides_of

Scales = tuple[float, ...]
Sizes = Float[np.ndarray, "n 2"]

ROUNDS = 30
# More boxes do not change the digits of the result that are shown.
MOST_BOXES = 20_000


def size_iou(sizes: Sizes, anchors: Float[np.ndarray, "c 2"]) -> Float[np.ndarray, "n c"]:
    """Returns the IoU of (width, height) pairs, taken as boxes with the same centre."""
    both = np.minimum(sizes[:, None], anchors[None]).prod(axis=2)
    return both / (sizes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - both)


def fit_scales(sizes: Sizes, scales: Scales, anchors_of: Callable[[Scales], list[Float[np.ndarray, "c 2"]]]) -> Scales:
    """Returns as many scales as `scales` has, with a higher mean IoU; returns `scales` if no better ones are found.

    Two steps alternate: every box is assigned to the anchor with the highest IoU, and every scale moves to the
    median of its boxes. This is k-means with the distance 1 - IoU (Redmon and Farhadi 2017, arXiv:1612.08242,
    section 2), where the anchors of one scale move together.

    Args:
      sizes: (width, height) of each box in network pixels.
      scales: the scales to start from.
      anchors_of: function from scales to the anchor sizes of each scale.
    """
    sizes = _some(sizes)
    spread = np.sqrt(np.quantile(sizes.prod(axis=1), (np.arange(len(scales)) + 0.5) / len(scales)))
    unit = np.sqrt(np.mean([anchors.prod(axis=1).min() for anchors in anchors_of((1.0,))]))
    best, reached = scales, _mean_iou(sizes, anchors_of(scales))
    for start in (scales, tuple((spread / unit).tolist())):
        current = start
        for _ in range(ROUNDS):
            anchors = anchors_of(current)
            owner = np.repeat(np.arange(len(anchors)), [len(of_scale) for of_scale in anchors])
            flat = np.concatenate(anchors)
            nearest = size_iou(sizes, flat).argmax(axis=1)
            growth = 0.5 * np.log(sizes.prod(axis=1) / flat[nearest].prod(axis=1))
            current = tuple(
                float(scale * np.exp(np.median(growth[owner[nearest] == k]))) if (owner[nearest] == k).any() else scale
                for k, scale in enumerate(current)
            )
            rounded = tuple(sorted(float(f"{scale:.3g}") for scale in current))
            mean = _mean_iou(sizes, anchors_of(rounded))
            if len(set(rounded)) == len(scales) and mean > reached:
                best, reached = rounded, mean
    return best


def anchor_sizes(model: ModelConfig, scales: Scales) -> list[Float[np.ndarray, "c 2"]]:
    """Returns the (width, height) of the anchors of each scale, on all levels, in network pixels."""
    rpn, strides = model.rpn, strides_of(model)

    def on_level(scale: float, stride: int) -> np.ndarray:
        base = rpn.anchor_base * stride / strides[0]
        boxes = cell_anchors(base, (scale,), rpn.anchor_ratios, rounding=rpn.anchor_rounding).astype(np.float64)
        return boxes[:, 2:] - boxes[:, :2]

    return [np.concatenate([on_level(scale, stride) for stride in strides]) for scale in scales]


def model_scales(model: ModelConfig, sizes: Sizes) -> Scales:
    """Returns the anchor scales that fit boxes of these sizes best: as many as the model has.

    Where `model.rpn.anchor_scales` is auto: one for a pyramid, whose levels differ already, otherwise four.
    """
    scales = model.rpn.anchor_scales
    if scales == AUTO:
        scales = (1.0,) if model.fpn is not None else (1.0, 2.0, 4.0, 8.0)
    return fit_scales(sizes, scales, lambda scales: anchor_sizes(model, scales))


def fit_sizes(sizes: Sizes, count: int) -> Float[np.ndarray, "c 2"]:
    """Returns `count` sizes of any shape, found by k-means with the distance 1 - IoU, the smallest first."""
    sizes = _some(sizes)
    order = np.argsort(sizes.prod(axis=1), kind="stable")
    places = ((np.arange(count) + 0.5) / count * len(sizes)).astype(int)
    centres = sizes[order[places]].astype(np.float64)
    for _ in range(ROUNDS):
        nearest = size_iou(sizes, centres).argmax(axis=1)
        centres = np.stack([
            np.median(sizes[nearest == k], axis=0) if (nearest == k).any() else centres[k] for k in range(count)
        ])  # fmt: skip
    return centres[np.argsort(centres.prod(axis=1), kind="stable")]


def _some(sizes: np.ndarray) -> np.ndarray:
    return sizes[:: -(-len(sizes) // MOST_BOXES)]


def _mean_iou(sizes: np.ndarray, anchors: list[np.ndarray]) -> float:
    return float(size_iou(sizes, np.concatenate(anchors)).max(axis=1).mean())
