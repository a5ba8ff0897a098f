"""Positions of a fixed number of entries of long lists, found by counting instead of sorting.

A GPU sorts n entries in some dozen launches, and it launches them again for every list. Counting takes a number of
launches that depends neither on n nor on the number of lists.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

# Entries of a word, and words whose entries are counted together.
WORD, BLOCK_WORDS = 32, 4
BLOCK = WORD * BLOCK_WORDS
# Entries that one sum compares with the thresholds of a step.
ROW = 1024
# Bits of a threshold that one step decides. It counts the entries below 2^4 - 1 candidates: with more bits there are
# fewer launches and more comparisons.
STEP_BITS = 4
LARGEST = np.uint32(2**32 - 1)


def first_positions(chosen: Bool[Array, "n"], size: int) -> tuple[Int[Array, "{size}"], Bool[Array, "{size}"]]:
    """Returns the ascending positions of the first `size` chosen entries, and which of these positions are entries.

    Padding has position 0.
    """
    rank = jnp.arange(size, dtype=jnp.int32)
    words = _words(chosen)
    valid = rank < lax.population_count(words).sum(dtype=jnp.int32)
    return jnp.where(valid, _position_of_rank(words, rank), 0), valid


def lowest_positions(lists: Sequence[UInt32[Array, "_"]], sizes: Sequence[int]) -> list[Int[Array, "_"]]:
    """Returns the positions of the lowest entries of each list, `sizes` of them; of equal entries those at the front.

    Entries below the threshold of their list come first, then entries equal to it, both by ascending position.

    Args:
      sizes: for each list at least 1 and at most its length.
    """
    padded = [jnp.pad(keys, (0, -keys.shape[0] % ROW), constant_values=LARGEST) for keys in lists]
    rows = np.array([keys.shape[0] // ROW for keys in padded])
    starts = np.concatenate([[0], np.cumsum(rows)[:-1]]) * ROW
    keys = jnp.concatenate(padded).reshape(-1, ROW)
    list_of_row = np.repeat(np.arange(len(lists)), rows)
    threshold = _thresholds(keys, list_of_row, np.asarray(sizes))
    threshold = threshold[list_of_row][:, None]
    below, equal = (keys < threshold).reshape(-1), (keys == threshold).reshape(-1)
    # The number of entries before each list, and of those below the threshold of a list.
    words, words_of_equal = _words(below), _words(equal)
    found = []
    for kind in (words, words_of_equal):
        of_rows = lax.population_count(kind).reshape(-1, ROW // WORD).sum(axis=1, dtype=jnp.int32)
        of_lists = jnp.stack([part.sum(dtype=jnp.int32) for part in jnp.split(of_rows, np.cumsum(rows)[:-1])])
        found.append((kind, of_lists, jnp.cumsum(of_lists, dtype=jnp.int32) - of_lists))
    (words, num_below, below_before), (words_of_equal, _, equal_before) = found
    rank = jnp.concatenate([jnp.arange(size, dtype=jnp.int32) for size in sizes])
    list_of_slot = np.repeat(np.arange(len(lists)), sizes)
    is_below = rank < num_below[list_of_slot]
    first = _position_of_rank(words, rank + below_before[list_of_slot])
    later = _position_of_rank(words_of_equal, rank - num_below[list_of_slot] + equal_before[list_of_slot])
    positions = jnp.where(is_below, first, later) - jnp.asarray(starts, jnp.int32)[list_of_slot]
    return jnp.split(positions, np.cumsum(sizes)[:-1])


def _thresholds(keys: UInt32[Array, "r w"], list_of_row: np.ndarray, sizes: np.ndarray) -> UInt32[Array, "l"]:
    """Returns for each list the entry that is its `sizes`-th lowest, decided from the highest bits down."""
    in_list = jnp.asarray(list_of_row[None] == np.arange(len(sizes))[:, None])
    digits = jnp.arange(1, 2**STEP_BITS, dtype=jnp.uint32)
    threshold = jnp.zeros(len(sizes), jnp.uint32)
    for shift in range(32 - STEP_BITS, -1, -STEP_BITS):
        candidates = threshold[:, None] + (digits << np.uint32(shift))[None]
        below = (keys[:, None, :] < candidates[list_of_row][:, :, None]).sum(axis=2, dtype=jnp.int32)
        below = jnp.where(in_list[:, :, None], below[None], 0).sum(axis=1, dtype=jnp.int32)
        digit = (below < jnp.asarray(sizes, jnp.int32)[:, None]).sum(axis=1, dtype=jnp.uint32)
        threshold += digit << np.uint32(shift)
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
    position, word = block * BLOCK, words[block * BLOCK_WORDS]
    for step in range(1, BLOCK_WORDS):
        behind = lax.population_count(word)
        goes_on = rank >= behind
        rank = jnp.where(goes_on, rank - behind, rank)
        position = jnp.where(goes_on, block * BLOCK + step * WORD, position)
        word = jnp.where(goes_on, words[block * BLOCK_WORDS + step], word)
    # The bit in the word, by halves.
    for half in (16, 8, 4, 2, 1):
        lower = word & jnp.int32(2**half - 1)
        behind = lax.population_count(lower)
        goes_on = rank >= behind
        rank = jnp.where(goes_on, rank - behind, rank)
        position += jnp.where(goes_on, half, 0)
        word = jnp.where(goes_on, lax.shift_right_logical(word, jnp.int32(half)), lower)
    return position
