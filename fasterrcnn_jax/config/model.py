"""Settings of the detector: its input, its layers, its proposals, its losses. Part of every checkpoint."""

import dataclasses
from typing import Literal

from fasterrcnn_jax.config.checks import (
    require,
    require_fraction,
    require_not_negative,
    require_positive,
)
from fasterrcnn_jax.structures import MAX_LOG_SCALE, PerDelta


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How an image becomes network input. Part of the model: weights fit one preprocessing."""

    short_side: int = 600
    """pixels that the shorter side is resized to"""
    long_side: int = 1000
    """the longer side never exceeds this; the shorter one then stays below short_side"""
    size_rounding: Literal["nearest", "down"] = "nearest"
    """how resized sides become whole pixels; down is torchvision's"""
    canvases: tuple[tuple[int, int], ...] = ((608, 800), (800, 608), (608, 1008), (1008, 608))
    """padded (height, width); an image goes onto the smallest it fits; one compilation each"""
    channel_order: Literal["bgr", "rgb"] = "bgr"
    """order of the network's input channels, and of mean and std"""
    mean: tuple[float, float, float] = (102.9801, 115.9465, 122.7717)
    """subtracted from values in 0..255"""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """divides after the subtraction"""
    pixel_dtype: Literal["float32", "uint8"] = "float32"
    """of the resized images; uint8 rounds them to whole grey levels and leaves the normalisation to the device: a
    quarter of the bytes to make and to send; for models that were trained so"""

    def __post_init__(self):
        require_positive(short_side=self.short_side, std=min(self.std))
        require(
            self.long_side >= self.short_side,
            f"long_side must be at least short_side, got {self.long_side} < {self.short_side}",
        )
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
        require(
            self.width >= 8 and self.width % 8 == 0,
            f"width must be a positive multiple of 8, got {self.width}",
        )
        require(
            self.norm != "none" or self.name == "vgg16",
            f"norm none is for vgg16, a {self.name} needs frozen_batch or group",
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FpnConfig:
    """Feature pyramid network (Lin et al. 2017, arXiv:1612.03144): levels P2 to P5 of strides 4 to 32, and P6."""

    channels: int = 256
    """of every level"""
    norm: Literal["none", "frozen_batch", "group"] = "none"
    """behind the pyramid's convolutions and those of the box head"""

    def __post_init__(self):
        require_positive(channels=self.channels)


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
            require_positive(max_log_scale=self.max_log_scale)


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
    """anchors reaching further than this over the image's border are not trained on; None: all are"""
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
        require_fraction(fg_iou=self.fg_iou, bg_iou=self.bg_iou, fg_fraction=self.fg_fraction)
        require(
            0 < self.bg_iou <= self.fg_iou,
            f"need 0 < bg_iou <= fg_iou, got {self.bg_iou} and {self.fg_iou}",
        )
        require(bool(self.anchor_scales and self.anchor_ratios), "anchor_scales and anchor_ratios are empty")
        require_positive(
            anchor_base=self.anchor_base,
            anchor_scales=min(self.anchor_scales),
            anchor_ratios=min(self.anchor_ratios),
            channels=self.channels,
            convs=self.convs,
            anchors_per_image=self.anchors_per_image,
        )
        if self.allowed_border is not None:
            require_not_negative(allowed_border=self.allowed_border)


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
    """boxes with a shorter side drop, in pixels of the image as stored: times the image scale on the canvas"""
    drop_small: Literal["first", "after_top_n"] = "first"
    """whether small boxes drop before the best are taken (Caffe) or take places among them (torchvision)"""

    def __post_init__(self):
        require_positive(pre_nms_top_n=self.pre_nms_top_n, post_nms_top_n=self.post_nms_top_n)
        require_fraction(nms_threshold=self.nms_threshold)
        require_positive(nms_threshold=self.nms_threshold)
        require_not_negative(min_size=self.min_size)


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
        require_positive(output_size=self.output_size)
        require_not_negative(sampling_ratio=self.sampling_ratio)


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
        require_positive(channels=self.channels, layers=self.layers)
        require_not_negative(convs=self.convs)
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")


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
    """From class probabilities to detections."""

    score_threshold: float = 0.05
    """detections at or below it go"""
    nms_threshold: float = 0.3
    """IoU above which the lower-scored box of a class goes"""
    max_detections: int = 100
    """per image, over all classes"""

    def __post_init__(self):
        require_fraction(score_threshold=self.score_threshold, nms_threshold=self.nms_threshold)
        require_positive(nms_threshold=self.nms_threshold, max_detections=self.max_detections)


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
            f"a pyramid stands on a resnet of stride 16, got {self.backbone.name} of stride {self.backbone.stride}",
        )
        require(
            self.roi_features.operator == "align",
            f"roi_features.operator must be align on a pyramid, got {self.roi_features.operator}",
        )
        for canvas in self.image.canvases:
            require(
                canvas[0] % 32 == 0 and canvas[1] % 32 == 0,
                f"under a pyramid canvas sides must be multiples of 32, got {canvas}",
            )
