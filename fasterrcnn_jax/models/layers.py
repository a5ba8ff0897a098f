"""The layers of the networks: NHWC, functional, without mutation after construction.

One exception: in a training step, batch normalisation writes its next running averages into the copy of the model that
the step has made for itself.

`valid` is a [B, H, W, 1] float mask, 1 on the image and 0 on padding, or None if padding is not masked. With a
mask, a normalisation layer excludes padding from its statistics and returns zeros there.

Layers compute in the type of their input, float32 or bfloat16. Weights stay float32 and are rounded when they are
used; sums, biases and normalisation are float32, and their results are rounded.

On other devices than CPUs, fixed normalisation goes into the filters before it, and biases are added in the type of the
input (`regroups`): the libraries of a GPU then add bias and residual and apply the ReLU inside of the convolution.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, UInt8, UInt32

from fasterrcnn_jax.config import ImageConfig, ModelConfig
from fasterrcnn_jax.kernels import choice
from fasterrcnn_jax.ops.anchors import strides_of
from fasterrcnn_jax.ops.convolution import Padding, convolve
from fasterrcnn_jax.ops.depthwise import depthwise_conv, same_padding
from fasterrcnn_jax.structures import Images

Valid = Float[Array, "b h w 1"] | None
EPSILON = 1e-5
# Share of a step's statistics in the running averages of batch normalisation; PyTorch's sense and default.
MOMENTUM = 0.1

# Mean of the stds of R, G and B (0..255) over ImageNet: the std of pixels that are not divided by any std.
PIXEL_SPREAD = 57.7


class Constant(nnx.Variable):
    """A value that is saved with the parameters and never trained."""


class Running(nnx.Variable):
    """A running average: detection reads it, and a training step replaces it."""


class Undrawn(np.random.Generator):
    """A generator for `jax.eval_shape`: our layers take no numbers from it, because drawing them costs their memory."""


def _normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Array:
    if isinstance(rng, Undrawn):
        return jnp.zeros(shape)
    # Drawn on the host: one compilation per shape would take longer than the first training step.
    return jnp.asarray(std * rng.standard_normal(shape, np.float32))


def he_std(size: int, out_channels: int) -> float:
    """Returns the std of He et al. 2015 (arXiv:1502.01852), eq. 14: `sqrt(2 / n)` with fan out n."""
    return math.sqrt(2.0 / (size * size * out_channels))


def first_std(size: int, out_channels: int, image: ImageConfig) -> float:
    """Returns the std of the weights of the first layer: `he_std` divided by the std of its input pixels."""
    return he_std(size, out_channels) * float(np.mean(image.std)) / PIXEL_SPREAD


def regroups() -> bool:
    """Returns whether layers regroup their sums for a GPU; depends on JAX's default device while tracing.

    On a CPU it brings nothing: detection and training took 1.01 and 1.02 times as long (docs/decisions/0018).
    """
    return choice.device()[0] != "cpu"


@jax.custom_jvp
def relu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Returns `max(x, 0)`. The backward pass reads the result, so that nothing but the result need be stored."""
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(
    primals: tuple[Float[Array, "*b"]], tangents: tuple[Float[Array, "*b"]]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], jnp.zeros_like(y))


@jax.custom_jvp
def relu6(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Returns `min(max(x, 0), 6)`. The backward pass reads only the result, as in `relu`."""
    return lax.clamp(jnp.zeros((), x.dtype), x, jnp.asarray(6, x.dtype))


@relu6.defjvp
def _relu6_jvp(
    primals: tuple[Float[Array, "*b"]], tangents: tuple[Float[Array, "*b"]]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    y = relu6(*primals)
    return y, jnp.where((y > 0) & (y < 6), tangents[0], jnp.zeros_like(y))


class Conv(nnx.Module):
    """k x k convolution; with `predicts` the result is float32 for any type of input.

    Padding is (k - 1) / 2 on each side, or TensorFlow's SAME: as few zeros as `ceil(side / stride)` results need, and
    of an odd number one more at the far border.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        stride: int = 1,
        padding: Literal["half", "same"] = "half",
        bias: bool = False,
        std: float | None = None,
        predicts: bool = False,
        rng: np.random.Generator,
    ):
        std = he_std(size, out_channels) if std is None else std
        shape = (size, size, in_channels, out_channels)
        self.kernel = nnx.Param(_normal(rng, shape, std))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if bias else None
        self.stride = stride
        self.padding = padding
        self.predicts = predicts

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return self.biased(x, self.kernel[...], None if self.bias is None else self.bias[...])

    def scaled(
        self, x: Float[Array, "b h w c"], factor: Float[Array, "d"], shift: Float[Array, "d"]
    ) -> Float[Array, "b h2 w2 d"]:
        """Returns the result times `factor` plus `shift`, both of them inside of the filters and the bias."""
        bias = shift if self.bias is None else shift + factor * self.bias[...]
        return self.biased(x, self.kernel[...] * factor.reshape(1, 1, 1, -1), bias)

    def biased(
        self, x: Float[Array, "b h w c"], kernel: Float[Array, "k k c d"], bias: Float[Array, "d"] | None
    ) -> Float[Array, "b h2 w2 d"]:
        """Returns the convolution with other filters and another bias of the same size."""
        kernel, dtype = kernel.astype(x.dtype), _result_type(self, x)
        y = convolve(x, kernel, stride=self.stride, padding=self._zeros(x), dtype=dtype)
        return y if bias is None else _add_bias(bias, y)

    def inside(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h2 w2 d"]:
        """Returns the convolution without padding and with stride 1.

        It is one matrix product, for small maps: each cell is copied up to k x k times.
        """
        size, _, channels, outputs = self.kernel.shape
        rows, columns = x.shape[-3] - size + 1, x.shape[-2] - size + 1
        shifted = [x[..., j : j + rows, k : k + columns, :] for j in range(size) for k in range(size)]
        kernel = self.kernel[...].reshape(-1, outputs).astype(x.dtype)
        y = jnp.matmul(jnp.concatenate(shifted, axis=-1), kernel, preferred_element_type=_result_type(self, x))
        return y if self.bias is None else _add_bias(self.bias[...], y)

    def _zeros(self, x: Float[Array, "b h w c"]) -> Padding:
        size = self.kernel.shape[0]
        if self.padding == "half":
            half = (size - 1) // 2
            return (half, half), (half, half)
        return same_padding(x.shape[1], size, self.stride), same_padding(x.shape[2], size, self.stride)


class DepthwiseConv(nnx.Module):
    """k x k convolution of each channel alone, with TensorFlow's SAME padding."""

    def __init__(self, channels: int, size: int, *, stride: int, rng: np.random.Generator):
        self.kernel = nnx.Param(_normal(rng, (size, size, 1, channels), he_std(size, 1)))
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return depthwise_conv(x, self.kernel[...], stride=self.stride)

    def scaled(
        self, x: Float[Array, "b h w c"], factor: Float[Array, "c"], shift: Float[Array, "c"]
    ) -> Float[Array, "b h2 w2 c"]:
        """Returns the result times `factor` plus `shift`, the factor inside of the filters."""
        y = depthwise_conv(x, self.kernel[...] * factor.reshape(1, 1, 1, -1), stride=self.stride)
        return _add_bias(shift, y)


class Linear(nnx.Module):
    """Matrix product over the last axis, plus bias; with `predicts` the result is float32 for any type of input."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        std: float,
        rng: np.random.Generator,
        predicts: bool = False,
    ):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(_normal(rng, shape, std))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.predicts = predicts

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype), preferred_element_type=_result_type(self, x))
        return _add_bias(self.bias[...], y)


class GroupNorm(nnx.Module):
    """Group normalisation with statistics over the valid pixels of each image; Wu and He 2018 (arXiv:1803.08494)."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        # The paper's 32 groups, but never fewer than 8 channels in a group.
        self.groups = math.gcd(channels, min(32, channels // 8))

    def __call__(self, x: Float[Array, "b h w c"], valid: Valid = None) -> Float[Array, "b h w c"]:
        dtype, x = x.dtype, x.astype(jnp.float32)
        batch, height, width, channels = x.shape
        # Channel sums first, groups after: the large reduction keeps its contiguous last axis.
        if valid is None:
            count = jnp.full((batch, 1), float(height * width))
            total = x.sum(axis=(1, 2))
        else:
            count = valid.sum(axis=(1, 2))
            total = (x * valid).sum(axis=(1, 2))
        count = jnp.maximum(count * (channels // self.groups), 1.0)
        mean = self._over_group(total) / count
        centred = x - mean[:, None, None, :]
        if valid is not None:
            centred = centred * valid
        variance = self._over_group((centred * centred).sum(axis=(1, 2))) / count
        factor = lax.rsqrt(variance + EPSILON) * self.scale[...][None, :]
        y = centred * factor[:, None, None, :] + _per_channel(self.bias[...], x)
        return (y if valid is None else y * valid).astype(dtype)

    def _over_group(self, per_channel: Float[Array, "b c"]) -> Float[Array, "b c"]:
        batch, channels = per_channel.shape
        size = channels // self.groups
        totals = per_channel.reshape(batch, self.groups, size).sum(axis=2)
        return jnp.repeat(totals, size, axis=1)


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation with fixed statistics: a constant affine map of each channel."""

    def __init__(self, channels: int, *, epsilon: float = EPSILON):
        self.epsilon = epsilon
        self.scale = Constant(jnp.ones(channels))
        self.bias = Constant(jnp.zeros(channels))
        self.mean = Constant(jnp.zeros(channels))
        self.var = Constant(jnp.ones(channels))

    def __call__(self, x: Float[Array, "b h w c"], valid: Valid = None) -> Float[Array, "b h w c"]:
        centred = x.astype(jnp.float32) - _per_channel(self.mean[...], x)
        y = centred * _per_channel(self._factor(), x) + _per_channel(self.bias[...], x)
        return (y if valid is None else y * valid).astype(x.dtype)

    def factor_and_shift(self) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        """Returns the affine map of each channel: the result is `factor * x + shift`."""
        factor = self._factor()
        return factor, self.bias[...] - self.mean[...] * factor

    def _factor(self) -> Float[Array, "c"]:
        return self.scale[...] * lax.rsqrt(self.var[...] + self.epsilon)


class BatchNorm(nnx.Module):
    """Batch normalisation; Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithms 1 and 2.

    A layer normalises with its running averages. In a model that went through `use_batch_statistics` it normalises
    with mean and variance of the valid pixels of the batch, and puts the next running averages into its own variables.
    As in PyTorch, the running variance is the unbiased one.
    """

    def __init__(self, channels: int, *, epsilon: float = EPSILON):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = Running(jnp.zeros(channels))
        self.var = Running(jnp.ones(channels))
        # Names of the device axes that the batch is spread over; None: use the running averages.
        self.batch_axes: tuple[str, ...] | None = None

    def __call__(self, x: Float[Array, "b h w c"], valid: Valid = None) -> Float[Array, "b h w c"]:
        dtype, x = x.dtype, x.astype(jnp.float32)
        mean, var = (self.mean[...], self.var[...]) if self.batch_axes is None else self._batch_statistics(x, valid)
        factor = self.scale[...] * lax.rsqrt(var + self.epsilon)
        y = (x - _per_channel(mean, x)) * _per_channel(factor, x) + _per_channel(self.bias[...], x)
        return (y if valid is None else y * valid).astype(dtype)

    def _batch_statistics(
        self, x: Float[Array, "b h w c"], valid: Valid
    ) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        """Returns mean and biased variance over the valid pixels on all devices, and moves the running averages."""
        axes = self.batch_axes
        weight = jnp.ones((*x.shape[:3], 1)) if valid is None else jnp.broadcast_to(valid, (*x.shape[:3], 1))

        def total(values: Float[Array, "b h w k"]) -> Float[Array, "k"]:
            # Each device differentiates its own part of the loss. The transpose of this sum adds the derivatives that
            # all parts have with respect to the shared statistics, which is the derivative of the whole loss.
            over_pixels = values.sum(axis=(0, 1, 2))
            return lax.psum(over_pixels, axes) if axes else over_pixels

        count = total(weight)
        mean = total(x * weight) / jnp.maximum(count, 1.0)
        centred = (x - _per_channel(mean, x)) * weight
        var = total(centred * centred) / jnp.maximum(count, 1.0)
        # A batch without any valid pixel says nothing.
        share = jnp.where(count > 0.0, MOMENTUM, 0.0)
        for average, new in ((self.mean, mean), (self.var, var * count / jnp.maximum(count - 1.0, 1.0))):
            average[...] = (1.0 - share) * average[...] + share * lax.stop_gradient(new)
        return mean, var


# Not "*#b c": jaxtyping cannot broadcast a symbolic batch size, which an exported program has.
def _per_channel(values: Float[Array, "c"], x: Float[Array, "*b c"]) -> Float[Array, "... c"]:
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


def _result_type(layer: Conv | Linear, x: Array) -> jnp.dtype:
    # Rounded to bfloat16, hundreds of scores would be equal and box deltas would move boxes by pixels.
    return jnp.dtype(jnp.float32) if layer.predicts else x.dtype


def _add_bias(bias: Float[Array, "c"], y: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    if regroups():
        return _add_rounded_bias(bias, y)
    # In float32, so that the bias' gradient, a sum over all cells, is float32 too.
    return (y.astype(jnp.float32) + _per_channel(bias, y)).astype(y.dtype)


@jax.custom_vjp
def _add_rounded_bias(bias: Float[Array, "c"], y: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Returns `y` plus the bias in the type of `y`; the bias' gradient, a sum over all cells, is float32."""
    return y + _per_channel(bias.astype(y.dtype), y)


def _add_rounded_bias_forward(bias: Array, y: Array) -> tuple[Array, None]:
    return _add_rounded_bias(bias, y), None


def _add_rounded_bias_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient.astype(jnp.float32).sum(axis=tuple(range(gradient.ndim - 1))), gradient


_add_rounded_bias.defvjp(_add_rounded_bias_forward, _add_rounded_bias_backward)


def conv_norm(
    conv: Conv | DepthwiseConv,
    norm: nnx.Module,
    x: Float[Array, "b h w c"],
    valid: Float[Array, "b h2 w2 1"] | None = None,
) -> Float[Array, "b h2 w2 d"]:
    """Returns `norm(conv(x), valid)`; `regroups` decides whether fixed statistics go into the filters and the bias."""
    if not (isinstance(norm, FrozenBatchNorm) and regroups()):
        return norm(conv(x), valid)
    y = conv.scaled(x, *norm.factor_and_shift())
    return y if valid is None else y * valid.astype(y.dtype)


def conv_joined(
    first: Conv, second: Conv, x: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b h2 w2 d"], Float[Array, "b h2 w2 d2"]]:
    """Returns `first(x), second(x)`, of two convolutions with bias and of equal size and stride, as one convolution."""
    assert first.bias is not None and second.bias is not None, "both have a bias"
    kernel = jnp.concatenate([first.kernel[...], second.kernel[...]], axis=-1)
    y = first.biased(x, kernel, jnp.concatenate([first.bias[...], second.bias[...]]))
    channels = first.kernel.shape[-1]
    return y[..., :channels], y[..., channels:]


class Masked(nnx.Module):
    """No normalisation; returns zeros on padding, as the normalisation layers do."""

    def __init__(self, channels: int):
        del channels

    def __call__(self, x: Float[Array, "b h w c"], valid: Valid = None) -> Float[Array, "b h w c"]:
        return x if valid is None else x * valid.astype(x.dtype)


NORMS = {"none": Masked, "group": GroupNorm, "frozen_batch": FrozenBatchNorm, "batch": BatchNorm}


def max_pool(x: Float[Array, "b h w c"], *, size: int, padding: tuple[int, int] = (0, 0)) -> Float[Array, "b h2 w2 c"]:
    """Returns size x size max pooling with stride 2; `padding`, before and after the input, is never the maximum."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, 2, 2, 1), ((0, 0), padding, padding, (0, 0)))


def dropout(key: PRNGKeyArray | UInt32[Array, "2"], x: Float[Array, "*b"], *, rate: float) -> Float[Array, "*b"]:
    """Returns `x` with each value zero with probability `rate`, the others divided by 1 - rate.

    Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting".
    """
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0)


def sides_of(images: Float[Array, "b h w _"] | UInt8[Array, "b h w _"]) -> tuple[int, int]:
    """Returns the (height, width) of images or feature maps."""
    return images.shape[1], images.shape[2]


def valid_mask(image_hw: Float[Array, "b 2"], grid_hw: tuple[int, int], stride: int) -> Float[Array, "b h w 1"]:
    """Returns a mask of a map with this stride: 1 on the cells with image content, the first ceil(side / stride)."""
    rows, columns = (jnp.arange(size, dtype=jnp.float32) * stride for size in grid_hw)
    inside = (rows[None, :, None] < image_hw[:, 0, None, None]) & (columns[None, None, :] < image_hw[:, 1, None, None])
    return inside[..., None].astype(jnp.float32)


def run_stage(stage: nnx.Module, *inputs: Float[Array, "b _ _ _"] | None, remat: bool) -> Float[Array, "b _ _ _"]:
    """Returns `stage(*inputs)`; with `remat` the backward pass recomputes the activations of the stage.

    Chen et al. 2016, arXiv:1604.06174.
    """
    if not remat:
        return stage(*inputs)

    def run(stage: nnx.Module, *inputs: Float[Array, "b _ _ _"] | None) -> tuple[Array, PyTree]:
        return stage(*inputs), nnx.state(stage, Running)

    y, running = jax.checkpoint(run)(stage, *inputs)
    # Inside, the stage is a copy, and so are the variables that batch normalisation has changed.
    nnx.update(stage, running)
    return y


def normalised(images: Images, image_hw: Float[Array, "b 2"], config: ImageConfig) -> Float[Array, "b h w 3"]:
    """Returns the images minus mean, divided by std, and zero beyond `image_hw`; the host normalises float images.

    Raises:
      TypeError: the type of the images is not `config.pixel_dtype`: they would be normalised twice or never.
    """
    if (images.dtype == jnp.uint8) != (config.pixel_dtype == "uint8"):
        raise TypeError(f"images must be {config.pixel_dtype} (model.image.pixel_dtype), got {images.dtype.name}")
    if config.pixel_dtype == "float32":
        return images
    mean, std = (np.asarray(values, np.float32).reshape(1, 1, 1, 3) for values in (config.mean, config.std))
    return (images.astype(jnp.float32) - mean) / std * valid_mask(image_hw, sides_of(images), 1)


def level_masks(
    config: ModelConfig, maps: tuple[Float[Array, "b _ _ _"], ...], image_hw: Float[Array, "b 2"]
) -> tuple[Float[Array, "b _ _ 1"] | None, ...]:
    """Returns the `valid_mask` of each map; None for each map if padding is not masked."""
    if not config.backbone.mask_padding:
        return (None,) * len(maps)
    return tuple(valid_mask(image_hw, sides_of(x), stride) for x, stride in zip(maps, strides_of(config), strict=False))
