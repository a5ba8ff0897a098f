"""Positions found by counting equal those found by sorting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterrcnn_jax.ops import selection
from fasterrcnn_jax.ops.selection import best_positions, first_positions, lowest_positions

pytestmark = pytest.mark.usefixtures("quick_compilation")

LARGEST = 2**32 - 1

jitted_first = functools.partial(jax.jit, static_argnums=1)(first_positions)
jitted_lowest = functools.partial(jax.jit, static_argnums=(1, 2))(lowest_positions)


@pytest.mark.parametrize("length", [1, 31, 32, 127, 128, 129, 1000, 5000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_first_positions_are_those_of_the_first_chosen_entries(length, share):
    chosen = np.random.default_rng(0).random(length) < share
    for size in (1, 5, length):
        positions, valid = map(np.asarray, jitted_first(chosen, size))
        expected = np.flatnonzero(chosen)[:size]
        np.testing.assert_array_equal(valid, np.arange(size) < len(expected))
        np.testing.assert_array_equal(positions, np.pad(expected, (0, size - len(expected))))


def expected_lowest(keys, size):
    order = np.argsort(keys, kind="stable")[:size]
    threshold = keys[order[-1]]
    return np.concatenate([np.sort(order[keys[order] < threshold]), np.sort(order[keys[order] == threshold])])


LISTS = st.lists(
    st.tuples(
        st.integers(1, 3000),
        st.sampled_from([1, 3, 50, 2**32]),  # different keys
        st.floats(0.0, 1.0),  # share of the list that is taken
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=4,
)


# Each example has other lengths, so it is compiled again.
@settings(max_examples=8)
@given(LISTS)
def test_lowest_positions_are_those_of_a_sort(drawn):
    lists, sizes = [], []
    for length, kinds, share, seed in drawn:
        lists.append(np.random.default_rng(seed).integers(0, kinds, length, np.uint32))
        sizes.append(max(1, round(share * length)))
    lengths = [len(keys) for keys in lists]
    found = lowest_positions(jnp.asarray(np.concatenate(lists)), lengths, sizes)
    starts = np.cumsum([0, *lengths])[:-1]
    expected = [start + expected_lowest(keys, size) for start, keys, size in zip(starts, lists, sizes, strict=True)]
    np.testing.assert_array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize("key", [0, 1, 2**31 - 1, 2**31, LARGEST - 1, LARGEST])
def test_of_equal_entries_those_at_the_front_are_taken(key):
    """The largest key is also that of the padding behind a list."""
    keys = np.full(1500 + 7, key, np.uint32)
    expected = np.concatenate([np.arange(40), 1500 + np.arange(7)])
    np.testing.assert_array_equal(jitted_lowest(keys, (1500, 7), (40, 7)), expected)


def test_the_lists_of_a_batch_are_separate():
    keys = np.random.default_rng(1).integers(0, 2**32, (3, 2000), np.uint32)
    found = jax.vmap(lambda one: lowest_positions(one, [2000], [100]))(keys)
    for row, positions in zip(keys, found, strict=True):
        np.testing.assert_array_equal(positions, expected_lowest(row, 100))


def test_nothing_is_sorted():
    keys = jnp.zeros(5000, jnp.uint32)
    program = str(jax.make_jaxpr(lambda keys: lowest_positions(keys, [5000], [100]))(keys))
    assert "sort[" not in program and "top_k[" not in program


@pytest.mark.parametrize("bits", [(1,) * 32, (2, 8, 8, 8, 6)], ids=str)
def test_the_bits_of_a_step_do_not_change_the_result(monkeypatch, bits):
    keys = np.random.default_rng(2).integers(0, 2**32, 3000, np.uint32)
    monkeypatch.setattr(selection, "STEP_BITS", bits)
    np.testing.assert_array_equal(lowest_positions(jnp.asarray(keys), [3000], [77]), expected_lowest(keys, 77))


def expected_best(scores, lengths, sizes):
    """Returns the positions by a stable sort; 0.0 comes before -0.0, as in a top-k."""
    found, start = [], 0
    for length, size in zip(lengths, sizes, strict=True):
        part = scores[start : start + length]
        order = sorted(range(length), key=lambda i, part=part: (-part[i], np.signbit(part[i]), i))[:size]
        found.append(start + np.sort(order))
        start += length
    return found


@pytest.mark.parametrize("method", ["top-k", "counting"])
def test_best_positions_of_lists_are_those_of_their_highest_scores(method):
    rng = np.random.default_rng(3)
    lengths, sizes = (20_000, 1500, 30), (700, 1500, 11)
    scores = rng.choice(np.float32([-np.inf, -2.5, -0.0, 0.0, 1e-30, 3.0]), sum(lengths))
    scores[: lengths[0]] = np.where(rng.random(lengths[0]) < 0.5, rng.standard_normal(lengths[0]), scores[: lengths[0]])
    if method == "counting":
        found = lowest_positions(selection._descending_keys(jnp.asarray(scores)), lengths, sizes)
    else:
        found = best_positions(jnp.asarray(scores), lengths, sizes)
    for of_list, expected in zip(
        np.split(found, np.cumsum(sizes)[:-1]), expected_best(scores, lengths, sizes), strict=True
    ):
        np.testing.assert_array_equal(np.sort(of_list), expected)
        for value in np.unique(scores[of_list]):
            assert (np.diff(of_list[scores[of_list] == value]) > 0).all() or value == 0


def test_a_program_for_a_gpu_counts_where_a_list_is_long():
    """A short list is sorted in fewer launches than it takes to count."""
    for length, sorts in ((selection.LONG, 0), (selection.LONG - 1, 1)):
        traced = jax.jit(lambda scores, length=length: best_positions(scores, [length], [7])).trace(jnp.zeros(length))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert program.count("top_k") == sorts


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scores_of_16_bits_are_taken_in_long_lists(dtype):
    scores = jnp.asarray(np.random.default_rng(4).standard_normal(selection.LONG), dtype)
    found = jax.jit(lambda scores: best_positions(scores, (selection.LONG,), (9,)))(scores)
    assert np.sort(scores[found]).tolist() == np.sort(scores)[-9:].tolist()
    counted = lowest_positions(selection._descending_keys(scores), (selection.LONG,), (9,))
    assert sorted(counted.tolist()) == sorted(found.tolist())
