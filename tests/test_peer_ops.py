"""torchvision's tests of its operators, by concept, with its numbers: `fasterrcnn_jax.ops` behind torchvision's calls.

Its tests ask what an operator does with identical boxes, empty inputs, large coordinates and so on. The cases and the
numbers are our own: tests/write_op_cases.py drew the inputs and ran torchvision 0.28.0 on a CPU.
"""

import functools
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fidelity import compare

from fasterrcnn_jax import ops

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "ops.npz"))
ROIS = GOLDEN["roi_rois"]


jitted_nms = jax.jit(ops.nms, static_argnames="iou_threshold")
jitted_batched_nms = jax.jit(ops.batched_nms, static_argnames="iou_threshold")


class Torchvision:
    """torchvision's signatures in front of our operations."""

    @staticmethod
    def nms(boxes, scores, iou_threshold):
        kept = jitted_nms(boxes, scores, iou_threshold=iou_threshold)
        return np.asarray(kept.indices)[np.asarray(kept.valid)]

    @staticmethod
    def batched_nms(boxes, scores, idxs, iou_threshold):
        kept = jitted_batched_nms(boxes, scores, idxs, iou_threshold=iou_threshold)
        return np.asarray(kept.indices)[np.asarray(kept.valid)]

    @staticmethod
    def roi_align(maps, rois, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
        options = dict(output_size=output_size, sampling_ratio=max(sampling_ratio, 0), aligned=aligned)
        return _of_its_image(functools.partial(ops.roi_align, strides=1 / spatial_scale, **options), maps, rois)

    @staticmethod
    def roi_pool(maps, rois, output_size, spatial_scale=1.0):
        operator = functools.partial(ops.roi_pool, stride=1 / spatial_scale, output_size=output_size)
        return _of_its_image(operator, maps, rois)


def _of_its_image(operator, maps, rois):
    """Returns the features of each RoI (image, x1, y1, x2, y2), from the map of its image."""
    pooled = jax.vmap(operator, in_axes=(0, None))(maps, rois[:, 1:])
    return pooled[rois[:, 0].astype(int), np.arange(len(rois))]


def of_concept(name):
    return functools.partial(compare, f"op tests: {name}", "torchvision")


@pytest.mark.parametrize(
    "case, thresholds",
    [
        ("random", (20, 50, 80)),
        ("identical", (50,)),
        ("equal_scores", (50,)),
        ("large", (50,)),
        ("no_area", (50,)),
        ("none", (50,)),
        ("close_20", (20,)),
        ("close_50", (50,)),
        ("close_80", (80,)),
    ],
)
def test_nms(case, thresholds):
    boxes, scores = GOLDEN[f"nms_{case}_boxes"], GOLDEN[f"nms_{case}_scores"]
    for threshold in thresholds:
        kept = Torchvision.nms(boxes, scores, threshold / 100)
        of_concept("nms")(f"{case}, threshold {threshold / 100}", kept, GOLDEN[f"nms_{case}_keep_{threshold}"])
        assert (np.diff(scores[kept]) <= 0).all()


def test_nms_of_16_bits():
    """torchvision's test runs it in float16 on a GPU. Here scores may be float16 and boxes may not."""
    boxes, scores = GOLDEN["nms_random_boxes"], GOLDEN["nms_random_scores"]
    kept = Torchvision.nms(boxes, scores.astype(np.float16), 0.5)
    of_concept("nms")("float16 scores, threshold 0.5", kept, GOLDEN["nms_random_keep_50"])
    with pytest.raises(TypeError, match="boxes must be float32, got float16, which rounds .* astype"):
        Torchvision.nms(boxes.astype(np.float16), scores, 0.5)


@pytest.mark.parametrize("case", ["random", "negative", "none", "far"])
def test_batched_nms(case):
    boxes, scores, groups = (GOLDEN[f"batched_{case}_{name}"] for name in ("boxes", "scores", "groups"))
    kept = Torchvision.batched_nms(boxes, scores, groups, 0.9 if case == "random" else 0.5)
    per_group, by_offset = (GOLDEN[f"batched_{case}_keep{ending}"] for ending in ("_per_group", "_by_offset"))
    # The two implementations of torchvision agree unless the offset of a class rounds the corners.
    assert np.array_equal(per_group, by_offset) == (case != "far")
    of_concept("batched_nms")(f"{case}, one run per group", kept, per_group)


# (output, scale, aligned, sampling ratio); -1 is adaptive.
ALIGNED = [
    ((5, 5), 1.0, False, -1),
    ((5, 5), 0.3, True, -1),
    ((5, 5), 0.5, True, 3),
    ((3, 6), 0.3, False, -1),
    ((3, 6), 0.5, True, -1),
    ((3, 6), 1.0, True, 1),
    ((3, 6), 0.3, False, 3),
    ((4, 1), 0.5, False, -1),
    ((4, 1), 0.3, True, 1),
]


def pooled_and_gradient(operator, output, scale):
    """Returns the features of `ROIS`, which lie in the same cells whatever the scale, and the gradient of the maps."""

    @jax.jit
    def run(maps, rois, cotangent):
        pooled, pull = jax.vjp(lambda maps: operator(maps, rois, output, scale), maps)
        return pooled, pull(cotangent)[0]

    rois = ROIS * np.float32([1, *[1 / scale] * 4])
    with tiny.quick_compilation():
        return run(GOLDEN["roi_features"], rois, GOLDEN[f"roi_cotangent_{output[0]}_{output[1]}"])


@pytest.mark.parametrize("output, scale, aligned, ratio", ALIGNED)
def test_roi_align(output, scale, aligned, ratio):
    operator = functools.partial(Torchvision.roi_align, sampling_ratio=ratio, aligned=aligned)
    name = f"align_{output[0]}_{output[1]}_scale{round(scale * 10)}_aligned{int(aligned)}_ratio{ratio}"
    pooled, gradient = pooled_and_gradient(operator, output, scale)
    title = f"output {output}, scale {scale}, aligned {aligned}, ratio {ratio}"
    of_concept("roi_align")(title, pooled, GOLDEN[name], atol=1e-5)
    of_concept("roi_align")(f"{title}: gradient", gradient, GOLDEN[f"{name}_gradient"], atol=2e-5)


@pytest.mark.parametrize("output, scale", [((5, 5), 1.0), ((3, 6), 0.5), ((4, 1), 0.5)])
def test_roi_pool(output, scale):
    name, title = f"pool_{output[0]}_{output[1]}_scale{round(scale * 10)}", f"output {output}, scale {scale}"
    pooled, gradient = pooled_and_gradient(Torchvision.roi_pool, output, scale)
    of_concept("roi_pool")(title, pooled, GOLDEN[name])
    of_concept("roi_pool")(f"{title}: gradient", gradient, GOLDEN[f"{name}_gradient"], atol=2e-5)


def test_region_features_of_16_bits():
    maps = GOLDEN["roi_features"].astype(np.float16)
    with tiny.quick_compilation():
        align = functools.partial(Torchvision.roi_align, output_size=5, sampling_ratio=2, aligned=True)
        for name, run in (("align", align), ("pool", functools.partial(Torchvision.roi_pool, output_size=5))):
            pooled = jax.jit(run)(maps, ROIS)
            assert pooled.dtype == jnp.float16
            # torchvision's numbers are those of float32 from the same rounded values.
            of_concept(f"roi_{name}")("float16 maps", pooled, GOLDEN[f"{name}_half"], rtol=1e-3, atol=1e-4)


def test_region_features_of_no_regions():
    for operator in (Torchvision.roi_align, Torchvision.roi_pool):
        pooled = operator(GOLDEN["roi_features"], np.zeros((0, 5), np.float32), (3, 2))
        assert pooled.shape == (0, 3, 2, 3)


def test_regions_of_another_shape_are_an_error():
    """torchvision's `test_boxes_shape`. The package's annotations, which the tests enforce, say it first."""
    for operator in (ops.roi_align, ops.roi_pool):
        with pytest.raises(ValueError, match=r"boxes must have the shape \[n, 4\] \(x1, y1, x2, y2\), got \[4, 5\]"):
            inspect.unwrap(operator)(jnp.zeros((4, 4, 1)), np.zeros((4, 5), np.float32), output_size=2)
    with pytest.raises(ValueError, match="boxes must have the shape"):
        inspect.unwrap(ops.nms)(np.zeros((3, 5), np.float32), np.zeros(3, np.float32), iou_threshold=0.5)
    with pytest.raises(ValueError, match=r"scores must have one value for each of the 3 boxes, got shape \[2\]"):
        inspect.unwrap(ops.nms)(np.zeros((3, 4), np.float32), np.zeros(2, np.float32), iou_threshold=0.5)


@pytest.mark.parametrize("ratio", [2, -1])
def test_roi_align_of_a_pyramid(ratio):
    """torchvision's `MultiScaleRoIAlign` finds the level of each box, and so does a call without `levels`."""
    maps = tuple(GOLDEN[f"pyramid_map_{level}"] for level in (2, 3, 4, 5))
    run = functools.partial(ops.roi_align, strides=(4, 8, 16, 32), output_size=(3, 2), aligned=False)
    with tiny.quick_compilation():
        pooled = jax.jit(functools.partial(run, sampling_ratio=max(ratio, 0)))(maps, GOLDEN["pyramid_boxes"])
    of_concept("roi_align")(
        f"pyramid, output (3, 2), ratio {ratio}", pooled, GOLDEN[f"pyramid_pooled_ratio{ratio}"], atol=1e-5
    )


@pytest.mark.parametrize("case", ["random", "integers", "identical", "large", "far", "apart", "none"])
def test_box_iou(case):
    iou = ops.pairwise_iou(GOLDEN[f"iou_{case}_boxes"], GOLDEN[f"iou_{case}_others"])
    of_concept("box_iou")(case, iou, GOLDEN[f"iou_{case}"], rtol=1e-6)


def test_box_iou_of_16_bits():
    """torchvision computes in float32 what it gets in float16, and so do we after a conversion that says so."""
    boxes, others = GOLDEN["iou_float16_boxes"], GOLDEN["iou_float16_others"]
    with pytest.raises(TypeError, match="boxes must be float32, got float16"):
        ops.pairwise_iou(boxes, others)
    iou = ops.pairwise_iou(boxes.astype(np.float32), others.astype(np.float32))
    of_concept("box_iou")("float16, converted first", iou, GOLDEN["iou_float16"], rtol=1e-6)


def test_box_area():
    for kind in (np.int16, np.int32, np.int64, np.float32, np.float64):
        boxes = np.array([[0, 0, 100, 100], [0, 0, 0, 0], [3, 4, 90, 70]], kind)
        of_concept("box_area")(np.dtype(kind).name, ops.area(boxes), GOLDEN[f"area_{np.dtype(kind).name}"])


def test_clip_boxes_to_image():
    boxes, size = GOLDEN["clip_boxes"], (90, 120)
    of_concept("clip_boxes_to_image")("boxes over every border", ops.clip(boxes, size), GOLDEN["clip"])
    of_concept("clip_boxes_to_image")("no boxes", ops.clip(np.zeros((0, 4)), size), GOLDEN["clip_none"])
    each = ops.clip(boxes.reshape(6, 10, 4), size)
    of_concept("clip_boxes_to_image")("several lists", each, GOLDEN["clip_each"])


def test_gradients_of_boxes():
    boxes, others = GOLDEN["gradient_boxes"], GOLDEN["gradient_others"]
    found = jax.grad(lambda *b: jnp.square(ops.pairwise_iou(*b)).sum(), argnums=(0, 1))(boxes, others)
    for name, gradient in zip(("boxes", "others"), found, strict=True):
        of_concept("box_iou")(f"gradient of {name}", gradient, GOLDEN[f"gradient_of_{name}"], atol=1e-6)
    gradient = jax.grad(lambda b: jnp.square(ops.clip(b, (90, 120))).sum())(GOLDEN["clip_boxes"])
    of_concept("clip_boxes_to_image")("gradient", gradient, GOLDEN["gradient_of_clip"])
