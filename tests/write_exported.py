"""Writes tests/golden/exported_by_jax_VERSION.zip and the numbers that it gives here, for test_export.py.

Run it with another JAX to add a file: PYTHONPATH=. python tests/write_exported.py
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tiny

from fasterrcnn_jax.exported import load_exported
from fasterrcnn_jax.inference.exporting import save_exported
from fasterrcnn_jax.models.detector import with_image_config

GOLDEN = Path(__file__).parent / "golden"


def main():
    model, _ = tiny.quick_model()
    model = with_image_config(model, dataclasses.replace(model.config.image, canvases=((96, 96),)))
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
