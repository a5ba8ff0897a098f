"""Your own images, in a folder as a labelling tool writes it: a thin ResNet-18, trained from random weights.

    fasterrcnn-jax train FOLDER
    python train.py --config configs/folder.py --data.root FOLDER

The layout, the classes and the splits are recognised; the input size, the anchors and the number of steps are fitted to
the images. Every fitted value is printed and stored in the run folder.
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
    run=Path("runs/{data}"),
    size="auto",
    data=DataConfig(
        root=Path("data/folder"),
        layout="auto",
        split="auto",
        keep_empty=True,
        flip="random",
        crop_aspect=None,
        rank_by_aspect=False,
    ),
    model=ModelConfig(
        image=ImageConfig(short_side=320, long_side=320, canvases="auto", **IMAGENET_RGB),
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
            anchor_scales="auto",
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
        steps="auto",
        batch_size=4,
        optimizer="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        weight_decay=0.01,
        double_bias=False,
        double_objectness=False,
        clip_norm=10.0,
        warmup_steps="auto",
        checkpoint_every="auto",
        evaluate_every="auto",
    ),
)
