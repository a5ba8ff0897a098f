"""Writes tests/golden/exported_by_jax_VERSION.zip and the numbers that it gives here, for test_export.py.

Run it with another JAX to add a file: PYTHONPATH=. python tests/write_exported.py
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tiny
from flax import nnx

from fasterrcnn_jax.exported import load_exported
from fasterrcnn_jax.inference.exporting import save_exported
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.layers import Conv

GOLDEN = Path(__file__).parent / "golden"


class Small(nnx.Module):
    """The network of docs/backbone.md with a quarter of its channels: the weights are 60 kB."""

    channels = (32,)

    def __init__(self, config, image, *, rng):
        sizes, strides = (3, 8, 16, 32), (4, 2, 2)
        self.stages = nnx.List(
            [Conv(sizes[i], sizes[i + 1], 3, stride=strides[i], bias=True, rng=rng) for i in range(3)]
        )

    def __call__(self, images, image_hw):
        for stage in self.stages:
            images = jax.nn.relu(stage(images))
        return (images,)


def main():
    config = dataclasses.replace(
        tiny.MODEL,
        image=dataclasses.replace(tiny.IMAGE, canvases=((96, 96),)),
        backbone=dataclasses.replace(tiny.MODEL.backbone, own="write_exported:Small"),
        box_head=dataclasses.replace(tiny.MODEL.box_head, channels=16),
    )
    model = Detector(config, tiny.CLASS_NAMES, backbone=Small, rng=np.random.default_rng(0))
    generator = np.random.default_rng(5)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
        return jax.numpy.asarray(generator.standard_normal(leaf.shape) * np.sqrt(2 / fan_in), leaf.dtype)

    path = GOLDEN / f"exported_by_jax_{jax.__version__}.zip"
    save_exported(jax.tree.map(draw, model), path, canvas=(100, 120))
    pixels = generator.integers(0, 255, (2, 100, 120, 3), dtype=np.uint8)
    sizes = np.int32([(100, 120), (70, 51)])
    found = jax.device_get(load_exported(path)(pixels, sizes))
    np.savez_compressed(path.with_suffix(".npz"), pixels=pixels, sizes=sizes, **found)
    print(path, path.stat().st_size, found["valid"].sum(), found["scores"].round(3).tolist())


if __name__ == "__main__":
    main()
