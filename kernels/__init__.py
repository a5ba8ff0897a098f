"""Pallas kernels for NVIDIA GPUs (Mosaic), and what decides between them and plain JAX: README.md beside this file."""
