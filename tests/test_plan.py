"""Tests the plan of batches: every image once, one canvas per batch, the same plan in every process."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fasterrcnn_jax.data.plan import plan_batches, plan_epoch

CANVASES = ((64, 96), (96, 64), (96, 96))
LAYOUT = st.lists(st.sampled_from(CANVASES), min_size=1, max_size=40)
BATCH_SIZE = st.integers(1, 7)


def members(batches):
    return [int(index) for batch in batches for index in batch.image_index[batch.image_valid]]


def as_lists(batches):
    return [(batch.canvas, batch.image_index.tolist(), batch.image_valid.tolist()) for batch in batches]


@given(LAYOUT, BATCH_SIZE, st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_meets_every_image_exactly_once(canvases, batch_size, seed, epoch):
    batches = plan_epoch(canvases, batch_size, seed=seed, epoch=epoch)
    assert sorted(members(batches)) == list(range(len(canvases)))


@given(LAYOUT, BATCH_SIZE, st.integers(0, 5))
def test_a_batch_has_one_canvas_and_one_size(canvases, batch_size, seed):
    for batch in plan_epoch(canvases, batch_size, seed=seed, epoch=0):
        assert batch.image_index.shape == batch.image_valid.shape == (batch_size,)
        assert batch.image_index.dtype == np.int32
        assert {canvases[index] for index in members([batch])} == {batch.canvas}


@given(LAYOUT, BATCH_SIZE, st.integers(0, 5))
def test_only_the_last_batch_of_a_canvas_is_filled_with_invalid_rows(canvases, batch_size, seed):
    batches = plan_epoch(canvases, batch_size, seed=seed, epoch=0)
    for canvas in set(canvases):
        valid = [batch.image_valid for batch in batches if batch.canvas == canvas]
        assert len(valid) == -(-canvases.count(canvas) // batch_size)
        assert sum(not rows.all() for rows in valid) == (canvases.count(canvas) % batch_size > 0)
        assert all(rows[0] and (np.diff(rows.astype(int)) <= 0).all() for rows in valid)
    assert all((batch.image_index[~batch.image_valid] == 0).all() for batch in batches)


@given(LAYOUT, BATCH_SIZE, st.integers(0, 5), st.integers(0, 5))
def test_the_plan_follows_from_seed_and_epoch_alone(canvases, batch_size, seed, epoch):
    first, again = (as_lists(plan_epoch(canvases, batch_size, seed=seed, epoch=epoch)) for _ in range(2))
    assert first == again


def test_epochs_and_seeds_differ_in_grouping_and_in_order():
    canvases = [CANVASES[0]] * 24 + [CANVASES[1]] * 16
    plans = [
        as_lists(plan_epoch(canvases, 4, seed=seed, epoch=epoch))
        for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    ]
    groups = {frozenset(frozenset(index) for _, index, _ in plan) for plan in plans}
    orders = {tuple(canvas for canvas, _, _ in plan) for plan in plans}
    assert len(groups) == len(plans) and len(orders) == len(plans)


def test_canvases_are_mixed_within_an_epoch():
    """Otherwise all portraits would train last, at the lowest learning rate."""
    canvases = [CANVASES[0]] * 40 + [CANVASES[1]] * 40
    order = [batch.canvas for batch in plan_epoch(canvases, 4, seed=0, epoch=0)]
    changes = sum(a != b for a, b in zip(order, order[1:]))
    assert changes > 3


def test_the_plan_of_an_evaluation_keeps_the_order_of_the_data_set():
    canvases = [CANVASES[0], CANVASES[1], CANVASES[0], CANVASES[0]]
    batches = plan_batches(canvases, np.arange(4), 2)
    assert as_lists(batches) == [
        ((64, 96), [0, 2], [True, True]),
        ((64, 96), [3, 0], [True, False]),
        ((96, 64), [1, 0], [True, False]),
    ]


ASPECTS = st.lists(st.sampled_from([0.5, 0.75, 1.0, 4 / 3, 2.0]), min_size=40, max_size=40)


@given(LAYOUT, ASPECTS, BATCH_SIZE, st.integers(0, 5), st.integers(0, 5))
def test_a_ranked_epoch_meets_every_image_once_in_the_order_of_aspects(canvases, aspects, batch_size, seed, epoch):
    aspects = np.array(aspects[: len(canvases)])
    batches = plan_epoch(canvases, batch_size, seed=seed, epoch=epoch, aspects=aspects)
    assert sorted(members(batches)) == list(range(len(canvases)))
    for canvas in set(canvases):
        of_canvas = [members([batch]) for batch in batches if batch.canvas == canvas]
        assert {canvases[index] for indices in of_canvas for index in indices} == {canvas}
        ranges = sorted((aspects[indices] for indices in of_canvas), key=lambda a: (a[0], a[-1]))
        assert (np.diff(np.concatenate(ranges)) >= 0).all()  # neighbours, with no overlap beyond ties


def test_ranked_batches_are_shuffled_and_ties_are_grouped_anew_each_epoch():
    canvases, aspects = [CANVASES[0]] * 32, np.repeat([1.0, 1.25, 1.5, 2.0], 8)
    plans = [plan_epoch(canvases, 4, seed=0, epoch=epoch, aspects=aspects) for epoch in range(4)]
    orders = [tuple(aspects[batch.image_index[0]] for batch in plan) for plan in plans]
    assert all(list(order) != sorted(order) for order in orders) and len(set(orders)) > 1
    groups = {frozenset(frozenset(batch.image_index.tolist()) for batch in plan) for plan in plans}
    assert len(groups) == len(plans)
    for plan in plans:
        assert all(len(set(aspects[batch.image_index])) == 1 for batch in plan)


def test_without_aspects_the_plan_is_the_shuffle_alone():
    canvases = [CANVASES[0]] * 24
    ranked = as_lists(plan_epoch(canvases, 4, seed=0, epoch=0, aspects=np.ones(24)))
    assert ranked == as_lists(plan_epoch(canvases, 4, seed=0, epoch=0))  # all ties
    aspects = np.linspace(0.5, 2.0, 24)
    assert ranked != as_lists(plan_epoch(canvases, 4, seed=0, epoch=0, aspects=aspects))
