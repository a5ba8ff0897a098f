"""Faster R-CNN in JAX: train on your own boxes, detect in one XLA program.

The names in `__all__` are public, and those of `fasterrcnn_jax.ops` (operations for your own model) and
`fasterrcnn_jax.models` (the detector's parts and its training step). Each is imported when it is first used, so
`import fasterrcnn_jax` is quick.
"""

from typing import TYPE_CHECKING

from fasterrcnn_jax import _lazy, _source_tree

_source_tree.install()

if TYPE_CHECKING:
    from fasterrcnn_jax.config import Config
    from fasterrcnn_jax.data.records import Prediction
    from fasterrcnn_jax.exported import load_exported
    from fasterrcnn_jax.inference.drawing import draw
    from fasterrcnn_jax.inference.exporting import save_exported
    from fasterrcnn_jax.inference.prediction import predict, preprocess
    from fasterrcnn_jax.models.detector import Detector
    from fasterrcnn_jax.models.faster_rcnn import detect
    from fasterrcnn_jax.ops import batched_nms, nms, pairwise_iou, roi_align, roi_pool, soft_nms
    from fasterrcnn_jax.programs import evaluate, train
    from fasterrcnn_jax.structures import Detections
    from fasterrcnn_jax.weights import save_weights
    from fasterrcnn_jax.zoo import create, list_models, load, load_weights, model_info

__all__ = [
    "Config",
    "Detections",
    "Detector",
    "Prediction",
    "batched_nms",
    "create",
    "detect",
    "draw",
    "evaluate",
    "list_models",
    "load",
    "load_exported",
    "load_weights",
    "model_info",
    "nms",
    "pairwise_iou",
    "predict",
    "preprocess",
    "roi_align",
    "roi_pool",
    "save_exported",
    "save_weights",
    "soft_nms",
    "train",
]
__version__ = "0.2.0"

_HOMES = {
    "Config": "fasterrcnn_jax.config",
    "Detections": "fasterrcnn_jax.structures",
    "Detector": "fasterrcnn_jax.models.detector",
    "Prediction": "fasterrcnn_jax.data.records",
    "batched_nms": "fasterrcnn_jax.ops",
    "create": "fasterrcnn_jax.zoo",
    "detect": "fasterrcnn_jax.models.faster_rcnn",
    "draw": "fasterrcnn_jax.inference.drawing",
    "evaluate": "fasterrcnn_jax.programs",
    "list_models": "fasterrcnn_jax.zoo",
    "load": "fasterrcnn_jax.zoo",
    "load_exported": "fasterrcnn_jax.exported",
    "load_weights": "fasterrcnn_jax.zoo",
    "model_info": "fasterrcnn_jax.zoo",
    "nms": "fasterrcnn_jax.ops",
    "pairwise_iou": "fasterrcnn_jax.ops",
    "predict": "fasterrcnn_jax.inference.prediction",
    "preprocess": "fasterrcnn_jax.inference.prediction",
    "roi_align": "fasterrcnn_jax.ops",
    "roi_pool": "fasterrcnn_jax.ops",
    "save_exported": "fasterrcnn_jax.inference.exporting",
    "save_weights": "fasterrcnn_jax.weights",
    "soft_nms": "fasterrcnn_jax.ops",
    "train": "fasterrcnn_jax.programs",
}
# Packages with public names of their own.
_PACKAGES = ("models", "ops")

__getattr__, __dir__ = _lazy.attach(__name__, _HOMES | {name: f"{__name__}.{name}" for name in _PACKAGES})
