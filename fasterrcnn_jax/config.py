"""Every setting, as frozen dataclasses: hashable, so the parts that shape a program are static arguments.

The docstring under a field is its help text on the command line. A config file is Python that builds
one `Config` named `config`; a checkpoint holds it as JSON. Nothing is looked up by an unchecked string:
a misspelt field is an error wherever it comes from.
"""

import dataclasses
import json
import math
import runpy
from pathlib import Path
from typing import Any, Literal, get_args

import typeguard

from fasterrcnn_jax.box_coder import Weights
from fasterrcnn_jax.errors import InputError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_fraction(**fields: float) -> None:
    for name, value in fields.items():
        _require(0.0 <= value <= 1.0, f"{name} must be in [0, 1], got {value}")


def _require_positive(**fields: float) -> None:
    for name, value in fields.items():
        _require(value > 0, f"{name} must be positive, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How a picture becomes network input. Part of the model: weights fit one preprocessing."""

    short_side: int = 600
    """pixels that the shorter side is resized to"""
    long_side: int = 1000
    """the longer side never exceeds this; the shorter one then stays below short_side"""
    canvases: tuple[tuple[int, int], ...] = ((608, 1024), (1024, 608))
    """padded (height, width); a picture goes onto the smallest it fits; one compilation each"""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """subtracted from RGB in 0..255"""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """divides after the subtraction"""

    def __post_init__(self):
        _require_positive(short_side=self.short_side, std=min(self.std))
        _require(
            self.long_side >= self.short_side,
            f"long_side must be at least short_side, got {self.long_side} < {self.short_side}",
        )
        for needed in ((self.short_side, self.long_side), (self.long_side, self.short_side)):
            _require(
                any(h >= needed[0] and w >= needed[1] for h, w in self.canvases),
                f"no canvas of {self.canvases} holds a picture of {needed[0]} x {needed[1]} pixels",
            )
        for canvas in self.canvases:
            _require(
                min(canvas) > 0 and canvas[0] % 16 == 0 and canvas[1] % 16 == 0,
                f"canvas sides must be positive multiples of 16, got {canvas}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """ResNet-C4 (He et al. 2015, arXiv:1512.03385): stages 1-3 shared, stage 4 per region."""

    depth: Literal[18, 34, 50, 101, 152] = 101
    """number of layers; basic blocks up to 34, bottlenecks from 50 on"""
    width: int = 64
    """channels of the stem; 64 is the published net, less makes a thinner one"""
    stride: Literal[8, 16] = 16
    """network pixels per feature cell; 8 keeps small objects apart at four times the cost"""
    norm: Literal["group", "frozen_batch"] = "frozen_batch"
    """group for training from nothing, frozen_batch with weights from outside"""
    mask_padding: bool = False
    """zero the padding after every layer and leave it out of group statistics, so that results do not
    depend on it; on for training from nothing, off for weights trained without"""

    def __post_init__(self):
        _require(
            self.width >= 8 and self.width % 8 == 0,
            f"width must be a positive multiple of 8, got {self.width}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RpnConfig:
    """Region proposal network (Ren et al. 2015, arXiv:1506.01497, section 3.1)."""

    anchor_sizes: tuple[float, ...] = (128.0, 256.0, 512.0)
    """square roots of the anchors' areas, in pixels of the network input"""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """height / width"""
    channels: int = 512
    """of the 3x3 convolution"""
    fg_iou: float = 0.7
    """an anchor at this IoU with a box is foreground"""
    bg_iou: float = 0.3
    """an anchor below this IoU with every box is background"""
    anchors_per_image: int = 256
    """sampled for the loss"""
    fg_fraction: float = 0.5
    """at most this part of the sample is foreground"""
    sigma: float = 3.0
    """smooth L1: quadratic below 1 / sigma^2"""

    def __post_init__(self):
        _require_fraction(fg_iou=self.fg_iou, bg_iou=self.bg_iou, fg_fraction=self.fg_fraction)
        _require(
            0 < self.bg_iou <= self.fg_iou,
            f"need 0 < bg_iou <= fg_iou, got {self.bg_iou} and {self.fg_iou}",
        )
        _require(bool(self.anchor_sizes and self.anchor_ratios), "anchor_sizes and anchor_ratios are empty")
        _require_positive(
            anchor_sizes=min(self.anchor_sizes),
            anchor_ratios=min(self.anchor_ratios),
            channels=self.channels,
            anchors_per_image=self.anchors_per_image,
            sigma=self.sigma,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProposalConfig:
    """From anchors to proposals."""

    pre_nms_top_n: int
    """best boxes that enter NMS"""
    post_nms_top_n: int
    """proposals per image, padding included"""
    nms_threshold: float = 0.7
    """IoU above which the lower-scored box goes"""
    min_size: float = 16.0
    """shorter sides drop, in pixels of the network input"""

    def __post_init__(self):
        _require(
            self.pre_nms_top_n >= self.post_nms_top_n >= 1,
            f"need pre_nms_top_n >= post_nms_top_n >= 1, got {self.pre_nms_top_n}, {self.post_nms_top_n}",
        )
        _require_fraction(nms_threshold=self.nms_threshold)
        _require_positive(nms_threshold=self.nms_threshold, min_size=self.min_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoiSamplingConfig:
    """Which proposals train the box head, and towards what."""

    rois_per_image: int = 128
    """sampled for the loss"""
    fg_fraction: float = 0.25
    """at most this part of the sample is foreground"""
    fg_iou: float = 0.5
    """a RoI at this IoU with a box is foreground"""
    bg_iou: tuple[float, float] = (0.0, 0.5)
    """background lies in [low, high)"""
    box_weights: Weights = (10.0, 10.0, 5.0, 5.0)
    """multiply the box targets: the reciprocal of the stds 0.1, 0.1, 0.2, 0.2"""
    sigma: float = 1.0
    """smooth L1: quadratic below 1 / sigma^2"""

    def __post_init__(self):
        _require_fraction(fg_iou=self.fg_iou, fg_fraction=self.fg_fraction)
        _require(
            0.0 <= self.bg_iou[0] < self.bg_iou[1] <= self.fg_iou,
            f"need 0 <= bg_iou[0] < bg_iou[1] <= fg_iou, got {self.bg_iou} and {self.fg_iou}",
        )
        _require_positive(
            rois_per_image=self.rois_per_image, sigma=self.sigma, box_weights=min(self.box_weights)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoiAlignConfig:
    """Features of a region (He et al. 2017, arXiv:1703.06870, section 3)."""

    output_size: int = 14
    """cells per side; stage 4 halves it"""
    sampling_ratio: int = 2
    """samples per cell and axis"""

    def __post_init__(self):
        _require_positive(output_size=self.output_size, sampling_ratio=self.sampling_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxHeadConfig:
    """ResNet stage 4 on each region, then one linear layer for classes and one for deltas."""

    summary: Literal["mean", "flatten"] = "mean"
    """how the cells of stage 4 become one vector: mean is published and suits pretrained weights; flatten
    keeps where in the region a feature lies, without which a net trained from nothing learns slowly"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """From class probabilities to detections."""

    score_threshold: float = 0.05
    """detections at or below it go"""
    nms_threshold: float = 0.3
    """IoU above which the lower-scored box of a class goes"""
    max_detections: int = 100
    """per image, over all classes"""

    def __post_init__(self):
        _require_fraction(score_threshold=self.score_threshold, nms_threshold=self.nms_threshold)
        _require_positive(nms_threshold=self.nms_threshold, max_detections=self.max_detections)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that shapes the network and its programs."""

    image: ImageConfig = ImageConfig()
    backbone: BackboneConfig = BackboneConfig()
    rpn: RpnConfig = RpnConfig()
    train_proposals: ProposalConfig = ProposalConfig(pre_nms_top_n=12000, post_nms_top_n=2000)
    test_proposals: ProposalConfig = ProposalConfig(pre_nms_top_n=6000, post_nms_top_n=300)
    roi_sampling: RoiSamplingConfig = RoiSamplingConfig()
    roi_align: RoiAlignConfig = RoiAlignConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    postprocess: PostprocessConfig = PostprocessConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """The embedded data set, drawn on first use."""

    num_train: int = 600
    """training images"""
    num_test: int = 150
    """held-out images"""
    seed: int = 0
    """another seed draws other pictures"""

    def __post_init__(self):
        _require_positive(num_train=self.num_train, num_test=self.num_test)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Labelled images: a folder in VOC layout."""

    root: Path
    """holds JPEGImages, Annotations and ImageSets/Main"""
    class_names: tuple[str, ...] = ()
    """the objects' names in the annotations, without background"""
    train_split: str = "train"
    """ImageSets/Main/NAME.txt to train on"""
    test_split: str = "test"
    """ImageSets/Main/NAME.txt to evaluate on"""
    max_boxes: int = 100
    """ground-truth slots per image; a picture with more boxes is an error that says so"""
    random_flip: bool = True
    """mirror each training image with probability one half"""
    shapes: ShapesConfig | None = None
    """draw the embedded data set into root when it is not there yet"""

    def __post_init__(self):
        _require_positive(max_boxes=self.max_boxes)
        repeated = {name for name in self.class_names if self.class_names.count(name) > 1}
        _require(not repeated, f"class_names holds {sorted(repeated)} more than once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    steps: int
    """optimizer steps"""
    batch_size: int
    """images per step, over all devices"""
    learning_rate: float
    """peak; linear warm-up before, cosine to zero after"""
    warmup_steps: int
    """steps of linear warm-up"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """momentum SGD with decay in the gradient, or AdamW with decay beside it"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 1e-4
    """on convolution and matrix weights; none on biases and normalisation"""
    clip_norm: float = 10.0
    """largest global norm of the gradient"""
    seed: int = 0
    """weights, order of the images, flips and samples all follow from it"""
    checkpoint_every: int = 500
    """steps between checkpoints; the last step is always saved"""
    keep_checkpoints: int = 2
    """newest checkpoints kept, beside the best one"""
    evaluate_every: int = 0
    """steps between evaluations that look for the best checkpoint, a multiple of checkpoint_every; 0: only
    the last step"""
    best_split: str | None = None
    """ImageSets/Main/NAME.txt they are made on, better one that no result is reported on; None: data.test_split"""
    best_metric: Literal["AP50", "AP"] = "AP50"
    """COCO metric that decides"""

    def __post_init__(self):
        _require_positive(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            clip_norm=self.clip_norm,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        _require(
            math.isfinite(self.learning_rate), f"learning_rate must be finite, got {self.learning_rate}"
        )
        _require(0.0 <= self.momentum < 1.0, f"momentum must be in [0, 1), got {self.momentum}")
        _require(self.weight_decay >= 0.0, f"weight_decay must not be negative, got {self.weight_decay}")
        _require(0 <= self.seed < 2**32, f"seed must be in [0, 2^32), got {self.seed}")
        _require(
            0 <= self.warmup_steps < self.steps,
            f"need 0 <= warmup_steps < steps, got {self.warmup_steps} and {self.steps}",
        )
        _require(
            self.evaluate_every >= 0 and self.evaluate_every % self.checkpoint_every == 0,
            "evaluate_every must be a multiple of checkpoint_every, got "
            f"{self.evaluate_every} and {self.checkpoint_every}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    run: Path
    """folder of the run: configuration, metrics, checkpoints, pictures"""


def load_config(path: Path) -> Config:
    """Returns the `config` that the Python file at `path` builds.

    Raises:
      InputError: the file is absent, fails, or holds no `Config` of the declared types.
    """
    if not path.is_file():
        raise InputError(f"--config {path}: no such file")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise InputError(f"--config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise InputError(f"--config {path}: defines no `config` of type Config")
    check_types(config, str(path))
    return config


def check_types(config: Any, name: str) -> None:
    """Raises InputError naming the first field, depth first, whose value is not of its declared type."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        where = f"{name}.{field.name}" if ":" in name else f"{name}: {field.name}"
        try:
            # Every item: by default it is the first alone.
            typeguard.check_type(
                value, field.type, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS
            )
        except typeguard.TypeCheckError:
            raise InputError(f"{where} must be {field.type}, got {value!r}") from None
        if dataclasses.is_dataclass(value):
            check_types(value, where)


def to_json(config: Config) -> str:
    """Returns the configuration as JSON text; inverse of `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str, name: str) -> Config:
    """Returns the configuration that `to_json` wrote.

    Args:
      name: where the text stands, for messages.
    Raises:
      InputError: not JSON, a field is missing, unknown or invalid.
    """
    try:
        config = _build(Config, json.loads(text), "config")
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: this configuration cannot be read: {error}") from error
    check_types(config, name)
    return config


def first_difference(stored: Config, asked: Config) -> str | None:
    """Returns what makes another run of the one stored, for a message, or None.

    Where files lie and how often something is saved do not: the parameters come out the same.
    """
    old, new = (_flat(json.loads(to_json(config))) for config in (stored, asked))
    for name in old | new:
        if name not in _INDIFFERENT and old.get(name) != new.get(name):
            return f"{name} = {old.get(name)} where {new.get(name)} is asked for"
    return None


_INDIFFERENT = {
    "run",
    "data.root",
    "data.test_split",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "train.best_split",
    "train.best_metric",
}


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _build(cls: type, values: dict[str, Any], name: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold fields, got {values!r}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(unknown)}")
    built = {}
    for field, value in values.items():
        # A field holds fields itself where its type, or one alternative of it, is one of the classes above.
        alternatives = (known[field].type, *get_args(known[field].type))
        nested = next(filter(dataclasses.is_dataclass, alternatives), None)
        if nested is not None and value is not None:
            built[field] = _build(nested, value, f"{name}.{field}")
        elif known[field].type is Path:
            built[field] = Path(value)
        else:
            built[field] = _tuples(value)
    return cls(**built)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
