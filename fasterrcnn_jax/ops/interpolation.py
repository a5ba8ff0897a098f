"""The weights of a resize with antialiasing, on the host and inside programs."""

from typing import Any

from jaxtyping import Float, Int


def triangle_weights(
    numpy: Any, length: Any, size: Any, positions: Int[Any, "n"], slots: int
) -> Float[Any, "n {slots}"]:
    """Returns the weight of each source pixel in each output pixel; the weights of an output pixel have the sum 1.

    The triangle of bilinear interpolation is as wide as the step from one output pixel to the next, and never narrower
    than two source pixels: the filter of Pillow's `BILINEAR`, of torchvision's `antialias=True` and of
    `jax.image.resize`. Where an image becomes larger, this is bilinear interpolation.

    Args:
      numpy: `numpy`, or `jax.numpy` where `length` and `size` are traced.
      length: number of source pixels.
      size: number of output pixels that they become.
      positions: the output pixels.
      slots: at least `length`; the weights of source pixels from `length` on are zero.
    """
    step = numpy.float32(length) / numpy.float32(size)
    # Differences of pixel centres, in steps.
    centres = (positions.astype(numpy.float32) + numpy.float32(0.5)) * step
    pixels = numpy.arange(slots, dtype=numpy.float32)[None] + numpy.float32(0.5)
    distances = numpy.abs(pixels - centres[:, None]) / numpy.maximum(step, numpy.float32(1.0))
    weights = numpy.maximum(numpy.float32(1.0) - distances, numpy.float32(0.0))
    weights = numpy.where(pixels < numpy.float32(length), weights, numpy.float32(0.0))
    return weights / numpy.maximum(weights.sum(axis=1, keepdims=True), numpy.float32(1e-6))
