"""Operations in your own model: a small region scorer in Flax that learns to find a bright rectangle.

python examples/operations_in_your_model.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fasterrcnn_jax import ops

SIDE, STRIDE = 64, 8
# [128, 4]: at each of 8 x 8 cells a square of 16 and one of 24 pixels.
ANCHORS = ops.grid_anchors(ops.cell_anchors(16, (1.0, 1.5), (1.0,)), (SIDE // STRIDE, SIDE // STRIDE), STRIDE)


class RegionScorer(nnx.Module):
    """Returns the logit and the box deltas of each anchor in an image [64, 64, 1]."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, 16, (5, 5), strides=4, rngs=rngs)
        self.trunk = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(3 * 3 * 32, 64, rngs=rngs)
        self.out = nnx.Linear(64, 5, rngs=rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = nnx.relu(self.trunk(nnx.relu(self.stem(image[None]))))[0]
        pooled = ops.roi_align(features, ANCHORS, strides=STRIDE, output_size=3, sampling_ratio=1)
        out = self.out(nnx.relu(self.hidden(pooled.reshape(len(ANCHORS), -1))))
        return out[:, 0], out[:, 1:]


def loss_of(model: RegionScorer, image: jax.Array, box: jax.Array) -> jax.Array:
    logits, deltas = model(image)
    matches = ops.match(ops.pairwise_iou(ANCHORS, box[None]), fg_iou=0.6, bg_iou=(0.0, 0.4), low_quality=True)
    foreground, counted = matches.labels == ops.FOREGROUND, matches.labels != ops.IGNORED
    entropy = optax.sigmoid_binary_cross_entropy(logits, foreground.astype(jnp.float32))
    errors = ops.smooth_l1(deltas - ops.encode(jnp.broadcast_to(box, ANCHORS.shape), ANCHORS)).sum(axis=1)
    return entropy.mean(where=counted) + errors.mean(where=foreground)


@jax.jit
def find(model: RegionScorer, image: jax.Array) -> tuple[jax.Array, ops.Kept]:
    """Returns the boxes of all anchors, and which of them NMS keeps."""
    logits, deltas = model(image)
    boxes = ops.clip(ops.decode(deltas, ANCHORS), (SIDE, SIDE))
    return boxes, ops.nms(boxes, logits, iou_threshold=0.5, max_output=5)


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns noisy images and the box of the bright rectangle in each."""
    images = rng.uniform(0, 0.3, (count, SIDE, SIDE, 1)).astype(np.float32)
    near = rng.integers(0, SIDE - 28, (count, 2))
    boxes = np.concatenate([near, near + rng.integers(14, 28, (count, 2))], axis=1).astype(np.float32)
    for image, (x1, y1, x2, y2) in zip(images, boxes.astype(int), strict=True):
        image[y1:y2, x1:x2] += 0.6
    return images, boxes


def main(steps: int = 200) -> None:
    rng = np.random.default_rng(0)
    model = RegionScorer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: RegionScorer, optimizer: nnx.Optimizer, images: jax.Array, boxes: jax.Array) -> jax.Array:
        def mean_loss(model: RegionScorer) -> jax.Array:
            return jax.vmap(lambda image, box: loss_of(model, image, box))(images, boxes).mean()

        loss, gradients = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradients)
        return loss

    for step in range(1, steps + 1):
        loss = train_step(model, optimizer, *map(jnp.asarray, draw(rng, 8)))
        if step in (1, steps):
            print(f"step {step}: loss {float(loss):.3f}")
    images, truth = draw(rng, 20)
    overlaps = []
    for image, box in zip(images, truth, strict=True):
        boxes, kept = find(model, image)
        overlaps.append(float(ops.pairwise_iou(boxes[kept.indices[:1]], box[None])[0, 0]))
    print(f"IoU of the best box with the rectangle, mean of {len(images)} new images: {np.mean(overlaps):.2f}")


if __name__ == "__main__":
    main()
