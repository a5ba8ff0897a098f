"""The whole path: what an image's result depends on, and what it does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxHeadConfig,
    ImageConfig,
    ModelConfig,
    PostprocessConfig,
    ProposalConfig,
    RoiAlignConfig,
    RoiSamplingConfig,
    RpnConfig,
)
from fasterrcnn_jax.models.detector import Detector, detect, training_losses
from fasterrcnn_jax.models.heads import BoxHead
from fasterrcnn_jax.structures import Batch, GroundTruth

B, H, W, G, D = 4, 64, 96, 3, 6
CONFIG = ModelConfig(
    image=ImageConfig(short_side=64, long_side=96, canvases=((64, 96), (96, 64))),
    backbone=BackboneConfig(depth=18, width=8, stride=16, norm="group", mask_padding=True),
    rpn=RpnConfig(anchor_sizes=(16, 32), channels=8, anchors_per_image=32),
    train_proposals=ProposalConfig(pre_nms_top_n=64, post_nms_top_n=16, min_size=4),
    test_proposals=ProposalConfig(pre_nms_top_n=32, post_nms_top_n=8, min_size=4),
    roi_sampling=RoiSamplingConfig(rois_per_image=8, fg_fraction=0.5),
    roi_align=RoiAlignConfig(output_size=4, sampling_ratio=2),
    postprocess=PostprocessConfig(max_detections=D),
)
CLASS_NAMES = ("ring", "disc")
KEY = jax.random.key(0)

run_detect = jax.jit(detect)


@pytest.fixture(scope="module")
def model(random_weights):
    return random_weights(lambda: Detector(CONFIG, CLASS_NAMES, rng=np.random.default_rng(0)))


def make_batch(seed=0, image_hw=((64, 96), (60, 80), (40, 50), (64, 70))):
    """Four noise pictures of different sizes, with two objects and one empty slot each."""
    generator = np.random.default_rng(seed)
    images = np.zeros((B, H, W, 3), np.float32)
    for row, (height, width) in enumerate(image_hw):
        images[row, :height, :width] = generator.normal(size=(height, width, 3))
    boxes = np.zeros((B, G, 4), np.float32)
    boxes[:, 0], boxes[:, 1] = (2, 3, 30, 33), (20, 8, 46, 38)
    return Batch(
        images=images,
        image_hw=np.float32(image_hw),
        scale=np.ones((B, 2), np.float32),
        image_index=np.arange(B, dtype=np.int32) + 10,
        image_valid=np.ones(B, bool),
        ground_truth=GroundTruth(
            boxes,
            np.tile(np.int32([1, 2, 0]), (B, 1)),
            np.tile([True, True, False], (B, 1)),
        ),
    )


def rows_of(batch, rows):
    return jax.tree.map(lambda leaf: leaf[np.array(rows)], batch)


def numbers(losses):
    return np.array([[mean.sum, mean.count] for mean in losses], np.float64)


@pytest.fixture(scope="module")
def found(model):
    batch = make_batch()
    return run_detect(model, batch.images, batch.image_hw)


def test_detections_have_their_shapes_and_lie_in_their_pictures(found):
    assert found.boxes.shape == (B, D, 4)
    assert found.scores.shape == found.labels.shape == found.valid.shape == (B, D)
    batch = make_batch()
    for row in range(B):
        valid = np.asarray(found.valid[row])
        boxes, scores = np.asarray(found.boxes[row])[valid], np.asarray(found.scores[row])[valid]
        height, width = batch.image_hw[row]
        assert len(boxes) and (boxes >= 0).all()
        assert (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
        assert (np.diff(scores) <= 0).all() and scores.min() > 0.05
        assert set(np.asarray(found.labels[row])[valid]) <= {1, 2}
        assert not np.asarray(found.boxes[row])[~valid].any()


def test_detections_of_an_image_are_the_same_bits_in_any_company(model, found):
    batch = make_batch()
    alone_images, alone_hw = np.zeros_like(batch.images), np.zeros_like(batch.image_hw)
    alone_images[2], alone_hw[2] = batch.images[2], batch.image_hw[2]
    alone = run_detect(model, alone_images, alone_hw)
    others = run_detect(model, 5 * batch.images[[3, 1, 2, 0]], batch.image_hw[[3, 1, 2, 0]])
    company = make_batch(seed=9)
    company.images[2], company.image_hw[2] = batch.images[2], batch.image_hw[2]
    in_company = run_detect(model, company.images, company.image_hw)
    for leaf, by_itself, beside in zip(found, alone, in_company, strict=True):
        np.testing.assert_array_equal(leaf[2], by_itself[2])
        np.testing.assert_array_equal(leaf[2], beside[2])
    assert np.any(others.scores[2] != found.scores[2])  # the comparison can fail


def test_an_empty_picture_has_no_detections(model):
    batch = make_batch()
    batch.images[1], batch.image_hw[1] = 0.0, 0.0
    empty = run_detect(model, batch.images, batch.image_hw)
    assert not np.any(empty.valid[1]) and not np.any(empty.boxes[1]) and np.any(empty.valid[0])


def test_reversing_the_batch_reverses_the_detections(model, found):
    batch = make_batch()
    mirrored = run_detect(model, batch.images[::-1], batch.image_hw[::-1])
    for leaf, other in zip(found, mirrored, strict=True):
        np.testing.assert_array_equal(leaf, other[::-1])


def test_detect_maps_over_a_leading_axis(model):
    """Traced only: one more compilation would cost more than it shows."""
    images = jax.ShapeDtypeStruct((2, B, H, W, 3), jnp.float32)
    image_hw = jax.ShapeDtypeStruct((2, B, 2), jnp.float32)
    mapped = jax.eval_shape(jax.vmap(detect, in_axes=(None, 0, 0)), model, images, image_hw)
    assert mapped.boxes.shape == (2, B, D, 4) and mapped.valid.shape == (2, B, D)


@pytest.mark.parametrize("output_size", [4, 7])
@pytest.mark.parametrize("summary", ["mean", "flatten"])
def test_box_head_takes_any_pool_size(summary, output_size):
    config = dataclasses.replace(
        CONFIG,
        box_head=BoxHeadConfig(summary=summary),
        roi_align=RoiAlignConfig(output_size=output_size),
    )
    logits, deltas = nnx.eval_shape(
        lambda pooled: BoxHead(config, 2, rng=np.random.default_rng(0))(pooled),
        jax.ShapeDtypeStruct((B, 5, output_size, output_size, 32), jnp.float32),
    )
    assert logits.shape == (B, 5, 3) and deltas.shape == (B, 5, 3, 4)


@pytest.fixture(scope="module")
def losses_of(gradients_of):
    """Returns a function: (batch, key) -> sums and counts of the four losses."""
    return lambda batch, key=KEY: numbers(gradients_of(batch, key)[0])


@pytest.fixture(scope="module")
def gradients_of(model):
    """Returns a function: (batch, key) -> (losses, gradients by parameter path). One program for all."""
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, batch, key):
        def total(params):
            losses = training_losses(nnx.merge(graphdef, params, frozen), batch, key)
            return sum(mean.sum / jnp.maximum(mean.count, 1.0) for mean in losses), losses

        gradients, losses = jax.grad(total, has_aux=True)(params)
        return losses, gradients

    def of(batch, key=KEY):
        losses, gradients = run(params, batch, key)
        leaves = jax.tree_util.tree_leaves_with_path(gradients)
        return losses, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    return of


def test_every_parameter_is_trained(gradients_of):
    losses, gradients = gradients_of(make_batch())
    assert np.isfinite(numbers(losses)).all() and (numbers(losses) > 0).all()
    assert len(gradients) > 50
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all() and np.any(gradient), name


def test_losses_without_ground_truth_are_finite_and_teach_no_box(gradients_of):
    batch = make_batch()
    empty = GroundTruth(*(np.zeros_like(leaf) for leaf in batch.ground_truth))
    losses, gradients = gradients_of(batch._replace(ground_truth=empty))
    assert losses.rpn_box.sum == 0 and losses.box_delta.sum == 0
    assert (numbers(losses)[[0, 2]] > 0).all()
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        if "deltas" in name:
            assert not np.any(gradient), name


def test_filling_rows_change_nothing(losses_of):
    """Whatever they hold: pictures, sizes, ground truth."""
    batch = make_batch()
    garbage = make_batch(seed=3, image_hw=((64, 96),) * 4)
    image_valid = np.array([True, False, True, False])
    zeros = jax.tree.map(np.zeros_like, batch)
    filled = []
    for other in (zeros, garbage):
        rows = jax.tree.map(
            lambda a, b: np.where(image_valid.reshape(-1, *[1] * (a.ndim - 1)), a, b), batch, other
        )
        filled.append(losses_of(rows._replace(image_valid=image_valid)))
    np.testing.assert_array_equal(*filled)
    # The two real rows alone, each counted twice.
    twice = losses_of(rows_of(batch, [0, 2, 0, 2]))
    np.testing.assert_allclose(twice, 2 * filled[0], rtol=1e-5)


def test_only_anchors_whose_cell_holds_picture_are_trained(losses_of):
    """One row of five cells, two sizes, three ratios; without objects all 30 are background."""
    batch = make_batch(image_hw=((16, 80),) * B)
    empty = GroundTruth(*(np.zeros_like(leaf) for leaf in batch.ground_truth))
    counts = losses_of(batch._replace(ground_truth=empty))[:, 1]
    assert counts[0] == counts[1] == B * 30


def test_losses_do_not_depend_on_the_order_of_the_batch(losses_of):
    batch = make_batch()
    expected = losses_of(batch)
    shuffled = losses_of(rows_of(batch, [2, 0, 3, 1]))
    np.testing.assert_allclose(shuffled, expected, rtol=1e-5)


def test_randomness_of_an_image_follows_its_index_alone(losses_of):
    batch = rows_of(make_batch(), [0, 0, 0, 0])

    def run(*image_index, key=KEY):
        indexed = batch._replace(image_index=np.int32(image_index))
        return losses_of(indexed, key)[:, 0]

    of = {index: run(*[index] * B) / B for index in (5, 6)}
    assert np.any(np.abs(of[5] - of[6]) > 1e-3)
    np.testing.assert_allclose(run(5, 6, 6, 5), 2 * of[5] + 2 * of[6], rtol=1e-5)
    assert np.any(np.abs(run(5, 5, 5, 5, key=jax.random.key(1)) / B - of[5]) > 1e-3)
