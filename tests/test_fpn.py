"""The feature pyramid: its levels, the maps that the heads read, and a detector with a pyramid."""

import dataclasses

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
import tiny
from flax import nnx

from fasterrcnn_jax.config import BackboneConfig, FpnConfig, ModelConfig
from fasterrcnn_jax.config.families import resnet_fpn
from fasterrcnn_jax.models.detector import Detector, shared_features, split
from fasterrcnn_jax.models.faster_rcnn import detect, training_losses
from fasterrcnn_jax.models.fpn import Fpn
from fasterrcnn_jax.models.layers import Constant
from fasterrcnn_jax.models.roi_heads import detections_in_regions
from fasterrcnn_jax.models.rpn import rpn_output
from fasterrcnn_jax.ops import postprocessing, proposals, roi_operators
from fasterrcnn_jax.ops.anchors import anchors_of, anchors_on_image
from fasterrcnn_jax.structures import Batch, GroundTruth, Proposals

H, W = 64, 96
GRIDS = ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))
KEY = jax.random.key(0)
CHANNELS = (8, 16, 32, 64)


@pytest.fixture(scope="module", autouse=True)
def environment():
    with tiny.quick_compilation():
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def detector(random_weights, config=tiny.FPN):
    return random_weights(lambda: Detector(config, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))


def batch(count=2, seed=0):
    images = normal(count, H, W, 3, seed=seed)
    boxes = np.float32([[[4, 4, 30, 30], [50, 10, 90, 60]]] * count)
    return Batch(
        jnp.asarray(images),
        jnp.float32([[H, W]] * count),
        jnp.ones((count, 2)),
        jnp.arange(count, dtype=jnp.int32),
        jnp.ones(count, bool),
        GroundTruth(jnp.asarray(boxes), jnp.int32([[1, 2]] * count), jnp.ones((count, 2), bool)),
    )


def conv3x3(x, kernel):
    """Computes a 3 x 3 convolution by its definition: nine shifted products."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = x.shape[1:3]
    return sum(padded[:, dy : dy + rows, dx : dx + columns] @ kernel[dy, dx] for dy in range(3) for dx in range(3))


def test_levels_equal_their_definition(random_weights):
    """Lateral map plus the coarser level with every cell repeated, then a 3 x 3 convolution; P6 subsamples P5."""
    net = random_weights(lambda: Fpn(FpnConfig(channels=8), CHANNELS, rng=np.random.default_rng(0)))
    maps = [normal(2, *grid, channels, seed=i) for i, (grid, channels) in enumerate(zip(GRIDS, CHANNELS))]
    inner, expected = None, []
    for i in (3, 2, 1, 0):
        lateral = maps[i] @ np.asarray(net.lateral[i].kernel)[0, 0] + np.asarray(net.lateral[i].bias)
        inner = lateral if inner is None else lateral + inner.repeat(2, axis=1).repeat(2, axis=2)
        output = net.output[i]
        expected.insert(0, conv3x3(inner, np.asarray(output.kernel)) + np.asarray(output.bias))
    expected.append(expected[3][:, ::2, ::2])
    levels = jax.jit(lambda net, maps: net(maps, (None,) * 4))(net, tuple(map(jnp.asarray, maps)))
    for found, level in zip(levels, expected, strict=True):
        np.testing.assert_allclose(found, level, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, multiple", [("resnet18", 1), ("resnet50", 4)])
def test_levels_have_their_strides_and_the_pyramids_channels(name, multiple):
    backbone = dataclasses.replace(tiny.FPN.backbone, name=name)
    config = dataclasses.replace(tiny.FPN, backbone=backbone)
    model = nnx.eval_shape(lambda: Detector(config, ("a",), rng=np.random.default_rng(0)))
    assert model.backbone.channels == tuple(8 * multiple * 2**stage for stage in range(4))
    levels = nnx.eval_shape(
        shared_features, model, jax.ShapeDtypeStruct((2, H, W, 3), jnp.float32), jnp.full((2, 2), 64.0)
    )
    assert [level.shape for level in levels] == [(2, *grid, 16) for grid in GRIDS]


@pytest.mark.parametrize("convs", [1, 2])
def test_masked_levels_and_their_rpn_do_not_depend_on_the_canvas(random_weights, convs):
    model = detector(random_weights, dataclasses.replace(tiny.FPN, rpn=dataclasses.replace(tiny.FPN.rpn, convs=convs)))
    image = normal(40, 50, 3, seed=5)

    @jax.jit
    def run(model, images):
        image_hw = jnp.float32([[40, 50]])
        levels = shared_features(model, images, image_hw)
        return levels, rpn_output(model, levels, image_hw).objectness

    def on_canvas(height, width):
        images = np.zeros((1, height, width, 3), np.float32)
        images[0, :40, :50] = image
        levels, objectness = run(model, jnp.asarray(images))
        ends = np.cumsum([3 * level.shape[1] * level.shape[2] for level in levels])[:-1]
        maps = [
            part.reshape(*level.shape[1:3], 3) for part, level in zip(np.split(np.asarray(objectness)[0], ends), levels)
        ]
        return levels, maps

    (tight_levels, tight_maps), (wide_levels, wide_maps) = on_canvas(64, 64), on_canvas(96, 128)
    for tight, wide, stride in zip(tight_maps, wide_maps, (4, 8, 16, 32, 64), strict=True):
        rows, columns = -(-40 // stride), -(-50 // stride)
        np.testing.assert_allclose(wide[:rows, :columns], tight[:rows, :columns], atol=1e-4)
    for tight, wide, stride in zip(tight_levels, wide_levels, (4, 8, 16, 32, 64), strict=True):
        rows, columns = -(-40 // stride), -(-50 // stride)
        tight, wide = np.asarray(tight)[0, :rows, :columns], np.asarray(wide)[0]
        assert np.abs(tight).max() > 0.1
        np.testing.assert_allclose(wide[:rows, :columns], tight, atol=1e-4)
        assert not wide[rows:].any() and not wide[:, columns:].any()


@pytest.mark.parametrize(
    "version, published, counts_norms, rpn, convs, layers",
    [(1, 41_755_286, False, 1, 0, 2), (2, 43_712_278, True, 2, 4, 1)],
)
def test_the_second_version_has_its_convolutions_and_norms(version, published, counts_norms, rpn, convs, layers):
    """Numbers of torchvision for fasterrcnn_resnet50_fpn and _v2; the second counts scales and biases of norms."""
    config, names = resnet_fpn(50, version=version), tuple(f"class{i}" for i in range(90))
    model = nnx.eval_shape(lambda: Detector(config, names, rng=np.random.default_rng(0)))
    head = model.box_head.tail
    assert (len(model.rpn_head.convs), len(head.convs), len(head.fcs)) == (rpn, convs, layers)
    trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    norms = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, Constant)))  # half of them are statistics
    assert trained + counts_norms * norms // 2 == published


def test_the_rpn_reads_the_levels_in_the_order_of_their_anchors(random_weights):
    """One cell of one level gets a high score; the best anchor belongs to this cell."""
    model = detector(random_weights)
    head = model.rpn_head
    for conv in head.convs:
        conv.kernel[...], conv.bias[...] = jnp.zeros((3, 3, 16, 8)).at[1, 1, 0, 0].set(1.0), jnp.zeros(8)
    head.objectness.kernel[...] = jnp.zeros((1, 1, 8, 3)).at[0, 0, 0, 2].set(1.0)
    head.objectness.bias[...] = jnp.zeros(3)
    grid = anchors_of(tiny.FPN, GRIDS)
    for level, (row, column) in ((0, (3, 7)), (2, (1, 4)), (4, (0, 1))):
        levels = [jnp.zeros((1, *shape, 16)) for shape in GRIDS]
        levels[level] = levels[level].at[0, row, column, 0].set(5.0)
        objectness, _ = jax.jit(lambda head, levels: head(levels))(head, tuple(levels))
        anchor = grid.anchors[int(objectness[0].argmax())]
        stride = 4 * 2**level
        centre = (anchor[:2] + anchor[2:]) / 2
        np.testing.assert_allclose(centre, [column * stride, row * stride], atol=1e-3)
        assert anchor[3] - anchor[1] > 1.3 * (anchor[2] - anchor[0])  # the third ratio


def test_regions_are_taken_from_the_level_of_their_size(random_weights):
    """Each level has another constant value, so the features of a region show its level."""
    model, pooled = detector(random_weights), []
    levels = tuple(
        jnp.full((1, 2048 // stride, 2048 // stride, 16), 1.0 + level)
        for level, stride in enumerate((4, 8, 16, 32, 64))
    )
    sides = jnp.float32([20, 111, 113, 223, 225, 447, 449, 1500])[:, None]
    corner = jnp.float32([[300, 200]])
    boxes = jnp.concatenate([corner + jnp.zeros_like(sides), corner + sides], axis=1)[None]

    class Spy:
        def __call__(self, features, dropout_keys=None):
            pooled.append(features)
            return jnp.zeros((1, 8, 3)), jnp.zeros((1, 8, 3, 4))

    model.box_head = Spy()
    valid = jnp.ones((1, 8), bool)
    detections_in_regions(model, levels, Proposals(boxes, jnp.ones((1, 8)), valid), jnp.float32([[2048, 2048]]))
    # No region takes its features from P6.
    values = np.broadcast_to(np.float32([1, 1, 2, 2, 3, 3, 4, 4])[:, None, None, None], pooled[0].shape[1:])
    np.testing.assert_allclose(pooled[0][0], values, rtol=1e-5)


def test_anchors_in_the_padding_take_part_if_configured():
    grid = anchors_of(tiny.FPN, GRIDS)
    image_hw = jnp.float32([[40, 50]])
    rows, columns = np.float32([[40], [50]])
    found = np.asarray(anchors_on_image(grid, image_hw, tiny.FPN))[0]
    expected = [
        np.repeat((np.arange(h)[:, None] * s < rows) & (np.arange(w)[None] * s < columns), 3)
        for (h, w), s in zip(GRIDS, (4, 8, 16, 32, 64))
    ]
    np.testing.assert_array_equal(found, np.concatenate(expected))
    rpn = dataclasses.replace(tiny.FPN.rpn, anchors_in_padding=True)
    assert anchors_on_image(grid, image_hw, dataclasses.replace(tiny.FPN, rpn=rpn)).all()


def test_every_weight_of_a_pyramid_learns(random_weights):
    model = detector(random_weights)
    graphdef, params, frozen = split(model)

    @jax.jit
    def gradients(params):
        def total(params):
            losses = training_losses(nnx.merge(graphdef, params, frozen), batch(), KEY)
            return sum(mean.sum / mean.count for mean in losses.means.values())

        return jax.grad(total)(params)

    silent = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(params))
        if not (np.isfinite(leaf).all() and np.any(leaf))
    ]
    assert silent == []


def test_detections_of_an_image_do_not_depend_on_its_place_in_the_batch(random_weights):
    model, both = detector(random_weights), batch(2, seed=3)
    run = jax.jit(detect)
    together = run(model, both.images, both.image_hw, both.scale)
    swapped = run(model, both.images[::-1], both.image_hw, both.scale)
    assert np.asarray(together.valid).any()
    for one, other in zip(together, swapped, strict=True):
        np.testing.assert_array_equal(one[0], other[1])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(backbone=BackboneConfig(name="vgg16", norm="none")),
            "needs a resnet or efficientnet backbone of stride 16, got vgg16",
        ),
        (dict(backbone=BackboneConfig(stride=8)), "resnet101 of stride 8"),
        (dict(roi_features=dataclasses.replace(tiny.FPN.roi_features, operator="pool")), "must be align .* got pool"),
        (dict(image=ModelConfig().image), r"multiples of 32 with a pyramid, got \(608, 1008\)"),
    ],
)
def test_a_configuration_that_no_pyramid_can_use_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.FPN, **change)


def test_the_named_implementation_reaches_every_operation(monkeypatch, random_weights):
    asked = []

    def spy(module, name):
        operation = getattr(module, name)

        def spied(*args, implementation=None, **options):
            asked.append((name, implementation))
            return operation(*args, implementation=implementation, **options)

        monkeypatch.setattr(module, name, spied)

    spy(proposals, "nms")
    spy(postprocessing, "batched_nms")
    spy(roi_operators, "roi_align")
    model, images = detector(random_weights), batch()
    jax.eval_shape(
        lambda model: detect(model, images.images, images.image_hw, images.scale, implementation="xla"), model
    )
    assert asked == [("nms", "xla"), ("roi_align", "xla"), ("batched_nms", "xla")]
    asked.clear()
    jax.eval_shape(lambda model: training_losses(model, images, KEY, implementation="xla"), model)
    assert asked == [("nms", "xla"), ("roi_align", "xla")]


def test_detection_is_exported_for_a_cpu_and_a_gpu_at_once(monkeypatch, random_weights):
    """An export names plain JAX, because None decides for the machine that traces, and this one pretends a GPU."""
    mosaic.pretend(monkeypatch)
    graphdef, state = nnx.split(detector(random_weights))
    images = batch(1)

    @jax.jit
    def run(leaves, pixels, image_hw, scale):
        model = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))
        return tuple(detect(model, pixels, image_hw, scale, implementation="xla"))

    arguments = jax.tree.leaves(state), images.images, images.image_hw, images.scale
    exported = jax.export.export(run, platforms=("cpu", "cuda"))(*arguments)
    assert exported.platforms == ("cpu", "cuda") and b"mosaic" not in exported.mlir_module_serialized
    for one, other in zip(exported.call(*arguments), run(*arguments), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)  # another compilation rounds differently
