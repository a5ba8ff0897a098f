"""Makes weights by rule instead of storing them, and maps the weights of a reference to our detector.

tests/golden/README.md states the rule.
"""

import json
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from reference_rule import rule_weight

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.config.families import resnet_c4, vgg16
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.models.resnet import BLOCKS
from fasterrcnn_jax.weights.files import Weights
from fasterrcnn_jax.weights.layouts import TWO_LOGITS, Layout
from fasterrcnn_jax.weights.load import assign, formats_of
from fasterrcnn_jax.weights.tables import (
    FASTER_RCNN_PYTORCH,
    TORCHVISION_FPN,
    Format,
    find,
)


def rule_weights(golden) -> dict[str, np.ndarray]:
    """Returns every weight of a model's golden file; checks the checksums."""
    weights = {}
    for key, shape, checksum in zip(golden["state_keys"], golden["state_shapes"], golden["state_crc32"]):
        weights[str(key)] = rule_weight(str(key), json.loads(str(shape)), int(golden["salt"]))
        assert zlib.crc32(weights[str(key)].tobytes()) == checksum, key
    return weights


class Source(NamedTuple):
    key: str
    theirs: Callable[[np.ndarray], np.ndarray]  # our gradient -> theirs


def _of_two_logits(gradient: np.ndarray) -> np.ndarray:
    """The gradient of our logit equals that of the foreground logit and minus that of the background logit."""
    gradient = np.split(TWO_LOGITS.theirs(gradient), 2)[1]
    return np.concatenate([-gradient, gradient])


def _gradient_of(layout: Layout) -> Callable[[np.ndarray], np.ndarray]:
    # Everywhere else the numbers of a weight only change places, and so do those of its gradient.
    return _of_two_logits if layout is TWO_LOGITS else layout.theirs


def table(format: Format, config: ModelConfig) -> dict[str, Source]:
    """Returns our names of a detector's weights, each with its source."""
    _, state = nnx.split(jax.eval_shape(lambda: create_detector(config, ("class1",), seed=0)))
    found = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(state):
        module, _, last = name_of(path).rpartition("/")
        keys, layout = find(format.rows(config), module)
        found[name_of(path)] = Source(keys[0] + format.leaves[last], _gradient_of(layout))
    return found


def vgg16_table() -> dict[str, Source]:
    return table(FASTER_RCNN_PYTORCH, vgg16())


def resnet_c4_table(blocks: tuple[int, int, int, int]) -> dict[str, Source]:
    (depth,) = (depth for depth in (50, 101, 152) if BLOCKS[depth] == blocks)
    return table(FASTER_RCNN_PYTORCH, resnet_c4(depth))


def torchvision_fpn_table(config: ModelConfig) -> dict[str, Source]:
    return table(TORCHVISION_FPN, config)


def load(builder: Callable[[], nnx.Module], table: dict[str, Source], weights: dict[str, np.ndarray]) -> nnx.Module:
    """Returns the module with all weights of the reference; checks that no weight is missing or unused."""
    read = Weights(weights, {}, sha256="")
    (format,) = formats_of(read)
    model, report = assign(jax.eval_shape(builder), read, format, where="rule weights")
    assert not report.unused and not report.kept, report
    assert report.sources == {name: source.key for name, source in table.items()}
    return model


def name_of(path) -> str:
    return "/".join(str(part.key) for part in path if hasattr(part, "key"))
