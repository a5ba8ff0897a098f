"""Your own images in a VOC folder: a thin ResNet-18 at 320 x 240 pixels, trained from random weights on a CPU or GPU.

    python train.py --config configs/folder.py --data.root FOLDER --data.class_names NAME NAME --run runs/NAME

It suits objects of roughly 15 to 200 pixels in an image whose shorter side is resized to 240 pixels.
"""

from pathlib import Path

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxHeadConfig,
    Config,
    DataConfig,
    ImageConfig,
    ModelConfig,
    PostprocessConfig,
    ProposalConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
    RpnConfig,
    TrainConfig,
)
from fasterrcnn_jax.config.families import IMAGENET_RGB

config = Config(
    run=Path("runs/folder"),
    data=DataConfig(
        root=Path("data/folder"),
        keep_empty=True,
        flip="random",
        crop_aspect=None,
        rank_by_aspect=False,
    ),
    model=ModelConfig(
        image=ImageConfig(short_side=240, long_side=320, canvases=((240, 320), (320, 240)), **IMAGENET_RGB),
        backbone=BackboneConfig(
            name="resnet18",
            width=32,
            stride=8,
            norm="group",
            stem_pool="padded",
            fixed_stages=0,
            mask_padding=True,
        ),
        rpn=RpnConfig(
            anchor_scales=(1.25, 2.5, 5.0, 10.0),
            anchor_rounding="none",
            allowed_border=None,
            channels=128,
            anchors_per_image=128,
        ),
        train_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=300, min_size=8.0),
        test_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=150, min_size=8.0),
        roi_sampling=RoiSamplingConfig(rois_per_image=64, fg_fraction=0.5),
        roi_features=RoiFeaturesConfig(aligned=True, sampling_ratio=2),
        box_head=BoxHeadConfig(summary="flatten"),
        postprocess=PostprocessConfig(nms_threshold=0.4),
    ),
    train=TrainConfig(
        steps=600,
        batch_size=4,
        optimizer="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        weight_decay=0.01,
        double_bias=False,
        double_objectness=False,
        clip_norm=10.0,
        warmup_steps=30,
        checkpoint_every=200,
        evaluate_every=200,
    ),
)
