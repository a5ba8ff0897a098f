"""The whole detector: what the result of an image depends on, and what does not change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from fasterrcnn_jax.config import (
    BoxCoderConfig,
    BoxHeadConfig,
    RoiFeaturesConfig,
    RpnConfig,
)
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import Detector, split
from fasterrcnn_jax.models.faster_rcnn import detect, training_losses
from fasterrcnn_jax.models.heads import BoxHead, RpnHead
from fasterrcnn_jax.models.roi_heads import detections_in_regions
from fasterrcnn_jax.ops.anchors import anchors_of
from fasterrcnn_jax.ops.roi_alignment import roi_align, roi_align_average
from fasterrcnn_jax.ops.roi_cropping import roi_crop
from fasterrcnn_jax.ops.roi_pooling import roi_pool
from fasterrcnn_jax.structures import Batch, GroundTruth, Proposals

B, H, W, G, D = 4, 64, 96, 3, 6


def replaced(config, part, **fields):
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


CONFIG = replaced(tiny.MODEL, "rpn", anchors_per_image=32)
CONFIG = replaced(CONFIG, "postprocess", score_threshold=0.05, max_detections=D)
CLASS_NAMES = ("ring", "disc")
KEY = jax.random.key(0)

run_detect = jax.jit(detect)


@pytest.fixture(scope="module", autouse=True)
def environment():
    with tiny.quick_compilation():
        yield


def paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def abstract(config):
    return nnx.eval_shape(lambda: Detector(config, CLASS_NAMES, rng=np.random.default_rng(0)))


def with_config(model, config):
    """Returns the same weights under another configuration."""
    return nnx.merge(nnx.split(abstract(config))[0], nnx.split(model)[1])


@pytest.fixture(scope="module")
def model(random_weights):
    return random_weights(lambda: Detector(CONFIG, CLASS_NAMES, rng=np.random.default_rng(0)))


def make_batch(seed=0, image_hw=((64, 96), (60, 80), (40, 50), (64, 70))):
    """Four noise images of different sizes, with two objects and one empty slot each."""
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
    return np.array([[mean.sum, mean.count] for mean in losses.means.values()], np.float64)


@pytest.fixture(scope="module")
def found(model):
    batch = make_batch()
    return run_detect(model, batch.images, batch.image_hw, batch.scale)


def test_detections_have_their_shapes_and_lie_in_their_images(found):
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


def test_detections_of_an_image_are_the_same_bits_in_any_batch(model, found):
    batch = make_batch()
    alone_images, alone_hw = np.zeros_like(batch.images), np.zeros_like(batch.image_hw)
    alone_images[2], alone_hw[2] = batch.images[2], batch.image_hw[2]
    alone = run_detect(model, alone_images, alone_hw, batch.scale)
    others = run_detect(model, 5 * batch.images[[3, 1, 2, 0]], batch.image_hw[[3, 1, 2, 0]], batch.scale)
    company = make_batch(seed=9)
    company.images[2], company.image_hw[2] = batch.images[2], batch.image_hw[2]
    in_company = run_detect(model, company.images, company.image_hw, batch.scale)
    for leaf, by_itself, beside in zip(found, alone, in_company, strict=True):
        np.testing.assert_array_equal(leaf[2], by_itself[2])
        np.testing.assert_array_equal(leaf[2], beside[2])
    assert np.any(others.scores[2] != found.scores[2])  # the comparison can fail


def test_an_empty_image_has_no_detections(model):
    batch = make_batch()
    batch.images[1], batch.image_hw[1] = 0.0, 0.0
    empty = run_detect(model, batch.images, batch.image_hw, batch.scale)
    assert not np.any(empty.valid[1]) and not np.any(empty.boxes[1]) and np.any(empty.valid[0])


def test_reversing_the_batch_reverses_the_detections(model, found):
    batch = make_batch()
    mirrored = run_detect(model, batch.images[::-1], batch.image_hw[::-1], batch.scale)
    for leaf, other in zip(found, mirrored, strict=True):
        np.testing.assert_array_equal(leaf, other[::-1])


def test_detect_maps_over_a_leading_axis(model):
    """Only traces, because one more compilation would take long and show little."""
    images = jax.ShapeDtypeStruct((2, B, H, W, 3), jnp.float32)
    image_hw = jax.ShapeDtypeStruct((2, B, 2), jnp.float32)
    mapped = jax.eval_shape(jax.vmap(detect, in_axes=(None, 0, 0, 0)), model, images, image_hw, image_hw)
    assert mapped.boxes.shape == (2, B, D, 4) and mapped.valid.shape == (2, B, D)


@pytest.mark.parametrize("output_size", [4, 7])
@pytest.mark.parametrize("summary", ["mean", "flatten"])
def test_box_head_takes_any_pool_size(summary, output_size):
    config = dataclasses.replace(
        CONFIG,
        box_head=BoxHeadConfig(summary=summary),
        roi_features=RoiFeaturesConfig(output_size=output_size),
    )
    logits, deltas = nnx.eval_shape(
        lambda pooled: BoxHead(config, 32, 2, rng=np.random.default_rng(0))(pooled),
        jax.ShapeDtypeStruct((B, 5, output_size, output_size, 32), jnp.float32),
    )
    assert logits.shape == (B, 5, 3) and deltas.shape == (B, 5, 3, 4)


@pytest.fixture(scope="module")
def losses_of(gradients_of):
    """Returns a function: (batch, key) -> sums and counts of the four losses."""
    return lambda batch, key=KEY: numbers(gradients_of(batch, key)[0])


@pytest.fixture(scope="module")
def gradients_of(model):
    """Returns a compiled function: (batch, key) -> (losses, gradients by parameter path)."""
    graphdef, params, frozen = split(model)

    @jax.jit
    def run(params, batch, key):
        def total(params):
            losses = training_losses(nnx.merge(graphdef, params, frozen), batch, key)
            return sum(mean.sum / jnp.maximum(mean.count, 1.0) for mean in losses.means.values()), losses

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


def test_losses_without_ground_truth_are_finite_and_train_no_box_deltas(gradients_of):
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
    """Their images, sizes and ground truth do not matter."""
    batch = make_batch()
    garbage = make_batch(seed=3, image_hw=((64, 96),) * 4)
    image_valid = np.array([True, False, True, False])
    zeros = jax.tree.map(np.zeros_like, batch)
    filled = []
    for other in (zeros, garbage):
        rows = jax.tree.map(lambda a, b: np.where(image_valid.reshape(-1, *[1] * (a.ndim - 1)), a, b), batch, other)
        filled.append(losses_of(rows._replace(image_valid=image_valid)))
    np.testing.assert_array_equal(*filled)
    # The two real rows alone, each counted twice.
    twice = losses_of(rows_of(batch, [0, 2, 0, 2]))
    np.testing.assert_allclose(twice, 2 * filled[0], rtol=1e-5)


def test_only_anchors_whose_cell_holds_image_are_trained(losses_of):
    """One row of five cells with two sizes and three ratios; without objects all 30 anchors are background."""
    batch = make_batch(image_hw=((16, 80),) * B)
    empty = GroundTruth(*(np.zeros_like(leaf) for leaf in batch.ground_truth))
    counts = losses_of(batch._replace(ground_truth=empty))[:, 1]
    assert counts[0] == counts[1] == B * 30


def test_losses_do_not_depend_on_the_order_of_the_batch(losses_of):
    batch = make_batch()
    expected = losses_of(batch)
    shuffled = losses_of(rows_of(batch, [2, 0, 3, 1]))
    np.testing.assert_allclose(shuffled, expected, rtol=1e-5)


def test_randomness_of_an_image_depends_only_on_its_index(losses_of):
    batch = rows_of(make_batch(), [0, 0, 0, 0])

    def run(*image_index, key=KEY):
        indexed = batch._replace(image_index=np.int32(image_index))
        return losses_of(indexed, key)[:, 0]

    of = {index: run(*[index] * B) / B for index in (5, 6)}
    assert np.any(np.abs(of[5] - of[6]) > 1e-3)
    np.testing.assert_allclose(run(5, 6, 6, 5), 2 * of[5] + 2 * of[6], rtol=1e-5)
    assert np.any(np.abs(run(5, 5, 5, 5, key=jax.random.key(1)) / B - of[5]) > 1e-3)


def altered(part, **fields):
    return replaced(CONFIG, part, **fields)


VGG = dataclasses.replace(
    replaced(CONFIG, "backbone", name="vgg16", norm="none", mask_padding=True),
    box_head=BoxHeadConfig(channels=16, dropout=0.5),
)


def build(random_weights, config):
    return random_weights(lambda: Detector(config, CLASS_NAMES, rng=np.random.default_rng(0)))


def losses_with(model):
    """Returns a function: (batch, key) -> sums and counts of a model's losses, compiled."""
    return lambda batch, key=KEY: numbers(jax.jit(training_losses)(model, batch, key))


@pytest.fixture(scope="module")
def vgg(random_weights):
    return build(random_weights, VGG)


def test_vgg_trains_every_parameter_but_those_of_its_fixed_stages(random_weights):
    config = replaced(VGG, "backbone", fixed_stages=2)
    graphdef, params, frozen = split(build(random_weights, config))

    def total(params, batch):
        return sum(mean.sum for mean in training_losses(nnx.merge(graphdef, params, frozen), batch, KEY).means.values())

    gradients = jax.jit(jax.grad(total))(params, make_batch())
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    assert len(paths(gradients)) == 2 * (9 + 3 + 2 + 2)  # convolutions, RPN, fc6 fc7, predictors
    fixed = paths(frozen)
    assert len(fixed) == 2 * 4 and all("backbone" in name and "stages" in name for name in fixed)


@pytest.mark.parametrize("fixed_stages, fixed_stem", [(0, False), (0, True), (1, False), (3, False)])
def test_fixed_stages_of_a_resnet_are_its_stem_and_its_first_stages(fixed_stages, fixed_stem):
    """The stem alone is fixed as with the reference's FIXED_BLOCKS 0: convolution and normalisation."""
    model = abstract(altered("backbone", fixed_stages=fixed_stages, fixed_stem=fixed_stem))
    _, params, frozen = split(model)
    everything, fixed = set(paths(nnx.state(model, nnx.Param))), set(paths(frozen))
    stages = [f"'backbone']['stages'][{stage}]" for stage in range(fixed_stages)]
    stem = ["'backbone']['stem']", "'backbone']['stem_norm']"] if fixed_stages or fixed_stem else []
    assert fixed == {name for name in everything if any(part in name for part in stages + stem)}
    assert len(fixed) + len(jax.tree.leaves(params)) == len(everything) and bool(fixed) == bool(stem)


def test_dropout_follows_the_index_of_the_image_and_is_off_in_detection(vgg):
    batch = rows_of(make_batch(), [0, 0, 0, 0])._replace(image_index=np.int32([5, 5, 5, 5]))
    keys = jax.vmap(lambda index: jax.random.fold_in(KEY, index))(jnp.int32([5, 6, 5, 7]))
    pooled = jnp.ones((4, 3, 4, 4, 64))
    logits, _ = vgg.box_head(pooled, keys)
    np.testing.assert_array_equal(logits[0], logits[2])
    assert np.any(logits[0] != logits[1]) and np.any(logits[0, 0] != logits[0, 1])
    still = vgg.box_head(pooled)[0]
    np.testing.assert_array_equal(still, np.broadcast_to(still[:1, :1], still.shape))
    first = run_detect(vgg, batch.images, batch.image_hw, batch.scale)
    again = run_detect(vgg, batch.images, batch.image_hw, batch.scale)
    np.testing.assert_array_equal(first.scores, again.scores)
    without = dataclasses.replace(VGG, box_head=BoxHeadConfig(channels=16, dropout=0.0))
    same = with_config(vgg, without)
    np.testing.assert_array_equal(run_detect(same, batch.images, batch.image_hw, batch.scale).scores, first.scores)
    assert np.any(losses_with(vgg)(batch)[2:] != losses_with(same)(batch)[2:])  # and training drops


def test_a_class_agnostic_head_has_one_box_for_all_classes(random_weights):
    model = build(random_weights, dataclasses.replace(CONFIG, box_head=BoxHeadConfig(class_agnostic=True)))
    logits, deltas = model.box_head(jnp.ones((1, 2, 4, 4, 32)))
    assert logits.shape == (1, 2, 3) and deltas.shape == (1, 2, 1, 4)
    batch = make_batch()
    sums = losses_with(model)(batch)
    assert np.isfinite(sums).all() and sums[3, 0] > 0
    found = run_detect(model, batch.images, batch.image_hw, batch.scale)
    assert np.any(found.valid)


OPERATORS = {
    "aligned": (dict(sampling_ratio=2, aligned=True), roi_align, dict(sampling_ratio=2, aligned=True)),
    "adaptive": (dict(), roi_align, dict(sampling_ratio=0, aligned=False)),
    "average": (dict(operator="align_average"), roi_align_average, {}),
    "rounded": (dict(operator="pool"), roi_pool, dict(quantisation="rounded")),
    "floor": (dict(operator="pool", quantisation="floor"), roi_pool, dict(quantisation="floor")),
    "crop": (dict(operator="crop"), roi_crop, {}),
}


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_far_corner_offset_is_subtracted_before_the_configured_operator(monkeypatch, random_weights, name, offset):
    fields, operator, options = OPERATORS[name]
    config = dataclasses.replace(
        CONFIG,
        roi_features=RoiFeaturesConfig(output_size=4, **fields),
        box_coder=BoxCoderConfig(far_corner_offset=offset),
    )
    model = build(random_weights, config)
    features = jax.random.normal(KEY, (1, H // 16, W // 16, 32))
    boxes = jnp.float32([[[3, 5, 60, 50], [17, 20, 44, 63]]])
    pooled, head = [], BoxHead.__call__

    def spied(self, features):
        pooled.append(features)
        return head(self, features)

    monkeypatch.setattr(BoxHead, "__call__", spied)
    detections_in_regions(
        model, (features,), Proposals(boxes, jnp.ones((1, 2)), jnp.ones((1, 2), bool)), jnp.float32([[H, W]])
    )
    shifted = boxes[0] - jnp.float32([[0, 0, offset, offset]] * 2)
    if operator is roi_align:
        levels = jnp.zeros(2, jnp.int32)
        expected = roi_align((features[0],), shifted, levels, strides=(16,), output_size=4, **options)
    else:
        expected = operator(features[0], shifted, stride=16, output_size=4, **options)
    np.testing.assert_allclose(pooled[0][0], expected, atol=1e-6)


def test_a_fixed_number_of_rois_is_divided_over_the_images_of_all_devices(random_weights):
    model = build(random_weights, altered("roi_sampling", rois_per_batch=16))
    batch = make_batch()

    def valid_rois(num_devices):
        run = jax.jit(functools.partial(training_losses, num_devices=num_devices))
        return float(run(model, batch, KEY).box_class.count)

    assert valid_rois(1) == 16 and valid_rois(2) == 8
    with pytest.raises(ValueError, match="rois_per_batch must be a multiple of the 12 images of a batch, got 16"):
        valid_rois(3)


def test_locations_are_the_feature_cells_that_contain_image(random_weights):
    model = build(random_weights, altered("loss", rpn_box_normalizer="locations"))
    counts = losses_with(model)(make_batch(image_hw=((64, 96), (60, 80), (17, 16), (48, 1))))[:, 1]
    assert counts[1] == 4 * 6 + 4 * 5 + 2 * 1 + 3 * 1


def test_weighted_box_losses_are_multiplied(random_weights, losses_of):
    model = build(random_weights, altered("loss", rpn_box_weight=10.0, roi_box_weight=3.0))
    batch = make_batch()
    np.testing.assert_allclose(losses_with(model)(batch)[:, 0], losses_of(batch)[:, 0] * [1, 10, 1, 3], rtol=1e-5)


def test_small_proposals_are_measured_in_pixels_of_the_original_image(model):
    """15 original pixels are 30 in an image enlarged twice: the same boxes stay, fewer than without a limit."""
    batch = make_batch()

    def found(min_size, scale):
        strict = with_config(model, altered("test_proposals", min_size=min_size))
        return run_detect(strict, batch.images, batch.image_hw, np.full((B, 2), scale, np.float32))

    enlarged, plain, unlimited = found(15.0, 2.0), found(30.0, 1.0), found(0.0, 1.0)
    for leaf, other in zip(enlarged, plain, strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert np.any(enlarged.valid) and np.any(enlarged.scores != unlimited.scores)


def test_a_canvas_without_an_anchor_inside_the_border_is_refused():
    """Otherwise the RPN would have no anchor to train on and losses of 0."""
    config = replaced(CONFIG, "rpn", anchor_scales=(16.0,), allowed_border=4.0)
    with pytest.raises(InputError, match="every anchor reaches more than .* = 4.0 pixels .* 64 x 96 .* is 256 pixels"):
        jax.eval_shape(training_losses, abstract(config), make_batch(), KEY)
    jax.eval_shape(training_losses, abstract(replaced(config, "rpn", allowed_border=None)), make_batch(), KEY)


def test_each_image_trains_on_rois_per_image(losses_of):
    """Eight RoIs are sampled from sixteen proposals and two objects, for any number of images."""
    assert CONFIG.roi_sampling.rois_per_image == 8
    np.testing.assert_array_equal(losses_of(make_batch())[2:, 1], [8 * B] * 2)


def test_anchors_end_at_the_border_of_their_own_image(random_weights):
    """Not at the border of the first image of the batch, and not at the border of the canvas."""
    config = replaced(CONFIG, "rpn", allowed_border=0.0, anchors_per_image=1000)
    sizes = ((64, 96), (60, 80), (40, 50), (64, 70))
    anchors = anchors_of(config, ((H // 16, W // 16),)).anchors
    within = [
        ((anchors[:, :2] >= 0).all(axis=1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)).sum()
        for height, width in sizes
    ]
    assert len(set(within)) > 2
    batch = make_batch(image_hw=sizes)
    batch = batch._replace(ground_truth=GroundTruth(*(np.zeros_like(leaf) for leaf in batch.ground_truth)))
    # Without objects every anchor that takes part is background, and all of them are sampled.
    assert losses_with(build(random_weights, config))(batch)[0, 1] == sum(within)


def test_heads_start_with_the_stds_of_the_reference():
    """The std is 0.01, and 0.001 for the deltas of the box head; one objectness logit is the difference of two.

    The fully connected layers before them start as in torchvision, with the std 1 / sqrt(3 n) for n inputs.
    """
    rpn = RpnHead(dataclasses.replace(CONFIG, rpn=RpnConfig(channels=256)), 32, rng=np.random.default_rng(0))
    head = BoxHead(CONFIG, 32, 200, rng=np.random.default_rng(0))
    layers = [
        (rpn.convs[0], 0.01),
        (rpn.objectness, 0.01 * 2**0.5),
        (rpn.deltas, 0.01),
        (head.class_logits, 0.01),
        (head.deltas, 0.001),
        (head.tail.fcs[0], (3 * 32 * CONFIG.roi_features.output_size**2) ** -0.5),
        (head.tail.fcs[1], (3 * CONFIG.box_head.channels) ** -0.5),
    ]
    for layer, std in layers:
        assert float(jnp.std(layer.kernel[...])) == pytest.approx(std, rel=0.05)
        assert not np.any(layer.bias[...])
