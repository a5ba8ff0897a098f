"""Faster R-CNN in JAX: train on your own boxes, detect in one XLA program."""

from fasterrcnn_jax.checkpoint import load
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.drawing import draw
from fasterrcnn_jax.inference import Prediction, predict, preprocess
from fasterrcnn_jax.models.detector import Detector, create, detect
from fasterrcnn_jax.structures import Detections

__all__ = [
    "Config",
    "Detections",
    "Detector",
    "Prediction",
    "create",
    "detect",
    "draw",
    "load",
    "predict",
    "preprocess",
]
__version__ = "0.1.0"
