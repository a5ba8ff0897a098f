"""Batch normalisation that trains: its statistics, its gradient over devices, its running averages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file

import fasterrcnn_jax
from fasterrcnn_jax.config import BackboneConfig, Config, DataConfig, FpnConfig, TrainConfig
from fasterrcnn_jax.models.detector import Detector, use_batch_statistics
from fasterrcnn_jax.models.faster_rcnn import box_training_losses, detect, rpn_training_losses
from fasterrcnn_jax.models.heads import BoxHead, region_masks
from fasterrcnn_jax.models.layers import EPSILON, BatchNorm, Conv, Running, run_stage, valid_mask
from fasterrcnn_jax.models.vgg import Stage
from fasterrcnn_jax.processes import AXIS, replicate
from fasterrcnn_jax.structures import Batch, GroundTruth, Proposals
from fasterrcnn_jax.training.checkpoint import closing, load, open_checkpoints, restore, save
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.state import merge
from fasterrcnn_jax.training.step import create_state, data_parallel, make_train_step

C = 3
MOMENTUM = 0.1  # of PyTorch

pytestmark = pytest.mark.skipif(jax.local_device_count() < 4, reason="needs four devices")


@pytest.fixture(scope="module", autouse=True)
def environment():
    with tiny.quick_compilation(), jax.numpy_dtype_promotion("standard"):
        yield


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(1.0, 2.0, shape).astype(np.float32)


def layer_with(random_weights, batch_axes):
    layer = random_weights(lambda: BatchNorm(C))
    layer.batch_axes = batch_axes
    return layer


def values_of(layer):
    return [np.float64(leaf[...]) for leaf in (layer.scale, layer.bias, layer.mean, layer.var)]


def normalised(layer, x, mean, var):
    scale, bias, _, _ = values_of(layer)
    return (x - mean) / np.sqrt(var + EPSILON) * scale + bias


def averaged(old, new):
    return (1 - MOMENTUM) * old + MOMENTUM * new


def test_training_normalises_with_the_batch_and_moves_the_running_averages(random_weights):
    """The running variance is unbiased, the one that normalises is not; float64 is the oracle."""
    layer, x = layer_with(random_weights, ()), drawn(2, 3, 4, C)
    _, _, old_mean, old_var = values_of(layer)
    rows = np.float64(x).reshape(-1, C)
    found = np.asarray(layer(jnp.asarray(x)))
    np.testing.assert_allclose(found, normalised(layer, x, rows.mean(0), rows.var(0)), rtol=1e-5, atol=1e-5)
    _, _, mean, var = values_of(layer)
    np.testing.assert_allclose(mean, averaged(old_mean, rows.mean(0)), rtol=1e-6)
    np.testing.assert_allclose(var, averaged(old_var, rows.var(0, ddof=1)), rtol=1e-6)


def test_detection_normalises_with_the_running_averages_and_changes_nothing(random_weights):
    layer, x = layer_with(random_weights, None), drawn(2, 3, 4, C)
    before = values_of(layer)
    found = np.asarray(layer(jnp.asarray(x)))
    np.testing.assert_allclose(found, normalised(layer, x, *before[2:]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(values_of(layer), before)


def test_padding_and_empty_rows_do_not_enter_the_statistics(random_weights):
    x, valid = drawn(3, 3, 4, C), np.zeros((3, 3, 4, 1), np.float32)
    valid[0, :2, :3], valid[1] = 1, 1  # the third row only fills the batch
    inside = np.float64(x[valid[..., 0] > 0])
    layers = [layer_with(random_weights, ()) for _ in range(2)]
    old_mean, old_var = values_of(layers[0])[2:]
    found = np.asarray(layers[0](jnp.asarray(x), jnp.asarray(valid)))
    expected = normalised(layers[0], x, inside.mean(0), inside.var(0)) * valid
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(values_of(layers[0])[2], averaged(old_mean, inside.mean(0)), rtol=1e-6)
    np.testing.assert_allclose(values_of(layers[0])[3], averaged(old_var, inside.var(0, ddof=1)), rtol=1e-6)
    changed = np.where(valid > 0, x, 1e3).astype(np.float32)
    np.testing.assert_array_equal(layers[1](jnp.asarray(changed), jnp.asarray(valid)), found)


def test_a_batch_without_a_valid_pixel_leaves_the_running_averages(random_weights):
    layer = layer_with(random_weights, ())
    before = values_of(layer)
    assert not np.any(layer(jnp.asarray(drawn(1, 3, 4, C)), jnp.zeros((1, 3, 4, 1))))
    np.testing.assert_array_equal(values_of(layer), before)


def test_low_precision_maps_have_statistics_in_float32(random_weights):
    x = jnp.asarray(drawn(2, 5, 5, C)).astype(jnp.bfloat16)
    layer, exact = layer_with(random_weights, ()), layer_with(random_weights, ())
    found, expected = layer(x), exact(x.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(values_of(layer), values_of(exact))


def test_recomputed_stages_move_the_running_averages_once(random_weights):
    config = BackboneConfig(name="vgg16", width=8, norm="batch", mask_padding=True)
    x, valid = jnp.asarray(drawn(2, 6, 6, 8)), jnp.ones((2, 6, 6, 1))

    def after(remat):
        stage = random_weights(
            lambda: Stage(8, 8, convs=2, first_std=None, config=config, rng=np.random.default_rng(0))
        )
        graphdef, state = nnx.split(stage)

        def loss(state):
            stage = nnx.merge(graphdef, state)
            for norm in stage.norms:
                norm.batch_axes = ()
            y = run_stage(stage, x, valid, remat=remat)
            return jnp.square(y).sum(), nnx.state(stage, Running)

        return jax.jit(jax.grad(loss, has_aux=True, allow_int=True))(state), nnx.state(stage, Running)

    (gradient, plain), before = after(False)
    (recomputed_gradient, recomputed), _ = after(True)
    for old, one, other in zip(*map(jax.tree.leaves, (before, plain, recomputed)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert np.any(old != one)
    # A bias before the norm has no effect: its gradient is rounding beside the largest one.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for one, other in zip(*map(jax.tree.leaves, (gradient, recomputed_gradient)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * largest)


class Layer(nnx.Module):
    """A convolution with batch normalisation."""

    def __init__(self, in_channels, channels, *, stride=1, rng):
        self.conv = Conv(in_channels, channels, 3, stride=stride, rng=rng)
        self.norm = BatchNorm(channels)

    def __call__(self, x, valid=None):
        return jax.nn.relu(self.norm(self.conv(x), valid))


class Tail(nnx.Module):
    """A convolution with batch normalisation on each region, and the mean over its cells."""

    channels = 8

    def __init__(self, rng):
        self.layer = Layer(8, 8, rng=rng)

    def __call__(self, pooled, dropout_keys, roi_valid=None):
        x = pooled.reshape(-1, *pooled.shape[2:])
        return self.layer(x, region_masks(roi_valid, x.shape[1])).mean(axis=(1, 2)).reshape(*pooled.shape[:2], -1)


class Net(nnx.Module):
    """A backbone of a stem and two stages, with a tail."""

    channels = (8,)

    def __init__(self, config, image, *, rng):
        self.stem = Layer(3, 8, stride=4, rng=rng)
        self.stages = nnx.List([Layer(8, 8, stride=2, rng=rng) for _ in range(2)])

    def __call__(self, images, image_hw):
        x = images
        for stage, stride in zip((self.stem, *self.stages), (4, 8, 16), strict=True):
            x = stage(x, valid_mask(image_hw, (images.shape[1] // stride, images.shape[2] // stride), stride))
        return (x,)

    def tail(self, config, *, rng):
        return Tail(rng)


# The stem and the first stage are fixed.
B, G, STEPS = 4, 3, 4
BACKBONE = dataclasses.replace(tiny.MODEL.backbone, own="here:Net", norm="batch", fixed_stages=1)
MODEL = dataclasses.replace(tiny.MODEL, backbone=BACKBONE)
UNFIXED = dataclasses.replace(MODEL, backbone=dataclasses.replace(BACKBONE, fixed_stages=0))
TRAIN = TrainConfig(steps=20, batch_size=B, learning_rate=1e-2, warmup_steps=0)
# The devices' sums are added in another order. Each difference is compared with the largest change in its array.
TOLERANCE = 1e-4


def batch_of(step):
    """Returns a batch of four rows: two objects; no object in a part of the canvas; an empty row; one object."""
    generator = np.random.default_rng(step)
    height, width = tiny.IMAGE.canvases[0]
    valid = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]], bool)
    near = generator.uniform(0, 30, (B, G, 2))
    boxes = np.concatenate((near, near + generator.uniform(16, 30, (B, G, 2))), axis=2) * valid[..., None]
    image_hw = np.float32([(height, width), (40, 50), (0, 0), (height, width)])
    inside = np.indices((height, width)).transpose(1, 2, 0)[None] < image_hw[:, None, None]
    return Batch(
        images=(generator.normal(size=(B, height, width, 3)) * inside.all(-1, keepdims=True)).astype(np.float32),
        image_hw=image_hw,
        scale=np.ones((B, 2), np.float32),
        image_index=np.int32([7, 3, 0, 9]),
        image_valid=np.array([True, True, False, True]),
        ground_truth=GroundTruth(boxes.astype(np.float32), valid.astype(np.int32), valid),
        # Those of the first image are near its objects; the others have fewer than slots.
        proposals=Proposals(boxes.astype(np.float32) + 2, np.full((B, G), 0.5, np.float32), valid),
    )


class PlainTail(nnx.Module):
    """A tail of two arguments, without batch normalisation."""

    channels = 8

    def __call__(self, pooled, dropout_keys):
        return pooled.mean(axis=(2, 3))


def test_only_a_tail_with_batch_norm_gets_the_valid_regions():
    pooled, valid = jnp.ones((2, 3, 4, 4, 8)), jnp.array([[True, True, False], [True, False, False]])

    class Recording(Tail):
        def __call__(self, pooled, dropout_keys, roi_valid=None):
            given.append(roi_valid)
            return super().__call__(pooled, dropout_keys, roi_valid)

    given = []
    for tail in (PlainTail(), Recording(np.random.default_rng(0))):
        head = BoxHead(MODEL, 8, 2, tail=tail, rng=np.random.default_rng(0))
        assert head(pooled, None, valid)[0].shape == (2, 3, 3)
    assert given[0] is valid and len(given) == 1


def begun(random_weights, config, *, averages=False, **options):
    """Returns (structure, state in NumPy, step of one device)."""
    model = random_weights(lambda: Detector(config, tiny.CLASS_NAMES, backbone=Net, rng=np.random.default_rng(0)))
    optimizer = create_optimizer(TRAIN)
    parts = {"parts": options["parts"]} if "parts" in options else {}
    graphdef, state = create_state(model, optimizer, seed=0, averages=averages, **parts)
    return graphdef, jax.device_get(state), make_train_step(graphdef, optimizer, axis_name=AXIS, **options)


def steps_from(state, step, numbers, *, devices=1):
    devices = jax.local_devices()[:devices]
    run, state = data_parallel(step, devices=devices), replicate(jax.tree.map(np.array, state), devices=devices)
    for number in numbers:
        state, _ = run(state, batch_of(number))
    return jax.device_get(state)


@pytest.fixture(scope="module")
def start(random_weights):
    # The head on given proposals compiles in half the time of both heads.
    return begun(random_weights, MODEL, losses=box_training_losses)


@pytest.fixture(scope="module")
def trained(start):
    """Returns {number of devices: state after the steps}."""
    return {count: steps_from(*start[1:], range(STEPS), devices=count) for count in (1, 4)}


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("part", ["params", "running"])
def test_four_devices_do_the_steps_of_one(start, trained, part):
    """Each device holds one image. Statistics of one image alone would give other weights and averages."""
    first, one, four = (by_path(getattr(state, part)) for state in (start[1], trained[1], trained[4]))
    for name, value in one.items():
        size = np.abs(value - first[name]).max()
        np.testing.assert_allclose(four[name] - first[name], value - first[name], atol=TOLERANCE * size, err_msg=name)


def test_fixed_stages_keep_their_running_averages_and_all_others_move(start, trained):
    before, after = by_path(start[1].running), by_path(trained[1].running)
    fixed = {"backbone/stem/norm", "backbone/stages/0/norm"}
    moving = {"backbone/stages/1/norm", "box_head/tail/layer/norm"}
    assert set(before) == {f"{name}/{leaf}/value" for name in fixed | moving for leaf in ("mean", "var")}
    for name, value in after.items():
        assert np.array_equal(value, before[name]) == (name.rsplit("/", 2)[0] in fixed), name


def test_parts_that_are_not_trained_keep_their_running_averages(random_weights):
    """As in the third stage of alternating training, whose trunk must stay that of the second."""
    _, state, step = begun(random_weights, MODEL, losses=rpn_training_losses, parts=("rpn_head",))
    after = steps_from(state, step, [0])
    jax.tree.map(np.testing.assert_array_equal, after.running, state.running)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_micro_batch_moves_the_running_averages_in_turn(random_weights, accumulate):
    graphdef, state, step = begun(random_weights, UNFIXED, losses=rpn_training_losses, accumulate=accumulate)
    stem, batch = merge(graphdef, state).backbone.stem, batch_of(0)
    maps = np.float64(stem.conv(jnp.asarray(batch.images)))
    expected = [np.float64(leaf[...]) for leaf in (stem.norm.mean, stem.norm.var)]
    valid = np.asarray(valid_mask(jnp.asarray(batch.image_hw), maps.shape[1:3], 4))[..., 0] > 0
    for rows in np.arange(B).reshape(accumulate, -1):
        inside = maps[rows][valid[rows]]
        new = inside.mean(0), inside.var(0, ddof=1)
        expected = [averaged(old, now) for old, now in zip(expected, new, strict=True)]
    running = by_path(steps_from(state, step, [0]).running)
    for name, value in zip(("mean", "var"), expected, strict=True):
        np.testing.assert_allclose(running[f"backbone/stem/norm/{name}/value"], value, rtol=1e-5, atol=1e-6)


def test_a_detector_of_a_state_detects_with_its_running_averages(start, trained):
    """The function that detects is pure: the batch moves nothing, and an image is the same in any batch."""
    model = merge(start[0], trained[1])
    norm = model.backbone.stages[1].norm
    np.testing.assert_array_equal(norm.mean[...], by_path(trained[1].running)["backbone/stages/1/norm/mean/value"])
    batch = batch_of(0)
    images, image_hw, scale = (jnp.asarray(part) for part in (batch.images, batch.image_hw, batch.scale))
    detections = jax.jit(detect)
    together = detections(model, images, image_hw, scale)
    alone = detections(model, images[:1], image_hw[:1], scale[:1])
    np.testing.assert_allclose(together.scores[:1], alone.scores, rtol=1e-5)
    norm.mean[...] = norm.mean[...] + 1.0
    assert np.abs(detections(model, images, image_hw, scale).scores - together.scores).max() > 1e-3


def test_averaged_weights_come_with_the_running_averages(random_weights):
    graphdef, state, step = begun(random_weights, MODEL, losses=rpn_training_losses, averages=True, ema_decay=0.9)
    after = steps_from(state, step, [0, 1])
    norm = merge(graphdef, after).backbone.stages[1].norm
    np.testing.assert_array_equal(norm.var[...], by_path(after.running)["backbone/stages/1/norm/var/value"])
    np.testing.assert_array_equal(norm.scale[...], by_path(after.averaged)["backbone/stages/1/norm/scale/value"])


def test_a_run_continues_from_a_checkpoint_with_the_same_bits(start, trained, tmp_path):
    """Without the running averages in the checkpoint, the last steps would move other ones."""
    graphdef, state, step = start
    data = DataConfig(root=tmp_path, class_names=tiny.CLASS_NAMES)
    config = Config(run=tmp_path / "run", data=data, model=MODEL, train=TRAIN)
    half = jax.tree.map(jnp.asarray, steps_from(state, step, range(2)))
    checkpoints = open_checkpoints(config.run, keep=1)
    with closing(checkpoints):
        save(checkpoints, state=half, config=config, iterator_state={}, measured=None)
        restored, _ = restore(checkpoints, half, config=config)
    whole = steps_from(restored, step, range(2, STEPS))
    for name, value in by_path(trained[1]).items():
        np.testing.assert_array_equal(by_path(whole)[name], value, err_msg=name)
    loaded = load(config.run, backbone=Net)
    for name, value in by_path(merge(graphdef, half)).items():
        np.testing.assert_array_equal(by_path(loaded)[name], value, err_msg=name)


def test_regions_that_are_none_do_not_enter_the_statistics_of_the_box_head(random_weights):
    """For the tail of ResNet, and for the convolutions before fully connected layers."""
    c4 = dataclasses.replace(tiny.MODEL, backbone=dataclasses.replace(tiny.MODEL.backbone, norm="batch"))
    pyramid = dataclasses.replace(
        tiny.FPN,
        fpn=FpnConfig(channels=16, norm="batch"),
        box_head=dataclasses.replace(tiny.FPN.box_head, convs=1),
    )
    pooled = drawn(2, 3, 4, 4, 32)
    roi_valid = np.array([[1, 1, 0], [1, 0, 0]], bool)
    garbage = np.where(roi_valid[..., None, None, None], pooled, 1e3)
    for config, channels in ((c4, 32), (pyramid, 16)):

        def found(pooled, config=config, channels=channels):
            model = random_weights(lambda: Detector(config, ("a",), rng=np.random.default_rng(0)))
            use_batch_statistics(model, parts=("box_head",))
            x = model.box_head.tail(jnp.asarray(pooled[..., :channels]), None, jnp.asarray(roi_valid))
            return [np.asarray(x)[roi_valid], *jax.tree.leaves(nnx.state(model, Running))]

        for one, other in zip(found(pooled), found(garbage), strict=True):
            np.testing.assert_array_equal(one, other)


def test_exported_weights_name_the_running_averages(random_weights, tmp_path):
    """The names are those of PyTorch. The file loads as the same detector, and into one with fixed statistics."""
    backbone = BackboneConfig(name="vgg16", width=8, norm="batch", mask_padding=True, fixed_stages=0)
    head = dataclasses.replace(tiny.MODEL.box_head, channels=16)
    config = dataclasses.replace(tiny.MODEL, backbone=backbone, box_head=head)
    model = random_weights(lambda: Detector(config, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))
    path = tmp_path / "weights.safetensors"
    fasterrcnn_jax.save_weights(model, path)
    arrays = load_file(path)
    for number in (1, 4, 8, 11, 15, 18, 21, 25, 28, 31, 35, 38, 41):
        assert {f"RCNN_base.{number}.running_{name}" for name in ("mean", "var")} <= set(arrays)
    norm = model.backbone.stages[0].norms[1]
    np.testing.assert_array_equal(arrays["RCNN_base.4.running_var"], norm.var[...])
    again = fasterrcnn_jax.load(path)
    fixed = dataclasses.replace(config, backbone=dataclasses.replace(backbone, norm="frozen_batch"))
    other = fasterrcnn_jax.create(fixed, tiny.CLASS_NAMES, weights=path)
    for name, value in by_path(model).items():
        np.testing.assert_array_equal(by_path(again)[name], value, err_msg=name)
        np.testing.assert_array_equal(by_path(other)[name], value, err_msg=name)


def test_batch_norm_without_a_mask_of_the_padding_is_refused():
    with pytest.raises(ValueError, match="norm batch needs mask_padding True, because padding"):
        dataclasses.replace(BACKBONE, mask_padding=False)
    backbone = dataclasses.replace(tiny.FPN.backbone, mask_padding=False)
    with pytest.raises(ValueError, match=r"fpn.norm batch needs backbone.mask_padding True"):
        dataclasses.replace(tiny.FPN, backbone=backbone, fpn=FpnConfig(channels=16, norm="batch"))
