"""Region proposals of one image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from fasterrcnn_jax.config import BoxCoderConfig, ProposalConfig
from fasterrcnn_jax.ops import proposals, selection
from fasterrcnn_jax.ops.anchors import cell_anchors, grid_anchors
from fasterrcnn_jax.ops.proposals import propose

pytestmark = pytest.mark.usefixtures("quick_compilation")

ANCHORS = grid_anchors(cell_anchors(16.0, (1.0, 2.0), (0.5, 1.0, 2.0), rounding="none"), (6, 8), (16, 16))
A = len(ANCHORS)
IMAGE_HW = np.float32([80, 100])
SCALE = np.float32([1, 1])
CONFIG = ProposalConfig(pre_nms_top_n=100, post_nms_top_n=30, nms_threshold=0.6, min_size=12)
CAFFE = BoxCoderConfig(far_corner_offset=1, max_log_scale=None)
IN_PICTURE = np.repeat((np.mgrid[0:6, 0:8] * 16 < IMAGE_HW[:, None, None]).all(axis=0).ravel(), 6)


jitted_propose = functools.partial(jax.jit, static_argnames=("config", "coder", "level_sizes"))(propose)


def run(objectness, deltas, anchor_valid, *, scale=SCALE, config=CONFIG, coder=BoxCoderConfig(), level_sizes=None):
    return jitted_propose(
        objectness, deltas, ANCHORS, anchor_valid, IMAGE_HW, scale,
        config=config, coder=coder, level_sizes=level_sizes,
    )  # fmt: skip


def rpn_outputs(seed):
    generator = np.random.default_rng(seed)
    objectness = (generator.permutation(A) / A * 8 - 4).astype(np.float32)
    return objectness, generator.normal(0, 0.3, (A, 4)).astype(np.float32)


def reference(
    objectness, deltas, anchor_valid, *, scale=SCALE, config=CONFIG, coder=BoxCoderConfig(), level_sizes=None
):
    """Decodes, clips, drops small boxes, takes the best of each level, applies NMS per level, takes the best of all."""
    offset = dict(far_corner_offset=coder.far_corner_offset)
    decoded = [
        oracles.decode(d, a, max_log_scale=coder.max_log_scale, **offset) for d, a in zip(deltas, ANCHORS, strict=True)
    ]
    boxes = np.array([oracles.clip(box, *IMAGE_HW, **offset) for box in decoded], np.float32)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    large = (height / scale[0] >= config.min_size) & (width / scale[1] >= config.min_size)
    kept, start = [], 0
    for size in level_sizes or (A,):
        level = range(start, start + size)
        usable = [i for i in level if anchor_valid[i] and (large[i] or config.drop_small == "after_top_n")]
        best = sorted(usable, key=lambda i: -objectness[i])[: config.pre_nms_top_n]
        best = [i for i in best if large[i]]
        options = dict(iou_threshold=config.nms_threshold, max_output=config.post_nms_top_n)
        survivors = oracles.greedy_nms(boxes[best], objectness[best], np.ones(len(best), bool), **options)
        kept += [best[i] for i in survivors]
        start += size
    chosen = np.array(sorted(kept, key=lambda i: -objectness[i])[: config.post_nms_top_n])
    return boxes[chosen], 1 / (1 + np.exp(-objectness[chosen]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(coder=CAFFE),
        dict(scale=np.float32([0.5, 2.0])),
        dict(scale=np.float32([2.0, 0.5])),
        dict(config=ProposalConfig(pre_nms_top_n=30, post_nms_top_n=30, min_size=0.0)),
        dict(config=ProposalConfig(pre_nms_top_n=300, post_nms_top_n=20, nms_threshold=0.3)),
    ],
    ids=["plain", "caffe", "wide", "tall", "pre", "post"],
)
@pytest.mark.parametrize("seed", range(4))
def test_proposals_equal_the_loop(seed, options):
    outputs = rpn_outputs(seed)
    found = run(*outputs, IN_PICTURE, **options)
    boxes, scores = reference(*outputs, IN_PICTURE, **options)
    valid = np.asarray(found.valid)
    assert len(boxes) == valid.sum() > 10
    np.testing.assert_allclose(np.asarray(found.boxes)[valid], boxes, atol=1e-3)
    np.testing.assert_allclose(np.asarray(found.scores)[valid], scores, rtol=1e-5)


def test_proposals_stay_in_the_image_and_keep_the_minimum_size():
    objectness, deltas = rpn_outputs(5)
    found = run(objectness, 4 * deltas, IN_PICTURE)
    boxes = np.asarray(found.boxes)[np.asarray(found.valid)]
    assert (boxes >= 0).all() and (boxes[:, 2::2] <= 100).all() and (boxes[:, 3::2] <= 80).all()
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= CONFIG.min_size


def single(delta, anchor, **options):
    """The proposal of one anchor."""
    options = dict(scale=SCALE, config=CONFIG, coder=BoxCoderConfig()) | options
    found = jitted_propose(
        np.zeros(1, np.float32),
        np.float32([delta]),
        np.float32([anchor]),
        np.ones(1, bool),
        IMAGE_HW,
        **options,
    )
    assert not np.asarray(found.valid)[1:].any()
    return np.asarray(found.boxes)[0] if found.valid[0] else None


@pytest.mark.parametrize("scale, survives", [((1, 1), True), ((1.1, 1), False), ((1, 1.1), True), ((1, 2.1), False)])
def test_minimum_size_is_in_pixels_of_the_original_image(scale, survives):
    """A height of 12 network pixels is 12 original pixels at scale 1, and fewer in an image that was enlarged."""
    found = single([0, 0, 0, 0], [10, 10, 34, 22], scale=np.float32(scale))
    assert (found is not None) == survives


def test_boxes_are_clipped_before_they_are_measured():
    """Only 11 of the 30 columns of the box are inside the image."""
    assert single([0, 0, 0, 0], [-19, 10, 11, 40]) is None
    assert single([0, 0, 0, 0], [-19, 10, 12, 40]) is not None


@pytest.mark.parametrize(
    "coder, expected",
    [
        (BoxCoderConfig(), [0, 0, 100, 80]),
        (BoxCoderConfig(far_corner_offset=1), [0, 0, 100, 80]),
        (BoxCoderConfig(max_log_scale=0.5), [40 - 20 * np.exp(0.5), 0, 40 + 20 * np.exp(0.5), 80]),
    ],
)
def test_the_limit_of_log_scales_comes_from_the_box_coder_config(coder, expected):
    np.testing.assert_allclose(single([0, 0, 2, 2], [20, 5, 60, 75], coder=coder), expected, rtol=1e-6)


def test_without_a_clamp_a_proposal_follows_its_log_scale():
    """A side of .1 pixel is stretched by e^5 = 148; the limit would stretch it by 62.5."""
    anchor, delta = [50, 20, 50.1, 60], [0, 0, 5, 0]
    for coder, factor in ((BoxCoderConfig(), 62.5), (BoxCoderConfig(max_log_scale=None), np.exp(5))):
        config = ProposalConfig(pre_nms_top_n=100, post_nms_top_n=30, min_size=0.0)
        box = single(delta, anchor, coder=coder, config=config)
        assert box[2] - box[0] == pytest.approx(0.1 * factor, rel=1e-3)


@pytest.mark.parametrize(
    "anchor, expected",
    [
        ([10, 10, 40, 40], [10, 10, 41, 41]),  # one more at the far corners
        ([70, 50, 100, 80], [70, 50, 100, 80]),  # clipped at the image border
        ([-40, -50, -20, -10], [0, 0, 1, 1]),  # beyond the image: one pixel at the border remains
        ([120, 90, 150, 110], [99, 79, 100, 80]),
    ],
)
def test_far_corner_offset_is_applied_when_decoding_and_when_clipping(anchor, expected):
    config = ProposalConfig(pre_nms_top_n=100, post_nms_top_n=30, min_size=0.0)
    found = single([0, 0, 0, 0], anchor, coder=CAFFE, config=config)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("pre, post, count", [(4, 4, 2), (8, 8, 4), (8, 3, 3)])
def test_pre_and_post_nms_top_n_limit_the_boxes_before_and_after_nms(pre, post, count):
    """Boxes come in equal pairs: the best 4 anchors give 2 boxes, the best 8 give 4."""
    boxes = np.repeat(np.float32([[x, 10, x + 20, 60] for x in (0, 20, 40, 60)]), 2, axis=0)
    found = jitted_propose(
        -np.arange(8, dtype=np.float32),
        np.zeros((8, 4), np.float32),
        boxes,
        np.ones(8, bool),
        IMAGE_HW,
        SCALE,
        config=ProposalConfig(pre_nms_top_n=pre, post_nms_top_n=post),
        coder=BoxCoderConfig(),
    )
    assert np.asarray(found.valid).sum() == count
    np.testing.assert_array_equal(np.asarray(found.boxes)[:count], boxes[: 2 * count : 2])


def test_anchors_in_the_padding_are_never_proposed():
    """This holds for any score and any deltas."""
    objectness, deltas = rpn_outputs(6)
    clean = run(objectness, deltas, IN_PICTURE)
    objectness, deltas = objectness.copy(), deltas.copy()
    objectness[~IN_PICTURE], deltas[~IN_PICTURE, :2] = 100.0, -2.0
    dirty = run(objectness, deltas, IN_PICTURE)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("remaining", [0, 3])
def test_shape_is_fixed_when_few_remain(remaining):
    objectness, _ = rpn_outputs(7)
    anchor_valid = np.zeros(A, bool)
    # Anchors of one shape in cells far apart: no anchor suppresses another.
    anchor_valid[[(row * 8 + column) * 6 + 3 for row, column in ((1, 1), (1, 4), (3, 2))][:remaining]] = True
    found = run(objectness, np.zeros((A, 4), np.float32), anchor_valid)
    valid = np.asarray(found.valid)
    assert found.boxes.shape == (30, 4) and found.scores.shape == (30,)
    assert valid.tolist() == [True] * remaining + [False] * (30 - remaining)
    assert not np.asarray(found.boxes)[~valid].any() and not np.asarray(found.scores)[~valid].any()


def test_scores_descend_and_are_probabilities():
    found = run(*rpn_outputs(8), IN_PICTURE)
    scores = np.asarray(found.scores)[np.asarray(found.valid)]
    assert (np.diff(scores) <= 0).all() and scores.min() > 0 and scores.max() < 1


def test_saturated_objectness_still_orders_the_proposals():
    """Every sigmoid of a logit above 17 is 1 in float32."""
    objectness, deltas = rpn_outputs(9)
    plain, saturated = run(objectness, deltas, IN_PICTURE), run(objectness + 64, deltas, IN_PICTURE)
    np.testing.assert_array_equal(plain.boxes, saturated.boxes)


def test_no_gradient_passes():
    objectness, deltas = rpn_outputs(10)

    def total(objectness, deltas):
        found = run(objectness, deltas, IN_PICTURE)
        return found.boxes.sum() + found.scores.sum()

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.asarray(objectness), jnp.asarray(deltas)):
        assert not np.any(gradient)


def test_more_slots_than_anchors_are_padding():
    config = ProposalConfig(pre_nms_top_n=50, post_nms_top_n=5, min_size=1)
    found = jitted_propose(
        jnp.zeros(2),
        jnp.zeros((2, 4)),
        jnp.array([[0.0, 0, 20, 20], [40, 40, 60, 60]]),
        jnp.ones(2, bool),
        jnp.array([80.0, 80.0]),
        jnp.ones(2),
        config=config,
        coder=BoxCoderConfig(),
    )
    assert found.valid.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("pre", [10, 60])
@pytest.mark.parametrize("seed", range(2))
def test_every_level_has_its_own_best_and_its_own_suppression(seed, pre):
    outputs = rpn_outputs(seed)
    config = ProposalConfig(pre_nms_top_n=pre, post_nms_top_n=100, nms_threshold=0.4, min_size=4.0)
    options = dict(config=config, level_sizes=(A - 100, 70, 30))
    found = run(*outputs, IN_PICTURE, **options)
    boxes, scores = reference(*outputs, IN_PICTURE, **options)
    valid = np.asarray(found.valid)
    assert len(boxes) == valid.sum()
    np.testing.assert_allclose(np.asarray(found.boxes)[valid], boxes, atol=1e-3)
    np.testing.assert_allclose(np.asarray(found.scores)[valid], scores, rtol=1e-5)
    # The levels matter: treated as one map, the anchors give fewer boxes.
    assert run(*outputs, IN_PICTURE, config=config).valid.sum() < valid.sum()


def test_small_boxes_are_dropped_before_or_after_the_best_are_taken():
    """There are ten places, and half of the ten best boxes are small."""
    objectness, deltas = rpn_outputs(3)
    order = np.argsort(-np.where(IN_PICTURE, objectness, -np.inf))
    deltas[order[:20:2], 2:] = -4.0
    counts = {}
    for when in ("first", "after_top_n"):
        config = ProposalConfig(pre_nms_top_n=10, post_nms_top_n=10, nms_threshold=1.0, min_size=3.0, drop_small=when)
        found = run(objectness, deltas, IN_PICTURE, config=config)
        boxes, _ = reference(objectness, deltas, IN_PICTURE, config=config)
        valid = np.asarray(found.valid)
        np.testing.assert_allclose(np.asarray(found.boxes)[valid], boxes, atol=1e-3)
        counts[when] = int(valid.sum())
    assert counts["first"] == 10 and 0 < counts["after_top_n"] <= 5


@pytest.mark.parametrize("level_sizes", [None, (200, 70, 18)])
@pytest.mark.parametrize("seed", range(3))
def test_selection_by_counting_finds_the_same_proposals(monkeypatch, seed, level_sizes):
    """On a GPU; with few different logits, the order of equal ones decides."""
    objectness, deltas = rpn_outputs(seed)
    objectness = np.round(objectness)
    options = dict(config=CONFIG, coder=BoxCoderConfig(), level_sizes=level_sizes)

    def found():
        return jax.jit(functools.partial(propose, **options))(objectness, deltas, ANCHORS, IN_PICTURE, IMAGE_HW, SCALE)

    wanted = found()

    def counted(scores, lengths, sizes):
        return selection.lowest_positions(selection._descending_keys(scores), lengths, sizes)

    monkeypatch.setattr(proposals, "best_positions", counted)
    for one, other in zip(found(), wanted, strict=True):
        np.testing.assert_array_equal(one, other)
