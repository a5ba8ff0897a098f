"""The proposals of the reference implementations: the same boxes in the same order.

tests/golden/README.md describes the arrays and their origin. Inputs are drawn again from their seed and compared with
their checksums. faster-rcnn.pytorch ranks probabilities and we rank logits, which have the same order; its boxes have
inclusive corners. torchvision works per pyramid level; the tests build this from the library's functions. The tolerance
was fixed before the comparison: ten float32 spacings near 1000, because implementations of exp() differ.
"""

import functools
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import compare, continuous, inclusive
from jax import lax

from fasterrcnn_jax.config import BoxCoderConfig, ProposalConfig
from fasterrcnn_jax.ops.anchors import cell_anchors, grid_anchors
from fasterrcnn_jax.ops.box_coder import decode
from fasterrcnn_jax.ops.boxes import clip, larger_than
from fasterrcnn_jax.ops.proposals import propose
from fasterrcnn_jax.ops.suppression import nms

GOLDEN = np.load(Path(__file__).parent / "golden" / "proposals.npz")
RATIOS = (0.5, 1.0, 2.0)
CORNERS = dict(atol=6e-4)
CAFFE = BoxCoderConfig(far_corner_offset=1, max_log_scale=None)


def check(name, *arrays):
    assert [zlib.crc32(array.tobytes()) for array in arrays] == GOLDEN[name].tolist()


@functools.cache
def jw_inputs():
    """(foreground probabilities [2, 9, 38, 50], deltas [2, 36, 38, 50])."""
    generator = np.random.default_rng(int(GOLDEN["jw_seed"]))
    n = 9 * 38 * 50
    draws = [(generator.permutation(n) + 0.5) / n for _ in range(2)]
    foreground = np.stack(draws).astype(np.float32).reshape(2, 9, 38, 50)
    deltas = (generator.standard_normal((2, 36, 38, 50)) * 0.3).astype(np.float32)
    check("jw_inputs_crc32", np.concatenate([1 - foreground, foreground], axis=1), deltas)
    return foreground, deltas


def jw_propose(foreground, deltas, image_hw, *, pre, post):
    """Proposals of one image of the reference's maps [anchors, rows, columns]."""
    height, width = foreground.shape[1:]
    cells = cell_anchors(16.0, (8.0, 16.0, 32.0), RATIOS, rounding="base")
    anchors = grid_anchors(cells, (height, width), (16, 16))
    probabilities = foreground.transpose(1, 2, 0).ravel().astype(np.float64)
    logits = np.log(probabilities / (1 - probabilities)).astype(np.float32)
    # The order of the logits is the order of the probabilities.
    assert len(np.unique(logits)) == len(logits)
    config = ProposalConfig(pre_nms_top_n=pre, post_nms_top_n=post, nms_threshold=0.7, min_size=0.0)
    return jax.jit(lambda *args: propose(*args, config=config, coder=CAFFE))(
        logits,
        deltas.reshape(9, 4, height, width).transpose(2, 3, 0, 1).reshape(-1, 4),
        jnp.asarray(anchors),
        np.ones(len(anchors), bool),
        image_hw,
        np.ones(2, np.float32),
    )


@pytest.mark.parametrize("name, pre, post", [("train", 12000, 2000), ("test", 6000, 300)])
@pytest.mark.parametrize("image", [0, 1])
def test_faster_rcnn_pytorchs_proposals(name, pre, post, image):
    foreground, deltas = jw_inputs()
    found = jw_propose(foreground[image], deltas[image], GOLDEN["jw_im_info"][image, :2], pre=pre, post=post)
    count = int(GOLDEN[f"jw_num_{name}"][image])
    assert np.asarray(found.valid).sum() == count == post
    theirs = GOLDEN[f"jw_rois_{name}"][image, :, 1:]
    label = f"{pre} to {post}, image {image}"
    compare("proposals", "faster-rcnn.pytorch", label, inclusive(found.boxes), theirs, **CORNERS)


@pytest.mark.parametrize("image", [0, 1])
def test_faster_rcnn_pytorchs_proposals_of_a_small_map(image):
    foreground = GOLDEN["jws_cls_prob"][image, 9:]
    image_hw = GOLDEN["jws_im_info"][image, :2]
    found = jw_propose(foreground, GOLDEN["jws_deltas"][image], image_hw, pre=300, post=40)
    theirs = GOLDEN["jws_rois"][image, :, 1:]
    valid = np.asarray(found.valid)
    np.testing.assert_array_equal(valid, theirs.any(axis=1))
    ours = np.where(valid[:, None], inclusive(found.boxes), 0)
    compare("proposals", "faster-rcnn.pytorch", f"300 to 40, image {image}", ours, theirs, **CORNERS)
    np.testing.assert_allclose(np.asarray(found.boxes)[valid], continuous(theirs[valid]), **CORNERS)


@functools.cache
def tv_inputs():
    """(objectness [2, 20460], deltas [2, 20460, 4], anchors, level of each)."""
    generator, n = np.random.default_rng(int(GOLDEN["tv_seed"])), 20460
    draws = [-4 + 8 * (generator.permutation(n) + 0.5) / n for _ in range(2)]
    objectness = np.stack(draws).astype(np.float32)
    deltas = (generator.standard_normal((2, n, 4)) * 0.3).astype(np.float32)
    check("tv_inputs_crc32", objectness, deltas)
    levels = [
        grid_anchors(
            cell_anchors(16.0, (size / 16,), RATIOS, rounding="half"),
            (256 // stride, 320 // stride),
            (stride, stride),
            centre="corner",
        )
        for size, stride in ((32, 4), (64, 8), (128, 16), (256, 32), (512, 64))
    ]
    counts = [len(level) for level in levels]
    np.testing.assert_array_equal(counts, GOLDEN["tv_num_anchors_per_level"])
    return objectness, deltas, np.concatenate(levels), np.repeat(np.arange(5, dtype=np.int32), counts)


@functools.partial(jax.jit, static_argnames=("pre", "post"))
def tv_propose(objectness, deltas, anchors, groups, image_hw, *, pre, post):
    """Best by level, clip, drop sides below 1e-3, NMS by level, best of all levels."""
    counts = GOLDEN["tv_num_anchors_per_level"].tolist()
    starts = np.cumsum([0, *counts])
    top = jnp.concatenate(
        [
            lax.top_k(objectness[start : start + count], min(pre, count))[1] + int(start)
            for start, count in zip(starts, counts)
        ]
    )
    boxes = clip(decode(deltas[top], anchors[top]), image_hw)
    scores = jax.nn.sigmoid(objectness[top])
    valid = larger_than(boxes, 1e-3, jnp.ones(2))
    kept, kept_valid = nms(boxes, scores, valid, iou_threshold=0.7, max_output=post, groups=groups[top])
    return boxes[kept], scores[kept], kept_valid


@pytest.mark.parametrize("name, pre, post", [("train", 2000, 2000), ("test", 1000, 1000), ("small", 200, 100)])
@pytest.mark.parametrize("image", [0, 1])
def test_torchvisions_proposals_of_five_levels(name, pre, post, image):
    objectness, deltas, anchors, groups = tv_inputs()
    image_hw = np.float32(GOLDEN["tv_image_shapes"][image])
    boxes, scores, valid = tv_propose(objectness[image], deltas[image], anchors, groups, image_hw, pre=pre, post=post)
    assert valid.all()
    label = f"{pre} per level to {post}, image {image}"
    compare("proposals", "torchvision", label, boxes, GOLDEN[f"tv_boxes_{name}{image}"], **CORNERS)
    theirs = GOLDEN[f"tv_scores_{name}{image}"]
    compare("proposals", "torchvision", f"scores of {label}", scores, theirs, rtol=1e-6)


@pytest.mark.parametrize("image", [0, 1])
def test_torchvisions_decoded_anchors(image):
    _, deltas, anchors, _ = tv_inputs()
    decoded = jax.jit(decode)(deltas[image], anchors)[::50]
    theirs = GOLDEN["tv_decoded_every50"][image]
    compare("decode", "torchvision", f"five levels, image {image}", decoded, theirs, rtol=1e-6, **CORNERS)
