"""Saliency: how much each pixel moves the score of a detection, drawn over the image.

python examples/saliency.py runs/shapes image.jpg saliency.png
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import fasterrcnn_jax


@jax.jit
def score_and_gradient(
    image: jax.Array, model: fasterrcnn_jax.Detector
) -> tuple[tuple[jax.Array, fasterrcnn_jax.Detections], jax.Array]:
    """Returns the best score with all detections, and the gradient of the score for each grey level."""

    def best(image: jax.Array) -> tuple[jax.Array, fasterrcnn_jax.Detections]:
        found = fasterrcnn_jax.predict(model, image)
        assert isinstance(found, fasterrcnn_jax.Detections)  # of a JAX array
        return found.scores[0], found

    return jax.value_and_grad(best, has_aux=True)(image)


def heat_map(pixels: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Returns the image in grey, reddened where the gradient is large."""
    strength = np.abs(gradient).sum(axis=2)
    # The largest hundredth is fully red.
    strength = np.clip(strength / max(np.quantile(strength, 0.99), 1e-30), 0.0, 1.0)[..., None]
    grey = 0.5 * pixels.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return ((1.0 - strength) * grey + strength * np.array([255.0, 40.0, 0.0])).astype(np.uint8)


def main(run: str | Path, path: str | Path, out: str | Path) -> None:
    model = fasterrcnn_jax.load(run)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    (score, found), gradient = score_and_gradient(jnp.asarray(pixels, jnp.float32), model)
    gradient = np.asarray(gradient)
    Image.fromarray(heat_map(pixels, gradient)).save(out)

    box, strength = np.asarray(found.boxes[0]), np.abs(gradient).sum(axis=2)
    x1, y1, x2, y2 = np.round(box).astype(int)
    inside = strength[y1:y2, x1:x2].sum() / max(strength.sum(), 1e-30)
    row, column = np.unravel_index(int(strength.argmax()), strength.shape)
    name = model.class_names[int(found.labels[0]) - 1]
    print(f"{name} {float(score):.2f} {box.round(1).tolist()}")
    print(f"{inside:.0%} of the gradient lies in the box, the largest in row {row}, column {column}")
    print(f"written to {out}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/saliency.py RUN IMAGE OUT")
    main(*sys.argv[1:])
