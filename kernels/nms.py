"""Greedy non-maximum suppression for Mosaic GPU, in two designs.

Bit mask and sweep: many blocks write, one bit per pair, which boxes suppress each other; then one block per problem
reads the bits, a tile of boxes at a time. Kept list: one block per problem compares each tile of boxes with every box
kept so far and needs no workspace. Both designs visit the boxes in the given order and stop when enough are kept.

If k of n boxes are kept, the mask compares n^2 / 2 pairs, spread over the whole device, and the list compares
up to n * k / 2 pairs on one multiprocessor. So the mask is for few large problems, the list for many problems.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from fasterrcnn_jax.kernels import choice, mosaic
from fasterrcnn_jax.kernels.batching import fold_mapped_axes
from jax import lax

THREADS = 128
WORD = 32
# The number of boxes whose bits fill one word of every thread: the mask's columns come in chunks of this size.
CHUNK = WORD * THREADS
# Rows of the mask that one block computes each time it reads the columns, and rows that the sweep reads at once. Larger
# values hide more latency and take more registers.
MASK_ROWS, SWEPT_ROWS = 8, 16
# Boxes decided at a time. The sweep has one per thread, as the mask has columns. The list has four per thread, because
# independent comparisons hide each other's latency.
SWEEP_TILE, LIST_TILE = THREADS, 512
TILE_WORDS = SWEEP_TILE // WORD
# The sweep holds SWEPT_ROWS rows in registers, 8 words of each row per thread.
MOST_MASKED = 8 * CHUNK
MOST_MASK_BYTES = 1 << 28
# Each kept box takes five numbers, and a sixth with groups, in the shared memory of a block: 227 KiB on Hopper. The
# limits always count six.
MOST_LISTED = 9000
# Mosaic starts each array in shared memory at a multiple of this, and adds an array for its reductions.
SHARED_ALIGNMENT, SHARED_OF_REDUCTIONS = 1024, 2048
# An H200 has 132 multiprocessors, an H100 at most 132. With this many problems the list, too, uses the whole device.
MULTIPROCESSORS = 128

# Boxes from `with_area`: x1, y1, x2, y2 and area, along the first axis or one by one.
Box = jax.Array | list[jax.Array]


def design(problems: int, boxes: int, max_output: int) -> Literal["mask", "list"]:
    """Returns the faster design for these static sizes.

    All multiprocessors share the mask's p * n^2 / 2 pairs; the list's n * k / 2 pairs of a problem keep one
    multiprocessor about half busy. The mask is used while p * n <= 128 * k, n rounded up to whole chunks: a limit from
    when it compared twice as many pairs, kept until a GPU has timed both. It is used for 1 or 8 images of 12,000 boxes
    with 2,000 kept, and of the 8,768 boxes of five pyramid levels with 1,000 kept. The list is used for many problems
    (8 images x 90 classes of 1,000 boxes) and if few of many boxes are kept (100 of the 90,000 boxes of all classes,
    where a mask would take 1 GB per image).
    """
    n = boxes + -boxes % CHUNK
    fits = n <= MOST_MASKED and problems * n * n // 8 <= MOST_MASK_BYTES
    return "mask" if fits and problems * n <= MULTIPROCESSORS * max_output else "list"


def unsupported(boxes: int, max_output: int) -> str | None:
    """Returns why the kernels cannot take these static sizes here; None if they can, with any number of problems."""
    if min(boxes, max_output) > MOST_LISTED:
        return f"it keeps at most {MOST_LISTED} boxes and the call asks for up to {min(boxes, max_output)}"
    needed, available = shared_memory(min(boxes + -boxes % LIST_TILE, max_output)), choice.shared_memory()
    if needed > available:
        return (
            f"the list of up to {min(boxes, max_output)} kept boxes takes {needed // 1024} KiB of shared memory and a "
            f"block of this device has {available // 1024} KiB"
        )
    return None


def shared_memory(slots: int) -> int:
    """Returns the bytes of shared memory that the kept list with so many slots takes, including their groups."""
    size = 6 * 4 * slots
    return size + -size % SHARED_ALIGNMENT + SHARED_OF_REDUCTIONS


@functools.cache
def keep_first(threshold: np.float32, max_output: int) -> Callable:
    """Returns the launch (boxes [p n 4], groups [p n] or None, num_valid [p]) -> (positions [p k], count [p]).

    The boxes are float32 and sorted by descending score, valid ones first. The first `count` of the `k` positions
    are the ascending positions of the kept boxes; the others are not written. Boxes of different groups never
    suppress each other.
    """

    def launch(boxes: jax.Array, groups: jax.Array | None, num_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        problems, n, _ = boxes.shape
        masked = design(problems, n, max_output) == "mask"
        padding = -n % (CHUNK if masked else LIST_TILE)
        boxes = jnp.pad(boxes, ((0, 0), (0, padding), (0, 0)))
        # The groups are one more plane of the same array, so a thread needs no second address for them.
        padded = [] if groups is None else [jnp.pad(groups.astype(jnp.int32), ((0, 0), (0, padding)))]
        planes = with_area(boxes, *(lax.bitcast_convert_type(each, jnp.float32) for each in padded))
        if masked:
            diagonal = _diagonal(planes, num_valid, threshold)
            return _sweep(_mask(planes, num_valid, threshold), diagonal, num_valid, max_output)
        return _kept_list(planes, num_valid, threshold, max_output)

    return fold_mapped_axes(launch)


def with_area(boxes: jax.Array, *more: jax.Array) -> jax.Array:
    """Returns x1, y1, x2, y2 and area [5 ... n] of boxes [... n 4], and `more` values of each box behind them.

    A box becomes zeros, and so overlaps no box, unless its area is positive and finite.
    """
    x1, y1, x2, y2 = (boxes[..., k] for k in range(4))
    area = (x2 - x1) * (y2 - y1)
    overlaps = (area > 0.0) & (area < jnp.inf)
    # `margin` tells why there is a `where` between the area and the union.
    return jnp.stack([*(jnp.where(overlaps, plane, jnp.float32(0)) for plane in (x1, y1, x2, y2, area)), *more])


def suppresses(
    box: Box, group: jax.Array | None, other: Box, other_group: jax.Array | None, threshold: np.float32
) -> jax.Array:
    """Returns where float32 `intersection / union > threshold` and the groups are equal; None: all are equal.

    Args:
      box: x1, y1, x2, y2 and area, from `with_area`; `other` likewise.
    """
    return margin(box, group, other, other_group, threshold) < 0


def margin(
    box: Box, group: jax.Array | None, other: Box, other_group: jax.Array | None, threshold: np.float32
) -> jax.Array:
    """Returns a float32 that is negative where `suppresses` is True, and elsewhere has a sign bit of 0.

    It is NaN if the union is not finite, for corners about 1e19 apart; an NVIDIA GPU gives NaN a sign bit of 0, too.

    Every operation must be rounded separately. Compilers fuse a product and a sum into one operation that rounds only
    once; a `where` or a maximum between each area and the union prevents this.
    """
    x1, y1, x2, y2, area = box
    other_x1, other_y1, other_x2, other_y2, other_area = other
    width = jnp.maximum(jnp.minimum(x2, other_x2) - jnp.maximum(x1, other_x1), jnp.float32(0))
    if group is not None:
        width = jnp.where(group == other_group, width, jnp.float32(0))
    height = jnp.minimum(y2, other_y2) - jnp.maximum(y1, other_y1)
    # The maximum is taken of the product instead of the height: it is the one that prevents the fusion.
    intersection = jnp.maximum(width * height, jnp.float32(0))
    return ratio_margin(intersection, area + other_area - intersection, threshold)


def ratio_margin(numerator: jax.Array, denominator: jax.Array, threshold: np.float32) -> jax.Array:
    """Returns a number that is negative exactly where the rounded `numerator / denominator > threshold`, never -0.0.

    XLA and Mosaic divide on GPUs with an error of up to 2 ulp, so this does not divide. The correctly rounded quotient
    is larger than the threshold t if the exact quotient exceeds t + ulp / 2. That bound has 25 bits, so no quotient of
    two 24-bit numbers equals it, and (t + ulp / 2) * denominator - numerator < 0 decides if its sign is exact. It is:
    the bound is the sum of two signed numbers of 12 bits, the denominator of two of 12 bits, their four products are
    exact, and adding the products in this order does not round while the sign is undecided.

    The sign is exact for thresholds from 1e-3 and finite denominators from 1e-25, and for a numerator of 0. NaN gives
    NaN.
    """
    bound = np.float64(threshold) + (np.nextafter(threshold, np.float32(2)) - np.float64(threshold)) / 2
    mantissa, exponent = np.frexp(bound)
    bound_high = np.ldexp(np.round(mantissa * 2**12), exponent - 12)
    t_high, t_low = np.float32(bound_high), np.float32(bound - bound_high)
    bits = lax.bitcast_convert_type(denominator, jnp.int32) & jnp.int32(-4096)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    low = denominator - high
    return t_high * high - numerator + t_high * low + t_low * high + t_low * low


def _mask(planes: jax.Array, num_valid: jax.Array, threshold: np.float32) -> jax.Array:
    """Returns bits [p n w] for planes [5 or 6 p n] of boxes.

    A chunk of columns is 32 tiles of 128 boxes, and fills 128 words of a row. Bit j of the chunk's word t tells whether
    the row and box t of tile j suppress each other, so a block can leave out whole tiles: the bits of tiles up to the
    row's own one, and of tiles without a valid box, are zero. Chunks before the row's own and chunks without a valid
    box are not written.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    per_thread = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)

    def nms_mask(planes, num_valid, mask):
        problem, block, chunk = (lax.axis_index(name) for name in ("problem", "rows", "chunk"))
        first, count, begin = block * MASK_ROWS, num_valid[problem], chunk * CHUNK

        @pl.when((first < count) & (begin < count) & (first < begin + CHUNK))
        def _():
            rows = range(MASK_ROWS)
            boxes = [[planes[c, problem, first + i] for c in range(numbers)] for i in rows]

            def compare(step, found):
                # Each step shifts the bits found so far, so the last tile comes first.
                columns = pl.ds(pl.multiple_of(begin + (tiles - 1 - step) * THREADS, THREADS), THREADS)
                others = [planes[c, problem, columns] for c in range(numbers)]
                margins = [margin(*_pair(boxes[i], others), threshold) for i in rows]
                # The sign bit of the margin goes into the word in one instruction.
                signs = [lax.shift_right_logical(lax.bitcast_convert_type(each, jnp.int32), 31) for each in margins]
                return tuple(lax.shift_left(found[i], 1) | signs[i] for i in rows)

            none = plgpu.layout_cast(jnp.zeros(THREADS, jnp.int32), per_thread)
            # `_diagonal` covers the rows' own tile.
            after_own = lax.div(jnp.maximum(first - begin + THREADS, 0), jnp.int32(THREADS))
            tiles = jnp.minimum(lax.div(count - begin + (THREADS - 1), jnp.int32(THREADS)), WORD)
            found = lax.fori_loop(0, jnp.maximum(tiles - after_own, 0), compare, (none,) * MASK_ROWS)
            # The result of shifting an int32 by 32 is undefined; then no tile was compared.
            before = jnp.minimum(after_own, WORD - 1)
            words = pl.ds(pl.multiple_of(chunk * THREADS, THREADS), THREADS)
            for i in rows:
                mask[problem, first + i, words] = lax.shift_left(found[i], before)

    numbers, problems, n = planes.shape
    return mosaic.kernel(
        nms_mask,
        out_type=jax.ShapeDtypeStruct((problems, n, n // WORD), jnp.int32),
        grid=(problems, n // MASK_ROWS, n // CHUNK),
        grid_names=("problem", "rows", "chunk"),
    )(planes, num_valid)


def _diagonal(planes: jax.Array, num_valid: jax.Array, threshold: np.float32) -> jax.Array:
    """Returns the bits [p t 512] that decide each of t tiles, for planes [5 or 6 p n] of boxes.

    Bit j of word 128 c + i of a tile of 128 tells whether its boxes i and 32 c + j suppress each other.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    per_thread = plgpu.Layout.WG_STRIDED((SWEEP_TILE,), vec_size=1)

    def nms_diagonal(planes, num_valid, diagonal):
        problem, tile, word = (lax.axis_index(name) for name in ("problem", "tile", "word"))
        first = tile * SWEEP_TILE

        @pl.when(first < num_valid[problem])
        def _():
            rows = pl.ds(pl.multiple_of(first, SWEEP_TILE), SWEEP_TILE)
            boxes = [planes[c, problem, rows] for c in range(numbers)]

            def compare(j, found):
                column = first + word * WORD + j
                other = [planes[c, problem, column] for c in range(numbers)]
                hit = suppresses(*_pair(other, boxes), threshold)
                return found | jnp.where(hit, lax.shift_left(jnp.int32(1), j), jnp.int32(0))

            none = plgpu.layout_cast(jnp.zeros(SWEEP_TILE, jnp.int32), per_thread)
            place = pl.ds(pl.multiple_of(word * SWEEP_TILE, SWEEP_TILE), SWEEP_TILE)
            diagonal[problem, tile, place] = lax.fori_loop(0, WORD, compare, none)

    numbers, problems, n = planes.shape
    return mosaic.kernel(
        nms_diagonal,
        out_type=jax.ShapeDtypeStruct((problems, n // SWEEP_TILE, TILE_WORDS * SWEEP_TILE), jnp.int32),
        grid=(problems, n // SWEEP_TILE, TILE_WORDS),
        grid_names=("problem", "tile", "word"),
    )(planes, num_valid)


def _sweep(mask: jax.Array, diagonal: jax.Array, num_valid: jax.Array, max_output: int) -> tuple[jax.Array, jax.Array]:
    """Returns the result of `keep_first`: positions [p k] and count [p]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    per_thread = plgpu.Layout.WG_STRIDED((SWEEP_TILE,), vec_size=1)
    bits_layout = plgpu.Layout.WG_STRIDED((TILE_WORDS * SWEEP_TILE,), vec_size=TILE_WORDS)

    def nms_sweep(mask, diagonal, num_valid, positions, counts, removed, bits, kept):
        problem = lax.axis_index("problem")
        num_boxes = num_valid[problem]
        tiles, words = diagonal.shape[1], mask.shape[2]
        per_load = next(size for size in (4, 2, 1) if words % (size * THREADS) == 0)
        layout = plgpu.Layout.WG_STRIDED((words,), vec_size=per_load)
        removed[...] = plgpu.layout_cast(jnp.zeros(words, jnp.int32), layout)

        def dead_of(tile):
            """Returns the removed boxes of a tile as four words of 32 bits.

            In `removed`, each box of a tile has a word of its own, and the tile is the bit.
            """
            chunk, number = lax.div(tile, jnp.int32(WORD)), lax.rem(tile, jnp.int32(WORD))
            words = removed[pl.ds(pl.multiple_of(chunk * THREADS, THREADS), THREADS)]
            box = plgpu.broadcasted_iota(jnp.int32, (SWEEP_TILE,), 0, layout=per_thread)
            words = plgpu.layout_cast(words, per_thread)
            bit = lax.shift_left(lax.shift_right_logical(words, number) & 1, lax.rem(box, jnp.int32(WORD)))
            of_word = lax.div(box, jnp.int32(WORD))
            return [jnp.where(of_word == word, bit, 0).sum() for word in range(TILE_WORDS)]

        def unfinished(state):
            tile, count, _ = state
            return (tile * SWEEP_TILE < num_boxes) & (count < max_output)

        def decide_tile(state):
            tile, count, tile_bits = state
            first = tile * SWEEP_TILE
            bits[...] = tile_bits
            # The next tile's bits are read long before they are needed.
            next_bits = diagonal[problem, jnp.minimum(tile + 1, tiles - 1), :]
            dead = dead_of(tile)
            found = jnp.int32(0)
            for word in range(TILE_WORDS):
                real = jnp.clip(num_boxes - first - word * WORD, 0, WORD)
                # The result of shifting an int32 by 32 is undefined.
                some = lax.shift_left(jnp.int32(1), real) - jnp.int32(1)
                alive = ~dead[word] & jnp.where(real == 32, jnp.int32(-1), some)

                def any_alive(state):
                    alive, _, count, _ = state
                    return (alive != 0) & (count < max_output)

                def keep_next(state, word=word):
                    alive, later, count, found = state
                    lowest = alive & -alive
                    row = word * WORD + 31 - lax.clz(lowest)
                    kept[found] = first + row
                    positions[problem, count] = first + row
                    hit = [bits[SWEEP_TILE * c + row] for c in range(word, TILE_WORDS)]
                    later = tuple(d | h for d, h in zip(later, hit[1:], strict=True))
                    return alive & ~(lowest | hit[0]), later, count + 1, found + 1

                state = (alive, tuple(dead[word + 1 :]), count, found)
                _, dead[word + 1 :], count, found = lax.while_loop(any_alive, keep_next, state)

            def remove(step, gone):
                # After the last kept row, the last row is read again: it removes nothing new.
                rows = [kept[jnp.minimum(step * SWEPT_ROWS + i, found - 1)] for i in range(SWEPT_ROWS)]
                return functools.reduce(jnp.bitwise_or, [mask[problem, row, :] for row in rows], gone)

            steps = lax.div(found + (SWEPT_ROWS - 1), jnp.int32(SWEPT_ROWS))
            gone = plgpu.layout_cast(removed[...], layout)
            removed[...] = lax.fori_loop(jnp.int32(0), steps, remove, gone)
            return tile + 1, count, plgpu.layout_cast(next_bits, bits_layout)

        first_bits = plgpu.layout_cast(diagonal[problem, 0, :], bits_layout)
        start = (jnp.int32(0), jnp.int32(0), first_bits)
        _, counts[problem], _ = lax.while_loop(unfinished, decide_tile, start)

    problems, _, words = mask.shape
    return mosaic.kernel(
        nms_sweep,
        out_type=_outputs(problems, max_output),
        grid=(problems,),
        grid_names=("problem",),
        scratch_types=[
            plgpu.SMEM((words,), jnp.int32),
            plgpu.SMEM((TILE_WORDS * SWEEP_TILE,), jnp.int32),
            plgpu.SMEM((SWEEP_TILE,), jnp.int32),
        ],
    )(mask, diagonal, num_valid)


def _kept_list(
    planes: jax.Array, num_valid: jax.Array, threshold: np.float32, max_output: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the result of `keep_first`: positions [p k] and count [p]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WG_STRIDED((LIST_TILE,), vec_size=LIST_TILE // THREADS)

    def nms_kept_list(planes, num_valid, positions, counts, listed):
        problem = lax.axis_index("problem")
        num_boxes = num_valid[problem]

        def unfinished(state):
            tile, count = state
            return (tile * LIST_TILE < num_boxes) & (count < max_output)

        def decide_tile(state):
            tile, count = state
            first = tile * LIST_TILE
            columns = pl.ds(pl.multiple_of(first, LIST_TILE), LIST_TILE)
            boxes = [planes[c, problem, columns] for c in range(numbers)]
            offsets = plgpu.broadcasted_iota(jnp.int32, (LIST_TILE,), 0, layout=layout)
            # Alive boxes have numbers that fall from the first box of the tile on, dead boxes have 0: the maximum is
            # the next box to keep.
            alive = jnp.where(first + offsets < num_boxes, LIST_TILE - offsets, jnp.int32(0))

            def compare(step, alive):
                # Two comparisons at a time hide the latency of shared memory; a repeated last one removes nothing new.
                for k in (2 * step, jnp.minimum(2 * step + 1, count - 1)):
                    other = [listed[c, k] for c in range(numbers)]
                    hit = suppresses(*_pair(other, boxes), threshold)
                    alive = jnp.where(hit, jnp.int32(0), alive)
                return alive

            alive = lax.fori_loop(jnp.int32(0), lax.div(count + 1, jnp.int32(2)), compare, alive)

            def some_alive(state):
                _, best, count = state
                return (best > 0) & (count < max_output)

            def keep_next(state):
                alive, best, count = state
                position = first + LIST_TILE - best
                box = [planes[c, problem, position] for c in range(numbers)]
                for c in range(numbers):
                    listed[c, count] = box[c]
                positions[problem, count] = position
                hit = suppresses(*_pair(box, boxes), threshold)
                alive = jnp.where(hit | (alive == best), jnp.int32(0), alive)
                return alive, alive.max(), count + 1

            _, _, count = lax.while_loop(some_alive, keep_next, (alive, alive.max(), count))
            return tile + 1, count

        _, counts[problem] = lax.while_loop(unfinished, decide_tile, (jnp.int32(0), jnp.int32(0)))

    numbers, problems, n = planes.shape
    slots = min(n, max_output)
    return mosaic.kernel(
        nms_kept_list,
        out_type=_outputs(problems, max_output),
        grid=(problems,),
        grid_names=("problem",),
        scratch_types=[plgpu.SMEM((numbers, slots), jnp.float32)],
    )(planes, num_valid)


def _pair(box: list[jax.Array], others: list[jax.Array]) -> tuple[Box, jax.Array | None, Box, jax.Array | None]:
    """Returns the first four arguments of `margin`, from the planes of one box and of many boxes."""
    if len(others) == 5:
        return box, None, others, None
    # As numbers, the bits of a small group would be denormal, which a GPU may take for zero. Mosaic reinterprets
    # the bits of arrays only, not of scalars.
    group, other_groups = (
        lax.bitcast_convert_type(jnp.broadcast_to(planes[5], others[5].shape), jnp.int32) for planes in (box, others)
    )
    return box[:5], group, others[:5], other_groups


def _outputs(problems: int, max_output: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return (
        jax.ShapeDtypeStruct((problems, max_output), jnp.int32),
        jax.ShapeDtypeStruct((problems,), jnp.int32),
    )
