"""All settings, as frozen dataclasses. They are hashable, so compiled functions take them as static arguments.

The docstring under a field is its help text on the command line. The defaults come from py-faster-rcnn and
faster-rcnn.pytorch; docs/reference.md names the place of each default in their code.
"""

from fasterrcnn_jax.config.data import AugmentConfig, DataConfig, ShapesConfig
from fasterrcnn_jax.config.model import (
    BackboneConfig,
    BoxCoderConfig,
    BoxHeadConfig,
    FpnConfig,
    ImageConfig,
    LossConfig,
    ModelConfig,
    PostprocessConfig,
    ProposalConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
    RpnConfig,
    TtaConfig,
)
from fasterrcnn_jax.config.run import Config
from fasterrcnn_jax.config.train import (
    AlternatingConfig,
    DistributedConfig,
    TrainConfig,
)

__all__ = [
    "AlternatingConfig",
    "AugmentConfig",
    "BackboneConfig",
    "BoxCoderConfig",
    "BoxHeadConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "FpnConfig",
    "ImageConfig",
    "LossConfig",
    "ModelConfig",
    "PostprocessConfig",
    "ProposalConfig",
    "RoiFeaturesConfig",
    "RoiSamplingConfig",
    "RpnConfig",
    "ShapesConfig",
    "TrainConfig",
    "TtaConfig",
]
