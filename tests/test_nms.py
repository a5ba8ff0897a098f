"""Greedy suppression: comparison with the textbook loop, and the contract about padding, groups and ties.

The kernel runs here step by step, with a check for races; `test_nms_kernel.py` tests what only the kernel promises.
"""

import functools

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import oracles
import pytest
from fasterrcnn_jax.kernels import nms as kernel
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.ops.suppression import BLOCK, nms

pytestmark = pytest.mark.usefixtures("quick_compilation")

THRESHOLDS = (0.3, 0.5, 0.7)
SMALL, LARGE = 24, 640  # the only two sizes, so that few programs are compiled

STATIC = ("iou_threshold", "max_output", "implementation")
jitted_nms = jax.jit(nms, static_argnames=STATIC)

# Sizes are so small that a few dozen boxes fill several tiles of both designs, and 640 boxes fill several chunks of the
# mask.
SHRUNK = dict(THREADS=16, WORD=8, CHUNK=128, MASK_ROWS=4, SWEEP_TILE=16, TILE_WORDS=2, SWEPT_ROWS=4, LIST_TILE=16)


@pytest.fixture(params=["xla", *(pytest.param(design, marks=pytest.mark.mosaic_kernel) for design in ("mask", "list"))])
def any_nms(request, monkeypatch):
    """Returns `nms` in plain JAX, and with each design of the kernel."""
    if request.param == "xla":
        yield functools.partial(jitted_nms, implementation="xla")
        return
    mosaic.interpret(monkeypatch)
    monkeypatch.setattr(kernel, "design", lambda *sizes: request.param)
    for name, size in SHRUNK.items():
        monkeypatch.setattr(kernel, name, size)
    kernel.keep_first.cache_clear()
    # A new function each time, so that traces are not shared.
    yield jax.jit(functools.partial(nms, implementation="mosaic"), static_argnames=STATIC)
    kernel.keep_first.cache_clear()


def corners(n):
    """Returns boxes on whole pixels of a small grid, with many duplicates, exact thresholds and empty boxes."""
    points = arrays(np.int32, (n, 2, 2), elements=st.integers(0, 12))
    return points.map(lambda p: np.sort(p, axis=1).reshape(n, 4).astype(np.float32))


boxes_scores_valid_groups = st.tuples(
    corners(SMALL),
    arrays(np.int32, SMALL, elements=st.integers(-3, 3)).map(lambda s: s.astype(np.float32)),
    arrays(bool, SMALL),
    arrays(np.int32, SMALL, elements=st.integers(0, 2)),
)


def kept_of(result) -> list[int]:
    """Returns the kept indices, after checking the padding."""
    indices, valid = map(np.asarray, result)
    assert indices.shape == valid.shape
    count = valid.sum()
    assert valid[:count].all() and not indices[count:].any()
    return indices[:count].tolist()


def run_large(boxes, scores, threshold, groups=None):
    """NMS among LARGE boxes, the rest invalid: copies of the first box with higher scores."""
    n, rest = len(boxes), LARGE - len(boxes)
    groups = np.zeros(n, np.int32) if groups is None else groups.astype(np.int32)
    return kept_of(
        jitted_nms(
            np.concatenate([boxes, np.repeat(boxes[:1], rest, axis=0)]),
            np.concatenate([scores, np.full(rest, 1e6, np.float32)]),
            np.arange(LARGE) < n,
            iou_threshold=threshold,
            max_output=LARGE,
            groups=np.concatenate([groups, np.repeat(groups[:1], rest)]),
        )
    )


def clustered(n, seed):
    """Whole-pixel boxes in clusters: long chains of suppression across blocks."""
    generator = np.random.default_rng(seed)
    centre = generator.integers(0, 200, (n // 12 + 1, 2))[generator.integers(0, n // 12 + 1, n)]
    half = generator.integers(4, 16, (n, 2))
    centre = centre + generator.integers(-4, 5, (n, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
    return boxes, generator.integers(0, n, n).astype(np.float32)  # with ties


@pytest.mark.parametrize("threshold", THRESHOLDS)
@given(boxes_scores_valid_groups)
def test_nms_equals_the_greedy_loop(threshold, example):
    boxes, scores, valid, groups = example
    for of_box in (np.zeros_like(groups), groups):
        found = jitted_nms(boxes, scores, valid, iou_threshold=threshold, max_output=SMALL, groups=of_box)
        assert kept_of(found) == oracles.greedy_nms(boxes, scores, valid, iou_threshold=threshold, groups=of_box)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_batch_of_every_kind_equals_the_greedy_loop(threshold, any_nms):
    """Clusters with ties and invalid boxes in three groups, a chain, fewer valid boxes than a tile, no valid box."""
    n, kept = 60, 24
    x = np.insert(4.0 * np.arange(n - 1), 1, 5000.0)  # an odd number is kept of the list's first tile
    chain = np.stack([x, np.zeros(n), x + 10, np.full(n, 10)], axis=1).astype(np.float32)
    clusters, scores = clustered(n, seed=5)
    clusters[25:40] = clusters[5:20]  # duplicates, of other groups and scores
    problems = [
        (clusters, scores, np.random.default_rng(6).random(n) < 0.9),
        (chain, -np.arange(n, dtype=np.float32), np.ones(n, bool)),
        (clusters[::-1], scores, np.arange(n) < 19),
        (clusters, scores, np.zeros(n, bool)),
    ]
    groups = np.random.default_rng(7).integers(0, 3, n).astype(np.int32)
    groups = np.stack([groups, np.zeros(n, np.int32), groups, groups])
    run = functools.partial(any_nms, iou_threshold=threshold, max_output=kept)
    found = jax.vmap(lambda *xs: run(*xs[:3], groups=xs[3]))(*map(np.stack, zip(*problems)), groups)
    counts = []
    for row, (problem, groups_of_row) in enumerate(zip(problems, groups)):
        expected = oracles.greedy_nms(*problem, iou_threshold=threshold, max_output=kept, groups=groups_of_row)
        assert kept_of((found[0][row], found[1][row])) == expected
        counts.append(len(expected))
    assert counts[1] == kept and 1 < counts[2] < kept and counts[3] == 0


@given(boxes_scores_valid_groups)
def test_smaller_max_output_is_a_prefix(example):
    boxes, scores, valid, groups = example
    found = jitted_nms(boxes, scores, valid, iou_threshold=0.5, max_output=4, groups=groups)
    assert kept_of(found) == oracles.greedy_nms(boxes, scores, valid, iou_threshold=0.5, max_output=4, groups=groups)


def test_max_output_beyond_the_boxes_keeps_all_that_survive(any_nms):
    boxes, scores = clustered(SMALL, seed=3)
    valid = np.arange(SMALL) % 5 > 0
    found = any_nms(boxes, scores, valid, iou_threshold=0.5, max_output=SMALL + 9)
    assert kept_of(found) == oracles.greedy_nms(boxes, scores, valid, iou_threshold=0.5)


def test_identical_boxes_survive_a_threshold_of_1(any_nms):
    boxes = np.tile(np.float32([[3, 4, 20, 30]]), (SMALL, 1))
    scores = np.random.default_rng(0).permutation(SMALL).astype(np.float32)
    found = any_nms(boxes, scores, np.ones(SMALL, bool), iou_threshold=1.0, max_output=SMALL)
    assert kept_of(found) == np.argsort(-scores).tolist()


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_more_than_one_block_equals_the_greedy_loop(threshold):
    assert LARGE > 2 * BLOCK
    boxes, scores = clustered(600, seed=1)
    expected = oracles.greedy_nms(boxes, scores, np.ones(600, bool), iou_threshold=threshold)
    assert run_large(boxes, scores, threshold) == expected


def test_groups_equal_one_nms_per_group():
    boxes, scores = clustered(600, seed=2)
    groups = np.random.default_rng(3).integers(0, 3, 600)
    per_group = [oracles.greedy_nms(boxes, scores, groups == group, iou_threshold=0.5) for group in range(3)]
    expected = sorted(sum(per_group, []), key=lambda i: (-scores[i], i))
    assert run_large(boxes, scores, 0.5, groups) == expected


def test_a_chain_through_a_whole_block_alternates():
    """Every box suppresses only the next one, so every second box survives; this takes the largest number of passes."""
    x = 4.0 * np.arange(600, dtype=np.float32)
    boxes = np.stack([x, np.zeros(600), x + 10, np.full(600, 10)], axis=1).astype(np.float32)
    scores = -np.arange(600, dtype=np.float32)
    assert run_large(boxes, scores, 0.3) == list(range(0, 600, 2))  # neighbours 6/14, next 2/18


def test_threshold_is_rounded_down_to_float32(any_nms):
    """float32(3/10) exceeds 0.3, float32(7/10) does not exceed 0.7."""
    boxes = np.zeros((SMALL, 4), np.float32)
    valid = np.arange(SMALL) < 2
    scores = -np.arange(SMALL, dtype=np.float32)
    for overlap, threshold, survivors in ((3, 0.3, 1), (7, 0.7, 2), (5, 0.5, 2)):
        boxes[0], boxes[1] = (0, 0, 10, 1), (0, 0, overlap, 1)
        found = any_nms(boxes, scores, valid, iou_threshold=threshold, max_output=SMALL)
        assert len(kept_of(found)) == survivors, threshold


def close_pairs(count, threshold):
    """Pairs of nested boxes, a group each, whose overlap lies within a few ulp of the threshold."""
    generator = np.random.default_rng(8)
    width, height = generator.uniform(20, 900, (2, count)).astype(np.float32)
    part = (np.float32(threshold) * width).view(np.int32) + generator.integers(-3, 4, count).astype(np.int32)
    corners = np.zeros((2, count, 4), np.float32)
    corners[:, :, 2], corners[:, :, 3] = [width, part.view(np.float32)], height
    return corners.reshape(-1, 4), np.tile(np.arange(count, dtype=np.int32), 2)


def check_close_pairs(run, count, threshold):
    """Checks each pair: the second box is suppressed where the rounded quotient exceeds the threshold."""
    boxes, groups = close_pairs(count, threshold)
    scores, valid = -np.arange(2 * count, dtype=np.float32), np.ones(2 * count, bool)
    ious = np.array([oracles.iou(boxes[i], boxes[count + i]) for i in range(count)], np.float64)
    survives = ious <= threshold
    assert 0.2 < survives.mean() < 0.8
    found = run(boxes, scores, valid, groups=groups, iou_threshold=threshold, max_output=2 * count)
    assert kept_of(found) == [*range(count), *(count + np.flatnonzero(survives))]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_pairs_within_a_few_ulp_of_the_threshold_are_decided_exactly(threshold, any_nms):
    check_close_pairs(any_nms, 32, threshold)


@pytest.mark.gpu
@pytest.mark.parametrize("design", ["mask", "list"])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_on_a_gpu_pairs_within_a_few_ulp_of_the_threshold_are_decided_exactly(threshold, design, monkeypatch):
    monkeypatch.setattr(kernel, "design", lambda *sizes: design)
    kernel.keep_first.cache_clear()
    run = jax.jit(functools.partial(nms, implementation="mosaic"), static_argnames=STATIC)
    check_close_pairs(run, 4000, threshold)
    kernel.keep_first.cache_clear()


def test_all_invalid_keeps_nothing():
    boxes, scores = clustered(SMALL, seed=0)
    found = jitted_nms(boxes, scores, np.zeros(SMALL, bool), iou_threshold=0.5, max_output=SMALL)
    assert kept_of(found) == []


@pytest.mark.parametrize("valid", [True, False])
def test_single_box_survives_if_valid(valid, any_nms):
    found = any_nms(jnp.array([[1.0, 1, 5, 5]]), jnp.zeros(1), jnp.array([valid]), iou_threshold=0.5, max_output=3)
    assert found[0].shape == (3,)
    assert kept_of(found) == [0] * valid


def test_invalid_boxes_change_nothing_whatever_they_hold(any_nms):
    boxes, scores = clustered(SMALL, seed=4)
    valid = np.arange(SMALL) % 3 > 0
    clean = any_nms(boxes, scores, valid, iou_threshold=0.5, max_output=SMALL)
    for payload in (np.nan, np.inf, -np.inf):
        boxes[~valid], scores[~valid] = payload, payload
        dirty = any_nms(boxes, scores, valid, iou_threshold=0.5, max_output=SMALL)
        assert kept_of(dirty) == kept_of(clean)


def test_valid_boxes_with_nan_or_without_an_area_suppress_nothing(any_nms):
    """A box, its copies with NaN, with infinity, inverted and empty, each twice: only the first suppresses a box."""
    box = np.float32([2, 3, 30, 40])
    kinds = [box, [np.nan, 3, 30, 40], [2, 3, np.inf, 40], [30, 40, 2, 3], [30, 3, 2, 40], [7, 7, 7, 9]]
    boxes = np.repeat(np.float32(kinds), 2, axis=0)
    scores, valid = -np.arange(12, dtype=np.float32), np.ones(12, bool)
    found = any_nms(boxes, scores, valid, iou_threshold=0.3, max_output=12)
    assert kept_of(found) == [0, *range(2, 12)]


def test_boxes_with_nan_scores_come_last(any_nms):
    """Of three pairs of equal boxes, the one with a NaN score is suppressed, or is kept after all others."""
    boxes = np.repeat(np.float32([[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]]), 2, axis=0)
    scores = np.float32([np.nan, 0.1, 0.9, np.nan, np.nan, np.nan])
    found = any_nms(boxes, scores, np.ones(6, bool), iou_threshold=0.5, max_output=6)
    assert kept_of(found) == [2, 1, 4]


def test_vmap_equals_the_loop():
    examples = [clustered(SMALL, seed) for seed in range(4)]
    boxes, scores = map(np.stack, zip(*examples, strict=True))
    valid = np.random.default_rng(0).random((4, SMALL)) < 0.8
    valid[3] = False  # a finished row waits for the others
    run = functools.partial(jitted_nms, iou_threshold=0.5, max_output=SMALL)
    together = jax.vmap(run)(boxes, scores, valid)
    for row in range(4):
        alone = run(boxes[row], scores[row], valid[row])
        np.testing.assert_array_equal(together[0][row], alone[0])
        np.testing.assert_array_equal(together[1][row], alone[1])


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1])
def test_threshold_outside_0_to_1_is_an_error(threshold):
    with pytest.raises(ValueError, match=str(threshold)):
        nms(jnp.zeros((2, 4)), jnp.zeros(2), jnp.ones(2, bool), iou_threshold=threshold, max_output=1)


def test_max_output_of_0_is_an_error():
    with pytest.raises(ValueError, match="max_output"):
        nms(jnp.zeros((2, 4)), jnp.zeros(2), jnp.ones(2, bool), iou_threshold=0.5, max_output=0)


def test_no_boxes_keep_nothing():
    indices, valid = nms(jnp.zeros((0, 4)), jnp.zeros(0), jnp.zeros(0, bool), iou_threshold=0.5, max_output=3)
    np.testing.assert_array_equal(indices, np.zeros(3))
    assert not valid.any()
