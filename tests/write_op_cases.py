"""Writes tests/golden/ops.npz: what torchvision's operators return for the cases that its own tests are about.

    pip install torch torchvision numpy
    python tests/write_op_cases.py

torch is needed by this script only. The inputs are drawn here. tests/test_peer_ops.py compares `fasterrcnn_jax.ops`
with the numbers; tests/golden/README.md lists the arrays.
"""

from pathlib import Path

import numpy as np
import torch
from torchvision import ops

RNG = np.random.default_rng(18)
OUT: dict[str, np.ndarray] = {}


def put(name: str, values) -> None:
    OUT[name] = np.asarray(values.detach() if isinstance(values, torch.Tensor) else values)


def boxes_of(count: int, size: float = 100.0) -> np.ndarray:
    """Returns boxes of positive sides whose corners are eighths of a pixel, so that float32 and float16 hold them."""
    near = RNG.uniform(0, size, (count, 2))
    far = near + RNG.uniform(1, size / 2, (count, 2))
    return (np.concatenate([near, far], axis=1) * 8).round().astype(np.float32) / 8


def scores_of(count: int) -> np.ndarray:
    """Returns scores that differ, in float16 too."""
    return (RNG.permutation(count) + 1).astype(np.float32) / 1024


def kept(name: str, boxes: np.ndarray, scores: np.ndarray, *thresholds: float) -> None:
    put(f"{name}_boxes", boxes)
    put(f"{name}_scores", scores)
    for threshold in thresholds:
        put(f"{name}_keep_{round(threshold * 100)}", ops.nms(torch.tensor(boxes), torch.tensor(scores), threshold))


def nms_cases() -> None:
    kept("nms_random", boxes_of(500), scores_of(500), 0.2, 0.5, 0.8)
    kept("nms_identical", np.tile(boxes_of(1), (12, 1)), scores_of(12), 0.5)
    kept("nms_equal_scores", boxes_of(60), np.full(60, 0.5, np.float32), 0.5)
    kept("nms_large", boxes_of(200) * 1e6, scores_of(200), 0.5)
    empty = boxes_of(40)
    empty[::3, 2:] = empty[::3, :2]  # of no area
    kept("nms_no_area", empty, scores_of(40), 0.5)
    kept("nms_none", np.zeros((0, 4), np.float32), np.zeros(0, np.float32), 0.5)
    # For each threshold a pair whose IoU is a little above it and one whose IoU is a little below.
    for threshold in (0.2, 0.5, 0.8):
        side = 1000.0
        pairs = []
        for number, iou in enumerate((threshold + 1e-4, threshold - 1e-4)):
            left = number * 3000.0
            pairs += [[left, 0, left + side, side], [left, 0, left + side, side * iou]]
        kept(f"nms_close_{round(threshold * 100)}", np.float32(pairs), np.float32([0.9, 0.8, 0.7, 0.6]), threshold)


def batched_nms_cases() -> None:
    def cases(name: str, boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> None:
        put(f"{name}_boxes", boxes)
        put(f"{name}_scores", scores)
        put(f"{name}_groups", groups)
        arrays = torch.tensor(boxes), torch.tensor(scores), torch.tensor(groups)
        for ending, run in (
            ("", ops.batched_nms),
            ("_per_group", ops.boxes._batched_nms_vanilla),
            ("_by_offset", ops.boxes._batched_nms_coordinate_trick),
        ):
            put(f"{name}_keep{ending}", run(*arrays, 0.9 if "random" in name else 0.5))

    cases("batched_random", boxes_of(500), scores_of(500), RNG.integers(0, 4, 500))
    cases("batched_negative", boxes_of(60), scores_of(60), RNG.integers(-3, 3, 60))
    cases("batched_none", np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    # Far from the origin, an offset by class rounds away the corners.
    cases("batched_far", boxes_of(200, 20.0) + np.float32(1e6), scores_of(200), RNG.integers(0, 40, 200))


ROIS = np.float32(
    [
        [0, 0, 0, 4, 4],
        [0, 0, 2, 3, 9.5],
        [0, 3.25, 1.5, 9.75, 8.25],
        [0, -3, -2, 20, 15],  # over every border
        [1, 0, 0, 16, 12],  # the whole map
        [1, 5, 5, 5, 5],  # a point
        [1, 2.5, 3.5, 2.75, 3.75],  # smaller than a cell
        [1, 40, 40, 60, 60],  # outside
        [1, 7, 2, 15.5, 11],
    ]
)
POOLED = (((5, 5), 1.0), ((3, 6), 0.5), ((4, 1), 0.5))
# With aligned and the sampling ratio; -1 is adaptive.
ALIGNED = (
    ((5, 5), 1.0, False, -1),
    ((5, 5), 0.3, True, -1),
    ((5, 5), 0.5, True, 3),
    ((3, 6), 0.3, False, -1),
    ((3, 6), 0.5, True, -1),
    ((3, 6), 1.0, True, 1),
    ((3, 6), 0.3, False, 3),
    ((4, 1), 0.5, False, -1),
    ((4, 1), 0.3, True, 1),
)


def roi_cases() -> None:
    features = RNG.standard_normal((2, 12, 16, 3), np.float32)
    put("roi_features", features)
    put("roi_rois", ROIS)

    def run(name: str, operator, output: tuple[int, int], scale: float, **options) -> None:
        maps = torch.tensor(features.transpose(0, 3, 1, 2), requires_grad=True)
        # The same regions of the map, whatever the scale.
        rois = torch.tensor(ROIS * np.float32([1, *[1 / scale] * 4]))
        pooled = operator(maps, rois, output, scale, **options)
        cotangent = OUT.setdefault(
            f"roi_cotangent_{output[0]}_{output[1]}", RNG.standard_normal((len(ROIS), *output, 3), np.float32)
        )
        pooled.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
        put(name, pooled.permute(0, 2, 3, 1))
        put(f"{name}_gradient", maps.grad.permute(0, 2, 3, 1))

    for output, scale in POOLED:
        run(f"pool_{output[0]}_{output[1]}_scale{round(scale * 10)}", ops.roi_pool, output, scale)
    for output, scale, aligned, ratio in ALIGNED:
        name = f"align_{output[0]}_{output[1]}_scale{round(scale * 10)}_aligned{int(aligned)}_ratio{ratio}"
        run(name, ops.roi_align, output, scale, sampling_ratio=ratio, aligned=aligned)
    # Numbers of 16 bits: torchvision computes in float32 here, from the same rounded values.
    maps = torch.tensor(features.astype(np.float16).astype(np.float32).transpose(0, 3, 1, 2))
    half = torch.tensor(ROIS)
    put("align_half", ops.roi_align(maps, half, 5, sampling_ratio=2, aligned=True).permute(0, 2, 3, 1))
    put("pool_half", ops.roi_pool(maps, half, 5).permute(0, 2, 3, 1))


def pyramid_cases() -> None:
    levels = {str(k): RNG.standard_normal((1, 5, 256 // 2**k, 320 // 2**k), np.float32) for k in (2, 3, 4, 5)}
    for name, level in levels.items():
        put(f"pyramid_map_{name}", level[0].transpose(1, 2, 0))
    boxes = np.float32([[0, 0, 30, 30], [10, 20, 150, 140], [5, 5, 300, 250], [0, 0, 320, 256], [40, 40, 41, 300]])
    boxes = np.concatenate([boxes, boxes_of(20, 200.0)])
    put("pyramid_boxes", boxes)
    for ratio in (2, -1):
        pooler = ops.MultiScaleRoIAlign(list(levels), (3, 2), ratio)
        pooled = pooler({n: torch.tensor(v) for n, v in levels.items()}, [torch.tensor(boxes)], [(256, 320)])
        put(f"pyramid_pooled_ratio{ratio}", pooled.permute(0, 2, 3, 1))


def box_cases() -> None:
    def iou(name: str, boxes: np.ndarray, others: np.ndarray) -> None:
        put(f"{name}_boxes", boxes)
        put(f"{name}_others", others)
        put(name, ops.box_iou(torch.tensor(boxes), torch.tensor(others)))

    iou("iou_random", boxes_of(40), boxes_of(30))
    iou(
        "iou_integers",
        RNG.integers(0, 50, (20, 2)).repeat(2, 1)[:, [0, 2, 1, 3]] + [0, 0, 9, 30],
        np.int64([[5, 5, 40, 60]]),
    )
    iou("iou_identical", same := boxes_of(8), same)
    iou("iou_large", boxes_of(12) * 1e7, boxes_of(12) * 1e7)
    iou("iou_far", boxes_of(12) + np.float32(2**15), boxes_of(12) + np.float32(2**15))
    iou("iou_apart", boxes_of(6), boxes_of(6) + np.float32(1000))
    iou("iou_none", np.zeros((0, 4), np.float32), boxes_of(3))
    iou("iou_float16", boxes_of(12).astype(np.float16), boxes_of(12).astype(np.float16))
    for kind in (np.int16, np.int32, np.int64, np.float32, np.float64):
        boxes = np.array([[0, 0, 100, 100], [0, 0, 0, 0], [3, 4, 90, 70]], kind)
        put(f"area_{np.dtype(kind).name}", ops.box_area(torch.tensor(boxes)))
    boxes = boxes_of(60, 150.0) - np.float32(40)
    put("clip_boxes", boxes)
    put("clip", ops.clip_boxes_to_image(torch.tensor(boxes), (90, 120)))
    put("clip_none", ops.clip_boxes_to_image(torch.zeros(0, 4), (90, 120)))
    put("clip_each", ops.clip_boxes_to_image(torch.tensor(boxes.reshape(6, 10, 4)), (90, 120)))
    # The gradient of the IoU of two boxes and of clipped corners.
    boxes, others = (torch.tensor(boxes_of(10), requires_grad=True) for _ in range(2))
    ops.box_iou(boxes, others).square().sum().backward()
    put("gradient_boxes", boxes)
    put("gradient_others", others)
    put("gradient_of_boxes", boxes.grad)
    put("gradient_of_others", others.grad)
    cut = torch.tensor(OUT["clip_boxes"], requires_grad=True)
    ops.clip_boxes_to_image(cut, (90, 120)).square().sum().backward()
    put("gradient_of_clip", cut.grad)


def main() -> None:
    for cases in (nms_cases, batched_nms_cases, roi_cases, pyramid_cases, box_cases):
        cases()
    path = Path(__file__).parent / "golden" / "ops.npz"
    np.savez_compressed(path, **OUT)
    print(f"{path}: {len(OUT)} arrays, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
