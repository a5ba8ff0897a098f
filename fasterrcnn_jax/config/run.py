"""The settings of one run: all the others together."""

import dataclasses
from pathlib import Path

from fasterrcnn_jax.config.checks import (
    require,
)
from fasterrcnn_jax.config.data import DataConfig
from fasterrcnn_jax.config.model import ModelConfig
from fasterrcnn_jax.config.train import DistributedConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    run: Path
    """folder of the run: configuration, metrics, checkpoints, images"""
    init: Path | None = None
    """file of weights that a new run starts from, of ours (weights convert) or another program; classes may differ;
    None: random ones"""
    replay: Path | None = None
    """a file in RUN/failed, written when a number was not finite: make that step again, image by image, and say where
    the first such number stands, in place of training"""
    distributed: DistributedConfig = DistributedConfig()
    """the processes of the run, one command on each host; docs/scaling.md"""

    def __post_init__(self):
        rois = self.model.roi_sampling.rois_per_batch
        require(
            rois is None or rois % self.train.batch_size == 0,
            f"rois_per_batch must be a multiple of batch_size, got {rois} and {self.train.batch_size}",
        )
        largest = max(self.data.augment.short_sides, default=0)
        require(
            largest <= self.model.image.short_side,
            f"data.augment.short_sides must be at most model.image.short_side, got {largest} and "
            f"{self.model.image.short_side}",
        )
