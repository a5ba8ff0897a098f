"""Writes a detector as StableHLO programs that JAX runs without this package: `fasterrcnn_jax.exported` loads them."""

import contextlib
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Int, PyTree, UInt8

import fasterrcnn_jax
from fasterrcnn_jax import exported
from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.augmentation import views
from fasterrcnn_jax.inference.prediction import blanked, detect_on_canvas
from fasterrcnn_jax.models.detector import Detector

logger = logging.getLogger(__name__)

Platform = Literal["cpu", "cuda", "tpu"]

# An array of this many pixels per image is 300 MB.
MOST_PIXELS = 100_000_000


def save_exported(
    model: Detector,
    path: str | Path,
    *,
    canvas: tuple[int, int] | None = None,
    platforms: Sequence[Platform] = get_args(Platform),
) -> None:
    """Writes the whole detector, from uint8 images to boxes in pixels of the original images, as StableHLO.

    The file holds the weights once and a program for each of `model.config.image.canvases`, the canvases of the
    network. Each program takes any batch size. It is plain JAX, without the GPU kernels. `load_exported` reads the
    file; it needs JAX and flatbuffers alone. The detection makes one pass: `model.config.test_augment` does not apply.

    Args:
      path: the file to write.
      canvas: (height, width) of the arrays that hold the images, and so the size of the largest image. None: the
        longest height and width of the canvases of the network.
      platforms: what to lower the programs for. Layers are traced for the device of this process: exported from a
        CPU, the depthwise convolutions of EfficientNet are those that are fast on a CPU.
    Raises:
      InputError: `canvas` or `platforms` is out of range, or the file cannot be written.
    """
    image = model.config.image
    canvases = fitted(image.canvases, "model.image.canvases")
    height, width = canvas or (max(one[axis] for one in canvases) for axis in (0, 1))
    if min(height, width) < 1 or height * width > MOST_PIXELS:
        raise InputError(f"canvas must be two positive sides of at most {MOST_PIXELS} pixels, got {height} x {width}")
    platforms = tuple(dict.fromkeys(platforms))
    if not platforms or set(platforms) - set(get_args(Platform)):
        raise InputError(f"platforms must be of {', '.join(get_args(Platform))}, got {', '.join(platforms) or 'none'}")
    if len(views(model.config)) > 1:
        logger.warning("an exported program makes one pass over each image: model.test_augment does not apply")
    leaves = jax.tree.leaves(model)
    members = {exported.WEIGHTS: b"".join(np.asarray(leaf).tobytes() for leaf in leaves)}
    programs = []
    for network_canvas in dict.fromkeys(canvases):
        name = f"program_{network_canvas[0]}x{network_canvas[1]}.bin"
        program = exported_program(model, (height, width), network_canvas, platforms=platforms)
        members[name] = bytes(program.serialize())
        convention = program.calling_convention_version
        programs.append({"file": name, "network_canvas": network_canvas, "calling_convention": convention})
    postprocess = model.config.postprocess
    manifest = {
        "class_names": model.class_names,
        "canvas": (height, width),
        "platforms": platforms,
        "sizes": {
            "short_side": image.short_side,
            "long_side": image.long_side,
            "size_rounding": image.size_rounding,
        },
        "thresholds": {
            "score_threshold": postprocess.score_threshold,
            "nms_threshold": postprocess.nms_threshold,
            "max_detections": postprocess.max_detections,
        },
        "versions": {
            "fasterrcnn_jax": fasterrcnn_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "inputs": {"images": ["uint8", ["batch", height, width, 3]], "sizes": ["int32", ["batch", 2]]},
        "programs": programs,
        "weights": [[leaf.dtype.name, leaf.shape] for leaf in leaves],
    }
    write_atomically(Path(path), exported.packed(manifest, members))


def exported_program(
    model: Detector, canvas: tuple[int, int], network_canvas: tuple[int, int], *, platforms: Sequence[Platform]
) -> export.Exported:
    """Returns the program of one canvas of the network, for any batch size; takes (weights, images, sizes)."""
    (batch,) = export.symbolic_shape("batch")
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model)]
    images = jax.ShapeDtypeStruct((batch, *canvas, 3), jnp.uint8)
    sizes = jax.ShapeDtypeStruct((batch, 2), jnp.int32)
    run = jax.jit(detection_of_weights(model, network_canvas))
    with _without_source_lines():
        return export.export(run, platforms=platforms)(weights, images, sizes)


def detection_of_weights(model: Detector, network_canvas: tuple[int, int]) -> Callable[..., dict[str, Array]]:
    """Returns the function that is exported. Its weights are arguments: constants would be in every program."""
    structure = jax.tree.structure(model)

    def detection(weights: PyTree, images: UInt8[Array, "b h w 3"], sizes: Int[Array, "b 2"]) -> dict[str, Array]:
        model = jax.tree.unflatten(structure, weights)
        return blanked(detect_on_canvas(model, images, sizes, network_canvas, implementation="xla"))._asdict()

    return detection


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """Inside this context, programs do not hold the file names and lines of the source, which name folders here."""
    name: Any = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
