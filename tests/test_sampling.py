"""The random sample: its counts, its uniformity and its dependences."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays
from scipy import stats

from fasterrcnn_jax.ops import sampling
from fasterrcnn_jax.ops.sampling import sample

N = 20
WAYS = ("_lowest_by_sort", "_lowest_by_top_k", "_lowest_by_counting")
jitted = functools.partial(jax.jit, static_argnames=("size", "fg_fraction"))(sample)
sample_6 = functools.partial(jitted, size=6, fg_fraction=0.5)


def drawn(result) -> list[int]:
    """Returns the drawn positions, after checking that the valid ones come first."""
    indices, valid = map(np.asarray, result)
    count = valid.sum()
    assert valid[:count].all()
    return indices[:count].tolist()


def key(seed):
    return jax.random.key(seed)


QUOTAS = [(6, 0.5), (8, 0.25), (12, 1.0), (12, 0.0), (7, 0.3), (7, 0.25), (2, 0.1)]


@pytest.mark.parametrize("size, fg_fraction", QUOTAS)
@given(arrays(np.int32, N, elements=st.sampled_from([-1, 0, 1])), st.integers(0, 99))
def test_sample_has_exactly_the_counts_of_the_quota_and_no_repeats(size, fg_fraction, labels, seed):
    indices = drawn(jitted(key(seed), labels, size=size, fg_fraction=fg_fraction))
    assert len(set(indices)) == len(indices)
    kinds = labels[indices].tolist()
    # The quota is rounded, as for RoIs in the reference, and is never 0.
    quota = {(7, 0.25): 2, (2, 0.1): 1}.get((size, fg_fraction), math.floor(size * fg_fraction))
    foreground = min((labels == 1).sum(), quota)
    background = min((labels == 0).sum(), size - foreground)
    assert kinds == [1] * foreground + [0] * background


@pytest.mark.parametrize("size, fg_fraction", [(6, 0.5), (8, 0.25), (30, 0.0)])
@given(arrays(np.int32, N, elements=st.sampled_from([-1, 0, 1])), st.booleans())
def test_fg_only_lifts_the_limit_on_foreground(size, fg_fraction, labels, fg_only):
    indices = drawn(jitted(key(0), labels, size=size, fg_fraction=fg_fraction, fg_only=fg_only))
    foreground = min((labels == 1).sum(), size if fg_only else math.floor(size * fg_fraction))
    assert (labels[indices] == 1).sum() == foreground
    assert (labels[indices] == 0).sum() == min((labels == 0).sum(), size - foreground)


@pytest.mark.parametrize("kind, count", [(-1, 0), (0, 6), (1, 3)])
def test_sample_of_one_kind(kind, count):
    """Only ignored: an empty sample. Only background: a full sample. Only foreground: the quota of foreground."""
    labels = np.full(N, kind, np.int32)
    assert len(drawn(sample_6(key(0), labels))) == count


def test_a_sample_larger_than_its_candidates_takes_each_candidate_once():
    labels = np.int32([1, 0, -1, 0, 1, 0])
    found = jitted(key(0), labels, size=100, fg_fraction=1.0)
    assert found.indices.shape == (6,)
    assert sorted(drawn(found)) == [0, 1, 3, 4, 5]


def test_every_subset_is_equally_likely():
    """Chi-square over the subsets of 3 of 6 foreground and of 3 of 7 background positions."""
    labels = np.repeat([1, -1, 0], [6, N - 13, 7]).astype(np.int32)
    labels = np.random.default_rng(0).permutation(labels)
    keys = jax.random.split(key(1), 4000)
    indices, valid = map(np.asarray, jax.vmap(lambda k: sample_6(k, labels))(keys))
    assert valid.all()
    for columns, subsets in ((slice(0, 3), math.comb(6, 3)), (slice(3, 6), math.comb(7, 3))):
        _, counts = np.unique(np.sort(indices[:, columns], axis=1), axis=0, return_counts=True)
        assert len(counts) == subsets
        assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("few", [-1, 0, 1])
def test_on_every_device_a_sample_holds_the_lowest_draws_of_a_kind(way, few):
    """Many draws share their upper 24 bits, and some are equal: then the lower position comes first."""
    generator, size = np.random.default_rng(0), 50
    labels = generator.integers(-1, 2, 2000).astype(np.int32)
    labels[np.flatnonzero(labels == few)[size // 2 :]] = -1 if few != -1 else 0
    draws = (generator.integers(0, 200, 2000) * 256 + generator.integers(0, 50, 2000)).astype(np.uint32)
    assert 4 < np.bincount(draws >> 8).max() < 30
    method = jax.jit(functools.partial(getattr(sampling, way), size=size))
    for kind, found in zip((1, 0), method(draws, labels), strict=True):
        of_kind = np.flatnonzero(labels == kind)
        expected = of_kind[np.lexsort((of_kind, draws[of_kind]))][:size]
        assert len(expected) == (size // 2 if kind == few else size)
        np.testing.assert_array_equal(found[: len(expected)], expected)


def test_a_key_draws_the_sample_that_it_drew_in_earlier_versions():
    labels = np.random.default_rng(3).integers(-1, 2, 500).astype(np.int32)
    labels[labels == 1] = np.where(np.arange((labels == 1).sum()) % 8, -1, 1)
    order = np.argsort(np.asarray(jax.random.bits(key(4), labels.shape)), kind="stable")
    foreground, background = (order[labels[order] == kind] for kind in (1, 0))
    expected = [*foreground[:20], *background[: 100 - min(len(foreground), 20)]]
    assert 10 < len(foreground) < 30
    found = jitted(key(4), labels, size=100, fg_fraction=0.2)
    assert drawn(found) == expected and found.valid.all()
    few = jitted(key(4), np.where(labels == 1, 1, -1), size=100, fg_fraction=1.0)
    assert drawn(few) == foreground.tolist() and not few.indices[len(foreground) :].any()


def test_order_within_a_kind_is_random():
    labels = np.zeros(N, np.int32)
    keys = jax.random.split(key(2), 4000)
    first = np.asarray(jax.vmap(lambda k: sample_6(k, labels).indices[0])(keys))
    assert stats.chisquare(np.bincount(first, minlength=N)).pvalue > 1e-3


def test_sample_is_a_function_of_the_key():
    labels = np.arange(N, dtype=np.int32) % 3 - 1
    first, again, other = (drawn(sample_6(key(seed), labels)) for seed in (0, 0, 1))
    assert first == again != other


def test_raw_and_typed_keys_agree():
    labels = np.arange(N, dtype=np.int32) % 3 - 1
    assert drawn(sample_6(key(5), labels)) == drawn(sample_6(jax.random.key_data(key(5)), labels))


def test_ignored_positions_at_the_end_change_nothing():
    labels = np.arange(2000, dtype=np.int32) % 3 - 1  # jax.random.permutation sorts so many twice
    padded = np.concatenate([labels, np.full(9, -1, np.int32)])
    for seed in range(3):
        assert drawn(sample_6(key(seed), labels)) == drawn(sample_6(key(seed), padded))


@pytest.mark.parametrize("fg_fraction", [-0.1, 1.1])
def test_fraction_outside_0_to_1_is_an_error(fg_fraction):
    with pytest.raises(ValueError, match=str(fg_fraction)):
        sample(key(0), jnp.zeros(3, jnp.int32), size=2, fg_fraction=fg_fraction)


def test_on_a_gpu_many_draws_are_counted_and_few_are_sorted():
    for length, sorted_shape in ((sampling.selection.LONG, "2x20"), (100, "100")):
        draws, labels = jnp.zeros(length, jnp.uint32), jnp.zeros(length, jnp.int32)
        traced = jax.jit(functools.partial(sampling._lowest, size=20)).trace(draws, labels)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        found = re.findall(r"\}\) : \(tensor<([\dx]+)xu?i32>, tensor<[\dx]+xu?i32>", program)
        assert found == [sorted_shape]


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_draw_comes_before_entries_of_no_kind(monkeypatch, way):
    monkeypatch.setattr(jax.random, "bits", lambda key, shape: jnp.full(shape, 2**32 - 1, jnp.uint32))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **_: getattr(sampling, way)(*arrays, size=4))
    labels = np.int32([-1, -1, 0, -1, 1, 0])
    with jax.disable_jit():
        assert drawn(sample(key(0), labels, size=4, fg_fraction=0.5)) == [4, 2, 5]
