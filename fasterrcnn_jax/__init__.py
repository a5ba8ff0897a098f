"""Faster R-CNN in JAX: train on your own boxes, detect in one XLA program.

The names in `__all__` are public. Each is imported when it is first used, so `import fasterrcnn_jax` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fasterrcnn_jax import _source_tree

_source_tree.install()

if TYPE_CHECKING:
    from fasterrcnn_jax.config import Config
    from fasterrcnn_jax.data.records import Prediction
    from fasterrcnn_jax.inference.drawing import draw
    from fasterrcnn_jax.inference.prediction import predict, preprocess
    from fasterrcnn_jax.models.detector import Detector
    from fasterrcnn_jax.models.faster_rcnn import detect
    from fasterrcnn_jax.programs import evaluate, train
    from fasterrcnn_jax.structures import Detections
    from fasterrcnn_jax.weights import save_weights
    from fasterrcnn_jax.zoo import create, list_models, load, load_weights, model_info

__all__ = [
    "Config",
    "Detections",
    "Detector",
    "Prediction",
    "create",
    "detect",
    "draw",
    "evaluate",
    "list_models",
    "load",
    "load_weights",
    "model_info",
    "predict",
    "preprocess",
    "save_weights",
    "train",
]
__version__ = "0.2.0"

_HOMES = {
    "Config": "config",
    "Detections": "structures",
    "Detector": "models.detector",
    "Prediction": "data.records",
    "create": "zoo",
    "detect": "models.faster_rcnn",
    "draw": "inference.drawing",
    "evaluate": "programs",
    "list_models": "zoo",
    "load": "zoo",
    "load_weights": "zoo",
    "model_info": "zoo",
    "predict": "inference.prediction",
    "preprocess": "inference.prediction",
    "save_weights": "weights",
    "train": "programs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
