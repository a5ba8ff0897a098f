"""Settings of the optimisation and of the processes that share it."""

import dataclasses
import math
from typing import Literal

from fasterrcnn_jax.config.checks import (
    require,
    require_positive,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlternatingConfig:
    """The four stages of alternating training (Ren et al. 2015, arXiv:1506.01497, section 3.2): RPN, detector, RPN,
    detector."""

    steps: tuple[int, int, int, int] = (80000, 40000, 80000, 40000)
    """optimizer steps of each stage"""
    decay_steps: tuple[int, int, int, int] = (60000, 30000, 60000, 30000)
    """of schedule steps: those made in each stage before its learning rate falls"""
    rpn_batch_size: int | None = None
    """images per step of the RPN's stages; None: train.batch_size"""

    def __post_init__(self):
        require_positive(steps=min(self.steps), decay_steps=min(self.decay_steps))
        if self.rpn_batch_size is not None:
            require_positive(rpn_batch_size=self.rpn_batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    scheme: Literal["joint", "alternating", "rpn"] = "joint"
    """what is trained: RPN and box head together, both in four stages, or the RPN alone"""
    alternating: AlternatingConfig = AlternatingConfig()
    """the stages of scheme alternating"""
    steps: int
    """optimizer steps, over all stages"""
    batch_size: int
    """images per step, over all devices and parts"""
    accumulate: int = 1
    """parts that a step's images are cut into, one after the other: less memory; the gradient is the mean of theirs"""
    learning_rate: float
    """peak"""
    schedule: Literal["steps", "cosine"] = "steps"
    """how the learning rate falls from the peak: by decay_factor at each of decay_steps, or as a cosine to zero"""
    decay_steps: tuple[int, ...] = ()
    """of steps: optimizer steps made before each fall"""
    decay_factor: float = 0.1
    """of steps: what the learning rate is multiplied by"""
    warmup_steps: int = 0
    """steps of linear warm-up"""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """momentum SGD or Adam with decay in the gradient, or AdamW with decay beside it"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 5e-4
    """on convolution and matrix weights; never on normalisation"""
    bias_decay: bool = False
    """weight decay on biases too"""
    double_bias: bool = True
    """twice the learning rate on biases"""
    double_objectness: bool = True
    """twice the learning rate and half the decay on the objectness layer: its one logit then moves as the
    difference of the reference's two"""
    layer_decay: float = 1.0
    """the learning rate of each stage of the backbone is multiplied by this once for every stage between it and the
    heads, itself included; 1: one rate everywhere"""
    ema_decay: float | None = None
    """of a moving average of the weights, which evaluation and `load` then use, as 0.9998; None: no average"""
    clip_norm: float | None = None
    """largest global norm of the gradient; None: no limit; 10 for VGG16"""
    seed: int = 0
    """weights, order of the images, flips and samples all follow from it"""
    implementation: Literal["xla", "mosaic"] | None = None
    """of NMS and region features: plain JAX, GPU kernels, or None: the kernels where they can run"""
    checkpoint_every: int = 500
    """steps between checkpoints; the last step is always saved"""
    keep_checkpoints: int = 2
    """newest checkpoints kept, beside the best one"""
    evaluate_every: int = 0
    """steps between evaluations that look for the best checkpoint, a multiple of checkpoint_every; 0: only
    the last step"""
    best_split: str | None = None
    """split they are made on, better one that no result is reported on; None: data.test_split"""
    best_metric: Literal["AP50", "AP"] = "AP50"
    """COCO metric that decides"""

    def __post_init__(self):
        require_positive(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
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
            f"decay_steps must be positive and rise, got {self.decay_steps}",
        )
        require(
            not self.decay_steps or self.schedule == "steps",
            f"decay_steps is for schedule steps, got {self.decay_steps} with {self.schedule}",
        )
        require(0.0 < self.decay_factor <= 1.0, f"decay_factor must be in (0, 1], got {self.decay_factor}")
        require(
            0 <= self.warmup_steps < self.steps,
            f"need 0 <= warmup_steps < steps, got {self.warmup_steps} and {self.steps}",
        )
        require(
            self.evaluate_every >= 0 and self.evaluate_every % self.checkpoint_every == 0,
            "evaluate_every must be a multiple of checkpoint_every, got "
            f"{self.evaluate_every} and {self.checkpoint_every}",
        )

    def _check_stages(self, stages: AlternatingConfig) -> None:
        require(
            self.steps == sum(stages.steps),
            f"steps must be those of the four stages together, got {self.steps} and {stages.steps}",
        )
        require(
            self.warmup_steps < min(stages.steps),
            f"need warmup_steps < steps of each stage, got {self.warmup_steps} and {stages.steps}",
        )
        require(
            not self.decay_steps,
            f"decay_steps of scheme alternating are alternating.decay_steps, got {self.decay_steps} beside them",
        )
        falls = zip(stages.decay_steps, stages.steps, strict=True)
        require(
            self.schedule != "steps" or all(fall < steps for fall, steps in falls),
            f"alternating.decay_steps must lie within alternating.steps, got {stages.decay_steps} and {stages.steps}",
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
    """HOST:PORT of process 0, reachable from all; detect: SLURM, Open MPI or Kubernetes say where it is, how many
    processes there are and which this one is; None: this process alone"""
    num_processes: int | None = None
    """of HOST:PORT: how many processes run"""
    process_id: int | None = None
    """of HOST:PORT: which of them this one is, from 0 on"""

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
        require(
            self.num_processes is not None and self.process_id is not None,
            f"coordinator {self.coordinator} needs num_processes and process_id, "
            f"got {self.num_processes} and {self.process_id}",
        )
        require(
            0 <= self.process_id < self.num_processes,
            f"process_id must be in 0..num_processes - 1, got {self.process_id} of {self.num_processes}",
        )
