"""Your own pictures in a VOC folder, trained from nothing on a CPU or a GPU: 320 x 240 pixels, a thin ResNet-18.

    python train.py --config configs/folder.py --data.root FOLDER --data.class_names NAME NAME --run runs/NAME

For pictures whose objects are roughly 15 to 200 pixels once the shorter side is 240.
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
    RoiAlignConfig,
    RoiSamplingConfig,
    RpnConfig,
    TrainConfig,
)

config = Config(
    run=Path("runs/folder"),
    data=DataConfig(root=Path("data/folder")),
    model=ModelConfig(
        image=ImageConfig(short_side=240, long_side=320, canvases=((240, 320), (320, 240))),
        backbone=BackboneConfig(depth=18, width=32, stride=8, norm="group", mask_padding=True),
        rpn=RpnConfig(anchor_sizes=(20.0, 40.0, 80.0, 160.0), channels=128, anchors_per_image=128),
        train_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=300, min_size=4.0),
        test_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=150, min_size=4.0),
        roi_sampling=RoiSamplingConfig(rois_per_image=64, fg_fraction=0.5),
        roi_align=RoiAlignConfig(output_size=7),
        box_head=BoxHeadConfig(summary="flatten"),
        postprocess=PostprocessConfig(nms_threshold=0.4),
    ),
    train=TrainConfig(
        steps=600,
        batch_size=4,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.01,
        warmup_steps=30,
        checkpoint_every=200,
        evaluate_every=200,
    ),
)
