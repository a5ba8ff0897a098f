"""The cells around cells of a pyramid: values, borders and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fasterrcnn_jax.kernels import choice

from fasterrcnn_jax.ops import neighbourhoods
from fasterrcnn_jax.ops.neighbourhoods import cells_around

SIDES, CHANNELS = ((5, 7), (3, 4), (1, 2)), 3


def pyramid(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((2, *sides, CHANNELS), np.float32)) for sides in SIDES)


def some_cells(seed=1):
    """Corners and borders of every level, and cells that occur several times."""
    count = sum(height * width for height, width in SIDES)
    drawn = np.random.default_rng(seed).integers(0, count, (2, 40)).astype(np.int32)
    drawn[:, :8] = (0, 6, 34, 35, 46, 47, 48, 0)
    return jnp.asarray(drawn)


def expected(levels, cells, radius):
    """Returns the windows of the padded maps, and which of their cells are on the map."""
    side = 2 * radius + 1
    values, inside = [], []
    for image, of_image in enumerate(np.asarray(cells)):
        for cell in of_image:
            level, row, column = place(levels, cell)
            ones = np.ones((*level.shape[1:3], 1), bool)
            for maps, found in ((level[image], values), (ones, inside)):
                padded = np.pad(maps, ((radius, radius), (radius, radius), (0, 0)))
                found.append(padded[row : row + side, column : column + side])
    shape = *cells.shape, side, side
    return np.reshape(values, (*shape, CHANNELS)), np.reshape(inside, shape)


def place(levels, cell):
    """Returns the level, row and column of a cell."""
    for level in levels:
        height, width = level.shape[1:3]
        if cell < height * width:
            return level, *divmod(int(cell), width)
        cell -= height * width
    raise AssertionError(cell)


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_cells_around_are_a_window_of_the_padded_map(radius):
    levels, cells = pyramid(), some_cells()
    for found, wanted in zip(cells_around(levels, cells, radius=radius), expected(levels, cells, radius), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("device", [("cpu", None), ("cuda", choice.HOPPER)])
@pytest.mark.parametrize("radius", [1, 2])
def test_the_gradient_is_the_sum_over_all_windows_with_a_cell(monkeypatch, radius, device):
    monkeypatch.setattr(choice, "device", lambda: device)
    levels, cells = pyramid(), some_cells()
    values, pull = jax.vjp(lambda levels: cells_around(levels, cells, radius=radius)[0], levels)
    cotangent = np.random.default_rng(2).standard_normal(values.shape, np.float32)
    found = pull(jnp.asarray(cotangent))[0]
    # The transposed window: every value goes back to the cell that it came from.
    wanted = jax.grad(lambda levels: sum(window_sum(levels, cells, cotangent, image, radius) for image in (0, 1)))(
        levels
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def window_sum(levels, cells, cotangent, image, radius):
    """Returns the product of the windows of one image and a cotangent, by slices that JAX differentiates itself."""
    side, total = 2 * radius + 1, 0.0
    for cell, weights in zip(np.asarray(cells)[image], cotangent[image], strict=True):
        level, row, column = place(levels, cell)
        padded = jnp.pad(level[image], ((radius, radius), (radius, radius), (0, 0)))
        total += (padded[row : row + side, column : column + side] * weights).sum()
    return total


def test_on_a_gpu_no_two_additions_at_once_have_the_same_index():
    """Atomic additions to one address end in any order, and two runs would have other bits."""
    cells = np.repeat(np.int32([8, 8, 9, 15, 0, 34]), 3)
    indices = cells[:, None] + np.int32([-1, 0, 1])[None]
    given = [jnp.asarray(x) for x in (indices, (indices >= 0) & (indices < 35), cells)]
    for at_once in np.asarray(neighbourhoods.indices_at_once(35, *given)):
        assert len(np.unique(at_once)) == len(at_once)
    values = jnp.asarray(np.random.default_rng(3).standard_normal((18, 3, 2), np.float32))
    program = jax.make_jaxpr(lambda values: neighbourhoods.added_without_collisions(35, *given, values))(values)
    scatters = [equation for equation in program.eqns if equation.primitive.name.startswith("scatter")]
    assert len(scatters) == 3 and all(equation.params["unique_indices"] for equation in scatters)
    wanted = np.zeros((35, 2), np.float32)
    for cell, of_cell in zip(cells, values, strict=True):
        for k, value in zip((-1, 0, 1), of_cell, strict=True):
            if 0 <= cell + k < 35:
                wanted[cell + k] += value
    np.testing.assert_allclose(neighbourhoods.added_without_collisions(35, *given, values), wanted, atol=1e-5)


@pytest.mark.parametrize("device", [("cpu", None), ("cuda", choice.HOPPER)])
def test_many_gradients_of_a_cell_are_added_in_float32(monkeypatch, device):
    """In bfloat16 a sum of ones would stop growing at 256."""
    monkeypatch.setattr(choice, "device", lambda: device)
    cells = jnp.full((1, 600), 9, jnp.int32)
    levels = (jnp.ones((1, 5, 7, 2), jnp.bfloat16),)
    values, pull = jax.vjp(lambda levels: cells_around(levels, cells, radius=0)[0], levels)
    ((gradient,),) = pull(jnp.ones_like(values))
    assert gradient.dtype == jnp.bfloat16 and gradient[0, 1, 2].tolist() == [600.0, 600.0]
