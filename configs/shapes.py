"""Four kinds of shapes on textured ground, drawn on first use: trains from nothing on two CPU cores.

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
    RoiAlignConfig,
    RoiSamplingConfig,
    RpnConfig,
    ShapesConfig,
    TrainConfig,
)
from fasterrcnn_jax.data.shapes import CLASS_NAMES

config = Config(
    run=Path("runs/shapes"),
    data=DataConfig(
        root=Path("data/shapes"),
        class_names=CLASS_NAMES,
        max_boxes=16,
        shapes=ShapesConfig(num_train=1000, num_test=200),
    ),
    model=ModelConfig(
        image=ImageConfig(short_side=160, long_side=224, canvases=((160, 224), (224, 160))),
        backbone=BackboneConfig(depth=18, width=16, stride=8, norm="group", mask_padding=True),
        rpn=RpnConfig(anchor_sizes=(16.0, 32.0, 64.0), channels=128, anchors_per_image=128),
        train_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=200, min_size=4.0),
        test_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=60, min_size=4.0),
        roi_sampling=RoiSamplingConfig(rois_per_image=24, fg_fraction=0.5),
        roi_align=RoiAlignConfig(output_size=7),
        box_head=BoxHeadConfig(summary="flatten"),
    ),
    train=TrainConfig(
        steps=1200,
        batch_size=8,
        optimizer="adamw",
        learning_rate=1.2e-3,
        weight_decay=0.01,
        warmup_steps=30,
        checkpoint_every=400,
    ),
)
