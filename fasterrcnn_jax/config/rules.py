"""Rules about fields: which fields have no effect, and which fields may change when a run is continued."""

import dataclasses
import json
from typing import Any

from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.config.model import ModelConfig
from fasterrcnn_jax.config.run import Config
from fasterrcnn_jax.config.text import to_json


def unread_fields(config: Config) -> list[str]:
    """Returns a sentence for each field that has no effect, given the other fields, but is not at its default."""
    model, train = config.model, config.train
    backbone, features = model.backbone, model.roi_features
    operator = features.operator
    is_vgg, is_resnet, has_bottlenecks = (
        backbone.name == "vgg16",
        backbone.name.startswith("resnet"),
        backbone.name in ("resnet50", "resnet101", "resnet152"),
    )
    is_fpn = model.fpn is not None
    # The user's own backbone decides which box head it has, so we cannot tell here which fields have no effect.
    is_own = backbone.own is not None
    is_fc = is_fpn or is_vgg
    is_alternating = train.scheme == "alternating"
    falls = train.schedule if is_alternating else train.scheme
    reads = [
        (backbone, "model.backbone", has_bottlenecks, ("stride_in",), backbone.name),
        (backbone, "model.backbone", is_resnet, ("stem_pool",), backbone.name),
        (
            model.box_head,
            "model.box_head",
            is_own or not is_fc,
            ("summary",),
            "a pyramid" if is_fpn else backbone.name,
        ),
        (
            model.box_head,
            "model.box_head",
            is_own or is_fc,
            ("convs", "layers", "channels", "dropout"),
            backbone.name,
        ),
        (features, "model.roi_features", operator == "align", ("sampling_ratio", "aligned"), operator),
        (features, "model.roi_features", operator == "pool", ("quantisation",), operator),
        (config.data, "data", train.scheme == "fast_rcnn", ("proposals",), train.scheme),
        (features, "model.roi_features", operator == "crop", ("crop_max_pool",), operator),
        (model.rpn, "model.rpn", model.rpn.anchor_sizes is None, ("anchor_base", "anchor_scales"), "anchor_sizes"),
        (
            backbone,
            "model.backbone",
            backbone.fixed_stages == 0,
            ("fixed_stem",),
            f"fixed_stages {backbone.fixed_stages}",
        ),
        (
            model.postprocess,
            "model.postprocess",
            model.postprocess.soft_nms == "gaussian",
            ("soft_nms_sigma",),
            f"soft_nms {model.postprocess.soft_nms}",
        ),
        (train, "train", train.optimizer == "sgd", ("momentum",), train.optimizer),
        (train, "train", train.schedule == "steps", ("decay_factor",), train.schedule),
        (train.alternating, "train.alternating", is_alternating, ("steps", "rpn_batch_size"), train.scheme),
        (
            train.alternating,
            "train.alternating",
            is_alternating and train.schedule == "steps",
            ("decay_steps",),
            falls,
        ),
    ]
    return [
        f"{prefix}.{field.name} = {getattr(part, field.name)!r} changes nothing with {chosen}"
        for part, prefix, is_read, names, chosen in reads
        for field in dataclasses.fields(part)
        if not is_read and field.name in names and getattr(part, field.name) != field.default
    ]


def first_difference(stored: Config, asked: Config) -> str | None:
    """Returns the first difference between two configurations that makes them different runs, or None.

    Paths and intervals between checkpoints may differ: the trained parameters do not depend on them. A run may become
    longer: the steps that are done stay, and the learning rate follows the new schedule from there.

    Args:
      stored: configuration in the checkpoint.
      asked: configuration of the run that is to continue from it.
    """
    old, new = flat_fields(stored), flat_fields(asked)
    indifferent = _INDIFFERENT | (_LENGTH if is_longer(stored, asked) else set())
    for name in old | new:
        if name not in indifferent and old.get(name) != new.get(name):
            return f"{name} = {old.get(name)}, but {new.get(name)} was requested"
    return None


def differences(first: Config | ModelConfig, second: Config | ModelConfig) -> list[tuple[str, object, object]]:
    """Returns (field, value in `first`, value in `second`) of each field that differs, by name; None: no such field."""
    old, new = flat_fields(first), flat_fields(second)
    return [(name, old.get(name), new.get(name)) for name in sorted(old | new) if old.get(name) != new.get(name)]


def is_longer(stored: Config, asked: Config) -> bool:
    """Returns whether `asked` has more steps than `stored`; stages of alternating training cannot become longer."""
    return asked.train.scheme == stored.train.scheme != "alternating" and fitted(
        asked.train.steps, "train.steps"
    ) > fitted(stored.train.steps, "train.steps")


# Fields that may differ where the run becomes longer.
_LENGTH = {"train.steps", "train.epochs", "train.decay_steps", "train.warmup_steps"}
_INDIFFERENT = {
    "run",
    "init",
    "replay",
    "distributed.coordinator",
    "distributed.num_processes",
    "distributed.process_id",
    "model.backbone.remat",
    "data.root",
    "data.proposals",
    "data.test_split",
    "data.threads",
    "data.cache_mb",
    "data.accept_changed",
    "data.max_pixels",
    "data.follow_links",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "train.best_split",
    "train.best_metric",
    "train.patience",
    "train.coco_backend",
    "train.report",
    "train.implementation",
}


def flat_fields(config: Config | ModelConfig) -> dict[str, Any]:
    """Returns the value of every field, as in JSON, by its full name such as `model.rpn.fg_iou`."""
    return _flat(json.loads(to_json(config)))


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
