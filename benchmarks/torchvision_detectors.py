"""Builds torchvision's Faster R-CNN with the sizes and thresholds of one of our configurations.

With a pyramid it is torchvision's own detector. torchvision has no detector on conv4_x (C4), so its `FasterRCNN` class
gets the layers of its ResNet: stages 1-3 as the backbone, and stage 4 with a mean over the cells as the box head. It
has no EfficientNet-Lite either: the table of ours says which of its layers make one, under its pyramid and heads.
Matcher, sampler, losses and transforms are torchvision's. Both libraries get preprocessed batches, without resizing
and normalisation.
"""

import collections
import functools
from typing import Any

import measure

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.models.efficientnet import SCALES, STEM, Row, stages_of
from fasterrcnn_jax.ops.anchors import PYRAMID_STRIDES

torch, torchvision = measure.peer()

# Of the last normalisation in each residual branch where it is fixed: without it random weights overflow.
BRANCH_SCALE = 0.2


def create(config: ModelConfig, num_classes: int) -> Any:
    """Returns a `FasterRCNN` with random weights on the device.

    Args:
      num_classes: number of classes without background.
    """
    from torchvision.models import resnet
    from torchvision.models.detection import faster_rcnn, rpn

    torch.manual_seed(0)
    backbone_config, scales, ratios = config.backbone, config.rpn.anchor_scales, config.rpn.anchor_ratios
    options, parts = {}, {}
    if backbone_config.name in SCALES:
        backbone, parts = _on_efficientnet(config, num_classes)
        options = {"num_classes": None}
        bases = [config.rpn.anchor_base * 2**level for level in range(len(PYRAMID_STRIDES))]
    elif config.fpn is not None:
        backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name=backbone_config.name,
            weights=None,
            norm_layer=_norm(backbone_config.norm),
            trainable_layers=4 - backbone_config.fixed_stages if backbone_config.fixed_stages else 5,
        )
        bases = [config.rpn.anchor_base * 2**level for level in range(len(PYRAMID_STRIDES))]
    else:
        net = torchvision.models.get_model(backbone_config.name, weights=None, norm_layer=_norm(backbone_config.norm))
        stem = torch.nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        backbone = torch.nn.Sequential(stem, net.layer1, net.layer2, net.layer3)
        if backbone_config.fixed_stages:
            backbone[: 1 + backbone_config.fixed_stages].requires_grad_(False)
        backbone.out_channels = net.fc.in_features // 2
        bases = [config.rpn.anchor_base]
        mean = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        features = config.roi_features
        parts = {
            "box_head": torch.nn.Sequential(net.layer4, *mean),
            "box_predictor": faster_rcnn.FastRCNNPredictor(net.fc.in_features, num_classes + 1),
            "box_roi_pool": torchvision.ops.MultiScaleRoIAlign(["0"], features.output_size, features.sampling_ratio),
        }
        options = {"num_classes": None}
    sizes = tuple(tuple(base * scale for scale in scales) for base in bases)
    for phase, proposals in (("train", config.train_proposals), ("test", config.test_proposals)):
        options[f"rpn_pre_nms_top_n_{phase}"] = proposals.pre_nms_top_n
        options[f"rpn_post_nms_top_n_{phase}"] = proposals.post_nms_top_n
    model = faster_rcnn.FasterRCNN(
        backbone,
        **{"num_classes": num_classes + 1} | options | parts,
        rpn_anchor_generator=rpn.AnchorGenerator(sizes, (ratios,) * len(sizes)),
        rpn_nms_thresh=config.test_proposals.nms_threshold,
        rpn_fg_iou_thresh=config.rpn.fg_iou,
        rpn_bg_iou_thresh=config.rpn.bg_iou,
        rpn_batch_size_per_image=config.rpn.anchors_per_image,
        rpn_positive_fraction=config.rpn.fg_fraction,
        box_batch_size_per_image=config.roi_sampling.rois_per_image,
        box_positive_fraction=config.roi_sampling.fg_fraction,
        box_score_thresh=config.postprocess.score_threshold,
        box_nms_thresh=config.postprocess.nms_threshold,
        box_detections_per_img=config.postprocess.max_detections,
    )
    if backbone_config.norm == "frozen_batch":
        for block in model.modules():
            if isinstance(block, (resnet.BasicBlock, resnet.Bottleneck)):
                (block.bn3 if hasattr(block, "bn3") else block.bn2).weight.fill_(BRANCH_SCALE)
    return model.to(measure.torch_device())


def _on_efficientnet(config: ModelConfig, num_classes: int) -> tuple[Any, dict[str, Any]]:
    """Returns EfficientNet-Lite with frozen batch norm under torchvision's pyramid, and the heads, in our sizes."""
    from torchvision.models.detection import faster_rcnn, rpn

    nn, ops = torch.nn, torchvision.ops
    layer = functools.partial(
        ops.Conv2dNormActivation, norm_layer=_norm("frozen_batch"), activation_layer=nn.ReLU6, bias=False
    )

    class Block(nn.Module):
        def __init__(self, channels: int, row: Row) -> None:
            super().__init__()
            self.adds = row.stride == 1 and channels == row.channels
            wide = channels * row.expansion
            self.layers = nn.Sequential(
                *([layer(channels, wide, 1)] if row.expansion > 1 else []),
                layer(wide, wide, row.size, row.stride, groups=wide),
                layer(wide, row.channels, 1, activation_layer=None),
            )

        def forward(self, x: Any) -> Any:
            return x + self.layers(x) if self.adds else self.layers(x)

    class Lite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = STEM * config.backbone.width // 64
            self.stem, self.stages, ends = layer(3, channels, 3, 2), nn.ModuleList(), []
            for rows in stages_of(config.backbone):
                blocks = []
                for row in rows:
                    blocks.append(Block(channels, row))
                    channels = row.channels
                self.stages.append(nn.Sequential(*blocks))
                ends.append(channels)
            self.out_channels = config.fpn.channels
            last = ops.feature_pyramid_network.LastLevelMaxPool()
            self.fpn = ops.FeaturePyramidNetwork(ends, self.out_channels, extra_blocks=last)

        def forward(self, images: Any) -> Any:
            x, maps = self.stem(images), {}
            for number, stage in enumerate(self.stages):
                maps[str(number)] = x = stage(x)
            return self.fpn(maps)

    net, features = Lite(), config.roi_features
    channels, cells = config.box_head.channels, features.output_size**2
    for block in net.modules():
        if isinstance(block, Block) and block.adds:
            block.layers[-1][1].weight.fill_(BRANCH_SCALE)
    return net, {
        "rpn_head": rpn.RPNHead(net.out_channels, len(config.rpn.anchor_scales) * len(config.rpn.anchor_ratios)),
        "box_head": faster_rcnn.TwoMLPHead(net.out_channels * cells, channels),
        "box_predictor": faster_rcnn.FastRCNNPredictor(channels, num_classes + 1),
        "box_roi_pool": ops.MultiScaleRoIAlign(list("0123"), features.output_size, features.sampling_ratio),
    }


def mobilenet(num_classes: int, sides: tuple[int, int]) -> Any:
    """Returns torchvision's detector for small devices with random weights; it resizes to sides of these lengths."""
    torch.manual_seed(0)
    create = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    short, long = sides
    return create(weights=None, weights_backbone=None, num_classes=num_classes + 1, min_size=short, max_size=long).to(
        measure.torch_device()
    )


def _norm(name: str) -> Any:
    if name == "group":
        return functools.partial(torch.nn.GroupNorm, 32)
    return torchvision.ops.misc.FrozenBatchNorm2d


def forward(model: Any, images: Any, image_hw: list[tuple[int, int]], targets: list[dict] | None = None) -> Any:
    """Returns the dict of losses in training and the list of detections otherwise: `FasterRCNN.forward` without its
    transform.

    Args:
      images: [B, 3, H, W], normalised, zero beyond `image_hw`.
    """
    features = model.backbone(images)
    if not isinstance(features, dict):
        features = collections.OrderedDict([("0", features)])
    listed = torchvision.models.detection.image_list.ImageList(images, image_hw)
    proposals, rpn_losses = model.rpn(listed, features, targets)
    detections, box_losses = model.roi_heads(features, proposals, image_hw, targets)
    return rpn_losses | box_losses if model.training else detections


def compile_parts(model: Any) -> Any:
    """Compiles the backbone and the heads in place. The other parts have changing shapes and would recompile."""
    for part in (model.backbone, model.rpn.head, model.roi_heads.box_head, model.roi_heads.box_predictor):
        part.compile()
    return model.to(memory_format=torch.channels_last)
