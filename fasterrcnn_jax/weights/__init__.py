"""Reads weights of other programs without running code in their files, and writes our weights for them."""

from fasterrcnn_jax.weights.load import load_weights, save_weights

__all__ = ["load_weights", "save_weights"]
