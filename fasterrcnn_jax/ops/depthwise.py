"""Depthwise convolution: each channel has a filter of its own. Howard et al. 2017 (arXiv:1704.04861), section 3.1.

On a CPU, sums of shifted products are many times as fast as XLA's grouped convolution; docs/decisions/0015 has the
measurements.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fasterrcnn_jax.kernels import choice


def same_padding(side: int, size: int, stride: int) -> tuple[int, int]:
    """Returns the zeros before and after a side, in TensorFlow's SAME padding: `ceil(side / stride)` results.

    An odd number of zeros puts the additional one after the side.
    """
    total = max((-(-side // stride) - 1) * stride + size - side, 0)
    return total // 2, total - total // 2


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], *, stride: int
) -> Float[Array, "b h2 w2 c"]:
    """Returns the depthwise convolution in the type of `x` with SAME padding; sums are float32.

    The implementation depends on JAX's default device while tracing: shifted products on a CPU, else XLA's grouped
    convolution.
    """
    if choice.device()[0] == "cpu":
        return shifted(x, kernel, stride=stride)
    return grouped(x, kernel, stride=stride)


def grouped(x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], *, stride: int) -> Float[Array, "b h2 w2 c"]:
    """Returns the same as `depthwise_conv`, by XLA's grouped convolution."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        preferred_element_type=x.dtype,
    )


def shifted(x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], *, stride: int) -> Float[Array, "b h2 w2 c"]:
    """Returns the same as `depthwise_conv`, by sums of shifted products."""
    return _shifted(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], stride: int) -> Float[Array, "b h2 w2 c"]:
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    cells = -(-height // stride), -(-width // stride)
    padded = _padded(x, size, stride)
    return _products(padded, kernel.astype(x.dtype), cells, stride).astype(x.dtype)


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shifted(x, kernel, stride), (x, kernel)


def _backward(stride: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    size, sides = kernel.shape[0], (x.shape[1], x.shape[2])
    # Of the input: the mirrored filter on the gradient, which has stride - 1 zeros between its cells.
    borders = []
    for side, cells in zip(sides, gradient.shape[1:3], strict=True):
        before = size - 1 - same_padding(side, size, stride)[0]
        borders.append((before, side + size - 1 - before - ((cells - 1) * stride + 1), stride - 1))
    spread = lax.pad(gradient, jnp.zeros((), gradient.dtype), ((0, 0, 0), *borders, (0, 0, 0)))
    mirrored = kernel[::-1, ::-1].astype(x.dtype)
    # Without the barrier XLA computes the sum inside the transposition for the next matrix product, which takes longer
    # on a CPU. A loop over the images also avoids this, but fills its result with zeros first (docs/decisions/0015).
    of_x = lax.optimization_barrier(_products(spread, mirrored, sides, 1))
    return of_x.astype(x.dtype), _of_kernel(x, gradient, size, stride).astype(kernel.dtype)


def _of_kernel(x: Array, gradient: Array, size: int, stride: int) -> Array:
    """Returns the gradient of the filters [k, k, 1, C] in float32.

    The sum runs over rows, one after the other, in one array [columns, C] for each place of the filter: XLA's sums over
    whole maps take 5 to 13 times as long on a CPU, and one array for all places is copied in every row.
    """
    padded = _padded(x, size, stride)
    _, rows, columns, channels = gradient.shape

    def add(number: Array, totals: list[Array]) -> list[Array]:
        image, row = number // rows, number % rows
        near = lax.dynamic_slice(padded, (image, row * stride, 0, 0), (1, size, *padded.shape[2:]))
        here = lax.dynamic_slice(gradient, (image, row, 0, 0), (1, 1, columns, channels)).astype(jnp.float32)
        parts = _shifts(near, size, (1, columns), stride)
        return [total + (part.astype(jnp.float32) * here)[0, 0] for total, part in zip(totals, parts, strict=True)]

    start = [jnp.zeros((columns, channels), jnp.float32)] * size**2
    totals = lax.fori_loop(0, len(gradient) * rows, add, start)
    return jnp.stack([total.sum(axis=0) for total in totals]).reshape(size, size, 1, channels)


_shifted.defvjp(_forward, _backward)


def _padded(x: Array, size: int, stride: int) -> Array:
    return jnp.pad(x, ((0, 0), *(same_padding(side, size, stride) for side in x.shape[1:3]), (0, 0)))


def _shifts(padded: Array, size: int, cells: tuple[int, int], stride: int) -> list[Array]:
    """Returns, for each place of the filter, the values [B, *cells, C] that it meets."""
    batch, _, _, channels = padded.shape
    spans = [(count - 1) * stride + 1 for count in cells]
    return [
        lax.slice(padded, (0, i, j, 0), (batch, i + spans[0], j + spans[1], channels), (1, stride, stride, 1))
        for i in range(size)
        for j in range(size)
    ]


def _products(padded: Array, kernel: Array, cells: tuple[int, int], stride: int) -> Array:
    """Returns the sum over the places of the filter in float32."""
    size, _, _, channels = kernel.shape
    weights = kernel.reshape(size * size, 1, 1, 1, channels).astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for weight, part in zip(weights, _shifts(padded, size, cells, stride), strict=True):
        total = total + weight * part.astype(jnp.float32)
    return total
