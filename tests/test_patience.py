"""Early stopping: `train.patience`."""

import math

import pytest
import tiny

from fasterrcnn_jax.config import TrainConfig
from fasterrcnn_jax.training.checkpoint import Best
from fasterrcnn_jax.training.patience import Patience

TRAIN = TrainConfig(steps=100, batch_size=1, learning_rate=0.1, checkpoint_every=10, evaluate_every=10, patience=2)


def over_at(metrics, *, best=None, first=10):
    """Returns the step of the evaluation that ends a training; None if none does."""
    patience = Patience(TRAIN, best)
    for step, metric in zip(range(first, 101, 10), metrics):
        patience.measured(step, metric)
        if patience.is_over(step):
            return step
    return None


@pytest.mark.parametrize(
    ("metrics", "end"),
    [
        ([0.1, 0.2, 0.3, 0.4], None),
        ([0.3, 0.2, 0.1, 0.4], 30),
        ([0.3, 0.2, 0.4, 0.3, 0.3], 50),
        ([0.3, 0.3, 0.3, 0.2, 0.2], 50),  # an equal metric is as good as the best one
        ([0.3, None, math.nan], 30),  # an undefined metric is no better one
        ([None, None, None, 0.1, 0.0], None),  # a training without any metric has no best evaluation
    ],
)
def test_a_training_ends_after_that_many_evaluations_in_a_row_without_a_better_one(metrics, end):
    assert over_at(metrics) == end


def test_a_continued_training_counts_on_from_its_best_checkpoint():
    assert over_at([0.2], best=Best(20, 0.3), first=40) == 40
    assert over_at([0.4, 0.3], best=Best(20, 0.3), first=40) is None
    assert Patience(TRAIN, Best(20, 0.3)).is_over(40)


def test_without_patience_a_training_never_ends_early():
    patience = Patience(tiny.TrainConfig(steps=9, batch_size=1, learning_rate=0.1), Best(1, 1.0))
    assert not patience.is_over(1_000_000)
