"""Checks of field values. Each raises a ValueError that names the field and the value."""

from typing import Literal, TypeVar

from fasterrcnn_jax.errors import InputError

# The value of a field that a training fits to its data.
Auto = Literal["auto"]
AUTO: Auto = "auto"

Value = TypeVar("Value")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_fraction(**fields: float) -> None:
    for name, value in fields.items():
        require(0.0 <= value <= 1.0, f"{name} must be in [0, 1], got {value}")


def require_positive(**fields: float) -> None:
    for name, value in fields.items():
        require(value > 0, f"{name} must be positive, got {value}")


def require_not_negative(**fields: float) -> None:
    for name, value in fields.items():
        require(value >= 0, f"{name} must not be negative, got {value}")


def fitted(value: Value | Auto, field: str) -> Value:
    """Returns the value of a field that can be "auto".

    Raises:
      InputError: the value is "auto". A training fits such fields to its data before it reads them.
    """
    if value == AUTO:
        raise InputError(f"{field} is auto, which only a training can fit to its data; give a value")
    return value  # pyright: ignore[reportReturnType] - not AUTO


def require_at_most(limit: int, **fields: int) -> None:
    """Limits a size that a hostile file could declare. No published network comes near any of these limits."""
    for name, value in fields.items():
        require(value <= limit, f"{name} must be at most {limit}, got {value}")
