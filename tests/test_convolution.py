"""The convolution with a fast gradient on a CPU equals XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fasterrcnn_jax.kernels import choice

from fasterrcnn_jax.ops.convolution import FEWEST_CELLS, by_xla, convolve

HALF = (1, 1), (1, 1)


def drawn(shape, dtype, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def with_gradients(function, x, kernel, padding):
    y, pull = jax.vjp(lambda x, kernel: function(x, kernel, stride=1, padding=padding, dtype=x.dtype), x, kernel)
    return y, *pull(drawn(y.shape, y.dtype, 2))


@pytest.mark.parametrize(
    ("shape", "size", "padding"),
    [
        ((2, 40, 50, 3), 3, HALF),
        ((1, 41, 53, 4), 3, HALF),  # the last block of rows is not full
        ((1, 3, 700, 2), 3, HALF),  # a row is longer than a block
        ((1, 50, 41, 2), 5, ((2, 2), (2, 2))),
        ((1, 48, 48, 2), 3, ((0, 1), (2, 0))),  # uneven
    ],
)
def test_the_convolution_and_its_gradients_are_those_of_xla(shape, size, padding):
    assert shape[1] * shape[2] >= FEWEST_CELLS
    x, kernel = drawn(shape, jnp.float32, 0), drawn((size, size, shape[3], 5), jnp.float32, 1)
    ours = jax.jit(lambda x, kernel: with_gradients(convolve, x, kernel, padding))(x, kernel)
    theirs = with_gradients(by_xla, x, kernel, padding)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == expected.dtype
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(3, 5), (5, 3)])
@pytest.mark.parametrize(("of_x", "of_y"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_a_1_x_1_convolution_and_its_gradients_are_those_of_xla(stride, channels, of_x, of_y):
    x, kernel = drawn((2, 6, 7, channels[0]), of_x, 0), drawn((1, 1, *channels), of_x, 1)

    def of(function):
        def run(x, kernel):
            return function(x, kernel, stride=stride, padding=((0, 0), (0, 0)), dtype=of_y)

        y, pull = jax.vjp(run, x, kernel)
        return y, *pull(drawn(y.shape, y.dtype, 2))

    for mine, expected in zip(of(convolve), of(by_xla), strict=True):
        assert mine.dtype == expected.dtype
        tolerance = 1e-5 if mine.dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
        )


def test_the_gradient_of_1_x_1_filters_transposes_the_map_with_fewer_channels():
    def transposed(inputs, outputs):
        x, kernel = drawn((1, 6, 7, inputs), jnp.float32, 0), drawn((1, 1, inputs, outputs), jnp.float32, 1)

        def loss(kernel):
            return (convolve(x, kernel, stride=1, padding=((0, 0), (0, 0)), dtype=x.dtype) ** 2).sum()

        products = [e for e in jax.make_jaxpr(jax.grad(loss))(kernel).eqns if e.primitive.name == "dot_general"]
        return products[-1].invars[0].aval.shape

    assert transposed(3, 5) == (3, 42)
    assert transposed(5, 3) == (3, 42)


def test_the_gradient_of_bfloat16_filters_is_summed_in_float32():
    x = jnp.ones((1, 50, 50, 1), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 1, 1), jnp.bfloat16)
    ones = jnp.ones_like(x)
    pull = jax.vjp(lambda kernel: convolve(x, kernel, stride=1, padding=HALF, dtype=x.dtype), kernel)[1]
    # bfloat16 cannot count beyond 256.
    assert pull(ones)[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(pull(ones)[0][1, 1], jnp.bfloat16(2500))


def test_no_filter_is_as_large_as_a_large_map_on_a_cpu():
    """XLA's gradient of the filters is a convolution whose window is the map; it is slow on a CPU."""
    x, kernel = drawn((1, 50, 60, 2), jnp.float32, 0), drawn((3, 3, 2, 2), jnp.float32, 1)

    def has_a_window_like_the_map(function):
        gradient = jax.grad(lambda kernel: function(x, kernel, stride=1, padding=HALF, dtype=x.dtype).sum())
        return "size=50x60" in jax.jit(gradient).lower(kernel).as_text("hlo")

    assert has_a_window_like_the_map(by_xla)
    assert not has_a_window_like_the_map(convolve)


def test_the_gradient_maps_over_more_axes():
    x, kernel = drawn((3, 1, 45, 50, 2), jnp.float32, 0), drawn((3, 3, 2, 2), jnp.float32, 1)

    def of(function):
        def loss(kernel, x):
            return (function(x, kernel, stride=1, padding=HALF, dtype=x.dtype) ** 2).sum()

        return jax.vmap(jax.grad(loss), in_axes=(None, 0))(kernel, x)

    np.testing.assert_allclose(of(convolve), of(by_xla), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("size, padding", [(1, ((0, 0), (0, 0))), (3, HALF)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("of_x", "of_y"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_the_convolution_for_a_gpu_and_its_gradients_are_those_of_xla(size, padding, stride, of_x, of_y):
    x, kernel = drawn((2, 7, 6, 3), of_x, 0), drawn((size, size, 3, 5), of_x, 1)

    def of(function, x, kernel, dtype):
        def run(x, kernel):
            return function(x, kernel, stride=stride, padding=padding, dtype=dtype)

        y, pull = jax.vjp(run, x, kernel)
        return y, *pull(drawn(y.shape, y.dtype, 2))

    with tiny.layers_of_a_gpu():
        ours = of(convolve, x, kernel, of_y)
        program = str(jax.make_jaxpr(lambda x, kernel: of(convolve, x, kernel, of_y))(x, kernel))
    exact = of(by_xla, x.astype("float32"), kernel.astype("float32"), "float32")
    for mine, expected, dtype in zip(ours, exact, (of_y, of_x, of_x), strict=True):
        assert mine.dtype == dtype
        tolerance = 1e-5 if of_x == "float32" else 2e-2
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), expected, rtol=tolerance, atol=tolerance * float(jnp.abs(expected).max())
        )
    # A map in float32 would be one that was converted.
    assert of_x == "float32" or "f32[2,7,6,3]" not in program


def test_on_a_gpu_a_stride_stays_out_of_the_matrix_products_of_a_gradient(monkeypatch):
    """XLA of JAX 0.11.2 aborts the process where it takes the stride into the product (`pytest -m aot` compiles it)."""
    monkeypatch.setattr(choice, "device", lambda: ("cuda", choice.HOPPER))
    x, kernel = jnp.ones((1, 8, 6, 4), jnp.bfloat16), jnp.ones((1, 1, 4, 5), jnp.bfloat16)

    def gradient(stride):
        def of(x, kernel):
            options = dict(stride=stride, padding=((0, 0), (0, 0)), dtype=jnp.bfloat16)
            return convolve(x, kernel, **options).astype(jnp.float32).sum()

        return str(jax.make_jaxpr(jax.grad(of, argnums=(0, 1)))(x, kernel))

    assert "optimization_barrier" in gradient(2) and "optimization_barrier" not in gradient(1)
