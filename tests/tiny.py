"""A detector and data sets that are small enough for tests."""

import contextlib
import dataclasses
import logging
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxHeadConfig,
    Config,
    DataConfig,
    FpnConfig,
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
from fasterrcnn_jax.config.text import to_json
from fasterrcnn_jax.data.records import Dataset, ImageRecord, box_areas
from fasterrcnn_jax.models import layers
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.ops import convolution

CLASS_NAMES = ("ring", "disc")
IMAGE = ImageConfig(short_side=64, long_side=96, canvases=((64, 96), (96, 64)), **IMAGENET_RGB)
MODEL = ModelConfig(
    image=IMAGE,
    backbone=BackboneConfig(
        name="resnet18", width=8, norm="group", stem_pool="padded", fixed_stages=0, mask_padding=True
    ),
    rpn=RpnConfig(
        anchor_scales=(1.0, 2.0),
        anchor_rounding="none",
        allowed_border=None,
        channels=8,
        anchors_per_image=24,
    ),
    train_proposals=ProposalConfig(pre_nms_top_n=64, post_nms_top_n=16, min_size=4.0),
    test_proposals=ProposalConfig(pre_nms_top_n=32, post_nms_top_n=8, min_size=4.0),
    roi_sampling=RoiSamplingConfig(rois_per_image=8, fg_fraction=0.5),
    roi_features=RoiFeaturesConfig(output_size=4, sampling_ratio=2, aligned=True),
    postprocess=PostprocessConfig(score_threshold=0.0, max_detections=6),
)

FPN = dataclasses.replace(
    MODEL,
    fpn=FpnConfig(channels=16, norm="group"),
    rpn=dataclasses.replace(MODEL.rpn, anchor_base=8.0, anchor_scales=(1.0,), anchor_centre="corner"),
    box_head=BoxHeadConfig(channels=16, dropout=0.0),
)


@contextlib.contextmanager
def quick_compilation():
    """Inside this context, programs compile much faster and run slower."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def restored_logging():
    """Restores the log and the compilation cache, which a script changes for its process."""
    names = (None, "fasterrcnn_jax", "absl", "asyncio")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers, cache = logging.getLogger().handlers[:], jax.config.jax_compilation_cache_dir
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger().handlers[:] = handlers
    jax.config.update("jax_compilation_cache_dir", cache)


@contextlib.contextmanager
def layers_of_a_gpu():
    """Traces convolutions and normalisation as for a GPU; everything else stays as it is on this device."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (layers, convolution):
            patch.setattr(module, "choice", types.SimpleNamespace(device=lambda: ("cuda", (9, 0))))
        yield


def quick_model(weights=None):
    """Returns a detector with the small network of docs/backbone.md, which compiles in little time, and its class.

    Args:
      weights: the fixture `random_weights`; None: initial weights.
    """
    text = (Path(__file__).parents[1] / "docs" / "backbone.md").read_text()
    example = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], example)
    config = dataclasses.replace(
        MODEL,
        backbone=dataclasses.replace(MODEL.backbone, own="my_nets:Tiny"),
        box_head=dataclasses.replace(MODEL.box_head, channels=16),
    )

    def build():
        return Detector(config, CLASS_NAMES, backbone=example["Tiny"], rng=np.random.default_rng(0))

    return (build() if weights is None else weights(build, seed=1)), example["Tiny"]


def config(folder: Path, **train) -> Config:
    """Returns the configuration of a run in `folder` on the data set in `folder`/voc; the first stage is fixed."""
    options = dict(steps=6, batch_size=4, learning_rate=0.01, warmup_steps=0, checkpoint_every=2)
    return Config(
        run=folder / "run",
        data=DataConfig(root=folder / "voc", class_names=CLASS_NAMES, max_boxes=4),
        model=dataclasses.replace(MODEL, backbone=dataclasses.replace(MODEL.backbone, fixed_stages=1)),
        train=TrainConfig(**(options | train)),
    )


def write_config(path: Path, config: Config) -> Path:
    """Writes a configuration file that builds `config`; returns its path."""
    path.write_text(
        f"from fasterrcnn_jax.config.text import from_json\n\nconfig = from_json({to_json(config)!r}, 'test')\n"
    )
    return path


def dataset(folder: Path, images, *, difficult=None, crowd=None, class_names=CLASS_NAMES) -> Dataset:
    """Writes (pixels, boxes, labels) triples as PNG files and returns their data set."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index, (pixels, boxes, labels) in enumerate(images):
        path = folder / f"{index:03d}.png"
        Image.fromarray(pixels).save(path)
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        flags = (
            np.zeros(len(labels), bool) if marks is None else np.array(marks[index], bool)
            for marks in (difficult, crowd)
        )
        arrays = boxes, np.array(labels, np.int32), *flags, box_areas(boxes)
        records.append(ImageRecord(path.stem, path, pixels.shape[:2], *arrays))
    category_ids = tuple(range(1, len(class_names) + 1))
    return Dataset(f"{folder.name} (tiny)", class_names, tuple(records), (), category_ids)


def rectangle_image(image_hw, box, *, colour=(250, 30, 40), seed=0):
    """Returns a dim noise image [h, w, 3] with one bright rectangle at integer xyxy `box`."""
    pixels = np.random.default_rng(seed).integers(0, 60, (*image_hw, 3), dtype=np.uint8)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = colour
    return pixels


def write_voc(root: Path, *, train: int, test: int, image_hw=((48, 72), (72, 48)), seed=0) -> None:
    """Writes a folder in VOC layout: one or two rectangles per image, every fifth one empty."""
    generator = np.random.default_rng(seed)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        ids = [f"{split}{index}" for index in range(count)]
        (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
        for index, name in enumerate(ids):
            height, width = image_hw[index % len(image_hw)]
            pixels = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
            objects = []
            for label in range(0 if index % 5 == 4 else 1 + index % 2):
                x, y = (int(generator.integers(0, side - 26)) for side in (width, height))
                pixels[y : y + 24, x : x + 24] = ((250, 40, 40), (40, 60, 250))[label]
                objects.append(
                    f"<object><name>{CLASS_NAMES[label]}</name><bndbox><xmin>{x + 1}</xmin>"
                    f"<ymin>{y + 1}</ymin><xmax>{x + 24}</xmax><ymax>{y + 24}</ymax></bndbox></object>"
                )
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.png")
            (root / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><filename>{name}.png</filename><size><width>{width}</width>"
                f"<height>{height}</height><depth>3</depth></size>{''.join(objects)}</annotation>"
            )
