"""Summarises the parts and the costs of a model from shapes alone; nothing is computed or compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.models.detector import Detector, empty_detector, shared_features, split
from fasterrcnn_jax.models.roi_heads import detections_in_regions
from fasterrcnn_jax.ops.anchors import anchors_of, strides_of
from fasterrcnn_jax.structures import Proposals


class Part(NamedTuple):
    name: str
    trained: int  # number of trained values
    fixed: int  # number of values in constants and fixed stages
    flops: float  # of the forward pass of one image; a multiplication and an addition count as two
    activations: int  # bytes that training keeps for the backward pass of one image


class Summary(NamedTuple):
    canvas: tuple[int, int]
    rois: int  # regions that pass the box head in detection
    parts: list[Part]
    anchors: int
    levels: list[tuple[int, tuple[int, ...]]]  # (stride, shape) of each map that carries anchors
    detections: dict[str, tuple[int, ...]]


def summarize(config: ModelConfig, num_classes: int) -> Summary:
    """Returns parts, costs and shapes of a detector for one image on its largest canvas.

    FLOPs are XLA's count for the layers (convolutions, products, normalisation) before it optimises; region
    features, NMS and sorting are left out. Activations are the residuals that `jax.vjp` of the layers keeps, before
    XLA fuses or recomputes any.

    Args:
      num_classes: number of classes without background.
    """
    canvas = max(fitted(config.image.canvases, "model.image.canvases"), key=lambda sides: sides[0] * sides[1])
    names = tuple(f"class{i}" for i in range(num_classes))
    model = empty_detector(config, names)
    images = jax.ShapeDtypeStruct((1, *canvas, 3), config.image.pixel_dtype)
    image_hw = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    levels = jax.eval_shape(shared_features, model, images, image_hw)
    grid = anchors_of(config, tuple(level.shape[1:3] for level in levels))
    rois = config.test_proposals.post_nms_top_n
    size, channels = config.roi_features.output_size, levels[0].shape[-1]
    dtype = jnp.dtype(config.compute_dtype)

    def pooled(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, count, size, size, channels), dtype)

    parts = []
    for name, layers, detection, training in (
        ("backbone", ("backbone", "neck"), (images, image_hw), (images, image_hw)),
        ("rpn_head", ("rpn_head",), (levels,), (levels,)),
        ("box_head", ("box_head",), (pooled(rois),), (pooled(config.roi_sampling.rois_per_image),)),
    ):
        forward = shared_features if name == "backbone" else _head(name)
        trained, fixed = _sizes(model, layers)
        parts.append(
            Part(
                " + ".join(layer for layer in layers if getattr(model, layer) is not None),
                trained,
                fixed,
                _flops(forward, model, *detection),
                _kept(forward, model, *training),
            )
        )
    proposals = jax.eval_shape(
        lambda: Proposals(
            jnp.zeros((1, rois, 4), jnp.float32), jnp.zeros((1, rois), jnp.float32), jnp.zeros((1, rois), jnp.bool_)
        )
    )
    detections = jax.eval_shape(detections_in_regions, model, levels, proposals, image_hw)
    return Summary(
        canvas,
        rois,
        parts,
        len(grid.anchors),
        [(stride, level.shape) for stride, level in zip(strides_of(config), levels, strict=True)],
        {field: values.shape for field, values in detections._asdict().items()},
    )


def format_summary(summary: Summary) -> str:
    """Returns the summary as text to print."""
    total = Part("total", *(sum(values) for values in zip(*(part[1:] for part in summary.parts), strict=True)))
    height, width = summary.canvas
    lines = [
        f"{'':20}{'trained':>14}{'fixed':>14}{'GFLOPs':>10}{'activations':>14}",
        *(
            f"{part.name:20}{part.trained:>14,}{part.fixed:>14,}{part.flops / 1e9:>10.1f}"
            f"{part.activations / 2**20:>10.0f} MiB"
            for part in (*summary.parts, total)
        ),
        "",
        f"One image of {height} x {width} pixels, {summary.rois} regions in detection. "
        "Activations are those of training.",
        "",
        *(f"map of stride {stride:3}   {list(shape)}" for stride, shape in summary.levels),
        f"anchors             {summary.anchors:,}",
        *(f"{name:20}{list(shape)}" for name, shape in summary.detections.items()),
    ]
    return "\n".join(lines)


def _head(name: str) -> Callable[[Detector, Any], Any]:
    return lambda model, x: getattr(model, name)(x)


def _sizes(model: Detector, layers: tuple[str, ...]) -> tuple[int, int]:
    _, params, rest = split(model)

    def size(tree: PyTree) -> int:
        return sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if path[0].key in layers)

    return size(params), size(rest)


def _flops(forward: Callable, model: Detector, *arguments: Any) -> float:
    costs = jax.jit(forward).lower(model, *arguments).cost_analysis()
    assert costs is not None, "XLA estimates the costs of what it has not compiled yet"
    return costs["flops"]


def _kept(forward: Callable, model: Detector, *arguments: Any) -> int:
    """Returns the bytes of the residuals of the backward pass that are neither weights nor inputs."""
    graphdef, params, rest = split(model)

    def residuals(params: PyTree, rest: PyTree, *arguments: Any) -> Any:
        return jax.vjp(lambda params: forward(nnx.merge(graphdef, params, rest), *arguments), params)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, params, rest, *arguments))
    # Weights and inputs are recognised by shape, because a weight may be kept in its rounded form.
    given = [leaf.shape for leaf in jax.tree.leaves((params, rest, arguments))]
    total = 0
    for leaf in kept:
        if leaf.shape in given:
            given.remove(leaf.shape)
        else:
            total += leaf.size * leaf.dtype.itemsize
    return total
