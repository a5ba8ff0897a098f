"""`fasterrcnn_jax.ops` as a newcomer calls it: NumPy arrays, nothing optional, transformations."""

import doctest
import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import fasterrcnn_jax
from fasterrcnn_jax import ops
from fasterrcnn_jax.config import LossConfig, RoiSamplingConfig, RpnConfig

ROOT = Path(__file__).parents[1]
# Whole numbers, so that every type holds them.
BOXES = np.array([[0, 0, 40, 40], [2, 0, 42, 40], [30, 10, 60, 50], [10, 30, 50, 64]])
OTHERS = np.array([[0, 0, 40, 40], [10, 30, 50, 60], [50, 50, 60, 60], [1, 2, 33, 44]])
SCORES = np.array([1, 4, 3, 2])
LABELS = np.array([1, 2, 1, 2])
MAP = np.arange(8 * 8 * 2).reshape(8, 8, 2) % 7
VALID = np.ones(4, bool)
KEY = jax.random.key(0)
RPN = RpnConfig(allowed_border=None, anchors_per_image=4)
ROI = RoiSamplingConfig(rois_per_image=4, fg_fraction=0.5)


def anchor_targets_of(boxes, others):
    return ops.anchor_targets(KEY, boxes, None, (64, 64), ops.GroundTruth(others, LABELS, VALID), config=RPN)


def roi_targets_of(boxes, others):
    truth = ops.GroundTruth(others, LABELS, VALID)
    return ops.roi_targets(KEY, ops.Proposals(boxes, np.zeros(4, np.float32), VALID), truth, config=ROI)


def rpn_losses_of(logits, deltas):
    targets = ops.AnchorTargets(jnp.asarray([1, 0, -1, 0]), jnp.zeros((4, 4)), jnp.asarray([1, 0, 0, 0], bool))
    return ops.rpn_losses(logits, deltas, targets)


def box_losses_of(logits, deltas):
    targets = ops.RoiTargets(jnp.zeros((4, 4)), jnp.asarray([1, 0, 2, 0]), jnp.zeros((4, 4)), jnp.ones(4, bool))
    return ops.box_losses(logits, deltas, targets)


# By operation: a call, and its arrays; `boxes` are those that may not have 16 bits.
CALLS = {
    "nms": (lambda b, s: ops.nms(b, s, iou_threshold=0.5), [BOXES, SCORES], {0}),
    "batched_nms": (lambda b, s: ops.batched_nms(b, s, LABELS, iou_threshold=0.5), [BOXES, SCORES], {0}),
    "soft_nms": (lambda b, s: ops.soft_nms(b, s), [BOXES, SCORES], {0}),
    "roi_align": (lambda m, b: ops.roi_align(m, b, strides=8, output_size=2), [MAP, BOXES], {1}),
    "roi_pool": (lambda m, b: ops.roi_pool(m, b, stride=8, output_size=2), [MAP, BOXES], {1}),
    "assign_levels": (lambda b: ops.assign_levels(b, lowest=2, highest=5), [BOXES], {0}),
    "area": (ops.area, [BOXES], {0}),
    "pairwise_iou": (ops.pairwise_iou, [BOXES, OTHERS], {0, 1}),
    "clip": (lambda b: ops.clip(b, (30, 50)), [BOXES], {0}),
    "encode": (ops.encode, [BOXES, OTHERS], {0, 1}),
    "decode": (ops.decode, [np.array([[0, 1, 0, 1]] * 4), OTHERS], {1}),
    "match": (lambda iou: ops.match(iou, fg_iou=0.5), [np.array([[0, 1], [1, 0], [0, 0]])], set()),
    "match_boxes": (lambda b, o: ops.match_boxes(b, o, fg_iou=0.5), [BOXES, OTHERS], {0, 1}),
    "smooth_l1": (ops.smooth_l1, [np.array([0, 1, -3])], set()),
    "rpn_losses": (rpn_losses_of, [SCORES, BOXES], set()),
    "box_losses": (box_losses_of, [np.array([[1, 2, 3]] * 4), BOXES[:, None]], set()),
    "anchor_targets": (anchor_targets_of, [BOXES, OTHERS], {0, 1}),
    "roi_targets": (roi_targets_of, [BOXES, OTHERS], {0, 1}),
}
# They take no array of numbers that could have another type.
CONSTANTS = {"cell_anchors", "grid_anchors", "sample"}


@functools.cache
def jitted(name):
    return jax.jit(CALLS[name][0])


def assert_equal(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def as_type(arrays, dtype):
    return [array.astype(dtype) for array in arrays]


def test_every_operation_is_called_here():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert functions == set(CALLS) | CONSTANTS


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick_compilation():
        yield


@pytest.mark.parametrize("name", CALLS)
def test_numpy_arrays_of_any_type_and_transformations_give_one_result(name):
    call, arrays, boxes = CALLS[name]
    expected = jitted(name)(*as_type(arrays, np.float32))
    # float64 outside of `jax.jit`, which would convert it before.
    for found in (call(*as_type(arrays, np.float64)), jitted(name)(*as_type(arrays, np.int64))):
        assert_equal(found, expected, rtol=1e-5, atol=1e-6)
        assert all(a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True))
    # Two images at once; the other one has its boxes in another order.
    swapped = [array[::-1] if len(array) == 4 else array for array in arrays]
    batch = [np.stack(pair).astype(np.float32) for pair in zip(arrays, swapped, strict=True)]
    both = jax.jit(jax.vmap(call))(*batch)
    assert_equal(jax.tree.map(lambda leaf: leaf[0], both), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_16_bits_are_taken_except_for_boxes(name):
    call, arrays, boxes = CALLS[name]
    others = set(range(len(arrays))) - boxes
    if others:
        taken = [a.astype(np.float16 if i in others else np.float32) for i, a in enumerate(arrays)]
        assert_equal(jitted(name)(*taken), jitted(name)(*as_type(arrays, np.float32)), rtol=2e-3)
    for position in boxes:
        for dtype in (np.float16, jnp.bfloat16):
            given = as_type(arrays, np.float32)
            given[position] = given[position].astype(dtype)
            refused = rf" must be float32, got {jnp.dtype(dtype).name}, which rounds"
            with pytest.raises(TypeError, match=refused) as error:
                jax.eval_shape(call, *given)
            assert "\n" not in str(error.value)


# By operation: the arguments that it has a gradient for.
DIFFERENTIABLE = {
    "area": (0,),
    "pairwise_iou": (0, 1),
    "clip": (0,),
    "encode": (0, 1),
    "decode": (0, 1),
    "smooth_l1": (0,),
    "rpn_losses": (0, 1),
    "box_losses": (0, 1),
    "roi_align": (0,),
    "roi_pool": (0,),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_finite_differences(name):
    call, arrays, _ = CALLS[name]
    rng = np.random.default_rng(3)
    # Small, so that differences are exact enough in float32, and no two corners meet.
    arrays = [np.float32(array / 8 + 0.3 * i + rng.uniform(0, 0.1, array.shape)) for i, array in enumerate(arrays)]
    weights = rng.uniform(0.5, 1.5, 10_000).astype(np.float32)

    @jax.jit
    def total(*arrays):
        leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(call(*arrays))]
        return sum((leaf * weights[: len(leaf)]).sum() for leaf in leaves)

    gradients = jax.jit(jax.grad(total, argnums=DIFFERENTIABLE[name]))(*arrays)
    for argument, gradient in zip(DIFFERENTIABLE[name], gradients, strict=True):
        direction = rng.standard_normal(arrays[argument].shape).astype(np.float32)
        ends = []
        for step in (-5e-3, 5e-3):
            moved = list(arrays)
            moved[argument] = arrays[argument] + np.float32(step) * direction
            ends.append(float(total(*moved)))
        slope = (ends[1] - ends[0]) / 1e-2
        np.testing.assert_allclose(float((gradient * direction).sum()), slope, rtol=2e-2, atol=2e-2)
        assert np.abs(gradient).max() > 0


def test_what_selects_has_no_gradient():
    for name in ("nms", "batched_nms", "soft_nms"):
        call, arrays, _ = CALLS[name]
        summed = jax.grad(lambda *a, call=call: sum(x.astype(jnp.float32).sum() for x in call(*a)), argnums=(0, 1))
        gradients = jax.jit(summed)(*as_type(arrays, np.float32))
        assert not any(np.any(gradient) for gradient in gradients)
    boxes = jax.jit(jax.grad(lambda b: CALLS["roi_align"][0](MAP, b).sum()))(np.float32(BOXES))
    assert not np.any(boxes)


def test_examples_of_the_docstrings():
    names = vars(ops) | {"np": np, "jax": jax}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for name in ops.__all__:
        function = getattr(ops, name)
        if inspect.isfunction(function) and name not in ("anchor_targets", "roi_targets"):
            test = parser.get_doctest(inspect.getdoc(function), dict(names), name, None, None)
            assert test.examples, f"{name} has no example"
            assert runner.run(test).failed == 0, name


def test_a_call_without_options_has_the_documented_defaults():
    indices, valid = ops.nms(BOXES, SCORES, iou_threshold=0.5)
    assert len(indices) == len(BOXES) and valid.tolist() == [True, True, True, False]
    padded = ops.nms(BOXES, SCORES, np.array([True, False, True, True]), iou_threshold=0.5)
    assert padded.indices[padded.valid].tolist() == [2, 3, 0]
    nothing = ops.nms(np.zeros((0, 4)), np.zeros(0), iou_threshold=0.5)
    assert nothing.indices.shape == nothing.valid.shape == (0,)
    assert ops.soft_nms(np.zeros((0, 4)), np.zeros(0)).scores.shape == (0,)
    # An image without objects: everything is background.
    assert ops.match(np.zeros((3, 0), np.float32), fg_iou=0.5).labels.tolist() == [0, 0, 0]
    none = ops.GroundTruth(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool))
    found = ops.anchor_targets(KEY, BOXES, None, (64, 64), none, config=RPN)
    assert found.labels.tolist() == [0, 0, 0, 0] and not np.any(found.deltas)
    of_rois = ops.roi_targets(KEY, ops.Proposals(BOXES, SCORES, VALID), none, config=ROI)
    assert of_rois.labels.tolist() == [0, 0, 0, 0] and of_rois.valid.tolist() == [True] * 4
    grid = ops.grid_anchors(ops.cell_anchors(), (2, 3), 16)
    np.testing.assert_array_equal(grid, ops.grid_anchors(ops.cell_anchors(), (2, 3), (16, 16)))
    assert grid.shape == (2 * 3 * 9, 4)
    one = ops.roi_align(MAP, BOXES, strides=8, output_size=2)
    np.testing.assert_array_equal(one, ops.roi_align(MAP, BOXES, strides=8, output_size=2, aligned=True))
    assert np.any(one != ops.roi_align(MAP, BOXES, strides=8, output_size=2, aligned=False))
    np.testing.assert_array_equal(one, ops.roi_align((MAP,), BOXES, strides=(8,), output_size=(2, 2)))


def test_the_level_of_a_box_follows_from_its_size_or_is_given():
    maps = tuple(np.full((size, size, 1), level, np.float32) for level, size in enumerate((32, 16, 8)))
    boxes = np.float32([[0, 0, 20, 20], [0, 0, 113, 113], [0, 0, 256, 256]])
    options = dict(output_size=2, strides=(8, 16, 32))
    for levels, expected in ((None, [0, 0, 1]), (np.array([2, 1, 0]), [2, 1, 0])):
        pooled = ops.roi_align(maps, boxes, levels, **options)[:, 0, 0, 0]
        np.testing.assert_allclose(pooled, expected, rtol=1e-6)
    with pytest.raises(
        ValueError, match="powers of two from 1 up, each twice the one before; got .8, 16, 48.: give levels"
    ):
        ops.roi_align(maps, boxes, output_size=2, strides=(8, 16, 48))


def test_losses_ask_for_the_number_of_cells_only_where_it_divides():
    targets = ops.AnchorTargets(jnp.asarray([1, 0]), jnp.zeros((2, 4)), jnp.asarray([True, False]))
    arrays = np.zeros(2, np.float32), np.ones((2, 4), np.float32)
    config = LossConfig(rpn_box_normalizer="locations")
    with pytest.raises(ValueError, match="rpn_losses needs num_locations, because .* is 'locations'"):
        ops.rpn_losses(*arrays, targets, config=config)
    assert ops.rpn_losses(*arrays, targets, 10, config=config).box.count == 10


def test_the_functions_are_those_that_the_detector_calls():
    from fasterrcnn_jax.models import roi_heads, rpn
    from fasterrcnn_jax.ops import postprocessing, proposals, roi_operators, targets

    for module in (roi_heads, rpn, postprocessing, proposals, roi_operators, targets):
        for name, value in vars(module).items():
            if name in ops.__all__:
                assert value is getattr(ops, name)
    assert postprocessing.batched_nms is fasterrcnn_jax.batched_nms is ops.batched_nms
    assert proposals.nms is fasterrcnn_jax.nms is ops.nms
    assert roi_operators.roi_align is fasterrcnn_jax.roi_align is ops.roi_align


# A process of its own: without the annotations that the tests enforce, with JAX's usual promotion of types, and with
# 64 bits at the end.
NEWCOMER = """
import json
import numpy as np
from fasterrcnn_jax import nms, ops
from fasterrcnn_jax.ops import matching
import fasterrcnn_jax, jax

boxes, scores = np.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]]), np.array([0.7, 0.9, 0.8])
said = {}
def says(name, call):
    try:
        call()
        said[name] = None
    except (TypeError, ValueError) as error:
        said[name] = f"{type(error).__name__}: {error}"
says("shape", lambda: nms(boxes[:, :3], scores, iou_threshold=0.5))
says("batch", lambda: nms(boxes[None], scores[None], iou_threshold=0.5))
says("scores", lambda: nms(boxes, scores[:2], iou_threshold=0.5))
says("valid", lambda: nms(boxes, scores, np.ones(3), iou_threshold=0.5))
says("groups", lambda: ops.batched_nms(boxes, scores, scores, iou_threshold=0.5))
says("bool", lambda: ops.area(boxes > 0))
says("map", lambda: ops.roi_align(np.zeros((1, 2, 8, 8)), boxes, output_size=2))
says("complex", lambda: ops.roi_pool(np.zeros((8, 8, 2), complex), boxes, output_size=2))
says("labels", lambda: ops.sample(jax.random.key(0), np.zeros(3), size=2, fg_fraction=0.5))
says("output", lambda: ops.roi_align(np.zeros((8, 8, 2)), boxes, output_size=(2, 0)))
says("stride", lambda: ops.roi_align(np.zeros((8, 8, 2)), boxes, strides=0, output_size=2))
says("side", lambda: ops.roi_pool(np.zeros((8, 8, 2)), boxes, output_size=7.0))
says("wide", lambda: ops.batched_nms(boxes, scores, np.array([0, 2**32, 5]), iou_threshold=0.5))
targets = ops.RoiTargets(boxes, np.array([2, 0, 1]), boxes, np.ones(3, bool))
says("sets", lambda: ops.box_losses(np.zeros((3, 3)), np.ones((3, 2, 4)), targets))
says("lists", lambda: ops.pairwise_iou(boxes.tolist(), boxes.tolist()))
nothing = [
    nms([], [], iou_threshold=0.5).indices.shape,
    nms([], [], [], iou_threshold=0.5, max_output=2).valid.tolist(),
    ops.batched_nms([], [], [], iou_threshold=0.5).indices.shape,
    ops.soft_nms([], []).scores.shape,
    ops.pairwise_iou([], boxes).shape,
    ops.roi_align(np.zeros((8, 8, 2)), [], output_size=3).shape,
    ops.match(np.zeros((0, 3)), fg_iou=0.5).labels.shape,
    ops.match_boxes([], boxes, fg_iou=0.5, low_quality=True).labels.shape,
    ops.match_boxes(boxes, [], fg_iou=0.5).labels.tolist(),
]
kept = [fasterrcnn_jax.ops.nms(boxes, scores, iou_threshold=0.5).indices.tolist()]
jax.config.update("jax_enable_x64", True)
x64 = jax.numpy.asarray(boxes)
assert x64.dtype == "float64"
kept.append(nms(x64, jax.numpy.asarray(scores), iou_threshold=0.5).indices.tolist())
truth = ops.GroundTruth(x64, np.ones(3, int), np.ones(3, bool))
for pairs in (matching.PAIRS_AT_ONCE, 3):
    matching.PAIRS_AT_ONCE = pairs
    kept.append(ops.match_boxes(x64, x64, fg_iou=0.5).labels.tolist())
    ops.anchor_targets(jax.random.key(0), x64, None, (64, 64), truth)
    ops.roi_targets(jax.random.key(0), ops.Proposals(x64, scores, np.ones(3, bool)), truth, rois_per_image=4)
types = [ops.pairwise_iou(x64, x64).dtype.name, ops.roi_align(np.zeros((8, 8, 2)), x64, output_size=2).dtype.name]
print(json.dumps([said, nothing, kept, types]))
"""


def test_a_wrong_argument_is_one_clear_line():
    done = subprocess.run([sys.executable, "-c", NEWCOMER], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, nothing, kept, types = json.loads(done.stdout.splitlines()[-1])
    assert said == {
        "shape": "ValueError: boxes must have the shape [n, 4] (x1, y1, x2, y2), got [3, 3]",
        "batch": "ValueError: boxes must have the shape [n, 4] (x1, y1, x2, y2), got [1, 3, 4]; "
        "map a batch with jax.vmap",
        "scores": "ValueError: scores must have one value for each of the 3 boxes, got shape [2]",
        "valid": "TypeError: valid must be boolean, got float32",
        "groups": "TypeError: groups must be integers, got float32",
        "bool": "TypeError: boxes must be float32, got bool",
        "map": "ValueError: a map must have the shape [height, width, channels], got [1, 2, 8, 8]; "
        "map a batch with jax.vmap",
        "complex": "TypeError: a map must be float32, got complex64",
        "labels": "TypeError: labels must be integers, got float32",
        "output": "ValueError: output_size must be at least 1, got (2, 0)",
        "stride": "ValueError: a stride must be positive, got 0",
        "side": "ValueError: output_size must be a whole number or (rows, columns), got 7.0",
        "wide": "ValueError: groups must fit into 32 bits, got values from 0 to 4294967296",
        "sets": "ValueError: deltas must have the shape [3, 3, 4], one set for each class and background first, or "
        "[3, 1, 4], got [3, 2, 4]",
        "lists": None,
    }
    # Of empty lists, which have no second axis and no type of their own.
    assert nothing == [[0], [False, False], [0], [0], [0, 3], [0, 3, 3, 2], [0], [0], [0, 0, 0]]
    assert kept == [[1, 2, 0]] * 2 + [[1, 1, 1]] * 2
    assert types == ["float32", "float64"]
