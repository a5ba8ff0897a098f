"""The operations of two-stage detection, for your own model: the functions that the detector itself calls.

Each is a pure function of arrays with fixed shapes, and works under `jax.jit`, `jax.vmap` and `jax.grad`. A function
takes one image; `jax.vmap` maps it over a batch. Arrays are JAX's or NumPy's. Boxes are xyxy in continuous pixels and
float32: float64 and integers are converted, float16 and bfloat16 boxes are refused. Scores, logits and features may be
of any floating-point type. The result of a selection has a fixed size with a mask `valid`.

Suppression: `nms`, `batched_nms`, `soft_nms`. Region features: `roi_align` (one map or a pyramid), `roi_pool`,
`assign_levels`. Boxes: `area`, `pairwise_iou`, `clip`, `encode`, `decode`. Anchors: `cell_anchors`, `grid_anchors`.
Targets: `match`, `match_boxes`, `sample`, `anchor_targets`, `roi_targets`. Losses: `smooth_l1`, `rpn_losses`,
`box_losses`.
"""

from fasterrcnn_jax.ops.anchors import cell_anchors, grid_anchors
from fasterrcnn_jax.ops.box_coder import decode, encode
from fasterrcnn_jax.ops.boxes import area, clip, pairwise_iou
from fasterrcnn_jax.ops.losses import StageLosses, box_losses, rpn_losses, smooth_l1
from fasterrcnn_jax.ops.matching import BACKGROUND, FOREGROUND, IGNORED, Matches, match, match_boxes
from fasterrcnn_jax.ops.roi_alignment import assign_levels, roi_align
from fasterrcnn_jax.ops.roi_pooling import roi_pool
from fasterrcnn_jax.ops.sampling import Sample, sample
from fasterrcnn_jax.ops.suppression import Kept, SoftKept, batched_nms, nms, soft_nms
from fasterrcnn_jax.ops.targets import anchor_targets, roi_targets
from fasterrcnn_jax.structures import AnchorTargets, GroundTruth, Mean, Proposals, RoiTargets

__all__ = [
    "BACKGROUND",
    "FOREGROUND",
    "IGNORED",
    "AnchorTargets",
    "GroundTruth",
    "Kept",
    "Matches",
    "Mean",
    "Proposals",
    "RoiTargets",
    "Sample",
    "SoftKept",
    "StageLosses",
    "anchor_targets",
    "area",
    "assign_levels",
    "batched_nms",
    "box_losses",
    "cell_anchors",
    "clip",
    "decode",
    "encode",
    "grid_anchors",
    "match",
    "match_boxes",
    "nms",
    "pairwise_iou",
    "roi_align",
    "roi_pool",
    "roi_targets",
    "rpn_losses",
    "sample",
    "smooth_l1",
    "soft_nms",
]
