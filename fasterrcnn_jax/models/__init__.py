"""The detector's parts, and what trains them: for a training loop, a backbone or a second stage of your own.

Each name is imported when it is first used.

The detector: `Detector` (an `nnx.Module`), `create_detector`, `split` (its trained parameters, and the rest),
`parameter_count`, `Backbone` (the interface of your own backbone), `shared_features` (its maps).
Region proposals: `rpn_output`, `batch_anchor_targets`, `batch_proposals`, `batch_rpn_losses`.
Second stage: `sample_rois`, `batch_roi_features`, `batch_box_losses`, `detections_in_regions`.
The whole: `training_losses`, `losses_for_targets`, `rpn_training_losses`, `box_training_losses`, `detect`,
`find_proposals`, `detect_in_proposals`. Data: `Batch`, `GroundTruth`, `Proposals`, `Detections`, `Losses`, `LossTerms`.
Training: `create_optimizer`, `create_state`, `make_train_step`, `replicate`, `data_parallel`, `TrainState`,
`StepMetrics`, `merge`.
"""

from typing import TYPE_CHECKING

from fasterrcnn_jax import _lazy

if TYPE_CHECKING:
    from fasterrcnn_jax.models.detector import (
        Backbone,
        Detector,
        create_detector,
        parameter_count,
        shared_features,
        split,
    )
    from fasterrcnn_jax.models.faster_rcnn import (
        box_training_losses,
        detect,
        detect_in_proposals,
        find_proposals,
        losses_for_targets,
        rpn_training_losses,
        training_losses,
    )
    from fasterrcnn_jax.models.roi_heads import (
        batch_box_losses,
        batch_roi_features,
        detections_in_regions,
        sample_rois,
    )
    from fasterrcnn_jax.models.rpn import (
        RpnOutput,
        batch_anchor_targets,
        batch_proposals,
        batch_rpn_losses,
        rpn_output,
    )
    from fasterrcnn_jax.processes import replicate
    from fasterrcnn_jax.structures import (
        Batch,
        Detections,
        GroundTruth,
        Losses,
        LossTerms,
        Proposals,
    )
    from fasterrcnn_jax.training.optimizer import create_optimizer
    from fasterrcnn_jax.training.state import StepMetrics, TrainState, merge
    from fasterrcnn_jax.training.step import create_state, data_parallel, make_train_step

__all__ = [
    "Backbone",
    "Batch",
    "Detections",
    "Detector",
    "GroundTruth",
    "LossTerms",
    "Losses",
    "Proposals",
    "RpnOutput",
    "StepMetrics",
    "TrainState",
    "batch_anchor_targets",
    "batch_box_losses",
    "batch_proposals",
    "batch_roi_features",
    "batch_rpn_losses",
    "box_training_losses",
    "create_detector",
    "create_optimizer",
    "create_state",
    "data_parallel",
    "detect",
    "detect_in_proposals",
    "detections_in_regions",
    "find_proposals",
    "losses_for_targets",
    "make_train_step",
    "merge",
    "parameter_count",
    "replicate",
    "rpn_output",
    "rpn_training_losses",
    "sample_rois",
    "shared_features",
    "split",
    "training_losses",
]

_HOMES = {
    "Backbone": "fasterrcnn_jax.models.detector",
    "Batch": "fasterrcnn_jax.structures",
    "Detections": "fasterrcnn_jax.structures",
    "Detector": "fasterrcnn_jax.models.detector",
    "GroundTruth": "fasterrcnn_jax.structures",
    "LossTerms": "fasterrcnn_jax.structures",
    "Losses": "fasterrcnn_jax.structures",
    "Proposals": "fasterrcnn_jax.structures",
    "RpnOutput": "fasterrcnn_jax.models.rpn",
    "StepMetrics": "fasterrcnn_jax.training.state",
    "TrainState": "fasterrcnn_jax.training.state",
    "batch_anchor_targets": "fasterrcnn_jax.models.rpn",
    "batch_box_losses": "fasterrcnn_jax.models.roi_heads",
    "batch_proposals": "fasterrcnn_jax.models.rpn",
    "batch_roi_features": "fasterrcnn_jax.models.roi_heads",
    "batch_rpn_losses": "fasterrcnn_jax.models.rpn",
    "box_training_losses": "fasterrcnn_jax.models.faster_rcnn",
    "create_detector": "fasterrcnn_jax.models.detector",
    "create_optimizer": "fasterrcnn_jax.training.optimizer",
    "create_state": "fasterrcnn_jax.training.step",
    "data_parallel": "fasterrcnn_jax.training.step",
    "detect": "fasterrcnn_jax.models.faster_rcnn",
    "detect_in_proposals": "fasterrcnn_jax.models.faster_rcnn",
    "detections_in_regions": "fasterrcnn_jax.models.roi_heads",
    "find_proposals": "fasterrcnn_jax.models.faster_rcnn",
    "losses_for_targets": "fasterrcnn_jax.models.faster_rcnn",
    "make_train_step": "fasterrcnn_jax.training.step",
    "merge": "fasterrcnn_jax.training.state",
    "parameter_count": "fasterrcnn_jax.models.detector",
    "replicate": "fasterrcnn_jax.processes",
    "rpn_output": "fasterrcnn_jax.models.rpn",
    "rpn_training_losses": "fasterrcnn_jax.models.faster_rcnn",
    "sample_rois": "fasterrcnn_jax.models.roi_heads",
    "shared_features": "fasterrcnn_jax.models.detector",
    "split": "fasterrcnn_jax.models.detector",
    "training_losses": "fasterrcnn_jax.models.faster_rcnn",
}

__getattr__, __dir__ = _lazy.attach(__name__, _HOMES)
