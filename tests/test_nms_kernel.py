"""The kernels of NMS: properties that plain JAX does not have; `test_nms.py` tests the common contract."""

import functools

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import oracles
import pytest
from fasterrcnn_jax.kernels import nms as kernel
from jax.sharding import PartitionSpec

from fasterrcnn_jax.ops.suppression import nms

f32 = np.float32
THRESHOLDS = (1e-3, 0.05, 0.3, 0.5, 0.7, 1.0)
OPTIONS = dict(iou_threshold=0.5, max_output=6)


def rounded_down(threshold):
    nearest = f32(threshold)
    return nearest if float(nearest) <= threshold else np.nextafter(nearest, f32(0))


def inputs(*mapped, n=30):
    """Returns shapes of boxes, scores and validity of n boxes, with leading axes to map over."""
    return (
        jax.ShapeDtypeStruct((*mapped, n, 4), jnp.float32),
        jax.ShapeDtypeStruct((*mapped, n), jnp.float32),
        jax.ShapeDtypeStruct((*mapped, n), bool),
    )


def launches(program):
    """The lines of a lowered program that start a kernel."""
    return [line for line in program.splitlines() if "mosaic_gpu_v2" in line]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_comparison_without_division_equals_the_rounded_division(threshold):
    """Quotients of whole numbers near the threshold: exact ones, and every numerator around a rounding border."""
    threshold = rounded_down(threshold)
    generator = np.random.default_rng(0)
    denominator = np.concatenate(
        [
            generator.integers(2**23, 2**24, 40_000),  # full mantissas
            generator.integers(1, 4000, 20_000) ** 2,  # areas of whole boxes
            np.arange(1, 4001),
        ]
    ).astype(f32)
    exact = denominator.astype(np.float64) * threshold
    around = exact.astype(f32)
    pairs = [(around, denominator)]
    for direction in (f32(0), f32(np.inf)):
        neighbour = around
        for _ in range(4):
            neighbour = np.nextafter(neighbour, direction)
            pairs.append((neighbour, denominator))
    pairs += [(np.round(exact).astype(f32), denominator), (denominator, denominator)]
    numerator, denominator = map(np.concatenate, zip(*pairs))
    scale = f32(2.0) ** generator.integers(-60, 60, len(numerator)).astype(f32)
    numerator, denominator = numerator * scale, denominator * scale
    expected = numerator / denominator > threshold
    found = jax.jit(functools.partial(kernel.ratio_margin, threshold=threshold))(numerator, denominator)
    # The kernel reads the sign bit.
    np.testing.assert_array_equal(np.signbit(found), expected)
    # The test can fail: the product, rounded once, decides differently for some pairs.
    if threshold not in (0.5, 1.0):
        assert (expected != (numerator > threshold * denominator)).any()


def test_the_sign_of_an_empty_overlap_is_positive():
    """Not -0.0 either: with an empty union, and with a product of sides that is -0.0."""
    for threshold in THRESHOLDS:
        pairs = f32([(0, 0), (-0.0, 0), (0, 5), (-0.0, 5), (0, 1e38)])
        assert not np.signbit(kernel.ratio_margin(*jnp.asarray(pairs).T, rounded_down(threshold))).any()


def test_boxes_without_a_positive_finite_area_become_zeros():
    nan, inf = np.nan, np.inf
    nothing = [
        *((nan, 0, 9, 9), (0, nan, 9, 9), (0, 0, inf, 9), (-inf, 0, 9, 9), (-inf, 2, inf, 2), (inf, 0, inf, 9)),
        *((9, 0, 0, 9), (0, 9, 9, 0), (3, 3, 3, 9), (3, 3, 3, 3), (0, 0, 2e19, 2e19)),
    ]
    assert not kernel.with_area(jnp.asarray(f32(nothing))).any()
    others = f32([(1, 2, 4, 6), (4, 6, 1, 2), (0, 0, 1.1e19, 1.1e19)])
    np.testing.assert_array_equal(kernel.with_area(jnp.asarray(others))[:4].T, others)


def test_boxes_of_nearly_infinite_area_suppress_each_other():
    boxes = f32([(0, 0, 1.1e19, 1.1e19)] * 2)
    assert nms(boxes, f32([0.9, 0.8]), iou_threshold=0.5)[1].tolist() == [True, False]


def test_the_sign_of_the_margin_is_that_of_the_overlap():
    """Also apart along one axis or both, in other groups, and empty, where a product of sides is -0.0 or positive."""
    boxes = f32([(0, 0, 4, 4), (1, 1, 4, 4), (9, 0, 12, 4), (0, 9, 4, 12), (9, 9, 12, 12), (4, 4, 8, 8), (8, 8, 5, 5)])
    planes = kernel.with_area(jnp.asarray(boxes))
    for groups in (None, jnp.zeros(7, jnp.int32), jnp.arange(7)):
        rows, columns = (None, None) if groups is None else (groups[:, None], groups[None])
        found = np.signbit(kernel.margin(planes[:, :, None], rows, planes[:, None], columns, f32(0.3)))
        expected = np.diag([True] * 6 + [False])
        expected[0, 1] = expected[1, 0] = groups is None or groups[0] == groups[1]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("problems", "boxes", "max_output", "expected"),
    [
        (1, 12_000, 2000, "mask"),
        (8, 12_000, 2000, "mask"),
        (8, 8768, 1000, "mask"),  # pyramid levels
        (8, 6000, 300, "list"),
        (720, 1000, 1000, "list"),  # 8 images x 90 classes
        (8, 90_000, 100, "list"),  # the same in groups
        (1, 32_768, 9000, "mask"),
        (1, 32_769, 9000, "list"),  # more words per row than the sweep holds
        (2, 32_768, 9000, "mask"),
        (3, 32_768, 9000, "list"),  # more than 256 MiB of mask
    ],
)
def test_the_design_follows_from_the_sizes(problems, boxes, max_output, expected):
    assert kernel.design(problems, boxes, max_output) == expected


@pytest.mark.mosaic_kernel
@pytest.mark.parametrize("design", ["mask", "list"])
def test_at_their_own_sizes_both_designs_equal_the_greedy_loop(design, monkeypatch):
    mosaic.interpret(monkeypatch)
    monkeypatch.setattr(kernel, "design", lambda *sizes: design)
    kernel.keep_first.cache_clear()
    generator = np.random.default_rng(2)
    corners = generator.integers(0, 20, (36, 2, 2))
    boxes = np.sort(corners, axis=1).reshape(36, 4).astype(f32)
    scores = generator.integers(0, 9, 36).astype(f32)
    valid = np.arange(36) != 5
    options = dict(iou_threshold=0.3, max_output=20)
    kept, is_kept = jax.jit(functools.partial(nms, **options, implementation="mosaic"))(boxes, scores, valid)
    kernel.keep_first.cache_clear()
    assert kept[is_kept].tolist() == oracles.greedy_nms(boxes, scores, valid, **options)


@pytest.mark.mosaic_kernel
@pytest.mark.parametrize(
    ("number", "num_valid", "max_output", "num_groups"),
    [
        (300, 290, 300, None),  # three tiles, the last one not full
        (300, 300, 50, 3),  # ends in the first tile
        (700, 520, 700, 2),  # ends before the last tile
        pytest.param(4300, 4250, 4300, None, marks=pytest.mark.slow),  # two chunks
    ],
)
def test_the_mask_decides_over_tiles_as_plain_jax_does(number, num_valid, max_output, num_groups, monkeypatch):
    generator = np.random.default_rng(number)
    boxes, scores, _ = scattered(generator, (number,), 10 * number**0.6)
    valid = generator.permutation(np.arange(number) < num_valid)
    # Over the whole range of int32, also negative: the kernel holds their bits as float32.
    groups = None if num_groups is None else np.int32([-1, 2**31 - 1, 3])[generator.integers(0, num_groups, number)]
    run = functools.partial(nms, boxes, scores, valid, groups=groups, iou_threshold=0.6, max_output=max_output)
    expected, is_expected = run(implementation="xla")
    mosaic.interpret(monkeypatch, detect_races=number < 1000)
    monkeypatch.setattr(kernel, "design", lambda *sizes: "mask")
    kernel.keep_first.cache_clear()
    kept, is_kept = jax.jit(lambda: run(implementation="mosaic"))()
    kernel.keep_first.cache_clear()
    np.testing.assert_array_equal(is_kept, is_expected)
    np.testing.assert_array_equal(kept, expected)
    assert is_kept.sum() > 128 or max_output < 128


@pytest.mark.mosaic_kernel
@pytest.mark.parametrize(
    ("sizes", "max_output", "results"),
    [
        (
            dict(n=12_000),
            2000,
            ["8x96x512xi32", "8x12288x384xi32", "8x2000xi32"],  # diagonal, mask, sweep
        ),
        (dict(n=1000), 10, ["8x10xi32"]),
    ],
)
def test_a_batch_mapped_twice_is_one_launch_of_each_kernel(sizes, max_output, results, monkeypatch):
    mosaic.pretend(monkeypatch)
    run = functools.partial(nms, iou_threshold=0.7, max_output=max_output)
    program = mosaic.lowered_for_cuda(jax.vmap(jax.vmap(run)), *inputs(2, 4, **sizes))
    started = launches(program)
    assert len(started) == len(results)
    for line, result in zip(started, results):
        assert f"tensor<{result}>" in line.split("->")[-1]
    assert "stablehlo.while" not in program


@pytest.mark.mosaic_kernel
def test_boxes_shared_by_all_mapped_problems_are_one_launch(monkeypatch):
    """One set of boxes for all classes is such a case."""
    mosaic.pretend(monkeypatch)
    boxes, scores, valid = inputs()
    run = functools.partial(nms, **OPTIONS)
    _, scores_of_classes, _ = inputs(7)
    mapped = jax.vmap(run, in_axes=(None, 0, None))
    (launch,) = launches(mosaic.lowered_for_cuda(mapped, boxes, scores_of_classes, valid))
    assert "tensor<7x6xi32>" in launch


@pytest.mark.mosaic_kernel
def test_mapped_over_devices_each_launches_its_own_share(monkeypatch):
    mosaic.pretend(monkeypatch)
    run = jax.vmap(functools.partial(nms, **OPTIONS))
    mesh = jax.make_mesh((4,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("device")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    for program, mapped in ((sharded, (12,)), (jax.pmap(run), (4, 3))):
        (launch,) = launches(mosaic.lowered_for_cuda(program, *inputs(*mapped)))
        assert "tensor<3x6xi32>" in launch


@pytest.mark.parametrize("implementation", ["xla", pytest.param("mosaic", marks=pytest.mark.mosaic_kernel)])
def test_a_gradient_passes_through_the_coordinates_of_the_kept_boxes(implementation, monkeypatch):
    """No gradient passes through the selection."""
    mosaic.pretend(monkeypatch)

    def picked(boxes, scores, valid):
        run = functools.partial(nms, **OPTIONS, implementation=implementation)
        kept, is_kept = run(boxes, scores, valid)
        return jnp.where(is_kept[:, None], boxes[kept], 0.0).sum() + scores[kept[0]]

    gradient = jax.grad(picked, argnums=(0, 1))
    if implementation == "mosaic":
        assert len(launches(mosaic.lowered_for_cuda(jax.vmap(gradient), *inputs(5)))) == 1
        return
    boxes = f32([[0, 0, 9, 9], [0, 0, 9, 8], [20, 0, 30, 9]])
    of_boxes, of_scores = jax.jit(gradient)(boxes, f32([1, 2, 3]), np.ones(3, bool))
    np.testing.assert_array_equal(of_boxes, np.repeat(f32([[0], [1], [1]]), 4, axis=1))
    np.testing.assert_array_equal(of_scores, [0, 0, 1])


def test_the_named_kernel_is_refused_on_a_cpu():
    boxes, scores, valid = jnp.zeros((3, 4)), jnp.zeros(3), jnp.ones(3, bool)
    with pytest.raises(NotImplementedError, match="the Mosaic kernel of nms was asked for, but it needs a CUDA device"):
        nms(boxes, scores, valid, **OPTIONS, implementation="mosaic")


@pytest.mark.mosaic_kernel
def test_more_kept_boxes_than_the_kernel_can_list_are_refused_or_use_plain_jax(monkeypatch):
    most = kernel.MOST_LISTED
    mosaic.pretend(monkeypatch)
    run = functools.partial(nms, iou_threshold=0.5, max_output=most + 1)
    assert launches(mosaic.lowered_for_cuda(run, *inputs(n=most)))
    assert not launches(mosaic.lowered_for_cuda(run, *inputs(n=most + 1)))
    with pytest.raises(NotImplementedError, match=f"at most {most} boxes and the call asks for up to {most + 1}"):
        jax.eval_shape(functools.partial(run, implementation="mosaic"), *inputs(n=most + 1))


@pytest.mark.mosaic_kernel
@pytest.mark.parametrize("slots", [4096, 4097])
def test_the_shared_memory_of_the_kept_list_is_what_mosaic_reserves(monkeypatch, slots):
    from jax.experimental.mosaic.gpu import core

    mosaic.pretend(monkeypatch)
    monkeypatch.setattr(core, "_SMEM_SIZE_BOUND", kernel.shared_memory(slots) - 1)
    options = dict(iou_threshold=0.5, max_output=slots, implementation="mosaic")

    def run(boxes, scores, valid, groups):
        return nms(boxes, scores, valid, groups=groups, **options)

    # Many problems, so the design is the list.
    arrays = *inputs(200, n=slots), jax.ShapeDtypeStruct((200, slots), jnp.int32)
    with pytest.raises(ValueError, match=f"smem_bytes={kernel.shared_memory(slots)} >"):
        mosaic.lowered_for_cuda(jax.vmap(run), *arrays)


@pytest.mark.mosaic_kernel
def test_without_groups_the_kernels_read_five_planes(monkeypatch):
    """Each pair then takes two instructions fewer, and each kept box less shared memory."""
    mosaic.pretend(monkeypatch)
    groups = jax.ShapeDtypeStruct((30,), jnp.int32)
    # The mask has two kernels that compare boxes, the list has one.
    for max_output, padded, compare in ((32, kernel.CHUNK, 2), (1, kernel.LIST_TILE, 1)):

        def run(boxes, scores, valid, groups=None, max_output=max_output):
            return nms(boxes, scores, valid, groups=groups, iou_threshold=0.5, max_output=max_output)

        without, given = (launches(mosaic.lowered_for_cuda(run, *inputs(), *more)) for more in ((), (groups,)))
        for lines, numbers in ((without, 5), (given, 6)):
            assert sum(f"(tensor<{numbers}x1x{padded}xf32>, tensor<1xi32>)" in line for line in lines) == compare


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", [None, "xla", "mosaic"])
def test_boxes_that_lost_precision_are_an_error(dtype, implementation):
    """In bfloat16 neighbours among 1000 pixels are 4 apart."""
    with pytest.raises(TypeError, match=f"boxes must be float32, got {jnp.dtype(dtype).name}"):
        nms(
            jnp.zeros((2, 4), dtype),
            jnp.zeros(2),
            jnp.ones(2, bool),
            **OPTIONS,
            implementation=implementation,
        )


def test_exported_in_plain_jax_it_runs_on_cpu_and_cuda(monkeypatch):
    mosaic.pretend(monkeypatch)
    run = jax.jit(functools.partial(nms, **OPTIONS, implementation="xla"))
    exported = jax.export.export(run, platforms=("cpu", "cuda"))(*inputs())
    assert exported.platforms == ("cpu", "cuda") and "mosaic" not in exported.mlir_module()
    generator = np.random.default_rng(3)
    boxes = np.sort(generator.integers(0, 20, (30, 2, 2)), axis=1).reshape(30, 4).astype(f32)
    scores, valid = generator.permutation(30).astype(f32), np.arange(30) > 1
    for first, again in zip(run(boxes, scores, valid), exported.call(boxes, scores, valid)):
        np.testing.assert_array_equal(first, again)


def scattered(generator, shape, size):
    """Returns float boxes on an image of this size, several around each centre, and scores with ties."""
    *_, n = shape
    centre = generator.uniform(0, size, (*shape[:-1], n // 8 + 1, 2))
    centre = np.take_along_axis(centre, generator.integers(0, n // 8 + 1, shape)[..., None], axis=-2)
    centre += generator.normal(0, 6, (*shape, 2))
    half = generator.uniform(8, 60, (*shape, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=-1).astype(f32)
    return boxes, generator.integers(0, 3 * n, shape).astype(f32), generator.random(shape) < 0.97


def greedy(boxes, scores, valid, groups, *, iou_threshold, max_output):
    """`oracles.greedy_nms`, one kept box against all others at a time."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    order = order[valid[order]]
    boxes, groups, threshold = boxes[order], groups[order], rounded_down(iou_threshold)
    area = oracles.area(boxes)
    alive, kept = np.ones(len(order), bool), []
    while alive.any() and len(kept) < max_output:
        i = alive.argmax()
        kept.append(order[i])
        sides = np.minimum(boxes[i, 2:], boxes[:, 2:]) - np.maximum(boxes[i, :2], boxes[:, :2])
        intersection = np.maximum(sides, 0).prod(axis=1)
        alive &= ~((intersection / (area[i] + area - intersection) > threshold) & (groups == groups[i]))
        alive[i] = False
    return kept


PRODUCTION = {
    "rpn": ((12_000,), 2000, 1, 1000, 0.7),
    "rpn of 8": ((8, 12_000), 2000, 1, 1000, 0.7),
    "levels": ((8, 8768), 1000, 5, 1000, 0.7),
    "classes": ((8, 90, 1000), 1000, 1, 800, 0.5),
    "classes in groups": ((8, 90_000), 100, 90, 800, 0.5),
    "more than a chunk": ((2, 30_000), 3000, 1, 1500, 0.3),
}


@pytest.mark.parametrize("name", ["rpn", "classes in groups"])
def test_the_full_size_loop_equals_plain_jax(name):
    """Uses a part of each case; it checks the loop that results on a GPU are compared with."""
    shape, max_output, num_groups, size, threshold = PRODUCTION[name]
    generator = np.random.default_rng(4)
    n = min(shape[-1], 2000)
    boxes, scores, valid = scattered(generator, (n,), size / 3)
    groups = generator.integers(0, num_groups, n).astype(np.int32)
    options = dict(iou_threshold=threshold, max_output=min(max_output, 500))
    run = jax.jit(functools.partial(nms, **options, implementation="xla"))
    kept, is_kept = run(boxes, scores, valid, groups=groups)
    assert np.asarray(kept)[np.asarray(is_kept)].tolist() == greedy(boxes, scores, valid, groups, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRODUCTION)
def test_on_a_gpu_the_kernel_equals_the_loop_and_repeats_its_bits(name):
    shape, max_output, num_groups, size, threshold = PRODUCTION[name]
    generator = np.random.default_rng(4)
    boxes, scores, valid = scattered(generator, shape, size)
    groups = generator.integers(0, num_groups, shape).astype(np.int32)
    options = dict(iou_threshold=threshold, max_output=max_output)

    def run(boxes, scores, valid, groups):
        given = None if num_groups == 1 else groups
        return nms(boxes, scores, valid, groups=given, **options, implementation="mosaic")

    for _ in shape[:-1]:
        run = jax.vmap(run)
    run = jax.jit(run)
    kept, is_kept = map(np.asarray, run(boxes, scores, valid, groups))
    for _ in range(3):
        for first, again in zip((kept, is_kept), run(boxes, scores, valid, groups)):
            np.testing.assert_array_equal(first, again)
    for row in np.ndindex(shape[:-1]):
        expected = greedy(boxes[row], scores[row], valid[row], groups[row], **options)
        assert kept[row][is_kept[row]].tolist() == expected, row
