"""RoIAlign for a CPU: few regions at a time, level by level.

The maps of a pyramid are not joined: to join those of a large image takes a CPU about as long as to take the cells of
512 regions. The sums of a block of regions stay in the cache of the core. With adaptive sampling, a block takes as
many samples per bin as its largest region needs.

Shapes: n images (all mapped axes folded into one), r regions, s bins along a side, c channels, b regions in a block.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from fasterrcnn_jax.kernels.roi_align import SampleGrid
from fasterrcnn_jax.ops.bilinear_samples import over_samples

# Bytes of the float32 features of a block, so that they fit into the cache of a core. A larger region is a block alone.
BLOCK_BYTES = 2**18


def forward(
    features: tuple[Float[Array, "n _ _ c"], ...], grid: SampleGrid, *, sampling_ratio: int
) -> Float[Array, "n r s s c"]:
    """Returns the features of the regions, in the type of `features`.

    Args:
      sampling_ratio: the number of samples per bin and axis if it is the same for all regions; otherwise 0.
    """
    problems, regions, _, bins = grid.bin_start.shape
    channels, dtype = features[0].shape[3], features[0].dtype
    cells = [level.reshape(-1, channels) for level in features]
    maps = [(level.shape[1], level.shape[2]) for level in features]

    def pool(block: Block, pooled: Array) -> Array:
        def add(corners: list[tuple[Array, Array]], total: Array) -> Array:
            for index, weight in corners:
                total += weight[..., None] * cells[block.level][block.first_cell + index].astype(jnp.float32)
            return total

        total = jnp.zeros((1, block.places.shape[0], bins, bins, channels))
        # Each level has a loop of its own, so only few samples are unrolled.
        unroll = 0 < sampling_ratio <= 2
        total = over_samples(block.grid, [maps[block.level]], sampling_ratio, add, total, unroll=unroll)
        return pooled.at[block.places].set(total[0].astype(dtype), mode="drop")

    pooled = jnp.zeros((problems * regions, bins, bins, channels), dtype)
    return _over_blocks(grid, maps, channels, pool, pooled).reshape(problems, regions, bins, bins, channels)


def backward(
    cotangent: Float[Array, "n r s s c"],
    grid: SampleGrid,
    *,
    maps: tuple[tuple[int, int], ...],
    sampling_ratio: int,
) -> tuple[Float[Array, "n _ _ c"], ...]:
    """Returns the gradients of the features of every level, in the type of `cotangent`.

    Args:
      maps: height and width of every level.
      sampling_ratio: as in `forward`.
    """
    problems, _, bins, _, channels = cotangent.shape
    rows = cotangent.reshape(-1, bins, bins, channels)

    def add_block(block: Block, gradients: tuple[Array, ...]) -> tuple[Array, ...]:
        of_block = rows.at[block.places].get(mode="fill", fill_value=0)[None].astype(jnp.float32)

        def add(corners: list[tuple[Array, Array]], gradient: Array) -> Array:
            for index, weight in corners:
                gradient = gradient.at[block.first_cell + index].add(weight[..., None] * of_block)
            return gradient

        before, gradient, after = gradients[: block.level], gradients[block.level], gradients[block.level + 1 :]
        gradient = over_samples(block.grid, [maps[block.level]], sampling_ratio, add, gradient)
        return *before, gradient, *after

    gradients = tuple(jnp.zeros((problems * height * width, channels)) for height, width in maps)
    gradients = _over_blocks(grid, maps, channels, add_block, gradients)
    return tuple(
        gradient.astype(cotangent.dtype).reshape(problems, *cells, channels)
        for gradient, cells in zip(gradients, maps, strict=True)
    )


class Block(NamedTuple):
    """Some regions of one image and level. Regions and cells are numbered over all images in sequence."""

    level: int
    places: Int[Array, "b"]  # numbers of the regions; an unused slot has the number of all regions, which is no region
    grid: SampleGrid  # of one image, with one level
    first_cell: Int[Array, ""]  # number of the image's first cell in this level


def _over_blocks(
    grid: SampleGrid,
    maps: Sequence[tuple[int, int]],
    channels: int,
    visit: Callable[[Block, PyTree], PyTree],
    total: PyTree,
) -> PyTree:
    """Returns `total` after `visit` was called for each block of regions, level by level."""
    problems, regions, _, bins = grid.bin_start.shape
    if regions == 0:
        return total
    count = problems * regions
    size = max(BLOCK_BYTES // (4 * bins**2 * channels), 1)
    if isinstance(regions, int):  # and no symbol of an exported program
        size = min(size, regions)
    image = lax.broadcasted_iota(jnp.int32, (problems, regions), 0).reshape(count)
    level = grid.level.reshape(count)
    # By level, then by image. The slice of a block can also have regions of the next image or level, and padding.
    order = jnp.pad(jnp.argsort(level, stable=True).astype(jnp.int32), (0, size))
    first = jnp.int32(0)
    for number, (height, width) in enumerate(maps):
        end = (level <= number).sum(dtype=jnp.int32)

        def step(state: tuple[Array, PyTree], number=number, cells=height * width, end=end) -> tuple[Array, PyTree]:
            start, total = state
            places = lax.dynamic_slice_in_dim(order, start, size)
            part = SampleGrid(*(x.reshape(count, *x.shape[2:])[places][None] for x in grid))
            # No block has two images: the order in which an image's gradient is summed depends on no other image.
            of_block = (start + jnp.arange(size) < end) & (image[places] == image[places[0]])
            # The other slots take no samples, so that they do not decide how many an adaptive block takes.
            samples = jnp.where(of_block[None, :, None], part.samples, 0.0)
            part = part._replace(level=jnp.zeros_like(part.level), samples=samples)
            block = Block(number, jnp.where(of_block, places, count), part, image[places[0]] * cells)
            return start + of_block.sum(dtype=jnp.int32), visit(block, total)

        _, total = lax.while_loop(lambda state, end=end: state[0] < end, step, (first, total))
        first = end
    return total
