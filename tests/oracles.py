"""What the library computes, written again as plain NumPy loops, one pair and one sample at a time."""

import math

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

f32 = np.float32


def arrays(dtype, shape, *, elements=None):
    """Arrays whose every element is drawn. By default Hypothesis fills most with one value: equal boxes."""
    return hypothesis_numpy.arrays(dtype, shape, elements=elements, fill=st.nothing())


def area(boxes) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def iou(a, b) -> np.float32:
    """Intersection over union in float32; 0 where the union is empty."""
    a, b = np.asarray(a, f32), np.asarray(b, f32)
    width = max(f32(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(f32(0), min(a[3], b[3]) - max(a[1], b[1]))
    intersection = f32(width * height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return f32(intersection / union) if union > 0 else f32(0)


def iou_matrix(a, b) -> np.ndarray:
    return np.array([[iou(x, y) for y in b] for x in a], f32).reshape(len(a), len(b))


def greedy_nms(boxes, scores, valid, *, iou_threshold, max_output=None, groups=None) -> list[int]:
    """The textbook loop. float32 IoU against the threshold as a double: torchvision on a CPU."""
    groups = np.zeros(len(boxes), int) if groups is None else groups
    waiting = sorted(np.flatnonzero(valid), key=lambda i: (-scores[i], i))
    kept = []
    while waiting:
        best, *waiting = waiting
        kept.append(int(best))
        waiting = [
            i
            for i in waiting
            if groups[i] != groups[best] or float(iou(boxes[best], boxes[i])) <= iou_threshold
        ]
    return kept[:max_output]


def encode(box, anchor, weights=(1, 1, 1, 1)) -> np.ndarray:
    box, anchor = np.asarray(box, np.float64), np.asarray(anchor, np.float64)
    (w, h), (wa, ha) = box[2:] - box[:2], anchor[2:] - anchor[:2]
    dx = ((box[0] + box[2]) - (anchor[0] + anchor[2])) / 2 / wa
    dy = ((box[1] + box[3]) - (anchor[1] + anchor[3])) / 2 / ha
    return np.array([dx, dy, math.log(w / wa), math.log(h / ha)]) * weights


def decode(deltas, anchor, weights=(1, 1, 1, 1)) -> np.ndarray:
    dx, dy, dw, dh = np.asarray(deltas, np.float64) / weights
    x1, y1, x2, y2 = np.asarray(anchor, np.float64)
    w, h = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + dx * w, (y1 + y2) / 2 + dy * h
    w, h = (side * math.exp(min(scale, math.log(62.5))) for side, scale in ((w, dw), (h, dh)))
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def clip(box, height, width) -> np.ndarray:
    return np.array([min(max(v, 0), end) for v, end in zip(box, (width, height) * 2, strict=True)])


def match(iou_matrix, gt_valid, *, fg_iou, bg_iou, low_quality) -> tuple[list[int], list[int]]:
    """Indices (0 where nothing is valid) and labels (-1, 0, 1)."""
    columns = np.flatnonzero(gt_valid)
    low, high, fg = f32(bg_iou[0]), f32(bg_iou[1]), f32(fg_iou)
    indices, labels = [], []
    for row in iou_matrix:
        best, index = f32(0), 0
        for column in columns:
            if row[column] > best:
                best, index = row[column], int(column)
        label = 1 if best >= fg else 0 if low <= best < high else -1
        if low_quality:
            for column in columns:
                if row[column] > 0 and row[column] == max(iou_matrix[:, column]):
                    label = 1
        indices.append(index)
        labels.append(label)
    return indices, labels


def bilinear(features, y, x) -> np.ndarray:
    """The features at one point; cell centres at integers, zero beyond one cell outside."""
    height, width, channels = features.shape
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(channels)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    b, r = y - top, x - left
    return (
        (1 - b) * (1 - r) * features[top, left]
        + (1 - b) * r * features[top, right]
        + b * (1 - r) * features[bottom, left]
        + b * r * features[bottom, right]
    )


def roi_align(features, boxes, *, stride, output_size, sampling_ratio) -> np.ndarray:
    features = np.asarray(features, np.float64)
    pooled = np.zeros((len(boxes), output_size, output_size, features.shape[2]))
    for r, box in enumerate(np.asarray(boxes, np.float64)):
        x1, y1, x2, y2 = box / stride - 0.5
        for p, q in np.ndindex(output_size, output_size):
            for i, j in np.ndindex(sampling_ratio, sampling_ratio):
                y = y1 + (p + (i + 0.5) / sampling_ratio) * (y2 - y1) / output_size
                x = x1 + (q + (j + 0.5) / sampling_ratio) * (x2 - x1) / output_size
                pooled[r, p, q] += bilinear(features, y, x) / sampling_ratio**2
    return pooled
