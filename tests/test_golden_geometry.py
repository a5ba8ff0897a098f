"""Anchors, box coding and intersections over union, against the reference implementations.

tests/golden/README.md describes the arrays and their origin. Tolerances were fixed before the comparison: whole-pixel
results are identical; float32 values near 1000 are 6e-5 apart, and deltas divide this by a side.
"""

import functools
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from fidelity import compare, continuous, inclusive, swapped

from fasterrcnn_jax.ops.anchors import cell_anchors, grid_anchors
from fasterrcnn_jax.ops.box_coder import decode, encode
from fasterrcnn_jax.ops.boxes import clip, larger_than, pairwise_iou
from fasterrcnn_jax.structures import MAX_LOG_SCALE

GOLDEN = np.load(Path(__file__).parent / "golden" / "geometry.npz")
RATIOS = (0.5, 1.0, 2.0)
ONES = (1.0, 1.0, 1.0, 1.0)
STDS = (0.1, 0.1, 0.2, 0.2)
DELTAS = dict(rtol=1e-4, atol=1e-5)
CORNERS = dict(rtol=1e-5, atol=2e-3)

jitted_encode = functools.partial(jax.jit, static_argnames=("means", "stds"))(encode)
jitted_decode = functools.partial(jax.jit, static_argnames=("means", "stds", "max_log_scale", "far_corner_offset"))(
    decode
)
jitted_clip = functools.partial(jax.jit, static_argnames="far_corner_offset")(clip)
iou = jax.jit(pairwise_iou)


def crc32(values) -> int:
    return zlib.crc32(np.ascontiguousarray(values, np.float32).tobytes())


def test_faster_rcnn_pytorchs_cells_and_grid():
    """Its cells are centred on (7.5, 7.5) as inclusive corners, which is (8, 8) as continuous ones."""
    for name, scales in (("jw_cells", (8.0, 16.0, 32.0)), ("jw_cells_coco", (4.0, 8.0, 16.0, 32.0))):
        cells = cell_anchors(16.0, scales, RATIOS, rounding="base")
        compare("anchors", "faster-rcnn.pytorch", name, inclusive(cells + 8), GOLDEN[name])
    cells = cell_anchors(16.0, (8.0, 16.0, 32.0), RATIOS, rounding="base")
    grid = grid_anchors(cells, tuple(GOLDEN["grid_hw"].tolist()), (16, 16))
    compare("anchors", "faster-rcnn.pytorch", "grid", inclusive(grid), GOLDEN["jw_grid"])


def test_chenyuntcs_cells_and_grid():
    cells = cell_anchors(16.0, (8.0, 16.0, 32.0), RATIOS, rounding="none")
    tolerance = dict(rtol=1e-5, atol=1e-4)
    theirs = GOLDEN["cy_cells_yxyx"]
    compare("anchors", "simple-faster-rcnn-pytorch", "cells", swapped(cells + 8), theirs, **tolerance)
    # The whole grid is rebuilt from the reference's cells and compared with the reference's checksum.
    height, width = GOLDEN["grid_hw"].tolist()
    y, x = np.mgrid[0:height, 0:width] * 16
    shifts = np.stack([y, x, y, x], axis=-1).reshape(-1, 1, 4)
    expected = (theirs[None] + shifts).reshape(-1, 4).astype(np.float32)
    assert crc32(expected) == GOLDEN["cy_grid_yxyx_crc32"]
    np.testing.assert_array_equal(expected[::97], GOLDEN["cy_grid_yxyx_every_97"])
    grid = swapped(grid_anchors(cells, (height, width), (16, 16)))
    compare("anchors", "simple-faster-rcnn-pytorch", "grid", grid, expected, **tolerance)


def test_torchvisions_cells_and_grids_of_five_levels():
    cells = [cell_anchors(16.0, (size / 16,), RATIOS, rounding="half") for size in GOLDEN["tv_sizes"].tolist()]
    compare("anchors", "torchvision", "cells, five levels", np.stack(cells), GOLDEN["tv_cells"])
    three_sizes = cell_anchors(16.0, (2.0, 4.0, 8.0), RATIOS, rounding="half")
    compare("anchors", "torchvision", "cells, three sizes", three_sizes, GOLDEN["tv_cells_of_3_sizes"])
    canvas, grids = GOLDEN["tv_canvas_hw"], [tuple(hw) for hw in GOLDEN["tv_grid_hw"].tolist()]
    strides = [tuple((canvas // hw).tolist()) for hw in grids]
    np.testing.assert_array_equal(strides, GOLDEN["tv_strides_hw"])
    levels = [grid_anchors(*level, centre="corner") for level in zip(cells, grids, strides)]
    for number, level in enumerate(levels):
        name = f"tv_grid_{number}" + ("_every_101" if number < 3 else "")
        rows = level[::101] if number < 3 else level
        compare("anchors", "torchvision", name, rows, GOLDEN[name])
        sums = level.astype(np.float64).sum(axis=0)
        compare("anchors", "torchvision", f"sums of level {number}", sums, GOLDEN["tv_grid_sums"][number])
    every = np.concatenate(levels)
    compare("anchors", "torchvision", "checksum of all levels", crc32(every), int(GOLDEN["tv_grid_crc32"]))


@pytest.mark.parametrize(
    "name, stds",
    [("jw_encode", ONES), ("jw_encode_shared", ONES), ("jw_encode_normalised", STDS)],
)
def test_faster_rcnn_pytorchs_targets(name, stds):
    anchors = GOLDEN["shared_anchors"][None].repeat(2, 0) if name.endswith("shared") else GOLDEN["anchors"]
    ours = jitted_encode(continuous(GOLDEN["boxes"]), continuous(anchors), stds=stds)
    compare("encode", "faster-rcnn.pytorch", name, ours, GOLDEN[name], **DELTAS)


def test_faster_rcnn_pytorchs_and_py_faster_rcnns_decoding_and_clipping():
    anchors = continuous(GOLDEN["anchors"])[:, :, None, :]
    ours = jitted_decode(GOLDEN["deltas"], anchors, max_log_scale=None, far_corner_offset=1)
    compare("decode", "faster-rcnn.pytorch", "no clamp", inclusive(ours), GOLDEN["jw_decode"], **CORNERS)
    clipped = np.stack([jitted_clip(boxes, hw, far_corner_offset=1) for boxes, hw in zip(ours, GOLDEN["image_hw"])])
    for reference, name in (
        ("faster-rcnn.pytorch", "jw_decode_clipped"),
        ("py-faster-rcnn", "pf_decode_clipped"),
    ):
        compare("decode and clip", reference, name, inclusive(clipped), GOLDEN[name], **CORNERS)
    # The case contains log scales above the limit.
    assert (GOLDEN["deltas"][..., 2:] > MAX_LOG_SCALE).any()


@pytest.mark.parametrize("name, stds", [("1111", ONES), ("10_10_5_5", STDS)])
def test_torchvisions_coder(name, stds):
    """Its weights are the reciprocals of our stds; log scales are limited after denormalisation."""
    anchors, weights = GOLDEN["anchors"], np.float32(1) / np.float32(stds)
    ours = jitted_encode(GOLDEN["boxes"], anchors, stds=stds)
    compare("encode", "torchvision", f"weights {name}", ours, GOLDEN[f"tv_encode_{name}"], **DELTAS)
    ours = jitted_decode(GOLDEN["deltas"] * weights, anchors[:, :, None, :], stds=stds)
    compare("decode", "torchvision", f"weights {name}", ours, GOLDEN[f"tv_decode_{name}"], **CORNERS)
    cut = GOLDEN["deltas"][..., 2] > MAX_LOG_SCALE
    assert cut.any()
    widths, sides = (ours[..., 2] - ours[..., 0])[cut], (anchors[..., 2] - anchors[..., 0])[:, :, None]
    limit = 1000 / 16 * np.broadcast_to(sides, cut.shape)[cut]
    compare("decode", "torchvision", f"clamped widths {name}", widths, limit, rtol=1e-4)


def test_torchvisions_clipping_and_size_filter():
    clipped = jitted_clip(GOLDEN["tv_decode_1111"][0], GOLDEN["image_hw"][0])
    compare("clip", "torchvision", "to the image", clipped, GOLDEN["tv_decode_clipped"])
    for name, size in (("1em3", 1e-3), ("16", 16.0)):
        kept = np.flatnonzero(np.asarray(larger_than(clipped, size, jax.numpy.ones(2))))
        compare("small boxes", "torchvision", f"sides of {size:g}", kept, GOLDEN[f"tv_keep_small_{name}"])


def test_chenyuntcs_coder():
    """It puts y before x and has no limit; its decoder read the deltas of image 0 as (dy, dx, dh, dw)."""
    anchors = GOLDEN["anchors"][0]
    ours = swapped(jitted_encode(GOLDEN["boxes"][0], anchors))
    compare("encode", "simple-faster-rcnn-pytorch", "image 0", ours, GOLDEN["cy_encode_yxyx"], **DELTAS)
    ours = jitted_decode(swapped(GOLDEN["deltas"][0]), anchors[:, None, :], max_log_scale=None)
    theirs = GOLDEN["cy_decode_yxyx"]
    compare("decode", "simple-faster-rcnn-pytorch", "no clamp", swapped(ours), theirs, **CORNERS)


def test_iou_of_three_implementations():
    """With whole-pixel corners areas are exact and only one division rounds, so the float32 results are identical.

    For two boxes without area at one point, 0 / 0, the references give NaN and our function gives 0.
    """
    boxes, others = GOLDEN["iou_boxes"], GOLDEN["iou_others"]
    ours = iou(continuous(boxes), continuous(others))
    compare("IoU", "faster-rcnn.pytorch", "inclusive corners", ours, GOLDEN["jw_iou"])
    ours = np.asarray(iou(boxes, others))
    for reference, name in (("torchvision", "tv_iou"), ("simple-faster-rcnn-pytorch", "cy_iou")):
        theirs = GOLDEN[name]
        empty = np.isnan(theirs)
        assert empty.sum() == 3 and not ours[empty].any()
        compare("IoU", reference, name, ours[~empty], theirs[~empty])


@pytest.mark.parametrize("name", ["jw_iou_batch", "jw_iou_batch_rois"])
def test_faster_rcnn_pytorchs_iou_with_padding(name):
    """The reference takes boxes of one pixel for padding: its IoU is 0 for ground truth and -1 for anchors and RoIs.

    Here only `valid` marks padding, and padding gives 0; a box of one pixel is a box of area 1.
    """
    for image in range(2):
        boxes = GOLDEN["iou_rois"][image] if name.endswith("rois") else GOLDEN["iou_boxes"]
        gt = GOLDEN["iou_gt"][image]
        gt_valid, valid = gt.any(axis=1), boxes.any(axis=1)
        ours = np.asarray(
            iou(
                np.where(valid[:, None], continuous(boxes), np.float32(0)),
                np.where(gt_valid[:, None], continuous(gt), np.float32(0)),
            )
        )
        theirs = GOLDEN[name][image]
        one_pixel = (boxes[:, :2] == boxes[:, 2:]).all(axis=1)
        one_pixel_gt = gt_valid & (gt[:, :2] == gt[:, 2:]).all(axis=1)
        np.testing.assert_array_equal((theirs == -1).all(axis=1), one_pixel)
        assert not theirs[~one_pixel][:, one_pixel_gt].any()
        compared = ~one_pixel[:, None] & ~one_pixel_gt[None, :]
        compare("IoU", "faster-rcnn.pytorch", f"{name}, image {image}", ours[compared], theirs[compared])
        assert not ours[~valid].any() and not ours[:, ~gt_valid].any()
        assert (~gt_valid).any()
