"""The computations of the library as plain NumPy loops over single pairs and single samples."""

import math

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

f32 = np.float32


def arrays(dtype, shape, *, elements=None):
    """Draws arrays element by element. By default Hypothesis fills most elements with one value: equal boxes."""
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
            i for i in waiting if groups[i] != groups[best] or float(iou(boxes[best], boxes[i])) <= iou_threshold
        ]
    return kept[:max_output]


def soft_nms(boxes, scores, valid, *, kind, iou_threshold, sigma, score_threshold, max_output, groups):
    """The loop of Bodla et al. 2017, figure 2, on each group; then the best over all groups: [(index, score)]."""
    kept = []
    for group in np.unique(groups):
        waiting = {
            i: float(scores[i]) for i in np.flatnonzero(valid & (groups == group)) if scores[i] > score_threshold
        }
        while waiting:
            best = min(waiting, key=lambda i: (-waiting[i], i))
            kept.append((int(best), waiting.pop(best)))
            for i in list(waiting):
                overlap = float(iou(boxes[best], boxes[i]))
                if kind == "gaussian":
                    waiting[i] *= math.exp(-(overlap**2) / sigma)
                elif overlap > iou_threshold:
                    waiting[i] *= 1.0 - overlap
                if waiting[i] <= score_threshold:
                    del waiting[i]
    return sorted(kept, key=lambda row: -row[1])[:max_output]


def cell_anchors(base, scales, ratios, *, rounding) -> np.ndarray:
    """Rounds the sides before scaling, or half the sides after scaling, or nothing."""
    cells = []
    for ratio in ratios:
        width, height = base / math.sqrt(ratio), base * math.sqrt(ratio)
        if rounding == "base":
            width = round(width)
            height = round(width * ratio)
        for scale in scales:
            half = width * scale / 2, height * scale / 2
            half = [round(side) if rounding == "half" else side for side in half]
            cells.append([-half[0], -half[1], *half])
    return np.array(cells)


def encode(box, anchor, means=(0, 0, 0, 0), stds=(1, 1, 1, 1)) -> np.ndarray:
    box, anchor = np.asarray(box, np.float64), np.asarray(anchor, np.float64)
    (w, h), (wa, ha) = box[2:] - box[:2], anchor[2:] - anchor[:2]
    dx = ((box[0] + box[2]) - (anchor[0] + anchor[2])) / 2 / wa
    dy = ((box[1] + box[3]) - (anchor[1] + anchor[3])) / 2 / ha
    return (np.array([dx, dy, math.log(w / wa), math.log(h / ha)]) - means) / stds


def decode(
    deltas,
    anchor,
    means=(0, 0, 0, 0),
    stds=(1, 1, 1, 1),
    *,
    max_log_scale=math.log(62.5),
    far_corner_offset=0,
) -> np.ndarray:
    dx, dy, dw, dh = np.asarray(deltas, np.float64) * stds + means
    x1, y1, x2, y2 = np.asarray(anchor, np.float64)
    w, h = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + dx * w, (y1 + y2) / 2 + dy * h
    limit = math.inf if max_log_scale is None else max_log_scale
    w, h = (side * math.exp(min(scale, limit)) for side, scale in ((w, dw), (h, dh)))
    offset = far_corner_offset
    return np.array([x - w / 2, y - h / 2, x + w / 2 + offset, y + h / 2 + offset])


def clip(box, height, width, *, far_corner_offset=0) -> np.ndarray:
    o = far_corner_offset
    lows, highs = (0, 0, o, o), (width - o, height - o, width, height)
    return np.array([min(max(v, low), high) for v, low, high in zip(box, lows, highs, strict=True)])


def within_border(box, height, width, allowed) -> bool:
    if allowed is None:
        return True
    x1, y1, x2, y2 = box
    return x1 >= -allowed and y1 >= -allowed and x2 <= width + allowed and y2 <= height + allowed


def match(iou_matrix, gt_valid, *, fg_iou, bg_iou, low_quality, clobber_positives=False) -> tuple[list[int], list[int]]:
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
                    label = 0 if clobber_positives and label == 0 else 1
        indices.append(index)
        labels.append(label)
    return indices, labels


def bilinear_weights(size, y, x) -> list[tuple[int, int, float]]:
    """(row, column, weight) of the cells around a point; centres at integers, nothing beyond one cell outside."""
    height, width = size
    if not (-1 <= y <= height and -1 <= x <= width):  # as NaN is not
        return []
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    b, r = y - top, x - left
    return [
        (top, left, (1 - b) * (1 - r)),
        (top, right, (1 - b) * r),
        (bottom, left, b * (1 - r)),
        (bottom, right, b * r),
    ]


def roi_align_matrices(sizes, boxes, levels, *, strides, output_size, sampling_ratio, aligned) -> list[np.ndarray]:
    """Per region [s, s, h, w]: the weight of every cell of its level in every bin."""
    matrices = []
    for box, level in zip(np.asarray(boxes, np.float64), levels, strict=True):
        x1, y1, x2, y2 = box / strides[level] - 0.5 * aligned
        w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        sides = np.nan_to_num([w, h], posinf=0.0)
        columns, rows = (sampling_ratio or max(math.ceil(side / output_size), 0) for side in sides)
        matrix = np.zeros((output_size, output_size, *sizes[level]))
        for p, q in np.ndindex(output_size, output_size):
            for i, j in np.ndindex(rows, columns):
                y = y1 + (p + (i + 0.5) / rows) * h / output_size
                x = x1 + (q + (j + 0.5) / columns) * w / output_size
                for row, column, weight in bilinear_weights(sizes[level], y, x):
                    matrix[p, q, row, column] += weight / (rows * columns)
        matrices.append(matrix)
    return matrices


def roi_align(features, boxes, levels, **options) -> np.ndarray:
    matrices = roi_align_matrices([f.shape[:2] for f in features], boxes, levels, **options)
    return np.stack([np.tensordot(m, np.float64(features[k]), 2) for m, k in zip(matrices, levels, strict=True)])


def roi_align_gradient(cotangent, sizes, boxes, levels, **options) -> list[np.ndarray]:
    """Returns the gradients of the features of every level, with the transposed matrices."""
    gradients = [np.zeros((*size, cotangent.shape[-1])) for size in sizes]
    matrices = roi_align_matrices(sizes, boxes, levels, **options)
    for matrix, level, bins in zip(matrices, levels, np.float64(cotangent), strict=True):
        gradients[level] += np.tensordot(matrix, bins, ((0, 1), (0, 1)))
    return gradients


def roi_align_average(features, boxes, *, stride, output_size) -> np.ndarray:
    features = np.asarray(features, np.float64)
    height, width, channels = features.shape
    pooled = np.zeros((len(boxes), output_size, output_size, channels))
    for r, box in enumerate(np.asarray(boxes, np.float64)):
        x1, y1, x2, y2 = box / stride
        samples = np.zeros((output_size + 1, output_size + 1, channels))
        for i, j in np.ndindex(samples.shape[:2]):
            y = y1 + i * max(y2 - y1 + 1, 0) / output_size
            x = x1 + j * max(x2 - x1 + 1, 0) / output_size
            if 0 <= y < height and 0 <= x < width:
                top, left = min(int(y), height - 2), min(int(x), width - 2)
                b, a = y - top, x - left
                upper = (1 - a) * features[top, left] + a * features[top, left + 1]
                lower = (1 - a) * features[top + 1, left] + a * features[top + 1, left + 1]
                samples[i, j] = (1 - b) * upper + b * lower
        for p, q in np.ndindex(output_size, output_size):
            pooled[r, p, q] = samples[p : p + 2, q : q + 2].mean((0, 1))
    return pooled


def roi_crop(features, boxes, *, stride, output_size) -> np.ndarray:
    features = np.asarray(features, np.float64)
    height, width, channels = features.shape
    pooled = np.full((len(boxes), output_size, output_size, channels), -np.inf)
    for r, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, np.float64)):
        for i, j in np.ndindex(2 * output_size, 2 * output_size):
            y = (y1 + i * (y2 - y1) / (2 * output_size - 1)) / stride
            x = (x1 + j * (x2 - x1) / (2 * output_size - 1)) / stride
            sample = np.zeros(channels)
            for j_cell, k_cell in np.ndindex(height, width):
                sample += max(1 - abs(y - j_cell), 0) * max(1 - abs(x - k_cell), 0) * features[j_cell, k_cell]
            pooled[r, i // 2, j // 2] = np.maximum(pooled[r, i // 2, j // 2], sample)
    return pooled


def round_away(value) -> int:
    """The nearest integer, halves away from zero: round() of C."""
    return int(math.copysign(math.floor(abs(float(value)) + 0.5), value))


def roi_pool_bins(first, last, size, bins, *, quantisation) -> list[range]:
    """The cells of each bin along one axis; corners in cells, not yet integers."""
    if quantisation == "rounded":
        first, last = round_away(first), round_away(last)
        quotient = f32(max(last - first + 1, 1)) / f32(bins)
        edges = [(math.floor(f32(p) * quotient), math.ceil(f32(p + 1) * quotient)) for p in range(bins)]
        return [range(max(first + a, 0), min(first + b, size)) for a, b in edges]
    cells = range(size)[max(int(first), 0) : max(int(last) + 1, 0)]
    return [cells[p * len(cells) // bins : -(-(p + 1) * len(cells) // bins)] for p in range(bins)]


def roi_pool(features, boxes, *, stride, output_size, quantisation) -> tuple[np.ndarray, np.ndarray]:
    """Maxima, and the (row, column) of the first cell in row-major order that has each; -1 in empty bins."""
    height, width, channels = features.shape
    pooled = np.zeros((len(boxes), output_size, output_size, channels), f32)
    places = np.full((*pooled.shape, 2), -1)
    for r, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, f32) / f32(stride)):
        rows = roi_pool_bins(y1, y2, height, output_size, quantisation=quantisation)
        columns = roi_pool_bins(x1, x2, width, output_size, quantisation=quantisation)
        for p, q, c in np.ndindex(output_size, output_size, channels):
            maximum = -np.inf
            for j in rows[p]:
                for k in columns[q]:
                    if features[j, k, c] > maximum:
                        maximum = pooled[r, p, q, c] = features[j, k, c]
                        places[r, p, q, c] = j, k
    return pooled, places


def roi_pool_gradient(places, cotangent, shape) -> np.ndarray:
    gradient = np.zeros(shape, np.float64)
    for r, p, q, c in np.ndindex(cotangent.shape):
        j, k = places[r, p, q, c]
        if j >= 0:
            gradient[j, k, c] += cotangent[r, p, q, c]
    return gradient
