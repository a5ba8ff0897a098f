"""Resizes and normalises an image inside a program, with the formulas of `data.transforms`, which runs on the host.

The true size of the image may be traced: a program of fixed shapes then takes images of any size.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from fasterrcnn_jax.config import ImageConfig


def resized_onto_canvas(
    pixels: UInt8[Array, "h w 3"] | Float[Array, "h w 3"],
    size: Int[Array, "2"],
    config: ImageConfig,
    canvas: tuple[int, int],
    *,
    rounded: bool = False,
) -> tuple[Float[Array, "H W 3"] | UInt8[Array, "H W 3"], Float[Array, "2"], Float[Array, "2"]]:
    """Returns the canvas with the resized image and zeros elsewhere, the image's size on it, and the scale.

    The resize is bilinear with half-pixel centres and without antialiasing; it is differentiable with respect to
    `pixels`. A float32 canvas holds normalised values. A uint8 canvas holds rounded values, which have no gradient.

    Args:
      pixels: RGB, values in 0..255; the image is in the upper left corner, and the rest is never read.
      size: (height, width) of the image in `pixels`. An image of size zero gives an empty canvas, size zero and scale
        one, as the loader makes them to fill a batch.
      canvas: (height, width) of the canvas. An image that would not fit on it is resized to the largest size that
        does.
      rounded: round the values of a float32 canvas before it is normalised; the gradient passes as without rounding.
    Returns:
      The canvas; (height, width) in network pixels; and (y, x) network pixels per original pixel.
    Raises:
      ValueError: a side of `pixels` is so long that its products with sides of the canvas do not fit into 32 bits.
    """
    height, width = pixels.shape[:2]
    longest = (2**31 - 1) // max(config.short_side, config.long_side, *canvas)
    if max(height, width) > longest:
        raise ValueError(f"an image can have at most {longest} pixels per side, got {height} x {width}")
    is_empty = jnp.any(size < 1)
    image_hw = jnp.clip(size, 1, np.array((height, width), size.dtype))
    network_hw = traced_network_size(image_hw, config, canvas)
    top, bottom, down = _samples(image_hw[0], network_hw[0], canvas[0])
    left, right, across = _samples(image_hw[1], network_hw[1], canvas[1])
    rows = _blend(_floats(_taken(pixels, top, 0)), _floats(_taken(pixels, bottom, 0)), down[:, None, None])
    values = _blend(_taken(rows, left, 1), _taken(rows, right, 1), across[None, :, None])
    if config.channel_order == "bgr":
        values = values[..., ::-1]
    shown = _within(network_hw[0], canvas[0])[:, None] & _within(network_hw[1], canvas[1])[None, :] & ~is_empty
    if config.pixel_dtype == "uint8":
        drawn = jnp.rint(values).astype(jnp.uint8)
    else:
        if rounded:
            values += lax.stop_gradient(jnp.rint(values) - values)
        mean, std = (np.asarray(given, np.float32)[None, None] for given in (config.mean, config.std))
        drawn = (values - mean) / std
    drawn = jnp.where(shown[..., None], drawn, jnp.zeros_like(drawn))
    shown_hw = network_hw.astype(jnp.float32)
    scale = jnp.where(is_empty, 1.0, shown_hw / image_hw.astype(jnp.float32))
    return drawn, jnp.where(is_empty, 0.0, shown_hw), scale


def traced_network_size(
    image_hw: Int[Array, "2"], config: ImageConfig, canvas: tuple[int, int] | None = None
) -> Int[Array, "2"]:
    """Returns (height, width) after the resize, as `data.transforms.network_size` does, in exact whole numbers.

    Args:
      canvas: (height, width); a size that does not fit becomes the largest one that does, rounded down; None: any size.
    """
    short, long = image_hw.min(), image_hw.max()
    by_short = config.short_side * long <= config.long_side * short
    side, of = jnp.where(by_short, config.short_side, config.long_side), jnp.where(by_short, short, long)
    sides = jnp.maximum(_quotient(image_hw * side, of, nearest=config.size_rounding == "nearest"), 1)
    if canvas is None:
        return sides
    height, width = canvas
    by_height = height * image_hw[1] <= width * image_hw[0]
    side, of = jnp.where(by_height, height, width), jnp.where(by_height, image_hw[0], image_hw[1])
    fitting = jnp.maximum(_quotient(image_hw * side, of, nearest=False), 1)
    return jnp.where(jnp.all(sides <= np.array(canvas, np.int32)), sides, fitting)


def _quotient(dividend: Int[Array, "2"], divisor: Int[Array, ""], *, nearest: bool) -> Int[Array, "2"]:
    """Returns the quotient rounded down, or to the nearest whole number and halves to the even one, as `round` does."""
    whole, rest = dividend // divisor, dividend % divisor
    if not nearest:
        return whole
    up = (2 * rest > divisor) | ((2 * rest == divisor) & (whole % 2 == 1))
    return jnp.where(up, whole + 1, whole)


def _samples(
    length: Int[Array, ""], size: Int[Array, ""], count: int
) -> tuple[Int[Array, "n"], Int[Array, "n"], Float[Array, "n"]]:
    """Returns, for `count` output pixels, both source pixels and the weight of the second.

    Pixels from `size` on repeat the last source pixel.
    """
    last = length.astype(jnp.float32) - 1.0
    step = length.astype(jnp.float32) / size.astype(jnp.float32)
    points = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * step - 0.5
    points = jnp.clip(points, 0.0, last)
    low = points.astype(jnp.int32)
    return low, jnp.minimum(low + 1, length - 1), points - low.astype(jnp.float32)


def _taken(values: Shaped[Array, "..."], indices: Int[Array, "n"], axis: int) -> Shaped[Array, "..."]:
    # Every index is in the array. JAX's default would look for indices that are not.
    return jnp.take(values, indices, axis=axis, mode="clip")


def _floats(values: Shaped[Array, "..."]) -> Float[Array, "..."]:
    return values.astype(jnp.float32)


def _blend(
    first: Float[Array, "h w 3"], second: Float[Array, "h w 3"], weight: Float[Array, "_ _ 1"]
) -> Float[Array, "h w 3"]:
    return first * (1.0 - weight) + second * weight


def _within(size: Int[Array, ""], count: int) -> Bool[Array, "n"]:
    return lax.iota(jnp.int32, count) < size
