"""Plain NMS on a CPU: it equals the loop and the form of other devices, and does only the work that is needed."""

import functools

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from oracles import arrays
from test_nms import clustered, kept_of

from fasterrcnn_jax.ops import suppression, suppression_on_cpu
from fasterrcnn_jax.ops.suppression import nms

THRESHOLD = 0.5
N = 41  # several of the chunks below, and a part of one
CHUNK, BLOCK, ROWS = 16, 4, 6


@functools.cache
def small(max_output, batch=(), count=N, suppressed=suppression_on_cpu._suppressed):
    """Returns the compiled function with sizes so small that few boxes fill chunks, slices, blocks and rows."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(CHUNK=CHUNK, BLOCK=BLOCK, ROWS=ROWS, _suppressed=suppressed).items():
            patch.setattr(suppression_on_cpu, name, value)
        keep = suppression_on_cpu.keep_first.__wrapped__(np.float32(THRESHOLD), max_output)
        types = np.float32, np.float32, np.bool_, np.int32
        shapes = [jax.ShapeDtypeStruct((*batch, count, *[4] * (i == 0)), dtype) for i, dtype in enumerate(types)]
        return jax.jit(jax.vmap(keep) if batch else keep).lower(*shapes).compile()


@functools.cache
def others(max_output):
    """Returns what other devices run."""
    return jax.jit(functools.partial(suppression._keep_first, threshold=np.float32(THRESHOLD), max_output=max_output))


def kept_by(function, *arrays):
    indices, count = function(*arrays)
    return np.asarray(indices)[: int(count)].tolist()


# Equal scores, both zeros, infinities, NaN, the lowest finite values, and a value that XLA takes for zero on a CPU.
LOWEST = np.finfo(np.float32).min
SCORES = [0.0, -0.0, 1.0, 2.5, -1.0, np.inf, -np.inf, np.nan, LOWEST, np.nextafter(LOWEST, np.float32(0)), 1e-40]
CORNERS = [0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 13.0]
boxes_scores_valid_groups = st.tuples(
    arrays(np.float32, (N, 2, 2), elements=st.sampled_from([np.float32(x) for x in CORNERS])),
    arrays(np.float32, N, elements=st.sampled_from([np.float32(x) for x in SCORES])),
    arrays(bool, N, elements=st.sampled_from([True, True, True, False])),
    arrays(np.int32, N, elements=st.integers(0, 2)),
    st.lists(st.tuples(st.integers(0, 4 * N - 1), st.sampled_from([np.nan, np.inf, -np.inf])), max_size=3),
)


def visits(scores, valid):
    """Returns scores for the loop, all different: by descending score, NaN last, ties by index."""
    scores = np.where(np.abs(scores) < np.finfo(np.float32).tiny, 0, scores)
    last = np.isnan(scores)
    order = sorted(np.flatnonzero(valid), key=lambda i: (last[i], 0 if last[i] else -scores[i], i))
    place = np.zeros(len(scores), np.float32)
    place[order] = -np.arange(len(order))
    return place


@pytest.mark.parametrize("form, max_output", [(small, N), (small, 7), (others, N)])
@given(boxes_scores_valid_groups)
def test_it_equals_the_loop_with_ties_nan_infinities_and_groups(form, max_output, example):
    corners, scores, valid, groups, odd = example
    boxes = np.sort(corners, axis=1).reshape(N, 4)
    for where, value in odd:
        boxes.flat[where] = value
    with np.errstate(invalid="ignore"):
        expected = oracles.greedy_nms(
            boxes, visits(scores, valid), valid, iou_threshold=THRESHOLD, max_output=max_output, groups=groups
        )
    assert kept_by(form(max_output), boxes, scores, valid, groups) == expected


@pytest.mark.parametrize("form", [small, others])
def test_boxes_with_scores_of_minus_infinity_and_nan_come_after_the_lowest_finite_score(form):
    scores = np.full(N, 1, np.float32)
    scores[:9] = np.float32([np.nan, -np.inf, LOWEST, np.nextafter(LOWEST, np.float32(0)), 0, -0.0, 0, np.nan, -np.inf])
    boxes = np.arange(N, dtype=np.float32)[:, None] * 20 + np.float32([0, 0, 10, 10])
    arguments = boxes, scores, np.arange(N) < 9, np.zeros(N, np.int32)
    assert kept_by(form(N), *arguments) == [4, 5, 6, 3, 2, 1, 8, 0, 7]


def test_it_equals_the_form_of_other_devices():
    boxes, scores = clustered(5000, seed=11)
    scores[:1000], scores[1000:1200] = np.nan, -np.inf
    valid = np.random.default_rng(0).random(5000) < 0.9
    groups = np.random.default_rng(1).integers(0, 2, 5000).astype(np.int32)
    assert valid.sum() > 2 * suppression_on_cpu.CHUNK
    run = functools.partial(nms, iou_threshold=THRESHOLD, max_output=400, implementation="xla")
    found = kept_of(jax.jit(run)(boxes, scores, valid, groups=groups))
    assert found == kept_by(others(400), boxes, scores, valid, groups)
    assert len(found) > suppression_on_cpu.BLOCK


# The work: pairs that are compared, counted while the program runs.

MANY = 320


pairs = []


def counting(candidates, others, threshold):
    size = candidates.groups.shape[0] * others.groups.shape[0]
    jax.debug.callback(lambda: pairs.append(size))
    return of_the_library(candidates, others, threshold)


of_the_library = suppression_on_cpu._suppressed


def compared(max_output, boxes, scores, valid):
    """Returns how many boxes are kept, and how many pairs are compared for them."""
    pairs.clear()
    run = small(max_output, scores.shape[:-1], MANY, counting)
    count = run(boxes, scores, valid, np.zeros(scores.shape, np.int32))[1].tolist()
    jax.effects_barrier()
    return count, sum(pairs)


def copies(objects, seed):
    """Boxes that are far apart, each several times with other scores, in random order."""
    of = np.random.default_rng(seed).permutation(MANY) % objects
    boxes = 20.0 * of[:, None].astype(np.float32) + np.float32([0, 0, 10, 10])
    return boxes, np.random.default_rng(seed + 1).random(MANY).astype(np.float32), np.ones(MANY, bool)


def test_boxes_are_compared_with_those_kept_so_far_alone():
    """320 copies of 7 boxes: with a slot for every box it would be 100,000 pairs."""
    count, pairs = compared(MANY, *copies(7, seed=0))
    assert count == 7
    # Rows of all boxes with two slices of kept ones, and some blocks.
    assert pairs < (MANY + 20 * ROWS) * 2 * BLOCK


def test_what_is_suppressed_is_not_compared_again():
    """Three of four boxes are copies of the best one: the others alone meet all 80 boxes that are kept."""
    boxes, scores, valid = copies(MANY, seed=2)
    boxes[MANY // 4 :], scores[-1] = boxes[-1], 1.0
    order = np.random.default_rng(3).permutation(MANY)
    count, pairs = compared(MANY, boxes[order], scores[order], valid)
    assert count == 81
    assert pairs < 80 * 80 + MANY * 3 * ROWS < MANY * 80 / 2


def test_it_stops_at_the_last_box_that_is_asked_for():
    count, pairs = compared(BLOCK, *copies(MANY, seed=4))
    assert count == BLOCK
    assert pairs <= BLOCK * BLOCK + (CHUNK + ROWS) * BLOCK


def test_boxes_that_are_not_valid_are_not_visited():
    boxes, scores, _ = copies(MANY, seed=6)
    count, pairs = compared(MANY, boxes, scores, np.arange(MANY) % 64 == 0)
    assert count == 5
    assert pairs <= 2 * (BLOCK * BLOCK + 2 * ROWS * BLOCK)


def test_an_image_of_a_batch_costs_what_it_costs_alone():
    problems = [copies(objects, seed=5) for objects in (5, MANY)]
    alone = [compared(MANY, *problem)[1] for problem in problems]
    count, together = compared(MANY, *map(np.stack, zip(*problems, strict=True)))
    assert count == [5, MANY]
    assert together == sum(alone) and alone[0] < alone[1] / 5


def test_a_program_holds_the_form_of_its_device_and_a_program_for_all_devices_both():
    run = jax.jit(functools.partial(nms, iou_threshold=THRESHOLD, max_output=3, implementation="xla"))
    shapes = jax.ShapeDtypeStruct((300, 4), np.float32), jax.ShapeDtypeStruct((300,), np.float32)
    for platforms, top_k in ((["cpu"], True), (["cuda"], False), (["cpu", "cuda"], True)):
        assert ("chlo.top_k" in export.export(run, platforms=platforms)(*shapes).mlir_module()) == top_k
