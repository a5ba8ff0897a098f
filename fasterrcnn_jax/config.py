"""Every setting, as frozen dataclasses: hashable, so the parts that shape a program are static arguments.

The docstring under a field is its help text on the command line. Defaults are those of the reference code
bases' Caffe line (py-faster-rcnn, faster-rcnn.pytorch); docs/reference.md says where each stands there.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal

from fasterrcnn_jax.box_coder import MAX_LOG_SCALE, PerDelta


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_fraction(**fields: float) -> None:
    for name, value in fields.items():
        _require(0.0 <= value <= 1.0, f"{name} must be in [0, 1], got {value}")


def _require_positive(**fields: float) -> None:
    for name, value in fields.items():
        _require(value > 0, f"{name} must be positive, got {value}")


def _require_not_negative(**fields: float) -> None:
    for name, value in fields.items():
        _require(value >= 0, f"{name} must not be negative, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How a picture becomes network input. Part of the model: weights fit one preprocessing."""

    short_side: int = 600
    """pixels that the shorter side is resized to"""
    long_side: int = 1000
    """the longer side never exceeds this; the shorter one then stays below short_side"""
    size_rounding: Literal["nearest", "down"] = "nearest"
    """how resized sides become whole pixels; down is torchvision's"""
    canvases: tuple[tuple[int, int], ...] = ((608, 800), (800, 608), (608, 1008), (1008, 608))
    """padded (height, width); a picture goes onto the smallest it fits; one compilation each"""
    channel_order: Literal["bgr", "rgb"] = "bgr"
    """order of the network's input channels, and of mean and std"""
    mean: tuple[float, float, float] = (102.9801, 115.9465, 122.7717)
    """subtracted from values in 0..255"""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """divides after the subtraction"""
    pixel_dtype: Literal["float32", "uint8"] = "float32"
    """of the resized pictures; uint8 rounds them to whole grey levels and leaves the normalisation to the device: a
    quarter of the bytes to make and to send; for models that were trained so"""

    def __post_init__(self):
        _require_positive(short_side=self.short_side, std=min(self.std))
        _require(
            self.long_side >= self.short_side,
            f"long_side must be at least short_side, got {self.long_side} < {self.short_side}",
        )
        for needed in ((self.short_side, self.long_side), (self.long_side, self.short_side)):
            _require(
                any(h >= needed[0] and w >= needed[1] for h, w in self.canvases),
                f"no canvas of {self.canvases} holds a picture of {needed[0]} x {needed[1]} pixels",
            )
        for canvas in self.canvases:
            _require(
                min(canvas) > 0 and canvas[0] % 16 == 0 and canvas[1] % 16 == 0,
                f"canvas sides must be positive multiples of 16, got {canvas}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The shared layers: VGG16 up to conv5_3, ResNet up to conv4_x (C4), where stage 4 runs per region, or all
    of ResNet under a feature pyramid."""

    name: Literal["vgg16", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet101"
    """Simonyan and Zisserman 2014 (arXiv:1409.1556), He et al. 2015 (arXiv:1512.03385); bottlenecks from 50 on;
    what else belongs to VGG16 is in configs/voc_vgg16.py"""
    own: str | None = None
    """MODULE:CLASS of a backbone of your own, in place of name; docs/backbone.md"""
    width: int = 64
    """channels of the first layer; 64 is the published net, less makes a thinner one"""
    stride: Literal[8, 16] = 16
    """network pixels per feature cell; 8 keeps small objects apart at four times the cost"""
    norm: Literal["none", "frozen_batch", "group"] = "frozen_batch"
    """none is the plain VGG16, frozen_batch suits weights from outside, group training from nothing"""
    stride_in: Literal["1x1", "3x3"] = "1x1"
    """which convolution of a bottleneck strides: the first 1x1 (Caffe) or the 3x3 (torchvision)"""
    stem_pool: Literal["ceil", "padded"] = "ceil"
    """ResNet's 3x3 max pooling after the stem: unpadded but for partial windows at the far border (Caffe), or
    padded by 1 (torchvision)"""
    fixed_stages: int = 1
    """leading stages that are never trained, the stem with the first: 1 for ResNet, 2 (conv1_1 to conv2_2) for VGG16"""
    mask_padding: bool = False
    """zero the padding after every layer and leave it out of group statistics, so that results do not
    depend on it; on for training from nothing, off for weights trained without"""
    remat: bool = False
    """compute what each stage holds again when its gradient is due, in place of keeping it: less memory, more time"""

    def __post_init__(self):
        _require(
            self.width >= 8 and self.width % 8 == 0,
            f"width must be a positive multiple of 8, got {self.width}",
        )
        _require(
            self.norm != "none" or self.name == "vgg16",
            f"norm none is for vgg16, a {self.name} needs frozen_batch or group",
        )
        _require(
            self.own is None or len(self.own.split(":")) == 2,
            f"own must be MODULE:CLASS, got {self.own!r}",
        )
        stages = 5 if self.name == "vgg16" else 4
        _require(
            0 <= self.fixed_stages <= stages,
            f"fixed_stages must be in 0..{stages} for {self.name}, got {self.fixed_stages}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FpnConfig:
    """Feature pyramid network (Lin et al. 2017, arXiv:1612.03144): levels P2 to P5 of strides 4 to 32, and P6."""

    channels: int = 256
    """of every level"""
    norm: Literal["none", "frozen_batch", "group"] = "none"
    """behind the pyramid's convolutions and those of the box head"""

    def __post_init__(self):
        _require_positive(channels=self.channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxCoderConfig:
    """How deltas become boxes, in the RPN and in the box head."""

    far_corner_offset: Literal[0, 1] = 0
    """1 reproduces the old inclusive corners: decoded far corners lie one pixel further, near corners are
    clipped to [0, side - 1], far ones to [1, side], and region features are taken without that pixel"""
    max_log_scale: float | None = MAX_LOG_SCALE
    """larger log scales are cut to this; None: not at all, as the Caffe line, where exp() may overflow"""

    def __post_init__(self):
        if self.max_log_scale is not None:
            _require_positive(max_log_scale=self.max_log_scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RpnConfig:
    """Region proposal network (Ren et al. 2015, arXiv:1506.01497, section 3.1)."""

    anchor_base: float = 16.0
    """side of the square that scales multiply, in pixels of the network input; of a pyramid on its finest
    level, doubled from level to level"""
    anchor_scales: tuple[float, ...] = (8.0, 16.0, 32.0)
    """square roots of the anchors' areas, in anchor_base; 4, 8, 16, 32 for COCO"""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """height / width"""
    anchor_rounding: Literal["base", "half", "none"] = "base"
    """what is rounded to whole pixels: the sides of the base boxes (Caffe), half the anchors' sides
    (torchvision), nothing"""
    anchor_centre: Literal["cell", "corner"] = "cell"
    """of a feature cell: its centre, or its near corner (torchvision, detectron2)"""
    anchor_stride: Literal["level", "canvas"] = "level"
    """pixels from anchor to anchor: the stride of their level, or, as in torchvision, the canvas divided by the
    level's cells and rounded down, which differs on P6"""
    anchors_in_padding: bool = False
    """anchors on cells of the padding take part, as in the references; what is found then depends on the canvas"""
    allowed_border: float | None = 0.0
    """anchors reaching further than this over the picture's border are not trained on; None: all are"""
    channels: int = 512
    """of the 3x3 convolutions"""
    convs: int = 1
    """3x3 convolutions before objectness and deltas"""
    fg_iou: float = 0.7
    """an anchor at this IoU with a box is foreground"""
    bg_iou: float = 0.3
    """an anchor below this IoU with every box is background"""
    clobber_positives: bool = False
    """background wins where an anchor is a box's best and below bg_iou"""
    anchors_per_image: int = 256
    """sampled for the loss"""
    fg_fraction: float = 0.5
    """at most this part of the sample is foreground"""

    def __post_init__(self):
        _require_fraction(fg_iou=self.fg_iou, bg_iou=self.bg_iou, fg_fraction=self.fg_fraction)
        _require(
            0 < self.bg_iou <= self.fg_iou,
            f"need 0 < bg_iou <= fg_iou, got {self.bg_iou} and {self.fg_iou}",
        )
        _require(bool(self.anchor_scales and self.anchor_ratios), "anchor_scales and anchor_ratios are empty")
        _require_positive(
            anchor_base=self.anchor_base,
            anchor_scales=min(self.anchor_scales),
            anchor_ratios=min(self.anchor_ratios),
            channels=self.channels,
            convs=self.convs,
            anchors_per_image=self.anchors_per_image,
        )
        if self.allowed_border is not None:
            _require_not_negative(allowed_border=self.allowed_border)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProposalConfig:
    """From anchors to proposals."""

    pre_nms_top_n: int
    """best boxes that enter NMS, of each level of a pyramid"""
    post_nms_top_n: int
    """proposals per image, padding included"""
    nms_threshold: float = 0.7
    """IoU above which the lower-scored box goes"""
    min_size: float = 16.0
    """boxes with a shorter side drop, in pixels of the picture as stored: times the image scale on the canvas"""
    drop_small: Literal["first", "after_top_n"] = "first"
    """whether small boxes drop before the best are taken (Caffe) or take places among them (torchvision)"""

    def __post_init__(self):
        _require_positive(pre_nms_top_n=self.pre_nms_top_n, post_nms_top_n=self.post_nms_top_n)
        _require_fraction(nms_threshold=self.nms_threshold)
        _require_positive(nms_threshold=self.nms_threshold)
        _require_not_negative(min_size=self.min_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoiSamplingConfig:
    """Which proposals train the box head, and towards what."""

    rois_per_image: int = 128
    """sampled for the loss"""
    rois_per_batch: int | None = None
    """divided over the images of the batch in place of rois_per_image: 128 for Fast R-CNN's 2 x 64"""
    fg_fraction: float = 0.25
    """at most this part of the sample is foreground; all of it where no proposal is background"""
    fg_iou: float = 0.5
    """a RoI at this IoU with a box is foreground"""
    bg_iou: tuple[float, float] = (0.0, 0.5)
    """background lies in [low, high); low 0.1 mines harder examples, as Fast R-CNN"""
    box_means: PerDelta = (0.0, 0.0, 0.0, 0.0)
    """subtracted from the box targets"""
    box_stds: PerDelta = (0.1, 0.1, 0.2, 0.2)
    """divide the box targets"""

    def __post_init__(self):
        _require_fraction(fg_iou=self.fg_iou, fg_fraction=self.fg_fraction)
        _require(
            0.0 <= self.bg_iou[0] < self.bg_iou[1] <= self.fg_iou,
            f"need 0 <= bg_iou[0] < bg_iou[1] <= fg_iou, got {self.bg_iou} and {self.fg_iou}",
        )
        _require_positive(rois_per_image=self.rois_per_image, box_stds=min(self.box_stds))
        if self.rois_per_batch is not None:
            _require_positive(rois_per_batch=self.rois_per_batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoiFeaturesConfig:
    """A fixed grid of features for every region."""

    operator: Literal["align", "align_average", "pool", "crop"] = "align"
    """RoIAlign, the older average of one sample per corner, RoI max pooling, or bilinear crop and 2x2 max"""
    output_size: int = 7
    """cells per side"""
    sampling_ratio: int = 0
    """of align: samples per cell and axis; 0 adapts them to the region, one per feature cell or more"""
    aligned: bool = False
    """of align: take half a cell off, so that a feature cell's value lies at its centre; off in the references"""
    quantisation: Literal["rounded", "floor"] = "rounded"
    """of pool: how corners fall on feature cells"""

    def __post_init__(self):
        _require_positive(output_size=self.output_size)
        _require_not_negative(sampling_ratio=self.sampling_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxHeadConfig:
    """ResNet stage 4, or convolutions and fully connected layers, on each region; then one linear layer for
    classes and one for deltas."""

    class_agnostic: bool = False
    """one set of deltas for all classes in place of one per class"""
    summary: Literal["mean", "flatten"] = "mean"
    """of ResNet: how the cells of stage 4 become one vector: mean is published and suits pretrained weights;
    flatten keeps where in the region a feature lies, without which a net trained from nothing learns slowly"""
    convs: int = 0
    """of a pyramid: 3x3 convolutions with its channels and norm, before the fully connected layers"""
    layers: int = 2
    """fully connected: VGG16's fc6 and fc7, a pyramid's two; 1 after four convolutions in torchvision's v2"""
    channels: int = 4096
    """of the fully connected layers; 1024 on a pyramid"""
    dropout: float = 0.5
    """of the fully connected layers: part of the values that is zero in training"""

    def __post_init__(self):
        _require_positive(channels=self.channels, layers=self.layers)
        _require_not_negative(convs=self.convs)
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the four losses are formed and added. Weights are part of the losses as they are logged."""

    rpn_sigma: float = 3.0
    """smooth L1 of the RPN: quadratic below 1 / sigma^2"""
    roi_sigma: float = 1.0
    """smooth L1 of the box head"""
    rpn_box_weight: float = 1.0
    """of the RPN's box loss; 10 is the paper's lambda with locations as the normalizer"""
    roi_box_weight: float = 1.0
    """of the box head's box loss"""
    rpn_box_normalizer: Literal["sampled", "positives", "locations"] = "sampled"
    """what the RPN's box loss is divided by: the sampled anchors, the foreground ones, or the feature cells"""
    rpn_box_anchors: Literal["sampled", "all_positives"] = "sampled"
    """which foreground anchors are regressed: those in the sample, or all before it was drawn"""
    rpn_positive_weight: float | None = None
    """foreground anchors together weigh this much in the RPN's box loss, whatever the normalizer; None: as
    the normalizer says"""
    rpn_box_inside_weights: PerDelta = (1.0, 1.0, 1.0, 1.0)
    """multiply the error of each delta before smooth L1, in the RPN"""
    roi_box_inside_weights: PerDelta = (1.0, 1.0, 1.0, 1.0)
    """multiply the error of each delta before smooth L1, in the box head"""

    def __post_init__(self):
        _require_positive(rpn_sigma=self.rpn_sigma, roi_sigma=self.roi_sigma)
        _require_not_negative(
            rpn_box_weight=self.rpn_box_weight,
            roi_box_weight=self.roi_box_weight,
            rpn_box_inside_weights=min(self.rpn_box_inside_weights),
            roi_box_inside_weights=min(self.roi_box_inside_weights),
        )
        if self.rpn_positive_weight is not None:
            _require(
                0.0 < self.rpn_positive_weight < 1.0,
                f"rpn_positive_weight must be in (0, 1), got {self.rpn_positive_weight}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """From class probabilities to detections."""

    score_threshold: float = 0.05
    """detections at or below it go"""
    nms_threshold: float = 0.3
    """IoU above which the lower-scored box of a class goes"""
    max_detections: int = 100
    """per image, over all classes"""

    def __post_init__(self):
        _require_fraction(score_threshold=self.score_threshold, nms_threshold=self.nms_threshold)
        _require_positive(nms_threshold=self.nms_threshold, max_detections=self.max_detections)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that shapes the network and its programs."""

    image: ImageConfig = ImageConfig()
    backbone: BackboneConfig = BackboneConfig()
    fpn: FpnConfig | None = None
    """None: one feature map"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the network's layers; weights, boxes and losses are float32 with either"""
    box_coder: BoxCoderConfig = BoxCoderConfig()
    rpn: RpnConfig = RpnConfig()
    train_proposals: ProposalConfig = ProposalConfig(pre_nms_top_n=12000, post_nms_top_n=2000)
    test_proposals: ProposalConfig = ProposalConfig(pre_nms_top_n=6000, post_nms_top_n=300)
    roi_sampling: RoiSamplingConfig = RoiSamplingConfig()
    roi_features: RoiFeaturesConfig = RoiFeaturesConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    loss: LossConfig = LossConfig()
    postprocess: PostprocessConfig = PostprocessConfig()

    def __post_init__(self):
        if self.fpn is None:
            stages = 5 if self.backbone.name == "vgg16" else 3
            _require(
                self.backbone.fixed_stages <= stages,
                f"backbone.fixed_stages must be in 0..{stages} without a pyramid, got {self.backbone.fixed_stages}",
            )
            for proposals in (self.train_proposals, self.test_proposals):
                _require(
                    proposals.pre_nms_top_n >= proposals.post_nms_top_n,
                    "need pre_nms_top_n >= post_nms_top_n, "
                    f"got {proposals.pre_nms_top_n} and {proposals.post_nms_top_n}",
                )
            return
        _require(
            self.backbone.own is not None or (self.backbone.name != "vgg16" and self.backbone.stride == 16),
            f"a pyramid stands on a resnet of stride 16, got {self.backbone.name} of stride {self.backbone.stride}",
        )
        _require(
            self.roi_features.operator == "align",
            f"roi_features.operator must be align on a pyramid, got {self.roi_features.operator}",
        )
        for canvas in self.image.canvases:
            _require(
                canvas[0] % 32 == 0 and canvas[1] % 32 == 0,
                f"under a pyramid canvas sides must be multiples of 32, got {canvas}",
            )


def has_fully_connected(model: ModelConfig) -> bool:
    """True where a region passes fully connected layers, False where it passes ResNet's stage 4."""
    return model.fpn is not None or model.backbone.own is not None or model.backbone.name == "vgg16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """The embedded data set, drawn on first use."""

    num_train: int = 600
    """training images"""
    num_test: int = 150
    """held-out images"""
    seed: int = 0
    """another seed draws other pictures"""

    def __post_init__(self):
        _require_positive(num_train=self.num_train, num_test=self.num_test)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images vary, beside flip and crop_aspect: drawn for each image in each epoch."""

    short_sides: tuple[int, ...] = ()
    """one is drawn in place of model.image.short_side; long_side and canvases stay; empty: always the model's"""
    scale_jitter: tuple[float, float] | None = None
    """the picture is resized once more by a factor from this range, cut where it is larger than its canvas and smaller
    on it otherwise; (0.1, 2.0) is large-scale jitter (Ghiasi et al. 2021, arXiv:2012.07177); None: never"""
    photometric: bool = False
    """brightness, contrast, saturation and hue, each with probability one half, in the ranges of SSD
    (Liu et al. 2016, arXiv:1512.02325); in no shipped configuration, as none of the recipes they follow has it"""

    def __post_init__(self):
        if self.short_sides:
            _require_positive(short_sides=min(self.short_sides))
        if self.scale_jitter is not None:
            low, high = self.scale_jitter
            _require(
                0.0 < low <= high < math.inf, f"scale_jitter must be 0 < low <= high, got {self.scale_jitter}"
            )


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
        _require_positive(max_boxes=self.max_boxes, threads=self.threads)
        _require_not_negative(cache_mb=self.cache_mb)
        if self.crop_aspect is not None:
            _require(self.crop_aspect >= 1.0, f"crop_aspect must be at least 1, got {self.crop_aspect}")
        _require(
            (self.layout == "tfds") == (self.tfds_name is not None),
            f"tfds_name is for layout tfds, which needs it, got {self.tfds_name!r} with {self.layout}",
        )
        if self.tfds_name is not None:
            _require(
                re.fullmatch(r"[a-z0-9_]+(/[\w-][\w.-]*)?(:\d+\.\d+\.\d+)?", self.tfds_name) is not None,
                f"tfds_name must be NAME or NAME/CONFIG, and :VERSION if wanted, got {self.tfds_name!r}",
            )
        repeated = {name for name in self.class_names if self.class_names.count(name) > 1}
        _require(not repeated, f"class_names holds {sorted(repeated)} more than once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlternatingConfig:
    """The four stages of alternating training (Ren et al. 2015, arXiv:1506.01497, section 3.2): RPN, detector, RPN,
    detector."""

    steps: tuple[int, int, int, int] = (80000, 40000, 80000, 40000)
    """optimizer steps of each stage"""
    decay_steps: tuple[int, int, int, int] = (60000, 30000, 60000, 30000)
    """of schedule steps: those made in each stage before its learning rate falls"""
    rpn_batch_size: int | None = None
    """images per step of the RPN's stages; None: train.batch_size"""

    def __post_init__(self):
        _require_positive(steps=min(self.steps), decay_steps=min(self.decay_steps))
        if self.rpn_batch_size is not None:
            _require_positive(rpn_batch_size=self.rpn_batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    scheme: Literal["joint", "alternating", "rpn"] = "joint"
    """what is trained: RPN and box head together, both in four stages, or the RPN alone"""
    alternating: AlternatingConfig = AlternatingConfig()
    """the stages of scheme alternating"""
    steps: int
    """optimizer steps, over all stages"""
    batch_size: int
    """images per step, over all devices and parts"""
    accumulate: int = 1
    """parts that a step's images are cut into, one after the other: less memory; the gradient is the mean of theirs"""
    learning_rate: float
    """peak"""
    schedule: Literal["steps", "cosine"] = "steps"
    """how the learning rate falls from the peak: by decay_factor at each of decay_steps, or as a cosine to zero"""
    decay_steps: tuple[int, ...] = ()
    """of steps: optimizer steps made before each fall"""
    decay_factor: float = 0.1
    """of steps: what the learning rate is multiplied by"""
    warmup_steps: int = 0
    """steps of linear warm-up"""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """momentum SGD or Adam with decay in the gradient, or AdamW with decay beside it"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 5e-4
    """on convolution and matrix weights; never on normalisation"""
    bias_decay: bool = False
    """weight decay on biases too"""
    double_bias: bool = True
    """twice the learning rate on biases"""
    double_objectness: bool = True
    """twice the learning rate and half the decay on the objectness layer: its one logit then moves as the
    difference of the reference's two"""
    layer_decay: float = 1.0
    """the learning rate of each stage of the backbone is multiplied by this once for every stage between it and the
    heads, itself included; 1: one rate everywhere"""
    ema_decay: float | None = None
    """of a moving average of the weights, which evaluation and `load` then use, as 0.9998; None: no average"""
    clip_norm: float | None = None
    """largest global norm of the gradient; None: no limit; 10 for VGG16"""
    seed: int = 0
    """weights, order of the images, flips and samples all follow from it"""
    implementation: Literal["xla", "mosaic"] | None = None
    """of NMS and region features: plain JAX, GPU kernels, or None: the kernels where they can run"""
    checkpoint_every: int = 500
    """steps between checkpoints; the last step is always saved"""
    keep_checkpoints: int = 2
    """newest checkpoints kept, beside the best one"""
    evaluate_every: int = 0
    """steps between evaluations that look for the best checkpoint, a multiple of checkpoint_every; 0: only
    the last step"""
    best_split: str | None = None
    """split they are made on, better one that no result is reported on; None: data.test_split"""
    best_metric: Literal["AP50", "AP"] = "AP50"
    """COCO metric that decides"""

    def __post_init__(self):
        _require_positive(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        _require(
            math.isfinite(self.learning_rate), f"learning_rate must be finite, got {self.learning_rate}"
        )
        if self.scheme == "alternating":
            self._check_stages(self.alternating)
        _require(0.0 <= self.momentum < 1.0, f"momentum must be in [0, 1), got {self.momentum}")
        _require(self.weight_decay >= 0.0, f"weight_decay must not be negative, got {self.weight_decay}")
        _require_positive(accumulate=self.accumulate, layer_decay=self.layer_decay)
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}",
        )
        _require(self.layer_decay <= 1.0, f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.ema_decay is not None:
            _require(0.0 < self.ema_decay < 1.0, f"ema_decay must be in (0, 1), got {self.ema_decay}")
        _require(0 <= self.seed < 2**32, f"seed must be in [0, 2^32), got {self.seed}")
        if self.clip_norm is not None:
            _require_positive(clip_norm=self.clip_norm)
        _require(
            list(self.decay_steps) == sorted(set(self.decay_steps)) and min(self.decay_steps, default=1) >= 1,
            f"decay_steps must be positive and rise, got {self.decay_steps}",
        )
        _require(
            not self.decay_steps or self.schedule == "steps",
            f"decay_steps is for schedule steps, got {self.decay_steps} with {self.schedule}",
        )
        _require(0.0 < self.decay_factor <= 1.0, f"decay_factor must be in (0, 1], got {self.decay_factor}")
        _require(
            0 <= self.warmup_steps < self.steps,
            f"need 0 <= warmup_steps < steps, got {self.warmup_steps} and {self.steps}",
        )
        _require(
            self.evaluate_every >= 0 and self.evaluate_every % self.checkpoint_every == 0,
            "evaluate_every must be a multiple of checkpoint_every, got "
            f"{self.evaluate_every} and {self.checkpoint_every}",
        )

    def _check_stages(self, stages: AlternatingConfig) -> None:
        _require(
            self.steps == sum(stages.steps),
            f"steps must be those of the four stages together, got {self.steps} and {stages.steps}",
        )
        _require(
            self.warmup_steps < min(stages.steps),
            f"need warmup_steps < steps of each stage, got {self.warmup_steps} and {stages.steps}",
        )
        _require(
            not self.decay_steps,
            f"decay_steps of scheme alternating are alternating.decay_steps, got {self.decay_steps} beside them",
        )
        falls = zip(stages.decay_steps, stages.steps, strict=True)
        _require(
            self.schedule != "steps" or all(fall < steps for fall, steps in falls),
            f"alternating.decay_steps must lie within alternating.steps, got {stages.decay_steps} and {stages.steps}",
        )
        rpn_batch_size = stages.rpn_batch_size or self.batch_size
        _require(
            rpn_batch_size % self.accumulate == 0,
            f"alternating.rpn_batch_size must be a multiple of accumulate, got {rpn_batch_size} and {self.accumulate}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of one run, usually one per host or per GPU; docs/scaling.md."""

    coordinator: str | None = None
    """HOST:PORT of process 0, reachable from all; detect: SLURM, Open MPI or Kubernetes say where it is, how many
    processes there are and which this one is; None: this process alone"""
    num_processes: int | None = None
    """of HOST:PORT: how many processes run"""
    process_id: int | None = None
    """of HOST:PORT: which of them this one is, from 0 on"""

    def __post_init__(self):
        if self.coordinator in (None, "detect"):
            for name in ("num_processes", "process_id"):
                value = getattr(self, name)
                _require(value is None, f"{name} is for coordinator HOST:PORT, got {value} with {self.coordinator}")
            return
        host, _, port = self.coordinator.rpartition(":")
        _require(
            bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16,
            f"coordinator must be HOST:PORT or detect, got {self.coordinator!r}",
        )
        _require(
            self.num_processes is not None and self.process_id is not None,
            f"coordinator {self.coordinator} needs num_processes and process_id, "
            f"got {self.num_processes} and {self.process_id}",
        )
        _require(
            0 <= self.process_id < self.num_processes,
            f"process_id must be in 0..num_processes - 1, got {self.process_id} of {self.num_processes}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    run: Path
    """folder of the run: configuration, metrics, checkpoints, pictures"""
    init: Path | None = None
    """file of weights that a new run starts from, of ours (weights convert) or another program; classes may differ;
    None: random ones"""
    replay: Path | None = None
    """a file in RUN/failed, written when a number was not finite: make that step again, image by image, and say where
    the first such number stands, in place of training"""
    distributed: DistributedConfig = DistributedConfig()
    """the processes of the run, one command on each host; docs/scaling.md"""

    def __post_init__(self):
        rois = self.model.roi_sampling.rois_per_batch
        _require(
            rois is None or rois % self.train.batch_size == 0,
            f"rois_per_batch must be a multiple of batch_size, got {rois} and {self.train.batch_size}",
        )
        largest = max(self.data.augment.short_sides, default=0)
        _require(
            largest <= self.model.image.short_side,
            f"data.augment.short_sides must be at most model.image.short_side, got {largest} and "
            f"{self.model.image.short_side}",
        )
