"""The detector inside a larger jitted function: one program from the bytes of an image to its boxes.

python examples/predict_in_a_pipeline.py runs/shapes image.jpg
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import fasterrcnn_jax


@jax.jit
def boxes_of_the_brightened(model, image):
    """Your own steps may stand before and after: the image is an array of the program."""
    brighter = jnp.minimum(image.astype(jnp.float32) * 1.2, 255.0)
    return fasterrcnn_jax.predict(model, brighter, score_threshold=0.5)


def main(run, path):
    model = fasterrcnn_jax.load(run)
    image = np.asarray(Image.open(path).convert("RGB"))

    found = boxes_of_the_brightened(model, image)
    for box, score, label in zip(*(np.asarray(values)[np.asarray(found.valid)] for values in found[:3]), strict=True):
        print(f"{model.class_names[label - 1]} {score:.2f} {box.round(1).tolist()}")

    # A batch: vmap, or the array [batch, height, width, 3] itself, with batch_size images at once.
    batch = jnp.stack([image, image[:, ::-1]])
    found = jax.jit(fasterrcnn_jax.predict, static_argnames="batch_size")(model, batch, batch_size=2)
    print(f"{int(found.valid.sum())} detections in the image and its mirror image")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/predict_in_a_pipeline.py RUN IMAGE")
    main(*sys.argv[1:])
