"""Convolution whose filters have a fast gradient on a CPU.

XLA computes the gradient of the filters as a convolution with filters as large as the map. On a CPU this takes up to
six times as long as the gradient of the input; docs/decisions/0017 has the measurements.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fasterrcnn_jax.kernels import choice

# Rows and columns of zeros: before and after.
Padding = tuple[tuple[int, int], tuple[int, int]]

# On smaller maps XLA's gradient is as fast.
FEWEST_CELLS = 2000
# Cells whose neighbourhoods are multiplied at once: 640 x 9 x 96 values are 2.2 MB and stay in the cache.
CELLS_AT_ONCE = 640


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c d"], *, stride: int, padding: Padding, dtype: DTypeLike
) -> Float[Array, "b h2 w2 d"]:
    """Returns the convolution in type `dtype`; sums are float32.

    On a CPU and on large maps the gradient of a filter of stride 1 is a sum of matrix products over blocks of rows,
    and filters of 1 x 1 are a matrix product. On other devices both are convolutions, into which the library of a GPU
    takes bias, residual and ReLU; gradients have the type of `x` where the result is wider.
    """
    if choice.device()[0] != "cpu":
        is_plain = x.dtype == dtype and kernel.shape[:2] != (1, 1)
        return (by_xla if is_plain else _by_products)(x, kernel, stride, padding, jnp.dtype(dtype))
    if kernel.shape[:2] == (1, 1):
        return _pointwise(x[:, ::stride, ::stride], kernel[0, 0], jnp.dtype(dtype))
    if stride == 1 and x.shape[1] * x.shape[2] >= FEWEST_CELLS:
        return _by_blocks(x, kernel, padding, jnp.dtype(dtype))
    return by_xla(x, kernel, stride, padding, dtype)


def by_xla(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c d"], stride: int, padding: Padding, dtype: DTypeLike
) -> Float[Array, "b h2 w2 d"]:
    """Returns the same as `convolve`, with the gradients of XLA."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _by_products(x: Array, kernel: Array, stride: int, padding: Padding, dtype: DTypeLike) -> Array:
    """Returns the convolution of a 1 x 1 filter, or float32 for bfloat16; the gradients have the type of `x`.

    By itself JAX would convert the inputs of the gradients to float32, and the library of a GPU the input of a
    convolution with a wider result; a product of matrices does not.
    """
    if kernel.shape[:2] == (1, 1) and x.dtype != dtype:
        return jnp.matmul(x[:, ::stride, ::stride], kernel[0, 0], preferred_element_type=dtype)
    return by_xla(x, kernel, stride, padding, dtype)


def _by_products_forward(
    x: Array, kernel: Array, stride: int, padding: Padding, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    return _by_products(x, kernel, stride, padding, dtype), (x, kernel)


def _by_products_backward(
    stride: int, padding: Padding, dtype: DTypeLike, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    def same(x: Array, kernel: Array) -> Array:
        if kernel.shape[:2] == (1, 1):
            # XLA of JAX 0.11.2 would take the stride into the matrix product for a GPU, and abort the process.
            taken = lax.optimization_barrier(x[:, ::stride, ::stride]) if stride > 1 else x
            return jnp.matmul(taken, kernel[0, 0], preferred_element_type=x.dtype)
        return by_xla(x, kernel, stride, padding, x.dtype)

    return jax.vjp(same, *kept)[1](gradient.astype(kept[0].dtype))


_by_products.defvjp(_by_products_forward, _by_products_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_blocks(x: Array, kernel: Array, padding: Padding, dtype: DTypeLike) -> Array:
    return by_xla(x, kernel, 1, padding, dtype)


def _forward(x: Array, kernel: Array, padding: Padding, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return _by_blocks(x, kernel, padding, dtype), (x, kernel)


def _backward(padding: Padding, dtype: DTypeLike, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    (of_x,) = jax.linear_transpose(lambda x: by_xla(x, kernel, 1, padding, dtype), x)(gradient)
    return of_x, gradient_by_blocks(x, gradient, padding, kernel.shape[0]).astype(kernel.dtype)


_by_blocks.defvjp(_forward, _backward)


def gradient_by_blocks(
    x: Float[Array, "b h w c"], gradient: Float[Array, "b h2 w2 d"], padding: Padding, size: int
) -> Float[Array, "k k c d"]:
    """Returns the gradient of the filters of stride 1 in float32, for the gradient of the result."""
    batch, height, width, outputs = gradient.shape
    channels = x.shape[3]
    rows = max(1, CELLS_AT_ONCE // width)
    blocks = -(-height // rows)
    # The last block is filled with rows whose gradient is zero.
    extra = blocks * rows - height
    padded = jnp.pad(x, ((0, 0), (padding[0][0], padding[0][1] + extra), padding[1], (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (0, extra), (0, 0), (0, 0)))

    def add(number: Array, total: Array) -> Array:
        image, row = number // blocks, number % blocks * rows
        near = lax.dynamic_slice(padded, (image, row, 0, 0), (1, rows + size - 1, *padded.shape[2:]))[0]
        here = lax.dynamic_slice(gradient, (image, row, 0, 0), (1, rows, width, outputs)).reshape(-1, outputs)
        # One row for each cell: its neighbourhood.
        near = [near[i : i + rows, j : j + width].reshape(-1, channels) for i in range(size) for j in range(size)]
        near = jnp.concatenate(near, axis=1).astype(jnp.float32)
        return total + lax.dot(here.T.astype(jnp.float32), near)

    total = jnp.zeros((outputs, size * size * channels), jnp.float32)
    total = lax.fori_loop(0, batch * blocks, add, total)
    return total.reshape(outputs, size, size, channels).transpose(1, 2, 3, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pointwise(x: Array, kernel: Array, dtype: DTypeLike) -> Array:
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _pointwise_forward(x: Array, kernel: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return _pointwise(x, kernel, dtype), (x, kernel)


def _pointwise_backward(dtype: DTypeLike, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    of_x = jnp.matmul(gradient, kernel.T.astype(gradient.dtype), preferred_element_type=x.dtype)
    # The sum is float32 for any type. XLA's matrix product on a CPU takes no bfloat16 for a float32 result.
    outputs = gradient.reshape(-1, gradient.shape[-1]).astype(jnp.float32)
    cells = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    # The product needs one of the maps transposed. Of the gradient and the input, XLA always takes the gradient.
    is_narrow = cells.shape[1] < outputs.shape[1]
    of_kernel = lax.dot(cells.T, outputs) if is_narrow else lax.dot(outputs.T, cells).T
    return of_x, of_kernel.astype(kernel.dtype)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)
