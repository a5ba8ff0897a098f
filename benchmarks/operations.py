"""The operations that `kernels.py` times: inputs, our call, torchvision's, and how the two results compare.

B is the number of images, N of boxes, R of regions. Large inputs are drawn on the device, one set after another, and
both libraries get the same values. Functions that torchvision has only for one image are called in a loop over the
images, as its detectors do.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
from fasterrcnn_jax.kernels.choice import Implementation

from fasterrcnn_jax.config import RoiFeaturesConfig
from fasterrcnn_jax.config.families import resnet_fpn
from fasterrcnn_jax.ops import boxes as box_geometry
from fasterrcnn_jax.ops.anchors import PYRAMID_STRIDES, anchors_of
from fasterrcnn_jax.ops.box_coder import decode
from fasterrcnn_jax.ops.matching import match_boxes
from fasterrcnn_jax.ops.proposals import propose
from fasterrcnn_jax.ops.roi_operators import roi_features
from fasterrcnn_jax.ops.suppression import nms

# Takes one set of inputs, puts on the device what is not there, returns the call to be timed.
Build = Callable[..., Callable[[], Any]]

# Different roundings of one IoU may turn one decision, and with it some of the later ones.
FEW_BOXES = 0.01
F32_NORM, BF16_NORM = 1e-5, 1e-2
PLAIN = ("xla",)


class Operation(NamedTuple):
    draw: Callable[[np.random.Generator], tuple[Any, ...]]  # arrays of JAX or NumPy
    ours: Callable[[Implementation], Build]
    theirs: Callable[[Any, Any], dict[str, Build]]  # takes torch and torchvision; by name and type
    difference: Callable[[Any, Any], float]
    limit: float  # of the difference
    dtype: str  # of our inputs and results
    num_bytes: float  # the fewest that must move: inputs read once, results written once
    flops: float  # the fewest that must be done
    goal: float | None = None  # times as fast as torchvision, on an H200
    floor_goal: float | None = None  # at most so many times the floor
    implementations: tuple[str, ...] = ("xla", "mosaic")


def on_device(function: Callable, *, cast: Callable = lambda *arrays: arrays) -> Build:
    """Returns what builds calls of a jitted function."""
    jitted = jax.jit(function)

    def build(*arrays):
        arguments = jax.tree.map(jnp.asarray, cast(*arrays))
        return lambda: jitted(*arguments)

    return build


def gradient_on_device(function: Callable, *, cast: Callable) -> Build:
    """Returns what builds calls of the backward pass alone: what the forward pass leaves for it is at hand.

    `cast` returns (what is differentiated, the other arguments, the cotangent).
    """
    forward = jax.jit(lambda features, others: jax.vjp(lambda x: function(x, *others), features)[1])
    backward = jax.jit(lambda pull, cotangent: pull(cotangent)[0])

    def build(*arrays):
        features, others, cotangent = jax.tree.map(jnp.asarray, cast(*arrays))
        pull = forward(features, others)
        return lambda: backward(pull, cotangent)

    return build


def in_torch(torch: Any, function: Callable, *, cast: Callable | None = None) -> Build:
    def build(*arrays):
        arguments = [measure.to_torch(x) for x in arrays]
        arguments = cast(*arguments) if cast else arguments
        return lambda: function(*arguments)

    return build


def eager_and_compiled(torch: Any, function: Callable, name: str = "float32") -> dict[str, Build]:
    return {
        f"torchvision eager, {name}": in_torch(torch, function),
        f"torchvision compiled, {name}": in_torch(torch, torch.compile(function)),
    }


@functools.partial(jax.jit, static_argnums=1)
def _normal(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    """Returns float32 values of the standard normal distribution, drawn on the device: a set has up to 200 million."""
    return _normal(np.uint32(rng.integers(2**31)), shape)


# Boxes as detectors have them: many around each object.


def clustered_boxes(
    rng: np.random.Generator, batch: int, count: int, image_hw: tuple[int, int], per_object: int = 40
) -> np.ndarray:
    """Returns [batch, count, 4] boxes inside an image; a quarter lie anywhere."""
    height, width = image_hw
    objects = max(count // per_object, 1)
    side = np.exp(rng.uniform(np.log(16.0), np.log(0.6 * height), (batch, objects, 2)))
    centre = rng.uniform(0.0, 1.0, (batch, objects, 2)) * (width, height)
    of = rng.integers(0, objects, (batch, count))[..., None]
    side, centre = np.take_along_axis(side, of, 1), np.take_along_axis(centre, of, 1)
    centre = centre + rng.normal(0.0, 0.12, centre.shape) * side
    side = side * np.exp(rng.normal(0.0, 0.15, side.shape))
    anywhere = rng.random((batch, count, 1)) < 0.25
    centre = np.where(anywhere, rng.uniform(0.0, 1.0, centre.shape) * (width, height), centre)
    boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=-1)
    # A pixel wide at least, also at the border.
    low, high = (0, 0, 1, 1), (width - 1, height - 1, width, height)
    return np.clip(boxes, low, high).astype(np.float32)


def even_boxes(rng: np.random.Generator, batch: int, count: int, image_hw: tuple[int, int]) -> np.ndarray:
    """Returns [batch, count, 4] boxes of all sizes anywhere in an image: most survive NMS."""
    return clustered_boxes(rng, batch, count, image_hw, per_object=1)


def boxes_on_objects(
    rng: np.random.Generator, batch: int, count: int, image_hw: tuple[int, int], per_object: int = 20
) -> np.ndarray:
    """Returns [batch, count, 4] boxes around objects and none elsewhere, as a trained RPN has them: most are
    suppressed."""
    height, width = image_hw
    objects = max(count // per_object, 1)
    side = np.exp(rng.uniform(np.log(24.0), np.log(0.5 * height), (batch, objects, 2)))
    centre = rng.uniform(0.1, 0.9, (batch, objects, 2)) * (width, height)
    of = rng.integers(0, objects, (batch, count))[..., None]
    side, centre = np.take_along_axis(side, of, 1), np.take_along_axis(centre, of, 1)
    centre = centre + rng.normal(0.0, 0.05, centre.shape) * side
    side = side * np.exp(rng.normal(0.0, 0.08, side.shape))
    boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=-1)
    low, high = (0, 0, 1, 1), (width - 1, height - 1, width, height)
    return np.clip(boxes, low, high).astype(np.float32)


def kept_differently(ours: tuple, theirs: list) -> float:
    """Returns the fraction of all kept boxes that only one side kept, for the image where it is largest."""
    indices, valid = (np.asarray(x) for x in ours)
    parts = []
    for row, kept in enumerate(theirs):
        a, b = set(indices[row][valid[row]].tolist()), set(kept.cpu().tolist())
        parts.append(len(a ^ b) / max(len(a | b), 1))
    return max(parts)


def nms_case(*, tiny: bool, batch: int, goal: float | None, boxes: Callable = clustered_boxes) -> Operation:
    count, keep = (300, 50) if tiny else (12_000, 2000)
    threshold = 0.7

    def draw(rng):
        return boxes(rng, batch, count, (600, 1000)), rng.random((batch, count), np.float32)

    def ours(implementation):
        one = functools.partial(nms, iou_threshold=threshold, max_output=keep, implementation=implementation)
        return on_device(lambda boxes, scores: jax.vmap(one)(boxes, scores, jnp.ones(scores.shape, bool)))

    def theirs(torch, torchvision):
        def each(boxes, scores):
            return [torchvision.ops.nms(b, s, threshold)[:keep] for b, s in zip(boxes, scores, strict=True)]

        def together(boxes, scores):
            image = torch.arange(batch, device=boxes.device).repeat_interleave(count)
            kept = torchvision.ops.batched_nms(boxes.flatten(0, 1), scores.flatten(), image, threshold)
            return [kept[image[kept] == i][:keep] - i * count for i in range(batch)]

        sides = eager_and_compiled(torch, each)
        return sides if batch == 1 else sides | {"torchvision batched_nms, float32": in_torch(torch, together)}

    # Every kept box was compared with every one kept before it; 16 operations a pair.
    pairs = keep * (keep - 1) / 2
    return Operation(
        draw,
        ours,
        theirs,
        kept_differently,
        FEW_BOXES,
        "float32",
        batch * (21 * count + 5 * keep),
        16 * batch * pairs,
        goal=goal,
    )


def class_nms_case(*, tiny: bool, batch: int = 8, passing: float = 1.0, goal: float | None = 10.0) -> Operation:
    """NMS within each class, of the part `passing` of the boxes whose score passes a threshold."""
    classes, per_class, keep = (5, 40, 20) if tiny else (90, 1000, 100)
    batch = min(batch, 2) if tiny else batch
    count, threshold, lowest = classes * per_class, 0.5, 1.0 - passing

    def draw(rng):
        labels = np.tile(np.arange(1, classes + 1, dtype=np.int32), (batch, per_class))
        return clustered_boxes(rng, batch, count, (800, 1333)), rng.random((batch, count), np.float32), labels

    def ours(implementation):
        options = dict(iou_threshold=threshold, max_output=keep, implementation=implementation)

        def one(boxes, scores, labels):
            return nms(boxes, scores, scores >= lowest, groups=labels, **options)

        return on_device(jax.vmap(one))

    def theirs(torch, torchvision):
        def each(boxes, scores, labels):
            kept = []
            for image in zip(boxes, scores, labels, strict=True):
                passed = torch.where(image[1] >= lowest)[0]
                kept.append(passed[torchvision.ops.batched_nms(*(x[passed] for x in image), threshold)[:keep]])
            return kept

        return eager_and_compiled(torch, each)

    pairs = keep * (keep - 1) / 2 / classes
    return Operation(
        draw,
        ours,
        theirs,
        kept_differently,
        FEW_BOXES,
        "float32",
        batch * (25 * count + 5 * keep),
        16 * batch * pairs,
        goal=goal,
    )


def pyramid(tiny: bool) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
    """Returns canvas and level sizes P2 to P6."""
    canvas = (64, 96) if tiny else (800, 1344)
    return canvas, tuple((-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in PYRAMID_STRIDES)


def draw_rpn(rng: np.random.Generator, batch: int, anchors: int) -> tuple[jax.Array, jax.Array]:
    """Returns objectness logits and small deltas."""
    return 1.5 * normal(rng, batch, anchors) - 3.0, 0.2 * normal(rng, batch, anchors, 4)


def rpn_case(*, tiny: bool, train: bool) -> Operation:
    """The whole way from RPN outputs to proposals on both sides: decode, top-k of each level, clip, filter, NMS."""
    batch = 2 if tiny else 8
    model = resnet_fpn(50)
    canvas, grids = pyramid(tiny)
    grid = anchors_of(model, grids)
    config = model.train_proposals if train else model.test_proposals
    image_hw = np.tile(np.float32(canvas), (batch, 1))

    def ours(implementation):
        options = dict(
            level_sizes=grid.level_sizes, config=config, coder=model.box_coder, implementation=implementation
        )

        def all_images(objectness, deltas):
            anchors, valid = jnp.asarray(grid.anchors), jnp.ones(objectness.shape, bool)
            one = functools.partial(propose, **options)
            return jax.vmap(one, in_axes=(0, 0, None, 0, 0, 0))(
                objectness, deltas, anchors, valid, jnp.asarray(image_hw), jnp.ones((batch, 2))
            )

        return on_device(all_images)

    def theirs(torch, torchvision):
        number = {"training": config.pre_nms_top_n, "testing": config.pre_nms_top_n}
        rpn = torchvision.models.detection.rpn.RegionProposalNetwork(
            None, None, 0.7, 0.3, 256, 0.5, number, number, config.nms_threshold
        ).eval()
        anchors = torch.from_numpy(grid.anchors).to(measure.torch_device())

        def all_images(objectness, deltas):
            proposals = rpn.box_coder.decode(deltas.flatten(0, 1), [anchors] * batch).view(batch, -1, 4)
            shapes = [canvas] * batch
            return rpn.filter_proposals(proposals, objectness.flatten()[:, None], shapes, list(grid.level_sizes))[0]

        return eager_and_compiled(torch, all_images)

    def difference(ours, theirs):
        """Part of the boxes that have no counterpart within a hundredth of a pixel, worst image."""
        parts = []
        for row, found in enumerate(theirs):
            a, b = np.asarray(ours.boxes[row])[np.asarray(ours.valid[row])], found.cpu().numpy()
            apart = np.abs(a[:, None] - b[None]).max(axis=-1)
            alone = (apart.min(axis=1) > 0.01).sum() + (apart.min(axis=0) > 0.01).sum()
            parts.append(alone / (len(a) + len(b)))
        return max(parts)

    anchors = len(grid.anchors)
    return Operation(
        lambda rng: draw_rpn(rng, batch, anchors),
        ours,
        theirs,
        difference,
        FEW_BOXES,
        "float32",
        batch * anchors * 20 + 16 * anchors + batch * config.post_nms_top_n * 21,
        batch * anchors * 20,
        goal=5.0,
    )


# Region features. Backward passes are timed alone, on the forward pass' own residuals.


class Maps(NamedTuple):
    """Feature maps of a batch and the regions on them."""

    batch: int
    regions: int  # of an image
    channels: int
    grids: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    output_size: int

    @property
    def canvas(self) -> tuple[int, int]:
        return self.grids[0][0] * self.strides[0], self.grids[0][1] * self.strides[0]

    @property
    def map_values(self) -> int:
        return self.batch * self.channels * sum(height * width for height, width in self.grids)

    @property
    def region_values(self) -> int:
        return self.batch * self.regions * self.output_size**2 * self.channels


def fpn_maps(tiny: bool) -> Maps:
    _, grids = pyramid(tiny)
    batch, regions, channels = (2, 6, 128) if tiny else (8, 512, 256)
    return Maps(batch, regions, channels, grids[:4], PYRAMID_STRIDES[:4], 7)


def c4_maps(tiny: bool, *, channels: int = 1024, output_size: int = 14) -> Maps:
    if tiny:
        return Maps(2, 6, 128, ((9, 12),), (16,), 4)
    return Maps(8, 128, channels, ((38, 63),), (16,), output_size)


def draw_maps(rng: np.random.Generator, maps: Maps) -> tuple[Any, ...]:
    """Returns boxes, a cotangent [B, R, S, S, C] and the maps [B, H, W, C]; values that bfloat16 holds exactly."""

    def rounded(*shape):
        return normal(rng, *shape).astype(jnp.bfloat16).astype(jnp.float32)

    boxes = clustered_boxes(rng, maps.batch, maps.regions, maps.canvas)
    size = maps.output_size
    cotangent = rounded(maps.batch, maps.regions, size, size, maps.channels)
    return boxes, cotangent, *(rounded(maps.batch, *grid, maps.channels) for grid in maps.grids)


def relative(ours: list, theirs: list) -> float:
    """Returns the norm of the difference of two lists of arrays by the norm of the second, computed on the device."""
    apart, size = 0.0, 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
        apart, size = apart + float(jnp.square(a - b).sum()), size + float(jnp.square(b).sum())
    return float(np.sqrt(apart / size)) if size else np.inf


def regions_case(
    *, maps: Maps, operator: str, dtype: str, backward: bool, goal: float | None, floor_goal: float | None = None
) -> Operation:
    """RoIAlign with two samples on a pyramid and as many as a bin has cells on one map, or RoI pooling; forward
    or backward."""
    sampling_ratio = 2 if len(maps.grids) > 1 else 0
    config = RoiFeaturesConfig(operator=operator, output_size=maps.output_size, sampling_ratio=sampling_ratio)

    def cast(boxes, cotangent, *levels):
        levels = tuple(jnp.asarray(level, dtype) for level in levels)
        return (levels, (boxes,), jnp.asarray(cotangent, dtype)) if backward else (levels, boxes)

    def ours(implementation):
        one = functools.partial(
            roi_features, strides=maps.strides, far_corner_offset=0, config=config, implementation=implementation
        )
        return (gradient_on_device if backward else on_device)(jax.vmap(one), cast=cast)

    def theirs(torch, torchvision):
        ops, autocast = torchvision.ops, functools.partial(torch.autocast, measure.torch_device(), torch.bfloat16)
        names = [str(level) for level in range(len(maps.grids))]
        multi_scale = ops.MultiScaleRoIAlign(names, maps.output_size, sampling_ratio)

        def pooled(levels, boxes):
            if operator == "pool":
                return ops.roi_pool(levels[0], boxes, maps.output_size, 1.0 / maps.strides[0])
            if len(names) == 1:
                return ops.roi_align(levels[0], boxes, maps.output_size, 1.0 / maps.strides[0], sampling_ratio)
            return multi_scale(dict(zip(names, levels, strict=True)), boxes, [maps.canvas] * maps.batch)

        def build(function, torch_dtype, context):
            def cast(boxes, cotangent, *levels):
                # Its layout; the values are those of our maps.
                levels = [level.permute(0, 3, 1, 2).contiguous().to(torch_dtype) for level in levels]
                return list(boxes), cotangent.flatten(0, 1).permute(0, 3, 1, 2).contiguous(), levels

            def forward(boxes, cotangent, levels):
                with context():
                    return function(levels, boxes)

            def call(*arrays):
                arrays = [measure.to_torch(x) for x in arrays]
                boxes, cotangent, levels = cast(*arrays)
                if not backward:
                    return lambda: forward(boxes, cotangent, levels)
                for level in levels:
                    level.requires_grad_()
                out = forward(boxes, cotangent, levels)
                cotangent = cotangent.to(out.dtype)
                return lambda: torch.autograd.grad(out, levels, cotangent, retain_graph=True)

            return call

        # A compiled backward pass would otherwise run only once.
        torch._functorch.config.donated_buffer = False
        compiled = torch.compile(pooled)
        plain = functools.partial(torch.autocast, measure.torch_device(), enabled=False)
        sides = {
            "torchvision eager, float32": build(pooled, torch.float32, plain),
            "torchvision compiled, float32": build(compiled, torch.float32, plain),
        }
        if dtype == "bfloat16":
            # Their operators turn the maps into float32 there and the result back.
            sides |= {
                "torchvision eager, autocast bfloat16": build(pooled, torch.bfloat16, autocast),
                "torchvision compiled, autocast bfloat16": build(compiled, torch.bfloat16, autocast),
            }
        return sides

    def difference(ours, theirs):
        if backward:
            return relative([x.astype(jnp.float32) for x in ours], [_channels_last(x) for x in theirs])
        ours = ours.astype(jnp.float32)
        return relative([ours], [_channels_last(theirs).reshape(ours.shape)])

    width = jnp.dtype(dtype).itemsize
    return Operation(
        lambda rng: draw_maps(rng, maps),
        ours,
        theirs,
        difference,
        F32_NORM if dtype == "float32" else BF16_NORM,
        dtype,
        width * (maps.map_values + maps.region_values) + 16 * maps.batch * maps.regions,
        # Eight operations a bilinear sample, of which every bin has one at least; a comparison a value in pooling.
        maps.region_values * (1 if operator == "pool" else 8 * max(sampling_ratio, 1) ** 2),
        goal=goal,
        floor_goal=floor_goal,
    )


def _channels_last(x: Any) -> jax.Array:
    return measure.from_torch(x.detach().float().permute(0, 2, 3, 1))


# What stands beside the kernels: plain JAX alone, timed to see whether it matters.


def top_k_case(*, tiny: bool) -> Operation:
    batch, count, k = (2, 500, 50) if tiny else (8, 200 * 336 * 3, 2000)

    def theirs(torch, torchvision):
        return eager_and_compiled(torch, lambda scores: torch.topk(scores, k))

    return Operation(
        lambda rng: (normal(rng, batch, count),),
        lambda _: on_device(lambda scores: jax.lax.top_k(scores, k)),
        theirs,
        lambda ours, theirs: relative([ours[0]], [measure.from_torch(theirs[0])]),
        0.0,
        "float32",
        batch * (4 * count + 8 * k),
        batch * count,
        implementations=PLAIN,
    )


def sort_case(*, tiny: bool, count: int) -> Operation:
    """The stable sort that NMS begins with: valid ones first, descending scores, ties by index."""
    batch, count = (2, 500) if tiny else (8, count)

    def ours(scores):
        index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jax.lax.sort((jnp.zeros(scores.shape, bool), -scores, index), num_keys=2, is_stable=True)[2]

    def theirs(torch, torchvision):
        return eager_and_compiled(torch, lambda scores: torch.sort(scores, stable=True, descending=True))

    return Operation(
        lambda rng: (normal(rng, batch, count),),
        lambda _: on_device(ours),
        theirs,
        lambda ours, theirs: float((np.asarray(ours) != theirs[1].cpu().numpy()).mean()),
        0.0,
        "float32",
        8 * batch * count,
        batch * count * np.log2(count),
        implementations=PLAIN,
    )


def decode_case(*, tiny: bool) -> Operation:
    """Decode, clip, and which boxes are large enough."""
    batch, min_size = (2 if tiny else 8), 16.0
    canvas, grids = pyramid(tiny)
    grid = anchors_of(resnet_fpn(50), grids)

    def ours(deltas):
        boxes = box_geometry.clip(decode(deltas, jnp.asarray(grid.anchors)[None]), jnp.float32(canvas))
        return boxes, box_geometry.larger_than(boxes, min_size, jnp.ones(2))

    def theirs(torch, torchvision):
        coder = torchvision.models.detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
        anchors = torch.from_numpy(grid.anchors).to(measure.torch_device()).repeat(batch, 1)

        def all_images(deltas):
            boxes = coder.decode_single(deltas.flatten(0, 1), anchors)
            boxes = torchvision.ops.clip_boxes_to_image(boxes, canvas)
            sides = boxes[:, 2:] - boxes[:, :2]
            return boxes, (sides >= min_size).all(dim=1)

        return eager_and_compiled(torch, all_images)

    values = batch * len(grid.anchors)
    return Operation(
        lambda rng: draw_rpn(rng, batch, len(grid.anchors))[1:],
        lambda _: on_device(ours),
        theirs,
        lambda ours, theirs: relative([ours[0].reshape(-1, 4)], [measure.from_torch(theirs[0])]),
        F32_NORM,
        "float32",
        33 * values + 16 * len(grid.anchors),
        30 * values,
        implementations=PLAIN,
    )


def assignment_case(*, tiny: bool) -> Operation:
    """The ground-truth box of every anchor: IoU of all pairs, best box of each anchor and best anchor of each box."""
    batch, boxes = (2, 5) if tiny else (8, 100)
    canvas, grids = pyramid(tiny)
    anchors = anchors_of(resnet_fpn(50), grids).anchors
    thresholds = (0.7, 0.3)

    def ours(ground_truth):
        def one(ground_truth):
            return match_boxes(
                jnp.asarray(anchors), ground_truth, fg_iou=thresholds[0], bg_iou=(0.0, thresholds[1]), low_quality=True
            )

        return jax.vmap(one)(ground_truth)

    def theirs(torch, torchvision):
        matcher = torchvision.models.detection._utils.Matcher(*thresholds, allow_low_quality_matches=True)
        on_theirs = torch.from_numpy(anchors).to(measure.torch_device())

        def each(ground_truth):
            return [matcher(torchvision.ops.box_iou(boxes, on_theirs)) for boxes in ground_truth]

        return eager_and_compiled(torch, each)

    def difference(ours, theirs):
        """Part of the anchors with another label: -1 is their background, -2 what lies between."""
        labels = np.stack([matches.cpu().numpy() for matches in theirs])
        labels = np.where(labels >= 0, 1, np.where(labels == -1, 0, -1))
        return float((np.asarray(ours.labels) != labels).mean())

    return Operation(
        lambda rng: (clustered_boxes(rng, batch, boxes, canvas, per_object=1),),
        lambda _: on_device(ours),
        theirs,
        difference,
        1e-4,
        "float32",
        batch * (8 * len(anchors) + 16 * boxes) + 16 * len(anchors),
        16 * batch * len(anchors) * boxes,
        implementations=PLAIN,
    )


def operations(*, tiny: bool) -> dict[str, Callable[[], Operation]]:
    """Returns builders of all operations by name, the goals of the kernels first."""
    fpn, c4, pool = fpn_maps(tiny), c4_maps(tiny), c4_maps(tiny, channels=512, output_size=7)
    case = functools.partial
    align = case(regions_case, operator="align")
    return {
        "nms 12000 to 2000, batch 1": case(nms_case, tiny=tiny, batch=1, goal=3.0),
        "nms 12000 to 2000, batch 8": case(nms_case, tiny=tiny, batch=2 if tiny else 8, goal=8.0),
        "nms per class, 8 x 90 x 1000": case(class_nms_case, tiny=tiny),
        "rpn, 5 levels, batch 8, detection": case(rpn_case, tiny=tiny, train=False),
        "rpn, 5 levels, batch 8, training": case(rpn_case, tiny=tiny, train=True),
        **{
            f"roi_align {name}, {dtype}, {way}": case(
                align,
                maps=maps,
                dtype=dtype,
                backward=way == "backward",
                goal=(4.0 if way == "backward" else 2.0) if dtype == "bfloat16" or maps is c4 else None,
                floor_goal=2.5 if dtype == "bfloat16" and maps is fpn else None,
            )
            for name, maps in (("8 x 512, C=256, pyramid", fpn), ("8 x 128, C=1024, 14x14", c4))
            for dtype in ("bfloat16", "float32")
            for way in ("forward", "backward")
        },
        **{
            f"roi_pool 8 x 128, C=512, {way}": case(
                regions_case, maps=pool, operator="pool", dtype="float32", backward=way == "backward", goal=None
            )
            for way in ("forward", "backward")
        },
        "top-k 201600 to 2000, batch 8": case(top_k_case, tiny=tiny),
        "sort 12000, batch 8": case(sort_case, tiny=tiny, count=12_000),
        "sort 90000, batch 8": case(sort_case, tiny=tiny, count=90_000),
        "decode, clip, filter, 8 x 268k anchors": case(decode_case, tiny=tiny),
        "anchor assignment, 8 x 268k x 100": case(assignment_case, tiny=tiny),
        **{
            f"nms 12000 to 2000, {name}, batch {batch}": case(
                nms_case, tiny=tiny, batch=2 if tiny and batch > 1 else batch, goal=None, boxes=boxes
            )
            for name, boxes in (("even boxes", even_boxes), ("boxes on objects", boxes_on_objects))
            for batch in (1, 8)
        },
        "nms per class, 8 x 90 x 1000, one in 20 passes": case(class_nms_case, tiny=tiny, passing=0.049, goal=None),
    }
