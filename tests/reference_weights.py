"""Weights made by rule in place of stored ones, and where each of the reference's stands in our detector.

tests/golden/README.md states the rule. A table maps our path to the reference's key and to how its layout
(OIHW convolutions, (out, in) matrices) becomes ours (HWIO, (in, out)).
"""

import json
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

GAINS = (  # the first part of a name that occurs in the key
    ("RCNN_rpn.RPN_cls_score", 1.5),
    ("RCNN_rpn.RPN_bbox_pred", 0.2),
    ("RCNN_cls_score", 2.0),
    ("RCNN_bbox_pred", 0.7),
    ("RCNN_base.0.weight", 1.4142135 / 60),
)


def rule_weight(key: str, shape: list[int], salt: int) -> np.ndarray:
    noise = np.random.default_rng([zlib.crc32(key.encode()), salt]).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        return np.float32(1) + np.float32(0.1) * np.abs(noise)
    if key.endswith("running_mean"):
        return np.float32(0.1) * noise
    if key.endswith("bias"):
        return np.float32(0.05) * noise
    if len(shape) == 1:
        scale = np.float32(0.25 if key.endswith("bn3.weight") else 1.0)
        return scale * (np.float32(1) + np.float32(0.1) * noise)
    gain = next((value for part, value in GAINS if part in key), 1.4142135)
    return noise * np.float32(gain / np.sqrt(np.prod(shape[1:])))


def rule_weights(golden) -> dict[str, np.ndarray]:
    """Returns every weight of a model's golden file, its checksum compared."""
    weights = {}
    for key, shape, checksum in zip(golden["state_keys"], golden["state_shapes"], golden["state_crc32"]):
        weights[str(key)] = rule_weight(str(key), json.loads(str(shape)), int(golden["salt"]))
        assert zlib.crc32(weights[str(key)].tobytes()) == checksum, key
    return weights


class Source(NamedTuple):
    key: str
    ours: Callable[[np.ndarray], np.ndarray] = lambda value: value  # reference layout -> ours
    theirs: Callable[[np.ndarray], np.ndarray] = lambda value: value  # back, for gradients


def conv(key: str) -> Source:
    return Source(key, lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))


def linear(key: str) -> Source:
    return Source(key, np.transpose, np.transpose)


def after_pooling(key: str, size: int) -> Source:
    """A matrix on features laid out as channel, row, column there and row, column, channel here."""

    def ours(w):
        return w.reshape(len(w), -1, size, size).transpose(2, 3, 1, 0).reshape(-1, len(w))

    def theirs(w):
        return w.reshape(size, size, -1, w.shape[1]).transpose(3, 2, 0, 1).reshape(w.shape[1], -1)

    return Source(key, ours, theirs)


def two_logits(key: str) -> Source:
    """Objectness: the difference of the reference's foreground and background logits.

    Going back, the gradient of the one logit is that of the foreground logit, and minus that of the other.
    """
    conv_like = conv(key)

    def ours(w):
        background, foreground = np.split(w, 2)
        difference = foreground - background
        return conv_like.ours(difference) if w.ndim == 4 else difference

    def theirs(w):
        w = conv_like.theirs(w) if w.ndim == 4 else w
        return np.concatenate([-w, w])

    return Source(key, ours, theirs)


def _norm(ours: str, theirs: str) -> dict[str, Source]:
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return {f"{ours}/{name}": Source(f"{theirs}.{key}") for name, key in names.items()}


def _with_bias(ours: str, theirs: str, kernel: Callable[[str], Source]) -> dict[str, Source]:
    return {f"{ours}/kernel": kernel(f"{theirs}.weight"), f"{ours}/bias": Source(f"{theirs}.bias")}


def _rpn_and_predictors() -> dict[str, Source]:
    return {
        **_with_bias("rpn_head/conv", "RCNN_rpn.RPN_Conv", conv),
        "rpn_head/objectness/kernel": two_logits("RCNN_rpn.RPN_cls_score.weight"),
        "rpn_head/objectness/bias": two_logits("RCNN_rpn.RPN_cls_score.bias"),
        **_with_bias("rpn_head/deltas", "RCNN_rpn.RPN_bbox_pred", conv),
        **_with_bias("box_head/class_logits", "RCNN_cls_score", linear),
        **_with_bias("box_head/deltas", "RCNN_bbox_pred", linear),
    }


def vgg16_table() -> dict[str, Source]:
    table = _rpn_and_predictors()
    index = 0
    for stage, convs in enumerate((2, 2, 3, 3, 3)):
        for i in range(convs):
            table |= _with_bias(f"backbone/stages/{stage}/convs/{i}", f"RCNN_base.{index}", conv)
            index += 2  # a ReLU between two convolutions
        index += 1  # a pooling behind each stage
    table |= _with_bias("box_head/tail/fc6", "RCNN_top.0", lambda key: after_pooling(key, 7))
    return table | _with_bias("box_head/tail/fc7", "RCNN_top.3", linear)


def resnet_c4_table(blocks: tuple[int, int, int, int]) -> dict[str, Source]:
    table = _rpn_and_predictors()
    table["backbone/stem/kernel"] = conv("RCNN_base.0.weight")
    table |= _norm("backbone/stem_norm", "RCNN_base.1")
    stages = [(f"backbone/stages/{i}", f"RCNN_base.{i + 4}") for i in range(3)]
    stages.append(("box_head/tail/stage", "RCNN_top.0"))
    for (ours, theirs), count in zip(stages, blocks):
        for i in range(count):
            for j in range(3):
                table[f"{ours}/blocks/{i}/convs/{j}/kernel"] = conv(f"{theirs}.{i}.conv{j + 1}.weight")
                table |= _norm(f"{ours}/blocks/{i}/norms/{j}", f"{theirs}.{i}.bn{j + 1}")
        table[f"{ours}/blocks/0/shortcut/kernel"] = conv(f"{theirs}.0.downsample.0.weight")
        table |= _norm(f"{ours}/blocks/0/shortcut_norm", f"{theirs}.0.downsample.1")
    return table


def load(builder: Callable[[], nnx.Module], table: dict[str, Source], weights: dict[str, np.ndarray]) -> nnx.Module:
    """Returns the module with every weight taken from the reference, none left over on either side."""
    graphdef, state = nnx.split(nnx.eval_shape(builder))
    used = set()

    def value(path, leaf):
        source = table[name_of(path)]
        used.add(source.key)
        converted = source.ours(weights[source.key])
        assert converted.shape == leaf.shape, (name_of(path), converted.shape, leaf.shape)
        return jnp.asarray(converted)

    state = jax.tree_util.tree_map_with_path(value, state)
    assert used == set(weights), set(weights) ^ used
    return nnx.merge(graphdef, state)


def name_of(path) -> str:
    return "/".join(str(part.key) for part in path if hasattr(part, "key"))
