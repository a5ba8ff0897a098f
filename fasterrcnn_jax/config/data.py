"""Settings of the images and labels that a run reads."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal

from fasterrcnn_jax.config.checks import (
    require,
    require_not_negative,
    require_positive,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """The embedded data set, drawn on first use."""

    num_train: int = 600
    """training images"""
    num_test: int = 150
    """held-out images"""
    seed: int = 0
    """another seed draws other images"""

    def __post_init__(self):
        require_positive(num_train=self.num_train, num_test=self.num_test)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images vary, beside flip and crop_aspect: drawn for each image in each epoch."""

    short_sides: tuple[int, ...] = ()
    """one is drawn in place of model.image.short_side; long_side and canvases stay; empty: always the model's"""
    scale_jitter: tuple[float, float] | None = None
    """the image is resized once more by a factor from this range, cut where it is larger than its canvas and smaller
    on it otherwise; (0.1, 2.0) is large-scale jitter (Ghiasi et al. 2021, arXiv:2012.07177); None: never"""
    photometric: bool = False
    """brightness, contrast, saturation and hue, each with probability one half, in the ranges of SSD
    (Liu et al. 2016, arXiv:1512.02325); in no shipped configuration, as none of the recipes they follow has it"""

    def __post_init__(self):
        if self.short_sides:
            require_positive(short_sides=min(self.short_sides))
        if self.scale_jitter is not None:
            low, high = self.scale_jitter
            require(0.0 < low <= high < math.inf, f"scale_jitter must be 0 < low <= high, got {self.scale_jitter}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Labelled images: a folder in VOC layout, a VOCdevkit, COCO json, or a set of TensorFlow Datasets."""

    root: Path
    """voc: holds JPEGImages, Annotations and ImageSets/Main; vocdevkit: holds VOC2007, VOC2012; coco: holds
    annotations and images; tfds: TFDS's data_dir"""
    layout: Literal["voc", "vocdevkit", "coco", "tfds"] = "voc"
    """how root is laid out"""
    coco_annotations: str = "annotations/instances_{split}.json"
    """of coco: annotation file of a split, below root"""
    coco_images: str = "{split}"
    """of coco: folder of a split's images, below root"""
    tfds_name: str | None = None
    """of tfds: NAME/CONFIG of the set, as voc/2007, or a version of it, as voc/2007:5.0.0"""
    class_names: tuple[str, ...] = ()
    """the objects' names in the annotations, without background; of coco and tfds, when empty, all that the set
    declares, in its order"""
    train_split: str = "train"
    """splits to train on, joined by +; voc: ImageSets/Main/NAME.txt; vocdevkit: YEAR_NAME, as 2007_trainval;
    coco: the word in the file's name; tfds: the set's own, as train, or a part, as train[:90%]"""
    test_split: str = "test"
    """splits to evaluate on"""
    max_boxes: int = 100
    """ground-truth slots per image; further boxes are not trained on, counted in a warning"""
    use_difficult: bool = False
    """train on objects marked difficult"""
    keep_empty: bool = False
    """train on images without a box, as background alone"""
    flip: Literal["double", "random", "none"] = "double"
    """mirrored images: each once more per epoch, each with probability one half, or none"""
    crop_aspect: float | None = 2.0
    """training images longer than this many times their short side are cropped to it around their boxes;
    None: never"""
    rank_by_aspect: bool = True
    """batches hold images that are neighbours in the order of width / height"""
    augment: AugmentConfig = AugmentConfig()
    """how training images vary in size, place and colour"""
    threads: int = 2
    """that decode and resize training images ahead of the device; batches have the same bits with any number"""
    cache_mb: int = 0
    """decoded training images are kept in memory up to so many megabytes, and those are not decoded again; 0: none"""
    faults: Literal["error", "skip"] = "error"
    """at an image or an object that cannot be used: stop, or skip it with a warning; skip decodes every image
    when it reads the annotations"""
    shapes: ShapesConfig | None = None
    """draw the embedded data set into root when it is not there yet"""

    def __post_init__(self):
        require_positive(max_boxes=self.max_boxes, threads=self.threads)
        require_not_negative(cache_mb=self.cache_mb)
        if self.crop_aspect is not None:
            require(self.crop_aspect >= 1.0, f"crop_aspect must be at least 1, got {self.crop_aspect}")
        require(
            (self.layout == "tfds") == (self.tfds_name is not None),
            f"tfds_name is for layout tfds, which needs it, got {self.tfds_name!r} with {self.layout}",
        )
        if self.tfds_name is not None:
            require(
                re.fullmatch(r"[a-z0-9_]+(/[\w-][\w.-]*)?(:\d+\.\d+\.\d+)?", self.tfds_name) is not None,
                f"tfds_name must be NAME or NAME/CONFIG, and :VERSION if wanted, got {self.tfds_name!r}",
            )
        repeated = {name for name in self.class_names if self.class_names.count(name) > 1}
        require(not repeated, f"class_names holds {sorted(repeated)} more than once")
