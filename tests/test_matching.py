"""Foreground, background and ignored, by intersection over union."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.ops import matching
from fasterrcnn_jax.ops.boxes import pairwise_iou
from fasterrcnn_jax.ops.matching import match, match_boxes

N, G = 12, 4
RPN = dict(fg_iou=0.7, bg_iou=(0.0, 0.3), low_quality=True)
HEAD = dict(fg_iou=0.5, bg_iou=(0.1, 0.5), low_quality=False)

jitted_match = functools.partial(jax.jit, static_argnames=("fg_iou", "bg_iou", "low_quality", "clobber_positives"))(
    match
)

# Few values, including the thresholds and their float32 neighbours, so that many IoUs are equal.
LEVELS = [np.float32(v) for v in (0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 1)]
LEVELS += [np.nextafter(np.float32(v), np.float32(0)) for v in (0.1, 0.3, 0.5, 0.7)]
ious = arrays(np.float32, (N, G), elements=st.sampled_from(LEVELS))


@pytest.mark.parametrize("options", [RPN, HEAD, RPN | dict(low_quality=False), RPN | dict(clobber_positives=True)])
@given(ious, arrays(bool, G))
def test_match_equals_the_loop(options, iou, gt_valid):
    found = jitted_match(iou, gt_valid, **options)
    indices, labels = oracles.match(iou, gt_valid, **options)
    assert np.asarray(found.labels).tolist() == labels
    assert np.asarray(found.matched_gt_indices).tolist() == indices


@given(ious, arrays(np.float32, (N, 2), elements=st.sampled_from([0, 1, 5, np.nan])))
def test_padding_changes_nothing_whatever_it_holds(iou, garbage):
    iou[:, 2:] = garbage
    found = jitted_match(iou, np.arange(G) < 2, **RPN)
    indices, labels = oracles.match(iou[:, :2], np.ones(2, bool), **RPN)
    assert np.asarray(found.labels).tolist() == labels
    assert np.asarray(found.matched_gt_indices).tolist() == indices


@given(ious)
def test_every_touched_ground_truth_has_a_foreground_box(iou):
    labels = np.asarray(jitted_match(iou, np.ones(G, bool), **RPN).labels)
    for column in iou.T:
        if column.max() > 0:
            assert (labels[column == column.max()] == 1).all()  # all of them, on ties


def column(*values):
    return jnp.asarray(values, jnp.float32)[:, None]


def test_thresholds_at_equality():
    below = [float(np.nextafter(np.float32(v), np.float32(0))) for v in (0.5, 0.3, 0.1)]
    iou = column(0.5, below[0], 0.3, below[1], 0.1, below[2])
    found = match(iou, jnp.array([True]), fg_iou=0.5, bg_iou=(0.1, 0.3), low_quality=False)
    assert found.labels.tolist() == [1, -1, -1, 0, 0, -1]


def test_without_valid_ground_truth_everything_is_background():
    found = jitted_match(np.ones((N, G), np.float32), np.zeros(G, bool), **RPN)
    assert not np.asarray(found.labels).any() and not np.asarray(found.matched_gt_indices).any()


def test_without_valid_ground_truth_a_raised_background_ignores_everything():
    found = jitted_match(np.ones((N, G), np.float32), np.zeros(G, bool), **HEAD)
    assert (np.asarray(found.labels) == -1).all()


def test_a_ground_truth_that_nothing_touches_makes_nothing_foreground():
    iou = jnp.array([[0.9, 0.0], [0.0, 0.0]])
    assert match(iou, jnp.ones(2, bool), **RPN).labels.tolist() == [1, 0]


def test_a_low_quality_match_keeps_the_ground_truth_it_overlaps_most():
    iou = jnp.array([[0.4, 0.2], [0.6, 0.1]])  # box 0 is the best of ground truth 1
    found = match(iou, jnp.ones(2, bool), **RPN)
    assert found.labels.tolist() == [1, 1] and found.matched_gt_indices.tolist() == [0, 0]


@pytest.mark.parametrize("clobber_positives, labels", [(False, [1, 1, 1, 0]), (True, [0, 0, 1, 0])])
def test_background_overrides_a_best_box_only_with_clobber_positives(clobber_positives, labels):
    """Two boxes tie for ground truth 0 with a background IoU; the best IoU with 1 is between the thresholds."""
    iou = jnp.array([[0.2, 0.0], [0.2, 0.0], [0.0, 0.4], [0.1, 0.2]])
    found = match(iou, jnp.ones(2, bool), **RPN, clobber_positives=clobber_positives)
    assert found.labels.tolist() == labels


@pytest.mark.parametrize("fg_iou, bg_iou", [(0.3, (0.0, 0.5)), (0.5, (0.5, 0.5)), (1.1, (0.0, 0.5))])
def test_thresholds_out_of_order_are_an_error(fg_iou, bg_iou):
    with pytest.raises(ValueError, match="bg_iou"):
        match(jnp.zeros((1, 1)), jnp.ones(1, bool), fg_iou=fg_iou, bg_iou=bg_iou, low_quality=False)


# Corners on few points, so that many boxes are equal and many IoUs tie, within blocks and between them.
corners = arrays(np.int32, (9, 2, 2), elements=st.integers(0, 4)).map(
    lambda points: (4 * np.sort(points, axis=1)).reshape(-1, 4).astype(np.float32)
)


@pytest.mark.parametrize("options", [RPN, HEAD, RPN | dict(clobber_positives=True)])
@pytest.mark.parametrize(("g", "at_once"), [(7, 16), (7, 3), (9, 1)])
def test_match_boxes_equals_match_for_any_number_of_boxes_at_once(monkeypatch, options, g, at_once):
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 9 * at_once)
    blocked = jax.jit(functools.partial(match_boxes, **options))
    whole = jax.jit(
        lambda boxes, others, valid, gt_valid: match(
            jnp.where(valid[:, None], pairwise_iou(boxes, others), 0.0), gt_valid, **options
        )
    )

    @given(corners, corners, arrays(bool, 9), arrays(bool, 9))
    def check(boxes, others, valid, gt_valid):
        arguments = boxes, others[:g], valid, gt_valid[:g]
        for found, expected in zip(blocked(*arguments), whole(*arguments), strict=True):
            np.testing.assert_array_equal(found, expected)

    check()


def test_match_boxes_without_objects_finds_background_only():
    found = match_boxes(np.ones((N, 4), np.float32), np.zeros((0, 4), np.float32), **RPN)
    assert not np.asarray(found.labels).any() and not np.asarray(found.matched_gt_indices).any()


def test_the_memory_of_match_boxes_does_not_grow_with_the_objects(monkeypatch):
    def memory(g):
        shapes = [jax.ShapeDtypeStruct((rows, 4), jnp.float32) for rows in (5_000, g)]
        return (
            jax.jit(functools.partial(match_boxes, **RPN)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        )

    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 80_000)
    few, many = memory(16), memory(1600)
    # The IoU of all pairs alone has 32 MB.
    assert many < few + 1_000_000 and few < 1_000_000


def test_match_boxes_takes_a_symbolic_number_of_boxes_and_objects():
    n, g = jax.export.symbolic_shape("n, g")
    shapes = [jax.ShapeDtypeStruct((size, 4), jnp.float32) for size in (n, g)]
    exported = jax.export.export(jax.jit(functools.partial(match_boxes, **RPN)))(*shapes)
    boxes, others = np.float32([(0, 0, 8, 8), (9, 9, 20, 20)]), np.float32([(0, 0, 8, 9), (1, 1, 8, 8), (30, 0, 40, 9)])
    for found, expected in zip(exported.call(boxes, others), match_boxes(boxes, others, **RPN), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_match_boxes_runs_where_jax_checks_what_varies_over_devices(monkeypatch):
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 4)
    boxes = jnp.asarray(np.tile(np.float32([(0, 0, 8, 8), (9, 9, 20, 20)]), (2, 1)))
    mesh, spec = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",)), jax.sharding.PartitionSpec("x")
    call = functools.partial(match_boxes, **RPN)
    found = jax.jit(jax.shard_map(lambda boxes: call(boxes, boxes), mesh=mesh, in_specs=spec, out_specs=spec))(boxes)
    assert found.labels.tolist() == [1, 1, 1, 1] and found.matched_gt_indices.tolist() == [0, 1, 0, 1]


def test_a_gradient_keeps_no_iou_of_all_pairs(monkeypatch):
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 4_000)
    boxes, others = jnp.ones((200, 4)), jnp.ones((100, 4))

    def labels(boxes):
        return match_boxes(boxes, others, **RPN).labels.astype(jnp.float32)

    equations = jax.make_jaxpr(lambda boxes: jax.vjp(labels, boxes)[1](jnp.ones(200)))(boxes).eqns
    assert max(value.aval.size for equation in equations for value in equation.outvars) < 200 * 100
