"""Faster R-CNN in JAX: train on your own boxes, detect in one XLA program."""

from fasterrcnn_jax.config import Config
from fasterrcnn_jax.drawing import draw
from fasterrcnn_jax.inference import Prediction, predict, preprocess
from fasterrcnn_jax.models.detector import Detector, detect
from fasterrcnn_jax.structures import Detections
from fasterrcnn_jax.weights import load_weights, save_weights
from fasterrcnn_jax.zoo import create, list_models, load, model_info

__all__ = [
    "Config",
    "Detections",
    "Detector",
    "Prediction",
    "create",
    "detect",
    "draw",
    "list_models",
    "load",
    "load_weights",
    "model_info",
    "predict",
    "preprocess",
    "save_weights",
]
__version__ = "0.1.0"
