"""Early stopping: ends a training whose evaluations no longer become better (`train.patience`)."""

import math

from fasterrcnn_jax.config import TrainConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.training.checkpoint import Best


class Patience:
    """Counts the evaluations since the best one. It depends on the checkpoints alone, so a continued run counts on."""

    def __init__(self, train: TrainConfig, best: Best | None):
        """Starts at the best checkpoint of the run, if there is one."""
        self._patience, self._every = train.patience, fitted(train.evaluate_every, "train.evaluate_every")
        self._best = best

    def measured(self, step: int, metric: float | None) -> None:
        """Notes the metric of an evaluation; of equal metrics, the last is the best one, as in `checkpoint.best`."""
        if metric is None or math.isnan(metric):
            return
        if self._best is None or metric >= self._best.metric:
            self._best = Best(step, metric)

    def is_over(self, step: int) -> bool:
        """Returns whether `train.patience` evaluations in a row were below the best one, at an evaluated step."""
        if self._patience is None or self._best is None:
            return False
        return (step - self._best.step) // self._every >= self._patience
