"""Layers and backbones: they follow their definitions, and masked padding does not change their results."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax import lax

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxHeadConfig,
    ImageConfig,
    ModelConfig,
    RoiFeaturesConfig,
    RpnConfig,
)
from fasterrcnn_jax.config.families import IMAGENET_RGB
from fasterrcnn_jax.models.heads import RpnHead
from fasterrcnn_jax.models.layers import (
    EPSILON,
    Conv,
    DepthwiseConv,
    FrozenBatchNorm,
    GroupNorm,
    Linear,
    conv_norm,
    dropout,
    max_pool,
    relu,
    relu6,
    valid_mask,
)
from fasterrcnn_jax.models.resnet import (
    BLOCKS,
    STEM_POOL_PADDING,
    ResNet,
    ResNetTail,
    Stage,
    stage_channels,
)
from fasterrcnn_jax.models.vgg import Vgg16

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Compiles one program instead of one per operation.
apply = jax.jit(lambda module, *args: module(*args))


IMAGE = ImageConfig(**IMAGENET_RGB)


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_conv_equals_the_sum_over_its_window(size, stride):
    """This includes the 1x1 convolution, which is implemented as a matrix product."""
    conv = Conv(3, 4, size, stride=stride, bias=True, rng=rng())
    conv.bias[...] = normal(4)
    x, kernel = np.float64(normal(2, 9, 8, 3)), np.float64(conv.kernel[...])
    pad = (size - 1) // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    expected = np.zeros((2, -(-9 // stride), -(-8 // stride), 4)) + np.float64(conv.bias[...])
    for row, column in np.ndindex(expected.shape[1:3]):
        window = padded[:, row * stride : row * stride + size, column * stride : column * stride + size]
        expected[:, row, column] += np.einsum("bijc,ijcd->bd", window, kernel)
    found = apply(conv, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_1x1_and_its_gradients_equal_the_convolution(stride):
    conv = Conv(5, 6, 1, stride=stride, rng=rng())
    x, kernel = normal(2, 7, 6, 5), conv.kernel[...]

    graphdef, state = nnx.split(conv)

    def as_product(x, kernel):
        return nnx.merge(graphdef, jax.tree.map(lambda _: kernel, state))(x)

    def as_convolution(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=numbers)

    ours, pull_back = jax.vjp(as_product, x, kernel)
    theirs, pull_back_theirs = jax.vjp(as_convolution, x, kernel)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for a, b in zip(pull_back(ours), pull_back_theirs(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_conv_starts_with_the_variance_of_he_et_al():
    conv = Conv(64, 32, 3, rng=rng())
    assert np.std(conv.kernel[...]) == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.03)
    assert conv.bias is None


def test_linear_is_a_matrix_product_plus_bias():
    linear = Linear(5, 3, std=1.0, rng=rng())
    linear.bias[...] = normal(3)
    x = normal(2, 4, 5)
    expected = np.einsum("abi,io->abo", x, linear.kernel[...]) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(linear(x), expected, atol=1e-5)


def measured(norm, channels):
    """Returns a normalisation with other statistics than those of its start."""
    for i, part in enumerate((norm.scale, norm.bias, norm.mean)):
        part[...] = normal(channels, seed=i)
    norm.var[...] = 0.5 + jnp.abs(normal(channels, seed=3))
    return norm


LAYERS_BEFORE_NORMS = {
    "3 x 3": lambda: Conv(3, 4, 3, stride=2, bias=True, std=0.5, rng=rng()),
    "1 x 1": lambda: Conv(3, 4, 1, stride=2, rng=rng()),
    "depthwise": lambda: DepthwiseConv(3, 3, stride=2, rng=rng()),
}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("name", LAYERS_BEFORE_NORMS)
def test_fixed_statistics_inside_of_the_filters_change_the_rounding_alone(name, dtype, tolerance):
    conv = LAYERS_BEFORE_NORMS[name]()
    norm = measured(FrozenBatchNorm(conv.kernel.shape[-1]), conv.kernel.shape[-1])
    if getattr(conv, "bias", None) is not None:
        conv.bias[...] = normal(4, seed=4)
    x, valid = normal(2, 9, 8, 3).astype(dtype), valid_mask(jnp.array([[9.0, 4.0], [5.0, 8.0]]), (5, 4), 2)
    graphdef, state = nnx.split(conv)

    def both(state):
        def run(state, x):
            return conv_norm(nnx.merge(graphdef, state), norm, x, valid)

        y, pull = jax.vjp(run, state, x)
        return y, *jax.tree.leaves(pull(jnp.ones_like(y)))

    apart = both(state)
    with tiny.layers_of_a_gpu():
        together = both(state)
    for mine, expected in zip(together, apart, strict=True):
        assert mine.dtype == expected.dtype
        expected = np.asarray(expected, np.float32)
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
        )


def test_a_map_is_not_touched_again_after_the_bias():
    """On a GPU, normalisation and bias are no passes over the map of their own: the program has one addition to it."""
    conv, norm = Conv(3, 4, 3, rng=rng()), measured(FrozenBatchNorm(4), 4)
    x = normal(1, 6, 8, 3).astype(jnp.bfloat16)

    def passes():
        program = jax.make_jaxpr(lambda x: conv_norm(conv, norm, x))(x)
        return [eqn.primitive.name for eqn in equations(program.jaxpr) if eqn.outvars[0].aval.shape == (1, 6, 8, 4)]

    assert len(passes()) > 3
    with tiny.layers_of_a_gpu():
        assert [name for name in passes() if "custom_vjp" not in name] == ["conv_general_dilated", "add"]


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_the_gradient_of_a_bias_is_a_float32_sum_over_all_cells():
    """One image of 64 x 64 cells: a sum of ones in bfloat16 stops at 256."""
    linear = Linear(2, 3, std=1.0, rng=rng())
    graphdef, state = nnx.split(linear)
    x = normal(64 * 64, 2).astype(jnp.bfloat16)

    def total(state):
        return nnx.merge(graphdef, state)(x).astype(jnp.float32).sum()

    with tiny.layers_of_a_gpu():
        bias = jax.grad(total)(state)["bias"][...]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, 64 * 64)


def test_relu6_is_clipped_and_its_derivative_is_1_between_0_and_6():
    """PyTorch's derivative is 0 at both ends."""
    x = jnp.asarray([-1.0, 0.0, 0.5, 3.0, 6.0, 7.0, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(relu6(x), jax.nn.relu6(x))
    for derivative in (jax.jacfwd, jax.jacrev):
        np.testing.assert_array_equal(jnp.diag(derivative(relu6)(x)), [0, 0, 1, 1, 0, 0, 0, 0, 0])
    assert relu6(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_relu_and_its_derivatives_are_those_of_jax():
    x = jnp.array([-2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(relu(x), jax.nn.relu(x))
    for derivative in (jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]):
        ours, theirs = (derivative(lambda x, f=f: (f(x) * jnp.arange(8.0)).sum())(x) for f in (relu, jax.nn.relu))
        np.testing.assert_array_equal(ours, theirs)


def test_the_predictions_of_the_rpn_are_the_same_from_one_convolution():
    head = RpnHead(tiny.MODEL, 8, rng=rng())
    for conv in (head.objectness, head.deltas):
        conv.bias[...] = normal(conv.bias.shape[0])
    levels = (normal(2, 5, 6, 8), normal(2, 3, 3, 8))
    apart = head(levels)
    with tiny.layers_of_a_gpu():
        together = head(levels)
        names = [eqn.primitive.name for eqn in equations(jax.make_jaxpr(head)(levels).jaxpr)]
    assert names.count("conv_general_dilated") == 2 * len(levels)  # one for the hidden map, one for the predictions
    for mine, expected in zip(together, apart, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


def group_norm(channels):
    norm = GroupNorm(channels)
    norm.scale[...], norm.bias[...] = 1 + normal(channels, seed=1), normal(channels, seed=2)
    return norm


@pytest.mark.parametrize("channels, groups", [(8, 1), (16, 2), (24, 3), (64, 8), (256, 32), (1024, 32)])
def test_group_norm_equals_mean_and_variance_of_each_group(channels, groups):
    norm = group_norm(channels)
    assert norm.groups == groups
    x = 3 + 2 * normal(2, 4, 5, channels)
    grouped = np.float64(x).reshape(2, 20, groups, -1)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + EPSILON)).reshape(x.shape)
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(apply(norm, x), expected, rtol=1e-4, atol=1e-4)


def test_masked_group_norm_equals_the_unmasked_one_on_the_crop():
    norm = group_norm(16)
    x = normal(2, 6, 8, 16)
    valid = valid_mask(jnp.array([[6.0, 4.0], [3.0, 8.0]]), (6, 8), 1)
    found = apply(norm, jnp.where(valid > 0, x, 1e3), valid)  # the content of padding does not matter
    for row, (height, width) in enumerate([(6, 4), (3, 8)]):
        crop = apply(norm, x[row : row + 1, :height, :width])
        np.testing.assert_allclose(found[row, :height, :width], crop[0], atol=1e-5)
        np.testing.assert_array_equal(found[row] * (1 - valid[row]), np.zeros_like(found[row]))


def test_group_norm_of_an_empty_image_is_zero_with_finite_gradients():
    norm = group_norm(16)
    empty = jnp.zeros((1, 2, 2, 1))
    y, pull_back = jax.vjp(lambda x: apply(norm, x, empty), jnp.zeros((1, 2, 2, 16)))
    assert not np.any(y) and np.isfinite(pull_back(jnp.ones_like(y))[0]).all()


def test_frozen_batch_norm_is_the_affine_map_of_its_statistics():
    norm = FrozenBatchNorm(4)
    norm.scale[...], norm.bias[...] = normal(4, seed=1), normal(4, seed=2)
    norm.mean[...], norm.var[...] = normal(4, seed=3), 1 + jnp.abs(normal(4, seed=4))
    x = normal(2, 3, 3, 4)
    scale, bias, mean, var = (np.asarray(v[...]) for v in (norm.scale, norm.bias, norm.mean, norm.var))
    expected = (np.asarray(x) - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(apply(norm, x), expected, atol=1e-5)
    valid = valid_mask(jnp.array([[2.0, 3.0], [3.0, 1.0]]), (3, 3), 1)
    np.testing.assert_array_equal(apply(norm, x, valid), np.asarray(apply(norm, x)) * np.asarray(valid))


def test_frozen_batch_norm_has_nothing_to_train():
    assert not jax.tree.leaves(nnx.state(FrozenBatchNorm(4), nnx.Param))
    assert len(jax.tree.leaves(nnx.state(FrozenBatchNorm(4)))) == 4


@pytest.mark.parametrize("size, near, far", [(3, 1, 1), (3, 0, 1), (2, 0, 0)])
@pytest.mark.parametrize("height, width", [(6, 8), (5, 7)])
def test_max_pool_is_the_largest_of_its_window(height, width, size, near, far):
    x = normal(2, height, width, 3) - 5  # all negative: padding must not win
    padded = np.pad(x, ((0, 0), (near, far), (near, far), (0, 0)), constant_values=-np.inf)
    rows, columns = (range(0, side + near + far - size + 1, 2) for side in (height, width))
    expected = np.array(
        [[padded[:, i : i + size, j : j + size].max(axis=(1, 2)) for j in columns] for i in rows]
    ).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(max_pool(x, size=size, padding=(near, far)), expected)


@pytest.mark.parametrize("side, cells", [(5, 2), (6, 3), (7, 3), (8, 4), (100, 50)])
def test_stem_pooling_of_the_caffe_style_adds_a_partial_window_at_the_far_border(side, cells):
    """torch has ceil((side - 3) / 2) + 1 windows; the last one is partial."""
    x = normal(1, side, side, 1) - 5
    pooled = np.asarray(max_pool(x, size=3, padding=STEM_POOL_PADDING["ceil"]))
    assert pooled.shape == (1, cells, cells, 1)
    assert pooled[0, -1, -1, 0] == np.max(x[0, 2 * (cells - 1) :, 2 * (cells - 1) :])
    assert pooled[0, 0, 0, 0] == np.max(x[0, :3, :3])


def test_dropout_zeroes_values_at_its_rate_and_keeps_the_mean():
    ones = jnp.ones((200, 300))
    kept = np.asarray(dropout(jax.random.key(0), ones, rate=0.3))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.7)}
    assert np.mean(kept == 0) == pytest.approx(0.3, abs=0.01) and kept.mean() == pytest.approx(1, abs=0.01)
    assert np.any(kept != dropout(jax.random.key(1), ones, rate=0.3))


@pytest.mark.parametrize("stride", [1, 2, 16])
def test_valid_mask_holds_the_first_cells_rounded_up(stride):
    image_hw = jnp.array([[32.0, 48.0], [31.0, 33.0], [1.0, 17.0], [0.0, 0.0]])
    grid = (48 // stride, 64 // stride)
    mask = np.asarray(valid_mask(image_hw, grid, stride))[..., 0]
    for row, (height, width) in enumerate(image_hw.tolist()):
        expected = np.zeros(grid)
        expected[: -int(-height // stride), : -int(-width // stride)] = 1
        np.testing.assert_array_equal(mask[row], expected)


NETS = {"resnet18": ResNet, "resnet50": ResNet, "vgg16": Vgg16}


def backbone(config, image=IMAGE):
    return NETS[config.name](config, image, rng=rng())


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name, channels", [("resnet18", 4), ("resnet50", 16), ("vgg16", 8)])
def test_backbone_has_its_stride_and_channels(name, channels, stride):
    config = BackboneConfig(name=name, width=8, stride=stride)
    (features,) = nnx.eval_shape(
        lambda images: backbone(config)(images, jnp.full((2, 2), 64.0)),
        jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32),
    )
    assert features.shape == (2, 64 // stride, 96 // stride, 8 * channels)
    assert nnx.eval_shape(lambda: backbone(config)).channels == (8 * channels,)


def test_depth_counts_the_layers_with_weights():
    for depth, blocks in BLOCKS.items():
        assert sum(blocks) * (3 if depth >= 50 else 2) + 2 == depth


def test_published_resnet_50_has_its_number_of_parameters():
    """The published 25.6 M minus 2.0 M of the classifier and 0.05 M of the normalisation layers."""

    def build():
        config = BackboneConfig(name="resnet50")
        last = Stage(4, stride=2, config=config, rng=rng())
        return nnx.Dict(trunk=backbone(config), last=last)

    state = nnx.state(nnx.eval_shape(build))
    kernels = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state) if len(leaf.shape) == 4)
    assert kernels == 25_557_032 - 2_049_000 - 53_120


def test_vgg16_has_its_number_of_parameters():
    """The number counts the thirteen convolutions with their biases."""
    config = BackboneConfig(name="vgg16", norm="none")
    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: backbone(config))))
    assert sum(np.prod(leaf.shape) for leaf in leaves) == 14_714_688
    assert sum(len(leaf.shape) == 4 for leaf in leaves) == 13


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_block_whose_branch_is_zero_is_the_identity(name):
    """With fixed statistics all blocks start as the identity; otherwise activations would double with every block."""
    config = BackboneConfig(name=name, width=8)
    stage = Stage(1, stride=1, config=config, rng=rng())
    x = jnp.abs(normal(1, 4, 4, stage_channels(config, 1)))
    np.testing.assert_array_equal(apply(stage.blocks[1], x), x)
    kernel = stage.blocks[1].convs[-1].kernel
    kernel[...] = normal(*kernel.shape)
    # No ReLU comes before the sum, so the branch also lowers values.
    assert np.any(apply(stage.blocks[1], x) < x)
    stage.blocks[1].norms[-1].scale[...] = jnp.zeros(stage_channels(config, 1))
    np.testing.assert_array_equal(apply(stage.blocks[1], x), x)


@pytest.mark.parametrize("summary", ["mean", "flatten"])
def test_the_head_of_a_resnet_averages_or_flattens_the_cells_of_stage_4(summary):
    config = ModelConfig(
        image=IMAGE,
        backbone=BackboneConfig(name="resnet18", width=8, norm="group"),
        box_head=BoxHeadConfig(summary=summary),
        roi_features=RoiFeaturesConfig(output_size=6),
    )
    tail = ResNetTail(config, rng=rng())
    pooled = normal(2, 3, 6, 6, stage_channels(config.backbone, 3))
    cells = np.stack([apply(tail.stage, regions) for regions in pooled])
    assert cells.shape == (2, 3, 3, 3, 64) and len(np.unique(cells[0, 0, :, :, 0])) > 2
    expected = cells.reshape(2, 3, 9, 64).mean(axis=2) if summary == "mean" else cells.reshape(2, 3, 9 * 64)
    found = apply(tail, pooled, None)
    assert found.shape == (2, 3, tail.channels)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_rpn_has_a_relu_after_its_convolution():
    """Objectness and deltas are linear in the activations, so without the ReLU the RPN would be linear."""
    config = ModelConfig(image=IMAGE, rpn=RpnConfig(channels=8))
    head = RpnHead(config, 4, rng=rng())
    head.convs[0].kernel[...] = normal(3, 3, 4, 8)
    level = normal(1, 5, 6, 4, seed=1)
    before = np.asarray(apply(head.convs[0], level))
    assert (before < 0).mean() > 0.3
    objectness, deltas = apply(head, (level,))
    for found, layer in ((objectness, head.objectness), (deltas, head.deltas)):
        expected = np.maximum(before, 0) @ np.asarray(layer.kernel[...])[0, 0]
        np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-4)


@pytest.mark.parametrize("stride_in, strides", [("1x1", (2, 1, 1)), ("3x3", (1, 2, 1))])
def test_a_bottleneck_strides_in_the_configured_convolution(stride_in, strides):
    config = BackboneConfig(name="resnet50", width=8, stride_in=stride_in)
    blocks = Stage(2, stride=2, config=config, rng=rng()).blocks
    assert tuple(conv.stride for conv in blocks[0].convs) == strides and blocks[0].shortcut.stride == 2
    assert all(conv.stride == 1 for block in list(blocks)[1:] for conv in block.convs)


@pytest.mark.parametrize("name", ["resnet50", "vgg16"])
def test_first_features_are_as_large_for_pixels_that_are_not_divided_by_a_std(name):
    """The std of Caffe's images is 58 times as large; the weights of the first layer start 58 times as small."""
    config = BackboneConfig(name=name, width=8, norm="group")
    images = normal(1, 32, 32, 3)
    normalised, plain = (backbone(config, image) for image in (IMAGE, ImageConfig()))
    first = "stem" if name == "resnet50" else "stages"

    def stem(net, x):
        layer = getattr(net, first)
        return float(np.std(layer(x) if first == "stem" else layer[0].convs[0](x)))

    assert stem(plain, 57.7 * images) == pytest.approx(stem(normalised, images), rel=0.02)


@pytest.mark.parametrize(
    "name, stride, norm, stem_pool",
    [
        ("resnet18", 8, "frozen_batch", "padded"),
        ("resnet50", 16, "group", "ceil"),
        ("vgg16", 8, "group", "ceil"),
        ("vgg16", 16, "none", "ceil"),
    ],
)
def test_features_of_a_masked_backbone_do_not_depend_on_the_canvas(random_weights, name, stride, norm, stem_pool):
    """An image that fills its canvas and one that does not have the same features on a larger canvas."""
    config = BackboneConfig(name=name, width=8, stride=stride, norm=norm, stem_pool=stem_pool, mask_padding=True)
    net = random_weights(lambda: backbone(config))
    sizes = [(48, 64), (40, 50)]
    contents = [normal(*size, 3, seed=5) for size in sizes]

    def features(height, width):
        images = np.zeros((2, height, width, 3), np.float32)
        for image, content in zip(images, contents, strict=True):
            image[: content.shape[0], : content.shape[1]] = content
        return np.asarray(apply(net, images, np.float32(sizes))[0])

    for tight, wide, size in zip(features(48, 64), features(80, 96), sizes, strict=True):
        rows, columns = (-(-side // stride) for side in size)
        tight = tight[:rows, :columns]
        scale = np.abs(tight).max()
        assert scale > 0.1
        np.testing.assert_allclose(wide[:rows, :columns] / scale, tight / scale, atol=1e-5)
        assert not wide[rows:].any() and not wide[:, columns:].any()


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vgg16", marks=pytest.mark.slow)])
def test_recomputed_stages_give_the_same_gradients_and_keep_less(random_weights, name):
    images, image_hw = normal(1, 48, 64, 3), jnp.asarray([(40.0, 60.0)])

    def measured(remat):
        config = BackboneConfig(name=name, width=8, norm="group", mask_padding=True, remat=remat)
        graphdef, params, rest = nnx.split(random_weights(lambda: backbone(config)), nnx.Param, ...)

        def features(params):
            return nnx.merge(graphdef, params, rest)(images, image_hw)[0]

        gradient = jax.jit(jax.grad(lambda params: jnp.square(features(params)).sum()))(params)
        residuals = jax.eval_shape(lambda params: jax.vjp(features, params)[1], params)
        # Weights are kept with and without recomputation.
        weights = sum(leaf.size for leaf in jax.tree.leaves(params))
        return gradient, sum(leaf.size for leaf in jax.tree.leaves(residuals)) - weights

    gradients, kept = zip(measured(False), measured(True), strict=True)
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(one).max())
    # Maps between stages are kept, too, and so is the stem of ResNet, which is not a stage.
    assert kept[1] < 0.6 * kept[0]


def test_vgg16_with_batch_norm_normalises_between_each_convolution_and_its_relu(random_weights):
    """As torchvision's vgg16_bn with fixed statistics: four constants per convolution and no additional parameters."""
    net = random_weights(lambda: backbone(BackboneConfig(name="vgg16", width=8, norm="frozen_batch")))
    assert len(jax.tree.leaves(nnx.state(net, nnx.Param))) == 2 * 13
    assert len(jax.tree.leaves(nnx.state(net))) == (2 + 4) * 13
    x = expected = normal(1, 8, 8, 3)
    stage = net.stages[0]
    for conv, norm in zip(stage.convs, stage.norms, strict=True):
        y = np.asarray(conv(expected))
        scale, bias, mean, var = (np.asarray(leaf[...]) for leaf in (norm.scale, norm.bias, norm.mean, norm.var))
        expected = jnp.asarray(np.maximum((y - mean) / np.sqrt(var + EPSILON) * scale + bias, 0))
    np.testing.assert_allclose(apply(stage, x, None), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stem_pool, near", [("ceil", 0), ("padded", 1)])
def test_the_stem_is_pooled_as_configured(stem_pool, near):
    """Windows start on even cells or one cell before them."""
    net = backbone(BackboneConfig(name="resnet18", width=8, stem_pool=stem_pool))
    net.stages, net.strides = nnx.List([]), ()
    images = normal(1, 24, 32, 3)
    x = np.asarray(jax.nn.relu(net.stem_norm(net.stem(images))))
    rows, columns = ([slice(max(2 * i - near, 0), 2 * i - near + 3) for i in range(side // 4)] for side in (24, 32))
    expected = [[x[:, row, column].max(axis=(1, 2)) for column in columns] for row in rows]
    (found,) = net(images, jnp.full((1, 2), 32.0))
    np.testing.assert_array_equal(np.asarray(found).transpose(1, 2, 0, 3), np.array(expected))


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_the_rpn_has_its_activation_after_each_3x3_convolution(random_weights, activation):
    config = ModelConfig(rpn=RpnConfig(channels=8, convs=2, activation=activation))
    head = random_weights(lambda: RpnHead(config, 8, rng=np.random.default_rng(0)))
    x = features = normal(1, 5, 6, 8)
    for conv in head.convs:
        x = np.asarray(conv(jnp.asarray(x)))
        assert (x < 0).any()
        x = np.maximum(x, 0) if activation == "relu" else x
    objectness, deltas = head((features,))
    np.testing.assert_allclose(objectness, head.objectness(jnp.asarray(x)).reshape(1, -1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(deltas, head.deltas(jnp.asarray(x)).reshape(1, -1, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("summary", ["mean", "flatten"])
def test_the_cells_of_resnets_last_stage_become_one_vector_as_configured(random_weights, summary):
    backbone_config = BackboneConfig(name="resnet18", width=8)
    config = ModelConfig(backbone=backbone_config, box_head=BoxHeadConfig(summary=summary))
    tail = random_weights(lambda: ResNetTail(config, rng=np.random.default_rng(0)))
    pooled = normal(2, 3, 7, 7, 32)
    cells = np.asarray(tail.stage(pooled.reshape(6, 7, 7, 32)))
    assert cells.shape == (6, 4, 4, 64)
    expected = cells.sum(axis=(1, 2)) / 16 if summary == "mean" else cells
    found = tail(pooled, None)
    assert found.shape == (2, 3, tail.channels)
    np.testing.assert_allclose(found, expected.reshape(2, 3, -1), rtol=1e-5, atol=1e-5)
