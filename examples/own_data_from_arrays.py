"""Your own data from arrays: images of any sizes with boxes and labels become batches of the library's training step.

python examples/own_data_from_arrays.py
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fasterrcnn_jax
from fasterrcnn_jax import models
from fasterrcnn_jax.config import BackboneConfig, ImageConfig, ModelConfig, RoiFeaturesConfig, RpnConfig

CONFIG = ModelConfig(
    # An image is resized to a short side of 64 pixels, and placed on the canvas that holds it.
    image=ImageConfig(short_side=64, long_side=96, canvases=((96, 96),), channel_order="rgb", std=(60.0, 60.0, 60.0)),
    backbone=BackboneConfig(name="resnet18", width=8, norm="group", stem_pool="padded", fixed_stages=0),
    rpn=RpnConfig(anchor_scales=(1.0, 2.0), anchor_rounding="none", allowed_border=None, channels=16),
    roi_features=RoiFeaturesConfig(output_size=4, sampling_ratio=2, aligned=True),
)
MAX_BOXES = 3


def to_batch(
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    config: ImageConfig,
    *,
    first: int = 0,
) -> models.Batch:
    """Returns a batch of images on one canvas.

    Args:
      images: uint8 [height, width, 3], RGB, of any sizes.
      boxes: [n, 4] of each image, xyxy in its pixels; n may be 0 and is at most `MAX_BOXES`.
      labels: [n] of each image, counted from 1.
      first: position of the first image in your data; it seeds the random choices for the image.
    """
    pixels, image_hw, scale = map(np.asarray, fasterrcnn_jax.preprocess(list(images), config))
    count = len(images)
    placed, names = np.zeros((count, MAX_BOXES, 4), np.float32), np.zeros((count, MAX_BOXES), np.int32)
    valid = np.zeros((count, MAX_BOXES), bool)
    for row in range(count):
        slots = slice(len(boxes[row]))
        # Boxes are resized with the image; the scale is (y, x).
        placed[row, slots], names[row, slots] = boxes[row] * np.tile(scale[row, ::-1], 2), labels[row]
        valid[row, slots] = True
    truth = models.GroundTruth(*map(jnp.asarray, (placed, names, valid)))
    pixels, image_hw, scale = map(jnp.asarray, (pixels, image_hw, scale))
    return models.Batch(pixels, image_hw, scale, first + jnp.arange(count), jnp.ones(count, bool), truth)


def your_data(seed: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields images of several sizes with up to three squares: red is class 1, blue is class 2."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        height, width = rng.integers(80, 140, 2)
        image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        labels = rng.integers(1, 3, rng.integers(0, MAX_BOXES + 1))
        near = rng.integers(0, (width - 40, height - 40), (len(labels), 2))
        boxes = np.concatenate([near, near + 36], axis=1)
        for (x1, y1, x2, y2), label in zip(boxes.astype(int), labels, strict=True):
            image[y1:y2, x1:x2] = ((250, 40, 40), (40, 60, 250))[label - 1]
        yield image, boxes, labels


def main(steps: int = 30, batch_size: int = 4) -> None:
    model = fasterrcnn_jax.create(CONFIG, ("red", "blue"))
    optimizer = optax.adamw(2e-3)
    graphdef, state = models.create_state(model, optimizer, seed=0)
    devices = jax.local_devices()[:1]  # all of them: None
    train_step = models.data_parallel(models.make_train_step(graphdef, optimizer), devices=devices)
    state = models.replicate(state, devices=devices)
    for step in range(steps):
        images, boxes, labels = zip(*your_data(step, batch_size), strict=True)
        batch = to_batch(images, boxes, labels, CONFIG.image, first=step * batch_size)
        state, metrics = train_step(state, batch)
        if step in (0, steps - 1):
            total = metrics.rpn_objectness + metrics.rpn_box + metrics.box_class + metrics.box_delta
            objects = int(batch.ground_truth.valid.sum())
            print(f"step {step + 1}: loss {float(total):.3f}, {objects} objects in {batch_size} images")
    model = models.merge(graphdef, state)
    images, _, _ = zip(*your_data(steps, 1), strict=True)
    found = fasterrcnn_jax.predict(model, list(images), score_threshold=0.5)
    assert isinstance(found, list)  # one result for each image of a list
    print(f"{len(found[0].scores)} detections in a new image")


if __name__ == "__main__":
    main()
