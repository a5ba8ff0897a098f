"""Feature pyramid network. Lin et al. 2017 (arXiv:1612.03144), section 3."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fasterrcnn_jax.config import FpnConfig
from fasterrcnn_jax.models.layers import NORMS, Conv, conv_norm


class Fpn(nnx.Module):
    """Turns the backbone maps, fine to coarse, into a pyramid of maps that have equal numbers of channels.

    Every level adds the features of the coarser levels to its own.
    """

    def __init__(self, config: FpnConfig, in_channels: tuple[int, ...], *, rng: np.random.Generator):
        has_bias = config.norm == "none"

        def convs(sizes: Sequence[int], width: int):
            return nnx.List(
                [
                    # Half of He's variance, because no ReLU follows.
                    Conv(
                        size,
                        config.channels,
                        width,
                        bias=has_bias,
                        std=1.0 / (width * math.sqrt(size)),
                        rng=rng,
                    )
                    for size in sizes
                ]
            )

        def norms():
            return nnx.List([NORMS[config.norm](config.channels) for _ in in_channels])

        self.lateral, self.lateral_norms = convs(in_channels, 1), norms()
        self.output, self.output_norms = convs([config.channels] * len(in_channels), 3), norms()

    def __call__(
        self, maps: tuple[Float[Array, "b _ _ _"], ...], valids: tuple[Float[Array, "b _ _ 1"] | None, ...]
    ) -> tuple[Float[Array, "b _ _ c"], ...]:
        """Returns P2 to P5, and P6: every second row and column of P5.

        Args:
          maps: maps of the backbone; each is half as high and half as wide as the one before.
          valids: the mask of each map, as from `level_masks`; None if padding is not masked.
        """
        laterals = [
            conv_norm(conv, norm, x, valid)
            for conv, norm, x, valid in zip(self.lateral, self.lateral_norms, maps, valids, strict=True)
        ]
        for i in range(len(laterals) - 2, -1, -1):
            coarser = jnp.repeat(jnp.repeat(laterals[i + 1], 2, axis=1), 2, axis=2)
            # Border cells contain image content, so what is upsampled into padding does not depend on the canvas.
            laterals[i] = laterals[i] + coarser
        levels = [
            conv_norm(conv, norm, x, valid)
            for conv, norm, x, valid in zip(self.output, self.output_norms, laterals, valids, strict=True)
        ]
        return *levels, levels[-1][:, ::2, ::2]
