"""Pallas kernels for NVIDIA GPUs (Mosaic) and the choice between them and plain JAX; see README.md in this folder."""
