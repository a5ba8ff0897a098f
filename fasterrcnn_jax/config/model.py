"""Settings of the detector: its input, layers, proposals and losses. Every checkpoint stores them."""

import dataclasses
import math
from typing import Literal

from fasterrcnn_jax.config.checks import (
    AUTO,
    Auto,
    require,
    require_at_most,
    require_fraction,
    require_not_negative,
    require_positive,
)
from fasterrcnn_jax.structures import MAX_LOG_SCALE, PerDelta

SoftNms = Literal["linear", "gaussian"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Preprocessing of images into network input. It belongs to the model: weights fit only one preprocessing."""

    short_side: int = 600
    """length of the shorter image side after resizing, in pixels"""
    long_side: int = 1000
    """largest length of the longer image side after resizing, in pixels; the shorter side of an elongated image then
    stays below short_side"""
    size_rounding: Literal["nearest", "down"] = "nearest"
    """how resized side lengths are rounded to whole pixels; torchvision rounds down"""
    canvases: tuple[tuple[int, int], ...] | Auto = ((608, 800), (800, 608), (608, 1008), (1008, 608))
    """sizes (height, width) of the padded network input; each image is put on the smallest canvas that holds it; the
    network is compiled once per canvas; auto: at most three that fit the images of the data set, and one that holds
    every image"""
    channel_order: Literal["bgr", "rgb"] = "bgr"
    """order of the network's input channels, and of mean and std"""
    mean: tuple[float, float, float] = (102.9801, 115.9465, 122.7717)
    """channel means, subtracted from pixel values in 0..255"""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """divisors of the channels, after the means are subtracted"""
    pixel_dtype: Literal["float32", "uint8"] = "float32"
    """data type of the resized images; uint8 rounds them to whole grey levels and normalises them on the device, so
    that only a quarter of the bytes is prepared and sent; only for models that were trained with it"""

    def __post_init__(self):
        require_positive(short_side=self.short_side, std=min(self.std))
        require(
            self.long_side >= self.short_side,
            f"long_side must be at least short_side, got {self.long_side} < {self.short_side}",
        )
        if self.canvases == AUTO:
            return
        for needed in ((self.short_side, self.long_side), (self.long_side, self.short_side)):
            require(
                any(h >= needed[0] and w >= needed[1] for h, w in self.canvases),
                f"no canvas of {self.canvases} holds an image of {needed[0]} x {needed[1]} pixels",
            )
        for canvas in self.canvases:
            require(
                min(canvas) > 0 and canvas[0] % 16 == 0 and canvas[1] % 16 == 0,
                f"canvas sides must be positive multiples of 16, got {canvas}",
            )
            require(canvas[0] * canvas[1] <= 2**23, f"a canvas must have at most {2**23} pixels, got {canvas}")

    def scaled(self, factor: float) -> "ImageConfig":
        """Returns the preprocessing that makes images larger by `factor`, with canvases for them.

        Raises:
          ValueError: a canvas would have too many pixels.
        """
        if factor == 1.0 or self.canvases == AUTO:
            return self
        # One pixel more, because sides are rounded; multiples of 32 suit every network.
        canvases = tuple(tuple(math.ceil((side * factor + 1) / 32) * 32 for side in canvas) for canvas in self.canvases)
        short, long = round(self.short_side * factor), round(self.long_side * factor)
        return dataclasses.replace(
            self, short_side=max(1, short), long_side=max(1, short, long), canvases=tuple(dict.fromkeys(canvases))
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The layers that all regions share: VGG16 up to conv5_3; ResNet up to conv4_x (C4), with stage 4 in the box head;
    or all of ResNet or EfficientNet-Lite, under a feature pyramid."""

    name: Literal[
        "vgg16", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
        "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2",
    ] = "resnet101"  # fmt: skip
    """network: VGG16 (Simonyan and Zisserman 2014, arXiv:1409.1556), a ResNet (He et al. 2015, arXiv:1512.03385), with
    bottleneck blocks from depth 50, or an EfficientNet-Lite (Tan and Le 2019, arXiv:1905.11946), only with a pyramid;
    VGG16 also needs the other settings in configs/voc_vgg16.py"""
    own: str | None = None
    """MODULE:CLASS of a backbone of your own, used instead of name; see docs/backbone.md"""
    width: int = 64
    """channels of the first layer, or twice their number for EfficientNet-Lite; 64 is the published network, a smaller
    number makes every layer thinner"""
    stride: Literal[8, 16] = 16
    """input pixels per feature cell; 8 separates small objects better, at four times the cost"""
    norm: Literal["none", "frozen_batch", "batch", "group"] = "frozen_batch"
    """normalisation layers: none for the plain VGG16, frozen_batch (fixed batch normalisation) for pretrained weights,
    batch (batch normalisation over the images of all devices; detection uses running averages with momentum 0.1) for
    many images per step, group (group normalisation) for training from random weights with few; batch needs
    mask_padding"""
    stride_in: Literal["1x1", "3x3"] = "1x1"
    """convolution of a ResNet bottleneck that has the stride: the first 1x1 (Caffe) or the 3x3 (torchvision)"""
    stem_pool: Literal["ceil", "padded"] = "ceil"
    """ResNet's 3x3 max pooling after the stem: without padding, with partial windows at the far border (Caffe), or
    padded by 1 (torchvision)"""
    fixed_stages: int = 1
    """number of leading stages that are never trained; the stem belongs to the first; 1 for ResNet, 2 (conv1_1 to
    conv2_2) for VGG16; EfficientNet-Lite has one stage for each of the strides 4, 8, 16 and 32"""
    fixed_stem: bool = False
    """never train the stem, even with fixed_stages 0, as FIXED_BLOCKS 0 of the reference; vgg16 has no stem"""
    mask_padding: bool = False
    """set the padding to zero after every layer and leave it out of the statistics of group and batch, so that results
    do not depend on it; on for training from random weights, off for weights that were trained without it"""
    remat: bool = False
    """recompute the activations of each stage for its gradient instead of keeping them: less memory, more time"""

    def __post_init__(self):
        require(
            self.width >= 8 and self.width % 8 == 0,
            f"width must be a positive multiple of 8, got {self.width}",
        )
        require_at_most(1024, width=self.width)
        require(
            self.norm != "none" or self.name == "vgg16",
            f"norm none is for vgg16, {self.name} needs frozen_batch, batch or group",
        )
        require(
            self.norm != "batch" or self.mask_padding,
            "norm batch needs mask_padding True, because padding and empty rows must not enter its statistics",
        )
        require(
            self.own is None or len(self.own.split(":")) == 2,
            f"own must be MODULE:CLASS, got {self.own!r}",
        )
        stages = 5 if self.name == "vgg16" else 4
        require(
            0 <= self.fixed_stages <= stages,
            f"fixed_stages must be in 0..{stages} for {self.name}, got {self.fixed_stages}",
        )
        require(
            not self.fixed_stem or self.own is not None or self.name != "vgg16",
            "fixed_stem must be False for vgg16, which has no stem",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FpnConfig:
    """Feature pyramid network (FPN, Lin et al. 2017, arXiv:1612.03144): levels P2 to P5 with strides 4 to 32, and
    P6."""

    channels: int = 256
    """channels of every level"""
    norm: Literal["none", "frozen_batch", "batch", "group"] = "none"
    """normalisation after each convolution of the pyramid and of the box head; as backbone.norm"""

    def __post_init__(self):
        require_positive(channels=self.channels)
        require_at_most(2**14, channels=self.channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxCoderConfig:
    """How deltas become boxes, in the RPN and in the box head."""

    far_corner_offset: Literal[0, 1] = 0
    """1 reproduces the inclusive corners of the old code: decoded far corners lie one pixel further, near corners are
    clipped to [0, side - 1] and far corners to [1, side], and region features are computed without that pixel"""
    max_log_scale: float | None = MAX_LOG_SCALE
    """upper limit of the deltas dw and dh, the logarithms of a scale; None: no limit, as in the Caffe code and its
    successors, where exp() can overflow"""

    def __post_init__(self):
        if self.max_log_scale is not None:
            require_positive(max_log_scale=self.max_log_scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RpnConfig:
    """Region proposal network (Ren et al. 2015, arXiv:1506.01497, section 3.1)."""

    anchor_base: float = 16.0
    """side of the base square that anchor_scales multiply, in pixels of the network input; with a pyramid: the side on
    the finest level, doubled at each coarser level"""
    anchor_scales: tuple[float, ...] | Auto = (8.0, 16.0, 32.0)
    """square roots of the anchors' areas, in units of anchor_base; 4, 8, 16, 32 for COCO; auto: four scales, or one
    with a pyramid, fitted to the boxes of the training images"""
    anchor_sizes: tuple[tuple[float, ...], ...] | None = None
    """square roots of the anchors' areas in pixels of the network input, one tuple for each level, fine to coarse, as
    in torchvision's AnchorGenerator; used instead of anchor_base and anchor_scales; None: these two decide"""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """aspect ratios of the anchors, height / width"""
    anchor_rounding: Literal["base", "half", "none"] = "base"
    """what is rounded to whole pixels: base: the sides of the base boxes (Caffe); half: half the anchors' sides
    (torchvision); none: nothing"""
    anchor_centre: Literal["cell", "corner"] = "cell"
    """point of a feature cell that anchors are centred on: its centre, or its near corner (torchvision, detectron2)"""
    anchor_stride: Literal["level", "canvas"] = "level"
    """distance between neighbouring anchors in pixels: level: the stride of the level; canvas: the canvas side divided
    by the level's number of cells and rounded down, as in torchvision, which differs on P6"""
    anchors_in_padding: bool = False
    """use the anchors on padding cells too, as the reference implementations do; detections then depend on the
    canvas"""
    allowed_border: float | None = 0.0
    """pixels by which an anchor may cross the image border; anchors that cross it further are not trained on; None: no
    limit"""
    channels: int = 512
    """channels of the 3x3 convolutions"""
    convs: int = 1
    """number of 3x3 convolutions before the objectness and delta layers"""
    activation: Literal["relu", "none"] = "relu"
    """function after each 3x3 convolution; none: the RPN is linear, as in the step-by-step notebook"""
    fg_iou: float = 0.7
    """an anchor that has at least this IoU with a box is foreground"""
    bg_iou: float = 0.3
    """an anchor whose IoU with every box is below this is background"""
    clobber_positives: bool = False
    """make an anchor background if its IoU is below bg_iou, even if it is the best anchor of a box"""
    anchors_per_image: int = 256
    """number of anchors that are sampled per image for the loss"""
    fg_fraction: float = 0.5
    """largest fraction of foreground anchors in the sample"""

    def __post_init__(self):
        require_fraction(fg_iou=self.fg_iou, bg_iou=self.bg_iou, fg_fraction=self.fg_fraction)
        require(
            0 < self.bg_iou <= self.fg_iou,
            f"need 0 < bg_iou <= fg_iou, got {self.bg_iou} and {self.fg_iou}",
        )
        require(bool(self.anchor_scales and self.anchor_ratios), "anchor_scales and anchor_ratios are empty")
        if self.anchor_sizes is not None:
            nested = isinstance(self.anchor_sizes, tuple | list) and all(
                isinstance(sizes, tuple | list) for sizes in self.anchor_sizes
            )
            require(
                nested,
                "anchor_sizes must hold one tuple for each level, as in ((32,), (64,), (128,), (256,), (512,)), got "
                f"{self.anchor_sizes}",
            )
            counts = {len(sizes) for sizes in self.anchor_sizes}
            require(
                len(counts) == 1 and 0 not in counts,
                f"anchor_sizes must hold equally many sizes for every level, got {self.anchor_sizes}",
            )
            require_positive(anchor_sizes=min(map(min, self.anchor_sizes)))
            require(
                self.anchor_rounding != "base",
                "anchor_sizes needs anchor_rounding half or none, because there is no base box to round",
            )
            require(self.anchor_scales != AUTO, "anchor_scales auto has no effect with anchor_sizes; give one of them")
        require_positive(
            anchor_base=self.anchor_base,
            anchor_scales=1.0 if self.anchor_scales == AUTO else min(self.anchor_scales),
            anchor_ratios=min(self.anchor_ratios),
            channels=self.channels,
            convs=self.convs,
            anchors_per_image=self.anchors_per_image,
        )
        require_at_most(2**14, channels=self.channels)
        require_at_most(64, convs=self.convs)
        if self.allowed_border is not None:
            require_not_negative(allowed_border=self.allowed_border)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProposalConfig:
    """How the RPN's boxes become proposals."""

    pre_nms_top_n: int
    """number of best-scored boxes that enter NMS, per level of a pyramid"""
    post_nms_top_n: int
    """number of proposals per image after NMS, padding included"""
    nms_threshold: float = 0.7
    """NMS removes a box whose IoU with a box of higher score is above this"""
    min_size: float = 16.0
    """shortest allowed side of a box, in pixels of the original image (on the canvas: multiplied by the image scale);
    smaller boxes are dropped"""
    drop_small: Literal["first", "after_top_n"] = "first"
    """when small boxes are dropped: before the best boxes are taken (Caffe), or after, so that small boxes use up
    places (torchvision)"""

    def __post_init__(self):
        require_positive(pre_nms_top_n=self.pre_nms_top_n, post_nms_top_n=self.post_nms_top_n)
        require_at_most(50_000, pre_nms_top_n=self.pre_nms_top_n)
        require_at_most(10_000, post_nms_top_n=self.post_nms_top_n)
        require_fraction(nms_threshold=self.nms_threshold)
        require_positive(nms_threshold=self.nms_threshold)
        require_not_negative(min_size=self.min_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoiSamplingConfig:
    """Which proposals train the box head, and their targets."""

    rois_per_image: int = 128
    """number of RoIs that are sampled per image for the loss"""
    rois_per_batch: int | None = None
    """number of RoIs that are sampled per batch and divided among its images, used instead of rois_per_image; 128 for
    the 2 x 64 of Fast R-CNN; None: rois_per_image"""
    fg_fraction: float = 0.25
    """largest fraction of foreground RoIs in the sample; if no proposal is background, all may be foreground"""
    fg_iou: float = 0.5
    """a RoI that has at least this IoU with a box is foreground"""
    bg_iou: tuple[float, float] = (0.0, 0.5)
    """a RoI whose largest IoU lies in [low, high) is background; a low of 0.1 selects harder examples, as in Fast
    R-CNN"""
    add_ground_truth: bool = True
    """add the ground-truth boxes to the proposals that RoIs are sampled from, so that there is foreground before the
    RPN finds any; off in tf-faster-rcnn (USE_GT)"""
    box_means: PerDelta = (0.0, 0.0, 0.0, 0.0)
    """means that are subtracted from the box targets (dx, dy, dw, dh)"""
    box_stds: PerDelta = (0.1, 0.1, 0.2, 0.2)
    """standard deviations that the box targets (dx, dy, dw, dh) are divided by"""

    def __post_init__(self):
        require_fraction(fg_iou=self.fg_iou, fg_fraction=self.fg_fraction)
        require(
            0.0 <= self.bg_iou[0] < self.bg_iou[1] <= self.fg_iou,
            f"need 0 <= bg_iou[0] < bg_iou[1] <= fg_iou, got {self.bg_iou} and {self.fg_iou}",
        )
        require_positive(rois_per_image=self.rois_per_image, box_stds=min(self.box_stds))
        if self.rois_per_batch is not None:
            require_positive(rois_per_batch=self.rois_per_batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoiFeaturesConfig:
    """How each region gets a fixed grid of features."""

    operator: Literal["align", "align_average", "pool", "crop"] = "align"
    """align: RoIAlign; align_average: the older average of one sample per corner; pool: RoI max pooling; crop: bilinear
    crop, and 2x2 max pooling with crop_max_pool"""
    output_size: int = 7
    """cells per side of the grid"""
    sampling_ratio: int = 0
    """operator align: samples per grid cell and axis; 0: as many as the grid cell covers feature cells, rounded up"""
    aligned: bool = False
    """operator align: subtract half a feature cell from the coordinates, so that a feature cell's value lies at its
    centre; off in the reference implementations"""
    crop_max_pool: bool = True
    """operator crop: take twice as many samples along each axis, and the maximum of 2x2 samples; off: one sample for
    each cell (CROP_RESIZE_WITH_MAX_POOL)"""
    quantisation: Literal["rounded", "floor"] = "rounded"
    """operator pool: how the corners of a region are rounded to feature cells"""

    def __post_init__(self):
        require_positive(output_size=self.output_size)
        require_not_negative(sampling_ratio=self.sampling_ratio)
        require_at_most(64, output_size=self.output_size)
        require_at_most(16, sampling_ratio=self.sampling_ratio)
        require(
            self.operator != "crop" or self.crop_max_pool or self.output_size > 1,
            "output_size must be at least 2 with crop_max_pool False, got 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxHeadConfig:
    """The box head: ResNet stage 4, or convolutions and fully connected layers, on each region; then one linear layer
    for the classes and one for the deltas."""

    class_agnostic: bool = False
    """predict one set of deltas for all classes instead of one set per class"""
    summary: Literal["mean", "flatten"] = "mean"
    """ResNet without a pyramid: how the cells of stage 4 become one vector; mean is the published method and suits
    pretrained weights; flatten keeps the positions of the features, without which a network trained from random weights
    learns slowly"""
    convs: int = 0
    """with a pyramid: number of 3x3 convolutions before the fully connected layers; they have the pyramid's channels
    and norm"""
    layers: int = 2
    """number of fully connected layers: 2 for VGG16 (fc6 and fc7) and for a pyramid, 1 after the four convolutions of
    torchvision's v2"""
    channels: int = 4096
    """channels of the fully connected layers; 1024 with a pyramid"""
    dropout: float = 0.5
    """fraction of the fully connected layers' values that is set to zero in training"""

    def __post_init__(self):
        require_positive(channels=self.channels, layers=self.layers)
        require_not_negative(convs=self.convs)
        require_at_most(2**16, channels=self.channels)
        require_at_most(64, layers=self.layers, convs=self.convs)
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the four losses are computed and added. The logged losses include their weights."""

    rpn_sigma: float = 3.0
    """sigma of the RPN's smooth L1 box loss, which is quadratic for errors below 1 / sigma^2"""
    roi_sigma: float = 1.0
    """sigma of the box head's smooth L1 box loss, which is quadratic for errors below 1 / sigma^2"""
    rpn_box_weight: float = 1.0
    """weight of the RPN's box loss; 10 is the paper's lambda, with rpn_box_normalizer locations"""
    roi_box_weight: float = 1.0
    """weight of the box head's box loss"""
    rpn_box_normalizer: Literal["sampled", "positives", "positive_deltas", "locations"] = "sampled"
    """number that divides the RPN's box loss: of the sampled anchors, of the foreground anchors, of their deltas (four
    for each: the mean over elements), or of the feature cells"""
    roi_box_normalizer: Literal["sampled", "positives", "positive_deltas"] = "sampled"
    """number that divides the box head's box loss: of the sampled RoIs, of the foreground RoIs, or of their deltas
    (four for each: the mean over elements)"""
    rpn_box_anchors: Literal["sampled", "all_positives"] = "sampled"
    """foreground anchors in the RPN's box loss: only the sampled ones, or all of them"""
    rpn_positive_weight: float | None = None
    """total weight of the foreground anchors in the RPN's box loss, whatever the normalizer; None: the normalizer
    decides"""
    rpn_box_inside_weights: PerDelta = (1.0, 1.0, 1.0, 1.0)
    """factors on the error of each delta (dx, dy, dw, dh) before the RPN's smooth L1"""
    roi_box_inside_weights: PerDelta = (1.0, 1.0, 1.0, 1.0)
    """factors on the error of each delta (dx, dy, dw, dh) before the box head's smooth L1"""

    def __post_init__(self):
        require_positive(rpn_sigma=self.rpn_sigma, roi_sigma=self.roi_sigma)
        require_not_negative(
            rpn_box_weight=self.rpn_box_weight,
            roi_box_weight=self.roi_box_weight,
            rpn_box_inside_weights=min(self.rpn_box_inside_weights),
            roi_box_inside_weights=min(self.roi_box_inside_weights),
        )
        if self.rpn_positive_weight is not None:
            require(
                0.0 < self.rpn_positive_weight < 1.0,
                f"rpn_positive_weight must be in (0, 1), got {self.rpn_positive_weight}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """How class probabilities and boxes become detections."""

    score_threshold: float = 0.05
    """detections with this score or less are dropped"""
    nms_threshold: float = 0.3
    """NMS removes a box whose IoU with a box of the same class and higher score is above this; soft_nms linear lowers
    its score"""
    soft_nms: SoftNms | None = None
    """lower the scores of overlapping boxes of a class instead of removing the boxes (Soft-NMS, Bodla et al. 2017,
    arXiv:1704.04503): linear: times 1 - IoU where the IoU is above nms_threshold; gaussian: times
    exp(-IoU^2 / soft_nms_sigma); None: NMS"""
    soft_nms_sigma: float = 0.5
    """soft_nms gaussian: sigma; a larger one lowers scores less"""
    max_detections: int = 100
    """largest number of detections per image, over all classes"""

    def __post_init__(self):
        require_fraction(score_threshold=self.score_threshold, nms_threshold=self.nms_threshold)
        require_positive(
            nms_threshold=self.nms_threshold, soft_nms_sigma=self.soft_nms_sigma, max_detections=self.max_detections
        )
        require_at_most(10_000, max_detections=self.max_detections)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TtaConfig:
    """Test-time augmentation: `predict` and the evaluation detect in several versions of each image, and NMS within
    each class merges the detections. Detection takes as many times longer as there are versions."""

    flip: bool = False
    """also detect in the mirror image, at every scale"""
    scales: tuple[float, ...] = ()
    """factors on the input size at which to detect too, in addition to 1, for example 0.75 1.5"""

    def __post_init__(self):
        require(
            len({1.0, *self.scales}) == len(self.scales) + 1,
            f"scales must differ from each other and from 1, got {self.scales}",
        )
        for factor in self.scales:
            require(0.25 <= factor <= 4.0, f"scales must be in 0.25..4, got {factor}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All settings of the network and of the programs compiled from it."""

    image: ImageConfig = ImageConfig()
    backbone: BackboneConfig = BackboneConfig()
    fpn: FpnConfig | None = None
    """feature pyramid; None: the network has one feature map"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """data type of the network's layers; weights, boxes and losses are always float32"""
    box_coder: BoxCoderConfig = BoxCoderConfig()
    rpn: RpnConfig = RpnConfig()
    train_proposals: ProposalConfig = ProposalConfig(pre_nms_top_n=12000, post_nms_top_n=2000)
    """How the RPN's boxes become proposals in training."""
    test_proposals: ProposalConfig = ProposalConfig(pre_nms_top_n=6000, post_nms_top_n=300)
    """How the RPN's boxes become proposals in detection."""
    roi_sampling: RoiSamplingConfig = RoiSamplingConfig()
    roi_features: RoiFeaturesConfig = RoiFeaturesConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    loss: LossConfig = LossConfig()
    postprocess: PostprocessConfig = PostprocessConfig()
    test_augment: TtaConfig = TtaConfig()

    def __post_init__(self):
        levels = 1 if self.fpn is None else 5
        # A configuration file may put anything here; it is told so where all types are checked.
        sizes = self.rpn.anchor_sizes if isinstance(self.rpn, RpnConfig) else None
        require(
            sizes is None or len(sizes) == levels,
            f"rpn.anchor_sizes must hold {levels} {'tuple' if levels == 1 else 'tuples, one for each level'}, "
            f"got {sizes}",
        )
        for factor in self.test_augment.scales:
            self.image.scaled(factor)
        if self.fpn is None:
            require(
                self.backbone.own is not None or not self.backbone.name.startswith("efficientnet"),
                f"{self.backbone.name} needs a pyramid, got fpn None",
            )
            stages = 5 if self.backbone.name == "vgg16" else 3
            require(
                self.backbone.fixed_stages <= stages,
                f"backbone.fixed_stages must be in 0..{stages} without a pyramid, got {self.backbone.fixed_stages}",
            )
            for proposals in (self.train_proposals, self.test_proposals):
                require(
                    proposals.pre_nms_top_n >= proposals.post_nms_top_n,
                    "need pre_nms_top_n >= post_nms_top_n, "
                    f"got {proposals.pre_nms_top_n} and {proposals.post_nms_top_n}",
                )
            return
        require(
            self.backbone.own is not None or (self.backbone.name != "vgg16" and self.backbone.stride == 16),
            "a pyramid needs a resnet or efficientnet backbone of stride 16, got "
            f"{self.backbone.name} of stride {self.backbone.stride}",
        )
        require(
            self.roi_features.operator == "align",
            f"roi_features.operator must be align with a pyramid, got {self.roi_features.operator}",
        )
        require(
            self.fpn.norm != "batch" or self.backbone.mask_padding,
            "fpn.norm batch needs backbone.mask_padding True, because padding and empty rows must not enter its "
            "statistics",
        )
        for canvas in () if self.image.canvases == AUTO else self.image.canvases:
            require(
                canvas[0] % 32 == 0 and canvas[1] % 32 == 0,
                f"canvas sides must be multiples of 32 with a pyramid, got {canvas}",
            )
