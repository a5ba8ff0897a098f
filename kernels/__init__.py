"""Pallas GPU kernels; each stands behind one function of the library. Depends on jax alone."""
