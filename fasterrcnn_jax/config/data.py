"""Settings of the data: the images and labels that a run reads."""

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import Literal

from fasterrcnn_jax.config.checks import (
    AUTO,
    Auto,
    require,
    require_not_negative,
    require_positive,
)
from fasterrcnn_jax.errors import quoted

# File layouts of labelled images.
Layout = Literal["auto", "voc", "vocdevkit", "coco", "yolo", "labelme", "csv", "tfds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """The built-in data set of drawn shapes, made on first use."""

    num_train: int = 600
    """number of training images"""
    num_test: int = 150
    """number of test images"""
    seed: int = 0
    """random seed of the drawn images"""

    def __post_init__(self):
        require_positive(num_train=self.num_train, num_test=self.num_test)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random augmentation of training images, in addition to flip and crop_aspect; drawn anew in each epoch."""

    short_sides: tuple[int, ...] = ()
    """short sides to draw from, instead of model.image.short_side; long_side and canvases do not change; empty: always
    model.image.short_side"""
    scale_jitter: tuple[float, float] | None = None
    """range (low, high) of a random factor that resizes the image once more; the image is cropped if it is then larger
    than its canvas; (0.1, 2.0) is large-scale jitter (Ghiasi et al. 2021, arXiv:2012.07177); None: no jitter"""
    photometric: bool = False
    """change brightness, contrast, saturation and hue, each with probability one half, in the ranges of SSD (Liu et al.
    2016, arXiv:1512.02325); off in all shipped configurations; its results are in docs/training.md"""

    def __post_init__(self):
        if self.short_sides:
            require_positive(short_sides=min(self.short_sides))
        if self.scale_jitter is not None:
            low, high = self.scale_jitter
            require(0.0 < low <= high < math.inf, f"scale_jitter must be 0 < low <= high, got {self.scale_jitter}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Labelled images: a folder as a labelling tool writes it, or a data set of TensorFlow Datasets (TFDS)."""

    root: Path
    """folder of the data set with its annotations and images; layout vocdevkit: contains VOC2007 and VOC2012; tfds: the
    data_dir of TFDS"""
    layout: Layout = "voc"
    """file layout of root; auto: recognised from the files in root. This also sets the other fields of the layout, and
    the class names and splits that are not given; so does a layout that is named, unless its fields are given"""
    voc_images: str = "JPEGImages"
    """layout voc: folder of a split's images, relative to root; may contain {split}"""
    voc_annotations: str = "Annotations"
    """layout voc: folder of a split's XML files, relative to root; may contain {split}"""
    voc_lists: str | None = "ImageSets/Main/{split}.txt"
    """layout voc: list of a split's images, relative to root; None: a split is every image that has an XML file in
    the split's folder"""
    voc_counts_from: Literal[0, 1] = 1
    """layouts voc and vocdevkit: 1: corners are whole pixels counted from 1, and the last one is included, as in PASCAL
    VOC; 0: corners are continuous coordinates from 0, as CVAT writes them"""
    coco_annotations: str = "annotations/instances_{split}.json"
    """layout coco: annotation file of a split, relative to root"""
    coco_images: str = "{split}"
    """layout coco: folder of a split's images, relative to root"""
    tfds_name: str | None = None
    """layout tfds: NAME/CONFIG of the data set, for example voc/2007, or one version of it, for example
    voc/2007:5.0.0"""
    class_names: tuple[str, ...] = ()
    """names of the object classes to train on, without background; objects of other classes are ignored; if empty: all
    classes of the data, in the order that it declares, or sorted"""
    train_split: str = "train"
    """splits to train on, joined by +; layout voc: NAME of ImageSets/Main/NAME.txt; vocdevkit: YEAR_NAME, for example
    2007_trainval; coco: the {split} of coco_annotations; tfds: a split of the data set, for example train, or a part of
    one, for example train[:90%]"""
    test_split: str = "test"
    """splits to evaluate on, written like train_split"""
    split: tuple[float, ...] | Auto = ()
    """fractions (training, validation) or (training, validation, test) by which the images of train_split are divided
    into the splits train, val and test, by train.seed, with near copies of an image on one side; one number is the
    fraction for training; 1.0: every image is trained on, and evaluated too; auto: 0.8 where the data set has one
    split; empty: the data set's own splits"""
    split_of: str | None = None
    """split that data.split divides; None: train_split. A run stores it here, and the names of the parts in train_split
    and test_split"""
    proposals: Path | None = None
    """train.scheme fast_rcnn: file of proposals for every image, used instead of the RPN's in training and evaluation;
    {split} in it stands for the name of the split; training uses the best train_proposals.post_nms_top_n of an image,
    evaluation the best test_proposals.post_nms_top_n; docs/data.md describes the file"""
    max_boxes: int = 100
    """largest number of ground-truth boxes per image; further boxes are not trained on and are counted in a warning"""
    use_difficult: bool = False
    """train on objects that are marked difficult too"""
    keep_empty: bool = False
    """train on images without boxes too; they are background only"""
    flip: Literal["double", "random", "none"] = "double"
    """mirrored images: double adds a mirrored copy of every image to each epoch, random mirrors each image with
    probability one half, none mirrors no image"""
    crop_aspect: float | None = 2.0
    """largest ratio of long side to short side of a training image; longer images are cropped to it around their boxes;
    None: no cropping"""
    rank_by_aspect: bool = True
    """sort training images by width / height, so that each batch holds images of similar shape"""
    augment: AugmentConfig = AugmentConfig()
    """random augmentation of training images: size, position and colour"""
    threads: int = 2
    """number of threads that decode and resize training images ahead of the device; the batches are bit-identical for
    any number"""
    fast: bool = False
    """decode and resize training images with simplejpeg and OpenCV (pip install 'fasterrcnn_jax[fast]'): the decoded
    pixels are the same, the resized ones differ by at most 0.05 grey levels; evaluation does not use them"""
    cache_mb: int = 0
    """megabytes of memory for decoded training images, which are then not decoded again; 0: no cache"""
    faults: Literal["error", "skip"] = "error"
    """what to do with an image or object that cannot be used: stop with an error, or skip it with a warning; skip
    decodes every image once when it reads the annotations"""
    max_pixels: int = 100_000_000
    """largest number of pixels (width times height) of an image; a larger one is refused before it is decoded"""
    follow_links: bool = False
    """open files that symbolic links in the data set place outside root; otherwise they are refused"""
    accept_changed: bool = False
    """continue a run although its lists, labels or images have changed since the checkpoint; otherwise that is an
    error"""
    shapes: ShapesConfig | None = None
    """make the built-in data set of drawn shapes in root if it is not there yet"""

    def __post_init__(self):
        if self.split != AUTO and self.split:
            require(
                len(self.split) <= 3 and min(self.split) > 0.0 and sum(self.split) <= 1.0 + 1e-6,
                "split must be one to three positive fractions with a sum of at most 1, for example 0.8 for 80 %, got "
                f"{' '.join(f'{fraction:g}' for fraction in self.split)}",
            )
        require_positive(max_boxes=self.max_boxes, threads=self.threads, max_pixels=self.max_pixels)
        require_not_negative(cache_mb=self.cache_mb)
        if self.crop_aspect is not None:
            require(self.crop_aspect >= 1.0, f"crop_aspect must be at least 1, got {self.crop_aspect}")
        require(
            (self.layout == "tfds") == (self.tfds_name is not None),
            f"layout tfds needs tfds_name, and no other layout takes it, got {self.tfds_name!r} with {self.layout}",
        )
        if self.tfds_name is not None:
            require(
                re.fullmatch(r"[a-z0-9_]+(/[\w-][\w.-]*)?(:\d+\.\d+\.\d+)?", self.tfds_name) is not None,
                f"tfds_name must be NAME or NAME/CONFIG, optionally with :VERSION, got {self.tfds_name!r}",
            )
        repeated = sorted(name for name, count in Counter(self.class_names).items() if count > 1)
        require(not repeated, f"class_names contains {quoted(repeated)} more than once")
