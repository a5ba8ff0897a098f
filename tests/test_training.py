"""The training step: schedule, weight decay, frozen values, one and four devices, falling loss.

All tests share two compiled programs: the step on four virtual devices and on one device.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from fasterrcnn_jax.config import TrainConfig
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import Detector, split
from fasterrcnn_jax.processes import AXIS, check_batch_size, replicate
from fasterrcnn_jax.structures import Batch, GroundTruth
from fasterrcnn_jax.training.optimizer import (
    create_optimizer,
    learning_rate_schedule,
    learning_rates,
)
from fasterrcnn_jax.training.state import StepMetrics, merge
from fasterrcnn_jax.training.step import (
    _norm,
    create_state,
    data_parallel,
    make_train_step,
)

DEVICES, B, G = 4, 4, 5
H, W = tiny.IMAGE.canvases[0]
# The model has a fixed stage, and RoIs per batch that the devices must share.
MODEL = dataclasses.replace(
    tiny.MODEL,
    backbone=dataclasses.replace(tiny.MODEL.backbone, norm="frozen_batch", fixed_stages=1),
    roi_sampling=dataclasses.replace(tiny.MODEL.roi_sampling, rois_per_batch=8 * B),
)
TRAIN = TrainConfig(steps=60, batch_size=B, learning_rate=0.005, warmup_steps=0, weight_decay=0.0, clip_norm=1e6)
LOSSES = StepMetrics._fields[:4]

pytestmark = pytest.mark.skipif(jax.local_device_count() < DEVICES, reason="needs four devices")


@pytest.fixture(scope="module", autouse=True)
def environment():
    # Optax's schedules mix integers and floats. Promotion in the losses is held to in test_detector.py.
    with tiny.quick_compilation(), jax.numpy_dtype_promotion("standard"):
        yield


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    config = TrainConfig(steps=110, batch_size=1, learning_rate=0.4, warmup_steps=10, schedule="cosine")
    schedule = learning_rate_schedule(config)
    rates = np.array([float(schedule(step)) for step in range(111)])
    np.testing.assert_allclose(rates[:11], np.linspace(0.04, 0.4, 11), atol=1e-7)
    np.testing.assert_allclose(rates[10:], 0.2 * (1 + np.cos(np.linspace(0, np.pi, 101))), atol=1e-7)


@pytest.mark.parametrize("schedule", ["cosine", "steps"])
def test_learning_rate_without_warm_up_starts_at_its_peak(schedule):
    config = TrainConfig(steps=10, batch_size=1, learning_rate=0.4, warmup_steps=0, schedule=schedule)
    assert float(learning_rate_schedule(config)(0)) == np.float32(0.4)


def test_learning_rate_falls_by_its_factor_after_each_decay_step():
    config = TrainConfig(
        steps=20, batch_size=1, learning_rate=0.4, warmup_steps=4, decay_steps=(8, 15), decay_factor=0.5
    )
    rates = [float(learning_rate_schedule(config)(step)) for step in range(20)]
    np.testing.assert_allclose(rates[:5], np.linspace(0.1, 0.4, 5), rtol=1e-6)
    np.testing.assert_allclose(rates[5:8] + rates[8:15] + rates[15:], [0.4] * 3 + [0.2] * 7 + [0.1] * 5, rtol=1e-6)


def updated(config, params, gradients, steps=1):
    optimizer = create_optimizer(config)
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return jax.device_get(params)


PLAIN = dict(steps=10, batch_size=1, learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
# Parameters whose names select learning rates and decay.
WEIGHTS = {
    "conv": {"kernel": (1, 1, 2, 2), "bias": (2,)},
    "norm": {"scale": (2,), "bias": (2,)},
    "objectness": {"kernel": (1, 1, 2, 3), "bias": (3,)},
}


def moved(gradient, **fields):
    """Returns the change of each weight, initially one, after one step with a constant gradient."""
    params = {layer: {name: jnp.ones(shape) for name, shape in of.items()} for layer, of in WEIGHTS.items()}
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
    after = updated(TrainConfig(**PLAIN | fields), params, gradients)
    return {f"{layer}/{name}": float(np.mean(1 - leaf)) for layer, of in after.items() for name, leaf in of.items()}


def expected(value, **others):
    named = {name.replace("__", "/"): other for name, other in others.items()}
    return {f"{layer}/{name}": value for layer, of in WEIGHTS.items() for name in of} | named


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_changes_only_kernels(optimizer):
    found = moved(0.0, optimizer=optimizer, double_objectness=False)
    assert found == pytest.approx(expected(0.0, conv__kernel=0.05, objectness__kernel=0.05), abs=1e-6)


def test_adam_sees_the_decay_in_the_gradient():
    """Adam's first step has the size of the learning rate for any gradient; AdamW adds the decay to it."""
    found = moved(0.0, optimizer="adam", double_objectness=False, double_bias=False)
    assert found == pytest.approx(expected(0.0, conv__kernel=0.5, objectness__kernel=0.5), abs=1e-5)
    adamw = moved(1.0, optimizer="adamw", double_objectness=False, double_bias=False)
    assert adamw == pytest.approx(expected(0.5, conv__kernel=0.55, objectness__kernel=0.55), abs=1e-5)


def test_biases_decay_when_asked_to_and_scales_never():
    found = moved(0.0, bias_decay=True, double_bias=False, double_objectness=False)
    assert found == pytest.approx(expected(0.05, norm__scale=0.0), abs=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_biases_learn_at_twice_the_rate_when_asked_to(optimizer):
    options = dict(optimizer=optimizer, weight_decay=0.0, double_objectness=False)
    once = expected(0.5)
    assert moved(1.0, **options, double_bias=False) == pytest.approx(once, abs=1e-5)
    twice = once | dict.fromkeys(("conv/bias", "norm/bias", "objectness/bias"), 1.0)
    assert moved(1.0, **options, double_bias=True) == pytest.approx(twice, abs=1e-5)


def test_one_objectness_logit_moves_like_the_difference_of_the_references_two():
    """With two logits, l1 moves by the gradient and l0 by minus the gradient, and each has its own decay."""
    two = [0.3, -0.2]
    for _ in range(3):
        slope = 2.0 * (two[1] - two[0])
        two = [two[0] - 0.1 * (-slope + 0.2 * two[0]), two[1] - 0.1 * (slope + 0.2 * two[1])]
    config = TrainConfig(**PLAIN | dict(learning_rate=0.1, weight_decay=0.2, momentum=0.0))
    optimizer = create_optimizer(config)
    params = {"objectness": {"kernel": jnp.full((1, 1), -0.5)}}
    state = optimizer.init(params)
    for _ in range(3):
        gradients = jax.tree.map(lambda leaf: 2.0 * leaf, params)
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert float(params["objectness"]["kernel"][0, 0]) == pytest.approx(two[1] - two[0], rel=1e-5)


def test_names_select_the_objectness_layer_and_the_biases():
    model = nnx.eval_shape(lambda: Detector(tiny.MODEL, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(split(model)[1])]
    names = ["/".join(str(part.key) for part in path if hasattr(part, "key")) for path in paths]
    chosen = [name for name in names if "objectness" in name.split("/")]
    assert chosen == ["rpn_head/objectness/bias", "rpn_head/objectness/kernel"]
    biases = [name for name in names if "bias" in name.split("/")]
    assert biases == [name for name in names if name.endswith("/bias")] and len(biases) > 20


def test_the_weights_that_decay_are_those_named_kernel():
    model = nnx.eval_shape(lambda: Detector(tiny.MODEL, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))
    leaves = jax.tree_util.tree_leaves_with_path(split(model)[1])
    names = {leaf.ndim > 1: set() for _, leaf in leaves}
    for path, leaf in leaves:
        names[leaf.ndim > 1].add(next(part.key for part in reversed(path) if hasattr(part, "key")))
    assert names == {True: {"kernel"}, False: {"bias", "scale"}}


@pytest.mark.parametrize("clip_norm, size, expected", [(2.0, 1.0, 1.0), (2.0, 100.0, 2.0), (None, 100.0, 100.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, size, expected):
    config = dataclasses.replace(TRAIN, learning_rate=1.0, clip_norm=clip_norm)
    params = {"a": jnp.zeros(4), "b": jnp.zeros((2, 2))}
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, size / np.sqrt(8)), params)
    after = updated(config, params, gradients)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in after.values()))
    np.testing.assert_allclose(norm, expected, rtol=1e-6)


def test_momentum_adds_up_past_gradients():
    config = dataclasses.replace(TRAIN, steps=10**6, learning_rate=1.0, momentum=0.5)
    after = updated(config, {"a": jnp.zeros(1)}, {"a": jnp.ones(1)}, steps=3)
    np.testing.assert_allclose(after["a"], -(1 + 1.5 + 1.75), rtol=1e-6)


@pytest.fixture(scope="module")
def start(random_weights):
    """Returns (graphdef, state at step 0 in NumPy): a step donates the arrays it is given."""
    model = random_weights(lambda: Detector(MODEL, tiny.CLASS_NAMES, rng=np.random.default_rng(0)), seed=3)
    graphdef, state = create_state(model, create_optimizer(TRAIN), seed=0)
    return graphdef, jax.device_get(state)


@pytest.fixture(scope="module")
def steps(start):
    """Returns {number of devices: function (state in NumPy, batch) -> (state, metrics)}."""
    graphdef, _ = start
    step = make_train_step(graphdef, create_optimizer(TRAIN), axis_name=AXIS)

    def mapped(devices):
        run = data_parallel(step, devices=devices)
        return lambda state, batch: run(replicate(jax.tree.map(jnp.array, state), devices=devices), batch)

    return {count: mapped(jax.local_devices()[:count]) for count in (1, DEVICES)}


def uneven_batch():
    """Returns one image per device: two objects; a small image without objects; an empty row; many objects."""
    generator = np.random.default_rng(0)
    image_hw = np.float32([(64, 96), (12, 14), (0, 0), (60, 90)])
    images = np.zeros((B, H, W, 3), np.float32)
    for row, (height, width) in enumerate(image_hw.astype(int)):
        images[row, :height, :width] = generator.normal(size=(height, width, 3))
    boxes, valid = np.zeros((B, G, 4), np.float32), np.zeros((B, G), bool)
    boxes[0, :2] = (2, 3, 30, 33), (20, 8, 46, 38)
    boxes[3] = [(x, y, x + 24, y + 22) for x, y in ((1, 1), (30, 2), (60, 5), (5, 30), (50, 34))]
    valid[0, :2] = valid[3] = True
    labels = np.where(valid, np.int32([1, 2, 1, 2, 1]), 0).astype(np.int32)
    return Batch(
        images=images,
        image_hw=image_hw,
        scale=np.ones((B, 2), np.float32),
        image_index=np.int32([7, 3, 0, 9]),
        image_valid=np.array([True, True, False, True]),
        ground_truth=GroundTruth(boxes, labels, valid),
    )


@pytest.fixture(scope="module")
def first(start, steps):
    """Returns {number of devices: (state, metrics)} after one step on the same global batch, in NumPy."""
    return {count: jax.device_get(step(start[1], uneven_batch())) for count, step in steps.items()}


def losses(metrics):
    return np.array([getattr(metrics, name) for name in LOSSES], np.float64)


def test_one_and_four_devices_have_the_same_first_losses(first):
    assert (losses(first[1][1]) > 0).all()
    np.testing.assert_allclose(losses(first[DEVICES][1]), losses(first[1][1]), atol=1e-5, rtol=1e-5)


def test_the_mean_of_the_devices_means_differs_from_the_global_mean(first, start, steps):
    """Otherwise the neighbouring tests could not detect a wrong mean."""
    means = []
    for row in range(B):
        alone = uneven_batch()._replace(image_valid=uneven_batch().image_valid & (np.arange(B) == row))
        means.append(losses(jax.device_get(steps[1](start[1], alone)[1])))
    assert not np.any(means[2])  # the empty row
    expected = losses(first[1][1])
    for devices in (means, [means[row] for row in (0, 1, 3)]):
        assert (np.abs(np.mean(devices, axis=0) - expected) > 1e-2 * expected).all()


def traces(state):
    """Returns the momentum by parameter path; after the first step it equals the gradient."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if ".trace" in jax.tree_util.keystr(path)}


def test_one_and_four_devices_have_the_same_gradients(first):
    one, four = (traces(first[count][0]) for count in (1, DEVICES))
    assert len(one) == len(jax.tree.leaves(first[1][0].params))
    for name, gradient in one.items():
        size = np.linalg.norm(gradient)
        assert size > 0, name
        assert np.linalg.norm(four[name] - gradient) <= 1e-4 * size, name


def test_one_and_four_devices_have_the_same_gradient_norm(first):
    norm = first[1][1].gradient_norm
    np.testing.assert_allclose(first[DEVICES][1].gradient_norm, norm, rtol=1e-4)
    clipped = np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in traces(first[1][0]).values()))
    np.testing.assert_allclose(clipped, min(norm, TRAIN.clip_norm), rtol=1e-4)


def test_a_step_moves_every_parameter_and_no_constant(first, start):
    before, after = start[1], first[DEVICES][0]
    assert after.step == 1 and before.step == 0
    np.testing.assert_array_equal(after.key, before.key)
    frozen = jax.tree.leaves(before.frozen)
    assert len(frozen) >= 4 * 20
    for old, new in zip(frozen, jax.tree.leaves(after.frozen), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert np.any(old != new)


def test_every_device_holds_the_same_state(start, steps):
    state, _ = steps[DEVICES](start[1], uneven_batch())
    for leaf in jax.tree.leaves(state):
        assert len(leaf.addressable_shards) == DEVICES and leaf.is_fully_replicated
        bits = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(bits) == 1


def test_a_step_donates_the_memory_of_its_state(start):
    graphdef, state = start
    step = make_train_step(graphdef, create_optimizer(TRAIN), axis_name=AXIS)
    devices = jax.local_devices()[:1]
    given = replicate(jax.tree.map(jnp.array, state), devices=devices)
    data_parallel(step, devices=devices)(given, uneven_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.params, given.opt_state)))


def test_the_same_seed_gives_the_same_bits_and_another_step_other_samples(start, steps, first):
    again = jax.device_get(steps[DEVICES](start[1], uneven_batch()))
    jax.tree.map(np.testing.assert_array_equal, again, first[DEVICES])
    later = start[1]._replace(step=np.int32(5))
    assert np.any(losses(steps[DEVICES](later, uneven_batch())[1]) != losses(again[1]))
    other = start[1]._replace(key=jax.device_get(jax.random.key_data(jax.random.key(1))))
    assert np.any(losses(steps[DEVICES](other, uneven_batch())[1]) != losses(again[1]))


def test_the_loss_falls_on_one_repeated_batch(start, steps):
    state, totals = start[1], []
    for _ in range(30):
        state, metrics = steps[DEVICES](state, uneven_batch())
        totals.append(losses(metrics).sum())
    assert np.isfinite(totals).all()
    assert np.mean(totals[-3:]) < 0.6 * np.mean(totals[:3]), totals
    for old, new in zip(jax.tree.leaves(start[1].frozen), jax.tree.leaves(state.frozen), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))


DECAY = 0.5


@pytest.fixture(scope="module")
def in_parts(start):
    """Returns a function (batch) -> (state, metrics) on one device with two micro-batches and averaged weights."""
    graphdef, state = start
    step = make_train_step(graphdef, create_optimizer(TRAIN), axis_name=AXIS, accumulate=2, ema_decay=DECAY)
    devices = jax.local_devices()[:1]
    mapped = data_parallel(step, devices=devices)

    def run(batch, state=state._replace(averaged=state.params)):
        return jax.device_get(mapped(replicate(jax.tree.map(jnp.array, state), devices=devices), batch))

    return run


def test_the_accumulated_gradient_is_the_mean_of_the_micro_batches(in_parts, start, steps):
    parts = []
    for rows in ((0, 1), (2, 3)):
        chosen = uneven_batch().image_valid & np.isin(np.arange(B), rows)
        parts.append(jax.device_get(steps[1](start[1], uneven_batch()._replace(image_valid=chosen))))
    state, metrics = in_parts(uneven_batch())
    np.testing.assert_allclose(losses(metrics), sum(losses(part[1]) for part in parts) / 2, rtol=1e-5)
    for name, gradient in traces(state).items():
        mean = sum(traces(part[0])[name] for part in parts) / 2
        assert np.linalg.norm(gradient - mean) <= 1e-4 * np.linalg.norm(mean), name
    assert metrics.box_foreground == sum(part[1].box_foreground for part in parts)


def test_micro_batches_with_equal_counts_have_the_losses_of_the_whole_batch(in_parts, start, steps):
    twice = jax.tree.map(lambda x: np.concatenate([x[::3], x[::3]]), uneven_batch())
    whole, parts = steps[1](start[1], twice), in_parts(twice)
    np.testing.assert_allclose(losses(parts[1]), losses(jax.device_get(whole[1])), rtol=1e-5)


def test_averaged_weights_forget_fast_at_first_and_then_by_their_decay(in_parts, start):
    before = start[1].params
    for step, decay in ((0, 0.1), (40, DECAY)):
        state, _ = in_parts(uneven_batch(), start[1]._replace(averaged=before, step=np.int32(step)))
        for old, new, average in zip(*map(jax.tree.leaves, (before, state.params, state.averaged)), strict=True):
            np.testing.assert_allclose(average, decay * old + (1 - decay) * new, atol=1e-6)


def test_a_detector_has_the_averaged_weights_if_there_are_any(start):
    graphdef, state = start
    other = jax.tree.map(lambda leaf: leaf + 1, state.params)
    for averaged, expected in ((None, state.params), (other, other)):
        model = merge(graphdef, state._replace(averaged=averaged))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(split(model)[1]), expected)


def test_an_average_is_kept_only_on_request(start):
    model = nnx.merge(start[0], start[1].params, start[1].frozen)
    assert create_state(model, create_optimizer(TRAIN), seed=0)[1].averaged is None
    state = create_state(model, create_optimizer(TRAIN), seed=0, averages=True)[1]
    jax.tree.map(np.testing.assert_array_equal, state.averaged, state.params)
    # A step donates both, so they must not share memory.
    assert all(a is not b for a, b in zip(*map(jax.tree.leaves, (state.averaged, state.params)), strict=True))


def test_stages_further_from_the_heads_learn_slower():
    model = nnx.eval_shape(lambda: Detector(tiny.MODEL, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), split(model)[1])
    gradients = jax.tree.map(jnp.ones_like, params)
    fields = PLAIN | dict(weight_decay=0.0, double_bias=False, double_objectness=False)
    after = updated(TrainConfig(**fields, layer_decay=0.5), params, gradients)
    rates = {"rpn_head": 0.5, "box_head": 0.5, 2: 0.25, 1: 0.125, 0: 0.0625, "stem": 0.0625, "stem_norm": 0.0625}
    met = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        part = path[0].key
        if part == "backbone":
            part = path[2].key if path[1].key == "stages" else path[1].key
        met.add(part)
        np.testing.assert_allclose(1 - leaf, rates[part], atol=1e-6)
    assert met == set(rates)


def test_learning_rates_are_those_that_the_optimizer_uses():
    config = TrainConfig(steps=20, batch_size=1, learning_rate=0.4, warmup_steps=4, decay_steps=(8, 15))
    schedule = learning_rate_schedule(config)
    assert learning_rates(config) == pytest.approx([float(schedule(step)) for step in range(20)], rel=1e-6)


def test_foreground_is_counted_over_all_devices_and_filling_rows_have_none(first, start, steps):
    one, four = (first[count][1] for count in (1, DEVICES))
    # Every ground-truth box is a proposal too, so the first image has at least 2 and the last at least 4 (the limit).
    assert 6 <= one.box_foreground <= 8 and 6 <= one.rpn_foreground <= 24
    assert (four.box_foreground, four.rpn_foreground) == (one.box_foreground, one.rpn_foreground)
    truth = uneven_batch().ground_truth
    empty = uneven_batch()._replace(ground_truth=truth._replace(valid=np.zeros_like(truth.valid)))
    metrics = jax.device_get(steps[1](start[1], empty)[1])
    assert metrics.box_foreground == metrics.rpn_foreground == 0


def test_a_batch_that_devices_cannot_share_is_refused():
    check_batch_size(2 * jax.local_device_count())
    with pytest.raises(InputError, match=r"train\.batch_size is 6, not a multiple of the \d+ devices"):
        check_batch_size(6)
    with pytest.raises(InputError, match=r"^train\.alternating\.rpn_batch_size is 1, not"):
        check_batch_size(1, field="train.alternating.rpn_batch_size")


def test_states_of_one_seed_are_the_same_and_of_another_differ(random_weights):
    model = random_weights(lambda: Detector(tiny.MODEL, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))
    keys = [create_state(model, create_optimizer(TRAIN), seed=seed)[1].key for seed in (0, 0, 1)]
    np.testing.assert_array_equal(keys[0], keys[1])
    assert np.any(keys[0] != keys[2])


def test_the_norm_of_many_arrays_is_the_root_of_the_sum_of_all_squares():
    arrays = {"a": jnp.arange(24.0).reshape(2, 3, 4), "b": [jnp.float32(7), jnp.zeros(0)], "c": -jnp.ones(3)}
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(arrays)])
    assert float(_norm(arrays)) == pytest.approx(np.linalg.norm(flat), rel=1e-6)
