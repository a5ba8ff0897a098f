"""Faster R-CNN with ResNet-101 on COCO: train2017 to val2017, short side 800.

    python train.py --config configs/coco.py --data.root data/coco

The res101_ls.yml of faster-rcnn.pytorch: four anchor scales from 64 pixels up, short side 800, long side at most
1200, 1000 proposals in detection, 16 images over 8 devices, 6 epochs with mirrored copies, learning rate 1e-2 and
a tenth of it after 4. Published there, for the sets trainval35k and minival of 2014, which are almost these: AP
36.2 in 6 x 6.0 hours on 8 GPUs, 11 GB each.
The reference starts from Caffe's weights trained on ImageNet: give the file with --init. Without it this starts from
random ones, and no such figure is to be expected. We have not measured it: neither the figure nor the time.
"""

from pathlib import Path

from fasterrcnn_jax.config import Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import RESNET_TRAINING, coco_scales, resnet_c4
from fasterrcnn_jax.data.coco import CLASS_NAMES

# train2017 holds 118,287 images, 117,266 of them with objects; each once more mirrored, 16 in a batch.
EPOCH = 2 * 117_266 // 16

config = Config(
    run=Path("runs/coco"),
    data=DataConfig(
        root=Path("data/coco"),
        layout="coco",
        class_names=CLASS_NAMES,
        train_split="train2017",
        test_split="val2017",
    ),
    model=coco_scales(resnet_c4(101)),
    train=TrainConfig(
        steps=6 * EPOCH,
        batch_size=16,
        learning_rate=1e-2,
        decay_steps=(4 * EPOCH,),
        checkpoint_every=2000,
        **RESNET_TRAINING,
    ),
)
