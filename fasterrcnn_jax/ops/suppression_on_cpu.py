"""Greedy non-maximum suppression in plain JAX for CPUs: it compares few pairs and never sorts all boxes.

The result is that of other devices; only the work differs. Candidates are taken a chunk at a time, best first, while
some are left and fewer boxes are kept than asked for. A chunk is compared with the boxes kept so far, a slice of them
at a time, and what a slice suppresses is dropped before the next slice. The rest is decided in blocks, and what a block
suppresses in the rest of the chunk is dropped before the next block is decided.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fasterrcnn_jax.kernels import nms as kernel
from fasterrcnn_jax.kernels.batching import fold_mapped_axes

# Candidates that one top-k takes; the pass over all boxes before it costs as much as comparing some hundred of them.
CHUNK = 2048
# Kept boxes that candidates are compared with at once, and boxes that are decided at once.
BLOCK = 128
# Candidates that are compared at once: the pairs of these and a block fit into a core's first cache.
ROWS = 256


class _Boxes(NamedTuple):
    """Boxes in fixed shapes; the first ones count, by a number that stands beside them."""

    planes: Float[Array, "5 n"]  # x1, y1, x2, y2, area
    groups: Int[Array, "n"]
    indices: Int[Array, "n"]  # of the given boxes

    def at(self, start: Array | int, size: int) -> "_Boxes":
        return _Boxes(*(lax.dynamic_slice_in_dim(x, start, size, axis=-1) for x in self))

    def with_block(self, block: "_Boxes", start: Array) -> "_Boxes":
        pairs = zip(self, block, strict=True)
        return _Boxes(*(lax.dynamic_update_slice_in_dim(x, part, start, axis=-1) for x, part in pairs))

    def first(self, chosen: Bool[Array, "n"]) -> "_Boxes":
        """Returns the chosen boxes first, in their order; copies of the first of all boxes follow."""
        size = chosen.shape[0]
        slot = jnp.where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, size)
        order = jnp.zeros(size, jnp.int32).at[slot].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
        return _Boxes(*(x[..., order] for x in self))


@functools.cache
def keep_first(threshold: np.float32, max_output: int) -> Callable:
    """Returns the function (boxes [n 4], scores [n], valid [n], groups [n]) -> (indices [k], count []).

    The first `count` of the `k` indices are those of the kept boxes, best first. Under `vmap` the images are worked on
    one after another: mapped loops would do the work of the slowest image for all.
    """

    def keep_of_one(problem: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        boxes, scores, valid, groups = problem
        return _keep(boxes, scores, valid, groups, threshold, max_output)

    def one_by_one(*problems: Array) -> tuple[Array, Array]:
        return lax.map(keep_of_one, problems)

    folded = fold_mapped_axes(one_by_one)

    def keep(boxes: Array, scores: Array, valid: Array, groups: Array) -> tuple[Array, Array]:
        indices, count = folded(*(x[None] for x in (boxes, scores, valid, groups)))
        return indices[0], count[0]

    return keep


def _keep(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, "n"],
    valid: Bool[Array, "n"],
    groups: Int[Array, "n"],
    threshold: np.float32,
    max_output: int,
) -> tuple[Int[Array, "{max_output}"], Int[Array, ""]]:
    n = scores.shape[0]
    block = min(BLOCK, n)
    chunk = min(CHUNK, n + -n % block)
    most = min(max_output, n)
    padding = max(chunk - n, 0)
    ranks, last_ranks = (jnp.pad(x, (0, padding), constant_values=-jnp.inf) for x in _ranks(scores, valid))
    given = _Boxes(kernel.with_area(boxes), groups, jnp.arange(n, dtype=jnp.int32))
    slots = most + -most % block + block  # whole slices, and a block after the last box that is asked for
    nothing = jnp.zeros(slots, jnp.int32)
    kept = _Boxes(jnp.zeros((5, slots), given.planes.dtype), nothing, nothing)

    def unfinished(carry):
        _, left, _, count, _ = carry
        return (left > 0) & (count < most)

    def decide_chunk(carry):
        ranks, left, in_last, count, kept = carry
        _, best = lax.top_k(ranks, chunk)
        candidates = _Boxes(*(x[..., best] for x in given))
        alive = jnp.minimum(left, chunk)
        candidates, alive = _without_suppressed(candidates, alive, kept, count, block, threshold)
        count, kept = _decide(candidates, alive, count, kept, block, most, threshold)
        # Chunks do not mix the two kinds of ranks.
        left = jnp.maximum(left - chunk, 0)
        turn = (left == 0) & ~in_last
        ranks = jnp.where(turn, last_ranks, ranks.at[best].set(-jnp.inf, unique_indices=True))
        return ranks, jnp.where(turn, _number(last_ranks), left), in_last | turn, count, kept

    first = _number(ranks)
    start = (
        jnp.where(first > 0, ranks, last_ranks),
        jnp.where(first > 0, first, _number(last_ranks)),
        first == 0,
        jnp.int32(0),
        kept,
    )
    *_, count, kept = lax.while_loop(unfinished, decide_chunk, start)
    return jnp.pad(kept.indices[:most], (0, max_output - most)), jnp.minimum(count, most)


def _ranks(scores: Array, valid: Array) -> tuple[Array, Array]:
    """Returns ranks of the boxes visited first and of those visited after them, float32 or float64; -inf: not visited.

    Scores of -inf, and NaN after them, come last. They have ranks of their own, so that every finite score keeps its
    place. `top_k` puts 0.0 before -0.0, and here they are equal.
    """
    if scores.dtype.itemsize < 4:
        scores = scores.astype(jnp.float32)  # exactly
    ranked = valid & (scores > -jnp.inf)
    ranks = jnp.where(ranked, jnp.where(scores == 0, 0, scores), -jnp.inf)
    last = jnp.where(jnp.isnan(scores), 0, 1).astype(scores.dtype)
    return ranks, jnp.where(valid & ~ranked, last, -jnp.inf)


def _number(ranks: Array) -> Array:
    return (ranks > -jnp.inf).sum(dtype=jnp.int32)


def _suppressed(candidates: _Boxes, others: _Boxes, threshold: np.float32) -> Bool[Array, "n m"]:
    """Returns which of the other boxes suppress a candidate; candidates are rows, which `any` reads in their order."""
    return kernel.suppresses(
        [plane[:, None] for plane in candidates.planes],
        candidates.groups[:, None],
        [plane[None] for plane in others.planes],
        others.groups[None],
        threshold,
    )


def _without_suppressed(
    candidates: _Boxes, alive: Array, kept: _Boxes, count: Array, block: int, threshold: np.float32
) -> tuple[_Boxes, Array]:
    """Returns the candidates that no kept box suppresses, and their number."""

    def unfinished(carry):
        start, _, alive = carry
        return (start < count) & (alive > 0)

    def drop_by_slice(carry):
        start, candidates, alive = carry
        candidates, alive = _drop(candidates, 0, alive, kept.at(start, block), threshold)
        return start + block, candidates, alive

    _, candidates, alive = lax.while_loop(unfinished, drop_by_slice, (jnp.int32(0), candidates, alive))
    return candidates, alive


def _drop(candidates: _Boxes, start: int, end: Array, others: _Boxes, threshold: np.float32) -> tuple[_Boxes, Array]:
    """Returns the candidates from `start` to `end` that no other box suppresses, and their number.

    What follows the kept boxes of a slice changes nothing: it is empty, or repeats the first box of a block.
    """
    size = candidates.groups.shape[0]
    rows = min(ROWS, size)

    def compare_rows(carry):
        row, survives = carry
        # The last rows may be some that were compared before.
        row = jnp.minimum(row, size - rows)
        dropped = _suppressed(candidates.at(row, rows), others, threshold).any(axis=-1)
        return row + rows, lax.dynamic_update_slice_in_dim(survives, ~dropped, row, axis=0)

    begin = jnp.int32(start // rows * rows), jnp.zeros(size, bool)
    _, survives = lax.while_loop(lambda carry: carry[0] < end, compare_rows, begin)
    position = jnp.arange(size)
    survives &= (position >= start) & (position < end)
    return candidates.first(survives), survives.sum(dtype=jnp.int32)


def _decide(
    candidates: _Boxes, alive: Array, count: Array, kept: _Boxes, block: int, most: int, threshold: np.float32
) -> tuple[Array, _Boxes]:
    """Returns the number of kept boxes and the boxes, with those of the candidates: the first `alive` count."""
    offsets = jnp.arange(block)
    earlier = offsets[:, None] > offsets[None, :]

    def unfinished(carry):
        _, alive, count, _ = carry
        return (alive > 0) & (count < most)

    def decide_block(carry):
        candidates, alive, count, kept = carry
        boxes = candidates.at(0, block)
        waiting = offsets < alive
        inside = _suppressed(boxes, boxes, threshold) & earlier

        # Greedy suppression inside the block is the fixed point of the rule "a box is kept unless an earlier kept box
        # suppresses it"; each pass settles at least one more box of every chain.
        def pass_once(state):
            keep, _ = state
            again = waiting & ~(inside & keep[None]).any(axis=-1)
            return again, (again != keep).any()

        keep, _ = lax.while_loop(lambda state: state[1], pass_once, (waiting, jnp.bool_(True)))
        boxes, found = boxes.first(keep), keep.sum(dtype=jnp.int32)
        candidates, alive = _drop(candidates, block, alive, boxes, threshold)
        # The first box of a block is kept: no kept box suppresses it. Its copies follow the found boxes, and the next
        # block overwrites them.
        return candidates, alive, count + found, kept.with_block(boxes, count)

    _, _, count, kept = lax.while_loop(unfinished, decide_block, (candidates, alive, count, kept))
    return count, kept
