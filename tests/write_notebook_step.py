"""Writes tests/golden/notebook_step.npz: training steps of the step-by-step notebook's VGG16 with batch norm.

    pip install torch numpy
    python tests/write_notebook_step.py

torch is needed by this script only. The network, the targets and the losses are those of the notebook, written anew,
with these differences:

- The weights follow the rule of tests/golden/README.md. "small" has an eighth of the channels on a small image.
- No anchor or RoI is drawn at random: the samples are large enough for all of them.
- Anchors are listed row by row, as the predictions are; the notebook lists them column by column.
- The gradient of every loss is used. The notebook cuts two of them: that of the RPN's box loss, and that of the box
  head with respect to the features.
- The optimizer is SGD with momentum; the notebook ends before it.
"""

import copy
import itertools
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from reference_rule import rule_weight
from torch import nn
from torch.nn import functional

RATE, MOMENTUM, SALT = 1e-3, 0.9, 7
STRIDE, RATIOS, LAMBDA = 16, (0.5, 1.0, 2.0), 10.0


class Case(NamedTuple):
    width: int  # of the first layer
    hidden: int  # channels of the RPN
    fc: int  # of fc6 and fc7
    classes: int
    image_hw: tuple[int, int]
    scales: tuple[int, ...]  # of the anchors
    boxes: tuple[tuple[int, ...], ...]  # y1, x1, y2, x2
    labels: tuple[int, ...]
    proposals: int  # after NMS
    steps: int


CASES = {
    "small": Case(8, 32, 32, 3, (128, 160), (1, 2, 4), ((20, 30, 75, 90), (60, 85, 120, 150)), (1, 3), 2000, 2),
    # The notebook's own sizes.
    "full": Case(
        64, 512, 4096, 20, (800, 800), (8, 16, 32), ((20, 30, 400, 500), (300, 400, 500, 600)), (6, 8), 128, 1
    ),
}


def image_of(case: Case) -> np.ndarray:
    """Returns the network input [3, h, w]."""
    return 60 * np.random.default_rng(3).standard_normal((3, *case.image_hw), np.float32)


class Network(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        layers, channels = [], 3
        for multiple in (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8):
            if multiple == 0:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            out = case.width * multiple
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        anchors = len(RATIOS) * len(case.scales)
        self.features = nn.Sequential(*layers)
        self.rpn_conv = nn.Conv2d(channels, case.hidden, 3, padding=1)
        self.reg_layer = nn.Conv2d(case.hidden, 4 * anchors, 1)
        self.cls_layer = nn.Conv2d(case.hidden, 2 * anchors, 1)
        self.pool = nn.AdaptiveMaxPool2d((7, 7))
        self.head = nn.Sequential(nn.Linear(49 * channels, case.fc), nn.ReLU(), nn.Linear(case.fc, case.fc), nn.ReLU())
        self.cls_loc = nn.Linear(case.fc, 4 * (case.classes + 1))
        self.score = nn.Linear(case.fc, case.classes + 1)

    def region_proposals(self, features):
        """Returns deltas (dy, dx, dh, dw) and two logits of each anchor; no ReLU after the 3 x 3 convolution."""
        x = self.rpn_conv(features)
        deltas = self.reg_layer(x).permute(0, 2, 3, 1).reshape(-1, 4)
        return deltas, self.cls_layer(x).permute(0, 2, 3, 1).reshape(-1, 2)

    def regions(self, features, rois):
        """Returns class logits and deltas of each class for RoIs (y1, x1, y2, x2)."""
        pooled = []
        for y1, x1, y2, x2 in (rois / STRIDE).astype(np.int64):
            pooled.append(self.pool(features[0, :, y1 : y2 + 1, x1 : x2 + 1]))
        x = self.head(torch.stack(pooled).flatten(1))
        return self.score(x), self.cls_loc(x).reshape(len(rois), -1, 4)


def anchors_of(case: Case) -> np.ndarray:
    anchors = []
    rows, columns = (side // STRIDE for side in case.image_hw)
    for row, column, ratio, scale in itertools.product(range(rows), range(columns), RATIOS, case.scales):
        half_height = 0.5 * STRIDE * scale * np.sqrt(ratio)
        half_width = 0.5 * STRIDE * scale * np.sqrt(1 / ratio)
        y, x = (row + 0.5) * STRIDE, (column + 0.5) * STRIDE
        anchors.append((y - half_height, x - half_width, y + half_height, x + half_width))
    return np.array(anchors)


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    near = np.maximum(boxes[:, None, :2], others[None, :, :2])
    far = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.maximum(far - near, 0), axis=2)
    areas = [np.prod(of[:, 2:] - of[:, :2], axis=1) for of in (boxes, others)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def encoded(boxes: np.ndarray, targets: np.ndarray) -> torch.Tensor:
    sides, target_sides = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    apart = (targets[:, :2] + 0.5 * target_sides) - (boxes[:, :2] + 0.5 * sides)
    return torch.from_numpy(np.hstack([apart / sides, np.log(target_sides / sides)]).astype(np.float32))


def anchor_targets(case: Case, anchors: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns label (-1, 0, 1) and deltas of each anchor. All anchors that tie for a box's best IoU are positive."""
    boxes, (height, width) = np.array(case.boxes, np.float64), case.image_hw
    inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= height) & (anchors[:, 3] <= width)
    iou = overlaps(anchors[inside], boxes).astype(np.float32)
    labels = np.full(len(iou), -1)
    labels[iou.max(1) < 0.3] = 0
    labels[(iou == iou.max(0)).any(1)] = 1
    labels[iou.max(1) >= 0.7] = 1
    whole = np.full(len(anchors), -1)
    whole[inside] = labels
    return torch.from_numpy(whole), encoded(anchors, boxes[overlaps(anchors, boxes).argmax(1)])


def proposed(case: Case, anchors: np.ndarray, deltas: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the proposals by descending foreground logit; the notebook's NMS counts corners as inclusive."""
    sides = anchors[:, 2:] - anchors[:, :2]
    centres = anchors[:, :2] + 0.5 * sides + deltas[:, :2] * sides
    half = 0.5 * np.exp(deltas[:, 2:]) * sides
    boxes = np.hstack([centres - half, centres + half]).astype(np.float32)
    limits = np.tile(case.image_hw, 2)
    boxes = np.clip(boxes, 0, limits).astype(np.float32)
    large = (boxes[:, 2:] - boxes[:, :2] >= 16).all(1)
    boxes, scores = boxes[large], scores[large]
    boxes = boxes[np.argsort(-scores, kind="stable")[:12000]]
    kept, rest = [], np.arange(len(boxes))
    inclusive = boxes + np.float32([0, 0, 1, 1])
    while len(rest) and len(kept) < case.proposals:
        kept.append(rest[0])
        iou = overlaps(inclusive[rest[:1]], inclusive[rest[1:]])[0]
        rest = rest[1:][iou <= 0.7]
    return boxes[kept]


def smooth_l1(deltas: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean over elements: divided by four times the number of positives."""
    return LAMBDA * functional.smooth_l1_loss(deltas, targets)


def step(
    case: Case, net: Network, anchors: np.ndarray, rois: np.ndarray | None = None
) -> tuple[list[torch.Tensor], np.ndarray]:
    """Returns the four losses and the proposals, which may be given."""
    dtype = next(net.parameters()).dtype
    features = net.features(torch.from_numpy(image_of(case))[None].to(dtype))
    deltas, logits = net.region_proposals(features)
    labels, targets = anchor_targets(case, anchors)
    positive = labels > 0
    losses = [
        functional.cross_entropy(logits, labels, ignore_index=-1),
        smooth_l1(deltas[positive], targets[positive].to(dtype)),
    ]
    if rois is None:
        rois = proposed(case, anchors, deltas.detach().numpy().astype(np.float64), logits.detach().numpy()[:, 1])
    boxes = np.array(case.boxes, np.float64)
    iou = overlaps(rois.astype(np.float64), boxes)
    positive = iou.max(1) >= 0.5
    labels = torch.from_numpy(np.where(positive, np.array(case.labels)[iou.argmax(1)], 0))
    assert positive.any(), "a mean over nothing"
    scores, deltas = net.regions(features, rois)
    own = deltas[torch.arange(len(rois)), labels]
    targets = encoded(rois.astype(np.float64), boxes[iou.argmax(1)])
    losses += [functional.cross_entropy(scores, labels), smooth_l1(own[positive], targets[positive].to(dtype))]
    print(
        "positive anchors and RoIs", int((anchor_targets(case, anchors)[0] > 0).sum()), int(positive.sum()), len(rois)
    )
    return losses, rois


# Our library reads the names of faster-rcnn.pytorch.
NAMES = {
    "features": "RCNN_base",
    "rpn_conv": "RCNN_rpn.RPN_Conv",
    "cls_layer": "RCNN_rpn.RPN_cls_score",
    "reg_layer": "RCNN_rpn.RPN_bbox_pred",
    "head.0": "RCNN_top.0",
    "head.2": "RCNN_top.3",
    "score": "RCNN_cls_score",
    "cls_loc": "RCNN_bbox_pred",
}


def renamed(key: str) -> str:
    old = next(old for old in NAMES if key.startswith(f"{old}."))
    return NAMES[old] + key.removeprefix(old)


def relaid(key: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of the notebook's layer as faster-rcnn.pytorch lays it out, or the other way round.

    The notebook has the two logits of an anchor next to each other, and y before x in deltas.
    """
    if key.startswith(("reg_layer", "cls_loc")):
        return array.reshape(-1, 4, *array.shape[1:])[:, [1, 0, 3, 2]].reshape(array.shape)
    return array


def two_logits(key: str, array: np.ndarray, *, to_notebook: bool) -> np.ndarray:
    if not key.startswith("cls_layer"):
        return array
    shape = (2, -1) if to_notebook else (-1, 2)
    return array.reshape(*shape, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def written(name: str, case: Case) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    net, anchors = Network(case), anchors_of(case)
    keys = [key for key in net.state_dict() if not key.endswith("num_batches_tracked")]
    shapes = [list(net.state_dict()[key].shape) for key in keys]
    weights = {key: rule_weight(renamed(key), shape, SALT) for key, shape in zip(keys, shapes, strict=True)}
    found = {
        "salt": np.array(SALT),
        "state_keys": np.array([renamed(key) for key in keys]),
        "state_shapes": np.array([str(shape) for shape in shapes]),
        "state_crc32": np.array([zlib.crc32(weight.tobytes()) for weight in weights.values()]),
        "image_crc32": np.array(zlib.crc32(image_of(case).tobytes())),
    }
    relaid_weights = {
        key: torch.from_numpy(two_logits(key, relaid(key, weight), to_notebook=True).copy())
        for key, weight in weights.items()
    }
    net.load_state_dict(relaid_weights, strict=False)
    double = copy.deepcopy(net).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    net.train()
    for number in range(1, case.steps + 1):
        optimizer.zero_grad()
        losses, rois = step(case, net, anchors)
        sum(losses).backward()
        print(name, number, [float(loss.detach()) for loss in losses])
        found[f"losses_{number}"] = np.array([float(loss.detach()) for loss in losses])
        found[f"rois_{number}"] = rois
        if number == 1:
            gradients = dict(net.named_parameters())
            found["grad_keys"] = np.array([renamed(key) for key in gradients])
            # The exact numbers: this sum over 640,000 pixels and thousands of channels is rounded in float32.
            in_double = step(case, double.train(), anchors, rois)[0]
            sum(in_double).backward()
            found["losses_1_f64"] = np.array([float(loss.detach()) for loss in in_double])
            print(name, "float64", list(found["losses_1_f64"]))
            norms = [np.array([float(of.grad.double().norm()) for of in n.parameters()]) for n in (net, double)]
            found["grad_norms"], found["grad_norms_f64"] = norms
            print(name, "relative rounding of gradients", dict(zip(gradients, np.abs(norms[0] / norms[1] - 1))))
            # Detection with the weights of the rule and the statistics of this step: an update would amplify rounding.
            net.eval()
            with torch.no_grad():
                features = net.features(torch.from_numpy(image_of(case))[None])
                _, logits = net.region_proposals(features)
            found["eval_features"] = features.numpy().ravel()[:: max(1, features.numel() // 1024)]
            found["eval_objectness"] = (logits[:, 1] - logits[:, 0]).numpy()[:: max(1, len(logits) // 1024)]
            net.train()
        optimizer.step()
        for statistic in ("running_mean", "running_var"):
            arrays = [array.numpy() for key, array in net.state_dict().items() if key.endswith(statistic)]
            found[f"{statistic}_{number}"] = np.concatenate(arrays)
    return {f"{name}/{key}": value for key, value in found.items()}


if __name__ == "__main__":
    arrays = {}
    for name, case in CASES.items():
        arrays |= written(name, case)
    np.savez_compressed(Path(__file__).parent / "golden" / "notebook_step.npz", **arrays)
