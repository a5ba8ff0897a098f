"""Weights of other programs, read without running any code in their files, and ours written for them."""

from fasterrcnn_jax.weights.load import load_weights, save_weights

__all__ = ["load_weights", "save_weights"]
