"""Fits the settings that are "auto" to a data set: input size, canvases, anchor scales, and the length of training."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fasterrcnn_jax.config import Config, ImageConfig, TrainConfig
from fasterrcnn_jax.config.checks import AUTO, fitted
from fasterrcnn_jax.data.anchor_scales import model_scales
from fasterrcnn_jax.data.check import network_sizes
from fasterrcnn_jax.data.records import Dataset, ImageRecord, large_enough
from fasterrcnn_jax.data.transforms import network_size
from fasterrcnn_jax.errors import InputError

# Input sizes to choose from, the smallest first, and the side that the median object should have on them.
SIZES, OBJECT_SIDE = (320, 448, 640), 16.0
# More canvases than this take longer to compile than they save.
MOST_CANVASES = 3
# A canvas is dropped where the padding that this adds is less than this fraction of all pixels.
LITTLE_PADDING = 0.03
# A training of fitted length has this many passes over the images (the 1x schedule of COCO), or more where that would
# be fewer than FEWEST_STEPS.
EPOCHS, FEWEST_STEPS = 12, 600


class Fitted(NamedTuple):
    config: Config  # without "auto"
    sentences: tuple[str, ...]  # what was fitted, one line each


def fit(config: Config, splits: Iterable[Dataset], train_set: Dataset) -> Fitted:
    """Returns the configuration with every "auto" of the model and the training replaced.

    Args:
      splits: all splits of the run; canvases hold the images of all of them.
      train_set: the images that are trained on, as `prepare_training_set` returns them.
    Raises:
      InputError: there is no image, or no object that anchors can be fitted to.
    """
    if not train_set.records:
        raise InputError(f"{train_set.name}: has no image to train on")
    records, sentences = [record for split in splits for record in split.records], []
    model = config.model
    if config.size is not None:
        size, why = (config.size, "") if config.size != AUTO else fitted_size(train_set.records)
        held = model.image.canvases != AUTO and any(min(canvas) >= size for canvas in model.image.canvases)
        canvases = model.image.canvases if held else AUTO
        image = dataclasses.replace(model.image, short_side=size, long_side=size, canvases=canvases)
        model, config = dataclasses.replace(model, image=image), dataclasses.replace(config, size=size)
        sentences.append(f"input      long side {size} pixels{why}")
    if model.image.canvases == AUTO:
        multiple = 16 if model.fpn is None else 32
        canvases = fitted_canvases([record.image_hw for record in records], model.image, multiple)
        model = dataclasses.replace(model, image=dataclasses.replace(model.image, canvases=canvases))
        shown = ", ".join(f"{height} x {width}" for height, width in canvases)
        sentences.append(f"canvases   {shown} (height x width)")
    if model.rpn.anchor_scales == AUTO:
        sizes = network_sizes(train_set.records, lambda image_hw: network_size(image_hw, model.image))
        if not len(sizes):
            raise InputError(f"{train_set.name}: no object is large enough to fit anchors to")
        scales = model_scales(model, sizes)
        model = dataclasses.replace(model, rpn=dataclasses.replace(model.rpn, anchor_scales=scales))
        sides = ", ".join(f"{model.rpn.anchor_base * scale:.0f}" for scale in scales)
        on = "" if model.fpn is None else " on the finest level"
        sentences.append(f"anchors    sides {sides} pixels{on}")
    if not train_set.records:
        raise InputError(f"{train_set.name}: no image can be trained on")
    train = fitted_training(config.train, len(train_set.records))
    images = len(train_set.records)
    epochs = fitted(train.steps, "train.steps") * train.batch_size / images
    sentences.append(
        f"schedule   {train.steps} steps of {train.batch_size} images: {epochs:.1f} epochs of {images} images; "
        f"a checkpoint every {train.checkpoint_every} steps"
    )
    return Fitted(dataclasses.replace(config, model=model, train=train), tuple(sentences))


def adopted(config: Config, stored: Config) -> Config:
    """Returns the configuration of a run that continues: what is "auto" keeps the value that the run has stored.

    Where the data has changed a little, fitting again would give other values, and so another run. `train.epochs` is
    None where its steps are stored.
    """

    def kept(asked: Any, before: Any, names: Sequence[str]) -> Any:
        values = {name: getattr(before, name) for name in names if getattr(asked, name) == AUTO}
        return dataclasses.replace(asked, **values)

    model, train, image = config.model, config.train, config.model.image
    rpn = kept(model.rpn, stored.model.rpn, ("anchor_scales",))
    if config.size == AUTO:
        sizes = {name: getattr(stored.model.image, name) for name in ("short_side", "long_side", "canvases")}
        image = dataclasses.replace(image, **sizes)
    else:
        image = kept(image, stored.model.image, ("canvases",))
    names = ["warmup_steps", "checkpoint_every", "evaluate_every"]
    if train.epochs is None:
        names.append("steps")
    elif train.epochs == stored.train.epochs:
        # The steps of this number of epochs are fitted to the number of images.
        steps, decay_steps = stored.train.steps, stored.train.decay_steps
        train = dataclasses.replace(train, epochs=None, steps=steps, decay_steps=decay_steps)
    return dataclasses.replace(
        kept(config, stored, ("size",)),
        model=dataclasses.replace(model, rpn=rpn, image=image),
        train=kept(train, stored.train, names),
    )


def fitted_size(records: Sequence[ImageRecord]) -> tuple[int, str]:
    """Returns the smallest of `SIZES` on which the median object has a side of `OBJECT_SIDE` pixels, and why."""
    relative = [
        np.sqrt((record.boxes[kept, 2:] - record.boxes[kept, :2]).prod(axis=1)) / max(record.image_hw)
        for record in records
        if (kept := large_enough(record.boxes) & ~record.crowd).any()
    ]
    median = float(np.median(np.concatenate(relative))) if relative else 1.0
    size = next((size for size in SIZES if median * size >= OBJECT_SIDE), SIZES[-1])
    if size == SIZES[0]:
        return size, ""
    return size, f": the median object would have a side of {median * SIZES[0]:.0f} pixels at {SIZES[0]}"


def fitted_canvases(sizes: Sequence[tuple[int, int]], image: ImageConfig, multiple: int) -> tuple[tuple[int, int], ...]:
    """Returns at most `MOST_CANVASES` canvases for images of these sizes, and one that holds every image.

    Starts with one canvas for each size of the resized images and joins the two whose join adds the least padding,
    until few are left and the next join would add much.

    Args:
      sizes: (height, width) of each image.
      multiple: canvas sides are rounded up to a multiple of it.
    """

    def up(side: int) -> int:
        return -(-side // multiple) * multiple

    counts: dict[tuple[int, int], int] = {}
    for size in sizes:
        height, width = network_size(size, image)
        canvas = up(height), up(width)
        counts[canvas] = counts.get(canvas, 0) + 1
    total = sum(height * width * count for (height, width), count in counts.items())

    def joined(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        return max(a[0], b[0]), max(a[1], b[1])

    def added(a: tuple[int, int], b: tuple[int, int]) -> int:
        height, width = joined(a, b)
        return sum((height * width - canvas[0] * canvas[1]) * counts[canvas] for canvas in (a, b))

    while len(counts) > 1:
        a, b = min(((a, b) for a in counts for b in counts if a < b), key=lambda pair: added(*pair))
        if len(counts) <= MOST_CANVASES and added(a, b) > LITTLE_PADDING * total:
            break
        count = counts.pop(a) + counts.pop(b)
        whole = joined(a, b)
        counts[whole] = counts.get(whole, 0) + count
    needed = [(up(image.short_side), up(image.long_side)), (up(image.long_side), up(image.short_side))]
    others = [side for side in dict.fromkeys(needed) if not any(c[0] >= side[0] and c[1] >= side[1] for c in counts)]
    return (*sorted(counts), *others)


def fitted_training(train: TrainConfig, images: int) -> TrainConfig:
    """Returns the training settings without "auto", for this number of training images."""
    steps, decay_steps = train.steps, train.decay_steps
    if train.epochs is not None:
        steps = max(1, math.ceil(train.epochs * images / train.batch_size))
        if train.steps != AUTO:
            decay_steps = tuple(dict.fromkeys(max(1, round(step * steps / train.steps)) for step in decay_steps))
    elif steps == AUTO:
        steps = max(FEWEST_STEPS, math.ceil(EPOCHS * images / train.batch_size))
    warmup, checkpoint, evaluate = train.warmup_steps, train.checkpoint_every, train.evaluate_every
    if warmup == AUTO:
        warmup = min(500, steps // 20)
    if checkpoint == AUTO:
        checkpoint = min(1000, math.ceil(steps / 6))
    if evaluate == AUTO:
        # About ten evaluations: in a long training every checkpoint would be too many.
        evaluate = checkpoint * math.ceil(steps / (10 * checkpoint))
    return dataclasses.replace(
        train,
        steps=steps,
        decay_steps=decay_steps,
        warmup_steps=warmup,
        checkpoint_every=checkpoint,
        evaluate_every=evaluate,
    )
