"""Non-maximum suppression with fixed sizes: greedy (`nms`, `batched_nms`), and by lower scores (`soft_nms`).

Both implementations of `nms` keep this contract:
- valid boxes are visited by descending score, boxes of equal score by ascending index; invalid boxes are not visited;
- a kept box suppresses a later box of its group if the float32 `intersection / union` of the two exceeds the
  threshold rounded *down* to float32 (this equals torchvision on a CPU, which compares with a double);
- the first `max_output` kept indices are returned, with their validity; padding has index 0.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Real

from fasterrcnn_jax.config.model import SoftNms
from fasterrcnn_jax.kernels import choice
from fasterrcnn_jax.kernels import nms as kernel
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.ops import suppression_on_cpu
from fasterrcnn_jax.ops.boxes import pairwise_iou
from fasterrcnn_jax.ops.inputs import AnyArray, box_array, one_per_box, real_array, validity, whole_numbers

# Boxes decided per iteration: large enough to keep a core's vector units busy, small enough that comparing the pairs
# inside a block costs little compared to comparing the block with the boxes kept before.
BLOCK = 256


class Kept(NamedTuple):
    """The boxes that NMS keeps, best first, in fixed shapes."""

    indices: Int[Array, "k"]  # of the given boxes; 0 in padding
    valid: Bool[Array, "k"]  # False: padding


class SoftKept(NamedTuple):
    """The boxes that Soft-NMS keeps, best first, in fixed shapes."""

    indices: Int[Array, "k"]  # of the given boxes; 0 in padding
    scores: Float[Array, "k"]  # lowered; 0 in padding
    valid: Bool[Array, "k"]  # False: padding


@jax.named_scope("nms")
def nms(
    boxes: Real[AnyArray, "n 4"],
    scores: Real[AnyArray, "n"],
    valid: Bool[AnyArray, "n"] | None = None,
    *,
    iou_threshold: float,
    max_output: int | None = None,
    groups: Int[AnyArray, "n"] | None = None,
    implementation: Implementation = None,
) -> Kept:
    """Returns the indices of the `max_output` best boxes that survive, and which of these entries are valid.

    No gradient passes. `jax.vmap` maps it over a batch of images. Under `jax.jit`, `iou_threshold` and `max_output` are
    static.

    Examples:
      >>> kept = nms(np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]]), np.array([0.7, 0.9, 0.8]),
      ...            iou_threshold=0.5)
      >>> kept
      Kept(indices=Array([1, 2, 0], dtype=int32), valid=Array([ True,  True, False], dtype=bool))
      >>> kept.indices[kept.valid]
      Array([1, 2], dtype=int32)

    Args:
      boxes: float32; float64 and integers are converted; 16-bit boxes are refused.
      scores: of any type; NaN comes last.
      valid: False for padding among the boxes, which is never kept. None: there is no padding.
      max_output: the number of entries. None: as many as there are boxes.
      groups: boxes of different groups never suppress each other (classes, pyramid levels). Boxes are visited by
        score over all groups, so the result holds the best survivors of all groups. None: all are in one group.
      implementation: "xla" is plain JAX. "mosaic" is the kernel; `vmap` of it makes one batch of all mapped
        problems. None: the kernel if it can run, otherwise plain JAX.
    Raises:
      NotImplementedError: `implementation` is "mosaic" and the kernel cannot run.
      TypeError: an array is of another type; boxes of 16 bits are refused.
      ValueError: an array has another shape, `iou_threshold` is not in (0, 1], `max_output` is not positive, or
        `implementation` has an unknown value.
    """
    one_group = groups is None
    boxes, scores, valid, groups = _inputs(boxes, scores, valid, groups)
    _check_limits(iou_threshold, max_output)
    max_output = boxes.shape[0] if max_output is None else max_output
    if boxes.shape[0] == 0:
        return Kept(jnp.zeros(max_output, jnp.int32), jnp.zeros(max_output, bool))
    boxes, scores = lax.stop_gradient((boxes, scores))
    threshold = _rounded_down(iou_threshold)
    unsupported = kernel.unsupported(len(boxes), max_output)
    if choice.choose("nms", implementation, unsupported=unsupported, check=_kernel_differs) == "mosaic":
        order, (boxes, groups, num_valid) = _sorted(boxes, scores, valid, groups)
        batch_of_one = boxes[None], None if one_group else groups[None], num_valid[None]
        kept, count = (x[0] for x in kernel.keep_first(threshold, max_output)(*batch_of_one))
        indices = order[kept]
    else:
        indices, count = _plain(boxes, scores, valid, groups, threshold, max_output)
    is_kept = jnp.arange(max_output) < count
    return Kept(jnp.where(is_kept, indices, 0), is_kept)


def _kernel_differs() -> str | None:
    """Returns how the kernel's results differ from those of plain JAX for a few boxes, in both of its designs."""
    rng = np.random.default_rng(0)
    # The mask has tiles of 128 boxes, and compares the boxes of different tiles in a kernel of its own.
    count = 300
    corners = rng.uniform(0.0, 80.0, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(4.0, 30.0, (count, 2))], axis=1).astype(np.float32)
    scores, valid = rng.random(count, np.float32), rng.random(count) < 0.9
    for max_output in (count, 8):
        for groups in (None, rng.integers(0, 2, count).astype(np.int32)):
            options: dict[str, Any] = dict(iou_threshold=0.5, max_output=max_output, groups=groups)
            kept = [nms(boxes, scores, valid, implementation=one, **options) for one in ("mosaic", "xla")]
            if not all(np.array_equal(*each) for each in zip(*kept, strict=True)):
                return f"the kernel keeps other boxes than plain JAX if it may keep {max_output} of {count}"
    return None


def batched_nms(
    boxes: Real[AnyArray, "n 4"],
    scores: Real[AnyArray, "n"],
    groups: Int[AnyArray, "n"],
    valid: Bool[AnyArray, "n"] | None = None,
    *,
    iou_threshold: float,
    max_output: int | None = None,
    implementation: Implementation = None,
) -> Kept:
    """Returns what `nms` returns with `groups`: boxes of different classes or levels never suppress each other.

    Pairs of different groups are never compared, so there is no offset between classes that could cost precision.

    Examples:
      >>> batched_nms(np.array([[0, 0, 10, 10], [1, 0, 11, 10]]), np.array([0.7, 0.9]), np.array([1, 2]),
      ...             iou_threshold=0.5)
      Kept(indices=Array([1, 0], dtype=int32), valid=Array([ True,  True], dtype=bool))

    Args:
      groups: integers, such as the label of each box.
    Raises:
      NotImplementedError, TypeError, ValueError: as in `nms`.
    """
    return nms(
        boxes,
        scores,
        valid,
        iou_threshold=iou_threshold,
        max_output=max_output,
        groups=groups,
        implementation=implementation,
    )


def _inputs(boxes: Any, scores: Any, valid: Any, groups: Any) -> tuple[Array, Array, Array, Array]:
    boxes = box_array(boxes, one_list=True)
    count = boxes.shape[0]
    scores = one_per_box(scores, "scores", count)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        scores = real_array(scores, "scores")
    return boxes, scores, validity(valid, count), whole_numbers(groups, "groups", count)


def _check_limits(iou_threshold: float, max_output: int | None) -> None:
    if not 0.0 < iou_threshold <= 1.0:
        raise ValueError(f"iou_threshold must be in (0, 1], got {iou_threshold}")
    if max_output is not None and max_output < 1:
        raise ValueError(f"max_output must be at least 1, got {max_output}")


def _rounded_down(threshold: float) -> np.float32:
    nearest = np.float32(threshold)
    return nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(0.0))


def _sorted(
    boxes: Float[Array, "n 4"], scores: Float[Array, "n"], valid: Bool[Array, "n"], groups: Int[Array, "n"]
) -> tuple[Int[Array, "n"], tuple[Float[Array, "n 4"], Int[Array, "n"], Int[Array, ""]]]:
    """Returns the order in which boxes are visited, and the boxes and groups in this order and the number of valid."""
    index = jnp.arange(boxes.shape[0], dtype=jnp.int32)
    _, order = lax.sort((_visiting_keys(scores, valid), index), num_keys=1, is_stable=True)
    return order, (boxes[order], groups[order], valid.sum(dtype=jnp.int32))


def _visiting_keys(scores: Float[Array, "n"], valid: Bool[Array, "n"]) -> Int[Array, "n"]:
    """Returns whole numbers that ascend from the best score to the lowest, then NaN, then invalid boxes.

    A sort by one key has two operands; with a key for the validity it has three, which costs a GPU registers.
    """
    if scores.dtype.itemsize < 4:
        scores = scores.astype(jnp.float32)  # exactly
    descending = jnp.where(jnp.isnan(scores), jnp.nan, jnp.where(scores == 0, 0, -scores))
    kind = jnp.int32 if scores.dtype.itemsize == 4 else jnp.int64
    largest = jnp.iinfo(kind).max
    bits = lax.bitcast_convert_type(descending, kind)
    # The bits of negative values descend; those of NaN are above infinity's and below the largest.
    return jnp.where(valid, jnp.where(bits < 0, bits ^ largest, bits), largest)


# Compiled once for each threshold, number and shape, also where `nms` is called outside of `jax.jit`.
@functools.partial(jax.jit, static_argnums=(4, 5))
def _plain(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, "n"],
    valid: Bool[Array, "n"],
    groups: Int[Array, "n"],
    threshold: np.float32,
    max_output: int,
) -> tuple[Int[Array, "{max_output}"], Int[Array, ""]]:
    """Returns the indices of the kept boxes and their number, on the device that the program is compiled for."""
    return lax.platform_dependent(
        *(boxes, scores, valid, groups),
        cpu=suppression_on_cpu.keep_first(threshold, max_output),
        default=functools.partial(_keep_first, threshold=threshold, max_output=max_output),
    )


def _keep_first(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, "n"],
    valid: Bool[Array, "n"],
    groups: Int[Array, "n"],
    *,
    threshold: np.float32,
    max_output: int,
) -> tuple[Int[Array, "{max_output}"], Int[Array, ""]]:
    """Returns the indices of the kept boxes and their number. It has few launches, for GPUs."""
    order, sorted_boxes = _sorted(boxes, scores, valid, groups)
    kept, count = _keep(*sorted_boxes, threshold, max_output)
    return order[kept], count


def _keep(
    boxes: Float[Array, "n 4"],
    groups: Int[Array, "n"],
    num_valid: Int[Array, ""],
    threshold: np.float32,
    max_output: int,
) -> tuple[Int[Array, "{max_output}"], Int[Array, ""]]:
    """Returns the positions of the kept boxes and their number.

    Decides sorted boxes block by block until `max_output` boxes are kept or no box is left.
    """
    block = min(BLOCK, boxes.shape[0])
    padding = -boxes.shape[0] % block
    boxes = jnp.pad(kernel.with_area(boxes), ((0, 0), (0, padding)))
    groups = jnp.pad(groups, (0, padding))
    offsets = jnp.arange(block, dtype=jnp.int32)
    earlier = offsets[:, None] < offsets[None, :]

    def suppresses(boxes, groups, other_boxes, other_groups):
        boxes, others = boxes[:, :, None], other_boxes[:, None, :]
        return kernel.suppresses(boxes, groups[:, None], others, other_groups[None, :], threshold)

    def unfinished(carry):
        start, count, *_ = carry
        return (start < num_valid) & (count < max_output)

    def decide_block(carry):
        start, count, kept, kept_boxes, kept_groups = carry
        block_boxes = lax.dynamic_slice_in_dim(boxes, start, block, axis=1)
        block_groups = lax.dynamic_slice_in_dim(groups, start, block)
        by_kept = suppresses(kept_boxes, kept_groups, block_boxes, block_groups)
        by_kept &= (jnp.arange(max_output) < count)[:, None]
        alive = ~by_kept.any(axis=0) & (start + offsets < num_valid)
        inside = suppresses(block_boxes, block_groups, block_boxes, block_groups) & earlier

        # Greedy suppression inside the block is the fixed point of the rule "a box is kept unless an earlier kept
        # box suppresses it"; each pass settles at least one more box of every chain.
        def pass_once(state):
            keep, _ = state
            again = alive & ~(inside & keep[:, None]).any(axis=0)
            return again, (again != keep).any()

        keep, _ = lax.while_loop(lambda state: state[1], pass_once, (alive, alive.any()))
        slot = jnp.where(keep, count + jnp.cumsum(keep) - 1, max_output)
        return (
            start + block,
            jnp.minimum(count + keep.sum(), max_output).astype(jnp.int32),
            kept.at[slot].set(start + offsets, mode="drop"),
            kept_boxes.at[:, slot].set(block_boxes, mode="drop"),
            kept_groups.at[slot].set(block_groups, mode="drop"),
        )

    start = (
        jnp.int32(0),
        jnp.int32(0),
        jnp.zeros(max_output, jnp.int32),
        jnp.zeros((5, max_output), boxes.dtype),
        jnp.zeros(max_output, groups.dtype),
    )
    _, count, kept, _, _ = lax.while_loop(unfinished, decide_block, start)
    return kept, count


def soft_nms(
    boxes: Real[AnyArray, "n 4"],
    scores: Real[AnyArray, "n"],
    valid: Bool[AnyArray, "n"] | None = None,
    *,
    kind: SoftNms = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    max_output: int | None = None,
    groups: Int[AnyArray, "n"] | None = None,
) -> SoftKept:
    """Returns the indices of the `max_output` best boxes, their lowered scores, and which of these entries are valid.

    Soft-NMS (Bodla et al. 2017, arXiv:1704.04503), section 3: the box with the best score is taken again and again,
    and the scores of the remaining boxes of its group are multiplied by a factor that depends on their IoU with it.
    linear: 1 - IoU if the IoU is above the threshold (eq. 2); gaussian: exp(-IoU^2 / sigma) (eq. 3). Boxes of equal
    score are taken by ascending index. Plain JAX, on every device. No gradient passes. Under `jax.jit`, the options are
    static except `groups`. The defaults are the paper's.

    Examples:
      >>> kept = soft_nms(np.array([[0, 0, 10, 10], [0, 0, 10, 10]]), np.array([0.5, 1.0]))
      >>> kept.indices, kept.scores.round(3)
      (Array([1, 0], dtype=int32), Array([1.   , 0.068], dtype=float32))

    Args:
      boxes: float32, as in `nms`.
      valid: as in `nms`.
      iou_threshold: for linear; gaussian has none.
      sigma: for gaussian; linear has none.
      score_threshold: a box whose score falls to this or less is dropped.
      max_output: as in `nms`.
      groups: boxes of different groups do not change each other's scores. None: all are in one group.
    Raises:
      TypeError: an array is of another type; boxes of 16 bits are refused.
      ValueError: an array has another shape, `iou_threshold` or `sigma` is out of range, or `max_output` is not
        positive.
    """
    boxes, scores, valid, groups = _inputs(boxes, scores, valid, groups)
    _check_limits(iou_threshold, max_output)
    if not sigma > 0.0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    max_output = boxes.shape[0] if max_output is None else max_output
    if boxes.shape[0] == 0:
        return SoftKept(jnp.zeros(max_output, jnp.int32), jnp.zeros(max_output), jnp.zeros(max_output, bool))
    # The factors are float32.
    scores = scores.astype(jnp.float32)
    boxes, scores = lax.stop_gradient((boxes, scores))
    threshold = _rounded_down(iou_threshold)

    def take_best(scores, _):
        best = jnp.argmax(scores)
        score = scores[best]
        iou = pairwise_iou(boxes[best][None], boxes)[0]
        factor = jnp.where(iou > threshold, 1.0 - iou, 1.0) if kind == "linear" else jnp.exp(-jnp.square(iou) / sigma)
        scores = jnp.where(groups == groups[best], scores * factor, scores)
        # Taken and dropped boxes have score -inf; of -inf only NaN or -inf can come, and NaN is not above it.
        scores = jnp.where(scores > score_threshold, scores, -jnp.inf).at[best].set(-jnp.inf)
        return scores, (best, score)

    start = jnp.where(valid & (scores > score_threshold), scores, -jnp.inf)
    _, (best, kept_scores) = lax.scan(take_best, start, length=max_output)
    is_kept = kept_scores > -jnp.inf
    return SoftKept(jnp.where(is_kept, best, 0).astype(jnp.int32), jnp.where(is_kept, kept_scores, 0.0), is_kept)
