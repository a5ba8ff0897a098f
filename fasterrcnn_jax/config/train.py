"""Settings of the optimisation, and of the processes of a distributed run."""

import dataclasses
import math
from typing import Literal

from fasterrcnn_jax.config.checks import (
    AUTO,
    Auto,
    require,
    require_positive,
)

CocoBackend = Literal["pycocotools", "faster-coco-eval"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlternatingConfig:
    """The four stages of alternating training (Ren et al. 2015, arXiv:1506.01497, section 3.2): RPN, detector, RPN,
    detector."""

    steps: tuple[int, int, int, int] = (80000, 40000, 80000, 40000)
    """optimizer steps of each stage"""
    decay_steps: tuple[int, int, int, int] = (60000, 30000, 60000, 30000)
    """schedule steps: number of optimizer steps in each stage before its learning rate falls"""
    rpn_batch_size: int | None = None
    """images per optimizer step in the two RPN stages; None: train.batch_size"""

    def __post_init__(self):
        require_positive(steps=min(self.steps), decay_steps=min(self.decay_steps))
        if self.rpn_batch_size is not None:
            require_positive(rpn_batch_size=self.rpn_batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the optimisation."""

    scheme: Literal["joint", "alternating", "rpn", "fast_rcnn"] = "joint"
    """parts to train: joint: backbone, RPN and box head together; alternating: the same parts in four stages, RPN and
    box head in turn, with the backbone in the first two; rpn: backbone and RPN; fast_rcnn: backbone and box head, on
    the proposals in data.proposals"""
    alternating: AlternatingConfig = AlternatingConfig()
    """stages of scheme alternating"""
    steps: int | Auto
    """number of optimizer steps, over all stages; auto: as many as train.epochs takes, or else fitted to the number of
    training images"""
    epochs: float | None = None
    """number of passes over the training images, instead of train.steps; decay_steps are scaled with it"""
    batch_size: int
    """images per optimizer step, over all devices and micro-batches"""
    accumulate: int = 1
    """number of micro-batches that each batch is split into; they run one after the other, which saves memory; the
    gradient is the mean of their gradients"""
    learning_rate: float
    """peak learning rate"""
    schedule: Literal["steps", "cosine"] = "steps"
    """how the learning rate falls from the peak: by decay_factor at each of decay_steps, or as a cosine to zero"""
    decay_steps: tuple[int, ...] = ()
    """schedule steps: numbers of optimizer steps after which the learning rate falls"""
    decay_factor: float = 0.1
    """schedule steps: factor on the learning rate at each fall"""
    warmup_steps: int | Auto = 0
    """number of optimizer steps in which the learning rate rises linearly to its peak; auto: a twentieth of the steps,
    at most 500"""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """sgd: SGD with momentum; adam: Adam; both add the weight decay to the gradient; adamw: AdamW, with decoupled
    weight decay"""
    momentum: float = 0.9
    """momentum of SGD"""
    weight_decay: float = 5e-4
    """weight decay of convolution and matrix weights; normalisation layers never decay"""
    bias_decay: bool = False
    """apply weight decay to biases too"""
    double_bias: bool = True
    """train biases at twice the learning rate"""
    double_objectness: bool = True
    """train the objectness layer at twice the learning rate and half the weight decay, so that its one logit moves like
    the difference of the reference's two logits"""
    layer_decay: float = 1.0
    """factor on the learning rate of a backbone stage, applied once for each stage from it to the heads, itself
    included; 1: the same learning rate everywhere"""
    ema_decay: float | None = None
    """decay of a moving average of the weights, for example 0.9998; evaluation and `load` then use the average; None:
    no average"""
    clip_norm: float | None = None
    """largest global norm of the gradient, 10 for VGG16; None: no limit"""
    seed: int = 0
    """random seed of the initial weights, the order of the images, the flips and the samples"""
    implementation: Literal["xla", "mosaic"] | None = None
    """implementation of NMS and region features: xla: plain JAX; mosaic: GPU kernels; None: GPU kernels where they can
    run"""
    checkpoint_every: int | Auto = 500
    """steps between checkpoints; the last step is always saved; auto: a sixth of the steps, at most 1000"""
    keep_checkpoints: int = 2
    """number of newest checkpoints to keep, in addition to the best one"""
    evaluate_every: int | Auto = 0
    """steps between the evaluations that select the best checkpoint, a multiple of checkpoint_every; 0: evaluate only
    after the last step; auto: at every checkpoint, or less often so that there are about ten"""
    patience: int | None = None
    """end the training after this many evaluations in a row whose best_metric is below the best one; None: never"""
    best_split: str | None = None
    """split that selects the best checkpoint; it should not be a split on which you report results; None:
    data.test_split"""
    best_metric: Literal["AP50", "AP"] = "AP50"
    """COCO metric that selects the best checkpoint"""
    report: Literal["end", "each", "off"] = "end"
    """when RUN/report.html is written: end: after the training; each: after each evaluation too; off: never"""
    coco_backend: CocoBackend = "pycocotools"
    """package that computes COCO's metrics; both give the same numbers; faster-coco-eval takes less time and is
    installed by the extra of that name"""

    def __post_init__(self):
        require_positive(
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            keep_checkpoints=self.keep_checkpoints,
            **{name: getattr(self, name) for name in ("steps", "checkpoint_every") if getattr(self, name) != AUTO},
        )
        if self.epochs is not None:
            require_positive(epochs=self.epochs)
            require(math.isfinite(self.epochs), f"epochs must be finite, got {self.epochs}")
            require(self.scheme != "alternating", f"epochs is not for scheme alternating, got {self.epochs}")
        if self.patience is not None:
            require_positive(patience=self.patience)
            require(self.evaluate_every != 0, f"patience needs evaluate_every, got {self.patience} with 0")
        require(math.isfinite(self.learning_rate), f"learning_rate must be finite, got {self.learning_rate}")
        if self.scheme == "alternating":
            self._check_stages(self.alternating)
        require(0.0 <= self.momentum < 1.0, f"momentum must be in [0, 1), got {self.momentum}")
        require(self.weight_decay >= 0.0, f"weight_decay must not be negative, got {self.weight_decay}")
        require_positive(accumulate=self.accumulate, layer_decay=self.layer_decay)
        require(
            self.batch_size % self.accumulate == 0,
            f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}",
        )
        require(self.layer_decay <= 1.0, f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.ema_decay is not None:
            require(0.0 < self.ema_decay < 1.0, f"ema_decay must be in (0, 1), got {self.ema_decay}")
        require(0 <= self.seed < 2**32, f"seed must be in [0, 2^32), got {self.seed}")
        if self.clip_norm is not None:
            require_positive(clip_norm=self.clip_norm)
        require(
            list(self.decay_steps) == sorted(set(self.decay_steps)) and min(self.decay_steps, default=1) >= 1,
            f"decay_steps must be positive and strictly increasing, got {self.decay_steps}",
        )
        require(
            not self.decay_steps or self.schedule == "steps",
            f"decay_steps is for schedule steps, got {self.decay_steps} with {self.schedule}",
        )
        require(0.0 < self.decay_factor <= 1.0, f"decay_factor must be in (0, 1], got {self.decay_factor}")
        if self.warmup_steps != AUTO:
            require(
                0 <= self.warmup_steps and (self.steps == AUTO or self.warmup_steps < self.steps),
                f"need 0 <= warmup_steps < steps, got {self.warmup_steps} and {self.steps}",
            )
        require(
            self.checkpoint_every != AUTO or self.evaluate_every in (0, AUTO),
            f"evaluate_every must be 0 or auto where checkpoint_every is auto, got {self.evaluate_every}",
        )
        if self.evaluate_every != AUTO and self.checkpoint_every != AUTO:
            require(
                self.evaluate_every >= 0 and self.evaluate_every % self.checkpoint_every == 0,
                "evaluate_every must be a multiple of checkpoint_every, got "
                f"{self.evaluate_every} and {self.checkpoint_every}",
            )

    def _check_stages(self, stages: AlternatingConfig) -> None:
        require(
            self.steps == sum(stages.steps),
            f"steps must be the sum of alternating.steps, got {self.steps} and {stages.steps}",
        )
        require(
            self.warmup_steps == AUTO or self.warmup_steps < min(stages.steps),
            f"warmup_steps must be less than the steps of each stage, got {self.warmup_steps} and {stages.steps}",
        )
        require(
            not self.decay_steps,
            f"scheme alternating uses alternating.decay_steps; decay_steps must be empty, got {self.decay_steps}",
        )
        falls = zip(stages.decay_steps, stages.steps, strict=True)
        require(
            self.schedule != "steps" or all(fall < steps for fall, steps in falls),
            "each of alternating.decay_steps must be less than its alternating.steps, got "
            f"{stages.decay_steps} and {stages.steps}",
        )
        rpn_batch_size = stages.rpn_batch_size or self.batch_size
        require(
            rpn_batch_size % self.accumulate == 0,
            f"alternating.rpn_batch_size must be a multiple of accumulate, got {rpn_batch_size} and {self.accumulate}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of one run, usually one per host or per GPU; docs/scaling.md."""

    coordinator: str | None = None
    """HOST:PORT of process 0, reachable from every host; detect: SLURM, Open MPI or Kubernetes provide it, together
    with num_processes and process_id; None: a single process"""
    num_processes: int | None = None
    """number of processes, needed with coordinator HOST:PORT"""
    process_id: int | None = None
    """number of this process, from 0, needed with coordinator HOST:PORT"""

    def __post_init__(self):
        if self.coordinator in (None, "detect"):
            for name in ("num_processes", "process_id"):
                value = getattr(self, name)
                require(value is None, f"{name} is for coordinator HOST:PORT, got {value} with {self.coordinator}")
            return
        host, _, port = self.coordinator.rpartition(":")
        require(
            bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16,
            f"coordinator must be HOST:PORT or detect, got {self.coordinator!r}",
        )
        if self.num_processes is None or self.process_id is None:
            raise ValueError(
                f"coordinator {self.coordinator} needs num_processes and process_id, "
                f"got {self.num_processes} and {self.process_id}"
            )
        require(
            0 <= self.process_id < self.num_processes,
            f"process_id must be in 0..num_processes - 1, got {self.process_id} of {self.num_processes}",
        )
