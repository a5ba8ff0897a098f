"""All settings of one run."""

import dataclasses
from pathlib import Path
from typing import Literal

from fasterrcnn_jax.config.checks import AUTO, Auto, require
from fasterrcnn_jax.config.data import DataConfig
from fasterrcnn_jax.config.model import ModelConfig
from fasterrcnn_jax.config.train import DistributedConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one run."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    run: Path
    """run folder, which receives the configuration, metrics, checkpoints and images; {data} in it stands for the name
    of the data folder; where a folder of that name holds another run, -2, -3 and so on is added"""
    size: int | Auto | None = None
    """length of the longer image side in the network, in pixels; it sets model.image.short_side, long_side and
    canvases; auto: 320, or more where objects would be small; None: model.image decides"""
    init: Literal["imagenet"] | Path | None = None
    """weights that a new run starts from: a run folder (its best checkpoint), one checkpoint RUN/checkpoints/STEP, or a
    weights file, ours or another program's; the classes may differ; imagenet: the ImageNet weights of an installed
    package (a path of that name is ./imagenet); None: random weights"""
    replay: Path | None = None
    """a file in RUN/failed, written when a number was not finite; instead of training, repeat that step image by image
    and show where the first such number appears"""
    distributed: DistributedConfig = DistributedConfig()
    """processes of the run, one command on each host; see docs/scaling.md"""

    def __post_init__(self):
        rois = self.model.roi_sampling.rois_per_batch
        require(
            rois is None or rois % self.train.batch_size == 0,
            f"rois_per_batch must be a multiple of batch_size, got {rois} and {self.train.batch_size}",
        )
        require(
            self.train.scheme != "fast_rcnn" or self.data.proposals is not None,
            "train.scheme fast_rcnn needs data.proposals, a file of proposals, got None",
        )
        if self.size is not None and self.size != AUTO:
            require(self.size >= 32, f"size must be at least 32, got {self.size}")
        largest = max(self.data.augment.short_sides, default=0)
        require(
            largest <= self.model.image.short_side,
            f"data.augment.short_sides must be at most model.image.short_side, got {largest} and "
            f"{self.model.image.short_side}",
        )
