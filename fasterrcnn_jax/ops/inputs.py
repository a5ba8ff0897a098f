"""Reads the arrays that callers give to the operations: JAX's and NumPy's, with one rule for their types and shapes.

Boxes are float32. float64 and integers are converted. float16 and bfloat16 boxes are refused, because their coordinates
have been rounded already: among 1000 pixels, neighbours are 0.5 apart in float16 and 4 apart in bfloat16.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# What an operation takes where it says `Real[AnyArray, "n 4"]`.
AnyArray = Array | np.ndarray


def box_array(boxes: Any, name: str = "boxes", *, one_list: bool = False) -> Float[Array, "*n 4"]:
    """Returns boxes in float32.

    Args:
      name: the argument, for messages.
      one_list: the shape must be [n, 4].
    Raises:
      TypeError: they are neither float32, nor float64, nor integers.
      ValueError: they have another shape.
    """
    if isinstance(boxes, np.ndarray) and np.issubdtype(boxes.dtype, np.integer):
        # JAX would cut 64-bit integers to 32 bits.
        boxes = boxes.astype(np.float32)
    boxes = jnp.asarray(boxes)
    if boxes.dtype.itemsize < 4 and jnp.issubdtype(boxes.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be float32, got {boxes.dtype.name}, which rounds the coordinates of large images: compute "
            "them in float32, or convert them with astype(float32) if the rounding does no harm"
        )
    boxes = real_array(boxes, name)
    if boxes.shape == (0,):
        boxes = boxes.reshape(0, 4)  # of an empty list
    if boxes.shape[-1:] != (4,) or (one_list and boxes.ndim != 2):
        wanted = "[n, 4]" if one_list else "[..., 4]"
        mapped = "; map a batch with jax.vmap" if one_list and boxes.ndim > 2 else ""
        raise ValueError(f"{name} must have the shape {wanted} (x1, y1, x2, y2), got {list(boxes.shape)}{mapped}")
    return boxes


def real_array(values: Any, name: str) -> Float[Array, "..."]:
    """Returns numbers in float32.

    Raises:
      TypeError: they are neither floating-point values nor integers.
    """
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating) and not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name} must be float32, got {values.dtype.name}")
    return values.astype(jnp.float32)


def one_per_box(values: Any, name: str, count: Any) -> Any:
    """Returns an array with one value for each box.

    Raises:
      ValueError: it has another shape.
    """
    values = jnp.asarray(values)
    if values.shape != (count,):
        raise ValueError(f"{name} must have one value for each of the {count} boxes, got shape {list(values.shape)}")
    return values


def validity(valid: Any, count: Any, name: str = "valid") -> Bool[Array, "n"]:
    """Returns a mask of the entries that count; None: all of them.

    Raises:
      TypeError: it is not boolean.
      ValueError: it has another shape.
    """
    if valid is None:
        return jnp.ones(count, bool)
    valid = one_per_box(valid, name, count)
    if valid.dtype != jnp.bool_ and valid.size:  # an empty list becomes float32
        raise TypeError(f"{name} must be boolean, got {valid.dtype.name}")
    return valid.astype(bool)


def whole_numbers(values: Any, name: str, count: Any) -> Int[Array, "n"]:
    """Returns a whole number for each box; None: 0 for all.

    Raises:
      TypeError: they are not integers.
      ValueError: they have another shape, or a NumPy value needs more than 32 bits.
    """
    if values is None:
        return jnp.zeros(count, jnp.int32)
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and not np.all(values == values.astype(np.int32)):
        # JAX would cut them to 32 bits, and two groups could become one.
        raise ValueError(f"{name} must fit into 32 bits, got values from {values.min()} to {values.max()}")
    values = one_per_box(values, name, count)
    if not jnp.issubdtype(values.dtype, jnp.integer) and values.size:  # an empty list becomes float32
        raise TypeError(f"{name} must be integers, got {values.dtype.name}")
    return values.astype(jnp.int32)


def feature_map(features: Any) -> Float[Array, "h w c"]:
    """Returns one map in its floating-point type; integers, such as the pixels of an image, in float32.

    Raises:
      TypeError: it holds neither floating-point values nor integers.
      ValueError: it has another number of axes.
    """
    features = jnp.asarray(features)
    if features.ndim != 3:
        mapped = "; map a batch with jax.vmap" if features.ndim == 4 else ""
        raise ValueError(f"a map must have the shape [height, width, channels], got {list(features.shape)}{mapped}")
    return features if jnp.issubdtype(features.dtype, jnp.floating) else real_array(features, "a map")


def require_positive_strides(strides: Sequence[float]) -> None:
    """Raises ValueError unless every stride is a positive number."""
    if not all(0.0 < stride < float("inf") for stride in strides):
        raise ValueError(f"a stride must be positive, got {', '.join(map(str, strides))}")


def two_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (rows, columns) of a number of cells, or of two.

    Raises:
      ValueError: a number is not positive, or it is not one or two whole numbers.
    """
    sides = (size, size) if isinstance(size, (int, np.integer)) else size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(isinstance(n, (int, np.integer)) for n in sides):
        raise ValueError(f"output_size must be a whole number or (rows, columns), got {size}")
    rows, columns = sides
    if min(rows, columns) < 1:
        raise ValueError(f"output_size must be at least 1, got {size}")
    return rows, columns
