"""Your own training loop: the detector's losses, and Flax and optax for everything else.

python examples/own_training_loop.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fasterrcnn_jax
from fasterrcnn_jax import models
from fasterrcnn_jax.config import BackboneConfig, ImageConfig, ModelConfig, RoiFeaturesConfig, RpnConfig

IMAGE = ImageConfig(short_side=64, long_side=64, canvases=((64, 64),), channel_order="rgb", std=(60.0, 60.0, 60.0))
CONFIG = ModelConfig(
    image=IMAGE,
    backbone=BackboneConfig(name="resnet18", width=8, norm="group", stem_pool="padded", fixed_stages=0),
    rpn=RpnConfig(anchor_scales=(1.0, 2.0), anchor_rounding="none", allowed_border=None, channels=16),
    roi_features=RoiFeaturesConfig(output_size=4, sampling_ratio=2, aligned=True),
)


def batch_of(rng: np.random.Generator, size: int = 4) -> models.Batch:
    """Returns images with one red or blue square each."""
    images = rng.integers(0, 60, (size, 64, 64, 3), dtype=np.uint8)
    near, labels = rng.integers(0, 40, (size, 2)), rng.integers(1, 3, (size, 1))
    boxes = np.concatenate([near, near + 24], axis=1).astype(np.float32)
    for image, (x, y), (label,) in zip(images, near, labels, strict=True):
        image[y : y + 24, x : x + 24] = ((250, 40, 40), (40, 60, 250))[label - 1]
    pixels, image_hw, scale = map(jnp.asarray, fasterrcnn_jax.preprocess(images, IMAGE))
    truth = models.GroundTruth(jnp.asarray(boxes[:, None]), jnp.asarray(labels, jnp.int32), jnp.ones((size, 1), bool))
    return models.Batch(pixels, image_hw, scale, jnp.arange(size), jnp.ones(size, bool), truth)


def main(steps: int = 150) -> None:
    model = fasterrcnn_jax.create(CONFIG, ("red", "blue"))
    graphdef, params, rest = models.split(model)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def train_step(params, opt_state, batch, key):
        def loss(params):
            terms = models.training_losses(nnx.merge(graphdef, params, rest), batch, key).terms()
            return terms.total, terms

        gradients, terms = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, terms

    rng, opt_state = np.random.default_rng(0), optimizer.init(params)
    for step in range(1, steps + 1):
        params, opt_state, terms = train_step(params, opt_state, batch_of(rng), jax.random.key(step))
        if step in (1, steps):
            print(f"step {step}: " + ", ".join(f"{name} {float(value):.3f}" for name, value in terms._asdict().items()))
    batch = batch_of(rng)
    found = jax.jit(models.detect)(nnx.merge(graphdef, params, rest), batch.images, batch.image_hw, batch.scale)
    right = found.labels[:, 0] == batch.ground_truth.labels[:, 0]
    print(f"best detection of {len(right)} new images: {int(right.sum())} with the right class")


if __name__ == "__main__":
    main()
