"""Positions of a fixed number of entries of long lists, found by counting instead of sorting.

A GPU needs dozens of launches to sort a long list, and as many again for each further list. With counting, the number
of launches hardly depends on the lengths or on the number of lists.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

# Entries in a word, and words in a block.
WORD, BLOCK_WORDS = 32, 4
BLOCK = WORD * BLOCK_WORDS
# Entries that one sum compares with the thresholds of a step.
ROW = 1024
# Bits of the threshold that each step decides. A step of b bits compares each entry with 2^b - 1 candidates: larger
# steps are fewer launches and more comparisons.
STEP_BITS = (7, 7, 6, 6, 6)
LARGEST = np.uint32(2**32 - 1)
# Below this length a GPU needs fewer launches to sort than to count.
LONG = 2**14


def first_positions(chosen: Bool[Array, "n"], size: int) -> tuple[Int[Array, "{size}"], Bool[Array, "{size}"]]:
    """Returns the positions of the first `size` chosen entries, ascending, and which of them are valid.

    Padding has position 0.
    """
    rank = jnp.arange(size, dtype=jnp.int32)
    words = _words(chosen)
    valid = rank < lax.population_count(words).sum(dtype=jnp.int32)
    return jnp.where(valid, _position_of_rank(words, rank), 0), valid


@jax.named_scope("top_k")
def best_positions(
    scores: Float[Array, "n"], lengths: Sequence[int], sizes: Sequence[int]
) -> Int[Array, "{sum(sizes)}"]:
    """Returns the positions of the highest scores of each list, list after list; of equal scores those at the front.

    Equal scores are in the order of their positions, except 0.0 and -0.0. The order of other scores depends on the
    device and on the lengths: do not rely on it.

    Args:
      scores: of all lists, one list after the other.
      lengths: the number of scores in each list.
      sizes: the number of positions from each list, at least 1 and at most its length.
    """
    by_top_k = functools.partial(_by_top_k, lengths=lengths, sizes=sizes)
    if max(lengths) < LONG:
        return by_top_k(scores)

    def by_counting(scores: Array) -> Array:
        return lowest_positions(_descending_keys(scores), lengths, sizes)

    return lax.platform_dependent(scores, cpu=by_top_k, default=by_counting)


def _by_top_k(scores: Float[Array, "n"], *, lengths: Sequence[int], sizes: Sequence[int]) -> Int[Array, "k"]:
    found, start = [], 0
    for length, size in zip(lengths, sizes, strict=True):
        found.append(start + lax.top_k(scores[start : start + length], size)[1])
        start += length
    return jnp.concatenate(found)


def _descending_keys(scores: Float[Array, "n"]) -> UInt32[Array, "n"]:
    """Returns keys that ascend from the highest score to the lowest, in the total order of a top-k: 0.0 before -0.0."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    ascending = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)
    return lax.bitcast_convert_type(ascending ^ jnp.int32(2**31 - 1), jnp.uint32)


def lowest_positions(
    keys: UInt32[Array, "n"], lengths: Sequence[int], sizes: Sequence[int]
) -> Int[Array, "{sum(sizes)}"]:
    """Returns the positions of the lowest keys of each list, list after list; of equal keys those at the front.

    Keys below the threshold of their list come first, then keys equal to it, both by ascending position. The arguments
    are those of `best_positions`.
    """
    starts, rows = np.cumsum((0, *lengths))[:-1], np.array([-(-length // ROW) for length in lengths])
    moved = (np.cumsum(rows) - rows) * ROW - starts
    keys = _in_rows(keys, lengths, rows, moved)
    list_of_row = np.repeat(np.arange(len(lengths)), rows)
    threshold = _thresholds(keys, list_of_row, np.asarray(sizes))[list_of_row][:, None]
    # Entries below their threshold, then those equal to it, as two parts of one long list.
    words = _words(jnp.stack([keys < threshold, keys == threshold]).reshape(-1))
    of_rows = lax.population_count(words).reshape(-1, ROW // WORD).sum(axis=1, dtype=jnp.int32)
    is_before = np.tile(list_of_row, 2)[None] < np.arange(len(lengths))[:, None]
    second = np.repeat([False, True], len(list_of_row))[None]
    # Three counts for each list: entries below their threshold in earlier lists; those in the list; all entries that
    # come before the list's equal ones.
    is_own = np.tile(list_of_row, 2)[None] == np.arange(len(lengths))[:, None]
    counted = jnp.asarray(np.stack([is_before & ~second, is_own & ~second, is_before | ~second]))
    before, below, before_equal = jnp.where(counted, of_rows[None, None], 0).sum(axis=2, dtype=jnp.int32)
    rank = jnp.concatenate([jnp.arange(size, dtype=jnp.int32) for size in sizes])
    of_slot = np.repeat(np.arange(len(sizes)), sizes)
    is_below = rank < below[of_slot]
    position = _position_of_rank(words, rank + jnp.where(is_below, before[of_slot], (before_equal - below)[of_slot]))
    return position - jnp.asarray(moved, jnp.int32)[of_slot] - jnp.where(is_below, 0, keys.size)


def _in_rows(
    keys: UInt32[Array, "n"], lengths: Sequence[int], rows: np.ndarray, moved: np.ndarray
) -> UInt32[Array, "r w"]:
    """Returns the lists in whole rows. The largest key fills the end of each list's last row."""
    list_of_row = np.repeat(np.arange(len(lengths)), rows)
    first = (np.arange(rows.sum()) * ROW - moved[list_of_row]).astype(np.int32)
    left = (np.cumsum(lengths)[list_of_row] - first).astype(np.int32)
    column = jnp.arange(ROW, dtype=jnp.int32)[None]
    inside = column < jnp.asarray(left)[:, None]
    return jnp.where(inside, keys[jnp.where(inside, jnp.asarray(first)[:, None] + column, 0)], LARGEST)


def _thresholds(keys: UInt32[Array, "r w"], list_of_row: np.ndarray, sizes: np.ndarray) -> UInt32[Array, "l"]:
    """Returns for each list the entry that is its `sizes`-th lowest, decided from the highest bits down."""
    in_list = jnp.asarray(list_of_row[None] == np.arange(len(sizes))[:, None])
    threshold, undecided = jnp.zeros(len(sizes), jnp.uint32), 32
    for bits in STEP_BITS:
        undecided -= bits
        digits = jnp.arange(1, 2**bits, dtype=jnp.uint32) << np.uint32(undecided)
        # At first the candidates of all lists are the same.
        candidates = digits[None] if undecided + bits == 32 else (threshold[:, None] + digits[None])[list_of_row]
        below = (keys[:, None, :] < candidates[:, :, None]).sum(axis=2, dtype=jnp.int32)
        below = jnp.where(in_list[:, :, None], below[None], 0).sum(axis=1, dtype=jnp.int32)
        digit = (below < jnp.asarray(sizes, jnp.int32)[:, None]).sum(axis=1, dtype=jnp.uint32)
        threshold += digit << np.uint32(undecided)
    return threshold


def _words(chosen: Bool[Array, "n"]) -> Int[Array, "w"]:
    """Returns the entries as bits, the first entry of a word in its lowest bit; whole blocks."""
    bits = jnp.pad(chosen, (0, -chosen.shape[0] % BLOCK)).reshape(-1, WORD)
    weights = jnp.asarray(np.left_shift(np.int32(1), np.arange(WORD, dtype=np.int32)))[None]
    return jnp.where(bits, weights, 0).sum(axis=1, dtype=jnp.int32)


def _position_of_rank(words: Int[Array, "w"], rank: Int[Array, "r"]) -> Int[Array, "r"]:
    """Returns the position of the chosen entry with `rank` chosen entries before it; any number if there is none."""
    counts = lax.population_count(words).reshape(-1, BLOCK_WORDS).sum(axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    block = (ends[None, :] <= rank[:, None]).sum(axis=1, dtype=jnp.int32)
    block = jnp.minimum(block, counts.shape[0] - 1)
    rank -= ends[block] - counts[block]
    of_block = words.reshape(-1, BLOCK_WORDS)[block]
    position, word = block * BLOCK, of_block[:, 0]
    for step in range(1, BLOCK_WORDS):
        behind = lax.population_count(word)
        goes_on = rank >= behind
        rank = jnp.where(goes_on, rank - behind, rank)
        position = jnp.where(goes_on, block * BLOCK + step * WORD, position)
        word = jnp.where(goes_on, of_block[:, step], word)
    # The bit in the word, by halves.
    for half in (16, 8, 4, 2, 1):
        lower = word & jnp.int32(2**half - 1)
        behind = lax.population_count(lower)
        goes_on = rank >= behind
        rank = jnp.where(goes_on, rank - behind, rank)
        position += jnp.where(goes_on, half, 0)
        word = jnp.where(goes_on, lax.shift_right_logical(word, jnp.int32(half)), lower)
    return position
