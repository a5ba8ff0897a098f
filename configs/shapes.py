"""Four classes of shapes on textured backgrounds, drawn on first use. Trains from random weights on two CPU cores.

python train.py --config configs/shapes.py
"""

from pathlib import Path

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxHeadConfig,
    Config,
    DataConfig,
    ImageConfig,
    ModelConfig,
    ProposalConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
    RpnConfig,
    ShapesConfig,
    TrainConfig,
)
from fasterrcnn_jax.config.families import IMAGENET_RGB
from fasterrcnn_jax.data.shapes import CLASS_NAMES

config = Config(
    run=Path("runs/shapes"),
    data=DataConfig(
        root=Path("data/shapes"),
        class_names=CLASS_NAMES,
        max_boxes=16,
        keep_empty=True,
        flip="random",
        crop_aspect=None,
        rank_by_aspect=False,
        shapes=ShapesConfig(num_train=1000, num_test=200),
    ),
    model=ModelConfig(
        image=ImageConfig(short_side=160, long_side=224, canvases=((160, 224), (224, 160)), **IMAGENET_RGB),
        backbone=BackboneConfig(
            name="resnet18",
            width=16,
            stride=8,
            norm="batch",
            stem_pool="padded",
            fixed_stages=0,
            mask_padding=True,
        ),
        rpn=RpnConfig(
            anchor_scales=(1.0, 2.0, 4.0),
            anchor_rounding="none",
            allowed_border=None,
            channels=128,
            anchors_per_image=128,
        ),
        train_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=200, min_size=4.0),
        test_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=60, min_size=4.0),
        roi_sampling=RoiSamplingConfig(rois_per_image=16, fg_fraction=0.5),
        roi_features=RoiFeaturesConfig(aligned=True, sampling_ratio=2),
        box_head=BoxHeadConfig(summary="flatten"),
    ),
    train=TrainConfig(
        steps=750,
        batch_size=8,
        optimizer="adamw",
        learning_rate=1.5e-3,
        schedule="cosine",
        weight_decay=0.01,
        double_bias=False,
        double_objectness=False,
        clip_norm=10.0,
        ema_decay=0.99,
        warmup_steps=30,
        checkpoint_every=250,
    ),
)
